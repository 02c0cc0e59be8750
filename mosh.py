#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography>=42", "wcwidth>=0.9.4"]
# ///
"""Mosh, the mobile shell, in one file: client, server and the login that joins them.

A remote terminal over ssh stalls when the network does and dies when the laptop moves. Mosh logs in through ssh, then
speaks over UDP and sends no byte stream at all: each end owns an object (the keys typed so far; the screen) and keeps
the other end's copy of it fresh by sending differences. A lost datagram is never worth repeating, only the newest
state is. So a session survives sleep, loss and a change of address, and an overfull link delays nothing for long.

The file reads from top to bottom; a section uses only sections above it. Search "== 7." to jump.

  1. Protocol constants -- numbers both ends must agree on; changing one breaks interoperability
  2. Errors -- the one exception tree
  3. Wire helpers -- integers, varints, the protobuf subset, zlib with a size cap
  4. Crypto -- AES-128-OCB by a library, key, nonce, one sealed channel
  5. Datagram -- sequence and direction, timestamps, RTT and RTO, whom to answer (roaming)
  6. Fragments -- instruction, fragmenter, fragment assembly
  7. Transport -- SSP: sender, receiver, timers; generic over any state
  8. Text -- UTF-8 decoding, character widths
  9. Framebuffer -- rendition, cell, row, cursor, framebuffer
 10. Parser -- characters to text and control functions: the escape-sequence state tables
 11. Emulator -- control functions to framebuffer: C0, ESC, CSI and OSC dispatch tables
 12. Display -- frame diff: two framebuffers in, terminal bytes out
 13. Synchronized states -- user stream (keys, resizes) and terminal state (screen, echo ack)
 14. Prediction and overlays -- prediction engine, notification bar, title
 15. Cores -- ServerCore and ClientCore: each end complete but for I/O
 ---- the I/O line: only below it are clocks, entropy, sockets, ptys, signals, processes and printing
 16. Outside world -- monotonic clock, UDP sockets, selector loop, signals
 17. Server -- pty, child process, detaching, timeouts
 18. Client -- raw mode, suspend and resume, drawing
 19. Bootstrap -- ssh command, remote start, MOSH CONNECT line, addresses
 20. Command line -- options, messages, exit codes, main
"""

from __future__ import annotations

import binascii
import bisect
import math
import operator
import re
import struct
import sys
import weakref
import zlib
from collections import deque, namedtuple
from enum import Enum, auto
from functools import lru_cache
from itertools import accumulate, groupby, takewhile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, AnyStr, Generic, Protocol, TypeVar, Union

    Local = TypeVar("Local", bound="State")
    Remote = TypeVar("Remote", bound="State")
else:  # importing typing costs 7 ms of every start, and none of this is needed to run

    class Generic:
        """Stands in for typing.Generic: subscripting gives the class itself."""

        __class_getitem__ = classmethod(lambda cls, _parameters: cls)

    Protocol, Local, Remote = object, None, None

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BootstrapError",
    "Channel",
    "ClientCore",
    "Display",
    "Emulator",
    "Framebuffer",
    "Key",
    "MoshError",
    "PacketError",
    "Parser",
    "PredictionEngine",
    "ProtocolError",
    "ServerCore",
    "TerminalState",
    "Transport",
    "UsageError",
    "UserStream",
    "main",
]

# ======================================================================================================================
# == 1. Protocol constants -- numbers both ends must agree on; changing one breaks interoperability
# ======================================================================================================================
# A datagram, from the outside in (all integers big-endian):
#
#     8 bytes   direction bit and 63-bit sequence number, the variable part of the nonce      (section 4)
#     sealed:   2 bytes timestamp, 2 bytes timestamp reply                                    (section 5)
#               8 bytes instruction id, 1 bit "final" and 15 bits fragment number             (section 6)
#               a piece of one zlib stream, which holds one protobuf Instruction              (section 6)
#     16 bytes  authentication tag

PROTOCOL_VERSION = 2
LAST_STATE_NUM = 2**64 - 1  # the state number that says "this end is shutting down"

TO_SERVER, TO_CLIENT = 0, 1  # the direction bit
NO_TIMESTAMP = 0xFFFF

KEY_BYTES = 16
TAG_BYTES = 16
NONCE_PREFIX = bytes(4)
SEQUENCE = struct.Struct(">Q")
TIMESTAMPS = struct.Struct(">HH")
FRAGMENT_HEADER = struct.Struct(">QH")
FINAL_FRAGMENT = 0x8000

RECEIVE_LIMIT_BYTES = 2048  # the largest datagram an end will read
INSTRUCTION_LIMIT_BYTES = 4 * 1024 * 1024  # before and after compression

# Protobuf field numbers. The numbers of the inner instructions continue each other across messages, since the
# originals are extensions; all of them are optional and unknown ones are skipped at every level.
INSTRUCTION_FIELDS = ("protocol_version", "old_num", "new_num", "ack_num", "throwaway_num", "diff", "chaff")  # 1 to 7
MESSAGE_INSTRUCTION = 1  # UserMessage and HostMessage: repeated instruction
USER_KEYSTROKE, USER_RESIZE = 2, 3
HOST_BYTES, HOST_RESIZE, HOST_ECHO_ACK = 2, 3, 7
KEYSTROKE_KEYS = HOST_STRING = 4
RESIZE_WIDTH, RESIZE_HEIGHT = 5, 6
ECHO_ACK_NUM = 8
HELLO = 100  # our own, in either message: what this end can do beyond mosh 1.4.0; that one skips it unread
HELLO_CAPABILITY, HELLO_VERSION = 1, 2

FIRST_PORT, LAST_PORT = 60001, 60999  # where a server looks for a free UDP port unless told otherwise

# ======================================================================================================================
# == 2. Errors -- the one exception tree
# ======================================================================================================================
# The branches are what the caller does about it, not what went wrong.


class MoshError(Exception):
    """Base of every error this module raises on purpose; its text is for the user and never holds a key."""

    status = 1  # to exit with


class PacketError(MoshError):
    """Bytes from outside that are not valid: drop them, count them, answer nothing."""


class AuthenticationError(PacketError):
    """A datagram that the key did not seal."""


class ProtocolError(MoshError):
    """The session cannot go on: end it and tell the user."""


class BootstrapError(MoshError):
    """The session cannot start: explain and exit with `status`."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class UsageError(MoshError):
    """The command line or the environment is wrong: say so, exit 2 (as server or client: with its usage, exit 1)."""


# ======================================================================================================================
# == 3. Wire helpers -- integers, varints, the protobuf subset, zlib with a size cap
# ======================================================================================================================
# Source: the Protocol Buffers encoding guide, of which Mosh needs varints and length-delimited fields. A parsed
# message is the sequence of its fields; the caller picks the ones it knows, so unknown ones cost nothing.

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_SIZE = {_FIXED64: 8, _FIXED32: 4}
_VARINT_LIMIT_BYTES = 10
_U64 = 2**64 - 1


def encode_varint(value: int) -> bytes:
    """Return `value`, 0..2**64-1, as a base-128 varint of 1..10 bytes."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that starts at `data[at]` and the offset behind it. Raises PacketError if it has no end."""
    value = 0
    for i, byte in enumerate(data[at : at + _VARINT_LIMIT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & _U64, at + i + 1
    raise PacketError("varint is cut short or too long")


def encode_field(number: int, value: int | bytes) -> bytes:
    """Return one protobuf field: an int as a varint, bytes as a length-delimited field."""
    if isinstance(value, int):
        return encode_varint(number << 3 | _VARINT) + encode_varint(value)
    return encode_varint(number << 3 | _BYTES) + encode_varint(len(value)) + value


def decode_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) per field: int for a varint, bytes for a length-delimited one. Raises PacketError."""
    at = 0
    while at < len(data):
        tag, at = decode_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if number == 0 or wire_type not in (_VARINT, _BYTES, *_FIXED_SIZE):
            raise PacketError(f"protobuf tag {tag} is not supported")
        if wire_type == _VARINT:
            value, at = decode_varint(data, at)
            yield number, value
            continue
        size, at = (_FIXED_SIZE[wire_type], at) if wire_type in _FIXED_SIZE else decode_varint(data, at)
        if size > len(data) - at:
            raise PacketError("protobuf field is cut short")
        if wire_type == _BYTES:
            yield number, data[at : at + size]
        at += size


def deflate(data: bytes) -> bytes:
    """Return `data` as one zlib stream (RFC 1950)."""
    return zlib.compress(data)


def inflate(data: bytes) -> bytes:
    """Return what one zlib stream holds. Raises PacketError if it is damaged or exceeds INSTRUCTION_LIMIT_BYTES."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, INSTRUCTION_LIMIT_BYTES + 1)
    except zlib.error:
        raise PacketError("instruction does not inflate") from None
    if len(out) > INSTRUCTION_LIMIT_BYTES or not stream.eof:
        raise PacketError("instruction is cut short or inflates beyond the limit")
    return out


# ======================================================================================================================
# == 4. Crypto -- AES-128-OCB by a library, key, nonce, one sealed channel
# ======================================================================================================================
# Every datagram is sealed with AES-128 in OCB mode (RFC 7253): 128-bit tag, no associated data, one key for both
# directions. OCB is broken by a single repeated nonce, so the nonce is a counter that only ever moves forward, with
# one bit that keeps the two directions apart:
#
#     nonce = 4 zero bytes, then (direction << 63 | sequence number) as 8 bytes
#
# The sequence number grows by one for every datagram sent, also for a retransmission. It is never set back. The
# channel belongs to one process: it is made after the last fork, and should there be another, the copy is retired.
#
# We write no cipher. Two libraries can serve: the `cryptography` package, or the OpenSSL libcrypto that the
# interpreter itself is linked with, which every ordinary Python has and which needs nothing installed. Finding one is
# a matter of the outside world (section 16).

BLOCK_BYTES = 16
REKEY_LIMIT_BLOCKS = 2**47  # OCB's bound on blocks under one key; nobody types that much
MIN_SEALED_BYTES = SEQUENCE.size + TAG_BYTES
NO_CIPHER = 69  # exit status of a program that has no AES-OCB to work with; EX_UNAVAILABLE of sysexits.h
_CONTEXT_LIMIT_BYTES = 4096  # libcrypto backend: buffer size, twice any datagram


class Key:
    """The session's 16-byte secret. Its printable form is 22 base64 letters, without the two padding signs."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise UsageError("Key must be 16 bytes long.")
        self.raw = raw

    @classmethod
    def from_text(cls, text: str) -> Key:
        """Parse the printable form. Raises UsageError, with a text that does not show the key."""
        if len(text) != 22:
            raise UsageError("Key must be 22 letters long.")
        if not re.fullmatch("[A-Za-z0-9+/]{22}", text, re.ASCII):
            raise UsageError("Key must be well-formed base64.")
        key = cls(binascii.a2b_base64(text + "=="))
        if key.to_text() != text:
            raise UsageError("Base64 key was not encoded 128-bit key.")
        return key

    def to_text(self) -> str:
        """Return the 22 letters that `MOSH CONNECT` and `MOSH_KEY` carry."""
        return binascii.b2a_base64(self.raw, newline=False).decode("ascii").rstrip("=")

    def __repr__(self) -> str:
        return "Key(...)"  # security: a key in a traceback or a log would outlive the session


class Cipher(Protocol):
    """What a crypto library has to offer: AES-128-OCB with a 12-byte nonce and a 16-byte tag at the end."""

    name: str

    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        """Return ciphertext and tag."""

    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        """Return the plaintext of `sealed`, 16 bytes or more. Raises AuthenticationError."""


class CryptographyCipher:
    """AES-128-OCB of the `cryptography` package."""

    name = "cryptography"

    def __init__(self, raw_key: bytes) -> None:
        from cryptography.exceptions import InvalidTag  # 18 ms, in the process that needs a cipher at all
        from cryptography.hazmat.primitives.ciphers.aead import AESOCB3

        self._aead = AESOCB3(raw_key)
        self._invalid_tag = InvalidTag

    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        """See Cipher."""
        return self._aead.encrypt(nonce, plaintext, None)

    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        """See Cipher."""
        try:
            return self._aead.decrypt(nonce, sealed, None)
        except self._invalid_tag:
            raise AuthenticationError("Packet failed integrity check.") from None


class LibcryptoCipher:
    """AES-128-OCB of the libcrypto that this interpreter is linked with, through ctypes.

    One context per direction keeps the key schedule; a datagram costs four calls. `EVP_Cipher` is not an option: with
    OCB it loses the nonce (CVE-2026-45445).
    """

    name = "libcrypto"
    _GET_TAG, _SET_TAG = 0x10, 0x11  # EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG
    _FUNCTIONS = (  # name: result, then arguments; p pointer, i int, I pointer to int, b bytes, - nothing
        ("EVP_aes_128_ocb", "p"),
        ("EVP_CIPHER_CTX_new", "p"),
        ("EVP_CIPHER_CTX_free", "-p"),
        ("EVP_CIPHER_CTX_ctrl", "ipiip"),
        ("EVP_EncryptInit_ex", "ipppbb"),
        ("EVP_EncryptUpdate", "ippIbi"),
        ("EVP_EncryptFinal_ex", "ippI"),
        ("EVP_DecryptInit_ex", "ipppbb"),
        ("EVP_DecryptUpdate", "ippIbi"),
        ("EVP_DecryptFinal_ex", "ippI"),
        ("ERR_clear_error", "-"),
    )

    def __init__(self, raw_key: bytes) -> None:
        import ctypes  # 2 ms

        self._library = library = self._load()
        types = {
            "p": ctypes.c_void_p,
            "i": ctypes.c_int,
            "I": ctypes.POINTER(ctypes.c_int),
            "b": ctypes.c_char_p,
            "-": None,
        }
        for name, letters in self._FUNCTIONS:
            function = getattr(library, name)
            function.restype = types[letters[0]]
            function.argtypes = [types[letter] for letter in letters[1:]]
        self._buffer = ctypes.create_string_buffer(_CONTEXT_LIMIT_BYTES)
        self._address = ctypes.addressof(self._buffer)
        self._size = ctypes.c_int()
        self._encryptor = library.EVP_CIPHER_CTX_new()
        self._decryptor = library.EVP_CIPHER_CTX_new()
        ocb = library.EVP_aes_128_ocb()
        self._check(ocb)
        self._check(library.EVP_EncryptInit_ex(self._encryptor, ocb, None, raw_key, None))
        self._check(library.EVP_DecryptInit_ex(self._decryptor, ocb, None, raw_key, None))

    def __del__(self) -> None:
        for context in ("_encryptor", "_decryptor"):
            if getattr(self, context, None):
                self._library.EVP_CIPHER_CTX_free(getattr(self, context))  # this also wipes the key schedule

    @staticmethod
    def _load() -> Any:
        """Return libcrypto as a ctypes library. Raises OSError when none has AES-128-OCB."""
        import ctypes

        paths: list[str | None] = []
        for extension in ("_hashlib", "_ssl"):  # looking up a symbol there also searches what it is linked with
            try:
                paths.append(getattr(__import__(extension), "__file__", None))
            except ImportError:
                continue
        if sys.platform != "darwin":  # security: macOS ends a process that opens its own libcrypto by name
            paths += ["libcrypto.so.3", "libcrypto.so.1.1"]
        for path in paths:
            try:
                library = ctypes.CDLL(path)
                library.EVP_aes_128_ocb  # noqa: B018  (looking the symbol up is the test)
                return library
            except (OSError, AttributeError):
                continue
        raise OSError("no libcrypto with AES-128-OCB found")

    def _check(self, result: int | None) -> None:
        if not result or result < 0:
            self._library.ERR_clear_error()
            raise OSError("libcrypto refused an AES-128-OCB operation")

    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        """See Cipher."""
        size = len(plaintext)
        if size + TAG_BYTES > _CONTEXT_LIMIT_BYTES:
            raise ValueError(f"{size} bytes are more than one datagram")
        library, context, out = self._library, self._encryptor, self._address
        self._check(library.EVP_EncryptInit_ex(context, None, None, None, nonce))
        self._check(library.EVP_EncryptUpdate(context, out, self._size, plaintext, size))
        self._check(library.EVP_EncryptFinal_ex(context, out + self._size.value, self._size))
        self._check(library.EVP_CIPHER_CTX_ctrl(context, self._GET_TAG, TAG_BYTES, out + size))
        return self._buffer.raw[: size + TAG_BYTES]

    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        """See Cipher."""
        size = len(sealed) - TAG_BYTES
        if not 0 <= size <= _CONTEXT_LIMIT_BYTES - TAG_BYTES:
            raise AuthenticationError("Packet failed integrity check.")
        library, context, out = self._library, self._decryptor, self._address
        self._check(library.EVP_DecryptInit_ex(context, None, None, None, nonce))
        self._check(library.EVP_CIPHER_CTX_ctrl(context, self._SET_TAG, TAG_BYTES, sealed[size:]))
        self._check(library.EVP_DecryptUpdate(context, out, self._size, sealed, size))
        if library.EVP_DecryptFinal_ex(context, out + self._size.value, self._size) != 1:
            library.ERR_clear_error()
            raise AuthenticationError("Packet failed integrity check.")
        return self._buffer.raw[:size]


# (nonce, plaintext, sealed) under the key 00 01 ... 0F. Source: RFC 7253 appendix A, rows without associated data.
_KNOWN_ANSWERS = (
    ("BBAA99887766554433221100", "", "785407BFFFC8AD9EDCC5520AC9111EE6"),
    ("BBAA99887766554433221103", "0001020304050607", "45DD69F8F5AAE72414054CD1F35D82760B2CD00D2F99BFA9"),
)


def check_cipher(make: Callable[[bytes], Cipher]) -> None:
    """Prove a backend on published answers, a full-sized message and a forgery. Raises OSError if it fails."""
    cipher = make(bytes(range(KEY_BYTES)))
    for row in _KNOWN_ANSWERS:
        nonce, plaintext, sealed = map(bytes.fromhex, row)
        if cipher.encrypt(nonce, plaintext) != sealed or cipher.decrypt(nonce, sealed) != plaintext:
            raise OSError("wrong answer to a published test vector")
    message = bytes(range(256)) * 5 + bytes(120)
    sealed = cipher.encrypt(nonce, message)
    if cipher.decrypt(nonce, sealed) != message:
        raise OSError("a message does not survive the round trip")
    try:
        cipher.decrypt(nonce, sealed[:-1] + bytes([sealed[-1] ^ 1]))
    except AuthenticationError:
        return
    raise OSError("a forged message was accepted")


class Channel:
    """Seals what this end sends and opens what it receives, under one key."""

    def __init__(self, cipher: Cipher, direction: int) -> None:
        """`direction` is that of the sealed datagrams: TO_SERVER in a client, TO_CLIENT in a server."""
        self._cipher = cipher
        self._direction = direction
        self._next_seq = 0
        self._blocks_left = REKEY_LIMIT_BLOCKS

    def seal(self, plaintext: bytes) -> bytes:
        """Return the datagram for `plaintext`. Raises ProtocolError when the key has been used up."""
        self._blocks_left -= -(-len(plaintext) // BLOCK_BYTES)
        if self._blocks_left < 0 or self._next_seq >> 63:
            raise ProtocolError("Encrypted 2^47 blocks.")
        nonce = SEQUENCE.pack(self._direction << 63 | self._next_seq)
        self._next_seq += 1  # security: before anything can fail, so that no nonce is ever used twice
        return nonce + self._cipher.encrypt(NONCE_PREFIX + nonce, plaintext)

    def retire(self) -> None:
        """Seal nothing any more. For the copy in a forked process, which would use the same nonces again."""
        self._blocks_left = -1

    def open(self, datagram: bytes) -> tuple[int, bytes]:
        """Return (sequence number, plaintext). Raises PacketError, or AuthenticationError if the tag does not match."""
        if len(datagram) < MIN_SEALED_BYTES:
            raise PacketError("Ciphertext must contain nonce and tag.")
        if len(datagram) > RECEIVE_LIMIT_BYTES:
            raise PacketError("Received oversized datagram.")
        nonce = datagram[: SEQUENCE.size]
        plaintext = self._cipher.decrypt(NONCE_PREFIX + nonce, datagram[SEQUENCE.size :])
        (word,) = SEQUENCE.unpack(nonce)
        if word >> 63 == self._direction:  # security: our own datagram, reflected
            raise PacketError("Illegal counterparty input (possible denial of service): wrong direction.")
        return word & (2**63 - 1), plaintext


# ======================================================================================================================
# == 5. Datagram -- sequence and direction, timestamps, RTT and RTO, whom to answer (roaming)
# ======================================================================================================================
# Each datagram carries the sender's clock and echoes the newest clock value heard, moved on by the time it was held
# here, so both ends measure the round trip with every exchange and an end that merely thinks before it answers looks
# no further away. Only the newest datagram so far may touch a clock or an address: an old one, delayed, still hands its
# contents up (they are idempotent), but cannot mislead about who or how far the peer is. One that has been here before
# is dropped, or somebody who repeats fragments of old instructions could keep new ones from ever becoming complete.
#
# Roaming is then one rule: the server answers to wherever the newest authentic datagram came from. What a client does
# when answers stop is to try a new local port, since NATs forget, and the server's other addresses (section 15).
#
# Whoever can hold up a client's datagram can deliver it from somebody else's address, and have the server flood that.
# So an address that the server has moved to gets only a few times the bytes that came from it, until something that was
# sent there is acknowledged.

RTT_LIMIT_MS = 5_000  # a longer sample says that a laptop slept, not that the path is long
RTO_MS = (50, 1_000)  # bounds of the retransmission timeout
FRAME_INTERVAL_MS = (20, 250)  # bounds of the time between frames, which is SRTT/2
INITIAL_SRTT_MS = 1_000.0
TIMESTAMP_HOLD_MS = 1_000  # a timestamp older than this is not echoed
CONGESTION_PENALTY_MS = 500  # a marked packet is reported this much later, which slows the peer's frames
REPLAY_WINDOW = 1_024  # datagrams before the newest: it is known which of them have been here; older ones are dropped
AMPLIFICATION_LIMIT = 3  # times the bytes received may go to an address that is not proven; as in QUIC, RFC 9000
ASSOCIATION_MS = 40_000  # a server stops sending to an address silent for so long
PORT_HOP_MS = 10_000  # a client without an answer for so long tries another local port
MAX_OLD_PORT_AGE_MS = 60_000  # and closes the old ones after this
MAX_PORTS = 10

LOSS_WINDOW = 64  # how many of the peer's newest datagrams tell how lossy the path is
LOSS_RUN = 3  # more than this lost in a row is an outage, which says little about what comes after it

# Payload sizes: what fits the smallest path worth expecting (1280 bytes), and what to do when even that does not. A
# path may drop what is too large without a word, so nothing is believed but acks: an instruction that needed large
# datagrams is cut small from then on when MTU_TRIES of it, and the time for an ack of the last, have brought none. Loss
# may look the same, and small ones are slower then, since each of them must arrive: at RTT 100 ms with 30 % loss each
# way a page of text takes 160 ms in the mean, 120 if it is never cut small. So a path that has carried large ones gets
# many more tries. Large ones are sent again once a probe, a heartbeat padded to full size, has been acknowledged. One
# that is lost delays nothing.
MTU_BYTES = {"IPv4": 1280 - 28, "IPv6": 1280 - 64}  # whole datagram behind the UDP header
FALLBACK_MTU_BYTES = 500
MTU_TRIES = {False: 3, True: 14}  # by whether large datagrams have been acknowledged since the path may have changed
MTU_NUMS = 64  # states whose tries are remembered
MTU_PROBE_MS = (10_000, 60_000)  # wait for the first probe, and between later ones
DATAGRAM_OVERHEAD_BYTES = SEQUENCE.size + TIMESTAMPS.size + TAG_BYTES

if TYPE_CHECKING:
    Address = Any  # opaque here: compared and handed back, never looked into


def clamp(value: float, bounds: tuple[int, int]) -> int:
    """Return `value`, rounded up, within `bounds`."""
    return max(bounds[0], min(bounds[1], math.ceil(value)))


class RoundTrip:
    """Smoothed round-trip time and its variation. Source: RFC 6298 section 2, with Mosh's bounds."""

    def __init__(self) -> None:
        self.srtt_ms = INITIAL_SRTT_MS
        self.rttvar_ms = INITIAL_SRTT_MS / 2
        self.measured = False

    def observe(self, sample_ms: int) -> None:
        """Take one sample into account; one of RTT_LIMIT_MS or more is ignored."""
        if sample_ms >= RTT_LIMIT_MS:
            return
        if self.measured:
            self.rttvar_ms += (abs(self.srtt_ms - sample_ms) - self.rttvar_ms) / 4
            self.srtt_ms += (sample_ms - self.srtt_ms) / 8
        else:
            self.srtt_ms, self.rttvar_ms, self.measured = float(sample_ms), sample_ms / 2, True

    @property
    def rto_ms(self) -> int:
        """Retransmission timeout."""
        return clamp(self.srtt_ms + 4 * self.rttvar_ms, RTO_MS)

    @property
    def frame_interval_ms(self) -> int:
        """Shortest time between two frames."""
        return clamp(self.srtt_ms / 2, FRAME_INTERVAL_MS)


class ArrivalWindow:
    """Which of the peer's datagrams have come: exactly, to tell replays, and roughly, to tell how lossy the path is."""

    def __init__(self) -> None:
        self.expected_seq = 0  # one more than the newest so far
        self._seen = 0  # bit n: the nth datagram before the newest has been here
        self._came = (1 << LOSS_WINDOW) - 1  # the same, but of those lost in a row no more than LOSS_RUN count

    def observe(self, seq: int) -> bool:
        """The datagram `seq` has come. Returns whether it is the newest so far.

        Raises PacketError if it has been here before, or is too old to tell.
        """
        ahead = seq - self.expected_seq
        if ahead >= 0:
            self._seen = (self._seen << min(ahead + 1, REPLAY_WINDOW) | 1) & (1 << REPLAY_WINDOW) - 1
            self._came = (self._came << min(ahead, LOSS_RUN) + 1 | 1) & (1 << LOSS_WINDOW) - 1
            self.expected_seq = seq + 1
            return True
        bit = -ahead - 1
        if bit >= REPLAY_WINDOW or self._seen >> bit & 1:
            raise PacketError("datagram is a replay or far too late")
        self._seen |= 1 << bit
        if bit < LOSS_WINDOW:  # late rather than lost
            self._came |= 1 << bit
        return False

    @property
    def lost_count(self) -> int:
        """How many of the last LOSS_WINDOW datagrams have not come."""
        return LOSS_WINDOW - bin(self._came).count("1")


class PathMtu:
    """How large a datagram may be, judged by what is acknowledged."""

    def __init__(self, full_bytes: int) -> None:
        self.full_bytes = full_bytes
        self.bytes = full_bytes  # of the largest datagram to send now
        self._large_nums: deque[int] = deque(maxlen=MTU_NUMS)  # states tried in large datagrams, the newest last
        self._tried_at = 0  # when the last of MTU_TRIES was made, or an ack came since
        self._proven = False  # the path has carried large datagrams
        self._probe_num: int | None = None
        self._probe_at: int | None = None

    def instruction_sent(self, num: int, largest_bytes: int, now: int) -> None:
        """State `num` is on its way in datagrams of which the largest has `largest_bytes`."""
        if largest_bytes > FALLBACK_MTU_BYTES:
            self._large_nums.append(num)
            if len(self._large_nums) <= MTU_TRIES[self._proven]:
                self._tried_at = now

    def acknowledged(self, num: int, now: int) -> None:
        """The peer has state `num`."""
        self._proven = self._proven or num in self._large_nums or num == self._probe_num
        if self._large_nums and num >= self._large_nums[0]:  # no diff of a later state was small without that one
            self._large_nums = deque((other for other in self._large_nums if other > num), maxlen=MTU_NUMS)
            self._tried_at = now
        if num == self._probe_num:
            self.bytes, self._probe_num, self._probe_at = self.full_bytes, None, None

    def update(self, now: int, patience_ms: int) -> None:
        """Fall back if large datagrams have been tried often enough and `patience_ms` has brought no ack."""
        if len(self._large_nums) >= MTU_TRIES[self._proven] and now - self._tried_at >= patience_ms:
            self.shrink()
        if self.bytes < self.full_bytes and self._probe_at is None:
            self._probe_at = now + MTU_PROBE_MS[0]

    def shrink(self) -> None:
        """Large datagrams do not arrive, or the system refuses them: use small ones until a probe gets through."""
        self.bytes = min(self.full_bytes, FALLBACK_MTU_BYTES)
        self._large_nums.clear()
        self._proven = False

    def doubt(self) -> None:
        """The path may be another one."""
        self._proven = False

    def wants_probe(self, now: int) -> bool:
        """Return whether a heartbeat sent now should be as large as any datagram may be."""
        return self._probe_at is not None and now >= self._probe_at

    def probe_sent(self, num: int, now: int) -> None:
        """State `num` is on its way in a datagram of `full_bytes`."""
        self._probe_num = num
        self._probe_at = now + MTU_PROBE_MS[1]


class DatagramLayer:
    """One end of the sealed, timestamped datagram exchange."""

    def __init__(self, channel: Channel, now: int, *, is_server: bool, mtu_bytes: int = MTU_BYTES["IPv4"]) -> None:
        self._channel = channel
        self._is_server = is_server
        # the path
        self.round_trip = RoundTrip()
        self.arrivals = ArrivalWindow()
        self.mtu = PathMtu(mtu_bytes)
        # whom to answer
        self.peers: list[Address] = []  # a server has at most one; a client may try several candidates
        self.last_heard_at: int | None = None  # arrival of the newest authentic datagram
        self._proven_peer: Address | None = None  # the last address at which the peer surely was
        self.allowance_bytes: int | None = None  # what may still go to an address that is not proven; None: anything
        # timestamps
        self._saved_timestamp: int | None = None
        self._saved_at = 0
        self.unprompted = False  # the peer had not heard us for TIMESTAMP_HOLD_MS when it sent its newest datagram
        # port hopping
        self._last_port_choice_at = now
        self.last_round_trip_at: int | None = None  # when a state known to be acknowledged was sent

    # -- bytes in

    def receive_datagram(self, datagram: bytes, source: Address, now: int, congested: bool = False) -> bytes:
        """Return the payload of one datagram from `source`. Raises PacketError.

        `congested` says that the network marked it (ECN congestion experienced, RFC 3168).
        """
        seq, plaintext = self._channel.open(datagram)
        if len(plaintext) < TIMESTAMPS.size:
            raise PacketError("Illegal counterparty input (possible denial of service): no timestamps.")
        if self.arrivals.observe(seq):
            timestamp, reply = TIMESTAMPS.unpack_from(plaintext)
            self._take_timestamps(timestamp, reply, now, congested)
            if self._is_server:
                self._judge_source(source, len(datagram))
                self.peers = [source]
            self.last_heard_at = now
        return plaintext[TIMESTAMPS.size :]

    def _judge_source(self, source: Address, size: int) -> None:
        """Server: decide how much may go to where a newest datagram, of `size` bytes, has come from."""
        if self.last_heard_at is None or source == self._proven_peer:
            self._proven_peer, self.allowance_bytes = source, None
        elif source in self.peers and self.allowance_bytes is not None:
            self.allowance_bytes += AMPLIFICATION_LIMIT * size
        else:
            self.allowance_bytes = AMPLIFICATION_LIMIT * size

    def address_proven(self) -> None:
        """What was sent to the present address since the peer moved there has been acknowledged."""
        self._proven_peer, self.allowance_bytes = self.peers[0], None

    def _take_timestamps(self, timestamp: int, reply: int, now: int, congested: bool) -> None:
        if timestamp != NO_TIMESTAMP:
            self._saved_timestamp = (timestamp - CONGESTION_PENALTY_MS * congested) % 0x10000
            self._saved_at = now
        self.unprompted = reply == NO_TIMESTAMP
        if not self.unprompted:
            self.round_trip.observe((_timestamp(now) - reply) % 0x10000)

    # -- bytes out

    def seal(self, payload: bytes, now: int) -> bytes:
        """Return the datagram that carries `payload`, with this end's clock and, once each, the peer's."""
        reply = NO_TIMESTAMP
        if self._saved_timestamp is not None and now - self._saved_at < TIMESTAMP_HOLD_MS:
            reply = (self._saved_timestamp + now - self._saved_at) % 0x10000
            self._saved_timestamp = None
        datagram = self._channel.seal(TIMESTAMPS.pack(_timestamp(now), reply) + payload)
        self.charge(len(datagram))
        return datagram

    def charge(self, size: int) -> None:
        """So many bytes go to the peer, fewer than 0 if some have not been sent after all."""
        if self.allowance_bytes is not None:
            self.allowance_bytes -= size

    def forget_silent_peer(self, now: int) -> bool:
        """Server: after sending, drop an address that has been silent too long. Returns whether it was dropped."""
        if not self._is_server or not self.peers or self.last_heard_at is None:
            return False
        if now - self.last_heard_at <= ASSOCIATION_MS:
            return False
        self.peers, self.allowance_bytes = [], None  # there is no address left that a late ack could prove
        return True

    # -- port hopping (client)

    def wants_new_port(self, now: int) -> bool:
        """Return whether it is time to send from another local port; ask after sending."""
        silent = self.last_round_trip_at is None or now - self.last_round_trip_at > PORT_HOP_MS
        return not self._is_server and silent and now - self._last_port_choice_at > PORT_HOP_MS

    def port_chosen(self, now: int) -> None:
        """The client sends from a new local port as of now."""
        self._last_port_choice_at = now

    def may_close_old_ports(self, now: int) -> bool:
        """Return whether ports used before the newest one have served long enough; ask after receiving."""
        return now - self._last_port_choice_at > MAX_OLD_PORT_AGE_MS


def _timestamp(now: int) -> int:
    """Return a clock value as it travels: 16 bits, of which 0xFFFF means "none"."""
    return 0 if now % 0x10000 == NO_TIMESTAMP else now % 0x10000


# ======================================================================================================================
# == 6. Fragments -- instruction, fragmenter, fragment assembly
# ======================================================================================================================
# An instruction says: apply this diff to your copy of my state `old_num` and you have my state `new_num`. It is
# compressed and cut to the path's size. Assembly keeps the pieces of exactly one instruction: a piece of a newer one
# means that the sender has moved on, and so do we; one of an older one is late, and of use only if it is the whole.
# There is no timer and nothing to acknowledge at this level. But an instruction that is sent again word for word may
# keep its id, so that each try fills the gaps that loss has left.

MAX_CHAFF_BYTES = 16  # random padding that blurs the length of what was typed
FRAGMENT_OVERHEAD_BYTES = DATAGRAM_OVERHEAD_BYTES + FRAGMENT_HEADER.size  # in a datagram, beside the contents
_MAX_FRAGMENT_NUM = 0x7FFF
assert (FALLBACK_MTU_BYTES - FRAGMENT_OVERHEAD_BYTES) * _MAX_FRAGMENT_NUM > INSTRUCTION_LIMIT_BYTES


class Instruction:
    """One SSP instruction."""

    __slots__ = ("ack_num", "chaff", "diff", "new_num", "old_num", "protocol_version", "throwaway_num")

    def __init__(
        self, old_num: int, new_num: int, ack_num: int, throwaway_num: int, diff: bytes, chaff: bytes = b""
    ) -> None:
        self.protocol_version = PROTOCOL_VERSION
        self.old_num = old_num
        self.new_num = new_num
        self.ack_num = ack_num
        self.throwaway_num = throwaway_num
        self.diff = diff
        self.chaff = chaff

    def encode(self) -> bytes:
        """Return the protobuf form, all fields in ascending order."""
        return b"".join(encode_field(i, getattr(self, name)) for i, name in enumerate(INSTRUCTION_FIELDS, 1))

    @classmethod
    def decode(cls, data: bytes) -> Instruction:
        """Parse the protobuf form; a missing field reads as 0 or empty. Raises PacketError."""
        instruction = cls(0, 0, 0, 0, b"")
        instruction.protocol_version = 0
        for number, value in decode_fields(data):
            name = INSTRUCTION_FIELDS[number - 1] if 1 <= number <= len(INSTRUCTION_FIELDS) else None
            if name is not None and isinstance(value, type(getattr(instruction, name))):
                setattr(instruction, name, value)
        return instruction


class Fragment:
    """A piece of one compressed instruction, the payload of one datagram."""

    __slots__ = ("contents", "final", "instruction_id", "num")

    def __init__(self, instruction_id: int, num: int, final: bool, contents: bytes) -> None:
        self.instruction_id = instruction_id
        self.num = num
        self.final = final
        self.contents = contents

    def encode(self) -> bytes:
        """Return the payload for DatagramLayer.seal."""
        return FRAGMENT_HEADER.pack(self.instruction_id, FINAL_FRAGMENT * self.final | self.num) + self.contents

    @classmethod
    def decode(cls, data: bytes) -> Fragment:
        """Parse one payload. Raises PacketError if the header is cut short."""
        if len(data) < FRAGMENT_HEADER.size:
            raise PacketError(f"fragment of {len(data)} bytes has no header")
        instruction_id, word = FRAGMENT_HEADER.unpack_from(data)
        contents = data[FRAGMENT_HEADER.size :]
        return cls(instruction_id, num=word & _MAX_FRAGMENT_NUM, final=bool(word & FINAL_FRAGMENT), contents=contents)


class Fragmenter:
    """Cuts instructions into fragments and numbers them: an id is never used for two different contents."""

    def __init__(self) -> None:
        self._next_id = 1
        self._last: tuple[tuple[Any, ...], list[Fragment]] = ((), [])  # what was cut, without chaff, and its pieces

    def fragments_of_retry(self, instruction: Instruction, mtu_bytes: int) -> list[Fragment]:
        """Return the pieces of `instruction`: if it says the same as last time and takes several, the same in turn.

        A queue that is too short loses the same places of a train each time, so each try begins at another one.
        """
        same = (*(getattr(instruction, name) for name in INSTRUCTION_FIELDS if name != "chaff"), mtu_bytes)
        last, fragments = self._last
        if last != same:
            fragments = self.fragments(instruction, mtu_bytes)
            if len(fragments) == 1:  # an old id would gain nothing, and new chaff says less about what was typed
                self._last = (), []
                return fragments
        first = len(fragments) * 382 // 1_000  # where the next try begins: at the golden section, so all places come
        while math.gcd(first, len(fragments)) > 1:  # soon, and each of them before one comes again
            first += 1
        self._last = same, fragments[first:] + fragments[:first]
        return fragments

    def fragments(self, instruction: Instruction, mtu_bytes: int) -> list[Fragment]:
        """Return the pieces of `instruction` for datagrams of at most `mtu_bytes`. Raises ProtocolError if too big."""
        serialized = instruction.encode()
        compressed = deflate(serialized)
        size = mtu_bytes - FRAGMENT_OVERHEAD_BYTES
        count = -(-len(compressed) // size)
        if max(len(serialized), len(compressed)) > INSTRUCTION_LIMIT_BYTES:
            raise ProtocolError(f"an instruction of {len(serialized)} bytes is more than the protocol can carry")
        instruction_id, self._next_id = self._next_id, self._next_id + 1
        return [
            Fragment(instruction_id, num, num == count - 1, compressed[num * size : (num + 1) * size])
            for num in range(count)
        ]


class FragmentAssembly:
    """Collects the fragments of the instruction being received."""

    def __init__(self) -> None:
        self._id = 0
        self._clear()

    def _clear(self) -> None:
        self._pieces: dict[int, bytes] = {}
        self._size = 0
        self._count: int | None = None  # known once the final fragment is here

    def add(self, fragment: Fragment) -> Instruction | None:
        """Return the instruction that `fragment` completes, else None. Raises PacketError, dropping what was bad."""
        if fragment.instruction_id != self._id:
            if self._pieces and 0 < self._id - fragment.instruction_id < REPLAY_WINDOW:  # none comes later
                whole = fragment.final and fragment.num == 0
                return Instruction.decode(inflate(fragment.contents)) if whole else None
            self._id = fragment.instruction_id
            self._clear()
        if self._contradicts(fragment):
            raise PacketError("fragment contradicts an earlier one of the same instruction")
        if fragment.num not in self._pieces:
            self._pieces[fragment.num] = fragment.contents
            self._size += len(fragment.contents)
        if fragment.final:
            self._count = fragment.num + 1
        if self._size > INSTRUCTION_LIMIT_BYTES:
            self._clear()
            raise PacketError("fragments of one instruction exceed the limit")
        if len(self._pieces) != self._count:
            return None
        compressed = b"".join(self._pieces[num] for num in range(self._count))
        self._clear()
        return Instruction.decode(inflate(compressed))

    def _contradicts(self, fragment: Fragment) -> bool:
        known = self._pieces.get(fragment.num, fragment.contents)
        beyond = self._count is not None and fragment.num >= self._count
        too_early = fragment.final and max(self._pieces, default=-1) > fragment.num
        return known != fragment.contents or beyond or too_early


# ======================================================================================================================
# == 7. Transport -- SSP: sender, receiver, timers; generic over any state
# ======================================================================================================================
# The State Synchronization Protocol. Each end numbers the states of its own object. An instruction carries the diff
# from a state the receiver is thought to have (`old_num`) to the newest one (`new_num`), so nothing is ever resent
# for its own sake: the next diff simply starts from an older state. Three numbers keep both ends tidy:
#
#   ack_num        newest state received from the other end
#   throwaway_num  the receiver may forget states below this: no later diff will start from them
#   LAST_STATE_NUM as new_num: this end is shutting down; once acknowledged, it is gone
#
# The sender keeps the states that may still be a base: sent[0] is known to have arrived, the rest is in flight. A state
# in flight is *assumed* to have arrived for one retransmission timeout, then no longer, and diffs start further back.
#
# Pacing keeps the network's buffers empty, which is why Ctrl-C works in a flood of output. Stock mosh sends at most one
# instruction per frame interval, half the smoothed round trip. What that protects against is bytes, and a key or its
# echo is next to none. So here an instruction is a debt, paid off at PACING_BYTES per interval, and the next one waits
# for the part of the interval that the debt is of PACING_BYTES: a full datagram costs the whole interval, a frame at
# least half of it, an ack or a key hardly anything. What goes out in an interval stays below PACING_BYTES and one
# instruction, which is about what stock may send. One in two intervals may go ahead of its turn: if the user has typed
# something and the program has fallen silent since, as after Ctrl-C in a flood, that is the answer he waits for.
#
# The fragments of a large instruction would be lost together if they met a policer's bucket at once. Those beyond
# BURST_DATAGRAMS are spread over the frame interval, each sealed when it leaves. What comes up meanwhile waits for the
# last one: it would have had to wait for that interval anyway, and a new instruction would make the peer drop the
# pieces it has, so under steady output none would ever be whole.
#
# Repeating. An ack may take an RTO, which covers the way, and ACK_DELAY_MS, which the peer may wait for data to carry
# it; then what was sent is taken for lost and sent again. From then on, and whatever newer there is to say, it goes at
# the pace of frames, or once per RTO if it takes that many bytes. Five things change this:
#
# - A newer datagram of the peer, an RTO after ours, that does not acknowledge it: ours was lost and goes again at once.
#   If it says what we know, it was our ack that was lost, and that is said again.
# - No ack within that time: maybe it was the ack that was lost, and a stock peer acks a state only once, however often
#   it comes. So from then on the repeats are states of their own, which it acks again. But the pieces of one that takes
#   several datagrams add up only under one number: so of a few it is every third repeat, and where a queue may be too
#   short for them none. At RTT 100 ms with 30 % loss each way a page of text that no key has asked for takes 160 ms to
#   a stock client, 290 under one number, 180 from a stock server.
# - Gaps in the peer's sequence numbers: the path is lossy. Then what fits a datagram goes twice in quick succession and
#   again after an RTO. At RTT 100 ms with 29 % loss each way a key takes 130 ms to its echo in the mean, 220 with
#   stock's rules, for 1.4 times the bytes (tests/bench_simulated.py). A third copy: 118 ms for 1.8 times the bytes.
# - A large diff that is not acknowledged though the peer is heard: on a narrow path with a short queue fragments are
#   lost each time, and always the same ones. Then the state goes by parts, each when the last one is acknowledged.
#   What a client has typed may not: a stock server aborts when a state holds less than one before. So that is repeated
#   word for word, beginning with another fragment each time, after waits that grow by half: at first in a burst, since
#   chance may have lost it, then spread over half of the time since. All else waits, or it would end the assembly,
#   acks too, and a search for the peer does not begin it anew.
# - Nothing: as long as no ack comes, the interval grows to a third of the wait, up to ACK_INTERVAL_MS. It stretches
#   the pacing as well, so frames to a peer that is out of reach become rare, and keys, which are cheap, do not: they go
#   again every QUICK_RESEND_MS for a while, a tenth as often as with stock. Most tunnels are that short, and nothing
#   tells of their end. The first datagram heard again ends it: what the peer lacks is sent at once, see above.
#
# Heartbeats. Who has nothing to say says so every ACK_INTERVAL_MS. If the peer's heartbeat comes first, ours goes at
# once and the next one is left to the peer as well: then a processor, or a radio, wakes once for both of them and not
# twice. An answer is never answered: however late it comes, it echoes our timestamp. A heartbeat that nothing of ours
# has prompted comes when our timestamp is too old to be echoed (section 5).

COLLECT_MS = {"server": 7, "client": 0}  # changes are gathered this long; stock's 8 and 1, less what Python takes
QUIET_MS = 2  # but a few bytes, such as an echo, only until no more of them have come for so long
ACK_INTERVAL_MS = 3_000  # an idle peer still hears from us this often, which keeps NAT mappings open
FOLLOW_MS = ACK_INTERVAL_MS // 2  # who has been silent so long answers a heartbeat; of two out of step, one always has
ACK_DELAY_MS = 100  # an ack waits this long for data to ride on; also slack on top of the RTO, and for a heartbeat
BACKOFF = 3  # while nothing is acknowledged, the interval grows to this part of the wait, ACK_INTERVAL_MS at most
assert COLLECT_MS["client"] <= QUIET_MS < COLLECT_MS["server"]
assert max(COLLECT_MS.values()) < ACK_DELAY_MS < ACK_INTERVAL_MS

LOSSY_COUNT = 4  # so many of LOSS_WINDOW datagrams lost make a path lossy, and then
assert LOSS_RUN < LOSSY_COUNT  # one outage does not
LOSSY_COPIES = 2  # an instruction of one datagram is sent so often in quick succession,
LOSSY_COPY_BYTES = MTU_BYTES["IPv4"]
LOSSY_COPY_MS = (10, 50)  # after SRTT/8 within these bounds, far enough apart for a burst of losses to pass
NEW_NUM_BYTES = 3 * LOSSY_COPY_BYTES  # what takes several datagrams, but no more than this, goes
PIECES_TRIES = 3  # so often under one state number
QUICK_DIFF_BYTES = 200  # small diffs, keys and a line of output,
QUICK_RESEND_MS, QUICK_RESEND_LIMIT_MS = 200, 10_000  # go again so often while no ack comes, for so long

PACING_BYTES = 1_000  # debt that is paid off in one frame interval
FRAME_DEBT_BYTES = 500  # what an instruction costs at least, unless its diff is small
SMALL_DIFF_BYTES = 64  # keys, an echo, an echo ack

BURST_DATAGRAMS = 10  # of one instruction, sent at once; the rest is spread over the frame interval
PROBE_OVERHEAD_BYTES = FRAGMENT_OVERHEAD_BYTES + 13  # of zlib, and for the chaff's length

SHUTDOWN_TRIES = 16
SHUTDOWN_MS = 10_000
SENT_LIMIT = 32  # states in flight; beyond it one from the middle is dropped, so old and new bases remain
SENT_DROP = 16  # which one, counted from the newest
RECEIVED_LIMIT = 1_024  # states kept for the peer's diffs; beyond it only one more is taken per quench time
RECEIVED_LIMIT_WEIGHT = 1 << 25  # the same for what they weigh together: 1024 screens of 180x180, 32 of a million cells
QUENCH_MS = 15_000
DIFF_LIMIT_BYTES = INSTRUCTION_LIMIT_BYTES - 1_024  # beyond it a state is sent by parts; 100,000 cells of two colours
PART_BYTES = 8_000  # the same for a path on which larger diffs are lost; each ack doubles it
PART_TRIES = 3  # so often a large diff is tried in vain before it is cut,
PART_PATIENCE_MS = 1_000  # for so long and twice the time that an ack may take; the path may have become longer
OUTAGE_MS = ACK_INTERVAL_MS + 1_000  # a peer silent for so long can hear nothing, large or small
RESEND_LIMIT_BYTES, RESEND_EXTRA_BYTES = 1_000, 100  # diff from what is known to be there if it costs no more than this

# While an address may not be sent much (section 5), a diff that is too large waits, and a probe goes instead: a diff
# that changes nothing and is acknowledged within ACK_DELAY_MS like any other, by which the address is proven.
PROBE_DIFF = encode_field(MESSAGE_INSTRUCTION, b"")
HURRIED_BYTES = 400  # what a client that has moved sends at least, so that a server may answer with a whole datagram
EMPTY_DATAGRAM_BYTES = 110  # at most, for an instruction with an empty diff and state numbers below 2**32


class State(Protocol):
    """What the transport needs of an object it synchronizes. A state never changes once it has been handed over."""

    @property
    def weight(self) -> int:
        """About how much memory the state takes for itself, in cells of a screen."""

    def diff_from(self, base: Any) -> bytes:
        """Return the message that turns `base`, an earlier state, into this one; empty if they are alike."""

    def applied(self: Remote, diff: bytes) -> Remote:
        """Return a new state: this one with a peer's message applied. Raises PacketError."""

    def part_way(self: Local, base: Local) -> Local:
        """Return a state about half as far from `base` as this one, or this one if there is none."""

    def forget_before(self, base: Any) -> None:
        """Everything before `base` has arrived: no diff will start from an earlier state."""


class NumberedState(Generic[Local]):
    """A state, its number, and when it was last sent or first received."""

    __slots__ = ("at", "num", "state")

    def __init__(self, num: int, at: int, state: Local) -> None:
        self.num = num
        self.at = at
        self.state = state


class LargeDiffs:
    """How large a diff may be, judged by what is acknowledged: less where a queue is too short for a large one."""

    def __init__(self) -> None:
        self.limit_bytes = DIFF_LIMIT_BYTES
        self.tries = 0  # with diffs beyond PART_BYTES, since the last ack
        self._since = 0  # when the first of them was sent

    def sent(self, size: int, now: int) -> None:
        """A diff of `size` bytes is on its way."""
        if size > PART_BYTES:
            self._since = self._since if self.tries else now
            self.tries += 1

    def acknowledged(self) -> None:
        """The peer has something new."""
        self.tries = 0
        self.limit_bytes = min(2 * self.limit_bytes, DIFF_LIMIT_BYTES)

    def judge(self, now: int, patience_ms: int) -> None:
        """Fall back to parts if it has been tried often enough and for long, with `patience_ms` for an ack."""
        if self.tries >= PART_TRIES and now - self._since >= max(PART_PATIENCE_MS, 2 * patience_ms):
            self.limit_bytes = PART_BYTES

    def lost_ms(self, now: int) -> int:
        """Return for how long one has been tried in vain."""
        return now - self._since

    def excuse(self, now: int) -> None:
        """That it was in vain until now was the fault of an outage."""
        self._since = now

    def forgive(self) -> None:
        """Nothing arrives, large or small, or there is nothing behind what is sent now."""
        self.tries, self.limit_bytes = 0, DIFF_LIMIT_BYTES


class Sender(Generic[Local]):
    """The half of the transport that keeps the peer's copy of `current` fresh."""

    def __init__(
        self, initial: Local, now: int, collect_ms: int, round_trip: RoundTrip, arrivals: ArrivalWindow
    ) -> None:
        self.current = initial
        self.sent = [NumberedState(0, now, initial)]  # sent[0]: newest state that the peer has acknowledged
        self._assumed = self.sent[0]  # newest state that the peer has, as far as we dare to assume
        # what the next instruction acknowledges
        self.ack_num = 0
        self.data_ack_due = False
        # the path
        self._round_trip = round_trip
        self._arrivals = arrivals
        # what is new, and when it may go; times are absolute ms, None for never
        self._collect_ms = collect_ms
        self._changed_at: int | None = None  # when `current` first differed from the last state sent
        self._fresh_bytes = 0  # of what made it differ, as far as that is known
        self._fresh_at = now  # when the newest of them came
        self._typed_at: int | None = None  # when the peer's user typed something whose answer has not been sent
        self._answered_at = now  # when an answer was last sent, be it ahead of its turn or not
        self._held_until = now  # a diff was too large for an address that is not proven, and a probe has gone instead
        # what is under way
        self._unacked_since: int | None = None  # when a change was first sent that no ack has answered in any part
        self._heard_at = now  # when the peer last said something new
        self._resend_now = False  # the peer has been heard, and lacks what it should have by now
        self._last_diff_bytes = self._last_bytes = 0  # of the last instruction, and of its datagrams,
        self._last_count = 0  # which were so many
        self._copies = 0  # how often the last state has been sent, be it as several
        # what is large
        self.may_step_back = True  # the peer bears a state that holds less than one before
        self._large = LargeDiffs()
        self._lost: Instruction | None = None  # a large one, which word for word its repeats shall make complete
        self._part: NumberedState[Local] | None = None  # a part of a state, behind which the rest waits for the ack
        # pacing and timers
        self._debt_bytes = 0.0  # sent and not yet paid off, at PACING_BYTES per frame interval
        self._debt_at = now
        self._next_send_at: int | None = None
        self._next_ack_at: int = now
        self._follows = False  # what is sent next is a heartbeat that answers the peer's
        self.hurried = False  # see hurry
        # shutdown
        self.shutdown_at: int | None = None
        self.shutdown_tries = 0

    # -- timers

    def update_timers(self, now: int) -> None:
        """Work out anew what to assume and when to send."""
        last = self.sent[-1]
        rest_waits = self._to_repeat is not None or (last is self._part and last is not self.sent[0])
        self._assumed = self.sent[0] if self.hurried or rest_waits else self._assume(now)
        self.current.forget_before(self.sent[0].state)
        if self.data_ack_due and self._to_repeat is None:
            self._next_ack_at = min(self._next_ack_at, now + ACK_DELAY_MS)
        if self.current != last.state and not rest_waits:
            if self._changed_at is None:
                self._changed_at = now
            turn_at = self._debt_at + self._pacing_ms()
            if self._typed_at is not None:
                next_answer_at = self._answered_at + 2 * self._round_trip.frame_interval_ms
                turn_at = min(turn_at, max(self._silent_at(self._typed_at), next_answer_at))
            self._next_send_at = max(self._collected_at(self._changed_at), turn_at, self._held_until)
        elif self.current != self.sent[0].state:
            self._changed_at = None
            self._next_send_at = last.at + self._resend_ms(last.at)
        else:
            self._next_send_at = self._changed_at = None
        if self._resend_now and self._next_send_at is not None:
            self._next_send_at = min(self._next_send_at, now)
        if self._is_ending:
            self._next_ack_at = last.at + self._round_trip.frame_interval_ms

    def _collected_at(self, changed_at: int) -> int:
        """Return when what belongs together has been gathered: a few bytes as soon as no more follow."""
        collected_at = changed_at + self._collect_ms
        few = 0 < self._fresh_bytes <= SMALL_DIFF_BYTES
        return min(collected_at, self._fresh_at + QUIET_MS) if few else collected_at

    def _silent_at(self, typed_at: int) -> int:
        """Return when the program will have said all that it says to what was typed, if no more comes."""
        return max(typed_at, self._fresh_at) + self._collect_ms

    @property
    def patience_ms(self) -> int:
        """How long an ack may take."""
        return self._round_trip.rto_ms + ACK_DELAY_MS

    def _interval_ms(self, sent_at: int) -> int:
        """Return the frame interval after an instruction sent at `sent_at`, stretched while nothing is acknowledged."""
        waited_ms = 0 if self._unacked_since is None else sent_at - self._unacked_since - self.patience_ms
        return max(self._round_trip.frame_interval_ms, min(ACK_INTERVAL_MS, waited_ms // BACKOFF))

    def _resend_ms(self, sent_at: int) -> int:
        """Return how long after an instruction sent at `sent_at` to repeat what it said."""
        interval = self._interval_ms(sent_at)
        if not self._round_trip.measured:
            return interval
        if self._to_repeat is not None:  # large, and its tries may be piling up in a buffer: each waits longer
            waited_ms = sent_at - (self._unacked_since or sent_at)
            return max(interval, self.patience_ms, min(ACK_INTERVAL_MS, waited_ms // 2))
        lossy = self._arrivals.lost_count >= LOSSY_COUNT
        copies = LOSSY_COPIES if lossy and self._last_bytes <= LOSSY_COPY_BYTES else 1
        if self._copies < copies:
            return clamp(self._round_trip.srtt_ms / 8, LOSSY_COPY_MS)
        if self._last_diff_bytes <= QUICK_DIFF_BYTES:
            if self._unacked_since is not None and sent_at - self._unacked_since < QUICK_RESEND_LIMIT_MS:
                interval = min(interval, QUICK_RESEND_MS)
        if self._unacked_since is not None and sent_at - self._unacked_since >= self.patience_ms:
            return max(interval, min(self._round_trip.rto_ms, interval * self._last_bytes // PACING_BYTES))
        return max(interval, self._round_trip.rto_ms if lossy else self.patience_ms)

    def _assume(self, now: int) -> NumberedState[Local]:
        """Return the newest state in an unbroken run of those sent within a retransmission timeout."""
        assumed = self.sent[0]
        for entry in self.sent[1:]:
            if now - entry.at >= self.patience_ms:
                break
            assumed = entry
        return assumed

    def spread_ms(self, now: int) -> int:
        """Return over how long to spread the fragments of a large instruction that is sent now."""
        is_slow = self._to_repeat is not None and now - self._heard_at <= OUTAGE_MS
        slow_ms = (self._large.lost_ms(now) - PART_PATIENCE_MS) // 2 if is_slow else 0
        return max(self._round_trip.frame_interval_ms, min(ACK_INTERVAL_MS, slow_ms))

    def charge(self, diff: bytes, sizes: list[int], now: int) -> None:
        """An instruction with `diff` has gone out, as datagrams of these sizes."""
        size = sum(sizes)
        paid = (now - self._debt_at) * PACING_BYTES / self._interval_ms(self._debt_at)
        debt = size if len(diff) <= SMALL_DIFF_BYTES else max(size, FRAME_DEBT_BYTES)
        self._debt_bytes = max(0.0, self._debt_bytes - paid) + debt
        self._debt_at = now
        self._last_diff_bytes, self._last_bytes, self._last_count = len(diff), size, len(sizes)

    def expect_answer(self, now: int) -> None:
        """The peer's user has typed something."""
        self._typed_at = now

    def hurry(self, now: int) -> None:
        """One of the ends may have moved: send at once what surely applies there, as a state of its own, so that the
        peer takes it for news even if it has heard the contents before, and resends what it has for us. But what is
        large and lost is only repeated: it will hardly have been heard, and a new number would end its assembly.
        """
        self._next_ack_at = min(self._next_ack_at, now)
        self.hurried = True

    def _pacing_ms(self) -> int:
        """Return how long after the last instruction the next one with something new may go out."""
        return math.ceil(self._interval_ms(self._debt_at) * min(1.0, self._debt_bytes / PACING_BYTES))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be said that a peer waits for."""
        return not self.data_ack_due and not self._is_ending

    @property
    def _is_ending(self) -> bool:
        """Whether one of the ends is shutting down."""
        return self.shutdown_at is not None or self.ack_num == LAST_STATE_NUM

    def next_timeout(self) -> int:
        """Return when instruction_to_send next wants to be asked, as of the last update_timers."""
        return self._next_ack_at if self._next_send_at is None else min(self._next_ack_at, self._next_send_at)

    # -- local state

    def set_current(self, state: Local, fresh_bytes: int, now: int) -> None:
        """Replace `current`; see Transport."""
        if self.current == self.sent[-1].state:
            self._fresh_bytes = 0
        self.current = state
        if fresh_bytes:
            self._fresh_bytes += fresh_bytes
            self._fresh_at = now

    # -- instructions out

    def instruction_to_send(self, now: int, room_bytes: int | None = None) -> Instruction | None:
        """Return the instruction that is due, if one is, and count it as sent. Call update_timers first.

        `room_bytes`: an empty diff and one larger than this give way to a probe.
        """
        if now < self.next_timeout():
            return None
        if self._to_repeat is not None:
            self._sent_again(now)
            return self._to_repeat
        base, diff = self._best_diff()
        last = self.sent[-1]
        if not diff and now < self._next_ack_at and (last is self.sent[0] or self.current == last.state):
            self.sent[0].state = self.current  # which may differ from it in what no diff can tell
            self._next_send_at = self._changed_at = None
            return None
        if now - self._heard_at > OUTAGE_MS or last.num == LAST_STATE_NUM:
            self._large.forgive()
        if self.may_step_back:
            self._large.judge(now, self.patience_ms)
        state, diff = self._sendable(base.state, diff)
        if room_bytes is None or 0 < len(diff) <= room_bytes:
            return self._send(base, diff, now, state)
        if self.sent[-1].num == LAST_STATE_NUM:  # behind which no other number can come
            if not diff:
                return self._send(base, diff, now, state)
            self.sent[-1].at = self._next_ack_at = now
            return None
        if diff:
            self._held_until = now + self._round_trip.rto_ms
        return self._send(self._assumed, PROBE_DIFF, now, self._assumed.state)

    def _best_diff(self) -> tuple[NumberedState[Local], bytes]:
        """Diff from the assumed state, or from the acknowledged one where that costs little and is safer.

        What is repeated sooner than the assumption ends always starts from there, since it doubts the assumption.
        """
        base, diff = self._assumed, self.current.diff_from(self._assumed.state)
        if base is not self.sent[0]:
            full = self.current.diff_from(self.sent[0].state)
            extra = len(full) - len(diff)
            if not diff or extra <= 0 or (len(full) < RESEND_LIMIT_BYTES and extra < RESEND_EXTRA_BYTES):
                return self.sent[0], full
        return base, diff

    def _sendable(self, base: Local, diff: bytes) -> tuple[Local, bytes]:
        """Return the state to send and its diff from `base`: `current`, or one on the way there if that is too far."""
        state = self.current
        while len(diff) > self._large.limit_bytes:
            nearer = state.part_way(base)
            shorter = nearer.diff_from(base)
            if len(shorter) >= len(diff):
                break
            state, diff = nearer, shorter
        return state, diff

    def _send(self, base: NumberedState[Local], diff: bytes, now: int, state: Local) -> Instruction:
        last = self.sent[-1]
        # an empty ack takes a number of its own, and so does a probe, and what makes no state differ but has a diff
        retransmission = diff not in (b"", PROBE_DIFF) and state == last.state and base is not last and not self.hurried
        is_whole = state is self.current or last.num == LAST_STATE_NUM
        is_last = self.shutdown_at is not None and is_whole and diff != PROBE_DIFF
        keeps_num = retransmission and not self._ack_seems_lost(now)
        num = LAST_STATE_NUM if is_last else last.num if keeps_num else last.num + 1
        if num == last.num:
            self._sent_again(now)
        else:
            self._copies = self._copies + 1 if retransmission else 1
            self.sent.append(NumberedState(num, now, state))
            if len(self.sent) > SENT_LIMIT:
                del self.sent[-SENT_DROP]
        self._large.sent(len(diff), now)
        is_part = not is_whole and self._large.limit_bytes < DIFF_LIMIT_BYTES and diff != PROBE_DIFF
        self._part = self.sent[-1] if is_part else None
        if state is self.current:
            self._fresh_bytes = 0
            if self._typed_at is not None and now >= self._silent_at(self._typed_at):
                self._typed_at, self._answered_at = None, now
        if num == LAST_STATE_NUM:
            self.shutdown_tries += 1
        if diff and self._unacked_since is None:
            self._unacked_since = now
        self._next_ack_at = now + ACK_INTERVAL_MS + (ACK_DELAY_MS if self._follows else 0)
        self._next_send_at = self._changed_at = None
        self.data_ack_due = self._resend_now = self.hurried = self._follows = False
        instruction = Instruction(base.num, num, self.ack_num, self.sent[0].num, diff)
        in_vain = base is self.sent[0] and len(diff) > PART_BYTES and self._large.tries > 1
        self._lost = instruction if in_vain and not self.may_step_back else None
        return instruction

    def _ack_seems_lost(self, now: int) -> bool:
        """Whether to repeat the last state under another number, so that it is acknowledged again."""
        if not self._round_trip.measured or self._unacked_since is None or now - self._unacked_since < self.patience_ms:
            return False
        if self._last_count == 1:
            return True
        may_be_narrow = self._last_bytes > NEW_NUM_BYTES or self._large.limit_bytes < DIFF_LIMIT_BYTES
        return not may_be_narrow and self._copies % PIECES_TRIES == 0

    def _sent_again(self, now: int) -> None:
        self.sent[-1].at = now
        self._copies += 1
        self._next_ack_at, self._next_send_at = now + ACK_INTERVAL_MS, None
        self._resend_now = self.hurried = False

    @property
    def _to_repeat(self) -> Instruction | None:
        """What to repeat word for word until it is acknowledged, if anything; the rest waits, acks included."""
        return None if self._is_ending else self._lost

    # -- acks in

    def process_ack(self, ack_num: int, now: int) -> None:
        """The peer has state `ack_num`; a number no longer kept is ignored."""
        for i, entry in enumerate(self.sent):
            if entry.num == ack_num and i > 0:
                del self.sent[:i]
                self._unacked_since = None if self.sent[-1].state == entry.state else now
                self._large.acknowledged()
                self._lost = None
                return

    def peer_heard(self, instruction: Instruction, unprompted: bool, now: int) -> None:
        """The peer's newest instruction is here: what it should know by now and does not has been lost.

        `unprompted`: see DatagramLayer.
        """
        if now - self._heard_at > OUTAGE_MS:
            self._large.excuse(now)
        self._heard_at = now
        if now - self.sent[-1].at >= self._round_trip.rto_ms:
            self.resend()
            if self._unacked_since is not None:
                self._unacked_since = now  # it can be reached again: what follows need not wait
            self.data_ack_due = self.data_ack_due or bool(instruction.diff)  # it may be a repeat: our ack was lost
        heartbeat = unprompted and not instruction.diff and now - self.sent[-1].at >= FOLLOW_MS
        if heartbeat and self.is_idle and self.current == self.sent[0].state:
            self._follows, self._next_ack_at = True, now

    def release(self) -> None:
        """The peer's address is proven: what was held may go."""
        self._held_until = 0

    def resend(self) -> None:
        """What was sent last has been lost."""
        self._resend_now = self.current != self.sent[0].state

    def train_left(self, now: int) -> None:
        """The last datagram of the last instruction has been sent only now: no ack could come, whoever was heard."""
        self._resend_now = False
        self._next_ack_at += now - self.sent[-1].at
        self.sent[-1].at = now


class Receiver(Generic[Remote]):
    """The half of the transport that holds the copies of the peer's object."""

    def __init__(self, initial: Remote, now: int) -> None:
        self.states = [NumberedState(0, now, initial)]  # ascending by number; the last one is the newest
        self._quench_until = 0

    def receive(self, instruction: Instruction, now: int) -> bool:
        """Take in the state that `instruction` describes. Returns whether it is the newest. Raises PacketError."""
        nums = [entry.num for entry in self.states]
        if instruction.new_num in nums or instruction.old_num not in nums:
            return False  # a duplicate, or a diff from a state we no longer have or never got
        base = self.states[nums.index(instruction.old_num)]
        kept = [entry for entry in self.states if entry.num >= instruction.throwaway_num]
        if len(kept) > RECEIVED_LIMIT or sum(entry.state.weight for entry in kept) > RECEIVED_LIMIT_WEIGHT:
            if now < self._quench_until:
                self.states = kept
                return False
            self._quench_until = now + QUENCH_MS
        state = base.state.applied(instruction.diff) if instruction.diff else base.state
        at = bisect.bisect([entry.num for entry in kept], instruction.new_num)
        kept.insert(at, NumberedState(instruction.new_num, now, state))
        self.states = kept
        state.forget_before(kept[0].state)
        return at == len(kept) - 1


class Phase(Enum):
    """Where a session is in its life."""

    CONNECTING = auto()  # no state of the peer has arrived
    CONNECTED = auto()  # one has
    CLOSING = auto()  # our last state is out, its ack is awaited
    CLOSED = auto()  # acked, or given up, or the peer has gone: nothing more is sent


class Transport(Generic[Local, Remote]):
    """One end of an SSP session: datagrams in and out, a local state to publish, a remote state to read."""

    def __init__(
        self,
        datagrams: DatagramLayer,
        local: Local,
        remote: Remote,
        now: int,
        *,
        collect_ms: int,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.datagrams = datagrams
        self.sender = Sender(local, now, collect_ms, datagrams.round_trip, datagrams.arrivals)
        self.receiver = Receiver(remote, now)
        self.phase = Phase.CONNECTING
        self.clean = False  # once CLOSED: whether both ends agreed on it
        self.stats = dict.fromkeys(("received", "dropped", "sent", "bytes_received", "bytes_sent"), 0)
        self._fragmenter = Fragmenter()
        self._assembly = FragmentAssembly()
        self._random_bytes = random_bytes
        self._train: deque[tuple[int, Fragment]] = deque()  # (due at, fragment) of the instruction being sent
        self._train_mtu_bytes = datagrams.mtu.bytes  # what it was cut for
        self._train_ack_num = 0  # what it acknowledges
        self._train_num = 0  # the state that it leads to
        self._proof_num = 0  # the first state sent to the peer's present address: its ack proves the address

    # -- bytes in

    def receive_datagram(self, data: bytes, source: Address, now: int, congested: bool = False) -> None:
        """Take in one UDP payload from `source`. Raises PacketError; the session goes on as if it had not come."""
        try:
            peers = self.datagrams.peers
            payload = self.datagrams.receive_datagram(data, source, now, congested)
            if self.datagrams.peers != peers:
                self._proof_num = self.sender.sent[-1].num + 1
            self.stats["received"] += 1
            self.stats["bytes_received"] += len(data)
            instruction = self._assembly.add(Fragment.decode(payload))
            if instruction is not None:
                self._receive_instruction(instruction, now)
                if self.datagrams.last_heard_at == now:
                    self.sender.peer_heard(instruction, self.datagrams.unprompted, now)
        except PacketError:
            self.stats["dropped"] += 1
            raise

    def _receive_instruction(self, instruction: Instruction, now: int) -> None:
        if instruction.protocol_version != PROTOCOL_VERSION:
            raise PacketError("mosh protocol version mismatch")
        sender = self.sender
        sender.process_ack(instruction.ack_num, now)
        self.datagrams.mtu.acknowledged(instruction.ack_num, now)
        if self._train and sender.sent[0].num >= self._train_num:
            self._train.clear()  # an earlier copy of it has arrived as a whole
        self.datagrams.last_round_trip_at = sender.sent[0].at
        if self.datagrams.allowance_bytes is not None and instruction.ack_num >= self._proof_num:
            self.datagrams.address_proven()
            sender.release()
        if self.receiver.receive(instruction, now):
            sender.ack_num = instruction.new_num
            if sender.ack_num == LAST_STATE_NUM:
                self._train.clear()  # the peer waits for one ack only
            unproven = self.datagrams.allowance_bytes is not None  # an address that a probe shall prove soon
            sender.data_ack_due = sender.data_ack_due or unproven or bool(instruction.diff)
            if self.phase is Phase.CONNECTING:
                self.phase = Phase.CONNECTED
        if self.phase is Phase.CLOSING and sender.sent[0].num == LAST_STATE_NUM:
            self._close(clean=True)

    # -- bytes out

    def datagrams_to_send(self, now: int) -> list[bytes]:
        """Return the datagrams that are due, each for every address in `datagrams.peers`."""
        self._check_shutdown(now)
        if self.phase is Phase.CLOSED or not self._may_send:
            self._train.clear()
            return []
        self.datagrams.mtu.update(now, self.sender.patience_ms)
        if self.datagrams.mtu.bytes < self._train_mtu_bytes:
            self._train.clear()  # none of it would arrive
            self._train_mtu_bytes = self.datagrams.mtu.bytes
            self.sender.resend()
        self.sender.update_timers(now)
        if not self._train:
            self._start_train(now)
        out = []
        while self._train and self._train[0][0] <= now:
            out.append(self.datagrams.seal(self._train.popleft()[1].encode(), now))
        if out and not self._train:
            self.sender.train_left(now)
        self.stats["sent"] += len(out)
        self.stats["bytes_sent"] += sum(map(len, out))
        self.sender.update_timers(now)
        if self._train_ack_num == LAST_STATE_NUM and out and not self._train:
            self._close(clean=True)  # the peer hears that we know or it does not; neither waits for the other
        return out

    def _start_train(self, now: int) -> None:
        """Line up the fragments of the instruction that is due, if one is."""
        mtu = self.datagrams.mtu
        hurried = self.sender.hurried
        may_probe = self.sender.is_idle and not hurried
        allowance = self.datagrams.allowance_bytes
        room_bytes = None if allowance is None else allowance - EMPTY_DATAGRAM_BYTES
        instruction = self.sender.instruction_to_send(now, room_bytes)
        if instruction is None:
            return
        mtu_bytes = mtu.bytes
        if may_probe and not instruction.diff and mtu.wants_probe(now):
            mtu_bytes = mtu.full_bytes
            chaff_bytes = mtu_bytes - PROBE_OVERHEAD_BYTES - len(instruction.encode())
            mtu.probe_sent(instruction.new_num, now)
        else:
            chaff_bytes = self._random_bytes(1)[0] % (MAX_CHAFF_BYTES + 1)
            if hurried and allowance is None:
                chaff_bytes += max(0, HURRIED_BYTES - EMPTY_DATAGRAM_BYTES - len(instruction.diff))
        instruction.chaff = self._random_bytes(chaff_bytes)
        fragments = self._fragmenter.fragments_of_retry(instruction, mtu_bytes)
        sizes = [FRAGMENT_OVERHEAD_BYTES + len(fragment.contents) for fragment in fragments]
        if mtu_bytes == mtu.bytes:
            mtu.instruction_sent(instruction.new_num, max(sizes), now)
        self.sender.charge(instruction.diff, sizes, now)
        self._train_mtu_bytes, self._train_ack_num = mtu.bytes, instruction.ack_num
        self._train_num = instruction.new_num
        late = max(1, len(fragments) - BURST_DATAGRAMS + 1)
        interval = self.sender.spread_ms(now)
        self._train.extend(
            (now + max(0, i - BURST_DATAGRAMS + 1) * interval // late, fragment) for i, fragment in enumerate(fragments)
        )

    # -- timers

    def next_timeout(self) -> int | None:
        """Return when datagrams_to_send has to be asked next; None while there is nobody to send to."""
        if self.phase is Phase.CLOSED:
            return None
        deadlines = []
        if self._may_send:
            deadlines.append(self._train[0][0] if self._train else self.sender.next_timeout())
            if self.datagrams.mtu.bytes < self._train_mtu_bytes:
                deadlines.append(self.sender.sent[-1].at)  # what was refused is sent again at once
        if self.sender.shutdown_at is not None:
            deadlines.append(self.sender.shutdown_at + SHUTDOWN_MS)
        return min(deadlines, default=None)

    def _check_shutdown(self, now: int) -> None:
        sender = self.sender
        if sender.shutdown_at is not None and (
            sender.shutdown_tries >= SHUTDOWN_TRIES or now - sender.shutdown_at >= SHUTDOWN_MS
        ):
            self._close(clean=False)

    # -- local and remote state

    def set_current(self, state: Local, now: int, *, fresh_bytes: int = 0) -> None:
        """Publish `state`, made by `fresh_bytes` of input, if that is known.

        Refused silently once this end is closing, since its last state is already out.
        """
        if self.sender.shutdown_at is None:
            self.sender.set_current(state, fresh_bytes, now)
            self.sender.update_timers(now)

    def hurry(self, now: int) -> None:
        """One of the ends may have moved: what is on its way is lost, so say anew what the other one should know."""
        self._train.clear()
        self.datagrams.mtu.doubt()
        self.sender.hurry(now)

    def start_shutdown(self, now: int) -> None:
        """Tell the peer that this end is leaving; the phase becomes CLOSED when it knows or cannot be told."""
        if self.sender.shutdown_at is None and self.phase is not Phase.CLOSED:
            self.sender.shutdown_at = now
            self.phase = Phase.CLOSING
            self._train.clear()  # the last state comes at once, and holds all of it
            self.sender.update_timers(now)

    def _close(self, clean: bool) -> None:
        if self.phase is not Phase.CLOSED:
            self.phase, self.clean = Phase.CLOSED, clean

    # -- queries

    @property
    def _may_send(self) -> bool:
        """Whether there is an address, and it may be sent an instruction."""
        allowance = self.datagrams.allowance_bytes
        return bool(self.datagrams.peers) and (allowance is None or allowance >= EMPTY_DATAGRAM_BYTES)

    @property
    def remote(self) -> NumberedState[Remote]:
        """The newest state of the peer, with its number and time of arrival."""
        return self.receiver.states[-1]

    @property
    def last_sent_num(self) -> int:
        """The number of our newest state on its way."""
        return self.sender.sent[-1].num

    @property
    def last_acked_at(self) -> int:
        """When the newest of our states that the peer is known to have was sent."""
        return self.sender.sent[0].at


# ======================================================================================================================
# == 8. Text -- UTF-8 decoding, character widths
# ======================================================================================================================
# Both ends must read the same bytes as the same cells, or the screens drift apart for good. So malformed UTF-8 is
# replaced exactly as the C library's `mbrtowc` makes stock mosh do it, and a width is what glibc 2.36 says (Unicode
# 14) wherever that differs from the `wcwidth` package. Newer characters have the package's width. All code points that
# two ends might judge differently are "doubtful": after drawing one, the display says explicitly where it goes on.

INVALID_CHAR = "\ufffd"


class LazyPattern:
    """A regular expression that is compiled when it is first used; its methods are then those of the compiled one."""

    def __init__(self, source: str | bytes, flags: int) -> None:
        self._source, self._flags = source, flags

    def __getattr__(self, name: str) -> Any:
        method = getattr(re.compile(self._source, self._flags), name)
        setattr(self, name, method)  # the next look-up does not come here
        return method


def lazy_pattern(source: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """Return a LazyPattern. All of them take 3 ms to compile, which no login should wait for."""
    return LazyPattern(source, flags)  # type: ignore[return-value]


# Where `mbrtowc` and Python's decoder part: overlong forms, surrogates, and leads beyond U+10FFFF.
_ODD_FORM = lazy_pattern(
    rb"\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]|[\xf5-\xfd](?:[\x80-\xbf]|\Z)"
)
_CUT_OFF = lazy_pattern(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")  # more must follow
# (first lead byte, length, smallest code point that needs it). The lengths 5 and 6 of old UTF-8 are still recognized.
_UTF8_LEADS = (
    *((0x00, 1, 0), (0x80, 0, 0), (0xC2, 2, 0), (0xE0, 3, 0x800)),
    *((0xF0, 4, 0x10000), (0xF8, 5, 0x200000), (0xFC, 6, 0x4000000), (0xFE, 0, 0)),
)
_FIRST_LEADS = [row[0] for row in _UTF8_LEADS]
_CONTINUATION = bytes(range(0x80, 0xC0))


def _decode_one(pending: bytes) -> str | None:
    """Return the one character in `pending`, "" if it is malformed, None if more bytes are needed: as `mbrtowc`."""
    lead = pending[0]
    _first, length, smallest = _UTF8_LEADS[bisect.bisect(_FIRST_LEADS, lead) - 1]
    if length == 0 or pending[1:].strip(_CONTINUATION):
        return ""
    if len(pending) < length:
        return None
    value = lead if length == 1 else lead & (0x7F >> length)
    for byte in pending[1:]:
        value = value << 6 | byte & 0x3F
    if value < smallest or 0xD800 <= value <= 0xDFFF:
        return ""
    return chr(value) if value <= sys.maxunicode else INVALID_CHAR


class Utf8Decoder:
    """Incremental UTF-8 decoder; a character may be cut by the end of a feed."""

    def __init__(self) -> None:
        self._pending = b""

    @property
    def may_begin_control(self) -> bool:
        """Whether the next byte can make a C1 control of what is pending."""
        return self._pending == b"\xc2"

    def decode(self, data: bytes) -> str:
        """Return the characters that `data` completes, with U+FFFD where it is malformed."""
        data, self._pending = self._pending + data, b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
        out: list[str] = []
        at = 0
        while at < len(data):
            odd = _ODD_FORM.search(data, at)
            cut_off = None if odd else _CUT_OFF.search(data, at)
            stop = odd.start() if odd else cut_off.start() if cut_off else len(data)
            out.append(data[at:stop].decode("utf-8", "replace"))
            at = self._decode_odd_form(data, stop, out)
        return "".join(out)

    def _decode_odd_form(self, data: bytes, at: int, out: list[str]) -> int:
        """Decode bytes one by one, as `mbrtowc` does, until none is left over; return the offset behind."""
        pending = b""
        while at < len(data):
            pending += data[at : at + 1]
            at += 1
            while pending:
                char = _decode_one(pending)
                if char is None:
                    break
                # Of a malformed sequence all but the last byte become one U+FFFD, and the last is tried again.
                out.append(char or INVALID_CHAR)
                pending = b"" if char or len(pending) == 1 else pending[-1:]
            if not pending:
                return at
        self._pending = pending
        return at


# Code points judged differently by glibc 2.36 and `wcwidth`, or unknown to Unicode 14. Per run "gap length verdict" in
# hexadecimal, compressed. Generated by tests/make_width_table.py, 2026-11-22, wcwidth 0.9.4.
WIDTH_EXCEPTIONS = (
    "c-oa&*|qE_3{1rV+z$|&3CC;xAq=PrP~U!U&diV73kad5RHEJHH}?}t*`)pEEw*dXcOKV>pZ(Tf$@=5kHU0!?liCkO=!4sGAAYK!yq*2QJs5"
    "FejkG=e>C~s-_2<PZ7=e|~E%p0XmlA!zviWR3(iiMMvW0ft+j{cTWeL<09qihNE>R#C%8%`Zc8&bpW#Ha%^17F8=i2>!)bU+Hg3wA4ey*80="
    "xa^+xUQ`_U0=+!pxXJZsE&T#d%qpOR;w^B27RxV%ns9hKPF>`p1Qo#BA2c<EcGAE`MH=^q5fZt>giBX=l;dCGB?|e8s;{m-irxS;hQjRcd59"
    "wKT#_WTRUU-vHNVi+#}Q{M4%4(urlp}{Ui-NXTC=@o|rcXTr32O96IJy#r`1s_=7pqT*i82#Aq>QUb!MvNTy8D_inrB$Is>EVk-DQnkuMKgD"
    "S*aJ-#&ZaD(4Xcw*~?Q5}syZ?a%l8Ci9;q0)5?hfeeNCh3>+6CujNR-td!tIUo2DZZJ-b;*w|gXt1=nFltX@BGB5u|8ZEbzCMAskT*r4yJVJ"
    "uM&Nf_3GE>VVpEg<V!U!vq(&+vY*BO>sTlp?2H&N5xLNu*NvSr!5<6U`YlxePGUyX^&ohN>X+L_4?G2P6m=&8!zV^yp4YK9mJy(R%$o6@nrm"
    "hWqtK>vp0NlRmxJy;5yNpUZ~_xf19Yq$o@x%W4P|!~4~eJI_<@7oO;G4wVsldku#rrndJ|Jbxp!t{`}|CF93j!l<Em%SCorpe{gGYmxpPKP|"
    "AtXkBePyks=cFFco-kTbb$YGwte`>AA5aawPdp3;XM5wSh7~S3+hBT^@&Jv>i&Cl#U8m)l|B*1-IhE2Cbj60W>fgjYj)g#hlDJOPaJ`)$eM2"
    "K?*2-suoI0RU__m%@;|N*;RrhWYXM)2U(JGMii1_B?XHgxy+C-AUS)VlW4oIx^uX02kv^;ox!+;Qy^Sjpkd`fWk%=u@y0y+-U48ZZi3E4A*F"
    "<gO6p6A%?&eMCB^8Y*4?F1&sZ_6Wq(GMrD1%-pw|iz;)-(_k)IE-GQn|R$N?v}K2_-i%MkX{X0!$9kB5y~*T{t_E?U?a9uD?Az6GTxm7)CIz"
    "enJCmAm;&aYh@&Yr0x!wk{S6;O*MuNBT+bPHToia<?gm@-Z^j3=G+2PNr3}`<q;N|Qo!su1@6TV#`+Ev318b^^l=#Bm{j6|^usP9Olv_}tC4"
    "`lKv-ct*jfHi!lh?yi}PJjlmpE4g2hKv&58&~3*bFk0ZFW~(siqkwS643;|TvIIcl_B27xT?Jpb^XTrW<t<45YC#_WhGKp4}oY7#XkxoJs1X"
    "wi~73N>5=1?v`^H7TGL!@2Vg5E_NdvWOb0?h-R?w`}mHJL9B`sFzJcgbf1p(wzlxWKJ6E9&92mHBRcYVpF#u+HU+5dULu#^^B7<H<^)z$T6F"
    "4w<<O57Y1K-IxbJXHKmaZ_dK9$`&9A)wTvgQ`7*(9;=pMG3z(zPIWXq{dl-FLSwV%`y3bJWB6rxYPKq5IslE`o1SM4cbb{G>hz_$lL$%716`"
    "n69wn7tRf~)N69jf<#I;>%6Q6l}>RgL>F??2m`L?jqrLC8Uy+;&(OO~iDDH~;eEf0+>fGG4v{%HLoaVbUD9m{w>zf0p?&<08%?mKnWAMv<{C"
    "{Tc=OX1uU`h|>yqq<KHAxIvxBq*2)<iMNb^CmN<P0L-;eKI>|(>X4)09yBp`I&1MT8BI<8)#^FZ6n=KvRTYbQMNu(U5Vb-a&Hp)C1NlMT7nm"
    "Hx^i*Jom2Kq-f|=N*=>uIShFBc)0H_X_Ule<E1;;8F;%u0^IaucQV*P!1auI{qt7>2?+o8_1%<^&E;b+S{(e5&2Y3*ag=EDO4+iUxeyr|!3n"
    "bJH}X$Y^;T^k0do-a9Cx9kOQZu3F`3v_+k8R#6@IMgBb(6Mhl7weDBM8^rd4AlP8JP2&#UiQ5jbDj?w6&bwYSpC;w&&fz`S}vZ>E}-($ISw1"
    "D&3``hT@BFg6{kCcr&wBI2k>;V>{xrXM3;BhFpG^><FzarTYKf!t-t!N0D5mIS8YHBHWH6wOZ-ApFM(C6THv~8EwjWq@?Lk)nw6@QFv9`}=u"
    "vZ!#&3dK-`mE<8BKKgVqz#*NL+X-&mbI{3~>ux><d>3j$M`Gc8Ka|QTE<5#o^5+SXObGn02ilzL~PjCSR3O%HQ{rP;g@TIJ8_PDzd{{6_32g"
    "9z^Umo-R`tlR1hV;TBE#@Ivf5A5Ejtf+lD4EIa`ro`dl{EF1C)1g_xCamgsE2;yd-2-`2u7q>X@;Hf;QjDrDroKKPF-B3=DCO2W^{A$K7ZsN"
    "67G=G)F$1S6N5Oy^@Pf8Vl+JK8pktwH|#pZ84m$|oVxy+w74-D5m%u?eRAkSmF@8f~+7dd~s+L1OR<JY>!@K>74r12`y2ku!XJ{i&cn!~Sm)"
    "FFknhn5cn@I&kHy(Cm~R?r&BL#?)(_L0X8NM-~@>8r+m5D=z|c>=X{*W#XSHTfPM2))936Rp$ro-kUN7jeeM!{e@?H3Zqy2YZ~Z;4mP6@Gx&"
    "Ms0%tim|6e2^G%p<3g2}5*Y!6~(&?V9lG51xup#kID^C2mADhQ{m+hKX^fz0@&L@#`^}vB<>lPm!65=Q=;+abI+()sF4yDkAi}9i^Yu4#Xyb"
    "W_7Z9?Ang{{WTKT$*A4F"
)
_VERDICTS = (-1, 0, 1, 2, None)  # None: the package decides
_NO_EXCEPTION = -2
ZERO_WIDTH_JOINER = "\u200d"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_JOINERS = f"{ZERO_WIDTH_JOINER}\ufe0e\ufe0f{SKIN_TONES}"  # the two ends agree on these, but the terminal may not


@lru_cache(maxsize=1)
def _width_exceptions() -> tuple[list[int], list[int | None]]:
    """Return the exceptions as (first code points of runs, verdict per run)."""
    starts: list[int] = [0]
    verdicts: list[int | None] = [_NO_EXCEPTION]
    import base64  # 2 ms

    for run in zlib.decompress(base64.b85decode(WIDTH_EXCEPTIONS)).decode("ascii").split(","):
        gap, length, verdict = (int(word, 16) for word in run.split())
        starts += [starts[-1] + gap, starts[-1] + gap + length]
        verdicts += [_VERDICTS[verdict], _NO_EXCEPTION]
    return starts, verdicts


@lru_cache(maxsize=1)
def _package_width() -> Callable[[str], int]:
    """Return `wcwidth`: from the table baked into mosh.pyz, from the package, or as a last resort by the stdlib."""
    try:
        import mosh_widths  # made by build_zipapp.py

        return lambda char: mosh_widths.WIDTHS[bisect.bisect(mosh_widths.STARTS, ord(char)) - 1] - 1
    except ImportError:
        pass
    try:
        from wcwidth import wcwidth  # 28 ms, hence only when the first character beyond Latin-1 comes

        return wcwidth
    except ImportError:
        import unicodedata

    def by_category(char: str) -> int:
        if unicodedata.category(char) in ("Mn", "Me", "Cf"):
            return 0
        return 2 if unicodedata.east_asian_width(char) in "WF" else 1

    return by_category


@lru_cache(maxsize=8192)
def char_width(char: str) -> int:
    """Return the number of columns of one character: 1, 2, 0 if it combines, -1 if it is not printable at all."""
    if " " <= char <= "~" or "\xa0" <= char <= "\xff":
        return 1
    if char < "\xa0":
        return -1
    starts, verdicts = _width_exceptions()
    verdict = verdicts[bisect.bisect(starts, ord(char)) - 1]
    return _package_width()(char) if verdict in (None, _NO_EXCEPTION) else verdict


@lru_cache(maxsize=8192)
def is_width_doubtful(char: str) -> bool:
    """Return whether another terminal may well give `char` a different width."""
    starts, verdicts = _width_exceptions()
    return char > "\xff" and (char in _JOINERS or verdicts[bisect.bisect(starts, ord(char)) - 1] != _NO_EXCEPTION)


# Characters of width 1 that make up nearly all text: ASCII, Latin, Cyrillic, box drawing and blocks. Text beyond these
# is only slower. NUL stands for an empty cell.
_NARROW = " -~\xa0-\u02ff\u0400-\u0482\u048a-\u052f\u2500-\u25fc\ufffd"
_WIDE = "\u3041-\u3096\u30a1-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff60"
NARROW_RUN = lazy_pattern(f"[{_NARROW}]+")
WIDE_RUN = lazy_pattern(f"[{_WIDE}]+")
# Marks that combine, of width 0: Latin, Hebrew, Arabic, Devanagari, Thai, joiners. Texts with others are only slower.
MARKS = (
    "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0901\u0902\u093c\u0941-\u0948\u094d"
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u200d\ufe0e\ufe0f"
)
CLUSTER = lazy_pattern(f".[{MARKS}]*", re.DOTALL)  # a character with the marks behind it
NARROW_CELLS = lazy_pattern(f"[\0{_NARROW}]*")


# ======================================================================================================================
# == 9. Framebuffer -- rendition, cell, row, cursor, framebuffer
# ======================================================================================================================
# A screen is copied for every state in flight and compared with every other, so a row is built for copying and
# comparing in C: two strings of equal length, one code point per cell. `text` holds what a cell shows; `attrs` names
# its rendition (colours and attributes). Both are trimmed: cells past their end are empty and have the row's `fill`.
#
#     text   "$ ls\0\0x"        attrs  "00001110"        fill "0"
#
# A row never changes. Writing replaces it in the framebuffer, so snapshots share rows for nothing and "is it the same
# row?" is mostly answered by identity. What does not fit one code point is named by one, in a codebook that all
# framebuffers of a session share: a cluster (base character with combining marks) by a private code point, a
# rendition by a number in the order of first use.

NUL = "\0"  # an empty cell, and the cell covered by the right half of a wide character

ATTRIBUTE_NUMBERS = (1, 3, 4, 5, 7, 8)  # SGR parameter n is bit n
BOLD, ITALIC, UNDERLINED, BLINK, INVERSE, INVISIBLE = (1 << n for n in ATTRIBUTE_NUMBERS)
RGB = 0x1000000  # a colour is None, a palette index 0..255, or RGB | red << 16 | green << 8 | blue

CLUSTER_LIMIT_BYTES = 32  # a cell that has reached this takes no more combining marks
_NARROW_CLUSTERS, _WIDE_CLUSTERS = 0x100000, 0x108000  # code points for clusters: plane 16, one half each
_CLUSTER_CODES = 0x7FF0  # per half
_RENDITION_CODES = 0x7FFF0
_WRAP_BIT = 0x80000  # added to the rendition code of a row's last cell: the line goes on in the next row
_REMEMBERED_CLUSTERS = 4_096
_SWEEP_FROM = 4_096  # entries of a table before unused ones are looked for
assert _RENDITION_CODES <= _WRAP_BIT


class Rendition(namedtuple("Rendition", "attributes foreground background", defaults=(0, None, None))):
    """How a cell is shown: attribute bits, foreground and background colour. A tuple, since tuples hash in C."""

    __slots__ = ()

    def sgr(self) -> str:
        """Return the control sequence that selects this rendition whatever was selected before."""
        numbers = "".join([f";{n}" for n in ATTRIBUTE_NUMBERS if self.attributes >> n & 1]) if self.attributes else ""
        return f"\x1b[0{numbers}{_sgr_color(30, self.foreground)}{_sgr_color(40, self.background)}m"


def _sgr_color(base: int, color: int | None) -> str:
    """Return the parameters that select a foreground (`base` 30) or background (40) colour."""
    if color is None:
        return ""
    if color >= RGB:
        return f";{base + 8};2;{color >> 16 & 255};{color >> 8 & 255};{color & 255}"
    return f";{base + color}" if color < 8 else f";{base + 8};5;{color}"


class Cell:
    """One cell, as seen from outside the framebuffer."""

    __slots__ = ("contents", "fallback", "rendition", "wide", "wrap")

    def __init__(self, contents: str, rendition: Rendition, wide: bool, fallback: bool, wrap: bool) -> None:
        self.contents = contents  # empty, or a character and its combining marks
        self.rendition = rendition
        self.wide = wide  # covers the next cell too
        self.fallback = fallback  # contents start with a combining mark
        self.wrap = wrap  # last cell of a line that goes on in the next row


class _CodeTable:
    """Names values by code points from `first` on, each value once."""

    def __init__(self, first: int, capacity: int) -> None:
        self.values: dict[str, Any] = {}
        self._codes: dict[Any, str] = {}
        self._numbers = range(first, first + capacity)
        self._free: Iterator[int] = iter(self._numbers)
        self._sweep_at = _SWEEP_FROM

    def code(self, value: Any) -> str | None:
        """Return the code point of `value`, None if it has none."""
        return self._codes.get(value)

    @property
    def wants_sweep(self) -> bool:
        """Whether so many values have been named that it is worth looking for unused ones."""
        return len(self.values) >= self._sweep_at

    def sweep(self, used: set[str]) -> None:
        """Forget the values whose code points are not in `used`."""
        for code in self.values.keys() - used:
            del self._codes[self.values.pop(code)]
        self._free = (number for number in self._numbers if chr(number) not in self.values)
        self._sweep_at = min(max(_SWEEP_FROM, 2 * len(self.values)), len(self._numbers))

    def add(self, value: Any) -> str | None:
        """Return a new code point for `value`, None if there is none left."""
        number = next(self._free, None)
        if number is None:
            return None
        code = chr(number)
        self.values[code], self._codes[value] = value, code
        return code


class Codebook:
    """Names renditions and clusters by single code points, for all framebuffers of a session.

    A table that has doubled or is full is swept: what no live framebuffer uses is dropped, so its size is bounded by
    what is on the screens. While all code points are in use, new renditions read as the default one and new clusters
    as U+FFFD.
    """

    DEFAULT = "\0"  # the code of the default rendition

    def __init__(self) -> None:
        self._renditions = _CodeTable(0, _RENDITION_CODES)
        self._clusters = {  # by whether they are wide; values are (contents, wide, fallback)
            False: _CodeTable(_NARROW_CLUSTERS, _CLUSTER_CODES),
            True: _CodeTable(_WIDE_CLUSTERS, _CLUSTER_CODES),
        }
        self._holders: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.erased: dict[str, str] = {}  # pen to code of an erased cell
        self._cells: dict[str, str] = {}  # what clusters become: texts repeat a few
        self.selected: dict[tuple[str, str], str] = {}  # (pen, SGR) to pen: programs repeat a few
        self.rendition_code(Rendition())

    def register(self, holder: Any) -> None:
        """`holder.codes_in_use()` yields strings whose code points a sweep has to keep, as long as it lives."""
        self._holders[id(holder)] = holder

    def sweep_if_due(self) -> None:
        """Drop what nobody uses. To be called when every code point in use is in a holder."""
        tables = (self._renditions, *self._clusters.values())
        if not any(table.wants_sweep for table in tables):
            return
        strings = {self.DEFAULT}  # of which snapshots share most
        for holder in list(self._holders.values()):
            strings.update(holder.codes_in_use())
        used = set().union(*strings)
        used |= {without_wrap(code) for code in used if has_wrap(code)}
        for table in tables:
            table.sweep(used)
        self.erased.clear()
        self._cells.clear()
        self.selected.clear()

    # -- renditions

    def rendition_code(self, rendition: Rendition) -> str:
        """Return the code point that stands for `rendition` in `attrs`."""
        return self._renditions.code(rendition) or self._renditions.add(rendition) or self.DEFAULT

    def rendition(self, code: str) -> Rendition:
        """Return the rendition that `code` stands for, with or without the wrap bit."""
        found: Rendition | None = self._renditions.values.get(code)
        return found or self.rendition(without_wrap(code))

    def erased_code(self, pen: str) -> str:
        """Return the code of an erased cell under `pen`: its background and nothing else (back colour erase)."""
        code = self.erased.get(pen)
        if code is None:
            code = self.rendition_code(Rendition(background=self.rendition(pen).background))
            self.erased[pen] = code
        return code

    # -- clusters

    def cell_code(self, contents: str, wide: bool, fallback: bool) -> str:
        """Return the code point that stands for such a cell, one with contents, in `text`."""
        if len(contents) == 1 and not fallback and ord(contents) < _NARROW_CLUSTERS:
            if wide == (char_width(contents) == 2):
                return contents
        table, value = self._clusters[wide], (contents, wide, fallback)
        return table.code(value) or table.add(value) or INVALID_CHAR

    def marked(self, code: str, mark: str) -> str:
        """Return the code point of a cell with one more combining mark, or the same if the cell is full."""
        contents = self.contents(code)
        if len(contents.encode("utf-8", "replace")) >= CLUSTER_LIMIT_BYTES:
            return code
        return self.cell_code(contents + mark, self.is_wide(code), code == NUL or self.is_fallback(code))

    def cells(self, cluster: str) -> str:
        """Return the cells that a character and its combining marks take, empty if it is none that takes any."""
        cells = self._cells.get(cluster)
        if cells is None:
            width = char_width(cluster[0])
            code = cluster[0] if width > 0 else ""
            if code:
                code = self.cell_code(code, width == 2, fallback=False)
                for mark in cluster[1:]:
                    code = self.marked(code, mark)
            cells = code + NUL if width == 2 else code
            if len(self._cells) >= _REMEMBERED_CLUSTERS:
                self._cells.clear()
            if len(cluster) <= CLUSTER_LIMIT_BYTES:
                self._cells[cluster] = cells
        return cells

    def contents(self, code: str) -> str:
        """Return what a cell shows: empty, or a character and its combining marks."""
        if ord(code) >= _NARROW_CLUSTERS:
            return str(self._clusters[ord(code) >= _WIDE_CLUSTERS].values[code][0])
        return "" if code == NUL else code

    def is_fallback(self, code: str) -> bool:
        """Return whether the cell's contents start with a combining mark."""
        return ord(code) >= _NARROW_CLUSTERS and bool(self._clusters[ord(code) >= _WIDE_CLUSTERS].values[code][2])

    @staticmethod
    def is_wide(code: str) -> bool:
        """Return whether the cell covers the next one too."""
        if ord(code) >= _NARROW_CLUSTERS:
            return ord(code) >= _WIDE_CLUSTERS
        return char_width(code) == 2


def with_wrap(code: str) -> str:
    """Return a rendition code with the mark of a line that goes on in the next row."""
    return chr(ord(code) | _WRAP_BIT)


def without_wrap(code: str) -> str:
    """Return a rendition code without that mark."""
    return chr(ord(code) & ~_WRAP_BIT) if has_wrap(code) else code


def has_wrap(code: str) -> bool:
    """Return whether a rendition code has that mark."""
    return code >= chr(_WRAP_BIT)


def without_wraps(attrs: str) -> str:
    """Return `attrs` without any such marks; it is nearly always the last cell that has one."""
    attrs = attrs[:-1] + without_wrap(attrs[-1:])
    return "".join(map(without_wrap, attrs)) if has_wrap(max(attrs, default="")) else attrs


class Row:
    """One line of the screen. Never changes; see the section's introduction."""

    __slots__ = ("attrs", "fill", "text")

    def __init__(self, text: str, attrs: str, fill: str) -> None:
        if text[-1:] == NUL:  # trim, so that equal rows have equal strings
            kept = len(text.rstrip(NUL))
            kept += len(attrs[kept:].rstrip(fill))
            text, attrs = text[:kept], attrs[:kept]
        self.text = text
        self.attrs = attrs
        self.fill = fill

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Row)
            and self.text == other.text
            and self.attrs == other.attrs
            and self.fill == other.fill
        )

    def __hash__(self) -> int:
        return hash((self.text, self.attrs, self.fill))

    def padded(self, width: int) -> tuple[str, str]:
        """Return text and attrs of at least `width` cells."""
        missing = width - len(self.text)
        if missing <= 0:
            return self.text, self.attrs
        return self.text + NUL * missing, self.attrs + self.fill * missing

    def with_cells(self, col: int, text: str, attrs: str) -> Row:
        """Return this row with the cells from `col` replaced by `text` and `attrs`, strings of equal length."""
        old_text, old_attrs = self.text, self.attrs
        size, end = len(old_text), col + len(text)
        if col == size:  # most printing appends
            return Row(old_text + text, old_attrs + attrs, self.fill)
        if col > size:
            old_text, old_attrs = self.padded(col)
        return Row(old_text[:col] + text + old_text[end:], old_attrs[:col] + attrs + old_attrs[end:], self.fill)

    def erased(self, start: int, end: int, width: int, code: str) -> Row:
        """Return this row with the cells [start, end) empty, in the rendition `code`."""
        if end < width:
            return self.with_cells(start, NUL * (end - start), code * (end - start))
        text, attrs = self.padded(start)
        return Row(text[:start], attrs[:start], code)

    def inserted(self, col: int, count: int, width: int, code: str) -> Row:
        """Return this row with `count` empty cells put in at `col`; what leaves on the right is lost."""
        count = min(count, width - col)
        text, attrs = self.padded(col)
        text = text[:col] + NUL * count + text[col:]
        return Row(text[:width], (attrs[:col] + code * count + attrs[col:])[:width], self.fill)

    def deleted(self, col: int, count: int, width: int, code: str) -> Row:
        """Return this row without `count` cells from `col`; empty ones enter on the right."""
        count = min(count, width - col)
        text, attrs = self.padded(width)
        return Row(text[:col] + text[col + count :], attrs[:col] + attrs[col + count :], code)

    def resized(self, old_width: int, width: int, code: str) -> Row:
        """Return this row cut or extended to `width`, no longer marked as going on in the next row."""
        text, attrs = self.padded(old_width)
        attrs = without_wraps(attrs)
        return Row(text[:width], attrs[:width], code if width > old_width else self.fill)


class Framebuffer:
    """The screen with everything the display can express: cells, cursor, pen, modes, titles, clipboard, bell."""

    # What makes two screens differ as far as the user can tell; the icon name alone does not.
    _VISIBLE = (
        *("rows", "window_title", "clipboard", "bell_count", "width", "height", "cursor_row", "cursor_col"),
        *("cursor_visible", "reverse_video", "pen", "bracketed_paste", "mouse_mode", "mouse_encoding"),
        *("focus_events", "alternate_scroll", "copy_count"),
    )

    def __init__(self, width: int, height: int, codebook: Codebook) -> None:
        self.codebook = codebook
        codebook.register(self)
        self.icon_name = ""
        self.title_was_set = False
        self.bell_count = 0
        self.copy_count = 0  # how often the clipboard was set; once more counts: the user may have copied elsewhere
        self.width = width
        self.height = height
        self.reset()

    def reset(self) -> None:
        """Bring everything but size, icon name, title-was-set and the counts to its initial state (RIS)."""
        self.pen = Codebook.DEFAULT
        self.rows = [Row("", "", Codebook.DEFAULT)] * self.height
        self.cursor_row = self.cursor_col = 0
        self.cursor_visible = True
        self.reverse_video = False
        self.bracketed_paste = self.focus_events = self.alternate_scroll = False
        self.mouse_mode = self.mouse_encoding = 0  # 0, or the number of the DEC private mode that is set
        self.window_title = self.clipboard = ""

    def copy(self) -> Framebuffer:
        """Return a snapshot; rows are shared."""
        new = Framebuffer.__new__(Framebuffer)
        new.__dict__.update(self.__dict__)
        new.rows = self.rows[:]
        self.codebook.register(new)
        return new

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Framebuffer):
            return NotImplemented
        mine, theirs = self.__dict__, other.__dict__
        return all(mine[name] == theirs[name] for name in self._VISIBLE)

    __hash__ = None  # type: ignore[assignment]

    # -- cells

    @property
    def erase_code(self) -> str:
        """The rendition code that erased cells get under the present pen."""
        book = self.codebook
        return book.erased.get(self.pen) or book.erased_code(self.pen)

    def code_at(self, row: int, col: int) -> tuple[str, str]:
        """Return the code points of one cell: text and attrs."""
        line = self.rows[row]
        return (line.text[col], line.attrs[col]) if col < len(line.text) else (NUL, line.fill)

    def codes_of(self, row: int) -> list[tuple[str, str]]:
        """Return what code_at gives for every cell of a row."""
        return list(zip(*self.rows[row].padded(self.width)))

    def set_code(self, row: int, col: int, text: str, attrs: str) -> None:
        """Replace cells of one row, given as code points."""
        self.rows[row] = self.rows[row].with_cells(col, text, attrs)

    def cell(self, row: int, col: int) -> Cell:
        """Return one cell for reading."""
        text, attr = self.code_at(row, col)
        book = self.codebook
        return Cell(
            book.contents(text), book.rendition(attr), book.is_wide(text), book.is_fallback(text), has_wrap(attr)
        )

    def erase(self, row: int, start: int, end: int) -> None:
        """Empty the cells [start, end) of `row`."""
        self.rows[row] = self.rows[row].erased(start, min(end, self.width), self.width, self.erase_code)

    def erase_rows(self, start: int, end: int) -> None:
        """Empty the rows [start, end)."""
        self.rows[start:end] = [Row("", "", self.erase_code)] * (end - start)

    def scroll_rows(self, top: int, bottom: int, count: int) -> None:
        """Move the rows [top, bottom] up by `count`, or down if it is negative; empty rows enter."""
        if count == 1:
            del self.rows[top]
            self.rows.insert(bottom, Row("", "", self.erase_code))
            return
        size = bottom + 1 - top
        blank = [Row("", "", self.erase_code)] * min(abs(count), size)
        if count > 0:
            self.rows[top : bottom + 1] = self.rows[top + len(blank) : bottom + 1] + blank
        else:
            self.rows[top : bottom + 1] = blank + self.rows[top : bottom + 1 - len(blank)]

    def resize(self, width: int, height: int) -> None:
        """Cut or extend at the right and at the bottom; nothing is reflowed."""
        blank = Row("", "", self.erase_code)
        self.rows = self.rows[:height] + [blank] * (height - self.height)
        if width != self.width:
            self.rows = [row.resized(self.width, width, self.erase_code) for row in self.rows]
        self.width, self.height = width, height
        self.cursor_row = min(self.cursor_row, height - 1)
        self.cursor_col = min(self.cursor_col, width - 1)

    # -- queries

    def codes_in_use(self) -> Iterator[str]:
        """Yield every code point this framebuffer refers to; see Codebook.register."""
        yield self.pen
        for row in self.rows:
            yield from (row.text, row.attrs, row.fill)

    def lines(self) -> list[str]:
        """Return what the rows show as text: blanks for empty cells, nothing for the right half of a wide one."""
        out = []
        for row in self.rows:
            text, _ = row.padded(self.width)
            cells = [self.codebook.contents(text[col]) or " " for col in self.visible_columns(text)]
            out.append("".join(cells))
        return out

    def visible_columns(self, text: str) -> Sequence[int]:
        """Return the columns of a padded `text` whose cells show, that is all but those right of a wide one."""
        if NARROW_CELLS.fullmatch(text):
            return range(len(text))
        columns = []
        col = 0
        while col < len(text):
            columns.append(col)
            col += 2 if self.codebook.is_wide(text[col]) else 1
        return columns


# ======================================================================================================================
# == 10. Parser -- characters to text and control functions: the escape-sequence state tables
# ======================================================================================================================
# Source: the state machine for DEC terminals (ECMA-48 syntax as the VT500 parses it), in the form stock mosh has it.
# It works on characters, after UTF-8. Three things set it apart: C1 controls exist only as U+0080 to U+009F, never as
# raw bytes; a character from U+00A0 up counts as a letter, so it ends a sequence; and no device control string (DCS,
# SOS, PM, APC) has any effect.
#
# The parser cuts its input into text and control functions, each function written in one way only, so that what it
# does can be looked up by the whole of it:
#
#   a C0 or C1 control, or DEL         "\a"              CR LF counts as one
#   ESC intermediates final            "\x1b#8"
#   ESC [ parameters final             "\x1b[?25h"       several SGR (final m) in a row count as one
#   ESC ] command BEL                  "\x1b]0;title\a"
#
# Nearly all input has that form already: one regular expression splits it, at a third of the cost of a match for each
# piece. Only what is cut off, malformed or written in another way goes through the state table.

PARAMETER_LIMIT = 100  # characters of parameter text, the rest is dropped
COLLECT_LIMIT = 8  # private markers, intermediates and the final character together
OSC_LIMIT = 16_384  # characters of an operating system command


class ParserState(Enum):
    """What the next character will be taken for."""

    GROUND = auto()  # text or a control
    ESCAPE = auto()  # after ESC
    ESCAPE_INTERMEDIATE = auto()  # ESC and 20 to 2F
    CSI_ENTRY = auto()  # after ESC [
    CSI_PARAM = auto()  # digits, semicolons
    CSI_INTERMEDIATE = auto()  # 20 to 2F
    CSI_IGNORE = auto()  # malformed: nothing happens at its end
    OSC = auto()  # after ESC ]: text up to BEL or ST
    SWALLOW = auto()  # DCS, SOS, PM, APC up to ST


_S = ParserState
_RANGES: dict[str, Iterable[int]] = {  # the columns of the state table below
    "c0": [*range(0x18), 0x19, *range(0x1C, 0x20)],
    "intermediate": range(0x20, 0x30),
    "parameter": [*range(0x30, 0x3A), 0x3B],
    "colon": [0x3A],
    "private": range(0x3C, 0x40),
    "final": range(0x40, 0x7F),
    "delete": [0x7F],
}
if TYPE_CHECKING:
    Step = tuple[str, ParserState | None]  # action, "" for none, and the next state, None for the same

_C0_RUNS: dict[str, Step] = {"c0": ("execute", None)}  # a C0 control inside a sequence acts at once
_ENDS_ESCAPE: dict[str, Step] = dict.fromkeys(("parameter", "colon", "private", "final"), ("esc", _S.GROUND))
_ENDS_CSI: dict[str, Step] = {"final": ("csi", _S.GROUND)}
_SPOILS_CSI: dict[str, Step] = dict.fromkeys(("parameter", "colon", "private"), ("", _S.CSI_IGNORE))
_TABLE: dict[ParserState, dict[str, Step]] = {  # columns not listed are dropped; later entries of a row win
    _S.GROUND: {**_C0_RUNS, "delete": ("execute", None)},
    _S.ESCAPE: {**_C0_RUNS, "intermediate": ("collect", _S.ESCAPE_INTERMEDIATE), **_ENDS_ESCAPE},
    _S.ESCAPE_INTERMEDIATE: {**_C0_RUNS, "intermediate": ("collect", None), **_ENDS_ESCAPE},
    _S.CSI_ENTRY: {
        **_C0_RUNS,
        **_SPOILS_CSI,
        "intermediate": ("collect", _S.CSI_INTERMEDIATE),
        "parameter": ("param", _S.CSI_PARAM),
        "private": ("collect", _S.CSI_PARAM),
        **_ENDS_CSI,
    },
    _S.CSI_PARAM: {
        **_C0_RUNS,
        **_SPOILS_CSI,
        "intermediate": ("collect", _S.CSI_INTERMEDIATE),
        "parameter": ("param", None),
        **_ENDS_CSI,
    },
    _S.CSI_INTERMEDIATE: {**_C0_RUNS, **_SPOILS_CSI, "intermediate": ("collect", None), **_ENDS_CSI},
    _S.CSI_IGNORE: {**_C0_RUNS, "final": ("", _S.GROUND)},
    _S.OSC: {column: ("put", None) for column in _RANGES if column != "c0"},
    _S.SWALLOW: {},
}
_STEPS: dict[ParserState, dict[int, Step]] = {
    state: {code: step for column, step in columns.items() for code in _RANGES[column]}
    for state, columns in _TABLE.items()
}
_STEPS[_S.ESCAPE].update({ord(c): ("", _S.SWALLOW) for c in "PX^_"})
_STEPS[_S.ESCAPE].update({ord("["): ("", _S.CSI_ENTRY), ord("]"): ("", _S.OSC)})
_STEPS[_S.OSC][0x07] = ("", _S.GROUND)
_ANYWHERE: dict[int, Step] = {  # in every state, before the state's own row
    **dict.fromkeys((0x18, 0x1A, *range(0x80, 0x90), *range(0x91, 0x98), 0x99, 0x9A), ("execute", _S.GROUND)),
    0x9C: ("", _S.GROUND),
    0x1B: ("", _S.ESCAPE),
    0x9B: ("", _S.CSI_ENTRY),
    0x9D: ("", _S.OSC),
    **dict.fromkeys((0x90, 0x98, 0x9E, 0x9F), ("", _S.SWALLOW)),
}
_NO_STEP: Step = ("", None)
_LETTER = ord("A")  # what characters from U+00A0 up count as

_CONTROL_CHARACTERS = "\x00-\x1f\x7f-\x9f"
_FUNCTION = lazy_pattern(  # it starts with a set of characters, which is searched for much faster than alternatives
    rf"([{_CONTROL_CHARACTERS}]"
    r"(?:(?<=\x1b)(?:\[(?:[0-9;]*(?:m(?:\x1b\[[0-9;]*m)*|[@-ln-~])|[<-?][0-9;]*[@-~])|[0-OQ-WYZ\\`-~]|[ -/]+[0-~])"
    r"|(?<=\r)\n)?)"
)
_LONG_TEXT = 4_096  # from here on it is worth looking first, ten times as fast, whether there is any function at all
_C0_BYTES = bytes(range(0x20)) + b"\x7f"
_OPENERS = {chr(code) for code, (action, _state) in _ANYWHERE.items() if not action}  # they leave the ground state


class Parser:
    """Cuts characters into text and control functions, keeping its place between feeds."""

    def __init__(self) -> None:
        self.state = ParserState.GROUND
        self._collected = ""
        self._parameters = ""
        self._osc = ""

    @property
    def is_busy(self) -> bool:
        """Whether a sequence has begun and not ended."""
        return self.state is not ParserState.GROUND

    def parse(self, text: str) -> list[str]:
        """Return what `text` completes: text and control functions in turn, any of them empty, an even number."""
        if len(text) >= _LONG_TEXT and text.isascii() and len(text.encode().translate(None, _C0_BYTES)) == len(text):
            pieces = [text, ""]
        else:
            pieces = _FUNCTION.split(text)
            pieces.append("")
        if self.state is ParserState.GROUND and _OPENERS.isdisjoint(pieces[1::2]):
            return pieces
        out: list[str] = []
        at = 0
        while at < len(pieces):  # whole stretches in the ground state, up to what leaves it; then piece by piece
            if self.state is ParserState.GROUND:
                opener = next((n for n in range(at | 1, len(pieces), 2) if pieces[n] in _OPENERS), len(pieces))
                if len(out) % 2 != at % 2:
                    out.append("")
                out += pieces[at:opener]
                at = opener
            if at < len(pieces):
                self._walk(pieces[at], at % 2 == 0, out)
                at += 1
        if len(out) % 2:
            out.append("")
        return out

    def _walk(self, piece: str, is_text: bool, out: list[str]) -> None:
        """Take text or a function that is not, or may not be, what it looks like."""
        if is_text and self.state in (ParserState.OSC, ParserState.SWALLOW):
            self._put(piece)
            return
        for at, char in enumerate(piece):
            if is_text and self.state is ParserState.GROUND:
                _append(out, piece[at:], is_text)
                return
            self._step(char, out)

    def _step(self, char: str, out: list[str]) -> None:
        """Take one character through the state table."""
        code = ord(char)
        row = _STEPS[self.state]
        action, state = _ANYWHERE.get(code) or row.get(code if code < 0xA0 else _LETTER, _NO_STEP)
        if state is not None and self.state is ParserState.OSC:
            _append(out, f"\x1b]{self._osc}\a")  # leaving by any route ends the command
        if action:
            self._act(action, char, out)
        if state is not None:
            self.state = state
            if state in (ParserState.ESCAPE, ParserState.CSI_ENTRY):
                self._collected = self._parameters = ""
            elif state is ParserState.OSC:
                self._osc = ""

    def _act(self, action: str, char: str, out: list[str]) -> None:
        if action == "execute":
            _append(out, char)
        elif action == "collect":
            self._collected += char[: COLLECT_LIMIT - len(self._collected)]
        elif action == "param":
            self._parameters += char[: PARAMETER_LIMIT - len(self._parameters)]
        elif action == "put":
            self._put(char)
        elif action == "esc":
            _append(out, f"\x1b{self._collected}{char}")
        elif action == "csi":
            private = self._collected[:1] if "<" <= self._collected[:1] <= "?" else ""
            _append(out, f"\x1b[{private}{self._parameters}{self._collected[len(private) :]}{char}")

    def _put(self, text: str) -> None:
        if self.state is ParserState.OSC:
            self._osc += text[: OSC_LIMIT - len(self._osc)]


def _append(out: list[str], piece: str, is_text: bool = False) -> None:
    """Append text or a function to a list in which they take turns, text first."""
    if is_text == bool(len(out) % 2):
        out.append("")
    out.append(piece)


# ======================================================================================================================
# == 11. Emulator -- control functions to framebuffer: C0, ESC, CSI and OSC dispatch tables
# ======================================================================================================================
# The server runs it on the program's output; the client runs the same one on the server's diffs, which are escape
# sequences too. So it must do exactly what stock mosh's emulator does, quirks included, or a stock peer's screen
# drifts from ours. The quirks worth knowing when reading on:
#
#   wrap pending     after printing in the last column the cursor stays there; the next character wraps. Every control
#                    function ends this state, even an unknown one, save SGR, OSC and those in _KEEPS_WRAP_PENDING
#   erasing          takes the background of the pen along (back colour erase)
#   wide characters  halves are never repaired: overwriting the right one leaves the left one wide
#   absent           alternate screens, character sets, REP, CNL, CPL, HPR, VPR: swallowed without effect
#
# One thing is understood that stock mosh ignores, and that no diff contains: a program may name the clipboard along
# with other selections, or leave out the name, as tmux does. The diff says "52;c;" all the same.

TITLE_LIMIT = 256  # characters of an OSC title, its number included
ANSWERS_LIMIT_BYTES = 1 << 14  # to what one feed asks; joining the answers to 4 MB of questions would take hours
_CLIPBOARD = "52;c;"

_NEVER_FITS = 1 << 20  # what counts as the width of a character that cannot start a cell

_KEEPS_WRAP_PENDING = {"\t", "\x7f", "I", "Z", "g", "?h", "?l"}

# Skip-ahead. A flood scrolls by faster than frames are sent, so most of it is never seen. As long as nothing but text,
# line ends and sequences that stay within their row come in, only the lines after the (height + 1)th from the end can
# still be on the screen. Of the others, only the pen and the bells outlive them.
_SKIP_FROM_BYTES = 2_048  # shorter feeds are not worth the search
_SHORT_BYTES = 64  # how far ahead a good place to cut is looked for
_SEARCH_LIMIT_BYTES = 1 << 16  # at a time: most of a search is in vain if the next sequence that leaves the row is near
_LEAVES_ROW = {  # by their first byte: looking for that alone is ten times as fast
    b"\x1b": lazy_pattern(rb"\x1b(?!\[[0-9;]*[mKXPCDG@]|[=>]|\([0B])"),  # not SGR EL ECH DCH CUF CUB CHA ICH, no-ops
    b"\x0b": lazy_pattern(rb"\x0b"),  # VT
    b"\x0c": lazy_pattern(rb"\x0c"),  # FF
    b"\xc2": lazy_pattern(rb"\xc2[\x80-\x9f]"),  # C1 controls
}
_SGR = lazy_pattern(rb"\x1b\[[0-9;]*m")

_REMEMBERED_LIMIT = 4_096  # remembered control functions, and as many effects of SGR
_REMEMBERED_CHARACTERS = 64  # longer ones are not remembered
_RGB_SGR = "8;2;"  # nor are those with such colours: too many, and none repeats

_USUAL_NUMBERS = {"": 0, **{str(n): n for n in range(256)}}  # looked up in half the time of int()

if TYPE_CHECKING:
    Parameters = tuple[int, ...]
    _Selected = tuple[int, Union[int, None], Union[int, None]]  # what a Rendition is made of
    Operation = tuple[Callable[["Emulator", Any], None], Any, bool]  # method, parameters, whether wrap pending ends


def parse_parameters(text: str) -> Parameters:
    """Return the numbers of a control sequence; 0 for one that is absent or beyond 65535. There is always one."""
    words = text[:PARAMETER_LIMIT].split(";")
    try:
        return tuple(map(_USUAL_NUMBERS.__getitem__, words))
    except KeyError:
        numbers = (int(word or 0) for word in words)
        return tuple(number if number <= 65535 else 0 for number in numbers)


def _place_to_cut(data: bytes, start: int) -> int:
    """Return where a sequence begins soon after `start`, or else where one has probably ended."""
    end = data.find(b"\x1b", start, start + _SHORT_BYTES)
    return end if end >= 0 else min(start + _SHORT_BYTES, len(data))


def _end_of_lines(data: bytes, start: int) -> int:
    """Return up to where nothing but text, line ends and sequences that stay within their row comes from `start`.

    Looks at no more than _SEARCH_LIMIT_BYTES.
    """
    end = min(start + _SEARCH_LIMIT_BYTES, len(data))
    for byte, pattern in _LEAVES_ROW.items():
        first = data.find(byte, start, end)
        match = pattern.search(data, first, end) if first >= 0 else None
        end = match.start() if match else end
    return end


class SavedCursor(namedtuple("SavedCursor", "row col pen autowrap origin_mode")):
    """What DECSC saves; the pen as a Rendition."""

    __slots__ = ()


_HOME = SavedCursor(0, 0, Rendition(), autowrap=True, origin_mode=False)


class Emulator:
    """A terminal: feed it a program's output, read `framebuffer` and `take_replies()`.

    Source: ECMA-48 and DEC STD 070 as stock mosh implements them.
    """

    def __init__(self, width: int, height: int, codebook: Codebook | None = None) -> None:
        self.framebuffer = Framebuffer(width, height, codebook or Codebook())
        self._decoder = Utf8Decoder()
        self._parser = Parser()
        self._operations: dict[str, Operation] = {}  # what control functions do; shared by copies
        self._replies = b""
        self._run_text = self._run_attrs = ""  # printed at (run_row, run_col), not yet in the framebuffer
        self._run_row = self._run_col = 0
        self._reset()

    def _reset(self) -> None:
        framebuffer = self.framebuffer
        self.wrap_pending = False
        self.region_top, self.region_bottom = 0, framebuffer.height - 1
        self.origin_mode = self.insert_mode = self.application_cursor_keys = False
        self.autowrap = True
        self.saved_cursor = _HOME
        self.tab_stops = tuple(range(0, framebuffer.width, 8))  # ascending
        self.default_tabs = True
        # Where a combining mark goes: the last character printed, or the cursor once it has moved.
        self.combining_row, self.combining_col = 0, 0

    def copy(self) -> Emulator:
        """Return an emulator in the same state, its parser at rest: a sequence cut in half stays behind."""
        new = Emulator.__new__(Emulator)
        new.__dict__.update(self.__dict__)
        new.framebuffer = self.framebuffer.copy()
        new._decoder = Utf8Decoder()
        new._parser = Parser()
        return new

    # -- bytes in, bytes out

    def feed(self, data: bytes) -> None:
        """Take output of the program, cut anywhere."""
        self.framebuffer.codebook.sweep_if_due()
        at = 0
        while len(data) - at >= _SKIP_FROM_BYTES:
            if self._parser.is_busy or self._decoder.may_begin_control:  # let what has begun come to its end
                end = _place_to_cut(data, at + 1)
            else:
                end = _end_of_lines(data, at)
                if end - at >= _SKIP_FROM_BYTES:
                    at = self._skip_unseen(data, at, end)
                else:
                    end = _place_to_cut(data, at + _SKIP_FROM_BYTES)
            self._take(data[at:end])
            at = end
        self._take(data[at:])

    def _take(self, data: bytes) -> None:
        pieces = iter(self._parser.parse(self._decoder.decode(data)))
        for text, function in zip(pieces, pieces):
            if text:
                self._print(text)
            if function:
                perform, parameters, ends_wrap = self._operations.get(function) or self._look_up(function)
                if ends_wrap:
                    self._flush_run()
                    self.wrap_pending = False
                perform(self, parameters)
        self._flush_run()

    def _look_up(self, function: str) -> Operation:
        """Return what a control function does, and remember it unless it is long or one of a million colours."""
        operation = _operation(function)
        if len(function) <= _REMEMBERED_CHARACTERS and _RGB_SGR not in function:
            if len(self._operations) >= _REMEMBERED_LIMIT:
                self._operations.clear()
            self._operations[function] = operation
        return operation

    def _skip_unseen(self, data: bytes, start: int, end: int) -> int:
        """Take over what outlives the lines of data[start:end] that scroll away; return where the others begin."""
        framebuffer = self.framebuffer
        size = self.region_bottom + 1 - self.region_top
        if not self.region_top <= framebuffer.cursor_row <= self.region_bottom:
            return start
        cut = end
        for _ in range(size + 1):
            cut = data.rfind(b"\r\n", start, cut)
            if cut < 0:
                return start
        cut += len(b"\r\n")
        line = start
        for _ in range(size):
            line = data.find(b"\n", line, cut) + 1
            if not line:
                return start  # the cursor may not have reached the bottom
        if data.find(b"\x1b", start, cut) >= 0:
            reset = max(data.rfind(b"\x1b[0m", start, cut), data.rfind(b"\x1b[m", start, cut), start)
            for match in _SGR.finditer(data, reset, cut):
                self.sgr(match[0].decode("ascii"))
        framebuffer.bell_count += data.count(b"\x07", start, cut)
        self._decoder = Utf8Decoder()
        self._go(self.region_bottom, 0)
        return cut

    def take_replies(self) -> bytes:
        """Return and forget what the program asked for (cursor position, device attributes): its input."""
        replies, self._replies = self._replies, b""
        return replies

    def resize(self, width: int, height: int) -> None:
        """Change the size; each at least 1."""
        old_width = self.framebuffer.width
        if (width, height) == (old_width, self.framebuffer.height):
            return
        self.framebuffer.resize(width, height)
        self.region_top, self.region_bottom = 0, height - 1
        stops = {stop for stop in self.tab_stops if stop < width}
        if self.default_tabs:
            stops.update(range(-(-old_width // 8) * 8, width, 8))
        self.tab_stops = tuple(sorted(stops))
        if self.combining_row >= height or self.combining_col >= width:
            self.combining_row = -1  # nowhere

    # -- printing

    def _print(self, text: str) -> None:
        """Print characters, none of them a control."""
        if text.isascii() or NARROW_RUN.fullmatch(text):
            self._print_narrow(text)
        elif WIDE_RUN.fullmatch(text):
            self._print_wide(text)
        else:
            self._print_clusters(text)

    def _print_narrow(self, run: str) -> None:
        """Print characters of width 1."""
        framebuffer = self.framebuffer
        width = framebuffer.width
        if self._extend_run(run, framebuffer.pen * len(run), 1):
            return
        self._flush_run()
        top, bottom = self._limits()
        if not top <= framebuffer.cursor_row <= bottom:
            self._print_one(run[0], 1)  # which, in origin mode, pulls the cursor back in
            run = run[1:]
        while run:
            if self.wrap_pending and self.autowrap:
                self._wrap()
                run = run[self._rows_unseen(len(run)) * width :]
            row, col = framebuffer.cursor_row, framebuffer.cursor_col
            piece, run = run[: width - col], run[width - col :]
            if run and not self.autowrap:
                piece, run = piece[:-1] + run[-1], ""  # the rest overwrites the last column, one after another
            if self.insert_mode:
                framebuffer.rows[row] = framebuffer.rows[row].inserted(col, len(piece), width, framebuffer.erase_code)
            framebuffer.set_code(row, col, piece, framebuffer.pen * len(piece))
            end = col + len(piece)
            self.combining_row, self.combining_col = row, end - 1
            self.wrap_pending = end >= width
            framebuffer.cursor_col = min(end, width - 1)

    def _extend_run(self, text: str, attrs: str, last: int) -> bool:
        """Add cells at the cursor to the run being printed, `last` columns of them the last character.

        Returns False, having done nothing, unless they simply fit into the row, as nearly always.
        """
        framebuffer = self.framebuffer
        end = framebuffer.cursor_col + len(text)
        if end >= framebuffer.width or self.wrap_pending or self.insert_mode or self.origin_mode:
            return False
        if not self._run_text:
            self._run_row, self._run_col = framebuffer.cursor_row, framebuffer.cursor_col
        self._run_text += text
        self._run_attrs += attrs
        self.combining_row, self.combining_col = framebuffer.cursor_row, end - last
        framebuffer.cursor_col = end
        return True

    def _flush_run(self) -> None:
        """Put what was printed since the cursor last moved into its row: much of a screen is made of short runs."""
        if self._run_text:
            rows, row = self.framebuffer.rows, self._run_row
            rows[row] = rows[row].with_cells(self._run_col, self._run_text, self._run_attrs)
            self._run_text = self._run_attrs = ""

    def _rows_unseen(self, count: int) -> int:
        """Return how many rows of a run with `count` characters left would scroll away before they are seen."""
        framebuffer = self.framebuffer
        if framebuffer.cursor_row != self.region_bottom or self.insert_mode:
            return 0
        return max(0, count // framebuffer.width - (self.region_bottom + 1 - self.region_top))

    def _print_wide(self, run: str) -> None:
        """Print characters of width 2."""
        framebuffer = self.framebuffer
        attrs = (framebuffer.pen + framebuffer.erase_code) * len(run)
        if not self._extend_run(NUL.join(run) + NUL, attrs, 2):
            self._print_clusters(run)

    def _print_clusters(self, text: str) -> None:
        """Print any characters with the marks behind them: as many at once as surely fit, one by one at the edge."""
        framebuffer = self.framebuffer
        clusters = CLUSTER.findall(text)
        cells = list(map(framebuffer.codebook.cells, clusters))
        both_attrs = framebuffer.pen + framebuffer.erase_code
        ends = [0, *accumulate(len(each) or _NEVER_FITS for each in cells)]
        at = 0
        while at < len(cells):
            room = framebuffer.width - 1 - framebuffer.cursor_col
            end = bisect.bisect(ends, ends[at] + room) - 1
            piece = cells[at:end]
            attrs = "".join([both_attrs[: len(each)] for each in piece])
            if piece and self._extend_run("".join(piece), attrs, len(piece[-1])):
                at = end
            else:
                self._print_slowly(clusters[at])
                at += 1

    def _print_slowly(self, cluster: str) -> None:
        for char in cluster:
            width = char_width(char)
            if width > 0:
                self._print_one(char, width)
            elif width == 0:
                self._combine(char)

    def _print_one(self, char: str, width: int) -> None:
        """Print a character of width 1 or 2 for which _extend_run is no way."""
        framebuffer = self.framebuffer
        text, attrs = framebuffer.codebook.cell_code(char, width == 2, fallback=False), framebuffer.pen
        self._flush_run()
        if self.autowrap and self.wrap_pending:
            self._wrap()
        elif self.autowrap and width == 2 and framebuffer.cursor_col == framebuffer.width - 1:
            framebuffer.erase(framebuffer.cursor_row, framebuffer.cursor_col, framebuffer.width)
            self.nel()
        row, col = framebuffer.cursor_row, framebuffer.cursor_col
        if self.insert_mode:
            self.ich((width,))
        if width == 2 and col + 1 < framebuffer.width:
            text, attrs = text + NUL, attrs + framebuffer.erase_code
        framebuffer.set_code(row, col, text, attrs)
        self._advance(width)

    def _combine(self, mark: str) -> None:
        """Add a character of width 0 to the cell of the last one printed."""
        framebuffer = self.framebuffer
        row, col = self.combining_row, self.combining_col
        if row < 0:
            return
        if row == self._run_row and 0 <= col - self._run_col < len(self._run_text):
            at = col - self._run_col
            code = framebuffer.codebook.marked(self._run_text[at], mark)
            self._run_text = self._run_text[:at] + code + self._run_text[at + 1 :]
            return
        self._flush_run()
        text, attr = framebuffer.code_at(row, col)
        if text == NUL:
            self._advance(1)  # a mark on an empty cell stands for itself
        framebuffer.set_code(row, col, framebuffer.codebook.marked(text, mark), attr)

    def _wrap(self) -> None:
        framebuffer = self.framebuffer
        row, last = framebuffer.cursor_row, framebuffer.width - 1
        text, attr = framebuffer.code_at(row, last)
        framebuffer.set_code(row, last, text, with_wrap(attr))
        self.nel()

    # -- moving

    def _limits(self) -> tuple[int, int]:
        """The rows that the cursor can be moved to."""
        return (self.region_top, self.region_bottom) if self.origin_mode else (0, self.framebuffer.height - 1)

    def _advance(self, width: int) -> None:
        """Move on after printing at the cursor."""
        framebuffer = self.framebuffer
        row, col = framebuffer.cursor_row, framebuffer.cursor_col
        self._go(row, col + width)
        self.combining_row, self.combining_col = row, col
        self.wrap_pending = col + width >= framebuffer.width

    def _go(self, row: int, col: int) -> None:
        """Move to a row and a column of the screen, or as near as the cursor may go."""
        framebuffer = self.framebuffer
        top, bottom = self._limits()
        row = top if row < top else bottom if row > bottom else row
        col = 0 if col < 0 else framebuffer.width - 1 if col >= framebuffer.width else col
        framebuffer.cursor_row = self.combining_row = row
        framebuffer.cursor_col = self.combining_col = col
        self.wrap_pending = False

    def _go_row(self, row: int) -> None:
        self._go(row, self.framebuffer.cursor_col)

    def _go_col(self, col: int) -> None:
        self._go(self.framebuffer.cursor_row, col)

    def _step_rows(self, count: int) -> None:
        """Move down (up if negative), scrolling at the margins of the scrolling region."""
        row, top, bottom = self.framebuffer.cursor_row, self.region_top, self.region_bottom
        if top <= row <= bottom:
            over = max(0, row + count - bottom) or min(0, row + count - top)
            if over:
                self.framebuffer.scroll_rows(top, bottom, over)
                self._go_row(row - over)
        self._go_row(self.framebuffer.cursor_row + count)

    # -- C0 and C1 controls

    def bel(self, _: Parameters = ()) -> None:
        self.framebuffer.bell_count += 1

    def bs(self, _: Parameters = ()) -> None:
        self._go_col(self.framebuffer.cursor_col - 1)

    def ht(self, _: Parameters = ()) -> None:
        self._tab(1)

    def lf(self, _: Parameters = ()) -> None:
        """Move down one row, scrolling at the bottom margin; the short form of _step_rows(1) where it may be had."""
        framebuffer = self.framebuffer
        if self.origin_mode:
            self._step_rows(1)
            return
        if framebuffer.cursor_row == self.region_bottom:
            framebuffer.scroll_rows(self.region_top, self.region_bottom, 1)
        elif framebuffer.cursor_row < framebuffer.height - 1:
            framebuffer.cursor_row += 1
        self.combining_row, self.combining_col = framebuffer.cursor_row, framebuffer.cursor_col

    def cr(self, _: Parameters = ()) -> None:
        self._go_col(0)

    def nel(self, _: Parameters = ()) -> None:
        self._go_col(0)
        self.lf()

    def hts(self, _: Parameters = ()) -> None:
        self._set_tab_stop(self.framebuffer.cursor_col, True)

    def ri(self, _: Parameters = ()) -> None:
        self._step_rows(-1)

    # -- escape sequences

    def decsc(self, _: Parameters = ()) -> None:
        framebuffer = self.framebuffer
        pen = framebuffer.codebook.rendition(framebuffer.pen)
        row, col = framebuffer.cursor_row, framebuffer.cursor_col
        self.saved_cursor = SavedCursor(row, col, pen, self.autowrap, self.origin_mode)

    def decrc(self, _: Parameters = ()) -> None:
        saved = self.saved_cursor
        self.framebuffer.pen = self.framebuffer.codebook.rendition_code(saved.pen)
        self.autowrap, self.origin_mode = saved.autowrap, saved.origin_mode
        self._go(saved.row, saved.col)

    def ris(self, _: Parameters = ()) -> None:
        self.framebuffer.reset()
        self._reset()

    def decaln(self, _: Parameters = ()) -> None:
        framebuffer = self.framebuffer
        width = framebuffer.width
        row = Row("E" * width, framebuffer.erase_code * width, framebuffer.erase_code)
        framebuffer.rows = [row] * framebuffer.height

    # -- control sequences: moving

    def cuu(self, parameters: Parameters) -> None:
        self._go_row(self.framebuffer.cursor_row - (parameters[0] or 1))

    def cud(self, parameters: Parameters) -> None:
        self._go_row(self.framebuffer.cursor_row + (parameters[0] or 1))

    def cuf(self, parameters: Parameters) -> None:
        self._go_col(self.framebuffer.cursor_col + (parameters[0] or 1))

    def cub(self, parameters: Parameters) -> None:
        self._go_col(self.framebuffer.cursor_col - (parameters[0] or 1))

    def cup(self, parameters: Parameters) -> None:
        col = (parameters[1] or 1) - 1 if len(parameters) > 1 else 0
        self._go(self._limits()[0] + (parameters[0] or 1) - 1, col)

    def vpa(self, parameters: Parameters) -> None:
        self._go_row(self._limits()[0] + (parameters[0] or 1) - 1)

    def cha(self, parameters: Parameters) -> None:
        self._go_col((parameters[0] or 1) - 1)

    def cht(self, parameters: Parameters) -> None:
        self._tab(parameters[0] or 1)

    def cbt(self, parameters: Parameters) -> None:
        self._tab(-(parameters[0] or 1))

    def _set_tab_stop(self, col: int, on: bool) -> None:
        stops = self.tab_stops
        left, right = bisect.bisect_left(stops, col), bisect.bisect_right(stops, col)
        if on == (left == right):
            self.tab_stops = stops[:left] + (col,) * on + stops[right:]

    def _tab(self, count: int) -> None:
        self._flush_run()
        col, wrap_pending = self.framebuffer.cursor_col, self.wrap_pending
        stops, last = self.tab_stops, self.framebuffer.width - 1
        if count > 0:
            at = bisect.bisect_right(stops, col) + count - 1
            col = stops[at] if at < len(stops) else last
        else:
            at = bisect.bisect_left(stops, col) + count
            col = stops[at] if at >= 0 else 0
        self._go_col(col)
        self.wrap_pending = wrap_pending

    # -- control sequences: erasing, inserting, deleting, scrolling

    def ed(self, parameters: Parameters) -> None:
        """Erase from the cursor to the end of the screen (0), from its start to the cursor (1), or all of it (2)."""
        framebuffer = self.framebuffer
        row, kind = framebuffer.cursor_row, parameters[0]
        if kind in (0, 1):
            self.el(parameters)
        if kind in (0, 1, 2):
            framebuffer.erase_rows(*((row + 1, framebuffer.height), (0, row), (0, framebuffer.height))[kind])

    def el(self, parameters: Parameters) -> None:
        framebuffer = self.framebuffer
        col, kind = framebuffer.cursor_col, parameters[0]
        if kind in (0, 1, 2):
            start, end = ((col, framebuffer.width), (0, col + 1), (0, framebuffer.width))[kind]
            framebuffer.erase(framebuffer.cursor_row, start, end)

    def ech(self, parameters: Parameters) -> None:
        col = self.framebuffer.cursor_col
        self.framebuffer.erase(self.framebuffer.cursor_row, col, col + (parameters[0] or 1))

    def ich(self, parameters: Parameters) -> None:
        framebuffer = self.framebuffer
        row, col, count = framebuffer.cursor_row, framebuffer.cursor_col, (parameters[0] or 1)
        framebuffer.rows[row] = framebuffer.rows[row].inserted(col, count, framebuffer.width, framebuffer.erase_code)

    def dch(self, parameters: Parameters) -> None:
        framebuffer = self.framebuffer
        row, col, count = framebuffer.cursor_row, framebuffer.cursor_col, (parameters[0] or 1)
        framebuffer.rows[row] = framebuffer.rows[row].deleted(col, count, framebuffer.width, framebuffer.erase_code)

    def il(self, parameters: Parameters) -> None:
        self._shift_rows(-(parameters[0] or 1))

    def dl(self, parameters: Parameters) -> None:
        self._shift_rows(parameters[0] or 1)

    def _shift_rows(self, count: int) -> None:
        row = self.framebuffer.cursor_row
        if self.region_top <= row <= self.region_bottom:
            self.framebuffer.scroll_rows(row, self.region_bottom, count)
        self._go_col(0)

    def su(self, parameters: Parameters) -> None:
        self.framebuffer.scroll_rows(self.region_top, self.region_bottom, (parameters[0] or 1))

    def sd(self, parameters: Parameters) -> None:
        self.framebuffer.scroll_rows(self.region_top, self.region_bottom, -(parameters[0] or 1))

    # -- control sequences: modes, rendition, reports

    def tbc(self, parameters: Parameters) -> None:
        if parameters[0] == 0:
            self._set_tab_stop(self.framebuffer.cursor_col, False)
        elif parameters[0] == 3:
            self.tab_stops, self.default_tabs = (), False

    def sm(self, parameters: Parameters) -> None:
        self.insert_mode = self.insert_mode or 4 in parameters

    def rm(self, parameters: Parameters) -> None:
        self.insert_mode = self.insert_mode and 4 not in parameters

    def decset(self, parameters: Parameters) -> None:
        for number in parameters:
            self._set_private_mode(number, True)

    def decrst(self, parameters: Parameters) -> None:
        for number in parameters:
            self._set_private_mode(number, False)

    def _set_private_mode(self, number: int, on: bool) -> None:
        self._flush_run()
        framebuffer = self.framebuffer
        if number in _OWN_MODES:
            setattr(self, _OWN_MODES[number], on)
        elif number in _FRAMEBUFFER_MODES:
            setattr(framebuffer, _FRAMEBUFFER_MODES[number], on)
        elif number in MOUSE_MODES:
            framebuffer.mouse_mode = number if on else 0
        elif number in MOUSE_ENCODINGS:
            framebuffer.mouse_encoding = number if on else 0
        elif number == 3:  # DECCOLM: the width stays
            self._go_home()
            framebuffer.erase_rows(0, framebuffer.height)
        elif number == 6:  # DECOM
            self._go_home()  # under the old setting, so the cursor may end above the region until it moves
            self.origin_mode = on

    def _go_home(self) -> None:
        self._go(self._limits()[0], 0)

    def decstbm(self, parameters: Parameters) -> None:
        """Set the scrolling region and go home; one without at least two rows is ignored."""
        height = self.framebuffer.height
        top, bottom = parameters[0] or 1, (parameters[1] if len(parameters) > 1 else 0) or height
        if bottom <= top or top > height:
            return
        self.region_top, self.region_bottom = top - 1, min(bottom, height) - 1
        self._go_home()

    def sgr(self, functions: str) -> None:
        """Select the pen by one or more SGR in a row: as they were written, by which their effect is remembered."""
        framebuffer = self.framebuffer
        book, pen = framebuffer.codebook, framebuffer.pen
        code = book.selected.get((pen, functions))
        if code is None:
            selected: _Selected = book.rendition(pen)
            for function in functions[2:-1].split("m\x1b["):
                selected = _select_rendition(*selected, parse_parameters(function))
            code = book.rendition_code(Rendition(*selected))
            if len(functions) <= _REMEMBERED_CHARACTERS and _RGB_SGR not in functions:
                if len(book.selected) >= _REMEMBERED_LIMIT:
                    book.selected.clear()
                book.selected[pen, functions] = code
        framebuffer.pen = code

    def dsr(self, parameters: Parameters) -> None:
        if parameters[0] == 5:
            self._reply(b"\x1b[0n")
        elif parameters[0] == 6:
            self._reply(b"\x1b[%d;%dR" % (self.framebuffer.cursor_row + 1, self.framebuffer.cursor_col + 1))

    def da(self, _: Parameters = ()) -> None:
        self._reply(b"\x1b[?62c")

    def da2(self, _: Parameters = ()) -> None:
        self._reply(b"\x1b[>1;10;0c")

    def _reply(self, answer: bytes) -> None:
        if len(self._replies) < ANSWERS_LIMIT_BYTES:
            self._replies += answer

    def decstr(self, _: Parameters = ()) -> None:
        self.insert_mode = self.origin_mode = self.application_cursor_keys = False
        self.framebuffer.cursor_visible = True
        self.region_top, self.region_bottom = 0, self.framebuffer.height - 1
        self.framebuffer.pen = Codebook.DEFAULT
        self.saved_cursor = _HOME

    # -- operating system commands

    def osc(self, text: str) -> None:
        """Set icon name, window title or clipboard. Source: xterm's control sequences, OSC 0, 1, 2 and 52."""
        framebuffer = self.framebuffer
        if text.startswith("52;"):
            selection, separator, contents = text[3:].partition(";")
            if separator and (not selection or "c" in selection):
                framebuffer.clipboard = contents
                framebuffer.copy_count += 1
            return
        kind, separator, title = text[:TITLE_LIMIT].partition(";")
        if not separator or kind not in ("", "0", "1", "2"):
            return
        framebuffer.title_was_set = True
        if kind != "2":
            framebuffer.icon_name = title
        if kind != "1":
            framebuffer.window_title = title

    def no_effect(self, _: Parameters = ()) -> None:
        """Do nothing."""


_CONTROLS: dict[str, Callable[[Emulator, Parameters], None]] = {
    "\x07": Emulator.bel,  # bell
    "\x08": Emulator.bs,  # backspace
    "\x09": Emulator.ht,  # horizontal tabulation
    "\x0a": Emulator.lf,  # line feed
    "\x0b": Emulator.lf,  # vertical tabulation
    "\x0c": Emulator.lf,  # form feed
    "\x0d": Emulator.cr,  # carriage return
    "\x0d\x0a": Emulator.nel,  # both
    "\x84": Emulator.lf,  # index
    "\x85": Emulator.nel,  # next line
    "\x88": Emulator.hts,  # horizontal tabulation set
    "\x8d": Emulator.ri,  # reverse index
}

_ESCAPES: dict[str, Callable[[Emulator, Parameters], None]] = {
    "7": Emulator.decsc,  # save cursor
    "8": Emulator.decrc,  # restore cursor
    "c": Emulator.ris,  # reset to initial state
    "#8": Emulator.decaln,  # screen alignment display
}

_CONTROL_SEQUENCES: dict[str, Callable[[Emulator, Parameters], None]] = {
    "@": Emulator.ich,  # insert character
    "A": Emulator.cuu,  # cursor up
    "B": Emulator.cud,  # cursor down
    "C": Emulator.cuf,  # cursor forward
    "D": Emulator.cub,  # cursor backward
    "G": Emulator.cha,  # cursor character absolute
    "H": Emulator.cup,  # cursor position
    "I": Emulator.cht,  # cursor forward tabulation
    "J": Emulator.ed,  # erase in display
    "K": Emulator.el,  # erase in line
    "L": Emulator.il,  # insert line
    "M": Emulator.dl,  # delete line
    "P": Emulator.dch,  # delete character
    "S": Emulator.su,  # scroll up
    "T": Emulator.sd,  # scroll down
    "X": Emulator.ech,  # erase character
    "Z": Emulator.cbt,  # cursor backward tabulation
    "`": Emulator.cha,  # character position absolute
    "c": Emulator.da,  # device attributes
    ">c": Emulator.da2,  # secondary device attributes
    "d": Emulator.vpa,  # line position absolute
    "f": Emulator.cup,  # character and line position
    "g": Emulator.tbc,  # tabulation clear
    "h": Emulator.sm,  # set mode
    "?h": Emulator.decset,  # set DEC private modes
    "l": Emulator.rm,  # reset mode
    "?l": Emulator.decrst,  # reset DEC private modes
    "n": Emulator.dsr,  # device status report
    "!p": Emulator.decstr,  # soft terminal reset
    "r": Emulator.decstbm,  # set top and bottom margins
}

_CONTROL_SEQUENCE = lazy_pattern(r"\x1b\[([<-?]?)([0-9;]*)(.*)", re.DOTALL)
_SGR_FUNCTIONS = lazy_pattern(r"(?:\x1b\[[0-9;]*m)+")


def _operation(function: str) -> Operation:
    """Return what a control function of the parser does: an unknown one nothing, save ending wrap pending."""
    if _SGR_FUNCTIONS.fullmatch(function):
        return Emulator.sgr, function, False
    if function.startswith("\x1b]"):
        return Emulator.osc, function[2:-1], False
    sequence = _CONTROL_SEQUENCE.fullmatch(function)
    if sequence:
        key = sequence[1] + sequence[3]
        handler = _CONTROL_SEQUENCES.get(key, Emulator.no_effect)
        return handler, parse_parameters(sequence[2]), key not in _KEEPS_WRAP_PENDING
    if len(function) == 2 and "\x1b@" <= function <= "\x1b_":
        function = chr(ord(function[1]) + 0x40)  # ESC and a letter is another way to write a C1 control
    if function.startswith("\x1b"):
        return _ESCAPES.get(function[1:], Emulator.no_effect), (), True
    return _CONTROLS.get(function, Emulator.no_effect), (), function not in _KEEPS_WRAP_PENDING


_OWN_MODES = {1: "application_cursor_keys", 7: "autowrap"}  # DEC private modes that the display need not know
_FRAMEBUFFER_MODES = {  # and those that the user's terminal has to share
    5: "reverse_video",
    25: "cursor_visible",
    1004: "focus_events",
    1007: "alternate_scroll",  # no diff says so, as in stock mosh
    2004: "bracketed_paste",
}
MOUSE_MODES = (9, 1000, 1001, 1002, 1003)  # what is reported; one at a time
MOUSE_ENCODINGS = (1005, 1006, 1015)  # how; one at a time

_SGR_FOREGROUND: dict[int, int | None] = {30 + n: n for n in range(8)}
_SGR_FOREGROUND.update({90 + n: 8 + n for n in range(8)})
_SGR_FOREGROUND[39] = None  # the default colour
_SGR_BACKGROUND = {number + 10: color for number, color in _SGR_FOREGROUND.items()}
_SGR_OFF = {22: BOLD, 23: ITALIC, 24: UNDERLINED, 25: BLINK, 27: INVERSE, 28: INVISIBLE}


def _select_rendition(
    attributes: int, foreground: int | None, background: int | None, parameters: Parameters
) -> _Selected:
    """Return what SGR with these parameters makes of a rendition."""
    at, count = 0, len(parameters)
    while at < count:
        number = parameters[at]
        if number in (38, 48) and at + 2 < count:
            color, used = _extended_color(parameters[at + 1 : at + 5])
            if used:
                if color is not None and number == 38:
                    foreground = color
                elif color is not None:
                    background = color
                at += 1 + used
                continue
        at += 1
        if number == 0:
            attributes, foreground, background = 0, None, None
        elif number in ATTRIBUTE_NUMBERS:
            attributes |= 1 << number
        elif number in _SGR_OFF:
            attributes &= ~_SGR_OFF[number]
        elif number in _SGR_FOREGROUND:
            foreground = _SGR_FOREGROUND[number]
        elif number in _SGR_BACKGROUND:
            background = _SGR_BACKGROUND[number]
    return attributes, foreground, background


def _extended_color(parameters: Parameters) -> tuple[int | None, int]:
    """Return (colour, how many parameters it took) for what follows a 38 or 48; none for neither of the two forms."""
    if parameters[0] == 2 and len(parameters) == 4:  # red, green, blue; their ranges are not checked, as in stock
        _, red, green, blue = parameters
        return (RGB | red << 16 | green << 8 | blue) & 0x1FFFFFF, 4
    if parameters[0] == 5:
        return (parameters[1] if parameters[1] <= 255 else None), 2
    return None, 0


# ======================================================================================================================
# == 12. Display -- frame diff: two framebuffers in, terminal bytes out
# ======================================================================================================================
# Both the server's diffs and what the client writes to the user's terminal come from here: the shortest sequences we
# know that turn a screen showing A into one showing B. What a stock receiver relies on:
#
#   - nothing that provokes an answer; nothing but the sequences used here
#   - hidden state is at its default before and after: full scrolling region, wrap not pending, autowrap on
#   - a row that goes on in the next one is written up to its last cell, directly followed by the next row's first
#   - after a cell whose width is doubtful, the cursor is placed explicitly
#   - what the terminal may draw into the cell on its left (a skin tone, or anything behind a zero width joiner) is
#     treated alike; and its own place is erased first, lest what was there stays

_ERASE_CHARACTERS_FROM = 10  # empty cells amid text from which ECH and a move are shorter than spaces
_MERGE_GAP = 3  # bytes of unchanged cells that are cheaper written again than skipped
_MOVE_BYTES = 2  # about what getting to a row costs
_SCROLL_BYTES, _SCROLL_REGION_BYTES = 5, 20  # about what a scroll of the whole screen and of a part of it cost
_SCROLL_DISTANCES = 3  # distances that are examined, those of most votes
_EMPTY_RUN = NUL * _ERASE_CHARACTERS_FROM
_EMPTY = lazy_pattern(f"{_EMPTY_RUN}\0*")
_EMPTY_RUN_OR_REST = lazy_pattern(f"{_EMPTY_RUN}\0*|(?:(?!{_EMPTY_RUN}).)+", re.DOTALL)
_NBSP = "\xa0"  # carries a cell that has only combining marks

_BLANK_ROW = Row("", "", Codebook.DEFAULT)

Position = tuple[int, int]


class Display:
    """Writes frame diffs for a terminal with the given capabilities.

    `ech`, `bce`: the terminal erases characters, and erases with the background colour. `title`: it takes OSC titles.
    `hide_cursor`: a person watches, so the cursor is hidden while the frame is drawn.
    """

    def __init__(self, *, ech: bool = True, bce: bool = True, title: bool = True, hide_cursor: bool = False) -> None:
        self.ech = ech
        self.bce = bce
        self.title = title
        self.hide_cursor = hide_cursor

    def frame(self, last: Framebuffer, new: Framebuffer, *, known: bool = True) -> bytes:
        """Return the bytes that turn a terminal showing `last` into one showing `new`; empty if they look alike.

        `known` False: the terminal may show anything, so everything is written. Source of the frame's order, and of
        what may be in it: stock mosh.
        """
        writer = _FrameWriter(self, last, new, known)
        frame = writer.write()
        if writer.scroll_is_doubtful:
            frame = min(frame, _FrameWriter(self, last, new, known).write(scroll=False), key=len)
        return frame


class _FrameWriter:
    """One frame diff in the making: what has been written so far and where that leaves the terminal."""

    def __init__(self, display: Display, last: Framebuffer, new: Framebuffer, known: bool) -> None:
        self._display = display
        self._last = last
        self._new = new
        self._known = known and (last.width, last.height) == (new.width, new.height)
        self._modes_known = known
        self._book = new.codebook
        self._out: list[str] = []
        self.scroll_is_doubtful = False  # parts of the screen were scrolled, and it may have saved nothing
        # the terminal as it is now
        self._position: Position | None = (last.cursor_row, last.cursor_col)  # col == width: wrap pending
        self._pen = last.pen
        self._cursor_visible = last.cursor_visible

    def write(self, *, scroll: bool = True) -> bytes:
        """Return the frame diff; `scroll`: parts of the screen may be scrolled. To be called once."""
        self._write_events()
        rows = self._last.rows if self._known else self._clear()
        if scroll and self._known and rows != self._new.rows:
            rows = self._scroll(rows)
        wrapped = False
        for row, (old, new) in enumerate(zip(rows, self._new.rows)):
            if wrapped or (old is not new and old != new):
                wrapped = self._put_row(row, old, new, wrapped)
        self._write_cursor_and_pen()
        self._write_modes()
        return "".join(self._out).encode("utf-8", "replace")

    # -- everything but cells

    def _write_events(self) -> None:
        last, new, out = self._last, self._new, self._out
        if last.bell_count != new.bell_count:
            out.append("\x07")
        titles = (new.icon_name, new.window_title)
        retitled = not self._modes_known or titles != (last.icon_name, last.window_title)
        if self._display.title and new.title_was_set and retitled:
            if new.icon_name == new.window_title:
                out.append(f"\x1b]0;{new.window_title}\x07")
            else:
                out.append(f"\x1b]1;{new.icon_name}\x07\x1b]2;{new.window_title}\x07")
        if last.clipboard != new.clipboard or last.copy_count < new.copy_count:
            out.append(f"\x1b]{_CLIPBOARD}{new.clipboard}\x07")
        if not self._modes_known or last.reverse_video != new.reverse_video:
            out.append(_mode(5, new.reverse_video))

    def _clear(self) -> list[Row]:
        """Start from an empty screen, cursor hidden. Returns the rows it has."""
        self._out.append("\x1b[r\x1b[0m\x1b[H\x1b[2J\x1b[?25l")
        self._position, self._pen, self._cursor_visible = (0, 0), Codebook.DEFAULT, False
        return [_BLANK_ROW] * self._new.height

    def _write_cursor_and_pen(self) -> None:
        new = self._new
        if self._position != (new.cursor_row, new.cursor_col):
            self._move(new.cursor_row, new.cursor_col)
        if self._cursor_visible != new.cursor_visible:
            self._out.append(_mode(25, new.cursor_visible))
        self._set_pen(new.pen)

    def _write_modes(self) -> None:
        last, new, out, known = self._last, self._new, self._out, self._modes_known
        if not known or last.bracketed_paste != new.bracketed_paste:
            out.append(_mode(2004, new.bracketed_paste))
        if not known or last.mouse_mode != new.mouse_mode:  # 9 ends with any of the others, as in stock mosh
            out.append(_exclusive_mode(MOUSE_MODES[:0:-1], last.mouse_mode, new.mouse_mode))
        if not known or last.focus_events != new.focus_events:
            out.append(_mode(1004, new.focus_events))
        if not known or last.mouse_encoding != new.mouse_encoding:
            out.append(_exclusive_mode(MOUSE_ENCODINGS[::-1], last.mouse_encoding, new.mouse_encoding))

    # -- scrolling

    def _scroll(self, rows: list[Row]) -> list[Row]:
        """Scroll a part of the screen if that saves bytes. Returns the rows that the terminal then shows."""
        top, bottom, distance, certain = _find_scroll(rows, self._new.rows)
        if not distance:
            return rows
        self.scroll_is_doubtful = not certain
        self._set_pen(Codebook.DEFAULT)
        whole_screen = (top, bottom) == (0, self._new.height - 1)
        if not whole_screen:
            self._out.append(f"\x1b[{top + 1};{bottom + 1}r")
            self._position = (0, 0)
        edge = bottom if distance > 0 else top
        if self._position is None or self._position[0] != edge:
            self._move_hidden(edge, 0)
        self._out.append("\n" * distance if distance > 0 else "\x1bM" * -distance)
        if not whole_screen:
            self._out.append("\x1b[r")
            self._position = (0, 0)
        blank = [_BLANK_ROW] * abs(distance)
        kept = rows[top + distance : bottom + 1] + blank if distance > 0 else blank + rows[top : bottom + 1 + distance]
        return rows[:top] + kept + rows[bottom + 1 :]

    # -- cells

    def _put_row(self, row: int, old: Row, new: Row, wrapped: bool) -> bool:
        """Write the cells that differ. `wrapped`: the terminal is about to wrap into this row.

        Returns whether it is about to wrap into the next one.
        """
        width = self._new.width
        text, attrs = new.padded(width)
        goes_on = has_wrap(attrs[-1])
        columns = self._new.visible_columns(text)
        changed = self._changed_columns(old, text, attrs, columns)
        if goes_on and columns[-1] not in changed and not has_wrap(old.padded(width)[1][-1]):
            changed.append(columns[-1])
        attrs = without_wraps(attrs)
        tail = len(new.text) + (new.text != "" and self._book.is_wide(new.text[-1]))
        if wrapped:  # the first cell makes the terminal wrap; nothing but printing it will do
            self._position = (row, 0)
            self._put_cells(row, 0, 1, text, attrs)
            changed = [col for col in changed if col > 0]
        erase_tail = self._is_erasable(new.fill)
        for start, end in _spans(changed, text, attrs):
            if end > tail and erase_tail:
                tail = max(start, tail)
                self._put_cells(row, start, tail, text, attrs)
                self._move_hidden(row, tail)
                self._set_pen(new.fill)
                self._out.append("\x1b[K")
                break
            self._put_cells(row, start, end, text, attrs)
        return self._position == (row, width) and goes_on and row + 1 < self._new.height

    def _changed_columns(self, old: Row, text: str, attrs: str, columns: Sequence[int]) -> list[int]:
        """Return the visible columns in which the new row differs from what `old` shows."""
        width = self._new.width
        old_text, old_attrs = old.padded(width)
        if isinstance(columns, range) and NARROW_CELLS.fullmatch(old_text):
            if old_attrs == attrs:
                return [col for col, (a, b) in enumerate(zip(old_text, text)) if a != b]
            cells = zip(old_text, text, old_attrs, attrs)
            return [col for col, (a, b, c, d) in enumerate(cells) if a != b or c != d]
        shown = set(self._last.visible_columns(old_text))
        return [
            col
            for col in columns
            if col not in shown or old_text[col] != text[col] or old_attrs[col] != attrs[col]
        ]

    def _put_cells(self, row: int, start: int, end: int, text: str, attrs: str) -> None:
        """Write the cells [start, end) as runs of one rendition."""
        col = start
        while col < end:
            attr = attrs[col]
            run_end = end - len(attrs[col:end].lstrip(attr))
            col = self._put_run(row, col, run_end, text, attr)

    def _put_run(self, row: int, start: int, end: int, text: str, attr: str) -> int:
        """Write the cells [start, end), all of one rendition. Returns the column behind the last one written."""
        if not NARROW_CELLS.fullmatch(text, start, end):
            return self._put_run_by_cell(row, start, end, text, attr)
        piece = text[start:end]
        if _EMPTY_RUN not in piece or not (self._display.ech and self._is_erasable(attr)):
            self._put_text(row, start, piece, attr)
            return end
        for match in _EMPTY_RUN_OR_REST.finditer(piece):
            if match[0].startswith(_EMPTY_RUN):
                self._move_hidden(row, start + match.start())
                self._set_pen(attr)
                self._out.append(f"\x1b[{len(match[0])}X")
            else:
                self._put_text(row, start + match.start(), match[0], attr)
        return end

    def _put_text(self, row: int, col: int, text: str, attr: str) -> None:
        """Write cells of width 1, all of one rendition; empty ones as spaces."""
        self._move_hidden(row, col)
        self._set_pen(attr)
        self._out.append(text.replace(NUL, " "))
        self._position = (row, col + len(text))

    def _put_run_by_cell(self, row: int, start: int, end: int, text: str, attr: str) -> int:
        erase = self._display.ech and self._is_erasable(attr)
        col = start
        while col < end:
            follows_doubtful = self._position is None
            self._move_hidden(row, col)
            self._set_pen(attr)
            code = text[col]
            empty = _EMPTY.match(text, col, end) if erase and code == NUL else None
            if empty:
                self._out.append(f"\x1b[{empty.end() - col}X")
                col = empty.end()
                continue
            contents = self._book.contents(code) or " "
            columns = 2 if self._book.is_wide(code) else 1
            if col + columns > self._new.width:
                contents = " "  # half a wide character cannot be shown, and writing it would wrap
            elif self._book.is_fallback(code):
                contents = _NBSP + contents
            joined = col > 0 and (contents[0] in SKIN_TONES or (follows_doubtful and self._is_joiner_left(text, col)))
            if joined and self._display.ech:
                self._out.append(f"\x1b[{columns}X")  # the terminal may leave alone the place it was meant for
            self._out.append(contents)
            col = min(col + columns, self._new.width)
            doubtful = (joined and col < self._new.width) or any(map(is_width_doubtful, contents))
            self._position = None if doubtful else (row, col)
        return col

    def _is_joiner_left(self, text: str, col: int) -> bool:
        """Return whether the cell left of `col` ends in a joiner: the terminal may draw the next one into it."""
        left = text[max(0, col - 2) : col]
        return self._book.contents(left[0] if self._book.is_wide(left[0]) else left[-1]).endswith(ZERO_WIDTH_JOINER)

    def _is_erasable(self, attr: str) -> bool:
        """Return whether erasing gives cells of this rendition."""
        return attr == Codebook.DEFAULT or (self._display.bce and attr == self._book.erased_code(attr))

    # -- cursor and pen

    def _set_pen(self, code: str) -> None:
        if code != self._pen:
            self._out.append(self._book.rendition(code).sgr())
            self._pen = code

    def _move_hidden(self, row: int, col: int) -> None:
        """Move where something will be written."""
        if self._position == (row, col):
            return
        if self._cursor_visible and self._display.hide_cursor:
            self._out.append(_mode(25, False))
            self._cursor_visible = False
        self._move(row, col)

    def _move(self, row: int, col: int) -> None:
        """Move by the shortest sequence; relative ones only from a position that is certain."""
        best = f"\x1b[{row + 1};{col + 1}H" if row or col else "\x1b[H"
        if self._position is not None:
            for candidate in self._relative_moves(self._position, row, col):
                if len(candidate) < len(best):
                    best = candidate
        self._out.append(best)
        self._position = (row, col)

    def _relative_moves(self, position: Position, row: int, col: int) -> Iterator[str]:
        down, right = row - position[0], col - position[1]
        pending = position[1] >= self._new.width
        if col == 0 and down >= 0:
            yield "\r" * (right != 0) + "\n" * down
        elif not pending and right == 0 and down > 0:
            yield "\n" * down
        elif not pending and down == 0:
            yield "\b" * -right if right < 0 else f"\x1b[{right}C" if right > 1 else "\x1b[C"


def _mode(number: int, on: bool) -> str:
    """Return the sequence that sets or resets a DEC private mode."""
    return f"\x1b[?{number}{'h' if on else 'l'}"


def _exclusive_mode(numbers: tuple[int, ...], old: int, new: int) -> str:
    """Return the sequences for a choice of one mode among several, 0 for none."""
    if not new:
        return "".join(_mode(number, False) for number in numbers)
    return (_mode(old, False) if old else "") + _mode(new, True)


def _most_bytes(shown: Row, wanted: Row) -> int:
    """Return about how many bytes it takes to write one row over another, if they have little in common."""
    return 0 if shown is wanted or shown == wanted else _MOVE_BYTES + len(wanted.text)


def _least_bytes(shown: Row, wanted: Row) -> int:
    """Return how many it takes at the least: one for every cell that differs, but erasing costs next to nothing."""
    differing: int = sum(map(operator.ne, shown.text, wanted.text))
    added = max(0, len(wanted.text) - len(shown.text))
    return max(0, differing + added - wanted.text.count(NUL))


def _find_scroll(old: list[Row], new: list[Row]) -> tuple[int, int, int, bool]:
    """Return (top, bottom, distance, certain) of the most promising scroll; distance 0 for none, below 0 for down.

    Rows that have moved vote, by their length, for the distance they have moved; the first few winners are examined.
    Unless it is `certain`, the scroll may turn out not to save anything. A single row that differs has to be written
    in any case.
    """
    changed = [(i, row) for i, row in enumerate(new) if row is not old[i] and row != old[i]]
    if len(changed) < 2:
        return 0, 0, 0, False
    places: dict[Row, list[int]] = {}
    for i, row in enumerate(old):
        places.setdefault(row, []).append(i)
    votes: dict[int, int] = {}
    for i, row in changed:
        if row in places:
            at = bisect.bisect(places[row], i)
            for place in places[row][max(0, at - 1) : at + 1]:  # the nearest ones above and below
                votes[place - i] = votes.get(place - i, 0) + _MOVE_BYTES + len(row.text)
    if not votes:
        return 0, 0, 0, False
    over_old = [0, *accumulate(map(_most_bytes, old, new))]  # what the rows above each one cost without a scroll
    over_blank = [0, *accumulate(_most_bytes(_BLANK_ROW, row) for row in new)]  # and where it leaves empty ones
    (top, bottom, distance), best_gain, best_price = (0, 0, 0), -_SCROLL_REGION_BYTES, 0
    for shift in sorted(votes, key=lambda key: -votes[key])[:_SCROLL_DISTANCES]:
        for first, end in _matching_runs(old, new, shift):
            start, stop = min(first, first + shift), max(end, end + shift)
            vacated = over_blank[stop] - over_blank[end] if shift > 0 else over_blank[first] - over_blank[start]
            price = abs(shift) + vacated + (_SCROLL_BYTES if stop - start == len(old) else _SCROLL_REGION_BYTES)
            gain = over_old[stop] - over_old[start] - price
            if gain > best_gain:
                (top, bottom, distance), best_gain, best_price = (start, stop - 1, shift), gain, price
    certain = sum(map(_least_bytes, old[top : bottom + 1], new[top : bottom + 1])) > 2 * best_price
    return top, bottom, distance, certain


def _matching_runs(old: list[Row], new: list[Row], distance: int) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of the longest runs of new rows that are old rows from `distance` further down."""
    first: int | None = None
    for i in range(len(new) + 1):
        matches = i < len(new) and 0 <= i + distance < len(old) and new[i] == old[i + distance]
        if matches and first is None:
            first = i
        elif not matches and first is not None:
            yield first, i
            first = None


def _spans(changed: list[int], text: str, attrs: str) -> list[tuple[int, int]]:
    """Return changed columns as [start, end) spans, joined over small gaps of the same rendition."""
    if not changed:
        return []
    spans = []
    start = previous = changed[0]
    for col in changed[1:]:
        if col == previous + 1:
            previous = col
            continue
        gap = attrs[previous : col + 1]
        is_long = len(gap) > _MERGE_GAP + 2 or len(text[previous + 1 : col].encode("utf-8", "replace")) > _MERGE_GAP
        if is_long or gap.strip(gap[0]):
            spans.append((start, previous + 1))
            start = col
        previous = col
    spans.append((start, previous + 1))
    return spans


# ======================================================================================================================
# == 13. Synchronized states -- user stream (keys, resizes) and terminal state (screen, echo ack)
# ======================================================================================================================
# What the two ends keep in step. Client to server: everything the user did, as an append-only list of events, of which
# a diff is the part the other end lacks; nothing may be lost or doubled, and nothing is, since a state is a length.
# Server to client: the screen, of which only the newest counts; a diff is a frame diff.
#
# The echo ack rides with the screen: "what you see takes your state n into account". It follows the input by at least
# ECHO_ACK_DELAY_MS, time enough for a program to echo, so that the client can tell a missing echo from a late one.
#
# Hello is ours: the first event of a client says what it can do beyond stock mosh, and a server of ours answers with
# the same in its screen state. A stock peer skips the field unread; until a peer's Hello is seen, it is stock.

ECHO_ACK_DELAY_MS = 50
SIZE_LIMIT = 0xFFFF  # rows or columns; what the kernel's window size can hold
SCREEN_LIMIT_CELLS = 1 << 20  # what an end is willing to draw; five times a wall of 4K monitors
assert SIZE_LIMIT <= SCREEN_LIMIT_CELLS
EVENT_LIMIT = 2 * INSTRUCTION_LIMIT_BYTES  # events kept for diffs; a peer that needs more is broken
HELLO_LIMIT_BYTES = 4_096
HOST_INSTRUCTION_LIMIT = 64  # in a HostMessage, which takes one of each kind; 300,000 resizes would take 8 minutes
CAPABILITIES: tuple[str, ...] = ()  # what this version can do beyond stock mosh


class Resize:
    """The user's window has a new size, each at least 1."""

    __slots__ = ("height", "width")

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def encode(self) -> bytes:
        """Return the ResizeMessage, which both directions share."""
        return encode_field(RESIZE_WIDTH, self.width) + encode_field(RESIZE_HEIGHT, self.height)

    @classmethod
    def decode(cls, data: bytes, *, smallest: int = 1) -> Resize:
        """Parse a ResizeMessage; sizes from `smallest` on are brought to at least 1. Raises PacketError."""
        size = dict(decode_fields(data))
        width, height = size.get(RESIZE_WIDTH), size.get(RESIZE_HEIGHT)
        if not (isinstance(width, int) and isinstance(height, int)):
            raise PacketError("resize is malformed")
        if not (smallest <= width <= SIZE_LIMIT and smallest <= height <= SIZE_LIMIT):
            raise PacketError(f"resize to {width}x{height} is out of range")
        return cls(max(1, width), max(1, height))


class Hello:
    """What an end can do beyond stock mosh."""

    __slots__ = ("capabilities", "version")

    def __init__(self, capabilities: tuple[str, ...] = CAPABILITIES, version: str = __version__) -> None:
        self.capabilities = capabilities
        self.version = version

    def encode(self) -> bytes:
        """Return the Hello message."""
        fields = [encode_field(HELLO_CAPABILITY, name.encode()) for name in self.capabilities]
        return b"".join(fields) + encode_field(HELLO_VERSION, self.version.encode())

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Parse a Hello message. Raises PacketError."""
        if len(data) > HELLO_LIMIT_BYTES:
            raise PacketError("hello is too long")
        capabilities, version = [], ""
        for number, value in decode_fields(data):
            if isinstance(value, bytes) and number == HELLO_CAPABILITY:
                capabilities.append(value.decode("utf-8", "replace"))
            elif isinstance(value, bytes) and number == HELLO_VERSION:
                version = value.decode("utf-8", "replace")
        return cls(tuple(capabilities), version)


if TYPE_CHECKING:
    UserEvent = Union[int, Resize, Hello]  # an int is one byte typed


def _instruction(number: int, body: bytes) -> bytes:
    """Return one entry of a UserMessage or HostMessage."""
    return encode_field(MESSAGE_INSTRUCTION, encode_field(number, body))


def _decode_instructions(message: bytes) -> Iterator[dict[int, bytes]]:
    """Yield the fields of each entry of a UserMessage or HostMessage. Raises PacketError."""
    for number, value in decode_fields(message):
        if number == MESSAGE_INSTRUCTION and isinstance(value, bytes):
            yield {field: body for field, body in decode_fields(value) if isinstance(body, bytes)}


def _bytes_field(message: bytes, wanted: int) -> bytes:
    """Return the last bytes field with that number, or nothing."""
    found = [value for number, value in decode_fields(message) if number == wanted and isinstance(value, bytes)]
    return found[-1] if found else b""


class _EventLog:
    """The events that all states of one user stream have in common, less a prefix that is no longer needed."""

    __slots__ = ("events", "start")

    def __init__(self) -> None:
        self.events: list[UserEvent] = []
        self.start = 0  # how many came before the first one kept


class UserStream:
    """The first `length` events of a log that all states of a session share."""

    __slots__ = ("_log", "length")

    def __init__(self, log: _EventLog | None = None, length: int = 0) -> None:
        self._log = log or _EventLog()
        self.length = length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UserStream) and self.length == other.length

    __hash__ = None  # type: ignore[assignment]

    def with_events(self, events: Iterable[UserEvent]) -> UserStream:
        """Return the stream with `events` appended. Raises PacketError when that would be too many."""
        log, added = self._log, list(events)
        known = log.start + len(log.events) - self.length  # a peer may tell us again what a later state already told
        log.events += added[known:]
        if len(log.events) > EVENT_LIMIT:
            del log.events[EVENT_LIMIT:]
            raise PacketError("too many unacknowledged events")
        return UserStream(log, self.length + len(added))

    def events_since(self, length: int) -> list[UserEvent]:
        """Return the events behind the first `length`."""
        start = self._log.start
        return self._log.events[max(0, length - start) : self.length - start]

    @property
    def backlog(self) -> int:
        """How many events the peer may still lack."""
        return len(self._log.events)

    # -- State

    @property
    def weight(self) -> int:
        """See State; the events are all states' together, and have a limit of their own."""
        return 1

    def diff_from(self, base: UserStream) -> bytes:
        """Return a UserMessage with the events after `base`."""
        out = []
        runs: Iterable[tuple[Any, Iterator[Any]]] = groupby(self.events_since(base.length), type)
        for kind, run in runs:
            if kind is int:
                out.append(_instruction(USER_KEYSTROKE, encode_field(KEYSTROKE_KEYS, bytes(run))))
            else:
                out += [_instruction(USER_RESIZE if kind is Resize else HELLO, event.encode()) for event in run]
        return b"".join(out)

    def applied(self, diff: bytes) -> UserStream:
        """See State."""
        events: list[UserEvent] = []
        for fields in _decode_instructions(diff):
            if USER_KEYSTROKE in fields:
                events += _bytes_field(fields[USER_KEYSTROKE], KEYSTROKE_KEYS)
            elif USER_RESIZE in fields:
                # A stock client reports a window of 0x0, and all later keys come with that: they cannot be refused.
                events.append(Resize.decode(fields[USER_RESIZE], smallest=0))
            elif HELLO in fields:
                events.append(Hello.decode(fields[HELLO]))
        return self.with_events(events)

    def part_way(self, base: UserStream) -> UserStream:
        """See State."""
        return UserStream(self._log, (self.length + base.length + 1) // 2)

    def forget_before(self, base: UserStream) -> None:
        """See State."""
        log = self._log
        if base.length > log.start:
            del log.events[: base.length - log.start]
            log.start = base.length


_WIRE = Display()  # the peer's emulator can do everything, and nobody watches it draw


class TerminalState:
    """The server's screen and the newest user state it takes into account."""

    __slots__ = ("echo_ack", "emulator", "hello")

    def __init__(self, emulator: Emulator, echo_ack: int = 0, hello: Hello | None = None) -> None:
        self.emulator = emulator
        self.echo_ack = echo_ack
        self.hello = hello

    @property
    def framebuffer(self) -> Framebuffer:
        """The screen."""
        return self.emulator.framebuffer

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, TerminalState)
            and self.echo_ack == other.echo_ack
            and (self.hello is None) == (other.hello is None)
            and self.framebuffer == other.framebuffer
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def weight(self) -> int:
        """See State."""
        return self.framebuffer.width * self.framebuffer.height

    def diff_from(self, base: TerminalState) -> bytes:
        """Return a HostMessage; see State."""
        if base is self:  # as in every heartbeat
            return b""
        out = []
        last, new = base.framebuffer, self.framebuffer
        if self.hello and not base.hello:
            out.append(_instruction(HELLO, self.hello.encode()))
        if self.echo_ack != base.echo_ack:
            out.append(_instruction(HOST_ECHO_ACK, encode_field(ECHO_ACK_NUM, self.echo_ack)))
        if (last.width, last.height) != (new.width, new.height):
            out.append(_instruction(HOST_RESIZE, Resize(new.width, new.height).encode()))
        frame = _WIRE.frame(last, new)
        if frame:
            out.append(_instruction(HOST_BYTES, encode_field(HOST_STRING, frame)))
        return b"".join(out)

    def applied(self, diff: bytes) -> TerminalState:
        """See State."""
        new = TerminalState(self.emulator.copy(), self.echo_ack, self.hello)
        for count, fields in enumerate(_decode_instructions(diff)):
            if count >= HOST_INSTRUCTION_LIMIT:
                raise PacketError("a screen is told in too many instructions")
            if HOST_BYTES in fields:
                new.emulator.feed(_bytes_field(fields[HOST_BYTES], HOST_STRING))
            elif HOST_RESIZE in fields:
                size = Resize.decode(fields[HOST_RESIZE])
                if size.width * size.height > SCREEN_LIMIT_CELLS:
                    raise PacketError(f"a screen of {size.width}x{size.height} is out of range")
                new.emulator.resize(size.width, size.height)
            elif HOST_ECHO_ACK in fields:
                new._take_echo_ack(fields[HOST_ECHO_ACK])
            elif HELLO in fields:
                new.hello = Hello.decode(fields[HELLO])
        new.emulator.take_replies()  # security: a server must not make the client's side type anything
        return new

    def _take_echo_ack(self, message: bytes) -> None:
        for number, value in decode_fields(message):
            if number == ECHO_ACK_NUM and isinstance(value, int):
                if value < self.echo_ack:
                    raise PacketError("echo ack goes backwards")
                self.echo_ack = value

    def part_way(self, base: TerminalState) -> TerminalState:
        """See State: a screen of which only the upper half of what is new can be seen."""
        new, old = TerminalState(self.emulator.copy(), base.echo_ack, self.hello), base.emulator.copy()
        old.resize(new.framebuffer.width, new.framebuffer.height)
        rows, old_rows = new.framebuffer.rows, old.framebuffer.rows
        changed = [row for row in range(len(rows)) if rows[row] != old_rows[row]]
        for row in changed[(len(changed) + 1) // 2 :]:
            rows[row] = old_rows[row]
        return new

    def forget_before(self, base: TerminalState) -> None:
        """See State; a screen has no history."""


class CursorKeyFilter:
    """Turns the client's arrow keys into what the program expects.

    The client keeps its terminal in application cursor mode, where arrows are ESC O A to ESC O D. A program that has
    not asked for that mode gets ESC [ A to ESC [ D.
    """

    def __init__(self) -> None:
        self._pending = b""  # ESC has been passed on, ESC O is held

    def filter(self, keys: bytes, application_mode: bool) -> bytes:
        """Return what the program shall read for `keys`; a sequence may be cut anywhere."""
        if not self._pending and b"\x1b" not in keys:
            return keys
        out = bytearray()
        for key in keys:
            if self._pending == b"\x1bO":
                translate = key in b"ABCD" and not application_mode
                out += b"[" if translate else b"O"
                out.append(key)
                self._pending = b""
            elif self._pending == b"\x1b" and key == ord("O"):
                self._pending = b"\x1bO"
            else:
                out.append(key)
                self._pending = b"\x1b" if key == 0x1B and not self._pending else b""
        return bytes(out)


# ======================================================================================================================
# == 14. Prediction and overlays -- prediction engine, notification bar, title
# ======================================================================================================================
# The client shows what the user types before the server has echoed it. It predicts that a letter appears where the
# cursor is and judges each prediction by the screen once the echo ack says that the screen has had time to show it.
#
# Predictions come in epochs. A new epoch starts hidden ("tentative") whenever the program may do something else than
# echo: after Return, a control key, an escape sequence, a step beyond the edge. The first prediction of an epoch that
# is confirmed makes the epoch and all that was predicted in it visible. So a password, never echoed, is never shown,
# and a full-screen program costs at most one round trip before its typing is instant too. One prediction that is wrong,
# seen or not, drops everything.
#
# These rules go beyond stock's:
#
#   - An epoch also ends when the program moves the cursor though no key is under way, or to a row to which no key has
#     led: what it has echoed before says nothing about the prompt that it has written since, which may be for a
#     password. And an asterisk proves nothing.
#   - When a prediction was wrong, the keys that are still under way are predicted anew, hidden, from what the screen
#     shows then. Stock forgets them and expects the next key where the cursor is without them, which is wrong again for
#     as long as the user types on, and seems right when two letters are the same.
#   - A letter pushes on what stands right of it only up to where the screen shows that it does not: the frame of a
#     window, or what is behind it, stays in its place, and some programs overwrite.
#
# A prediction is made on the newest screen with those before it, and judged by the server's bare screen.

SHOW_PREDICTIONS_MS = (20, 30)  # by send interval, about half a round trip: off at or below, on above
UNDERLINE_MS = (50, 80)  # likewise, for underlining them
GLITCH_MS = 250  # a prediction pending for this long makes predictions show on a fast link, too
STRONG_GLITCH_MS = 5_000  # and for this long underlines them
GLITCH_CURE_COUNT = 10  # quick confirmations until that ends
GLITCH_CURE_INTERVAL_MS = 150  # counted at most this often
BULK_READ_BYTES = 100  # a longer read is a paste, for which nothing is predicted

NEVER = LAST_STATE_NUM  # as an epoch or a state number: not before the end of time
_BLANKS = ("", " ", "\xa0")
_BLANK_CODES = NUL + " \xa0"
_MASKS = ("*", "\u2022", "\u25cf")  # what is shown for any letter of a password

CodePair = tuple[str, str]  # a cell as (text, attrs) code points
if TYPE_CHECKING:
    _Key = tuple[Callable[[str], None], str, int, int]  # how its effect is predicted, and of what; expires, made_at

# A user who types on while the network is down would be remembered key by key; only the newest count for anything.
OLDS_LIMIT = 64  # former contents of a cell
CURSORS_LIMIT = 256  # predicted cursors, one per epoch
KEYS_LIMIT = 64  # keys under way that may be predicted anew


class PredictionMode(Enum):
    """When predictions are shown."""

    ADAPTIVE = "adaptive"  # on slow links, and on a fast one while it misbehaves
    ALWAYS = "always"
    NEVER = "never"
    EXPERIMENTAL = "experimental"  # at once, without waiting for an epoch to prove itself


class Verdict(Enum):
    """What the screen says about a prediction."""

    PENDING = auto()  # the screen cannot show it yet
    CORRECT = auto()
    NO_CREDIT = auto()  # right, but it may be by accident
    WRONG = auto()


class CursorPrediction:
    """Where the cursor will be."""

    __slots__ = ("col", "expires", "row", "until")

    def __init__(self, row: int, col: int, until: int, expires: int) -> None:
        self.row = row
        self.col = col
        self.until = until  # its epoch: tentative while this is above the confirmed one
        self.expires = expires  # the client state that carries the key; judged once the echo ack has reached it


class CellPrediction:
    """What one cell will show."""

    __slots__ = ("active", "expires", "made_at", "new", "olds", "unknown", "until")

    def __init__(self, until: int) -> None:
        self.active = False
        self.until = until
        self.expires = 0
        self.made_at = 0
        self.new: CodePair = (NUL, Codebook.DEFAULT)
        self.unknown = False  # something will be there, we cannot say what; only while it is active
        self.olds: list[CodePair] = []  # what was there before: finding that again proves nothing

    def clear(self) -> None:
        """Withdraw the prediction."""
        self.active = self.unknown = False
        self.olds = []
        self.expires = self.until = NEVER

    def remember(self, old: CodePair) -> None:
        """Take note of what was there before."""
        if old not in self.olds:
            self.olds = [*self.olds[1 - OLDS_LIMIT :], old]

    def arm(self, until: int, expires: int, now: int) -> None:
        """Be a prediction of epoch `until`, to be judged once the echo ack has reached `expires`."""
        self.active = True
        self.until = until
        self.expires = expires
        self.made_at = now

    def recycle(self, there: CodePair) -> None:
        """Make room for a newer prediction: this one, and what the user sees `there`, may have been there before."""
        if not self.active or self.unknown:
            self.unknown = False
            self.olds = [there]
        else:
            self.remember(self.new)
            self.remember(there)

    def take_from(self, neighbour: CellPrediction, there: CodePair) -> None:
        """Predict what is predicted for the neighbour now, or else what the user sees `there`."""
        self.unknown = neighbour.unknown
        if not self.unknown:
            self.new = neighbour.new if neighbour.active else there


class PredictionEngine:
    """Predicts the effect of keystrokes."""

    def __init__(self, mode: PredictionMode, overwrite: bool, codebook: Codebook) -> None:
        self.mode = mode
        self.overwrite = overwrite  # typing replaces the character under the cursor instead of pushing it on
        # what the transport says; see `observe`
        self._last_sent_num = 0
        self._echo_ack = 0
        self._send_interval_ms = FRAME_INTERVAL_MS[1]
        # predictions
        self.epoch = 1
        self.confirmed_epoch = 0
        self.cursors: list[CursorPrediction] = []  # the last one is where the next key goes
        self._settled_at = (0, 0, "")  # where the last one came true; see `_place`
        self._pushed_end = NEVER  # the column from which on typing moves nothing, as has been seen in this epoch
        self._searched: Framebuffer | None = None  # where it was looked for last; a letter shifts both sides alike
        self._keys: list[_Key] = []  # the newest
        self.rows: dict[int, list[CellPrediction]] = {}
        self._live_rows: set[int] = set()  # those that may hold an active cell
        # when to show and to underline them
        self.shows_slow_link = False
        self.underlines = False
        self.glitch = 0
        self._last_quick_at = 0
        # the screen and the keys
        self._book = codebook
        codebook.register(self)
        self._size = (0, 0)
        self._screen = Framebuffer(1, 1, codebook)
        self._now = 0
        self._expires = 0  # the client state that carries the key
        self._decoder = Utf8Decoder()
        self._parser = Parser()
        self._last_byte = 0

    def observe(self, *, last_sent_num: int, echo_ack: int, send_interval_ms: int) -> None:
        """Take note of the transport's numbers."""
        self._last_sent_num = last_sent_num
        self._echo_ack = echo_ack
        self._send_interval_ms = send_interval_ms

    # -- queries

    @property
    def active_cell_count(self) -> int:
        """How many cells are predicted at present."""
        return sum(cell.active for row in self._live_rows for cell in self.rows[row])

    @property
    def is_waiting(self) -> bool:
        """Whether there may be predictions that are not settled."""
        return bool(self.cursors or self._live_rows)

    def next_timeout(self, now: int) -> int | None:
        """Return when a prediction not settled by then makes a difference as a glitch, as seen at `now`, or None.

        Nothing else about predictions is a matter of time, so they need not be looked at every 50 ms, as stock does.
        """
        if self.glitch and self.underlines:
            return None
        if self.glitch > GLITCH_CURE_COUNT:
            return now + 1  # the next look underlines them
        made_at = {cell.made_at for row in self._live_rows for cell in self.rows[row] if cell.active}
        deadlines = [at + limit_ms for at in made_at for limit_ms in (GLITCH_MS, STRONG_GLITCH_MS)]
        return min((deadline for deadline in deadlines if deadline > now), default=None)

    def codes_in_use(self) -> Iterator[str]:
        """See Codebook.register."""
        yield self._settled_at[2]
        for row in self.rows.values():
            for cell in row:
                for text, attr in (cell.new, *cell.olds):
                    yield text + attr

    # -- epochs

    def reset(self) -> None:
        """Forget all predictions and keys, and start a new tentative epoch."""
        self._keys = []
        self._drop_predictions()

    def _drop_predictions(self) -> None:
        self.cursors = []
        self.rows = {}
        self._live_rows = set()
        self._become_tentative()

    def _become_tentative(self) -> None:
        self._pushed_end, self._searched = NEVER, None
        if self.mode is not PredictionMode.EXPERIMENTAL:
            self.epoch += 1

    # -- judging

    def _cell_verdict(self, cell: CellPrediction, row: int, col: int, screen: Framebuffer) -> Verdict:
        """What the screen says about a prediction that it has had time to fulfil."""
        if cell.unknown or self._is_blank(cell.new):
            return Verdict.NO_CREDIT
        if not self._contents_match(screen.code_at(row, col), cell.new):
            return Verdict.WRONG
        was_there = any(self._contents_match(old, cell.new) for old in cell.olds)
        # security: a mask that comes as predicted is no leave to show the rest of the password
        return Verdict.NO_CREDIT if was_there or cell.new[0] in _MASKS else Verdict.CORRECT

    def _cursor_verdict(self, cursor: CursorPrediction, screen: Framebuffer) -> Verdict:
        if self._echo_ack < cursor.expires:
            return Verdict.PENDING
        there = (cursor.row, cursor.col) == (screen.cursor_row, screen.cursor_col)
        return Verdict.CORRECT if there else Verdict.WRONG

    def _is_blank(self, cell: CodePair) -> bool:
        return self._book.contents(cell[0]) in _BLANKS

    def _contents_match(self, a: CodePair, b: CodePair) -> bool:
        return self._book.contents(a[0]) == self._book.contents(b[0]) or (self._is_blank(a) and self._is_blank(b))

    def cull(self, screen: Framebuffer, now: int) -> None:
        """Judge all predictions against `screen` and drop those that are settled."""
        if self.mode is PredictionMode.NEVER:
            return
        if self._size != (screen.width, screen.height):
            self._size = (screen.width, screen.height)
            self.reset()
        self._update_triggers()
        if not (self._cull_cells(screen, now) and self._cull_cursors(screen)):
            self._drop_predictions()
            self._predict_again(screen)
        self._cull_pushed(screen)
        if self.cursors and self.cursors[-1].row != screen.cursor_row and self.epoch <= self.confirmed_epoch:
            self._become_tentative()  # security: no echo has led to that row, but it may be where a prompt is

    def _cull_cursors(self, screen: Framebuffer) -> bool:
        """Judge the cursors. Returns False if the last one was wrong."""
        if self.cursors and self._cursor_verdict(self.cursors[-1], screen) is Verdict.WRONG:
            self.cursors = []
            return self.mode is PredictionMode.EXPERIMENTAL
        if self.cursors:
            self._settled_at = self._place(screen)
        self.cursors = [c for c in self.cursors if self._cursor_verdict(c, screen) is Verdict.PENDING]
        return True

    def _cull_pushed(self, screen: Framebuffer) -> None:
        """Give up what was predicted to be pushed on from where the screen shows that it stays."""
        if self.overwrite or not self.cursors or self.cursors[-1].row != screen.cursor_row or screen is self._searched:
            return
        row, col = self.cursors[-1].row, self.cursors[-1].col
        keys = [typed for _, typed, expires, _ in self._keys if expires > self._echo_ack]
        # The screen may show some of the keys under way; if all are letters and backspaces, its own cursor tells which.
        distance, deleted = col - screen.cursor_col, keys.count("\x7f")
        if row not in self._live_rows or not -deleted <= distance <= len(keys) - deleted:
            return
        if any(char_width(key[0]) < 1 for key in keys if key != "\x7f"):
            return
        self._searched = screen
        cells, shown = self.rows[row], screen.codes_of(row)
        for at in range(col, min(screen.width, self._pushed_end) - max(0, -distance)):
            cell = cells[at]
            if cell.active and not cell.unknown and not self._contents_match(cell.new, shown[at - distance]):
                self._pushed_end = at - distance if at > col else 0
                for beyond in cells[max(col, self._pushed_end) :]:
                    beyond.clear()
                return

    @staticmethod
    def _place(screen: Framebuffer) -> tuple[int, int, str]:
        """Return where the cursor is: row, column, and what stands left of it."""
        row, col = screen.cursor_row, screen.cursor_col
        return row, col, screen.rows[row].text[:col]

    def _update_triggers(self) -> None:
        interval = self._send_interval_ms
        self.shows_slow_link = self._is_slow_link
        if interval > UNDERLINE_MS[1]:
            self.underlines = True
        elif interval <= UNDERLINE_MS[0]:
            self.underlines = False
        if self.glitch > GLITCH_CURE_COUNT:
            self.underlines = True

    def _cull_cells(self, screen: Framebuffer, now: int) -> bool:
        """Judge the cells. Returns False if one was wrong."""
        for row in [row for row in self.rows if row in self._live_rows]:
            is_live = False
            for col, cell in enumerate(self.rows[row]):
                if not cell.active:
                    continue
                if cell.expires > self._echo_ack:
                    is_live = True
                    if now - cell.made_at >= GLITCH_MS:
                        self._note_glitch(now - cell.made_at)
                elif not self._settle(row, col, cell, screen, now):
                    return False
            if not is_live:
                self._live_rows.discard(row)
        return True

    def _settle(self, row: int, col: int, cell: CellPrediction, screen: Framebuffer, now: int) -> bool:
        """Judge a cell whose time has come. Returns False if it was wrong."""
        verdict = self._cell_verdict(cell, row, col, screen)
        if verdict is Verdict.CORRECT:
            self._confirm(row, col, cell, screen, now)
        cell.clear()
        return verdict is not Verdict.WRONG or self.mode is PredictionMode.EXPERIMENTAL

    def _note_glitch(self, pending_ms: int) -> None:
        if pending_ms >= STRONG_GLITCH_MS:
            self.glitch = 2 * GLITCH_CURE_COUNT
        else:
            self.glitch = max(self.glitch, GLITCH_CURE_COUNT)

    def _confirm(self, row: int, col: int, cell: CellPrediction, screen: Framebuffer, now: int) -> None:
        """A prediction came true: trust its epoch, and expect the rest of the row in the same rendition."""
        self.confirmed_epoch = max(self.confirmed_epoch, cell.until)
        quick = now - cell.made_at < GLITCH_MS
        if quick and self.glitch > 0 and now - GLITCH_CURE_INTERVAL_MS >= self._last_quick_at:
            self.glitch -= 1
            self._last_quick_at = now
        attr = without_wrap(screen.code_at(row, col)[1])
        for other in self.rows[row][col:]:
            other.new = (other.new[0], attr)

    # -- showing

    @property
    def _is_slow_link(self) -> bool:
        """Whether the link is so slow that predictions show, or has become fast while some are not settled."""
        off, on = SHOW_PREDICTIONS_MS
        if self._send_interval_ms > (off if self.shows_slow_link else on):
            return True
        return self.shows_slow_link and (bool(self.cursors) or self.active_cell_count > 0)

    @property
    def _shows(self) -> bool:
        if self.mode is PredictionMode.ADAPTIVE:
            return self._is_slow_link or self.glitch > 0
        return self.mode is not PredictionMode.NEVER

    def apply(self, screen: Framebuffer) -> None:
        """Draw the predictions that may be seen on `screen`, a copy of the server's."""
        if not self._shows:
            return
        for cursor in self.cursors:
            if cursor.until <= self.confirmed_epoch and cursor.row < screen.height and cursor.col < screen.width:
                screen.cursor_row, screen.cursor_col = cursor.row, cursor.col
        for row in self._live_rows:
            if row < screen.height:
                self._apply_row(row, screen)

    def _apply_row(self, row: int, screen: Framebuffer) -> None:
        shown = screen.codes_of(row)
        predicted = shown[:]
        for col, (cell, there) in enumerate(zip(self.rows[row], shown)):
            if cell.active and cell.until <= self.confirmed_epoch and (cell.unknown or cell.new != there):
                text, attr = new = there if cell.unknown else cell.new
                if self.underlines and not (self._is_blank(there) and self._is_blank(cell.new)):
                    if not cell.unknown or col != screen.width - 1:
                        new = text, self._underlined(attr)
                predicted[col] = new
        if predicted != shown:
            screen.set_code(row, 0, *map("".join, zip(*predicted)))

    def next_letter(self, screen: Framebuffer) -> str | None:
        """Return in which attributes a letter will be seen at the cursor if one is typed next; None: it is not certain.

        `screen` is the newest, culled and with predictions.
        """
        if not self._shows or self.epoch > self.confirmed_epoch or self._parser.is_busy or self._last_byte >= 0x80:
            return None
        if not self.cursors and self._place(screen) != self._settled_at:
            return None  # security: see the section's introduction
        row, col, width = screen.cursor_row, screen.cursor_col, screen.width
        if col >= width - 1 or screen.rows[row].text[col : self._end_of_pushed(col, width)].strip(_BLANK_CODES):
            return None
        attr = self._attr_for_typing(row, col, screen)
        return self._underlined(attr) if self.underlines else attr

    def _underlined(self, attr: str) -> str:
        pen = self._book.rendition(attr)
        code = self._book.rendition_code(Rendition(pen.attributes | UNDERLINED, pen.foreground, pen.background))
        return with_wrap(code) if has_wrap(attr) else code

    # -- predicting

    def key(self, byte: int, screen: Framebuffer, now: int) -> None:
        """Predict the effect of one byte typed on `screen`, the newest with predictions and all. Call `cull` before."""
        if self.mode is PredictionMode.NEVER:
            return
        if self.mode is PredictionMode.EXPERIMENTAL:
            self.epoch = self.confirmed_epoch
        if self._last_byte == 0x1B and byte == ord("O"):
            byte = ord("[")  # arrows in application cursor mode
        self._last_byte = byte
        self._screen, self._now, self._expires = screen, now, self._last_sent_num + 1
        pieces = iter(self._parser.parse(self._decoder.decode(bytes((byte,)))))
        for text, function in zip(pieces, pieces):
            for char in text:
                self._predict(self._predict_char, char)
            if function:
                self._predict(self._predict_function, function)

    def _predict(self, how: Callable[[str], None], typed: str) -> None:
        if len(self._keys) >= KEYS_LIMIT:
            self._keys = self._keys_under_way()[1 - KEYS_LIMIT :]
        self._keys.append((how, typed, self._expires, self._now))
        how(typed)

    def _keys_under_way(self) -> list[_Key]:
        return [key for key in self._keys if key[2] > self._echo_ack]

    def _predict_again(self, screen: Framebuffer) -> None:
        """Predict the keys that `screen` need not show yet as if they were typed on it."""
        self._screen = screen
        self._keys = self._keys_under_way()
        for how, typed, expires, made_at in self._keys:
            self._expires, self._now = expires, made_at
            how(typed)

    def _predict_char(self, char: str) -> None:
        if char_width(char) == 1:
            self._type(char)
        else:
            self._ensure_cursor()
            self._become_tentative()

    def _predict_function(self, function: str) -> None:
        if function == "\x7f":
            self._backspace()
        elif function.startswith("\x1b[") and function[-1] in "CD":
            cursor = self._ensure_cursor()
            left = function[-1] == "D"
            step = -self._columns_before(cursor) if left else self._columns_at(cursor.row, cursor.col)
            col = min(cursor.col + step, self._screen.width - 1)
            if col != cursor.col:
                self._touch(col)
                self._pushed_end = self._pushed_end or NEVER  # where text is overwritten, it may be the end of a line
            else:  # a shell's long line goes on in another row; stock takes the key for one without effect
                self._become_tentative()
        elif not function.startswith("\x1b]"):
            self._become_tentative()
            if function == "\r":
                self._newline()

    def _new_cursor(self, row: int, col: int) -> CursorPrediction:
        cursor = CursorPrediction(row, col, self.epoch, self._expires)
        self.cursors = [*self.cursors[1 - CURSORS_LIMIT :], cursor]
        return cursor

    def _ensure_cursor(self) -> CursorPrediction:
        """Return the cursor prediction of this epoch, made from the last one or from the screen."""
        if not self.cursors:
            # security: see the section's introduction
            if self.epoch <= self.confirmed_epoch and self._place(self._screen) != self._settled_at:
                self._become_tentative()
            return self._new_cursor(self._screen.cursor_row, self._screen.cursor_col)
        last = self.cursors[-1]
        return last if last.until == self.epoch else self._new_cursor(last.row, last.col)

    def _touch(self, col: int) -> None:
        self.cursors[-1].col = col
        self.cursors[-1].expires = self._expires

    def _row_cells(self, row: int) -> list[CellPrediction]:
        if row not in self.rows:
            self.rows[row] = [CellPrediction(self.epoch) for _ in range(self._screen.width)]
        self._live_rows.add(row)
        return self.rows[row]

    def _arm(self, cells: Iterable[CellPrediction]) -> None:
        for cell in cells:
            cell.arm(self.epoch, self._expires, self._now)

    def _backspace(self) -> None:
        cursor, screen = self._ensure_cursor(), self._screen
        row, width = cursor.row, screen.width
        cells = self._row_cells(row)
        columns = self._columns_before(cursor)
        if not columns:
            self._become_tentative()  # as for an arrow at the edge
            return
        self._touch(cursor.col - columns)
        self._searched = None  # what is pulled back is new to the search
        end = self._end_of_pushed(cursor.col, width)
        if end <= cursor.col + 1:
            there = screen.code_at(screen.cursor_row, screen.cursor_col)
            blanked = cells[cursor.col : cursor.col + columns]
            for cell in blanked:
                cell.recycle(there)
                cell.new = (" ", there[1])
            self._arm(blanked)
            return
        shown = screen.codes_of(row)
        for col in range(cursor.col, end):
            cells[col].recycle(shown[col])
            if col + columns + 1 < end:
                cells[col].take_from(cells[col + columns], shown[col + columns])
            else:
                cells[col].unknown = True
        self._arm(cells[cursor.col : end])

    def _type(self, char: str) -> None:
        cursor, screen = self._ensure_cursor(), self._screen
        row, col, width = cursor.row, cursor.col, screen.width
        cells = self._row_cells(row)
        if col == width - 1:
            self._become_tentative()
        shown, end = screen.codes_of(row), self._end_of_pushed(col, width)
        for shifted in range(end - 1, col, -1):
            cells[shifted].recycle(shown[shifted])
            if shifted == end - 1:
                cells[shifted].unknown = True
            else:
                cells[shifted].take_from(cells[shifted - 1], shown[shifted - 1])
        cell = cells[col]
        cell.recycle(shown[col])
        self._arm(cells[col:end])
        attr = self._attr_for_typing(row, col, screen)
        cell.new = (self._book.cell_code(char, wide=False, fallback=False), attr)
        self._touch(min(col + 1, width - 1))
        if col == width - 1:
            self._become_tentative()
            self._newline()

    def _end_of_pushed(self, col: int, width: int) -> int:
        """Return the column behind the last one that typing at `col` moves or changes."""
        return col + 1 if self.overwrite else max(col + 1, min(width, self._pushed_end))

    def _attr_for_typing(self, row: int, col: int, screen: Framebuffer) -> str:
        """Typed text looks like what stands left of it, or at the left edge like the pen."""
        return without_wrap(self._expected_at(row, col - 1, screen)[1]) if col else screen.pen

    def _expected_at(self, row: int, col: int, screen: Framebuffer) -> CodePair:
        """What is predicted there, seen or not, or else what `screen` shows."""
        cell = self.rows[row][col] if row in self.rows else None
        return cell.new if cell and cell.active and not cell.unknown else screen.code_at(row, col)

    def _columns_at(self, row: int, col: int) -> int:
        """Return how many columns the character there takes, as far as is known or predicted."""
        return 2 if self._book.is_wide(self._expected_at(row, col, self._screen)[0]) else 1

    def _columns_before(self, cursor: CursorPrediction) -> int:
        """Return how many columns the character left of the cursor takes, 0 at the left edge."""
        return self._columns_at(cursor.row, cursor.col - 2) if cursor.col > 1 else cursor.col

    def _newline(self) -> None:
        cursor = self._ensure_cursor()
        cursor.col = 0
        if cursor.row < self._screen.height - 1:
            cursor.row += 1
            return
        cells = self._row_cells(cursor.row)  # the screen will scroll; no need to predict how
        self._arm(cells)
        for cell in cells:
            cell.new = (NUL, cell.new[1])


# -- notification bar

SERVER_LATE_MS = 6_500  # nothing new from the server for longer than this
REPLY_LATE_MS = 10_000  # none of what we sent for longer than this has been acknowledged
MESSAGE_MS = 1_000
NETWORK_ERROR_MS = 3_500  # a silent neighbour is given up each 3 s, and asked again at the next try
BAR_REFRESH_MS = {False: 1_000, True: 3_000}  # how often the seconds are counted on; True after a long silence
LONG_SILENCE_MS = 60_000
BAR_LIMIT = 127  # characters
_BAR_FOREGROUND, _BAR_BACKGROUND = 7, 4


class NotificationBar:
    """The blue line at the top: what is wrong, for how long, and how to quit."""

    def __init__(self, now: int, quit_key: str) -> None:
        """`quit_key` names the escape key, empty if there is none."""
        self.last_heard_at = now  # when the newest state of the server arrived
        self.last_acked_at = now  # when the newest of our states that it is known to have was sent
        self._hint = f" [To quit: {quit_key} .]" if quit_key else ""
        self._message = ""
        self._expires_at: int | None = None  # of a message, unless it stays until it is replaced
        self._shows_hint = True
        self.tells_network_error = False  # the system's word on a failure to send, the reason of what follows from it

    def set_message(self, text: str, now: int, *, permanent: bool = False, hint: bool = True) -> None:
        """Show `text` for MESSAGE_MS, or if `permanent` until it is replaced."""
        self._message = text
        self._expires_at = None if permanent else now + MESSAGE_MS
        self._shows_hint = hint
        self.tells_network_error = False

    def clear(self) -> None:
        """Show no message any more."""
        self.set_message("", 0, permanent=True)

    def set_network_error(self, text: str, now: int) -> None:
        """Show the system's word on a failure to send."""
        self.set_message(text, now)
        self._expires_at = now + NETWORK_ERROR_MS
        self.tells_network_error = True

    def network_works(self, now: int) -> None:
        """A datagram could be sent: a network error goes soon."""
        if self.tells_network_error and self._expires_at is not None:
            self._expires_at = min(self._expires_at, now + MESSAGE_MS)

    def expire(self, now: int) -> None:
        """Drop a message whose time is over."""
        if self._expires_at is not None and now >= self._expires_at:
            self.clear()

    def text(self, now: int, width: int = BAR_LIMIT) -> str:
        """Return the line, empty if nothing is to be shown. Where it is too long, how to quit outlasts for how long."""
        self.expire(now)
        server_late = now - self.last_heard_at > SERVER_LATE_MS
        reply_late = now - self.last_acked_at > REPLY_LATE_MS
        late = server_late or reply_late
        if not self._message and not late:
            return ""
        word, since = "contact", self.last_heard_at
        if reply_late and not server_late:
            word, since = "reply", self.last_acked_at
        hint = self._hint if self._shows_hint or not self._message else ""
        if not self._message:
            line = f"mosh: Last {word} {_duration(now - since, ' seconds')} ago.{hint}"
        elif not late:
            line = f"mosh: {self._message}{hint}"
        else:
            line = f"mosh: {self._message} ({_duration(now - since, ' s')} without {word}.){hint}"
            if len(line) > width:
                line = f"mosh: {self._message}{hint}"
        return line[:BAR_LIMIT]

    def draw(self, screen: Framebuffer, now: int) -> None:
        """Put the line on `screen`, if there is one to show."""
        text = self.text(now, screen.width)
        if not text:
            return
        if screen.cursor_row == 0:
            screen.cursor_visible = False
        book, width = screen.codebook, screen.width
        plain = book.rendition_code(Rendition(0, _BAR_FOREGROUND, _BAR_BACKGROUND))
        bold = book.rendition_code(Rendition(BOLD, _BAR_FOREGROUND, _BAR_BACKGROUND))
        cells: list[tuple[str, str]] = []
        for char in text:
            columns = char_width(char)
            if columns == 0 and cells:
                cells[-1] = (book.marked(cells[-1][0], char), bold)
            elif columns > 0 and len(cells) + columns <= width:
                cells += [(book.cell_code(char, columns == 2, False), bold), (" ", plain)][:columns]
        cells += [(" ", plain)] * (width - len(cells))
        screen.set_code(0, 0, "".join(cell[0] for cell in cells), "".join(cell[1] for cell in cells))

    def next_timeout(self, now: int) -> int:
        """Return when the line changes next, as seen at `now`."""
        deadlines = [] if self._expires_at is None else [self._expires_at]
        late_at = min(self.last_heard_at + SERVER_LATE_MS, self.last_acked_at + REPLY_LATE_MS) + 1
        refresh = BAR_REFRESH_MS[now - self.last_heard_at > LONG_SILENCE_MS]
        deadlines.append(late_at if now < late_at else now + refresh)
        return min(deadlines)


def _duration(elapsed_ms: int, unit: str) -> str:
    seconds = max(0, elapsed_ms) // 1000
    if seconds < 60:
        return f"{seconds}{unit}"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


_CLIPBOARD_CONTENTS = lazy_pattern(r"[A-Za-z0-9+/]*=*")  # base64


def disarm(screen: Framebuffer, shown: Framebuffer) -> None:
    """Take back on `screen` what would make the user's terminal do more than show it; `shown` was drawn last."""
    if not _CLIPBOARD_CONTENTS.fullmatch(screen.clipboard):
        # security: to "?" a terminal answers with the clipboard, as if typed
        screen.clipboard, screen.copy_count = shown.clipboard, shown.copy_count
    screen.icon_name = screen.icon_name.replace("\x7f", "")
    screen.window_title = screen.window_title.replace("\x7f", "")


def prefix_titles(screen: Framebuffer, prefix: str) -> None:
    """Put `prefix` before the window title, and before the icon name where that is the same."""
    if screen.icon_name == screen.window_title:
        screen.icon_name = prefix + screen.icon_name
    screen.window_title = prefix + screen.window_title


# -- the next letter

_ANY_LETTER = "\u0259"  # stands for it in a frame, and is hardly ever anything else there


class LetterAhead:
    """The frame that shows the next letter typed, made before anybody knows which one it will be.

    To work out what a key changes takes 0.5 ms after a rest in which all caches have gone cold; this needs a tenth.
    """

    def __init__(self, display: Display, shown: Framebuffer, attr: str, marks: tuple[bytes, bytes]) -> None:
        """`shown`: what the user's terminal shows; `attr`: how the letter will look; `marks`: around each frame."""
        self._place = shown.cursor_row, shown.cursor_col
        self._attr = attr
        self._screen = shown.copy()
        self._screen.cursor_col += 1
        self._screen.set_code(*self._place, _ANY_LETTER, attr)
        self._frame = (marks[0] + display.frame(shown, self._screen) + marks[1]).split(_ANY_LETTER.encode())
        self.letter = b""

    def put(self, letter: bytes) -> bytes:
        """Return the frame that shows `letter`, one of ASCII; empty if it would show others, too."""
        if len(self._frame) != 2:
            return b""
        self.letter = letter
        return letter.join(self._frame)

    def screen(self) -> Framebuffer:
        """Return what the terminal shows when the letter has been put."""
        self._screen.set_code(*self._place, self.letter.decode(), self._attr)
        return self._screen


# ======================================================================================================================
# == 15. Cores -- ServerCore and ClientCore: each end complete but for I/O
# ======================================================================================================================
# A core is everything an end does except touching the world. It has doors for bytes (datagrams, keys, program output),
# asks to be woken at `next_timeout`, and takes the time as an argument, so a whole session with both ends, a network
# and a user runs in one process on a simulated clock. The shells below the I/O line only wait, feed, drain and draw.

# Where a client sends when answers stop; see Roaming.
MAX_CANDIDATES = 8
ANSWER_MS = 1_000  # an answer to something said is overdue after this and two round trips
SILENT_MS = 6_500  # and so is any word of the server: it has left out two heartbeats; one to ours: after PORT_HOP_MS
TRIES_MS = (0, 500, 1_500)  # after the start of a search, since the first datagrams on a new network are often lost
COPY_MS = 2_500  # else the other candidates get copies this seldom, that is, with each heartbeat
COPY_DATAGRAMS = 8  # of an instruction; one is enough to move the server
RETRY_MS, RETRY_LIMIT_MS = 200, 60_000  # how soon to try again where the system refuses to send, and for how long
LOOKUP_MS = (1_000, 60_000)  # from the start of a search to the first look at the name; doubles up to the second
assert COPY_MS < ACK_INTERVAL_MS and 2 * (ACK_INTERVAL_MS + ACK_DELAY_MS) < SILENT_MS < PORT_HOP_MS

TYPED_LIMIT_EVENTS = 1 << 20  # typed or pasted but not acknowledged; beyond it the client's shell stops reading
INPUT_LIMIT_BYTES = 4 << 20  # typed ahead for a program that does not read; a kernel's tty drops keys far earlier
REPLY_LIMIT_BYTES = 1 << 16  # answers to a program that asks and does not read
CONNECT_NOTICE_MS = 250  # a client without an answer says so after this
CONNECT_LIMIT_MS = 15_000  # and gives up after this
REPAINT_KEY = 0x0C  # Ctrl-L also repaints the local terminal
SUSPEND_KEY = 0x1A
DEFAULT_ESCAPE_KEY = 0x1E  # Ctrl-^
TITLE_PREFIX = "[mosh] "

# Synchronized output (DEC private mode 2026): a terminal that has it shows a frame only when all of it has arrived. It
# is asked once (DECRQM); the answer comes in among the user's keys, late if the terminal is at the end of a connection
# that hangs, and never from some.
SYNCHRONIZED_OUTPUT_QUERY = b"\x1b[?2026$p"
_SYNCHRONIZED_OUTPUT_REPLY = lazy_pattern(rb"\x1b\[\?2026;([0-4])\$y")
_CUT_OFF_REPLY = lazy_pattern(rb"\x1b(?:\[(?:\?[0-9]{0,4}(?:;[0-4]?\$?)?)?)?\Z")  # no key sends the first three bytes
_ESCAPE_KEY_MS = 50  # but one or two may be the Escape key and Alt-[, if no more follows for so long;
_TERMINAL_REPLY_MS = 5_000  # nor do these keys wait for it any more when the terminal has had so long to answer


def earliest(deadlines: Iterable[int | None]) -> int | None:
    """Return the first of some deadlines, of which None is never."""
    return min((deadline for deadline in deadlines if deadline is not None), default=None)


class ServerCore:
    """The server's end: a program's output in, its input and window size out, datagrams both ways."""

    def __init__(
        self,
        channel: Channel,
        now: int,
        *,
        width: int,
        height: int,
        random_bytes: Callable[[int], bytes],
        mtu_bytes: int = MTU_BYTES["IPv4"],
    ) -> None:
        self._emulator = Emulator(width, height)
        self._key_filter = CursorKeyFilter()
        self._hello: Hello | None = None  # ours, once the client has shown that it knows what that is
        self.client_hello: Hello | None = None
        self.transport: Transport[TerminalState, UserStream] = Transport(
            DatagramLayer(channel, now, is_server=True, mtu_bytes=mtu_bytes),
            # Of some size that no window has: the client's is not known, so the first screen must say its own.
            TerminalState(Emulator(1, 1, self._emulator.framebuffer.codebook)),
            UserStream(),
            now,
            collect_ms=COLLECT_MS["server"],
            random_bytes=random_bytes,
        )
        # for the program
        self.host_input = bytearray()  # typed, not yet read by the program; the shell removes what it has written
        self.size = (width, height)  # of the user's window; the screen follows
        # what the system refuses to send
        self._refused_since: int | None = None  # when it began to
        self._retry_at: int | None = None
        # echo ack
        self._echo_ack = 0
        self._echo_pending: deque[tuple[int, int]] = deque()  # (due at, user state) in order
        # what has been taken over
        self._user_num = 0
        self._user_length = 0
        self._changed = False  # the screen may differ from the one last published
        self._fresh_bytes = 0  # what the program has written since

    # -- bytes in

    def receive_datagram(self, data: bytes, source: Address, now: int, congested: bool = False) -> None:
        """Take in one datagram. Raises PacketError, which is only worth counting."""
        before = self.peer
        try:
            self.transport.receive_datagram(data, source, now, congested)
        finally:
            if self.peer != before:
                self.transport.hurry(now)  # what went to the old address is lost, and the client waits for a sign
        if self.transport.remote.num != self._user_num:
            self._take_user_state(now)

    def receive_host_output(self, data: bytes, now: int) -> None:
        """Take in what the program wrote."""
        self._resize()
        self._emulator.feed(data)
        replies = self._emulator.take_replies()
        if len(self.host_input) < REPLY_LIMIT_BYTES:
            self.host_input += replies
        self._changed = True
        self._fresh_bytes += len(data)

    def _take_user_state(self, now: int) -> None:
        remote = self.transport.remote
        events = remote.state.events_since(self._user_length)
        self._user_num = remote.num
        self._user_length = max(self._user_length, remote.state.length)
        keys = bytearray()
        for event in events:
            if isinstance(event, Resize):
                self.size = (event.width, min(event.height, SCREEN_LIMIT_CELLS // event.width))
            elif isinstance(event, Hello):
                self.client_hello, self._hello = event, Hello()
            else:
                keys.append(event)
        if keys:
            filtered = self._key_filter.filter(bytes(keys), self._emulator.application_cursor_keys)
            self.host_input += filtered[: max(0, INPUT_LIMIT_BYTES - len(self.host_input))]
            self.transport.sender.expect_answer(now)
        if events:
            self._echo_pending.append((now + ECHO_ACK_DELAY_MS, remote.num))
            self._changed = True

    def _resize(self) -> None:
        """Give the screen the user's size, as late as possible: of several sizes only the last one matters.

        A screen that has been smaller meanwhile would lack what was cut off, and the program would not draw it again,
        since its window is as large as ever.
        """
        if self.size != (self.screen.width, self.screen.height):
            self._emulator.resize(*self.size)

    # -- bytes out

    def datagrams_to_send(self, now: int) -> list[bytes]:
        """Return the datagrams that are due, for the address in `peer`."""
        self._publish(now)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self.transport.hurry(now)
        return self.transport.datagrams_to_send(now)

    def datagrams_sent(self, now: int) -> bool:
        """To be called after sending. Returns whether the client was given up as unreachable until it calls again."""
        return self.transport.datagrams.forget_silent_peer(now)

    def note_sending(self, now: int, *, refused_bytes: int, reached: bool) -> None:
        """Of what datagrams_to_send returned the system has refused so much; `reached`: but not all of it.

        Nothing tells when that is over, a firewall's rule or a lost route, and to try costs the network nothing.
        """
        self.transport.datagrams.charge(-refused_bytes)
        if reached or self.peer is None or self.phase is not Phase.CONNECTED:
            self._refused_since = self._retry_at = None
            return
        if self._refused_since is None:
            self._refused_since = now
        self._retry_at = now + RETRY_MS if now - self._refused_since < RETRY_LIMIT_MS else None

    def _publish(self, now: int) -> None:
        echo_ack = self._echo_ack
        while self._echo_pending and self._echo_pending[0][0] <= now:
            echo_ack = self._echo_pending.popleft()[1]
        if self._changed or echo_ack != self._echo_ack:
            self._resize()
            self._echo_ack, self._changed = echo_ack, False
            state = TerminalState(self._emulator.copy(), echo_ack, self._hello)
            self.transport.set_current(state, now, fresh_bytes=self._fresh_bytes)
            self._fresh_bytes = 0

    # -- timers

    def next_timeout(self) -> int | None:
        """Return when datagrams_to_send has to be asked next, None for not before something comes in."""
        echo_due_at = self._echo_pending[0][0] if self._echo_pending and self.peer is not None else None
        return earliest((self.transport.next_timeout(), echo_due_at, self._retry_at))

    def start_shutdown(self, now: int) -> None:
        """Send the last screen and say goodbye."""
        self._publish(now)
        self.transport.start_shutdown(now)

    # -- queries

    @property
    def peer(self) -> Address | None:
        """The address to send to, None while there is none."""
        return self.transport.datagrams.peers[0] if self.transport.datagrams.peers else None

    @property
    def phase(self) -> Phase:
        """See Phase."""
        return self.transport.phase

    @property
    def screen(self) -> Framebuffer:
        """The live screen."""
        return self._emulator.framebuffer

    @property
    def client_heard_at(self) -> int:
        """When the newest state of the client arrived; the start, if none has."""
        return self.transport.remote.at


class EscapeKey:
    """The key that starts a command to the client itself, and what the keys after it do."""

    def __init__(self, setting: bytes | None) -> None:
        """`setting`: the value of MOSH_ESCAPE_KEY, None if unset. Source: stock mosh-client's manual page."""
        key = setting[0] if setting is not None and len(setting) == 1 else DEFAULT_ESCAPE_KEY
        if not 0 < key < 0x80 or key in b"\x03\x04\n\x0c\r":
            key = DEFAULT_ESCAPE_KEY
        self.key = None if setting == b"" else key
        self._needs_newline = key >= 0x20  # a printable escape key counts only at the start of a line
        pass_key = bytes((key if key >= 0x20 else key + 0x40,))
        self._pass_keys = pass_key + pass_key.lower()

    @property
    def name(self) -> str:
        """How to call the key in a text, empty if there is none."""
        if self.key is None:
            return ""
        return f"Ctrl-{chr(self.key + 0x40)}" if self.key < 0x20 else f'"{chr(self.key)}"'

    @property
    def help(self) -> str:
        """What the user is told after pressing it."""
        return f'Commands: Ctrl-Z suspends, "." quits, "{chr(self._pass_keys[0])}" gives literal {self.name}'

    def starts_command(self, key: int, after_newline: bool) -> bool:
        """Return whether `key` is the escape key here."""
        return key == self.key and (after_newline or not self._needs_newline)

    def is_pass_key(self, key: int) -> bool:
        """Return whether `key` after the escape key asks for the escape key itself."""
        return key in self._pass_keys


class Roaming:
    """Where a client sends: to which of the addresses that the server may have, and when from a new port.

    While answers come, everything goes to the address that gave the last one. An answer is a round trip: it
    acknowledges something sent since. When one is overdue, or the network is another one, a search begins: the other
    candidates get copies of what is sent, at a bounded rate, and the first authentic answer decides. A copy is the same
    sealed datagram, so the server takes it once, and moves only to where the fastest copy came from. The last try goes
    out from another port: a firewall on the way may have forgotten the old one, and not let it in again.
    """

    def __init__(self, candidates: Iterable[Address], now: int, *, named: bool) -> None:
        """`candidates`: the likeliest first; `named`: there is a name that can be looked up for more."""
        self._given = list(dict.fromkeys(candidates))[:MAX_CANDIDATES]
        self._found: list[Address] = []  # what the name meant when last looked up
        self._overheard: list[Address] = []  # at most one: where an answer came from that nobody told us of
        self.current: Address | None = None  # what answered last
        self._doubted: set[Address] = set()  # what did not answer when it was alone, where sources tell nothing
        # the search, which goes on until something sent since its start has been acknowledged
        self._search_since: int | None = now
        self._tries: list[int] = []  # when to send without waiting for something to say
        self._copy_at = now  # when the other candidates may get copies again
        self.port_due = False
        self._port_at: int | None = None  # when the search goes on from another port, in case the old one is blocked
        # what an answer is awaited to
        self._acked_num = 0
        self._acked_at = now  # when the ack of it came
        self._awaiting_since: int | None = None
        self._round_trip: RoundTrip | None = None
        self._silent_at: int | None = None
        # lookup
        self._named = named
        self._lookup_at: int | None = None
        self._lookup_ms = LOOKUP_MS[0]

    @property
    def candidates(self) -> list[Address]:
        """Every address to try, the current one first."""
        current = [] if self.current is None else [self.current]
        return list(dict.fromkeys([*current, *self._found, *self._overheard, *self._given]))[:MAX_CANDIDATES]

    @property
    def searching(self) -> bool:
        """Whether it is not known that the current address works."""
        return self._search_since is not None

    # -- what happens

    def network_changed(self, now: int) -> None:
        """This machine has slept or has other addresses than before: nothing known about the path holds."""
        self._search(now)
        self.port_due, self._port_at = True, None

    def path_failed(self, now: int, *, reached: bool) -> None:
        """The system refuses to send to the first target; `reached`: but not to another one."""
        if self._search_since is None:
            self._search(now)
        elif not reached and not self._tries and now - self._search_since < RETRY_LIMIT_MS:
            self._tries = [now + RETRY_MS]  # costs the network nothing

    def heard(self, source: Address, now: int, round_trip_at: int | None) -> None:
        """The newest authentic datagram came from `source`; `round_trip_at`: see DatagramLayer."""
        if self._search_since is None:
            return
        answered = round_trip_at is not None and round_trip_at >= self._search_since
        if source in self.candidates:
            self.current, self._tries = source, []
            self._doubted.clear()
        elif answered:  # a host that answers from another of its addresses: which of ours did it hear?
            if self._doubted.issuperset(self.candidates):
                self._doubted.clear()
            self.current = next(address for address in self.candidates if address not in self._doubted)
        elif self.current is not None and now - self._search_since > self._patience_ms():
            self._overheard = [source]  # security: only now, or a relay on the way could draw a session to itself
        if answered:
            self._search_since = self._awaiting_since = self._lookup_at = self._port_at = None
            self._tries = []

    def found(self, addresses: Iterable[Address], now: int) -> None:
        """The name has been looked up."""
        before = self.candidates
        self._found = list(dict.fromkeys(addresses))[: MAX_CANDIDATES // 2]
        if self.searching and not set(self._found) <= set(before):
            self._tries, self._copy_at = [now], now

    def update(self, transport: Transport[Any, Any], now: int) -> None:
        """Begin to search if an answer is overdue; make `transport` send if it is time to try."""
        sender = transport.sender
        acked = sender.sent[0]
        if acked.num != self._acked_num:
            self._acked_num, self._acked_at, self._awaiting_since = acked.num, now, None
        elif sender.current == acked.state:
            self._awaiting_since = None
        if self._awaiting_since is None and sender.current != acked.state:
            self._awaiting_since = now
        self._round_trip = transport.datagrams.round_trip
        heard_at = transport.datagrams.last_heard_at
        if heard_at is not None:  # when acks come, not what they acknowledge, tells silence from a long way
            self._silent_at = min(heard_at + SILENT_MS, self._acked_at + PORT_HOP_MS)
        overdue_at = self._overdue_at()
        if overdue_at is not None and now >= overdue_at:
            self._doubted.add(self.current)
            self._search(now)
        if self._tries and now >= self._tries[0]:
            self._tries.pop(0)
            self._copy_at = now
            transport.hurry(now)
        if self._port_at is not None and now >= self._port_at:
            self.port_due, self._port_at = True, None

    def _search(self, now: int) -> None:
        self._search_since = self._copy_at = now
        self._tries = [now + ms for ms in TRIES_MS]
        self._port_at = self._tries[-1]
        self._lookup_ms = LOOKUP_MS[0]
        self._lookup_at = now + self._lookup_ms if self._named and self.current is not None else None

    # -- what to do

    def targets(self, now: int) -> list[Address]:
        """Return where to send what is sent now, the current address first; asked once for all of it."""
        if self.current is not None and (self._search_since is None or now < self._copy_at):
            return [self.current]
        self._copy_at = now + COPY_MS
        return self.candidates

    def wants_lookup(self, now: int) -> bool:
        """Return whether it is time to look the name up, and choose the next time."""
        if self._lookup_at is None or now < self._lookup_at:
            return False
        self._lookup_ms = min(2 * self._lookup_ms, LOOKUP_MS[1])
        self._lookup_at = now + self._lookup_ms
        return True

    # -- timers

    def next_timeout(self) -> int | None:
        """Return when update and wants_lookup have to be asked next."""
        return earliest((self._overdue_at(), self._lookup_at, *self._tries[:1]))

    def _overdue_at(self) -> int | None:
        """When an answer will be overdue, None while that is known or nothing has been heard ever."""
        if self._search_since is not None or self._silent_at is None:
            return None
        if self._awaiting_since is None:
            return self._silent_at
        return min(self._silent_at, self._awaiting_since + self._patience_ms())

    def _patience_ms(self) -> int:
        """How long an answer may take that is sure to be asked for several times meanwhile."""
        return ANSWER_MS + (0 if self._round_trip is None else int(2 * self._round_trip.srtt_ms))


class ClientCore:
    """The client's end: keys and window sizes in, frames for the user's terminal out, datagrams both ways."""

    def __init__(
        self,
        channel: Channel,
        now: int,
        *,
        width: int,
        height: int,
        candidates: Sequence[Address],
        port: int,
        random_bytes: Callable[[int], bytes],
        mode: PredictionMode = PredictionMode.ADAPTIVE,
        overwrite: bool = False,
        escape_key: EscapeKey | None = None,
        title_prefix: str = TITLE_PREFIX,
        display: Display | None = None,
        mtu_bytes: int = MTU_BYTES["IPv4"],
        named: bool = False,
    ) -> None:
        """`candidates`: every address the server may have; `port`: its UDP port, for messages; `named`: see Roaming."""
        emulator = Emulator(width, height)
        datagrams = DatagramLayer(channel, now, is_server=False, mtu_bytes=mtu_bytes)
        self.roaming = Roaming(candidates, now, named=named)
        datagrams.peers = self.roaming.candidates
        self.transport: Transport[UserStream, TerminalState] = Transport(
            datagrams,
            UserStream(),
            TerminalState(emulator),
            now,
            collect_ms=COLLECT_MS["client"],
            random_bytes=random_bytes,
        )
        self._started_at = now
        self._port = port
        self.network_error = ""  # the newest, until something has been sent; leaving makes errors of its own
        self._quotes_icmp = False  # it is what a host or router said
        self.transport.sender.may_step_back = False  # a stock server would abort
        # the user's keys
        self._escape_key = escape_key or EscapeKey(None)
        self._in_command = False
        self._after_newline = False
        self.suspend_requested = False  # the shell takes it back once it has suspended
        self._awaits_reply = True
        self._escape_waits_until = now + _TERMINAL_REPLY_MS
        self._cut_off_reply = b""
        self._keys_at: int | None = None  # when that is taken for keys
        # the user's screen
        self._frame_marks = (b"", b"")  # around each frame
        self.engine = PredictionEngine(mode, overwrite, emulator.framebuffer.codebook)
        self.bar = NotificationBar(now, self._escape_key.name)
        self._title_prefix = title_prefix
        self._display = display or Display(hide_cursor=True)
        self._shown = emulator.framebuffer.copy()
        self._shown_is_known = False
        self._drawn_at = now
        self._drawn: Framebuffer | None = None  # the server's screen in it, unless there were predictions on it
        self._drawn_bar = ""
        self._letter_ahead: LetterAhead | None = None
        self._push((Hello(), Resize(width, height)), now)

    # -- bytes in

    def receive_datagram(self, data: bytes, source: Address, now: int, congested: bool = False) -> None:
        """Take in one datagram. Raises PacketError, which is worth a line to the user if it is authentic."""
        was_connecting, datagrams, state = self.is_connecting, self.transport.datagrams, self.transport.remote.state
        expected_seq = datagrams.arrivals.expected_seq
        self.transport.receive_datagram(data, source, now, congested)
        if self.transport.remote.state is not state:  # security: it may bring a prompt for a password
            self._end_looking_ahead()
        if datagrams.arrivals.expected_seq != expected_seq:
            searching = self.roaming.searching
            self.roaming.heard(source, now, datagrams.last_round_trip_at)
            if searching and not self.roaming.searching:
                self.transport.hurry(now)  # until it hears from us again, the server may not send us much
                if self.bar.tells_network_error:
                    self.bar.clear()
        if was_connecting and self.phase is Phase.CONNECTED and not self._in_command:
            self.bar.clear()  # the notice of a missing answer
        self.bar.last_heard_at = self.transport.remote.at
        self.bar.last_acked_at = self.transport.last_acked_at
        self._observe()

    def note_bad_datagram(self, error: PacketError, now: int) -> None:
        """Tell the user why a datagram was dropped, while there is no session that it could only disturb."""
        if self.phase is Phase.CONNECTING:
            self.bar.set_message(f"Crypto exception: {error}", now)

    def note_network_error(self, text: str, now: int) -> None:
        """Tell the user that sending fails, unless something more important is being said."""
        self._quotes_icmp = False
        if self.phase in (Phase.CONNECTING, Phase.CONNECTED):
            self.network_error = text
            if not self._in_command:
                self.bar.set_network_error(text, now)

    def note_sending_works(self, now: int) -> None:
        """The system has sent a datagram; what others say of it comes later."""
        if not self._quotes_icmp:
            self.network_error = ""
            self.bar.network_works(now)

    def note_icmp_error(self, target: Address, text: str, now: int) -> None:
        """Tell the user what a host or router said of our datagrams to `target`, while that is the likeliest address.

        Anybody on the way could have said it, so it counts only while no datagram is answered, and ends nothing.
        """
        if self.roaming.searching and target == self.roaming.candidates[0]:
            self.note_network_error(f"UDP port {self._port}: {text}", now)
            self._quotes_icmp = True

    def echo_at_once(self, keys: bytes) -> bytes:
        """Return what to write to the user's terminal before anything else is done about `keys`: a letter's frame.

        The next frame begins there, and takes back what should not have been shown after all.
        """
        is_letter = len(keys) == 1 and b" " < keys < b"\x7f" and keys[0] != self._escape_key.key
        if self._letter_ahead is None or not is_letter:
            return b""
        self._drawn = None
        return self._letter_ahead.put(keys)

    def receive_keys(self, data: bytes, now: int) -> None:
        """Take in what the user typed, one read at a time: a long one is a paste and is not predicted."""
        if self._awaits_reply:
            data = self._without_reply(data, now)
        self._take_keys(data, now)

    def _take_keys(self, data: bytes, now: int) -> None:
        self._end_looking_ahead()
        if self.phase in (Phase.CLOSING, Phase.CLOSED):
            return
        self._observe()
        self.engine.cull(self.screen, now)
        if len(data) > BULK_READ_BYTES:
            self.engine.reset()
        screen = self._predicted_screen()  # not the one drawn last: that may be older, and the bar is no text to edit
        typed = bytearray()
        for key in data:
            if len(data) <= BULK_READ_BYTES:
                self.engine.key(key, screen, now)
            if not self._take_key(key, typed, now):
                return
        self._push(typed, now)

    def _without_reply(self, data: bytes, now: int) -> bytes:
        """Take the terminal's answer to SYNCHRONIZED_OUTPUT_QUERY out of the user's keys."""
        data, self._keys_at = self._cut_off_reply + data, None
        reply = _SYNCHRONIZED_OUTPUT_REPLY.search(data)
        if reply:
            self._awaits_reply, self._cut_off_reply = False, b""
            if reply[1] in (b"1", b"2"):  # it is set or reset, so it is there
                self._frame_marks = (b"\x1b[?2026h", b"\x1b[?2026l")
            return data[: reply.start()] + data[reply.end() :]
        cut_off = _CUT_OFF_REPLY.search(data)
        end = cut_off.start() if cut_off else len(data)
        if 0 < len(data) - end < 3:
            if now < self._escape_waits_until:
                self._keys_at = now + _ESCAPE_KEY_MS
            else:
                end = len(data)
        self._cut_off_reply = data[end:]
        return data[:end]

    def _take_late_keys(self, now: int) -> None:
        """Take for keys what has turned out to be no beginning of the terminal's answer."""
        if self._keys_at is not None and now >= self._keys_at:
            keys, self._cut_off_reply, self._keys_at = self._cut_off_reply, b"", None
            self._take_keys(keys, now)

    def resize(self, width: int, height: int, now: int) -> None:
        """The user's window has a new size; each is brought to at least 1."""
        self._push((Resize(max(1, width), max(1, height)),), now)
        self.engine.reset()
        self._end_looking_ahead()
        if (width, height) == (self._shown.width, self._shown.height):
            self.repaint()  # it has had another size meanwhile, at which the terminal may have moved or cut everything

    def _push(self, events: Iterable[UserEvent], now: int) -> None:
        self.transport.set_current(self.transport.sender.current.with_events(events), now)

    def _observe(self) -> None:
        self.engine.observe(
            last_sent_num=self.transport.last_sent_num,
            echo_ack=self.transport.remote.state.echo_ack,
            send_interval_ms=self.transport.datagrams.round_trip.frame_interval_ms,
        )

    # -- keys

    def _take_key(self, key: int, typed: bytearray, now: int) -> bool:
        """Take one key: add to `typed` what goes to the program, obey what is for us. Returns whether to go on."""
        if self._in_command:
            self._in_command = self._after_newline = False
            self.bar.clear()
            return self._obey(key, typed, now)
        if self._escape_key.starts_command(key, self._after_newline):
            self._in_command = True
            self.bar.set_message(self._escape_key.help, now, permanent=True, hint=False)
        else:
            self._after_newline = key in b"\r\n"
            typed.append(key)
            if key == REPAINT_KEY:
                self.repaint()
        return True

    def _obey(self, key: int, typed: bytearray, now: int) -> bool:
        escape_key = self._escape_key.key
        assert escape_key is not None
        if key == ord("."):
            self._push(typed, now)  # nothing typed before it is lost
            self.start_shutdown("Exiting on user request...", now)
            return False
        if key == SUSPEND_KEY:
            self.suspend_requested = True
        elif self._escape_key.is_pass_key(key):
            typed.append(escape_key)
        else:
            typed += bytes((escape_key, key))
        return True

    # -- bytes out

    def datagrams_to_send(self, now: int) -> list[bytes]:
        """Return the datagrams that are due, for the first address in `peers`; others get COPY_DATAGRAMS of them."""
        self._take_late_keys(now)
        self._update_notices(now)
        self.roaming.update(self.transport, now)
        datagrams = self.transport.datagrams_to_send(now)
        if datagrams:
            self.transport.datagrams.peers = self.roaming.targets(now)
        return datagrams

    def takes_new_port(self, now: int) -> bool:
        """Return whether to send from another local port from now on, and count that as done; ask before sending."""
        if not self.roaming.port_due and not self.transport.datagrams.wants_new_port(now):
            return False
        self.roaming.port_due = False
        self.transport.datagrams.port_chosen(now)
        return True

    def frame_to_draw(self, now: int) -> bytes:
        """Return what to write to the user's terminal, empty if it is up to date."""
        self._take_late_keys(now)
        self._update_notices(now)
        self.engine.cull(self.screen, now)
        self._drawn_at = now
        bare = None if self.engine.is_waiting else self.screen  # a heartbeat brings no new one
        bar = self.bar.text(now)
        if self._shown_is_known and bare and bare is self._drawn and bar == self._drawn_bar:
            return b""
        self._end_looking_ahead()
        self._drawn, self._drawn_bar = bare, bar
        screen = self._predicted_screen()
        self.bar.draw(screen, now)
        disarm(screen, self._shown)
        prefix_titles(screen, self._title_prefix)
        frame = self._display.frame(self._shown, screen, known=self._shown_is_known)
        self._shown, self._shown_is_known = screen, True
        return frame and self._frame_marks[0] + frame + self._frame_marks[1]

    def look_ahead(self) -> None:
        """Prepare for the next key; to be called before waiting for it, when the frame to draw has been written."""
        is_for_program = not (self._in_command or self._cut_off_reply) and self.phase is Phase.CONNECTED
        if self._letter_ahead is None and is_for_program and self._shown_is_known and not self._drawn_bar:
            attr = self.engine.next_letter(self._shown)
            if attr is not None:
                self._letter_ahead = LetterAhead(self._display, self._shown, attr, self._frame_marks)

    def _end_looking_ahead(self) -> None:
        ahead, self._letter_ahead = self._letter_ahead, None
        if ahead and ahead.letter:
            self._shown = ahead.screen()

    def _predicted_screen(self) -> Framebuffer:
        """Return a copy of the newest screen with the predictions that may be seen."""
        screen = self.screen.copy()
        self.engine.apply(screen)
        return screen

    def last_frame(self, now: int) -> bytes:
        """Return the frame to leave behind: no bar, no title prefix."""
        self.bar.clear()
        self.bar.last_heard_at = self.bar.last_acked_at = now
        self._title_prefix = ""
        self._drawn = None
        return self.frame_to_draw(now)

    def repaint(self) -> None:
        """The user's terminal may show anything: draw all of it next time."""
        self._shown_is_known = False

    # -- timers, life and death

    def next_timeout(self) -> int:
        """Return when datagrams_to_send and frame_to_draw have to be asked next."""
        deadlines = [self.bar.next_timeout(self._drawn_at)]
        asked = self.sending_timeout(), self.engine.next_timeout(self._drawn_at)
        deadlines += [deadline for deadline in asked if deadline is not None]
        if self.is_connecting:
            deadlines.append(max(self._started_at + CONNECT_NOTICE_MS + 1, self._drawn_at + CONNECT_NOTICE_MS))
        return min(deadlines)

    def sending_timeout(self) -> int | None:
        """Return when datagrams_to_send has to be asked next, which is all while the terminal takes no frames."""
        return earliest((self.transport.next_timeout(), self.roaming.next_timeout(), self._keys_at))

    def start_shutdown(self, reason: str, now: int) -> None:
        """Leave, telling the user why and the server that."""
        if self.phase not in (Phase.CLOSING, Phase.CLOSED):
            self.bar.set_message(reason, now, permanent=True)
            self.transport.start_shutdown(now)

    def _update_notices(self, now: int) -> None:
        self.bar.expire(now)
        if self.phase is not Phase.CONNECTING:
            return
        waited_ms = now - self._started_at
        if waited_ms > CONNECT_LIMIT_MS:
            self.start_shutdown("Timed out waiting for server...", now)
        elif waited_ms > CONNECT_NOTICE_MS and not self._in_command and not self.bar.tells_network_error:
            self.bar.set_message(f"Nothing received from server on UDP port {self._port}.", now)

    # -- queries

    @property
    def takes_keys(self) -> bool:
        """Whether more keys may come; False while the server lacks too many of those that did."""
        return self.transport.sender.current.backlog < TYPED_LIMIT_EVENTS

    @property
    def is_connecting(self) -> bool:
        """Whether no state of the server has arrived yet."""
        return self.transport.remote.num == 0

    @property
    def peers(self) -> list[Address]:
        """Where to send what datagrams_to_send has just returned."""
        return self.transport.datagrams.peers

    @property
    def phase(self) -> Phase:
        """See Phase."""
        return self.transport.phase

    @property
    def screen(self) -> Framebuffer:
        """The newest screen of the server, without overlays."""
        return self.transport.remote.state.framebuffer

    @property
    def shown(self) -> Framebuffer:
        """What was drawn last, overlays included."""
        return self._shown


# ======================================================================================================================
# -- The I/O line: only below it are clocks, entropy, sockets, ptys, signals, processes and printing
# ======================================================================================================================

import contextlib  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import os  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import termios  # noqa: E402
import time  # noqa: E402

if TYPE_CHECKING:
    import argparse
    import subprocess
    from collections.abc import MutableMapping
    from types import FrameType

# ======================================================================================================================
# == 16. Outside world -- monotonic clock, UDP sockets, selector loop, signals
# ======================================================================================================================
# Each end is one loop: wait for a descriptor, a signal or the core's deadline; feed the core; send what it has to send.
# `select` serves, since a loop watches a handful of descriptors and other pollers refuse some terminals on macOS.
#
# A host may have several addresses. A socket bound to any of them learns with each datagram which one it came to, and
# answers from that one (RFC 3542 section 6; IP_PKTINFO): another source would not pass the client's firewall or NAT.

LONGEST_WAIT_MS = 3_600_000
SLEEP_MS = 1_000  # a machine that has slept for so long may be elsewhere
LOOK_MS = 1_000  # how often at most to look at the address to send from
NOTICE_MS = 50  # after a notice, since more follow; a first datagram too early costs 1 s of neighbour discovery
NOTICES_PER_TURN = 1_000
# Links (nothing else tells of IPv4 routes that go with one), next hops; addresses, routes, rules of IPv4 and IPv6.
_NETLINK_GROUPS = 0x80000001 | 0x1D0 | 0x40400  # bit n is group n + 1 of linux/rtnetlink.h
# The fourth byte of a notice of the BSDs, route(4): RTM_MISS. Offline each look at the address to send from causes one,
# and so would the next one, for ever. On Linux it is a part of the length, which is a multiple of 4.
_ROUTE_MISS = b"\x07"
DATAGRAMS_PER_TURN = 64  # read at most this many before everything else has its turn
ICMP_ERRORS_PER_TURN = 64
_ECN_CAPABLE = 0x02  # IP TOS: ECT(0), RFC 3168
_ECN_CONGESTED = 0x03
_LINUX_IP_RECVTOS, _LINUX_IP_MTU_DISCOVER = 13, 10  # not in Python's socket module before 3.10 and 3.12
_PR_SET_DUMPABLE = 4  # Linux, prctl(2)
# Not in Python's before 3.12: the option that asks for a datagram's own address, and the kind of what then comes.
_IP_PKTINFO = {"linux": 8, "darwin": 26}.get(sys.platform)
_IPV6_RECVPKTINFO = getattr(socket, "IPV6_RECVPKTINFO", None)
_IPV6_PKTINFO = getattr(socket, "IPV6_PKTINFO", None)
_LINUX_RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
_SO_EE_ORIGIN_ICMP = (2, 3)  # Linux, linux/errqueue.h: ICMP, ICMPv6
_EXTENDED_ERROR = struct.Struct("=IBBBBII")  # errno, origin, type, code, padding, info, data: struct sock_extended_err
_PKTINFO_4 = struct.Struct("=I4s4s")  # interface, our address, the datagram's target: struct in_pktinfo
_PKTINFO_6 = struct.Struct("=16sI")  # the datagram's target, interface: struct in6_pktinfo
_ANCILLARY_BYTES = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_PKTINFO_6.size)  # the largest that a datagram can bring
_ERROR_ANCILLARY_BYTES = 256  # and more than an error can
_IUTF8 = getattr(termios, "IUTF8", 0x4000)  # not in Python's termios module before 3.12; Linux and macOS agree
_FAMILY_NAMES: dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


def monotonic_ms() -> int:
    """Return the clock that everything runs by."""
    return time.monotonic_ns() // 1_000_000


_TERMINAL_SEQUENCE = lazy_pattern(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` without anything that would make a terminal do more than show it."""
    return _TERMINAL_SEQUENCE.sub("", text)


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, waiting where the descriptor does not block. A reader that has gone is no error here."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            wait((), (descriptor,), None)
        except OSError:
            return


def window_size(descriptor: int) -> tuple[int, int]:
    """Return (width, height) of a terminal; 80x24 where the system says 0 or nothing."""
    try:
        width, height = os.get_terminal_size(descriptor)
    except OSError:
        return 80, 24
    return (width, height) if width and height else (80, 24)


def disable_core_dumps() -> tuple[int, int] | None:
    """Make sure that no core file ever holds the key. Returns the old limits, for the child of a server."""
    import resource  # 1 ms

    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    except (OSError, ValueError):
        return None
    return soft, hard


def forbid_tracing() -> None:
    """Keep other processes of the user, and core dumps that a program takes in, out of this one's memory.

    Linux only. It also hides /proc/PID/environ. It lasts until the next exec, so the program on the pty is as always.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):  # a Python without ctypes has to do without
        import ctypes  # 2 ms, after MOSH CONNECT has been printed

        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_secret_from_environment(name: str) -> str | None:
    """Return an environment variable and remove it, also from what `ps` and /proc show of this process."""
    if name not in os.environ:
        return None
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # 2 ms

        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        address = getenv(name.encode())
        if address:  # security: removing it only unlinks it, the text stays where exec has put it
            ctypes.memset(address, 0, len(os.environb[name.encode()]))
    return os.environ.pop(name)


class SendFailure(Enum):
    """What it means to the session that the system has refused to send a datagram."""

    TOO_BIG = auto()  # for the path: send smaller ones
    NO_PATH = auto()  # there is no way to that address from here, at present: try other ones
    LOST = auto()  # as good as lost on the way, which SSP expects
    REFUSED = auto()  # by a rule of this machine, or for a reason unknown: the user should read it


LASTING_FAILURES = (SendFailure.NO_PATH, SendFailure.REFUSED)  # the next datagram will not fare better

_SEND_FAILURES = {
    errno.EMSGSIZE: SendFailure.TOO_BIG,
    errno.ENETUNREACH: SendFailure.NO_PATH,
    errno.EHOSTUNREACH: SendFailure.NO_PATH,
    errno.ENETDOWN: SendFailure.NO_PATH,
    errno.EHOSTDOWN: SendFailure.NO_PATH,
    errno.EADDRNOTAVAIL: SendFailure.NO_PATH,  # no address of ours has that family or scope
    errno.EAFNOSUPPORT: SendFailure.NO_PATH,  # this machine does not speak that family
    errno.EINVAL: SendFailure.NO_PATH,  # the interface of a scoped address has gone
    errno.ENODEV: SendFailure.NO_PATH,
    errno.ENXIO: SendFailure.NO_PATH,
    errno.EAGAIN: SendFailure.LOST,  # the queue of the interface is full
    errno.ENOBUFS: SendFailure.LOST,
    errno.ENOMEM: SendFailure.LOST,
    errno.ECONNREFUSED: SendFailure.LOST,  # what an earlier datagram met
    errno.ECONNRESET: SendFailure.LOST,
}


def send_failure(error: OSError) -> SendFailure:
    """Return what an error of UdpSocket.send, or of making a socket, means."""
    return _SEND_FAILURES.get(error.errno or 0, SendFailure.REFUSED)


def numeric_addresses(host: str, port: int, family: int) -> list[tuple[int, Address]]:
    """Return (family, address) of what `host` says in figures, perhaps with a scope; nothing if it is a name."""
    try:
        # bytes, since for a str it would load the codec of international names: 1 ms. No name is worth waiting for.
        found = socket.getaddrinfo(host.encode("ascii"), port, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return []
    return [(entry[0], entry[4]) for entry in found]


class PeerAddress(tuple):  # type: ignore[type-arg]
    """Where a datagram came from, as the system has it; equal to any other such tuple.

    `arrived_at`: what it came to, if we are bound to any address, as the ancillary data that makes an answer leave from
    there.
    """

    arrived_at: tuple[int, int, bytes] | None = None


class UdpSocket:
    """A UDP socket with the options both ends use."""

    def __init__(self, family: int) -> None:
        self.family = family
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._set_option(socket.IPPROTO_IP, socket.IP_TOS, _ECN_CAPABLE)
        linux = sys.platform.startswith("linux")
        receive_tos = getattr(socket, "IP_RECVTOS", _LINUX_IP_RECVTOS if linux else None)
        if receive_tos is not None:
            self._set_option(socket.IPPROTO_IP, receive_tos, 1)
        if linux:
            self._set_option(socket.IPPROTO_IP, _LINUX_IP_MTU_DISCOVER, 0)  # fragment rather than refuse
        self._hears_icmp = False

    def _set_option(self, level: int, option: int, value: int) -> None:
        with contextlib.suppress(OSError):  # none of them is needed to work
            self._socket.setsockopt(level, option, value)

    def bind(self, host: str, port: int) -> None:
        """Bind to an address in figures, perhaps with a scope. An IPv6 wildcard takes IPv4 too. Raises OSError."""
        if self.family == socket.AF_INET6:
            self._set_option(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found = numeric_addresses(host, port, self.family)
        if not found:
            raise OSError(errno.EINVAL, f"Bad IP address ({host})")
        self._socket.bind(found[0][1])  # of `host` itself Python would forget a scope
        if host in ("::", "0.0.0.0"):
            self._ask_what_was_reached()

    def _ask_what_was_reached(self) -> None:
        level, option = socket.IPPROTO_IP, _IP_PKTINFO
        if self.family == socket.AF_INET6:
            level, option = socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO
        if option is not None:  # where the system has neither it chooses the source of an answer itself
            self._set_option(level, option, 1)

    def hear_icmp(self) -> None:
        """Let icmp_errors return something, where the system has a way: Linux."""
        if sys.platform.startswith("linux"):
            level, option = _LINUX_RECVERR[socket.AddressFamily(self.family)]
            self._set_option(level, option, 1)
            self._hears_icmp = True

    def icmp_errors(self) -> list[tuple[Address, int]]:
        """Return what hosts and routers have said of our datagrams since the last call: (target, errno) each.

        While there are any the socket is readable, and refuses to send once.
        """
        found: list[tuple[Address, int]] = []
        for _ in range(ICMP_ERRORS_PER_TURN if self._hears_icmp else 0):
            try:
                _data, ancillary, _flags, target = self._socket.recvmsg(1, _ERROR_ANCILLARY_BYTES, socket.MSG_ERRQUEUE)
            except OSError:  # no more of them
                break
            for level, kind, value in ancillary:
                if (level, kind) in _LINUX_RECVERR.values() and len(value) >= _EXTENDED_ERROR.size:
                    number, origin, *_ = _EXTENDED_ERROR.unpack_from(value)
                    found += [(target, number)] * (origin in _SO_EE_ORIGIN_ICMP)
        return found

    @property
    def port(self) -> int:
        """The local port."""
        return int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, data: bytes, address: Address) -> None:
        """Send one datagram. Raises OSError; see send_failure."""
        arrived_at = address.arrived_at if isinstance(address, PeerAddress) else None
        if arrived_at is not None:
            try:
                self._socket.sendmsg([data], [arrived_at], 0, tuple(address))
                return
            except OSError as error:
                if send_failure(error) is not SendFailure.NO_PATH:
                    raise
        try:
            self._socket.sendto(data, tuple(address))  # the address that it should leave from may have gone
        except OSError:
            if not self._hears_icmp:
                raise
            self._send_again(data, address)

    def _send_again(self, data: bytes, address: Address) -> None:
        """Send what was refused by an error that may have been an earlier datagram's."""
        try:
            self._socket.sendto(data, tuple(address))
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # dropped by our own interface, which Linux tells only who hears ICMP
                raise

    def receive(self) -> tuple[bytes, Address, bool] | None:
        """Return (payload, source, congestion mark) of one datagram, None if there is none."""
        try:
            data, ancillary, _flags, source = self._socket.recvmsg(RECEIVE_LIMIT_BYTES + 1, _ANCILLARY_BYTES)
        except OSError:  # nothing there, or an ICMP error that a datagram of ours provoked
            return None
        congested = False
        address = PeerAddress(source)
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and len(value) == _PKTINFO_4.size:
                _interface, ours, target = _PKTINFO_4.unpack(value)
                ours = ours if any(ours) else target  # macOS tells only the latter
                address.arrived_at = level, kind, _PKTINFO_4.pack(0, ours, b"")  # by whatever interface it came
            elif (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO) and len(value) == _PKTINFO_6.size:
                address.arrived_at = level, kind, _PKTINFO_6.pack(_PKTINFO_6.unpack(value)[0], 0)
            elif level == socket.IPPROTO_IP and value:
                congested = value[0] & _ECN_CONGESTED == _ECN_CONGESTED
        return data, address, congested

    def close(self) -> None:
        """Close it."""
        self._socket.close()


def local_address(family: int, address: Address) -> str:
    """Return what datagrams to `address` would leave from, empty if there is no path. Nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _slept_ms() -> int:
    """Return how long this machine has slept since it was started, which monotonic_ms leaves out."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # macOS lacks the first; its second goes on in sleep
    return time.clock_gettime_ns(clock) // 1_000_000 - monotonic_ms()


class NetworkWatch:
    """Notices that this machine may be in another network: it has slept, or it would send from another address.

    The kernel tells at once that something has changed, on Linux and the BSDs, and often what does not matter here; the
    address to send from decides, soon after. Where it never tells anything, that is looked at now and then.
    """

    def __init__(self, now: int) -> None:
        self._notices = self._kernel_notices()
        self._sources: dict[Any, str] = {}
        self._checked_at = now
        self._check_at: int | None = None  # after a notice
        self._slept_ms = _slept_ms()

    @staticmethod
    def _kernel_notices() -> socket.socket | None:
        """Return a socket that becomes readable when addresses or routes change, None where there is none."""
        netlink = getattr(socket, "AF_NETLINK", None)
        family = getattr(socket, "AF_ROUTE", None) if netlink is None else netlink
        if family is None:
            return None
        try:
            notices = socket.socket(family, socket.SOCK_RAW, 0)
        except OSError:  # as in the sandboxes of some phones
            return None
        try:
            notices.setblocking(False)
            if netlink is not None:
                notices.bind((0, _NETLINK_GROUPS))
        except OSError:
            notices.close()
            return None
        return notices

    def readable(self) -> list[socket.socket]:
        """What to wait for; nothing until a notice has been looked into, so that many cost no more than one."""
        return [] if self._notices is None or self._check_at is not None else [self._notices]

    def next_timeout(self) -> int | None:
        """Return when `changed` has to be asked next."""
        return self._check_at

    def changed(self, targets: Sequence[tuple[int, Address]], ready: Iterable[Any], now: int) -> bool:
        """Return whether the path to one of `targets`, (family, address) each, can no longer be what it was."""
        slept_ms = _slept_ms()
        slept = slept_ms - self._slept_ms > SLEEP_MS
        self._slept_ms = slept_ms
        before = self._sources
        if before.keys() != set(targets):
            self._sources = before = {at: before[at] if at in before else local_address(*at) for at in targets}
        if self._notices is not None and self._notices in ready:
            if self._drain(self._notices):
                self._check_at = now + NOTICE_MS
        check_at = self._checked_at + LOOK_MS if self._notices is None else self._check_at
        if not slept and (check_at is None or now < check_at):
            return False
        self._checked_at, self._check_at = now, None
        self._sources = {target: local_address(*target) for target in before}
        return slept or self._sources != before

    @staticmethod
    def _drain(notices: socket.socket) -> bool:
        """Take all notices that are there. Returns whether they may tell of more than of lookups that have failed."""
        kinds = set()
        for _ in range(NOTICES_PER_TURN):
            try:
                kinds.add(notices.recv(4)[3:])  # the rest of it is dropped
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: more than fitted
                kinds.add(b"")
        return kinds != {_ROUTE_MISS}

    def close(self) -> None:
        """Let go of it."""
        if self._notices is not None:
            self._notices.close()


class Signals:
    """Turns signals, also those that the parent has blocked, into something to wait for, until it is closed."""

    def __init__(self, *numbers: int) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._arrived: set[int] = set()
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            self._old_handlers[number] = signal.signal(number, self._note)
        self._old_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._arrived.add(number)  # the byte that Python writes to the wakeup descriptor is lost when others fill it

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._reader.fileno()

    def take(self) -> set[int]:
        """Return the signals that came since the last call."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        arrived, self._arrived = self._arrived, set()
        return arrived

    def close(self) -> None:
        """Restore what was before."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def wait(readable: Iterable[Any], writable: Iterable[Any], deadline: int | None) -> set[Any]:
    """Return those of the given objects (or descriptors) that are ready; none at `deadline`, or now and then."""
    wait_ms = LONGEST_WAIT_MS if deadline is None else deadline - monotonic_ms()
    wait_ms = max(0, min(wait_ms, LONGEST_WAIT_MS))
    wanted = list(readable), list(writable)
    try:
        ready = select.select(*wanted, (), wait_ms / 1000)
    except ValueError:  # a descriptor beyond 1023: whoever started us has left so many open
        return _poll(*wanted, wait_ms)
    return {*ready[0], *ready[1]}


def _poll(readable: list[Any], writable: list[Any], wait_ms: int) -> set[Any]:
    poller, items = select.poll(), [*readable, *writable]
    numbers = [item if isinstance(item, int) else item.fileno() for item in items]
    for number in numbers:
        events = select.POLLIN * (number in numbers[: len(readable)])
        poller.register(number, events | select.POLLOUT * (number in numbers[len(readable) :]))
    ready = {number for number, _event in poller.poll(wait_ms)}
    return {item for item, number in zip(items, numbers) if number in ready}


def open_standard_descriptors() -> None:
    """Make sure that descriptors 0 to 2 exist, or the next one opened would be taken for one of them."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


_LOADER: Any = globals().get("__loader__")
_ARCHIVE: str | None = getattr(_LOADER, "archive", None)  # the mosh.pyz that this is in, if it is in one


def own_python() -> str:
    """Return the path of the Python that runs this, which does not know it itself where PATH is unset."""
    return sys.executable or os.path.realpath("/proc/self/exe")


def own_program() -> list[str]:
    """Return the words that start this very file again, be it mosh.py, mosh.pyz or a link to it."""
    return [own_python(), os.path.abspath(_ARCHIVE or __file__)]


# -- the private cache, and the crypto library that mosh.pyz may have to unpack there

# What is kept lies where only the user can write. This is text, since it also travels to hosts, as a part of the stager
# (section 19): one set of rules for both. Comments do not travel.
_PRIVATE_CACHE = r"""
import os
uid = os.geteuid()

def places():
    # Where to look and to keep, as (folder, name in it).
    env = os.environ.get
    home = env("HOME", "")
    try:
        if os.stat(home).st_uid != uid:
            home = ""
    except (OSError, ValueError):
        home = ""
    if not home:
        import pwd
        try:
            home = pwd.getpwuid(uid).pw_dir
        except KeyError:
            pass
    named = "mosh.py-%d" % uid
    for folder, name in (
        (env("XDG_CACHE_HOME", ""), "mosh.py"), (home and home + "/.cache", "mosh.py"),
        (env("XDG_RUNTIME_DIR", ""), named), (env("TMPDIR", ""), named), ("/tmp", named), ("/var/tmp", named),
    ):
        if folder[:1] == "/":
            yield os.path.realpath(folder), name

def enter(folder, name, create):
    # Returns a descriptor of a folder that nobody else can change or replace. Raises OSError.
    if create:
        # A folder that its owner may not use would stay, and be in the way of others.
        mask = os.umask(0o077)
        try:
            if name == "mosh.py":
                os.makedirs(folder, exist_ok=True)
            os.mkdir(folder + "/" + name)
        except FileExistsError:
            pass
        finally:
            os.umask(mask)
    directory = os.open(folder + "/" + name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(directory)
        good = found.st_uid == uid and not found.st_mode & 0o22
        while good and folder:
            found = os.stat(folder)
            good = found.st_uid in (0, uid) and (not found.st_mode & 0o22 or found.st_mode & 0o1000)
            folder = folder.rpartition("/")[0]
        if not good:
            raise OSError("not private")
    except BaseException:
        os.close(directory)
        raise
    return directory

def read(directory, name):
    # Returns an entry and notes that it is in use. Raises OSError if it is not ours alone.
    entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    with open(entry, "rb") as file:
        found = os.fstat(entry)
        if found.st_mode & 0o170022 != 0o100000 or found.st_uid != uid:
            raise OSError("not private")
        try:
            os.utime(entry)
        except OSError:
            pass
        return file.read()

def keep(directory, name, data, most):
    # Never writes into an entry, which may be in use, but replaces it. Of its kind `most` stay. Raises OSError.
    draft = ".%s.%s" % (name, os.urandom(8).hex())
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
        with open(file, "wb", 0) as raw:
            os.fchmod(file, 0o600)
            while data:
                data = data[raw.write(data):]
            os.fsync(file)
        os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        try:
            os.unlink(draft, dir_fd=directory)
        except OSError:
            pass
        raise
    try:
        prune(directory, name.partition("-")[0], most)
    except OSError:
        pass
    return True

def prune(directory, kind, most):
    # Keep those entries that were used last; a draft younger than a day may belong to a program that has just started.
    import time
    found = []
    for other in os.listdir(directory):
        if other.lstrip(".").partition("-")[0] == kind:
            used = os.stat(other, dir_fd=directory, follow_symlinks=False).st_mtime
            if other[0] != ".":
                found.append((used, other))
            elif used < time.time() - 86400:
                os.unlink(other, dir_fd=directory)
    for used, other in sorted(found)[:-most]:
        os.unlink(other, dir_fd=directory)
"""

# A library that is loaded must be a file. So the two of the `cryptography` package that mosh.pyz holds are unpacked, at
# the first start that finds no other AES-OCB; they are named by their sha256, which every start compares. Where the
# first place will not do (a home that is read-only, or mounted noexec) the next one is tried, in the end memory.
_NATIVES = "natives"  # the folder in mosh.pyz
_NATIVES_KEPT = 4  # of either library; one takes 14 MB
_EXTENSIONS = {  # module: file in the folder of a platform; {} is the suffix for this very Python
    "_cffi_backend": "_cffi_backend{}",
    "cryptography.hazmat.bindings._rust": "cryptography/hazmat/bindings/_rust.abi3.so",
}


class _ExtensionFinder:
    """Lets `import` find extension modules in files of any name."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths = paths

    def find_spec(self, name: str, _path: Any = None, _target: Any = None) -> Any:
        """See importlib.abc.MetaPathFinder."""
        if name not in self._paths:
            return None
        from importlib.machinery import ExtensionFileLoader, ModuleSpec

        path = self._paths[name]
        spec = ModuleSpec(name, ExtensionFileLoader(name, path), origin=path)
        spec.has_location = True
        return spec


class BundledLibraries:
    """The two libraries in mosh.pyz for this platform and Python. The constructor raises OSError if there are none."""

    def __init__(self) -> None:
        from importlib.machinery import EXTENSION_SUFFIXES

        if _ARCHIVE is None:
            raise OSError("only mosh.pyz can hold it, and this is no mosh.pyz")
        platform = f"{sys.platform}-{os.uname().machine}"
        if sys.platform == "linux" and "CS_GNU_LIBC_VERSION" not in os.confstr_names:
            platform += "-musl"  # security: what was made for glibc may load there, and crash
        try:
            index = self._member("sha256").decode("ascii", "replace")
        except OSError:
            raise OSError("this mosh.pyz holds none") from None
        digests = {name: digest for digest, _, name in (line.partition("  ") for line in index.splitlines())}
        self._found: dict[str, tuple[str, str]] = {}  # module: file, sha256
        for module, pattern in _EXTENSIONS.items():
            name = f"{platform}/{pattern.format(EXTENSION_SUFFIXES[0])}"
            if name not in digests:
                raise OSError(f"this mosh.pyz holds no {name}")
            self._found[module] = name, digests[name]

    def load(self) -> str:
        """Make the `cryptography` package importable. Returns from where. Raises OSError with the reasons if it fails.

        The first time takes 110 ms, later ones 30.
        """
        reasons = []
        cache: Any = type(sys)("private_cache")
        exec(_PRIVATE_CACHE, vars(cache))  # noqa: S102  (our own text, as above)
        for folder, inner in cache.places():
            place = f"{folder}/{inner}"
            try:
                self._import({module: f"{place}/{self._kept(cache, folder, inner, module)}" for module in self._found})
                return place
            except (OSError, ImportError) as error:
                reasons.append(f"{place}: {getattr(error, 'strerror', None) or error}")
        if hasattr(os, "memfd_create"):
            try:
                self._import_from_memory()
                return "memory"
            except (OSError, ImportError) as error:
                reasons.append(f"memory: {error}")
        raise OSError("; ".join(reasons))

    def _kept(self, cache: Any, folder: str, inner: str, module: str) -> str:
        """Return the name of a library in the cache, after unpacking it if it is missing or damaged."""
        import hashlib  # 4 ms

        _, digest = self._found[module]
        name = f"{module.rpartition('.')[2]}-{digest[:32]}.so"
        directory = cache.enter(folder, inner, True)
        try:
            with contextlib.suppress(OSError):
                if hashlib.sha256(cache.read(directory, name)).hexdigest() == digest:
                    return name
            cache.keep(directory, name, self._content(module), _NATIVES_KEPT)
        finally:
            os.close(directory)
        return name

    def _import_from_memory(self) -> None:
        descriptors = {}
        try:
            for module in self._found:
                descriptors[module] = os.memfd_create(module)
                with open(descriptors[module], "wb", closefd=False) as file:
                    file.write(self._content(module))
            self._import({module: f"/proc/self/fd/{number}" for module, number in descriptors.items()})
        finally:
            for number in descriptors.values():
                os.close(number)

    def _import(self, paths: dict[str, str]) -> None:
        """Import all that AESOCB3 takes: the libraries from `paths`, the rest from the archive. Raises ImportError."""
        for name in [name for name in sys.modules if name.partition(".")[0] in ("cryptography", "_cffi_backend")]:
            del sys.modules[name]  # an older or broken package that was tried before
        finder, package = _ExtensionFinder(paths), f"{_ARCHIVE}/{_NATIVES}/python"
        sys.meta_path.insert(0, finder)
        sys.path.insert(0, package)
        try:
            for module in (*paths, "cryptography.exceptions", "cryptography.hazmat.primitives.ciphers.aead"):
                __import__(module)
        finally:
            sys.meta_path.remove(finder)
            sys.path.remove(package)

    def _content(self, module: str) -> bytes:
        """Return a library. Raises OSError if it is not what it was when mosh.pyz was built."""
        import hashlib

        name, digest = self._found[module]
        data = self._member(name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise OSError(f"{name} in mosh.pyz is damaged")
        return data

    def _member(self, name: str) -> bytes:
        try:
            data: bytes = _LOADER.get_data(f"{_ARCHIVE}/{_NATIVES}/{name}")
            return data
        except (ImportError, EOFError, zlib.error):
            raise OSError(f"{name} in mosh.pyz is damaged") from None


@lru_cache(maxsize=1)
def _load_bundled() -> str:
    return BundledLibraries().load()


class BundledCipher(CryptographyCipher):
    """AES-128-OCB of the `cryptography` package that mosh.pyz brings along."""

    name = "bundled"

    def __init__(self, raw_key: bytes) -> None:
        self.place = _load_bundled()
        super().__init__(raw_key)


INSTALLED_CIPHERS: tuple[type[CryptographyCipher | LibcryptoCipher], ...] = (CryptographyCipher, LibcryptoCipher)
CIPHERS = (*INSTALLED_CIPHERS, BundledCipher)


def _cipher_attempts(wanted: str) -> Iterator[tuple[type[CryptographyCipher | LibcryptoCipher], str]]:
    """Yield (backend, where it is looked for) of all, or of those named `wanted`, each when its turn has come."""
    named = [make for make in CIPHERS if wanted in ("", make.name)]
    installed = [make for make in named if make in INSTALLED_CIPHERS]
    yield from ((make, "as started") for make in installed)
    if sys.flags.no_site and installed:
        import site  # the interpreter was started with -S, which hides installed packages: look again with them

        site.main()
        yield from ((make, "with site-packages") for make in installed)
    yield from ((make, "in mosh.pyz") for make in named if make not in INSTALLED_CIPHERS)


def choose_cipher() -> Callable[[bytes], Cipher]:
    """Return the first backend that works, or the one MOSH_CRYPTO names. Raises BootstrapError naming every reason."""
    wanted = os.environ.get("MOSH_CRYPTO", "")
    names = [make.name for make in CIPHERS]
    if wanted not in ("", *names):
        raise BootstrapError(f"MOSH_CRYPTO is {wanted!a}; it can be {', '.join(names[:-1])} or {names[-1]}")
    reasons = []
    for make, where in _cipher_attempts(wanted):
        try:
            check_cipher(make)
        except (ImportError, OSError, AttributeError, ValueError) as error:
            reasons.append(f"{make.name} ({where}): {' '.join(str(error).split())}")
        except Exception as error:  # `cryptography` has an exception class of its own for what OpenSSL refuses
            reasons.append(f"{make.name} ({where}): {type(error).__name__}")
        else:
            return make
    raise BootstrapError("no AES-128-OCB on this machine; " + "; ".join(reasons), NO_CIPHER)


# ======================================================================================================================
# == 17. Server -- pty, child process, detaching, timeouts
# ======================================================================================================================
# The server is started by a login that ends at once, so it prints its port and key, forks, and lives on in a session of
# its own that no closing connection takes down. It runs the user's shell on a pty, but lets it start only when the
# client has been heard: until then the window size and, with peers of ours, the capabilities are not known.

PTY_READ_BYTES = 16_384
PTY_TURN_BYTES = 65_536  # read at most this much of a flood before others have their turn, less if a datagram comes,
PTY_TURN_MS = 2  # and no more than that in this time: 32 MB/s, lest a runaway program keep our processor busy, too
FIRST_CLIENT_MS = 60_000
DROPS_LOGGED = 16  # with -v: each of the first dropped datagrams has a line
_SERVER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
EXEC_FAILURE_PAUSE_S = 3  # so that the text can reach the client
LOCALE_VARIABLES = (
    *("LANG", "LANGUAGE", "LC_CTYPE", "LC_NUMERIC", "LC_TIME", "LC_COLLATE", "LC_MONETARY", "LC_MESSAGES"),
    *("LC_PAPER", "LC_NAME", "LC_ADDRESS", "LC_TELEPHONE", "LC_MEASUREMENT", "LC_IDENTIFICATION", "LC_ALL"),
)
_COERCED_LOCALES = ("C.UTF-8", "C.utf8", "UTF-8")  # what Python itself puts into LC_CTYPE when nothing is set (PEP 538)
_MOTD_FILES = (("/run/motd.dynamic", "/var/run/motd.dynamic"), ("/etc/motd",))  # of each group the first that opens


class ServerOptions:
    """What the command line of a server says."""

    def __init__(self) -> None:
        self.bind_address = ""  # numeric; empty for any
        self.by_ssh = False  # that is only where ssh got to, not where the user wants it
        self.ports = (FIRST_PORT, LAST_PORT)
        self.colors = 0
        self.verbose = 0
        self.locale: dict[str, str] = {}  # the client's, in case ours is not UTF-8
        self.command: list[str] = []  # empty: the login shell


def bind_server(options: ServerOptions) -> UdpSocket:
    """Return a socket bound to the first free port, on the address asked for or else on any. Raises BootstrapError.

    Stock binds to the address that ssh got to, lest answers leave from another one. Where a socket on any address
    answers right, a client may reach us at all of them, and so may move between IPv4 and IPv6. macOS lets an IPv6
    socket choose no source for IPv4, so there stock's way is kept.
    """
    places = [(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")]
    if options.bind_address and not (options.by_ssh and sys.platform.startswith("linux")):
        family = socket.AF_INET6 if ":" in options.bind_address else socket.AF_INET
        places.insert(0, (family, options.bind_address))
    reason = ""
    for family, host in places:
        for port in range(options.ports[0], options.ports[1] + 1):
            udp = None
            try:
                udp = UdpSocket(family)
                udp.bind(host, port)
                return udp
            except OSError as error:
                if udp is not None:
                    udp.close()
                reason = error.strerror or str(error)
                if error.errno != errno.EADDRINUSE:
                    break  # this place is no good whatever the port
        if host == options.bind_address:
            print(f"Error binding to IP {host}: {reason}; trying any address", file=sys.stderr)
    ports = "-".join(map(str, sorted(set(options.ports))))
    raise BootstrapError(f"no UDP port in {ports} can be bound: {reason}; -p chooses others")


def use_utf8_locale(environ: MutableMapping[str, str], fallback: dict[str, str]) -> None:
    """Make the child's locale a UTF-8 one: the native, else the client's, else the nearest there is."""
    import _locale as locale  # its outer half takes 2 to 6 ms for names that are not needed here

    def is_utf8() -> bool:
        try:
            locale.setlocale(locale.LC_CTYPE, "")
        except locale.Error:  # type: ignore[attr-defined]
            return False
        return locale.nl_langinfo(locale.CODESET).lower() in ("utf-8", "utf8")

    coerced = environ.get("LC_CTYPE", "")
    if coerced in _COERCED_LOCALES:  # perhaps this Python's own doing, which would hide the client's wish
        del environ["LC_CTYPE"]
    if is_utf8():
        if coerced in _COERCED_LOCALES:
            environ["LC_CTYPE"] = coerced  # Python would have left a UTF-8 locale alone: it was the user
        return
    wanted = fallback.get("LC_ALL") or fallback.get("LC_CTYPE") or fallback.get("LANG") or environ.get("LANG", "")
    for name in LOCALE_VARIABLES:
        environ.pop(name, None)
    environ.update(fallback)
    if is_utf8():
        return
    environ.pop("LC_ALL", None)
    for name in (wanted.partition(".")[0] + ".UTF-8", "C.UTF-8", "en_US.UTF-8", "UTF-8"):
        environ["LC_CTYPE"] = name
        if is_utf8():
            break


def child_environment(environ: MutableMapping[str, str], colors: int) -> dict[str, str]:
    """Return the environment of the program on the pty."""
    child = {name: value for name, value in environ.items() if name not in ("STY", "MOSH_KEY")}
    child["TERM"] = "xterm-256color" if colors == 256 else "xterm"
    child["NCURSES_NO_UTF8_ACS"] = "1"
    child.setdefault("HOME", _password_entry_field("pw_dir", "/"))
    child["PWD"] = child["HOME"]
    return child


def _password_entry_field(name: str, default: str) -> str:
    import pwd

    try:
        return str(getattr(pwd.getpwuid(os.getuid()), name)) or default
    except KeyError:
        return default


class Child:
    """The program on the pty. It waits until `release`, then execs."""

    def __init__(
        self, options: ServerOptions, size: tuple[int, int], core_limit: tuple[int, int] | None, close: Sequence[Any]
    ) -> None:
        """`core_limit`: what to restore for the program; `close`: what it must not inherit."""
        import pty  # 1 ms

        gate_reader, self._gate = os.pipe()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.close(self._gate)
                for item in close:
                    os.close(item.fileno())
                _run_child(options, core_limit, gate_reader)
            finally:
                os._exit(1)
        os.close(gate_reader)
        os.set_blocking(self.fd, False)
        self.set_size(*size)

    def release(self) -> None:
        """Let the program start."""
        if self._gate >= 0:
            with contextlib.suppress(OSError):  # it has died meanwhile
                os.write(self._gate, b"\n")
            os.close(self._gate)
            self._gate = -1

    def set_size(self, width: int, height: int) -> None:
        """Tell the kernel the window size; the program gets SIGWINCH."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def has_ended(self) -> bool:
        """Whether the program itself has. What it left in the background may still hold the pty open."""
        try:
            return os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        except ChildProcessError:  # where SIGCHLD was ignored, or asked before
            return True

    def close(self) -> None:
        """Hang up: the program's session gets SIGHUP. It is not waited for."""
        os.close(self.fd)
        with contextlib.suppress(OSError):
            os.waitpid(self.pid, os.WNOHANG)


def _run_child(options: ServerOptions, core_limit: tuple[int, int] | None, gate: int) -> None:
    """Become the user's program. Runs in the child; does not return unless it fails."""
    # What the login ignored stays ignored across exec: in a server that a script started in the background, Ctrl-C too.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):  # FreeBSD's C library counts one that it keeps to itself
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    modes = termios.tcgetattr(0)
    modes[0] |= _IUTF8
    termios.tcsetattr(0, termios.TCSANOW, modes)
    if not os.read(gate, 1):
        return  # the server has died before a client came: nobody would see what the program does
    os.close(gate)
    if core_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, core_limit)
    environ = child_environment(os.environ, options.colors)
    try:
        os.chdir(environ["HOME"])
    except OSError as error:
        write_all(1, os.fsencode(f"mosh-server: chdir to {environ['HOME']}: {error.strerror}\r\n"))
    command = options.command
    program = command[0] if command else ""
    if not command:
        program = environ.get("SHELL") or _password_entry_field("pw_shell", "/bin/sh")
        command = ["-" + os.path.basename(program)]
        if not os.path.exists(os.path.join(environ["HOME"], ".hushlogin")):
            _print_motd()
    try:
        try:
            os.execvpe(program, command, environ)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            import shutil

            script = shutil.which(program, path=environ.get("PATH")) or program
            os.execve("/bin/sh", ["sh", script, *command[1:]], environ)  # it does not say by what to run it
    except OSError as error:
        write_all(1, os.fsencode(f"mosh-server: execvp: {program}: {error.strerror}\r\n"))
        time.sleep(EXEC_FAILURE_PAUSE_S)


def _print_motd() -> None:
    for group in _MOTD_FILES:
        for path in group:
            try:
                with open(path, "rb") as file:
                    write_all(1, file.read())
                break
            except OSError:
                continue


def _seconds_from_environment(name: str) -> int:
    """Return a timeout variable in seconds, 0 if it is unset or no good, which is said."""
    text = os.environ.get(name, "")
    if text and not re.fullmatch(r"-?[0-9]{1,15}", text):
        print(f"{name} not a valid integer, ignoring", file=sys.stderr)
        return 0
    seconds = int(text or 0)
    if seconds < 0:
        print(f"{name} is negative, ignoring", file=sys.stderr)
    return max(0, seconds)


class Server:
    """The loop that joins a ServerCore with its pty and its socket."""

    def __init__(
        self,
        core: ServerCore,
        udp: UdpSocket,
        child: Child,
        now: int,
        log: Callable[[str], None],
        timeouts_s: tuple[int, int],
    ) -> None:
        """`timeouts_s`: how long a silent network ends the session, and how long lets SIGUSR1 end it; 0 for neither."""
        self._core = core
        self._udp = udp
        self._child = child
        self._log = log
        self._signals = Signals(*_SERVER_SIGNALS)
        self._started_at = now
        self._network_timeout_ms, self._signal_timeout_ms = (1000 * seconds for seconds in timeouts_s)
        self._pty_open = True
        self._pty_rests_until = 0  # ms of the clock; see PTY_TURN_MS
        self._running = True
        self._size = core.size
        self._peer: Address | None = None

    def run(self) -> None:
        """Serve until the program or the client ends."""
        core, fd = self._core, self._child.fd
        while self._running and core.phase is not Phase.CLOSED:
            watch_pty = self._pty_open and core.phase is not Phase.CLOSING
            readable = [self._udp, self._signals] + [fd] * (watch_pty and not self._pty_rests)
            writable = [fd] * (watch_pty and len(core.host_input) > 0)
            ready = wait(readable, writable, self._deadline())
            now = monotonic_ms()
            if self._udp in ready:
                self._receive(now)
                self._feed_pty(now)  # before anything is read: Ctrl-C should not wait for the flood it is to stop
            if fd in ready and not self._pty_rests:
                self._read_pty(now)
            self._feed_pty(now)
            self._check_timeouts(now)
            if self._signals in ready:
                self._check_signals(now)
            self._send(now)
        self._child.close()
        self._log("[mosh-server is exiting.]")

    def _deadline(self) -> int | None:
        deadlines = [self._core.next_timeout()]
        if self._pty_rests:
            deadlines.append(self._pty_rests_until)
        if self._core.phase is Phase.CONNECTING:
            deadlines.append(self._started_at + FIRST_CLIENT_MS)
        if self._network_timeout_ms and self._core.phase is not Phase.CLOSING:
            deadlines.append(self._core.client_heard_at + self._network_timeout_ms)
        return earliest(deadlines)

    # -- network

    def _receive(self, now: int) -> None:
        for _ in range(DATAGRAMS_PER_TURN):
            received = self._udp.receive()
            if received is None:
                break
            data, source, congested = received
            try:
                self._core.receive_datagram(data, source, now, congested)
            except PacketError as error:
                count = self._core.transport.stats["dropped"]
                if count <= DROPS_LOGGED or count & (count - 1) == 0:  # then only at powers of two: a log is no target
                    self._log(f"dropped a datagram of {len(data)} bytes, the {count}. one: {error}")
        if self._core.peer is not None and self._core.peer != self._peer:
            self._peer = self._core.peer
            self._log(f"Server now attached to client at {self._peer[0]}:{self._peer[1]}")
        if self._core.size != self._size:
            self._size = self._core.size
            self._child.set_size(*self._size)
        if self._core.phase is not Phase.CONNECTING:
            self._child.release()

    def _send(self, now: int) -> None:
        datagrams = self._core.datagrams_to_send(now)
        refused = []
        for datagram in datagrams:
            try:
                self._udp.send(datagram, self._core.peer)
            except OSError as error:
                failure = send_failure(error)
                refused += [len(datagram)] * (failure in LASTING_FAILURES)
                if failure is SendFailure.TOO_BIG:
                    self._core.transport.datagrams.mtu.shrink()
                self._log(f"sendto: {error.strerror}")
        if datagrams:
            self._core.note_sending(now, refused_bytes=sum(refused), reached=len(refused) < len(datagrams))
        if self._core.datagrams_sent(now):
            self._peer = None
            self._log("Server now detached from client.")

    # -- pty

    @property
    def _pty_rests(self) -> bool:
        """Whether so much has just been read that it is the turn of others."""
        return monotonic_ms() < self._pty_rests_until

    def _read_pty(self, now: int, *, last: bool = False) -> None:
        """Read what the program writes. `last`: it has ended; the kernel's rest, 12 KB on Linux, fits into one turn."""
        chunks: list[bytes] = []
        size = 0
        while size < PTY_TURN_BYTES:
            try:
                chunk = os.read(self._child.fd, PTY_READ_BYTES)
            except BlockingIOError:
                break
            except OSError:  # EIO: the program has gone
                chunk = b""
            if not chunk:
                self._pty_open = False
                break
            chunks.append(chunk)
            size += len(chunk)
            if not last and wait((self._udp,), (), 0):  # a key, most likely, and 64 KB of a flood can take 7 ms
                break
        if last:
            self._pty_open = False
        if size >= PTY_TURN_BYTES:
            self._pty_rests_until = now + PTY_TURN_MS
        if chunks:
            self._core.receive_host_output(b"".join(chunks), now)
        if not self._pty_open:
            self._core.start_shutdown(now)

    def _feed_pty(self, now: int) -> None:
        waiting = self._core.host_input
        if not waiting or not self._pty_open:
            return
        try:
            del waiting[: os.write(self._child.fd, waiting[:PTY_READ_BYTES])]
        except BlockingIOError:
            return
        except OSError:
            self._pty_open = False
            self._core.start_shutdown(now)

    # -- end

    def _check_timeouts(self, now: int) -> None:
        idle_ms = now - self._core.client_heard_at
        is_limited = self._network_timeout_ms and self._core.phase is not Phase.CLOSING
        if is_limited and idle_ms >= self._network_timeout_ms:
            self._log(f"Network idle for {idle_ms // 1000} seconds.")
            self._stop(now)
        if self._core.phase is Phase.CONNECTING and now - self._started_at >= FIRST_CLIENT_MS:
            self._log("No connection within 60 seconds.")
            self._running = False

    def _check_signals(self, now: int) -> None:
        arrived = self._signals.take()
        idle_ms = now - self._core.client_heard_at
        if signal.SIGCHLD in arrived and self._pty_open and self._child.has_ended():
            self._read_pty(now, last=True)
        if signal.SIGUSR1 in arrived and idle_ms >= self._signal_timeout_ms:
            self._log(f"Network idle for {idle_ms // 1000} seconds when SIGUSR1 received")
            self._stop(now)
        elif arrived & {signal.SIGTERM, signal.SIGINT}:
            self._stop(now)

    def _stop(self, now: int) -> None:
        if self._core.peer is not None and self._core.phase is Phase.CONNECTED:
            self._core.start_shutdown(now)
        else:
            self._running = False


def serve(options: ServerOptions) -> int:
    """Announce a session, detach, and serve it. Returns the exit status of the process that was started."""
    core_limit = disable_core_dumps()
    make_cipher = choose_cipher()
    use_utf8_locale(os.environ, options.locale)
    network_timeout_s = _seconds_from_environment("MOSH_SERVER_NETWORK_TMOUT")
    signal_timeout_s = _seconds_from_environment("MOSH_SERVER_SIGNAL_TMOUT")
    udp = bind_server(options)
    _check_for_pty()
    key = Key(os.urandom(KEY_BYTES))
    if os.isatty(0):
        write_all(1, b"\r\n\n")  # what was typed ahead has been echoed, and must not share our line
    width, height = window_size(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SERVER_SIGNALS)  # who has been told of the server may signal it at once
    try:
        pid = os.fork()
    except OSError as error:
        raise BootstrapError(f"a session needs a process, and none can be started: {error.strerror}") from None
    if pid:
        try:
            sys.stdout.write(f"MOSH CONNECT {udp.port} {key.to_text()}\n")
            sys.stdout.flush()
        except OSError:
            os.kill(pid, signal.SIGKILL)  # nobody knows how to reach it
            raise
        with contextlib.suppress(OSError):  # the session is there all the same
            print(f"\nmosh-server (mosh.py {__version__})\n\n[mosh-server detached, pid = {pid}]", file=sys.stderr)
            sys.stderr.flush()
        os._exit(0)  # everything is written, and taking the interpreter down in good order takes 3 ms
    _detach(keep_output=options.verbose > 0)
    forbid_tracing()  # before the program's process is forked, which has the key in its memory until it execs
    child = Child(options, (width, height), core_limit, [udp])
    now = monotonic_ms()
    channel = Channel(make_cipher(key.raw), TO_CLIENT)
    os.register_at_fork(after_in_child=channel.retire)
    del key
    mtu_bytes = MTU_BYTES[_FAMILY_NAMES[udp.family]]
    core = ServerCore(channel, now, width=width, height=height, random_bytes=os.urandom, mtu_bytes=mtu_bytes)
    Server(core, udp, child, now, _logger(options.verbose), (network_timeout_s, signal_timeout_s)).run()
    return 0


def _check_for_pty() -> None:
    """Raise BootstrapError if a session would lack a pty or descriptors, while somebody is there to read it."""
    held: list[int] = []
    try:
        held += os.pipe()  # a session begins with a pipe and a pty, and later has no more than that,
        held += os.openpty()
        held.append(os.dup(held[0]))  # except what libffi 3.5 keeps open from when forbid_tracing loads it
    except OSError as error:
        raise BootstrapError(f"a session needs a pty, and none can be opened: {error.strerror}") from None
    finally:
        for descriptor in held:
            os.close(descriptor)


def _detach(keep_output: bool) -> None:
    """Leave the session of the login, and its descriptors unless the user wants to see the log."""
    os.setsid()
    if keep_output:
        return
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _logger(verbose: int) -> Callable[[str], None]:
    if not verbose:
        return lambda _text: None

    def log(text: str) -> None:
        if wait((), (2,), 0):  # a line that nobody reads must not stop the session
            write_all(2, os.fsencode(f"[{monotonic_ms() % 100_000}] {text}\n"))

    return log


# ======================================================================================================================
# == 18. Client -- raw mode, suspend and resume, drawing
# ======================================================================================================================
# The client owns the user's terminal and gives it back whatever happens: on exit, on an error, on suspend. What the
# terminal can do comes from terminfo; nearly all sequences are plain ECMA-48, which every terminal in use understands.
#
# A terminal may be slow, or take nothing for hours: it is paused, or at the end of a connection that hangs. The session
# goes on meanwhile, and keys are read. The next frame is made when the last one has been taken, from what is then new.

KEYBOARD_READ_BYTES = 16_384
STALLED_MS = 1_000  # who is told to end waits no longer for a terminal that takes nothing
_TERMINAL_TURN_S = 0.000_3  # in which a terminal shows a letter; it may need the processor that we would keep for 1 ms
_ENDING_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE))
LOOKUP_LIMIT_MS = 10_000  # a resolver that has not answered by then gets another chance later
LOOKUP_LIMIT_BYTES = 16_384
_CLOSE_SEQUENCES = b"\x1b[?1l\x1b[0m\x1b[?25h" + b"".join(
    b"\x1b[?%dl" % mode for mode in (*MOUSE_MODES[::-1], *MOUSE_ENCODINGS[::-1], 1004, 2004)
)
_TITLE_TERMINALS = ("xterm", "rxvt", "kterm", "Eterm", "alacritty", "screen", "tmux")
_KNOWN_TERMINALS = (*_TITLE_TERMINALS, "vt", "linux", "foot", "konsole", "gnome", "st", "wezterm", "ghostty")


class Terminfo:
    """What the user's terminal can do."""

    def __init__(self, term: str) -> None:
        """Look `term` up. Raises BootstrapError if there is no telling what it is."""
        self.open, self.close = b"\x1b[?1049h", b"\x1b[?1049l"
        self.ech = self.bce = False
        self.colors = 256 if "256color" in term else 8
        self.title = term.startswith(_TITLE_TERMINALS)
        try:
            import curses  # 3 ms

            curses.setupterm(term or "unset", 1)
        except ImportError:
            return  # a Python without curses: the plainest capabilities do
        except (curses.error, ValueError):
            if term.startswith(_KNOWN_TERMINALS):
                return  # only its terminfo entry is missing here
            name = f"TERM is {term!a}, which this system does not know" if term else "TERM is unset"
            raise BootstrapError(f"the type of your terminal is unknown: {name}; try TERM=xterm-256color") from None
        self.open = curses.tigetstr("smcup") or b""
        self.close = curses.tigetstr("rmcup") or b""
        self.ech = curses.tigetstr("ech") is not None
        self.bce = curses.tigetflag("bce") > 0
        self.colors = curses.tigetnum("colors")


def terminal_modes() -> list[Any]:
    """Return the modes of the user's terminal. Raises BootstrapError if stdin is none."""
    try:
        return termios.tcgetattr(0)
    except termios.error:
        raise BootstrapError("standard input is not a terminal; mosh needs one to run in") from None


class RawTerminal:
    """The user's terminal in raw mode, between `enter` and `leave`; a context manager that always leaves."""

    def __init__(self, terminfo: Terminfo, init: bool = True) -> None:
        """`init` False: without the alternate screen. Raises BootstrapError if stdin is no terminal."""
        self._saved = terminal_modes()
        self._open = (terminfo.open if init else b"") + b"\x1b[?1h"
        self._close = _CLOSE_SEQUENCES + (terminfo.close if init else b"")
        self._entered = False
        # output
        self._descriptor = 1
        self._unwritten = bytearray()
        self.has_stalled = False  # it was left without having taken everything

    @staticmethod
    def _open_output() -> int:
        """Return a descriptor of the terminal that does not block; 1, which mostly does, if there can be none.

        Descriptor 1 itself must go on to block, since other programs write to it, too.
        """
        flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK
        with contextlib.suppress(OSError):  # a pipe, or the terminal of another user, as after su
            return os.open(os.ttyname(1), flags)
        with contextlib.suppress(OSError):
            os.tcgetpgrp(1)  # it is our controlling terminal, if any, and that everybody may open
            return os.open("/dev/tty", flags)
        return 1

    def __enter__(self) -> RawTerminal:
        self.enter()
        return self

    def __exit__(self, *_error: object) -> None:
        self.leave()

    # -- taking and giving back

    def enter(self) -> None:
        """Take the terminal, if it is still there."""
        if not self._entered:
            self._descriptor = self._open_output()
        self._entered = True
        try:
            modes = termios.tcgetattr(0)
        except termios.error:  # a controlling terminal that goes sends SIGCONT along with SIGHUP
            return  # reading from it will say so
        modes[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        modes[0] |= _IUTF8
        modes[1] &= ~termios.OPOST
        modes[2] = modes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        modes[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, modes)
        self.write(self._open)

    def leave(self, signals: Signals | None = None, farewell: bytes = b"") -> set[int]:
        """Give it back as it was, once it has taken everything; for that wait STALLED_MS, or until `signals` end it.

        Returns the signals that came meanwhile.
        """
        if not self._entered:
            return set()
        self._entered = False
        self.write(self._close + farewell)
        arrived = self._finish(signals)
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(0, termios.TCSANOW, self._saved)
        if self._descriptor != 1:
            os.close(self._descriptor)
        return arrived

    # -- output

    def write(self, data: bytes) -> None:
        """Write as much as it takes now, and keep the rest for flush."""
        self._unwritten += data
        self.flush()

    def flush(self) -> None:
        """Write as much of the rest as it takes now."""
        try:
            while self._unwritten:
                most = len(self._unwritten)
                if self._descriptor == 1:  # a write that finds room for less would wait
                    most = select.PIPE_BUF
                    if not wait((), (1,), 0):
                        return
                del self._unwritten[: os.write(self._descriptor, self._unwritten[:most])]
        except BlockingIOError:
            return
        except OSError:  # it has gone; reading from it will say so
            self._unwritten.clear()

    def writable(self) -> list[int]:
        """What to wait for before flush, nothing if all has been written."""
        return [self._descriptor] if self._unwritten else []

    def _finish(self, signals: Signals | None) -> set[int]:
        arrived: set[int] = set()
        while self._unwritten:
            if signals is None:
                if not wait((), self.writable(), monotonic_ms() + STALLED_MS):
                    self.has_stalled = True
                    break
            elif signals in wait((signals,), self.writable(), None):
                arrived |= signals.take()
                signals = None if arrived & _ENDING_SIGNALS else signals
            self.flush()
        self._unwritten.clear()
        return arrived


class ClientOptions:
    """What a client needs to know beside key and address."""

    def __init__(self) -> None:
        self.mode = PredictionMode.ADAPTIVE
        self.overwrite = False
        self.init = True  # switch to the alternate screen


class Candidate(namedtuple("Candidate", "family sockaddr")):
    """An address the server may have."""

    __slots__ = ()

    def __str__(self) -> str:
        try:
            return socket.getnameinfo(self.sockaddr, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
        except OSError:  # the interface that its scope names has gone
            return str(self.sockaddr[0])


class Lookup:
    """Asks what the names of the server mean now, in a process of its own, since an answer may take many seconds."""

    _PROGRAM = """
import socket, sys
family, port, *names = sys.argv[1:]
for name in names:
    try:
        found = socket.getaddrinfo(name, int(port), int(family), socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        continue
    for family_found, _, _, _, address in found:
        print(int(family_found), *address)
"""

    def __init__(self, names: Iterable[str], port: int, family: int = 0) -> None:
        """`family`: the only one wanted, 0 for any."""
        self._names = list(dict.fromkeys(names))
        self._numbers = str(int(family)), str(port)
        self._process: subprocess.Popen[bytes] | None = None
        self._output = b""
        self._limit_at = 0

    def start(self, now: int) -> None:
        """Begin to ask, unless an answer is still awaited."""
        if self._process is not None:
            return
        import subprocess  # 7 ms, unless the login has

        # -I -S: nothing of the user's or the site's is needed. A session of its own: Ctrl-C and hang-ups are for us.
        command = [own_python(), "-I", "-S", "-c", self._PROGRAM, *self._numbers, *self._names]
        with contextlib.suppress(OSError, ValueError):  # no memory, no Python, no name: the known addresses must do
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            self._output, self._limit_at = b"", now + LOOKUP_LIMIT_MS

    def readable(self) -> list[Any]:
        """What to wait for."""
        return [] if self._process is None else [self._process.stdout]

    def next_timeout(self) -> int | None:
        """Return when `answer` has to be asked even if nothing has become readable."""
        return None if self._process is None else self._limit_at

    def answer(self, ready: Iterable[Any], now: int) -> list[Candidate]:
        """Return what was found, once all of it is there; until then, and if nothing was, an empty list."""
        if self._process is None or self._process.stdout is None:
            return []
        if self._process.stdout in ready:
            chunk = os.read(self._process.stdout.fileno(), LOOKUP_LIMIT_BYTES)
            self._output += chunk
            if chunk and len(self._output) < LOOKUP_LIMIT_BYTES:
                return []
        elif now < self._limit_at:
            return []
        self.close()
        found = []
        for line in self._output.decode("ascii", "replace").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short
                family, host, *numbers = line.split()
                if int(family) in _FAMILY_NAMES:
                    found.append(Candidate(int(family), (host, *map(int, numbers))))
        return found

    def close(self) -> None:
        """Do not wait for an answer any more."""
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


class ClientSockets:
    """The client's sockets: per address family the one to send from, and older ones that may still hear."""

    def __init__(self) -> None:
        self.all: list[UdpSocket] = []  # oldest first

    def send(self, data: bytes, candidate: Candidate) -> None:
        """Send from the newest socket of the right family. Raises OSError."""
        self._newest(candidate.family).send(data, candidate.sockaddr)

    def _newest(self, family: int) -> UdpSocket:
        for udp in reversed(self.all):
            if udp.family == family:
                return udp
        return self.open(family)

    def open(self, family: int) -> UdpSocket:
        """Open another socket, that is, another local port. Raises OSError."""
        udp = UdpSocket(family)
        udp.hear_icmp()
        self.all.append(udp)
        while len(self.all) > MAX_PORTS:
            self.all.pop(0).close()
        return udp

    def hop(self, families: Iterable[int]) -> None:
        """Send from another local port from now on; where that fails, from the old one."""
        for family in families:
            with contextlib.suppress(OSError):
                self.open(family)

    def close_old(self) -> None:
        """Close all but the newest of each family."""
        newest = {udp.family: udp for udp in self.all}
        for udp in self.all:
            if newest[udp.family] is not udp:
                udp.close()
        self.all = [udp for udp in self.all if newest[udp.family] is udp]

    def close(self) -> None:
        """Close everything."""
        for udp in self.all:
            udp.close()
        self.all = []


class Client:
    """The loop that joins a ClientCore with the user's terminal and the network."""

    def __init__(self, core: ClientCore, terminal: RawTerminal, lookup: Lookup, *, asks: bool) -> None:
        """`asks`: the terminal may be asked what it can do."""
        self._core = core
        self._terminal = terminal
        self._asks = asks
        self._sockets = ClientSockets()
        self._network = NetworkWatch(monotonic_ms())
        self._lookup = lookup
        self._signals = Signals(signal.SIGWINCH, signal.SIGCONT, *_ENDING_SIGNALS)
        self._stdin_open = True
        self._told_to_end = False

    def run(self) -> None:
        """Run until the session has ended; the terminal is raw meanwhile."""
        with self._terminal:
            if self._asks:
                self._terminal.write(SYNCHRONIZED_OUTPUT_QUERY)
            self._serve()
            self._terminal.write(self._core.last_frame(monotonic_ms()))
            self._terminal.leave(None if self._told_to_end else self._signals)

    def close(self) -> None:
        """Let go of everything but the terminal, which has been given back."""
        self._sockets.close()
        self._network.close()
        self._lookup.close()
        self._signals.close()

    def _serve(self) -> None:
        core = self._core
        ready: set[Any] = set()
        while True:
            self._draw()  # first, since somebody may have pressed a key and be looking
            self._follow_network(ready, monotonic_ms())
            self._send(monotonic_ms())
            if core.phase is Phase.CLOSED:
                return
            readable = [*self._sockets.all, self._signals, *self._network.readable(), *self._lookup.readable()]
            readable += [0] * (self._stdin_open and core.takes_keys)
            unwritten = self._terminal.writable()
            if not unwritten:
                core.look_ahead()
            core_timeout = core.sending_timeout() if unwritten else core.next_timeout()
            deadlines = (core_timeout, self._network.next_timeout(), self._lookup.next_timeout())
            ready = wait(readable, unwritten, earliest(deadlines))
            keys = self._read_keys(alone=len(ready) == 1) if 0 in ready else None
            now = monotonic_ms()
            for udp in self._sockets.all:
                if udp in ready:
                    self._receive(udp, now)
            if core.transport.datagrams.may_close_old_ports(now):
                self._sockets.close_old()
            arrived = self._signals.take() if self._signals in ready else set()
            self._follow_window(arrived, now)  # first, since keys are typed into the window that the user sees
            if keys is not None:
                self._take_keys(keys, now)
            self._end_on(arrived, now)

    def _draw(self) -> None:
        self._terminal.flush()
        if not self._terminal.writable():
            self._terminal.write(self._core.frame_to_draw(monotonic_ms()))

    # -- network

    def _follow_network(self, ready: set[Any], now: int) -> None:
        roaming = self._core.roaming
        if self._network.changed(roaming.candidates, ready, now):
            roaming.network_changed(now)
        if roaming.wants_lookup(now):
            self._lookup.start(now)
        found = self._lookup.answer(ready, now)
        if found:
            roaming.found(found, now)

    def _receive(self, udp: UdpSocket, now: int) -> None:
        received = udp.receive()
        if received is None:
            for target, number in udp.icmp_errors():
                self._core.note_icmp_error(Candidate(udp.family, target), os.strerror(number), now)
        for _ in range(DATAGRAMS_PER_TURN):
            if received is None:
                return
            data, source, congested = received
            try:
                self._core.receive_datagram(data, Candidate(udp.family, source), now, congested)
            except PacketError as error:
                self._core.note_bad_datagram(error, now)
            received = udp.receive()

    def _send(self, now: int) -> None:
        core = self._core
        datagrams = core.datagrams_to_send(now)
        if not datagrams:
            return
        if core.takes_new_port(now):
            self._sockets.hop({candidate.family for candidate in core.peers})
        errors = [
            self._send_to(candidate, datagrams if i == 0 else datagrams[:COPY_DATAGRAMS])
            for i, candidate in enumerate(core.peers)
        ]
        failures = [error and send_failure(error) for error in errors]
        reached = None in failures or SendFailure.TOO_BIG in failures
        if SendFailure.TOO_BIG in failures:
            core.transport.datagrams.mtu.shrink()
        if failures[0] in LASTING_FAILURES:
            core.roaming.path_failed(now, reached=reached)
        if reached:
            core.note_sending_works(now)
        elif errors[0] is not None:
            core.note_network_error(f"sendto: {errors[0].strerror}", now)

    def _send_to(self, candidate: Candidate, datagrams: Iterable[bytes]) -> OSError | None:
        """Send to one address. Returns the first error, behind which nothing is sent."""
        try:
            for datagram in datagrams:
                self._sockets.send(datagram, candidate)
        except OSError as error:
            return error
        return None

    # -- user

    def _read_keys(self, *, alone: bool) -> bytes | None:
        """Return what has been typed, b"" if nothing more will be, and show it at once if it is sure to be seen.

        `alone`: nothing else has come. Security: a datagram may bring a prompt for a password, another window's size
        moves what is in it, and who goes on after having been stopped does not know what the terminal shows.
        """
        try:
            keys = os.read(0, KEYBOARD_READ_BYTES)
        except BlockingIOError:  # another program that reads from the terminal was faster
            return None
        except OSError:
            return b""
        letter = self._core.echo_at_once(keys) if alone else b""
        if letter:
            self._terminal.write(letter)
            time.sleep(_TERMINAL_TURN_S)
        return keys

    def _take_keys(self, keys: bytes, now: int) -> None:
        if not keys:
            self._stdin_open = False
            self._core.start_shutdown("Exiting...", now)
            return
        self._core.receive_keys(keys, now)
        if self._core.suspend_requested:
            self._core.suspend_requested = False
            self._suspend()

    def _suspend(self) -> None:
        arrived = self._terminal.leave(self._signals, b"\r\n\x1b[37;44m[mosh is suspended.]\x1b[m\r\n")
        if not arrived & _ENDING_SIGNALS:  # who is told to end has no shell, perhaps, that would let it go on
            os.kill(0, signal.SIGSTOP)  # the whole job, so that the shell notices
        arrived |= {signal.SIGCONT, *self._signals.take()}
        self._follow_window(arrived, monotonic_ms())
        self._end_on(arrived, monotonic_ms())

    def _follow_window(self, arrived: set[int], now: int) -> None:
        if signal.SIGCONT in arrived:
            self._terminal.enter()
            self._core.repaint()
            self._core.roaming.network_changed(now)  # nobody knows for how long we were stopped
        if arrived & {signal.SIGCONT, signal.SIGWINCH}:
            self._core.resize(*window_size(0), now)

    def _end_on(self, arrived: set[int], now: int) -> None:
        if arrived & _ENDING_SIGNALS:
            self._told_to_end = True
            self._core.start_shutdown("Signal received, shutting down...", now)


def run_client(
    key: Key,
    candidates: Sequence[Candidate],
    port: int,
    options: ClientOptions,
    terminfo: Terminfo,
    make_cipher: Callable[[bytes], Cipher],
    names: Sequence[str] = (),
    family: int = socket.AF_UNSPEC,
) -> int:
    """Run a session in this terminal. Returns the exit status: 0 if both ends agreed that it is over.

    `names`: what to look up again, for addresses of `family`, when the server is no longer where it was.
    """
    forbid_tracing()
    terminal = RawTerminal(terminfo, options.init)
    channel = Channel(make_cipher(key.raw), TO_SERVER)
    os.register_at_fork(after_in_child=channel.retire)
    del key
    core = _make_client_core(channel, candidates, port, options, terminfo, named=bool(names))
    client = Client(core, terminal, Lookup(names, port, family), asks=terminfo.title)
    try:
        client.run()
    finally:
        client.close()
    status = 0 if core.transport.clean and not core.is_connecting else 1
    if terminal.has_stalled:  # nobody would read the rest, and writing it might never end
        return status
    if core.is_connecting:
        places = " or ".join(f"{candidate}:{port}" for candidate in candidates)
        instead = f', but "{core.network_error.rpartition(": ")[2]}"' if core.network_error else ""
        print(_NO_ANSWER.format(places=places, port=port, instead=instead), file=sys.stderr)
    elif not core.transport.clean:
        print(_UNCLEAN, file=sys.stderr)
    write_all(1, b"[mosh is exiting.]\n")
    return status


_NO_ANSWER = """
mosh did not make a successful connection to {places}.
No answer came on UDP port {port}{instead}.
The usual causes:
  1. A firewall at the server keeps UDP out: open ports 60001-60999 there, or
     choose one that is open with -p PORT.
  2. A firewall here, or the network that you are on, lets no UDP out: try
     another network.
  3. The server is behind a router or jump host that passes only ssh's port
     on: have the UDP port passed on too.
"""
_UNCLEAN = """\

mosh did not shut down cleanly. Please note that the
mosh-server process may still be running on the server."""


def _make_client_core(
    channel: Channel,
    candidates: Sequence[Candidate],
    port: int,
    options: ClientOptions,
    terminfo: Terminfo,
    *,
    named: bool,
) -> ClientCore:
    width, height = window_size(0)
    families = {candidate.family for candidate in candidates} | ({socket.AF_INET6} if named else set())
    return ClientCore(
        channel,
        monotonic_ms(),
        width=width,
        height=height,
        candidates=candidates,
        port=port,
        random_bytes=os.urandom,
        mode=options.mode,
        overwrite=options.overwrite,
        escape_key=EscapeKey(os.environb.get(b"MOSH_ESCAPE_KEY")),
        title_prefix="" if "MOSH_TITLE_NOPREFIX" in os.environ else TITLE_PREFIX,
        display=Display(ech=terminfo.ech, bce=terminfo.bce, title=terminfo.title, hide_cursor=True),
        mtu_bytes=min(MTU_BYTES[_FAMILY_NAMES[family]] for family in families),
        named=named,
    )


# ======================================================================================================================
# == 19. Bootstrap -- ssh command, remote start, MOSH CONNECT line, addresses
# ======================================================================================================================
# One `ssh`, without a tty and with a pipe as stdin, runs one command on the host; ssh still asks for passwords, on the
# terminal. Nothing of the user's ssh configuration is overridden: for the address we ask `ssh -G` what the name means,
# and the server side what it saw.
#
# The host needs nothing but a Python. The command line carries a small program, the stager. (On stdin it would cost a
# round trip: OpenSSH opens a session with a window of zero, so that stdin travels only after the answer to the
# command.) The stager looks for this very program, by its sha256, in a private cache there; if it is missing, it asks
# for it on stdin, checks it, compiles it for its Python and keeps that. What travels is source, 110 KB compressed: that
# is half of the bytecode, and it fits every Python, whichever ones the builder of mosh.pyz had. Compiling takes
# 50 to 80 ms, once. Without a usable Python the same command line starts a stock mosh-server.
#
# Lines that are ours carry a random token, which no banner and no start-up file can know. `MOSH CONNECT` itself has
# none, since stock servers print it: it counts only after a marked line that says that a server has been started.
# Everything else the host prints is for the user.

SERVER_NOT_FOUND = 127
REMOTE_IP_MODES = ("auto", "local", "remote", "proxy")
FAMILIES = ("inet", "inet6", "auto", "all", "prefer-inet", "prefer-inet6")
_FAMILY_NUMBERS = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
_SSH_ADDRESS_WAIT_S = 10
_PROXIED_NAME_WAIT_MS = 1_000  # for our own resolver, which may ask in vain for what only a jump host knows
_LINE_LIMIT_BYTES = 1 << 16  # a longer line is no line of ours
_NOISE_LIMIT_BYTES = 1 << 22  # a host that has printed this much will never come to our command
_WITH_KEY = r"MOSH CONNECT \S+ \S+"  # security: what looks like a key is not shown
_PROXY_CHUNK_BYTES = 4096
SILENCE_LIMIT_MS = 30_000  # an open session says something by then, or never; a loaded small machine needs 5 s
_FAREWELL_S = 0.2  # for ssh, which has usually ended long before the session
_SENDS_LIMIT = 12  # a Python that cannot use the program is followed by the next one, which may want it too
_SESSION_POLL_MS = 500  # how often to look whether the session is open, which sets the clock for that limit, or over
PROGRESS_AFTER_MS = 500  # a shorter transfer is nobody's concern
_PADDING = b"\n" * 16  # for start-up files that read a line; the stager skips what they leave

# Exit statuses of a login that fails, from sysexits.h, so that scripts can tell why.
BAD_CHECKSUM, PARTIAL_PYTHON, OLD_PYTHON, SILENT_HOST, OTHER_COMMAND = 65, 71, 72, 75, 77
RESTRICTED_SHELL = 126
_NEXT_PYTHON = 42  # the stager's own: this interpreter will not do

# The stager runs on any Python 3, even one that is too old, to be able to say so. Comments do not travel.
_STAGER = r"""
import os, sys, zlib
token, digest, count = sys.argv[1:4]
arguments = sys.argv[4 + int(count):]
version = "%d.%d.%d" % sys.version_info[:3]

def say(*words):
    os.write(1, ("\n" + " ".join((token,) + words) + "\n").encode("utf-8", "replace"))

if sys.version_info < (3, 9):
    say("OLD", version, sys.executable)
    sys.exit(42)
from _frozen_importlib_external import MAGIC_NUMBER, PathFinder

""" + _PRIVATE_CACHE + r"""
def sums(body):
    return zlib.crc32(body).to_bytes(4, "little") + len(body).to_bytes(4, "little")

def intact(directory):
    # Whether the entry is there, ours and whole; a crash of the machine may have cut it. Raises OSError.
    data = read(directory, name)
    return data[8:16] == sums(data[16:])

def fail(reason):
    say("FAIL", reason)
    sys.exit(65)

def receive():
    # Returns the program, checked.
    if os.isatty(0):
        import tty
        tty.setraw(0)
    say("NEED", version)
    mark, data, size = token.encode() + b" ", b"", None
    step = 8192
    while size is None or len(data) < size:
        try:
            chunk = os.read(0, 65536)
        except OSError:
            chunk = b""
        if not chunk:
            fail("cut")
        data += chunk
        if size is None:
            head, found, rest = data.partition(mark)
            line, ended, rest = rest.partition(b"\n")
            if found and ended and line.isdigit() and len(line) < 8:
                size, data = int(line), rest
            elif ended or len(data) > 65536:
                fail("checksum")
        if size is not None and len(data) >= step:
            say("GOT", str(len(data)))
            step = len(data) + 8192
    import hashlib
    try:
        data = zlib.decompressobj().decompress(data, 10 ** 7)
    except zlib.error:
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        fail("checksum")
    return data

def build(data):
    # Returns one code object: the table of widths becomes a module, then mosh.py runs. Looking for garbage in what is
    # loaded now, and stays, would take 1 ms.
    size, _, data = data.partition(b"\n")
    parts = {
        "MOSH": compile(data[:int(size)], "mosh.py", "exec", dont_inherit=True),
        "WIDTHS": compile(data[int(size):], "mosh_widths.py", "exec", dont_inherit=True),
    }
    code = compile(
        "import gc, sys\ngc.disable()\n__name__ = 'mosh'\n"
        "widths = type(sys)('mosh_widths')\nexec('WIDTHS', vars(widths))\n"
        "if hasattr(widths, 'STARTS'):\n    sys.modules['mosh_widths'] = widths\n"
        "exec('MOSH')\ngc.enable()\nsys.exit(main())\n",
        "mosh", "exec", dont_inherit=True)
    return code.replace(co_consts=tuple(parts.get(value, value) for value in code.co_consts))

name = "mosh-" + digest[:32] + "-" + MAGIC_NUMBER[:2].hex() + ".pyc"

def at_each_place(work, create):
    # Run the program from the first place where `work` succeeds.
    for folder, inner in places():
        try:
            directory = enter(folder, inner, create)
            try:
                good = work(directory)
            finally:
                os.close(directory)
        except OSError:
            continue
        if good:
            path = folder + "/" + inner + "/" + name
            say("SERVER", path, "(Python " + version + ")")
            os.execv(sys.executable, [sys.executable, "-IS", path, "server"] + arguments)

at_each_place(intact, False)
# Modules in C may be built in, where no path leads to them; these two are not.
if not all(map(PathFinder.find_spec, ("ctypes", "pty"))):
    say("PARTIAL", version, sys.executable)
    sys.exit(42)
code = build(receive())
import marshal
body = marshal.dumps(code)
body = MAGIC_NUMBER + b"\1\0\0\0" + sums(body) + body
# Eight are kept: programs of several versions, for several Pythons.
at_each_place(lambda directory: keep(directory, name, body, 8), True)
# There is no place to keep it: become it.
say("SERVER", "mosh.py", "(Python " + version + ", kept nowhere)")
sys.argv[:] = ["mosh.py", "server"] + arguments
exec(code, {})
"""


# What the host's `sh` is given. One line, without quotes, backslashes and exclamation marks, so that every login shell
# passes it on. Its arguments are the token, the sha256 of the program, the number of words that the stager takes, these
# words, and the server's own.
_STAGER_WORD_CHARS = 500  # some C shells limit a word to 1024
_REPORT_ADDRESS = '[ -n "$SSH_CONNECTION" ] && echo && echo "$1 ADDRESS $SSH_CONNECTION"; '
_PYTHONS = (
    "python3 /usr/bin/python3 /usr/local/bin/python3 /opt/homebrew/bin/python3 /usr/libexec/platform-python "
    + " ".join(f"python3.{minor}" for minor in range(14, 8, -1))
)
_WHERE_IS = '"$(PATH="$PATH:$HOME/.local/bin:/usr/local/bin:/opt/homebrew/bin:/snap/bin"; command -v {})"'
_FIND_STOCK = (
    f"f={_WHERE_IS.format('mosh-server')}; "
    'if [ -n "$f" ]; then echo; echo "$t SERVER $f"; exec "$f" "$@"; fi; '
    f'echo; echo "$t NOSERVER"; exit {SERVER_NOT_FOUND}'
)
_PUSH = (
    _REPORT_ADDRESS + f"for p in {_PYTHONS}; do command -v $p >/dev/null 2>&1 || continue; "
    "$p -X no_debug_ranges "
    '-ISc "import sys,zlib;a=sys.argv;exec(zlib.decompress(bytes.fromhex(str().join(a[4:4+int(a[3])]))))" "$@"; '
    f'r=$?; case $r in 0) exit;; {_NEXT_PYTHON}) ;; {NO_CIPHER}) echo; echo "$1 NOCIPHER $p";; '
    '*) $p -ISc "import zlib" 2>/dev/null && exit $r;; esac; done; '
    "t=$1; shift $(($3+3)); " + _FIND_STOCK
)
_FIND_SERVER = (
    _REPORT_ADDRESS + "t=$1; shift; "
    f'for f in "$HOME/mosh.pyz" "$HOME/.local/bin/mosh.pyz" {_WHERE_IS.format("mosh.pyz")}; do '
    'if [ -f "$f" ] && python3 -c "import sys; sys.exit(sys.version_info < (3, 9))" 2>/dev/null; then '
    'echo; echo "$t SERVER python3 $f"; exec python3 -IS "$f" server "$@"; fi; done; ' + _FIND_STOCK
)


_NOT_FOUND = """no server found on {host}. Looked for mosh.pyz in the home folder, ~/.local/bin and PATH,
with a python3 of at least 3.9 to run it, then for mosh-server. To fix it, do one of these:
  let mosh bring its own:       leave --no-push away
  copy this program there:      scp {program} {host}:mosh.pyz
  install the package mosh there
  say where the server is:      --server='python3 /path/to/mosh.pyz server'"""
_SILENT = (
    "{host} let us in, but has said nothing for {seconds} s. Does a start-up file of the login shell there (.bashrc, "
    ".zshenv ...) wait for input, or is the machine that slow? Try: ssh {host} echo hello"
)
_RESTRICTED = (
    "the login shell of {host} cannot run sh: it is restricted, or a start-up file spoils PATH; --server=COMMAND names "
    "what it can run"
)
_OTHER_COMMAND = (
    "{host} let us in, but did not run what mosh asked for: a start-up file that ends or replaces the login shell "
    "there (exit, exec), a login shell that is none, or a forced command for this key. Try: ssh {host} echo hello"
)
_PORT_HINT = " (-p is the UDP port of mosh; a port for ssh goes into --ssh='ssh -p PORT')"
_REMOTE_COMMAND_HINT = " (its configuration has a RemoteCommand: add --ssh='ssh -o RemoteCommand=none')"
# Why a host that lacks nothing else has no server for us: what it said, exit status, text. The first that applies.
_OBSTACLES = (
    ("FAIL", BAD_CHECKSUM,
     "the program arrived damaged on {host} ({0}), and nothing was started; does a start-up file of the login shell "
     "there read or close what is meant for mosh?"),
    ("NOCIPHER", NO_CIPHER,
     "{host} has no AES-OCB for its Python ({0}; FIPS mode?) and no mosh-server; install the package mosh there, or "
     "python3-cryptography"),
    ("PARTIAL", PARTIAL_PYTHON,
     "the Python {0} of {host} ({1}) lacks its standard library (python3-minimal?), and there is no mosh-server; "
     "install the package python3 there, or mosh"),
    ("OLD", OLD_PYTHON,
     "the Python of {host} is {0} ({1}), mosh.py needs 3.9 or newer, and there is no mosh-server; install either, or "
     "name one with --server"),
    ("NOSERVER", SERVER_NOT_FOUND,
     "{host} has neither a python3 (3.9 or newer) nor a mosh-server; install the package python3 there, or mosh"),
)  # fmt: skip


class LoginOptions:
    """What the wrapper's command line says about getting there."""

    def __init__(self) -> None:
        self.host = ""  # [user@]host
        self.command: list[str] = []  # to run instead of the login shell
        self.ssh = ["ssh"]
        self.ssh_pty = False
        self.server = ""  # shell text; empty to bring our own, or to search
        self.push = True  # bring our own
        self.family = "prefer-inet"
        self.ports = ""  # PORT or LOW:HIGH, empty for the default
        self.bind_server = "ssh"
        self.local = False
        self.remote_ip = "auto"
        self.verbose = 0
        self.silence_limit_ms = SILENCE_LIMIT_MS


class Program:
    """This very program as it is sent to a host: the table of widths and the source of mosh.py."""

    def __init__(self, source: bytes, widths: bytes) -> None:
        import hashlib  # 4 ms

        self._content = b"%d\n" % len(source) + source + widths
        self.digest = hashlib.sha256(self._content).hexdigest()

    def packed(self) -> bytes:
        """Return it compressed."""
        return zlib.compress(self._content, 9)  # 25 ms, while the host waits; level 6 takes 12 and gives 2 % more

    @classmethod
    def own(cls) -> Program | None:
        """Return the program that is running, None if its source is not there. Raises BootstrapError."""
        try:
            if _ARCHIVE is None:
                return cls._from_checkout()
            return cls(*(_LOADER.get_data(f"{_ARCHIVE}/{name}") for name in ("mosh.py", "mosh_widths.py")))
        except (OSError, ImportError, zlib.error) as error:
            raise BootstrapError(f"cannot read my own program, was it replaced just now? Try again ({error})") from None

    @classmethod
    def _from_checkout(cls) -> Program | None:
        if not __file__.endswith(".py"):
            return None
        with open(__file__, "rb") as file:
            return cls(file.read(), cls._widths_here())

    @staticmethod
    def _widths_here() -> bytes:
        """Return a mosh_widths.py with the widths that this end goes by, so that both agree. Takes 0.2 s."""
        package_width = _package_width()
        starts, widths, last = [], bytearray(), None
        for code_point in range(sys.maxunicode + 1):
            width = package_width(chr(code_point))
            if width != last:
                starts.append(code_point)
                widths.append(width + 1)
                last = width
        return f"VERSION = UNICODE = 'of the client'\nSTARTS = {starts}\nWIDTHS = {bytes(widths)!r}\n".encode("ascii")


def shell_quote(word: str) -> str:
    """Return `word` as one word for any shell; even in single quotes fish minds backslashes, csh exclamation marks."""
    return "'" + re.sub(r"(['\\!])", r"'\\\1'", word) + "'"


def server_arguments(options: LoginOptions, colors: int, environ: MutableMapping[str, str]) -> list[str]:
    """Return the words behind the name of the server, the same for ours and for stock's."""
    words = ["new", "-c", str(max(colors, 0))]
    if options.bind_server.lower() == "ssh":
        words += ["-i", options.host] if options.local else ["-s"]
    elif options.bind_server.lower() != "any":
        words += ["-i", options.bind_server]
    if options.ports:
        words += ["-p", options.ports]
    for name in LOCALE_VARIABLES:
        if environ.get(name):
            words += ["-l", f"{name}={environ[name]}"]
    return words + (["--", *options.command] if options.command else [])


def stager_words() -> list[str]:
    """Return the stager as words that no shell minds: compressed, in hexadecimal."""
    text = re.sub(r"(?m)^\s*#.*\n|^\n", "", _STAGER)
    digits = zlib.compress(text.encode("ascii"), 9).hex()
    return [digits[at : at + _STAGER_WORD_CHARS] for at in range(0, len(digits), _STAGER_WORD_CHARS)]


def remote_command(options: LoginOptions, arguments: Sequence[str], token: str, program: Program | None) -> str:
    """Return the command line for the host's login shell, whichever that is; `program` is what to push, if anything."""
    quoted = " ".join(map(shell_quote, arguments))
    if options.server:
        script = f'{_REPORT_ADDRESS}echo; echo "$1 SERVER as told"'
        return f"sh -c {shell_quote(script)} mosh {token} ; {options.server} {quoted}"
    if program is None:
        return f"sh -c {shell_quote(_FIND_SERVER)} mosh {token} {quoted}"
    words = stager_words()
    head = f"mosh {token} {program.digest} {len(words)} {' '.join(words)}"
    return f"sh -c {shell_quote(_PUSH)} {head} {quoted}"


_ANNOUNCEMENTS = {  # what follows the token: a word that says what the line is, and then
    "ADDRESS": r"(.*)",  # what it has as SSH_CONNECTION: client's address and port, server's address and port
    "OLD": r"(\S+) (.*)",  # version and path of a Python that is too old
    "PARTIAL": r"(\S+) (.*)",  # version and path of one without its standard library
    "NOCIPHER": r"(.+)",  # name of one that our server found no AES-OCB with
    "NEED": r"(\S+)",  # version of the Python that waits for the program
    "GOT": r"([0-9]{1,9})",  # bytes of it that have arrived
    "FAIL": r"(cut|checksum)",  # what was wrong with them
    "SERVER": r"(.+)",  # a server is being started, and which
    "NOSERVER": "",
}
_CONNECT = r"MOSH CONNECT ([0-9]{1,5}) ([A-Za-z0-9/+]{22})"


class Announcement:
    """What the lines of a starting server say. All but `MOSH CONNECT` have to carry the token."""

    def __init__(self, token: str) -> None:
        self._token = token
        self.port = 0
        self.key = ""
        self.proxy_address = ""  # what our ProxyCommand connected to
        self.said: dict[str, re.Match[str]] = {}  # the last line of each kind

    @property
    def address(self) -> str:
        """Where the login got to, empty if unknown: what the host saw counts unless our own proxy knows better."""
        words = self.said["ADDRESS"][1].split() if "ADDRESS" in self.said else []
        # An sshd on a pipe says UNKNOWN, which is no name to look up.
        known = len(words) == 4 and numeric_addresses(words[2], 0, socket.AF_UNSPEC)
        return self.proxy_address or (words[2] if known else "")

    @property
    def complete(self) -> bool:
        """Whether port and key are known."""
        return bool(self.key)

    def take(self, line: str) -> bool:
        """Take note of one line. Returns whether it was ours. Raises BootstrapError if it is malformed."""
        _, marked, text = line.rstrip().partition(self._token + " ")
        if marked:
            kind, _, rest = text.partition(" ")
            if kind not in _ANNOUNCEMENTS:
                return False  # it quotes our command
            match = re.fullmatch(_ANNOUNCEMENTS[kind], rest)
            if match is None:
                raise BootstrapError(f"the {kind[:20]!a} line of the host is malformed")
            self.said[kind] = match
            return True
        if "SERVER" not in self.said or not re.match(r"MOSH\s+CONNECT\s+\S", line):
            return False
        match = re.fullmatch(_CONNECT, line.rstrip())
        if not match or not 0 < int(match[1]) < 65536:
            raise BootstrapError("the MOSH CONNECT line of the host is malformed")
        self.port, self.key = int(match[1]), match[2]
        return True

    def take_from_proxy(self, line: str) -> bool:
        """Take note of a line on ssh's stderr, where only our own ProxyCommand knows the token."""
        _, marked, address = line.rstrip().partition(self._token + " IP ")
        if marked and self.proxy_address:
            raise BootstrapError("detected attempt to redefine MOSH IP")
        self.proxy_address = address or self.proxy_address
        return bool(marked)


def resolve(host: str, port: int, family: str) -> list[Candidate]:
    """Return the addresses of `host`, the preferred family first. Raises BootstrapError, with the system's reason."""
    wanted = _FAMILY_NUMBERS.get(family, socket.AF_UNSPEC)
    try:
        found = socket.getaddrinfo(host, port, wanted, socket.SOCK_DGRAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a valid name"
        raise BootstrapError(f"could not resolve {host}: {reason}") from None
    unique = dict.fromkeys(Candidate(entry[0], entry[4]) for entry in found if entry[0] in _FAMILY_NAMES)
    if family == "auto" and len({candidate.family for candidate in unique}) > 1:
        raise BootstrapError(f"{host} has both IPv4 and IPv6 addresses, use --family to specify behavior")
    return preferred_first(unique, family)


def preferred_first(candidates: Iterable[Candidate], family: str) -> list[Candidate]:
    """Return the candidates as they are, but for the family that is preferred, if one is."""
    first = _FAMILY_NUMBERS.get(family.replace("prefer-", ""), 0)
    return sorted(candidates, key=lambda candidate: candidate.family != first)


def is_here(candidate: Candidate) -> bool:
    """Return whether an address is one of this machine's."""
    try:
        with socket.socket(candidate.family, socket.SOCK_DGRAM) as probe:
            probe.bind((candidate.sockaddr[0], 0, *candidate.sockaddr[2:]))
    except OSError:
        return False
    return True


class Login:
    """Starts a server, over ssh or on this machine, and finds out where it can be reached."""

    def __init__(self, options: LoginOptions, colors: int) -> None:
        self._options = options
        self._arguments = server_arguments(options, colors, os.environ)
        self._token = "mosh-" + os.urandom(16).hex()
        self._program: Program | None = None
        self.announcement = Announcement(self._token)
        self.names: list[str] = []  # what may be looked up again if the server moves
        self._has_proxy = False  # so ssh itself may never have looked the name up
        # the processes, and our end of ssh's stdin
        self._process: subprocess.Popen[bytes] | None = None
        self._config_query: subprocess.Popen[bytes] | None = None
        self._stdin_reader = self._stdin = -1
        self._to_send = memoryview(b"")
        # what happened so far, in ms of the clock
        self._heard_at: int | None = None  # when the host was last heard; None while ssh is still logging in
        self._asked_at: int | None = None  # when the program was asked for
        self._packed_bytes = 0
        self._sent_count = 0
        self._answered: re.Match[str] | None = None  # the request for the program that was last answered
        self._progress_shown = False
        self._noise_bytes = 0
        self._noise_shown = False

    def start(self) -> None:
        """Start ssh, which needs a while. Call `finish` next. Raises BootstrapError."""
        import subprocess  # 7 ms

        options = self._options
        environ = {name: value for name, value in os.environ.items() if name != "MOSH_PREDICTION_DISPLAY"}
        directory = None
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        stdin = null
        if options.local:
            if not any(map(is_here, resolve(options.host, 0, options.family))):
                raise BootstrapError(f"{options.host} is no address of this machine, where --local starts the server")
            command = self._local_command()
            environ.pop("SSH_CONNECTION", None)
            home = environ.get("HOME", "")
            directory = home if os.path.isdir(home) and os.access(home, os.X_OK) else "/"
            self.announcement.proxy_address = options.host
            self.announcement.take(f"{self._token} SERVER on this machine")
        else:
            if options.push and not options.server:
                self._program = Program.own()
            command = self._ssh_command()
            environ["MOSH_TOKEN"] = self._token  # for our ProxyCommand
            stdin = self._open_stdin()
        # security: ssh's stderr is read apart, since what a jump host or a banner says there must not start a session
        try:
            self._process = subprocess.Popen(
                command, stdin=stdin, stdout=pipe, stderr=pipe, env=environ, cwd=directory
            )
            if not options.local and options.remote_ip == "auto":
                query = [*options.ssh, "-G", options.host]
                self._config_query = subprocess.Popen(query, stdin=null, stdout=pipe, stderr=null)
        except OSError as error:
            raise BootstrapError(f"cannot run {command[0]}: {error.strerror}", SERVER_NOT_FOUND) from None

    def finish(self) -> tuple[str, int, list[Candidate]]:
        """Return (printable key, port, candidates). Raises BootstrapError."""
        self._read_announcement()
        self._close_stdin()
        return self.announcement.key, self.announcement.port, self._candidates()

    def _local_command(self) -> list[str]:
        if self._options.server:
            return ["/bin/sh", "-c", f"{self._options.server} {' '.join(map(shell_quote, self._arguments))}"]
        return [*own_program(), "server", *self._arguments]

    def _ssh_command(self) -> list[str]:
        options = self._options
        host = options.host
        # -T, since a configuration may ask for a terminal; no escapes, since what is sent may have them in it by chance
        extra = ["-tt", "-e", "none"] if options.ssh_pty else ["-T"]
        if options.family in _FAMILY_NUMBERS:
            extra.append("-4" if options.family == "inet" else "-6")
        if options.remote_ip == "proxy":
            proxy = " ".join(map(shell_quote, [*own_program(), f"--family={options.family}", "--fake-proxy", "--"]))
            extra += ["-S", "none", "-o", f"ProxyCommand={proxy.replace('%', '%%')} %h %p"]
        elif options.remote_ip == "local":
            user, at, name = host.rpartition("@")
            address = resolve(name, 22, options.family)[0]
            self.announcement.proxy_address = str(address)
            host = user + at + str(address)
        command = remote_command(options, self._arguments, self._token, self._program)
        return [*options.ssh, *extra, host, "--", command]

    # -- what the far side gets on stdin

    def _open_stdin(self) -> int:
        """Return the pipe for ssh to read. Its end stays open here, too: how full it is tells what ssh is doing."""
        self._stdin_reader, self._stdin = os.pipe()
        os.set_blocking(self._stdin, False)
        self._to_send = memoryview(_PADDING)
        self._write_stdin()
        if self._program is None:
            os.close(self._stdin)
            self._stdin = -1
        return self._stdin_reader

    def _write_stdin(self) -> None:
        try:
            self._to_send = self._to_send[os.write(self._stdin, self._to_send) :]
        except BlockingIOError:
            pass

    def _session_is_open(self) -> bool:
        """Whether ssh has logged in: it reads its stdin only once the session is there."""
        if self._stdin_reader < 0:
            return False
        (waiting,) = struct.unpack("i", fcntl.ioctl(self._stdin_reader, termios.FIONREAD, bytes(4)))
        return bool(waiting < len(_PADDING))

    def _send_program(self, now: int) -> None:
        assert self._program is not None
        packed = self._program.packed()
        self._packed_bytes = len(packed)
        self._sent_count += 1
        self._asked_at = now
        self.announcement.said.pop("GOT", None)
        self._to_send = memoryview(f"{self._token} {len(packed)}\n".encode("ascii") + packed)

    def _show_progress(self) -> None:
        got = self.announcement.said.get("GOT")
        percent = min(100, 100 * int(got[1]) // self._packed_bytes) if got else 0
        text = f"mosh: sending {self._packed_bytes // 1024} KB to {self._options.host}, once: {percent} %"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        self._progress_shown = True

    def _end_progress(self) -> None:
        if self._progress_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._progress_shown = False

    def _close_stdin(self) -> None:
        for descriptor in (self._stdin, self._stdin_reader):
            if descriptor >= 0:
                os.close(descriptor)
        self._stdin = self._stdin_reader = -1

    # -- what the far side says

    def _read_announcement(self) -> None:
        """Read what ssh and the host say until the server has announced itself or both have finished."""
        process = self._process
        assert process is not None and process.stdout is not None and process.stderr is not None
        protected = process.stdout.fileno()
        pending = {protected: b"", process.stderr.fileno(): b""}  # the descriptors still open
        while pending and not self.announcement.complete:
            writable = [self._stdin] if self._to_send else []
            over = protected not in pending
            ready = wait(pending, writable, self._next_look(over))
            now = monotonic_ms()
            if over and not ready and process.poll() is not None:
                break  # something that outlives ssh, its ProxyCommand perhaps, holds stderr open
            if self._stdin in ready:
                self._write_stdin()
            for descriptor in sorted(ready & pending.keys(), key=lambda each: each != protected):
                chunk = os.read(descriptor, 4096)
                *lines, rest = (pending[descriptor] + chunk).split(b"\n")
                pending[descriptor] = rest
                if not chunk or len(rest) > _LINE_LIMIT_BYTES:
                    lines.append(rest)
                    pending[descriptor] = b""
                for line in lines:
                    self._take_line(line, trusted=descriptor == protected)
                if not chunk:
                    del pending[descriptor]
                if descriptor == protected:
                    self._heard_at = now
            self._check_progress(now)
        if self._options.remote_ip == "proxy" and wait(pending.keys() - {protected}, (), 0):
            for line in os.read(process.stderr.fileno(), 4096).split(b"\n"):
                self._take_line(line, trusted=False)
        if not self.announcement.complete:
            self._explain(process.wait())
        if self._options.verbose:
            sent = f", {self._packed_bytes} bytes sent" if self._packed_bytes else ""
            print(f"mosh: started {self._options.server or self.announcement.said['SERVER'][1]}{sent}", file=sys.stderr)

    def _next_look(self, over: bool) -> int | None:
        """Return when to stop waiting for the host, which has nothing more to say if `over`, and look at the rest."""
        if self._options.local and not over:
            return None
        now = monotonic_ms()
        if over or self._heard_at is None:
            return now + _SESSION_POLL_MS
        deadline = self._heard_at + self._options.silence_limit_ms
        return deadline if self._asked_at is None else min(deadline, now + PROGRESS_AFTER_MS // 2)

    def _check_progress(self, now: int) -> None:
        """Send the program if it is wanted, say so if that takes long, give up on a host that says nothing."""
        if self._options.local:
            return
        needed = self.announcement.said.get("NEED")
        if needed is not self._answered and self._program is not None and self._sent_count < _SENDS_LIMIT:
            self._answered = needed
            self._send_program(now)
        if "SERVER" in self.announcement.said:
            self._end_progress()
        elif self._asked_at is not None and now - self._asked_at > PROGRESS_AFTER_MS and sys.stderr.isatty():
            self._show_progress()
        if self._heard_at is None and self._session_is_open():
            self._heard_at = now
        if self._heard_at is not None and now - self._heard_at >= self._options.silence_limit_ms:
            seconds = self._options.silence_limit_ms // 1000
            raise BootstrapError(_SILENT.format(host=self._options.host, seconds=seconds), SILENT_HOST)

    def _take_line(self, line: bytes, trusted: bool) -> None:
        """Take note of a line, or show it. `trusted`: it came from the host itself, by the channel ssh protects."""
        text = line.decode("utf-8", "replace")
        if self.announcement.complete and trusted:
            return
        take = self.announcement.take if trusted else self.announcement.take_from_proxy
        if take(text) or self.announcement.complete:
            return
        self._noise_bytes += len(line) + 1
        if self._noise_bytes > _NOISE_LIMIT_BYTES:
            raise BootstrapError(f"{self._options.host} prints without end instead of starting a server", OTHER_COMMAND)
        text = printable(re.sub(_WITH_KEY, "MOSH CONNECT ...", text)).rstrip()  # security: the host has no session yet
        if text:
            self._end_progress()
            print(text, file=sys.stderr)
            self._noise_shown = True

    def _explain(self, status: int) -> None:
        """Say why there is no session. Always raises BootstrapError."""
        host, said = self._options.host, self.announcement.said
        if self._options.local:
            status = status if status >= 0 else 128 - status  # of a signal, as a shell has it
            raise BootstrapError(f"the server on this machine did not start (exit status {status})", status or 1)
        if "NOSERVER" in said and self._program is None:
            program = os.path.basename(own_program()[-1])
            raise BootstrapError(_NOT_FOUND.format(host=host, program=program), SERVER_NOT_FOUND)
        if "NOSERVER" in said or "FAIL" in said:
            for kind, code, text in _OBSTACLES:
                if kind in said:
                    words = said[kind].groups()
                    raise BootstrapError(text.format(*words, host=host), code)
        if status < 0:
            raise BootstrapError(f"signal {-status} ended ssh, which was logging in to {host}", 128 - status)
        if status == 255 and not said:  # what ssh ends with when it was ssh that failed
            hint = _PORT_HINT if self._options.ports else ""
            if self._ssh_settings().get("remotecommand", "none") != "none":
                hint = _REMOTE_COMMAND_HINT
            reason = "; its own words are above" if self._noise_shown else f" and does not say why; try: ssh -v {host}"
            raise BootstrapError(f"ssh could not log in to {host}{reason}{hint}", status)
        if status in (126, 127) and self._options.server and "SERVER" in said:
            raise BootstrapError(f"{host} cannot run {self._options.server!r}: see --server", SERVER_NOT_FOUND)
        if not said and status in (126, 127):
            raise BootstrapError(_RESTRICTED.format(host=host), RESTRICTED_SHELL)
        if not said:
            raise BootstrapError(_OTHER_COMMAND.format(host=host), OTHER_COMMAND)
        if status:
            reason = "; what was said of it is above" if self._noise_shown else ""
            raise BootstrapError(f"the server on {host} did not start (exit status {status}){reason}", status)
        raise BootstrapError(f"the login to {host} worked, but no server announced itself there")

    # -- where to send

    def _candidates(self) -> list[Candidate]:
        """Return every address the server may have, the likeliest first."""
        names = [self.announcement.address] if self.announcement.address else []
        if self._config_query is not None:
            names.append(self._looked_up_name())
        self.names = [name for name in names if name]
        candidates: dict[Candidate, None] = {}
        reasons: list[str] = []
        for name in self.names:
            try:
                beside = candidates and self._has_proxy and name != self.announcement.address
                candidates.update(dict.fromkeys(self._resolve_beside(name) if beside else self._resolve(name)))
            except BootstrapError as error:
                reasons.append(str(error))
        if not candidates:
            raise BootstrapError("; ".join(reasons) or f"no address found for {self._options.host}")
        return list(candidates)

    def _resolve(self, name: str) -> list[Candidate]:
        return resolve(name, self.announcement.port, self._options.family)

    def _resolve_beside(self, name: str) -> list[Candidate]:
        """Return the same if it can be had soon; otherwise what the server said of its address has to do."""
        lookup = Lookup([name], self.announcement.port, _FAMILY_NUMBERS.get(self._options.family, socket.AF_UNSPEC))
        deadline = monotonic_ms() + _PROXIED_NAME_WAIT_MS
        found: list[Candidate] = []
        lookup.start(monotonic_ms())
        try:
            while lookup.readable() and monotonic_ms() < deadline:
                found = lookup.answer(wait(lookup.readable(), (), deadline), monotonic_ms())
        finally:
            lookup.close()
        return preferred_first(found, self._options.family)

    def _ssh_settings(self) -> dict[str, str]:
        """Return what ssh's configuration says of the host, empty if that is not known. Can be asked once."""
        import subprocess

        if self._config_query is None:
            return {}
        try:
            output, _ = self._config_query.communicate(timeout=_SSH_ADDRESS_WAIT_S)
        except subprocess.TimeoutExpired:
            self._config_query.kill()
            return {}
        lines = (line.partition(" ") for line in output.decode("utf-8", "replace").splitlines())
        return {word.lower(): value.strip() for word, _, value in lines}

    def _looked_up_name(self) -> str:
        """Return the host name that ssh's configuration gives, and note whether it leads there by a proxy."""
        settings = self._ssh_settings()
        self._has_proxy = any(settings.get(word, "none") != "none" for word in ("proxyjump", "proxycommand"))
        return settings.get("hostname") or self._options.host.rpartition("@")[2]

    def close(self) -> None:
        """Let go of the processes. After a login ssh may go on for as long as other sessions share its connection."""
        self._end_progress()
        self._close_stdin()
        import subprocess

        for process in (self._process, self._config_query):
            if process is not None:
                if process is self._process and self.announcement.complete:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_FAREWELL_S)
                elif process.poll() is None:
                    process.terminate()
                    process.wait()
                for pipe in (process.stdout, process.stderr):
                    if pipe is not None:
                        pipe.close()


def fake_proxy(host: str, port: int, family: str) -> int:
    """Be ssh's ProxyCommand: connect, say where to on stderr, and relay until both sides have finished."""
    reason = ""
    for candidate in resolve(host, port, family):
        try:
            connection = socket.socket(candidate.family, socket.SOCK_STREAM)
            connection.connect(candidate.sockaddr)
            break
        except OSError as error:
            reason = f", last tried {candidate}: {error.strerror}"
    else:
        raise BootstrapError(f"Could not connect to {host}{reason}")
    token = os.environ.get("MOSH_TOKEN", "MOSH")
    print(f"{token} IP {candidate}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sources = {0, connection.fileno()}
    while connection.fileno() in sources:
        for source in wait(sources, (), None):
            try:
                data = os.read(source, _PROXY_CHUNK_BYTES)
            except OSError:
                data = b""
            if not data:
                sources.discard(source)
            if source != 0:
                write_all(1, data)
                continue
            with contextlib.suppress(OSError):  # the far end has gone; reading from it will say so
                connection.sendall(data) if data else connection.shutdown(socket.SHUT_WR)
    return 0


# ======================================================================================================================
# == 20. Command line -- options, messages, exit codes, main
# ======================================================================================================================
# Three programs in one file: the wrapper, the server and the client. The last two take the arguments of their stock
# namesakes, so that stock's wrapper can start them, also under a link of their name. Exit codes: that of the session;
# 2 for a wrong command line (1 in server and client); those of section 19, ssh's own or 1 for what else goes wrong.

USAGE_ERROR = 2
_USAGE_HINT = "Try 'mosh.pyz --help'."
_VERSION_TEXT = f"mosh.py {__version__} (speaks the protocol of mosh 1.4.0)"
_USAGES = {
    "mosh-server": "usage: mosh-server new [-s] [-v] [-i ADDRESS] [-p PORT[:PORT2]] [-c COLORS] [-l NAME=VALUE]\n"
    "       [-- COMMAND...]",
    "mosh-client": "usage: mosh-client IP PORT    (the key is in the environment as MOSH_KEY)\n       mosh-client -c",
}


def words_of_ours(words: Sequence[str]) -> list[str]:
    """Return the words before the first `--`, behind which there is a command."""
    return list(takewhile("--".__ne__, words))


def parse_port(text: str, complaint: str = "Bad UDP port") -> int:
    """Parse one UDP or TCP port. Raises UsageError."""
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise UsageError(f"{complaint} ({text})")
    return int(text)


def parse_ports(text: str) -> tuple[int, int]:
    """Parse PORT or LOW:HIGH. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise UsageError(f"Server-side port or range ({text}) is not valid.")
    low = int(match[1])
    high = low if match[2] is None else int(match[2])
    if low > 65535:
        raise UsageError(f"Server-side (low) port ({low}) must be within valid range [0..65535].")
    if match[2] is not None and not 0 < high <= 65535:
        raise UsageError(f"Server-side high port ({high}) must be within valid range [1..65535].")
    if match[2] is not None and low == 0:
        raise UsageError(f"Server-side port ranges may not be used with starting port 0 ({text}).")
    if low > high:
        raise UsageError(f"Server-side port range ({text}): low port greater than high port.")
    return low, high


def _prediction_mode(word: str, origin: str = "") -> PredictionMode:
    try:
        return PredictionMode(word.lower())
    except ValueError:
        words = ", ".join(mode.value for mode in PredictionMode)
        raise UsageError(f'Unknown mode "{word}"{origin}. One of: {words}') from None


def _asks_for_version(words: Sequence[str]) -> bool:
    """Print the version if one of the words before `--` asks for it, with -v all of it. Returns whether one did."""
    own = words_of_ours(words)
    if "--version" in own:
        print(_version_text("-v" in own or "--verbose" in own))
    return "--version" in own


def _version_text(verbose: bool) -> str:
    """Return one line, or all that a report of a fault should say."""
    if not verbose:
        return _VERSION_TEXT
    program = Program.own()
    try:
        chosen = choose_cipher()(bytes(KEY_BYTES))
        cipher = chosen.name + (f", unpacked to {chosen.place}" if isinstance(chosen, BundledCipher) else "")
    except BootstrapError as error:
        cipher = f"none: {error}"
    return (
        f"{_VERSION_TEXT}\n"
        f"build:  {program.digest if program else 'unknown'}\n"
        f"Python: {sys.version.split()[0]}, {own_python()}\n"
        f"crypto: {cipher}\n"
        f"widths: {_width_table_name()}"
    )


def _width_table_name() -> str:
    try:
        import mosh_widths

        return f"wcwidth {mosh_widths.VERSION}, Unicode {mosh_widths.UNICODE}, built in"
    except ImportError:
        pass
    try:
        import wcwidth

        return f"wcwidth {wcwidth.__version__}, Unicode {wcwidth.list_versions()[-1]}"
    except ImportError:
        import unicodedata

        return f"Python's own, Unicode {unicodedata.unidata_version}"


# -- the wrapper


def _wrapper_parser() -> argparse.ArgumentParser:
    import argparse  # 5 ms

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            hint = "; ssh's options go into --ssh, a command's after --"
            hint = "" if "--" in message or "unrecognized" not in message else hint
            raise UsageError(message + hint)

    parser = Parser(
        prog="mosh.pyz",
        usage="%(prog)s [options] [user@]host [-- command...]\n       %(prog)s server [new] [options]\n"
        "       %(prog)s client IP PORT",
        description="A remote shell that survives sleep, roaming and bad networks.",
        epilog="In a session, Ctrl-^ (on many keyboards Ctrl-Shift-6) and then a full stop quits; "
        "Ctrl-^ Ctrl-Z suspends.",
        allow_abbrev=True,
    )
    add = parser.add_argument
    add("host", nargs="?", default="", help="where to log in; anything ssh understands")
    add("command", nargs="*", help="what to run there instead of the login shell")
    add("--host", dest="host_option", metavar="HOST", default="", help="a host that is called server or client")
    add("--predict", metavar="WHEN", help="local echo: adaptive (default), always, never or experimental")
    add("-a", dest="predict", action="store_const", const="always", help="the same as --predict=always")
    add("-n", dest="predict", action="store_const", const="never", help="the same as --predict=never")
    add("-o", "--predict-overwrite", dest="overwrite", action="store_true", default=None,
        help="predict that typing overwrites instead of inserting")  # fmt: skip
    add("--no-predict-overwrite", dest="overwrite", action="store_false", help=argparse.SUPPRESS)
    add("--family", metavar="F", default="prefer-inet", help=" ".join(FAMILIES))
    add("-4", dest="family", action="store_const", const="inet", help="use IPv4 only")
    add("-6", dest="family", action="store_const", const="inet6", help="use IPv6 only")
    add("-p", "--port", metavar="PORT[:PORT2]", default="", help="the server's UDP port or range of ports")
    add("--bind-server", metavar="WHERE", default="ssh", help="ssh (the address ssh reached, default), any, or an IP")
    add("--ssh", metavar="COMMAND", default="ssh", help="how to run ssh, for example --ssh='ssh -p 2222'")
    add("--ssh-pty", dest="ssh_pty", action="store_true", default=False, help="give the login a terminal (ssh -tt)")
    add("--no-ssh-pty", dest="ssh_pty", action="store_false", help=argparse.SUPPRESS)
    add("--init", dest="init", action="store_true", default=True, help=argparse.SUPPRESS)
    add("--no-init", dest="init", action="store_false", help="no alternate screen: what was shown stays")
    add("--local", action="store_true", help="run the server on this machine, without ssh; host is its address")
    add("--server", metavar="COMMAND", default="", help="the server to start there, a piece of shell text")
    add("--push", dest="push", action="store_true", default=True, help=argparse.SUPPRESS)
    add("--no-push", dest="push", action="store_false", help="do not bring the server along: look for one there")
    add("--client", metavar="PATH", default="", help="the client to run here instead of the built-in one")
    add("--experimental-remote-ip", dest="remote_ip", metavar="HOW", default="auto", help=" ".join(REMOTE_IP_MODES))
    add("--fake-proxy", dest="fake_proxy", action="store_true", help=argparse.SUPPRESS)
    add("-v", "--verbose", action="count", default=0, help="say which server was started, and what was sent")
    add("-V", "--version", action="store_true", help="print the version; with -v also the build, crypto and widths")
    return parser


def _normalize(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Bring stock's spellings to ours: in any case, long names with a single dash, `no` without one behind it."""
    known = {option for action in parser._actions for option in action.option_strings}

    def is_long(name: str) -> bool:
        return any(option.startswith("--" + name) for option in known)

    out = []
    for word in words:
        dashes, name, value = re.fullmatch(r"(-*)([^=]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        if value == "=--":  # argparse would take the dashes away and leave no value
            raise UsageError(f"{dashes}{name} needs a value")
        lower = name.lower()
        if lower.startswith("no") and not is_long(lower) and is_long("no-" + lower[2:]):
            lower = "no-" + lower[2:]
        if dashes == "-" and len(name) > 1 and is_long(lower):
            dashes = "--"
        if dashes == "--" or (dashes == "-" and "-" + name not in known and "-" + lower in known):
            name = lower
        out.append(dashes + name + value)
    return out


def _parse_wrapper(words: Sequence[str]) -> argparse.Namespace:
    """Parse the wrapper's command line; options count up to the first `--`. Raises UsageError."""
    own = words_of_ours(words)
    command = list(words[len(own) + 1 :])
    parser = _wrapper_parser()
    arguments = parser.parse_intermixed_args(_normalize(parser, own))
    if arguments.host_option:
        arguments.command = ([arguments.host] if arguments.host else []) + arguments.command
        arguments.host = arguments.host_option
    if arguments.fake_proxy:
        arguments.proxy_target = command
        return arguments
    arguments.command += command
    if arguments.version:
        return arguments
    if not arguments.host and command:
        arguments.host, *arguments.command = command
    return arguments


def _check_host(text: str) -> None:
    """Raise UsageError unless `text` can be [user@]host."""
    if not text:
        raise UsageError("no host given")
    if text.startswith("-"):
        raise UsageError(f"a host cannot begin with a dash ({text})")
    user, at, name = text.rpartition("@")
    if not name or (at and not user):
        raise UsageError(f"user and host are written user@host, not {text}")


def _login_options(arguments: argparse.Namespace) -> LoginOptions:
    """Check the wrapper's arguments. Raises UsageError."""
    import shlex  # 4 ms

    options = LoginOptions()
    for name in ("host", "command", "ssh_pty", "server", "bind_server", "local", "verbose", "push"):
        setattr(options, name, getattr(arguments, name))
    if arguments.port:
        parse_ports(arguments.port)
    options.ports = arguments.port
    options.family, options.remote_ip = arguments.family.lower(), arguments.remote_ip.lower()
    for value, allowed, name in (
        (options.family, FAMILIES, "--family"),
        (options.remote_ip, REMOTE_IP_MODES, "--experimental-remote-ip"),
    ):
        if value not in allowed:
            raise UsageError(f"Unknown parameter {value} for {name}. One of: {', '.join(allowed)}")
    where = options.bind_server
    address = where.partition("%")[0]  # a scope behind it is the server's, and need not exist here
    if where.lower() not in ("ssh", "any") and not numeric_addresses(address, 0, socket.AF_UNSPEC):
        raise UsageError(f"--bind-server can be ssh, any or a numeric address, not {where}")
    try:
        options.ssh = shlex.split(arguments.ssh) or ["ssh"]
    except ValueError as error:
        raise UsageError(f"--ssh: {error}") from None
    _check_host(options.host)  # last: without a host, one may have been taken for the value of an option
    return options


def _client_options(predict: str | None, overwrite: bool | None, init: bool) -> ClientOptions:
    """Combine what the command line and the environment say about the client. Raises UsageError."""
    options = ClientOptions()
    environment = os.environ.get("MOSH_PREDICTION_DISPLAY")
    if predict is not None:
        options.mode = _prediction_mode(predict)
    elif environment is not None:
        options.mode = _prediction_mode(environment, " (MOSH_PREDICTION_DISPLAY in environment)")
    options.overwrite = os.environ.get("MOSH_PREDICTION_OVERWRITE") == "yes" if overwrite is None else overwrite
    options.init = init and "MOSH_NO_TERM_INIT" not in os.environ
    return options


def wrapper_main(words: Sequence[str]) -> int:
    """Log in and run the client."""
    if _asks_for_version(words):  # before argparse, which takes 5 ms
        return 0
    arguments = _parse_wrapper(words)
    if arguments.version:
        print(_version_text(arguments.verbose > 0))
        return 0
    if arguments.fake_proxy:
        if len(arguments.proxy_target) != 2:
            raise UsageError("--fake-proxy needs a host and a port")
        host, port_text = arguments.proxy_target
        return fake_proxy(host, parse_port(port_text, "--fake-proxy: bad port"), arguments.family)
    client_options = _client_options(arguments.predict, arguments.overwrite, arguments.init)
    login_options = _login_options(arguments)
    terminal_modes()  # it is better to learn now than after the login that this is no terminal
    terminfo = Terminfo(os.environ.get("TERM", ""))
    _be_ready_for_signals()
    login = Login(login_options, terminfo.colors)
    try:
        login.start()
        make_cipher = choose_cipher()  # 7 to 90 ms, in which ssh is on its way
        disable_core_dumps()
        key_text, port, candidates = login.finish()
        if arguments.client:
            _exec_client(arguments.client, key_text, candidates[0], port, client_options)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ssh ends by itself and need not be waited for
        return run_client(
            Key.from_text(key_text), candidates, port, client_options, terminfo, make_cipher,
            names=login.names, family=_FAMILY_NUMBERS.get(login_options.family, socket.AF_UNSPEC),
        )  # fmt: skip
    finally:
        login.close()


def _be_ready_for_signals() -> None:
    """Let SIGTERM and SIGHUP end a login as Ctrl-C does, without leaving an ssh behind that asks for a password."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it would hide how ssh ends


def _exec_client(program: str, key_text: str, candidate: Candidate, port: int, options: ClientOptions) -> None:
    """Become another client, stock's for example."""
    os.environ["MOSH_KEY"] = key_text
    os.environ["MOSH_PREDICTION_DISPLAY"] = options.mode.value
    if options.overwrite:
        os.environ["MOSH_PREDICTION_OVERWRITE"] = "yes"
    if not options.init:
        os.environ["MOSH_NO_TERM_INIT"] = "1"
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program, [program, str(candidate), str(port)])
    except OSError as error:
        raise BootstrapError(f"cannot run {program}: {error.strerror}", SERVER_NOT_FOUND) from None


# -- the server


def _complain(text: str, program: str) -> None:
    print(f"{program}: {text}\n{_USAGES[program]}", file=sys.stderr)


def _short_options(words: Sequence[str], with_value: str, flags: str) -> Iterator[tuple[str, str | None]]:
    """Yield (letter, value) for options as getopt knows them, ("", word) for the rest, (letter, None) for unknown."""
    queue = deque(words)
    while queue:
        word = queue.popleft()
        if word == "--":
            yield from (("", operand) for operand in queue)
            return
        if not word.startswith("-") or word == "-":
            yield "", word
            continue
        for i, letter in enumerate(word[1:], 2):
            if letter in with_value:
                yield letter, word[i:] or (queue.popleft() if queue else "")
                break
            yield letter, "" if letter in flags else None


def _parse_server(words: Sequence[str]) -> ServerOptions:
    """Parse the server's command line as stock does, which goes on after an unknown option. Raises UsageError."""
    options = ServerOptions()
    own = words_of_ours(words)
    options.command = list(words[len(own) + 1 :])
    if own and own[0] != "new" and not own[0].startswith("-"):  # the old form: ADDRESS [PORT]
        options.bind_address = own.pop(0)
        if own:
            own = ["-p", own[0], *own[1:]]
    elif own and own[0] == "new":
        own.pop(0)
    for letter, value in _short_options(own, "@ipcl", "sv"):
        if value is None:
            _complain(f"unknown option -{letter}", "mosh-server")
        elif letter == "i":
            options.bind_address, options.by_ssh = value, False
        elif letter == "s":
            options.bind_address, options.by_ssh = _address_from_ssh(), True
        elif letter == "p":
            try:
                options.ports = parse_ports(value)
            except UsageError as error:
                raise UsageError(f"{error}\nmosh-server: Bad UDP port range ({value})") from None
        elif letter == "c":
            if not re.fullmatch(r"-?\d{1,9}", value, re.ASCII):
                raise UsageError(f"Bad number of colors ({value})")
            options.colors = int(value)
        elif letter == "v":
            options.verbose += 1
        elif letter == "l":
            name, _, setting = value.partition("=")
            if name in LOCALE_VARIABLES:
                options.locale[name] = setting
    return options


def _address_from_ssh() -> str:
    """Return the address that the ssh connection reached this machine by, empty for any."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if not words:
        print("Warning: SSH_CONNECTION not found; binding to any interface.", file=sys.stderr)
        return ""
    if len(words) != 4:
        print("Warning: Could not parse SSH_CONNECTION; binding to any interface.", file=sys.stderr)
        return ""
    return words[2].removeprefix("::ffff:")


# -- the client


def client_main(words: Sequence[str]) -> int:
    """Be mosh-client."""
    disable_core_dumps()  # first, since the key is here, and a library that is loaded may crash
    operands: list[str] = []
    for letter, value in _short_options(words, "#", "cv"):
        if letter == "c":
            print(Terminfo(os.environ.get("TERM", "")).colors)
            return 0
        if value is None:
            raise UsageError(f"unknown option -{letter}")
        if letter == "":
            operands.append(value)
    if len(operands) != 2:
        raise UsageError(f"{len(operands)} arguments instead of IP and PORT")
    host, port_text = operands
    port = parse_port(port_text)
    key_text = take_secret_from_environment("MOSH_KEY")
    if key_text is None:
        raise UsageError("MOSH_KEY environment variable not found.")
    key = Key.from_text(key_text)
    candidates = [Candidate(*found) for found in numeric_addresses(host, port, socket.AF_UNSPEC)]
    if not candidates:
        raise UsageError(f"Bad IP address ({host})")
    terminfo = Terminfo(os.environ.get("TERM", ""))
    make_cipher = choose_cipher()
    return run_client(key, candidates, port, _client_options(None, None, True), terminfo, make_cipher)


# -- all of them


def _asks_for_text(words: Sequence[str], program: str) -> bool:
    """Print help or version if one of the words before `--` asks for it. Returns whether one did."""
    if _asks_for_version(words):
        return True
    own = words_of_ours(words)
    if "--help" in own or "-h" in own:
        print(_USAGES[program])
        return True
    return False


def _run(role: str, words: Sequence[str]) -> int:
    """Be the server, the client or, without a role, the wrapper. Returns the exit status."""
    if role and _asks_for_text(words, role):
        return 0
    if role == "mosh-server":
        return serve(_parse_server(words))
    if role == "mosh-client":
        return client_main(words)
    return wrapper_main(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status; every error has become one clear text."""
    open_standard_descriptors()
    words = list(sys.argv if argv is None else argv)
    program = os.path.basename(words[0])
    words = words[1:]
    role = program if program in _USAGES else ""
    if not role and words and words[0] in ("server", "client"):
        role = "mosh-" + words.pop(0)
    try:
        try:
            return _run(role, words)
        finally:
            sys.stdout.flush()  # here, where it may fail
    except UsageError as error:
        if role:
            _complain(str(error), role)
            return 1
        print(f"mosh: {error}\n{_USAGE_HINT}", file=sys.stderr)
        return USAGE_ERROR
    except MoshError as error:
        print(f"mosh: {printable(str(error))}", file=sys.stderr)  # security: it may quote what the host has said
        return error.status
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"mosh: {error.strerror or error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what could not be written must not fail again at exit
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
