"""What programs write to terminals, made up from a seed: the corpora that bench_terminal.py feeds to emulators.

Each maker returns about as many bytes as it is asked for, a whole number of pieces, for a screen of 80x24.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

WIDTH, HEIGHT = 80, 24
# Afterwards the screen scrolls as a whole again, the pen is plain, and the cursor stands on a line of its own.
RESET = b"\x1b[r\x1b[m\x1b[?25h\x1b[24;1H\r\n"

Pieces = Iterator[str]

WORDS = [
    "connection", "request", "handler", "timeout", "accepted", "worker", "queue", "retry", "commit", "value",
    "session", "cache", "update", "index", "thread", "failed", "server", "opened", "closed", "buffer", "object",
    "module", "import", "error", "warning", "note", "while", "reading", "from", "file", "at", "line",
]
LATIN_WORDS = [
    "déjà", "été", "über", "größe", "señor", "naïve", "façade", "Ångström", "smörgåsbord", "crème", "brûlée",
    "jalapeño",
]
CJK = "漢字仮名交文日本語中国韓海山川空森林火水木金土時間東西南北春夏秋冬あいうえおカキクケコ한국어글"
EMOJI = [
    "\U0001f600", "\U0001f680", "\U0001f389", "\U0001f40d", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
    "\U0001f469\u200d\U0001f4bb", "\U0001f1e9\U0001f1ea", "\u2699\ufe0f", "\U0001f525",
]
MARKED = ["e\u0301", "o\u0308", "a\u0302", "n\u0303", "u\u0308\u0304", "i\u0323"]


def _words(chance: random.Random, number: int) -> str:
    return " ".join(chance.choices(WORDS, k=number))


def _at(row: int, col: int) -> str:
    return f"\x1b[{row};{col}H"


# -- lines -----------------------------------------------------------------------------------------------------


def log_lines(chance: random.Random) -> Pieces:
    """Lines of a log, some longer than a row."""
    for number in count():
        clock = f"{number // 3_600 % 24:02}:{number // 60 % 60:02}:{number % 60:02}"
        yield f"2026-03-14T{clock} host app[{chance.randint(100, 9999)}]: {_words(chance, chance.randint(3, 11))}\r\n"


def endless_line(chance: random.Random) -> Pieces:
    """One line without an end."""
    while True:
        yield _words(chance, 40) + " "


def yes_lines(_chance: random.Random) -> Pieces:
    """What `yes` prints."""
    while True:
        yield "y\r\n" * 64


def colored_lines(chance: random.Random) -> Pieces:
    """Lines as `ls --color` and compilers print them."""
    kinds = ("01;34", "01;32", "01;36", "01;31", "40;33;01")
    while True:
        if chance.random() < 0.6:
            names = ("_".join(chance.choices(WORDS, k=2)) for _ in range(4))
            yield "".join(f"\x1b[0m\x1b[{chance.choice(kinds)}m{name}\x1b[0m  " for name in names) + "\r\n"
        else:
            place = f"src/{chance.choice(WORDS)}.c:{chance.randint(1, 999)}:{chance.randint(1, 80)}:"
            yield f"\x1b[01m\x1b[K{place}\x1b[m\x1b[K \x1b[01;35m\x1b[Kwarning: \x1b[m\x1b[K{_words(chance, 6)}\r\n"


def latin_lines(chance: random.Random) -> Pieces:
    """Lines in a European language."""
    while True:
        yield " ".join(chance.choices(LATIN_WORDS + WORDS[:6], k=chance.randint(4, 12))) + "\r\n"


def cjk_lines(chance: random.Random) -> Pieces:
    """Lines of wide characters."""
    while True:
        yield "".join(chance.choices(CJK, k=chance.randint(5, 38))) + "\r\n"


def emoji_lines(chance: random.Random) -> Pieces:
    """Lines with emoji and combining marks."""
    while True:
        yield " ".join(chance.choice(chance.choice((EMOJI, MARKED, WORDS))) for _ in range(10)) + "\r\n"


# -- screens ---------------------------------------------------------------------------------------------------


def editor(chance: random.Random) -> Pieces:
    """A full-screen editor: typing, lines redrawn in colours, a status line, now and then the whole screen."""
    def line(row: int) -> str:
        words = chance.choices(WORDS, k=7)
        return (f"{_at(row, 1)}\x1b[33m{chance.randint(1, 999):4} \x1b[m\x1b[35m{words[0]}\x1b[m {' '.join(words[1:4])}"
                f"(\x1b[36m{words[4]}\x1b[m, \x1b[31m\"{words[5]}\"\x1b[m) {words[6]}\x1b[K")

    for number in count():
        row, col = chance.randint(1, HEIGHT - 2), chance.randint(6, 70)
        yield f"\x1b[?25l{_at(row, col)}{chance.choice(WORDS)}"
        yield line(row)
        yield f"{_at(HEIGHT - 1, 1)}\x1b[7m file.py [+]{number:50} \x1b[m\x1b[K{_at(row, col)}\x1b[?25h"
        if number % 50 == 0:
            yield "".join(line(each) for each in range(1, HEIGHT - 1))


def process_list(chance: random.Random) -> Pieces:
    """A list of processes with meters, every row rewritten at each refresh."""
    while True:
        rows = []
        for row in range(1, 5):
            bars = chance.randint(1, 40)
            rows.append(f"{_at(row, 3)}\x1b[36m{row}\x1b[1m[\x1b[m\x1b[32m{'|' * bars}\x1b[m{' ' * (50 - bars)}"
                        f"\x1b[90m{chance.random() * 100:5.1f}%\x1b[m\x1b[1m]\x1b[m")
        rows.append(f"{_at(6, 1)}\x1b[30;42m  PID USER      PRI  NI  VIRT   RES CPU% Command\x1b[K\x1b[m")
        for row in range(7, HEIGHT):
            rows.append(f"{_at(row, 1)}{chance.randint(1, 99_999):5} \x1b[90mroot     \x1b[m 20   0 "
                        f"\x1b[36m{chance.randint(1, 999):4}M\x1b[m {chance.randint(1, 99):4}M \x1b[32m"
                        f"{chance.random() * 100:4.1f}\x1b[m {chance.choice(WORDS)}\x1b[K")
        yield "".join(rows)


def region_lines(chance: random.Random) -> Pieces:
    """Plain lines that scroll inside a scrolling region."""
    yield f"\x1b[2J\x1b[3;20r{_at(20, 1)}"
    while True:
        yield _words(chance, chance.randint(2, 9)) + "\r\n"


def region_editor(chance: random.Random) -> Pieces:
    """An editor that scrolls its text up and down by a line and draws the one that appears."""
    while True:
        up = chance.random() < 0.5
        yield (f"\x1b[1;22r{_at(22, 1)}\n{_at(22, 1)}" if up else f"\x1b[1;22r{_at(1, 1)}\x1bM") + "\x1b[1;24r"
        yield f"{_at(22 if up else 1, 1)}\x1b[32m{_words(chance, 3)}\x1b[m {_words(chance, 4)}\x1b[K"
        yield f"{_at(24, 60)}{chance.randint(1, 9999):<8}{_at(chance.randint(1, 22), 8)}"


def cjk_addressed(chance: random.Random) -> Pieces:
    """Wide characters written here and there."""
    while True:
        text = "".join(chance.choices(CJK, k=chance.randint(2, 9)))
        yield _at(chance.randint(1, HEIGHT), chance.randint(1, 60)) + text


def emoji_addressed(chance: random.Random) -> Pieces:
    """Emoji and combining marks written here and there."""
    while True:
        text = "".join(chance.choice(EMOJI + MARKED) for _ in range(chance.randint(1, 6)))
        yield _at(chance.randint(1, HEIGHT), chance.randint(1, 60)) + text


def truecolor(chance: random.Random) -> Pieces:
    """A picture: every cell has two colours of its own."""
    while True:
        for row in range(1, HEIGHT + 1):
            cells = []
            for _ in range(WIDTH):
                r, g, b = (chance.randrange(256) for _ in range(3))
                cells.append(f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{b};{r};{g}m▀")
            yield _at(row, 1) + "".join(cells)


def random_bytes(chance: random.Random, size: int) -> bytes:
    """Bytes without any sense."""
    return bytes(chance.choices(range(256), k=size))


MAKERS: dict[str, Callable[[random.Random], Pieces]] = {
    "ASCII log lines": log_lines,
    "one endless line": endless_line,
    "yes": yes_lines,
    "colored lines": colored_lines,
    "editor, full screen": editor,
    "process list": process_list,
    "scrolling region, lines": region_lines,
    "scrolling region, editor": region_editor,
    "CJK lines": cjk_lines,
    "CJK, addressed": cjk_addressed,
    "emoji and marks, lines": emoji_lines,
    "emoji and marks, addressed": emoji_addressed,
    "truecolor cells": truecolor,
    "Latin lines": latin_lines,
}
RANDOM = "random bytes"
NAMES = (*MAKERS, RANDOM)


def corpus(name: str, size: int) -> bytes:
    """At least `size` bytes of the corpus with this name, always the same, ending in RESET."""
    chance = random.Random(f"{name} 1")
    if name == RANDOM:
        return random_bytes(chance, size) + b"\x18" + RESET
    out, length = [], 0
    for piece in MAKERS[name](chance):
        data = piece.encode()
        out.append(data)
        length += len(data)
        if length >= size:
            break
    return b"".join(out) + RESET
