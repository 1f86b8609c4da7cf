"""How Hako chooses among the programs and devices of a host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor import Accelerator, Channel
from shim.config import Config, GuestConfig, HypervisorConfig
from shim.errors import FailedPrecondition
from shim.machine import host_choice


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with one daemon directory, an empty PATH and no vhost-vsock."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(host_choice, "_DAEMON_DIRECTORIES", (tmp_path / "daemons",))
    monkeypatch.setattr("hypervisor.vsock.VHOST_VSOCK", tmp_path / "vhost-vsock")
    return tmp_path


def program(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o700)
    return path


def configured(**values: Any) -> Config:
    return Config(hypervisor=HypervisorConfig(**values))


def test_a_daemon_in_the_path_comes_first(directory: Path) -> None:
    program(directory / "daemons" / "virtiofsd")
    expected = program(directory / "path" / "virtiofsd")
    assert host_choice.find_virtiofsd(Config()) == expected


def test_a_daemon_is_found_in_the_directories_of_distributions(directory: Path) -> None:
    expected = program(directory / "daemons" / "virtiofsd")
    assert host_choice.find_virtiofsd(Config()) == expected


def test_only_the_configured_daemon_is_used(directory: Path) -> None:
    program(directory / "path" / "virtiofsd")
    expected = program(directory / "mine")
    assert host_choice.find_virtiofsd(configured(virtiofsd=str(expected))) == expected
    with pytest.raises(FailedPrecondition, match="not found in /nope; install virtiofsd or set"):
        host_choice.find_virtiofsd(configured(virtiofsd="/nope"))


def test_a_missing_daemon_is_an_error_that_lists_the_places_searched(directory: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        host_choice.find_virtiofsd(Config())
    assert f"not found in PATH, {directory}/daemons; install virtiofsd" in str(caught.value)


def test_without_any_vsock_the_channel_is_a_serial_port(directory: Path) -> None:
    channel, reason = host_choice.choose_channel(Config())
    assert channel is Channel.VIRTIO_SERIAL
    assert "vhost-vsock: No such file or directory" in reason
    assert "vhost-device-vsock: no such program" in reason


def test_a_vsock_daemon_is_preferred_to_a_serial_port(directory: Path) -> None:
    program(directory / "daemons" / "vhost-device-vsock")
    assert host_choice.choose_channel(Config())[0] is Channel.VHOST_USER_VSOCK


def test_the_kernels_vsock_is_preferred(directory: Path) -> None:
    program(directory / "daemons" / "vhost-device-vsock")
    (directory / "vhost-vsock").touch()
    assert host_choice.choose_channel(Config()) == (Channel.VHOST_VSOCK, "the fastest, and usable")


def test_a_configured_channel_is_used(directory: Path) -> None:
    channel, reason = host_choice.choose_channel(configured(channel="virtio-serial"))
    assert (channel, reason) == (Channel.VIRTIO_SERIAL, "set by [hypervisor] channel")


@pytest.mark.parametrize("channel", ["vhost-vsock", "vhost-user-vsock"])
def test_a_configured_channel_that_cannot_be_used_is_an_error(directory: Path, channel: str) -> None:
    with pytest.raises(FailedPrecondition, match=rf"^boot: channel {channel}: .*; "):
        host_choice.choose_channel(configured(channel=channel))


async def test_a_configured_accelerator_is_not_checked() -> None:
    verdict = await host_choice.choose_accelerator(configured(accelerator="tcg"))
    assert (verdict.accelerator, verdict.reason) == (Accelerator.TCG, "set by [hypervisor] accelerator")


async def test_an_accelerator_that_cannot_be_checked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(host_choice, "_VERDICT", tmp_path / "file" / "verdict")
    with pytest.raises(FailedPrecondition, match=r"^boot: accelerator: .*; set \[hypervisor\] accelerator$"):
        await host_choice.choose_accelerator(Config())


@pytest.mark.parametrize("key", ["kernel", "initrd"])
def test_a_missing_guest_image_is_an_error(tmp_path: Path, key: str) -> None:
    paths = {name: str(tmp_path / name) for name in ("kernel", "initrd")}
    for path in paths.values():
        Path(path).touch()
    config = Config(guest=GuestConfig(kernel=paths["kernel"], initrd=paths["initrd"]))
    assert host_choice.find_guest(config) == (tmp_path / "kernel", tmp_path / "initrd")
    (tmp_path / key).unlink()
    with pytest.raises(
        FailedPrecondition,
        match=rf"^boot: guest {key} .*: no such file; run `hako install` or `hako image build`",
    ):
        host_choice.find_guest(config)


def test_a_missing_qemu_is_an_error() -> None:
    with pytest.raises(FailedPrecondition, match=r"^boot: /nope: no such program; install qemu-system-x86"):
        host_choice.find_qemu(configured(qemu="/nope"))


async def test_all_choices_for_a_host_are_made(directory: Path) -> None:
    for name in ("kernel", "initrd"):
        (directory / name).touch()
    qemu = program(directory / "qemu")
    virtiofsd = program(directory / "path" / "virtiofsd")
    config = Config(
        hypervisor=HypervisorConfig(qemu=str(qemu), accelerator="tcg"),
        guest=GuestConfig(kernel=str(directory / "kernel"), initrd=str(directory / "initrd")),
    )
    choice = await host_choice.resolve(config)
    assert (choice.accelerator, choice.channel) == (Accelerator.TCG, Channel.VIRTIO_SERIAL)
    assert (choice.virtiofsd, choice.vsock_daemon) == (virtiofsd, None)
