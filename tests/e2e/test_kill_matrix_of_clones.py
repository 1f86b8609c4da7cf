"""If a process of a cloned sandbox dies, the sandbox ends as a booted one does."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import new_id
from tests.e2e.life import until
from tests.e2e.test_kill_matrix import BEFORE_THE_TASK_EXISTS, BOOTED_BY_DAY, PHASES, by_day, see_a_death
from tests.e2e.test_refusals import configured
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako

BUILDER = "shim.cli template build"
BUILD_S = patient(200.0)  # it gives way to all others


@pytest.fixture
def cloning(one_stack: Stack, home: Path, templates: Path, phase: str) -> Iterator[None]:
    """Let machines be cloned from a template; another is built if that turns out to be broken."""
    if phase not in BEFORE_THE_TASK_EXISTS:  # a clone that has come up proves its template
        yield
        return
    store = home / new_id()
    subprocess.run(["/bin/cp", "--archive", "--sparse=always", templates, store], check=True)
    with configured(one_stack, hypervisor=f'template = "auto"\ntemplate_dir = "{store}"'):
        yield
    running = one_stack.containerd.nursery.descendants
    until(
        lambda: all(BUILDER not in each.command for each in running()),
        what="no process builds a template",
        timeout_s=BUILD_S,
    )
    shutil.rmtree(store)


@pytest.mark.parametrize(("victim", "phase"), by_day(*(set(PHASES) - set(BOOTED_BY_DAY))))
def test_the_death_of_a_clone_ends_the_task_once_and_leaves_nothing(
    one_stack: Stack, home: Path, cloning: None, victim: str, phase: str
) -> None:
    # A clone that does not start is replaced by a machine that boots.
    replaced = {"CREATED"} if phase in BEFORE_THE_TASK_EXISTS else set()
    see_a_death(one_stack, home, victim, phase, lasting={"STOPPED", "GONE"} | replaced)
