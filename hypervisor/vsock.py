"""The three ways to the guest agent. Each is opened before QEMU starts, and dialled once the guest is up."""

from __future__ import annotations

import abc
import asyncio
import errno
import fcntl
import os
import secrets
import socket
import struct
import termios
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from hypervisor.argv import ChannelDevice, KernelVsock, SerialPort, UserVsock
from hypervisor.confinement import of_vsock_daemon
from hypervisor.devices import Command, Description, socket_chardev
from hypervisor.errors import ChannelError, VmStartError
from hypervisor.interface import Channel, VmSpec
from hypervisor.lone_mount import open_alone
from hypervisor.override import override
from proto.extensions import AGENT_PORT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import ExitStack

    from hypervisor.confinement import Confinement
    from hypervisor.devices import Devices
    from hypervisor.process import ChildProcess
    from hypervisor.qmp import QmpSession

VHOST_VSOCK = Path("/dev/vhost-vsock")

DEVICE = "vsock"
"""QEMU's names for the device and for the connection to its daemon."""

DAEMON_NAME = "vhost-device-vsock"
_OWN_DIRECTORY = "vsock"
"""Below the sandbox's directory: here, a confined daemon can make its sockets."""

_DAEMON_REDIAL_S = 0.002
_DAEMON_REPLY_TIMEOUT_S = 2.0
"""A request that arrives while the guest's driver starts can get lost without an error."""
_DAEMON_BUFFER_BYTES = 256 * 1024
"""How many bytes of a connection may be on their way from the guest: four of its largest packets.
By default the daemon takes one, and the guest waits after each."""
_DAEMON_GUEST_CID = 3
"""Any number will do: each daemon serves one guest and has its own socket."""

# linux/vhost.h: _IOW(VHOST_VIRTIO, 0x60, __u64)
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
_CID_FIRST = 3
"""0 to 2 are the hypervisor, the loopback and the host."""
_CID_END = 0xFFFFFFFF
"""The wildcard; a guest cannot have it."""
_CID_ATTEMPTS = 64
_ANY_CID = 0xFFFFFFFF
_PRIVILEGED_PORTS = range(1, 1024)
"""vsock(7): a process needs CAP_NET_BIND_SERVICE for them. All guests of a host share them."""
_STREAM_PORTS = range(256, 1024)
"""The ports for streams, which can use requests if no port is left; the agent's connection cannot."""


class Spawn(Protocol):
    """Starts a supervised process and records it."""

    def __call__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        inherit: Iterable[int] = (),
        confinement: Confinement | None = None,
    ) -> ChildProcess:
        """Start one; see ``ChildProcess.spawn``."""


class NotListeningError(Exception):
    """The guest does not listen at the port yet; dialling again may succeed."""


class GuestChannel(abc.ABC):
    """A way to the guest agent."""

    needs_driver: ClassVar[str] = ""
    """Id of a device that must not be dialled before the guest's driver runs; empty if there is none."""

    def is_handed_over(self) -> bool:
        """Tell whether the server of the device has read all messages from QEMU."""
        return True

    @abc.abstractmethod
    async def open(self, handover: ExitStack) -> ChannelDevice:
        """Prepare the host's side before QEMU starts.

        :param handover: closes descriptors that only QEMU needs, once QEMU has inherited them.
        :returns: the device for QEMU's command line.
        :raises VmStartError: if the host's side cannot be made.
        """

    @abc.abstractmethod
    async def dial(self, port: int) -> socket.socket:
        """Try once to connect.

        :param port: the guest's port.
        :returns: a connected non-blocking socket.
        :raises NotListeningError: if the guest does not listen yet.
        :raises ChannelError: if it never will.
        """

    def close(self) -> None:  # noqa: B027  (the kernel's channel has nothing to release)
        """Release the host's side. May be called repeatedly."""


class KernelVsockChannel(GuestChannel):
    """vsock through the host kernel."""

    def __init__(self) -> None:
        self._cid = 0

    @override
    async def open(self, handover: ExitStack) -> KernelVsock:
        """Claim a context id.

        The descriptor that QEMU inherits holds the claim, so two sandboxes never have the same id.

        :param handover: closes this process's copy of the descriptor.
        :raises VmStartError: if the device is missing or no id is free.
        """
        try:
            fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise VmStartError(f"start vm: {VHOST_VSOCK}: {error.strerror}; load vhost_vsock") from error
        handover.callback(os.close, fd)
        for _ in range(_CID_ATTEMPTS):
            cid = _CID_FIRST + secrets.randbelow(_CID_END - _CID_FIRST)
            try:
                fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise VmStartError(f"start vm: {VHOST_VSOCK}: claim CID {cid}: {error.strerror}") from error
            self._cid = cid
            return KernelVsock(fd=fd, cid=cid)
        raise VmStartError(f"start vm: {VHOST_VSOCK}: no free CID in {_CID_ATTEMPTS} attempts")

    @override
    async def dial(self, port: int) -> socket.socket:
        """Try once to connect.

        :param port: the guest's port.
        :raises NotListeningError: if the guest refuses, or its driver is not up.
        :raises ChannelError: if no privileged port is free, or may be used.
        """
        stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            stream.settimeout(0)
            bind_privileged(stream, _PRIVILEGED_PORTS if port == AGENT_PORT else _STREAM_PORTS)
            await asyncio.get_running_loop().sock_connect(stream, (self._cid, port))
        except OSError as error:
            stream.close()
            raise NotListeningError(error.strerror) from error
        except BaseException:
            stream.close()
            raise
        return stream


def bind_privileged(stream: socket.socket, ports: range) -> None:
    """Bind a connection to a privileged port, so that the agent accepts it.

    :param stream: a vsock socket.
    :param ports: which ones may be used.
    :raises ChannelError: if none is free, or this process may not use them.
    """
    first = secrets.randbelow(len(ports))
    for number in range(len(ports)):
        try:
            stream.bind((_ANY_CID, ports[(first + number) % len(ports)]))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ChannelError(
                    f"connect guest: vsock port: {error.strerror}; give the shim CAP_NET_BIND_SERVICE"
                ) from error
        else:
            return
    raise ChannelError(
        f"connect guest: vsock ports {ports.start} to {ports.stop - 1} are all in use on this host; use "
        '[hypervisor] channel = "vhost-user-vsock" for some machines'
    )


class UserVsockChannel(GuestChannel):
    """vsock through a daemon that serves this one guest and offers its ports on a unix socket.

    :param daemon: the ``vhost-device-vsock`` program.
    :param directory: where its sockets go.
    :param spawn: starts it.
    :param confinement: its rights.
    """

    # A connection that arrives while QEMU hands over the queues ends the daemon's worker. The daemon stays
    # and answers CONNECT, but no longer moves data (seen with vhost-device-vsock 0.3.0).
    needs_driver = DEVICE

    def __init__(
        self, daemon: Path, directory: Path, *, spawn: Spawn, confinement: Confinement | None = None
    ) -> None:
        self._daemon = daemon
        self._spawn = spawn
        self._confinement = confinement
        self._device: socket.socket | None = None
        # Both sides name the sockets through this descriptor: a unix socket's address has 108 bytes at most.
        if confinement is None:
            self._directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            directory /= _OWN_DIRECTORY
            directory.mkdir(mode=0o700, exist_ok=True)  # left over if a clone could not be made
            os.chown(directory, confinement.identity.uid, confinement.identity.gid)
            self._directory_fd = open_alone(directory)

    @override
    async def open(self, handover: ExitStack) -> UserVsock:  # noqa: ARG002  (no descriptor is only QEMU's)
        """Start the daemon and connect to it.

        :param handover: not used.
        :raises VmStartError: if the daemon ends before it listens.
        """
        device = f"/proc/self/fd/{self._directory_fd}/vhost-vsock.sock"
        vm = f"guest-cid={_DAEMON_GUEST_CID},socket={device},uds-path={self._ports}"
        vm += f",tx-buffer-size={_DAEMON_BUFFER_BYTES}"
        process = self._spawn(
            DAEMON_NAME,
            [str(self._daemon), "--vm", vm],
            inherit=[self._directory_fd],
            confinement=self._confinement,
        )
        # Kept, because QEMU gets it, and it tells how much the daemon has not read yet.
        self._device = stream = socket.socket(socket.AF_UNIX)
        while True:
            try:
                stream.connect(device)
            except (FileNotFoundError, ConnectionRefusedError):
                # The daemon makes its own socket and does not report that it is ready. Bind and listen are
                # two steps, so even a watch on the directory would have to dial again.
                await asyncio.wait([process.exited], timeout=_DAEMON_REDIAL_S)
            else:
                self._take_directory_back()
                return UserVsock(fd=stream.fileno())
            if process.exited.done():
                raise VmStartError(f"start vm: {process.obituary()}")

    def _take_directory_back(self) -> None:
        """Keep a daemon that is taken over later from replacing its sockets with links to others.

        It could also fill the file system with the state of all sandboxes.
        """
        if self._confinement is not None:
            os.chown(f"/proc/self/fd/{self._directory_fd}", 0, 0)

    @override
    def is_handed_over(self) -> bool:
        """Tell whether the daemon has read all messages about its queues that QEMU has written."""
        if self._device is None:  # the guest has answered already
            return True
        unread = bytearray(4)
        fcntl.ioctl(self._device, termios.TIOCOUTQ, unread)
        return not any(unread)

    @override
    async def dial(self, port: int) -> socket.socket:
        """Try once to connect, in the protocol that Firecracker introduced for vsock over a unix socket.

        :param port: the guest's port.
        :raises NotListeningError: if the daemon hangs up because the guest refuses.
        """
        loop = asyncio.get_running_loop()
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.settimeout(0)
            await loop.sock_connect(stream, self._ports)
            await loop.sock_sendall(stream, f"CONNECT {port}\n".encode())
            reply = bytearray()
            async with asyncio.timeout(_DAEMON_REPLY_TIMEOUT_S):
                while not reply.endswith(b"\n"):
                    # One byte at a time: what follows the line belongs to the caller.
                    byte = await loop.sock_recv(stream, 1)
                    if not byte:
                        raise NotListeningError("the guest refused")
                    reply += byte
            if not reply.startswith(b"OK "):
                raise NotListeningError(f"unexpected answer {bytes(reply)!r}")
        except TimeoutError:
            stream.close()
            raise NotListeningError("no answer to CONNECT") from None
        except OSError as error:
            stream.close()
            raise NotListeningError(error.strerror) from error
        except BaseException:
            stream.close()
            raise
        self._let_go_of_device()
        return stream

    def _let_go_of_device(self) -> None:
        """Leave the connection to QEMU, so that the daemon sees QEMU's end."""
        if self._device is not None:
            self._device.close()
            self._device = None

    @override
    def close(self) -> None:
        """Close the connection and the directory."""
        self._let_go_of_device()
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1

    @property
    def _ports(self) -> str:
        return f"/proc/self/fd/{self._directory_fd}/vsock.sock"


class SerialChannel(GuestChannel):
    """One virtio-serial port: a single byte stream to the agent, for hosts without any vsock."""

    def __init__(self) -> None:
        self._host_end: socket.socket | None = None

    @override
    async def open(self, handover: ExitStack) -> SerialPort:
        """Make the stream.

        :param handover: closes QEMU's end of it.
        """
        self._host_end, guest_end = socket.socketpair()
        handover.enter_context(guest_end)
        return SerialPort(fd=guest_end.fileno())

    @override
    async def dial(self, port: int) -> socket.socket:
        """Hand out the stream; bytes wait in it until the guest opens its port.

        :param port: ``AGENT_PORT``.
        :raises ChannelError: for any other port, and the second time.
        """
        if port != AGENT_PORT:
            raise ChannelError(f"connect guest: port {port}: virtio-serial reaches port {AGENT_PORT} only")
        if self._host_end is None:
            raise ChannelError(f"connect guest: port {port}: virtio-serial carries one connection only")
        stream, self._host_end = self._host_end, None
        stream.settimeout(0)
        return stream

    @override
    def close(self) -> None:
        """Close the stream if it was never handed out."""
        if self._host_end is not None:
            self._host_end.close()
            self._host_end = None


def make_channel(spec: VmSpec, *, spawn: Spawn) -> GuestChannel:
    """Make the channel of a virtual machine.

    :param spec: the virtual machine.
    :param spawn: starts a daemon if the channel needs one.
    :raises VmStartError: if the specification lacks what the channel needs.
    """
    match spec.channel:
        case Channel.VHOST_VSOCK:
            return KernelVsockChannel()
        case Channel.VHOST_USER_VSOCK:
            if spec.vsock_daemon is None:
                raise VmStartError(
                    "start vm: channel vhost-user-vsock: no daemon given; install vhost-device-vsock"
                )
            confinement = of_vsock_daemon(spec, spec.vsock_daemon)
            return UserVsockChannel(spec.vsock_daemon, spec.directory, spawn=spawn, confinement=confinement)
        case Channel.VIRTIO_SERIAL:
            return SerialChannel()


async def plug(device: ChannelDevice, *, session: QmpSession, devices: Devices) -> None:
    """Add the agent's channel to a machine that was started without one.

    :param device: the result of the channel's ``open``.
    :param session: the control connection.
    :param devices: where it is plugged.
    :raises HotplugError: if it cannot be added.
    :raises QmpError: if QEMU does not answer.
    """
    await devices.attach(describe(device, await session.send_fd(device.fd)))


def describe(device: ChannelDevice, fd_name: str) -> Description:
    """Describe a vsock device.

    :param device: the result of the channel's ``open``.
    :param fd_name: the name under which QEMU holds its descriptor.
    :raises ValueError: for a virtio-serial port, which cannot be plugged: a defect of the caller.
    """
    match device:
        case KernelVsock(cid=cid):
            return Description(
                id=DEVICE,
                driver="vhost-vsock-pci",
                properties={"vhostfd": fd_name, "guest-cid": cid},
                backend=[],
                undo=[],
            )
        case UserVsock():
            return Description(
                id=DEVICE,
                driver="vhost-user-vsock-pci",
                properties={"chardev": DEVICE},
                backend=[socket_chardev(DEVICE, fd_name)],
                undo=[Command("chardev-remove", {"id": DEVICE})],
            )
        case SerialPort():
            raise ValueError("a virtio-serial port is part of the machine from the start")


def channel_problem(channel: Channel, *, vsock_daemon: Path | None) -> str | None:
    """Return why a channel cannot be used on this host.

    :param channel: the channel.
    :param vsock_daemon: the path of ``vhost-device-vsock``.
    :returns: the cause and the remedy, or ``None`` if it can be used.
    """
    match channel:
        case Channel.VHOST_VSOCK:
            try:
                os.close(os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                return f"{VHOST_VSOCK}: {error.strerror}; load the kernel module vhost_vsock"
        case Channel.VHOST_USER_VSOCK:
            if vsock_daemon is None or not os.access(vsock_daemon, os.X_OK):
                return f"{vsock_daemon or DAEMON_NAME}: no such program; install vhost-device-vsock"
        case Channel.VIRTIO_SERIAL:
            pass
    return None
