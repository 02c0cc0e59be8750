"""A whole session in one process: both cores, a network, a user and a program, on a clock that only jumps.

Everything random comes from one seed, so a run that failed can be had again. Time is in whole milliseconds and moves
from one event to the next: a datagram arrives, the program writes, the user types, a core's deadline is reached. The
two ends take their turns exactly as the loops of the real server and client do: feed, drain, draw, and then nothing
until something comes in or `next_timeout` is reached. A core that names the wrong deadline is therefore found out.

    sim = Simulation(seed=1)
    sim.link.delay_ms, sim.link.loss = 100, 0.3
    sim.client.type("echo hello\\r")
    sim.run(ms=2_000)
    assert sim.client.screen == sim.server.screen
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Optional, Union

import mosh
import vectors

Address = tuple[str, int]
Output = tuple[int, Optional[bytes]]  # so many ms later the program writes this; None: it exits

SERVER_ADDRESS: Address = ("192.0.2.1", 60001)
HOME_ADDRESS: Address = ("198.51.100.7", 40000)
NEW_ADDRESS: Address = ("203.0.113.9", 50000)

WIDTH, HEIGHT = 60, 12
UDP_HEADERS_BYTES = 28
HELD_BACK_MS = 300  # how much later a reordered datagram comes
EVENT_LIMIT = 500_000  # events of one run; more is a bug, not a long story
TURN_LIMIT = 10  # turns that one end may ask for within one millisecond


class Link:
    """What the network does to a datagram, in both directions; a test changes it at any time."""

    def __init__(self) -> None:
        self.mtu_bytes = 1_500  # larger packets are refused at the sender, as a network interface does
        self.blocked: set[int] = set()  # directions (mosh.TO_SERVER, mosh.TO_CLIENT) in which nothing gets through
        self.heal()

    def heal(self) -> None:
        """Be a good network from now on."""
        self.delay_ms = 10
        self.jitter_ms = 0  # each datagram is up to this much later, so they overtake each other
        self.loss = self.duplication = self.reordering = self.congestion = 0.0  # shares of all datagrams
        self.silent_until = 0  # nothing sent before this arrives
        self.blocked.clear()

    def arrivals(self, direction: int, now: int, rng: random.Random) -> Iterator[int]:
        """Yield when the copies of a datagram sent now arrive: usually one, but possibly none or two."""
        copies = 2 if rng.random() < self.duplication else 1
        for _ in range(copies):
            late_ms = rng.randint(0, self.jitter_ms) + HELD_BACK_MS * (rng.random() < self.reordering)
            lost = rng.random() < self.loss
            if not (lost or now < self.silent_until or direction in self.blocked):
                yield now + self.delay_ms + late_ms


def _lines(framebuffer: mosh.Framebuffer) -> list[str]:
    """Return the rows as they look: of a wide character that a resize has cut in half nothing is left."""
    lines = framebuffer.lines()
    for row in range(framebuffer.height):
        last = framebuffer.cell(row, framebuffer.width - 1)
        if last.wide:
            lines[row] = lines[row][: -len(last.contents)] + " "
    return lines


class Screen:
    """What a screen shows, comparable between the two ends, whose internal codes differ."""

    def __init__(self, framebuffer: mosh.Framebuffer) -> None:
        self._framebuffer = framebuffer.copy()

    @property
    def lines(self) -> list[str]:
        """The rows, without blanks at their ends."""
        return [line.rstrip() for line in _lines(self._framebuffer)]

    @property
    def text(self) -> str:
        """All rows, less empty ones at the end."""
        return "\n".join(self.lines).rstrip("\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Screen) and vectors.shown(self._framebuffer) == vectors.shown(other._framebuffer)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "\n" + "\n".join(f"|{line}" for line in self._framebuffer.lines())


class LineShell:
    """The program on the pty: echoes what is typed and runs a few commands.

    `lines N` prints N lines at once, `burst N` one every 3 ms, `title X` sets the window title, `clear` clears the
    screen, `quiet` stops the echo until the next Return, `exit` ends. Everything else is answered by itself.
    """

    PROMPT = b"$ "

    def __init__(self) -> None:
        self.received = bytearray()  # every byte it has ever read
        self.echo_ms = 1  # how long it thinks
        self._line = bytearray()
        self._echoes = True

    def start(self) -> Iterator[Output]:
        """Yield what it writes unasked."""
        yield 0, self.PROMPT

    def read(self, data: bytes) -> Iterator[Output]:
        """Yield what it writes on reading `data`, later pieces never before earlier ones."""
        self.received += data
        for key in data:
            if key in b"\r\n":
                self._echoes = True
                yield self.echo_ms, b"\r\n"
                yield from self._execute(*bytes(self._line).partition(b" ")[::2])
                self._line.clear()
            elif key == 0x7F:
                if self._line:
                    self._line.pop()
                    yield self.echo_ms, b"\b \b"
            elif key == 0x0C:
                yield self.echo_ms, b"\x1b[H\x1b[2J" + self.PROMPT + bytes(self._line)
            elif key >= 0x20:
                self._line.append(key)
                if self._echoes:
                    yield self.echo_ms, bytes((key,))

    def _execute(self, name: bytes, argument: bytes) -> Iterator[Output]:
        at = self.echo_ms
        if name == b"exit":
            yield at, b"bye\r\n"
            yield at, None
            return
        if name == b"lines":
            yield at, b"".join(b"\x1b[3%dmline %d\x1b[m\r\n" % (i % 8, i) for i in range(_count(argument)))
        elif name == b"burst":
            for i in range(_count(argument)):
                at += 3
                yield at, b"output %d " % i + b"x" * (i % 50) + b"\r\n"
        elif name == b"title":
            yield at, b"\x1b]0;" + argument + b"\x07"
        elif name == b"clear":
            yield at, b"\x1b[H\x1b[2J"
        elif name == b"quiet":
            self._echoes = False
        elif name:
            yield at, b"you said " + name + b" " + argument + b"\r\n"
        yield at, self.PROMPT


def _count(argument: bytes) -> int:
    """Return the number that was typed, within reason; 0 for anything else."""
    return min(int(argument), 1_000) if argument.isdigit() else 0


class ServerEnd:
    """The server and its program."""

    direction = mosh.TO_CLIENT

    def __init__(self, sim: Simulation, program: LineShell) -> None:
        self._sim = sim
        self.core = mosh.ServerCore(
            sim.channel(self.direction), sim.now, width=80, height=24, random_bytes=sim.random.randbytes
        )
        self.program = program
        self.address = SERVER_ADDRESS
        self.reads_input = True  # False: the program has stopped reading
        self.attached: list[Address] = []  # every address it has moved to, in order
        self.sizes: list[tuple[int, int]] = []  # every size the program was told
        self._started = False
        self.writes_until = 0  # when the program will have written all it has to; the pty keeps the order

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self.core.phase is not mosh.Phase.CLOSED

    @property
    def peer(self) -> Address | None:
        """Where it believes the client to be."""
        address: Address | None = self.core.peer
        return address

    @property
    def screen(self) -> Screen:
        """What the program has drawn."""
        return Screen(self.core.screen)

    def write(self, data: bytes) -> None:
        """The program writes something unasked."""
        self.core.receive_host_output(data, self._sim.now)
        self._sim.wake(self)

    def quit(self) -> None:
        """The server is told to stop."""
        self.core.start_shutdown(self._sim.now)
        self._sim.wake(self)

    def receive(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has arrived."""
        self.core.receive_datagram(datagram, source, self._sim.now, congested)
        if self.peer is not None and self.attached[-1:] != [self.peer]:
            self.attached.append(self.peer)
        if self.sizes[-1:] != [self.core.size]:
            self.sizes.append(self.core.size)
        if not self._started and self.core.phase is not mosh.Phase.CONNECTING:
            self._started = True
            self._schedule(self.program.start())

    def take_turn(self) -> None:
        """One pass of the server's loop, after the waiting."""
        now = self._sim.now
        if self.reads_input and self.core.host_input:
            data = bytes(self.core.host_input)
            self.core.host_input.clear()
            self._schedule(self.program.read(data))
        datagrams = self.core.datagrams_to_send(now)
        last = self.core.transport.sender.sent[-1]
        self._sim.published.setdefault(last.num, _fingerprint(last.state))
        for datagram in datagrams:
            self._sim.send(self, datagram, self.address, [self.peer])
        self.core.datagrams_sent(now)

    def _schedule(self, outputs: Iterator[Output]) -> None:
        for delay_ms, data in outputs:
            self.writes_until = max(self.writes_until, self._sim.now + delay_ms)
            self._sim.at(self.writes_until, partial(self._output, data))

    def _output(self, data: bytes | None) -> None:
        if data is None:
            self.quit()
        elif self.core.phase is not mosh.Phase.CLOSING:
            self.write(data)


class ClientEnd:
    """The client and its user."""

    direction = mosh.TO_SERVER

    def __init__(self, sim: Simulation, width: int, height: int, **options: Any) -> None:
        self._sim = sim
        self.core = mosh.ClientCore(
            sim.channel(self.direction),
            sim.now,
            width=width,
            height=height,
            peers=options.pop("peers", [SERVER_ADDRESS]),
            port=SERVER_ADDRESS[1],
            random_bytes=sim.random.randbytes,
            **options,
        )
        self.addresses = [HOME_ADDRESS]  # of its sockets, the one it sends from last
        self.typed = bytearray()  # every byte the user has typed
        self.types_until = 0  # when the last key that a test has ordered so far is typed
        self.terminal = mosh.Emulator(width, height)  # the user's own
        self.frame_count = 0

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self.core.phase is not mosh.Phase.CLOSED

    @property
    def address(self) -> Address:
        """Where it sends from."""
        return self.addresses[-1]

    @property
    def screen(self) -> Screen:
        """The server's screen as it is known here, without overlays."""
        return Screen(self.core.screen)

    @property
    def shown(self) -> Screen:
        """What the client means the user to see."""
        return Screen(self.core.shown)

    @property
    def seen(self) -> Screen:
        """What the user's terminal made of the frames."""
        return Screen(self.terminal.framebuffer)

    def type(self, keys: str | bytes, every_ms: int | None = None) -> None:
        """The user types, all in one go or one key at a time."""
        data = keys.encode() if isinstance(keys, str) else keys
        if every_ms is None:
            self._receive_keys(data)
            return
        self.types_until = max(self.types_until, self._sim.now + (len(data) - 1) * every_ms)
        for i in range(len(data)):
            self._sim.at(self._sim.now + i * every_ms, partial(self._receive_keys, data[i : i + 1]))

    def _receive_keys(self, data: bytes) -> None:
        self.typed += data
        self.core.receive_keys(data, self._sim.now)
        self._sim.wake(self)

    def resize(self, width: int, height: int) -> None:
        """The user changes the window's size."""
        self.terminal.resize(width, height)
        self.core.resize(width, height, self._sim.now)
        self._sim.wake(self)

    def move_to(self, address: Address) -> None:
        """The machine is in another network now: what is under way to the old address is lost."""
        self.addresses = [address]

    def quit(self) -> None:
        """The user leaves, with the escape key and a dot."""
        self.core.receive_keys(b"\x1e.", self._sim.now)
        self._sim.wake(self)

    def receive(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has arrived."""
        self.core.receive_datagram(datagram, source, self._sim.now, congested)
        remote = self.core.transport.remote
        if remote.num:
            assert _fingerprint(remote.state) == self._sim.published[remote.num], f"state {remote.num} differs"
        if self.core.transport.datagrams.may_close_old_ports(self._sim.now):
            del self.addresses[:-1]

    def take_turn(self) -> None:
        """One pass of the client's loop, from drawing up to the next wait."""
        now = self._sim.now
        frame = self.core.frame_to_draw(now)
        self.frame_count += bool(frame)
        self.terminal.feed(frame)
        datagrams = self.core.datagrams_to_send(now)
        for datagram in datagrams:
            self._sim.send(self, datagram, self.address, self.core.peers)
        if datagrams and self.core.transport.datagrams.wants_new_port(now):
            self.core.transport.datagrams.port_chosen(now)
            host, port = self.address
            self.addresses = [*self.addresses, (host, port + 1)][-mosh.MAX_PORTS :]


End = Union[ServerEnd, ClientEnd]


def _fingerprint(state: mosh.TerminalState) -> tuple[Any, ...]:
    screen = state.framebuffer
    return state.echo_ack, screen.cursor_row, screen.cursor_col, screen.window_title, _lines(screen)


class Sent:
    """One instruction as it was put on the wire."""

    def __init__(self, at: int, instruction: mosh.Instruction) -> None:
        self.at = at
        self.instruction = instruction

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """(old_num, new_num, ack_num, throwaway_num)."""
        instruction = self.instruction
        return instruction.old_num, instruction.new_num, instruction.ack_num, instruction.throwaway_num

    def __repr__(self) -> str:
        return f"{self.at}: {self.numbers} {self.instruction.diff!r}"


class Simulation:
    """The world: see the module's docstring."""

    def __init__(
        self,
        seed: int,
        *,
        start_ms: int = 0,
        width: int = WIDTH,
        height: int = HEIGHT,
        program: LineShell | None = None,
        **client_options: Any,
    ) -> None:
        """`client_options` go to ClientCore. The session begins at `start_ms`, when the client is started."""
        print(f"seed {seed}: repeat with make sim SEED={seed}")  # pytest shows this when a test fails
        self.random = random.Random(seed)
        self.now = start_ms
        self.link = Link()
        self.published: dict[int, tuple[Any, ...]] = {}  # what each of the server's states was
        self._cipher = mosh.choose_cipher()(self.random.randbytes(mosh.KEY_BYTES))
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wire: dict[int, list[tuple[int, bytes]]] = {mosh.TO_SERVER: [], mosh.TO_CLIENT: []}
        self._nonces: set[bytes] = set()
        self.server = ServerEnd(self, program or LineShell())
        self.client = ClientEnd(self, width, height, **client_options)
        self._awake: set[int] = {mosh.TO_SERVER, mosh.TO_CLIENT}  # ends that something has happened to

    # -- for the ends

    def channel(self, direction: int) -> mosh.Channel:
        """Return a channel that seals for `direction`."""
        return mosh.Channel(self._cipher, direction)

    def at(self, when: int, action: Callable[[], None]) -> None:
        """Do something at a given time."""
        heapq.heappush(self._events, (max(when, self.now), next(self._order), action))

    def wake(self, end: End) -> None:
        """Something has happened to `end`: its loop runs."""
        self._awake.add(end.direction)

    def send(self, end: End, datagram: bytes, source: Address, targets: list[Any]) -> None:
        """Put a datagram on the wire, once for each target."""
        assert datagram[:8] not in self._nonces or targets == [None], "a nonce was used twice"
        self._nonces.add(datagram[:8])
        if len(datagram) + UDP_HEADERS_BYTES > self.link.mtu_bytes:
            end.core.transport.datagrams.shrink_mtu()
            return
        self._wire[end.direction].append((self.now, datagram))
        for target in targets:
            for when in self.link.arrivals(end.direction, self.now, self.random):
                congested = self.random.random() < self.link.congestion
                self.at(when, partial(self._arrive, datagram, source, target, congested))

    def _arrive(self, datagram: bytes, source: Address, target: Address, congested: bool) -> None:
        end: End = self.server if target == self.server.address else self.client
        reachable = target == self.server.address or target in self.client.addresses
        if reachable and end.running:
            try:
                end.receive(datagram, source, congested)
            except mosh.PacketError as error:
                if isinstance(end, ClientEnd):
                    end.core.note_bad_datagram(error, self.now)
            self.wake(end)

    # -- for tests

    def run(self, ms: int) -> None:
        """Let so much time pass."""
        end_at = self.now + ms
        for _ in range(EVENT_LIMIT):
            if not self._step(end_at):
                self.now = end_at
                return
        raise AssertionError(f"more than {EVENT_LIMIT} events in {ms} ms")

    def run_until(self, condition: Callable[[], bool], limit_ms: int) -> int:
        """Let time pass until `condition` holds. Returns how long that took; it must be within `limit_ms`."""
        began_at = self.now
        for _ in range(EVENT_LIMIT):
            goes_on = self._step(began_at + limit_ms)
            self._take_turns()
            if condition():
                return self.now - began_at
            if not goes_on:
                break
        raise AssertionError(f"not within {limit_ms} ms; {self.describe()}")

    def inject(self, end: End, datagram: bytes, source: Address) -> None:
        """Somebody sends a datagram to `end`, which arrives at once."""
        self._arrive(datagram, source, end.address, False)

    def blackout(self, ms: int) -> None:
        """Nothing sent from now on for so long arrives."""
        self.link.silent_until = self.now + ms

    def datagrams(self, direction: int) -> list[bytes]:
        """Return everything that was sent in one direction."""
        return [datagram for _, datagram in self._wire[direction]]

    def sent(self, direction: int) -> list[Sent]:
        """Return the instructions that were sent in one direction."""
        reader, assembly, out = self.channel(1 - direction), mosh.FragmentAssembly(), []
        for at, datagram in self._wire[direction]:
            _, plaintext = reader.open(datagram)
            instruction = assembly.add(mosh.Fragment.decode(plaintext[mosh.TIMESTAMPS.size :]))
            if instruction is not None:
                out.append(Sent(at, instruction))
        return out

    @property
    def settled(self) -> bool:
        """Whether nothing goes on, every key has arrived, and the user sees the server's screen and nothing else."""
        idle = self.now > max(self.client.types_until, self.server.writes_until)
        arrived = self.server.program.received == self.client.typed
        return idle and arrived and self.client.seen.lines == self.server.screen.lines == self.client.screen.lines

    @property
    def ended(self) -> bool:
        """Whether both ends have gone."""
        return not (self.server.running or self.client.running)

    def describe(self) -> str:
        """Return how things stand, for a failed assertion."""
        return (
            f"at {self.now}: server {self.server.core.phase}, client {self.client.core.phase},"
            f" typed {bytes(self.client.typed)!r}, received {bytes(self.server.program.received)!r},"
            f" server's screen {self.server.screen}, client's {self.client.screen}, seen {self.client.seen}"
        )

    # -- private

    def _step(self, end_at: int) -> bool:
        """Let both ends do what they have to, then jump to the next event. Returns False if that is after `end_at`."""
        self._take_turns()
        upcoming = [event[0] for event in self._events[:1]]
        for end in self._ends():
            deadline = end.core.next_timeout()
            upcoming += [] if deadline is None else [deadline]
        if not upcoming or min(upcoming) > end_at:
            return False
        self.now = max(self.now, min(upcoming))
        if self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        return True

    def _ends(self) -> list[End]:
        ends: list[End] = [self.server, self.client]
        return [end for end in ends if end.running]

    def _take_turns(self) -> None:
        for end in self._ends():
            for _ in range(TURN_LIMIT):
                deadline = end.core.next_timeout()
                if end.direction not in self._awake and (deadline is None or deadline > self.now):
                    break
                self._awake.discard(end.direction)
                if not end.running:
                    break
                end.take_turn()
            else:
                raise AssertionError(f"{type(end).__name__} is busy at {self.now}: it wants to be woken at {deadline}")
