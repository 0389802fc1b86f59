"""Choose, at home, the public documents that are most like an owner's text: a list that tune-router trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flexctl import flags, routing, text, workspace
from flexctl.bundle.names import name_an_expert
from flexctl.bundle.proxy import write_proxy
from flexctl.bundle.store import check_file_target
from flexctl.errors import UsageError
from flexctl.options import DATA, ROUTER, Config, flag
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.machine import machine_of

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["SelectProxyConfig", "SelectProxyResult", "select_proxy"]

_SHARE = 0.1
_WEAK = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectProxyConfig(Config):
    """What ``select_proxy`` is asked to do.

    Writes a list of their numbers and hashes: what you give to a coordinator for tune-router in place of
    any text. It says which public documents your text resembles, and nothing else.

    Examples:
        flexctl select-proxy --data law/
        flexctl select-proxy --data law.jsonl --public crawl/ --count 5000 -o law.proxy.json
    """

    data: flags.Data
    public: flags.Public = None
    count: Annotated[
        int | None, flag("N", "Documents to choose (default: a tenth of the public text).", DATA, above=0)
    ] = None
    name: flags.Name = None
    output: Annotated[
        Path | None, flags.output("FILE", "File to write (default: NAME.proxy.json among the workspace's experts).")
    ] = None
    anchor: flags.Anchor = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    encoder: Annotated[
        str | None,
        flag("MODEL", "Tell texts apart by this sentence-transformers model, not by router inputs.", ROUTER),
    ] = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectProxyResult:
    """What ``select_proxy`` chose.

    Attributes:
        documents: How many were chosen.
        public_documents: Of how many.
        accuracy: Share of held-out passages that the classifier puts right, the owner's and public ones counted
            equally. It stays with the owner: the file does not have it.
        encoder: What told the texts apart; None is the anchor's router inputs.
    """

    path: Path
    digest: str | None
    name: str
    anchor_digest: str
    documents: int = 0
    public_documents: int = 0
    accuracy: float | None = None
    encoder: str | None = None
    dry_run: bool = False


def select_proxy(config: SelectProxyConfig, reporter: Reporter = SILENT) -> SelectProxyResult:
    """Choose the public documents that are most like the owner's text and write their numbers.

    Args:
        config: Whose text, which public text, how many.
        reporter: Hears of progress.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The anchor is not valid.
    """
    place = workspace.find()
    base = open_anchored(config, reporter)
    name = name_an_expert(config.name, text.source_name(config.data[0]))
    target = config.output or place.experts / f"{name}.proxy.json"
    check_file_target(target, overwrite=config.overwrite)
    machine_of(config)
    text.refuse_unreadable(config.data, config.text_field)
    if config.public is not None:
        text.refuse_unreadable([config.public], config.text_field, "public")
    if config.dry_run:
        return SelectProxyResult(path=target, digest=None, name=name, anchor_digest=base.anchor.digest, dry_run=True)
    ranking = _rank(config, base, reporter)
    if ranking.accuracy < _WEAK:
        reporter.warn(
            f"the classifier hardly tells this text from public text ({ranking.accuracy:.2f} of passages right)"
        )
    encoder = None if config.encoder is None else routing.encoder_name(config.encoder)
    proxy = write_proxy(
        target,
        name=name,
        anchor=base.anchor.manifest.ref,
        public=ranking.public,
        encoder=encoder,
        documents=ranking.documents,
        overwrite=config.overwrite,
    )
    return SelectProxyResult(
        path=target,
        digest=proxy.digest,
        name=name,
        anchor_digest=base.anchor.digest,
        documents=len(proxy.documents),
        public_documents=proxy.public.documents,
        accuracy=ranking.accuracy,
        encoder=encoder,
    )


def _rank(config: SelectProxyConfig, base: Anchored, reporter: Reporter) -> routing.Ranking:
    own = text.sample_passages(
        text.read_documents(config.data, config.text_field), 2 * routing.PASSAGES_A_FOLD, config.seed
    )
    if len(own) < 4:
        raise UsageError(
            f"{len(own)} passages are too few to tell from public text", hint="give more text", field="data"
        )
    reporter.note(f"telling {len(own)} passages from public text")
    return routing.rank_public(
        routing.public_reader(base.sample, base.tokenizer, config.public, config.text_field),
        text.frame_passages(base.tokenizer, own),
        _features(config, base),
        count=config.count,
        share=_SHARE,
        seed=config.seed,
        reporter=reporter,
    )


def _features(config: SelectProxyConfig, base: Anchored) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return what the classifier sees of passages: mean router inputs of all layers, or sentence embeddings."""
    if config.encoder is not None:
        encoder = routing.Encoder(config.encoder)
        return lambda windows: encoder.embed(
            [base.tokenizer.decode(window[1:], skip_special_tokens=True) for window in windows]
        )
    weights = base.anchor.weights()
    reader = machine_of(config, weights.shared).build(weights)
    # One document alone is refused there, as rows need more.
    return lambda windows: routing.measure_documents(reader, [windows[0], *windows])[1:].flatten(1)
