"""Measure typing over a link that loses datagrams, on a simulated clock: the same seeds, so exact to the byte.

    python tests/bench_simulated.py [--sessions N] [--loss SHARE] [--rtt MS] [--markdown]

Every figure is taken of ours and of a reference end with stock mosh's timers, in all four pairings. Nothing is
predicted; a key counts as shown when the client's screen has its echo. Bytes are UDP payloads, both directions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
from collections.abc import Callable
from functools import partial

import measuring  # before mosh, which it finds
import mosh
from simnet import Simulation, use_stock_timers

KEYS = 40                           # per session, after those that warm it up
WARM_UP_KEYS = 12
GAP_MS = (150, 400)                 # between two keys
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PAIRINGS = {"stock's rules": "cs", "our client": "s", "our server": "c", "both ours": ""}    # which ends are stock's


class Typist:
    """Types letters that differ and notes when each comes back."""

    def __init__(self, sim: Simulation, chance: random.Random) -> None:
        self.latencies_ms: list[int] = []
        self._sim = sim
        self._pressed_at: dict[str, int] = {}
        letters = chance.sample(LETTERS, WARM_UP_KEYS + KEYS)
        at = sim.now
        for letter in letters:
            at += chance.randint(*GAP_MS)
            sim.at(at, partial(self._press, letter))
        self._counted = set(letters[WARM_UP_KEYS:])

    def _press(self, letter: str) -> None:
        self._sim.client.type(letter)
        if letter in self._counted:
            self._pressed_at[letter] = self._sim.now

    def look(self) -> bool:
        """Note what has come back. Returns whether all has."""
        text = self._sim.client.screen.lines[0]
        for letter in [letter for letter in self._pressed_at if letter in text]:
            self.latencies_ms.append(self._sim.now - self._pressed_at.pop(letter))
        return len(self.latencies_ms) == KEYS


def session(seed: int, stock_ends: str, shape: Callable[[Simulation], None]) -> tuple[list[int], int, int]:
    """Return (latencies in ms, datagrams, bytes) of one session."""
    with contextlib.redirect_stdout(io.StringIO()):
        sim = Simulation(seed, mode=mosh.PredictionMode.NEVER)
    if "c" in stock_ends:
        use_stock_timers(sim.client.core.transport)
    if "s" in stock_ends:
        use_stock_timers(sim.server.core.transport)
    sim.run(ms=1_000)
    shape(sim)
    typist = Typist(sim, random.Random(seed))
    sim.run_until(typist.look, limit_ms=60_000)
    datagrams = [each for direction in (mosh.TO_SERVER, mosh.TO_CLIENT) for each in sim.datagrams(direction)]
    return typist.latencies_ms, len(datagrams), sum(map(len, datagrams))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure typing on a simulated lossy link, beside stock's timers.")
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--loss", type=float, default=0.29, help="share of datagrams lost, each way")
    parser.add_argument("--rtt", type=int, default=100)
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args()

    def shape(sim: Simulation) -> None:
        sim.link.delay_ms, sim.link.loss = options.rtt // 2, options.loss

    title = f"RTT {options.rtt} ms, loss {options.loss:.0%} each way, {options.sessions} sessions of {KEYS} keys"
    table = measuring.Table(title, ["", *PAIRINGS])
    results = [[session(seed, ends, shape) for seed in range(options.sessions)] for ends in PAIRINGS.values()]
    latencies = [[float(latency) for played in pairing for latency in played[0]] for pairing in results]
    rows = {
        "key to echo: median, ms": [measuring.median(values) for values in latencies],
        "key to echo: mean, ms": [sum(values) / len(values) for values in latencies],
        "key to echo: p95, ms": [measuring.percentile_95(values) for values in latencies],
        "datagrams per session": [sum(float(played[1]) for played in pairing) / len(pairing) for pairing in results],
        "bytes per session": [sum(float(played[2]) for played in pairing) / len(pairing) for pairing in results],
    }
    for label, values in rows.items():
        table.add(label, measuring.compared(values))
    table.show(options.markdown)


if __name__ == "__main__":
    measuring.run_main(main)
