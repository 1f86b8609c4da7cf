"""A container's cgroup (v2): freezing, killing and counting, straight through its control files."""

from __future__ import annotations

import os
import select
import time

from guest.agent import files
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest.agent.wire import Codec, Message

_ROOT = "/sys/fs/cgroup"
_FREEZE_TIMEOUT_S = 10.0
_NANOSECONDS_PER_MICROSECOND = 1000


def path_of(wanted: str, container_id: str) -> str:
    """Choose a container's cgroup.

    :param wanted: the specification's path; colons of systemd's form become levels.
    :param container_id: names the cgroup if the specification does not.
    :returns: an absolute path below the hierarchy's root, without dots.
    """
    parts = [part for part in wanted.replace(":", "/").split("/") if part not in {"", ".", ".."}]
    return "/" + "/".join(parts or [container_id])


def kill(path: str) -> None:
    """Kill every process in a cgroup at once; the cgroup may be empty.

    :param path: the cgroup.
    :raises OSError: if the kernel refuses.
    """
    try:
        files.write(f"{_ROOT}{path}/cgroup.kill", "1")
    except FileNotFoundError:
        return


def pids(path: str) -> list[int]:
    """List the processes in a cgroup and below it, the oldest first.

    :param path: the cgroup.
    :raises OSError: if there is no such cgroup.
    """
    found = [int(line) for line in files.read(f"{_ROOT}{path}/cgroup.procs").split()]
    with os.scandir(f"{_ROOT}{path}") as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += pids(f"{path}/{entry.name}")
    return sorted(found)


def remove(path: str) -> None:
    """Remove a cgroup and all cgroups below it.

    :param path: the cgroup; nothing happens if there is none.
    :raises OSError: if a process is in one of them.
    """
    try:
        with os.scandir(f"{_ROOT}{path}") as entries:
            below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for name in below:
        remove(f"{path}/{name}")
    os.rmdir(f"{_ROOT}{path}")


def freeze(path: str, *, frozen: bool) -> None:
    """Freeze or thaw a cgroup, and wait until the kernel has done so.

    :param path: the cgroup.
    :param frozen: the wanted state.
    :raises AgentError: if it is not reached in time.
    :raises OSError: if the kernel refuses.
    """
    events = os.open(f"{_ROOT}{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.write(f"{_ROOT}{path}/cgroup.freeze", "1" if frozen else "0")
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        deadline = time.monotonic() + _FREEZE_TIMEOUT_S
        while f"frozen {int(frozen)}" not in os.pread(events, 4096, 0).decode():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentError(
                    f"freeze: {path}: not reached in {_FREEZE_TIMEOUT_S:.0f} s; kill the container"
                )
            poll.poll(int(left * 1000) + 1)
    finally:
        os.close(events)


def set_limit(path: str, name: str, value: str = "") -> None:
    """Write to a control file.

    :param path: the cgroup.
    :param name: the file's.
    :param value: what to write.
    :raises AgentError: if there is no such file, or it does not take the value.
    """
    try:
        if "/" in name:
            raise FileNotFoundError
        files.write(f"{_ROOT}{path}/{name}", value)
    except FileNotFoundError:
        raise AgentError(
            f"update: {name}: the guest's control groups have no such file; leave it out"
        ) from None
    except OSError as error:
        raise AgentError(f"update: {name} = {value}: {error.strerror}; choose another value") from error


def open_kills(path: str) -> int:
    """Open the file that :func:`kills` reads; poll(2) reports its changes as POLLPRI.

    :param path: the cgroup.
    :returns: a descriptor, the caller's to close.
    :raises FileNotFoundError: if the cgroup has no memory controller.
    """
    return os.open(f"{_ROOT}{path}/memory.events", os.O_RDONLY | os.O_CLOEXEC)


def kills(fd: int) -> int:
    """Count the processes killed for memory in a cgroup and below.

    :param fd: what :func:`open_kills` returned.
    :raises OSError: if the cgroup is gone.
    """
    for line in os.pread(fd, 4096, 0).decode().splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return 0


def _pairs(file: str) -> dict[str, int]:
    try:
        lines = files.read(file).splitlines()
    except FileNotFoundError:
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines) if value.isdigit()}


def _number(file: str) -> int:
    """Read one number; ``max`` and a missing controller count as 0."""
    try:
        text = files.read(file).strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdigit() else 0


def stats(path: str, codec: Codec) -> Message:
    """Count the resources that a container uses.

    :param path: its cgroup.
    :param codec: makes the messages.
    :returns: grpc.CgroupStats.
    """
    base = f"{_ROOT}{path}"
    new = codec.new
    return new(
        "grpc.CgroupStats",
        cpu_stats=_cpu(base, codec),
        memory_stats=_memory(base, codec),
        pids_stats=new(
            "grpc.PidsStats",
            current=_number(f"{base}/pids.current"),
            limit=_number(f"{base}/pids.max"),
        ),
        blkio_stats=new("grpc.BlkioStats", io_service_bytes_recursive=_io(base, codec)),
        hugetlb_stats=_hugetlb(base, codec),
    )


def _cpu(base: str, codec: Codec) -> Message:
    cpu = _pairs(f"{base}/cpu.stat")

    def nanoseconds(key: str) -> int:
        return cpu.get(key, 0) * _NANOSECONDS_PER_MICROSECOND

    return codec.new(
        "grpc.CpuStats",
        cpu_usage=codec.new(
            "grpc.CpuUsage",
            total_usage=nanoseconds("usage_usec"),
            usage_in_kernelmode=nanoseconds("system_usec"),
            usage_in_usermode=nanoseconds("user_usec"),
        ),
        throttling_data=codec.new(
            "grpc.ThrottlingData",
            periods=cpu.get("nr_periods", 0),
            throttled_periods=cpu.get("nr_throttled", 0),
            throttled_time=nanoseconds("throttled_usec"),
        ),
    )


def _memory(base: str, codec: Codec) -> Message:
    counters = _pairs(f"{base}/memory.stat")
    events = _pairs(f"{base}/memory.events")
    usage = codec.new(
        "grpc.MemoryData",
        usage=_number(f"{base}/memory.current"),
        max_usage=_number(f"{base}/memory.peak"),
        failcnt=events.get("max", 0),
        limit=_number(f"{base}/memory.max"),
    )
    swap = codec.new(
        "grpc.MemoryData",
        usage=_number(f"{base}/memory.swap.current"),
        limit=_number(f"{base}/memory.swap.max"),
    )
    return codec.new(
        "grpc.MemoryStats",
        cache=counters.get("file", 0),
        usage=usage,
        swap_usage=swap,
        kernel_usage=codec.new("grpc.MemoryData", usage=counters.get("kernel", 0)),
        use_hierarchy=True,
        stats=counters,
    )


def _io(base: str, codec: Codec) -> list[Message]:
    operations = {"rbytes": "read", "wbytes": "write", "rios": "rios", "wios": "wios"}
    entries = []
    for line in files.read(f"{base}/io.stat").splitlines() if files.exists(f"{base}/io.stat") else ():
        device, *values = line.split()
        major, _, minor = device.partition(":")
        for key, _, value in (item.partition("=") for item in values):
            if key in operations:
                fields: dict[str, Any] = {"op": operations[key], "value": int(value)}
                entries.append(
                    codec.new("grpc.BlkioStatsEntry", major=int(major), minor=int(minor), **fields)
                )
    return entries


def _hugetlb(base: str, codec: Codec) -> dict[str, Message]:
    sizes = [
        name.split(".")[1]
        for name in os.listdir(base)
        if name.startswith("hugetlb.") and name.endswith(".current") and "rsvd" not in name
    ]
    return {
        size: codec.new(
            "grpc.HugetlbStats",
            usage=_number(f"{base}/hugetlb.{size}.current"),
            failcnt=_pairs(f"{base}/hugetlb.{size}.events").get("max", 0),
        )
        for size in sizes
    }
