"""A chart as matplotlib writes it, made fit to stand inside a page: labelled, in the page's colours and fonts.

Charts are drawn in stand-in colours, one for each of the page's CSS variables, which are put back here. So one drawing
serves light, dark and print.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from flexctl.evaluation.report.words import plain

__all__ = ["COLOURS", "embed"]

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"

COLOURS = {
    name: f"#0101{index:02x}"
    for index, name in enumerate(["ink", "muted", "rule", "paper", "accent", "heat", "worse", "better", "bar"], start=1)
}
"""CSS variable of the page -> the colour that stands in for it while matplotlib draws."""

_STAND_INS = {colour: f"var(--{name})" for name, colour in COLOURS.items()}


def embed(drawing: str, name: str, title: str, description: str) -> str:
    """Return a drawing as one ``<svg>`` element.

    Args:
        drawing: The document that matplotlib wrote, 72 dots an inch, text as text.
        name: Unique on the page; every id begins with it.
        title: What the chart is, for those who do not see it.
        description: What it shows, figures included.

    Without metadata, dates, comments, document-wide styles and unused ids; fonts are left to the page.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(drawing)
    _drop(root, "metadata", "style")
    _prefix_ids(root, name)
    for element in root.iter():
        element.text = (element.text or "").strip() or None
        element.tail = None
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if "style" in element.attrib:
            element.set("style", _style(element.attrib["style"]))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    _label(root, name, title, description)
    return ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG}"', "")


def _drop(root: ElementTree.Element, *tags: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in [f"{{{_SVG}}}{tag}" for tag in tags]:
                parent.remove(child)


def _prefix_ids(root: ElementTree.Element, name: str) -> None:
    used = {element.attrib[_HREF].removeprefix("#") for element in root.iter() if _HREF in element.attrib}
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.set("id", f"{name}-{identity}")
        if _HREF in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(_HREF).removeprefix('#')}")


def _style(style: str) -> str:
    """Return a style in the page's colours, with a size but no family of its own."""
    style = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;]*", r"font-size: \1", style)
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    return re.sub(r"#[0-9a-f]{6}", lambda found: _STAND_INS.get(found[0], found[0]), style)


def _label(root: ElementTree.Element, name: str, title: str, description: str) -> None:
    width, height = root.get("viewBox", "0 0 0 0").split()[2:]
    for key in ("version", "xmlns", "width", "height"):
        root.attrib.pop(key, None)
    labels = {"width": width, "height": height, "role": "img", "class": "chart"}
    labels["aria-labelledby"] = f"{name}-title"
    labels["aria-describedby"] = f"{name}-description"
    for key, value in labels.items():
        root.set(key, value)
    for position, (part, text) in enumerate((("title", title), ("description", description))):
        element = ElementTree.Element(f"{{{_SVG}}}{'title' if part == 'title' else 'desc'}", {"id": f"{name}-{part}"})
        element.text = plain(text)
        root.insert(position, element)
