"""The guest kernel: an uncompressed PVH ``vmlinux`` out of a bzImage, and its modules in load order."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest.image import elf, submounts
from guest.image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_XZ, _GZIP, _ZSTD, _LZ4 = b"\xfd7zXZ\x00", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"
_TOOL_TIMEOUT_S = 120
_SECTOR = 512
_UNWINDING = frozenset({".orc_unwind", ".orc_unwind_ip"})
_FEWEST_TYPES = 1 << 12
_UNWANTED = (
    # Type information, which makes the kernel parse all of its own types; only tracing needs it.
    ".BTF",
    # Tables for stack traces through a module, which the kernel sorts on load; only crash reports need them.
    ".orc_unwind",
    ".orc_unwind_ip",
    ".comment",
)
"""Sections of modules that cost more than they are worth. The signature, which covers all sections, goes with
them: a process that can change a module in the image can change the kernel, too."""


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module.

    :param name: the name with underscores, as the kernel shows it.
    :param data: the uncompressed object.
    :param depends: names of the modules it needs first.
    :param aliases: patterns of the names that the kernel asks for when it needs what this module does.
    """

    name: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...] = ()


def vmlinux(image: bytes, *, name: str) -> bytes:
    """Extract the uncompressed kernel from a bzImage, or return a vmlinux unchanged.

    The payload's place is given by the setup header (Documentation/arch/x86/boot.rst, ``payload_offset``
    and ``payload_length``, protocol 2.08); its last four bytes are the uncompressed size, as the kernel's
    build appends them.

    :param image: a bzImage or an ELF kernel.
    :param name: what to call it in an error.
    :returns: an ELF kernel with a PVH entry.
    :raises ImageError: if it is not an x86 kernel, is compressed in an unknown way or has no PVH entry.
    """
    kernel = image if image[:4] == b"\x7fELF" else _decompress(_payload(image, name), name)
    if not elf.parse(kernel, name=name).has_pvh_entry:
        raise ImageError(f"image: kernel: {name}: no PVH entry note; use a kernel built with CONFIG_PVH=y")
    return kernel


def slim(kernel: bytes) -> bytes:
    """Empty tables of the kernel that take memory in every machine and are not needed there.

    The kernel still finds both tables. The one for unwinding has no frames, so the traces in reports of
    crashes are guesses. The one with types (Documentation/bpf/btf.rst) has a single type. The kernel then
    loads only eBPF programs that do not ask for its types, such as those that limit a container's devices.

    :param kernel: an ELF kernel.
    :returns: the same, with these tables empty.
    """
    slimmed = bytearray(kernel)
    for name, (offset, length) in elf.sections(kernel).items():
        if name in _UNWINDING:
            slimmed[offset : offset + length] = bytes(length)
        elif name == ".BTF" and length > _FEWEST_TYPES:
            slimmed[offset : offset + length] = _one_type(length)
    return bytes(slimmed)


def _one_type(length: int) -> bytes:
    """Write type information of a given length: one integer, and names of which all but one are empty."""
    names = b"\0int\0"
    kind, vlen, size, bits = 1, 0, 4, 32
    types = struct.pack("<IIII", names.index(b"int"), kind << 24 | vlen, size, 1 << 24 | bits)
    magic, version, flags, header_size = 0xEB9F, 1, 0, 24
    header = struct.pack(
        *("<HBBIIIII", magic, version, flags, header_size, 0, len(types)),
        *(len(types), length - header_size - len(types)),
    )
    return (header + types + names).ljust(length, b"\0")


def _payload(image: bytes, name: str) -> bytes:
    if image[0x202:0x206] != b"HdrS":
        raise ImageError(f"image: kernel: {name}: neither a bzImage nor an ELF kernel; give one of these")
    protocol = struct.unpack_from("<H", image, 0x206)[0]
    if protocol < 0x208:
        raise ImageError(
            f"image: kernel: {name}: boot protocol {protocol:#x} is too old; use a kernel since 2.6.26"
        )
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * _SECTOR + offset
    return image[start : start + length]


def _decompress(payload: bytes, name: str) -> bytes:
    try:
        if payload.startswith(_XZ):
            return lzma.LZMADecompressor().decompress(payload)
        if payload.startswith(_GZIP):
            return zlib.decompressobj(wbits=31).decompress(payload)
    except (lzma.LZMAError, zlib.error) as error:
        raise ImageError(f"image: kernel: {name}: damaged payload: {error}; use another copy") from error
    # The size the kernel's build appends is not part of the stream, and these tools refuse trailing bytes.
    stream, size = payload[:-4], struct.unpack("<I", payload[-4:])[0]
    if payload.startswith(_ZSTD):
        kernel = _by_tool("zstd", stream)
    elif payload.startswith(_LZ4):
        kernel = _by_tool("lz4", stream)
    else:
        raise ImageError(
            f"image: kernel: {name}: unknown compression {payload[:4].hex()}; "
            "use xz, gzip, zstd or lz4, or give the vmlinux itself"
        )
    if len(kernel) != size:
        raise ImageError(
            f"image: kernel: {name}: {len(kernel)} bytes instead of {size} came out; use another copy"
        )
    return kernel


def _by_tool(tool: str, stream: bytes) -> bytes:
    try:
        done = subprocess.run(
            [tool, "-d", "-c"], input=stream, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise ImageError(f"image: {tool}: not installed; run apt-get install {tool}") from error
    if done.returncode != 0:
        raise ImageError(
            f"image: {tool}: {done.stderr.decode(errors='replace').strip()}; use another copy of the file"
        )
    return done.stdout


def load_modules(root: Path, wanted: tuple[str, ...]) -> tuple[Module, ...]:
    """Read modules and all that they depend on, each after its dependencies.

    Dependencies come from each module's own ``.modinfo``, because a package's ``modules.dep`` exists only
    after depmod has run on an installed system.

    :param root: a ``lib/modules/RELEASE`` directory.
    :param wanted: module names, in the order in which they should load.
    :returns: modules in load order; names built into the kernel are left out.
    :raises ImageError: if a module does not exist and is not built in.
    """
    files = _files(root)
    built_in = {
        _name(line.rpartition("/")[2])
        for line in (root / "modules.builtin").read_text(encoding="ascii").split()
    }
    ordered: dict[str, Module] = {}

    def add(name: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise ImageError(
                f"image: kernel module {name}: neither in {root} nor built in; use a kernel that has it"
            )
        module = _read(name, files[name])
        for dependency in module.depends:
            add(dependency)
        ordered[name] = module

    for name in wanted:
        add(name)
    return tuple(ordered.values())


def all_modules(root: Path) -> Iterator[Module]:
    """Read every module of a kernel.

    :param root: a ``lib/modules/RELEASE`` directory.
    :returns: the modules, one by one, sorted by name.
    :raises ImageError: if one is damaged.
    """
    return (_read(name, path) for name, path in sorted(_files(root).items()))


def _files(root: Path) -> dict[str, Path]:
    return {
        _name(path.name): path
        for path in sorted(root.rglob("*.ko*"))
        if path.name.removesuffix(path.suffix).endswith(".ko") or path.suffix == ".ko"
    }


def _name(file: str) -> str:
    return file.partition(".ko")[0].replace("-", "_")


def _read(name: str, path: Path) -> Module:
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            data = lzma.decompress(data)
        case ".gz":
            data = gzip.decompress(data)
        case ".zst":
            data = _by_tool("zstd", data)
        case _:
            pass
    depends: tuple[str, ...] = ()
    aliases = []
    for item in elf.parse(data, name=path.name).section(".modinfo").split(b"\0"):
        key, _equals, value = item.decode(errors="replace").partition("=")
        if key == "depends":
            depends = tuple(part.replace("-", "_") for part in value.split(",") if part)
        elif key == "alias":
            aliases.append(value)
    data = elf.slim_module(data, _UNWANTED)
    if name == submounts.MODULE:
        data = submounts.check_lists(data)
    return Module(name=name, data=data, depends=depends, aliases=tuple(aliases))
