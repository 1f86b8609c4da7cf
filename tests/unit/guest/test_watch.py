"""A configuration volume's copy shows whole versions, published at once and announced by inotify."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.agent import watch
from guest.agent.errors import AgentError
from guest.agent.watch import Volume
from tests.kubelet_volume import publish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x80, 0x100, 0x200


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    publish(path, "..v1", {"a": "1", "b": "2"})
    return path


@pytest.fixture
def copy(tmp_path: Path, source: Path) -> Volume:
    target = tmp_path / "target"
    target.mkdir()
    volume = Volume(str(source), str(target))
    volume.refresh()
    return volume


@pytest.fixture
def events(copy: Volume) -> Iterator[Callable[[], list[tuple[int, str]]]]:
    """Watches the copy as a program in a container would."""
    libc = ctypes.CDLL(None)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    libc.inotify_add_watch(fd, copy.target.encode(), IN_MOVED_TO | IN_CREATE | IN_DELETE)

    def read() -> list[tuple[int, str]]:
        data, found = os.read(fd, 65536), []
        while data:
            _watch, mask, _cookie, length = struct.unpack_from("iIII", data)
            found.append((mask & 0xFFF, data[16 : 16 + length].rstrip(b"\0").decode()))
            data = data[16 + length :]
        return found

    yield read
    os.close(fd)


def contents(volume: Volume) -> dict[str, str]:
    return {name: (Path(volume.target) / name).read_text() for name in names(volume) if name[0] != "."}


def names(volume: Volume) -> list[str]:
    return sorted(path.name for path in Path(volume.target).iterdir())


def test_the_copy_looks_like_the_volume(source: Path, copy: Volume) -> None:
    (source / "..v2" / "deep").mkdir(parents=True)
    secret = source / "..v2" / "deep" / "secret"
    secret.write_text("s")
    secret.chmod(0o400)
    os.utime(secret, ns=(1, 10**9))
    (source / "..v2" / "link").symlink_to("deep/secret")
    (source / "..data").unlink()
    (source / "..data").symlink_to("..v2")
    copy.refresh()
    copied = (Path(copy.target) / "deep/secret").stat()
    assert (copied.st_mode & 0o7777, copied.st_mtime_ns) == (0o400, 10**9)
    assert (Path(copy.target) / "..data/link").readlink() == Path("deep/secret")
    assert names(copy) == ["..data", "..v2", "deep", "link"]


def test_a_new_version_appears_at_once_and_with_events(
    source: Path, copy: Volume, events: Callable[[], list[tuple[int, str]]]
) -> None:
    publish(source, "..v2", {"a": "3", "c": "4"})
    copy.refresh()
    assert contents(copy) == {"a": "3", "c": "4"}
    seen = events()
    order = [
        (IN_CREATE, "..v2"),
        (IN_MOVED_TO, "..data"),
        (IN_CREATE, "c"),
        (IN_DELETE, "b"),
        (IN_DELETE, "..v1"),
    ]
    assert [event for event in seen if event in order] == order


def test_without_a_new_version_there_are_no_events(
    copy: Volume, events: Callable[[], list[tuple[int, str]]]
) -> None:
    copy.refresh()
    with pytest.raises(BlockingIOError):
        events()


def test_a_volume_of_many_files_is_copied(source: Path, copy: Volume) -> None:
    files = {f"key{number:03}": "x" * 4096 for number in range(500)}
    publish(source, "..v2", files)
    copy.refresh()
    assert contents(copy) == files


def test_a_version_that_disappears_during_the_copy_is_never_shown(
    source: Path, copy: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_CACHE_S", 0)
    publish(source, "..v2", {"a": "3", "b": "4"})
    copy_file = watch._copy_file

    def replace_then_copy(old: str, new: str) -> None:
        monkeypatch.setattr(watch, "_copy_file", copy_file)
        publish(source, "..v3", {"a": "5", "b": "6"})
        copy_file(old, new)

    monkeypatch.setattr(watch, "_copy_file", replace_then_copy)
    copy.refresh()
    assert contents(copy) == {"a": "5", "b": "6"}
    assert names(copy) == ["..data", "..v3", "a", "b"]


@pytest.mark.parametrize("elsewhere", ["/etc", "../source", "v9", "..", "..data_tmp"])
def test_a_link_that_leads_out_is_refused(source: Path, copy: Volume, elsewhere: str) -> None:
    (source / "..data").unlink()
    (source / "..data").symlink_to(elsewhere)
    with pytest.raises(AgentError, match="let the kubelet make it"):
        copy.refresh()
    assert contents(copy) == {"a": "1", "b": "2"}
