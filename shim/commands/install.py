"""``hako install``: add Hako to a node's containerd."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import config
from shim.commands import containerd_config, image, kubernetes
from shim.host.program_version import version_line
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse

_SHIPPED_GUEST = Path("/usr/share/hako/guest")
"""The image that a package contains."""
MAIN = Path("/etc/containerd/config.toml")
"""containerd's main file."""

_FIRST_PLUGIN = "io.containerd.grpc.v1.cri"
_SECOND_PLUGIN = "io.containerd.cri.v1.runtime"
_HANDLER = "hako"
_MARK = "# Written by `hako install`"
DROP_IN = "conf.d/hako.toml"
"""Beside containerd's main file."""

_HEAD = """\
{mark} for containerd {version}, which reads it if {main} says, before its first table:
#     imports = ["{directory}/*.toml"]
# containerd must find containerd-shim-hako-v2 in its PATH.
version = {number}
"""

# An imported file replaces the main file's whole table of the plugin.
_CARRIED = "# What containerd has by {main} and by default; run `hako install` again after a change there."

_RUNTIME = """
[plugins."{plugin}".containerd.runtimes.{handler}]
runtime_type = "io.containerd.hako.v2"
# The devices of the host are not in the machine.
privileged_without_host_devices = true
# What a pod may ask of Hako.
pod_annotations = ["io.hako.*", "io.katacontainers.*"]
"""

_SANDBOXER = """\
# "shim" makes pods without a pause container; "podsandbox" is what every containerd does.
sandboxer = "podsandbox"
"""


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("install", help="add Hako to containerd, and build the guest's image")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--print", action="store_true", help="print the file for containerd, and change nothing"
    )
    what.add_argument(
        "--kubernetes", action="store_true", help="print the RuntimeClass, and how to label this node"
    )
    parser.add_argument(
        "--containerd",
        default="containerd",
        metavar="PROGRAM",
        help="a containerd other than the one in PATH",
    )
    parser.add_argument(
        "--containerd-config",
        type=Path,
        default=MAIN,
        metavar="FILE",
        help=f"its main file, which is never changed ({MAIN})",
    )
    parser.add_argument("--no-image", action="store_true", help="do not build the guest's image")


def run(chosen: argparse.Namespace) -> int:
    """Build or copy the guest's image first, so that the runtime can run once containerd offers it.

    :param chosen: the command line; it may ask for texts only.
    :returns: the exit status.
    :raises Refusal: if Hako does not work with that containerd, the drop-in would not be read or would hide
        other settings, or there can be no image; then containerd's configuration is unchanged.
    """
    if chosen.kubernetes:
        print(kubernetes.objects(config.parse(config.locate(os.environ))), end="")
        return 0
    if not (chosen.print or chosen.no_image):
        found_version(chosen.containerd)
        if (_SHIPPED_GUEST / "image.json").exists():
            copy_image(_SHIPPED_GUEST, image.GUEST_DIRECTORY)
        else:
            image.CACHE_DIRECTORY.mkdir(parents=True, exist_ok=True)
            image.build(image.GUEST_DIRECTORY, image.CACHE_DIRECTORY)
    return _tell(chosen)


def _tell(chosen: argparse.Namespace) -> int:
    """Print the drop-in for containerd, or write it."""
    version, main = found_version(chosen.containerd), chosen.containerd_config
    target = main.parent / DROP_IN
    plugin = _plugin_of(version)
    before = _content(target)
    if before is not None and not before.startswith(_MARK):
        raise Refusal(f"install: {target}: it is not of `hako install`; move it away")
    # containerd 2 merges two files' tables of a plugin.
    carried = {} if plugin == _SECOND_PLUGIN else containerd_config.said_of(main, plugin)
    handlers = containerd_config.handlers(containerd_config.dump(chosen.containerd, main), plugin)
    text = drop_in(version, main=main, carried=_with_handlers(carried, handlers))
    if chosen.print:
        print(f"install: would write this as {target}", file=sys.stderr)
        print(text, end="")
        return 0
    _write(target, text, before=before, program=chosen.containerd, main=main, plugin=plugin)
    print(f"{'unchanged' if before == text else 'written'}: {target}")
    if before != text:
        print("containerd offers the runtime once it is restarted: systemctl restart containerd")
    return 0


def copy_image(shipped: Path, output: Path) -> None:
    """Install the image that a package contains, unless it is already installed.

    :param shipped: the package's.
    :param output: the place; an image there is replaced.
    :raises Refusal: if that fails.
    """
    name = "image.json"  # written last: if it exists, the rest is complete
    try:
        if _content(output / name) == _content(shipped / name):
            return
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(shipped.iterdir(), key=lambda path: path.name == name):
            if path.is_dir():
                shutil.rmtree(output / path.name, ignore_errors=True)
                shutil.copytree(path, output / path.name)
            else:
                new = output / f".{path.name}.new"
                shutil.copyfile(path, new)
                new.replace(output / path.name)
    except OSError as error:
        raise Refusal(
            f"install: {error.filename}: {error.strerror}; make room, or make it writable"
        ) from error


def remove(main: Path) -> Path | None:
    """Remove the drop-in.

    :param main: containerd's main file.
    :returns: its path; None if ``hako install`` has written none.
    :raises Refusal: if it cannot be removed.
    """
    target = main.parent / DROP_IN
    if not (_content(target) or "").startswith(_MARK):
        return None
    containerd_config.replace(target, None)
    return target


def _with_handlers(said: dict[str, Any], handlers: dict[str, Any]) -> dict[str, Any]:
    """Add the other handlers: once one is named, containerd's default handler runc disappears."""
    others = {name: each for name, each in handlers.items() if name != _HANDLER}
    if not others:
        return said
    table = said.get("containerd", {})
    return {**said, "containerd": {**table, "runtimes": {**others, **table.get("runtimes", {})}}}


def _write(target: Path, text: str, *, before: str | None, program: str, main: Path, plugin: str) -> None:
    """Write the drop-in, unless containerd would ignore it or read other settings differently."""
    containerd_config.replace(target, None)
    kept = before
    try:
        without = containerd_config.dump(program, main)
        containerd_config.take_out(without, plugin, _HANDLER)
        containerd_config.replace(target, text)
        found = containerd_config.dump(program, main)
        if containerd_config.take_out(found, plugin, _HANDLER) is None:
            raise Refusal(
                f"install: {main}: it does not import {target}; {_remedy(main, target)}, and run this again"
            )
        if found != without:
            raise Refusal(
                f"install: {target}: containerd would read other files' settings otherwise; "
                f"add the table that `hako install --print` shows to {main} instead"
            )
        kept = text
    finally:
        containerd_config.replace(target, kept)


def _remedy(main: Path, target: Path) -> str:
    line = f'imports = ["{target.parent}/*.toml"]'
    if not main.exists():
        number = 2  # every containerd reads it
        return f"make that file of the lines `version = {number}` and `{line}`"
    return f"put the line `{line}` before its first table, or add the path to those that it imports"


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refusal(f"install: {path}: {error}; make it readable") from error


def _plugin_of(version: str) -> str:
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) < (1, 6):
        raise Refusal(f"install: containerd {version}: not supported; install containerd 1.6 or later")
    return _FIRST_PLUGIN if int(major) == 1 else _SECOND_PLUGIN


def drop_in(version: str, *, main: Path = MAIN, carried: dict[str, Any] | None = None) -> str:
    """Write the configuration for a containerd.

    :param version: its version, such as ``1.7.24``.
    :param main: its main file.
    :param carried: that file's table of the plugin, if it would be lost.
    :returns: TOML with comments that say where it belongs.
    :raises Refusal: if Hako does not work with it.
    """
    plugin = _plugin_of(version)
    text = _HEAD.format(
        mark=_MARK,
        version=version,
        main=main,
        directory=(main.parent / DROP_IN).parent,
        number=2 if plugin == _FIRST_PLUGIN else 3,
    )
    if carried:
        kept = copy.deepcopy(carried)
        containerd_config.take_out({"plugins": {plugin: kept}}, plugin, _HANDLER)
        lines = [_CARRIED.format(main=main), *containerd_config.tables(("plugins", plugin), kept)]
        text += "\n" + "\n".join(lines) + "\n"
    text += _RUNTIME.format(plugin=plugin, handler=_HANDLER)
    return text + (_SANDBOXER if plugin == _SECOND_PLUGIN else "")


def found_version(program: str) -> str:
    """Ask a containerd for its version.

    :param program: its name or path.
    :raises Refusal: if it does not exist or does not print it.
    """
    try:
        line = version_line(program)
    except FileNotFoundError as error:
        raise Refusal(f"install: {error}; install containerd, or name its program") from error
    except OSError as error:
        raise Refusal(f"install: {error}; reinstall containerd") from error
    # "containerd <Go module> <version> <revision>"
    words = line.split()
    return words[2].removeprefix("v") if len(words) > 2 else "of unknown version"
