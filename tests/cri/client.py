"""A client of the Kubernetes container runtime interface, as much of a kubelet as the tests need."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from tests.patience import patient
from tests.protocol import compiled

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor

CALL_TIMEOUT_S = patient(300.0)
"""More than a pod's machine may take to boot."""
MESSAGE_LIMIT = 32 << 20
"""A command may have twice 16 MiB of output."""
_PROTO = Path(__file__).with_name("runtime.proto")


@functools.cache
def _methods() -> dict[str, MethodDescriptor]:
    pool = compiled(_PROTO)
    services = [pool.FindServiceByName(f"runtime.v1.{name}Service") for name in ("Runtime", "Image")]
    return {method.name: method for service in services for method in service.methods}


class Cri:
    """A connection to the runtime and image services of a containerd.

    :param address: the path of its gRPC socket.
    """

    def __init__(self, address: Path) -> None:
        self._channel = grpc.insecure_channel(
            f"unix://{address}", options=[("grpc.max_receive_message_length", MESSAGE_LIMIT)]
        )
        self.wait_until_served()

    def wait_until_served(self) -> None:
        """Wait until the services answer: for a while after its start, containerd only says that it starts.

        :raises grpc.RpcError: if they do not in time.
        """
        grpc.channel_ready_future(self._channel).result(CALL_TIMEOUT_S)
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while (error := self.begin("Status").exception()) is not None:
            if time.monotonic() > deadline:
                raise error
            time.sleep(0.05)

    def __enter__(self) -> Self:
        """Return the connection; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self._channel.close()

    def begin(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Any:
        """Call a method of either service, and return the call, which is under way.

        :param name: the method.
        :param timeout_s: how long it may take.
        :param fields: the fields of the request; a message in it may be a dict.
        """
        method = _methods()[name]
        request = GetMessageClass(method.input_type)
        callee = self._channel.unary_unary(
            f"/{method.containing_service.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return callee.future(request(**fields), timeout=timeout_s)

    def call(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S, **fields: Any) -> Any:
        """Call a method of either service, and return its answer.

        :raises grpc.RpcError: if containerd refuses.
        """
        return self.begin(name, timeout_s=timeout_s, **fields).result()


def enum_name(message: Any, field: str) -> str:
    """Return the name of the value that an enumeration field of a message has."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    return str(kind.values_by_number[getattr(message, field)].name)
