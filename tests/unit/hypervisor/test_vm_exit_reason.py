"""One line that says why a virtual machine ended."""

from __future__ import annotations

import pytest

from hypervisor.exits import ExitStatus, Shutdown, last_words, vm_exit_reason

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
def test_the_reason_is_one_line(
    status: ExitStatus, shutdown: Shutdown | None, console: list[str], stderr: str, reason: str
) -> None:
    assert vm_exit_reason(status, shutdown=shutdown, console=console, stderr=stderr) == reason


MANY_CPUS = (
    "qemu-system-x86_64: warning: Number of hotpluggable cpus requested (96) exceeds the recommended cpus "
    "supported by KVM (2)"
)
HUGE_PAGES = "qemu-system-x86_64: warning: Could not detect THP size, falling back to 2 MiB"
OF_A_DEVICE = "qemu-system-x86_64: -device vfio-pci,host=01:00.0: warning: vfio 0000:01:00.0: no INTx"
OF_RUST = "[2026-11-29T12:00:00Z WARN  virtiofsd] Failure when trying to set the limit of open files"
FAILURE = "qemu-system-x86_64: cannot set up guest memory 'memory': Cannot allocate memory"


@pytest.mark.parametrize("warning", [MANY_CPUS, HUGE_PAGES, OF_A_DEVICE, OF_RUST])
def test_a_warning_beside_an_error_is_not_the_cause(warning: str) -> None:
    assert last_words(f"{warning}\n{FAILURE}\n{warning}\n", ExitStatus(code=1)) == [FAILURE]


@pytest.mark.parametrize("status", [ExitStatus(signal=9), ExitStatus(code=0), ExitStatus(), None])
def test_a_warning_alone_does_not_explain_a_successful_exit(status: ExitStatus | None) -> None:
    assert last_words(f"{MANY_CPUS}\n{HUGE_PAGES}\n", status) == []


def test_a_warning_alone_may_explain_a_failed_exit() -> None:
    assert last_words(f"{HUGE_PAGES}\n", ExitStatus(code=1)) == [HUGE_PAGES]


def test_a_line_that_merely_mentions_warnings_is_kept() -> None:
    assert last_words("error: warnings are errors here\n", ExitStatus(code=1)) == [
        "error: warnings are errors here"
    ]
