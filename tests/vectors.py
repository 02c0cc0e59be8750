"""Reads terminal_vectors.json, recorded from stock mosh 1.4.0, and puts screens into a form that compares.

The file explains its own formats in the member "about".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mosh

Vector = dict[str, Any]
CellView = tuple[Any, ...]
ATTRIBUTES = {
    "bold": mosh.BOLD,
    "italic": mosh.ITALIC,
    "underlined": mosh.UNDERLINED,
    "blink": mosh.BLINK,
    "inverse": mosh.INVERSE,
    "invisible": mosh.INVISIBLE,
}


def load(member: str) -> list[Vector]:
    """Return the vectors of one member of the file."""
    path = Path(__file__).with_name("terminal_vectors.json")
    vectors: list[Vector] = json.loads(path.read_text(encoding="utf-8"))[member]
    return vectors


def rendition_of(attr: dict[str, Any] | None) -> mosh.Rendition:
    """Return the rendition that an "attr" member describes."""
    attr = attr or {}

    def color(value: int | str | None) -> int | None:
        return mosh.RGB | int(value[1:], 16) if isinstance(value, str) else value

    bits = sum(bit for name, bit in ATTRIBUTES.items() if attr.get(name))
    return mosh.Rendition(bits, color(attr.get("fg")), color(attr.get("bg")))


def expected_cells(screen: list[dict[str, Any]]) -> dict[tuple[int, int], CellView]:
    """Return {(row, col): (contents, rendition key, wide, fallback)} for the cells a "screen" member lists."""
    cells: dict[tuple[int, int], CellView] = {}
    for item in screen:
        row, col, key = item["row"], item["col"], rendition_of(item.get("attr"))
        if "text" in item:
            for i, char in enumerate(item["text"]):
                cells[row, col + i] = (char, key, False, False)
        elif "cell" in item:
            cells[row, col] = (item["cell"], key, item.get("wide", False), item.get("fallback", False))
        else:
            cells.update({(row, col + i): ("", key, False, False) for i in range(item["empty"])})
    return cells


def actual_cells(framebuffer: mosh.Framebuffer) -> dict[tuple[int, int], CellView]:
    """Return the same for a framebuffer: all cells that are not empty in the default rendition."""
    cells = {}
    for row in range(framebuffer.height):
        for col in range(framebuffer.width):
            cell = framebuffer.cell(row, col)
            view = (cell.contents, cell.rendition, cell.wide, cell.fallback)
            if view != ("", (0, None, None), False, False):
                cells[row, col] = view
    return cells


def shown(framebuffer: mosh.Framebuffer) -> dict[str, Any]:
    """Return what a user sees of a framebuffer: an empty cell looks like a blank, a lone mark stands on NBSP."""
    cells = {}
    for row in range(framebuffer.height):
        text, _ = framebuffer.rows[row].padded(framebuffer.width)
        for col in framebuffer.visible_columns(text):
            cell = framebuffer.cell(row, col)
            contents = "\xa0" + cell.contents if cell.fallback else cell.contents or " "
            if cell.wide and col == framebuffer.width - 1:
                contents = " "
            cells[row, col] = (contents, cell.rendition)
    names = (
        *("cursor_row", "cursor_col", "cursor_visible", "reverse_video", "bracketed_paste", "mouse_mode"),
        *("mouse_encoding", "focus_events", "window_title", "clipboard", "width", "height"),
    )
    state: dict[str, Any] = {name: getattr(framebuffer, name) for name in names}
    state["pen"] = framebuffer.codebook.rendition(framebuffer.pen)
    state["cells"] = cells
    return state
