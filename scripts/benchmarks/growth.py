"""Measures how costs grow with the number of sandboxes, containers, volumes and streams."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from scripts.benchmarks.crowds import PATIENCE, RESIDENT_MEMORY_MIB
from scripts.benchmarks.harness import Samples
from scripts.benchmarks.memory import pss_mib
from scripts.benchmarks.sandbox import HAKO, running, states
from scripts.benchmarks.stage import CROWD_TIMEOUT_S, MeasurementError
from tests.e2e.busybox import IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scripts.benchmarks.stage import Stage

SANDBOXES = (1, 2, 5, 10, 20, 40, 60, 80, 100)
CONTAINERS = (1, 2, 5, 10, 20, 30, 40, 50)
VOLUMES = (1, 5, 10, 20, 30, 40, 50, 60)
STREAMS = (1, 2, 5, 10, 20, 40, 60)
RECENT = 5
STATES = 50
START, STATE, MEMORY = "start (s)", "State (ms)", "memory (MiB)"
_ANNOTATIONS = "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"


def growth_sandboxes(stage: Stage) -> Samples:
    """Start 100 sandboxes of 128 MiB one after the other: the last of them, in seconds, over the first.

    The curves are the medians of the last five starts, State of the first sandbox, and the memory of each:
    the proportional set sizes of all processes, divided by the number of sandboxes. Machines are cloned.
    Like all benchmarks of growth, it is done only once, however many rounds there are.
    """
    stage.configure(template=True, hypervisor=f"memory_mib = {RESIDENT_MEMORY_MIB}\n", guest=PATIENCE)
    curves = _Curves()
    _warm_up(stage)
    names: list[str] = []
    with _removed_in_the_end(stage, names):
        for number in range(1, SANDBOXES[-1] + 1):
            name = stage.new_id()
            names.append(name)
            curves.began(partial(stage.run_detached, stage.hako, name))
            if number in SANDBOXES:
                curves.add(number, state_ms=_state_ms(stage, names[0]), memory_mib=_memory(stage) / number)
    return curves.samples()


def growth_containers(stage: Stage) -> Samples:
    """Start 50 containers in one pod, one after the other: the last of them, in seconds, over the first.

    The curves are the medians of the last five starts, State of the pod, and the memory of all of it.
    """
    stage.configure(template=True, guest=PATIENCE)
    curves = _Curves()
    _warm_up(stage)
    names: list[str] = []
    with _removed_in_the_end(stage, names):
        pod = stage.new_id()
        names.insert(0, pod)
        _run(stage, pod, *_member(pod, "sandbox"))
        for number in range(1, CONTAINERS[-1] + 1):
            name = stage.new_id()
            names.insert(0, name)
            curves.began(partial(_run, stage, name, *_member(pod, "container")))
            if number in CONTAINERS:
                curves.add(number, state_ms=_state_ms(stage, pod), memory_mib=_memory(stage))
    return curves.samples()


def growth_volumes(stage: Stage) -> Samples:
    """Start a container with 60 volumes, in seconds, over one with a single volume.

    The curves are the medians of as many starts as there are rounds, State, and the memory of the sandbox.
    Each has its own machine, which is cloned.
    """
    stage.configure(template=True, guest=PATIENCE)
    curves = _Curves()
    _warm_up(stage)
    for number in VOLUMES:
        options = []
        for volume in range(number):
            source = stage.home / f"volume-{volume}"
            source.mkdir(exist_ok=True)
            options += ["--mount", f"type=bind,src={source},dst=/volume-{volume},options=rbind:rw"]
        for _ in range(max(stage.rounds, 2)):
            name = stage.new_id()
            with _removed_in_the_end(stage, [name]):
                curves.began(partial(_run, stage, name, *options))
                state_ms, memory_mib = _state_ms(stage, name), _memory(stage)
        curves.add(number, state_ms=state_ms, memory_mib=memory_mib)
    return curves.samples()


def growth_streams(stage: Stage) -> Samples:
    """Start 60 execs in a container, whose streams stay open: the last of them, in seconds, over the first.

    The curves are the medians of the last five starts, State of the container, and the sandbox's memory.
    """
    stage.configure(template=True, guest=PATIENCE)
    curves = _Curves()
    with running(stage, HAKO) as sandbox, contextlib.ExitStack() as stack:
        for number in range(1, STREAMS[-1] + 1):
            exec_id = f"stream-{number}"
            fifo = stage.home / exec_id
            os.mkfifo(fifo, 0o700)
            stack.callback(os.close, os.open(fifo, os.O_RDWR | os.O_NONBLOCK))
            curves.began(partial(sandbox.execute, exec_id, "sleep", "9999", stdout=fifo))
            if number in STREAMS:
                state_ms = statistics.median(sandbox.states(STATES)) * 1000
                curves.add(number, state_ms=state_ms, memory_mib=_memory(stage))
    return curves.samples()


class _Curves:
    """What was measured at each number."""

    def __init__(self) -> None:
        self._starts_s: list[float] = []
        self._points: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def began(self, start: Callable[[], None]) -> None:
        """Time one start."""
        began_s = time.perf_counter()
        start()
        self._starts_s.append(time.perf_counter() - began_s)

    def add(self, number: int, *, state_ms: float, memory_mib: float) -> None:
        """Record the values at a number, with the last starts."""
        self._points[START].append((number, statistics.median(self._starts_s[-RECENT:])))
        self._points[STATE].append((number, state_ms))
        self._points[MEMORY].append((number, memory_mib))

    def samples(self) -> Samples:
        """Compare the last starts with the first."""
        first, *_, last = self._points[START]
        return Samples(
            value=(last[1],),
            baseline=(first[1],),
            curves={name: tuple(points) for name, points in self._points.items()},
        )


@contextlib.contextmanager
def _removed_in_the_end(stage: Stage, names: list[str]) -> Iterator[None]:
    """Remove containers after a block, in order.

    :param names: theirs; those that could not be started may be among them.
    """
    try:
        yield
    finally:
        members, others = names[:-1], names[-1:]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(stage.hako.remove, members))
        for name in others:
            stage.hako.remove(name)
        stage.wait_until_gone()


def _warm_up(stage: Stage) -> None:
    with stage.container():
        stage.wait_for_zygote()


def _run(stage: Stage, name: str, *options: str) -> None:
    """Start a container that sleeps, with further options of ``ctr run``."""
    done = stage.hako.run(
        IMAGE, name, "sleep", "100000", options=["--detach", *options], timeout_s=CROWD_TIMEOUT_S
    )
    if done.code != 0:
        raise MeasurementError(f"ctr run: {name}: {done.stderr.strip()}")


def _member(pod: str, kind: str) -> list[str]:
    """Say in ``ctr``'s options that a container is one of a pod, as containerd's CRI does."""
    return [
        word
        for key, value in zip(_ANNOTATIONS, (kind, pod), strict=True)
        for word in ("--annotation", f"{key}={value}")
    ]


def _state_ms(stage: Stage, name: str) -> float:
    return statistics.median(states(stage, name, STATES)) * 1000


def _memory(stage: Stage) -> float:
    """Add up the memory of all that serves sandboxes, in MiB."""
    return sum(pss_mib(pid) for pid in stage.processes())
