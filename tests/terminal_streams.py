"""Hypothesis strategies for what programs write to terminals: text of all widths mixed with control functions."""

from __future__ import annotations

from hypothesis import strategies as st

TEXT = st.text(alphabet="ab xyz\u00e9\u6f22\u5b57\u0301\u0302\U0001f600\u200d\ufe0f\u2500", min_size=1, max_size=9)
CONTROL = st.sampled_from("\a\b\t\n\v\f\r\x0e\x0f\x18\x1a\x84\x85\x88\x8d\x9c")
NUMBER = st.integers(0, 9) | st.sampled_from((0, 1, 38, 48, 5, 2, 255, 1000, 1006, 2004, 65535, 65536, 10**20))
PARAMETERS = st.lists(NUMBER | st.just(""), max_size=5).map(lambda numbers: ";".join(map(str, numbers)))
CSI = st.builds(
    "\x1b[{}{}{}".format,
    st.sampled_from(["", "", "", "?", ">"]),
    PARAMETERS,
    st.sampled_from("@ABCDGHIJKLMPSTXZ`dfghlmmmmrc"),
)
SGR = st.builds("\x1b[{}m".format, PARAMETERS)
MODE = st.builds(
    "\x1b[?{}{}".format,
    st.sampled_from([1, 3, 5, 6, 7, 25, 9, 1000, 1002, 1003, 1004, 1005, 1006, 1007, 2004]),
    st.sampled_from("hl"),
)
ESCAPE = st.sampled_from(
    ["\x1b7", "\x1b8", "\x1bc", "\x1b#8", "\x1bD", "\x1bE", "\x1bM", "\x1bH", "\x1b(B", "\x1b[4h", "\x1b[4l"]
)
OSC = st.builds("\x1b]{};{}\x07".format, st.sampled_from(["0", "1", "2", "52;c", "8", ""]), TEXT)


def terminal_bytes(max_pieces: int = 25) -> st.SearchStrategy[bytes]:
    """Return a strategy for bytes that exercise a terminal."""
    piece = TEXT | TEXT | CONTROL | CSI | SGR | MODE | ESCAPE | OSC
    return st.lists(piece, max_size=max_pieces).map(lambda pieces: "".join(pieces).encode())
