"""The initramfs: the files from the staging tree and the project that go into it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from guest.image import elf, launcher
from guest.image.bytecode import START, PythonTree
from guest.image.cpio import ArchiveEntry, character_device, directory, regular, symlink
from guest.image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from guest.image.kernel import Module

_RUNTIME = "/usr/bin/crun"
# It is for cgroups that systemd makes, and there is no systemd. Loading it and its own libraries would take
# most of the loader's time at each start of the runtime, and three megabytes in the memory of each machine.
_UNCALLED = "libsystemd.so.0"
_MODULES = "/lib/modules"
# They are large and rarely useful, and every machine would hold them in its memory.
_COMPRESSED = frozenset({"ext4", "overlay", "tun", "xfs"})
_LIBRARY_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")
# /lib and its like are links, as in the distributions: a library is found under either name.
_LINKS = {"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64"}
_DIRECTORIES = {
    "/dev": 0o755,
    "/etc": 0o755,
    "/mnt": 0o755,
    "/proc": 0o555,
    "/root": 0o700,
    "/run": 0o755,
    "/sys": 0o555,
    "/tmp": 0o1777,  # noqa: S108  the guest's own directory, not this machine's
    "/usr/sbin": 0o755,
    "/var/tmp": 0o1777,  # noqa: S108  as above
}
_FILES = {
    "/etc/group": "root:x:0:\n",
    "/etc/hostname": "hako\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n",
    "/etc/resolv.conf": "",
}


def entries(
    staging: Path, *, python: PythonTree, modules: Iterable[Module], boot: int
) -> Iterator[ArchiveEntry]:
    """Collect the archive's entries.

    :param staging: tree of unpacked packages and compiled agent.
    :param python: the Python files the agent needs.
    :param modules: kernel modules in load order.
    :param boot: how many of them, from the first on, are loaded at boot.
    :returns: the entries, in no particular order.
    :raises ImageError: if a file or shared library is missing.
    """
    yield from (symlink(path, target) for path, target in _LINKS.items())
    yield from (directory(path, mode=mode) for path, mode in _DIRECTORIES.items())
    yield from (regular(path, text.encode()) for path, text in _FILES.items())
    yield symlink("/var/run", "/run")
    # The kernel opens the console, and the interpreter seeds its hashes, before devtmpfs is mounted.
    yield character_device("/dev/console", 5, 1)
    yield character_device("/dev/urandom", 1, 9, mode=0o666)
    yield character_device("/dev/kmsg", 1, 11, mode=0o644)
    yield regular("/init", init_program(python.interpreter), mode=0o755)
    programs = (python.interpreter, _RUNTIME, *python.extensions)
    binaries = dict.fromkeys((*programs, *_libraries(staging, programs)))
    for path in binaries:
        other = _merged(str((staging / path.lstrip("/")).readlink())) if _is_link(staging, path) else path
        if other != path and other in binaries:
            yield symlink(path, other)  # the loader is known by two names
        else:
            yield regular(path, _read(staging, path), mode=0o755)
    for path in python.bytecode:
        yield regular(path, _read(staging, path))
    kept = list(modules)
    for module in kept:
        path = f"{_merged(_MODULES)}/{module.name}.ko"
        if module.name in _COMPRESSED:
            yield regular(f"{path}.z", zlib.compress(module.data, zlib.Z_BEST_COMPRESSION))
        else:
            yield regular(path, module.data)
    order = "".join(f"{module.name}\n" for module in kept[:boot])
    yield regular(f"{_merged(_MODULES)}/boot", order.encode())
    depends = "".join(f"{' '.join((module.name, *module.depends))}\n" for module in kept)
    yield regular(f"{_merged(_MODULES)}/depends", depends.encode())


def init_program(interpreter: str) -> bytes:
    """Write process 1, which starts the agent.

    :param interpreter: path of Python in the guest.
    :returns: the program.
    """
    # -I: no environment, no user directory; -S: no site module; -B: no bytecode is ever written.
    # Without a locale, the interpreter looks for one with UTF-8; with this one, it uses UTF-8 at once.
    return launcher.program((interpreter, "-ISB", START), ("LC_ALL=POSIX",))


def _merged(path: str) -> str:
    for link, target in _LINKS.items():
        if path.startswith(f"{link}/"):
            return f"/{target}{path.removeprefix(link)}"
    return path


def _read(staging: Path, path: str) -> bytes:
    try:
        data = (staging / path.lstrip("/")).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"image: initramfs: {path} is in no package; report the distribution") from error
    return elf.without_library(data, _UNCALLED) if path == _RUNTIME else data


def _is_link(staging: Path, path: str) -> bool:
    return (staging / path.lstrip("/")).is_symlink()


def _libraries(staging: Path, programs: Iterable[str]) -> list[str]:
    """Find the shared libraries programs need, and those need in turn, loader included."""
    found: dict[str, None] = {}
    queue = list(programs)
    while queue:
        path = queue.pop(0)
        image = elf.parse(_read(staging, path), name=path)
        wanted = [_find(staging, soname, path) for soname in image.needed]
        if image.interpreter is not None:
            wanted.append(_merged(image.interpreter))
        for library in wanted:
            if library not in found:
                found[library] = None
                queue.append(library)
    return list(found)


def _find(staging: Path, soname: str, user: str) -> str:
    for place in _LIBRARY_DIRECTORIES:
        if (staging / place.lstrip("/") / soname).exists():
            return f"{place}/{soname}"
    raise ImageError(
        f"image: initramfs: {user} needs {soname}, which is in no package; report the distribution"
    )
