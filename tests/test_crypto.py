"""Section 4: both AES-128-OCB backends, the key, and the sealed channel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mosh
from mosh import TO_CLIENT, TO_SERVER

KEY = bytes(range(16))
Backend = Callable[[bytes], mosh.Cipher]


def _libcrypto_works() -> bool:
    try:
        mosh.check_cipher(mosh.LibcryptoCipher)
    except OSError:
        return False
    return True


needs_libcrypto = pytest.mark.skipif(not _libcrypto_works(), reason="this interpreter's libcrypto lacks AES-128-OCB")
BACKENDS = [
    pytest.param(mosh.CryptographyCipher, id="cryptography"),
    pytest.param(mosh.LibcryptoCipher, id="libcrypto", marks=needs_libcrypto),
]
every_backend = pytest.mark.parametrize("make", BACKENDS)


def _channels(make: Backend = mosh.CryptographyCipher) -> tuple[mosh.Channel, mosh.Channel]:
    """Return the client's and the server's channel."""
    return mosh.Channel(make(KEY), TO_SERVER), mosh.Channel(make(KEY), TO_CLIENT)


@every_backend
def test_what_one_end_seals_the_other_opens(make: Backend) -> None:
    client, server = _channels(make)
    assert server.open(client.seal(b"hello")) == (0, b"hello")
    assert server.open(client.seal(b"")) == (1, b"")
    assert client.open(server.seal(b"world")) == (0, b"world")


# -- published and recorded answers

# RFC 7253, appendix A: the rows without associated data. Last byte of the nonce, length of the plaintext 00 01 02 ...
RFC_7253 = [
    (0x00, 0, "785407bfffc8ad9edcc5520ac9111ee6"),
    (0x03, 8, "45dd69f8f5aae72414054cd1f35d82760b2cd00d2f99bfa9"),
    (0x06, 16, "5ce88ec2e0692706a915c00aeb8b2396f40e1c743f52436bdf06d8fa1eca343d"),
    (0x09, 24, "221bd0de7fa6fe993eccd769460a0af2d6cded0c395b1c3ce725f32494b9f914d85c0b1eb38357ff"),
    (0x0C, 32, "2942bfc773bda23cabc6acfd9bfd5835bd300f0973792ef46040c53f1432bcdfb5e1dde3bc18a5f840b52e653444d5df"),
    (
        *(0x0F, 40),
        "4412923493c57d5de0d700f753cce0d1d2d95060122e9f15a5ddbfc5787e50b5cc55ee507bcb084e479ad363ac366b95a98ca5f3000b1479",
    ),
]


@every_backend
@pytest.mark.parametrize(("nonce", "size", "sealed"), RFC_7253)
def test_rfc_7253(make: Backend, nonce: int, size: int, sealed: str) -> None:
    cipher = make(KEY)
    nonce_bytes = bytes.fromhex("bbaa998877665544332211") + bytes((nonce,))
    assert cipher.encrypt(nonce_bytes, bytes(range(size))).hex() == sealed
    assert cipher.decrypt(nonce_bytes, bytes.fromhex(sealed)) == bytes(range(size))


@every_backend
def test_stock_vector_to_the_server(make: Backend) -> None:
    client, server = _channels(make)
    datagram = "0000000000000000a5a7ac886f721925ed1b023829a078f9"
    assert client.seal(b"").hex() == datagram
    assert server.open(bytes.fromhex(datagram)) == (0, b"")


@every_backend
def test_stock_vector_to_the_client(make: Backend) -> None:
    client, server = _channels(make)
    datagram = "8000000000000001b560eebed13fcefef2016dc3a13c389bcffdf826a1"
    server.seal(b"the one before")
    assert server.seal(b"hello").hex() == datagram
    assert client.open(bytes.fromhex(datagram)) == (1, b"hello")


@needs_libcrypto
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=12, max_size=12), st.binary(max_size=2_000))
def test_the_backends_agree(key: bytes, nonce: bytes, plaintext: bytes) -> None:
    one, other = mosh.CryptographyCipher(key), mosh.LibcryptoCipher(key)
    sealed = one.encrypt(nonce, plaintext)
    assert other.encrypt(nonce, plaintext) == sealed
    assert one.decrypt(nonce, sealed) == other.decrypt(nonce, sealed) == plaintext


# -- choosing a backend


class _Broken:
    """A backend with a fault, on top of one that works."""

    name = "broken"

    def __init__(self, raw_key: bytes) -> None:
        self._cipher = mosh.CryptographyCipher(raw_key)

    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        return self._cipher.encrypt(nonce, plaintext)

    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        return self._cipher.decrypt(nonce, sealed)


class _LosesTheNonce(_Broken):
    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        return super().encrypt(bytes(len(nonce)), plaintext)

    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        return super().decrypt(bytes(len(nonce)), sealed)


class _BelievesEverything(_Broken):
    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        try:
            return super().decrypt(nonce, sealed)
        except mosh.AuthenticationError:
            return b"forged"


class _FailsOnLongOnes(_Broken):
    def decrypt(self, nonce: bytes, sealed: bytes) -> bytes:
        return super().decrypt(nonce, sealed)[:1_000]


FAULTS = [
    (_LosesTheNonce, "published test vector"),
    (_BelievesEverything, "forged message"),
    (_FailsOnLongOnes, "round trip"),
]


@pytest.mark.parametrize(("make", "reason"), FAULTS)
def test_a_broken_backend_is_found_out(make: Backend, reason: str) -> None:
    mosh.check_cipher(_Broken)
    with pytest.raises(OSError, match=reason):
        mosh.check_cipher(make)


def test_a_backend_can_be_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSH_CRYPTO", raising=False)
    assert mosh.choose_cipher() in mosh.CIPHERS
    monkeypatch.setenv("MOSH_CRYPTO", "libcrypto")
    assert mosh.choose_cipher() is mosh.LibcryptoCipher
    monkeypatch.setenv("MOSH_CRYPTO", "rot13")
    with pytest.raises(mosh.BootstrapError, match="cryptography, libcrypto or bundled"):
        mosh.choose_cipher()


def test_only_an_archive_has_a_bundled_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the one in an archive does is in test_build.py."""
    monkeypatch.setenv("MOSH_CRYPTO", "bundled")
    with pytest.raises(mosh.BootstrapError, match="can hold it, and this is no") as caught:
        mosh.choose_cipher()
    assert caught.value.status == mosh.NO_CIPHER and "\n" not in str(caught.value)


def _failing(name: str, error: Exception) -> Backend:
    class Failing(_Broken):
        def __init__(self, _raw_key: bytes) -> None:
            raise error

    Failing.name = name
    return Failing


def test_backends_are_tried_in_order_and_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _failing("first", ImportError("no such\nmodule")), _failing("second", KeyError("odd"))
    last = _failing("last", OSError("nothing kept"))
    monkeypatch.setattr(mosh, "INSTALLED_CIPHERS", (first, second))
    monkeypatch.setattr(mosh, "CIPHERS", (first, second, last))
    with pytest.raises(mosh.BootstrapError) as caught:
        mosh.choose_cipher()
    assert str(caught.value) == (
        "no AES-128-OCB on this machine; first (as started): no such module; second (as started): KeyError; "
        "last (in mosh.pyz): nothing kept")
    monkeypatch.setattr(mosh, "CIPHERS", (first, second, _Broken))
    assert mosh.choose_cipher() is _Broken
    monkeypatch.setenv("MOSH_CRYPTO", "second")
    with pytest.raises(mosh.BootstrapError, match="machine; second "):
        mosh.choose_cipher()


# -- keys


def test_a_key_prints_as_22_letters() -> None:
    assert mosh.Key(KEY).to_text() == "AAECAwQFBgcICQoLDA0ODw"
    assert mosh.Key.from_text("ETxo6D3dSjs5weIoyWAUiA").raw.hex() == "113c68e83ddd4a3b39c1e228c9601488"


@given(st.binary(min_size=16, max_size=16))
def test_key_text_law(raw: bytes) -> None:
    text = mosh.Key(raw).to_text()
    assert len(text) == 22 and text[-1] in "AQgw"
    assert mosh.Key.from_text(text).raw == raw


LENGTH, LETTERS, PADDING = (
    *("Key must be 22 letters long.", "Key must be well-formed base64."),
    "Base64 key was not encoded 128-bit key.",
)
BAD_KEYS = [
    ("", LENGTH),
    ("AAECAwQFBgcICQoLDA0OD", LENGTH),
    ("AAECAwQFBgcICQoLDA0ODw==", LENGTH),
    ("AAECAwQFBgcICQoLDA0OD=", LETTERS),
    ("AAECAwQFBgcICQoLDA0O w", LETTERS),
    ("AAECAwQFBgcICQoLDA0OD\n", LETTERS),
    ("AAECAwQFBgcICQoLDA0-_w", LETTERS),
    ("AAECAwQFBgcICQoLDA0OD\u00e9", LETTERS),
    ("AAECAwQFBgcICQoLDA0ODx", PADDING),
    ("AAECAwQFBgcICQoLDA0OD/", PADDING),
]


@pytest.mark.parametrize(("text", "reason"), BAD_KEYS)
def test_a_bad_key_is_refused_without_showing_it(text: str, reason: str) -> None:
    with pytest.raises(mosh.UsageError) as caught:
        mosh.Key.from_text(text)
    assert str(caught.value) == reason


@given(st.text(max_size=30) | st.text("ABab01+/", min_size=22, max_size=22))
def test_any_text_is_a_key_or_a_usage_error(text: str) -> None:
    try:
        assert mosh.Key.from_text(text).to_text() == text
    except mosh.UsageError as error:
        assert str(error) in (LENGTH, LETTERS, PADDING)


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(mosh.UsageError):
        mosh.Key(bytes(32))


def test_a_key_does_not_show_in_a_traceback() -> None:
    key = mosh.Key(b"sixteen letters!")
    assert "sixteen" not in repr(key) + str(key) and key.to_text() not in repr(key)


# -- the channel


@given(st.lists(st.binary(max_size=2_000), max_size=10))
def test_open_undoes_seal(plaintexts: list[bytes]) -> None:
    client, server = _channels()
    for seq, plaintext in enumerate(plaintexts):
        assert server.open(client.seal(plaintext)) == (seq, plaintext)


def test_a_datagram_is_the_nonce_then_as_much_as_went_in_then_the_tag() -> None:
    client, server = _channels()
    client.seal(b"")
    assert client.seal(b"x" * 100)[:8].hex() == "0000000000000001"
    assert server.seal(b"x" * 100)[:8].hex() == "8000000000000000"
    assert len(server.seal(b"x" * 100)) == 8 + 100 + 16


@every_backend
@given(plaintext=st.binary(max_size=100), data=st.data())
def test_any_bit_flip_is_refused(make: Backend, plaintext: bytes, data: st.DataObject) -> None:
    client, server = _channels(make)
    datagram = bytearray(client.seal(plaintext))
    bit = data.draw(st.integers(0, 8 * len(datagram) - 1))
    datagram[bit // 8] ^= 1 << bit % 8
    with pytest.raises(mosh.AuthenticationError):
        server.open(bytes(datagram))


@every_backend
@given(datagram=st.binary(max_size=2_100))
def test_any_bytes_are_refused(make: Backend, datagram: bytes) -> None:
    with pytest.raises(mosh.PacketError):
        _channels(make)[1].open(datagram)


REFUSED = [
    (b"", "Ciphertext must contain nonce and tag."),
    (bytes(23), "Ciphertext must contain nonce and tag."),
    (bytes(24), "Packet failed integrity check."),
    (bytes(2_048), "Packet failed integrity check."),
]


@every_backend
@pytest.mark.parametrize(("datagram", "reason"), REFUSED)
def test_why_a_datagram_is_refused(make: Backend, datagram: bytes, reason: str) -> None:
    with pytest.raises(mosh.PacketError) as caught:
        _channels(make)[1].open(datagram)
    assert str(caught.value) == reason


def test_the_largest_datagram_is_2048_bytes() -> None:
    client, server = _channels()
    assert server.open(client.seal(bytes(2_048 - 24))) == (0, bytes(2_048 - 24))
    with pytest.raises(mosh.PacketError):
        server.open(client.seal(bytes(2_048 - 23)))


def test_our_own_datagram_reflected_is_refused() -> None:
    client, _ = _channels()
    with pytest.raises(mosh.PacketError, match="Illegal counterparty input"):
        client.open(client.seal(b"echo"))


def test_another_key_is_refused() -> None:
    stranger = mosh.Channel(mosh.CryptographyCipher(bytes(16)), TO_SERVER)
    with pytest.raises(mosh.AuthenticationError):
        _channels()[1].open(stranger.seal(b"hello"))


def test_a_channel_after_a_forgery_goes_on_as_before() -> None:
    client, server = _channels()
    datagram = client.seal(b"hello")
    with pytest.raises(mosh.AuthenticationError):
        server.open(datagram[:-1] + bytes((datagram[-1] ^ 1,)))
    assert server.open(datagram) == (0, b"hello")


# -- nonces


class _Recorder:
    """A cipher that only notes the nonces, and fails where told to."""

    name = "recorder"

    def __init__(self) -> None:
        self.nonces: list[bytes] = []
        self.fails = False

    def encrypt(self, nonce: bytes, plaintext: bytes) -> bytes:
        self.nonces.append(nonce)
        if self.fails:
            raise OSError("no")
        return plaintext + bytes(mosh.TAG_BYTES)

    def decrypt(self, _nonce: bytes, sealed: bytes) -> bytes:
        return sealed[: -mosh.TAG_BYTES]


@given(st.lists(st.tuples(st.sampled_from((TO_SERVER, TO_CLIENT)), st.booleans()), max_size=50))
def test_no_nonce_is_used_twice(schedule: list[tuple[int, bool]]) -> None:
    cipher = _Recorder()
    channels = [mosh.Channel(cipher, TO_SERVER), mosh.Channel(cipher, TO_CLIENT)]
    for direction, cipher.fails in schedule:
        try:
            channels[direction].seal(b"x")
        except OSError:
            assert cipher.fails
    assert len(set(cipher.nonces)) == len(schedule)
    assert all(len(nonce) == 12 and nonce[:4] == bytes(4) for nonce in cipher.nonces)


def test_a_used_up_key_ends_the_session() -> None:
    channel = mosh.Channel(_Recorder(), TO_SERVER)
    channel._blocks_left = 3
    channel.seal(bytes(17))  # two blocks
    channel.seal(b"")  # none
    channel.seal(b"x")
    with pytest.raises(mosh.ProtocolError, match="Encrypted"):
        channel.seal(b"x")


def test_the_last_sequence_number_is_not_overrun_into_the_direction_bit() -> None:
    cipher = _Recorder()
    channel = mosh.Channel(cipher, TO_SERVER)
    channel._next_seq = 2**63 - 1
    channel.seal(b"x")
    with pytest.raises(mosh.ProtocolError):
        channel.seal(b"x")
    assert cipher.nonces == [bytes(4) + bytes.fromhex("7fffffffffffffff")]
