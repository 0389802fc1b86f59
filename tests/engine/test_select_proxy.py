"""select-proxy: it finds the public documents that are like the owner's, and says nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_jsonl

from flexctl.bundle import open_anchor
from flexctl.bundle.proxy import ProxyDocument, PublicText, open_proxy, write_proxy
from flexctl.engine.select_proxy import SelectProxyConfig, SelectProxyResult, select_proxy
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.routing.proxies import listed_documents, public_reader
from flexctl.text.sample import PublicSample

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public text of every third document prose, code and sums, in turn."""
    path = tmp_path_factory.mktemp("crawl") / "crawl.jsonl"
    kinds = [tiny.make_texts(kind, 12, seed=7) for kind in ("public", "code", "sums")]
    write_jsonl(path, [text for together in zip(*kinds, strict=True) for text in together])
    return path


def select(anchor: Path, data: Path, **settings: Any) -> SelectProxyResult:
    return select_proxy(SelectProxyConfig(data=(data,), anchor=anchor, threads=1, **settings))


@pytest.mark.parametrize(("name", "place"), [("code", 1), ("sums", 2)])
def test_the_documents_most_like_the_owners_are_found(
    tmp_path: Path, anchor: Path, texts: Any, crawl: Path, name: str, place: int
) -> None:
    result = select(anchor, getattr(texts, name), public=crawl, count=12)
    proxy = open_proxy(result.path)
    assert result.path == tmp_path / "experts" / f"{name}.proxy.json"
    assert (result.name, result.documents, result.public_documents) == (name, 12, 36)
    assert (result.digest, result.anchor_digest) == (proxy.digest, open_anchor(anchor).digest)
    assert result.accuracy is not None
    assert result.accuracy > 0.8
    assert sum(document.index % 3 == place for document in proxy.documents) >= 11


def test_the_file_is_a_set_of_public_documents_and_nothing_of_the_owners(
    tmp_path: Path, anchor: Path, texts: Any
) -> None:
    result = select(anchor, texts.code, count=5)
    assert select(anchor, texts.code, count=5, output=tmp_path / "again.json").digest == result.digest
    assert (tmp_path / "again.json").read_bytes() == result.path.read_bytes()
    content = json.loads(result.path.read_text())
    assert set(content) == {
        *("schema_version", "kind", "name", "digest"),
        *("anchor", "public", "encoder", "documents"),
    }
    assert (content["kind"], content["name"], content["encoder"]) == ("proxy", "code", None)
    sample = PublicSample.from_tensors(open_anchor(anchor).public_sample())
    assert content["public"]["documents"] == len(sample.documents)
    indices = [document["index"] for document in content["documents"]]
    assert indices == sorted(set(indices))
    assert [set(document) for document in content["documents"]] == [{"index", "sha256"}] * 5
    read = public_reader(sample, None, None, "text")
    found = listed_documents(read, [(result.path, open_proxy(result.path))])[0]
    assert [document.tokens.tolist() for document in found] == [sample.documents[i].tokens.tolist() for i in indices]


def test_another_public_text_and_wrong_documents_are_refused(
    tmp_path: Path, anchor: Path, texts: Any, crawl: Path, tokenizer: Any
) -> None:
    path = select(anchor, texts.code, count=3).path
    proxy = open_proxy(path)
    sample = PublicSample.from_tensors(open_anchor(anchor).public_sample())
    with pytest.raises(BundleError, match="made from another public text"):
        listed_documents(public_reader(sample, tokenizer, crawl, "text"), [(path, proxy)])
    moved = [ProxyDocument(index=d.index ^ 1, sha256=d.sha256) for d in proxy.documents]
    forged = tmp_path / "forged.json"
    settings = {"name": "code", "anchor": proxy.anchor, "public": proxy.public, "encoder": None}
    write_proxy(forged, **settings, documents=moved, overwrite=False)
    with pytest.raises(BundleError, match=r"forged\.json: documents: number \d+ of the public text has another sha256"):
        listed_documents(public_reader(sample, None, None, "text"), [(forged, open_proxy(forged))])
    with pytest.raises(BundleError, match="expected each once, by index, below"):
        write_proxy(
            tmp_path / "far.json", **settings, documents=[ProxyDocument(index=10**6, sha256="")], overwrite=False
        )
    settings["public"] = PublicText(sha256="0" * 64, documents=10**7)
    with pytest.raises(BundleError, match="expected each once"):
        write_proxy(tmp_path / "twice.json", **settings, documents=[moved[0]] * 2, overwrite=False)
    assert not list(tmp_path.glob("*ar.json")) + list(tmp_path.glob("tw*"))


def test_a_changed_file_is_refused(tmp_path: Path, anchor: Path, texts: Any) -> None:
    path = select(anchor, texts.code, count=3).path
    good = path.read_bytes()
    index = json.loads(good)["documents"][0]["index"]
    changes = {
        "digest is": good.replace(f'"index":{index},'.encode(), f'"index":{index + 10**5},'.encode()),
        "not canonical JSON": good + b"\n",
        "schema_version is 2": good.replace(b'"schema_version":1', b'"schema_version":2'),
        "is no proxy list": good.replace(b'"kind":"proxy"', b'"kind":"expert"'),
        "not valid JSON": good[:-3],
        "encoder is missing": good.replace(b'"encoder":null,', b""),
    }
    for says, data in changes.items():
        assert data != good
        path.write_bytes(data)
        with pytest.raises(BundleError, match=says) as caught:
            open_proxy(path)
        assert str(path) in caught.value.message
    with pytest.raises(UsageError, match="no such file"):
        open_proxy(tmp_path / "nowhere.json")
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert open_proxy(path).digest == json.loads(good)["digest"]


def test_a_sentence_encoder_can_tell_texts_apart(
    tmp_path: Path, anchor: Path, texts: Any, crawl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that counts letters; its name goes into the file, its path does not."""
    import torch

    from flexctl.routing import start_rows

    class Letters:
        def __init__(self, _name: str) -> None: ...

        def embed(self, found: Any) -> Any:
            counts = [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz_(+"] for text in found]
            return torch.nn.functional.normalize(torch.tensor(counts).float() + 0.1)

    monkeypatch.setattr(start_rows, "Encoder", Letters)
    (tmp_path / "letters").mkdir()
    result = select(anchor, texts.code, public=crawl, count=10, encoder=str(tmp_path / "letters"))
    assert result.encoder == open_proxy(result.path).encoder == "letters"
    assert sum(document.index % 3 == 1 for document in open_proxy(result.path).documents) >= 9
    assert str(tmp_path) not in result.path.read_text()


def test_wrong_settings_are_refused_and_leave_nothing(tmp_path: Path, anchor: Path, texts: Any) -> None:
    (tmp_path / "short.txt").write_text("too short")
    kept = list(tmp_path.iterdir())
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"count": 0}, "count"),
        ({"count": 10**6}, "count: 1000000 is more than the"),
        ({"name": "public"}, "public"),
        ({"public": Path("nowhere")}, "nowhere does not exist"),
        ({"data": Path("short.txt")}, "1 passages are too few"),
        ({"public": Path("short.txt")}, "1 public documents are too few"),
        ({"output": Path("short.txt")}, "short.txt exists"),
        ({"device": "toaster"}, "device"),
    ]
    for settings, says in refusals:
        with pytest.raises(FlexctlError) as caught:
            select(anchor, **{"data": texts.code, **settings})
        assert says in caught.value.message
        assert list(tmp_path.iterdir()) == kept
    result = select(anchor, texts.code, dry_run=True)
    assert (result.digest, result.dry_run, list(tmp_path.iterdir())) == (None, True, kept)
