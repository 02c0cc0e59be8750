"""Section 12: the frame diff. Its law: a receiver showing A, fed the diff from A to B, shows B."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mosh
import vectors
from terminal_streams import terminal_bytes


def test_a_diff_turns_one_screen_into_the_other() -> None:
    sender = mosh.Emulator(20, 3)
    sender.feed(b"$ ls")
    before = sender.copy()
    sender.feed(b"\r\nfile\x1b[7m.txt")
    receiver = before.copy()
    receiver.feed(mosh.Display().frame(before.framebuffer, sender.framebuffer))
    assert receiver.framebuffer.lines() == sender.framebuffer.lines()


def _vector_screens(vector: vectors.Vector) -> tuple[mosh.Emulator, mosh.Emulator]:
    a = mosh.Emulator(vector["cols"], vector["rows"])
    a.feed(bytes.fromhex(vector["a_hex"]))
    b = a.copy()
    if "resize" in vector:
        b.resize(*vector["resize"])
    b.feed(bytes.fromhex(vector["b_hex"]))
    return a, b


def _received(base: mosh.Emulator, target: mosh.Emulator, diff: bytes) -> mosh.Emulator:
    """Return what a receiver that shows `base` makes of a diff, which must leave its hidden state alone."""
    receiver = base.copy()
    size = target.framebuffer.width, target.framebuffer.height
    receiver.resize(*size)
    receiver.feed(diff)
    assert receiver.take_replies() == b""
    hidden = (receiver.region_top, receiver.region_bottom, receiver.insert_mode, receiver.origin_mode)
    assert hidden == (0, size[1] - 1, False, False)
    assert receiver.autowrap and not receiver.wrap_pending
    return receiver


VECTORS = [vector for vector in vectors.load("frame_diff") + vectors.load("client_draw") if "a_hex" in vector]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
def test_stock_vector_gives_the_same_screen_in_no_more_bytes(vector: vectors.Vector) -> None:
    a, b = _vector_screens(vector)
    on_the_wire = {name: vector.get(name, True) for name in ("ech", "bce", "title")}
    diff = mosh.Display(**on_the_wire).frame(a.framebuffer, b.framebuffer)
    blank = mosh.Emulator(vector["cols"], vector["rows"])
    receiver = _received(blank, a, mosh.Display().frame(blank.framebuffer, a.framebuffer))
    receiver = _received(receiver, b, diff)
    assert vectors.shown(receiver.framebuffer) == vectors.shown(b.framebuffer) | _untold(vector)
    stock_defect = "receiver_cursor" in vector or "receiver_screen" in vector
    assert stock_defect or len(diff) <= len(bytes.fromhex(vector["diff_hex"]))


def test_the_first_frame_on_a_users_terminal() -> None:
    (vector,) = [vector for vector in vectors.load("client_draw") + vectors.load("frame_diff") if "a_hex" not in vector]
    blank = mosh.Emulator(vector["cols"], vector["rows"])
    terminal = mosh.Emulator(vector["cols"], vector["rows"], blank.framebuffer.codebook)
    terminal.feed(b"left over by \x1b[1;7m another program \x1b[?1000;2004;5h\x1b[?25l")
    frame = mosh.Display().frame(blank.framebuffer, blank.framebuffer, known=False)
    terminal.feed(frame)
    assert vectors.shown(terminal.framebuffer) == vectors.shown(blank.framebuffer)
    assert len(frame) <= len(bytes.fromhex(vector["diff_hex"]))


def _untold(vector: vectors.Vector) -> dict[str, object]:
    return {} if vector.get("title", True) else {"window_title": ""}


@pytest.mark.parametrize("bce", [True, False])
def test_empty_cells_in_a_colour_are_erased_only_where_erasing_takes_that_colour(bce: bool) -> None:
    terminal = mosh.Emulator(30, 1)
    base = terminal.framebuffer.copy()
    terminal.feed(b"a\x1b[44m\x1b[K\x1b[20Gb")
    frame = mosh.Display(bce=bce).frame(base, terminal.framebuffer)
    assert (b"X" in frame) == (b"\x1b[K" in frame) == bce
    assert frame.count(b" ") == (0 if bce else 28)


@settings(max_examples=300)
@given(terminal_bytes(), terminal_bytes(), st.booleans(), st.booleans())
def test_apply_diff_law(first: bytes, second: bytes, ech: bool, bce: bool) -> None:
    display = mosh.Display(ech=ech, bce=bce)
    sender = mosh.Emulator(11, 5)
    receiver = mosh.Emulator(11, 5)
    for data in (first, second):
        before = sender.copy()
        sender.feed(data)
        receiver = _received(receiver, sender, display.frame(before.framebuffer, sender.framebuffer))
        assert vectors.shown(receiver.framebuffer) == vectors.shown(sender.framebuffer)


@given(terminal_bytes(), terminal_bytes(), st.integers(1, 20), st.integers(1, 8))
def test_apply_diff_law_across_a_resize(first: bytes, second: bytes, width: int, height: int) -> None:
    sender = mosh.Emulator(11, 5)
    sender.feed(first)
    before = sender.copy()
    receiver = _received(
        mosh.Emulator(11, 5),
        before,
        mosh.Display().frame(mosh.Emulator(11, 5, before.framebuffer.codebook).framebuffer, before.framebuffer),
    )
    sender.resize(width, height)
    sender.feed(second)
    receiver = _received(receiver, sender, mosh.Display().frame(before.framebuffer, sender.framebuffer))
    assert vectors.shown(receiver.framebuffer) == vectors.shown(sender.framebuffer)


@given(terminal_bytes(), terminal_bytes())
def test_a_repaint_cures_any_damage(garbage: bytes, data: bytes) -> None:
    sender, damaged = mosh.Emulator(11, 5), mosh.Emulator(11, 5)
    sender.feed(data)
    damaged.feed(garbage + b"\x1b[?6l\x1b[4l\x1b[?7h\x1b\\\x1b]2;\x07\x1b]52;c;\x07")
    repaint = mosh.Display().frame(sender.framebuffer, sender.framebuffer, known=False)
    damaged.feed(repaint)
    expected = vectors.shown(sender.framebuffer) | {"clipboard": ""}
    if not sender.framebuffer.title_was_set:
        expected["window_title"] = damaged.framebuffer.window_title
    assert vectors.shown(damaged.framebuffer) == expected


@given(terminal_bytes())
def test_equal_screens_need_no_bytes(data: bytes) -> None:
    terminal = mosh.Emulator(11, 5)
    terminal.feed(data)
    assert mosh.Display().frame(terminal.framebuffer, terminal.copy().framebuffer) == b""


def test_a_line_that_goes_on_is_written_without_a_break() -> None:
    sender = mosh.Emulator(10, 4)
    before = sender.copy()
    sender.feed(b"0123456789abc")
    assert mosh.Display().frame(before.framebuffer, sender.framebuffer) == b"0123456789abc"


def _as_a_joining_terminal_sees_it(frame: bytes) -> bytes:
    """Leave out of a frame the characters that such a terminal draws into the cell on their left."""
    text, before = re.sub("[\U0001f3fb-\U0001f3ff]", "", frame.decode()), ""
    while text != before:
        text, before = re.sub("\u200d((?:\x1b\\[[0-9;?]*[A-Za-z])*)[^\x1b]", r"\1", text), text
    return text.encode()


FAMILY, THUMB = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd"


@pytest.mark.parametrize("pen", [b"", b"\x1b[1;31m", b"\x1b[44m"])
@pytest.mark.parametrize(("word", "shown"), [(FAMILY, 6), (THUMB, 4)], ids=["family", "thumb"])
def test_what_a_terminal_joins_leaves_a_gap_and_nothing_else(word: str, shown: int, pen: bytes) -> None:
    """Several emoji in one cell, or one with its skin tone, are the terminal's affair; the rest of the row is not."""
    sender = mosh.Emulator(30, 1)
    sender.feed(b"X" * 29)
    terminal, before = sender.copy(), sender.copy()
    sender.feed(b"\r" + pen + f"a{word}b".encode() + b"\x1b[m")
    frame = mosh.Display().frame(before.framebuffer, sender.framebuffer)
    before.feed(frame)
    assert before.framebuffer.lines() == sender.framebuffer.lines()
    terminal.feed(_as_a_joining_terminal_sees_it(frame))
    (line,) = terminal.framebuffer.lines()
    assert line.rstrip() == f"a{word[0]}".ljust(shown) + "b" + "X" * (27 - shown)


def test_a_scroll_is_a_line_feed() -> None:
    sender = mosh.Emulator(40, 6)
    sender.feed(b"\r\n".join(b"this is line number %d" % i for i in range(6)))
    before = sender.copy()
    sender.feed(b"\r\nnew")
    assert mosh.Display().frame(before.framebuffer, sender.framebuffer) == b"\n\rnew"


SCROLLS = st.builds(
    "\x1b[{};{}r\x1b[{}H\x1b[{}{}\x1b[r".format,
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 3),
    st.sampled_from("LMST"),
)
EDITS = st.builds(
    "\x1b[{};{}H{}".format, st.integers(1, 10), st.integers(1, 20), st.sampled_from(["x", "\x1b[K", "\x1b[7mstatus"])
)


@settings(max_examples=300)
@given(st.lists(SCROLLS | EDITS, max_size=4))
def test_apply_diff_law_when_parts_of_the_screen_scroll(changes: list[str]) -> None:
    sender = mosh.Emulator(30, 10)
    sender.feed("\r\n".join(f"line number {i} of this file" for i in range(10)).encode())
    before = sender.copy()
    sender.feed("".join(changes).encode())
    diff = mosh.Display().frame(before.framebuffer, sender.framebuffer)
    receiver = _received(before, sender, diff)
    assert vectors.shown(receiver.framebuffer) == vectors.shown(sender.framebuffer)


class CountedRow(mosh.Row):
    """A row that counts how often one is compared."""

    __slots__ = ()
    count = 0

    def __eq__(self, other: object) -> bool:
        CountedRow.count += 1
        return super().__eq__(other)

    __hash__ = mosh.Row.__hash__


def test_looking_for_a_scroll_takes_time_in_proportion_to_the_height() -> None:
    """Also where every other row has moved far, so that there are many stretches, all of them long."""
    height = 400
    old: list[mosh.Row] = [CountedRow("old" + chr(i), "\0" * 4, "\0") for i in range(1, height + 1)]
    new: list[mosh.Row] = [CountedRow("new" + chr(i), "\0" * 4, "\0") for i in range(1, height + 1)]
    new[1 : height // 2 : 2] = old[height // 2 + 1 :: 2]
    CountedRow.count = 0
    mosh._find_scroll(old, new)
    assert CountedRow.count < 20 * height


@pytest.mark.parametrize(
    "change", ["\x1b[3;20r\x1b[20;1H\nnew", "\x1b[3;20r\x1b[3;1H\x1bMnew", "\x1b[1;22r\x1b[5;1H\x1b[L", "\x1b[2M"]
)
def test_a_scroll_inside_a_region_is_cheap_in_both_directions(change: str) -> None:
    sender = mosh.Emulator(80, 24)
    sender.feed(
        "\r\n".join(f"{i}: the quick brown fox jumps over the lazy dog {i * i}" for i in range(24)).encode()
        + b"\x1b[5;1H"
    )
    before = sender.copy()
    sender.feed(change.encode() + b"\x1b[r")
    diff = mosh.Display().frame(before.framebuffer, sender.framebuffer)
    assert len(diff) < 60
    assert vectors.shown(_received(before, sender, diff).framebuffer) == vectors.shown(sender.framebuffer)
