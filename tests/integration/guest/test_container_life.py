"""A whole container life in the real image."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest
from tests.integration.guest.agent_client import StatusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.guest.conftest import Life


def test_output_and_exit_code(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("sh", "-c", "echo out; echo err >&2; exit 42")
    assert container.read_all() == b"out\n"
    assert container.read_all("ReadStderr") == b"err\n"
    assert container.wait() == 42


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 1", 1), ("kill -9 $$; sleep 9", 137)])
def test_exit_status(new_container: Callable[[], Life], script: str, status: int) -> None:
    container = new_container()
    # A nested shell, because a PID namespace's init ignores signals from inside.
    container.run("sh", "-c", f"sh -c '{script}'; exit $?")
    assert container.wait() == status
