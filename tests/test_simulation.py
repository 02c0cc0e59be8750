"""Whole sessions on bad networks: nothing typed is lost or doubled, and both screens end up alike.

Stories first, then random sessions, of which `make sim` plays ten thousand, then ends that are broken on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest

import mosh
from random_sessions import play
from simnet import HOME_ADDRESS, NEW_ADDRESS, SERVER_ADDRESS, BrokenInvariant, Simulation, use_stock_timers


@pytest.fixture
def sim() -> Simulation:
    """A session that has just been started."""
    return Simulation(0)


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
    sim.run_until(lambda: sim.settled, limit_ms=20_000)  # it may take a heartbeat that is not lost
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
    bar = ("mosh: Last contact 2:59:5", "mosh: Last contact 3:00:0")  # it is drawn anew every three seconds
    assert sim.server.peer is None and sim.client.seen.text.startswith(bar)
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
    sim = Simulation(1, candidates=[dead, SERVER_ADDRESS])
    sim.run(ms=1_000)
    assert sim.client.core.peers == [SERVER_ADDRESS]
    assert sim.client.screen == sim.server.screen


def test_a_server_that_has_moved_is_found_though_its_heartbeats_still_come() -> None:
    moved = ("192.0.2.2", 60001)
    sim = Simulation(1, candidates=[SERVER_ADDRESS, moved])
    sim.run(ms=5_000)
    sim.server.address = moved
    sim.run(ms=14_000)
    assert sim.client.core.peers == [moved] and sim.server.peer == sim.client.address
    assert "Last" not in sim.client.seen.text


def test_nothing_is_looked_for_where_answers_come_though_from_far_away(sim: Simulation) -> None:
    sim.link.delay_ms = 4_000
    sim.run(ms=30_000)
    before = len(sim.datagrams(mosh.TO_SERVER))
    sim.run(ms=150_000)
    assert len(sim.datagrams(mosh.TO_SERVER)) - before <= 150_000 // mosh.ACK_INTERVAL_MS + 1


def test_a_packet_that_is_too_big_is_sent_in_smaller_pieces(sim: Simulation) -> None:
    sim.link.mtu_bytes = 600
    sim.client.type("lines 11\r")
    sim.server.write(bytes(sim.random.choices(range(0x21, 0x7F), k=2_000)))
    sim.run(ms=3_000)
    assert sim.client.screen == sim.server.screen
    assert max(map(len, sim.datagrams(mosh.TO_CLIENT))) <= mosh.FALLBACK_MTU_BYTES


def test_a_path_that_drops_large_packets_silently_delays_a_screen_and_a_paste_by_less_than_a_second() -> None:
    took_ms = {}
    for path_mtu_bytes in (1_500, 600):
        sim = Simulation(3)
        sim.link.delay_ms, sim.link.path_mtu_bytes = 50, path_mtu_bytes
        sim.run(ms=2_000)
        sim.client.type("noise 600\r")
        shown_ms = sim.run_until(lambda sim=sim: sim.settled, limit_ms=2_000)  # type: ignore[misc]
        sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=2_000)))
        took_ms[path_mtu_bytes] = shown_ms, sim.run_until(lambda sim=sim: sim.settled, 2_000)  # type: ignore[misc]
        before = len(sim.datagrams(mosh.TO_SERVER)) + len(sim.datagrams(mosh.TO_CLIENT))
        sim.run(ms=60_000)
        after = len(sim.datagrams(mosh.TO_SERVER)) + len(sim.datagrams(mosh.TO_CLIENT))
        assert after - before <= 44  # heartbeats, padded or not
        assert sim.client.screen == sim.server.screen
    assert all(small - usual < 1_000 for small, usual in zip(took_ms[600], took_ms[1_500])), took_ms


@pytest.mark.parametrize(("rate_bytes_per_s", "buffer_bytes", "limit_ms"), [
    (125_000, 16_000, 6_000), (12_500, 8_000, 40_000),
], ids=["1 Mbit/s", "100 kbit/s"])
def test_a_paste_and_a_screen_larger_than_the_buffer_of_a_narrow_link_arrive(
    sim: Simulation, rate_bytes_per_s: int, buffer_bytes: int, limit_ms: int
) -> None:
    """Sent as a whole they would lose the same fragments each time, and everything behind them would wait for ever."""
    sim.client.type("quiet\r")
    sim.run(ms=2_000)
    sim.link.rate_bytes_per_s, sim.link.buffer_bytes = rate_bytes_per_s, buffer_bytes
    sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=60_000)))
    sim.run_until(lambda: sim.server.program.received == sim.client.typed, limit_ms=limit_ms)
    sim.client.resize(120, 40)
    sim.run(ms=2_000)
    colours = (bytes(sim.random.choices(range(0x30, 0x3A), k=2)) for _ in range(120 * 39))
    sim.server.write(b"\x1b[H" + b"".join(b"\x1b[38;2;1%b;%b;3m%b" % (two, two[:1], two[1:]) for two in colours))
    sim.run_until(lambda: sim.client.screen == sim.server.screen, limit_ms=limit_ms)


def test_a_paste_arrives_over_a_narrow_link_though_acks_of_output_are_due(sim: Simulation) -> None:
    """Each of them would end the assembly of the paste."""
    sim.client.type("quiet\r")
    sim.run(ms=2_000)
    sim.link.rate_bytes_per_s, sim.link.buffer_bytes = 125_000, 16_000
    sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=60_000)))
    for _ in range(20):
        sim.server.write(b"output\r\n")
        sim.run(ms=500)
    assert sim.server.program.received == sim.client.typed


@pytest.mark.parametrize("loss", [0, 0.1])
def test_a_paste_much_larger_than_the_buffer_of_a_narrow_link_arrives(sim: Simulation, loss: float) -> None:
    sim.client.type("quiet\r")
    sim.run(ms=2_000)
    sim.link.rate_bytes_per_s, sim.link.buffer_bytes, sim.link.loss = 40_000, 4_000, loss
    data = bytes(sim.random.choices(range(0x21, 0x7F), k=90_000))
    for i in range(0, len(data), mosh.KEYBOARD_READ_BYTES):
        sim.client.type(data[i : i + mosh.KEYBOARD_READ_BYTES])
    sim.run_until(lambda: sim.server.program.received == sim.client.typed, limit_ms=30_000)


def test_repeats_of_what_has_arrived_double_no_key(sim: Simulation) -> None:
    """The server has the paste and its acks are lost, so the client takes its path for narrow."""
    sim.client.type("quiet\r")
    sim.run(ms=2_500)
    sim.link.blocked = {mosh.TO_CLIENT}
    sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=30_000)))
    sim.run(ms=1_500)
    assert len(sim.server.program.received) > 30_000
    sim.client.type("more\r", every_ms=30)
    sim.link.heal()
    sim.run_until(lambda: sim.settled, limit_ms=5_000)
    sim.run(ms=2_000)
    assert sim.server.program.received == sim.client.typed


def test_a_lost_ack_of_a_stock_client_is_had_again_before_its_next_heartbeat(sim: Simulation) -> None:
    """It says nothing when a state comes again, and until the ack all that is new would be held back and repeated."""
    use_stock_timers(sim.client.core.transport)
    sim.run(ms=2_000)
    sim.link.delay_ms = 50
    for rows in (1, 11):
        sim.server.write(b"\x1b[H" + bytes(sim.random.choices(range(0x21, 0x7F), k=59 * rows)))
        sim.run(ms=100)
        sim.link.blocked = {mosh.TO_SERVER}
        sim.run(ms=300)
        assert sim.client.screen == sim.server.screen
        sim.link.blocked.clear()
        sender = sim.server.core.transport.sender
        sim.run_until(lambda sender=sender: sender.sent[0].state == sender.current, 600)  # type: ignore[misc]


def test_large_datagrams_are_used_again_when_the_path_carries_them_again(sim: Simulation) -> None:
    sim.link.path_mtu_bytes = 600
    sim.client.type("noise 600\r")
    sim.run_until(lambda: sim.settled, limit_ms=3_000)
    assert sim.server.core.transport.datagrams.mtu.bytes == mosh.FALLBACK_MTU_BYTES
    sim.run(ms=100_000)  # probes are lost
    assert sim.server.core.transport.datagrams.mtu.bytes == mosh.FALLBACK_MTU_BYTES
    sim.link.path_mtu_bytes = 1_500
    sim.run(ms=70_000)
    assert sim.server.core.transport.datagrams.mtu.bytes == mosh.MTU_BYTES["IPv4"]


def test_an_end_that_wakes_up_goes_on_where_it_was(sim: Simulation) -> None:
    for end, clock_stops in ((sim.client, True), (sim.server, True), (sim.client, False), (sim.server, False)):
        sim.run(ms=1_000)
        end.sleep(ms=3_600_000, clock_stops=clock_stops)
        sim.run(ms=3_600_000)
        sim.client.type("back\r")
        sim.run_until(lambda: sim.settled, limit_ms=8_000)


def test_a_slow_link_with_a_full_buffer_is_not_filled_further(sim: Simulation) -> None:
    sim.link.delay_ms, sim.link.rate_bytes_per_s, sim.link.buffer_bytes = 50, 20_000, 20_000
    sim.run(ms=2_000)
    sim.client.type("burst 1000\r")
    sim.run(ms=1_000)
    sim.client.type("x")
    sim.run_until(lambda: "x" in sim.server.program.received.decode()[10:], limit_ms=1_000)
    assert sim.invariants.in_flight[mosh.TO_CLIENT] < 10_000
    sim.run_until(lambda: sim.settled, limit_ms=10_000)


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


@pytest.mark.parametrize("output", ["\x1b[?1007h", "\x1b[?1007h\x1b[?25l", "\x1b]1;icon name\x07"])
def test_what_the_client_cannot_see_costs_no_more_than_a_heartbeat(sim: Simulation, output: str) -> None:
    sim.run(ms=1_000)
    before = len(sim.datagrams(mosh.TO_CLIENT))
    sim.server.write(output.encode())
    sim.run(ms=6_000)
    assert len(sim.datagrams(mosh.TO_CLIENT)) - before <= 3
    assert "mosh" not in sim.client.seen.text


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


@pytest.mark.parametrize("seed", range(10))
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
    assert [sent.at for sent in sim.sent(mosh.TO_SERVER)][:6] == [0, 250, 500, 750, 1_000, 1_250]


def test_a_network_error_that_is_over_gives_way_to_the_notice_at_once(sim: Simulation) -> None:
    sim.link.blocked = {mosh.TO_SERVER, mosh.TO_CLIENT}
    sim.run(ms=300)
    sim.client.core.note_icmp_error(SERVER_ADDRESS, "Connection refused", sim.client.now)
    sim.run(ms=mosh.NETWORK_ERROR_MS - 1)
    assert "refused" in sim.client.seen.text
    sim.run(ms=1)
    assert "Nothing received from server" in sim.client.seen.text


def test_the_notice_goes_when_the_server_answers_after_all(sim: Simulation) -> None:
    sim.blackout(ms=2_900)
    sim.run(ms=2_000)
    assert "Nothing received" in sim.client.seen.text
    sim.run(ms=1_600)
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
    sim.client.type("burst 700\r" if flood else "")  # for 2 s
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


def test_a_proof_that_comes_when_the_address_has_been_forgotten_harms_nothing(sim: Simulation) -> None:
    """The first of two fragments that prove where the client has moved is on its way for a minute."""
    sim.run(ms=1_000)
    sim.client.move_to(NEW_ADDRESS)
    sim.client.type("x")
    sim.run_until(lambda: sim.server.peer == NEW_ADDRESS, limit_ms=100)
    sim.link.blocked = {mosh.TO_SERVER}
    sim.run(ms=30)
    assert sim.client.core.transport.sender.ack_num >= sim.server.core.transport._proof_num
    sim.client.type(bytes(sim.random.choices(range(0x21, 0x7F), k=1_800)))
    sim.run(ms=3)
    first, second = sim.datagrams(mosh.TO_SERVER)[-2:]
    sim.inject(sim.server, second, NEW_ADDRESS)
    sim.run(ms=60_000)
    sim.server.write(b"still here")
    sim.run(ms=100)
    assert sim.server.peer is None
    sim.inject(sim.server, first, NEW_ADDRESS)
    sim.link.heal()
    sim.run_until(lambda: sim.settled, limit_ms=4_000)


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


# -- random sessions; make sim plays ten thousand


@pytest.mark.parametrize("seed", range(150))
def test_everything_typed_arrives_and_the_screens_converge(seed: int) -> None:
    play(seed)


# -- broken on purpose: what would happen if one line of the core were wrong


class RepeatingChannel(mosh.Channel):
    """Uses one sequence number again."""

    def seal(self, plaintext: bytes) -> bytes:
        if self._next_seq == 9:
            self._next_seq = 8
        return super().seal(plaintext)


class DeafSender(mosh.Sender[Any]):
    """Does not notice acks."""

    def process_ack(self, ack_num: int, now: int) -> None:
        pass


class HoardingReceiver(mosh.Receiver[Any]):
    """Keeps every state it has ever received."""

    def receive(self, instruction: mosh.Instruction, now: int) -> bool:
        instruction.throwaway_num = 0
        return super().receive(instruction, now)


class HoardingSender(mosh.Sender[Any]):
    """Keeps every state that is not acknowledged."""

    def _send(self, base: mosh.NumberedState[Any], diff: bytes, now: int, state: Any) -> mosh.Instruction:
        kept = self.sent
        self.sent = kept[:1] + kept[-1:]  # nothing to drop here
        instruction = super()._send(base, diff, now, state)
        self.sent = kept + self.sent[2 if len(kept) > 1 else 1 :]
        return instruction


class HastySender(mosh.Sender[Any]):
    """Lets the peer throw away states that it may not have replaced yet."""

    def _send(self, base: mosh.NumberedState[Any], diff: bytes, now: int, state: Any) -> mosh.Instruction:
        instruction = super()._send(base, diff, now, state)
        instruction.throwaway_num = base.num if base.num > self.sent[0].num else self.sent[-1].num - 1
        return instruction


class StaleReplies(mosh.DatagramLayer):
    """Answers to where the client was first."""

    def receive_datagram(self, datagram: bytes, source: Any, now: int, congested: bool = False) -> bytes:
        before = self.peers
        payload = super().receive_datagram(datagram, source, now, congested)
        self.peers = before or self.peers
        return payload


SEED = 7
VARIANTS = {
    "a reused nonce": ("datagrams._channel", RepeatingChannel, "nonce .* is used twice"),
    "a lost ack": ("sender", DeafSender, "the ack of .* is lost"),
    "an unbounded queue": ("sender", HoardingSender, "states sent"),
    "another unbounded queue": ("receiver", HoardingReceiver, "states received"),
    "a wrong throwaway number": ("sender", HastySender, "thrown away"),
    "a stale reply address": ("datagrams", StaleReplies, "the server answers to"),
}
ENDS: dict[str, tuple[str, ...]] = dict.fromkeys(VARIANTS, ("client", "server"))
ENDS["a stale reply address"] = ("server",)  # only a server follows its peer


def _eventful(sim: Simulation) -> None:
    """A session in which every mistake has its chance: a bad link, another place, outages, an hour of nothing."""
    sim.link.delay_ms, sim.link.loss, sim.link.reordering = 50, 0.2, 0.1
    sim.client.type("a session with output\rburst 300\r", every_ms=40)
    sim.run(ms=5_000)
    sim.client.move_to(NEW_ADDRESS)
    for direction in (mosh.TO_SERVER, mosh.TO_CLIENT):
        sim.link.blocked = {direction}
        sim.client.type("typed in a tunnel " * 10, every_ms=20)
        sim.run(ms=4_000)
    for direction in (mosh.TO_SERVER, mosh.TO_CLIENT):
        sim.link.heal()
        sim.run_until(lambda: sim.settled, limit_ms=20_000)
        sim.link.blocked = {direction}
        sim.run(ms=120_000)  # heartbeats only
    sim.link.heal()
    sim.run(ms=mosh.ACK_INTERVAL_MS * (mosh.RECEIVED_LIMIT + 100))


@pytest.mark.parametrize(("variant", "end"), [(name, end) for name in VARIANTS for end in ENDS[name]])
def test_a_broken_end_is_found_out(variant: str, end: str) -> None:
    owner, broken, complaint = VARIANTS[variant]
    sim = Simulation(SEED)
    target: Any = getattr(sim, end).core.transport
    for name in owner.split("."):
        target = getattr(target, name)
    target.__class__ = broken
    with pytest.raises(BrokenInvariant, match=complaint):
        _eventful(sim)


def test_the_same_session_unbroken_breaks_no_invariant() -> None:
    _eventful(Simulation(SEED))
