"""Annotations of pods: the kubelet writes the error of RunPodSandbox into the events of the pod."""

from __future__ import annotations

import grpc
import pytest

from tests.cri.conftest import counted
from tests.cri.pods import pod_config
from tests.cri.stack import Stack  # noqa: TC001 - pytest looks fixtures' types up

pytestmark = pytest.mark.mainly

KATA = "io.katacontainers.config."


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("io.hako.kernel", "/etc/shadow", "not allowed on this host"),
        ("io.hako.vcpus", "many", "'many' is not a whole number"),
        ("io.hako.memory_mib", "64", "64 is too small; give at least 128"),
        ("io.hako.memory", "1024", "Hako has no such setting"),
        (f"{KATA}hypervisor.path", "/bin/sh", "Hako has no such setting"),
        (f"{KATA}hypervisor.machine_type", "virt", "only q35"),
        (f"{KATA}agent.enable_tracing", "true", "only false"),
    ],
)
def test_the_pods_events_name_an_annotation_that_is_refused_and_the_reason(
    stack: Stack, name: str, value: str, reason: str
) -> None:
    if stack.handler == "runc":
        pytest.skip("they are Hako's")
    with counted(stack):
        config = {**pod_config(stack, "refused"), "annotations": {name: value}}
        with pytest.raises(grpc.RpcError) as refusal:
            stack.cri.call("RunPodSandbox", config=config, runtime_handler=stack.handler)
        details = str(refusal.value.details())
        assert f"annotation {name}: " in details
        assert reason in details
        assert "\n" not in details
