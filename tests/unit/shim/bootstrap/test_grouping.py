"""Which shim a container belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from shim import identifiers
from shim.bootstrap import grouping
from shim.refusal import Refusal

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


POD = {"io.kubernetes.cri.sandbox-id": "pod"}


@pytest.mark.parametrize("kind", ["sandbox", "container"])
def test_a_pod_cannot_choose_another_pods_machine_by_an_annotation(tmp_path: Path, kind: str) -> None:
    annotations = {**POD, "io.kubernetes.cri.container-type": kind, "io.containerd.runc.v2.group": "victim"}
    (tmp_path / "config.json").write_text(json.dumps({"annotations": annotations}))

    with pytest.raises(Refusal, match="names victim, which is not its pod pod; remove the annotation"):
        grouping.group_of(str(tmp_path), "c1")


@pytest.mark.parametrize(
    ("spec", "group"),
    [
        ({}, "c1"),
        ({"annotations": None}, "c1"),
        ({"annotations": {"other": "x"}}, "c1"),
        ({"annotations": {"io.kubernetes.cri.sandbox-id": "pod"}}, "pod"),
        ({"annotations": {"io.containerd.runc.v2.group": "group"}}, "group"),
        ({"annotations": {"io.containerd.runc.v2.group": ""}}, "c1"),
        ({"annotations": {**POD, "io.kubernetes.cri.container-type": "container"}}, "pod"),
        ({"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}, "c1"),
        ([], "c1"),
    ],
)
def test_annotations_determine_the_group(
    tmp_path: Path, spec: dict[str, Any] | list[Any], group: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(spec))
    assert grouping.group_of(str(tmp_path), "c1") == group


def test_a_container_without_a_specification_is_alone_in_its_group(tmp_path: Path) -> None:
    assert grouping.group_of(str(tmp_path), "c1") == "c1"


@pytest.mark.parametrize(
    ("address", "joined"),
    [
        ("/run/containerd/containerd.sock", "/run/containerd/containerd.sock/ns/c1"),
        ("//run//containerd.sock/", "/run/containerd.sock/ns/c1"),
        ("unix:///run/containerd.sock", "unix:/run/containerd.sock/ns/c1"),
        ("", "ns/c1"),
    ],
    ids=["plain", "doubled slashes", "scheme", "empty"],
)
def test_the_socket_has_the_name_that_containerds_tools_expect(address: str, joined: str) -> None:
    name = grouping.socket_name(address=address, namespace="ns", group="c1")
    assert name == hashlib.sha256(joined.encode()).hexdigest()


@pytest.mark.parametrize("identifier", ["a", "0", "A-b_c.d", "x" * 76])
def test_containerds_identifiers_are_accepted(identifier: str) -> None:
    identifiers.check_identifier(identifier, phase="start", what="id")


@pytest.mark.parametrize("length", [106, 107])
def test_a_socket_path_has_106_bytes_at_most(length: int) -> None:
    directory = "/" + "d" * (length - 66)
    name = "n" * 64
    if length == 106:
        assert len(grouping.socket_path(directory, name)) == length
    else:
        with pytest.raises(Refusal, match="107 bytes are too long"):
            grouping.socket_path(directory, name)
