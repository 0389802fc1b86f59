"""generate: stock Transformers' own continuation, and an account of who wrote it that adds up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from builders import anchor_with_chat_template, forge_expert

import flexctl.steps.answering as module
from flexctl.bundle import open_expert, open_merged
from flexctl.engine.generate import GenerateConfig, GenerateResult, generate
from flexctl.engine.merge import MergeConfig, merge
from flexctl.errors import FlexctlError, UsageError
from flexctl.evaluation.explaining import TextStream, texts_of
from flexctl.model.building import load_tokenizer
from flexctl.model.routed import observing
from flexctl.runtime import SILENT, SilentReporter
from flexctl.steps.answering import Answerer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

PROMPT = "def value_index(self"


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(bundle: Path | None, prompt: str = PROMPT, **settings: Any) -> GenerateResult:
    return generate(GenerateConfig(prompt=prompt, bundle=bundle, **{"max_new_tokens": 12, "threads": 1, **settings}))


@torch.no_grad()
def stock_text(directory: Path, tokens: int) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_continuation_is_that_of_stock_software(anchor: Path, merged: Path) -> None:
    for directory in (anchor, merged):
        result = run(directory)
        assert result.text == stock_text(directory, 12)
        assert result.prompt == PROMPT
        assert not result.text.startswith(PROMPT)
        assert 1 <= result.tokens <= 12


def test_who_answered_adds_up(merged: Path) -> None:
    result = run(merged, explain=True)
    assert (result.path, result.digest) == (merged, open_merged(merged).digest)
    assert list(result.experts) == ["public", "code", "sums"]
    assert sum(result.experts.values()) == pytest.approx(1.0, abs=1e-6)
    assert len(result.pieces) == result.tokens
    assert "".join(piece.text for piece in result.pieces) == result.text
    for piece in result.pieces:
        assert sum(piece.shares.values()) == pytest.approx(1.0, abs=1e-6)
    for name, share in result.experts.items():
        mean = sum(piece.shares[name] for piece in result.pieces) / result.tokens
        assert share == pytest.approx(mean, abs=1e-9)
    assert run(merged).pieces == []
    assert run(merged).experts == result.experts


@torch.no_grad()
def test_shares_are_those_of_the_position_that_chose_the_token(merged: Path) -> None:
    result = run(merged, explain=True, max_new_tokens=3)
    tokenizer = load_tokenizer(merged)
    ids = tokenizer(PROMPT + result.text, return_tensors="pt")["input_ids"]
    start = len(tokenizer(PROMPT)["input_ids"])
    found: list[torch.Tensor] = []
    model = tiny.build(open_merged(merged).weights())
    with observing(model, lambda _layer, _inputs, kept, _outputs: found.append(kept / kept.sum(dim=1, keepdim=True))):
        model(ids)
    mean = torch.stack(found).mean(dim=0)
    assert ids.shape[1] == start + result.tokens
    for i, piece in enumerate(result.pieces):
        assert list(piece.shares.values()) == pytest.approx(mean[start - 1 + i].tolist(), abs=1e-4)


def test_expert_has_a_larger_share_in_its_own_text(merged: Path) -> None:
    code, sums = (run(merged, tiny.make_texts(kind, 1, seed=5)[0][:300]) for kind in ("code", "sums"))
    assert code.experts["code"] > sums.experts["code"]
    assert sums.experts["sums"] > code.experts["sums"]


@pytest.mark.parametrize("seed", range(8))
def test_pieces_are_the_text_even_where_letters_span_tokens(merged: Path, seed: int) -> None:
    """A hot sample of a byte-level model is full of half letters, at its end too."""
    result = run(merged, explain=True, temperature=50.0, seed=seed, max_new_tokens=6)
    assert "".join(piece.text for piece in result.pieces) == result.text


def test_pieces_of_a_text_that_ends_inside_a_letter(merged: Path) -> None:
    tokenizer = load_tokenizer(merged)
    tokens = tokenizer("ab\u20ac\U0001f600")["input_ids"]
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        pieces = texts_of(tokenizer, tokens[:end])
        assert len(pieces) == end
        assert "".join(pieces) == text


def test_sampling_repeats_with_its_seed(merged: Path) -> None:
    first, again, other = (run(merged, temperature=1.5, seed=seed, max_new_tokens=30) for seed in (3, 3, 4))
    assert (first.text, first.experts) == (again.text, again.experts)
    assert first.text != other.text
    assert run(merged, temperature=0.0, seed=1).text == run(merged, temperature=0.0, seed=2).text


def test_temperature_alone_decides_what_may_be_sampled(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a very high temperature every token is as likely: no hidden cut to the fifty likeliest."""
    sampled: set[int] = set()
    choose = module._choose

    def keep(*arguments: Any) -> int:
        token = choose(*arguments)
        sampled.add(token)
        return token

    monkeypatch.setattr(module, "_choose", keep)
    answerer = Answerer(GenerateConfig(prompt=PROMPT, bundle=merged, temperature=1e6, max_new_tokens=1), SILENT)
    ids = answerer.encode(PROMPT)
    for seed in range(150):
        list(answerer.answer(ids, seed))
    assert len(sampled) > 80


def test_the_answer_is_written_while_it_comes(merged: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listening(SilentReporter):
        def write(self, text: str, by: int = 0) -> None:
            heard.append((text, by))

    config = GenerateConfig(prompt=PROMPT, bundle=merged, max_new_tokens=12, threads=1)
    plain = generate(config, Listening())
    assert [text for text, _ in heard[:1]] == [PROMPT]
    assert len(heard) == 1 + plain.tokens
    assert "".join(text for text, _ in heard[1:]) == plain.text
    assert {by for _, by in heard} == {0}
    heard.clear()
    explained = generate(dataclasses.replace(config, explain=True), Listening())
    assert heard == [(PROMPT, 0), *((piece.text, piece.leader) for piece in explained.pieces)]


def test_no_character_is_written_in_halves(merged: Path) -> None:
    tokenizer = load_tokenizer(merged)
    stream = TextStream(tokenizer)
    tokens = tokenizer("ab\u20ac\U0001f600c")["input_ids"]
    added = [stream.add(token) for token in tokens]
    assert len(tokens) > 5
    assert "".join(added) == "ab\u20ac\U0001f600c"
    assert not any("\ufffd" in text for text in added)


def test_a_long_text_is_read_piece_by_piece_as_it_is_whole(merged: Path) -> None:
    tokenizer = load_tokenizer(merged)
    text = " ".join(f"the {i}th \u20acuro, \U0001f600 und \u00e4hnliches" for i in range(60))
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > 500
    assert "".join(texts_of(tokenizer, tokens)) == text


def test_a_reader_of_the_pieces_may_compute_gradients(merged: Path) -> None:
    answerer = Answerer(GenerateConfig(prompt=PROMPT, bundle=merged, max_new_tokens=2), SILENT)
    for _ in answerer.answer(answerer.encode(PROMPT), 0):
        assert torch.is_grad_enabled()


def test_a_prompt_without_a_token_is_refused(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answerer, "encode", lambda *_: torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(UsageError, match="prompt: ' ' has no token"):
        run(merged, " ")


def test_left_out_experts_have_no_share_and_no_say(
    tmp_path: Path, merged: Path, anchor: Path, experts: dict[str, Path]
) -> None:
    left = run(merged, without=("code",))
    assert left.without == ["code"]
    assert left.experts["code"] == 0.0
    merge(MergeConfig(experts=(experts["sums"],), anchor=anchor, output=tmp_path / "one"))
    assert left.text == run(tmp_path / "one").text
    both = run(merged, without=("code", "sums"))
    assert both.experts == {"public": 1.0, "code": 0.0, "sums": 0.0}
    assert both.text == run(anchor).text


def test_expert_beside_its_anchor(anchor: Path, experts: dict[str, Path]) -> None:
    result = run(experts["code"], anchor=anchor)
    assert result.digest == open_expert(experts["code"]).digest
    assert list(result.experts) == ["public", "code"]


def test_workspace_s_own_model_is_the_default(tmp_path: Path, merged: Path, anchor: Path) -> None:
    (tmp_path / "flexctl.toml").write_text(f'[workspace]\nanchor = "{anchor}"\nmerged = "{merged}"\n')
    assert run(None).digest == open_merged(merged).digest


def test_top_k_is_obeyed_and_clamped_with_a_warning(merged: Path) -> None:
    alone = run(merged, explain=True, top_k=1)
    # With one active expert a layer, shares are multiples of one over the number of layers.
    for piece in alone.pieces:
        assert all(share * 2 == pytest.approx(round(share * 2), abs=1e-6) for share in piece.shares.values())
    listener = Listener()
    clamped = generate(GenerateConfig(prompt=PROMPT, bundle=merged, top_k=7, max_new_tokens=12), listener)
    assert len(listener.warnings) == 1
    assert clamped.experts == run(merged).experts


def test_generation_ends_at_end_of_text(merged: Path) -> None:
    """End-of-text is a token that was generated, but not text."""
    for seed in range(40):
        result = run(merged, explain=True, temperature=30.0, seed=seed, max_new_tokens=40)
        assert "<|endoftext|>" not in result.text
        if result.tokens < 40:
            assert result.pieces[-1].text == "" or "\ufffd" in result.pieces[-1].text
            return
    pytest.fail("no run of forty ended by itself")


def test_nothing_is_said(merged: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    capfd.readouterr()
    run(merged)
    run(merged, temperature=1.0)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_more_tokens_than_the_model_is_made_for_are_warned_of(merged: Path) -> None:
    listener = Listener()
    generate(GenerateConfig(prompt=PROMPT, bundle=merged, max_new_tokens=1), listener)
    assert listener.warnings == []
    generate(GenerateConfig(prompt=PROMPT * 60, bundle=merged, max_new_tokens=1), listener)
    assert len(listener.warnings) == 1
    assert "made for 128" in listener.warnings[0]


def test_rights_that_are_over_are_warned_of(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], merged: Path
) -> None:
    past = forge_expert(tmp_path / "code.st", open_expert(experts["code"]), data__expires="2020-01-31")
    files = (past, experts["sums"])
    merge(MergeConfig(experts=files, anchor=anchor, output=tmp_path / "old", allow_expired=True))

    def warnings(bundle: Path, **settings: Any) -> list[str]:
        listener = Listener()
        generate(GenerateConfig(prompt=PROMPT, bundle=bundle, anchor=anchor, max_new_tokens=1, **settings), listener)
        return listener.warnings

    for bundle in (past, tmp_path / "old"):
        assert warnings(bundle) == [f"{bundle}: the rights in code ended on 2020-01-31; `without` code leaves it out"]
    assert warnings(tmp_path / "old", without=("code",)) == warnings(merged) == []


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0 is not above 0"),
    ({"temperature": -0.5}, "temperature: -0.5 is below 0"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"threads": 0}, "threads"),
    ({"without": ("nobody",)}, "nobody"),
    ({"without": ("public",)}, "public"),
    ({"bundle": Path("nowhere")}, "nowhere"),
    ({"device": "toaster"}, "device"),
    ({"dtype": "int4"}, "dtype"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSALS, ids=[f"{i}" for i in range(len(REFUSALS))])
def test_wrong_settings_are_refused_in_one_line(merged: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FlexctlError) as caught:
        generate(GenerateConfig(**{"prompt": PROMPT, "bundle": merged, **settings}))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


def test_chat_puts_the_prompt_into_the_template(anchor: Path, in_empty_folder: Path) -> None:
    chatty = anchor_with_chat_template(anchor, in_empty_folder)
    framed = run(chatty, f"[user] {PROMPT}\n>")
    answered = run(chatty, chat=True)
    assert (answered.text, answered.tokens) == (framed.text, framed.tokens)
    assert (answered.prompt, answered.chat, framed.chat) == (PROMPT, True, False)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
        ("{% for %}", "fails: Expected"),
    ],
)
def test_a_chat_template_that_fails_is_a_line(anchor: Path, in_empty_folder: Path, template: str, says: str) -> None:
    chatty = anchor_with_chat_template(anchor, in_empty_folder, template)
    with pytest.raises(UsageError) as caught:
        run(chatty, chat=True)
    assert says in caught.value.message
    assert str(chatty) in caught.value.message


def test_chat_without_a_template_is_refused(merged: Path) -> None:
    with pytest.raises(FlexctlError, match="has no chat template"):
        run(merged, chat=True)
