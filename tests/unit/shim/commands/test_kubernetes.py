"""The page on Kubernetes shows what ``hako install`` writes and prints."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib

import pytest

from scripts.document import ROOT
from shim.commands import drop_in, kubernetes
from shim.config import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "scripts/benchmarks/results/results.json"
PAGE = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_the_objects_that_are_printed() -> None:
    pod = kubernetes.Overhead(Config().hypervisor.memory_mib, emulates=False)
    printed = kubernetes.objects(pod).replace(os.uname().nodename, "NODE")

    assert printed in blocks("yaml")
    assert f"podFixed: {{memory: {pod.memory_mib}Mi, cpu: {kubernetes.HOST_MILLICPUS}m}}" in README


@pytest.mark.parametrize(
    ("printed", "name", "step"),
    [
        (kubernetes.HOST_MIB, "overhead_mib", 32),
        (kubernetes.HOST_MILLICPUS, "overhead_millicpus", 50),
    ],
)
def test_the_overhead_is_what_was_measured_rounded_up(printed: int, name: str, step: int) -> None:
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["metrics"][name]["value"]

    assert printed == math.ceil(measured / step) * step


@pytest.mark.parametrize("version", ["1.7.24", "2.1.0"])
def test_the_page_has_the_configuration_that_is_written(version: str) -> None:
    written = tomllib.loads(drop_in.render(version))

    assert written in [tomllib.loads(block) for block in blocks("toml")]
