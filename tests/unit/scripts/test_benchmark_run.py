"""``scripts/bench`` measures the metrics that are asked for."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from scripts.benchmarks import __main__ as command
from scripts.benchmarks.catalog import Metric
from scripts.benchmarks.harness import Samples

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from _pytest.capture import CaptureResult

    from scripts.benchmarks import stage as benchmarks


ISSUE = [
    *("clone_over_cold", "run_template_over_cold", "run_jail_over_off", "cold_over_bare"),
    *("host_share", "start_over_runc", "delete_ms"),
    *("shim_pss_mib", "shim_uss_mib", "pod_pss_mib", "overhead_mib", "overhead_millicpus"),
    *("parked_mib", "wake_over_start", "template_mib"),
    *("exec_over_guest", "state_over_runc"),
    *("grpc_state_ms", "stdout_over_channel", "stdin_over_channel", "exec_trips"),
    *("burst_30", "crowd_100", "resident_60", "busy_host"),
    *("disk_read", "disk_write", "disk_random_read", "disk_random_write"),
    *("file_read", "file_write", "file_random_read", "file_random_write", "file_tree"),
    *("file_root_read", "file_root_write", "file_root_tree"),
    *("net_tcp_out", "net_tcp_in", "net_tcp_pods", "net_tcp_trips"),
    *("net_udp_out", "net_udp_in", "net_udp_pods", "net_udp_trips"),
    *("growth_sandboxes", "growth_containers", "growth_volumes", "growth_streams"),
]


class Stage:
    """A stage that counts how often it is cleared."""

    def __init__(self, *, obstinate: bool = False) -> None:
        self.cleared = 0
        self._obstinate = obstinate

    def kill_everything(self) -> None:
        self.cleared += 1
        if self._obstinate:
            raise TimeoutError("QEMU stays")


def good_ms(stage: benchmarks.Stage) -> Samples:
    """Measure."""
    return Samples(value=(1.0, 2.0, 3.0), baseline=(4.0,))


def bad_ms(stage: benchmarks.Stage) -> Samples:
    """Fail."""
    raise ValueError("the guest is silent")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, dict[str, Any]], CaptureResult[str]]]:
    def run(*arguments: str, stage: Stage) -> tuple[int, dict[str, dict[str, Any]], CaptureResult[str]]:
        monkeypatch.setattr(
            command, "METRICS", {m.name: m for m in (Metric(bad_ms, "ms", ""), Metric(good_ms, "ms", ""))}
        )
        monkeypatch.setattr(command, "opened", lambda **_: contextlib.nullcontext(stage))
        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--json", str(tmp_path / "results.json")])
        status = command.main()
        return status, json.loads((tmp_path / "results.json").read_text()), capsys.readouterr()

    return run


def test_every_promised_number_has_a_metric() -> None:
    assert list(command.METRICS) == ISSUE


@pytest.mark.parametrize("obstinate", [False, True], ids=["cleared", "not-even-cleared"])
def test_a_failing_metric_is_reported_and_the_others_are_measured(
    run: Callable[..., tuple[int, dict[str, dict[str, Any]], CaptureResult[str]]], obstinate: bool
) -> None:
    stage = Stage(obstinate=obstinate)
    status, results, output = run(stage=stage)

    assert status == 1
    assert output.err.splitlines()[0] == "bench: bad_ms: ValueError: the guest is silent"
    assert stage.cleared == 1
    assert results == {
        "metrics": {"good_ms": {"value": 2.0, "unit": "ms", "baseline": 4.0, "ratio": 0.5, "n": 3}}
    }


def test_only_the_chosen_numbers_are_measured(
    run: Callable[..., tuple[int, dict[str, dict[str, Any]], CaptureResult[str]]],
) -> None:
    status, results, _ = run("good_ms", "good_ms", stage=Stage())

    assert (status, list(results["metrics"])) == (0, ["good_ms"])


def test_an_unknown_name_is_refused(
    run: Callable[..., tuple[int, dict[str, dict[str, Any]], CaptureResult[str]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run("better_ms", stage=Stage())
    assert "better_ms: no such metric; there are bad_ms, good_ms" in capsys.readouterr().err
