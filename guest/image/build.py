"""The whole image build: inputs, digest, steps, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import bytecode, cpio, initramfs, module_tree, packages, schema, submounts
from guest.image import kernel as kernel_image
from guest.image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

_PROGRAMS = ("crun", "python3-minimal", "libpython3-stdlib", "busybox-static")
# Order matters: the console first, so that later failures are seen; then the channel.
_BOOT_MODULES = ("virtio_pci", "virtio_console", "vmw_vsock_virtio_transport")
_LATER_MODULES = (
    # Loaded when the share is mounted, because the agent can answer without it.
    "virtiofs",
    *("overlay", "tun", "virtio_net", "virtio_blk", "virtio_balloon", "virtio_mem", "virtio_rng"),
    # Filesystems of volumes and root disks; each is left out if the kernel has it built in.
    *("ext4", "xfs"),
)
_PACKAGE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class _Kernel:
    image: Path
    modules: Path


def build(
    output: Path,
    cache: Path,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    progress: Callable[[str], None],
) -> None:
    """Build ``vmlinux``, ``initrd``, ``modules`` and ``image.json``, unless the inputs are unchanged.

    The same inputs give the same bytes.

    :param output: directory to fill.
    :param cache: directory that keeps downloaded packages.
    :param kernel: a bzImage or vmlinux to use instead of the distribution's.
    :param modules: the ``lib/modules/RELEASE`` directory that belongs to it.
    :param progress: called with one short line per step.
    :raises ImageError: if a step fails, or only one of kernel and modules is given.
    """
    if (kernel is None) != (modules is None):
        raise ImageError("image: kernel: --kernel and --modules belong together; give both or neither")
    progress("resolving packages")
    programs = packages.resolve(_PROGRAMS)
    kernels: tuple[packages.Package, ...] = ()
    if kernel is None:
        kernels = tuple(
            package
            for package in packages.resolve((packages.kernel_package(),))
            if package.name.startswith(("linux-image-", "linux-modules-"))
        )
    agent = _agent_sources()
    digest = _digest(programs + kernels, agent, kernel=kernel, modules=modules)
    if _is_current(output, digest):
        progress(f"up to date: {output}")
        return
    progress(f"fetching {len(programs + kernels)} packages")
    packages.fetch(programs + kernels, cache=cache)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hako-image-", dir=cache) as scratch:
        staging = Path(scratch) / "programs"
        progress("unpacking programs")
        packages.unpack(programs, cache=cache, staging=staging)
        if kernel is None or modules is None:
            progress("unpacking kernel")
            chosen = _unpack_kernel(kernels, cache=cache, staging=Path(scratch) / "kernel")
        else:
            chosen = _Kernel(image=kernel, modules=modules)
        progress(f"extracting kernel {chosen.modules.name}")
        vmlinux = kernel_image.vmlinux(chosen.image.read_bytes(), name=chosen.image.name)
        vmlinux = kernel_image.slim(vmlinux)
        boot = kernel_image.load_modules(chosen.modules, _BOOT_MODULES)
        every = kernel_image.load_modules(chosen.modules, _BOOT_MODULES + _LATER_MODULES)
        if not all(submounts.are_lists_checked(each.data) for each in every if each.name == submounts.MODULE):
            progress("warning: this kernel's fuse is of an unknown build: it refuses access control lists")
        progress("writing the modules for later")
        module_tree.write(
            output / "modules",
            kernel_image.all_modules(chosen.modules),
            release=chosen.modules.name,
            staging=staging,
        )
        progress("compiling the agent")
        _stage_agent(agent, staging)
        python = bytecode.compile_agent(staging)
        initrd = cpio.archive(initramfs.entries(staging, python=python, modules=every, boot=len(boot)))
    description = {
        "kernel_release": chosen.modules.name,
        "packages": [asdict(package) for package in programs + kernels],
        "input_digest": digest,
    }
    _write(output / "vmlinux", vmlinux)
    _write(output / "initrd", initrd)
    # Written last: if it exists, the other two are complete.
    _write(output / "image.json", json.dumps(description, indent=1).encode() + b"\n")
    progress(f"done: {output}: kernel {chosen.modules.name}, initrd {len(initrd) / 2**20:.1f} MiB")


def _agent_sources() -> dict[str, bytes]:
    sources = {
        f"guest/{path.relative_to(_PACKAGE_ROOT)}": path.read_bytes()
        for path in (_PACKAGE_ROOT / "__init__.py", *sorted((_PACKAGE_ROOT / "agent").glob("*.py")))
    }
    sources |= {
        f"proto/{name}": (_PACKAGE_ROOT.parent / "proto" / name).read_bytes()
        for name in ("__init__.py", "extensions.py")
    }
    sources["guest/agent/tables.py"] = schema.source().encode()
    return sources


def _stage_agent(sources: dict[str, bytes], staging: Path) -> None:
    for name, source in sources.items():
        path = staging / bytecode.AGENT_ROOT.lstrip("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)


def _unpack_kernel(chosen: tuple[packages.Package, ...], *, cache: Path, staging: Path) -> _Kernel:
    packages.unpack(chosen, cache=cache, staging=staging)
    images = sorted((staging / "boot").glob("vmlinuz-*"))
    if not images:
        raise ImageError(
            "image: kernel: the kernel package holds no /boot/vmlinuz; give --kernel and --modules"
        )
    release = images[-1].name.removeprefix("vmlinuz-")
    return _Kernel(image=images[-1], modules=staging / "usr/lib/modules" / release)


def _digest(
    chosen: tuple[packages.Package, ...],
    agent: dict[str, bytes],
    *,
    kernel: Path | None,
    modules: Path | None,
) -> str:
    """Digest everything the output depends on: packages, agent, given kernel and the builder itself."""
    digest = hashlib.sha256()
    for package in chosen:
        digest.update(f"{package}\n".encode())
    builder = {path.name: path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))}
    for name, content in sorted((agent | builder).items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    if kernel is not None and modules is not None:
        digest.update(kernel.read_bytes())
        for path in sorted(modules.rglob("*.ko*")):
            digest.update(f"{path.relative_to(modules)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _is_current(output: Path, digest: str) -> bool:
    try:
        description = json.loads((output / "image.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    complete = all((output / name).exists() for name in ("vmlinux", "initrd", "modules"))
    return complete and description.get("input_digest") == digest


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
