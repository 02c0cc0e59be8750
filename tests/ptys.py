"""Running a program on a terminal of its own, without a terminal emulator: bytes in, bytes out, modes to look at."""

from __future__ import annotations

import fcntl
import os
import pty
import selectors
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

LIMIT_SECONDS = 20.0


class PtyProcess:
    """A process whose standard descriptors are a terminal that we hold the other end of."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], size: tuple[int, int]) -> None:
        """`size` is (width, height), 0 for one that the terminal does not know."""
        self._keeper, user = pty.openpty()
        self._user = user
        self.resize(*size)
        self.modes_before = termios.tcgetattr(user)
        self.output = b""
        self._process = subprocess.Popen(
            command, env=dict(environ), stdin=user, stdout=user, stderr=user, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, None while the process runs."""
        return self._process.poll()

    def modes(self) -> list[object]:
        """The terminal's modes now."""
        return list(termios.tcgetattr(self._user))

    def resize(self, width: int, height: int) -> None:
        """Change the window's size; the program gets SIGWINCH."""
        fcntl.ioctl(self._user, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._keeper, keys)

    def read_until(self, done: Callable[[bytes], bool], seconds: float = LIMIT_SECONDS) -> bytes:
        """Return all output, once `done` says that it is enough. Raises TimeoutError with what came instead."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._keeper, selectors.EVENT_READ)
            while not done(self.output):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the program on the terminal wrote only {self.output!r}")
                if selector.select(0.05):
                    self.output += os.read(self._keeper, 65536)
        return self.output

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, which leads a group of its own, and to what it runs."""
        os.killpg(self._process.pid, number)

    def pause(self) -> None:
        """Let the terminal take no output, as Ctrl-S does."""
        termios.tcflow(self._user, termios.TCOOFF)

    def resume(self) -> None:
        """Let it take output again."""
        termios.tcflow(self._user, termios.TCOON)

    def hang_up(self) -> None:
        """Close the terminal under the process, as closing its window does."""
        for descriptor in (self._keeper, self._user):
            os.close(descriptor)
        self._keeper = self._user = -1

    def wait(self) -> int:
        """Read everything, and return the exit status."""
        self.read_until(lambda _: self._process.poll() is not None)
        os.set_blocking(self._keeper, False)
        try:
            self.output += os.read(self._keeper, 1 << 20)
        except BlockingIOError:
            pass
        return self._process.wait()

    def close(self) -> None:
        """End the process if it still runs, and let go of the terminal."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._keeper >= 0:
            os.close(self._keeper)
            os.close(self._user)


@contextmanager
def on_a_terminal(
    command: Sequence[str], environ: Mapping[str, str], size: tuple[int, int] = (80, 24)
) -> Iterator[PtyProcess]:
    """Run a program on a terminal for the length of a `with` block."""
    process = PtyProcess(command, environ, size)
    try:
        yield process
    finally:
        process.close()
