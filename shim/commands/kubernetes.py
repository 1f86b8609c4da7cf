"""``hako install --kubernetes``: the objects that a cluster needs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor import TRANSLATED_CODE_MIB, Accelerator
from shim.errors import ShimError
from shim.machine import host_choice

if TYPE_CHECKING:
    from shim.config import Config

LABEL = "hako.io/runtime"
HOST_MIB = 160
"""The memory of a machine's QEMU, daemons and shim beside the guest's: ``overhead_mib`` of the benchmarks."""
HOST_MILLICPUS = 250
"""The processor time of the same: ``overhead_millicpus``."""

_TEXT = """\
# Once for the cluster: kubectl apply -f -
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: hako
handler: hako
overhead:
  podFixed:
    memory: {memory_mib}Mi  # {parts}
    cpu: {millicpus}m
scheduling:
  nodeSelector:
    {label}: "true"
# For each node on which `hako check` succeeds:
#   kubectl label node {node} {label}=true
"""


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a pod costs a node beyond its containers.

    :param machine_mib: the memory of the machine itself.
    :param emulates: whether the processor is emulated, which takes memory for translated code.
    """

    machine_mib: int
    emulates: bool

    @property
    def memory_mib(self) -> int:
        """All of its memory."""
        return self.machine_mib + HOST_MIB + self.emulates * TRANSLATED_CODE_MIB

    def parts(self) -> str:
        """Say what its memory consists of."""
        parts = f"{self.machine_mib} of the machine itself, {HOST_MIB} of the processes on the host"
        return f"{parts}, {TRANSLATED_CODE_MIB} because this node emulates" if self.emulates else parts


async def overhead(config: Config) -> Overhead:
    """Find out the overhead on this node.

    :param config: its configuration.
    """
    try:
        accelerator = (await host_choice.choose_accelerator(config)).accelerator
    except ShimError:  # `hako check` tells why
        accelerator = Accelerator.KVM
    return Overhead(config.hypervisor.memory_mib, emulates=accelerator is Accelerator.TCG)


def as_json(pod: Overhead) -> str:
    """Write the RuntimeClass; ``kubectl apply`` takes that, too.

    :param pod: the overhead of each pod.
    """
    runtime_class = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "hako"},
        "handler": "hako",
        "overhead": {"podFixed": {"memory": f"{pod.memory_mib}Mi", "cpu": f"{HOST_MILLICPUS}m"}},
        "scheduling": {"nodeSelector": {LABEL: "true"}},
    }
    return json.dumps(runtime_class, indent=2) + "\n"


def objects(pod: Overhead) -> str:
    """Write the RuntimeClass, and the command that labels this node.

    :param pod: the overhead of each pod.
    """
    return _TEXT.format(
        memory_mib=pod.memory_mib,
        parts=pod.parts(),
        millicpus=HOST_MILLICPUS,
        label=LABEL,
        node=os.uname().nodename,
    )
