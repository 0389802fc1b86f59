"""A bundle that is loaded to say something, and one that goes on with a text and says who answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import model, workspace
from flexctl.bundle.runnable import Runnable
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, ShareCollector, TextStream
from flexctl.runtime import Reporter
from flexctl.steps import sources
from flexctl.steps.machine import Machine, MachineConfig, machine_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Answerer", "AnswerSettings", "Speaker", "SpeakerSettings", "opened"]


class SpeakerSettings(MachineConfig, Protocol):
    """What a Config says about a bundle that is to say something: options of ``flexctl.flags`` by their names there."""

    @property
    def bundle(self) -> Path | None:
        """The bundle; None is the workspace's merged model."""

    @property
    def anchor(self) -> Path | None:
        """The anchor that an expert runs beside."""

    @property
    def top_k(self) -> int | None:
        """Experts active for a token."""


class AnswerSettings(SpeakerSettings, Protocol):
    """What a Config says about answers too."""

    @property
    def without(self) -> tuple[str, ...]:
        """Closed experts that may not answer."""

    @property
    def max_new_tokens(self) -> int:
        """Length of an answer."""

    @property
    def temperature(self) -> float:
        """0 takes the likeliest token."""


def opened(settings: SpeakerSettings, reporter: Reporter) -> Runnable:
    """Return the bundle that is to say something; its weights are not read yet.

    Raises:
        UsageError: There is none.
        BundleError: It is not valid, or does not belong to the anchor.
    """
    place = workspace.find()
    return sources.runnable(settings.bundle or place.merged, settings.anchor or place.anchor, reporter)


class Speaker:
    """A bundle whose weights and tokenizer are loaded.

    Args:
        runnable: The bundle.
        machine: What it runs on.

    Attributes:
        runnable: The bundle.
        net: Its model.

    Raises:
        BundleError: Its weights or its tokenizer are not right.
    """

    def __init__(self, runnable: Runnable, machine: Machine) -> None:
        self.runnable = runnable
        self.net: Any = machine.build(runnable.weights)
        self.tokenizer = model.load_tokenizer(runnable.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def ends(self) -> set[int | None]:
        """The tokens that end an answer: those of the model's config, and the tokenizer's own."""
        said = self.net.generation_config.eos_token_id
        return {*(said if isinstance(said, list) else [said]), self.tokenizer.eos_token_id}

    def encode(self, text: str) -> Tensor:
        """Return a text's token ids, (1, S), int64."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
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
            framed: Tensor = self.tokenizer.apply_chat_template(list(messages), **options)["input_ids"]
        except TemplateError as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            place = self.runnable.tokenizer
            raise UsageError(f"the chat template in {place} fails: {said}", hint="mend its template") from error
        return framed


class Answerer(Speaker):
    """A bundle, opened and ready to go on with texts.

    Args:
        settings: Which bundle, who may answer, how long and how freely.
        reporter: Hears of warnings.

    Attributes:
        selection: Who may answer.

    Raises:
        UsageError: A setting is wrong, or there is no bundle.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """

    def __init__(self, settings: AnswerSettings, reporter: Reporter) -> None:
        self._settings, self._reporter = settings, reporter
        runnable = opened(settings, reporter)
        # Names and devices that are not there are refused before weights are read.
        self.selection = runnable.select(settings.without)
        super().__init__(runnable, machine_of(settings))
        self.select(settings.without)

    def select(self, without: Sequence[str]) -> None:
        """Let all answer but these, from now on.

        Raises:
            UsageError: One of them is not there, or is the public expert.
        """
        self.selection = self.runnable.select(without)
        self.runnable.warn_of_expired(self.selection, self._reporter)
        model.set_top_k(self.net, self.runnable.active(self._settings.top_k, self.selection, self._reporter))
        model.exclude(self.net, self.selection.left_out)

    def answer(self, ids: Tensor, seed: int) -> Iterator[Piece]:
        """Return what follows, a piece a token, each as soon as it is final; warn of more than the model can hold.

        Args:
            ids: What it goes on with, (1, S), int64.
            seed: Of the tokens that are drawn.
        """
        tokens = ids.shape[1] + self._settings.max_new_tokens
        dense_config = self.runnable.weights.dense_config
        model.warn_of_length(tokens, dense_config, self._reporter, "prompt and continuation may have")
        return self._pieces(ids.to(self.net.device), seed)

    def _pieces(self, feed: Tensor, seed: int) -> Iterator[Piece]:
        import torch

        shares = ShareCollector(len(model.routed_layers(self.net)), positions=1)
        text = TextStream(self.tokenizer)
        generator = torch.Generator(self.net.device).manual_seed(seed % 2**63)
        cache = None
        for left in reversed(range(self._settings.max_new_tokens)):
            # Not around the yield: whoever reads the pieces may compute gradients, or have other uses of the model.
            with torch.no_grad(), model.observing(self.net, shares):
                out = self.net(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = _choose(out.logits[0, -1].float(), self._settings.temperature, generator)
            is_last = not left or token in self.ends
            by_expert = dict(zip(self.runnable.experts, shares.rows[-1], strict=True))
            yield Piece(text=text.add(token, is_last=is_last), shares=by_expert)
            if is_last:
                return
            feed, cache = feed.new_tensor([[token]]), out.past_key_values


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return the next token for logits (vocab_size,), float32: the likeliest at temperature 0, else drawn."""
    if not temperature:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / temperature).softmax(dim=-1)
    return int(probabilities.multinomial(1, generator=generator))
