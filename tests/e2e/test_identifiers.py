"""Every id that containerd allows is good for a container and for an exec, even if others have it, too."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.containerd import ATTEMPTS_OF_RUNC, CALL_TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.e2e.conftest import Stack

GROUP = "io.containerd.runc.v2.group"
IDS = (
    *("a", "A", "7", "0.0_0-0", "x" * 76),
    # Names that the guest itself uses.
    *("watchable", "sandbox", "shared", "rootfs"),
)


def run_all(argvs: list[list[str]]) -> dict[str, tuple[int, str]]:
    """Run commands at once; return the exit code and the output of each by its last argument."""
    started = [
        subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for argv in argvs
    ]
    outputs = [process.communicate(timeout=CALL_TIMEOUT_S)[0] for process in started]
    return {
        argv[-1]: (process.returncode, output)
        for argv, process, output in zip(argvs, started, outputs, strict=True)
    }


def test_containers_of_one_sandbox_may_have_any_ids(
    either_stack: Stack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    containerd = either_stack.containerd
    # The shim of runc leaves its socket behind if containers share it.
    group = ["--annotation", f"{GROUP}={new_id()}"] if either_stack.is_hako else []
    script = 'echo "$0" >/own && read line </volume/of && test "$line" = "$0" && exec sleep 100000'

    def remove_all() -> None:
        present = containerd.containers()
        for name in IDS:
            if name in present:
                containerd.remove(name)

    request.addfinalizer(remove_all)
    argvs = []
    for name in IDS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(f"{name}\n")
        mount = f"type=bind,src={tmp_path / name},dst=/volume,options=rbind:ro"
        options = ["--detach", *group, "--mount", mount]
        argvs.append(containerd.run_argv(IMAGE, name, "sh", "-c", script, name, options=options))
    first, *others = argvs
    begun = run_all([first]) | run_all(others)
    assert begun == dict.fromkeys(IDS, (0, ""))

    # An exec may be named as its container is, and as another one is.
    for exec_id in ("", "a"):
        argvs = [
            containerd.ctr_argv(
                *("task", "exec", "--exec-id", exec_id or name, name),
                *("sh", "-c", "cat /own", name),
            )
            for name in IDS
        ]
        expected = {name: (0, f"{name}\n") for name in IDS}
        seen = run_all(argvs)
        for _ in range(0 if either_stack.is_hako else ATTEMPTS_OF_RUNC):
            seen = seen if seen == expected else run_all(argvs)
        assert seen == expected
    assert {name: containerd.tasks()[name][1] for name in IDS} == dict.fromkeys(IDS, "RUNNING")
