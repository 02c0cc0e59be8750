"""Random sessions on random networks, each from one seed: `play(seed)` raises if anything is not as it must be.

    python tests/random_sessions.py [--count N] [--first SEED] [--seed SEED]

plays N of them on all processors, prints the seeds that fail, and how many there were. --seed plays one and shows why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable

import mosh
from simnet import SERVER_ADDRESS, Machine, Simulation

COUNT = 10_000
CHUNK = 25  # sessions that a process plays at a time
FAILURES = 5  # shown in full; of more, only the seeds

CONNECT_LIMIT_MS = 14_000  # after 15 s a client gives up
CONVERGE_LIMIT_MS = 12_000  # after the link has healed: a port hop, or heartbeats from a place that nobody knows
NAP_MS = 20_000
KNOW_LIMIT_MS = 14_000  # a heartbeat tells where the client is; where the server is, that ours are not answered
SMALL_PATH_BYTES = 600
SERVER_ADDRESSES = [SERVER_ADDRESS, ("192.0.2.2", 60001)]

LINES = (
    *("ls -l", "title a b", "lines 7", "lines 40", "burst 30", "burst 80", "clear"),
    *("h\u00e9llo \u6f22\u5b57", "x" * 70, "", "noise 900", "noise 2500"),
)

# -- what the user does


def type_a_line(sim: Simulation) -> None:
    sim.client.type(sim.random.choice(LINES) + "\r", every_ms=sim.random.choice((1, 20, 100)))


def type_letters(sim: Simulation) -> None:
    keys = bytes(sim.random.choice(b"abc def\x7f") for _ in range(sim.random.randint(1, 20)))
    sim.client.type(keys, every_ms=sim.random.choice((5, 80, 200)))


def paste(sim: Simulation) -> None:
    sim.client.type(b"pasted text " * sim.random.randint(9, 100) + b"\r")


def paste_noise(sim: Simulation) -> None:
    sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=sim.random.choice((600, 3_000, 20_000)))))


def type_into_a_flood(sim: Simulation) -> None:
    sim.client.type("burst 200\r")
    sim.client.type(bytes(sim.random.choices(b"abc def\x7f", k=30)), every_ms=100)


def repaint(sim: Simulation) -> None:
    sim.client.type("\x0c")


def resize(sim: Simulation) -> None:
    sim.client.resize(sim.random.randint(20, 100), sim.random.randint(4, 30))


# -- what happens to the network


def roam(sim: Simulation) -> None:
    sim.client.move_to((f"203.0.113.{sim.random.randint(1, 254)}", sim.random.randint(1024, 60000)))


def roam_on_and_on(sim: Simulation) -> None:
    for _ in range(sim.random.randint(3, 8)):
        roam(sim)
        type_letters(sim)
        sim.run(ms=sim.random.choice((300, 2_000, 5_000)))


def move_the_server(sim: Simulation) -> None:
    sim.server.address = sim.random.choice(SERVER_ADDRESSES)


def lose_the_network(sim: Simulation) -> None:
    sim.blackout(ms=sim.random.choice((500, 3_000, 20_000)))


def lose_one_direction(sim: Simulation) -> None:
    sim.link.blocked = {sim.random.choice((mosh.TO_SERVER, mosh.TO_CLIENT))}
    sim.run(ms=sim.random.choice((300, 4_000, 12_000)))
    sim.link.blocked.clear()


def change_the_link(sim: Simulation) -> None:
    rng, link = sim.random, sim.link
    link.delay_ms = rng.choice((0, 5, 50, 250, 600))
    link.jitter_ms = rng.choice((0, 0, 20, 200))
    link.loss = rng.choice((0.0, 0.05, 0.3, 0.5))
    link.duplication, link.reordering, link.congestion = (rng.choice((0.0, 0.0, 0.1, 0.5)) for _ in range(3))
    link.mtu_bytes = rng.choice((1_500, 1_500, 1_280, SMALL_PATH_BYTES))
    link.rate_bytes_per_s = rng.choice((0, 0, 125_000, 8_000))
    link.buffer_bytes = rng.choice((2_000, 16_000))
    link.nat_forgets_ms = rng.choice((0, 0, 2_000))
    link.one_way = rng.choice((None, None, mosh.TO_SERVER, mosh.TO_CLIENT))


# -- what happens to the machines


def _either(sim: Simulation) -> Machine:
    return sim.random.choice((sim.client, sim.server))


def sleep(sim: Simulation) -> None:
    ms = sim.random.choice((200, 5_000, 100_000, 5_000_000))
    _either(sim).sleep(ms, clock_stops=sim.random.random() < 0.5)
    sim.run(ms=ms)


def doze(sim: Simulation) -> None:
    """While other things happen, and perhaps both at once."""
    _either(sim).sleep(sim.random.choice((300, 3_000, NAP_MS)), clock_stops=sim.random.random() < 0.5)


def wait_long(sim: Simulation) -> None:
    sim.run(ms=sim.random.choice((60_000, 300_000)))


def jump_the_clock(sim: Simulation) -> None:
    _either(sim).jump_clock(sim.random.choice((10, 1_000, 65_535, 4_000_000)))


ACTIONS: tuple[Callable[[Simulation], None], ...] = (
    *(type_a_line, type_a_line, type_a_line, type_letters, type_letters, paste, paste_noise, repaint, resize),
    *(roam, lose_the_network, lose_one_direction, change_the_link, change_the_link, change_the_link),
    *(type_into_a_flood, roam_on_and_on, move_the_server, move_the_server, sleep, doze, jump_the_clock, wait_long),
)


def _know_each_other(sim: Simulation) -> bool:
    return sim.server.peer in sim.client.addresses and sim.client.core.peers[0] == sim.server.address


def play(seed: int) -> None:
    """A user's bad quarter of an hour, shortened; the network is whole again at the end. Raises AssertionError."""
    sim = Simulation(seed, start_ms=seed * 7_919, candidates=SERVER_ADDRESSES)
    path_mtu_bytes = sim.link.path_mtu_bytes = sim.random.choice((1_500, 1_500, 1_280, SMALL_PATH_BYTES))
    if sim.random.random() < 0.5:
        change_the_link(sim)
        sim.link.loss = min(sim.link.loss, 0.3)
    sim.client.type("typed ahead")
    sim.run_until(lambda: not sim.client.core.is_connecting, limit_ms=CONNECT_LIMIT_MS)
    for action in sim.random.choices(ACTIONS, k=sim.random.randint(2, 8)):
        action(sim)
        sim.run(ms=sim.random.choice((0, 50, 400, 2_000)))
    sim.link.heal()
    sim.link.mtu_bytes, sim.link.path_mtu_bytes = 1_500, path_mtu_bytes
    typing_ms = max(0, sim.client.types_until - sim.now, sim.server.writes_until - sim.now)
    sim.run(ms=typing_ms)
    sim.run_until(lambda: not sim.client.asleep_until and not sim.server.asleep_until, limit_ms=NAP_MS)
    sim.run_until(lambda: sim.settled and sim.client.screen == sim.server.screen, limit_ms=CONVERGE_LIMIT_MS)
    # what a server that has moved shows next may wait for that
    sim.run_until(lambda: _know_each_other(sim), limit_ms=KNOW_LIMIT_MS)
    sim.run(ms=3_500)  # in which nothing that was under way may undo it, though the bar may still come and go
    window = sim.client.terminal.framebuffer
    assert sim.client.screen == sim.server.screen and sim.server.program.received == sim.client.typed
    assert sim.server.sizes[-1] == (window.width, window.height)
    if sim.random.random() < 0.3:
        sim.random.choice((sim.client.quit, sim.server.quit))()
        sim.run_until(lambda: sim.ended, limit_ms=3_000)
        assert sim.server.core.transport.clean and sim.client.core.transport.clean
        assert sim.client.screen == sim.server.screen


# -- command line


def _attempt(seed: int) -> tuple[int, str]:
    """Return (seed, what went wrong)."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            play(seed)
    except Exception:
        return seed, traceback.format_exc()
    return seed, ""


def main() -> int:
    """Play, and return the exit status."""
    parser = argparse.ArgumentParser(description="Play random sessions on random networks.")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="play only this one")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count) if options.seed is None else [options.seed]
    began, failed = time.monotonic(), []
    with multiprocessing.Pool() as pool:
        for seed, problem in pool.imap_unordered(_attempt, seeds, chunksize=CHUNK if options.seed is None else 1):
            if problem:
                failed.append(seed)
                if len(failed) <= FAILURES:
                    print(f"seed {seed}, again with make sim SEED={seed}:\n{problem}", flush=True)
    print(f"{len(seeds)} sessions in {time.monotonic() - began:.0f} s, {len(failed)} failed {sorted(failed) or ''}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
