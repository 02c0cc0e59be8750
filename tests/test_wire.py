"""Section 3: varints, protobuf fields, and zlib with a limit."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh

MAX = 2**64 - 1


def test_fields_come_back_as_they_were_written() -> None:
    message = mosh.encode_field(1, 300) + mosh.encode_field(2, b"keys")
    assert list(mosh.decode_fields(message)) == [(1, 300), (2, b"keys")]


# -- varints

VARINTS = [
    *((0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02")),
    *((2**32, "8080808010"), (MAX, "ff" * 9 + "01")),
]


@pytest.mark.parametrize(("value", "encoded"), VARINTS)
def test_varint(value: int, encoded: str) -> None:
    assert mosh.encode_varint(value).hex() == encoded
    assert mosh.decode_varint(bytes.fromhex(encoded), 0) == (value, len(encoded) // 2)


@given(st.integers(0, MAX), st.binary(max_size=4), st.binary(max_size=4))
def test_varint_law(value: int, before: bytes, after: bytes) -> None:
    encoded = mosh.encode_varint(value)
    assert len(encoded) <= 10
    assert mosh.decode_varint(before + encoded + after, len(before)) == (value, len(before) + len(encoded))


@pytest.mark.parametrize("data", ["", "80", "ff" * 9, "ff" * 10, "80" * 10 + "01"])
def test_a_varint_without_an_end_is_refused(data: str) -> None:
    with pytest.raises(mosh.PacketError):
        mosh.decode_varint(bytes.fromhex(data), 0)


def test_a_varint_may_be_longer_than_it_need_be() -> None:
    assert mosh.decode_varint(bytes.fromhex("818000"), 0) == (1, 3)


# -- fields

NUMBERS = st.integers(1, 2**29 - 1)
FIELDS = st.lists(st.tuples(NUMBERS, st.integers(0, MAX) | st.binary(max_size=300)))


@given(FIELDS)
def test_fields_law(fields: list[tuple[int, int | bytes]]) -> None:
    message = b"".join(mosh.encode_field(number, value) for number, value in fields)
    assert list(mosh.decode_fields(message)) == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_a_packet_error(data: bytes) -> None:
    try:
        for number, value in mosh.decode_fields(data):
            assert number >= 0 and isinstance(value, (int, bytes))
    except mosh.PacketError:
        pass


@given(FIELDS, st.data())
def test_a_cut_message_never_gains_a_field(fields: list[tuple[int, int | bytes]], data: st.DataObject) -> None:
    message = b"".join(mosh.encode_field(number, value) for number, value in fields)
    cut = message[: data.draw(st.integers(0, len(message)))]
    read = []
    try:
        for field in mosh.decode_fields(cut):
            read.append(field)
    except mosh.PacketError:
        pass
    assert read == fields[: len(read)]


def test_fixed_size_fields_are_passed_over_whole() -> None:
    fixed64, fixed32 = b"\x09" + bytes(range(8)), b"\x15" + bytes(range(4))
    fields = list(mosh.decode_fields(fixed64 + fixed32 + mosh.encode_field(3, 7)))
    assert fields == [(3, 7)]


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("0a", id="no length"),
        pytest.param("0a0261", id="fewer bytes than announced"),
        pytest.param("0a" + "ff" * 9 + "01", id="longer than anything"),
        pytest.param("0900", id="half a fixed64"),
        pytest.param("0d000000", id="half a fixed32"),
        pytest.param("08", id="no value"),
        pytest.param("0b", id="start of a group"),
        pytest.param("0c", id="end of a group"),
        pytest.param("0e", id="wire type 6"),
        pytest.param("0f", id="wire type 7"),
        pytest.param("0200", id="field number 0"),
    ],
)
def test_a_malformed_message_is_refused(message: str) -> None:
    with pytest.raises(mosh.PacketError):
        list(mosh.decode_fields(bytes.fromhex(message)))


# -- zlib


@given(st.binary(max_size=5_000))
def test_inflate_undoes_deflate(data: bytes) -> None:
    assert mosh.inflate(mosh.deflate(data)) == data


def test_the_stream_is_what_stock_writes() -> None:
    assert mosh.deflate(b"anything")[:2].hex() == "789c"


@pytest.mark.parametrize("level", range(10))
def test_any_zlib_stream_will_do(level: int) -> None:
    assert mosh.inflate(zlib.compress(b"hello " * 100, level)) == b"hello " * 100


@given(st.binary(max_size=200))
def test_any_bytes_inflate_or_are_a_packet_error(data: bytes) -> None:
    try:
        mosh.inflate(data)
    except mosh.PacketError:
        pass


@given(st.binary(max_size=300), st.data())
def test_a_cut_stream_is_refused(contents: bytes, data: st.DataObject) -> None:
    stream = mosh.deflate(contents)
    with pytest.raises(mosh.PacketError):
        mosh.inflate(stream[: data.draw(st.integers(0, len(stream) - 1))])


def test_the_limit_is_what_it_inflates_to() -> None:
    limit = mosh.INSTRUCTION_LIMIT_BYTES
    assert len(mosh.inflate(zlib.compress(bytes(limit)))) == limit
    with pytest.raises(mosh.PacketError):
        mosh.inflate(zlib.compress(bytes(limit + 1)))


def test_a_bomb_is_not_unpacked() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    with pytest.raises(mosh.PacketError):
        mosh.inflate(bomb)
