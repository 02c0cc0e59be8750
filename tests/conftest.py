"""What every test module shares: the policy on missing programs, a private home, and the markers."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest
from hypothesis import settings

import peers
from peers import PAIRS, Pair

if TYPE_CHECKING:
    from measuring import Table

Result = TypeVar("Result")

# `make attack` sets how many datagrams each attack sends; then the attacks and faults befall stock's programs too.
ATTACK_COUNT = int(os.environ.get("MOSH_ATTACK_COUNT") or 0)
ATTACK_KINDS: tuple[peers.Kind, ...] = ("ours", "stock") if ATTACK_COUNT else ("ours",)

# sshd and its like live where the PATH of a plain user does not look.
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, so that a misspelt one is an error under --strict-markers."""
    peers.stop_ignoring_signals()
    config.addinivalue_line("markers", "live: drives real programs over loopback; leave out with -m 'not live'")
    config.addinivalue_line("markers", "long: waits out a real timeout of many seconds; leave out with -m 'not long'")


# How long an example takes says nothing on a machine that runs live sessions beside it.
settings.register_profile("mosh", deadline=None)
settings.load_profile("mosh")


def require(program: str) -> str:
    """The path of a program that a test needs.

    Where it is missing the test is skipped by name; under CI it fails, since there every peer must be installed
    and a silent skip would look like success.
    """
    path = shutil.which(program, path=SYSTEM_PATH)
    if path is None:
        _missing(f"{program} is not installed")
    return path


def require_kind(*kinds: peers.Kind) -> None:
    """Make sure that both programs of every kind named can be started, else skip or (under CI) fail."""
    if "stock" in kinds:
        require("mosh-server")
        require("mosh-client")
    if "ours" in kinds and not peers.ours_path().exists():
        _missing(f"{peers.ours_path().name} does not exist")


def link_local_address() -> tuple[str, int, int, int]:
    """An address of this machine, for any port, that means nothing without the interface."""
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for digits, index, _, scope, *_ in map(str.split, lines):
        if scope == "20":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), 0, 0, int(index, 16)
    pytest.skip("this machine has no link-local address")


def _missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must have it", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fresh, empty, private home directory."""
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


class Stage:
    """Plays a story once for every pairing, all pairings at the same time, since a live session mostly waits."""

    def __init__(self, pairs: Iterable[Pair], factory: pytest.TempPathFactory) -> None:
        self._pairs = tuple(pairs)
        self._factory = factory
        self._pool = ThreadPoolExecutor(max_workers=len(PAIRS))
        self._plays: dict[tuple[Callable[[Pair, Path], Any], Pair], Future[Any]] = {}

    def play(self, story: Callable[[Pair, Path], Result], pair: Pair) -> Result:
        """What the story, given the pair and a private home, returned. Raises whatever went wrong in it."""
        if (story, pair) not in self._plays:
            for each in self._pairs:
                home = self._factory.mktemp(f"{getattr(story, '__name__', 'story')}-{each}")
                self._plays[story, each] = self._pool.submit(story, each, home)
        result: Result = self._plays[story, pair].result()
        return result

    def close(self) -> None:
        """Wait for plays that nobody asked for; each is bounded by its own deadlines."""
        self._pool.shutdown(wait=True)


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One stage for the whole run, for the pairings that the selected tests ask for and the yardstick."""
    asked = {
        item.callspec.params.get("pair")
        for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    there = [pair for pair in PAIRS if "ours" not in (pair.client, pair.server) or peers.ours_path().exists()]
    stage = Stage((pair for pair in there if pair in asked or pair == PAIRS[0]), tmp_path_factory)
    yield stage
    stage.close()


@pytest.fixture(scope="session")
def attack_table() -> Iterator[Table]:
    """What attacks and faults did, printed at the end; `make attack` shows it."""
    from measuring import Table  # it insists on the program under test, which not every test needs

    table = Table(
        "Attacks and faults: CPU per datagram, or ms of CPU per second of the busiest survivor, and what happened.\n"
        "Unless a cell says otherwise the terminal is as before, no process is left, there is no zombie, and what was\n"
        "typed while a fault lasted has come to the program once.",
        ["attack or fault", "times", *ATTACK_KINDS], phrases=True,
    )
    yield table
    if table.rows:
        table.show(markdown=False)
