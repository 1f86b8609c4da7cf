"""Counts the failures that no shim can count: a ``start`` without a shim, and a shim that died."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from shim import config
from shim.refusal import Refusal
from shim.telemetry import journal

PHASE = "shim"
"""The phase in the journal."""


def count(cause: str) -> None:
    """Count one in the node's journal, if that is possible.

    :param cause: the kind of failure.
    """
    # Standard error is for the answer to containerd.
    logging.getLogger(journal.__name__).addHandler(logging.NullHandler())
    journal.Journal(Path(log_dir())).note("failure", {"phase": PHASE, "cause": cause})


def log_dir() -> str:
    """Find where the node's journal is, even if the configuration is why a start fails."""
    try:
        return config.parse(config.locate(os.environ)).shim.log_dir
    except (Refusal, OSError):
        return config.ShimConfig().log_dir
