"""Show what the trainer would see: packs as tables of segments, and who attends to whom as a picture.

    python -m data.inspect --dataset_config_file configs/quickstart.yaml --packs 1 --out pack.png

Reads the mixture and the configuration and tokenizer of a model directory; needs no weights.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from PIL import Image, ImageDraw

from data.layout import LayoutSpec, lay_out
from data.mixture import Group, build_groups, load_mixture
from data.packing import pack
from data.policy import POLICIES
from data.run_file import run_file_lines
from data.stdout import nobody_reads
from data.stream import LaneStream, StreamFlags, StreamPlan
from data.tokens import SpecialTokens, Tokenizer
from data.types import LaneCursor, PackedBatch, Region, Sample, Segment

COLOURS = {"causal": (66, 99, 180), "full": (46, 139, 87), "noise": (214, 110, 40)}
"""Of the attention picture, by the mode of the query's split."""

SEEN = (198, 208, 226)
"""What a query sees of the splits before its own."""

HEADER = ("tokens", "positions", "kind", "", "content")
WIDTHS = (13, 11, 18, 12)


def main(argv: Sequence[str] | None = None) -> int:
    """Print packs; returns the exit code."""
    try:
        args = parse_plan_args(_parser(), argv)
        plan, tokenizer = build_plan(args)
        stream = LaneStream(plan, LaneCursor(lane=args.lane))
        for number in range(args.packs):
            samples = stream.next_samples()
            batch = pack(samples, plan.layout, plan.special, cursor=stream.cursor)
            sys.stdout.writelines(f"{line}\n" for line in pack_lines(number, samples, batch, plan, tokenizer))
            sys.stdout.writelines(f"rejected: {reject.message}\n" for reject in stream.take_rejects())
            file = args.out if args.packs == 1 else args.out.with_stem(f"{args.out.stem}-{number}")
            attention_picture(batch).save(file)
            sys.stdout.write(f"attention pattern: {file}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
        return 1
    except (ValueError, OSError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    return 0


def build_plan(args: argparse.Namespace) -> tuple[StreamPlan, Tokenizer]:
    """What the command line describes."""
    tokenizer = Tokenizer(args.model_path)
    groups = build_groups(load_mixture(args.dataset_config_file), tokenizer, args.index_cache_dir)
    return stream_plan(args, groups, tokenizer), tokenizer


def stream_plan(args: argparse.Namespace, groups: tuple[Group, ...], tokenizer: Tokenizer) -> StreamPlan:
    """The plan of the flags that `add_plan_flags` adds."""
    layout = LayoutSpec.from_model_dir(args.model_path)
    return StreamPlan.from_flags(cast(StreamFlags, args), groups, layout, tokenizer.special)


def pack_lines(
    number: int, samples: Sequence[Sample], batch: PackedBatch, plan: StreamPlan, tokenizer: Tokenizer
) -> Iterator[str]:
    """The table of a pack, line by line."""
    maximum = plan.budget.maximum
    yield (
        f"pack {number} of lane {batch.cursor.lane}: {batch.num_tokens:,} of {maximum:,} tokens "
        f"({batch.num_tokens / maximum:.0%} full), {len(samples)} samples of {len(set(batch.tasks))} tasks"
    )
    yield _row(HEADER)
    start = 0
    for i, (sample, length) in enumerate(zip(samples, batch.sample_lens, strict=True)):
        origin = sample.origin
        place = f"group {origin.group}, position {origin.position}, {origin.where}"
        yield f"-- sample {i}: {sample.task} ({length} tokens) -- {place}"
        yield from _sample_lines(sample, start, batch, plan.layout, plan.special, tokenizer)
        start += length
    yield _totals(batch)


def _sample_lines(
    sample: Sample,
    start: int,
    batch: PackedBatch,
    layout: LayoutSpec,
    special: SpecialTokens,
    tokenizer: Tokenizer,
) -> Iterator[str]:
    for place, segment in enumerate(sample.segments):
        laid = lay_out(segment, layout, special)
        tokens = f"{start}-{start + laid.length - 1}" if laid.length else "-"
        position = batch.position[start : start + laid.length].tolist()
        positions = "-".join(str(p) for p in dict.fromkeys((position[0], position[-1]))) if position else "-"
        role = "dropped" if segment.dropped else "supervised" if segment.supervised else ""
        kind = f"{segment.kind}, branch {segment.branch}" if segment.branch else segment.kind
        yield _row((tokens, positions, kind, role, _content(segment, laid.patch_hw, tokenizer)))
        for region in sample.regions:
            if region.segment == place:
                yield _row(("", "", "", "", _region(region, start + laid.id_offset + region.token)))
        start += laid.length


def _content(segment: Segment, patch_hw: tuple[int, int], tokenizer: Tokenizer) -> str:
    if segment.kind == "text":
        return repr(tokenizer.decode(segment.ids, keep_special=True))
    height, width = segment.pixels.shape[1:]
    rows, cols = patch_hw
    timestep = f", t = {segment.timestep:.3f}" if segment.kind == "gen_image" else ""
    return f"{width}x{height} px, {cols}x{rows} patches{timestep}"


def _region(region: Region, anchor: int) -> str:
    box = "".join(" [" + ", ".join(f"{v:.3f}" for v in box) + "]" for box in region.boxes.tolist())
    mask = f" mask of {int(region.mask.sum())} px" if region.mask.numel() else ""
    return f"{region.head} at token {anchor}, segment {region.image}: {region.name!r}{box}{mask}"


def _row(cells: Sequence[str]) -> str:
    return ("  " + "".join(c.ljust(w) for c, w in zip(cells, WIDTHS, strict=False)) + cells[-1]).rstrip()


def _totals(batch: PackedBatch) -> str:
    tasks = ", ".join(f"{n} {task}" for task, n in Counter(batch.tasks).most_common())
    regions = ", ".join(f"{len(r.anchor)} {head}" for head, r in batch.regions.items()) or "no"
    noised = int((batch.gen_timestep > 0).sum())
    parts = (
        tasks,
        f"{len(batch.text_ids)} text and marker tokens ({len(batch.label_ids)} predicted)",
        f"{len(batch.und_patches)} ViT patches of {len(batch.und_hw)} images",
        f"{len(batch.gen_index)} latent patches of {len(batch.gen_hw)} images ({noised} noised)",
        f"{regions} regions",
    )
    return "total: " + "; ".join(parts)


def attention_picture(batch: PackedBatch, side: int = 1024) -> Image.Image:
    """Which key (across) each query (down) sees: blue causal, green full, orange noise, pale: earlier splits."""
    whole = max(1, side // max(1, batch.num_tokens))  # whole pixels per token, where there is room for them
    scale = whole if batch.num_tokens <= side else side / batch.num_tokens
    size = round(scale * batch.num_tokens)
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw = ImageDraw.Draw(image)

    def at(token: int) -> float:
        return round(token * scale)

    sample_ends = list(itertools.accumulate(batch.sample_lens))
    seen: list[tuple[int, int, int]] = []
    start, which = 0, 0
    for length, mode, branch in zip(batch.split_lens, batch.split_modes, batch.split_branches, strict=True):
        while start >= sample_ends[which]:
            which, seen = which + 1, []
        end = start + length
        for low, high, of in seen:
            if of in (0, branch):
                _fill(draw, at(low), at(start), at(high), at(end), SEEN)
        if mode == "causal":
            for token in range(start, end):
                _fill(draw, at(start), at(token), at(token + 1), at(token + 1), COLOURS[mode])
        else:
            _fill(draw, at(start), at(start), at(end), at(end), COLOURS[mode])
        if mode != "noise":
            seen.append((start, end, branch))
        start = end
    for end in sample_ends[:-1]:
        draw.line([(0, at(end)), (size, at(end))], fill=(150, 150, 150))
        draw.line([(at(end), 0), (at(end), size)], fill=(150, 150, 150))
    return image


def _fill(
    draw: ImageDraw.ImageDraw,
    left: float,
    top: float,
    right: float,
    bottom: float,
    colour: tuple[int, int, int],
) -> None:
    draw.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], fill=colour)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect", description="Show what the trainer would see of a mixture."
    )
    add_plan_flags(parser)
    parser.add_argument("--packs", type=int, default=1, help="how many packs to show")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pack.png"),
        help="PNG of the attention pattern (default: %(default)s)",
    )
    parser.add_argument("--lane", type=int, default=0, help="whose packs to show")
    return parser


def parse_plan_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line over those lines of its `--config` that `add_plan_flags` knows; the others are the trainer's own.

    Raises:
        ValueError: if the run file cannot be read.
    """
    argv = sys.argv[1:] if argv is None else argv
    first, plan = (argparse.ArgumentParser(add_help=False, allow_abbrev=False) for _ in range(2))
    first.add_argument("--config", type=Path)
    run_file = first.parse_known_args(argv)[0].config
    add_plan_flags(plan)
    known = vars(plan.parse_args(["--dataset_config_file", ""]))
    lines = run_file_lines(run_file) if run_file else ()
    given = ((key.replace("-", "_"), value) for _, key, value in lines)
    return parser.parse_args([*(f"--{key}={value}" for key, value in given if key in known), *argv])


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The trainer's flags that decide which packs come, under its names; the limits are those of the quickstart."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run file of the trainer with any of these flags"
    )
    parser.add_argument("--dataset_config_file", type=Path, required=True, help="the mixture YAML")
    parser.add_argument(
        "--model_path", type=Path, default=Path("runs/quickstart/base"), help="a model directory"
    )
    parser.add_argument("--index_cache_dir", default="", help="directory for the indexes of the data")
    parser.add_argument("--num_lanes", type=int, default=48)
    parser.add_argument("--data_seed", type=int, default=42)
    parser.add_argument("--expected_num_tokens", type=int, default=4096)
    parser.add_argument("--max_num_tokens", type=int, default=4608)
    parser.add_argument("--max_num_tokens_per_sample", type=int, default=1024)
    parser.add_argument("--max_attention_pairs", type=int, default=0)
    parser.add_argument("--max_buffer_size", type=int, default=50)
    parser.add_argument("--packer", choices=POLICIES, default="conserving")
    parser.add_argument("--prefer_buffer_before", type=int, default=16384)
    for condition in ("text", "vit", "vae"):
        parser.add_argument(f"--{condition}_cond_dropout_prob", type=float, default=0.0)
    parser.add_argument("--timestep_shift", type=float, default=1.0)
    parser.add_argument("--max_reject_fraction", type=float, default=0.001)


if __name__ == "__main__":
    sys.exit(main())
