"""A system error is reported in words."""

from __future__ import annotations

import pytest

from guest.agent.errors import cause


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(22, "Invalid argument"), "Invalid argument"),
        (OSError(2, "No such file or directory", "/a"), "/a: No such file or directory"),
        (OSError("plain"), "plain"),
    ],
)
def test_a_system_error_is_reported_without_its_number(error: OSError, words: str) -> None:
    assert cause(error) == words
