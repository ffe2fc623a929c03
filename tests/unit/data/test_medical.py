"""Slices of volumes, windows and findings, on the sample files that pydicom and nibabel bring."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.check_groups import leaks
from data.dataset_base import Record, SkipSample
from data.medical_dataset import MedicalDataset, MedicalRowDataset
from data.mixture import Group
from data.scan import Scan, note_patient, patient_of
from data.sources.jsonl import JsonlSource
from data.sources.storage import FolderFetch
from data.volumes import deep_picture, read_volume, shown
from tests.unit.data.test_datasets import make, plan

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

SPACING = (0.8, 0.5, 3.0)  # right, front, head


def sample_file(name: str) -> bytes:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    return (folder / name).read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a CT slice, a series of three, NIfTI with labels, and a 16-bit picture; numbers say where they are."""
    root = tmp_path_factory.mktemp("scans")
    (root / "ct.dcm").write_bytes(sample_file("CT_small.dcm"))
    (root / "mr.dcm").write_bytes(sample_file("MR_small.dcm"))
    (root / "series").mkdir()
    ct = pydicom.dcmread(io.BytesIO(sample_file("CT_small.dcm")))
    pixels = ct.pixel_array.copy()
    for name, height in (("c", -10.0), ("a", 5.0), ("b", 0.0)):  # names are no order
        ct.ImagePositionPatient = [0, 0, height]
        ct.PixelData = (pixels + int(height)).tobytes()
        ct.save_as(root / "series" / name)
    x, y, z = np.meshgrid(np.arange(6), np.arange(5), np.arange(4), indexing="ij")
    values = (100 * x + 10 * y + z).astype(np.int16)
    labels = (values == 100 * 4 + 10 * 3 + 2).astype(np.uint8) * 7
    step = np.diag([*SPACING, 1.0])
    nibabel.save(nibabel.Nifti1Image(values, step), root / "v.nii.gz")
    flipped = step.copy()
    flipped[0, 0] = -SPACING[0]  # stored towards the left
    nibabel.save(nibabel.Nifti1Image(values[::-1], flipped), root / "w.nii")
    nibabel.save(nibabel.Nifti1Image(labels, step), root / "seg.nii.gz")
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 10).astype(np.uint16)).save(root / "deep.png")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(root / "plain.png")
    (root / "broken.nii.gz").write_bytes(b"\x1f\x8bno")
    (root / "broken.dcm").write_bytes(sample_file("CT_small.dcm")[:700])
    return root


def record(files, data: dict) -> Record:
    return Record(data=data, where="rows.jsonl:1", fetch=FolderFetch(str(files)))


def test_a_ct_slice_in_hounsfield_units(files):
    volume = read_volume(record(files, {}), "ct.dcm")
    stored = pydicom.dcmread(files / "ct.dcm")
    units = stored.pixel_array.astype(np.int32) + int(stored.RescaleIntercept)
    assert np.array_equal(volume.values[0], units) and volume.spacing == pytest.approx((0.661468, 0.661468))
    picture = volume.picture(0, (40, 400))
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    assert (picture[units <= -160] == 0).all() and (picture[units >= 240] == 255).all()
    inside = (units > -160) & (units < 240)
    assert np.abs(picture[inside][:, 0] - (units[inside] + 160) * 255 / 400).max() <= 0.5
    assert read_volume(record(files, {}), "mr.dcm").window == (600, 1600), "the file's own"


def test_a_series_is_in_the_order_of_its_positions(files):
    volume = read_volume(record(files, {}), "series/")
    first = volume.values[:, 0, 0]
    assert np.array_equal(np.argsort(first), [0, 1, 2]) and first[2] - first[0] == 15
    assert volume.between == 10.0
    assert volume.number(None, "it") == 1
    with pytest.raises(SkipSample, match="slice 3 is asked for, there are 3"):
        volume.number(3, "it")


@pytest.mark.parametrize("name", ["v.nii.gz", "w.nii"])
def test_a_slice_is_shown_as_radiologists_look_at_it(files, name):
    axial = read_volume(record(files, {}), name)
    assert (axial.spacing, axial.between) == (pytest.approx((0.5, 0.8)), pytest.approx(3.0))
    assert axial.values.shape == (4, 5, 6)
    assert axial.values[2, 0, 0] == 100 * 5 + 10 * 4 + 2, "the patient's right and front are left and on top"
    coronal = read_volume(record(files, {}), name, "coronal")
    assert coronal.values[1, 0, 0] == 100 * 5 + 10 * 1 + 3 and coronal.spacing == pytest.approx((3.0, 0.8))
    sagittal = read_volume(record(files, {}), name, "sagittal")
    assert sagittal.values[4, 0, 0] == 100 * 4 + 10 * 4 + 3 and sagittal.values.shape == (6, 4, 5)


def test_the_sample_volumes_of_nibabel_can_be_read(tmp_path):
    folder = Path(nibabel.__file__).parent / "tests" / "data"
    for name in ("example4d.nii.gz", "anatomical.nii", "example_nifti2.nii.gz"):
        volume = read_volume(record(folder, {}), name)
        picture = volume.picture(volume.number(None, name), None)
        assert volume.values.ndim == 3 and np.isfinite(volume.spacing).all()
        assert picture.min() < 30 and picture.max() > 200, name


@pytest.mark.parametrize(
    ("name", "reason"),
    [("broken.nii.gz", "bad_image"), ("broken.dcm", "bad_image"), ("gone.nii", "missing_image")],
)
def test_broken_volumes_are_named(files, name, reason):
    with pytest.raises(SkipSample, match=f"rows.jsonl:1.*{name}") as e:
        read_volume(record(files, {}), name)
    assert e.value.reason == reason


def test_sixteen_bits_and_windows(files):
    picture = deep_picture((files / "deep.png").read_bytes(), (20000, 20000))
    values = np.arange(64 * 64) * 10
    assert np.array_equal(picture[..., 0].ravel(), shown(values, (20000, 20000))[..., 0])
    assert picture[-1, -1, 0] == 255 and 0 < picture[31, 0, 0] < 255
    assert deep_picture((files / "plain.png").read_bytes(), None) is None
    assert shown(np.array([np.nan, 0.0]), (0.0, 1.0))[:, 0].tolist() == [0, 128]


ROW = {
    "image": "v.nii.gz",
    "slice_idx": 2,
    "modality": "CT",
    "patient_id": "p7",
    "labels": ["the node", "the rim", "the rim"],
    "boxes": [[1, 1, 1, 1], [0, 0, 2, 5], [4, 0, 2, 5]],
}


def test_findings_of_one_name_are_asked_for_once(files, tokenizer):
    masks = [{"volume": "seg.nii.gz", "label": 7}, [[0, 0, 1, 0, 1, 4, 0, 4]], [[4, 0, 5, 0, 5, 4, 4, 4]]]
    dataset = make(MedicalRowDataset, tokenizer, window={"ct": [200, 400], "MR": [1, 1]})
    sample = dataset.to_sample(record(files, {**ROW, "masks": masks}), np.random.default_rng(0))
    texts = plan(sample, tokenizer)
    pairs = dict(zip(texts[1::2], texts[2::2], strict=True))
    assert pairs["Where is the rim?"] == "*<BOX>;<BOX>" and pairs["Where is the node?"] == "*<BOX>"
    assert pairs["Segment the rim."] == pairs["Segment the node."] == "*<SEG>"
    by_name = {(r.head, r.name): r for r in sample.regions if r.head == "mask"}
    # The node is the pixel whose right is 4 and front 3: one from the left, one from the top, of 6x5.
    node, rim = by_name["mask", "the node"].mask, by_name["mask", "the rim"].mask
    height, width = node.shape
    rows, columns = node.any(1).nonzero()[:, 0], node.any(0).nonzero()[:, 0]
    assert (int(columns.min()), int(columns.max())) == pytest.approx((width / 6, width / 3), abs=1)
    assert (int(rows.min()), int(rows.max())) == pytest.approx((height / 5, 2 * height / 5), abs=1)
    assert rim[:, :8].any() and rim[:, -8:].any() and not rim[:, 12:20].any()
    (box,) = next(r.boxes for r in sample.regions if r.head == "box" and r.name == "the node")
    torch.testing.assert_close(box, torch.tensor([1 / 6, 1 / 5, 2 / 6, 2 / 5]))

    _, asked = dataset.asked(record(files, {**ROW, "masks": masks}))
    assert sorted((a.head, a.name) for a in asked) == [
        ("box", "the node"), ("mask", "the node"), ("mask", "the rim"),
    ]  # fmt: skip
    assert asked[0].facts["spacing"] == pytest.approx((0.5, 0.8)) and asked[0].facts["modality"] == "CT"
    assert next(a for a in asked if a.name == "the rim").mask((6, 5)).sum() > 4


def test_coco_with_categories_and_moved_slices(files, tokenizer):
    coco = {
        "image": {"id": 1, "file_name": "v.nii.gz", "slice_idx": 1, "modality": "CT", "patient_id": 5},
        "annotations": [{"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 0, 2, 2]}],
        "categories": {2: {"id": 2, "name": "cyst"}},
    }
    dataset = make(MedicalDataset, tokenizer, mask_templates=[], augment={"flip": 1.0})
    sample = dataset.sample(record(files, coco), np.random.default_rng(0))
    assert plan(sample, tokenizer)[1:] == ["Where is cyst?", "*<BOX>"]
    torch.testing.assert_close(sample.regions[0].boxes[0], torch.tensor([4 / 6, 0, 1, 2 / 5]))
    assert patient_of(coco) == "5" and patient_of(ROW) == "p7" and patient_of({"image": "a.png"}) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slice_idx": 9}, "bad_slice"),
        ({"slice_idx": -1}, "bad_slice"),
        ({"spacing": [1]}, "bad_slice"),
        ({"boxes": [[1, 1, 1, 1]]}, "object_count"),
        ({"masks": [{"volume": "ct.dcm"}] * 3, "boxes": [], "slice_idx": 0}, "mask_size"),
        ({"masks": [{"volume": 3}] * 3}, "bad_mask"),
        ({"boxes": []}, "no_target"),
    ],
)
def test_rows_that_do_not_fit_are_refused(files, tokenizer, change, reason):
    with pytest.raises(SkipSample) as e:
        make(MedicalRowDataset, tokenizer).to_sample(
            record(files, {**ROW, **change}), np.random.default_rng(0)
        )
    assert e.value.reason == reason


def test_a_patient_in_two_splits_is_named(tmp_path, tokenizer):
    rows = {"train": [("p1", 0), ("p2", 0), ("p2", 1)], "val": [("p3", 0), ("p2", 2), (None, 0)]}
    groups, scans = {}, {}
    for split, patients in rows.items():
        lines = [json.dumps({**ROW, "patient_id": who, "slice_idx": k}) + "\n" for who, k in patients]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
        source = JsonlSource(tmp_path / f"{split}.jsonl", cache_dir=tmp_path)
        dataset = make(MedicalRowDataset, tokenizer)
        groups[split] = Group(name=split, weight=1.0, is_mandatory=False, dataset=dataset, source=source)
        scans[split] = Scan(records=len(source))
        for index in range(len(source)):
            note_patient(source.read(index), index, scans[split])
    found = list(leaks([groups["train"]], scans, [groups["val"]], scans, 5))
    ((kind, group, places),) = found
    assert (kind, group, places.count) == ("leaked_patient", "train", 2)
    assert "val.jsonl:2 (patient 'p2')" in places.first[0].message and places.first[0].where.endswith(
        "train.jsonl:2"
    )
