"""OCI runtime specification to agent message.

Pure: values in, values out. ``oci_fields`` says how each field is treated. This module rewrites the replaced
fields before everything is copied. For objects that exist only on the host (a namespace path, a device
number, a cgroup), the guest gets its own. A request that a virtual machine cannot fulfil is refused by the
name of the field, never silently dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto.extensions import DEFAULT_ERRNO_ANNOTATION, UMASK_ANNOTATION, UNIFIED_ANNOTATION
from proto.kata import oci_pb2
from shim.agent import shared_memory
from shim.agent.guest_devices import allows_everything, is_of_the_guest, offered
from shim.agent.guest_names import agent_id
from shim.agent.guest_paths import SHARE_DIRECTORY
from shim.agent.oci_disks import DiskDevice, disk_devices, without_limits_of
from shim.agent.oci_fields import copy, refusing_malformed
from shim.agent.oci_mounts import SharedMount, rewrite_mount
from shim.agent.oci_namespaces import namespace_of
from shim.agent.oci_process import translate_process, umask_of
from shim.agent.oci_vfio import is_vfio, vfio_groups
from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from shim.sandbox.inheritance import Inheritance

# The guest gives every container a private one or the sandbox's; the host's mean nothing there.
_GUEST_NAMESPACES = ("ipc", "uts", "mount")
# The agent makes these in every container's /dev; for Kata's agent, naming them again is an error.
_DEFAULT_DEVICES = frozenset(f"/dev/{name}" for name in ("null", "zero", "full", "tty", "random", "urandom"))
_EPERM = 1
_DEVICE_MODE = 0o666  # crun's


@dataclass(frozen=True, slots=True)
class Translation:
    """The message for the agent, and what must be shared before it is sent.

    :param shared_mounts: for each mount of the specification, the source to share, or none.
    """

    spec: oci_pb2.Spec
    shared_mounts: tuple[SharedMount | None, ...]
    disks: tuple[DiskDevice, ...]
    vfio_groups: tuple[int, ...]
    sandbox_pidns: bool


def translate(
    spec: dict[str, Any],
    *,
    container_id: str,
    sandbox_id: str,
    terminal: bool,
    seccomp: bool,
    inheritance: Inheritance,
) -> Translation:
    """Translate a container's specification.

    :param spec: the decoded ``config.json``.
    :param sandbox_id: the id of its sandbox on the host.
    :param terminal: the request's flag, which takes precedence over the specification's.
    :param seccomp: whether the guest can apply a profile; if not, the profile is left out.
    :param inheritance: values that a process would inherit from a runtime on the host.
    :raises InvalidArgument: if the specification is malformed, or the guest cannot satisfy it.
    """
    with refusing_malformed(f"config.json of {container_id}"):
        ids, shares_hosts_ipc = {container_id, sandbox_id}, shared_memory.shares_hosts_ipc(spec)
        mounts = [
            (shared_memory.in_guest(entry), None)
            if shared_memory.is_pods(entry, ids=ids, shares_hosts_ipc=shares_hosts_ipc)
            else rewrite_mount(entry)
            for entry in spec.get("mounts") or []
        ]
        process = translate_process(spec.get("process") or {}, terminal=terminal, inheritance=inheritance)
        return _translate(spec, mounts, process, container_id=container_id, seccomp=seccomp)


def _translate(
    spec: dict[str, Any],
    mounts: list[tuple[dict[str, Any], SharedMount | None]],
    process: oci_pb2.Process,
    *,
    container_id: str,
    seccomp: bool,
) -> Translation:
    namespace_of(spec)  # a container with the host's network expects connections there, which cannot work
    linux = spec.get("linux") or {}
    disks = disk_devices(linux)
    resources = without_limits_of(linux.get("resources") or {}, [(disk.major, disk.minor) for disk in disks])
    linux = {**linux, "resources": resources}
    annotations = dict(spec.get("annotations") or {})
    umask = umask_of(spec.get("process") or {})
    if umask is not None:
        annotations[UMASK_ANNOTATION] = str(umask)
    rewritten = {
        "ociVersion": "1.0.2",
        **{key: value for key, value in spec.items() if key not in {"process", "domainname"}},
        "root": {**(spec.get("root") or {}), "path": f"{SHARE_DIRECTORY}/{agent_id(container_id)}/rootfs"},
        "mounts": [mount for mount, _ in mounts],
        "linux": _linux(linux, container_id=container_id, seccomp=seccomp, annotations=annotations),
        "annotations": annotations,
    }
    if spec.get("domainname"):
        sysctl = {**(linux.get("sysctl") or {}), "kernel.domainname": spec["domainname"]}
        rewritten["linux"]["sysctl"] = sysctl
    message = oci_pb2.Spec(Process=process)
    copy(rewritten, message, path="")
    message.ClearField("Hooks")  # even an empty one prevents the agent from using its default
    return Translation(
        message,
        tuple(share for _, share in mounts),
        tuple(disks),
        tuple(() if allows_everything(resources.get("devices") or []) else vfio_groups(linux)),
        sandbox_pidns=any(n.get("type") == "pid" and n.get("path") for n in linux.get("namespaces") or []),
    )


def translate_resources(resources: dict[str, Any]) -> oci_pb2.LinuxResources:
    """Translate a container's limits, for an update.

    :raises InvalidArgument: if they are malformed, or one of them is refused.
    """
    message = oci_pb2.LinuxResources()
    with refusing_malformed("resources"):
        copy(_resources(resources, annotations={}), message, path="linux.resources")
    return message


def _linux(
    linux: dict[str, Any], *, container_id: str, seccomp: bool, annotations: dict[str, str]
) -> dict[str, Any]:
    rewritten = {
        **linux,
        "namespaces": _namespaces(linux.get("namespaces") or []),
        "devices": _devices(linux),
        "cgroupsPath": f"/{agent_id(container_id)}",
        # Present even if empty: without it, an agent applies no limits at all.
        "resources": _resources(linux.get("resources") or {}, annotations=annotations),
        "seccomp": None,
    }
    if seccomp and linux.get("seccomp"):
        rewritten["seccomp"] = _seccomp(linux["seccomp"], annotations=annotations)
    return rewritten


def _namespaces(namespaces: list[dict[str, Any]]) -> list[dict[str, str]]:
    wanted = {namespace["type"] for namespace in namespaces}
    # The host's processes and IPC are not in the machine, so a request for them gets the usual namespaces.
    # sandbox_pidns requests pid; network belongs to the machine; cgroup and time to the agent.
    return [{"type": kind} for kind in (*_GUEST_NAMESPACES, *sorted({"user"} & wanted))]


def _devices(linux: dict[str, Any]) -> list[dict[str, Any]]:
    rules = (linux.get("resources") or {}).get("devices") or []
    everything = allows_everything(rules)
    kept = []
    for device in linux.get("devices") or []:
        path, kind = device["path"], device.get("type") or ""
        if path in _DEFAULT_DEVICES:
            continue
        if is_of_the_guest(device, linux):
            kept.append(device)
        elif kind == "b" and not everything:
            kept.append(device)  # a disk of the machine; the agent fills in its number
        elif not everything and not is_vfio(path):
            raise InvalidArgument(
                f"spec: linux.devices: {path}: a device of the host does not exist in the guest; leave it out"
            )
    # Without a mode, a stock agent uses the mode of the guest's file at the path, which may not exist.
    listed = [{**device, "fileMode": device.get("fileMode") or _DEVICE_MODE} for device in kept]
    return listed + offered(linux)


def _resources(resources: dict[str, Any], *, annotations: dict[str, str]) -> dict[str, Any]:
    for key, value in (resources.get("unified") or {}).items():
        annotations[f"{UNIFIED_ANNOTATION}{key}"] = value
    return {**resources, "devices": _device_rules(resources), "unified": None}


def _device_rules(resources: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "a", "access": "rwm", **rule} for rule in resources.get("devices") or []]


def _seccomp(profile: dict[str, Any], *, annotations: dict[str, str]) -> dict[str, Any]:
    if profile.get("defaultErrnoRet") is not None:
        annotations[DEFAULT_ERRNO_ANNOTATION] = str(int(profile["defaultErrnoRet"]))
    # An agent reads an absent number as 0, which would turn a refusal into a success.
    syscalls = [{"errnoRet": _EPERM, **rule} for rule in profile.get("syscalls") or []]
    return {**profile, "syscalls": syscalls, "defaultErrnoRet": None}
