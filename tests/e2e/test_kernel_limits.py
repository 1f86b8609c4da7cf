"""Limits that the kernel derives from its memory are those of a host as large as the machine has become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE, PYTHON, PYTHON_OPTIONS
from tests.e2e.by_hand import ByHand
from tests.e2e.conftest import new_id
from tests.patience import patient

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.conftest import Stack

MIB = 1 << 20
GIB = 1 << 30
RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
RUN_TIMEOUT_S = patient(240.0)
IN_MEMORY = ["--mount", "type=tmpfs,src=tmpfs,dst=/tmp"]
# More of each than a kernel allows that has booted with 512 MiB.
WANTED = {"threads": 3_700, "inotify watches": 12_000, "epoll watches": 105_000}
PROGRAM = f"""
import _thread, ctypes, json, os, select
libc = ctypes.CDLL(None, use_errno=True)
wanted = {WANTED!r}
done = dict.fromkeys(wanted, 0)

def repeat(kind, act):
    try:
        while done[kind] < wanted[kind]:
            act(done[kind])
            done[kind] += 1
    except (OSError, RuntimeError) as error:
        done[kind] = [done[kind], str(error)]

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

os.mkdir("/tmp/watched")
os.chdir("/tmp/watched")
inotify = libc.inotify_init1(0)

def watch(number):
    os.close(os.open(str(number), os.O_CREAT))
    check(libc.inotify_add_watch(inotify, str(number).encode(), 2))

repeat("inotify watches", watch)
targets = [os.eventfd(0) for _ in range(400)]
polls = []

def poll(number):
    if number % len(targets) == 0:
        polls.append(select.epoll())
    polls[-1].register(targets[number % len(targets)], select.EPOLLIN)

repeat("epoll watches", poll)
gate = _thread.allocate_lock()
gate.acquire()
_thread.stack_size(65536)
repeat("threads", lambda _: _thread.start_new_thread(gate.acquire, ()))
print(json.dumps(done), flush=True)
os._exit(0)
"""


def test_a_program_may_have_as_much_as_on_a_host_of_the_machines_size(either_stack: Stack) -> None:
    options = ["--rm", "--memory-limit", str(5 * GIB // 2), *PYTHON_OPTIONS, *IN_MEMORY]
    result = either_stack.containerd.run(
        IMAGE, new_id(), *PYTHON, PROGRAM, options=options, timeout_s=RUN_TIMEOUT_S
    )
    assert result.code == 0, result.stderr
    assert json.loads(result.stdout) == WANTED


@pytest.mark.hako
def test_growth_raises_all_limits_except_those_set_by_hand(one_stack: Stack, tmp_path: Path) -> None:
    names = ["kernel/threads-max", "fs/epoll/max_user_watches", "fs/inotify/max_user_watches"]
    chosen = {"fs.inotify.max_user_watches": "9001"}
    with ByHand(one_stack, tmp_path, linux={"sysctl": chosen}, capabilities=["CAP_SYS_ADMIN"]) as box:

        def limits() -> list[int]:
            return [
                int(line) for line in box.output("sh", "-c", f"cd /proc/sys; cat {' '.join(names)}").split()
            ]

        threads, polled, _ = limits()
        box.output("sh", "-c", f"echo {polled + 1} > /proc/sys/{names[1]}")
        value = {"type_url": RESOURCES, "value": json.dumps({"memory": {"limit": GIB}}).encode()}
        box.call("Update", resources=value)
        more, *others = limits()
        assert more > threads + GIB // (160 << 10)
        assert others == [polled + 1, 9001]
