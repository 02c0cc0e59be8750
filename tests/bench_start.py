"""Measure how long our program takes to start, beside an empty Python program and the stock server.

    python tests/bench_start.py [--quick] [--markdown]

A server counts as started when it has printed its MOSH CONNECT line; its CPU time is that of the process that was
started, which exits once the server has detached. Set MOSH_PYZ: run as mosh.py, the program is compiled at each start.

A login is measured from its start to the first prompt, through a private sshd on loopback, beside plain ssh in turn.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import peers
from measuring import PtyClient, Table, median, number, program_line, require_peers, run_main
from sshd import ALIAS, running_sshd

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


def cases(kept: Path) -> list[Case]:
    """What is measured, the floor first. `kept`: our program as the first login leaves it on a host."""
    ours, name = peers.ours_command(), peers.ours_path().name
    arguments = peers.server_command("ours")[len(ours) :]
    bare = [sys.executable, "-IS"]
    return [
        Case("python3 -I -S -c pass", [sys.executable, "-I", "-S", "-c", "pass"]),
        Case(f"{name} --version", [*ours, "--version"]),
        Case("server as a login starts it, to MOSH CONNECT", [*bare, str(kept), *arguments], server=True),
        Case(f"python3 -IS {name} server new, to MOSH CONNECT", [*bare, ours[-1], *arguments], server=True),
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
    with tempfile.TemporaryDirectory(prefix="bench-") as home, far_host(Path(home)) as host:
        host.log_in(host.ours)
        every = cases(next(host.cache.iterdir()))
        samples: list[list[Cost]] = [[] for _ in every]
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


# -- logins ----------------------------------------------------------------------------------------------------

PROMPT = "far-prompt"
LOGIN_RUNS, QUICK_LOGIN_RUNS = 15, 11


@dataclass(frozen=True)
class FarHost:
    """A host to log in to: this machine behind a private sshd, with a home folder of its own."""

    home: Path
    ssh: Sequence[str]

    @property
    def cache(self) -> Path:
        """Where our program stays there."""
        return self.home / ".cache" / "mosh.py"

    @property
    def shell(self) -> list[str]:
        """What each login runs."""
        return ["env", f"PS1={PROMPT} ", *peers.SHELL_COMMAND]

    @property
    def plain(self) -> list[str]:
        """A login with ssh alone."""
        return [*self.ssh, "-tt", ALIAS, "--", shlex.join(self.shell)]

    @property
    def ours(self) -> list[str]:
        """A login with our program, which brings its own server."""
        return [*peers.ours_command(), f"--ssh={shlex.join(self.ssh)}", ALIAS, "--", *self.shell]

    @property
    def stock(self) -> list[str]:
        """A login with stock mosh."""
        return ["mosh", f"--ssh={shlex.join(self.ssh)}", ALIAS, "--", *self.shell]

    def log_in(self, words: Sequence[str]) -> float:
        """Log in, wait for the prompt, and leave. Returns the ms that it took to see the prompt."""
        began = time.monotonic()
        client = PtyClient(words, peers.session_env(self.home))
        try:
            shown = client.wait_for(PROMPT)
            client.type("exit\n")
            for _ in range(100):
                if client.ended:
                    break
                client.read_for(0.05)
            return 1_000 * (shown - began)
        finally:
            client.close()

    def forget(self) -> None:
        """Take away what a login of ours has left."""
        shutil.rmtree(self.cache, ignore_errors=True)


@contextmanager
def far_host(directory: Path) -> Iterator[FarHost]:
    """A host for the length of a `with` block."""
    home, programs = directory / "far", directory / "programs"
    home.mkdir()
    programs.mkdir()
    (programs / "python3").symlink_to(Path(sys.executable).resolve())
    environment = {**peers.session_env(home), "MOSH_SERVER_NETWORK_TMOUT": "60"}
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    with running_sshd(directory / "sshd", environment) as sshd:
        yield FarHost(home, sshd.ssh)


def measure_logins(runs: int) -> dict[str, list[float]]:
    """Milliseconds to the prompt, one figure for each round, in which every kind of login has its turn."""
    samples: dict[str, list[float]] = {"plain ssh": [], "ours, first": [], "ours, again": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, far_host(Path(directory)) as host:
        for turn in range(runs + 1):
            host.forget()
            words = {"plain ssh": host.plain, "ours, first": host.ours, "ours, again": host.ours, "stock": host.stock}
            for name, figures in samples.items():
                took = host.log_in(words[name])
                if turn:
                    figures.append(took)
    return samples


def show_logins(samples: Mapping[str, Sequence[float]], markdown: bool) -> None:
    """Print what each kind of login takes, and what that is over plain ssh in the same round."""
    plain = samples["plain ssh"]
    extra = {name: median(took - base for took, base in zip(figures, plain)) for name, figures in samples.items()}
    table = Table("Login to the first prompt, medians", ["", "ms", "over plain ssh", "of stock's"])
    for name, figures in samples.items():
        share = f"{extra[name] / extra['stock']:.2f}x" if name != "plain ssh" else ""
        table.add(name, [number(median(figures)), number(extra[name]), share])
    table.show(markdown)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure how long programs take to start.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} runs of each instead of {RUNS}")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args()
    require_peers("mosh-server", "mosh", "bash", "ssh", "ssh-keygen")
    results = measure(QUICK_RUNS if options.quick else RUNS)
    floor = results[0][1]
    table = Table("Start, medians", ["", "CPU ms", "of floor", "wall ms", "of floor"])
    for case, cost in results:
        ratios = [cost.cpu_ms / floor.cpu_ms, cost.wall_ms / floor.wall_ms]
        table.add(case.label, [number(cost.cpu_ms), f"{ratios[0]:.1f}x", number(cost.wall_ms), f"{ratios[1]:.1f}x"])
    table.show(options.markdown)
    show_logins(measure_logins(QUICK_LOGIN_RUNS if options.quick else LOGIN_RUNS), options.markdown)
    print(f"\n{program_line()}")


if __name__ == "__main__":
    run_main(main)
