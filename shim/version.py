"""The version of Hako. It is on the start path, because each sandbox records the version that it runs."""

VERSION = "0.1.0"


def version() -> str:
    """Return the version."""
    return VERSION
