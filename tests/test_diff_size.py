"""Section 12 against stock mosh-server: a frame diff of ours takes no more bytes than stock's for the same two screens.

Streams of several kinds are played step by step to live stock servers. For every diff that a stock server sends, the
screens before and after it are those of our client's receiver, and our own diff between them is set against it.

frame_diff_sizes.json holds what has once been measured so, for machines without a stock server. Each of its streams
is a screen size and steps [bytes in hex, stock's length]: the screens of a pair are those that our emulator makes of
all the steps before and of one more. The length is null where stock did not send one diff for exactly that pair.
Recorded anew by: PYTHONPATH=.:tests python tests/test_diff_size.py
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import pytest

import corpora
import mosh
from conftest import require_kind
from live_peer import RESET, REST, LivePeer, Size, StockServer, differences
from test_differential import OUR_FLAWS, RECORDINGS, SIZES, Streams, excuse, record

LONG = bool(os.environ.get("MOSH_SIM_LONG"))
STEPS = 600 if LONG else 60                 # of each kind, at most
SESSIONS = 6                                # at a time; they mostly wait for the server's frame interval
QUIET_MS = 250                              # after so long without a frame, the screens are not going to agree
WORST = 5                                   # examples shown of each kind
SIZES_FILE = Path(__file__).with_name("frame_diff_sizes.json")
RECORDED_BYTES = 3_000                      # of each kind, about
SCREEN: Size = (corpora.WIDTH, corpora.HEIGHT)

Step = bytes
Stream = tuple[Size, list[Step]]
RecordedStep = tuple[bytes, Optional[int]]
RecordedStream = tuple[Size, list[RecordedStep]]


# -- streams ---------------------------------------------------------------------------------------------------


def _at(row: int, col: int) -> str:
    return f"\x1b[{row};{col}H"


def _words(chance: random.Random, number: int) -> str:
    return " ".join(chance.choices(corpora.WORDS, k=number))


def shell(chance: random.Random) -> corpora.Pieces:
    """A shell: a prompt, a command line echoed key by key and corrected, its output."""
    listings = (corpora.log_lines(chance), corpora.colored_lines(chance), corpora.latin_lines(chance))
    while True:
        yield f"\x1b[01;32muser@host\x1b[00m:\x1b[01;34m~/{chance.choice(corpora.WORDS)}\x1b[00m$ "
        for key in _words(chance, chance.randint(1, 3)):
            yield key
            if chance.random() < 0.05:
                yield "\b\x1b[K"
        if chance.random() < 0.2:
            yield "\b\b\b\b"
            yield "\x1b[1@x"
            yield "\x1b[2P"
        yield "\r\n"
        yield "".join(islice(chance.choice(listings), chance.choice((0, 1, 3, 12, 40))))


def scrolled_editor(chance: random.Random) -> corpora.Pieces:
    """A full-screen editor whose text is scrolled by lines and pages, with a status line."""
    lines = [f"\x1b[33m{n:4} \x1b[m{_words(chance, chance.choice((0, 1, 3, 5, 8)))}" for n in range(1, 300)]
    rows, top = corpora.HEIGHT - 2, 100

    def draw(first: int, count: int) -> str:
        return "".join(f"{_at(first + i + 1, 1)}{lines[top + first + i]}\x1b[K" for i in range(count))

    yield "\x1b[?1049h\x1b[2J" + draw(0, rows)
    while True:
        distance = chance.choice((1, 1, 1, 2, 3, 5, 11, 22)) * chance.choice((1, -1))
        distance = max(-top, min(distance, len(lines) - rows - top))
        top += distance
        if not -rows < distance < rows:
            out = draw(0, rows)
        elif distance > 0:
            out = f"\x1b[1;{rows}r{_at(rows, 1)}" + "\n" * distance + "\x1b[r" + draw(rows - distance, distance)
        else:
            out = f"\x1b[1;{rows}r{_at(1, 1)}" + "\x1bM" * -distance + "\x1b[r" + draw(0, -distance)
        status = f"{_at(rows + 1, 1)}\x1b[7m file.py {top:6},{chance.randint(1, 80):<40}\x1b[m\x1b[K"
        yield f"\x1b[?25l{out}{status}{_at(chance.randint(1, rows), chance.randint(1, 60))}\x1b[?25h"


def insertions(chance: random.Random) -> corpora.Pieces:
    """Lines and characters inserted and deleted amid text."""
    yield "".join(f"{_at(row, 1)}{_words(chance, chance.randint(0, 9))}\x1b[K" for row in range(1, corpora.HEIGHT))
    while True:
        count = chance.choice(("", "", "2", "3", "7"))
        edit = chance.choice("LM@PX")
        text = _words(chance, chance.randint(0, 4)) if edit == "L" else ""
        yield f"{_at(chance.randint(1, corpora.HEIGHT), chance.randint(1, 50))}\x1b[{count}{edit}{text}"


def regions(chance: random.Random) -> corpora.Pieces:
    """Parts of the screen scrolled up and down by several lines."""
    yield "".join(f"{_at(row, 1)}{row} {_words(chance, 6)}\x1b[K" for row in range(1, corpora.HEIGHT + 1))
    while True:
        top = chance.randint(1, 16)
        bottom = chance.randint(top + 1, corpora.HEIGHT)
        count = chance.choice((1, 1, 2, 4))
        scroll = chance.choice((_at(bottom, 1) + "\n" * count, _at(top, 1) + "\x1bM" * count, f"\x1b[{count}S"))
        yield f"\x1b[{top};{bottom}r{scroll}\x1b[r{_at(chance.choice((top, bottom)), 1)}{_words(chance, 3)}\x1b[K"


def wrapping(chance: random.Random) -> corpora.Pieces:
    """Long lines that wrap, written in parts."""
    while True:
        yield _words(chance, chance.choice((1, 3, 10, 25))) + chance.choice((" ", " ", "\r\n", f"{_at(5, 70)}"))


def forms(chance: random.Random) -> corpora.Pieces:
    """Fields of a form: blanks of all lengths amid text, colored bars, a cursor that comes and goes, titles."""
    while True:
        row, col = chance.randint(1, corpora.HEIGHT), chance.randint(1, 70)
        color = chance.choice(("", "", "\x1b[44m", "\x1b[7m", "\x1b[1;37;41m"))
        yield chance.choice((
            f"{_at(row, col)}{color}\x1b[{chance.randint(1, 30)}X\x1b[m",
            f"{_at(row, col)}{color}{' ' * chance.randint(1, 30)}\x1b[m",
            f"{_at(row, col)}{color}{_words(chance, 3)}\x1b[m",
            f"{_at(row, col)}{color}\x1b[{chance.choice('KJ')}\x1b[m",
            f"{_at(row, col)}{color}\x1b[1{chance.choice('KJ')}\x1b[m",
            f"{_at(row, 1)}{_words(chance, 9)}\x1b[K",
            f"{_at(row, col)}", f"\x1b[?25{chance.choice('lh')}", f"\x1b[?{chance.choice((1000, 1002, 1006, 2004))}h",
            f"\x1b]{chance.choice('012')};{_words(chance, 2)}\x07", f"\x1b[?{chance.choice((1000, 1002, 1006, 2004))}l",
        ))


def pixels(chance: random.Random) -> corpora.Pieces:
    """Rows of cells with two true colors each, some of them alike."""
    while True:
        cells = []
        for _ in range(chance.randint(1, 40)):
            r, g, b = (chance.randrange(0, 256, 15) for _ in range(3))
            cells.append(f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{b};{r};{g}m" + "▀" * chance.choice((1, 1, 4)))
        yield _at(chance.randint(1, corpora.HEIGHT), chance.randint(1, 40)) + "".join(cells) + "\x1b[m"


MADE_UP: dict[str, Callable[[random.Random], corpora.Pieces]] = {
    "shell": shell, "scrolled editor": scrolled_editor, "insertions": insertions, "regions": regions,
    "wrapping": wrapping, "forms": forms, "pixels": pixels,
    **{name: maker for name, maker in corpora.MAKERS.items() if name not in ("yes", "truecolor cells")},
}


def made_up(name: str, steps: int, _home: Path) -> Iterator[Stream]:
    """Yield a stream of one kind of MADE_UP."""
    chance = random.Random(f"size {name}")
    pieces = MADE_UP[name](chance)
    yield SCREEN, ["".join(islice(pieces, chance.choice((1, 1, 1, 2, 5)))).encode() for _ in range(steps)]


def arbitrary(size: Size, steps: int, _home: Path) -> Iterator[Stream]:
    """Yield a stream of everything that a terminal understands, for one size of the screen."""
    chance = random.Random(f"size {size}")
    pieces = (Streams(chance, size).pieces()[: chance.choice((1, 2, 3, 5, 20))] for _ in range(steps))
    yield size, [b"".join(step) + REST for step in pieces]


def recorded(name: str, steps: int, home: Path) -> Iterator[Stream]:
    """Yield what a real program writes, cut where an escape sequence or a line begins."""
    stream = record(name, home)
    places = [match.end() for match in re.finditer(rb"\n|(?=\x1b[^\\])", stream)]
    cuts = sorted({0, len(stream), *random.Random(name).sample(places, min(steps - 1, len(places)))})
    yield SCREEN, [stream[start:end] for start, end in zip(cuts, cuts[1:])]


# -- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two screens of a receiver, what stock sent to turn one into the other, and what we would send."""

    base: mosh.Framebuffer
    new: mosh.Framebuffer
    stock: bytes
    ours: bytes

    def __str__(self) -> str:
        excess = len(self.ours) - len(self.stock)
        return f"{excess:+} bytes\n    stock {self.stock!r}\n    ours  {self.ours!r}"


def is_flawed(base: mosh.Framebuffer, new: mosh.Framebuffer) -> bool:
    """Whether one of the flaws that test_differential.py names makes stock's diff shorter than it may be.

    Excused are "covered", where a cell shows that was the right half of a wide character, which stock takes for
    known, and "edge", a wide character in the last column, of which nothing can be shown. Excused is also "doubtful": a
    new row with a character after which ours places the cursor explicitly, since two ends may judge its width
    differently, and stock hopes for the best.
    """
    last = new.width - 1
    shown = zip(base.rows, new.rows, new.lines())
    if any(any(map(mosh.is_width_doubtful, line)) for old, row, line in shown if old != row):
        return True
    for rows in zip(base.rows, new.rows):
        columns = []
        for screen, row in zip((base, new), rows):
            text = row.padded(screen.width)[0]
            columns.append(set(screen.visible_columns(text)))
            if last in columns[-1] and screen.codebook.is_wide(text[last]):
                return True
        if columns[1] - columns[0]:
            return True
    return False


@dataclass
class Tally:
    """What has been measured of one kind of streams."""

    pairs: int = 0
    stock_bytes: int = 0
    our_bytes: int = 0
    flawed: int = 0                         # diffs of stock's that do not do, or need not do, what ours must
    longer: list[Pair] = field(default_factory=list)

    def add(self, pairs: Iterable[Pair]) -> None:
        """Count pairs that are to be judged."""
        for pair in pairs:
            longer = len(pair.ours) > len(pair.stock)
            if longer and is_flawed(pair.base, pair.new):
                self.flawed += 1
                continue
            self.pairs += 1
            self.stock_bytes += len(pair.stock)
            self.our_bytes += len(pair.ours)
            if longer:
                self.longer.append(pair)

    def __str__(self) -> str:
        ratio = self.our_bytes / max(1, self.stock_bytes)
        return (
            f"{self.pairs:5} pairs, ours {self.our_bytes:7} bytes, stock's {self.stock_bytes:7}, ratio {ratio:.3f}, "
            f"{len(self.longer)} longer, {self.flawed} flawed"
        )


class MeasuredState(mosh.TerminalState):
    """A screen that hands every pair that a diff makes of it to an observer."""

    __slots__ = ("_observe",)

    def __init__(self, state: mosh.TerminalState, observe: Callable[[Pair], None]) -> None:
        super().__init__(state.emulator, state.echo_ack, state.hello)
        self._observe = observe

    def applied(self, diff: bytes) -> MeasuredState:
        """See State."""
        new = MeasuredState(super().applied(diff), self._observe)
        stock = b""
        resized = False
        for number, entry in mosh.decode_fields(diff):
            assert number == mosh.MESSAGE_INSTRUCTION and isinstance(entry, bytes)
            fields = dict(mosh.decode_fields(entry))
            resized = resized or mosh.HOST_RESIZE in fields
            if mosh.HOST_BYTES in fields:
                host_bytes = fields[mosh.HOST_BYTES]
                assert isinstance(host_bytes, bytes)
                hoststring = dict(mosh.decode_fields(host_bytes))[mosh.HOST_STRING]
                assert isinstance(hoststring, bytes)
                stock += hoststring
        if not resized:
            ours = mosh.Display().frame(self.framebuffer, new.framebuffer)
            if stock or ours:
                self._observe(Pair(self.framebuffer, new.framebuffer, stock, ours))
        return new


class MeasuredServer(StockServer):
    """A stock server whose diffs are compared with ours."""

    def __init__(self, home: Path, size: Size) -> None:
        super().__init__(home, size)
        self.pairs: list[Pair] = []         # since they were last taken

    def _start(self) -> None:
        super()._start()
        first = self.core.transport.remote
        first.state = MeasuredState(first.state, self.pairs.append)

    def play(self, data: Step) -> list[str]:
        """See LivePeer; what the terminal answers to the program does not matter here."""
        found = LivePeer.play(self, data)
        self._reference.take_replies()
        self._replies.clear()
        return found

    def step(self, data: Step, tally: Tally, settle: bool = False) -> list[Pair] | None:
        """The program writes `data`; count the diffs that come of it, and return them. `settle`: acknowledge them.

        Returns None if they did not make the receiver's screen the program's. Both are then empty again.
        """
        self.pairs.clear()
        self._write(data)
        if not self._agrees():
            self._write(REST)
            found = self.play(b"")
            if found:
                tally.flawed += len(self.pairs)
                self._write(REST + RESET)
                self.scrub()
                return None
        sender = self.core.transport.sender
        if settle:
            self._run_until(lambda: not sender.data_ack_due and not self._unwritten, "an ack to be sent")
        pairs = self.pairs[:]
        tally.add(pairs)
        return pairs

    def _agrees(self) -> bool:
        """Wait until the screen is the program's. Returns False when nothing comes any more and it is not."""
        num, quiet_at = -1, 0
        while True:
            if self._unwritten or self.core.transport.remote.num != num:
                num, quiet_at = self.core.transport.remote.num, mosh.monotonic_ms() + QUIET_MS
                if not self._unwritten and not differences(self.reference, self.received):
                    self._reference.take_replies()
                    return True
            if mosh.monotonic_ms() > quiet_at:
                return False
            self._turn()
            self._replies.clear()


def measure(streams: Iterable[Stream], home: Path) -> Tally:
    """Play streams, each to a stock server of its own."""
    tally = Tally()
    for number, (size, steps) in enumerate(streams):
        nest = home / str(number)
        nest.mkdir()
        with MeasuredServer(nest, size) as server:
            for step in steps:
                server.step(step, tally)
    return tally


def record_sizes(streams: Iterable[Stream], home: Path) -> list[RecordedStream]:
    """Play streams likewise, each as far as RECORDED_BYTES; return what goes into frame_diff_sizes.json."""
    recorded = []
    for number, (size, steps) in enumerate(streams):
        nest, tally = home / str(number), Tally()
        nest.mkdir()
        taken: list[RecordedStep] = []
        with MeasuredServer(nest, size) as server:
            room = RECORDED_BYTES
            for step in [b"\x1b]0;\x07\x1b]52;c;\x07", *steps]:     # what the marks of the beginning left is gone
                room -= len(step)
                before = server.received
                pairs = server.step(step, tally, settle=True)
                if room < 0 or pairs is None:
                    break
                exact = len(taken) > 0 and len(pairs) == 1 and pairs[0].base is before
                taken.append((step, len(pairs[0].stock) if exact else None))
        recorded.append((size, taken))
    return recorded


# -- the tests -------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Path], Iterator[Stream]]] = {
    **{name: partial(made_up, name, STEPS) for name in MADE_UP},
    **{f"arbitrary {size[0]}x{size[1]}": partial(arbitrary, size, STEPS // 4) for size in SIZES},
    **{f"recorded {name}": partial(recorded, name, STEPS) for name in RECORDINGS},
}


def _measure_kind(kind: str, home: Path) -> Tally:
    return measure(KINDS[kind](home), home)


@pytest.fixture(scope="module")
def tallies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Tally]]]:
    """What the sessions of all kinds that are tested will have measured; they run beside each other."""
    require_kind("stock")
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    kinds = dict.fromkeys(item.callspec.params.get("kind") for item in items)
    with ThreadPoolExecutor(SESSIONS) as pool:
        yield {
            kind: pool.submit(_measure_kind, kind, tmp_path_factory.mktemp("size")) for kind in KINDS if kind in kinds
        }


@pytest.mark.live
@pytest.mark.parametrize("kind", KINDS)
def test_no_diff_is_longer_than_stocks(tallies: dict[str, Future[Tally]], kind: str) -> None:
    tally = tallies[kind].result()
    print(f"{kind}: {tally}")
    worst = sorted(tally.longer, key=lambda pair: len(pair.stock) - len(pair.ours))[:WORST]
    assert not worst, f"{kind}: {tally}\n" + "\n".join(map(str, worst))
    assert tally.pairs > 0


STREAMS: list[dict[str, Any]] = json.loads(SIZES_FILE.read_text(encoding="utf-8")) if SIZES_FILE.exists() else []


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: str(stream["kind"]))
def test_no_recorded_diff_is_longer_than_stocks(stream: dict[str, Any]) -> None:
    width, height = stream["size"]
    sender = mosh.Emulator(width, height)
    receiver = mosh.Emulator(width, height, sender.framebuffer.codebook)
    for number, (data, stock_length) in enumerate(stream["steps"]):
        base = sender.framebuffer.copy()
        sender.feed(bytes.fromhex(data))
        new = sender.framebuffer
        ours = mosh.Display().frame(base, new)
        step = f"step {number}, {bytes.fromhex(data)!r}: {len(ours)} bytes, stock's {stock_length}: {ours!r}"
        assert stock_length is None or len(ours) <= stock_length or is_flawed(base, new), step
        receiver.feed(ours)
        found = differences(new, receiver.framebuffer)
        assert not found or excuse(new, receiver.framebuffer, found, OUR_FLAWS), f"{step}\n{found}"


def main() -> None:
    """Record frame_diff_sizes.json."""
    kinds = [kind for kind in KINDS if not kind.startswith("recorded")]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(SESSIONS) as pool:
        homes = [Path(directory) / str(number) for number in range(len(kinds))]
        for home in homes:
            home.mkdir()
        results = pool.map(lambda kind, home: record_sizes(KINDS[kind](home), home), kinds, homes)
        lines = [
            json.dumps({"kind": kind, "size": size, "steps": [[data.hex(), length] for data, length in steps]})
            for kind, streams in zip(kinds, results) for size, steps in streams
        ]
    SIZES_FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
