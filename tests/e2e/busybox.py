"""Make a small container image from the machine's static busybox: the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BUSYBOX = Path("/usr/bin/busybox")
IMAGE = "hako.test/busybox:1"
PYTHON_MOUNTS = [
    {"destination": target, "type": "bind", "source": source, "options": ["rbind", "ro"]}
    for source, target in (("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64"))
]
"""Lends a container the interpreter of the tests' machine, for tasks that a shell cannot do."""
PYTHON_OPTIONS = [
    word
    for one in PYTHON_MOUNTS
    for word in ("--mount", f"type=bind,src={one['source']},dst={one['destination']},options=rbind:ro")
]
PYTHON = ("/usr/bin/python3", "-ISc")


def rootfs_archive() -> bytes:
    """Return a tar archive of a root file system: busybox, a link per applet, and files for a shell."""
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for directory in ("bin", "dev", "etc", "proc", "root", "sys", "var"):
            add(archive, directory, kind=tarfile.DIRTYPE)
        add(archive, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)
        add(archive, "bin/busybox", content=BUSYBOX.read_bytes(), mode=0o755)
        for applet in sorted(set(applets) - {"busybox"}):
            add(archive, f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        add(
            archive,
            "etc/passwd",
            content=b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )
        add(archive, "etc/group", content=b"root:x:0:\nnogroup:x:65534:\n")
    return buffer.getvalue()


def add(
    archive: tarfile.TarFile,
    name: str,
    *,
    kind: bytes = tarfile.REGTYPE,
    content: bytes = b"",
    mode: int = 0,
    link: str = "",
) -> None:
    """Add one member to an archive, without an owner and a time.

    :param archive: the archive.
    :param name: the member's path.
    :param kind: its type.
    :param content: the content of a regular file.
    :param mode: its permissions, or 0 for the usual ones of its type.
    :param link: where a symbolic link leads.
    """
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = len(content)
    member.mode = mode or (0o755 if kind == tarfile.DIRTYPE else 0o644)
    member.linkname = link
    archive.addfile(member, io.BytesIO(content))


def write_image(
    path: Path, *, name: str = IMAGE, layers: Sequence[bytes] = (), command: Sequence[str] = ("sh",)
) -> None:
    """Write an OCI image layout archive, ready for ``ctr images import``.

    :param path: the archive to write.
    :param name: the image's name.
    :param layers: its layers as tar archives, lowest first; none for busybox alone.
    :param command: what its containers run.
    """
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    descriptors = [blob(layer, "layer.v1.tar") for layer in layers or (rootfs_archive(),)]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [descriptor["digest"] for descriptor in descriptors]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": descriptors,
    }
    descriptor = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    descriptor["annotations"] = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    descriptor["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "manifests": [descriptor]}
    with tarfile.open(path, mode="w") as archive:
        add(archive, "oci-layout", content=json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        add(archive, "index.json", content=json.dumps(index).encode())
        for directory in ("blobs", "blobs/sha256"):
            add(archive, directory, kind=tarfile.DIRTYPE)
        for digest, content in sorted(blobs.items()):
            add(archive, f"blobs/sha256/{digest}", content=content)
