"""Section 11: the emulator, against stock mosh's and against its own laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh
import vectors
from terminal_streams import terminal_bytes


def test_emulator_shows_what_a_program_writes() -> None:
    terminal = mosh.Emulator(20, 3)
    terminal.feed(b"hello\r\n\x1b[1mworld")
    assert terminal.framebuffer.lines()[:2] == ["hello" + " " * 15, "world" + " " * 15]
    assert (terminal.framebuffer.cursor_row, terminal.framebuffer.cursor_col) == (1, 5)
    assert terminal.framebuffer.cell(1, 0).rendition.attributes == mosh.BOLD


DEFAULTS = {
    "cursor_visible": True,
    "autowrap": True,
    "wrap_pending": False,
    "title": "",
    "icon": "",
    "clipboard": "",
    "bell": 0,
    "bracketed_paste": False,
    "focus": False,
    "altscroll": False,
    "mouse_mode": 0,
    "mouse_encoding": 0,
    "reverse_video": False,
    "origin": False,
    "app_cursor": False,
}


def _state(terminal: mosh.Emulator) -> dict[str, object]:
    """Return the state under the names that the vectors use."""
    framebuffer = terminal.framebuffer
    return {
        "cursor_visible": framebuffer.cursor_visible,
        "autowrap": terminal.autowrap,
        "wrap_pending": terminal.wrap_pending,
        "title": framebuffer.window_title,
        "icon": framebuffer.icon_name,
        "clipboard": framebuffer.clipboard,
        "bell": framebuffer.bell_count,
        "bracketed_paste": framebuffer.bracketed_paste,
        "focus": framebuffer.focus_events,
        "altscroll": framebuffer.alternate_scroll,
        "mouse_mode": framebuffer.mouse_mode,
        "mouse_encoding": framebuffer.mouse_encoding,
        "reverse_video": framebuffer.reverse_video,
        "origin": terminal.origin_mode,
        "app_cursor": terminal.application_cursor_keys,
    }


BETTER: dict[str, dict[str, object]] = {
    "osc52": {"clipboard": "bm8="},     # stock ignores what has no name, so nothing copied in tmux gets to the user
}


@pytest.mark.parametrize("vector", vectors.load("emulator"), ids=lambda vector: vector["id"])
def test_stock_vector(vector: vectors.Vector) -> None:
    terminal = mosh.Emulator(vector["cols"], vector["rows"])
    key_filter = mosh.CursorKeyFilter()
    replies, filtered = b"", []
    for step in vector["steps"]:
        if "resize" in step:
            terminal.resize(*step["resize"])
        elif "user_hex" in step:
            keys = bytes.fromhex(step["user_hex"])
            filtered.append(key_filter.filter(keys, terminal.application_cursor_keys).hex())
        else:
            terminal.feed(bytes.fromhex(step["host_hex"]))
            replies += terminal.take_replies()
    expect, framebuffer = {**vector["expect"], **BETTER.get(vector["id"], {})}, terminal.framebuffer
    if "screen" in expect:
        assert vectors.actual_cells(framebuffer) == vectors.expected_cells(expect["screen"])
    if "cursor" in expect:
        assert [framebuffer.cursor_row, framebuffer.cursor_col] == expect["cursor"]
    if "reply_per_user_step_hex" in expect:
        assert filtered == expect["reply_per_user_step_hex"]
    elif "reply_hex" in expect:
        assert (replies.hex() or "".join(filtered)) == expect["reply_hex"]
    assert framebuffer.codebook.rendition(framebuffer.pen) == vectors.rendition_of(expect.get("pen"))
    wrapped = [row for row in range(framebuffer.height) if framebuffer.cell(row, framebuffer.width - 1).wrap]
    assert wrapped == expect.get("wrapped_rows", [])
    region = [terminal.region_top, terminal.region_bottom]
    assert region == expect.get("scroll_region", [0, framebuffer.height - 1])
    assert _state(terminal) == {**DEFAULTS, **{name: expect[name] for name in DEFAULTS if name in expect}}


@given(terminal_bytes(), st.lists(st.integers(0, 200), max_size=8))
def test_one_feed_equals_many_small_feeds(data: bytes, cuts: list[int]) -> None:
    whole, pieces = mosh.Emulator(12, 5), mosh.Emulator(12, 5)
    whole.feed(data)
    at = 0
    for cut in [*sorted(cuts), len(data)]:
        pieces.feed(data[at:cut])
        at = max(at, cut)
    assert vectors.shown(whole.framebuffer) == vectors.shown(pieces.framebuffer)
    assert whole.take_replies() == pieces.take_replies()


@given(st.binary(max_size=400))
def test_any_bytes_leave_a_valid_screen(data: bytes) -> None:
    terminal = mosh.Emulator(7, 4)
    terminal.feed(data)
    framebuffer = terminal.framebuffer
    assert 0 <= framebuffer.cursor_row < 4 and 0 <= framebuffer.cursor_col < 7
    assert len(framebuffer.rows) == 4
    assert all(len(row.text) == len(row.attrs) <= 7 for row in framebuffer.rows)


@given(terminal_bytes(), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), max_size=4))
def test_resizing_at_any_moment_keeps_the_screen_valid(data: bytes, sizes: list[tuple[int, int]]) -> None:
    terminal = mosh.Emulator(12, 5)
    for width, height in [*sizes, (9, 4)]:
        terminal.feed(data)
        terminal.resize(width, height)
        assert len(terminal.framebuffer.rows) == height
        assert all(len(row.text) <= width for row in terminal.framebuffer.rows)
    terminal.feed(data)


def test_a_copy_does_not_change_when_the_original_goes_on() -> None:
    terminal = mosh.Emulator(10, 3)
    terminal.feed(b"before")
    copy = terminal.copy()
    terminal.feed(b"\x1b[2J\x1b[Hafter\x1b[5;5H")
    assert copy.framebuffer.lines()[0] == "before    "
    assert copy.framebuffer != terminal.framebuffer


def test_a_sequence_cut_in_half_stays_out_of_the_copy() -> None:
    terminal = mosh.Emulator(10, 3)
    terminal.feed(b"\x1b[3")
    copy = terminal.copy()
    copy.feed(b"1mx")
    assert copy.framebuffer.lines()[0] == "1mx       "


@pytest.mark.parametrize("count", ["0", "1", "65535", "65536", "9" * 100])
@pytest.mark.parametrize("final", "ABCDGHIJKLMPSTXZ@`dfghlmnr")
def test_extreme_parameters_are_harmless(final: str, count: str) -> None:
    terminal = mosh.Emulator(10, 5)
    terminal.feed(f"text\x1b[2;3H\x1b[{count}{final}\x1b[{count};{count}{final}more".encode())
    assert len(terminal.framebuffer.rows) == 5


def test_combining_marks_without_end_do_not_grow_a_cell() -> None:
    terminal = mosh.Emulator(10, 3)
    terminal.feed(b"a" + "\u0301".encode() * 1_000_000)
    assert len(terminal.framebuffer.cell(0, 0).contents.encode()) <= mosh.CLUSTER_LIMIT_BYTES + 4


@pytest.mark.parametrize(("selection", "is_clipboard"), [
    ("c", True), ("", True), ("pc", True), ("cs0", True), ("p", False), ("s0", False), ("q;c", False),
])
def test_what_is_copied_reaches_the_clipboard_however_a_program_names_it(selection: str, is_clipboard: bool) -> None:
    terminal = mosh.Emulator(20, 3)
    blank = terminal.copy()
    terminal.feed(f"\x1b]52;{selection};aGVsbG8=\x07".encode())     # tmux leaves the name out
    assert (terminal.framebuffer.clipboard == "aGVsbG8=") == is_clipboard
    diff = mosh.Display().frame(blank.framebuffer, terminal.framebuffer)
    assert diff == (b"\x1b]52;c;aGVsbG8=\x07" if is_clipboard else b"")


def test_what_is_copied_again_is_told_again() -> None:
    """The user may have copied something else on the own machine meanwhile."""
    terminal = mosh.Emulator(20, 3)
    terminal.feed(b"\x1b]52;c;aGk=\x07")
    before = terminal.copy()
    terminal.feed(b"\x1b]52;c;aGk=\x07")
    diff = mosh.Display().frame(before.framebuffer, terminal.framebuffer)
    assert diff == b"\x1b]52;c;aGk=\x07" and terminal.framebuffer != before.framebuffer
    receiver = before.copy()
    receiver.feed(diff)
    assert mosh.Display().frame(before.framebuffer, receiver.framebuffer) == diff
    assert mosh.Display().frame(terminal.framebuffer, before.framebuffer) == b""     # an older screen copies nothing


def test_an_endless_title_is_cut() -> None:
    terminal = mosh.Emulator(10, 3)
    terminal.feed(b"\x1b]2;" + b"x" * 1_000_000 + b"\x07ok")
    assert len(terminal.framebuffer.window_title) == mosh.TITLE_LIMIT - len("2;")
    assert terminal.framebuffer.lines()[0] == "ok" + " " * 8


LINE = st.text(alphabet="abc \u00e9\u6f22\u0301\t\x07\b", max_size=30)
COLORS = st.sampled_from(["", "\x1b[31m", "\x1b[0m", "\x1b[m", "\x1b[1;44m", "\x1b[38;2;1;2;3m", "\x1b[K", "\x1b[3C"])
FLOOD = st.lists(
    st.builds("{}{}{}{}".format, COLORS, LINE, COLORS, st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", ""]))
)
BEFORE = st.sampled_from(
    ["", "\x1b[2;4r", "\x1b[2;4r\x1b[3;1H", "\x1b[?6h", "\x1b[4h", "\x1b[?7l", "\x1b[45m", "\x1b[5", "\xc3"]
)
UNSAFE = st.sampled_from(["", "\x1b[2;2Hx", "\x1b[2J", "\x1bM", "\x1b]2;t\x07", "\x85", "\x0b", "\x1b[?25l", "\x1b[1"])


@given(BEFORE, FLOOD, UNSAFE, FLOOD, st.integers(1, 90), st.integers(1, 90))
def test_skipping_what_scrolls_away_unseen_changes_nothing(
    before: str, flood: list[str], unsafe: str, more: list[str], times: int, again: int
) -> None:
    data = ("".join(flood) * times + unsafe + "".join(more) * again).encode()
    whole, pieces = mosh.Emulator(12, 5), mosh.Emulator(12, 5)
    for terminal in (whole, pieces):
        terminal.feed(b"top\r\n" + before.encode("latin-1"))
    whole.feed(data)
    for at in range(0, len(data), 1000):
        pieces.feed(data[at : at + 1000])
    assert vectors.shown(whole.framebuffer) == vectors.shown(pieces.framebuffer)
    assert whole.framebuffer.bell_count == pieces.framebuffer.bell_count
    assert whole.wrap_pending == pieces.wrap_pending
    last = whole.framebuffer.width - 1
    assert [row.padded(12)[1][last] >= "\u8000" for row in whole.framebuffer.rows] == [
        row.padded(12)[1][last] >= "\u8000" for row in pieces.framebuffer.rows
    ]


def test_a_scrolling_region_below_the_screen_is_ignored() -> None:
    terminal = mosh.Emulator(12, 5)
    terminal.feed(b"\x1b[2;4r\x1b[3;3H\x1b[7;9r")
    assert (terminal.region_top, terminal.region_bottom) == (1, 3)
    assert (terminal.framebuffer.cursor_row, terminal.framebuffer.cursor_col) == (2, 2)


def test_a_clipboard_without_contents_is_ignored() -> None:
    terminal = mosh.Emulator(12, 5)
    terminal.feed(b"\x1b]52;c;aGk=\x07\x1b]52;c\x07")
    assert (terminal.framebuffer.clipboard, terminal.framebuffer.copy_count) == ("aGk=", 1)


def test_a_control_cut_in_half_before_a_flood_is_obeyed() -> None:
    terminal = mosh.Emulator(12, 5)
    terminal.feed(b"\xc2")
    terminal.feed(b"\x9b?25l" + b"line\r\n" * 1000)
    assert not terminal.framebuffer.cursor_visible


def test_the_search_for_what_scrolls_away_unseen_looks_only_so_far() -> None:
    """In vain once for every 2 KB, it would take minutes for a diff of the largest size."""
    harmless = b"a \x1b[1mline\x1b[m\r\n" * 100_000
    for start in (0, 5_000, len(harmless) - 5_000):
        limit = min(start + mosh._SEARCH_LIMIT_BYTES, len(harmless))
        assert limit - len(b"\x1b[1m") < mosh._end_of_lines(harmless, start) <= limit


@given(st.integers(1, 40_000), st.integers(0, 30), BEFORE)
def test_an_endless_line_ends_as_if_printed_in_pieces(count: int, start: int, before: str) -> None:
    data = bytes(97 + i % 23 for i in range(count))
    whole, pieces = mosh.Emulator(12, 5), mosh.Emulator(12, 5)
    for terminal in (whole, pieces):
        terminal.feed(before.encode("latin-1") + b" " * start)
    whole.feed(data)
    for at in range(0, len(data), 10):
        pieces.feed(data[at : at + 10])
    assert vectors.shown(whole.framebuffer) == vectors.shown(pieces.framebuffer)
