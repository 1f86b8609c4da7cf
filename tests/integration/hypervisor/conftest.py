"""Real virtual machines, and the proof after each test that nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor import (
    Accelerator,
    Channel,
    Identity,
    QemuHypervisor,
    VmSpec,
    channel_problem,
    template_key,
)
from hypervisor.saving import save_template
from proto.extensions import AGENT_PORT
from shim.host import host_process
from tests import host_settings
from tests.descriptors import descriptors
from tests.patience import patient

from .guest_shell import PARAMETERS, GuestShell, initrd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from _pytest.mark.structures import ParameterSet

    from shim.host.host_process import HostProcess

JAIL = Identity(uid=1_900_000_000, gid=1_900_000_000)

START_S = patient(60)
BOOT_S = patient(120)
SAVE_S = patient(240)
UNPLUG_S = patient(60)

ACCELERATOR = Accelerator(host_settings.ACCELERATOR or "tcg")

GUEST = Path("/var/lib/hako/guest")
QEMU = Path("/usr/bin/qemu-system-x86_64")
NEWER_QEMU = Path("/var/lib/hako/bin/qemu-10")
VSOCK_DAEMON = Path("/var/lib/hako/bin/vhost-device-vsock")
VIRTIOFSDS = [
    path for path in map(Path, ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")) if path.exists()
]


PR_SET_CHILD_SUBREAPER = 36
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100


@pytest.fixture(scope="module", autouse=True)  # not for the tests of other directories in this process
def subreaper() -> Iterator[None]:
    """Orphans come to this process, as they come to the shim."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(scope="session")
def guest_image() -> Path:
    assert (GUEST / "vmlinux").exists(), "no guest image: run `hako image build`"
    return GUEST


@pytest.fixture(
    params=[
        pytest.param(QEMU, id="distribution"),
        pytest.param(NEWER_QEMU, id="newer", marks=pytest.mark.nightly),
    ]
)
def qemu(request: pytest.FixtureRequest) -> Path:
    """Each QEMU that Hako is held to."""
    program: Path = request.param
    return program


@pytest.fixture
def share() -> Iterator[Path]:
    """A directory on a shared mount, as the daemon needs it, with one file in it."""
    with tempfile.TemporaryDirectory(prefix="hako-share-") as name:
        subprocess.run(["/bin/mount", "--bind", name, name], check=True)
        try:
            subprocess.run(["/bin/mount", "--make-shared", name], check=True)
            Path(name, "from-the-host").write_text("hello\n")
            yield Path(name)
        finally:
            subprocess.run(["/bin/umount", "--recursive", name], check=True)


@pytest.fixture
def make_spec(guest_image: Path, share: Path, tmp_path: Path) -> Callable[..., VmSpec]:
    def make(**changes: Any) -> VmSpec:
        values: dict[str, Any] = {
            "name": "test",
            "directory": tmp_path,
            "qemu": QEMU,
            "machine_options": "",
            "kernel": guest_image / "vmlinux",
            "initrd": guest_image / "initrd",
            "kernel_parameters": (),
            "accelerator": ACCELERATOR,
            "vcpus": 1,
            "max_vcpus": 4,
            "memory_bytes": 512 << 20,
            "max_memory_bytes": 4 << 30,
            "share_source": share,
            "virtiofsd": VIRTIOFSDS[0],
            "channel": Channel.VIRTIO_SERIAL,
            "vsock_daemon": VSOCK_DAEMON,
            "network_namespace": None,
            "root_ports": 0,
            # A jail shows programs of /usr, and the newer QEMU is elsewhere.
            "jail": None if changes.get("qemu") == NEWER_QEMU else JAIL,
        }
        return VmSpec(**{**values, **changes})

    return make


@dataclass
class Machines:
    """Makes virtual machines and remembers every process that was started for one."""

    make_spec: Callable[..., VmSpec]
    made: list[QemuHypervisor] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    identities: list[HostProcess] = field(default_factory=list)

    def __call__(self, **changes: Any) -> QemuHypervisor:
        vm = QemuHypervisor(self.make_spec(**changes), on_process=self.note)
        self.made.append(vm)
        return vm

    def note(self, name: str, pid: int) -> None:
        self.started.append((name, pid))
        with contextlib.suppress(ProcessLookupError):  # a worker that has ended already
            self.identities.append(host_process.identify(pid))

    def alive(self) -> list[tuple[str, int]]:
        """Return those that are left, as zombies too; another process may have the id of one that is not."""
        return [each for each in self.started if _identity(each[1]) in self.identities]


def _identity(pid: int) -> HostProcess | None:
    try:
        return host_process.identify(pid)
    except ProcessLookupError:
        return None


@pytest.fixture
async def machines(make_spec: Callable[..., VmSpec]) -> AsyncIterator[Machines]:
    before = descriptors()
    machines = Machines(make_spec)
    yield machines
    for vm in machines.made:
        await vm.stop()
        assert vm.processes() == []
    assert machines.alive() == [], "processes outlived stop(), or stayed as zombies"
    assert descriptors() <= before, "descriptors stayed open"


@pytest.fixture(scope="session")
def shell_initrd(guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shell") / "initrd"
    path.write_bytes(initrd(guest_image))
    return path


@pytest.fixture
async def start(
    machines: Machines, shell_initrd: Path
) -> AsyncIterator[Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]]]:
    """Start a machine whose guest is a shell."""
    with ExitStack() as stack:

        async def start_one(**changes: Any) -> tuple[QemuHypervisor, GuestShell]:
            parameters = (*PARAMETERS, *changes.get("kernel_parameters", ()))
            vm = machines(initrd=shell_initrd, **{**changes, "kernel_parameters": parameters})
            await vm.start(timeout_s=START_S)
            shell = GuestShell(await vm.connect(AGENT_PORT, timeout_s=BOOT_S))
            stack.callback(shell.close)
            await shell("true", timeout_s=BOOT_S)
            return vm, shell

        yield start_one
        for vm in machines.made:
            await vm.stop()


def usable_channels() -> list[ParameterSet]:
    return [
        pytest.param(
            channel,
            id=channel.value,
            marks=[pytest.mark.skip(reason=problem)] if (problem := _problem(channel)) else [],
        )
        for channel in Channel
    ]


def _problem(channel: Channel) -> str | None:
    # Only the kernel's own device may be missing: the rest is what the set-up installs.
    return channel_problem(channel, vsock_daemon=VSOCK_DAEMON) if channel is Channel.VHOST_VSOCK else None


@pytest.fixture
def tap() -> Iterator[Callable[..., tuple[int, ...]]]:
    """Make tap interfaces, by their descriptors; closing these ends them."""
    with ExitStack() as stack:

        def make(number: int, *, queues: int = 1) -> tuple[int, ...]:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
            fds = []
            for _ in range(queues):
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                fcntl.ioctl(
                    fd, _TUNSETIFF, struct.pack("16sH22x", f"t{os.getpid()}-{number}".encode(), flags)
                )
                fds.append(fd)
            return tuple(fds)

        yield make


@pytest.fixture(scope="session")
def saved_templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where templates are kept for all tests, by their keys."""
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
async def template_of(
    make_spec: Callable[..., VmSpec], saved_templates: Path, tmp_path: Path
) -> Callable[..., Awaitable[Path]]:
    """Save a template of a machine, unless another test has."""
    one_at_a_time = asyncio.Lock()

    async def get(**changes: Any) -> Path:
        spec = make_spec(directory=tmp_path, **changes)
        directory = saved_templates / template_key(spec)
        async with one_at_a_time:
            if not (directory / "template.json").exists():
                directory.mkdir(exist_ok=True)
                await save_template(spec, directory, timeout_s=SAVE_S)
        return directory

    return get


@pytest.fixture
async def clone(
    template_of: Callable[..., Awaitable[Path]],
    start: Callable[..., Awaitable[tuple[QemuHypervisor, GuestShell]]],
    shell_initrd: Path,
) -> Callable[..., Awaitable[Any]]:
    """Start a clone of a machine whose guest is a shell."""

    async def clone_one(**changes: Any) -> Any:
        shape = {name: value for name, value in changes.items() if name not in {"directory", "share_source"}}
        template = await template_of(initrd=shell_initrd, kernel_parameters=PARAMETERS, **shape)
        return await start(template=template, **changes)

    return clone_one
