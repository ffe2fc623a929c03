"""The two tables of data: which class reads a YAML group, and where published data sets lie.

To add a task, write one file with a `TaskDataset` class and give it a row in `DATASET_REGISTRY`.
"""

from collections.abc import Mapping

from data.dataset_base import TaskDataset
from data.interleave_datasets.edit import EditDataset
from data.perception_dataset import ReferDataset
from data.t2i_dataset import T2iDataset, T2iMessageDataset
from data.text_dataset import TextDataset
from data.vlm_dataset import VlmDataset, VlmVer1Dataset

DATASET_REGISTRY: dict[str, type[TaskDataset]] = {
    # YAML group key (or its `type:`) -> class. The long names are the published ones.
    "vlm_sft": VlmDataset,
    "SftJSONLIterableDataset_Ver1": VlmVer1Dataset,
    "SftJSONLIterableDataset_TextOnly": TextDataset,
    "text_only": TextDataset,
    "t2i_webdataset": T2iDataset,
    "T2IIterableDataset_Ver1": T2iMessageDataset,
    "edit_jsonl": EditDataset,
    "MedicalImageEditingIterableDataset_ver1": EditDataset,
    "refer_coco": ReferDataset,
}

DATASET_INFO: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    # Registry key -> data set name -> its places, as published:
    #   "vlm_sft": {"my_vqa": {"data_dir": "/data/vqa", "jsonl_path": "/data/vqa/train.jsonl"}}
    # It is empty because the YAML's own `dataset_info:` block takes the same form and needs no change of Python.
}
