"""Make a small container image from the machine's static busybox: the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

BUSYBOX = Path("/usr/bin/busybox")
IMAGE = "hako.test/busybox:1"


def rootfs_archive() -> bytes:
    """Return a tar archive of a root file system: busybox, a link per applet and what a shell expects."""
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for directory in ("bin", "dev", "etc", "proc", "root", "sys", "var"):
            _add(archive, directory, kind=tarfile.DIRTYPE)
        _add(archive, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)
        _add(archive, "bin/busybox", content=BUSYBOX.read_bytes(), mode=0o755)
        for applet in sorted(set(applets) - {"busybox"}):
            _add(archive, f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        _add(
            archive,
            "etc/passwd",
            content=b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        )
        _add(archive, "etc/group", content=b"root:x:0:\nnogroup:x:65534:\n")
    return buffer.getvalue()


def _add(
    archive: tarfile.TarFile,
    name: str,
    *,
    kind: bytes = tarfile.REGTYPE,
    content: bytes = b"",
    mode: int = 0,
    link: str = "",
) -> None:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = len(content)
    member.mode = mode or (0o755 if kind == tarfile.DIRTYPE else 0o644)
    member.linkname = link
    archive.addfile(member, io.BytesIO(content))


def write_image(path: Path) -> None:
    """Write an OCI image layout archive, ready for ``ctr images import``, that names the image ``IMAGE``.

    :param path: the archive to write.
    """
    layer = rootfs_archive()
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    layer_descriptor = blob(layer, "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer_descriptor["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [layer_descriptor],
    }
    descriptor = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    descriptor["annotations"] = {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": "1"}
    descriptor["platform"] = {"architecture": "amd64", "os": "linux"}
    index = {"schemaVersion": 2, "manifests": [descriptor]}
    with tarfile.open(path, mode="w") as archive:
        _add(archive, "oci-layout", content=json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(archive, "index.json", content=json.dumps(index).encode())
        for directory in ("blobs", "blobs/sha256"):
            _add(archive, directory, kind=tarfile.DIRTYPE)
        for digest, content in sorted(blobs.items()):
            _add(archive, f"blobs/sha256/{digest}", content=content)
