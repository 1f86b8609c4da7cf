"""Containers under KVM: the differences from emulation, in one machine that boots and one that is cloned.

``scripts/test --kvm`` runs this in an outer machine; a host with KVM, vhost-vsock and vhost-net needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proto.extensions import AGENT_PORT, RAW_STREAM_PORT
from shim.telemetry.timeline_model import parse
from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.containerd import NAMESPACE
from tests.e2e.life import until
from tests.e2e.test_descriptors import open_files
from tests.e2e.test_network import digesting_server
from tests.host_settings import MEMORY_MIB
from tests.network_space import add_cable, new_space
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Stack
    from tests.network_space import Space

pytestmark = [
    pytest.mark.hako,
    pytest.mark.skipif(
        not Path("/dev/vhost-vsock").exists(), reason="no KVM for guests here; scripts/test --kvm has one"
    ),
]

MIB = 1 << 20
CLONES, REPORTED = 100, 10
OF_A_CLONE = ("load template", "copy memory", "clone goes on", "first answer")
"""The phases of a clone's start, each with its own limit."""

HIGHEST_PRIVILEGED_PORT = 1023
SENT = bytes(range(256)) * 4096
DISK = b"on the host's disk\n".ljust(MIB, b".")
TALK = "cat /data/bytes | nc -w 60 10.1.0.1 7000"


@pytest.fixture(scope="module")
def outside() -> Iterator[Space]:
    with new_space() as space:
        yield space


@pytest.fixture(scope="module")
def pod(outside: Space) -> Iterator[Space]:
    with new_space() as space:
        add_cable(space, outside, "eth0", number=1)
        yield space


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("disk") / "disk"
    file.write_bytes(DISK)
    argv: list[str | Path] = ["/usr/sbin/losetup", "--find", "--show", file]
    device = Path(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip())
    yield device
    subprocess.run(["/usr/sbin/losetup", "--detach", device], check=True)


@pytest.fixture(scope="module")
def booted(
    one_stack: Stack, pod: Space, disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A container whose machine boots, and is given a disk, a network card, a processor and memory."""
    data = tmp_path_factory.mktemp("data")
    (data / "bytes").write_bytes(SENT)
    options: list[str | Path] = [
        *("--detach", "--annotation", "io.hako.template=off", f"--with-ns=network:{pod.path}"),
        *(
            "--device",
            disk,
            "--memory-limit",
            str(128 * MIB),
            "--cpu-quota",
            "50000",
            "--cpu-period",
            "100000",
        ),
        *("--mount", f"type=bind,src={data},dst=/data,options=rbind:ro"),
    ]
    yield from running(one_stack, options)


@pytest.fixture(scope="module")
def cloned(one_stack: Stack) -> Iterator[str]:
    """A container whose machine continues where the template was saved."""
    yield from running(one_stack, ["--detach"])


def running(stack: Stack, options: list[str | Path]) -> Iterator[str]:
    name = new_id()
    try:
        started = stack.containerd.run(IMAGE, name, "sleep", "100000", options=options)
        assert started.code == 0, started.stderr
        yield name
    finally:
        stack.containerd.remove(name)


def shell(stack: Stack, name: str, script: str) -> str:
    result = stack.containerd.exec(name, new_id(), "sh", "-c", script)
    assert result.code == 0, (script, result.stdout, result.stderr)
    return result.stdout


def test_a_machine_runs_under_kvm_with_the_kernels_vsock_and_network(one_stack: Stack, booted: str) -> None:
    qemu = one_stack.containerd.tasks()[booted][0]
    assert b"kvm,kernel-irqchip=on" in Path(f"/proc/{qemu}/cmdline").read_bytes().split(b"\0")
    assert {"anon_inode:kvm-vm", "/dev/vhost-vsock", "/dev/vhost-net"} <= open_files(qemu)


@pytest.mark.parametrize("port", [AGENT_PORT, RAW_STREAM_PORT], ids=["agent", "streams"])
def test_the_guest_hangs_up_on_callers_without_a_privileged_port(
    one_stack: Stack, booted: str, port: int
) -> None:
    command = Path(f"/proc/{one_stack.containerd.tasks()[booted][0]}/cmdline").read_text(encoding="utf-8")
    found = re.search(r"guest-cid=(\d+)", command)
    assert found, command
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as caller:
        caller.settimeout(patient(10))
        caller.connect((int(found[1]), port))  # from a port that any user may have
        assert caller.getsockname()[1] > HIGHEST_PRIVILEGED_PORT
        with contextlib.suppress(ConnectionResetError):
            assert caller.recv(1) == b""


def test_an_exec_has_its_streams_and_its_exit_code(one_stack: Stack, booted: str) -> None:
    script = "cat; seq 1 20000; echo error >&2; exit 42"
    result = one_stack.containerd.exec(booted, new_id(), "sh", "-c", script, stdin="said\n")
    assert result.code == 42
    assert result.stdout.split() == ["said", *(str(number) for number in range(1, 20001))]
    assert result.stderr.startswith("error\n")


def test_a_machine_has_the_disk_card_processor_and_memory_that_were_plugged(
    one_stack: Stack, booted: str, disk: Path
) -> None:
    looks = (
        f"sha256sum <{disk} | cut -d' ' -f1",
        "nproc",
        "awk '/MemTotal/ { print $2 }' /proc/meminfo",
        "ls /sys/class/net/eth0/queues",
    )
    digest, processors, kib, *queues = shell(one_stack, booted, "; ".join(looks)).split()
    assert digest == hashlib.sha256(DISK).hexdigest()
    assert int(processors) == 2
    assert int(kib) // 1024 > MEMORY_MIB
    assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"], "a pair for each processor"


def test_packets_reach_the_guest_through_the_hosts_kernel(
    one_stack: Stack, booted: str, outside: Space
) -> None:
    with digesting_server(outside, socket.AF_INET, "10.1.0.1"):
        assert shell(one_stack, booted, TALK) == hashlib.sha256(SENT).hexdigest()


def test_a_clone_goes_on_and_has_the_time_of_its_host(one_stack: Stack, cloned: str) -> None:
    log = one_stack.containerd.log
    until(lambda: ": cloned" in log.read_text(encoding="utf-8"), what="containerd's log says so")
    before_s = time.time()
    seen_s = int(shell(one_stack, cloned, "date +%s"))
    assert before_s - 1 <= seen_s <= time.time() + 1


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_hundred_clones_answer(one_stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    log, records = one_stack.containerd.log, one_stack.state_directory.parent / "log"
    before = log.read_text(encoding="utf-8").count(": cloned")
    took_s: dict[str, list[float]] = {phase: [] for phase in OF_A_CLONE}
    for number in range(CLONES):
        name = new_id()
        result = one_stack.containerd.run(IMAGE, name, "echo", f"{number}")
        assert (result.code, result.stdout) == (0, f"{number}\n"), result.stderr
        timeline = parse((records / f"{NAMESPACE}__{name}.timeline").read_text(), title=name)
        for phase in timeline.phases:
            if phase.name in took_s:
                took_s[phase.name].append(phase.ended_s - phase.began_s)
        until(partial(has_cloned, log, before + number + 1), what="containerd's log counts the clone")
        if (number + 1) % REPORTED == 0:
            with capsys.disabled():
                print(
                    f"\n{number + 1} clones, median and worst: {', '.join(map(phrase, took_s.items()))}",
                    end="",
                )


def has_cloned(log: Path, times: int) -> bool:
    """Tell whether all of so many starts were those of clones, by what containerd has copied to its log."""
    return log.read_text(encoding="utf-8").count(": cloned") == times


def phrase(step: tuple[str, list[float]]) -> str:
    name, times_s = step
    return f"{name} {statistics.median(times_s):.1f} and {max(times_s):.1f} s"
