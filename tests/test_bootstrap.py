"""Section 19: what the starting server says, what the login shell is given, and where the server can be reached."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import zlib
from ast import literal_eval
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import build_zipapp
import mosh
import peers
from conftest import link_local_address, require
from peers import LOOPBACK

KEY = "AAECAwQFBgcICQoLDA0ODw"
LIMIT_SECONDS = 20.0


TOKEN = "mosh-0123456789abcdef0123456789abcdef"


def test_a_starting_server_says_where_it_is() -> None:
    announcement = mosh.Announcement(TOKEN)
    for line in (
        "Welcome!", f"{TOKEN} ADDRESS 10.0.0.1 50000 10.0.0.9 22", f"{TOKEN} SERVER mosh-server",
        f"MOSH CONNECT 60001 {KEY}",
    ):
        announcement.take(line)
    assert (announcement.address, announcement.port, announcement.key) == ("10.0.0.9", 60001, KEY)
    assert announcement.complete


# -- lines -----------------------------------------------------------------------------------------------------

OURS = [
    ("ADDRESS fe80::1 50000 fe80::9 22", ("fe80::1 50000 fe80::9 22",)),
    ("SERVER python3 /home/me/mosh.pyz", ("python3 /home/me/mosh.pyz",)),
    ("OLD 3.6.8 /usr/bin/python3", ("3.6.8", "/usr/bin/python3")),
    ("PARTIAL 3.11.2 /usr/bin/python3", ("3.11.2", "/usr/bin/python3")),
    ("NOCIPHER python3", ("python3",)),
    ("NEED 3.11.2", ("3.11.2",)),
    ("GOT 8192", ("8192",)),
    ("FAIL checksum", ("checksum",)),
    ("NOSERVER", ()),
]


@pytest.mark.parametrize("end", ["", "\r", " ", "\t \r", "\r\r"], ids=ascii)
@pytest.mark.parametrize("before", ["", "\x1b]0;title", "unfinished "], ids=ascii)
@pytest.mark.parametrize(("line", "expected"), OURS)
def test_a_line_of_ours(line: str, expected: tuple[str, ...], before: str, end: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    assert announcement.take(f"{before}{TOKEN} {line}{end}")
    assert {kind: match.groups() for kind, match in announcement.said.items()} == {line.split()[0]: expected}


@pytest.mark.parametrize(("number", "key"), [(1, "/+" * 11), (60001, KEY), (65535, KEY)])
def test_the_line_of_a_server_that_was_started(number: int, key: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    announcement.take(f"{TOKEN} SERVER mosh-server")
    assert announcement.take(f"MOSH CONNECT {number} {key}\r")
    assert (announcement.port, announcement.key) == (number, key)


NOISE = [
    "", "Welcome", "MOSH", "MOSHING", "MOSH NOSERVER", "MOSH SSH_CONNECTION a b c d", "MOSH IP 6.6.6.6",
    f"MOSH CONNECT 60001 {KEY}", "Last login: NOSERVER", TOKEN, f"{TOKEN}0 NOSERVER", f"{TOKEN[:-1]}0 NOSERVER",
    f"{TOKEN}\tNOSERVER", f"{TOKEN.upper()} NOSERVER", "mosh- NOSERVER", " NOSERVER",
]  # fmt: skip


@pytest.mark.parametrize("line", NOISE)
def test_a_line_without_the_token_is_for_the_user(line: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    assert not announcement.take(line)
    assert not announcement.said and not announcement.complete and not announcement.address


MALFORMED = [
    f"MOSH CONNECT 0 {KEY}", f"MOSH CONNECT {KEY}", f"MOSH CONNECT 60001{KEY}",
    f"MOSH CONNECT -1 {KEY}", f"MOSH CONNECT 0x10 {KEY}", f"MOSH CONNECT 123456789 {KEY}",
    f"MOSH CONNECT 65536 {KEY}", f"MOSH CONNECT 99999 {KEY}",
    f"MOSH CONNECT 60001 {KEY}A", f"MOSH CONNECT 60001 {KEY[:-1]}", f"MOSH CONNECT 60001 {KEY}==",
    f"MOSH CONNECT 60001 {KEY} extra", f"MOSH CONNECT  60001 {KEY}", f"MOSH CONNECT 60001  {KEY}",
    f"MOSH CONNECT ٦٠٠٠١ {KEY}", f"MOSH CONNECT 60001 {KEY[:-1]}é", f"MOSH CONNECT 60001 {KEY[:-1]}-",
    f"MOSH CONNECT 60001 {KEY}\x1b[0m",
    f"{TOKEN} GOT many", f"{TOKEN} GOT ٦",
    f"{TOKEN} NOSERVER today", f"{TOKEN} FAIL else", f"{TOKEN} OLD 3",
]


@pytest.mark.parametrize("line", MALFORMED, ids=ascii)
def test_a_malformed_line_is_refused_without_showing_the_key(line: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    announcement.take(f"{TOKEN} SERVER mosh-server")
    with pytest.raises(mosh.BootstrapError) as error:
        announcement.take(line)
    assert KEY[:12] not in str(error.value)


@pytest.mark.parametrize("line", [f"{TOKEN} ?", f"Not allowed: sh -c '...' {TOKEN} 0123abcd 3", f"{TOKEN}  NOSERVER"])
def test_a_host_may_quote_our_command(line: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    assert not announcement.take(line) and not announcement.said


DISGUISES = [f"MOSH CONNECT\\t60001 {KEY}", f"\\033[0mMOSH CONNECT 60001 {KEY}", f" MOSH CONNECT 60001 {KEY}"]


@pytest.mark.parametrize("line", DISGUISES)
def test_a_key_in_a_line_that_is_not_quite_ours_is_not_shown(
    line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(mosh.BootstrapError) as error:
        _run_login(f"{LOOKUP}{STARTS}printf '{line}\\n'", tmp_path)
    assert KEY[:12] not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("words", ["UNKNOWN", "UNKNOWN 65535 UNKNOWN 65535", "a b c", "a b c d e"])
def test_what_a_host_says_of_its_address_may_be_of_no_use(words: str) -> None:
    announcement = mosh.Announcement(TOKEN)
    assert announcement.take(f"{TOKEN} ADDRESS {words}") and announcement.address == ""


def test_an_address_cannot_be_redefined() -> None:
    announcement = mosh.Announcement(TOKEN)
    assert announcement.take_from_proxy(f"{TOKEN} IP 10.0.0.9")
    with pytest.raises(mosh.BootstrapError, match="redefine"):
        announcement.take_from_proxy(f"{TOKEN} IP 10.6.6.6")


def test_the_address_of_the_connection_does_not_replace_a_better_one() -> None:
    announcement = mosh.Announcement(TOKEN)
    announcement.take_from_proxy(f"{TOKEN} IP 10.0.0.9")
    announcement.take(f"{TOKEN} ADDRESS 10.0.0.1 50000 192.168.0.9 22")
    assert announcement.address == "10.0.0.9"


def test_what_comes_by_another_way_than_the_proxys_is_no_address() -> None:
    announcement = mosh.Announcement(TOKEN)
    for line in ("MOSH IP 10.6.6.6", f"{TOKEN} SERVER x", f"{TOKEN} NOSERVER", "IP 10.6.6.6"):
        assert not announcement.take_from_proxy(line)
    assert announcement.address == "" and not announcement.said


@settings(max_examples=300)
@given(st.text(max_size=60) | st.builds(
    "{}{}{}{}".format, st.sampled_from(["", "MOSH ", TOKEN + " "]),
    st.sampled_from(["CONNECT ", "IP ", "SERVER ", "ADDRESS ", "GOT ", "OLD "]),
    st.sampled_from(["", "1 ", f"60001 {KEY}", "a b c d"]), st.text(max_size=40),
), st.booleans())  # fmt: skip
def test_any_line_is_ours_or_not_or_refused(line: str, started: bool) -> None:
    announcement = mosh.Announcement(TOKEN)
    if started:
        announcement.take(f"{TOKEN} SERVER mosh-server")
    try:
        announcement.take(line)
    except mosh.BootstrapError as error:
        assert (TOKEN in line or line.startswith("MOSH")) and KEY not in str(error)
    else:
        assert announcement.complete == (announcement.port > 0)
        assert not announcement.complete or "SERVER" in announcement.said


# -- words through shells --------------------------------------------------------------------------------------

# What must arrive as typed. A newline is left out: the C shells cannot take one inside quotes.
WORDS = [
    "plain", "", " ", "a b", "it's", "''", "'", "\"", "$HOME", "`id`", "$(id)", "a\\b", "\\", "a\\\\b", "tail\\", "\\'",
    "*", "?", "[a]", "~", "~root", "#", "a;b", "a&b", "a|b", "<x", ">x", "(x)", "{a,b}", "!", "!!", "a!b", "^a^b", "%1",
    "-n", "--", "=", "a=b", "é漢😀", "\t", "%s%n", "\x1b[31m", "\\n", "${IFS}", "$'x'", "@", "x" * 5_000,
]
SHOW = [sys.executable, "-c", "import json, os, sys; print(json.dumps([os.fsencode(w).hex() for w in sys.argv[1:]]))"]
SHELLS = ["bash", "dash", "zsh", "fish", "tcsh", "csh", "ksh", "mksh"]


def _through(shell: str, command: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Give `command` to a login shell as sshd does."""
    words = [require(shell), "-c", command]
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        env={"PATH": os.environ.get("PATH", os.defpath), "HOME": "/", "LC_ALL": "C.UTF-8", **(environ or {})},
    )


def _arguments(output: str) -> list[str]:
    return [bytes.fromhex(word).decode() for word in json.loads(output.splitlines()[-1])]


@pytest.mark.parametrize("shell", SHELLS)
def test_quoted_words_arrive_as_they_are(shell: str) -> None:
    finished = _through(shell, " ".join(map(mosh.shell_quote, [*SHOW, *WORDS])))
    assert finished.stderr == ""
    assert _arguments(finished.stdout) == WORDS


@pytest.mark.parametrize("shell", SHELLS)
def test_a_newline_in_a_word_arrives(shell: str) -> None:
    if shell in ("tcsh", "csh"):
        pytest.skip("C shells cannot take a newline inside quotes")
    finished = _through(shell, " ".join(map(mosh.shell_quote, [*SHOW, "a\nb", "\n"])))
    assert _arguments(finished.stdout) == ["a\nb", "\n"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=8))
def test_any_words_arrive_through_sh(words: list[str]) -> None:
    finished = _through("sh", " ".join(map(mosh.shell_quote, [*SHOW, *words])))
    assert _arguments(finished.stdout) == words


def _login(command: Sequence[str] = (), **changes: object) -> mosh.LoginOptions:
    options = mosh.LoginOptions()
    options.command = list(command)
    for name, value in changes.items():
        assert hasattr(options, name)
        setattr(options, name, value)
    return options


CONNECTION = {"SSH_CONNECTION": "10.0.0.1 50000 10.0.0.9 22"}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_server_named_by_the_user_gets_its_words_in_any_login_shell(shell: str) -> None:
    options = _login(WORDS, server=" ".join(map(shlex.quote, SHOW)))
    arguments = mosh.server_arguments(options, 256, {})
    finished = _through(shell, mosh.remote_command(options, arguments, TOKEN, None), CONNECTION)
    assert _arguments(finished.stdout) == ["new", "-c", "256", "-s", "--", *WORDS]
    assert f"{TOKEN} ADDRESS 10.0.0.1 50000 10.0.0.9 22" in finished.stdout.splitlines()
    assert f"{TOKEN} SERVER as told" in finished.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_users_server_is_shell_text(shell: str) -> None:
    code = "import os; print(os.environ['GREETING'])"
    text = "env GREETING=hello " + " ".join(map(shlex.quote, [sys.executable, "-c", code]))
    finished = _through(shell, mosh.remote_command(_login(server=text), ["new"], TOKEN, None), CONNECTION)
    assert finished.stdout.splitlines()[-1] == "hello"


@pytest.fixture
def far_path(tmp_path: Path) -> Path:
    """A folder of programs for a far host that has the plainest tools only."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "env", "printf", "test"):
        (folder / tool).symlink_to(shutil.which(tool) or "/bin/" + tool)
    return folder


def _search(shell: str, far_path: Path, home: Path, words: Sequence[str]) -> list[str]:
    """What the search for a server prints on a far host with that home and those programs."""
    environ = {"PATH": str(far_path), "HOME": str(home), **CONNECTION}
    return _through(shell, mosh.remote_command(_login(), words, TOKEN, None), environ).stdout.splitlines()


def _install(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


SHOWING = f'#!/bin/sh\nexec {" ".join(map(shlex.quote, SHOW))} "$@"\n'
NEEDS_NOTHING_ELSEWHERE = pytest.mark.skipif(
    any(Path(folder, name).exists() for folder in ("/usr/local/bin", "/opt/homebrew/bin", "/snap/bin")
        for name in ("mosh-server", "mosh.pyz")),
    reason="this machine has a server in a folder that the search always looks into",
)  # fmt: skip


@NEEDS_NOTHING_ELSEWHERE
@pytest.mark.parametrize("shell", SHELLS)
def test_a_search_that_finds_nothing_says_so(shell: str, far_path: Path, home: Path) -> None:
    said = _search(shell, far_path, home, ["new"])
    assert said[-1] == f"{TOKEN} NOSERVER" and f"{TOKEN} ADDRESS 10.0.0.1 50000 10.0.0.9 22" in said


@pytest.mark.parametrize("shell", SHELLS)
def test_a_search_finds_a_stock_server(shell: str, far_path: Path, home: Path) -> None:
    _install(far_path / "mosh-server", SHOWING)
    *_, said, shown = _search(shell, far_path, home, ["new", "--", *WORDS])
    assert said == f"{TOKEN} SERVER {far_path / 'mosh-server'}"
    assert _arguments(shown) == ["new", "--", *WORDS]


@pytest.mark.parametrize("place", ["mosh.pyz", ".local/bin/mosh.pyz"])
def test_a_search_prefers_our_own(place: str, far_path: Path, home: Path) -> None:
    _install(far_path / "mosh-server", SHOWING)
    _install(far_path / "python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    _install(home / place, SHOW[2])
    *_, said, shown = _search("sh", far_path, home, ["new", *WORDS])
    assert said == f"{TOKEN} SERVER python3 {home / place}"
    assert _arguments(shown) == ["server", "new", *WORDS]


def test_an_old_python_leaves_it_to_the_stock_server(far_path: Path, home: Path) -> None:
    _install(far_path / "mosh-server", SHOWING)
    _install(far_path / "python3", "#!/bin/sh\nexit 1\n")
    _install(home / "mosh.pyz", "")
    assert f"{TOKEN} SERVER {far_path / 'mosh-server'}" in _search("sh", far_path, home, ["new"])


# -- the stager ------------------------------------------------------------------------------------------------


SHOW_ARGUMENTS = mosh.Program(b"import sys\ndef main():\n    print(ascii(sys.argv[1:]))\n", b"")


def _stage(
    shell: str, far_path: Path, home: Path, sent: bytes = b"", program: mosh.Program = SHOW_ARGUMENTS,
    words: Sequence[str] = ("new", "--", *WORDS),
) -> subprocess.CompletedProcess[bytes]:
    """What a login shell and the stager make of a login; `sent` is what comes on stdin."""
    command = mosh.remote_command(_login(), words, TOKEN, program)
    return subprocess.run(
        [require(shell), "-c", command], input=sent or _sent(program), capture_output=True, timeout=LIMIT_SECONDS,
        env={"PATH": str(far_path), "HOME": str(home), "XDG_CACHE_HOME": str(home), "LC_ALL": "C.UTF-8", **CONNECTION},
    )  # fmt: skip


def _sent(program: mosh.Program) -> bytes:
    packed = program.packed()
    return b"\n" * 16 + f"{TOKEN} {len(packed)}\n".encode() + packed


@pytest.mark.parametrize("shell", SHELLS)
def test_the_stager_passes_every_login_shell(shell: str, far_path: Path, home: Path) -> None:
    _install(far_path / "python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for needs in (True, False):
        finished = _stage(shell, far_path, home)
        assert (finished.returncode, finished.stderr) == (0, b"")
        *marked, said = filter(None, finished.stdout.decode().split("\n"))
        assert literal_eval(said) == ["server", "new", "--", *WORDS]
        assert [line.split()[1] for line in marked] == ["ADDRESS", *(["NEED"] if needs else []), "SERVER"]


@pytest.mark.parametrize("end", ["exit 1", "exit 2", "exit 127", "kill -SEGV $$"])
def test_a_python_that_runs_nothing_is_followed_by_the_next(end: str, far_path: Path, home: Path) -> None:
    """One that is broken, or is another program: an old version, a shim that finds none, a script that explains."""
    _install(far_path / "python3", f"#!/bin/sh\n{end}\n")
    (far_path / "python3.14").symlink_to(sys.executable)
    finished = _stage("sh", far_path, home)
    assert finished.returncode == 0 and b"SERVER" in finished.stdout


@pytest.mark.parametrize("python", build_zipapp.choose_interpreters(None, ">=3.9"), ids=str)
def test_any_python_compiles_keeps_and_runs_the_program(
    python: build_zipapp.Interpreter, far_path: Path, home: Path
) -> None:
    own = mosh.Program.own()
    assert own is not None
    _install(far_path / "python3", f'#!/bin/sh\nexec {shlex.quote(python.path)} "$@"\n')
    for needs in (True, False):
        finished = _stage("sh", far_path, home, program=own, words=["--version"])
        assert (finished.returncode, finished.stderr) == (0, b"")
        assert f"mosh.py {mosh.__version__}".encode() in finished.stdout
        assert (b"NEED" in finished.stdout) == needs
    (entry,) = (home / "mosh.py").iterdir()
    assert entry.name == f"mosh-{own.digest[:32]}-{python.magic}.pyc"


def test_the_command_line_is_plain_and_short() -> None:
    command = mosh.remote_command(_login(), ["new"], TOKEN, mosh.Program(b"", b""))
    assert not set(command) & set("\\!\n") and command.isascii()
    assert max(map(len, command.split())) <= 500 and len(command) < 8_000


def test_what_the_stager_reads_from_stdin_is_bounded_by_what_was_announced(far_path: Path, home: Path) -> None:
    _install(far_path / "python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    program = mosh.Program(b"x = 1\n", b"")
    for sent in (b"\n", b"junk\n" * 9, f"{TOKEN} 99\nshort".encode(), _sent(program)[:-1], _sent(program)):
        finished = _stage("sh", far_path, home, sent)
        assert finished.returncode == mosh.BAD_CHECKSUM
        assert re.search(rb"mosh-\w{32} FAIL (cut|checksum)\n$", finished.stdout)
    assert not list(home.iterdir())


@pytest.mark.parametrize("size", [0, 1, 8191, 100_000])
def test_a_program_travels_whole(size: int) -> None:
    program = mosh.Program(b"#" * size, b"WIDTHS")
    assert zlib.decompress(program.packed()) == b"%d\n" % size + b"#" * size + b"WIDTHS"
    assert program.digest == hashlib.sha256(zlib.decompress(program.packed())).hexdigest()


def test_a_python_with_modules_built_in_is_not_taken_for_a_minimal_one() -> None:
    """The stager looks for files, so it may ask only for modules that are files in every whole Python."""
    asked = re.search(r"find_spec, (\(.*?\))\)", mosh._STAGER)
    assert asked is not None
    origins = [getattr(importlib.util.find_spec(name), "origin", None) for name in literal_eval(asked[1])]
    assert origins and all(str(origin).endswith(".py") for origin in origins)


def test_what_is_sent_is_what_runs_here() -> None:
    own = mosh.Program.own()
    assert own is not None
    source = Path(mosh.__file__).read_bytes()
    assert zlib.decompress(own.packed()).startswith(b"%d\n" % len(source) + source)
    table: dict[str, Any] = {}
    exec(zlib.decompress(own.packed()).partition(b"\n")[2][len(source) :], table)  # noqa: S102  (our own text)
    runs = list(zip(table["STARTS"], [width - 1 for width in table["WIDTHS"]]))
    assert runs == build_zipapp.width_runs(), "the far side would not go by the same widths"


# -- the server's arguments ------------------------------------------------------------------------------------

STOCK_EXAMPLE = r"mosh-server 'new' '-c' '256' '-s' '-p' '60010:60020' '-l' 'LC_ALL=C.UTF-8' '--' 'ls' 'a b' 'it'\''s'"


def test_the_command_line_is_that_of_a_stock_wrapper() -> None:
    options = _login(["ls", "a b", "it's"], server="mosh-server", ports="60010:60020")
    arguments = mosh.server_arguments(options, 256, {"LC_ALL": "C.UTF-8", "HOME": "/"})
    assert mosh.remote_command(options, arguments, TOKEN, None).endswith(" ; " + STOCK_EXAMPLE)


ARGUMENTS: list[tuple[dict[str, object], int, list[str]]] = [
    ({}, 8, ["new", "-c", "8", "-s"]),
    ({}, -1, ["new", "-c", "0", "-s"]),
    ({"bind_server": "SSH"}, 8, ["new", "-c", "8", "-s"]),
    ({"bind_server": "any"}, 8, ["new", "-c", "8"]),
    ({"bind_server": "ANY"}, 8, ["new", "-c", "8"]),
    ({"bind_server": "10.1.2.3"}, 8, ["new", "-c", "8", "-i", "10.1.2.3"]),
    ({"local": True, "host": "::1"}, 8, ["new", "-c", "8", "-i", "::1"]),
    ({"local": True, "host": "::1", "bind_server": "any"}, 8, ["new", "-c", "8"]),
    ({"ports": "60010"}, 8, ["new", "-c", "8", "-s", "-p", "60010"]),
    ({"ports": "0"}, 8, ["new", "-c", "8", "-s", "-p", "0"]),
    ({"command": ["--", "-v"]}, 8, ["new", "-c", "8", "-s", "--", "--", "-v"]),
]


@pytest.mark.parametrize(("changes", "colors", "words"), ARGUMENTS)
def test_arguments_of_the_server(changes: dict[str, object], colors: int, words: list[str]) -> None:
    assert mosh.server_arguments(_login(**changes), colors, {}) == words  # type: ignore[arg-type]


def test_every_locale_variable_is_passed_on_in_stocks_order() -> None:
    names = "LANG LANGUAGE LC_CTYPE LC_NUMERIC LC_TIME LC_COLLATE LC_MONETARY LC_MESSAGES LC_PAPER LC_NAME LC_ADDRESS"
    names += " LC_TELEPHONE LC_MEASUREMENT LC_IDENTIFICATION LC_ALL"
    environ = {name: f"x{n}" for n, name in enumerate(names.split())}
    environ = dict(reversed(environ.items())) | {"LC_SECRET": "no", "PATH": "no"}
    words = mosh.server_arguments(_login(), 8, environ)[4:]
    assert words[::2] == ["-l"] * 15
    assert words[1::2] == [f"{name}={environ[name]}" for name in names.split()]


def test_what_a_wrapper_says_a_server_understands() -> None:
    options = _login(["ls", "a b"], ports="60010:60020", bind_server="10.1.2.3")
    words = mosh.server_arguments(options, 256, {"LANG": "de_DE.UTF-8"})
    understood = mosh._parse_server(words)
    assert (understood.colors, understood.ports, understood.bind_address) == (256, (60010, 60020), "10.1.2.3")
    assert (understood.command, understood.locale) == (["ls", "a b"], {"LANG": "de_DE.UTF-8"})


# -- addresses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mosh.FAMILIES)
@pytest.mark.parametrize(("host", "number"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_numeric_address_is_itself(host: str, number: int, family: str) -> None:
    if (family, number) in (("inet", socket.AF_INET6), ("inet6", socket.AF_INET)):
        with pytest.raises(mosh.BootstrapError, match=host):
            mosh.resolve(host, 60001, family)
        return
    (candidate,) = mosh.resolve(host, 60001, family)
    assert (candidate.family, candidate.sockaddr[:2], str(candidate)) == (number, (host, 60001), host)


@pytest.mark.parametrize(("family", "first"), [("prefer-inet", socket.AF_INET), ("prefer-inet6", socket.AF_INET6)])
def test_the_preferred_family_comes_first(family: str, first: int) -> None:
    families = [candidate.family for candidate in mosh.resolve("localhost", 22, family)]
    assert families == sorted(families, key=lambda number: number != first) and len(families) == len(set(families))


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "\udcff", "a\0b", "127.0.0.1 ", "[::1]", "999.1.1.1"], ids=ascii)
def test_what_is_no_name_is_said_with_a_reason(host: str) -> None:
    with pytest.raises(mosh.BootstrapError, match="could not resolve"):
        mosh.resolve(host, 60001, "prefer-inet")


# -- the proxy -------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A TCP server on loopback."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(LIMIT_SECONDS)
        yield listener


def test_the_proxy_says_where_it_connected_and_relays_both_ways(listener: socket.socket) -> None:
    request, answer = os.urandom(300_000), os.urandom(300_000)
    received: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as incoming:
            received.append(incoming.read())
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    finished = subprocess.run(
        [*peers.ours_command(), "--fake-proxy", "--", LOOPBACK, str(listener.getsockname()[1])],
        input=request, capture_output=True, timeout=LIMIT_SECONDS,
    )
    thread.join()
    assert (finished.returncode, finished.stderr) == (0, f"MOSH IP {LOOPBACK}\n".encode())
    assert received == [request] and finished.stdout == answer


def test_the_proxy_reaches_an_address_that_holds_on_one_link_only() -> None:
    with socket.create_server(link_local_address(), family=socket.AF_INET6) as listener:
        host, port = socket.getnameinfo(listener.getsockname(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        with subprocess.Popen(
            [*peers.ours_command(), "--fake-proxy", "--", host, port], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as proxy:
            listener.settimeout(LIMIT_SECONDS)
            listener.accept()[0].close()
            assert proxy.communicate(timeout=LIMIT_SECONDS) == (b"", f"MOSH IP {host}\n".encode())


def test_the_proxy_names_what_it_could_not_reach(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    finished = subprocess.run(
        [*peers.ours_command(), "--fake-proxy", "--", LOOPBACK, str(port)], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1
    assert f"Could not connect to {LOOPBACK}" in finished.stderr and "refused" in finished.stderr


# -- the login -------------------------------------------------------------------------------------------------


def _run_login(script: str, tmp_path: Path, **changes: object) -> tuple[str, int, list[mosh.Candidate]]:
    """Log in through a script in the place of ssh."""
    ssh = tmp_path / "ssh"
    _install(ssh, "#!/bin/sh\n" + script)
    login = mosh.Login(_login(**{"host": "there", "ssh": [str(ssh)], "server": "srv", **changes}), 256)  # type: ignore[arg-type]
    try:
        login.start()
        return login.finish()
    finally:
        login.close()


# A script in the place of ssh has the token in its environment, for our ProxyCommand; no host has.
STARTS = 't=$MOSH_TOKEN; echo "$t SERVER srv"\n'
LOOKUP = f'[ "$1" = -G ] && {{ echo "user me"; echo "hostname {LOOPBACK}"; exit; }}\n'
SAYS_IT = f"{STARTS}printf 'MOSH CONNECT 60001 {KEY}\\r\\n'"


def test_a_login_gives_key_port_and_address(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    key, port, candidates = _run_login(LOOKUP + "echo banner; echo\n" + SAYS_IT, tmp_path)
    assert (key, port, [str(candidate) for candidate in candidates]) == (KEY, 60001, [LOOPBACK])
    assert capfd.readouterr() == ("", "banner\n")


def test_what_ssh_says_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mosh.BootstrapError):
        _run_login(LOOKUP + "echo 'Permission denied' >&2; printf 'really' >&2; exit 255", tmp_path)
    assert capfd.readouterr().err == "Permission denied\nreally\n"


def test_the_word_of_the_proxy_counts_even_if_it_is_read_late(tmp_path: Path) -> None:
    """It comes first, but by another pipe than the server's words: a slow reader may find both at once."""
    said = f'{STARTS}echo "$MOSH_TOKEN IP {LOOPBACK}" >&2; echo "$t ADDRESS a 1 10.0.0.9 22"; {SAYS_IT}'
    assert str(_run_login(said, tmp_path, remote_ip="proxy")[2][0]) == LOOPBACK


def test_the_servers_own_word_on_its_address_comes_first(tmp_path: Path) -> None:
    said = STARTS + 'echo "$t ADDRESS 10.0.0.1 50000 10.0.0.9 22"\n'
    candidates = _run_login(LOOKUP + said + SAYS_IT, tmp_path)[2]
    assert [candidate.sockaddr for candidate in candidates] == [("10.0.0.9", 60001), (LOOPBACK, 60001)]


PROXIED = '[ "$1" = -G ] && { echo "hostname far.invalid"; echo "proxyjump jump"; exit; }\n'
SAYS_WHERE = STARTS + 'echo "$t ADDRESS 10.0.0.1 50000 10.0.0.9 22"\n' + SAYS_IT


def test_a_name_that_only_a_jump_host_knows_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh never asks our resolver for it; one that does not answer takes 10 s to say so."""
    monkeypatch.setattr(mosh, "_PROXIED_NAME_WAIT_MS", 100)
    monkeypatch.setattr(mosh.Lookup, "_PROGRAM", "import time; time.sleep(1000)")
    monkeypatch.setattr(socket, "getaddrinfo", _only_numbers(socket.getaddrinfo))
    candidates = _run_login(PROXIED + SAYS_WHERE, tmp_path)[2]
    assert [candidate.sockaddr for candidate in candidates] == [("10.0.0.9", 60001)]


def _only_numbers(getaddrinfo: Any) -> Any:
    def resolver(host: Any, *rest: Any) -> Any:
        assert host != "far.invalid", "it would be waited for"
        return getaddrinfo(host, *rest)

    return resolver


def test_a_name_behind_a_jump_host_that_is_known_here_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh.Lookup, "_PROGRAM", f"""
print({int(socket.AF_INET6)}, '2001:db8::7', 60001, 0, 0)
print({int(socket.AF_INET)}, '192.0.2.7', 60001)
""")
    candidates = _run_login(PROXIED + SAYS_WHERE, tmp_path)[2]
    assert list(map(str, candidates)) == ["10.0.0.9", "192.0.2.7", "2001:db8::7"]


FAILURES: list[tuple[str, int, str]] = [
    ("exit 255", 255, "ssh could not log in to there and does not say why"),
    ("echo 'Permission denied' >&2; exit 255", 255, "ssh could not log in to there; its own words are above$"),
    ("kill -KILL $$", 137, "signal 9 ended ssh"),
    (STARTS + "exit 255", 255, "the server on there did not start"),
    ("exit 0", mosh.OTHER_COMMAND, "did not run what mosh asked for"),
    (f"echo 'MOSH CONNECT 60001 {KEY}'", mosh.OTHER_COMMAND, "did not run what mosh asked for"),
    ("exit 127", mosh.RESTRICTED_SHELL, "restricted"),
    (STARTS + "exit 127", 127, "cannot run 'srv'"),
    (STARTS + "exit 3", 3, r"the server on there did not start \(exit status 3\)$"),
    (STARTS + "echo 'no room'; exit 3", 3, r"the server on there did not start \(exit status 3\); what was said"),
    (STARTS + "exit 0", 1, "no server announced itself"),
    (f"{STARTS}echo 'MOSH CONNECT 60001 {KEY}x'", 1, "malformed"),
    (STARTS + 'echo "$t NOSERVER"; exit 127', 127, "no server found on there"),
    ("head -c 9000000 /dev/zero", mosh.OTHER_COMMAND, "prints without end"),
    ("yes no server here, only a line that goes on and on", mosh.OTHER_COMMAND, "prints without end"),
    ("read line; exec sleep 20", mosh.SILENT_HOST, "nothing for 1 s"),
    ("cat >/dev/null; exec sleep 20", mosh.SILENT_HOST, "nothing for 1 s"),
]


@pytest.mark.parametrize(("script", "status", "named"), FAILURES)
def test_a_login_that_fails_is_explained(
    script: str, status: int, named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(mosh.BootstrapError, match=named) as error:
        _run_login(LOOKUP + script, tmp_path, silence_limit_ms=1_000)
    assert error.value.status == status
    assert KEY not in str(error.value) + "".join(capfd.readouterr())


def test_what_outlives_ssh_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A ProxyCommand, or the shared connection to a jump host, may hold ssh's stderr open, in older ssh for hours."""
    pid = tmp_path / "pid"
    script = f"sleep 1000 </dev/null >/dev/null &\necho $! >{pid}; echo 'Permission denied' >&2; exit 255"
    try:
        with pytest.raises(mosh.BootstrapError, match="ssh could not log in") as error:
            _run_login(LOOKUP + script, tmp_path, silence_limit_ms=1_000)
        assert error.value.status == 255 and capfd.readouterr().err == "Permission denied\n"
        assert peers.process_alive(int(pid.read_text()))
    finally:
        peers.end_process(int(pid.read_text()))


def test_a_host_that_asks_again_and_again_is_sent_the_program_so_often_and_no_more() -> None:
    login = mosh.Login(_login(host="there"), 256)
    login._program = mosh.Program(b"", b"")
    for now in range(3 * mosh._SENDS_LIMIT):
        login.announcement.take(f"{login._token} NEED 3.11")
        login._check_progress(now)
    assert login._sent_count == mosh._SENDS_LIMIT


def test_a_host_of_both_families_wants_a_choice_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(family, socket.SOCK_DGRAM, 17, "", (host, 60001))
             for family, host in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    assert [str(each.sockaddr[0]) for each in mosh.resolve("there", 60001, "all")] == ["192.0.2.1", "2001:db8::1"]
    with pytest.raises(mosh.BootstrapError, match="there has both IPv4 and IPv6 addresses, use --family"):
        mosh.resolve("there", 60001, "auto")


def test_our_proxy_may_lie_in_a_folder_of_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh expands what follows a percent sign, unless that is another one."""
    monkeypatch.setattr(mosh, "own_program", lambda: ["/a/50%off/mosh.pyz"])
    command = mosh.Login(_login(host="there", remote_ip="proxy", push=False), 256)._ssh_command()
    (option,) = (word for word in command if word.startswith("ProxyCommand="))
    assert option == "ProxyCommand='/a/50%%off/mosh.pyz' '--family=prefer-inet' '--fake-proxy' '--' %h %p"


@pytest.mark.parametrize("ports", ["", "2222"])
def test_who_gave_a_udp_port_for_sshs_is_told(ports: str, tmp_path: Path) -> None:
    with pytest.raises(mosh.BootstrapError) as error:
        _run_login(LOOKUP + "exit 255", tmp_path, ports=ports)
    assert ("--ssh='ssh -p PORT'" in str(error.value)) == bool(ports)


@pytest.mark.parametrize("command", ["none", "tmux new -A"])
def test_a_remote_command_of_the_configuration_is_told(command: str, tmp_path: Path) -> None:
    settings = f'[ "$1" = -G ] && {{ echo "remotecommand {command}"; exit; }}\n'
    with pytest.raises(mosh.BootstrapError) as error:
        _run_login(settings + "exit 255", tmp_path)
    assert ("--ssh='ssh -o RemoteCommand=none'" in str(error.value)) == (command != "none")


def test_an_ssh_that_does_not_exist_is_named(tmp_path: Path) -> None:
    login = mosh.Login(_login(host="there", ssh=[str(tmp_path / "no-ssh")]), 256)
    with pytest.raises(mosh.BootstrapError, match="no-ssh"):
        login.start()
    login.close()


@pytest.mark.parametrize("address", ["a\\000b", "a..b", "\\377", "999.9.9.9", "-"])
def test_a_hostile_address_leaves_the_one_that_ssh_knows(address: str, tmp_path: Path) -> None:
    said = f"{LOOKUP}{STARTS}printf \"$t ADDRESS a 1 {address} 22\\n\"\n{SAYS_IT}"
    candidates = _run_login(said, tmp_path)[2]
    assert [str(candidate) for candidate in candidates] == [LOOPBACK]


def test_lines_in_any_encoding_pass(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run_login(LOOKUP + "printf '\\377\\376 \\303\\251\\n'\n" + SAYS_IT, tmp_path)[0] == KEY
    assert "é" in capfd.readouterr().err


# -- a slow transfer -------------------------------------------------------------------------------------------

SLOW = """t=$MOSH_TOKEN; head -c 16 >/dev/null; echo "$t NEED 3.11.2"; head -c 20000 >/dev/null; echo "$t GOT 20000"
sleep 1; echo banner; cat >/dev/null & echo "$t SERVER srv"
"""


def test_a_transfer_that_takes_long_shows_how_far_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert _run_login(LOOKUP + SLOW + SAYS_IT, tmp_path, server="")[0] == KEY
        shown = capfd.readouterr().err
        assert bool(re.search(r"sending \d+ KB to there, once: \d+ %", shown)) == terminal
        assert "banner\n" in shown and ("\x1b" in shown) == terminal
        assert not terminal or "\r\x1b[K" in shown.rpartition("once: ")[2], "the progress was not taken away"


TWICE = """t=$MOSH_TOKEN; head -c 16 >/dev/null
for n in 1 2; do echo "$t NEED 3.11.$n"; read -r token size; head -c "$size" >/dev/null; done
"""


def test_a_second_python_that_wants_the_program_gets_it_too(tmp_path: Path) -> None:
    """As after one that has no AES-OCB, which shows only when the program runs."""
    assert _run_login(LOOKUP + TWICE + STARTS + SAYS_IT, tmp_path, server="")[0] == KEY


def test_a_quick_transfer_shows_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(mosh, "PROGRESS_AFTER_MS", 60_000)
    _run_login(LOOKUP + SLOW + SAYS_IT, tmp_path, server="")
    assert capfd.readouterr().err == "banner\n"
def test_what_a_host_prints_cannot_make_the_terminal_do_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It could ask for the clipboard and have the answer typed into the session that follows."""
    said = "\\033[1mwelcome\\033[m \\303\\251\\033]52;c;?\\007\\033[c\\302\\233c\\r\\n"
    assert _run_login(f"{LOOKUP}printf '{said}'; printf '{said}' >&2\n{SAYS_IT}", tmp_path)[0] == KEY
    shown = capfd.readouterr().err
    assert "welcome é" in shown
    assert all(char == "\n" or char.isprintable() for char in shown)


@given(st.text())
def test_nothing_but_text_is_printable(text: str) -> None:
    shown = mosh.printable(text)
    assert not set(shown) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160)]))
    assert mosh.printable(shown) == shown


def test_a_local_server_needs_an_address_of_this_machine() -> None:
    options = mosh.LoginOptions()
    options.local = True
    options.host = "192.0.2.1"      # RFC 5737: nobody's
    with pytest.raises(mosh.BootstrapError, match=r"^192\.0\.2\.1 is no address of this machine"):
        mosh.Login(options, 256).start()
    assert mosh.is_here(mosh.resolve("127.0.0.1", 60001, "inet")[0])


def test_a_local_server_that_a_signal_ends_gives_the_status_of_a_shell() -> None:
    login = mosh.Login(_login(local=True, host="127.0.0.1", server="kill -KILL $$;"), 256)
    login.start()
    try:
        with pytest.raises(mosh.BootstrapError, match=r"exit status 137") as error:
            login.finish()
    finally:
        login.close()
    assert error.value.status == 137


def test_an_error_that_quotes_the_host_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert mosh.main(["mosh.py", "--local", "--", "a\x1b]52;c;?\x07b"]) != 0
    assert "\x1b" not in capsys.readouterr().err
