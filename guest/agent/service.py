"""The method table."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.ttrpc import Call, Handler
    from guest.agent.wire import Codec, Message

VERSION = "0.1.0"
_SERVING = 1


def handlers(codec: Codec) -> dict[str, Handler]:
    """Tabulate the handlers.

    :param codec: makes the responses.
    :returns: method name to handler.
    """

    def check(_request: Message, _call: Call) -> Message:
        return codec.new("grpc.HealthCheckResponse", status=_SERVING)

    def version(_request: Message, _call: Call) -> Message:
        return codec.new("grpc.VersionCheckResponse", grpc_version="0.0.1", agent_version=VERSION)

    return {"Check": check, "Version": version}
