"""Inference on a KV cache: the same layout, embedding and layers as training, one segment at a time.

A `Context` is a batch of sequences that grow together. `Decoder.prefill` appends one segment to each; `write` lets the model
write text; `draw` samples images; `perceive` reads the boxes and masks of anchors that the model wrote. Sequences of one batch
never influence each other: each stops on its own end token, and guidance is renormalised per image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from data.layout import LayoutSpec, lay_out
from data.packing import pack
from data.tokens import SpecialTokens
from data.types import PackedBatch, RegionBatch, Sample, Segment
from modeling.bagel.bagel import Bagel
from modeling.bagel.choice import Choose, likeliest
from modeling.bagel.forecast import Forecast
from modeling.bagel.latents import LatentEncoder
from modeling.ops.attention import masked_attention
from modeling.ops.flow import sampling_times, seeded_noise
from modeling.ops.patch import unpatchify_latent
from modeling.types import FeatureGrids, HeadOutput, ModelOutput


class KVCache:
    """Keys and values of every layer, `b capacity g e`, padded to the longest sequence.

    Attributes:
        lens: tokens each sequence holds; what lies behind is scratch space.
        layers: keys and values of each layer, None before the first write.
    """

    def __init__(self, num_layers: int, batch_size: int):
        self.lens = [0] * batch_size
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def write(
        self, layer: int, at: tuple[Tensor, Tensor], needed: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put packed `s g e` keys and values at (sequence, place) and return all `needed` first places, `b needed g e`."""
        held = self.layers[layer]
        capacity = held[0].shape[1] if held is not None else 0
        if needed > capacity:
            grown = [k.new_zeros(len(self.lens), max(needed, 2 * capacity), *k.shape[1:]) for _ in range(2)]
            for new, old in zip(grown, held or (), strict=False):
                new[:, :capacity] = old
            held = self.layers[layer] = (grown[0], grown[1])
        assert held is not None
        held[0][at], held[1][at] = k, v
        return held[0][:, :needed], held[1][:, :needed]


class CachedAttention:
    """Attention of new tokens over the cache and themselves; the model's `attend` at inference.

    Args:
        cache: written to, but not advanced.
        lens: new tokens of each sequence, packed in order.
        causal: new tokens see each other causally (text) or all (an image).
        device: of the model.
    """

    def __init__(self, cache: KVCache, lens: Sequence[int], *, causal: bool, device: torch.device):
        new, past = torch.tensor(lens, device=device), torch.tensor(cache.lens, device=device)
        self.cache, self.needed = cache, int((new + past).max())
        longest = max(int(new.max()), 1)
        place = torch.arange(longest, device=device)
        valid = place[None] < new[:, None]
        sequence, self.place = valid.nonzero(as_tuple=True)
        self.sequence = sequence
        self.target = (sequence, past[sequence] + self.place)
        # Padded queries may look at the first key, so that no row is empty.
        limit = past[:, None] + (place[None] + 1 if causal else new[:, None].expand(-1, longest))
        keys = torch.arange(self.needed, device=device)
        self.allowed = (keys[None, None] < limit.clamp(min=1)[:, :, None])[:, None]
        self.shape = (len(lens), longest)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.write(layer, self.target, self.needed, k, v)
        padded = q.new_zeros(*self.shape, *q.shape[1:])
        padded[self.sequence, self.place] = q
        out = masked_attention(
            padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), self.allowed
        )
        return out.transpose(1, 2)[self.sequence, self.place]


@dataclass(slots=True)
class Context:
    """A batch of sequences: what the cache holds, rotary counters, and each sequence's last picture (grids, which of them)."""

    cache: KVCache
    position: list[int]
    seen: list[tuple[FeatureGrids, int] | None]


@dataclass(frozen=True, slots=True)
class Written:
    """Text of one sequence: its `ids` without begin and end, and the states of the anchors in it as (head, `d`), in order."""

    ids: list[int]
    anchors: list[tuple[str, Tensor]]
    finished: bool


Renorm = Literal["global", "channel", "text_channel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """How images are sampled. Times run from 1 (noise) to 0 (data); guidance acts where `lo < t <= hi` of `cfg_interval`.

    Nothing is guided while `cfg_text_scale` is at most 1, whatever `cfg_img_scale` says, as published.

    `renorm_whole_batch`: the `global` norm runs over all images of a batch, as in the published code, not over each; what an
    image becomes then depends on its neighbours.
    `taylorseer`: most steps forecast the trunk's last state instead of computing it (`Forecast`): of the 49 steps between 50
    times, 19 are computed. The images differ a little.
    """

    num_timesteps: int = 50
    timestep_shift: float = 1.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: Renorm = "global"
    renorm_whole_batch: bool = False
    taylorseer: bool = False

    def __post_init__(self) -> None:
        if self.cfg_renorm_type not in get_args(Renorm):
            raise ValueError(
                f"cfg_renorm_type must be one of {', '.join(get_args(Renorm))}, not '{self.cfg_renorm_type}'"
            )
        if self.num_timesteps < 2:
            raise ValueError(
                f"num_timesteps counts both ends, so it must be at least 2, not {self.num_timesteps}"
            )

    @property
    def num_contexts(self) -> int:
        """How many contexts the velocity is made of: with everything; without the last text; without images."""
        if self.cfg_text_scale <= 1:
            return 1
        return 2 if self.cfg_img_scale <= 1 else 3


PUBLISHED_RECIPES: Mapping[str, DrawOptions] = {
    "t2i": DrawOptions(timestep_shift=3.0, cfg_text_scale=4.0, cfg_interval=(0.4, 1.0)),
    "edit": DrawOptions(
        timestep_shift=3.0, cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_renorm_type="text_channel"
    ),
    "interleaved": DrawOptions(
        timestep_shift=3.0, cfg_text_scale=3.0, cfg_img_scale=1.5, cfg_interval=(0.4, 1.0)
    ),
}
"""What upstream Bagel 056b5fd recommends for drawing and for editing, and the defaults of its inferencer."""


class Decoder:
    """Runs a trained model on contexts.

    The model may be one that is being trained, in pieces over ranks: nothing here is computed in inference mode, whose tensors no
    later backward pass could use.

    Args:
        model: in eval mode.
        encoder: the VAE and its latent patches.
        spec, special: layout and tokens of the model directory.
        device: where it computes; None: where its weights are.
    """

    def __init__(
        self,
        model: Bagel,
        encoder: LatentEncoder,
        spec: LayoutSpec,
        special: SpecialTokens,
        device: torch.device | None = None,
    ):
        self.model, self.encoder, self.spec, self.special = model, encoder, spec, special
        self.device = device or model.language_model.lm_head.weight.device

    def start(self, batch_size: int) -> Context:
        """An empty context of so many sequences."""
        cache = KVCache(self.model.config.llm.num_hidden_layers, batch_size)
        return Context(cache, [0] * batch_size, [None] * batch_size)

    def read(self, prompts: Sequence[Sequence[Segment]]) -> Context:
        """A context that holds every prompt's segments.

        In each round, those whose next segment is of the same kind go on and the others sit out.
        """
        context = self.start(len(prompts))
        at = [0] * len(prompts)
        while waiting := [i for i, prompt in enumerate(prompts) if at[i] < len(prompt)]:
            kind = prompts[waiting[0]][at[waiting[0]]].kind
            going = [i for i in waiting if prompts[i][at[i]].kind == kind]
            round_ = [Segment(kind="text", dropped=True)] * len(prompts)
            for i in going:
                round_[i] = prompts[i][at[i]]
                at[i] += 1
            self.prefill(context, round_)
        return context

    @torch.no_grad()
    def prefill(self, context: Context, segments: Sequence[Segment]) -> ModelOutput:
        """Append one segment to every sequence.

        Args:
            context: grows in place.
            segments: one per sequence. A `dropped` one leaves its sequence as it is (an image leaves its gap of one position);
                the others are all of one kind, and none is a `gen_image`.

        Returns:
            the model's output for the new tokens; logits at supervised text.

        Raises:
            ValueError: if the segments are of several kinds or more or fewer than the sequences.
        """
        kinds = {s.kind for s in segments if not s.dropped}
        if len(segments) != len(context.position) or len(kinds) > 1 or "gen_image" in kinds:
            raise ValueError(
                f"{len(segments)} segments of kinds {sorted(kinds)} for {len(context.position)} sequences; prompts of one batch "
                "need their pictures and texts in the same order"
            )
        batch = self._pack(context, segments)
        output = self._run(context, batch, self.encoder(batch).noised, causal=kinds <= {"text"})
        if "und_image" in kinds:
            shown = [i for i, s in enumerate(segments) if not s.dropped]
            for number, i in enumerate(shown):
                context.seen[i] = (output.grids, number)
        self._advance(context, segments)
        return output

    @torch.no_grad()
    def write(
        self,
        context: Context,
        max_new_tokens: int,
        choose: Choose = likeliest,
        writes: Sequence[bool] | None = None,
    ) -> list[Written]:
        """Let every sequence write one text, begin token to end token; both stay in the context, as in training.

        Args:
            context: grows in place.
            max_new_tokens: most tokens between begin and end (the published `max_length` counts the begin token too).
            choose: logits of the sequences that still write -> their next ids.
            writes: which sequences write; the others stay as they are (None: all write).

        Returns:
            one text per sequence, empty where none was written.
        """
        size = len(context.position)
        head_of = {token: head for head, token in self.special.anchors.items() if head in self.model.heads}
        offset = self.model.config.head_reads
        ids: list[list[int]] = [[] for _ in range(size)]
        anchors: list[list[tuple[str, Tensor]]] = [[] for _ in range(size)]
        finished = [False] * size
        feed: list[int | None] = [self.special.begin if w else None for w in writes or [True] * size]
        while any(token is not None for token in feed):
            segments = [
                Segment(
                    kind="text",
                    dropped=t is None,
                    bare=True,
                    ids=torch.tensor([t] if t is not None else []).long(),
                )
                for t in feed
            ]
            batch = self._pack(context, segments)
            batch = replace(batch, label_index=torch.arange(batch.num_tokens, device=self.device))
            output = self._run(context, batch, self.encoder(batch).noised, causal=True)
            self._advance(context, segments)
            alive = [i for i, t in enumerate(feed) if t is not None]
            chosen = choose(output.logits.float(), alive).tolist()
            for row, i in enumerate(alive):
                fed, token = feed[i], chosen[row]
                if offset == "self" and fed in head_of:
                    anchors[i].append((head_of[fed], output.hidden[row]))
                if fed == self.special.end:
                    feed[i] = None
                    continue
                if token == self.special.end or len(ids[i]) == max_new_tokens:
                    finished[i] = token == self.special.end
                    feed[i] = self.special.end
                    continue
                if offset == "previous" and token in head_of:
                    anchors[i].append((head_of[token], output.hidden[row]))
                ids[i].append(token)
                feed[i] = token
        return [Written(*row) for row in zip(ids, anchors, finished, strict=True)]

    @torch.no_grad()
    def perceive(self, context: Context, written: Sequence[Written]) -> list[list[tuple[str, HeadOutput]]]:
        """Boxes and masks of the anchors each sequence wrote, about the picture it saw last; none without a picture."""
        results: list[list[tuple[str, HeadOutput]]] = [[] for _ in written]
        for i, (text, seen) in enumerate(zip(written, context.seen, strict=True)):
            if seen is None:
                continue
            grids, number = seen
            image = torch.tensor([number], device=self.device)
            found: dict[str, Iterator[HeadOutput]] = {}
            for head in dict.fromkeys(name for name, _ in text.anchors):
                # All anchors of a head at once: an image encoder inside it sees the picture once.
                hidden = torch.stack([state for name, state in text.anchors if name == head])
                module = self.model.heads[head]
                # A model in pieces gives float32 whatever it computes in; a head on its own is given what its weights are.
                dtype = next(module.parameters()).dtype
                floats = replace(grids, values=grids.values.to(dtype), states=grids.states.to(dtype))
                of_each = image.expand(len(hidden))
                regions = RegionBatch.unknown(of_each, of_each)
                inputs = self.model.head_inputs(hidden.to(dtype), regions, floats)
                found[head] = iter(module(inputs).each())
            results[i] = [(head, next(found[head])) for head, _ in text.anchors]
        return results

    @torch.no_grad()
    def velocity(self, context: Context, batch: PackedBatch, noised: Tensor, t: float) -> Tensor:
        """Velocity `l (p p z)` of noised images at time `t` behind a context, which is left as it was."""
        return self._behind(context, batch, noised, t).velocity

    def blank_images(self, context: Context, sizes: Sequence[tuple[int, int]]) -> PackedBatch:
        """Target images of `(height, width)` pixels laid out behind a context."""
        blanks = [
            Segment(kind="gen_image", pixels=torch.zeros(3, h, w, dtype=torch.uint8), timestep=1.0)
            for h, w in sizes
        ]
        return self._pack(context, blanks)

    @torch.no_grad()
    def draw(
        self,
        context: Context,
        sizes: Sequence[tuple[int, int]],
        seeds: Sequence[int],
        options: DrawOptions,
        without_text: Context | None = None,
        without_images: Context | None = None,
    ) -> list[Tensor]:
        """Sample one image per sequence.

        Args:
            context: everything the images depend on; left as it was.
            sizes: height and width of each in pixels.
            seeds: of each image's noise.
            options: steps and guidance.
            without_text: the context before the last text, for text guidance (needed if `cfg_text_scale` > 1).
            without_images: the texts alone, for image guidance (needed if `cfg_img_scale` > 1 as well).

        Returns:
            `3 hh ww` uint8 each.

        Raises:
            ValueError: if guidance asks for a context that is not given.
        """
        contexts = [
            c for c in (context, without_text, without_images)[: options.num_contexts] if c is not None
        ]
        if len(contexts) < options.num_contexts:
            raise ValueError(
                "guidance above 1 needs the context without text, and for images the one without images"
            )
        batches = [self.blank_images(c, sizes) for c in contexts]
        counts = [int(h * w) for h, w in batches[0].gen_hw.tolist()]
        width = self.model.config.latent_token_width
        noise = [seeded_noise(s, (n, width), self.device) for s, n in zip(seeds, counts, strict=True)]
        x = self.denoise(contexts, batches, torch.cat(noise), options)
        return self.decode(x, [(int(h), int(w)) for h, w in batches[0].gen_hw.tolist()])

    @torch.no_grad()
    def denoise(
        self,
        contexts: Sequence[Context],
        batches: Sequence[PackedBatch],
        x: Tensor,
        options: DrawOptions,
        watch: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Euler steps from noise to latents.

        Args:
            contexts: with everything; and, for guidance, without the last text, without images.
            batches: the target images laid out behind each context (`blank_images`).
            x: `l (p p z)`, noise of all images.
            options: steps and guidance.
            watch: told time, latents and guided velocity of every step.

        Returns:
            `l (p p z)`, latents of all images.
        """
        counts = batches[0].gen_hw.prod(1)
        if options.renorm_whole_batch:
            counts = counts.sum()[None]
        owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        times = sampling_times(options.num_timesteps, options.timestep_shift).tolist()
        low, high = options.cfg_interval
        velocities = [self._velocities(c, b, options) for c, b in zip(contexts, batches, strict=True)]
        for now, after in zip(times[:-1], times[1:], strict=True):
            active = len(contexts) if low < now <= high else 1
            guided = guide([velocity(x, now) for velocity in velocities[:active]], owner, options)
            if watch is not None:
                watch(now, x, guided)
            x = x - guided * (now - after)
        return x

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Latent patches `l (p p z)` of images of `grid` rows and columns of patches -> their pixels, `3 hh ww` uint8 each."""
        latents = [
            unpatchify_latent(part, *hw, self.encoder.patch)
            for part, hw in zip(tokens.split([h * w for h, w in grid]), grid, strict=True)
        ]
        images: list[Tensor] = []
        for latent in latents:
            pixels = self.encoder.vae.decode(latent[None].float())[0]
            images.append(((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8))
        return images

    def _velocities(
        self, context: Context, batch: PackedBatch, options: DrawOptions
    ) -> Callable[[Tensor, float], Tensor]:
        """(latents, time) of step after step -> velocity behind one context."""
        if not options.taylorseer:
            return lambda x, t: self.velocity(context, batch, x, t)
        forecast = Forecast()
        return lambda x, t: self.model.velocity_of(
            forecast(lambda: self._behind(context, batch, x, t).gen_stream)
        )

    def _behind(self, context: Context, batch: PackedBatch, noised: Tensor, t: float) -> ModelOutput:
        batch = replace(batch, gen_timestep=torch.full_like(batch.gen_timestep, t))
        return self._run(context, batch, noised, causal=False)

    def _pack(self, context: Context, segments: Sequence[Segment]) -> PackedBatch:
        samples = [Sample(segments=(s,)) for s in segments]
        return pack(samples, self.spec, self.special, position_start=context.position).to(self.device)

    def _run(self, context: Context, batch: PackedBatch, noised: Tensor, *, causal: bool) -> ModelOutput:
        attend = CachedAttention(context.cache, batch.sample_lens, causal=causal, device=self.device)
        return self.model(batch, noised, attend)

    def _advance(self, context: Context, segments: Sequence[Segment]) -> None:
        for i, segment in enumerate(segments):
            layout = lay_out(segment, self.spec, self.special)
            context.cache.lens[i] += layout.length
            context.position[i] += layout.advance


def without_last_text(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """What guidance by text compares with: everything but the last text."""
    last = max((i for i, s in enumerate(segments) if s.kind == "text"), default=len(segments))
    return (*segments[:last], *segments[last + 1 :])


def guide(velocities: Sequence[Tensor], owner: Tensor, options: DrawOptions) -> Tensor:
    """Classifier-free guidance with renormalisation, per image.

    Args:
        velocities: `l d` each: with everything; without the last text (optional); without images (optional).
        owner: `l`, which image each latent patch belongs to.
        options: scales and renormalisation.

    Returns:
        `l d`. The guided velocity is scaled down, never up, to the norm it had: per image (`global`), per patch
        (`channel`), or per patch after text guidance and before image guidance (`text_channel`).

    Source: upstream Bagel 056b5fd, whose `global` norm runs over all images of a batch; ours runs over each.
    """
    full = velocities[0]
    if len(velocities) == 1:
        return full

    def renorm(guided: Tensor, *, per_image: bool) -> Tensor:
        before, after = (x.square().sum(-1) for x in (full, guided))
        if per_image:
            size = int(owner.max()) + 1
            before, after = (x.new_zeros(size).index_add(0, owner, x)[owner] for x in (before, after))
        scale = (before.sqrt() / (after.sqrt() + 1e-8)).clamp(options.cfg_renorm_min, 1.0)
        return guided * scale[:, None]

    without_text = velocities[1]
    guided = without_text + options.cfg_text_scale * (full - without_text)
    if options.cfg_renorm_type == "text_channel":
        guided = renorm(guided, per_image=False)
    if len(velocities) == 3:
        guided = velocities[2] + options.cfg_img_scale * (guided - velocities[2])
    if options.cfg_renorm_type == "text_channel":
        return guided
    return renorm(guided, per_image=options.cfg_renorm_type == "global")
