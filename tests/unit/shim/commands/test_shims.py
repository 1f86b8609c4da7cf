"""A host's sandboxes are those whose records can be read; a user who may not read them is told so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from proto.hako import management_pb2 as api
from shim import cli
from shim.commands import shims
from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.host import state_directory
from shim.host.ledger import SHIM_PROCESS, Ledger
from shim.host.state_directory import StartRecord
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"id": "box"}'])
def test_a_directory_without_a_whole_record_is_not_a_sandbox(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "0123").mkdir()
    if text is not None:
        (tmp_path / "0123" / "sandbox.json").write_text(text, encoding="utf-8")
    assert shims.records(str(tmp_path)) == []


@pytest.mark.parametrize("command", ["ps", "top", "metrics", "events --past", "inspect box", "logs box"])
def test_a_user_who_may_not_look_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(state_directory, "read_record", refuse)
    (tmp_path / "state" / "0123").mkdir(parents=True)
    config = tmp_path / "config.toml"
    config.write_text(
        f'[shim]\nstate_dir = "{tmp_path}/state"\nlog_dir = "{tmp_path}/log"\n', encoding="utf-8"
    )

    assert cli.main([*command.split(), "--config", str(config)]) == 1
    told = capsys.readouterr().err
    assert told == f"sandboxes: {tmp_path}/state/0123: Permission denied; run this as root\n"


@pytest.fixture(params=["ttrpc", "grpc"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> StartRecord:
    """A sandbox whose shim has a process, but no socket yet."""
    return StartRecord(
        namespace="default",
        id="box",
        bundle="/b",
        grpc_address="/g",
        ttrpc_address="/t",
        publish_binary="containerd",
        config_text="",
        config_source="",
        protocol=request.param,
        socket_path=str(tmp_path / "s"),
        state_directory=str(tmp_path),
        debug=False,
        dialect="1.7",
        started_at=0.0,
    )


def changed(record: StartRecord, **fields: Any) -> StartRecord:
    """Copy a record, with some other fields."""
    values: dict[str, Any] = {**record.as_dict(), **fields}
    return StartRecord(**values)


@pytest.fixture
def listener(record: StartRecord) -> Iterator[socket.socket]:
    """The socket of a shim that accepts no connection."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(record.socket_path)
        bound.listen(0)
        yield bound


def record_process(record: StartRecord, pid: int) -> None:
    """Make the sandbox's ledger, with the process of its shim unless that is 0."""
    ledger = Ledger(record.state_directory, create=True)
    if pid:
        ledger.process(pid, name=SHIM_PROCESS)
    ledger.close()


def refusal(record: StartRecord, *, timeout_s: float) -> ShimError:
    async def ask() -> api.DescribeResponse:
        return await shims.ask(
            record, "Describe", api.DescribeRequest(), api.DescribeResponse, timeout_s=timeout_s
        )

    with pytest.raises(ShimError) as raised:
        asyncio.run(ask())
    return raised.value


@pytest.mark.usefixtures("listener")
@pytest.mark.parametrize("callers", [0, 2])
def test_a_shim_that_is_slow_did_not_answer_in_time(record: StartRecord, callers: int) -> None:
    """Even if it has so many callers already that the kernel lets no more connect."""
    with contextlib.ExitStack() as stack:
        for _ in range(callers):
            caller = stack.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.connect(record.socket_path)
        error = refusal(record, timeout_s=0.2)

    assert type(error) is DeadlineExceeded
    assert str(error) == "its shim did not answer within 0.2 s; it is busy, or waits for the host"


@pytest.mark.parametrize("is_bound", [True, False])
def test_a_shim_that_died_is_gone(record: StartRecord, is_bound: bool) -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as shim:
        record_process(record, shim.pid)
        shim.kill()
    with socket.socket(socket.AF_UNIX) as dead:
        if is_bound:
            dead.bind(record.socket_path)
        error = refusal(record, timeout_s=WITHIN_S)

    assert type(error) is Unavailable
    assert str(error).startswith("its shim is gone: ")


@pytest.mark.parametrize("has_process", [True, False])
def test_a_shim_that_does_not_listen_yet_is_starting(record: StartRecord, has_process: bool) -> None:
    record_process(record, os.getpid() if has_process else 0)

    assert str(refusal(record, timeout_s=WITHIN_S)) == "its shim is starting; ask again"


def test_a_sandbox_that_has_ended_meanwhile_is_not_listed(record: StartRecord, tmp_path: Path) -> None:
    async def question(asked: StartRecord) -> str:
        raise Unavailable(asked.id)

    gone = changed(record, state_directory=str(tmp_path / "gone"))
    assert str(refusal(gone, timeout_s=WITHIN_S)) == "its sandbox has ended"
    answers = asyncio.run(shims.ask_all([gone, record], question))
    assert [each.record for each in shims.still_there(answers)] == [record]


@pytest.mark.usefixtures("listener")
def test_nobody_waits_for_a_shim_that_is_stopped(record: StartRecord) -> None:
    with subprocess.Popen(["/bin/sleep", "600"]) as shim:
        record_process(record, shim.pid)
        try:
            os.kill(shim.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, shim.pid, os.WSTOPPED)
            error = refusal(record, timeout_s=WITHIN_S)
        finally:
            shim.kill()

    assert str(error) == f"its shim is stopped; `kill -CONT {shim.pid}` lets it go on"


def test_one_shim_without_an_answer_hides_no_other(record: StartRecord) -> None:
    async def question(asked: StartRecord) -> str:
        if asked.id == "box":
            raise Unavailable("its shim is gone")
        return asked.id

    others = [changed(record, id=name) for name in ("first", "last")]
    answers = asyncio.run(shims.ask_all([others[0], record, others[1]], question))

    assert [(each.value, each.problem) for each in answers] == [
        ("first", ""),
        (None, "its shim is gone"),
        ("last", ""),
    ]


def write_down(state_dir: Path, record: StartRecord, *, names: list[str]) -> Path:
    """Leave the records of sandboxes; return a configuration that names their directory."""
    for name in names:
        (state_dir / name).mkdir()
        state_directory.write_record(changed(record, id=name, state_directory=str(state_dir / name)))
    config = state_dir / "config.toml"
    config.write_text(f'[shim]\nstate_dir = "{state_dir}"\nlog_dir = "{state_dir}/log"\n', encoding="utf-8")
    return config


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("web-1", '"id": "web-1"'),
        ("db", '"id": "db-0"'),
        ("w", "w: more than one sandbox: web-0 in default, web-1 in default, web-10 in default"),
        ("nobody", "nobody: no such sandbox; see `hako ps`"),
    ],
)
def test_a_sandbox_is_named_by_its_id_or_the_beginning_of_it(
    record: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str, told: str
) -> None:
    names = [f"web-{number}" for number in range(7)]
    config = write_down(tmp_path, record, names=[*names, "web-10", "db-0"])
    assert cli.main(["inspect", wanted, "--config", str(config)]) == 1
    shown = capsys.readouterr()
    assert told in shown.out + shown.err
    assert ("web-3 in default and 3 more; give the whole id" in shown.err) == (wanted == "w")


@pytest.mark.parametrize("command", ["ps", "ps --json", "top --interval 0.1", "metrics", "metrics --json"])
def test_a_shim_without_an_answer_is_a_failure(
    record: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    config = write_down(tmp_path, record, names=["box"])
    (tmp_path / "box" / "ledger").touch()
    assert cli.main([*command.split(), "--config", str(config)]) == 1
    assert "its shim is starting; ask again" in capsys.readouterr().out


def test_the_sandboxes_of_one_namespace_are_listed(
    record: StartRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_down(tmp_path, record, names=["box"])
    for namespace, count in (("default", 1), ("k8s.io", 0)):
        cli.main(["ps", "--json", "--namespace", namespace, "--config", str(config)])
        assert len(json.loads(capsys.readouterr().out)) == count
