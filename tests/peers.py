"""The two ends of a session, stock or ours: their command lines, and servers started and surely ended again.

Nothing here knows about a test framework, so benchmarks can use it too.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["stock", "ours"]

REPOSITORY = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
SHELL_COMMAND = ("bash", "--norc", "--noprofile")       # no startup file can change what the screen shows
START_SECONDS = 20.0                                     # a server that has not announced itself by then never will
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Pair:
    """Which program stands at each end of a session."""

    client: Kind
    server: Kind

    def __str__(self) -> str:
        return f"{self.client}-client-{self.server}-server"


# The yardstick first: the other pairings are compared with what it shows.
PAIRS = (Pair("stock", "stock"), Pair("ours", "stock"), Pair("stock", "ours"), Pair("ours", "ours"))


# -- command lines ---------------------------------------------------------------------------------------------


def ours_path() -> Path:
    """The program under test: the module of this checkout, or the archive that MOSH_PYZ names."""
    return Path(os.environ.get("MOSH_PYZ") or REPOSITORY / "mosh.py").resolve()


def ours_command() -> list[str]:
    """The words that start our program; a subcommand or options follow."""
    return [sys.executable, str(ours_path())]


def server_command(kind: Kind, *options: str, command: Sequence[str] = SHELL_COMMAND) -> list[str]:
    """The words of a server on loopback; options such as `-p 60010` come before the command."""
    program = ["mosh-server"] if kind == "stock" else [*ours_command(), "server"]
    return [*program, "new", "-i", LOOPBACK, "-c", "256", *options, "--", *command]


def client_command(kind: Kind, port: int, *, host: str = LOOPBACK) -> list[str]:
    """The words of a client; the key goes into its environment as MOSH_KEY."""
    program = ["mosh-client"] if kind == "stock" else [*ours_command(), "client"]
    return [*program, host, str(port)]


def session_env(home: Path, **extra: str) -> dict[str, str]:
    """A small, fixed environment, so that a session looks the same on every machine."""
    return {
        "HOME": str(home),
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "SHELL": shutil.which("bash") or "/bin/sh",
        "PS1": "$ ",
        "INPUTRC": os.devnull,
        "HISTFILE": os.devnull,
        **extra,
    }


# -- waiting ---------------------------------------------------------------------------------------------------


def pause(seconds: float = POLL_SECONDS) -> None:
    """Let others run before the next look at something that is polled."""
    threading.Event().wait(seconds)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds. Raises TimeoutError naming `what` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        pause()


# -- processes -------------------------------------------------------------------------------------------------


def process_alive(pid: int) -> bool:
    """Whether the process still runs. One that is dead but not yet reaped, having no parent who cares, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self").exists()      # no such file system here: believe the signal
    return status.rpartition(")")[2].split()[0] not in "ZX"


def end_process(pid: int) -> None:
    """End one process by its id: ask, ask again (which cuts a polite farewell short), then insist."""
    for signum, seconds in ((signal.SIGTERM, 0.3), (signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
        if not process_alive(pid):
            return
        os.kill(pid, signum)
        try:
            wait_until(lambda: not process_alive(pid), seconds, f"process {pid} to end")
        except TimeoutError:
            continue


# -- servers ---------------------------------------------------------------------------------------------------

_CONNECT = re.compile(r"^MOSH CONNECT (\d+) ([A-Za-z0-9/+]{22})\s*$", re.MULTILINE)
_DETACHED = re.compile(r"\[mosh-server detached, pid = (\d+)\]")


@dataclass(frozen=True)
class Server:
    """A detached server: where it listens and the process to end."""

    port: int
    key: str
    pid: int

    def alive(self) -> bool:
        return process_alive(self.pid)

    def __repr__(self) -> str:
        return f"Server(port={self.port}, pid={self.pid})"     # security: the key stays out of test reports


def stop_ignoring_signals() -> None:
    """Let Ctrl-C act in the servers that are started from now on.

    What a shell without job control starts in the background ignores SIGINT and SIGQUIT, and a stock server hands that
    on to its program.
    """
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)


def start_server(
    kind: Kind,
    env: Mapping[str, str],
    *options: str,
    command: Sequence[str] = SHELL_COMMAND,
    prefix: Sequence[str] = (),
) -> Server:
    """Start a server and read its announcement; end it with `end_process(server.pid)`. `prefix`: words to run it with.

    Raises RuntimeError with everything it printed if it did not announce itself and detach.
    """
    words = [*prefix, *server_command(kind, *options, command=command)]
    process = subprocess.Popen(
        words, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        raw_out, raw_err = process.communicate(timeout=START_SECONDS)
        problem = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired as late:
        # Not even the pipes were closed; what came through them may still name the detached process.
        process.kill()
        process.wait()
        raw_out, raw_err = late.stdout or b"", late.stderr or b""
        problem = "it kept its standard descriptors open"
    out, err = raw_out.decode(errors="replace"), raw_err.decode(errors="replace")
    connect, detached = _CONNECT.search(out), _DETACHED.search(err)
    if connect and detached and process.returncode == 0:
        return Server(port=int(connect[1]), key=connect[2], pid=int(detached[1]))
    if detached:
        end_process(int(detached[1]))
    raise RuntimeError(f"{kind} server did not start ({problem})\n{' '.join(words)}\n{out}\n{err}")


@contextmanager
def running_server(
    kind: Kind,
    env: Mapping[str, str],
    *options: str,
    command: Sequence[str] = SHELL_COMMAND,
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """A server for the length of a `with` block, ended by its process id on every way out."""
    server = start_server(kind, env, *options, command=command, prefix=prefix)
    try:
        yield server
    finally:
        end_process(server.pid)
