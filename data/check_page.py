"""The HTML page of `data/check.py`: what was found, and some samples of every group as the model gets them.

Every picture on it went through the group's transform and every text through the tokenizer and back; boxes, masks, what is left
out and what is supervised are those of the `Sample`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.check_report import (
    GROUP_HEADER,
    Fault,
    Report,
    by_kind,
    group_rows,
    packs_line,
    steps_text,
    summary,
    token_counts,
)
from data.checks import CHECKS
from data.inspect import COLOURS, SEEN, attention_picture, pack_lines
from data.layout import num_tokens, patch_grid
from data.mixture import Group
from data.packing import pack
from data.page import legend, outline, page, picture, png
from data.scan import Scan
from data.stream import LaneStream, StreamPlan, make_sample
from data.tokens import ANCHORS, Tokenizer
from data.types import Kind, LaneCursor, Region, Reject, Sample, Segment

SAMPLES = 4
"""Shown per group."""

TRIES = 200
"""Records that are read to find them."""

SIDE = 384
"""Longer side of a picture on the page, in pixels: larger ones are shown smaller."""

PALETTE = ("#ff4fd8", "#20cd78", "#ffb020", "#3aa0ff", "#ff5a4f", "#9b6bff", "#00c2c7", "#c6d400")
"""Of a sample's boxes and masks, in turn."""

ROLES: dict[Kind, str] = {
    "und_image": "to the ViT, to understand",
    "cond_image": "to the VAE, clean: condition",
    "gen_image": "to the VAE, noised: target",
}


def render(report: Report, tokenizer: Tokenizer) -> str:
    """The page."""
    groups = report.groups
    links = [("groups", "Groups"), ("faults", "Faults")]
    links += [(f"group-{group.name}", group.name) for group in groups]
    body = "".join(
        (
            _opening(report),
            _table(report),
            _faults(report),
            *(_group_section(report, group, tokenizer) for group in groups),
            _attention(report, tokenizer),
        )
    )
    title = f"Check of {report.file.name}"
    return page(title, [*links, ("attention", "Attention")], body, Path(__file__).with_name("check.css"))


# -------------------------------------------------------------------------------------------- what was found


def _opening(report: Report) -> str:
    p, counted = report.prediction, report.counted
    clean = not counted
    kinds = len({fault.kind for fault in counted})
    tiles = [
        _tile(
            "Faults",
            f"{sum(fault.count for fault in counted):,}",
            f"of {kinds} kinds" if kinds else "errors and warnings",
            f'<span class="mark {"pass" if clean else "fail"}">{"✓ clean" if clean else "✗ see below"}</span>',
        )
    ]
    if p is not None:
        bar = f'<div class="bar"><i style="width:{100 * p.efficiency:.2f}%"></i></div>'
        tiles.append(_tile("Packs are full", f"{p.efficiency:.1%}", f"emptiest {p.emptiest:.1%}", "", bar))
        per_pack = f"{p.samples_per_pack:.1f} samples a pack"
        tiles.append(_tile("Steps per epoch", steps_text(p.steps_per_epoch), per_pack, ""))
    return (
        f'<header><h1>Check of {escape(report.file.name)}</h1><p class="lead">{escape(summary(report))}</p></header>'
        f'<div class="tiles">{"".join(tiles)}</div><p class="note">{escape(packs_line(report))}</p>'
    )


def _tile(name: str, value: str, of: str, mark: str, bar: str = "") -> str:
    return (
        f'<div class="tile"><div class="top"><span class="name">{name}</span>{mark}</div>'
        f'<div class="value">{value}</div>{bar}<div class="of">{of}</div></div>'
    )


def _table(report: Report) -> str:
    rows = list(group_rows(report))
    head = "".join(f'<th class="{"n" if i else ""}">{name}</th>' for i, name in enumerate(GROUP_HEADER))
    cells = "".join(
        "<tr>"
        + "".join(f'<td class="{"n" if i else ""}">{escape(c)}</td>' for i, c in enumerate(row))
        + "</tr>"
        for row in rows[1:]
    )
    note = (
        "Tokens of a sample in a pack; text, und (ViT), cond and gen (VAE) are means with their markers; with loss: labels and "
        "noised latent tokens. Token share: of the simulated packs. Steps a pass: until the group has been read once."
    )
    return (
        f'<section id="groups"><h2>Groups</h2><p class="note">{note}</p>'
        f'<table class="groups"><tr>{head}</tr>{cells}</table></section>'
    )


def _faults(report: Report) -> str:
    listed = (
        "".join(_fault(kind, of_kind, report) for kind, of_kind in by_kind(report.faults))
        or '<p class="note">None.</p>'
    )
    told = f"Paths are relative to {escape(str(report.folder))}."
    return f'<section id="faults"><h2>Faults</h2><p class="note">{told}</p>{listed}</section>'


def _fault(kind: str, faults: Sequence[Fault], report: Report) -> str:
    check, severity = CHECKS[kind], faults[0].severity
    places = "".join(
        f"<tr><td><code>{escape(report.near(p.where))}</code></td><td>{escape(report.near(p.message))}</td></tr>"
        for fault in faults
        for p in fault.first
    )
    count = sum(fault.count for fault in faults)
    more = count - sum(len(fault.first) for fault in faults)
    rest = f'<p class="note">and {more:,} more</p>' if more else ""
    groups = ", ".join(escape(fault.group) for fault in faults if fault.group)
    return (
        f'<article class="card fault is-{severity}"><div class="top"><b>{escape(check.title[:1].upper() + check.title[1:])}</b>'
        f'<span class="mark is-{severity}">{severity}</span></div>'
        f'<p class="note">{count:,} in {groups or "the mixture"} · <code>{kind}</code> · {escape(check.remedy)}</p>'
        f"<table>{places}</table>{rest}</article>"
    )


# ----------------------------------------------------------------------------------------- samples of a group


def _group_section(report: Report, group: Group, tokenizer: Tokenizer) -> str:
    plan, scan, has_regions = report.plan, report.scans[group.name], False
    try:
        samples = [_with_near_place(sample, report) for sample in _first_samples(plan, group)]
        has_regions = any(sample.regions for sample in samples)
        cards = "".join(_card(sample, plan, tokenizer) for sample in samples)
    except ValueError as e:  # the transform does not suit the model, or a file vanished
        cards = f'<p class="note">{escape(report.near(str(e)))}</p>'
    shown = f'<div class="cards c2">{cards}</div>' if cards else '<p class="note">No usable record found.</p>'
    about = (
        f"{type(group.dataset).__name__}, {len(group.source):,} records, weight {group.weight:g}"
        f"{', one sample in every pack' if group.is_mandatory else ''}. The first samples of the training order."
    )
    return (
        f'<section id="group-{escape(group.name)}"><h2>{escape(group.name)}</h2><p class="note">{escape(about)}</p>'
        f"{_tokens(scan)}{_legend(has_regions)}{shown}</section>"
    )


def _tokens(scan: Scan) -> str:
    counts = token_counts(scan)
    if not counts:
        return ""
    head = "".join(f'<th class="n">{name}</th>' for name in counts)
    rows = "".join(
        f"<tr><td>{what}</td>"
        + "".join(f'<td class="n">{c[what]:,.0f}</td>' for c in counts.values())
        + "</tr>"
        for what in ("mean", "median", "p95", "max")
    )
    return f'<table class="groups tokens"><tr><th>tokens</th>{head}</tr>{rows}</table>'


def _legend(has_regions: bool) -> str:
    texts = (("given", "", "text that is given"), ("learnt", "", "text that is supervised"))
    regions = (
        ("line", f"outline-color:{PALETTE[0]}", "box"),
        ("", f"background:{PALETTE[1]}", "mask, in its anchor's colour"),
    )
    return legend(*texts, *(regions if has_regions else ()))


def _first_samples(plan: StreamPlan, group: Group) -> Iterator[Sample]:
    shown = 0
    for position in range(min(TRIES, len(group.source))):
        made = make_sample(plan, group, 0, position)
        if not isinstance(made, Reject):
            yield made
            shown += 1
        if shown == SAMPLES:
            return


def _with_near_place(sample: Sample, report: Report) -> Sample:
    return replace(sample, origin=replace(sample.origin, where=report.near(sample.origin.where)))


def _card(sample: Sample, plan: StreamPlan, tokenizer: Tokenizer) -> str:
    colour_of = {i: PALETTE[i % len(PALETTE)] for i in range(len(sample.regions))}
    rows: list[tuple[str, int, list[str]]] = []  # class of the row, branch, what stands in it
    place = 0
    while place < len(sample.segments):
        segment, copies = sample.segments[place], _copies_at(sample, place)
        if segment.kind == "text":
            row, part = "texts", _text(sample, place, tokenizer, colour_of)
        else:
            row, part = "pictures", _figure(sample, place, copies, plan, colour_of)
        if not rows or rows[-1][:2] != (row, segment.branch):
            rows.append((row, segment.branch, []))
        rows[-1][2].append(part)
        place += len(copies)
    drawn = "".join(f'<div class="{row}">{"".join(parts)}</div>' for row, _, parts in rows)
    origin = sample.origin
    about = f"{escape(sample.task)}, {num_tokens(sample, plan.layout):,} tokens"
    foot = f"<span>{about}</span><code>{escape(origin.where)}</code>"
    return f'<article class="card sample">{drawn}<div class="foot">{foot}</div></article>'


def _copies_at(sample: Sample, place: int) -> list[Segment]:
    """The segment, and those after it that are the same picture under other noise."""
    first = sample.segments[place]
    copies = [first]
    for other in sample.segments[place + 1 :]:
        same = first.kind == "gen_image" and other.kind == first.kind
        if not same or not torch.equal(other.pixels, first.pixels):
            break
        copies.append(other)
    return copies


def _figure(
    sample: Sample, place: int, copies: Sequence[Segment], plan: StreamPlan, colour_of: dict[int, str]
) -> str:
    segment = sample.segments[place]
    height, width = segment.pixels.shape[1:]
    regions = [(i, region) for i, region in enumerate(sample.regions) if region.image == place]
    image = _with_masks(segment, regions, colour_of)
    shown = image if max(image.size) <= SIDE else _smaller(image)
    boxes = [(i, box) for i, region in regions for box in region.boxes.tolist()]
    over = "".join(outline(_scaled(box, shown.size), colour_of[i]) for i, box in boxes)
    # A patch grid the model cannot take never gets here: `make_sample` refuses it.
    rows, cols = patch_grid(segment, plan.layout)
    facts = [ROLES[segment.kind], f"{width}×{height} px, {cols}×{rows} patches"]
    if segment.kind == "gen_image":
        times = ", ".join(f"{copy.timestep:.2f}" for copy in copies)
        facts.append(f"t = {times}" if len(copies) == 1 else f"{len(copies)} times, t = {times}")
    if segment.dropped:
        facts.append("<b>left out this time</b>")
    state = ' class="dropped"' if segment.dropped else ""
    what = f"{segment.kind} of {sample.origin.where}"
    return (
        f"<figure{state}>{picture(png(shown), shown.size, what, over=over)}"
        f"<figcaption>{'<br>'.join(facts)}</figcaption></figure>"
    )


def _with_masks(
    segment: Segment, regions: Sequence[tuple[int, Region]], colour_of: dict[int, str]
) -> Image.Image:
    pixels = segment.pixels.permute(1, 2, 0).numpy().astype(np.float32)
    for i, region in regions:
        if region.mask.numel():
            colour = np.array([int(colour_of[i][at : at + 2], 16) for at in (1, 3, 5)], np.float32)
            inside = region.mask.numpy().astype(bool)
            pixels[inside] = 0.4 * pixels[inside] + 0.6 * colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _smaller(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    width, height = image.size
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))))


def _scaled(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    return [v * side for v, side in zip(box, (*size, *size), strict=True)]


def _text(sample: Sample, place: int, tokenizer: Tokenizer, colour_of: dict[int, str]) -> str:
    segment = sample.segments[place]
    text = escape(tokenizer.decode(segment.ids, keep_special=True))
    for i, region in enumerate(sample.regions):
        if region.segment == place:
            token = escape(ANCHORS.get(region.head, ""))
            chip = f'<span class="anchor" style="--of:{colour_of[i]}">{region.head}: {escape(region.name)}</span>'
            text = text.replace(token, chip, 1) if token else text + chip
    role = "learnt" if segment.supervised else "given"
    end = '<span class="end" title="the end token is predicted too">end</span>' if segment.supervised else ""
    state = " dropped" if segment.dropped else ""
    left_out = " <b>left out this time</b>" if segment.dropped else ""
    return f'<p class="{role}{state}">{text}{end}{left_out}</p>'


# ------------------------------------------------------------------------------------------------- attention


def _attention(report: Report, tokenizer: Tokenizer) -> str:
    usable = tuple(group for group in report.plan.groups if report.scans[group.name].usable)
    plan = replace(report.plan, groups=usable, max_reject_fraction=1.0)
    try:
        stream = LaneStream(plan, LaneCursor(lane=0))
        samples = stream.next_samples()
    except ValueError as e:
        return f'<section id="attention"><h2>Attention</h2><p class="note">No pack: {escape(report.near(str(e)))}</p></section>'
    batch = pack(samples, plan.layout, plan.special, cursor=stream.cursor)
    image = attention_picture(batch)
    shown = picture(png(image), image.size, "attention of the first pack")
    colours = legend(
        *(("", f"background: rgb{colour}", f"{mode} split") for mode, colour in COLOURS.items()),
        ("", f"background: rgb{SEEN}", "splits before it, in the same sample"),
    )
    table = escape(report.near("\n".join(pack_lines(0, samples, batch, plan, tokenizer))))
    return (
        '<section id="attention"><h2>Attention of one pack</h2><p class="note">The first pack of lane 0: which token (across) '
        f"each token (down) sees; grey lines part the samples.</p>{colours}"
        f'<div class="attention">{shown}<pre>{table}</pre></div></section>'
    )
