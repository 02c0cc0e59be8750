"""Whole sessions in a real terminal, for every pairing of stock and our programs.

A scenario drives one session and notes checkpoints: what the terminal showed once it had settled, and facts such
as exit statuses. Scenarios insist on what they know by themselves; everything else about a checkpoint must be just
what stock mosh shows with itself in the same run.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import peers
from conftest import Stage, require, require_kind
from peers import PAIRS, Pair, Server
from tmux import Condition, Snapshot, Terminal

pytestmark = pytest.mark.live

ESCAPE_KEY = b"\x1e"                    # Ctrl-^
HOME_KEY = b"\x1bOH"                     # as a terminal in application mode sends it
EXITING = "[mosh is exiting.]"
YARDSTICK = PAIRS[0]
GONE_SECONDS = 15.0


@dataclass(frozen=True)
class Checkpoint:
    """What one pairing showed at a named moment of a scenario."""

    name: str
    rows: tuple[str, ...] = ()
    cursor: tuple[int, int] = (0, 0)
    facts: tuple[tuple[str, object], ...] = ()


class Session:
    """One client in a terminal, its server, and the checkpoints noted so far."""

    def __init__(self, pair: Pair, home: Path, resources: ExitStack, *, as_job: bool = False) -> None:
        """Start both ends. `as_job`: the client is a job of an interactive shell in the terminal."""
        self.home = home
        self.checkpoints: list[Checkpoint] = []
        env = peers.session_env(home)
        self.server: Server = resources.enter_context(peers.running_server(pair.server, env))
        client = peers.client_command(pair.client, self.server.port)
        env["MOSH_KEY"] = self.server.key
        if as_job:
            env["PS1"] = "local "
        self.terminal = resources.enter_context(Terminal(peers.SHELL_COMMAND if as_job else client, env=env, cwd=home))
        self.type, self.press = self.terminal.type, self.terminal.press
        if as_job:
            # In a script of its own, so that the shell's words about its jobs are the same for all.
            (home / "client").write_text(f"exec {shlex.join(client)}\n")
            self.type("clear; sh client\n")

    def start(self) -> None:
        """Reach a prompt on a screen that is the same for everyone.

        A stock server begins a session with an empty line, ours does not, and both may. So clear the screen.
        """
        self.terminal.wait_for("$")
        self.type("clear; echo ready\n")
        self.terminal.wait_for(rows_are("ready", "$"))

    def see(self, name: str, wanted: str | Condition, **facts: object) -> Snapshot:
        """Wait for something, let the screen settle, and note a checkpoint."""
        snapshot = self.terminal.wait_settled(wanted)
        self.checkpoints.append(Checkpoint(name, snapshot.colored_rows, snapshot.cursor, tuple(facts.items())))
        return snapshot

    def see_title(self, name: str, title: str) -> None:
        """Wait for the window title and note it."""
        self.see(name, lambda snapshot: snapshot.title == title, title=title)

    def see_modes(self, name: str, *, on: set[str]) -> None:
        """Wait for the named terminal modes, among those a program sets, to be on and all others off."""
        self.see(name, lambda snapshot: snapshot.modes & PROGRAM_MODES == on, modes=sorted(on))

    def see_end(self, *, status: int) -> None:
        """Wait for client and server to end: with this status, the goodbye, and the terminal as it was."""
        assert self.terminal.exit_status() == status
        peers.wait_until(lambda: not self.server.alive(), GONE_SECONDS, "the server to end")
        assert self.terminal.tty_restored(), "the client left the terminal in another mode"
        end = self.see("the end", EXITING, status=status)
        assert "alternate_on" not in end.modes and "cursor_flag" in end.modes
        assert not end.modes & PROGRAM_MODES


PROGRAM_MODES = frozenset({
    "keypad_cursor_flag", "mouse_standard_flag", "mouse_button_flag", "mouse_all_flag", "mouse_sgr_flag",
    "mouse_utf8_flag",
})


def rows_are(*wanted: str) -> Condition:
    """The screen's first rows are these and the rest is empty."""
    return lambda snapshot: snapshot.text.rstrip("\n") == "\n".join(wanted)


def last_line_is(wanted: str) -> Condition:
    """The last row with anything on it is this one."""
    return lambda snapshot: snapshot.text.rstrip("\n").rpartition("\n")[2] == wanted


# -- scenarios -------------------------------------------------------------------------------------------------


def type_and_see(session: Session) -> None:
    """Commands and their output, more than one screen of it, and a program that reads lines."""
    session.type("echo one; echo two\n")
    session.see("two commands", rows_are("ready", "$ echo one; echo two", "one", "two", "$"))
    session.type("seq 1 3000\n")
    session.see("a flood", last_line_is("$"))
    session.type("clear; cat\n")
    session.terminal.wait_for(rows_are(""))
    session.type("first\n")
    session.terminal.wait_for(rows_are("first", "first"))
    session.type("second")
    session.see("line and half a line", rows_are("first", "first", "second"))
    session.press("C-d", "C-d", "C-d")
    session.see("end of input", last_line_is("secondsecond$"))


def edit_a_line(session: Session) -> None:
    """The keys with which a shell's line is edited, each in its own place."""
    session.type("clear\n")
    session.terminal.wait_for(rows_are("$"))
    session.type("echo one twa")
    session.press("BSpace")
    session.see("backspace", rows_are("$ echo one tw"))
    session.type("o")
    session.press("Left", "Left", "Left", "Left")
    session.type("X")
    session.see("insert in the middle", rows_are("$ echo oneX two"))
    session.press("BSpace", "C-a")
    session.type("#")
    session.see("at the start", rows_are("$ #echo one two"))
    session.press("BSpace", "C-e", "C-w")
    session.see("a word less", rows_are("$ echo one"))
    session.type("three")
    session.terminal.send_bytes(HOME_KEY)
    session.press("Right", "DC")
    session.see("home and delete", rows_are("$ eho one three"))
    session.type("c")
    session.press("Enter")
    session.see("run", rows_are("$ echo one three", "one three", "$"))
    session.press("Up", "Up", "Down")
    session.see("history", rows_are("$ echo one three", "one three", "$ echo one three"))
    session.press("C-u")
    session.see("emptied", rows_are("$ echo one three", "one three", "$"))


def wrap_a_long_line(session: Session) -> None:
    """A line longer than the screen is wide, typed and then taken back across the edge."""
    session.type("clear\n")
    session.terminal.wait_for(rows_are("$"))
    line = "echo " + "0123456789" * 9
    session.type(line)
    session.see("wrapped", rows_are("$ " + line[:78], line[78:]))
    session.press(*["BSpace"] * 20)
    session.see("taken back", rows_are("$ " + line[:75]))
    session.type("end\n")
    session.see("printed", last_line_is("$"))


def edit_with_vi(session: Session) -> None:
    """A full-screen editor: insert, move, delete, undo, save and quit."""
    session.type("vi -u NONE -i NONE -N -n notes\n")
    session.see("opened", lambda screen: "notes" in screen.rows[23] and screen.rows[22] == "~")
    session.type("ione\ntwo words\nthree")
    session.see("inserted", lambda screen: screen.rows[:3] == ("one", "two words", "three"))
    session.press("Escape")
    session.see("command mode", lambda screen: screen.cursor == (2, 4) and "INSERT" not in screen.text)
    session.type("kbwx")
    session.see("moved and deleted", lambda screen: screen.rows[1] == "two ords" and screen.cursor == (1, 4))
    session.type("ggdd")
    session.see("line deleted", lambda screen: screen.rows[:3] == ("two ords", "three", "~"))
    session.type("u")
    # Not a checkpoint: the editor says how many seconds ago that was.
    session.terminal.wait_for(lambda screen: screen.rows[:3] == ("one", "two ords", "three"))
    session.press("Down")
    session.type("A")
    session.press("Left", "Left")
    session.type("w")
    session.see("arrows while inserting", lambda screen: screen.rows[1] == "two orwds" and "INSERT" in screen.text)
    session.press("Escape")
    session.terminal.wait_for(lambda screen: "INSERT" not in screen.text)
    session.type(":wq\n")
    session.see("quit", last_line_is("$"))
    assert (session.home / "notes").read_text() == "one\ntwo orwds\nthree\n"


def edit_with_nano(session: Session) -> None:
    """Another editor, with a status bar in reverse video and a menu."""
    session.type("nano -I notes\n")
    session.see("opened", "GNU nano")
    session.type("hello wurld")
    session.press("Left", "Left", "Left", "BSpace")
    session.type("o")
    session.press("Home", "Enter", "Up")
    session.type("title")
    session.see("written", lambda screen: screen.rows[1:3] == ("title", "hello world"))
    session.press("C-o")
    session.see("asked for the name", ": notes")      # nano 9 words the question in another way
    session.press("Enter")
    session.terminal.wait_for("Wrote 2 lines")
    session.press("C-x")
    session.see("quit", last_line_is("$"))
    assert (session.home / "notes").read_text() == "title\nhello world\n"


COLORS = {      # what the program prints: what the terminal shows
    "\033[31mred\033[m plain": "<31>red<> plain",
    "\033[1;92mbold bright green": "<1;38;5;10>bold bright green",
    "\033[1;3;4;5;7;8mall\033[22;23;24;25;27;28m none": "<1;3;4;5;7;8>all<> none",
    "\033[4munder\033[7minverse": "<4>under<4;7>inverse",
    "\033[44mon blue\033[49m off": "<44>on blue<> off",
    "\033[97;101mbright on bright": "<38;5;15;48;5;9>bright on bright",
    "\033[38;5;208morange\033[48;5;17m on navy": "<38;5;208>orange<38;5;208;48;5;17> on navy",
    "\033[38;5;3mlow palette": "<33>low palette",
    "\033[38;2;1;2;3mdark\033[48;2;250;251;252m on light": "<38;2;1;2;3>dark<38;2;1;2;3;48;2;250;251;252> on light",
    "\033[45m\033[K\033[60Cto here": "<45>" + " " * 60 + "to here",
}


def show_colors(session: Session) -> None:
    """Sixteen colours, the palette, true colour, the attributes, and erasing with a background."""
    (session.home / "colors").write_text("".join(f"{line}\033[m\n" for line in COLORS))
    session.type("clear; cat colors\n")
    shown = session.see("colours", last_line_is("$"))
    assert shown.colored_rows[:len(COLORS)] == tuple(COLORS.values())
    ramp = "".join(f"\033[48;5;{color}m{color % 10}" for color in range(256))
    (session.home / "ramp").write_text(f"\033[H\033[2J{ramp}\033[m\n\033[?5hreversed\n")
    session.type("cat ramp\n")
    shown = session.see("palette", last_line_is("$"))
    assert "<48;5;215>5<48;5;216>6" in shown.colored_rows[2]
    session.type("printf '\\033[?5l'\n")
    session.see("not reversed", "$ printf")


WIDE = (
    "漢字かな한글|",
    "emoji \N{GRINNING FACE}\N{PARTY POPPER}|",
    "e\N{COMBINING ACUTE ACCENT}a\N{COMBINING DIAERESIS}o\N{COMBINING DOT BELOW}\N{COMBINING CIRCUMFLEX ACCENT}|",
    "Привет, ελληνικά, עברית|",
    "box ┌─┬─┐ ½ € \N{SOFT HYPHEN}|",
    "x" * 79 + "漢|",
)


def show_wide_text(session: Session) -> None:
    """Characters of two columns and of none, in output and typed, also at the right edge and overwritten by half."""
    (session.home / "wide").write_text("".join(f"{line}\n" for line in WIDE), encoding="utf-8")
    session.type("clear; cat wide\n")
    shown = session.see("wide output", last_line_is("$"))
    assert shown.rows[:4] == WIDE[:4] and shown.rows[5:7] == ("x" * 79, "漢|")
    (session.home / "halves").write_text("\033[H\033[2J漢漢\033[1;2HA\033[1;8H字|\033[2;1H", encoding="utf-8")
    session.type("cat halves; read pause; clear; cat\n")
    session.see("halves", lambda screen: "字|" in screen.rows[0] and screen.cursor == (1, 0))
    session.press("Enter")
    session.terminal.wait_for(rows_are(""))
    session.type("née 漢字 \N{GRINNING FACE}")
    session.see("wide input", rows_are("née 漢字 \N{GRINNING FACE}"))
    session.press("BSpace", "BSpace", "BSpace")
    session.type("!\n")
    session.see("wide input edited", lambda screen: screen.rows[1] == "née 漢!")
    session.press("C-c")
    session.terminal.wait_for("^C")


def resize_the_window(session: Session) -> None:
    """The remote side follows the window as it grows and shrinks, and everything is drawn anew."""
    session.type("clear; seq 1 10\n")
    session.terminal.wait_for(last_line_is("$"))
    for width, height in ((100, 40), (50, 12), (80, 24)):
        session.terminal.resize(width, height)
        session.type("clear; stty size; printf '%0200d' 7; tput cup 6 0\n")
        session.see(f"{width}x{height}", lambda screen, size=f"{height} {width}": (     # type: ignore[misc]
            len(screen.rows) == int(size.split()[0]) and screen.rows[0] == size and screen.rows[6] == "$"
        ))


def set_the_title(session: Session) -> None:
    """A program names the window; the client marks the name, and in the end gives back the one there was."""
    before = session.terminal.snapshot().title
    session.type("printf '\\033]0;both\\007'\n")
    session.see_title("icon and window", "[mosh] both")
    session.type("printf '\\033]2;wïndow\\033\\\\'\n")
    session.see_title("window alone", "[mosh] wïndow")
    session.type("exit\n")
    session.see_end(status=0)
    session.see_title("given back", before)


def set_terminal_modes(session: Session) -> None:
    """Mouse, cursor-key and cursor-visibility modes reach the terminal; the arrows follow the program's wish."""
    session.type("clear; cat -v\n")
    session.terminal.wait_for(rows_are(""))
    session.press("Up", "Left")
    session.see("normal cursor keys", rows_are("^[[A^[[D"))
    session.press("C-c")
    session.terminal.wait_for(last_line_is("$"))    # or the terminal drops what is typed
    session.type("clear; printf '\\033[?1hset\\n'; cat -v\n")
    session.terminal.wait_for(rows_are("set"))
    session.press("Up", "Left")
    session.see("application cursor keys", rows_are("set", "^[OA^[OD"))
    session.press("C-c")
    session.terminal.wait_for(last_line_is("$"))    # or the terminal drops what is typed
    session.type("clear; printf '\\033[?1l\\033[?1002h\\033[?1006h'\n")
    # The client keeps the real terminal in application mode throughout; the server translates.
    session.see_modes("mouse on", on={"keypad_cursor_flag", "mouse_button_flag", "mouse_sgr_flag"})
    session.type("clear; printf '\\033[?1002l\\033[?1006l\\033[?25l'\n")
    session.see_modes("mouse off", on={"keypad_cursor_flag"})
    assert "cursor_flag" not in session.see("cursor hidden", rows_are("$")).modes
    session.type("printf '\\033[?1003h'; exit\n")
    session.see_end(status=0)


def paste_much(session: Session) -> None:
    """A large paste arrives complete and in order."""
    lines = [f"line {number:03} " + "abcdefghij" * 4 for number in range(60)]
    session.type("clear; stty -echo; cat >pasted; stty echo; wc -l pasted\n")
    session.terminal.wait_for(rows_are(""))
    session.type("\n".join(lines) + "\n")
    session.press("C-d")
    session.see("counted", rows_are("60 pasted", "$"))
    assert (session.home / "pasted").read_text().splitlines() == lines


def use_the_escape_key(session: Session) -> None:
    """The escape key shows a hint, passes itself on when asked, and sends other keys after itself."""
    session.type("clear; cat -v\n")
    session.terminal.wait_for(rows_are(""))
    session.terminal.send_bytes(ESCAPE_KEY)
    session.see("hint", "Commands: Ctrl-Z suspends, \".\" quits, \"^\" gives literal Ctrl-^")
    session.type("^")
    session.see("itself", rows_are("^^"))
    session.terminal.send_bytes(ESCAPE_KEY + b"x")
    session.see("and another", rows_are("^^^^x"))
    session.press("Enter")
    session.terminal.wait_for(rows_are("^^^^x", "^^^^x"))
    session.press("C-c")
    session.see("nothing lost", rows_are("^^^^x", "^^^^x", "^C", "$"))


def quit_by_escape(session: Session) -> None:
    """The escape key and a full stop end both sides."""
    session.terminal.send_bytes(ESCAPE_KEY + b".")
    session.see_end(status=0)


def quit_by_exit(session: Session) -> None:
    """The end of the remote shell ends both sides; its own exit status is not passed on."""
    session.type("exit 7\n")
    session.see_end(status=0)


def terminate_server(session: Session) -> None:
    """SIGTERM to the server: it takes leave of the client, which exits cleanly."""
    os.kill(session.server.pid, signal.SIGTERM)
    session.see_end(status=0)


def terminate_client(session: Session) -> None:
    """SIGTERM to the client: it takes leave of the server and exits cleanly."""
    os.kill(session.terminal.pid(), signal.SIGTERM)
    session.see_end(status=0)


def hang_up_client(session: Session) -> None:
    """SIGHUP, as from a closed window, likewise ends both sides."""
    os.kill(session.terminal.pid(), signal.SIGHUP)
    session.see_end(status=0)


def suspend_and_resume(session: Session) -> None:
    """The escape key and Ctrl-Z stop the client and give the terminal back; `fg` draws everything anew."""
    session.type("echo before\n")
    session.terminal.wait_for(rows_are("ready", "$ echo before", "before", "$"))
    session.terminal.send_bytes(ESCAPE_KEY + b"\x1a")
    suspended = session.see("suspended", "[mosh is suspended.]")
    assert "alternate_on" not in suspended.modes
    session.terminal.wait_for(last_line_is("local"))
    session.type("fg\n")
    session.see("resumed", rows_are("ready", "$ echo before", "before", "$"))
    session.type("echo after\n")
    session.see("alive", last_line_is("$"))


Scenario = Callable[[Session], None]
SCENARIOS: tuple[Scenario, ...] = (
    type_and_see, edit_a_line, wrap_a_long_line, edit_with_vi, edit_with_nano, show_colors, show_wide_text,
    resize_the_window, set_the_title, set_terminal_modes, paste_much, use_the_escape_key, quit_by_escape,
    quit_by_exit, terminate_server, terminate_client, hang_up_client, suspend_and_resume,
)
PROGRAMS = {edit_with_vi: "vi", edit_with_nano: "nano"}


# -- the comparison --------------------------------------------------------------------------------------------


def play(scenario: Scenario, pair: Pair, home: Path) -> list[Checkpoint]:
    """Play one scenario from a fresh session to its last checkpoint."""
    with ExitStack() as resources:
        session = Session(pair, home, resources, as_job=scenario is suspend_and_resume)
        session.start()
        scenario(session)
        return session.checkpoints


STORIES = {scenario: partial(play, scenario) for scenario in SCENARIOS}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_pairing_shows_what_stock_shows(scenario: Scenario, pair: Pair, stage: Stage) -> None:
    require("tmux")
    require_kind(pair.client, pair.server, "stock")
    if scenario in PROGRAMS:
        require(PROGRAMS[scenario])
    shown = stage.play(STORIES[scenario], pair)
    expected = stage.play(STORIES[scenario], YARDSTICK)
    for checkpoint, wanted in zip(shown, expected):
        assert checkpoint == wanted
    assert len(shown) == len(expected)
