"""``hako logs`` sorts the lines of all processes by time, and reads files that grow and are cut."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from shim import cli
from shim.commands.log_lines import LogFile
from shim.commands.logs import since
from shim.host import state_directory
from shim.host.state_directory import StartRecord
from shim.refusal import Refusal
from shim.telemetry import log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOON_S = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()


def written(at_s: float, text: str, *, logger: str = "shim.machine", level: int = logging.INFO) -> str:
    """A line as a shim writes it."""
    record = logging.LogRecord(logger, level, "", 0, text, None, None)
    record.created = at_s
    return f"{log.LogfmtFormatter().format(record)}\n"


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """The last files of a sandbox, with lines of four processes; its configuration."""
    state = tmp_path / "state/0123"
    state.mkdir(parents=True)
    fields: dict[str, Any] = {
        **dict.fromkeys(("bundle", "grpc_address", "ttrpc_address", "publish_binary"), ""),
        **dict.fromkeys(("config_text", "config_source"), ""),
        "namespace": "default",
        "id": "box",
        "protocol": "ttrpc",
        "socket_path": str(tmp_path / "s"),
        "state_directory": str(state),
        "debug": False,
        "dialect": "1.7",
        "started_at": NOON_S,
    }
    state_directory.write_record(StartRecord(**fields))
    lines = [
        written(NOON_S, "boot: begins"),
        written(NOON_S + 1, "QEMU: a warning: of QEMU", logger=log.OUTPUT_LOGGER, level=logging.DEBUG),
        written(NOON_S + 3, "virtio-fs daemon: serves", logger=log.OUTPUT_LOGGER, level=logging.DEBUG),
        written(NOON_S + 4, 'says "so" \\ twice', level=logging.WARNING),
    ]
    (state / "shim.log").write_text("".join(lines), encoding="utf-8")
    (state / "console.log").write_bytes(b"early\r\nlate \x1b[31mred\r\nKernel pan")
    (state / "console.times").write_text(f"0 {NOON_S + 2:.3f}\n7 {NOON_S + 3.5:.3f}\n", encoding="ascii")
    config = tmp_path / "config.toml"
    config.write_text(
        f'[shim]\nstate_dir = "{tmp_path}/state"\nlog_dir = "{tmp_path}/log"\n', encoding="utf-8"
    )
    return config


@pytest.fixture
def logs(box: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    def run(*options: str) -> list[str]:
        assert cli.main(["logs", "box", *options, "--config", str(box)]) == 0
        told = capsys.readouterr()
        assert told.err == "logs: box: its sandbox has ended; it has written the lines below\n"
        return told.out.splitlines()

    return run


def test_lines_of_all_processes_are_sorted_by_time(logs: Callable[..., list[str]]) -> None:
    assert logs() == [
        "2026-11-30T12:00:00.000Z  shim              boot: begins",
        "2026-11-30T12:00:01.000Z  QEMU              a warning: of QEMU",
        "2026-11-30T12:00:02.000Z  guest             early",
        "2026-11-30T12:00:03.000Z  virtio-fs daemon  serves",
        "2026-11-30T12:00:03.500Z  guest             late  [31mred",
        "2026-11-30T12:00:03.500Z  guest             Kernel pan",
        '2026-11-30T12:00:04.000Z  shim              warning: says "so" \\ twice',
    ]


def test_older_lines_are_left_out(logs: Callable[..., list[str]]) -> None:
    assert len(logs("--since", "2026-11-30T12:00:03Z")) == 4
    assert logs("--since", "1s") == []


def test_programs_get_an_object_on_each_line(logs: Callable[..., list[str]]) -> None:
    found = [json.loads(line) for line in logs("--json")]
    assert found[1] == {"at_s": NOON_S + 1, "source": "QEMU", "level": "", "text": "a warning: of QEMU"}
    assert [each["level"] for each in found if each["source"] == "shim"] == ["info", "warning"]


@pytest.mark.parametrize(
    ("wanted", "expected_s"),
    [
        ("", 0.0),
        ("30s", NOON_S - 30),
        ("10m", NOON_S - 600),
        ("2h", NOON_S - 7200),
        ("1d", NOON_S - 86400),
        ("2026-11-30T11:59:00Z", NOON_S - 60),
        ("2026-11-30T13:00:00+02:00", NOON_S - 3600),
    ],
)
def test_a_point_in_time_is_an_age_or_a_date(wanted: str, expected_s: float) -> None:
    assert since(wanted, now_s=NOON_S) == expected_s


@pytest.mark.parametrize("wanted", ["soon", "-5m", "5", "5 m", "99999999999s", "2026-13-01T00:00:00Z", "1\n"])
def test_text_that_is_not_a_point_in_time_is_refused(wanted: str) -> None:
    with pytest.raises(Refusal, match="no time; give 30s, 10m, 2h, 1d or a date"):
        since(wanted, now_s=NOON_S)


def test_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "shim.log"
    file = LogFile("log", path)
    assert file.new_lines() == []
    first, second = written(NOON_S, "first"), written(NOON_S, "second")
    path.write_text(first + second[:20], encoding="utf-8")
    assert [line.text for line in file.new_lines()] == ["first"]
    path.write_text(first + second, encoding="utf-8")
    assert [line.text for line in file.new_lines()] == ["second"]
    assert file.new_lines() == []


def test_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "shim.log"
    file = LogFile("log", path)
    path.write_text(written(NOON_S, "a long line before"), encoding="utf-8")
    file.new_lines()
    path.write_text(written(NOON_S, "after"), encoding="utf-8")
    assert [line.text for line in file.new_lines()] == ["after"]
