"""JSON output: the agent writes documents for crun and never reads any."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x20)} | {ord('"'): '\\"', ord("\\"): "\\\\"}


def dumps(value: Any) -> str:
    """Write a document.

    :param value: nested dicts, lists, strings, integers, booleans and None.
    :returns: its JSON text.
    :raises TypeError: if there is anything else in it.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    if isinstance(value, list):
        return f"[{','.join(dumps(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{dumps(str(key))}:{dumps(item)}' for key, item in value.items())}}}"
    raise TypeError(f"no JSON for {type(value).__name__}")
