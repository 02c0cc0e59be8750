"""Everything that a client may ever write to the user's terminal, as one regular expression, sequence by sequence."""

from __future__ import annotations

import re

_COLOR = r"[34](?:[0-7]|8;5;\d{1,3}|8;2;\d{1,3};\d{1,3};\d{1,3})"
_SAFE = r"[^\x00-\x1f\x7f-\x9f]"     # no control of any kind, so no string can be left and no sequence begun

SEQUENCES = (
    _SAFE + "+",                                        # text
    r"[\a\b\r\n]",
    r"\x1b\[(?:\d{1,5};\d{1,5})?H",                     # CUP
    r"\x1b\[\d{0,5}C",                                  # CUF
    r"\x1b\[\d{1,5}X", r"\x1b\[K", r"\x1b\[2J",         # ECH, EL, ED
    r"\x1b\[(?:\d{1,5};\d{1,5})?r", r"\x1bM",           # DECSTBM, RI
    rf"\x1b\[0(?:;[134578])*(?:;{_COLOR}){{0,2}}m",     # SGR
    r"\x1b\[\?(?:5|25|9|100[0-6]|1015|2004|2026)[hl]",  # DECSET and DECRST of the modes that are synchronized
    rf"\x1b\][012];{_SAFE}{{0,300}}\x07",               # titles
    r"\x1b\]52;c;[A-Za-z0-9+/]{0,16384}=*\x07",         # setting, never asking for, the clipboard
)
WRITTEN = re.compile("|".join(f"(?:{sequence})" for sequence in SEQUENCES))


def unexpected(data: bytes) -> str:
    """Return what follows the longest prefix that the grammar covers; empty if it covers all."""
    text = data.decode("utf-8", "strict")
    at = 0
    while match := WRITTEN.match(text, at):
        at = match.end()
    return text[at:]
