"""One file onto a bare host: Debian systems with nothing but python3 and sshd, each in a folder of its own.

A host either is logged in to, which brings the program there, or has the one file, as either end of a session with a
program of this machine. One host is of another architecture, which this machine emulates.
`make test-matrix` makes the folders (as root, on Debian) and names them in MOSH_ROOTS; without that all is skipped.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import build_zipapp
import peers
from conftest import require, require_kind
from sshd import ALIAS, Sshd, running_sshd
from tmux import Terminal

ROOTS = Path(os.environ.get("MOSH_ROOTS") or os.devnull)
SYSTEMS = sorted(path.name for path in ROOTS.iterdir() if path.is_dir()) if ROOTS.is_dir() else []
USER = 1234
HOME = Path("/home/guest")              # as the host itself names it
SECONDS = 60.0                          # for a login or a step of a session, on a host that may be emulated

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not SYSTEMS, reason="MOSH_ROOTS names no folder with Debian systems"),
    pytest.mark.parametrize("system", SYSTEMS),
]


@pytest.fixture
def root(system: str) -> Path:
    """The folder of a system. Skipped by name if its programs do not run, as another architecture's without qemu."""
    root = ROOTS / system
    probe = subprocess.run(
        [require("chroot"), root, "/bin/true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"{system} does not run on this machine: {probe.stderr.strip()}")
    return root


@pytest.fixture
def there(root: Path) -> Path:
    """The home folder of the system's user, empty, by its name on this machine."""
    home = root / HOME.relative_to("/")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / ".hushlogin").touch()
    os.chown(home, USER, USER)
    return home


def inside(root: Path) -> list[str]:
    """The words that run a program in the system below `root` as its user; those of the program follow."""
    mounts = " && ".join(
        f"mount --{kind} /{name} {shlex.quote(str(root))}/{name}"
        for kind, name in (("rbind", "proc"), ("rbind", "dev"), ("bind", "sys"))
    )
    enter = shlex.join([require("chroot"), f"--userspec={USER}:{USER}", "--groups=", str(root)])
    return [require("unshare"), "-m", "/bin/sh", "-c", f'{mounts} && exec {enter} "$@"', "inside"]


# -- logging in ------------------------------------------------------------------------------------------------


@contextmanager
def logins(root: Path, directory: Path) -> Iterator[Sshd]:
    """An sshd whose sessions live in the system below `root`, as its user."""
    environment = {
        "HOME": str(HOME), "USER": "guest", "SHELL": "/bin/bash", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8",
        "MOSH_SERVER_NETWORK_TMOUT": "60",
    }
    session = (
        f"cd {HOME}; exec env -i {shlex.join(f'{name}={value}' for name, value in environment.items())} "
        'SSH_CONNECTION="$SSH_CONNECTION" /bin/bash -c "$SSH_ORIGINAL_COMMAND"'
    )
    login = f"exec {shlex.join([*inside(root), '/bin/sh', '-c', session])}"      # bash would read a .bashrc of root's
    with running_sshd(directory, {"MOSH_TEST": "matrix"}, login=login) as sshd:
        yield sshd


def run_there(sshd: Sshd, home: Path, *words: str) -> tuple[int, str]:
    """Run a command in a session. Returns the exit status and what the terminal showed, as one line."""
    command: Sequence[str] = [*peers.ours_command(), "-v", f"--ssh={shlex.join(sshd.ssh)}", ALIAS, "--", *words]
    with Terminal(command, env=peers.session_env(home)) as terminal:
        return terminal.exit_status(SECONDS), "".join(terminal.screen())


def test_a_bare_debian_needs_one_login_to_have_everything(root: Path, there: Path, tmp_path: Path, home: Path) -> None:
    with logins(root, tmp_path / "sshd") as sshd:
        for needed in (True, False):
            status, shown = run_there(sshd, home, "sh", "-c", "cat /etc/debian_version >version; id -u >user")
            assert status == 0, shown
            assert ("bytes sent" in shown.replace("bytessent", "bytes sent")) == needed, shown
            assert (there / "user").read_text() == f"{USER}\n"
            assert (there / "version").read_text() == (root / "etc/debian_version").read_text()
            (there / "version").unlink()
        (entry,) = (there / ".cache/mosh.py").iterdir()
        assert (entry.stat().st_mode & 0o777, entry.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.usefixtures("there")
def test_a_debian_with_the_minimal_python_is_told_what_it_lacks(root: Path, tmp_path: Path, home: Path) -> None:
    """What python3-minimal has: all that the package of that name installs, and nothing else of the library."""
    lists = list((root / "var/lib/dpkg/info").glob("libpython3*-stdlib*.list"))
    assert lists
    files = [line for path in lists for line in path.read_text().splitlines() if (root / line[1:]).is_file()]
    aside = tmp_path / "aside"
    aside.mkdir()
    moved = {root / line[1:]: aside / str(number) for number, line in enumerate(files)}
    try:
        for path, place in moved.items():
            shutil.move(path, place)
        with logins(root, tmp_path / "sshd") as sshd:
            status, shown = run_there(sshd, home, "true")
    finally:
        for path, place in moved.items():
            if place.exists():
                shutil.move(place, path)
    assert status == 71, shown
    assert "python3-minimal" in shown


@pytest.mark.usefixtures("there")
def test_a_debian_without_python_is_told_what_it_lacks(root: Path, tmp_path: Path, home: Path) -> None:
    programs = [path for path in (root / "usr/bin").glob("python3*") if re.fullmatch(r"python3(\.\d+)?", path.name)]
    assert programs
    try:
        for path in programs:
            path.rename(path.with_name(path.name + "-aside"))
        with logins(root, tmp_path / "sshd") as sshd:
            status, shown = run_there(sshd, home, "true")
    finally:
        for path in programs:
            path.with_name(path.name + "-aside").rename(path)
    assert status == 127, shown
    assert "neither a python3" in shown


# -- the one file as either end --------------------------------------------------------------------------------

PAGE = (
    "\033[1;31mbold red\033[m \033[38;5;208morange\033[48;5;17m on navy\033[m \033[38;2;1;2;3mtrue color\033[m",
    "漢字かな한글|\N{GRINNING FACE}|e\N{COMBINING ACUTE ACCENT}|Привет|┌─┐½€|",
    "x" * 79 + "漢|\N{GRINNING FACE}\b\b\N{EURO SIGN}\bone column|",      # wrong widths would leave something there
    "\033[44m\033[K\033[60Cto here\033[m",
)
STEPS = {       # what is typed: how the screen ends then
    b"clear; cat page\r": "to here\n$",
    b"echo one twa\x7fo\x02\x02\x02\x02X": "\n$ echo oneX two",
    b"\r": "\noneX two\n$",
    b"seq 3000\r": "\n2999\n3000\n$",
    b"clear; stty size; echo $TERM\r": "24 80\nxterm-256color\n$",
}
Shown = list[tuple[tuple[str, ...], tuple[int, int]]]      # after each step the rows, with colours, and the cursor


class End(NamedTuple):
    """What runs at one end of a session, and where."""

    kind: peers.Kind
    inside: list[str]                   # the words that lead into the host
    home: Path                          # as this machine names it
    env: dict[str, str]


def end_here(kind: peers.Kind, home: Path) -> End:
    """A program of this machine."""
    return End(kind, [], home, peers.session_env(home))


def end_there(root: Path, there: Path, pyz: Path) -> End:
    """The one file in the bare system, under the names of stock's programs, as whatever starts those finds it."""
    for name in ("mosh-server", "mosh-client"):
        shutil.copy(pyz, there / name)
    env = peers.session_env(
        HOME, PATH=f"{HOME}:/usr/bin:/bin", SHELL="/bin/bash", MOSH_SERVER_NETWORK_TMOUT="60", PYTHONWARNINGS="error")
    return End("stock", inside(root), there, env)


def play(client: End, server: End) -> Shown:
    """Play a session to its end."""
    with ExitStack() as resources:
        (server.home / "page").write_text("".join(f"{line}\n" for line in PAGE), encoding="utf-8")
        process = resources.enter_context(peers.running_server(server.kind, server.env, prefix=server.inside))
        command = [*client.inside, *peers.client_command(client.kind, process.port)]
        terminal = resources.enter_context(Terminal(command, env={**client.env, "MOSH_KEY": process.key}))
        terminal.wait_for("$", SECONDS)
        shown = []
        for typed, end in STEPS.items():
            terminal.send_bytes(typed)
            settled = terminal.wait_settled(
                lambda screen, end=end: screen.text.rstrip("\n").endswith(end), SECONDS)  # type: ignore[misc]
            shown.append((settled.colored_rows, settled.cursor))
        terminal.send_bytes(b"exit\r")
        assert terminal.exit_status(SECONDS) == 0
        assert terminal.tty_restored(), "the client left the terminal in another mode"
        peers.wait_until(lambda: not process.alive(), SECONDS, "the server to end")
        return shown


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one file, with bytecode for the interpreters of this machine."""
    path = tmp_path_factory.mktemp("built") / "mosh.pyz"
    assert build_zipapp.main(["--source", str(peers.REPOSITORY), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """What stock shows with itself on this machine."""
    require("tmux")
    require_kind("stock")
    stock = end_here("stock", tmp_path_factory.mktemp("yardstick"))
    return play(stock, stock)


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("peer", ["ours", "stock"])
def test_the_one_file_on_a_bare_debian_shows_what_stock_shows(
    peer: peers.Kind, role: str, root: Path, there: Path, home: Path, pyz: Path, expected: Shown
) -> None:
    packages = "from importlib.util import find_spec; print(find_spec('cryptography'), find_spec('wcwidth'))"
    assert subprocess.check_output([*inside(root), "python3", "-c", packages]) == b"None None\n"
    near, far = end_here(peer, home), end_there(root, there, pyz)
    assert (play(far, near) if role == "client" else play(near, far)) == expected
