"""Two programs are called virtiofsd; each gets its own options."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisor import VmStartError, detect_dialect
from hypervisor.virtiofsd import Dialect, connected_pair, daemon_argv, dialect_of

C_HELP = """\
    -o source=PATH             
    --socket-path=PATH         
    --fd=FDNUM                 
"""  # noqa: W291  (the program's own output)
RUST_HELP = """\
      --shared-dir <SHARED_DIR>
      --fd <FD>
  -o <COMPAT_OPTIONS>
      -o source=...
"""


@pytest.mark.parametrize(
    ("help_text", "dialect"),
    [
        pytest.param(C_HELP, Dialect.C, id="c"),
        pytest.param(RUST_HELP, Dialect.RUST, id="rust, which mentions the old options too"),
        pytest.param("usage: true [ignored]", None, id="neither"),
    ],
)
def test_the_dialect_is_told_by_the_option_for_the_directory(help_text: str, dialect: Dialect | None) -> None:
    assert dialect_of(help_text) is dialect


@pytest.mark.parametrize("dialect", Dialect, ids=lambda dialect: dialect.value)
def test_each_daemon_gets_a_socket_a_directory_and_a_sandbox(dialect: Dialect) -> None:
    line = " ".join(daemon_argv(Path("/d/virtiofsd"), dialect, fd=7, source=Path("/srv")))
    assert line.startswith("/d/virtiofsd --fd=7 ")
    for expected in ("/srv", "cache=auto", "sandbox=namespace", "xattr", "acl", "killpriv", "submounts"):
        assert expected in line


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("/bin/true", "not a virtio-fs daemon"),
        ("/bin/false", "exited with status 1"),
        ("/nonexistent/virtiofsd", "No such file"),
    ],
)
async def test_another_program_is_refused_by_name(program: str, cause: str) -> None:
    with pytest.raises(VmStartError, match=cause) as caught:
        await detect_dialect(Path(program))
    assert program in str(caught.value)


def test_the_connection_to_the_daemon_leaves_no_file_and_allows_long_paths(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 60] * 3)
    deep.mkdir(parents=True)
    listener, client = connected_pair(deep)
    with listener, client:
        accepted, _ = listener.accept()
        with accepted:
            client.send(b"x")
            assert accepted.recv(1) == b"x"
    assert list(deep.iterdir()) == []
