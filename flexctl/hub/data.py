"""Text in a data set on the Hub: ``hf://datasets/OWNER/NAME[@REVISION]`` and ``/PATH`` or ``:SUBSET:SPLIT``.

Nothing is downloaded as a whole: files are read part by part, at one commit, while they are used. Which files make up a
subset and a split is told by the ``datasets`` library, from the data set's card and file names. It runs no code of the
repository's, and one that needs code of its own is refused.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from flexctl.errors import FlexctlError, UsageError
from flexctl.hub.address import DATA_FORM, DataAddress
from flexctl.hub.refusals import explained
from flexctl.hub.remote import read_range
from flexctl.hub.transfer import quiet_hub

__all__ = ["DataFile", "data_files"]

_FORMATS = ("parquet", "csv", "json", "text")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file of a data set, at one commit.

    Attributes:
        address: What was asked for.
        commit: Which commit that is.
        path: Of the file, inside the repository.
        size: Bytes.
    """

    address: DataAddress
    commit: str
    path: str
    size: int

    @property
    def name(self) -> str:
        """The file's name without its folders."""
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return str(replace(self.address, path=self.path))

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """Return its bytes, fetched while they are read.

        Args:
            mode: As ``Path.open`` has it.

        Raises:
            FlexctlError: Later, from reading: the Hub cannot be reached, or refuses.
        """
        del mode
        return io.BufferedReader(_Ranges(self), _BLOCK_BYTES)


class _Ranges(io.RawIOBase):
    """A file on the Hub, a request a read."""

    def __init__(self, file: DataFile) -> None:
        from huggingface_hub import hf_hub_url

        self._file, self._position = file, 0
        self._url = hf_hub_url(file.address.repository, file.path, repo_type="dataset", revision=file.commit)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._file.size)
        if stop <= self._position:
            return 0
        data = read_range(self._file.address, self._url, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def data_files(address: DataAddress) -> list[DataFile]:
    """Return the files of the path, or of the subset's split, sorted or in the data set's own order.

    Raises:
        UsageError: There is no such data set, revision, path, subset or split, or its files hold no text.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    info = _look(address)
    commit, sizes = str(info.sha), {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    names = _below(address, sizes) if address.path else _of_split(address, commit)
    strange = [name for name in names if name not in sizes]
    if strange:
        raise UsageError(f"{address}: its card names {strange[0]}, which is no file of this data set")
    return [DataFile(address=address, commit=commit, path=name, size=sizes[name]) for name in names]


def _look(address: DataAddress) -> Any:
    """Return what the Hub tells of the data set at a revision: its commit, and every file with its size."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with explained(address):
        try:
            info = HfApi().dataset_info(address.repository, revision=address.revision, files_metadata=True)
            if info.gated:
                HfApi().auth_check(address.repository, repo_type="dataset")
        except OfflineModeIsEnabled as error:
            raise FlexctlError(
                f"{address}: HF_HUB_OFFLINE is set, and a data set on the Hub is read from there",
                hint="unset HF_HUB_OFFLINE, or give files on this machine",
            ) from error
    return info


def _below(address: DataAddress, names: Iterable[str]) -> list[str]:
    path = str(address.path)
    found = [path] if path in names else [name for name in names if name.startswith(f"{path}/")]
    if not found:
        raise UsageError(f"{address}: no such file or folder")
    return sorted(found, key=lambda name: PurePosixPath(name).parts)


def _of_split(address: DataAddress, commit: str) -> list[str]:
    builder = _builder(address, commit)
    splits = builder.config.data_files or {}
    if builder.name not in _FORMATS:
        raise UsageError(f"{address}: holds {builder.name} files; read are {', '.join(_FORMATS)}")
    if address.split not in splits:
        there = ", ".join(map(str, splits))
        raise UsageError(f"{address}: no split {address.split!r}; there are {there}", hint=f"name one: {DATA_FORM}")
    prefix = f"hf://datasets/{address.repository}@{commit}/"
    return [str(url).removeprefix(prefix) for url in splits[address.split]]


def _builder(address: DataAddress, commit: str) -> Any:
    """Return what the datasets library makes of a repository; of its data nothing is read."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    with explained(address), quiet_hub(), _library() as datasets, tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset_builder(address.repository, address.subset, revision=commit, cache_dir=cache)
        except LocalEntryNotFoundError:
            raise
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            said = " ".join(str(error).splitlines()[:2]) or type(error).__name__
            raise UsageError(f"{address}: {said}", hint=f"name a subset or files: {DATA_FORM}") from error


@contextmanager
def _library() -> Iterator[Any]:
    """Give the datasets library, kept from drawing bars, logging, and counting to a server what is loaded."""
    import datasets
    from datasets import config, utils

    counts, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    level, shown = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    utils.disable_progress_bars()
    try:
        yield datasets
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        utils.logging.set_verbosity(level)
        if shown:
            utils.enable_progress_bars()
