"""The identifiers that containerd accepts."""

from __future__ import annotations

from shim.refusal import Refusal

_MAX_IDENTIFIER = 76


def check_identifier(identifier: str, *, phase: str, what: str) -> None:
    """Accept only what containerd accepts as an identifier, which is always one safe path segment.

    :param identifier: an id, a namespace or a group.
    :param phase: how the message begins.
    :param what: how the message names it.
    :raises Refusal: if it is empty, longer than 76 characters, or has other characters than letters, digits,
        ``-``, ``_`` and ``.``, or does not start with a letter or digit.
    """
    if not identifier:
        raise Refusal(f"{phase}: {what}: it is empty; give one")
    if len(identifier) > _MAX_IDENTIFIER:
        raise Refusal(
            f"{phase}: {what} {identifier[:16]}...: it has {len(identifier)} characters; "
            f"give at most {_MAX_IDENTIFIER}"
        )
    plain = identifier.translate({ord(mark): None for mark in "-_."})
    if not (plain.isascii() and plain.isalnum() and identifier[0].isalnum()):
        raise Refusal(
            f"{phase}: {what} {identifier!r}: it must be letters, digits, '-', '_' and '.', "
            "with a letter or digit first; choose another"
        )
