"""Which Hako this is. It is on the start path: each sandbox keeps the version that it runs."""

VERSION = "0.1.0"


def version() -> str:
    """Return the version."""
    return VERSION
