"""``hako image``: build the software inside the virtual machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shim import config
from shim.commands import columns
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse
    from typing import Any, TextIO

GUEST_DIRECTORY = Path(config.GuestConfig().kernel).parent
CACHE_DIRECTORY = Path("/var/cache/hako")


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    image = commands.add_parser("image", help="build the software inside the virtual machines")
    build = image.add_subparsers(dest="image_command", required=True, metavar="COMMAND").add_parser(
        "build", help="build the guest's kernel and initrd from the distribution's packages"
    )
    for option, default, text in (
        ("--output", GUEST_DIRECTORY, "where they go"),
        ("--cache", CACHE_DIRECTORY, "where downloaded packages are kept"),
    ):
        build.add_argument(option, type=Path, default=default, metavar="DIR", help=f"{text} ({default})")
    build.add_argument("--kernel", type=Path, metavar="FILE", help="your own kernel")
    build.add_argument("--modules", type=Path, metavar="DIR", help="its lib/modules/RELEASE")
    build.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Run the chosen subcommand.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if the image cannot be built.
    """
    build(chosen.output, chosen.cache, kernel=chosen.kernel, modules=chosen.modules)
    print(json.dumps({"output": str(chosen.output)}) if chosen.json else chosen.output)
    return 0


def build(output: Path, cache: Path, *, kernel: Path | None = None, modules: Path | None = None) -> None:
    """Build the guest's kernel and initrd, and show the current step.

    :param output: where they go.
    :param cache: where downloaded packages are kept.
    :param kernel: the operator's own kernel.
    :param modules: its ``lib/modules/RELEASE``.
    :raises Refusal: if they cannot be built.
    """
    from guest.image import ImageError  # noqa: PLC0415 - the help does not need it
    from guest.image import build as build_image  # noqa: PLC0415 - as above

    progress = Progress(sys.stderr)
    try:
        build_image(output, cache, kernel=kernel, modules=modules, progress=progress.step)
    except ImageError as error:
        raise Refusal(str(error)) from error
    finally:
        progress.end()


def put_modules(new: Path, directory: Path) -> None:
    """Replace a directory of modules, unless it has the same; running machines use it.

    :param new: the new one; it is moved or removed.
    :param directory: the place.
    """
    from guest.image import module_tree  # noqa: PLC0415 - as above

    module_tree.put(new, directory)


class Progress:
    """Show the current step: on a terminal in one changing line, otherwise one line for each.

    :param stream: where it is shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = columns.is_screen(stream)
        self._shown = False

    def step(self, text: str) -> None:
        """Report the current step."""
        # Back to the first column and clear to the end of the line: ECMA-48 EL.
        self._stream.write(f"\r\x1b[K{text}" if self._in_place else f"{text}\n")
        self._stream.flush()
        self._shown = True

    def end(self) -> None:
        """Leave the last step visible, with the cursor below it."""
        if self._in_place and self._shown:
            self._stream.write("\n")
