"""Findings in medical pictures: COCO JSON and JSONL with modality, patient and slice -> Samples that point at them.

    ct_organs:
      type: medical_jsonl
      dataset_names: [liver_train]
      weight: 1.0
      window: {CT: [40, 400], MR: [600, 1200]}   # centre and width by modality, or [40, 400] for all
      box_templates: []                          # masks only
      mask_templates: ["Segment {ref}."]

`python -m data.check` names patients that two mixtures, or training and validation, share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from data.conversation import Target
from data.dataset_base import Record, SkipSample
from data.perception_dataset import Asked, ReferDataset, Thing, corners, joined_masks
from data.rgb_image import RgbImage
from data.rows import FindingsRow, ScanRow, SceneRow, ThingRow, read_row
from data.sources.record import IMAGE_ERRORS, brief
from data.transforms.boxes import read_mask
from data.volumes import PLANES, Volume, Window, deep_picture, is_volume, read_volume

VOLUMES_KEPT = 2
"""Per process: the next record is often another slice of the same scan."""


class MedicalDataset(ReferDataset):
    """Boxes and masks of the findings of a picture, or of a slice of a volume, asked for by their names.

    Record: one image of a COCO JSON. Beside `file_name` the image may have (`ScanRow`) `modality`, `patient_id`, `slice_idx` and
    `spacing`; an annotation is called by its `expressions`, or else by its category. Files are pictures of 8 or 16 bits, `.nii`,
    `.nii.gz`, DICOM, or a folder ("ct/") with a DICOM series; of a volume `slice_idx` counts slices from 0, and boxes and masks
    are in pixels of the slice as it is shown (data/volumes.py). Boxes count in pixels of the original.

    Findings of one name are asked for once: one `<BOX>` for each, parted by ";", and one `<SEG>` for all of them.

    Plan and arguments: those of `ReferDataset`, and

    Args:
        window: centre and width, in the volume's units, of what is mapped to 8 bits; or these by modality. Not given: the file's
            own, or nearly all its values.
        plane: in which NIfTI volumes are cut: `axial`, `coronal` or `sagittal`.
    """

    source_format: ClassVar[str] = "coco"

    def __init__(
        self,
        *,
        window: Sequence[float] | Mapping[str, Any] | None = None,
        plane: str = "axial",
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if plane not in PLANES:
            raise ValueError(f"plane must be one of {', '.join(PLANES)}, not {plane!r}")
        self.plane = plane
        by_modality = window if isinstance(window, Mapping) else {} if window is None else {"": window}
        self.windows = {str(name).lower(): _window(value) for name, value in by_modality.items()}

    def open_image(self, record: Record, name: str) -> RgbImage:
        scan = self.scan(record)
        window = self.windows.get(scan.modality.lower()) or self.windows.get("")
        if is_volume(name):
            volume = self._volume(record, name)
            pixels = volume.picture(volume.number(scan.slice_idx, record.where), window)
        else:
            try:
                deep = deep_picture(record.read_file(name), window)
            except IMAGE_ERRORS as e:
                raise SkipSample("bad_image", f"{record.where}: image {name!r} is broken ({brief(e)})") from e
            if deep is None:
                return super().open_image(record, name)
            pixels = deep
        picture = RgbImage(pixels)
        return picture if record.motion is None else picture.moved(record.motion)

    def scan(self, record: Record) -> ScanRow:
        """What the record says of its scan.

        Raises:
            SkipSample: if it says it wrongly.
        """
        return read_row(ScanRow, record.data.get("image") or {}, "image")

    def read(self, record: Record) -> tuple[str, Sequence[Thing]]:
        scene, scan = read_row(SceneRow, record.data), self.scan(record)
        things: list[Thing] = []
        for annotation in scene.things:
            what = f"annotation {annotation.get('id')}"
            named = {"expressions": _category(scene.categories, annotation), **annotation}
            row = read_row(ThingRow, named, what)
            things.append(self._thing(record, scan, what, row.names, row.box, row.mask))
        return scan.file, self._useful(things)

    def _thing(
        self,
        record: Record,
        scan: ScanRow,
        what: str,
        names: Sequence[str],
        xywh: tuple[float, float, float, float] | None,
        mask: Any,
    ) -> Thing:
        read = None if mask is None else partial(read_mask, mask)
        if isinstance(mask, Mapping) and "volume" in mask:
            read = partial(self._label, record, mask, scan.slice_idx)
        facts = {
            "modality": scan.modality,
            "patient_id": scan.patient,
            "spacing": self._spacing(record, scan),
        }
        return Thing(
            what=what, names=names, box=None if xywh is None else corners(xywh), mask=read,
            facts={key: value for key, value in facts.items() if value},
        )  # fmt: skip

    def _exchanges(
        self, things: Sequence[Thing], picture: RgbImage, hw: tuple[int, int]
    ) -> Sequence[tuple[Thing, tuple[Target, ...]]]:
        together: dict[tuple[str, str], tuple[Thing, tuple[Target, ...]]] = {}
        for thing, targets in super()._exchanges(things, picture, hw):
            key = (thing.names[0], targets[0].head)
            first, others = together.get(key, (thing, ()))
            if others and targets[0].head == "mask":
                others = (replace(others[0], mask=others[0].mask | targets[0].mask),)
            else:
                others = (*others, *targets)
            together[key] = first, others
        return list(together.values())

    def asked(self, record: Record) -> tuple[str, list[Asked]]:
        file, things = self.read(record)
        names = list(dict.fromkeys(thing.names[0] for thing in things))
        asked: list[Asked] = []
        for name in names:
            alike = [thing for thing in things if thing.names[0] == name]
            masks = [thing.mask for thing in alike if thing.mask is not None]
            one = replace(
                alike[0],
                box=alike[0].box if len(alike) == 1 else None,  # accuracy is of one box per name
                mask=partial(joined_masks, masks) if masks else None,
            )
            asked += self._asked(one, name)
        return file, asked

    def _useful(self, things: Sequence[Thing]) -> Sequence[Thing]:
        """Those that have something the templates ask for, those of one name together."""
        found = [
            t
            for t in things
            if (self.templates["box"] and t.box is not None)
            or (self.templates["mask"] and t.mask is not None)
        ]
        return sorted(found, key=lambda thing: thing.names[0])

    def _spacing(self, record: Record, scan: ScanRow) -> tuple[float, ...] | None:
        """Of rows and columns, in mm: the row's own, or the volume's."""
        if scan.spacing:
            return scan.spacing
        return self._volume(record, scan.file).spacing if is_volume(scan.file) else None

    def _label(
        self, record: Record, mask: Mapping[str, Any], slice_idx: int | None, size: tuple[int, int], what: str
    ) -> np.ndarray:
        """`hh ww` uint8 0/1: where a label map has a value, in the slice that is shown."""
        name, label = mask["volume"], mask.get("label", 1)
        if not isinstance(name, str) or not is_volume(name) or not isinstance(label, int):
            raise SkipSample("bad_mask", f'{what}: a label map is {{"volume": file, "label": whole number}}')
        volume = self._volume(record, name)
        values = volume.values[volume.number(slice_idx, what)]
        if values.shape != (size[1], size[0]):
            height, width = values.shape
            raise SkipSample(
                "mask_size", f"{what}: label map of {width}x{height} px on a slice of {size[0]}x{size[1]} px"
            )
        return (values == label).astype(np.uint8)

    def _volume(self, record: Record, name: str) -> Volume:
        return _kept(_Reader(record), name, self.plane)


class MedicalRowDataset(MedicalDataset):
    """The same from JSONL, one picture or slice per row (`FindingsRow`).

    `{"image": "ct/7.nii.gz", "slice_idx": 40, "modality": "CT", "patient_id": "p7", "labels": ["the liver"], "boxes": [[x, y, w,
    h]], "masks": [RLE, polygons, or {"volume": "seg/7.nii.gz", "label": 1}]}`; what a row lacks of boxes and masks is not asked
    for.

    Plan and arguments: those of `MedicalDataset`.
    """

    source_format: ClassVar[str] = "jsonl"

    def scan(self, record: Record) -> ScanRow:
        return read_row(ScanRow, record.data)

    def read(self, record: Record) -> tuple[str, Sequence[Thing]]:
        row, scan = read_row(FindingsRow, record.data), self.scan(record)
        for name, values in (("boxes", row.boxes), ("masks", row.masks)):
            if values and len(values) != len(row.labels):
                raise SkipSample(
                    "object_count",
                    f"the row has {len(row.labels)} labels and {len(values)} {name}; write one for each",
                )
        things = [
            self._thing(
                record,
                scan,
                f"finding {i}",
                (label,),
                row.boxes[i] if row.boxes else None,
                row.masks[i] if row.masks else None,
            )
            for i, label in enumerate(row.labels)
        ]
        useful = self._useful(things)
        if not useful:
            raise SkipSample("no_target", "the row has neither boxes nor masks that the templates ask for")
        return scan.file, useful


def _category(categories: Mapping[Any, Any], annotation: Mapping[Any, Any]) -> list[Any]:
    """What an annotation is called that has no words of its own."""
    key = annotation.get("category_id")
    category = categories.get(key) if isinstance(key, (int, str)) else None
    return [category.get("name")] if isinstance(category, Mapping) else []


class _Reader:
    """A record's files, known to the cache by where they lie."""

    def __init__(self, record: Record):
        self.record = replace(record, motion=None)
        self._root = getattr(record.fetch, "root", None) or id(record.fetch)

    def __hash__(self) -> int:
        return hash(self._root)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reader) and other._root == self._root


@lru_cache(maxsize=VOLUMES_KEPT)
def _kept(reader: _Reader, name: str, plane: str) -> Volume:
    return read_volume(reader.record, name, plane)


def _window(value: Any) -> Window:
    numbers = isinstance(value, (list, tuple)) and len(value) == 2
    if (
        not numbers
        or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        or value[1] <= 0
    ):
        raise ValueError(f"window: expected [centre, width] with a width above 0, not {value!r}")
    return float(value[0]), float(value[1])
