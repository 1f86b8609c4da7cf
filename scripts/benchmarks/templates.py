"""Measures what a template saves, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.harness import Samples, alternate

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage

BLOCK_BYTES = 512  # the unit of st_blocks: stat(2)
MIB = 1 << 20


def run_template_over_cold(stage: Stage) -> Samples:
    """Time ``ctr run --rm`` of ``true`` with a template, from ctr's spawn to its end, with a zygote.

    Baseline: the same with ``template = "off"``.
    """

    def run(*, template: bool) -> float:
        stage.configure(template=template)
        return stage.time_run()

    run(template=True)
    stage.wait_for_zygote()
    return alternate(stage.rounds, value=lambda: run(template=True), baseline=lambda: run(template=False))


def template_mib(stage: Stage) -> Samples:
    """Add up the space of a template's files, without holes; where ``/run`` is in memory, that is memory.

    Each round builds a new template. There is no baseline.
    """

    def build() -> float:
        stage.configure(template=True)
        template = Path(stage.hako_command("template", "build"))
        blocks = sum(path.stat().st_blocks for path in (template, *template.rglob("*")))
        stage.hako_command("template", "rm", "--all")
        return blocks * BLOCK_BYTES / MIB

    return Samples(value=tuple(build() for _ in range(stage.rounds)))
