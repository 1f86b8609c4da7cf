"""QEMU's command lines, word by word; each golden file is for one accelerator and one channel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, Channel
from hypervisor.architecture import X86_64
from hypervisor.argv import (
    Inherited,
    KernelVsock,
    SerialPort,
    UserVsock,
    boot_argv,
    kernel_command_line,
    probe_argv,
)
from hypervisor.seclusion import entering

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor import VmSpec, interface


GOLDEN = Path(__file__).parent / "golden"

DEVICES: dict[Channel, KernelVsock | UserVsock | SerialPort] = {
    Channel.VHOST_VSOCK: KernelVsock(fd=13, cid=4711),
    Channel.VHOST_USER_VSOCK: UserVsock(fd=13),
    Channel.VIRTIO_SERIAL: SerialPort(fd=13),
}


def argv(spec: VmSpec) -> list[str]:
    inherited = Inherited(qmp=10, console=11, share=12, channel=DEVICES[spec.channel])
    return boot_argv(spec, inherited, architecture=X86_64)


def value_of(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize("channel", Channel, ids=lambda channel: channel.value)
@pytest.mark.parametrize("accelerator", Accelerator, ids=lambda accelerator: accelerator.value)
def test_the_command_line_matches_the_golden_file(
    make_spec: Callable[..., VmSpec], accelerator: interface.Accelerator, channel: interface.Channel
) -> None:
    words = argv(make_spec(accelerator=accelerator, channel=channel, vcpus=2))
    golden = GOLDEN / f"{accelerator.value}-{channel.value}.txt"
    assert words == golden.read_text().splitlines()


@pytest.mark.parametrize(("vcpus", "suffix"), [(1, ""), (2, ",thread=single")])
def test_one_thread_emulates_all_processors_that_a_machine_boots_with(
    make_spec: Callable[..., VmSpec], vcpus: int, suffix: str
) -> None:
    words = argv(make_spec(accelerator=Accelerator.TCG, vcpus=vcpus))
    assert value_of("-accel", words) == f"tcg,tb-size=128{suffix}"


def test_the_operators_machine_options_come_last(make_spec: Callable[..., VmSpec]) -> None:
    words = argv(make_spec(machine_options="hpet=off,i8042=off"))
    assert value_of("-machine", words).endswith(",dump-guest-core=off,hpet=off,i8042=off")


def test_the_operators_kernel_parameters_come_last(make_spec: Callable[..., VmSpec]) -> None:
    line = kernel_command_line(make_spec(kernel_parameters=("loglevel=7", "panic=5")), architecture=X86_64)
    assert line.endswith(" loglevel=7 panic=5")


def test_a_comma_in_the_name_is_escaped(make_spec: Callable[..., VmSpec]) -> None:
    assert value_of("-name", argv(make_spec(name="a,process=init"))) == "a,,process=init,debug-threads=on"


def test_machine_and_memory_backend_agree_on_the_size(make_spec: Callable[..., VmSpec]) -> None:
    words = argv(make_spec(memory_bytes=768 << 20))
    assert value_of("-m", words).startswith("size=768M,")
    assert "memory-backend-memfd,id=memory,size=768M,share=on" in words


def test_a_machine_that_cannot_grow_has_no_room_for_more_memory(make_spec: Callable[..., VmSpec]) -> None:
    words = argv(make_spec(memory_bytes=512 << 20, max_memory_bytes=512 << 20))
    assert value_of("-m", words) == "512M"


@pytest.mark.parametrize("accelerator", Accelerator, ids=lambda accelerator: accelerator.value)
def test_a_probe_uses_the_same_processor_as_a_machine(
    make_spec: Callable[..., VmSpec], accelerator: interface.Accelerator
) -> None:
    probe = probe_argv(Path("/qemu"), accelerator, Path("/probe"), architecture=X86_64)
    machine = argv(make_spec(accelerator=accelerator))
    assert (probe[0], value_of("-kernel", probe)) == ("/qemu", "/probe")
    for option in ("-accel", "-cpu"):
        assert value_of(option, probe) == value_of(option, machine)


def test_each_root_port_has_its_own_chassis_and_a_large_memory_window(
    make_spec: Callable[..., VmSpec],
) -> None:
    words = argv(make_spec(root_ports=2))
    room = "mem-reserve=32M,pref64-reserve=32G"
    first = words.index(f"pcie-root-port,id=port1,chassis=3,{room}") - 1
    assert words[first : first + 4] == [
        "-device",
        f"pcie-root-port,id=port1,chassis=3,{room}",
        "-device",
        f"pcie-root-port,id=port2,chassis=4,{room}",
    ]


def test_the_network_namespace_is_entered_before_anything_is_opened(make_spec: Callable[..., VmSpec]) -> None:
    words = entering(make_spec(network_namespace=Path("/run/netns/pod")))
    own_mounts = ["unshare", "--mount", "--propagation", "private", "--"]
    assert words == [*own_mounts, "nsenter", "--net=/run/netns/pod", "--"]


def test_a_machine_with_root_ports_sees_the_hosts_device_files(
    make_spec: Callable[..., VmSpec],
) -> None:
    assert entering(make_spec(root_ports=1)) == []


def test_memory_uses_huge_pages_on_request(make_spec: Callable[..., VmSpec]) -> None:
    [backend] = [word for word in argv(make_spec(huge_pages=True)) if word.startswith("memory-backend")]
    assert backend == "memory-backend-memfd,id=memory,size=512M,share=on,hugetlb=on"
