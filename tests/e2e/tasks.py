"""containerd's own services, called one step at a time: finer than ``ctr`` can."""

from __future__ import annotations

import functools
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from proto.containerd import events_pb2
from tests.e2e.containerd import CALL_TIMEOUT_S, NAMESPACE
from tests.protocol import compiled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor import ServiceDescriptor

_PROTO = Path(__file__).with_name("containerd_services.proto")
_SERVICES = {"Tasks": "tasks", "Containers": "containers", "Snapshots": "snapshots", "Events": "events"}
_SNAPSHOTTER = "overlayfs"
_FOLLOWED = ("/tasks/exit", "/tasks/oom", "/tasks/delete")
_SUBSCRIBED = "/tests/subscribed"
_PUBLISH_AGAIN_S = 0.1


@functools.cache
def _service(name: str) -> ServiceDescriptor:
    return compiled(_PROTO).FindServiceByName(f"containerd.services.{name}")


@dataclass(slots=True)
class Exits:
    """The events that containerd has sent on about the ends of processes and tasks.

    ``seen`` has the id and the status of each process that has ended, and ``topics`` the topic and the
    container of each event.
    """

    seen: list[tuple[str, int]] = field(default_factory=list)
    topics: list[tuple[str, str]] = field(default_factory=list)
    is_subscribed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def of(self, name: str) -> list[int]:
        """Return the status in every event about a process, in order."""
        with self.changed:
            return [status for process, status in self.seen if process == name]

    def wait_for(self, name: str, *, timeout_s: float) -> bool:
        """Wait for the first event about a process; tell whether it came."""
        with self.changed:
            return self.changed.wait_for(
                lambda: any(process == name for process, _ in self.seen), timeout=timeout_s
            )

    def topics_until(self, topic: str, container: str) -> list[str]:
        """Wait for the first event of a topic about a container.

        :returns: the topics of all events about it up to then.
        :raises TimeoutError: if there is none in time.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: (topic, container) in self.topics, timeout=CALL_TIMEOUT_S):
                raise TimeoutError(f"no {topic} of {container} in {self.topics}")
            of_container = [each for each, about in self.topics if about == container]
        return of_container[: of_container.index(topic) + 1]

    def follow(self, stream: Iterable[Any]) -> None:
        """Collect until the connection ends."""
        try:
            for envelope in stream:
                with self.changed:
                    self._note(envelope)
                    self.changed.notify_all()
        except grpc.RpcError:
            return

    def _note(self, envelope: Any) -> None:
        if envelope.topic == _SUBSCRIBED:
            self.is_subscribed = True
            return
        # All of these events have the container in the same place.
        container = events_pb2.TaskOOM.FromString(envelope.event.value).container_id
        self.topics.append((envelope.topic, container))
        if envelope.topic == "/tasks/exit":
            event = events_pb2.TaskExit.FromString(envelope.event.value)
            self.seen.append((event.id, event.exit_status))


class Tasks:
    """A connection to a containerd.

    :param address: the path of its gRPC socket.
    :param namespace: the namespace of the containers and tasks.
    """

    def __init__(self, address: Path, *, namespace: str = NAMESPACE) -> None:
        self._namespace = namespace
        self._channel = grpc.insecure_channel(f"unix://{address}")
        grpc.channel_ready_future(self._channel).result(CALL_TIMEOUT_S)

    def __enter__(self) -> Self:
        """Return the connection; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._channel.close()

    def begin(self, name: str, container: str, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Any:
        """Call a method of the task service on a container; return the call, which is under way."""
        return self._call("Tasks", name, {"container_id": container, **fields}, timeout_s=timeout_s)

    def call(self, name: str, container: str, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Any:
        """Call a method of the task service on a container, and return its answer.

        :raises grpc.RpcError: if containerd or the shim refuses.
        """
        return self.begin(name, container, timeout_s=timeout_s, **fields).result()

    def begin_create(self, container: str, **streams: Any) -> Any:
        """Begin to create the task of a container that ``ctr`` has created."""
        snapshot = {"snapshotter": _SNAPSHOTTER, "key": container}
        mounts = self._call("Snapshots", "Mounts", snapshot, timeout_s=CALL_TIMEOUT_S).result().mounts
        rootfs = [
            {"type": mount.type, "source": mount.source, "options": list(mount.options)} for mount in mounts
        ]
        return self.begin("Create", container, rootfs=rootfs, **streams)

    def add_exec(self, container: str, exec_id: str, *command: str) -> None:
        """Register an exec, which Start then runs."""
        process = {"args": command, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
        kind = "types.containerd.io/opencontainers/runtime-spec/1/Process"
        spec = {"type_url": kind, "value": json.dumps(process).encode()}
        self.call("Exec", container, exec_id=exec_id, spec=spec)

    def state(self, container: str) -> tuple[str, int]:
        """Return a task's state and exit status; ``GONE`` if none, ``UNKNOWN`` if its shim is gone."""
        try:
            process = self.call("Get", container).process
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return ("GONE", 0)
            # A shim over gRPC is dead, and containerd has yet to notice.
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return ("UNKNOWN", 0)
            raise
        status = process.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[process.status]
        return (status.name, process.exit_status)

    def containers(self) -> list[str]:
        """Return the id of every container."""
        listed = self._call("Containers", "List", {}, timeout_s=CALL_TIMEOUT_S).result()
        return [container.id for container in listed.containers]

    def active_snapshots(self) -> list[str]:
        """Return the key of every snapshot that belongs to a container and not to an image."""
        parts = self._call("Snapshots", "List", {"snapshotter": _SNAPSHOTTER}, timeout_s=CALL_TIMEOUT_S)
        active = _service("Snapshots").file.enum_types_by_name["Kind"].values_by_name["ACTIVE"].number
        return [snapshot.name for part in parts for snapshot in part.info if snapshot.kind == active]

    def subscribe(self, exits: Exits) -> None:
        """Collect the exits that containerd reports while this connection is open, from now on.

        containerd does not say when a subscription begins, so events are published until one arrives.

        :raises TimeoutError: if none does.
        """
        exits.is_subscribed = False
        topics = [f'topic=="{topic}"' for topic in (*_FOLLOWED, _SUBSCRIBED)]
        stream = self._call("Events", "Subscribe", {"filters": topics}, timeout_s=None)
        threading.Thread(target=exits.follow, args=(stream,), daemon=True).start()
        event = {"type_url": "containerd.events.TaskExit"}
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while time.monotonic() < deadline:
            publishing = {"topic": _SUBSCRIBED, "event": event}
            self._call("Events", "Publish", publishing, timeout_s=CALL_TIMEOUT_S).result()
            with exits.changed:
                if exits.changed.wait_for(lambda: exits.is_subscribed, timeout=_PUBLISH_AGAIN_S):
                    return
        raise TimeoutError("events: containerd has not begun to send them")

    def _call(self, service: str, name: str, fields: dict[str, Any], *, timeout_s: float | None) -> Any:
        method = _service(service).methods_by_name[name]
        path = f"/containerd.services.{_SERVICES[service]}.v1.{service}/{name}"
        streams = method.server_streaming
        make: Any = self._channel.unary_stream if streams else self._channel.unary_unary
        request = GetMessageClass(method.input_type)
        callee = make(
            path,
            request_serializer=request.SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        metadata = (("containerd-namespace", self._namespace),)
        begin = callee if streams else callee.future
        return begin(request(**fields), timeout=timeout_s, metadata=metadata)


def outcomes(calls: Iterable[Any], *, timeout_s: float) -> Iterator[grpc.StatusCode]:
    """Wait for the ends of calls, and yield how each ended.

    :raises grpc.FutureTimeoutError: if one does not end in time.
    """
    for call in calls:
        error = call.exception(timeout_s)
        yield grpc.StatusCode.OK if error is None else error.code()
