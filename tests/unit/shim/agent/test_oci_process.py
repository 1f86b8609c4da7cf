"""A process gets what it asks for, and runc's defaults for the rest."""

from __future__ import annotations

from typing import Any

import pytest

from shim.agent.oci_process import translate_exec, translate_process
from shim.errors import InvalidArgument
from shim.sandbox.host_streams import Stdio
from shim.sandbox.inheritance import Inheritance
from shim.sandbox.process import Process

INHERITANCE = Inheritance({"RLIMIT_NOFILE": (10, 20), "RLIMIT_NPROC": (30, 40)}, oom_score_adj=-7)
SHELL: dict[str, Any] = {"args": ["sh"], "cwd": "/"}


def init(**fields: Any) -> Any:
    return translate_process(SHELL | fields, terminal=False, inheritance=INHERITANCE)


def exec_in(container: dict[str, Any], **fields: Any) -> Any:
    process = Process("box", exec_id="shell", stdio=Stdio(), spec=SHELL | fields)
    return translate_exec(process, of={"process": container}, inheritance=INHERITANCE)


def rlimits_of(message: Any) -> dict[str, tuple[int, int]]:
    return {limit.Type: (limit.Soft, limit.Hard) for limit in message.Rlimits}


def test_unset_values_are_inherited() -> None:
    message = init()
    assert rlimits_of(message) == INHERITANCE.rlimits
    assert message.OOMScoreAdj == -7


def test_set_values_are_not_inherited() -> None:
    message = init(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}], oomScoreAdj=0)
    assert rlimits_of(message) == INHERITANCE.rlimits | {"RLIMIT_NOFILE": (1, 2)}
    assert message.OOMScoreAdj == 0


def test_an_exec_always_gets_its_containers_oom_score() -> None:
    assert exec_in({"oomScoreAdj": 321}).OOMScoreAdj == 321
    assert exec_in({"oomScoreAdj": 321}, oomScoreAdj=5).OOMScoreAdj == 321
    assert exec_in({}, oomScoreAdj=5).OOMScoreAdj == -7


def test_an_exec_without_capabilities_gets_its_containers() -> None:
    container = {"capabilities": {"bounding": ["CAP_KILL"]}}
    assert list(exec_in(container).Capabilities.Bounding) == ["CAP_KILL"]
    assert not exec_in(container, capabilities={}).Capabilities.Bounding


def test_an_exec_does_not_get_its_containers_rlimits() -> None:
    container = {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}]}
    assert rlimits_of(exec_in(container)) == INHERITANCE.rlimits


@pytest.mark.parametrize(
    ("env", "seen"),
    [
        (None, []),
        (["A=1", "B=2", "A=3", "C="], ["B=2", "A=3", "C="]),
        (["HOME="], []),
        (["HOME=/a", "HOME="], []),
        (["HOME=", "HOME=/a"], ["HOME=/a"]),
        (["A=b=c", "HOMER="], ["A=b=c", "HOMER="]),
    ],
    ids=str,
)
def test_the_last_value_of_a_variable_counts(env: list[str] | None, seen: list[str]) -> None:
    assert list(init(env=env).Env) == seen


@pytest.mark.parametrize(
    ("refused", "cause"),
    [
        ({"env": ["A"]}, "invalid environment variable 'A'"),
        ({"env": [""]}, "invalid environment variable ''"),
        ({"env": ["=a"]}, "invalid environment variable '=a'"),
        ({"env": ["A=b\0c"]}, "env: "),
        ({"cwd": ""}, "cwd ''"),
        ({"cwd": None}, "cwd ''"),
        ({"cwd": "tmp"}, "cwd 'tmp'"),
        ({"args": []}, "args is empty"),
        ({"args": [""]}, 'exec: "": executable file not found in \\$PATH'),
        ({"user": {"uid": 4294967295}}, "4294967295"),
        ({"user": {"gid": 4294967295}}, "4294967295"),
        ({"user": {"additionalGids": [4294967295]}}, "4294967295"),
    ],
    ids=str,
)
def test_requests_that_runc_refuses_are_refused_by_name(refused: dict[str, Any], cause: str) -> None:
    with pytest.raises(InvalidArgument, match=cause):
        init(**refused)
