"""Which network namespace a specification asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shim.agent.oci_namespaces import namespace_of
from shim.errors import InvalidArgument


@pytest.mark.parametrize(
    ("namespaces", "path"),
    [
        ([{"type": "pid"}, {"type": "network", "path": "/run/netns/pod"}], Path("/run/netns/pod")),
        ([{"type": "network"}], None),
        ([{"type": "network", "path": ""}], None),
        ([], None),
        (None, None),
    ],
)
def test_a_namespace_is_the_one_at_the_path_or_a_new_one(namespaces: Any, path: Path | None) -> None:
    assert namespace_of({"linux": {"namespaces": namespaces}}).path == path


def test_a_specification_without_linux_gets_a_new_one() -> None:
    assert namespace_of({}).path is None


def test_a_specification_without_a_network_namespace_asks_for_the_hosts_and_is_refused() -> None:
    with pytest.raises(
        InvalidArgument, match=r"^spec: linux.namespaces: without network .* the host's network"
    ):
        namespace_of({"linux": {"namespaces": [{"type": "pid"}]}})
