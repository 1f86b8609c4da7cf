"""What Hako's agent adds to Kata's protocol: ports, marks, log types, annotations and kernel parameters.

Both sides take them from here. An agent that does not know them ignores them or is not asked. The messages
are in ``extensions.proto``, and the fields are those of ``kata/`` from number 1001 on. The documentation
quotes the comments: what each is for, and after "Without:" what happens with another agent.
"""

from __future__ import annotations

# -- Kata's own, which both sides need -------------------------------------------------------------------

#: The vsock port on which the agent serves.
AGENT_PORT = 1024
#: The tag of the virtio-fs share that the agent mounts.
SHARE_TAG = "kataShared"
#: The kernel parameter that names the vsock port for raw streams.
RAW_STREAMS_PARAMETER = "agent.passfd_listener_port="

# -- Hako's: channels ------------------------------------------------------------------------------------

#: The virtio-serial port on which the agent serves where there is no vsock. Without: the host needs vsock.
SERIAL_PORT = "hako.agent"
#: The port for raw streams: one connection for each standard stream, over the kernel's vsock.
#: Without: streams travel in requests.
RAW_STREAM_PORT = 1027
#: The port for framed streams: the same in frames, over a vsock that knows no half-closed connection.
#: Without: streams travel in requests.
FRAMED_STREAM_PORT = 1028
#: The kernel parameter of a machine whose agent is reached through the kernel's vsock, which any user of the
#: host can dial: the agent takes connections from privileged ports (below 1024) only.
#: Without: any local user of the host reaches the agent.
PRIVILEGED_PARAMETER = "hako.privileged-ports"
#: How each line starts that the agent writes to the guest's console. Without: the host shows all lines alike.
CONSOLE_MARK = "hako-agent: "
#: The agent writes it to the console once it serves, so that the host dials at the right moment.
#: Without: the host dials until the agent answers, and makes no template.
READY_MARK = "hako-agent: serving"
#: The kernel parameter of a machine that is to become a template: the agent does all that its clones would
#: otherwise do one by one. Without: each clone does it.
TEMPLATE_PARAMETER = "hako.template"

# -- Hako's: features in the answer to GetGuestDetails -----------------------------------------------------

#: The agent is Hako's and keeps a process' streams after its end. Without: no extension is used.
FEATURE = "hako"
#: The agent answers the log type of the same name. Without: the guest's clock is set, not compared.
CLOCK_FEATURE = "hako.clock"
#: The agent takes framed streams. Without: streams travel in requests.
STREAMS_FEATURE = "hako.streams"

# -- Hako's: log types of GetDiagnosticData --------------------------------------------------------------

#: The processes of a container, a line `PID EXEC` for each.
#: Without: Hako lists the processes that it started.
PROCESSES = "hako.processes"
#: What the agent did and when. Without: `hako timeline` shows the host's side alone.
TIMELINE = "hako.timeline"
#: The kernel's limits follow the memory that is left after a loss. Without: they stay.
LIMITS = "hako.limits"
#: The guest's clock; with ` +NANOSECONDS` or ` -NANOSECONDS` after it, it is moved first.
#: Without: the clock is set with `SetGuestDateTime` at the start, after a sleep of the host and after a stop
#: of QEMU.
CLOCK = "hako.clock"
#: How many files the share's server may open follows after a space; the guest remembers fewer.
#: Without: a guest that looks at more files loses the share.
SHARE_FILES = "hako.share-files"
#: Limits as files of a container's cgroup; lines `FILE=VALUE` follow after a space.
#: Without: the update is refused.
UNIFIED = "hako.unified"

# -- Hako's: annotations of a container's specification ----------------------------------------------------

#: The value of a cgroup file, whose name follows. Without: the limit has no effect.
UNIFIED_ANNOTATION = "io.hako.unified/"
#: The default errno of the seccomp profile. Without: it is EPERM.
DEFAULT_ERRNO_ANNOTATION = "io.hako.seccomp/default-errno"
#: The umask of the container's processes. Without: they have the runtime's default.
UMASK_ANNOTATION = "io.hako.process/umask"
#: A limit that the host's administrator has raised; the name of the sysctl follows.
#: Without: the guest's own limits hold.
AT_LEAST_ANNOTATION = "io.hako.at-least/"

# -- What both sides compute -----------------------------------------------------------------------------

_AMPLE_SHARE_FILES = 200_000
_SHARE_FILES_PER_OPEN_FILE = 3


def most_open_in_guest(share_files: int) -> int | None:
    """Return how many files a guest may have open, so that the share's server stays within its limit.

    The server has two descriptors for a file that is open in the guest, and the guest cannot forget such a
    file. The rest is for files that the guest remembers.

    :param share_files: how many files the server may open.
    :returns: the number of files; None if the limit is high enough for any guest of the usual size.
    """
    return None if share_files >= _AMPLE_SHARE_FILES else share_files // _SHARE_FILES_PER_OPEN_FILE
