"""Text that a guest may have chosen, on its way to a terminal or a log."""

from __future__ import annotations


def printable(text: str, *, limit: int, replacement: str = " ") -> str:
    """Make one line safe to show: bounded, and without control and formatting characters.

    :param text: one line, without its end.
    :param limit: the most characters that are kept.
    :param replacement: the substitute for each such character.
    """
    return "".join(mark if mark.isprintable() else replacement for mark in text[:limit]).rstrip()
