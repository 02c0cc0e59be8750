"""What goes wrong around a session: dying ends, signals, full disks, broken sockets. What must be sane afterwards.

After each: the terminal is as it was, nothing is left running, nobody spins, a key typed meanwhile arrives once, and
the other end says what happened. `make attack` plays the same with stock's programs and prints what happened to either.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import mosh
import netns
import peers
import test_server
from conftest import ATTACK_COUNT, ATTACK_KINDS, require_kind
from measuring import Table, cpu_seconds, number
from netns import SERVER_4, Networks
from ptys import PtyProcess, on_a_terminal

pytestmark = [
    pytest.mark.live, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc"),
]

SESSIONS = 100 if ATTACK_COUNT else 20
KILLS = 10 if ATTACK_COUNT else 3       # at random moments, each on its own
AT_ONCE = 8                             # sessions played side by side, since they mostly wait
LIMIT_SECONDS = 20.0
NOTICE_SECONDS = 12.0                   # silence is told after 6.5; stock looks only when it has something else to do
RECOVERY_SECONDS = 45.0                 # the server may find out only at a heartbeat or a port hop
QUIT = b"\x1e."
SUSPEND = b"\x1e\x1a"
STORM = 200
BUSY_SHARE = 0.25       # of a processor: a loop that spins takes all of it, one that waits a hundredth

# What is typed goes into a file, where every arrival is counted, and onto the screen.
RECORDER = ("sh", "-c", "stty -icanon -echo; echo $$ >pid; exec tee typed")
TALKING_RECORDER = ("sh", "-c", "stty -icanon -echo; (while :; do echo tick; sleep 0.1; done) & exec tee typed")
# Runs a client on its terminal as on a controlling one.
CONTROLLED = ("sh", "-c", 'exec "$@" <>"$(tty)" >&0 2>&1', "sh")
# And it may not open that by its name, as after su.
OF_ANOTHER_USER = (
    "sh", "-c", 't=$(tty); exec <>"$t" >&0 2>&1; chmod 0 "$t"; exec "$@"', "sh",
    *(("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()),
)  # fmt: skip
# Runs a program with so many descriptors.
LIMITED = ("sh", "-c", 'ulimit -n "$0" && exec "$@"')


def relatives(home: Path) -> list[int]:
    """Return all running processes that were started with this home folder."""
    mark = b"\0HOME=" + os.fsencode(home) + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + path.read_bytes() and peers.process_alive(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


def zombies(pids: Sequence[int]) -> set[int]:
    """Return the dead processes that one of these has not waited for."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) in pids:
                found.add(int(path.parent.name))
    return found


def cpu_of(pids: Sequence[int]) -> dict[int, float]:
    """Return the CPU seconds so far of those that are still there."""
    used = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            used[pid] = cpu_seconds(pid)
    return used


def assert_nothing_is_left(home: Path) -> None:
    """All processes of a session end soon."""
    peers.wait_until(lambda: not relatives(home), LIMIT_SECONDS, f"the end of {relatives(home)}")


def assert_idle(pid: int) -> None:
    """A process does not spin, for a second."""
    before = cpu_seconds(pid)
    peers.pause(1.0)
    assert cpu_seconds(pid) - before < BUSY_SHARE


# -- a session and what happens to it --------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a fault did to a session."""

    end: str = ""                       # how the client ended, "" if that is not the question
    shown: str = ""                     # what the client says while it lasts
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)      # what must not be
    cpu_ms: float | None = None         # per second, of the busiest process that is left
    back_s: float | None = None         # from the end of the fault to the arrival of what was typed meanwhile

    def phrase(self) -> str:
        """All in a line but for the figures."""
        return ", ".join([*filter(None, [self.end]), *self.notes, *map(str.upper, self.wrong),
                          *([f'"{self.shown}"'] if self.shown else [])])  # fmt: skip


def told(outcomes: Sequence[Outcome]) -> str:
    """What happened, each way with how often it did, and the largest figures."""
    ways = Counter(outcome.phrase() for outcome in outcomes)
    text = "; ".join(way if count == len(outcomes) else f"{count}x {way}" for way, count in ways.most_common())
    backs = [outcome.back_s for outcome in outcomes if outcome.back_s is not None]
    used = [outcome.cpu_ms for outcome in outcomes if outcome.cpu_ms is not None]
    parts = [text, f"back in {max(backs):.1f} s" if backs else "", f"{number(max(used))} ms/s" if used else ""]
    return ", ".join(filter(None, parts)) or "nothing"


class Session:
    """A server and a client on a terminal. What does not happen in time is noted, and the story goes on."""

    def __init__(self, server: peers.Server, client: PtyProcess, home: Path) -> None:
        self.server = server
        self.client = client
        self.home = home
        self.chance = random.Random(home.name)
        self.outcome = Outcome()
        self._emulator = mosh.Emulator(80, 24)
        self._fed = 0
        self._marks = 0
        self._typed: list[str] = []     # during the fault

    # -- looking

    def screen(self) -> list[str]:
        """What the terminal shows."""
        output = self.client.output
        self._emulator.feed(output[self._fed :])
        self._fed = len(output)
        return self._emulator.framebuffer.lines()

    def notice(self) -> str:
        """What the client says on its bar, but for how to quit."""
        return self.screen()[0].partition("mosh: ")[2].partition("[To quit")[0].strip()

    def arrivals(self, mark: str) -> int:
        """How often a mark has come to the program."""
        try:
            return (self.home / "typed").read_text(encoding="utf-8").count(mark)
        except FileNotFoundError:
            return 0

    def wait(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        """Whether the condition holds in time; the client's output is read meanwhile."""
        try:
            self.client.read_until(lambda _: condition(), seconds)
        except TimeoutError:
            return False
        return True

    def look(self, seconds: float = 1.0) -> None:
        """Note the CPU of what is running, and zombies."""
        pids = relatives(self.home)
        before, dead = cpu_of(pids), zombies(pids)
        self.wait(lambda: False, seconds)
        used = (1000 * (after - before[pid]) / seconds for pid, after in cpu_of(pids).items() if pid in before)
        self.outcome.cpu_ms = max(used, default=0.0)
        if self.outcome.cpu_ms > 1000 * BUSY_SHARE:
            self.outcome.wrong.append("spins")
        if dead := dead & zombies(pids):
            self.outcome.wrong.append(f"{len(dead)} zombies")

    def see_notice(self) -> None:
        """Wait for what the client says, and note it; it may have nothing to say."""
        self.wait(lambda: bool(self.notice()), NOTICE_SECONDS)
        self.outcome.shown = self.notice()

    # -- typing

    def press(self) -> str:
        """Type something new, while the fault lasts. Returns it."""
        self._marks += 1
        mark = f"<{self._marks}>"
        self._typed.append(mark)
        self.client.type(mark.encode())
        return mark

    def echo(self) -> None:
        """Type something new; see it arrive and come back."""
        mark = self.press()
        if not self.wait(lambda: self.arrivals(mark) > 0 and mark in "".join(self.screen())):
            self.outcome.wrong.append("no echo")

    def recover(self) -> None:
        """The fault is over: what was typed meanwhile comes through, and how soon is noted."""
        began = time.monotonic()
        done = self.wait(lambda: all(self.arrivals(mark) for mark in self._typed), RECOVERY_SECONDS)
        if done:
            self.outcome.back_s = time.monotonic() - began
        self.echo()

    # -- ending

    def quit(self) -> None:
        """The user ends the session, and that is seen."""
        self.client.type(QUIT)
        self.see_end()

    def end_server(self) -> None:
        """Ask the server to go, twice, which means at once."""
        for _ in range(2):
            os.kill(self.server.pid, signal.SIGTERM)

    def see_end(self) -> None:
        """The client ends, the terminal is as it was, and nothing is left."""
        wrong = self.outcome.wrong
        if self.wait(lambda: self.client.status is not None):
            status = self.client.wait()
            self.outcome.end = f"exit {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        else:
            wrong.append("client does not end")
        if self.client.modes() != self.client.modes_before:
            wrong.append("terminal left raw")
        if b"Traceback" in self.client.output:
            wrong.append("traceback")
        counts = {self.arrivals(mark) for mark in self._typed}
        if counts - {1}:
            wrong.append("key lost" if 0 in counts else "key doubled")
        self.see_nothing_left()

    def see_nothing_left(self) -> None:
        """All processes end."""
        try:
            assert_nothing_is_left(self.home)
        except TimeoutError:
            self.outcome.wrong.append(f"{len(relatives(self.home))} left")

    def wait_for_processes(self, condition: Callable[[], bool], wrong: str) -> None:
        """Wait for something about processes. `wrong`: what to note otherwise."""
        try:
            peers.wait_until(condition, LIMIT_SECONDS, wrong)
        except TimeoutError:
            self.outcome.wrong.append(wrong)


def environ_of_client(home: Path, server: peers.Server) -> dict[str, str]:
    """A client's environment. Without predictions: what is seen has been to the server and back."""
    return peers.session_env(home, TERM="xterm-256color", MOSH_KEY=server.key, MOSH_PREDICTION_DISPLAY="never")


@contextmanager
def opened(
    home: Path, *, kind: peers.Kind = "ours", command: Sequence[str] = RECORDER, program: Sequence[str] = (),
    prefix: Sequence[str] = (), networks: Networks | None = None, begun: bool = True,
) -> Iterator[Session]:
    """A session. `program`: what takes the client's arguments instead of ours; `prefix`: words to run a client with.

    `networks`: client and server are on its machines. `begun`: the client has shown that it works.
    """
    place, options, host = [], [], peers.LOOPBACK
    if networks is not None:
        prefix, place = networks.words(networks.client), networks.words(networks.server)
        options, host = ["-i", "::"], SERVER_4
    with peers.running_server(kind, peers.session_env(home), *options, command=command, prefix=place) as server:
        words = peers.client_command(kind, server.port, host=host)
        if program:
            words = [*program, *words[len(peers.ours_command()) :]]
        with on_a_terminal([*prefix, *words], environ_of_client(home, server)) as client:
            session = Session(server, client, home)
            if begun:
                client.read_until(lambda output: b"\x1b[?1h" in output)
                session.echo()
            yield session


Story = Callable[[Session], None]
Play = Callable[[peers.Kind, Path, int], Outcome]


class Faults:
    """Plays faults with every kind of program, and writes down what happened."""

    def __init__(self, table: Table, folder: Path) -> None:
        self._table = table
        self._folder = folder

    def play(self, fault: str, story: Story, times: int = 1, *, command: Sequence[str] = RECORDER,
             prefix: Sequence[str] = (), begun: bool = True) -> list[Outcome]:
        """Play a story of a session; see `opened` and `record`."""
        def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
            with opened(home, kind=kind, command=command, prefix=prefix, begun=begun) as session:
                story(session)
                return session.outcome

        return self.record(fault, play, range(times))

    def record(self, fault: str, play: Play, numbers: Sequence[int], *, at_once: int = AT_ONCE) -> list[Outcome]:
        """Play something once for each number and kind, each in a home of its own, and make a row of the table.

        Returns what happened to ours, to which nothing wrong has. Whatever happens to stock is only written down.
        """
        outcomes = self._outcomes(play, numbers, at_once)
        self._write(fault, outcomes)
        return outcomes["ours"]

    def record_each(self, faults: Sequence[str], play: Play) -> list[Outcome]:
        """Play something once for each fault and kind, and make a row for each fault; see `record`."""
        outcomes = self._outcomes(play, range(len(faults)), AT_ONCE)
        for place, fault in enumerate(faults):
            self._write(fault, {kind: [of_kind[place]] for kind, of_kind in outcomes.items()})
        return outcomes["ours"]

    def _outcomes(self, play: Play, numbers: Sequence[int], at_once: int) -> dict[peers.Kind, list[Outcome]]:
        require_kind(*ATTACK_KINDS)
        with ThreadPoolExecutor(at_once) as pool:
            playing = {
                kind: [pool.submit(self._play, play, kind, number) for number in numbers] for kind in ATTACK_KINDS
            }
        return {kind: [each.result() for each in of_kind] for kind, of_kind in playing.items()}

    def _write(self, fault: str, outcomes: dict[peers.Kind, list[Outcome]]) -> None:
        self._table.add(fault, [str(len(outcomes["ours"])), *map(told, outcomes.values())])
        wrong = [outcome for outcome in outcomes["ours"] if outcome.wrong]
        assert not wrong, f"{fault}: {wrong}"

    def _play(self, play: Play, kind: peers.Kind, number: int) -> Outcome:
        home = self._folder / f"{kind}-{number}"
        home.mkdir(mode=0o700)
        try:
            return play(kind, home, number)
        except Exception as error:      # whatever stock does is a line of the table
            if kind == "ours":
                raise
            return Outcome(wrong=[f"fails: {type(error).__name__} {' '.join(str(error).split())[:60]}".strip()])
        finally:
            for pid in relatives(home):
                peers.end_process(pid)


@pytest.fixture
def faults(attack_table: Table, tmp_path: Path) -> Faults:
    """See Faults."""
    return Faults(attack_table, tmp_path)


# -- an end dies -----------------------------------------------------------------------------------------------


def test_a_server_killed_before_a_client_comes_leaves_nothing_and_runs_nothing(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, seed: int) -> Outcome:
        ran, outcome = home / "ran", Outcome()
        server = peers.start_server(kind, peers.session_env(home), command=("sh", "-c", f"echo >{ran}; exec cat"))
        peers.pause(random.Random(seed).random() * 0.02)
        os.kill(server.pid, signal.SIGKILL)
        peers.wait_until(lambda: not server.alive(), LIMIT_SECONDS, "the server to die")
        try:
            assert_nothing_is_left(home)
        except TimeoutError:
            outcome.wrong.append(f"{len(relatives(home))} left")
        (outcome.wrong if ran.exists() else outcome.notes).append(
            "the program has run" if ran.exists() else "the program does not run"
        )
        return outcome

    faults.record("server: kill -9 before a client comes", play, range(KILLS))


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


def test_a_server_killed_while_a_client_comes_leaves_nothing(faults: Faults) -> None:
    def story(session: Session) -> None:
        peers.pause(session.chance.random() * 0.6)
        os.kill(session.server.pid, signal.SIGKILL)
        session.wait_for_processes(lambda: not session.server.alive(), "server stays")
        session.wait(lambda: b"\x1b[?1h" in session.client.output)
        session.quit()

    for outcome in faults.play("server: kill -9 while a client comes", story, KILLS, begun=False):
        assert outcome.end == "exit 1"


def test_a_client_whose_server_is_killed_says_so_and_can_be_quit(faults: Faults) -> None:
    def story(session: Session) -> None:
        os.kill(session.server.pid, signal.SIGKILL)
        session.client.type(b"x")
        session.see_notice()
        session.look()
        session.quit()
        if b"did not shut down cleanly" in session.client.output:
            session.outcome.notes.append("says unclean")

    (outcome,) = faults.play("server: kill -9, which closes its port", story)
    said = os.strerror(errno.ECONNREFUSED) if sys.platform.startswith("linux") else "Last contact"
    assert said in outcome.shown and outcome.notes == ["says unclean"] and outcome.end == "exit 1"


def test_a_server_whose_client_is_killed_waits_idly_and_can_be_ended(faults: Faults) -> None:
    def story(session: Session) -> None:
        peers.pause(session.chance.random() * 0.6)
        session.client.send_signal(signal.SIGKILL)
        session.client.wait()
        session.look()
        session.outcome.notes.append("server waits" if session.server.alive() else "server ends")
        session.end_server()
        session.see_nothing_left()

    for outcome in faults.play("client: kill -9 (nobody puts its terminal right)", story, KILLS):
        assert outcome.notes == ["server waits"]


def test_a_killed_program_ends_the_session(faults: Faults) -> None:
    def story(session: Session) -> None:
        os.kill(int((session.home / "pid").read_text(encoding="ascii")), signal.SIGKILL)
        session.see_end()

    (outcome,) = faults.play("program of the session: kill -9", story)
    assert outcome.end == "exit 0"


@pytest.mark.parametrize(("prefix", "how"), [((), "closed"), (CONTROLLED, "closed, and SIGHUP")])
def test_a_closed_terminal_ends_client_and_server(faults: Faults, prefix: tuple[str, ...], how: str) -> None:
    def story(session: Session) -> None:
        session.client.hang_up()
        session.wait_for_processes(lambda: not session.server.alive(), "server stays")
        session.see_nothing_left()
        session.wait_for_processes(lambda: session.client.status is not None, "client stays")
        session.outcome.end = f"exit {session.client.status}"

    (outcome,) = faults.play(f"client: its terminal is {how}", story, prefix=prefix)
    assert outcome.end == "exit 0"


def test_a_terminal_that_closes_under_a_suspended_client_ends_client_and_server(home: Path) -> None:
    """The system wakes it, for the hang-up to be seen: it must not try to take its terminal back."""
    with opened(home) as session:
        session.client.send_signal(signal.SIGSTOP)
        session.client.hang_up()
        session.client.send_signal(signal.SIGCONT)
        peers.wait_until(lambda: not session.server.alive(), LIMIT_SECONDS, "the server to leave")
        assert_nothing_is_left(home)


# -- a terminal that takes nothing -----------------------------------------------------------------------------


def pause(session: Session) -> None:
    """Pause the terminal, and wait until the client has a frame for it."""
    session.client.pause()
    session.press()
    session.look()


@pytest.mark.parametrize(("prefix", "whose"), [((), "its"), (OF_ANOTHER_USER, "another user's")])
def test_a_paused_terminal_does_not_pause_the_session(faults: Faults, prefix: tuple[str, ...], whose: str) -> None:
    def story(session: Session) -> None:
        pause(session)
        mark = session.press()
        if not session.wait(lambda: session.arrivals(mark) > 0):
            session.outcome.wrong.append("keys wait")
        session.client.resume()
        session.recover()
        session.quit()

    (outcome,) = faults.play(f"client: {whose} terminal is paused", story, command=TALKING_RECORDER, prefix=prefix)
    assert outcome.end == "exit 0"


@pytest.mark.parametrize(("how", "ends_at_once"), [("quits", False), ("SIGTERM", True)])
def test_a_session_can_be_ended_while_the_terminal_is_paused(faults: Faults, how: str, ends_at_once: bool) -> None:
    """The server ends. So does a client that is told to; one that is not waits, to leave no mess on the terminal."""
    def story(session: Session) -> None:
        pause(session)
        if ends_at_once:
            session.client.send_signal(signal.SIGTERM)
            if not session.wait(lambda: session.client.status is not None):
                session.outcome.wrong.append("client does not end")
        else:
            session.client.type(QUIT)
        session.wait_for_processes(lambda: not session.server.alive(), "server stays")
        session.client.resume()
        session.see_end()
        if not ends_at_once and mosh._CLOSE_SEQUENCES not in session.client.output:
            session.outcome.wrong.append("terminal not reset")

    (outcome,) = faults.play(f"client: its terminal is paused, {how}", story, command=TALKING_RECORDER)
    assert outcome.end == "exit 0"


def test_a_client_that_waits_for_its_terminal_can_be_told_to_end(home: Path) -> None:
    with opened(home, command=TALKING_RECORDER) as session:
        pause(session)
        session.client.type(QUIT)
        session.wait_for_processes(lambda: not session.server.alive(), "server stays")
        session.client.send_signal(signal.SIGTERM)
        session.see_end()
        assert (session.outcome.end, session.outcome.wrong) == ("exit 0", [])


def test_a_client_that_waits_for_its_terminal_before_it_suspends_can_be_told_to_end(home: Path) -> None:
    """It does not stop then: it would neither end nor be seen to have stopped where its shell has gone, too."""
    with opened(home, command=TALKING_RECORDER) as session:
        pause(session)
        session.client.type(SUSPEND)
        session.look()
        session.client.send_signal(signal.SIGTERM)
        session.see_end()
        assert (session.outcome.end, session.outcome.wrong) == ("exit 0", [])


# -- signals and pauses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGCONT, signal.SIGWINCH])
def test_a_storm_of_harmless_signals_is_survived(faults: Faults, signum: signal.Signals) -> None:
    def story(session: Session) -> None:
        for _ in range(STORM):
            session.client.send_signal(signum)
            os.kill(session.server.pid, signal.SIGHUP)
        session.echo()
        session.look()
        session.quit()

    (outcome,) = faults.play(f"{STORM} {signum.name} for the client, SIGHUP for the server", story)
    assert outcome.end == "exit 0"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_storm_of_deadly_signals_leaves_a_sane_terminal(faults: Faults, signum: signal.Signals) -> None:
    def story(session: Session) -> None:
        for _ in range(STORM):
            session.client.send_signal(signum)
        session.see_end()

    (outcome,) = faults.play(f"client: {STORM} {signum.name}", story)
    assert outcome.end in ("exit 0", "exit 1", f"killed by {signum.name}")


def test_a_storm_of_deadly_signals_ends_a_server_and_its_client(faults: Faults) -> None:
    """One signal says goodbye, the next one means at once: then the client has to find out, and be quit."""
    def story(session: Session) -> None:
        for _ in range(STORM):
            with contextlib.suppress(ProcessLookupError):
                os.kill(session.server.pid, signal.SIGTERM)
        session.wait_for_processes(lambda: not session.server.alive(), "server stays")
        session.quit()

    (outcome,) = faults.play(f"server: {STORM} SIGTERM", story)
    assert outcome.end in ("exit 0", "exit 1")


def test_a_stopped_client_goes_on_where_it_was(faults: Faults) -> None:
    def story(session: Session) -> None:
        session.client.send_signal(signal.SIGSTOP)
        session.press()
        session.look(3.0)
        session.client.send_signal(signal.SIGCONT)
        session.recover()
        session.quit()

    (outcome,) = faults.play("client: stopped for 3 s while there is output", story, command=TALKING_RECORDER)
    assert outcome.end == "exit 0"


def suspend(session: Session) -> None:
    """Press the keys that suspend the client, and wait until it has stopped."""
    session.client.type(SUSPEND)
    status = Path(f"/proc/{session.client.pid}/status")
    peers.wait_until(lambda: "State:\tT" in status.read_text(), LIMIT_SECONDS, "the client to stop")


def test_a_client_that_has_been_suspended_takes_the_terminal_again_once(home: Path) -> None:
    """Twice would leave the user's title behind on the terminal's stack of titles."""
    with opened(home) as session:
        suspend(session)
        session.client.send_signal(signal.SIGCONT)
        session.client.read_until(lambda output: output.count(b"\x1b[2J") == 2)
        session.echo()
        assert session.client.output.count(b"\x1b[?1h") == 2
        session.quit()
        assert (session.outcome.end, session.outcome.wrong) == ("exit 0", [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_client_that_is_told_to_end_while_suspended_ends_when_it_goes_on(home: Path, number: signal.Signals) -> None:
    with opened(home) as session:
        suspend(session)
        session.client.send_signal(number)
        session.client.send_signal(signal.SIGCONT)
        session.see_end()
        assert (session.outcome.end, session.outcome.wrong) == ("exit 0", [])


def test_no_clock_is_read_that_anybody_can_set(attack_table: Table) -> None:
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
    cells = {"ours": "reads no clock that can be set", "stock": "not run"}
    attack_table.add("wall clock set back an hour", ["0", *(cells[kind] for kind in ATTACK_KINDS)])


# -- nothing left ----------------------------------------------------------------------------------------------


def test_a_full_disk_under_the_announcement_is_told_and_leaves_no_server(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
        with Path("/dev/full").open("w") as full:
            finished = subprocess.run(
                peers.server_command(kind), env=peers.session_env(home), stdin=subprocess.DEVNULL, stdout=full,
                stderr=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS,
            )
        outcome = Outcome(f"exit {finished.returncode}", finished.stderr.strip().partition("\n")[0])
        if left := len(relatives(home)):
            outcome.wrong.append(f"{left} left that nobody knows the key of")
        return outcome

    (outcome,) = faults.record("server: disk full under its announcement", play, [0])
    assert outcome.end == "exit 1" and outcome.shown == f"mosh: {os.strerror(errno.ENOSPC)}"


def test_a_full_disk_under_the_log_is_survived(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
        with Path("/dev/full").open("w") as full:
            login = subprocess.Popen(
                peers.server_command(kind, "-v", command=("cat",)), env=peers.session_env(home),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full, text=True,
            )
        with login:
            assert login.stdout is not None
            connect = peers._CONNECT.search(login.stdout.readline())
            if connect is None:
                raise RuntimeError("no announcement")
            peers.wait_until(lambda: login.poll() is not None, LIMIT_SECONDS, "the server to detach")
            family = relatives(home)
            (pid,) = (pid for pid in family if _parent(pid) not in family)
            _echo_from(peers.Server(port=int(connect[1]), key=connect[2], pid=pid))
            peers.end_process(pid)
        assert_nothing_is_left(home)
        return Outcome(f"exit {login.returncode}", notes=["serves"])

    (outcome,) = faults.record("server: disk full under its log (-v)", play, [0])
    assert outcome.end == "exit 0"


def _echo_from(server: peers.Server) -> None:
    """See a server echo. Raises TimeoutError."""
    with test_server.Session(server) as session:
        session.type(b"still here")
        session.wait_for("still here")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


DESCRIPTORS = range(3, 12)


def test_a_server_with_too_few_descriptors_says_so_in_a_line(faults: Faults) -> None:
    """It either serves or says why not. Python itself needs some, and may speak first."""
    def play(kind: peers.Kind, home: Path, count: int) -> Outcome:
        finished = subprocess.run(
            [*LIMITED, str(count), *peers.server_command(kind, command=("cat",))], env=peers.session_env(home),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )
        connect, detached = peers._CONNECT.search(finished.stdout), peers._DETACHED.search(finished.stderr)
        if finished.returncode or not connect or not detached:
            if finished.stderr.startswith("mosh: "):
                assert finished.stderr.count("\n") <= 2, finished.stderr
            return Outcome(notes=["says why not" if finished.stderr else "says nothing"],
                           wrong=["announces itself"] if connect else [])  # fmt: skip
        try:
            _echo_from(peers.Server(port=int(connect[1]), key=connect[2], pid=int(detached[1])))
        except TimeoutError:
            return Outcome(wrong=["announces itself and does not serve"])
        return Outcome(notes=["serves"])

    outcomes = faults.record("server: 3 to 11 descriptors", play, DESCRIPTORS)
    assert [outcome.notes for outcome in outcomes[-3:]] == [["serves"]] * 3


def test_a_client_with_too_few_descriptors_says_so(faults: Faults) -> None:
    """It may be in a line before the session, or in the session, which can be quit."""
    def play(kind: peers.Kind, home: Path, count: int) -> Outcome:
        with opened(home, kind=kind, prefix=[*LIMITED, str(count)], begun=False) as session:
            mark = session.press()
            session.wait(lambda: bool(session.arrivals(mark) or session.notice() or session.client.status is not None))
            if session.arrivals(mark):
                session.quit()
                return session.outcome
            outcome = Outcome()
            if session.client.status is None:
                session.client.type(QUIT)
            status = session.client.wait()
            outcome.end = f"exit {status}, says why" if session.client.output else f"exit {status}, says nothing"
            if b"mosh.py" in session.client.output:
                outcome.wrong.append("traceback")
            if session.client.modes() != session.client.modes_before:
                outcome.wrong.append("terminal left raw")
            return outcome

    outcomes = faults.record("client: 3 to 11 descriptors", play, DESCRIPTORS)
    assert all("says nothing" not in outcome.end for outcome in outcomes) and outcomes[-1].end == "exit 0"


def test_a_session_out_of_descriptors_goes_on(faults: Faults) -> None:
    """The client cannot open another port, and goes on with those it has."""
    def story(session: Session) -> None:
        for pid in (session.client.pid, session.server.pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))
        session.echo()
        session.look()
        session.quit()

    (outcome,) = faults.play("both ends: no descriptors any more", story)
    assert outcome.end == "exit 0"


# -- broken networks -------------------------------------------------------------------------------------------

needs_namespaces = pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable() or "there are namespaces")
TO_SERVER = f"{SERVER_4}/32"
# What breaks, how, how it is put right, and what our client says meanwhile.
NETWORK_FAULTS: list[tuple[str, Callable[[Networks], None], Callable[[Networks], None], str]] = [
    ("client: interface down (ENETUNREACH)", lambda networks: networks.unplug(0),
     lambda networks: networks.plug_in(0, "4"), os.strerror(errno.ENETUNREACH)),
    ("client: interface vanishes, comes back with another address", lambda networks: networks.remove(0),
     lambda networks: _lay_again(networks), os.strerror(errno.ENETUNREACH)),
    ("client: no way there (EHOSTUNREACH)", lambda networks: networks.on_client(f"route add unreachable {TO_SERVER}"),
     lambda networks: networks.on_client(f"route del {TO_SERVER}"), os.strerror(errno.EHOSTUNREACH)),
    ("client: a rule forbids it (EACCES)", lambda networks: networks.on_client(f"route add prohibit {TO_SERVER}"),
     lambda networks: networks.on_client(f"route del {TO_SERVER}"), os.strerror(errno.EACCES)),
    ("client: a route swallows it (EINVAL)", lambda networks: networks.on_client(f"route add blackhole {TO_SERVER}"),
     lambda networks: networks.on_client(f"route del {TO_SERVER}"), os.strerror(errno.EINVAL)),
    ("server: interface down (ENETUNREACH)", lambda networks: networks.on_server("link set link0 down"),
     lambda networks: networks.on_server("link set link0 up"),
     os.strerror(errno.EHOSTUNREACH)),
    ("server: a rule forbids it (EACCES)", lambda networks: networks.on_server("route add prohibit 10.0.0.1/32"),
     lambda networks: networks.on_server("route del 10.0.0.1/32"), "Last contact"),
]  # fmt: skip


def _lay_again(networks: Networks) -> None:
    networks.lay(0)
    networks.plug_in(0, "4", host=7)


@contextmanager
def opened_across(home: Path, kind: peers.Kind) -> Iterator[tuple[Session, Networks]]:
    """A session between two machines, which link 0 joins."""
    with Networks(links=1) as networks:
        networks.plug_in(0, "4")
        with opened(home, kind=kind, networks=networks) as session:
            yield session, networks


@needs_namespaces
def test_broken_networks_are_told_and_cost_no_key(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, place: int) -> Outcome:
        _, break_it, mend_it, _ = NETWORK_FAULTS[place]
        with opened_across(home, kind) as (session, networks):
            break_it(networks)
            session.press()
            session.see_notice()
            session.look()
            mend_it(networks)
            session.recover()
            session.quit()
            return session.outcome

    outcomes = faults.record_each([fault for fault, *_ in NETWORK_FAULTS], play)
    for (fault, _, _, said), outcome in zip(NETWORK_FAULTS, outcomes):
        assert said in outcome.shown and outcome.end == "exit 0", fault


@needs_namespaces
def test_a_link_that_takes_only_small_packets_costs_no_key(faults: Faults) -> None:
    noise = bytes(random.Random(1).choices(range(0x21, 0x7F), k=1_400)).decode()

    def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
        with opened_across(home, kind) as (session, networks):
            networks.on_client("link set link0 mtu 600")
            networks.on_server("link set link0 mtu 600")
            session.client.type(noise.encode())
            there = session.wait(lambda: noise in "".join(session.screen()))
            (session.outcome.notes if there else session.outcome.wrong).append(
                f"{len(noise)} characters {'come' if there else 'do not come'} back"
            )
            session.look()
            session.quit()
            return session.outcome

    (outcome,) = faults.record("both ends: link with an MTU of 600", play, [0])
    assert outcome.end == "exit 0"


def test_a_client_that_nobody_answers_says_so_and_can_be_quit(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
        server = peers.start_server(kind, peers.session_env(home))
        peers.end_process(server.pid)
        with on_a_terminal(peers.client_command(kind, server.port), environ_of_client(home, server)) as client:
            session = Session(server, client, home)
            session.see_notice()
            session.look()
            session.quit()
            return session.outcome

    (outcome,) = faults.record("client: nobody listens at the port", play, [0])
    said = os.strerror(errno.ECONNREFUSED) if sys.platform.startswith("linux") else "Nothing received"
    assert said in outcome.shown and outcome.end == "exit 1"


# -- sockets that refuse ---------------------------------------------------------------------------------------


class CannotTraceError(Exception):
    """There is no strace, or it may not."""


@contextmanager
def refusing(pid: int, error: str) -> Iterator[None]:
    """Let everything that a running process sends fail with this error, for the length of a `with` block."""
    if shutil.which("strace") is None:
        raise CannotTraceError("strace is not installed")
    calls = "sendto,sendmsg"
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", os.devnull, "-e", f"trace={calls}",
         "-e", f"inject={calls}:error={error}"],
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )
    assert tracer.stderr is not None
    try:
        first = tracer.stderr.readline()
        if "attached" not in first:
            raise CannotTraceError(first.strip())
        yield
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


# One of each meaning; all that a send may meet for `make attack`.
ERRORS = ["EAGAIN", "EPERM", "EMSGSIZE"]
if ATTACK_COUNT:
    ERRORS += ["ENOBUFS", "ENOMEM", "ECONNREFUSED", "ENETUNREACH", "EIO"]


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_socket_that_refuses_everything_for_a_while_costs_no_key(faults: Faults, end: str) -> None:
    def play(kind: peers.Kind, home: Path, place: int) -> Outcome:
        with opened(home, kind=kind) as session:
            with refusing({"client": session.client.pid, "server": session.server.pid}[end], ERRORS[place]):
                session.press()
                session.see_notice()
                session.look()
            session.recover()
            session.quit()
            return session.outcome

    try:
        outcomes = faults.record_each([f"{end}: nothing can be sent for a while ({error})" for error in ERRORS], play)
    except CannotTraceError as missing:
        pytest.skip(str(missing))
    assert {outcome.end for outcome in outcomes} == {"exit 0"}
    assert all(outcome.shown for outcome in outcomes)


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
    with opened(home, program=_broken(name, 2)) as session:
        assert_idle(session.client.pid)
        session.quit()
    assert session.outcome.end == "exit 0" and not session.outcome.wrong
    assert f"sendto: {os.strerror(getattr(errno, name))}".encode() in session.client.output


def test_a_client_that_can_never_send_says_why_does_not_spin_and_can_be_quit(home: Path) -> None:
    with peers.running_server("ours", peers.session_env(home), command=("cat",)) as server, on_a_terminal(
        [*_broken("ENETUNREACH", 10**9), "client", peers.LOOPBACK, str(server.port)], environ_of_client(home, server)
    ) as client:
        client.read_until(lambda output: os.strerror(errno.ENETUNREACH).encode() in output)
        assert_idle(client.pid)
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
            assert_idle(server.pid)
    assert_nothing_is_left(home)


# -- many at once ----------------------------------------------------------------------------------------------


def test_many_sessions_at_once(faults: Faults) -> None:
    def play(kind: peers.Kind, home: Path, _number: int) -> Outcome:
        used: list[float] = []
        with ThreadPoolExecutor(max_workers=SESSIONS) as pool:
            for play_of_one in [pool.submit(_one_of_many, kind, home, used, one) for one in range(SESSIONS)]:
                play_of_one.result()
        assert_nothing_is_left(home)
        return Outcome(notes=["all echo and end", f"{1000 * sum(used) / SESSIONS:.0f} ms of CPU each"])

    faults.record(f"{SESSIONS} servers at once", play, [0], at_once=1)


def _one_of_many(kind: peers.Kind, home: Path, used: list[float], number: int) -> None:
    """A session that goes on until all are there, and is ended in good order. `used`: CPU of the servers by then."""
    with peers.running_server(
        kind, peers.session_env(home), command=("cat",)
    ) as server, test_server.Session(server) as session:
        session.type(b"I am session %d." % number)
        session.wait_for(f"I am session {number}.")
        used.append(cpu_seconds(server.pid))
        session.run_until(lambda: len(used) == SESSIONS)
        session.core.start_shutdown("", mosh.monotonic_ms())
        session.run_until(lambda: session.core.phase is mosh.Phase.CLOSED)
        if not session.core.transport.clean:
            raise RuntimeError("an end that is not clean")
