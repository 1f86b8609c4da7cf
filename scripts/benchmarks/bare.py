"""Bare machines: QEMU alone, with the kernel and size of a sandbox and only the devices that are named."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from hypervisor.architecture import for_host
from hypervisor.argv import SHARE_QUEUE, kernel_command_line
from scripts.benchmarks import inside, load
from scripts.benchmarks.stage import MeasurementError
from scripts.benchmarks.worker import Worker
from shim import config
from shim.machine.host_choice import resolve
from shim.machine.sizing import plan
from shim.machine.spec import describe
from tests.e2e.busybox import BUSYBOX
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypervisor import VmSpec
    from scripts.benchmarks.stage import Stage
    from tests.network_space import Space

MIB = 1 << 20
SHARE = "/mnt"
DISK = "/dev/vda"
_SOCKET_TIMEOUT_S = patient(10.0)

_INIT = """#!/busybox sh
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sysfs /sys
/busybox mount -t devtmpfs dev /dev
cd /usr/lib/modules
while read name others; do
    [ ! -f $name.ko ] || /busybox insmod $name.ko
done <depends
[ -z "$bare_share" ] || /busybox mount -t virtiofs $bare_share %(share)s
if [ "$bare_gateway" ]; then
    /busybox ip link set eth0 mtu %(mtu)d up
    /busybox ip address add $bare_address dev eth0
    /busybox ip route add default via $bare_gateway
fi
exec %(python)s -ISB /load.py $bare_role
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A network card of a bare machine.

    :param space: the host's side of its tap device.
    :param tap: the device's name.
    :param address: the machine's, with the length of its prefix.
    :param gateway: the address of the host's side.
    """

    space: Space
    tap: str
    address: str
    gateway: str


def spec(stage: Stage, *, template: bool) -> VmSpec:
    """Describe a machine as the default configuration makes it, in no directory and without a share.

    :param stage: is configured so.
    :param template: whether machines are cloned from a template, which is built then.
    """
    stage.configure(template=template)
    settings = config.parse(config.locate({"HAKO_CONFIG": str(stage.config)}))
    sizes = plan(settings.hypervisor)
    return describe(
        settings,
        stage.runner.run(resolve(settings)),
        name="bench",
        directory=Path(),
        share=Path(),
        size=sizes.boot,
        most=sizes.most,
    )


def argv(of: VmSpec, initrd: Path, *, parameters: Sequence[str] = ()) -> list[str]:
    """Build QEMU's command line for a machine whose only device is a serial port: the program's own streams.

    :param of: the sandbox's machine whose accelerator, processors, memory and kernel it has.
    :param initrd: its initial RAM file system.
    :param parameters: further ones for its kernel.
    """
    architecture = for_host()
    command_line = kernel_command_line(of, architecture=architecture)
    return [
        *(str(of.qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", architecture.type, "-accel", of.accelerator.value),
        *("-cpu", architecture.cpu_models[of.accelerator], "-smp", str(of.vcpus)),
        *("-m", f"{of.memory_bytes // MIB}M", "-kernel", str(of.kernel), "-initrd", str(initrd)),
        *("-append", " ".join((command_line, "console=ttyS0", *parameters)), "-serial", "stdio"),
    ]


@contextlib.contextmanager
def running(
    stage: Stage,
    of: VmSpec,
    *,
    share: Path | None = None,
    disk: Path | None = None,
    card: Card | None = None,
    serves: bool = False,
) -> Iterator[Worker]:
    """Keep a bare machine for a block, in which the load program runs.

    :param stage: where.
    :param of: the sandbox's machine whose accelerator, processors, memory and kernel it has.
    :param share: a directory that it has as :data:`SHARE` over virtio-fs.
    :param disk: a block device that it has as :data:`DISK`.
    :param card: its network.
    :param serves: whether the program serves the others' network measurements.
    :raises MeasurementError: if it does not start.
    """
    parameters = [f"bare_role={load.SERVE}"] if serves else []
    devices: list[str] = []
    with contextlib.ExitStack() as stack:
        if share is not None:
            devices += _share(stack.enter_context(_daemon(stage, of, share)), of)
            parameters.append("bare_share=share")
        if disk is not None:
            devices += _disk(disk)
        if card is not None:
            devices += _card(card)
            parameters += [f"bare_address={card.address}", f"bare_gateway={card.gateway}"]
        entering = ["nsenter", f"--net={card.space.path}"] if card is not None else []
        command = [*entering, *argv(of, _initrd(stage), parameters=parameters), *devices]
        yield stack.enter_context(Worker("bare machine", command))


def _initrd(stage: Stage) -> Path:
    path = stage.home / "bare-load-initrd"
    if not path.exists():
        image = inside.GUEST_INITRD.read_bytes()
        init = _INIT % {"share": SHARE, "mtu": load.MTU, "python": inside.interpreter(image)}
        added = [
            cpio.regular("/busybox", BUSYBOX.read_bytes(), mode=0o755),
            cpio.regular("/init", init.encode(), mode=0o755),
            cpio.regular("/load.py", Path(load.__file__).read_bytes()),
        ]
        path.write_bytes(image + cpio.archive(added))
    return path


@contextlib.contextmanager
def _daemon(stage: Stage, of: VmSpec, directory: Path) -> Iterator[Path]:
    """Serve a directory with the virtio-fs daemon in C and its fastest settings."""
    address = stage.home / f"{stage.new_id()}-share.sock"
    options = f"source={directory},cache=always,xattr,log_level=err"
    with subprocess.Popen([of.virtiofsd, f"--socket-path={address}", "-o", options]) as daemon:
        try:
            deadline_s = time.monotonic() + _SOCKET_TIMEOUT_S
            while not address.exists():
                if daemon.poll() is not None or time.monotonic() > deadline_s:
                    raise MeasurementError(f"bare machine: {of.virtiofsd}: does not serve")
                time.sleep(0.01)
            yield address
        finally:
            daemon.terminate()


def _share(address: Path, of: VmSpec) -> list[str]:
    return [
        *("-object", f"memory-backend-memfd,id=memory,size={of.memory_bytes // MIB}M,share=on"),
        *("-machine", "memory-backend=memory", "-chardev", f"socket,id=share,path={address}"),
        *("-device", f"vhost-user-fs-pci,chardev=share,tag=share,queue-size={SHARE_QUEUE}"),
    ]


def _disk(device: Path) -> list[str]:
    return [
        *("-blockdev", f"host_device,node-name=disk,filename={device},aio=io_uring"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ]


def _card(card: Card) -> list[str]:
    return [
        *("-netdev", f"tap,id=net,ifname={card.tap},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
    ]
