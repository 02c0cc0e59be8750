"""The archive: it runs anywhere, it is the same wherever it was built, and its bytecode and widths are the right ones.

Most tests build from a stand-in for mosh.py, which tells where it was loaded from; only the first takes the real one.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import wcwidth

import build_zipapp
from build_zipapp import BuildError, Interpreter

ROOT = Path(build_zipapp.__file__).resolve().parent
OLD_PYTHONS = ("2.7", "3.6", "3.7", "3.8")
ANY_PYTHON = ">=3.9"
INTERPRETERS = build_zipapp.choose_interpreters(None, ANY_PYTHON)

# Sets and repeated strings are what compilers have written in varying order.
STAND_IN = '''\
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography>=42", "wcwidth>=0.2"]
# ///
"""A stand-in for mosh.py."""
import sys

import mosh_widths


def main():
    known = sys.argv[-1] in {"alpha", "beta", "gamma", "delta", "epsilon", "zeta"}
    print(ascii([__file__, mosh_widths.__file__, main.__code__.co_filename, sys.argv, known]))
    return 7
'''

each_interpreter = pytest.mark.parametrize("python", INTERPRETERS, ids=str)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for mosh.py and the mosh.pyz built from it, with bytecode for every interpreter."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "mosh.py").write_text(STAND_IN)
    assert build_zipapp.main(["--source", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def real_pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mosh.pyz built from the real mosh.py, with bytecode for every interpreter."""
    path = tmp_path_factory.mktemp("real") / "mosh.pyz"
    assert build_zipapp.main(["--source", str(ROOT), "--output", str(path)]) == 0
    return path


def run(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)


def loaded_from(result: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Return the files that the stand-in and its mosh_widths were loaded from."""
    assert (result.returncode, result.stderr) == (7, "")
    names = re.findall(r"'([^']*)'", result.stdout)
    return names[0], names[1]


def changed(pyz: Path, to: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy an archive, each member replaced by what `change` makes of it; None drops it."""
    with zipfile.ZipFile(pyz) as old, zipfile.ZipFile(to, "w") as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info, data)
    return to


def contents(pyz: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(pyz) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}


# -- It runs -----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not (ROOT / "mosh.py").exists(), reason="there is no mosh.py")
@each_interpreter
def test_a_bare_interpreter_runs_it(real_pyz: Path, python: Interpreter) -> None:
    for option in ("--version", "--help"):
        result = run([python.path, "-I", "-S", real_pyz, option])
        assert result.returncode == 0
        assert "mosh" in (result.stdout + result.stderr).lower()
        assert "Traceback" not in result.stderr


def test_it_is_a_program_and_passes_arguments_and_the_exit_code_on(stand_in: Path) -> None:
    result = run([stand_in / "mosh.pyz", "user@host", "--", "two words", "beta"], cwd="/")
    assert loaded_from(result)
    assert result.stdout.endswith("'user@host', '--', 'two words', 'beta'], True]\n")


def test_it_runs_read_only_from_an_odd_path_and_through_a_link(stand_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mit Leerzeichen und ünïcode 你好"
    folder.mkdir()
    pyz = folder / "mosh.pyz"
    shutil.copy(stand_in / "mosh.pyz", pyz)
    link = folder / "mosh-server"
    link.symlink_to(pyz)
    pyz.chmod(0o444)
    folder.chmod(0o555)
    try:
        for name in (pyz, link):
            result = run([sys.executable, "-I", "-S", name, "new"])
            assert all("/pyc/" in path for path in loaded_from(result))
            assert f"/{name.name}', 'new']" in result.stdout
        assert sorted(path.name for path in folder.iterdir()) == ["mosh-server", "mosh.pyz"]
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(("name", "words", "said"), [
    ("mosh", ["--version"], "mosh.py"), ("mosh-server", ["--help"], "usage: mosh-server new"),
    ("mosh-client", ["--help"], "usage: mosh-client IP PORT"), ("any name", ["server", "--help"], "mosh-server new"),
])
def test_its_name_says_which_program_it_is(
        real_pyz: Path, tmp_path: Path, name: str, words: list[str], said: str) -> None:
    folder = tmp_path / "mit Leerzeichen und ünïcode 你好"
    folder.mkdir()
    link = folder / name
    link.symlink_to(real_pyz)
    result = run([sys.executable, link, *words])
    assert (result.returncode, result.stderr) == (0, "")
    assert said in result.stdout


def test_it_can_be_replaced_while_it_runs(tmp_path: Path) -> None:
    """A session may last for months; what it loads late must not come from a file that is another one by then."""
    (tmp_path / "mosh.py").write_text(STAND_IN.partition("import sys\n")[0] + (
        "import sys\n\n\ndef main():\n    open(sys.argv[0], 'wb').close()\n"
        "    import mosh_widths\n    print(len(mosh_widths.STARTS))\n    return 0\n"))
    assert build_zipapp.main(["--source", str(tmp_path), "--source-only"]) == 0
    result = run([sys.executable, "-I", tmp_path / "mosh.pyz"])
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) == len(build_zipapp.width_runs())
    assert (tmp_path / "mosh.pyz").stat().st_size == 0


def test_verbose_version_names_the_build_and_what_it_works_with(real_pyz: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pyz"
    shutil.copy(real_pyz, copy)
    said = [run([sys.executable, "-IS", path, "--version", "-v"]).stdout for path in (real_pyz, copy)]
    assert said[0] == said[1]
    lines = dict(line.split(":", 1) for line in said[0].splitlines()[1:])
    assert re.fullmatch(r" +[0-9a-f]{64}", lines["build"])
    assert f"wcwidth {wcwidth.__version__}" in lines["widths"]
    assert lines["crypto"].strip() in ("libcrypto", "cryptography")


def test_it_runs_from_a_descriptor(stand_in: Path) -> None:
    if not Path("/dev/fd").exists():
        pytest.skip("this system has no /dev/fd")
    descriptor = os.open(stand_in / "mosh.pyz", os.O_RDONLY)
    try:
        result = run([sys.executable, "-I", "-S", f"/dev/fd/{descriptor}"], pass_fds=[descriptor])
    finally:
        os.close(descriptor)
    assert all("/pyc/" in path for path in loaded_from(result))


@pytest.mark.parametrize("version", OLD_PYTHONS)
def test_an_old_python_is_told_what_it_lacks(stand_in: Path, version: str) -> None:
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = next(iter(sorted(pyenv.glob(f"versions/{version}.*/bin/python"))), None) or shutil.which(f"python{version}")
    if found is None:
        pytest.skip(f"there is no Python {version} here")
    result = run([found, stand_in / "mosh.pyz", "--version"])
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        rf"mosh\.pyz needs Python 3\.9 or newer, this is {re.escape(version)}\.[0-9]+\n", result.stderr)


# -- Bytecode ----------------------------------------------------------------------------------------------------------

@each_interpreter
def test_each_interpreter_runs_its_bytecode_and_not_the_source(
        stand_in: Path, tmp_path: Path, python: Interpreter) -> None:
    pyz = changed(stand_in / "mosh.pyz", tmp_path / "mosh.pyz", lambda name, data: (
        b"this is not Python" if name in ("mosh.py", "mosh_widths.py") else data))
    for zone in ("UTC", "Asia/Tokyo"):
        result = run([python.path, "-I", "-S", pyz], env={**os.environ, "TZ": zone})
        folder = f"{pyz}/pyc/{python.magic}"
        assert loaded_from(result) == (f"{folder}/mosh.pyc", f"{folder}/mosh_widths.pyc")
        assert "'mosh.pyz/mosh.py'" in result.stdout    # no trace of the folder it was built in


@each_interpreter
def test_each_interpreter_runs_the_source_when_its_bytecode_is_not_there(
        stand_in: Path, tmp_path: Path, python: Interpreter) -> None:
    pyz = changed(stand_in / "mosh.pyz", tmp_path / "mosh.pyz", lambda name, data: (
        None if python.magic in name else data))
    assert loaded_from(run([python.path, "-I", "-S", pyz])) == (f"{pyz}/mosh.py", f"{pyz}/mosh_widths.py")


def test_source_only_has_no_bytecode_and_runs(stand_in: Path, tmp_path: Path) -> None:
    pyz = tmp_path / "slim.pyz"
    assert build_zipapp.main(["--source", str(stand_in), "--output", str(pyz), "--source-only"]) == 0
    assert list(contents(pyz)) == ["__main__.py", "licenses/wcwidth.txt", "mosh.py", "mosh_widths.py"]
    assert loaded_from(run([pyz])) == (f"{pyz}/mosh.py", f"{pyz}/mosh_widths.py")


def test_of_two_interpreters_with_one_bytecode_format_the_newer_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        sys.executable: Interpreter("3.12.4", "cb0d", "running"),
        "new": Interpreter("3.12.10", "cb0d", "new"),
        "oldest": Interpreter("3.9.2", "610d", "oldest"),
        "too old": Interpreter("3.8.18", "550d", "too old"),
    }
    monkeypatch.setattr(build_zipapp, "probe", answers.get)
    monkeypatch.setattr(build_zipapp, "search", lambda: [*answers, "broken"])
    assert [python.path for python in build_zipapp.choose_interpreters(None, ANY_PYTHON)] == ["oldest", "new"]
    assert [python.path for python in build_zipapp.choose_interpreters([], ANY_PYTHON)] == ["running"]
    with pytest.raises(BuildError, match=r"too old is Python 3\.8\.18; mosh\.py needs >=3\.9"):
        build_zipapp.choose_interpreters(["too old"], ANY_PYTHON)
    with pytest.raises(BuildError, match="broken is no CPython that runs"):
        build_zipapp.choose_interpreters(["broken"], ANY_PYTHON)


# -- Same input, same bytes --------------------------------------------------------------------------------------------

def test_place_mask_zone_and_hash_seed_do_not_change_a_byte(tmp_path: Path) -> None:
    built = []
    for name, mask, zone, seed in (("a", 0o022, "UTC", "1"), ("b c", 0o077, "Asia/Tokyo", "2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mosh.py").write_text(STAND_IN)
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed, "LC_ALL": "C", f"EXTRA_{name[0]}": name}
        result = run(
            [sys.executable, ROOT / "build_zipapp.py", "--source", "."], cwd=folder, umask=mask, env=environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert (folder / "mosh.pyz").stat().st_mode & 0o777 == 0o755
        built.append((result.stdout, (folder / "mosh.pyz").read_bytes()))
    assert built[0] == built[1]


@pytest.mark.parametrize("python", [INTERPRETERS[0], INTERPRETERS[-1]], ids=str)
def test_any_interpreter_builds_the_same_content(stand_in: Path, tmp_path: Path, python: Interpreter) -> None:
    # Its own wcwidth may be another one or missing, so it borrows this one's pure Python part.
    packages = tmp_path / "packages"
    shutil.copytree(Path(wcwidth.__file__).parent, packages / "wcwidth", ignore=shutil.ignore_patterns("*.so"))
    output = tmp_path / "mosh.pyz"
    command: list[str | Path] = [
        python.path, "-S", ROOT / "build_zipapp.py", "--source", stand_in, "--output", output,
        "--pythons", *(other.path for other in INTERPRETERS)]
    result = run(command, env={**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(output) == contents(stand_in / "mosh.pyz")


def test_the_members_carry_nothing_of_the_machine(stand_in: Path) -> None:
    data = (stand_in / "mosh.pyz").read_bytes()
    assert data.startswith(b"#!/usr/bin/env python3\nPK")
    with zipfile.ZipFile(stand_in / "mosh.pyz") as file:
        assert file.namelist() == sorted(file.namelist())
        for info in file.infolist():
            assert not info.is_dir()
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.create_system, info.external_attr, info.extra) == (3, 0o100644 << 16, b"")
        for name, member in contents(stand_in / "mosh.pyz").items():
            assert str(stand_in).encode() not in member, name
            assert str(ROOT).encode() not in member, name


@pytest.mark.parametrize(("epoch", "date"), [
    ("1700000000", (2023, 11, 14, 22, 13, 20)), ("0", (1980, 1, 1, 0, 0, 0)), ("", (1980, 1, 1, 0, 0, 0)),
    ("9999999999", (2107, 12, 31, 23, 59, 58)),
])
def test_source_date_epoch_dates_the_members(
        monkeypatch: pytest.MonkeyPatch, epoch: str, date: tuple[int, ...]) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert build_zipapp.archive_date() == date
    assert build_zipapp.archive({"a": b"b"}) == build_zipapp.archive({"a": b"b"})


def test_the_content_hash_depends_on_names_and_contents_only() -> None:
    digests = [build_zipapp.content_hash(content) for content in (
        {"a": b"1", "b": b"2"}, {"b": b"2", "a": b"1"}, {"a": b"2", "b": b"1"}, {"a": b"1"})]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# -- Widths ------------------------------------------------------------------------------------------------------------

def test_the_width_table_is_that_of_wcwidth_for_every_code_point(stand_in: Path) -> None:
    table: dict[str, Any] = {}
    exec(contents(stand_in / "mosh.pyz")["mosh_widths.py"], table)  # noqa: S102 -- our own generated module
    starts, widths = table["STARTS"], table["WIDTHS"]
    assert isinstance(widths, bytes) and len(starts) == len(widths) and starts[0] == 0
    baked = b"".join(
        bytes([width]) * (end - start) for start, end, width in zip(starts, (*starts[1:], 0x110000), widths))
    assert baked == bytes(wcwidth.wcwidth(chr(code_point)) + 1 for code_point in range(0x110000))
    assert (table["VERSION"], table["UNICODE"]) == (wcwidth.__version__, wcwidth.list_versions()[-1])


def test_runs_differ_from_their_neighbours() -> None:
    runs = build_zipapp.width_runs()
    assert runs[0] == (0, 0)
    assert all(before[0] < after[0] and before[1] != after[1] for before, after in zip(runs, runs[1:]))


def test_the_licence_of_the_width_table_travels_along(stand_in: Path) -> None:
    shipped = contents(stand_in / "mosh.pyz")["licenses/wcwidth.txt"].decode()
    installed = [path for path in importlib.metadata.files("wcwidth") or [] if path.name == "LICENSE"]
    if not installed:
        pytest.skip("the installed wcwidth has no LICENSE file")
    assert shipped.split() == installed[0].read_text().split()


# -- Metadata and errors -----------------------------------------------------------------------------------------------

def test_the_needs_of_mosh_are_read_from_its_script_block() -> None:
    source = '#!/usr/bin/env python3\n# /// script\n# requires-python = ">=3.9"\n#\n# dependencies = [\n' \
             '#     "cryptography>=42",     # AESOCB3\n#     "wcwidth >=0.6, <1",\n# ]\n# ///\n"""Doc."""\n'
    assert build_zipapp.script_metadata(source) == (">=3.9", {"cryptography": ">=42", "wcwidth": ">=0.6, <1"})


@pytest.mark.parametrize(("version", "specifiers", "answer"), [
    ("0.6.0", ">=0.6", True), ("0.10", ">=0.9", True), ("0.2.14", ">=0.6", False), ("1.0", ">=0.6,<1", False),
    ("0.9.4", ">=0.6,<1", True), ("1.0.0", "==1", True), ("0.7rc1", "!=0.7", False), ("5", "", True),
    ("3", ">3", False), ("3", "<= 3", True),
])
def test_versions_are_compared_by_number(version: str, specifiers: str, answer: bool) -> None:
    assert build_zipapp.satisfies(version, specifiers) is answer


def without(line: str) -> str:
    return STAND_IN.replace(line, "# \n")


@pytest.mark.parametrize(("source", "reason"), [
    (None, "cannot read"),
    (without("# /// script\n"), "no '# /// script' block"),
    (without('# requires-python = ">=3.9"\n'), "no requires-python"),
    (STAND_IN.replace(">=3.9", "<4"), "names no oldest version"),
    (STAND_IN.replace('"wcwidth>=0.2"', "wcwidth"), "not plain strings"),
    (STAND_IN.replace('"wcwidth>=0.2"', '"wcwidth>=999"'), "mosh.py needs >=999"),
    (STAND_IN.replace('"wcwidth>=0.2"', '"wcwidth~=0.2"'), "does not know: '~=0.2'"),
    (STAND_IN + "def\n", "cannot compile mosh.py"),
])
def test_a_failure_is_one_line_and_leaves_no_file(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str | None, reason: str) -> None:
    if source is not None:
        (tmp_path / "mosh.py").write_text(source)
    assert build_zipapp.main(["--source", str(tmp_path), "--pythons"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("build_zipapp.py: error: ") and error.count("\n") == 1
    assert reason in error
    assert [path.name for path in tmp_path.iterdir()] == (["mosh.py"] if source is not None else [])


def test_an_output_that_cannot_be_written_is_one_line(
        stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in (tmp_path, tmp_path / "missing" / "mosh.pyz"):
        assert build_zipapp.main(["--source", str(stand_in), "--output", str(output), "--source-only"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_source_date_epoch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BuildError, match="not a number of seconds: 'yesterday'"):
        build_zipapp.archive_date()


def test_check_builds_nothing(stand_in: Path, tmp_path: Path) -> None:
    shutil.copy(stand_in / "mosh.py", tmp_path)
    assert build_zipapp.main(["--source", str(tmp_path), "--check"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mosh.py"]
