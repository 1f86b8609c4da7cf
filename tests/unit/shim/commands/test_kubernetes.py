"""The page on Kubernetes shows what ``hako install`` writes and prints."""

from __future__ import annotations

import os
import re
import tomllib

import pytest

from scripts.document import ROOT
from shim.commands import drop_in, kubernetes
from shim.config import Config

PAGE = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_the_objects_that_are_printed() -> None:
    printed = kubernetes.objects(Config()).replace(os.uname().nodename, "NODE")

    assert printed in blocks("yaml")


@pytest.mark.parametrize("version", ["1.7.24", "2.1.0"])
def test_the_page_has_the_configuration_that_is_written(version: str) -> None:
    written = tomllib.loads(drop_in.render(version))

    assert written in [tomllib.loads(block) for block in blocks("toml")]
