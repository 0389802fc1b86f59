"""Domains: NAME=PATH, read anew for every pass, scored by the one scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from pyarrow import parquet

from flexctl.errors import UsageError
from flexctl.evaluation.domains import Domain, parse_domains, read_domain, score_domain, window_length
from flexctl.evaluation.scoring import score_documents
from flexctl.runtime import SILENT
from flexctl.text.documents import read_documents
from flexctl.text.tokens import frame_documents

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_and_paths_in_the_order_given(texts: Any) -> None:
    found = parse_domains([f"b={texts.code_test}", f"a={texts.sums}"])
    assert found == [Domain(name="b", path=texts.code_test), Domain(name="a", path=texts.sums)]
    assert found[1].size_bytes() == texts.sums.stat().st_size
    assert list(found[0].documents()) == list(found[0].documents()) == list(read_documents([texts.code_test]))


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("text")
    assert parse_domains([f"x={tmp_path}/a=b.txt"])[0].path == tmp_path / "a=b.txt"


@pytest.mark.parametrize(
    ("longest", "asked", "expected"),
    [(None, None, 1024), (128, None, 128), (4096, None, 1024), (128, 7, 7)],
)
def test_windows_are_no_longer_than_the_model(longest: int | None, asked: int | None, expected: int) -> None:
    assert window_length({"max_position_embeddings": longest}, asked) == expected
    assert longest or window_length({}, asked) == expected


def test_content_is_known_by_all_of_its_text(tmp_path: Path) -> None:
    def read(*texts: str) -> Any:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return read_domain(Domain(name="a", path=path), SILENT)

    first = read("one", "zw\u00f6lf")
    assert (first.documents, first.num_bytes) == (2, 9)
    assert first.digest == read("one", "zw\u00f6lf").digest
    others = [
        read(*texts).digest for texts in (("one", "zw\u00f6lg"), ("onez", "w\u00f6lf"), ("zw\u00f6lf", "one"), ("one",))
    ]
    assert len({first.digest, *others}) == 5
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no document with text"):
        read_domain(Domain(name="a", path=tmp_path / "a.jsonl"), SILENT)


def test_score_is_that_of_the_documents(tokenizer: Any, texts: Any) -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a")))
    domain = Domain(name="code", path=texts.code_test)
    found = score_domain(model, tokenizer, domain, seq_len=64, batch_tokens=512, reporter=SILENT)
    documents = frame_documents(tokenizer, read_documents([texts.code_test]))
    expected = score_documents(model, documents, seq_len=64, batch_tokens=512)
    assert np.array_equal(found.per_document, expected.per_document)
    assert found.documents == 8


def test_a_table_is_a_domain_and_goes_by_its_field(texts: Any, tmp_path: Path) -> None:
    documents = list(read_documents([texts.code_test]))
    parquet.write_table(pa.table({"body": documents}), tmp_path / "code.parquet")
    (domain,) = parse_domains([f"code={tmp_path}"], "body")
    assert list(domain.documents()) == documents
    assert domain.size_bytes() == (tmp_path / "code.parquet").stat().st_size


def test_a_path_alone_names_its_domain(tmp_path: Path) -> None:
    (tmp_path / "law.test.jsonl").write_text('{"text": "some"}\n')
    (tmp_path / "news").mkdir()
    (tmp_path / "news/a.txt").write_text("some")
    found = parse_domains([str(tmp_path / "law.test.jsonl"), f"{tmp_path / 'news'}/", f"own={tmp_path / 'news'}"])
    assert [domain.name for domain in found] == ["law", "news", "own"]


def test_no_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    domain = Domain(name="a", path=tmp_path / "blank.txt")
    with pytest.raises(UsageError, match=r"no document with text in .*blank\.txt"):
        score_domain(model, tokenizer, domain, seq_len=64, batch_tokens=512, reporter=SILENT)
