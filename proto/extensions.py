"""Hako's additions to Kata's protocol: ports, marks, log types, annotations and kernel parameters.

Both sides import them from here. Other agents ignore them or are not asked for them. The messages are in
``extensions.proto``, and the fields in ``kata/`` have numbers from 1001 on. The documentation quotes the
comments: the purpose of each, and after "Without:" what happens with another agent.
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

#: The virtio-serial port on which the agent serves if there is no vsock. Without: the host needs vsock.
SERIAL_PORT = "hako.agent"
#: The port for raw streams: one connection for each standard stream, over the kernel's vsock.
#: Without: streams travel in requests.
RAW_STREAM_PORT = 1027
#: The port for framed streams: the same in frames, over a vsock without half-closed connections.
#: Without: streams travel in requests.
FRAMED_STREAM_PORT = 1028
#: The kernel parameter of a machine whose agent is reached through the kernel's vsock, to which any user of
#: the host can connect: the agent accepts connections only from privileged ports (below 1024).
#: Without: any local user of the host can reach the agent.
PRIVILEGED_PARAMETER = "hako.privileged-ports"
#: The start of each line that the agent writes to the guest's console.
#: Without: the host does not tell the lines apart.
CONSOLE_MARK = "hako-agent: "
#: The agent writes it to the console once it serves, so that the host connects at the right moment.
#: Without: the host tries to connect until the agent answers, and makes no template.
READY_MARK = "hako-agent: serving"
#: The kernel parameter of a machine that will become a template: the agent does the work that each clone
#: would otherwise do. Without: each clone does the work.
TEMPLATE_PARAMETER = "hako.template"

# -- Hako's: features in the answer to GetGuestDetails -----------------------------------------------------

#: The agent is Hako's, and keeps a process's streams after its end. Without: no extension is used.
FEATURE = "hako"
#: The agent answers the log type of the same name. Without: the guest's clock is set, not compared.
CLOCK_FEATURE = "hako.clock"
#: The agent accepts framed streams. Without: streams travel in requests.
STREAMS_FEATURE = "hako.streams"

#: The agent runs processes in the guest itself, in no container. Without: `hako exec` is refused.
SHELL_FEATURE = "hako.shell"
#: The id that stands for the guest itself where that of a container stands. Without: `hako exec` is refused.
GUEST_ID = "+guest"

# -- Hako's: log types of GetDiagnosticData --------------------------------------------------------------

#: The processes of a container, one line `PID EXEC` for each.
#: Without: Hako lists only the processes that it started.
PROCESSES = "hako.processes"
#: The agent's phases and their times. Without: `hako timeline` shows only the host's side.
TIMELINE = "hako.timeline"
#: The kernel's limits are adjusted after memory was removed. Without: they stay the same.
LIMITS = "hako.limits"
#: The guest's clock; with ` +NANOSECONDS` or ` -NANOSECONDS` after the name, the clock is moved first.
#: Without: the clock is set with `SetGuestDateTime` at the start, after a sleep of the host and after a stop
#: of QEMU.
CLOCK = "hako.clock"
#: The number of files that the share's server may open follows after a space; the guest remembers fewer.
#: Without: a guest that looks at more files loses the share.
SHARE_FILES = "hako.share-files"
#: The guest's kernel frees the memory that it can do without, because the machine is to be parked.
#: Without: more memory is moved.
DROP_CACHES = "hako.drop-caches"
#: Limits as files of a container's cgroup; lines `FILE=VALUE` follow after a space.
#: Without: the update is refused.
UNIFIED = "hako.unified"

# -- Hako's: annotations of a container's specification ----------------------------------------------------

#: The value of a cgroup file; the file's name follows. Without: the limit has no effect.
UNIFIED_ANNOTATION = "io.hako.unified/"
#: The default errno of the seccomp profile. Without: it is EPERM.
DEFAULT_ERRNO_ANNOTATION = "io.hako.seccomp/default-errno"
#: The umask of the container's processes. Without: they have the runtime's default.
UMASK_ANNOTATION = "io.hako.process/umask"
#: A limit that the host's administrator has raised; the name of the sysctl follows.
#: Without: the guest's own limits apply.
AT_LEAST_ANNOTATION = "io.hako.at-least/"

# -- What both sides compute -----------------------------------------------------------------------------

_AMPLE_SHARE_FILES = 200_000
_SHARE_FILES_PER_OPEN_FILE = 3


def most_open_in_guest(share_files: int) -> int | None:
    """Return how many files a guest may have open, so that the share's server stays within its limit.

    The server has two descriptors for each file that is open in the guest, and the guest cannot forget such a
    file. The remaining descriptors are for files that the guest remembers.

    :param share_files: how many files the server may open.
    :returns: the number of files; None if the limit is high enough for any guest of the usual size.
    """
    return None if share_files >= _AMPLE_SHARE_FILES else share_files // _SHARE_FILES_PER_OPEN_FILE
