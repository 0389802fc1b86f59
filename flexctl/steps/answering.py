"""A bundle that goes on with a text, token by token, and says who answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import hub, workspace
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, ShareCollector, TextStream
from flexctl.runtime import Reporter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Answerer", "AnswerSettings"]


class AnswerSettings(Protocol):
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

    @property
    def threads(self) -> int | None:
        """CPU threads."""

    @property
    def device(self) -> str:
        """Where it runs."""

    @property
    def dtype(self) -> str:
        """In which precision."""


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
        from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype, set_threads

        place = workspace.find()
        self._settings, self._reporter = settings, reporter
        self.runnable = hub.runnable(settings.bundle or place.merged, settings.anchor or place.anchor, reporter)
        # Names and devices that are not there are refused before weights are read.
        self.selection = self.runnable.select(settings.without)
        set_threads(settings.threads)
        device = pick_device(settings.device)
        dtype = pick_dtype(settings.dtype, device)
        self._model: Any = build_model(self.runnable.weights, device=device, dtype=dtype)
        self._tokenizer = load_tokenizer(self.runnable.tokenizer)
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
        from flexctl.model.routed import exclude, set_top_k

        self.selection = self.runnable.select(without)
        self.runnable.warn_of_expired(self.selection, self._reporter)
        set_top_k(self._model, self.runnable.active(self._settings.top_k, self.selection, self._reporter))
        exclude(self._model, self.selection.left_out)

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
        from flexctl.model.configs import warn_of_length

        tokens = ids.shape[1] + self._settings.max_new_tokens
        dense_config = self.runnable.weights.dense_config
        warn_of_length(tokens, dense_config, self._reporter, "prompt and continuation may have")
        return self._pieces(ids.to(self._model.device), seed)

    def _pieces(self, feed: Tensor, seed: int) -> Iterator[Piece]:
        import torch

        from flexctl.model.routed import observing, routed_layers

        shares = ShareCollector(len(routed_layers(self._model)), positions=1)
        text = TextStream(self._tokenizer)
        generator = torch.Generator(self._model.device).manual_seed(seed % 2**63)
        cache = None
        for left in reversed(range(self._settings.max_new_tokens)):
            # Not around the yield: whoever reads the pieces may compute gradients, or have other uses of the model.
            with torch.no_grad(), observing(self._model, shares):
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
