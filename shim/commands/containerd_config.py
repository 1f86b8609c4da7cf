"""The configuration that a containerd reads, and Hako's drop-in."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from typing import TYPE_CHECKING, Any

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
    known = ["--config", str(main)] if main.exists() else []
    argv = [program, *known, "config", "dump"]
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


def said_of(main: Path, plugin: str) -> dict[str, Any]:
    """Return the main file's table of a plugin.

    :param main: the main file.
    :param plugin: the plugin.
    :raises Refusal: if the file is not TOML or cannot be read.
    """
    try:
        document = tomllib.loads(main.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refusal(f"install: {main}: {error}; correct it") from error
    plugins = document.get("plugins", {})
    said = plugins.get(plugin, {}) if isinstance(plugins, dict) else {}
    return said if isinstance(said, dict) else {}


def tables(path: tuple[str, ...], table: dict[str, Any]) -> list[str]:
    """Write a table and its sub-tables as lines of TOML.

    :param path: the keys that lead to it.
    :param table: its content, as ``tomllib`` returns it.
    """
    plain = [
        f"{json.dumps(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, dict)
    ]
    lines = [f"[{'.'.join(map(json.dumps, path))}]", *plain] if plain or not table else []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += tables((*path, key), value)
    return lines


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, (str, bool)):
        return json.dumps(value)  # TOML's basic strings know all escapes that JSON writes
    return str(value)


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
        raise Refusal(f"install: {path}: {error.strerror}; make it writable") from error
