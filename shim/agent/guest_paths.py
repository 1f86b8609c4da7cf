"""The paths in the guest of files that it gets from the shim; both sides know them."""

from __future__ import annotations

# Guest directories fixed by the protocol; a stock Kata agent confines itself to them.
SHARE_DIRECTORY = "/run/kata-containers/shared/containers"
WATCHABLE_NAME = "watchable"
WATCHABLE_DIRECTORY = f"{SHARE_DIRECTORY}/{WATCHABLE_NAME}"
# The guest kernel's modules.
MODULES_NAME = ".modules"
# The host's volumes are mounted here, once for all containers that share them.
VOLUMES_DIRECTORY = "/run/kata-containers/sandbox/volumes"
SHM_DIRECTORY = "/run/kata-containers/sandbox/shm"
# Volumes in memory, and the parts of them that containers get.
MEMORY_DIRECTORY = "/run/kata-containers/sandbox/ephemeral"
PARTS_DIRECTORY = "/run/kata-containers/sandbox/parts"
SHM_BYTES = 64 * 1024 * 1024  # the size that runc gives /dev/shm
