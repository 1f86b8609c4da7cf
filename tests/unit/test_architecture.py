"""The arrows between the packages point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"shim", "hypervisor", "guest", "proto"}
ARROWS = {
    "shim": {"shim", "hypervisor", "proto"},
    "hypervisor": {"hypervisor"},
    "guest": {"guest", "proto"},
    "proto": {"proto"},
}
# The operator's command builds the guest image; nothing that runs with a sandbox may reach there.
EXCEPTIONS = {("shim/cli.py", "guest.image")}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name for name in names if name.split(".")[0] in OURS}


@pytest.mark.parametrize("package", sorted(OURS))
def test_a_package_imports_only_what_its_arrows_allow(package: str) -> None:
    sources = [p for p in (ROOT / package).rglob("*.py") if not p.name.endswith("_pb2.py")]
    assert sources
    wrong = {
        (str(path.relative_to(ROOT)), name)
        for path in sources
        for name in imports_of(path)
        if name.split(".")[0] not in ARROWS[package]
    }
    assert wrong <= EXCEPTIONS
