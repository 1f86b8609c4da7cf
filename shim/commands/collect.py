"""``hako collect``: one archive for a bug report, without secrets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import platform
import re
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import config
from shim.commands import shims
from shim.commands.inspect_sandbox import everything
from shim.commands.logs import files_of
from shim.commands.remedies import remedy
from shim.host.program_version import version_line
from shim.refusal import Refusal
from shim.telemetry import timeline
from shim.version import version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from shim.config import Config
    from shim.host.state_directory import StartRecord

_REDACTED = "(redacted)"
#: The name of a secret, up to its value; in JSON and in quoted text, there are quotation marks.
_NAME = (
    r"(?:password|passwd|passphrase|secret|token|credential|(?:api|access|private)[-_]?key)"
    r"[\w-]*\\?[\"']?\s*[=:]\s*"
)
_VALUE = r"""(?:\\?"[^"]*"|\\?'[^']*'|[^\s,;&"']+)"""
_SECRETS = tuple(
    re.compile(f"(?i)({begins}){value}")
    for begins, value in (
        (_NAME, _VALUE),
        (r"authorization\\?[\"']?\s*[=:]\s*", r".+"),
        (r"\b(?:bearer|basic)\s+", r"[\w.~+/-]{8,}=*"),
        (r"\w+://", r"[^/\s@]+(?=@)"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----", r"[^-]+"),
    )
)


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "collect",
        help="write an archive for a bug report",
        description="Write versions, configuration, `hako check`, and logs, timeline and description of each "
        "sandbox into one archive. No environment variable and no argument of a container is in it.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the archive (hako-DATE.tar.gz)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    shims.add_config_to(parser)


def run(chosen: argparse.Namespace) -> int:
    """Write the archive and print its name.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if it cannot be written.
    """
    now_s = time.time()
    output = chosen.output or Path(time.strftime("hako-%Y%m%d-%H%M%S.tar.gz", time.gmtime(now_s)))
    settings = shims.settings_of(chosen)
    files = dict(asyncio.run(_collected(settings)))
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in files.items():
                _add(archive, name, text, at_s=now_s)
    except OSError as error:
        rest = remedy(error, "name another with --output")
        raise Refusal(f"collect: {output}: {error.strerror}; {rest}") from error
    if chosen.json:
        print(json.dumps({"output": str(output), "files": sorted(files)}, indent=2))
    else:
        print(output)
    return 0


def _add(archive: tarfile.TarFile, name: str, text: str, *, at_s: float) -> None:
    content = redacted(text).encode(errors="replace")
    entry = tarfile.TarInfo(f"hako/{name}")
    entry.size, entry.mtime, entry.mode = len(content), int(at_s), 0o600
    archive.addfile(entry, io.BytesIO(content))


def redacted(text: str) -> str:
    """Return a text without values that look like passwords, tokens or keys."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_REDACTED}", text)
    return text


async def _collected(settings: Config) -> list[tuple[str, str]]:
    found = [
        ("versions.json", json.dumps(_versions(settings), indent=2)),
        ("config.toml", config.render(settings)),
        ("check.json", json.dumps(await _check(settings), indent=2)),
    ]
    records = shims.records(settings.shim.state_dir)
    answers = await shims.ask_all(records, everything)
    for record, answer in zip(records, answers, strict=True):
        directory = f"sandboxes/{record.namespace}__{record.id}"
        shown = {**(answer.value or {}), "id": record.id, "problem": answer.problem}
        found.append((f"{directory}/description.json", json.dumps(shown, indent=2)))
        found += [(f"{directory}/{name}", text) for name, text in await _files(record)]
    found += [(f"ended/{name}", text) for name, text in _kept(Path(settings.shim.log_dir))]
    return found


def _versions(settings: Config) -> dict[str, str]:
    programs = {"containerd": "containerd", "qemu": settings.hypervisor.qemu}
    return {
        "hako": version(),
        "python": platform.python_version(),
        "kernel": " ".join(platform.uname()[2:4]),
        "distribution": _distribution(),
        **{name: _version_of(program) for name, program in programs.items()},
    }


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _version_of(program: str) -> str:
    try:
        return version_line(program)
    except OSError as error:
        return str(error)


async def _check(settings: Config) -> list[dict[str, Any]]:
    from shim.commands import check  # noqa: PLC0415 - it probes the host, and imports what that needs

    return [asdict(finding) for finding in await check.examine(settings)]


async def _files(record: StartRecord) -> list[tuple[str, str]]:
    """Read a sandbox's logs and its timeline, but not its specification and its bundle."""
    paths = [file.path for file in await files_of(record)]
    paths.append(shims.state_of(record) / timeline.NAME)
    return [(path.name, text) for path in paths if (text := _text_of(path))]


def _kept(log_dir: Path) -> Iterator[tuple[str, str]]:
    """Read the files that are kept of ended sandboxes."""
    if not log_dir.is_dir():
        return
    for path in sorted(log_dir.iterdir()):
        if path.suffix in {".log", ".timeline"} and (text := _text_of(path)):
            yield path.name, text


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has been removed meanwhile
        return ""
