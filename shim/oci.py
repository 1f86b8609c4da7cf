"""OCI runtime specification to agent message: what a container asked for, as the guest can give it.

Pure: values in, values out. Where the host meant something that only exists on the host (a namespace
path, a device number, a cgroup), the guest gets its own; where a virtual machine cannot honour a wish
silently dropping it would be a lie, so it is refused with the field's name.
"""

from __future__ import annotations

import hashlib
import posixpath
from dataclasses import dataclass
from typing import Any

from proto.kata import oci_pb2
from shim.agent import SHARE_DIRECTORY, SHM_DIRECTORY
from shim.errors import InvalidArgument

# The guest gives every container a private one or the sandbox's; the host's are meaningless in it.
_GUEST_NAMESPACES = ("ipc", "uts", "mount")
# Made by the agent in every container's /dev; naming them again is an error in Kata's agent.
_DEFAULT_DEVICES = frozenset(f"/dev/{name}" for name in ("null", "zero", "full", "tty", "random", "urandom"))
# Character devices that the guest kernel has under the host's number, so a node for them works there.
_GUEST_DEVICES = frozenset({(10, 200), (10, 229)})  # /dev/net/tun, /dev/fuse
_KERNEL_FILE_SYSTEMS = ("/proc", "/sys", "/dev")
_EPERM = 1


@dataclass(frozen=True, slots=True)
class SharedMount:
    """A bind mount whose source the host must show to the guest.

    :param source: path on the host.
    :param name: name in the share; the guest sees it as ``SHARE_DIRECTORY/name``.
    """

    source: str
    name: str
    read_only: bool
    recursive: bool


@dataclass(frozen=True, slots=True)
class Translation:
    """What the agent is sent, and what must be shared before it is."""

    spec: oci_pb2.Spec
    shared_mounts: tuple[SharedMount, ...]
    sandbox_pidns: bool


def translate(spec: dict[str, Any], *, container_id: str, terminal: bool, seccomp: bool) -> Translation:
    """Translate a container's specification.

    :param spec: the decoded ``config.json``.
    :param terminal: the request's own flag, which wins over the specification's.
    :param seccomp: whether the guest can apply a profile; if not, the profile is left out.
    :raises InvalidArgument: if the specification is malformed or asks for what a guest cannot give.
    """
    try:
        return _translate(spec, container_id=container_id, terminal=terminal, seccomp=seccomp)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise InvalidArgument(f"config.json of {container_id}: malformed: {error}") from error


def _translate(spec: dict[str, Any], *, container_id: str, terminal: bool, seccomp: bool) -> Translation:
    linux = spec.get("linux") or {}
    root = spec.get("root") or {}
    mounts: list[oci_pb2.Mount] = []
    shared: list[SharedMount] = []
    for entry in spec.get("mounts") or []:
        mount, share = _mount(entry, container_id=container_id)
        if mount is not None:
            mounts.append(mount)
        if share is not None:
            shared.append(share)
    pid_paths = [n.get("path") for n in linux.get("namespaces") or [] if n.get("type") == "pid"]
    message = oci_pb2.Spec(
        Version=spec.get("ociVersion") or "1.0.2",
        Process=translate_process(spec.get("process") or {}, terminal=terminal),
        Root=oci_pb2.Root(
            Path=f"{SHARE_DIRECTORY}/{container_id}/rootfs", Readonly=bool(root.get("readonly", False))
        ),
        Hostname=spec.get("hostname") or "",
        Mounts=mounts,
        Annotations={str(k): str(v) for k, v in (spec.get("annotations") or {}).items()},
        Linux=_linux(linux, container_id=container_id, seccomp=seccomp),
    )
    return Translation(message, tuple(shared), sandbox_pidns=any(pid_paths))


def translate_process(process: dict[str, Any], *, terminal: bool) -> oci_pb2.Process:
    """Translate an OCI process, whole: of a container's init or of an exec.

    :raises InvalidArgument: if it names no program.
    """
    if not process.get("args"):
        raise InvalidArgument("process: args is empty; name the program to run")
    user = process.get("user") or {}
    size = process.get("consoleSize") or {}
    capabilities = process.get("capabilities") or {}
    return oci_pb2.Process(
        Terminal=terminal,
        ConsoleSize=oci_pb2.Box(Height=size.get("height", 0), Width=size.get("width", 0)) if size else None,
        User=oci_pb2.User(
            UID=user.get("uid", 0),
            GID=user.get("gid", 0),
            AdditionalGids=user.get("additionalGids") or [],
            Username=user.get("username") or "",
        ),
        Args=process["args"],
        Env=process.get("env") or [],
        Cwd=process.get("cwd") or "/",
        # Present even when empty: an agent reads an absent message as "as the container has".
        Capabilities=oci_pb2.LinuxCapabilities(
            Bounding=capabilities.get("bounding") or [],
            Effective=capabilities.get("effective") or [],
            Inheritable=capabilities.get("inheritable") or [],
            Permitted=capabilities.get("permitted") or [],
            Ambient=capabilities.get("ambient") or [],
        ),
        Rlimits=[
            oci_pb2.POSIXRlimit(Type=limit["type"], Hard=limit["hard"], Soft=limit["soft"])
            for limit in process.get("rlimits") or []
        ],
        NoNewPrivileges=bool(process.get("noNewPrivileges", False)),
        OOMScoreAdj=process.get("oomScoreAdj") or 0,
        # AppArmor and SELinux labels name the host's policy; the guest kernel has none loaded.
    )


def _mount(entry: dict[str, Any], *, container_id: str) -> tuple[oci_pb2.Mount | None, SharedMount | None]:
    destination = entry["destination"]
    source = entry.get("source") or ""
    options = list(entry.get("options") or [])
    kind = entry.get("type") or ""
    is_bind = kind == "bind" or "bind" in options or "rbind" in options
    if not is_bind:
        return oci_pb2.Mount(destination=destination, source=source, type=kind, options=options), None
    if destination == "/dev/shm":  # noqa: S108 - the container's path, not a file of ours
        guest = oci_pb2.Mount(destination=destination, source=SHM_DIRECTORY, type="bind", options=["rbind"])
        return guest, None
    normal = posixpath.normpath(source)
    if not normal.startswith("/dev/shm/") and any(  # noqa: S108 - ordinary files live below /dev/shm
        normal == top or normal.startswith(top + "/") for top in _KERNEL_FILE_SYSTEMS
    ):
        # The host's kernel file systems say nothing about the guest: the guest's own are bound instead.
        return oci_pb2.Mount(destination=destination, source=normal, type="bind", options=options), None
    # The same destination may be mounted on twice; the digest keeps names apart and short.
    digest = hashlib.sha256(f"{destination}\0{source}".encode()).hexdigest()[:16]
    name = f"{container_id}-{digest}-{posixpath.basename(destination.rstrip('/')) or 'root'}"
    share = SharedMount(
        source=source,
        name=name,
        read_only="ro" in options or "rro" in options,
        recursive="rbind" in options,
    )
    guest = oci_pb2.Mount(
        destination=destination, source=f"{SHARE_DIRECTORY}/{name}", type="bind", options=options
    )
    return guest, share


def _linux(linux: dict[str, Any], *, container_id: str, seccomp: bool) -> oci_pb2.Linux:
    wanted = {namespace.get("type") for namespace in linux.get("namespaces") or []}
    return oci_pb2.Linux(
        UIDMappings=[_id_mapping(m) for m in linux.get("uidMappings") or []],
        GIDMappings=[_id_mapping(m) for m in linux.get("gidMappings") or []],
        Sysctl=linux.get("sysctl") or {},
        Resources=translate_resources(linux.get("resources") or {}),
        CgroupsPath=_cgroups_path(linux.get("cgroupsPath") or "", container_id=container_id),
        # pid is asked for with sandbox_pidns; network is the machine's own; cgroup and time the agent's.
        Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in (*_GUEST_NAMESPACES, *({"user"} & wanted))],
        Devices=[device for d in linux.get("devices") or [] if (device := _device(d)) is not None],
        Seccomp=_seccomp(linux["seccomp"]) if seccomp and linux.get("seccomp") else None,
        RootfsPropagation=linux.get("rootfsPropagation") or "",
        MaskedPaths=linux.get("maskedPaths") or [],
        ReadonlyPaths=linux.get("readonlyPaths") or [],
    )


def _id_mapping(mapping: dict[str, Any]) -> oci_pb2.LinuxIDMapping:
    return oci_pb2.LinuxIDMapping(
        HostID=mapping["hostID"], ContainerID=mapping["containerID"], Size=mapping["size"]
    )


def _cgroups_path(path: str, *, container_id: str) -> str:
    # slice:prefix:name addresses a systemd that a guest does not run.
    return path if path.startswith("/") and ":" not in path else f"/{container_id}"


def _device(device: dict[str, Any]) -> oci_pb2.LinuxDevice | None:
    path = device["path"]
    if path in _DEFAULT_DEVICES:
        return None
    kind = device.get("type") or ""
    number = (device.get("major", 0), device.get("minor", 0))
    if kind != "p" and not (kind in {"c", "u"} and number in _GUEST_DEVICES):
        return None  # a privileged container lists every device of the host; the guest has none of them
    return oci_pb2.LinuxDevice(
        Path=path,
        Type=kind,
        Major=number[0],
        Minor=number[1],
        FileMode=device.get("fileMode") or 0,
        UID=device.get("uid") or 0,
        GID=device.get("gid") or 0,
    )


def translate_resources(resources: dict[str, Any]) -> oci_pb2.LinuxResources:
    """Translate a container's limits, at its creation or for an update."""
    memory = resources.get("memory") or {}
    cpu = resources.get("cpu") or {}
    pids = resources.get("pids") or {}
    return oci_pb2.LinuxResources(
        Devices=[
            oci_pb2.LinuxDeviceCgroup(
                Allow=bool(rule.get("allow", False)),
                Type=rule.get("type") or "a",
                Major=rule.get("major") or 0,
                Minor=rule.get("minor") or 0,
                Access=rule.get("access") or "rwm",
            )
            for rule in resources.get("devices") or []
        ],
        Memory=oci_pb2.LinuxMemory(
            Limit=memory.get("limit") or 0,
            Reservation=memory.get("reservation") or 0,
            Swap=memory.get("swap") or 0,
        )
        if memory
        else None,
        # cpuset names the host's processors and memory nodes: not the guest's.
        CPU=oci_pb2.LinuxCPU(
            Shares=cpu.get("shares") or 0, Quota=cpu.get("quota") or 0, Period=cpu.get("period") or 0
        )
        if cpu
        else None,
        Pids=oci_pb2.LinuxPids(Limit=pids.get("limit") or 0) if pids else None,
        HugepageLimits=[
            oci_pb2.LinuxHugepageLimit(Pagesize=limit["pageSize"], Limit=limit["limit"])
            for limit in resources.get("hugepageLimits") or []
        ],
    )


def _seccomp(profile: dict[str, Any]) -> oci_pb2.LinuxSeccomp:
    return oci_pb2.LinuxSeccomp(
        DefaultAction=profile["defaultAction"],
        Architectures=profile.get("architectures") or [],
        Flags=profile.get("flags") or [],
        Syscalls=[
            oci_pb2.LinuxSyscall(
                Names=rule["names"],
                Action=rule["action"],
                # An agent reads an absent number as 0, which turns a refusal into a success.
                errnoret=rule.get("errnoRet", _EPERM),
                Args=[
                    oci_pb2.LinuxSeccompArg(
                        Index=argument["index"],
                        Value=argument["value"],
                        ValueTwo=argument.get("valueTwo") or 0,
                        Op=argument["op"],
                    )
                    for argument in rule.get("args") or []
                ],
            )
            for rule in profile.get("syscalls") or []
        ],
    )
