"""Section 18: the client borrows the user's terminal and gives it back, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import random
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grammar
import mosh
import peers
from peers import LOOPBACK, running_server, session_env
from ptys import PtyProcess, on_a_terminal
from terminal_streams import terminal_bytes

KEY = "AAECAwQFBgcICQoLDA0ODw"
QUIT = b"\x1e."
EXITING = b"[mosh is exiting.]"
LIMIT_SECONDS = 20.0


# -- terminfo --------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal type of our own making, in the place where terminfo looks first."""
    source = tmp_path / "source"
    source.write_text("moshtest|for a test,\n\tbce, colors#99, ech=\\E[%p1%dX, smcup=\\E[open, rmcup=\\E[close,\n")
    try:
        subprocess.run(["tic", "-x", "-o", str(tmp_path), str(source)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("tic is not installed")
    monkeypatch.setenv("TERMINFO", str(tmp_path))
    yield


ASK = """
import sys, mosh
try:
    t = mosh.Terminfo(sys.argv[1])
    print([t.open, t.close, t.ech, t.bce, t.colors, t.title])
except mosh.BootstrapError as error:
    print("refused:", ascii(str(error)))
"""


def _terminfo(term: str) -> str:
    """What Terminfo says of a type. Asked in a new process, since curses takes only the first type of each."""
    words = [sys.executable, "-c", ASK, term]
    finished = subprocess.run(words, cwd=peers.REPOSITORY, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert finished.stderr == ""
    return finished.stdout.rstrip("\n")


@pytest.mark.usefixtures("described")
def test_a_terminal_is_what_terminfo_says() -> None:
    assert _terminfo("moshtest") == "[b'\\x1b[open', b'\\x1b[close', True, True, 99, False]"


@pytest.mark.parametrize(
    ("term", "end"), [("xterm-256color", "256, True]"), ("linux", "8, False]"), ("dumb", "-1, False]")]
)
def test_known_terminals(term: str, end: str) -> None:
    assert _terminfo(term).endswith(end)


def test_a_dumb_terminal_has_no_alternate_screen() -> None:
    assert _terminfo("dumb") == "[b'', b'', False, False, -1, False]"


@pytest.mark.parametrize("term", ["xterm-made-up", "screen.made-up", "tmux-made-up", "alacritty-made-up"])
def test_a_known_family_without_its_entry_will_do(term: str) -> None:
    assert _terminfo(term) == "[b'\\x1b[?1049h', b'\\x1b[?1049l', False, False, 8, True]"


UNKNOWN = ["", "no-such-terminal", "../../../etc/passwd", "x" * 10_000, "\udcff", "a b"]


@pytest.mark.parametrize("term", UNKNOWN, ids=ascii)
def test_an_unknown_terminal_is_refused(term: str) -> None:
    answer = _terminfo(term)
    assert answer.startswith("refused:") and "TERM" in answer


@pytest.mark.parametrize(
    ("environ", "key", "prefix"),
    [({}, 0x1E, "[mosh] "), ({"MOSH_ESCAPE_KEY": "~", "MOSH_TITLE_NOPREFIX": ""}, ord("~"), "")],
)
def test_what_the_environment_says_reaches_the_core(
    environ: dict[str, str], key: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOSH_ESCAPE_KEY", "MOSH_TITLE_NOPREFIX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    terminfo = object.__new__(mosh.Terminfo)  # asking curses would settle the type of this process's terminal
    terminfo.ech = terminfo.bce = terminfo.title = True
    candidates = [mosh.Candidate(socket.AF_INET, (LOOPBACK, 9))]
    channel = mosh.Channel(mosh.choose_cipher()(bytes(16)), mosh.TO_SERVER)
    core = mosh._make_client_core(channel, candidates, 9, mosh.ClientOptions(), terminfo, named=False)
    assert (core._escape_key.key, core._title_prefix) == (key, prefix)


# -- raw mode --------------------------------------------------------------------------------------------------

# A program that takes its terminal, says so, and ends in the way that its argument names.
BORROW = """
import os, signal, sys, mosh
def loop():
    sys.stdin.readline()
with mosh.RawTerminal(mosh.Terminfo("dumb"), init=False) as terminal:
    os.write(1, b"borrowed;")
    if os.read(0, 1) == b"f":
        raise SystemExit(3)
    terminal.leave()
    os.write(1, b"back;")
    os.read(0, 100)
    terminal.enter()
    os.write(1, b"borrowed again;")
    os.read(0, 1)
"""


@pytest.fixture
def borrower() -> Iterator[PtyProcess]:
    """The program above."""
    with on_a_terminal([sys.executable, "-c", BORROW], {**os.environ, "PYTHONPATH": str(peers.REPOSITORY)}) as program:
        yield program


def _flags(modes: list[object]) -> tuple[int, int, int]:
    """Echo, line editing and output processing of a terminal."""
    _, output, _, local, *_ = modes
    assert isinstance(output, int) and isinstance(local, int)
    return local & termios.ECHO, local & (termios.ICANON | termios.ISIG), output & termios.OPOST


def test_raw_mode_is_taken_and_given_back(borrower: PtyProcess) -> None:
    assert all(_flags(borrower.modes_before))
    borrower.read_until(lambda output: b"borrowed;" in output)
    assert not any(_flags(borrower.modes()))
    borrower.type(b"s")
    borrower.read_until(lambda output: b"back;" in output)
    assert borrower.modes() == borrower.modes_before
    borrower.type(b"\n")
    borrower.read_until(lambda output: b"again;" in output)
    assert not any(_flags(borrower.modes()))
    borrower.type(b"x")
    assert borrower.wait() == 0
    assert borrower.modes() == borrower.modes_before


def test_an_exception_gives_the_terminal_back(borrower: PtyProcess) -> None:
    borrower.read_until(lambda output: b"borrowed;" in output)
    borrower.type(b"f")
    assert borrower.wait() == 3
    assert borrower.modes() == borrower.modes_before
    assert borrower.output.endswith(mosh._CLOSE_SEQUENCES)


def test_leaving_twice_writes_nothing_twice(borrower: PtyProcess) -> None:
    borrower.read_until(lambda output: b"borrowed;" in output)
    borrower.type(b"s")
    borrower.read_until(lambda output: b"back;" in output)
    assert borrower.output.count(mosh._CLOSE_SEQUENCES) == 1


def test_input_is_utf8_for_the_kernel_and_bytes_pass_unchanged(borrower: PtyProcess) -> None:
    borrower.read_until(lambda output: b"borrowed;" in output)
    modes = borrower.modes()
    assert isinstance(modes[0], int) and isinstance(modes[2], int)
    assert modes[0] & mosh._IUTF8
    changing = termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON | termios.ISTRIP | termios.BRKINT
    assert not modes[0] & changing
    assert modes[2] & termios.CSIZE == termios.CS8


def test_what_is_no_terminal_is_refused(tmp_path: Path) -> None:
    code = "import mosh; mosh.RawTerminal(mosh.Terminfo('dumb'))"
    (tmp_path / "input").write_bytes(b"")
    with (tmp_path / "input").open("rb") as no_terminal:
        finished = subprocess.run(
            [sys.executable, "-c", code], stdin=no_terminal, cwd=peers.REPOSITORY, capture_output=True, text=True
        )
    assert "BootstrapError: standard input is not a terminal" in finished.stderr


# -- sockets ---------------------------------------------------------------------------------------------------


class Sockets:
    """Stands in for mosh.ClientSockets, with what the system answers to a datagram for each candidate."""

    def __init__(self, answers: dict[mosh.Candidate, int]) -> None:
        self._answers = answers
        self.sent: list[mosh.Candidate] = []

    def send(self, _data: bytes, candidate: mosh.Candidate) -> None:
        """See mosh.ClientSockets."""
        if self._answers.get(candidate):
            raise OSError(self._answers[candidate], "refused")
        self.sent.append(candidate)


HERE, THERE = (mosh.Candidate(socket.AF_INET, (host, 60001)) for host in ("192.0.2.1", "192.0.2.2"))


def _paste_through(sockets: Sockets) -> mosh.Client:
    """Send the first datagrams of a long paste, by a client that does not know yet which of two addresses answers."""
    channel = mosh.Channel(mosh.choose_cipher()(bytes(16)), mosh.TO_SERVER)
    client = mosh.Client.__new__(mosh.Client)
    client._core = core = mosh.ClientCore(
        channel, 0, width=80, height=24, candidates=[HERE, THERE], port=60001, random_bytes=os.urandom
    )
    client._sockets = sockets  # type: ignore[assignment]
    core.receive_keys(bytes(random.Random(1).choices(range(0x21, 0x7F), k=20_000)), 0)
    client._send(0)
    return client


def test_candidates_beside_the_first_get_some_copies() -> None:
    sockets = Sockets({})
    _paste_through(sockets)
    assert [sockets.sent.count(candidate) for candidate in (HERE, THERE)] == [
        mosh.BURST_DATAGRAMS, mosh.COPY_DATAGRAMS,
    ]


@pytest.mark.parametrize(("number", "mtu_bytes"), [(errno.EMSGSIZE, mosh.FALLBACK_MTU_BYTES), (errno.ENOBUFS, 1_252)])
def test_what_the_system_finds_too_large_for_any_candidate_is_sent_smaller(number: int, mtu_bytes: int) -> None:
    assert _paste_through(Sockets({THERE: number}))._core.transport.datagrams.mtu.bytes == mtu_bytes


def test_a_candidate_without_a_path_does_not_keep_the_others_from_their_copies() -> None:
    sockets = Sockets({HERE: errno.ENETUNREACH})
    core = _paste_through(sockets)._core
    assert sockets.sent == [THERE] * mosh.COPY_DATAGRAMS
    assert "sendto" not in core.bar.text(0) and core.roaming.next_timeout() is None  # another one has been reached


def test_a_user_is_told_while_no_candidate_can_be_reached() -> None:
    answers = {HERE: errno.ENETUNREACH, THERE: errno.ENETUNREACH}
    client = _paste_through(Sockets(answers))
    core = client._core
    assert "sendto: refused" in core.bar.text(0) and core.roaming.next_timeout() == mosh.RETRY_MS
    answers.clear()
    for at in (mosh.RETRY_MS, 2 * mosh.RETRY_MS):
        core.transport.hurry(at)
        client._send(at)
    at = mosh.RETRY_MS + mosh.MESSAGE_MS
    assert "sendto" in core.bar.text(at - 1) and "sendto" not in core.bar.text(at)


def test_port_hopping_keeps_a_bounded_number_of_old_sockets() -> None:
    sockets = mosh.ClientSockets()
    opened = [sockets.open(socket.AF_INET) for _ in range(3 * mosh.MAX_PORTS)]
    assert sockets.all == opened[-mosh.MAX_PORTS :]
    assert [udp.fileno() for udp in opened[: -mosh.MAX_PORTS]] == [-1] * (2 * mosh.MAX_PORTS)
    sockets.close_old()
    assert sockets.all == opened[-1:]
    sockets.close()
    assert sockets.all == [] and opened[-1].fileno() == -1


def test_it_sends_from_the_newest_socket_of_the_right_family() -> None:
    sockets = mosh.ClientSockets()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((LOOPBACK, 0))
        server.settimeout(LIMIT_SECONDS)
        candidate = mosh.Candidate(socket.AF_INET, server.getsockname())
        sources = []
        for _ in range(2):
            sockets.open(socket.AF_INET)
            sockets.send(b"x", candidate)
            sources.append(server.recvfrom(10)[1][1])
    assert sources == [udp.port for udp in sockets.all] and len(set(sources)) == 2
    sockets.close()


def test_closing_old_sockets_keeps_one_of_each_family() -> None:
    sockets = mosh.ClientSockets()
    try:
        kept = [sockets.open(family) for family in (socket.AF_INET, socket.AF_INET6) for _ in range(2)][1::2]
    except OSError:
        pytest.skip("this machine has no IPv6")
    sockets.close_old()
    assert sockets.all == kept
    sockets.close()


@pytest.mark.parametrize(("one", "other", "equal"), [
    ((2, ("1.2.3.4", 1)), (2, ("1.2.3.4", 1)), True), ((2, ("1.2.3.4", 1)), (2, ("1.2.3.4", 2)), False),
    ((2, ("::1", 1)), (10, ("::1", 1)), False),
])  # fmt: skip
def test_candidates_are_equal_by_value(
    one: tuple[int, tuple[str, int]], other: tuple[int, tuple[str, int]], equal: bool
) -> None:
    assert (mosh.Candidate(*one) == mosh.Candidate(*other)) == equal
    assert len({mosh.Candidate(*one), mosh.Candidate(*other)}) == 2 - equal
    assert str(mosh.Candidate(*one)) == one[1][0]


def test_a_scope_is_part_of_how_an_address_is_written() -> None:
    name = socket.if_indextoname(1)
    assert str(mosh.Candidate(socket.AF_INET6, ("fe80::1", 60001, 0, 1))) == f"fe80::1%{name}"
    assert str(mosh.Candidate(socket.AF_INET6, ("fe80::1", 60001, 0, 9_999_999))).startswith("fe80::1")


def test_a_hop_opens_one_socket_of_each_family() -> None:
    sockets = mosh.ClientSockets()
    for _ in range(3 * mosh.MAX_PORTS):
        sockets.hop([socket.AF_INET])
        assert len(sockets.all) <= mosh.MAX_PORTS
    newest = sockets.all[-1]
    sockets.hop([socket.AF_INET, 9_999])  # a family that this system does not have
    assert sockets.all[-2] is newest
    sockets.close()


# -- looking up a name ------------------------------------------------------------------------------------------


def _answer(lookup: mosh.Lookup) -> list[mosh.Candidate]:
    """What it answers in its own time."""
    now = mosh.monotonic_ms()
    lookup.start(now)
    lookup.start(now)                       # while it runs another start does nothing
    while lookup.readable():
        ready = mosh.wait(lookup.readable(), (), lookup.next_timeout())
        found = lookup.answer(ready, mosh.monotonic_ms())
        if found:
            return found
    return []


def test_a_name_is_looked_up_beside_the_session() -> None:
    lookup = mosh.Lookup(["localhost", "no-such-name.invalid", "\udcff", LOOPBACK], 60001)
    assert mosh.Candidate(socket.AF_INET, (LOOPBACK, 60001)) in _answer(lookup)
    assert lookup.readable() == [] and lookup.next_timeout() is None


def test_only_the_family_that_is_wanted_is_found() -> None:
    assert _answer(mosh.Lookup([LOOPBACK], 60001, socket.AF_INET6)) == []
    assert _answer(mosh.Lookup([LOOPBACK, "::1"], 60001, socket.AF_INET6)) == [
        mosh.Candidate(socket.AF_INET6, ("::1", 60001, 0, 0))
    ]


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh.Lookup, "_PROGRAM", "import time; time.sleep(1000)")
    lookup = mosh.Lookup(["name"], 60001)
    lookup.start(5_000)
    assert lookup.next_timeout() == 5_000 + mosh.LOOKUP_LIMIT_MS
    assert lookup.answer((), 5_000 + mosh.LOOKUP_LIMIT_MS - 1) == [] and lookup.readable()
    process = lookup._process
    assert process is not None
    assert lookup.answer((), 5_000 + mosh.LOOKUP_LIMIT_MS) == [] and not lookup.readable()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("output", [
    "", "x", "2", "2 1.2.3.4 port", "9999 1.2.3.4 60001", "\\xff", "2 1.2.3.4 1 " * 9_000, "é",
])  # fmt: skip
def test_what_is_no_address_is_not_one(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh.Lookup, "_PROGRAM", f"import sys; sys.stdout.buffer.write({output.encode()!r})")
    lookup = mosh.Lookup(["name"], 60001)
    assert _answer(lookup) == [] and not lookup.readable()
    assert len(lookup._output) <= 2 * mosh.LOOKUP_LIMIT_BYTES


@pytest.mark.parametrize("name", ["a\0b", "-x", "", "a" * 300_000])
def test_what_is_no_name_is_not_found(name: str) -> None:
    assert mosh.Candidate(socket.AF_INET, (LOOPBACK, 60001)) not in _answer(mosh.Lookup([name], 60001, socket.AF_INET6))


# -- the whole client ------------------------------------------------------------------------------------------


def _environ(home: Path, key: str, **extra: str) -> dict[str, str]:
    return {**session_env(home), "TERM": "xterm-256color", "MOSH_KEY": key, **extra}


def _type_and_see(client: PtyProcess) -> None:
    """Type a letter, once the terminal is the client's, and see it come back."""
    client.read_until(lambda output: b"\x1b[?1h" in output)
    client.type(b"Z")
    client.read_until(lambda output: b"Z" in output)


@pytest.mark.parametrize("size", [(80, 24), (0, 0), (1, 1)], ids=str)
def test_a_session_on_a_terminal_of_any_size(home: Path, size: tuple[int, int]) -> None:
    with running_server("ours", session_env(home), command=("cat",)) as server, on_a_terminal(
        peers.client_command("ours", server.port), _environ(home, server.key), size
    ) as client:
        _type_and_see(client)
        assert not any(_flags(client.modes()))
        client.type(QUIT)
        assert client.wait() == 0, client.output
        assert client.modes() == client.modes_before
    assert client.output.rstrip().endswith(EXITING)
    assert mosh._CLOSE_SEQUENCES in client.output
    assert server.key.encode() not in client.output


def test_a_session_whose_output_goes_through_a_pipe(home: Path) -> None:
    """There is no terminal to open a second time, for writing without waiting."""
    with running_server("ours", session_env(home), command=("cat",)) as server, on_a_terminal(
        ["sh", "-c", '"$@" | cat', "sh", *peers.client_command("ours", server.port)], _environ(home, server.key)
    ) as client:
        _type_and_see(client)
        client.type(QUIT)
        assert client.wait() == 0
        assert client.modes() == client.modes_before
    assert mosh._CLOSE_SEQUENCES in client.output and client.output.rstrip().endswith(EXITING)


def test_a_client_whose_output_nobody_reads_can_be_told_to_end(home: Path) -> None:
    """It does not wait inside a write, even where the descriptor would: a pipe that is full."""
    pipe = home / "pipe"
    os.mkfifo(pipe)
    full = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while os.write(full, bytes(select.PIPE_BUF)):
                pass
        with running_server("ours", session_env(home), command=("cat",)) as server, on_a_terminal(
            ["sh", "-c", 'exec "$@" >"$0"', str(pipe), *peers.client_command("ours", server.port)],
            _environ(home, server.key),
        ) as client:
            peers.wait_until(lambda: client.modes() != client.modes_before, LIMIT_SECONDS, "the raw mode")
            client.send_signal(signal.SIGTERM)
            client.wait()
            assert client.modes() == client.modes_before
    finally:
        os.close(full)


def test_quitting_before_any_answer_says_what_to_check(home: Path) -> None:
    """It ends with 1, the terminal restored, and names the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        port = silent.getsockname()[1]
        with on_a_terminal(peers.client_command("ours", port), _environ(home, KEY)) as client:
            client.read_until(lambda output: b"UDP port" in output)
            client.type(QUIT)
            assert client.wait() == 1
            assert client.modes() == client.modes_before
    farewell = client.output.rpartition(mosh._CLOSE_SEQUENCES)[2]
    assert LOOPBACK.encode() in farewell and str(port).encode() in farewell
    assert KEY.encode() not in client.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_session_and_restores_the_terminal(home: Path, number: signal.Signals) -> None:
    with running_server("ours", session_env(home), command=("cat",)) as server, on_a_terminal(
        peers.client_command("ours", server.port), _environ(home, server.key)
    ) as client:
        _type_and_see(client)
        client.send_signal(number)
        assert client.wait() == 0, client.output
        assert client.modes() == client.modes_before
    assert EXITING in client.output


def test_no_init_leaves_the_alternate_screen_alone(home: Path) -> None:
    with running_server("ours", session_env(home), command=("cat",)) as server, on_a_terminal(
        peers.client_command("ours", server.port), _environ(home, server.key, MOSH_NO_TERM_INIT="")
    ) as client:
        _type_and_see(client)
        client.type(QUIT)
        client.wait()
    assert b"\x1b[?1049h" not in client.output and b"\x1b[?1049l" not in client.output


def test_the_goodbye_of_the_server_needs_no_further_waiting() -> None:
    """A client that only wakes when it asked to, or when a datagram comes, leaves soon after the server has."""
    key, make, now, left_at = mosh.Key(bytes(16)), mosh.choose_cipher(), 0, 0
    client = mosh.ClientCore(
        mosh.Channel(make(key.raw), mosh.TO_SERVER), now, width=20, height=3, candidates=["server"], port=1,
        random_bytes=bytes,
    )
    server = mosh.ServerCore(mosh.Channel(make(key.raw), mosh.TO_CLIENT), now, width=20, height=3, random_bytes=bytes)
    while mosh.Phase.CONNECTED in (client.phase, server.phase) or client.is_connecting:
        assert not left_at or now <= left_at + 100
        for datagram in client.datagrams_to_send(now):
            server.receive_datagram(datagram, "client", now)
        if server.phase is mosh.Phase.CONNECTED and now > 500:
            server.start_shutdown(now)
        if server.phase is mosh.Phase.CLOSED:
            left_at = left_at or now
        for datagram in server.datagrams_to_send(now):
            client.receive_datagram(datagram, "server", now)
        at = server.next_timeout()
        now = max(now + 1, min(client.next_timeout(), client.next_timeout() if at is None else at))
    assert server.phase is client.phase is mosh.Phase.CLOSED
    assert server.transport.clean and client.transport.clean


@pytest.mark.parametrize(("number", "goes_on"), [(errno.EAGAIN, True), (errno.EIO, False)])
def test_keys_that_another_program_has_read_are_not_the_end_of_input(
    number: int, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_descriptor: int, _size: int) -> bytes:
        raise OSError(number, os.strerror(number))

    client = _paste_through(Sockets({}))
    client._stdin_open = True
    monkeypatch.setattr(os, "read", read)
    keys = client._read_keys(alone=True)
    if keys is not None:
        client._take_keys(keys, 0)
    assert client._stdin_open == goes_on


class HandServer:
    """A server that does what a test wants, in the test's own process."""

    def __init__(self) -> None:
        self.udp = mosh.UdpSocket(socket.AF_INET)
        self.udp.bind(LOOPBACK, 0)
        cipher = mosh.choose_cipher()(mosh.Key.from_text(KEY).raw)
        self.core = mosh.ServerCore(
            mosh.Channel(cipher, mosh.TO_CLIENT), mosh.monotonic_ms(), width=1, height=1, random_bytes=os.urandom
        )

    def serve_until(self, done: Callable[[], bool]) -> None:
        """Be a server until then."""
        core, udp, end = self.core, self.udp, mosh.monotonic_ms() + int(1000 * LIMIT_SECONDS)
        while not done():
            assert mosh.monotonic_ms() < end
            at, soon = core.next_timeout(), mosh.monotonic_ms() + 50
            mosh.wait((udp,), (), soon if at is None else min(at, soon))
            received = udp.receive()
            if received is not None:
                core.receive_datagram(*received[:2], mosh.monotonic_ms())
            for datagram in core.datagrams_to_send(mosh.monotonic_ms()):
                udp.send(datagram, core.peer)

    def write(self, output: bytes) -> None:
        """Let the program write that, and serve until nothing more happens."""
        self.core.receive_host_output(output, mosh.monotonic_ms())
        quiet_at = mosh.monotonic_ms() + 300
        self.serve_until(lambda: mosh.monotonic_ms() >= quiet_at)

    def read(self, keys: bytes) -> None:
        """Serve until the program has read that."""
        self.serve_until(lambda: self.core.host_input == keys)
        self.core.host_input.clear()


@contextlib.contextmanager
def _hand_served(home: Path, **extra: str) -> Iterator[tuple[HandServer, PtyProcess]]:
    server = HandServer()
    with contextlib.closing(server.udp), on_a_terminal(
        peers.client_command("ours", server.udp.port), _environ(home, KEY, **extra), (80, 24)
    ) as client:
        client.read_until(lambda output: b"\x1b[?1h" in output)
        server.serve_until(lambda: server.core.size == (80, 24))
        yield server, client


def test_keys_come_behind_the_size_of_the_window_that_they_were_typed_into(home: Path) -> None:
    """A client that finds both at once tells the server of the window first."""
    with _hand_served(home) as (server, client):
        length = server.core.transport.remote.state.length
        client.send_signal(signal.SIGSTOP)
        client.resize(100, 40)
        client.type(b"k")
        client.send_signal(signal.SIGCONT)
        server.serve_until(lambda: bool(server.core.host_input))
        resize, key = server.core.transport.remote.state.events_since(length)[-2:]
        assert isinstance(resize, mosh.Resize) and (resize.width, resize.height) == (100, 40) and key == ord("k")


def test_a_letter_that_comes_with_a_prompt_for_a_password_is_not_shown(home: Path) -> None:
    """Nor one that comes with anything else which may change where it belongs."""
    with _hand_served(home, MOSH_PREDICTION_DISPLAY="always") as (server, client):
        server.write(b"$ ")
        client.type(b"a")
        server.read(b"a")
        server.write(b"a")
        client.type(b"b")
        client.read_until(lambda output: b"b" in output)  # before the server could have said so
        server.read(b"b")
        server.write(b"b")
        client.send_signal(signal.SIGSTOP)
        server.write(b"\r\nPassword: ")
        client.type(b"k")
        client.send_signal(signal.SIGCONT)
        server.read(b"k")
        server.write(b"\r\nWelcome")
        assert b"k" not in client.read_until(lambda output: b"Welcome" in output)


def test_a_terminal_that_vanishes_ends_the_client(home: Path) -> None:
    with running_server("ours", session_env(home), command=("cat",)) as server:
        keeper, user = pty.openpty()
        process = subprocess.Popen(
            peers.client_command("ours", server.port), env=_environ(home, server.key), stdin=user, stdout=user,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )
        os.close(user)
        os.read(keeper, 1)
        os.close(keeper)
        assert process.wait(timeout=LIMIT_SECONDS) in (0, 1)


# -- what a server can make the user's terminal do --------------------------------------------------------------

HOSTILE = st.lists(
    terminal_bytes(max_pieces=6) | st.binary(max_size=40) | st.sampled_from([
        b"\x1b[c", b"\x1b[>c", b"\x1b[6n", b"\x1b[5n", b"\x1b[?2026$p", b"\x1bZ", b"\x1b[21t", b"\x1b[x", b"\x05",
        b"\x1b]52;c;?\x07", b"\x1b]52;c;?;?\x07", b"\x1b]52;c;SGVsbG8=\x07", b"\x1b]52;p;?\x07", b"\x1b]10;?\x07",
        b"\x1b]0;a\x7fb\x07", b"\x1b]2;a\xc2\x9bb\x07", b"\x1b]2;" + b"t" * 400 + b"\x1b\\", b"\x1bP+q544e\x1b\\",
        b"\x1bP$qm\x1b\\", b"\x1b]50;?\x07", b"\x1b]1337;File=:x\x07", b"\x1b_Gi=1\x1b\\", b"\x1b[201~", b"\x1b[?1h",
        b"\x1b[?1049h", b"\x1b[5i", b"\x1b[4i", b"\x1b#8", b"\xed\xa0\x80", b"\xf4\x8f\xbf\xbd", b"\xf4\x80\x80\x81",
    ]), max_size=6,
).map(b"".join)


def _host_message(parts: list[bytes | tuple[int, int]]) -> bytes:
    return b"".join(
        mosh._instruction(mosh.HOST_RESIZE, mosh.Resize(*part).encode()) if isinstance(part, tuple)
        else mosh._instruction(mosh.HOST_BYTES, mosh.encode_field(mosh.HOST_STRING, part))
        for part in parts
    )


def _drawn(messages: list[bytes], answer: bytes = b"") -> bytes:
    """What a client draws on its terminal while a server tells it `messages`."""
    make = mosh.choose_cipher()
    client = mosh.ClientCore(
        mosh.Channel(make(bytes(16)), mosh.TO_SERVER), 0, width=20, height=5, candidates=["server"], port=1,
        random_bytes=bytes, mode=mosh.PredictionMode.ALWAYS,
    )
    peer = mosh.DatagramLayer(mosh.Channel(make(bytes(16)), mosh.TO_CLIENT), 0, is_server=True)
    client.receive_keys(answer, 0)
    drawn, fragmenter = client.frame_to_draw(0), mosh.Fragmenter()
    for now, message in enumerate(messages, 1):
        for fragment in fragmenter.fragments(mosh.Instruction(now - 1, now, 0, 0, message), 1_200):
            with contextlib.suppress(mosh.PacketError):
                client.receive_datagram(peer.seal(fragment.encode(), now), "server", now)
        client.receive_keys(b"x", now)
        drawn += client.frame_to_draw(now)
    return drawn + client.last_frame(99)


MESSAGE = st.lists(HOSTILE | st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=4).map(_host_message)


@given(st.lists(MESSAGE | st.binary(max_size=60), max_size=4), st.sampled_from([b"", b"\x1b[?2026;2$y"]))
@settings(max_examples=300, deadline=None)
def test_whatever_a_server_sends_only_the_sequences_of_the_grammar_reach_the_terminal(
    messages: list[bytes], answer: bytes
) -> None:
    drawn = _drawn(messages, answer)
    assert grammar.unexpected(drawn) == ""
    terminal = mosh.Emulator(20, 5)
    terminal.feed(drawn)
    assert terminal.take_replies() == b""           # nothing in it is a question


@pytest.mark.parametrize("question", [b"?", b"?;?", b"c;?", b"aGk=?", b"a b"])
def test_a_server_cannot_ask_the_terminal_for_the_clipboard(question: bytes) -> None:
    """A terminal would answer with what the user has copied, and that would be typed into the session."""
    said = [_host_message([b"\x1b]52;c;aGk=\x07"]), _host_message([b"\x1b]52;c;" + question + b"\x07"])]
    assert _drawn(said[:1]).count(b"\x1b]52;") == 1
    assert _drawn(said).count(b"\x1b]52;") == 1


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_delete_in_a_title_stays_out_of_the_terminal(number: int) -> None:
    drawn = _drawn([_host_message([b"\x1b]%d;a\x7fb\x07" % number])])
    assert b"ab\x07" in drawn and b"\x7f" not in drawn


@pytest.mark.parametrize("written", [
    b"\x1b[c", b"\x1b[6n", b"\x1b]52;c;?\x07", b"\x1b]2;a\x1b\\", b"\x9b", b"\x1b[?1049h", b"\x1bPq\x1b\\", b"\x1b[m",
])
def test_the_grammar_lets_nothing_else_through(written: bytes) -> None:
    assert grammar.unexpected(b"text" + (written.decode("latin-1").encode()))


def test_a_paste_arrives_in_its_brackets_byte_by_byte() -> None:
    """Nothing on the way adds, removes or closes a bracket: what is inside stays inside."""
    paste = b"\x1b[200~rm -rf /\r\x1b[A\x1bOA\x00\xff" + b"x" * 200 + b"\x1b[201~"
    for cut in range(len(paste)):
        keys = mosh.CursorKeyFilter()
        assert keys.filter(paste[:cut], True) + keys.filter(paste[cut:], True) == paste
