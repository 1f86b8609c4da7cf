"""A unit test fails if a call blocks the event loop, and never because its cases take long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import tests.cases  # noqa: F401 - sets Hypothesis up
from tests.blocking import Detector, detected

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop() -> Iterator[None]:
    """Fail a test in which a call blocked the event loop."""
    with detected(Detector()) as detector:
        yield
    if detector.found:
        pytest.fail("\n".join(["the event loop was blocked:", *detector.found]), pytrace=False)
