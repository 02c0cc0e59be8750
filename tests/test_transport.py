"""Section 7: SSP. One real end against a scripted peer, millisecond by millisecond, and two real ends on a bad link.

The states here are notes: the newest text counts, and a diff names the text it starts from, so that applying one to
anything else is found out.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mosh
from mosh import TO_CLIENT, TO_SERVER, Phase

CIPHER = mosh.CryptographyCipher(bytes(range(16)))
PEER, ELSEWHERE = ("192.0.2.1", 60001), ("203.0.113.9", 50000)
LAST = mosh.LAST_STATE_NUM


class Note:
    """A state that is one text."""

    weight = 1

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.forgotten: Note | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note) and self.text == other.text

    __hash__ = None  # type: ignore[assignment]

    def diff_from(self, base: Note) -> bytes:
        return b"" if self == base else f"{base.text}>{self.text}".encode()

    def applied(self, diff: bytes) -> Note:
        base, found, text = diff.decode().partition(">")
        if not found:
            raise mosh.PacketError("no diff")
        assert base == self.text, f"a diff from {base!r} was applied to {self.text!r}"
        return Note(text)

    def part_way(self, base: Note) -> Note:
        return Note(self.text[: (len(base.text) + len(self.text) + 1) // 2])

    def forget_before(self, base: Note) -> None:
        self.forgotten = base


class Growing(Note):
    """A note that only grows, whose diff is as long as what was added."""

    def diff_from(self, base: Note) -> bytes:
        return self.text[len(base.text) :].encode()


Transport = mosh.Transport[Note, Note]


def _transport(direction: int = TO_SERVER, collect_ms: int = 1, connected: bool = True) -> Transport:
    layer = mosh.DatagramLayer(mosh.Channel(CIPHER, direction), 0, is_server=direction == TO_CLIENT)
    layer.peers = [PEER] if connected else []
    return mosh.Transport(layer, Note(), Note(), 0, collect_ms=collect_ms, random_bytes=bytes)


class Peer:
    """The other end, which says what a test wants it to say."""

    def __init__(self, transport: Transport, direction: int = TO_CLIENT) -> None:
        self.transport = transport
        self._layer = mosh.DatagramLayer(mosh.Channel(CIPHER, direction), 0, is_server=False)
        self._fragmenter = mosh.Fragmenter()
        self._assembly = mosh.FragmentAssembly()
        self.now = 0

    def say(
        self, old: int, new: int, diff: str = "", *, ack: int = 0, throwaway: int = 0, version: int = 2,
        lag_ms: int = 0, source: tuple[str, int] = PEER,
    ) -> bytes:
        """Let an instruction arrive at `now`, sent `lag_ms` before. Returns its datagram."""
        instruction = mosh.Instruction(old, new, ack, throwaway, diff.encode())
        instruction.protocol_version = version
        (fragment,) = self._fragmenter.fragments(instruction, 1_252)
        datagram = self._layer.seal(fragment.encode(), self.now - lag_ms)
        self.transport.receive_datagram(datagram, source, self.now)
        return datagram

    def forget_timestamp(self) -> None:
        """As if what has been heard last had come long ago: the next datagram echoes nothing."""
        self._layer._saved_timestamp = None

    def hear(self) -> list[tuple[int, int, int, int, str]]:
        """Return what is sent right now: (old_num, new_num, ack_num, throwaway_num, diff)."""
        heard = []
        for datagram in self.transport.datagrams_to_send(self.now):
            payload = self._layer.receive_datagram(datagram, PEER, self.now)
            instruction = self._assembly.add(mosh.Fragment.decode(payload))
            if instruction is not None:
                numbers = instruction.old_num, instruction.new_num, instruction.ack_num, instruction.throwaway_num
                heard.append((*numbers, instruction.diff.decode()))
        return heard

    def listen(self, until: int) -> list[tuple[int, int, int, int, int, str]]:
        """Return all that is sent up to and including `until`, each with the time before it."""
        heard: list[tuple[int, int, int, int, int, str]] = []
        for _ in range(10_000):
            heard += [(self.now, *each) for each in self.hear()]
            deadline = self.transport.next_timeout()
            assert deadline is None or deadline > self.now or self.transport.phase is Phase.CLOSED
            if deadline is None or deadline > until:
                break
            self.now = deadline
        self.now = until
        return heard

    def measure_round_trips(self, ms: int) -> None:
        """Make the link's round trip `ms`, so that the frame interval is known."""
        self.transport.datagrams.round_trip.srtt_ms = ms
        self.transport.datagrams.round_trip.rttvar_ms = 0


def test_a_state_reaches_the_other_end() -> None:
    client, server = _transport(), _transport(TO_CLIENT, connected=False)
    client.set_current(Note("hello"), now=0)
    for datagram in client.datagrams_to_send(now=1):
        server.receive_datagram(datagram, ELSEWHERE, now=50)
    assert (server.remote.num, server.remote.state.text, server.remote.at) == (1, "hello", 50)
    assert server.phase is Phase.CONNECTED


# -- sender: when


def _gaps(times: list[int]) -> list[int]:
    return [later - at for at, later in zip(times, times[1:])]


def test_the_first_instruction_goes_out_at_once_and_then_more_and_more_rarely() -> None:
    client = _transport()
    client.set_current(Note("a"), now=0)
    heard = Peer(client).listen(until=60_000)
    assert {each[1:] for each in heard} == {(0, 1, 0, 0, ">a")}
    gaps = _gaps([at for at, *_ in heard])
    assert gaps == sorted(gaps) and gaps[0] == 250 and gaps[-1] == 3_000
    assert len([at for at, *_ in heard if at < 15_000]) == 18


def test_a_server_that_knows_no_client_does_nothing() -> None:
    server = _transport(TO_CLIENT, connected=False)
    server.set_current(Note("a"), now=0)
    assert server.next_timeout() is None and server.datagrams_to_send(now=60_000) == []


def test_a_server_answers_the_first_datagram_at_once() -> None:
    server = _transport(TO_CLIENT, connected=False)
    peer = Peer(server, TO_SERVER)
    peer.now = 5_000
    peer.say(0, 1, ">size")
    assert peer.hear() == [(0, 1, 1, 0, "")]


def test_an_idle_end_sends_an_empty_ack_every_three_seconds_each_with_a_number_of_its_own() -> None:
    heard = Peer(_transport()).listen(until=9_000)
    assert heard == [(0, 0, 1, 0, 0, ""), (3_000, 0, 2, 0, 0, ""), (6_000, 0, 3, 0, 0, ""), (9_000, 0, 4, 0, 0, "")]


def _connected(collect_ms: int = 1, rtt_ms: int = 40) -> Peer:
    """Return the peer of a transport that has said 0=>1, heard 0=>1 and has nothing more to say; it is 1 s."""
    transport = _transport(collect_ms=collect_ms)
    peer = Peer(transport)
    peer.listen(until=50)
    peer.say(0, 1, ack=1)
    peer.measure_round_trips(rtt_ms)
    peer.listen(until=1_000)
    assert transport.phase is Phase.CONNECTED
    return peer


def test_data_is_acknowledged_after_100_ms_by_an_empty_ack() -> None:
    peer = _connected()
    peer.say(1, 2, ">a", ack=1)
    assert peer.listen(until=3_000) == [(1_100, 1, 2, 2, 1, "")]


def test_an_empty_instruction_soon_after_ours_is_acknowledged_by_the_next_heartbeat_only() -> None:
    peer = _connected(rtt_ms=500)
    peer.say(1, 2, "", ack=1)
    assert peer.listen(until=5_000) == [(3_000, 1, 2, 2, 1, "")]


def test_a_heartbeat_is_answered_by_ours_and_the_next_one_left_to_the_peer() -> None:
    peer = _connected(rtt_ms=100)
    for beat in range(1, 6):
        peer.now = 3_000 * beat - 1_500  # in the middle between ours, at first
        peer.say(beat, beat + 1, "", ack=beat)
        assert peer.listen(until=peer.now + 2_900) == [(3_000 * beat - 1_500, beat, beat + 1, beat + 1, beat, "")]
    late = peer.listen(until=30_000)  # the peer has gone silent: it is up to us again
    assert [at for at, *_ in late] == [16_600, 19_600, 22_600, 25_600, 28_600]


def _idle_ends(key_at: int, delay_ms: Callable[[int], int], until: int) -> list[list[int]]:
    """Connect two ends by a path with this delay and type one key. Returns when each end sent something."""
    ends = [_transport(TO_SERVER), _transport(TO_CLIENT, connected=False)]
    on_the_way: list[tuple[int, int, bytes]] = []  # arrives at, at which end, datagram
    sent_at: list[list[int]] = [[], []]
    now = 0
    while now <= until:
        for each in [each for each in on_the_way if each[0] <= now]:
            on_the_way.remove(each)
            ends[each[1]].receive_datagram(each[2], PEER, now)
        if now == key_at:
            ends[0].set_current(Note("a key"), now)
        for number, end in enumerate(ends):
            datagrams = end.datagrams_to_send(now)
            on_the_way += [(now + delay_ms(now), 1 - number, datagram) for datagram in datagrams]
            sent_at[number] += [now] * len(datagrams)
        deadlines = [end.next_timeout() or key_at for end in ends] + [at for at, *_ in on_the_way]
        now = min(deadline for deadline in (*deadlines, key_at) if deadline > now)
    return sent_at


@pytest.mark.parametrize("phase_ms", range(0, 3_000, 250))
def test_two_idle_ends_wake_once_for_both_heartbeats(phase_ms: int) -> None:
    """Whenever either has last said something: one of them leads, and neither sends more often than every 3 s."""
    sent_at = _idle_ends(10_000 + phase_ms, lambda _: 50, until=60_000)
    first, second = ([at for at in times if at > 30_000][:9] for times in sent_at)
    assert _gaps(first) == _gaps(second) == [3_000] * 8
    assert 50 in ((first[0] - second[0]) % 3_000, (second[0] - first[0]) % 3_000)


@pytest.mark.parametrize(
    ("slow_ms", "stays_ms"), [(500, 4_000), (1_000, 4_000), (1_000, 10_000), (2_600, 999_999), (4_000, 999_999)]
)
@pytest.mark.parametrize("phase_ms", [0, 700, 1_500])
def test_no_answer_is_answered_however_slow_the_path_becomes(slow_ms: int, stays_ms: int, phase_ms: int) -> None:
    """On the last two, a round trip takes longer than what is taken for one."""

    def delay_ms(now: int) -> int:
        return slow_ms if now > 40_000 and (now - 40_000) // stays_ms % 2 == 0 else 10

    for sent_at in _idle_ends(10_000 + phase_ms, delay_ms, until=240_000):
        times = [at for at in sent_at if at > 30_000]
        assert len(times) <= 210_000 / 3_000 + 1 and max(_gaps(times)) <= 3_100


def test_a_peer_that_sends_heartbeats_without_end_gets_few() -> None:
    peer = _connected()
    answered = []
    for num in range(1, 200):
        peer.say(num, num + 1, "", ack=1)
        answered += [at for at, *_ in peer.listen(until=peer.now + 50)]
        peer.forget_timestamp()
    assert min(_gaps(answered)) >= mosh.FOLLOW_MS


def test_an_ack_rides_on_data() -> None:
    peer = _connected()
    peer.say(1, 2, ">theirs", ack=1)
    peer.transport.set_current(Note("ours"), now=1_030)
    heard = peer.listen(until=1_060)
    assert heard[0] == (1_031, 1, 2, 2, 1, ">ours")
    peer.say(2, 3, ack=2)
    assert peer.listen(until=3_000) == []


@pytest.mark.parametrize("collect_ms", mosh.COLLECT_MS.values(), ids=mosh.COLLECT_MS)
def test_changes_are_collected_before_they_are_sent(collect_ms: int) -> None:
    peer = _connected(collect_ms)
    assert peer.listen(until=2_000) == []
    peer.transport.set_current(Note("a"), now=2_000)
    assert peer.transport.next_timeout() == 2_000 + collect_ms
    peer.transport.set_current(Note("ab"), now=2_000 + collect_ms - 1)
    assert peer.listen(until=2_010)[0] == (2_000 + collect_ms, 1, 2, 1, 1, ">ab")


@pytest.mark.parametrize(("writes", "sent_at"), [
    ([(0, 1)], mosh.QUIET_MS),  # an echo
    ([(0, 1), (1, 1)], 1 + mosh.QUIET_MS),  # in two writes
    ([(n, 1) for n in range(7)], mosh.COLLECT_MS["server"]),  # a trickle
    ([(0, mosh.SMALL_DIFF_BYTES)], mosh.QUIET_MS),
    ([(0, mosh.SMALL_DIFF_BYTES + 1)], mosh.COLLECT_MS["server"]),  # of which more may follow
    ([(0, 1), (1, mosh.SMALL_DIFF_BYTES)], mosh.COLLECT_MS["server"]),
    ([(0, 0)], mosh.COLLECT_MS["server"]),  # an echo ack alone
], ids=str)  # fmt: skip
def test_a_few_bytes_are_sent_as_soon_as_no_more_follow(writes: list[tuple[int, int]], sent_at: int) -> None:
    peer = _connected(mosh.COLLECT_MS["server"])
    for after_ms, size in writes:
        assert peer.listen(until=2_000 + after_ms) == []
        peer.transport.set_current(Note(f"after {after_ms}"), now=peer.now, fresh_bytes=size)
    (sent,) = peer.listen(until=2_020)
    assert sent[0] == 2_000 + sent_at and sent[-1] == f">after {writes[-1][0]}"


def test_a_change_that_is_taken_back_is_told_at_once() -> None:
    """From what the peer is known to have the diff is empty then, but it may have the change."""
    peer = _connected(rtt_ms=40)
    known = peer.transport.sender.current.text
    peer.transport.set_current(Note("changed"), now=1_000)
    (change,) = peer.listen(until=1_004)
    peer.transport.set_current(Note(known), now=1_005)
    (back, *_) = peer.listen(until=1_100)
    assert back[0] < 1_100 and back[1] == change[1] and back[2] == change[2] + 1 and back[-1] == ""
    assert peer.listen(until=3_000) == []


@pytest.mark.parametrize(("rtt_ms", "interval_ms"), [(10, 20), (100, 50), (400, 200), (2_000, 250)])
@pytest.mark.parametrize(("size", "least", "most"), [(1, 0.0, 0.2), (100, 0.4, 0.6), (3_000, 1.0, 1.1)])
def test_a_frame_makes_the_next_one_wait_by_its_size(
    rtt_ms: int, interval_ms: int, size: int, least: float, most: float
) -> None:
    """A key costs hardly any of the frame interval, a frame half of it, a full datagram all of it."""
    noise = random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size)
    peer = _connected(rtt_ms=rtt_ms)
    peer.transport.set_current(Note("".join(noise)), now=1_000)
    (first, *_) = peer.listen(until=1_001)
    peer.transport.set_current(Note("".join(noise) + "!"), now=first[0] + 1)
    second = next(sent for sent in peer.listen(until=1_300) if sent[2] > first[2])
    assert least * interval_ms <= second[0] - first[0] <= most * interval_ms + 2
    assert second[2] == first[2] + 1


def _flood(peer: Peer, until: int, silent_at: int) -> list[int]:
    """Let a program fill the screen every millisecond until `silent_at`. Returns when frames were sent."""
    sent = []
    while peer.now < until:
        if peer.now < silent_at:
            noise = random.Random(peer.now).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=3_000)
            peer.transport.set_current(Note("".join(noise)), now=peer.now, fresh_bytes=3_000)
        sent += [each[0] for each in peer.listen(until=peer.now + 1)]
    return sorted(set(sent))


@pytest.mark.parametrize("into_interval_ms", [2, 20, 30])
def test_what_a_silent_program_last_said_to_a_key_does_not_wait_for_its_turn(into_interval_ms: int) -> None:
    peer = _connected(mosh.COLLECT_MS["server"], rtt_ms=100)
    *_, last = _flood(peer, until=1_300, silent_at=2_000)
    typed_at = last + 50 + into_interval_ms
    _flood(peer, until=typed_at, silent_at=2_000)
    peer.transport.sender.expect_answer(typed_at)
    silent_at = typed_at + 5
    assert _flood(peer, until=typed_at + 40, silent_at=silent_at)[0] == silent_at - 1 + mosh.COLLECT_MS["server"]


def test_answers_go_ahead_of_their_turn_once_per_round_trip() -> None:
    """A program that paints the screen for every key, and keys that repeat; the pacing alone would be slower by now."""
    sent = []
    peer = _connected(mosh.COLLECT_MS["server"], rtt_ms=100)
    while peer.now < 3_000:
        peer.transport.sender.expect_answer(peer.now)
        sent += _flood(peer, until=peer.now + 30, silent_at=peer.now + 1)
    assert _gaps(sent)[-10:] == [100] * 10


def test_a_flood_that_goes_on_after_a_key_keeps_to_its_turns() -> None:
    peer = _connected(mosh.COLLECT_MS["server"], rtt_ms=100)
    _flood(peer, until=1_300, silent_at=4_000)
    peer.transport.sender.expect_answer(peer.now)
    assert min(_gaps(_flood(peer, until=2_000, silent_at=4_000))) >= 50


def test_many_small_frames_add_up() -> None:
    peer = _connected(rtt_ms=2_000)
    for i in range(40):
        peer.transport.set_current(Note("x" * (i + 1)), now=1_000 + 5 * i)
        peer.listen(until=1_000 + 5 * i + 4)
    sent = peer.listen(until=1_250)
    assert peer.transport.stats["bytes_sent"] < 3 * mosh.PACING_BYTES, sent


def test_unacknowledged_data_is_resent_at_the_frame_rate() -> None:
    peer = _connected(rtt_ms=40)
    peer.transport.set_current(Note("a"), now=1_000)
    heard = peer.listen(until=1_200)
    assert heard[0] == (1_001, 1, 2, 1, 1, ">a")
    peer.say(1, 2, ack=2)
    assert peer.listen(until=3_000) == []
    assert {(old, diff) for _, old, _, _, _, diff in heard} == {(1, ">a")}


def _new_nums(peer: Peer, text: str) -> list[int]:
    """Publish `text`, which is never acknowledged. Return the state numbers under which it goes."""
    peer.transport.set_current(Note(text), now=peer.now)
    return [new for _, _, new, *_ in peer.listen(until=peer.now + 800)]


def test_what_may_lack_but_its_ack_is_resent_as_another_state_since_a_peer_acks_each_only_once() -> None:
    nums = _new_nums(_connected(rtt_ms=100), "a")
    assert len(nums) > 4 and nums == list(range(2, 2 + len(nums)))


def test_before_an_ack_can_have_come_a_state_keeps_its_number() -> None:
    assert _new_nums(_lossy(rtt_ms=100), "a")[:5] == [2, 2, 2, 3, 4]  # the third after 113 ms, the ack may take 200


def test_what_takes_several_datagrams_keeps_its_number_for_three_tries() -> None:
    """Pieces that arrive in different tries make up a whole only if it is the same."""
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note(NOISE[:3_000]), now=peer.now)
    nums: list[int] = []
    while len(nums) < 8:
        sent = peer.transport.datagrams_to_send(peer.now)
        nums += [peer.transport.last_sent_num] * bool(sent)
        peer.now = peer.transport.next_timeout() or 0
    assert nums == [2, 2, 2, 3, 3, 3, 4, 4]


def test_an_ack_of_any_of_its_numbers_ends_the_repeats() -> None:
    peer = _connected(rtt_ms=100)
    nums = _new_nums(peer, "a")
    peer.say(1, 2, ack=nums[1])
    assert peer.listen(until=peer.now + 2_000) == []


def test_an_end_that_does_not_know_the_round_trip_keeps_to_the_first_number() -> None:
    client = _transport()
    assert set(_new_nums(Peer(client), "a")) == {1}


def test_an_unanswered_keystroke_is_resent_more_and_more_rarely_but_never_given_up() -> None:
    """Heartbeats never acknowledged go stale, so the diff starts at what is known to be there."""
    peer = _connected(rtt_ms=40)
    peer.listen(until=4_000)
    peer.transport.set_current(Note("a"), now=4_000)
    heard = peer.listen(until=60_000)
    assert {(old, *rest) for _, old, _, *rest in heard} == {(1, 1, 1, ">a")}
    gaps = _gaps([at for at, *_ in heard])
    assert gaps[:4] == [150, 20, 20, 20] and gaps[1:] == sorted(gaps[1:]) and gaps[-1] == 3_000
    assert max(gap for gap, (at, *_) in zip(gaps, heard[1:]) if at < 14_000) == mosh.QUICK_RESEND_MS
    assert len(gaps) < 85  # of stock's 500 in the first 10 s alone


def test_what_is_typed_on_and_on_does_not_put_off_the_repeats_of_what_is_overdue() -> None:
    """Each key would else be given the time of an ack anew, and the first one go again only with the next."""
    peer, text, counts = _connected(rtt_ms=100), "", []
    for at in range(1_000, 1_750, 150):
        text += "a"
        peer.transport.set_current(Note(text), now=at)
        counts.append(len(peer.listen(until=at + 149)))
    assert counts[:2] == [1, 1] and min(counts[2:]) > 1


def test_what_is_overdue_is_repeated_as_often_as_its_size_allows() -> None:
    noise = random.Random(2)
    for size, gap in ((1, 50), (1_000, 50), (2_500, 75), (7_000, 100)):
        peer = _connected(rtt_ms=100)
        peer.transport.set_current(Note("".join(noise.choices("0123456789abcdef", k=size))), now=1_000)
        gaps = _gaps([each[0] for each in peer.listen(until=1_400)])
        assert gaps[:2] == [200, pytest.approx(gap, abs=5)], size


def test_what_the_peer_should_know_by_now_and_does_not_is_resent_as_soon_as_it_speaks() -> None:
    peer = _connected(rtt_ms=40)
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=21_000)
    sent_at = peer.listen(until=24_000)[-1][0]
    peer.now = sent_at + 100
    peer.say(1, 2, ack=1)
    assert [(old, diff) for old, *_, diff in peer.hear()] == [(1, ">a")]
    assert peer.hear() == []


def test_a_frame_that_came_up_in_an_outage_leaves_as_soon_as_the_peer_speaks() -> None:
    peer = _connected(rtt_ms=40)
    for i in range(80):
        peer.transport.set_current(Note(str(i) * 3_000), now=peer.now)
        peer.listen(until=peer.now + 100)
    peer.transport.set_current(Note("newest"), now=peer.now)
    waits_until = peer.transport.next_timeout()
    assert waits_until is not None and waits_until > peer.now + 100
    peer.say(1, 2, ack=1)
    assert [each[4] for each in peer.hear()] == [">newest"]


def test_what_is_still_on_its_way_is_not_resent_because_the_peer_speaks() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note("a"), now=1_000)
    sent_at = peer.listen(until=1_001)[-1][0]
    for after_ms in (1, 50, 99):
        peer.now = sent_at + after_ms
        peer.say(1, 1 + after_ms, ack=1)
        assert peer.hear() == []


def test_what_the_peer_repeats_is_acknowledged_again_once_the_ack_must_have_been_lost() -> None:
    peer = _connected(rtt_ms=40)
    peer.say(1, 2, ">a", ack=1)
    assert [each[:2] for each in peer.listen(until=1_110)] == [(1_100, 1)]
    peer.say(1, 2, ">a", ack=1)  # it crossed our ack
    assert peer.listen(until=1_250) == []
    peer.say(1, 2, ">a", ack=1)
    assert [(each[0], each[3]) for each in peer.listen(until=1_400)] == [(1_350, 2)]


def test_a_replay_makes_nothing_be_resent() -> None:
    peer = _connected(rtt_ms=40)
    old = peer.say(1, 2, ack=1)
    peer.transport.set_current(Note("a"), now=1_000)
    sent_at = peer.listen(until=21_000)[-1][0]
    assert peer.transport.next_timeout() == sent_at + 3_000
    with pytest.raises(mosh.PacketError, match="replay"):
        peer.transport.receive_datagram(old, PEER, 21_000)
    assert peer.hear() == []


def test_an_ack_ends_the_back_off() -> None:
    peer = _connected(rtt_ms=40)
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=20_000)
    peer.say(1, 2, ack=2)
    peer.listen(until=20_200)
    large = "".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=3_000))
    times = []
    for i in range(3):
        peer.transport.set_current(Note(large + str(i)), now=peer.now)
        times += [each[0] for each in peer.listen(until=peer.now + 25)]
    assert max(_gaps(times)) <= 26


def test_frames_to_a_peer_out_of_reach_become_rare_and_keys_do_not() -> None:
    noise = random.Random(2)
    sent_count = {}
    for size in (1, 3_000):
        peer, text = _connected(rtt_ms=40), ""
        for _ in range(600):
            text = "".join(noise.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=size))
            peer.transport.set_current(Note(text), now=peer.now)
            peer.listen(until=peer.now + 50)
        sent_count[size] = peer.transport.sender.sent[-1].num
    assert sent_count[1] > 200 and sent_count[3_000] < 60


# -- sender: lossy paths


def _lossy(rtt_ms: int) -> Peer:
    peer = _connected(rtt_ms=rtt_ms)
    for _ in range(mosh.LOSSY_COUNT):
        peer._layer.seal(b"", 0)  # it never arrives
        peer.say(0, 1, ack=1)
    return peer


def test_what_fits_a_datagram_goes_twice_on_a_lossy_path_and_more_once() -> None:
    noise = random.Random(2)
    for size, copies in ((1, 2), (1_000, 2), (3_000, 1)):
        peer = _lossy(rtt_ms=100)
        peer.transport.set_current(Note("".join(noise.choices("0123456789abcdef", k=size))), now=1_000)
        heard = peer.listen(until=1_090)
        assert len(heard) == copies and len({each[1:] for each in heard}) == 1
        assert copies == 1 or heard[1][0] - heard[0][0] == 13


def test_on_a_lossy_path_a_small_diff_is_resent_after_the_retransmission_timeout() -> None:
    peer = _lossy(rtt_ms=100)
    peer.transport.set_current(Note("a"), now=1_000)
    assert _gaps([each[0] for each in peer.listen(until=1_230)]) == [13, 100, 100]


def test_a_path_is_lossy_no_longer_once_enough_has_arrived() -> None:
    window = mosh.ArrivalWindow()
    for seq in (0, 1, 5, 6):
        window.observe(seq)
    assert window.lost_count == 3
    window.observe(3)  # late, not lost
    assert window.lost_count == 2
    for seq in range(7, 7 + mosh.LOSS_WINDOW):
        window.observe(seq)
    assert window.lost_count == 0


def test_an_outage_does_not_make_a_path_lossy_for_long() -> None:
    window = mosh.ArrivalWindow()
    assert window.observe(0) and window.observe(10_000) and not window.observe(9_999 - mosh.LOSS_WINDOW)
    assert window.lost_count == mosh.LOSS_RUN


# -- sender: large instructions

NOISE = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=60_000))


def _sizes(peer: Peer, until: int) -> list[tuple[int, list[int]]]:
    """Return what is sent up to `until`: times and sizes of datagrams."""
    sent = []
    while True:
        datagrams = peer.transport.datagrams_to_send(peer.now)
        if datagrams:
            sent.append((peer.now, [len(datagram) for datagram in datagrams]))
        deadline = peer.transport.next_timeout()
        if deadline is None or deadline > until:
            peer.now = until
            return sent
        peer.now = max(peer.now, deadline)


def test_a_long_train_of_fragments_is_spread_over_the_frame_interval() -> None:
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Note(NOISE), now=1_000)
    sent = _sizes(peer, until=1_201)
    (began_at, burst), *rest = sent
    assert len(burst) == mosh.BURST_DATAGRAMS and max(len(sizes) for _, sizes in rest) == 1
    assert 20 < len(rest) < 50 and max(_gaps([at for at, _ in sent])) <= 200 // len(rest) + 1
    assert sent[-1][0] - began_at <= 200


def test_what_changes_during_a_train_waits_for_its_end_and_no_longer() -> None:
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Growing(NOISE), now=1_000)
    _sizes(peer, until=1_050)
    peer.transport.set_current(Growing(NOISE + "!"), now=1_050)
    heard = peer.listen(until=1_205)
    assert [each[1:3] for each in heard] == [(2, 3)]
    assert heard[0][5] == "!"


def test_a_train_that_waited_out_a_suspend_leaves_and_is_not_resent_before_an_ack_can_come() -> None:
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Note(NOISE), now=1_000)
    _sizes(peer, until=1_020)
    peer.now = 500_000
    ((at, sizes),) = _sizes(peer, until=500_400)
    assert at == 500_000 and len(sizes) > 20


def test_who_has_moved_does_not_wait_for_a_train_that_nobody_can_receive() -> None:
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Note(NOISE), now=1_000)
    _sizes(peer, until=1_010)
    peer.transport.hurry(now=1_011)
    assert len(peer.transport.datagrams_to_send(now=1_011)) == mosh.BURST_DATAGRAMS


def test_a_queue_that_loses_the_same_places_of_each_train_loses_other_pieces() -> None:
    client, server = _transport(), _transport(TO_CLIENT)
    client.set_current(Note(NOISE[:9_000]), now=0)
    now = tries = 0
    while server.remote.num == 0 and tries < 12:
        train = client.datagrams_to_send(now)
        tries += bool(train)
        for datagram in train[: len(train) // 3]:
            server.receive_datagram(datagram, PEER, now)
        now = client.next_timeout() or 0
    assert server.remote.state.text == NOISE[:9_000]


def test_large_datagrams_never_acknowledged_are_given_up_for_small_ones() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note(NOISE[:3_000]), now=1_000)
    sent = _sizes(peer, until=1_600)
    large = [at for at, sizes in sent if max(sizes) > 600]
    small = [at for at, sizes in sent if max(sizes) <= mosh.FALLBACK_MTU_BYTES]
    tries = mosh.MTU_TRIES[False]
    assert tries < len(large) <= tries + 2 and small  # the last ones while the ack of the others may still come
    assert large[-1] < small[0] <= large[0] + 500


def test_an_end_that_may_have_moved_does_not_trust_the_new_path_with_large_datagrams() -> None:
    for moves in (False, True):
        peer = _connected(rtt_ms=100)
        peer.transport.set_current(Note(NOISE[:1_000]), now=1_000)
        peer.listen(until=1_100)
        peer.say(1, 2, ack=peer.transport.last_sent_num)
        if moves:
            peer.transport.hurry(peer.now)
            peer.listen(until=peer.now)
            peer.say(2, 3, ack=peer.transport.last_sent_num)
        peer.transport.set_current(Note(NOISE[1_000:4_000]), now=peer.now)
        peer.listen(until=peer.now + 1_500)
        assert (peer.transport.datagrams.mtu.bytes == mosh.FALLBACK_MTU_BYTES) == moves


def test_a_large_datagram_that_is_lost_once_makes_none_small() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note(NOISE[:1_000]), now=1_000)
    (_, num, *_) = peer.listen(until=1_210)[-1][1:]
    peer.listen(until=1_300)
    peer.say(1, 2, ack=num)
    assert peer.transport.datagrams.mtu.bytes == mosh.MTU_BYTES["IPv4"]
    peer.transport.set_current(Note(NOISE[1_000:2_000]), now=2_000)
    assert max(size for _, sizes in _sizes(peer, until=2_100) for size in sizes) > 600


class Pasted(Growing):
    """A note that grows and can be told by parts."""

    def part_way(self, base: Note) -> Note:
        return Pasted(super().part_way(base).text)


def _hear_of_a_paste(peer: Peer, *, heard: bool = True) -> list[int]:
    """Paste what a path cannot carry at once. Return the lengths of the diffs that come, of which none is acked."""
    peer.transport.set_current(Pasted(NOISE[:40_000]), now=peer.now)
    sizes = []
    for num in range(10, 13):
        sizes += [len(diff) for *_, diff in peer.listen(until=peer.now + 1_000)]
        if heard:
            peer.say(1, num, ack=1)
    return sizes


def test_what_is_never_acknowledged_as_a_whole_goes_by_parts_one_after_the_other() -> None:
    peer = _connected(rtt_ms=100)
    sizes = _hear_of_a_paste(peer)
    assert set(sizes) == {40_000, 5_000} and sizes == sorted(sizes, reverse=True)
    assert sizes.count(40_000) >= mosh.PART_TRIES
    known = 5_000
    for num, size in ((20, 8_750), (21, 26_250)):
        peer.say(12, num, ack=peer.transport.last_sent_num)
        (heard,) = peer.listen(until=peer.now + 100)
        assert heard[-1] == NOISE[known : known + size]
        known += size
    assert known == 40_000


def test_a_path_grows_with_each_ack() -> None:
    peer = _connected(rtt_ms=100)
    _hear_of_a_paste(peer)
    for num in range(20, 30):
        peer.say(12, num, ack=peer.transport.last_sent_num)
        peer.listen(until=peer.now + 100)
    peer.transport.set_current(Pasted(NOISE), now=peer.now)
    (heard, *_) = peer.listen(until=peer.now + 100)
    assert len(heard[-1]) == len(NOISE) - 40_000


def test_a_stock_server_is_never_told_less_than_before() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    assert set(_hear_of_a_paste(peer)) == {40_000}


def test_a_large_paste_that_is_lost_is_repeated_word_for_word_while_all_else_waits() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    peer.transport.set_current(Pasted(NOISE[:40_000]), now=peer.now)
    heard = []
    for num in range(10, 20):
        heard += peer.listen(until=peer.now + 300)
        peer.say(1, num, ">more", ack=1)
        peer.transport.set_current(Pasted(NOISE[: 40_000 + num]), now=peer.now)
    repeats = {each[1:] for each in heard[1:]}
    assert 3 < len(heard) < 15 and len(repeats) == 1  # at most one per retransmission timeout
    peer.say(19, 20, ack=peer.transport.last_sent_num)
    ((_, _, _, ack, _, diff),) = peer.listen(until=peer.now + 200)
    assert (ack, diff) == (20, NOISE[40_000 : 40_019])


def test_a_large_paste_that_is_lost_is_not_begun_anew_by_a_search() -> None:
    """That would end its assembly three times, and again with each search."""
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    peer.transport.set_current(Pasted(NOISE[:40_000]), now=peer.now)
    heard = [each[1:] for each in peer.listen(until=1_700)]
    peer.transport.hurry(peer.now)
    ((_, *repeat),) = peer.listen(until=1_760)  # else it would be due in a tenth of a second
    assert tuple(repeat) == heard[-1] == heard[-2]
    assert len(peer.listen(until=peer.now + 1_000)) < 5  # it is not in a hurry for ever


def _departures(peer: Peer, until: int) -> list[int]:
    """Return when each datagram leaves, up to and including `until`."""
    departures = []
    while peer.now <= until:
        departures += [peer.now] * len(peer.transport.datagrams_to_send(peer.now))
        peer.now = peer.transport.next_timeout() or until
    peer.now = until
    return departures


def _lose_a_paste(until: int, *, heard_until: int) -> Peer:
    """Return a peer that has not heard a paste of 40,000 until then, and is heard each 300 ms until `heard_until`."""
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    peer.transport.set_current(Pasted(NOISE[:40_000]), now=peer.now)
    for num, now in enumerate(range(1_300, until, 300), start=10):
        _departures(peer, now)
        if now <= heard_until:
            peer.say(1, num, ack=1)
    return peer


def test_what_has_been_lost_for_long_leaves_slowly_and_whoever_is_heard_meanwhile() -> None:
    """A queue may be short: what arrives at the speed of the link is not lost there."""
    peer = _lose_a_paste(6_000, heard_until=6_000)
    departures = _departures(peer, 10_000)
    pieces = -(-40_000 // 460)
    gaps = sorted(later - at for at, later in zip(departures, departures[1:]))
    assert gaps[len(gaps) // 2] > 1_000 // pieces and len(departures) < 4 * pieces


def test_a_client_that_leaves_does_not_wait_for_what_leaves_slowly() -> None:
    peer = _lose_a_paste(6_000, heard_until=6_000)
    _departures(peer, peer.transport.sender.next_timeout() + 20)
    peer.hear()
    peer.transport.start_shutdown(peer.now)
    assert [num for _, _, num, *_ in peer.listen(until=peer.now + 100)] == [LAST]


@pytest.mark.parametrize("at", [-10, 400], ids=["before a try", "after its beginning"])
def test_after_an_outage_a_lost_paste_leaves_at_once(at: int) -> None:
    peer = _lose_a_paste(60_000, heard_until=2_000)
    _departures(peer, peer.transport.sender.next_timeout() + at)
    peer.say(1, 1_000, ack=1)
    departures = _departures(peer, peer.now + 1_000)
    assert departures[-1] - departures[0] < 1_000 and departures[50] - departures[0] <= 50


def test_a_client_that_leaves_does_not_wait_for_what_is_lost() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    _hear_of_a_paste(peer)
    peer.transport.start_shutdown(peer.now)
    assert peer.listen(until=peer.now + 1_000)[-1][2] == LAST


def test_a_client_that_is_left_says_goodbye_though_a_paste_is_lost() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.sender.may_step_back = False
    _hear_of_a_paste(peer)
    peer.say(12, LAST, ack=1)
    (heard,) = peer.listen(until=peer.now + 200)
    assert heard[3] == LAST and peer.transport.phase is Phase.CLOSED


def test_the_rest_of_a_paste_whose_beginning_is_lost_is_not_repeated_without_it() -> None:
    """Nobody could apply it."""
    peer = _connected(rtt_ms=400)
    peer.transport.sender.may_step_back = False
    peer.transport.set_current(Pasted(NOISE[:16_000]), now=peer.now)
    (beginning,) = peer.listen(until=peer.now + 100)
    peer.transport.set_current(Pasted(NOISE), now=peer.now)
    rest, *repeats = peer.listen(until=peer.now + 5_000)
    assert rest[1] == beginning[2] and repeats
    assert {(old, len(diff)) for _, old, _, _, _, diff in repeats} == {(1, len(NOISE))}


def test_after_an_outage_a_key_does_not_wait_for_the_first_ack() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=60_000)
    peer.say(1, 2, "", ack=1)
    assert [each[-1] for each in peer.listen(until=60_001)] == [">a"]
    peer.transport.set_current(Note("ab"), now=60_001)
    assert [each[-1] for each in peer.listen(until=60_020)] == [">ab"]


def test_the_rest_of_a_train_is_not_sent_if_a_copy_of_it_has_arrived() -> None:
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Note(NOISE), now=1_000)
    assert peer.transport.datagrams_to_send(1_001) and peer.transport._train
    peer.say(1, 2, ack=peer.transport.last_sent_num)
    assert not peer.transport._train and peer.listen(until=1_500) == []


def test_an_outage_is_no_narrow_path() -> None:
    peer = _connected(rtt_ms=100)
    peer.now = mosh.OUTAGE_MS
    assert set(_hear_of_a_paste(peer, heard=False)) == {40_000}


def test_last_words_may_go_by_parts() -> None:
    peer = _connected(rtt_ms=100)
    _hear_of_a_paste(peer)
    peer.transport.start_shutdown(peer.now)
    heard = ""
    for num in range(20, 30):
        peer.say(12, num, ack=peer.transport.last_sent_num)
        if peer.transport.phase is Phase.CLOSED:
            break
        assert peer.transport.last_sent_num < LAST
        heard = peer.listen(until=peer.now + 40)[0][-1]
    assert peer.transport.clean and NOISE[:40_000].endswith(heard) and heard


def test_by_the_last_number_only_the_whole_goes() -> None:
    """Nothing could come after a part."""
    peer = _connected(rtt_ms=400)
    peer.transport.set_current(Pasted(NOISE[:40_000]), now=peer.now)
    peer.transport.start_shutdown(peer.now)
    heard = []
    for num in range(10, 14):
        heard += peer.listen(until=peer.now + 1_000)
        peer.say(1, num, ack=1)
    assert len(heard) > mosh.PART_TRIES and {(num, len(diff)) for _, _, num, _, _, diff in heard} == {(LAST, 40_000)}


def test_what_is_too_much_for_an_address_not_proven_is_tried_once_in_a_timeout() -> None:
    """A probe goes instead, which proves the address unless it is lost."""
    server = _transport(TO_CLIENT, connected=False)
    peer = Peer(server, TO_SERVER)
    peer.say(0, 1, ">" + NOISE[:20])
    peer.measure_round_trips(300)
    peer.listen(until=1_000)
    peer.say(1, 2, f"{NOISE[:20]}>{NOISE[:500]}", source=ELSEWHERE)
    server.set_current(Pasted(NOISE[:3_000]), now=1_000)
    heard = [(at, diff.encode()) for at, *_, diff in peer.listen(until=1_700)]
    assert heard == [(at, mosh.PROBE_DIFF) for at in (1_001, 1_301, 1_601)]


@pytest.mark.parametrize(("source", "answered_at"), [(PEER, 3_000), (ELSEWHERE, 1_100)])
def test_an_empty_instruction_from_an_address_not_proven_is_acknowledged_soon(
    source: tuple[str, int], answered_at: int
) -> None:
    """What goes there proves the address, sooner or later."""
    server = _transport(TO_CLIENT, connected=False)
    peer = Peer(server, TO_SERVER)
    peer.say(0, 1, ">a")
    peer.measure_round_trips(300)
    peer.listen(until=1_000)
    peer.say(1, 2, "", ack=1, source=source)
    assert [at for at, *_ in peer.listen(until=3_500)][:1] == [answered_at]


def test_a_padded_heartbeat_probes_for_large_datagrams() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport._random_bytes = random.Random(1).randbytes
    peer.transport.datagrams.mtu.shrink()
    beats = [(at, max(sizes)) for at, sizes in _sizes(peer, until=150_000)]
    probes = [at for at, size in beats if size > mosh.FALLBACK_MTU_BYTES]
    assert {size for _, size in beats if size > mosh.FALLBACK_MTU_BYTES} <= set(range(1_245, 1_253))
    assert 10_000 <= probes[0] - 1_000 <= 13_000 and all(60_000 <= gap <= 63_000 for gap in _gaps(probes))
    assert max(_gaps([at for at, _ in beats])) <= 3_000  # a probe that is lost is not missed for long
    peer.say(1, 2, ack=peer.transport.sender.sent[-1].num)
    assert peer.transport.datagrams.mtu.bytes == mosh.FALLBACK_MTU_BYTES


def test_an_acknowledged_probe_brings_large_datagrams_back() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport._random_bytes = random.Random(1).randbytes
    peer.transport.datagrams.mtu.shrink()
    while max(_sizes(peer, until=peer.now + 1)[-1:], default=(0, [0]))[1][0] < 600:
        peer.now += 100
        assert peer.now < 20_000
    peer.say(1, 2, ack=peer.transport.sender.sent[-1].num)
    assert peer.transport.datagrams.mtu.bytes == 1_252


def test_a_datagram_refused_for_its_size_is_replaced_at_once() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note(NOISE[:3_000]), now=1_000)
    sent = _sizes(peer, until=1_010)
    assert peer.transport.next_timeout() > peer.now  # type: ignore[operator]
    peer.transport.datagrams.mtu.shrink()
    assert peer.transport.next_timeout() <= peer.now  # type: ignore[operator]
    ((at, sizes),) = _sizes(peer, until=1_011)
    assert max(sent[0][1]) > 600 and max(sizes) <= mosh.FALLBACK_MTU_BYTES and at == 1_010


def test_a_due_ack_takes_pending_data_along_without_waiting_for_the_frame() -> None:
    peer = _connected(rtt_ms=2_000)
    large = "".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=3_000))
    peer.transport.set_current(Note(large), now=1_000)
    sent_at = peer.listen(until=1_010)[0][0]
    peer.say(1, 2, ">theirs", ack=2)
    peer.listen(until=1_050)
    peer.transport.set_current(Note(large + "b"), now=1_050)
    heard = peer.listen(until=1_300)
    assert heard[0][:5] == (1_110, 2, 3, 2, 2) and heard[0][0] < sent_at + 250


def test_nothing_changes_when_a_change_is_taken_back_in_time() -> None:
    peer = _connected(collect_ms=8)
    peer.transport.set_current(Note("a"), now=1_000)
    peer.transport.set_current(Note(), now=1_004)
    assert peer.listen(until=2_000) == []


class Marked(Note):
    """A note with a mark, which makes it another one or is in its diffs."""

    def __init__(self, mark: str, *, differs: bool = True) -> None:
        super().__init__()
        self.mark = mark
        self._differs = differs

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and not (self._differs and self.mark != getattr(other, "mark", ""))

    __hash__ = None

    def diff_from(self, base: Note) -> bytes:
        if self._differs:
            return b"" if self.text == base.text else super().diff_from(base)
        return super().diff_from(base) or (b">" + self.mark.encode() if self is not base else b"")


@pytest.mark.parametrize("ack_is_due", [False, True])
def test_what_no_diff_can_tell_is_not_told_and_not_tried_again(ack_is_due: bool) -> None:
    """The loop of an end would run without a pause otherwise, until the next ack."""
    peer = _connected(rtt_ms=40)
    peer.now = 1_000
    if ack_is_due:
        peer.transport.hurry(peer.now)
    for mark in ("one", "two"):
        peer.transport.set_current(Marked(mark), now=peer.now)
        heard = peer.listen(until=peer.now + 500)  # which sees to it that there are pauses
        assert [diff for *_, diff in heard] == [""] * ack_is_due


def test_a_diff_between_states_that_are_alike_waits_for_a_heartbeat_and_has_a_number_of_its_own() -> None:
    """A diff from a state to itself would be taken for a repeat: the peer would have no heartbeat at all."""
    peer = _connected(rtt_ms=40)
    peer.transport.set_current(Marked("icon", differs=False), now=1_000)
    (heartbeat,) = peer.listen(until=3_500)
    assert heartbeat[2] == heartbeat[1] + 1 and heartbeat[-1] == ">icon"


def test_asking_when_changes_nothing() -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    assert peer.transport.next_timeout() == peer.transport.next_timeout()
    peer.now = 1_001
    assert peer.hear() == [(1, 2, 1, 1, ">a")] and peer.hear() == []


# -- sender: what


def test_a_fresh_state_is_assumed_to_have_arrived() -> None:
    peer = _connected(rtt_ms=600)
    peer.transport.set_current(Growing("a" * 1_500), now=1_000)
    peer.listen(until=1_010)
    peer.transport.set_current(Growing("a" * 1_501), now=1_010)
    (heard, *_) = peer.listen(until=1_310)
    assert heard[1:3] == (2, 3)


def test_a_state_unacknowledged_for_a_timeout_is_no_longer_assumed() -> None:
    peer = _connected(rtt_ms=100)  # RTO 100, and 100 more for a delayed ack
    peer.transport.set_current(Growing("a" * 1_500), now=1_000)
    peer.transport.datagrams_to_send(now=1_001)
    sender = peer.transport.sender
    sender.update_timers(now=1_200)
    assert sender._assumed.num == 2
    sender.update_timers(now=1_201)
    assert sender._assumed.num == 1


def test_assuming_stops_at_the_first_stale_state() -> None:
    peer = _connected(rtt_ms=100)
    sender = peer.transport.sender
    sender.sent += [mosh.NumberedState(num, at, Note(str(num))) for num, at in ((2, 900), (3, 500), (4, 990))]
    sender.update_timers(now=1_000)
    assert sender._assumed.num == 2


# (length of the diff from what is known to be there, from what is assumed to be): does the sender choose the former?
PROSPECTIVE = [
    (50, 50, True),
    (40, 60, True),
    (149, 50, True),
    (150, 50, False),
    (999, 900, True),
    (1_000, 901, False),
    (5_000, 5_000, True),
    (5_000, 6_000, True),
]


class Sized(Note):
    """A note whose diffs have the lengths that a test wants: from the note "base", and from any other."""

    sizes = (0, 0)

    def diff_from(self, base: Note) -> bytes:
        return b"" if self == base else bytes(self.sizes[base.text != "base"])


@pytest.mark.parametrize(("full", "diff", "starts_over"), PROSPECTIVE)
def test_a_diff_starts_from_what_is_known_where_that_costs_little(full: int, diff: int, starts_over: bool) -> None:
    sender: mosh.Sender[Note] = mosh.Sender(Note("base"), 0, 1, mosh.RoundTrip(), mosh.ArrivalWindow())
    sender.sent.append(mosh.NumberedState(1, 0, Note("assumed")))
    sender.current = Sized("new")
    sender.current.sizes = (full, diff)
    sender.update_timers(now=250)
    instruction = sender.instruction_to_send(now=250)
    assert instruction is not None
    assert (instruction.old_num, len(instruction.diff)) == ((0, full) if starts_over else (1, diff))


def test_at_most_32_states_are_kept_and_the_16th_newest_goes() -> None:
    peer, expected = _connected(), [1]
    for i in range(60):
        peer.transport.set_current(Note("a" * (i + 1)), now=peer.now)
        for _, _, num, *_ in peer.listen(until=peer.now + 22):
            if num > expected[-1]:
                expected.append(num)
            if len(expected) > 32:
                del expected[-16]
    assert [entry.num for entry in peer.transport.sender.sent] == expected
    assert expected[0] == 1 and expected[-1] >= 61


# -- sender: acks


def test_an_ack_lets_go_of_everything_older() -> None:
    peer = _connected()
    for text in "abc":
        peer.transport.set_current(Note(text), now=peer.now)
        peer.listen(until=peer.now + 21)
    nums = [entry.num for entry in peer.transport.sender.sent]
    assert nums == [1, 2, 3, 4]
    peer.say(1, 2, ack=3)
    assert [entry.num for entry in peer.transport.sender.sent] == [3, 4]
    assert peer.listen(until=1_400)[0][1:] == (3, 4, 2, 3, "b>c")


@pytest.mark.parametrize("ack", [0, 5, 1_000, LAST])
def test_an_ack_of_what_is_not_kept_is_ignored(ack: int) -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=1_010)
    peer.say(1, 2, ack=ack)
    assert [entry.num for entry in peer.transport.sender.sent] == [1, 2]


def test_an_ack_counts_even_in_an_instruction_that_is_otherwise_useless() -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=1_010)
    peer.say(77, 78, "x>y", ack=2)
    assert [entry.num for entry in peer.transport.sender.sent] == [2]


def test_states_are_told_what_will_never_be_a_base_again() -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=1_010)
    peer.say(1, 2, ack=2)
    peer.transport.set_current(Note("ab"), now=1_020)
    assert peer.transport.sender.current.forgotten == Note("a")


# -- receiver


def _received(peer: Peer) -> list[tuple[int, str]]:
    return [(entry.num, entry.state.text) for entry in peer.transport.receiver.states]


def test_states_build_on_each_other() -> None:
    peer = _connected()
    peer.say(1, 2, ">a")
    peer.say(2, 3, "a>ab", throwaway=1)
    peer.say(2, 4, "a>c", throwaway=2)
    assert _received(peer) == [(2, "a"), (3, "ab"), (4, "c")]
    assert peer.transport.remote.state == Note("c")


def test_a_duplicate_changes_nothing() -> None:
    peer = _connected()
    peer.say(1, 2, ">a")
    peer.now = 1_500
    before = _received(peer)
    peer.say(1, 2, ">a")
    peer.say(1, 2, ">something else")
    assert _received(peer) == before
    assert peer.transport.remote.at == 1_000


def test_a_replayed_datagram_changes_nothing() -> None:
    peer = _connected()
    datagrams = [peer.say(1, 2, ">a"), peer.say(2, 3, "a>b", throwaway=2)]
    before = _received(peer)
    for datagram in datagrams:
        with pytest.raises(mosh.PacketError, match="replay"):
            peer.transport.receive_datagram(datagram, ELSEWHERE, 1_500)
    assert _received(peer) == before and peer.transport.datagrams.peers == [PEER]


def test_a_diff_from_an_unknown_state_is_ignored() -> None:
    peer = _connected()
    before = _received(peer)
    peer.say(5, 6, "x>y", throwaway=5)
    assert _received(peer) == before
    assert peer.transport.sender.ack_num == 1


def test_a_state_thrown_away_is_no_base_any_more() -> None:
    peer = _connected()
    peer.say(1, 2, ">a")
    peer.say(2, 3, "a>b", throwaway=2)
    peer.say(1, 4, ">c")
    assert _received(peer) == [(2, "a"), (3, "b")]


def test_a_base_may_be_thrown_away_by_the_instruction_that_uses_it() -> None:
    peer = _connected()
    peer.say(1, 2, ">a", throwaway=2)
    assert _received(peer) == [(2, "a")]


def test_a_state_that_comes_late_is_kept_but_is_no_news() -> None:
    peer = _connected()
    peer.say(1, 3, ">c")
    peer.now = 1_400
    peer.say(1, 2, ">b")
    assert _received(peer) == [(0, ""), (1, ""), (2, "b"), (3, "c")]
    assert (peer.transport.remote.num, peer.transport.remote.at) == (3, 1_000)
    assert peer.transport.sender.ack_num == 3
    peer.say(2, 4, "b>d")
    assert peer.transport.remote.state == Note("d")


def test_an_empty_diff_repeats_its_base() -> None:
    peer = _connected()
    peer.say(1, 2, ">a")
    peer.say(2, 3)
    assert peer.transport.remote.num == 3 and peer.transport.remote.state == Note("a")


def test_a_flood_of_states_is_quenched_to_one_in_15_s() -> None:
    peer = _connected()
    for num in range(2, 1_025):
        peer.say(1, num, f">{num}")
    assert len(_received(peer)) == 1_025
    peer.say(1, 2_000, ">one more")
    peer.say(1, 2_001, ">and another")
    assert peer.transport.remote.state == Note("one more")
    peer.now += 14_999
    peer.say(1, 2_002, ">and another")
    assert peer.transport.remote.state == Note("one more")
    peer.now += 1
    peer.say(1, 2_003, ">after a while")
    assert peer.transport.remote.state == Note("after a while") and len(_received(peer)) == 1_027


def test_a_quenched_sender_may_still_tidy_up() -> None:
    peer = _connected()
    for num in range(2, 1_026):
        peer.say(1, num, f">{num}")
    peer.say(1_025, 1_026, "1025>z", throwaway=1_025)
    assert _received(peer) == [(1_025, "1025"), (1_026, "z")]


@pytest.mark.parametrize("version", [0, 1, 3])
def test_another_protocol_version_is_refused_and_the_session_goes_on(version: int) -> None:
    peer = _connected()
    with pytest.raises(mosh.PacketError, match="mosh protocol version mismatch"):
        peer.say(1, 2, ">a", version=version)
    assert peer.transport.stats["dropped"] == 1 and peer.transport.remote.num == 1
    peer.say(1, 2, ">a")
    assert peer.transport.remote.num == 2


def test_even_an_instruction_of_another_version_moves_the_server() -> None:
    server = _transport(TO_CLIENT)
    peer = Peer(server, TO_SERVER)
    server.datagrams.peers = [ELSEWHERE]
    with pytest.raises(mosh.PacketError):
        peer.say(0, 1, ">a", version=3)
    assert server.datagrams.peers == [PEER]


def test_a_malformed_diff_is_refused_and_may_come_again_whole() -> None:
    peer = _connected()
    with pytest.raises(mosh.PacketError):
        peer.say(1, 2, "nonsense")
    assert (peer.transport.remote.num, peer.transport.sender.ack_num) == (1, 1)
    peer.say(1, 2, ">a")
    assert peer.transport.remote.state == Note("a")


def test_the_round_trip_that_port_hopping_looks_at_is_when_the_acknowledged_state_was_sent() -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    sent_at = peer.listen(until=1_010)[0][0]
    peer.now = 1_500
    peer.say(1, 2, ack=2)
    assert peer.transport.datagrams.last_round_trip_at == sent_at == peer.transport.last_acked_at


# -- shutdown


def test_shutdown_is_said_16_times_at_the_frame_rate_then_given_up() -> None:
    peer = _connected(rtt_ms=40)
    peer.transport.start_shutdown(now=1_000)
    heard = peer.listen(until=5_000)
    assert [each[1:] for each in heard] == [(1, LAST, 1, 1, "")] * 16
    assert {later[0] - each[0] for each, later in zip(heard, heard[1:])} == {20}
    assert peer.transport.phase is Phase.CLOSED and not peer.transport.clean


def test_shutdown_before_anything_was_measured_takes_four_seconds() -> None:
    transport = _transport()
    peer = Peer(transport)
    peer.listen(until=1_000)
    transport.start_shutdown(now=1_000)
    heard = peer.listen(until=20_000)
    assert len(heard) == 16 and heard[-1][0] - heard[0][0] == 15 * 250
    assert transport.phase is Phase.CLOSED


def test_shutdown_without_anyone_to_tell_ends_after_ten_seconds() -> None:
    server = _transport(TO_CLIENT, connected=False)
    server.start_shutdown(now=500)
    assert server.next_timeout() == 10_500
    phases = []
    for now in (10_499, 10_500):
        server.datagrams_to_send(now)
        phases.append(server.phase)
    assert phases == [Phase.CLOSING, Phase.CLOSED] and server.next_timeout() is None


def test_shutdown_ends_cleanly_when_it_is_acknowledged() -> None:
    peer = _connected()
    peer.transport.start_shutdown(now=1_000)
    peer.listen(until=1_050)
    peer.say(1, 2, ack=LAST)
    assert peer.transport.phase is Phase.CLOSED and peer.transport.clean
    assert peer.listen(until=9_000) == []


def test_an_ack_of_an_earlier_state_does_not_end_a_shutdown() -> None:
    peer = _connected()
    peer.transport.set_current(Note("a"), now=1_000)
    peer.listen(until=1_010)
    peer.transport.start_shutdown(now=1_010)
    peer.listen(until=1_050)
    peer.say(1, 2, ack=2)
    assert peer.transport.phase is Phase.CLOSING


def test_the_last_words_travel_with_the_shutdown() -> None:
    peer = _connected()
    peer.transport.set_current(Note("last words"), now=1_000)
    peer.transport.start_shutdown(now=1_000)
    peer.transport.set_current(Note("too late"), now=1_001)
    assert {each[1:] for each in peer.listen(until=1_200)} == {(1, LAST, 1, 1, ">last words")}


def test_a_peers_shutdown_is_acknowledged_once_then_we_are_gone() -> None:
    peer = _connected()
    peer.say(1, LAST, ">last words", ack=1)
    assert peer.transport.remote.state == Note("last words")
    assert [each[1:] for each in peer.listen(until=9_000)] == [(1, 2, LAST, 1, "")]
    assert peer.transport.phase is Phase.CLOSED and peer.transport.clean
    assert peer.transport.next_timeout() is None


def test_the_ack_of_a_shutdown_leaves_within_a_frame() -> None:
    peer = _connected(rtt_ms=100)
    peer.transport.set_current(Note("a"), now=1_000)
    sent_at = peer.listen(until=1_010)[0][0]
    peer.say(1, LAST, ack=2)
    assert peer.listen(until=2_000)[0][0] <= sent_at + 50


def test_two_shutdowns_that_cross_end_both() -> None:
    peer = _connected()
    peer.transport.start_shutdown(now=1_000)
    peer.listen(until=1_001)
    peer.say(1, LAST, ack=1)
    assert peer.listen(until=1_100)[0][1:] == (1, LAST, LAST, 1, "")
    assert peer.transport.phase is Phase.CLOSED and peer.transport.clean


def test_starting_a_shutdown_twice_changes_nothing() -> None:
    peer = _connected()
    peer.transport.start_shutdown(now=1_000)
    peer.transport.start_shutdown(now=9_000)
    assert peer.transport.sender.shutdown_at == 1_000


# -- chaff and counters


def test_chaff_blurs_the_length() -> None:
    layer = mosh.DatagramLayer(mosh.Channel(CIPHER, TO_SERVER), 0, is_server=False)
    layer.peers = [PEER]
    client: Transport = mosh.Transport(layer, Note(), Note(), 0, collect_ms=1, random_bytes=random.Random(1).randbytes)
    lengths = set()
    for now in range(0, 3_000 * 200, 3_000):
        (datagram,) = client.datagrams_to_send(now)
        _, plaintext = mosh.Channel(CIPHER, TO_CLIENT).open(datagram)
        instruction = mosh.FragmentAssembly().add(mosh.Fragment.decode(plaintext[4:]))
        assert instruction is not None
        lengths.add(len(instruction.chaff))
    assert lengths == set(range(17))


def test_what_is_counted() -> None:
    client, server = _transport(), _transport(TO_CLIENT)
    (datagram,) = client.datagrams_to_send(now=0)
    server.receive_datagram(datagram, PEER, now=0)
    with pytest.raises(mosh.PacketError):
        server.receive_datagram(b"x" * 100, PEER, now=0)
    assert (client.stats["sent"], client.stats["bytes_sent"]) == (1, len(datagram))
    assert (server.stats["received"], server.stats["dropped"]) == (1, 1)
    assert server.stats["bytes_received"] == len(datagram)


# -- laws


def _exchange(ends: dict[int, Any], wire: list[tuple[int, bytes]], now: int, kept: Iterable[tuple[int, bytes]]) -> None:
    """Deliver some datagrams, then collect what both ends have to send."""
    for direction, datagram in kept:
        with contextlib.suppress(mosh.PacketError):  # it has arrived before
            ends[1 - direction].receive_datagram(datagram, PEER, now)
    for direction, end in ends.items():
        wire += [(direction, datagram) for datagram in end.datagrams_to_send(now)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_notes_arrive_whatever_the_network_does(data: st.DataObject) -> None:
    ends = {TO_SERVER: _transport(), TO_CLIENT: _transport(TO_CLIENT, collect_ms=8)}
    wire: list[tuple[int, bytes]] = []
    now = 0
    for _ in range(data.draw(st.integers(1, 40), label="steps")):
        now += data.draw(st.sampled_from((1, 20, 150, 3_000)), label="pause")
        if data.draw(st.booleans(), label="edit"):
            direction = data.draw(st.sampled_from((TO_SERVER, TO_CLIENT)))
            ends[direction].set_current(Note(str(now)), now)
        kept = data.draw(st.lists(st.sampled_from(wire), max_size=4), label="arrive") if wire else []
        wire = wire[-20:]  # what is older is lost for good
        _exchange(ends, wire, now, kept)
    for _ in range(30):  # from now on nothing is lost
        now += 500
        arriving, wire = wire, []
        _exchange(ends, wire, now, arriving)
    assert ends[TO_CLIENT].remote.state == ends[TO_SERVER].sender.current
    assert ends[TO_SERVER].remote.state == ends[TO_CLIENT].sender.current
