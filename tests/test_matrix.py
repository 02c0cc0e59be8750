"""One file onto a bare host: Debian systems with nothing but python3 and sshd, each in a folder of its own.

`make test-matrix` makes the folders (as root, on Debian) and names them in MOSH_ROOTS; without that all is skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import peers
from conftest import require
from sshd import ALIAS, Sshd, running_sshd
from tmux import Terminal

ROOTS = Path(os.environ.get("MOSH_ROOTS") or os.devnull)
SUITES = sorted(path.name for path in ROOTS.iterdir() if (path / "usr/sbin/sshd").exists()) if ROOTS.is_dir() else []
LOGIN_SECONDS = 60.0

pytestmark = [pytest.mark.live, pytest.mark.skipif(not SUITES, reason="MOSH_ROOTS names no folder with Debian systems")]


@contextmanager
def system(root: Path, directory: Path) -> Iterator[tuple[Sshd, Path]]:
    """An sshd whose sessions live in the system below `root`, as its user; and the home folder that they have."""
    home = root / "home/guest"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / ".hushlogin").touch()
    os.chown(home, 1234, 1234)
    inside = (
        "cd /home/guest; exec env -i HOME=/home/guest USER=guest SHELL=/bin/bash PATH=/usr/bin:/bin LANG=C.UTF-8 "
        'MOSH_SERVER_NETWORK_TMOUT=60 SSH_CONNECTION="$SSH_CONNECTION" /bin/bash -c "$SSH_ORIGINAL_COMMAND"'
    )
    mounts = " && ".join(
        f"mount --{kind} /{name} {shlex.quote(str(root))}/{name}"
        for kind, name in (("rbind", "proc"), ("rbind", "dev"), ("bind", "sys"))
    )
    outside = (
        f"{mounts} && exec {require('chroot')} --userspec=1234:1234 --groups= {shlex.quote(str(root))} "
        f"/bin/bash -c {shlex.quote(inside)}"
    )
    login = f"exec {require('unshare')} -m /bin/sh -c {shlex.quote(outside)}"
    with running_sshd(directory, {"MOSH_TEST": "matrix"}, login=login) as sshd:
        yield sshd, home


def run_there(sshd: Sshd, home: Path, *words: str) -> tuple[int, str]:
    """Run a command in a session. Returns the exit status and what the terminal showed, as one line."""
    command: Sequence[str] = [*peers.ours_command(), "-v", f"--ssh={shlex.join(sshd.ssh)}", ALIAS, "--", *words]
    with Terminal(command, env=peers.session_env(home)) as terminal:
        return terminal.exit_status(LOGIN_SECONDS), "".join(terminal.screen())


@pytest.mark.parametrize("suite", SUITES)
def test_a_bare_debian_needs_one_login_to_have_everything(suite: str, tmp_path: Path, home: Path) -> None:
    with system(ROOTS / suite, tmp_path / "sshd") as (sshd, there):
        for needed in (True, False):
            status, shown = run_there(sshd, home, "sh", "-c", "cat /etc/debian_version >version; id -u >user")
            assert status == 0, shown
            assert ("bytes sent" in shown.replace("bytessent", "bytes sent")) == needed, shown
            assert (there / "user").read_text() == "1234\n"
            assert (there / "version").read_text() == (ROOTS / suite / "etc/debian_version").read_text()
            (there / "version").unlink()
        (entry,) = (there / ".cache/mosh.py").iterdir()
        assert (entry.stat().st_mode & 0o777, entry.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("suite", SUITES)
def test_a_debian_with_the_minimal_python_is_told_what_it_lacks(suite: str, tmp_path: Path, home: Path) -> None:
    """What python3-minimal has: all that the package of that name installs, and nothing else of the library."""
    root = ROOTS / suite
    lists = list((root / "var/lib/dpkg/info").glob("libpython3*-stdlib*.list"))
    assert lists
    files = [line for path in lists for line in path.read_text().splitlines() if (root / line[1:]).is_file()]
    aside = tmp_path / "aside"
    aside.mkdir()
    moved = {root / line[1:]: aside / str(number) for number, line in enumerate(files)}
    try:
        for path, place in moved.items():
            shutil.move(path, place)
        with system(root, tmp_path / "sshd") as (sshd, _there):
            status, shown = run_there(sshd, home, "true")
    finally:
        for path, place in moved.items():
            if place.exists():
                shutil.move(place, path)
    assert status == 71, shown
    assert "python3-minimal" in shown


@pytest.mark.parametrize("suite", SUITES)
def test_a_debian_without_python_is_told_what_it_lacks(suite: str, tmp_path: Path, home: Path) -> None:
    root = ROOTS / suite
    programs = [path for path in (root / "usr/bin").glob("python3*") if re.fullmatch(r"python3(\.\d+)?", path.name)]
    assert programs
    try:
        for path in programs:
            path.rename(path.with_name(path.name + "-aside"))
        with system(root, tmp_path / "sshd") as (sshd, _there):
            status, shown = run_there(sshd, home, "true")
    finally:
        for path in programs:
            path.with_name(path.name + "-aside").rename(path)
    assert status == 127, shown
    assert "neither a python3" in shown
