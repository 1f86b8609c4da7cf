"""The warnings of ``hako check`` on a host with KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hypervisor.kvm_host import weaknesses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


CPU = "processor\t: 0\nmodel name\t: A\nflags\t\t: fpu vme {more}\nbogomips\t: 1\n\nprocessor\t: 1\n"


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., list[str]]:
    """Describe a host; return the weaknesses of its KVM."""

    def make(
        *, flags: str = "", module: str = "kvm_intel", parameter: str = "ept", value: str = "Y"
    ) -> list[str]:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(CPU.format(more=flags))
        (tmp_path / module / "parameters").mkdir(parents=True)
        (tmp_path / module / "parameters" / parameter).write_text(f"{value}\n")
        return weaknesses(cpuinfo=cpuinfo, modules=tmp_path)

    return make


@pytest.mark.parametrize("value", ["Y", "1"])
def test_bare_metal_with_nested_paging_has_no_weakness(host: Callable[..., list[str]], value: str) -> None:
    assert host(flags="vmx", value=value) == []


def test_a_nested_kvm_is_named(host: Callable[..., list[str]]) -> None:
    [warning] = host(flags="vmx hypervisor")
    assert "KVM is nested" in warning
    assert "; use bare metal" in warning


@pytest.mark.parametrize(
    ("module", "parameter", "value"), [("kvm_intel", "ept", "N"), ("kvm_amd", "npt", "0")]
)
def test_kvm_without_nested_paging_is_reported_with_the_remedy(
    host: Callable[..., list[str]], module: str, parameter: str, value: str
) -> None:
    [warning] = host(module=module, parameter=parameter, value=value)
    assert f"load {module} with {parameter}=1" in warning


def test_a_host_without_kvm_parameters_has_no_weakness(tmp_path: Path) -> None:
    assert weaknesses(cpuinfo=tmp_path / "cpuinfo", modules=tmp_path) == []
