"""How Hypothesis makes the cases of a test, for all directories that use it.

``HAKO_FUZZ=nightly`` tries more cases, new ones every time; otherwise they are the same ones every time. A
test takes these settings over when it is defined, so its directory's ``conftest.py`` must import this.
"""

from __future__ import annotations

import os
from datetime import timedelta

from hypothesis import HealthCheck, settings

from tests.patience import patient

NIGHTLY = "nightly"
IS_NIGHTLY = os.environ.get("HAKO_FUZZ") == NIGHTLY

# A case that takes this long hangs, however busy the machine is.
_CASE_DEADLINE = timedelta(seconds=patient(60))

# These measure how long the making of cases takes, which depends on the machine, and how large they are.
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
    NIGHTLY,
    max_examples=2200,
    deadline=_CASE_DEADLINE,
    database=None,
    print_blob=True,
    suppress_health_check=_HEALTH,
)
settings.load_profile(NIGHTLY if IS_NIGHTLY else "normal")
