"""Bagel: one packed sequence in, predictions of every kind out. Computes no loss and knows no ranks.

text ids ──▶ embedding ───────────────────────────┐
patches ───▶ SigLIP ──▶ connector + 2-D position ─┼─▶ Qwen2 (und / gen experts) ─▶ logits, velocity, heads
latents ───▶ vae2llm + time + 2-D position ───────┘
"""

import functools
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from torch import Tensor, nn

from data.types import PackedBatch, RegionBatch
from modeling.bagel.config import BagelConfig
from modeling.bagel.connectors import Absent, Connector, PositionTable, TimestepEmbedder
from modeling.heads import build_head
from modeling.ops.attention import AttentionPlan
from modeling.ops.attention_backends import ATTENTION
from modeling.ops.patch import normalise_pixels
from modeling.qwen2.layers import Attend
from modeling.qwen2.model import Qwen2ForCausalLM
from modeling.qwen2.mot import Routing, Rows, filled
from modeling.towers import tower_of
from modeling.types import FeatureGrids, HeadInputs, HeadOutput, ModelOutput


class Bagel(nn.Module):
    """The whole model except the VAE. Parameter names are the published checkpoints' keys; heads stand under `heads.`.

    Attributes:
        attention: row of `ATTENTION` that computes a pack's attention in the decoder.
    """

    attention: str = "auto"

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.language_model = Qwen2ForCausalLM(config.llm)
        latent = config.latent_token_width
        gen = functools.partial(_part, config.visual_gen, "visual_gen")
        self.time_embedder = gen(width, lambda: TimestepEmbedder(width))
        self.vae2llm = gen(width, lambda: nn.Linear(latent, width))
        self.llm2vae = gen(latent, lambda: nn.Linear(width, latent))
        self.latent_pos_embed = gen(width, lambda: PositionTable(config.max_latent_size, width))
        und, seen = functools.partial(_part, config.visual_und, "visual_und"), config.vit.hidden_size
        self.vit_model = und(seen, lambda: tower_of(config.vit).build(config.vit))
        self.connector = und(width, lambda: Connector(seen, width, config.connector_act))
        self.vit_pos_embed = und(width, lambda: PositionTable(config.vit_max_num_patch_per_side, width))
        self.heads = nn.ModuleDict(
            {
                name: build_head(
                    name,
                    options,
                    hidden_size=width,
                    grid_size=config.vit.hidden_size,
                    patch_size=config.vit.patch_size,
                )
                for name, options in config.heads.items()
            }
        )

    def forward(self, batch: PackedBatch, noised: Tensor, attend: Attend | None = None) -> ModelOutput:
        """Run one pack.

        Args:
            batch: the pack.
            noised: `l (p p z)`, every latent patch at its time (`batch.gen_timestep`).
            attend: how tokens see each other; None: the pack's own rule (training). At inference, attention over a cache.

        Returns:
            predictions at the batch's labels, latent patches and anchors.

        Raises:
            ValueError: if the pack has regions for a head that the model lacks: nothing would learn from them.
        """
        self._require_heads(batch)
        attend = attend or _pack_rule(batch, self.attention)
        grids = self._see(batch)
        routing = Routing.build(batch.gen_index, batch.num_tokens)
        rows = self._embed(batch, noised, grids, routing)
        stream = self.language_model.model(rows, routing, batch.position, attend)
        rows = self.language_model.model.finish(stream)
        hidden = routing.pack(rows)
        grids = replace(grids, states=hidden[batch.und_index])
        return ModelOutput(
            hidden=hidden,
            label_states=hidden[batch.label_index],
            vocabulary=self.language_model.lm_head,
            velocity=self.llm2vae(rows.gen)[: len(noised)],
            gen_stream=stream.gen[: len(noised)].detach(),
            grids=grids,
            heads={name: self._perceive(name, hidden, batch, grids) for name in self.heads},
        )

    def _require_heads(self, batch: PackedBatch) -> None:
        for name, region in batch.regions.items():
            if name not in self.heads:
                ends = accumulate(batch.sample_lens)
                where = batch.origins[bisect_right(list(ends), int(region.anchor[0]))]
                raise ValueError(
                    f"group {where.group!r}: {where.where}: the row has an object for the {name} head, which the model lacks "
                    f"(bagel_config.json names its heads: {', '.join(self.heads) or 'none'}); take such rows out, or start from "
                    "a model that has it"
                )

    def velocity_of(self, gen_stream: Tensor) -> Tensor:
        """Velocity `l (p p z)` that a `ModelOutput.gen_stream` `l d` stands for."""
        rows = self.language_model.model.finish(Rows(gen_stream[:0], gen_stream))
        return self.llm2vae(rows.gen)

    def _see(self, batch: PackedBatch) -> FeatureGrids:
        hw = tuple((int(h), int(w)) for h, w in batch.und_hw.tolist())
        lens = [h * w for h, w in hw]
        modes, trunk = ["full"] * len(lens), [0] * len(lens)
        plan = AttentionPlan.build(lens, lens, modes, trunk, batch.und_patches.device)
        patches = normalise_pixels(batch.und_patches).to(self.language_model.lm_head.weight.dtype)
        # The tower's own table may have another side than the connector's; the packed position counts in the latter.
        position = self._vit_position(batch.und_position)
        values = self.vit_model(patches, position, hw, plan)
        return FeatureGrids(
            values=values,
            states=values[:, :0],  # the trunk has not run yet
            pixels=batch.und_patches,
            hw=hw,
            patch_size=self.config.vit.patch_size,
            views=batch.und_views,
        )

    def _vit_position(self, position: Tensor) -> Tensor:
        side, own = self.config.vit_max_num_patch_per_side, self.config.vit.positions_per_side
        return position if side == own else position // side * own + position % side

    def _embed(self, batch: PackedBatch, noised: Tensor, grids: FeatureGrids, routing: Routing) -> Rows:
        text = self.language_model.model.embed_tokens(batch.text_ids)
        seen = self.connector(grids.values) + self.vit_pos_embed(batch.und_position)
        # Text and patches are written into the understanding rows, which are in packed order without the latent patches.
        und = text.new_zeros(batch.num_tokens, text.shape[1])
        und = und.index_copy(0, batch.text_index, text).index_copy(0, batch.und_index, seen.to(text.dtype))
        gen = self.vae2llm(filled(noised.to(text.dtype))) + self.time_embedder(filled(batch.gen_timestep))
        gen = gen + self.latent_pos_embed(filled(batch.gen_position))
        return Rows(und.index_select(0, routing.und), gen.to(text.dtype))

    def _perceive(self, name: str, hidden: Tensor, batch: PackedBatch, grids: FeatureGrids) -> HeadOutput:
        none = batch.und_index[:0]
        regions = batch.regions.get(name) or RegionBatch.unknown(none, none)
        offset = {"self": 0, "previous": 1}[self.config.head_reads]
        return self.heads[name](self.head_inputs(hidden[regions.anchor - offset], regions, grids))

    def head_inputs(self, hidden: Tensor, regions: RegionBatch, grids: FeatureGrids) -> HeadInputs:
        """What a head is given for regions whose anchors have the states `hidden` `r e`."""
        language = self.language_model
        return HeadInputs(
            hidden=hidden,
            regions=regions,
            grids=grids,
            embed=language.model.embed_tokens,
            vocabulary=language.lm_head,
        )


def _part(is_there: bool, flag: str, width: int, make: Callable[[], nn.Module]) -> nn.Module:
    return make() if is_there else Absent(width, flag)


def _pack_rule(batch: PackedBatch, backend: str) -> Attend:
    layout = (batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
    apply = ATTENTION[backend](layout, batch.position.device)
    return lambda layer, q, k, v: apply(q, k, v)
