"""What somebody on the network can do to a session: nothing. Forged, damaged, replayed and oversized datagrams.

Every attack goes over loopback to a live server and a live client, from the address of the real peer and from another
one. `make attack` sends ten thousand of each and prints what they cost, beside stock's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import mosh
import peers
from conftest import ATTACK_COUNT, ATTACK_KINDS, require_kind
from live_peer import Program
from measuring import Table, cpu_seconds, number

pytestmark = pytest.mark.live

COUNT = ATTACK_COUNT or 64
STOCK_OVERSIZED = 100                   # stock sleeps 0.1 s for each after the tenth
SEED = 20_261_122
BATCH_BYTES = 40_000                    # sent at a time, so that no socket buffer overflows
DATAGRAM_COST_BYTES = 1_000             # what the kernel needs beside the datagram itself
LIMIT_SECONDS = 20.0
HEARTBEAT_MS = mosh.ACK_INTERVAL_MS
QUIET_MS = 300                          # acks and echo acks have come by then
LARGEST = 9_000

needs_proc = pytest.mark.skipif(not Path("/proc/net/udp").exists(), reason="needs /proc")


def _unread(port: int) -> tuple[int, int]:
    """Return (bytes waiting, datagrams lost so far) of the socket on a local port."""
    for name in ("udp", "udp6"):
        for line in Path(f"/proc/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if int(words[1].rpartition(":")[2], 16) == port:
                return int(words[4].partition(":")[2], 16), int(words[-1])
    raise AssertionError(f"nobody listens on port {port}")


class Victim(ABC):
    """A live program under attack, its genuine peer in this process, and everything that they have said."""

    name: str
    core: Any                           # of the peer: a ClientCore or a ServerCore
    port: int
    pid: int

    def __init__(self, kind: peers.Kind, home: Path) -> None:
        self.kind = kind
        self.resources = ExitStack()
        self.genuine: dict[str, list[bytes]] = {"peer": [], "victim": []}
        self.sent_by_victim: Counter[str] = Counter()
        self.sockets = {name: mosh.UdpSocket(socket.AF_INET) for name in ("peer", "other")}
        for udp in self.sockets.values():
            udp.bind(peers.LOOPBACK, 0)
            self.resources.callback(udp.close)
        self._marks = itertools.count()
        self._start(peers.session_env(home, MOSH_PREDICTION_DISPLAY="never", TERM="xterm-256color"))
        self.echo()

    @abstractmethod
    def _start(self, env: dict[str, str]) -> None:
        """Start the program, and make `core`, its peer."""

    @abstractmethod
    def screen(self) -> list[str]:
        """What the user of the session sees, down to the last mark."""

    @abstractmethod
    def type(self, keys: bytes) -> None:
        """The user types."""

    def close(self) -> None:
        """End everything."""
        self.resources.close()

    # -- the genuine exchange

    @property
    def address(self) -> tuple[str, int]:
        """Where the program receives."""
        return peers.LOOPBACK, self.port

    def turn(self, wait_ms: int) -> None:
        """Let the genuine peer send, hear what the program says, and wait for that at most so long."""
        now = mosh.monotonic_ms()
        for datagram in self.core.datagrams_to_send(now):
            self.genuine["peer"].append(datagram)
            self.sockets["peer"].send(datagram, self.address)
        at = self.core.next_timeout()
        until = now + wait_ms if at is None else min(now + wait_ms, at)
        mosh.wait([*self.sockets.values(), *self._extra_descriptors()], (), until)
        for name, udp in self.sockets.items():
            while (received := udp.receive()) is not None:
                self.sent_by_victim[name] += 1
                self.genuine["victim"].append(received[0])
                self.core.receive_datagram(received[0], received[1], mosh.monotonic_ms())

    def _extra_descriptors(self) -> list[int]:
        return []

    def run_until(self, condition: Callable[[], bool], what: str, turn_ms: int = 50) -> None:
        """Let the session go on. Raises TimeoutError with the screen."""
        limit = mosh.monotonic_ms() + LIMIT_SECONDS * 1000
        while not condition():
            if mosh.monotonic_ms() > limit:
                raise TimeoutError(f"waited for {what}; the screen shows {self.screen()}")
            self.turn(turn_ms)

    def rest(self, ms: int) -> None:
        """Let the session go on for so long."""
        until = mosh.monotonic_ms() + ms
        self.run_until(lambda: mosh.monotonic_ms() >= until, "the time to pass")

    def echo(self) -> None:
        """Type something new and see it come back."""
        mark = f"mark {next(self._marks)} "
        self.type(mark.encode())
        self.run_until(lambda: mark in "".join(self.screen()), mark)

    # -- the attack

    def strike(self, datagrams: Iterator[bytes], source: str, count: int) -> tuple[float, int, int, int]:
        """Send so many datagrams. Returns (CPU microseconds each, lost, answers to `source`, milliseconds taken)."""
        answers, lost, began = self.sent_by_victim[source], _unread(self.port)[1], mosh.monotonic_ms()
        cpu = cpu_seconds(self.pid)
        unread = 0
        for datagram in itertools.islice(datagrams, count):
            self.sockets[source].send(datagram, self.address)
            unread += DATAGRAM_COST_BYTES + len(datagram)
            if unread > BATCH_BYTES:
                self.run_until(lambda: _unread(self.port)[0] == 0, "the datagrams to be read", turn_ms=1)
                unread = 0
        self.run_until(lambda: _unread(self.port)[0] == 0, "the datagrams to be read", turn_ms=1)
        cost = (cpu_seconds(self.pid) - cpu) / count * 1e6
        taken_ms = mosh.monotonic_ms() - began
        return cost, _unread(self.port)[1] - lost, self.sent_by_victim[source] - answers, taken_ms


class ServerVictim(Victim):
    """A server; our client core is its peer."""

    name = "server"
    command: tuple[str, ...] = ("cat",)

    def _start(self, env: dict[str, str]) -> None:
        server = self.resources.enter_context(peers.running_server(self.kind, env, command=self.command))
        self.port, self.pid = server.port, server.pid
        self.core = mosh.ClientCore(
            mosh.Channel(mosh.choose_cipher()(mosh.Key.from_text(server.key).raw), mosh.TO_SERVER),
            mosh.monotonic_ms(), width=80, height=24, candidates=[self.address], port=self.port,
            random_bytes=os.urandom,
        )

    def screen(self) -> list[str]:
        """See Victim."""
        lines: list[str] = self.core.screen.lines()
        return lines

    def type(self, keys: bytes) -> None:
        """See Victim."""
        self.core.receive_keys(keys, mosh.monotonic_ms())


class ClientVictim(Victim):
    """A client on a terminal that our emulator plays; our server core is its peer, with a program that echoes."""

    name = "client"

    def _start(self, env: dict[str, str]) -> None:
        key = mosh.Key(os.urandom(mosh.KEY_BYTES))
        self.core = mosh.ServerCore(
            mosh.Channel(mosh.choose_cipher()(key.raw), mosh.TO_CLIENT), mosh.monotonic_ms(), width=80, height=24,
            random_bytes=os.urandom,
        )
        command = peers.client_command(self.kind, self.sockets["peer"].port)
        self.program = Program(command, {**env, "MOSH_KEY": key.to_text()}, (80, 24))
        self.resources.callback(self.program.close)
        self.pid, self.port = self.program.process.pid, 0
        self.run_until(lambda: self.core.peer is not None, "the client to call")
        self.port = self.core.peer[1]

    def turn(self, wait_ms: int) -> None:
        """See Victim."""
        if self.core.host_input:
            self.core.receive_host_output(bytes(self.core.host_input), mosh.monotonic_ms())
            self.core.host_input.clear()
        super().turn(wait_ms)
        while self.program.take_output():
            pass

    def _extra_descriptors(self) -> list[int]:
        return [self.program.fd]

    def screen(self) -> list[str]:
        """See Victim."""
        return self.program.terminal.framebuffer.lines()

    def type(self, keys: bytes) -> None:
        """See Victim."""
        self.program.type(keys)


class FloodingServerVictim(ServerVictim):
    """A server whose program never stops writing."""

    command = ("sh", "-c", "while :; do seq 1 99999; done")

    def echo(self) -> None:
        """See output."""
        seen = self.screen()
        self.run_until(lambda: self.screen() != seen, "any output")


# -- attacks ---------------------------------------------------------------------------------------------------


def _pick(victim: Victim, chance: random.Random) -> bytes:
    return chance.choice(victim.genuine["peer"])


def garbage(_victim: Victim, chance: random.Random) -> bytes:
    """Bytes out of nowhere."""
    return chance.randbytes(chance.randint(0, 1_400))


def bit_flip(victim: Victim, chance: random.Random) -> bytes:
    """What the peer has said, one bit of it changed."""
    data = bytearray(_pick(victim, chance))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def truncation(victim: Victim, chance: random.Random) -> bytes:
    """What the peer has said, cut short."""
    data = _pick(victim, chance)
    return data[: chance.randrange(len(data))]


def extension(victim: Victim, chance: random.Random) -> bytes:
    """What the peer has said, and more."""
    return _pick(victim, chance) + chance.randbytes(chance.randint(1, 200))


def replay(victim: Victim, chance: random.Random) -> bytes:
    """What the peer has said, once more."""
    return _pick(victim, chance)


def reflection(victim: Victim, chance: random.Random) -> bytes:
    """What the victim itself has said."""
    return chance.choice(victim.genuine["victim"])


def oversized(_victim: Victim, chance: random.Random) -> bytes:
    """More than any end reads."""
    return chance.randbytes(chance.randint(mosh.RECEIVE_LIMIT_BYTES + 1, LARGEST))


ATTACKS = (garbage, bit_flip, truncation, extension, replay, reflection, oversized)

SOURCES = {"peer": "its peer's address", "other": "another one"}
VICTIMS: tuple[type[Victim], ...] = (ServerVictim, ClientVictim)


@needs_proc
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("make", VICTIMS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_changes_nothing(
    attack_table: Table, home: Path, attack: Callable[[Victim, random.Random], bytes], make: type[Victim], source: str
) -> None:
    chance = random.Random(SEED)
    cells = []
    for kind in ATTACK_KINDS:
        require_kind(kind)
        with contextlib.closing(make(kind, home)) as victim:
            victim.rest(QUIET_MS)
            before = victim.screen()
            count = min(COUNT, STOCK_OVERSIZED) if (attack, kind) == (oversized, "stock") else COUNT
            datagrams = (attack(victim, chance) for _ in itertools.count())
            cost, lost, answers, taken_ms = victim.strike(datagrams, source, count)
            unharmed = victim.screen() == before
            echoes = True
            if kind == "ours":
                assert unharmed, victim.screen()
                assert lost == 0, "it has not read them all"
                # Nobody else is answered; what a peer hears are the heartbeats that it would have heard anyway.
                assert answers <= (0 if source == "other" else 2 + taken_ms // HEARTBEAT_MS)
                victim.echo()
            else:
                try:
                    victim.echo()
                except TimeoutError:
                    echoes = False
            of = "" if count == COUNT else f" of {count}"
            harm = "unharmed" if unharmed and echoes else "screen changed" if echoes else "no echo any more"
            cells.append(f"{number(cost)} us each{of}, {answers} answers, {harm}")
    attack_table.add(f"{attack.__name__} at the {make.name} from {SOURCES[source]}", [str(COUNT), *cells])


# -- roaming ---------------------------------------------------------------------------------------------------

SILENT_MS = 2_000


def test_a_victim_of_a_forged_address_gets_little(attack_table: Table, home: Path) -> None:
    """A datagram of the client is held up and delivered from elsewhere, while the server has much to say."""
    cells = []
    for kind in ATTACK_KINDS:
        require_kind(kind)
        sent, received = _bytes_to_a_forged_address(kind, home)
        cells.append(f"{received} bytes for {sent} within {SILENT_MS} ms")
        if kind == "ours":
            assert 0 < received <= mosh.AMPLIFICATION_LIMIT * sent
    attack_table.add("datagram held up, delivered from a forged address", ["1", *cells])


def _bytes_to_a_forged_address(kind: peers.Kind, home: Path) -> tuple[int, int]:
    """Return the size of the datagram that pretends to come from there, and of all that the server sends there."""
    with contextlib.closing(FloodingServerVictim(kind, home)) as victim:
        victim.type(b"x")
        victim.rest(1)
        held_up = victim.genuine["peer"][-1]
        victim.type(b"y")
        until = mosh.monotonic_ms() + LIMIT_SECONDS * 1_000
        while victim.genuine["peer"][-1] == held_up and mosh.monotonic_ms() < until:
            victim.genuine["peer"] += victim.core.datagrams_to_send(mosh.monotonic_ms())
        held_up = victim.genuine["peer"][-1]
        victim.sockets["other"].send(held_up, victim.address)
        received = 0
        until = mosh.monotonic_ms() + SILENT_MS
        while mosh.monotonic_ms() < until:
            mosh.wait([victim.sockets["other"]], (), until)
            while (answer := victim.sockets["other"].receive()) is not None:
                received += len(answer[0])
        if kind == "ours":
            victim.echo()                       # the client speaks up, and gets everything again
        return len(held_up), received


def test_a_replayed_datagram_never_moves_the_server(home: Path) -> None:
    with contextlib.closing(FloodingServerVictim("ours", home)) as victim:
        for _ in range(5):
            victim.echo()
            for old in list(victim.genuine["peer"]):
                victim.sockets["other"].send(old, victim.address)
        victim.rest(SILENT_MS)
        victim.echo()
        assert victim.sent_by_victim["other"] == 0 < victim.sent_by_victim["peer"]


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_client_that_roams_answers_the_probe_and_shows_nothing_of_it(kind: peers.Kind, home: Path) -> None:
    """Its next heartbeat makes the server believe that it has moved; its answer to the probe proves the address."""
    require_kind(kind)
    with contextlib.closing(ClientVictim(kind, home)) as victim:
        victim.rest(QUIET_MS)
        before, datagrams = victim.screen(), victim.core.transport.datagrams
        datagrams.peers = [("192.0.2.1", 1)]
        datagrams._proven_peer = None
        victim.run_until(lambda: datagrams.allowance_bytes is not None, "a heartbeat")
        heard, sent = victim.sent_by_victim["peer"], len(victim.genuine["peer"])
        victim.run_until(lambda: datagrams.allowance_bytes is None, "the answer to the probe")
        assert len(victim.genuine["peer"]) == sent + 1 and victim.sent_by_victim["peer"] == heard + 1
        assert victim.screen() == before
        victim.echo()
