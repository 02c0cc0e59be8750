"""Stock programs on a leash: one of our cores in this process, a stock peer at the other end of a loopback socket.

Each kind puts one question to the peer, as often as wanted within one session: do two screens agree?

    StockServer    a program's output goes to a stock server and to an emulator of ours; does our client core's
                   screen, made of what the stock server sends, equal that emulator's?
    StockClient    a program's output goes to our server core; does the terminal that a stock client draws on equal
                   the core's screen?

A mark, written behind the output, tells when all of it has come through, so nobody has to wait and hope.
"""

from __future__ import annotations

import fcntl
import os
import pty
import selectors
import signal
import socket
import struct
import subprocess
import termios
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional, TypeVar

import mosh
import peers

Size = tuple[int, int]                      # (width, height)
CellView = tuple[str, bool, tuple[int, Optional[int], Optional[int]]]     # contents, wide, rendition
Self = TypeVar("Self", bound="LivePeer")

LIMIT_SECONDS = 15.0                        # generous: a loaded machine must not fail a test
TURN_MS = 100                               # a turn takes no longer, so that a deadline is noticed
RETRY_MS = 1                                # while a pipe is full, it is tried again this often
RESET = b"\x1bc\x1b]1;\x07"                 # RIS, and the icon name, which RIS leaves. Needs a parser at rest
REST = b"\x18"                              # CAN brings a parser to rest from anywhere
MODES = (
    "cursor_row", "cursor_col", "cursor_visible", "reverse_video", "bracketed_paste", "mouse_mode", "mouse_encoding",
    "focus_events", "window_title", "icon_name", "clipboard",
)


# -- comparing screens -----------------------------------------------------------------------------------------


def _arriving(code: str, book: mosh.Codebook) -> str:
    """What a cell's contents are for a receiver: an empty cell is a blank, and a lone mark stands on NBSP."""
    contents = book.contents(code) or " "
    if not book.is_fallback(code):
        return contents
    arriving = "\xa0"
    for mark in contents:
        if len(arriving.encode("utf-8", "replace")) < mosh.CLUSTER_LIMIT_BYTES:
            arriving += mark
    return arriving


def visible_cells(framebuffer: mosh.Framebuffer) -> list[dict[int, CellView]]:
    """Return {column: cell} for each row. A cell right of a wide one does not show and is left out.

    Half a wide character, in the last column, cannot be shown: a blank stands for it.
    """
    book = framebuffer.codebook
    text_of = lru_cache(maxsize=None)(lambda code: (_arriving(code, book), book.is_wide(code)))
    rendition_of = lru_cache(maxsize=None)(lambda code: book.rendition(code))
    rows = []
    for row in framebuffer.rows:
        text, attrs = row.padded(framebuffer.width)
        columns = framebuffer.visible_columns(text)
        cells: dict[int, CellView] = {col: (*text_of(text[col]), rendition_of(attrs[col])) for col in columns}
        if columns[-1] == framebuffer.width - 1 and cells[columns[-1]][1]:
            cells[columns[-1]] = (" ", False, cells[columns[-1]][2])
        rows.append(cells)
    return rows


def wraps(framebuffer: mosh.Framebuffer) -> list[bool]:
    """Return for each row but the last whether its line goes on in the next one; of the last row nobody can tell."""
    return [mosh.has_wrap(row.padded(framebuffer.width)[1][-1]) for row in framebuffer.rows[:-1]]


def differences(expected: mosh.Framebuffer, got: mosh.Framebuffer) -> list[str]:
    """Return a line for everything in which a receiver's screen is not what it should be."""
    found = []
    for name in ("width", "height", *MODES):
        if getattr(expected, name) != getattr(got, name):
            found.append(f"{name}: expected {getattr(expected, name)!r}, got {getattr(got, name)!r}")
    pens = [screen.codebook.rendition(screen.pen) for screen in (expected, got)]
    if pens[0] != pens[1]:
        found.append(f"pen: expected {pens[0]}, got {pens[1]}")
    if wraps(expected) != wraps(got):
        found.append(f"wraps: expected {wraps(expected)}, got {wraps(got)}")
    for number, (wanted, there) in enumerate(zip(visible_cells(expected), visible_cells(got))):
        if wanted != there:
            for col in sorted({*wanted, *there}):
                if wanted.get(col) != there.get(col):
                    found.append(f"cell {number},{col}: expected {wanted.get(col)}, got {there.get(col)}")
    return found


def picture(framebuffer: mosh.Framebuffer) -> str:
    """Return a screen as text in a frame, for messages."""
    lines = [f"    {number:2}|{line}|" for number, line in enumerate(framebuffer.lines())]
    where = f"cursor {framebuffer.cursor_row},{framebuffer.cursor_col} of {framebuffer.width}x{framebuffer.height}"
    return "\n".join([f"    {where}", *lines])


# -- programs on terminals -------------------------------------------------------------------------------------


class Program:
    """A program on a controlling terminal of its own, which an emulator of ours plays."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], size: Size) -> None:
        """Start it; `close` ends it."""
        self.terminal = mosh.Emulator(*size)
        self.output = bytearray()
        self.fd, self._user = pty.openpty()
        os.set_blocking(self.fd, False)
        self._set_size(size)
        # The first terminal that the leader of a new session opens becomes its controlling one.
        script = 'tty=$1; shift; exec "$@" <>"$tty" >&0 2>&1'
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", os.ttyname(self._user), *command], env=dict(env),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )

    def _set_size(self, size: Size) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def resize(self, size: Size) -> None:
        """Change the window's size and tell the program."""
        self.terminal.resize(*size)
        self._set_size(size)

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.fd, keys)

    def take_output(self) -> bytes:
        """Return what the program has just written, after showing it; answer what it asks of its terminal."""
        try:
            data = os.read(self.fd, 65_536)
        except (BlockingIOError, OSError):
            return b""
        self.output += data
        self.terminal.feed(data)
        replies = self.terminal.take_replies()
        if replies:
            self.type(replies)
        return data

    def run_until(self, done: Callable[[], bool], what: str) -> None:
        """Show what the program writes until the condition holds. Raises TimeoutError with what it shows."""
        limit_at = mosh.monotonic_ms() + LIMIT_SECONDS * 1000
        with selectors.DefaultSelector() as selector:
            selector.register(self.fd, selectors.EVENT_READ)
            while not done():
                if mosh.monotonic_ms() > limit_at:
                    raise TimeoutError(f"waited for {what}; it shows\n{picture(self.terminal.framebuffer)}")
                if selector.select(TURN_MS / 1000):
                    self.take_output()

    def run_until_shown(self, text: str) -> None:
        """Show what the program writes until the text is on the screen."""
        self.run_until(lambda: any(text in line for line in self.terminal.framebuffer.lines()), repr(text))

    def run_until_exit(self) -> int:
        """Show what the program writes until it ends; return its status."""
        self.run_until(lambda: self.process.poll() is not None, "its end")
        while self.take_output():
            pass
        return self.process.wait()

    def close(self) -> None:
        """End the program, if it still runs, and let go of the terminal."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self._user)


# -- peers -----------------------------------------------------------------------------------------------------


class LivePeer(ABC):
    """One session between one of our cores and a stock program, for the length of a `with` block."""

    def __init__(self, home: Path, size: Size = (80, 24)) -> None:
        self._home = home
        self._size = size
        self._resources = ExitStack()
        self._selector = self._resources.enter_context(selectors.DefaultSelector())
        self._plays = 0

    def __enter__(self: Self) -> Self:
        try:
            self._start()
            self.scrub()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._resources.close()

    # -- what each kind does in its own way

    @abstractmethod
    def _start(self) -> None:
        """Start the peer and the session with it."""

    @property
    @abstractmethod
    def reference(self) -> mosh.Framebuffer:
        """The screen that the output of the program makes."""

    @property
    @abstractmethod
    def received(self) -> mosh.Framebuffer:
        """The screen that has come through the session."""

    @abstractmethod
    def _write(self, data: bytes) -> None:
        """The program writes."""

    @abstractmethod
    def resize(self, size: Size) -> None:
        """The user's window has a new size; returns when both ends know it."""

    @abstractmethod
    def _turn(self) -> None:
        """Send what is due, wait for something, at most for TURN_MS, and take it in."""

    # -- playing

    def play(self, data: bytes) -> list[str]:
        """The program writes `data`; return `differences` once all of it has come through.

        A mark follows, alternately a window title and a clipboard, so that both of what `data` made of them are seen
        in turn. Where a frame is not taken in at once, a second mark makes sure that the frame with the first is.
        """
        self._plays += 1
        title = bool(self._plays % 2)
        self._write(data + REST)
        self._await_mark(f"mark {self._plays}", title)
        found = differences(self.reference, self.received)
        if found and not self._takes_frames_whole:
            self._await_mark(f"second mark {self._plays}", title)
            found = differences(self.reference, self.received)
        return found

    _takes_frames_whole = True

    def _await_mark(self, mark: str, title: bool) -> None:
        kind = "2" if title else "52;c"
        self._write(f"\x1b]{kind};{mark}\x07".encode())
        self._run_until(lambda: mark == (self.received.window_title if title else self.received.clipboard), mark)

    def scrub(self) -> None:
        """Make both ends start from nothing, whatever the screens were: a new size repaints everything."""
        width, height = self._size
        self._write(REST + RESET)
        for size in ((width + 1, height + 1), (width, height)):
            self.resize(size)
            found = self.play(RESET)
        assert not found, f"a repaint leaves differences: {found}"

    def _run_until(self, done: Callable[[], bool], what: str) -> None:
        limit_at = mosh.monotonic_ms() + LIMIT_SECONDS * 1000
        while not done():
            if mosh.monotonic_ms() > limit_at:
                raise TimeoutError(
                    f"waited for {what}; expected\n{picture(self.reference)}\ngot\n{picture(self.received)}"
                )
            self._turn()

    # -- the network

    def _open_socket(self) -> socket.socket:
        sock = self._resources.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((peers.LOOPBACK, 0))
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)
        return sock

    def _wait(self, deadline: int | None) -> None:
        now = mosh.monotonic_ms()
        wait_ms = TURN_MS if deadline is None else max(0, min(TURN_MS, deadline - now))
        self._selector.select(wait_ms / 1000)


def datagrams(sock: socket.socket) -> Iterator[tuple[bytes, Any]]:
    """Yield the datagrams that have arrived, with their senders."""
    while True:
        try:
            yield sock.recvfrom(mosh.RECEIVE_LIMIT_BYTES + 1)
        except BlockingIOError:
            return


class StockServer(LivePeer):
    """A stock server whose program writes to its raw terminal what the test tells it to."""

    # Argument 1 is read and goes to the terminal; what the terminal answers goes to argument 2.
    _RELAY = 'stty raw -echo; exec 3<&0; cat <&3 >"$2" & exec cat "$1"'

    def __init__(self, home: Path, size: Size = (80, 24)) -> None:
        super().__init__(home, size)
        self._reference = mosh.Emulator(*size)
        self._unwritten = bytearray()
        self._replies = bytearray()

    def _start(self) -> None:
        pipes = [self._home / name for name in ("output", "replies")]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Both ends of each, so that opening does not wait for the other side, nor does its end matter.
        self._to_program, self._from_program = (os.open(pipe, os.O_RDWR | os.O_NONBLOCK) for pipe in pipes)
        self._resources.callback(os.close, self._to_program)
        self._resources.callback(os.close, self._from_program)
        env = peers.session_env(self._home, MOSH_SERVER_NETWORK_TMOUT="900")
        command = ("/bin/sh", "-c", self._RELAY, "sh", *map(str, pipes))
        server = self._resources.enter_context(peers.running_server("stock", env, command=command))
        self._socket = self._open_socket()
        self._selector.register(self._from_program, selectors.EVENT_READ)
        width, height = self._size
        self.core = mosh.ClientCore(
            mosh.Channel(mosh.choose_cipher()(mosh.Key.from_text(server.key).raw), mosh.TO_SERVER),
            mosh.monotonic_ms(), width=width, height=height, candidates=[(peers.LOOPBACK, server.port)],
            port=server.port, random_bytes=os.urandom,
        )

    @property
    def reference(self) -> mosh.Framebuffer:
        """See LivePeer."""
        return self._reference.framebuffer

    @property
    def received(self) -> mosh.Framebuffer:
        """See LivePeer."""
        return self.core.screen

    def _write(self, data: bytes) -> None:
        self._unwritten += data
        self._reference.feed(data)

    def resize(self, size: Size) -> None:
        """See LivePeer."""
        self._run_until(lambda: not self._unwritten, "the program to write")
        self._reference.resize(*size)
        self.core.resize(*size, mosh.monotonic_ms())
        self._run_until(lambda: (self.received.width, self.received.height) == size, f"a window of {size}")
        self._size = size

    def play(self, data: bytes) -> list[str]:
        """See LivePeer; what the terminal answers to the program is compared too."""
        found = super().play(data)
        expected = self._reference.take_replies()
        self._run_until(lambda: len(self._replies) >= len(expected), f"the replies {expected!r}")
        if self._replies != expected:
            found.append(f"replies: expected {expected!r}, got {bytes(self._replies)!r}")
        self._replies.clear()
        return found

    def _turn(self) -> None:
        for data in self.core.datagrams_to_send(mosh.monotonic_ms()):
            for peer in self.core.peers:
                self._socket.sendto(data, peer)
        try:
            del self._unwritten[: os.write(self._to_program, self._unwritten) if self._unwritten else 0]
        except BlockingIOError:
            pass
        self._wait(mosh.monotonic_ms() + RETRY_MS if self._unwritten else self.core.next_timeout())
        try:
            self._replies += os.read(self._from_program, 65_536)
        except BlockingIOError:
            pass
        for data, source in datagrams(self._socket):
            self.core.receive_datagram(data, source, mosh.monotonic_ms())


class StockClient(LivePeer):
    """A stock client drawing on a terminal that an emulator of ours plays."""

    _takes_frames_whole = False             # a terminal may be looked at in the middle of one

    def _start(self) -> None:
        key = mosh.Key(os.urandom(mosh.KEY_BYTES))
        width, height = self._size
        self.core = mosh.ServerCore(
            mosh.Channel(mosh.choose_cipher()(key.raw), mosh.TO_CLIENT), mosh.monotonic_ms(),
            width=width, height=height, random_bytes=os.urandom,
        )
        self._socket = self._open_socket()
        env = peers.session_env(
            self._home, TERM="xterm-256color", MOSH_KEY=key.to_text(), MOSH_PREDICTION_DISPLAY="never",
            MOSH_TITLE_NOPREFIX="1",
        )
        command = peers.client_command("stock", self._socket.getsockname()[1])
        self.client = Program(command, env, self._size)
        self._resources.callback(self.client.close)
        self._selector.register(self.client.fd, selectors.EVENT_READ)

    @property
    def reference(self) -> mosh.Framebuffer:
        """See LivePeer."""
        return self.core.screen

    @property
    def received(self) -> mosh.Framebuffer:
        """See LivePeer."""
        return self.client.terminal.framebuffer

    def _write(self, data: bytes) -> None:
        self.core.receive_host_output(data, mosh.monotonic_ms())
        self.core.host_input.clear()

    def resize(self, size: Size) -> None:
        """See LivePeer."""
        self._run_until(lambda: self.core.peer is not None, "the client to call")
        self.client.resize(size)
        self._run_until(lambda: self.core.size == size, f"a window of {size}")
        self._size = size

    def _turn(self) -> None:
        now = mosh.monotonic_ms()
        for data in self.core.datagrams_to_send(now):
            if self.core.peer is not None:
                self._socket.sendto(data, self.core.peer)
        self.core.datagrams_sent(now)
        self._wait(self.core.next_timeout())
        if not self.client.take_output() and self.client.process.poll() is not None:
            raise RuntimeError(
                f"the client has ended with status {self.client.process.returncode}; its last words:\n"
                + bytes(self.client.output[-2000:]).decode("utf-8", "replace")
            )
        for data, source in datagrams(self._socket):
            self.core.receive_datagram(data, source, mosh.monotonic_ms())
