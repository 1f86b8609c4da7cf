"""Limits follow the machine's memory as if the kernel had booted with that size."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest.agent import files, limits, sysctl

MIB = 1 << 20
GIB = 1 << 30
SMALL, LARGE = 479_980 << 10, 3_101_420 << 10

# The values of a Linux 6.1 that booted with 3 GiB, part of which its own code and tables take.
BOOTED = {
    "kernel/threads-max": (23699,),
    "user/max_user_namespaces": (11849,),
    "fs/inotify/max_user_watches": (23110,),
    "fs/fanotify/max_user_marks": (24572,),
    "fs/epoll/max_user_watches": (675283,),
    "net/ipv4/inet_peer_threshold": (65664,),
    "net/ipv4/tcp_mem": (34359, 45815, 68718),
    "net/ipv4/udp_mem": (68721, 91631, 137442),
    "net/ipv4/tcp_max_orphans": (16384,),
    "net/ipv4/tcp_max_tw_buckets": (16384,),
    "net/ipv4/tcp_max_syn_backlog": (256,),
}
BOOTED_LESS = {
    "kernel/threads-max": (3581,),
    "fs/inotify/max_user_watches": (8192,),
    "fs/epoll/max_user_watches": (102043,),
    "net/ipv4/inet_peer_threshold": (24452,),
    "net/ipv4/tcp_mem": (5325, 7100, 10650),
    "net/ipv4/tcp_rmem": (4096, 131072, 3635456),
    "net/ipv4/tcp_wmem": (4096, 16384, 3635456),
    "net/ipv4/tcp_max_orphans": (2048,),
    "net/ipv4/tcp_max_syn_backlog": (128,),
}


class Kernel:
    """Stands for the files in ``/proc/sys`` of a kernel that booted with little memory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._patch = monkeypatch
        for name, value in {**BOOTED_LESS, "kernel/pid_max": (32768,), "fs/file-max": (45405,)}.items():
            self[name] = value
        for name, empty in (("_ROOT", str(root)), ("_boot", {}), ("_known", {}), ("_kept", set())):
            monkeypatch.setattr(limits, name, empty)
        monkeypatch.setattr(limits, "_CONNTRACK", f"{root}/net/netfilter/nf_conntrack")
        monkeypatch.setattr(sysctl, "_ROOT", str(root))
        # Each write to this file replaces the whole value.
        monkeypatch.setattr(files, "write", lambda path, text: Path(path).write_text(text, encoding="ascii"))
        limits.prepare()

    def __setitem__(self, name: str, value: tuple[int, ...]) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\t".join(map(str, value)) + "\n", encoding="ascii")

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(map(int, (self.root / name).read_text(encoding="ascii").split()))

    def has_memory(self, size: int) -> None:
        """Grow or shrink the machine to a size, and adjust its limits."""
        self._patch.setattr("os.sysconf", {"SC_PHYS_PAGES": size // 4096}.__getitem__)
        limits.follow()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel whose limits the agent has prepared."""
    return Kernel(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", BOOTED)
def test_a_limit_is_what_the_kernel_computes_for_that_memory(name: str) -> None:
    for ours, its in zip(limits.derived(LARGE)[name], BOOTED[name], strict=True):
        assert its <= ours <= 1.07 * its


def test_limits_that_every_host_raises_are_raised_at_boot(kernel: Kernel) -> None:
    assert kernel["kernel/pid_max"] == (4194304,)
    assert kernel["kernel/threads-max"] == (3581,)


def test_limits_follow_growth(kernel: Kernel) -> None:
    kernel.has_memory(LARGE)
    assert kernel["kernel/threads-max"] == limits.derived(LARGE)["kernel/threads-max"]
    assert kernel["net/ipv4/tcp_rmem"] == (4096, 131072, 6 * MIB)
    kernel.has_memory(8 * GIB)
    assert kernel["kernel/threads-max"] == (65536,)


def test_limits_at_the_boot_size_are_the_kernels_or_slightly_higher(
    kernel: Kernel,
) -> None:
    kernel.has_memory(SMALL)
    for name, value in BOOTED_LESS.items():
        assert all(b <= a <= 1.07 * b for a, b in zip(kernel[name], value, strict=True)), name


def test_only_memory_thresholds_shrink_with_the_machine(kernel: Kernel) -> None:
    kernel.has_memory(LARGE)
    kernel.has_memory(SMALL)
    assert kernel["fs/inotify/max_user_watches"] == limits.derived(LARGE)["fs/inotify/max_user_watches"]
    assert kernel["net/ipv4/tcp_mem"] == limits.derived(SMALL)["net/ipv4/tcp_mem"]


@pytest.mark.parametrize("before", [False, True])
def test_a_value_set_by_hand_is_left_alone(kernel: Kernel, before: bool) -> None:
    if before:
        kernel.has_memory(GIB)
    kernel["kernel/threads-max"] = (5000,)
    kernel.has_memory(LARGE)
    assert kernel["kernel/threads-max"] == (5000,)
    assert kernel["fs/epoll/max_user_watches"] > (102043,)


def test_a_value_set_by_a_specification_is_left_alone_even_if_equal(kernel: Kernel) -> None:
    sysctl.apply({"fs.inotify.max_user_watches": "8192"}, namespaces=())
    kernel.has_memory(LARGE)
    assert kernel["fs/inotify/max_user_watches"] == (8192,)


@pytest.mark.parametrize(
    ("memory", "connections"), [(SMALL, 3749), (2 * GIB, 1 << 16), (8 * GIB, 1 << 18), (GIB // 64, 1024)]
)
def test_netfilters_limit_is_that_of_a_freshly_loaded_module(memory: int, connections: int) -> None:
    assert limits.tracked_connections(memory) == connections


def test_a_chosen_number_of_connections_stays(kernel: Kernel) -> None:
    most, buckets = "net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_buckets"
    kernel[most], kernel[buckets] = (4096,), (4096,)
    kernel.has_memory(2 * GIB)
    assert (kernel[most], kernel[buckets]) == ((65536,), (65536,))
    kernel[most] = (70000,)
    kernel.has_memory(8 * GIB)
    assert (kernel[most], kernel[buckets]) == ((70000,), (65536,))


def test_a_limit_raised_on_the_host_is_raised_and_still_follows_memory(kernel: Kernel) -> None:
    limits.accept({"io.hako.at-least/fs.inotify.max_user_watches": "9000", "other": "x"})
    assert kernel["fs/inotify/max_user_watches"] == (9000,)
    kernel.has_memory(LARGE)
    assert kernel["fs/inotify/max_user_watches"] > (9000,)
    limits.accept({"io.hako.at-least/fs.inotify.max_user_watches": "9000"})
    assert kernel["fs/inotify/max_user_watches"] > (9000,)


def test_a_specification_overrides_a_limit_raised_on_the_host(kernel: Kernel) -> None:
    sysctl.apply({"fs.inotify.max_user_watches": "8192"}, namespaces=())
    limits.accept({"io.hako.at-least/fs.inotify.max_user_watches": "9000"})
    assert kernel["fs/inotify/max_user_watches"] == (8192,)
