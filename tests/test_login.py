"""Logging in through a real ssh: every wrapper with every server, exact arguments, finding a server, and failing.

The far host is this machine behind a private sshd, but with a home folder and a PATH of its own.
"""

from __future__ import annotations

import json
import marshal
import os
import re
import shlex
import shutil
import site
import socket
import subprocess
import sys
import uuid
import venv
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

import mosh
import peers
from conftest import Stage, require, require_kind
from peers import PAIRS, Pair
from sshd import ALIAS, DEAD_ALIAS, LOGIN, Sshd, running_sshd
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
        python = Path(sys.executable)
        if str(python.resolve()) in system_pythons():           # which this host may hide, with all links to it
            folder = self.programs.parent / "far-python"
            venv.create(folder, symlinks=False)
            python = folder / "bin/python3"
            packages = next(folder.glob("lib/python*/site-packages"))
            (packages / "tests.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
        self.install("python3", f'exec {shlex.quote(str(python))} "$@"')

    def has_stock_server(self) -> None:
        """Install stock mosh-server."""
        self.install("mosh-server", f'exec {shlex.quote(require("mosh-server"))} "$@"')

    def has_ours(self, path: Path) -> None:
        """Install our program, in its one-file form, under any name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(peers.ours_path(), path)
        path.chmod(0o755)

    def install(self, name: str, script: str) -> None:
        """Install a program that is a shell script."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)


# Where the login looks for a Python besides PATH. A host that is to have none hides those of this machine.
SYSTEM_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3", "/opt/homebrew/bin/python3")


def system_pythons() -> list[str]:
    """The files that these are on this machine."""
    return sorted({str(Path(python).resolve()) for python in SYSTEM_PYTHONS if Path(python).exists()})


@contextmanager
def far_host(
    directory: Path, *, path: str = "", login: str = LOGIN, extra_config: str = "", **environment: str
) -> Iterator[FarHost]:
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
    session = {
        "HOME": str(home),
        "PATH": os.pathsep.join(filter(None, (str(programs), path, str(tools)))),
        "HISTFILE": os.devnull,
        "INPUTRC": os.devnull,
        "MOSH_SERVER_NETWORK_TMOUT": FORGET_SECONDS,
        MARK: mark,
        **environment,
    }
    try:
        with running_sshd(directory / "sshd", session, login=login, extra_config=extra_config) as sshd:
            yield FarHost(home, programs, sshd)
    finally:
        _end_marked(mark)


def with_mounts(*commands: str) -> str:
    """Shell text for a login that sees the file systems as these commands change them; nobody else does."""
    unshare = shlex.quote(require("unshare"))
    if subprocess.run([require("unshare"), "-m", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("this user may not change what is mounted")
    path = shlex.quote(os.environ.get("PATH", os.defpath))
    script = f"( PATH={path}; " + " && ".join(("true", *commands)) + f" ) || exit 99; {LOGIN}"
    return f"exec {unshare} -m -- /bin/sh -c {shlex.quote(script)}"


def without_system_python() -> str:
    """Shell text for a login to a host that has no Python outside its PATH."""
    there = system_pythons()
    return with_mounts(*(f"mount --bind /dev/null {shlex.quote(python)}" for python in there)) if there else LOGIN


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
    """A far host with the basic tools, and neither mosh nor Python."""
    ready_for(Pair("ours", "ours"))
    with far_host(tmp_path, login=without_system_python()) as host:
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
            terminal.type("clear; echo ${PWD##*/}; echo $TERM $LANG\n")
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
    require_kind(pair.client, pair.server)
    if pair.client == "stock":
        require("mosh")


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_wrapper_logs_in_to_every_server(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    require_kind("stock")     # the yardstick plays along
    stage.play(log_in_and_out, pair)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_words_of_a_command_arrive_exactly(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    require_kind("stock")
    assert stage.play(pass_difficult_words, pair) == list(WORDS)


# -- finding a server ------------------------------------------------------------------------------------------

# Where our program lies on the far host, and what of the server's command line proves that it was found there.
PLACES = {
    "home folder": ("far-home/mosh.pyz", "mosh.pyz"),
    "~/.local/bin": ("far-home/.local/bin/mosh.pyz", ".local/bin/mosh.pyz"),
    "PATH": ("far-programs/mosh.pyz", "far-programs/mosh.pyz"),
}


def log_in_and_ask_who_serves(host: FarHost, home: Path, *options: str) -> tuple[str, str]:
    """Log in with no --server. Returns the server's command line and what -v made the terminal show, as one line."""
    command = wrapper_command(Pair("ours", "ours"), host, "-v", *options, ALIAS, "--", *FAR_SHELL)
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
    served_by, shown = log_in_and_ask_who_serves(far, home, "--no-push")
    assert proof in served_by
    assert "mosh.pyz" in shown, "-v does not say which server was found"


def test_stock_server_is_found_where_ours_is_not(far: FarHost, home: Path) -> None:
    require_kind("ours", "stock")
    far.has_python()
    far.has_stock_server()
    served_by, shown = log_in_and_ask_who_serves(far, home, "--no-push")
    assert served_by.startswith(require("mosh-server"))
    assert "mosh-server" in shown, "-v does not say which server was found"


def test_stock_server_is_found_without_any_python(far: FarHost, home: Path) -> None:
    require_kind("ours", "stock")
    far.has_stock_server()
    served_by, _ = log_in_and_ask_who_serves(far, home)
    assert served_by.startswith(require("mosh-server"))


# -- bringing our own ------------------------------------------------------------------------------------------

LOGIN_LIMIT_MS = 20_000


def start_server(far: FarHost, *words: str, **changes: object) -> mosh.Announcement:
    """Log in without a client, so that the server ends by itself. Returns what the host said. Raises BootstrapError."""
    options = mosh.LoginOptions()
    options.host, options.ssh, options.silence_limit_ms = ALIAS, far.sshd.ssh, LOGIN_LIMIT_MS
    options.command = list(words)
    for name, value in changes.items():
        assert hasattr(options, name)
        setattr(options, name, value)
    login = mosh.Login(options, 256)
    try:
        login.start()
        key, port, candidates = login.finish()
    finally:
        login.close()
    assert len(key) == 22 and port and candidates
    return login.announcement


def entries(host: FarHost) -> list[Path]:
    """What the private cache of the far host holds."""
    return sorted((host.home / ".cache" / "mosh.py").iterdir())


def program_of(entry: bytes) -> CodeType:
    """The program in an entry; two may be written differently, since marshal counts references."""
    assert entry[8:16] == zlib.crc32(entry[16:]).to_bytes(4, "little") + len(entry[16:]).to_bytes(4, "little")
    program = marshal.loads(entry[16:])
    assert isinstance(program, CodeType)
    return program


def test_one_file_here_and_a_python_there_make_a_session(far: FarHost, home: Path) -> None:
    far.has_python()
    served_by, shown = log_in_and_ask_who_serves(far, home)
    (entry,) = entries(far)
    assert f"-IS {entry} server" in served_by
    assert re.search(r"started \S+/mosh-[\w-]+\.pyc\s?\(Python\s?[0-9.]+\),\s?[0-9]{5,6} bytes\s?sent", shown), shown
    assert (entry.parent.stat().st_mode & 0o777, entry.stat().st_mode & 0o777) == (0o700, 0o600)
    served_by, shown = log_in_and_ask_who_serves(far, home)
    assert str(entry) in served_by and "bytes" not in shown, "the second login sent something"
    assert entries(far) == [entry]


def test_a_mask_and_the_environment_reach_the_session_untouched(far: FarHost, home: Path) -> None:
    far.has_python()
    (far.home / ".bashrc").write_text("umask 027\nexport ODD='a  b'\n", encoding="utf-8")
    note = "umask >mask; env >environment"
    for _ in range(2):
        command = wrapper_command(Pair("ours", "ours"), far, ALIAS, "--", "sh", "-c", note)
        with local_terminal(command, home) as terminal:
            assert terminal.exit_status(LOGIN_SECONDS) == 0
        lines = (far.home / "environment").read_text(encoding="utf-8").splitlines()
        assert (far.home / "mask").read_text(encoding="utf-8").strip().endswith("027")
        assert "ODD=a  b" in lines and not any(line.startswith("MOSH_TOKEN") for line in lines)


def test_a_mask_that_denies_everything_spoils_no_folder(far: FarHost) -> None:
    far.has_python()
    (far.home / ".bashrc").write_text("umask 777\n", encoding="utf-8")
    start_server(far, "true")
    cache = far.home / ".cache"
    modes = {path.stat().st_mode & 0o777 for path in (cache, cache / "mosh.py")}
    assert modes == {0o700} and [entry.stat().st_mode & 0o777 for entry in entries(far)] == [0o600]


def test_a_stock_server_serves_where_no_python_does(far: FarHost, home: Path) -> None:
    require_kind("stock")
    far.has_stock_server()
    served_by, _ = log_in_and_ask_who_serves(far, home)
    assert served_by.startswith(require("mosh-server"))


@pytest.mark.parametrize("option", ["--no-push", "--server=mosh-server"])
def test_bringing_our_own_can_be_forbidden(option: str, far: FarHost, home: Path) -> None:
    require_kind("stock")
    far.has_python()
    far.has_stock_server()
    served_by, _ = log_in_and_ask_who_serves(far, home, option)
    assert served_by.startswith(require("mosh-server"))
    assert not (far.home / ".cache").exists()


def test_many_first_logins_at_once_leave_one_entry(far: FarHost) -> None:
    far.has_python()
    with ThreadPoolExecutor() as pool:
        logins = [pool.submit(start_server, far, *FAR_SHELL) for _ in range(6)]
        assert all(login.result().complete for login in logins)
    assert len(entries(far)) == 1
    assert "NEED" not in start_server(far).said


def spoil_with_a_link(cache: Path) -> None:
    (cache.parent / "elsewhere").mkdir(mode=0o700)
    cache.symlink_to("elsewhere")


def spoil_with_a_mode(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def spoil_the_parent(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    cache.parent.chmod(0o777)


def spoil_with_a_file(cache: Path) -> None:
    cache.touch()


@pytest.mark.parametrize("spoil", [spoil_with_a_link, spoil_with_a_mode, spoil_the_parent, spoil_with_a_file])
def test_a_place_that_is_not_private_is_not_used(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    ready_for(Pair("ours", "ours"))
    other = tmp_path / "other"
    other.mkdir()
    with far_host(tmp_path, TMPDIR=str(other)) as host:
        host.has_python()
        cache = host.home / ".cache" / "mosh.py"
        cache.parent.mkdir()
        spoil(cache)
        for needed in (True, False):
            said = start_server(host).said
            assert ("NEED" in said) == needed
            assert said["SERVER"][1].startswith(f"{other}/mosh.py-{os.geteuid()}/mosh-")
        assert not list(cache.parent.glob("*/*.pyc"))


def test_an_entry_that_is_damaged_or_not_a_plain_file_is_replaced(far: FarHost) -> None:
    far.has_python()
    start_server(far)
    (entry,) = entries(far)
    whole = entry.read_bytes()
    program = program_of(whole)
    for damaged in (b"", whole[:-1], whole[:5000] + b"!" + whole[5001:]):
        entry.write_bytes(damaged)
        assert "NEED" in start_server(far).said
        assert program_of(entry.read_bytes()) == program
    entry.rename(far.home / "moved")
    entry.symlink_to(far.home / "moved")
    assert "NEED" in start_server(far).said
    assert not entry.is_symlink() and program_of(entry.read_bytes()) == program


def test_old_entries_go(far: FarHost) -> None:
    far.has_python()
    cache = far.home / ".cache" / "mosh.py"
    cache.mkdir(mode=0o700, parents=True)
    names = [f"mosh-{number:032}-a70d.pyc" for number in range(12)]
    for age, name in enumerate([*names, ".mosh-draft.pyc.0123"]):
        (cache / name).touch()
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    (cache / "notes").touch()
    start_server(far)
    left = {path.name for path in entries(far)}
    assert {*names[:7], "notes"} < left and len(left) == 9


FULL_DISK = "ulimit -f 0\n"     # every write to a file fails


def test_a_full_disk_is_no_obstacle(far: FarHost) -> None:
    far.has_python()
    (far.home / ".bashrc").write_text(FULL_DISK, encoding="utf-8")
    for _ in range(2):
        announcement = start_server(far)
        assert announcement.complete and "kept nowhere" in announcement.said["SERVER"][1]
    assert not any(path.is_file() for path in (far.home / ".cache").rglob("*"))


def test_file_systems_that_forbid_programs_are_no_obstacle(tmp_path: Path) -> None:
    ready_for(Pair("ours", "ours"))
    home = shlex.quote(str(tmp_path / "far-home"))
    login = with_mounts(f"mount --bind {home} {home}", f"mount -o remount,bind,noexec {home}")
    with far_host(tmp_path, login=login) as host:
        host.has_python()
        assert [("NEED" in start_server(host).said) for _ in range(2)] == [True, False]


# -- every login shell -----------------------------------------------------------------------------------------

SHELLS = ("bash", "dash", "zsh", "fish", "tcsh", "csh", "ksh", "mksh")
# What a start-up file may print: controls, half a line, and lines that look like ours.
NOISE = (
    b"\x1b]0;title\x07\x1b[31mWelcome\x1b[0m\r\n\x1b[?1049h\x1bP1$tx\n"
    b"MOSH CONNECT 60001 AAAAAAAAAAAAAAAAAAAAAA\nMOSH IP 10.6.6.6\nMOSH SSH_CONNECTION 10.6.6.6 1 10.6.6.6 2\n"
    b"mosh-0123456789abcdef0123456789abcdef NOSERVER\nMOSH NOSERVER\n\xff\xfe\n"
    + b"a long line " * 9_000 + b"\nhalf a line"
)
# Which file a shell reads for a command, and how it reads a line there.
START_FILES = {
    "bash": (".bashrc", "read x"), "zsh": (".zshenv", "read x"), "fish": (".config/fish/config.fish", "read x"),
    "tcsh": (".tcshrc", "set x = $<"), "csh": (".cshrc", "set x = $<"),
}  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
def test_any_login_shell_however_chatty(shell: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ready_for(Pair("ours", "ours"))
    with far_host(tmp_path, SHELL=require(shell)) as host:
        host.has_python()
        if shell in START_FILES:
            name, read_a_line = START_FILES[shell]
            (host.home / "noise").write_bytes(NOISE)
            (host.home / name).parent.mkdir(parents=True, exist_ok=True)
            (host.home / name).write_text(f"cat ~/noise\n{read_a_line}\n", encoding="utf-8")
        for needed in (True, False):
            announcement = start_server(host, "two words", "$HOME", "it's")
            assert ("NEED" in announcement.said) == needed
            assert announcement.port != 0 and announcement.key != "A" * 22 and announcement.address == "127.0.0.1"
    shown = capfd.readouterr().err
    assert ("Welcome" in shown and "half a line" in shown) == (shell in START_FILES)
    assert "\x1b" not in shown and "A" * 22 not in shown


def test_a_start_up_file_that_eats_all_input_ends_in_one_line(far: FarHost) -> None:
    far.has_python()
    (far.home / ".bashrc").write_text("cat >/dev/null\n", encoding="utf-8")
    with pytest.raises(mosh.BootstrapError, match="has said nothing for 1 s") as error:
        start_server(far, silence_limit_ms=1_000)
    assert error.value.status == mosh.SILENT_HOST
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "status", "named"), [
    ("exit 3", mosh.OTHER_COMMAND, "a start-up file that ends"),
    ("exec true", mosh.OTHER_COMMAND, "replaces the login shell"),
    ("exec <&-", mosh.BAD_CHECKSUM, "or close what is meant for mosh"),
])  # fmt: skip
def test_a_start_up_file_that_leaves_nothing_to_us_is_explained(
    text: str, status: int, named: str, far: FarHost, capfd: pytest.CaptureFixture[str]
) -> None:
    far.has_python()
    far.install("true", "exit 0")
    (far.home / ".bashrc").write_text(f"{text}\n", encoding="utf-8")
    expect_failure(far, status, named)
    assert capfd.readouterr().err == ""


# -- ssh's own configuration -----------------------------------------------------------------------------------


def add_to_config(host: FarHost, text: str) -> None:
    host.sshd.config.write_text(text + host.sshd.config.read_text(encoding="utf-8"), encoding="utf-8")


def test_an_alias_a_match_and_a_request_for_a_terminal(far: FarHost) -> None:
    far.has_python()
    add_to_config(far, f"Match originalhost nick exec true\n    HostName 127.0.0.1\n    Port {far.sshd.port}\n"
                       f"    HostKeyAlias [127.0.0.1]:{far.sshd.port}\n    RequestTTY force\n    LogLevel ERROR\n"
                       f"Host nick\n    IdentityFile {far.sshd.config.parent}/client_key\n"
                       f"    UserKnownHostsFile {far.sshd.config.parent}/known_hosts\n")  # fmt: skip
    assert start_server(far, host="nick").address == "127.0.0.1"


def test_a_remote_command_of_the_configuration_is_told(far: FarHost) -> None:
    far.has_python()
    add_to_config(far, "RemoteCommand tmux new -A -s main\n")
    expect_failure(far, 255, "RemoteCommand=none")
    assert start_server(far, ssh=[*far.sshd.ssh, "-o", "RemoteCommand=none"]).complete


def test_a_port_in_the_ssh_option(far: FarHost) -> None:
    far.has_python()
    config = far.sshd.config
    config.write_text(re.sub(r"(?m)^    Port \d+\n", "", config.read_text(encoding="utf-8")), encoding="utf-8")
    assert start_server(far, ssh=[*far.sshd.ssh, "-p", str(far.sshd.port)]).complete


def test_a_connection_that_is_shared(far: FarHost) -> None:
    path = far.sshd.config.parent / "control"
    add_to_config(far, f"ControlMaster auto\nControlPath {path}\nControlPersist 60\n")
    try:
        expect_failure(far, 127, "neither a python3")   # at once, though the shared connection stays open
        far.has_python()
        for needed in (True, False, False):
            assert ("NEED" in start_server(far).said) == needed
        assert path.is_socket()
        logins = far.sshd.log.read_text(encoding="utf-8").count("Accepted publickey")
        assert logins in (0, 1)     # 0 where sshd does not log it
    finally:
        subprocess.run([*far.sshd.ssh, "-O", "exit", ALIAS], stderr=subprocess.DEVNULL, check=False)


def test_a_host_behind_a_jump_host(far: FarHost, tmp_path: Path) -> None:
    far.has_python()
    with far_host(tmp_path / "jump") as jump:
        keys = jump.sshd.config.parent
        known = far.sshd.config.parent / "known_hosts"
        known.write_text(known.read_text() + (keys / "known_hosts").read_text(), encoding="ascii")
        add_to_config(far, f"Host jump\n    HostName 127.0.0.1\n    Port {jump.sshd.port}\n    LogLevel ERROR\n"
                           f"    IdentityFile {keys}/client_key\n    UserKnownHostsFile {known}\n"
                           f"Host {ALIAS}\n    ProxyJump jump\n")  # fmt: skip
        for needed in (True, False):
            announcement = start_server(far)
            assert ("NEED" in announcement.said) == needed and announcement.address == "127.0.0.1"


def test_a_passphrase_is_asked_for_on_the_terminal(far: FarHost, home: Path) -> None:
    """ssh's stdin is ours, so what it asks, it asks on the terminal; a password is asked for the same way."""
    far.has_python()
    key = far.sshd.config.parent / "client_key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True, timeout=20)
    config = far.sshd.config.read_text(encoding="utf-8")
    far.sshd.config.write_text(config.replace("BatchMode yes", "BatchMode no"), encoding="utf-8")
    for _ in range(2):
        with local_terminal(wrapper_command(Pair("ours", "ours"), far, ALIAS, "--", *FAR_SHELL), home) as terminal:
            terminal.wait_for("Enter passphrase for key", LOGIN_SECONDS)
            terminal.type("secret\n")
            terminal.wait_for(lambda screen: "far" in screen.rows, LOGIN_SECONDS)
            terminal.type("exit\n")
            assert terminal.exit_status() == 0
            assert "secret" not in terminal.snapshot().text


def test_a_login_with_a_terminal(far: FarHost) -> None:
    far.has_python()
    for needed in (True, False):
        assert ("NEED" in start_server(far, ssh_pty=True).said) == needed


def test_a_login_with_a_terminal_sends_what_looks_like_an_escape_of_ssh(
    far: FarHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a terminal ssh obeys a tilde after a line's end; compressed, the program has such bytes by chance."""
    far.has_python()
    source = Path(mosh.__file__).read_bytes()
    program = mosh.Program(source, b'"""\n~.\n~C\n~#\n"""\n')
    monkeypatch.setattr(mosh.Program, "own", lambda: program)
    monkeypatch.setattr(mosh.Program, "packed", lambda program: zlib.compress(program._content, 0))
    assert "NEED" in start_server(far, ssh_pty=True).said


# -- failing ---------------------------------------------------------------------------------------------------


def fail_to_log_in(host: FarHost, home: Path, *words: str) -> tuple[int, str]:
    """Try to log in with our wrapper. Returns its exit status and all that the terminal shows, as one line."""
    with local_terminal(wrapper_command(Pair("ours", "ours"), host, *words), home) as terminal:
        status = terminal.exit_status(LOGIN_SECONDS)
        assert terminal.tty_restored()
        return status, "".join(terminal.screen())


def expect_failure(far: FarHost, status: int, *texts: str, **changes: object) -> None:
    """A login fails with this status and one line that holds these texts."""
    with pytest.raises(mosh.BootstrapError) as error:
        start_server(far, **changes)
    assert error.value.status == status, error.value
    assert all(text in str(error.value) for text in texts), error.value
    assert "\n" not in str(error.value)


def test_a_host_without_any_server_is_explained(far: FarHost, home: Path) -> None:
    status, shown = fail_to_log_in(far, home, ALIAS)
    assert status == 127
    assert "mosh-server" in shown and "python3" in shown.lower(), "what to install is not said"


def test_a_search_without_success_is_explained(far: FarHost, home: Path) -> None:
    status, shown = fail_to_log_in(far, home, "--no-push", ALIAS)
    assert status == 127
    assert "mosh-server" in shown and "--no-push" in shown


def old_python() -> Path:
    """A Python that is too old, of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    for version in ("3.6", "3.7", "3.8"):
        for path in pyenv.glob(f"versions/{version}.*/bin/python3"):
            return path
    pytest.skip("there is no Python older than 3.9 here")


def test_an_old_python_is_explained_with_its_version(far: FarHost) -> None:
    old = old_python()
    far.install("python3", f'exec {old} "$@"')
    expect_failure(far, mosh.OLD_PYTHON, "needs 3.9", "Python of far-host is 3.")
    far.has_stock_server()
    require_kind("stock")
    assert start_server(far).said["SERVER"][1].endswith("mosh-server")


def minimal_python(directory: Path) -> Path:
    """A copy of this interpreter without what Debian's python3-minimal leaves out."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library, program = Path(os.__file__).parent, directory / "bin" / version
    copy = directory / "lib" / version
    copy.mkdir(parents=True)
    for path in library.iterdir():
        if path.name not in ("ctypes", "pty.py", "tty.py", "shutil.py", "shlex.py"):
            (copy / path.name).symlink_to(path)
    program.parent.mkdir()
    shutil.copy(Path(sys.base_prefix, "bin", version).resolve(), program)
    return program


def test_a_minimal_python_is_explained(far: FarHost, tmp_path: Path) -> None:
    python = minimal_python(tmp_path / "minimal")
    if subprocess.run([python, "-ISc", "import os"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this Python cannot be copied")
    far.install("python3", f'exec {python} "$@"')
    expect_failure(far, mosh.PARTIAL_PYTHON, "python3-minimal", "install the package python3")


FIPS = """\
openssl_conf = start
[start]
alg_section = algorithms
providers = list
[algorithms]
default_properties = fips=yes
[list]
default = default
[default]
activate = 1
"""


def test_a_host_without_ocb_is_explained(tmp_path: Path) -> None:
    """As in FIPS mode: OpenSSL is there, and so is Python, but not this cipher."""
    ready_for(Pair("ours", "ours"))
    config = tmp_path / "openssl.cnf"
    config.write_text(FIPS, encoding="utf-8")
    with far_host(tmp_path, login=without_system_python(), OPENSSL_CONF=str(config), MOSH_CRYPTO="libcrypto") as host:
        host.has_python()
        expect_failure(host, mosh.NO_CIPHER, "no AES-OCB", "mosh-server")


def test_a_program_that_arrives_damaged_is_not_run(far: FarHost, monkeypatch: pytest.MonkeyPatch) -> None:
    far.has_python()
    for packed in (zlib.compress(b"16\nprint('hello!')\n"), b"no zlib", b""):
        monkeypatch.setattr(mosh.Program, "packed", lambda _program, packed=packed: packed)
        expect_failure(far, mosh.BAD_CHECKSUM, "arrived damaged", "nothing was started")
    assert not (far.home / ".cache").exists()


def test_a_forced_command_is_explained(tmp_path: Path) -> None:
    with far_host(tmp_path, login="echo backups only") as host:
        expect_failure(host, mosh.OTHER_COMMAND, "forced command")


@pytest.mark.parametrize(("login", "status"), [
    ('exec /bin/bash -r -c "$SSH_ORIGINAL_COMMAND"', mosh.RESTRICTED_SHELL),
    ("exec /usr/sbin/nologin", mosh.OTHER_COMMAND),
])  # fmt: skip
def test_a_restricted_shell_is_explained(login: str, status: int, tmp_path: Path) -> None:
    require(login.split()[1])
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with far_host(tmp_path, login=f"PATH={nothing}; {login}") as host:
        expect_failure(host, status, "login shell")


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
    require_kind("stock")     # the yardstick plays along
    stage.play(wait_in_every_way, pair)
