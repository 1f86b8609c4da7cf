"""A container's specification is translated into what the guest can do."""

from __future__ import annotations

from typing import Any

import pytest

from hypervisor import DiskLimits
from shim.agent.guest_names import agent_id
from shim.agent.guest_paths import SHARE_DIRECTORY, SHM_DIRECTORY
from shim.agent.oci import Translation, translate, translate_resources
from shim.agent.oci_process import translate_process
from shim.errors import InvalidArgument
from shim.sandbox.inheritance import Inheritance

NOTHING = Inheritance({}, oom_score_adj=0)


def spec(**parts: Any) -> dict[str, Any]:
    return {
        "ociVersion": "1.1.0",
        "process": {"args": ["true"], "cwd": "/"},
        "root": {"path": "rootfs"},
    } | parts


def translated(*, seccomp: bool = True, terminal: bool = False, **parts: Any) -> Translation:
    return translate(
        spec(**parts),
        container_id="box",
        sandbox_id="pod",
        terminal=terminal,
        seccomp=seccomp,
        inheritance=NOTHING,
    )


def test_the_whole_process_is_sent() -> None:
    process = translated(
        process={
            "args": ["sh", "-c", "id"],
            "env": ["A=1"],
            "cwd": "/tmp",
            "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 6]},
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "ambient": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
            "noNewPrivileges": True,
            "oomScoreAdj": -998,
            "consoleSize": {"height": 40, "width": 120},
        },
        terminal=True,
    ).spec.Process
    assert list(process.Args) == ["sh", "-c", "id"]
    assert list(process.Env) == ["A=1"]
    assert process.Cwd == "/tmp"
    assert (process.User.UID, process.User.GID, list(process.User.AdditionalGids)) == (1000, 1001, [5, 6])
    assert list(process.Capabilities.Bounding) == ["CAP_CHOWN"]
    assert list(process.Capabilities.Ambient) == ["CAP_KILL"]
    assert (process.Rlimits[0].Type, process.Rlimits[0].Hard, process.Rlimits[0].Soft) == (
        "RLIMIT_NOFILE",
        1024,
        512,
    )
    assert process.NoNewPrivileges
    assert process.OOMScoreAdj == -998
    assert (process.ConsoleSize.Height, process.ConsoleSize.Width) == (40, 120)
    assert process.Terminal


def test_empty_capabilities_are_not_inherited_ones() -> None:
    assert translated().spec.Process.HasField("Capabilities")


def test_terminal_in_the_request_overrides_the_specification() -> None:
    process = {"args": ["sh"], "cwd": "/", "terminal": True}
    assert not translated(process=process, terminal=False).spec.Process.Terminal


def test_the_root_is_where_the_guest_sees_it() -> None:
    root = translated(root={"path": "rootfs", "readonly": True}).spec.Root
    assert (root.Path, root.Readonly) == (f"{SHARE_DIRECTORY}/{agent_id('box')}/rootfs", True)


def test_host_namespaces_are_not_taken_literally() -> None:
    linux = translated(
        linux={
            "namespaces": [
                {"type": "network", "path": "/proc/1/ns/net"},
                {"type": "ipc", "path": "/proc/1/ns/ipc"},
                {"type": "mount"},
                {"type": "time"},
                {"type": "cgroup"},
                {"type": "pid"},
            ]
        }
    ).spec.Linux
    assert {n.Type for n in linux.Namespaces} == {"ipc", "uts", "mount"}
    assert not any(n.Path for n in linux.Namespaces)


@pytest.mark.parametrize(("path", "shared"), [("", False), ("/proc/7/ns/pid", True)])
def test_a_pid_namespace_with_a_path_is_shared_with_the_sandbox(path: str, *, shared: bool) -> None:
    namespaces = [{"type": "network"}, {"type": "ipc"}, {"type": "pid", "path": path}]
    assert translated(linux={"namespaces": namespaces}).sandbox_pidns is shared


def test_a_host_file_is_shared_under_a_unique_name() -> None:
    result = translated(
        mounts=[
            {
                "destination": "/etc/resolv.conf",
                "type": "bind",
                "source": "/var/x/resolv.conf",
                "options": ["rbind", "ro"],
            }
        ]
    )
    (share,) = result.shared_mounts
    assert share is not None
    assert (share.source, share.options) == ("/var/x/resolv.conf", ("rbind", "ro"))
    assert not share.is_updated


@pytest.mark.parametrize("source", ["/proc", "/sys/fs/cgroup", "/dev/net", "/proc/../dev/net"])
def test_kernel_file_systems_come_from_the_guest(source: str) -> None:
    result = translated(mounts=[{"destination": "/x", "type": "bind", "source": source, "options": ["ro"]}])
    assert result.shared_mounts == (None,)
    assert result.spec.Mounts[0].source.startswith(("/proc", "/sys", "/dev"))


@pytest.mark.parametrize("source", ["/dev/shm", "/dev/shm/data"])
@pytest.mark.parametrize("destination", ["/x", "/dev/shm"])
def test_the_hosts_dev_shm_is_shared_as_an_ordinary_volume(source: str, destination: str) -> None:
    result = translated(
        mounts=[{"destination": destination, "type": "bind", "source": source}],
        linux={"namespaces": [{"type": "ipc"}, {"type": "network"}]},
    )
    (shared,) = result.shared_mounts
    assert shared is not None
    assert shared.source == source


def test_the_pods_shared_memory_comes_from_the_guest() -> None:
    source = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pod/shm"
    result = translated(mounts=[{"destination": "/dev/shm", "type": "bind", "source": source}])
    assert result.shared_mounts == (None,)
    assert result.spec.Mounts[0].source == SHM_DIRECTORY


@pytest.mark.parametrize(("option", "is_copied"), [("ro", True), ("rw", False)])
def test_only_read_only_volumes_are_copied(option: str, *, is_copied: bool) -> None:
    source = "/pods/1/volumes/kubernetes.io~configmap/settings"
    mount = {"destination": "/x", "type": "bind", "source": source, "options": ["rbind", option]}
    (shared,) = translated(mounts=[mount]).shared_mounts
    assert shared is not None
    assert shared.is_updated == is_copied


def test_other_mounts_pass_unchanged() -> None:
    mount = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"]}
    sent = translated(mounts=[mount]).spec.Mounts[0]
    assert (sent.destination, sent.type, sent.source, list(sent.options)) == (
        "/tmp",
        "tmpfs",
        "tmpfs",
        ["size=64k"],
    )


def test_a_refusing_seccomp_rule_without_a_number_says_eperm() -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO"}],
    }
    assert translated(linux={"seccomp": profile}).spec.Linux.Seccomp.Syscalls[0].errnoret == 1


def test_a_guest_without_seccomp_gets_no_profile() -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    assert not translated(seccomp=False, linux={"seccomp": profile}).spec.Linux.HasField("Seccomp")


def test_limits_are_sent_and_cpusets_are_not() -> None:
    resources = translated(
        linux={
            "resources": {
                "memory": {"limit": 64 << 20},
                "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-3"},
                "pids": {"limit": 100},
            }
        }
    ).spec.Linux.Resources
    assert resources.Memory.Limit == 64 << 20
    assert (resources.CPU.Shares, resources.CPU.Quota, resources.CPU.Period) == (512, 50000, 100000)
    assert resources.CPU.Cpus == ""
    assert resources.Pids.Limit == 100


def test_resources_are_present_even_when_empty() -> None:
    assert translated().spec.Linux.HasField("Resources")


DEVICES = [
    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
    {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
    {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 1, "gid": 2},
]


def test_a_device_without_a_mode_gets_the_default_mode() -> None:
    device = {"path": "/dev/data", "type": "b", "major": 7, "minor": 0}
    [sent] = translated(linux={"devices": [device]}).spec.Linux.Devices
    assert sent.FileMode == 0o666, "a stock agent looks for a device at that path in the guest"
    [sent] = translated(linux={"devices": [device | {"fileMode": 0o600}]}).spec.Linux.Devices
    assert sent.FileMode == 0o600


def test_a_privileged_container_gets_the_listed_devices_that_the_guest_has() -> None:
    resources = {"devices": [{"allow": True, "access": "rwm"}]}
    device, *offered = translated(linux={"devices": DEVICES, "resources": resources}).spec.Linux.Devices
    paths = [other.Path for other in offered]
    assert {"/dev/fuse", "/dev/sda"}.isdisjoint(paths)
    assert {"/dev/loop-control", "/dev/loop0", "/dev/net/tun"} < set(paths), "as an ordinary host has them"
    assert (device.Path, device.Type, device.Major, device.Minor) == ("/dev/fuse", "c", 10, 229)
    assert (device.FileMode, device.UID, device.GID) == (0o666, 1, 2)


def test_a_loop_device_comes_from_the_guest_only_with_loop_control() -> None:
    loop = {"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0}
    control = {"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237}
    assert translated(linux={"devices": [loop, control]}).disks == ()
    assert [disk.major for disk in translated(linux={"devices": [loop]}).disks] == [7]


def test_a_container_with_a_user_namespace_is_offered_no_devices() -> None:
    linux = {
        "namespaces": [{"type": "user"}, {"type": "network"}],
        "resources": {"devices": [{"allow": True, "access": "rwm"}]},
    }
    assert not translated(linux=linux).spec.Linux.Devices


def test_a_character_device_of_the_host_is_refused_by_name() -> None:
    device = {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}
    with pytest.raises(InvalidArgument, match=r"linux\.devices: /dev/kvm: .* does not exist in the guest"):
        translated(linux={"devices": [device]})


def test_a_block_device_of_the_host_becomes_a_disk_of_the_machine() -> None:
    rules = [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "rm"},
    ]
    throttled = {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]}
    result = translated(linux={"devices": DEVICES, "resources": {"devices": rules, "blockIO": throttled}})
    (disk,) = result.disks
    assert (disk.container_path, disk.major, disk.minor, disk.read_only) == ("/dev/sda", 8, 0, True)
    assert disk.limits == DiskLimits(read_bytes_per_s=1000)
    assert "/dev/sda" in {device.Path for device in result.spec.Linux.Devices}


def test_a_rate_for_a_disk_that_the_machine_lacks_is_refused() -> None:
    throttled = {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]}
    with pytest.raises(InvalidArgument, match=r"linux\.resources\.blockIO"):
        translated(linux={"resources": {"blockIO": throttled}})


@pytest.mark.parametrize("kind", ["configmap", "secret", "projected", "downward-api"])
def test_volumes_that_the_kubelet_updates_are_copied_in_the_guest(kind: str) -> None:
    source = f"/var/lib/kubelet/pods/1/volumes/kubernetes.io~{kind}/config"
    result = translated(mounts=[{"destination": "/c", "type": "bind", "source": source, "options": ["ro"]}])
    (shared,) = result.shared_mounts
    assert shared is not None
    assert shared.is_updated


def test_a_single_file_of_an_updated_volume_is_shared_directly() -> None:
    source = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~configmap/config/key"
    (shared,) = translated(
        mounts=[{"destination": "/c", "type": "bind", "source": source, "options": ["ro"]}]
    ).shared_mounts
    assert shared is not None
    assert not shared.is_updated


def test_the_hosts_network_is_refused_by_name() -> None:
    kinds = ("pid", "ipc", "uts", "mount")
    with pytest.raises(InvalidArgument, match=r"linux.namespaces: without network"):
        translated(linux={"namespaces": [{"type": kind} for kind in kinds]})


def test_host_pid_and_ipc_namespaces_become_the_usual_ones() -> None:
    result = translated(linux={"namespaces": [{"type": "network"}, {"type": "mount"}]})
    assert {namespace.Type for namespace in result.spec.Linux.Namespaces} == {"ipc", "uts", "mount"}
    assert not result.sandbox_pidns


def test_values_without_a_protocol_field_become_annotations() -> None:
    message = translated(
        annotations={"a": "b"},
        linux={
            "resources": {"unified": {"memory.oom.group": "1"}},
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38},
        },
    ).spec
    assert dict(message.Annotations) == {
        "a": "b",
        "io.hako.unified/memory.oom.group": "1",
        "io.hako.seccomp/default-errno": "38",
    }


def test_the_domain_name_becomes_a_sysctl() -> None:
    linux = {"sysctl": {"net.ipv4.ip_forward": "1"}}
    assert dict(translated(domainname="example.org", linux=linux).spec.Linux.Sysctl) == {
        "net.ipv4.ip_forward": "1",
        "kernel.domainname": "example.org",
    }


def test_huge_page_limits_of_zero_are_sent_too() -> None:
    limits = [{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": 4 << 20}]
    sent = translated(linux={"resources": {"hugepageLimits": limits}}).spec.Linux.Resources.HugepageLimits
    assert [(one.Pagesize, one.Limit) for one in sent] == [("1GB", 0), ("2MB", 4 << 20)]


def test_limits_in_an_update_are_translated_as_in_a_create() -> None:
    limits = {"memory": {"limit": -1}, "cpu": {"shares": 2, "cpus": "7"}, "unified": {"memory.high": "max"}}
    message = translate_resources(limits)
    assert (message.Memory.Limit, message.CPU.Shares, message.CPU.Cpus) == (-1, 2, "")


def test_an_unknown_field_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    translated(linux={"hyperspace": {"lanes": 3}})
    assert "linux.hyperspace" in caplog.text


@pytest.mark.parametrize("wanted", ["", "/", "/pods/box", "system.slice:cri:box"])
def test_each_container_has_a_cgroup_of_its_own_in_the_guest(wanted: str) -> None:
    linux = translated(linux={"cgroupsPath": wanted}).spec.Linux
    assert linux.CgroupsPath == f"/{agent_id('box')}"


def test_the_umask_is_sent_as_an_annotation() -> None:
    process = {"args": ["true"], "cwd": "/", "user": {"uid": 1, "umask": 0}}
    assert translated(process=process).spec.Annotations["io.hako.process/umask"] == "0"
    assert not translated().spec.Annotations


def test_host_hooks_do_not_run_in_the_guest() -> None:
    assert not translated(hooks={"prestart": [{"path": "/bin/true"}]}).spec.HasField("Hooks")


@pytest.mark.parametrize(
    "broken",
    [
        {"process": {"args": []}},
        {"process": "sh"},
        {"mounts": [{"source": "/x"}]},
        {"mounts": 7},
        {"linux": {"resources": {"memory": {"limit": "much"}}}},
        {"process": {"args": ["x"], "user": {"uid": -1}}},
    ],
    ids=str,
)
def test_a_malformed_specification_is_an_invalid_argument(broken: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        translated(**broken)


@pytest.mark.parametrize(
    "broken",
    [{}, {"args": "sh"}, {"args": ["x"], "rlimits": 7}, {"args": ["x"], "user": []}, {"args": ["\udc80"]}],
    ids=ascii,
)
def test_a_malformed_process_is_an_invalid_argument(broken: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="process: "):
        translate_process({"cwd": "/", **broken}, terminal=False, inheritance=NOTHING)


@pytest.mark.parametrize(
    "broken", [{"memory": 7}, {"cpu": {"shares": -1}}, {"unified": ["a"]}, {"devices": [1]}], ids=str
)
def test_malformed_limits_are_an_invalid_argument(broken: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="resources: malformed"):
        translate_resources(broken)
