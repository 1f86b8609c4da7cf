"""Recorded phases become a file, a model, a picture and a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from shim import cli
from shim.telemetry import timeline, timeline_files
from shim.telemetry.timeline_model import Phase, guest_phases, parse, table, trace
from shim.telemetry.timeline_svg import draw

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


LINES = [
    ["machine", "QEMU", 10.2, 10.5],
    ["containerd", "start", 10.0, 10.1],
    ["container box", "first byte", 11.0, 11.0],
    ["containerd", "Create", 10.1, 10.9],
    ["machine", "boot", 10.4, 10.8],
]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_noted", [])
    monkeypatch.setattr(timeline, "_written", 0)


def read(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (path / timeline.NAME).read_text().splitlines()]


def test_a_phase_is_recorded_on_success_and_on_failure(tmp_path: Path) -> None:
    with timeline.phase("good", lane=timeline.SHIM):
        pass
    with pytest.raises(ValueError, match="no"), timeline.phase("bad", lane=timeline.SHIM):
        raise ValueError("no")
    timeline.write(str(tmp_path))
    good, bad = read(tmp_path)
    assert [good[:2], bad[:2]] == [["shim", "good"], ["shim", "bad"]]
    assert good[2] <= good[3] <= bad[2] <= bad[3]


def test_each_phase_is_written_once(tmp_path: Path) -> None:
    timeline.mark("first", lane=timeline.SHIM)
    timeline.write(str(tmp_path))
    timeline.mark("second", lane=timeline.SHIM)
    timeline.write(str(tmp_path))
    assert [line[1] for line in read(tmp_path)] == ["first", "second"]


def test_the_timeline_keeps_a_bounded_number_of_phases(tmp_path: Path) -> None:
    for _ in range(3):
        for _ in range(300):
            timeline.mark("again", lane=timeline.SHIM)
        timeline.write(str(tmp_path))
    assert len(read(tmp_path)) == 500


def test_a_process_knows_when_it_started() -> None:
    program = "from shim.telemetry import timeline; print(timeline.born_at_s())"
    before_s = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert before_s - 1 < float(said) < time.monotonic()


def test_a_timeline_starts_with_its_first_phase_and_is_sorted_by_time() -> None:
    found = parse(TEXT, title="box")
    assert [phase.name for phase in found.phases] == ["start", "Create", "QEMU", "boot", "first byte"]
    assert found.phases[0].began_s == 0
    assert found.length_s == pytest.approx(1.0)


def test_lanes_are_sorted_and_overlapping_phases_get_more_lanes() -> None:
    lanes = parse(TEXT, title="box").lanes()
    assert [lane.name for lane in lanes] == ["containerd", "machine", "container box"]
    assert [[phase.name for phase in row] for row in lanes[1].rows] == [["QEMU"], ["boot"]]
    assert [[phase.name for phase in row] for row in lanes[0].rows] == [["start", "Create"]]


@pytest.mark.parametrize(
    "torn", ['["shim", "x", 1', "{}", "[1, 2, 3, 4]", "[]", '["shim", "x", "1", 2]', "["]
)
def test_a_torn_line_is_left_out(torn: str) -> None:
    assert parse(f"{torn}\n{TEXT}", title="box") == parse(TEXT, title="box")


def test_the_table_has_a_line_for_each_phase() -> None:
    first, start, *others = table(parse(TEXT, title="box")).splitlines()
    assert first == "box: 1000 ms"
    assert start.split() == ["0.0", "100.0", "ms", "containerd", "start"]
    assert len(others) == 4


def test_the_trace_has_a_process_for_each_lane_and_complete_events() -> None:
    document = trace(parse(TEXT, title="box"))
    names = {e["args"]["name"]: e["pid"] for e in document["traceEvents"] if e["name"] == "process_name"}
    assert list(names) == ["containerd", "machine", "container box"]
    events = {event["name"]: event for event in document["traceEvents"] if event["ph"] != "M"}
    assert events["boot"]["pid"] == names["machine"]
    assert (events["QEMU"]["tid"], events["boot"]["tid"]) == (1, 2)
    assert events["boot"]["ts"] == pytest.approx(400_000)
    assert events["boot"]["dur"] == pytest.approx(400_000)
    assert events["first byte"]["ph"] == "i"
    json.dumps(document)


def drawn(text: str, *, title: str = "box") -> ET.Element:
    return ET.fromstring(draw(parse(text, title=title)))  # noqa: S314 - the same line makes the document


def test_the_picture_has_a_bar_for_each_phase_and_escapes_names() -> None:
    line = json.dumps(["shim", "<script>&", 10.0, 10.3])
    root = drawn(f"{TEXT}{line}\n", title='"box" <1>')
    space = "{http://www.w3.org/2000/svg}"
    bars = root.findall(f"{space}g")
    titles = [bar.findtext(f"{space}title") for bar in bars]
    assert len(bars) == 6
    assert "at 0.0 ms, 300.0 ms: shim: <script>&" in titles
    widths = {
        bar.findtext(f"{space}title"): float(bar.findall(f"{space}rect")[0].attrib["width"])
        for bar in bars[:3]
    }
    assert widths["at 0.0 ms, 100.0 ms: containerd: start"] == pytest.approx(110.6)
    assert widths["at 100.0 ms, 800.0 ms: containerd: Create"] == pytest.approx(884.8)


def test_an_empty_timeline_can_be_drawn() -> None:
    assert drawn("").get("width") == "1280"
    assert trace(parse("", title="box"))["traceEvents"] == []


def guest(*lines: str, since_s: float = 100.0) -> list[Phase]:
    return guest_phases("\n".join(["5.0", *lines]), asked_s=109.9, answered_s=110.1, since_s=since_s)


def test_the_guest_is_assumed_to_answer_in_the_middle_of_the_call() -> None:
    assert guest("1.0 2.5 agent mounts and more") == [
        Phase(lane="agent", name="mounts and more", began_s=106.0, ended_s=107.5)
    ]


def test_a_clones_timeline_leaves_out_its_templates_phases() -> None:
    names = [phase.name for phase in guest("0 1 kernel boot", "4 4.5 agent Check", since_s=108.5)]
    assert names == ["Check"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("2 1 agent backwards", id="backwards"),
        pytest.param("1 99 agent later", id="in-the-future"),
        pytest.param("nan nan agent never", id="not-a-number"),
        pytest.param("1 2 containerd lie", id="in-anothers-lane"),
        pytest.param("1 2 agent", id="nameless"),
        pytest.param("x y agent z", id="no-times"),
    ],
)
def test_impossible_phases_reported_by_a_guest_are_left_out(line: str) -> None:
    assert guest(line) == []


def test_an_empty_report_adds_no_phase() -> None:
    assert guest_phases("", asked_s=1, answered_s=2, since_s=0) == []


def test_text_from_a_guest_is_made_printable_and_short() -> None:
    (phase,) = guest(f"1 2 agent \x1b[2J{'x' * 1000}")
    assert phase.name == "?[2J" + 56 * "x"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The timeline of a sandbox that has ended; no sandbox runs."""
    state = tmp_path / "state"
    state.mkdir()
    (state / timeline.NAME).write_text(TEXT)
    log_dir = tmp_path / "log"
    timeline_files.keep(state, log_dir=log_dir, namespace="ns", sandbox_id="box", drawn=True)
    (tmp_path / "config.toml").write_text(f'[shim]\nstate_dir = "{tmp_path}/none"\nlog_dir = "{log_dir}"\n')
    return tmp_path


def test_a_kept_timeline_is_drawn_on_request(kept: Path) -> None:
    log_dir = kept / "log"
    assert (log_dir / "ns__box.timeline").read_text() == TEXT
    assert (log_dir / "ns__box.svg").read_text() == draw(parse(TEXT, title="box"))
    assert json.loads((log_dir / "ns__box.json").read_text()) == trace(parse(TEXT, title="box"))


def test_the_command_shows_a_sandbox_that_has_ended(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["timeline", "box", "--config", f"{kept}/config.toml"]) == 0
    assert capsys.readouterr().out == table(parse(TEXT, title="box"))


def test_the_command_draws_a_picture(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [kept / "a.svg", kept / "a.json"]
    flags = ["--svg", str(files[0]), "--trace", str(files[1])]
    assert cli.main(["timeline", "box", "--config", f"{kept}/config.toml", *flags]) == 0
    assert [path.read_text()[:5] for path in files] == ["<svg ", '{"dis']
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["other"], ["box", "--namespace", "other"]])
def test_an_unknown_sandbox_is_one_line(
    kept: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main(["timeline", *words, "--config", f"{kept}/config.toml"]) == 1
    assert f"timeline: {words[0]}: no such sandbox" in capsys.readouterr().err
