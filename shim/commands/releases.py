"""``python -m shim.commands.releases upgraded``: the Debian package runs this once a release is current."""

from __future__ import annotations

import sys

from shim import zygote_protocol
from shim.host import releases


def upgraded() -> None:
    """End the zygotes of other releases, and remove unused releases."""
    root = releases.root()
    if root is not None:
        releases.retire_zygotes(root)
        releases.remove_dead_sockets(zygote_protocol.ZYGOTE_DIRECTORY)
        releases.prune(root)


if __name__ == "__main__":
    if sys.argv[1:] != ["upgraded"]:
        sys.exit("releases: the only action is `upgraded`")
    upgraded()
