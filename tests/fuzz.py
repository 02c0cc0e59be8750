"""Coverage-guided fuzzing of every decoder: `make fuzz MINUTES=n`, or `python tests/fuzz.py --minutes n [decoder ...]`.

Any bytes give a value or the error that the decoder documents, within bounds that are counted. As many decoders are
fuzzed at once as there are processors. New inputs go to a folder, in which a crash is kept. Where the package `atheris`
is missing, Hypothesis makes the input, unguided: test_fuzz.py runs over and over. It also replays the saved corpus.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fuzz_corpus.json"
UNIT_SECONDS = 20           # an input that takes longer is a finding
MEMORY_MB = 3_000
INPUT_BYTES = 4_096

sys.path[:0] = [str(HERE.parent), str(HERE)]
if __name__ == "__main__" and "--worker" in sys.argv:
    import atheris

    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["mosh"]):
        import mosh
else:
    import mosh

import grammar  # noqa: E402

SERVER = ("192.0.2.1", 60001)


class Unsealed:
    """Stands in for a cipher, so that what comes behind it can be reached: any tag will do."""

    name = "unsealed"

    def encrypt(self, _nonce: bytes, plaintext: bytes) -> bytes:
        """See mosh.Cipher."""
        return plaintext + bytes(mosh.TAG_BYTES)

    def decrypt(self, _nonce: bytes, sealed: bytes) -> bytes:
        """See mosh.Cipher."""
        return sealed[: -mosh.TAG_BYTES]


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut an input into pieces, each behind a byte with its length."""
    at = 0
    while at < len(data):
        yield data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]


# -- decoders --------------------------------------------------------------------------------------------------


def datagram(data: bytes) -> None:
    """Datagrams at a server and at a client, one after the other."""
    for is_server, direction in ((True, mosh.TO_CLIENT), (False, mosh.TO_SERVER)):
        layer = mosh.DatagramLayer(mosh.Channel(Unsealed(), direction), 0, is_server=is_server)
        for now, piece in enumerate(_pieces(data)):
            with contextlib.suppress(mosh.PacketError):
                layer.receive_datagram(piece, SERVER, now)
        assert len(layer.peers) <= 1 and 50 <= layer.round_trip.rto_ms <= 1_000
    cipher = mosh.choose_cipher()(bytes(16))
    with contextlib.suppress(mosh.PacketError):
        mosh.Channel(cipher, mosh.TO_SERVER).open(data)


def fragment(data: bytes) -> None:
    """Fragments, one after the other."""
    assembly = mosh.FragmentAssembly()
    for piece in _pieces(data):
        with contextlib.suppress(mosh.PacketError):
            assembly.add(mosh.Fragment.decode(piece))
        assert assembly._size <= mosh.INSTRUCTION_LIMIT_BYTES and len(assembly._pieces) <= 1 << 15


def zlib_stream(data: bytes) -> None:
    """A compressed instruction."""
    with contextlib.suppress(mosh.PacketError):
        assert len(mosh.inflate(data)) <= mosh.INSTRUCTION_LIMIT_BYTES


def protobuf(data: bytes) -> None:
    """An instruction and the messages in it."""
    with contextlib.suppress(mosh.PacketError):
        instruction = mosh.Instruction.decode(data)
        assert mosh.Instruction.decode(instruction.encode()).diff == instruction.diff
    for decode in (mosh.Resize.decode, mosh.Hello.decode, lambda text: list(mosh._decode_instructions(text))):
        with contextlib.suppress(mosh.PacketError):
            decode(data)


def user_stream(data: bytes) -> None:
    """What a client tells a server: keys and window sizes, in several states."""
    server = mosh.ServerCore(mosh.Channel(Unsealed(), mosh.TO_CLIENT), 0, width=20, height=5, random_bytes=bytes)
    _exchange(server, mosh.TO_SERVER, data)
    width, height = server.size
    assert min(width, height) >= 1 and width * height <= mosh.SCREEN_LIMIT_CELLS
    assert len(server.host_input) <= mosh.INPUT_LIMIT_BYTES


def host_message(data: bytes) -> None:
    """What a server tells a client: screens, sizes and echo acks; only what is harmless reaches the terminal."""
    client = mosh.ClientCore(
        mosh.Channel(Unsealed(), mosh.TO_SERVER), 0, width=20, height=5, candidates=[SERVER], port=1,
        random_bytes=bytes, mode=mosh.PredictionMode.ALWAYS,
    )
    _exchange(client, mosh.TO_CLIENT, data)
    screen = client.screen
    assert len(screen.rows) == screen.height and screen.width * screen.height <= mosh.SCREEN_LIMIT_CELLS
    if screen.width * screen.height <= 1 << 12:
        drawn = client.frame_to_draw(50)
        client.receive_keys(data[:20], 60)
        assert grammar.unexpected(drawn + client.frame_to_draw(70) + client.last_frame(99)) == ""


def _exchange(core: mosh.ServerCore | mosh.ClientCore, direction: int, data: bytes) -> None:
    """Let a core hear instructions: per piece four small state numbers in two bytes, and a diff."""
    peer = mosh.DatagramLayer(mosh.Channel(Unsealed(), direction), 0, is_server=direction == mosh.TO_CLIENT)
    fragmenter = mosh.Fragmenter()
    for now, piece in enumerate(_pieces(data), 1):
        old, new, ack, throwaway = (
            num if num < 15 else mosh.LAST_STATE_NUM for byte in (piece + bytes(2))[:2] for num in divmod(byte, 16)
        )
        for part in fragmenter.fragments(mosh.Instruction(old, new, ack, throwaway, piece[2:]), 1_200):
            with contextlib.suppress(mosh.PacketError):
                core.receive_datagram(peer.seal(part.encode(), now), SERVER, now)
        core.datagrams_to_send(now * 1_000)
        assert len(core.transport.receiver.states) <= mosh.RECEIVED_LIMIT + 2
        assert len(core.transport.sender.sent) <= mosh.SENT_LIMIT


def terminal(data: bytes) -> None:
    """Output of a program, whole and cut in two; the frame that shows it; answers to it."""
    whole, parts = mosh.Emulator(20, 5), mosh.Emulator(20, 5)
    cut = data[0] if data else 0
    whole.feed(data)
    parts.feed(data[:cut])
    parts.feed(data[cut:])
    assert whole.framebuffer.lines() == parts.framebuffer.lines()
    assert whole.take_replies() == parts.take_replies()
    screen = whole.framebuffer
    assert len(screen.window_title) <= mosh.TITLE_LIMIT and len(screen.clipboard) <= mosh.OSC_LIMIT
    assert all(len(row.text) == len(row.attrs) <= 20 for row in screen.rows)
    shown = mosh.Emulator(20, 5)
    shown.feed(mosh.Display().frame(shown.framebuffer.copy(), screen))
    assert [line.rstrip() for line in shown.framebuffer.lines()] == [line.rstrip() for line in _shown_lines(screen)]


def _shown_lines(screen: mosh.Framebuffer) -> list[str]:
    """Return what a terminal shows of a screen: a lone mark stands on NBSP, half a wide character is a blank."""
    lines = []
    for row in screen.rows:
        text, _ = row.padded(screen.width)
        out = []
        for col in screen.visible_columns(text):
            contents = screen.codebook.contents(text[col]) or " "
            if screen.codebook.is_fallback(text[col]):
                contents = _limited("\xa0" + contents)
            if screen.codebook.is_wide(text[col]) and col == screen.width - 1:
                contents = " "
            out.append(contents)
        lines.append("".join(out))
    return lines


def _limited(cluster: str) -> str:
    out = cluster[0]
    for mark in cluster[1:]:
        if len(out.encode("utf-8", "replace")) < mosh.CLUSTER_LIMIT_BYTES:
            out += mark
    return out


def keys(data: bytes) -> None:
    """What a user types, or a terminal answers, in several reads, at a client with any escape key."""
    setting = data[:1] if data[:1] != b"\0" else None
    client = mosh.ClientCore(
        mosh.Channel(Unsealed(), mosh.TO_SERVER), 0, width=7, height=3, candidates=[SERVER], port=1, random_bytes=bytes,
        mode=mosh.PredictionMode.ALWAYS, escape_key=mosh.EscapeKey(setting),
    )
    for now, piece in enumerate(_pieces(data[1:])):
        client.receive_keys(piece, now)
        assert grammar.unexpected(client.frame_to_draw(now)) == ""
        assert len(client._cut_off_reply) <= 16
    for mode in (False, True):
        whole, parts = mosh.CursorKeyFilter(), mosh.CursorKeyFilter()
        assert whole.filter(data, mode) == b"".join(parts.filter(bytes((key,)), mode) for key in data)


def login_line(data: bytes) -> None:
    """Lines of a host at the wrapper, which may know the token."""
    announcement = mosh.Announcement("token")
    for line in data.decode("utf-8", "replace").split("\n"):
        for take in (announcement.take, announcement.take_from_proxy):
            for prefix in ("", "token "):
                with contextlib.suppress(mosh.BootstrapError):
                    take(prefix + line)
        assert "\x1b" not in mosh.printable(line)
    assert 0 <= announcement.port <= 65_535
    assert not announcement.key or re.fullmatch("[A-Za-z0-9+/]{22}", announcement.key)


class _LeftError(Exception):
    """The stager has ended itself, saying why."""


_PROGRAM = b"print()"
_STAGER: dict[str, Any] = {
    "token": "token", "version": "3.9", "digest": hashlib.sha256(_PROGRAM).hexdigest(), "zlib": zlib,
}
exec(  # noqa: S102  (our own text: the one function of it that reads)
    compile(
        ast.Module([node for node in ast.parse(mosh._STAGER).body if getattr(node, "name", "") == "receive"], []),
        "stager", "exec",
    ), _STAGER,
)  # fmt: skip
if "--worker" in sys.argv:
    atheris.instrument_func(_STAGER["receive"])


def stage_header(data: bytes) -> None:
    """What the stager reads from its stdin, in several reads: noise, a header, a compressed program."""
    said: list[tuple[str, ...]] = []
    pieces = _pieces(data)

    def fail(reason: str) -> None:
        said.append(("FAIL", reason))
        raise _LeftError

    _STAGER["os"] = SimpleNamespace(read=lambda _fd, _size: next(pieces, b""), isatty=lambda _fd: False)
    _STAGER["say"], _STAGER["fail"] = lambda *words: said.append(words), fail
    with contextlib.suppress(_LeftError):
        assert _STAGER["receive"]() == _PROGRAM
    assert said[0] == ("NEED", "3.9") and all(word.isprintable() for words in said for word in words)


def text(data: bytes) -> None:
    """UTF-8, whole and byte by byte, against the C library's rules as the module states them."""
    whole, parts = mosh.Utf8Decoder(), mosh.Utf8Decoder()
    decoded = whole.decode(data)
    assert decoded == "".join(parts.decode(bytes((byte,))) for byte in data)
    assert all(mosh.char_width(char) in (-1, 0, 1, 2) for char in decoded)


DECODERS: dict[str, Callable[[bytes], None]] = {
    decoder.__name__: decoder
    for decoder in (
        datagram, fragment, zlib_stream, protobuf, user_stream, host_message, terminal, keys, login_line, stage_header,
        text,
    )
}


# -- corpus ----------------------------------------------------------------------------------------------------


def saved_corpus() -> dict[str, list[bytes]]:
    """Return the saved inputs of every decoder."""
    saved = json.loads(CORPUS.read_text(encoding="ascii"))
    return {name: [base64.b64decode(item) for item in items] for name, items in saved.items()}


# -- running ---------------------------------------------------------------------------------------------------


def _work(name: str, arguments: list[str]) -> None:
    """Be the process that fuzzes one decoder. Does not return."""
    atheris.Setup([sys.argv[0], *arguments], DECODERS[name])
    atheris.Fuzz()


def _fuzz(name: str, seconds: int, folder: Path) -> bool:
    """Fuzz one decoder for so long, and print how that went. Returns whether nothing was found."""
    corpus, crashes = folder / name, folder / f"{name}-found-"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(saved_corpus().get(name, [])):
        (corpus / f"saved-{number}").write_bytes(item)
    finished = subprocess.run(
        [sys.executable, __file__, "--worker", name, str(corpus), f"-max_total_time={seconds}",
         f"-timeout={UNIT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={INPUT_BYTES}",
         f"-artifact_prefix={crashes}", "-print_final_stats=1"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )
    said = finished.stdout.decode("utf-8", "replace")
    executions, covered = (
        (re.findall(pattern, said) or ["?"])[-1] for pattern in (r"number_of_executed_units: (\d+)", r"cov: (\d+)")
    )
    result = "nothing found" if finished.returncode == 0 else "FOUND\n" + "\n".join(said.splitlines()[-30:])
    count = len(list(corpus.iterdir()))
    counted = f"{executions:>9} executions, {covered:>5} branches, {count:5} inputs"
    print(f"{name:14} {seconds:>6} s, {counted}: {result}", flush=True)
    return finished.returncode == 0


def _guided(names: list[str], minutes: float, folder: Path) -> bool:
    """Fuzz these decoders, on all processors together for so long. Returns whether nothing was found."""
    workers = min(os.cpu_count() or 1, len(names))
    seconds = max(1, int(60 * minutes * workers / len(names)))
    print(f"{seconds} s for each decoder; inputs and what is found: {folder}")
    with ThreadPoolExecutor(workers) as pool:
        return all(list(pool.map(lambda name: _fuzz(name, seconds, folder), names)))


def _unguided(minutes: float) -> bool:
    """Run test_fuzz.py with other random input each time. Returns whether it always passed."""
    print("there is no atheris for this Python; Hypothesis makes the input, unguided")
    until = time.monotonic() + 60 * minutes
    seed = 0
    while time.monotonic() < until:
        seed += 1
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-c", "tests/pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider",
             f"--hypothesis-seed={seed}", "tests/test_fuzz.py"],
            cwd=HERE.parent, stdout=subprocess.PIPE, check=False,
        )
        said = finished.stdout.decode("utf-8", "replace")
        print(f"seed {seed}: {said if finished.returncode else said.splitlines()[-1]}", flush=True)
        if finished.returncode:
            return False
    return True


def main() -> int:
    """Fuzz the decoders named, or all."""
    if "--worker" in sys.argv:
        _work(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all decoders together")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / f"mosh-fuzz-{os.getuid()}")
    parser.add_argument("decoders", nargs="*", choices=[[], *DECODERS], metavar="decoder")
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        return 0 if _unguided(arguments.minutes) else 1
    return 0 if _guided(arguments.decoders or list(DECODERS), arguments.minutes, arguments.folder) else 1


if __name__ == "__main__":
    sys.exit(main())
