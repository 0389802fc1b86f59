"""A bundle that goes on with a text, token by token, and says who answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import model, workspace
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, ShareCollector, TextStream
from flexctl.runtime import Reporter
from flexctl.steps import sources
from flexctl.steps.machine import MachineConfig, machine_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Answerer", "AnswerSettings"]


class AnswerSettings(MachineConfig, Protocol):
    """What a Config says about answers: options of ``flexctl.flags`` by their names there."""

    @property
    def bundle(self) -> Path | None:
        """The bundle; None is the workspace's merged model."""

    @property
    def anchor(self) -> Path | None:
        """The anchor that an expert runs beside."""

    @property
    def without(self) -> tuple[str, ...]:
        """Closed experts that may not answer."""

    @property
    def max_new_tokens(self) -> int:
        """Length of an answer."""

    @property
    def temperature(self) -> float:
        """0 takes the likeliest token."""

    @property
    def top_k(self) -> int | None:
        """Experts active for a token."""


class Answerer:
    """A bundle, opened and ready to go on with texts.

    Args:
        settings: Which bundle, who may answer, how long and how freely.
        reporter: Hears of warnings.

    Attributes:
        runnable: The bundle.
        selection: Who may answer.

    Raises:
        UsageError: A setting is wrong, or there is no bundle.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """

    def __init__(self, settings: AnswerSettings, reporter: Reporter) -> None:
        place = workspace.find()
        self._settings, self._reporter = settings, reporter
        self.runnable = sources.runnable(settings.bundle or place.merged, settings.anchor or place.anchor, reporter)
        # Names and devices that are not there are refused before weights are read.
        self.selection = self.runnable.select(settings.without)
        machine = machine_of(settings, self.runnable.weights.shared)
        self._model: Any = machine.build(self.runnable.weights)
        self._tokenizer = model.load_tokenizer(self.runnable.tokenizer)
        self.select(settings.without)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    def select(self, without: Sequence[str]) -> None:
        """Let all answer but these, from now on.

        Raises:
            UsageError: One of them is not there, or is the public expert.
        """
        self.selection = self.runnable.select(without)
        self.runnable.warn_of_expired(self.selection, self._reporter)
        model.set_top_k(self._model, self.runnable.active(self._settings.top_k, self.selection, self._reporter))
        model.exclude(self._model, self.selection.left_out)

    def encode(self, text: str) -> Tensor:
        """Return a text's token ids, (1, S), int64."""
        ids: Tensor = self._tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        return ids

    def frame(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """Return the token ids of a conversation in the chat template there is, up to the next answer, (1, S), int64.

        Args:
            messages: Each with its ``role`` and ``content``.

        Raises:
            UsageError: The template fails.
        """
        from jinja2 import TemplateError

        options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            framed: Tensor = self._tokenizer.apply_chat_template(list(messages), **options)["input_ids"]
        except TemplateError as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            place = self.runnable.tokenizer
            raise UsageError(f"the chat template in {place} fails: {said}", hint="mend its template") from error
        return framed

    def answer(self, ids: Tensor, seed: int) -> Iterator[Piece]:
        """Return what follows, a piece a token, each as soon as it is final; warn of more than the model can hold.

        Args:
            ids: What it goes on with, (1, S), int64.
            seed: Of the tokens that are drawn.
        """
        tokens = ids.shape[1] + self._settings.max_new_tokens
        dense_config = self.runnable.weights.dense_config
        model.warn_of_length(tokens, dense_config, self._reporter, "prompt and continuation may have")
        return self._pieces(ids.to(self._model.device), seed)

    def _pieces(self, feed: Tensor, seed: int) -> Iterator[Piece]:
        import torch

        shares = ShareCollector(len(model.routed_layers(self._model)), positions=1)
        text = TextStream(self._tokenizer)
        generator = torch.Generator(self._model.device).manual_seed(seed % 2**63)
        cache = None
        for left in reversed(range(self._settings.max_new_tokens)):
            # Not around the yield: whoever reads the pieces may compute gradients, or have other uses of the model.
            with torch.no_grad(), model.observing(self._model, shares):
                out = self._model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = _choose(out.logits[0, -1].float(), self._settings.temperature, generator)
            is_last = not left or token in self._ends()
            by_expert = dict(zip(self.runnable.experts, shares.rows[-1], strict=True))
            yield Piece(text=text.add(token, is_last=is_last), shares=by_expert)
            if is_last:
                return
            feed, cache = feed.new_tensor([[token]]), out.past_key_values

    def _ends(self) -> set[int | None]:
        """Return the tokens that end an answer: those of the model's config, and the tokenizer's own."""
        said = self._model.generation_config.eos_token_id
        return {*(said if isinstance(said, list) else [said]), self._tokenizer.eos_token_id}


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return the next token for logits (vocab_size,), float32: the likeliest at temperature 0, else drawn."""
    if not temperature:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / temperature).softmax(dim=-1)
    return int(probabilities.multinomial(1, generator=generator))
