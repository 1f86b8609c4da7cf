"""Print what a user reads in each file, or why not: the first argument is the user, the others are paths."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.e2e.programs.identities import attempts_as

uid = int(sys.argv[1])
attempts = [lambda path=path: Path(path).read_text(encoding="ascii") for path in sys.argv[2:]]
for answer in attempts_as((uid, uid, ()), attempts):
    print(answer)
