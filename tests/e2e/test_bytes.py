"""Every byte arrives once and in order, for any size, channel and pace of the reader."""

from __future__ import annotations

import hashlib
import os
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.sandbox.stream_copying import DRAIN_TIMEOUT_S
from tests.e2e.by_hand import ByHand
from tests.e2e.fifos import is_full
from tests.e2e.life import until
from tests.e2e.test_refusals import configured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.mark.structures import ParameterSet

    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.hako, pytest.mark.timeout(300)]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DAEMON, SERIAL, KERNEL = "vhost-user-vsock", "virtio-serial", "vhost-vsock"
CHANNELS = (DAEMON, SERIAL, *([KERNEL] if Path("/dev/vhost-vsock").exists() else []))
BY_DAY = {DAEMON: 100 * MIB, SERIAL: 64 * KIB, KERNEL: 100 * MIB}


def cases() -> list[ParameterSet]:
    """Return every channel with every size; by day, the largest goes through the default channel only."""
    sizes = {"0B": 0, "1B": 1, "64KiB": 64 * KIB, "100MiB": 100 * MIB, "1GiB": GIB}
    nightly = [pytest.mark.nightly, pytest.mark.timeout(1800)]
    return [
        pytest.param(
            channel,
            size,
            id=f"{channel}-{name}",
            marks=nightly if size > BY_DAY[channel] else (),
        )
        for channel in CHANNELS
        for name, size in sizes.items()
    ]


def by_day_on(channel: str) -> pytest.MarkDecorator:
    """Run a test on one channel and the kernel's by day, and on the other by night too."""
    channels = [
        pytest.param(one, marks=() if one in {channel, KERNEL} else pytest.mark.nightly) for one in CHANNELS
    ]
    return pytest.mark.parametrize("pod", channels, indirect=True, scope="module")


READ_BYTES = MIB
AT_ONCE = 8


@pytest.fixture(scope="module")
def pod(
    request: pytest.FixtureRequest, one_stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ByHand]:
    """A container that the tests of a channel share."""
    with (
        configured(one_stack, hypervisor=f'channel = "{request.param}"'),
        ByHand(one_stack, tmp_path_factory.mktemp("bytes")) as opened,
    ):
        yield opened


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for the client's ends of the FIFOs."""
    with ThreadPoolExecutor(32) as opened:
        yield opened


def write_random(path: Path, size: int) -> str:
    """Fill a file with bytes that depend on its size only, and return their hash.

    Its name must be new: a guest may believe for a second that a file is as it was.
    """
    source, digest = random.Random(size), hashlib.sha256()  # noqa: S311 - known, not secret
    with path.open("wb") as file:
        for offset in range(0, size, MIB):
            part = source.randbytes(min(MIB, size - offset))
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def read_all(fifo: Path, *, pace_s: float = 0.0) -> tuple[int, str]:
    """Read a FIFO to its end, with a rest before each read, and return the size and the hash."""
    size, digest = 0, hashlib.sha256()
    with fifo.open("rb", buffering=0) as file:
        while part := file.read(READ_BYTES):
            size += len(part)
            digest.update(part)
            time.sleep(pace_s)
    return size, digest.hexdigest()


def feed(fifo: Path, source: Path) -> None:
    """Write a file into a FIFO."""
    with source.open("rb") as file, fifo.open("wb", buffering=0) as stream:
        while part := file.read(MIB):
            stream.write(part)


class Stalled:
    """The reading end of a FIFO without a reader, for a while."""

    def __init__(self, fifo: Path) -> None:
        self._fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def read_all(self) -> tuple[int, str]:
        """Read to the end after all."""
        os.set_blocking(self._fd, True)
        size, digest = 0, hashlib.sha256()
        while part := os.read(self._fd, READ_BYTES):
            size += len(part)
            digest.update(part)
        return size, digest.hexdigest()

    def close(self) -> None:
        """Go away."""
        os.close(self._fd)


@pytest.fixture
def stalled(pod: ByHand) -> Iterator[tuple[Path, Stalled]]:
    """A FIFO and its reader, which does not read."""
    fifo = pod.fifo()
    reader = Stalled(fifo)
    yield fifo, reader
    reader.close()


@pytest.mark.parametrize(("pod", "size"), cases(), indirect=["pod"], scope="module")
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_arrives_whole(pod: ByHand, pool: ThreadPoolExecutor, name: str, size: int) -> None:
    data = f"{name}-{size}"
    expected = write_random(pod.rootfs / data, size)
    fifo = pod.fifo()
    read = pool.submit(read_all, fifo)

    exec_id = pod.execute("sh", "-c", f"cat /{data} >&{1 if name == 'stdout' else 2}", **{name: fifo})

    assert read.result() == (size, expected)
    assert pod.finish(exec_id) == 0
    (pod.rootfs / data).unlink()


@pytest.mark.parametrize(("pod", "size"), cases(), indirect=["pod"], scope="module")
def test_an_input_arrives_whole(pod: ByHand, pool: ThreadPoolExecutor, size: int) -> None:
    source = pod.place / "data"
    expected = write_random(source, size)
    stdin, stdout = pod.fifo(), pod.fifo()
    fed = pool.submit(feed, stdin, source)
    hashed: Future[str] = pool.submit(stdout.read_text)

    exec_id = pod.execute("sha256sum", stdin=stdin, stdout=stdout)
    fed.result()
    pod.call("CloseIO", exec_id=exec_id, stdin=True)

    assert hashed.result().split() == [expected, "-"]
    assert pod.finish(exec_id) == 0


@by_day_on(DAEMON)
def test_a_slow_reader_loses_nothing_even_after_the_exit(pod: ByHand, pool: ThreadPoolExecutor) -> None:
    size = 900 * KIB  # fits into the guest's pipe, so that the process can end at once
    expected = write_random(pod.rootfs / "slow", size)
    fifo = pod.fifo()
    read = pool.submit(read_all, fifo, pace_s=1.0)  # 64 KiB a second: longer than Delete waits

    exec_id = pod.execute("cat", "/slow", stdout=fifo)
    deleted = pool.submit(pod.finish, exec_id)

    assert read.result() == (size, expected)
    assert deleted.result() == 0


@by_day_on(SERIAL)
def test_a_stalled_reader_loses_nothing_when_it_reads_on(
    pod: ByHand, pool: ThreadPoolExecutor, stalled: tuple[Path, Stalled]
) -> None:
    fifo, reader = stalled
    size = 8 * MIB
    expected = write_random(pod.rootfs / "both", size)
    others = pod.fifo()
    read = pool.submit(read_all, others)

    exec_id = pod.execute("sh", "-c", "cat /both >&2 & cat /both; exec >&-; wait", stdout=others, stderr=fifo)

    assert read.result() == (size, expected), "the other stream does not wait"
    assert pod.finish(pod.execute("true")) == 0
    assert reader.read_all() == (size, expected)
    assert pod.finish(exec_id) == 0


@by_day_on(SERIAL)
def test_a_stalled_reader_holds_up_neither_kill_nor_for_long_delete(
    pod: ByHand, stalled: tuple[Path, Stalled]
) -> None:
    fifo, _ = stalled
    exec_id = pod.execute("sh", "-c", "echo $$ >/writer; exec cat /dev/zero", stdout=fifo)
    until(lambda: is_full(fifo), what="the FIFO is full")
    # Otherwise it may be killed when all that it has written is in the FIFO.
    asleep = "until grep -q ') S' /proc/$(cat /writer)/stat; do sleep 0.1; done"
    assert pod.finish(pod.execute("sh", "-c", asleep)) == 0, "the process waits with more output"
    start = time.monotonic()
    pod.call("Kill", exec_id=exec_id, signal=9)
    assert pod.call("Wait", exec_id=exec_id).exit_status == 137
    assert time.monotonic() - start < DRAIN_TIMEOUT_S, "Wait waits for no reader"
    assert pod.finish(exec_id) == 137
    assert time.monotonic() - start > DRAIN_TIMEOUT_S - 1, "Delete gives a reader time to read on"


@by_day_on(DAEMON)
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.nightly)])
def test_short_commands_lose_no_line(pod: ByHand, pool: ThreadPoolExecutor, count: int) -> None:
    def run(number: int) -> str:
        fifo = pod.fifo()
        line = pool.submit(fifo.read_text)
        assert pod.finish(pod.execute("echo", f"line {number}", stdout=fifo)) == 0
        fifo.unlink()
        return line.result()

    with ThreadPoolExecutor(AT_ONCE) as runners:
        lines = list(runners.map(run, range(count)))

    assert lines == [f"line {number}\n" for number in range(count)]
