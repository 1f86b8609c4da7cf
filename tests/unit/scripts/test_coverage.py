"""Groups of modules have a floor of coverage."""

from __future__ import annotations

import pytest

from scripts import coverage

ALL_RUN = {"covered_lines": 8, "num_statements": 8, "covered_branches": 2, "num_branches": 2}
HALF_RUN = {"covered_lines": 4, "num_statements": 8, "covered_branches": 1, "num_branches": 2}


@pytest.mark.parametrize("name", coverage.GROUPS)
def test_each_groups_modules_and_tests_exist(name: str) -> None:
    group = coverage.GROUPS[name]
    assert [pattern for pattern in group.modules if not list(coverage.TOP.glob(pattern))] == []
    assert [test for test in group.tests if not (coverage.TOP / test).exists()] == []


def test_lines_and_branches_of_all_modules_count_equally() -> None:
    group = coverage.Group(("shim/a*.py", "shim/b.py"), ())
    files = {"shim/a1.py": {"summary": ALL_RUN}, "shim/b.py": {"summary": HALF_RUN}, "shim/c.py": {}}
    assert coverage.of_group(group, files) == 75.0


def test_a_module_that_was_not_measured_is_named() -> None:
    with pytest.raises(LookupError, match=r"coverage: shim/gone\.py: no such module was measured"):
        coverage.of_group(coverage.Group(("shim/gone.py",), ()), {})
