"""The virtio-fs daemon: its two dialects, and the socket between it and QEMU."""

from __future__ import annotations

import asyncio
import enum
import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.argv import SHARE_QUEUE
from hypervisor.confinement import SHARE as SHARE_PLACE
from hypervisor.confinement import of_share_daemon
from hypervisor.devices import Command, Description, socket_chardev
from hypervisor.errors import VmStartError
from hypervisor.process import ChildProcess
from hypervisor.seclusion import show_share_only
from proto.extensions import SHARE_TAG

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.devices import Devices
    from hypervisor.host_side import HostSide
    from hypervisor.interface import VmSpec
    from hypervisor.qmp import QmpSession

NAME = "virtio-fs daemon"

SHARE = "share"
"""What QEMU calls the share's device and the connection behind it."""

_HELP_TIMEOUT_S = 5.0

_FILE_LIMIT = re.compile(r"^Max open files +(\d+) ", re.MULTILINE)
_WANTED_FILES = 1_000_000
"""How many open files both daemons ask for."""

_TRUSTED = ":map:trusted.:user.virtiofs.:"
"""Trusted attributes have another name on the host, because the daemon may not set them. An overlay
needs them if its upper directory is on a volume."""

_TIMEOUT_S = 0.1
"""How long the guest trusts names and attributes that it has read; the daemons' own value is 1 s.

If the host lengthens a file meanwhile, a read returns the new bytes cut to the old length. Of a file that was
written three times a second, 234 of 371 reads were cut with 1 s, and 24 of 267 with 0.1 s. The price is up to
25 requests a second. With 0, Python starts with 9,100 requests instead of 1,600. The Rust daemon has no such
option.
"""


class Dialect(enum.Enum):
    """The two programs that are called virtiofsd."""

    C = "c"
    """The program in C, which came with QEMU until 7.2."""
    RUST = "rust"
    """The program in Rust, which replaced it."""


def dialect_of(help_text: str) -> Dialect | None:
    """Recognize the dialect by the option that names the shared directory.

    :param help_text: the program's output for ``--help``.
    :returns: the dialect, or ``None`` for a program of neither kind.
    """
    # The Rust program's help may also mention the old spelling, as a compatibility option.
    if "--shared-dir" in help_text:
        return Dialect.RUST
    if "-o source=" in help_text:
        return Dialect.C
    return None


async def detect_dialect(virtiofsd: Path) -> Dialect:
    """Ask a program which dialect it speaks.

    :param virtiofsd: the program.
    :raises VmStartError: if it cannot be run, or is not a virtio-fs daemon.
    """
    process = ChildProcess.spawn(f"{virtiofsd} --help", [str(virtiofsd), "--help"], logged_lines=0)
    try:
        async with asyncio.timeout(_HELP_TIMEOUT_S):
            status = await process.exited
    except TimeoutError:
        raise VmStartError(
            f"start vm: {virtiofsd}: no answer to --help within {_HELP_TIMEOUT_S:g} s"
        ) from None
    finally:
        process.kill()
    if status.code != 0:
        raise VmStartError(f"start vm: {process.obituary()}")
    dialect = dialect_of(process.output())
    if dialect is None:
        raise VmStartError(f"start vm: {virtiofsd}: not a virtio-fs daemon; install virtiofsd")
    return dialect


def daemon_argv(
    virtiofsd: Path, dialect: Dialect, *, fd: int, source: Path, is_confined: bool = False
) -> list[str]:
    """Build the daemon's command line.

    :param virtiofsd: the program.
    :param dialect: the language it speaks.
    :param fd: the listening socket it inherits.
    :param source: the directory it serves, as it sees it.
    :param is_confined: whether it was started in its own namespaces.
    """
    # Announced submounts: each file system below the directory keeps its own inode numbers.
    # Extended attributes: without them a program's file capabilities are lost. With access control lists, the
    # file system of the host also decides about the umask and the default lists of directories.
    # Set-id bits that a write must clear are cleared by the daemon, in the same request.
    # The namespace sandbox: the daemon sees nothing of the host but the directory. A confined daemon does not
    # need it and may not make it; the Rust daemon then accepts only "none" from a user other than root.
    match dialect:
        case Dialect.C:
            options = (
                f"source={source},cache=auto,timeout={_TIMEOUT_S},announce_submounts,xattrmap={_TRUSTED},posix_acl,"
                f"killpriv_v2,sandbox={'chroot' if is_confined else 'namespace'},log_level=err"
            )
            return [str(virtiofsd), f"--fd={fd}", "-o", options]
        case Dialect.RUST:
            return [
                str(virtiofsd),
                f"--fd={fd}",
                f"--shared-dir={source}",
                "--cache=auto",
                "--announce-submounts",
                "--xattr",
                f"--xattrmap={_TRUSTED}",
                "--posix-acl",
                "--killpriv-v2",
                f"--sandbox={'none' if is_confined else 'namespace'}",
                "--log-level=error",
            ]


def start(spec: VmSpec, dialect: Dialect, *, listener: socket.socket, host: HostSide) -> ChildProcess:
    """Start the daemon.

    :param spec: the virtual machine whose share it serves.
    :param dialect: the language it speaks.
    :param listener: the socket it listens on.
    :param host: where its process is kept.
    :returns: its process.
    :raises OSError: if no process could be made.
    """
    fd = listener.fileno()
    confinement = of_share_daemon(spec, drops_by_itself=dialect is Dialect.C)
    is_confined = confinement is not None
    source = SHARE_PLACE if is_confined else spec.share_source
    # The guest's kernel has checked each request by all that it knows of the process. The daemon makes files
    # as that user and group, and knows neither its other groups nor its capabilities: it must not check
    # again with less.
    return host.spawn(
        NAME,
        daemon_argv(spec.virtiofsd, dialect, fd=fd, source=source, is_confined=is_confined),
        inherit=[fd],
        keeps_capabilities=True,
        confinement=confinement,
    )


def file_limit(pids: Iterable[int]) -> int:
    """Return how many files a daemon may have open.

    :param pids: its processes. The daemon raises the limit itself, as far as the host allows.
    :raises ProcessLookupError: if it has ended.
    """
    # prlimit(2) for another user's process needs a capability that the host may not grant.
    found = [_FILE_LIMIT.search(_limits(pid)) for pid in pids]
    return min((int(limit[1]) for limit in found if limit is not None), default=_WANTED_FILES)


def _limits(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise ProcessLookupError(error.errno, error.strerror) from error


async def settle(daemon: ChildProcess, dialect: Dialect, spec: VmSpec, host: HostSide) -> None:
    """Finish the set-up once the daemon serves.

    :param daemon: its process.
    :param dialect: the language it speaks. The Rust daemon opens its share when the guest mounts it.
    :param spec: the virtual machine whose share it serves.
    :param host: where its processes are kept.
    :raises OSError: if one could not be recorded.
    """
    if spec.jail is None:
        host.adopt_workers()  # a daemon with its own sandbox serves from a child
    else:
        await show_share_only(daemon.pid, is_opened=dialect is Dialect.C)


def connected_pair(directory: Path) -> tuple[socket.socket, socket.socket]:
    """Make a listening socket without a name, in which one connection already waits.

    QEMU and the daemon inherit one end each, so neither has to find, await or trust a path.

    :param directory: a private directory, in which the socket briefly has a name.
    :returns: the listening socket for the daemon, and the connected one for QEMU.
    :raises OSError: if the directory cannot be written to.
    """
    directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX)
    client = socket.socket(socket.AF_UNIX)
    # Through the descriptor, because the address of a unix socket has 108 bytes at most.
    path = Path(f"/proc/self/fd/{directory_fd}/virtiofs.sock")
    try:
        listener.bind(str(path))
        try:
            listener.listen(1)
            client.connect(str(path))
        finally:
            path.unlink()
    except OSError:
        listener.close()
        client.close()
        raise
    finally:
        os.close(directory_fd)
    return listener, client


async def plug(connection: socket.socket, *, session: QmpSession, devices: Devices) -> None:
    """Add the share to a machine that was started without one.

    :param connection: a socket connected to the daemon; the caller closes it.
    :param session: the control connection.
    :param devices: where it is plugged.
    :raises HotplugError: if it cannot be added.
    :raises QmpError: if QEMU does not answer.
    """
    await devices.attach(describe(await session.send_fd(connection.fileno())))


def describe(fd_name: str) -> Description:
    """Describe the share's device.

    :param fd_name: the name under which QEMU holds the connection to the daemon.
    """
    return Description(
        id=SHARE,
        driver="vhost-user-fs-pci",
        properties={"chardev": SHARE, "tag": SHARE_TAG, "queue-size": SHARE_QUEUE},
        backend=[socket_chardev(SHARE, fd_name)],
        undo=[Command("chardev-remove", {"id": SHARE})],
    )


def check_propagation(source: Path) -> None:
    """Refuse a directory whose later mounts the daemon would not see.

    The daemon serves from its own mount namespace. A mount made afterwards reaches it only if the
    directory lies on a mount with shared propagation; otherwise the guest would see empty directories.

    :param source: the directory to serve.
    :raises VmStartError: if it does not exist or its mount is not shared.
    """
    try:
        source_id = _mount_id(source)
    except OSError as error:
        raise VmStartError(
            f"start vm: {source}: {error.strerror}; make the directory, which is shared with the guest"
        ) from error
    if not _is_shared(source_id, Path("/proc/self/mountinfo").read_text().splitlines()):
        raise VmStartError(
            f"start vm: {source}: not on a shared mount; bind-mount it on itself and make it shared"
        )


def _mount_id(path: Path) -> str:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return value.strip()
    finally:
        os.close(fd)
    raise VmStartError(f"start vm: {path}: the kernel does not tell its mount")


def _is_shared(mount_id: str, mountinfo: Iterable[str]) -> bool:
    for line in mountinfo:
        fields = line.split()
        if fields[0] == mount_id:
            # Optional fields lie between the sixth and a lone dash (proc(5)).
            return any(field.startswith("shared:") for field in fields[6 : fields.index("-")])
    return False
