"""Training an expert without a guarantee, from documents to the tensors that are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexctl import evaluation, model, text, training
from flexctl.bundle import PUBLIC, RouterInfo
from flexctl.steps.expert_run import (
    ExpertConfig,
    Inputs,
    Told,
    Trained,
    budget_of,
    losses_before,
    refuse_moved,
    settings_of,
)
from flexctl.steps.router_rows import given_rows, measured_rows, names_a_file

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["train_openly"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """The owner's text and how it is gone through."""

    corpus: text.Corpus
    data: training.Mixture
    loop: training.LoopSettings

    @property
    def own_tokens(self) -> int:
        """Tokens of the owner's that the run trains on."""
        return self.data.own_tokens(self.loop.steps)


def train_openly(config: ExpertConfig, given: Inputs) -> Trained:
    """Train an expert and return what is written of it.

    Args:
        config: The command's.
        given: What it is trained against, with and on.

    Raises:
        UsageError: The data is wrong, or what is to be gone on with is another run's.
        BundleError: The router file is not valid.
        FlexctlError: Training failed.
    """
    setup, anchor, world = _set_up(config, given), given.base.anchor, given.world
    reader = given.machine.build(anchor.weights(), world)
    rows, router = _start_rows(config, given, setup, reader)
    held_out = _held_out(setup, given)
    before = losses_before(reader, held_out, setup.data.seq_len, given)
    given.track.held_out(0, before)
    if world.size > 1:
        del reader  # FSDP takes no module after the first pass, so that the expert goes into a new one
        reader = given.machine.build(anchor.weights(), world)
    kernels = _kernels(given)
    tensors, outcome = _train(config, given, setup, reader, rows, kernels)
    after = evaluation.held_out_losses(
        reader, held_out, seq_len=setup.data.seq_len, reporter=given.reporter, world=world
    )
    given.track.held_out(setup.loop.steps, after)
    refuse_moved(reader, anchor, world)
    return Trained(
        tensors={**tensors, "router.weight": rows},
        router=router,
        settings=_settings(config, setup),
        steps=setup.loop.steps,
        public_tokens=setup.data.public_before(setup.loop.steps) * setup.data.seq_len,
        held_out={part: {"before": before[part], "after": after[part]} for part in before},
        told=_told(setup, outcome),
        kernels=None if kernels is None else kernels.name,
    )


def _told(setup: _Setup, outcome: training.Outcome) -> Told:
    survey = setup.corpus.survey
    return Told(
        digest=survey.digest,
        documents=survey.documents,
        num_bytes=survey.num_bytes,
        num_tokens=len(setup.corpus.stream),
        tokens=setup.own_tokens,
        counts={name: getattr(survey, name) for name in text.COUNTS},
        final_loss=outcome.final_loss,
        tokens_per_s=outcome.tokens_per_s,
    )


def _set_up(config: ExpertConfig, given: Inputs) -> _Setup:
    corpus, anchor, public = _corpus(config, given), given.base.anchor, given.public
    budget = budget_of(
        config,
        available_tokens=len(corpus.stream),
        hidden_size=anchor.manifest.architecture.hidden_size,
        longest=anchor.config.get("max_position_embeddings"),
    )
    data = training.Mixture(
        corpus.stream,
        text.PublicSample(public.to_train_on).stream() if public.to_train_on else None,
        seq_len=budget.seq_len,
        batch_size=budget.batch_size,
        public_share=config.public_mix,
        seed=config.seed,
    )
    most = data.steps_for(budget.own_tokens)
    steps = min(most, config.max_steps or most)
    loop = training.LoopSettings(
        steps=steps,
        lr=budget.lr,
        warmup_steps=training.warmup_steps(steps, config.warmup_steps),
        micro_batch=budget.micro_batch,
        autocast=given.machine.autocast,
    )
    return _Setup(corpus=corpus, data=data, loop=loop)


def _corpus(config: ExpertConfig, given: Inputs) -> text.Corpus:
    # What the writer has tokenised, the others find.
    return given.world.writer_first(
        lambda: text.prepare_corpus(
            config.data,
            given.base.tokenizer,
            given.work,
            text_field=config.text_field,
            seed=config.seed,
            passages=0 if names_a_file(config.router) else training.MOST_PASSAGES,
            decontamination=given.decontamination,
            near_duplicates=config.near_duplicates and given.world.is_writer,
            cache=config.token_cache,
            reporter=given.reporter,
        )
    )


def _start_rows(config: ExpertConfig, given: Inputs, setup: _Setup, reader: nn.Module) -> tuple[Tensor, RouterInfo]:
    """Return the router rows, (L, H), float32, the same bits in every process, and how they came about."""
    base, public = given.base, given.public
    given.reporter.note(f"router rows: {config.router}")
    if (file := given_rows(config, base.anchor)) is not None:
        return model.to_torch(file.rows), file.info
    passages = training.passages(setup.own_tokens)
    rows, info = measured_rows(
        config,
        base,
        reader,
        setup.corpus.passages[:passages],
        lambda: text.sample_passages(public.texts(base.tokenizer), passages, config.seed),
        given.reporter,
        given.world,
    )
    return given.world.by_writer(lambda: (rows.rows, info))


def _kernels(given: Inputs) -> model.Kernels | None:
    """Return what runs parts of a step in place of torch, and say so; several processes have none."""
    machine = given.machine
    kernels = model.find_kernels(machine.device, machine.autocast, given.reporter) if given.world.size == 1 else None
    if kernels is not None:
        given.reporter.note(f"{kernels.name} runs rotary embeddings, networks and loss")
    return kernels


def _train(
    config: ExpertConfig,
    given: Inputs,
    setup: _Setup,
    reader: nn.Module,
    rows: Tensor,
    kernels: model.Kernels | None,
) -> tuple[dict[str, Tensor], training.Outcome]:
    """Train the pair; return the expert's tensors, rounded as they are stored, and what the run did."""
    anchor, world = given.base.anchor, given.world
    checkpoints = training.Checkpoints(
        given.work / "checkpoints",
        _decides(config, given, setup, rows),
        every_steps=config.checkpoint_steps,
        resume=config.resume,
        reporter=given.reporter,
        world=world,
    )
    pair = training.Pair(
        reader, rows, public_match=config.public_match, rank=config.rank, seed=config.seed, world=world
    )
    if config.recompute:
        model.recompute_layers(reader)
    with model.fused(reader, kernels) as loss:
        outcome = training.train(
            reader,
            pair.groups(),
            setup.data,
            setup.loop,
            reporter=given.reporter,
            match=pair.match,
            loss=loss,
            checkpoints=checkpoints,
            track=given.track,
            world=world,
        )
    return pair.round_weights(anchor.manifest.architecture.dtype, anchor.weights().experts[PUBLIC]), outcome


def _settings(config: ExpertConfig, setup: _Setup) -> dict[str, Any]:
    data, loop = setup.data, setup.loop
    return settings_of(config, loop, seq_len=data.seq_len, batch_size=data.batch_size, dtype=loop.dtype)


def _decides(config: ExpertConfig, given: Inputs, setup: _Setup, rows: Tensor) -> dict[str, Any]:
    """Return all that decides the result, the text too."""
    return {
        **_settings(config, setup),
        "anchor": given.base.anchor.digest,
        "data": setup.corpus.survey.digest,
        "public": given.public.digest,
        "rows": [float(row) for row in rows.norm(dim=1)],
        "rank": config.rank,
        "special_as_text": config.special_as_text,
        "decontaminate": given.decontamination.digest,
    }


def _held_out(setup: _Setup, given: Inputs) -> dict[str, list[text.Framed]]:
    """Return documents kept out of training, the owner's and public ones."""
    most = training.held_out_tokens(setup.own_tokens)
    parts = {"own": setup.corpus.held_out, PUBLIC: given.public.held_out}
    return {name: text.leading(documents, most) for name, documents in parts.items() if documents is not None}
