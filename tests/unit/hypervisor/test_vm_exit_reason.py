"""One line that says why a virtual machine ended."""

from __future__ import annotations

import pytest

from hypervisor.exits import ExitStatus, Shutdown, vm_exit_reason

CLEAN = ExitStatus(code=0)
PANIC_OF_INIT = "[    1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x100"
PANIC = "[    1.0] Kernel panic - not syncing: no init found"


@pytest.mark.parametrize(
    ("status", "shutdown", "console", "stderr", "reason"),
    [
        pytest.param(ExitStatus(signal=9), None, [], "", "QEMU killed by signal 9", id="killed"),
        pytest.param(
            ExitStatus(code=1),
            None,
            [],
            "no such option",
            "QEMU exited with status 1: no such option",
            id="failed",
        ),
        pytest.param(ExitStatus(), None, [], "", "QEMU ended with an unknown status", id="reaped by another"),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-panic"),
            [PANIC, "Call Trace:", " </TASK>"],
            "",
            f"guest panicked: {PANIC}",
            id="panic with its line",
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-panic"),
            ["hako-agent: crash at main:1: OSError", PANIC_OF_INIT, "[    1.1] more"],
            "",
            f"guest panicked: {PANIC_OF_INIT}; before that: hako-agent: crash at main:1: OSError",
            id="panic because process 1 died",
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-panic"),
            ["last words"],
            "",
            "guest panicked: last words",
            id="panic whose line scrolled away",
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-panic"),
            [],
            "",
            "guest panicked: no console output",
            id="silent panic",
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-reset"),
            [PANIC],
            "",
            f"guest panicked: {PANIC}",
            id="panic before the panic device",
        ),
        pytest.param(
            CLEAN, Shutdown(by_guest=True, cause="guest-reset"), ["login:"], "", "guest reset", id="reset"
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=True, cause="guest-shutdown"),
            [],
            "",
            "guest powered off",
            id="power off",
        ),
        pytest.param(
            CLEAN,
            Shutdown(by_guest=False, cause="host-signal"),
            [],
            "",
            "QEMU was told to quit (host-signal)",
            id="terminated from the host",
        ),
    ],
)
def test_the_reason(status, shutdown, console, stderr, reason):
    assert vm_exit_reason(status, shutdown=shutdown, console=console, stderr=stderr) == reason
