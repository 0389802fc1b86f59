"""Find what of a text, or of a model's answer, stands in owners' indexes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import evaluation, flags, tracing
from flexctl.bundle.index import Index, open_index
from flexctl.bundle.store import check_file_target, new_file, own_file
from flexctl.errors import UsageError
from flexctl.options import DATA, MODEL, OUTPUT, Config, flag, switch
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.answering import Answerer
from flexctl.tracing.spans import Span, Traced

__all__ = ["TraceFindConfig", "TraceFindResult", "trace_find"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFindConfig(Config):
    """What ``trace_find`` is asked to do.

    Shows the longest spans that stand in an index word for word, the rarest first: in which document, where, how often.
    Of a prompt, the answer alone is traced.

    Examples:
        flexctl trace-find --index law.index --file answer.txt
        flexctl trace-find --index law.index --index news.index --prompt "The court held that" --report trace.html
    """

    index: Annotated[tuple[Path, ...], flag("DIR", "An index of trace-index; repeatable.", DATA)]
    text: Annotated[str | None, flag("TEXT", "The text to trace.", DATA)] = None
    file: Annotated[Path | None, flag("FILE", "A file with the text to trace.", DATA)] = None
    prompt: Annotated[str | None, flag("TEXT", "Trace what a model answers to this.", DATA)] = None
    near: Annotated[bool, switch("Also passages that stand there with a few letters changed.", DATA)] = False
    report: Annotated[Path | None, flag("FILE", "Write a page, one HTML file.", OUTPUT)] = None
    least_bytes: Annotated[int, flag("N", "Length of the shortest span.", DATA, above=0)] = 32
    places: Annotated[int, flag("N", "Places that are shown of a span.", OUTPUT, above=0)] = 3
    bundle: Annotated[
        Path | None, flag("BUNDLE", "The model that answers (default: the workspace's merged model).", MODEL)
    ] = None
    without: flags.Without = ()
    anchor: flags.Anchor = None
    max_new_tokens: flags.MaxNewTokens = 64
    temperature: flags.Temperature = 0.0
    top_k: flags.TopK = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFindResult:
    """What ``trace_find`` found.

    Attributes:
        text: What was traced.
        prompt: What a model was asked, where one was.
        bundle_digest: Of that model.
        indexes: An answer an index, in the order in which they were given.
        report: The page.
    """

    text: str
    prompt: str | None
    bundle_digest: str | None
    least_bytes: int
    indexes: tuple[Traced, ...]
    report: Path | None = None


def trace_find(config: TraceFindConfig, reporter: Reporter = SILENT) -> TraceFindResult:
    """Trace a text in indexes.

    Args:
        config: Which text, which indexes.
        reporter: Hears of progress.

    Raises:
        UsageError: A setting is wrong, or there is no text.
        BundleError: An index or the bundle is not valid.
    """
    _refuse_bad_settings(config)
    indexes = [open_index(path) for path in config.index]
    text, digest = _traced_text(config, reporter)
    found = tuple(_trace(index, text, config, reporter) for index in indexes)
    if config.report:
        page = evaluation.render_trace(text, found, least_bytes=config.least_bytes, prompt=config.prompt, digest=digest)
        with new_file(config.report, overwrite=config.overwrite) as temporary, own_file(temporary) as file:
            file.write(page.encode())
    return TraceFindResult(
        text=text,
        prompt=config.prompt,
        bundle_digest=digest,
        least_bytes=config.least_bytes,
        indexes=found,
        report=config.report,
    )


def _refuse_bad_settings(config: TraceFindConfig) -> None:
    given = [name for name in ("text", "file", "prompt") if getattr(config, name) is not None]
    if len(given) != 1:
        raise UsageError("give one of `text`, `file` and `prompt`", hint="flexctl trace-find --help")
    if config.bundle is not None and config.prompt is None:
        raise UsageError("a model answers to a `prompt` alone", field="bundle")
    if config.near:
        tracing.require_rapidfuzz()
    if config.report:
        check_file_target(config.report, overwrite=config.overwrite)
        evaluation.require_jinja()


def _traced_text(config: TraceFindConfig, reporter: Reporter) -> tuple[str, str | None]:
    """Return the text to trace, and the digest of the model that wrote it, where one did."""
    digest = None
    if config.text is not None:
        text = config.text
    elif config.file is not None:
        text = _read(config.file)
    else:
        answerer = Answerer(config, reporter)
        ids = answerer.encode(config.prompt or "")
        if not ids.shape[1]:
            raise UsageError("it has no token", field="prompt")
        text, digest = "".join(piece.text for piece in answerer.answer(ids, config.seed)), answerer.runnable.digest
    if not text.strip() and config.prompt is None:
        raise UsageError("there is no text to trace", field="text" if config.text is not None else "file")
    return text, digest


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror})", field="file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not UTF-8 at byte {error.start}", hint="convert it", field="file") from error


def _trace(index: Index, text: str, config: TraceFindConfig, reporter: Reporter) -> Traced:
    name = index.manifest.name
    with reporter.progress(f"tracing in {name}", len(text), "characters") as bar:
        spans = tracing.find_spans(index, text, least_bytes=config.least_bytes, most_places=config.places, progress=bar)
    near: list[Span] = []
    if config.near:
        with reporter.progress(f"near matches in {name}", len(text), "characters") as bar:
            near = tracing.near_spans(
                index, text, spans, least_bytes=config.least_bytes, most_places=config.places, progress=bar
            )
    covered = {place for span in spans for place in range(span.start, span.stop)}
    return Traced(
        name=name,
        path=index.path,
        digest=index.manifest.digest,
        documents=index.manifest.documents,
        covered=len(covered) / max(1, len(text)),
        spans=tuple(spans),
        near=tuple(near),
    )
