"""chat: a conversation that is kept, in which the user chooses who may answer."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from builders import anchor_with_chat_template

from flexctl.bundle import open_merged
from flexctl.cli.app import main
from flexctl.engine.chat import ChatConfig, ChatResult, ChatSession, _until, chat
from flexctl.engine.generate import GenerateConfig, generate
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece
from flexctl.runtime import SilentReporter

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SETTINGS: dict[str, Any] = {"max_new_tokens": 4, "threads": 1}


class Person(SilentReporter):
    """Says some lines and hears what comes; stops answers after ``patience`` pieces where it has any."""

    def __init__(self, *lines: str, patience: int = 0) -> None:
        self._lines = list(lines)
        self._patience = patience
        self.heard: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def read(self) -> str | None:
        return self._lines.pop(0) if self._lines else None

    def write(self, text: str, by: int = 0) -> None:
        del by
        self.heard.append(text)
        if self._patience and len(self.heard) == self._patience:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def stoppable(self) -> AbstractContextManager[object]:
        return suppress(KeyboardInterrupt)


def talk(bundle: Path, *lines: str, **settings: Any) -> tuple[ChatResult, Person]:
    person = Person(*lines)
    return chat(ChatConfig(bundle=bundle, **{**SETTINGS, **settings}), person), person


def continued(bundle: Path, prompt: str, **settings: Any) -> str:
    return generate(GenerateConfig(bundle=bundle, prompt=prompt, **{**SETTINGS, **settings})).text


def test_without_a_template_it_is_a_transcript_that_is_kept(merged: Path) -> None:
    result, person = talk(merged, "def a(", "", "  and b? ", "/quit", "never read")
    first, second = result.turns
    assert (first.prompt, second.prompt) == ("def a(", "and b?")
    assert first.text == continued(merged, "User: def a(\nAssistant:")
    assert second.text == continued(merged, f"User: def a(\nAssistant:{first.text}\nUser: and b?\nAssistant:")
    assert "".join(person.heard) == f"{first.text}\n{second.text}\n"
    assert (result.path, result.digest, result.has_template) == (merged, open_merged(merged).digest, False)
    assert sum("no chat template" in note for note in person.notes) == 1
    assert person.warnings == []


def test_with_a_template_all_turns_are_put_in_it(anchor: Path, tmp_path: Path) -> None:
    chatty = anchor_with_chat_template(anchor, tmp_path)
    result, person = talk(chatty, "one", "two")
    first, second = result.turns
    assert first.text == continued(chatty, "[user] one\n>")
    assert second.text == continued(chatty, f"[user] one\n[assistant] {first.text}\n[user] two\n>")
    assert result.has_template
    assert not any("no chat template" in note for note in person.notes)


def test_who_may_answer_changes_in_between(merged: Path) -> None:
    result, person = talk(merged, "a", "/without code", "a", "/without sums", "a", "/with code", "a")
    assert [turn.without for turn in result.turns] == [[], ["code"], ["code", "sums"], ["sums"]]
    shares = [turn.experts for turn in result.turns]
    assert shares[0]["code"] > 0 == shares[1]["code"]
    assert shares[2] == {"public": 1.0, "code": 0.0, "sums": 0.0}
    assert shares[3]["code"] > 0 == shares[3]["sums"]
    assert result.without == ["sums"]
    assert person.notes[-3:] == ["left out: code", "left out: code, sums", "left out: sums"]


def test_what_cannot_be_done_is_a_warning_and_the_conversation_goes_on(merged: Path) -> None:
    lines = ("/without nobody", "/with code", "/without public", "/without", "/dance", "a")
    result, person = talk(merged, *lines, without=("sums",))
    assert person.warnings == [
        f"without: 'nobody' is not in {merged}, which holds public, code, sums",
        "'code' is not left out; left out are sums",
        "without: the public expert cannot be left out",
        "/without needs the name of an expert: code, sums",
        "/dance is not known; /help lists what is",
    ]
    assert [turn.without for turn in result.turns] == [["sums"]]


def test_explain_and_help(merged: Path) -> None:
    _, person = talk(merged, "/explain", "a", "/explain", "a", "/help")
    text = "".join(person.heard)
    assert text.count("(public ") == 1
    assert "%, sums " in text
    assert all(word in text for word in ("/without", "/with", "/explain", "/quit"))


def test_an_answer_can_be_stopped(merged: Path) -> None:
    person = Person("a", "b", patience=2)
    result = chat(ChatConfig(bundle=merged, **SETTINGS), person)
    assert [turn.tokens for turn in result.turns] == [2, 4]
    assert result.turns[0].text == "".join(person.heard[:2])


def test_a_session_gives_pieces_to_python(merged: Path) -> None:
    session = ChatSession(ChatConfig(bundle=merged, **SETTINGS))
    pieces = list(session.say("a"))
    assert "".join(piece.text for piece in pieces) == session.turns[0].text
    session.leave_out("code")
    with pytest.raises(UsageError, match="nobody"):
        session.leave_out("nobody")
    assert session.result().without == ["code"]


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ([" yes", "\n", "User", ":", " more"], [" yes"]),
        ([" yes\nUser: more"], [" yes"]),
        ([" a", "\n", "U", "tah", "."], [" a", "\n", "U", "tah", "."]),
        (["\n", "\nUs"], ["\n", "\nUs"]),
        ([], []),
    ],
)
def test_a_transcript_ends_where_the_user_would_speak(texts: list[str], shown: list[str]) -> None:
    def pieces() -> Iterator[Piece]:
        yield from (Piece(text=text, shares={"public": 1.0}) for text in texts)

    assert [piece.text for piece in _until(pieces(), "\nUser:")] == shown


def test_lines_come_from_a_pipe(
    merged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/without code\n/without nobody\nb"))
        assert main(["chat", str(merged), "--max-new-tokens", "4", "--threads", "1", *flags]) == 0
        out, err = capsys.readouterr()
        return out, err

    out, err = run("--json")
    assert err == ""
    found = json.loads(out)
    assert found["command"] == "chat"
    assert [(turn["prompt"], turn["without"]) for turn in found["turns"]] == [("a", []), ("b", ["code"])]
    assert [text.split(" is not in ")[0] for text in found["warnings"]] == ["without: 'nobody'"]
    assert run("-q") == ("".join(f"{turn['text']}\n" for turn in found["turns"]), "")
