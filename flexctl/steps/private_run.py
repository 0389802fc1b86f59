"""Training an expert under a guarantee, from documents to the tensors that are released.

Every place that reads the owner's text is in here: documents are written into the working folder, their mean goes into
router rows with noise, and their clipped gradients into the steps with noise. Nothing else of them is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flexctl import evaluation, privacy, routing, text, training
from flexctl.bundle import PUBLIC, RouterInfo
from flexctl.errors import UsageError
from flexctl.steps.expert_run import Inputs, Trained, losses_before, refuse_moved, settings_of
from flexctl.steps.guarantee import Plan, PrivateConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PrivateRun"]

_PUBLIC_DOCUMENTS = 64
_ROW_TOKENS = 256


class PrivateRun:
    """One run: what it reads and what it goes by.

    Args:
        config: The command's.
        plan: The guarantee.
        given: What it is trained against, with and on. Its log is of public losses, documents that share words with
            test text are left out and nobody hears of it, and its reporter hears nothing of documents.
    """

    def __init__(self, config: PrivateConfig, plan: Plan, given: Inputs) -> None:
        self._config, self._plan, self._given = config, plan, given
        self._base, self._public, self._work = given.base, given.public, given.work
        self._track, self._reporter = given.track, given.reporter
        self._reader = self._built()
        self._loop = training.LoopSettings(
            steps=plan.mechanism.steps,
            lr=plan.lr,
            warmup_steps=training.warmup_steps(plan.mechanism.steps, config.warmup_steps),
            micro_batch=plan.micro_batch,
            autocast=given.machine.autocast,
        )
        if not self._public.to_train_on:
            raise UsageError("the public sample is a single document", hint="give more of it with `public`")
        stream = text.PublicSample(self._public.to_train_on).stream()
        self._sequences = training.EqualShares(
            {PUBLIC: stream}, seq_len=plan.seq_len, batch_size=plan.public_batch, seed=config.seed
        )

    def _built(self) -> nn.Module:
        return self._given.machine.build(self._base.anchor.weights())

    def train(self) -> Trained:
        """Train the expert and return what may leave the house.

        Raises:
            UsageError: There is no document, or what is to be gone on with is another run's.
            FlexctlError: Training failed.
        """
        config, plan, reporter = self._config, self._plan, self._reporter
        framed = text.frame_documents(self._base.tokenizer, self._own_texts())
        documents = privacy.Documents.write(self._work / "own.tokens", framed)
        ledger = privacy.open_ledger(
            self._work / "ledger.json",
            resume=config.resume,
            started=any(self._work.glob("checkpoints/*")),
            settings=self._decides(),
            digest=documents.digest,
            clips=self._clips,
        )
        held_out = self._held_out()
        before = losses_before(self._reader, held_out, plan.seq_len, self._given)
        self._track.held_out(0, before)
        reporter.note(f"router rows: {config.router}, with noise")
        rows = self._rows(documents, ledger)
        checkpoints = self._checkpoints(ledger)
        pair = self._pair(self._reader, rows.rows)
        training.train_privately(
            self._reader,
            pair.groups(),
            documents,
            self._sequences if config.public_mix else None,
            self._steps(ledger.max_grad_norm),
            self._loop,
            secret=ledger.secret,
            match=pair.match,
            checkpoints=checkpoints,
            reporter=reporter,
            track=self._track,
        )
        anchor = self._base.anchor
        tensors = pair.round_weights(anchor.manifest.architecture.dtype, anchor.weights().experts[PUBLIC])
        after = evaluation.held_out_losses(self._reader, held_out, seq_len=plan.seq_len, reporter=reporter)
        self._track.held_out(self._loop.steps, after)
        refuse_moved(self._reader, anchor, self._given.world)
        return Trained(
            tensors={**tensors, "router.weight": rows.rows},
            router=self._router_info(rows),
            settings=self._settings(),
            steps=plan.mechanism.steps,
            public_tokens=plan.mechanism.steps * plan.public_batch * plan.seq_len if config.public_mix else 0,
            held_out={part: {"before": before[part], "after": after[part]} for part in before},
            privacy=plan.info(ledger.max_grad_norm),
        )

    def _own_texts(self) -> Iterator[str]:
        """Yield the owner's documents but those that share words with test text.

        Whether one does depends on no other, so texts that differ by one document still do afterwards, or are the same.
        """
        return self._given.decontamination.kept(text.read_documents(self._config.data, self._config.text_field))

    def _clips(self) -> tuple[float, float]:
        """Return how long a document's gradient and its share in the rows may be, by public documents."""
        config, plan = self._config, self._plan
        documents = self._public.to_train_on[:_PUBLIC_DOCUMENTS]
        row_norm = routing.shift_norm(self._reader, self._base.space, self._beside(documents, _ROW_TOKENS))
        if config.dp_max_grad_norm is not None:
            return config.dp_max_grad_norm, row_norm
        self._reporter.note("measuring the clip on public text")
        reader = self._built()
        pair = self._pair(reader, self._base.space.mean.new_zeros(self._base.space.mean.shape))
        norm = training.gradient_norm(
            reader,
            pair.groups(),
            self._sequences,
            list(self._beside(documents, plan.seq_len)),
            self._loop,
            pair.match,
        )
        return float(f"{norm:.3g}"), row_norm

    def _beside(self, documents: Sequence[text.Framed], seq_len: int) -> Iterator[privacy.Padded]:
        size = self._plan.micro_batch
        for first in range(0, len(documents), size):
            some = [document.tokens[: seq_len + 1] for document in documents[first : first + size]]
            yield privacy.padded(some, len(some))

    def _pair(self, reader: nn.Module, rows: Tensor) -> training.Pair:
        config = self._config
        return training.Pair(reader, rows, public_match=config.public_match, rank=config.rank, seed=config.seed)

    def _rows(self, documents: privacy.Documents, ledger: privacy.Ledger) -> routing.Rows:
        plan, order = self._plan, documents.shortest_first()
        size = plan.micro_batch

        def batches() -> Iterator[privacy.Padded]:
            for first in range(0, len(order), size):
                some = [documents.window(int(index), _ROW_TOKENS) for index in order[first : first + size]]
                yield privacy.padded(some, size)

        return routing.private_rows(
            self._config.router,
            self._reader,
            self._base.space,
            batches(),
            documents=plan.documents,
            clip=ledger.row_norm,
            noise_multiplier=plan.mechanism.row_noise_multiplier,
            stream=ledger.secret.stream("rows"),
        )

    def _router_info(self, rows: routing.Rows) -> RouterInfo:
        return RouterInfo(
            kind=self._config.router,
            samples=self._plan.documents,
            encoder=None,
            trained=False,
            bias=tuple(float(bias) for bias in rows.bias),
            own_covariance=0.0 if self._config.router == "discriminant" else None,
        )

    def _steps(self, max_grad_norm: float) -> training.PrivateSteps:
        plan = self._plan
        return training.PrivateSteps(
            sampling_rate=plan.mechanism.sampling_rate,
            batch_size=plan.batch_size,
            seq_len=plan.seq_len,
            max_grad_norm=max_grad_norm,
            noise_multiplier=plan.mechanism.noise_multiplier,
            public_share=self._config.public_mix,
        )

    def _settings(self) -> dict[str, Any]:
        """Return every resolved setting that decides the result, but the guarantee's."""
        config, plan = self._config, self._plan
        return settings_of(config, self._loop, seq_len=plan.seq_len, batch_size=plan.batch_size, dtype=config.dtype)

    def _decides(self) -> dict[str, Any]:
        """Return all that decides the result but the text."""
        config, plan = self._config, self._plan
        return {
            **self._settings(),
            "anchor": self._base.anchor.digest,
            "public": self._public.digest,
            "decontaminate": self._given.decontamination.digest,
            "router": config.router,
            "rank": config.rank,
            "epsilon": plan.epsilon,
            "delta": plan.delta,
            "documents": plan.documents,
            "noise_multiplier": plan.mechanism.noise_multiplier,
            "row_noise_multiplier": plan.mechanism.row_noise_multiplier,
            "max_grad_norm": config.dp_max_grad_norm,
        }

    def _checkpoints(self, ledger: privacy.Ledger) -> training.Checkpoints:
        config = self._config
        return training.Checkpoints(
            self._work / "checkpoints",
            {**ledger.run, "max_grad_norm": ledger.max_grad_norm},
            every_steps=config.checkpoint_steps,
            resume=config.resume,
            reporter=self._reporter,
        )

    def _held_out(self) -> dict[str, list[text.Framed]]:
        """Return held-out public text; the owner's is never looked at."""
        held_out = self._public.held_out
        most = training.held_out_tokens(self._plan.documents * self._plan.seq_len)
        return {PUBLIC: text.leading(held_out, most)} if held_out else {}
