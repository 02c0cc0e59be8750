"""Section 13: the user stream, the terminal state, Hello, and the filter for cursor keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh
import vectors
from mosh import Hello, Resize, TerminalState, UserStream
from terminal_streams import terminal_bytes

Event = Any  # an int, a Resize or a Hello


def _stream(*events: Event) -> UserStream:
    return UserStream().with_events(events)


def _view(events: Sequence[Event]) -> list[Any]:
    """Return events in a form that compares."""
    out: list[Any] = []
    for event in events:
        if isinstance(event, Resize):
            out.append((event.width, event.height))
        elif isinstance(event, Hello):
            out.append((event.capabilities, event.version))
        else:
            out.append(event)
    return out


def _events(stream: UserStream, since: int = 0) -> list[Any]:
    return _view(stream.events_since(since))


def _terminal(data: bytes = b"", *, width: int = 20, height: int = 4, echo_ack: int = 0) -> TerminalState:
    emulator = mosh.Emulator(width, height)
    emulator.feed(data)
    return TerminalState(emulator.copy(), echo_ack)


def test_keys_and_resizes_arrive_in_order() -> None:
    client = _stream(Resize(80, 24), *b"ls\r")
    server = UserStream().applied(client.diff_from(UserStream()))
    assert _events(server) == [(80, 24), *b"ls\r"]
    assert server == client


# -- recorded messages

USER_MESSAGES = [
    ((Resize(80, 24),), "0a061a0428503018"),
    (tuple(b"ls"), "0a06120422026c73"),
    ((*b"a", Resize(132, 43), *b"b"), "0a0512032201610a071a05288401302b0a051203220162"),
    (tuple(b"a"), "0a051203220161"),
    ((), ""),
]


@pytest.mark.parametrize(("events", "message"), USER_MESSAGES)
def test_recorded_user_message(events: tuple[Event, ...], message: str) -> None:
    assert _stream(*events).diff_from(UserStream()).hex() == message
    assert _events(UserStream().applied(bytes.fromhex(message))) == _view(events)


def test_recorded_host_messages() -> None:
    blank = _terminal()
    assert _terminal(b"hello", echo_ack=1).diff_from(blank).hex() == "0a043a0240010a091207220568656c6c6f"
    assert _terminal(width=100, height=30).diff_from(blank).hex().startswith("0a061a042864301e")
    read = blank.applied(bytes.fromhex("0a043a0240010a091207220568656c6c6f"))
    assert (read.echo_ack, read.framebuffer.lines()[0].rstrip()) == (1, "hello")
    read = read.applied(bytes.fromhex("0a061a042864301e"))
    assert (read.framebuffer.width, read.framebuffer.height) == (100, 30)


def test_recorded_echo_ack() -> None:
    read = _terminal().applied(bytes.fromhex("0a043a0240030a051203220161"))
    assert (read.echo_ack, read.framebuffer.lines()[0].rstrip()) == (3, "a")


# -- user stream

SIZES = st.builds(Resize, st.integers(1, 0xFFFF), st.integers(1, 0xFFFF))
HELLOS = st.builds(Hello, st.lists(st.text(max_size=5), max_size=3).map(tuple), st.text(max_size=5))
EVENTS = st.lists(st.integers(0, 255) | st.integers(0, 255) | SIZES | HELLOS, max_size=40)


@given(EVENTS, EVENTS)
def test_user_stream_diff_law(first: list[Event], second: list[Event]) -> None:
    a = _stream(*first)
    b = a.with_events(second)
    theirs = UserStream().applied(a.diff_from(UserStream()))
    assert _events(theirs.applied(b.diff_from(a))) == _view(first + second)
    assert theirs.applied(b.diff_from(a)) == b
    assert b.diff_from(b) == b""


@given(EVENTS, EVENTS, st.integers(0, 40))
def test_forgetting_what_has_arrived_changes_no_later_diff(first: list[Event], second: list[Event], known: int) -> None:
    base = _stream(*first[:known])
    a = base.with_events(first[known:])
    b = a.with_events(second)
    expected = b.diff_from(a), b.diff_from(base)
    b.forget_before([base])
    assert (b.diff_from(a), b.diff_from(base)) == expected
    b.forget_before([a])
    assert b.diff_from(a) == expected[0]


@given(st.binary(max_size=100))
def test_any_bytes_are_events_or_a_packet_error(data: bytes) -> None:
    stream = _stream(*b"before")
    try:
        assert _events(stream.applied(data))[:6] == list(b"before")
    except mosh.PacketError:
        assert _events(stream) == list(b"before")


def test_a_state_never_changes() -> None:
    one = _stream(*b"a")
    two = one.with_events(b"b")
    assert _events(one) == list(b"a") and _events(two) == list(b"ab")
    assert one != two and two.length == 2


def test_two_diffs_that_overlap_give_each_event_once() -> None:
    """The peer sent state 2 from state 0 and, before it heard back, state 3 from state 0 as well."""
    sent = _stream(*b"abc")
    server = UserStream()
    two = server.applied(_stream(*b"ab").diff_from(UserStream()))
    three = server.applied(sent.diff_from(UserStream()))
    assert _events(two) == list(b"ab") and _events(three) == list(b"abc")
    assert _events(three, since=two.length) == list(b"c")


def test_a_late_shorter_state_takes_nothing_back() -> None:
    server = UserStream()
    three = server.applied(_stream(*b"abc").diff_from(UserStream()))
    server.applied(_stream(*b"a").diff_from(UserStream()))
    assert _events(three) == list(b"abc")


def _size_message(width: int, height: int) -> bytes:
    size = mosh.encode_field(5, width) + mosh.encode_field(6, height)
    return mosh.encode_field(1, mosh.encode_field(3, size))


@pytest.mark.parametrize(("width", "height"), [(65_536, 24), (80, 65_536), (2**64 - 1, 24)])
def test_an_impossible_size_is_refused(width: int, height: int) -> None:
    with pytest.raises(mosh.PacketError):
        UserStream().applied(_size_message(width, height))
    with pytest.raises(mosh.PacketError):
        _terminal().applied(_size_message(width, height))


@pytest.mark.parametrize(("width", "height", "taken_for"), [(0, 24, (1, 24)), (80, 0, (80, 1)), (0, 0, (1, 1))])
def test_a_window_without_size_is_taken_and_a_screen_is_not(width: int, height: int, taken_for: Event) -> None:
    """A stock client in such a window says so, and again with each key until it is acknowledged."""
    assert _events(UserStream().applied(_size_message(width, height))) == [taken_for]
    with pytest.raises(mosh.PacketError):
        _terminal().applied(_size_message(width, height))


NO_SIZES = {"nothing": "", "no height": "2850", "no width": "3018", "bytes": "2a0150320118"}


@pytest.mark.parametrize("size", NO_SIZES.values(), ids=NO_SIZES)
def test_a_size_that_is_not_all_there_is_refused(size: str) -> None:
    message = mosh.encode_field(1, mosh.encode_field(3, bytes.fromhex(size)))
    with pytest.raises(mosh.PacketError):
        UserStream().applied(message)


def test_of_one_user_instruction_only_the_first_kind_counts() -> None:
    both = mosh.encode_field(3, Resize(80, 24).encode()) + mosh.encode_field(2, mosh.encode_field(4, b"a"))
    assert _events(UserStream().applied(mosh.encode_field(1, both))) == list(b"a")


def test_a_flood_of_events_is_refused() -> None:
    half = mosh.encode_field(1, mosh.encode_field(2, mosh.encode_field(4, bytes(mosh.EVENT_LIMIT // 2))))
    stream = UserStream().applied(half).applied(half)
    with pytest.raises(mosh.PacketError):
        stream.applied(half)
    assert stream.length == mosh.EVENT_LIMIT


def test_the_backlog_is_what_the_peer_may_lack() -> None:
    base = _stream(*b"abc")
    stream = base.with_events(b"de")
    assert stream.backlog == 5
    stream.forget_before([base])
    assert stream.backlog == 2


# -- terminal state


def _law(base: TerminalState, target: TerminalState, receiver: TerminalState) -> TerminalState:
    """Apply the diff between two states to a receiver of the first, which must then show the second."""
    got = receiver.applied(target.diff_from(base))
    assert vectors.shown(got.framebuffer) == vectors.shown(target.framebuffer)
    assert got.echo_ack == target.echo_ack
    return got


@given(terminal_bytes(), terminal_bytes(), st.integers(0, 5), st.integers(0, 2**64 - 6))
def test_terminal_state_diff_law(first: bytes, second: bytes, more: int, echo_ack: int) -> None:
    emulator = mosh.Emulator(11, 5)
    blank = TerminalState(emulator.copy())
    emulator.feed(first)
    a = TerminalState(emulator.copy(), echo_ack)
    emulator.feed(second)
    b = TerminalState(emulator.copy(), echo_ack + more)
    _law(a, b, _law(blank, a, TerminalState(mosh.Emulator(11, 5))))


@given(terminal_bytes(), st.integers(1, 30), st.integers(1, 12))
def test_terminal_state_diff_law_across_a_resize(data: bytes, width: int, height: int) -> None:
    emulator = mosh.Emulator(11, 5)
    a = TerminalState(emulator.copy())
    emulator.resize(width, height)
    emulator.feed(data)
    _law(a, TerminalState(emulator.copy()), TerminalState(mosh.Emulator(11, 5)))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_screen_or_a_packet_error(data: bytes) -> None:
    state = _terminal(b"before", echo_ack=7)
    try:
        new = state.applied(data)
        assert new.echo_ack >= 7 and new.framebuffer.width >= 1
    except mosh.PacketError:
        pass
    assert state.framebuffer.lines()[0].rstrip() == "before" and state.echo_ack == 7


def test_states_alike_need_no_message() -> None:
    emulator = mosh.Emulator(20, 4)
    emulator.feed(b"same")
    one, other = TerminalState(emulator.copy(), 3), TerminalState(emulator.copy(), 3)
    assert one == other and other.diff_from(one) == b""


def test_what_makes_two_states_differ() -> None:
    emulator = mosh.Emulator(20, 4)
    one = TerminalState(emulator.copy(), 3)
    assert one != TerminalState(emulator.copy(), 4)
    emulator.feed(b"x")
    assert one != TerminalState(emulator.copy(), 3)


def _host(*instructions: bytes) -> bytes:
    return b"".join(mosh.encode_field(1, instruction) for instruction in instructions)


ECHO_ACK_9 = mosh.encode_field(7, mosh.encode_field(8, 9))
SIZE_30X5 = mosh.encode_field(3, Resize(30, 5).encode())
HOST_X = mosh.encode_field(2, mosh.encode_field(4, b"x"))


def test_of_one_host_instruction_only_the_first_kind_counts() -> None:
    state = _terminal().applied(_host(ECHO_ACK_9 + SIZE_30X5 + HOST_X))
    assert (state.echo_ack, state.framebuffer.width, state.framebuffer.lines()[0][0]) == (0, 20, "x")
    state = _terminal().applied(_host(ECHO_ACK_9 + SIZE_30X5))
    assert (state.echo_ack, state.framebuffer.width) == (0, 30)


def test_a_message_says_echo_ack_then_size_then_screen() -> None:
    emulator = mosh.Emulator(20, 4)
    before = TerminalState(emulator.copy())
    emulator.resize(30, 5)
    emulator.feed(b"x")
    fields = list(mosh.decode_fields(TerminalState(emulator.copy(), 9).diff_from(before)))
    kinds = [next(iter(mosh.decode_fields(value)))[0] for _, value in fields if isinstance(value, bytes)]
    assert kinds == [7, 3, 2]


def test_an_echo_ack_that_goes_backwards_is_refused() -> None:
    with pytest.raises(mosh.PacketError):
        _terminal(echo_ack=10).applied(_host(ECHO_ACK_9))
    assert _terminal(echo_ack=9).applied(_host(ECHO_ACK_9)).echo_ack == 9


def test_a_screen_larger_than_any_wall_is_refused() -> None:
    with pytest.raises(mosh.PacketError):
        _terminal().applied(_host(mosh.encode_field(3, Resize(0xFFFF, 0xFFFF).encode())))


@pytest.mark.parametrize("query", [b"\x1b[c", b"\x1b[>c", b"\x1b[5n", b"\x1b[6n"])
def test_a_server_cannot_make_the_client_type(query: bytes) -> None:
    state = _terminal().applied(_host(mosh.encode_field(2, mosh.encode_field(4, query))))
    assert state.emulator.take_replies() == b""


@pytest.mark.parametrize("query", [b"\x1b[c", b"\x1b[6n"])
def test_a_query_of_the_program_never_travels(query: bytes) -> None:
    emulator = mosh.Emulator(20, 4)
    before = TerminalState(emulator.copy())
    emulator.feed(b"a" + query + b"b")
    reader = mosh.Emulator(20, 4)
    for _, instruction in mosh.decode_fields(TerminalState(emulator.copy()).diff_from(before)):
        assert isinstance(instruction, bytes)
        reader.feed(instruction)
    assert reader.take_replies() == b""


# -- Hello


def _stock_events(message: bytes) -> list[Any]:
    """Read a UserMessage as a parser does that knows fields 1 to 6 only."""
    out: list[Any] = []
    for number, instruction in mosh.decode_fields(message):
        assert number == 1 and isinstance(instruction, bytes)
        fields = dict(mosh.decode_fields(instruction))
        if 2 in fields:
            keys = dict(mosh.decode_fields(_as_bytes(fields[2])))
            out += _as_bytes(keys.get(4, b""))
        elif 3 in fields:
            size = dict(mosh.decode_fields(_as_bytes(fields[3])))
            out.append((size[5], size[6]))
    return out


def _as_bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


@given(EVENTS)
def test_hello_is_invisible_to_stock(events: list[Event]) -> None:
    plain = [event for event in events if not isinstance(event, Hello)]
    assert _stock_events(_stream(*events).diff_from(UserStream())) == _view(plain)


def test_hello_in_a_screen_is_invisible_to_stock() -> None:
    emulator = mosh.Emulator(20, 4)
    before = TerminalState(emulator.copy())
    emulator.feed(b"x")
    with_hello = TerminalState(emulator.copy(), 9, Hello(("a", "b"), "1")).diff_from(before)
    kinds = [next(iter(mosh.decode_fields(_as_bytes(value))))[0] for _, value in mosh.decode_fields(with_hello)]
    known = [kind for kind in kinds if kind in (2, 3, 7)]
    assert known == [7, 2] and len(kinds) == 3


def test_a_stock_peer_is_told_nothing() -> None:
    assert _terminal(b"x").applied(_host(HOST_X)).hello is None
    assert mosh.encode_varint(mosh.HELLO << 3 | 2) not in _terminal(b"x", echo_ack=1).diff_from(_terminal())


@given(HELLOS)
def test_hello_decode_undoes_encode(hello: Hello) -> None:
    assert _view([Hello.decode(hello.encode())]) == _view([hello])


@given(HELLOS)
def test_hello_travels_with_the_screen_once(hello: Hello) -> None:
    emulator = mosh.Emulator(20, 4)
    before, after = TerminalState(emulator.copy()), TerminalState(emulator.copy(), 0, hello)
    received = before.applied(after.diff_from(before))
    assert received.hello is not None and _view([received.hello]) == _view([hello])
    assert after != before and after.diff_from(received) == b""


@given(st.binary(max_size=60))
def test_any_bytes_are_a_hello_or_a_packet_error(data: bytes) -> None:
    try:
        Hello.decode(data)
    except mosh.PacketError:
        pass


# -- cursor keys

# what the user's terminal sends, what the program reads in normal and in application mode
KEYS = [
    (b"abc", b"abc", b"abc"),
    (b"\x1bOA", b"\x1b[A", b"\x1bOA"),
    (b"\x1bOB\x1bOC\x1bOD", b"\x1b[B\x1b[C\x1b[D", b"\x1bOB\x1bOC\x1bOD"),
    (b"\x1bOP", b"\x1bOP", b"\x1bOP"),
    (b"\x1bOE", b"\x1bOE", b"\x1bOE"),
    (b"\x1b[A", b"\x1b[A", b"\x1b[A"),
    (b"OA", b"OA", b"OA"),
    (b"\x1bxOA", b"\x1bxOA", b"\x1bxOA"),
    (b"\x1b\x1bOA", b"\x1b\x1bOA", b"\x1b\x1bOA"),
    (b"\x1bO\x1bOA", b"\x1bO\x1bOA", b"\x1bO\x1bOA"),
    (b"\x1bOAOB", b"\x1b[AOB", b"\x1bOAOB"),
    (b"\x1b", b"\x1b", b"\x1b"),
    (b"\x1bO", b"\x1b", b"\x1b"),
]


@pytest.mark.parametrize(("keys", "normal", "application"), KEYS)
def test_cursor_keys(keys: bytes, normal: bytes, application: bytes) -> None:
    assert mosh.CursorKeyFilter().filter(keys, False) == normal
    assert mosh.CursorKeyFilter().filter(keys, True) == application


ARROWS = st.lists(st.sampled_from(b"\x1bOABZx["), max_size=30).map(bytes)


@given(ARROWS, st.booleans())
def test_cursor_keys_may_be_cut_anywhere(keys: bytes, application: bool) -> None:
    whole, pieces = mosh.CursorKeyFilter(), mosh.CursorKeyFilter()
    expected = whole.filter(keys, application)
    assert b"".join(pieces.filter(keys[i : i + 1], application) for i in range(len(keys))) == expected


@given(ARROWS)
def test_in_application_mode_nothing_is_changed(keys: bytes) -> None:
    assert keys.startswith(mosh.CursorKeyFilter().filter(keys, True))


def test_the_mode_is_that_of_the_moment() -> None:
    keys = mosh.CursorKeyFilter()
    assert keys.filter(b"\x1bO", False) == b"\x1b"
    assert keys.filter(b"A", True) == b"OA"
