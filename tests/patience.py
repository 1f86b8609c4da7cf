"""How long tests wait: on a slow host one factor, which its owner sets, prolongs all deadlines."""

from __future__ import annotations

import os

VARIABLE = "HAKO_TEST_PATIENCE"
FACTOR = float(os.environ.get(VARIABLE, "1"))


def patient(seconds: float) -> float:
    """Return a deadline for this host.

    :param seconds: the deadline on an ordinary host, in seconds.
    """
    return seconds * FACTOR
