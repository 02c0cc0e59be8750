"""Sessions over a bad link: a relay between client and server takes the network away, moves it and slows it down.

And sessions across networks: in namespaces the client changes its address and its family, and the server its address.
"""

from __future__ import annotations

import random
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import mosh
import netns
import peers
from conftest import Stage, require, require_kind
from netns import OTHER_SERVER_4, SERVER_4, SERVER_6, Networks, Watcher
from peers import PAIRS, Pair, pause
from ptys import PtyProcess, on_a_terminal
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


def paste_into_a_short_queue(pair: Pair, home: Path) -> bool:
    """Paste more than the queue of a slow path holds while a program keeps writing. Returns whether it arrived."""
    clock = "for tick in $(seq 60); do echo $tick; sleep 0.5; done"
    command = ("sh", "-c", f"stty -echo -icanon; echo ready; {clock} & exec cat >typed")
    pieces = ["".join(random.Random(n).choices(string.ascii_letters + string.digits, k=4_000)) for n in range(12)]
    with relayed_session(pair, home, command=command, delay_ms=50) as (terminal, relay):
        for lane in relay.lanes:
            lane.rate_bytes_per_s, lane.buffer_ms = 125_000, 128
        relay.up.blackout = True        # so that all of it is there at once
        for piece in pieces:
            terminal.type(piece)
        relay.up.blackout = False
        pasted = _comes_true(lambda: written(home) == "".join(pieces))
        print(f"{pair}: paste {pasted}, {relay.up.received_bytes} bytes sent, {relay.up.lost} datagrams lost")
        return pasted


def _comes_true(condition: Callable[[], bool]) -> bool:
    try:
        peers.wait_until(condition, PATIENCE_SECONDS, "it")
    except TimeoutError:
        return False
    return True


# -- across networks -------------------------------------------------------------------------------------------

SERVER_NAME = "server.test"
OUTAGE_SECONDS = 2.0
QUIT = b"\x1e."


class Traveller:
    """A client that types while its machine moves, and what it took to be heard again."""

    def __init__(self, networks: Networks, client: PtyProcess, watcher: Watcher, home: Path) -> None:
        self.networks = networks
        self.client = client
        self.watcher = watcher
        self.typed = ""
        self.timings: list[str] = []
        self._home = home

    def type(self, text: str, seconds: float = 0.0) -> None:
        """Type, spread over so much time."""
        for key in text:
            self.client.type(key.encode())
            self.typed += key
            pause(seconds / len(text))

    def expect_all(self, since: float, what: str, dead: Collection[str] = ()) -> None:
        """Wait until the screen shows all that was typed, and note how long that took; `dead`: addresses."""
        self.wait_shown()
        shown_at = time.monotonic()
        first = self.watcher.wait_first(since, dead)
        self.timings.append(f"{what}: {1000 * (shown_at - first.at):.0f} ms after the first datagram,"
                            f" {1000 * (shown_at - since):.0f} ms after the move")  # fmt: skip
        assert written(self._home) == self.typed

    def wait_shown(self) -> None:
        """Wait until the screen shows all that was typed."""

        def shown(output: bytes) -> bool:
            terminal = mosh.Emulator(80, 24)
            terminal.feed(output)
            return any(line.rstrip() == self.typed.rstrip() for line in terminal.framebuffer.lines())

        self.client.read_until(shown)

    def move(
        self, leave: Callable[[], None], arrive: Callable[[], None], word: str, what: str, dead: Collection[str] = ()
    ) -> None:
        """Type, leave, type on, arrive elsewhere, and wait until all of it is there though nothing more is typed."""
        self.type(word[:2], 0.1)
        leave()
        self.type(word[2:], 0.1)
        since = time.monotonic()
        arrive()
        self.expect_all(since, what, dead)


@contextmanager
def across_networks(pair: Pair, home: Path, families: str = "4", host: str = "") -> Iterator[Traveller]:
    """A client on link 0 of two machines; ours knows its server by name, stock's by address, or both by `host`."""
    env = {**peers.session_env(home), "MOSH_PREDICTION_DISPLAY": "never", "TERM": "xterm-256color"}
    recorder = ("sh", "-c", "stty -icanon; echo ready; exec cat >typed")
    with ExitStack() as resources:
        networks = resources.enter_context(Networks())
        networks.plug_in(0, families)
        networks.name_server(SERVER_NAME, SERVER_4, SERVER_6)
        there = networks.words(networks.server)
        server = resources.enter_context(
            peers.running_server(pair.server, env, "-i", "::", command=recorder, prefix=there)
        )
        command = peers.client_command(pair.client, server.port, host=host or SERVER_4)
        if pair.client == "ours" and not host:
            ssh = home / "ssh"  # a login that has nothing to do any more
            ssh.write_text(f'#!/bin/sh\n[ "$1" = -G ] && exec echo hostname {SERVER_NAME}\n'
                           f'echo "$MOSH_TOKEN SERVER it"; echo "$MOSH_TOKEN ADDRESS 10.0.0.1 50000 {SERVER_4} 22"\n'
                           f"echo MOSH CONNECT {server.port} {server.key}\n")  # fmt: skip
            ssh.chmod(0o700)
            command = [*peers.ours_command(), f"--ssh={shlex.quote(str(ssh))}", SERVER_NAME]
        watcher = resources.enter_context(networks.watching(server.port))
        client = resources.enter_context(
            on_a_terminal(networks.words(networks.client, *command), {**env, "MOSH_KEY": server.key})
        )
        client.read_until(lambda output: b"ready" in output)
        yield Traveller(networks, client, watcher, home)
        client.type(QUIT)
        assert client.wait() == 0
        asked = {(one.source, one.target) for one in watcher.seen() if one.up}
        answered = {(one.target, one.source) for one in watcher.seen() if not one.up}
        if pair.server == "ours" and OTHER_SERVER_4 not in {target for _, target in asked}:
            assert answered <= asked  # it answers from the address that was asked, though it has several


def move_to_another_address(pair: Pair, home: Path) -> list[str]:
    """The network is gone for a while; then there is another one, with another address."""
    with across_networks(pair, home) as traveller:
        networks = traveller.networks
        traveller.type("home", 0.2)
        networks.unplug(0)
        traveller.type("dark", OUTAGE_SECONDS)
        since = time.monotonic()
        networks.plug_in(1, "4", host=7)
        traveller.expect_all(since, "another address")
        sources = {one.source for one in traveller.watcher.seen() if one.up}
        assert sources == {"10.0.0.1", "10.0.1.7"}
        return traveller.timings


def move_between_families(pair: Pair, home: Path) -> list[str]:
    """From IPv4 to a network that has only IPv6, and back, without a pause in the typing."""
    if pair.client == "stock":
        return []  # it knows one address
    with across_networks(pair, home) as traveller:
        networks = traveller.networks
        traveller.move(lambda: networks.unplug(0), lambda: networks.plug_in(1, "6"), "thither ", "IPv4 to IPv6")
        traveller.move(lambda: networks.unplug(1), lambda: networks.plug_in(0, "4"), "hither ", "IPv6 to IPv4")
        return traveller.timings


def follow_a_server_that_moves(pair: Pair, home: Path) -> list[str]:
    """The server's machine gets another address, and its name means that one.

    The server itself speaks up from the address that it has on the link; whichever the client knows first will do.
    """
    if pair.client == "stock":
        return []  # it knows one address
    with across_networks(pair, home) as traveller:
        networks = traveller.networks
        leave = [f"addr del {SERVER_4}/32 dev lo", f"addr del {SERVER_6}/128 dev lo", f"route add blackhole {SERVER_4}"]

        def arrive() -> None:
            networks.on_server(f"addr add {OTHER_SERVER_4}/32 dev lo")
            networks.name_server(SERVER_NAME, OTHER_SERVER_4)

        traveller.move(
            lambda: networks.on_server(*leave), arrive, "follow", "another server address",
            dead=(SERVER_4, SERVER_6),
        )  # fmt: skip
        for key in "stay":      # where answers come from elsewhere, one key after the other finds where to send
            traveller.type(key)
            traveller.wait_shown()
        return traveller.timings


def wake_up_elsewhere(pair: Pair, home: Path) -> list[str]:
    """The client is stopped, as by a suspended machine, and goes on in another network."""
    with across_networks(pair, home) as traveller:
        networks, client = traveller.networks, traveller.client
        traveller.type("home", 0.2)
        traveller.wait_shown()
        client.send_signal(signal.SIGSTOP)
        networks.unplug(0)
        networks.plug_in(1, "4")
        pause(OUTAGE_SECONDS)
        woken_at = time.monotonic()
        client.send_signal(signal.SIGCONT)
        first = traveller.watcher.wait_first(woken_at)
        client.type(b"back")
        traveller.typed += "back"
        traveller.expect_all(woken_at, "woken up elsewhere")
        assert first.source == "10.0.1.1"
        return traveller.timings


def reach_a_neighbour_by_scope(pair: Pair, home: Path) -> list[str]:
    """A link-local address of IPv6 needs the interface named with it."""
    with across_networks(pair, home, "6", host="fe80::254%link0") as traveller:
        traveller.type("neighbour", 0.1)
        traveller.wait_shown()
        assert {one.source for one in traveller.watcher.seen() if one.up} == {"fe80::1"}
        return ["reached"]


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


@pytest.mark.long
@each_pair
def test_a_paste_larger_than_the_queue_of_a_slow_path_arrives_from_our_client(pair: Pair, stage: Stage) -> None:
    """With stock mosh always the same fragments are lost."""
    ready_for(pair)
    assert stage.play(paste_into_a_short_queue, pair) or pair.client == "stock"


needs_namespaces = pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable() or "there are namespaces")
JOURNEYS = [
    move_to_another_address, move_between_families, follow_a_server_that_moves, wake_up_elsewhere,
    reach_a_neighbour_by_scope,
]  # fmt: skip


# On a machine with two ways out, IPv4 alone: prints whether the watch tells that the first one has gone.
LOSE_A_WAY = """
import pathlib, socket, subprocess, sys, mosh
def ip(*lines):
    subprocess.run(["ip", "-batch", "-"], input="\\n".join(lines) + "\\n", text=True, check=True)
for path in pathlib.Path("/proc/sys/net/ipv6/conf").glob("link?/disable_ipv6"):
    path.write_text("1")
ip("link set link0 up", "addr add 10.0.0.1/24 dev link0", "link set link1 up", "addr add 10.0.1.1/24 dev link1",
   "route add default via 10.0.0.254", "route add default via 10.0.1.254 metric 9",
   "route add default via 10.0.1.254 table 77")
targets = [(socket.AF_INET, ("192.0.2.1", 60001))]
watch = mosh.NetworkWatch(0)
assert not watch.changed(targets, (), 0)
ip(sys.argv[1])
ready = mosh.wait(watch.readable(), (), mosh.monotonic_ms() + 5_000)
print(watch.changed(targets, ready, 0), watch.changed(targets, (), mosh.NOTICE_MS))
"""


@needs_namespaces
@pytest.mark.parametrize("loss", [
    "link set link0 down", "addr del 10.0.0.1/24 dev link0", "route del default via 10.0.0.254",
    "rule add to 192.0.2.0/24 table 77",
])  # fmt: skip
def test_the_kernel_tells_of_each_way_to_lose_a_way_out(loss: str) -> None:
    with Networks() as networks:
        words = networks.words(networks.client, sys.executable, "-c", LOSE_A_WAY, loss)
        finished = subprocess.run(words, cwd=peers.REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (finished.stdout, finished.stderr) == ("False True\n", "")


@needs_namespaces
@each_pair
@pytest.mark.parametrize("journey", JOURNEYS, ids=lambda journey: journey.__name__)
def test_no_key_is_lost_or_doubled_on_a_journey(
    pair: Pair, journey: Callable[[Pair, Path], list[str]], stage: Stage
) -> None:
    """Every byte the recorder has written is compared, and the time it took is printed."""
    require_kind(pair.client, pair.server)
    for timing in stage.play(journey, pair) or pytest.skip("a stock client stays with the address it was given"):
        print(f"{pair}: {timing}")
