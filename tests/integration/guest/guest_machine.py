"""A virtual machine started by hand from the built image, with a share and one agent channel."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

from proto.extensions import PRIVILEGED_PARAMETER
from proto.kata import agent_pb2, health_pb2, oci_pb2
from tests import host_settings
from tests.integration.guest.agent_client import AgentClient
from tests.patience import patient

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

SHARE = "/run/kata-containers/shared/containers"
KERNEL_LINE = (
    "console=hvc0 quiet panic=1 reboot=k tsc=reliable no_timer_check mitigations=off 8250.nr_uarts=0 "
    "cryptomgr.notests random.trust_cpu=on systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"
)
ACCELERATOR = host_settings.ACCELERATOR or "tcg"
CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]
BOOT_TIMEOUT_S = patient(120)
START_TIMEOUT_S = patient(60)
MONITOR_TIMEOUT_S = patient(60)
VSOCK_DAEMON = "/var/lib/hako/bin/vhost-device-vsock"
SERVING = "hako-agent: serving"
PORTS = range(0x10, 0x16)
"""Slots of the root ports into which devices can be plugged."""
APPLETS = [
    "cat",
    "cut",
    "date",
    "dd",
    "echo",
    "env",
    "grep",
    "hostname",
    "id",
    "ip",
    "ls",
    "mkdir",
    "mknod",
    "nc",
    "ping",
    "pwd",
    "readlink",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "true",
]


class GuestMachine:
    """QEMU, virtiofsd and a client of the agent.

    :param directory: for sockets, console and the shared directory.
    :param image: directory of the image to boot.
    :param channel: ``serial`` or ``vsock``.
    :param network_namespace: that in which QEMU runs; None for the test's own.
    :param kernel_parameters: more of the guest's; with one that keeps this client out, nothing is connected.
    """

    def __init__(
        self,
        directory: Path,
        image: Path,
        *,
        channel: str,
        network_namespace: Path | None = None,
        kernel_parameters: str = "",
    ) -> None:
        self.share = directory / "share"
        self.share.mkdir()
        self.console = directory / "console.log"
        self._agent_socket = directory / "agent.sock"
        self._qmp_socket = directory / "qmp.sock"
        self._channel = channel
        self._kernel_line = f"{KERNEL_LINE} {kernel_parameters}"
        self._is_let_in = PRIVILEGED_PARAMETER not in kernel_parameters
        self._inside = ("nsenter", f"--net={network_namespace}") if network_namespace else ()
        self._stack = contextlib.ExitStack()
        self.client: AgentClient
        started = time.monotonic()
        try:
            self._start(directory, image)
        except BaseException:
            self.close()
            raise
        self.boot_s = time.monotonic() - started

    def _start(self, directory: Path, image: Path) -> None:
        share_socket = directory / "share.sock"
        daemon = self._spawn(
            "/usr/lib/qemu/virtiofsd",
            f"--socket-path={share_socket}",
            "-o",
            f"source={self.share}",
            "-o",
            "cache=auto",
        )
        self._await(share_socket, daemon)
        channel = self._vsock(directory) if self._channel == "vsock" else self._serial()
        self.qemu = self._spawn(
            *(
                *self._inside,
                "qemu-system-x86_64",
                "-machine",
                "q35,memory-backend=ram",
                "-accel",
                ACCELERATOR,
            ),
            *("-cpu", "host" if ACCELERATOR == "kvm" else "max", "-m", "512"),
            *["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"],
            *("-object", "memory-backend-memfd,id=ram,size=512M,share=on"),
            *(
                "-kernel",
                str(image / "vmlinux"),
                "-initrd",
                str(image / "initrd"),
                "-append",
                self._kernel_line,
            ),
            *("-device", "virtio-serial-pci", "-chardev", f"file,id=console,path={self.console}"),
            *("-device", "virtconsole,chardev=console"),
            *channel,
            *("-chardev", f"socket,id=share,path={share_socket}"),
            *("-device", "vhost-user-fs-pci,chardev=share,tag=kataShared"),
            *("-qmp", f"unix:{self._qmp_socket},server=on,wait=off"),
            *(
                part
                for port in PORTS
                for part in ("-device", f"pcie-root-port,id=port{port},chassis={port},addr={port:#x}")
            ),
        )
        self._await(self._agent_socket, self.qemu)
        if not self._is_let_in:
            self.await_line(SERVING)
            return
        self.client = self.connect()
        self.client.call("Check", health_pb2.CheckRequest(), service="grpc.Health", timeout_s=BOOT_TIMEOUT_S)

    def _serial(self) -> tuple[str, ...]:
        return (
            *("-chardev", f"socket,id=agent,path={self._agent_socket},server=on,wait=off"),
            *("-device", "virtserialport,name=hako.agent,chardev=agent"),
        )

    def _vsock(self, directory: Path) -> tuple[str, ...]:
        daemon_socket = directory / "vsock.sock"
        daemon = self._spawn(
            VSOCK_DAEMON, "--vm", f"guest-cid=3,socket={daemon_socket},uds-path={self._agent_socket}"
        )
        self._await(daemon_socket, daemon)
        return (
            *("-chardev", f"socket,id=vsock,path={daemon_socket}"),
            *("-device", "vhost-user-vsock-pci,chardev=vsock"),
        )

    def connect(self) -> AgentClient:
        """Connect to the agent, as often as it takes for the guest to listen."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        # Over vsock, a connection that comes before the guest's driver would end the daemon's worker.
        while (self._channel == "vsock" and not self._serves()) or (connection := self._dial()) is None:
            assert self.qemu.poll() is None, f"QEMU ended: {self.console.read_text()}"
            assert time.monotonic() < deadline, f"the guest does not listen: {self.console.read_text()}"
            time.sleep(0.02)
        client = AgentClient(connection)
        self._stack.callback(client.close)
        return client

    def await_line(self, text: str) -> None:
        """Wait until the console shows a text."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while text not in (said := self.console.read_text() if self.console.exists() else ""):
            assert time.monotonic() < deadline, f"the console does not show {text!r}: {said}"
            time.sleep(0.02)

    def knock(self, port: int, *, until: str) -> None:
        """Connect to a port, each time from another, until the console shows a text."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while until not in (said := self.console.read_text()):
            assert time.monotonic() < deadline, f"the console does not show {until!r}: {said}"
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1)
                connection.connect(str(self._agent_socket))
                with contextlib.suppress(ConnectionError, TimeoutError):
                    connection.sendall(f"CONNECT {port}\n".encode())
                    connection.recv(64)

    def _serves(self) -> bool:
        return self.console.exists() and SERVING in self.console.read_text()

    def _dial(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._agent_socket))
        if self._channel == "serial":
            return connection
        connection.settimeout(1)
        try:
            connection.sendall(b"CONNECT 1024\n")
            if connection.recv(64).startswith(b"OK "):
                connection.settimeout(None)
                return connection
        except (ConnectionError, TimeoutError):
            # The agent is not up yet.
            connection.close()
            return None
        connection.close()
        return None

    def plug_disk(self, image: Path, *, port: int) -> str:
        """Plug a disk into one of PORTS.

        :returns: its PCI path.
        """
        self._monitor(
            {
                "execute": "blockdev-add",
                "arguments": {"driver": "file", "filename": str(image), "node-name": f"node{port}"},
            },
            {
                "execute": "device_add",
                "arguments": {
                    "driver": "virtio-blk-pci",
                    "drive": f"node{port}",
                    "id": f"disk{port}",
                    "bus": f"port{port}",
                },
            },
        )
        return f"{port:02x}/00"

    def plug_nic(self, tap: str, *, mac: str, port: int) -> str:
        """Plug an interface into one of PORTS.

        :returns: its PCI path.
        """
        name = f"net{port}"
        tap_options = {"type": "tap", "id": name, "ifname": tap, "script": "no", "downscript": "no"}
        device = {"driver": "virtio-net-pci", "netdev": name, "mac": mac, "id": f"nic{port}"}
        self._monitor(
            {"execute": "netdev_add", "arguments": tap_options},
            {"execute": "device_add", "arguments": {**device, "bus": f"port{port}"}},
        )
        return f"{port:02x}/00"

    def plug_nvme(self, image: Path, *, port: int) -> str:
        """Plug a disk with its own PCI interface into one of PORTS, like a device of the host.

        :returns: its PCI path.
        """
        backend = {"driver": "file", "filename": str(image), "node-name": f"node{port}"}
        device = {"driver": "nvme", "drive": f"node{port}", "serial": "given", "id": f"disk{port}"}
        self._monitor(
            {"execute": "blockdev-add", "arguments": backend},
            {"execute": "device_add", "arguments": {**device, "bus": f"port{port}"}},
        )
        return f"{port:02x}/00"

    def unplug_disk(self, *, port: int) -> None:
        """Take a disk out; returns when the guest has let it go."""
        removal: dict[str, object] = {"execute": "device_del", "arguments": {"id": f"disk{port}"}}
        self._monitor(removal, until=f"disk{port}")
        self._monitor({"execute": "blockdev-del", "arguments": {"node-name": f"node{port}"}})

    def resize_disk(self, *, port: int, size_bytes: int) -> None:
        """Grow a disk that is plugged in."""
        self._monitor(
            {"execute": "block_resize", "arguments": {"node-name": f"node{port}", "size": size_bytes}}
        )

    def _monitor(self, *commands: dict[str, object], until: str = "") -> None:
        """Send commands, then wait until a device is gone if one is named."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(MONITOR_TIMEOUT_S)
            connection.connect(str(self._qmp_socket))
            stream = connection.makefile("rw")
            json.loads(stream.readline())
            for command in ({"execute": "qmp_capabilities"}, *commands):
                stream.write(json.dumps(command))
                stream.flush()
                while "event" in (reply := json.loads(stream.readline())):
                    pass
                assert "return" in reply, reply
            while until and json.loads(stream.readline()).get("data", {}).get("device") != until:
                pass

    def _spawn(self, *argv: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    @staticmethod
    def _await(path: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.005)

    def close(self) -> None:
        self._stack.close()

    def create_sandbox(self) -> None:
        self.client.call(
            "CreateSandbox",
            agent_pb2.CreateSandboxRequest(
                hostname="the-pod",
                sandbox_id="sandbox",
                dns=["nameserver 192.0.2.1"],
                kernel_modules=[agent_pb2.KernelModule(name="virtio-net", parameters=["napi_tx=0"])],
                storages=[
                    agent_pb2.Storage(
                        driver="virtio-fs", source="kataShared", fstype="virtiofs", mount_point=f"{SHARE}/"
                    )
                ],
            ),
        )

    def make_rootfs(self, name: str) -> None:
        """Put a busybox root filesystem into the share."""
        root = self.share / name / "rootfs"
        for directory in ("bin", "dev", "proc", "sys", "tmp", "etc"):
            (root / directory).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin/busybox")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")


def process(*args: str, terminal: bool = False, **fields: Any) -> oci_pb2.Process:
    """Describe a process with the capabilities a container usually has."""
    return oci_pb2.Process(
        Args=args,
        Env=["PATH=/bin"],
        Cwd="/",
        Terminal=terminal,
        User=oci_pb2.User(),
        Capabilities=oci_pb2.LinuxCapabilities(
            Bounding=CAPABILITIES, Effective=CAPABILITIES, Permitted=CAPABILITIES
        ),
        **fields,
    )


def spec(name: str, init: oci_pb2.Process) -> oci_pb2.Spec:
    """Describe a container the way containerd does."""
    mount = oci_pb2.Mount
    return oci_pb2.Spec(
        Version="1.1.0",
        Process=init,
        Root=oci_pb2.Root(Path=f"{SHARE}/{name}/rootfs"),
        Hostname="ignored",
        Mounts=[
            mount(destination="/proc", type="proc", source="proc", options=["nosuid", "noexec", "nodev"]),
            mount(destination="/dev", type="tmpfs", source="tmpfs", options=["nosuid", "mode=755"]),
            mount(
                destination="/dev/pts",
                type="devpts",
                source="devpts",
                options=["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount(
                destination="/sys", type="sysfs", source="sysfs", options=["nosuid", "noexec", "nodev", "ro"]
            ),
        ],
        Linux=oci_pb2.Linux(
            CgroupsPath=f"/default/{name}",
            Resources=oci_pb2.LinuxResources(),
            Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("ipc", "uts", "mount")],
            MaskedPaths=["/proc/kcore", "/proc/keys"],
            ReadonlyPaths=["/proc/sys"],
        ),
    )
