"""What an operator's commands say of sandboxes that run: to people, and to programs."""

from __future__ import annotations

import json
import signal
import subprocess
import tarfile
import time
from typing import IO, TYPE_CHECKING, Any, cast

import pytest

from proto.hako import management_pb2 as api
from scripts.debian.commands import described
from shim import cli
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import _census, new_id
from tests.e2e.containerd import SHIM_DIRECTORY, SYSTEM_PATH
from tests.e2e.life import MOMENT_S, until
from tests.e2e.life import stopped as stopped_processes
from tests.e2e.test_management import ANSWER_S, POD, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shim.host.state_directory import StartRecord
    from tests.e2e.conftest import Stack

    Hako = Callable[..., tuple[int, str, str]]
    Shape = type | tuple[type, ...] | list["Shape"] | dict[Any, "Shape"]

pytestmark = pytest.mark.hako

TEXTS = ("detail", "remedy", "warning")
#: Each command with the shape of what it tells programs: types, lists of one shape, and tables of named or
#: of any keys. ``ID`` stands for the sandbox. Those with more to show have tests of their own below.
SHAPES: dict[str, Any] = {
    "version": {"version": str},
    "config check CONFIG": {"file": str, "valid": bool},
    "config explain": {
        str: {
            **dict.fromkeys(("help", "unit"), str),
            "default": (str, int, bool),
            "choices": [str],
            "least": (int, type(None)),
            "most": (int, type(None)),
            "is_path": bool,
        }
    },
    "inspect ID": {
        **dict.fromkeys(("id", "namespace", "version", "state", "reason", "protocol", "problem"), str),
        **dict.fromkeys(("state_directory", "config_source"), str),
        "created_at_s": float,
        "pod": dict.fromkeys(("name", "namespace", "uid"), str),
        "machine": {
            **dict.fromkeys(("vcpus", "max_vcpus", "memory_bytes", "max_memory_bytes"), int),
            **dict.fromkeys(("accelerator", "channel", "template_key"), str),
            **dict.fromkeys(("user_id", "parked_bytes"), int),
            "agent_is_hako": bool,
        },
        "processes": [{"name": str, "pid": int}],
        "interfaces": [{"name": str, "kind": str, "mac": str, "mtu": int, "addresses": [str]}],
        "containers": [
            {
                **dict.fromkeys(("id", "name", "kind", "state", "bundle"), str),
                "exit_status": int,
                "exited_at_s": float,
                "execs": [{"id": str, "state": str, "exit_status": int}],
                "volumes": [
                    {**dict.fromkeys(("destination", "type", "source"), str), "options": [str]},
                ],
                "devices": [str],
            }
        ],
        "usage": {
            "processes": [
                {
                    **dict.fromkeys(("pid", "memory_bytes", "resident_bytes"), int),
                    "name": str,
                    "cpu_s": float,
                }
            ],
            "containers": [{"id": str, "cpu_s": float, "memory_bytes": int, "processes": int}],
            "problem": str,
        },
        "logs": [{"kind": str, "path": str}],
    },
    "check": {"able": bool, "findings": [{"name": str, "ok": bool, **dict.fromkeys(TEXTS, str)}]},
    "config show": {str: {"value": (str, int, bool), "source": str}},
    "metrics ID": [
        {
            **dict.fromkeys(("name", "type", "help"), str),
            "samples": [{"name": str, "labels": {str: str}, "value": (int, float)}],
        }
    ],
    "timeline ID": [{"lane": str, "name": str, "began_s": float, "ended_s": float}],
    "template ls": [
        {
            **dict.fromkeys(("key", "failure"), str),
            **dict.fromkeys(("built_at_s", "used_at_s"), float),
            "size_bytes": int,
            "purpose": {str: (str, int, bool)},
        }
    ],
}
WITHOUT_CONFIG = {("version",), ("config", "explain"), ("config", "check")}
#: The commands whose shapes other tests check: those below, and of parking, templates, packages and images.
CHECKED_ELSEWHERE = {
    *("ps", "top", "logs", "events", "exec", "collect", "park", "unpark", "monitor"),
    *("template build", "template rm", "install", "uninstall", "image build"),
}
SECRET_VARIABLE, SECRET_ARGUMENT = "swordfish-of-a-variable", "swordfish-of-an-argument"


@pytest.fixture(scope="module")
def box(one_stack: Stack) -> Iterator[StartRecord]:
    """The sandbox of a container that the tests of this module share."""
    name = new_id()
    options = [f"--annotation=io.kubernetes.cri.sandbox-{key}={value}" for key, value in POD.items()]
    options += ["--detach", "--env", f"PLAIN={SECRET_VARIABLE}"]
    with _census(one_stack):
        command = ("sh", "-c", "sleep 100000", SECRET_ARGUMENT)
        started = one_stack.containerd.run(IMAGE, name, *command, options=options)
        try:
            assert started.code == 0, started.stderr
            yield one_stack.record(name)
        finally:
            one_stack.containerd.remove(name)


@pytest.fixture
def hako(one_stack: Stack, capsys: pytest.CaptureFixture[str]) -> Hako:
    """Run a command with the configuration of the stack.

    A shim is given up after five seconds, and a guest a little sooner, even if they are only busy. Then it is
    asked again.
    """

    def run(*words: str | Path) -> tuple[int, str, str]:
        deadline = time.monotonic() + MOMENT_S
        while True:
            status, shown, told = run_once(*words)
            if "did not answer within" not in shown + told or time.monotonic() > deadline:
                return status, shown, told

    def run_once(*words: str | Path) -> tuple[int, str, str]:
        place = 1 if words[0] == "exec" else len(words)  # what follows a sandbox there is another command
        option = [] if words[:1] in WITHOUT_CONFIG or words[:2] in WITHOUT_CONFIG else ["--config"]
        given = [*words[:place], *option, *[one_stack.config][: len(option)], *words[place:]]
        status = cli.main([str(word) for word in given])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture
def stopped(box: StartRecord) -> Iterator[int]:
    """Have the shim stopped for the duration of a test; its process."""
    found = ask(box, "Describe", api.DescribeRequest(), api.DescribeResponse)
    with stopped_processes(found.processes[0].pid):
        yield found.processes[0].pid
    ask(box, "Describe", api.DescribeRequest(), api.DescribeResponse)


def test_ps_lists_the_sandbox_with_its_pod_and_containers(box: StartRecord, hako: Hako) -> None:
    status, shown, _ = hako("ps")
    heading, row = shown.splitlines()
    assert status == 0
    assert heading.split()[:4] == ["SANDBOX", "NAMESPACE", "POD", "STATE"]
    assert row.split()[:4] == [box.id, box.namespace, f"{POD['namespace']}/{POD['name']}", "running"]
    assert row.endswith(f"{box.id} (running)")

    [found] = json.loads(hako("ps", "--json")[1])
    assert {key: type(value) for key, value in found.items()} == {
        "id": str,
        "namespace": str,
        "pod": dict,
        "state": str,
        "created_at_s": float,
        "memory_bytes": int,
        "version": str,
        "containers": list,
        "problem": str,
    }
    assert found["memory_bytes"] > 20 << 20
    assert found["containers"] == [
        {"id": box.id, "name": "", "kind": "guest", "state": "running", "exit_status": 0}
    ]


def differences(value: Any, shape: Shape, where: str = "") -> list[str]:
    """Name the places where a value has another shape."""
    if isinstance(shape, list):
        if not isinstance(value, list) or not (value or where):
            return [f"{where}: {value!r}"]
        return [one for each in value for one in differences(each, shape[0], f"{where}[]")]
    if not isinstance(shape, dict):
        return [] if isinstance(value, shape) else [f"{where}: {value!r}"]
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    if not isinstance(value, dict) or value.keys() != shape.keys():
        return [f"{where}: {value!r}"]
    return [one for key, each in value.items() for one in differences(each, shape[key], f"{where}.{key}")]


@pytest.mark.parametrize("command", SHAPES)
def test_what_a_command_tells_programs_keeps_its_shape(
    box: StartRecord, hako: Hako, one_stack: Stack, command: str
) -> None:
    words = [{"ID": box.id, "CONFIG": str(one_stack.config)}.get(word, word) for word in command.split()]
    status, shown, _ = hako(*words, "--json")
    assert status == 0
    assert differences(json.loads(shown), SHAPES[command]) == []


def test_every_command_has_a_shape() -> None:
    commands = {" ".join(each.words[1:]) for each in described(cli.parser()).all() if not each.commands}
    shapes = {" ".join(word for word in command.split() if word.islower()) for command in SHAPES}
    assert shapes | CHECKED_ELSEWHERE == commands


def test_inspect_shows_everything(box: StartRecord, hako: Hako) -> None:
    status, shown, _ = hako("inspect", box.id)
    found = json.loads(shown)
    assert status == 0
    assert (found["id"], found["state"], found["pod"]) == (box.id, "running", POD)
    assert found["machine"]["vcpus"] >= 1
    assert {each["name"] for each in found["processes"]} >= {"shim", "QEMU", "virtio-fs daemon"}
    assert [each["id"] for each in found["containers"]] == [box.id]
    assert found["usage"]["processes"]
    assert {each["kind"] for each in found["logs"]} == {"log", "console"}
    assert SECRET_VARIABLE not in shown
    assert SECRET_ARGUMENT not in shown


@pytest.mark.parametrize("command", ["inspect", "logs", "events", "timeline"])
def test_a_sandbox_that_is_not_there_is_named_in_one_line(hako: Hako, command: str, one_stack: Stack) -> None:
    status, shown, told = hako(command, "nobody")
    assert (status, shown) == (1, "")
    assert told.startswith(f"{command}: nobody: ")
    assert told.endswith("see `hako ps`\n")
    assert told.count("\n") == 1


def test_logs_are_merged_by_time(box: StartRecord, hako: Hako) -> None:
    status, shown, _ = hako("logs", box.id, "--json")
    lines = [json.loads(line) for line in shown.splitlines()]
    assert status == 0
    assert [set(line) for line in lines] == [{"at_s", "source", "level", "text"}] * len(lines)
    assert sorted(lines, key=lambda line: line["at_s"]) == lines
    assert "shim" in {line["source"] for line in lines}
    assert any(f"sandbox {box.id}: ready" in line["text"] for line in lines)
    assert all(abs(line["at_s"] - time.time()) < 3600 for line in lines)

    assert f"sandbox {box.id}: ready" in hako("logs", box.id)[1]
    assert hako("logs", box.id, "--since", "2100-01-01T00:00:00Z")[:2] == (0, "")
    assert hako("logs", box.id, "--since", "soon")[0] == 1


def test_logs_go_on_until_the_sandbox_ends(
    one_stack: Stack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And events show a sandbox that begins after them."""
    containerd, name = one_stack.containerd, new_id()
    environment = {"HAKO_CONFIG": str(one_stack.config), "PATH": f"{SHIM_DIRECTORY}:{SYSTEM_PATH}"}
    with (tmp_path / "events").open("wb") as events, (tmp_path / "logs").open("wb") as logs:
        watching = subprocess.Popen(
            [SHIM_DIRECTORY / "hako", "events", "--json"], env=environment, stdout=events, stderr=events
        )
        try:
            request.addfinalizer(lambda: containerd.remove(name))
            started = containerd.run(IMAGE, name, "sleep", "100000", options=["--detach"])
            assert started.code == 0, started.stderr
            following = subprocess.Popen(
                [SHIM_DIRECTORY / "hako", "logs", "-f", name], env=environment, stdout=logs, stderr=logs
            )
            until(lambda: "ready" in (tmp_path / "logs").read_text(), what="the lines so far")
            until(
                lambda: "/tasks/start" in topics(tmp_path / "events", name),
                what="the events of a new sandbox",
            )
            containerd.remove(name)
            assert following.wait(timeout=ANSWER_S) == 0
            until(lambda: "/tasks/exit" in topics(tmp_path / "events", name), what="the event of its end")
        finally:
            watching.send_signal(signal.SIGINT)
            assert watching.wait(timeout=ANSWER_S) == 130


def topics(path: Path, sandbox: str) -> list[str]:
    """The topics of a sandbox's events in the output of ``hako events --json``."""
    lines, _, _unfinished = path.read_text().rpartition("\n")
    events = [json.loads(line) for line in lines.splitlines()]
    return [each["topic"] for each in events if each["sandbox"] == sandbox]


def test_events_that_are_past_are_shown(box: StartRecord, hako: Hako) -> None:
    status, shown, _ = hako("events", box.id, "--past", "--json")
    events = [json.loads(line) for line in shown.splitlines()]
    assert status == 0
    assert [each["number"] for each in events] == list(range(1, len(events) + 1))
    assert {each["topic"] for each in events} >= {"/tasks/create", "/tasks/start", "/sandbox/ready"}
    assert {each["sandbox"] for each in events} == {box.id}
    assert f"/tasks/start  container={box.id}" in hako("events", "--past")[1]


def test_top_shows_what_the_sandbox_uses(box: StartRecord, hako: Hako) -> None:
    status, shown, _ = hako("top", "--json", "--interval", "0.5")
    [found] = json.loads(shown)
    assert (status, found["id"], found["problem"]) == (0, box.id, "")
    assert found["pod"] == f"{POD['namespace']}/{POD['name']}"
    assert {key: type(value) for key, value in found.items()} == {
        **dict.fromkeys(("id", "namespace", "problem", "pod"), str),
        **dict.fromkeys(("cpu_percent", "guest_cpu_percent"), float),
        **dict.fromkeys(("memory_bytes", "qemu_bytes", "daemons_bytes", "shim_bytes"), int),
        "guest_memory_bytes": int,
    }
    parts = found["qemu_bytes"] + found["daemons_bytes"] + found["shim_bytes"]
    assert parts == found["memory_bytes"]

    heading, row = hako("top", "--interval", "0.1")[1].splitlines()
    assert heading.split()[:3] == ["SANDBOX", "POD", "CPU"]
    assert row.split()[:2] == [box.id, found["pod"]]


def test_collect_writes_all_but_what_is_secret(box: StartRecord, hako: Hako, tmp_path: Path) -> None:
    output = tmp_path / "report.tar.gz"
    status, shown, _ = hako("collect", "--output", output, "--json")
    told = json.loads(shown)
    assert (status, told["output"]) == (0, str(output))
    assert output.stat().st_mode & 0o777 == 0o600
    with tarfile.open(output) as archive:
        texts = {
            member.name: cast("IO[bytes]", archive.extractfile(member)).read().decode()
            for member in archive.getmembers()
        }
    place = f"hako/sandboxes/{box.namespace}__{box.id}"
    assert {f"hako/{name}" for name in told["files"]} == set(texts)
    assert set(texts) >= {
        *("hako/versions.json", "hako/config.toml", "hako/check.json"),
        *(f"{place}/{name}" for name in ("description.json", "shim.log", "timeline")),
    }
    assert json.loads(texts[f"{place}/description.json"])["state"] == "running"
    for name, text in texts.items():
        assert SECRET_VARIABLE not in text, name
        assert SECRET_ARGUMENT not in text, name
    assert hako("collect", "--output", output)[0] == 1  # it is there already


@pytest.mark.parametrize(
    "command", [("ps",), ("top", "--interval", "0.1"), ("events", "--past"), ("exec", "ID", "id")]
)
def test_a_shim_that_is_stopped_holds_no_command_up(
    box: StartRecord, hako: Hako, stopped: int, command: tuple[str, ...]
) -> None:
    status, shown, told = hako(*(box.id if word == "ID" else word for word in command))
    assert status == 1
    assert box.id in shown + told
    assert f"its shim is stopped; `kill -CONT {stopped}` lets it go on" in shown + told


def test_logs_of_a_shim_that_is_stopped_are_what_it_has_written(
    box: StartRecord, hako: Hako, stopped: int
) -> None:
    status, shown, told = hako("logs", box.id)
    assert status == 0
    assert f"sandbox {box.id}: ready" in shown
    assert f"kill -CONT {stopped}" in told
