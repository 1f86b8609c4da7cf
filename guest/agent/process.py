"""A process of a container, from the agent's side."""

from __future__ import annotations

from guest.agent import reaper
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.runtime import Started
    from guest.agent.streams import ProcessOutput
    from guest.agent.ttrpc import Call


class Process:
    """A process and its streams.

    :param started: the process and its streams, as the runtime handed them over.
    """

    def __init__(self, started: Started) -> None:
        self.pid = started.pid
        self.end = started.end
        self.streams = started.streams
        self._waited = False

    def signal(self, number: int) -> None:
        """Send a signal; after the process's end, this does nothing.

        :param number: the signal.
        :raises OSError: if there is no such signal.
        """
        reaper.signal(self.pid, self.end, number)

    def wait(self, call: Call) -> int:
        """Wait for the end.

        :param call: the request being served.
        :returns: the exit code, or 128 plus the signal's number.
        :raises Cancelled: if the caller is gone.
        """
        while self.end.status is None:
            call.wait(readable=(self.end.fd,))
        self._waited = True
        return self.end.status

    def read(self, output: ProcessOutput | None, size: int, call: Call) -> bytes:
        """Read from an output.

        :param output: one of the process's streams.
        :param size: the most to return.
        :param call: the request being served.
        :returns: output; empty at the end of the stream.
        :raises AgentError: if the length is 0: the answer would look like the end.
        """
        if size == 0:
            raise AgentError("read: a length of 0 would look like the end of the stream; ask for more")
        return b"" if output is None else output.read(size, self.end, call)

    def end_input(self) -> None:
        """Close the process's input."""
        # On a terminal, the only end of input is a hang-up, which the caller does not mean.
        if not self.streams.is_terminal:
            self.streams.stdin.close()

    @property
    def is_done(self) -> bool:
        """Whether the process has ended, and its status and output have been read."""
        return self._waited and self.streams.ended
