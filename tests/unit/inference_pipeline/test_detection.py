"""Finding everything in a picture: by text, by the detector, by both; and the command that writes it down."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.detections import instruction
from data.tokens import SPECIAL_TOKENS, Tokenizer
from data.transforms import ImageTransform
from inference_pipeline import detection
from inference_pipeline.detection import Demonstration, predict_detection
from inference_pipeline.inferencer import Inferencer
from scripts.detection import features, predict, validate_results
from tests.unit.modeling.tiny import picture, tiny_decoder

VIT = ImageTransform(max_image_size=32, min_image_size=32, stride=8)


def image(seed: int = 1, height: int = 40, width: int = 80) -> Image.Image:
    return Image.fromarray(picture(seed, height, width).permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def model(save_tokenizer) -> Inferencer:
    tokenizer: Tokenizer = save_tokenizer(SPECIAL_TOKENS)
    decoder = tiny_decoder(vocab_size=len(tokenizer))
    decoder.special = tokenizer.special
    return Inferencer(decoder, tokenizer, VIT, VIT)


def told(model: Inferencer, monkeypatch: pytest.MonkeyPatch, text: str, p: Sequence[float] = ()) -> None:
    """Let the model write a text, its tokens of these probabilities (0.5 where none is given)."""
    ids = [*model.tokenizer.encode(text).tolist(), model.tokenizer.special.end]

    class Told(detection._Surely):
        def __call__(self, logits: Tensor, sequences: Sequence[int]) -> Tensor:
            at = len(self.probabilities)
            self.probabilities.append(p[at] if at < len(p) else 0.5)
            return torch.tensor([ids[min(at, len(ids) - 1)]])  # asked once more behind the end

    monkeypatch.setattr(detection, "_Surely", Told)


def test_the_detector_finds_boxes_of_both_pictures_in_its_own_pixels(model: Inferencer) -> None:
    one, two = predict_detection(model, [image(), image(2, 64, 64)], score_threshold=0.0)
    assert (one.size, one.resized) == ((80, 40), (32, 16)) and two.resized == (32, 32)
    assert 0 < len(one.detections) <= 5 and one.status is None
    scores = [d.score for d in one.detections]
    assert scores == sorted(scores, reverse=True)
    for d in one.detections:
        assert d.source == "head"
        np.testing.assert_allclose(np.array(d.bbox_2d) * 32 / 80, d.bbox_resized, rtol=1e-5)
        assert 0 <= d.bbox_2d[0] < d.bbox_2d[2] <= 80
    assert not predict_detection(model, [image()], score_threshold=1.0)[0].detections


def test_text_is_read_in_the_pixels_that_the_model_sees(
    model: Inferencer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = '{"bbox_2d":[0,4,16,8],"label":"a"}', '{"bbox_2d":[8,0,32,16],"label":"b"}'
    # One token per byte: the second object's are surer than the first one's.
    told(model, monkeypatch, f"[{first},{second}]", [0.25] * (len(first) + 2) + [1.0] * (len(second) + 1))
    (found,) = predict_detection(model, [image()], mode="text", score_threshold=0.0)
    assert [(d.label, d.bbox_2d, d.source) for d in found.detections] == [
        ("b", (20.0, 0.0, 80.0, 40.0), "text"),
        ("a", (0.0, 10.0, 40.0, 20.0), "text"),
    ]
    assert found.detections[0].score == pytest.approx(1.0) and found.detections[1].score == pytest.approx(
        0.25
    )
    assert found.status == "ok" and not found.truncated and found.num_tokens == len(found.text)
    (thousand,) = predict_detection(
        model, [image()], mode="text", coordinates="thousandths", score_threshold=0.0
    )
    assert thousand.detections[0].bbox_2d == pytest.approx((8 * 0.08, 0.0, 32 * 0.08, 16 * 0.04))
    (cut,) = predict_detection(
        model, [image()], mode="text", score_threshold=0.0, max_new_tokens=len(first) + 5
    )
    assert cut.truncated and cut.status == "recovered_truncated" and len(cut.detections) == 1


def test_fused_takes_the_heads_box_and_the_texts_name() -> None:
    seen = [
        detection._Object((0.0, 0.0, 0.5, 0.5), "", 0.5, "head"),
        detection._Object((0.8, 0.8, 1.0, 1.0), "", 0.4, "head"),
    ]
    said = [
        detection._Object((0.0, 0.0, 0.5, 0.45), "nut", 0.6, "text"),
        detection._Object((0.5, 0.0, 0.9, 0.2), "bolt", 0.7, "text"),
    ]
    joined = detection._fused(seen, said)
    assert joined[0] == detection._Object((0.0, 0.0, 0.5, 0.5), "nut", pytest.approx(0.8), "fused")
    assert joined[1:] == [seen[1], said[1]]


def test_demonstrations_stand_before_the_picture(model: Inferencer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list = []
    plain = model.decoder.read
    monkeypatch.setattr(model.decoder, "read", lambda prompts: read.extend(prompts) or plain(prompts))
    told(model, monkeypatch, "[]")
    teacher = Demonstration(
        image=image(3), objects=[((40.0, 20.0, 80.0, 40.0), "x"), ((0.0, 0.0, 5.0, 5.0), "y")]
    )
    (found,) = predict_detection(model, [image()], mode="text", system_prompt="S", teachers=[[teacher]])
    texts = [model.tokenizer.decode(s.ids) if s.kind == "text" else "(picture)" for s in read[0]]
    question = instruction("english")
    answer = '[{"bbox_2d":[0,0,2,2],"label":"y"},{"bbox_2d":[16,8,32,16],"label":"x"}]'
    assert texts == ["S", question, "(picture)", answer, question, "(picture)"]
    assert found.status == "empty_list" and not found.detections


def test_a_model_without_a_detector_says_so(model: Inferencer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(model.decoder.model.heads._modules, "detr")
    with pytest.raises(ValueError, match="mode fused: the model has no detr head"):
        predict_detection(model, [image()], mode="fused")
    with pytest.raises(ValueError, match="coordinates must be one of"):
        predict_detection(model, [image()], mode="text", coordinates="miles")


def test_the_command_writes_a_record_per_row_and_goes_on(
    model: Inferencer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(predict.Inferencer, "from_model_dir", lambda *args, **rest: model)
    for name in ("a.png", "t.png"):
        image().save(tmp_path / name)
    row = {"images": ["a.png"], "objects": [{"bbox_2d": [0, 0, 8, 8], "label": "nut"}]}
    pool = {**row, "images": ["t.png"]}
    rows = [row, {**row, "images": ["gone.png"]}, {"images": 3}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "pool.jsonl").write_text(json.dumps(pool) + "\n")
    out = tmp_path / "out.jsonl"
    command = [
        "--model_path", "m", "--input_jsonl", str(tmp_path / "in.jsonl"), "--output_file", str(out), "--score_threshold", "0",
        "--teacher_pool_file", str(tmp_path / "pool.jsonl"), "--num_teachers", "1",
    ]  # fmt: skip
    assert predict.main([*command, "--max_samples", "1"]) == 0
    with out.open("a") as file:
        file.write('{"half a row')
    assert predict.main(command) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 3 and all(set(found[0]) - {"dropped"} <= set(r) | {"dropped"} for r in found)
    assert found[0]["ground_truth"] == '[{"bbox_2d":[0.0,0.0,8.0,8.0],"label":"nut"}]'
    assert found[0]["teachers"] == ["t.png"] and found[0]["orig_size"] == [80, 40]
    assert len(found[0]["predictions"]) == len(json.loads(found[0]["pred_result"]))
    assert "gone.png" in found[1]["error"] and "in.jsonl:3: images: is 3" in found[2]["error"]
    assert validate_results.main([str(out), "--no-preview"]) == 0
    assert predict.main([*command[:6], "--num_teachers", "1"]) == 2


def test_features_of_pictures(model: Inferencer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features.Inferencer, "from_model_dir", lambda *args, **rest: model)
    for number, name in enumerate(("a.png", "b.png")):
        image(number).save(tmp_path / name)
    rows = [{"images": [name], "objects": []} for name in ("a.png", "b.png")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "f.safetensors"
    assert features.main([str(tmp_path / "in.jsonl"), "--model_path", "m", "--output", str(out)]) == 0
    vectors = load_file(out)
    assert vectors["a.png"].shape == (24,) and not torch.equal(vectors["a.png"], vectors["b.png"])
    (tmp_path / "in.jsonl").write_text("{}")
    assert features.main([str(tmp_path / "in.jsonl"), "--model_path", "m", "--output", str(out)]) == 1
