"""Talk with a bundle, and choose in between who may answer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexctl import flags
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece, mean_shares
from flexctl.options import Config
from flexctl.runtime import SILENT, Reporter
from flexctl.serving.stopping import Stops
from flexctl.steps.answering import Answerer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ChatConfig", "ChatResult", "ChatSession", "Turn", "chat"]

_USER, _ASSISTANT = "User:", "Assistant:"
"""Who speaks, in the transcript that stands in for a chat template."""

_HELP = """/without NAME  leave this expert out from here on
/with NAME     let it answer again
/explain       show who answered, or stop showing it
/help          show this
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig(Config):
    """What ``chat`` is asked to do.

    Each line is a turn. A line may also be /without NAME or /with NAME, which choose who may answer, /explain, which
    shows who did, /help or /quit. Ctrl-C stops an answer, Ctrl-D leaves. Lines may come from a pipe.

    The conversation is put in the model's chat template; without one, in a plain transcript.

    Examples:
        flexctl chat
        flexctl chat merged --without law --temperature 0.7
    """

    bundle: flags.Bundle = None
    without: flags.Without = ()
    max_new_tokens: flags.MaxNewTokens = 256
    temperature: flags.Temperature = 0.0
    anchor: flags.Anchor = None
    top_k: flags.TopK = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One line of the user's and its answer.

    Attributes:
        prompt: What the user said.
        text: The answer, as far as it came.
        tokens: New tokens.
        without: Experts that were left out.
        experts: Expert -> share of the kept probability, mean over new tokens and layers.
    """

    prompt: str
    text: str
    tokens: int
    without: list[str]
    experts: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatResult:
    """What was said.

    Attributes:
        path: The bundle; text for one on the Hub.
        turns: In order.
        without: Experts that were left out in the end.
        has_template: Whether the bundle has a chat template.
    """

    path: Path | str
    digest: str
    turns: list[Turn]
    without: list[str]
    has_template: bool


class ChatSession:
    """A conversation with a bundle.

    Args:
        config: Which bundle, and who may answer at first.
        reporter: Hears of warnings.

    Attributes:
        turns: What was said so far.

    Raises:
        UsageError: A setting is wrong, or there is no bundle.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """

    def __init__(self, config: ChatConfig, reporter: Reporter = SILENT) -> None:
        self.turns: list[Turn] = []
        self._seed = config.seed
        self._answerer = Answerer(config, reporter)

    @property
    def experts(self) -> list[str]:
        """All experts of the bundle, the public one first."""
        return self._answerer.runnable.experts

    @property
    def without(self) -> list[str]:
        """Names of those that may not answer, sorted."""
        return list(self._answerer.selection.without)

    @property
    def has_template(self) -> bool:
        """Whether the conversation is put in a chat template."""
        return self._answerer.has_template

    def leave_out(self, name: str) -> None:
        """Let an expert answer no longer.

        Raises:
            UsageError: It is not there, or is the public expert.
        """
        self._answerer.select([*self.without, name])

    def let_in(self, name: str) -> None:
        """Let an expert answer again.

        Raises:
            UsageError: It is not one that is left out.
        """
        if name not in self.without:
            raise UsageError(f"{name!r} is not left out; left out are {', '.join(self.without) or 'none'}")
        self._answerer.select([other for other in self.without if other != name])

    def say(self, text: str) -> Generator[Piece, None, None]:
        """Say something and yield the answer, piece by piece; what was yielded is the turn, also where it is stopped.

        Raises:
            UsageError: The chat template fails.
        """
        said: list[Piece] = []
        try:
            ids = self._answerer.frame(self._messages(text)) if self.has_template else self._transcript(text)
            answer = self._answerer.answer(ids, self._seed + len(self.turns))
            for piece in answer if self.has_template else _until(answer, f"\n{_USER}"):
                said.append(piece)
                yield piece
        finally:
            self.turns.append(
                Turn(
                    prompt=text,
                    text="".join(piece.text for piece in said),
                    tokens=len(said),
                    without=self.without,
                    experts=mean_shares(said),
                )
            )

    def result(self) -> ChatResult:
        """Return what was said so far."""
        runnable = self._answerer.runnable
        return ChatResult(
            path=runnable.path,
            digest=runnable.digest,
            turns=list(self.turns),
            without=self.without,
            has_template=self.has_template,
        )

    def _messages(self, text: str) -> list[dict[str, str]]:
        said = [(("user", turn.prompt), ("assistant", turn.text)) for turn in self.turns]
        return [{"role": role, "content": content} for turn in [*said, (("user", text),)] for role, content in turn]

    def _transcript(self, text: str) -> Tensor:
        said = "".join(f"{_USER} {turn.prompt}\n{_ASSISTANT}{turn.text}\n" for turn in self.turns)
        return self._answerer.encode(f"{said}{_USER} {text}\n{_ASSISTANT}")


def chat(config: ChatConfig, reporter: Reporter = SILENT) -> ChatResult:
    """Talk with a bundle until there are no more lines.

    Args:
        config: Which bundle, and who may answer at first.
        reporter: Gives the user's lines, hears each piece of the answers as soon as it is final, and warnings.

    Returns:
        What was said.

    Raises:
        UsageError: A setting is wrong, there is no bundle, or its chat template fails.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    session = ChatSession(config, reporter)
    reporter.note(f"{', '.join(session.experts)} are here; /help says what else there is, Ctrl-D leaves")
    if not session.has_template:
        reporter.note("no chat template here: the conversation is put as a transcript of User and Assistant")
    is_explained = False
    while (line := reporter.read()) is not None:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            break
        if word == "/explain":
            is_explained = not is_explained
        elif word.startswith("/"):
            _obey(session, word, rest.strip(), reporter)
        elif word:
            _say(session, line.strip(), reporter, is_explained=is_explained)
    return session.result()


def _obey(session: ChatSession, word: str, name: str, reporter: Reporter) -> None:
    """Do what a line asks for that begins with a slash; what cannot be done is a warning."""
    choices: dict[str, Callable[[str], None]] = {"/without": session.leave_out, "/with": session.let_in}
    if word == "/help":
        reporter.write(_HELP)
    elif word not in choices:
        reporter.warn(f"{word} is not known; /help lists what is")
    elif not name:
        reporter.warn(f"{word} needs the name of an expert: {', '.join(session.experts[1:])}")
    else:
        try:
            choices[word](name)
        except UsageError as error:
            reporter.warn(error.message)
        else:
            reporter.note(f"left out: {', '.join(session.without) or 'nobody'}")


def _say(session: ChatSession, text: str, reporter: Reporter, *, is_explained: bool) -> None:
    said: list[Piece] = []
    with reporter.stoppable(), closing(session.say(text)) as pieces:
        for piece in pieces:
            said.append(piece)
            reporter.write(piece.text, piece.leader if is_explained else 0)
    reporter.write("\n")
    if is_explained and said:
        reporter.write(f"({', '.join(f'{name} {share:.0%}' for name, share in mean_shares(said).items())})\n")


def _until(pieces: Iterator[Piece], stop: str) -> Iterator[Piece]:
    """Yield pieces up to a text at which they stop; those that may be its beginning are held until that is known."""
    stops: Stops[Piece] = Stops((stop,))
    for piece in pieces:
        yield from stops.add(piece)
        if stops.found:
            return
    yield from stops.rest()
