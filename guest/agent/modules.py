"""Kernel modules: those that boot needs, in order, and others when something asks for them."""

from __future__ import annotations

import _thread
import os

from guest.agent import files, kernel

_DIRECTORY = "/lib/modules"

_lock = _thread.allocate_lock()


def load_boot() -> None:
    """Load the modules without which the agent cannot serve.

    :raises OSError: if the kernel refuses one.
    """
    for name in files.read(f"{_DIRECTORY}/boot").split():
        _load(name, "")


def load(wanted: str, *, parameters: str = "") -> bool:
    """Load one module of the image after those that it depends on; one that is there already is left alone.

    :param wanted: its name.
    :param parameters: its settings, as on the kernel's command line.
    :returns: False if neither the kernel nor the image has it.
    :raises OSError: if the kernel refuses one.
    """
    wanted = wanted.replace("-", "_")
    lines = [line.split() for line in files.read(f"{_DIRECTORY}/depends").splitlines()]
    depends = {name: others for name, *others in lines}
    if wanted not in depends:
        return files.exists(f"/sys/module/{wanted}")
    # Each line stands after the lines of what its module depends on.
    needed = {wanted}
    for name, others in reversed(depends.items()):
        if name in needed:
            needed.update(others)
    with _lock:
        for name in depends:
            if name in needed and not _is_live(name):
                _load(name, parameters if name == wanted else "")
    return True


def _is_live(name: str) -> bool:
    try:
        return files.read(f"/sys/module/{name}/initstate") == "live\n"
    except FileNotFoundError:
        return False


def _load(name: str, parameters: str) -> None:
    path = f"{_DIRECTORY}/{name}.ko"
    try:
        code = files.read_bytes(path)
    except FileNotFoundError:
        import zlib  # noqa: PLC0415  only large modules that few machines need are compressed

        path += ".z"
        code = zlib.decompress(files.read_bytes(path))
    kernel.load_module(name, code, parameters=parameters)
    # The file's pages are memory, and no module is loaded twice.
    os.unlink(path)
