"""The files that containerd leaves for a runtime in a container's bundle directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shim.errors import InvalidArgument
from shim.host import spec_file

if TYPE_CHECKING:
    from pathlib import Path


def read_spec(bundle: Path) -> dict[str, Any]:
    """Read a bundle's ``config.json``.

    :returns: its object, for reading only: see :func:`shim.host.spec_file.read`.
    :raises InvalidArgument: if it is missing or not a JSON object.
    """
    path = spec_file.path_in(str(bundle))
    try:
        spec = spec_file.read(str(bundle))
    except OSError as error:
        raise InvalidArgument(f"spec: {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"spec: {path}: not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidArgument(f"spec: {path}: not a JSON object")
    return spec
