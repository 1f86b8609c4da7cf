"""A process without HOME gets its user's home directory from the container's list of users."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from guest.agent import passwd

if TYPE_CHECKING:
    from pathlib import Path

USERS = """root:x:0:0:root:/root:/bin/sh

damaged
  seven:x:7:7::/home/seven:/bin/sh
again:x:7:7::/home/again:/bin/sh
homeless:x:8:8:::/bin/sh
short:x:9
other:x:107:7:7:/other:7
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    etc = tmp_path / "root" / "etc"
    etc.mkdir(parents=True)
    (etc / "passwd").write_text(USERS)
    return etc.parent


def home_of(uid: int, root: Path, *env: str, **places: Any) -> list[str]:
    process = {"env": list(env), "user": {"uid": uid}}
    passwd.give_home(process, root=str(root), **places)
    return list(process["env"])


@pytest.mark.parametrize(
    ("uid", "home"), [(0, "/root"), (7, "/home/seven"), (8, ""), (9, ""), (10, "/"), (107, "/other")]
)
def test_the_first_line_for_a_user_counts(root: Path, uid: int, home: str) -> None:
    assert home_of(uid, root, "A=b") == ["A=b", f"HOME={home}"]


def test_a_line_without_a_number_is_for_root(root: Path) -> None:
    (root / "etc/passwd").write_text("seven:x:seven:7::/odd:/bin/sh\nroot:x:0:0::/root:/bin/sh\n")
    assert home_of(0, root) == ["HOME=/odd"]


def test_a_given_home_stays(root: Path) -> None:
    assert home_of(7, root, "HOME=/own", "A=b") == ["HOME=/own", "A=b"]


def test_an_empty_home_counts_as_unset(root: Path) -> None:
    assert home_of(7, root, "HOME=", "A=b") == ["A=b", "HOME=/home/seven"]


def test_links_are_followed_inside_the_container(root: Path) -> None:
    (root / "etc/passwd").rename(root / "users")
    (root / "etc/passwd").symlink_to("/users")
    assert home_of(7, root) == ["HOME=/home/seven"]
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("../../../../users")
    assert home_of(7, root) == ["HOME=/home/seven"]


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_without_a_list_of_users_home_is_the_root(root: Path, kind: str) -> None:
    users = root / "etc/passwd"
    users.unlink()
    if kind == "directory":
        users.mkdir()
    elif kind == "fifo":
        os.mkfifo(users)
    assert home_of(7, root) == ["HOME=/"]


def test_a_mount_over_the_list_of_users_is_read(root: Path, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("seven:x:7:7::/mounted:/bin/sh\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("seven:x:7:7::/below:/bin/sh\n")
    file = {"destination": "/etc/passwd", "source": str(tmp_path / "users")}
    directory = {"destination": "/etc/", "source": str(tmp_path / "etc")}
    assert home_of(7, root, mounts=[directory, file]) == ["HOME=/mounted"]
    assert home_of(7, root, mounts=[file, directory]) == ["HOME=/below"]
