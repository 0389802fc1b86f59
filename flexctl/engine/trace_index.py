"""Index an owner's text on their own disk, so that any verbatim span of it is found at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import flags, text, tracing, training
from flexctl.bundle import slug
from flexctl.bundle.index import LARGEST_SHARD
from flexctl.bundle.names import check_expert_name
from flexctl.bundle.store import check_directory_target, place_of_work, require_space
from flexctl.errors import UsageError
from flexctl.options import HARDWARE, OUTPUT, Config, flag
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes

__all__ = ["TraceIndexConfig", "TraceIndexResult", "trace_index"]

_BYTES_A_BYTE = 5
"""On disk: the text, and a place of four bytes for each of its bytes."""


def _refuse_large(value: int, field: str) -> None:
    if value > LARGEST_SHARD:
        raise UsageError(f"{value} is above {LARGEST_SHARD}", hint="an index may have many shards", field=field)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceIndexConfig(Config):
    """What ``trace_index`` is asked to do.

    The index holds the text itself. It is for its owner's disk: its files are readable by nobody else, and push
    refuses it. A run that was killed goes on when it is started again.

    Examples:
        flexctl trace-index --data corpus/law -o law.index
        flexctl trace-index --data hf://datasets/acme/law --name law
    """

    data: flags.Data
    output: Annotated[Path | None, flags.output("DIR", "Directory to write (default: NAME.index).")] = None
    name: Annotated[
        str | None, flag("NAME", "Whose text it is (default: made from the folder or file of `data`).", OUTPUT)
    ] = None
    text_field: flags.TextField = "text"
    shard_bytes: Annotated[
        int,
        flag(
            "N",
            "Text that is sorted at a time; takes five times as much memory.",
            HARDWARE,
            above=0,
            check=_refuse_large,
        ),
    ] = 1 << 27
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceIndexResult:
    """What ``trace_index`` wrote.

    Attributes:
        path: The index.
        name: Whose text it is.
        documents: How many.
        text_bytes: Of their text, UTF-8.
        shards: Parts that were sorted one at a time.
        kept_shards: Those that an earlier run had sorted.
        bytes_written: Of the index.
    """

    path: Path
    digest: str | None
    name: str
    documents: int = 0
    text_bytes: int = 0
    shards: int = 0
    kept_shards: int = 0
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False


def trace_index(config: TraceIndexConfig, reporter: Reporter = SILENT) -> TraceIndexResult:
    """Write the index of an owner's text.

    Args:
        config: Which text, where to.
        reporter: Hears of progress.

    Raises:
        UsageError: A setting or the data is wrong, the target exists, or pydivsufsort is not installed.
        FlexctlError: The disk has too little room.
    """
    tracing.require_divsufsort()
    name = check_expert_name(config.name or slug(text.source_name(config.data[0])), "`name`")
    target = config.output or Path(f"{name}.index")
    check_directory_target(target, kind="index", overwrite=config.overwrite)
    text.refuse_unreadable(config.data, config.text_field)
    size = text.size_bytes(config.data)
    require_space(target, _BYTES_A_BYTE * size)
    work_path = place_of_work(target, "work")
    training.refuse_busy(work_path)
    if config.dry_run:
        return TraceIndexResult(path=target, digest=None, name=name, dry_run=True)
    with training.working_folder(work_path, reporter) as work, reporter.progress("indexing", size, "bytes") as bar:
        built = tracing.build_index(
            target,
            text.read_records(config.data, config.text_field),
            name=name,
            shard_bytes=config.shard_bytes,
            # What lies there outlives a run that fails.
            folder=work / "checkpoints",
            overwrite=config.overwrite,
            progress=bar,
        )
    return TraceIndexResult(
        path=target,
        digest=built.manifest.digest,
        name=name,
        documents=built.manifest.documents,
        text_bytes=built.manifest.bytes,
        shards=built.manifest.shards,
        kept_shards=built.kept,
        bytes_written=sum(file.stat().st_size for file in target.iterdir()),
        peak_rss_bytes=peak_rss_bytes(),
    )
