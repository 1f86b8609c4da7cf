"""The files that containerd leaves for a runtime in a container's bundle directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument
from shim.host import spec_file
from shim.host.answering import all_answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def read_spec(bundle: Path) -> dict[str, Any]:
    """Read a bundle's ``config.json``.

    :returns: its object, for reading only: see :func:`shim.host.spec_file.read`.
    :raises InvalidArgument: if it is missing or not a JSON object.
    """
    path = spec_file.path_in(str(bundle))
    try:
        spec = spec_file.read(str(bundle))
    except OSError as error:
        raise InvalidArgument(f"spec: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"spec: {path}: not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidArgument(f"spec: {path}: not a JSON object")
    return spec


async def wait_for_spec(bundle: Path, *, others: Iterable[str] = (), phase: str) -> None:
    """Wait until a specification, and each file that it names, can be read without hanging the shim.

    :param bundle: the bundle directory.
    :param others: further paths that the client names.
    :param phase: the beginning of an error's message.
    :raises InvalidArgument: as :func:`read_spec`.
    :raises DeadlineExceeded: if the file system of a path does not answer.
    """
    await all_answer([spec_file.path_in(str(bundle)), *others], phase=phase)
    await all_answer(_named_by(read_spec(bundle), bundle), phase=phase)


def _named_by(spec: dict[str, Any], bundle: Path) -> Iterator[str]:
    """Yield the host's paths that a specification names; what is malformed is refused elsewhere."""
    linux, hooks = (one if isinstance(one, dict) else {} for one in (spec.get("linux"), spec.get("hooks")))
    for parts, key in (
        (spec.get("mounts"), "source"),
        ([spec.get("root")], "path"),
        (linux.get("namespaces"), "path"),
        *((each, "path") for each in hooks.values()),
    ):
        for part in parts if isinstance(parts, list) else []:
            path = part.get(key) if isinstance(part, dict) else None
            if isinstance(path, str) and path:
                yield str(bundle / path)
