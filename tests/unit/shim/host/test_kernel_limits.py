"""The guest is told which limits the host's administrator has raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.host import kernel_limits

if TYPE_CHECKING:
    from pathlib import Path


def test_only_raised_limits_are_passed_on(tmp_path: Path) -> None:
    for name, value in {
        "vm/max_map_count": "262144",
        "fs/nr_open": "1048576",
        "fs/aio-max-nr": "9",
        "fs/inotify/max_user_watches": "999999999",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n", encoding="ascii")
    assert kernel_limits.raised(tmp_path) == {
        "vm.max_map_count": 262144,
        "fs.inotify.max_user_watches": 999999999,
    }


def test_a_specification_cannot_forge_the_hosts_limits() -> None:
    spec = {"annotations": {"a": "b", "io.hako.at-least/kernel.panic": "1"}}
    assert kernel_limits.announce(spec, {"vm.max_map_count": 262144}) == {
        "annotations": {"a": "b", "io.hako.at-least/vm.max_map_count": "262144"}
    }
