"""Kernel modules: those that boot needs, in order, and others when something asks for them."""

from __future__ import annotations

from guest.agent import files, kernel

_DIRECTORY = "/lib/modules"


def load_boot() -> None:
    """Load the modules without which the agent cannot serve.

    :raises OSError: if the kernel refuses one.
    """
    for name in files.read(f"{_DIRECTORY}/boot").split():
        kernel.load_module(f"{_DIRECTORY}/{name}.ko")


def load(wanted: str) -> bool:
    """Load one module of the image after those that it depends on.

    :param wanted: its name.
    :returns: False if the image has no such module.
    :raises OSError: if the kernel refuses one.
    """
    lines = [line.split() for line in files.read(f"{_DIRECTORY}/depends").splitlines()]
    depends = {name: others for name, *others in lines}
    if wanted not in depends:
        return False
    # Each line stands after the lines of what its module depends on.
    needed = {wanted}
    for name, others in reversed(depends.items()):
        if name in needed:
            needed.update(others)
    for name in depends:
        if name in needed:
            kernel.load_module(f"{_DIRECTORY}/{name}.ko")
    return True
