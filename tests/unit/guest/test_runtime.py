"""The agent rephrases crun's messages."""

from __future__ import annotations

import pytest

from guest.agent.runtime import in_words_of_go


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "executable file `nope` not found in $PATH: No such file or directory",
            'exec: "nope": executable file not found in $PATH: no such file or directory',
        ),
        ("open executable: Permission denied", 'exec: "/it": permission denied'),
        ("open executable: Operation not permitted", 'exec: "/it": permission denied'),
        ("chdir to `/a: b`: Not a directory", "chdir to `/a: b`: not a directory"),
        ("invalid device", "invalid device"),
        ("executable file `half", "executable file `half"),
    ],
)
def test_cruns_errors_are_worded_as_gos_are(message: str, words: str) -> None:
    assert in_words_of_go(message, program="/it") == words
