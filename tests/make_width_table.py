"""Generate WIDTH_EXCEPTIONS of mosh.py: where stock mosh and the `wcwidth` package judge a width differently.

Stock mosh asks the C library. The rule below is that of glibc 2.36 with Unicode 14 data, so run this with the Python
whose `unicodedata` is Unicode 14 (CPython 3.11), with `wcwidth` and `unicodedata2` (a newer Unicode) installed:

    python3.11 tests/make_width_table.py

and put what it prints into mosh.py. A code point that Unicode 14 does not know but a newer one does takes the width
`wcwidth` gives; it is listed all the same, since the two ends of a session may judge it differently.
"""

from __future__ import annotations

import base64
import sys
import unicodedata
import zlib
from collections.abc import Iterator

UNPRINTABLE, ZERO, ONE, TWO, NEWER = range(5)  # the last: assigned after Unicode 14, `wcwidth` decides

FORMAT_CHARACTERS_THAT_SHOW = {
    *range(0x600, 0x606),
    0x6DD,
    0x70F,
    *(0x890, 0x891, 0x8E2, 0x110BD, 0x110CD),
}
JAMO_THAT_JOIN = {*range(0x1160, 0x1200), *range(0xD7B0, 0xD7C7), *range(0xD7CB, 0xD7FC)}
WIDE_BY_DECREE = {*range(0x3248, 0x3250), *range(0x4DC0, 0x4E00)}


def stock_width(code_point: int) -> int:
    """Return the width stock mosh gives `code_point` on glibc 2.36: -1, 0, 1 or 2."""
    char = chr(code_point)
    category = unicodedata.category(char)
    if 0x20 <= code_point <= 0x7E or 0xA0 <= code_point <= 0xFF or code_point in FORMAT_CHARACTERS_THAT_SHOW:
        return 1
    if category in ("Cc", "Cs", "Cn", "Zl", "Zp"):
        return -1
    if category in ("Mn", "Me", "Cf") or code_point in JAMO_THAT_JOIN:
        return 0
    if unicodedata.east_asian_width(char) in "WF" or code_point in WIDE_BY_DECREE:
        return 2
    return 1


def exceptions() -> Iterator[tuple[int, int]]:
    """Yield (code point, verdict) for each code point whose width is in doubt."""
    import unicodedata2
    import wcwidth

    for code_point in range(sys.maxunicode + 1):
        char = chr(code_point)
        if unicodedata.category(char) == "Cn" and unicodedata2.category(char) != "Cn":
            yield code_point, NEWER
        elif stock_width(code_point) != wcwidth.wcwidth(char):
            yield code_point, stock_width(code_point) + 1


def runs() -> list[tuple[int, int, int]]:
    """Return the exceptions as (first, last, verdict), in ascending order."""
    out: list[tuple[int, int, int]] = []
    for code_point, verdict in exceptions():
        if out and out[-1][1] == code_point - 1 and out[-1][2] == verdict:
            out[-1] = (out[-1][0], code_point, verdict)
        else:
            out.append((code_point, code_point, verdict))
    return out


def packed() -> str:
    """Return the runs as text: "gap length verdict" in hexadecimal per run, compressed, in base 85."""
    words, at = [], 0
    for first, last, verdict in runs():
        words.append(f"{first - at:x} {last - first + 1:x} {verdict}")
        at = last + 1
    return base64.b85encode(zlib.compress(",".join(words).encode(), 9)).decode()


def main() -> None:
    """Print the table as Python source."""
    if not unicodedata.unidata_version.startswith("14."):
        sys.exit(f"this Python has Unicode {unicodedata.unidata_version}; the table needs Unicode 14 (Python 3.11)")
    print("WIDTH_EXCEPTIONS = (")
    table = packed()
    for at in range(0, len(table), 108):
        print(f'    "{table[at : at + 108]}"')
    print(")")


if __name__ == "__main__":
    main()
