"""Tables are aligned everywhere, and coloured and cut only on a terminal."""

from __future__ import annotations

import contextlib
import io
import os

import pytest

from shim.commands.columns import print_table

ROWS = [("NAME", "STATE"), ("a-long-name", "running"), ("b", "ended"), ("c", "ended")]
PLAIN = "NAME         STATE\na-long-name  running\nb            ended\nc            ended\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_terminal_has_a_highlighted_heading(terminal: Terminal) -> None:
    with contextlib.redirect_stdout(terminal):
        print_table(ROWS)
    assert terminal.getvalue() == f"\x1b[1mNAME         STATE\x1b[0m\n{PLAIN.partition(chr(10))[2]}"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_user_or_a_terminal_without_colours_gets_plain_text(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with contextlib.redirect_stdout(terminal):
        print_table(ROWS)
    assert terminal.getvalue() == PLAIN


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    print_table(ROWS)
    assert capsys.readouterr().out == PLAIN


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((80, 24), PLAIN),
        ((14, 24), "NAME         S\na-long-name  r\nb            e\nc            e\n"),
        ((80, 4), "NAME         STATE\na-long-name  running\n... and 2 more\n"),
        ((80, 1), "NAME         STATE\n... and 3 more\n"),
    ],
)
def test_a_table_fits_into_a_window(
    capsys: pytest.CaptureFixture[str], size: tuple[int, int], expected: str
) -> None:
    print_table(ROWS, room=os.terminal_size(size))
    assert capsys.readouterr().out == expected
