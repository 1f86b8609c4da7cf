"""Strategies for the cases: messages of any kind, JSON of any shape, and slightly corrupted valid values."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from google.protobuf.message import Message


LONG = "x" * 300

texts = st.one_of(
    st.sampled_from(
        [
            "",
            "box",
            "shell",
            ".",
            "..",
            "../..",
            "a/b",
            "/",
            "/etc",
            "a\0b",
            "\n",
            LONG,
            "é",
            "rootfs",
            "none",
        ]
    ),
    st.text(max_size=20),
)

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        return st.one_of(
            st.sampled_from([value for value in (-1, 0, 1, 9, 15) if value >= low]), st.integers(low, high)
        )
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_STRING:
        return texts
    if field.type == FieldDescriptor.TYPE_ENUM:
        kinds: Any = field.enum_type
        return st.sampled_from([value.number for value in kinds.values])
    return st.binary(max_size=30)


@st.composite
def messages(draw: Callable[..., Any], descriptor: Any, *, depth: int = 4) -> Message:
    """A message in which any fields have any value of the right type."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if depth or field.message_type is None]
    for field in draw(st.lists(st.sampled_from(fields), unique_by=lambda f: f.number)) if fields else ():
        inner = field.message_type
        if inner is None:
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(_scalars(field), max_size=3)))
            else:
                setattr(message, field.name, draw(_scalars(field)))
        elif inner.GetOptions().map_entry:
            value = inner.fields_by_name["value"]
            for key in draw(st.lists(_scalars(inner.fields_by_name["key"]), max_size=2)):
                if value.message_type is None:
                    getattr(message, field.name)[key] = draw(_scalars(value))
                else:
                    getattr(message, field.name)[key].CopyFrom(
                        draw(messages(value.message_type, depth=depth - 1))
                    )
        elif field.is_repeated:
            for _ in range(draw(st.integers(0, 2))):
                getattr(message, field.name).add().CopyFrom(draw(messages(inner, depth=depth - 1)))
        else:
            getattr(message, field.name).CopyFrom(draw(messages(inner, depth=depth - 1)))
    return message


@st.composite
def bent(draw: Callable[..., Any], valid: st.SearchStrategy[Any]) -> bytes:
    """Bytes with a few random edits.

    :param valid: a strategy for the bytes.
    """
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        match draw(st.sampled_from(["overwrite", "insert", "remove", "repeat", "truncate"])):
            case "overwrite":
                data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
            case "insert":
                data[start:start] = draw(st.binary(max_size=8))
            case "remove":
                del data[start:end]
            case "repeat":
                data[start:start] = data[start:end] * draw(st.integers(1, 3))
            case "truncate":
                del data[start:]
    return bytes(data)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(
            [0, -1, 1 << 31, 1 << 63, 1 << 64, 1 << 70, -(1 << 70), 1.5, float("inf"), float("nan")]
        ),
        st.integers(),
        texts,
        st.just("\ud800"),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from _places(value[index], (*path, index))


@st.composite
def bent_json(draw: Any, valid: Any) -> Any:
    """A valid value in which some parts are missing, doubled or replaced.

    :param valid: the value, made of dicts, lists and scalars.
    """
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(value))))
        if not path:
            continue
        parent = value
        for step in path[:-1]:
            parent = parent[step]
        match draw(st.sampled_from(["replace", "remove", "repeat"])):
            case "replace":
                parent[path[-1]] = draw(json_values)
            case "remove":
                del parent[path[-1]]
            case "repeat" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
    return value


RESOURCES = {
    "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3}],
    "memory": {"limit": 1 << 26, "reservation": 1 << 25, "swap": 1 << 26, "swappiness": 60},
    "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0"},
    "pids": {"limit": 100},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 22}],
    "blockIO": {"weight": 10},
    "unified": {"memory.high": "1000"},
}

PROCESS = {
    "terminal": False,
    "consoleSize": {"height": 24, "width": 80},
    "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4], "username": "u"},
    "args": ["sh", "-c", "true"],
    "env": ["PATH=/bin", "A="],
    "cwd": "/",
    "capabilities": {
        name: ["CAP_CHOWN", "CAP_KILL"]
        for name in ("bounding", "effective", "inheritable", "permitted", "ambient")
    },
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}],
    "noNewPrivileges": True,
    "apparmorProfile": "default",
    "oomScoreAdj": 10,
    "selinuxLabel": "",
}

SPEC = {
    "ociVersion": "1.1.0",
    "process": PROCESS,
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "box",
    "domainname": "example",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "rw"]},
        {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["rbind", "ro"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]},
        {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind"]},
    ],
    "hooks": {"prestart": [{"path": "/bin/true"}]},
    "annotations": {"io.kubernetes.cri.sandbox-id": "box", "other": "x"},
    "linux": {
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "sysctl": {"net.core.somaxconn": "256"},
        "resources": RESOURCES,
        "cgroupsPath": "/default/box",
        "namespaces": [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}, {"type": "user"}],
        "devices": [
            {
                "path": "/dev/fuse",
                "type": "c",
                "major": 10,
                "minor": 229,
                "fileMode": 438,
                "uid": 0,
                "gid": 0,
            },
            {"path": "/dev/p", "type": "p"},
        ],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": [],
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 1,
                    "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "private",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
    },
}
