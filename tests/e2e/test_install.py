"""Each containerd reads the output of ``hako install``."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from shim.commands import install
from tests.e2e.containerd import RELEASES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.containerd import Release


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_each_containerd_offers_its_configured_runtime(release: Release, tmp_path: Path) -> None:
    program = release.programs / "containerd"
    configuration = tmp_path / "config.toml"
    configuration.write_text(install.drop_in(install.found_version(str(program))), encoding="utf-8")
    dumped = subprocess.run(
        [program, "--config", configuration, "config", "dump"], capture_output=True, text=True, check=True
    )
    assert "containerd.runtimes.hako]" in dumped.stdout
    assert "io.containerd.hako.v2" in dumped.stdout
