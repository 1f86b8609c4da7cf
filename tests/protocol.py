"""Compiles the services of protocols that only the tests speak."""

from __future__ import annotations

import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_tools import protoc

_ROOT = Path(__file__).resolve().parents[1]
_WELL_KNOWN = Path(protoc.__file__).parent / "_proto"


def compiled(definition: Path) -> descriptor_pool.DescriptorPool:
    """Compile a definition and everything that it imports.

    :param definition: a ``.proto`` file in this source tree.
    """
    name = str(definition.relative_to(_ROOT))
    with tempfile.NamedTemporaryFile(suffix=".pb") as output:
        arguments = [f"-I{_ROOT}", f"-I{_WELL_KNOWN}", f"--descriptor_set_out={output.name}"]
        assert protoc.main(["protoc", *arguments, "--include_imports", name]) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(Path(output.name).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool
