"""Sections 11 and 12 against the stock programs themselves: whatever a program writes, both terminals show the same.

Random streams, each from a seed of its own, and recordings of real programs are played to a live stock server and a
live stock client. MOSH_SIM_LONG=1 plays thousands of streams, MOSH_SIM_SEED=n only that one. A disagreement is made
small before it is reported.

Stock's way of drawing has flaws of its own, which our emulator must show as they come. They are recognized here, and
what they touch is not compared:

    edge      a wide character in the last column makes the receiver wrap, which displaces what follows
    cursor    after drawing the last cell of the screen, a move to the left ends one column too far left
    covered   a cell behind the right half of a wide character is taken for known when it is uncovered
    narrow    in a row that the character wrapped into it fills, wrapping and moves to the left go wrong likewise
    doubtful  (ours) behind a character of doubtful width the cursor is placed anew, so a line that goes on with it
              is not known as such
    title     of a title as long as possible, the end is cut off when it is sent with a longer prefix
"""

from __future__ import annotations

import os
import random
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

import mosh
import peers
from conftest import require, require_kind
from live_peer import (
    LIMIT_SECONDS,
    RESET,
    REST,
    LivePeer,
    Program,
    Size,
    StockClient,
    StockServer,
    differences,
    picture,
    visible_cells,
    wraps,
)

LONG = bool(os.environ.get("MOSH_SIM_LONG"))
CASES = 6_000 if LONG else 400              # random streams per peer
BATCH = 20                                  # so many in a row have one size
SIZES: tuple[Size, ...] = (
    (20, 6), (80, 24), (10, 4), (7, 3), (33, 9), (132, 43), (5, 2), (20, 1), (2, 5), (1, 3), (3, 2), (64, 16),
)
SHRINK_PLAYS = 150                          # attempts to make a disagreement smaller
REPORTS = 3                                 # more than that only repeat each other
CUTS = 12 if LONG else 3                    # places in a recording at which the screen is compared


# -- random streams --------------------------------------------------------------------------------------------

# Old enough, and of an undisputed width, for every C library.
_DISPUTED = (range(0x1100, 0x1200), range(0x2600, 0x2700), range(0x4DC0, 0x4E00), range(0xD7B0, 0xD800))
_PLAIN = "abcdefghijklmnopqrstuvwxyz ABCXYZ 0123456789 .,;:-#$%"
_SPECIAL = "é漢字あ한😀🚀─│┌█→·½ß\u00a0\u00ad\u0301\u0302\u0338\u200b\u200d\u20dd\ufe0f\ufffdｱＡ𝄞\u0e33\u0e34\ue000"
_MALFORMED = (
    b"\xff", b"\xfe", b"\x80", b"\xbf\xbf", b"\xc0\xaf", b"\xc1", b"\xc3", b"\xe0\x80\x80", b"\xe6\xbc", b"\xe6",
    b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\x80", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
    b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xfb\xbf\xbf", b"\xe6\xbc\xe6\xbc\xa2", b"\x9b5C",
    b"\xc3\xc3\xa9", b"\xf0\x9f\x9f\x98\x80", b"\xe2\x82\x1b[1m", b"\xc2", b"\xc2\x1b[31m", b"\xf4\x8f\xbf\xbf",
)
_CONTROLS = "\a\b\t\n\v\f\r" * 3 + "\0\x01\x0e\x0f\x18\x1a\x1b\x7f\x80\x84\x85\x88\x8d\x8e\x90\x98\x9a\x9b\x9c\x9d\x9f"
_FINALS = "@ABCDGHIJKLMPSTXZ`dfghlmrn" + "ABCDHJKm" + "abceopqsuvtxyz{|}~EFWUi"
_PRIVATE_MODES = (1, 3, 5, 6, 7, 25, 9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 2004, 47, 1049, 12, 2)
_ESCAPES = (
    *"78cDEMHZ=>\\[]PX^_NO69|}~VW@A", "#8", "(B", "(0", ")0", "#3", "%G", "7", "8", "M", "D", "E", "H",
)


@lru_cache(maxsize=1)
def _old_characters() -> str:
    """Return the printable characters of Unicode 3.2 beyond Latin-1."""
    category = unicodedata.ucd_3_2_0.category
    return "".join(
        chr(code) for code in range(0x100, 0x20000)
        if category(chr(code))[0] in "LNPS" or category(chr(code)) == "Mn"
        if not any(code in disputed for disputed in _DISPUTED)
    )


class Streams:
    """Makes up what a program might write, from a source of chance."""

    def __init__(self, rng: random.Random, size: Size) -> None:
        self._rng = rng
        self._width, self._height = size
        self._kinds: list[Callable[[], str]] = [
            self._text, self._csi, self._cursor, self._erase, self._sgr, self._private_mode, self._odd_csi,
            self._escape, self._control, self._osc, self._region, self._wide, self._insert, self._line, self._tabs,
            self._marks, self._odd_sgr, self._newlines, self._edge, self._origin, self._reset, self._absent,
            self._saved, self._erase_colored, self._colors, self._byte_salad,
        ]
        # Each stream favours some kinds, so that those meet each other often.
        self._weights = [rng.choice((0, 1, 1, 2, 6)) for _ in self._kinds]
        self._weights[0] += 2

    def pieces(self) -> tuple[bytes, ...]:
        """Return the pieces of one stream."""
        rng = self._rng
        count = rng.choice((3, 8, 20, 40, 80))
        return tuple(
            rng.choice(_MALFORMED) if rng.random() < 0.03
            else rng.choices(self._kinds, self._weights)[0]().encode("utf-8", "surrogateescape")
            for _ in range(count)
        )

    def _number(self) -> str:
        rng = self._rng
        chance = rng.random()
        if chance < 0.75:
            return str(rng.randint(0, max(self._width, self._height) + 1) if rng.random() < 0.3 else rng.randint(0, 5))
        return rng.choice(("", "0", "1", "255", "256", "65535", "65536", "99999999999999999999", "007"))

    def _parameters(self) -> str:
        return ";".join(self._number() for _ in range(self._rng.randint(0, 3)))

    def _text(self) -> str:
        rng = self._rng
        alphabet = rng.choice((_PLAIN, _PLAIN, _SPECIAL, _PLAIN + _SPECIAL, _old_characters()))
        length = rng.choice((1, 1, 3, 8, self._width, rng.randint(1, 2 * self._width + 2)))
        return "".join(rng.choice(alphabet) for _ in range(min(length, 150)))

    def _wide(self) -> str:
        count = self._rng.choice((1, 1, 2, self._width // 2 + 1))
        return "".join(self._rng.choice("漢字あ한😀Ａ") for _ in range(count))

    def _marks(self) -> str:
        count = self._rng.choice((1, 1, 2, 5, 20))
        base = self._rng.choice(("", "", "a", "漢", "\x1b[C", "\x1b[B"))
        return base + "".join(self._rng.choice("\u0301\u0302\u0338\u20dd\u0e34\u200d") for _ in range(count))

    def _line(self) -> str:
        """Up to the last column, or just beyond."""
        fill = self._rng.choice("x.é")
        return fill * (self._width - self._rng.randint(-1, 2)) + self._rng.choice(("", "\r\n", "\t", "y", "\x1b[K"))

    def _control(self) -> str:
        return self._rng.choice(_CONTROLS)

    def _newlines(self) -> str:
        return self._rng.choice(("\n", "\r\n", "\x1bM", "\x1bD", "\x1bE")) * self._rng.choice((1, 2, self._height))

    def _csi(self) -> str:
        introducer = self._rng.choice(("\x1b[", "\x1b[", "\x1b[", "\x9b"))
        return f"{introducer}{self._parameters()}{self._rng.choice(_FINALS)}"

    def _cursor(self) -> str:
        rng = self._rng
        row, col = rng.randint(0, self._height + 1), rng.randint(0, self._width + 1)
        address = f"\x1b[{row};{rng.choice((col, self._width))}H"
        return rng.choice((address, address, f"\x1b[{row}d", f"\x1b[{col}G", "\x1b[H"))

    def _erase(self) -> str:
        rng = self._rng
        return rng.choice(("\x1b[J", "\x1b[1J", "\x1b[2J", "\x1b[K", "\x1b[1K", "\x1b[2K", f"\x1b[{self._number()}X"))

    def _insert(self) -> str:
        rng = self._rng
        return rng.choice((f"\x1b[{self._number()}{rng.choice('@PLMST')}", "\x1b[4h", "\x1b[4l", "\x1b[L", "\x1b[M"))

    def _region(self) -> str:
        rng = self._rng
        top = rng.randint(0, self._height)
        region = f"\x1b[{top};{rng.randint(top, self._height + 1)}r"
        return rng.choice((region, region, "\x1b[r", "\x1b[?6h", "\x1b[?6l", region + "\x1b[?6h"))

    def _tabs(self) -> str:
        rng = self._rng
        return rng.choice(("\t", "\t\t", "\x1bH", "\x1b[g", "\x1b[3g", f"\x1b[{self._number()}{rng.choice('IZ')}"))

    def _sgr(self) -> str:
        rng = self._rng
        plane = rng.choice(("38", "48"))
        color = plane + rng.choice((f";5;{rng.randint(0, 255)}", f";2;{rng.randint(0, 255)};200;30"))
        words = (str(rng.randint(0, 9)), str(rng.randint(21, 49)), str(rng.randint(90, 107)), color)
        return f"\x1b[{';'.join(rng.choice(words) for _ in range(rng.choice((0, 1, 1, 2, 4))))}m"

    def _odd_sgr(self) -> str:
        rng = self._rng
        words = (
            *("38", "48", "5", "2", "", "1", "300", "256", "7", "38;5", "48;2;1", "38;2;300;1;2", "48;2;1;2;65535"),
            *("58", "21"),
        )
        text = ";".join(rng.choice(words) for _ in range(rng.randint(1, 7)))
        return rng.choice((f"\x1b[{text}m", f"\x1b[{text}m", f"\x1b[38:5:{rng.randint(0, 9)}m", f"\x1b[4:3;{text}m"))

    def _private_mode(self) -> str:
        rng = self._rng
        modes = ";".join(str(rng.choice(_PRIVATE_MODES)) for _ in range(rng.choice((1, 1, 1, 3))))
        return f"\x1b[?{modes}{rng.choice('hl')}"

    def _odd_csi(self) -> str:
        rng = self._rng
        return rng.choice((
            f"\x1b[?{self._parameters()}{rng.choice(_FINALS + 'hlc')}", f"\x1b[{self._parameters()}", "\x1b[!p",
            f"\x1b[>{self._parameters()}{rng.choice('cmq')}", f"\x1b[{self._number()} q",
            f"\x1b[{self._number()}\n2;3H", f"\x1b[{'1;' * 60}31m", "\x1b[5\x18A", "\x1b[1?2H", "\x1b[=c",
            f"\x1b[{self._number()}é", "\x1b[1$2x", "\x1b[c", "\x1b[6n", "\x1b[5n", "\x1b[>c", f"\x1b[{'0' * 99}5;7H",
            "\x1b[ !\"#$%&'()p",
        ))

    def _escape(self) -> str:
        escape: str = self._rng.choice(_ESCAPES)
        return "\x1b" + escape

    def _osc(self) -> str:
        rng = self._rng
        kind = rng.choice(("0;", "1;", "2;", ";", "52;c;", "52;c;", "52;p;", "4;", "8;;", "", "0", "10;", "0;;", "2"))
        long = "x" * rng.choice((252, 253, 254, 255, 256, 300))
        text = rng.choice(("", "?", "YWJj", "tïtle 漢", "a;b;c", long, "e\u0301"))
        return rng.choice(_OSC_STARTS) + kind + text + rng.choice(_OSC_ENDS)

    def _edge(self) -> str:
        """Wide characters and marks at the right edge, and what follows them."""
        rng = self._rng
        cells = "".join(rng.choice("漢字あ한😀Ａab\u0301\u200d\ufe0f") for _ in range(rng.randint(1, 6)))
        after = rng.choice((
            "", "\u0301", "\b", "\b\bx", "\r", "\n", "\t", "\x1b[Z", "\x1b[C", "\x1b[D", "\x1b[K", "\x1b[1K",
            "\x1b[X", "\x1b[@", "\x1b[2P", "\x1b[4h漢\x1b[4l", "\x1b[m", "\x1b]2;t\a", "\x1b]2;t\x1b\\", "\x1b7z\x1b8y",
        ))
        return f"\x1b[{rng.randint(1, self._height)};{max(1, self._width - rng.randint(0, 2))}H{cells}{after}"

    def _origin(self) -> str:
        """Origin mode in a region, perhaps with the wrap pending, and what depends on it."""
        rng = self._rng
        top = rng.randint(1, self._height)
        modes = rng.choice(("\x1b[?6h", "\x1b[?6l", "\x1b[?6h\x1b7", "\x1b[?6;7h", "\x1b[?6h\x1b[?7l"))
        fill = rng.choice(("", "x" * self._width, "x" * (self._width + 1), "\x1b[2;2H"))
        after = rng.choice((
            "\n", "\x1bM", "\x1bE", "\x1b[99A", "\x1b[99B", "\x1b8", "\x1b[!p", "\x1b[6n", "\x1b[J", "\x1b[1J",
            "\x1b[S", "\x1b[T", "漢", "\u0301", "\x1b[?7h", "\x1b[?3h",
        ))
        return f"\x1b[{top};{rng.randint(top, self._height + 1)}r{modes}{fill}{after}"

    def _reset(self) -> str:
        color = self._rng.choice(("", "\x1b[41m", "\x1b[7m", "\x1b[48;5;200m"))
        return color + self._rng.choice(("\x1b[!p", "\x1bc", "\x1b#8", "\x1b[?3h", "\x1b[?3l", "\x1b#3", "\x1b#6"))

    def _absent(self) -> str:
        """What other terminals do and stock mosh does not."""
        return self._rng.choice("ab漢") + self._rng.choice((
            f"\x1b[{self._number()}b", "\x1b[E", "\x1b[2F", "\x1b[a", "\x1b[3e", "\x1b[s", "\x1b[u", "\x1b[?1048h",
            "\x1b[?1049h", "\x1b[?1049l", "\x1b[3J", "\x1b[?2J", "\x1b[?K",
            "\x1b[>4;2m", "\x1b[?6n", "\x1b[?1$p", '\x1b[1"q',
            "\x1b['~", "\x1bN",
        ))

    def _saved(self) -> str:
        return self._rng.choice((
            "\x1b7", "\x1b8", "\x1b[?6h\x1b7\x1b[?6l", "\x1b[31m\x1b7\x1b[m", "\x1b[?7l\x1b7\x1b[?7h",
            "\x1b7\x1b[!p\x1b8", "x" * self._width + "\x1b7y\x1b8z",
        ))

    def _erase_colored(self) -> str:
        """Cells that come in with the background of the pen."""
        color = self._rng.choice(("40", "41", "48;5;200", "48;2;1;2;3", "7", "7;41", "4;41"))
        function = self._rng.choice((*"KJX@PLMST", "1K", "2J"))
        return f"\x1b[{color}m" + self._rng.choice((f"\x1b[{function}", "\n", "\x1bM", "  ")) + "\x1b[m"

    def _colors(self) -> str:
        rng = self._rng
        form = rng.choice((
            "38;5;{}", "48;5;{}", "38:5:{}", "38;2;{};{};{}", "48;2;{};{};{}", "38:2::{}:{}:{}", "38;2;{};{}",
            "48;5;{};1", "38;5;{};48;5;{}", "58;2;{};{};{}", "1;38;2;{};{};{};4", "{};38;5;{}",
            "38;6;{}", "38;;5;{}", "9{}", "10{}",
        ))
        numbers = (rng.choice(("", "0", "1", "7", "8", "15", "16", "255", "256", "300", "65536")) for _ in range(5))
        return f"\x1b[{form.format(*numbers)}m" + rng.choice(("", "x", "\x1b[K"))

    def _byte_salad(self) -> str:
        """Bytes with a part in UTF-8, as surrogates, in any order; and C1 controls."""
        rng = self._rng
        if rng.random() < 0.3:
            return chr(rng.randint(0x80, 0x9F)) + rng.choice(("", "31m", "0;t\x9c", "0;t\a", "x\x9c", "2;2H"))
        salad = b"\x80\x8f\x9b\xa0\xbf\xc0\xc2\xc3\xe0\xe6\xed\xf4\xf5\xf8\xfc\xfe\xffa\x1b\x18\a"
        return bytes(rng.choice(salad) for _ in range(rng.randint(1, 7))).decode("utf-8", "surrogateescape")


_OSC_STARTS = ("\x1b]", "\x1b]", "\x9d")
_OSC_ENDS = ("\a", "\a", "\a", "\x1b\\", "\x9c", "\x18", "\x1bM", "\x1b[A", "\x1b[31m", "")


@dataclass(frozen=True)
class Case:
    """One stream and the size of the screen that it is for."""

    name: str
    size: Size
    pieces: tuple[bytes, ...]

    @property
    def stream(self) -> bytes:
        return b"".join(self.pieces)


def random_case(seed: int) -> Case:
    """Return the case of one seed; it does not depend on any other."""
    size = SIZES[seed // BATCH % len(SIZES)]
    return Case(f"seed {seed}", size, Streams(random.Random(seed), size).pieces())


def random_cases() -> Iterator[Case]:
    """Yield the cases of this run."""
    wanted = os.environ.get("MOSH_SIM_SEED")
    yield from map(random_case, [int(wanted)] if wanted else range(CASES))


# Small ones, each for a rule that is easy to get wrong.
SMALL_CASES = tuple(
    Case(name, size, (text.encode(),)) for name, size, text in (
        ("a tab takes the cursor into the margins of origin mode", (7, 3), "\x1b[2;3r\x1b[?6h\t"),
        ("so does a backward tab", (7, 3), "\x1b[2;3r\x1b[?6h\x1b[Zx"),
        ("and a mark goes where the tab led", (7, 3), "\x1b[2;3r\x1b[?6h\x1b[I\u0301"),
        ("a mark goes to a cursor above the margins", (7, 3), "\x1b[2;3r\x1b[?6h\u0301"),
        ("a wide character wraps once where it never fits", (1, 3), "a漢\rM"),
        ("reverse index leaves a region of one row at the bottom", (7, 3), "a\r\nb\r\nc\x1b[3;4r\x1b[3H\x1bMx"),
        ("a line feed does not", (7, 3), "a\r\nb\r\nc\x1b[3;9r\x1b[3H\nx"),
        ("a region of one row further up is refused", (7, 3), "\x1b[2;2Hb\x1b[2;2rx"),
        ("a region ends at the last row", (7, 3), "a\r\nb\r\nc\x1b[2;9r\x1b[3H\nx"),
    )
)


# -- recorded programs -----------------------------------------------------------------------------------------

RECORDING_SIZE: Size = (80, 24)
_TEXT = "".join(f"line {n}: the quick brown fox 漢字 e\u0301 \u2500\u2500 {'=' * (n % 90)}\n" for n in range(1, 120))


def _ls(program: Program, _home: Path) -> None:
    program.run_until_exit()


def _vim(program: Program, _home: Path) -> None:
    program.run_until_shown("line 1:")
    for keys, shown in (
        (b":set nu hls nowrap\r", " 10 line 10"), (b"/fox 9\rG", "119 line"), ("ggOadded 漢字\x1b".encode(), "added"),
        (b"5dd:set list\r", "line 5:"), (b":vsplit\r", "line 6:"), (b":%s/quick/slow/g\r", "slow"),
        (b":set nonu\rjjjj\x06\x06\x05\x05", "line 5"), (b":redraw!\r", "line 5"),
    ):
        program.type(keys)
        program.run_until_shown(shown)
    program.type(b":qa!\r")
    program.run_until_exit()


def _nano(program: Program, _home: Path) -> None:
    program.run_until_shown("line 1:")
    program.type("new é漢 \r\x0b\x0b".encode())
    program.run_until_shown("new é漢")
    program.type(b"\x16\x16\x16")
    program.run_until_shown("line 60")
    program.type(b"\x18")
    program.run_until_shown("Save modified")
    program.type(b"n")
    program.run_until_exit()


def _less(program: Program, _home: Path) -> None:
    program.run_until_shown("line 1:")
    for keys, shown in (
        (b"  ", "line 45"), (b"kkkk", "line 39"), (b"/fox.*====\r", "line 50"), (b"G", "line 119"), (b"b", "line 105"),
    ):
        program.type(keys)
        program.run_until_shown(shown)
    program.type(b"q")
    program.run_until_exit()


def _tmux(program: Program, home: Path) -> None:
    try:
        program.run_until_shown("ready 1")
        for keys, shown in ((b"\x02%", "ready 2"), (b'\x02"', "ready 3"), (b"\x02?", "Send the prefix")):
            home.joinpath("count").write_text(shown[-1])
            program.type(keys)
            program.run_until_shown(shown)
    finally:
        end = [require("tmux"), "-S", str(home / "socket"), "kill-server"]
        subprocess.run(end, stderr=subprocess.DEVNULL, timeout=LIMIT_SECONDS, check=False)
    program.run_until_exit()


@dataclass(frozen=True)
class Recording:
    """How to run a program: its words, {home} standing for a directory of its own, and what its user does."""

    program: str
    words: tuple[str, ...]
    drive: Callable[[Program, Path], None]


_SHOW = r'ls -l --color=always /usr/bin | head -30; printf "ready %s\n" "$(cat count)"; cat'
_TMUX = f"set -g default-command '{_SHOW}'"
RECORDINGS = {
    recording.program: recording for recording in (
        Recording("ls", ("-lR", "--color=always", "/etc"), _ls),
        Recording("vim", ("-N", "-u", "NONE", "-i", "NONE", "-n", "-c", "syntax on", "{home}/text"), _vim),
        Recording("nano", ("-I", "-l", "{home}/text"), _nano),
        Recording("less", ("-M", "-N", "{home}/text"), _less),
        Recording("top", ("-n2", "-d0.1"), _ls),
        Recording("tmux", ("-S", "{home}/socket", "-f", "{home}/tmux.conf", "new-session"), _tmux),
    )
}


def record(name: str, home: Path) -> bytes:
    """Run a program on a terminal of its own and return what it writes."""
    recording = RECORDINGS[name]
    path = require(recording.program)
    home.joinpath("text").write_text(_TEXT, encoding="utf-8")
    home.joinpath("count").write_text("1")
    home.joinpath("tmux.conf").write_text(_TMUX)
    env = peers.session_env(home, TERM="xterm-256color", SHELL="/bin/sh", PWD=str(home))
    words = [path, *(word.replace("{home}", str(home)) for word in recording.words)]
    program = Program(["/bin/sh", "-c", 'cd "$HOME" && exec "$@"', "sh", *words], env, RECORDING_SIZE)
    try:
        recording.drive(program, home)
    finally:
        program.close()
    return bytes(program.output)


# -- judging ---------------------------------------------------------------------------------------------------


def _edge_is_wide(screen: mosh.Framebuffer) -> bool:
    """Whether a wide character shows in the last column."""
    last = screen.width - 1
    return any(
        last in screen.visible_columns(text) and screen.codebook.is_wide(text[last])
        for text in (row.padded(screen.width)[0] for row in screen.rows)
    )


FLAWS = {                                   # see the top of the file
    StockServer: ("edge", "covered", "cursor", "narrow", "title"),
    StockClient: ("doubtful", "covered", "cursor", "narrow", "title"),
}
OUR_FLAWS = ("doubtful", "title")


def excuse(expected: mosh.Framebuffer, got: mosh.Framebuffer, found: Sequence[str], flaws: Sequence[str]) -> str:
    """Name those of the flaws that explain all the differences, if any do."""
    subjects = {line.split(":")[0].split()[0] for line in found}
    why = []

    def explains(name: str, *explained: str) -> None:
        if name in flaws and subjects.intersection(explained):
            why.append(name)
            subjects.difference_update(explained)

    if _edge_is_wide(expected):
        explains("edge", "cell", "wraps", "cursor_row", "cursor_col")
    if _covered_ends(expected, got):
        explains("covered", "wraps")
    if _doubtful_ends(expected, got):
        explains("doubtful", "wraps")
    if expected.cursor_row == got.cursor_row == expected.height - 1 and expected.cursor_col - got.cursor_col == 1:
        explains("cursor", "cursor_col")
    if expected.width <= 2 and "cell" not in subjects:
        explains("narrow", "cursor_col", "wraps")
    titles = ((expected.window_title, got.window_title), (expected.icon_name, got.icon_name))
    if all(a == b or a[:254] == b for a, b in titles):
        explains("title", "window_title", "icon_name")
    return "" if subjects else " ".join(why)


def _covered_ends(expected: mosh.Framebuffer, got: mosh.Framebuffer) -> bool:
    """Whether in the only rows that do not go on as they should, a wide character hides the last cell."""
    last = expected.width - 1
    rows = zip(wraps(expected), wraps(got), visible_cells(expected))
    return all(last not in cells for wanted, there, cells in rows if wanted != there)


def _doubtful_ends(expected: mosh.Framebuffer, got: mosh.Framebuffer) -> bool:
    """Whether the only rows that do not go on as they should end in a character of doubtful width."""
    last_cells = [cells[max(cells)] for cells in visible_cells(expected)]
    return all(
        wanted and any(map(mosh.is_width_doubtful, cell[0]))
        for wanted, there, cell in zip(wraps(expected), wraps(got), last_cells) if wanted != there
    )


class Judge:
    """Plays cases to one peer and finds out about those that end differently."""

    def __init__(self, peer: LivePeer) -> None:
        self._peer = peer
        self.played = 0
        self.excused: Counter[str] = Counter()
        self.passing: list[str] = []        # what differed, but not again
        self.reports: list[str] = []
        self._before = b""                  # what the previous case left on the screens

    def play(self, case: Case) -> None:
        """Play a case; note a report if it is a disagreement."""
        peer = self._peer
        if (peer.reference.width, peer.reference.height) != case.size:
            peer.play(RESET)                # a cut through wide characters would put one into the last column
            peer.resize(case.size)
        self.played += 1
        stream = RESET + case.stream
        reasons = self._disagreement(peer.play(stream))
        before, self._before = self._before, stream
        if not reasons:
            return
        if self._replay([stream]):
            self._report(case, [], self._shrink(case.pieces, []))
        elif self._replay([before, stream]):
            if _hides_cells(before, case.size):
                self.excused["covered"] += 1
            else:
                self._report(case, [before], self._shrink(case.pieces, [before]))
        else:
            self.passing.append(f"{case.name}: {reasons[:3]}")
        peer.scrub()
        self._before = b""

    def play_resizing(self, seed: int) -> None:
        """Write, resize the window, write on what is left, and so on; note a report if there is a disagreement."""
        peer, rng = self._peer, random.Random(seed)
        played: list[tuple[Size, bytes]] = []
        self.played += 1
        for _ in range(rng.randint(2, 4)):
            size = (rng.randint(1, 40), rng.randint(1, 12))
            stream = b"".join(Streams(rng, size).pieces())
            played.append((size, stream if played else RESET + stream))
            peer.resize(size)
            if "edge" in FLAWS[type(peer)] and _edge_is_wide(peer.reference):
                self.excused["edge"] += 1   # already displaced, by a cut through a wide character
                peer.scrub()
                break
            before = self.excused.copy()
            found = self._disagreement(peer.play(played[-1][1]))
            if found:
                lines = [f"seed {seed}, disagreement with {type(peer).__name__} while resizing:", *map(repr, played)]
                self._describe(lines, found)
                peer.scrub()
            if found or self.excused != before:
                break
        self._before = b""

    def _disagreement(self, found: list[str]) -> list[str]:
        """Return the differences unless there is an excuse for them, which is then cleaned up after."""
        if not found:
            return []
        why = excuse(self._peer.reference, self._peer.received, found, FLAWS[type(self._peer)])
        if not why:
            return found
        self.excused[why] += 1
        self._peer.scrub()
        self._before = b""
        return []

    def _replay(self, streams: Sequence[bytes]) -> list[str]:
        """Play streams on screens that have just been repainted; return what then differs without an excuse."""
        self._peer.scrub()
        found: list[str] = []
        for stream in streams:
            found = self._disagreement(self._peer.play(stream))
        return found

    def _shrink(self, pieces: tuple[bytes, ...], before: list[bytes]) -> tuple[bytes, ...]:
        """Return fewer and smaller pieces that still disagree."""
        budget = SHRINK_PLAYS

        def disagrees(attempt: tuple[bytes, ...]) -> bool:
            nonlocal budget
            budget -= 1
            return budget >= 0 and bool(self._replay([*before, RESET + b"".join(attempt)]))

        for unit in (list(pieces), None):
            items = unit if unit is not None else [bytes((byte,)) for byte in b"".join(pieces)]
            step = max(1, len(items) // 2)
            while budget > 0:
                at = 0
                while at < len(items):
                    attempt = items[:at] + items[at + step :]
                    if disagrees(tuple(attempt)):
                        items = attempt
                    else:
                        at += step
                if step == 1:
                    break
                step //= 2
            pieces = tuple(items)
        return pieces

    def _report(self, case: Case, before: list[bytes], pieces: tuple[bytes, ...]) -> None:
        stream = b"".join(pieces)
        found = self._replay([*before, RESET + stream])
        played = [*before, RESET + stream]
        lines = [f"{case.name} on {case.size[0]}x{case.size[1]}, disagreement with {type(self._peer).__name__}:"]
        for each in played:
            lines += [f"  stream {each!r}", f"  in hex {each.hex()}"]
        self._describe(lines, found)

    def _describe(self, lines: list[str], found: list[str]) -> None:
        lines += [f"  {line}" for line in found[:12]]
        lines += ["  expected", picture(self._peer.reference), "  got", picture(self._peer.received)]
        self.reports.append("\n".join(lines))

    def verdict(self) -> None:
        """Fail if there was any disagreement, with all reports."""
        print(f"{self.played} streams played; excused: {dict(self.excused)}; differed only once: {self.passing}")
        reports = self.reports
        self.reports, self.passing, self.played = [], [], 0
        self.excused.clear()
        if reports:
            pytest.fail("\n\n".join(reports), pytrace=False)


def _hides_cells(stream: bytes, size: Size) -> bool:
    """Whether a stream leaves wide characters, behind whose right halves there may be anything."""
    terminal = mosh.Emulator(*size)
    terminal.feed(stream)
    screen = terminal.framebuffer
    return any(screen.codebook.is_wide(code) for row in screen.rows for code in row.text)


# -- the tests -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[StockServer, StockClient])
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    """A judge with a live stock peer of either kind, which all cases of this module share."""
    require_kind("stock")
    with request.param(tmp_path_factory.mktemp(request.param.__name__)) as peer:
        yield Judge(peer)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """What a program of RECORDINGS wrote, recorded when it is first asked for."""
    return lru_cache(maxsize=None)(lambda name: record(name, tmp_path_factory.mktemp(f"record-{name}")))


@pytest.mark.live
def test_random_streams_show_the_same(judge: Judge) -> None:
    for case in random_cases():
        judge.play(case)
        if len(judge.reports) == REPORTS:
            break
    judge.verdict()


@pytest.mark.live
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_small_streams_show_the_same(judge: Judge, case: Case) -> None:
    judge.play(case)
    judge.verdict()


@pytest.mark.live
def test_windows_that_change_their_size_show_the_same(judge: Judge) -> None:
    wanted = os.environ.get("MOSH_SIM_SEED")
    for seed in [int(wanted)] if wanted else range(CASES // 5):
        judge.play_resizing(seed)
        if len(judge.reports) == REPORTS:
            break
    judge.verdict()


def test_random_streams_pass_through_both_of_ours() -> None:
    """The same streams from our server's screen to our client's, and on to the terminal that it draws on."""
    size: Size = (0, 0)
    for case in random_cases():
        if case.size != size:
            size = case.size
            program, terminal = mosh.Emulator(*size), mosh.Emulator(*size)
            sent = received = mosh.TerminalState(program.copy())
            drawn = received.framebuffer
        program.feed(RESET + case.stream + REST)
        last, sent = sent, mosh.TerminalState(program.copy())
        received = received.applied(sent.diff_from(last))
        terminal.feed(mosh.Display(hide_cursor=True).frame(drawn, received.framebuffer))
        drawn = received.framebuffer
        for step, (expected, got) in enumerate(((sent.framebuffer, drawn), (drawn, terminal.framebuffer))):
            found = differences(expected, got)
            message = f"{case.name} on {size}, step {step}\n{RESET + case.stream!r}\n" + "\n".join(found[:12])
            assert not found or excuse(expected, got, found, OUR_FLAWS), message


@pytest.mark.live
@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_programs_show_the_same(judge: Judge, recordings: Callable[[str], bytes], name: str) -> None:
    stream, rng = recordings(name), random.Random(name)
    ends = sorted(rng.randint(1, len(stream)) for _ in range(CUTS))
    for end in (*ends, len(stream)):
        lines = stream[:end].splitlines(keepends=True)
        judge.play(Case(f"{name} up to byte {end}", RECORDING_SIZE, tuple(lines)))
    judge.verdict()
