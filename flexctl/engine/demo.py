"""The whole life of an expert on text found on any Python machine, offline, in a few minutes.

It goes through the public Python API, as a user's own script would.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import flexctl
from flexctl import flags, model, text, workspace
from flexctl.errors import FlexctlError, UsageError
from flexctl.options import Config
from flexctl.runtime import SILENT, Reporter

__all__ = ["DemoConfig", "DemoResult", "demo"]

_EXPERT_TOKENS = 120_000
_DOMAIN_BYTES = 1_500_000
_REMOVED = "licenses"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig(Config):
    """What ``demo`` is asked to do.

    Makes an anchor and experts from text that is on this machine, merges them, scores them, removes one
    and proves that it is gone. Everything is left in the directory to look around.

    Examples:
        flexctl demo
    """

    output: Annotated[Path, flags.output("DIR", "Directory to work in.")] = Path("demo")
    threads: flags.Threads = None
    overwrite: flags.Overwrite = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What ``demo`` showed.

    Attributes:
        path: The workspace.
        merged: The merged model, without the removed expert.
        bits_per_byte: Domain -> stage (anchor, merged, removed) -> bits per byte on test text.
        removed: The expert that was removed.
        removal_exact: The model after removal has the digest of a merge that never had the expert.
        absent: No tensor, row, manifest entry or file of it is left.
        stock_loads: AutoModelForCausalLM.from_pretrained loads the model with no missing and no unexpected key.
        seconds: How long it took.
    """

    path: Path
    merged: Path
    bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    removed: str = _REMOVED
    removal_exact: bool = False
    absent: bool = False
    stock_loads: bool = False
    seconds: float = 0.0


def demo(config: DemoConfig, reporter: Reporter = SILENT) -> DemoResult:
    """Train an anchor and three experts, merge, evaluate, remove one, evaluate again, and verify.

    Args:
        config: Where to work.
        reporter: Hears each command as it comes.

    Returns:
        What each expert brought and what its removal took away.

    Raises:
        UsageError: The directory is there already.
        FlexctlError: Something that the demo promises does not hold.
    """
    started = time.monotonic()
    root = config.output
    _clear(root, config.overwrite)
    data = _write_text(root, reporter)
    public, *owners = data
    anchor, merged = root / "anchor", root / "merged"
    reporter.note(f"$ flexctl init-anchor --data {data[public][0]} --preset nano")
    flexctl.init_anchor(
        flexctl.InitAnchorConfig(data=(data[public][0],), output=anchor, preset="nano", threads=config.threads),
        reporter,
    )
    workspace.ensure(root)
    experts = {name: _train(config, name, data[name][0], anchor, reporter) for name in owners}
    reporter.note(f"$ flexctl merge {' '.join(str(path) for path in experts.values())}")
    flexctl.merge(flexctl.MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=merged), reporter)
    scores = {"anchor": _score(config, anchor, data, reporter), "merged": _score(config, merged, data, reporter)}
    reporter.note(f"$ flexctl remove {_REMOVED}")
    removed = flexctl.remove(flexctl.RemoveConfig(names=(_REMOVED,), source=merged), reporter)
    scores["removed"] = _score(config, merged, data, reporter)
    reporter.note(f"$ flexctl verify {merged} --absent {_REMOVED}")
    verified = flexctl.verify(flexctl.VerifyConfig(path=merged, absent=(_REMOVED,), anchor=anchor), reporter)
    result = DemoResult(
        path=root,
        merged=merged,
        bits_per_byte={domain: {stage: found[domain] for stage, found in scores.items()} for domain in data},
        removal_exact=removed.digest == _digest_of_others(root, experts, anchor, reporter),
        absent=verified.ok,
        stock_loads=_stock_loads(merged),
        seconds=time.monotonic() - started,
    )
    if not (result.removal_exact and result.absent and result.stock_loads):
        raise FlexctlError(f"the demo's promises do not hold: {result}")
    return result


def _clear(root: Path, overwrite: bool) -> None:
    if not root.exists():
        return
    if not overwrite:
        raise UsageError(f"{root} exists already", hint="give another `output`, or `overwrite` to start again")
    if not (root / "data").is_dir() and any(root.iterdir()):
        raise UsageError(f"{root} is no earlier demo", hint="give another `output`")
    shutil.rmtree(root)


def _write_text(root: Path, reporter: Reporter) -> dict[str, tuple[Path, Path]]:
    reporter.note("collecting text: pydoc topics, standard library, licence files, made-up arithmetic")
    return {name: text.write_domain(root / "data" / name, find(), _DOMAIN_BYTES) for name, find in text.DOMAINS.items()}


def _train(config: DemoConfig, name: str, data: Path, anchor: Path, reporter: Reporter) -> Path:
    path = config.output / "experts" / f"{name}.st"
    reporter.note(f"$ flexctl train-expert --data {data} --name {name}")
    flexctl.train_expert(
        flexctl.TrainExpertConfig(
            data=(data,), anchor=anchor, name=name, output=path, max_tokens=_EXPERT_TOKENS, threads=config.threads
        ),
        reporter,
    )
    return path


def _score(
    config: DemoConfig, bundle: Path, data: dict[str, tuple[Path, Path]], reporter: Reporter
) -> dict[str, float]:
    asked = tuple(f"{name}={test}" for name, (_, test) in data.items())
    reporter.note(f"$ flexctl evaluate {bundle} {' '.join(f'--data {item}' for item in asked)}")
    found = flexctl.evaluate(flexctl.EvaluateConfig(bundle=bundle, data=asked, threads=config.threads), reporter)
    return {name: score.bits_per_byte for name, score in found.perplexity.items()}


def _digest_of_others(root: Path, experts: dict[str, Path], anchor: Path, reporter: Reporter) -> str | None:
    """Return the digest of a merge that never had the removed expert."""
    others = tuple(path for name, path in experts.items() if name != _REMOVED)
    fresh = root / "merged-without"
    digest = flexctl.merge(flexctl.MergeConfig(experts=others, anchor=anchor, output=fresh), reporter).digest
    shutil.rmtree(fresh)
    return digest


def _stock_loads(merged: Path) -> bool:
    return not model.stock_problems(merged)
