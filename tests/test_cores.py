"""Section 15: each end as a whole, alone with recorded datagrams or together in a simulation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

import mosh
from mosh import TO_CLIENT, TO_SERVER, Phase
from simnet import HEIGHT, HOME_ADDRESS, NEW_ADDRESS, SERVER_ADDRESS, WIDTH, End, LineShell, Output, Screen, Simulation

CIPHER = mosh.CryptographyCipher(bytes(range(16)))


def _client(width: int = 80, height: int = 24, setting: bytes | None = None) -> mosh.ClientCore:
    """Return a client of a server that never answers unless a test does it."""
    return mosh.ClientCore(
        mosh.Channel(CIPHER, TO_SERVER),
        0,
        width=width,
        height=height,
        candidates=[SERVER_ADDRESS],
        port=60001,
        random_bytes=bytes,
        escape_key=mosh.EscapeKey(setting),
    )


def _server(width: int = 80, height: int = 24) -> mosh.ServerCore:
    return mosh.ServerCore(mosh.Channel(CIPHER, TO_CLIENT), 0, width=width, height=height, random_bytes=bytes)


class Sender:
    """A client reduced to what it sends."""

    def __init__(self, server: mosh.ServerCore) -> None:
        self._server = server
        self._layer = mosh.DatagramLayer(mosh.Channel(CIPHER, TO_SERVER), 0, is_server=False)
        self._fragmenter = mosh.Fragmenter()

    def type(self, num: int, keys: bytes, *, base: int | None = None) -> None:
        """Deliver state `num`, which adds `keys` to `base` or else to the one before."""
        self._send(num, mosh.UserStream().with_events(keys).diff_from(mosh.UserStream()), base)

    def resize(self, num: int, width: int, height: int) -> None:
        """Deliver state `num`, which adds a new size of the window to the one before."""
        self._send(num, mosh.UserStream().with_events([mosh.Resize(width, height)]).diff_from(mosh.UserStream()))

    def _send(self, num: int, diff: bytes, base: int | None = None) -> None:
        base = num - 1 if base is None else base
        instruction = mosh.Instruction(base, num, 0, base, diff)
        for fragment in self._fragmenter.fragments(instruction, 1_252):
            self._server.receive_datagram(self._layer.seal(fragment.encode(), 0), HOME_ADDRESS, 0)


@pytest.fixture
def sim() -> Simulation:
    """A session that has been connected for a second."""
    sim = Simulation(1)
    sim.run(ms=1_000)
    return sim


def test_a_session() -> None:
    client, server = _client(), _server()
    for datagram in client.datagrams_to_send(now=0):
        server.receive_datagram(datagram, HOME_ADDRESS, now=5)
    server.receive_host_output(b"$ ", now=6)
    for datagram in server.datagrams_to_send(now=14):
        client.receive_datagram(datagram, SERVER_ADDRESS, now=19)
    assert client.screen.lines()[0].rstrip() == "$"
    assert b"$" in client.frame_to_draw(now=19)
    assert server.peer == HOME_ADDRESS and client.phase is server.phase is Phase.CONNECTED


# -- recorded sessions

STOCK_CLIENT = (
    "00000000000000006f359a43da74275f106bc28e733c260502428c8571949d686f4420ca31f0060ca43d50ffb19ea47d96f7cea7b579618c21"
    "fe2c76d52fab3c8a31287caeb275"
)
STOCK_SERVER = {
    "hello": (
        "800000000000000070cab736aec42cc50f361ee9b21f5b188cfd656b97bc281b2ff0a7034dc588ecb5d94bb130a659073d5e1d7300d772"
        "efaf72f5b8e7218bb7e47914f394fdc9bedae61254c6"
    ),
    "world, second half": (
        "8000000000000002046ae81936d34bd0dde0979e0577be6fe339c490e06b1b509d247be8991aeaa5e16b68c549e3a3ba883140ffba2b"
    ),
    "world, first half": (
        "8000000000000001bb34fe048c2b56b49a7b7b34810d76a580d307d9b06af3ee8a5e459e70e214a4443d5c498aed0a29ed227a05e80e3437"
        "ea1a"
    ),
    "shutdown": (
        "8000000000000003cf5767a542a5cef1b64e7d88207a7ddf2734e1d95e5cd851dc3ec48e58b05ccfe5e057e233c07e84b46c56dd777605"
        "1dd531984b0a8f"
    ),
}


def _instructions(datagrams: list[bytes]) -> list[mosh.Instruction]:
    reader = mosh.Channel(CIPHER, 1 - (datagrams[0][0] >> 7))
    assembly = mosh.FragmentAssembly()
    payloads = [reader.open(datagram)[1][mosh.TIMESTAMPS.size :] for datagram in datagrams]
    found = [assembly.add(mosh.Fragment.decode(payload)) for payload in payloads]
    return [instruction for instruction in found if instruction is not None]


def test_recorded_server_session_shows_hello_then_hello_world_then_ends() -> None:
    client, now, shown = _client(), 0, []
    client.datagrams_to_send(now)
    for datagram in STOCK_SERVER.values():
        now += 300
        client.receive_datagram(bytes.fromhex(datagram), SERVER_ADDRESS, now)
        client.frame_to_draw(now)
        shown.append(client.shown.lines()[0].rstrip())
    assert shown == ["hello", "hello", "hello world", "hello world"]
    (last,) = _instructions(client.datagrams_to_send(now + 300))
    assert last.ack_num == mosh.LAST_STATE_NUM and last.diff == b""
    assert client.datagrams_to_send(now + 600) == []
    assert client.phase is Phase.CLOSED and client.transport.clean


def test_recorded_first_datagram_of_a_client_is_answered_at_once() -> None:
    server = _server(width=100, height=30)
    server.receive_datagram(bytes.fromhex(STOCK_CLIENT), HOME_ADDRESS, now=5_000)
    assert server.size == (80, 24) and server.peer == HOME_ADDRESS and server.client_heard_at == 5_000
    (answer,) = _instructions(server.datagrams_to_send(now=5_000))
    assert (answer.old_num, answer.new_num, answer.ack_num, answer.throwaway_num) == (0, 1, 1, 0)
    assert answer.diff.hex().startswith("0a061a0428503018")  # the resize that the client's wish has led to


def test_a_stock_peer_is_told_nothing_that_stock_would_not_tell() -> None:
    server = _server()
    server.receive_datagram(bytes.fromhex(STOCK_CLIENT), HOME_ADDRESS, now=0)
    assert server.client_hello is None
    (answer,) = _instructions(server.datagrams_to_send(now=0))
    told = mosh.TerminalState(mosh.Emulator(9, 9)).applied(answer.diff)
    assert told.hello is None and told.framebuffer == mosh.Emulator(80, 24).framebuffer
    client = _client()
    client.datagrams_to_send(now=0)
    client.receive_datagram(bytes.fromhex(STOCK_SERVER["hello"]), SERVER_ADDRESS, now=300)
    assert client.transport.remote.state.hello is None


def test_our_own_two_ends_recognize_each_other(sim: Simulation) -> None:
    client_hello, server_hello = sim.server.core.client_hello, sim.client.core.transport.remote.state.hello
    assert client_hello is not None and server_hello is not None
    assert client_hello.version == server_hello.version == mosh.__version__
    assert client_hello.capabilities == server_hello.capabilities == mosh.CAPABILITIES


class Cat(LineShell):
    """A program that says nothing by itself, on a terminal that echoes."""

    PROMPT = b""

    def read(self, data: bytes) -> Iterator[Output]:
        """Yield the echo."""
        self.received += data
        yield 1, data


def test_the_life_of_one_key() -> None:
    sim = Simulation(1, width=80, height=24, program=Cat())
    sim.link.delay_ms = 4
    sim.run(ms=1_400)
    client_at, server_at = len(sim.sent(TO_SERVER)), len(sim.sent(TO_CLIENT))
    (client_num, *_), (server_num, *_) = (sim.sent(side)[-1].numbers[1:] for side in (TO_SERVER, TO_CLIENT))
    sim.client.type("a")
    sim.run(ms=1_000)
    (key, ack), (echo, echo_ack) = sim.sent(TO_SERVER)[client_at:], sim.sent(TO_CLIENT)[server_at:]
    assert (key.numbers[1], key.instruction.diff.hex()) == (client_num + 1, "0a051203220161")
    assert echo.numbers[1:3] == (server_num + 1, client_num + 1)
    assert echo.instruction.diff.hex() == "0a051203220161"
    assert echo_ack.numbers[1] == server_num + 2
    assert echo_ack.instruction.diff.startswith(b"\n\x04:\x02@" + bytes((client_num + 1,)))
    assert (ack.numbers[1:3], ack.instruction.diff) == ((client_num + 2, server_num + 2), b"")
    assert key.at <= 1_401 and echo.at - key.at <= 4 + 1 + 8
    assert 50 <= echo_ack.at - (key.at + 4) <= 60 and ack.at - echo.at <= 4 + 100


def test_the_answer_that_ends_a_search_is_acknowledged_at_once() -> None:
    """Until it hears from the client again, the server may not send it much."""
    client, server = _client(), _server()
    for datagram in client.datagrams_to_send(now=0):
        server.receive_datagram(datagram, HOME_ADDRESS, now=20)
    for datagram in server.datagrams_to_send(now=30):
        client.receive_datagram(datagram, SERVER_ADDRESS, now=50)
    assert not client.roaming.searching and client.datagrams_to_send(now=50)


def test_keys_that_are_told_again_by_parts_are_read_once() -> None:
    """A client on a narrow path steps back to a state that holds less."""
    server = _server()
    sender = Sender(server)
    for num, length in ((1, 6), (2, 3), (3, 7)):
        sender.type(num, b"abcdefg"[:length], base=0)
    assert server.host_input == b"abcdefg"


def test_what_a_program_writes_after_a_resize_finds_the_new_size() -> None:
    server = _server()
    Sender(server).resize(1, 100, 30)
    server.receive_host_output(b"\x1b[30;100Hx", now=1)
    assert server.screen.lines()[29][99] == "x"


# -- escape key

NOT_THE_ESCAPE_KEY = (b"\x03", b"\x04", b"\n", b"\x0c", b"\r", b"\x80", b"ab")

# MOSH_ESCAPE_KEY, what is typed, what goes to the program, what else happens
ESCAPES: list[tuple[bytes | None, bytes, bytes, str]] = [
    (None, b"abc", b"abc", ""),
    (None, b"ab\x1e.cd", b"ab", "quit"),
    (None, b"ab\x1e\x1acd", b"abcd", "suspend"),
    (None, b"ab\x1e^cd", b"ab\x1ecd", ""),
    (None, b"ab\x1excd", b"ab\x1excd", ""),
    (None, b"\x1e\x1e.", b"\x1e\x1e.", ""),
    (None, b"\x1e", b"", "help"),
    (None, b"\x1a", b"\x1a", ""),
    (b"", b"\x1e.", b"\x1e.", ""),
    (b"\x01", b"x\x01.", b"x", "quit"),
    (b"\x01", b"\x01a\x01A", b"\x01\x01", ""),
    (b"\x01", b"\x1e.", b"\x1e.", ""),
    (b"~", b"~.", b"~.", ""),
    (b"~", b"ls\r~.", b"ls\r", "quit"),
    (b"~", b"\n~.", b"\n", "quit"),
    (b"~", b"\rx~.", b"\rx~.", ""),
    (b"~", b"\r~~", b"\r~", ""),
    (b"~", b"\r~~~.", b"\r~~.", ""),
    (b"~", b"\r~x", b"\r~x", ""),
    (b"~", b"\r~\r~.", b"\r~\r~.", ""),
    (b"A", b"\rAa\rAA", b"\rA\rA", ""),
    *((key, b"\x1e.", b"", "quit") for key in NOT_THE_ESCAPE_KEY),
    *((key, key + b".", key + b".", "") for key in NOT_THE_ESCAPE_KEY),
]


def _pressed(client: mosh.ClientCore) -> bytes:
    """Return the keys that the client has for the server."""
    return bytes(event for event in client.transport.sender.current.events_since(0) if isinstance(event, int))


def _happened(client: mosh.ClientCore) -> str:
    if client.phase is Phase.CLOSING:
        return "quit"
    if client.suspend_requested:
        return "suspend"
    return "help" if "Commands" in client.bar.text(0) else ""


@pytest.mark.parametrize("one_by_one", [False, True], ids=["in one read", "one by one"])
@pytest.mark.parametrize(("setting", "typed", "sent", "happens"), ESCAPES)
def test_escape_key(setting: bytes | None, typed: bytes, sent: bytes, happens: str, one_by_one: bool) -> None:
    client = _client(setting=setting)
    for i in range(len(typed) if one_by_one else 1):
        client.receive_keys(typed[i : i + 1] if one_by_one else typed, now=0)
    assert (_pressed(client), _happened(client)) == (sent, happens)


HELP = [
    (None, 'mosh: Commands: Ctrl-Z suspends, "." quits, "^" gives literal Ctrl-^'),
    (b"\x01", 'mosh: Commands: Ctrl-Z suspends, "." quits, "A" gives literal Ctrl-A'),
    (b"~", 'mosh: Commands: Ctrl-Z suspends, "." quits, "~" gives literal "~"'),
]


@pytest.mark.parametrize(("setting", "text"), HELP)
def test_the_escape_key_tells_what_it_can_do_until_the_next_key(setting: bytes | None, text: str) -> None:
    client = _client(setting=setting)
    client.receive_keys(b"\r" + (setting or b"\x1e"), now=0)
    client.frame_to_draw(now=5_000)
    assert client.shown.lines()[0].rstrip() == text
    client.receive_keys(b"x", now=5_000)
    client.frame_to_draw(now=5_000)
    assert "Commands" not in client.shown.lines()[0]


def test_nothing_is_typed_any_more_once_the_client_is_leaving() -> None:
    client = _client()
    client.receive_keys(b"a\x1e.", now=0)
    client.receive_keys(b"b\x1e\x1a", now=1)
    assert _pressed(client) == b"a" and not client.suspend_requested


# -- what the terminal answers

REPLY = b"\x1b[?2026;2$y"


@pytest.mark.parametrize("cut", range(len(REPLY) + 1))
def test_the_terminals_answer_is_not_typed(cut: int) -> None:
    client = _client()
    client.receive_keys(b"ab" + REPLY[:cut], now=10)
    client.receive_keys(REPLY[cut:] + b"cd", now=20)
    client.receive_keys(b"e", now=30)
    assert _pressed(client) == b"abcde"


def test_an_answer_that_comes_byte_by_byte_is_not_typed() -> None:
    """As over a serial line."""
    client = _client()
    for place, byte in enumerate(b"a" + REPLY + b"b"):
        client.receive_keys(bytes((byte,)), now=20 * place)
        client.datagrams_to_send(now=20 * place)
    assert _pressed(client) == b"ab"


@pytest.mark.parametrize("key", [b"\x1b", b"\x1b["])
def test_the_beginning_of_an_answer_alone_is_a_key_and_goes_out_soon(key: bytes) -> None:
    client = _client()
    client.receive_keys(key, now=10)
    assert client.next_timeout() <= 10 + mosh._ESCAPE_KEY_MS
    client.datagrams_to_send(now=10 + mosh._ESCAPE_KEY_MS)
    assert _pressed(client) == key
    client.receive_keys(b"x", now=200)
    assert _pressed(client) == key + b"x"


def test_an_escape_key_that_waited_is_drawn_at_once_where_it_starts_a_command() -> None:
    client = _client(setting=b"\x1b")
    client.frame_to_draw(now=10)
    client.receive_keys(b"\x1b", now=10)
    client.frame_to_draw(now=10)
    assert b"Commands" in client.frame_to_draw(now=10 + mosh._ESCAPE_KEY_MS)


def test_an_escape_key_that_waits_when_the_session_is_ended_is_not_typed() -> None:
    client = _client()
    client.receive_keys(b"a\x1b", now=10)
    client.start_shutdown("", now=20)
    client.datagrams_to_send(now=200)
    assert _pressed(client) == b"a"


def test_the_escape_key_does_not_wait_once_the_terminal_has_answered() -> None:
    client = _client()
    client.receive_keys(REPLY, now=10)
    client.receive_keys(b"\x1b", now=20)
    assert _pressed(client) == b"\x1b"


# the answer, whether frames are put between marks from then on
SUPPORT = [(b"0", False), (b"1", True), (b"2", True), (b"3", False), (b"4", False)]


@pytest.mark.parametrize(("answer", "marked"), SUPPORT)
def test_frames_are_shown_at_once_where_the_terminal_can(answer: bytes, marked: bool) -> None:
    client = _client()
    client.receive_keys(b"\x1b[?2026;" + answer + b"$y", now=10)
    frame = client.frame_to_draw(now=10)
    assert frame.startswith(b"\x1b[?2026h") == frame.endswith(b"\x1b[?2026l") == marked
    assert client.frame_to_draw(now=10) == b""


def test_an_answer_is_not_looked_for_twice() -> None:
    client = _client()
    client.receive_keys(REPLY + REPLY, now=10)
    assert _pressed(client) == REPLY


def test_a_late_answer_is_not_typed_and_the_escape_key_does_not_wait_for_it() -> None:
    client = _client()
    client.receive_keys(b"\x1b", now=mosh._TERMINAL_REPLY_MS)
    assert _pressed(client) == b"\x1b"
    client.receive_keys(b"a" + REPLY + b"b", now=60_000)
    assert _pressed(client) == b"\x1bab"


def test_keys_that_look_like_an_answer_arrive_with_the_next_key() -> None:
    client = _client()
    for key in (b"\x1b", b"[", b"?", b"2", b"x"):
        client.receive_keys(key, now=10)
    assert _pressed(client) == b"\x1b[?2x"


# -- notices

# what the bar says when, to a client that hears nothing
NOTICES = [
    (250, ""),
    (251, "mosh: Nothing received from server on UDP port 60001. [To quit: Ctrl-^ .]"),
    (15_000, "mosh: Nothing received from server on UDP port 60001. (15 s without contact.) [To quit: Ctrl-^ .]"),
    (15_001, "mosh: Timed out waiting for server... (15 s without contact.) [To quit: Ctrl-^ .]"),
]


@pytest.mark.parametrize(("now", "text"), NOTICES)
def test_what_a_client_says_while_it_waits(now: int, text: str) -> None:
    client = _client(width=127)
    client.datagrams_to_send(now)
    client.frame_to_draw(now)
    assert client.shown.lines()[0].rstrip() == text
    assert Screen(client.screen).text == ""


def test_how_to_quit_is_said_on_a_narrow_terminal_too() -> None:
    client = _client(width=80)
    client.frame_to_draw(10_000)
    assert client.shown.lines()[0].rstrip() == NOTICES[1][1]


def test_why_nothing_can_be_sent_is_not_hidden_by_what_follows_from_it() -> None:
    client = _client()
    client.note_network_error("sendto: Network is unreachable", now=100)
    client.frame_to_draw(3_000)
    assert "Network is unreachable" in client.shown.lines()[0]
    client.frame_to_draw(100 + mosh.NETWORK_ERROR_MS)
    client.frame_to_draw(101 + mosh.NETWORK_ERROR_MS)
    assert "Nothing received" in client.shown.lines()[0]


def test_a_client_without_an_answer_leaves_after_15_s() -> None:
    client = _client()
    phases = []
    for now in (15_000, 15_001):
        client.datagrams_to_send(now)
        phases.append(client.phase)
    assert phases == [Phase.CONNECTING, Phase.CLOSING]


def test_a_client_wakes_up_in_time_for_each_notice() -> None:
    client, drawn = _client(), set()
    now = 0
    for _ in range(1_000):
        client.frame_to_draw(now)
        drawn.add(client.shown.lines()[0].rstrip()[:20])
        client.datagrams_to_send(now)
        now = client.next_timeout()
        if now > 16_000:
            break
    assert drawn == {"", "mosh: Nothing receiv", "mosh: Timed out wait"}


def test_an_answer_removes_the_notice() -> None:
    client = _client()
    client.datagrams_to_send(now=1_000)
    client.receive_datagram(bytes.fromhex(STOCK_SERVER["hello"]), SERVER_ADDRESS, now=1_100)
    client.frame_to_draw(now=1_100)
    assert client.shown.lines()[0].rstrip() == "hello"


def test_a_datagram_that_is_no_good_is_worth_a_word_until_there_is_a_session(sim: Simulation) -> None:
    client = _client()
    client.note_bad_datagram(mosh.PacketError("no good"), now=100)
    client.frame_to_draw(now=100)
    assert client.shown.lines()[0].startswith("mosh: Crypto exception: no good")
    sim.client.core.note_bad_datagram(mosh.PacketError("no good"), sim.now)
    sim.client.take_turn()
    assert sim.client.seen == sim.client.screen


def test_a_network_error_does_not_hide_what_the_user_asked_for(sim: Simulation) -> None:
    sim.client.core.note_network_error("sendto: Network is unreachable", sim.now)
    sim.client.take_turn()
    assert sim.client.seen.lines[0].startswith("mosh: sendto: Network is unreachable")
    sim.client.type("\x1e")
    sim.client.core.note_network_error("sendto: Network is unreachable", sim.now)
    sim.client.take_turn()
    assert sim.client.seen.lines[0].startswith("mosh: Commands: ")


def test_what_a_host_says_of_our_datagrams_is_told_while_none_is_answered(sim: Simulation) -> None:
    core = sim.client.core
    core.note_icmp_error(SERVER_ADDRESS, "Connection refused", sim.now)
    sim.client.take_turn()
    assert sim.client.seen == sim.client.screen  # an answer has come since: whoever says so lies
    sim.blackout(ms=60_000)
    sim.client.type("x")
    sim.run(ms=2_000)
    core.note_icmp_error(NEW_ADDRESS, "Connection refused", sim.now)  # not where we mostly send
    sim.client.take_turn()
    assert sim.client.seen.lines[0] == sim.client.screen.lines[0]
    core.note_icmp_error(SERVER_ADDRESS, "Connection refused", sim.now)
    sim.client.take_turn()
    assert sim.client.seen.lines[0].startswith("mosh: UDP port 60001: Connection refused")
    assert core.phase is Phase.CONNECTED


def test_what_leaving_brings_about_is_not_why_there_was_no_answer() -> None:
    """A server that is heard by nobody obeys the client that leaves, and so its port is closed."""
    client = _client()
    client.note_network_error("sendto: Operation not permitted", now=100)
    assert client.network_error
    client.note_sending_works(now=200)
    assert client.network_error == ""
    (server,) = client.roaming.candidates
    client.note_icmp_error(server, "No route to host", now=300)
    client.note_sending_works(now=300)
    client.start_shutdown("Timed out waiting for server...", now=15_000)
    client.note_icmp_error(server, "Connection refused", now=15_100)
    assert client.network_error.endswith("No route to host")


def test_what_a_host_says_is_told_until_the_session_goes_on_and_no_longer(sim: Simulation) -> None:
    core = sim.client.core
    sim.blackout(ms=5_000)
    sim.client.type("x")
    sim.run(ms=2_500)
    core.note_icmp_error(SERVER_ADDRESS, "No route to host", sim.now)
    core.note_sending_works(sim.now)  # of the next datagram nobody has said anything yet
    sim.run(ms=mosh.MESSAGE_MS + 1_000)
    assert sim.client.seen.lines[0].startswith("mosh: UDP port 60001: No route to host")
    core.note_icmp_error(SERVER_ADDRESS, "No route to host", sim.now)
    sim.link.heal()
    sim.run_until(lambda: sim.settled, limit_ms=500)
    assert sim.client.seen == sim.client.screen


@pytest.mark.parametrize("reason", ["Exiting...", "Signal received, shutting down..."])
def test_a_client_that_leaves_says_why(sim: Simulation, reason: str) -> None:
    sim.client.core.start_shutdown(reason, sim.now)
    sim.client.take_turn()
    assert sim.client.seen.lines[0] == f"mosh: {reason} [To quit: Ctrl-^ .]"


@pytest.mark.parametrize("end", ["client", "server"])
def test_the_frame_left_behind_has_neither_bar_nor_prefix(sim: Simulation, end: str) -> None:
    sim.server.write(b"\x1b]0;work\x07")
    sim.run(ms=500)
    (sim.client if end == "client" else sim.server).quit()
    sim.run(ms=500)
    assert sim.client.terminal.framebuffer.window_title == "[mosh] work"
    sim.client.terminal.feed(sim.client.core.last_frame(sim.now))
    assert sim.client.seen == sim.server.screen
    assert sim.client.terminal.framebuffer.window_title == "work"


# -- what is drawn


def test_a_title_is_prefixed_for_the_user_only(sim: Simulation) -> None:
    sim.server.write(b"\x1b]0;both\x07\x1b]2;window\x07")
    sim.run(ms=500)
    assert sim.client.terminal.framebuffer.window_title == "[mosh] window"
    assert sim.client.terminal.framebuffer.icon_name == "both"
    assert sim.client.core.screen.window_title == "window"


def test_the_prefix_can_be_left_out() -> None:
    sim = Simulation(1, title_prefix="")
    sim.run(ms=1_000)
    sim.server.write(b"\x1b]2;plain\x07")
    sim.run(ms=500)
    assert sim.client.terminal.framebuffer.window_title == "plain"


def test_nothing_is_drawn_while_nothing_changes(sim: Simulation) -> None:
    before = sim.client.frame_count
    sim.run(ms=60_000)
    assert sim.client.frame_count == before


def test_a_heartbeat_draws_nothing(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    core = sim.client.core
    core.frame_to_draw(sim.now)
    monkeypatch.setattr(core, "_display", None)  # so nobody may ask it for a frame
    num = core.transport.remote.num
    for datagram in sim.server.core.datagrams_to_send(sim.server.now + mosh.ACK_INTERVAL_MS):
        core.receive_datagram(datagram, core.peers[0], sim.now + mosh.ACK_INTERVAL_MS)
    assert core.transport.remote.num == num + 1
    assert core.frame_to_draw(sim.now + mosh.ACK_INTERVAL_MS) == b""


def test_ctrl_l_repaints_what_another_program_has_spoilt(sim: Simulation) -> None:
    sim.client.terminal.feed(b"\x1b[5;5H\x1b[7mmessage from root")
    sim.run(ms=500)
    assert sim.client.seen != sim.client.screen
    sim.client.type("\x0c")
    sim.run(ms=0)
    assert sim.client.seen == sim.client.screen
    sim.run(ms=500)
    assert sim.server.program.received == b"\x0c"


def test_a_repaint_can_be_asked_for(sim: Simulation) -> None:
    sim.client.terminal.feed(b"\x1bc")
    sim.client.core.repaint()
    sim.client.take_turn()
    assert sim.client.seen == sim.client.screen


# -- prediction


def _confirmed(mode: mosh.PredictionMode) -> Simulation:
    """Return a session whose first epoch is confirmed, on a link that is slow from now on."""
    sim = Simulation(1, mode=mode)
    sim.run(ms=1_000)
    sim.client.type("a", every_ms=1)
    sim.run(ms=1_000)
    sim.link.delay_ms = 1_000
    return sim


@pytest.mark.parametrize(("count", "predicted"), [(1, True), (40, True), (100, True), (101, False), (1_000, False)])
def test_a_paste_is_not_predicted(count: int, predicted: bool) -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.client.type("b" * count)
    sim.run(ms=0)
    assert ("b" in sim.client.seen.text) == predicted
    sim.run(ms=5_000)
    assert sim.server.program.received == b"a" + b"b" * count


SHOWN = [
    (mosh.PredictionMode.ALWAYS, "$ ab"),
    (mosh.PredictionMode.NEVER, "$ a"),
    (mosh.PredictionMode.ADAPTIVE, "$ a"),
]


@pytest.mark.parametrize(("mode", "text"), SHOWN)
def test_whether_a_prediction_is_shown_on_a_link_that_was_fast(mode: mosh.PredictionMode, text: str) -> None:
    sim = _confirmed(mode)
    sim.client.type("b")
    sim.run(ms=0)
    assert sim.client.seen.text == text


def test_predictions_are_drawn_over_the_screen_not_into_it() -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.client.type("b")
    sim.run(ms=0)
    assert (sim.client.shown.text, sim.client.screen.text) == ("$ ab", "$ a")


def test_a_prediction_long_unanswered_is_shown_though_nothing_else_wakes_the_client(sim: Simulation) -> None:
    sim.client.type("\ra", every_ms=500)
    sim.run(ms=1_000)
    sim.blackout(ms=60_000)
    sim.run(ms=12_000)
    sim.client.type("b")
    sim.run(ms=200)
    assert sim.client.seen.lines[1] == "$ a"
    sim.run(ms=110)
    assert sim.client.seen.lines[1] == "$ ab"


def test_a_key_in_the_same_turn_as_the_echo_of_the_last_one_is_judged_by_that_echo() -> None:
    client, server = _client(), _server()
    client.engine.mode = mosh.PredictionMode.ALWAYS

    def exchange(now: int) -> None:
        for datagram in client.datagrams_to_send(now):
            server.receive_datagram(datagram, HOME_ADDRESS, now)
        for datagram in server.datagrams_to_send(now):
            client.receive_datagram(datagram, SERVER_ADDRESS, now)

    server.receive_host_output(b"$ ", 0)
    for now in range(0, 500, 10):
        exchange(now)
    client.frame_to_draw(500)
    client.receive_keys(b"l", 500)
    client.frame_to_draw(500)
    server.receive_host_output(b"l", 500)
    for now in range(500, 800, 10):
        exchange(now)
    client.receive_keys(b"s", 800)
    client.frame_to_draw(800)
    assert client.shown.lines()[0].rstrip() == "$ ls" and client.shown.cursor_col == 4


def test_a_letter_whose_place_is_certain_is_shown_before_it_is_taken_in() -> None:
    """`ClientEnd` looks whether it stays."""
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.client.type("bcd efg", every_ms=50)
    sim.run(ms=400)
    assert sim.client.letter_count == 6  # a space is nothing to see
    assert sim.client.seen.text == "$ abcd efg"
    sim.run(ms=5_000)
    assert sim.client.seen == sim.client.screen == sim.server.screen
    assert sim.server.program.received == b"abcd efg"


@pytest.mark.parametrize("keys", [b"", b" ", b"\r", b"\x7f", b"\x1e", b"\xc3\xa9", b"bc", b"b" * 200])
def test_nothing_but_one_letter_is_shown_before_it_is_taken_in(keys: bytes) -> None:
    core = _confirmed(mosh.PredictionMode.ALWAYS).client.core
    assert core.echo_at_once(keys) == b"" != core.echo_at_once(b"b")


def _drive_away(sim: Simulation, how: str) -> None:
    core = sim.client.core
    if how == "a screen":
        sim.server.core.receive_host_output(b"\r\nPassword: ", sim.now)
        for datagram in sim.server.core.datagrams_to_send(sim.server.now + mosh.ACK_INTERVAL_MS):
            core.receive_datagram(datagram, core.peers[0], sim.now)
    elif how == "a key":
        core.receive_keys(b"\x1b", sim.now)
    elif how == "a window's size":
        core.resize(60, 20, sim.now)
    elif how == "the bar":
        core.bar.set_message("hush", sim.now)
        core.frame_to_draw(sim.now)
    elif how == "the escape key":
        core.receive_keys(b"\x1e", sim.now)
        core.frame_to_draw(sim.now)
        core.look_ahead()
    elif how == "the end":
        core.start_shutdown("Exiting...", sim.now)
        core.frame_to_draw(sim.now)
        core.look_ahead()
    elif how == "a repaint":
        core.repaint()
        core.receive_keys(b"b", sim.now)
        core.look_ahead()


@pytest.mark.parametrize(
    "how", ["a screen", "a key", "a window's size", "the bar", "the escape key", "the end", "a repaint"]
)
def test_no_letter_is_shown_ahead_of_what_may_change_its_place(how: str) -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    assert sim.client.core._letter_ahead is not None
    _drive_away(sim, how)
    assert sim.client.core.echo_at_once(b"c") == b""


def test_a_heartbeat_leaves_the_letter_ahead_as_it_is() -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    core, num = sim.client.core, sim.client.core.transport.remote.num
    for datagram in sim.server.core.datagrams_to_send(sim.server.now + mosh.ACK_INTERVAL_MS):
        core.receive_datagram(datagram, core.peers[0], sim.now)
    assert core.transport.remote.num == num + 1
    assert core.frame_to_draw(sim.now) == b"" != core.echo_at_once(b"b")


def test_a_letter_that_is_the_escape_key_is_not_shown() -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.client.core._escape_key = mosh.EscapeKey(b"~")
    assert sim.client.core.echo_at_once(b"~") == b"" != sim.client.core.echo_at_once(b"b")


def test_a_letter_shown_at_once_is_taken_back_if_the_frame_that_follows_lacks_it() -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.client.terminal.feed(sim.client.core.echo_at_once(b"b"))
    assert sim.client.seen.text == "$ ab"
    sim.client.take_turn()
    assert sim.client.seen.text == "$ a" and sim.client.terminal.framebuffer.cursor_col == 3


def test_a_frame_that_would_show_the_letter_twice_is_not_used() -> None:
    class Wordy(mosh.Display):
        def frame(self, last: mosh.Framebuffer, new: mosh.Framebuffer, *, known: bool = True) -> bytes:
            return super().frame(last, new, known=known) + mosh._ANY_LETTER.encode()

    shown = mosh.Emulator(20, 2).framebuffer
    ahead = mosh.LetterAhead(mosh.Display(), shown, shown.codebook.DEFAULT, (b"<", b">"))
    assert ahead.put(b"x") == b"<x>" and ahead.screen().lines()[0].rstrip() == "x"
    ahead = mosh.LetterAhead(Wordy(), shown, shown.codebook.DEFAULT, (b"<", b">"))
    assert ahead.put(b"x") == ahead.letter == b""


def test_nothing_is_predicted_of_the_text_in_the_bar() -> None:
    sim = _confirmed(mosh.PredictionMode.ALWAYS)
    sim.blackout(ms=15_000)
    sim.run(ms=9_000)
    assert sim.client.seen.lines[0].startswith("mosh: ")
    sim.client.type("bc", every_ms=100)
    sim.run_until(lambda: not sim.client.seen.lines[0].startswith("mosh: "), limit_ms=20_000)
    assert sim.client.seen.text == "$ abc"


# -- the program's side


def test_keys_go_to_the_program_as_they_were_typed(sim: Simulation) -> None:
    everything = bytes(key for key in range(256) if key not in (0x1E, 0x1B))
    sim.client.type(everything)
    sim.run(ms=500)
    assert sim.server.program.received == everything


def test_arrow_keys_follow_the_programs_mode(sim: Simulation) -> None:
    sim.client.type("\x1bOA")
    sim.run(ms=500)
    sim.server.write(b"\x1b[?1h")
    sim.client.type("\x1bOA")
    sim.run(ms=500)
    assert sim.server.program.received == b"\x1b[A\x1bOA"


def test_a_query_is_answered_by_the_server_itself(sim: Simulation) -> None:
    sim.server.write(b"\x1b[6n")
    sim.run(ms=0)
    assert sim.server.program.received == b"\x1b[1;3R"


def test_an_echo_ack_comes_even_if_the_program_says_nothing(sim: Simulation) -> None:
    sim.client.type("quiet\r")
    sim.run(ms=1_000)
    sim.client.type("x")
    sim.run(ms=1)
    num = sim.client.core.transport.last_sent_num
    took_ms = sim.run_until(lambda: sim.client.core.transport.remote.state.echo_ack == num, limit_ms=200)
    assert 50 + 20 - 1 <= took_ms <= 50 + 20 + 30


def test_an_echo_ack_is_not_early(sim: Simulation) -> None:
    sim.client.type("x")
    sim.run(ms=1)
    num = sim.client.core.transport.last_sent_num
    sim.run(ms=10 + 48)
    sim.server.write(b"output in between")
    sim.run(ms=0)
    assert sim.server.core.transport.sender.current.echo_ack < num
    sim.run(ms=1)
    assert sim.server.core.transport.sender.current.echo_ack == num


def test_output_cut_inside_a_sequence_does_not_leak(sim: Simulation) -> None:
    sim.server.write(b"\x1b[3")
    sim.run(ms=500)
    sim.server.write(b"1mred\xe6\xbc")
    sim.run(ms=500)
    sim.server.write(b"\xa2")
    sim.run(ms=500)
    assert sim.client.screen == sim.server.screen
    assert sim.client.screen.lines[0] == "$ red\u6f22"


# -- window size


def test_the_program_gets_the_users_window(sim: Simulation) -> None:
    assert sim.server.sizes == [(WIDTH, HEIGHT)]
    sim.client.resize(100, 30)
    sim.run(ms=500)
    assert sim.server.sizes[1:] == [(100, 30)]
    assert (sim.client.core.screen.width, sim.client.core.screen.height) == (100, 30)
    assert sim.client.seen == sim.client.screen == sim.server.screen


def test_a_window_that_gets_the_servers_first_size_before_the_first_answer_is_followed() -> None:
    sim = Simulation(1, width=60, height=4)
    sim.client.resize(80, 24)
    sim.run(ms=2_000)
    assert len(sim.client.screen.lines) == 24 and sim.client.screen == sim.server.screen


def test_of_many_resizes_only_the_last_one_reaches_the_program(sim: Simulation) -> None:
    for width in range(40, 90):
        sim.client.resize(width, 10)
    sim.run(ms=500)
    assert sim.server.sizes == [(WIDTH, HEIGHT), (89, 10)]


def test_keys_and_resizes_keep_their_order(sim: Simulation) -> None:
    sim.blackout(ms=500)
    sim.client.type("a")
    sim.client.resize(70, 10)
    sim.client.type("b")
    sim.client.resize(71, 11)
    sim.run(ms=2_000)
    assert sim.server.program.received == b"ab" and sim.server.sizes[-1] == (71, 11)


@pytest.mark.parametrize("keys", ["", "x"])
def test_a_window_that_is_back_to_its_size_shows_all_it_did(sim: Simulation, keys: str) -> None:
    """Neither end may think that nothing has happened: the terminal has cut off what did not fit meanwhile."""
    sim.server.write(b"\x1b7\x1b[%d;%dHstatus\x1b8" % (HEIGHT, WIDTH - 5))
    sim.run(ms=500)
    sim.blackout(ms=1_000)
    sim.client.resize(WIDTH // 2, HEIGHT // 2)
    sim.client.type(keys)
    sim.client.resize(WIDTH, HEIGHT)
    sim.run(ms=100)
    assert sim.client.seen.lines[-1].endswith("status")
    sim.run(ms=4_000)
    assert sim.client.seen.lines[-1].endswith("status")
    assert sim.client.seen == sim.client.screen == sim.server.screen


def test_a_size_that_the_program_never_hears_of_cuts_off_nothing() -> None:
    server = _server()
    sender = Sender(server)
    sender.type(1, b"x")
    server.receive_host_output(b"\x1b[24;75Hstatus", now=0)
    server.datagrams_to_send(now=0)
    sender.resize(2, 40, 12)
    sender.resize(3, 80, 24)
    server.datagrams_to_send(now=1)
    assert server.screen.lines()[-1].endswith("status")


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 24), (80, 0)])
def test_a_window_without_size_is_never_reported(width: int, height: int) -> None:
    client = _client()
    client.resize(width, height, now=0)
    (size,) = [event for event in client.transport.sender.current.events_since(2) if isinstance(event, mosh.Resize)]
    assert (size.width, size.height) == (max(1, width), max(1, height))


def test_a_window_larger_than_any_wall_is_cut_to_size() -> None:
    server = _server()
    Sender(server).resize(1, 0xFFFF, 0xFFFF)
    server.datagrams_to_send(now=0)
    assert server.size[0] * server.size[1] <= mosh.SCREEN_LIMIT_CELLS
    assert (server.screen.width, server.screen.height) == server.size


# -- a program that does not read


def test_what_waits_for_a_program_that_does_not_read_is_bounded() -> None:
    server = _server()
    sender = Sender(server)
    sender.type(1, b"a" * 3_000_000)
    sender.type(2, b"b" * 3_000_000)
    assert len(server.host_input) == mosh.INPUT_LIMIT_BYTES
    assert server.host_input.endswith(b"b") and server.transport.remote.num == 2
    del server.host_input[:]
    sender.type(3, b"c")
    assert server.host_input == b"c"


def test_one_large_paste_after_another_is_taken() -> None:
    server = _server()
    sender = Sender(server)
    for num in range(1, 5):
        sender.type(num, b"a" * 3_000_000)
        assert len(server.host_input) == 3_000_000
        del server.host_input[:]


def test_answers_to_a_program_that_asks_and_does_not_read_are_bounded() -> None:
    server = _server()
    for _ in range(100):
        server.receive_host_output(b"\x1b[6n" * 1_000, now=0)
    assert len(server.host_input) <= mosh.REPLY_LIMIT_BYTES + 6_000


def test_a_client_takes_no_more_keys_than_it_can_keep_until_they_have_arrived() -> None:
    sim = Simulation(1, program=Cat())
    sim.run(ms=1_000)
    read = b"x" * 16_384
    sim.server.reads_input = False
    count = 0
    while sim.client.core.takes_keys and count < 1_000:
        sim.client.type(read)
        count += 1
    assert count == mosh.TYPED_LIMIT_EVENTS // len(read)
    sim.run(ms=3_500)
    assert sim.client.core.takes_keys
    sim.server.reads_input = True
    sim.client.type("y")
    sim.run(ms=500)
    assert sim.server.program.received == sim.client.typed


def test_a_program_that_reads_late_reads_everything_once(sim: Simulation) -> None:
    sim.server.reads_input = False
    sim.client.type("typed while the program is busy ", every_ms=40)
    sim.run(ms=5_000)
    sim.client.type("x" * 5_000)
    sim.run(ms=5_000)
    assert sim.server.program.received == b""
    sim.server.reads_input = True
    sim.run_until(lambda: sim.settled, limit_ms=4_000)


# -- addresses and the end


def test_a_server_without_a_client_sleeps() -> None:
    server = _server()
    server.receive_host_output(b"early output", now=10)
    assert server.next_timeout() is None and server.datagrams_to_send(now=1_000_000) == []
    assert server.peer is None and server.client_heard_at == 0


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(24), bytes(2_048), bytes(3_000)])
def test_garbage_changes_nothing(sim: Simulation, garbage: bytes) -> None:
    for end in (sim.server, sim.client):
        before = end.core.next_timeout()
        with pytest.raises(mosh.PacketError):
            end.core.receive_datagram(garbage, NEW_ADDRESS, sim.now)
        assert end.core.next_timeout() == before
    assert sim.server.peer == HOME_ADDRESS


def test_the_last_screen_travels_with_the_goodbye(sim: Simulation) -> None:
    sim.server.write(b"last words")
    sim.server.quit()
    sim.run(ms=500)
    assert sim.ended and sim.client.screen.lines[0] == "$ last words"


def test_an_end_that_has_ended_stays_silent(sim: Simulation) -> None:
    sim.client.quit()
    sim.run(ms=500)
    assert sim.ended
    assert sim.server.core.datagrams_to_send(sim.now + 5_000) == []
    assert sim.client.core.datagrams_to_send(sim.now + 5_000) == []


def test_asking_for_the_next_deadline_changes_nothing(sim: Simulation) -> None:
    sim.client.type("x")
    sim.server.write(b"y")
    for end in (sim.server, sim.client):
        assert end.core.next_timeout() == end.core.next_timeout()


# -- roaming

OTHER_ADDRESS, UNKNOWN_ADDRESS = ("192.0.2.2", 60001), ("192.0.2.3", 60001)
DEAD_ADDRESSES = [(f"192.0.2.{100 + i}", 60001) for i in range(20)]


class Roamer(Simulation):
    """A session whose client knows several addresses; remembers what went where."""

    def __init__(self, *peers: tuple[str, int], **options: Any) -> None:
        self.copies: list[tuple[int, tuple[str, int]]] = []  # (when, to which other address)
        self.client_sent: list[tuple[int, tuple[str, int]]] = []
        self.lookups: list[int] = []  # when the name was to be looked up
        super().__init__(1, candidates=[SERVER_ADDRESS, *peers], **options)
        self.run(ms=5_000)

    def send(self, end: End, datagram: bytes, source: tuple[str, int], targets: list[Any]) -> None:
        """Put a datagram on the wire, and note whose it is."""
        if end.direction == TO_SERVER:
            self.client_sent += [(self.now, target) for target in targets[:1]]
            self.copies += [(self.now, target) for target in targets[1:]]
        super().send(end, datagram, source, targets)

    def _take_turns(self) -> None:
        if self.roaming.wants_lookup(self.now):
            self.lookups.append(self.now)
        super()._take_turns()

    @property
    def roaming(self) -> mosh.Roaming:
        """The client's."""
        return self.client.core.roaming

    def copies_since(self, at: int) -> list[tuple[int, tuple[str, int]]]:
        """The copies that went to other addresses from a time on."""
        return [copy for copy in self.copies if copy[0] >= at]

    def say(self, source: tuple[str, int]) -> None:
        """The server says its next word from another of its addresses."""
        at_server = self.server.address
        self.server.address = source
        self.server.write(b".")
        self.run(ms=100)
        self.server.address = at_server


def test_a_client_sends_to_every_candidate_until_one_answers() -> None:
    sim = Roamer(OTHER_ADDRESS)
    assert sim.copies == [(0, OTHER_ADDRESS)]
    assert sim.roaming.current == SERVER_ADDRESS and not sim.roaming.searching
    sim = Roamer()
    sim.server.address = OTHER_ADDRESS
    assert sim.roaming.candidates == [SERVER_ADDRESS]


@pytest.mark.parametrize("delay_ms", [0, 100, 1_500])
def test_a_healthy_path_has_no_more_traffic_than_with_one_address(delay_ms: int) -> None:
    sims = [Roamer(OTHER_ADDRESS, *DEAD_ADDRESSES), Roamer()]
    for sim in sims:
        sim.link.delay_ms = delay_ms
        sim.client.type("until that is known", every_ms=3_000)
        sim.run(ms=120_000)
        began_at = sim.now
        sim.client.type("typed on and on, with pauses\r", every_ms=700)
        sim.run(ms=60_000)
        assert sim.copies_since(began_at) == [] and sim.settled
    assert len(sims[0].client_sent) == len(sims[1].client_sent)


def test_a_key_reaches_a_server_that_has_moved_to_another_candidate() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.server.address = OTHER_ADDRESS
    sim.client.type("moved\r")
    took_ms = sim.run_until(lambda: sim.settled, limit_ms=5_000)
    assert took_ms <= mosh.ANSWER_MS + 6 * sim.link.delay_ms + 100
    assert sim.roaming.current == OTHER_ADDRESS and not sim.roaming.searching
    began_at = sim.now
    sim.client.type("and stays there\r", every_ms=100)
    sim.run(ms=20_000)
    assert sim.settled and sim.copies_since(began_at) == []


def test_an_idle_client_misses_its_server_and_finds_it_elsewhere() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.server.address = OTHER_ADDRESS
    sim.link.blocked.add(TO_CLIENT)  # what the server says from there does not get through by itself
    sim.run(ms=mosh.SILENT_MS)
    sim.link.heal()
    sim.run_until(lambda: sim.roaming.current == OTHER_ADDRESS, limit_ms=3_500)


def test_copies_to_addresses_that_do_not_answer_are_few() -> None:
    sim = Roamer(*DEAD_ADDRESSES)
    assert len(sim.roaming.candidates) == mosh.MAX_CANDIDATES
    began_at = sim.now
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    sim.client.type("x" * 100_000)
    sim.client.type("typed into the void " * 20, every_ms=90)
    sim.run(ms=60_000)
    times = sorted({at for at, _ in sim.copies_since(began_at)})
    assert len(times) <= len(mosh.TRIES_MS) + 60_000 // mosh.COPY_MS
    assert {target for _, target in sim.copies_since(began_at)} == set(DEAD_ADDRESSES[: mosh.MAX_CANDIDATES - 1])


def test_another_network_is_told_at_once_from_a_new_port() -> None:
    sim = Roamer(OTHER_ADDRESS)
    began_at = sim.now
    sim.client.move_to(NEW_ADDRESS)
    sim.roaming.network_changed(sim.now)
    sim.run(ms=0)
    assert sim.client.addresses == [NEW_ADDRESS, (NEW_ADDRESS[0], NEW_ADDRESS[1] + 1)]
    assert sim.client_sent[-1] == (began_at, SERVER_ADDRESS) and sim.copies_since(began_at) == [
        (began_at, OTHER_ADDRESS)
    ]
    took_ms = sim.run_until(lambda: sim.client.core.bar.last_heard_at >= began_at, limit_ms=100)
    assert took_ms == 2 * sim.link.delay_ms  # the server greets a client that has moved
    sim.run(ms=10_000)
    assert not sim.roaming.searching


@pytest.mark.parametrize("dark_ms", [500, 5_000, 15_000, 60_000, 3_600_000])
def test_one_round_trip_after_the_first_datagram_on_another_network_everything_is_there(dark_ms: int) -> None:
    sim = Roamer()
    sim.blackout(ms=dark_ms)
    sim.client.type("typed in the dark\r", every_ms=10)
    sim.run(ms=dark_ms // 2)
    sim.server.write(b"said in the dark ")
    sim.run(ms=dark_ms - dark_ms // 2)
    sim.client.move_to(NEW_ADDRESS)
    sim.roaming.network_changed(sim.now)
    took_ms = sim.run_until(lambda: "said in the dark" in sim.client.screen.text, limit_ms=500)
    assert took_ms <= 2 * sim.link.delay_ms
    took_ms += sim.run_until(lambda: sim.settled, limit_ms=500)
    assert took_ms <= 2 * sim.link.delay_ms + sim.server.program.echo_ms + mosh.COLLECT_MS["server"] + 1


def test_the_first_datagrams_on_another_network_may_be_lost() -> None:
    sim = Roamer()
    sim.blackout(ms=400)
    sim.client.move_to(NEW_ADDRESS)
    sim.roaming.network_changed(sim.now)
    heard_at = sim.client.core.bar.last_heard_at
    limit_ms = mosh.TRIES_MS[1] + 2 * sim.link.delay_ms
    sim.run_until(lambda: sim.client.core.bar.last_heard_at > heard_at + 100, limit_ms)


def test_forged_and_replayed_answers_from_a_candidate_do_not_end_a_search() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    sim.roaming.network_changed(sim.now)
    sim.run(ms=100)
    for old in sim.datagrams(TO_CLIENT):
        for datagram in (old, old[:-1] + bytes((old[-1] ^ 1,)), bytes(40)):
            sim.inject(sim.client, datagram, OTHER_ADDRESS)
    for own in sim.datagrams(TO_SERVER):
        sim.inject(sim.client, own, OTHER_ADDRESS)
    sim.run(ms=100)
    assert sim.roaming.current == SERVER_ADDRESS and sim.roaming.searching


def test_a_word_of_the_server_from_an_unknown_address_moves_nothing_while_the_path_works() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.say(UNKNOWN_ADDRESS)
    sim.client.type("x")
    sim.run(ms=20_000)
    assert sim.roaming.current == SERVER_ADDRESS and UNKNOWN_ADDRESS not in sim.roaming.candidates


def test_a_server_that_nobody_has_announced_elsewhere_is_found_by_its_own_words() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.server.address = UNKNOWN_ADDRESS
    sim.client.type("where are you\r")
    sim.run_until(lambda: sim.settled, limit_ms=12_000)
    assert sim.roaming.current == UNKNOWN_ADDRESS


CANDIDATES = [SERVER_ADDRESS, OTHER_ADDRESS, *DEAD_ADDRESSES[:4]]


@pytest.mark.parametrize("reachable", [0, 1, 5])
def test_a_host_that_answers_from_another_of_its_addresses_is_found_where_it_can_be_reached(reachable: int) -> None:
    """As stock's server does on a host with several addresses; the client must not send to all of them for ever."""
    client, server = _roaming_client(CANDIDATES), _server()
    address, searching_at = CANDIDATES[reachable], 0
    for now in range(0, 40_000, 10):
        if now % 500 == 0:
            client.receive_keys(b"x", now)
        for datagram in client.datagrams_to_send(now):
            if address in client.peers:
                server.receive_datagram(datagram, HOME_ADDRESS, now)
        for datagram in server.datagrams_to_send(now):
            client.receive_datagram(datagram, UNKNOWN_ADDRESS, now)
        searching_at = now if client.roaming.searching else searching_at
    assert client.roaming.current == address and searching_at < 20_000


def _roaming_client(peers: list[tuple[str, int]]) -> mosh.ClientCore:
    return mosh.ClientCore(
        mosh.Channel(CIPHER, TO_SERVER), 0, width=80, height=24, candidates=peers, port=60001, random_bytes=bytes,
    )


def _lookups(sim: Roamer, ms: int) -> list[int]:
    """Let time pass and return when, from its start, the name was to be looked up."""
    began_at = sim.now
    sim.run(ms=ms)
    return [at - began_at for at in sim.lookups if at >= began_at]


def test_the_name_is_looked_up_while_answers_are_missing_more_and_more_seldom() -> None:
    sim = Roamer(named=True)
    assert _lookups(sim, 20_000) == []
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    sim.roaming.network_changed(sim.now)
    times = _lookups(sim, 400_000)
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert times[0] == mosh.LOOKUP_MS[0] and gaps[:3] == [2_000, 4_000, 8_000] and set(gaps[6:]) == {mosh.LOOKUP_MS[1]}
    sim.link.heal()
    sim.run(ms=8_000)
    assert _lookups(sim, 20_000) == []


def test_without_a_name_nothing_is_looked_up() -> None:
    sim = Roamer()
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    sim.roaming.network_changed(sim.now)
    assert _lookups(sim, 60_000) == []


def test_what_a_lookup_finds_is_tried_at_once_and_bounded() -> None:
    sim = Roamer(named=True)
    sim.server.address = OTHER_ADDRESS
    sim.client.type("moved\r")
    sim.run(ms=3_000)
    assert not sim.settled
    sim.roaming.found([*DEAD_ADDRESSES[:2], OTHER_ADDRESS, *DEAD_ADDRESSES], sim.now)
    sim.run_until(lambda: sim.settled, limit_ms=100)
    assert sim.roaming.current == OTHER_ADDRESS
    assert len(sim.roaming.candidates) <= mosh.MAX_CANDIDATES and SERVER_ADDRESS in sim.roaming.candidates


def test_where_the_system_knows_no_path_it_is_asked_again_soon_but_not_for_ever() -> None:
    sim = Roamer()
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    began_at, asked = sim.now, []
    while sim.now < began_at + 2 * mosh.RETRY_LIMIT_MS:
        count = len(sim.client_sent)
        sim.run(ms=10)
        if len(sim.client_sent) > count:
            sim.roaming.path_failed(sim.now, reached=False)
            asked.append(sim.now - began_at)
    early = [at for at in asked if at < mosh.RETRY_LIMIT_MS]
    assert mosh.RETRY_LIMIT_MS // 600 <= len(early) <= mosh.RETRY_LIMIT_MS // mosh.RETRY_MS + 60
    assert len(asked) - len(early) <= mosh.RETRY_LIMIT_MS // mosh.ACK_INTERVAL_MS + 10


def test_a_port_that_a_firewall_has_forgotten_is_left_within_seconds() -> None:
    sim = Roamer()
    port = sim.client.address
    sim.link.filtered.add(port)
    sim.client.type("x")
    sim.run_until(lambda: sim.settled, limit_ms=mosh.ANSWER_MS + mosh.TRIES_MS[-1] + 6 * sim.link.delay_ms + 100)
    assert sim.server.peer == sim.client.address != port
    assert len(sim.client.addresses) == 2


def test_a_long_silence_opens_no_more_ports_than_one_each_10_s() -> None:
    sim = Roamer()
    before = sim.client.address[1]
    sim.link.blocked.update((TO_SERVER, TO_CLIENT))
    sim.client.type("x")
    sim.run(ms=60_000)
    assert 5 <= sim.client.address[1] - before <= 7


@pytest.mark.parametrize("outage_ms", [2_000, 5_555, 9_000])
def test_a_key_typed_in_a_tunnel_is_there_soon_after_its_end(outage_ms: int) -> None:
    sim = Roamer()
    began_at = sim.now
    sim.blackout(ms=outage_ms)
    sim.client.type("x")
    sim.run(ms=outage_ms)
    assert sum(at >= began_at for at, _ in sim.client_sent) < 15 + outage_ms // mosh.QUICK_RESEND_MS
    sim.run_until(lambda: sim.settled, limit_ms=mosh.QUICK_RESEND_MS + 4 * sim.link.delay_ms + 20)


@pytest.mark.parametrize("direction", [TO_SERVER, TO_CLIENT], ids=["client", "server"])
def test_what_the_system_refuses_to_send_is_there_soon_after_it_no_longer_does(direction: int) -> None:
    sim = Roamer()
    sim.link.refused.add(direction)
    sim.run(ms=9_000)
    sim.client.type("typed meanwhile")
    sim.run(ms=6_333)
    sim.link.heal()
    sim.run_until(lambda: sim.settled, limit_ms=mosh.RETRY_MS + 4 * sim.link.delay_ms + 20)


def test_a_system_that_refuses_for_ever_is_not_asked_for_ever() -> None:
    sim = Roamer()
    sim.link.refused.add(TO_CLIENT)
    counts = []
    for _ in range(2):
        count = len(sim.sent(TO_CLIENT))
        sim.run(ms=mosh.RETRY_LIMIT_MS + mosh.ACK_INTERVAL_MS)
        counts.append(len(sim.sent(TO_CLIENT)) - count)
    assert counts[0] > mosh.RETRY_LIMIT_MS // mosh.RETRY_MS - 20 and counts[1] < 50


def test_a_path_that_fails_makes_the_others_be_tried_at_once() -> None:
    sim = Roamer(OTHER_ADDRESS)
    sim.server.address = OTHER_ADDRESS
    sim.client.type("x")
    sim.run(ms=1)
    sim.roaming.path_failed(sim.now, reached=False)
    sim.run_until(lambda: sim.roaming.current == OTHER_ADDRESS, limit_ms=2 * sim.link.delay_ms + 20)


def test_an_old_datagram_from_elsewhere_makes_the_server_neither_move_nor_speak(sim: Simulation) -> None:
    sim.client.type("hello\r", every_ms=50)
    sim.run(ms=3_000)
    count = len(sim.sent(TO_CLIENT))
    for old in sim.datagrams(TO_SERVER):
        sim.inject(sim.server, old, NEW_ADDRESS)
    sim.run(ms=100)
    assert sim.server.peer == HOME_ADDRESS and len(sim.sent(TO_CLIENT)) <= count + 1


# -- what is too large for one instruction ---------------------------------------------------------------------


def test_a_screen_too_large_for_one_instruction_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh, "DIFF_LIMIT_BYTES", 6_000)
    sim = Simulation(1)
    sim.run(ms=1_000)
    sim.client.resize(150, 50)
    sim.run_until(lambda: sim.settled, limit_ms=5_000)
    cells = ("\x1b[38;2;{};{};{}m#".format(*random.Random(n).choices(range(256), k=3)) for n in range(50 * 149))
    before = sim.server.core.transport.last_sent_num
    sim.server.write(b"\x1b[H" + "".join(cells).encode())
    sim.run_until(lambda: sim.settled, limit_ms=60_000)
    diffs = [sent.instruction.diff for sent in sim.sent(mosh.TO_CLIENT) if sent.instruction.new_num > before]
    assert max(map(len, diffs)) <= 6_000 and sum(map(len, diffs)) > 50 * 149 * 10
    assert sim.client.screen == sim.server.screen


def test_keys_too_many_for_one_instruction_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh, "DIFF_LIMIT_BYTES", 500)
    sim = Simulation(1)
    sim.run(ms=1_000)
    text = "".join(random.Random(1).choices("abcdefgh", k=3_000))
    sim.blackout(ms=2_000)
    sim.client.type(text + "\r")
    sim.run_until(lambda: sim.settled, limit_ms=60_000)
    assert bytes(sim.server.program.received) == text.encode() + b"\r"
    assert max(len(sent.instruction.diff) for sent in sim.sent(mosh.TO_SERVER)) <= 500


# -- seams between the rules -----------------------------------------------------------------------------------


def test_commands_now_and_then_on_a_good_path_are_no_black_hole(sim: Simulation) -> None:
    for delay_ms in (5, 50):
        sim.link.delay_ms = delay_ms
        for _ in range(6):
            sim.client.type("noise 1300\r")
            sim.run(ms=10_000)
            assert sim.server.core.transport.datagrams.mtu.bytes > mosh.FALLBACK_MTU_BYTES


def test_a_goodbye_during_a_large_frame_is_acknowledged() -> None:
    sim = Simulation(1, width=80, height=24)
    sim.link.delay_ms = 100
    sim.run(ms=3_000)
    colors = ("\x1b[38;2;{};{};{};48;2;{};{};{}m#".format(*random.Random(n).randbytes(6)) for n in range(1_900))
    sim.server.write(b"\x1b[H" + "".join(colors).encode())
    sim.run_until(lambda: bool(sim.server.core.transport._train), limit_ms=1_000)
    sim.link.delay_ms = 10      # it arrives while fragments wait for their time
    sim.client.quit()
    took_ms = sim.run_until(lambda: sim.ended, limit_ms=5_000)
    assert sim.client.core.transport.clean and sim.server.core.transport.clean
    assert took_ms < 1_000


@pytest.mark.parametrize("hurried_bytes", [0, mosh.HURRIED_BYTES])
def test_a_screen_that_ends_a_session_just_after_a_move_arrives(
    sim: Simulation, monkeypatch: pytest.MonkeyPatch, hurried_bytes: int
) -> None:
    monkeypatch.setattr(mosh, "HURRIED_BYTES", hurried_bytes)
    sim.run(ms=1_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.client.type("x")
    sim.run_until(lambda: sim.server.peer == NEW_ADDRESS, limit_ms=1_000)
    sim.server.write(b"\x1b[H" + random.Random(1).randbytes(700).hex().encode() + b" the end")
    sim.server.quit()
    sim.run_until(lambda: sim.ended, limit_ms=10_000)
    assert "the end" in sim.client.screen.text and sim.client.core.transport.clean


def test_datagrams_held_up_and_delivered_from_elsewhere_prove_nothing(sim: Simulation) -> None:
    sim.run(ms=1_000)
    victim = ("203.0.113.66", 6_666)
    sim.link.loss = 1.0
    for keys in "abc":
        sim.client.type(keys)
        sim.run(ms=300)
    held = sim.datagrams(TO_SERVER)[-3:]
    for datagram in held:
        sim.inject(sim.server, datagram, victim)
    assert sim.server.peer == victim
    sent = len(sim.datagrams(TO_CLIENT))
    for n in range(100):
        sim.server.write(random.Random(n).randbytes(500).hex().encode())
        sim.run(ms=100)
    assert sum(map(len, sim.datagrams(TO_CLIENT)[sent:])) <= mosh.AMPLIFICATION_LIMIT * sum(map(len, held))


def test_one_outage_does_not_make_a_path_lossy(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.blackout(ms=10_000)
    sim.client.type("typed in the dark\r", every_ms=400)
    sim.run(ms=12_000)
    for end in (sim.client, sim.server):
        assert 0 < end.core.transport.datagrams.arrivals.lost_count < mosh.LOSSY_COUNT


def test_the_first_datagram_on_another_network_is_no_probe() -> None:
    sim = Roamer()
    sim.run(ms=1_000)
    sim.client.core.transport.datagrams.mtu.shrink()
    sim.run(ms=9_000)
    sim.blackout(ms=60_000)
    sim.run(ms=60_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.roaming.network_changed(sim.now)
    sent = len(sim.datagrams(TO_SERVER))
    sim.run(ms=1)
    assert len(sim.datagrams(TO_SERVER)[sent]) <= mosh.FALLBACK_MTU_BYTES


def test_output_that_changed_nothing_does_not_delay_an_echo(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.server.write(b"\x1b[m" * 30)
    sim.run(ms=100)
    sim.server.write(b"e")
    took_ms = sim.run_until(lambda: "e" in sim.client.screen.text, limit_ms=100)
    assert took_ms <= sim.link.delay_ms + mosh.QUIET_MS + 1


@pytest.mark.parametrize("phase_ms", range(0, 60, 7))
def test_ctrl_c_shows_the_prompt_within_a_round_trip_wherever_in_the_flood_it_falls(phase_ms: int) -> None:
    sim = Simulation(1)
    sim.link.delay_ms, sim.link.rate_bytes_per_s = 50, 125_000
    sim.run(ms=3_000)
    noise = random.Random(phase_ms)

    def flood() -> None:
        if b"\x03" in sim.server.program.received:
            sim.at(sim.now + 3, lambda: sim.server.write(b"^C\r\n=#= "))
            return
        sim.server.write(bytes(noise.choices(range(0x21, 0x7F), k=2_000)))
        sim.at(sim.now + 1, flood)

    flood()
    sim.run(ms=1_000 + phase_ms)
    sim.client.type("\x03")
    took_ms = sim.run_until(lambda: "=#=" in sim.client.screen.text, limit_ms=1_000)
    assert took_ms < 2 * sim.link.delay_ms + 20 + mosh.COLLECT_MS["server"]  # 20: a frame takes so long on that link


def test_predictions_of_a_fast_link_that_fails_show_after_250_ms_and_are_underlined_after_5_s(sim: Simulation) -> None:
    sim.client.type("a")
    sim.run(ms=1_000)
    sim.blackout(ms=60_000)
    sim.client.type("b")
    assert sim.run_until(lambda: "ab" in sim.client.seen.text, limit_ms=1_000) == mosh.GLITCH_MS
    row = sim.client.core.shown.cursor_row
    col = sim.client.core.shown.cursor_col - 1

    def underlined() -> bool:
        return bool(sim.client.core.shown.cell(row, col).rendition.attributes & mosh.UNDERLINED)

    assert not underlined()
    assert sim.run_until(underlined, limit_ms=10_000) == mosh.STRONG_GLITCH_MS - mosh.GLITCH_MS + 1


def test_predictions_that_wait_wake_nobody_but_to_show_them() -> None:
    client = _client()
    engine = client.engine
    client.receive_keys(b"a", now=1_000)
    client.frame_to_draw(now=1_000)
    assert engine.is_waiting and engine.next_timeout(1_000) == 1_000 + mosh.GLITCH_MS
    client.receive_keys(b"b", now=1_100)
    client.frame_to_draw(now=1_100)
    glitches = [at + ms for ms in (mosh.GLITCH_MS, mosh.STRONG_GLITCH_MS) for at in (1_000, 1_100)]
    assert [engine.next_timeout(at) for at in (1_100, *glitches)] == [*glitches, None]
    engine.glitch, engine.underlines = 1, True
    assert engine.next_timeout(1_100) is None
