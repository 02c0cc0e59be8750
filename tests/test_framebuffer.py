"""Section 9: rows against a plain list of cells, what makes two screens differ, and the codebook's bounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mosh
from mosh import NUL, Codebook, Framebuffer, Rendition, Row

WIDTH = 8


def test_a_framebuffer_shows_what_is_put_into_it() -> None:
    screen = Framebuffer(4, 2, Codebook())
    red = screen.codebook.rendition_code(Rendition(mosh.BOLD, foreground=1))
    screen.set_code(0, 1, "hi", red * 2)
    assert screen.lines() == [" hi ", "    "]
    cell = screen.cell(0, 2)
    assert (cell.contents, cell.rendition) == ("i", (mosh.BOLD, 1, None))


# -- rows ------------------------------------------------------------------------------------------------------

# The plain model: a row is a list of (text, attr), `width` long, and an empty cell is (NUL, rendition).
TEXT = st.sampled_from(NUL + NUL + "ab漢")
ATTR = st.sampled_from("\0\1\2" + mosh.with_wrap("\1"))
CODE = st.sampled_from("\0\1\2")


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, list[tuple[str, str]]]:
    """A row and its cells."""
    cells = draw(st.lists(st.tuples(TEXT, ATTR), max_size=WIDTH))
    fill = draw(CODE)
    row = Row("".join(text for text, _ in cells), "".join(attr for _, attr in cells), fill)
    return row, cells + [(NUL, fill)] * (WIDTH - len(cells))


def _cells(row: Row, width: int = WIDTH) -> list[tuple[str, str]]:
    """The cells that a row shows."""
    text, attrs = row.padded(width)
    assert len(text) == len(attrs)
    return list(zip(text, attrs))[:width]


def _assert_trimmed(row: Row, width: int = WIDTH) -> None:
    assert len(row.text) == len(row.attrs) <= width
    assert not (row.text and (row.text[-1], row.attrs[-1]) == (NUL, row.fill))


@given(rows())
def test_a_new_row_shows_its_cells_and_keeps_no_more_than_it_must(pair: tuple[Row, Any]) -> None:
    row, cells = pair
    assert _cells(row) == cells
    _assert_trimmed(row)


@given(st.data())
def test_equal_cells_and_fill_give_equal_rows(data: st.DataObject) -> None:
    """However a row came about: the same cells made in one go or padded by hand are the same row."""
    row, cells = data.draw(rows())
    length = data.draw(st.integers(len(row.text), WIDTH))
    padded = Row("".join(text for text, _ in cells[:length]), "".join(attr for _, attr in cells[:length]), row.fill)
    assert padded == row
    other, other_cells = data.draw(rows())
    assert (row == other) == (cells == other_cells and row.fill == other.fill)


@given(rows(), st.integers(0, 2 * WIDTH))
def test_padding(pair: tuple[Row, Any], width: int) -> None:
    row, cells = pair
    text, attrs = row.padded(width)
    assert len(text) == len(attrs) == max(width, len(row.text))
    assert list(zip(text, attrs))[:WIDTH] == cells[: len(text)]


@given(rows(), st.data())
def test_writing(pair: tuple[Row, Any], data: st.DataObject) -> None:
    row, cells = pair
    col = data.draw(st.integers(0, WIDTH - 1))
    new = data.draw(st.lists(st.tuples(TEXT, ATTR), max_size=WIDTH - col))
    result = row.with_cells(col, "".join(text for text, _ in new), "".join(attr for _, attr in new))
    assert _cells(result) == cells[:col] + new + cells[col + len(new) :]
    _assert_trimmed(result)


@given(rows(), st.integers(0, WIDTH), st.integers(0, WIDTH), CODE)
def test_erasing(pair: tuple[Row, Any], one: int, other: int, code: str) -> None:
    row, cells = pair
    start, end = sorted((one, other))
    result = row.erased(start, end, WIDTH, code)
    if start < WIDTH:
        assert _cells(result) == cells[:start] + [(NUL, code)] * (end - start) + cells[end:]
    _assert_trimmed(result)


@given(rows(), st.integers(0, WIDTH - 1), st.integers(1, 2 * WIDTH), CODE)
def test_inserting(pair: tuple[Row, Any], col: int, count: int, code: str) -> None:
    row, cells = pair
    result = row.inserted(col, count, WIDTH, code)
    assert _cells(result) == (cells[:col] + [(NUL, code)] * count + cells[col:])[:WIDTH]
    _assert_trimmed(result)


@given(rows(), st.integers(0, WIDTH - 1), st.integers(1, 2 * WIDTH), CODE)
def test_deleting(pair: tuple[Row, Any], col: int, count: int, code: str) -> None:
    row, cells = pair
    result = row.deleted(col, count, WIDTH, code)
    assert _cells(result) == (cells[:col] + cells[col + count :] + [(NUL, code)] * count)[:WIDTH]
    _assert_trimmed(result)


@given(rows(), st.integers(1, 2 * WIDTH), CODE)
def test_resizing_a_row(pair: tuple[Row, Any], width: int, code: str) -> None:
    row, cells = pair
    result = row.resized(WIDTH, width, code)
    kept = [(text, mosh.without_wrap(attr)) for text, attr in cells[:width]]
    assert _cells(result, width) == kept + [(NUL, code)] * (width - WIDTH)
    _assert_trimmed(result, width)


@given(rows(), st.data())
def test_a_row_never_changes(pair: tuple[Row, Any], data: st.DataObject) -> None:
    row, cells = pair
    operation: Callable[[Row], Row] = data.draw(st.sampled_from([
        lambda row: row.with_cells(0, "x", "\1"), lambda row: row.erased(0, 3, WIDTH, "\2"),
        lambda row: row.inserted(0, 3, WIDTH, "\2"), lambda row: row.deleted(0, 3, WIDTH, "\2"),
        lambda row: row.resized(WIDTH, 3, "\2"),
    ]))  # fmt: skip
    operation(row)
    assert _cells(row) == cells


@pytest.mark.parametrize("code", ["\0", "\1", "\u7fef"])
def test_the_wrap_mark_can_be_set_seen_and_removed(code: str) -> None:
    marked = mosh.with_wrap(code)
    assert mosh.has_wrap(marked) and not mosh.has_wrap(code)
    assert mosh.with_wrap(marked) == marked
    assert mosh.without_wrap(marked) == mosh.without_wrap(code) == code


# -- framebuffer -----------------------------------------------------------------------------------------------


def _screen(*lines: str, width: int = 6) -> Framebuffer:
    screen = Framebuffer(width, len(lines), Codebook())
    for row, line in enumerate(lines):
        screen.set_code(row, 0, line, Codebook.DEFAULT * len(line))
    return screen


def _blue(screen: Framebuffer) -> str:
    """Let the pen have a blue background; return what erased cells have then."""
    screen.pen = screen.codebook.rendition_code(Rendition(mosh.BOLD, background=4))
    return screen.codebook.rendition_code(Rendition(background=4))


@pytest.mark.parametrize(("top", "bottom", "count", "lines"), [
    (0, 4, 1, "bcde."), (0, 4, -1, ".abcd"), (0, 4, 2, "cde.."), (0, 4, -2, "..abc"), (1, 3, 1, "acd.e"),
    (1, 3, -1, "a.bce"), (1, 3, 3, "a...e"), (1, 3, -3, "a...e"), (1, 3, 99, "a...e"), (0, 4, -65535, "....."),
    (2, 2, 1, "ab.de"), (0, 4, 0, "abcde"), (4, 4, -1, "abcd."),
])  # fmt: skip
def test_scrolling(top: int, bottom: int, count: int, lines: str) -> None:
    screen = _screen(*"abcde")
    blue = _blue(screen)
    screen.scroll_rows(top, bottom, count)
    assert "".join(line[0] for line in screen.lines()) == lines.replace(".", " ")
    assert [row.fill == blue for row in screen.rows] == [letter == "." for letter in lines]


@pytest.mark.parametrize(("width", "height"), [(6, 3), (3, 3), (9, 3), (6, 1), (6, 7), (9, 7), (1, 1), (300, 100)])
def test_resizing_keeps_the_top_left_and_fills_with_the_pens_background(width: int, height: int) -> None:
    screen = _screen("abcdef", "ghijkl", "mn")
    blue = _blue(screen)
    screen.set_code(0, 5, "f", mosh.with_wrap(Codebook.DEFAULT))
    screen.cursor_row, screen.cursor_col = 2, 5
    screen.resize(width, height)
    old = ["abcdef", "ghijkl", "mn    "]
    expected = [(old[row] if row < 3 else " " * 6)[:width] for row in range(height)]
    assert [line[:6] for line in screen.lines()] == expected
    assert (screen.width, screen.height, len(screen.rows)) == (width, height, height)
    assert (screen.cursor_row, screen.cursor_col) == (min(2, height - 1), min(5, width - 1))
    for row in range(height):
        for col in range(width):
            assert (screen.code_at(row, col)[1] == blue) == (row >= 3 or col >= 6)
            assert screen.cell(row, col).wrap == (width == 6 and (row, col) == (0, 5))


def test_a_copy_shares_rows_until_one_of_them_is_written_to() -> None:
    screen = _screen("one", "two")
    copy = screen.copy()
    assert copy == screen and all(a is b for a, b in zip(copy.rows, screen.rows))
    screen.set_code(0, 0, "O", Codebook.DEFAULT)
    copy.cursor_col = 3
    assert (copy.lines()[0], screen.lines()[0]) == ("one   ", "One   ")
    assert screen.cursor_col == 0 and copy != screen
    assert copy.rows[1] is screen.rows[1]


CHANGES: dict[str, Any] = {
    "rows": [Row("x", "\0", "\0"), Row("", "", "\0")], "window_title": "t", "clipboard": "c", "bell_count": 1,
    "width": 7, "height": 3, "cursor_row": 1, "cursor_col": 1, "cursor_visible": False, "reverse_video": True,
    "pen": "\1", "bracketed_paste": True, "mouse_mode": 1000, "mouse_encoding": 1006, "focus_events": True,
    "alternate_scroll": True, "copy_count": 1,
}  # fmt: skip


def test_the_table_of_changes_is_complete() -> None:
    assert sorted(CHANGES) == sorted(Framebuffer._VISIBLE)


@pytest.mark.parametrize("name", Framebuffer._VISIBLE)
def test_what_the_user_can_tell_makes_screens_differ(name: str) -> None:
    screen = Framebuffer(6, 2, Codebook())
    other = screen.copy()
    assert screen == other
    assert getattr(other, name) != CHANGES[name]
    setattr(other, name, CHANGES[name])
    assert screen != other and other != screen


@pytest.mark.parametrize(("name", "value"), [("icon_name", "i"), ("title_was_set", True)])
def test_what_the_user_cannot_tell_does_not(name: str, value: object) -> None:
    screen = Framebuffer(6, 2, Codebook())
    other = screen.copy()
    setattr(other, name, value)
    assert screen == other


def test_a_screen_is_no_other_thing() -> None:
    assert Framebuffer(6, 2, Codebook()) != "screen" and Row("", "", "\0") != ""


def test_a_reset_keeps_what_ris_keeps() -> None:
    screen = _screen("text")
    screen.icon_name, screen.title_was_set, screen.bell_count, screen.window_title = "icon", True, 3, "title"
    screen.cursor_col, screen.mouse_mode, screen.cursor_visible = 2, 1000, False
    _blue(screen)
    screen.reset()
    assert (screen.icon_name, screen.title_was_set, screen.bell_count, screen.window_title) == ("icon", True, 3, "")
    assert screen.lines() == [" " * 6] and screen.rows[0].fill == screen.pen == Codebook.DEFAULT
    assert (screen.cursor_col, screen.mouse_mode, screen.cursor_visible) == (0, 0, True)


def test_the_right_half_of_a_wide_cell_does_not_show() -> None:
    screen = _screen("漢" + NUL + "a")
    assert screen.lines() == ["漢a   "]
    assert (screen.cell(0, 0).wide, screen.cell(0, 1).wide, screen.cell(0, 1).contents) == (True, False, "")


# -- codebook --------------------------------------------------------------------------------------------------

RENDITIONS = st.builds(
    Rendition, st.integers(0, 511), st.none() | st.integers(0, 255) | st.integers(mosh.RGB, 2 * mosh.RGB - 1),
    st.none() | st.integers(0, 255),
)  # fmt: skip


@given(st.lists(RENDITIONS))
def test_a_rendition_is_found_again(renditions: list[Rendition]) -> None:
    book = Codebook()
    codes = [book.rendition_code(rendition) for rendition in renditions]
    for rendition, code in zip(renditions, codes):
        assert book.rendition(code) == book.rendition(mosh.with_wrap(code)) == rendition
        assert book.rendition_code(rendition) == code
    assert len(set(codes)) == len(set(renditions))


@given(st.lists(st.tuples(st.text(max_size=3), st.booleans(), st.booleans())))
def test_a_cluster_is_found_again(clusters: list[tuple[str, bool, bool]]) -> None:
    book = Codebook()
    for contents, wide, fallback in clusters:
        if contents in ("", NUL):
            continue
        code = book.cell_code(contents, wide, fallback)
        assert len(code) == 1
        assert (book.contents(code), book.is_wide(code), book.is_fallback(code)) == (contents, wide, fallback)


@pytest.mark.parametrize("contents", ["\U000fffff", "\U00100000", "\U00108000", "\U0010fffd", "\U00107fef"])
def test_characters_of_the_codebooks_own_plane_keep_their_meaning(contents: str) -> None:
    book = Codebook()
    decoy = book.cell_code("e\u0301", False, False)
    code = book.cell_code(contents, False, False)
    assert book.contents(code) == contents and book.contents(decoy) == "e\u0301"


def _colors(count: int) -> Iterator[Rendition]:
    return (Rendition(foreground=mosh.RGB | n) for n in range(count))


def _shown(screen: Framebuffer) -> list[tuple[str, tuple[int, int | None, int | None]]]:
    cells = (screen.cell(row, col) for row in range(screen.height) for col in range(screen.width))
    return [(cell.contents, cell.rendition) for cell in cells]


FEED = 500  # cells written between two occasions for a sweep, as by one feed of an emulator


def _sweep(book: Codebook) -> None:
    """Sweep now, due or not."""
    for table in (book._renditions, *book._clusters.values()):
        table._sweep_at = 0
    book.sweep_if_due()


def test_any_number_of_colours_passes_through_a_bounded_table() -> None:
    """Every rendition is right when it is drawn, and stays right as long as some screen shows it."""
    book = Codebook()
    screen, early = Framebuffer(40, 5, book), Framebuffer(40, 5, book)
    snapshots: list[tuple[Framebuffer, Any]] = []
    for n, rendition in enumerate(_colors(120_000)):
        code = book.rendition_code(rendition)
        assert book.rendition(code) == rendition
        screen.set_code(n // 40 % 5, n % 40, "x", code)
        if n == 100:
            early.set_code(0, 0, "e", code)
        if n % FEED == 0:
            book.sweep_if_due()
            assert len(book._renditions.values) <= mosh._SWEEP_FROM + FEED
        if n % 9_973 == 0:
            snapshots = [*snapshots[-3:], (screen.copy(), _shown(screen))]
    assert all(_shown(snapshot) == shown for snapshot, shown in snapshots)
    assert early.cell(0, 0).rendition.foreground == mosh.RGB | 100


@pytest.mark.parametrize("wide", [False, True])
def test_any_number_of_clusters_passes_through_a_bounded_table(wide: bool) -> None:
    book = Codebook()
    screen = Framebuffer(40, 5, book)
    base, marks = ("漢" if wide else "e"), [chr(n) for n in range(0x300, 0x370)]
    clusters = [base + a + b + c for a in marks[:55] for b in marks for c in marks[:20]]
    for n, contents in enumerate(clusters):
        code = book.cell_code(contents, wide, False)
        assert (book.contents(code), book.is_wide(code)) == (contents, wide)
        screen.set_code(n // 40 % 5, n % 40, code, Codebook.DEFAULT)
        if n % FEED == 0:
            book.sweep_if_due()
            assert len(book._clusters[wide].values) <= mosh._SWEEP_FROM + FEED
    assert len(clusters) > 100_000 > mosh._CLUSTER_CODES
    shown = [contents for contents, _ in _shown(screen)]
    assert sorted(shown) == sorted(clusters[-200:])


def test_a_sweep_frees_what_no_screen_uses() -> None:
    book = Codebook()
    screen, gone = Framebuffer(4, 1, book), Framebuffer(4, 1, book)
    kept, pen, dropped = (book.rendition_code(rendition) for rendition in _colors(3))
    mark = book.cell_code("e\u0301", False, False)
    book.cell_code("o\u0302", False, False)
    screen.set_code(0, 0, "x" + mark, mosh.with_wrap(kept) + Codebook.DEFAULT)
    screen.pen = pen
    gone.set_code(0, 0, "x", dropped)
    del gone
    gc.collect()
    _sweep(book)
    assert sorted(book._renditions.values) == sorted({Codebook.DEFAULT, kept, pen})
    assert [book.contents(code) for code in book._clusters[False].values] == ["e\u0301"]
    assert book.rendition_code(Rendition(foreground=mosh.RGB | 2)) not in (Codebook.DEFAULT, kept, pen)


def test_a_table_full_of_what_is_shown_stays_right_and_recovers() -> None:
    """What is too much reads as default or as U+FFFD; once the screen is cleared there is room again."""
    book = Codebook()
    size = mosh._CLUSTER_CODES
    screen = Framebuffer(size, 1, book)
    clusters = [f"e{chr(0x300 + n // 1000)}{chr(0x1000 + n % 1000)}" for n in range(size + 1)]
    codes = [book.cell_code(contents, False, False) for contents in clusters]
    screen.set_code(0, 0, "".join(codes[:size]), Codebook.DEFAULT * size)
    _sweep(book)
    assert book.contents(codes[size]) == book.cell_code("o\u0302", False, False) == mosh.INVALID_CHAR
    assert [screen.cell(0, col).contents for col in range(0, size, 97)] == clusters[:size:97]
    screen.reset()
    _sweep(book)
    assert book.contents(book.cell_code("o\u0302", False, False)) == "o\u0302"


def test_a_full_table_is_swept_however_much_of_it_was_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else what was once beyond it would read as U+FFFD for good."""
    monkeypatch.setattr(mosh, "_CLUSTER_CODES", 6_000)
    book, screen = Codebook(), None
    for count in (4_500, 6_000):
        for n in range(count):
            book.cell_code(f"e{n}", False, False)
        if screen is None:
            screen = Framebuffer(count, 1, book)
            screen.set_code(0, 0, "".join(book._clusters[False].values), Codebook.DEFAULT * count)
        book.sweep_if_due()
    assert book.contents(book.cell_code("o\u0302", False, False)) == "o\u0302"


def test_a_table_full_of_renditions_gives_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosh, "_RENDITION_CODES", 10)
    book = Codebook()
    codes = [book.rendition_code(rendition) for rendition in _colors(12)]
    assert codes[8] != Codebook.DEFAULT and codes[9:] == [Codebook.DEFAULT] * 3
    assert [book.rendition(code).foreground for code in codes[:9]] == [mosh.RGB | n for n in range(9)]


@settings(max_examples=25)
@given(st.lists(RENDITIONS, min_size=1, max_size=20), st.integers(0, 30))
def test_a_sweep_at_any_moment_changes_no_screen(renditions: list[Rendition], sweep_at: int) -> None:
    book = Codebook()
    screen = Framebuffer(20, 1, book)
    for n, rendition in enumerate(renditions):
        screen.set_code(0, n, "x", book.rendition_code(rendition))
        if n == sweep_at % len(renditions):
            before = _shown(screen)
            _sweep(book)
            assert _shown(screen) == before
    assert [key for _, key in _shown(screen)][: len(renditions)] == list(renditions)


def test_erased_cells_have_the_background_and_nothing_else() -> None:
    book = Codebook()
    pen = book.rendition_code(Rendition(mosh.BOLD | mosh.INVERSE, 3, 5))
    assert book.rendition(book.erased_code(pen)) == (0, None, 5)
    assert book.erased_code(Codebook.DEFAULT) == Codebook.DEFAULT
    _sweep(book)
    assert book.rendition(book.erased_code(book.rendition_code(Rendition(mosh.BOLD, 3, 6)))) == (0, None, 6)


@pytest.mark.parametrize(("rendition", "sgr"), [
    (Rendition(), "0"), (Rendition(mosh.BOLD), "0;1"), (Rendition(foreground=7, background=0), "0;37;40"),
    (Rendition(mosh.INVISIBLE | mosh.ITALIC, 8, 255), "0;3;8;38;5;8;48;5;255"),
    (Rendition(mosh.UNDERLINED | mosh.BLINK | mosh.INVERSE), "0;4;5;7"),
    (Rendition(0, mosh.RGB | 0x010203, mosh.RGB), "0;38;2;1;2;3;48;2;0;0;0"),
])  # fmt: skip
def test_select_graphic_rendition(rendition: Rendition, sgr: str) -> None:
    assert rendition.sgr() == f"\x1b[{sgr}m"
