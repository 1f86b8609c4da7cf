"""The two commands of a shim that containerd waits for: ``start`` and ``delete``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.sandbox import HAKO, RUNC, Program, Sandbox

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage


def start_over_runc(stage: Stage) -> Samples:
    """Time a warm ``start`` of Hako's shim from its spawn to its end; the zygote serves it.

    Baseline: ``start`` of containerd-shim-runc-v2, also warm.
    """

    def start(program: Program) -> float:
        with Sandbox(stage, program) as sandbox:
            return sandbox.start() * 1000

    stage.configure()
    start(HAKO)
    start(RUNC)
    stage.wait_for_zygote()
    return alternate(stage.rounds, value=lambda: start(HAKO), baseline=lambda: start(RUNC))


def delete_ms(stage: Stage) -> Samples:
    """Time ``delete`` of Hako's shim from its spawn to its end, after a sandbox's processes were killed.

    Baseline: ``delete`` of containerd-shim-runc-v2, after the shim and its container were killed.
    """

    def delete(program: Program) -> float:
        with Sandbox(stage, program) as sandbox:
            sandbox.start()
            sandbox.create()
            sandbox.kill_everything()
            return sandbox.delete() * 1000

    stage.configure()
    return alternate(stage.rounds, value=lambda: delete(HAKO), baseline=lambda: delete(RUNC))
