"""Section 14: predictions and the notification bar, step by step as stock mosh makes them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mosh
import vectors


class EngineDriver:
    """Runs a prediction engine over a remote terminal as stock's client does.

    A key is predicted on the screen drawn last, by which predictions are judged just before. Our client takes a newer
    screen for the one and the server's own for the other.
    """

    def __init__(self, vector: vectors.Vector) -> None:
        self.remote = mosh.Emulator(vector["cols"], vector["rows"])
        mode = mosh.PredictionMode(vector["mode"])
        self.engine = mosh.PredictionEngine(mode, vector["overwrite"], self.remote.framebuffer.codebook)
        self.shown = self.remote.framebuffer.copy()
        self.now = 1_000_000
        self.numbers = {"last_sent_num": 0, "echo_ack": 0, "send_interval_ms": vector["start_send_interval_ms"]}
        self.engine.observe(**self.numbers)
        self.remote.feed(bytes.fromhex(vector["start_remote_hex"]))

    def observe(self, **numbers: int) -> None:
        """The transport has news."""
        self.numbers.update(numbers)
        self.engine.observe(**self.numbers)

    def type(self, keys: bytes) -> None:
        """One read of keystrokes."""
        for key in keys:
            self.engine.cull(self.shown, self.now)
            self.engine.key(key, self.shown, self.now)

    def draw(self) -> None:
        """One frame."""
        self.shown = self.remote.framebuffer.copy()
        self.engine.cull(self.shown, self.now)
        self.engine.apply(self.shown)


def _typing_at_a_prompt(mode: str, interval_ms: int, prompt: bytes = b"$ ") -> EngineDriver:
    driver = EngineDriver(
        {
            "cols": 20,
            "rows": 3,
            "mode": mode,
            "overwrite": False,
            "start_send_interval_ms": interval_ms,
            "start_remote_hex": prompt.hex(),
        }
    )
    driver.draw()
    return driver


def test_a_confirmed_epoch_shows_typing_at_once() -> None:
    driver = _typing_at_a_prompt("always", 50)
    driver.type(b"l")
    driver.draw()
    assert driver.shown.lines()[0].rstrip() == "$"
    driver.remote.feed(b"l")
    driver.observe(echo_ack=1)
    driver.draw()
    driver.observe(last_sent_num=1)
    driver.type(b"s")
    driver.draw()
    assert driver.shown.lines()[0].rstrip() == "$ ls"


def test_when_a_prediction_was_wrong_the_keys_under_way_are_predicted_anew() -> None:
    """A user who types on need not pause until predictions start at the right place again."""
    driver = _typing_at_a_prompt("always", 50)
    for sent_num, key in enumerate((b"a", b"s", b"s"), 1):
        driver.type(key)
        driver.observe(last_sent_num=sent_num)
    driver.remote.feed(b"\b\b> x")                        # another prompt, and the program makes an x of the a
    driver.observe(echo_ack=1)
    driver.draw()
    assert [(cursor.row, cursor.col) for cursor in driver.engine.cursors] == [(0, 5)]
    assert driver.shown.lines()[0].rstrip() == "> x"        # nobody sees it before it has come true
    driver.remote.feed(b"s")
    driver.observe(echo_ack=2)
    driver.draw()
    driver.type(b";")
    driver.draw()
    assert driver.shown.lines()[0].rstrip() == "> xss;"


def test_keys_under_way_are_not_predicted_anew_when_nobody_knows_what_went_before() -> None:
    driver = _typing_at_a_prompt("always", 50)
    driver.type(b"ab")
    driver.engine.reset()                                   # a paste
    driver.type(b"c")
    driver.remote.feed(b"*")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    assert not driver.engine.is_waiting


def test_of_many_keys_under_way_the_newest_are_predicted_anew() -> None:
    driver = _typing_at_a_prompt("always", 50)
    driver.type(b"x")
    driver.observe(last_sent_num=1)
    driver.type(b"\x1bOD" * 1_000)
    driver.remote.feed(b"*" * 17)
    driver.observe(echo_ack=1)
    driver.draw()
    assert len(driver.engine._keys) == mosh.KEYS_LIMIT
    assert driver.engine.cursors[-1].col == 0


def test_what_is_predicted_looks_like_what_has_come_of_what_was_typed_before() -> None:
    driver = _typing_at_a_prompt("always", 50)
    driver.type(b"ab")
    driver.observe(last_sent_num=1)
    driver.type(b"c")
    driver.remote.feed(b"\x1b[31mab")
    driver.observe(last_sent_num=2, echo_ack=1)
    driver.draw()
    cell = driver.shown.cell(0, 4)
    assert (cell.contents, cell.rendition.foreground) == ("c", 1)


def test_on_a_very_slow_link_letters_are_underlined_and_blanks_are_not() -> None:
    driver = _typing_at_a_prompt("always", 100)
    driver.type(b"a")
    driver.remote.feed(b"a")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    driver.type(b" b")
    driver.draw()
    shown = [(cell.contents, cell.rendition.attributes) for cell in (driver.shown.cell(0, col) for col in (2, 3, 4))]
    assert shown == [("a", 0), (" ", 0), ("b", mosh.UNDERLINED)]


def test_what_a_deletion_brings_to_the_right_edge_is_not_predicted() -> None:
    driver = _typing_at_a_prompt("experimental", 50, b"$ abcdefghijklmnopqr\x1b[1;4H")
    driver.type(b"\x7f")
    driver.draw()
    assert driver.shown.lines()[0] == "$ bcdefghijklmnopq" + "qr"


@pytest.mark.parametrize(
    ("typed", "epochs"), [(b"\x1b[5~", 1), (b"\x1bx", 1), (b"\x01", 1), (b"\x1b]11;rgb:0/0/0\x07", 0), (b"\x7f", 0)]
)
def test_what_a_program_may_answer_in_any_way_begins_an_epoch(typed: bytes, epochs: int) -> None:
    driver = _typing_at_a_prompt("always", 50)
    before = driver.engine.epoch
    driver.type(typed)
    assert driver.engine.epoch == before + epochs


def test_what_is_shown_on_a_slow_link_is_not_taken_back_when_it_becomes_fast() -> None:
    driver = _typing_at_a_prompt("adaptive", 50)
    driver.type(b"a")
    driver.observe(send_interval_ms=10)
    driver.draw()
    assert driver.engine.shows_slow_link
    driver.remote.feed(b"a")
    driver.observe(last_sent_num=1, echo_ack=1)
    for shows in (True, False):  # what is settled in one look counts in the next
        driver.draw()
        assert driver.engine.shows_slow_link == shows
    assert not driver.engine.is_waiting


def test_a_glitch_is_cured_by_quick_echoes_over_some_time_not_by_a_burst_of_them() -> None:
    driver = _typing_at_a_prompt("adaptive", 10)
    driver.type(b"a")
    driver.now += mosh.GLITCH_MS
    driver.draw()
    glitches = [driver.engine.glitch]
    for echo_ack, (key, wait_ms) in enumerate(((b"a", 0), (b"b", 10), (b"c", 10), (b"d", 140)), 1):
        if key != b"a":
            driver.type(key)
        driver.now += wait_ms
        driver.remote.feed(key)
        driver.observe(last_sent_num=echo_ack, echo_ack=echo_ack)
        driver.draw()
        glitches.append(driver.engine.glitch)
    assert glitches == [10, 10, 9, 9, 8]


WIDE_STEPS = [
    (b"\x7f", "$ \u6f22\u5b57xyz", 6),
    (b"\x7f\x7f", "$ \u6f22xyz", 4),
    (b"\x7f\x7f\x7f\x7f", "$xyz", 1),
    (b"\x1bOD\x1bOD", "$ \u6f22\u5b57axyz", 4),
    (b"\x1b[D\x1b[D\x1b[D\x1b[C", "$ \u6f22\u5b57axyz", 4),
    (b"\x1b[D\x1b[D\x7f", "$ \u5b57axyz", 2),
    (b"\x1b[D\x1b[Db\x1b[C\x7f", "$ \u6f22baxyz", 5),
]


@pytest.mark.parametrize(("keys", "text", "col"), WIDE_STEPS)
def test_backspace_and_arrows_take_a_wide_character_as_one(keys: bytes, text: str, col: int) -> None:
    driver = EngineDriver(
        {
            "cols": 20,
            "rows": 3,
            "mode": "always",
            "overwrite": False,
            "start_send_interval_ms": 100,
            "start_remote_hex": "$ \u6f22\u5b57xyz\x1b[3D".encode().hex(),
        }
    )
    driver.draw()
    driver.type(b"a")
    driver.remote.feed(b"\x1b[@a")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    driver.type(keys)
    driver.draw()
    assert (driver.shown.lines()[0].rstrip(), driver.shown.cursor_col) == (text, col)


@pytest.mark.parametrize("key", [b"\x7f", b"\x1bOD"])
def test_where_a_key_at_the_edge_leads_is_not_told_before_it_has_shown(key: bytes) -> None:
    """A shell goes on in the row above; those keys under way must not be missing when the next one is predicted."""
    driver = EngineDriver(
        {
            "cols": 10,
            "rows": 3,
            "mode": "always",
            "overwrite": False,
            "start_send_interval_ms": 100,
            "start_remote_hex": b"$ 34567890".hex(),
        }
    )
    driver.remote.feed(b"\r\n")
    driver.draw()
    driver.type(b"a")
    driver.remote.feed(b"a")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    driver.type(b"\x7f")                                     # to the edge
    driver.observe(last_sent_num=2)
    driver.type(key)                                         # and beyond, twice
    driver.observe(last_sent_num=3)
    driver.type(key)
    driver.observe(last_sent_num=4)
    driver.remote.feed(b"\b\x1b[K")
    driver.observe(echo_ack=2)
    driver.draw()
    driver.remote.feed(b"\x1b[1;10H")                        # the first of these two keys has shown
    driver.observe(echo_ack=3)
    driver.draw()
    assert (driver.shown.cursor_row, driver.shown.cursor_col) == (0, 9)
    driver.type(b"\x1bODx")
    driver.draw()
    assert (driver.shown.cursor_row, driver.shown.cursor_col) == (0, 9)
    assert "x" not in "".join(driver.shown.lines())


FRAME = b"$ abc      |right\x1b[1;6H"                      # the cursor behind the c, a window's frame in column 11


@pytest.mark.parametrize(
    ("keys", "echo", "more", "row", "text"),
    [
        (b"de", b"d", b"f", FRAME, "$ abcdef   |right"),
        (b"de", b"d", b"\x7f\x7f\x7f", FRAME, "$ ab       |right"),
        (b"de\x7f", b"d", b"\x7f\x7f", FRAME, "$ ab       |right"),
        (b"de", b"d", b"\x1bOD\x1bODxy", FRAME, "$ abcxyde  |right"),
        (b"de", b"d", b"fghijk", FRAME, "$ abcdefghijkight"),
        (b"de", b"d", b"f", b"$ abcdefg\x1b[1;6H", "$ abcdfg"[:6] + "efg"),
        (b"xy", b"x", b"\x7f", b"$ abcdefg\x1b[1;6H", "$ abcx fg"),
        (b"xy", b"\x1b[@x", b"z", b"$ abcdefg\x1b[1;6H", "$ abcxyzdefg"),
        (b"xy", b"\x1b[@x", b"\x7f", b"$ abcdefg\x1b[1;6H", "$ abcxdefg"),
    ],
)
def test_what_typing_does_not_push_on_stays_once_that_has_been_seen(
    keys: bytes, echo: bytes, more: bytes, row: bytes, text: str
) -> None:
    driver = EngineDriver(
        {
            "cols": 20,
            "rows": 3,
            "mode": "always",
            "overwrite": False,
            "start_send_interval_ms": 50,
            "start_remote_hex": row.hex(),
        }
    )
    driver.draw()
    for num, key in enumerate(keys):
        driver.type(bytes([key]))
        driver.observe(last_sent_num=num + 1)
    driver.remote.feed(echo)
    driver.observe(echo_ack=1)
    driver.draw()
    for num, typed in enumerate(re.findall(rb"\x1bO.|.", more, re.DOTALL), start=len(keys) + 1):
        driver.type(typed)
        driver.observe(last_sent_num=num)
        driver.draw()
    assert driver.shown.lines()[0].rstrip() == text


KEYS = st.sampled_from(
    [*(key.encode() for key in ("a", "b", " ", "\u00e9", "\u6f22", "\u0301")), b"\x7f", b"\x1bOC", b"\x1b[D", b"\r"]
)
REMOTE = st.sampled_from(
    ["ab", "\u6f22\u5b57", "\U0001f600", "e\u0301", "\x1b[C\u0301", "\x1b[2;3H", "\x1b[1;7H", "\x1b[K", "\r\n"]
)
STEPS = st.tuples(st.lists(KEYS, max_size=4), st.booleans(), st.lists(REMOTE, max_size=2))


def _in_insert_mode(mode: str, overwrite: bool) -> EngineDriver:
    return EngineDriver(
        {
            "cols": 12,
            "rows": 3,
            "mode": mode,
            "overwrite": overwrite,
            "start_send_interval_ms": 100,
            "start_remote_hex": b"\x1b[4h".hex(),
        }
    )


@settings(max_examples=300)
@given(st.sampled_from(["always", "experimental"]), st.booleans(), st.lists(STEPS, min_size=2, max_size=12))
@example("always", False, [([], True, ["\u6f22\u5b57 ab\x1b[H"]), ([b"q"], True, []), ([b"r", b"s"], False, [])])
def test_the_users_terminal_shows_the_predictions_as_they_are_meant(
    mode: str, overwrite: bool, steps: list[tuple[list[bytes], bool, list[str]]]
) -> None:
    """Among wide characters and marks, too: a frame leaves the terminal in no doubt about columns."""
    driver = _in_insert_mode(mode, overwrite)
    terminal, typed = mosh.Emulator(12, 3), b""
    for num, (keys, echoed, remote) in enumerate(steps, start=1):
        driver.type(b"".join(keys))
        typed += b"".join(keys)
        if echoed:
            driver.remote.feed(typed.replace(b"\x7f", b"\b\x1b[P").replace(b"\x1bO", b"\x1b["))
            typed = b""
        driver.remote.feed("".join(remote).encode())
        driver.observe(last_sent_num=num, echo_ack=num if echoed else driver.numbers["echo_ack"])
        before = driver.shown
        driver.draw()
        terminal.feed(mosh.Display(hide_cursor=True).frame(before, driver.shown))
        assert vectors.shown(terminal.framebuffer) == vectors.shown(driver.shown)


@settings(max_examples=300)
@given(st.sampled_from(["always", "experimental"]), st.booleans(), st.lists(STEPS, min_size=2, max_size=12))
@example("always", False, [([b"a"], True, []), ([b"b"], False, []), ([], False, ["\x1b[1;7H"]), ([b"c"], False, [])])
def test_a_letter_whose_place_is_certain_is_predicted_there(
    mode: str, overwrite: bool, steps: list[tuple[list[bytes], bool, list[str]]]
) -> None:
    driver = _in_insert_mode(mode, overwrite)
    typed, num = b"", 0
    for keys, echoed, remote in steps:
        for key in keys:
            attr = driver.engine.next_letter(driver.shown)
            row, col = driver.shown.cursor_row, driver.shown.cursor_col
            driver.type(key)
            num += 1
            driver.observe(last_sent_num=num)
            driver.draw()
            if attr is not None and len(key) == 1 and key.isalpha():
                assert driver.shown.code_at(row, col)[0] == key.decode()
                assert (driver.shown.cursor_row, driver.shown.cursor_col) == (row, col + 1)
        typed += b"".join(keys)
        if echoed:
            driver.remote.feed(typed.replace(b"\x7f", b"\b\x1b[P").replace(b"\x1bO", b"\x1b["))
            typed = b""
        driver.remote.feed("".join(remote).encode())
        driver.observe(echo_ack=num if echoed else driver.numbers["echo_ack"])
        driver.draw()


class Searching(mosh.PredictionEngine):
    """Looks at every turn for what typing does not push on."""

    _searched = property(lambda _engine: None, lambda _engine, _screen: None)


@settings(max_examples=300)
@given(
    st.sampled_from([b"$ ", b"$ abc\x1b[3G", b"$ \x1b[8G|\x1b[3G"]),
    st.lists(
        st.sampled_from([*b"abc\x7f"])
        | st.tuples(st.sampled_from([b"a", b"b", b"abc", b"\b", b"\b\x1b[P"]), st.integers(0, 2)),
        max_size=14,
    ),
)
@example(b"$ abc\x1b[3G", [(b"c", 2), *b"aa", (b"\b", 1), *b"bb", (b"ab", 2), *b"\x7fb", (b"\b", 1)])
def test_to_look_once_per_screen_for_what_is_not_pushed_on_is_enough(
    start: bytes, steps: list[int | tuple[bytes, int]]
) -> None:
    """`steps`: a key, or what the program writes and how many more keys it has had time to answer."""
    frames = []
    for kind in (mosh.PredictionEngine, Searching):
        remote = mosh.Emulator(12, 2)
        engine = kind(mosh.PredictionMode.ALWAYS, False, remote.framebuffer.codebook)
        remote.feed(start)
        newest, sent, echo_ack = remote.framebuffer.copy(), 0, 0
        frames.append([_draw_on(newest, engine)])
        for step in steps:
            if isinstance(step, int):
                engine.key(step, _draw_on(newest, engine), 0)
                sent += 1
            else:
                remote.feed(step[0])
                newest, echo_ack = remote.framebuffer.copy(), min(sent, echo_ack + step[1])
            engine.observe(last_sent_num=sent, echo_ack=echo_ack, send_interval_ms=50)
            frames[-1].append(_draw_on(newest, engine))
    assert list(map(vectors.shown, frames[0])) == list(map(vectors.shown, frames[1]))


def _draw_on(newest: mosh.Framebuffer, engine: mosh.PredictionEngine) -> mosh.Framebuffer:
    engine.cull(newest, 0)
    screen = newest.copy()
    engine.apply(screen)
    return screen


def test_a_link_that_has_become_fast_shows_no_more_letters_once_the_last_one_is_settled() -> None:
    driver = _typing_at_a_prompt("adaptive", 50)
    driver.type(b"a")
    driver.remote.feed(b"a")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    assert driver.engine.next_letter(driver.shown) is not None
    driver.type(b"b")
    driver.remote.feed(b"b")
    driver.observe(last_sent_num=2, echo_ack=2, send_interval_ms=10)
    driver.draw()
    assert driver.engine.next_letter(driver.shown) is None
    driver.type(b"c")
    driver.draw()
    assert driver.shown.lines()[0].rstrip() == "$ ab"


@pytest.mark.parametrize(
    ("remote", "typed", "certain"),
    [
        *((b"", keys, True) for keys in (b"", b"b", b"\x7f", b"b" * 15)),
        *((b"", keys, False) for keys in (b"\x1b", b"\x1b[", b"\xc3", b"\r", b"b" * 16)),
        (b"\x1b7\x1b[1;19H|\x1b8", b"", False),
    ],
)
def test_when_the_place_of_the_next_letter_is_certain(remote: bytes, typed: bytes, certain: bool) -> None:
    """Behind a key that is whole, in a row with room, of 20 columns, and where nothing has to be pushed on."""
    driver = _typing_at_a_prompt("always", 50)
    driver.type(b"a")
    driver.draw()
    assert driver.engine.next_letter(driver.shown) is None
    driver.remote.feed(b"a" + remote)
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    driver.type(typed)
    driver.draw()
    assert (driver.engine.next_letter(driver.shown) is not None) == certain


# What differs on purpose in the engine behind a vector's last frame, which shows the same.
ON_PURPOSE: dict[str, dict[str, object]] = {
    "backspace-col0": {"prediction_epoch": 4, "cursors": [[0, 0, 2], [0, 0, 3]]},   # two keys went beyond the edge
}


def _check_frame(driver: EngineDriver, expect: dict[str, Any]) -> None:
    assert vectors.actual_cells(driver.shown) == vectors.expected_cells(expect["screen"])
    assert [driver.shown.cursor_row, driver.shown.cursor_col] == expect["cursor"]
    engine = driver.engine
    assert {
        "prediction_epoch": engine.epoch,
        "confirmed_epoch": engine.confirmed_epoch,
        "flagging": engine.underlines,
        "srtt_trigger": engine.shows_slow_link,
        "glitch_trigger": engine.glitch,
        "cursors": [[cursor.row, cursor.col, cursor.until] for cursor in engine.cursors],
        "active_cell_count": engine.active_cell_count,
    } == expect["engine"]


@pytest.mark.parametrize("vector", vectors.load("prediction"), ids=lambda vector: vector["id"])
def test_stock_prediction_vector(vector: vectors.Vector) -> None:
    driver = EngineDriver(vector)
    for step in vector["steps"]:
        ((action, value),) = step.items()
        if action == "draw":
            driver.draw()
            ours = ON_PURPOSE.get(vector["id"], {}) if step is vector["steps"][-1] else {}
            _check_frame(driver, {**value, "engine": {**value["engine"], **ours}})
        elif action == "keys_hex":
            driver.type(bytes.fromhex(value))
        elif action == "bulk_read":
            driver.engine.reset()
        elif action == "remote_hex":
            driver.remote.feed(bytes.fromhex(value))
        elif action == "remote_resize":
            driver.remote.resize(*value)
        elif action == "advance_ms":
            driver.now += value
        elif action == "last_sent_state":
            driver.observe(last_sent_num=value)
        else:
            driver.observe(**{action: value})


@pytest.mark.parametrize("vector", vectors.load("notification"), ids=lambda vector: vector["id"])
def test_stock_notification_vector(vector: vectors.Vector) -> None:
    given, expect = vector["input"], vector["expect"]
    screen = mosh.Emulator(given["cols"], given["rows"]).framebuffer
    screen.cursor_row = given.get("cursor_row", 1)
    now = 100_000_000
    bar = mosh.NotificationBar(now, mosh.EscapeKey(None).name)
    bar.last_heard_at, bar.last_acked_at = now - given["ms_since_heard"], now - given["ms_since_acked"]
    if "message" in given:
        bar.set_message(given["message"], now, hint=given["show_quit_hint"])
    bar.draw(screen, now)
    assert vectors.actual_cells(screen) == vectors.expected_cells(expect["screen"])
    assert screen.cursor_visible == expect["cursor_visible"]


def test_the_bar_takes_wide_characters_and_combining_marks() -> None:
    screen = mosh.Emulator(12, 1).framebuffer
    bar = mosh.NotificationBar(0, "")
    bar.set_message("\u6f22e\u0301\u0302x\u6f22!", 0)
    bar.draw(screen, 0)
    assert screen.lines() == ["mosh: \u6f22e\u0301\u0302x\u6f22"]


@pytest.mark.parametrize("mode", [mode for mode in mosh.PredictionMode if mode is not mosh.PredictionMode.EXPERIMENTAL])
def test_a_password_is_never_shown(mode: mosh.PredictionMode) -> None:
    """Save in experimental mode, which shows everything at once, by design."""
    driver = _typing_at_a_prompt(mode.value, 250, b"Password: ")
    for i, key in enumerate(b"secret"):
        driver.type(bytes([key]))
        driver.observe(last_sent_num=i + 1)
        driver.now += 60
        driver.draw()
        assert driver.shown.lines()[0].rstrip() == "Password:"
    driver.observe(echo_ack=6)
    driver.draw()
    assert driver.shown.lines()[0].rstrip() == "Password:"


@pytest.mark.parametrize("mode", ["adaptive", "always"])
@pytest.mark.parametrize("prompt", [b"\r\nPassword: ", b" Password: ", b"\r\x1b[KPw:", b"\x1b[2J\x1b[H"])
def test_a_password_is_not_shown_either_where_a_key_was_echoed_before_the_prompt_came(mode: str, prompt: bytes) -> None:
    """Not even for a round trip, and not at a prompt that ends in the very column where the key left the cursor."""
    driver = _typing_at_a_prompt(mode, 100)
    driver.type(b"y")
    driver.remote.feed(b"y")
    driver.observe(last_sent_num=1, echo_ack=1)
    driver.draw()
    driver.remote.feed(prompt)
    driver.draw()
    before = vectors.shown(driver.shown)
    for i, key in enumerate(b"secret", start=2):
        assert driver.engine.next_letter(driver.shown) is None
        driver.type(bytes([key]))
        driver.observe(last_sent_num=i)
        driver.draw()
        assert vectors.shown(driver.shown) == before


@pytest.mark.parametrize("mode", ["adaptive", "always"])
def test_a_password_is_not_shown_either_where_the_echo_ack_is_late(mode: str) -> None:
    """The prompt has come with the echo of the key before, and what says so of the key has been lost."""
    driver = _typing_at_a_prompt(mode, 100)
    for num, echoed in enumerate((b"a", b"y"), start=1):
        driver.type(echoed)
        driver.observe(last_sent_num=num)
        driver.remote.feed(echoed)
        driver.observe(echo_ack=1)
        driver.draw()
    driver.remote.feed(b"\r\nPassword: ")
    driver.draw()
    before = driver.shown.lines()
    for num, key in enumerate(b"secret", start=3):
        assert driver.engine.next_letter(driver.shown) is None
        driver.type(bytes([key]))
        driver.observe(last_sent_num=num)
        driver.draw()
        assert driver.shown.lines() == before


@pytest.mark.parametrize("under_way", [0, 1, 3])
@pytest.mark.parametrize("password", ["s3*cret", "*s3cret", "s**cret", "***"])
def test_a_password_is_not_shown_where_a_mask_is_shown_for_it(password: str, under_way: int) -> None:
    """Not even if it contains what the program shows for each of its letters."""
    driver = _typing_at_a_prompt("always", 100, b"Password: ")
    for num, key in enumerate(password.encode(), start=1):
        driver.type(bytes([key]))
        driver.observe(last_sent_num=num)
        driver.draw()
        assert driver.shown.lines()[0].rstrip().removeprefix("Password:").strip(" *") == ""
        if num > under_way:
            driver.remote.feed(b"*")
            driver.observe(echo_ack=num - under_way)
            driver.draw()
            assert driver.shown.lines()[0].rstrip().removeprefix("Password:").strip(" *") == ""


def test_an_escape_key_of_the_users_own() -> None:
    assert (mosh.EscapeKey(None).name, mosh.EscapeKey(b"").name) == ("Ctrl-^", "")
    printable = mosh.EscapeKey(b"~")
    assert printable.name == '"~"'
    assert printable.starts_command(ord("~"), True) and not printable.starts_command(ord("~"), False)
    assert mosh.EscapeKey(b"\x03").key == mosh.DEFAULT_ESCAPE_KEY
    assert mosh.EscapeKey(b"\x01").is_pass_key(ord("a")) and mosh.EscapeKey(b"\x01").is_pass_key(ord("A"))


@pytest.mark.parametrize(("heard_at", "acked_at"), [(0, 0), (8_000, 0)])
def test_the_bar_is_looked_at_as_soon_as_it_has_something_to_say(heard_at: int, acked_at: int) -> None:
    bar = mosh.NotificationBar(0, "Ctrl-^")
    bar.last_heard_at, bar.last_acked_at = heard_at, acked_at
    at = bar.next_timeout(heard_at)
    assert bar.text(at - 1) == "" != bar.text(at)
