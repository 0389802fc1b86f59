"""Every command and every public name, in one table.

A command is its module in engine/ and one row here; the command line, its help pages, docs/cli.md, the tables of
flexctl.toml and the names of the package follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["COMMANDS", "PUBLIC", "Command"]


class Command(NamedTuple):
    """One command.

    Attributes:
        name: Its name with underscores, which is its module's and its function's.
        summary: What it does, one line.
        types: Types of its Result's fields that its module defines.
        is_shared: Whether several processes may share a run of it.
    """

    name: str
    summary: str
    types: tuple[str, ...] = ()
    is_shared: bool = False

    @property
    def shown(self) -> str:
        """Its name on the command line."""
        return self.name.replace("_", "-")

    @property
    def config(self) -> str:
        """The name of its Config: ``train_expert`` has ``TrainExpertConfig``."""
        return "".join(word.capitalize() for word in self.name.split("_")) + "Config"

    @property
    def result(self) -> str:
        """The name of its Result."""
        return self.config.removesuffix("Config") + "Result"


COMMANDS = (
    Command("init_anchor", "Make the public, frozen model that experts train against.", is_shared=True),
    Command("train_expert", "Train one expert on text that stays where it is.", is_shared=True),
    Command("import_expert", "Make an expert of a checkpoint fine-tuned elsewhere."),
    Command("adopt", "Take a stock mixture apart into an anchor and experts.", ("AdoptedExpert",)),
    Command("embed_router", "Make router rows from sample texts, without training.", ("LayerReport",)),
    Command("compress", "Make a small, low-rank copy of an expert."),
    Command("merge", "Merge the anchor and experts into one stock checkpoint.", ("MergedExpert",)),
    Command("remove", "Remove experts exactly, as if they had never been merged."),
    Command("replace", "Replace one expert by its new version; say what changed.", ("Change",)),
    Command("select_proxy", "Choose, at home, the public documents most like your text."),
    Command("tune_router", "Tune the router of a merged model on public text."),
    Command("evaluate", "Score a bundle on held-out text and on tasks.", is_shared=True),
    Command("generate", "Continue a text, and show on request which expert answered."),
    Command("chat", "Talk with a bundle, and choose in between who may answer.", ("ChatSession", "Turn")),
    Command("serve", "Serve a bundle; each request says who may answer."),
    Command("trace_index", "Index your text, at home, so that spans of it can be found."),
    Command("trace_find", "Show what of a text or an answer stands in indexes."),
    Command("audit", "Attack a model with your text: what does it give away?"),
    Command("inspect", "Show what a bundle says about itself."),
    Command("verify", "Re-hash and check everything in a bundle."),
    Command("keygen", "Make a key to sign with."),
    Command("sign", "Sign a bundle, so that others can see who made it."),
    Command("check_rights", "Say which experts a purpose rules out.", ("RuledOut",)),
    Command(
        "list",
        "List the workspace's anchor, experts and merged model.",
        ("ListedAnchor", "ListedExpert", "ListedMerged"),
    ),
    Command("push", "Publish a bundle on the Hugging Face Hub."),
    Command("pull", "Bring a bundle from the Hugging Face Hub."),
    Command("doctor", "Say what this machine offers, and what is missing.", ("CacheFolder",)),
    Command("demo", "Show an expert's whole life, offline, in a few minutes."),
)
"""In the order of an expert's life."""

PUBLIC: Mapping[str, tuple[str, ...]] = {
    "errors": ("BundleError", "FlexctlError", "Interrupted", "Terminated", "UsageError"),
    "runtime": ("SILENT", "Progress", "Reporter"),
    "workspace": ("Workspace",),
    "bundle.checks": ("Check",),
    "bundle.manifest": ("PrivacyInfo", "Tombstone"),
    "evaluation.attacks.findings": (
        "Answers",
        "AtLeast",
        "AtMost",
        "Audited",
        "CanaryBound",
        "Extraction",
        "Membership",
        "Recovery",
    ),
    "evaluation.explaining": ("Piece",),
    "evaluation.figures": (
        "Comparison",
        "DomainComparison",
        "DomainScore",
        "Estimate",
        "Figures",
        "Lineage",
        "Member",
        "Moved",
        "Settings",
        "TaskScore",
    ),
    "hub.remote": ("BundleFile",),
    "steps.outlook": ("DevicePlan", "TrainingPlan"),
    "tracing.spans": ("Place", "Span", "Traced"),
    "trust.records": ("Absence",),
    **{f"engine.{row.name}": (row.config, row.result, row.name, *row.types) for row in COMMANDS},
}
"""Module of the package -> the names that it gives to ``flexctl`` itself, imported on first use."""
