"""Generate the Python modules of every ``.proto`` file below ``proto/``.

Hatch runs this as a build hook; ``python scripts/build_proto.py`` does the same for a source tree.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # a development environment generates code without hatchling
    BuildHookInterface = object


def generate(root: Path) -> None:
    """Write ``*_pb2.py`` and ``*_pb2.pyi`` beside each ``.proto`` below ``root/proto``.

    :param root: the source tree that contains ``proto/``.
    :raises RuntimeError: if protoc refuses a file; its own message is on standard error.
    """
    from grpc_tools import protoc  # noqa: PLC0415 - only a build has grpcio-tools

    sources = sorted(str(path.relative_to(root)) for path in (root / "proto").rglob("*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"--proto_path={root}",
        f"--proto_path={well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed on the files below proto/; its message is above")


class ProtoBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hatch build hook: generated code belongs in the wheel, not in the repository."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatch's signature
        """Generate code before files are collected."""
        generate(Path(self.root))


if __name__ == "__main__":
    generate(Path(__file__).resolve().parent.parent)
    sys.exit(0)
