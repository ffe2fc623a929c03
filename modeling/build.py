"""A model's source -> the model on the meta device and the values of its parameters.

The trainer shards the empty model first and then asks for one value after the other; inference fills it at once. Every value
comes from a file or is said to start from somewhere else; a tensor that a file should have given and did not stops the program.
"""

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeling.adapters import Adapter, open_adapter
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.init import fixed_tables, initial_value
from modeling.heads import head_class
from modeling.huggingface import EMBEDDINGS, HEAD, is_huggingface, llm_weights, vit_weights
from modeling.qwen2.mot import GEN
from modeling.source import TABLES, ModelSource, read_source
from modeling.weights import WEIGHTS, Weights, find_weights, open_weights

logger = logging.getLogger(__name__)

Values = Callable[[str, torch.Size], Tensor]
"""(name of a parameter, its full shape) -> its full value."""
Shapes = Mapping[str, tuple[int, ...]]
MASK = "heads.mask."


def build_model(config: BagelConfig) -> Bagel:
    """The model of a configuration, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Bagel(config)


def initial_values(config: BagelConfig, seed: int, *, copy_init_moe: bool = False) -> Values:
    """Random starting values by name and shape, for training from nothing.

    Args:
        config: the model's.
        seed: of the run.
        copy_init_moe: the generation expert starts with the understanding expert's values.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        return initial_value(name.replace(GEN, "") if copy_init_moe else name, shape, config, seed)

    return value


def weights_kind(model_dir: str | Path, *, prefer_ema: bool) -> str:
    """`ema` or `model`: the preferred one if the directory has it, else the one it has."""
    kinds = ("ema", "model") if prefer_ema else ("model", "ema")
    return next((kind for kind in kinds if find_weights(model_dir, kind)), kinds[0])


def starting_values(source: ModelSource, model: Bagel, *, weights: str, seed: int) -> Values:
    """Where a new run's parameters come from, part by part.

    Args:
        source: which directories there are.
        model: what the values are for; position tables are computed, not read.
        weights: `ema` or `model`, of `source.model_path`.
        seed: of random starting values.

    Raises:
        ValueError: if weights are missing or damaged, lack a parameter, or hold one of another shape.
    """
    wanted, copies = parameter_shapes(model), source.copy_init_moe is not False
    given: dict[str, Weights] = {}
    if source.llm_path is not None:
        part = _part(wanted, "language_model.")
        store, optional = llm_weights(source.llm_path, part, copy_init_moe=copies)
        given |= dict.fromkeys(require_complete(store, part, optional), store)
    if source.vit_path is not None:
        part = _part(wanted, "vit_model.")
        store, optional = vit_weights(source.vit_path, part)
        exact = not is_huggingface(source.vit_path)
        given |= dict.fromkeys(require_complete(store, part, optional, exact=exact), store)
    fresh: set[str] = set()
    if source.mask_path is not None:
        store, missing = mask_weights(source, wanted)
        given |= dict.fromkeys(require_complete(store, _part(wanted, MASK), missing), store)
        fresh = missing - _stored(source, weights)
    rest = {name: shape for name, shape in wanted.items() if name not in given and name not in fresh}
    if not source.from_scratch:
        values = stored_values(source.model_path, model, weights, only=rest)
        if source.copy_init_moe is not None:
            logger.info("--copy_init_moe %s changes nothing: the weights of %s hold both experts", source.copy_init_moe,
                        source.model_path)  # fmt: skip
    else:
        values = initial_values(model.config, seed, copy_init_moe=source.copy_init_moe is True)
        for part_name, count in sorted(Counter(map(component, rest)).items()):
            logger.info("%s: %d tensors start from initial values (--from_scratch True)", part_name, count)
    drawn = initial_values(model.config, seed)

    def value(name: str, shape: torch.Size) -> Tensor:
        if name in given:
            return given[name].read(name)
        return drawn(name, shape) if name in fresh else values(name, shape)

    return value


def mask_weights(source: ModelSource, wanted: Shapes) -> tuple[Weights, set[str]]:
    """What the directory of `--mask_path` holds, under the model's names, and which of them it need not hold."""
    assert source.mask_path is not None
    options = source.config.heads["mask"]
    store, own = head_class("mask", options).weights_from(source.mask_path, options)
    fresh = tuple(MASK + prefix for prefix in own)
    store = store.renamed({f"{MASK}{key}": key for key in store.shapes})
    return store, {name for name in wanted if name.startswith(fresh)} - store.shapes.keys()


def _stored(source: ModelSource, weights: str) -> set[str]:
    """Names that the weights of `source.model_path` hold, if they are read at all."""
    file = None if source.from_scratch else find_weights(source.model_path, weights)
    return set() if file is None else set(open_weights(file).shapes)


def stored_values(
    model_dir: str | Path, model: Bagel, weights: str, only: Collection[str] | None = None
) -> Values:
    """Values of a checkpoint in the published layout, read one tensor at a time.

    Args:
        model_dir: holds the weights (see `modeling.weights`).
        model: what the values are for; position tables are computed, not read.
        weights: `ema` or `model`.
        only: names that have to come from here; None: all.

    Raises:
        ValueError: if the weights are missing or damaged, lack a parameter, or hold one of another shape.
    """
    store, tables = open_kind(model_dir, weights), fixed_tables(model.config)
    wanted = parameter_shapes(model)
    require_complete(store, wanted if only is None else {name: wanted[name] for name in only})
    tied = model.config.llm.tie_word_embeddings and HEAD in store.shapes

    def value(name: str, shape: torch.Size) -> Tensor:
        if name in tables:
            return tables[name]
        tensor = store.read(name)
        if tied and name == EMBEDDINGS and not torch.equal(tensor, store.read(HEAD)):
            raise ValueError(
                f"{store.name}: {HEAD} differs from {EMBEDDINGS}, but llm_config.json has tie_word_embeddings true; "
                "set it to false"
            )
        return tensor

    return value


def open_kind(model_dir: str | Path, weights: str) -> Weights:
    """The weights of a kind, `ema` or `model`.

    Raises:
        ValueError: if there are none.
    """
    file = find_weights(model_dir, weights)
    if file is None:
        if other := next((kind for kind in WEIGHTS if find_weights(model_dir, kind)), None):
            raise ValueError(
                f"{Path(model_dir) / WEIGHTS[weights]}: is not there; the directory has weights of the kind `{other}`, ask for "
                "those"
            )
        raise ValueError(
            f"{Path(model_dir) / WEIGHTS[weights]}: no weights here; train or export a model first, or ask for "
            "--from_scratch True"
        )
    return open_weights(file)


def parameter_shapes(model: Bagel) -> dict[str, tuple[int, ...]]:
    """What has to be given: every parameter but the computed tables."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name not in TABLES}


def require_complete(
    store: Weights, wanted: Shapes, optional: Collection[str] = (), *, exact: bool = False
) -> list[str]:
    """Say by component what is found, and stop if anything is missing.

    Args:
        store: what there is.
        wanted: name -> shape of what the model takes from it.
        optional: names that may be missing; they start from initial values.
        exact: what the model does not take is an error too.

    Returns:
        the names that are there.

    Raises:
        ValueError: naming the tensors that are missing, of another shape or no weights, and what they may be called there.
    """
    missing = sorted(wanted.keys() - store.shapes.keys() - set(optional))
    unexpected = sorted(store.shapes.keys() - wanted.keys() - {HEAD if HEAD not in wanted else ""})
    wrong = sorted(k for k in wanted.keys() & store.shapes.keys() if wanted[k] != store.shapes[k])
    initial = sorted(wanted.keys() & set(optional) - store.shapes.keys())
    total, absent, extra, fresh = (
        Counter(map(component, keys)) for keys in (wanted, [*missing, *wrong, *initial], unexpected, initial)
    )
    for part in sorted({*total, *extra}):
        logger.info("%s: %s: %d of %d tensors loaded, %d in the file not used%s", Path(*store.name.parts[-2:]), part,
                    total[part] - absent[part], total[part], extra[part],
                    f", {fresh[part]} start from initial values" if fresh[part] else "")  # fmt: skip
    odd = sorted(k for k in wanted.keys() & store.shapes.keys() if k not in store.dtypes)
    lines = [f"lacks {k}{_nearest(k, unexpected)}" for k in missing[:5]]
    lines += [f"{k} is {list(store.shapes[k])}, the configuration says {list(wanted[k])}" for k in wrong[:5]]
    lines += [f"{k} is in a number format that weights do not have" for k in odd[:5]]
    lines += [f"has {k}, which the model does not" for k in unexpected[:5] if exact]
    if lines:
        raise ValueError(
            f"{store.name}: {len(missing)} tensors missing, {len(wrong)} of another shape: {'; '.join(lines)}"
        )
    return [name for name in wanted if name in store.shapes]


def component(key: str) -> str:
    """`heads.box.key.weight` -> `heads.box`; the generation expert apart; `vit_model.…` -> `vit_model`."""
    parts = key.split(".")
    if parts[0] == "heads":
        return ".".join(parts[:2])
    return f"{parts[0]} (gen)" if GEN in key else parts[0]


def load_model(
    model_dir: str | Path,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | None = None,
) -> Bagel:
    """The trained model of a directory, ready for inference.

    Args:
        model_dir: in the published layout.
        weights: `ema` or `model`; of the adapters, if there are any.
        device: of the model.
        dtype: of the model, whatever the file has.
        adapter: adapters to be added up with it (`modeling.adapters.find_adapter`).

    Raises:
        ValueError: naming the file that is missing or does not fit.
    """
    model = build_model(read_source(model_dir).config).to(dtype)
    values = (
        stored_values(model_dir, model, weights)
        if adapter is None
        else merged_values(model_dir, model, open_adapter(adapter, weights), weights)
    )
    fill_model(model, values, device)
    return model.eval().requires_grad_(False)


def merged_values(model_dir: str | Path, model: Bagel, adapter: Adapter, weights: str) -> Values:
    """Values of a model directory with adapters added up.

    Args:
        model_dir: of the base.
        model: what the values are for.
        adapter: the difference.
        weights: `ema` or `model`, of the base where the adapters do not say which they were trained on.

    Raises:
        ValueError: if the base lacks what is needed, or the adapters are not for such a model.
    """
    adapter.require_fits(parameter_shapes(model))
    kind = adapter.base_weights(model_dir, weights)
    values = stored_values(model_dir, model, kind)
    return lambda name, shape: adapter.apply(name, values(name, shape))


@torch.no_grad()
def fill_model(model: Bagel, values: Values, device: str | torch.device = "cpu") -> None:
    """Give the parameters of a meta-device model memory and values, one after the other (unsharded; else `train/distributed`)."""
    model.to_empty(device=device)
    model.language_model.tie()
    for name, p in model.named_parameters():
        p.copy_(values(name, p.shape))


def _part(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _nearest(key: str, unexpected: Sequence[str]) -> str:
    """A key of the file that nothing asked for and that may be the one, misnamed."""
    close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.9)
    return f" (it has {close[0]}, which nothing uses)" if close else ""
