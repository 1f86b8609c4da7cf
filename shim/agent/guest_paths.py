"""The guest's paths of files that it gets from the shim; both sides know them."""

from __future__ import annotations

# Guest directories fixed by the protocol; a stock Kata agent confines itself to them.
SHARE_DIRECTORY = "/run/kata-containers/shared/containers"
WATCHABLE_NAME = "watchable"
WATCHABLE_DIRECTORY = f"{SHARE_DIRECTORY}/{WATCHABLE_NAME}"
# The guest kernel's modules.
MODULES_NAME = ".modules"
# Volumes of the host are mounted in there, once for all containers that share them.
VOLUMES_DIRECTORY = "/run/kata-containers/sandbox/volumes"
SHM_DIRECTORY = "/run/kata-containers/sandbox/shm"
# Volumes in memory, and parts of them that containers are given.
MEMORY_DIRECTORY = "/run/kata-containers/sandbox/ephemeral"
PARTS_DIRECTORY = "/run/kata-containers/sandbox/parts"
SHM_BYTES = 64 * 1024 * 1024  # the size runc gives /dev/shm
