"""The console examples of the documentation work, in their order, beside a running container."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.documentation import examples
from tests.e2e import busybox
from tests.e2e.conftest import write_config
from tests.e2e.containerd import SHIM_DIRECTORY, SYSTEM_PATH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

COMMANDS = [command for example in examples() if example.mark == "run" for command in example.commands]
NAME = "box"


@pytest.fixture
def box(one_stack: Stack) -> Iterator[None]:
    started = one_stack.containerd.run(busybox.IMAGE, NAME, "sleep", "100000", options=["--detach"])
    assert started.code == 0, started.stderr
    yield
    one_stack.containerd.remove(NAME)


@pytest.mark.timeout(600)  # a template is built, among others
def test_every_runnable_example_succeeds(one_stack: Stack, box: None, tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    templates.mkdir(mode=0o700)
    config = write_config(
        tmp_path / "config.toml", state_directory=one_stack.state_directory, templates=templates
    )
    environment = {"HAKO_CONFIG": str(config), "PATH": f"{SHIM_DIRECTORY}:{SYSTEM_PATH}"}

    for command in COMMANDS:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
