"""A shim outlives its containerd, and so does what its containers read and write."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.fifos import is_full
from tests.e2e.life import MOMENT_S, until
from tests.e2e.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

PIPE_BYTES = 64 << 10  # the capacity of a FIFO
LINES = 100_000
MUCH = "".join(f"{number}\n" for number in range(1, LINES + 1)).encode()
SCRIPT = "echo first; read order; $order; read order; echo $order; exit 7"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGTERM, id="stopped", marks=pytest.mark.mostly_on("1.7-ttrpc")),
        pytest.param(signal.SIGKILL, id="killed"),
    ],
)
def test_a_detached_container_survives_a_restart_of_containerd(
    stack: Stack, container: str, how: signal.Signals
) -> None:
    containerd = stack.containerd
    started = containerd.run(IMAGE, container, "sleep", "1000", options=["--detach"])
    assert started.code == 0, started.stderr
    before = containerd.tasks()[container]

    containerd.stop(how=how)
    os.kill(before[0], 0)
    containerd.start()

    until(lambda: containerd.tasks().get(container) == before, what="the task is as it was")
    assert containerd.exec(container, "after", "echo", "alive").stdout == "alive\n"
    assert containerd.ctr("task", "kill", "--signal", "9", container).code == 0
    containerd.wait_for_state(container, "STOPPED")
    assert "137" in containerd.ctr("task", "delete", container).stderr
    assert containerd.ctr("container", "delete", container).code == 0


@pytest.fixture
def box(one_stack: Stack) -> Iterator[str]:
    """A container of a script that writes, obeys an order and repeats another; its task is not created."""
    containerd, name = one_stack.containerd, new_id()
    made = containerd.ctr(
        "container", "create", "--runtime", containerd.runtime, IMAGE, name, "sh", "-c", SCRIPT
    )
    assert made.code == 0, made.stderr
    yield name
    if name in containerd.containers():
        containerd.remove(name)


@pytest.fixture
def fifos(tmp_path: Path) -> dict[str, Path]:
    """The streams of a container, as a client makes them."""
    paths = {name: tmp_path / name for name in ("stdin", "stdout")}
    for path in paths.values():
        os.mkfifo(path)
    return {**paths, "stderr": paths["stdout"]}  # runc's shim does not start without one


@pytest.mark.parametrize("client", ["stays", "leaves_and_comes_back"])
def test_fifos_lose_nothing_while_containerd_is_away(
    one_stack: Stack, box: str, fifos: dict[str, Path], client: str
) -> None:
    containerd = one_stack.containerd
    reader = open_reader(fifos["stdout"])
    with Tasks(containerd.address) as tasks:
        tasks.begin_create(box, **{name: str(path) for name, path in fifos.items()}).result()
        tasks.call("Start", box)
    output = read_to(reader, b"first\n")
    if client == "leaves_and_comes_back":
        os.close(reader)
    containerd.stop(how=signal.SIGKILL)

    fifos["stdin"].write_text(f"seq 1 {LINES}\n")
    if client == "stays":
        output += read_to(reader, MUCH[-8:])
        containerd.start()
    else:
        until(lambda: is_full(fifos["stdout"]), what="the FIFO is full")
        containerd.start()
        reader = open_reader(fifos["stdout"])
        output += read_to(reader, MUCH[-8:])

    with Tasks(containerd.address) as tasks:
        until(lambda: tasks.state(box)[0] == "RUNNING", what="the task runs as before")
        fifos["stdin"].write_text("farewell\n")
        output += read_to(reader, None)
        os.close(reader)
        assert tasks.call("Wait", box).exit_status == 7
    assert output == b"first\n" + MUCH + b"farewell\n"


def open_reader(fifo: Path) -> int:
    """Open the reading end of a FIFO, whether or not there is another."""
    return os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)


def read_to(reader: int, last: bytes | None) -> bytes:
    """Read until some bytes are the last, or without any until the end.

    :raises AssertionError: if nothing comes for a while, or the end comes too early.
    """
    output = b""
    while last is None or not output.endswith(last):
        assert select.select([reader], [], [], MOMENT_S)[0], f"nothing after {output[-100:]!r}"
        part = os.read(reader, PIPE_BYTES)
        if not part:
            assert last is None, f"the end after {output[-100:]!r}"
            break
        output += part
    return output
