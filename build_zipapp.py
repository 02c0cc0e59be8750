#!/usr/bin/env python3
"""Build mosh.pyz: the module mosh.py with all it needs, in one executable file that any Python from 3.9 on runs.

    python3 build_zipapp.py                         # bytecode for every CPython found on this machine
    python3 build_zipapp.py --pythons python3.12    # for this one and the running one only
    python3 build_zipapp.py --native linux-x86_64   # libraries for this platform only; --no-native: none
    python3 build_zipapp.py --source-only           # no bytecode, no libraries: the smallest file, the slowest start

What the archive holds:

    __main__.py             checks the Python version, makes the bytecode findable, calls mosh.main()
    mosh.py                 the module; also what runs when no bytecode fits
    mosh_widths.py          the width of every code point, generated from the wcwidth package
    pyc/<magic>/*.pyc       both modules compiled, one folder for each bytecode format
    natives/<platform>/     AES-OCB for a Python that has none: the libraries of cryptography and cffi
    natives/python/         what of cryptography is written in Python and needed for it
    natives/sha256          the digests of those libraries
    licenses/               the licences of wcwidth, cryptography and cffi

Sections: 1 Metadata, 2 Widths, 3 Interpreters, 4 Bytecode, 5 Natives, 6 Archive, 7 Command line.
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
import tempfile
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
# == 5. Natives -- the parts of the cryptography and cffi wheels that AES-OCB takes
# ==================================================================================================
# A Python whose OpenSSL has no AES-OCB (LibreSSL, FIPS mode, no ctypes) gets it from here. Importing AESOCB3 takes 18
# small Python files, the same for all platforms, and two libraries: one of 14 MB that fits every Python (abi3), and the
# backend of cffi, of which each version needs its own. The wheels come from the package index by pip, once, and count
# only if they are the very ones named here. A wheel for Python 3.10 is asked for where any will do, since for a newer
# one pip takes a build that 3.9 cannot load.

PLATFORMS = {       # as sys.platform and uname call them: as pip does
    "linux-x86_64": "manylinux2014_x86_64",
    "linux-aarch64": "manylinux2014_aarch64",
    "darwin-arm64": "macosx_11_0_arm64",
}


class Wheel(NamedTuple):
    """One wheel of the package index."""

    project: str
    version: str
    python: str         # such as "3.12", or "abi3" for any
    platform: str       # a key of PLATFORMS
    sha256: str

    def __str__(self) -> str:
        return f"{self.project}-{self.version}-{self.python}-{self.platform}.whl"


WHEELS = tuple(Wheel(*row.split()) for row in """\
    cryptography 50.0.2 abi3 linux-x86_64  ee247f5c245c9a2fe7c8e2214e295918838e44e00a45a6718451e4004219e767
    cryptography 50.0.2 abi3 linux-aarch64 c5e67125c7dca78d199ec4e116aa93dbb83494808ecbb8211a2cb09b1bf41dbd
    cryptography 50.0.2 abi3 darwin-arm64  0ec5f09541743261e66e291b4a0cbf0fb2997aeaab6d9e9c740b9dba1b58d1c2
    cffi         2.0.0  3.9  linux-x86_64  61d028e90346df14fedc3d1e5441df818d095f3b87d286825dfcbd6459b7ef63
    cffi         2.0.0  3.9  linux-aarch64 3f4d46d8b35698056ec29bca21546e1551a205058ae1a181d871e278b0b28165
    cffi         2.0.0  3.9  darwin-arm64  de8dad4425a6ca6e4e5e297b27b5c824ecc7581910bf9aee86cb6835e6812aa7
    cffi         2.1.1  3.10 linux-x86_64  194cffa889098ced9976c3fc6340305e43f6303657d298da55366907c05c22d6
    cffi         2.1.1  3.10 linux-aarch64 5a59cc1c4442bc3d5c703bf720b51138d0bfc173618807c9ee2490a7541dd3d9
    cffi         2.1.1  3.10 darwin-arm64  ca82be1a1d406ecfe1d25dc16cb33488e5a16bf4438c9fb590484ea29d92478b
    cffi         2.1.1  3.11 linux-x86_64  34e261f78cb6ceaaa36f42f2613f4380d94d9c759a9c73c769ee6e0247364632
    cffi         2.1.1  3.11 linux-aarch64 3311ed60d36f83378794e1009ac6258bafbf81f7888b4caa7b35a521e3f95813
    cffi         2.1.1  3.11 darwin-arm64  398aff33cee2767e3e781d2554c54bd0dff386bb437581e0d8011fde1a942ec1
    cffi         2.1.1  3.12 linux-x86_64  c1453022f490d2459a11819d83ad1d586e9ff65a12ac3e705ffebd46d3685dcf
    cffi         2.1.1  3.12 linux-aarch64 68e62fe11f30d5ca8289242866f0a5291402d8529ca2178ab8afc5c9694ae890
    cffi         2.1.1  3.12 darwin-arm64  f81b3b8f3d4e343550fa4baa0e479bba9f2d29ce9c2e9b51d1ce1718d7442fcf
    cffi         2.1.1  3.13 linux-x86_64  a931079504ecc49efed7744c476a5c343a92fabf66dec2db95edb1b2fdc770e2
    cffi         2.1.1  3.13 linux-aarch64 f16c709686a78c727bbbf059f92b0bf41c6fc60deec706d2dc19f529175a6125
    cffi         2.1.1  3.13 darwin-arm64  19ee6127ee34de7d83ce3d371ebc5ed91addbdcc39f9ab15ce4eb35a4e534971
    cffi         2.1.1  3.14 linux-x86_64  b0431303acaea1089ad4b3e9ce4e6518193def1118d4073ca848635ee4ea2e96
    cffi         2.1.1  3.14 linux-aarch64 58acb8ab8e295e6c5ea12f888cbb13cf21511ef2a3303a23f4325c29d17fe5c1
    cffi         2.1.1  3.14 darwin-arm64  661c298b4821edebead0c91edd2b00374d67ad7c5a1f7a91d4442633b79d6a72
""".splitlines())

_RUST_LIBRARY = "cryptography/hazmat/bindings/_rust.abi3.so"
_CFFI_LIBRARY = re.compile(r"_cffi_backend\.[-\w]+\.so")
_LICENSE = re.compile(r"[^/]+\.dist-info/licenses/([^/]+)")
_AESOCB3_MODULES = tuple(f"cryptography/{name}.py" for name in (
    "__init__", "__about__", "exceptions", "utils", "hazmat/__init__", "hazmat/bindings/__init__",
    "hazmat/decrepit/__init__", "hazmat/decrepit/ciphers/__init__", "hazmat/decrepit/ciphers/algorithms",
    "hazmat/decrepit/ciphers/modes", "hazmat/primitives/__init__", "hazmat/primitives/_cipheralgorithm",
    "hazmat/primitives/_modes", "hazmat/primitives/ciphers/__init__", "hazmat/primitives/ciphers/aead",
    "hazmat/primitives/ciphers/algorithms", "hazmat/primitives/ciphers/base", "hazmat/primitives/ciphers/modes",
))


class WheelsMissing(BuildError):
    """The wheels are not here and cannot be fetched."""


def sha256(data: bytes) -> str:
    """Return the digest in hex."""
    return hashlib.sha256(data).hexdigest()


def fetch(wheel: Wheel, folder: Path) -> bytes:
    """Return a wheel, from `folder` if it is there. Raises WheelsMissing, or BuildError if it is another one."""
    path = folder / str(wheel)
    try:
        data = path.read_bytes()
        if sha256(data) == wheel.sha256:
            return data
    except OSError:
        pass
    python = ["3.10", "--abi", "abi3"] if wheel.python == "abi3" else [wheel.python]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            result = subprocess.run(
                [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                 "--retries", "1", "--timeout", "10", "--only-binary=:all:", "--dest", draft,
                 "--platform", PLATFORMS[wheel.platform], "--implementation", "cp",
                 "--python-version", *python, f"{wheel.project}=={wheel.version}"],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            )
            found = next(Path(draft).glob("*.whl"), None)
            if found is None:
                reason = result.stderr.strip().rpartition("\n")[2] or f"pip ended with status {result.returncode}"
                raise WheelsMissing(f"cannot fetch {wheel.project} {wheel.version} for {wheel.platform}: {reason}")
            data = found.read_bytes()
            if sha256(data) != wheel.sha256:
                raise BuildError(f"{found.name} from the package index is not the file that is pinned: {sha256(data)}")
            found.replace(path)
    except OSError as error:
        raise WheelsMissing(f"cannot keep wheels in {folder}: {error.strerror}") from error
    return data


def wheel_parts(wheel: Wheel, data: bytes) -> dict[str, bytes]:
    """Return what the archive takes from a wheel, by name there. Raises BuildError if something is not in it."""
    libraries, modules, licenses = {}, {}, {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for name in file.namelist():
                notice = _LICENSE.fullmatch(name)
                if notice:
                    licenses[f"licenses/{wheel.project}-{wheel.version}/{notice[1]}"] = file.read(name)
                elif name == _RUST_LIBRARY or _CFFI_LIBRARY.fullmatch(name):
                    libraries[f"natives/{wheel.platform}/{name}"] = file.read(name)
                elif name in _AESOCB3_MODULES:
                    modules[f"natives/python/{name}"] = file.read(name)
    except zipfile.BadZipFile as error:
        raise BuildError(f"{wheel} cannot be read: {error}") from error
    whole = len(_AESOCB3_MODULES) if wheel.project == "cryptography" else 0
    if len(libraries) != 1 or len(modules) != whole or not licenses:
        raise BuildError(f"{wheel} lacks a library, a module or its licence")
    return {**libraries, **modules, **licenses}


def natives(platforms: Iterable[str], folder: Path, wheels: Iterable[Wheel] = WHEELS) -> dict[str, bytes]:
    """Return the members for `platforms`, with wheels from `folder`, by pip if need be. Raises BuildError."""
    content: dict[str, bytes] = {}
    for wheel in wheels:
        if wheel.platform not in platforms:
            continue
        for name, data in wheel_parts(wheel, fetch(wheel, folder)).items():
            if content.setdefault(name, data) != data:
                raise BuildError(f"{name.partition('/')[2]} is not the same in all wheels")
    libraries = {name.partition("/")[2]: data for name, data in sorted(content.items()) if name.endswith(".so")}
    if libraries:
        index = "".join(f"{sha256(data)}  {name}\n" for name, data in libraries.items())
        content["natives/sha256"] = index.encode()
    return content


# ==================================================================================================
# == 6. Archive -- the members, written so that the same input gives the same bytes
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
            # Level 9 makes libraries 0.5 % smaller and takes 4 s for them instead of 1.4.
            level = 6 if name.endswith(".so") else 9
            file.writestr(info, data, compress_type=zipfile.ZIP_DEFLATED, compresslevel=level)
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
# == 7. Command line
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
    bytecode.add_argument("--source-only", action="store_true", help="add no bytecode, and libraries only by --native")
    native = parser.add_mutually_exclusive_group()
    native.add_argument(
        "--native", metavar="PLATFORM", nargs="+", choices=PLATFORMS,
        help=f"add libraries for these of {', '.join(PLATFORMS)} (default: for all, if their wheels can be fetched)")
    native.add_argument("--no-native", action="store_true", help="add no libraries")
    parser.add_argument(
        "--wheels", metavar="DIR", type=Path, default=HERE / ".venv" / "wheels", help="where to keep fetched wheels")
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


def choose_natives(options: argparse.Namespace) -> tuple[dict[str, bytes], str]:
    """Return (members, what to say of them). Raises BuildError if they were asked for by name and cannot be had."""
    if options.native is None and (options.no_native or options.source_only):
        return {}, "none"
    platforms = options.native or list(PLATFORMS)
    try:
        members = natives(platforms, options.wheels)
    except WheelsMissing as error:
        if options.native:
            raise
        return {}, f"none, and none are needed where Python's own OpenSSL has AES-OCB ({error})"
    versions = dict.fromkeys(f"{wheel.project} {wheel.version}" for wheel in WHEELS)
    return members, f"{', '.join(versions)} for {', '.join(name for name in PLATFORMS if name in platforms)}"


def build(options: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises BuildError."""
    started = time.monotonic()
    source = read_source(options.source)
    metadata = script_metadata(source.decode(errors="replace"))
    check_wcwidth(metadata)
    if options.check:
        return
    interpreters = [] if options.source_only else choose_interpreters(options.pythons, metadata.requires_python)
    native_members, natives_text = choose_natives(options)
    content = {**members(source, metadata.requires_python, interpreters), **native_members}
    data = archive(content)
    output = options.output or options.source / "mosh.pyz"
    write_executable(output, data)
    print(f"widths:   wcwidth {wcwidth_version()}, Unicode {unicode_version()}")
    print(f"bytecode: {', '.join(map(str, interpreters)) or 'none'}")
    print(f"natives:  {natives_text}")
    print(f"output:   {output}, {len(data)} bytes")
    print(f"sha256:   {hashlib.sha256(data).hexdigest()}")
    print(f"content:  {content_hash(content)}")
    print(f"took:     {time.monotonic() - started:.1f} s")


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
