"""``hako``: what an operator runs by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shim import config
from shim.commands import configuration, template
from shim.refusal import Refusal
from shim.version import version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

_GUEST_DIRECTORY = Path(config.GuestConfig().kernel).parent
_CACHE_DIRECTORY = Path("/var/cache/hako")
_CONSOLE_LINE = 4096
"""Characters of a line of a console that are shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one command; the entry point of the console script.

    :param arguments: the command line without the program; of this process if not given.
    :returns: the exit status: 0 for yes or done, 1 for no or failed, 2 for a wrong command line.
    """
    chosen = parser().parse_args(arguments)
    status = 0
    try:
        match chosen.command:
            case "check":
                status = _check(chosen.config, as_json=chosen.json)
            case "logs":
                status = _logs(chosen)
            case "timeline":
                status = _timeline(chosen)
            case "install":
                from shim.commands import install  # noqa: PLC0415 - the other commands do without

                print(install.drop_in(install.found_version(chosen.containerd)), end="")
            case "config":
                status = configuration.run(chosen)
            case "image":
                status = _build_image(chosen)
            case "template":
                status = template.run(chosen)
            case _:
                print(version())
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 1
    return status


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    hako = argparse.ArgumentParser(prog="hako", description="Containers in virtual machines of their own.")
    commands = hako.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="say whether this host can run sandboxes, and with what")
    check.add_argument("--json", action="store_true", help="for programs")
    check.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")
    logs = commands.add_parser("logs", help="show a sandbox's console, or why it ended")
    logs.add_argument("id", metavar="ID", help="the sandbox: a pod's, or that of a container on its own")
    logs.add_argument("--namespace", default="*", metavar="NAME", help="containerd's namespace (any)")
    logs.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")
    shown = commands.add_parser("timeline", help="show where the time of a sandbox's start went")
    shown.add_argument("id", metavar="ID", help="the sandbox: a pod's, or that of a container on its own")
    shown.add_argument("--namespace", default="*", metavar="NAME", help="containerd's namespace (any)")
    shown.add_argument("--svg", type=Path, metavar="FILE", help="draw it")
    shown.add_argument("--trace", type=Path, metavar="FILE", help="write it for Perfetto and Chrome")
    shown.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")
    install = commands.add_parser("install", help="say what containerd must be told to offer Hako")
    install.add_argument(
        "--print", action="store_true", required=True, help="print it: files are left to the operator"
    )
    install.add_argument(
        "--containerd", default="containerd", metavar="PROGRAM", help="another than the one in PATH"
    )
    image = commands.add_parser("image", help="make what runs inside the virtual machines")
    build = image.add_subparsers(dest="image_command", required=True, metavar="COMMAND").add_parser(
        "build", help="build the guest's kernel and initrd from the distribution's packages"
    )
    for option, default, text in (
        ("--output", _GUEST_DIRECTORY, "where they go"),
        ("--cache", _CACHE_DIRECTORY, "where downloaded packages are kept"),
    ):
        build.add_argument(option, type=Path, default=default, metavar="DIR", help=f"{text} ({default})")
    build.add_argument("--kernel", type=Path, metavar="FILE", help="a kernel of your own")
    build.add_argument("--modules", type=Path, metavar="DIR", help="its lib/modules/RELEASE")
    configuration.add_to(commands)
    template.add_to(commands)
    commands.add_parser("version", help="print the version")
    return hako


def _check(path: str, *, as_json: bool) -> int:
    from shim.commands import check  # noqa: PLC0415 - imports the hypervisor, which the other commands do without

    environment = {config.ENVIRONMENT_VARIABLE: path} if path else os.environ
    findings = asyncio.run(check.examine(config.parse(config.locate(environment))))
    able = all(finding.ok for finding in findings)
    if as_json:
        print(json.dumps({"able": able, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if able else 1
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{'ok' if finding.ok else 'no':<3}{finding.name:<{width}}  {finding.detail}{remedy}")
        if finding.warning:
            print(f"{'':<3}{'':<{width}}  warning: {finding.warning}")
    print("This host can run sandboxes." if able else "This host cannot run sandboxes.")
    return 0 if able else 1


def _logs(chosen: argparse.Namespace) -> int:
    """Print the kept reason of a sandbox that failed, and the console of one that runs."""
    from shim.host import state_directory  # noqa: PLC0415 - the other commands do without
    from shim.telemetry import postmortem  # noqa: PLC0415 - the other commands do without

    environment = {config.ENVIRONMENT_VARIABLE: chosen.config} if chosen.config else os.environ
    settings = config.parse(config.locate(environment)).shim
    text = postmortem.read(Path(settings.log_dir), sandbox_id=chosen.id, namespace=chosen.namespace)
    lives = False
    for path in sorted(Path(settings.state_dir).glob("*/sandbox.json")):
        record = state_directory.read_record(str(path.parent))
        console = path.parent / "console.log"
        if record.id == chosen.id and chosen.namespace in {"*", record.namespace} and console.exists():
            lives = True
            text += console.read_text(errors="replace")
    if lives and not text:
        print(f"logs: {chosen.id}: its console is silent so far", file=sys.stderr)  # as a clone's often is
    elif not text:
        raise Refusal(
            f"logs: {chosen.id}: no such sandbox runs and none of that name failed; see `ctr task ls`"
        )
    from hypervisor import printable  # noqa: PLC0415 - as above

    # A guest chooses what its console says, and this goes to a terminal.
    sys.stdout.writelines(f"{printable(line, limit=_CONSOLE_LINE)}\n" for line in text.splitlines())
    return 0


def _timeline(chosen: argparse.Namespace) -> int:
    """Print where the time went, or write it in the forms that are asked for."""
    from shim.telemetry import timeline_files, timeline_model, timeline_svg  # noqa: PLC0415 - as above

    environment = {config.ENVIRONMENT_VARIABLE: chosen.config} if chosen.config else os.environ
    settings = config.parse(config.locate(environment)).shim
    found = timeline_files.find(
        state_dir=Path(settings.state_dir),
        log_dir=Path(settings.log_dir),
        namespace=chosen.namespace,
        sandbox_id=chosen.id,
    )
    if not found:
        raise Refusal(f"timeline: {chosen.id}: nothing is kept of such a sandbox; see `ctr task ls`")
    if chosen.svg is not None:
        chosen.svg.write_text(timeline_svg.draw(found[0]), encoding="utf-8")
    if chosen.trace is not None:
        chosen.trace.write_text(json.dumps(timeline_model.trace(found[0])), encoding="utf-8")
    if chosen.svg is None and chosen.trace is None:
        sys.stdout.write(timeline_model.table(found[0]))
    return 0


def _build_image(chosen: argparse.Namespace) -> int:
    from guest.image import ImageError, build  # noqa: PLC0415 - the other commands do without

    progress = Progress(sys.stderr)
    try:
        build(
            chosen.output,
            chosen.cache,
            kernel=chosen.kernel,
            modules=chosen.modules,
            progress=progress.step,
        )
    except ImageError as error:
        raise Refusal(str(error)) from error
    finally:
        progress.end()
    print(chosen.output)
    return 0


class Progress:
    """Show the step that is under way: one line that changes on a terminal, a line each elsewhere.

    :param stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_place = stream.isatty()
        self._shown = False

    def step(self, text: str) -> None:
        """Report the current step."""
        # Back to the first column and clear to the end of the line: ECMA-48 EL.
        self._stream.write(f"\r\x1b[K{text}" if self._in_place else f"{text}\n")
        self._stream.flush()
        self._shown = True

    def end(self) -> None:
        """Leave the last step to be read, with the cursor below it."""
        if self._in_place and self._shown:
            self._stream.write("\n")


if __name__ == "__main__":
    sys.exit(main())
