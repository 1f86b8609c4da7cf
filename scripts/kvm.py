"""Run tests or benchmarks under KVM, in an outer machine: ``scripts/test --kvm``, ``scripts/bench --kvm``.

Their output is shown as it arrives, and their exit status is returned. After a failure, the report in JUnit's
format and the log of the outer machine's kernel stay in a directory that the last line names.

QEMU's emulation of SVM now and then breaks a guest, or the outer machine itself: see docs/testing.md. So
tests that have not passed run once more, in a new outer machine, and are named at the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import newer, outer
from tests import host_settings, patience, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 10
"""The factor by which deadlines are longer on an emulated host."""

TEST_DEADLINE_S = 120 * PATIENCE
SHORT = ("tests/e2e/test_kvm.py",)
SHORT_MEMORY_MIB = 128
"""So little memory halves the time to make a template: each unused page is taken from the guest singly."""

SHORT_DEADLINE_S = 1200.0
_PROGRESS = "progress"
_TESTS_FAILED = 1  # pytest's status; the outer machine has it too if it does not run to its end
_HYPERVISOR, _E2E, _CRI = "tests/integration/hypervisor", "tests/e2e", "tests/cri"
_MATRIX = f"{_E2E}/test_kill_matrix_of_clones.py"
_HOTPLUG, _TEMPLATE = f"{_HYPERVISOR}/test_hotplug.py", f"{_HYPERVISOR}/test_template.py"
ALL = (
    *SHORT,
    f"{_E2E}/test_vfio.py",
    f"{_HYPERVISOR}/test_accelerator_probe.py::test_this_host_gets_a_verdict_with_a_reason_and_keeps_it",
    f"{_HYPERVISOR}/test_vm_boot.py::test_the_agent_answers",
    f"{_HYPERVISOR}/test_vm_death.py::test_qemu_killed[9]",
    f"{_HYPERVISOR}/test_vm_death.py::test_qemu_asked_to_terminate",
    f"{_HYPERVISOR}/test_vm_death.py::test_the_virtio_fs_worker_killed_ends_the_machine_and_names_the_daemon",
    f"{_HYPERVISOR}/test_vm_death.py::test_a_guest_without_init_panics_with_its_line",
    f"{_HOTPLUG}::test_a_disk_has_the_bytes_and_the_mode_it_was_plugged_with[distribution]",
    f"{_HOTPLUG}::test_an_interface_comes_and_goes[distribution-5]",
    f"{_HOTPLUG}::test_a_root_port_takes_a_device_and_then_another[distribution]",
    f"{_HYPERVISOR}/test_sizing.py::test_processors_are_added_and_taken_away_as_the_guest_sees_it[distribution]",
    f"{_HYPERVISOR}/test_sizing.py::test_memory_that_the_guest_frees_is_back_on_the_host[distribution]",
    f"{_TEMPLATE}::test_the_agent_of_a_clone_answers[distribution-vhost-vsock]",
    f"{_TEMPLATE}::test_the_agent_of_a_clone_answers[distribution-vhost-user-vsock]",
    f"{_TEMPLATE}::test_clones_at_once_have_nothing_in_common[distribution]",
    f"{_TEMPLATE}::test_a_clone_takes_and_gives_devices_processors_and_memory[distribution]",
    "tests/integration/guest/test_channels.py",
    f"{_E2E}/test_life.py::test_the_exit_code_of_the_process_is_the_exit_code_of_ctr[2.1-ttrpc-42]",
    f"{_E2E}/test_life.py::test_a_process_killed_by_signal_9_exits_with_137[2.1-ttrpc]",
    f"{_E2E}/test_life.py::test_stdin_reaches_the_process_and_its_end_is_seen[2.1-ttrpc]",
    f"{_E2E}/test_exec.py::test_stdin_reaches_an_exec_and_its_end_is_seen[2.1-ttrpc]",
    f"{_E2E}/test_exec.py::test_many_execs_run_at_once_and_none_mixes_with_another[2.1-ttrpc]",
    f"{_E2E}/test_exec.py::test_an_exec_is_killed_without_harm_to_its_container[2.1-ttrpc]",
    f"{_E2E}/test_terminal.py::test_a_shell_on_a_terminal_answers_what_is_typed[2.1-ttrpc]",
    f"{_E2E}/test_bytes.py::test_an_output_arrives_whole[stdout-vhost-vsock-64KiB]",
    f"{_E2E}/test_bytes.py::test_an_output_arrives_whole[stdout-vhost-vsock-100MiB]",
    f"{_E2E}/test_bytes.py::test_an_input_arrives_whole[vhost-vsock-100MiB]",
    f"{_E2E}/test_bytes.py::test_a_stalled_reader_loses_nothing_when_it_reads_on[vhost-vsock]",
    f"{_E2E}/test_bytes.py::test_short_commands_lose_no_line[40-vhost-vsock]",
    f"{_E2E}/test_templates.py::test_the_first_container_leaves_a_template_and_the_second_is_a_clone",
    f"{_E2E}/test_templates.py::test_two_clones_share_neither_randomness_nor_names_and_know_the_time",
    f"{_E2E}/test_templates.py::test_a_clone_grows_to_what_its_container_may_use",
    f"{_E2E}/test_templates.py::test_a_broken_template_is_replaced_and_its_container_boots_cold[garble_memory]",
    *(
        f"{_MATRIX}::test_the_death_of_a_clone_ends_the_task_once_and_leaves_nothing[{case}]"
        for case in ("shim-during exec", "QEMU-created", "virtio-fs daemon-paused", "guest-stopping")
    ),
    f"{_CRI}/test_pods.py::test_pods_and_containers_survive_a_restart_of_containerd[2.1-podsandbox]",
    f"{_CRI}/test_pods.py::test_a_pod_whose_machine_dies_is_not_ready_and_can_be_removed_at_once[2.1-podsandbox]",
    f"{_CRI}/test_streams.py::test_a_streamed_command_has_all_its_streams_and_an_exit_code[2.1-podsandbox]",
    f"{_CRI}/test_streams.py::test_attaching_joins_the_streams_of_a_container[2.1-podsandbox]",
    f"{_CRI}/test_streams.py::test_a_port_of_the_pod_is_forwarded[2.1-podsandbox]",
)
"""Only one or two tests of each kind, because a machine takes half a minute to start; --nightly adds some."""

BY_NIGHT = (_MATRIX,)

DEADLINE_S = 6 * 3600.0
ENVIRONMENT = {
    patience.VARIABLE: f"{PATIENCE}",
    host_settings.ACCELERATOR_VARIABLE: "kvm",
    "HAKO_TEST_VFIO_DISK": outer.DISK,
    "HAKO_TEST_VFIO_CARDS": " ".join(outer.CARDS),
    progress.VARIABLE: f"{outer.RESULTS}/{_PROGRESS}",
    "PYTHONUNBUFFERED": "1",
    "PYTEST_ADDOPTS": os.environ.get("PYTEST_ADDOPTS", ""),  # set by scripts/test --nightly
}
BENCHMARKS = ("clone_over_cold", "run_template_over_cold", "shim_pss_mib", "pod_pss_mib", "host_share")


def main(arguments: Sequence[str]) -> int:
    """Run the tests or benchmarks that the command line names.

    :param arguments: ``test`` or ``bench``, then options: ``--newer`` uses the programs of Debian 13,
        ``--short`` runs a part of the tests, ``--results DIR`` keeps the results there; then arguments for
        pytest or the benchmarks.
    :returns: its exit status; 2 if this host cannot have an outer machine.
    """
    if problem := outer.problem():
        print(f"kvm: {problem}", file=sys.stderr)
        return 2
    what, *given = arguments
    is_newer = given[:1] == ["--newer"]
    del given[: int(is_newer)]
    is_short = given[:1] == ["--short"]
    del given[: int(is_short)]
    kept = Path(given[1]) if given[:1] == ["--results"] else None
    del given[: 2 if kept else 0]
    results = kept or Path(tempfile.mkdtemp(prefix="hako-kvm-"))
    results.mkdir(exist_ok=True)
    little = {host_settings.MEMORY_VARIABLE: f"{SHORT_MEMORY_MIB}"} if is_short else {}
    # Debian 13's programs run with libraries beside them, which confined processes would not see.
    free = {"HAKO_TEST_JAIL": "off"} if is_newer else {}
    run = partial(
        outer.run,
        environment={**ENVIRONMENT, **little, **free},
        deadline_s=SHORT_DEADLINE_S if is_short else DEADLINE_S,
        replacements=newer.prepare() if is_newer else {},
    )
    began_s = time.monotonic()
    if what == "bench":
        status = run(_benchmarks(given), results=results)
    else:
        listed = [] if any(_is_test(word) for word in given) else SHORT if is_short else _whole_list()
        status = _run_twice(run, [*given, *listed], results=results)
    print(f"kvm: exit status {status} after {time.monotonic() - began_s:.0f} s", flush=True)
    if status or kept:
        print(f"kvm: the report and the outer machine's log are in {results}", flush=True)
    else:
        shutil.rmtree(results)
    return status


def _run_twice(run: Callable[..., int], words: list[str], *, results: Path) -> int:
    """Run tests, and those that have not passed once more in a new outer machine.

    :param run: starts an outer machine, see ``outer.run``.
    :param words: the tests, and options for pytest.
    :param results: the directory for the results; those of the second run are in ``again`` there.
    :returns: the exit status of the last run.
    """
    file, again = results / _PROGRESS, results / "again"
    shutil.rmtree(again, ignore_errors=True)
    file.unlink(missing_ok=True)
    status = run(_pytest(words), results=results)
    left = progress.remaining(file) if status == _TESTS_FAILED else None
    if not left:
        return status
    print(f"kvm: {len(left)} tests have not passed; they run again in a new outer machine", flush=True)
    again.mkdir()
    options = [word for word in words if not _is_test(word)]
    status = run(_pytest([*options, *left]), results=again)
    still_left = progress.remaining(again / _PROGRESS)
    for name in left:
        if still_left is not None and name not in still_left:
            print(f"kvm: passed only in the second machine: {name}", flush=True)
    return status


def _whole_list() -> tuple[str, ...]:
    """List the tests of a run that names none, with the nightly ones after ``scripts/test --nightly``."""
    return (*ALL, *BY_NIGHT) if os.environ.get("HAKO_FUZZ") == "nightly" else ALL


def _is_test(word: str) -> bool:
    return word.startswith("tests/")


def _pytest(words: list[str]) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
        *(f"--timeout={TEST_DEADLINE_S}", f"--junitxml={outer.RESULTS}/report.xml"),
        *("-p", "tests.failures_at_once", "-p", "tests.progress"),
        *("-v", "--color=no", "--durations=0", "--durations-min=5"),
        *words,
    ]


def _benchmarks(given: list[str]) -> list[str]:
    names = given or [*BENCHMARKS, "--rounds", "3"]
    return [sys.executable, "-m", "scripts.benchmarks", *names, "--json", f"{outer.RESULTS}/results.json"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(1))  # leaves no files behind
    sys.exit(main(sys.argv[1:]))
