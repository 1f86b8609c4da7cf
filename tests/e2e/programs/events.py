"""Print the name of the first file that is made in a directory within some seconds."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys

IN_CREATE = 0x100  # inotify(7)
_EVENT = struct.Struct("iIII")
_EVENT_BYTES = 4096

libc = ctypes.CDLL(None)
events = libc.inotify_init()
libc.inotify_add_watch(events, os.fsencode(sys.argv[1]), IN_CREATE)
ready, _, _ = select.select([events], [], [], float(sys.argv[2]))
if ready:
    print(os.read(events, _EVENT_BYTES)[_EVENT.size :].split(b"\0")[0].decode())
