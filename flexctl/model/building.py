"""Models that run, built from the weights of a bundle.

Every family runs through its *dense* Transformers class with each layer's ``mlp`` replaced by a routed block,
so training, evaluation and generation share one forward whatever the family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexctl.errors import BundleError, UsageError
from flexctl.families import PROJECTIONS, family_of
from flexctl.model.attention import register_attention
from flexctl.model.lowrank import LowRankNetwork
from flexctl.model.norms import fuse_norms
from flexctl.model.routed import RoutedFeedForward, Router, routed_layers
from flexctl.model.sharding import local_rows, shard_frozen, shard_trained, trained_copy
from flexctl.model.stacked import stack_experts
from flexctl.model.tensors import RawBytes, rows_of, to_torch
from flexctl.pointers import refuse_pointer
from flexctl.processes import ALONE, World

__all__ = [
    "WeightSource",
    "add_expert",
    "autocast_dtype",
    "build_model",
    "build_sharded",
    "dense_shapes",
    "is_bare_sentencepiece",
    "load_dense",
    "load_tokenizer",
    "moved_tensors",
    "pick_device",
    "pick_dtype",
    "route",
    "set_threads",
    "quiet_transformers",
    "stock_problems",
]


class WeightSource(Protocol):
    """What a model is built from; bundles provide it without knowing torch."""

    @property
    def dense_config(self) -> Mapping[str, Any]:
        """The dense class's config.json."""

    @property
    def shared(self) -> Mapping[str, RawBytes]:
        """Tensors outside the feed-forward networks, by their dense checkpoint names."""

    @property
    def experts(self) -> Mapping[str, Mapping[str, RawBytes]]:
        """Feed-forward tensors by expert and by expert tensor name, ``public`` first."""

    @property
    def router(self) -> Sequence[RawBytes]:
        """Router rows of each layer, (num_experts, hidden_size), F32."""

    @property
    def num_experts_per_tok(self) -> int:
        """Experts kept for each token."""


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``: cpu, cuda or cuda:N; ``auto`` takes CUDA when there is one.

    Raises:
        UsageError: It is another kind of device, or there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device", hint="use auto, cpu or cuda", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name!r} is not supported", hint="use auto, cpu or cuda", field="device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("cuda was asked for and torch sees none", hint="use cpu", field="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{name!r} is beyond the {torch.cuda.device_count()} that torch sees", field="device")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a model runs in: ``auto`` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        UsageError: The name is none of auto, float32, bfloat16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in known:
        raise UsageError(f"{name!r} is not known", hint="use auto, float32 or bfloat16", field="dtype")
    return known[name]


def autocast_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products in training by the rule of ``pick_dtype``; None for the weights' own."""
    dtype = pick_dtype(name, device)
    return None if dtype == torch.float32 else dtype


def set_threads(threads: int | None) -> None:
    """Use ``threads`` CPU threads in torch; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep Transformers' own progress bars off inside the ``with`` statement: only reporters speak."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_model(weights: WeightSource, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a frozen causal language model in evaluation mode with a routed block in every layer.

    Args:
        weights: What it consists of.
        device: Where it runs.
        dtype: Of all tensors but the router's, which stay float32.

    Returns:
        An instance of the family's dense Transformers class.
    """
    import transformers

    config = _config_of(weights)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    experts = list(weights.experts.values())
    state = {name: to_torch(raw).to(dtype) for name, raw in weights.shared.items()}
    state |= {f"model.{name}": to_torch(raw).to(dtype) for name, raw in experts[0].items()}
    with quiet_transformers():
        model = route(model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype))
    for index, block in enumerate(routed_layers(model)):
        public = block.experts[0]
        block.experts.extend(_dense_block(public, tensors, index, dtype) for tensors in experts[1:])
        block.router = Router(to_torch(weights.router[index]))
        block.top_k = weights.num_experts_per_tok
    return fuse_norms(stack_experts(model.requires_grad_(False).eval(), device).to(device), device)


def build_sharded(weights: WeightSource, *, device: torch.device, dtype: torch.dtype, world: World) -> nn.Module:
    """Return an anchor as ``build_model`` does, its layers shared out over processes; alone it is ``build_model``.

    No process reads more of a layer than its own rows.

    Args:
        weights: Of a public expert alone.
        device: Where this process runs.
        dtype: As for ``build_model``.
        world: The processes.
    """
    if world.size == 1:
        return build_model(weights, device=device, dtype=dtype)
    import transformers

    with torch.device("meta"):
        dense = transformers.AutoModelForCausalLM.from_config(_config_of(weights)).to(dtype)
    model = route(dense)
    tensors = {**weights.shared, **{f"model.{name}": raw for name, raw in weights.experts["public"].items()}}
    shard_frozen(model, tensors, device=device, world=world)
    return model.requires_grad_(False).eval()


def _config_of(weights: WeightSource) -> Any:
    """Return the dense class's config."""
    import transformers

    config = transformers.AutoConfig.for_model(**dict(weights.dense_config))
    config._attn_implementation = register_attention()
    return config


def route(model: Any) -> nn.Module:
    """Return a dense Transformers model, frozen, with each layer's feed-forward network as the public expert."""
    family = family_of(model.config.model_type)
    for index, layer in enumerate(model.model.layers):
        router = Router(torch.zeros(1, model.config.hidden_size))
        layer.mlp = RoutedFeedForward([layer.mlp], router, 1, family.renormalises)
        layer.mlp.layer = index
    routed: nn.Module = model.requires_grad_(False).eval()
    return routed


def load_tokenizer(path: Path, *, special_as_text: bool = False) -> Any:
    """Return the Transformers tokenizer of a bundle or checkpoint directory; nothing is fetched or executed.

    Args:
        path: The directory.
        special_as_text: Whether it reads the letters of a special token inside text as plain text.

    Raises:
        UsageError: It is a SentencePiece model alone, and what reads one is not installed.
        BundleError: There is none, it needs code of its own, or it cannot be read.
    """
    import transformers

    for file in (path / "tokenizer.json", path / "tokenizer_config.json", path / "tokenizer.model"):
        if file.is_file():
            with file.open("rb") as stream:
                refuse_pointer(stream.read(64), str(file))
    _refuse_bare_sentencepiece(path)
    try:
        found = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise _unreadable_tokenizer(path, error) from error
    found.split_special_tokens = special_as_text
    return found


def _unreadable_tokenizer(path: Path, error: Exception) -> BundleError:
    """Return the error in one line: what Transformers says of these goes on over many."""
    if not any(path.glob("*token*")) and not any(path.glob("vocab*")):
        return BundleError(f"{path}: has no tokenizer", hint="put tokenizer.json and tokenizer_config.json there")
    if "trust_remote_code" in str(error):
        return BundleError(
            f"{path / 'tokenizer_config.json'}: names a tokenizer class that needs code of its own, which is never run",
            hint="save the tokenizer as tokenizer.json, with a class that Transformers has",
        )
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BundleError(f"{path}: its tokenizer cannot be read: {said}")


def is_bare_sentencepiece(path: Path) -> bool:
    """Return whether a checkpoint's tokenizer is a SentencePiece model that nobody has made a tokenizer.json of."""
    return (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()


def _refuse_bare_sentencepiece(path: Path) -> None:
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    if is_bare_sentencepiece(path) and not (is_sentencepiece_available() and is_protobuf_available()):
        raise UsageError(
            f"{path}: its tokenizer is tokenizer.model alone, which needs sentencepiece and protobuf to be read",
            hint="pip install sentencepiece protobuf",
        )


def dense_shapes(dense_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight that the dense Transformers class of a config has; computes nothing.

    A tied head is not among them, as it is the embedding.

    Raises:
        BundleError: The class makes no model of it.
    """
    import transformers

    config = transformers.AutoConfig.for_model(**dict(dense_config))
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        message = f"config.json: no {config.model_type} model can be made of it ({said})"
        raise BundleError(message, hint="look at its rope_parameters or rope_scaling") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_dense(path: Path) -> Any:
    """Return the dense Transformers model of a checkpoint directory in float32, from safetensors alone.

    Its config keeps the dtype that the checkpoint is stored in.
    """
    import transformers

    loading = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    stored = transformers.AutoConfig.from_pretrained(path, local_files_only=True).dtype
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **loading)
    model.config.dtype = stored or torch.float32
    return model


def _dense_block(like: nn.Module, tensors: Mapping[str, RawBytes], layer: int, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        block = type(like)(like.config)
    state = {f"{name}.weight": to_torch(tensors[f"layers.{layer}.mlp.{name}.weight"]).to(dtype) for name in PROJECTIONS}
    block.load_state_dict(state, assign=True)
    return block


def add_expert(
    model: nn.Module, rows: Tensor, rank: int | None = None, seed: int = 0, world: World = ALONE
) -> list[nn.Module]:
    """Give every layer one more expert that begins as the public one, active on every token.

    Args:
        model: As from ``build_model``.
        rows: Router rows of the new expert, (num_hidden_layers, hidden_size), float32.
        rank: Of a low-rank expert, which shares the public one's matrices and trains differences to them; None is a
            full one, a trainable float32 copy.
        seed: Of a low-rank expert's first differences.
        world: The processes that share the model; it has made no pass yet where they are several.

    Returns:
        The new feed-forward modules, a layer each.
    """
    added = []
    generator = torch.Generator().manual_seed(seed % 2**63)
    for block, row in zip(routed_layers(model), rows, strict=True):
        public, device = block.experts[0], block.router.public.device
        expert: nn.Module
        if rank is not None:
            expert = LowRankNetwork(public, rank, generator)
            shard_trained(expert, runs_in=next(public.parameters()).dtype, world=world, entries=["mix"])
        else:
            expert = trained_copy(public, device=device, world=world)
        block.experts.append(expert)
        block.together = None  # it has no place for one more
        block.joined = expert.mix if isinstance(expert, LowRankNetwork) and len(block.experts) == 2 else None
        block.router = Router(torch.cat([block.router.rows, row[None].to(device)]))
        block.top_k = len(block.experts)
        added.append(expert)
    return added


def moved_tensors(model: nn.Module, weights: WeightSource, world: World = ALONE) -> list[str]:
    """Return the names of tensors of ``weights`` that are no longer the same, bit for bit, in ``model``.

    Args:
        model: Built from ``weights``, and possibly given more experts and trained since.
        weights: The anchor's.
        world: The processes that share the model; each looks at what it has.
    """
    state = model.state_dict()
    moved = [name for name, raw in weights.shared.items() if not _same(state[name], raw, world)]
    for name, raw in weights.experts["public"].items():
        inside = f"model.{name}".replace(".mlp.", ".mlp.experts.0.")
        moved += [] if _same(state[inside], raw, world) else [name]
    rows = [block.router.public for block in routed_layers(model)]
    moved += [f"router row of layer {i}" for i, row in enumerate(rows) if bool(row.any())]
    return moved


def stock_problems(path: Path) -> list[str]:
    """Return what stock Transformers finds missing, unexpected or misshaped in a merged model; empty is well."""
    import transformers

    with quiet_transformers():
        _, found = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [f"{kind}: {item}" for kind in kinds for item in found.get(kind) or ()]


def _same(inside: Tensor, raw: RawBytes, world: World) -> bool:
    """Return whether this process's rows of a tensor are those on disk."""
    own = local_rows(inside).cpu()
    first, last = world.rows(raw.shape[0]) if own.shape != raw.shape else (0, raw.shape[0])
    return torch.equal(own, rows_of(raw, first, last).to(inside.dtype))
