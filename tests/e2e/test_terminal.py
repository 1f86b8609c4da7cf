"""``ctr run -t``: a container on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.terminal import terminal

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

SHOW_SIZE = """
trap 'stty size' WINCH
trap 'echo interrupted; exit 3' INT
test -t 0 && test -t 1 && test -t 2 && echo is-terminal
stty size
while :; do sleep 0.2; done
"""


def test_a_terminal_follows_the_size_of_the_window_and_turns_control_c_into_a_signal(
    stack: Stack, container: str
) -> None:
    argv = stack.containerd.run_argv(IMAGE, container, "sh", "-c", SHOW_SIZE, options=["--rm", "-t"])
    with terminal(argv, rows=30, columns=90) as screen:
        screen.expect("is-terminal\\s")
        screen.expect("30 90\\s")
        screen.resize(rows=50, columns=132)
        screen.expect_after_resize("50 132\\s")
        screen.send("\x03")
        screen.expect("interrupted\\s")
        assert screen.wait() == 3


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_shell_on_a_terminal_answers_what_is_typed(stack: Stack, container: str) -> None:
    argv = stack.containerd.run_argv(IMAGE, container, "sh", options=["--rm", "-t"])
    with terminal(argv) as screen:
        screen.expect("# ")
        screen.send("echo $((6 * 7))\n")
        screen.expect("\n42\\s")
        screen.send("exit 9\n")
        assert screen.wait() == 9
