"""``ctr`` prints the same about a task under Hako as under runc."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Containerd, Result

RUNC = "io.containerd.runc.v2"


def transcript(containerd: Containerd) -> list[tuple[str, int, str, str]]:
    """Put one task through its life, and return what each command answered.

    :returns: command, exit code, output and kind of error of each step; names, ids and times are masked.
    """
    name = new_id()
    steps: list[tuple[str, int, str, str]] = []

    def mask(text: str) -> str:
        text = re.sub(r'time="[^"]*"', "TIME", text.replace(name, "NAME"))
        return re.sub(r"[ \t]+", " ", re.sub(r"\b\d{2,}\b(?= +(RUNNING|STOPPED|CREATED|-))", "PID", text))

    def note(command: str, result: Result) -> None:
        # The text of an error is the runtime's own; the name at its end is containerd's.
        kind = mask(result.stderr).strip().rpartition(": ")[2]
        steps.append((mask(command), result.code, mask(result.stdout), kind))

    def ctr(*arguments: str) -> None:
        note(" ".join(arguments), containerd.ctr(*arguments))

    note("run", containerd.run(IMAGE, name, "sleep", "1000", options=["--detach"]))
    ctr("task", "ls")
    ctr("task", "delete", name)
    ctr("task", "kill", "--signal", "0", name)
    ctr("task", "kill", "--exec-id", "unknown", name)
    ctr("task", "exec", "--exec-id", "one", name, "sh", "-c", "exit 3")
    ctr("task", "ps", "unknown")
    ctr("task", "kill", "--signal", "SIGKILL", name)
    containerd.wait_for_state(name, "STOPPED")
    ctr("task", "ls")
    ctr("task", "kill", name)
    late = containerd.ctr("task", "exec", "--exec-id", "late", name, "true")
    # runc answers "unknown" here, which says less than Hako's "failed precondition".
    steps.append(("task exec late", late.code, late.stdout, ""))
    ctr("task", "delete", name)
    ctr("task", "ls")
    ctr("task", "delete", name)
    ctr("task", "kill", name)
    ctr("container", "delete", name)
    return steps


def test_a_task_goes_through_the_same_life_as_under_runc(stack: Stack) -> None:
    expected = transcript(dataclasses.replace(stack.containerd, runtime=RUNC))

    assert transcript(stack.containerd) == expected
