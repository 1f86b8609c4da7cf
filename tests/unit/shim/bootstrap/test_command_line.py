"""Flags are read as Go's ``flag`` package reads them."""

from __future__ import annotations

from typing import Any

import pytest

from shim.bootstrap.command_line import CommandLine, parse
from shim.refusal import Refusal


@pytest.mark.parametrize("flags", [["-id", "c1"], ["--id", "c1"], ["-id=c1"], ["--id=c1"]])
def test_all_spellings_of_a_flag_mean_the_same(flags: list[str]) -> None:
    assert parse([*flags, "start"]) == CommandLine(id="c1", action="start")


def test_containerds_start_is_understood() -> None:
    arguments = (
        "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start"
    )
    assert parse(arguments.split()) == CommandLine(
        namespace="k8s.io",
        address="/run/c.sock",
        publish_binary="/usr/bin/containerd",
        id="c1",
        debug=True,
        action="start",
    )


def test_containerds_delete_is_understood() -> None:
    arguments = "-namespace n -address /a -publish-binary /b -id c1 -bundle /run/bundle delete"
    line = parse(arguments.split())
    assert (line.action, line.bundle, line.debug) == ("delete", "/run/bundle", False)


@pytest.mark.parametrize(
    ("spelling", "value"), [("-debug=true", True), ("-debug=0", False), ("--debug", True)]
)
def test_booleans_take_a_value_only_with_an_equals_sign(spelling: str, value: bool) -> None:
    assert parse([spelling, "start"]).debug is value


@pytest.mark.parametrize(
    ("arguments", "field"), [(["-info"], "info"), (["-v"], "version"), (["-version"], "version")]
)
def test_questions_need_no_action(arguments: list[str], field: str) -> None:
    asked: dict[str, Any] = {field: True}
    assert parse(arguments) == CommandLine(**asked)


def test_a_value_may_begin_with_a_dash_or_contain_an_equals_sign() -> None:
    assert parse(["-id", "-x", "-bundle=/a=b"]) == CommandLine(id="-x", bundle="/a=b")


def test_two_dashes_end_the_flags() -> None:
    assert parse(["-id", "c1", "--", "-odd"]).action == "-odd"


def test_arguments_after_the_action_are_ignored() -> None:
    assert parse(["start", "-id", "c1"]) == CommandLine(action="start")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["-idd", "c1"], "-idd: unknown flag; known are -address, "),
        (["-id"], "-id: the value is missing"),
        (["-debug=maybe"], "-debug: 'maybe' is not true or false"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], cause: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(arguments)
    assert cause in str(caught.value)
