"""Commands that run in a container until they end, as probes do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

if TYPE_CHECKING:
    from tests.cri.conftest import Duo

MIB = 1 << 20


def test_a_command_reports_how_it_ended(duo: Duo) -> None:
    ends = {"exit 0": 0, "exit 1": 1, "exit 255": 255, "kill -9 $$": 128 + 9}
    assert {script: duo.worker.shell(script).code for script in ends} == ends


def test_both_outputs_of_a_command_arrive_whole_and_apart(duo: Duo) -> None:
    done = duo.worker.shell("echo to stdout; echo to stderr >&2; printf 'no newline'")
    assert (done.code, done.stdout, done.stderr) == (0, "to stdout\nno newline", "to stderr\n")


@pytest.mark.mainly
def test_a_large_output_arrives_whole(duo: Duo) -> None:
    done = duo.worker.shell("yes 0123456789abcde | head -c 4194304")
    assert done.stdout == "0123456789abcde\n" * (4 * MIB // 16)


def test_a_command_that_takes_too_long_is_killed_in_time(duo: Duo) -> None:
    with pytest.raises(grpc.RpcError, match=r"timeout \w+ exceeded") as refused:  # not the client's own limit
        duo.worker.shell("echo $$ >/tmp/slow; exec sleep 12345", timeout_s=2)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "sleep 12345" not in duo.worker.exec("ps").stdout


@pytest.mark.mainly
def test_a_command_that_does_not_exist_is_refused_by_name(duo: Duo) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        duo.worker.exec("/no/such/program")
    assert "/no/such/program" in str(refused.value.details())


@pytest.mark.mainly
def test_many_commands_at_once_keep_their_outputs_apart(duo: Duo) -> None:
    calls = [
        duo.pod.stack.cri.begin(
            "ExecSync", container_id=container.id, cmd=["sh", "-c", f"echo {number}; exit {number}"]
        )
        for number, container in enumerate([duo.worker, duo.server, duo.caller] * 4)
    ]
    replies = [call.result() for call in calls]
    assert [(reply.exit_code, reply.stdout) for reply in replies] == [
        (number, f"{number}\n".encode()) for number in range(len(calls))
    ]
