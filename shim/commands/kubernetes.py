"""``hako install --kubernetes``: the objects that a cluster needs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.config import Config

LABEL = "hako.io/runtime"
HOST_MIB = 128
"""The memory of a machine's QEMU, daemons and shim beside the guest's; see docs/kubernetes.md."""
_HOST_MILLICPUS = 250

_TEXT = """\
# Once for the cluster: kubectl apply -f -
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: hako
handler: hako
overhead:
  podFixed:
    memory: {memory_mib}Mi  # {machine_mib} of the machine itself, {host_mib} of the processes on the host
    cpu: {millicpus}m
scheduling:
  nodeSelector:
    {label}: "true"
# For each node on which `hako check` succeeds:
#   kubectl label node {node} {label}=true
"""


def as_json(config: Config) -> str:
    """Write the RuntimeClass for nodes with a configuration; ``kubectl apply`` takes that, too.

    :param config: the configuration.
    """
    memory_mib = config.hypervisor.memory_mib + HOST_MIB
    runtime_class = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "hako"},
        "handler": "hako",
        "overhead": {"podFixed": {"memory": f"{memory_mib}Mi", "cpu": f"{_HOST_MILLICPUS}m"}},
        "scheduling": {"nodeSelector": {LABEL: "true"}},
    }
    return json.dumps(runtime_class, indent=2) + "\n"


def objects(config: Config) -> str:
    """Write the RuntimeClass for nodes with a configuration, and the command that labels this node.

    :param config: the configuration.
    """
    machine = config.hypervisor.memory_mib
    return _TEXT.format(
        memory_mib=machine + HOST_MIB,
        machine_mib=machine,
        host_mib=HOST_MIB,
        millicpus=_HOST_MILLICPUS,
        label=LABEL,
        node=os.uname().nodename,
    )
