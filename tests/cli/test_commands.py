"""Every command over the real engine: it works, with --json too, and one failure has its exit code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Texts
from signers import cheap_keys, make_trust

from flexctl.cli.app import main
from flexctl.engine.evaluate import EvaluateResult


@dataclass
class Terminal:
    """Runs commands and keeps what they said."""

    capture: pytest.CaptureFixture[str]

    def text(self, *arguments: str | Path, code: int = 0) -> str:
        """Return stdout of a command."""
        found = main([*map(str, arguments), "-q"])
        said = self.capture.readouterr()
        assert found == code, said.err
        return said.out

    def json(self, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
        """Return the object that a command prints with --json."""
        found = main([*map(str, arguments), "--json", "-q"])
        said = self.capture.readouterr()
        assert found == code, said.err
        result = json.loads(said.out)
        assert (result["schema_version"], result["command"]) == (1, arguments[0])
        return dict(result)

    def error(self, *arguments: str | Path, code: int) -> str:
        """Return the message of a command that fails, as text and as JSON."""
        assert main([*map(str, arguments), "-q"]) == code
        out, err = self.capture.readouterr()
        assert out == ""
        assert main([*map(str, arguments), "-q", "--json"]) == code
        out, as_json = self.capture.readouterr()
        assert out == ""
        error = json.loads(as_json)["error"]
        assert error["exit_code"] == code
        assert err.startswith("error: ")
        return str(error["message"])


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], in_empty_folder: Path) -> Terminal:
    assert in_empty_folder == Path.cwd()
    return Terminal(capsys)


@pytest.fixture
def space(terminal: Terminal, anchor: Path, experts: dict[str, Path]) -> Terminal:
    """The same, in a workspace whose anchor and experts are there and merged."""
    Path("flexctl.toml").write_text(f"[workspace]\nanchor = '{anchor}'\nexperts = '{experts['code'].parent}'\n")
    terminal.text("merge", *experts.values())
    return terminal


def test_init_anchor(terminal: Terminal, checkpoint: Path, texts: Texts) -> None:
    flags = ("--data", texts.public, "--sample-tokens", "2000", "--seq-len", "64", "--threads", "1")
    made = terminal.json("init-anchor", checkpoint, *flags)
    assert Path(made["path"]) == Path("anchor").absolute()
    assert made["model_type"] == "olmo2"
    assert {"digest", "num_parameters", "vocab_size"} <= set(made)
    assert Path("flexctl.toml").is_file()
    assert "exists" in terminal.error("init-anchor", checkpoint, *flags, code=2)
    again = terminal.text("init-anchor", checkpoint, *flags, "--overwrite")
    assert re.fullmatch(r"Made anchor \S+ in anchor: olmo2, .* parameters, vocabulary .*, sha256:\w{12}", again.strip())
    everything = terminal.text("init-anchor", checkpoint, *flags, "--overwrite", "--verbose")
    assert re.search(r"^constant std +0\.\d+, 0\.\d+$", everything, re.MULTILINE)
    assert terminal.error("init-anchor", checkpoint, code=2) == "init-anchor needs --data"


def test_train_expert(terminal: Terminal, anchor: Path, texts: Texts) -> None:
    flags = ("--anchor", anchor, "--max-steps", "2", "--seq-len", "64", "--batch-tokens", "512", "--threads", "1")
    made = terminal.json("train-expert", "--data", texts.code, *flags, "--purpose", "research", "--purpose", "press")
    assert (made["name"], made["steps"], made["frozen_verified"]) == ("code", 2, True)
    assert {"anchor_digest", "tokens", "final_loss", "tokens_per_s", "privacy"} <= set(made)
    assert terminal.json("inspect", made["path"])["manifest"]["data"]["purposes"] == ["research", "press"]
    assert "exists" in terminal.error("train-expert", "--data", texts.code, *flags, code=2)
    text = terminal.text("train-expert", "--data", texts.code, *flags, "--name", "other")
    assert text.startswith("Trained expert other: experts/other.st: ")
    assert re.search(r" in 2 steps, [\d,]+ tokens/s, sha256:", text)
    assert "held-out loss" in text
    wrong = ("--data", texts.code, *flags, "--name", "third", "--public", "nowhere")
    assert terminal.error("train-expert", *wrong, code=2) == "--public: nowhere does not exist"
    assert "--lr is 'fast'" in terminal.error("train-expert", "--data", texts.code, "--lr", "fast", code=2)


def test_adopt(terminal: Terminal) -> None:
    tiny.make_mixture(Path("moe"), "mixtral", experts=3)
    made = terminal.json("adopt", "moe", "--names", "law,code", "--license", "MIT", "--threads", "1")
    assert {"path", "digest", "name", "mixture_digest", "num_experts_per_tok"} <= set(made)
    assert [(expert["name"], expert["index"]) for expert in made["experts"]] == [("law", 1), ("code", 2)]
    assert "[merge]\ntop_k = 2" in Path("flexctl.toml").read_text()
    assert "exists" in terminal.error("adopt", "moe", "--names", "law,code", code=2)
    text = terminal.text("adopt", "moe", "--names", "law,code", "--overwrite")
    assert text.startswith("Took a mixtral of 3 experts apart: anchor moe in anchor: llama of expert 0, sha256:")
    assert text.endswith("Merge again: flexctl merge experts/*.st --anchor anchor --top-k 2\n")
    assert terminal.error("adopt", "moe", code=2).startswith("--names: 0 for 2 experts")
    assert "law" in terminal.text("list")
    assert "adopted" in terminal.text("inspect", "experts/law.st")
    assert "public" in terminal.text("merge", "experts/law.st")


def test_embed_router(terminal: Terminal, anchor: Path, experts: dict[str, Path], texts: Texts) -> None:
    flags = ("--data", texts.code, "--anchor", anchor, "--threads", "1")
    made = terminal.json("embed-router", *flags, "-o", "rows.st", "--against", experts["sums"])
    assert (made["router"], made["encoder"]) == ("discriminant", None)
    assert {"name", "documents", "hidden_size"} <= set(made)
    text = terminal.text("embed-router", *flags, "-o", "copy.st", "--expert", experts["code"])
    assert text.startswith("Made discriminant rows in copy.st: ")
    assert "distance" in text
    assert "exists" in terminal.error("embed-router", *flags, "-o", "rows.st", code=2)


def test_compress(terminal: Terminal, anchor: Path, experts: dict[str, Path], texts: Texts) -> None:
    flags = (experts["code"], "--data", texts.code_test, "--anchor", anchor, "--threads", "1")
    made = terminal.json("compress", *flags, "--rank", "3", "-o", "small.st")
    assert (made["name"], made["rank"], made["ranks"][0]) == ("code", 3, {"gate": 3, "up": 3, "down": 3})
    assert {"parent", "digest", "bytes_before", "bytes_written", "held_out"} <= set(made)
    text = terminal.text("compress", *flags, "-o", "auto.st", "--size", "0.2")
    assert text.startswith("Compressed expert code into auto.st: ")
    assert "held-out loss" in text
    assert "exists" in terminal.error("compress", *flags, "-o", "small.st", code=2)
    assert terminal.error("compress", experts["code"], code=2) == "compress needs --data"


def test_merge(terminal: Terminal, anchor: Path, experts: dict[str, Path]) -> None:
    flags = (*experts.values(), "--anchor", anchor)
    made = terminal.json("merge", *flags, "--top-k", "2")
    assert [expert["name"] for expert in made["experts"]] == ["public", "code", "sums"]
    assert (made["num_experts"], made["num_experts_per_tok"]) == (3, 2)
    assert made["bytes_written"] > 0
    assert made["peak_rss_bytes"] > 0
    assert terminal.text("merge", *flags, "-o", "deep/down").startswith("Merged public, code, sums into deep/down: ")
    assert "exists" in terminal.error("merge", *flags, code=2)
    Path("broken.st").write_bytes(experts["code"].read_bytes()[:-1])
    assert "broken.st" in terminal.error("merge", "broken.st", "--anchor", anchor, "-o", "new", code=3)
    assert not Path("new").exists()


def test_remove(space: Terminal) -> None:
    assert "no expert 'law'" in space.error("remove", "law", code=2)
    assert space.text("remove", "code", "--dry-run").startswith("Dry run, nothing written. Removed code; ")
    gone = space.json("remove", "code")
    assert (gone["removed"], gone["remaining"], gone["exact"]) == (["code"], ["sums"], True)
    assert space.json("verify", "merged", "--absent", "code")["ok"]


def test_replace(space: Terminal, experts: dict[str, Path], texts: Texts) -> None:
    copy = ("--data", texts.code, "--router", "hidden", "--expert", experts["code"], "-o", "new.st", "--threads", "1")
    space.text("embed-router", *copy)
    made = space.json("replace", "code", "new.st", "-o", "other")
    assert made["name"] == "code"
    assert made["old_digest"] != made["new_digest"]
    assert "router.kind" in space.text("replace", "code", "new.st")
    assert "name is 'sums'" in space.error("replace", "code", experts["sums"], code=3)


def test_evaluate(space: Terminal, texts: Texts) -> None:
    flags = ("--data", f"code={texts.code_test}", "--data", f"sums={texts.sums_test}", "--threads", "1")
    found = space.json("evaluate", *flags)
    assert found["experts"] == ["public", "code", "sums"]
    assert list(found["perplexity"]) == ["code", "sums"]
    sizes = {"tokens", "bytes", "documents"}
    interval = {"bits_per_byte_low", "bits_per_byte_high"}
    assert set(found["perplexity"]["code"]) == {"nll", "perplexity", "bits_per_byte", *interval, *sizes}
    assert sum(found["routing"]["code"].values()) == pytest.approx(1)
    text = space.text("evaluate", *flags, "--without", "code")
    assert "without code" in text
    assert "bits per byte" in text
    assert list(space.json("evaluate", "--data", texts.code_test, "--threads", "1")["perplexity"]) == ["code-test"]
    message = space.error("evaluate", "--data", f"={texts.code_test}", code=2)
    assert "NAME=PATH" in message


def test_evaluate_in_full(space: Terminal, texts: Texts, experts: dict[str, Path]) -> None:
    flags = ("--data", f"code={texts.code_test}", "--data", f"sums={texts.sums_test}", "--seq-len", "64")
    asked = ("evaluate", *flags, "--ablate", "--sweep-top-k", "--compare", experts["code"], "--samples", "s.jsonl")
    found = space.json(*asked)
    assert (set(found["ablation"]), set(found["top_k"])) == ({"code", "sums"}, {"1", "2", "3"})
    assert set(found["ablation"]["code"]) == set(found["top_k"]["1"]) == {"code", "sums"}
    assert [len(layers) for layers in found["routing_layers"]["code"].values()] == [2, 2, 2]
    other = found["compare"]
    assert (other["path"], set(other["domains"])) == (str(experts["code"]), {"code", "sums"})
    assert {"difference", "difference_low", "difference_high"} < set(other["domains"]["sums"])
    assert set(other["moved"][0]) == {"domain", "index", "words", "difference"}
    assert (found["samples"], len(Path("s.jsonl").read_text().splitlines())) == ("s.jsonl", 16)
    assert found["results"] == str(Path.cwd() / "merged/results.json")
    assert "s.jsonl exists" in space.error(*asked, code=2)
    text = space.text(*asked, "--overwrite")
    corners = ("domain", "share of each expert", "bits per byte without", "bits per byte, active", "moved most")
    assert all(re.search(rf"^{corner} +\w", text, re.MULTILINE) for corner in corners)
    whole = found["perplexity"]["code"]["bits_per_byte"]
    without = found["ablation"]["code"]["code"]
    assert f"code                   {without:.3f} {without - whole:+.3f}" in text
    low, high = (found["perplexity"]["sums"][f"bits_per_byte_{end}"] for end in ("low", "high"))
    assert f"{low:.3f} to {high:.3f}" in text
    everything = space.text(*asked, "--overwrite", "-v")
    for field in fields(EvaluateResult):
        label = field.name.removesuffix("_bytes").replace("_", " ")
        # A table with nothing in it is left out.
        is_shown = re.search(rf"^{label}(  |:$)", everything, re.MULTILINE) is not None
        assert is_shown == (found[field.name] != {}), label
    assert not re.search(r" $", everything, re.MULTILINE)
    for digest in (found["digest"], other["digest"], *found["data"].values()):
        assert digest in everything
    assert re.search(rf"^    code +{without - whole:.3f} +-?[\d.]+ +-?[\d.]+$", everything, re.MULTILINE)


def test_generate(space: Terminal) -> None:
    flags = ("generate", "--prompt", "def ", "--max-new-tokens", "4", "--threads", "1")
    made = space.json(*flags)
    assert (made["prompt"], made["tokens"]) == ("def ", 4)
    assert sum(made["experts"].values()) == pytest.approx(1)
    assert space.text(*flags) == f"def {made['text']}\n"
    table = space.text(*flags, "--explain").splitlines()
    assert any(line.split()[:2] == ["piece", "leading"] for line in table)
    assert space.error("generate", code=2) == "generate needs --prompt"


def test_trace(terminal: Terminal, texts: Texts) -> None:
    made = terminal.json("trace-index", "--data", texts.code, "--name", "law")
    assert (made["path"], made["name"], made["documents"]) == ("law.index", "law", 40)
    again = terminal.text("trace", "index", "--data", texts.code, "--name", "law", "--overwrite")
    assert re.match(r"Indexed law in law.index: 40 documents, .* of text, 1 shard, .*, sha256:", again)
    assert terminal.text("verify", "law.index").splitlines()[-1].startswith("law.index: ok, sha256:")
    text = next(texts.code.iterdir()).read_text()
    found = terminal.json("trace-find", "--index", "law.index", "--text", f"See {text}")
    (index,) = found["indexes"]
    assert max((span["text"] for span in index["spans"]), key=len) == text
    shown = terminal.text("trace", "find", "--index", "law.index", "--text", f"See {text}")
    assert shown.startswith("law: 9")
    assert "nothing of the text" in terminal.text("trace", "find", "--index", "law.index", "--text", "Nothing at all")
    assert "give one of --text, --file and --prompt" in terminal.error("trace-find", "--index", "law.index", code=2)
    assert "stays with its owner" in terminal.error("push", "law.index", "acme/law", code=2)


def test_audit(space: Terminal, texts: Texts) -> None:
    asked = ("audit", "--data", texts.code, "--held-out", texts.code_test, "--threads", "1")
    few = ("--documents", "6", "--draws", "1", "--prefix-tokens", "4", "--max-new-tokens", "8")
    found = space.json(*asked, *few, "--name", "code")
    assert list(found["models"]) == ["anchor", "merged", "without code"]
    assert set(found["models"]["merged"]) == {"extraction", "membership", "canaries", "found"}
    assert set(found["models"]["anchor"]["membership"]) == {"loss", "zlib", "min-k"}
    text = space.text(*asked, *few, "--name", "code", "--report", "audit.html")
    for corner in ("goes on", "tells members, AUC", "members found, 1 % FPR", "without code"):
        assert re.search(rf"^{re.escape(corner)}", text, re.MULTILINE)
    assert Path("audit.html").stat().st_mode & 0o777 == 0o600
    assert space.error(*asked, code=2) == "--name: say which of code, sums"


def test_inspect(space: Terminal, experts: dict[str, Path]) -> None:
    assert space.json("inspect", "merged")["kind"] == "merged"
    assert "frozen verified  yes" in space.text("inspect", experts["code"])
    assert space.error("inspect", "nothing", code=2)


def test_verify(space: Terminal) -> None:
    assert space.text("verify", "merged").splitlines()[-1].startswith("merged: ok, sha256:")
    file = Path("merged/model-expert-code.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = space.json("verify", "merged", code=3)
    assert not found["ok"]
    assert any(not check["ok"] and "code" in check["detail"] for check in found["checks"])
    assert space.error("verify", "nothing", code=2)


def test_list(space: Terminal, anchor: Path) -> None:
    found = space.json("list")
    assert Path(found["anchor"]["path"]) == anchor
    assert [expert["name"] for expert in found["experts"]] == ["code", "sums"]
    assert all(expert["in_merged"] for expert in found["experts"])
    assert "public and 2 experts" in space.text("list")


def test_list_of_nothing_says_what_to_do(terminal: Terminal) -> None:
    text = terminal.text("list")
    for command in ("init-anchor", "train-expert", "merge"):
        assert f"flexctl {command}" in text
    Path("flexctl.toml").write_text("[marge]\n")
    assert "unknown table [marge]" in terminal.error("list", code=2)


def test_demo_refuses_a_directory_that_is_not_its_own(terminal: Terminal) -> None:
    Path("demo/mine").mkdir(parents=True)
    assert "demo exists" in terminal.error("demo", code=2)
    assert "no earlier demo" in terminal.error("demo", "--overwrite", code=2)


def test_keygen_sign_and_trust(space: Terminal, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_keys(monkeypatch)
    made = space.json("keygen", "-o", "acme.key")
    assert Path(made["path"]).is_file()
    assert "exists already" in space.error("keygen", "-o", "acme.key", code=2)
    make_trust(f'[[owners]]\nname = "Acme"\nkey = "{made["public_key"]}"\n')
    expert = Path(shutil.copy(experts["code"], "code.st"))
    signed = space.json("sign", expert, "--key", "acme.key")
    assert (signed["key_id"], signed["signatures"]) == (made["key_id"], 1)
    assert space.text("sign", "merged", "--key", "acme.key").startswith("Signed merged in merged/flexctl.sig: key ")
    assert "no such file" in space.error("sign", expert, "--key", "none.key", code=2)
    assert re.search(
        r"^ok +signed +by Acme \(trusted without end\)$", space.text("verify", "merged", "--trust", "trust.toml"), re.M
    )
    assert "FAILED  signed" in space.text("verify", experts["sums"], "--trust", "trust.toml", code=3)
    gone = space.json("remove", "code", "--tombstone", "--reason", "asked for", "--key", "acme.key")
    assert [Path(path).name for path in gone["records"]] == ["code.removed.json"]
    record = ("--record", "code.removed.json", "--trust", "trust.toml")
    assert space.json("verify", "merged", "--absent", "code", *record)["ok"]
    assert "say whose keys count" in space.error("verify", "merged", "--record", "code.removed.json", code=2)


def test_check_rights(space: Terminal) -> None:
    found = space.json("check-rights", "--purpose", "anything")
    assert (found["allowed"], found["ruled_out"], found["remedy"]) == (["code", "sums"], [], None)
    assert space.text("check-rights", "merged") == "may be used: code, sums\n"
    assert "no such file" in space.error("check-rights", "nowhere", code=2)
