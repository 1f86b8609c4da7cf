"""``hako install``: add Hako to a node's containerd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import config
from shim.commands import containerd_config, docker, drop_in, image
from shim.commands.remedies import remedy
from shim.host.program_version import version_line
from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse

_SHIPPED_GUEST = Path("/usr/share/hako/guest")
"""The image that a package brings along."""


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
        default=drop_in.MAIN,
        metavar="FILE",
        help=f"its main file, which is never changed ({drop_in.MAIN})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-image", action="store_true", help="do not build the guest's image")


def run(chosen: argparse.Namespace) -> int:
    """Build or copy the guest's image first, so that the runtime can run once containerd offers it.

    :param chosen: the command line; it may ask for texts only.
    :returns: the exit status.
    :raises Refusal: if Hako does not work with that containerd, the drop-in would not be read or would hide
        other settings, or there can be no image; then containerd's configuration is unchanged.
    """
    if chosen.kubernetes:
        settings = config.parse(config.locate(os.environ))
        from shim.commands import kubernetes  # noqa: PLC0415 - imports the hypervisor

        pod = asyncio.run(kubernetes.overhead(settings))
        print(kubernetes.as_json(pod) if chosen.json else kubernetes.objects(pod), end="")
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
    native = drop_in.native_format(version)
    target = main.parent / drop_in.NAME
    before = _own_content(target)
    document = containerd_config.read(main)
    dumped = containerd_config.dump(chosen.containerd, main)
    texts = drop_in.candidates(
        version,
        main,
        document=document,
        handlers=containerd_config.handlers(dumped, native.plugin),
        is_directory_made=drop_in.is_directory_made(before) if before else not target.parent.exists(),
    )
    is_read = containerd_config.take_out(dumped, native.plugin, drop_in.HANDLER) is not None
    is_current = before in texts and is_read
    if chosen.print:
        if chosen.json:
            _print_json(target, texts[0], changed=not is_current)
            return 0
        print(f"install: would write this as {target}", file=sys.stderr)
        print(texts[0], end="")
        return 0
    if not is_current:
        line = drop_in.remedy(main, document, version=version)
        _write(
            target, texts, before=before, program=chosen.containerd, main=main, import_it=line, native=native
        )
    if chosen.json:
        _print_json(target, _content(target) or "", changed=not is_current)
        return 0
    print(f"{'unchanged' if is_current else 'written'}: {target}")
    if not is_current:
        print("containerd offers the runtime once it is restarted: systemctl restart containerd")
    for line in filter(None, [docker.missing()]):
        print(line)
    return 0


def _print_json(target: Path, text: str, *, changed: bool) -> None:
    notes = list(filter(None, [docker.missing()]))
    print(json.dumps({"path": str(target), "changed": changed, "text": text, "notes": notes}, indent=2))


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
            new = output / f".{path.name}.new"
            if path.is_dir():
                shutil.rmtree(new, ignore_errors=True)
                shutil.copytree(path, new)
                image.put_modules(new, output / path.name)
            else:
                shutil.copyfile(path, new)
                new.replace(output / path.name)
    except OSError as error:
        rest = remedy(error, "make room, or make it writable")
        raise Refusal(f"install: {error.filename}: {error.strerror}; {rest}") from error


def remove(main: Path) -> str:
    """Remove the drop-in, if it is as ``hako install`` wrote it.

    :param main: containerd's main file.
    :returns: a line that says what was done; empty if there is none of ``hako install``.
    :raises Refusal: if it cannot be removed.
    """
    target = main.parent / drop_in.NAME
    text = _content(target) or ""
    if not drop_in.is_own(text):
        return ""
    if drop_in.is_changed(text):
        return f"left: {target}: somebody has changed it since `hako install`; remove it by hand"
    containerd_config.replace(target, None)
    if drop_in.is_directory_made(text):
        _remove_empty(target.parent)
    return f"removed: {target}; containerd forgets the runtime once it is restarted"


def _own_content(target: Path) -> str | None:
    """Return the text of the drop-in; None if there is none.

    :raises Refusal: if it is somebody else's.
    """
    text = _content(target)
    if text is None:
        return None
    if not drop_in.is_own(text):
        raise Refusal(f"install: {target}: it is not of `hako install`; move it away")
    if drop_in.is_changed(text):
        raise Refusal(f"install: {target}: somebody has changed it since `hako install`; move it away")
    return text


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # something else is in it
        directory.rmdir()


def _write(
    target: Path,
    texts: list[str],
    *,
    before: str | None,
    program: str,
    main: Path,
    import_it: str,
    native: drop_in.Format,
) -> None:
    """Write the first text by which containerd knows Hako and everything else as before, or change nothing.

    :raises Refusal: if there is none.
    """
    was_there = target.parent.exists()
    kept = before
    try:
        containerd_config.replace(target, None)
        without = containerd_config.dump(program, main)
        containerd_config.take_out(without, native.plugin, drop_in.HANDLER)
        for text in texts:
            containerd_config.replace(target, text)
            found = containerd_config.dump(program, main)
            if containerd_config.take_out(found, native.plugin, drop_in.HANDLER) is None:
                raise Refusal(
                    f"install: {main}: it does not import {target}; {import_it}, and run this again"
                )
            if found == without:
                kept = text
                return
        raise Refusal(
            f"install: {target}: containerd would read other files' settings otherwise; "
            f"add the table that `hako install --print` shows to {main} instead"
        )
    finally:
        containerd_config.replace(target, kept)
        if kept is None and not was_there:
            _remove_empty(target.parent)


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Refusal(f"install: {path}: {error}; make it readable") from error


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
