"""Section 8: bytes to characters as `mbrtowc` does it, and the width of every character there is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import make_width_table
import mosh

INVALID = 0xFFFD


def test_text_arrives_in_pieces() -> None:
    decoder = mosh.Utf8Decoder()
    assert decoder.decode(b"na\xc3") == "na"
    assert decoder.decode(b"\xafve \xe6\xbc") == "ïve "
    assert decoder.decode(b"\xa2") == "漢"


# -- decoding --------------------------------------------------------------------------------------------------

BAD, INCOMPLETE = -1, -2
SMALLEST = {1: 0, 2: 0, 3: 0x800, 4: 0x10000, 5: 0x200000, 6: 0x4000000}


def _length(lead: int) -> int:
    for limit, length in ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF8, 4), (0xFC, 5), (0xFE, 6)):
        if lead < limit:
            return length
    return 0


def _attempt(pending: bytes) -> int:
    """What the C library says of the bytes pending: a code point, BAD or INCOMPLETE."""
    length = _length(pending[0])
    if length == 0 or any(byte < 0x80 or byte > 0xBF for byte in pending[1:]):
        return BAD
    if len(pending) < length:
        return INCOMPLETE
    if length == 1:
        return pending[0]
    value = pending[0] & {2: 0x1F, 3: 0x0F, 4: 0x07, 5: 0x03, 6: 0x01}[length]
    for byte in pending[1:]:
        value = value * 64 + (byte - 0x80)
    return BAD if value < SMALLEST[length] or 0xD800 <= value <= 0xDFFF else value


class SlowDecoder:
    """The rule, one byte at a time."""

    def __init__(self) -> None:
        self.pending = b""
        self.out: list[int] = []

    def byte(self, byte: int) -> None:
        """Take one byte."""
        if not self.pending and byte < 0x80:
            self.out.append(byte)
            return
        self.pending += bytes((byte,))
        while self.pending:
            result = _attempt(self.pending)
            if result == INCOMPLETE:
                return
            if result == BAD:
                self.out.append(INVALID)
                self.pending = self.pending[-1:] if len(self.pending) > 1 else b""
            else:
                self.out.append(result if result <= 0x10FFFF else INVALID)
                self.pending = b""


def _slowly(data: bytes) -> str:
    decoder = SlowDecoder()
    for byte in data:
        decoder.byte(byte)
    return "".join(map(chr, decoder.out))


@pytest.mark.parametrize(("data", "text"), [
    ("e0 80 80", "\ufffd\ufffd"),                   # overlong: noticed on the last byte, which is then tried alone
    ("ed a0 80", "\ufffd\ufffd"),                   # a surrogate
    ("f4 90 80 80", "\ufffd"),                      # beyond Unicode: one character
    ("c0 80", "\ufffd\ufffd"),
    ("9b 41", "\ufffdA"),                           # a raw C1 byte is no control
    ("c2 9b", "\x9b"),
    ("e2 82 41", "\ufffdA"),
    ("e2 82 e2 82 ac", "\ufffd€"),
    ("f8 88 80 80 80", "\ufffd"),                   # five bytes: 0x200000
    ("fd bf bf bf bf bf", "\ufffd"),
    ("fe ff", "\ufffd\ufffd"),
    ("ef bf bd", "\ufffd"),
    ("00", "\0"),
])  # fmt: skip
def test_malformed_text(data: str, text: str) -> None:
    assert mosh.Utf8Decoder().decode(bytes.fromhex(data)) == text
    assert _slowly(bytes.fromhex(data)) == text


# Few different bytes, so that sequences happen to be nearly right.
TRICKY_BYTES = b"a\x1b\x7f\x80\x90\xa0\xbf\xc0\xc2\xdf\xe0\xe1\xed\xef\xf0\xf4\xf5\xf8\xfc\xfd\xfe"
TRICKY = st.lists(st.sampled_from(TRICKY_BYTES)).map(bytes)
ANY_BYTES = st.binary(max_size=80) | TRICKY | st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace"))
DATA = st.lists(ANY_BYTES, max_size=4).map(b"".join)


@settings(max_examples=500)
@given(DATA)
def test_any_bytes_are_decoded_by_the_rule(data: bytes) -> None:
    assert mosh.Utf8Decoder().decode(data) == _slowly(data)


@settings(max_examples=300)
@given(DATA, st.lists(st.integers(0, 200)))
def test_any_split_into_feeds_gives_the_same(data: bytes, cuts: list[int]) -> None:
    decoder, at, out = mosh.Utf8Decoder(), 0, ""
    for cut in [*sorted(cuts), len(data)]:
        out += decoder.decode(data[at:cut])
        at = max(at, cut)
    assert out == _slowly(data)


@pytest.mark.parametrize("tail", [b"", b"\x80", b"\xbf\x80", b"A", b"\x80\x80\x80"])
def test_all_pairs_of_bytes_before_any_tail(tail: bytes) -> None:
    for first in range(256):
        for second in range(0, 256, 3):
            data = bytes((first, second)) + tail
            assert mosh.Utf8Decoder().decode(data) == _slowly(data), data


def test_a_lead_byte_that_never_ends_stays_small() -> None:
    decoder = mosh.Utf8Decoder()
    assert decoder.decode(b"\xfd" * 10_000) == "\ufffd" * 9_999
    assert decoder.decode(b"A") == "\ufffdA"


# -- widths ----------------------------------------------------------------------------------------------------

needs_unicode_14 = pytest.mark.skipif(
    not unicodedata.unidata_version.startswith("14."),
    reason=f"this Python has Unicode {unicodedata.unidata_version}; the rule is about 14 (Python 3.11)",
)
# What is assigned in Unicode 17 but was not in 14, of which stock mosh knows nothing.
NEWER = {0x1E030: 1, 0x1E08F: 0, 0x11F00: 0, 0x11F02: 1, 0x1FA75: 2, 0x1FAE8: 2, 0x31350: 2, 0x1FADC: 2}


def _rule(code_point: int) -> int:
    """The width by stock's rule. Written apart from the one that makes the table, so that both have to be right."""
    char = chr(code_point)
    category = unicodedata.category(char)
    if 0x20 <= code_point <= 0x7E or 0xA0 <= code_point <= 0xFF:
        return 1
    if category in {"Cc", "Cs", "Cn", "Zl", "Zp"}:
        return -1
    visible_format = {0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    if category in {"Mn", "Me", "Cf"} and not (0x600 <= code_point <= 0x605 or code_point in visible_format):
        return 0
    if any(first <= code_point <= last for first, last in ((0x1160, 0x11FF), (0xD7B0, 0xD7C6), (0xD7CB, 0xD7FB))):
        return 0
    if unicodedata.east_asian_width(char) in {"W", "F"}:
        return 2
    return 2 if 0x3248 <= code_point <= 0x324F or 0x4DC0 <= code_point <= 0x4DFF else 1


@needs_unicode_14
def test_every_character_of_unicode_14_has_stocks_width() -> None:
    assigned = (n for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) != "Cn")
    wrong = [f"U+{n:04X}" for n in assigned if mosh.char_width.__wrapped__(chr(n)) != _rule(n)]
    assert wrong == []


@needs_unicode_14
def test_what_no_unicode_knows_is_unprintable() -> None:
    unicodedata2 = pytest.importorskip("unicodedata2", reason="unicodedata2 knows what newer Unicode assigns")
    both = (unicodedata, unicodedata2)
    unassigned = (n for n in range(sys.maxunicode + 1) if all(data.category(chr(n)) == "Cn" for data in both))
    wrong = [f"U+{n:04X}" for n in unassigned if mosh.char_width.__wrapped__(chr(n)) != -1]
    assert wrong == []


@needs_unicode_14
def test_what_is_newer_than_unicode_14_has_the_width_of_the_package() -> None:
    unicodedata2 = pytest.importorskip("unicodedata2", reason="unicodedata2 knows what newer Unicode assigns")
    wcwidth = pytest.importorskip("wcwidth", reason="the package with newer widths")
    newer = [
        chr(n) for n in range(sys.maxunicode + 1)
        if unicodedata.category(chr(n)) == "Cn" and unicodedata2.category(chr(n)) != "Cn"
    ]
    assert len(newer) > 1000
    assert [char for char in newer if mosh.char_width.__wrapped__(char) != wcwidth.wcwidth(char)] == []
    assert all(mosh.is_width_doubtful(char) for char in newer)


@pytest.mark.parametrize(("code_point", "width"), NEWER.items(), ids=lambda value: f"{value:X}")
def test_some_newer_characters(code_point: int, width: int) -> None:
    pytest.importorskip("wcwidth", reason="the package with newer widths")
    assert mosh.char_width(chr(code_point)) == width


@pytest.mark.parametrize(("text", "width"), [
    ("\0\a\b\t\n\r\x1b\x7f\x80\x9b\x9f", -1), (" aZ~\xa0\xad\xff", 1), ("\u2028\u2029\ud800\udfff\uffff\U0010ffff", -1),
    ("\u0300\u0301\u200b\u200d\ufe0f\u1160\U000e0001", 0), ("漢字ｱ", (2, 2, 1)), ("가\u3000Ａ😀", 2),
    ("\U0001f1e9\U0001f1ea", 1), ("─█é\u0600\u070f", 1), ("\u3248\u4dc0", 2), ("\ue000\U00100000", 1), ("\ufffd", 1),
])  # fmt: skip
def test_widths_in_small(text: str, width: int | tuple[int, ...]) -> None:
    expected = width if isinstance(width, tuple) else (width,) * len(text)
    assert tuple(map(mosh.char_width, text)) == expected


@needs_unicode_14
def test_the_table_is_what_its_generator_makes() -> None:
    missing = [name for name in ("unicodedata2", "wcwidth") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the generator needs {missing}")
    version = importlib.metadata.version("wcwidth")
    if f"wcwidth {version}." not in mosh_source():
        pytest.skip(f"the table was made with another wcwidth than {version}")
    assert make_width_table.packed() == mosh.WIDTH_EXCEPTIONS


def mosh_source() -> str:
    """The text of mosh.py, where the table's origin is noted."""
    assert mosh.__file__ is not None
    return Path(mosh.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("char", ["\u200d", "\ufe0f", "\ufe0e", "\U0001f1e6", "\U0001f1ff", "\U0001f3fd", "\U0001fae8"])
def test_what_terminals_disagree_about_is_doubtful(char: str) -> None:
    assert mosh.is_width_doubtful(char)


@pytest.mark.parametrize("char", list(" a~éÿ─█漢가😀\u0301я"))
def test_what_they_agree_about_is_not(char: str) -> None:
    assert not mosh.is_width_doubtful(char)


def test_every_narrow_character_has_width_one() -> None:
    """The fast path for text takes these for granted."""
    narrow = [chr(n) for n in range(1, 0x110000) if mosh.NARROW_CELLS.fullmatch(chr(n))]
    assert len(narrow) > 1000
    assert {mosh.char_width(char) for char in narrow} == {1}
    assert not any(mosh.is_width_doubtful(char) for char in narrow)
    assert all(mosh.NARROW_RUN.fullmatch(char) for char in narrow)
    assert set(map(mosh.char_width, filter(mosh.WIDE_RUN.fullmatch, map(chr, range(1, 0x110000))))) == {2}


def test_every_mark_of_a_cluster_has_width_zero() -> None:
    """The fast path for clusters takes this for granted."""
    marks = [char for char in map(chr, range(1, 0x110000)) if mosh.CLUSTER.fullmatch("x" + char)]
    assert len(marks) > 150
    assert {mosh.char_width(char) for char in marks} == {0}


# -- patterns --------------------------------------------------------------------------------------------------


def test_a_lazy_pattern_does_what_the_compiled_one_does() -> None:
    lazy, compiled = mosh.lazy_pattern("(a+)|b.", re.DOTALL), re.compile("(a+)|b.", re.DOTALL)
    for text in ("", "aab\nab", "xbb"):
        assert [match.span() for match in lazy.finditer(text)] == [match.span() for match in compiled.finditer(text)]
        for method in ("match", "search", "fullmatch"):
            found = [getattr(pattern, method)(text) for pattern in (lazy, compiled, lazy)]
            assert len({match and match.groups() for match in found}) == 1
    assert lazy.flags == compiled.flags


def test_a_bad_lazy_pattern_is_an_error_when_it_is_used() -> None:
    with pytest.raises(re.error):
        mosh.lazy_pattern("(").match("")
