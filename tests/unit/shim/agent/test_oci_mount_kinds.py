"""Which side mounts a file system, and from which source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shim.agent.oci_mount_kinds import Kind, file_system_of, kind_of, split_layers, unescaped
from shim.errors import InvalidArgument
from shim.host.volume_source import GuestWritable, opened
from shim.volumes.file_systems import FileSystems

if TYPE_CHECKING:
    from pathlib import Path


def entry(fstype: str, *options: str, source: Any = "none") -> dict[str, Any]:
    return {"destination": "/x", "type": fstype, "source": source, "options": list(options)}


@pytest.mark.parametrize(
    ("mount", "kind"),
    [
        (entry("bind"), Kind.BIND),
        (entry("none", "rbind"), Kind.BIND),
        (entry("ext4", "bind"), Kind.BIND),
        (entry("tmpfs", "tmpcopyup", "size=1m"), Kind.GUEST),
        (entry("proc"), Kind.GUEST),
        (entry("none", "remount", "ro"), Kind.GUEST),
        (entry("overlay", "lowerdir=/a:/b"), Kind.HOST),
        (entry("ext4", source="/dev/vdb"), Kind.HOST),
        (entry("unheard-of"), Kind.HOST),
    ],
)
def test_type_and_options_decide_which_side_mounts(mount: dict[str, Any], kind: Kind) -> None:
    assert kind_of(mount) is kind


@pytest.mark.parametrize(
    ("mount", "why"),
    [
        (entry("nfs4", source="192.0.2.1:/srv"), "nfs4: it is served over a network"),
        (entry("fuse.sshfs"), "fuse.sshfs: it is served by a process"),
        (entry("9p", "trans=virtio"), "9p: it is served by"),
        (entry("ext4", "loop", source="/disk"), "ext4: option loop: .* attach the file to a loop device"),
        (entry(""), "it has no type"),
    ],
)
def test_an_impossible_mount_is_refused_by_name(mount: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument, match=f"mounts: '/x': {why}"):
        kind_of(mount)


def test_options_are_told_apart_by_kind() -> None:
    options = ("rro", "nosuid", "sync", "rprivate", "data=ordered", "_netdev", "x-systemd.automount")
    found = file_system_of(entry("ext4", *options, source="/dev/vdb"))
    assert found.flags == ("ro", "nosuid", "sync")
    assert found.data == ("data=ordered",)
    assert found.bind_options == ("rbind", "ro", "nosuid", "rprivate")


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        ("/a", [("", "/a")]),
        ("/a:/b", [("", "/a"), (":", "/b")]),
        ("/a::/b", [("", "/a"), ("::", "/b")]),
        (r"/a\:1:/b\\", [("", "/a:1"), (":", "/b\\")]),
        ("/a:", [("", "/a"), (":", "")]),
        ("", [("", "")]),
    ],
)
def test_lower_layers_are_split_as_overlayfs_does(value: str, layers: list[tuple[str, str]]) -> None:
    assert split_layers(value) == layers


def test_an_escaped_path_is_decoded() -> None:
    assert unescaped(r"/a\,b\:c\\d") == r"/a,b:c\d"


async def refusal_of(mount: dict[str, Any], place: Path, writable: GuestWritable | None = None) -> str:
    systems = FileSystems(place / "mounts", writable=writable or GuestWritable())
    with pytest.raises(InvalidArgument) as refused:
        await systems.mount({"mounts": [entry("proc"), mount]})
    await systems.take_back()
    assert not (place / "mounts").exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["lowerdir={place}/none:{place}"], "{place}/none: No such file or directory"),
        (["lowerdir={place}:relative"], "'relative' is not an absolute path"),
        (["lowerdir={place}", "upperdir={place}/none", "workdir={place}"], "{place}/none: No such file"),
        ([":".join(["lowerdir={place}", *["{place}"] * 400])], "bytes of options are more than a page"),
    ],
    ids=["absent", "relative", "upper", "long"],
)
async def test_an_unusable_directory_of_an_overlay_is_named(
    tmp_path: Path, options: list[str], named: str
) -> None:
    filled = [option.format(place=tmp_path) for option in options]
    said = await refusal_of(entry("overlay", *filled, source="overlay"), tmp_path)
    assert said.startswith("mounts: '/x': overlay of 'overlay': ")
    assert named.format(place=tmp_path) in said


@pytest.mark.parametrize("key", ["lowerdir", "upperdir", "workdir"])
async def test_an_overlay_does_not_follow_a_guests_link(tmp_path: Path, key: str) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "link").symlink_to("/etc")
    writable = GuestWritable()
    with opened(tmp_path / "volume", writable) as descriptor:
        writable.add(descriptor)
    said = await refusal_of(entry("overlay", f"{key}={tmp_path}/volume/link"), tmp_path, writable)
    assert "in a directory that a guest writes in" in said


async def test_a_specification_without_such_mounts_is_unchanged(tmp_path: Path) -> None:
    spec = {"mounts": [entry("proc"), entry("bind", source="/srv")]}
    assert await FileSystems(tmp_path / "mounts", writable=GuestWritable()).mount(spec) is spec


@pytest.mark.parametrize(
    "mounts", [5, [5], ["text"], [{"type": "ext4"}], [{"type": 5}], [entry("ext4", source=5)]]
)
async def test_a_malformed_specification_is_refused(tmp_path: Path, mounts: Any) -> None:
    with pytest.raises(InvalidArgument, match="malformed"):
        await FileSystems(tmp_path / "mounts", writable=GuestWritable()).mount({"mounts": mounts})
