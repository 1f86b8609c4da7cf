"""``hako install`` prints lines for Docker's configuration, which it does not change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from shim.commands import docker

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = {"runtimes": {"vm": {"runtimeType": "io.containerd.hako.v2"}}}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, 'put `"runtimes": {"hako": {"runtimeType": "io.containerd.hako.v2"}}` into'),
        ({"runtimes": {}}, 'put `"hako": {"runtimeType": "io.containerd.hako.v2"}` into `runtimes` of'),
    ],
)
def test_what_is_missing_is_named_exactly(tmp_path: Path, document: object, expected: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(json.dumps(document), encoding="utf-8")

    assert expected in docker.missing(path)


def test_a_missing_file_is_described_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dockerd").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "daemon.json"

    path.write_text(docker.missing(path).split("`")[1], encoding="utf-8")

    assert docker.missing(path) == ""


def test_a_host_without_docker_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert docker.missing(tmp_path / "daemon.json") == ""


def test_a_docker_that_knows_the_runtime_is_told_nothing_until_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(json.dumps(KNOWN), encoding="utf-8")

    assert docker.missing(path) == ""
    assert docker.left(path) == f"left: {path} names Hako as vm; take it out there"


@pytest.mark.parametrize("text", ["[]", "{", "\xff"])
def test_a_broken_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text, encoding="latin-1")

    assert docker.missing(path).startswith(f"Docker is not told: {path}: ")
    assert docker.left(path) == ""
