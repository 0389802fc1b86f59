"""Continue a prompt, and say who answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import flags, hub, workspace
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, ShareCollector, texts_of
from flexctl.options import DATA, MODEL, OUTPUT, Config, flag, switch
from flexctl.runtime import SILENT, Reporter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GenerateConfig", "GenerateResult", "generate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(Config):
    """What ``generate`` is asked to do.

    Examples:
        flexctl generate --prompt "The court held that" --explain
        flexctl generate --prompt "The court held that" --without law
    """

    bundle: flags.Bundle = None
    prompt: Annotated[str, flag("TEXT", "The text to continue.", DATA)]
    without: flags.Without = ()
    explain: Annotated[bool, switch("Show which expert answered, piece by piece.", OUTPUT)] = False
    chat: Annotated[bool, switch("Put the prompt as a user's message, in the model's chat template.", DATA)] = False
    max_new_tokens: Annotated[int, flag("N", "Length of the answer.", OUTPUT, above=0)] = 64
    temperature: Annotated[
        float, flag("T", "0 takes the likeliest token; above, tokens are drawn.", MODEL, at_least=0)
    ] = 0.0
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
        reporter: Hears of warnings.

    Returns:
        The continuation and who had what share in it.

    Raises:
        UsageError: A setting is wrong, the prompt is empty, or there is no chat template where one is asked for.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype, set_threads
    from flexctl.model.configs import warn_of_length
    from flexctl.model.routed import exclude, routed_layers, set_top_k

    _refuse_bad_settings(config)
    place = workspace.find()
    runnable = hub.runnable(config.bundle or place.merged, config.anchor or place.anchor, reporter)
    selection = runnable.select(config.without)
    runnable.warn_of_expired(selection, reporter)
    set_threads(config.threads)
    device = pick_device(config.device)
    model = build_model(runnable.weights, device=device, dtype=pick_dtype(config.dtype, device))
    set_top_k(model, runnable.active(config.top_k, selection, reporter))
    exclude(model, selection.left_out)
    tokenizer = load_tokenizer(runnable.tokenizer)
    ids = _prompt_ids(config, tokenizer, runnable.tokenizer)
    tokens = ids.shape[1] + config.max_new_tokens
    warn_of_length(tokens, runnable.weights.dense_config, reporter, "prompt and continuation may have")
    shares = ShareCollector(len(routed_layers(model)), positions=1)
    new = _continue(config, model, tokenizer, ids.to(device), shares)
    totals = shares.mean(runnable.experts)
    pieces = [
        Piece(text=text, shares=dict(zip(runnable.experts, row, strict=True)))
        for text, row in zip(texts_of(tokenizer, new), shares.rows, strict=True)
    ]
    return GenerateResult(
        path=runnable.path,
        digest=runnable.digest,
        prompt=config.prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        without=list(config.without),
        experts=totals,
        chat=config.chat,
        pieces=pieces if config.explain else [],
    )


def _refuse_bad_settings(config: GenerateConfig) -> None:
    if not config.prompt:
        raise UsageError("it is empty", hint='for example "def main("', field="prompt")


def _prompt_ids(config: GenerateConfig, tokenizer: Any, folder: Path) -> Tensor:
    """Return the prompt's token ids, (1, S), int64."""
    from jinja2 import TemplateError

    if not config.chat:
        ids: Tensor = tokenizer(config.prompt, return_tensors="pt", verbose=False)["input_ids"]
        return ids
    if tokenizer.chat_template is None:
        raise UsageError(f"the tokenizer in {folder} has no chat template", hint="leave it out", field="chat")
    messages = [{"role": "user", "content": config.prompt}]
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    try:
        chat = tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the chat template in {folder} fails: {said}", hint="leave it out", field="chat") from error
    framed: Tensor = chat["input_ids"]
    return framed


def _continue(config: GenerateConfig, model: Any, tokenizer: Any, ids: Tensor, shares: ShareCollector) -> list[int]:
    import torch

    from flexctl.model.routed import observing

    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    with torch.no_grad(), observing(model, shares):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    return [int(token) for token in out[0, ids.shape[1] :]]
