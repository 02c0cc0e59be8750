"""Sessions over a bad link: a relay between client and server takes the network away, moves it and slows it down."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import peers
from conftest import Stage, require, require_kind
from peers import PAIRS, Pair, pause
from relay import Relay
from tmux import Snapshot, Terminal

pytestmark = pytest.mark.live

BLACKOUT_SECONDS = 20.0
RECOVERY_SECONDS = 40.0         # the link may be found again only at the next heartbeat or port hop
IDLE_SECONDS = 0.5
MAX_DATAGRAM_BYTES = 1252       # the most that either end may send over IPv4
SMALL_PATH_BYTES = 600 - 28     # what an IPv4 packet of 600 bytes carries
PATIENCE_SECONDS = 12.0         # for what must come, and before saying that it does not
# What is typed goes into a file, so that every byte the server delivered can be counted.
RECORDER = ("sh", "-c", "echo ready; exec cat >typed")
SILENT_RECORDER = ("sh", "-c", "stty -echo; echo ready; exec cat >typed")


@contextmanager
def relayed_session(
    pair: Pair, home: Path, *, command: Sequence[str] = RECORDER, delay_ms: float = 0.0, height: int = 24
) -> Iterator[tuple[Terminal, Relay]]:
    """A client in a terminal, a relay, and a command on the far side that says `ready`."""
    env = peers.session_env(home)
    with ExitStack() as resources:
        server = resources.enter_context(peers.running_server(pair.server, env, command=command))
        relay = resources.enter_context(Relay(server.port, delay_ms=delay_ms))
        client = peers.client_command(pair.client, relay.port)
        terminal = resources.enter_context(Terminal(client, env={**env, "MOSH_KEY": server.key}, height=height))
        terminal.wait_for("ready")
        yield terminal, relay


def written(home: Path) -> str:
    """What the recorder has received so far."""
    return (home / "typed").read_text(encoding="utf-8")


def wait_written(home: Path, expected: str) -> None:
    """Wait until the recorder has received exactly this."""
    try:
        peers.wait_until(lambda: written(home) == expected, RECOVERY_SECONDS, repr(expected))
    except TimeoutError as late:
        raise TimeoutError(f"{late}; the server has written {written(home)!r}") from None


def wait_idle(relay: Relay) -> None:
    """Wait until the link has carried nothing for a moment, so that every key has been confirmed."""
    passed, since = -1, time.monotonic()
    deadline = since + RECOVERY_SECONDS
    while time.monotonic() - since < IDLE_SECONDS and time.monotonic() < deadline:
        pause()
        count = sum(lane.received + lane.sent for lane in relay.lanes)
        if count != passed:
            passed, since = count, time.monotonic()


def line_shows(wanted: str, snapshot: Snapshot) -> bool:
    """Whether a row is just this text and the cursor stands behind it."""
    return wanted in snapshot.rows and snapshot.cursor == (snapshot.rows.index(wanted), len(wanted))


# -- stories ---------------------------------------------------------------------------------------------------


def type_through_a_blackout(pair: Pair, home: Path) -> None:
    """Type before, during and after a blackout in which the client also moves to another address and port."""
    during = "while nothing gets through "
    with relayed_session(pair, home, delay_ms=20) as (terminal, relay):
        terminal.type("before it ")
        terminal.wait_for("before it")
        left = relay.server_side_address
        relay.set_blackout(True)
        began = time.monotonic()
        for number, key in enumerate(during):
            terminal.type(key)
            if number == len(during) // 2:
                assert relay.rebind() != left
            pause(BLACKOUT_SECONDS / len(during))
        terminal.wait_for("mosh: Last contact")
        pause(max(0.0, began + BLACKOUT_SECONDS - time.monotonic()))
        assert relay.up.lost > 0
        relay.set_blackout(False)
        terminal.type("after it\n")
        expected = f"before it {during}after it\n"
        wait_written(home, expected)
        shown = terminal.wait_settled(lambda snapshot: "mosh:" not in snapshot.text, RECOVERY_SECONDS)
        assert shown.text.split() == ["ready", *expected.split()]
        terminal.press("C-d")
        assert terminal.exit_status() == 0
        assert written(home) == expected


def roam_at_every_word(pair: Pair, home: Path) -> None:
    """Change the address again and again while datagrams are lost, doubled and overtaken by others."""
    text = "she sells sea shells "
    with relayed_session(pair, home, delay_ms=20) as (terminal, relay):
        for lane in relay.lanes:
            lane.loss, lane.duplicate, lane.reorder = 0.25, 0.25, 0.25
        for word in text.split():
            relay.rebind()
            terminal.type(word + " ")
            pause(0.2)
        terminal.type("\n")
        wait_written(home, text + "\n")
        terminal.wait_settled(lambda snapshot: snapshot.text.split() == ["ready", *text.split()], RECOVERY_SECONDS)


def predict_while_replies_are_held_back(pair: Pair, home: Path) -> float:
    """At RTT 500 keys show although no reply can have come. Returns the seconds from the keys to the screen."""
    with relayed_session(pair, home, delay_ms=250) as (terminal, relay):
        terminal.type("ab")
        terminal.wait_for("ab")
        wait_idle(relay)        # the first keys after a start are shown only once the server has echoed them
        relay.down.blackout = True
        began = time.monotonic()
        terminal.type("cdef")
        terminal.wait_for(lambda snapshot: line_shows("abcdef", snapshot))
        seconds = time.monotonic() - began
        terminal.press("BSpace", "BSpace")
        terminal.wait_for(lambda snapshot: line_shows("abcd", snapshot))
        relay.down.blackout = False
        terminal.type("!\n")
        wait_written(home, "abcd!\n")
        terminal.wait_settled(lambda snapshot: "abcd!" in snapshot.colored_rows, RECOVERY_SECONDS)
        return seconds


def type_a_password(pair: Pair, home: Path) -> None:
    """At RTT 500, where keys are predicted, those that the program does not echo must never show."""
    with relayed_session(pair, home, command=SILENT_RECORDER, delay_ms=250) as (terminal, relay):
        for key in "secret":
            terminal.type(key)
            for _ in range(5):
                assert terminal.snapshot().text.split() == ["ready"]
                pause()
        terminal.press("Enter")
        wait_written(home, "secret\n")
        wait_idle(relay)
        assert terminal.snapshot().text.split() == ["ready"]


def fill_the_screen_through_a_tunnel(pair: Pair, home: Path) -> None:
    """Screens that do not compress pass a link that carries no larger datagrams than either end may send."""
    noise = ("sh", "-c", "echo ready; read go; head -c 2000 /dev/urandom | od -An -tx1 -v; echo finished; cat")
    with relayed_session(pair, home, command=noise, height=150) as (terminal, relay):
        for lane in relay.lanes:
            lane.mtu_bytes = MAX_DATAGRAM_BYTES
        terminal.press("Enter")
        terminal.wait_for("finished")
        terminal.press("Enter")
        terminal.wait_settled(lambda snapshot: snapshot.cursor[1] == 0, RECOVERY_SECONDS)
        assert relay.down.sent_bytes > 2 * MAX_DATAGRAM_BYTES, "no screen was sent that needs more than one datagram"
        assert relay.up.lost == relay.down.lost == 0


def send_much_through_a_black_hole(pair: Pair, home: Path) -> tuple[bool, bool]:
    """On a path that silently drops packets above 600 bytes, paste much and show much.

    Returns whether the paste arrived and whether the screen was shown.
    """
    noise = "head -c 700 /dev/urandom | od -An -tx1 -v"
    command = ("sh", "-c", f"stty -echo; echo ready; head -n 1 >typed; {noise}; echo finished; cat")
    line = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=3_000)) + "\n"
    with relayed_session(pair, home, command=command, height=60) as (terminal, relay):
        wait_idle(relay)
        for lane in relay.lanes:
            lane.mtu_bytes = SMALL_PATH_BYTES
        terminal.type(line)
        pasted = _comes_true(lambda: written(home) == line)
        if not pasted:
            relay.up.mtu_bytes = None       # so that the other direction has its turn
            wait_written(home, line)
        shown = _comes_true(lambda: "finished" in terminal.snapshot().text)
        print(f"{pair}: paste {pasted}, {relay.up.lost} lost; screen {shown}, {relay.down.lost} lost")
        return pasted, shown


def _comes_true(condition: Callable[[], bool]) -> bool:
    try:
        peers.wait_until(condition, PATIENCE_SECONDS, "it")
    except TimeoutError:
        return False
    return True


# -- tests -----------------------------------------------------------------------------------------------------

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


def ready_for(pair: Pair) -> None:
    """Make sure that everything a story needs is there."""
    require("tmux")
    require_kind(pair.client, pair.server, "stock")


@pytest.mark.long
@each_pair
def test_a_blackout_with_a_change_of_address_loses_no_key(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(type_through_a_blackout, pair)


@each_pair
def test_roaming_on_a_terrible_link_neither_loses_nor_doubles_keys(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(roam_at_every_word, pair)


@each_pair
def test_a_key_is_shown_before_the_server_can_answer(
    pair: Pair, stage: Stage, record_property: Callable[[str, object], None]
) -> None:
    ready_for(pair)
    seconds = stage.play(predict_while_replies_are_held_back, pair)
    record_property("seconds from keys to screen", round(seconds, 3))
    print(f"{pair}: keys on the screen after {seconds * 1_000:.0f} ms, while no reply could come")


@each_pair
def test_a_password_is_never_predicted(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(type_a_password, pair)


@each_pair
def test_no_datagram_is_larger_than_a_tunnel_carries(pair: Pair, stage: Stage) -> None:
    ready_for(pair)
    stage.play(fill_the_screen_through_a_tunnel, pair)


@pytest.mark.long
@each_pair
def test_a_path_that_drops_large_packets_stops_neither_direction_of_ours(pair: Pair, stage: Stage) -> None:
    """Stock mosh stops there: it needs the network to refuse a packet, and most do not say a word."""
    ready_for(pair)
    pasted, shown = stage.play(send_much_through_a_black_hole, pair)
    assert pasted or pair.client == "stock"
    assert shown or pair.server == "stock"
