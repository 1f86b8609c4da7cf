"""The error of all code that runs before the daemon exists: one line for the operator."""

from __future__ import annotations


class Refusal(Exception):  # noqa: N818 - it tells the operator of a problem, not of a defect
    """The action was not done; the message is one line: phase, object, cause, remedy."""
