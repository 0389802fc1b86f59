"""Stock checkpoints: which of their files count, and where their weights lie. Read as Transformers reads them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import indented_json, parse_json, read_bytes
from flexctl.bundle.hashing import hash_weights
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import expert_layout
from flexctl.bundle.manifest import Architecture
from flexctl.bundle.names import check_file_name, is_file_name, shown
from flexctl.bundle.tensors import RawTensor, Span, check_agreement, check_floats
from flexctl.errors import BundleError
from flexctl.families import FAMILIES, family_of

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "DENSE_PREFIX",
    "EMBEDDING",
    "HEAD",
    "INDEX_FILE",
    "STOCK_FILES",
    "WEIGHT_FILES",
    "architecture_of",
    "check_feed_forward",
    "checkpoint_spans",
    "head_differs",
    "indexed_spans",
    "is_data_file",
    "is_stock_file",
    "is_stock_mixture",
    "left_out",
    "named_code",
    "read_checkpoint",
    "read_dense_config",
    "stock_bytes",
    "unread_weights",
    "without_pointers",
]

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DENSE_PREFIX = "model."
"""Before an expert tensor's name, the name of the same matrix in a dense checkpoint; true of every family."""

STOCK_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "chat_template*.json",
    "chat_template*.jinja",
)
"""What goes along with the weights: config, generation config, tokenizer, template. Data alone, no code, no pickle."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

_RELATED = ("tokenizer*", "vocab*", "merges*", "chat_template*", "additional_chat_templates")
_CODE_FIELDS = ("auto_map", "custom_pipelines")
_ENTRY_FIELD = "transformers_weights"
_CONFIGS = (CONFIG_FILE, "tokenizer_config.json")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FIRST_LAYER = DENSE_PREFIX + "layers.0."
_UNWRAPPED = {
    "module.": "save the model inside the wrapper: model.module.save_pretrained(...)",
    "_orig_mod.": "save the model that was compiled: model._orig_mod.save_pretrained(...)",
    "base_model.model.": "merge the adapter first: model.merge_and_unload().save_pretrained(...)",
}


def is_stock_file(name: str) -> bool:
    """Return whether a checkpoint's file belongs to the anchor: config, generation config, tokenizer, template."""
    return is_file_name(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in STOCK_FILES)


def is_data_file(name: str) -> bool:
    """Return whether a directory bundle may list a file of this name: nothing that anyone would run or unpickle."""
    return is_stock_file(name) or name in (CARD_FILE, INDEX_FILE) or name.endswith(".safetensors")


def left_out(checkpoint: Path) -> list[str]:
    """Return the files and folders of a checkpoint that look like its tokenizer's and are not taken, by name."""
    return sorted(
        item.name + "/" * item.is_dir()
        for item in checkpoint.iterdir()
        if any(fnmatch.fnmatchcase(item.name, pattern) for pattern in _RELATED)
        and not (item.is_file() and is_stock_file(item.name))
    )


def named_code(checkpoint: Path) -> dict[str, Any]:
    """Return {``file: field``: value} of what a checkpoint's JSON files name as code, which is never run or kept."""
    return {
        f"{file}: {field}": config[field]
        for file in _CONFIGS
        if (checkpoint / file).is_file()
        for config in [_read_object(checkpoint / file)]
        for field in _CODE_FIELDS
        if config.get(field)
    }


def stock_bytes(path: Path) -> bytes | None:
    """Return what an anchor has in the place of a stock file; None if the file goes over as it is.

    Raises:
        BundleError: It is a config that is no JSON object.
    """
    if path.name not in _CONFIGS:
        return None
    config = _read_object(path)
    kept = without_pointers(config)
    return None if kept == config else indented_json(kept)


def without_pointers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the fields that point to code, or to weights by another name than the usual."""
    return {field: value for field, value in config.items() if field not in (*_CODE_FIELDS, _ENTRY_FIELD)}


def read_dense_config(checkpoint: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint's directory, without fields that point to code.

    Raises:
        BundleError: It is missing, no JSON object, or has a token id beyond its vocab_size.
    """
    config = _read_object(checkpoint / CONFIG_FILE)
    _refuse_ids_beyond(config, checkpoint / CONFIG_FILE)
    return without_pointers(config)


def is_stock_mixture(checkpoint: Path) -> bool:
    """Return whether config.json in a directory is that of a mixture class which merged models have, too."""
    return _read_object(checkpoint / CONFIG_FILE).get("model_type") in {family.moe_type for family in FAMILIES}


def read_checkpoint(checkpoint: Path) -> dict[str, Span]:
    """Return where each weight of a stock checkpoint lies; nothing but headers is read.

    Raises:
        BundleError: There is no safetensors file, a header is not valid, a dtype is none of F32, BF16 and F16, or sizes
            and feed-forward matrices are not those of config.json.
    """
    spans = checkpoint_spans(checkpoint)
    architecture_of(read_dense_config(checkpoint), spans, checkpoint)
    return spans


def checkpoint_spans(path: Path) -> dict[str, Span]:
    """Return where the weights of a stock checkpoint lie: in the files that Transformers loads.

    That is the file that config.json names, else model.safetensors, else what the index lists.

    Raises:
        BundleError: There are no safetensors, index and files do not agree, or a wrapper's prefix is on the names.

    Source: transformers.modeling_utils._get_resolved_checkpoint_files.
    """
    entry = path / _entry(path)
    spans = indexed_spans(entry) if entry.name.endswith(".index.json") else dict(read_header(entry).tensors)
    _refuse_prefix(spans, entry)
    return spans


def head_differs(spans: Mapping[str, Span]) -> bool:
    """Return whether a head lies beside the embedding and is another matrix, by their bytes.

    Raises:
        BundleError: One holds NaN or infinity, or a file ends early.
    """
    if HEAD not in spans or EMBEDDING not in spans:
        return False
    infos = hash_weights({name: spans[name] for name in (EMBEDDING, HEAD)})
    return infos[EMBEDDING] != infos[HEAD]


def dense_tensors(checkpoint: Path) -> dict[str, RawTensor]:
    """Return the weights of a stock checkpoint, memory-mapped, as Transformers takes them.

    A head that is tied to the embedding is not among them.

    Raises:
        BundleError: As ``read_checkpoint`` and ``head_differs`` say.
    """
    spans = read_checkpoint(checkpoint)
    is_tied = read_dense_config(checkpoint).get("tie_word_embeddings") and not head_differs(spans)
    return {name: span.read() for name, span in spans.items() if not (is_tied and name == HEAD)}


def unread_weights(checkpoint: Path) -> list[str]:
    """Return the safetensors files of a checkpoint that its weights do not lie in, by name: Transformers loads none."""
    taken = {span.path.name for span in checkpoint_spans(checkpoint).values()}
    return sorted(item.name for item in checkpoint.glob("*.safetensors") if item.name not in taken)


def indexed_spans(index: Path) -> dict[str, Span]:
    """Return where the weights lie that an index lists.

    Raises:
        BundleError: It is no index, names something else than safetensors files beside it, or does not agree with them.
    """
    weight_map = _read_object(index).get("weight_map")
    where = f"{index}: weight_map"
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BundleError(f"{where} is {shown(weight_map)}; expected an object of file names")
    spans: dict[str, Span] = {}
    for file in sorted(set(weight_map.values())):
        if not check_file_name(file, where).endswith(".safetensors"):
            raise BundleError(f"{where} names the file {shown(file)}; expected safetensors alone")
        tensors = read_header(index.parent / file).tensors
        check_agreement(tensors, {name: tensors[name] for name in tensors if weight_map.get(name) == file}, file)
        spans |= tensors
    for name, file in weight_map.items():
        if name not in spans:
            raise BundleError(f"{index.parent / file}: tensor {shown(name)} is missing")
    return spans


def architecture_of(config: Mapping[str, Any], spans: Mapping[str, Span], checkpoint: Path) -> Architecture:
    """Return the sizes in config.json, after checking that the feed-forward matrices have them.

    Args:
        config: As from ``read_dense_config``.
        spans: As from ``checkpoint_spans``.
        checkpoint: Directory, for messages.

    Raises:
        BundleError: A size is no whole number, a matrix is missing or has another, or a dtype is no float's.
    """
    sizes: dict[str, int] = {}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        size = config.get(name)
        if type(size) is not int or size < 1:
            raise BundleError(f"{checkpoint / CONFIG_FILE}: {name} is {shown(size)}; expected a whole number")
        sizes[name] = size
    family_of(str(config.get("model_type")))
    first = _FIRST_LAYER + "mlp.gate_proj.weight"
    if first not in spans:
        raise BundleError(f"{checkpoint}: tensor {first} is missing", hint="use a Transformers checkpoint")
    architecture = Architecture(**sizes, dtype=spans[first].dtype)
    check_floats(spans)
    check_feed_forward(spans, architecture, checkpoint)
    return architecture


def check_feed_forward(spans: Mapping[str, Span], architecture: Architecture, where: Path) -> None:
    """Refuse other feed-forward matrices than those of an architecture.

    Raises:
        BundleError: One is missing, extra, misshaped or of another dtype.
    """
    expected = expert_layout(architecture)
    del expected["router.weight"]
    found = {name.removeprefix(DENSE_PREFIX): span for name, span in spans.items() if ".mlp." in name}
    check_agreement(found, expected, str(where))


def _refuse_ids_beyond(config: Mapping[str, Any], where: Path) -> None:
    size: Any = config.get("vocab_size")
    for field in _SPECIAL_IDS if type(size) is int else ():
        ids = config.get(field)
        for token in ids if isinstance(ids, list) else [ids]:
            # A negative id counts from the end, as old configs have it.
            if type(token) is int and not -size <= token < size:
                raise BundleError(
                    f"{where}: {field} is {token}; expected below vocab_size, {size}",
                    hint="set it to an id that the tokenizer has, or to null",
                )


def _entry(path: Path) -> str:
    """Return the file that reading the weights begins with."""
    where = f"{path / CONFIG_FILE}: {_ENTRY_FIELD}"
    named = _read_object(path / CONFIG_FILE).get(_ENTRY_FIELD)
    if named is not None:
        if not isinstance(named, str) or not any(fnmatch.fnmatchcase(named, ending) for ending in WEIGHT_FILES):
            raise BundleError(f"{where} is {shown(named)}; expected a safetensors file or its index")
        return check_file_name(named, where)
    for file in (SINGLE_FILE, INDEX_FILE):
        if (path / file).is_file():
            return file
    raise BundleError(f"{path / SINGLE_FILE}: is missing", hint="save the checkpoint as safetensors")


def _refuse_prefix(names: Iterable[str], where: Path) -> None:
    """Refuse names that begin with a wrapper's, as they stand in a model that was saved from inside it."""
    prefix = next((name for name in names if _FIRST_LAYER in name), "").partition(_FIRST_LAYER)[0]
    if prefix:
        raise BundleError(
            f"{where}: the tensors' names begin with {shown(prefix)}, which a wrapper put before the model's own",
            hint=_UNWRAPPED.get(prefix, f"save it without the wrapper, so that names begin with {DENSE_PREFIX!r}"),
        )


def _read_object(path: Path) -> dict[str, Any]:
    value = parse_json(read_bytes(path), str(path))
    if not isinstance(value, dict):
        raise BundleError(f"{path} is {shown(value)}; expected an object")
    return value
