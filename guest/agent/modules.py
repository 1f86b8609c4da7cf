"""Kernel modules: those that boot needs, in order, and others when something asks for them."""

from __future__ import annotations

from guest.agent import files, kernel

_DIRECTORY = "/lib/modules"


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
    try:
        code = files.read_bytes(f"{_DIRECTORY}/{name}.ko")
    except FileNotFoundError:
        import zlib  # noqa: PLC0415  only large modules that few machines need are compressed

        code = zlib.decompress(files.read_bytes(f"{_DIRECTORY}/{name}.ko.z"))
    kernel.load_module(name, code, parameters=parameters)
