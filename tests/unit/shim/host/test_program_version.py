"""A program that does not tell its version is named, with the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim.host.program_version import version_line

if TYPE_CHECKING:
    from pathlib import Path


def program(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_first_line_is_returned(tmp_path: Path) -> None:
    told = program(tmp_path / "told", "#!/bin/sh\necho one 1.2\necho more\n")
    assert version_line(told) == "one 1.2"


def test_a_program_that_is_not_there_is_not_found() -> None:
    with pytest.raises(FileNotFoundError, match=r"^no-such-program: not found$"):
        version_line("no-such-program")


@pytest.mark.parametrize(
    ("text", "cause"), [("#!/bin/sh\nexit 3\n", "--version: exit status 3"), ("\0", ": Exec format error")]
)
def test_a_program_that_fails_is_named(tmp_path: Path, text: str, cause: str) -> None:
    broken = program(tmp_path / "broken", text)
    with pytest.raises(OSError, match="broken") as failure:
        version_line(broken)
    assert cause in str(failure.value)
