"""Section 6: instructions, cutting them up, and putting them together again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mosh
from mosh import TO_CLIENT, TO_SERVER

MAX = 2**64 - 1
NUMBER = st.integers(0, MAX)
INSTRUCTIONS = st.builds(
    mosh.Instruction, NUMBER, NUMBER, NUMBER, NUMBER, st.binary(max_size=400), st.binary(max_size=16)
)


def _incompressible(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _cut(size: int, mtu_bytes: int = 500) -> list[mosh.Fragment]:
    return mosh.Fragmenter().fragments(mosh.Instruction(1, 2, 3, 4, _incompressible(size)), mtu_bytes)


def test_a_big_instruction_travels_in_pieces() -> None:
    instruction = mosh.Instruction(1, 2, 3, 1, _incompressible(3_000), b"chaff")
    fragments = mosh.Fragmenter().fragments(instruction, mtu_bytes=1_252)
    assembly = mosh.FragmentAssembly()
    assert [assembly.add(fragment) for fragment in fragments[:-1]] == [None, None]
    complete = assembly.add(fragments[-1])
    assert complete is not None and complete.encode() == instruction.encode()


# -- recorded instructions

# key, direction, datagram, plaintext before the zlib stream, instruction
RECORDED = {
    "constructed": (
        "000102030405060708090a0b0c0d0e0f",
        TO_SERVER,
        "00000000000000009f164d976357081cc1c8bceef905db5a02428c8571949d686f4420ca31f0060ca43d50ffb19e12e522a8cf6e73fd36"
        "a91f68ecf470d119b52ed349b9",
        "1234ffff00000000000000018000",
        "0802100018012000280032080a061a04285030183a00",
    ),
    "stock's first": (
        "000102030405060708090a0b0c0d0e0f",
        TO_SERVER,
        "00000000000000006f359a43da74275f106bc28e733c260502428c8571949d686f4420ca31f0060ca43d50ffb19ea47d96f7cea7b57961"
        "8c21fe2c76d52fab3c8a31287caeb275",
        "1c85ffff00000000000000018000",
        "0802100018012000280032080a061a04285030183a03389223",
    ),
    "hello": (
        "000102030405060708090a0b0c0d0e0f",
        TO_CLIENT,
        "800000000000000070cab736aec42cc50f361ee9b21f5b188cfd656b97bc281b2ff0a7034dc588ecb5d94bb130a659073d5e1d7300d772"
        "efaf72f5b8e7218bb7e47914f394fdc9bedae61254c6",
        "0102ffff00000000000000018000",
        "0802100018012001280032110a043a0240010a091207220568656c6c6f3a00",
    ),
    "shutdown": (
        "000102030405060708090a0b0c0d0e0f",
        TO_CLIENT,
        "8000000000000003cf5767a542a5cef1b64e7d88207a7ddf2734e1d95e5cd851dc3ec48e58b05ccfe5e057e233c07e84b46c56dd777605"
        "1dd531984b0a8f",
        "0304ffff00000000000000038000",
        "0802100218ffffffffffffffffff012002280232003a00",
    ),
    "live keystroke": (
        "113c68e83ddd4a3b39c1e228c9601488",
        TO_SERVER,
        "0000000000000002432ee3878cdddb49633a343fa430a13e5279e3d3fc66a5c55fcadf9f0cad1440b1a5b8fdc255b0dd53cfa6c300202d"
        "fa82221e9a67e1953fddc312d7b34f7a",
        "079fffff00000000000000038000",
        "08021001180320022801" + "32070a051203220161" + "3a04828a4292",
    ),
    "live echo": (
        "113c68e83ddd4a3b39c1e228c9601488",
        TO_CLIENT,
        "80000000000000023db961d0c0908e0db0793d0d433e7c6cceb58c7080e4b24256573733f4f33acb781a01059aa5fc67b63d3521389e5f"
        "a46006a25515e3220af5fdc0",
        "07a807a700000000000000038000",
        "08021002180320032802" + "32070a051203220161" + "3a00",
    ),
    "live echo ack": (
        "113c68e83ddd4a3b39c1e228c9601488",
        TO_CLIENT,
        "8000000000000003e70228bd2cc997c376286f8b8f8b07be1eb15b742b1a73d2a0e4afd856dd9d77f665f3ca0eaf9a5e21448f57b2ad66"
        "518eb688e1269f57e6ec3ff3f1513a21071d04b3e7",
        "",
        "080210021804200328" + "02320d0a043a0240030a0512032201613a03a589be",
    ),
}


@pytest.mark.parametrize(("key", "direction", "datagram", "head", "instruction"), RECORDED.values(), ids=RECORDED)
def test_recorded_datagram(key: str, direction: int, datagram: str, head: str, instruction: str) -> None:
    reader = mosh.Channel(mosh.CryptographyCipher(bytes.fromhex(key)), 1 - direction)
    _, plaintext = reader.open(bytes.fromhex(datagram))
    assert plaintext.hex().startswith(head)
    complete = mosh.FragmentAssembly().add(mosh.Fragment.decode(plaintext[mosh.TIMESTAMPS.size :]))
    assert complete is not None and complete.encode().hex() == instruction


def test_recorded_keystroke_field_by_field() -> None:
    instruction = mosh.Instruction.decode(bytes.fromhex(RECORDED["live keystroke"][4]))
    assert (instruction.protocol_version, instruction.old_num, instruction.new_num) == (2, 1, 3)
    assert (instruction.ack_num, instruction.throwaway_num) == (2, 1)
    assert instruction.diff == bytes.fromhex("0a051203220161")
    assert len(instruction.chaff) == 4


SPLIT = (
    "00000000000000020000789ce360126094605260d46034e2e1e212e25062",
    "000000000000000280015328cf2fca49b1625ab51b0027a304fd",
)


def test_recorded_instruction_in_two_pieces_the_last_one_first() -> None:
    first, last = (mosh.Fragment.decode(bytes.fromhex(piece)) for piece in SPLIT)
    assert (first.instruction_id, first.num, first.final) == (2, 0, False)
    assert (last.instruction_id, last.num, last.final) == (2, 1, True)
    assembly = mosh.FragmentAssembly()
    assert assembly.add(last) is None
    complete = assembly.add(first)
    assert complete is not None
    assert complete.encode().hex() == "08021001180220012801320c0a0a1208220620776f726c643a02aabb"


# -- instructions


def test_all_fields_are_written_even_when_empty() -> None:
    assert mosh.Instruction(0, 0, 0, 0, b"").encode().hex() == "0802100018002000280032003a00"


def test_the_last_state_number_takes_ten_bytes() -> None:
    encoded = mosh.Instruction(2, mosh.LAST_STATE_NUM, 2, 2, b"").encode()
    assert encoded.hex() == "0802100218ffffffffffffffffff012002280232003a00"


@given(INSTRUCTIONS)
def test_decode_undoes_encode(instruction: mosh.Instruction) -> None:
    decoded = mosh.Instruction.decode(instruction.encode())
    assert decoded.encode() == instruction.encode()


def test_what_is_missing_reads_as_nothing() -> None:
    empty = mosh.Instruction.decode(b"")
    assert empty.encode().hex() == "0800100018002000280032003a00"


@given(INSTRUCTIONS, st.lists(st.tuples(st.integers(8, 5_000), st.integers(0, MAX) | st.binary(max_size=20))))
def test_unknown_fields_are_skipped(instruction: mosh.Instruction, fields: list[tuple[int, int | bytes]]) -> None:
    unknown = b"".join(mosh.encode_field(number, value) for number, value in fields)
    decoded = mosh.Instruction.decode(unknown + instruction.encode() + unknown)
    assert decoded.encode() == instruction.encode()


def test_a_field_of_the_wrong_type_is_an_unknown_one() -> None:
    confused = mosh.encode_field(2, b"not a number") + mosh.encode_field(6, 1)
    decoded = mosh.Instruction.decode(confused + mosh.Instruction(5, 6, 7, 8, b"diff").encode() + confused)
    assert (decoded.old_num, decoded.diff) == (5, b"diff")


@given(st.binary(max_size=100))
def test_any_bytes_are_an_instruction_or_a_packet_error(data: bytes) -> None:
    try:
        mosh.Instruction.decode(data)
    except mosh.PacketError:
        pass


# -- cutting

SIZES = [(mosh.MTU_BYTES["IPv4"], 1_214), (mosh.MTU_BYTES["IPv6"], 1_178), (mosh.FALLBACK_MTU_BYTES, 462)]


@pytest.mark.parametrize(("mtu_bytes", "piece_bytes"), SIZES)
def test_all_pieces_but_the_last_are_full(mtu_bytes: int, piece_bytes: int) -> None:
    *full, last = _cut(5_000, mtu_bytes)
    assert {len(fragment.contents) for fragment in full} == {piece_bytes}
    assert 0 < len(last.contents) <= piece_bytes


@pytest.mark.parametrize("mtu_bytes", [mtu_bytes for mtu_bytes, _ in SIZES])
def test_a_full_piece_fills_the_datagram(mtu_bytes: int) -> None:
    layer = mosh.DatagramLayer(mosh.Channel(mosh.CryptographyCipher(bytes(16)), TO_SERVER), 0, is_server=False)
    assert len(layer.seal(_cut(5_000, mtu_bytes)[0].encode(), 0)) == mtu_bytes


@given(st.integers(0, 6_000), st.sampled_from(SIZES))
@settings(max_examples=40)
def test_pieces_are_numbered_and_the_last_one_is_final(size: int, sizes: tuple[int, int]) -> None:
    fragments = _cut(size, sizes[0])
    assert [fragment.num for fragment in fragments] == list(range(len(fragments)))
    assert [fragment.final for fragment in fragments] == [False] * (len(fragments) - 1) + [True]
    assert max(len(fragment.contents) for fragment in fragments) <= sizes[1]


def test_ids_start_at_one_and_are_never_used_again() -> None:
    fragmenter, same = mosh.Fragmenter(), mosh.Instruction(1, 2, 3, 4, b"")
    ids = [fragmenter.fragments(same, mtu_bytes)[0].instruction_id for mtu_bytes in (500, 500, 1_252, 500)]
    assert ids == [1, 2, 3, 4]


@pytest.mark.parametrize(("size", "ids"), [(3_000, [1, 1]), (100, [1, 2])])
def test_what_is_sent_again_in_several_pieces_keeps_its_id_and_a_single_one_does_not(size: int, ids: list[int]) -> None:
    """Pieces that have arrived still count, though the new try has other chaff."""
    fragmenter = mosh.Fragmenter()
    instructions = (mosh.Instruction(1, 2, 3, 4, _incompressible(size), chaff) for chaff in (b"chaff", b""))
    tries = [fragmenter.fragments_of_retry(instruction, 500) for instruction in instructions]
    assert [pieces[0].instruction_id for pieces in tries] == ids
    first, second = ({piece.contents for piece in pieces} for pieces in tries)
    assert (first == second) == (ids == [1, 1])


@pytest.mark.parametrize("size", range(0, 4_000, 90))
def test_every_piece_comes_first_before_one_does_so_again(size: int) -> None:
    """Of a long train a short queue takes only the first ones."""
    fragmenter, instruction = mosh.Fragmenter(), mosh.Instruction(1, 2, 3, 4, _incompressible(size + 100))
    count = len(fragmenter.fragments_of_retry(instruction, 100))
    first = [fragmenter.fragments_of_retry(instruction, 100)[0].num for _ in range(count)]
    assert count > 1 and sorted(first) == list(range(count))


@pytest.mark.parametrize("diff", [bytes(mosh.INSTRUCTION_LIMIT_BYTES), _incompressible(mosh.INSTRUCTION_LIMIT_BYTES)])
def test_an_instruction_beyond_the_limit_is_not_sent(diff: bytes) -> None:
    with pytest.raises(mosh.ProtocolError):
        mosh.Fragmenter().fragments(mosh.Instruction(0, 1, 0, 0, diff), 1_252)


# -- fragments


@given(st.integers(0, MAX), st.integers(0, 0x7FFF), st.booleans(), st.binary(max_size=50))
def test_fragment_decode_undoes_encode(instruction_id: int, num: int, final: bool, contents: bytes) -> None:
    fragment = mosh.Fragment.decode(mosh.Fragment(instruction_id, num, final, contents).encode())
    assert (fragment.instruction_id, fragment.num) == (instruction_id, num)
    assert (fragment.final, fragment.contents) == (final, contents)


@given(st.binary(max_size=30))
def test_any_bytes_are_a_fragment_or_a_packet_error(data: bytes) -> None:
    if len(data) < 10:
        with pytest.raises(mosh.PacketError):
            mosh.Fragment.decode(data)
    else:
        assert mosh.Fragment.decode(data).encode() == data


# -- putting together


@given(st.integers(0, 3_000), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_any_order_and_any_repetition_will_do(size: int, rng: random.Random) -> None:
    fragments = _cut(size)
    arrivals = fragments + rng.choices(fragments, k=3)
    rng.shuffle(arrivals)
    assembly = mosh.FragmentAssembly()
    complete = [instruction for instruction in map(assembly.add, arrivals) if instruction is not None]
    assert complete and all(instruction.diff == _incompressible(size) for instruction in complete)


def test_a_newer_instruction_replaces_an_unfinished_one() -> None:
    first, middle, last = _relabelled(_cut(1_000), 2)
    assembly = mosh.FragmentAssembly()
    assembly.add(first)
    assembly.add(last)
    assert assembly.add(_relabelled(_cut(10), 3)[0]) is not None
    assert assembly.add(middle) is None


def test_what_is_late_of_an_older_instruction_ends_no_assembly_and_is_taken_if_it_is_whole() -> None:
    first, middle, last = _relabelled(_cut(1_000), 2)
    assembly = mosh.FragmentAssembly()
    assembly.add(first)
    assembly.add(last)
    assert assembly.add(_relabelled(_cut(10), 1)[0]) is not None
    assert [assembly.add(late) for late in _relabelled(_cut(1_000), 1)] == [None] * 3
    assert assembly.add(middle) is not None


@pytest.mark.parametrize("first_id", [1 + mosh.REPLAY_WINDOW, 2**64 - 1])
def test_what_is_older_than_any_datagram_can_be_late_begins_an_assembly(first_id: int) -> None:
    """Or a peer whose ids do not count up could never say anything long again."""
    assembly = mosh.FragmentAssembly()
    assembly.add(_relabelled(_cut(1_000), first_id)[0])
    assert [assembly.add(fragment) is not None for fragment in _relabelled(_cut(1_000), 1)] == [False, False, True]


def _relabelled(fragments: list[mosh.Fragment], instruction_id: int) -> list[mosh.Fragment]:
    return [mosh.Fragment(instruction_id, each.num, each.final, each.contents) for each in fragments]


def test_a_late_repeat_of_a_small_instruction_is_assembled_again() -> None:
    (only,) = _cut(10)
    assembly = mosh.FragmentAssembly()
    assert assembly.add(only) is not None and assembly.add(only) is not None


FIRST, MIDDLE, LAST = _cut(1_000)
CONTRADICTIONS = {
    "other contents": ([FIRST, MIDDLE], mosh.Fragment(1, 1, False, b"something else")),
    "beyond the final one": ([LAST], mosh.Fragment(1, 3, False, b"")),
    "a final one too early": ([MIDDLE, FIRST], mosh.Fragment(1, 0, True, FIRST.contents)),
    "two ends": ([LAST], mosh.Fragment(1, 4, True, b"")),
    "an end before the end": ([LAST], mosh.Fragment(1, 1, True, MIDDLE.contents)),
}


@pytest.mark.parametrize(("before", "fragment"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_dropped_and_the_rest_still_counts(
    before: list[mosh.Fragment], fragment: mosh.Fragment
) -> None:
    assembly = mosh.FragmentAssembly()
    assert [assembly.add(each) for each in before] == [None] * len(before)
    with pytest.raises(mosh.PacketError):
        assembly.add(fragment)
    results = [assembly.add(each) for each in (FIRST, MIDDLE, LAST)]
    assert any(instruction is not None for instruction in results)


def test_pieces_are_not_collected_without_limit() -> None:
    assembly = mosh.FragmentAssembly()
    piece = bytes(2_000)
    for num in range(mosh.INSTRUCTION_LIMIT_BYTES // len(piece)):
        assert assembly.add(mosh.Fragment(1, num, False, piece)) is None
    with pytest.raises(mosh.PacketError):
        assembly.add(mosh.Fragment(1, 0x7000, False, piece))
    assert not assembly._pieces


UNREADABLE = {"empty": b"", "no zlib": b"no zlib stream", "no fields": mosh.deflate(b"\x0a")}


@pytest.mark.parametrize("contents", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_instruction_is_dropped_and_the_next_one_read(contents: bytes) -> None:
    assembly = mosh.FragmentAssembly()
    with pytest.raises(mosh.PacketError):
        assembly.add(mosh.Fragment(1, 0, True, contents))
    assert assembly.add(_relabelled(_cut(10), 2)[0]) is not None


FRAGMENTS = st.builds(
    mosh.Fragment, st.integers(0, 2), st.integers(0, 4), st.booleans(), st.sampled_from([b"", b"a", mosh.deflate(b"")])
)


@given(st.lists(FRAGMENTS, max_size=30))
def test_any_fragments_give_an_instruction_nothing_or_a_packet_error(fragments: list[mosh.Fragment]) -> None:
    assembly = mosh.FragmentAssembly()
    for fragment in fragments:
        try:
            assembly.add(fragment)
        except mosh.PacketError:
            pass
