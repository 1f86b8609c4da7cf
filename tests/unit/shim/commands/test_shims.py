"""A host's sandboxes are those whose records can be read; a user who may not read them is told so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shim import cli
from shim.commands import shims
from shim.host import state_directory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"id": "box"}'])
def test_a_directory_without_a_whole_record_is_no_sandbox(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "0123").mkdir()
    if text is not None:
        (tmp_path / "0123" / "sandbox.json").write_text(text, encoding="utf-8")
    assert shims.records(str(tmp_path)) == []


@pytest.mark.parametrize("command", ["ps", "top", "metrics", "events --past", "inspect box", "logs box"])
def test_a_user_who_may_not_look_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(state_directory, "read_record", refuse)
    (tmp_path / "state" / "0123").mkdir(parents=True)
    config = tmp_path / "config.toml"
    config.write_text(
        f'[shim]\nstate_dir = "{tmp_path}/state"\nlog_dir = "{tmp_path}/log"\n', encoding="utf-8"
    )

    assert cli.main([*command.split(), "--config", str(config)]) == 1
    told = capsys.readouterr().err
    assert told == f"sandboxes: {tmp_path}/state/0123: Permission denied; run this as root\n"
