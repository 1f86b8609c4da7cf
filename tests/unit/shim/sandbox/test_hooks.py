"""Hooks run as the runtime specification says, and cannot block a container forever."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from shim.errors import Internal, InvalidArgument
from shim.host.ledger import Ledger
from shim.sandbox.hooks import DEFAULT_TIMEOUT_S, Hooks, parse
from tests.waiting import WITHIN_S, ends

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PID = 4711


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a shell script."""

    def make(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    path.mkdir()
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(str(tmp_path), create=True)
    yield opened
    assert opened.entries() == []
    opened.close()


@pytest.fixture
def hooks_of(bundle: Path, ledger: Ledger) -> Callable[..., Hooks]:
    def make(annotations: dict[str, str] | None = None, **hooks: Any) -> Hooks:
        spec = {"hooks": hooks, "annotations": annotations}
        return Hooks("box", bundle=bundle, spec=spec, ledger=ledger)

    return make


async def test_each_kind_of_hook_reads_the_current_state(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    keep = script("keep", 'cat >> states; echo >> states; echo "$1" >> order')
    kinds = ("poststop", "createRuntime", "poststart", "prestart")
    hooks = hooks_of({"key": "value"}, **{kind: [{"path": keep, "args": ["keep", kind]}] for kind in kinds})
    await hooks.created(pid=PID)
    await hooks.started(pid=PID)
    await hooks.deleted()
    assert (bundle / "order").read_text().split() == ["prestart", "createRuntime", "poststart", "poststop"]
    same = {
        "ociVersion": "1.2.0",
        "id": "box",
        "bundle": str(bundle),
        "annotations": {"key": "value"},
    }
    assert [json.loads(line) for line in (bundle / "states").read_text().splitlines()] == [
        {**same, "status": "creating", "pid": PID},
        {**same, "status": "creating", "pid": PID},
        {**same, "status": "running", "pid": PID},
        {**same, "status": "stopped"},
    ]


async def test_a_hook_gets_only_its_own_arguments_and_environment(
    hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    script = 'echo "$0 $*" > seen; env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= >> seen'
    hook = {"path": "/bin/sh", "args": ["another name", "-c", script, "zero", "one"], "env": ["A=b=c", "D="]}
    await hooks_of(createRuntime=[hook]).created(pid=PID)
    assert sorted((bundle / "seen").read_text().splitlines()) == ["A=b=c", "D=", "zero one"]


async def test_a_hook_without_arguments_gets_its_path_as_its_name(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    path = script("named", "tr '\\0' '\\n' < /proc/$$/cmdline > seen")
    await hooks_of(prestart=[{"path": path}]).created(pid=PID)
    assert (bundle / "seen").read_text().splitlines() == ["/bin/sh", path]


async def test_a_failing_hook_stops_later_hooks_and_its_reason_is_reported(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    bad = script("bad", "echo first; echo 'no such\tnetwork' >&2; exit 3")
    hooks = hooks_of(createRuntime=[{"path": bad}, {"path": script("next", "touch ran")}])
    with pytest.raises(Internal) as caught:
        await hooks.created(pid=PID)
    assert str(caught.value) == (
        f"hook: container box: hooks.createRuntime[0] {bad}: exit status 3: first; no such network"
    )
    assert not (bundle / "ran").exists()


@pytest.mark.parametrize(("path", "reason"), [("/no/such", "No such file"), ("/etc", "Permission denied")])
async def test_a_program_that_cannot_be_executed_fails_the_hook(
    hooks_of: Callable[..., Hooks], path: str, reason: str
) -> None:
    with pytest.raises(Internal, match=rf"hooks.prestart\[0\] {path}: .*{reason}"):
        await hooks_of(prestart=[{"path": path}]).created(pid=PID)


async def test_a_hook_that_a_signal_kills_has_failed(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks]
) -> None:
    with pytest.raises(Internal, match=r"killed by signal 15$"):
        await hooks_of(prestart=[{"path": script("dies", "kill -TERM $$")}]).created(pid=PID)


async def test_a_hook_and_its_children_are_killed_at_its_timeout(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    slow = script("slow", "sleep 1000 & echo $$ $! > pids; echo waiting; wait")
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(Internal, match=r"not finished within 2 s and killed: waiting$"):
            await hooks_of(createRuntime=[{"path": slow, "timeout": 2}]).created(pid=PID)
    pids = [int(pid) for pid in (bundle / "pids").read_text().split()]
    assert all(ends(pid) for pid in pids)


async def test_a_hook_is_killed_if_its_caller_is_cancelled(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    os.mkfifo(bundle / "started")
    slow = script("slow", "echo $$ > started; exec sleep 1000")
    creating = asyncio.create_task(hooks_of(prestart=[{"path": slow}]).created(pid=PID))
    pid = int(await asyncio.to_thread((bundle / "started").read_text))
    assert not ends(pid, within_s=0)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert ends(pid)


async def test_processes_that_a_hook_leaves_behind_are_not_waited_for(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    leaves = script("leaves", "sleep 1000 & echo $! > pid")
    async with asyncio.timeout(WITHIN_S):
        await hooks_of(prestart=[{"path": leaves}]).created(pid=PID)
    pid = int((bundle / "pid").read_text())
    assert not ends(pid, within_s=0)
    os.kill(pid, 9)


async def test_a_hook_may_write_too_much_and_ignore_its_input(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks]
) -> None:
    loud = script("loud", "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo last; exit 1")
    with pytest.raises(Internal, match=r"exit status 1: x*; last$") as caught:
        await hooks_of({"long": "x" * 1_000_000}, prestart=[{"path": loud}]).created(pid=PID)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["poststart", "poststop"])
async def test_a_failing_late_hook_is_logged_and_the_next_hook_runs(
    script: Callable[[str, str], str],
    hooks_of: Callable[..., Hooks],
    bundle: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hooks = hooks_of(**{kind: [{"path": script("bad", "exit 4")}, {"path": script("next", "touch ran")}]})
    await hooks.created(pid=PID)
    await hooks.started(pid=PID)
    await hooks.deleted()
    assert (bundle / "ran").exists()
    [line] = caplog.messages
    assert f"hooks.{kind}[0]" in line
    assert "exit status 4" in line


async def test_poststop_hooks_run_once_and_only_if_earlier_hooks_ran(
    script: Callable[[str, str], str], hooks_of: Callable[..., Hooks], bundle: Path
) -> None:
    hooks = hooks_of(poststop=[{"path": script("count", "echo x >> count")}])
    await hooks.deleted()
    assert not (bundle / "count").exists()
    await hooks.created(pid=PID)
    await hooks.deleted()
    await hooks.deleted()
    assert (bundle / "count").read_text() == "x\n"


async def test_a_hook_is_in_the_ledger_while_it_runs(
    script: Callable[[str, str], str], bundle: Path, tmp_path: Path
) -> None:
    ledger = Ledger(str(tmp_path), create=True)
    os.mkfifo(bundle / "gate")
    slow = script("slow", "read line < gate")
    hooks = Hooks("box", bundle=bundle, spec={"hooks": {"prestart": [{"path": slow}]}}, ledger=ledger)
    creating = asyncio.create_task(hooks.created(pid=PID))
    gate = await asyncio.to_thread((bundle / "gate").open, "w")  # returns once the hook has opened it
    assert [entry.name for entry in ledger.entries()] == [slow]
    gate.write("\n")
    gate.close()
    await creating
    assert ledger.entries() == []
    ledger.close()


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"createRuntime": [{}]}, "hooks.createRuntime[0].path: None: not an absolute path"),
        ({"prestart": [{"path": "bin/true"}]}, "hooks.prestart[0].path: 'bin/true': not an absolute path"),
        ({"poststop": [{"path": "/a"}, {"path": "/a\0b"}]}, "hooks.poststop[1].path: not made of strings"),
        ({"poststop": [{"path": "/a\ud800"}]}, "hooks.poststop[0].path: not made of strings"),
        ({"poststart": [{"path": "/a", "args": "a b"}]}, "hooks.poststart[0].args: not made of strings"),
        ({"poststart": [{"path": "/a", "args": [1]}]}, "hooks.poststart[0].args: not made of strings"),
        ({"poststart": [{"path": "/a", "env": ["A"]}]}, "hooks.poststart[0].env: an entry is not"),
        ({"poststart": [{"path": "/a", "env": ["=b"]}]}, "hooks.poststart[0].env: an entry is not"),
        ({"prestart": [{"path": "/a", "timeout": 0}]}, "hooks.prestart[0].timeout: 0: not a number of"),
        ({"prestart": [{"path": "/a", "timeout": -1}]}, "hooks.prestart[0].timeout: -1: not a number of"),
        ({"prestart": [{"path": "/a", "timeout": True}]}, "hooks.prestart[0].timeout: True: not a number"),
        ({"prestart": [{"path": "/a", "timeout": "1"}]}, "hooks.prestart[0].timeout: '1': not a number"),
        ({"prestart": ["/a"]}, "hooks.prestart[0]: not an object"),
        ({"prestart": 1}, "hooks: malformed"),
        (["/a"], "hooks: malformed"),
        ({"createContainer": [{"path": "/a"}]}, "hooks.createContainer: it must run inside the container"),
        ({"startContainer": [{"path": "/a"}]}, "hooks.startContainer: it must run inside the container"),
    ],
    ids=str,
)
def test_a_malformed_hook_is_refused_by_name(hooks: Any, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse({"hooks": hooks})
    assert str(caught.value).startswith(f"spec: {reason}")


@pytest.mark.parametrize("hooks", [None, {}, {"prestart": None, "createContainer": [], "poststop": []}])
def test_a_specification_may_have_no_hooks(hooks: Any) -> None:
    assert not any(parse({"hooks": hooks}).values())


@pytest.mark.parametrize(("given", "allowed"), [(None, DEFAULT_TIMEOUT_S), (7, 7), (1 << 62, 1 << 31)])
def test_every_hook_has_a_timeout(given: int | None, allowed: float) -> None:
    [hook] = parse({"hooks": {"prestart": [{"path": "/a", "timeout": given}]}})["prestart"]
    assert hook.timeout_s == allowed
