"""lm-evaluation-harness's own task files (.yaml), read without running anything that they bring along.

Source: the fields are those of lm-evaluation-harness, docs/task_guide.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # noqa: F401 - fills the registries
import yaml
from lm_eval.api.registry import aggregation_registry, metric_registry

from flexctl.errors import UsageError

__all__ = ["read_yaml"]

_WITHOUT_CODE = "flexctl runs no code of task files; a task may hold templates, filters and metrics by name"
_FIELDS = frozenset(
    """task task_alias dataset_path dataset_name dataset_kwargs training_split validation_split test_split
    fewshot_split doc_to_text doc_to_target doc_to_choice description target_delimiter fewshot_delimiter
    fewshot_config num_fewshot metric_list output_type generation_kwargs repeats filter_list should_decontaminate
    doc_to_decontamination_query gen_prefix metadata""".split()  # noqa: SIM905
)
_ONLY_FOR_SORTING = ("tag", "group", "task_list")
_BUILDERS = ("json", "csv", "parquet", "text")
_DATA_SETTINGS = ("data_files", "field", "sep", "delimiter", "column_names")
_EXAMPLE_FIELDS = (
    "sampler",
    "split",
    "samples",
    "fewshot_indices",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "gen_prefix",
    "fewshot_delimiter",
    "target_delimiter",
)


def read_yaml(path: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """Return a task's configuration, its data set ready to load, and the files that it consists of.

    None for what is no task: a file that others include, or a group, whose tasks are files of their own.

    Raises:
        UsageError: It cannot be read, asks for code to run or for data that is not in local files.
    """
    fields, files = _with_includes(path, [])
    if not isinstance(fields.get("task"), str):
        return None
    config = {name: value for name, value in fields.items() if name not in _ONLY_FOR_SORTING}
    for name in config:
        if name not in _FIELDS:
            raise UsageError(f"{path}: {name} is refused: it needs code or is unknown", hint=_WITHOUT_CODE)
    _refuse_within(path, config)
    data = _data_files(path, config)
    config["custom_dataset"] = _loader(config, data)
    config.pop("dataset_kwargs", None)
    return config, [*files, *(file for split in data.values() for file in split)]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads data alone: a tag such as !function is an error."""


def _with_includes(path: Path, above: list[Path]) -> tuple[dict[str, Any], list[Path]]:
    if path.resolve() in above:
        raise UsageError(f"{path}: includes itself")
    try:
        fields = yaml.load(path.read_bytes(), Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise UsageError(f"{path}, line {line}: {error.problem}", hint=_WITHOUT_CODE) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: no task in it", hint="docs/tasks.md shows one")
    included = fields.pop("include", [])
    merged: dict[str, Any] = {}
    files = [path]
    for name in included if isinstance(included, list) else [included]:
        inner, inside = _with_includes(path.parent / str(name), [*above, path.resolve()])
        merged |= inner
        files += inside
    return merged | fields, files


def _refuse_within(path: Path, config: Mapping[str, Any]) -> None:
    for metric in config.get("metric_list") or []:
        name, aggregation = metric.get("metric"), metric.get("aggregation", "mean")
        if metric.get("hf_evaluate") or not isinstance(name, str) or name not in metric_registry:
            raise UsageError(f"{path}: metric_list: {name} is none of the harness's own metrics", hint=_WITHOUT_CODE)
        if aggregation not in aggregation_registry:
            raise UsageError(f"{path}: metric_list: aggregation {aggregation} of {name} is unknown")
    for name in config.get("fewshot_config") or {}:
        if name not in _EXAMPLE_FIELDS:
            raise UsageError(f"{path}: fewshot_config: {name} is refused", hint=_WITHOUT_CODE)
    generation = config.get("generation_kwargs") or {}
    if generation.get("do_sample") or float(generation.get("temperature") or 0) > 0:
        raise UsageError(f"{path}: generation_kwargs: sampling is asked for; answers are generated greedily")


def _data_files(path: Path, config: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Return {split: files}; relative names count from the YAML's folder."""
    if config.get("dataset_path") not in _BUILDERS:
        hint = "write dataset_path: json and dataset_kwargs: {data_files: {test: FILE}}"
        raise UsageError(f"{path}: dataset_path {config.get('dataset_path')} is not in local files", hint=hint)
    settings = config.get("dataset_kwargs") or {}
    for name in settings:
        if name not in _DATA_SETTINGS:
            raise UsageError(f"{path}: dataset_kwargs: {name} is refused; known are {', '.join(_DATA_SETTINGS)}")
    given = settings.get("data_files")
    if not given:
        raise UsageError(
            f"{path}: dataset_kwargs: no data_files", hint="for example data_files: {test: questions.jsonl}"
        )
    splits = given if isinstance(given, dict) else {"train": given}
    found = {
        str(split): [path.parent / str(name) for name in (names if isinstance(names, list) else [names])]
        for split, names in splits.items()
    }
    for split, files in found.items():
        for file in files:
            if not file.is_file():
                raise UsageError(f"{path}: data_files: {split}: no file {file}")
    return found


def _loader(config: Mapping[str, Any], files: Mapping[str, list[Path]]) -> Callable[..., Any]:
    settings = {name: value for name, value in (config["dataset_kwargs"]).items() if name != "data_files"}
    named = {split: [str(file) for file in inside] for split, inside in files.items()}

    def load(**_metadata: Any) -> Any:
        import datasets

        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                config["dataset_path"], data_files=named, cache_dir=cache, keep_in_memory=True, **settings
            )

    return load
