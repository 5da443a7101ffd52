"""A figure as an element of an HTML page, in its colours, a quarter as long as it was drawn."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from itertools import groupby

from markupsafe import Markup
from matplotlib.figure import Figure

from yoco_eval.printable import one_line

SVG = "http://www.w3.org/2000/svg"
ET.register_namespace("", SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")

_PLACES = frozenset({"d", "x", "y", "transform", "width", "height"})  # that hold coordinates
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_BOX = re.compile(r"M(\S+) (\S+)L(\S+) \2L\3 (\S+)L\1 \4(?:L\1 \2)?z?")
_CELL = re.compile(r"M[^MHVz]+H[^MHVz]+V[^MHVz]+H[^MHVz]+z")
_FILL = re.compile(r"(?:^|; )fill: ([^;]+)")
_TEXT = f"{{{SVG}}}text"
_ALIKE = frozenset({_TEXT, f"{{{SVG}}}path", f"{{{SVG}}}use"})


def inline_svg(
    figure: Figure,
    prefix: str,
    title: str,
    variables: Mapping[str, str],
    overlay: ET.Element | None = None,
) -> Markup:
    """The figure's SVG.

    prefix: of all ids, which one page must not have twice.
    variables: by name, the colours that are drawn where the page's own shall stand.
    overlay: drawn on top.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    text = file.getvalue().decode()
    for variable, value in variables.items():
        text = text.replace(value, f"var({variable})")
    root = ET.fromstring(text)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        _settle_ids(element, prefix, text)
    _compact(root)
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.set("role", "group" if overlay is not None else "img")
    root.set("aria-label", one_line(title))
    if overlay is not None:
        root.append(overlay)
    return Markup(ET.tostring(root, encoding="unicode"))


def _settle_ids(element: ET.Element, prefix: str, text: str) -> None:
    for key, value in list(element.items()):
        if key == "id" and f"#{value}" in text:
            element.set(key, f"{prefix}-{value}")
        elif key == "id":
            del element.attrib[key]
        elif key.endswith("href"):
            element.set(key, value.replace("#", f"#{prefix}-"))
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{prefix}-"))


def _compact(element: ET.Element) -> None:
    """The same picture: coordinates to a hundredth of a point, what siblings share said once."""
    for key, value in element.items():
        if key in _PLACES:
            element.set(key, _shorter(value))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if len(element) and not (element.text or "").strip():
        element.text = None
    for child in element:
        child.tail = None
        _compact(child)
    element[:] = _grouped(_flat(element))


def _shorter(value: str) -> str:
    value = _NUMBER.sub(lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    value = re.sub(r"\s*([MLCQz])\s*", r"\1", value)
    return _BOX.sub(r"M\1 \2H\3V\4H\1z", value).strip()


def _flat(element: ET.Element) -> Iterator[ET.Element]:
    """The children, in place of groups that say nothing what is in them."""
    for child in element:
        if child.tag == f"{{{SVG}}}g" and not child.attrib:
            yield from child
        else:
            yield child


def _grouped(children: Iterator[ET.Element]) -> Iterator[ET.Element]:
    """Neighbours of one style in a group that has it, those that one colour fills in one of it."""
    for (tag, style, clip), run in groupby(children, _style):
        alike = list(run)
        if tag not in _ALIKE or len(alike) < 2 or not (style or clip):
            yield from alike
            continue
        fills: dict[str, list[ET.Element]] = {}
        for one in alike:
            fill = _FILL.search(one.attrib.pop("style", ""))
            one.attrib.pop("clip-path", None)
            fills.setdefault(fill[1] if fill else "", []).append(one)
        # Cells and their figures lie side by side, so that it does not matter which comes first.
        apart = tag == _TEXT or all(_CELL.fullmatch(one.get("d", "")) for one in alike)
        if len(fills) > 1 and not apart:
            for color, members in fills.items():
                for one in members:
                    one.set("style", f"fill:{color}" if color else "")
            yield _group(style, clip, alike)
            continue
        yield _group(style, clip, [_filled(fill, members) for fill, members in fills.items()])


def _filled(fill: str, alike: list[ET.Element]) -> ET.Element:
    """Elements in one colour as one: cells as a path, else a group."""
    one = alike[0]
    if _CELL.fullmatch(one.get("d", "")):
        one.set("d", "".join(other.get("d", "") for other in alike))
        if fill:
            one.set("style", f"fill:{fill}")
        return one
    return _group(f"fill:{fill}" if fill else "", None, alike)


def _group(style: str, clip: str | None, members: list[ET.Element]) -> ET.Element:
    group = ET.Element(f"{{{SVG}}}g")
    for key, value in (("style", style), ("clip-path", clip)):
        if value:
            group.set(key, value)
    group[:] = members
    return group


def _style(element: ET.Element) -> tuple[str, str, str | None]:
    style = _FILL.sub("", element.get("style", "")).removeprefix("; ")
    return element.tag, style, element.get("clip-path")
