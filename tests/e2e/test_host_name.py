"""A container has the host name that it asks for, or the refusal says why it cannot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.bundled import specification, unpacked
from tests.e2e.conftest import new_id
from tests.e2e.containerd import ATTEMPTS_OF_RUNC

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.conftest import Stack
    from tests.e2e.containerd import Result

pytestmark = pytest.mark.each_release
LONGEST = "a" * 64


@pytest.fixture(scope="module")
def place(home: Path) -> Iterator[Path]:
    """A directory of the host with a root file system."""
    with unpacked(home) as directory:
        yield directory


def run_as(stack: Stack, place: Path, hostname: str) -> Result:
    """Have a container print its host's name."""
    name = new_id()
    config = place / f"{name}.json"
    config.write_text(json.dumps({**specification(place, ("hostname",), [], {}), "hostname": hostname}))
    for _ in range(1 if stack.is_hako else ATTEMPTS_OF_RUNC):
        try:
            done = stack.containerd.ctr(
                "run", "--runtime", stack.containerd.runtime, "--config", config, name
            )
        finally:
            stack.containerd.remove(name)
        if done.code != 0 or done.stdout:
            break
    return done


def test_the_longest_possible_name_works(either_stack: Stack, place: Path) -> None:
    assert run_as(either_stack, place, LONGEST).stdout == f"{LONGEST}\n"


def test_a_longer_name_is_refused(either_stack: Stack, place: Path) -> None:
    refused = run_as(either_stack, place, f"{LONGEST}b")
    assert refused.code != 0
    if either_stack.is_hako:
        cause = f"spec: hostname: '{LONGEST}b' has 65 bytes; choose one of 64 bytes or less"
        assert cause in refused.stderr.splitlines()[-1]
        assert "Errno" not in refused.stderr
