"""How many cases are tried, and a served shim to try them on.

``HAKO_FUZZ=nightly`` tries more than 100,000 cases, new ones every time; otherwise about 5,000, the same
ones every time.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.blocking import Detector, detected
from tests.fuzz.peers import ServedShim

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from _pytest.python import Function
    from pytest_asyncio.plugin import Coroutine

_NIGHTLY = "nightly"
_TEST_TIMEOUT_NIGHTLY_S = 3600

# A case that takes this long hangs, however busy the machine is.
_CASE_DEADLINE = timedelta(seconds=20)

_HEALTH = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)

settings.register_profile(
    "normal",
    max_examples=100,
    deadline=_CASE_DEADLINE,
    derandomize=True,
    database=None,
    suppress_health_check=_HEALTH,
)
settings.register_profile(
    _NIGHTLY,
    max_examples=2200,
    deadline=_CASE_DEADLINE,
    database=None,
    print_blob=True,
    suppress_health_check=_HEALTH,
)
settings.load_profile(os.environ.get("HAKO_FUZZ", "normal"))


def pytest_collection_modifyitems(items: list[Function | Coroutine]) -> None:
    if os.environ.get("HAKO_FUZZ") == _NIGHTLY:
        for item in items:
            if "tests/fuzz" in item.nodeid:
                item.add_marker(pytest.mark.timeout(_TEST_TIMEOUT_NIGHTLY_S))


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
