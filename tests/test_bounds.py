"""Every queue, buffer and loop that somebody else can fill has a named bound: each is driven beyond it here.

Other bounds have their tests where they belong: INPUT_LIMIT_BYTES, REPLY_LIMIT_BYTES and TYPED_LIMIT_EVENTS in
test_cores.py, EVENT_LIMIT in test_states.py, MAX_PORTS in test_client.py, the sizes of an instruction in test_wire.py
and test_fragments.py, AMPLIFICATION_LIMIT in test_simulation.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator

import pytest

import mosh

CIPHER = mosh.choose_cipher()(bytes(16))
PEER = ("192.0.2.1", 60001)


def _host_bytes(data: bytes) -> bytes:
    return mosh._instruction(mosh.HOST_BYTES, mosh.encode_field(mosh.HOST_STRING, data))


def _resize(number: int, width: int, height: int) -> bytes:
    return mosh._instruction(number, mosh.Resize(width, height).encode())


# -- the network -----------------------------------------------------------------------------------------------


def test_a_datagram() -> None:
    sealed = mosh.Channel(CIPHER, mosh.TO_CLIENT).seal(bytes(mosh.RECEIVE_LIMIT_BYTES))
    with pytest.raises(mosh.PacketError, match="oversized"):
        mosh.Channel(CIPHER, mosh.TO_SERVER).open(sealed)


def test_what_an_instruction_inflates_to() -> None:
    bomb = zlib.compress(bytes(100 * mosh.INSTRUCTION_LIMIT_BYTES), 9)
    assert len(bomb) < mosh.INSTRUCTION_LIMIT_BYTES
    with pytest.raises(mosh.PacketError, match="inflates beyond"):
        mosh.inflate(bomb)


def test_fragments_of_an_instruction() -> None:
    """At most so many, also of empty ones; those of another instruction replace them."""
    assembly = mosh.FragmentAssembly()
    for num in range(2 * (mosh._MAX_FRAGMENT_NUM + 1)):
        assembly.add(mosh.Fragment.decode(mosh.FRAGMENT_HEADER.pack(1, num & mosh._MAX_FRAGMENT_NUM)))
    assert len(assembly._pieces) == mosh._MAX_FRAGMENT_NUM + 1
    for instruction_id in range(2, 1_000):
        assembly.add(mosh.Fragment(instruction_id, 7, False, bytes(1_200)))
        assert len(assembly._pieces) == 1


def test_the_smallest_datagram_is_as_small_as_is_assumed() -> None:
    """By EMPTY_DATAGRAM_BYTES the server judges what it may send to an address not yet heard again."""
    numbers = (2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4)
    for new_num in (numbers[1], mosh.LAST_STATE_NUM):
        chaff = bytes(range(0x51, 0x51 + 11 * mosh.MAX_CHAFF_BYTES, 11))
        instruction = mosh.Instruction(numbers[0], new_num, *numbers[2:], mosh.PROBE_DIFF, chaff)
        (fragment,) = mosh.Fragmenter().fragments(instruction, 1_252)
        server = mosh.DatagramLayer(mosh.Channel(CIPHER, mosh.TO_CLIENT), 0, is_server=True)
        assert len(server.seal(fragment.encode(), 0)) <= mosh.EMPTY_DATAGRAM_BYTES


@pytest.mark.parametrize("varint", [b"\xff" * 10, b"\x80" * 11 + b"\0", b"\x80"])
def test_a_number(varint: bytes) -> None:
    with pytest.raises(mosh.PacketError):
        mosh.decode_varint(varint, 0)


# -- states ----------------------------------------------------------------------------------------------------


def test_states_in_flight() -> None:
    """A peer that acknowledges nothing costs SENT_LIMIT states."""
    server = mosh.ServerCore(mosh.Channel(CIPHER, mosh.TO_CLIENT), 0, width=80, height=24, random_bytes=bytes)
    client = mosh.DatagramLayer(mosh.Channel(CIPHER, mosh.TO_SERVER), 0, is_server=False)
    for now in range(0, 200_000, 1_000):
        (hello,) = mosh.Fragmenter().fragments(mosh.Instruction(0, now + 1, 0, 0, b""), 1_200)
        server.receive_datagram(client.seal(hello.encode(), now), PEER, now)
        server.receive_host_output(b"%d\r\n" % now, now)
        server.datagrams_to_send(now + 500)
        assert len(server.transport.sender.sent) <= mosh.SENT_LIMIT
    assert len(server.transport.sender.sent) == mosh.SENT_LIMIT


def _received(states: Callable[[int], bytes], count: int) -> mosh.Receiver[mosh.TerminalState]:
    """Let a receiver take `count` states, each from the first one, of which none may be thrown away."""
    receiver = mosh.Receiver(mosh.TerminalState(mosh.Emulator(80, 24)), 0)
    for num in range(1, count):
        receiver.receive(mosh.Instruction(0, num, 0, 0, states(num)), now=1)
    return receiver


def test_states_received() -> None:
    receiver = _received(lambda num: _host_bytes(b"%d" % num), mosh.RECEIVED_LIMIT + 100)
    assert len(receiver.states) == mosh.RECEIVED_LIMIT + 2
    assert receiver.receive(mosh.Instruction(0, 9_999, 0, 0, b""), now=1 + mosh.QUENCH_MS)
    assert not receiver.receive(mosh.Instruction(0, 9_998, 0, 0, b""), now=2 + mosh.QUENCH_MS)


def test_the_weight_of_states_received() -> None:
    """Large screens are heavier: a server cannot fill the client's memory with a few small datagrams."""
    receiver = _received(lambda _: _resize(mosh.HOST_RESIZE, 1_024, 1_024) + _host_bytes(b"\x1b#8"), 60)
    cells = sum(entry.state.framebuffer.width * entry.state.framebuffer.height for entry in receiver.states)
    assert cells <= mosh.RECEIVED_LIMIT_WEIGHT + 2 * mosh.SCREEN_LIMIT_CELLS


@pytest.mark.parametrize(("width", "height", "fits"), [
    (1, 1, True), (65_535, 16, True), (16, 65_535, True), (1_024, 1_024, True), (1_025, 1_024, False),
    (65_535, 65_535, False), (65_536, 1, False), (0, 24, False), (80, 0, False), (2**31, 1, False),
    (2**64 - 1, 1, False),
])  # fmt: skip
def test_a_screen(width: int, height: int, fits: bool) -> None:
    state = mosh.TerminalState(mosh.Emulator(80, 24))
    message = _resize(mosh.HOST_RESIZE, width, height)
    if fits:
        assert (width, height) == (state.applied(message).framebuffer.width, state.applied(message).framebuffer.height)
    else:
        with pytest.raises(mosh.PacketError):
            state.applied(message)


def test_instructions_of_a_screen() -> None:
    """A few datagrams full of resizes would keep a client busy for minutes."""
    state = mosh.TerminalState(mosh.Emulator(80, 24))
    pair = _resize(mosh.HOST_RESIZE, 1, 1) + _resize(mosh.HOST_RESIZE, 20, 10)
    assert state.applied(pair * (mosh.HOST_INSTRUCTION_LIMIT // 2)).framebuffer.width == 20
    with pytest.raises(mosh.PacketError, match="too many"):
        state.applied(pair * (mosh.HOST_INSTRUCTION_LIMIT // 2) + pair)


def test_a_hello() -> None:
    with pytest.raises(mosh.PacketError, match="too long"):
        mosh.Hello.decode(mosh.Hello(("x" * mosh.HELLO_LIMIT_BYTES,)).encode())
    assert mosh.Hello.decode(mosh.Hello(("a",) * 500).encode()).capabilities == ("a",) * 500


# -- the terminal ----------------------------------------------------------------------------------------------


def _emulator(data: bytes) -> mosh.Emulator:
    emulator = mosh.Emulator(20, 5)
    emulator.feed(data)
    return emulator


def test_an_operating_system_command() -> None:
    emulator = _emulator(b"\x1b]52;c;" + b"A" * 100_000)
    assert len(emulator._parser._osc) == mosh.OSC_LIMIT
    emulator.feed(b"\x07")
    assert len(emulator.framebuffer.clipboard) == mosh.OSC_LIMIT - len("52;c;")
    assert len(_emulator(b"\x1b]2;" + b"t" * 100_000 + b"\x07").framebuffer.window_title) == mosh.TITLE_LIMIT - 2


@pytest.mark.parametrize("text", [b"1;" * 100_000, b"9" * 100_000, b"?" * 100_000, b" " * 100_000, b"$" * 100_000])
def test_a_control_sequence(text: bytes) -> None:
    emulator = _emulator(b"\x1b[" + text)
    assert len(emulator._parser._parameters) <= mosh.PARAMETER_LIMIT
    assert len(emulator._parser._collected) <= mosh.COLLECT_LIMIT
    emulator.feed(b"m\x18ok")
    assert "ok" in emulator.framebuffer.lines()[0]


@pytest.mark.parametrize("final", "@ABCDHIJKLMPSTXZ`dfgr")
def test_a_repeat_count(final: str) -> None:
    """It is at most 65535, and what lies beyond the screen costs nothing: the screen keeps its shape."""
    for count in (0, 1, 65_535, 65_536, 10**30):
        emulator = _emulator(b"x" * 99 + b"\x1b[3;3H" + f"\x1b[{count};{count}{final}".encode())
        screen = emulator.framebuffer
        assert len(screen.rows) == 5 and all(len(row.text) == len(row.attrs) <= 20 for row in screen.rows)
        assert 0 <= screen.cursor_row < 5 and 0 <= screen.cursor_col < 20


def test_combining_marks_and_what_they_combine_to() -> None:
    """A cell takes so many bytes; so do all different cells together, after which they read as U+FFFD."""
    emulator = _emulator(b"a" + "\u0301".encode() * 10_000)
    assert len(emulator.framebuffer.cell(0, 0).contents.encode()) <= mosh.CLUSTER_LIMIT_BYTES + 4
    emulator = mosh.Emulator(100, 60)
    room = 5_000
    emulator.framebuffer.codebook._clusters[False] = mosh._CodeTable(mosh._NARROW_CLUSTERS, room)
    marks = [chr(code) for code in range(0x300, 0x340)]
    for pair in itertools.islice(itertools.product(marks, marks), 600):
        emulator.feed("".join(letter + "".join(pair) for letter in "abcdefghij").encode())
    shown = "".join(emulator.framebuffer.lines())
    assert len(emulator.framebuffer.codebook._clusters[False].values) == room
    assert shown.count("\ufffd") >= 6_000 - room and shown.count("a") >= 400


def test_renditions() -> None:
    """Those not on any screen any more are forgotten."""
    emulator = mosh.Emulator(20, 5)
    for value in range(40_000):
        emulator.feed(f"\x1b[38;2;{value >> 16};{value >> 8 & 255};{value & 255}mx".encode())
    book = emulator.framebuffer.codebook
    assert len(book._renditions.values) <= 2 * mosh._SWEEP_FROM and len(book.selected) <= mosh._REMEMBERED_LIMIT


@pytest.mark.parametrize("question", [b"\x1b[c", b"\x1b[>c", b"\x1b[5n", b"\x1b[6n"])
def test_answers(question: bytes) -> None:
    emulator = _emulator(question * 100_000)
    assert mosh.ANSWERS_LIMIT_BYTES <= len(emulator.take_replies()) <= mosh.ANSWERS_LIMIT_BYTES + 20
    assert emulator.take_replies() == b""


def test_a_sequence_cut_by_the_end_of_a_feed() -> None:
    decoder = mosh.Utf8Decoder()
    for _ in range(10_000):
        decoder.decode(b"\xf0\x9f")
        assert len(decoder._pending) <= 6


# -- the user and the rest -------------------------------------------------------------------------------------


def _client() -> mosh.ClientCore:
    return mosh.ClientCore(
        mosh.Channel(CIPHER, mosh.TO_SERVER), 0, width=80, height=24, candidates=[PEER], port=1, random_bytes=bytes,
        mode=mosh.PredictionMode.ALWAYS,
    )


def test_predictions() -> None:
    """A user who types on without any answer is not remembered key by key."""
    client = _client()
    for now in range(1_300):
        client.receive_keys((b"x", b"y", b"\x1b[C", b"\x7f", b"\r")[now % 5], now)
        client.receive_keys(b"%d" % now, now)
    for code in range(0x100, 0x180):
        client.receive_keys(chr(code).encode() + b"\x7f", now)
    engine = client.engine
    cells = [cell for row in engine.rows.values() for cell in row]
    assert len(cells) <= 80 * 24 and max(len(cell.olds) for cell in cells) == mosh.OLDS_LIMIT
    assert len(engine.cursors) == mosh.CURSORS_LIMIT


def test_an_answer_of_the_terminal_that_never_ends() -> None:
    client = _client()
    for now in range(1_000):
        client.receive_keys(b"\x1b[?20", now)
        assert len(client._cut_off_reply) <= 16


def test_the_notification_bar() -> None:
    bar = mosh.NotificationBar(0, "Ctrl-^")
    bar.set_message("m" * 10_000, 0)
    assert len(bar.text(0)) == mosh.BAR_LIMIT


class _Flood:
    """A socket that always has another datagram."""

    def __init__(self) -> None:
        self.read_count = 0

    def receive(self) -> tuple[bytes, mosh.Address, bool]:
        """See mosh.UdpSocket."""
        self.read_count += 1
        return b"garbage", PEER, False


def test_datagrams_in_a_turn_and_lines_in_a_log() -> None:
    """A flood neither keeps a server from its other work nor fills the log of one that was told to write it."""
    lines: list[str] = []
    server = mosh.Server.__new__(mosh.Server)
    server._core = mosh.ServerCore(mosh.Channel(CIPHER, mosh.TO_CLIENT), 0, width=80, height=24, random_bytes=bytes)
    flood = _Flood()
    server._udp, server._peer, server._size = flood, None, server._core.size  # type: ignore[assignment]
    server._log = lines.append
    server._receive(0)
    assert flood.read_count == mosh.DATAGRAMS_PER_TURN
    while flood.read_count < 1 << 14:
        server._receive(0)
    assert mosh.DROPS_LOGGED < len(lines) <= mosh.DROPS_LOGGED + 14


def _bounds() -> Iterator[str]:
    for name in dir(mosh):
        if "LIMIT" in name and isinstance(getattr(mosh, name), int):
            yield name


def test_every_bound_is_a_positive_number() -> None:
    names = list(_bounds())
    assert len(names) > 20 and all(getattr(mosh, name) > 0 for name in names)
