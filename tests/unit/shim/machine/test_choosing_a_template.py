"""When a machine is cloned, from which template, and when a template should be built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, Channel, VmStartError
from shim.config import Config, HypervisorConfig
from shim.machine import cloning as cloning_module
from shim.machine import pod
from shim.machine.cloning import Cloning, clone_of
from shim.machine.host_choice import HostChoice
from shim.machine.sizing import plan
from shim.machine.spec import describe

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypervisor.interface import VmSpec


MIB = 1 << 20
LARGE = {
    "linux": {"resources": {"memory": {"limit": 256 * MIB}, "cpu": {"quota": 100_000, "period": 100_000}}}
}
LARGE_POD = {"annotations": {"io.kubernetes.cri.sandbox-memory": str(256 * MIB)}}
HOST = HostChoice(
    accelerator=Accelerator.TCG,
    accelerator_reason="",
    channel=Channel.VIRTIO_SERIAL,
    channel_reason="",
    virtiofsd=Path("/virtiofsd"),
    vsock_daemon=None,
)


def key_of(spec: VmSpec) -> str:
    """Stand in for the digest of a specification: encode its sizes."""
    sizes = (spec.vcpus, spec.max_vcpus, spec.memory_bytes // MIB, spec.max_memory_bytes // MIB)
    return "a" * 16 + "".join(f"{size:08x}" for size in sizes)


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Cloning, VmSpec]]:
    """Look for the template of a machine; return the choice and the clone."""
    monkeypatch.setattr(cloning_module, "template_key", key_of)

    def make(oci: dict[str, dict[str, Any]], **settings: Any) -> tuple[Cloning, VmSpec]:
        settings = {"max_vcpus": 4, "max_memory_mib": 4096, "template": "auto", **settings}
        config = Config(hypervisor=HypervisorConfig(template_dir=str(tmp_path / "templates"), **settings))
        cloning = Cloning("sandbox", config=config)
        made = pod.from_oci(oci)
        sizes = plan(config.hypervisor, pod=made.limits, first=made.first)
        spec = describe(
            config, HOST, name="s", directory=tmp_path, share=tmp_path, size=sizes.boot, most=sizes.most
        )
        template = cloning.find(spec, sizes, made)
        return cloning, clone_of(spec, sizes, template)

    return make


def build(cloning: Cloning, spec: VmSpec) -> None:
    with cloning.templates.building(wait_s=0) as building:
        built = building.place / "template"
        built.mkdir()
        cloning.templates.publish(key_of(spec), built, purpose={})


def test_a_missing_template_should_be_built(choose: Callable[..., tuple[Cloning, VmSpec]]) -> None:
    cloning, clone = choose({})
    assert cloning.lacks_template
    assert clone.template is None


@pytest.mark.parametrize("oci", [{}, LARGE, LARGE_POD])
def test_one_template_serves_machines_of_all_sizes(
    choose: Callable[..., tuple[Cloning, VmSpec]], oci: dict[str, dict[str, Any]]
) -> None:
    build(*choose({}))
    cloning, clone = choose(oci)
    assert clone.template is not None
    assert (clone.vcpus, clone.memory_bytes) == (1, 512 * MIB)
    assert not cloning.lacks_template


def test_a_machine_of_fixed_size_is_cloned_only_from_the_same_size(
    choose: Callable[..., tuple[Cloning, VmSpec]],
) -> None:
    build(*choose({}, static_sizing=True))
    assert choose({}, static_sizing=True)[1].template is not None
    cloning, clone = choose(LARGE, static_sizing=True)
    assert clone.template is None
    assert (clone.vcpus, clone.memory_bytes) == (2, 768 * MIB)
    assert not cloning.lacks_template, "templates of each size are not built"

    build(cloning, clone)
    assert choose(LARGE, static_sizing=True)[1].template is not None


def test_the_configuration_can_switch_templates_off(choose: Callable[..., tuple[Cloning, VmSpec]]) -> None:
    build(*choose({}))
    cloning, clone = choose({}, template="off")
    assert clone.template is None
    assert not cloning.lacks_template


def test_a_machine_in_huge_pages_is_not_cloned(choose: Callable[..., tuple[Cloning, VmSpec]]) -> None:
    build(*choose({}))
    cloning, clone = choose({}, huge_pages=True)
    assert clone.template is None
    assert not cloning.lacks_template


def test_a_pod_can_refuse_templates(choose: Callable[..., tuple[Cloning, VmSpec]]) -> None:
    build(*choose({}))
    cloning, clone = choose({"annotations": {pod.TEMPLATE_ANNOTATION: "off"}})
    assert clone.template is None
    assert not cloning.lacks_template


def test_a_template_that_is_being_built_is_not_built_twice(
    choose: Callable[..., tuple[Cloning, VmSpec]],
) -> None:
    cloning, _ = choose({})
    with cloning.templates.building(wait_s=0):
        assert not choose({})[0].lacks_template


def test_a_failed_build_is_not_repeated_at_once(
    choose: Callable[..., tuple[Cloning, VmSpec]], caplog: pytest.LogCaptureFixture
) -> None:
    cloning, clone = choose({})
    build(cloning, clone)
    cloning.templates.remove("")
    cloning.templates.fail(key_of(clone), "no space")
    with caplog.at_level("INFO"):
        assert not choose({})[0].lacks_template
    assert "no space; boots cold" in caplog.text


def test_a_host_that_cannot_compute_the_key_boots_cold(
    choose: Callable[..., tuple[Cloning, VmSpec]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(_spec: VmSpec) -> None:
        raise VmStartError("template: /qemu: no such file")

    cloning, _ = choose({})
    monkeypatch.setattr(cloning_module, "template_key", fail)
    cloning, clone = choose({})
    assert clone.template is None
    assert not cloning.lacks_template
    assert "/qemu: no such file; boots cold" in caplog.text
