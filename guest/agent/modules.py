"""Kernel modules: those for the boot, in order, and others on demand.

The image has only a few. The others are on the host, in a directory that it may share, where the kernel finds
them on demand, for example when a container makes its first packet filter.
"""

from __future__ import annotations

import _thread
import os

from guest.agent import files, kernel, reaper

_DIRECTORY = "/lib/modules"
_PROGRAM = "/proc/sys/kernel/modprobe"
_LOAD_TIMEOUT_S = 20.0

_lock = _thread.allocate_lock()


def load_boot() -> None:
    """Load the modules without which the agent cannot serve.

    :raises OSError: if the kernel refuses one.
    """
    for name in files.read(f"{_DIRECTORY}/boot").split():
        _load(name, "")


def share(directory: str) -> None:
    """Let the kernel, and :func:`load`, find modules in a directory, unless it has none for this kernel.

    :param directory: it holds ``modprobe`` and, by the kernel's release, the modules.
    :raises OSError: if the kernel cannot be told.
    """
    release = os.uname().release
    if files.exists(f"{directory}/{release}/modules.dep"):
        os.symlink(f"{directory}/{release}", f"{_DIRECTORY}/{release}")
        files.write(_PROGRAM, f"{directory}/modprobe")


def load(wanted: str, *, parameters: str = "") -> bool:
    """Load one module of the image and its dependencies, unless it is loaded already.

    :param wanted: its name.
    :param parameters: its settings, as on the kernel's command line.
    :returns: False if neither the kernel nor the image has it, nor the shared directory.
    :raises OSError: if the kernel refuses one.
    """
    wanted = wanted.replace("-", "_")
    lines = [line.split() for line in files.read(f"{_DIRECTORY}/depends").splitlines()]
    depends = {name: others for name, *others in lines}
    if wanted not in depends:
        return files.exists(f"/sys/module/{wanted}") or _load_shared(wanted, parameters)
    # Each line follows the lines of the modules that its module depends on.
    needed = {wanted}
    for name, others in reversed(depends.items()):
        if name in needed:
            needed.update(others)
    with _lock:
        for name in depends:
            if name in needed and not _is_live(name):
                _load(name, parameters if name == wanted else "")
    return True


def load_for(modalias: str) -> None:
    """Let modprobe load the driver of a device; the shared directory has the modules.

    :param modalias: the device's, from sysfs.
    """
    program = files.read(_PROGRAM).strip()
    if files.exists(program):
        with reaper.Launch() as launch:
            _, end = launch.spawn(program, ["modprobe", "-q", modalias], ())
        end.wait(_LOAD_TIMEOUT_S)


def _load_shared(wanted: str, parameters: str) -> bool:
    tree = f"{_DIRECTORY}/{os.uname().release}"
    if not files.exists(tree):
        return False
    for line in files.read(f"{tree}/modules.dep").splitlines():
        # The module that must be loaded first comes last; see modules.dep(5).
        name, *others = line.replace(":", "").split()
        if name == f"{wanted}.ko":
            with _lock:
                for file in (*reversed(others), name):
                    code = files.read_bytes(f"{tree}/{file}")
                    kernel.load_module(file, code, parameters=parameters if file == name else "")
            return True
    return False


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
