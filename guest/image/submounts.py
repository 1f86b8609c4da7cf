"""Access control lists in mounts below a share: sets a bit that the kernel forgets.

A share announces the host's mounts in it, and the guest's kernel makes a file system of each. It copies most
settings of the share, but not the flag for checking access control lists (``fuse_fill_super_submount`` in
fs/fuse/inode.c). Without the flag, the kernel refuses to set lists there, and ignores those that the host has
set. Every root file system and volume is such a mount.
"""

from __future__ import annotations

import re
import struct

from guest.image import elf

MODULE = "fuse"
_FUNCTION = "fuse_get_tree_submount"
_SB_POSIXACL, _SB_ACTIVE = 1 << 16, 1 << 30  # include/linux/fs.h
# or qword ptr [register + 0x50], immediate: how the function sets the new file system's flags.
_SETS_FLAGS = re.compile(rb"\x48\x81[\x48-\x4b\x4d-\x4f]\x50(....)", re.DOTALL)
_SYMBOL = struct.Struct("<IBBHQQ")


def check_lists(module: bytes) -> bytes:
    """Let a kernel module also set the flag at the place where it marks such a file system as active.

    :param module: the object of :data:`MODULE`.
    :returns: the object with one bit changed, or unchanged if the build is unknown.
    """
    place = _flags(module)
    if place is None:
        return module
    changed = bytearray(module)
    struct.pack_into("<I", changed, place, _SB_ACTIVE | _SB_POSIXACL)
    return bytes(changed)


def are_lists_checked(module: bytes) -> bool:
    """Tell whether a kernel module sets the flag.

    :param module: the object of :data:`MODULE`.
    """
    place = _flags(module)
    return place is not None and struct.unpack_from("<I", module, place)[0] == _SB_ACTIVE | _SB_POSIXACL


def _flags(module: bytes) -> int | None:
    begin, length = _function(module)
    found = [
        match.start(1)
        for match in _SETS_FLAGS.finditer(module, begin, begin + length)
        if struct.unpack("<I", match[1])[0] in (_SB_ACTIVE, _SB_ACTIVE | _SB_POSIXACL)
    ]
    return found[0] if len(found) == 1 else None


def _function(module: bytes) -> tuple[int, int]:
    """Find the function's offset and length in the file; both are 0 if it is missing."""
    places = elf.sections(module)
    text, names = places.get(".text", (0, 0))[0], places.get(".strtab", (0, 0))[0]
    begin, size = places.get(".symtab", (0, 0))
    wanted = _FUNCTION.encode() + b"\0"
    for name, _info, _other, _section, value, length in _SYMBOL.iter_unpack(module[begin : begin + size]):
        if module.startswith(wanted, names + name):
            return text + value, length
    return 0, 0
