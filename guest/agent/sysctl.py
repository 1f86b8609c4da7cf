"""Kernel parameters of a container: they apply to the sandbox's namespaces, or else to the whole machine.

The machine belongs to the sandbox alone, so a parameter that every container on an ordinary host would
share can be set here as well.
"""

from __future__ import annotations

import _thread

from guest.agent import files, kernel, limits, modules
from guest.agent.errors import AgentError, cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = "/proc/sys"
_TRACKING = "net/netfilter/nf_conntrack"
_SWAPPED = str.maketrans("./", "/.")


def path_of(name: str) -> str:
    """Find the file of a parameter.

    :param name: with dots, or with slashes if a part of it has dots, see ``man 5 sysctl.d``.
    :returns: its path.
    :raises AgentError: if the name has empty parts or leads out of the directory.
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

    # The kernel shows each thread the parameters of its own namespaces, so a separate thread reads them and
    # ends.
    _thread.start_new_thread(write, ())
    done.acquire()
    if failures:
        raise AgentError(f"sysctl: {failures[0]}; leave it out")


class Settings:
    """Parameters that the host has set so far, and their earlier values."""

    def __init__(self) -> None:
        self._asked: dict[str, str] = {}
        self._before: dict[str, str] = {}

    def forget(self, link: str) -> None:
        """Note that a link of that name is new, so nothing has been set for it yet.

        :param link: its name.
        """
        for name in [name for name in self._asked if f"/{link}/" in name]:
            del self._asked[name], self._before[name]

    def update(self, wanted: dict[str, str]) -> list[str]:
        """Replace the host's previous values by the given ones.

        A value that a container has set stays, unless the host now asks for a new one.

        :param wanted: value by name, with slashes.
        :returns: the values that the kernel refuses, with reasons.
        """
        refused = []
        for name in [name for name in self._asked if name not in wanted]:
            asked, before = self._asked.pop(name), self._before.pop(name)
            if _read(name) == asked:
                refused += _write(name, before)
        for name in sorted(wanted, key=_order):
            if self._asked.get(name) != wanted[name]:
                self._before.setdefault(name, _read(name))
                self._asked[name] = wanted[name]
                refused += _write(name, wanted[name])
        return refused


def _order(name: str) -> tuple[int, str]:
    # A parameter for all links is set for each link.
    return (0 if "/all/" in name else 1 if "/default/" in name else 2, name)


def _read(name: str) -> str:
    if name.startswith(_TRACKING) and not files.exists(f"{_ROOT}/{name}"):
        modules.load("nf_conntrack")
    try:
        return files.read(f"{_ROOT}/{name}").strip()
    except OSError:  # it has no value yet, or does not exist
        return ""


def _write(name: str, value: str) -> list[str]:
    try:
        files.write(f"{_ROOT}/{name}", value)
    except FileNotFoundError:
        return [f"{name} = {value}: the guest's kernel has none"]
    except OSError as error:
        return [f"{name} = {value}: {error.strerror}"]
    return []
