#!/usr/bin/env python3
"""Build mosh.pyz: the module mosh.py with all it needs, in one executable file that any Python from 3.9 on runs.

    python3 build_zipapp.py                         # bytecode for every CPython found on this machine
    python3 build_zipapp.py --pythons python3.12    # for this one and the running one only
    python3 build_zipapp.py --source-only           # no bytecode: the smallest file, the slowest start

What the archive holds:

    __main__.py             checks the Python version, makes the bytecode findable, calls mosh.main()
    mosh.py                 the module; also what runs when no bytecode fits
    mosh_widths.py          the width of every code point, generated from the wcwidth package
    licenses/wcwidth.txt    the licence of the package that table comes from
    pyc/<magic>/*.pyc       both modules compiled, one folder for each bytecode format

Sections: 1 Metadata, 2 Widths, 3 Interpreters, 4 Bytecode, 5 Archive, 6 Command line.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from ast import literal_eval
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class BuildError(Exception):
    """The archive cannot be built; the text says why in one line."""


# ==================================================================================================
# == 1. Metadata -- what mosh.py says about the Python and the packages it needs
# ==================================================================================================
# The needs are named once, in the comment block that PEP 723 defines at the top of mosh.py, so that `uv run mosh.py`
# and this file cannot disagree. The block is TOML, but tomllib came with 3.11 only; the two keys read here are a plain
# string and a list of plain strings, which Python and TOML write alike.

Version = tuple[int, ...]

_BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$")
_SPECIFIER = re.compile(r"(>=|<=|==|!=|>|<)\s*([0-9]+(?:\.[0-9]+)*)")


class Metadata(NamedTuple):
    """The PEP 723 block of mosh.py."""

    requires_python: str            # such as ">=3.9"
    dependencies: dict[str, str]    # package name to version specifiers, such as {"wcwidth": ">=0.6,<1"}


def script_metadata(source: str) -> Metadata:
    """Read the PEP 723 block of a module's source. Raises BuildError if there is none or a key is missing."""
    block = _BLOCK.search(source)
    if block is None:
        raise BuildError("mosh.py has no '# /// script' block that names its packages (PEP 723)")
    toml = "".join(line[2:] for line in block["content"].splitlines(keepends=True))
    requires_python = _toml_value(toml, "requires-python", r'"[^"\n]*"')
    dependencies = _toml_value(toml, "dependencies", r"\[[^]]*\]")
    if not isinstance(requires_python, str) or not isinstance(dependencies, list):
        raise BuildError("the '# /// script' block of mosh.py has a value of the wrong type")
    return Metadata(requires_python, dict(_split_requirement(str(text)) for text in dependencies))


def _toml_value(toml: str, key: str, pattern: str) -> object:
    found = re.search(rf"(?m)^{key}\s*=\s*({pattern})", toml)
    if found is None:
        raise BuildError(f"the '# /// script' block of mosh.py has no {key}")
    try:
        value: object = literal_eval(found[1])
    except (SyntaxError, ValueError):
        raise BuildError(f"the '# /// script' block of mosh.py has a {key} that is not plain strings") from None
    return value


def _split_requirement(text: str) -> tuple[str, str]:
    name = re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", text)
    if name is None:
        raise BuildError(f"mosh.py names a package without a name: {text!r}")
    return name[0], text[name.end():].strip()


def parse_version(text: str) -> Version:
    """Return the leading numbers of a version: "0.6.1rc1" is (0, 6, 1); trailing zeros do not count."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", re.match(r"[0-9.]*", text)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, specifiers: str) -> bool:
    """True if `version` meets all of `specifiers`, such as ">=0.6,<1". Raises BuildError for one it cannot read."""
    have = parse_version(version)
    for text in filter(None, (part.strip() for part in specifiers.split(","))):
        specifier = _SPECIFIER.fullmatch(text)
        if specifier is None:
            raise BuildError(f"mosh.py uses a version specifier this builder does not know: {text!r}")
        want = parse_version(specifier[2])
        if not {
            ">=": have >= want, "<=": have <= want, "==": have == want,
            "!=": have != want, ">": have > want, "<": have < want,
        }[specifier[1]]:
            return False
    return True


# ==================================================================================================
# == 2. Widths -- the table of wcwidth as a small generated module
# ==================================================================================================
# Importing wcwidth costs 28 ms CPU and a quarter of a megabyte in the archive, for a function from code point to one
# of four values. It has about a thousand runs of equal value: as starts to bisect and a byte each, that is 3 KB.

CODE_POINT_COUNT = 0x110000
_LINE_WIDTH = 110       # characters of table on one line of the generated module


def wcwidth_version() -> str:
    """Return the version of the wcwidth package that this interpreter imports. Raises BuildError if there is none."""
    try:
        import wcwidth
    except ImportError:
        raise BuildError(f"{sys.executable} has no package wcwidth (plain `make` fetches it)") from None
    return str(wcwidth.__version__)


def unicode_version() -> str:
    """Return the version of Unicode that the table of the wcwidth package follows."""
    import wcwidth
    return str(wcwidth.list_versions()[-1])


def width_runs() -> list[tuple[int, int]]:
    """Return (first code point, width) of every run of equal `wcwidth.wcwidth`; the first run starts at 0."""
    import wcwidth
    runs: list[tuple[int, int]] = []
    last = None
    for code_point in range(CODE_POINT_COUNT):
        # "latest" is what wcwidth does by itself since 0.5; older ones would ask the environment.
        width = wcwidth.wcwidth(chr(code_point), "latest")
        if width != last:
            runs.append((code_point, width))
            last = width
    return runs


def widths_module() -> str:
    """Return the source of mosh_widths.py."""
    runs = width_runs()
    starts = "".join(_wrapped([f"0x{start:x}," for start, _ in runs], joiner=" "))
    widths = "".join(_wrapped([f"\\x{width + 1:02x}" for _, width in runs], before='b"', after='"'))
    return (
        f'"""The width of every code point by wcwidth {wcwidth_version()}, Unicode {unicode_version()}.\n\n'
        "Generated by build_zipapp.py. Run i covers STARTS[i] up to STARTS[i + 1] (the last one, up to 0x110000);\n"
        "its code points are WIDTHS[i] - 1 columns wide, where -1 is for those that cannot be printed.\n"
        '"""\n\n'
        f'VERSION = "{wcwidth_version()}"\n'
        f'UNICODE = "{unicode_version()}"\n'
        f"STARTS = (\n{starts})\n"
        f"WIDTHS = (\n{widths})\n"
    )


def _wrapped(words: Iterable[str], joiner: str = "", before: str = "", after: str = "") -> list[str]:
    """Return `words` joined into indented lines, each between `before` and `after`."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(joiner) + len(word) > _LINE_WIDTH:
            lines.append("")
        lines[-1] += joiner + word if lines[-1] else word
    return [f"    {before}{line}{after}\n" for line in lines]


# The table is made from wcwidth's, so its notice has to travel with it. This is the LICENSE file of wcwidth 0.9.4.
WCWIDTH_LICENSE = """\
The MIT License (MIT)

Copyright (c) 2014 Jeff Quast <contact@jeffquast.com>

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

Markus Kuhn -- 2007-05-26 (Unicode 5.0)

Permission to use, copy, modify, and distribute this software
for any purpose and without fee is hereby granted. The author
disclaims all warranties with regard to this software.
"""


# ==================================================================================================
# == 3. Interpreters -- which bytecode formats can be made on this machine
# ==================================================================================================
# Bytecode is nine tenths of a fast start, and only the interpreter it is for can write it. So each one found here is
# asked; a missing one costs its users 0.1 s per start and nothing else. Formats, not versions, count: all releases of
# 3.12 share one, so of two such interpreters the newer one compiles.

PYTHON_NAMES = ("python3", *(f"python3.{minor}" for minor in range(9, 15)))
PROBE_LIMIT_S = 20      # an interpreter that has not told its version by then is skipped

_PROBE = """\
import sys, _frozen_importlib_external
sys.stdout.write("%s %d.%d.%d %s %s" % (
    (sys.implementation.name,) + sys.version_info[:3]
    + (_frozen_importlib_external.MAGIC_NUMBER[:2].hex(), sys.executable)))
"""


class Interpreter(NamedTuple):
    """A CPython that can write bytecode for the archive."""

    version: str        # "3.12.1"
    magic: str          # the two telling bytes of its bytecode format in hex, "cb0d"
    path: str

    def __str__(self) -> str:
        return f"{self.version} ({self.magic})"


def clean_environment() -> dict[str, str]:
    """Return the environment for interpreters that take part: nothing in it changes what they write."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # 3.9 and 3.10 write the members of constant sets in hash order.
    return {**kept, "PYTHONHASHSEED": "0"}


def probe(command: str) -> Interpreter | None:
    """Ask an interpreter what it is; None if it does not run or is no CPython 3."""
    try:
        answer = subprocess.run(
            [command, "-S", "-B", "-c", _PROBE], env=clean_environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PROBE_LIMIT_S, check=True,
        ).stdout.decode()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    name, *rest = answer.split(" ", 3)
    return Interpreter(*rest) if name == "cpython" and len(rest) == 3 else None


def search() -> list[str]:
    """Return the commands that may be a usable interpreter, on PATH and among pyenv's versions."""
    on_path = [path for path in map(shutil.which, PYTHON_NAMES) if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    return on_path + sorted(map(str, pyenv.glob("versions/*/bin/python3")))


def choose_interpreters(named: Sequence[str] | None, requires_python: str) -> list[Interpreter]:
    """Return one interpreter for each bytecode format, oldest first: the running one and `named`, or all (None).

    Raises BuildError if a named one does not run or is too old.
    """
    candidates = []
    for command in (sys.executable, *(search() if named is None else named)):
        found = probe(command)
        if found is not None and satisfies(found.version, requires_python):
            candidates.append(found)
        elif named is not None and command in named:
            what = f"Python {found.version}" if found else "no CPython that runs"
            raise BuildError(f"{command} is {what}; mosh.py needs {requires_python}")
    best: dict[str, Interpreter] = {}
    for found in candidates:
        rival = best.get(found.magic)
        if rival is None or parse_version(found.version) > parse_version(rival.version):
            best[found.magic] = found
    return sorted(best.values(), key=lambda interpreter: parse_version(interpreter.version))


# ==================================================================================================
# == 4. Bytecode -- compiled modules that stay valid in any zip, time zone and place
# ==================================================================================================
# The usual .pyc carries the time of its source, which zipimport compares with the local time in the archive: in another
# time zone it would be thrown away, silently. An "unchecked hash" .pyc (PEP 552) is taken as it is. A .pyc of the wrong
# format is an error that ends the search for the module, unless its source lies beside it; hence a folder for each
# format, of which __main__ puts only the fitting one on the path.

_COMPILE = """\
import sys
sys.path.pop(0)         # the current folder is no part of the input
import importlib.util
import marshal
source = sys.stdin.buffer.read()
code = compile(source, sys.argv[1], "exec", dont_inherit=True, optimize=0)
unchecked_hash = (1).to_bytes(4, "little")
header = importlib.util.MAGIC_NUMBER + unchecked_hash + importlib.util.source_hash(source)
sys.stdout.buffer.write(header + marshal.dumps(code))
"""


def compiled(interpreter: Interpreter, name: str, source: bytes) -> bytes:
    """Return the .pyc of the module file `name`, written by a fresh `interpreter`. Raises BuildError."""
    # A fixed name in tracebacks, since the place of the build must not show.
    # Without the columns of every operation, which 3.11 added for tracebacks, it is a quarter smaller.
    command = [interpreter.path, "-S", "-B", "-X", "no_debug_ranges", "-c", _COMPILE, f"mosh.pyz/{name}"]
    result = subprocess.run(
        command, env=clean_environment(), input=source, capture_output=True, check=False,
    )
    if result.returncode != 0:
        reason = result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise BuildError(f"Python {interpreter.version} cannot compile {name}: {reason}")
    return result.stdout


# ==================================================================================================
# == 5. Archive -- the members, written so that the same input gives the same bytes
# ==================================================================================================
# A zip file records an order, dates, modes and the system it was made on; all are fixed here. Folders get no entry.
# What is left is zlib itself, some builds of which deflate differently: the content hash is the same even then.

SHEBANG = b"#!/usr/bin/env python3\n"
DOS_EPOCH = 315_532_800         # 1980-01-01, the first day a zip file can record
DOS_LAST = 4_354_819_198        # 2107-12-31, the last one

# Read by any Python since 2.7, so that an old one ends with this line instead of a syntax error.
_MAIN = """\
import sys

if sys.version_info < {minimum}:
    sys.exit("mosh.pyz needs Python {minimum_text} or newer, this is %d.%d.%d" % sys.version_info[:3])

# importlib.util has the same constant, but importing it costs 1 to 9 ms. A folder that is not there is skipped.
from _frozen_importlib_external import MAGIC_NUMBER

sys.path.insert(0, sys.path[0] + "/pyc/" + MAGIC_NUMBER[:2].hex())

import gc

gc.disable()    # what is loaded now stays: looking for garbage in it takes 1 ms
import mosh
import mosh_widths  # now, not when the first character needs it: by then this file may have been replaced

gc.enable()
sys.exit(mosh.main())
"""


def main_module(requires_python: str) -> str:
    """Return the source of __main__.py."""
    lower_bound = re.search(r">=\s*([0-9]+)\.([0-9]+)", requires_python)
    if lower_bound is None:
        raise BuildError(f"requires-python of mosh.py names no oldest version: {requires_python!r}")
    major, minor = lower_bound.groups()
    return _MAIN.format(minimum=f"({major}, {minor})", minimum_text=f"{major}.{minor}")


def members(source: bytes, requires_python: str, interpreters: Sequence[Interpreter]) -> dict[str, bytes]:
    """Return what the archive holds, by name; `source` is that of mosh.py."""
    modules = {"mosh.py": source, "mosh_widths.py": widths_module().encode()}
    return {
        "__main__.py": main_module(requires_python).encode(),
        "licenses/wcwidth.txt": WCWIDTH_LICENSE.encode(),
        **modules,
        **{
            f"pyc/{interpreter.magic}/{name}c": compiled(interpreter, name, text)
            for interpreter in interpreters for name, text in modules.items()
        },
    }


def content_hash(content: Mapping[str, bytes]) -> str:
    """Return a sha256 over names and contents, in hex; it does not depend on how they are compressed."""
    lines = (f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(content.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def archive_date() -> tuple[int, int, int, int, int, int]:
    """Return the date of every member: SOURCE_DATE_EPOCH if it is set, else the first day a zip file can record."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or str(DOS_EPOCH)
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BuildError(f"SOURCE_DATE_EPOCH is not a number of seconds: {text!r}")
    moment = time.gmtime(min(max(int(text), DOS_EPOCH), DOS_LAST))
    return moment[:6]


def archive(content: Mapping[str, bytes]) -> bytes:
    """Return the bytes of mosh.pyz."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    date = archive_date()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in sorted(content.items()):
            info = zipfile.ZipInfo(name, date)
            info.create_system = 3                  # Unix, wherever this runs
            info.external_attr = 0o100644 << 16     # a plain file
            file.writestr(info, data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()


def write_executable(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step, so that a running mosh.pyz never sees half a file. Raises BuildError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            draft.write_bytes(data)
            draft.chmod(0o755)      # whatever the umask is
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error.strerror}") from error


# ==================================================================================================
# == 6. Command line
# ==================================================================================================

def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; argparse ends the process with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        description="Build mosh.pyz. The same mosh.py, wcwidth and interpreters give the same bytes.",
        epilog="SOURCE_DATE_EPOCH in the environment dates the members of the archive (default: 1980-01-01).",
    )
    parser.add_argument(
        "--source", metavar="DIR", type=Path, default=HERE, help="folder of mosh.py (default: this program's)")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="what to write (default: mosh.pyz beside mosh.py)")
    bytecode = parser.add_mutually_exclusive_group()
    bytecode.add_argument(
        "--pythons", metavar="PYTHON", nargs="*",
        help="add bytecode for these and the running interpreter only (default: all on PATH and of pyenv)")
    bytecode.add_argument("--source-only", action="store_true", help="add no bytecode")
    parser.add_argument(
        "--check", action="store_true", help="build nothing; succeed if this interpreter has the wcwidth it takes")
    return parser.parse_args(arguments)


def read_source(folder: Path) -> bytes:
    """Return mosh.py as it is in `folder`. Raises BuildError."""
    path = folder / "mosh.py"
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror}") from error


def check_wcwidth(metadata: Metadata) -> None:
    """Raise BuildError unless the wcwidth package is there, as new as mosh.py asks for."""
    version, wanted = wcwidth_version(), metadata.dependencies.get("wcwidth", "")
    if not satisfies(version, wanted):
        raise BuildError(f"{sys.executable} has wcwidth {version}, mosh.py needs {wanted} (plain `make` fetches it)")


def build(options: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises BuildError."""
    source = read_source(options.source)
    metadata = script_metadata(source.decode(errors="replace"))
    check_wcwidth(metadata)
    if options.check:
        return
    interpreters = [] if options.source_only else choose_interpreters(options.pythons, metadata.requires_python)
    content = members(source, metadata.requires_python, interpreters)
    data = archive(content)
    output = options.output or options.source / "mosh.pyz"
    write_executable(output, data)
    print(f"widths:   wcwidth {wcwidth_version()}, Unicode {unicode_version()}")
    print(f"bytecode: {', '.join(map(str, interpreters)) or 'none'}")
    print(f"output:   {output}, {len(data)} bytes")
    print(f"sha256:   {hashlib.sha256(data).hexdigest()}")
    print(f"content:  {content_hash(content)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 for success, 1 for a build that failed (argparse itself exits with 2)."""
    try:
        build(parse_arguments(arguments))
    except BuildError as error:
        print(f"build_zipapp.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
