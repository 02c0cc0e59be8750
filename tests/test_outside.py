"""Section 16: sockets, signals, waiting and the window size, on this machine's loopback."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mosh
import peers

WAIT_MS = 5_000


def _ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _ipv6_works(), reason="this machine has no IPv6")
FAMILIES = [
    pytest.param((socket.AF_INET, "127.0.0.1"), id="IPv4"),
    pytest.param((socket.AF_INET6, "::1"), id="IPv6", marks=needs_ipv6),
]


@pytest.fixture(params=FAMILIES)
def place(request: pytest.FixtureRequest) -> tuple[int, str]:
    """An address family and its loopback address."""
    family, host = request.param
    return family, host


@pytest.fixture
def ends(place: tuple[int, str]) -> Iterator[tuple[mosh.UdpSocket, mosh.UdpSocket, str]]:
    """Two sockets bound to loopback, and its address."""
    family, host = place
    one, other = mosh.UdpSocket(family), mosh.UdpSocket(family)
    one.bind(host, 0)
    other.bind(host, 0)
    yield one, other, host
    one.close()
    other.close()


def _received(udp: mosh.UdpSocket) -> tuple[bytes, mosh.Address, bool] | None:
    """The next datagram; None if none comes."""
    return udp.receive() if mosh.wait([udp], (), mosh.monotonic_ms() + WAIT_MS) else None


# -- UDP -------------------------------------------------------------------------------------------------------


class _Full:
    """A system's socket whose interface has no room."""

    def sendto(self, *_: object) -> None:
        """See socket.socket."""
        raise OSError(errno.ENOBUFS, "No buffer space available")


@pytest.mark.parametrize("hears_icmp", [False, True])
def test_who_hears_icmp_is_told_too_much_when_an_interface_drops_a_datagram(hears_icmp: bool) -> None:
    udp = mosh.UdpSocket(socket.AF_INET)
    udp.close()
    udp._socket, udp._hears_icmp = _Full(), hears_icmp  # type: ignore[assignment]
    with contextlib.nullcontext() if hears_icmp else pytest.raises(OSError, match="No buffer space"):
        udp.send(b"x", (peers.LOOPBACK, 9))


def test_a_datagram_arrives_with_its_source(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, other, host = ends
    one.send(b"hello", (host, other.port))
    received = _received(other)
    assert received is not None
    data, source, congested = received
    assert (data, source[0], source[1], congested) == (b"hello", host, one.port, False)
    other.send(b"back", source)
    answer = _received(one)
    assert answer is not None and answer[0] == b"back"


def test_nothing_there_is_no_error_and_does_not_wait(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    assert ends[0].receive() is None


def test_an_empty_datagram_is_one(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, other, host = ends
    one.send(b"", (host, other.port))
    received = _received(other)
    assert received is not None and received[0] == b""


def test_an_oversized_datagram_is_seen_as_such(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, other, host = ends
    one.send(bytes(9_000), (host, other.port))
    received = _received(other)
    assert received is not None and len(received[0]) > mosh.RECEIVE_LIMIT_BYTES


def test_nobody_listening_is_no_error(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, other, host = ends
    port = other.port
    other.close()
    one.send(b"into the void", (host, port))
    assert one.receive() is None
    one.send(b"again", (host, port))


def test_a_datagram_beyond_udp_raises_for_the_caller_to_judge(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, other, host = ends
    with pytest.raises(OSError):
        one.send(bytes(70_000), (host, other.port))


def test_a_port_in_use_raises(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str], place: tuple[int, str]) -> None:
    udp = mosh.UdpSocket(place[0])
    with pytest.raises(OSError):
        udp.bind(place[1], ends[0].port)
    udp.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells whose datagrams were refused")
def test_a_closed_port_is_told_and_the_socket_goes_on(place: tuple[int, str]) -> None:
    family, host = place
    udp, gone, other = (mosh.UdpSocket(family) for _ in range(3))
    udp.hear_icmp()
    for each in (gone, other):
        each.bind(host, 0)
    closed = (host, gone.port, *(0, 0)[: 2 * (family == socket.AF_INET6)])
    gone.close()
    for datagram in (b"1", b"2", b"3"):  # each but the first meets the error of the one before
        udp.send(datagram, closed)
        assert select.select([udp], [], [], 5)[0]
    udp.send(b"for somebody else", (host, other.port))
    assert select.select([other], [], [], 5)[0]
    received = other.receive()
    assert received is not None and received[0] == b"for somebody else"
    assert udp.receive() is None
    assert set(udp.icmp_errors()) == {(closed, errno.ECONNREFUSED)}
    assert udp.icmp_errors() == [] and not select.select([udp], [], [], 0)[0]
    udp.close()
    other.close()


@pytest.mark.parametrize(("mark", "congested"), [(0, False), (1, False), (2, False), (3, True), (0xFF, True)])
@pytest.mark.parametrize("bound_to", ["127.0.0.1", pytest.param("::", marks=[needs_ipv6, pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells an IPv6 socket what comes with IPv4")])])
def test_a_congestion_mark_on_ipv4_is_seen(bound_to: str, mark: int, congested: bool) -> None:
    """RFC 3168: both bits set. A socket on the IPv6 wildcard sees it too; on IPv6 itself stock does not look."""
    udp = mosh.UdpSocket(socket.AF_INET6 if ":" in bound_to else socket.AF_INET)
    udp.bind(bound_to, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, mark)
        if sender.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) & 3 != mark & 3:
            pytest.skip("this system does not let us set the mark")
        sender.sendto(b"marked", ("127.0.0.1", udp.port))
    received = _received(udp)
    udp.close()
    assert received is not None and received[2] == congested


def test_datagrams_say_that_they_may_be_marked() -> None:
    udp = mosh.UdpSocket(socket.AF_INET)
    with socket.socket(fileno=os.dup(udp.fileno())) as view:
        assert view.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) & 3 == 2
    udp.close()


@needs_ipv6
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_ipv6_wildcard_hears_both_families(family: int, host: str) -> None:
    udp, sender = mosh.UdpSocket(socket.AF_INET6), mosh.UdpSocket(family)
    udp.bind("::", 0)
    sender.send(b"hello", (host, udp.port))
    received = _received(udp)
    assert received is not None and received[0] == b"hello"
    udp.send(b"back", received[1])
    answer = _received(sender)
    assert answer is not None and answer[0] == b"back"
    udp.close()
    sender.close()


# -- signals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[mosh.Signals]:
    """Two signals to wait for."""
    signals = mosh.Signals(signal.SIGUSR1, signal.SIGUSR2)
    yield signals
    signals.close()


def test_a_signal_ends_the_wait(signals: mosh.Signals) -> None:
    assert signals.take() == set()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert mosh.wait([signals], (), mosh.monotonic_ms() + WAIT_MS) == {signals}
    assert signals.take() == {signal.SIGUSR1}
    assert signals.take() == set()


def test_several_signals_are_told_at_once(signals: mosh.Signals) -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert mosh.wait([signals], (), mosh.monotonic_ms() + WAIT_MS) == {signals}
    assert signals.take() == {signal.SIGUSR1, signal.SIGUSR2}


def test_a_flood_of_signals_blocks_nothing_and_hides_none(signals: mosh.Signals) -> None:
    for _ in range(10_000):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    assert signals.take() == {signal.SIGUSR1, signal.SIGUSR2}


def test_a_signal_that_the_parent_has_blocked_is_heard_until_it_closes() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        signals = mosh.Signals(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert mosh.wait([signals], (), mosh.monotonic_ms() + WAIT_MS) == {signals}
        signals.close()
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_closing_restores_what_was_before() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    signals = mosh.Signals(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) != before
    signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == wakeup


# -- waiting ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_a_deadline_that_has_passed_does_not_wait(pair: tuple[socket.socket, socket.socket]) -> None:
    assert mosh.wait([pair[0]], (), mosh.monotonic_ms() - 1_000) == set()


def test_it_waits_until_the_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    deadline = mosh.monotonic_ms() + 30
    assert mosh.wait([pair[0]], (), deadline) == set()
    assert mosh.monotonic_ms() >= deadline


def test_what_is_ready_is_told_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    assert mosh.wait([one, other], (), 0) == set()
    one.send(b"x")
    assert mosh.wait([one, other], (), None) == {other}
    assert mosh.wait([one], [other], None) == {other}
    assert mosh.wait([one, other], [one, other], None) == {one, other}


def test_another_set_can_be_watched_each_time(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    one.send(b"x")
    for watched in ([one], [other], [one, other], [other.fileno()]):
        ready = mosh.wait(watched, (), 0)
        assert ready == {item for item in watched if item in (other, other.fileno())}
    one.close()
    assert mosh.wait([other], (), 0) == {other}


FIRST_BEYOND_SELECT = 1024


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """More descriptors than select can watch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FIRST_BEYOND_SELECT + 10
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip("there can be no such descriptor")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if soft == resource.RLIM_INFINITY else max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_descriptors_of_any_number_can_be_waited_for(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whoever starts a session may have left a thousand files open."""
    one, other = (
        socket.socket(fileno=fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, FIRST_BEYOND_SELECT)) for each in pair
    )
    with one, other:
        assert mosh.wait([one, other], (), 0) == set()
        assert mosh.wait((), [one], None) == {one}
        one.send(b"x")
        assert mosh.wait([one, other], (), None) == {other}
        assert mosh.wait([one, other.fileno()], [other.fileno()], None) == {other.fileno()}


def test_the_clock_does_not_go_back() -> None:
    times = [mosh.monotonic_ms() for _ in range(1_000)]
    assert times == sorted(times) and all(isinstance(now, int) for now in times)


# -- terminals and descriptors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "seen"), [
    ((132, 43), (132, 43)), ((1, 1), (1, 1)), ((65535, 65535), (65535, 65535)),
    ((0, 0), (80, 24)), ((0, 24), (80, 24)), ((80, 0), (80, 24)),
])  # fmt: skip
def test_the_window_size_of_a_terminal(size: tuple[int, int], seen: tuple[int, int]) -> None:
    keeper, user = pty.openpty()
    try:
        fcntl.ioctl(user, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        assert mosh.window_size(user) == seen
    finally:
        os.close(keeper)
        os.close(user)


def test_the_window_size_of_what_is_no_terminal(pair: tuple[socket.socket, socket.socket]) -> None:
    assert mosh.window_size(pair[0].fileno()) == (80, 24)
    assert mosh.window_size(99_999) == (80, 24)


def test_everything_is_written_even_if_the_reader_is_slow(pair: tuple[socket.socket, socket.socket]) -> None:
    writer, reader = pair
    writer.setblocking(False)
    data = bytes(range(256)) * 8_000
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    with subprocess.Popen([sys.executable, "-c", code], stdin=reader.fileno(), stdout=subprocess.PIPE) as process:
        reader.close()
        mosh.write_all(writer.fileno(), data)
        writer.close()
        assert process.stdout is not None and process.stdout.read() == data


def test_a_reader_that_has_gone_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    mosh.write_all(pair[0].fileno(), b"nobody reads this")


@pytest.mark.parametrize("kind", ["file", "link", "archive"])
def test_the_program_knows_how_to_start_itself_again(kind: str, tmp_path: Path) -> None:
    """From another folder, and with a relative path."""
    path = tmp_path / "program.py"
    if kind == "link":
        path.symlink_to(peers.REPOSITORY / "mosh.py")
    elif kind == "archive":
        path = tmp_path / "program.pyz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(peers.REPOSITORY / "mosh.py", "mosh.py")
            archive.writestr("__main__.py", "import mosh, sys\nsys.exit(mosh.main())\n")
    else:
        path.write_bytes((peers.REPOSITORY / "mosh.py").read_bytes())
    code = f"import sys; sys.path.insert(0, {str(path if kind == 'archive' else path.parent)!r})\n"
    code += f"import {'mosh' if kind == 'archive' else 'program'} as mosh; print('\\0'.join(mosh.own_program()))"
    words = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    finished = subprocess.run([*words.stdout.rstrip("\n").split("\0"), "--version"], capture_output=True, text=True)
    assert (finished.returncode, mosh.__version__ in finished.stdout) == (0, True), finished.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what runs without PATH")
def test_a_python_that_does_not_know_where_it_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it was started by its name alone, and PATH is unset."""
    monkeypatch.setattr(sys, "executable", "")
    assert Path(mosh.own_python()).samefile("/proc/self/exe")


# -- answering from the address that was asked -----------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has all of 127.0.0.0/8")
@pytest.mark.parametrize("bound_to", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
@pytest.mark.parametrize("asked", ["127.0.0.1", "127.0.0.2", "127.255.0.9"])
def test_a_socket_on_any_address_answers_from_the_one_that_was_asked(bound_to: str, asked: str) -> None:
    udp = mosh.UdpSocket(socket.AF_INET6 if ":" in bound_to else socket.AF_INET)
    udp.bind(bound_to, 0)
    client = mosh.UdpSocket(socket.AF_INET)
    client.send(b"hello", (asked, udp.port))
    received = _received(udp)
    assert received is not None and received[2] is False
    udp.send(b"back", received[1])
    answer = _received(client)
    assert answer is not None and answer[:2] == (b"back", (asked, udp.port))
    udp.close()
    client.close()


class _MacSocket:
    """A socket whose system names the target of a datagram and leaves our address to us."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recvmsg(self, *sizes: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        data, ancillary, flags, source = self._real.recvmsg(*sizes)
        return data, [
            (level, kind, value[:4] + bytes(4) + value[8:] if len(value) == mosh._PKTINFO_4.size else value)
            for level, kind, value in ancillary
        ], flags, source


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has all of 127.0.0.0/8")
def test_the_target_of_a_datagram_serves_where_the_system_tells_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    udp, client = mosh.UdpSocket(socket.AF_INET), mosh.UdpSocket(socket.AF_INET)
    udp.bind("0.0.0.0", 0)
    monkeypatch.setattr(udp, "_socket", _MacSocket(udp._socket))
    client.send(b"hello", ("127.0.0.2", udp.port))
    received = _received(udp)
    assert received is not None
    udp.send(b"back", received[1])
    answer = _received(client)
    assert answer is not None and answer[:2] == (b"back", ("127.0.0.2", udp.port))
    udp.close()
    client.close()


@needs_ipv6
def test_the_same_on_ipv6_and_two_questions_to_different_addresses_are_told_apart() -> None:
    udp, client = mosh.UdpSocket(socket.AF_INET6), mosh.UdpSocket(socket.AF_INET6)
    udp.bind("::", 0)
    client.send(b"hello", ("::1", udp.port))
    received = _received(udp)
    assert received is not None and received[1][-1] is not None
    udp.send(b"back", received[1])
    answer = _received(client)
    assert answer is not None and answer[1][:2] == ("::1", udp.port)
    udp.close()
    client.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the numbers are Linux's")
def test_an_answer_leaves_from_another_address_if_the_one_asked_has_gone() -> None:
    udp, client = mosh.UdpSocket(socket.AF_INET), mosh.UdpSocket(socket.AF_INET)
    udp.bind("0.0.0.0", 0)
    client.send(b"hello", ("127.0.0.1", udp.port))
    received = _received(udp)
    assert received is not None
    asked = received[1]
    assert isinstance(asked, mosh.PeerAddress) and asked.arrived_at is not None and asked == tuple(asked)
    gone = socket.IPPROTO_IP, asked.arrived_at[1], mosh._PKTINFO_4.pack(0, socket.inet_aton("198.51.100.99"), b"")
    asked.arrived_at = gone
    udp.send(b"back", asked)
    udp.send(b"again", tuple(asked))
    assert [answer[0] for answer in (_received(client), _received(client)) if answer] == [b"back", b"again"]
    udp.close()
    client.close()


# -- what a refusal to send means ------------------------------------------------------------------------------

REFUSALS = [
    (errno.EMSGSIZE, mosh.SendFailure.TOO_BIG), (errno.ENETUNREACH, mosh.SendFailure.NO_PATH),
    (errno.EHOSTUNREACH, mosh.SendFailure.NO_PATH), (errno.ENETDOWN, mosh.SendFailure.NO_PATH),
    (errno.EADDRNOTAVAIL, mosh.SendFailure.NO_PATH), (errno.ENOBUFS, mosh.SendFailure.LOST),
    (errno.EAGAIN, mosh.SendFailure.LOST), (errno.ECONNREFUSED, mosh.SendFailure.LOST),
    (errno.EPERM, mosh.SendFailure.REFUSED), (errno.EMFILE, mosh.SendFailure.REFUSED),
]  # fmt: skip


@pytest.mark.parametrize(("number", "meaning"), REFUSALS)
def test_each_refusal_has_one_meaning(number: int, meaning: mosh.SendFailure) -> None:
    assert mosh.send_failure(OSError(number, os.strerror(number))) is meaning


def test_an_error_without_a_number_is_for_the_user_to_read() -> None:
    assert mosh.send_failure(OSError("no number")) is mosh.SendFailure.REFUSED


def test_real_refusals_are_understood(ends: tuple[mosh.UdpSocket, mosh.UdpSocket, str]) -> None:
    one, _, host = ends
    with pytest.raises(OSError) as too_big:
        one.send(bytes(70_000), (host, 9))
    assert mosh.send_failure(too_big.value) is mosh.SendFailure.TOO_BIG


# -- another network -------------------------------------------------------------------------------------------

TARGETS = [(socket.AF_INET, ("192.0.2.1", 60001)), (socket.AF_INET6, ("2001:db8::1", 60001, 0, 0))]


class World:
    """What the system would tell a NetworkWatch; tests change it."""

    def __init__(self) -> None:
        self.sources = {socket.AF_INET: "10.0.0.1", socket.AF_INET6: ""}
        self.slept_ms = 5_000

    def local_address(self, family: int, _: mosh.Address) -> str:
        """The address to send from."""
        return self.sources[socket.AddressFamily(family)]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A world that only tests change."""
    world = World()
    monkeypatch.setattr(mosh, "local_address", world.local_address)
    monkeypatch.setattr(mosh, "_slept_ms", lambda: world.slept_ms)
    return world


@pytest.fixture
def watch(world: World) -> Iterator[mosh.NetworkWatch]:
    """A watch that has looked around at 0."""
    assert world.slept_ms
    watch = mosh.NetworkWatch(0)
    assert not watch.changed(TARGETS, (), 0)
    yield watch
    watch.close()


def test_nothing_has_changed_while_datagrams_leave_from_where_they_did(watch: mosh.NetworkWatch) -> None:
    assert not any(watch.changed(TARGETS, watch.readable(), now) for now in range(0, 20_000, 70))


def test_while_the_kernel_tells_of_changes_it_looks_at_nothing_else(watch: mosh.NetworkWatch, world: World) -> None:
    if not watch.readable():
        pytest.skip("this system tells nothing")
    world.sources[socket.AF_INET] = "10.9.9.9"
    assert not any(watch.changed(TARGETS, (), now) for now in range(0, 10_000, 100))


def test_a_notice_of_the_kernel_makes_it_look_soon_but_not_for_each(watch: mosh.NetworkWatch, world: World) -> None:
    if not watch.readable():
        pytest.skip("this system tells nothing")
    world.sources[socket.AF_INET] = "10.9.9.9"
    notice = watch.readable()
    assert not watch.changed(TARGETS, notice, 10)
    assert watch.readable() == [] and watch.next_timeout() == 10 + mosh.NOTICE_MS
    assert not watch.changed(TARGETS, (), 9 + mosh.NOTICE_MS)
    assert watch.changed(TARGETS, (), 10 + mosh.NOTICE_MS)
    assert watch.readable() == notice and watch.next_timeout() is None


@pytest.mark.parametrize(("kinds", "looks"), [
    ([0x07], False), ([0x07] * 3, False), ([0x07, 0x0C], True), ([0x0C, 0x07], True), ([0x0E], True), ([], True),
])  # fmt: skip
def test_a_lookup_that_failed_is_no_notice_since_offline_each_look_is_one(
    world: World, monkeypatch: pytest.MonkeyPatch, kinds: list[int], looks: bool
) -> None:
    """What a routing socket of the BSDs tells: struct rt_msghdr begins with length, version and kind."""
    assert world.sources
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    monkeypatch.setattr(mosh.NetworkWatch, "_kernel_notices", staticmethod(lambda: ours))
    watch = mosh.NetworkWatch(0)
    for kind in kinds:
        kernel.send(struct.pack("=HBB", 92, 5, kind) + bytes(88))
    assert not watch.changed(TARGETS, watch.readable(), 10)
    assert watch.next_timeout() == (10 + mosh.NOTICE_MS if looks else None)
    assert not mosh.wait([ours], (), 0)
    watch.close()
    kernel.close()


def test_a_new_target_is_no_other_network(watch: mosh.NetworkWatch) -> None:
    more = [*TARGETS, (socket.AF_INET, ("192.0.2.7", 60001))]
    assert not any(watch.changed(more, watch.readable(), now) for now in range(0, 5_000, 100))


def test_a_machine_that_has_slept_may_be_anywhere(watch: mosh.NetworkWatch, world: World) -> None:
    world.slept_ms += mosh.SLEEP_MS
    assert not watch.changed(TARGETS, (), 1)
    world.slept_ms += mosh.SLEEP_MS + 1
    assert watch.changed(TARGETS, (), 2) and not watch.changed(TARGETS, (), 3)


@pytest.mark.parametrize(("family", "source"), [
    (socket.AF_INET, "10.9.9.9"), (socket.AF_INET, ""), (socket.AF_INET6, "2001:db8::5"),
])  # fmt: skip
def test_without_notices_it_looks_now_and_then_and_tells_of_another_source_once(
    world: World, monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, source: str
) -> None:
    monkeypatch.setattr(mosh.NetworkWatch, "_kernel_notices", staticmethod(lambda: None))
    watch = mosh.NetworkWatch(0)
    assert watch.readable() == [] and not watch.changed(TARGETS, (), 0)
    world.sources[family] = source
    told = [now for now in range(0, 10_000, 100) if watch.changed(TARGETS, (), now)]
    assert told == [mosh.LOOK_MS]
    watch.close()


def test_where_a_datagram_would_leave_from() -> None:
    assert mosh.local_address(socket.AF_INET, ("127.0.0.1", 60001)) == "127.0.0.1"
    assert mosh.local_address(socket.AF_INET6, ("fe80::1", 60001, 0, 99_999)) == ""
