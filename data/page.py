"""Pieces of self-contained HTML pages: the frame, pictures as data, boxes over them. Nothing is fetched by such a page.

The report of a run (`inference_pipeline/report.py`) and the check of a mixture (`data/check_page.py`) are made of them;
what a page needs of its own it adds to the style sheet.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image


def page(title: str, links: Iterable[tuple[str, str]], body: str, style: Path | None = None) -> str:
    """The whole document.

    Args:
        title: of the page, and in the bar at its top.
        links: anchor and text of the bar's links.
        body: HTML of the sections.
        style: a style sheet to add to the common one.
    """
    sheets = [Path(__file__).with_name("page.css"), *([style] if style else [])]
    css = "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    nav = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body>"
        f"<nav><div><b>{escape(title)}</b>{nav}</div></nav><main>{body}</main></body></html>\n"
    )


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def picture(content: bytes, size: tuple[int, int], alt: str, *, over: str = "") -> str:
    """A picture, enlarged without smoothing, with SVG in its own pixel units `over` it.

    Args:
        content: of a PNG file.
        size: its width and height.
        alt: what it shows.
        over: SVG elements.
    """
    width, height = size
    layer = f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{over}</svg>' if over else ""
    style = f' style="aspect-ratio:{width}/{height}"' if width != height else ""
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return f'<div class="picture"{style}><img src="{uri}" alt="{escape(alt)}">{layer}</div>'


def outline(box: Sequence[float], colour: str, dash: str = "") -> str:
    """SVG of a box, corners in pixels of its picture."""
    left, top, right, bottom = (float(v) for v in box)
    frame = (
        f'x="{left:.2f}" y="{top:.2f}" width="{max(right - left, 0):.2f}" height="{max(bottom - top, 0):.2f}"'
    )
    # A dark line under the coloured one: readable on every background.
    return (
        f'<rect {frame} fill="none" stroke="#000" stroke-opacity=".55" stroke-width="2"/>'
        f'<rect {frame} fill="none" stroke="{colour}" stroke-width="1" stroke-dasharray="{dash}"/>'
    )


def legend(*entries: tuple[str, str, str]) -> str:
    """What colours mean: class of the swatch, its style, its text."""
    items = "".join(
        f'<span><i class="{kind}" style="{style}"></i>{label}</span>' for kind, style, label in entries
    )
    return f'<div class="legend">{items}</div>'
