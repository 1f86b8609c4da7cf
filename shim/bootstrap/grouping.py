"""Find the shim that serves a container: the container's group, and the socket path derived from it."""

from __future__ import annotations

import os

from shim.annotations import GROUP, KIND, POD
from shim.host import spec_file
from shim.refusal import Refusal

_MAX_SOCKET_PATH = 106


def group_of(bundle: str, container: str) -> str:
    """Read the group of a container from the annotations of its OCI spec.

    A pod may choose annotations, but never its machine: containers of Kubernetes are grouped by the id that
    containerd itself gave to their pod.

    :param bundle: the bundle directory; one without ``config.json`` is a sandbox that containerd made itself.
    :param container: the container's id.
    :returns: the group; without an annotation, the container's own id.
    :raises Refusal: if the spec is not JSON, or a pod's container names a group that is not its pod.
    """
    annotations = _annotations_of(bundle) or {}
    named = _text(annotations, GROUP)
    pod = _text(annotations, POD)
    if KIND not in annotations:
        return named or pod or container
    own = pod or container
    if named and named != own:
        raise Refusal(
            f"start: container {container}: {GROUP} names {named}, which is not its pod {own}; "
            "remove the annotation"
        )
    return own


def _text(annotations: dict[str, object], key: str) -> str:
    value = annotations.get(key)
    return value if isinstance(value, str) else ""


def is_pod(bundle: str) -> bool:
    """Tell whether a bundle belongs to a pod's sandbox, to which containerd will add the pod's containers.

    :param bundle: the bundle directory.
    :raises Refusal: if the spec cannot be read.
    """
    annotations = _annotations_of(bundle)
    return annotations is None or annotations.get(KIND) == "sandbox"


def _annotations_of(bundle: str) -> dict[str, object] | None:
    """Read the annotations of the OCI spec, or nothing if there is no spec."""
    path = spec_file.path_in(bundle)
    try:
        spec = spec_file.read(bundle)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refusal(f"start: {path}: {error.strerror}; recreate the container") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"start: {path}: not JSON: {error}; recreate the container") from error
    annotations = spec.get("annotations") if isinstance(spec, dict) else None
    return annotations if isinstance(annotations, dict) else {}


def socket_name(*, address: str, namespace: str, group: str) -> str:
    """Name the socket in the way that containerd's own tools expect.

    :param address: containerd's gRPC address as given on the command line.
    :param namespace: the containerd namespace.
    :param group: the group of the container.
    :returns: the hexadecimal SHA-256 of the three joined as Go's ``filepath.Join`` does.
    """
    import hashlib  # noqa: PLC0415 - loads OpenSSL, which only start and delete need

    joined = os.path.normpath("/".join(part for part in (address, namespace, group) if part))
    if joined.startswith("//"):
        joined = joined[1:]
    return hashlib.sha256(joined.encode()).hexdigest()


def socket_path(directory: str, name: str) -> str:
    """Return a socket's path in the directory that containerd chose.

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
