"""The state directory of a sandbox, which ``start`` leaves for the daemon and for ``delete``."""

from __future__ import annotations

import json
import os

from shim.host import file_lock, private_directory
from shim.record import Record
from shim.refusal import Refusal

_RECORD = "sandbox.json"
_POINTER = "hako"
LOCK_TIMEOUT_S = 90.0
"""Longer than a start may take: it holds the lock until its shim is ready."""


class StartRecord(Record):
    """Everything that the daemon needs to know about its start."""

    namespace: str
    #: Id of the sandbox: the group of the containers in it.
    id: str
    #: Bundle of the container that started the sandbox.
    bundle: str
    #: containerd's gRPC and ttrpc sockets, bare paths.
    grpc_address: str
    ttrpc_address: str
    #: The containerd executable.
    publish_binary: str
    #: The configuration that ``start`` found, without defaults, and its files.
    config_text: str
    config_source: str
    #: ``ttrpc`` or ``grpc``: what containerd speaks on ``socket_path``.
    protocol: str
    #: 2, or 3: containerd adds more containers without calling ``start``.
    version: int = 2
    socket_path: str
    state_directory: str
    #: containerd runs at debug level.
    debug: bool
    #: containerd's dialect of ``start``: ``1.6``, ``1.7`` (1.7 to 2.2) or ``2.3`` (and later).
    dialect: str
    #: Seconds since the epoch.
    started_at: float
    #: Hako's version, such as ``0.1.0``; empty in records of older versions.
    hako_version: str = ""


def path_of(state_dir: str, socket_name: str) -> str:
    """Return the state directory of a sandbox.

    :param state_dir: the directory of all sandboxes.
    :param socket_name: the name of the sandbox's socket, which is unique to it.
    """
    return os.path.join(state_dir, socket_name[:16])


def write_record(record: StartRecord) -> None:
    """Write the record into its state directory, whole or not at all."""
    write_atomically(os.path.join(record.state_directory, _RECORD), json.dumps(record.as_dict(), indent=1))


def read_record(state_directory: str) -> StartRecord:
    """Read the record back.

    :param state_directory: the state directory of the sandbox.
    :returns: the record; if a newer version of Hako wrote it, without unknown fields.
    :raises FileNotFoundError: if the sandbox is gone.
    """
    with open(os.path.join(state_directory, _RECORD), encoding="utf-8") as file:
        values = json.load(file)
    return StartRecord(**{name: values[name] for name in StartRecord.fields() if name in values})


def write_atomically(path: str, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees all of it or none of it."""
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(temporary, path)


def point_to(state_directory: str, *, bundle: str) -> None:
    """Leave a link in the bundle, so that ``delete`` needs no configuration to find the state directory."""
    temporary = os.path.join(bundle, f".{_POINTER}.{os.getpid()}")
    os.symlink(state_directory, temporary)
    os.rename(temporary, os.path.join(bundle, _POINTER))


def pointed_to(bundle: str) -> str | None:
    """Follow the link that ``point_to`` made.

    :param bundle: the bundle directory.
    :returns: the state directory, or None if ``start`` did not get that far.
    """
    try:
        return os.readlink(os.path.join(bundle, _POINTER))
    except OSError:
        return None


def lock(state_directory: str) -> int:
    """Take the lock that keeps ``start`` and ``delete`` of one sandbox apart.

    :param state_directory: the state directory, which is also the lock; made with mode 0700 if missing.
    :returns: a descriptor that holds the lock until it is closed.
    :raises Refusal: if the lock is not free in time.
    """
    while True:
        private_directory.make(state_directory)
        descriptor = lock_existing(state_directory)
        if descriptor is not None:
            return descriptor


def lock_existing(state_directory: str, *, wait: bool = True) -> int | None:
    """Take the same lock, unless the state directory does not exist, or is gone once the lock is free.

    :param state_directory: the state directory.
    :param wait: wait until the lock is free. A shim that ends must not wait: ``start`` holds the lock until
        the shim is ready or dead, and undoes what a dead shim made.
    :returns: a descriptor that holds the lock until it is closed, or None.
    :raises Refusal: if the lock is not free in time.
    """
    try:
        descriptor = os.open(state_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        is_locked = file_lock.take(descriptor, timeout_s=LOCK_TIMEOUT_S if wait else 0.0)
        if wait and not is_locked:
            raise Refusal(
                f"lock: {state_directory}: another start or delete has held it for {LOCK_TIMEOUT_S:g} s; "
                "find it with `fuser` and end it"
            )
        # The previous holder may have removed the directory that we opened.
        if is_locked and os.path.samestat(os.fstat(descriptor), os.stat(state_directory)):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
