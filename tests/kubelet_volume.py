"""ConfigMap, Secret and projected volumes as the kubelet writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def publish(volume: Path, version: str, files: dict[str, str]) -> None:
    """Write a version of a volume in the kubelet's order.

    :param volume: the directory that is mounted into containers.
    :param version: a name for the version; it starts with two dots.
    :param files: content by name.
    """
    old = (volume / "..data").readlink() if (volume / "..data").exists() else None
    (volume / version).mkdir()
    for name, content in files.items():
        (volume / version / name).write_text(content)
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").rename(volume / "..data")
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    for path in list(volume.iterdir()):
        if not path.name.startswith("..") and path.name not in files:
            path.unlink()
    if old is not None:
        for path in (volume / old).iterdir():
            path.unlink()
        (volume / old).rmdir()
