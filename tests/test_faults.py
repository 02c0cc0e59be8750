"""What goes wrong around a session: dying ends, signals, full disks, broken sockets. What must be sane afterwards.

After each: the terminal is as it was, nothing is left running, nobody spins, and the other end says what happened. The
CPU that survivors use is printed; `make attack` shows it.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import mosh
import peers
import test_server
from measuring import cpu_seconds
from ptys import PtyProcess, on_a_terminal

pytestmark = [
    pytest.mark.live, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
]

SESSIONS = 100 if "MOSH_ATTACK_COUNT" in os.environ else 20
LIMIT_SECONDS = 20.0
QUIT = b"\x1e."
STORM = 200
BUSY_SHARE = 0.25       # of a processor: a loop that spins takes all of it, one that waits a hundredth


def relatives(home: Path) -> list[int]:
    """Return all running processes that were started with this home folder."""
    mark = b"\0HOME=" + os.fsencode(home) + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + path.read_bytes() and peers.process_alive(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


def assert_nothing_is_left(home: Path) -> None:
    """All processes of a session end soon."""
    peers.wait_until(lambda: not relatives(home), LIMIT_SECONDS, f"the end of {relatives(home)}")


def assert_idle(what: str, pid: int, seconds: float = 1.0) -> None:
    """A process does not spin. What it uses is printed."""
    before = cpu_seconds(pid)
    peers.pause(seconds)
    share = (cpu_seconds(pid) - before) / seconds
    print(f"\n{what}: {1000 * share:.1f} ms of CPU per second")
    assert share < BUSY_SHARE


class Session:
    """A server and a client on a terminal."""

    def __init__(self, server: peers.Server, client: PtyProcess, home: Path) -> None:
        self.server = server
        self.client = client
        self.home = home
        self._mark = 0

    def echo(self) -> None:
        """Type something new and see it come back."""
        self._mark += 1
        mark = b"<%d>" % self._mark
        self.client.type(mark)
        self.client.read_until(lambda output: mark in output)

    def see_end(self, *statuses: int) -> None:
        """The client ends in one of these ways, the terminal is as it was, and nothing is left."""
        assert self.client.wait() in statuses, self.client.output
        assert self.client.modes() == self.client.modes_before
        assert b"Traceback" not in self.client.output
        assert_nothing_is_left(self.home)


def environ_of_client(home: Path, server: peers.Server) -> dict[str, str]:
    """A client's environment. Without predictions: what is seen has been to the server and back."""
    return peers.session_env(home, TERM="xterm-256color", MOSH_KEY=server.key, MOSH_PREDICTION_DISPLAY="never")


@contextmanager
def opened(home: Path, *, wrap: Sequence[str] = (), command: Sequence[str] = ("cat",)) -> Iterator[Session]:
    """A session. `wrap`: the words of a program that takes the client's arguments instead of the client."""
    with peers.running_server("ours", peers.session_env(home), command=command) as server:
        words = [*wrap, *peers.client_command("ours", server.port)[len(peers.ours_command()) :]] if wrap else None
        with on_a_terminal(
            words or peers.client_command("ours", server.port), environ_of_client(home, server)
        ) as client:
            session = Session(server, client, home)
            client.read_until(lambda output: b"\x1b[?1h" in output)
            session.echo()
            yield session


# -- an end dies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_server_killed_at_any_moment_leaves_nothing_and_runs_nothing(home: Path, seed: int) -> None:
    """Also before a client has come: then the program must not start either."""
    ran = home / "ran"
    server = peers.start_server("ours", peers.session_env(home), command=("sh", "-c", f"echo >{ran}; exec cat"))
    chance = random.Random(seed)
    with contextlib.ExitStack() as resources:
        if seed % 2:
            resources.enter_context(on_a_terminal(
                peers.client_command("ours", server.port), environ_of_client(home, server)
            ))
        peers.pause(chance.random() * (0.6 if seed % 2 else 0.02))
        os.kill(server.pid, signal.SIGKILL)
        peers.wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to die")
        if not seed % 2:
            assert_nothing_is_left(home)
            assert not ran.exists()
    assert_nothing_is_left(home)


def test_a_program_waits_for_its_servers_word_not_for_its_death(home: Path) -> None:
    """What tells the program to start is a byte; the end of the pipe says that the server has died."""
    ran = home / "ran"
    script = (
        "import os, signal, sys, mosh\n"
        "signal.signal = lambda *_: None\n"     # a hangup does not end it
        "signal.pthread_sigmask = lambda *_: None\n"
        "options = mosh.ServerOptions()\n"
        f"options.command = ['sh', '-c', 'echo >{ran}']\n"
        "reader, writer = os.pipe()\n"
        "if sys.argv[1] == 'word': os.write(writer, b'x')\n"
        "os.close(writer)\n"
        "mosh._run_child(options, None, reader)\n"
    )
    for word, runs in (("", False), ("word", True)):
        with on_a_terminal([sys.executable, "-c", script, word], {
            **peers.session_env(home), "PYTHONPATH": str(peers.REPOSITORY)
        }) as program:
            program.wait()
        assert ran.exists() == runs, program.output


def test_a_client_whose_server_is_killed_says_so_and_can_be_quit(home: Path) -> None:
    with opened(home) as session:
        os.kill(session.server.pid, signal.SIGKILL)
        session.client.read_until(lambda output: b"Last contact" in output)
        assert_idle("a client without a server", session.client.pid)
        session.client.type(QUIT)
        session.see_end(1)
    assert b"did not shut down cleanly" in session.client.output


def test_a_server_whose_client_is_killed_waits_idly_and_can_be_ended(home: Path) -> None:
    with opened(home) as session:
        session.client.send_signal(signal.SIGKILL)
        session.client.wait()
        assert_idle("a server without a client", session.server.pid)
        assert session.server.alive()
        os.kill(session.server.pid, signal.SIGTERM)
        os.kill(session.server.pid, signal.SIGTERM)
        assert_nothing_is_left(home)


def test_a_killed_program_ends_the_session(home: Path) -> None:
    with opened(home, command=("sh", "-c", "echo pid $$ on; exec cat")) as session:
        program = int(session.client.output.partition(b"pid ")[2].split()[0])
        os.kill(program, signal.SIGKILL)
        session.see_end(0)


def test_a_closed_terminal_ends_client_and_server(home: Path) -> None:
    with opened(home) as session:
        session.client.hang_up()
        peers.wait_until(lambda: not session.server.alive(), LIMIT_SECONDS, "the server to leave")
        assert_nothing_is_left(home)


def test_a_terminal_that_closes_under_a_suspended_client_ends_client_and_server(home: Path) -> None:
    """The system wakes it, for the hang-up to be seen: it must not try to take its terminal back."""
    with opened(home) as session:
        session.client.send_signal(signal.SIGSTOP)
        session.client.hang_up()
        session.client.send_signal(signal.SIGCONT)
        peers.wait_until(lambda: not session.server.alive(), LIMIT_SECONDS, "the server to leave")
        assert_nothing_is_left(home)


# -- signals and pauses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGWINCH])
def test_a_storm_of_harmless_signals_is_survived(home: Path, number: signal.Signals) -> None:
    with opened(home) as session:
        for _ in range(STORM):
            session.client.send_signal(number)
            os.kill(session.server.pid, signal.SIGHUP)
        session.echo()
        assert_idle(f"a client after {STORM} {number.name}", session.client.pid)
        session.client.type(QUIT)
        session.see_end(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_storm_of_deadly_signals_leaves_a_sane_terminal(home: Path, number: signal.Signals) -> None:
    with opened(home) as session:
        for _ in range(STORM):
            session.client.send_signal(number)
        session.see_end(0, 1, -number)


def test_a_storm_of_deadly_signals_ends_a_server_and_its_client(home: Path) -> None:
    """One signal says goodbye, the next one means at once: then the client has to find out, and be quit."""
    with opened(home) as session:
        for _ in range(STORM):
            with contextlib.suppress(ProcessLookupError):
                os.kill(session.server.pid, signal.SIGTERM)
        peers.wait_until(lambda: not session.server.alive(), LIMIT_SECONDS, "the server to leave")
        session.client.type(QUIT)
        session.see_end(0, 1)


def test_a_stopped_client_goes_on_where_it_was(home: Path) -> None:
    with opened(home) as session:
        session.client.send_signal(signal.SIGSTOP)
        session.client.type(b"typed meanwhile")
        assert_idle("a server whose client is stopped", session.server.pid, 2.0)
        session.client.send_signal(signal.SIGCONT)
        session.client.read_until(lambda output: b"typed meanwhile" in output)
        session.client.type(QUIT)
        session.see_end(0)


def test_no_clock_is_read_that_anybody_can_set() -> None:
    """Only clocks that count from the start of the machine, so setting the time back or forth does nothing."""
    tree = ast.parse((peers.REPOSITORY / "mosh.py").read_text(encoding="utf-8"))
    used = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time"
    }
    assert used == {"monotonic_ns", "sleep", "clock_gettime_ns", "CLOCK_MONOTONIC"}
    assert 'getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)' in ast.unparse(tree).replace("'", '"')
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert "datetime" not in imported and mosh.monotonic_ms() <= mosh.monotonic_ms()


# -- nothing left ----------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_announcement_is_told_and_leaves_no_server(home: Path) -> None:
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            peers.server_command("ours"), env=peers.session_env(home), stdin=subprocess.DEVNULL, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS,
        )
    assert finished.returncode == 1 and finished.stderr == f"mosh: {os.strerror(errno.ENOSPC)}\n"
    assert_nothing_is_left(home)


def test_a_full_disk_under_the_log_is_survived(home: Path) -> None:
    words = [*peers.ours_command(), "server", "new", "-v", "-i", peers.LOOPBACK, "-p", "0", "--", "cat"]
    with Path("/dev/full").open("w") as full:
        login = subprocess.Popen(
            words, env=peers.session_env(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full, text=True
        )
    with login:
        assert login.stdout is not None
        connect = peers._CONNECT.search(login.stdout.readline())
        assert connect is not None
        peers.wait_until(lambda: login.poll() is not None, LIMIT_SECONDS, "the server to detach")
        family = relatives(home)
        (pid,) = (pid for pid in family if _parent(pid) not in family)
        try:
            with test_server.Session(peers.Server(port=int(connect[1]), key=connect[2], pid=pid)) as session:
                session.type(b"still here")
                session.wait_for("still here")
        finally:
            peers.end_process(pid)
    assert_nothing_is_left(home)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


@pytest.mark.parametrize("count", range(3, 12))
def test_too_few_descriptors_to_start_are_told_in_a_line(home: Path, count: int) -> None:
    """A server either serves or says why not; a client too. Python itself needs some, and may speak first."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

    finished = subprocess.run(
        peers.server_command("ours"), env=peers.session_env(home), stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=LIMIT_SECONDS, preexec_fn=limit,
    )
    for pid in relatives(home):
        peers.end_process(pid)
    assert_nothing_is_left(home)
    if finished.returncode == 0:
        assert finished.stdout.startswith("MOSH CONNECT ")
    elif finished.stderr.startswith("mosh: "):
        assert finished.stderr.count("\n") <= 2, finished.stderr


def test_a_client_out_of_descriptors_keeps_its_session(home: Path) -> None:
    """It cannot open another port, and goes on with those it has."""
    with opened(home) as session:
        used = len(list(Path(f"/proc/{session.client.pid}/fd").iterdir()))
        resource.prlimit(session.client.pid, resource.RLIMIT_NOFILE, (used, used))
        resource.prlimit(session.server.pid, resource.RLIMIT_NOFILE, (3, 3))
        session.echo()
        session.client.type(QUIT)
        session.see_end(0)


# -- broken sockets --------------------------------------------------------------------------------------------

# A client or server whose socket refuses to send: the first argument is the error, the second how many times, the
# third the size from which on it does. The rest is the program's own.
BROKEN = """
import errno, os, sys, mosh
number, left, size = getattr(errno, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
real = mosh.UdpSocket.send
def send(self, data, address):
    global left
    if left > 0 and len(data) >= size:
        left -= 1
        raise OSError(number, os.strerror(number))
    real(self, data, address)
mosh.UdpSocket.send = send
sys.exit(mosh.main(["mosh.py", *sys.argv[4:]]))
"""


def _broken(name: str, times: int, size: int = 0) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(peers.REPOSITORY)!r})\n{BROKEN}", name,
            str(times), str(size)]


@pytest.mark.parametrize("name", ["EAGAIN", "ENOBUFS", "ENETUNREACH", "EPERM", "ECONNREFUSED"])
def test_a_client_whose_socket_refuses_says_why_and_goes_on(home: Path, name: str) -> None:
    with opened(home, wrap=_broken(name, 2)) as session:
        assert_idle(f"a client after {name}", session.client.pid)
        session.client.type(QUIT)
        session.see_end(0)
    assert f"sendto: {os.strerror(getattr(errno, name))}".encode() in session.client.output


def test_a_client_that_can_never_send_says_why_does_not_spin_and_can_be_quit(home: Path) -> None:
    with peers.running_server("ours", peers.session_env(home), command=("cat",)) as server, on_a_terminal(
        [*_broken("ENETUNREACH", 10**9), "client", peers.LOOPBACK, str(server.port)], environ_of_client(home, server)
    ) as client:
        client.read_until(lambda output: os.strerror(errno.ENETUNREACH).encode() in output)
        assert_idle("a client without a network", client.pid)
        client.type(QUIT)
        assert client.wait() == 1
        assert client.modes() == client.modes_before


@pytest.mark.parametrize("name", ["EAGAIN", "ENOBUFS", "ENETUNREACH"])
def test_a_server_whose_socket_refuses_goes_on(home: Path, name: str) -> None:
    _play_with_broken_server(home, _broken(name, 3))


def test_datagrams_refused_for_their_size_become_smaller(home: Path) -> None:
    _play_with_broken_server(home, _broken("EMSGSIZE", 10**9, mosh.FALLBACK_MTU_BYTES + 1))


def _play_with_broken_server(home: Path, program: Sequence[str]) -> None:
    finished = subprocess.run(
        [*program, "server", "new", "-i", peers.LOOPBACK, "-p", "0", "--", "sh", "-c", "cat; exit"],
        env=peers.session_env(home), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )
    connect, detached = peers._CONNECT.search(finished.stdout), peers._DETACHED.search(finished.stderr)
    assert connect and detached, finished.stderr
    server = peers.Server(port=int(connect[1]), key=connect[2], pid=int(detached[1]))
    with ExitStack() as resources:
        resources.callback(peers.end_process, server.pid)
        with test_server.Session(server) as session:
            noise = bytes(random.Random(1).choices(range(0x21, 0x7F), k=1_500))
            session.type(noise[:700] + b"\r" + noise[700:] + b" done")
            session.wait_for("done")
            assert_idle("a server after send errors", server.pid)
    assert_nothing_is_left(home)


# -- many at once ----------------------------------------------------------------------------------------------


def test_many_sessions_at_once(home: Path) -> None:
    def play(number: int) -> None:
        with peers.running_server(
            "ours", peers.session_env(home), command=("cat",)
        ) as server, test_server.Session(server) as session:
            session.type(b"I am session %d." % number)
            session.wait_for(f"I am session {number}.")
            ready.append(number)
            session.run_until(lambda: len(ready) == SESSIONS)
            session.core.start_shutdown("", mosh.monotonic_ms())
            session.run_until(lambda: session.core.phase is mosh.Phase.CLOSED)
            assert session.core.transport.clean

    ready: list[int] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with ThreadPoolExecutor(max_workers=SESSIONS) as pool:
        for play_of_one in [pool.submit(play, number) for number in range(SESSIONS)]:
            play_of_one.result()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    print(f"\n{SESSIONS} sessions at once: all echoed and ended; their clients took {used:.1f} s of CPU")
    assert_nothing_is_left(home)
