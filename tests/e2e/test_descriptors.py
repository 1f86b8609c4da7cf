"""Open files of the processes that a guest talks to: none of the shim's, and none of the host's."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.host.ledger import SHIM_PROCESS, Ledger
from tests.e2e import busybox
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

EXPECTED = {
    "QEMU": {"/dev/null", "/memfd:hako-memory", "eventfd", "eventpoll", "pipe", "signalfd", "socket"},
    "virtio-fs daemon": {"eventfd", "pipe", "socket", "a file below its root"},
    "vhost-device-vsock": {
        *("/dev/null", "/memfd:hako-memory", "eventfd", "eventpoll", "pipe", "socket"),
        "its directory",
    },
}
NUMBERED = re.compile(r"^(?:anon_inode:\[)?([a-z]+)(?::\[\d+\]|\])$")


@pytest.fixture
def sandbox(one_stack: Stack) -> Iterator[Path]:
    """The state directory of a sandbox with a container."""
    name = new_id()
    started = one_stack.containerd.run(busybox.IMAGE, name, "sleep", "1000", options=["--detach"])
    assert started.code == 0, started.stderr
    yield Path(one_stack.record(name).state_directory)
    one_stack.containerd.remove(name)


def open_files(pid: int, *, own: Path | None = None) -> set[str]:
    """List what a process has open; its own directory, if that has no path, by that of the host."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(own if own and own.exists() and link.samefile(own) else link.readlink()))
    return found


def kind_of(link: str, *, name: str, sandbox: Path) -> str:
    """Leave out of a link what differs from one process to the next."""
    numbered = NUMBERED.match(link)
    if numbered:
        return numbered[1]
    if name == "virtio-fs daemon":
        return "a file below its root"
    return (
        "its directory" if link in {str(sandbox), str(sandbox / "vsock")} else link.removesuffix(" (deleted)")
    )


def test_each_process_has_the_expected_kinds_of_files_open_and_no_socket_of_the_shim(sandbox: Path) -> None:
    ledger = Ledger(str(sandbox))
    pids = {entry.name: entry.pid for entry in ledger.entries() if entry.kind == "process"}
    ledger.close()
    sockets_of_shim = {link for link in open_files(pids[SHIM_PROCESS]) if link.startswith("socket:")}
    # Those that made a clone are gone.
    files = {name: open_files(pids[name], own=sandbox / "vsock") for name in EXPECTED}

    assert sockets_of_shim
    assert not any(links & sockets_of_shim for links in files.values())
    kinds = {
        name: {kind_of(link, name=name, sandbox=sandbox) for link in links} for name, links in files.items()
    }
    assert {name: found for name, found in kinds.items() if not found <= EXPECTED[name]} == {}
