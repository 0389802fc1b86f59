"""Continue a prompt, and say who answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from flexctl import flags
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, mean_shares
from flexctl.options import DATA, OUTPUT, Config, flag, switch
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.answering import Answerer

__all__ = ["GenerateConfig", "GenerateResult", "generate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(Config):
    """What ``generate`` is asked to do.

    The shares that `explain` shows tell something of the text: a simple probe told one token in six from them, where
    the commonest is one in twenty-two (docs/audit.md, section 6).

    Examples:
        flexctl generate --prompt "The court held that" --explain
        flexctl generate --prompt "The court held that" --without law
    """

    bundle: flags.Bundle = None
    prompt: Annotated[str, flag("TEXT", "The text to continue.", DATA)]
    without: flags.Without = ()
    explain: Annotated[bool, switch("Show which expert answered, piece by piece.", OUTPUT)] = False
    chat: Annotated[bool, switch("Put the prompt as a user's message, in the model's chat template.", DATA)] = False
    max_new_tokens: flags.MaxNewTokens = 64
    temperature: flags.Temperature = 0.0
    anchor: flags.Anchor = None
    top_k: flags.TopK = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """What ``generate`` wrote.

    Attributes:
        path: The bundle; text for one on the Hub.
        prompt: As it was given, without a chat template around it.
        text: The continuation without the prompt.
        tokens: New tokens.
        experts: Expert -> share of the kept probability, mean over new tokens and layers.
        pieces: Token by token, where that was asked for.
    """

    path: Path | str
    digest: str
    prompt: str
    text: str
    tokens: int
    without: list[str]
    experts: dict[str, float]
    chat: bool = False
    pieces: list[Piece] = field(default_factory=list)


def generate(config: GenerateConfig, reporter: Reporter = SILENT) -> GenerateResult:
    """Continue a prompt with a bundle.

    Args:
        config: Which bundle, which prompt, whom to leave out.
        reporter: Hears the prompt and each piece of the answer as soon as it is final, and warnings.

    Returns:
        The continuation and who had what share in it.

    Raises:
        UsageError: A setting is wrong, the prompt is empty, or there is no chat template where one is asked for.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    if not config.prompt:
        raise UsageError("it is empty", hint='for example "def main("', field="prompt")
    answerer = Answerer(config, reporter)
    if config.chat and not answerer.has_template:
        place = answerer.runnable.tokenizer
        raise UsageError(f"the tokenizer in {place} has no chat template", hint="leave it out", field="chat")
    message = {"role": "user", "content": config.prompt}
    ids = answerer.frame([message]) if config.chat else answerer.encode(config.prompt)
    if not ids.shape[1]:
        raise UsageError(f"{config.prompt!r} has no token in {answerer.runnable.tokenizer}", field="prompt")
    answer, pieces = answerer.answer(ids, config.seed), []
    reporter.write(f"{config.prompt}\n\n" if config.chat else config.prompt)
    for piece in answer:
        pieces.append(piece)
        reporter.write(piece.text, piece.leader if config.explain else 0)
    return GenerateResult(
        path=answerer.runnable.path,
        digest=answerer.runnable.digest,
        prompt=config.prompt,
        text="".join(piece.text for piece in pieces),
        tokens=len(pieces),
        without=list(config.without),
        experts=mean_shares(pieces),
        chat=config.chat,
        pieces=pieces if config.explain else [],
    )
