"""The protocol's OCI messages as the runtime specification's JSON, for crun.

A guest with cgroup v2 and no AppArmor profiles cannot honour some fields, and crun would refuse a container
that has them. So the agent leaves out kernel and TCP memory, swappiness, the OOM killer switch, realtime CPU
time, network classes, AppArmor and SELinux labels. Hooks are programs of the host and do not exist here.
Sysctls are set by the agent (see sysctl): crun knows neither shared namespaces nor those that are the whole
machine's.
"""

from __future__ import annotations

from guest.agent import huge_pages
from proto.extensions import DEFAULT_ERRNO_ANNOTATION, UMASK_ANNOTATION, UNIFIED_ANNOTATION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest.agent.wire import Message

VERSION = "1.0.2"
_EPERM = 1
_WITH_ERRNO = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"})


def process(message: Message) -> dict[str, Any]:
    """Translate a process.

    :param message: grpc.Process.
    :returns: the ``process`` object.
    """
    document: dict[str, Any] = {
        "terminal": message.Terminal,
        "user": _user(message.User),
        "args": message.Args or ["sh"],
        "env": message.Env,
        "cwd": message.Cwd or "/",
        "noNewPrivileges": message.NoNewPrivileges,
    }
    if message.ConsoleSize is not None and message.ConsoleSize.Height and message.ConsoleSize.Width:
        document["consoleSize"] = {
            "height": message.ConsoleSize.Height,
            "width": message.ConsoleSize.Width,
        }
    if message.Capabilities is not None:
        document["capabilities"] = {
            kind.lower(): [name if name.startswith("CAP_") else f"CAP_{name}" for name in names]
            for kind, names in vars(message.Capabilities).items()
        }
    if message.Rlimits:
        document["rlimits"] = [
            {"type": limit.Type, "hard": limit.Hard, "soft": limit.Soft} for limit in message.Rlimits
        ]
    if message.OOMScoreAdj:
        document["oomScoreAdj"] = message.OOMScoreAdj
    return document


def _user(message: Message | None) -> dict[str, Any]:
    if message is None:
        return {"uid": 0, "gid": 0}
    user: dict[str, Any] = {"uid": message.UID, "gid": message.GID}
    if message.AdditionalGids:
        user["additionalGids"] = message.AdditionalGids
    return user


def spec(message: Message, *, rootfs: str, namespaces: list[dict[str, str]], cgroup: str) -> dict[str, Any]:
    """Translate a container.

    :param message: grpc.Spec with Process, Root and Linux.
    :param rootfs: the root directory, absolute.
    :param namespaces: the final list of namespaces.
    :param cgroup: the final cgroup path.
    :returns: the whole ``config.json``.
    """
    document: dict[str, Any] = {
        "ociVersion": VERSION,
        "process": process(message.Process),
        "root": {"path": rootfs, "readonly": message.Root.Readonly},
        "mounts": [_mount(mount) for mount in message.Mounts],
        "annotations": message.Annotations,
        "linux": _linux(message.Linux, namespaces=namespaces, cgroup=cgroup),
    }
    _apply_annotations(document["linux"], message.Annotations)
    if UMASK_ANNOTATION in message.Annotations:
        document["process"]["user"]["umask"] = int(message.Annotations[UMASK_ANNOTATION])
    # A joined UTS namespace keeps the name that CreateSandbox gave it.
    if message.Hostname and {"type": "uts"} in namespaces:
        document["hostname"] = message.Hostname
    return document


def _apply_annotations(linux: dict[str, Any], annotations: dict[str, str]) -> None:
    unified = {
        key.removeprefix(UNIFIED_ANNOTATION): value
        for key, value in annotations.items()
        if key.startswith(UNIFIED_ANNOTATION)
    }
    if unified:
        linux.setdefault("resources", {})["unified"] = unified
    # crun refuses a number with an action that does not use it.
    default_errno = annotations.get(DEFAULT_ERRNO_ANNOTATION)
    if default_errno is not None and linux.get("seccomp", {}).get("defaultAction") in _WITH_ERRNO:
        linux["seccomp"]["defaultErrnoRet"] = int(default_errno)


def _mount(message: Message) -> dict[str, Any]:
    mount: dict[str, Any] = {"destination": message.destination}
    if message.type:
        mount["type"] = message.type
    if message.source:
        mount["source"] = message.source
    if message.options:
        mount["options"] = message.options
    return mount


def _linux(message: Message, *, namespaces: list[dict[str, str]], cgroup: str) -> dict[str, Any]:
    document: dict[str, Any] = {"namespaces": namespaces, "cgroupsPath": cgroup}
    for key, maps in (("uidMappings", message.UIDMappings), ("gidMappings", message.GIDMappings)):
        if maps:
            document[key] = [_id_map(one) for one in maps]
    if message.Devices:
        document["devices"] = [_device(device) for device in message.Devices]
    if message.Resources is not None:
        document["resources"] = resources(message.Resources)
    if message.Seccomp is not None:
        document["seccomp"] = _seccomp(message.Seccomp)
    optional = {
        "rootfsPropagation": message.RootfsPropagation,
        "maskedPaths": message.MaskedPaths,
        "readonlyPaths": message.ReadonlyPaths,
    }
    return document | {key: value for key, value in optional.items() if value}


def _id_map(message: Message) -> dict[str, int]:
    return {"hostID": message.HostID, "containerID": message.ContainerID, "size": message.Size}


def _device(message: Message) -> dict[str, Any]:
    device = {
        "path": message.Path,
        "type": message.Type,
        "major": message.Major,
        "minor": message.Minor,
        "uid": message.UID,
        "gid": message.GID,
    }
    if message.FileMode:
        device["fileMode"] = message.FileMode
    return device


def resources(message: Message) -> dict[str, Any]:
    """Translate limits; 0 means unset, as the protocol does not tell them apart, and -1 means no limit.

    :param message: grpc.LinuxResources.
    :returns: the ``resources`` object.
    """
    document: dict[str, Any] = {}
    if message.Devices:
        document["devices"] = [_device_rule(rule) for rule in message.Devices]
    if message.Memory is not None:
        memory = message.Memory
        document["memory"] = _set(
            {"limit": memory.Limit, "reservation": memory.Reservation, "swap": memory.Swap}
        )
    if message.CPU is not None:
        cpu = message.CPU
        document["cpu"] = _set({"shares": cpu.Shares, "quota": cpu.Quota, "period": cpu.Period})
        document["cpu"] |= {key: value for key, value in (("cpus", cpu.Cpus), ("mems", cpu.Mems)) if value}
    if message.Pids is not None and message.Pids.Limit:
        document["pids"] = {"limit": message.Pids.Limit}
    if message.BlockIO is not None:
        document["blockIO"] = _block_io(message.BlockIO)
    if message.HugepageLimits:
        document["hugepageLimits"] = [
            {"pageSize": limit.Pagesize, "limit": limit.Limit}
            for limit in message.HugepageLimits
            # A limit of 0 may name a page size that the machine lacks.
            if limit.Limit or huge_pages.is_known(limit.Pagesize)
        ]
    return document


def _set(values: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if value}


def _positive(values: dict[str, int]) -> dict[str, int]:
    return {key: value for key, value in values.items() if value > 0}


def _device_rule(message: Message) -> dict[str, Any]:
    rule = {"allow": message.Allow, "type": message.Type or "a", "access": message.Access or "rwm"}
    # Absent numbers arrive as 0 and mean any; so does -1.
    return rule | _positive({"major": message.Major, "minor": message.Minor})


def _block_io(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = _positive({"weight": message.Weight})
    for key, devices in (
        ("throttleReadBpsDevice", message.ThrottleReadBpsDevice),
        ("throttleWriteBpsDevice", message.ThrottleWriteBpsDevice),
        ("throttleReadIOPSDevice", message.ThrottleReadIOPSDevice),
        ("throttleWriteIOPSDevice", message.ThrottleWriteIOPSDevice),
    ):
        if devices:
            document[key] = [
                {"major": device.Major, "minor": device.Minor, "rate": device.Rate} for device in devices
            ]
    return document


def _seccomp(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = {
        "defaultAction": message.DefaultAction,
        "syscalls": [_syscall(rule) for rule in message.Syscalls],
    }
    if message.Architectures:
        document["architectures"] = message.Architectures
    if message.Flags:
        document["flags"] = message.Flags
    return document


def _syscall(message: Message) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": message.Names, "action": message.Action}
    if message.Action in _WITH_ERRNO:
        rule["errnoRet"] = _EPERM if message.errnoret is None else message.errnoret
    if message.Args:
        rule["args"] = [
            {"index": arg.Index, "value": arg.Value, "valueTwo": arg.ValueTwo, "op": arg.Op}
            for arg in message.Args
        ]
    return rule
