"""Building the guest image: ``vmlinux``, ``initrd`` and ``image.json`` from the distribution's packages."""

from __future__ import annotations

from guest.image.build import build
from guest.image.errors import ImageError

__all__ = ["ImageError", "build"]
