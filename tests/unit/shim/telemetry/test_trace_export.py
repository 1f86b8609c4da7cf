"""Each phase is sent once, with the start that it belongs to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from shim.errors import InvalidArgument
from shim.telemetry.trace_export import LOG, Failure, TraceExport, is_available
from tests.waiting import reached

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TraceExport:
    """An export whose process writes down what it is given."""
    monkeypatch.setattr("sys.executable", _keeper(tmp_path))
    return TraceExport("http://127.0.0.1:1/v1/traces", state=tmp_path, log_dir=tmp_path / "log")


def _keeper(place: Path) -> str:
    program = place / "python"
    program.write_text(f"#!/bin/sh\ncat >> {place}/out; echo >> {place}/out\n", encoding="utf-8")
    program.chmod(0o700)
    return str(program)


def note(place: Path, *phases: tuple[str, str]) -> None:
    with (place / "timeline").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps([lane, name, 1.0, 2.0]) + "\n" for lane, name in phases)


async def sent(place: Path, count: int) -> list[dict[str, Any]]:
    """What the processes were given; they go on by themselves when they have been started."""
    output = place / "out"
    await reached(lambda: output.exists() and output.read_text().count("\n") == count)
    return [json.loads(line) for line in output.read_text().splitlines()]


def names(batch: dict[str, Any]) -> list[str]:
    return [name for _, name, _, _ in batch["phases"]]


async def test_a_container_that_still_starts_has_its_turn_later(export: TraceExport, tmp_path: Path) -> None:
    note(tmp_path, ("shim", "sockets"), ("container one", "mounts"), ("container two", "mounts of two"))
    await export.send("one", {"hako.sandbox.id": "one"})
    await sent(tmp_path, 1)
    note(tmp_path, ("container two", "Create"), ("agent", "late"))
    await export.send("two", {"hako.sandbox.id": "one"})

    first, second = await sent(tmp_path, 2)
    assert names(first) == ["sockets", "mounts"]
    assert names(second) == ["mounts of two", "Create", "late"]
    assert (first["sandbox_carried"], second["sandbox_carried"]) == ({}, None)
    assert (tmp_path / "log" / LOG).stat().st_mode & 0o777 == 0o600


async def test_a_timeline_that_is_gone_is_logged(
    export: TraceExport, caplog: pytest.LogCaptureFixture
) -> None:
    await export.send("one", {})
    assert "tracing: the start of container one is not sent" in caplog.text


async def test_a_failure_is_sent_with_what_was_reached(export: TraceExport, tmp_path: Path) -> None:
    note(tmp_path, ("shim", "sockets"), ("container one", "mounts"))
    failure = Failure(InvalidArgument("create: no\nsuch path"), began_s=1.0, ended_s=2.0)
    await export.send("one", {}, failure=failure)

    [batch] = await sent(tmp_path, 1)
    assert names(batch) == ["sockets", "mounts"]
    told = {"type": "InvalidArgument", "text": "create: no such path", "began_s": 1.0, "ended_s": 2.0}
    assert (batch["failure"], batch["sandbox_failure"]) == (told, None)


async def test_a_sandbox_without_a_container_belongs_to_the_trace_of_its_request(
    export: TraceExport, tmp_path: Path
) -> None:
    carried = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    export.contexts.heed("CreateSandbox", b"", carried.items())
    note(tmp_path, ("shim", "sockets"))
    failure = Failure(InvalidArgument("boot: no"), began_s=1.0, ended_s=2.0)
    await export.send("", {}, sandbox_failure=failure)

    [batch] = await sent(tmp_path, 1)
    assert (batch["sandbox_carried"], batch["carried"]) == (carried, {})


async def test_without_its_library_a_start_warns_once(
    export: TraceExport, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shim.telemetry.trace_export.MODULES", ("opentelemetry.sdk", "opentelemetry.gone"))
    note(tmp_path, ("shim", "sockets"))
    await export.send("one", {})

    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("tracing: the start of container one is not sent: OpenTelemetry is not installed;")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("modules", "available"),
    [(("json",), True), (("json", "json.gone"), False), (("gone.sdk",), False)],
)
def test_the_library_is_there_if_all_of_it_is(
    monkeypatch: pytest.MonkeyPatch, *, modules: tuple[str, ...], available: bool
) -> None:
    monkeypatch.setattr("shim.telemetry.trace_export.MODULES", modules)
    assert is_available() is available
