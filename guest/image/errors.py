"""The one error of the image builder."""

from __future__ import annotations


class ImageError(Exception):
    """The image cannot be built; the message is one line: phase, object, cause, remedy."""
