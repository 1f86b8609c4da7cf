"""Which shim serves a container: its group, and the socket path that follows from it."""

from __future__ import annotations

import json
import os

from shim.refusal import Refusal

_GROUP_ANNOTATION = "io.containerd.runc.v2.group"
#: containerd's id of the pod that a container belongs to.
POD_ANNOTATION = "io.kubernetes.cri.sandbox-id"
#: What containerd's CRI says of a container: ``sandbox`` of the one that stands for its pod.
KIND_ANNOTATION = "io.kubernetes.cri.container-type"
_MAX_IDENTIFIER = 76
_MAX_SOCKET_PATH = 106


def check_identifier(identifier: str, *, phase: str, what: str) -> None:
    """Accept only what containerd accepts as an identifier, and what therefore is one safe path segment.

    :param identifier: an id, a namespace or a group.
    :param phase: how the message begins.
    :param what: how the message names it.
    :raises Refusal: if it is empty, longer than 76 characters, or has other characters than letters, digits,
        ``-``, ``_`` and ``.``, or does not start with a letter or digit.
    """
    if not identifier:
        raise Refusal(f"{phase}: {what}: it is empty; give one")
    if len(identifier) > _MAX_IDENTIFIER:
        raise Refusal(
            f"{phase}: {what} {identifier[:16]}...: it has {len(identifier)} characters; "
            f"give at most {_MAX_IDENTIFIER}"
        )
    plain = identifier.translate({ord(mark): None for mark in "-_."})
    if not (plain.isascii() and plain.isalnum() and identifier[0].isalnum()):
        raise Refusal(
            f"{phase}: {what} {identifier!r}: it must be letters, digits, '-', '_' and '.', "
            "with a letter or digit first; choose another"
        )


def group_of(bundle: str, container: str) -> str:
    """Read the group of a container from the annotations of its OCI spec.

    A pod may be allowed to choose annotations, but never its machine: what Kubernetes runs is grouped by the
    id that containerd itself gave to its pod.

    :param bundle: the bundle directory; one without ``config.json`` is a sandbox that containerd made itself.
    :param container: the container's id.
    :returns: the group, which is the container's own id when no annotation names another.
    :raises Refusal: if the spec is not JSON, or a pod's container names a group that is not its pod.
    """
    annotations = _annotations_of(bundle) or {}
    named = _text(annotations, _GROUP_ANNOTATION)
    pod = _text(annotations, POD_ANNOTATION)
    if KIND_ANNOTATION not in annotations:
        return named or pod or container
    own = pod or container
    if named and named != own:
        raise Refusal(
            f"start: container {container}: {_GROUP_ANNOTATION} names {named}, which is not its pod {own}; "
            "remove the annotation"
        )
    return own


def _text(annotations: dict[str, object], key: str) -> str:
    value = annotations.get(key)
    return value if isinstance(value, str) else ""


def is_pod(bundle: str) -> bool:
    """Tell whether a bundle is that of a pod's sandbox, to which containerd will add the pod's containers.

    :param bundle: the bundle directory.
    :raises Refusal: if the spec is not JSON.
    """
    annotations = _annotations_of(bundle)
    return annotations is None or annotations.get(KIND_ANNOTATION) == "sandbox"


def _annotations_of(bundle: str) -> dict[str, object] | None:
    """Read the annotations of the OCI spec, or nothing if there is no spec."""
    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as file:
            spec = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"start: {path}: not JSON: {error}; recreate the container") from error
    annotations = spec.get("annotations") if isinstance(spec, dict) else None
    return annotations if isinstance(annotations, dict) else {}


def socket_name(*, address: str, namespace: str, group: str) -> str:
    """Name the socket as containerd's own tools expect it.

    :param address: containerd's gRPC address as given on the command line.
    :param namespace: the containerd namespace.
    :param group: the group of the container.
    :returns: the hexadecimal SHA-256 of the three joined as Go's ``filepath.Join`` does.
    """
    import hashlib  # noqa: PLC0415 - links OpenSSL: only start and delete pay for it

    joined = os.path.normpath("/".join(part for part in (address, namespace, group) if part))
    if joined.startswith("//"):
        joined = joined[1:]
    return hashlib.sha256(joined.encode()).hexdigest()


def socket_path(directory: str, name: str) -> str:
    """Place a socket in the directory that containerd chose.

    :param directory: the directory of shim sockets.
    :param name: the name of the socket.
    :returns: the path.
    :raises Refusal: if the path is too long for a unix socket address.
    """
    path = os.path.join(directory, name)
    if len(path.encode()) > _MAX_SOCKET_PATH:
        raise Refusal(
            f"start: {path}: {len(path.encode())} bytes are too long for a unix socket; shorten socket_dir"
        )
    return path
