"""The path to a volume's source follows no link that a guest made, and reaches no special file."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from shim.errors import InvalidArgument
from shim.host.volume_source import GuestWritable, opened
from tests.descriptors import descriptors


@pytest.fixture
def writable(tmp_path: Path) -> GuestWritable:
    """A guest that may write in a single directory."""
    (tmp_path / "guest" / "below").mkdir(parents=True)
    (tmp_path / "guest" / "below" / "file").write_text("the guest's")
    (tmp_path / "file").write_text("the host's")
    found = GuestWritable()
    with opened(tmp_path / "guest", found) as descriptor:
        found.add(descriptor)
    return found


def read(path: Path, writable: GuestWritable) -> str:
    with opened(path, writable) as descriptor:
        return Path(f"/proc/self/fd/{descriptor}").read_text(encoding="utf-8")


def test_the_hosts_own_links_are_followed(tmp_path: Path, writable: GuestWritable) -> None:
    (tmp_path / "link").symlink_to("./way")
    (tmp_path / "way").symlink_to(tmp_path)
    assert read(tmp_path / "link" / "." / "way" / "file", writable) == "the host's"
    assert read(tmp_path / "way" / "guest" / "below" / "file", writable) == "the guest's"


@pytest.mark.parametrize("path", ["to-file", "up/file", "below/absolute", "../file", "below/to-below/file"])
def test_links_and_parent_steps_are_refused_where_a_guest_may_write(
    tmp_path: Path, writable: GuestWritable, path: str
) -> None:
    guest = tmp_path / "guest"
    (guest / "to-file").symlink_to("../file")
    (guest / "up").symlink_to("..")
    (guest / "below" / "absolute").symlink_to(tmp_path / "file")
    (guest / "below" / "to-below").symlink_to(".")
    (tmp_path / "alias").symlink_to("guest")
    for way in ("guest", "alias", "guest/./"):
        with pytest.raises(InvalidArgument, match="in a directory that a guest writes in"):
            read(tmp_path / way / path, writable)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fifo", "is a FIFO of the host"),
        ("socket", "is a socket of the host"),
        ("none", "No such file"),
        ("file/x", "Not a directory"),
        ("dangling", "No such file"),
        ("itself", "Too many levels of symbolic links"),
        ("nul\0", "has a NUL byte"),
    ],
)
def test_a_special_file_is_refused_by_its_kind(
    tmp_path: Path, writable: GuestWritable, name: str, why: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("none")
    (tmp_path / "itself").symlink_to("itself")
    before = descriptors()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        with pytest.raises(InvalidArgument, match=why):
            read(tmp_path / name, writable)
    assert descriptors() <= before


def test_a_path_that_changes_meanwhile_leads_to_no_other_host_file(
    tmp_path: Path, writable: GuestWritable
) -> None:
    guest = tmp_path / "guest"
    (guest / "link").symlink_to(tmp_path)
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            (guest / "below").rename(guest / "away")
            (guest / "link").rename(guest / "below")
            (guest / "below").rename(guest / "link")
            (guest / "away").rename(guest / "below")

    swapping = threading.Thread(target=swap)
    swapping.start()
    outcomes: set[str] = set()
    attempts = 0
    try:
        while attempts < 2000 or len(outcomes) < 2 or "the guest's" not in outcomes:
            attempts += 1
            try:
                outcomes.add(read(guest / "below" / "file", writable))
            except InvalidArgument as error:
                outcomes.add(str(error).rpartition(";")[0].rpartition(": ")[2])
    finally:
        ended.set()
        swapping.join()
    assert "the guest's" in outcomes
    assert "the host's" not in outcomes
