"""The W3C trace contexts that containerd's requests carry: whose spans a start's spans are part of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from proto.containerd import task_v3_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

PARENT, STATE = "traceparent", "tracestate"
SANDBOX = ""
_MAKES_SANDBOX = {"Create", "CreateSandbox", "StartSandbox"}
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_LONGEST_STATE = 512  # Trace Context, 3.3.1.1


class TraceContexts:
    """What requests for sandbox and containers carried, until it is taken."""

    def __init__(self) -> None:
        self._carried: dict[str, dict[str, str]] = {}
        self._knows_sandbox = False

    def heed(self, method: str, payload: bytes, headers: Iterable[tuple[str, str]]) -> None:
        """Keep the context of a request that makes a sandbox or a container.

        :param method: its bare name.
        :param payload: the request.
        :param headers: its headers, lower-case.
        """
        if method not in _MAKES_SANDBOX:
            return
        found = {key: value for key, value in headers if key in {PARENT, STATE}}
        if not _PARENT.fullmatch(found.get(PARENT, "")) or len(found.get(STATE, "")) > _LONGEST_STATE:
            return
        if not self._knows_sandbox:
            self._knows_sandbox = True
            self._carried[SANDBOX] = found
        if method == "Create":
            try:
                container = task_v3_pb2.CreateTaskRequest.FromString(payload).id
            except DecodeError:  # which is refused where it is served
                return
            self._carried[container] = found

    def take(self, name: str) -> dict[str, str]:
        """Take a context; it is empty if there is none.

        :param name: a container's id, or ``SANDBOX``.
        """
        return self._carried.pop(name, {})
