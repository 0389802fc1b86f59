"""How each command's Result reads. A command without a view of its own shows all its fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flexctl import evaluation, tracing
from flexctl.cli.text import amount, cell, duration, expert_colour, local, number, paint, pairs, printable, table

if TYPE_CHECKING:
    from flexctl import (
        AdoptResult,
        Answers,
        AuditResult,
        ChatResult,
        CheckRightsResult,
        CompressResult,
        DemoResult,
        DoctorResult,
        EmbedRouterResult,
        Estimate,
        EvaluateResult,
        GenerateResult,
        ImportExpertResult,
        InitAnchorResult,
        InspectResult,
        KeygenResult,
        ListedAnchor,
        ListedExpert,
        ListedMerged,
        ListResult,
        MergeResult,
        PullResult,
        PushResult,
        Recovery,
        RemoveResult,
        ReplaceResult,
        SelectProxyResult,
        SignResult,
        Span,
        TaskScore,
        TraceFindResult,
        TraceIndexResult,
        TrainExpertResult,
        TrainingPlan,
        TuneRouterResult,
        VerifyResult,
    )

__all__ = ["render"]


def render(command: str, result: Any, *, verbose: bool, colour: bool) -> str:
    """Return a command's Result as text.

    Args:
        command: The command's name with underscores.
        result: Its Result.
        verbose: Show every field, digests in full.
        colour: The reader is a terminal that shows colours.
    """
    if command in _COLOURED and (command == "generate" or not verbose):
        return "\n".join(_COLOURED[command](result, colour))
    if verbose or command not in _VIEWS:
        return "\n".join(_everything(dataclasses.asdict(result)))
    return "\n".join(_VIEWS[command](result))


def _everything(fields: Mapping[str, Any], *, whole: bool = True) -> list[str]:
    """Return all fields: plain ones as a list, then each nested one under its name.

    Digests in tables are in full where ``whole`` says so; those in lists always are.
    """
    nested = {name: value for name, value in fields.items() if value and _is_nested(value)}
    lines = pairs({name: value for name, value in fields.items() if not _is_nested(value)}, whole=True)
    for name, value in nested.items():
        lines += [
            "",
            f"{str(name).replace('_', ' ')}:",
            *(f"  {line}".rstrip() for line in _nested(value, whole=whole)),
        ]
    return lines


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)
    )


def _nested(value: Any, *, whole: bool) -> list[str]:
    if isinstance(value, Mapping):
        if value and all(
            isinstance(item, Mapping) and not any(map(_is_nested, item.values())) for item in value.values()
        ):
            return _matrix(value)
        return _everything(value, whole=whole)
    headers = list(dict.fromkeys(name for item in value for name in item))
    return table(headers, [[item.get(name) for name in headers] for item in value], whole=whole)


def _matrix(values: Mapping[str, Mapping[str, Any]], corner: str = "") -> list[str]:
    """Return {row: {column: value}} as a table."""
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    return table([corner, *columns], [[name, *map(row.get, columns)] for name, row in values.items()])


def _sentence(result: Any, done: str, *facts: str | None) -> str:
    """Return one line: what was made, or would be, and its figures."""
    shown = [fact for fact in (*facts, cell(result.digest) if result.digest else None) if fact]
    line = ": ".join([done, *([", ".join(shown)] if shown else [])])
    return f"Dry run, nothing written. {line}" if result.dry_run else line


def _init_anchor(result: InitAnchorResult) -> list[str]:
    sizes = f"{result.model_type}, {result.num_hidden_layers} layers of {result.hidden_size}"
    parameters = f"{number(result.num_parameters)} parameters" if result.num_parameters else None
    trained = f"trained on {number(result.tokens)} tokens" if result.tokens else None
    loss = f"loss {number(result.loss)}" if result.loss is not None else None
    facts = (sizes, parameters, f"vocabulary {number(result.vocab_size)}", trained, loss)
    return [_sentence(result, f"Made anchor {result.name} in {cell(result.path)}", *facts)]


def _train_expert(result: TrainExpertResult) -> list[str]:
    if result.plan is not None:
        return _training_plan(result.plan, result.rank)
    speed = amount(result.tokens_per_s, "tokens/s") if result.tokens_per_s is not None else None
    trained = f"{number(result.tokens)} tokens in " if result.tokens is not None else ""
    amounts = f"{trained}{number(result.steps)} steps" if result.steps else None
    rank = f"rank {result.rank}" if result.rank is not None else None
    size = amount(result.bytes_written, "bytes") if rank and result.bytes_written else None
    lines = [_sentence(result, f"Trained expert {result.name}: {cell(result.path)}", rank, size, amounts, speed)]
    if result.held_out:
        lines += ["", *_matrix(result.held_out, "held-out loss")]
    if result.privacy is not None:
        lines += ["", f"Private to epsilon {result.privacy.epsilon:g}, delta {result.privacy.delta:g} a document."]
    if result.frozen_verified:
        lines += ["", "Everything but the expert is the anchor's, bit for bit."]
    return lines


def _training_plan(plan: TrainingPlan, rank: int | None) -> list[str]:
    kind = "a full expert" if rank is None else f"an expert of rank {rank}"
    steps = f"steps of {number(plan.batch_size)} sequences of {number(plan.seq_len)} tokens"
    rows = [
        [
            each.devices,
            each.sequences,
            amount(each.memory_bytes, "bytes"),
            each.fits,
            None if each.million_tokens_s is None else duration(each.million_tokens_s),
        ]
        for each in plan.devices
    ]
    parts = {part.replace("_", " "): size for part, size in plan.devices[0].parts_bytes.items() if size}
    lines = [f"Plan for {kind} on {plan.device} in {plan.dtype}, {steps}: nothing was read but config.json.", ""]
    lines += table(["devices", "at once", "memory of each", "fits", "a million tokens"], rows)
    lines += ["", "One device: " + ", ".join(f"{part} {amount(size, 'bytes')}" for part, size in parts.items())]
    if plan.limit_bytes is None:
        lines.append(f"Fits: not known, as there is no {plan.device} device here.")
    else:
        lines.append(f"Fits: whether into {amount(plan.limit_bytes, 'bytes')}, what this machine's {plan.device} has.")
    if plan.flops_per_s is None:
        return [*lines, "Time: not known without a rate; give --plan-tflops."]
    rate = f"{plan.share:.0%} of {number(plan.flops_per_s / 1e12)} TFLOP/s"
    work = f"{number(plan.flops_per_token / 1e9)} GFLOP a token"
    return [*lines, f"Time: {work} at {rate}; what devices tell each other is not counted (docs/scaling.md)."]


def _import_expert(result: ImportExpertResult) -> list[str]:
    amounts = f"{number(result.tokens)} tokens of text" if result.tokens else None
    taken = f"{number(result.changed)} tensors differ from the anchor's"
    lines = [_sentence(result, f"Imported expert {result.name}: {cell(result.path)}", taken, amounts)]
    if result.loss:
        lines += ["", *_matrix({"own": result.loss}, "loss")]
    if result.frozen_verified:
        return [*lines, "", "Everything but the expert is the anchor's, bit for bit."]
    return [*lines, "", f"{number(len(result.moved))} other tensors had moved and were left behind."]


def _adopt(result: AdoptResult) -> list[str]:
    count = len(result.experts) + 1
    taken = f"Took a {result.mixture_type} of {count} experts apart: anchor {result.name} in {cell(result.path)}"
    lines = [_sentence(result, taken, f"{result.model_type} of expert {result.public_expert}")]
    rows = [[expert.name, expert.index, expert.path, expert.digest] for expert in result.experts]
    lines += ["", *table(["expert", "was", "file", "digest"], rows)]
    files, top_k = cell(result.experts[0].path.parent / "*.st"), result.num_experts_per_tok
    return [*lines, "", f"Merge again: flexctl merge {files} --anchor {cell(result.path)} --top-k {top_k}"]


def _embed_router(result: EmbedRouterResult) -> list[str]:
    documents = f"{number(result.documents)} passages"
    lines = [_sentence(result, f"Made {result.router} rows in {cell(result.path)}", documents)]
    if result.layers:
        headers = ("layer", "bias", "distance", "noise", "accuracy")
        others = list(result.layers[0].overlap)
        rows = [
            [*(getattr(layer, name) for name in headers), *map(layer.overlap.get, others)] for layer in result.layers
        ]
        lines += ["", *table([*headers, *(f"lost to {name}" for name in others)], rows)]
    return lines


def _compress(result: CompressResult) -> list[str]:
    sizes = f"{amount(result.bytes_before, 'bytes')} to {amount(result.bytes_written, 'bytes')}"
    fact = sizes if result.bytes_written else None
    lines = [_sentence(result, f"Compressed expert {result.name} into {cell(result.path)}", fact)]
    if result.held_out:
        lines += ["", *_matrix(result.held_out, "held-out loss")]
    if len({rank for layer in result.ranks for rank in layer.values()}) > 1:
        lines += ["", *_matrix({str(i): layer for i, layer in enumerate(result.ranks)}, "ranks, by layer")]
    elif result.ranks:
        lines += ["", f"Every matrix has rank {result.rank}."]
    return lines


def _merge(result: MergeResult) -> list[str]:
    names = ", ".join(expert.name for expert in result.experts)
    facts = (f"{result.num_experts_per_tok} active for a token", amount(result.bytes_written, "bytes"))
    return [_sentence(result, f"Merged {names} into {cell(result.path)}", *facts)]


def _remove(result: RemoveResult) -> list[str]:
    done = f"Removed {cell(result.removed)}; {cell(result.path)} holds {cell(('public', *result.remaining))}"
    active = f"{result.num_experts_per_tok} active for a token"
    line = _sentence(result, done, active, None if result.exact else "with a tombstone")
    return [line, *_records(result.records)]


def _records(records: tuple[Path, ...]) -> list[str]:
    return [f"for the owner: {cell(record)}" for record in records]


def _replace(result: ReplaceResult) -> list[str]:
    digests = f"{cell(result.old_digest)} by {cell(result.new_digest)}"
    lines = [_sentence(result, f"Replaced {result.name} in {cell(result.path)}", digests)]
    if result.changes:
        lines += ["", *_nested(list(map(dataclasses.asdict, result.changes)), whole=False)]
    if result.bits_per_byte:
        headers = ("bits per byte", "before", "after", "change")
        rows = [[name, b["before"], b["after"], b["after"] - b["before"]] for name, b in result.bits_per_byte.items()]
        lines += ["", *table(headers, rows)]
    return [*lines, *(["", *_records(result.records)] if result.records else [])]


def _evaluate(result: EvaluateResult) -> list[str]:
    without = f" without {cell(result.without)}" if result.without else ""
    active = f"{result.num_experts_per_tok} active for a token"
    lines = [f"{cell(result.path)}: {cell(result.experts)}{without}, {active}, {cell(result.digest)}"]
    if result.dry_run:
        return [f"Dry run, nothing scored and nothing written. {lines[0]}", *_to_come(result)]
    headers = ("perplexity", "bits_per_byte", "nll", "tokens", "documents")
    rows = [
        [name, *(getattr(score, key) for key in headers), _span(score.estimate)]
        for name, score in result.perplexity.items()
    ]
    if rows:
        lines += ["", *table(["domain", *headers, "bits per byte, 95 %"], rows)]
        lines += ["", *_matrix(result.routing, "share of each expert")]
    if result.tasks:
        lines += ["", *_tasks(result.tasks)]
    whole = {name: score.bits_per_byte for name, score in result.perplexity.items()}
    if result.ablation:
        lines += ["", *_changes(result.ablation, result.ablation_change, "bits per byte without")]
    if result.top_k:
        lines += ["", *_changes(result.top_k, result.top_k_change, "bits per byte, active")]
    if result.router_agreement:
        lines += ["", *_matrix({"same experts in bfloat16": result.router_agreement}, "share of tokens")]
    if result.baselines:
        below = _changes(result.baselines, result.baselines_change, "bits per byte", {"this bundle": whole})
        lines += ["", *below]
    if any("?" in line for line in lines[1:]):
        lines += ["", "?: the 95 % interval of the change crosses zero"]
    lines += [f"missing: {name} ({cell(remedy)})" for name, remedy in result.baselines_missing.items()]
    lines += _comparison(result) if result.compare else []
    return [*lines, "", f"report: {cell(result.report)}"] if result.report else lines


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _to_come(result: EvaluateResult) -> list[str]:
    """Return what a run would score."""
    domains = (
        f"{cell(list(result.data))}: {_count(result.passes, 'pass', 'passes')} over a text" if result.data else None
    )
    missing = [f"missing: {name} ({cell(remedy)})" for name, remedy in result.baselines_missing.items()]
    return [*([f"To be scored, or recalled from the cache: {domains}"] if domains else []), *missing]


def _tasks(tasks: Mapping[str, TaskScore]) -> list[str]:
    """Return a row a task; metrics that are means have their standard error behind them."""
    headers = list(dict.fromkeys(name for task in tasks.values() for name in task.metrics))
    rows = [
        [name, task.items, task.shots, *(_with_error(task, metric) for metric in headers)]
        for name, task in tasks.items()
    ]
    return table(["task", "items", "shots", *headers], rows)


def _with_error(task: TaskScore, metric: str) -> str | None:
    if metric not in task.metrics:
        return None
    error = task.stderr.get(metric)
    return number(task.metrics[metric]) + ("" if error is None else f" +- {number(error)}")


def _changes(
    rows: Mapping[Any, Mapping[str, float]],
    changes: Mapping[Any, Mapping[str, Estimate]],
    corner: str,
    first: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> list[str]:
    """Return {row: {domain: bits per byte}} as a table, with the change from the whole model beside each.

    A question mark is behind a change whose interval crosses zero; rows of ``first`` are on top, without changes.
    """
    shown = {
        str(name): {domain: f"{number(value)} {_change(changes[name][domain])}" for domain, value in row.items()}
        for name, row in rows.items()
    }
    return _matrix({**{name: {d: number(v) for d, v in row.items()} for name, row in first.items()}, **shown}, corner)


def _change(change: Estimate) -> str:
    return _signed(change.value) + (" ?" if change.crosses_zero else "")


def _comparison(result: EvaluateResult) -> list[str]:
    assert result.compare is not None
    headers = ["domain", "bits_per_byte", "other", "difference", "95 %", "documents better", "worse"]
    rows = [
        [
            name,
            result.perplexity[name].bits_per_byte,
            row.bits_per_byte,
            _signed(row.difference),
            _span(row.change, _signed),
            row.documents_better,
            row.documents_worse,
        ]
        for name, row in result.compare.domains.items()
    ]
    lines = ["", f"beside {cell(result.compare.path)}, {cell(result.compare.digest)}", "", *table(headers, rows)]
    moved = [[row.domain, row.index, _signed(row.difference), row.words] for row in result.compare.moved]
    return [*lines, "", *table(["moved most", "document", "bits_per_byte", "begins"], moved)] if moved else lines


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"


def _span(found: Estimate, shown: Callable[[float], str] = number) -> str | None:
    return None if found.low is None or found.high is None else f"{shown(found.low)} to {shown(found.high)}"


def _inspect(result: InspectResult) -> list[str]:
    if result.sbom is not None:
        return [json.dumps(result.sbom, indent=2)]
    manifest = {
        name: value for name, value in result.manifest.items() if name not in ("tensors", "files", "moe_config")
    }
    summary = dataclasses.asdict(result) | {"manifest": None}
    shown = {name: value for name, value in {**summary, **manifest}.items() if value not in (None, [], {})}
    return _everything(shown, whole=False)


def _verify(result: VerifyResult) -> list[str]:
    rows = [["ok" if check.ok else "FAILED", check.name, local(check.detail)] for check in result.checks]
    digest = f", {result.digest}" if result.digest else ""
    return [*table(["", "", ""], rows)[1:], "", f"{cell(result.path)}: {'ok' if result.ok else 'FAILED'}{digest}"]


def _keygen(result: KeygenResult) -> list[str]:
    pair = f"{cell(result.path)} (private, encrypted) and {cell(result.public_path)}"
    if result.dry_run:
        return [f"Dry run, nothing written. Would make {pair}"]
    entry = [f"key = {result.public_key!r}".replace("'", '"'), 'name = "WHOSE"']
    return [
        f"Made {pair}",
        "",
        "Those who are to trust it write into their trust file:",
        "",
        "[[owners]]",
        *entry[::-1],
    ]


def _sign(result: SignResult) -> list[str]:
    by = f"key {result.key_id[:12]}" if result.key_id else "for OpenSSF's tool"
    count = f"{result.signatures} signatures" if result.signatures > 1 else None
    return [_sentence(result, f"Signed {cell(result.path)} in {cell(result.signature)}", by, count)]


def _check_rights(result: CheckRightsResult) -> list[str]:
    purpose = f" for {', '.join(result.purpose)}" if result.purpose else ""
    lines = [f"may be used{purpose}: {cell(result.allowed) or 'public alone'}"]
    for out in result.ruled_out:
        lines.append(f"must be left out: {out.name}: {out.reason}{f'; ask {out.contact}' if out.contact else ''}")
    lines += [f"look at the licenses: {conflict}" for conflict in result.conflicts]
    return [*lines, "", cell(result.remedy)] if result.remedy else lines


def _list(result: ListResult) -> list[str]:
    lines = [f"workspace {cell(result.path)}", ""]
    if result.anchor is None:
        lines.append("no anchor yet: flexctl init-anchor --data PATH")
    else:
        lines.append(_bundle_line(result.path, "anchor", result.anchor, (result.anchor.name, result.anchor.model_type)))
    if result.merged is None:
        lines.append("no merged model yet: flexctl merge EXPERT.st")
    else:
        lines += _listed_merged(result, result.merged)
    if result.expiring and not result.experts:
        return [*lines, f"no expert's rights end within {result.expiring}"]
    if not result.experts:
        return [*lines, "no experts yet: flexctl train-expert --data PATH"]
    whole = [expert for expert in result.experts if not expert.error]
    broken = [f"broken: {local(printable(expert.error))}" for expert in result.experts if expert.error]
    contacts = [f"{e.name}: ask {printable(e.contact)}" for e in whole if result.expiring and e.contact]
    return [*lines, "", *(table(_LISTED, map(_listed_expert, whole)) if whole else []), *contacts, *broken]


_LISTED = ("expert", "size_bytes", "rank", "license", "expires", "merged")
_LICENSE_SHOWN = 16


def _listed_merged(result: ListResult, merged: ListedMerged) -> list[str]:
    """Return the merged model's line, and one of the experts in it that have no file in the workspace."""
    count = len(merged.experts) - 1
    facts = (f"public and {count} expert{'s' if count != 1 else ''}", f"{merged.num_experts_per_tok} active")
    files = {expert.name for expert in result.experts}
    alone = [name for name in merged.experts[1:] if name not in files]
    more = [f"        also holds, without a file here: {cell(alone)}"] if alone else []
    return [_bundle_line(result.path, "merged", merged, facts), *more]


def _listed_expert(expert: ListedExpert) -> list[Any]:
    """Return an expert's row of the table; its file is named where that is not NAME.st."""
    name, file = expert.name, expert.path.name
    license = expert.license or "unknown"
    expires = f"{expert.expires} EXPIRED" if expert.expired else expert.expires
    merged = "yes" if expert.in_merged else "another" if expert.other_in_merged else "no"
    return [
        name if file == f"{name}.st" else f"{name} ({file})",
        expert.size_bytes,
        "full" if expert.rank is None else str(expert.rank),
        license if len(license) <= _LICENSE_SHOWN else f"{license[: _LICENSE_SHOWN - 3]}...",
        expires,
        merged,
    ]


def _push(result: PushResult) -> list[str]:
    if result.dry_run:
        done = f"Dry run, nothing sent. {cell(result.path)} to {result.repository}"
    else:
        done = f"Published {cell(result.path)} as {result.kind} in {result.repository}"
    return _transfer(result, done)


def _pull(result: PullResult) -> list[str]:
    if result.dry_run:
        done = f"Dry run, nothing written. {result.kind} of {result.repository} to {cell(result.path)}"
    else:
        done = f"Brought {result.kind} of {result.repository} to {cell(result.path)}"
    return _transfer(result, done)


def _transfer(result: PushResult | PullResult, done: str) -> list[str]:
    count = f"{len(result.files)} file{'s' if len(result.files) != 1 else ''}"
    line = f"{done}: {count}, {amount(result.size_bytes, 'bytes')}, {cell(result.digest)}"
    return [line, "", *_nested(list(map(dataclasses.asdict, result.files)), whole=False)] if result.dry_run else [line]


def _bundle_line(root: Path, kind: str, bundle: ListedAnchor | ListedMerged, about: tuple[str | None, ...]) -> str:
    """Return what there is to say of the workspace's anchor or merged model; its path where that is not the usual."""
    if bundle.error:
        return f"{kind}  broken: {local(printable(bundle.error))}"
    path = cell(bundle.path.relative_to(root) if bundle.path.is_relative_to(root) else bundle.path)
    facts = [*about, f"license {bundle.license or 'unknown'}", bundle.digest]
    return f"{kind}  {'' if path == kind else f'{path}: '}{', '.join(map(cell, facts))}"


def _generate(result: GenerateResult, colour: bool) -> list[str]:
    """Return who answered, where that was asked for: a legend to the text's colours, or a table of its pieces.

    The text itself was written as it came.
    """
    if not result.pieces:
        return []
    names = list(result.experts)
    shares = table(["expert", "share"], result.experts.items())
    if colour:
        closed = [paint(line, expert_colour(index)) for index, line in enumerate(shares[2:], start=1)]
        return ["", *shares[:2], *closed]
    rows = [[repr(piece.text), names[piece.leader], *map(piece.shares.get, names)] for piece in result.pieces]
    return ["", *table(["piece", "leading", *names], rows), "", *shares]


def _audit(result: AuditResult) -> list[str]:
    tried = f"{number(result.members)} documents of {result.name} and {number(result.others)} like them"
    if result.dry_run:
        return [f"Dry run, nothing tried. {cell(result.path)}: {tried}"]
    near, exact = "nearly as the document", "letter by letter"
    rows = [
        [model, _with_span(found.extraction.near), _with_span(found.extraction.exact), "yes" if found.found else "no"]
        for model, found in result.models.items()
    ]
    lines = [f"{cell(result.path)}: {tried}", ""]
    lines += _answers(result.answers, list(result.models)[1]) if result.answers else []
    lines += ["", *table(["goes on", near, exact, "anything found"], rows)]
    told = {
        model: {score: _with_span(each.auc) for score, each in found.membership.items()}
        for model, found in result.models.items()
    }
    rates = {
        model: {score: _with_span(each.tpr) for score, each in found.membership.items()}
        for model, found in result.models.items()
    }
    lines += ["", *_matrix(told, "tells members, AUC"), "", *_matrix(rates, "members found, 1 % FPR")]
    headers = ("canaries", "guesses", "right", "epsilon")
    bounds = [[m, *(getattr(f.canaries, h) for h in headers)] for m, f in result.models.items() if f.canaries]
    lines += ["", *table(["by canaries", *headers[:3], "epsilon at least"], bounds)] if bounds else []
    lines += ["", *_recovery(result.recovery)] if result.recovery else []
    return [*lines, "", f"report: {cell(result.report)}"] if result.report else lines


def _answers(answers: Answers, kind: str) -> list[str]:
    """Return an audit's three answers, each with what it means below."""
    lines = []
    for answer in evaluation.in_words(answers, kind):
        beside = f" ({answer.beside})" if answer.beside else ""
        lines += [printable(f"{answer.question}: {answer.figure}{beside}"), printable(f"  {answer.said}")]
    return lines


def _recovery(found: Recovery) -> list[str]:
    models = list(found.bits_per_byte)
    rows = [
        [
            step,
            *(found.bits_per_byte[model][at].value for model in models),
            *(_with_span(difference[at], _signed) for difference in (found.ahead, found.faster)),
        ]
        for at, step in enumerate(found.steps)
    ]
    return table(["trained on it again, steps", *models, "ahead by", "faster by"], rows)


def _with_span(found: Estimate, shown: Callable[[float], str] = number) -> str:
    span = _span(found, shown)
    return f"{shown(found.value)} ({span})" if span else shown(found.value)


def _trace_index(result: TraceIndexResult) -> list[str]:
    text = f"{number(result.documents)} documents, {amount(result.text_bytes, 'bytes')} of text"
    shards = f"{number(result.shards)} shard{'s' if result.shards != 1 else ''}" + (
        f", {result.kept_shards} kept" if result.kept_shards else ""
    )
    facts = (text, shards, amount(result.bytes_written, "bytes")) if result.documents else ()
    return [_sentence(result, f"Indexed {result.name} in {cell(result.path)}", *facts)]


_SPANS_SHOWN, _SPAN_WIDTH = 20, 60


def _trace_find(result: TraceFindResult, colour: bool) -> list[str]:
    """Return the text with each index's spans painted, and a table of them; an answer stands there in any case."""
    answered = result.prompt is not None and not (colour and any(traced.all for traced in result.indexes))
    lines = [printable(result.text)] if answered else []
    for traced in result.indexes:
        spans = traced.all
        covered = f"{traced.covered:.0%} of the text" if spans else "nothing of the text"
        found = f"{cell(traced.path)}, {number(traced.documents)} documents"
        lines += [*([""] if lines else []), f"{traced.name}: {covered} ({found})"]
        if spans and colour:
            lines += ["", *_painted(result.text, spans).split("\n")]
        if spans:
            rows = [_span_row(number, span) for number, span in enumerate(spans[:_SPANS_SHOWN], start=1)]
            lines += ["", *table(("", "span", "match", "times", "document", "from", "to"), rows)]
        if len(spans) > _SPANS_SHOWN:
            lines.append(f"and {len(spans) - _SPANS_SHOWN} more: --json, --report")
    return [*lines, "", f"report: {cell(result.report)}"] if result.report else lines


def _painted(text: str, spans: Sequence[Span]) -> str:
    pieces = tracing.segments(text, spans)
    return "".join(
        printable(piece) if at is None else paint(printable(piece), expert_colour(at + 1)) for piece, at in pieces
    )


def _span_row(at: int, span: Span) -> list[Any]:
    words = " ".join(span.text.split())
    shown = words if len(words) <= _SPAN_WIDTH else f"{words[: _SPAN_WIDTH // 2]} ... {words[-_SPAN_WIDTH // 2 + 5 :]}"
    match, first = "verbatim" if span.similarity == 1 else f"near {span.similarity:.2f}", span.places[0]
    return [at, shown, match, span.count, f"{first.file}, {first.record}", first.start, first.stop]


def _chat(_result: ChatResult) -> list[str]:
    """Return nothing: all was written as it came."""
    return []


def _select_proxy(result: SelectProxyResult) -> list[str]:
    chosen = f"{number(result.documents)} of {number(result.public_documents)} public documents"
    right = f"{result.accuracy:.0%} of passages told apart" if result.accuracy is not None else None
    done = f"Chose proxies for {result.name}: {cell(result.path)}"
    return [_sentence(result, done, chosen if result.documents else None, right)]


def _tune_router(result: TuneRouterResult) -> list[str]:
    speed = amount(result.tokens_per_s, "tokens/s") if result.tokens_per_s is not None else None
    amounts = f"{number(result.tokens)} tokens in {number(result.steps)} steps" if result.steps else None
    done = f"Tuned the router of {cell(result.path)} with {', '.join(result.tuned_with)}"
    lines = [_sentence(result, done, amounts, speed)]
    return [*lines, "", *_matrix(result.held_out, "held-out loss")] if result.held_out else lines


def _doctor(result: DoctorResult) -> list[str]:
    """Return the machine's figures, what is missing, and which precision its CPU multiplies faster."""
    extras = {name: f"missing: {', '.join(gone)}" if gone else "installed" for name, gone in result.extras.items()}
    machine = {
        "devices": result.devices,
        "processors": result.cpus,
        "torch's threads": result.threads,
        "load": result.load,
        "matrix products": _speeds(result.matmul_gflops_per_s) or None,
        "models stored in bfloat16": result.auto_dtype and f"run in {result.auto_dtype}",
        "memory": f"{_room(result.memory_bytes)}, {_room(result.memory_available_bytes)} available",
        f"disk at {cell(result.path)}": f"{_room(result.disk_free_bytes)} free",
        f"the Hub, {result.hub}": result.hub_state,
    }
    caches = {f"cache {each.name}": f"{_room(each.size_bytes)} in {cell(each.path)}" for each in result.caches}
    versions = {name: version or "MISSING" for name, version in result.versions.items()}
    missing = [f"missing: pip install {' '.join(result.missing)}"] if result.missing else []
    return [
        *pairs(versions),
        "",
        *pairs({f"extra {name}": said for name, said in extras.items()}),
        "",
        *pairs({name: value for name, value in (machine | caches).items() if value is not None}),
        *missing,
    ]


def _room(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else amount(size_bytes, "bytes")


def _speeds(gflops_per_s: Mapping[str, float]) -> str:
    """Return which dtype's matrix products are fastest on the CPU, and by how much."""
    ranked = sorted(gflops_per_s, key=lambda name: -gflops_per_s[name])
    if len(ranked) < 2:
        return ""
    first, last = ranked[0], ranked[-1]
    times = gflops_per_s[first] / gflops_per_s[last]
    return f"{first} is {times:.1f} times as fast as {last} ({number(gflops_per_s[first])} GFLOP/s)"


def _demo(result: DemoResult) -> list[str]:
    checks = {
        f"removing {result.removed} == never having merged it": result.removal_exact,
        f"nothing of {result.removed} is left": result.absent,
        "stock Transformers loads the merged model": result.stock_loads,
        "seconds": result.seconds,
        "left for you in": result.path,
    }
    return [*_matrix(result.bits_per_byte, "bits per byte"), "", *pairs(checks)]


_COLOURED: Mapping[str, Callable[[Any, bool], list[str]]] = {"generate": _generate, "trace_find": _trace_find}
_VIEWS: Mapping[str, Callable[[Any], list[str]]] = {
    "init_anchor": _init_anchor,
    "train_expert": _train_expert,
    "import_expert": _import_expert,
    "adopt": _adopt,
    "embed_router": _embed_router,
    "compress": _compress,
    "merge": _merge,
    "remove": _remove,
    "replace": _replace,
    "select_proxy": _select_proxy,
    "tune_router": _tune_router,
    "evaluate": _evaluate,
    "chat": _chat,
    "trace_index": _trace_index,
    "audit": _audit,
    "inspect": _inspect,
    "verify": _verify,
    "keygen": _keygen,
    "sign": _sign,
    "check_rights": _check_rights,
    "list": _list,
    "push": _push,
    "pull": _pull,
    "doctor": _doctor,
    "demo": _demo,
}
