"""The two tables of data: which class reads a YAML group, and where published data sets lie.

To add a task, write one file with a `TaskDataset` class and give it a row in `DATASET_REGISTRY`.
"""

from collections.abc import Mapping

from data.dataset_base import TaskDataset
from data.detection_dataset import DetectionCocoDataset, DetectionDataset
from data.grounding_dataset import GroundingDataset
from data.interleave_datasets.edit import CounterfactualDataset, EditDataset
from data.interleave_datasets.steps import StepsDataset
from data.medical_dataset import MedicalDataset, MedicalRowDataset
from data.perception_dataset import ReasonSegDataset, ReferDataset, ReferRowDataset
from data.t2i_dataset import ParquetT2iDataset, T2iDataset, T2iMessageDataset
from data.text_dataset import TextDataset
from data.vlm_dataset import ReconstructionDataset, ReconstructionVer2Dataset, VlmDataset, VlmVer1Dataset

DATASET_REGISTRY: dict[str, type[TaskDataset]] = {
    # YAML group key (or its `type:`) -> class. First the published names: Bagel's, then UniMedVL's and MedQ-Uni's.
    "vlm_sft": VlmDataset,
    "t2i_pretrain": ParquetT2iDataset,
    "unified_edit": StepsDataset,
    "SftJSONLIterableDataset_Ver1": VlmVer1Dataset,
    "SftJSONLIterableDataset_with_VisualReconstruction_Ver1": ReconstructionDataset,
    "SftJSONLIterableDataset_with_VisualReconstruction_Ver2": ReconstructionVer2Dataset,
    "SftJSONLIterableDataset_TextOnly": TextDataset,
    "MedicalImageEditingIterableDataset_ver1": EditDataset,
    "CounterfactualMedicalIterableDataset_ver1": CounterfactualDataset,
    "T2IIterableDataset_Ver1": T2iMessageDataset,
    # Ours.
    "text_only": TextDataset,
    "t2i_webdataset": T2iDataset,
    "edit_jsonl": EditDataset,
    "refer_coco": ReferDataset,
    "refer_jsonl": ReferRowDataset,
    "reasonseg": ReasonSegDataset,
    "grounding_jsonl": GroundingDataset,
    "medical_coco": MedicalDataset,
    "medical_jsonl": MedicalRowDataset,
    "detection_jsonl": DetectionDataset,
    "detection_coco": DetectionCocoDataset,
}

DATASET_INFO: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    # Registry key -> data set name -> its places, as published:
    #   "vlm_sft": {"my_vqa": {"data_dir": "/data/vqa", "jsonl_path": "/data/vqa/train.jsonl"}}
    #   "t2i_pretrain": {"my_pictures": {"data_dir": "/data/pictures"}}  (a folder of .parquet files)
    #   "unified_edit": {"my_edits": {"data_dir": "/data/edits", "parquet_info_path": "/data/edits.json"}}
    # It is empty because the YAML's own `dataset_info:` block takes the same form and needs no change of Python.
}
