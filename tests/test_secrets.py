"""The session key is nowhere but in the memory of the two ends, and no nonce is used twice whatever happens to them."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh
import peers
from conftest import require
from ptys import PtyProcess, on_a_terminal
from simnet import NEW_ADDRESS, Simulation
from test_attack import ClientVictim, ServerVictim, Victim
from test_faults import QUIT, environ_of_client, relatives

pytestmark = [pytest.mark.live]
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")

LIMIT_SECONDS = 20.0
SHOW_DUMPABLE = "import ctypes; print('dumpable', ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), end='.')"
needs_prctl = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")


def forms(key: str) -> list[bytes]:
    """Every form in which a key could show: as it is printed, raw, in hexadecimal, as Python writes bytes."""
    raw = base64.b64decode(key + "==")
    return [key.encode(), raw, raw.hex().encode(), raw.hex().upper().encode(), repr(raw)[2:-1].encode()]


def leaks(key: str, home: Path) -> list[str]:
    """Return every place in which the key of a session shows: arguments, environments and files."""
    places = [path for pid in relatives(home) for path in (Path(f"/proc/{pid}/environ"), Path(f"/proc/{pid}/cmdline"))]
    places += [path for path in home.rglob("*") if path.is_file()]
    found = []
    for place in places:
        data = place.read_bytes()
        found += [str(place) for form in forms(key) if form in data]
    return found


def _say_and_see(client: PtyProcess) -> None:
    client.read_until(lambda output: b"\x1b[?1h" in output)
    client.type(b"env; cat /proc/$$/environ /proc/$PPID/environ /proc/$PPID/cmdline; echo; echo s'a'id\r")
    client.read_until(lambda output: b"said" in output)


# -- where it must not be --------------------------------------------------------------------------------------


@needs_proc
def test_the_key_shows_nowhere_while_client_and_server_run(home: Path) -> None:
    """Not in what they print, in arguments or environments of any process, nor in any file."""
    env = peers.session_env(home)
    log = home / "log"
    with log.open("wb") as stderr:
        login = subprocess.Popen(
            [*peers.ours_command(), "server", "new", "-v", "-v", "-i", peers.LOOPBACK, "-p", "0", "--", "sh"], env=env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )
    with login:
        assert login.stdout is not None
        connect = peers._CONNECT.search(login.stdout.readline())
        assert connect is not None
        peers.wait_until(lambda: b"pid = " in log.read_bytes(), LIMIT_SECONDS, "the server to detach")
        pid = int(log.read_bytes().rpartition(b"pid = ")[2].partition(b"]")[0])
        server = peers.Server(port=int(connect[1]), key=connect[2], pid=pid)
        assert leaks(server.key, home) == []            # the program waits, a fork that knows the key
        with on_a_terminal(peers.client_command("ours", server.port), environ_of_client(home, server)) as client:
            _say_and_see(client)
            assert len(relatives(home)) >= 3            # client, server, shell
            assert leaks(server.key, home) == []
            client.type(QUIT)
            assert client.wait() == 0
        peers.wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to leave")
    assert log.stat().st_size > 0
    assert leaks(server.key, home) == []
    assert not [form for form in forms(server.key) if form in client.output]


@needs_proc
def test_the_key_shows_nowhere_in_a_login(home: Path, tmp_path: Path) -> None:
    """The wrapper reads it from the server and is itself the client: no process is told it."""
    copy = tmp_path / "what the server said"
    start = tmp_path / "start"
    program = " ".join(mosh.shell_quote(word) for word in [*peers.ours_command(), "server"])
    start.write_text(f'{program} "$@" | tee {mosh.shell_quote(str(copy))}\n')
    words = [*peers.ours_command(), "--local", "--predict=never", f"--server=sh {mosh.shell_quote(str(start))}",
             peers.LOOPBACK, "--", "sh"]
    with on_a_terminal(words, peers.session_env(home, TERM="xterm-256color")) as client:
        _say_and_see(client)
        connect = peers._CONNECT.search(copy.read_text())
        assert connect is not None
        key = connect[2]
        assert len(relatives(home)) >= 3
        assert leaks(key, home) == []
        client.type(QUIT)
        assert client.wait() == 0
    assert not [form for form in forms(key) if form in client.output]


@needs_proc
def test_a_search_for_leaks_finds_them(home: Path) -> None:
    """The search above is no idle one."""
    key = mosh.Key(os.urandom(16)).to_text()
    with subprocess.Popen(
        ["sleep", "30"], env=peers.session_env(home, MOSH_KEY=key), stdin=subprocess.DEVNULL
    ) as process:
        peers.wait_until(lambda: process.pid in relatives(home), LIMIT_SECONDS, "the program to start")
        (home / "file").write_bytes(base64.b64decode(key + "=="))
        found = leaks(key, home)
        process.terminate()
    assert found == [f"/proc/{process.pid}/environ", str(home / "file")]


def test_nothing_that_is_printed_of_an_object_shows_the_key() -> None:
    key = mosh.Key(bytes(range(0x61, 0x71)))
    channel = mosh.Channel(mosh.choose_cipher()(key.raw), mosh.TO_SERVER)
    core = mosh.ClientCore(channel, 0, width=9, height=3, candidates=["x"], port=1, random_bytes=os.urandom)
    text = "".join(map(repr, (key, [key], channel, vars(channel), core.transport, vars(core.transport.datagrams))))
    try:
        mosh.Key.from_text(key.to_text()[:-1] + "B")
    except mosh.UsageError as error:
        text += "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert not [form for form in forms(key.to_text()) if form in text.encode()]


# A client or a server that crashes in the middle of its session.
CRASH = """
import sys, mosh
def crash(*_):
    raise RuntimeError("planted")
setattr(getattr(mosh, sys.argv[1]), sys.argv[2], crash)
sys.exit(mosh.main(["mosh.py", *sys.argv[3:]]))
"""


def _crashing(name: str, method: str, *words: str) -> list[str]:
    path = f"import sys; sys.path.insert(0, {str(peers.REPOSITORY)!r})\n"
    return [sys.executable, "-X", "dev", "-c", path + CRASH, name, method, *words]


@pytest.mark.parametrize("method", ["frame_to_draw", "receive_datagram", "datagrams_to_send"])
def test_a_crashing_client_restores_the_terminal_and_does_not_tell_the_key(home: Path, method: str) -> None:
    with peers.running_server("ours", peers.session_env(home), command=("cat",)) as server, on_a_terminal(
        _crashing("ClientCore", method, "client", peers.LOOPBACK, str(server.port)), environ_of_client(home, server)
    ) as client:
        assert client.wait() == 1
        assert client.modes() == client.modes_before
    assert b"planted" in client.output and mosh._CLOSE_SEQUENCES in client.output
    assert not [form for form in forms(server.key) if form in client.output]


@needs_proc
def test_a_crashing_server_does_not_tell_the_key_and_leaves_nothing(home: Path) -> None:
    words = _crashing("Server", "run", "server", "new", "-v", "-i", peers.LOOPBACK, "-p", "0", "--", "cat")
    crashed = subprocess.run(
        words, env=peers.session_env(home), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_SECONDS
    )
    connect = peers._CONNECT.search(crashed.stdout.decode())
    assert connect is not None and b"planted" in crashed.stderr
    assert not [form for form in forms(connect[2]) if form in crashed.stderr]
    peers.wait_until(lambda: not relatives(home), LIMIT_SECONDS, "the waiting program to end")


@needs_proc
def test_a_dying_client_leaves_no_core_file(home: Path) -> None:
    require("sh")
    with peers.running_server("ours", peers.session_env(home), command=("cat",)) as server:
        script = f"ulimit -c unlimited; cd {home}; exec \"$@\""
        words = ["sh", "-c", script, "sh", *peers.client_command("ours", server.port)]
        with on_a_terminal(words, environ_of_client(home, server)) as client:
            client.read_until(lambda output: b"\x1b[?1h" in output)
            limits = Path(f"/proc/{client.pid}/limits").read_text(encoding="ascii")
            client.send_signal(signal.SIGABRT)
            assert client.wait() == -signal.SIGABRT
    (line,) = (line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert line.split()[4] == "0"
    assert list(home.iterdir()) == []


def test_a_client_that_crashes_while_it_starts_leaves_no_core_file(home: Path) -> None:
    """A library that is broken may crash as it is loaded, when the key is already there."""
    require("sh")
    (home / "cryptography.py").write_text(
        "import resource\nprint('soft limit', resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True)\n"
        "raise ImportError\n", encoding="utf-8",
    )  # fmt: skip
    key = mosh.Key(bytes(16)).to_text()
    words = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh", *peers.client_command("ours", 9)]
    environ = peers.session_env(home, TERM="xterm", MOSH_KEY=key, PYTHONPATH=str(home))
    with on_a_terminal(words, environ) as client:
        assert client.read_until(lambda output: b"\n" in output).startswith(b"soft limit 0\r\n")


@needs_prctl
def test_neither_end_can_be_traced_but_the_program_can(home: Path) -> None:
    """What a process is at the moment at which it would begin to serve."""
    def run(name: str, *words: str, **extra: str) -> bytes:
        script = (
            f"import sys; sys.path.insert(0, {str(peers.REPOSITORY)!r}); import mosh, os\n"
            f"def run(self):\n    {SHOW_DUMPABLE}; sys.stdout.flush(); os._exit(0)\n"
            f"mosh.{name}.run = run\nmosh.main(['mosh.py', *sys.argv[1:]])\n"
        )
        env = peers.session_env(home, TERM="xterm", **extra)
        with on_a_terminal([sys.executable, "-c", script, *words], env) as program:
            return program.read_until(lambda output: b"dumpable" in output and output.endswith(b"."))

    key = mosh.Key(bytes(16)).to_text()
    assert b"dumpable 0." in run("Client", "client", peers.LOOPBACK, "9", MOSH_KEY=key)
    assert b"dumpable 0." in run("Server", "server", "new", "-v", "-i", peers.LOOPBACK, "-p", "0", "--", "true")
    with peers.running_server(
        "ours", peers.session_env(home), command=(sys.executable, "-c", SHOW_DUMPABLE + "; input()")
    ) as server, on_a_terminal(peers.client_command("ours", server.port), environ_of_client(home, server)) as client:
        client.read_until(lambda output: b"dumpable 1." in output)


def test_a_secret_is_taken_from_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mosh.take_secret_from_environment("MOSH_NO_SUCH") is None
    monkeypatch.setenv("MOSH_PLANTED", "secret")
    assert mosh.take_secret_from_environment("MOSH_PLANTED") == "secret"
    assert "MOSH_PLANTED" not in os.environ
    assert mosh.take_secret_from_environment("MOSH_PLANTED") is None


# -- no nonce twice --------------------------------------------------------------------------------------------
#
# The law: under one key, no 12-byte nonce is sealed twice, by whichever end, whatever happens.


def _assert_unique(datagrams: list[bytes], at_least: int) -> None:
    nonces = [datagram[:8] for datagram in datagrams]
    assert len(set(nonces)) == len(nonces) >= at_least
    assert nonces == sorted(nonces)                     # a counter that only moves forward


@given(st.lists(st.tuples(st.sampled_from(("client", "server", "receive", "hop")), st.integers(-10**6, 10**6))))
def test_no_nonce_is_used_twice_however_the_clock_jumps(schedule: list[tuple[str, int]]) -> None:
    cipher = mosh.choose_cipher()(bytes(16))
    ends = {
        "client": mosh.DatagramLayer(mosh.Channel(cipher, mosh.TO_SERVER), 0, is_server=False),
        "server": mosh.DatagramLayer(mosh.Channel(cipher, mosh.TO_CLIENT), 0, is_server=True),
    }
    sent: dict[str, list[bytes]] = {"client": [], "server": []}
    now = 10**7
    for action, jump_ms in schedule:
        now += jump_ms
        if action == "hop":
            ends["client"].port_chosen(now)
        elif action == "receive":
            for datagram in sent["client"][-3:]:
                with contextlib.suppress(mosh.PacketError):     # it has arrived before
                    ends["server"].receive_datagram(datagram, ("somewhere", now), now)
        else:
            sent[action].append(ends[action].seal(b"x", now))
    for datagrams in sent.values():
        _assert_unique(datagrams, 0)
    assert not {datagram[:8] for datagram in sent["client"]} & {datagram[:8] for datagram in sent["server"]}


def test_no_nonce_is_used_twice_by_retransmission_roaming_port_hops_and_long_silence() -> None:
    sim = Simulation(1)
    sim.link.loss, sim.link.duplication = 0.5, 0.3
    sim.client.type("burst 50\r", every_ms=30)
    sim.run(ms=4_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.link.blocked.add(mosh.TO_CLIENT)
    sim.run(ms=35_000)
    assert len(sim.client.addresses) >= 3
    sim.blackout(ms=400_000)
    sim.run(ms=400_000)
    sim.link.heal()
    sim.client.type("back")
    sim.run(ms=5_000)
    for direction in (mosh.TO_SERVER, mosh.TO_CLIENT):
        _assert_unique(sim.datagrams(direction), 50)


def test_a_forked_copy_seals_nothing() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(peers.REPOSITORY)!r}); import mosh, os\n"
        "def run(self):\n"
        "    channel = self._core.transport.datagrams._channel\n"
        "    channel.seal(b'x')\n"
        "    pid = os.fork()\n"
        "    try: channel.seal(b'x')\n"
        "    except mosh.ProtocolError: os._exit(7)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pid != 0, 'forked', flush=True); os._exit(0)\n"
        "mosh.Server.run = run\nmosh.main(['mosh.py', *sys.argv[1:]])\n"
    )
    words = [sys.executable, "-c", script, "server", "new", "-v", "-i", peers.LOOPBACK, "-p", "0", "--", "true"]
    said = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert "7 True forked" in said.stdout, said.stderr


@needs_proc
@pytest.mark.parametrize("make", [ServerVictim, ClientVictim])
def test_no_nonce_is_used_twice_by_a_program_that_is_stopped_and_hops(home: Path, make: type[Victim]) -> None:
    """A live end, stopped and continued several times, at each of which a client hops."""
    ports = set()
    with contextlib.closing(make("ours", home)) as victim:
        for _ in range(3):
            os.kill(victim.pid, signal.SIGSTOP)
            victim.rest(100)
            os.kill(victim.pid, signal.SIGCONT)
            victim.echo()
            if isinstance(victim, ClientVictim):
                ports.add(victim.core.peer[1])
        assert len(ports) == (3 if make is ClientVictim else 0)
        _assert_unique(victim.genuine["victim"], 5)
