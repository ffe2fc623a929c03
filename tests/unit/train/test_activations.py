"""The memory model against torch's own bookkeeping: what a layer keeps for its backward pass, byte by byte."""

from dataclasses import replace

import pytest
import torch

from modeling.bagel.bagel import Bagel
from modeling.bagel.flops import PackShape
from modeling.build import build_model
from train.activations import PeakBytes, decoder_layer_bytes, predict_peak, tower_layer_bytes
from train.config import build_args
from train.memory import state_bytes
from train.synthetic import SHAPES, BatchShape, Shape, changed, synthetic_pack

SMALL = changed(
    SHAPES["small"],
    ("llm.hidden_size=128", "llm.intermediate_size=384", "vit.hidden_size=96", "llm.vocab_size=512"),
)
BATCHES = {
    "short texts": BatchShape(texts=((4, 256),)),
    "a long text": BatchShape(texts=((1, 2000),)),
    "a picture to draw": BatchShape(draw=((1, 512, 512),)),
    "pictures to see": BatchShape(see=((3, 224, 224),)),
    "a large picture to see": BatchShape(see=((1, 448, 448),)),
}


def kept(shape: Shape, batch: BatchShape, dtype: torch.dtype) -> int:
    """Bytes that a forward pass of the model keeps, weights not counted."""
    model = Bagel(shape.bagel).to(dtype)
    pack = synthetic_pack(shape.bagel, batch, seed=0)
    noised = torch.zeros(len(pack.gen_index), shape.bagel.latent_token_width)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = model(pack, noised)  # lives until all is counted: what it keeps would go with it
    assert len(output.hidden) == pack.num_tokens
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_layer_keeps_what_torch_keeps(name: str, dtype: str) -> None:
    batch, d = BATCHES[name], {"fp32": 4, "bf16": 2}[dtype]
    torch_type = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    parts = {"llm": decoder_layer_bytes} | ({"vit": tower_layer_bytes} if batch.see else {})
    for part, layer_bytes in parts.items():
        by_depth = [
            kept(
                changed(
                    SMALL,
                    (*(f"{p}.num_hidden_layers=1" for p in ("llm", "vit")), f"{part}.num_hidden_layers={n}"),
                ),
                batch,
                torch_type,
            )
            for n in (1, 2)
        ]
        shape = PackShape.of(synthetic_pack(SMALL.bagel, batch, seed=0))
        found = layer_bytes(SMALL.bagel, shape, d, "cpu")
        # Worst measured: see the assertion's tolerance; sums of a row (one number per token and head) are left out.
        assert found.kept("") == pytest.approx(by_depth[1] - by_depth[0], rel=0.04), part
        assert 0 < found.kept("full") < found.kept("selective") < found.kept("")


def test_the_peak_moves_as_it_should() -> None:
    shape = PackShape.of(synthetic_pack(SMALL.bagel, BATCHES["short texts"], seed=0))
    model = build_model(SMALL.bagel)

    def peak(*, ranks: int = 1, tokens: int = 1, **flags: object) -> int:
        args = build_args({"param_dtype": "fp32", "reduce_dtype": "fp32", "min_unit_params": 0, **flags})
        longer = replace(
            shape, tokens=shape.tokens * tokens, lengths=shape.lengths * tokens, behind=shape.behind * tokens
        )
        return predict_peak(model, args, longer, SMALL.autoencoder, world_size=ranks, device_type="cpu").total

    assert peak(recompute=False) > peak(recompute=True)
    assert peak(recompute=False, ranks=4) < peak(recompute=False)
    assert peak(recompute=False, ranks=4, sharding_strategy="NO_SHARD") == peak(
        recompute=False, sharding_strategy="NO_SHARD"
    )
    assert peak(recompute=False, tokens=4) > 2 * peak(recompute=False)
    assert peak(param_dtype="bf16", recompute=False) < peak(recompute=False)


def test_what_is_offloaded_lies_in_host_memory() -> None:
    shape, model = (
        PackShape.of(synthetic_pack(SMALL.bagel, BATCHES["short texts"], seed=0)),
        build_model(SMALL.bagel),
    )

    def peak(device_type: str, *, cpu_offload: bool, ema_on_cpu: bool = False) -> PeakBytes:
        args = build_args({"cpu_offload": cpu_offload, "ema_on_cpu": ema_on_cpu})
        return predict_peak(model, args, shape, SMALL.autoencoder, world_size=2, device_type=device_type)

    state = state_bytes(model, build_args({}), 2)
    on, off = peak("cuda", cpu_offload=True), peak("cuda", cpu_offload=False)
    assert (
        sum(on.host.values()) == state.total and on.weights == on.gradients == on.moments == on.averages == 0
    )
    # The highest moment may be another one; what comes and goes is at most as much.
    assert on.total <= off.total - state.weights - state.moments - state.averages and not off.host
    on_cpu = peak("cpu", cpu_offload=True)
    assert on_cpu == peak("cpu", cpu_offload=False) and not on_cpu.host
    average_off = peak("cuda", cpu_offload=False, ema_on_cpu=True)
    assert average_off == replace(
        off, averages=0, host={"averages": state.averages, "copies": state.averages}
    )
    assert peak("cuda", cpu_offload=True, ema_on_cpu=True) == on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hidden_size=3", "--set hidden_size=3: expected PART.FIELD=VALUE"),
        ("llm.size=3", "--set: .*size"),
        ("llm.hidden_size=7", "hidden_size 7, num_attention_heads"),
    ],
)
def test_changes_of_a_shape_that_cannot_be(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(SHAPES["small"], (change,))


def test_a_batch_by_its_shape() -> None:
    batch = BatchShape.parse(["2x10", "1x6"], ["1x28x42"], ["3x32x64"])
    shape = PackShape.of(synthetic_pack(SMALL.bagel, batch, seed=1))
    assert shape.lengths == (14, 14, 10, 2 + 6 + 34 + 34, *[34 + 2 + 8] * 3)
    assert (shape.patches, shape.latents, shape.pictures) == (6, 24, ((32, 64),) * 3)
    with pytest.raises(ValueError, match="--see 3x4: expected 4x224x256"):
        BatchShape.parse([], ["3x4"], [])
