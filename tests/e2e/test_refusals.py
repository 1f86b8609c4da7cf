"""An impossible start fails in time with one line, and leaves nothing behind (the census checks that)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from guest.image import cpio
from tests.e2e.busybox import BUSYBOX, IMAGE
from tests.e2e.conftest import DEFAULT_BOOT_S, Stack, write_config
from tests.e2e.containerd import CALL_TIMEOUT_S
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

pytestmark = pytest.mark.hako

BOOT_TIMEOUT_S = 6
GIVEN_UP_S = BOOT_TIMEOUT_S + patient(30.0)
"""Less than other tests give a boot; containerd, start and the end of the machine are part of it."""


@contextlib.contextmanager
def configured(stack: Stack, **tables: Any) -> Iterator[None]:
    """Give the shims that containerd starts within the block further configuration."""
    usual = stack.config.read_bytes()
    write_config(stack.config, state_directory=stack.state_directory, protocol=stack.protocol, **tables)
    try:
        yield
    finally:
        stack.config.write_bytes(usual)


def refusal(stack: Stack, container: str, *, within_s: float, **tables: str) -> str:
    """Run a container that cannot start, and return the one line that says why."""
    with configured(stack, **tables):
        result = stack.containerd.run(IMAGE, container, "true", timeout_s=within_s)
    lines = result.stderr.strip().splitlines()
    assert (result.code, result.stdout, len(lines)) == (1, "", 1), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        pytest.param(
            {"hypervisor": "memroy_mib = 512"}, ["config: ", "memroy_mib", "memory_mib"], id="misspelt key"
        ),
        pytest.param(
            {"hypervisor": 'memory_mib = "512"'}, ["config: ", "memory_mib", "'512'"], id="wrong type"
        ),
        pytest.param({"hypervisor": "= 1"}, ["config: ", "not TOML"], id="no TOML"),
        pytest.param({"guest": 'kernel = "/no/vmlinux"'}, ["kernel", "/no/vmlinux"], id="missing kernel"),
        pytest.param({"guest": 'initrd = "/no/initrd"'}, ["initrd", "/no/initrd"], id="missing initrd"),
        pytest.param({"hypervisor": 'qemu = "/no/qemu"'}, ["/no/qemu"], id="missing QEMU"),
        pytest.param(
            {"hypervisor": 'virtiofsd = "/no/virtiofsd"'}, ["/no/virtiofsd"], id="missing virtiofsd"
        ),
        pytest.param(
            {"hypervisor": 'machine_options = "no-such-option=on"'},
            ["qemu", "no-such-option"],
            id="QEMU that dies at once",
        ),
    ],
)
def test_a_failed_start_names_the_phase_and_the_cause(
    stack: Stack, container: str, tables: dict[str, str], words: list[str]
) -> None:
    line = refusal(stack, container, within_s=CALL_TIMEOUT_S, **tables)

    for word in words:
        assert word in line


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_guest_that_never_answers_is_given_up_at_its_deadline(
    stack: Stack, container: str, tmp_path: Path
) -> None:
    initrd = tmp_path / "initrd"
    script = b"#!/bin/busybox sh\nexec /bin/busybox sleep 100000\n"
    files = {"/bin/busybox": BUSYBOX.read_bytes(), "/init": script}
    initrd.write_bytes(cpio.archive(cpio.regular(name, data, mode=0o755) for name, data in files.items()))

    guest = f'initrd = "{initrd}"\nboot_timeout_s = {BOOT_TIMEOUT_S}'
    line = refusal(stack, container, within_s=GIVEN_UP_S, guest=guest)

    assert "boot" in line
    assert f"{BOOT_TIMEOUT_S} s" in line


@pytest.mark.mostly_on("1.7-ttrpc")
def test_a_guest_without_an_init_fails_with_the_last_words_of_its_kernel(
    stack: Stack, container: str
) -> None:
    deadline_s = f"{patient(DEFAULT_BOOT_S):.0f}"
    guest = f'kernel_parameters = "rdinit=/no/init"\nboot_timeout_s = {deadline_s}'
    line = refusal(stack, container, within_s=CALL_TIMEOUT_S, guest=guest)

    assert "boot" in line
    assert "panic" in line
