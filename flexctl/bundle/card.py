"""Model cards with the Hub's front matter; their texts are in templates/.

A merged model's is part of it: a pure function of its manifest, digest and hashes aside. So a change of its text is a
new schema version. An anchor's and an expert's are made when they are published.
"""

from __future__ import annotations

import hashlib
import json

from flexctl.bundle.codec import canonical_json, encode
from flexctl.bundle.manifest import (
    OTHER_LICENSE,
    AnchorManifest,
    ExpertEntry,
    ExpertManifest,
    MergedManifest,
    PrivacyInfo,
)
from flexctl.families import family_of
from flexctl.shipped import template

__all__ = ["anchor_card", "expert_card", "is_hub_license", "merged_card"]

# https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses a card with another id.
_HUB_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql
    unlicense wtfpl zlib
"""


def merged_card(manifest: MergedManifest) -> str:
    """Return README.md of a merged model, with the Hub's front matter.

    Args:
        manifest: The model's; its digest, files and tensors are not looked at, as the card is one of those files.
    """
    names = [entry.name for entry in manifest.experts[1:]]
    moe_type = family_of(manifest.anchor.model_type).moe_type
    count = len(manifest.experts)
    each = manifest.license == OTHER_LICENSE
    return template("merged-card.md").format(
        license=_license(manifest.license, "see-experts"),
        base_model="\n".join(f"- {json.dumps(name)}" for name in [manifest.anchor.name, *names]),
        moe_type=moe_type,
        title=f"{manifest.anchor.name} with {', '.join(names)}" if names else f"{manifest.anchor.name} alone",
        anchor=f"`{manifest.anchor.name}` (`{manifest.anchor.digest}`)",
        rows="\n".join(_row(entry) for entry in manifest.experts),
        top_k=min(manifest.num_experts_per_tok_requested, count),
        count=count,
        license_text="that of each expert, as listed" if each else _plain(manifest.license),
        contacts=_contacts(manifest),
        removed=_removed(manifest),
        statement=_statement(manifest),
    )


def anchor_card(manifest: AnchorManifest, repository: str, base_model: str | None) -> str:
    """Return README.md of an anchor on the Hub.

    Args:
        manifest: The anchor's.
        repository: Where it goes, ``owner/name``.
        base_model: The model on the Hub that it was made from, if there is one.
    """
    sizes = manifest.architecture
    return template("anchor-card.md" if manifest.is_calibrated else "adopted-card.md").format(
        license=_license(manifest.license, "unknown"),
        base_model=f"base_model: {json.dumps(base_model)}\n" if base_model else "",
        model_type=manifest.model_type,
        name=manifest.name,
        digest=manifest.digest,
        sizes=f"{sizes.num_hidden_layers} layers of {sizes.hidden_size}, vocabulary {sizes.vocab_size}, {sizes.dtype}",
        license_text=_plain(manifest.license or "unknown"),
        repository=repository,
    )


def expert_card(manifest: ExpertManifest, repository: str, base_model: str | None) -> str:
    """Return README.md of an expert on the Hub. What the owner did not say is not made up.

    Args:
        manifest: The expert's.
        repository: Where it goes, ``owner/name``.
        base_model: Its anchor on the Hub; its anchor's name if None.
    """
    data, anchor = manifest.data, manifest.anchor
    counts = ((data.documents, "documents"), (data.tokens, "tokens"), (data.bytes, "bytes"))
    rows = {
        "digest": f"`{manifest.digest}`",
        "anchor": f"`{anchor.digest}`",
        "data": data.label or "not described",
        "amount": ", ".join(f"{count:,} {unit}" for count, unit in counts if count is not None) or "not told",
        "license": data.license or "unknown",
        "purposes": ", ".join(data.purposes) or "not restricted",
        "rights end": data.expires or "never",
        "privacy": _privacy(manifest.privacy),
        "contact": data.contact or "not given",
    }
    return template("expert-card.md").format(
        license=_license(data.license, "unknown"),
        base_model=f"base_model: {json.dumps(base_model or anchor.name)}\n",
        name=manifest.name,
        anchor=f"`{base_model or anchor.name}`",
        rows="\n".join(f"| {field} | {_plain(value)} |" for field, value in rows.items()),
        repository=repository,
    )


def is_hub_license(license: str | None) -> bool:
    """Return whether the Hub has an id for a license."""
    return license is not None and license.lower() in _HUB_LICENSES.split()


def _license(license: str | None, unnamed: str) -> str:
    """Return the front matter's lines on a license: the Hub's id, else ``other`` with a name and a link.

    Args:
        license: SPDX id or text; None and ``other`` have no name of their own.
        unnamed: What such a one is called.
    """
    if license is not None and is_hub_license(license):
        return f"license: {license.lower()}"
    # In quotes, as an owner's words might mean something in YAML.
    name = unnamed if license in (None, OTHER_LICENSE) else json.dumps(license)
    return f"license: {OTHER_LICENSE}\nlicense_name: {name}\nlicense_link: README.md"


def _privacy(privacy: PrivacyInfo | None) -> str:
    return "none" if privacy is None else f"epsilon {privacy.epsilon}, delta {privacy.delta}"


def _statement(manifest: MergedManifest) -> str:
    """Return the hash of what the digest would not bind by itself; the card carries it, and the digest the card."""
    said = {name: item for name, item in encode(manifest).items() if name not in ("digest", "files", "tensors")}
    return hashlib.sha256(canonical_json(said)).hexdigest()


def _row(entry: ExpertEntry) -> str:
    cells = (
        str(entry.index),
        entry.name,
        entry.license or "unknown",
        ", ".join(entry.purposes) or "not restricted",
        entry.expires or "never",
        _privacy(entry.privacy),
        f"`{entry.digest}`",
    )
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Return an owner's words as one cell: on one line, without what Markdown or HTML would act on."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _contacts(manifest: MergedManifest) -> str:
    lines = [f"- {entry.name}: {_plain(entry.contact)}" for entry in manifest.experts if entry.contact]
    return "\n## Whom to ask\n\n" + "\n".join(lines) + "\n" if lines else ""


def _removed(manifest: MergedManifest) -> str:
    lines = [f"- {stone.name} (`{stone.digest}`)" for stone in manifest.removed]
    return "\n## Removed\n\n" + "\n".join(lines) + "\n" if lines else ""
