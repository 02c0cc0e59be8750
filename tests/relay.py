"""A bad network on loopback: a UDP relay in a thread, with delay, loss, roaming and everything else a link does.

    client  <--- front socket --->  relay  <--- back socket --->  server

The client is told the relay's `port`; the server sees the back socket, whose address `rebind` changes. Each
direction is a `Lane` with settings of its own, which may be changed at any time, and with counters. Chance comes
from one seed. Every queue is bounded, and `close` ends the thread.
"""

from __future__ import annotations

import heapq
import random
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

LOOPBACK = "127.0.0.1"
MAX_DATAGRAM = 65_535
QUEUE_DATAGRAMS = 20_000        # per lane; more are dropped, as a full router would
BURST_DATAGRAMS = 64            # read at most this many from one socket before looking at the clock again
REORDER_EXTRA_MS = 30.0         # a reordered datagram is late by this much, so that others overtake it

Address = tuple[str, int]


@dataclass
class Lane:
    """One direction of the link: what it does to datagrams and what has passed."""

    delay_ms: float = 0.0
    loss: float = 0.0                       # chances, 0..1
    duplicate: float = 0.0
    reorder: float = 0.0
    blackout: bool = False                  # nothing enters, and what is under way is lost
    mtu_bytes: int | None = None            # UDP payloads above this vanish
    rate_bytes_per_s: float | None = None   # a slow link, with a buffer in front of it
    buffer_ms: float = 1_000.0              # datagrams that would wait longer than this in the buffer are lost

    received: int = 0                       # datagrams and bytes that arrived at the relay
    received_bytes: int = 0
    sent: int = 0                           # and that left it
    sent_bytes: int = 0
    lost: int = 0

    queue: list[tuple[float, int, bytes]] = field(default_factory=list, repr=False)
    line_free_at: float = 0.0

    def accept(self, data: bytes, now: float, chance: random.Random, serial: int) -> None:
        """Take one datagram in, or lose it."""
        self.received += 1
        self.received_bytes += len(data)
        too_large = self.mtu_bytes is not None and len(data) > self.mtu_bytes
        if self.blackout or too_large or chance.random() < self.loss or len(self.queue) >= QUEUE_DATAGRAMS:
            self.lost += 1
            return
        leaves_at = now
        if self.rate_bytes_per_s is not None:
            starts_at = max(now, self.line_free_at)
            if (starts_at - now) * 1_000 > self.buffer_ms:
                self.lost += 1
                return
            leaves_at = self.line_free_at = starts_at + len(data) / self.rate_bytes_per_s
        due = leaves_at + self.delay_ms / 1_000
        if chance.random() < self.reorder:
            due += REORDER_EXTRA_MS / 1_000
        heapq.heappush(self.queue, (due, serial, data))
        if chance.random() < self.duplicate:
            heapq.heappush(self.queue, (due, serial + 1, data))

    def take_due(self, now: float) -> list[bytes]:
        """The datagrams whose time has come, in order."""
        taken = []
        while self.queue and self.queue[0][0] <= now:
            data = heapq.heappop(self.queue)[2]
            if self.blackout:
                self.lost += 1
            else:
                taken.append(data)
        return taken


class Relay:
    """A link between one client and one server. Use it in a `with` block, or call `close`."""

    def __init__(self, server_port: int, *, seed: int = 1, delay_ms: float) -> None:
        """Start relaying to the server; the client connects to `host` and `port`. `delay_ms` is one way."""
        self.host = LOOPBACK
        self.up = Lane(delay_ms=delay_ms)           # client to server
        self.down = Lane(delay_ms=delay_ms)         # server to client
        self.seed = seed
        self._server: Address = (LOOPBACK, server_port)
        self._client: Address | None = None         # the newest source: a client may change its port
        self._chance = random.Random(seed)
        self._serial = 0
        self._lock = threading.RLock()
        self._stopping = False
        self._house = 1                             # last number of the back socket's 127.0.0.x
        self._selector = selectors.DefaultSelector()
        self._front = _bound_socket(LOOPBACK)
        self._back = _bound_socket(LOOPBACK)
        self._waker, self._wakee = socket.socketpair()
        for sock in (self._front, self._back, self._wakee):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self.port: int = self._front.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name=f"relay-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close every socket. Calling it again is harmless."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._wake()
        self._thread.join(timeout=10)
        for sock in (self._front, self._back, self._waker, self._wakee):
            sock.close()
        self._selector.close()

    # -- the weather -------------------------------------------------------------------------------------------

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Both directions, to set something for each."""
        return self.up, self.down

    def set_blackout(self, on: bool) -> None:
        """Cut or mend both directions."""
        with self._lock:
            for lane in self.lanes:
                lane.blackout = on

    def rebind(self) -> Address:
        """Let the server see the client at a new address and port; the old ones are gone. Returns the new ones."""
        with self._lock:
            self._house = self._house % 250 + 1
            try:
                fresh = _bound_socket(f"127.0.0.{self._house}")
            except OSError:                         # a system with only one loopback address: the port must do
                fresh = _bound_socket(LOOPBACK)
            fresh.setblocking(False)
            old, self._back = self._back, fresh
            self._selector.unregister(old)
            old.close()
            self._selector.register(fresh, selectors.EVENT_READ)
            address = fresh.getsockname()
        self._wake()
        return str(address[0]), int(address[1])

    @property
    def server_side_address(self) -> Address:
        """Where the server sees the client."""
        with self._lock:
            address = self._back.getsockname()
        return str(address[0]), int(address[1])

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            ready = self._selector.select(self._seconds_to_next())
            with self._lock:
                if self._stopping:
                    return
                sockets = [key.fileobj for key, _ in ready]
                if self._wakee in sockets:
                    self._wakee.recv(4096)
                if self._front in sockets:
                    self._read(self._front, self.up)
                if self._back in sockets:
                    self._read(self._back, self.down)
                self._deliver()

    def _seconds_to_next(self) -> float | None:
        with self._lock:
            due = min((lane.queue[0][0] for lane in self.lanes if lane.queue), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _read(self, sock: socket.socket, lane: Lane) -> None:
        for _ in range(BURST_DATAGRAMS):
            try:
                data, source = sock.recvfrom(MAX_DATAGRAM)
            except OSError:                         # nothing left, or an echo of a refused send
                return
            if lane is self.up:
                self._client = source
            self._serial += 2                       # one for the datagram, one for its possible twin
            lane.accept(data, time.monotonic(), self._chance, self._serial)

    def _deliver(self) -> None:
        now = time.monotonic()
        for lane, sock, target in ((self.up, self._back, self._server), (self.down, self._front, self._client)):
            for data in lane.take_due(now):
                if target is None:
                    continue
                try:
                    sock.sendto(data, target)
                except OSError:                     # the far end is gone or its buffer full: a loss like others
                    lane.lost += 1
                    continue
                lane.sent += 1
                lane.sent_bytes += len(data)

    def _wake(self) -> None:
        self._waker.send(b"w")


def _bound_socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.bind((host, 0))
    except OSError:
        sock.close()
        raise
    return sock
