"""The network namespace of a sandbox, which is the pod's or a new one, and work inside it.

Only a thread enters it, and never leaves it: the process stays in its own namespace, even after a failure.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from shim.errors import Internal, InvalidArgument
from shim.host import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.agent.oci_namespaces import WantedNamespace

_T = TypeVar("_T")

JOB_TIMEOUT_S = 60.0  # netlink answers in milliseconds, but on a busy host the request may be late
_THREADS = "network namespace"


class NetworkNamespace:
    """An open network namespace.

    :param descriptor: the namespace; closed by :meth:`close`.
    :param wanted_path: the requested path; None for the sandbox's own namespace.
    """

    def __init__(self, descriptor: int, *, wanted_path: Path | None) -> None:
        self.wanted_path = wanted_path
        self._descriptor = descriptor
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix=_THREADS,
            initializer=kernel.enter_network_namespace,
            initargs=(descriptor,),
        )

    @classmethod
    async def open(cls, wanted: WantedNamespace) -> Self:
        """Open the wanted namespace, or make it.

        :raises InvalidArgument: if there is none at the path, or it is the host's.
        :raises Internal: if a new one cannot be made.
        """
        if wanted.path is None:
            return cls(await _make(), wanted_path=None)
        try:
            descriptor = _open(wanted.path)
        except (OSError, ValueError) as error:  # a path with a NUL byte
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidArgument(
                f"network: namespace {wanted.path}: {reason}; make it before the container"
            ) from error
        if os.path.samestat(os.fstat(descriptor), os.stat("/proc/self/ns/net")):  # noqa: PTH116 - like os.fstat above
            os.close(descriptor)
            raise InvalidArgument(
                f"network: namespace {wanted.path}: it is the host's own, which a machine cannot share; "
                "give the container another"
            )
        return cls(descriptor, wanted_path=wanted.path)

    @property
    def path(self) -> Path:
        """A path by which any process may enter it while it is open, even if its own path is gone."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    @property
    def number(self) -> int:
        """Its inode number, unique among network namespaces."""
        return os.fstat(self._descriptor).st_ino

    async def run(self, job: Callable[[], _T]) -> _T:
        """Run a short job in a thread inside the namespace, after all earlier jobs.

        :param job: the job; it runs to its end even if the caller is cancelled.
        :returns: the job's result; its errors are raised.
        :raises Internal: if the namespace cannot be entered, or the job takes too long.
        """
        try:
            async with asyncio.timeout(JOB_TIMEOUT_S):
                return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._executor, job))
        except TimeoutError:
            raise Internal(
                f"network: the kernel did not answer within {JOB_TIMEOUT_S:g} s; look for what holds its lock"
            ) from None
        except BrokenExecutor as error:
            raise Internal("network: the namespace cannot be entered; run the shim as root") from error

    def close(self) -> None:
        """Leave the namespace; its path is no longer valid."""
        self._executor.shutdown(wait=False)
        os.close(self._descriptor)


def _open(path: Path) -> int:
    # A FIFO would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not kernel.is_network_namespace(descriptor):
            raise OSError(errno.EINVAL, "not a network namespace")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def _make() -> int:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=_THREADS) as executor:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, _open_new)
        except OSError as error:
            raise Internal(
                f"network: a new namespace: {error.strerror}; see the limits in /proc/sys/user"
            ) from error


def _open_new() -> int:
    kernel.enter_new_network_namespace()
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
