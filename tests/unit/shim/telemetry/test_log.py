"""The daemon's log has whole lines and never blocks."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import pytest

from shim.host import daemonize
from shim.telemetry import latency, log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Restore the logging configuration afterwards."""
    logger = logging.getLogger()
    level, handlers = logger.level, list(logger.handlers)
    # basicConfig(force=True) closes what it replaces; pytest's handlers must survive.
    logger.handlers[:] = []
    yield logger
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "log")
    return tmp_path


@pytest.fixture
def fifo(bundle: Path) -> Iterator[int]:
    descriptor = daemonize.open_log(str(bundle))
    yield descriptor
    os.close(descriptor)


def drain(descriptor: int) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            data += os.read(descriptor, 65536)
    return data


def test_a_record_is_one_logfmt_line(root: logging.Logger, fifo: int) -> None:
    log.configure("info", descriptor=fifo)
    logging.getLogger("shim.x").error('two\n"lines" \\ %d', 1)
    line = os.read(fifo, 4096).decode()
    assert line.startswith('time="')
    assert line.endswith('level=error msg="two\\n\\"lines\\" \\\\ 1" logger=shim.x\n')
    assert line.count("\n") == 1


def test_a_guests_output_cannot_move_the_cursor(root: logging.Logger, fifo: int) -> None:
    log.configure("info", descriptor=fifo)
    logging.getLogger().error("guest: %s", "\x1b[2J\r\x85gone")
    assert b'msg="guest: \\x1b[2J\\r\\x85gone"' in os.read(fifo, 4096)


def test_an_exception_is_one_line(root: logging.Logger, fifo: int) -> None:
    log.configure("info", descriptor=fifo)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger().exception("what")
    line = os.read(fifo, 4096).decode()
    assert line.count("\n") == 1
    assert 'msg="what: Traceback' in line
    assert "ValueError: why" in line


def test_records_below_the_level_are_left_out(root: logging.Logger, fifo: int) -> None:
    log.configure("warning", descriptor=fifo)
    logging.getLogger().info("no")
    logging.getLogger().warning("yes")
    assert os.read(fifo, 4096).count(b"\n") == 1


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("warning", 1)])
def test_debug_records_of_libraries_are_left_out(
    root: logging.Logger, fifo: int, level: str, lines: int
) -> None:
    log.configure(level, descriptor=fifo)
    for name in ("shim.x", "pyroute2.netlink"):
        logging.getLogger(name).debug("a step")
    logging.getLogger("pyroute2.netlink").info("a fact")
    logging.getLogger("pyroute2.netlink").warning("a worry")
    assert os.read(fifo, 4096).count(b"\n") == lines


def test_a_long_line_is_cut_to_an_atomic_write(root: logging.Logger, fifo: int) -> None:
    log.configure("info", descriptor=fifo)
    logging.getLogger().error("x" * 10_000)
    logging.getLogger().error("next")
    first, second = os.read(fifo, 65536).splitlines(keepends=True)
    assert len(first) == 4096
    assert b"next" in second


def test_records_that_a_full_pipe_cannot_take_are_dropped_and_counted(
    root: logging.Logger, fifo: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "dropped", {})
    log.configure("info", descriptor=fifo)
    room = log.PIPE_BYTES // 4096
    for _ in range(room + 40):
        logging.getLogger().error("x" * 4096)
    assert drain(fifo).count(b"\n") == room
    assert latency.dropped == {"log lines": 40}

    logging.getLogger().error("after")
    line = drain(fifo)
    assert b"after" in line
    assert int(line.rpartition(b"dropped=")[2]) == 40


def test_a_reader_may_go_away(root: logging.Logger, bundle: Path, fifo: int) -> None:
    log.configure("info", descriptor=fifo)
    reader = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    os.close(reader)
    logging.getLogger().error("kept for the next reader")
    reader = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    assert b"kept for the next reader" in os.read(reader, 4096)
    os.close(reader)


def test_logging_works_without_a_log_in_the_bundle(tmp_path: Path) -> None:
    descriptor = daemonize.open_log(str(tmp_path))
    assert os.write(descriptor, b"nowhere") == 7
    os.close(descriptor)


def test_the_last_lines_are_kept_beside_the_state(root: logging.Logger, fifo: int, tmp_path: Path) -> None:
    log.configure("info", descriptor=fifo, kept_in=tmp_path)
    logging.getLogger("shim.x").info("a fact")
    logging.getLogger("shim.x").debug("a step")
    logging.getLogger(log.OUTPUT_LOGGER).debug("QEMU: a warning")

    kept = (tmp_path / log.KEPT_NAME).read_text()
    assert [line.partition(" msg=")[2] for line in kept.splitlines()] == [
        '"a fact" logger=shim.x',
        '"QEMU: a warning" logger=hypervisor.output',
    ]
    assert os.read(fifo, 4096).count(b"\n") == 1


def test_the_kept_log_stays_small(root: logging.Logger, fifo: int, tmp_path: Path) -> None:
    log.configure("info", descriptor=fifo, kept_in=tmp_path)
    for number in range(3000):
        logging.getLogger().info("%d %s", number, "x" * 200)

    lines = (tmp_path / log.KEPT_NAME).read_text().splitlines()
    assert sum(map(len, lines)) < 256 * 1024
    assert ' msg="2999 ' in lines[-1]
    assert all(line.startswith("time=") for line in lines)
