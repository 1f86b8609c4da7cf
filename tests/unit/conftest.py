"""What holds an event loop fails the unit test in which it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.blocking import Detector, detected

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def nothing_blocks_a_loop() -> Iterator[None]:
    """Fail a test in which a call has held the event loop."""
    with detected(Detector()) as detector:
        yield
    if detector.found:
        pytest.fail("\n".join(["the event loop was held:", *detector.found]), pytrace=False)
