"""Section 17: the server finds a port, a locale and an environment for its child, announces itself and detaches."""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import mosh
import peers
from conftest import link_local_address
from peers import LOOPBACK, Server, process_alive, running_server, session_env, wait_until

LIMIT_SECONDS = 20.0
Family = socket.AddressFamily


def _family_works(family: Family, host: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _family_works(socket.AF_INET6, "::1"), reason="this machine has no IPv6")


def test_a_server_announces_itself_and_detaches(home: Path) -> None:
    with running_server("ours", session_env(home), command=("cat",)) as server:
        assert server.alive()
        assert server.port >= mosh.FIRST_PORT


# -- binding ---------------------------------------------------------------------------------------------------


def _options(ports: tuple[int, int] = (0, 0), address: str = "") -> mosh.ServerOptions:
    options = mosh.ServerOptions()
    options.ports, options.bind_address = ports, address
    return options


@contextmanager
def _bound(options: mosh.ServerOptions) -> Iterator[tuple[mosh.UdpSocket, str]]:
    """A socket that the server chose, and the address it is bound to."""
    udp = mosh.bind_server(options)
    try:
        with socket.socket(fileno=os.dup(udp.fileno())) as view:
            yield udp, str(view.getsockname()[0])
    finally:
        udp.close()


@contextmanager
def _row_of_free_ports(count: int) -> Iterator[tuple[int, list[socket.socket]]]:
    """`count` neighbouring ports that are all held here, on loopback; closing one of the sockets frees its port."""
    for first in range(61000, 64000, count):
        with ExitStack() as stack:
            held = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
            try:
                for port, each in enumerate(held, first):
                    each.bind((LOOPBACK, port))
            except OSError:
                continue
            yield first, held
            return
    pytest.skip("no neighbouring free ports on this machine")


def test_port_zero_is_any_port() -> None:
    with _bound(_options((0, 0), LOOPBACK)) as (udp, host):
        assert udp.port > 0 and host == LOOPBACK


def test_the_default_is_the_lowest_free_port_of_the_range() -> None:
    options = mosh.ServerOptions()
    options.bind_address = LOOPBACK
    with _bound(options) as (first, _), _bound(options) as (second, _):
        assert mosh.FIRST_PORT <= first.port < second.port <= mosh.LAST_PORT


def test_where_ssh_got_to_is_no_wish_where_every_address_answers_by_itself() -> None:
    options = _options(address=LOOPBACK)
    options.by_ssh = True
    with _bound(options) as (_, host):
        assert host in (("::", "0.0.0.0") if sys.platform.startswith("linux") else (LOOPBACK,))


def test_a_link_local_address_is_taken_with_the_interface_that_it_names(capfd: pytest.CaptureFixture[str]) -> None:
    host = socket.getnameinfo(link_local_address(), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
    with _bound(_options((0, 0), host)) as (udp, bound):
        assert (bound, udp.family) == (host.partition("%")[0], socket.AF_INET6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("free", [0, 1, 3])
def test_occupied_ports_are_passed_over(free: int) -> None:
    with _row_of_free_ports(4) as (first, held):
        held[free].close()
        with _bound(_options((first, first + 3), LOOPBACK)) as (udp, _):
            assert udp.port == first + free


def test_a_free_port_outside_the_range_is_not_taken() -> None:
    with _row_of_free_ports(4) as (first, held):
        held[0].close()
        held[3].close()
        with pytest.raises(mosh.BootstrapError, match=f"{first + 1}-{first + 2}"):
            mosh.bind_server(_options((first + 1, first + 2), LOOPBACK))


def test_a_single_occupied_port_is_named() -> None:
    with _row_of_free_ports(1) as (first, _), pytest.raises(mosh.BootstrapError, match=rf"\b{first}\b") as error:
        mosh.bind_server(_options((first, first), LOOPBACK))
    assert str(error.value).endswith("Address already in use; -p chooses others") and error.value.status == 1


def _own_descriptors() -> list[Path]:
    folder = Path("/proc/self/fd")
    return list(folder.iterdir()) if folder.exists() else []


def test_a_failing_bind_leaks_no_descriptors() -> None:
    with _row_of_free_ports(4) as (first, _):
        before = _own_descriptors()
        with pytest.raises(mosh.BootstrapError):
            mosh.bind_server(_options((first, first + 3), LOOPBACK))
        after = _own_descriptors()
        assert len(after) == len(before)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "not an address", "999.1.1.1", ":::", "a..b"])
def test_an_address_that_is_not_ours_gives_any_address_and_a_word(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with _bound(_options((0, 0), address)) as (_, host):
        assert host in ("::", "0.0.0.0")
    assert f"Error binding to IP {address}" in capfd.readouterr().err


@needs_ipv6
def test_an_ipv6_address_is_taken() -> None:
    with _bound(_options((0, 0), "::1")) as (udp, host):
        assert (udp.family, host) == (socket.AF_INET6, "::1")


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, LOOPBACK), pytest.param(socket.AF_INET6, "::1", marks=needs_ipv6)]
)
def test_without_an_address_it_hears_both_families(family: Family, host: str) -> None:
    with _bound(_options()) as (udp, _), socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", (host, udp.port))
        ready = mosh.wait([udp], (), mosh.monotonic_ms() + 5_000)
        received = udp.receive() if ready else None
        assert received is not None and received[0] == b"hello"


# -- locale ----------------------------------------------------------------------------------------------------

REPAIR = """
import json, locale, os, sys, mosh
mosh.use_utf8_locale(os.environ, json.loads(sys.argv[1]))
names = [name for name in mosh.LOCALE_VARIABLES if name in os.environ]
print(json.dumps([locale.nl_langinfo(locale.CODESET), {name: os.environ[name] for name in names}]))
"""
UTF8 = "C.UTF-8"

LOCALES: list[tuple[dict[str, str], dict[str, str], dict[str, str]]] = [
    # the host's own variables, the client's, what the child gets
    ({"LANG": UTF8}, {}, {"LANG": UTF8}),
    ({"LANG": UTF8}, {"LANG": "C"}, {"LANG": UTF8}),
    ({"LC_ALL": UTF8, "LANG": "C"}, {"LC_ALL": "C"}, {"LC_ALL": UTF8, "LANG": "C"}),
    ({"LANG": "C", "LC_TIME": "C"}, {"LANG": UTF8}, {"LANG": UTF8}),
    ({"LC_ALL": "C"}, {"LC_CTYPE": UTF8, "LC_TIME": "C"}, {"LC_CTYPE": UTF8, "LC_TIME": "C"}),
    ({}, {"LC_ALL": UTF8}, {"LC_ALL": UTF8}),
    ({}, {}, {"LC_CTYPE": UTF8}),
    ({"LC_ALL": "C"}, {}, {"LC_CTYPE": UTF8}),
    ({"LANG": "POSIX"}, {"LANG": "xx_XX.UTF-8"}, {"LANG": "xx_XX.UTF-8", "LC_CTYPE": UTF8}),
    ({"LANG": "C"}, {"LC_ALL": "xx_XX.UTF-8"}, {"LC_CTYPE": UTF8}),
    ({"LC_ALL": "xx_XX.UTF-8"}, {"LANG": UTF8}, {"LANG": UTF8}),
    ({"LANG": "xx_XX"}, {"LANG": "C"}, {"LANG": "C", "LC_CTYPE": UTF8}),
    ({"LANG": "C"}, {"LANG": ""}, {"LANG": "", "LC_CTYPE": UTF8}),
]


@pytest.mark.parametrize(("native", "fallback", "expected"), LOCALES)
@pytest.mark.parametrize("coercion", ["0", "1"], ids=["", "coerced"])
def test_a_locale_is_repaired_until_it_is_utf8(
    home: Path, native: dict[str, str], fallback: dict[str, str], expected: dict[str, str], coercion: str
) -> None:
    """It asks the C library, hence the process. `coercion` is Python's own meddling with LC_CTYPE (PEP 538)."""
    environ = {**session_env(home), "PYTHONCOERCECLOCALE": coercion}
    del environ["LANG"]
    finished = subprocess.run(
        [sys.executable, "-c", REPAIR, json.dumps(fallback)], env={**environ, **native}, cwd=peers.REPOSITORY,
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )
    assert finished.stderr == ""
    assert json.loads(finished.stdout) == ["UTF-8", expected]


# -- environment and timeouts ----------------------------------------------------------------------------------

ENVIRONMENTS: list[tuple[dict[str, str], int, dict[str, str]]] = [
    ({"HOME": "/h"}, 256, {"HOME": "/h", "PWD": "/h", "TERM": "xterm-256color", "NCURSES_NO_UTF8_ACS": "1"}),
    ({"HOME": "/h"}, 8, {"HOME": "/h", "PWD": "/h", "TERM": "xterm", "NCURSES_NO_UTF8_ACS": "1"}),
    ({"HOME": "/h", "TERM": "screen"}, 0, {"TERM": "xterm"}),
    ({"HOME": "/h"}, -1, {"TERM": "xterm"}),
    ({"HOME": "/h"}, 257, {"TERM": "xterm"}),
    ({"HOME": "/h", "PWD": "/elsewhere"}, 0, {"PWD": "/h"}),
    ({"HOME": "/h", "SSH_CONNECTION": "a b c d", "LANG": "C"}, 0, {"SSH_CONNECTION": "a b c d", "LANG": "C"}),
    ({"HOME": "/h", "MOSH_SERVER_NETWORK_TMOUT": "7"}, 0, {"MOSH_SERVER_NETWORK_TMOUT": "7"}),
    ({"HOME": "/h", "ODD": os.fsdecode(b"\xff")}, 0, {"ODD": os.fsdecode(b"\xff")}),
]


@pytest.mark.parametrize(("environ", "colors", "expected"), ENVIRONMENTS)
def test_environment_of_the_child(environ: dict[str, str], colors: int, expected: dict[str, str]) -> None:
    before = dict(environ)
    child = mosh.child_environment(environ, colors)
    assert {name: child.get(name) for name in expected} == expected
    assert environ == before


def test_the_child_learns_neither_the_screen_session_nor_a_key() -> None:
    child = mosh.child_environment({"HOME": "/h", "STY": "1.pts", "MOSH_KEY": "secret"}, 256)
    assert sorted(child) == ["HOME", "NCURSES_NO_UTF8_ACS", "PWD", "TERM"]


def test_without_home_the_password_file_knows_it() -> None:
    child = mosh.child_environment({}, 256)
    assert child["HOME"].startswith("/") and child["PWD"] == child["HOME"]


@pytest.mark.parametrize(("text", "seconds", "word"), [
    (None, 0, ""), ("", 0, ""), ("0", 0, ""), ("3", 3, ""), ("604800", 604800, ""),
    ("-1", 0, "is negative, ignoring"), ("3x", 0, "not a valid integer, ignoring"),
    ("x", 0, "not a valid integer, ignoring"), ("3.5", 0, "not a valid integer, ignoring"),
    ("1 2", 0, "not a valid integer, ignoring"), ("0x10", 0, "not a valid integer, ignoring"),
    ("1_000", 0, "not a valid integer, ignoring"), ("٣", 0, "not a valid integer, ignoring"),
    ("9" * 5000, 0, "not a valid integer, ignoring"),
])  # fmt: skip
def test_timeouts_of_the_environment(
    text: str | None, seconds: int, word: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "MOSH_SERVER_NETWORK_TMOUT"
    monkeypatch.delenv(name, raising=False)
    if text is not None:
        monkeypatch.setenv(name, text)
    assert mosh._seconds_from_environment(name) == seconds
    assert capfd.readouterr().err == (f"{name} {word}\n" if word else "")


# -- a live server ---------------------------------------------------------------------------------------------

Start = Callable[..., "tuple[subprocess.CompletedProcess[str], Server]"]


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """Start a server as a login does, without a terminal; all are ended by their process ids."""
    pids: list[int] = []

    def start_server(
        *words: str, command: Sequence[str] = ("cat",), before: Callable[[], None] | None = None, **environ: str | None
    ) -> tuple[subprocess.CompletedProcess[str], Server]:
        wanted = {**session_env(home), **environ}
        finished = subprocess.run(
            [*peers.ours_command(), "server", "new", "-i", LOOPBACK, "-p", "0", *words, "--", *command],
            env={name: value for name, value in wanted.items() if value is not None}, preexec_fn=before,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )
        detached = peers._DETACHED.search(finished.stderr)
        connect = peers._CONNECT.search(finished.stdout)
        assert detached and connect, finished.stderr
        pids.append(int(detached[1]))
        return finished, Server(port=int(connect[1]), key=connect[2], pid=int(detached[1]))

    yield start_server
    for pid in pids:
        peers.end_process(pid)


def test_what_it_prints(start: Start) -> None:
    finished, server = start()
    assert finished.returncode == 0
    assert finished.stdout == f"MOSH CONNECT {server.port} {server.key}\n"
    lines = finished.stderr.splitlines()
    assert lines[0] == "" and lines[-1] == f"[mosh-server detached, pid = {server.pid}]"
    assert server.key not in finished.stderr
    assert mosh.Key.from_text(server.key).to_text() == server.key


def test_two_servers_have_different_keys_and_ports(start: Start) -> None:
    one, other = start()[1], start()[1]
    assert one.key != other.key and one.port != other.port


def test_it_leads_a_session_of_its_own(start: Start) -> None:
    server = start()[1]
    assert os.getsid(server.pid) == os.getpgid(server.pid) == server.pid
    assert os.getsid(server.pid) != os.getsid(0)


def _descriptors(pid: int) -> dict[int, str]:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):       # closed since it was listed
            found[int(path.name)] = str(path.readlink())
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system has no /proc")


@needs_proc
def test_it_lets_go_of_the_login(start: Start) -> None:
    descriptors = _descriptors(start()[1].pid)
    assert [descriptors[number] for number in (0, 1, 2)] == [os.devnull] * 3


@needs_proc
def test_a_login_that_closed_stdin_does_not_cost_the_socket(start: Start) -> None:
    """A socket that got the number of a standard descriptor must not be lost when those are let go."""
    server = start(before=lambda: os.close(0))[1]
    assert _hears_on(server.port, server.pid)


def _hears_on(port: int, pid: int) -> bool:
    """Whether the process holds the UDP socket that is bound to `port`."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("udp", "udp6")]
    rows = [row.split() for table in tables for row in table.splitlines()]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}")}
    return bool(sockets & set(_descriptors(pid).values()))


def test_a_host_without_ptys_is_named_before_anything_is_announced(home: Path) -> None:
    """As in a container that lacks /dev/pts."""
    hidden = ["unshare", "-rm", "sh", "-ec", 'mount --bind /dev/null /dev/ptmx; exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this system lets a test mount nothing (unshare -rm)")
    finished = subprocess.run(
        [*hidden, *peers.server_command("ours", "-p", "0")], env=session_env(home), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("mosh: a session needs a pty") and finished.stderr.count("\n") == 1


def test_a_host_that_lets_no_process_start_is_named_before_anything_is_announced(home: Path) -> None:
    code = f"""
import errno, os, sys
sys.path.insert(0, {str(peers.REPOSITORY)!r})
import mosh
def fork():
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # as where `ulimit -u` is reached
os.fork = fork
sys.exit(mosh.main(["", "server", "new", "-p", "0"]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], env=session_env(home), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("mosh: a session needs a process") and finished.stderr.count("\n") == 1


def test_who_is_told_of_a_server_is_served_whatever_a_library_keeps_open(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libffi 3.5 holds a file of its own from when ctypes is loaded. The fewest descriptors that will do are enough."""
    code = f"import os, sys; sys.path.insert(0, {str(peers.REPOSITORY)!r}); import mosh; "
    code += "mosh.forbid_tracing = lambda: os.open(os.devnull, os.O_RDONLY); sys.exit(mosh.main(['', *sys.argv[1:]]))"
    monkeypatch.setattr(peers, "ours_command", lambda: [sys.executable, "-c", code])
    for count in range(3, 16):
        try:
            server = start(command=_shell("true"), before=partial(_limit_descriptors, count))[1]
        except AssertionError:      # it has said why there is none
            continue
        with Session(server) as session:
            session.wait_for("all said")
        return
    pytest.fail("a server takes more than 15 descriptors")


def _limit_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


@pytest.mark.parametrize("environ", [
    {"LANG": None}, {"LANG": "C"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LC_ALL": "xx_XX"}, {"LC_CTYPE": "C"},
], ids=str)  # fmt: skip
def test_no_locale_is_refused(start: Start, environ: dict[str, str | None]) -> None:
    assert start(**environ)[1].alive()


@pytest.mark.parametrize(("name", "value", "word"), [
    ("MOSH_SERVER_NETWORK_TMOUT", "x", "not a valid integer"), ("MOSH_SERVER_SIGNAL_TMOUT", "-1", "is negative"),
])  # fmt: skip
def test_a_bad_timeout_is_said_to_the_user_who_set_it(start: Start, name: str, value: str, word: str) -> None:
    assert f"{name} {word}" in start(**{name: value})[0].stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_without_a_client_a_signal_ends_it_at_once(start: Start, number: signal.Signals) -> None:
    server = start()[1]
    os.kill(server.pid, number)
    wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE])
def test_a_dying_login_does_not_end_it(start: Start, number: signal.Signals) -> None:
    server = start()[1]
    os.kill(server.pid, number)
    with Session(server) as session:
        session.type(b"still here\n")
        session.wait_for("still here")


def test_the_signal_for_idle_sessions_spares_a_young_one(start: Start) -> None:
    server = start(MOSH_SERVER_SIGNAL_TMOUT="3600")[1]
    os.kill(server.pid, signal.SIGUSR1)
    with Session(server) as session:
        session.type(b"spared\n")
        session.wait_for("spared")


def test_an_idle_session_ends_after_the_time_asked_for(start: Start) -> None:
    server = start(MOSH_SERVER_NETWORK_TMOUT="1")[1]
    wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")


class _Refusing:
    """A socket whose datagrams are too large for the path."""

    def send(self, _data: bytes, _address: mosh.Address) -> None:
        """See mosh.UdpSocket."""
        raise OSError(errno.EMSGSIZE, "Message too long")


def test_what_the_system_finds_too_large_is_sent_smaller() -> None:
    cipher = mosh.choose_cipher()(bytes(16))
    client = mosh.ClientCore(
        mosh.Channel(cipher, mosh.TO_SERVER), 0, width=80, height=24, candidates=["server"], port=1, random_bytes=bytes
    )
    server = mosh.Server.__new__(mosh.Server)
    server._core = mosh.ServerCore(mosh.Channel(cipher, mosh.TO_CLIENT), 0, width=80, height=24, random_bytes=bytes)
    for datagram in client.datagrams_to_send(0):
        server._core.receive_datagram(datagram, ("client", 1), 0)
    lines: list[str] = []
    server._udp, server._log = _Refusing(), lines.append  # type: ignore[assignment]
    server._send(100)
    assert lines == ["sendto: Message too long"]
    assert server._core.transport.datagrams.mtu.bytes == mosh.FALLBACK_MTU_BYTES


# -- its child -------------------------------------------------------------------------------------------------


class Session:
    """A client without a terminal: a core and a socket."""

    def __init__(self, server: Server) -> None:
        key = mosh.Key.from_text(server.key)
        channel = mosh.Channel(mosh.choose_cipher()(key.raw), mosh.TO_SERVER)
        self._address = (LOOPBACK, server.port)
        self._udp = mosh.UdpSocket(socket.AF_INET)
        self.core = mosh.ClientCore(
            channel, mosh.monotonic_ms(), width=80, height=24, candidates=[self._address], port=server.port,
            random_bytes=os.urandom,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._udp.close()

    def type(self, keys: bytes) -> None:
        """Type."""
        self.core.receive_keys(keys, mosh.monotonic_ms())

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Exchange datagrams until the condition holds. Raises TimeoutError with the screen."""
        limit = mosh.monotonic_ms() + int(1000 * LIMIT_SECONDS)
        while not condition():
            now = mosh.monotonic_ms()
            if now > limit:
                raise TimeoutError("\n".join(self.core.screen.lines()))
            for datagram in self.core.datagrams_to_send(now):
                self._udp.send(datagram, self._address)
            if condition():
                return
            deadline = min(self.core.next_timeout(), limit + 1)
            if mosh.wait([self._udp], (), deadline) and (received := self._udp.receive()):
                data, source, _ = received
                self.core.receive_datagram(data, source, mosh.monotonic_ms())

    def wait_for(self, text: str) -> str:
        """Wait until the screen shows `text`, and return all lines, without trailing blanks."""
        self.run_until(lambda: any(text in line for line in self.core.screen.lines()))
        return "\n".join(line.rstrip() for line in self.core.screen.lines())


def _shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script + "; echo; echo all said; cat")


def test_the_program_starts_only_when_the_client_is_there(start: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    server = start(command=_shell(f"touch {trace}; stty size"))[1]
    assert not trace.exists()
    with Session(server) as session:
        assert session.wait_for("all said").startswith("24 80\n")
    assert trace.exists()


def test_the_program_finds_its_environment_and_folder(start: Start, home: Path) -> None:
    script = _shell('echo "$TERM|$NCURSES_NO_UTF8_ACS|$PWD|$HOME|$STY|$MOSH_KEY|$LANG"; pwd')
    server = start("-c", "256", command=script, STY="1.pts", MOSH_KEY="secret")[1]
    with Session(server) as session:
        shown = session.wait_for("all said").replace("\n", "")
    assert f"xterm-256color|1|{home}|{home}|||C.UTF-8" in shown and shown.count(str(home)) == 3


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP, signal.SIGCHLD, signal.SIGWINCH):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR2])


@needs_proc
def test_the_program_finds_its_signals_as_a_login_would(start: Start) -> None:
    """Ignored signals survive exec; a program must not inherit what a script, a server or a Python ignores."""
    server = start(command=_shell("grep -E '^Sig(Ign|Blk)' /proc/self/status"), before=_ignore_signals)[1]
    with Session(server) as session:
        shown = session.wait_for("all said")
    reserved = 0b11 << 31  # signals 32 and 33, which the C library keeps to itself, are as they were before all of us
    masks = [int(line.split()[1], 16) & ~reserved for line in shown.splitlines() if line.startswith("Sig")]
    assert masks == [0, 0]


def test_a_signal_that_may_not_be_set_ends_no_session(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """FreeBSD lists 32 as valid, which its C library keeps to itself, as that of Linux does."""
    code = f"import signal, sys; sys.path.insert(0, {str(peers.REPOSITORY)!r}); import mosh; "
    code += "valid = signal.valid_signals(); signal.valid_signals = lambda: valid | {32}; "
    code += "sys.exit(mosh.main(['mosh.py', *sys.argv[1:]]))"
    monkeypatch.setattr(peers, "ours_command", lambda: [sys.executable, "-c", code])
    with Session(start(command=_shell("true"))[1]) as session:
        session.wait_for("all said")


def test_a_program_that_cannot_run_is_named(start: Start) -> None:
    with Session(start(command=("/no/such/program",))[1]) as session:
        session.wait_for("/no/such/program: No such file")


def test_a_script_on_path_that_does_not_say_by_what_to_run_it_is_run_by_sh(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "plain-script"
    script.write_text('echo "$1 said"; cat\n', encoding="utf-8")
    script.chmod(0o755)
    server = start(command=(script.name, "all"), PATH=f"{tmp_path}:{os.environ['PATH']}")[1]
    with Session(server) as session:
        session.wait_for("all said")


# Be the parent of a program on a pty, where the messages of the day lie in HOME; print what comes.
BE_ITS_PARENT = """
import mosh, os
home = os.environ["HOME"]
mosh._MOTD_FILES = ((home + "/missing", home + "/first", home + "/second"), (home + "/third",))
child = mosh.Child(mosh.ServerOptions(), (80, 24), None, [])
child.release()
os.set_blocking(child.fd, True)
try:
    while chunk := os.read(child.fd, 1000):
        os.write(1, chunk)
except OSError:  # the end of a pty
    pass
child.close()
"""


@pytest.mark.parametrize("is_hushed", [False, True])
def test_a_login_shell_begins_with_the_messages_of_the_day_unless_they_are_hushed(home: Path, is_hushed: bool) -> None:
    for name in ("first", "second", "third", *[".hushlogin"] * is_hushed):
        (home / name).write_text(f"{name}\n", encoding="ascii")
    printed = subprocess.run(
        [sys.executable, "-c", BE_ITS_PARENT], cwd=peers.REPOSITORY, env={"HOME": str(home), "SHELL": "/bin/echo"},
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )
    assert (printed.stdout.split(), printed.stderr) == ([] if is_hushed else ["first", "third"], "")


def test_the_end_of_the_program_ends_the_session(start: Start) -> None:
    server = start(command=("sh", "-c", "echo goodbye"))[1]
    with Session(server) as session:
        session.run_until(lambda: session.core.phase is mosh.Phase.CLOSED)
        assert session.core.transport.clean
        assert session.core.screen.lines()[0].startswith("goodbye")
    wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")


def test_the_end_of_the_program_ends_the_session_whatever_it_left_in_the_background(start: Start) -> None:
    """As with ssh: a job that still holds the terminal open must not keep anybody from leaving."""
    script = "set -m; sleep 60 & echo job $! on; read line; seq 2000; echo goodbye"
    server = start(command=("sh", "-c", script))[1]
    with Session(server) as session:
        (line,) = (line for line in session.wait_for(" on").splitlines() if line.startswith("job "))
        session.type(b"\n")
        session.run_until(lambda: session.core.phase is mosh.Phase.CLOSED)
        assert session.core.transport.clean
        assert "goodbye" in "".join(session.core.screen.lines())
    wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")
    os.kill(int(line.split()[1]), signal.SIGKILL)


def test_a_log_that_nobody_reads_does_not_stop_the_session(home: Path) -> None:
    reader, writer = os.pipe()
    words = [*peers.ours_command(), "server", "new", "-v", "-i", LOOPBACK, "-p", "0", "--", "cat"]
    login = subprocess.Popen(
        words, env=session_env(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, text=True
    )
    with login:
        assert login.stdout is not None
        connect = peers._CONNECT.search(login.stdout.readline())
    detached = peers._DETACHED.search(os.read(reader, 10_000).decode())
    assert connect and detached
    server = Server(port=int(connect[1]), key=connect[2], pid=int(detached[1]))
    os.set_blocking(writer, False)
    try:
        with suppress(BlockingIOError):
            while os.write(writer, bytes(select.PIPE_BUF)):
                pass
        with Session(server) as session:  # of which the log would tell
            session.type(b"still here")
            session.wait_for("still here")
    finally:
        peers.end_process(server.pid)
        os.close(reader)
        os.close(writer)


def test_a_signal_ends_the_session_for_both_ends(start: Start) -> None:
    server = start()[1]
    with Session(server) as session:
        session.type(b"here\n")
        session.wait_for("here")
        os.kill(server.pid, signal.SIGTERM)
        session.run_until(lambda: session.core.phase is mosh.Phase.CLOSED)
        assert session.core.transport.clean
    wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")


def test_the_program_is_hung_up_on_when_the_session_ends(start: Start) -> None:
    server = start(command=_shell("echo pid $$ on"))[1]
    with Session(server) as session:
        (line,) = (line for line in session.wait_for("all said").splitlines() if line.startswith("pid "))
    os.kill(server.pid, signal.SIGTERM)
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: not process_alive(int(line.split()[1])), LIMIT_SECONDS, "the program to leave")


@needs_proc
def test_no_core_file_holds_the_key_but_the_program_has_its_limit_back(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else hard
    server = start(
        command=_shell("grep core /proc/self/limits"),
        before=lambda: resource.setrlimit(resource.RLIMIT_CORE, (wanted, hard)),
    )[1]
    assert _core_limit(Path(f"/proc/{server.pid}/limits").read_text()) == "0"
    with Session(server) as session:
        assert _core_limit(session.wait_for("all said")) == str(wanted)
    assert resource.getrlimit(resource.RLIMIT_CORE) == (soft, hard)


def _core_limit(limits: str) -> str:
    (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    return line.split()[4]
