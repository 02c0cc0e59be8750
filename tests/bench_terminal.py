"""Measure the terminal: the emulator alone, the frame diff alone, and a whole server at work beside the stock one.

    python tests/bench_terminal.py [--quick] [--only PART] [--markdown]

Times are CPU times. Corpora come from corpora.py. The whole server is measured in a live session with a stock client:
`cat` prints a corpus on its pty, and the server's own CPU time and the bytes it sends to the client are taken. Its
children are not counted.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import corpora
import measuring  # before mosh, which it finds
import mosh
from peers import Pair

FEEDS_KIB = (16, 64)
MIN_CPU_SECONDS = 0.05          # a corpus is fed again and again until this much is spent
SETTLE_SECONDS = 0.4            # after the end of a corpus is on the screen: the last acks
CAT_SECONDS = 120.0             # one corpus through a session takes no longer
SIZES = ((80, 24), (200, 60))
SERVERS = (Pair("stock", "ours"), Pair("stock", "stock"))
# Of each kind of output one: these go through whole sessions.
SESSION_CORPORA = (
    "ASCII log lines", "yes", "colored lines", "editor, full screen", "scrolling region, editor", "CJK lines",
    "emoji and marks, lines", "truecolor cells",
)
# Prints the files whose numbers are typed, each followed by a text that no corpus holds.
CAT_COMMAND = ("sh", "-c", 'cd "$HOME"; echo ready; while read -r name; do cat "$name"; echo "=#=$name=#="; done')


@dataclass
class Effort:
    """How much to measure."""

    corpus_bytes: int
    cpu_limit_seconds: float    # a corpus is cut off after this
    runs: int
    session_bytes: int
    session_corpora: Sequence[str]
    session_runs: int


QUICK = Effort(1 << 20, 0.3, 1, 1 << 20, SESSION_CORPORA, 1)
FULL = Effort(4 << 20, 1.0, 3, 4 << 20, SESSION_CORPORA, 3)


# -- the emulator alone ----------------------------------------------------------------------------------------


def megabytes_per_second(feed: Callable[[bytes], object], data: bytes, feed_bytes: int, limit_seconds: float) -> float:
    """How fast `feed` takes in the data, `feed_bytes` at a time, cut off at the limit."""
    chunks = [data[at : at + feed_bytes] for at in range(0, len(data), feed_bytes)]
    fed, began, spent = 0, time.process_time(), 0.0
    while spent < MIN_CPU_SECONDS:
        for chunk in chunks:
            feed(chunk)
            fed += len(chunk)
            spent = time.process_time() - began
            if spent > limit_seconds:
                break
    return fed / spent / 1e6


def pyte_feed() -> Callable[[bytes], object] | None:
    """The feed function of a new pyte terminal, None if there is no pyte."""
    try:
        pyte = importlib.import_module("pyte")
    except ImportError:
        return None
    feed: Callable[[bytes], object] = pyte.ByteStream(pyte.Screen(corpora.WIDTH, corpora.HEIGHT)).feed
    return feed


def pyte_speed(data: bytes, limit_seconds: float) -> float:
    """The speed of pyte in MB/s; 0.0 if it is not there or fails on the corpus."""
    feed = pyte_feed()
    if feed is None:
        return 0.0
    try:
        return megabytes_per_second(feed, data, 4096, limit_seconds)
    except Exception:       # some sequences make pyte raise errors of all kinds, which says nothing about ours
        return 0.0


def measure_emulator(effort: Effort) -> measuring.Table:
    """MB/s of our emulator by size of feed, and of pyte."""
    table = measuring.Table(
        "Emulator alone, MB/s of CPU (ratio to pyte)", ["80x24", *(f"{size} KiB feeds" for size in FEEDS_KIB), "pyte"]
    )
    for name in corpora.NAMES:
        data = corpora.corpus(name, effort.corpus_bytes)
        ours: list[list[float]] = [[] for _ in FEEDS_KIB]
        others: list[float] = []
        for _ in range(effort.runs):
            for kib, speeds in zip(FEEDS_KIB, ours):
                emulator = mosh.Emulator(corpora.WIDTH, corpora.HEIGHT)
                speeds.append(megabytes_per_second(emulator.feed, data, kib << 10, effort.cpu_limit_seconds))
            others.append(pyte_speed(data, effort.cpu_limit_seconds))
        other = measuring.median(others)
        medians = [measuring.median(speeds) for speeds in ours]
        cells = [measuring.number(speed) + (f" ({speed / other:.1f}x)" if other else "") for speed in medians]
        table.add(name, [*cells, measuring.number(other) if other else "-"])
    return table


# -- the frame diff alone --------------------------------------------------------------------------------------


def diff_cases(width: int, height: int) -> dict[str, Callable[[], bytes]]:
    """Frame diffs to time, by name. The screen is full of coloured lines."""
    emulator = mosh.Emulator(width, height)
    display = mosh.Display()
    text = corpora.corpus("colored lines", 4 * width * height)

    def screen_after(data: bytes) -> mosh.Framebuffer:
        emulator.feed(data)
        return emulator.copy().framebuffer

    full = screen_after(text)
    echoed = screen_after(b"x")
    scrolled = screen_after(b"\r\nthe next line of a long listing")
    other = screen_after(corpora.corpus("ASCII log lines", 2 * width * height))
    return {
        "one echoed character": lambda: display.frame(full, echoed),
        "one line scrolled": lambda: display.frame(echoed, scrolled),
        "every row changed": lambda: display.frame(scrolled, other),
        "full repaint": lambda: display.frame(scrolled, scrolled, known=False),
    }


def microseconds(call: Callable[[], object], runs: int) -> float:
    """The median CPU time of a call."""
    samples = []
    for _ in range(2 * runs + 1):
        calls, began, spent = 0, time.process_time(), 0.0
        while spent < MIN_CPU_SECONDS:
            call()
            calls += 1
            spent = time.process_time() - began
        samples.append(1e6 * spent / calls)
    return measuring.median(samples)


def measure_diff(effort: Effort) -> measuring.Table:
    """CPU time and size of frame diffs."""
    headings = ["", *(f"{width}x{height}" for width, height in SIZES)]
    table = measuring.Table("Frame diff alone, microseconds of CPU (and bytes)", headings)
    columns = [diff_cases(width, height) for width, height in SIZES]
    for name in columns[0]:
        cells = []
        for cases in columns:
            spent = microseconds(cases[name], effort.runs)
            cells.append(f"{measuring.number(spent)} ({len(cases[name]())})")
        table.add(name, cells)
    return table


# -- a whole server --------------------------------------------------------------------------------------------


def cat(session: measuring.Session, name: str) -> tuple[float, float]:
    """Print a file in the session. Returns the server's CPU seconds and the bytes it sent."""
    client, lane = session.client, session.relay.down
    cpu, sent = measuring.cpu_seconds(session.server.pid), lane.received_bytes
    client.seen = ""
    client.type(name + "\r")
    client.wait_for(f"=#={name}=#=", CAT_SECONDS)
    client.drain(SETTLE_SECONDS)
    return measuring.cpu_seconds(session.server.pid) - cpu, lane.received_bytes - sent


def measure_server(effort: Effort) -> measuring.Table:
    """CPU and wire bytes of our server and the stock one, in sessions side by side that take turns."""
    table = measuring.Table(
        f"Whole server, `cat` of {effort.session_bytes >> 20} MiB, stock client, 80x24",
        ["", "ours CPU s", "stock CPU s", "ratio", "ours KB", "stock KB", "ratio"],
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as resources:
        home = Path(folder)
        for at, name in enumerate(effort.session_corpora):      # cat's terminal makes CR LF of every LF
            (home / str(at)).write_bytes(corpora.corpus(name, effort.session_bytes).replace(b"\r\n", b"\n"))
        sessions = [
            resources.enter_context(measuring.opened_session(pair, home, command=CAT_COMMAND, link=measuring.Link()))
            for pair in SERVERS
        ]
        for session in sessions:
            session.client.wait_for("ready")
        for at, name in enumerate(effort.session_corpora):
            costs = [[cat(session, str(at)) for session in sessions] for _ in range(effort.session_runs)]
            table.add(name, _server_cells(costs))
        measuring.end_sessions(sessions)
    return table


def _server_cells(costs: list[list[tuple[float, float]]]) -> list[str]:
    """Cells from runs of [ours, stock] of (CPU seconds, bytes)."""
    cells = []
    for part, scale in ((0, 1.0), (1, 1e-3)):
        ours, stock = (scale * measuring.median(run[who][part] for run in costs) for who in (0, 1))
        cells += [measuring.number(ours), measuring.number(stock), f"{ours / stock:.2f}x" if stock else "-"]
    return cells


# -- command line ----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Effort], measuring.Table]] = {
    "emulator": measure_emulator, "diff": measure_diff, "server": measure_server,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the terminal, beside pyte and the stock server.")
    parser.add_argument("--quick", action="store_true", help="smaller corpora, one run of each")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    options = parser.parse_args()
    parts = options.only or list(PARTS)
    if "server" in parts:
        measuring.require_peers("mosh-server", "mosh-client")
        if not measuring.can_read_cpu():
            parts = [part for part in parts if part != "server"]
            print("left out: without /proc there is no telling what a server costs")
    began = time.monotonic()
    for part in parts:
        PARTS[part](QUICK if options.quick else FULL).show(options.markdown)
    print(f"\n{measuring.program_line()}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    measuring.run_main(main)
