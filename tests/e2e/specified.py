"""A specification that asks for something in every field, and what shows a process that each arrived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CAP_KILL = 1 << 5
CAP_SYS_ADMIN = 1 << 21
CAP_MKNOD = 1 << 27


def specification(*, rootfs: Path, volume: Path, file: Path) -> dict[str, Any]:
    """Ask for something unusual in every field that a guest can honour."""
    few = ["CAP_KILL", "CAP_MKNOD"]
    return {
        "ociVersion": "1.1.0",
        "process": {
            "terminal": False,
            "args": ["sleep", "100000"],
            "env": ["PATH=/bin", "COLOUR=red green"],
            "cwd": "/made/for/it",
            "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027},
            "capabilities": {
                "bounding": [*few, "CAP_SYS_ADMIN"],
                "permitted": few,
                "effective": few,
                "inheritable": few,
                "ambient": few[:1],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 2048}],
            "noNewPrivileges": True,
            "oomScoreAdj": 321,
            "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0",
        },
        "root": {"path": str(rootfs), "readonly": True},
        "hostname": "specified",
        "domainname": "example.org",
        "annotations": {"com.example.key": "value"},
        "hooks": {"createRuntime": [{"path": "/bin/true"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=4m", "noexec"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {
                "destination": "/scratch",
                "type": "tmpfs",
                "source": "none",
                "options": ["size=1m", "mode=1777"],
            },
            {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]},
            {"destination": "/locked", "source": str(volume), "options": ["rbind", "ro", "nosuid", "nodev"]},
            {"destination": "/shallow", "type": "bind", "source": str(volume), "options": ["bind"]},
            {"destination": "/following", "source": str(volume), "options": ["rbind", "rslave"]},
            {"destination": "/etc/file", "type": "bind", "source": str(file), "options": ["bind"]},
            {"destination": "/etc/locked", "type": "bind", "source": str(file), "options": ["bind", "ro"]},
            {"destination": "/guest", "type": "bind", "source": "/proc/version", "options": ["bind", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")],
            "cgroupsPath": "system.slice:hako:specified",
            "rootfsPropagation": "private",
            "sysctl": {
                "net.ipv4.ip_unprivileged_port_start": "80",
                "kernel.shmmax": "1048576",
                "fs.mqueue.msg_max": "20",
                "vm.max_map_count": "262144",
            },
            "maskedPaths": ["/proc/keys", "/sys/firmware", "/not/there"],
            "readonlyPaths": ["/proc/sys", "/scratch", "/not/there"],
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "gid": 7},
                {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666, "uid": 8},
                {"path": "/dev/pipe", "type": "p", "fileMode": 0o600, "uid": 1000, "gid": 1001},
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "flags": [],
                "syscalls": [
                    {"names": ["swapon"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                    {"names": ["swapoff"], "action": "SCMP_ACT_ERRNO"},
                    {
                        "names": ["kill"],
                        "action": "SCMP_ACT_ERRNO",
                        "errnoRet": 5,
                        "args": [{"index": 1, "value": 63, "valueTwo": 12, "op": "SCMP_CMP_MASKED_EQ"}],
                    },
                ],
            },
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                    {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "r"},
                ],
                "memory": {
                    "limit": 64 << 20,
                    "reservation": 32 << 20,
                    "swap": 64 << 20,
                    "kernel": 1 << 30,
                    "swappiness": 60,
                    "disableOOMKiller": False,
                },
                "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0-63", "mems": "0"},
                "pids": {"limit": 50},
                "blockIO": {"weight": 0},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1TB", "limit": 0}],
                "unified": {"memory.oom.group": "1"},
            },
        },
    }


STATUS = "cat /proc/1/status"
LIMITS = "cd /sys/fs/cgroup && grep -H . memory.max memory.low memory.swap.max cpu.max cpu.weight pids.max"


@dataclass(frozen=True, slots=True)
class Seen:
    """A command that shows whether fields arrived.

    :param fields: their rows.
    :param command: the command of the process.
    :param expected: a pattern that must occur in either output.
    """

    fields: str
    command: str
    expected: str


def capability(kind: str, mask: int) -> str:
    return rf"Cap{kind}:\s+{mask:016x}\n"


SEEN = (
    Seen("process.args", "tr '\\0' ' ' </proc/1/cmdline", r"^sleep 100000 $"),
    Seen("process.env", "tr '\\0' '\\n' </proc/1/environ", r"(?m)^COLOUR=red green$"),
    Seen("process.cwd", "readlink /proc/1/cwd", r"^/made/for/it$"),
    Seen("process.user.uid", STATUS, r"Uid:\s+1000\s+1000\s+1000\s+1000\n"),
    Seen("process.user.gid", STATUS, r"Gid:\s+1001\s+1001\s+1001\s+1001\n"),
    Seen("process.user.additionalGids", STATUS, r"Groups:\s+5 6 ?\n"),
    Seen("process.user.umask", STATUS, r"Umask:\s+0027\n"),
    Seen("process.capabilities.bounding", STATUS, capability("Bnd", CAP_KILL | CAP_MKNOD | CAP_SYS_ADMIN)),
    Seen("process.capabilities.permitted", STATUS, capability("Prm", CAP_KILL)),
    Seen("process.capabilities.effective", STATUS, capability("Eff", CAP_KILL)),
    Seen("process.capabilities.inheritable", STATUS, capability("Inh", CAP_KILL | CAP_MKNOD)),
    Seen("process.capabilities.ambient", STATUS, capability("Amb", CAP_KILL)),
    Seen("process.rlimits.type process.rlimits.soft", "cat /proc/1/limits", r"Max open files +512 "),
    Seen("process.rlimits.hard", "cat /proc/1/limits", r"Max open files +512 +2048 "),
    Seen("process.noNewPrivileges", STATUS, r"NoNewPrivs:\s+1\n"),
    Seen("process.oomScoreAdj", "cat /proc/1/oom_score_adj", r"^321$"),
    Seen("process.terminal", "test -t 1 || echo none", r"^none$"),
    Seen("ociVersion root.path", "ls /", r"(?m)^bin$"),
    Seen("root.readonly", "touch /new", r"Read-only file system"),
    Seen("hostname", "hostname", r"^specified$"),
    Seen("domainname", "cat /proc/sys/kernel/domainname", r"^example\.org$"),
    # mounts
    Seen("mounts.destination mounts.type", "stat -f -c %T /scratch", r"^tmpfs$"),
    Seen("mounts.options", "df -k /scratch && stat -c %a /scratch", r" 1024 +0 +1024 [^\n]*\n1777$"),
    Seen("mounts.options", "grep ' /dev/shm ' /proc/mounts", r"noexec.*size=4096k"),
    Seen("mounts.source", "cat /volume/plain", r"^from the host$"),
    Seen("mounts.source", "cat /etc/file", r"^a file of the host$"),
    Seen("mounts.source", "cut -d' ' -f1-3 /guest; uname -sr", r"^Linux version (\S+)\nLinux \1$"),
    Seen("mounts.options", "cat /volume/nested/deep /locked/nested/deep", r"^below\nbelow$"),
    Seen("mounts.options", "ls -a /shallow/nested", r"^\.\n\.\.$"),
    Seen("mounts.options", "touch /locked/new", r"Read-only file system"),
    Seen("mounts.options", "echo x >/etc/locked", r"Read-only file system"),
    # A file system is mounted below the other, which as with runc is as writable as on the host.
    Seen("mounts.options", "grep ' /etc/locked ' /proc/mounts", r" ro,"),
    Seen("mounts.options", "grep ' /locked ' /proc/mounts", r"nosuid,nodev"),
    Seen("mounts.type", "ls -d /dev/mqueue && grep -c ' /dev/mqueue mqueue ' /proc/mounts", r"\n1$"),
    Seen("linux.rootfsPropagation", "grep ' / / ' /proc/self/mountinfo | grep -c -e shared -e master", "^0$"),
    # linux
    Seen("linux.namespaces.type", "readlink /proc/self/ns/net; echo $$", r"^net:\[\d+\]\n\d{1,3}$"),
    Seen("linux.cgroupsPath", "cat /proc/1/cgroup", r"^0::/$"),
    Seen("linux.sysctl", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start", r"^80$"),
    Seen("linux.sysctl", "cat /proc/sys/kernel/shmmax /proc/sys/fs/mqueue/msg_max", r"^1048576\n20$"),
    Seen("linux.sysctl", "cat /proc/sys/vm/max_map_count", r"^262144$"),
    Seen("linux.maskedPaths", "wc -c </proc/keys; ls -A /sys/firmware | wc -l", r"^0\n0$"),
    Seen("linux.readonlyPaths", "echo x >/proc/sys/kernel/shmmax", r"Read-only file system"),
    Seen("linux.readonlyPaths", "touch /scratch/new", r"Read-only file system"),
    Seen(
        "linux.devices.path linux.devices.type linux.devices.major linux.devices.minor linux.devices.fileMode"
        " linux.devices.uid linux.devices.gid",
        "ls -ln /dev/fuse /dev/net/tun /dev/pipe",
        r"crw-r-----\s+1 0\s+7\s+10, 229 .*\ncrw-rw-rw-\s+1 8\s+0\s+10, 200 .*\nprw-------\s+1 1000\s+1001 ",
    ),
    Seen(
        "linux.devices.path",
        "ls /dev",
        r"^core\nfd\nfull\nfuse\nmqueue\nnet\nnull\npipe\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\n"
        r"urandom\nzero$",
    ),
    # linux.seccomp
    Seen("linux.seccomp.defaultAction linux.seccomp.architectures", STATUS, r"Seccomp:\s+2\n"),
    Seen("linux.seccomp.syscalls.names linux.seccomp.syscalls.action", "swapoff /dev/null", r"not permitted"),
    Seen("linux.seccomp.syscalls.errnoRet", "swapon /dev/null", r"Function not implemented"),
    Seen(
        "linux.seccomp.syscalls.args.index linux.seccomp.syscalls.args.value"
        " linux.seccomp.syscalls.args.valueTwo linux.seccomp.syscalls.args.op",
        "kill -0 $$ && echo allowed; kill -12 $$",
        r"allowed\n.*Input/output error",
    ),
    # linux.resources
    Seen(
        "linux.resources.devices.allow linux.resources.devices.type linux.resources.devices.major"
        " linux.resources.devices.minor linux.resources.devices.access",
        "exec 3</dev/net/tun; echo read; exec 4>/dev/net/tun",
        r"^read\n.*not permitted",
    ),
    Seen("linux.resources.memory.limit", LIMITS, rf"memory.max:{64 << 20}\n"),
    Seen("linux.resources.memory.reservation", LIMITS, rf"memory.low:{32 << 20}\n"),
    Seen("linux.resources.memory.swap", LIMITS, r"memory.swap.max:0\n"),
    Seen("linux.resources.cpu.quota linux.resources.cpu.period", LIMITS, r"cpu.max:50000 100000\n"),
    Seen("linux.resources.cpu.shares", LIMITS, r"cpu.weight:20\n"),
    Seen("linux.resources.pids.limit", LIMITS, r"pids.max:50$"),
    Seen(
        "linux.resources.hugepageLimits.pageSize linux.resources.hugepageLimits.limit",
        "cat /sys/fs/cgroup/hugetlb.2MB.max",
        rf"^{4 << 20}$",
    ),
    Seen("linux.resources.unified", "cat /sys/fs/cgroup/memory.oom.group", r"^1$"),
)
SEEN_BY_OTHER_TESTS = {
    "annotations",  # no process can see one; see test_oci
    "process.consoleSize.height",
    "process.consoleSize.width",
    "linux.namespaces.path",  # a pod's; see sandbox_pidns in test_oci
    "linux.seccomp.defaultErrnoRet",
    "linux.seccomp.flags",  # none has an effect that a process can see
    *(
        f"linux.{kind}Mappings.{name}"
        for kind in ("uid", "gid")
        for name in ("hostID", "containerID", "size")
    ),
}
