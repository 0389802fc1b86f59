"""Options that several commands have, each written once: a Config says ``threads: flags.Threads = None``.

Those of one command stand in its Config. Paths may be on the Hub, ``hf://owner/name``, where the help says so.
"""

from __future__ import annotations

import datetime
import os
import unicodedata
from pathlib import Path
from typing import Annotated

from flexctl.errors import UsageError
from flexctl.options import (
    DATA,
    HARDWARE,
    MODEL,
    OUTPUT,
    RIGHTS,
    ROUTER,
    TRAINING,
    TRUST,
    Option,
    argument,
    flag,
    switch,
)

__all__ = [
    "OWN_COVARIANCE",
    "Accept",
    "Admit",
    "AllowExpired",
    "Anchor",
    "BatchTokens",
    "Bundle",
    "BundlePath",
    "CheckpointSteps",
    "Contact",
    "Data",
    "Decontaminate",
    "Device",
    "Domains",
    "DryRun",
    "Dtype",
    "Encoder",
    "Expires",
    "ForwardTokens",
    "Key",
    "Label",
    "License",
    "Lr",
    "MaxNewTokens",
    "MaxSteps",
    "Name",
    "NearDuplicates",
    "OutputElsewhere",
    "Overwrite",
    "OwnCovariance",
    "PassphraseFile",
    "Public",
    "Purpose",
    "Reason",
    "RequireSigned",
    "Resume",
    "Router",
    "Screen",
    "Seed",
    "SeqLen",
    "Source",
    "SpecialAsText",
    "Temperature",
    "Tether",
    "TextField",
    "Threads",
    "Tombstone",
    "TopK",
    "Track",
    "Trust",
    "TrustCache",
    "Without",
    "output",
]

_MOST_CHARACTERS = 10_000
_MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


def output(metavar: str, help: str) -> Option:
    """Return the option that says where a command writes."""
    return flag(metavar, help, OUTPUT, short="-o")


def _refuse_no_date(value: str, field: str) -> None:
    try:
        is_date = datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        is_date = False
    if not is_date:
        raise UsageError(f"{value!r} is no date", hint="write YYYY-MM-DD", field=field)


def _refuse_unwritable(value: str | tuple[str, ...], field: str) -> None:
    """Refuse words about a bundle that no manifest can hold."""
    for text in (value,) if isinstance(value, str) else value:
        if len(text) > _MOST_CHARACTERS:
            raise UsageError(f"has {len(text)} characters; expected at most {_MOST_CHARACTERS}", field=field)
        for character in text:
            if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t":
                raise UsageError(f"holds {character!a}, which is no character of a text", field=field)


def _refuse_too_many(value: int, field: str) -> None:
    if value > _MOST_THREADS:
        hint = f"this machine has {os.cpu_count()} processors"
        raise UsageError(f"{value} is above {_MOST_THREADS}", hint=hint, field=field)


# Text.
_DATA_HELP = "Text, .jsonl, .csv or .parquet, a folder of them, or hf://datasets/OWNER/NAME; repeatable."
Data = Annotated[tuple[Path, ...], flag("PATH", _DATA_HELP, DATA)]
Domains = Annotated[
    tuple[str, ...],
    flag(
        "[NAME=]PATH",
        "Test text, and the domain's name if not that of its file or folder; repeatable.",
        DATA,
        paths=True,
    ),
]
TextField = Annotated[str, flag("NAME", "Column or .jsonl field that holds the text.", DATA)]
SpecialAsText = Annotated[
    bool, switch("Read special tokens that stand in the text, <|endoftext|> for one, as plain text.", DATA)
]
Decontaminate = Annotated[
    tuple[Path, ...],
    flag("PATH", "Test text: documents that share 13 words in a row with it are left out; repeatable.", DATA),
]
NearDuplicates = Annotated[
    bool,
    switch("Count documents that are nearly the same as one before; takes a quarter of the time of tokenising.", DATA),
]
Public = Annotated[Path | None, flag("PATH", "Public text to use instead of the anchor's sample.", DATA)]

# What it is about.
Anchor = Annotated[Path | None, flag("DIR", "The anchor, here or hf://OWNER/NAME (default: the workspace's).", MODEL)]
Source = Annotated[
    Path | None, flag("DIR", "The merged model to change (default: the workspace's).", MODEL, name="from")
]
Bundle = Annotated[
    Path | None,
    argument(
        "BUNDLE", "Merged model, anchor or expert, here or hf://OWNER/NAME; the workspace's merged model by default."
    ),
]
BundlePath = Annotated[
    Path, argument("PATH", "Anchor, expert (.st) or merged model; hf://OWNER/NAME for one on the Hub.")
]
TopK = Annotated[int | None, flag("K", "Experts active for a token (default: what the bundle says).", MODEL, above=0)]
Without = Annotated[tuple[str, ...], flag("NAME", "Leave this expert out, by a mask at run time; repeatable.", MODEL)]

MaxNewTokens = Annotated[int, flag("N", "Length of the answer.", OUTPUT, above=0)]
Temperature = Annotated[float, flag("T", "0 takes the likeliest token; above, tokens are drawn.", MODEL, at_least=0)]

# Training.
SeqLen = Annotated[
    int | None, flag("N", "Tokens a sequence (default: 1024, or what the model can hold).", DATA, above=0)
]
BatchTokens = Annotated[
    int | None,
    flag("N", "Tokens an optimiser step (default: about a six-hundredth of all, 1024 to 65,536).", TRAINING, above=0),
]
MaxSteps = Annotated[int | None, flag("N", "Stop after this many optimiser steps.", TRAINING, above=0)]
Lr = Annotated[
    float | None, flag("X", "Peak learning rate (default: scales with the model's width).", TRAINING, above=0)
]
Resume = Annotated[bool, switch("Go on from the last checkpoint; of a finished run, give its result.", TRAINING)]
CheckpointSteps = Annotated[
    int | None,
    flag("N", "Write a checkpoint every so many steps (default: about every five minutes).", TRAINING, above=0),
]

# Router.
Router = Annotated[
    str, flag("KIND|FILE", "Router rows: discriminant, hidden, encoder, or a file of embed-router.", ROUTER)
]
Encoder = Annotated[
    str | None, flag("MODEL", "sentence-transformers model, a directory or Hub id, for `router` encoder.", ROUTER)
]
OWN_COVARIANCE = 0.1
"""Default share of the owner's own covariance. By measurement: docs/results.md, section 10."""
OwnCovariance = Annotated[
    float,
    flag("SHARE", "Share of your text's own covariance in discriminant rows.", ROUTER, at_least=0, below=1),
]
Tether = Annotated[float, flag("X", "How strongly router rows are held to where they start.", ROUTER, at_least=0)]

# What a bundle says about itself, and what may be done with it.
Name = Annotated[
    str | None, flag("NAME", "The expert's name (default: made from the folder or file of `data`).", OUTPUT)
]
License = Annotated[str | None, flag("SPDX", "Its license, an SPDX id or text.", RIGHTS, check=_refuse_unwritable)]
Purpose = Annotated[
    tuple[str, ...], flag("TEXT", "What the expert may be used for; repeatable.", RIGHTS, check=_refuse_unwritable)
]
Expires = Annotated[
    str | None,
    flag("DATE", "Last day of its use, as 2030-12-31; merge refuses it afterwards.", RIGHTS, check=_refuse_no_date),
]
Label = Annotated[str | None, flag("TEXT", "One line about the data.", RIGHTS, check=_refuse_unwritable)]
Contact = Annotated[str | None, flag("TEXT", "Whom to ask about the expert.", RIGHTS, check=_refuse_unwritable)]
AllowExpired = Annotated[bool, switch("Take experts whose rights have expired.", RIGHTS)]

# Whose word counts.
Trust = Annotated[
    Path | None, flag("FILE", "Trust file: whose keys count, and how long (docs/security.md, section 2).", TRUST)
]
RequireSigned = Annotated[bool, switch("Refuse experts that no key of `trust` has signed.", TRUST)]
Screen = Annotated[
    bool, switch("Try experts on public text, each against the model without it; loads the model.", TRUST)
]
Accept = Annotated[tuple[str, ...], flag("NAME", "Take this expert whatever is found; repeatable.", TRUST)]
Admit = Annotated[bool, switch("Refuse an expert that makes a domain of `data` worse.", TRUST)]
PassphraseFile = Annotated[
    Path | None,
    flag("FILE", "File whose first line opens the key (default: FLEXCTL_PASSPHRASE, else asked for).", TRUST),
]
Key = Annotated[Path | None, flag("FILE", "Private key, made by keygen, that signs.", TRUST)]
Tombstone = Annotated[bool, switch("Keep the name and digest of what goes in the manifest and the card.", OUTPUT)]
Reason = Annotated[str | None, flag("TEXT", "Why, for the record that `key` signs.", OUTPUT, check=_refuse_unwritable)]

# The machine.
Seed = Annotated[int, flag("N", "Seed of everything random.", HARDWARE)]
Threads = Annotated[
    int | None, flag("N", "CPU threads (default: torch's choice).", HARDWARE, above=0, check=_refuse_too_many)
]
Device = Annotated[str, flag("NAME", "cpu, cuda or auto.", HARDWARE)]
Dtype = Annotated[str, flag("NAME", "float32, bfloat16 or auto.", HARDWARE)]
ForwardTokens = Annotated[int, flag("N", "Tokens that go through the model together.", HARDWARE, above=0)]

# What is written.
Track = Annotated[
    bool, switch("Log each step to NAME.track.jsonl beside the target, and in trackio where it is installed.", OUTPUT)
]
OutputElsewhere = Annotated[Path | None, output("DIR", "Write the result here and leave the model as it is.")]
Overwrite = Annotated[bool, switch("Replace the target if it exists.", OUTPUT)]
DryRun = Annotated[bool, switch("Check everything, say what would be done, write nothing.", OUTPUT)]
TrustCache = Annotated[bool, switch("Skip re-hashing files that did not change since the last check.", OUTPUT)]
