"""The network namespace of the host that a specification asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class WantedNamespace:
    """The network namespace that a specification asks for.

    :param path: its path; None for a new one.
    """

    path: Path | None


def namespace_of(spec: dict[str, Any]) -> WantedNamespace:
    """Find the network namespace that a container's specification asks for.

    :param spec: the decoded ``config.json``; one that lists no namespace at all gets a new one.
    :raises InvalidArgument: if it asks for the host's, by leaving it out of its namespaces.
    """
    linux = spec.get("linux")
    listed = linux.get("namespaces") if isinstance(linux, dict) else None
    namespaces = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    for namespace in namespaces:
        if namespace.get("type") == "network":
            path = namespace.get("path")
            return WantedNamespace(Path(path) if isinstance(path, str) and path else None)
    if namespaces:
        raise InvalidArgument(
            "spec: linux.namespaces: without network it asks for the host's network, which a machine cannot"
            " see; ask for a network namespace"
        )
    return WantedNamespace(None)
