"""A whole session in one process: both cores, a network, a user and a program, on a clock that only jumps.

Everything random comes from one seed, so a run that failed can be had again. Time is in whole milliseconds and moves
from one event to the next: a datagram arrives, the program writes, the user types, a core's deadline is reached. The
two ends take their turns exactly as the loops of the real server and client do: feed, drain, draw, and then nothing
until something comes in or `next_timeout` is reached. A core that names the wrong deadline is therefore found out.
Each end has a clock of its own, may sleep, and may find that its clock has jumped meanwhile.

`Invariants` are what must hold at every moment on any network; a run in which one does not ends with BrokenInvariant.

    sim = Simulation(seed=1)
    sim.link.delay_ms, sim.link.loss = 100, 0.3
    sim.client.type("echo hello\\r")
    sim.run(ms=2_000)
    assert sim.client.screen == sim.server.screen
"""

from __future__ import annotations

import contextlib
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
STOCK_ACTIVE_RETRY_MS = 10_000  # stock mosh resends at its frame rate for so long after it heard something new
QUEUED_DATAGRAMS = 200  # what a kernel keeps for a process that sleeps
IN_FLIGHT_BYTES = 40_000  # on the way in one direction, beside what the largest instruction took,
TRIES_IN_FLIGHT = 5  # as often as it goes out before the first ack of a path that has become 20 times as long
HELD_BACK_MS = 300  # how much later a reordered datagram comes
TRAIN_LIMIT = 200  # fragments of what the sessions here type and show
ECHO_LIMIT = 100  # user states within the time of an echo ack
EVENT_LIMIT = 500_000  # events of one run; more is a bug, not a long story
TURN_LIMIT = 10  # turns that one end may ask for within one millisecond


class Link:
    """What the network does to a datagram, in both directions; a test changes it at any time."""

    def __init__(self) -> None:
        self.mtu_bytes = 1_500  # larger packets are refused at the sender, as a network interface does
        self.path_mtu_bytes = 1_500  # larger packets vanish without a word
        self.blocked: set[int] = set()  # directions (mosh.TO_SERVER, mosh.TO_CLIENT) in which nothing gets through
        self.refused: set[int] = set()  # the same, but the sender's own system says so
        self.filtered: set[Address] = set()  # addresses of the client that a firewall knows no more
        self.heal()

    def heal(self) -> None:
        """Be a good network from now on."""
        self.delay_ms = 10
        self.jitter_ms = 0  # each datagram is up to this much later, so they overtake each other
        self.loss = self.duplication = self.reordering = self.congestion = 0.0  # shares of all datagrams
        self.silent_until = 0  # nothing sent before this arrives
        self.rate_bytes_per_s = 0  # of each direction; 0: no limit
        self.buffer_bytes = 16_000  # what waits in front of a link with a limit; the rest is lost
        self.one_way: int | None = None  # the direction that alone suffers from all this but the delay; None: both do
        self.nat_forgets_ms = 0  # after so long without a datagram of the client its public port changes; 0: never
        self._free_at = {mosh.TO_SERVER: 0.0, mosh.TO_CLIENT: 0.0}  # when all that waits has left
        for trouble in (self.blocked, self.refused, self.filtered):
            trouble.clear()

    def arrivals(self, direction: int, size: int, now: int, rng: random.Random) -> Iterator[int]:
        """Yield when the copies of a datagram sent now arrive: usually one, but possibly none or two."""
        if self.one_way not in (None, direction):
            if now >= self.silent_until and direction not in self.blocked:
                yield now + self.delay_ms
            return
        leaves_at = self._leaves_at(direction, size + UDP_HEADERS_BYTES, now)
        copies = 2 if rng.random() < self.duplication else 1
        for _ in range(copies):
            late_ms = rng.randint(0, self.jitter_ms) + HELD_BACK_MS * (rng.random() < self.reordering)
            lost = rng.random() < self.loss or leaves_at is None or size + UDP_HEADERS_BYTES > self.path_mtu_bytes
            if not (lost or now < self.silent_until or direction in self.blocked):
                yield (leaves_at or now) + self.delay_ms + late_ms

    def _leaves_at(self, direction: int, size: int, now: int) -> int | None:
        """Return when the last bit of a packet is on the wire, None if the buffer has no room for it."""
        if not self.rate_bytes_per_s:
            return now
        free_at = max(self._free_at[direction], now)
        if (free_at - now) * self.rate_bytes_per_s / 1_000 > self.buffer_bytes:
            return None
        self._free_at[direction] = free_at + size * 1_000 / self.rate_bytes_per_s
        return int(self._free_at[direction])


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
    screen, `noise N` prints N characters that do not compress, `quiet` stops the echo until the next Return, `exit`
    ends. Everything else is answered by itself.
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
        elif name == b"noise":
            yield at, bytes(random.Random(argument).choices(range(0x21, 0x7F), k=_count(argument)))
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
    return min(int(argument), 3_000) if argument.isdigit() else 0


class Machine:
    """What both ends have: a clock, sleep, and a kernel that keeps a few datagrams meanwhile."""

    direction: int
    core: mosh.ServerCore | mosh.ClientCore

    def __init__(self, sim: Simulation, clock_ms: int) -> None:
        self._sim = sim
        self._clock_ms = clock_ms  # how far its clock is ahead of the simulation's
        self.asleep_until: int | None = None
        self._queued: list[tuple[bytes, Address, bool]] = []

    @property
    def now(self) -> int:
        """Its own clock."""
        return self._sim.now + self._clock_ms

    @property
    def running(self) -> bool:
        """Whether it still serves."""
        return self.core.phase is not mosh.Phase.CLOSED

    @property
    def deadline(self) -> int | None:
        """When it wants to be woken, by the simulation's clock."""
        if self.asleep_until is not None:
            return self.asleep_until
        deadline = self.core.next_timeout()
        return None if deadline is None else deadline - self._clock_ms

    def sleep(self, ms: int, *, clock_stops: bool) -> None:
        """Do nothing for so long. `clock_stops`: its monotonic clock does not count the time, as on Linux."""
        if self.asleep_until is None:
            self.asleep_until = self._sim.now + ms
            self._sim.at(self.asleep_until, partial(self.wake_up, ms if clock_stops else 0))

    def wake_up(self, clock_stood_ms: int) -> None:
        """Go on, with what the kernel has kept."""
        self.asleep_until = None
        self._clock_ms -= clock_stood_ms
        queued, self._queued = self._queued, []
        for datagram, source, congested in queued:
            self._sim.deliver(self, datagram, source, congested)
        self._sim.wake(self)

    def jump_clock(self, ms: int) -> None:
        """Its clock is suddenly later."""
        self._clock_ms += ms
        self._sim.wake(self)

    def queue(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has come while it sleeps."""
        if len(self._queued) < QUEUED_DATAGRAMS:
            self._queued.append((datagram, source, congested))

    def receive(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has arrived."""
        raise NotImplementedError

    def take_turn(self) -> None:
        """One pass of its loop."""
        raise NotImplementedError


class ServerEnd(Machine):
    """The server and its program."""

    direction = mosh.TO_CLIENT
    core: mosh.ServerCore

    def __init__(self, sim: Simulation, program: LineShell, clock_ms: int) -> None:
        super().__init__(sim, clock_ms)
        self.core = mosh.ServerCore(
            sim.channel(self.direction), self.now, width=80, height=24, random_bytes=sim.random.randbytes
        )
        self.program = program
        self.address = SERVER_ADDRESS
        self.reads_input = True  # False: the program has stopped reading
        self.attached: list[Address] = []  # every address it has moved to, in order
        self.sizes: list[tuple[int, int]] = []  # every size the program was told
        self._started = False
        self.writes_until = 0  # when the program will have written all it has to; the pty keeps the order

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
        self.core.receive_host_output(data, self.now)
        self._sim.wake(self)

    def quit(self) -> None:
        """The server is told to stop."""
        self.core.start_shutdown(self.now)
        self._sim.wake(self)

    def receive(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has arrived."""
        self.core.receive_datagram(datagram, source, self.now, congested)
        if self.peer is not None and self.attached[-1:] != [self.peer]:
            self.attached.append(self.peer)
        if self.sizes[-1:] != [self.core.size]:
            self.sizes.append(self.core.size)
        if not self._started and self.core.phase is not mosh.Phase.CONNECTING:
            self._started = True
            self._schedule(self.program.start())

    def take_turn(self) -> None:
        """One pass of the server's loop, after the waiting."""
        now = self.now
        if self.reads_input and self.core.host_input:
            data = bytes(self.core.host_input)
            self.core.host_input.clear()
            self._schedule(self.program.read(data))
        datagrams = self.core.datagrams_to_send(now)
        last = self.core.transport.sender.sent[-1]
        if last.num not in self._sim.published:
            # The blank screen of the start, which may be sent again, has another size than the client's.
            known = last.state.framebuffer.width > 1
            self._sim.published[last.num] = _fingerprint(last.state) if known else ()
        refused = self.direction in self._sim.link.refused
        for datagram in datagrams:
            self._sim.send(self, datagram, self.address, [] if refused else [self.peer])
        if datagrams:
            refused_bytes = sum(map(len, datagrams)) if refused else 0
            self.core.note_sending(now, refused_bytes=refused_bytes, reached=not refused)
        self.core.datagrams_sent(now)

    def _schedule(self, outputs: Iterator[Output]) -> None:
        """Let the program write all that; what it writes in the same millisecond is read from the pty in one go."""
        for (delay_ms, ends), group in itertools.groupby(outputs, key=lambda output: (output[0], output[1] is None)):
            self.writes_until = max(self.writes_until, self._sim.now + delay_ms)
            data = None if ends else b"".join(data or b"" for _, data in group)
            self._sim.at(self.writes_until, partial(self._output, data))

    def _output(self, data: bytes | None) -> None:
        if self.asleep_until is not None:
            self._sim.at(self.asleep_until, partial(self._output, data))
        elif data is None:
            self.quit()
        elif self.core.phase is not mosh.Phase.CLOSING:
            self.write(data)


class ClientEnd(Machine):
    """The client and its user."""

    direction = mosh.TO_SERVER
    core: mosh.ClientCore

    def __init__(self, sim: Simulation, width: int, height: int, **options: Any) -> None:
        super().__init__(sim, 0)
        self.core = mosh.ClientCore(
            sim.channel(self.direction),
            self.now,
            width=width,
            height=height,
            candidates=options.pop("candidates", [SERVER_ADDRESS]),
            port=SERVER_ADDRESS[1],
            random_bytes=sim.random.randbytes,
            **options,
        )
        self.addresses = [HOME_ADDRESS]  # of its sockets, the one it sends from last
        self.typed = bytearray()  # every byte the user has typed
        self.types_until = 0  # when the last key that a test has ordered so far is typed
        self.terminal = mosh.Emulator(width, height)  # the user's own
        self.frame_count = 0
        self.letter_count = 0  # letters shown at once

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
        if self.asleep_until is not None:
            self.types_until = max(self.types_until, self.asleep_until)
            self._sim.at(self.asleep_until, partial(self._receive_keys, data))
            return
        self.typed += data
        seen = self.terminal.framebuffer
        row, col = seen.cursor_row, seen.cursor_col
        letter = self.core.echo_at_once(data)
        self.terminal.feed(letter)
        self.core.receive_keys(data, self.now)
        if letter:
            self.letter_count += 1
            self._draw()
            there = seen.cell(row, col).contents, seen.cursor_row, seen.cursor_col
            assert there == (data.decode(), row, col + 1), f"{data!r} has been shown and taken back: {there}"
        self._sim.wake(self)

    def resize(self, width: int, height: int) -> None:
        """The user changes the window's size."""
        self.terminal.resize(width, height)
        self.core.resize(width, height, self.now)
        self._sim.wake(self)

    def move_to(self, address: Address) -> None:
        """The machine is in another network now: what is under way to the old address is lost."""
        self.addresses = [address]

    def quit(self) -> None:
        """The user leaves, with the escape key and a dot."""
        self.core.receive_keys(b"\x1e.", self.now)
        self._sim.wake(self)

    def receive(self, datagram: bytes, source: Address, congested: bool) -> None:
        """A datagram has arrived."""
        self.core.receive_datagram(datagram, source, self.now, congested)
        remote = self.core.transport.remote
        if remote.num and self._sim.published[remote.num]:
            assert _fingerprint(remote.state) == self._sim.published[remote.num], f"state {remote.num} differs"
        if self.core.transport.datagrams.may_close_old_ports(self.now):
            del self.addresses[:-1]

    def take_turn(self) -> None:
        """One pass of the client's loop, from drawing up to the next wait."""
        now = self.now
        self._draw()
        datagrams = self.core.datagrams_to_send(now)
        if datagrams and self.core.takes_new_port(now):
            host, port = self.address
            self.addresses = [*self.addresses, (host, port + 1)][-mosh.MAX_PORTS :]
        refused = self.direction in self._sim.link.refused
        for datagram in datagrams:
            self._sim.send(self, datagram, self.address, [] if refused else self.core.peers)
        if datagrams and refused:
            self.core.roaming.path_failed(now, reached=False)
        self.core.look_ahead()

    def _draw(self) -> None:
        frame = self.core.frame_to_draw(self.now)
        self.frame_count += bool(frame)
        self.terminal.feed(frame)


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


class BrokenInvariant(AssertionError):
    """Something happened that must not happen on any network."""


class Invariants:
    """What holds at every moment. Everything but the lengths of queues is judged by what is on the wire."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim
        self.in_flight = {mosh.TO_SERVER: 0, mosh.TO_CLIENT: 0}  # bytes
        self._nonces: set[bytes] = set()
        self._readers = {direction: sim.channel(1 - direction) for direction in self.in_flight}
        self._assemblies = {direction: mosh.FragmentAssembly() for direction in self.in_flight}
        # of the instruction being sent: the id and number of the fragment that is next, and the sizes of those before
        self._trains: dict[int, tuple[tuple[int, int], dict[int, int]]] = dict.fromkeys(self.in_flight, ((0, 0), {}))
        self._largest_bytes = dict.fromkeys(self.in_flight, 0)  # of an instruction so far
        self._last: dict[int, mosh.Instruction] = {}
        self._acked = dict.fromkeys(self.in_flight, 0)  # the newest ack that an end has been given of what it keeps
        self._acked_before = dict.fromkeys(self.in_flight, 0)  # the same when the instruction being sent began to leave
        self._newest_seq = dict.fromkeys(self.in_flight, -1)
        self._reply_to: Address | None = None  # where the newest authentic datagram of the client came from
        self._checked_keys = 0  # how many of those received are known to be those typed

    def require(self, holds: bool, what: str) -> None:
        """Raise BrokenInvariant unless it holds."""
        if not holds:
            raise BrokenInvariant(f"{what}; {self._sim.now} ms")

    # -- on the wire

    def check_sent(self, end: Machine, datagram: bytes) -> None:
        """A datagram leaves `end`."""
        nonce, direction = datagram[: mosh.SEQUENCE.size], end.direction
        self.require(nonce not in self._nonces, f"nonce {nonce.hex()} is used twice")
        self._nonces.add(nonce)
        fragment = mosh.Fragment.decode(self._readers[direction].open(datagram)[1][mosh.TIMESTAMPS.size :])
        awaited, sizes = self._trains[direction]
        if (fragment.instruction_id, fragment.num) != awaited or fragment.num in sizes:  # the first one of a try
            sizes = {}
            self._acked_before[direction] = self._acked[direction]
        sizes[fragment.num] = len(datagram)
        self._trains[direction] = (fragment.instruction_id, 0 if fragment.final else fragment.num + 1), sizes
        self._largest_bytes[direction] = max(self._largest_bytes[direction], sum(sizes.values()))
        instruction = self._assemblies[direction].add(fragment)
        if instruction is not None:
            self._check_instruction(direction, instruction)
        limit = IN_FLIGHT_BYTES + TRIES_IN_FLIGHT * self._largest_bytes[direction]
        self.require(self.in_flight[direction] <= limit, f"{self.in_flight[direction]} bytes are in flight")

    def _check_instruction(self, direction: int, new: mosh.Instruction) -> None:
        peer = self._sim.server if direction == mosh.TO_SERVER else self._sim.client
        last, self._last[direction] = self._last.get(direction), new
        if last is not None:
            self.require(new.new_num >= last.new_num, f"state {new.new_num} is sent after {last.new_num}")
            self.require(new.ack_num >= last.ack_num, f"ack {new.ack_num} is sent after {last.ack_num}")
            self.require(new.throwaway_num >= last.throwaway_num, f"throwaway number {new.throwaway_num} regresses")
        self.require(new.throwaway_num <= new.old_num < new.new_num, "old state is thrown away or not older")
        known = peer.core.transport.remote.num
        self.require(new.throwaway_num <= known, f"states below {new.throwaway_num} are thrown away, {known} has come")
        known = self._acked_before[direction]
        self.require(new.throwaway_num >= known, f"the ack of {known} is lost: {new.throwaway_num} is thrown away")

    @contextlib.contextmanager
    def watch_arrival(self, end: Machine, datagram: bytes, source: Address) -> Iterator[None]:
        """A datagram reaches `end`."""
        from_direction = 1 - end.direction
        try:
            seq, _ = self._readers[from_direction].open(datagram)
        except mosh.PacketError:
            seq = -1
        if seq > self._newest_seq[from_direction]:
            self._newest_seq[from_direction] = seq
            if end is self._sim.server:
                self._reply_to = source
        transport = end.core.transport
        kept = {entry.num for entry in transport.sender.sent}
        ack_num, receive = None, transport._receive_instruction

        def note_ack(instruction: mosh.Instruction, now: int) -> None:
            nonlocal ack_num
            ack_num = instruction.ack_num
            receive(instruction, now)

        transport._receive_instruction = note_ack  # type: ignore[method-assign]
        try:
            yield
        finally:
            del transport._receive_instruction
        if ack_num in kept:
            self._acked[end.direction] = max(self._acked[end.direction], ack_num)
        server = self._sim.server
        right = server.peer is None or server.peer == self._reply_to
        self.require(right, f"the server answers to {server.peer}, the newest datagram came from {self._reply_to}")

    # -- inside

    def check(self, end: Machine) -> None:
        """`end` has had its turn."""
        transport = end.core.transport
        queues = {
            "states sent": (len(transport.sender.sent), mosh.SENT_LIMIT),
            "states received": (len(transport.receiver.states), mosh.RECEIVED_LIMIT + 1),
            "fragments to send": (len(transport._train), TRAIN_LIMIT),
            "fragments received": (transport._assembly._size, mosh.INSTRUCTION_LIMIT_BYTES),
            "echo acks due": (len(self._sim.server.core._echo_pending), ECHO_LIMIT),
            "keys to read": (len(self._sim.server.core.host_input), mosh.INPUT_LIMIT_BYTES),
        }
        for name, (length, limit) in queues.items():
            self.require(length <= limit, f"{length} {name}")
        if isinstance(end, ClientEnd):
            self._check_drawn(end.core, end.now)
        typed, received = self._sim.client.typed, self._sim.server.program.received
        if len(received) > self._checked_keys and b"\x1b" not in received:  # arrows and replies are translated
            self.require(typed.startswith(received), f"typed {bytes(typed)!r}, received {bytes(received)!r}")
            self._checked_keys = len(received)

    def _check_drawn(self, core: mosh.ClientCore, now: int) -> None:
        """A frame that has been left out would have changed nothing."""
        if not core.engine.is_waiting:
            core._drawn = None
            self.require(core.frame_to_draw(now) == b"", "something on the screen has not been drawn")
            core.look_ahead()  # since drawing ends it


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
        self._client_sent_at = start_ms
        self.server = ServerEnd(self, program or LineShell(), clock_ms=seed * 104_729 % 100_000)
        self.client = ClientEnd(self, width, height, **client_options)
        self.invariants = Invariants(self)
        self._awake: set[int] = {mosh.TO_SERVER, mosh.TO_CLIENT}  # ends that something has happened to

    # -- for the ends

    def channel(self, direction: int) -> mosh.Channel:
        """Return a channel that seals for `direction`."""
        return mosh.Channel(self._cipher, direction)

    def at(self, when: int, action: Callable[[], None]) -> None:
        """Do something at a given time."""
        heapq.heappush(self._events, (max(when, self.now), next(self._order), action))

    def wake(self, end: Machine) -> None:
        """Something has happened to `end`: its loop runs."""
        self._awake.add(end.direction)

    def send(self, end: End, datagram: bytes, source: Address, targets: list[Any]) -> None:
        """Put a datagram on the wire, once for each target."""
        self.invariants.check_sent(end, datagram)
        if len(datagram) + UDP_HEADERS_BYTES > self.link.mtu_bytes:
            end.core.transport.datagrams.mtu.shrink()
            return
        if end is self.client:
            if self.link.nat_forgets_ms and self.now - self._client_sent_at > self.link.nat_forgets_ms:
                host, port = source
                self.client.move_to((host, port % 60_000 + 1_024))
                source = self.client.address
            self._client_sent_at = self.now
        self._wire[end.direction].append((self.now, datagram))
        for target in targets:
            for when in self.link.arrivals(end.direction, len(datagram), self.now, self.random):
                congested = self.random.random() < self.link.congestion
                self.invariants.in_flight[end.direction] += len(datagram)
                self.at(when, partial(self._arrive, end.direction, datagram, source, target, congested))

    def _arrive(self, direction: int, datagram: bytes, source: Address, target: Address, congested: bool) -> None:
        end: End = self.server if direction == mosh.TO_SERVER else self.client
        self.invariants.in_flight[direction] -= len(datagram)
        filtered = not self.link.filtered.isdisjoint((source, target))
        if not filtered and target in ([self.server.address] if end is self.server else self.client.addresses):
            self.deliver(end, datagram, source, congested)

    def deliver(self, end: Machine, datagram: bytes, source: Address, congested: bool) -> None:
        """Hand a datagram over, unless the end has gone."""
        if not end.running:
            return
        if end.asleep_until is not None:
            end.queue(datagram, source, congested)
            return
        with self.invariants.watch_arrival(end, datagram, source):
            try:
                end.receive(datagram, source, congested)
            except mosh.PacketError as error:
                if isinstance(end, ClientEnd):
                    end.core.note_bad_datagram(error, end.now)
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
        self.deliver(end, datagram, source, False)

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
        if self.now <= max(self.client.types_until, self.server.writes_until):
            return False
        if self.server.program.received != self.client.typed:
            return False
        return self.client.seen.lines == self.server.screen.lines == self.client.screen.lines

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
            deadline = end.deadline
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
                deadline = end.deadline
                asleep = end.asleep_until is not None
                if asleep or (end.direction not in self._awake and (deadline is None or deadline > self.now)):
                    break
                self._awake.discard(end.direction)
                if not end.running:
                    break
                end.take_turn()
                self.invariants.check(end)
            else:
                raise BrokenInvariant(f"{type(end).__name__} is busy at {self.now}: it wants to be woken at {deadline}")


class StockSender(mosh.Sender[Any]):
    """A sender with the timers of stock mosh 1.4.0, to compare ours with. Source: its observed behaviour."""

    receiver: mosh.Receiver[Any]

    def update_timers(self, now: int) -> None:
        """Work out when to send: one instruction per frame interval, and the same rate for what is resent."""
        self._assumed = self._assume(now)
        self.current.forget_before(self.sent[0].state)
        if self.data_ack_due:
            self._next_ack_at = min(self._next_ack_at, now + mosh.ACK_DELAY_MS)
        last, interval = self.sent[-1], self._round_trip.frame_interval_ms
        heard = self.receiver.states[-1]
        active = heard.num > 0 and heard.at + STOCK_ACTIVE_RETRY_MS > now
        self._next_send_at = None
        if self.current != last.state:
            self._changed_at = now if self._changed_at is None else self._changed_at
            self._next_send_at = max(self._changed_at + self._collect_ms, last.at + interval)
        elif active and self.current != self._assumed.state:
            self._next_send_at = max(last.at + interval, (self._changed_at or 0) + self._collect_ms)
        elif active and self.current != self.sent[0].state:
            self._next_send_at = last.at + self.patience_ms
        if self.shutdown_at is not None or self.ack_num == mosh.LAST_STATE_NUM:
            self._next_ack_at = last.at + interval

    def _ack_seems_lost(self, _now: int) -> bool:
        """Stock repeats a state under its number."""
        return False

    def peer_heard(self, instruction: mosh.Instruction, unprompted: bool, now: int) -> None:
        """Stock does not look for what is lost, and keeps to its own heartbeats."""

    def resend(self) -> None:
        """Nor does it repeat at once what it has to cut smaller."""


def use_stock_timers(transport: mosh.Transport[Any, Any]) -> None:
    """Let an end send when stock mosh would."""
    sender = transport.sender
    sender.__class__ = StockSender
    assert isinstance(sender, StockSender)
    sender.receiver = transport.receiver
