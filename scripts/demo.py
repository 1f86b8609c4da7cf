"""Run one container under Hako in a private containerd; show kernel, output and times."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.e2e import busybox
from tests.e2e.containerd import RELEASES, Containerd, running
from tests.e2e.nursery import Nursery

COMMAND = ("sh", "-c", "uname -r; echo hello from process $$ on $(nproc) virtual CPU; exit 42")


class Phases:
    """Prints how long each phase took, from the end of the phase before it."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s

    def ended(self, name: str) -> None:
        """Print the time of the phase ``name``, which has just ended."""
        now_s = time.time()
        print(f"{name:<22}{now_s - self._began_s:6.1f} s", flush=True)
        self._began_s = now_s


def main() -> int:
    """Show one container's life; the only argument is when the set-up began, in seconds since 1970."""
    phases = Phases(float(sys.argv[1]))
    phases.ended("set-up")
    with tempfile.TemporaryDirectory(prefix="hako-demo-") as directory, Nursery() as nursery:
        home = Path(directory)
        config = home / "config.toml"
        config.write_text(
            f'[hypervisor]\ntemplate = "off"\n[shim]\nstate_dir = "{home}/hako"\n', encoding="utf-8"
        )
        daemon = Containerd(
            release=RELEASES[0],
            home=home / "containerd",
            nursery=nursery,
            environment={"HAKO_CONFIG": str(config)},
            runtime="io.containerd.hako.v2",
        )
        with running(daemon):
            phases.ended("start containerd")
            archive = home / "busybox.tar"
            busybox.write_image(archive)
            imported = daemon.ctr("images", "import", archive)
            phases.ended("make and import image")
            result = daemon.run(busybox.IMAGE, "hako-demo", *COMMAND)
            phases.ended("run container")
    phases.ended("clean up")
    guest, _, output = result.stdout.partition("\n")
    print(f"\nhost kernel   {os.uname().release}\nguest kernel  {guest}\noutput        {output.strip()}")
    print(f"exit code     {result.code}", flush=True)
    sys.stderr.write(imported.stderr + result.stderr)
    return 0 if result.code == 42 and guest != os.uname().release else 1


if __name__ == "__main__":
    sys.exit(main())
