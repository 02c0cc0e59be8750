"""Random input at every door: it gives a value or the error that the door documents, and nothing else.

fuzz.py does it guided by coverage and for longer; what it once found worth keeping is replayed here.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mosh
from fuzz import DECODERS, saved_corpus
from terminal_streams import terminal_bytes

pytestmark = pytest.mark.fuzz

fuzz = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KEY = mosh.Key(bytes(range(16)))
CIPHER = mosh.choose_cipher()
SOURCE = ("192.0.2.1", 60001)


def _channel(direction: int) -> mosh.Channel:
    return mosh.Channel(CIPHER(KEY.raw), direction)


# -- input that is nearly right --------------------------------------------------------------------------------

NUMBER = st.integers(0, 2**64 - 1) | st.integers(0, 300)
LEAF = NUMBER | st.binary(max_size=20) | terminal_bytes(max_pieces=4)
FIELD_NUMBER = st.integers(1, 9) | st.sampled_from([mosh.HELLO, 2**29 - 1])


def _message(fields: list[tuple[int, int | bytes]]) -> bytes:
    return b"".join(mosh.encode_field(number, value) for number, value in fields)


def _messages(leaf: st.SearchStrategy[int | bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.tuples(FIELD_NUMBER, leaf), max_size=6).map(_message)


NESTED = _messages(LEAF | _messages(LEAF | _messages(LEAF)))
ENTRY = _messages(_messages(LEAF)).map(lambda body: mosh.encode_field(1, body))
INSTRUCTIONS = st.lists(ENTRY, max_size=6).map(b"".join)
SMALL_SIZE = st.builds(lambda w, h: mosh.Resize(w, h).encode(), st.integers(0, 200), st.integers(0, 100))
RESIZE = SMALL_SIZE.map(lambda size: mosh.encode_field(1, mosh.encode_field(3, size)))
RESIZES = st.lists(RESIZE, max_size=3).map(b"".join)
PROTOBUF = st.binary(max_size=200) | NESTED | INSTRUCTIONS | st.tuples(RESIZES, INSTRUCTIONS).map(b"".join)


@st.composite
def _damaged(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """Valid input with a few bytes changed, lost or cut off."""
    data = bytearray(draw(source))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


# -- the network -----------------------------------------------------------------------------------------------


SEALED = st.binary(max_size=60).map(lambda text: _channel(mosh.TO_CLIENT).seal(text))


@fuzz
@given(st.binary(max_size=3_000) | _damaged(SEALED))
def test_any_datagram(data: bytes) -> None:
    with contextlib.suppress(mosh.PacketError):
        seq, plaintext = _channel(mosh.TO_SERVER).open(data)
        assert seq >= 0 and len(plaintext) == len(data) - mosh.MIN_SEALED_BYTES


@fuzz
@given(st.lists(st.binary(max_size=40) | st.builds(
    lambda num, final, text: mosh.Fragment(1, num, final, text).encode(),
    st.integers(0, 6), st.booleans(), st.binary(max_size=9),
), max_size=12))  # fmt: skip
def test_any_fragments(datagrams: list[bytes]) -> None:
    assembly = mosh.FragmentAssembly()
    for data in datagrams:
        with contextlib.suppress(mosh.PacketError):
            assert isinstance(assembly.add(mosh.Fragment.decode(data)), (mosh.Instruction, type(None)))


COMPRESSED = st.binary(max_size=300).map(zlib.compress)


@fuzz
@given(st.binary() | _damaged(COMPRESSED) | st.tuples(COMPRESSED, st.binary()).map(b"".join))
def test_any_zlib_stream(data: bytes) -> None:
    with contextlib.suppress(mosh.PacketError):
        assert len(mosh.inflate(data)) <= mosh.INSTRUCTION_LIMIT_BYTES


def test_a_zlib_bomb_is_not_inflated() -> None:
    with pytest.raises(mosh.PacketError):
        mosh.inflate(zlib.compress(bytes(mosh.INSTRUCTION_LIMIT_BYTES + 1), 9))


@fuzz
@given(_damaged(PROTOBUF))
def test_any_protobuf_message(data: bytes) -> None:
    with contextlib.suppress(mosh.PacketError):
        assert all(number >= 0 and isinstance(value, (int, bytes)) for number, value in mosh.decode_fields(data))


@fuzz
@given(_damaged(PROTOBUF))
def test_any_instruction(data: bytes) -> None:
    with contextlib.suppress(mosh.PacketError):
        instruction = mosh.Instruction.decode(data)
        assert isinstance(instruction.diff, bytes) and isinstance(instruction.new_num, int)


@fuzz
@given(_damaged(PROTOBUF))
def test_any_user_message(data: bytes) -> None:
    stream = mosh.UserStream()
    with contextlib.suppress(mosh.PacketError):
        new = stream.applied(data)
        assert new.length >= stream.length == 0
        assert len(new.events_since(0)) == new.length
        assert mosh.UserStream().applied(new.diff_from(stream)) == new


@fuzz
@given(_damaged(PROTOBUF))
def test_any_host_message(data: bytes) -> None:
    state = mosh.TerminalState(mosh.Emulator(20, 5))
    with contextlib.suppress(mosh.PacketError):
        new = state.applied(data)
        assert len(new.framebuffer.rows) == new.framebuffer.height >= 1
        assert new.emulator.take_replies() == b""
    assert state.framebuffer == mosh.Emulator(20, 5, state.framebuffer.codebook).framebuffer


# -- both cores, with a peer that has the key ------------------------------------------------------------------


def _client() -> mosh.ClientCore:
    return mosh.ClientCore(
        _channel(mosh.TO_SERVER), 0, width=20, height=5, candidates=[SOURCE], port=60001, random_bytes=bytes,
        mode=mosh.PredictionMode.ALWAYS,
    )


def _server() -> mosh.ServerCore:
    return mosh.ServerCore(_channel(mosh.TO_CLIENT), 0, width=20, height=5, random_bytes=bytes)


STATE_NUM = st.integers(0, 4) | st.sampled_from([2**64 - 1, 2**64 - 2, 2**63])
SSP = st.builds(mosh.Instruction, STATE_NUM, STATE_NUM, STATE_NUM, STATE_NUM, _damaged(PROTOBUF))
PAYLOAD = st.binary(max_size=60) | SSP


def _receive_all(
    core: mosh.ClientCore | mosh.ServerCore, direction: int, payloads: list[bytes | mosh.Instruction]
) -> None:
    """Let `core` hear payloads that its peer's key has sealed, and go through its doors after each."""
    peer, fragmenter = mosh.DatagramLayer(_channel(direction), 0, is_server=False), mosh.Fragmenter()
    for now, payload in enumerate(payloads, 1):
        pieces = [payload] if isinstance(payload, bytes) else [
            fragment.encode() for fragment in fragmenter.fragments(payload, 1_200)
        ]
        for piece in pieces:
            with contextlib.suppress(mosh.PacketError):
                core.receive_datagram(peer.seal(piece, now), SOURCE, now)
        sent = core.datagrams_to_send(now * 1_000)
        assert all(len(datagram) <= core.transport.datagrams.mtu.bytes for datagram in sent)


@fuzz
@given(st.lists(PAYLOAD, max_size=6))
def test_a_client_survives_any_server(payloads: list[bytes | mosh.Instruction]) -> None:
    client = _client()
    _receive_all(client, mosh.TO_CLIENT, payloads)
    if client.screen.width * client.screen.height < 1 << 16:
        client.frame_to_draw(10_000)
        client.last_frame(10_001)


@fuzz
@given(st.lists(PAYLOAD, max_size=6))
def test_a_server_survives_any_client(payloads: list[bytes | mosh.Instruction]) -> None:
    server = _server()
    _receive_all(server, mosh.TO_SERVER, payloads)
    assert server.size == (server.screen.width, server.screen.height)
    if server.screen.width * server.screen.height < 1 << 16:
        server.receive_host_output(b"hello\x1b[6n", 10_000)
        server.datagrams_to_send(20_000)


# -- the terminal ----------------------------------------------------------------------------------------------


@fuzz
@given(st.binary(max_size=600) | _damaged(terminal_bytes()))
def test_any_output_of_a_program(data: bytes) -> None:
    server = _server()
    before = server.screen.copy()
    server.receive_host_output(data, 0)
    screen = server.screen
    assert len(screen.rows) == 5 and all(len(row.text) == len(row.attrs) <= 20 for row in screen.rows)
    assert 0 <= screen.cursor_row < 5 and 0 <= screen.cursor_col < 20
    assert isinstance(mosh.Display().frame(before, screen), bytes)
    assert len(screen.lines()) == 5


# -- the user --------------------------------------------------------------------------------------------------

KEYS = st.binary(max_size=120) | st.lists(
    st.sampled_from([
        b"a", b"\r", b"\x7f", b"\b", b"\x1b[C", b"\x1bOD", b"\x1e", b"\x1e.", b"\x1e\x1a", b"\x1e^", b"\x0c",
        "漢".encode(), "e\u0301".encode(), b"\xc3", b"\x9b", b"\x1b[", b"\x1b]0;", b"x" * 200,
    ]), max_size=12,
).map(b"".join)  # fmt: skip
ESCAPE_KEYS = st.none() | st.binary(max_size=2) | st.integers(0, 255).map(lambda key: bytes((key,)))


@fuzz
@given(st.lists(KEYS | st.tuples(st.integers(-3, 70), st.integers(-3, 30)), max_size=6), ESCAPE_KEYS, st.booleans())
def test_any_keys_and_window_sizes(
    events: list[bytes | tuple[int, int]], setting: bytes | None, overwrite: bool
) -> None:
    client = mosh.ClientCore(
        _channel(mosh.TO_SERVER), 0, width=7, height=3, candidates=[SOURCE], port=60001, random_bytes=bytes,
        mode=mosh.PredictionMode.ALWAYS, overwrite=overwrite, escape_key=mosh.EscapeKey(setting),
    )
    for now, event in enumerate(events):
        if isinstance(event, bytes):
            client.receive_keys(event, now)
        else:
            client.resize(*event, now)
        assert isinstance(client.frame_to_draw(now), bytes)
        assert len(client.shown.rows) == client.shown.height
        client.datagrams_to_send(now)
        assert isinstance(client.next_timeout(), int)


@fuzz
@given(st.lists(KEYS, max_size=4), terminal_bytes(max_pieces=8), st.integers(1, 9), st.integers(1, 5))
def test_typing_over_any_screen_of_any_size(keys: list[bytes], output: bytes, width: int, height: int) -> None:
    """Predictions made on one screen are drawn over another, also over a smaller one."""
    terminal = mosh.Emulator(12, 6)
    engine = mosh.PredictionEngine(mosh.PredictionMode.EXPERIMENTAL, False, terminal.framebuffer.codebook)
    engine.observe(last_sent_num=1, echo_ack=0, send_interval_ms=250)
    for now, typed in enumerate(keys):
        for key in typed:
            engine.key(key, terminal.framebuffer.copy(), now)
        terminal.feed(output)
        terminal.resize(width, height)
        screen = terminal.framebuffer.copy()
        engine.cull(screen, now)
        engine.apply(screen)
        assert len(screen.rows) == height and 0 <= screen.cursor_row < height and 0 <= screen.cursor_col < width


# -- text ------------------------------------------------------------------------------------------------------


@fuzz
@given(st.binary() | st.builds(
    "{} {} {} {}".format, st.sampled_from(["MOSH", "mosh-0"]),
    st.sampled_from(["CONNECT", "ADDRESS", "SERVER", "NOSERVER", "NEED", "GOT", "OLD"]),
    st.integers(0, 99_999) | st.text(max_size=9), st.text(max_size=30),
).map(lambda line: line.encode("utf-8", "replace")))  # fmt: skip
def test_any_line_of_a_starting_server(line: bytes) -> None:
    announcement = mosh.Announcement("mosh-0")
    announcement.take("mosh-0 SERVER mosh-server")
    with contextlib.suppress(mosh.BootstrapError):
        assert announcement.take(line.decode("utf-8", "replace")) in (True, False)


PARSERS: list[tuple[Callable[[str], object], type[mosh.MoshError]]] = [
    (mosh.Key.from_text, mosh.UsageError),
    (mosh.parse_ports, mosh.UsageError),
    (lambda text: mosh._parse_wrapper([text, "host"]), mosh.UsageError),
    (lambda text: mosh._parse_wrapper(["host", *text.split(" ")]), mosh.UsageError),
    (lambda text: mosh._login_options(mosh._parse_wrapper([f"--ssh={text}", "host"])), mosh.UsageError),
    (lambda text: mosh._parse_server(text.split(" ")), mosh.UsageError),
]


@pytest.mark.parametrize(("parse", "error"), PARSERS)
@settings(fuzz, suppress_health_check=[*fuzz.suppress_health_check, HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30) | st.text("-p:=0123456789 ahsvlci@'\"\\", max_size=12))
def test_any_text_for_a_parser(parse: Callable[[str], object], error: type[mosh.MoshError], text: str) -> None:
    with contextlib.suppress(error, SystemExit):        # argparse leaves by itself after --help
        parse(text)


# -- what guided fuzzing has found worth keeping ---------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_the_saved_corpus(name: str) -> None:
    saved = saved_corpus()[name]
    assert saved
    for data in saved:
        DECODERS[name](data)


@pytest.mark.parametrize("name", DECODERS)
@fuzz
@given(data=st.binary(max_size=400))
def test_any_bytes_for_a_decoder_of_the_guided_fuzzer(name: str, data: bytes) -> None:
    DECODERS[name](data)
