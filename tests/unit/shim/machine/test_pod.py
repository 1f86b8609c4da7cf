"""A pod's description is read from the request that creates its sandbox."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from proto.cri.pod_pb2 import DNSConfig, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig
from shim.errors import InvalidArgument
from shim.machine import pod
from shim.machine.limits import Limits

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


PAUSE = {"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}


def options(config: PodSandboxConfig, kind: str = "runtime.v1.PodSandboxConfig") -> AnyMessage:
    """Wrap a pod's description as containerd does."""
    return AnyMessage(type_url=kind, value=config.SerializeToString())


@pytest.mark.parametrize(
    ("spec", "pause"),
    [
        (PAUSE, True),
        ({"annotations": {"io.kubernetes.cri.container-type": "container"}}, False),
        ({"annotations": None}, False),
        ({"annotations": "text"}, False),
        ({}, False),
    ],
)
def test_an_annotation_marks_a_pause_container(spec: dict[str, Any], pause: bool) -> None:
    assert pod.is_pause(spec) is pause


@pytest.mark.parametrize(
    ("annotations", "refuses"),
    [
        ({pod.TEMPLATE_ANNOTATION: "off"}, True),
        ({pod.TEMPLATE_ANNOTATION: "auto"}, False),
        ({pod.TEMPLATE_ANNOTATION: ["off"]}, False),
        ({}, False),
        (None, False),
        ("off", False),
    ],
)
def test_an_annotation_can_refuse_templates(annotations: dict[str, Any] | str | None, refuses: bool) -> None:
    assert pod.refuses_template({"annotations": annotations}) is refuses


def test_a_pod_without_a_pause_container_can_refuse_templates_too() -> None:
    config = PodSandboxConfig(annotations={pod.TEMPLATE_ANNOTATION: "off"})
    found = pod.from_request(options(config), sandbox_id="s", network_namespace="")
    assert pod.refuses_template(found.oci)


@pytest.mark.parametrize("hostname", [None, 5, ["x"]])
def test_a_malformed_hostname_is_ignored(hostname: int | list[str] | None) -> None:
    assert pod.from_oci({"hostname": hostname}).hostname == ""


def test_the_machine_gets_the_resolvers_of_its_first_container(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 192.0.2.1\n\nsearch a b\n")
    mounts = [
        {"destination": "/etc/hosts", "source": "/etc/hosts"},
        {"destination": "/etc/resolv.conf", "source": str(tmp_path / "resolv.conf")},
    ]
    assert pod.from_oci({"mounts": mounts}).dns == ("nameserver 192.0.2.1", "search a b")


@pytest.mark.parametrize(
    "mounts", [None, "text", [5], [{"destination": "/etc/resolv.conf", "source": "a\0b"}]]
)
def test_an_unreadable_resolv_conf_is_ignored(mounts: list[dict[str, str] | int] | str | None) -> None:
    assert pod.from_oci({"mounts": mounts}).dns == ()


def test_a_fifo_in_place_of_resolv_conf_is_ignored_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    mounts = [{"destination": "/etc/resolv.conf", "source": str(tmp_path / "fifo")}]
    assert pod.from_oci({"mounts": mounts}).dns == ()


def test_only_a_pause_container_sets_the_pods_kernel_parameters() -> None:
    linux = {"linux": {"sysctl": {"net.core.somaxconn": "7"}}}
    assert pod.from_oci({**PAUSE, **linux}).sysctls == {"net.core.somaxconn": "7"}
    assert pod.from_oci(linux).sysctls == {}


def test_a_description_from_kubernetes_becomes_a_specification() -> None:
    config = PodSandboxConfig(
        hostname="web-0",
        dns_config=DNSConfig(servers=["192.0.2.1", "2001:db8::1"], searches=["a", "b"], options=["ndots:5"]),
        annotations={"team": "x"},
        linux=LinuxPodSandboxConfig(
            cgroup_parent="/kubepods/pod1",
            sysctls={"kernel.shm_rmid_forced": "1"},
            resources=LinuxContainerResources(cpu_quota=50_000, memory_limit_in_bytes=1 << 30),
        ),
    )
    made = pod.from_request(options(config), sandbox_id="s1", network_namespace="/run/netns/x")
    assert made.hostname == "web-0"
    assert made.dns == ("search a b", "nameserver 192.0.2.1", "nameserver 2001:db8::1", "options ndots:5")
    assert made.cgroup == "/kubepods/pod1/s1"
    assert made.sysctls == {"kernel.shm_rmid_forced": "1"}
    assert made.limits == Limits(quota_us=50_000, memory_bytes=1 << 30)
    assert made.oci["annotations"] == {"team": "x"}
    assert {"type": "network", "path": "/run/netns/x"} in made.oci["linux"]["namespaces"]


def test_a_pod_without_a_network_namespace_wants_the_hosts() -> None:
    made = pod.from_request(AnyMessage(), sandbox_id="s1", network_namespace="")
    assert "network" not in {one["type"] for one in made.oci["linux"]["namespaces"]}


def test_options_of_another_type_are_ignored() -> None:
    made = pod.from_request(
        options(PodSandboxConfig(hostname="x"), "other.Type"), sandbox_id="s1", network_namespace=""
    )
    assert (made.hostname, made.dns, made.sysctls) == ("", (), {})


def test_an_undecodable_description_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"sandbox: options: not a valid runtime.v1.PodSandboxConfig"):
        pod.from_request(
            AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff"),
            sandbox_id="s1",
            network_namespace="",
        )


def test_a_container_gets_its_pods_files_unless_it_has_its_own(tmp_path: Path) -> None:
    made = pod.from_request(
        options(PodSandboxConfig(hostname="web-0", dns_config=DNSConfig(servers=["192.0.2.1"]))),
        sandbox_id="s1",
        network_namespace="",
    )
    pod.write_files(made, tmp_path / "etc")
    own = {"destination": "/etc/hosts", "type": "bind", "source": "/var/hosts", "options": ["rbind"]}
    mounts = {
        one["destination"]: one
        for one in pod.with_files({"mounts": [own]}, tmp_path / "etc", sandbox_id="s1")["mounts"]
    }
    assert mounts["/etc/hosts"] == own
    assert mounts["/etc/hostname"]["options"] == ["rbind", "ro"]
    assert (tmp_path / "etc" / "hostname").read_text() == "web-0\n"
    assert (tmp_path / "etc" / "resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    assert (tmp_path / "etc" / "hosts").read_text().startswith("127.0.0.1 localhost\n")


@pytest.mark.parametrize(("path", "kind"), [("/proc/7/ns/ipc", "bind"), ("", "tmpfs")])
def test_a_container_that_shares_the_pods_ipc_gets_its_shared_memory(
    tmp_path: Path, path: str, kind: str
) -> None:
    spec = {
        "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}],
        "linux": {"namespaces": [{"type": "ipc", "path": path}]},
    }
    assert pod.with_files(spec, tmp_path, sandbox_id="s1")["mounts"][0]["type"] == kind


def test_a_volume_at_dev_shm_is_not_the_pods_shared_memory(tmp_path: Path) -> None:
    volume = {"destination": "/dev/shm", "type": "bind", "source": "/srv/memory", "options": ["rbind"]}
    spec = {"mounts": [volume], "linux": {"namespaces": [{"type": "ipc", "path": "/proc/7/ns/ipc"}]}}
    assert pod.with_files(spec, tmp_path, sandbox_id="s1")["mounts"][0] == volume


def test_a_containers_kernel_parameters_override_the_pods() -> None:
    spec = {"linux": {"sysctl": {"a": "own"}, "seccomp": {}}}
    assert pod.with_sysctls(spec, {"a": "pod", "b": "pod"}) == {
        "linux": {"sysctl": {"a": "own", "b": "pod"}, "seccomp": {}}
    }


@pytest.mark.parametrize("field", ["hostname", "domainname"])
@pytest.mark.parametrize(
    ("name", "why"), [("a" * 65, "65 bytes"), ("ä" * 33, "66 bytes"), ("a\0b", "NUL byte")]
)
def test_a_host_name_that_kernels_refuse_is_refused(field: str, name: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^spec: {field}: .*{why}; choose "):
        pod.check_names({field: name})


def test_a_host_name_of_64_bytes_is_accepted() -> None:
    pod.check_names({"hostname": "a" * 64, "domainname": "ä" * 32})
