"""The order of the house: imports go one way, modules and classes stay small, and every name has a user."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeGuard

import pytest

import hypervisor

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 500
MOST_MODULES_OUTSIDE = 16
#: The rooms of shim/, from the top down: each may import from those that follow.
ROOMS = (
    *("commands", "bootstrap", "services", "sandbox", "volumes", "machine", "network"),
    *("agent", "telemetry", "transport", "host"),
)
#: Entry points of a sandbox's shim, an operator and containerd; they may import from every room.
DOORS = {"entry", "daemon", "cli"}
MOST_METHODS = 25
#: Things that host and guest both model: a container and its processes are the same on both sides, and an
#: error of the guest's agent becomes the shim's error of the same name.
SAME_ON_BOTH_SIDES = {
    "Container": {"shim.sandbox.container", "guest.agent.container"},
    "Process": {"shim.sandbox.process", "guest.agent.process"},
    "Sandbox": {"shim.sandbox.sandbox", "guest.agent.sandbox"},
} | {
    name: {"shim.errors", "guest.agent.errors"}
    for name in (
        *("InvalidArgument", "DeadlineExceeded", "NotFound", "ResourceExhausted", "Unimplemented"),
        "Unavailable",
    )
}
MACHINE_CLASSES = {"Hypervisor", "QemuHypervisor"}
MACHINES = MACHINE_CLASSES | {"vm"}
OURS = {"shim", "hypervisor", "guest", "proto"}
ARROWS = {
    "shim": {"shim", "hypervisor", "proto"},
    "hypervisor": {"hypervisor", "proto"},
    "guest": {"guest", "proto"},
    "proto": {"proto"},
}
#: Hatch finds its hook by the base class.
USED_BY_NAME = {"ProtoBuildHook"}
# The operator's command builds the guest image; a sandbox's own processes must not import the builder.
EXCEPTIONS = {("shim/commands/image.py", "guest.image")}


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


def modules() -> dict[str, Path]:
    """Every module of this project by its name."""
    found = {}
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.endswith("_pb2.py"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def run_time_imports(path: Path, known: set[str]) -> set[str]:
    """The modules of this project that a module imports at run time, including imports inside functions."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                names.add(below if below in known else node.module)
        pending += ast.iter_child_nodes(node)
    return names & known


def sources() -> list[Path]:
    """Every module that people write, tests and scripts included."""
    packages = [*OURS, "scripts", "tests"]
    return [
        path
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if not path.name.endswith("_pb2.py")
    ]


def test_no_module_has_more_than_500_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()
    }

    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    found = modules()
    graph = {name: run_time_imports(path, set(found)) - {name} for name, path in found.items()}

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def room_of(name: str) -> str:
    """The room, door or leaf of shim/ that a module is in."""
    return name.split(".")[1] if "." in name else ""


def may_import(name: str, other: str) -> bool:
    """Whether a module of shim/ may import another: doors import anything, rooms only those below them."""
    room, wanted = room_of(name), room_of(other)
    if room in DOORS or room == wanted:
        return True
    if (room, wanted) == ("bootstrap", "daemon"):  # the process that containerd starts becomes the daemon
        return True
    if wanted in ROOMS:
        return room in ROOMS and ROOMS.index(room) < ROOMS.index(wanted)
    return wanted not in DOORS


def test_an_arrow_between_the_rooms_of_shim_points_down() -> None:
    found = {name: path for name, path in modules().items() if name.startswith("shim.")}
    arrows = {(name, other) for name, path in found.items() for other in run_time_imports(path, set(found))}

    assert {arrow for arrow in arrows if not may_import(*arrow)} == set()


def test_shim_has_few_modules_outside_its_rooms() -> None:
    outside = [path for path in (ROOT / "shim").iterdir() if path.suffix == ".py"]
    rooms = {path.parent.name for path in (ROOT / "shim").glob("*/__init__.py")}

    assert len(outside) <= MOST_MODULES_OUTSIDE
    assert rooms == set(ROOMS)


def test_a_public_class_name_has_one_meaning() -> None:
    places: dict[str, set[str]] = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, set()).add(name)

    assert {name: found for name, found in places.items() if len(found) > 1} == SAME_ON_BOTH_SIDES


def is_method(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Whether a member of a class is a method, public or private, but not a special one."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__")


def test_no_class_has_more_than_25_methods() -> None:
    sizes = {
        f"{path}: {node.name}": len({one.name for one in node.body if is_method(one)})
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }

    assert {name for name, size in sizes.items() if size > MOST_METHODS} == set()


def trees_of(*packages: str) -> list[ast.Module]:
    """The syntax trees of packages."""
    paths = [path for name, path in modules().items() if name.split(".")[0] in packages]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def names_of(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def names_used_in(tree: ast.Module) -> set[str]:
    """The names that a module reads, imports, or looks for in an object."""
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return used | {node.name for node in nodes if isinstance(node, ast.alias)}


def test_every_name_of_a_module_is_used() -> None:
    """A function, class or constant that only tests use is dead code."""
    scripts = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "scripts").rglob("*.py")]
    trees = [*trees_of(*OURS), *scripts]
    used = set().union(*(names_used_in(tree) for tree in trees))
    defined = {name for tree in trees for statement in tree.body for name in names_of(statement)}

    assert {name for name in defined - used if not name.startswith("__")} == USED_BY_NAME


def test_everything_that_the_hypervisor_exports_is_imported() -> None:
    imported = {
        alias.name
        for tree in trees_of("shim", "guest")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "hypervisor"
        for alias in node.names
    }

    assert set(hypervisor.__all__) - imported == set()


def last_name(node: ast.expr | None) -> str:
    """The last part of a dotted name; empty for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_machine(annotation: ast.expr | None) -> bool:
    """Whether an annotation says virtual machine, or one that may be absent."""
    kinds = ast.unparse(annotation).split(" | ") if annotation else []
    return not MACHINE_CLASSES.isdisjoint(kinds)


def test_every_method_of_the_hypervisor_interface_has_a_caller() -> None:
    called = {
        node.attr
        for tree in trees_of("shim")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and last_name(node.value).lstrip("_") in MACHINES
    }
    intents = {name for name in vars(hypervisor.Hypervisor) if not name.startswith("_")}

    assert intents - called == set()


def test_a_virtual_machine_is_named_vm() -> None:
    """The test above recognizes one by its name."""
    names = {
        last_name(node.target) if isinstance(node, ast.AnnAssign) else node.arg
        for tree in trees_of("shim")
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign | ast.arg) and is_machine(node.annotation)
    }

    assert {name.lstrip("_") for name in names} == {"vm"}


def test_no_unit_test_sleeps() -> None:
    """A test waits for an event with tests/waiting.py, which has a deadline."""
    sleeps = [
        f"{path}:{node.lineno}"
        for place in ("unit", "fuzz")
        for path in sorted((ROOT / "tests" / place).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"time.sleep", "asyncio.sleep"}
    ]

    assert sleeps == []
