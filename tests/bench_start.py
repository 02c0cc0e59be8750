"""Measure how long our program takes to start, beside an empty Python program and the stock server.

    python tests/bench_start.py [--quick] [--markdown]

A server counts as started when it has printed its MOSH CONNECT line; its CPU time is that of the process that was
started, which exits once the server has detached. Set MOSH_PYZ: run as mosh.py, the program is compiled at each start.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import peers
from measuring import Table, median, number, program_line, require_peers, run_main

RUNS, QUICK_RUNS = 31, 11
START_SECONDS = 20.0            # what has not started by then is killed
_DETACHED = re.compile(rb"\[mosh-server detached, pid = (\d+)\]")


class Cost(NamedTuple):
    """What one start took."""

    cpu_ms: float
    wall_ms: float


class Case(NamedTuple):
    """A program to start."""

    label: str
    words: Sequence[str]
    server: bool = False


def cases() -> list[Case]:
    """What is measured, the floor first."""
    ours, name = peers.ours_command(), peers.ours_path().name
    return [
        Case("python3 -I -S -c pass", [sys.executable, "-I", "-S", "-c", "pass"]),
        Case(f"{name} --version", [*ours, "--version"]),
        Case(f"{name} server new, to MOSH CONNECT", peers.server_command("ours"), server=True),
        Case("mosh-server new (stock), to MOSH CONNECT", peers.server_command("stock"), server=True),
    ]


def start(case: Case, env: Mapping[str, str]) -> Cost:
    """Start the program once; a server that it leaves behind is ended. Raises RuntimeError if it failed."""
    with tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            case.words, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )
        guard = threading.Timer(START_SECONDS, process.kill)
        guard.start()
        assert process.stdout is not None
        with process.stdout as output:
            connected = case.server and any(line.startswith(b"MOSH CONNECT ") for line in output)
            announced_at = time.monotonic()
            _, status, usage = os.wait4(process.pid, 0)
        ended_at = time.monotonic()
        guard.cancel()
        process.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        errors.seek(0)
        detached = _DETACHED.search(errors.read())
        if detached:
            peers.end_process(int(detached[1]))
    if process.returncode or (case.server and not (connected and detached)):
        raise RuntimeError(f"{case.label} failed with status {process.returncode}")
    wall = (announced_at if case.server else ended_at) - began
    return Cost(cpu_ms=1_000 * (usage.ru_utime + usage.ru_stime), wall_ms=1_000 * wall)


def measure(runs: int) -> list[tuple[Case, Cost]]:
    """The median cost of every case, taken in turn. A first round, which fills the file cache, does not count."""
    every = cases()
    samples: list[list[Cost]] = [[] for _ in every]
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        env = peers.session_env(Path(home))
        for turn in range(runs + 1):
            for case, costs in zip(every, samples):
                cost = start(case, env)
                if turn:
                    costs.append(cost)
    return [
        (case, Cost(median(cost.cpu_ms for cost in costs), median(cost.wall_ms for cost in costs)))
        for case, costs in zip(every, samples)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure how long programs take to start.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs of each instead of {RUNS}")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args()
    require_peers("mosh-server", "bash")
    results = measure(QUICK_RUNS if options.quick else RUNS)
    floor = results[0][1]
    table = Table("Start, medians", ["", "CPU ms", "of floor", "wall ms", "of floor"])
    for case, cost in results:
        ratios = [cost.cpu_ms / floor.cpu_ms, cost.wall_ms / floor.wall_ms]
        table.add(case.label, [number(cost.cpu_ms), f"{ratios[0]:.1f}x", number(cost.wall_ms), f"{ratios[1]:.1f}x"])
    table.show(options.markdown)
    print(f"\n{program_line()}")


if __name__ == "__main__":
    run_main(main)
