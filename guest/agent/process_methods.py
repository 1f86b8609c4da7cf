"""The protocol's methods about processes and their streams."""

from __future__ import annotations

from guest.agent import oom, raw_streams
from guest.agent.errors import AgentError, InvalidArgument
from proto.extensions import GUEST_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.container import Container
    from guest.agent.guest_shell import GuestProcesses
    from guest.agent.process import Process
    from guest.agent.sandbox import Sandbox
    from guest.agent.ttrpc import Call, Handler
    from guest.agent.wire import Codec, Message

_SIGKILL = 9


class ProcessMethods:
    """Handlers of the requests about processes.

    :param sandbox: the one sandbox.
    :param codec: makes the responses.
    """

    def __init__(self, sandbox: Sandbox, codec: Codec) -> None:
        self._sandbox = sandbox
        self._codec = codec
        self._empty = codec.new("google.protobuf.Empty")

    def handlers(self) -> dict[str, Handler]:
        """Tabulate the handlers.

        :returns: method name to handler.
        """
        return {
            "CloseStdin": self._close_stdin,
            "ExecProcess": self._exec_process,
            "ReadStderr": self._read_stderr,
            "ReadStdout": self._read_stdout,
            "SignalProcess": self._signal,
            "TtyWinResize": self._resize,
            "WaitProcess": self._wait,
            "WriteStdin": self._write_stdin,
        }

    def _exec_process(self, request: Message, _call: Call) -> Message:
        container = self._place(request, AgentError)
        if request.process is None:
            raise AgentError(f"exec: {request.exec_id}: the request has no process; send it")
        with raw_streams.Claims(request) as claims:
            process = container.execute(request.exec_id, request.process)
            claims.attach(process, ended=lambda: container.forget_if_done(request.exec_id))
        return self._empty

    def _process(self, request: Message) -> tuple[Container | GuestProcesses, Process]:
        place = self._place(request, InvalidArgument)
        return place, place.process(request.exec_id)

    def _place(self, request: Message, error: type[AgentError]) -> Container | GuestProcesses:
        if request.container_id != GUEST_ID:
            return self._sandbox.container(request.container_id, error)
        from guest.agent import guest_shell  # noqa: PLC0415  few machines ever need it

        return guest_shell.PROCESSES

    def _signal(self, request: Message, _call: Call) -> Message:
        container, process = self._process(request)
        if not request.exec_id and request.signal == _SIGKILL and container.init is not None:
            container.signal_all()
        else:
            process.signal(request.signal)
        return self._empty

    def _wait(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        status = process.wait(call)
        oom.settle(container.id)
        if process is container.init and container.shares_pid:
            # In their own namespace, they would have died with it.
            container.signal_all()
        container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.WaitProcessResponse", status=status)

    def _read_stdout(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        data = process.read(process.streams.stdout, request.len, call)
        if not data:
            container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.ReadStreamResponse", data=data)

    def _read_stderr(self, request: Message, call: Call) -> Message:
        container, process = self._process(request)
        data = process.read(process.streams.stderr, request.len, call)
        if not data:
            container.forget_if_done(request.exec_id)
        return self._codec.new("grpc.ReadStreamResponse", data=data)

    def _write_stdin(self, request: Message, call: Call) -> Message:
        _container, process = self._process(request)
        if request.data:
            process.streams.stdin.write(request.data, process.end, call)
        else:
            process.end_input()
        return self._codec.new("grpc.WriteStreamResponse", len=len(request.data))

    def _close_stdin(self, request: Message, _call: Call) -> Message:
        self._process(request)[1].end_input()
        return self._empty

    def _resize(self, request: Message, _call: Call) -> Message:
        self._process(request)[1].streams.resize(request.row, request.column)
        return self._empty
