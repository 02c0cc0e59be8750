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
import peers
from build_zipapp import BuildError, Interpreter
from conftest import require, require_kind
from ptys import on_a_terminal

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
    assert build_zipapp.main(["--source", str(folder), "--no-native"]) == 0
    return folder


@pytest.fixture(scope="session")
def real_pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mosh.pyz built from the real mosh.py, with bytecode for every interpreter."""
    path = tmp_path_factory.mktemp("real") / "mosh.pyz"
    assert build_zipapp.main(["--source", str(ROOT), "--output", str(path), "--no-native"]) == 0
    return path


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder that holds all wheels that are built in."""
    folder = ROOT / ".venv" / "wheels"
    try:
        build_zipapp.natives(build_zipapp.PLATFORMS, folder)
    except build_zipapp.WheelsMissing as error:
        if os.environ.get("CI") and any(folder.glob("*.whl")):
            pytest.fail(f"some wheels are here, others are not: {error}", pytrace=False)
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def native_pyz(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mosh.pyz built from the real mosh.py, with the libraries for all platforms."""
    path = tmp_path_factory.mktemp("native") / "mosh.pyz"
    assert build_zipapp.main(["--source", str(ROOT), "--output", str(path), "--wheels", str(wheels)]) == 0
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


# -- Natives -----------------------------------------------------------------------------------------------------------

HERE_PLATFORM = f"{sys.platform}-{os.uname().machine}"
RUST = "cryptography/hazmat/bindings/_rust.abi3.so"
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


def test_each_platform_has_one_wheel_of_cryptography_and_one_of_cffi_for_each_python() -> None:
    for platform in build_zipapp.PLATFORMS:
        found = [(wheel.project, wheel.python) for wheel in build_zipapp.WHEELS if wheel.platform == platform]
        assert found == [("cryptography", "abi3"), *(("cffi", version) for version in VERSIONS)]
    assert len({wheel.sha256 for wheel in build_zipapp.WHEELS}) == len(build_zipapp.WHEELS)
    assert all(re.fullmatch("[0-9a-f]{64}", wheel.sha256) for wheel in build_zipapp.WHEELS)


def test_the_wheel_built_in_is_one_that_mosh_would_accept() -> None:
    metadata = build_zipapp.script_metadata((ROOT / "mosh.py").read_text())
    for wheel in build_zipapp.WHEELS:
        assert build_zipapp.satisfies(wheel.version, metadata.dependencies.get(wheel.project, ""))


def library_names(platform: str) -> set[str]:
    tail = "darwin" if platform.startswith("darwin") else f"{platform.partition('-')[2]}-linux-gnu"
    backends = (f"_cffi_backend.cpython-{version.replace('.', '')}-{tail}.so" for version in VERSIONS)
    return {f"{platform}/{name}" for name in (RUST, *backends)}


def test_the_archive_holds_the_libraries_of_each_platform_and_their_licences(native_pyz: Path) -> None:
    members = contents(native_pyz)
    libraries = {name.partition("/")[2]: data for name, data in members.items() if name.endswith(".so")}
    assert set(libraries) == set().union(*map(library_names, build_zipapp.PLATFORMS))
    for name, data in libraries.items():
        head, machine = (b"\x7fELF", data[18:20]) if "linux" in name else (b"\xcf\xfa\xed\xfe", data[4:8])
        assert data.startswith(head), name
        assert machine == {  # e_machine of an ELF file, cputype of a Mach-O file
            "linux-x86_64": b"\x3e\0", "linux-aarch64": b"\xb7\0", "darwin-arm64": b"\x0c\0\0\x01",
        }[name.partition("/")[0]], name
    lines = (line.split("  ") for line in members["natives/sha256"].decode().splitlines())
    index = {name: digest for digest, name in lines}
    assert index == {name: build_zipapp.sha256(data) for name, data in libraries.items()}
    licenses = {name: data for name, data in members.items() if name.startswith("licenses/")}
    for name, words in (
        ("cryptography-50.0.2/LICENSE.APACHE", "Apache License"), ("cryptography-50.0.2/LICENSE.BSD", "Redistribution"),
        ("cffi-2.1.1/LICENSE", "WITHOUT WARRANTY"), ("cffi-2.0.0/LICENSE", "WITHOUT WARRANTY"),
    ):
        assert words in licenses[f"licenses/{name}"].decode()


def test_platforms_can_be_chosen(wheels: Path, stand_in: Path, tmp_path: Path) -> None:
    pyz = tmp_path / "one.pyz"
    options = ["--source", str(stand_in), "--output", str(pyz), "--wheels", str(wheels), "--source-only"]
    assert build_zipapp.main([*options, "--native", "darwin-arm64"]) == 0
    names = {name.partition("/")[2] for name in contents(pyz) if name.endswith(".so")}
    assert names == library_names("darwin-arm64")
    with pytest.raises(SystemExit):
        build_zipapp.main([*options, "--native", "amiga"])


def wheel_file(path: Path, members: dict[str, bytes]) -> None:
    """Write a file that pip takes for a wheel of that name."""
    project, version, *tags = path.stem.split("-")
    metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
    tag = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {'-'.join(tags)}\n"
    folder = f"{project}-{version}.dist-info"
    head = {f"{folder}/METADATA": metadata, f"{folder}/WHEEL": tag, f"{folder}/RECORD": ""}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {**{name: text.encode() for name, text in head.items()}, **members}.items():
            file.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of: nothing of the network or of a configuration."""
    pytest.importorskip("pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


CFFI = build_zipapp.Wheel("cffi", "2.1.1", "3.12", "linux-x86_64", "0" * 64)
CFFI_FILE = "cffi-2.1.1-cp312-cp312-manylinux2014_x86_64.whl"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(index: Path, tmp_path: Path) -> None:
    wheel_file(index / CFFI_FILE, {"_cffi_backend.cpython-312-x86_64-linux-gnu.so": b"hostile"})
    folder = tmp_path / "wheels"
    with pytest.raises(BuildError, match="is not the file that is pinned") as caught:
        build_zipapp.fetch(CFFI, folder)
    assert not isinstance(caught.value, build_zipapp.WheelsMissing)     # which a plain `make` would forgive
    assert list(folder.iterdir()) == []


def test_a_wheel_is_fetched_once_and_again_if_it_was_damaged(index: Path, tmp_path: Path) -> None:
    wheel_file(index / CFFI_FILE, {})
    data = (index / CFFI_FILE).read_bytes()
    wheel, folder = CFFI._replace(sha256=build_zipapp.sha256(data)), tmp_path / "wheels"
    assert build_zipapp.fetch(wheel, folder) == data
    assert [path.name for path in folder.iterdir()] == ["cffi-2.1.1-3.12-linux-x86_64.whl"]
    (folder / str(wheel)).write_bytes(data[:-1])
    assert build_zipapp.fetch(wheel, folder) == data == (folder / str(wheel)).read_bytes()
    (index / CFFI_FILE).unlink()
    assert build_zipapp.fetch(wheel, folder) == data
    (folder / str(wheel)).write_bytes(b"")
    with pytest.raises(build_zipapp.WheelsMissing, match=r"cannot fetch cffi 2\.1\.1 for linux-x86_64"):
        build_zipapp.fetch(wheel, folder)


@pytest.mark.parametrize("members", [
    {}, {"_cffi_backend.cpython-312-x86_64-linux-gnu.so": b""}, {"cffi-2.1.1.dist-info/licenses/LICENSE": b""}])
def test_a_wheel_that_lacks_something_is_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    wheel_file(tmp_path / CFFI_FILE, members)
    with pytest.raises(BuildError, match="lacks a library, a module or its licence"):
        build_zipapp.wheel_parts(CFFI, (tmp_path / CFFI_FILE).read_bytes())
    with pytest.raises(BuildError, match="cannot be read"):
        build_zipapp.wheel_parts(CFFI, b"no zip file")


@pytest.mark.usefixtures("index")
def test_offline_the_build_goes_on_without_them_unless_they_were_asked_for(
        stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyz, slim = tmp_path / "mosh.pyz", tmp_path / "slim.pyz"
    options = ["--source", str(stand_in), "--wheels", str(tmp_path / "wheels"), "--output"]
    assert build_zipapp.main([*options, str(pyz)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("natives:")]
    assert len(said) == 1 and "cannot fetch cryptography" in said[0]
    assert contents(pyz) == contents(stand_in / "mosh.pyz")
    assert build_zipapp.main([*options, str(slim), "--source-only"]) == 0
    assert "natives:  none\n" in capsys.readouterr().out
    pyz.unlink()
    assert build_zipapp.main([*options, str(pyz), "--native", "linux-x86_64"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("build_zipapp.py: error: cannot fetch cryptography") and error.count("\n") == 1
    assert not pyz.exists()


# -- AES-OCB from the archive

BUNDLED = "crypto: bundled, unpacked to "
EMPTY = "raise ImportError('not here')\n"


def bundled_env(home: Path, **more: str) -> dict[str, str]:
    """An environment in which no place but those named can be meant."""
    return {"HOME": str(home), "PATH": os.environ.get("PATH", os.defpath), "MOSH_CRYPTO": "bundled", **more}


def crypto_line(pyz: Path, env: dict[str, str], python: str = sys.executable, prefix: Sequence[str] = ()) -> str:
    """Return what `--version -v` says of the crypto library."""
    result = run([*prefix, python, "-S", pyz, "--version", "-v"], env=env)
    assert (result.returncode, result.stderr) == (0, "")
    line, = (line for line in result.stdout.splitlines() if line.startswith("crypto:"))
    return line


def kept_in(folder: Path) -> list[str]:
    """Return the kinds of entries in a private cache; every one must be whole."""
    for path in folder.iterdir():
        assert path.name.partition("-")[2] == build_zipapp.sha256(path.read_bytes())[:32] + ".so"
        assert path.stat().st_mode & 0o7777 == 0o600
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


@pytest.fixture
def usable_pyz(native_pyz: Path) -> Path:
    """`native_pyz`, where it has libraries for the machine that runs this test."""
    if HERE_PLATFORM not in build_zipapp.PLATFORMS:
        pytest.skip(f"no libraries are built in for {HERE_PLATFORM}")
    return native_pyz


@each_interpreter
def test_each_interpreter_runs_the_bundled_library(usable_pyz: Path, home: Path, python: Interpreter) -> None:
    place = home / ".cache" / "mosh.py"
    for _ in ("unpacked", "found again"):
        assert crypto_line(usable_pyz, bundled_env(home), python.path) == BUNDLED + str(place)
        assert kept_in(place) == ["_cffi_backend", "_rust"]
    assert place.stat().st_mode & 0o777 == 0o700


def test_it_is_the_last_resort_and_minds_no_older_package(usable_pyz: Path, home: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    (packages / "cryptography").mkdir(parents=True)
    (packages / "cryptography" / "__init__.py").write_text("__version__ = '3.3.2'\n")    # before AESOCB3
    env = bundled_env(home, PYTHONPATH=str(packages), MOSH_CRYPTO="")
    assert crypto_line(usable_pyz, env) == "crypto: libcrypto"
    assert not (home / ".cache").exists()
    (packages / "ctypes.py").write_text(EMPTY)
    assert crypto_line(usable_pyz, env) == f"{BUNDLED}{home}/.cache/mosh.py"


def test_a_session_with_a_stock_client(usable_pyz: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_kind("stock")
    monkeypatch.setenv("MOSH_PYZ", str(usable_pyz))
    env = peers.session_env(home, MOSH_CRYPTO="bundled", TERM="xterm")
    with peers.running_server("ours", env) as server:
        client = peers.client_command("stock", server.port)
        with on_a_terminal(client, {**env, "MOSH_KEY": server.key}) as terminal:
            terminal.read_until(lambda output: b"$ " in output)
            terminal.type(b"echo $((617 * 3))\r")
            terminal.read_until(lambda output: b"1851" in output)
            terminal.type(b"exit\r")
            assert terminal.wait() == 0
    assert kept_in(home / ".cache" / "mosh.py") == ["_cffi_backend", "_rust"]


def damage(entry: Path, how: str) -> None:
    """Spoil an entry of the cache."""
    data = entry.read_bytes()
    entry.unlink()
    if how == "link":
        other = entry.with_name("other")
        other.write_bytes(data)
        entry.symlink_to(other)
    else:
        entry.write_bytes({"cut": data[:-1], "flipped": data[:99] + bytes([data[99] ^ 1]) + data[100:]}.get(how, data))
        entry.chmod(0o666 if how == "open to others" else 0o600)


@pytest.mark.parametrize("how", ["cut", "flipped", "open to others", "link"])
def test_a_damaged_entry_is_replaced(usable_pyz: Path, home: Path, how: str) -> None:
    place, env = home / ".cache" / "mosh.py", bundled_env(home)
    crypto_line(usable_pyz, env)
    entries = list(place.iterdir())
    for entry in entries:
        damage(entry, how)
    assert crypto_line(usable_pyz, env) == BUNDLED + str(place)
    (place / "other").unlink(missing_ok=True)
    assert kept_in(place) == ["_cffi_backend", "_rust"]


@pytest.mark.parametrize("obstacle", ["link", "0777", "file", "parent 0777"])
def test_a_place_that_is_not_private_is_passed_by(usable_pyz: Path, home: Path, tmp_path: Path, obstacle: str) -> None:
    first, second = home / ".cache" / "mosh.py", tmp_path / "second"
    first.parent.mkdir()
    second.mkdir()
    if obstacle == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        first.symlink_to(tmp_path / "elsewhere")
    elif obstacle == "file":
        first.touch()
    else:
        first.mkdir(0o700)
        (first if obstacle == "0777" else first.parent).chmod(0o777)
    line = crypto_line(usable_pyz, bundled_env(home, XDG_RUNTIME_DIR=str(second)))
    assert line == f"{BUNDLED}{second}/mosh.py-{os.geteuid()}"
    assert obstacle == "file" or list(first.iterdir()) == []


def mounted(*lines: str) -> list[str]:
    """Return words that run the command behind them after some mounts of its own. Skips the test where none can be."""
    if os.geteuid() != 0:
        pytest.skip("only root sees in a mount namespace who owns what is above it")
    if shutil.which("unshare") is None or run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]).returncode:
        pytest.skip("this system lets a test mount nothing (unshare -rm)")
    return ["unshare", "-rm", "sh", "-ec", "\n".join((*lines, 'exec "$@"')), "sh"]


@pytest.mark.parametrize("option", ["ro", "noexec", "size=5m"])
def test_a_home_where_nothing_can_be_kept_or_run_is_passed_by(
        usable_pyz: Path, home: Path, tmp_path: Path, option: str) -> None:
    (home / ".cache").mkdir()
    (tmp_path / "second").mkdir()
    prefix = mounted(f"mount -t tmpfs -o mode=700,{option} x {home}/.cache")
    env = bundled_env(home, XDG_RUNTIME_DIR=str(tmp_path / "second"))
    assert crypto_line(usable_pyz, env, prefix=prefix) == f"{BUNDLED}{tmp_path}/second/mosh.py-0"


NOTHING_RUNS = (  # from where the cache may be
    'for each in "$HOME/.cache" /tmp/mosh.py-0 /var/tmp/mosh.py-0; do mkdir -p -m 700 "$each"',
    'mount -t tmpfs -o mode=700,noexec x "$each"; done',
)


def test_where_nothing_kept_can_run_it_runs_from_memory(usable_pyz: Path, home: Path) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system runs nothing from memory")
    assert crypto_line(usable_pyz, bundled_env(home), prefix=mounted(*NOTHING_RUNS)) == BUNDLED + "memory"


def test_if_all_fails_every_reason_is_named_in_one_line(usable_pyz: Path, home: Path) -> None:
    code = (
        "import os, runpy, sys\nvars(os).pop('memfd_create', None)\n"
        f"sys.argv = [{str(usable_pyz)!r}, 'server']\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    result = run([*mounted(*NOTHING_RUNS), sys.executable, "-ISc", code], env=bundled_env(home))
    assert result.returncode == 69 and result.stdout == ""
    assert result.stderr.startswith("mosh: no AES-128-OCB on this machine; bundled (in mosh.pyz): ")
    assert result.stderr.count("\n") == 1
    for place in (f"{home}/.cache/mosh.py", "/tmp/mosh.py-0", "/var/tmp/mosh.py-0"):
        assert place in result.stderr


def test_first_runs_at_the_same_time_all_succeed(usable_pyz: Path, home: Path) -> None:
    command = [sys.executable, "-S", str(usable_pyz), "--version", "-v"]
    starting = [subprocess.Popen(command, env=bundled_env(home), stdout=subprocess.PIPE, text=True) for _ in range(8)]
    said = [process.communicate()[0] for process in starting]
    assert all(f"{BUNDLED}{home}/.cache/mosh.py\n" in text for text in said)
    assert kept_in(home / ".cache" / "mosh.py") == ["_cffi_backend", "_rust"]


def test_four_of_a_kind_are_kept_and_other_kinds_left_alone(usable_pyz: Path, home: Path) -> None:
    place = home / ".cache" / "mosh.py"
    place.mkdir(parents=True, mode=0o700)
    others = [f"{kind}-{number}" for kind in ("_rust", "mosh") for number in range(6)] + [".mosh-old", "._rust-old"]
    for age, name in enumerate(others):
        (place / name).touch()
        os.utime(place / name, (1_000_000 - age, 1_000_000 - age))
    crypto_line(usable_pyz, bundled_env(home))
    left = {path.name for path in place.iterdir()} & {*others}
    assert left == {*(f"mosh-{number}" for number in range(6)), "_rust-0", "_rust-1", "_rust-2", ".mosh-old"}


def test_a_damaged_library_is_neither_kept_nor_loaded(usable_pyz: Path, home: Path, tmp_path: Path) -> None:
    pyz = changed(usable_pyz, tmp_path / "mosh.pyz", lambda name, data: (
        data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(RUST) else data))
    line = crypto_line(pyz, bundled_env(home), prefix=mounted(*NOTHING_RUNS))   # elsewhere may lie a good one
    assert line.startswith("crypto: none: no AES-128-OCB on this machine; bundled (in mosh.pyz): ")
    assert line.count("_rust.abi3.so in mosh.pyz is damaged") == 4


@pytest.mark.parametrize(("index", "reason"), [
    (None, "holds none"), (b"", f"holds no {HERE_PLATFORM}/_cffi_backend"),
    (b"\xff \n\n", f"holds no {HERE_PLATFORM}"),
])
def test_what_is_not_in_the_archive_is_named(
        usable_pyz: Path, home: Path, tmp_path: Path, index: bytes | None, reason: str) -> None:
    pyz = changed(usable_pyz, tmp_path / "mosh.pyz", lambda name, data: (
        index if name == "natives/sha256" else None if name.endswith(".so") else data))
    line = crypto_line(pyz, bundled_env(home))
    assert line.startswith("crypto: none: no AES-128-OCB on this machine; bundled (in mosh.pyz): this mosh.pyz ")
    assert reason in line
    assert not (home / ".cache").exists()


def test_without_libraries_it_says_so(real_pyz: Path, home: Path) -> None:
    assert crypto_line(real_pyz, bundled_env(home)).endswith("bundled (in mosh.pyz): this mosh.pyz holds none")


def test_what_a_login_sends_has_no_library_in_it(native_pyz: Path, real_pyz: Path) -> None:
    """The program is known by its digest, which both therefore share."""
    said = [run([sys.executable, "-S", pyz, "--version", "-v"]).stdout for pyz in (native_pyz, real_pyz)]
    builds = [re.search("build: .*", text) for text in said]
    assert builds[0] and builds[1] and builds[0][0] == builds[1][0]


# -- Same input, same bytes --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("native", [False, True])
def test_place_mask_zone_and_hash_seed_do_not_change_a_byte(
        tmp_path: Path, native: bool, request: pytest.FixtureRequest) -> None:
    built = []
    wheels = request.getfixturevalue("wheels") if native else None
    options = ["--wheels", wheels, "--pythons"] if native else ["--no-native"]
    for name, mask, zone, seed in (("a", 0o022, "UTC", "1"), ("b c", 0o077, "Asia/Tokyo", "2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mosh.py").write_text(STAND_IN)
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed, "LC_ALL": "C", f"EXTRA_{name[0]}": name}
        result = run(
            [sys.executable, ROOT / "build_zipapp.py", "--source", ".", *options],
            cwd=folder, umask=mask, env=environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert (folder / "mosh.pyz").stat().st_mode & 0o777 == 0o755
        said, took, _ = result.stdout.partition("took:")
        assert took
        built.append((said, (folder / "mosh.pyz").read_bytes()))
    assert built[0] == built[1]


@pytest.mark.parametrize("python", [INTERPRETERS[0], INTERPRETERS[-1]], ids=str)
def test_any_interpreter_builds_the_same_content(stand_in: Path, tmp_path: Path, python: Interpreter) -> None:
    # Its own wcwidth may be another one or missing, so it borrows this one's pure Python part.
    packages = tmp_path / "packages"
    shutil.copytree(Path(wcwidth.__file__).parent, packages / "wcwidth", ignore=shutil.ignore_patterns("*.so"))
    output = tmp_path / "mosh.pyz"
    command: list[str | Path] = [
        python.path, "-S", ROOT / "build_zipapp.py", "--source", stand_in, "--output", output,
        "--no-native", "--pythons", *(other.path for other in INTERPRETERS)]
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
    assert build_zipapp.main(["--source", str(tmp_path), "--no-native", "--pythons"]) == 1
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


@pytest.mark.parametrize(("words", "last"), [([], "--local 127.0.0.1"), (["HOST=me@there"], "me@there")])
def test_make_run_goes_nowhere_unless_it_is_told_to(words: list[str], last: str) -> None:
    """Some shells and systems have the name of the machine itself in the variable HOST of the environment."""
    environ = {**os.environ, "HOST": "here", "MAKEFLAGS": ""}
    shown = subprocess.run(
        [require("make"), "--no-print-directory", "--dry-run", "run", *words], cwd=peers.REPOSITORY, env=environ,
        capture_output=True, text=True, check=True,
    )
    assert shown.stdout.rstrip().endswith(f"mosh-slim.pyz {last}")
