"""The configuration that a node's containerd needs."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest

from shim import cli
from shim.commands import drop_in
from shim.refusal import Refusal

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("version", "number", "plugin"),
    [
        ("1.6.20~ds1", 2, "io.containerd.grpc.v1.cri"),
        ("1.7.24", 2, "io.containerd.grpc.v1.cri"),
        ("2.1.9+unknown", 3, "io.containerd.cri.v1.runtime"),
        ("3.0.0", 3, "io.containerd.cri.v1.runtime"),
    ],
)
def test_each_containerd_version_gets_its_configuration(version: str, number: int, plugin: str) -> None:
    text = drop_in.render(version)
    assert version in text
    document = tomllib.loads(text)
    assert document["version"] == number
    runtime = document["plugins"][plugin]["containerd"]["runtimes"]["hako"]
    assert runtime["runtime_type"] == "io.containerd.hako.v2"


@pytest.mark.parametrize("version", ["1.5.9", "of unknown version", "", "2"])
def test_a_containerd_of_an_old_or_unknown_version_is_refused(version: str) -> None:
    with pytest.raises(Refusal, match=r"install containerd 1\.6 or later"):
        drop_in.render(version)


def test_the_command_asks_the_containerd_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "containerd"
    said = "containerd github.com/containerd/containerd/v2 v2.1.9 abc"
    program.write_text(f"#!/bin/sh\n[ $1 = --version ] || exit 0\necho {said}\n")
    program.chmod(0o700)
    assert cli.main(["install", "--print", "--containerd", str(program)]) == 0
    assert "for containerd 2.1.9, which reads it if" in capsys.readouterr().out


def test_a_missing_containerd_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install", "--print", "--containerd", "/nonexistent/containerd"]) == 1
    assert capsys.readouterr().err == (
        "install: /nonexistent/containerd: not found; install containerd, or name its program\n"
    )
