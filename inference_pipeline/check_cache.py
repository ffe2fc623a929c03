"""Check that a trained model says through the KV cache what it says in the training forward, on samples of a mixture.

    python -m inference_pipeline.check_cache --model_path runs/quickstart/results_dir/model \
        --dataset_config_file configs/quickstart.yaml

In: a model directory and the mixture it was trained on. One pack goes through the training forward; then every sample of it is
read again, segment by segment, through the cache: the answers are forced to the true ones, the noised pictures are the pack's.
Out: a line per kind of prediction with the largest difference; exit code 1 if one is above `--tolerance`. Frames of a video are
pictures like others, unless a dataset class lets them see each other (`Segment.same_split`): such samples are left out, and told.
"""

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.layout import lay_out
from data.mixture import build_groups, load_mixture
from data.packing import pack
from data.policy import PackBudget
from data.stream import LaneStream, StreamPlan
from data.tokens import ANCHORS
from data.types import LaneCursor, Sample, Segment
from inference_pipeline.inferencer import Inferencer
from modeling.bagel.continuation import can_be_continued
from modeling.bagel.decode import Context, Decoder
from modeling.types import HeadOutput

Prediction = tuple[str, Tensor]
"""What is predicted (`logits`, `velocity`, `box`, `mask`), and the numbers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what was loaded, part by part
    try:
        model = Inferencer.from_model_dir(args.model_path, args.weights, args.device)
        samples, left_out = comparable(read_samples(args, model))
    except (ValueError, OSError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 1
    if left_out:
        print(
            f"{left_out} samples left out: frames of a video that see each other; the cache is given pictures one by one"
        )
    tasks = sorted({s.task for s in samples})
    print(f"{len(samples)} samples of {len(tasks)} tasks: {', '.join(tasks)}")
    found: dict[str, list[tuple[float, int]]] = {}
    for name, difference, count in differences(model.decoder, samples):
        found.setdefault(name, []).append((difference, count))
    good = bool(found)
    for name, rows in sorted(found.items()):
        largest, count = max(difference for difference, _ in rows), sum(n for _, n in rows)
        good &= (equal := largest <= args.tolerance)
        verdict = "equal" if equal else f"DIFFERENT: above {args.tolerance:g}"
        print(f"{name:<10} {count:>9,} numbers, largest difference {largest:.1e}  {verdict}")
    return 0 if good else 1


def read_samples(args: argparse.Namespace, model: Inferencer) -> list[Sample]:
    """The samples of one pack, as the trainer would read them."""
    budget = PackBudget(
        expected=args.expected_num_tokens,
        maximum=2 * args.expected_num_tokens,
        per_sample=args.expected_num_tokens,
        max_buffer=50,
    )
    plan = StreamPlan(
        groups=build_groups(load_mixture(args.dataset_config_file), model.tokenizer),
        layout=model.decoder.spec,
        special=model.decoder.special,
        budget=budget,
        seed=args.seed,
    )
    return LaneStream(plan, LaneCursor(lane=0)).next_samples()


def comparable(samples: Sequence[Sample]) -> tuple[list[Sample], int]:
    """The samples that can be read through the cache, and how many cannot."""
    found = [sample for sample in samples if can_be_continued(sample)]
    return found, len(samples) - len(found)


def differences(decoder: Decoder, samples: Sequence[Sample]) -> Iterator[tuple[str, float, int]]:
    """Per prediction of a pack: its kind, the largest |cached - trained| / max(1, |trained|) (infinite if any is not a number),
    and how many numbers.
    """
    trained = trained_predictions(decoder, samples)
    for sample in samples:
        for name, cached in cached_predictions(decoder, sample):
            want_name, want = next(trained)
            if (name, cached.shape) != (want_name, want.shape):
                raise AssertionError(f"{name} {tuple(cached.shape)} beside {want_name} {tuple(want.shape)}")
            error = (cached - want).abs() / want.abs().clamp(min=1)
            yield name, float(error.nan_to_num(nan=math.inf).max()) if len(error) else 0.0, want.numel()
    if (left := next(trained, None)) is not None:
        raise AssertionError(f"{left[0]} {tuple(left[1].shape)} has no cached counterpart")


@torch.no_grad()
def trained_predictions(decoder: Decoder, samples: Sequence[Sample]) -> Iterator[Prediction]:
    """One teacher-forced forward of the whole pack, cut into the predictions of each segment in turn."""
    batch = pack(samples, decoder.spec, decoder.special).to(decoder.device)
    output = decoder.model(batch, decoder.encoder(batch).noised)
    logits, velocity = iter(output.logits.float()), iter(output.velocity.float())
    regions = {name: iter(_each_region(output.heads[name])) for name in ANCHORS if name in output.heads}
    for sample in samples:
        for place, segment in enumerate(sample.segments):
            laid = lay_out(segment, decoder.spec, decoder.special)
            if len(laid.label_ids):
                yield "logits", torch.stack([next(logits) for _ in laid.label_ids])
            rows = laid.patch_hw[0] * laid.patch_hw[1]
            if segment.kind in ("cond_image", "gen_image") and rows:
                patches = torch.stack([next(velocity) for _ in range(rows)])
                if segment.kind == "gen_image":
                    yield "velocity", patches
            for head in _anchors(sample, place):
                yield head, next(regions[head])


@torch.inference_mode()
def cached_predictions(decoder: Decoder, sample: Sample) -> Iterator[Prediction]:
    """The same predictions through the cache: every segment behind what it may see, in the order of the sample."""
    noised = iter(_noised(decoder, sample))
    for place, segment in enumerate(sample.segments):
        if segment.dropped:
            continue
        before = [s for s in sample.segments[:place] if s.branch in (0, segment.branch)]
        context = decoder.start(1)
        for earlier in before:
            if earlier.kind != "gen_image":
                decoder.prefill(context, [earlier])
            # Nobody sees a noised picture, and what follows it takes its rotary position.
        if segment.kind == "text" and segment.supervised:
            yield from _forced(decoder, context, segment, _anchors(sample, place))
        elif segment.kind == "gen_image":
            h, w = segment.pixels.shape[1:]
            blank = decoder.blank_images(context, [(h, w)])
            yield "velocity", decoder.velocity(context, blank, next(noised), segment.timestep).float()


def _forced(
    decoder: Decoder, context: Context, segment: Segment, heads: Sequence[str]
) -> Iterator[Prediction]:
    """Let the model write, but take the true token whatever it says."""
    answer = iter([*segment.ids.tolist(), decoder.special.end])
    seen: list[Tensor] = []

    def teacher(logits: Tensor, sequences: Sequence[int]) -> Tensor:
        seen.append(logits[0])
        return torch.tensor([next(answer, decoder.special.end)])

    written = decoder.write(context, len(segment.ids) + 1, choose=teacher)
    yield "logits", torch.stack(seen)[: len(segment.ids) + 1]
    if heads:
        for name, found in decoder.perceive(context, written)[0]:
            (region,) = _each_region(found)
            yield name, region


def _anchors(sample: Sample, place: int) -> list[str]:
    """Heads that read a text's tokens, in the order of the tokens; what is read at a picture has no token to be cached."""
    found = [r for r in sample.regions if r.segment == place and r.head in ANCHORS]
    return [r.head for r in sorted(found, key=lambda r: r.token)]


def _each_region(found: HeadOutput) -> list[Tensor]:
    """A head's output, region by region: a box, or a mask's logits."""
    if found.mask_hw:
        return list(found.mask_logits.float().split([h * w for h, w in found.mask_hw]))
    return list(found.boxes.float())


def _noised(decoder: Decoder, sample: Sample) -> list[Tensor]:
    """Noised latents of each target picture."""
    batch = pack([sample], decoder.spec, decoder.special).to(decoder.device)
    rows = decoder.encoder(batch).noised.split([int(h * w) for h, w in batch.gen_hw.tolist()])
    pictures = [s for s in sample.segments if s.kind in ("cond_image", "gen_image") and not s.dropped]
    return [r for r, s in zip(rows, pictures, strict=True) if s.kind == "gen_image"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", type=Path, required=True, help="directory of a trained model")
    parser.add_argument("--dataset_config_file", type=Path, required=True)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--expected_num_tokens", type=int, default=4096, help="size of the pack")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of float32; larger models may need more"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    return parser


if __name__ == "__main__":
    sys.exit(main())
