"""Every field of the runtime specification has a row in the table of fields."""

from __future__ import annotations

from typing import Any

import pytest

from proto.kata import oci_pb2
from shim.agent.oci import translate
from shim.agent.oci_fields import ROWS, Fate, Row, copy
from shim.errors import InvalidArgument
from shim.sandbox.inheritance import Inheritance

# https://github.com/opencontainers/runtime-spec/tree/v1.2.0: object, then its fields.
SPECIFICATION = """
: ociVersion hostname domainname annotations
root: path readonly
mounts: destination type source options uidMappings gidMappings
process: terminal args commandLine env cwd noNewPrivileges apparmorProfile oomScoreAdj selinuxLabel
process.consoleSize: height width
process.user: uid gid umask additionalGids username
process.capabilities: bounding effective inheritable permitted ambient
process.rlimits: type soft hard
process.scheduler: policy nice priority flags runtime deadline period
process.ioPriority: class priority
process.execCPUAffinity: initial final
hooks.prestart: path args env timeout
hooks.createRuntime: path args env timeout
hooks.createContainer: path args env timeout
hooks.startContainer: path args env timeout
hooks.poststart: path args env timeout
hooks.poststop: path args env timeout
linux: sysctl cgroupsPath rootfsPropagation maskedPaths readonlyPaths mountLabel
linux.uidMappings: containerID hostID size
linux.gidMappings: containerID hostID size
linux.namespaces: type path
linux.timeOffsets: boottime monotonic
linux.devices: path type major minor fileMode uid gid
linux.personality: domain flags
linux.intelRdt: closID l3CacheSchema memBwSchema enableCMT enableMBM
linux.seccomp: defaultAction defaultErrnoRet architectures flags listenerPath listenerMetadata
linux.seccomp.syscalls: names action errnoRet
linux.seccomp.syscalls.args: index value valueTwo op
linux.resources: unified
linux.resources.devices: allow type major minor access
linux.resources.memory: limit reservation swap kernel kernelTCP swappiness disableOOMKiller useHierarchy
linux.resources.memory: checkBeforeUpdate
linux.resources.cpu: shares quota burst period realtimeRuntime realtimePeriod cpus mems idle
linux.resources.pids: limit
linux.resources.blockIO: weight leafWeight
linux.resources.blockIO.weightDevice: major minor weight leafWeight
linux.resources.blockIO.throttleReadBpsDevice: major minor rate
linux.resources.blockIO.throttleWriteBpsDevice: major minor rate
linux.resources.blockIO.throttleReadIOPSDevice: major minor rate
linux.resources.blockIO.throttleWriteIOPSDevice: major minor rate
linux.resources.hugepageLimits: pageSize limit
linux.resources.network: classID
linux.resources.network.priorities: name priority
linux.resources.rdma: hcaHandles hcaObjects
solaris: milestone
windows: layerFolders
zos: namespaces
vm.hypervisor: path parameters
vm.kernel: path parameters initrd
vm.image: path format
"""
PATHS = [
    f"{parent}.{name}" if parent else name
    for line in SPECIFICATION.strip().splitlines()
    for parent, _, names in [line.partition(":")]
    for name in names.split()
]
REFUSED = [row.path for row in ROWS if row.fate is Fate.REFUSED]


def nested(path: str, value: Any) -> dict[str, Any]:
    """Build the part of a specification that sets one field."""
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def row_of(path: str) -> Row:
    """The row of a field, or of the object that contains it."""
    rows = {row.path: row for row in ROWS}
    while path not in rows:
        path, dot, _ = path.rpartition(".")
        assert dot, "neither the field nor an object that contains it has a row"
    return rows[path]


@pytest.mark.parametrize("path", PATHS)
def test_every_field_of_the_specification_has_a_row(path: str) -> None:
    assert path.startswith(row_of(path).path)


def test_every_row_is_for_an_existing_field() -> None:
    later = {"linux.netDevices", "linux.memoryPolicy", "freebsd"}  # newer than 1.2, and refused already
    known = set(PATHS) | {path.rpartition(".")[0] for path in PATHS}
    known |= {parent.rpartition(".")[0] for parent in known}
    assert {row.path for row in ROWS} - known - later == set()


def test_no_field_has_two_rows() -> None:
    assert len({row.path for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.fate is not Fate.SENT], ids=lambda row: row.path)
def test_every_row_that_is_not_sent_has_a_reason(row: Any) -> None:
    assert row.why


@pytest.mark.parametrize("row", [row for row in ROWS if row.fate is Fate.SENT], ids=lambda row: row.path)
def test_every_sent_row_has_a_field_in_the_agents_message(row: Any) -> None:
    descriptor: Any = oci_pb2.Spec.DESCRIPTOR
    for name in row.path.split("."):
        field = next(field for field in descriptor.fields if field.name.lower() == name.lower())
        descriptor = field.message_type


@pytest.mark.parametrize("path", REFUSED)
def test_a_refusal_names_the_field_and_the_reason(path: str) -> None:
    row = row_of(path)
    value: Any = {"any": 1} if path in {"vm", "windows", "solaris", "zos", "freebsd"} else 7
    spec = {"process": {"args": ["x"], "cwd": "/"}} | nested(path, value)
    if path.startswith("process."):
        spec["process"] |= {"args": ["x"], "cwd": "/"}
    if path.startswith("mounts."):
        spec["mounts"] = [{"destination": "/x", "type": "tmpfs", path.partition(".")[2]: [{"size": 1}]}]
    if path.startswith("linux.seccomp."):
        spec["linux"]["seccomp"]["defaultAction"] = "SCMP_ACT_ALLOW"
    with pytest.raises(InvalidArgument) as caught:
        translate(
            spec,
            container_id="box",
            sandbox_id="pod",
            terminal=False,
            seccomp=True,
            inheritance=Inheritance({}, oom_score_adj=0),
        )
    assert str(caught.value) == f"spec: {path}: {row.why}"


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, {"weight": 0}], ids=repr)
@pytest.mark.parametrize("path", [path for path in REFUSED if path.startswith("linux.resources.")])
def test_an_empty_value_is_not_refused(path: str, value: Any) -> None:
    name = path.removeprefix("linux.resources.")
    message = oci_pb2.LinuxResources()
    copy(nested(name, value), message, path="linux.resources")
    assert not any(field.message_type is None for field, _ in message.ListFields())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("process.apparmorProfile", "cri-containerd.apparmor.d"),
        ("process.selinuxLabel", "system_u:system_r:container_t:s0"),
        ("linux.mountLabel", "system_u:object_r:container_file_t:s0"),
        ("linux.resources.cpu.cpus", "0-3"),
        ("linux.resources.cpu.mems", "0"),
        ("linux.resources.memory.swappiness", 60),
        ("hooks.createRuntime", [{"path": "/usr/bin/true"}]),
    ],
)
def test_dropped_fields_and_fields_for_the_host_are_not_sent(path: str, value: Any) -> None:
    message = oci_pb2.Spec()
    copy(nested(path, value), message, path="")
    assert str(value) not in str(message)
    assert row_of(path).fate in {Fate.DROPPED, Fate.DONE}


@pytest.mark.parametrize(
    "broken",
    [
        nested("process.args", "sh"),
        nested("process.rlimits", {"type": "RLIMIT_NOFILE"}),
        nested("process.noNewPrivileges", "yes"),
        nested("linux.sysctl", ["a"]),
        nested("linux.seccomp.syscalls", "all"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_an_error(broken: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        copy(broken, oci_pb2.Spec(), path="")
