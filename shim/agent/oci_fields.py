"""The fields of the OCI runtime specification 1.2, one row each, and how a guest treats each of them.

A field that is sent goes to the field of the same name in the agent's message (letter case aside), so a
field needs only its row. A row stands for everything below its path.

https://github.com/opencontainers/runtime-spec/tree/v1.2.0
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

log = logging.getLogger(__name__)


class Fate(Enum):
    """How a field is treated."""

    SENT = "sent unchanged"
    REPLACED = "replaced by its equivalent in the guest"
    DROPPED = "left out, because the container does not need it"
    DONE = "left out, because the host handles it"
    REFUSED = "refused, because the container would rely on it"


@dataclass(frozen=True, slots=True)
class Row:
    """One field.

    :param path: its path in the specification, without indexes of lists.
    :param why: the reason for every fate except ``SENT``.
    :param harmless: values of a refused field, besides empty ones, that ask for nothing.
    """

    path: str
    fate: Fate
    why: str = ""
    harmless: tuple[Any, ...] = ()


def _sent(parent: str, *names: str) -> list[Row]:
    return [Row(f"{parent}.{name}" if parent else name, Fate.SENT) for name in names]


def _replaced(path: str, why: str) -> Row:
    return Row(path, Fate.REPLACED, why)


def _dropped(path: str, why: str) -> Row:
    return Row(path, Fate.DROPPED, why)


def _done(path: str, why: str) -> Row:
    return Row(path, Fate.DONE, why)


def _refused(path: str, why: str, *, harmless: tuple[Any, ...] = ()) -> Row:
    return Row(path, Fate.REFUSED, why, harmless)


_NO_WORD = "the guest's protocol has no field for it; leave it out"
_HOST_POLICY = "it names a policy loaded in the host's kernel; the guest's kernel has none"
_HOST_DISK = "the guest sees no block device of the host; limit the machine instead"
_HOST_PROGRAM = "it is a program of the host and runs there"
_NO_SUCH_PLACE = "it must run inside the container, which a program of the host cannot do; use createRuntime"
_NOT_LINUX = "the guest runs Linux; leave it out"
_CGROUP_V1 = "the guest has cgroup v2, which has no such limit; leave it out"

ROWS: tuple[Row, ...] = (
    _replaced("ociVersion", "it is called Version in the message"),
    *_sent("", "hostname", "annotations"),
    _replaced("domainname", "the message has no such field; it is sent as the sysctl kernel.domainname"),
    _replaced("root.path", "the host's directory is shared and has another path in the guest"),
    *_sent("root", "readonly"),
    # process
    _replaced("process.terminal", "the request's flag takes precedence"),
    *_sent("process", "consoleSize.height", "consoleSize.width", "args", "env", "cwd", "noNewPrivileges"),
    *_sent("process", "oomScoreAdj", "rlimits.type", "rlimits.soft", "rlimits.hard"),
    *_sent("process.user", "uid", "gid", "additionalGids"),
    _replaced("process.user.umask", "the message has no such field; it is sent as an annotation"),
    _dropped("process.user.username", "only Windows uses it"),
    *_sent("process.capabilities", "bounding", "effective", "permitted", "inheritable", "ambient"),
    _dropped("process.apparmorProfile", _HOST_POLICY),
    _dropped("process.selinuxLabel", _HOST_POLICY),
    _refused("process.scheduler", _NO_WORD),
    _refused("process.ioPriority", _NO_WORD),
    _refused("process.execCPUAffinity", "it names the host's processors; leave it out"),
    _dropped("process.commandLine", "only Windows uses it"),
    # mounts
    *_sent("mounts", "destination"),
    _replaced("mounts.type", "the options alone can say that it is a bind mount"),
    _replaced("mounts.source", "a file of the host is shared and has another path in the guest"),
    _replaced("mounts.options", "the pod's shared memory also gets the options of its file system"),
    _refused("mounts.uidMappings", _NO_WORD),
    _refused("mounts.gidMappings", _NO_WORD),
    *(
        _done(f"hooks.{kind}", _HOST_PROGRAM)
        for kind in ("prestart", "createRuntime", "poststart", "poststop")
    ),
    *(_refused(f"hooks.{kind}", _NO_SUCH_PLACE) for kind in ("createContainer", "startContainer")),
    # linux
    _replaced("linux.namespaces.type", "the guest chooses; most namespaces belong to the sandbox"),
    _replaced("linux.namespaces.path", "a namespace of the host has no meaning in the guest"),
    *_sent("linux", "uidMappings.hostID", "uidMappings.containerID", "uidMappings.size"),
    *_sent("linux", "gidMappings.hostID", "gidMappings.containerID", "gidMappings.size"),
    _refused("linux.timeOffsets", _NO_WORD),
    *_sent("linux.devices", "path", "type", "major", "minor", "fileMode", "uid", "gid"),
    _refused("linux.netDevices", "the host's interfaces are not in the guest; leave it out"),
    _replaced(
        "linux.cgroupsPath", "the machine counts there; in the guest, each container has its own cgroup"
    ),
    *_sent("linux", "sysctl", "rootfsPropagation", "maskedPaths", "readonlyPaths"),
    _dropped("linux.mountLabel", _HOST_POLICY),
    _refused("linux.personality", _NO_WORD),
    _refused("linux.intelRdt", "the guest's processors have no cache to partition; leave it out"),
    _refused("linux.memoryPolicy", _NO_WORD),
    # linux.seccomp
    *_sent("linux.seccomp", "defaultAction", "architectures", "flags"),
    _replaced("linux.seccomp.defaultErrnoRet", "the message has no such field; it is sent as an annotation"),
    _refused("linux.seccomp.listenerPath", "the listener is on the host and cannot see the guest's calls"),
    _refused("linux.seccomp.listenerMetadata", "the listener is on the host; leave it out"),
    *_sent("linux.seccomp.syscalls", "names", "action"),
    _replaced("linux.seccomp.syscalls.errnoRet", "agents read a missing value as success, so EPERM is sent"),
    *_sent("linux.seccomp.syscalls.args", "index", "value", "valueTwo", "op"),
    # linux.resources
    *_sent("linux.resources.devices", "allow", "type", "major", "minor", "access"),
    *_sent("linux.resources.memory", "limit", "reservation", "swap"),
    _dropped("linux.resources.memory.kernel", "the kernel's memory counts against the limit in any case"),
    _dropped("linux.resources.memory.kernelTCP", "TCP's memory counts against the limit in any case"),
    _dropped("linux.resources.memory.swappiness", "the guest has no swap"),
    _refused("linux.resources.memory.disableOOMKiller", _CGROUP_V1),
    _dropped("linux.resources.memory.useHierarchy", "the guest has cgroup v2, which always does this"),
    _refused("linux.resources.memory.checkBeforeUpdate", _NO_WORD),
    *_sent("linux.resources.cpu", "shares", "quota", "period"),
    _refused("linux.resources.cpu.burst", _NO_WORD),
    _refused("linux.resources.cpu.realtimeRuntime", _CGROUP_V1),
    _refused("linux.resources.cpu.realtimePeriod", _CGROUP_V1),
    _dropped("linux.resources.cpu.cpus", "it names the host's processors, to which the machine is pinned"),
    _dropped("linux.resources.cpu.mems", "it names the host's memory nodes; the machine has its own"),
    _refused("linux.resources.cpu.idle", _NO_WORD),
    *_sent("linux.resources", "pids.limit"),
    _refused("linux.resources.blockIO", _HOST_DISK),
    *_sent("linux.resources.hugepageLimits", "pageSize", "limit"),
    _refused("linux.resources.network", _CGROUP_V1),
    _refused("linux.resources.rdma", "the guest has no RDMA device; leave it out"),
    _replaced("linux.resources.unified", "the message has no such field; each key is sent as an annotation"),
    *(_refused(other, _NOT_LINUX) for other in ("solaris", "windows", "zos", "freebsd")),
    _refused("vm", "this runtime's configuration defines the machine; leave it out"),
)

_TABLE = {row.path: row for row in ROWS}
_OBJECTS = {path.rsplit(".", depth)[0] for path in _TABLE for depth in range(1, path.count(".") + 1)}
_RENAMED = {"ociversion": "version"}


def copy(source: Mapping[str, Any], message: Message, *, path: str) -> None:
    """Copy one JSON object into the message that carries it, as the table says.

    A field without a row is left out with a warning. It is newer than the table, and a client may set it in
    every container.

    :param source: the decoded object.
    :param message: the message to fill.
    :param path: the object's own path; empty for the whole specification.
    :raises InvalidArgument: if it asks for something that is refused.
    :raises TypeError, ValueError, AttributeError: if a value is not of its field's type.
    """
    for key, value in source.items():
        where = f"{path}.{key}" if path else key
        if value is None:
            continue
        if where in _OBJECTS:
            _copy_objects(value, message, _field(message, key), path=where)
            continue
        row = _TABLE.get(where)
        if row is None:
            log.warning("spec: %s: not a field of the runtime specification 1.2; left out", where)
        elif row.fate is Fate.REFUSED and _asks_for_something(value) and value not in row.harmless:
            raise InvalidArgument(f"spec: {where}: {row.why}")
        elif row.fate in {Fate.SENT, Fate.REPLACED}:
            _copy_value(value, message, _field(message, key))


def _asks_for_something(value: Any) -> bool:
    """Tell whether a value is set; some clients send objects that are all zeros."""
    if isinstance(value, dict):
        return any(_asks_for_something(item) for item in value.values())
    return bool(value)


def _field(message: Message, key: str) -> FieldDescriptor:
    wanted = _RENAMED.get(key.lower(), key.lower())
    found: FieldDescriptor = next(f for f in message.DESCRIPTOR.fields if f.name.lower() == wanted)  # type: ignore[assignment]  # two implementations of one class
    return found


def _copy_objects(value: Any, message: Message, field: FieldDescriptor, *, path: str) -> None:
    inner = getattr(message, field.name)
    if field.is_repeated:
        if not isinstance(value, list):
            raise TypeError(f"{path}: {type(value).__name__} is not a list")
        for element in value:
            copy(element, inner.add(), path=path)
    else:
        inner.SetInParent()
        copy(value, inner, path=path)


def _copy_value(value: Any, message: Message, field: FieldDescriptor) -> None:
    if not field.is_repeated:
        setattr(message, field.name, value)
    elif field.message_type is not None:  # a map
        getattr(message, field.name).update(value)
    elif isinstance(value, list):
        getattr(message, field.name).extend(value)
    else:
        raise TypeError(f"{field.name}: {type(value).__name__} is not a list")


@contextmanager
def refusing_malformed(what: str) -> Iterator[None]:
    """Turn the exceptions of reading malformed JSON into a refusal.

    :param what: how the message begins.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{what}: malformed: {error}") from error
