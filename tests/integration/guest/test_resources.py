"""Limits, counters, freezing, storages and files in the real guest."""

from __future__ import annotations

import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from proto.kata import agent_pb2, oci_pb2
from tests.integration.guest.agent_client import ANSWER_S, StatusError
from tests.integration.guest.guest_machine import SHARE, GuestMachine, process, spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.guest.conftest import Life


def test_limits_are_set_counted_and_changed(machine: GuestMachine, new_container: Callable[[], Life]) -> None:
    container = new_container()
    whole = spec(container.id, process("cat"))
    whole.Linux.Resources.Memory.Limit = 32 << 20
    whole.Linux.Resources.Pids.Limit = 20
    container.create_from(whole)
    container.start()
    request = agent_pb2.StatsContainerRequest(container_id=container.id)
    counted = machine.client.call("StatsContainer", request).cgroup_stats
    assert counted.memory_stats.usage.limit == 32 << 20
    assert 0 < counted.memory_stats.usage.usage < 32 << 20
    assert (counted.pids_stats.current, counted.pids_stats.limit) == (1, 20)
    assert counted.cpu_stats.cpu_usage.total_usage > 0
    resources = oci_pb2.LinuxResources(Memory=oci_pb2.LinuxMemory(Limit=48 << 20))
    update = agent_pb2.UpdateContainerRequest(container_id=container.id, resources=resources)
    machine.client.call("UpdateContainer", update)
    counted = machine.client.call("StatsContainer", request).cgroup_stats
    assert counted.memory_stats.usage.limit == 48 << 20
    update.ClearField("resources")  # nothing is to be changed, as Kata's agent has it
    machine.client.call("UpdateContainer", update)
    counted = machine.client.call("StatsContainer", request).cgroup_stats
    assert counted.memory_stats.usage.limit == 48 << 20


def test_paused_container_does_nothing_until_resumed(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    container.run("cat")
    machine.client.call("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container.id))
    container.write(b"x")
    reading = machine.client.begin(
        "ReadStdout", agent_pb2.ReadStreamRequest(container_id=container.id, len=9)
    )
    with pytest.raises(TimeoutError):
        machine.client.answer(reading, timeout_s=0.5)
    machine.client.call("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container.id))
    reply = agent_pb2.ReadStreamResponse.FromString(machine.client.answer(reading))
    assert reply.data == b"x"


@pytest.mark.parametrize("method", ["StatsContainer", "PauseContainer", "ResumeContainer", "WaitProcess"])
def test_unknown_container_is_an_invalid_argument(machine: GuestMachine, method: str) -> None:
    request = agent_pb2.StatsContainerRequest(container_id="nobody")
    with pytest.raises(StatusError, match="invalid container id") as refused:
        machine.client.call(method, request)
    assert refused.value.code == 3


def test_devices_outside_the_rules_are_closed(new_container: Callable[[], Life]) -> None:
    container = new_container()
    script = "cat /dev/null && echo null; mknod /tmp/mem c 1 1; cat /tmp/mem 2>&1 | grep -o 'not permitted'"
    whole = spec(container.id, process("sh", "-c", script))
    for capabilities in (whole.Process.Capabilities.Effective, whole.Process.Capabilities.Permitted):
        capabilities.append("CAP_MKNOD")
    whole.Process.Capabilities.Bounding.append("CAP_MKNOD")
    rule = oci_pb2.LinuxDeviceCgroup
    whole.Linux.Resources.Devices.extend(
        [rule(Allow=False, Access="rwm"), rule(Allow=True, Type="c", Major=1, Minor=1, Access="m")]
    )
    container.create_from(whole)
    container.start()
    assert container.read_all() == b"null\nnot permitted\n"


def test_seccomp_filters_calls(new_container: Callable[[], Life]) -> None:
    container = new_container()
    whole = spec(container.id, process("sh", "-c", "mkdir /tmp/x; echo $?"))
    whole.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
    whole.Linux.Seccomp.Architectures.append("SCMP_ARCH_X86_64")
    whole.Linux.Seccomp.Syscalls.append(
        oci_pb2.LinuxSyscall(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=95)
    )
    container.create_from(whole)
    container.start()
    assert container.read_all() == b"1\n"
    assert b"Operation not supported" in container.read_all("ReadStderr")


def test_storages_are_mounted_and_given_back(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    layers = "/run/kata-containers/sandbox/layers"
    storage = agent_pb2.Storage
    whole = spec(container.id, process("sh", "-c", "echo new > /etc/new && cat /etc/new && ls /scratch"))
    storages = [
        storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=layers, options=["size=8m"]),
        storage(driver="local", source="local", fstype="local", mount_point=f"{layers}/upper"),
        storage(driver="local", source="local", fstype="local", mount_point=f"{layers}/work"),
        storage(
            driver="local", source="local", fstype="local", mount_point="/run/scratch", options=["mode=0777"]
        ),
        storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            mount_point=f"/run/kata-containers/{container.id}/rootfs",
            options=[
                f"lowerdir={SHARE}/{container.id}/rootfs",
                f"upperdir={layers}/upper",
                f"workdir={layers}/work",
            ],
        ),
    ]
    whole.Mounts.append(
        oci_pb2.Mount(destination="/scratch", type="bind", source="/run/scratch", options=["rbind", "rw"])
    )
    container.create_from(whole, storages=storages)
    container.start()
    assert container.read_all() == b"new\n"
    assert container.wait() == 0
    assert not (machine.share / container.id / "rootfs/etc/new").exists()


def test_copied_file_is_seen_by_the_container(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    path = f"{SHARE}/{container.id}/rootfs/etc/copied"
    request = agent_pb2.CopyFileRequest(
        path=path, file_size=6, file_mode=stat.S_IFREG | 0o644, data=b"copied"
    )
    machine.client.call("CopyFile", request)
    container.run("cat", "/etc/copied")
    assert container.read_all() == b"copied"


def test_a_volume_has_all_written_data_once_the_container_is_removed(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    container.run("dd", "if=/dev/zero", "of=/written", "bs=64k", "count=32")
    assert container.wait() == 0
    container.remove()
    assert (machine.share / container.id / "rootfs/written").read_bytes() == bytes(2 << 20)


def test_many_containers_at_once(new_container: Callable[[], Life]) -> None:
    containers = [new_container() for _ in range(8)]

    def live(numbered: tuple[int, Life]) -> tuple[int, bytes]:
        number, container = numbered
        container.run("sh", "-c", f"echo {number}; exit {number}")
        return container.wait(), container.read_all()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(live, enumerate(containers)))
    assert results == [(number, f"{number}\n".encode()) for number in range(8)]


def test_many_execs_at_once(new_container: Callable[[], Life]) -> None:
    container = new_container()
    container.run("cat")

    def live(number: int) -> tuple[int, bytes]:
        name = f"e{number}"
        container.execute(name, "sh", "-c", f"echo {number}; exit {number}")
        output = container.read_all(exec_id=name)
        return container.wait(name), output

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(live, range(16)))
    assert results == [(number, f"{number}\n".encode()) for number in range(16)]


def test_clock_is_set(machine: GuestMachine, new_container: Callable[[], Life]) -> None:
    machine.client.call("SetGuestDateTime", agent_pb2.SetGuestDateTimeRequest(Sec=2_000_000_000, Usec=0))
    container = new_container()
    container.run("date", "+%s")
    shown = int(container.read_all())
    machine.client.call("SetGuestDateTime", agent_pb2.SetGuestDateTimeRequest(Sec=int(time.time())))
    assert 2_000_000_000 <= shown < 2_000_000_000 + ANSWER_S


def test_the_machine_has_an_id(new_container: Callable[[], Life]) -> None:
    container = new_container()
    whole = spec(container.id, process("cat", "/etc/machine-id"))
    whole.Mounts.add(destination="/etc/machine-id", source="/etc/machine-id", options=["bind", "ro"])
    container.create_from(whole)
    container.start()
    assert re.fullmatch(rb"[0-9a-f]{32}\n", container.read_all())


def test_random_source_is_reseeded(machine: GuestMachine) -> None:
    machine.client.call("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=bytes(range(64))))
    with pytest.raises(StatusError) as refused:
        machine.client.call("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest())
    assert refused.value.code == 3
