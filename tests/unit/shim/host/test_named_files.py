"""A path that a client names is opened only if it leads to a regular file, and never waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim import config
from shim.agent.oci_namespaces import WantedNamespace
from shim.bootstrap import grouping
from shim.errors import InvalidArgument
from shim.host import named_files
from shim.machine import pod
from shim.network.namespace import NetworkNamespace
from shim.refusal import Refusal
from shim.sandbox import bundle, files

if TYPE_CHECKING:
    from collections.abc import Callable


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": make_fifo,
    "socket": make_socket,
    "directory": Path.mkdir,
    "character device": lambda path: path.symlink_to("/dev/full"),
}
#: What is opened, the name of the file below a directory, and how it is refused.
OPENED: dict[str, tuple[Callable[[Path], object], str, type[Exception]]] = {
    "bundle": (bundle.read_spec, "config.json", InvalidArgument),
    "bundle of a start": (lambda place: grouping.group_of(str(place), "id"), "config.json", Refusal),
    "configuration": (
        lambda place: config.locate({}, options_path=str(place / "hako.toml")),
        "hako.toml",
        Refusal,
    ),
    "disk": (lambda place: files._size_of(place / "disk"), "disk", OSError),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    KINDS[kind](path)
    with pytest.raises(OSError, match=f"a {kind}, not a regular file"):
        named_files.read_regular(str(path))


def test_a_regular_file_is_read_through_links_and_as_far_as_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    assert named_files.read_regular(str(tmp_path / "link")) == b"text"
    assert named_files.read_regular(str(tmp_path / "link"), at_most=2) == b"te"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opener", OPENED)
def test_what_a_client_names_is_refused_if_it_is_no_file(opener: str, kind: str, tmp_path: Path) -> None:
    opened, name, error = OPENED[opener]
    KINDS[kind](tmp_path / name)
    with pytest.raises(error, match=r"not a regular file|neither a file nor a block device"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_machine_has_no_resolvers_if_they_are_in_no_file(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "resolv.conf"
    KINDS[kind](path)
    spec = {"mounts": [{"destination": "/etc/resolv.conf", "source": str(path)}]}
    assert pod.from_oci(spec).dns == ()
    assert f"a {kind}, not a regular file" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_a_network_namespace_must_be_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "namespace"
    KINDS[kind](path)
    with pytest.raises(InvalidArgument, match=r"not a network namespace|No such device or address"):
        await NetworkNamespace.open(WantedNamespace(path))


async def test_a_network_namespace_is_of_no_other_kind() -> None:
    with pytest.raises(InvalidArgument, match="not a network namespace"):
        await NetworkNamespace.open(WantedNamespace(Path("/proc/self/ns/uts")))
