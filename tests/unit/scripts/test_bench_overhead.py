"""Which memory of a process is its guest's."""

from __future__ import annotations

from scripts.benchmarks.overhead import pss_by_mapping

SMAPS = """\
55d0c8a00000-55d0c8f00000 r-xp 00300000 fe:01 1234   /usr/bin/qemu-system-x86_64
Rss:                900 kB
Pss:                300 kB
Pss_Dirty:            0 kB
55d0ca000000-55d0cb000000 rw-p 00000000 00:00 0      [heap]
Pss:               4000 kB
7f1000000000-7f1008000000 rwxp 00000000 00:00 0
Pss:              20000 kB
7f2000000000-7f2020000000 rw-s 00000000 00:01 77     /memfd:hako-memory (deleted)
Pss:             100000 kB
7f3000000000-7f3000010000 rw-p 00000000 00:00 0
Pss:                 40 kB
"""


def test_the_guests_memory_and_translated_code_are_told_from_the_rest() -> None:
    assert pss_by_mapping(SMAPS) == {"guest": 100_000, "code": 20_000, "": 4340}
