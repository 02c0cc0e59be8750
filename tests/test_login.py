"""Logging in through a real ssh: every wrapper with every server, exact arguments, finding a server, and failing.

The far host is this machine behind a private sshd, but with a home folder and a PATH of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import peers
from conftest import Stage, require, require_kind
from peers import PAIRS, Pair
from sshd import ALIAS, DEAD_ALIAS, Sshd, running_sshd
from tmux import Terminal

pytestmark = pytest.mark.live

KEY = "AAECAwQFBgcICQoLDA0ODw"
EXITING = "[mosh is exiting.]"
MARK = "MOSH_TEST_FAR_HOST"     # an environment variable that tells the far host's processes from all others
FAR_SHELL = ("env", "PS1=far ", *peers.SHELL_COMMAND)       # PS1 would not survive the login shell, a script to bash
FORGET_SECONDS = "60"           # a server of a failed test that cannot be found leaves by itself
LOGIN_SECONDS = 30.0
GIVE_UP_SECONDS = 60.0
# What a far host has besides any mosh: tools that a bootstrap script may use.
BASIC_TOOLS = (
    "sh", "bash", "env", "cat", "clear", "stty", "ls", "mkdir", "chmod", "mv", "rm", "uname", "id", "sleep", "tr",
    "head", "test", "printf", "dirname", "readlink", "locale",
)


# -- the far host ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FarHost:
    """A host to log in to: its folders, and the ssh that leads there."""

    home: Path
    programs: Path                  # first in its PATH
    sshd: Sshd

    def has_python(self) -> None:
        """Install python3, the interpreter that runs these tests with the packages it has."""
        self._install("python3", f'exec {shlex.quote(sys.executable)} "$@"')

    def has_stock_server(self) -> None:
        """Install stock mosh-server."""
        self._install("mosh-server", f'exec {shlex.quote(require("mosh-server"))} "$@"')

    def has_ours(self, path: Path) -> None:
        """Install our program, in its one-file form, under any name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(peers.ours_path(), path)
        path.chmod(0o755)

    def _install(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)


@contextmanager
def far_host(directory: Path, *, path: str = "") -> Iterator[FarHost]:
    """A host with nothing of mosh on it, unless `path` names more folders for its PATH."""
    home, programs, tools = (directory / name for name in ("far-home", "far-programs", "far-tools"))
    for folder in (home, programs, tools):
        folder.mkdir(parents=True)
    for tool in BASIC_TOOLS:
        found = shutil.which(tool)
        if found:
            (tools / tool).symlink_to(found)
    (home / ".hushlogin").touch()
    mark = uuid.uuid4().hex
    environment = {
        "HOME": str(home),
        "PATH": os.pathsep.join(filter(None, (str(programs), path, str(tools)))),
        "HISTFILE": os.devnull,
        "INPUTRC": os.devnull,
        "MOSH_SERVER_NETWORK_TMOUT": FORGET_SECONDS,
        MARK: mark,
    }
    try:
        with running_sshd(directory / "sshd", environment) as sshd:
            yield FarHost(home, programs, sshd)
    finally:
        _end_marked(mark)


def _end_marked(mark: str) -> None:
    """End, by process id, whatever the far host still runs. Where /proc is missing the servers time out."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = entry.read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            peers.end_process(int(entry.parent.name))


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarHost]:
    """A far host with the basic tools and no mosh."""
    for program in ("tmux", "sshd", "ssh", "ssh-keygen"):
        require(program)
    with far_host(tmp_path) as host:
        yield host


# -- logging in ------------------------------------------------------------------------------------------------


def ours_as_server() -> str:
    """Our server as the text of a --server option."""
    return shlex.join(["python3", str(peers.ours_path()), "server"])


def login_command(pair: Pair, host: FarHost, *command: str) -> list[str]:
    """The words of a login with one of the wrappers to one of the servers, both named outright."""
    server = "mosh-server" if pair.server == "stock" else ours_as_server()
    return wrapper_command(pair, host, f"--server={server}", ALIAS, *(["--", *command] if command else []))


def wrapper_command(pair: Pair, host: FarHost, *words: str) -> list[str]:
    """The words of one of the wrappers, which reaches the far host by its private ssh."""
    wrapper = [require("mosh"), "--client=mosh-client"] if pair.client == "stock" else peers.ours_command()
    return [*wrapper, f"--ssh={shlex.join(host.sshd.ssh)}", *words]


def local_terminal(command: Sequence[str], home: Path) -> Terminal:
    """A terminal of the near side, with a home folder that knows nothing."""
    return Terminal(command, env=peers.session_env(home))


def log_in_and_out(pair: Pair, home: Path) -> None:
    """Log in, do something, leave; both ends end and the terminal is as it was."""
    with far_host(home, path=os.environ["PATH"]) as host:
        host.has_python()
        with local_terminal(login_command(pair, host, *FAR_SHELL), home) as terminal:
            terminal.wait_for(lambda screen: "far" in screen.rows, LOGIN_SECONDS)
            terminal.type("clear; pwd; echo $TERM $LANG\n")
            terminal.wait_for(lambda screen: screen.rows[1:3] == ("xterm-256color C.UTF-8", "far"))
            assert host.home.name in terminal.screen()[0]
            terminal.type("exit\n")
            assert terminal.exit_status() == 0
            assert EXITING in terminal.snapshot().text
            assert terminal.tty_restored()
            assert "alternate_on" not in terminal.snapshot().modes


WORDS = (
    "plain", "two words", " leading and trailing ", "", "it's", '"double"', "$HOME", "${HOME}", "`id`", "$(id)",
    "back\\slash", "\\", "\\n", "*", "?", "[a-z]", "~", "!", "!!", "#", "a;b", "a&b", "a|b", "<in>", "(sub)",
    "{a,b}", "%s", "--", "-p", "=", "^", "tab\there", "née 漢字 \N{GRINNING FACE}",
)


def pass_difficult_words(pair: Pair, home: Path) -> list[str]:
    """Run a command with words that any shell on the way would love to change. Returns those that arrived."""
    note = 'import json, sys; json.dump(sys.argv[1:], open("words", "w")); input("noted ")'
    with far_host(home, path=os.environ["PATH"]) as host:
        host.has_python()
        with local_terminal(login_command(pair, host, "python3", "-c", note, *WORDS), home) as terminal:
            terminal.wait_for("noted", LOGIN_SECONDS)
            terminal.press("Enter")
            assert terminal.exit_status() == 0
        arrived: list[str] = json.loads((host.home / "words").read_text())
        return arrived


def ready_for(pair: Pair) -> None:
    """Make sure that everything a login needs is there."""
    for program in ("tmux", "sshd", "ssh", "ssh-keygen"):
        require(program)
    if pair.client == "stock":
        require("mosh")
    require_kind(pair.client, pair.server, "stock")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_wrapper_logs_in_to_every_server(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(log_in_and_out, pair)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_words_of_a_command_arrive_exactly(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    assert stage.play(pass_difficult_words, pair) == list(WORDS)


# -- finding a server ------------------------------------------------------------------------------------------

# Where our program lies on the far host, and what of the server's command line proves that it was found there.
PLACES = {
    "home folder": ("far-home/mosh.pyz", "mosh.pyz"),
    "~/.local/bin": ("far-home/.local/bin/mosh.pyz", ".local/bin/mosh.pyz"),
    "PATH": ("far-programs/mosh.pyz", "far-programs/mosh.pyz"),
}


def log_in_and_ask_who_serves(host: FarHost, home: Path) -> tuple[str, str]:
    """Log in with no --server. Returns the server's command line and what -v made the terminal show, as one line."""
    require("ps")
    command = wrapper_command(Pair("ours", "ours"), host, "-v", ALIAS, "--", *FAR_SHELL)
    with local_terminal(command, home) as terminal:
        terminal.wait_for(lambda screen: "far" in screen.rows, LOGIN_SECONDS)
        terminal.type("tr '\\0' ' ' </proc/$PPID/cmdline >server; exit\n")
        assert terminal.exit_status() == 0
        return (host.home / "server").read_text(encoding="utf-8"), "".join(terminal.screen())


@pytest.mark.parametrize("place", PLACES)
def test_our_server_is_found_where_it_may_lie(place: str, far: FarHost, home: Path, tmp_path: Path) -> None:
    require_kind("ours")
    where, proof = PLACES[place]
    far.has_python()
    far.has_stock_server()          # which is there, too, but comes last
    far.has_ours(tmp_path / where)
    served_by, shown = log_in_and_ask_who_serves(far, home)
    assert proof in served_by
    assert "mosh.pyz" in shown, "-v does not say which server was found"


def test_stock_server_is_found_where_ours_is_not(far: FarHost, home: Path) -> None:
    require_kind("ours", "stock")
    far.has_python()
    far.has_stock_server()
    served_by, shown = log_in_and_ask_who_serves(far, home)
    assert served_by.startswith(require("mosh-server"))
    assert "mosh-server" in shown, "-v does not say which server was found"


def test_stock_server_is_found_without_any_python(far: FarHost, home: Path) -> None:
    require_kind("ours", "stock")
    far.has_stock_server()
    served_by, _ = log_in_and_ask_who_serves(far, home)
    assert served_by.startswith(require("mosh-server"))


# -- failing ---------------------------------------------------------------------------------------------------


def fail_to_log_in(host: FarHost, home: Path, *words: str) -> tuple[int, str]:
    """Try to log in with our wrapper. Returns its exit status and all that the terminal shows, as one line."""
    with local_terminal(wrapper_command(Pair("ours", "ours"), host, *words), home) as terminal:
        status = terminal.exit_status(LOGIN_SECONDS)
        assert terminal.tty_restored()
        return status, "".join(terminal.screen())


def test_a_host_without_any_server_is_explained(far: FarHost, home: Path) -> None:
    require_kind("ours")
    status, shown = fail_to_log_in(far, home, ALIAS)
    assert status == 127
    assert "mosh-server" in shown and "python3" in shown.lower(), "what to install is not said"


def test_a_forced_server_that_does_not_exist_is_explained(far: FarHost, home: Path) -> None:
    require_kind("ours")
    status, shown = fail_to_log_in(far, home, "--server=no-such-server", ALIAS)
    assert status != 0
    assert "no-such-server" in shown and "mosh:" in shown


@pytest.mark.parametrize("host, complaint", [(DEAD_ALIAS, "refused"), ("no-such-host.invalid", "resolve")])
def test_what_ssh_complains_of_is_shown(host: str, complaint: str, far: FarHost, home: Path) -> None:
    require_kind("ours")
    status, shown = fail_to_log_in(far, home, host)
    assert status != 0
    assert complaint in shown, "ssh's own words are missing"
    assert "mosh:" in shown, "there is no line of ours"


# -- silence ---------------------------------------------------------------------------------------------------


def wait_for_nobody(command: Sequence[str], env: dict[str, str], port: int) -> None:
    """A client whose server never answers says so at once, gives up after 15 s and explains what to check."""
    with Terminal(command, env=env) as terminal:
        bar = terminal.wait_for(f"mosh: Nothing received from server on UDP port {port}. [To quit: Ctrl-^ .]")
        assert bar.colored_rows[0].startswith("<1;37;44>mosh: Nothing")
        terminal.wait_for("mosh: Timed out waiting for server...", GIVE_UP_SECONDS)
        assert terminal.exit_status(GIVE_UP_SECONDS) == 1
        assert terminal.tty_restored()
        shown = terminal.snapshot().text
    # The first line and the last are stock's own, which scripts may know; the advice between them is free.
    assert f"mosh did not make a successful connection to {peers.LOOPBACK}:{port}." in shown
    assert f"UDP port {port}" in shown and "firewall" in shown
    assert EXITING in shown


def wait_with_client_alone(pair: Pair, home: Path) -> None:
    """The client by itself, pointed at a port where nobody answers."""
    with silent_port() as port:
        env = peers.session_env(home, MOSH_KEY=KEY)
        wait_for_nobody(peers.client_command(pair.client, port), env, port)


def wait_after_login(pair: Pair, home: Path) -> None:
    """A login that works over ssh, but whose server is behind a firewall that lets no UDP through."""
    with silent_port() as port, far_host(home) as host:
        # The hash sign turns the options that the wrapper appends into a comment.
        server = f"echo; echo MOSH CONNECT {port} {KEY} #"
        command = wrapper_command(pair, host, f"--server={server}", ALIAS)
        wait_for_nobody(command, peers.session_env(home), port)


@contextmanager
def silent_port() -> Iterator[int]:
    """A UDP port of loopback that is open but never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((peers.LOOPBACK, 0))
        yield int(sock.getsockname()[1])


def wait_in_every_way(pair: Pair, home: Path) -> None:
    """Both kinds of silence, at the same time since each takes almost 20 seconds."""
    with ThreadPoolExecutor() as pool:
        for waiting in [pool.submit(story, pair, home) for story in (wait_with_client_alone, wait_after_login)]:
            waiting.result()


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS[:2], ids=str)
def test_a_server_that_never_answers_is_explained(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(wait_in_every_way, pair)
