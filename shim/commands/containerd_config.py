"""The configuration that a containerd reads, and Hako's drop-in."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from typing import TYPE_CHECKING, Any

from shim.commands.remedies import remedy
from shim.refusal import Refusal

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 20.0


def dump(program: str, main: Path) -> dict[str, Any]:
    """Ask a containerd for its configuration, including all imports.

    :param program: the containerd.
    :param main: its main file, which need not exist.
    :raises Refusal: if containerd refuses the configuration.
    """
    argv = [program, "--config", str(main if main.exists() else os.devnull), "config", "dump"]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(f"install: {program} config dump: {error}; reinstall containerd") from error
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Refusal(f"install: {main}: containerd refuses it: {said}; correct it")
    try:
        return tomllib.loads(done.stdout)
    except ValueError as error:
        raise Refusal(f"install: {program} config dump: {error}; reinstall containerd") from error


def take_out(document: dict[str, Any], plugin: str, handler: str) -> object:
    """Remove a handler from a dumped configuration, and the list of files that made it.

    :param document: changed in place.
    :param plugin: the plugin that has handlers.
    :param handler: the name.
    :returns: the handler; None if there is none of that name.
    """
    document.pop("imports", None)
    return handlers(document, plugin).pop(handler, None)


def handlers(document: dict[str, Any], plugin: str) -> dict[str, Any]:
    """Return the handlers of a dumped configuration by name.

    :param document: the configuration.
    :param plugin: the plugin that has handlers.
    """
    table: Any = document
    for key in ("plugins", plugin, "containerd", "runtimes"):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}


def read(main: Path) -> dict[str, Any]:
    """Return what the main file says; nothing if it is not there.

    :param main: the main file.
    :raises Refusal: if the file is not TOML or cannot be read.
    """
    try:
        return tomllib.loads(main.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refusal(f"install: {main}: {error}; correct it") from error


def said_of(document: dict[str, Any], plugin: str) -> dict[str, Any]:
    """Return what a file says of a plugin.

    :param document: the file.
    :param plugin: the plugin.
    """
    plugins = document.get("plugins", {})
    said = plugins.get(plugin, {}) if isinstance(plugins, dict) else {}
    return said if isinstance(said, dict) else {}


def tables(path: tuple[str, ...], table: dict[str, Any]) -> list[str]:
    """Write a table and its sub-tables as lines of TOML.

    :param path: the keys that lead to it.
    :param table: its content, as ``tomllib`` returns it.
    """
    plain = [
        f"{json.dumps(key)} = {value(each)}" for key, each in table.items() if not isinstance(each, dict)
    ]
    lines = [f"[{'.'.join(map(json.dumps, path))}]", *plain] if plain or not table else []
    for key, each in table.items():
        if isinstance(each, dict):
            lines += tables((*path, key), each)
    return lines


def value(of: object) -> str:
    """Write a value as TOML.

    :param of: the value, as ``tomllib`` has it.
    """
    if isinstance(of, list):
        return f"[{', '.join(map(value, of))}]"
    if isinstance(of, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {value(each)}' for key, each in of.items())}}}"
    if isinstance(of, (str, bool)):
        return json.dumps(of)  # TOML's basic strings have all escapes that JSON writes
    return str(of)


def replace(path: Path, text: str | None) -> None:
    """Write a file atomically, or remove it.

    :param path: the file.
    :param text: its content; None removes it.
    :raises Refusal: if that fails.
    """
    try:
        if text is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        rest = remedy(error, "make it writable, or put what `hako install --print` shows there")
        raise Refusal(f"install: {path}: {error.strerror}; {rest}") from error
