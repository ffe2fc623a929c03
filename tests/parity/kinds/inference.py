"""Cached prefill, greedy text, guided sampling, and the whole chain from pictures to pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.layout import LayoutSpec
from data.tokens import SpecialTokens
from data.transforms.image import ImageTransform
from data.types import PackedBatch, Segment
from inference_pipeline.inferencer import AS_PUBLISHED, Inferencer, Prompt
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.choice import likeliest
from modeling.bagel.decode import Context, Decoder, DrawOptions
from modeling.ops.patch import normalise_pixels, patchify_latent, unpatchify_latent
from modeling.types import FlowState
from tests.parity.comparison import Comparison
from tests.parity.kinds.models import build_autoencoder, build_model

TOLERANCE, LATENT_TOLERANCE, PIXEL_TOLERANCE = 1e-5, 3e-5, 2e-5
MARGIN_TOLERANCE = 1e-4
"""Measured: 1.7e-5. The margin is a hundredth of the logits that it is the difference of, whose own rounding is 1e-5 of it."""

Json = Mapping[str, Any]


class GivenLatents:
    """Stands where the VAE encoder stands, and gives each clean image the latent that the case recorded, by its seed."""

    def __init__(self, patch: int, channels: int):
        self.patch, self.channels = patch, channels
        self.latents: list[Tensor] = []

    def seed(self, latent: Tensor) -> int:
        """The `noise_seed` under which `z h w` will be found."""
        self.latents.append(latent)
        return len(self.latents) - 1

    def __call__(self, batch: PackedBatch) -> FlowState:
        rows = [torch.zeros(0, self.channels * self.patch**2)]
        for seed, (h, w) in zip(batch.gen_seed.tolist(), batch.gen_hw.tolist(), strict=True):
            latent = (
                self.latents[seed]
                if self.latents
                else torch.zeros(self.channels, h * self.patch, w * self.patch)
            )
            rows.append(patchify_latent(latent[:, : h * self.patch, : w * self.patch], self.patch))
        clean = torch.cat(rows)
        return FlowState(latents=clean, noise=torch.zeros_like(clean), noised=clean)


class RecordingDecoder(Decoder):
    """A decoder that remembers every pack it made, the logits it chose from and the times it asked a velocity for (once per
    context in use), and starts its images from given noise where there is some.
    """

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.packed: list[PackedBatch] = []
        self.logits: list[Tensor] = []
        self.noise: Tensor | None = None
        self.times: list[float] = []

    def _pack(self, context: Context, segments: Sequence[Segment]) -> PackedBatch:
        self.packed.append(super()._pack(context, segments))
        return self.packed[-1]

    def write(self, context, max_new_tokens, choose=likeliest, writes=None):  # type: ignore[no-untyped-def]
        def remember(logits: Tensor, sequences: Sequence[int]) -> Tensor:
            self.logits.append(logits)
            return choose(logits, sequences)

        return super().write(context, max_new_tokens, remember, writes)

    def _velocities(self, context, batch, options):  # type: ignore[no-untyped-def]
        velocity = super()._velocities(context, batch, options)

        def remember(x: Tensor, t: float) -> Tensor:
            self.times.append(t)
            return velocity(x, t)

        return remember

    def denoise(self, contexts, batches, x, options, watch=None) -> Tensor:  # type: ignore[no-untyped-def]
        return super().denoise(contexts, batches, x if self.noise is None else self.noise, options, watch)


class Case:
    """A case with its model, ready to run."""

    def __init__(self, folder: Path):
        model_dir = folder.parent / "model"
        self.config = json.loads((model_dir / "config.json").read_text())
        self.model: Bagel = build_model(self.config, load_file(model_dir / "weights.safetensors")).eval()
        self.model.requires_grad_(False)
        self.facts = json.loads((folder / "inputs.json").read_text())
        tensors = folder / "inputs.safetensors"
        self.inputs = load_file(tensors) if tensors.is_file() else {}
        self.expected = load_file(folder / "expected.safetensors")
        self.latents = GivenLatents(self.config["latent_patch_size"], self.config["vae_config"]["z_channels"])
        self.stride = self.config["vae_config"]["downsample"] * self.config["latent_patch_size"]
        self.decoder = self._decoder(self.config["special_tokens"]["eos_token_id"])
        self.answers = json.loads((folder / "expected.json").read_text())
        self.model_dir = model_dir
        self.found = Comparison()

    def autoencoder(self) -> AutoEncoder:
        """The VAE of the whole chain."""
        return build_autoencoder(
            json.loads((self.model_dir / "vae_config.json").read_text()),
            load_file(self.model_dir / "ae.safetensors"),
        )

    def _decoder(self, end: int) -> "RecordingDecoder":
        ids = self.config["special_tokens"]
        special = SpecialTokens(
            begin=ids["bos_token_id"],
            end=end,
            image_start=ids["start_of_image"],
            image_end=ids["end_of_image"],
            anchors={},
        )
        spec = LayoutSpec(
            vit_patch_size=self.config["vit_config"]["patch_size"],
            vit_positions_per_side=self.config["vit_max_num_patch_per_side"],
            latent_stride=self.stride,
            latent_positions_per_side=self.config["max_latent_size"],
            interpolate_pos=self.config["interpolate_pos"],
        )
        return RecordingDecoder(self.model, self.latents, spec, special)  # type: ignore[arg-type]

    def context(self, ops: Sequence[Json], batch: int, prefix: str = "") -> Context:
        """Prefill one operation after the other."""
        context = self.decoder.start(batch)
        for i, op in enumerate(ops):
            past = tuple(context.cache.lens)
            self.decoder.prefill(context, self._segments(op))
            self.compare_layout(self.decoder.packed[-1], past, f"{prefix}op{i}")
            if "context_after_op" in self.answers:
                self.compare_counters(context, f"op{i}", self.answers["context_after_op"][i])
        return context

    def compare_layout(self, batch: PackedBatch, past: Sequence[int], prefix: str) -> None:
        """What goes in at one step behind `past` tokens of each sequence: ids, positions, places, lengths."""
        held, new = _merged_places(past, batch.sample_lens)
        if prefix == "start":  # the published loop makes room for each token later
            held = torch.arange(sum(past))
        is_text = not len(batch.und_index) and not len(batch.gen_index)
        ours = {
            "key_values_lens": torch.tensor(past, dtype=torch.int32),
            "cfg_key_values_lens": torch.tensor(past, dtype=torch.int32),
            "packed_key_value_indexes": held,
            "cfg_packed_key_value_indexes": held,
            "packed_indexes": new,
            "cfg_packed_query_indexes": new,
            "packed_text_indexes": new if is_text else batch.text_index,
            "packed_timesteps": batch.gen_timestep.unique().long(),
            "packed_start_tokens": batch.text_ids,
            "packed_query_position_ids": batch.position,
            "packed_text_ids": batch.text_ids,
            "packed_position_ids": batch.position,
            "packed_text_position_ids": batch.position,  # of a step with text only
            "cfg_packed_position_ids": batch.position,
            "packed_vit_position_ids": batch.und_position,
            "packed_vae_position_ids": batch.gen_position,
            "packed_vae_token_indexes": batch.gen_index,
            "packed_vit_token_indexes": batch.und_index,
            "packed_seqlens": torch.tensor(batch.sample_lens, dtype=torch.int32),
            "text_token_lens": torch.tensor(batch.sample_lens, dtype=torch.int32),
            "vit_token_seqlens": batch.und_hw.prod(1).int(),
        }
        for name, value in ours.items():
            if (theirs := self.expected.get(f"{prefix}/{name}")) is not None:
                self.found.equal(f"{prefix}/{name}", value, theirs)

    def compare_counters(self, context: Context, name: str, theirs: Json) -> None:
        """How many tokens each sequence holds, and where its rotary positions stand."""
        self.found.equal(f"{name}/kv_lens", context.cache.lens, theirs["kv_lens"])
        self.found.equal(f"{name}/rope", context.position, theirs["rope"])

    def _segments(self, op: Json) -> list[Segment]:
        if op["op"] == "text":
            return [Segment(kind="text", ids=torch.tensor(ids, dtype=torch.int64)) for ids in op["ids"]]
        if op["op"] == "vit":
            return [Segment(kind="und_image", pixels=self.inputs[name]) for name in op["images"]]
        latents = self.inputs[op["padded_latent"]]
        return [
            Segment(
                kind="cond_image",
                pixels=torch.zeros(3, h, w, dtype=torch.uint8),
                noise_seed=self.latents.seed(z),
            )
            for (h, w), z in zip(op["image_sizes"], latents, strict=True)
        ]

    def compare_cache(self, context: Context, prefix: str) -> None:
        """Keys and values of every layer, sequence after sequence."""
        for layer, held in enumerate(context.cache.layers):
            for name, cache in zip(("key", "value"), held or (), strict=False):
                ours = torch.cat([c[:n] for c, n in zip(cache, context.cache.lens, strict=True)])
                self.found.close(
                    f"{prefix}/{name}.{layer}",
                    ours,
                    self.expected[f"{prefix}/{name}_cache.{layer}"],
                    TOLERANCE,
                )

    def write(self, context: Context, steps: int, end: int | None) -> tuple[list[list[int]], Tensor]:
        """Greedy tokens of each sequence (without begin and end) and the logits of every step, `steps b vocab`.

        `end` stops the answer; None: the prompts' end token, which no case without an end of its own writes.
        """
        decoder = self.decoder if end is None else self._decoder(end)
        past, before = tuple(context.cache.lens), len(decoder.packed)
        texts = decoder.write(context, steps - 1)
        self.compare_layout(decoder.packed[before], past, "start")
        return [t.ids for t in texts], torch.stack([s for s in decoder.logits if len(s) == len(texts)])


def _merged_places(past: Sequence[int], new: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where cached and new tokens stand in the published cache, which is one sequence: past, new, past, new, and so on."""
    parts = torch.arange(sum(past) + sum(new)).split(
        [n for both in zip(past, new, strict=True) for n in both]
    )
    return torch.cat(parts[::2]), torch.cat(parts[1::2])


def run(folder: Path) -> Comparison:
    """Whatever the case records."""
    case = Case(folder)
    with torch.inference_mode():
        RUNNERS[case.facts["kind"]](case)
    return case.found


def run_text(case: Case) -> None:
    """Caches after the prompt, tokens, logits of every step."""
    context = case.context(case.facts["ops"], case.facts["batch"])
    case.compare_cache(context, "prefill")
    generated, theirs = case.expected["generated"], case.expected["step_logits"]
    ids, logits = case.write(context, case.facts["max_length"], case.facts["end_token_id"])
    case.found.equal("generated", ids, [column[1:].tolist() for column in generated.T])
    case.found.equal("generated (JSON)", ids, [row[1:] for row in case.answers["generated"]])
    case.found.close("step_logits", logits[: len(theirs)], theirs, TOLERANCE)
    compare_margin(case, logits[: len(theirs)])
    last = logits[len(theirs) - 1].argmax(-1).tolist()
    case.found.equal("argmax_of_last_step", last, case.answers["argmax_of_last_step"])
    held = sum(context.cache.lens) - len(ids)  # the published loop does not keep the end token
    case.found.equal("kv_len_after_generation", held, case.answers["kv_len_after_generation"])


def compare_margin(case: Case, logits: Tensor) -> None:
    """How near the second likeliest token came to being chosen."""
    first, second = logits.topk(2).values.unbind(-1)
    theirs = torch.tensor(case.answers["min_top1_top2_margin"])
    case.found.close("min_top1_top2_margin", (first - second).min(), theirs, MARGIN_TOLERANCE)


def run_image(case: Case) -> None:
    """Caches of the three contexts, every step's latents and guided velocity, the latents at the end."""
    batch = case.facts["batch"]
    contexts = {name: case.context(ops, batch, f"{name}/") for name, ops in case.facts["contexts"].items()}
    for name, context in contexts.items():
        case.compare_counters(context, name, case.answers[f"context_{name}"])
        if max(context.cache.lens):
            case.compare_cache(context, f"{name}_prefill")
    options = _options(case.facts["params"])
    sizes = [(h, w) for h, w in case.facts["image_sizes"]]
    latents = _denoise(case, contexts, sizes, options)
    grids = [(h // case.stride, w // case.stride) for h, w in sizes]
    for i, (ours, grid) in enumerate(zip(latents.split([h * w for h, w in grids]), grids, strict=True)):
        latent = unpatchify_latent(ours, *grid, case.latents.patch)[None]
        for name, value in (("final_latent_tokens", ours), ("final_latent_chw", latent)):
            case.found.close(f"{name}.{i}", value, case.expected[f"{name}.{i}"], LATENT_TOLERANCE)


def _denoise(
    case: Case, contexts: Mapping[str, Context], sizes: Sequence[tuple[int, int]], options: DrawOptions
) -> Tensor:
    names = {"gen": "query", "cfg_text": "query_cfg_text", "cfg_img": "query_cfg_img"}
    batches = [case.decoder.blank_images(contexts[name], sizes) for name in names]
    for (name, theirs), batch in zip(names.items(), batches, strict=True):
        case.compare_layout(batch, tuple(contexts[name].cache.lens), theirs)
    chosen = [contexts[name] for name in names][: options.num_contexts]
    used = batches[: len(chosen)]
    case.found.equal(
        "packed_init_noises", case.inputs["init_noise"], case.expected["query/packed_init_noises"]
    )
    steps: list[tuple[float, Tensor, Tensor]] = []
    x = case.decoder.denoise(chosen, used, case.inputs["init_noise"], options, lambda *s: steps.append(s))
    for i, (t, x_t, v_t) in enumerate(steps if "x_t" in case.expected else []):
        case.found.close(f"timestep.{i}", torch.tensor(t), case.expected["timesteps"][i], TOLERANCE)
        case.found.close(f"x_t.{i}", x_t, case.expected["x_t"][i], LATENT_TOLERANCE)
        case.found.close(f"v_t.{i}", v_t, case.expected["v_t"][i], LATENT_TOLERANCE)
    scales = case.answers["cfg_scales_used_per_step"]
    asked = [replace(options, cfg_text_scale=t, cfg_img_scale=i).num_contexts for t, i in scales]
    case.found.equal("contexts_used_per_step", [case.decoder.times.count(t) for t, *_ in steps], asked)
    # A step without guidance has no scale; what is recorded of it says no more than that.
    guided = [scale for scale, contexts in zip(scales, asked, strict=True) if contexts > 1]
    ours = [[options.cfg_text_scale, options.cfg_img_scale]] * len(guided)
    case.found.equal("cfg_scales_used_per_step", ours, guided)
    return x


def _options(params: Json) -> DrawOptions:
    return DrawOptions(
        num_timesteps=params["num_timesteps"],
        timestep_shift=params.get("timestep_shift", 3.0),
        cfg_text_scale=params["cfg_text_scale"],
        cfg_img_scale=params["cfg_img_scale"],
        cfg_interval=tuple(params.get("cfg_interval", (0.4, 1.0))),
        cfg_renorm_min=params.get("cfg_renorm_min", 0.0),
        cfg_renorm_type=params.get("cfg_renorm_type", "global"),
        renorm_whole_batch=True,
        taylorseer=params.get("enable_taylorseer", False),
    )


class GivenTokens:
    """Stands where the tokenizer stands: the ids that the case recorded for its texts, and ids written as text."""

    def __init__(self, items: Sequence[Json]):
        self.ids = {item["text"]: item["ids"] for item in items if "text" in item}

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.ids[text], dtype=torch.int64)

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return " ".join(map(str, ids))


class RecordingVae:
    """Stands where the VAE and its encoder stand: the real one with the recorded noise, and what went through it."""

    def __init__(self, vae: AutoEncoder, patch: int, noise: Sequence[Tensor]):
        self.patch, self.vae, self.noise = patch, self, noise
        self.real = vae
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.decoded: list[tuple[Tensor, Tensor]] = []

    def __call__(self, batch: PackedBatch) -> FlowState:
        rows = [torch.zeros(0, self.real.config.z_channels * self.patch**2)]
        for key, pixels in zip(batch.gen_key.tolist(), batch.gen_pixels, strict=True):
            if key not in self.seen:
                values = normalise_pixels(pixels)[None]
                self.seen[key] = (values, self.real.encode(values, self.noise[len(self.seen)]))
            rows.append(patchify_latent(self.seen[key][1][0], self.patch))
        clean = torch.cat(rows)
        return FlowState(latents=clean, noise=torch.zeros_like(clean), noised=clean)

    def decode(self, latent: Tensor) -> Tensor:
        self.decoded.append((latent, self.real.decode(latent)))
        return self.decoded[-1][1]


def run_chain(case: Case) -> None:
    """Pictures and texts in, an answer or a picture out, through the inferencer, which reads as the published one does."""
    params, facts = case.facts["params"], case.facts
    vae = RecordingVae(
        case.autoencoder(), case.latents.patch, [case.inputs[name] for name in facts["vae_encode_noise"]]
    )
    decoder = RecordingDecoder(case.model, vae, case.decoder.spec, case.decoder.special)
    inferencer = Inferencer(
        decoder,
        GivenTokens(facts["inputs"]),  # type: ignore[arg-type]
        _transform(facts["vit_transform"]),
        _transform(facts["vae_transform"]),
        AS_PUBLISHED,
    )
    parts = [
        item["text"] if "text" in item else Image.fromarray(case.inputs[item["image"]].numpy())
        for item in facts["inputs"]
    ]
    prompt = Prompt(parts=tuple(parts))
    if params.get("understanding_output", False):
        (answer,) = inferencer.answer([prompt], params["max_think_token_n"] - 1)
        case.found.equal(
            "generated", [int(word) for word in answer.text.split()], case.answers["generated"][1:]
        )
        theirs = case.expected["step_logits"]
        logits = torch.stack(decoder.logits)[: len(theirs)]
        case.found.close("step_logits", logits, theirs, TOLERANCE)
        compare_margin(case, logits)
        return
    decoder.noise = case.inputs["init_noise"]
    height, width = params.get("image_shapes", (None, None))
    (drawn,) = inferencer.generate([prompt], _options(params), height=height, width=width)
    for i, (values, latent) in enumerate(vae.seen.values()):
        case.found.close(f"vae_input.{i}", values, case.expected[f"vae_input.{i}"], PIXEL_TOLERANCE)
        case.found.close(f"vae_encoded.{i}", latent, case.expected[f"vae_encoded.{i}"], TOLERANCE)
    ((latent, pixels),) = vae.decoded
    case.found.close("final_latent", latent, case.expected["final_latent_chw"], LATENT_TOLERANCE)
    case.found.close("decoded_pixels", pixels, case.expected["decoded_pixels"], PIXEL_TOLERANCE)
    theirs = case.expected["final_image_uint8_hwc"].int()
    off = (torch.from_numpy(np.array(drawn.image)).int() - theirs).abs().max()
    case.found.equal("final_image (one level)", bool(off <= 1), True)


def _transform(parameters: Json) -> ImageTransform:
    return ImageTransform(
        max_image_size=parameters["max_image_size"],
        min_image_size=parameters["min_image_size"],
        stride=parameters["image_stride"],
    )


RUNNERS: Mapping[str, Callable[[Case], None]] = {"text": run_text, "image": run_image, "e2e": run_chain}
