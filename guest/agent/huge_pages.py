"""Huge pages for containers whose specifications limit them: the machine reserves as many as they may use.

On an ordinary host, an administrator reserves pages. Here the host adds the memory for them with the
container, and removes it with the container.
"""

from __future__ import annotations

import _thread

from guest.agent import files
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from guest.agent.wire import Message

_POOLS = "/sys/kernel/mm/hugepages"
_COMPACT = "/proc/sys/vm/compact_memory"
_UNITS = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}

_lock = _thread.allocate_lock()
_wanted: dict[str, dict[int, int]] = {}
"""How much each user may use: bytes by page size."""


def reserve(user: str, limits: dict[int, int]) -> None:
    """Reserve as many pages as a user may use; this replaces the user's earlier reservation.

    :param user: a container's id, or a mount point.
    :param limits: bytes by the size of the pages, in bytes.
    :raises AgentError: if the kernel has no such pages, or not enough memory in one piece.
    """
    with _lock:
        before = _wanted.get(user, {})
        _wanted[user] = limits
        try:
            for size in sorted({*before, *limits}):
                _set_aside(size)
        except AgentError:
            _wanted[user] = before
            for size in limits:
                _give_back(size)
            raise


def release(user: str) -> None:
    """Give back a user's pages, if the user has any.

    :param user: as for :func:`reserve`.
    """
    with _lock:
        for size in _wanted.pop(user, {}):
            _give_back(size)


def limits_of(messages: Iterable[Message]) -> dict[int, int]:
    """Read limits.

    :param messages: grpc.LinuxHugepageLimit messages.
    :returns: bytes by the size of the pages, in bytes.
    :raises AgentError: if the size of a page is malformed.
    """
    return {size_of(one.Pagesize): one.Limit for one in messages if one.Limit}


def is_known(size: str) -> bool:
    """Tell whether the machine can have pages of a given size.

    :param size: such as ``2MB``; a host may have sizes that no guest has.
    """
    try:
        return files.exists(_pool(size_of(size)))
    except AgentError:
        return False


def size_of(text: str) -> int:
    """Read a page's size as control groups write it.

    :param text: such as ``2MB``.
    :returns: bytes.
    :raises AgentError: if it is malformed.
    """
    number, unit = text[:-2], text[-2:]
    if unit not in _UNITS or not (number.isascii() and number.isdigit()):
        raise AgentError(f"huge pages: {text!r}: not a page's size; write it like 2MB")
    return int(number) * _UNITS[unit]


def _pages(size: int) -> int:
    return sum(-(-limits.get(size, 0) // size) for limits in _wanted.values())


def _set_aside(size: int) -> None:
    pool, pages = _pool(size), _pages(size)
    try:
        files.write(pool, f"{pages}")
    except FileNotFoundError:
        raise AgentError(
            f"huge pages: the guest's processor or kernel has none of {size >> 10} KiB; use another size"
        ) from None
    if int(files.read(pool)) < pages:
        # Memory in use lies in between; the kernel must move it.
        files.write(_COMPACT, "1")
        files.write(pool, f"{pages}")
    found = int(files.read(pool))
    if found < pages:
        raise AgentError(
            f"huge pages: there is memory for {found} of {pages} pages of {size >> 10} KiB; lower the limit"
        )


def _give_back(size: int) -> None:
    try:
        files.write(_pool(size), f"{_pages(size)}")
    except FileNotFoundError:
        return


def _pool(size: int) -> str:
    return f"{_POOLS}/hugepages-{size >> 10}kB/nr_hugepages"
