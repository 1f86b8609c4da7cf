"""What a confined process sees of the host's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor import Identity, confinement
from hypervisor.confinement import mounted_below, of_program

USER = Identity(uid=1_900_000_001, gid=1_900_000_001)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A directory with a program, a library and other things."""
    for name in ("bin/program", "lib/library.so", "share/data", "secret", "var/secret"):
        path = tmp_path / "prefix" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "prefix"


def seen_below(prefix: Path, program: Path) -> set[str]:
    files = of_program(program, USER).files
    return {str(file.relative_to(prefix)) for file in files if file.is_relative_to(prefix)}


def test_a_program_sees_itself_its_libraries_and_its_data(prefix: Path) -> None:
    assert seen_below(prefix, prefix / "bin/program") == {"bin/program", "lib", "share"}


def test_a_program_that_a_link_names_is_seen_under_both_paths(prefix: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(prefix / "bin/program")
    assert seen_below(prefix, link) == {"bin/program", "lib", "share"}
    assert link in of_program(link, USER).files


def test_a_program_that_is_in_no_directory_of_programs_sees_only_itself(prefix: Path) -> None:
    assert seen_below(prefix, prefix / "secret") == {"secret"}


def test_a_program_of_the_distribution_sees_nothing_more() -> None:
    assert of_program(Path("/usr/bin/true"), USER).files == of_program(Path("/usr/bin/false"), USER).files


@pytest.mark.parametrize("point", ["/usr/bin", "/usr/bin/true"])
def test_a_program_on_a_mount_below_a_directory_of_the_system_is_seen(
    monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    usual = of_program(Path("/usr/bin/true"), USER).files
    monkeypatch.setattr(confinement, "mounted_below", lambda _: [Path("/usr/local"), Path(point)])
    files = of_program(Path("/usr/bin/true"), USER).files
    assert set(files) - set(usual) == {Path(point)}
    assert files.index(Path("/usr")) < files.index(Path(point))


def test_mount_points_are_found_below_a_directory_and_not_at_it() -> None:
    point = Path("/sys/fs/cgroup")
    assert point in mounted_below([Path("/sys")])
    assert point not in mounted_below([point])
