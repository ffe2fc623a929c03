"""What the sources of all formats share: files under one index, and reading a record by its number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from data.sources.building import Arrays, Builder
from data.sources.index import open_index
from data.sources.record import Record
from data.sources.storage import Files, FileStamp


class IndexedSource(ABC):
    """Records of one or many files.

    Args:
        build: makes the index of a file, see `open_index`.
        files: absolute paths or URLs.
        name: of the data set, for messages.
        cache_dir: where the index is kept, see `open_index`.

    Raises:
        ValueError: if a file is not what it should be, or there is no record.
    """

    def __init__(self, build: Builder, files: Sequence[str], name: str, cache_dir: str | Path | None):
        self.index = open_index(build, files, cache_dir)
        self.files = Files()
        if not len(self):
            raise ValueError(
                f"{name}: the data set is empty; remove it from dataset_names or give it records"
            )

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Record:
        """A record by its number.

        Raises:
            SkipSample: if it cannot be used.
            SourceLost: if its file vanished or changed.
        """
        return self.read_in(*self.index.locate(index))

    @abstractmethod
    def read_in(self, file: FileStamp, arrays: Arrays, row: int) -> Record:
        """Record `row` of a file."""
