"""The arrows between the packages point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hypervisor

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


def words_of(package: str) -> set[str]:
    """Every name that a package's code mentions, and every attribute."""
    words: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        if not path.name.endswith("_pb2.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Name):
                    words.add(node.id)
                elif isinstance(node, ast.Attribute):
                    words.add(node.attr)
                elif isinstance(node, ast.alias):
                    words.add(node.name)
    return words


def test_everything_that_the_hypervisor_offers_has_a_caller() -> None:
    intents = {name for name in vars(hypervisor.Hypervisor) if not name.startswith("_")}
    offered = set(hypervisor.__all__) | intents
    assert offered - words_of("shim") - words_of("guest") == set()
