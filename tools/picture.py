"""Draws docs/life.svg, the life of an expert: part of ``make docs``."""

from __future__ import annotations

from tools.record import ROOT

PICTURE = ROOT / "docs" / "life.svg"
_INK, _QUIET, _PAPER = "#1f2933", "#52606d", "#ffffff"
_COLOURS = {"law": "#b65c00", "news": "#00689d", "public": "#52606d"}


def box(x: int, y: int, width: int, height: int, text: str, colour: str = _INK, note: str = "") -> str:
    """Return a box with a name in it and a note below the name."""
    middle = y + height // 2 + (5 if not note else -3)
    below = f'<text x="{x + width // 2}" y="{middle + 18}" class="note">{note}</text>' if note else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{_PAPER}" stroke="{colour}"/>'
        f'<text x="{x + width // 2}" y="{middle}" fill="{colour}">{text}</text>{below}'
    )


def arrow(x1: int, y1: int, x2: int, y2: int, command: str = "") -> str:
    """Return an arrow with a command above its middle."""
    label = f'<text x="{(x1 + x2) // 2}" y="{(y1 + y2) // 2 - 7}" class="command">{command}</text>' if command else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" marker-end="url(#head)"/>{label}'


def owner(y: int, name: str) -> str:
    """Return an owner's walls: text that stays, and the expert that leaves."""
    colour = _COLOURS[name]
    return (
        f'<rect x="190" y="{y}" width="310" height="82" rx="10" fill="none" stroke="{colour}" stroke-dasharray="5 4"/>'
        f'<text x="345" y="{y + 16}" class="note">{name}: text never leaves</text>'
        + box(204, y + 26, 84, 42, f"{name} text", colour)
        + arrow(288, y + 47, 400, y + 47, "train-expert")
        + box(402, y + 26, 86, 42, f"{name}.st", colour)
    )


def model(x: int, y: int, names: tuple[str, ...], note: str) -> str:
    """Return a merged model with a row an expert."""
    rows = "".join(box(x + 10, y + 10 + 34 * i, 110, 28, name, _COLOURS[name]) for i, name in enumerate(names))
    height = 16 + 34 * len(names)
    frame = f'<rect x="{x}" y="{y}" width="130" height="{height}" rx="8" fill="none" stroke="{_INK}"/>'
    return frame + rows + f'<text x="{x + 65}" y="{y + height + 18}" class="note">{note}</text>'


def life() -> str:
    """Return the whole picture as SVG."""
    parts = [
        box(16, 112, 108, 60, "anchor", _COLOURS["public"], "public, frozen"),
        arrow(124, 130, 190, 75),
        arrow(124, 154, 190, 210),
        owner(34, "law"),
        owner(168, "news"),
        arrow(500, 81, 596, 128),
        '<text x="540" y="150" class="command">merge</text>',
        arrow(500, 215, 596, 160),
        model(600, 84, ("public", "law", "news"), "one stock model"),
        arrow(732, 142, 826, 142, "remove law"),
        model(830, 100, ("public", "news"), "as if law had never been in"),
    ]
    style = (
        f"text{{font:14px sans-serif;text-anchor:middle;fill:{_INK}}} .note{{font-size:12px;fill:{_QUIET}}} "
        f".command{{font:12px monospace;fill:{_INK}}} line{{stroke:{_INK}}}"
    )
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{_INK}"/></marker>'
    )
    title = "The life of an expert: trained at home against a public anchor, merged with others, removed again."
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 284" role="img" aria-labelledby="t">\n'
        f'<title id="t">{title}</title>\n<style>{style}</style>\n<defs>{head}</defs>\n'
        f'<rect width="1000" height="284" fill="{_PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
