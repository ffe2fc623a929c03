"""Prompts in, answers and pictures out, batched, through the KV cache.

    model = Inferencer.from_model_dir("runs/quickstart/results_dir/model")
    model.answer([Prompt(images=("scene.png",), text="Where is the red 7?")])[0].boxes

Prompts of one call may differ in length, order and picture size; each gives what it would give alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.conversation import IMAGE, image_segment, prompt_segments, text_segments
from data.dataset_base import SkipSample, Transform
from data.rgb_image import to_rgb
from data.tokens import Tokenizer
from data.transforms import ImageTransform, build_transform
from data.types import Kind, Segment
from modeling.autoencoder import load_autoencoder
from modeling.bagel.choice import Choose, Drawn, Told, likeliest
from modeling.bagel.config import BagelConfig
from modeling.bagel.decode import Decoder, DrawOptions, without_last_text
from modeling.bagel.latents import LatentEncoder
from modeling.bagel.regions import regions_of
from modeling.build import load_model
from modeling.heads import head_class

PUBLISHED_TRANSFORMS: dict[str, dict[str, int]] = {
    "vae": {"max_image_size": 1024, "min_image_size": 512, "stride": 16},
    "vit": {"max_image_size": 980, "min_image_size": 224, "stride": 14},
}
"""What pictures go through if the model directory has no `preprocessor_config.json`."""

THINK_BEFORE_ANSWERING = (
    "Before you answer, reason step by step about what is shown and asked. Put the reasoning between <think> and </think>, "
    "then give the answer on its own."
)
THINK_BEFORE_DRAWING = (
    "Before the picture is drawn, plan it: say what has to be seen, where, and in which style. Put the plan between <think> and "
    "</think>."
)
"""Our words. Published checkpoints were tuned on their own: `Prompt.think` takes a text."""

Picture = Image.Image | Path | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked.

    Attributes:
        text: the pictures stand at its `<image>`s, or first if it has none.
        images: the pictures of the text, opened or as paths.
        parts: instead of both, texts (`str`) and pictures (`PIL.Image`, `Path`) in their order. Each text is a segment of its
            own, and a literal `<image>` in it is text.
        think: let the model think before it answers or draws. True: a text of ours that asks for it stands first; a text: that
            one does.
        answer_first: before drawing, let the model write its answer text.

    Raises:
        ValueError: if there are both `parts` and a `text` or `images`.
    """

    text: str = ""
    images: tuple[Picture, ...] = ()
    parts: tuple[str | Path | Image.Image, ...] = ()
    think: bool | str = False
    answer_first: bool = False

    def __post_init__(self) -> None:
        if self.parts and (self.text or self.images):
            raise ValueError("a prompt has either parts, or a text and its images")

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures in their order."""
        return self.images or tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How prompts are read. As it stands: the way training reads samples.

    Attributes:
        vae_resize_first: every picture first passes the VAE's resize, so that the vision tower sees it resized twice; the
            tower's `max_pixels` is then each picture's own.
        text_free_before: guidance by text compares with the context before the last text, and if a picture follows that text,
            with the whole context (so there is no guidance). Not set: with the context that lacks only the last text.
    """

    vae_resize_first: bool = False
    text_free_before: bool = False


AS_PUBLISHED = Reading(vae_resize_first=True, text_free_before=True)
"""How the inferencer of upstream Bagel 056b5fd reads prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said. Boxes are xyxy in pixels of the last picture given, masks bool at its size, both in the order written.

    `thought` is what stood between `<think>` and `</think>` if the prompt asked for it; `text` what followed.
    """

    text: str
    boxes: list[tuple[float, float, float, float]]
    masks: list[NDArray[np.bool_]]
    thought: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was drawn; and if the model wrote first, its text, its thought, and what it pointed at in the last picture given."""

    image: Image.Image
    text: str
    thought: str = ""
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)


class Inferencer:
    """A trained model with its tokenizer, transforms and VAE."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        vit_transform: ImageTransform,
        vae_transform: ImageTransform,
        reading: Reading = Reading(),  # noqa: B008 - frozen
        head_transform: Transform | None = None,
    ):
        self.decoder, self.tokenizer, self.reading = decoder, tokenizer, reading
        self._vae_transform, self._head_transform = vae_transform, head_transform
        self._transforms = {"und_image": vit_transform, "cond_image": vae_transform}

    @staticmethod
    def from_model_dir(
        path: str | Path,
        weights: str = "ema",
        device: str | torch.device = "cpu",
        reading: Reading = Reading(),  # noqa: B008 - frozen
        dtype: torch.dtype = torch.float32,
        adapter: str | Path | None = None,
    ) -> "Inferencer":
        """Load a model directory in the published layout.

        Args:
            path: of the directory.
            weights: `ema` or `model`.
            device: of the model and the autoencoder.
            reading: how prompts are read.
            dtype: of the model and its cache; the autoencoder stays float32.
            adapter: adapters that are added to it; `weights` then says which of theirs.

        Raises:
            ValueError: naming the file that is missing or does not fit.
        """
        model = load_model(path, weights, device, dtype, adapter)
        tokenizer = Tokenizer(path)
        encoder = LatentEncoder(load_autoencoder(path, device), model.config.latent_patch_size, cache_mb=64)
        decoder = Decoder(model, encoder, model.config.layout, tokenizer.special)
        transforms = _read_transforms(Path(path) / "preprocessor_config.json")
        _require_view(model.config, transforms, Path(path) / "preprocessor_config.json")
        return Inferencer(
            decoder,
            tokenizer,
            transforms["vit"],
            transforms["vae"],
            reading,
            head_transform=transforms.get("head"),
        )

    def seeing(self, vit_transform: ImageTransform) -> "Inferencer":
        """The same model, which sees pictures that it is asked about through another transform."""
        return Inferencer(
            self.decoder,
            self.tokenizer,
            vit_transform,
            self._vae_transform,
            self.reading,
            self._head_transform,
        )

    def picture(self, image: Picture) -> Segment:
        """A picture as the model is shown it in a question."""
        return self._prompt(Prompt(parts=(_open(image),)), ("und_image",), "").segments[-1]

    def answer(
        self,
        requests: Sequence[Prompt],
        max_new_tokens: int = 512,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
        told: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Let the model answer in text; boxes and masks come where it writes `<BOX>` and `<SEG>` itself.

        Args:
            requests: what to answer.
            max_new_tokens: most tokens of an answer, thought included.
            do_sample, temperature: draw tokens from softmax(logits / temperature) instead of taking the likeliest.
            seed: of the first answer's draws; the others count on from it.
            told: what the model is made to answer; boxes and masks are then what it sees at the `<BOX>` and `<SEG>` given.
        """
        prompts = [self._prompt(r, ("und_image",), THINK_BEFORE_ANSWERING) for r in requests]
        context = self.decoder.read([p.segments for p in prompts])
        choose = _choice(len(prompts), do_sample, temperature, seed)
        if told is not None:
            texts = [self.tokenizer.encode(text).tolist() for text in told]
            choose = Told(texts, self.tokenizer.special.end)
            max_new_tokens = max(map(len, texts), default=0)
        written = self.decoder.write(context, max_new_tokens, choose)
        found = self.decoder.perceive(context, written)
        answers = []
        for request, prompt, said, heads in zip(requests, prompts, written, found, strict=True):
            thought, text = _split(self.tokenizer.decode(said.ids, keep_special=True), request)
            boxes, masks = regions_of(heads, prompt.pictures[-1].size if heads else (0, 0))
            answers.append(Answer(text=text, boxes=boxes, masks=masks, thought=thought))
        return answers

    def generate(
        self,
        requests: Sequence[Prompt],
        options: DrawOptions = DrawOptions(),  # noqa: B008 - frozen
        *,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 1.0,
        **changes: Any,
    ) -> list[Generation]:
        """Draw one picture per prompt: from text alone, or an edit of the pictures given.

        What the model writes first (`Prompt.think`, `answer_first`) is behind the full context only: the contexts that guidance
        compares with do not have it.

        Args:
            requests: what to draw.
            options: steps and guidance (`PUBLISHED_RECIPES` has some).
            height, width: of the pictures drawn, in pixels. Left out: the size of the prompt's last picture after the VAE's
                resize; for a prompt without pictures, the VAE transform's largest square.
            seed: of the first picture's noise and text draws; the others count on from it.
            max_new_tokens, do_sample, temperature: of texts written first.
            **changes: fields of `DrawOptions`, to be changed in `options`.

        Raises:
            ValueError: if a size is no multiple of what a latent token covers or beyond the model's positions, or only one of
                height and width is given.
        """
        options = replace(options, **changes)
        prompts = [self._prompt(r, ("cond_image", "und_image"), THINK_BEFORE_DRAWING) for r in requests]
        sizes = [self._size(p, height, width) for p in prompts]
        context = self.decoder.read([p.segments for p in prompts])
        without_text = without_images = None
        if options.num_contexts > 1:
            without_text = self.decoder.read([p.without_text(self.reading) for p in prompts])
        if options.num_contexts > 2:
            without_images = self.decoder.read([p.texts for p in prompts])
        written = self.decoder.write(
            context,
            max_new_tokens,
            _choice(len(prompts), do_sample, temperature, seed),
            writes=[r.answer_first or bool(r.think) for r in requests],
        )
        found = self.decoder.perceive(context, written)
        seeds = [seed + i for i in range(len(requests))]
        images = self.decoder.draw(context, sizes, seeds, options, without_text, without_images)
        generations = []
        for request, prompt, said, heads, image in zip(
            requests, prompts, written, found, images, strict=True
        ):
            thought, text = _split(self.tokenizer.decode(said.ids), request)
            boxes, masks = regions_of(heads, prompt.pictures[-1].size if heads else (0, 0))
            generations.append(
                Generation(image=_to_image(image), text=text, thought=thought, boxes=boxes, masks=masks)
            )
        return generations

    def _prompt(self, request: Prompt, roles: Sequence[Kind], ask_to_think: str) -> "_LaidOut":
        """Open the pictures and lay the prompt out."""
        seen = tuple(_open(p) for p in request.pictures)
        # Training shares a transform's area among the pictures of a question, not among those of an edit.
        sharing = len(seen) if roles == ("und_image",) and not self.reading.vae_resize_first else 1
        first = self._resized_by_vae if self.reading.vae_resize_first else lambda image: image
        views = {"und_image": self._head_transform, "cond_image": None}
        pictures = [
            tuple(
                replace(
                    image_segment(role, first(image), self._transforms[role], sharing, view=views[role]),
                    noise_seed=number,
                )
                for role in roles
            )
            for number, image in enumerate(seen)
        ]
        system = request.think if isinstance(request.think, str) else ask_to_think * request.think
        return _LaidOut(
            system=text_segments(system, self.tokenizer), body=self._body(request, pictures), pictures=seen
        )

    def _body(self, request: Prompt, pictures: Sequence[tuple[Segment, ...]]) -> tuple[Segment, ...]:
        if not request.parts:
            try:
                return prompt_segments(request.text, self.tokenizer, pictures)
            except SkipSample as e:
                raise ValueError(
                    f"{request.text!r:.80} has {request.text.count(IMAGE)} {IMAGE} for {len(pictures)} pictures; write one for "
                    "each, or none to have the pictures first"
                ) from e
        waiting = iter(pictures)
        parts = (
            text_segments(p, self.tokenizer) if isinstance(p, str) else next(waiting) for p in request.parts
        )
        return tuple(segment for part in parts for segment in part)

    def _resized_by_vae(self, image: Image.Image) -> Image.Image:
        return _to_image(self._vae_transform(image))

    def _size(self, prompt: "_LaidOut", height: int | None, width: int | None) -> tuple[int, int]:
        if (height is None) != (width is None):
            raise ValueError("give both height and width of the picture to draw, or neither")
        if height is None or width is None:
            largest = self._vae_transform.max_image_size
            size = prompt.pictures[-1].size if prompt.pictures else (largest, largest)
            width, height = self._vae_transform.resized(*size)
        stride = self.decoder.spec.latent_stride
        if height % stride or width % stride or min(height, width) < stride:
            raise ValueError(
                f"a picture of {width}x{height} px cannot be drawn: both sides must be multiples of {stride}"
            )
        limit = self.decoder.spec.latent_positions_per_side * stride
        if max(height, width) > limit and not self.decoder.spec.interpolate_pos:
            raise ValueError(
                f"a picture of {width}x{height} px cannot be drawn: the model has positions for {limit} px a side"
            )
        return height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaidOut:
    """A prompt laid out: the text that asks to think, what follows it, the pictures as they were given."""

    system: tuple[Segment, ...]
    body: tuple[Segment, ...]
    pictures: tuple[Image.Image, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.system + self.body

    @property
    def texts(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.kind == "text")

    def without_text(self, reading: Reading) -> tuple[Segment, ...]:
        """What text guidance compares with."""
        without = without_last_text(self.body)
        if reading.text_free_before and self.body and self.body[-1].kind != "text":
            return self.segments
        return self.system + without


def _choice(count: int, do_sample: bool, temperature: float, seed: int) -> Choose:
    return Drawn(temperature, [seed + i for i in range(count)]) if do_sample else likeliest


def _split(text: str, request: Prompt) -> tuple[str, str]:
    """What was thought and what was said after it; a thought that was cut short has nothing after it."""
    before, begins, rest = text.partition("<think>")
    if not request.think or not begins:
        return "", text
    thought, _, said = rest.partition("</think>")
    return thought.strip(), (before + said).strip()


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    try:
        with Image.open(picture) as image:
            return to_rgb(image).copy()  # read now: the file closes here
    except OSError as e:
        raise ValueError(f"{picture}: cannot be read as a picture ({e})") from e


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _require_view(config: BagelConfig, transforms: Mapping[str, Any], file: Path) -> None:
    for head, options in config.heads.items():
        if "head" not in transforms and head_class(head, options).wants_view(options):
            raise ValueError(
                f"{file}: the {head} head has an image encoder of its own and nothing says what it sees; add "
                '"head": {"type": "sam", "image_size": 1024} with the size that it was trained with'
            )


def _read_transforms(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = PUBLISHED_TRANSFORMS
    if file.is_file():
        try:
            values = json.loads(file.read_text())
            head = {"head": build_transform(values["head"])} if "head" in values else {}
            return {**head, **{name: ImageTransform(**values[name]) for name in ("vit", "vae")}}
        except (json.JSONDecodeError, TypeError, KeyError, ValueError) as e:
            raise ValueError(
                f"{file}: expected vit and vae with max_image_size, min_image_size, stride ({e!r})"
            ) from e
    return {name: ImageTransform(**values[name]) for name in ("vit", "vae")}
