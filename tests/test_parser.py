"""Section 10: the state machine, against a slow model that knows no runs and no tables shared between states."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mosh
from terminal_streams import terminal_bytes

Action = tuple[str, ...]
SEQUENCE = re.compile(r"\x1b\[([<-?]?)([0-9;]*)(.*)", re.DOTALL)


class Recorder:
    """Keeps actions; neighbouring printed runs become one, since a feed may cut them anywhere."""

    def __init__(self) -> None:
        self.actions: list[Action] = []

    def add(self, *action: str) -> None:
        """Keep one more."""
        if action[0] == "print" and self.actions and self.actions[-1][0] == "print":
            action = ("print", self.actions.pop()[1] + action[1])
        self.actions.append(action)

    def add_function(self, function: str) -> None:
        """Keep what a control function is, in the form that the parser has for it."""
        sequence = SEQUENCE.fullmatch(function)
        if function.startswith("\x1b]"):
            self.add("osc", function[2:-1])
            assert function[-1] == "\a"
        elif sequence:
            self.add("csi", _known(sequence[1] + sequence[3]), sequence[2][:100])
        elif function.startswith("\x1b"):
            self.add("esc", _known(function[1:]))
        elif function == "\x7f":
            self.add("print", function)
        else:
            for char in function:
                self.add("execute", char)


def _known(key: str) -> str:
    """Return the key of a function, empty if it is too long or ends in a character beyond U+00FF."""
    return key if len(key) <= 8 and key[-1] <= "\xff" else ""


def _parse(parser: mosh.Parser, text: str, recorder: Recorder) -> None:
    pieces = parser.parse(text)
    assert len(pieces) % 2 == 0
    for run, function in zip(pieces[::2], pieces[1::2]):
        assert not re.search("[\\x00-\\x1f\\x7f-\\x9f]", run)
        if run:
            recorder.add("print", run)
        sgrs = re.fullmatch(r"(?:\x1b\[[0-9;]*m)+", function)
        for each in function[:-1].split("m") if sgrs else [function] if function else []:
            recorder.add_function(each + "m" * bool(sgrs))


def _parsed(*feeds: str) -> list[Action]:
    parser, recorder = mosh.Parser(), Recorder()
    for text in feeds:
        _parse(parser, text, recorder)
    return recorder.actions


def test_a_stream_becomes_text_and_control_functions() -> None:
    assert mosh.Parser().parse("ls\r\n\x1b[1;31mred\x1b]2;title\x07\x1b7") == [
        "ls", "\r\n", "", "\x1b[1;31m", "red", "\x1b]2;title\a", "", "\x1b7", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(("written", "function"), [
    ("\x9b3A", "\x1b[3A"), ("\x1b[3\x7fA", "\x1b[3A"), ("\x9d0;t\x9c", "\x1b]0;t\a"),
    ("\x1b[?1 h", "\x1b[?1 h"), ("\x1b[1m\x1b[m\x1b[4;5m", "\x1b[1m\x1b[m\x1b[4;5m"),
])  # fmt: skip
def test_a_function_has_one_form_however_it_was_written(written: str, function: str) -> None:
    assert [piece for piece in mosh.Parser().parse(written) if piece] == [function]


def test_a_stream_becomes_actions() -> None:
    assert _parsed("ls\r\n\x1b[1;31mred\x1b]2;title\x07\x1b7") == [
        ("print", "ls"), ("execute", "\r"), ("execute", "\n"), ("csi", "m", "1;31"), ("print", "red"),
        ("osc", "2;title"), ("esc", "7"),
    ]  # fmt: skip


# -- the slow model --------------------------------------------------------------------------------------------


class SlowParser:
    """The parser of ECMA-48 as stock mosh has it, one character and one question at a time."""

    def __init__(self, sink: Recorder) -> None:
        self.sink = sink
        self.state = "ground"
        self.collected = self.parameters = self.string = ""

    def take(self, char: str) -> None:
        """Take one character."""
        code = ord(char)
        if code in (0x18, 0x1A, 0x99, 0x9A) or 0x80 <= code <= 0x8F or 0x91 <= code <= 0x97:
            self._leave()
            self.sink.add("execute", char)
            self.state = "ground"
        elif code == 0x9C:
            self._go("ground")
        elif code == 0x1B:
            self._go("escape")
        elif code == 0x9B:
            self._go("csi entry")
        elif code == 0x9D:
            self._go("osc")
        elif code in (0x90, 0x98, 0x9E, 0x9F):
            self._go("swallow")
        else:
            self._by_state(char, "A" if code >= 0xA0 else char)

    def _leave(self) -> None:
        if self.state == "osc":
            self.sink.add("osc", self.string)

    def _go(self, state: str) -> None:
        self._leave()
        self.state = state
        if state in ("escape", "csi entry"):
            self.collected = self.parameters = ""
        if state == "osc":
            self.string = ""

    def _collect(self, char: str) -> None:
        if len(self.collected) < 8:
            self.collected += char

    def _finish(self, char: str, kind: str) -> None:
        key = self.collected + char if len(self.collected) < 8 and ord(char) <= 0xFF else ""
        if kind == "esc":
            self.sink.add("esc", key)
        else:
            self.sink.add("csi", key, self.parameters)
        self.state = "ground"

    def _by_state(self, char: str, kind: str) -> None:
        control = ord(kind) < 0x20
        if self.state == "swallow":
            return
        if self.state == "osc":
            if kind == "\x07":
                self._go("ground")
            elif not control and len(self.string) < 16384:
                self.string += char
        elif control:
            self.sink.add("execute", char)
        elif self.state == "ground":
            self.sink.add("print", char)
        elif kind != "\x7f":
            self._in_sequence(char, kind)

    def _in_sequence(self, char: str, kind: str) -> None:
        intermediate, digit, final = " " <= kind <= "/", kind in "0123456789;", kind >= "@"
        if self.state == "escape":
            if intermediate:
                self._collect(char)
                self.state = "escape intermediate"
            elif kind == "[":
                self._go("csi entry")
            elif kind == "]":
                self._go("osc")
            elif kind in "PX^_":
                self._go("swallow")
            else:
                self._finish(char, "esc")
        elif self.state == "escape intermediate":
            if intermediate:
                self._collect(char)
            else:
                self._finish(char, "esc")
        elif self.state == "csi ignore":
            self.state = "ground" if final else "csi ignore"
        elif final:
            self._finish(char, "csi")
        elif intermediate:
            self._collect(char)
            self.state = "csi intermediate"
        elif digit and self.state in ("csi entry", "csi param"):
            self.parameters += char if len(self.parameters) < 100 else ""
            self.state = "csi param"
        elif kind in "<=>?" and self.state == "csi entry":
            self._collect(char)
            self.state = "csi param"
        else:
            self.state = "csi ignore"


def _parsed_slowly(text: str) -> list[Action]:
    recorder = Recorder()
    parser = SlowParser(recorder)
    for char in text:
        parser.take(char)
    return recorder.actions


# -- fast is as good as slow -----------------------------------------------------------------------------------

# Introducers are frequent, so that the states behind them are reached; all kinds of characters may follow.
INTRODUCER = st.sampled_from(
    ["\x1b", "\x1b[", "\x1b]", "\x1bP", "\x9b", "\x9d", "\x90", "\x9c", "\x1b[?", "\x1b#", "\x07"]
)
SHORT = st.characters(max_codepoint=0xA5)
ANY = st.characters()
NEARLY = st.builds(
    "\x1b[{}{}{}{}".format, st.sampled_from(["", "?", ">", "<=", ":"]), st.text("0123456789;", max_size=8),
    st.text(" !/?:\n\x7f0", max_size=3), st.sampled_from("@A~m[é\x18\x1b\x9c漢"),
)  # fmt: skip
STREAM = st.lists(INTRODUCER | SHORT | ANY | NEARLY, max_size=40).map("".join)


@settings(max_examples=600)
@given(STREAM)
def test_any_characters_give_the_actions_of_the_slow_model(text: str) -> None:
    assert _parsed(text) == _parsed_slowly(text)


@settings(max_examples=300)
@given(terminal_bytes())
def test_realistic_streams_give_the_actions_of_the_slow_model(data: bytes) -> None:
    text = mosh.Utf8Decoder().decode(data)
    assert _parsed(text) == _parsed_slowly(text)


PREFIXES = [
    *("", "\x1b", "\x1b#", "\x1b[", "\x1b[1", "\x1b[?", "\x1b[?25", "\x1b[1 ", "\x1b[:"),
    *("\x1b]0;t", "\x1bPq", "\x1b_"),
]


@pytest.mark.parametrize("prefix", PREFIXES, ids=ascii)
def test_every_state_with_every_character(prefix: str) -> None:
    """All of U+0000 to U+0120 in every state, then a sequence and text to see which state it left behind."""
    for code in [*range(0x121), 0x3042, 0xFFFD, 0x10FFFF]:
        text = prefix + chr(code) + "1m;\x07x"
        assert _parsed(text) == _parsed_slowly(text), f"U+{code:04X}"


@settings(max_examples=300)
@given(STREAM, st.lists(st.integers(0, 80)))
def test_any_split_gives_the_same_actions(text: str, cuts: list[int]) -> None:
    assert _parsed(*_pieces(text, cuts)) == _parsed(text)


def _pieces(text: str, cuts: Sequence[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:])]


# -- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [99, 100, 101, 5_000])
@pytest.mark.parametrize("cut", [1, 50, 10_000])
def test_parameter_text_is_cut_at_100_characters(count: int, cut: int) -> None:
    text = "\x1b[" + ("1;" * count)[:count] + "m"
    assert _parsed(text[:cut], text[cut:]) == [("csi", "m", ("1;" * 50)[:count])]


@pytest.mark.parametrize(("collected", "key"), [
    ("", "m"), (" ", " m"), ("?" + " " * 6, "?" + " " * 6 + "m"), (" " * 7, " " * 7 + "m"), (" " * 8, ""),
    ("?" + " " * 7, ""), (" " * 1_000, ""),
])  # fmt: skip
def test_a_function_of_more_than_eight_characters_is_unknown(collected: str, key: str) -> None:
    assert _parsed(f"\x1b[{collected}mx") == [("csi", key, ""), ("print", "x")]
    if not collected.startswith("?"):
        assert _parsed(f"\x1b{collected}mx") == [("esc", key), ("print", "x")]


@pytest.mark.parametrize("cut", [0, 16_000, 16_386, 16_387, 30_000])
def test_an_operating_system_command_is_cut_at_16384_characters(cut: int) -> None:
    text = "\x1b]" + "漢" * 40_000 + "\x07x"
    assert _parsed(text[:cut], text[cut:]) == [("osc", "漢" * 16_384), ("print", "x")]


def test_a_final_beyond_latin_1_makes_an_unknown_function_of_any_length() -> None:
    assert _parsed("\x1b[1é\x1b[1漢\x1b漢x") == [("csi", "é", "1"), ("csi", "", "1"), ("esc", ""), ("print", "x")]


# -- what is easily got wrong ----------------------------------------------------------------------------------

WAYS_OUT: list[tuple[str, list[Action]]] = [
    ("\x07", []),
    ("\x9c", []),
    ("\x1b\\", [("esc", "\\")]),
    ("\x1bx", [("esc", "x")]),
    ("\x1b[m", [("csi", "m", "")]),
    ("\x1b]\x07", [("osc", "")]),
    ("\x18", [("execute", "\x18")]),
    ("\x1a", [("execute", "\x1a")]),
    ("\x84", [("execute", "\x84")]),
    ("\x9b5A", [("csi", "A", "5")]),
    ("\x9d1;i\x07", [("osc", "1;i")]),
    ("\x90q\x9c", []),
    ("\x1bPq\x07\x9c", []),
]


@pytest.mark.parametrize(("way", "after"), WAYS_OUT, ids=ascii)
def test_leaving_an_operating_system_command_by_any_way_performs_it(way: str, after: list[Action]) -> None:
    assert _parsed(f"\x1b]2;title{way}") == [("osc", "2;title"), *after]


@pytest.mark.parametrize("control", "\0\x05\n\r\x19\x1f")
def test_controls_inside_a_string_vanish(control: str) -> None:
    assert _parsed(f"\x1b]2;a{control}b\x07") == [("osc", "2;ab")]
    assert _parsed(f"\x1bPa{control}b\x9c") == []


@pytest.mark.parametrize("control", "\0\x07\b\n\r\x19\x1f")
@pytest.mark.parametrize(("before", "after", "action"), [
    ("\x1b", "7", ("esc", "7")), ("\x1b#", "8", ("esc", "#8")), ("\x1b[", "A", ("csi", "A", "")),
    ("\x1b[1", "2A", ("csi", "A", "12")), ("\x1b[1 ", "q", ("csi", " q", "1")),
])  # fmt: skip
def test_controls_inside_a_sequence_act_at_once(control: str, before: str, after: str, action: Action) -> None:
    assert _parsed(before + control + after) == [("execute", control), action]
    assert _parsed(before + "\x7f" + after) == [action]


@pytest.mark.parametrize("sequence", ["[:m", "[4:3m", "[1?h", "[??h", "[1 1m", "[ ?m", "[1 :m"])
def test_a_malformed_sequence_is_ignored_to_its_end(sequence: str) -> None:
    assert _parsed("\x1b" + sequence + "x") == [("print", "x")]


@pytest.mark.parametrize("introducer", ["\x1bP", "\x1bX", "\x1b^", "\x1b_", "\x90", "\x98", "\x9e", "\x9f"])
def test_device_control_strings_have_no_effect(introducer: str) -> None:
    assert _parsed(introducer + "1$qm[A\x07漢\n\x9cx") == [("print", "x")]
    assert _parsed(introducer + "q\x1b\\x") == [("esc", "\\"), ("print", "x")]


@pytest.mark.parametrize("text", ["\x7f", "é", "漢\x7f", "\xa0"])
def test_delete_and_letters_beyond_ascii_are_printed_in_the_ground_state(text: str) -> None:
    assert _parsed(text) == [("print", text)]
