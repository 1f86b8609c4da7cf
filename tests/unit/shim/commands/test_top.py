"""``hako top`` computes usage from two samples, and shows people the busiest sandboxes first."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from proto.hako import management_pb2 as api
from shim import cli
from shim.commands import shims, top
from shim.errors import Unavailable
from shim.host.state_directory import StartRecord

if TYPE_CHECKING:
    from pathlib import Path

CPU_S = {"calm": 0.001, "busy": 0.1, "gone": None}
"""The processor time of each between two samples, which are a second apart."""


def record(name: str) -> StartRecord:
    fields: dict[str, Any] = {
        **dict.fromkeys(("bundle", "grpc_address", "ttrpc_address", "publish_binary", "dialect"), ""),
        **dict.fromkeys(("config_text", "config_source", "protocol"), ""),
        "namespace": "default",
        "id": name,
        "debug": False,
        "started_at": 0.0,
        "socket_path": f"/s/{name}",
        "state_directory": "/",
    }
    return StartRecord(**fields)


@pytest.fixture
def sandboxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Three sandboxes, of which one does not answer; a configuration."""
    samples = {name: itertools.count(1) for name in CPU_S}

    async def ask(asked: StartRecord, method: str, *_: object, **__: object) -> Any:
        used_s = CPU_S[asked.id]
        if used_s is None:
            raise Unavailable("its shim is gone")
        if method == "Describe":
            return api.DescribeResponse(id=asked.id)
        process = api.ProcessUsage(name="QEMU", memory_bytes=10 << 20, cpu_s=used_s * next(samples[asked.id]))
        return api.UsageResponse(processes=[process])

    monkeypatch.setattr(shims, "records", lambda *_: [record(name) for name in CPU_S])
    monkeypatch.setattr(shims, "ask", ask)
    answers = itertools.count()
    monkeypatch.setattr(top, "time", SimpleNamespace(monotonic=lambda: next(answers) // 2))
    config = tmp_path / "config.toml"
    config.touch()
    return config


def test_the_busiest_is_first(sandboxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--interval", "0.1", "--config", str(sandboxes)]) == 1
    _, *rows = capsys.readouterr().out.splitlines()

    assert [row.split()[0] for row in rows] == ["busy", "calm", "gone"]
    assert rows[0].split()[1:6] == ["-", "10", "%", "10", "MiB"]
    assert rows[2].endswith("its shim is gone")


def test_programs_get_the_order_of_the_starts(sandboxes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--json", "--interval", "0.1", "--config", str(sandboxes)]) == 1
    found = json.loads(capsys.readouterr().out)

    assert [each["id"] for each in found] == list(CPU_S)
    assert [each["cpu_percent"] for each in found] == [pytest.approx(0.1), pytest.approx(10.0), None]
    assert found[0]["guest_memory_bytes"] == 0
