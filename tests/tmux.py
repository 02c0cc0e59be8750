"""A real terminal under test control: one program inside a private tmux server.

tmux is a terminal emulator that others wrote and that can be asked what it shows, so it judges what a client
draws. Every `Terminal` has a tmux server of its own, with its own socket, configuration and environment.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import end_process, pause, process_alive, wait_until

WAIT_SECONDS = 15.0         # generous: a loaded machine must not fail a test
QUIET_SECONDS = 0.3         # a screen unchanged for this long has settled
COMMAND_SECONDS = 20.0      # tmux itself answers within this

_CONFIG = """\
set -g status off
set -g default-terminal xterm-256color
set -g remain-on-exit on
set -g remain-on-exit-format ""
set -g update-environment ""
set -g allow-rename off
set -s escape-time 0
set -s set-clipboard on
set -s exit-empty off
"""

# Notes the terminal's modes around the program, its process id and exit status. It outlives the program, because
# tmux no longer tells the modes of a terminal in which nothing runs.
_STUB = """\
cd "$1" || exit 125
shift
unset TMUX TMUX_PANE TERM_PROGRAM TERM_PROGRAM_VERSION
stty -g >"$NOTES/tty-before"
sh -c 'echo $$ >"$NOTES/pid.new"; mv "$NOTES/pid.new" "$NOTES/pid"; exec "$@"' sh "$@"
status=$?
stty -g >"$NOTES/tty-after"
echo $status >"$NOTES/status.new"
mv "$NOTES/status.new" "$NOTES/status"
exec cat >/dev/null
"""

_FLAGS = (
    "alternate_on", "cursor_flag", "insert_flag", "keypad_cursor_flag", "keypad_flag", "mouse_all_flag",
    "mouse_button_flag", "mouse_sgr_flag", "mouse_standard_flag", "mouse_utf8_flag", "origin_flag", "wrap_flag",
)
_FIELDS = ("cursor_y", "cursor_x", *_FLAGS, "pane_title")
_FORMAT = "|".join(f"#{{{field}}}" for field in _FIELDS)


@dataclass(frozen=True)
class Snapshot:
    """What a terminal shows at one moment."""

    rows: tuple[str, ...]                   # text only
    colored_rows: tuple[str, ...]           # runs of one rendition, as `<1;31>bold red<> plain`
    cursor: tuple[int, int]                 # (row, col)
    title: str
    modes: frozenset[str]                   # names of the tmux flags that are on

    @property
    def text(self) -> str:
        return "\n".join(self.rows)

    def row(self, wanted: str) -> int:
        """The number of the first row that contains the text. Raises ValueError if none does."""
        for number, text in enumerate(self.rows):
            if wanted in text:
                return number
        raise ValueError(f"{wanted!r} is on no row")


Condition = Callable[[Snapshot], bool]


class Terminal:
    """A program in a terminal of its own: type at it, look at it, end it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        height: int = 24,
        cwd: Path | None = None,
    ) -> None:
        """Start the command. `env` is its whole environment, to which tmux adds TERM."""
        # Not below a test's own directory: a socket's path must stay under about 100 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="terminal-"))
        self._last: Snapshot | None = None
        try:
            config = self._directory / "tmux.conf"
            config.write_text(_CONFIG, encoding="utf-8")
            stub = self._directory / "stub"
            stub.write_text(_STUB, encoding="utf-8")
            self._env = {**env, "NOTES": str(self._directory)}
            self._tmux(
                "-f", str(config), "new-session", "-d", "-s", "main", "-x", "80", "-y", str(height),
                "/bin/sh", str(stub), str(cwd or self._directory), *command,
            )
            self._tmux_pid = int(self._tmux("display-message", "-p", "#{pid}"))
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program, then the tmux server, each by its process id."""
        for pid in (self._noted_pid(), self._tmux_pid):
            if pid is not None:
                end_process(pid)
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- typing ------------------------------------------------------------------------------------------------

    def type(self, text: str) -> None:
        """Type text as it stands. A newline is the Return key; use `press` for other keys."""
        for number, line in enumerate(text.split("\n")):
            if number:
                self.press("Enter")
            if line:
                # tmux takes a last semicolon for the end of its own command unless it is escaped.
                self.send_keys("-l", "--", line[:-1] + "\\;" if line.endswith(";") else line)

    def press(self, *names: str) -> None:
        """Press keys by their tmux names: Enter, Left, BSpace, C-a, M-x, Escape ..."""
        self.send_keys("--", *names)

    def send_bytes(self, data: bytes) -> None:
        """Send raw bytes as the keyboard would."""
        self.send_keys("-H", *(f"{byte:02x}" for byte in data))

    def send_keys(self, *words: str) -> None:
        """tmux's own send-keys, for what the three above do not cover."""
        self._tmux("send-keys", "-t", "main", *words)

    def resize(self, width: int, height: int) -> None:
        """Change the window's size; the program gets SIGWINCH."""
        self._tmux("resize-window", "-t", "main", "-x", str(width), "-y", str(height))

    # -- looking -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything the terminal shows, taken in one piece."""
        output = self._tmux("capture-pane", "-pet", "main", ";", "display-message", "-pt", "main", _FORMAT)
        *lines, fields = output.split("\n")
        values = fields.split("|", len(_FIELDS) - 1)
        rows, colored_rows = parse_colored(lines)
        self._last = Snapshot(
            rows=rows,
            colored_rows=colored_rows,
            cursor=(int(values[0]), int(values[1])),
            title=values[-1],
            modes=frozenset(name for name, value in zip(_FLAGS, values[2:]) if value == "1"),
        )
        return self._last

    def screen(self) -> list[str]:
        """The rows as text, trailing blanks removed."""
        return list(self.snapshot().rows)

    def cursor(self) -> tuple[int, int]:
        """The cursor's (row, col)."""
        return self.snapshot().cursor

    def size(self) -> tuple[int, int]:
        """The window's (width, height)."""
        width, height = self._tmux("display-message", "-p", "-t", "main", "#{pane_width} #{pane_height}").split()
        return int(width), int(height)

    def wait_for(self, wanted: str | Condition, seconds: float = WAIT_SECONDS) -> Snapshot:
        """Wait until the screen contains the text, or the condition holds. Raises TimeoutError with the screen."""
        shown: Condition = wanted if callable(wanted) else lambda snapshot: str(wanted) in snapshot.text
        deadline = time.monotonic() + seconds
        while True:
            snapshot = self.snapshot()
            if shown(snapshot):
                return snapshot
            if time.monotonic() > deadline:
                wish = repr(wanted) if isinstance(wanted, str) else "the expected screen"
                raise TimeoutError(f"waited {seconds:g} s for {wish}; {describe(snapshot)}")
            pause()

    def wait_settled(self, wanted: str | Condition, seconds: float = WAIT_SECONDS) -> Snapshot:
        """Like `wait_for`, then on until nothing has changed for a moment."""
        snapshot = self.wait_for(wanted, seconds)
        deadline = time.monotonic() + seconds
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_SECONDS:
            pause()
            newer = self.snapshot()
            if newer != snapshot:
                snapshot, quiet_since = newer, time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the screen did not settle in {seconds:g} s; {describe(snapshot)}")
        return snapshot

    # -- the program -------------------------------------------------------------------------------------------

    def pid(self) -> int:
        """The process id of the program."""
        wait_until(lambda: self._noted_pid() is not None, WAIT_SECONDS, "the program to start")
        pid = self._noted_pid()
        assert pid is not None
        return pid

    def exited(self) -> bool:
        """Whether the program has ended."""
        return (self._directory / "status").exists()

    def exit_status(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the program to end; its exit status as a shell reports it."""
        try:
            wait_until(self.exited, seconds, "the program to exit")
        except TimeoutError as late:
            raise TimeoutError(f"{late}; {describe(self.snapshot())}") from None
        return int((self._directory / "status").read_text(encoding="ascii"))

    def tty_restored(self) -> bool:
        """Whether the program, now ended, left the terminal's modes as it found them."""
        before, after = (self._directory / name for name in ("tty-before", "tty-after"))
        return before.read_bytes() == after.read_bytes()

    # -- private -----------------------------------------------------------------------------------------------

    def _tmux(self, *words: str) -> str:
        result = subprocess.run(
            ["tmux", "-u", "-S", str(self._directory / "socket"), *words],
            env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=COMMAND_SECONDS, check=False,
        )
        if result.returncode:
            raise RuntimeError(f"tmux {words[0]}: {result.stderr.decode(errors='replace').strip()}")
        return result.stdout.decode(errors="replace").removesuffix("\n")

    def _noted_pid(self) -> int | None:
        try:
            pid = int((self._directory / "pid").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        return pid if process_alive(pid) else None


def describe(snapshot: Snapshot) -> str:
    """A snapshot for an error message."""
    frame = "\n".join(f"  {number:2}|{row}" for number, row in enumerate(snapshot.rows))
    modes = " ".join(sorted(snapshot.modes))
    return f"the screen is (cursor at {snapshot.cursor}, title {snapshot.title!r}, modes {modes}):\n{frame}"


# -- renditions ------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\x1b\[([0-9;:]*)m|[\x0e\x0f]|(.)", re.DOTALL)
_ATTRIBUTE_OFF = {22: (1, 2), 23: (3,), 24: (4,), 25: (5,), 27: (7,), 28: (8,), 29: (9,)}


def parse_colored(lines: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Plain rows and rows with renditions from the lines of `capture-pane -e`.

    Trailing blanks are dropped whatever their rendition, because tmux does not tell an erased cell with a
    background from an unused one. A rendition carries over from line to line, as tmux prints it.
    """
    rendition: frozenset[str] = frozenset()
    plain: list[str] = []
    colored: list[str] = []
    for line in lines:
        cells: list[tuple[str, frozenset[str]]] = []
        for token in _TOKEN.finditer(line):
            if token[1] is not None:
                rendition = _apply_sgr(rendition, token[1])
            elif token[2] is not None:
                cells.append((token[2], rendition))
        while cells and cells[-1][0] == " ":
            cells.pop()
        plain.append("".join(text for text, _ in cells))
        colored.append(_write_runs(cells))
    return tuple(plain), tuple(colored)


def _apply_sgr(rendition: frozenset[str], text: str) -> frozenset[str]:
    """The rendition, a set of SGR words such as 1 or 38;5;200, after one more SGR sequence."""
    words = set(rendition)
    numbers = iter(int(number or 0) for number in re.split("[;:]", text))
    for number in numbers:
        if number == 0:
            words.clear()
        elif number in _ATTRIBUTE_OFF:
            words -= {str(attribute) for attribute in _ATTRIBUTE_OFF[number]}
        elif number < 30:
            words.add(str(number))
        else:
            plane = "foreground" if number in (39, *range(30, 39), *range(90, 98)) else "background"
            words = {word for word in words if _plane(word) != plane}
            if number in (38, 48):
                mode = next(numbers)
                rest = [next(numbers) for _ in range(1 if mode == 5 else 3)]
                words.add(";".join(map(str, (number, mode, *rest))))
            elif number not in (39, 49):
                words.add(str(number))
    return frozenset(words)


def _plane(word: str) -> str:
    number = int(word.split(";")[0])
    if number < 30:
        return "attribute"
    return "foreground" if number in (*range(30, 39), *range(90, 98)) else "background"


def _write_runs(cells: Sequence[tuple[str, frozenset[str]]]) -> str:
    """`<1;31>bold red<> plain` for cells and their renditions."""
    written: list[str] = []
    current: frozenset[str] = frozenset()
    for text, rendition in cells:
        if rendition != current:
            words = sorted(rendition, key=lambda word: [int(number) for number in word.split(";")])
            written.append(f"<{';'.join(words)}>")
            current = rendition
        written.append(text)
    return "".join(written)
