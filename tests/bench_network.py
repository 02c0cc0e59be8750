"""Measure sessions over a bad link: how long a key takes to the screen, how fast Ctrl-C stops a flood, what idling
costs.

    python tests/bench_network.py [--quick] [--only ROW] [--markdown]

Every figure is taken of all four pairings of our client and server with the stock ones, in the same run. Where keys are
timed, the four sessions are open side by side and are typed at in turn, so noise of the machine hits them alike. A
client runs on a pty of 80x24; its datagrams pass a relay in user space. A key counts as shown when the client writes
its character to the pty. Every character is typed once only on a line, so none can be taken for another.
"""

from __future__ import annotations

import argparse
import heapq
import random
import select
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import peers
from measuring import (
    END_OF_INPUT,
    PAIR_NAMES,
    Link,
    Session,
    Table,
    all_sessions,
    can_read_cpu,
    compared,
    cpu_seconds,
    median,
    percentile_95,
    program_line,
    require_peers,
    run_main,
)

SEED = 20_260
GAP_SECONDS = (0.15, 0.40)          # between two keys of a session
KEY_SECONDS = 15.0                  # a key not shown by then is an error
LINE_KEYS = string.ascii_letters + string.digits    # at most these on a line, each once
WARM_UP_KEYS = 4                    # not counted: until the ends know the round trip, and an epoch is confirmed
PREDICTED_MS = 20.0                 # what is shown within this looks instant
ECHO_COMMAND = ("sh", "-c", "echo ready; exec cat")
KILL_LINE = "\x15"

PROMPT = "=#="                      # neither in a flood nor made of blanks, so a frame holds all of it
MEGABIT = 125_000.0                 # bytes per second
FLOODS = {"yes": "yes", "seq": "seq 100000000", "random text": "base64 /dev/urandom"}
FLOOD_SECONDS = 1.0                 # a flood has run so long when Ctrl-C is pressed, but for a part of
FRAME_SECONDS = 0.06                # what passes between two frames, for where in it the key falls decides much
PROMPT_SECONDS = 30.0
IDLE_SECONDS = 20.0
LEAVE_SECONDS = 8.0
SETTLE_SECONDS = 2.0                # for the last ack of what came before

Results = dict[str, list[float]]    # label of a row to the figures of the pairings


@dataclass
class Effort:
    """How much to measure."""

    keys: int               # on a line, counted
    lines: int
    lossy_lines: int
    floods: Sequence[str]
    rounds: int             # of every flood
    farewells: int


QUICK = Effort(keys=14, lines=1, lossy_lines=1, floods=["yes"], rounds=1, farewells=1)
FULL = Effort(keys=45, lines=2, lossy_lines=6, floods=list(FLOODS), rounds=12, farewells=3)


# -- typing ----------------------------------------------------------------------------------------------------


@dataclass
class Typist:
    """Types one line into one session and notes when each key was pressed and shown."""

    session: Session
    keys: str
    pressed_at: dict[str, float] = field(default_factory=dict)
    shown_at: dict[str, float] = field(default_factory=dict)

    def press_next(self) -> bool:
        """Press the next key. Returns whether there are more."""
        key = self.keys[len(self.pressed_at)]
        self.pressed_at[key] = time.monotonic()
        self.session.client.type(key)
        return len(self.pressed_at) < len(self.keys)

    def look(self) -> None:
        """Note the keys that have become visible."""
        if self.session.client.read():
            now = time.monotonic()
            for key in self.pressed_at:
                if key not in self.shown_at and key in self.session.client.seen:
                    self.shown_at[key] = now

    @property
    def done(self) -> bool:
        """Whether all keys have been pressed and shown."""
        return len(self.shown_at) == len(self.keys)

    def latencies_ms(self) -> list[float]:
        """From each key to the screen."""
        return [1_000 * (self.shown_at[key] - self.pressed_at[key]) for key in self.keys]


def type_lines(typists: Sequence[Typist], chance: random.Random) -> list[list[float]]:
    """Let all type at once, each at a rhythm of its own. Returns latencies in ms. Raises TimeoutError."""
    began = time.monotonic()
    agenda = [(began + chance.uniform(*GAP_SECONDS), number) for number in range(len(typists))]
    heapq.heapify(agenda)
    by_fd = {typist.session.client.fd: typist for typist in typists}
    deadline = began + len(typists[0].keys) * GAP_SECONDS[1] + KEY_SECONDS
    while not all(typist.done for typist in typists):
        now = time.monotonic()
        if now > deadline:
            slow = [str(typist.session.pair) for typist in typists if not typist.done]
            raise TimeoutError(f"keys were not shown within {KEY_SECONDS:g} s: {', '.join(slow)}")
        while agenda and agenda[0][0] <= now:
            _, number = heapq.heappop(agenda)
            if typists[number].press_next():
                heapq.heappush(agenda, (now + chance.uniform(*GAP_SECONDS), number))
        wake_at = min([deadline, *(at for at, _ in agenda[:1])])
        for fd in select.select(list(by_fd), [], [], max(0.0, wake_at - time.monotonic()))[0]:
            by_fd[fd].look()
    return [typist.latencies_ms() for typist in typists]


def key_latencies(link: Link, prediction: str, keys: int, lines: int, chance: random.Random) -> list[list[float]]:
    """Latencies in ms of `keys` times `lines` keys, for every pairing; keys that warm a line up are left out."""
    samples: list[list[float]] = [[] for _ in PAIR_NAMES]
    with all_sessions(command=ECHO_COMMAND, link=link, prediction=prediction) as sessions:
        for line in range(lines):
            if line:
                for session in sessions:
                    session.client.type(KILL_LINE)
            settle(sessions, 0.3 + 2 * link.rtt_ms / 1_000)
            for session in sessions:
                session.client.seen = ""
            text = "".join(chance.sample(LINE_KEYS, WARM_UP_KEYS + keys))
            type_lines([Typist(session, text[:WARM_UP_KEYS]) for session in sessions], chance)
            settle(sessions, 0.3 + 2 * link.rtt_ms / 1_000)     # predictions are confirmed, acks have passed
            latest = type_lines([Typist(session, text[WARM_UP_KEYS:]) for session in sessions], chance)
            for collected, more in zip(samples, latest):
                collected += more
    return samples


def settle(sessions: Sequence[Session], seconds: float) -> None:
    """Read what all sessions write for this long, without taking much CPU time from them."""
    deadline = time.monotonic() + seconds
    clients = {session.client.fd: session.client for session in sessions}
    while time.monotonic() < deadline:
        for fd in select.select(list(clients), [], [], max(0.0, deadline - time.monotonic()))[0]:
            clients[fd].read()


# -- the rows --------------------------------------------------------------------------------------------------


def measure_keys(rtt_ms: int, effort: Effort, chance: random.Random) -> Results:
    """Keys without prediction on a link that loses nothing."""
    samples = key_latencies(Link(rtt_ms=rtt_ms), "never", effort.keys, effort.lines, chance)
    return {
        f"key to echo, RTT {rtt_ms} ms: median, ms": [median(values) for values in samples],
        f"key to echo, RTT {rtt_ms} ms: p95, ms": [percentile_95(values) for values in samples],
    }


def measure_predicted(effort: Effort, chance: random.Random) -> Results:
    """Keys with prediction always on, after an epoch has been confirmed."""
    samples = key_latencies(Link(rtt_ms=500), "always", effort.keys, effort.lines, chance)
    return {
        "predicted key, RTT 500 ms: median, ms": [median(values) for values in samples],
        "predicted key, RTT 500 ms: p95, ms": [percentile_95(values) for values in samples],
        f"predicted key, shown within {PREDICTED_MS:g} ms: share": [
            sum(value <= PREDICTED_MS for value in values) / len(values) for values in samples
        ],
    }


def measure_loss(effort: Effort, chance: random.Random) -> Results:
    """Keys without prediction on a link that loses half of all round trips."""
    samples = key_latencies(Link(rtt_ms=100, loss=0.29, seed=SEED), "never", effort.keys, effort.lossy_lines, chance)
    return {
        "key to echo, RTT 100 ms, 29 % loss each way: median, ms": [median(values) for values in samples],
        "key to echo, RTT 100 ms, 29 % loss each way: mean, ms": [sum(values) / len(values) for values in samples],
    }


def stop_flood(session: Session, flood: str, phase: float) -> float:
    """Milliseconds from Ctrl-C, pressed `phase` of FRAME_SECONDS after a frame of the flood, to the prompt."""
    client = session.client
    client.type(flood + "\r")
    client.drain(FLOOD_SECONDS)
    client.read_for(FRAME_SECONDS)
    client.drain(phase * FRAME_SECONDS)
    client.seen = ""
    pressed_at = time.monotonic()
    client.type("\x03")
    try:
        shown_at = client.wait_for(PROMPT, PROMPT_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(f"{session.pair}, Ctrl-C in `{flood}`, {session.traffic()} sent: {error}") from error
    client.drain(0.5)
    return 1_000 * (shown_at - pressed_at)


def measure_flood(effort: Effort, chance: random.Random) -> Results:
    """Ctrl-C in a flood of output, on a slow link with a deep buffer. One session floods at a time.

    The moments of the key are spread evenly over the time between two frames, the same for all pairings.
    """
    link = Link(rtt_ms=100, rate_bytes_per_s=MEGABIT, buffer_ms=1_000)
    rows: Results = {}
    with all_sessions(command=peers.SHELL_COMMAND, link=link, ready=PROMPT, PS1=PROMPT) as sessions:
        settle(sessions, 1.0)
        for name in effort.floods:
            samples: list[list[float]] = [[] for _ in sessions]
            phases = [(number + 0.5) / effort.rounds for number in range(effort.rounds)]
            chance.shuffle(phases)
            for phase in phases:
                for session, values in zip(sessions, samples):
                    values.append(stop_flood(session, FLOODS[name], phase))
            rows[f"Ctrl-C to prompt in `{name}`, 1 Mbit/s: median, ms"] = [median(values) for values in samples]
            if effort.rounds > 1:
                rows[f"Ctrl-C to prompt in `{name}`, 1 Mbit/s: worst, ms"] = [max(values) for values in samples]
    return rows


def measure_leave(effort: Effort) -> Results:
    """How long the client stays after the program has been told to end."""
    samples: list[list[float]] = [[] for _ in PAIR_NAMES]
    for _ in range(effort.farewells):
        with all_sessions(command=ECHO_COMMAND, link=Link(rtt_ms=100)) as sessions:
            settle(sessions, 0.5)
            for session, values in zip(sessions, samples):
                values.append(leave(session))
    rows = {"end of input to the client's exit, RTT 100 ms: median, ms": [median(values) for values in samples]}
    if effort.farewells > 1:
        rows["end of input to the client's exit, RTT 100 ms: worst, ms"] = [max(values) for values in samples]
    return rows


def leave(session: Session) -> float:
    """Milliseconds from the end of input to the client's exit, LEAVE_SECONDS at most."""
    began = time.monotonic()
    session.client.type(END_OF_INPUT)
    while not session.client.ended and time.monotonic() - began < LEAVE_SECONDS:
        session.client.read_for(0.005)
    return 1_000 * (time.monotonic() - began)


def measure_idle() -> Results:
    """Datagrams, bytes and CPU of sessions in which nothing happens."""
    with all_sessions(command=ECHO_COMMAND, link=Link(rtt_ms=100)) as sessions:
        settle(sessions, SETTLE_SECONDS)
        before = [_costs(session) for session in sessions]
        settle(sessions, IDLE_SECONDS)
        after = [_costs(session) for session in sessions]
    spent = [[end - start for start, end in zip(*pair)] for pair in zip(before, after)]
    labels = ["datagrams", "bytes", "server CPU, ms", "client CPU, ms"][: len(spent[0])]
    return {f"idle for {IDLE_SECONDS:g} s: {label}": list(values) for label, values in zip(labels, zip(*spent))}


def _costs(session: Session) -> list[float]:
    costs: list[float] = list(session.traffic())
    if can_read_cpu():
        costs += [1_000 * cpu_seconds(session.server.pid), 1_000 * cpu_seconds(session.client.pid)]
    return costs


# -- command line ----------------------------------------------------------------------------------------------

ROWS = ("rtt0", "rtt100", "rtt500", "predicted", "loss", "flood", "leave", "idle")


def measure(row: str, effort: Effort, chance: random.Random) -> Results:
    """The results of one of ROWS."""
    if row.startswith("rtt"):
        return measure_keys(int(row[3:]), effort, chance)
    if row == "idle":
        return measure_idle()
    if row == "leave":
        return measure_leave(effort)
    return {"predicted": measure_predicted, "loss": measure_loss, "flood": measure_flood}[row](effort, chance)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure sessions over a bad link, beside stock mosh.")
    parser.add_argument("--quick", action="store_true", help="few samples, below 90 seconds; otherwise ten minutes")
    parser.add_argument("--only", choices=ROWS, action="append", help="only this part; may be repeated")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args()
    require_peers("mosh-server", "mosh-client", "bash")
    effort, chance = (QUICK if options.quick else FULL), random.Random(SEED)
    table = Table("Sessions over a relay, client/server (ratio to stock/stock)", ["", *PAIR_NAMES])
    began = time.monotonic()
    for row in options.only or ROWS:
        for label, values in measure(row, effort, chance).items():
            table.add(label, compared(values))
    table.show(options.markdown)
    print(f"\n{program_line()}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
