"""Measures what single requests cost."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING

import grpc

from proto.containerd import task_v3_pb2
from scripts.benchmarks import inside
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.sandbox import HAKO, RUNC, running
from scripts.benchmarks.stage import MeasurementError
from shim.agent.guest_names import agent_id
from tests.e2e.containerd import NAMESPACE
from tests.patience import patient

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage

CALLS = 200
CALL_TIMEOUT_S = patient(10.0)
STATE = "/containerd.task.v3.Task/State"


def exec_over_guest(stage: Stage) -> Samples:
    """Time ``ctr task exec`` of ``true`` in a running container under Hako, from ctr's spawn to its end.

    Baseline: ``crun exec`` of ``true`` in the same container, timed inside the guest by a program that runs
    beside the agent. It starts crun from a sealed copy, as the agent does; started from its file, crun would
    first make a sealed copy and start again, which takes twice as long.
    """
    inside.configure(stage)
    numbers = itertools.count(1)
    with stage.container() as name:
        bundle = stage.hako.state / "io.containerd.runtime.v2.task" / NAMESPACE / name
        ports = inside.ports(bundle)

        def from_outside() -> float:
            began_s = time.perf_counter()
            result = stage.hako.exec(name, f"exec-{next(numbers)}", "true")
            took_s = time.perf_counter() - began_s
            if result.code != 0:
                raise MeasurementError(f"ctr task exec: {name}: {result.stderr.strip()}")
            return took_s * 1000

        def from_inside() -> float:
            return inside.time_crun_exec(ports, agent_id(name)) * 1000

        from_outside()
        from_inside()
        return alternate(stage.rounds, value=from_outside, baseline=from_inside)


def state_over_runc(stage: Stage) -> Samples:
    """Take the median of 200 calls of Task.State, in sequence over one ttrpc connection to Hako's shim.

    Baseline: the same client, calls and container with containerd-shim-runc-v2.
    """
    stage.configure()
    with running(stage, RUNC) as theirs, running(stage, HAKO) as ours:
        ours.states(CALLS)
        theirs.states(CALLS)
        return alternate(
            stage.rounds,
            value=lambda: _median_ms(ours.states(CALLS)),
            baseline=lambda: _median_ms(theirs.states(CALLS)),
        )


def grpc_state_ms(stage: Stage) -> Samples:
    """Take the median of 200 calls of Task.State, in sequence over one gRPC connection to Hako's shim.

    Baseline: the same shim over ttrpc.
    """
    stage.configure()
    with running(stage, HAKO) as sandbox, grpc.insecure_channel(f"unix://{sandbox.grpc_socket()}") as channel:
        call = channel.unary_unary(
            STATE,
            request_serializer=task_v3_pb2.StateRequest.SerializeToString,
            response_deserializer=task_v3_pb2.StateResponse.FromString,
        )

        def states() -> list[float]:
            took_s = []
            for _ in range(CALLS):
                began_s = time.perf_counter()
                call(task_v3_pb2.StateRequest(id=sandbox.id), timeout=CALL_TIMEOUT_S)
                took_s.append(time.perf_counter() - began_s)
            return took_s

        states()
        return alternate(
            stage.rounds,
            value=lambda: _median_ms(states()),
            baseline=lambda: _median_ms(sandbox.states(CALLS)),
        )


def _median_ms(took_s: list[float]) -> float:
    return statistics.median(took_s) * 1000
