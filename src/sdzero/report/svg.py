"""Matplotlib figures as inline SVG, with searchable text and the colours of the page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure


def inline_svg(figure: Figure, name: str, title: str, colors: Mapping[str, str]) -> Markup:
    """Convert a figure to an `<svg>` element that CSS can scale; its width in points is the variable `--width`.

    Args:
        figure: equal figures give equal bytes.
        name: prefix of every id, so that ids on one page are unique.
        title: label for screen readers.
        colors: hex colour as matplotlib writes it -> its CSS replacement.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True)
    root = ET.fromstring(file.getvalue())
    for parent in root.iter():
        for child in [*parent]:
            if child.tag.endswith(("}metadata", "}style")):  # its style would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {key: _local(key, value, name, colors) for key, value in attributes.items()}
    width = root.attrib.pop("width").removesuffix("pt")
    del root.attrib["height"], root.attrib["version"]
    root.attrib |= {"class": "figure", "role": "img", "aria-label": title, "style": f"--width: {width}px"}
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(key: str, value: str, name: str, colors: Mapping[str, str]) -> str:
    """Rewrite an attribute to the figure's own ids and the page's colours and font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    value = value.replace("url(#", f"url(#{name}-")
    value = re.sub(r"font-family:[^;]*;", "", value)  # inherits the font of the page
    return re.sub(r"#[0-9a-f]{6}\b", lambda color: colors.get(color[0], color[0]), value)
