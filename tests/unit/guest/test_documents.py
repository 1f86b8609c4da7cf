"""The agent writes JSON for crun, with OCI objects translated from the protocol."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.agent import cgroup, json_out, oci, storage, sysctl
from guest.agent.errors import AgentError
from guest.agent.wire import Codec, Message
from guest.image import schema
from proto.kata import oci_pb2

CODEC = Codec(schema.messages())
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def translated(reference: oci_pb2.Spec | oci_pb2.Process | oci_pb2.LinuxResources) -> Message:
    return CODEC.decode(reference.DESCRIPTOR.full_name, reference.SerializeToString())


@given(DOCUMENTS)
def test_json_survives_a_round_trip(document: object) -> None:
    assert json.loads(json_out.dumps(document)) == document


def test_json_refuses_values_it_cannot_express() -> None:
    with pytest.raises(TypeError, match="float"):
        json_out.dumps([1.5])


def test_a_process_is_translated_whole() -> None:
    process = oci_pb2.Process(
        Terminal=True,
        ConsoleSize=oci_pb2.Box(Height=24, Width=80),
        User=oci_pb2.User(UID=1, GID=2, AdditionalGids=[3]),
        Args=["a"],
        Env=["K=V"],
        Cwd="/w",
        Capabilities=oci_pb2.LinuxCapabilities(Bounding=["CAP_KILL", "CHOWN"]),
        Rlimits=[oci_pb2.POSIXRlimit(Type="RLIMIT_NOFILE", Hard=2, Soft=1)],
        NoNewPrivileges=True,
        OOMScoreAdj=-5,
        ApparmorProfile="left out",
    )
    assert oci.process(translated(process)) == {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
        "args": ["a"],
        "env": ["K=V"],
        "cwd": "/w",
        "capabilities": {
            "bounding": ["CAP_KILL", "CAP_CHOWN"],
            "effective": [],
            "inheritable": [],
            "permitted": [],
            "ambient": [],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
    }


def test_an_empty_process_has_the_protocols_defaults() -> None:
    document = oci.process(translated(oci_pb2.Process()))
    assert (document["args"], document["cwd"], document["user"]) == (["sh"], "/", {"uid": 0, "gid": 0})
    assert "capabilities" not in document


def test_zero_limits_and_cgroup_v1_limits_are_left_out() -> None:
    resources = oci_pb2.LinuxResources(
        Devices=[
            oci_pb2.LinuxDeviceCgroup(Allow=False, Access="rwm"),
            oci_pb2.LinuxDeviceCgroup(Allow=True, Type="c", Major=1, Minor=3, Access="rw"),
        ],
        Memory=oci_pb2.LinuxMemory(Limit=1 << 20, Kernel=5, Swappiness=60),
        CPU=oci_pb2.LinuxCPU(Quota=5000, Period=10000, Cpus="0", RealtimePeriod=1),
        Pids=oci_pb2.LinuxPids(Limit=10),
    )
    assert oci.resources(translated(resources)) == {
        "devices": [
            {"allow": False, "type": "a", "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"},
        ],
        "memory": {"limit": 1 << 20},
        "cpu": {"quota": 5000, "period": 10000, "cpus": "0"},
        "pids": {"limit": 10},
    }


def test_an_update_can_lift_a_limit() -> None:
    resources = oci_pb2.LinuxResources(
        Memory=oci_pb2.LinuxMemory(Limit=-1),
        CPU=oci_pb2.LinuxCPU(Quota=-1),
        Pids=oci_pb2.LinuxPids(Limit=-1),
    )
    assert oci.resources(translated(resources)) == {
        "memory": {"limit": -1},
        "cpu": {"quota": -1},
        "pids": {"limit": -1},
    }


def test_annotations_carry_values_without_a_protocol_field() -> None:
    annotations = {"io.hako.unified/memory.high": "max", "io.hako.seccomp/default-errno": "38", "a": "b"}
    spec = oci_pb2.Spec(
        Annotations=annotations,
        Process=oci_pb2.Process(),
        Root=oci_pb2.Root(),
        Linux=oci_pb2.Linux(Seccomp=oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ERRNO")),
    )
    linux = oci.spec(translated(spec), rootfs="/r", namespaces=[], cgroup="/c")["linux"]
    assert linux["resources"] == {"unified": {"memory.high": "max"}}
    assert linux["seccomp"]["defaultErrnoRet"] == 38


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kernel.shmmax", "/proc/sys/kernel/shmmax"),
        ("net.ipv4.conf.eth0/100.forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
        ("net/ipv4/conf/eth0.100/forwarding", "/proc/sys/net/ipv4/conf/eth0.100/forwarding"),
    ],
)
def test_a_sysctl_is_a_file(name: str, path: str) -> None:
    assert sysctl.path_of(name) == path


@pytest.mark.parametrize("name", ["", "kernel", "../etc/passwd", "net/../../etc", "a//b", "a..b", "/a/b"])
def test_a_sysctl_never_leaves_its_directory(name: str) -> None:
    with pytest.raises(AgentError, match="not a parameter's name"):
        sysctl.path_of(name)


@pytest.mark.parametrize(("given_errno", "expected"), [(None, 1), (0, 0), (38, 38)])
def test_seccomp_errno_is_eperm_unless_given(given_errno: int | None, expected: int) -> None:
    rule = oci_pb2.LinuxSyscall(Names=["ptrace"], Action="SCMP_ACT_ERRNO")
    if given_errno is not None:
        rule.errnoret = given_errno
    spec = oci_pb2.Spec(
        Process=oci_pb2.Process(),
        Root=oci_pb2.Root(Readonly=True),
        Linux=oci_pb2.Linux(Seccomp=oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ALLOW", Syscalls=[rule])),
    )
    document = oci.spec(translated(spec), rootfs="/r", namespaces=[{"type": "mount"}], cgroup="/c")
    assert document["linux"]["seccomp"]["syscalls"][0]["errnoRet"] == expected
    assert document["root"] == {"path": "/r", "readonly": True}


@pytest.mark.parametrize(
    ("namespaces", "named"),
    [([{"type": "uts"}], True), ([{"type": "uts", "path": "/run/ns/uts"}], False), ([], False)],
)
def test_the_hostname_is_set_only_in_a_new_uts_namespace(
    namespaces: list[dict[str, str]], *, named: bool
) -> None:
    spec = oci_pb2.Spec(Hostname="h", Process=oci_pb2.Process(), Root=oci_pb2.Root(), Linux=oci_pb2.Linux())
    document = oci.spec(translated(spec), rootfs="/r", namespaces=namespaces, cgroup="/c")
    assert ("hostname" in document) is named


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("", "/cid"),
        ("/kubepods/pod1/cid", "/kubepods/pod1/cid"),
        ("system.slice:cri:abc", "/system.slice/cri/abc"),
        ("/../../etc", "/etc"),
        ("::", "/cid"),
    ],
)
def test_the_cgroup_path_is_translated(wanted: str, path: str) -> None:
    assert cgroup.path_of(wanted, "cid") == path


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        (["ro", "nosuid", "size=1m", "mode=755"], 3, "size=1m,mode=755"),
        (["ro", "rw"], 0, ""),
        (["rbind"], 4096 | 16384, ""),
        (["", "defaults"], 0, ""),
        (["_netdev", "nofail", "x-systemd.automount", "nouuid", "noatime"], 1024, "nouuid"),
    ],
)
def test_mount_options_are_split(options: list[str], flags: int, data: str) -> None:
    assert storage.split_options(options) == (flags, data)
