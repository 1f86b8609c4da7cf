"""The pure parts of the image builder: archive, ELF facts, kernel extraction, module order."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from guest.image import ImageError, cpio, elf, initramfs, kernel, launcher, module_tree

XEN_NOTE = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000000)


def elf_with(notes: bytes) -> bytes:
    """Make the smallest ELF file with one note segment."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", elf.PT_NOTE, 4, 120, 0, 0, len(notes), len(notes), 4)
    return header + segment + notes


def bzimage_with(payload: bytes) -> bytes:
    """Wrap a payload as the x86 boot protocol requires, with one setup sector."""
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x208] = b"HdrS" + struct.pack("<H", 0x20F)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload


KERNEL = elf_with(XEN_NOTE)
SIZE = struct.pack("<I", len(KERNEL))


def by_tool(tool: str, *options: str) -> bytes:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *options, "-c"], input=KERNEL, capture_output=True, check=True).stdout


@pytest.mark.parametrize("method", ["xz", "gzip", "zstd", "lz4"])
def test_a_kernel_of_any_compression_is_extracted(method: str) -> None:
    payload = {
        "xz": lambda: lzma.compress(KERNEL),
        "gzip": lambda: gzip.compress(KERNEL),
        "zstd": lambda: by_tool("zstd"),
        "lz4": lambda: by_tool("lz4", "-l"),
    }[method]()
    assert kernel.vmlinux(bzimage_with(payload + SIZE), name="k") == KERNEL


def test_an_uncompressed_kernel_is_used_unchanged() -> None:
    assert kernel.vmlinux(KERNEL, name="k") == KERNEL


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        (b"nothing" * 200, "neither a bzImage nor an ELF"),
        (elf_with(b""), "no PVH entry"),
        (bzimage_with(b"????" + SIZE), "unknown compression"),
        (bzimage_with(lzma.compress(KERNEL)[:6] + b"broken" + SIZE), "damaged"),
    ],
)
def test_a_bad_kernel_is_refused_with_the_cause(image: bytes, cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        kernel.vmlinux(image, name="k")


def test_the_kernel_loses_its_unwinding_tables_and_types_but_keeps_its_place() -> None:
    sections = {".text": b"code" * 100, ".orc_unwind": b"frames" * 100, ".BTF": b"types" * 1000}
    given = relocatable(sections)
    slim = kernel.slim(given)
    assert len(slim) == len(given)
    image = elf.parse(slim, name="slim")
    assert image.section(".text") == sections[".text"]
    assert not any(image.section(".orc_unwind"))
    types = image.section(".BTF")
    assert struct.unpack_from("<HBBI", types) == (0xEB9F, 1, 0, 24)
    type_offset, type_length, name_offset, name_length = struct.unpack_from("<IIII", types, 8)
    assert (type_offset, type_length, name_offset) == (0, 16, 16)
    assert 24 + type_length + name_length == len(sections[".BTF"]), "the kernel refuses gaps"
    assert types.rstrip(b"\0").endswith(b"\0int")


def test_the_elf_facts_of_the_running_interpreter_are_read() -> None:
    path = Path(sys.executable).resolve()
    image = elf.parse(path.read_bytes(), name=path.name)
    assert image.interpreter is not None
    assert image.interpreter.startswith("/lib64/ld-linux")
    assert "libc.so.6" in image.needed
    assert image.section(".interp").rstrip(b"\0").decode() == image.interpreter
    assert image.section(".no-such-section") == b""


def test_a_program_no_longer_needs_a_library_that_was_removed() -> None:
    path = Path("/bin/ls").resolve()
    data = path.read_bytes()
    needed = elf.parse(data, name=path.name).needed
    for soname in needed:
        without = elf.without_library(data, soname)
        assert len(without) == len(data)
        assert elf.parse(without, name=path.name).needed == tuple(one for one in needed if one != soname)
        assert elf.without_library(without, soname) == without


def test_cpio_finds_every_file_in_the_archive(tmp_path: Path) -> None:
    tool = shutil.which("busybox")
    if tool is None:
        pytest.skip("busybox is not installed")
    entries = [
        cpio.regular("/a/b/file", b"content", mode=0o640),
        cpio.symlink("/a/link", "b/file"),
        cpio.directory("/empty", mode=0o711),
    ]
    subprocess.run(
        [tool, "cpio", "-id"], input=cpio.archive(entries), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "a/link").read_bytes() == b"content"
    assert (tmp_path / "a/b/file").stat().st_mode & 0o7777 == 0o640
    assert (tmp_path / "empty").stat().st_mode & 0o7777 == 0o711


def test_the_archive_does_not_depend_on_the_order_of_its_entries() -> None:
    entries = [cpio.regular(f"/dir/{name}", name.encode()) for name in "cab"]
    assert cpio.archive(entries) == cpio.archive(reversed(entries))


def relocatable(sections: dict[str, bytes]) -> bytes:
    """Make an ELF file with sections and trailing bytes."""
    content = {**sections, ".shstrtab": b""}
    names = b"\0" + b"".join(name.encode() + b"\0" for name in content)
    content[".shstrtab"] = names
    body = b"".join(content.values())
    header = struct.pack(
        *("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 1, 62, 1, 0, 0, 64 + len(body)),
        *(0, 64, 0, 0, 64, len(content) + 1, len(content)),
    )
    headers = [bytes(64)]
    offset = 64
    for name, data in content.items():
        position = names.index(name.encode() + b"\0")
        headers.append(struct.pack("<IIQQQQIIQQ", position, 1, 0, 0, offset, len(data), 0, 0, 1, 0))
        offset += len(data)
    return header + body + b"".join(headers) + b"~a signature~"


def module(name: str, depends: str) -> bytes:
    """Make an ELF file with just a .modinfo section."""
    return relocatable({".modinfo": f"name={name}\0depends={depends}\0".encode()})


def test_modules_lose_only_unwanted_sections_and_their_relocations() -> None:
    kept = {".text": b"code" * 100, ".rela.text": b"relocations", ".data": b"data"}
    lost = {".BTF": b"types" * 1000, ".rela.BTF": b"more relocations"}
    given = relocatable({".text": kept[".text"], **lost, **kept})
    slim = elf.slim_module(given, [".BTF"])
    assert len(slim) < len(given) - len(b"".join(lost.values()))
    image = elf.parse(slim, name="slim")
    assert {name: image.section(name) for name in (*kept, *lost)} == kept | dict.fromkeys(lost, b"")
    count = struct.unpack_from("<H", slim, 0x3C)[0]
    assert count == struct.unpack_from("<H", given, 0x3C)[0], "symbols refer to sections by number"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/virtio-fs.ko.xz").write_bytes(lzma.compress(module("virtio-fs", "fuse,virtio")))
    (tmp_path / "kernel/fuse.ko").write_bytes(module("fuse", ""))
    (tmp_path / "kernel/virtio.ko.gz").write_bytes(gzip.compress(module("virtio", "virtio-ring")))
    (tmp_path / "kernel/virtio_ring.ko").write_bytes(module("virtio_ring", ""))
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4.ko\n")
    return tmp_path


def test_modules_are_uncompressed_and_follow_their_dependencies(modules: Path) -> None:
    loaded = kernel.load_modules(modules, ("virtio", "virtio_fs", "ext4"))
    assert [one.name for one in loaded] == ["virtio_ring", "virtio", "fuse", "virtio_fs"]
    assert all(one.data.startswith(b"\x7fELF") for one in loaded)


def test_all_modules_are_found_by_the_kernels_names_for_them(modules: Path) -> None:
    (modules / "kernel/dummy.ko").write_bytes(
        relocatable({".modinfo": b"name=dummy\0depends=\0alias=rtnl-link-dummy\0alias=pci:v*d*\0"})
    )
    found = {one.name: one.aliases for one in kernel.all_modules(modules)}
    assert list(found) == ["dummy", "fuse", "virtio", "virtio_fs", "virtio_ring"]
    assert found["dummy"] == ("rtnl-link-dummy", "pci:v*d*")


def test_the_tree_of_modules_has_modprobe_and_its_indexes(modules: Path, tmp_path: Path) -> None:
    staging, tree = tmp_path / "staging", tmp_path / "modules"
    (staging / "usr/bin").mkdir(parents=True)
    (staging / "usr/bin/busybox").write_bytes(b"a program")
    for _again in range(2):
        module_tree.write(tree, kernel.all_modules(modules), release="6.1", staging=staging)
    assert (tree / "modprobe").stat().st_mode & 0o777 == 0o755
    # The module that must be loaded first comes last; see modules.dep(5).
    assert (tree / "6.1/modules.dep").read_text().splitlines() == [
        "fuse.ko:",
        "virtio.ko: virtio_ring.ko",
        "virtio_fs.ko: virtio.ko virtio_ring.ko fuse.ko",
        "virtio_ring.ko:",
    ]
    assert sorted(path.name for path in (tree / "6.1").glob("*.ko")) == [
        *("fuse.ko", "virtio.ko", "virtio_fs.ko", "virtio_ring.ko")
    ]
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("files", "stays"),
    [
        ({"6.1/virtio.ko": "code", "modprobe": "program"}, True),
        ({"6.1/virtio.ko": "other", "modprobe": "program"}, False),
        ({"6.1/virtio.ko": "code"}, False),
        ({"6.2/virtio.ko": "code", "modprobe": "program"}, False),
    ],
)
def test_machines_keep_their_modules_unless_there_are_others(
    tmp_path: Path, *, files: dict[str, str], stays: bool
) -> None:
    new, place = tmp_path / "new", tmp_path / "modules"
    for tree, content in ((place, {"6.1/virtio.ko": "code", "modprobe": "program"}), (new, files)):
        for name, text in content.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text, encoding="utf-8")
    before = place.stat().st_ino
    module_tree.put(new, place)

    assert (place.stat().st_ino == before) is stays
    assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == {*files}
    assert not new.exists()


def test_a_program_that_machines_cannot_run_is_replaced(tmp_path: Path) -> None:
    for tree, mode in (("new", 0o755), ("modules", 0o644)):
        (tmp_path / tree).mkdir()
        (tmp_path / tree / "modprobe").touch(mode)
    module_tree.put(tmp_path / "new", tmp_path / "modules")

    assert (tmp_path / "modules/modprobe").stat().st_mode & 0o777 == 0o755


def test_a_missing_dependency_of_a_module_is_named() -> None:
    with pytest.raises(ImageError, match="virtio needs virtio_ring"):
        module_tree.dependency_lines({"virtio": ("virtio_ring",)})


def test_a_missing_module_is_named(modules: Path) -> None:
    with pytest.raises(ImageError, match="vsock"):
        kernel.load_modules(modules, ("vsock",))


def test_init_starts_the_staged_interpreter_in_isolated_mode() -> None:
    init = initramfs.init_program("/usr/bin/python3.13")
    assert b"/usr/bin/python3.13\0-ISB\0/usr/lib/hako/start.pyc\0LC_ALL=POSIX\0" in init


def test_the_launcher_executes_a_program_with_arguments_and_an_environment(tmp_path: Path) -> None:
    launched = tmp_path / "launched"
    launched.write_bytes(launcher.program(("/usr/bin/env", "FIRST=1", "/bin/sh", "-c", "env"), ("SECOND=2",)))
    launched.chmod(0o755)
    done = subprocess.run([launched], capture_output=True, text=True, check=True, env={"LOST": "3"})
    assert {"FIRST=1", "SECOND=2"} <= set(done.stdout.splitlines())
    assert "LOST" not in done.stdout
