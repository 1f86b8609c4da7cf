"""Kernel parameters of a container: the sandbox's where the kernel keeps them apart, else the machine's.

The machine belongs to the sandbox alone, so a parameter that every container on an ordinary host would
share can be set here as well.
"""

from __future__ import annotations

import _thread

from guest.agent import files, kernel, limits
from guest.agent.errors import AgentError, cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = "/proc/sys"
_SWAPPED = str.maketrans("./", "/.")


def path_of(name: str) -> str:
    """Find the file of a parameter.

    :param name: with dots, or with slashes if a part of it has dots, see ``man 5 sysctl.d``.
    :returns: its path.
    :raises AgentError: if the name has empty parts or leaves the directory.
    """
    separators = [character for character in name if character in "./"]
    dotted = bool(separators) and separators[0] == "."
    parts = (name.translate(_SWAPPED) if dotted else name).split("/")
    if not separators or any(part in {"", ".", ".."} for part in parts):
        raise AgentError(f"sysctl: {name}: not a parameter's name; write it like net.ipv4.ip_forward")
    return "/".join((_ROOT, *parts))


def apply(parameters: dict[str, str], *, namespaces: Iterable[str]) -> None:
    """Set parameters.

    :param parameters: value by name.
    :param namespaces: files of the namespaces that the container will join.
    :raises AgentError: if one of them does not exist or does not take the value.
    """
    if not parameters:
        return
    settings = [(name, path_of(name), value) for name, value in parameters.items()]
    limits.leave(path for _name, path, _value in settings)
    failures: list[str] = []
    done = _thread.allocate_lock()
    done.acquire()

    def write() -> None:
        try:
            for namespace in namespaces:
                kernel.enter(namespace)
            for name, path, value in settings:
                try:
                    files.write(path, value)
                except FileNotFoundError:
                    failures.append(f"{name}: the guest's kernel has none")
                except OSError as error:
                    failures.append(f"{name} = {value}: {error.strerror}")
        except OSError as error:
            failures.append(cause(error))
        finally:
            done.release()

    # The kernel shows each thread the parameters of its own namespaces; this one ends with them.
    _thread.start_new_thread(write, ())
    done.acquire()
    if failures:
        raise AgentError(f"sysctl: {failures[0]}; leave it out")
