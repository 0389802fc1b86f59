"""Every flag and argument, written once.

Numbers and choices stay text here: ``config.resolve`` turns the text of flags, environment and
flexctl.toml into the field's type, with one rule and one message for all three. Every default is None,
so that "given" is known; the real defaults are the Config's, and ``--help`` shows them from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

# How it is said.
Json = Annotated[bool | None, Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool | None, Option("--quiet", "-q", help="No progress, notes or warnings.")]
Verbose = Annotated[bool | None, Option("--verbose", "-v", help="Show every figure of the result.")]

# Arguments.
Source = Annotated[
    str | None,
    Argument(metavar="SOURCE", help="Checkpoint directory or Hub id; without it a small model is trained."),
]
Dense = Annotated[
    str,
    Argument(metavar="DENSE_DIR", help="Directory or Hub id of a dense checkpoint fine-tuned from the anchor."),
]
Experts = Annotated[
    list[Path] | None,
    Argument(metavar="EXPERT", help="Expert files (.st), or hf://OWNER/NAME; the first may be a merged model."),
]
Names = Annotated[list[str], Argument(metavar="NAME", help="Names of the experts to remove.")]
OneName = Annotated[str, Argument(metavar="NAME", help="Name of the expert to replace.")]
OneExpert = Annotated[
    Path, Argument(metavar="EXPERT", help="The expert's new file (.st) or hf://OWNER/NAME, of the same name.")
]
FullExpert = Annotated[Path, Argument(metavar="EXPERT", help="The expert's file (.st).")]
Bundle = Annotated[
    Path | None,
    Argument(
        metavar="BUNDLE",
        help="Merged model, anchor or expert, here or hf://OWNER/NAME; the workspace's merged model by default.",
    ),
]
MergedModel = Annotated[
    Path | None,
    Argument(metavar="MERGED", help="Merged model, here or hf://OWNER/NAME; the workspace's merged model by default."),
]
BundlePath = Annotated[Path, Argument(metavar="PATH", help="Anchor, expert (.st) or merged model.")]
BundleAnywhere = Annotated[
    Path, Argument(metavar="PATH", help="Anchor, expert (.st) or merged model; hf://OWNER/NAME for one on the Hub.")
]
Repository = Annotated[str, Argument(metavar="REPO", help="Repository on the Hub: OWNER/NAME.")]
Folder = Annotated[Path | None, Argument(metavar="PATH", help="A workspace; the current one by default.")]

# Places.
Anchor = Annotated[
    Path | None,
    Option("--anchor", metavar="DIR", help="The anchor, here or hf://OWNER/NAME (default: the workspace's anchor)."),
]
Output = Annotated[
    Path | None, Option("--output", "-o", metavar="PATH", help="Where to write; by default its place in the workspace.")
]
OutputFile = Annotated[
    Path | None,
    Option("--output", "-o", metavar="FILE.st", help="File to write; router.st unless --expert asks for one."),
]
OutputElsewhere = Annotated[
    Path | None, Option("--output", "-o", metavar="DIR", help="Write the result here and leave the model as it is.")
]
OutputBeside = Annotated[
    Path | None,
    Option("--output", "-o", metavar="FILE.st", help="File to write; NAME-rR.st or NAME-auto.st beside it by default."),
]
OutputProxy = Annotated[
    Path | None,
    Option("--output", "-o", metavar="FILE", help="File to write; NAME.proxy.json among the experts by default."),
]
OutputFolder = Annotated[Path | None, Option("--output", "-o", metavar="DIR", help="Directory to work in.")]
From = Annotated[
    Path | None,
    Option("--from", metavar="DIR", help="The merged model to change (default: the workspace's)."),
]
Expert = Annotated[
    Path | None, Option("--expert", metavar="FILE.st", help="Write a copy of this expert with the new rows.")
]
Overwrite = Annotated[bool | None, Option("--overwrite", help="Replace the target if it exists.")]
DryRun = Annotated[bool | None, Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
TrustCache = Annotated[
    bool | None,
    Option("--trust-cache", help="Skip re-hashing files that did not change since the last check."),
]

FfnOnly = Annotated[
    bool | None,
    Option("--ffn-only", help="Take feed-forward weights although others moved; what those learned is lost."),
]

# Text.
Data = Annotated[
    list[Path] | None,
    Option(
        "--data",
        metavar="PATH",
        help="Text, .jsonl, .csv or .parquet, a folder of them, or hf://datasets/OWNER/NAME; repeatable.",
    ),
]
DataSets = Annotated[
    list[str] | None,
    Option("--data", metavar="NAME=PATH", help="A domain's name and its text; repeatable."),
]
TextField = Annotated[
    str | None,
    Option("--text-field", metavar="NAME", help="Column or .jsonl field that holds the text."),
]
Public = Annotated[
    Path | None,
    Option("--public", metavar="PATH", help="Public text to use instead of the anchor's sample."),
]
PublicToChoose = Annotated[
    Path | None,
    Option("--public", metavar="PATH", help="Public text to choose from (default: the anchor's sample)."),
]
PublicOfLists = Annotated[
    Path | None,
    Option("--public", metavar="PATH", help="Public text that the lists were made from, if not the anchor's sample."),
]
Count = Annotated[
    str | None, Option("--count", metavar="N", help="Documents to choose; a tenth of the public text by default.")
]
Proxy = Annotated[
    list[Path] | None,
    Option("--proxy", metavar="FILE", help="List that select-proxy made, one for every closed expert; repeatable."),
]
PublicMix = Annotated[
    str | None, Option("--public-mix", metavar="SHARE", help="Share of public text mixed into training.")
]
SampleTokens = Annotated[
    str | None, Option("--sample-tokens", metavar="N", help="Tokens of public text kept with the anchor.")
]
Compare = Annotated[
    list[Path] | None,
    Option("--compare", metavar="FILE.st", help="Report the overlap with this expert's rows; repeatable."),
]

# Training.
Preset = Annotated[
    str | None,
    Option("--preset", metavar="SIZE", help="Size of a model trained from scratch: nano, micro or small."),
]
MaxTokens = Annotated[str | None, Option("--max-tokens", metavar="N", help="Stop after this many tokens of --data.")]
MaxSteps = Annotated[str | None, Option("--max-steps", metavar="N", help="Stop after this many optimiser steps.")]
TuneTokens = Annotated[
    str | None,
    Option("--max-tokens", metavar="N", help="Stop after this many tokens; by default a pass over the lists."),
]
Epochs = Annotated[str | None, Option("--epochs", metavar="N", help="Passes over --data.")]
AnnealTokens = Annotated[
    str | None,
    Option("--anneal-tokens", metavar="N", help="First train SOURCE on this many tokens of --data."),
]
SeqLen = Annotated[str | None, Option("--seq-len", metavar="N", help="Tokens a sequence.")]
BatchTokens = Annotated[str | None, Option("--batch-tokens", metavar="N", help="Tokens an optimiser step.")]
ScoredTokens = Annotated[
    str | None, Option("--batch-tokens", metavar="N", help="Tokens that go through the model together.")
]
MicroBatch = Annotated[
    str | None, Option("--micro-batch", metavar="N", help="Sequences in memory at once; filled up by default.")
]
Lr = Annotated[str | None, Option("--lr", metavar="X", help="Peak learning rate.")]
WarmupSteps = Annotated[str | None, Option("--warmup-steps", metavar="N", help="Steps until the peak learning rate.")]
Tether = Annotated[
    str | None,
    Option("--tether", metavar="X", help="How strongly router rows are held to where they start."),
]
PublicMatch = Annotated[
    str | None,
    Option("--public-match", metavar="X", help="How strongly the expert is held to the public one on public text."),
]
Rank = Annotated[
    str | None,
    Option("--rank", metavar="R", help="Train low-rank differences to the public expert: a smaller file, less memory."),
]
CompressRank = Annotated[
    str | None, Option("--rank", metavar="R|auto", help="Rank of every matrix; auto chooses one for each on --data.")
]
Size = Annotated[
    str | None,
    Option(
        "--size", metavar="SHARE", help="With --rank auto: share of the full matrices' bytes to take (default: 0.15)."
    ),
]
FreezeRouter = Annotated[bool | None, Option("--freeze-router", help="Leave the router rows as they start.")]
Resume = Annotated[
    bool | None, Option("--resume", help="Go on from the last checkpoint; of a finished run, give its result.")
]
CheckpointSteps = Annotated[
    str | None, Option("--checkpoint-steps", metavar="N", help="Write a checkpoint every so many steps.")
]

# Router.
RouterKind = Annotated[
    str | None, Option("--router", metavar="KIND", help="How rows are made: discriminant, hidden or encoder.")
]
Router = Annotated[
    str | None,
    Option("--router", metavar="KIND|FILE", help="discriminant, hidden, encoder, or a file of embed-router."),
]
Encoder = Annotated[str | None, Option("--encoder", metavar="MODEL", help="Sentence encoder for --router encoder.")]
SelectEncoder = Annotated[
    str | None,
    Option("--encoder", metavar="MODEL", help="Tell texts apart by this sentence encoder, not by router inputs."),
]
Baselines = Annotated[
    Path | None,
    Option("--baselines", metavar="DIR", help="Compare with soups, BTM, routing and more, from dense experts here."),
]
TopK = Annotated[str | None, Option("--top-k", metavar="K", help="Experts active for a token.")]

# What a bundle says about itself.
Name = Annotated[
    str | None, Option("--name", metavar="NAME", help="Its name; made from the folder or file unless given.")
]
License = Annotated[str | None, Option("--license", metavar="SPDX", help="Its license, an SPDX id or text.")]
Purpose = Annotated[
    list[str] | None, Option("--purpose", metavar="TEXT", help="What the expert may be used for; repeatable.")
]
Expires = Annotated[str | None, Option("--expires", metavar="DATE", help="Last day of its use, as 2030-12-31.")]
Label = Annotated[str | None, Option("--label", metavar="TEXT", help="One line about the data.")]
Contact = Annotated[str | None, Option("--contact", metavar="TEXT", help="Whom to ask about the expert.")]

# The Hub.
Private = Annotated[bool | None, Option("--private", help="Make a new repository private; refuse a public one.")]
Branch = Annotated[
    str | None, Option("--revision", metavar="BRANCH", help="Branch to publish on (default: the main branch).")
]
Revision = Annotated[
    str | None, Option("--revision", metavar="REV", help="Branch, tag or commit (default: the main branch).")
]
Message = Annotated[str | None, Option("--message", metavar="TEXT", help="Message of the commit.")]
BaseModel = Annotated[
    str | None,
    Option("--base-model", metavar="OWNER/NAME", help="For the card: the expert's anchor, or the anchor's origin."),
]

# Using a model.
Ablate = Annotated[bool | None, Option("--ablate", help="Also score with each expert left out in turn.")]
SweepTopK = Annotated[
    bool | None, Option("--sweep-top-k", help="Also score with every number of experts active for a token.")
]
CompareWith = Annotated[
    Path | None,
    Option("--compare", metavar="BUNDLE", help="Hold it against another bundle and say which documents moved."),
]
Samples = Annotated[
    Path | None,
    Option("--samples", metavar="FILE.jsonl", help="Write figures of each document and task item, without their text."),
]
Report = Annotated[
    Path | None,
    Option(
        "--report",
        metavar="FILE.html",
        help="Write a page with all figures, --ablate and --sweep-top-k included; it holds passages of the texts.",
    ),
]
Tasks = Annotated[
    list[Path] | None,
    Option("--tasks", metavar="PATH", help="Questions (.jsonl), an lm-eval task (.yaml), or a folder; repeatable."),
]
Shots = Annotated[str | None, Option("--shots", metavar="N", help="Solved examples in each prompt of a task.")]
Limit = Annotated[str | None, Option("--limit", metavar="N", help="Only the first N items of each task.")]
Without = Annotated[list[str] | None, Option("--without", metavar="NAME", help="Leave this expert out; repeatable.")]
AllowExpired = Annotated[bool | None, Option("--allow-expired", help="Use experts whose rights have expired.")]
Tombstone = Annotated[bool | None, Option("--tombstone", help="Record in the manifest what was removed.")]
Absent = Annotated[
    list[str] | None,
    Option("--absent", metavar="NAME", help="Prove that this expert is not inside; repeatable."),
]
Prompt = Annotated[str | None, Option("--prompt", metavar="TEXT", help="The text to continue.")]
Explain = Annotated[bool | None, Option("--explain", help="Show which expert answered, piece by piece.")]
Chat = Annotated[
    bool | None, Option("--chat", help="Put the prompt as a user's message, in the model's chat template.")
]
MaxNewTokens = Annotated[str | None, Option("--max-new-tokens", metavar="N", help="Length of the answer.")]
Temperature = Annotated[
    str | None,
    Option("--temperature", metavar="T", help="0 takes the likeliest token; above, tokens are drawn."),
]

# The machine.
Seed = Annotated[str | None, Option("--seed", metavar="N", help="Seed of everything random.")]
Threads = Annotated[str | None, Option("--threads", metavar="N", help="CPU threads.")]
Device = Annotated[str | None, Option("--device", metavar="NAME", help="cpu, cuda or auto.")]
Dtype = Annotated[str | None, Option("--dtype", metavar="NAME", help="float32, bfloat16 or auto.")]
