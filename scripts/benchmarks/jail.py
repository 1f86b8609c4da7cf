"""Measures what confining a sandbox's processes adds to its start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples, alternate

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage


def run_jail_over_off(stage: Stage) -> Samples:
    """Time ``ctr run --rm`` of ``true`` with ``jail = "required"``, cloned, from ctr's spawn to its end.

    Baseline: the same with ``jail = "off"``.
    """

    def run(*, jail: str) -> float:
        stage.configure(template=True, hypervisor=f'jail = "{jail}"')
        return stage.time_run()

    run(jail="required")
    stage.wait_for_zygote()
    return alternate(stage.rounds, value=lambda: run(jail="required"), baseline=lambda: run(jail="off"))
