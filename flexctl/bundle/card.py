"""The model card of a merged model: a pure function of its manifest, digest and hashes aside."""

from __future__ import annotations

import hashlib
import json

from flexctl.bundle.codec import canonical_json, encode
from flexctl.bundle.manifest import OTHER_LICENSE, ExpertEntry, MergedManifest
from flexctl.families import family_of

__all__ = ["merged_card"]

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{license}
base_model:
{base_model}
base_model_relation: merge
tags:
- moe
- {moe_type}
- flexctl
---

# {title}

A mixture-of-experts language model of type `{moe_type}`, merged by flexctl from experts that were trained apart from
each other against the same anchor, {anchor}.
Nothing was trained after the merge, and every expert can be taken out again exactly.

## Who is inside

| index | expert | license | purposes | rights end | privacy | digest |
|---|---|---|---|---|---|---|
{rows}

{top_k} of {count} experts work on each token. License: {license_text}.
{removed}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```

`flexctl verify DIRECTORY` hashes every byte again. `flexctl remove NAME --from DIRECTORY -o NEW` takes one out.

Statement: `{statement}` (SHA-256 of flexctl.json without digest, files and tensors)
"""


def merged_card(manifest: MergedManifest) -> str:
    """Return README.md of a merged model, with the Hub's front matter.

    Args:
        manifest: The model's; its digest, files and tensors are not looked at, as the card is one of those files.
    """
    names = [entry.name for entry in manifest.experts[1:]]
    moe_type = family_of(manifest.anchor.model_type).moe_type
    count = len(manifest.experts)
    other = "other\nlicense_name: see-experts\nlicense_link: README.md"
    return _CARD.format(
        license="license: " + (other if manifest.license == OTHER_LICENSE else manifest.license.lower()),
        base_model="\n".join(f"- {json.dumps(name)}" for name in [manifest.anchor.name, *names]),
        moe_type=moe_type,
        title=f"{manifest.anchor.name} with {', '.join(names)}" if names else f"{manifest.anchor.name} alone",
        anchor=f"`{manifest.anchor.name}` (`{manifest.anchor.digest}`)",
        rows="\n".join(_row(entry) for entry in manifest.experts),
        top_k=min(manifest.num_experts_per_tok_requested, count),
        count=count,
        license_text="that of each expert, as listed" if manifest.license == OTHER_LICENSE else manifest.license,
        removed=_removed(manifest),
        statement=_statement(manifest),
    )


def _statement(manifest: MergedManifest) -> str:
    """Return the hash of what the digest would not bind by itself; the card carries it, and the digest the card."""
    said = {name: item for name, item in encode(manifest).items() if name not in ("digest", "files", "tensors")}
    return hashlib.sha256(canonical_json(said)).hexdigest()


def _row(entry: ExpertEntry) -> str:
    privacy = "none" if entry.privacy is None else f"epsilon {entry.privacy.epsilon}, delta {entry.privacy.delta}"
    cells = (
        str(entry.index),
        entry.name,
        entry.license or "unknown",
        ", ".join(entry.purposes) or "not restricted",
        entry.expires or "never",
        privacy,
        f"`{entry.digest}`",
    )
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return an owner's words as one cell: on one line, without what Markdown or HTML would act on."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _removed(manifest: MergedManifest) -> str:
    lines = [f"- {stone.name} (`{stone.digest}`)" for stone in manifest.removed]
    return "\n## Removed\n\n" + "\n".join(lines) + "\n" if lines else ""
