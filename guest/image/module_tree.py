"""The kernel modules that stay on the host, where a machine finds modules that its kernel asks for.

When a container sets up packet filters, tunnels or other interfaces, the kernel asks for modules. On an
ordinary host, ``modprobe`` finds them. In the initramfs, all of them would take memory in every machine.
"""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING

from guest.image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from guest.image.kernel import Module

PROGRAM = "modprobe"
_BUSYBOX = "usr/bin/busybox"


def write(directory: Path, modules: Iterable[Module], *, release: str, staging: Path) -> None:
    """Write a directory with ``modprobe`` and, below the kernel's release, all modules with their indexes.

    The indexes are those of depmod(8), modules.dep(5) and modules.alias.

    :param directory: where it goes; see :func:`put`.
    :param modules: every module of the kernel.
    :param release: the kernel's release.
    :param staging: tree of unpacked packages, with a static busybox.
    :raises ImageError: if there is no busybox, or a module depends on one that is not there.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tree = partial / release
    tree.mkdir(parents=True)
    try:
        shutil.copyfile(staging / _BUSYBOX, partial / PROGRAM)
    except FileNotFoundError as error:
        raise ImageError(f"image: modules: {_BUSYBOX} is in no package; report the distribution") from error
    (partial / PROGRAM).chmod(0o755)
    depends: dict[str, tuple[str, ...]] = {}
    aliases = []
    for module in modules:
        (tree / f"{module.name}.ko").write_bytes(module.data)
        depends[module.name] = module.depends
        aliases += [f"alias {alias} {module.name}\n" for alias in module.aliases]
    (tree / "modules.dep").write_text("".join(dependency_lines(depends)), encoding="ascii")
    (tree / "modules.alias").write_text("".join(aliases), encoding="utf-8")
    put(partial, directory)


def put(new: Path, directory: Path) -> None:
    """Put a new tree in the place of one that machines may use.

    If both are the same, the old one stays. Otherwise, machines that use it can load no more modules.

    :param new: the tree; it is moved or removed.
    :param directory: its place.
    """
    if _content(new) == _content(directory):
        shutil.rmtree(new)
        return
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def _content(tree: Path) -> dict[str, tuple[int, str]]:
    """Return the mode and the digest of each file of a tree, by its name."""
    found = {}
    for path in tree.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(tree))] = (path.stat().st_mode, digest)
    return found


def dependency_lines(depends: dict[str, tuple[str, ...]]) -> list[str]:
    """Write the lines of modules.dep(5): each module with all that it needs, the first to load coming last.

    :param depends: the direct dependencies of each module, without built-in ones.
    :returns: the lines, in the same order.
    :raises ImageError: if a needed module does not exist.
    """

    def needed(name: str, found: list[str]) -> list[str]:
        for other in depends[name]:
            if other not in depends:
                raise ImageError(f"image: modules: {name} needs {other}, which is not there; use all modules")
            if other not in found:
                needed(other, found)
                found.append(other)
        return found

    return [
        f"{name}.ko:{''.join(f' {other}.ko' for other in reversed(needed(name, [])))}\n" for name in depends
    ]
