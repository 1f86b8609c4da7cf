"""An outer machine with KVM, kernel vsock, vhost-net and VFIO, on a host that has none of them.

A QEMU without an accelerator emulates a processor with AMD's SVM and nested paging. The outer machine boots
the guest image's kernel there, with the modules that a host needs. Its root is this machine's root, shared
read-only by virtio-fs below an overlay in memory, so everything that was set up here is there, too.
"""

from __future__ import annotations

import ctypes
import mmap
import shlex
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from tests.e2e import busybox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TREE = Path(__file__).resolve().parent.parent
RESULTS = "/run/results"
"""The directory for results in the outer machine."""

DISK, CARDS = "0000:00:10.0", ("0000:01:01.0", "0000:01:02.0")
"""Devices to pass to guests: an NVMe disk, and two network cards behind a bridge, which share a group."""

_GUEST_IMAGE = Path("/var/lib/hako/guest")
_QEMU = Path("/var/lib/hako/bin/qemu-10")
"""Not Debian 12's QEMU: with two processors, 7.2 was seen to run translations that were out of date."""

_C_DAEMON, _RUST_DAEMON = Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd")
_MODULES = (
    *("virtio_pci", "virtiofs", "overlay", "virtio_rng", "virtio_net", "kvm_amd", "vhost_vsock", "vhost_net"),
    *("tun", "veth", "bridge", "br_netfilter", "macvlan", "dummy", "loop", "ext4", "xfs", "nvme"),
    *("cls_u32", "act_mirred", "sch_ingress", "vfio", "vfio_pci", "vfio_iommu_type1"),
    *("nf_tables", "nft_compat", "nft_chain_nat", "xt_comment", "xt_MASQUERADE", "xt_addrtype"),
    *("xt_conntrack", "xt_mark", "xt_nat", "xt_tcpudp", "xt_multiport"),
)
_PROCESSOR = "max,-la57,-smap"
"""All features except two that make each entry into an inner machine dearer: 5-level paging and SMAP."""

_OWN_DIRECTORIES = ("/dev/shm", "/run", "/tmp")  # noqa: S108 - not a file on this machine
_MEMORY_MIB = 6 << 10
_DISK_BYTES = 64 << 20
_MEASURED_S = 0.2
_READ_COUNTER = bytes.fromhex(
    "0f31"  # rdtsc
    "48c1e220"  # shl rdx, 32
    "4809d0"  # or rax, rdx
    "c3"  # ret
)
_BUSYBOX = "/bin/busybox"
_UP, _ENDED = "outer: up after ", "outer: ended with status "

_INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
for module in /modules/*; do busybox insmod $module || echo "outer: $module was not loaded"; done
busybox mount -t virtiofs -o ro root /lower
busybox mount -t tmpfs tmpfs /upper
busybox mkdir /upper/files /upper/work
busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
# Before anything runs there: the shared /proc shows this machine's processes, not the outer one's.
busybox mount -t proc proc /root/proc
busybox cp /begin /root/outer-begin
exec busybox switch_root /root /outer-begin
"""
_BEGIN = """#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+cpu +cpuset +memory +pids +io" >/sys/fs/cgroup/cgroup.subtree_control
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
for directory in {own_directories}; do mount -t tmpfs tmpfs $directory; done
mkdir -p {results}
mount -t virtiofs results {results}
mount --make-rshared /
ip link set lo up
hostname outer
{replacements}
cd {tree}
echo "{up}$(cut -d' ' -f1 /proc/uptime) s"
{command} </dev/null
echo "{ended}$?"
dmesg >{results}/dmesg
sync
echo o >/proc/sysrq-trigger
while :; do :; done
"""


def problem() -> str | None:
    """Return one line on why this host cannot have an outer machine, and what to do; None if it can."""
    hidden = next((each for each in _OWN_DIRECTORIES if TREE.is_relative_to(each)), None)
    if hidden is not None:
        return f"outer machine: {TREE}: the outer machine has its own {hidden}; move the tree elsewhere"
    if not any((_GUEST_IMAGE / "modules").glob("*/modules.dep")):
        return f"outer machine: {_GUEST_IMAGE}: has no kernel modules; run scripts/setup"
    if not _QEMU.exists():
        return f"outer machine: {_QEMU}: not found; run scripts/setup"
    if not (_C_DAEMON.exists() or _RUST_DAEMON.exists()):
        return f"outer machine: {_C_DAEMON}: no virtio-fs daemon found; run scripts/setup"
    available = Path("/proc/meminfo").read_text(encoding="ascii").split("MemAvailable:")[1].split()[0]
    if int(available) >> 10 < _MEMORY_MIB:
        return f"outer machine: {int(available) >> 10} MiB of memory are free; {_MEMORY_MIB} are needed"
    return None


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    results: Path,
    deadline_s: float,
    replacements: Mapping[Path, Path] | None = None,
) -> int:
    """Boot the outer machine, run a command in it, and show the command's output.

    :param command: the program and its arguments; it runs in this source tree.
    :param environment: variables in addition to root's ordinary environment.
    :param results: a directory of this machine, which is ``RESULTS`` there.
    :param deadline_s: how long the whole run may take, in seconds.
    :param replacements: by path, files and directories that replace others in the outer machine; if the guest
        image is replaced, the outer machine boots the new image's kernel, too.
    :returns: the command's exit status; 1 if the machine did not run to its end.
    """
    settings = [f"{name}={value}" for name, value in environment.items()]
    replacements = replacements or {}
    image = replacements.get(_GUEST_IMAGE, _GUEST_IMAGE)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hako-outer-")))
        initrd, disk = home / "initrd", home / "disk"
        initrd.write_bytes(_initrd(["env", *settings, *command], image=image, replacements=replacements))
        with disk.open("wb") as file:
            file.truncate(_DISK_BYTES)
        # The outer machine may cache what it has read: the tree does not change while it runs.
        shares = [
            _share(stack, home, "root", Path("/"), cache="always"),
            _share(stack, home, "results", results, cache="auto"),
        ]
        limit = ["timeout", "--signal=KILL", f"{deadline_s:.0f}"]
        return _watch([*limit, *_qemu_argv(image / "vmlinux", initrd, disk, shares)])


def _initrd(command: Sequence[str], *, image: Path, replacements: Mapping[Path, Path]) -> bytes:
    mounts = (["mount", "--bind", str(other), str(place)] for place, other in replacements.items())
    begin = _BEGIN.format(
        replacements="\n".join(shlex.join(mount) for mount in mounts),
        tree=shlex.quote(str(TREE)),
        own_directories=shlex.join(_OWN_DIRECTORIES),
        command=shlex.join(command),
        results=RESULTS,
        up=_UP,
        ended=_ENDED,
    )
    return cpio.archive(
        [
            *(cpio.directory(f"/{name}") for name in ("proc", "lower", "upper", "root")),
            cpio.character_device("/dev/console", 5, 1),
            cpio.regular(_BUSYBOX, busybox.BUSYBOX.read_bytes(), mode=0o755),
            cpio.regular("/init", _INIT.encode(), mode=0o755),
            cpio.regular("/begin", begin.encode(), mode=0o755),
            *(
                cpio.regular(f"/modules/{number:03}-{file.name}", file.read_bytes())
                for number, file in enumerate(_modules(image))
            ),
        ]
    )


def _modules(image: Path) -> list[Path]:
    """List the modules, each after those that it needs; a module that the image lacks is built in."""
    [index] = (image / "modules").glob("*/modules.dep")
    lines = (line.partition(":") for line in index.read_text(encoding="ascii").splitlines())
    needs = {name: others.split() for name, _, others in lines}
    wanted = [f"{name}.ko" for name in _MODULES if f"{name}.ko" in needs]
    # The module that must be loaded first comes last; see modules.dep(5).
    files = (file for name in wanted for file in (*reversed(needs[name]), name))
    return [index.parent / file for file in dict.fromkeys(files)]


def _share(stack: ExitStack, home: Path, tag: str, source: Path, *, cache: str) -> list[str]:
    """Start a virtio-fs daemon; return QEMU's options for its device."""
    socket = home / f"{tag}.sock"
    if _C_DAEMON.exists():
        options = f"source={source},cache={cache},xattr,sandbox=chroot"
        argv = [str(_C_DAEMON), f"--socket-path={socket}", "-o", options]
    else:
        argv = [str(_RUST_DAEMON), f"--socket-path={socket}", f"--shared-dir={source}", f"--cache={cache}"]
        argv += ["--xattr", "--sandbox=chroot"]
    daemon = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    stack.callback(daemon.wait)
    stack.callback(daemon.terminate)
    while not socket.exists() and daemon.poll() is None:
        time.sleep(0.02)
    return [
        *("-chardev", f"socket,id={tag},path={socket}"),
        *("-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"),
    ]


def _qemu_argv(kernel: Path, initrd: Path, disk: Path, shares: Sequence[Sequence[str]]) -> list[str]:
    kernel_parameters = (
        "console=ttyS0 loglevel=3 panic=-1 no_timer_check intel_iommu=on "
        # Otherwise the kernel uses the HPET as its clock, and each reading leaves the machine. The frequency
        # must be given: on a busy host, a kernel that measured it itself ran ten times too fast (seen).
        f"tsc=reliable tsc_early_khz={_tsc_khz()} "
        # They cost time and protect nothing here.
        "mitigations=off"
    )
    return [
        *(str(_QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,memory-backend=memory,kernel-irqchip=split"),
        *("-accel", "tcg,thread=multi,tb-size=512", "-cpu", _PROCESSOR, "-smp", "2", "-m", f"{_MEMORY_MIB}M"),
        *("-object", f"memory-backend-memfd,id=memory,size={_MEMORY_MIB}M,share=on"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", kernel_parameters),
        *("-serial", "stdio", "-device", "virtio-rng-pci", "-device", "intel-iommu,intremap=on"),
        *(word for share in shares for word in share),
        # Devices to pass to guests; a virtio device bypasses the IOMMU unless it is told to use it.
        *("-drive", f"if=none,id=spare,format=raw,file={disk}"),
        *("-device", "nvme,serial=spare,drive=spare,addr=0x10"),
        *("-device", "pcie-pci-bridge,id=bridge,addr=0x11"),
        *(word for number in (1, 2) for word in _card(number)),
    ]


def _card(number: int) -> list[str]:
    options = f"netdev=port{number},bus=bridge,addr={number},mac=02:00:00:00:00:2{number}"
    return [
        *("-netdev", f"hubport,id=port{number},hubid=0"),
        *("-device", f"virtio-net-pci,{options},iommu_platform=on,disable-legacy=on"),
    ]


def _tsc_khz() -> int:
    """Measure the frequency of this processor's counter, which an emulated processor shows as its own."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_READ_COUNTER)
        code = ctypes.c_char.from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        began, began_ns = read(), time.monotonic_ns()
        time.sleep(_MEASURED_S)
        ended, ended_ns = read(), time.monotonic_ns()
        del read, code  # otherwise the page could not be closed
    khz: int = (ended - began) * 1_000_000 // (ended_ns - began_ns)
    return khz


def _watch(argv: list[str]) -> int:
    status = None
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as machine:
        assert machine.stdout is not None  # noqa: S101 - requested above
        try:
            for line in machine.stdout:
                if line.startswith(_ENDED):
                    status = int(line.removeprefix(_ENDED))
                else:
                    print(line.rstrip("\r\n"), flush=True)
        except BaseException:
            machine.terminate()
            raise
    if status is None:
        print("outer: the machine did not run to its end", flush=True)
    return 1 if status is None else status
