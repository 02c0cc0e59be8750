"""What the benchmarks share: a client on a pty of its own, a whole session over a bad link, CPU clocks and a table.

Import it before mosh: it makes `import mosh` find the program under test, the archive that MOSH_PYZ names or the
module of this checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peers
from peers import Pair, Server
from relay import Relay

# Ours first, the yardstick last: each column is compared with the last one.
PAIRS = (Pair("ours", "ours"), Pair("ours", "stock"), Pair("stock", "ours"), Pair("stock", "stock"))
PAIR_NAMES = [f"{pair.client}/{pair.server}" for pair in PAIRS]

WIDTH, HEIGHT = 80, 24
START_SECONDS = 20.0        # a session that shows nothing by then never will
FAREWELL_SECONDS = 1.0      # a session whose program has ended needs about two round trips of what is then a good link
SEEN_LIMIT = 1 << 16        # characters of a client's output that are kept, the newest
READ_BYTES = 1 << 16
END_OF_INPUT = "\x15\x04"   # empties the line, then ends the file

_ours = peers.ours_path()
if not _ours.exists():
    sys.exit(f"{Path(sys.argv[0]).name}: the program under test is missing: {_ours}")
sys.path.insert(0, str(_ours if _ours.suffix == ".pyz" else _ours.parent))


class MissingPeerError(Exception):
    """A program that the benchmark needs is not there; the text says which, in one line."""


def require_peers(*programs: str) -> None:
    """Raise MissingPeerError unless these programs are installed."""
    for program in programs:
        if shutil.which(program) is None:
            raise MissingPeerError(f"needed to compare with, but not installed: {program}")


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark; what stops it is told in one line, and the exit status is 1."""
    peers.stop_ignoring_signals()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (MissingPeerError, TimeoutError, RuntimeError) as error:
        name = Path(sys.argv[0]).name
        sys.exit(f"{name}: {' '.join(str(error).split())}")


# -- a client on a pty -----------------------------------------------------------------------------------------

_SEQUENCE = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]"                      # CSI
    rb"|\][^\x07\x1b]*(?:\x07|\x1b\\)"                  # OSC
    rb"|[ -/]+[0-~]|[0-Z\\^-~])"                        # ESC, with intermediates or without
)


class PtyClient:
    """A client process on a pty: type at it, and read the text it writes, without the control sequences."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the client. `env` is its whole environment but for TERM."""
        self.fd, terminal = pty.openpty()
        self.seen = ""                  # text that has been written to the terminal, the newest SEEN_LIMIT of it
        self._tail = b""                # the start of a control sequence whose end has not come yet
        try:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
            self._process = subprocess.Popen(
                words, env={**env, "TERM": "xterm-256color"}, stdin=terminal, stdout=terminal, stderr=terminal,
                start_new_session=True,
            )
        except BaseException:
            os.close(self.fd)
            raise
        finally:
            os.close(terminal)
        os.set_blocking(self.fd, False)

    @property
    def pid(self) -> int:
        """The process id of the client."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the client has exited."""
        return self._process.poll() is not None

    def type(self, keys: str) -> None:
        """Type the keys. They are few, so the pty takes them all."""
        os.write(self.fd, keys.encode())

    def read(self) -> bool:
        """Take in what the client has written by now. Returns whether that was anything."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:                 # EIO: the client has gone
            return False
        plain = _SEQUENCE.sub(b"", self._tail + data)
        cut = plain.find(b"\x1b")
        self._tail = plain[cut:] if cut >= 0 else b""
        self.seen = (self.seen + plain[: cut if cut >= 0 else None].decode("utf-8", "replace"))[-SEEN_LIMIT:]
        return bool(data)

    def wait_for(self, wanted: str, seconds: float = START_SECONDS) -> float:
        """Wait until the text has been written. Returns when it was. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while wanted not in self.seen:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {wanted!r}; the end of the output: {self.seen[-300:]!r}")
            self.read_for(min(0.1, seconds))
        return time.monotonic()

    def read_for(self, seconds: float) -> None:
        """Wait for output, at most this long, and take it in."""
        if select.select([self.fd], [], [], seconds)[0] and not self.read():
            peers.pause(seconds)        # it has gone: the pty stays readable

    def drain(self, seconds: float) -> None:
        """Take in all output for this long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read_for(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End the client, if it has not ended, by its process id."""
        peers.end_process(self._process.pid)
        self._process.wait()
        os.close(self.fd)


# -- sessions --------------------------------------------------------------------------------------------------


@dataclass
class Link:
    """What the network between client and server is like, the same in both directions."""

    rtt_ms: float = 0.0
    loss: float = 0.0                           # chance, each way
    rate_bytes_per_s: float | None = None
    buffer_ms: float = 1_000.0
    seed: int = 1


class Session:
    """A server, a relay and a client."""

    def __init__(self, pair: Pair, server: Server, relay: Relay, client: PtyClient) -> None:
        self.pair = pair
        self.server = server
        self.relay = relay
        self.client = client

    def apply(self, link: Link) -> None:
        """Let the relay be like this link from now on."""
        for lane in self.relay.lanes:
            lane.delay_ms, lane.loss = link.rtt_ms / 2, link.loss
            lane.rate_bytes_per_s, lane.buffer_ms = link.rate_bytes_per_s, link.buffer_ms

    def traffic(self) -> tuple[int, int]:
        """Datagrams and bytes that both ends together have sent so far, lost ones included."""
        lanes = self.relay.lanes
        return sum(lane.received for lane in lanes), sum(lane.received_bytes for lane in lanes)


@contextmanager
def opened_session(pair: Pair, home: Path, *, command: Sequence[str], link: Link, prediction: str = "never",
                   **extra: str) -> Iterator[Session]:
    """A session that has just been started, over a link that does not lose or slow anything yet."""
    env = peers.session_env(home, MOSH_PREDICTION_DISPLAY=prediction, **extra)
    with ExitStack() as resources:
        server = resources.enter_context(peers.running_server(pair.server, env, command=command))
        relay = resources.enter_context(Relay(server.port, seed=link.seed, delay_ms=link.rtt_ms / 2))
        client = PtyClient(peers.client_command(pair.client, relay.port), {**env, "MOSH_KEY": server.key})
        resources.callback(client.close)
        yield Session(pair, server, relay, client)


@contextmanager
def all_sessions(*, command: Sequence[str], link: Link, prediction: str = "never",
                 ready: str = "ready", **extra: str) -> Iterator[list[Session]]:
    """One session of each pairing, side by side; each has shown the text `ready`. They are ended as a user does it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as home, ExitStack() as resources:
        sessions = [
            resources.enter_context(
                opened_session(pair, Path(home), command=command, link=link, prediction=prediction, **extra)
            )
            for pair in PAIRS
        ]
        for one in sessions:
            one.client.wait_for(ready)
            one.apply(link)
        yield sessions
        end_sessions(sessions)


def end_sessions(sessions: Iterable[Session]) -> None:
    """Let the program of every session read the end of its input, over a link that has become good."""
    waiting = [one for one in sessions if not one.client.ended]
    for one in waiting:
        one.apply(Link())
        one.client.type(END_OF_INPUT)
    deadline = time.monotonic() + FAREWELL_SECONDS
    while waiting and time.monotonic() < deadline:
        for one in waiting:
            one.client.read()
        waiting = [one for one in waiting if not one.client.ended]
        peers.pause()


# -- clocks ----------------------------------------------------------------------------------------------------


def can_read_cpu() -> bool:
    """Whether `cpu_seconds` works on this system."""
    return Path("/proc/self/stat").exists()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system, without its children."""
    with contextlib.suppress(OSError, ValueError, IndexError):      # by nanoseconds, where the kernel keeps them
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def percentile_95(samples: Iterable[float]) -> float:
    """The sample that 95 % of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


# -- tables ----------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows of text under headings; the first column is a label, the others are figures, or phrases."""

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    phrases: bool = False

    def add(self, label: str, cells: Iterable[str]) -> None:
        """Append a row."""
        self.rows.append([label, *cells])

    def text(self) -> str:
        """The table as aligned text."""
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        justify = str.ljust if self.phrases else str.rjust
        head, *rows = (
            "  ".join([line[0].ljust(widths[0]), *(justify(c, w) for c, w in zip(line[1:], widths[1:]))]).rstrip()
            for line in lines
        )
        return "\n".join([self.title, "", head, "-" * (sum(widths) + 2 * (len(widths) - 1)), *rows])

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---"] + ["---:"] * (len(self.headings) - 1)
        lines = [self.headings, rule, *self.rows]
        return "\n".join([f"{self.title}:", "", *("| " + " | ".join(line) + " |" for line in lines)])

    def show(self, markdown: bool) -> None:
        """Print the table."""
        print("\n" + (self.markdown() if markdown else self.text()), flush=True)


def number(value: float) -> str:
    """A figure with three significant digits or all before the point, and no exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def with_ratio(value: float, yardstick: float | None) -> str:
    """A figure and what share of the yardstick it is; None: it is the yardstick."""
    if yardstick is None:
        return number(value)
    return f"{number(value)} ({value / yardstick:.2f}x)" if yardstick else f"{number(value)} (-)"


def compared(values: Sequence[float]) -> list[str]:
    """Cells for figures of which the last is the yardstick."""
    return [*(with_ratio(value, values[-1]) for value in values[:-1]), number(values[-1])]


def median(samples: Iterable[float]) -> float:
    """The median; 0.0 of nothing."""
    values = list(samples)
    return statistics.median(values) if values else 0.0


def program_line() -> str:
    """What was measured, for the head of a report."""
    name = peers.ours_path().name
    return f"ours: {name} on CPython {sys.version.split()[0]}; {os.cpu_count()} CPUs"
