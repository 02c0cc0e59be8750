"""Whole sessions on bad networks: nothing typed is lost or doubled, and both screens end up alike.

By default some dozens of random sessions; MOSH_SIM_LONG=1 plays thousands, MOSH_SIM_SEED=n only the one with that seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import mosh
from simnet import HOME_ADDRESS, NEW_ADDRESS, SERVER_ADDRESS, Simulation


def _seeds(count: int) -> list[int]:
    if "MOSH_SIM_SEED" in os.environ:
        return [int(os.environ["MOSH_SIM_SEED"])]
    return list(range(count * 50 if os.environ.get("MOSH_SIM_LONG") else count))


@pytest.fixture
def sim() -> Simulation:
    """A session that has just been started."""
    return Simulation(_seeds(1)[0])


# -- stories


def test_what_is_typed_appears_on_both_screens(sim: Simulation) -> None:
    sim.client.type("hello\r", every_ms=100)
    sim.run(ms=2_000)
    assert sim.client.screen == sim.server.screen
    assert sim.client.screen.text == "$ hello\nyou said hello\n$"


def test_server_follows_a_client_that_roams_mid_burst(sim: Simulation) -> None:
    sim.link.delay_ms, sim.link.loss = 100, 0.3
    sim.client.type("burst 200\r")
    sim.run(ms=600)
    sim.client.move_to(NEW_ADDRESS)
    sim.run(ms=8_000)
    assert sim.server.attached == [HOME_ADDRESS, NEW_ADDRESS]
    assert sim.server.peer == NEW_ADDRESS and sim.client.screen == sim.server.screen


def test_keys_typed_in_a_blackout_arrive_once_and_in_order(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.blackout(ms=20_000)
    sim.client.type("a long line typed in a tunnel\r", every_ms=500)
    sim.run(ms=19_000)
    assert sim.server.program.received == b"" and sim.client.shown.lines[0].startswith("mosh: Last contact ")
    sim.run_until(lambda: sim.settled, limit_ms=6_000)
    assert sim.server.program.received == sim.client.typed


def test_a_session_survives_hours_without_network_in_a_third_place(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.blackout(ms=3 * 3_600_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.run(ms=3 * 3_600_000)
    assert sim.server.peer is None and sim.client.seen.text.startswith("mosh: Last contact 3:00:0")
    sim.client.type("still there\r")
    sim.run_until(lambda: sim.settled, limit_ms=6_000)
    assert sim.server.screen.lines[1] == "you said still there"


def test_a_server_that_hears_nothing_for_40_s_stops_sending_but_keeps_the_session(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.link.blocked.add(mosh.TO_SERVER)
    sim.run(ms=60_000)
    assert sim.server.peer is None
    silent_since = sim.sent(mosh.TO_CLIENT)[-1].at
    assert 38_000 < silent_since <= 46_000
    sim.link.heal()
    sim.run(ms=3_100)
    assert sim.server.peer == sim.client.address and sim.server.screen == sim.client.screen


def test_a_client_without_answers_hops_to_other_ports(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.link.blocked.add(mosh.TO_CLIENT)
    sim.run(ms=30_000)
    host, port = HOME_ADDRESS
    assert sim.client.addresses == [HOME_ADDRESS, (host, port + 1), (host, port + 2)]
    assert sim.server.attached == sim.client.addresses
    sim.link.heal()
    sim.client.type("back")
    sim.run_until(lambda: sim.settled, limit_ms=4_000)


def test_a_client_keeps_the_candidate_that_answers() -> None:
    dead = ("192.0.2.99", 60001)
    sim = Simulation(1, peers=[dead, SERVER_ADDRESS])
    sim.run(ms=1_000)
    assert sim.client.core.peers == [SERVER_ADDRESS]
    assert sim.client.screen == sim.server.screen


def test_a_packet_that_is_too_big_is_sent_in_smaller_pieces(sim: Simulation) -> None:
    sim.link.mtu_bytes = 600
    sim.client.type("lines 11\r")
    sim.server.write(bytes(sim.random.choices(range(0x21, 0x7F), k=2_000)))
    sim.run(ms=3_000)
    assert sim.client.screen == sim.server.screen
    assert max(map(len, sim.datagrams(mosh.TO_CLIENT))) <= mosh.FALLBACK_MTU_BYTES


# -- hostile datagrams


def test_forged_and_replayed_datagrams_move_nothing(sim: Simulation) -> None:
    sim.client.type("hello\r", every_ms=50)
    sim.run(ms=3_000)
    before = sim.server.screen
    for old in sim.datagrams(mosh.TO_SERVER):
        sim.inject(sim.server, old, NEW_ADDRESS)
        sim.inject(sim.server, old[:-1] + bytes((old[-1] ^ 1,)), NEW_ADDRESS)
        sim.inject(sim.server, sim.random.randbytes(sim.random.randint(0, 2_100)), NEW_ADDRESS)
    for reflected in sim.datagrams(mosh.TO_CLIENT):
        sim.inject(sim.server, reflected, NEW_ADDRESS)
        sim.inject(sim.client, reflected, NEW_ADDRESS)
    sim.run(ms=3_000)
    assert sim.server.peer == HOME_ADDRESS and sim.client.core.peers == [SERVER_ADDRESS]
    assert sim.server.screen == sim.client.screen == before
    assert sim.server.program.received == b"hello\r"


# -- pace


def test_an_idle_session_costs_two_datagrams_in_three_seconds(sim: Simulation) -> None:
    sim.run(ms=5_000)
    before = [len(sim.datagrams(direction)) for direction in (mosh.TO_SERVER, mosh.TO_CLIENT)]
    sim.run(ms=60_000)
    after = [len(sim.datagrams(direction)) for direction in (mosh.TO_SERVER, mosh.TO_CLIENT)]
    assert [new - old for old, new in zip(before, after)] == [20, 20]


def test_a_flood_is_shown_at_most_twice_per_frame_interval(sim: Simulation) -> None:
    sim.link.delay_ms = 50
    sim.run(ms=2_000)
    sim.client.type("burst 1000\r")
    sim.run(ms=3_000)
    states = {sent.numbers[1]: sent.at for sent in sim.sent(mosh.TO_CLIENT) if sent.at > 2_200}
    assert len(states) <= 2 * (2_800 // 50) + 1
    assert "output" in sim.client.screen.text


def test_marked_packets_slow_the_frames_down(sim: Simulation) -> None:
    sim.run(ms=4_000)
    free = sim.server.core.transport.datagrams.round_trip.frame_interval_ms
    sim.link.congestion = 1.0
    sim.client.type("some words typed while the network is full", every_ms=200)
    sim.run(ms=10_000)
    assert free == 20 and sim.server.core.transport.datagrams.round_trip.frame_interval_ms == 250


# -- prediction


def test_a_key_is_shown_in_the_same_millisecond_once_the_epoch_is_confirmed(sim: Simulation) -> None:
    sim.link.delay_ms = 250
    sim.run(ms=3_000)
    sim.client.type("e")
    sim.run(ms=0)
    assert sim.client.shown.text == "$"  # nothing is known yet about how this program echoes
    sim.run(ms=3_000)
    for i, key in enumerate("ncore"):
        sim.client.type(key)
        sim.run(ms=0)
        assert sim.client.seen.text == "$ e" + "ncore"[: i + 1] and sim.client.screen.text == "$ e"
        sim.run(ms=50)
    sim.run_until(lambda: sim.settled, limit_ms=2_000)
    assert sim.server.screen.text == "$ encore"


def test_what_is_not_echoed_is_never_shown(sim: Simulation) -> None:
    sim.link.delay_ms = 250
    sim.client.type("quiet\r", every_ms=100)
    sim.run(ms=4_000)
    shown = sim.client.seen.text
    for _ in range(8):
        sim.client.type("s")
        sim.run(ms=100)
        assert sim.client.seen.text == shown
    sim.client.type("\r")
    sim.run_until(lambda: sim.settled, limit_ms=4_000)
    assert b"ssssssss" in sim.server.program.received and "ssss" in sim.server.screen.text


# -- the end of a session


def _ends_cleanly(sim: Simulation, limit_ms: int) -> int:
    took_ms = sim.run_until(lambda: sim.ended, limit_ms)
    assert sim.client.core.transport.clean and sim.server.core.transport.clean
    return took_ms


def test_a_user_who_quits_ends_the_server_too(sim: Simulation) -> None:
    sim.link.delay_ms = 100
    sim.run(ms=2_000)
    sim.client.quit()
    sim.run(ms=0)
    assert "Exiting on user request..." in sim.client.seen.text
    _ends_cleanly(sim, limit_ms=500)


def test_a_program_that_exits_ends_the_client_and_its_last_words_arrive(sim: Simulation) -> None:
    sim.link.delay_ms = 100
    sim.run(ms=2_000)
    sim.client.type("exit\r")
    _ends_cleanly(sim, limit_ms=1_000)
    assert sim.client.screen.text == sim.server.screen.text == "$ exit\nbye"


def test_both_ends_may_leave_at_the_same_time(sim: Simulation) -> None:
    sim.link.delay_ms = 100
    sim.run(ms=2_000)
    sim.client.quit()
    sim.server.quit()
    _ends_cleanly(sim, limit_ms=1_000)


@pytest.mark.parametrize("seed", _seeds(10))
def test_quitting_works_on_a_bad_network(seed: int) -> None:
    sim = Simulation(seed)
    sim.run(ms=2_000)
    sim.link.delay_ms, sim.link.loss, sim.link.duplication, sim.link.reordering = 50, 0.3, 0.3, 0.3
    sim.client.quit()
    sim.run_until(lambda: sim.ended, limit_ms=11_000)


def test_a_client_gives_up_on_a_server_that_has_gone(sim: Simulation) -> None:
    sim.run(ms=2_000)
    sim.link.blocked = {mosh.TO_SERVER, mosh.TO_CLIENT}
    sim.client.quit()
    sim.run_until(lambda: not sim.client.running, limit_ms=10_000)
    assert not sim.client.core.transport.clean
    assert len([sent for sent in sim.sent(mosh.TO_SERVER) if sent.numbers[1] == mosh.LAST_STATE_NUM]) == 16


def test_a_client_that_hears_nothing_says_so_and_gives_up(sim: Simulation) -> None:
    sim.link.blocked.add(mosh.TO_CLIENT)
    sim.run(ms=250)
    assert sim.client.seen.text == ""
    sim.run(ms=600)
    assert sim.client.seen.lines[0].startswith("mosh: Nothing received from server on UDP port 60001.")
    sim.run(ms=14_150)
    assert "Nothing received" in sim.client.seen.lines[0]
    sim.run(ms=600)
    assert sim.client.seen.lines[0].startswith("mosh: Timed out waiting for server...")
    sim.run_until(lambda: not sim.client.running, limit_ms=5_000)
    assert sim.client.core.is_connecting and not sim.client.core.transport.clean
    assert [sent.at for sent in sim.sent(mosh.TO_SERVER)][:6] == [0, 3_000, 6_000, 9_000, 12_000, 15_000]


def test_the_notice_goes_when_the_server_answers_after_all(sim: Simulation) -> None:
    sim.blackout(ms=2_900)
    sim.run(ms=2_000)
    assert "Nothing received" in sim.client.seen.text
    sim.run(ms=1_200)
    assert sim.client.seen == sim.server.screen


# -- replays


def test_replayed_fragments_do_not_keep_a_large_screen_from_arriving(sim: Simulation) -> None:
    """An instruction in several fragments becomes complete though old ones are repeated between them."""
    sim.client.type("lines 30\r")
    sim.run(ms=1_000)
    old = sim.datagrams(mosh.TO_CLIENT)[-1]
    for ms in range(0, 4_000, 2):
        sim.at(sim.now + ms, lambda: sim.inject(sim.client, old, SERVER_ADDRESS))
    sim.link.jitter_ms = 5
    noise = "".join(f"\x1b[38;2;{sim.random.randint(0, 255)};{n};{n}m{n % 10}" for n in range(250))
    sim.server.write(b"\x1b[H" + noise.encode())
    sim.run(ms=1_000)
    assert len(sim.datagrams(mosh.TO_CLIENT)[-2]) == mosh.MTU_BYTES["IPv4"], "the screen takes several fragments"
    assert sim.client.screen == sim.server.screen


# -- amplification


def _bytes_to(sim: Simulation, roam_at: int) -> int:
    return sum(len(datagram) for at, datagram in sim._wire[mosh.TO_CLIENT] if at > roam_at)


def test_an_address_not_heard_again_is_sent_three_times_what_came_from_it(sim: Simulation) -> None:
    """Somebody holds up a datagram of the client and delivers it from the address of a victim."""
    sim.run(ms=1_000)
    sim.client.type("burst 300\r")
    sim.run(ms=500)
    sim.link.blocked.add(mosh.TO_SERVER)
    sim.client.type("x")
    sim.run(ms=100)
    held_up = sim.datagrams(mosh.TO_SERVER)[-1]
    sim.inject(sim.server, held_up, NEW_ADDRESS)
    assert sim.server.peer == NEW_ADDRESS
    moved_at = sim.now
    sim.run(ms=30_000)
    assert 0 < _bytes_to(sim, moved_at) <= mosh.AMPLIFICATION_LIMIT * len(held_up)
    sim.link.heal()
    sim.run(ms=4_000)
    assert sim.server.peer == sim.client.address and sim.client.screen == sim.server.screen


@pytest.mark.parametrize("typed", ["", "x", "\r"], ids=["idle", "typing", "prompt"])
@pytest.mark.parametrize("flood", [False, True])
def test_a_client_that_roams_proves_its_address_within_a_round_trip_and_the_ack_delay(
    sim: Simulation, typed: str, flood: bool
) -> None:
    sim.run(ms=1_000)
    sim.client.type("burst 2000\r" if flood else "")
    sim.run(ms=1_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.client.type(typed)
    sim.run_until(lambda: sim.server.peer == NEW_ADDRESS, limit_ms=3_000)
    sim.run_until(lambda: sim.server.core.transport.datagrams.allowance_bytes is None, limit_ms=20 + 2 * 110)
    sim.run_until(lambda: sim.client.screen == sim.server.screen, limit_ms=8_000)


def test_a_program_that_ends_just_as_the_client_roams_ends_the_session(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.client.type("x")
    sim.run(ms=15)
    sim.server.write(bytes(sim.random.choices(range(0x21, 0x7F), k=500)))
    sim.server.quit()
    sim.run(ms=2_000)
    assert sim.ended


# -- the bar


def test_the_bar_tells_a_dead_way_back_from_a_dead_way_there(sim: Simulation) -> None:
    sim.run(ms=1_000)
    sim.link.blocked = {mosh.TO_CLIENT}
    sim.run(ms=12_000)
    assert "mosh: Last contact 1" in sim.client.seen.lines[0]
    sim.link.heal()
    sim.run(ms=4_000)
    assert "mosh" not in sim.client.seen.text
    sim.link.blocked = {mosh.TO_SERVER}
    sim.run(ms=16_000)
    assert "mosh: Last reply 1" in sim.client.seen.lines[0]


# -- random sessions

LINES = (
    *("ls -l", "title a b", "lines 7", "lines 40", "burst 30", "burst 150", "clear"),
    *("h\u00e9llo \u6f22\u5b57", "x" * 70, ""),
)


def _type_a_line(sim: Simulation) -> None:
    sim.client.type(sim.random.choice(LINES) + "\r", every_ms=sim.random.choice((1, 20, 150)))


def _type_letters(sim: Simulation) -> None:
    keys = bytes(sim.random.choice(b"abc def\x7f") for _ in range(sim.random.randint(1, 30)))
    sim.client.type(keys, every_ms=sim.random.choice((5, 80, 300)))


def _paste(sim: Simulation) -> None:
    sim.client.type(b"pasted text " * sim.random.randint(9, 300) + b"\r")


def _repaint(sim: Simulation) -> None:
    sim.client.type("\x0c")


def _resize(sim: Simulation) -> None:
    sim.client.resize(sim.random.randint(20, 100), sim.random.randint(4, 30))


def _roam(sim: Simulation) -> None:
    sim.client.move_to((f"203.0.113.{sim.random.randint(1, 254)}", sim.random.randint(1024, 60000)))


def _lose_the_network(sim: Simulation) -> None:
    sim.blackout(ms=sim.random.choice((500, 3_000, 20_000)))


def _change_the_link(sim: Simulation) -> None:
    rng, link = sim.random, sim.link
    link.delay_ms = rng.choice((0, 5, 50, 250, 600))
    link.jitter_ms = rng.choice((0, 0, 20, 200))
    link.loss = rng.choice((0.0, 0.05, 0.3, 0.5))
    link.duplication, link.reordering, link.congestion = (rng.choice((0.0, 0.0, 0.1, 0.5)) for _ in range(3))
    link.mtu_bytes = rng.choice((1_500, 1_500, 1_280, 600))


ACTIONS: tuple[Callable[[Simulation], None], ...] = (
    *(_type_a_line, _type_a_line, _type_a_line, _type_letters, _type_letters, _paste, _repaint, _resize),
    *(_roam, _lose_the_network, _change_the_link, _change_the_link),
)


def _play(sim: Simulation, count: int) -> None:
    """Log in, then have a user's bad quarter of an hour, shortened; the network is whole again at the end."""
    sim.client.type("typed ahead")
    sim.run_until(lambda: sim.client.core.phase is mosh.Phase.CONNECTED, limit_ms=2_000)
    for action in sim.random.choices(ACTIONS, k=count):
        action(sim)
        sim.run(ms=sim.random.choice((0, 50, 400, 2_000, 5_000)))
    sim.link.heal()
    sim.run_until(lambda: sim.settled, limit_ms=90_000)


@pytest.mark.parametrize("seed", _seeds(60))
def test_everything_typed_arrives_and_the_screens_converge(seed: int) -> None:
    sim = Simulation(seed, start_ms=seed * 7_919)
    _play(sim, count=sim.random.randint(4, 14))
    sim.run(ms=5_000)  # in which nothing that was under way may undo it
    sim.run_until(lambda: sim.settled, limit_ms=5_000)
    assert sim.client.screen == sim.server.screen
    assert sim.server.peer == sim.client.address
    assert sim.server.sizes[-1] == (sim.client.terminal.framebuffer.width, sim.client.terminal.framebuffer.height)


@pytest.mark.parametrize("seed", _seeds(30))
def test_a_session_ends_on_both_sides_whatever_the_network_did(seed: int) -> None:
    sim = Simulation(seed)
    _play(sim, count=3)
    sim.run_until(lambda: sim.server.peer == sim.client.address, limit_ms=4_000)  # a heartbeat tells it
    sim.random.choice((sim.client.quit, sim.server.quit))()
    sim.run_until(lambda: sim.ended, limit_ms=2_000)
    assert sim.server.core.transport.clean and sim.client.core.transport.clean
    assert sim.client.screen == sim.server.screen
