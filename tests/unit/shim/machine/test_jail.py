"""Each sandbox has its own user, or a reason why it has none."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypervisor import Accelerator, Channel
from shim.config import Config, HypervisorConfig
from shim.errors import FailedPrecondition
from shim.host import host_process
from shim.machine import jail
from shim.machine.host_choice import HostChoice
from shim.machine.jail import Jail
from shim.machine.sizing import Size
from shim.machine.spec import describe
from tests.waiting import until

FIRST = 1_000_000_000 + 8 * os.getpid()
"""The first of a few numbers of this process alone: other lanes may have machines with the usual ones."""
CHOICE = HostChoice(
    accelerator=Accelerator.KVM,
    accelerator_reason="",
    channel=Channel.VHOST_VSOCK,
    channel_reason="",
    virtiofsd=Path("/virtiofsd"),
    vsock_daemon=None,
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "jail"
    monkeypatch.setattr(jail, "DIRECTORY", str(place))
    return place


def configured(**changes: Any) -> Config:
    return Config(hypervisor=HypervisorConfig(**{"jail": "auto", "jail_first_id": FIRST, **changes}))


def taken(config: Config, accelerator: Accelerator = Accelerator.TCG) -> Jail:
    found = Jail.of(config, accelerator)
    assert found is not None
    return found


def test_a_user_number_belongs_to_one_sandbox_until_it_is_released() -> None:
    config = configured(jail="required", jail_ids=2)
    jails = [taken(config) for _ in range(2)]
    assert {one.identity.uid for one in jails} == {FIRST, FIRST + 1}
    assert all(one.identity.uid == one.identity.gid for one in jails)
    with pytest.raises(FailedPrecondition, match=r"none of 2 numbers is free; raise .* jail_ids"):
        Jail.of(config, Accelerator.TCG)
    jails[0].close()
    again = taken(config)
    assert again.identity == jails[0].identity
    for one in (again, jails[1]):
        one.close()


def test_a_number_whose_shim_was_killed_is_free_once_none_of_its_processes_is_left() -> None:
    config = configured(jail="required", jail_ids=1)
    killed = taken(config)
    killed.lock.close()  # as the kernel does
    stays = ["setpriv", f"--reuid={killed.identity.uid}", "--clear-groups", "sleep", "1000"]
    with subprocess.Popen(stays) as left:
        until(lambda: host_process.user_has_any(killed.identity.uid))
        with pytest.raises(FailedPrecondition, match="none of 1 numbers is free"):
            taken(config)
        left.kill()
    taken(config).close()


def test_a_number_of_overlapping_ranges_is_one_sandboxs_alone() -> None:
    with contextlib.closing(taken(configured(jail_first_id=FIRST + 1, jail_ids=1))):
        both = configured(jail_ids=2)
        with contextlib.closing(taken(both)) as other:
            assert other.identity.uid == FIRST


def test_a_sandbox_with_an_optional_jail_runs_without_one_if_no_number_is_free(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configured(jail="preferred", jail_ids=1)
    only = taken(config, Accelerator.KVM)
    assert Jail.of(config, Accelerator.KVM) is None
    assert "run as root" in caplog.text
    only.close()


def test_a_sandbox_without_a_jail_takes_no_number(directory: Path) -> None:
    assert Jail.of(configured(jail="off"), Accelerator.KVM) is None
    assert not directory.exists()


def test_other_users_cannot_reach_the_numbers(directory: Path) -> None:
    taken(configured()).close()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert Path(directory, "numbers").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("wish", "accelerator", "required"),
    [
        ("auto", Accelerator.KVM, True),
        ("auto", Accelerator.TCG, False),
        ("required", Accelerator.TCG, True),
        ("preferred", Accelerator.KVM, False),
    ],
)
def test_a_jail_is_required_if_it_is_a_boundary_or_the_operator_says_so(
    wish: str, accelerator: Accelerator, required: bool
) -> None:
    assert jail.is_required(configured(jail=wish), accelerator) == required


def test_a_machine_starts_unconfined_only_if_that_is_allowed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configured(jail_ids=3)
    wanted = taken(config, Accelerator.KVM)
    size = Size(vcpus=1, memory_bytes=512 << 20)
    described = describe(
        Config(), CHOICE, name="s", directory=Path("/d"), share=Path("/s"), size=size, most=size
    )
    spec = dataclasses.replace(described, jail=wanted.identity)
    with pytest.raises(FailedPrecondition, match="QEMU: seccomp: Invalid argument; see what `hako check`"):
        jail.without(spec, "QEMU: seccomp: Invalid argument", wanted)
    wanted.close()
    liked = taken(config)
    assert jail.without(spec, "QEMU: seccomp: Invalid argument", liked).jail is None
    assert "QEMU: seccomp: Invalid argument; the sandbox's processes run as root" in caplog.text
    liked.close()


def test_a_machine_starts_without_limits_only_if_that_is_allowed() -> None:
    config = configured(jail_ids=2)
    with contextlib.closing(taken(config, Accelerator.KVM)) as wanted:
        jail.refuse_unbounded("", wanted)
        with pytest.raises(FailedPrecondition, match="boot: jail: cgroup: no memory controller; see what"):
            jail.refuse_unbounded("no memory controller", wanted)
    with contextlib.closing(taken(config)) as liked:
        jail.refuse_unbounded("no memory controller", liked)
