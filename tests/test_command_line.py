"""Section 20: the command line. A mistake is named in one line; every spelling that stock mosh takes is taken."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import mosh
import peers
from peers import end_process, ours_command, process_alive, session_env
from ptys import on_a_terminal

KEY = "AAECAwQFBgcICQoLDA0ODw"
NOT_CANONICAL = KEY[:-1] + "x"      # the last letter has bits that no key has
HINT = "Try 'mosh.pyz --help'."
LIMIT_SECONDS = 20.0

Finished = subprocess.CompletedProcess[str]
Run = Callable[..., Finished]


@pytest.fixture
def run(home: Path) -> Run:
    """Run the program without a terminal; `environ` adds variables, None removes one."""

    def run_program(*words: str, program: Sequence[str] = (), **environ: str | None) -> Finished:
        wanted = {**session_env(home), "TERM": "xterm-256color", **environ}
        return subprocess.run(
            [*(program or ours_command()), *words], env={k: v for k, v in wanted.items() if v is not None},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=LIMIT_SECONDS,
        )

    return run_program


@pytest.mark.parametrize("option", ["--version", "-V", "-vers"])
def test_version_says_what_it_is_and_whom_it_talks_to(run: Run, option: str) -> None:
    finished = run(option)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert mosh.__version__ in finished.stdout and "1.4.0" in finished.stdout


@pytest.mark.parametrize("words", [["--version", "-v"], ["-v", "-version"], ["server", "-v", "--version"]])
def test_verbose_version_says_all_that_a_report_needs(run: Run, words: list[str]) -> None:
    finished = run(*words)
    assert (finished.returncode, finished.stderr) == (0, "")
    first, *lines = finished.stdout.splitlines()
    told = dict(line.split(":", 1) for line in lines)
    own = mosh.Program.own()
    assert own is not None and mosh.__version__ in first
    assert told["build"].strip() == own.digest
    assert told["Python"].split(",")[0].strip() == sys.version.split()[0]
    assert told["crypto"].strip() in ("cryptography", "libcrypto")
    assert "Unicode" in told["widths"]


# -- the wrapper: mistakes -------------------------------------------------------------------------------------

MISTAKES = [
    ("", "no host given"),
    ("-v", "no host given"),
    ("--bogus host", "--bogus"),
    ("--bogus=3 host", "--bogus=3"),
    ("-z host", "-z"),
    ("-5 host", "-5"),
    ("host ls -l", "-l"),
    ("host ls -l", "after --"),
    ("-l you host", "into --ssh"),
    ("-i key host", "into --ssh"),
    ("host ls --color", "--color"),
    ("-- -oProxyCommand=x", "-oProxyCommand=x"),
    ("--port", "--port"),
    ("host --port", "--port"),
    ("-p", "--port"),
    ("-p x host", "(x)"),
    ("-p 1x host", "(1x)"),
    ("-p -1 host", "--port"),
    ("-p +1 host", "(+1)"),
    ("-p 1: host", "(1:)"),
    ("-p :1 host", "(:1)"),
    ("-p 1:2:3 host", "(1:2:3)"),
    ("-p 1,2 host", "(1,2)"),
    ("-p ١ host", "(١)"),
    ("-p 65536 host", "(65536)"),
    ("-p 99999999999999999999 host", "99999999999999999999"),
    ("-p 65536:65537 host", "(65536)"),
    ("-p 1:65536 host", "(65536)"),
    ("-p 1:0 host", "(0)"),
    ("-p 0:5 host", "(0:5)"),
    ("-p 60010:60001 host", "(60010:60001)"),
    ("--ssh host", "no host given"),
    ("--predict host", '"host"'),
    ("--family host", "host for --family"),
    ("-p host", "(host)"),
    ("-po host", "(host)"),
    ("--predict= host", '""'),
    ("--predict=-- host", "--predict"),
    ("--port=-- host", "--port"),
    ("--family=-- host", "--family"),
    ("--ssh=-- host", "--ssh"),
    ("--predict=maybe host", '"maybe"'),
    ("--pred=never host", "--pred"),
    ("--no-ssh-pty=3 host", "--no-ssh-pty"),
    ("--local=yes host", "--local"),
    ("--family=inet5 host", "inet5"),
    ("--experimental-remote-ip=guess host", "guess"),
    ("--bind-server=name.example host", "name.example"),
    ("--bind-server= host", "--bind-server"),
    ("--bind-server=1.2.3.999 host", "1.2.3.999"),
    ("you@", "not you@"),
    ("@host", "not @host"),
    ("--host=you@", "not you@"),
    ("--ssh='a host", "--ssh"),
    ("--fake-proxy", "--fake-proxy"),
    ("--fake-proxy -- host", "--fake-proxy"),
    ("--fake-proxy -- host ssh", "ssh"),
]
NO_TERMINAL = "mosh: standard input is not a terminal; mosh needs one to run in\n"


def _assert_one_line(finished: Finished, *, naming: str) -> None:
    first, second, *rest = finished.stderr.split("\n")
    assert first.startswith("mosh: ") and naming in first
    assert (second, rest) == (HINT, [""])
    assert (finished.returncode, finished.stdout) == (2, "")


@pytest.mark.parametrize(("words", "named"), MISTAKES)
def test_a_mistake_is_named_in_one_line(run: Run, words: str, named: str) -> None:
    _assert_one_line(run(*words.split()), naming=named)


@pytest.mark.parametrize("word", ["maybe", "", "Always ", "adaptive,never"])
def test_a_bad_prediction_mode_of_the_environment_is_said_to_come_from_there(run: Run, word: str) -> None:
    finished = run("host", MOSH_PREDICTION_DISPLAY=word)
    _assert_one_line(finished, naming=f'"{word}" (MOSH_PREDICTION_DISPLAY in environment)')


def test_the_command_line_outranks_the_environment(run: Run) -> None:
    assert run("--predict=never", "host", MOSH_PREDICTION_DISPLAY="maybe").stderr == NO_TERMINAL


def test_without_a_terminal_it_says_so_before_any_login(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "ssh-was-run"
    finished = run(f"--ssh=touch {trace}", "host")
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", NO_TERMINAL)
    assert not trace.exists()
    assert run("host", TERM=None).stderr == finished.stderr, "a job of cron is told to set TERM, which will not help"


@pytest.mark.parametrize(("term", "named"), [
    (None, "unset"), ("", "unset"), ("no-such-terminal", "no-such-terminal"), ("../../etc/passwd", "etc/passwd"),
    ("x" * 5000, "xxx"), ("caf\u00e9", "caf"), (os.fsdecode(b"\xff"), "TERM"),
])  # fmt: skip
def test_an_unknown_terminal_is_named(run: Run, home: Path, term: str | None, named: str) -> None:
    finished = run("client", "-c", TERM=term)
    assert finished.returncode == 1 and finished.stderr.startswith("mosh: ") and finished.stderr.count("\n") == 1
    assert named in finished.stderr
    environ = {**session_env(home), **({} if term is None else {"TERM": term})}
    with on_a_terminal([*ours_command(), "host"], environ) as program:
        assert program.wait() == 1
    assert program.output.decode("utf-8", "replace") == finished.stderr.replace("\n", "\r\n")


def test_an_unknown_crypto_backend_is_named(run: Run) -> None:
    finished = run("server", "new", "-p", "0", MOSH_CRYPTO="rot13")
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert "rot13" in finished.stderr


# -- the wrapper: good spellings -------------------------------------------------------------------------------


def _login(*words: str) -> mosh.LoginOptions:
    return mosh._login_options(mosh._parse_wrapper(words))


@pytest.mark.parametrize(("spelling", "ports"), [
    ("-p60001 host", "60001"),
    ("-p 60001 host", "60001"),
    ("-p 60001:60010 host", "60001:60010"),
    ("--port=5 host", "5"),
    ("--port 5 host", "5"),
    ("-port=5 host", "5"),
    ("-port 5 host", "5"),
    ("-PORT=5 host", "5"),
    ("--Port=5 host", "5"),
    ("--por=5 host", "5"),
    ("--po 5 host", "5"),
    ("-po 5 host", "5"),
    ("-P 5 host", "5"),
    ("host --port=5", "5"),
    ("host -p5", "5"),
    ("host ls -p 5", "5"),
    ("-p 4 -p 5 host", "5"),
    ("-p 0 host", "0"),
    ("-p 65535 host", "65535"),
    ("-p 1:65535 host", "1:65535"),
    ("-p 7:7 host", "7:7"),
    ("host", ""),
])  # fmt: skip
def test_spellings_of_the_port(spelling: str, ports: str) -> None:
    assert _login(*spelling.split()).ports == ports


@pytest.mark.parametrize(("spelling", "mode"), [
    ("--predict=never host", "never"),
    ("--PREDICT=never host", "never"),
    ("--predict=NEVER host", "never"),
    ("-predict=never host", "never"),
    ("--predict never host", "never"),
    ("--predict=experimental host", "experimental"),
    ("-a host", "always"),
    ("-n host", "never"),
    ("-N host", "never"),
    ("-a -n host", "never"),
    ("host -n -a", "always"),
    ("--predict=never -a host", "always"),
    ("host", None),
])  # fmt: skip
def test_spellings_of_the_prediction_mode(spelling: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSH_PREDICTION_DISPLAY", raising=False)
    options = mosh._client_options(mosh._parse_wrapper(spelling.split()).predict, None, True)
    assert options.mode.value == (mode or "adaptive")


SPELLINGS: list[tuple[str, dict[str, object]]] = [
    ("-4 host", {"family": "inet"}),
    ("-6 host", {"family": "inet6"}),
    ("host -6 -4", {"family": "inet"}),
    ("--family=INET6 host", {"family": "inet6"}),
    ("--FAM=prefer-inet6 host", {"family": "prefer-inet6"}),
    ("-Fam inet6 host", {"family": "inet6"}),
    ("host", {"family": "prefer-inet", "remote_ip": "auto", "ssh": ["ssh"], "bind_server": "ssh", "server": ""}),
    ("--experimental-remote-ip=LOCAL host", {"remote_ip": "local"}),
    ("--exp=remote host", {"remote_ip": "remote"}),
    ("--bind-server=any host", {"bind_server": "any"}),
    ("--bind 1.2.3.4 host", {"bind_server": "1.2.3.4"}),
    ("--bind-server=fe80::1%theirs host", {"bind_server": "fe80::1%theirs"}),
    ("--bind-server=SSH a@b@host", {"bind_server": "SSH", "host": "a@b@host"}),
    ("--local 127.0.0.1", {"local": True, "host": "127.0.0.1"}),
    ("-local 127.0.0.1", {"local": True}),
    ("127.0.0.1 --loc", {"local": True}),
    ("--ssh-pty host", {"ssh_pty": True}),
    ("--ssh-pty --no-ssh-pty host", {"ssh_pty": False}),
    ("--ssh-pty -NoSSH-pty host", {"ssh_pty": False}),
    ("--server=/opt/m host", {"server": "/opt/m"}),
    ("--SERVER /opt/m host", {"server": "/opt/m"}),
    ("--serv=A=b host", {"server": "A=b"}),
    ("--verbose host -v", {"verbose": 2}),
    ("--host server", {"host": "server", "command": []}),
    ("--host client ls", {"host": "client", "command": ["ls"]}),
    ("user@host", {"host": "user@host"}),
]


@pytest.mark.parametrize(("spelling", "expected"), SPELLINGS)
def test_spellings_of_the_other_options(spelling: str, expected: dict[str, object]) -> None:
    options = _login(*spelling.split())
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(("value", "words"), [
    ("ssh -p 2222", ["ssh", "-p", "2222"]),
    (r"ssh -o 'ProxyCommand=a b' \ x", ["ssh", "-o", "ProxyCommand=a b", " x"]),
    ('"/my programs/ssh" -v', ["/my programs/ssh", "-v"]),
    ("", ["ssh"]),
])  # fmt: skip
def test_the_ssh_command_is_split_as_a_shell_would(value: str, words: list[str]) -> None:
    assert _login(f"--ssh={value}", "host").ssh == words
    assert _login("--ssh", value, "host").ssh == words


@pytest.mark.parametrize(("words", "host", "command"), [
    (["host", "--", "ls", "-l"], "host", ["ls", "-l"]),
    (["host", "ls", "--", "-l"], "host", ["ls", "-l"]),
    (["--", "host", "ls", "-l"], "host", ["ls", "-l"]),
    (["--", "host"], "host", []),
    (["host", "--"], "host", []),
    (["host", "--", "--", "ls"], "host", ["--", "ls"]),
    (["host", "--", "ls", "--", "-a"], "host", ["ls", "--", "-a"]),
    (["host", "ls", "a b", "it's", ""], "host", ["ls", "a b", "it's", ""]),
    (["host", "--", "--PORT=5", "-Predict"], "host", ["--PORT=5", "-Predict"]),
    (["-a", "host", "-n", "ls", "-o", "x"], "host", ["ls", "x"]),
])  # fmt: skip
def test_options_end_at_the_first_double_dash_only(words: list[str], host: str, command: list[str]) -> None:
    options = _login(*words)
    assert (options.host, options.command) == (host, command)


@pytest.mark.parametrize(("words", "environ", "overwrite", "init"), [
    (["host"], {}, False, True),
    (["-o", "host"], {}, True, True),
    (["--predict-overwrite", "host"], {}, True, True),
    (["-o", "--no-predict-overwrite", "host"], {}, False, True),
    (["host"], {"MOSH_PREDICTION_OVERWRITE": "yes"}, True, True),
    (["host"], {"MOSH_PREDICTION_OVERWRITE": "1"}, False, True),
    (["--no-predict-overwrite", "host"], {"MOSH_PREDICTION_OVERWRITE": "yes"}, False, True),
    (["--no-init", "host"], {}, False, False),
    (["--noinit", "host"], {}, False, False),
    (["-noin", "host"], {}, False, False),
    (["-o", "--nopredict-overwrite", "host"], {}, False, True),
    (["--no-init", "--init", "host"], {}, False, True),
    (["host"], {"MOSH_NO_TERM_INIT": ""}, False, False),
])  # fmt: skip
def test_options_of_the_client(
    words: list[str], environ: dict[str, str], overwrite: bool, init: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOSH_PREDICTION_OVERWRITE", "MOSH_NO_TERM_INIT", "MOSH_PREDICTION_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    arguments = mosh._parse_wrapper(words)
    options = mosh._client_options(arguments.predict, arguments.overwrite, arguments.init)
    assert (options.overwrite, options.init) == (overwrite, init)


@pytest.mark.parametrize("option", ["--help", "-h", "-H", "-help", "--HELP", "--hel"])
def test_help_lists_every_option_that_users_need(run: Run, option: str) -> None:
    finished = run(option)
    assert (finished.returncode, finished.stderr) == (0, "")
    for name in ("-p", "--port", "--predict", "-a", "-n", "--family", "-4", "-6", "--ssh", "--server", "--local"):
        assert re.search(rf"(?<![\w-]){name}\b", finished.stdout), name


def test_the_whole_program_gives_ssh_the_words_asked_for(home: Path, tmp_path: Path) -> None:
    ssh, seen = tmp_path / "ssh", tmp_path / "seen"
    lookup = 'case "$*" in *" -G "*) exit;; esac'
    ssh.write_text(f'#!/bin/sh\n{lookup}\nfor word; do printf "%s\\0" "$word"; done > {seen}\nexit 77\n')
    ssh.chmod(0o755)
    words = ["-p60010:60020", f"--ssh={ssh} -F none", "--server=srv", "-4", "me@there", "--", "ls", "a b", "it's"]
    with on_a_terminal([*ours_command(), *words], {**session_env(home), "TERM": "xterm-256color"}) as program:
        status = program.wait()
    assert status == 77, program.output
    *options, host, dashes, command = seen.read_bytes().decode().split("\0")[:-1]
    assert (options, host, dashes) == (["-F", "none", "-T", "-4"], "me@there", "--")
    stock = r"'new' '-c' '256' '-s' '-p' '60010:60020' '-l' 'LANG=C.UTF-8' '--' 'ls' 'a b' 'it'\''s'"
    assert command.endswith("; srv " + stock)
    assert b"Traceback" not in program.output


def _run_under_a_careless_parent(home: Path, tmp_path: Path, ssh: str, *words: str) -> tuple[int, bytes]:
    """Run the wrapper with `ssh` for an ssh and with SIGCHLD ignored. Returns the status and what the terminal got."""
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\ncase " $*" in *" -G "*) echo hostname {peers.LOOPBACK}; exit;; esac\n{ssh}\n')
    script.chmod(0o755)
    careless = "import os, sys; from signal import *; signal(SIGCHLD, SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", careless, *ours_command(), f"--ssh={script}", *words]
    with on_a_terminal(command, {**session_env(home), "TERM": "xterm-256color"}) as program:
        return program.wait(), program.output


def test_how_ssh_ended_is_known_even_if_the_parent_ignores_such_signals(home: Path, tmp_path: Path) -> None:
    status, shown = _run_under_a_careless_parent(home, tmp_path, "echo 'Permission denied' >&2; exit 255", "host")
    assert status == 255 and b"ssh could not log in to host" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_login_that_is_ended_takes_its_ssh_along(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    """It may be asking for a password, and would go on to read what is typed for the shell."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase " $*" in *" -G "*) exit;; esac\necho "ssh $$" >&2; exec sleep 1000\n')
    ssh.chmod(0o755)
    command = [*ours_command(), f"--ssh={ssh}", "host"]
    with on_a_terminal(command, {**session_env(home), "TERM": "xterm-256color"}) as program:
        program.read_until(lambda output: output.endswith(b"\n"))
        pid = int(program.output.split()[1])
        try:
            os.kill(program.pid, number)
            assert program.wait() == 128 + number
            assert not process_alive(pid)
        finally:
            end_process(pid)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells what a process ignores")
def test_another_client_finds_its_signals_as_they_were(home: Path, tmp_path: Path) -> None:
    """A script may be one, and a pipeline in it ends by SIGPIPE."""
    client = tmp_path / "client"
    client.write_text("#!/bin/sh\ngrep SigIgn /proc/$$/status\n")
    client.chmod(0o755)
    said = f'echo "$MOSH_TOKEN SERVER srv"; echo MOSH CONNECT 60001 {KEY}'
    status, shown = _run_under_a_careless_parent(home, tmp_path, said, f"--client={client}", "--server=srv", "host")
    reserved = 0b11 << 31       # signals 32 and 33, which the C library keeps to itself
    assert (status, int(shown.split()[1], 16) & ~reserved) == (0, 0)


@pytest.mark.parametrize("there", ["", "/no/such/folder"])
def test_a_local_session_needs_no_home(home: Path, there: str) -> None:
    command = [*ours_command(), "--no-init", "--local", peers.LOOPBACK, "--", "echo", "all", "said"]
    environ = {**session_env(home), "TERM": "xterm-256color", "HOME": there}
    with on_a_terminal(command, environ) as program:
        assert program.wait() == 0
    assert b"all said" in program.output


# -- the client ------------------------------------------------------------------------------------------------

SECRETS = ["", "SECRET", KEY + "A", KEY[:-1], NOT_CANONICAL, "SECRETsecretSECRET!!ab", "é" * 22, KEY + "\n", "=" * 22]


def _assert_client_refuses(finished: Finished, *, naming: str) -> None:
    """The first line says what is wrong; what follows is help at most. Stock's wrapper cares for the status alone."""
    first, *rest = finished.stderr.split("\n")
    assert finished.returncode == 1 and finished.stdout == ""
    assert first.startswith("mosh") and naming in first
    assert all(line == HINT or not line or line.startswith(("usage: mosh-client", "  ")) for line in rest)


@pytest.mark.parametrize("secret", SECRETS, ids=ascii)
def test_a_malformed_key_is_refused_and_not_shown(run: Run, secret: str) -> None:
    finished = run("client", "127.0.0.1", "60001", MOSH_KEY=secret)
    _assert_client_refuses(finished, naming="ey")
    assert not secret or secret.strip() not in finished.stderr


def test_a_missing_key_is_named(run: Run) -> None:
    _assert_client_refuses(run("client", "127.0.0.1", "60001"), naming="MOSH_KEY")


def test_a_good_key_gets_as_far_as_the_terminal(run: Run) -> None:
    finished = run("client", "127.0.0.1", "60001", MOSH_KEY=KEY)
    assert finished.returncode == 1 and "not a terminal" in finished.stderr
    assert KEY not in finished.stderr + finished.stdout


@pytest.mark.parametrize(("words", "named"), [
    ("127.0.0.1 x", "(x)"), ("127.0.0.1 65536", "(65536)"), ("127.0.0.1 -1", "-1"), ("127.0.0.1 ١", "(١)"),
    ("127.0.0.1 1e3", "(1e3)"), ("not.numeric 60001", "(not.numeric)"), ("a..b 60001", "(a..b)"),
    ("127.0.0.1.1 60001", "(127.0.0.1.1)"), ("é 60001", "(é)"), ("::g 60001", "(::g)"),
])  # fmt: skip
def test_a_bad_address_or_port_of_the_client_is_named(run: Run, words: str, named: str) -> None:
    finished = run("client", *words.split(), MOSH_KEY=KEY)
    _assert_client_refuses(finished, naming=named)
    assert KEY not in finished.stderr


@pytest.mark.parametrize("words", ["", "127.0.0.1", "1 2 3", "-z 127.0.0.1 60001", "--long 127.0.0.1 60001"])
def test_wrong_arguments_of_the_client_show_its_usage(run: Run, words: str) -> None:
    finished = run("client", *words.split(), MOSH_KEY=KEY)
    assert finished.returncode == 1 and re.search("usage: mosh-client .*IP PORT", finished.stderr)
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("words", ["-v -v", "-vv", "-#", "-#text", "-# -c"])
def test_options_of_the_client_that_stock_wrappers_give_are_taken(run: Run, words: str) -> None:
    extra = ["-#", "--ssh=x host |"] if words == "-#" else words.split()
    assert "not a terminal" in run("client", *extra, "127.0.0.1", "60001", MOSH_KEY=KEY).stderr


@pytest.mark.parametrize(
    ("term", "colors"), [("xterm-256color", "256"), ("xterm", "8"), ("dumb", "-1"), ("vt100", "-1")]
)
def test_the_client_counts_colours(run: Run, term: str, colors: str) -> None:
    finished = run("client", "-c", TERM=term)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, colors + "\n", "")


# -- the server ------------------------------------------------------------------------------------------------


def _parse(*words: str) -> mosh.ServerOptions:
    return mosh._parse_server(words)


DEFAULT_PORTS = (60001, 60999)
SERVER_FORMS: list[tuple[list[str], dict[str, object]]] = [
    ([], {"ports": DEFAULT_PORTS, "bind_address": "", "colors": 0, "command": [], "verbose": 0, "locale": {}}),
    (["new"], {"ports": DEFAULT_PORTS, "bind_address": "", "command": []}),
    (["127.0.0.1"], {"ports": DEFAULT_PORTS, "bind_address": "127.0.0.1"}),
    (["127.0.0.1", "60005"], {"ports": (60005, 60005), "bind_address": "127.0.0.1"}),
    (["new", "-p", "60005"], {"ports": (60005, 60005)}),
    (["new", "-p60005:60010"], {"ports": (60005, 60010)}),
    (["new", "-p", "0"], {"ports": (0, 0)}),
    (["new", "-c", "256"], {"colors": 256}),
    (["new", "-c256"], {"colors": 256}),
    (["new", "-c", "-1"], {"colors": -1}),
    (["new", "-i", "::1"], {"bind_address": "::1"}),
    (["new", "-i127.0.0.1"], {"bind_address": "127.0.0.1"}),
    (["new", "-v", "-v"], {"verbose": 2}),
    (["new", "-vvv"], {"verbose": 3}),
    (["new", "-vc8"], {"verbose": 1, "colors": 8}),
    (["new", "-l", "LANG=de_DE.UTF-8", "-lLC_ALL=C"], {"locale": {"LANG": "de_DE.UTF-8", "LC_ALL": "C"}}),
    (["new", "-l", "LC_CTYPE=a=b"], {"locale": {"LC_CTYPE": "a=b"}}),
    (["new", "-l", "LD_PRELOAD=/evil.so"], {"locale": {}}),
    (["new", "-@", "-v", "-c", "8"], {"verbose": 0, "colors": 8}),
    (["new", "--"], {"command": []}),
    (["new", "--", "ls", "-p", "x", "--", "-v"], {"command": ["ls", "-p", "x", "--", "-v"], "ports": DEFAULT_PORTS}),
    (["new", "-c", "8", "operand", "-p", "7"], {"colors": 8, "ports": (7, 7)}),
    (
        ["new", "-c", "256", "-s", "-p", "60010:60020", "-l", "LC_ALL=C.UTF-8", "--", "ls", "a b"],
        {"colors": 256, "bind_address": "10.0.0.9", "ports": (60010, 60020), "command": ["ls", "a b"]},
    ),
]


@pytest.mark.parametrize(("words", "expected"), SERVER_FORMS, ids=lambda value: " ".join(value) or "nothing")
def test_forms_of_the_server(
    words: list[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.9 22")
    options = _parse(*words)
    assert {name: getattr(options, name) for name in expected} == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("connection", "address", "warning"), [
    ("10.0.0.1 50000 10.0.0.9 22", "10.0.0.9", ""),
    ("::ffff:10.0.0.1 50000 ::ffff:10.0.0.9 22", "10.0.0.9", ""),
    ("fe80::1 50000 2001:db8::9 22", "2001:db8::9", ""),
    (None, "", "SSH_CONNECTION not found; binding to any interface."),
    ("", "", "SSH_CONNECTION not found; binding to any interface."),
    ("10.0.0.1 50000", "", "Could not parse SSH_CONNECTION; binding to any interface."),
    ("a b c d e", "", "Could not parse SSH_CONNECTION; binding to any interface."),
])  # fmt: skip
def test_the_address_that_ssh_reached(
    connection: str | None, address: str, warning: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    if connection is not None:
        monkeypatch.setenv("SSH_CONNECTION", connection)
    assert _parse("new", "-s").bind_address == address
    assert capfd.readouterr().err == (f"Warning: {warning}\n" if warning else "")


@pytest.mark.parametrize(("words", "named"), [
    (["new", "-c", "many"], "Bad number of colors (many)"),
    (["new", "-c", ""], "Bad number of colors ()"),
    (["new", "-c"], "Bad number of colors ()"),
    (["new", "-p", "x"], "Bad UDP port range (x)"),
    (["new", "-p"], "Bad UDP port range ()"),
    (["new", "-p", "70000"], "Bad UDP port range (70000)"),
    (["new", "-p", "0:5"], "Bad UDP port range (0:5)"),
    (["new", "-p", "9:5"], "Bad UDP port range (9:5)"),
    (["127.0.0.1", "ssh"], "Bad UDP port range (ssh)"),
])  # fmt: skip
def test_a_mistake_of_the_server_is_named_with_its_usage(run: Run, words: list[str], named: str) -> None:
    finished = run("server", *words)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert f"mosh-server: {named}\n" in finished.stderr and "usage: mosh-server new" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_server_goes_on_after_an_unknown_option(capfd: pytest.CaptureFixture[str]) -> None:
    assert _parse("new", "-z", "-c", "8").colors == 8
    complaint = capfd.readouterr().err
    assert "unknown option -z" in complaint and "usage: mosh-server new" in complaint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no file that is always full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["server", "--help"], ["client", "-c"]], ids=" ".join)
def test_what_cannot_be_printed_ends_in_one_line(home: Path, words: list[str]) -> None:
    environ = {**session_env(home), "TERM": "xterm-256color"}
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            [*ours_command(), *words], env=environ, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (finished.returncode, finished.stderr) == (1, f"mosh: {os.strerror(errno.ENOSPC)}\n")


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("role", ["server", "client"])
def test_help_and_version_of_the_parts(run: Run, role: str, option: str) -> None:
    finished = run(role, "new", "-p", "x", option)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (f"usage: mosh-{role}" if option == "--help" else mosh.__version__) in finished.stdout


def test_help_behind_the_double_dash_belongs_to_the_command(run: Run) -> None:
    assert run("server", "new", "-p", "x", "--", "--help").returncode == 1


# -- links -----------------------------------------------------------------------------------------------------


@pytest.fixture
def link(tmp_path: Path) -> Callable[[str], list[str]]:
    """Make a link to the program and return the words that start it."""

    def make(name: str) -> list[str]:
        path = tmp_path / name
        path.symlink_to(peers.ours_path())
        return [sys.executable, str(path)]

    return make


@pytest.mark.parametrize("name", ["mosh-server", "mosh-client"])
def test_a_link_of_a_stock_name_is_that_program(run: Run, link: Callable[[str], list[str]], name: str) -> None:
    finished = run("--help", program=link(name))
    assert finished.returncode == 0 and finished.stdout.startswith(f"usage: {name} ")


def test_a_link_of_another_name_is_the_wrapper(run: Run, link: Callable[[str], list[str]]) -> None:
    _assert_one_line(run("--bogus", "host", program=link("mosh")), naming="--bogus")


def test_a_client_link_counts_colours_as_stock_wrappers_ask(run: Run, link: Callable[[str], list[str]]) -> None:
    assert run("-c", program=link("mosh-client")).stdout == "256\n"


def test_a_server_link_serves(run: Run, link: Callable[[str], list[str]]) -> None:
    finished = run("new", "-i", peers.LOOPBACK, "-p", "0", "--", "cat", program=link("mosh-server"))
    detached = re.search(r"\[mosh-server detached, pid = (\d+)\]", finished.stderr)
    assert detached is not None, finished.stderr
    end_process(int(detached[1]))
    assert re.search(r"^MOSH CONNECT \d+ [A-Za-z0-9/+]{22}$", finished.stdout, re.MULTILINE)
