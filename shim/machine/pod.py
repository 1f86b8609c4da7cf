"""The description of a sandbox: its first container's specification, or Kubernetes' description of a pod.

containerd prepares a pod's files in ``/etc`` for its own sandboxes. If the shim makes the sandbox, the shim
must also make these files.
"""

from __future__ import annotations

import logging
import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from proto.cri.pod_pb2 import PodSandboxConfig
from shim.agent import shared_memory
from shim.agent.guest_paths import SHM_BYTES
from shim.annotations import KIND, POD, POD_NAME, POD_NAMESPACE, POD_UID
from shim.errors import InvalidArgument
from shim.host import named_files
from shim.machine.limits import NO_LIMITS, Limits, annotated_limits, limits_of, limits_of_pod

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.any_pb2 import Any as AnyMessage

log = logging.getLogger(__name__)

_RESOLV_CONF = "/etc/resolv.conf"
_MAX_NAME_BYTES = 64  # the room in uname(2)
_MAX_RESOLV_CONF_BYTES = 64 * 1024  # resolv.conf(5) of a pod has at most 3 + 32 names

#: It is ``off`` for a pod whose machine must boot instead of being cloned from a template.
TEMPLATE_ANNOTATION = "io.hako.template"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSpec:
    """A sandbox as its client describes it.

    :param hostname: the name of the machine; if empty, the host's.
    :param dns: lines of resolv.conf.
    :param sysctls: kernel parameters of the whole pod, which its containers' specifications do not repeat.
    :param shm_bytes: the size of its shared memory.
    :param cgroup: ``linux.cgroupsPath`` of the sandbox on the host; empty for none.
    :param limits: the limits of the whole pod, as far as they are known.
    :param first: the limits of its first container, unless that is a pause container.
    :param oom_score_adj: how readily the host's kernel kills its first process for memory; ``None`` if
        nobody says.
    :param oci: an OCI specification: the bundle's, or one made from Kubernetes' description. Its
        ``linux.namespaces`` have the network namespace.
    """

    hostname: str
    dns: tuple[str, ...]
    sysctls: dict[str, str]
    shm_bytes: int = SHM_BYTES
    cgroup: str
    limits: Limits = NO_LIMITS
    first: Limits = NO_LIMITS
    oom_score_adj: int | None = None
    oci: dict[str, Any]


def check_pod(spec: dict[str, Any], *, sandbox_id: str) -> None:
    """Refuse a container that belongs to another pod than this machine.

    :param spec: the decoded ``config.json``.
    :param sandbox_id: the id of the sandbox that it joins.
    :raises InvalidArgument: if it belongs to another pod of Kubernetes.
    """
    annotations = spec.get("annotations")
    if not isinstance(annotations, dict) or KIND not in annotations:
        return
    pod = annotations.get(POD)
    if pod and pod != sandbox_id:
        raise InvalidArgument(f"create: {POD} is {pod!r}: this machine is that of {sandbox_id}")


def is_pause(spec: dict[str, Any]) -> bool:
    """Tell whether an OCI specification describes a pause container, which only stands for its pod."""
    annotations = spec.get("annotations")
    return isinstance(annotations, dict) and annotations.get(KIND) == "sandbox"


def refuses_template(spec: dict[str, Any]) -> bool:
    """Tell whether an OCI specification wants a machine that was not cloned."""
    annotations = spec.get("annotations")
    return isinstance(annotations, dict) and annotations.get(TEMPLATE_ANNOTATION) == "off"


def oom_score_adj_of(spec: dict[str, Any]) -> int | None:
    """Read how readily the kernel should kill a container's processes for memory.

    :param spec: its OCI specification.
    :returns: ``process.oomScoreAdj``; ``None`` if it is absent or invalid.
    """
    process = spec.get("process")
    value = process.get("oomScoreAdj") if isinstance(process, dict) else None
    return value if type(value) is int and -1000 <= value <= 1000 else None


def check_names(spec: dict[str, Any]) -> None:
    """Refuse a host name or domain name that no kernel accepts, see sethostname(2).

    :param spec: an OCI specification, or a part of one.
    :raises InvalidArgument: if there is one.
    """
    for field in ("hostname", "domainname"):
        name = spec.get(field)
        if not isinstance(name, str):
            continue
        length = len(name.encode(errors="surrogatepass"))
        if length > _MAX_NAME_BYTES:
            raise InvalidArgument(
                f"spec: {field}: {name!r} has {length} bytes; choose one of {_MAX_NAME_BYTES} bytes or less"
            )
        if "\0" in name:
            raise InvalidArgument(f"spec: {field}: {name!r} holds a NUL byte; choose another name")


def from_oci(spec: dict[str, Any], *, sandbox_id: str = "") -> PodSpec:
    """Take the description from the specification of the sandbox's first container.

    :param spec: the decoded ``config.json``.
    :param sandbox_id: the sandbox's id, which is that container's.
    :raises InvalidArgument: if the machine cannot have its name.
    """
    check_names(spec)
    hostname = spec.get("hostname")
    linux = spec.get("linux")
    linux = linux if isinstance(linux, dict) else {}
    sysctls = linux.get("sysctl") if is_pause(spec) else None
    cgroup = linux.get("cgroupsPath")
    return PodSpec(
        hostname=hostname if isinstance(hostname, str) else "",
        dns=_resolvers(spec),
        sysctls=sysctls if isinstance(sysctls, dict) else {},
        shm_bytes=shared_memory.size_of(spec, container_id=sandbox_id),
        cgroup=cgroup if isinstance(cgroup, str) else "",
        limits=annotated_limits(spec),
        first=NO_LIMITS if is_pause(spec) else limits_of(spec),
        oom_score_adj=oom_score_adj_of(spec),
        oci=spec,
    )


def from_request(options: AnyMessage, *, sandbox_id: str, network_namespace: str) -> PodSpec:
    """Take the description from a request for a sandbox.

    :param options: a ``PodSandboxConfig``; other types are ignored.
    :param sandbox_id: the sandbox's id.
    :param network_namespace: the path of the pod's network namespace; empty for the host's.
    :raises InvalidArgument: if it is not a valid message, or the machine cannot have its name.
    """
    config = PodSandboxConfig()
    if options.type_url.rpartition("/")[2] == PodSandboxConfig.DESCRIPTOR.full_name:
        try:
            config = PodSandboxConfig.FromString(options.value)
        except DecodeError as error:
            raise InvalidArgument(
                f"sandbox: options: not a valid {PodSandboxConfig.DESCRIPTOR.full_name}: {error}"
            ) from error
    elif options.type_url:
        log.warning("sandbox: options of type %s say nothing about a pod; ignored", options.type_url)
    check_names({"hostname": config.hostname})
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    if network_namespace:
        namespaces.append({"type": "network", "path": network_namespace})
    dns, resources = config.dns_config, config.linux.resources
    return PodSpec(
        hostname=config.hostname,
        dns=(
            *([f"search {' '.join(dns.searches)}"] if dns.searches else []),
            *(f"nameserver {server}" for server in dns.servers),
            *([f"options {' '.join(dns.options)}"] if dns.options else []),
        ),
        sysctls=dict(config.linux.sysctls),
        cgroup=_cgroup(config.linux.cgroup_parent, sandbox_id=sandbox_id),
        limits=limits_of_pod(
            quota_us=resources.cpu_quota,
            period_us=resources.cpu_period,
            shares=resources.cpu_shares,
            memory_bytes=resources.memory_limit_in_bytes,
        ),
        oci={
            "hostname": config.hostname,
            "annotations": {**config.annotations, **_names(config)},
            "linux": {"namespaces": namespaces},
        },
    )


def _names(config: PodSandboxConfig) -> dict[str, str]:
    """Return the pod's names as annotations, as containerd gives them to its containers."""
    if not config.HasField("metadata"):
        return {}
    metadata = config.metadata
    return {POD_NAME: metadata.name, POD_NAMESPACE: metadata.namespace, POD_UID: metadata.uid}


def write_files(pod: PodSpec, directory: Path) -> None:
    """Write the files that :func:`with_files` mounts.

    :param pod: the pod.
    :param directory: their directory, which does not exist yet.
    :raises OSError: if it cannot be written.
    """
    directory.mkdir(mode=0o711)
    for name, lines in (
        ("hostname", [pod.hostname]),
        ("hosts", ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]),
        ("resolv.conf", pod.dns),
    ):
        (directory / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def with_files(spec: dict[str, Any], directory: Path, *, sandbox_id: str) -> dict[str, Any]:
    """Give a container the files of its pod in ``/etc``, and the pod's shared memory if it shares its IPC.

    :param spec: the decoded ``config.json``; its own mounts stay.
    :param directory: what :func:`write_files` has filled.
    :param sandbox_id: the pod's sandbox.
    """
    mounts = list(spec.get("mounts") or [])
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    if any(one.get("type") == "ipc" and one.get("path") for one in namespaces):
        mounts = [
            {**entry, "type": "bind", "source": shared_memory.source_of(sandbox_id), "options": ["rbind"]}
            if entry.get("destination") == shared_memory.DESTINATION and not shared_memory.is_bind(entry)
            else entry
            for entry in mounts
        ]
    taken = {entry.get("destination") for entry in mounts}
    for name in ("hostname", "hosts", "resolv.conf"):
        if f"/etc/{name}" not in taken:
            mounts.append(
                {
                    "destination": f"/etc/{name}",
                    "type": "bind",
                    "source": str(directory / name),
                    "options": ["rbind", "ro"],
                }
            )
    return {**spec, "mounts": mounts}


def with_sysctls(spec: dict[str, Any], sysctls: dict[str, str]) -> dict[str, Any]:
    """Give a container the kernel parameters of its pod; its own take precedence.

    :param spec: the decoded ``config.json``.
    :param sysctls: the pod's.
    """
    linux = spec.get("linux") or {}
    return {**spec, "linux": {**linux, "sysctl": {**sysctls, **(linux.get("sysctl") or {})}}}


def _cgroup(parent: str, *, sandbox_id: str) -> str:
    """Name a sandbox's cgroup as containerd names the cgroups of its own sandboxes."""
    if parent.endswith(".slice"):
        return f"{posixpath.basename(parent)}:cri-containerd:{sandbox_id}"
    return f"{parent}/{sandbox_id}" if parent else ""


def _resolvers(spec: dict[str, Any]) -> tuple[str, ...]:
    """Read the resolv.conf that is mounted into the container; the machine gets the same content."""
    mounts = spec.get("mounts")
    for entry in mounts if isinstance(mounts, list) else []:
        if not isinstance(entry, dict) or entry.get("destination") != _RESOLV_CONF:
            continue
        try:
            content = named_files.read_regular(str(entry.get("source")), at_most=_MAX_RESOLV_CONF_BYTES)
        except (OSError, ValueError) as error:
            log.warning("sandbox: %s of its container: %s; the machine has none", _RESOLV_CONF, error)
            continue
        return tuple(line for line in content.decode(errors="replace").splitlines() if line.strip())
    return ()
