"""The order of mosh.py: the map agrees with the banners, nothing is used above its section, no I/O above the line.

Every rule is a function that takes a source text and returns what breaks it, one line per violation. Each is tested on
mosh.py, where it must find nothing, and on a tiny text that breaks it, where it must find just that.
"""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE_PATH = Path(__file__).resolve().parent.parent / "mosh.py"
SOURCE = SOURCE_PATH.read_text(encoding="utf-8")

Checker = Callable[[str], "list[str]"]

BANNER = re.compile(r"# == (\d+)\. (.+)")
MAP_LINE = re.compile(r"\s*(\d+)\. (\w.* -- .+)")
RULE = re.compile(r"# ={20,}")
IO_LINE = "# -- The I/O line"
IO_LINE_IN_MAP = "---- the I/O line"
FIRST_SECTION_OF_IO = 16
NETWORK, TERMINAL = range(4, 8), range(8, 13)
IO_NAMES = {
    *("os", "time", "socket", "selectors", "signal", "pty", "termios", "tty", "fcntl", "random", "secrets", "select"),
    *("subprocess", "threading", "pathlib", "tempfile", "shutil", "logging", "datetime"),
    *("open", "print", "input"),
}
COSTLY_MODULES = {
    *("argparse", "asyncio", "base64", "copy", "cryptography", "ctypes", "curses", "dataclasses", "getpass", "hashlib"),
    *("importlib.metadata", "inspect", "json", "locale", "logging", "pathlib", "platform", "pwd", "random", "secrets"),
    *("shlex", "shutil", "site", "string", "subprocess", "tempfile", "textwrap", "threading", "traceback", "typing"),
    *("unicodedata", "wcwidth"),
}
DOCSTRING_FREE_LINES = 5


# -- reading a source ------------------------------------------------------------------------------------------


def _banners(source: str) -> list[tuple[int, int, str]]:
    """Return (line number, section, title) of every banner."""
    matches = ((at, BANNER.fullmatch(line)) for at, line in enumerate(source.splitlines(), 1))
    return [(at, int(match[1]), match[2]) for at, match in matches if match]


def _io_line(source: str) -> int:
    """Return the number of the line that says where I/O begins; behind the end if there is none."""
    lines = source.splitlines()
    return next((at for at, line in enumerate(lines, 1) if line.startswith(IO_LINE)), len(lines) + 1)


def _section_at(source: str) -> Callable[[int], int]:
    """Return a function from line number to section; 0 is the header, and what opens the I/O part belongs to 16."""
    starts = [(at, section) for at, section, _ in _banners(source)] + [(_io_line(source), FIRST_SECTION_OF_IO)]
    return lambda line: max(((at, section) for at, section in starts if at <= line), default=(0, 0))[1]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the statements in `node` run: bodies of functions and classes and annotations do not."""
    for name, value in ast.iter_fields(node):
        scope = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
        if name in ("annotation", "returns") or (scope and name == "body"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _own_nodes(child)


def _definitions(source: str) -> dict[str, int]:
    """Return the line of the first definition of every top-level name, imports included."""
    lines: dict[str, int] = {}
    for node in _own_nodes(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        for name in names:
            lines.setdefault(name, getattr(node, "lineno", 0))
    return lines


def _uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, name) for each use of a global name; inside a function the line is that of its head."""
    for node in _own_nodes(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.lineno, node.id
    waiting = list(symtable.symtable(source, "<source>", "exec").get_children())
    while waiting:
        table = waiting.pop()
        waiting += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield table.get_lineno(), symbol.get_name()


def _uses_between_sections(source: str) -> Iterator[tuple[int, int, str]]:
    """Yield (section of the use, section of the definition, description) for each use of a top-level name."""
    section_at, definitions = _section_at(source), _definitions(source)
    for line, name in _uses(source):
        if name in definitions:
            user, owner = section_at(line), section_at(definitions[name])
            yield user, owner, f"{name} of section {owner} is used in section {user}, line {line}"


def _imported_modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _in(module: str, names: set[str]) -> bool:
    return module in names or module.partition(".")[0] in names


# -- the rules -------------------------------------------------------------------------------------------------


def map_and_banners_disagree(source: str) -> list[str]:
    """The map in the docstring and the banners list the same sections, word for word and in order."""
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    matches = (MAP_LINE.fullmatch(line) for line in docstring.splitlines())
    in_map = [f"{match[1]}. {match[2]}" for match in matches if match]
    in_text = [f"{section}. {title}" for _, section, title in _banners(source)]
    if in_map == in_text:
        return []
    return [f"only in the map or only in the text: {line}" for line in sorted({*in_map} ^ {*in_text})] or ["order"]


def sections_out_of_order(source: str) -> list[str]:
    """Sections are numbered 1, 2, 3 ... without a gap."""
    sections = [section for _, section, _ in _banners(source)]
    return [f"section {section} is number {at}" for at, section in enumerate(sections, 1) if at != section]


def banners_badly_framed(source: str) -> list[str]:
    """A banner stands between two rules of equal signs, so that it is seen when scrolling."""
    lines = ["", *source.splitlines(), ""]
    return [
        f"section {section}"
        for at, section, _ in _banners(source)
        if not (RULE.fullmatch(lines[at - 1]) and RULE.fullmatch(lines[at + 1]))
    ]


def io_line_misplaced(source: str) -> list[str]:
    """The I/O line is drawn between sections 15 and 16, in the map and in the text."""
    docstring = (ast.get_docstring(ast.parse(source), clean=False) or "").splitlines()
    in_map = [int(match[1]) if (match := MAP_LINE.fullmatch(line)) else line.strip()[:17] for line in docstring]
    out = []
    if [15, IO_LINE_IN_MAP, 16] not in [in_map[at : at + 3] for at in range(len(in_map))]:
        out.append("the map does not draw the line between 15 and 16")
    starts = {section: at for at, section, _ in _banners(source)}
    if not starts.get(15, 0) < _io_line(source) < starts.get(16, 0):
        out.append("the text does not draw the line between 15 and 16")
    return out


def used_above_its_section(source: str) -> list[str]:
    """No name is used in a section above the one that defines it."""
    return sorted({text for user, owner, text in _uses_between_sections(source) if user < owner})


def network_and_terminal_mixed(source: str) -> list[str]:
    """Sections 4 to 7 and 8 to 12 do not use each other's names."""
    return sorted(
        text
        for user, owner, text in _uses_between_sections(source)
        if (user in NETWORK and owner in TERMINAL) or (user in TERMINAL and owner in NETWORK)
    )


def io_above_the_line(source: str) -> list[str]:
    """Nothing above the I/O line touches the world, by an import (in a function either) or by a built-in function."""
    limit, out = _io_line(source), []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", limit)
        if line >= limit:
            continue
        names = [node.id] if isinstance(node, ast.Name) else _imported_modules(node)
        out += [f"{name}, line {line}" for name in names if _in(name, IO_NAMES)]
    return out


def costly_imports(source: str) -> list[str]:
    """No module that costs start-up time is imported when the module is, unless for type checking only."""
    tree = ast.parse(source)
    for_typing = {
        id(node) for guard in tree.body if _is_type_checking(guard) and isinstance(guard, ast.If)
        for statement in guard.body for node in [statement, *_own_nodes(statement)]
    }
    return [
        f"{module}, line {getattr(node, 'lineno', 0)}"
        for node in _own_nodes(tree) if id(node) not in for_typing
        for module in _imported_modules(node) if _in(module, COSTLY_MODULES)
    ]


def promised_but_missing(source: str) -> list[str]:
    """Every name in `__all__` exists, is listed once, and is not a private one."""
    promised: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            promised = ast.literal_eval(node.value)
    if not promised:
        return ["there is no __all__"]
    missing = set(promised) - set(_definitions(source))
    return sorted(missing | {name for name in promised if name.startswith("_") or promised.count(name) > 1})


def long_without_docstring(source: str) -> list[str]:
    """Every public function, class and method over five lines has a docstring.

    The handlers of control functions are excepted: the row of the table that names them says what they do.
    """
    tree = ast.parse(source)
    handlers = {
        node.attr for node in _own_nodes(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Emulator"
    }
    return [name for name, node in _public(tree) if _is_long(node) and not ast.get_docstring(node)
            and name not in {f"Emulator.{handler}" for handler in handlers}]


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        for member in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(member, (ast.FunctionDef, ast.ClassDef)) and not member.name.startswith("_"):
                yield f"{node.name}.{member.name}", member


def _is_long(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return (node.end_lineno or node.lineno) - node.lineno + 1 > DOCSTRING_FREE_LINES


# -- each rule on mosh.py, and on a text that breaks it --------------------------------------------------------


def test_the_map_and_the_banners_agree_word_for_word() -> None:
    assert len(_banners(SOURCE)) == 20
    assert map_and_banners_disagree(SOURCE) == []


def test_the_sections_are_in_order() -> None:
    assert sections_out_of_order(SOURCE) == []


def test_every_banner_is_framed() -> None:
    assert banners_badly_framed(SOURCE) == []


def test_the_io_line_is_drawn_where_the_map_says() -> None:
    assert io_line_misplaced(SOURCE) == []


def test_no_name_is_used_above_its_section() -> None:
    assert used_above_its_section(SOURCE) == []


def test_the_network_and_the_terminal_do_not_know_each_other() -> None:
    assert network_and_terminal_mixed(SOURCE) == []


def test_no_io_above_the_line() -> None:
    assert io_above_the_line(SOURCE) == []


def test_no_costly_module_is_imported_at_module_level() -> None:
    assert costly_imports(SOURCE) == []


def test_starting_up_loads_no_costly_module_by_any_way() -> None:
    """What the imports import in turn counts too. -S keeps out what this machine's site-packages load by themselves."""
    code = "import sys; import mosh; print(*sys.modules)"
    command = [sys.executable, "-S", "-c", code]
    loaded = subprocess.run(command, cwd=SOURCE_PATH.parent, capture_output=True, text=True, check=True).stdout.split()
    assert "mosh" in loaded
    assert sorted(COSTLY_MODULES.intersection(loaded)) == []


def test_every_promised_name_exists() -> None:
    assert promised_but_missing(SOURCE) == []


def test_everything_public_and_long_is_documented() -> None:
    assert long_without_docstring(SOURCE) == []


# A module in small: {} takes the map, the header and the bodies of four sections.
RULER = "# " + "=" * 40
SMALL = '''"""A module.

  4. Crypto -- keys
{map}  8. Text -- widths
 15. Cores -- ends
 {io_map}: only below it
 16. Outside -- world
"""
from __future__ import annotations
{header}
{rule}
# == 4. Crypto -- keys
{rule}
{four}
{rule}
# == 8. Text -- widths
{rule}
{eight}
{rule}
# == 15. Cores -- ends
{rule}
{fifteen}
{io}: only below it
import os
{rule}
# == 16. Outside -- world
{rule}
{sixteen}
'''
GOOD = {
    "map": "", "io_map": IO_LINE_IN_MAP, "rule": RULER, "io": IO_LINE,
    "header": "import struct\n__all__ = ['Four']\nTYPE_CHECKING = False\nif TYPE_CHECKING:\n    import typing",
    "four": "class Four:\n    def seal(self):\n        return struct.pack('B', 4)",
    "eight": "EIGHT = 8\ndef width(later: outside) -> outside:\n    outside = EIGHT\n    return outside",
    "fifteen": "class Fifteen(Four):\n    eight = EIGHT\n    def print(self, sink):\n        sink.print(width)",
    "sixteen": "def outside():\n    import argparse\n    print(os.getpid(), Fifteen, argparse)",
}
ALL_RULES: list[Checker] = [
    map_and_banners_disagree, banners_badly_framed, io_line_misplaced, used_above_its_section,
    network_and_terminal_mixed, io_above_the_line, costly_imports, promised_but_missing, long_without_docstring,
]
BROKEN: list[tuple[Checker, dict[str, str], str]] = [
    (map_and_banners_disagree, {"map": "  7. Transport -- timers\n"}, "7. Transport -- timers"),
    (banners_badly_framed, {"rule": ""}, "section 4"),
    (io_line_misplaced, {"io_map": "nothing"}, "the map does not"),
    (io_line_misplaced, {"io": "# nothing"}, "the text does not"),
    (used_above_its_section, {"four": "class Four(Fifteen):\n    pass"}, "Fifteen of section 15 is used in section 4"),
    (used_above_its_section, {"four": "Four = outside"}, "outside of section 16 is used in section 4"),
    (used_above_its_section, {"four": "Four = lambda x: (EIGHT for _ in x)"}, "EIGHT of section 8"),
    (used_above_its_section, {"four": "@width\ndef Four():\n    pass"}, "width of section 8"),
    (used_above_its_section, {"eight": "def width(x=outside):\n    pass\nEIGHT = 8"}, "outside of section 16"),
    (used_above_its_section, {"eight": "class width:\n    def f(self):\n        Fifteen()\nEIGHT = 8"}, "Fifteen"),
    (network_and_terminal_mixed, {"eight": "EIGHT = 8\ndef width():\n    return Four()"}, "Four of section 4"),
    (network_and_terminal_mixed, {"four": "def Four():\n    return EIGHT"}, "EIGHT of section 8"),
    (io_above_the_line, {"eight": "EIGHT = width = time.time()"}, "time, line"),
    (io_above_the_line, {"eight": "EIGHT = 8\ndef width():\n    import os.path"}, "os.path, line"),
    (io_above_the_line, {"eight": "EIGHT = 8\ndef width():\n    from socket import AF_INET"}, "socket, line"),
    (io_above_the_line, {"fifteen": "def Fifteen():\n    return [open(x) for x in ()]"}, "open, line"),
    (io_above_the_line, {"fifteen": "def Fifteen():\n    print(1)"}, "print, line"),
    (costly_imports, {"header": GOOD["header"] + "\nimport argparse"}, "argparse"),
    (costly_imports, {"header": GOOD["header"] + "\ntry:\n    from typing import Any\nfinally:\n    pass"}, "typing"),
    (costly_imports, {"header": "__all__ = ['Four']\nif not TYPE_CHECKING:\n    import logging.handlers"}, "logging"),
    (costly_imports, {"header": "__all__ = ['Four']\nif TYPE_CHECKING:\n    pass\nelse:\n    import locale"}, "locale"),
    (costly_imports, {"eight": "EIGHT = width = 8\nfrom importlib import metadata"}, "importlib.metadata"),
    (promised_but_missing, {"header": "import struct\n__all__ = ['Four', 'Five']"}, "Five"),
    (promised_but_missing, {"header": "import struct\n__all__ = ['Four', 'Four']"}, "Four"),
    (promised_but_missing, {"header": "import struct"}, "no __all__"),
    (long_without_docstring, {"four": "def Four():\n    a = 1\n    b = 2\n    c = 3\n    d = 4\n    return a"}, "Four"),
    (long_without_docstring, {"four": "class Four:\n    def m(self):\n        " + "1\n        " * 5}, "Four.m"),
]


def test_the_small_module_breaks_no_rule() -> None:
    source = SMALL.format(**GOOD)
    assert [(rule.__name__, found) for rule in ALL_RULES if (found := rule(source))] == []


@pytest.mark.parametrize(("rule", "change", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rule_finds_what_breaks_it(rule: Checker, change: dict[str, str], said: str) -> None:
    found = rule(SMALL.format(**{**GOOD, **change}))
    assert any(said in line for line in found), found


def test_a_missing_number_and_a_changed_order_are_found() -> None:
    one, two, four = (f"# == {n}. Title {n} -- text" for n in (1, 2, 4))
    assert sections_out_of_order(f"{one}\n{two}") == []
    assert sections_out_of_order(f"{one}\n{four}") == ["section 4 is number 2"]
    assert sections_out_of_order(f"{two}\n{one}") == ["section 2 is number 1", "section 1 is number 2"]


def test_handlers_in_a_table_need_no_docstring_but_their_neighbours_do() -> None:
    body = "".join(f"        self.x = {n}\n" for n in range(6))
    source = f'class Emulator:\n    """It."""\n    def bel(self):\n{body}    def other(self):\n{body}'
    source += "T = {7: Emulator.bel}\n"
    assert long_without_docstring(source) == ["Emulator.other"]
