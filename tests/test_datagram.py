"""Section 5: timestamps, round-trip time, roaming, association, port hopping."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh
from mosh import NO_TIMESTAMP, TO_CLIENT, TO_SERVER

CIPHER = mosh.CryptographyCipher(bytes(range(16)))
HOME, ELSEWHERE, SERVER = ("198.51.100.7", 40000), ("203.0.113.9", 50000), ("192.0.2.1", 60001)


def _client(now: int = 0) -> mosh.DatagramLayer:
    layer = mosh.DatagramLayer(mosh.Channel(CIPHER, TO_SERVER), now, is_server=False)
    layer.peers = [SERVER]
    return layer


def _server(now: int = 0) -> mosh.DatagramLayer:
    return mosh.DatagramLayer(mosh.Channel(CIPHER, TO_CLIENT), now, is_server=True)


def _timestamps(datagram: bytes) -> tuple[int, int]:
    """Return (timestamp, reply) of a datagram, whichever end sealed it."""
    direction = datagram[0] >> 7
    _, plaintext = mosh.Channel(CIPHER, 1 - direction).open(datagram)
    timestamp, reply = mosh.TIMESTAMPS.unpack_from(plaintext)
    return timestamp, reply


def _raw(seq: int, timestamp: int = 0, reply: int = NO_TIMESTAMP, direction: int = TO_CLIENT) -> bytes:
    """Seal a datagram with any numbers."""
    channel = mosh.Channel(CIPHER, direction)
    channel._next_seq = seq
    return channel.seal(mosh.TIMESTAMPS.pack(timestamp, reply) + b"payload")


def test_a_payload_travels_with_the_senders_clock() -> None:
    client, server = _client(), _server()
    datagram = client.seal(b"payload", now=1_000)
    assert _timestamps(datagram) == (1_000, NO_TIMESTAMP)
    assert server.receive_datagram(datagram, HOME, now=1_040) == b"payload"
    assert server.peers == [HOME] and server.last_heard_at == 1_040


# -- recorded datagrams

CONSTRUCTED_PAYLOAD = "00000000000000018000789ce360126090605460d06030e2e0629362d1083090b0620000105301de"
CONSTRUCTED_DATAGRAM = (
    "00000000000000009f164d976357081cc1c8bceef905db5a02428c8571949d686f4420ca31f0060ca43d50ffb19e12e522a8cf6e73fd36a9"
    "1f68ecf470d119b52ed349b9"
)


def test_constructed_client_datagram() -> None:
    payload = bytes.fromhex(CONSTRUCTED_PAYLOAD)
    assert _client().seal(payload, now=0x1234).hex() == CONSTRUCTED_DATAGRAM
    assert _timestamps(bytes.fromhex(CONSTRUCTED_DATAGRAM)) == (0x1234, NO_TIMESTAMP)
    assert _server().receive_datagram(bytes.fromhex(CONSTRUCTED_DATAGRAM), HOME, now=0) == payload


# -- timestamps

CLOCKS = [(0, 0), (65_534, 65_534), (65_535, 0), (65_536, 0), (131_071, 0), (10**12 + 7, (10**12 + 7) % 65_536)]


@pytest.mark.parametrize(("now", "timestamp"), CLOCKS)
def test_the_clock_as_it_travels(now: int, timestamp: int) -> None:
    assert _timestamps(_client().seal(b"", now))[0] == timestamp


HELD = [(0, 5_000), (1, 5_001), (100, 5_100), (999, 5_999), (1_000, NO_TIMESTAMP), (60_000, NO_TIMESTAMP)]


@pytest.mark.parametrize(("held_ms", "reply"), HELD)
def test_a_timestamp_is_echoed_with_the_time_it_was_held(held_ms: int, reply: int) -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=5_000), SERVER, now=70_000)
    assert _timestamps(client.seal(b"", 70_000 + held_ms))[1] == reply


def test_a_timestamp_is_echoed_once() -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=5), SERVER, now=100)
    assert [_timestamps(client.seal(b"", 110))[1] for _ in range(3)] == [15, NO_TIMESTAMP, NO_TIMESTAMP]


def test_the_newest_timestamp_is_echoed() -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=5), SERVER, now=100)
    client.receive_datagram(_raw(1, timestamp=50), SERVER, now=120)
    assert _timestamps(client.seal(b"", 130))[1] == 60


def test_no_timestamp_is_no_timestamp() -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=NO_TIMESTAMP), SERVER, now=100)
    assert _timestamps(client.seal(b"", 110))[1] == NO_TIMESTAMP


def test_an_echo_wraps_around() -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=65_500), SERVER, now=100)
    assert _timestamps(client.seal(b"", 200))[1] == 64


def test_a_congestion_mark_makes_the_echo_older() -> None:
    client = _client()
    client.receive_datagram(_raw(0, timestamp=100), SERVER, now=1_000, congested=True)
    assert _timestamps(client.seal(b"", 1_098))[1] == 65_234


def test_a_congestion_mark_reaches_the_sender_as_a_longer_round_trip() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 1_000), HOME, now=1_010, congested=True)
    client.receive_datagram(server.seal(b"", 1_010), SERVER, now=1_020)
    assert client.round_trip.srtt_ms == 520


def test_recorded_reply_with_eight_milliseconds_held() -> None:
    server = _server()
    keystroke_seq, keystroke_at = 2, 1_951
    server.receive_datagram(_raw(keystroke_seq, keystroke_at, direction=TO_SERVER), HOME, now=1_952)
    assert _timestamps(server.seal(b"", 1_960)) == (1_960, 1_959)


# -- round-trip time


def test_nothing_measured_yet() -> None:
    round_trip = mosh.RoundTrip()
    assert (round_trip.srtt_ms, round_trip.rto_ms, round_trip.frame_interval_ms) == (1_000, 1_000, 250)


def test_a_round_trip_is_measured_without_the_time_the_peer_took() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 1_000), HOME, now=1_040)
    client.receive_datagram(server.seal(b"", 1_540), SERVER, now=1_580)
    assert (client.round_trip.srtt_ms, client.round_trip.rttvar_ms) == (80, 40)


def test_smoothing() -> None:
    round_trip = mosh.RoundTrip()
    seen = []
    for sample in (100, 200, 200, 0):
        round_trip.observe(sample)
        seen.append((round_trip.srtt_ms, round_trip.rttvar_ms))
    assert seen == [(100, 50), (112.5, 62.5), (123.4375, 68.75), (108.0078125, 82.421875)]


@pytest.mark.parametrize(("sample", "counts"), [(0, True), (4_999, True), (5_000, False), (65_535, False)])
def test_a_sample_of_five_seconds_is_no_sample(sample: int, counts: bool) -> None:
    round_trip = mosh.RoundTrip()
    round_trip.observe(sample)
    assert round_trip.measured == counts
    assert round_trip.srtt_ms == (sample if counts else 1_000)


BOUNDS = [(0, 50, 20), (10, 50, 20), (40, 120, 20), (41, 123, 21), (100, 300, 50), (333, 999, 167), (600, 1_000, 250)]


@pytest.mark.parametrize(("first_sample", "rto_ms", "frame_interval_ms"), BOUNDS)
def test_timeouts_follow_the_round_trip_within_bounds(first_sample: int, rto_ms: int, frame_interval_ms: int) -> None:
    round_trip = mosh.RoundTrip()
    round_trip.observe(first_sample)
    assert (round_trip.rto_ms, round_trip.frame_interval_ms) == (rto_ms, frame_interval_ms)


@pytest.mark.parametrize(("now", "reply", "sample"), [(100, 40, 60), (65_540, 65_530, 10), (65_535, 65_530, 6)])
def test_a_sample_across_the_wrap_of_the_clock(now: int, reply: int, sample: int) -> None:
    client = _client()
    client.receive_datagram(_raw(0, reply=reply), SERVER, now)
    assert client.round_trip.srtt_ms == sample


@given(st.lists(st.integers(0, 65_535), max_size=60))
def test_estimates_stay_within_bounds(samples: list[int]) -> None:
    round_trip = mosh.RoundTrip()
    for sample in samples:
        round_trip.observe(sample)
    assert 0 <= round_trip.srtt_ms <= 5_000
    assert 50 <= round_trip.rto_ms <= 1_000 and 20 <= round_trip.frame_interval_ms <= 250


# -- order


def test_an_old_datagram_hands_up_its_payload_and_touches_nothing_else() -> None:
    server = _server()
    server.receive_datagram(_raw(7, timestamp=700, reply=650, direction=TO_SERVER), HOME, now=700)
    srtt_ms = server.round_trip.srtt_ms
    old = _raw(6, timestamp=1, reply=10, direction=TO_SERVER)
    assert server.receive_datagram(old, ELSEWHERE, now=750) == b"payload"
    assert (server.peers, server.last_heard_at, server.round_trip.srtt_ms) == ([HOME], 700, srtt_ms)
    assert _timestamps(server.seal(b"", 760))[1] == 760


@given(st.lists(st.integers(0, 3_000) | st.integers(0, 20), max_size=60))
def test_each_datagram_is_taken_once_in_any_order_within_a_window(seqs: list[int]) -> None:
    server = _server()
    taken: set[int] = set()
    for now, seq in enumerate(seqs):
        fresh = seq not in taken and seq > max(taken, default=0) - mosh.REPLAY_WINDOW
        taken_now = True
        try:
            server.receive_datagram(_raw(seq, direction=TO_SERVER), HOME, now)
        except mosh.PacketError:
            taken_now = False
        assert taken_now == fresh
        taken |= {seq} if fresh else set()


def test_the_oldest_datagram_that_is_taken() -> None:
    server = _server()
    server.receive_datagram(_raw(5_000, direction=TO_SERVER), HOME, 0)
    with pytest.raises(mosh.PacketError, match="replay or far too late"):
        server.receive_datagram(_raw(5_000 - mosh.REPLAY_WINDOW, direction=TO_SERVER), HOME, 1)
    server.receive_datagram(_raw(5_001 - mosh.REPLAY_WINDOW, direction=TO_SERVER), HOME, 2)


def test_a_replay_changes_nothing() -> None:
    server = _server()
    server.receive_datagram(_raw(7, timestamp=700, direction=TO_SERVER), HOME, now=700)
    with pytest.raises(mosh.PacketError, match="replay"):
        server.receive_datagram(_raw(7, timestamp=700, direction=TO_SERVER), ELSEWHERE, now=750)
    assert (server.peers, server.last_heard_at) == ([HOME], 700)


def test_sequence_numbers_may_jump() -> None:
    server = _server()
    for seq in (0, 5, 2**62, 2**63 - 1):
        server.receive_datagram(_raw(seq, direction=TO_SERVER), (HOME[0], seq), now=seq)
        assert server.peers == [(HOME[0], seq)]


# -- roaming


def test_a_server_answers_to_where_the_newest_datagram_came_from() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 0), HOME, now=10)
    late = client.seal(b"", 20)
    server.receive_datagram(client.seal(b"", 30), ELSEWHERE, now=40)
    assert server.peers == [ELSEWHERE]
    server.receive_datagram(late, HOME, now=50)
    assert server.peers == [ELSEWHERE]


def test_a_client_listens_to_anyone_with_the_key_and_stays_with_its_server() -> None:
    client = _client()
    assert client.receive_datagram(_raw(0), ELSEWHERE, now=10) == b"payload"
    assert client.peers == [SERVER] and client.last_heard_at == 10


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_and_move_nothing(data: bytes) -> None:
    server = _server()
    server.receive_datagram(_raw(0, direction=TO_SERVER), HOME, now=0)
    with pytest.raises(mosh.PacketError):
        server.receive_datagram(data, ELSEWHERE, now=10)
    assert server.peers == [HOME] and server.last_heard_at == 0


def test_our_own_datagram_reflected_moves_nothing() -> None:
    server = _server()
    with pytest.raises(mosh.PacketError, match="Illegal counterparty input"):
        server.receive_datagram(server.seal(b"", 0), ELSEWHERE, now=10)
    assert server.peers == []


@pytest.mark.parametrize("size", range(4))
def test_an_authentic_datagram_without_timestamps_is_refused(size: int) -> None:
    server = _server()
    with pytest.raises(mosh.PacketError, match="Illegal counterparty input"):
        server.receive_datagram(mosh.Channel(CIPHER, TO_SERVER).seal(bytes(size)), HOME, now=0)
    assert server.peers == []


# -- amplification


def test_an_address_has_to_be_proven_before_it_is_sent_much() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 0), HOME, now=10)
    assert server.allowance_bytes is None  # the first one: there was no server to lead astray
    roamed = client.seal(b"somewhere else", 20)
    server.receive_datagram(roamed, ELSEWHERE, now=30)
    assert server.allowance_bytes == 3 * len(roamed)
    sealed = server.seal(bytes(50), 30)
    assert server.allowance_bytes == 3 * len(roamed) - len(sealed)
    again = client.seal(b"", 40)
    server.receive_datagram(again, ELSEWHERE, now=50)  # which whoever holds up one datagram can do as well
    assert server.allowance_bytes == 3 * (len(roamed) + len(again)) - len(sealed)
    server.address_proven()
    assert server.allowance_bytes is None
    server.receive_datagram(client.seal(b"", 60), ELSEWHERE, now=70)
    assert server.allowance_bytes is None


def test_a_proven_address_stays_proven_through_sleep_and_somebody_elses_attempt() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 0), HOME, now=10)
    server.receive_datagram(client.seal(b"", 20), ELSEWHERE, now=30)
    server.receive_datagram(client.seal(b"", 40), HOME, now=50)
    assert server.allowance_bytes is None
    assert server.forget_silent_peer(100_000)
    server.receive_datagram(client.seal(b"", 100_000), HOME, now=100_010)
    assert server.allowance_bytes is None
    assert server.forget_silent_peer(200_000)
    server.receive_datagram(client.seal(b"", 200_000), ELSEWHERE, now=200_010)
    assert server.allowance_bytes is not None


def test_a_client_is_not_bounded() -> None:
    client = _client()
    client.receive_datagram(_raw(0), SERVER, now=10)
    client.receive_datagram(_raw(1), ELSEWHERE, now=20)
    assert client.allowance_bytes is None


# -- association


def test_a_server_forgets_a_client_that_has_been_silent_for_40_s() -> None:
    server = _server()
    server.receive_datagram(_raw(0, direction=TO_SERVER), HOME, now=1_000)
    assert not server.forget_silent_peer(41_000) and server.peers == [HOME]
    assert server.forget_silent_peer(41_001) and server.peers == []
    assert not server.forget_silent_peer(41_002)
    with pytest.raises(mosh.PacketError, match="replay"):
        server.receive_datagram(_raw(0, direction=TO_SERVER), ELSEWHERE, now=50_000)
    assert server.peers == []
    server.receive_datagram(_raw(1, direction=TO_SERVER), HOME, now=50_000)
    assert server.peers == [HOME]


def test_an_address_that_was_not_proven_is_forgotten_with_all_that_was_known_of_it() -> None:
    client, server = _client(), _server()
    server.receive_datagram(client.seal(b"", 0), HOME, now=10)
    server.receive_datagram(client.seal(b"", 20), ELSEWHERE, now=30)
    assert server.forget_silent_peer(50_000) and server.allowance_bytes is None
    server.receive_datagram(client.seal(b"", 60_000), ELSEWHERE, now=60_010)
    assert server.allowance_bytes is not None


def test_a_client_never_forgets_its_server() -> None:
    client = _client()
    client.receive_datagram(_raw(0), SERVER, now=0)
    assert not client.forget_silent_peer(10**9) and client.peers == [SERVER]


# -- port hopping

# (time of the last acknowledged state or None, time of the last port choice, now): is it time for another port?
HOPS = [
    (None, 0, 10_000, False),
    (None, 0, 10_001, True),
    (1_000, 0, 11_000, False),
    (1_000, 0, 11_001, True),
    (9_000, 0, 15_000, False),
    (None, 10_001, 20_001, False),
    (None, 10_001, 20_002, True),
]


@pytest.mark.parametrize(("round_trip_at", "chosen_at", "now", "hops"), HOPS)
def test_when_a_client_tries_another_port(round_trip_at: int | None, chosen_at: int, now: int, hops: bool) -> None:
    client = _client()
    client.port_chosen(chosen_at)
    client.last_round_trip_at = round_trip_at
    assert client.wants_new_port(now) == hops


def test_a_server_never_hops() -> None:
    assert not _server().wants_new_port(10**9)


def test_old_ports_are_kept_for_60_s() -> None:
    client = _client(now=500)
    assert not client.may_close_old_ports(60_500)
    assert client.may_close_old_ports(60_501)
    client.port_chosen(60_501)
    assert not client.may_close_old_ports(120_501)


# -- size


def test_a_refused_datagram_makes_all_later_ones_small() -> None:
    client = _client()
    assert client.mtu.bytes == 1_252
    client.mtu.shrink()
    assert client.mtu.bytes == 500


def _tried(*nums: int) -> mosh.PathMtu:
    """Large datagrams for these states, 100 ms apart."""
    mtu = mosh.PathMtu(1_252)
    for i, num in enumerate(nums):
        mtu.instruction_sent(num, 1_252, 100 * i)
    return mtu


@pytest.mark.parametrize(
    ("nums", "now", "falls_back"),
    [
        ((5, 6), 10_000, False), ((5, 5, 5), 499, False), ((5, 5, 5), 500, True), ((5, 6, 7), 500, True),
        ((5, 6, 7, 8), 500, True),
    ],
)
def test_large_datagrams_are_given_up_after_some_tries_and_a_timeout(
    nums: tuple[int, ...], now: int, falls_back: bool
) -> None:
    mtu = _tried(*nums)
    mtu.update(now, patience_ms=300)
    assert mtu.bytes == (500 if falls_back else 1_252)


def test_an_ack_of_a_large_state_or_of_what_builds_on_it_speaks_for_large_datagrams() -> None:
    for acked, falls_back in ((5, False), (7, False), (4, True)):
        mtu = _tried(5, 6, 6)
        mtu.instruction_sent(7, 90, 300)
        mtu.acknowledged(acked, 300)
        mtu.update(500, patience_ms=300)
        assert (mtu.bytes == 500) == falls_back


def test_a_path_that_has_carried_large_datagrams_gets_more_tries() -> None:
    for acked, tries in ((5, 14), (6, 3)):  # that of a later state may have been small after all
        mtu = _tried(5)
        mtu.acknowledged(acked, 0)
        for i in range(tries):
            mtu.update(1_000_000, patience_ms=300)
            assert mtu.bytes == 1_252
            mtu.instruction_sent(7 + i, 1_252, 1_000 * i)
        mtu.update(1_000 * tries, patience_ms=300)
        assert mtu.bytes == 500


def test_a_path_that_carries_a_probe_gets_more_tries_but_not_if_it_may_be_another_one() -> None:
    for doubted in (False, True):
        mtu = mosh.PathMtu(1_252)
        mtu.shrink()
        mtu.probe_sent(8, 0)
        mtu.acknowledged(8, 0)
        if doubted:
            mtu.doubt()
        for num in range(10, 13):
            mtu.instruction_sent(num, 1_252, 0)
        mtu.update(1_000, patience_ms=300)
        assert (mtu.bytes == 500) == doubted


def test_a_flood_of_large_states_that_are_acknowledged_late_is_no_black_hole() -> None:
    mtu = mosh.PathMtu(1_252)
    for num in range(1, 200):
        mtu.instruction_sent(num, 1_252, 50 * num)
        mtu.acknowledged(num - 20, 50 * num)
        mtu.update(50 * num, patience_ms=1_100)
    assert mtu.bytes == 1_252


def test_only_the_ack_of_the_newest_probe_counts() -> None:
    mtu = mosh.PathMtu(1_252)
    assert not mtu.wants_probe(10**9)
    mtu.shrink()
    mtu.update(1_000, patience_ms=300)
    assert not mtu.wants_probe(10_999) and mtu.wants_probe(11_000)
    mtu.probe_sent(8, 11_000)
    assert not mtu.wants_probe(70_999) and mtu.wants_probe(71_000)
    mtu.acknowledged(9, 71_000)
    assert mtu.bytes == 500
    mtu.acknowledged(8, 71_000)
    assert mtu.bytes == 1_252 and not mtu.wants_probe(10**9)


def test_payload_sizes_that_stock_uses() -> None:
    assert mosh.MTU_BYTES == {"IPv4": 1_252, "IPv6": 1_216}


# -- laws


@given(st.binary(max_size=1_000), st.integers(0, 10**15))
def test_what_goes_in_comes_out(payload: bytes, now: int) -> None:
    assert _server().receive_datagram(_client(now).seal(payload, now), HOME, now) == payload


@given(st.lists(st.tuples(st.sampled_from(("client", "server", "receive")), st.integers(0, 500)), max_size=40))
def test_no_nonce_is_used_twice(schedule: list[tuple[str, int]]) -> None:
    client, server, now = _client(), _server(), 0
    sent: list[bytes] = []
    for action, ms in schedule:
        now += ms
        if action == "receive" and sent:
            datagram = sent[ms % len(sent)]
            with contextlib.suppress(mosh.PacketError):  # it has arrived before
                (server if datagram[0] < 0x80 else client).receive_datagram(datagram, HOME, now)
        else:
            sent.append((client if action == "client" else server).seal(b"x", now))
    assert len({datagram[:8] for datagram in sent}) == len(sent)
