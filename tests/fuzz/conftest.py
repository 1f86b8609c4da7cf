"""A served shim to try cases of hostile input on, and the time that each test may take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests import cases
from tests.blocking import Detector, detected
from tests.fuzz.peers import ServedShim
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _pytest.python import Function
    from pytest_asyncio.plugin import Coroutine

_TEST_TIMEOUT_S = patient(3600 if cases.IS_NIGHTLY else 600)
"""A thousand cases take half a minute on an idle machine, and several minutes on a busy one."""


def pytest_collection_modifyitems(items: list[Function | Coroutine]) -> None:
    for item in items:
        if "tests/fuzz" in item.nodeid:
            item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_S))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process with the real services over a sandbox whose machine is a well-behaved agent."""
    if os.geteuid() != 0:
        pytest.skip("a shim mounts file systems, which needs root")
    with ServedShim(tmp_path_factory.mktemp("shim")) as served:
        yield served
        served.assert_sound()


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop() -> Iterator[None]:
    """Fail a test in which a call blocked the event loop."""
    with detected(Detector()) as detector:
        yield
    if detector.found:
        pytest.fail("\n".join(["the event loop was blocked:", *detector.found]), pytrace=False)
