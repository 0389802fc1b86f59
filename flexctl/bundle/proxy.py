"""Proxy lists: which public documents an owner's text is most like, as their numbers and hashes alone."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexctl.bundle.codec import canonical_json, decode, digest_of_rest, encode, parse_json, read_bytes
from flexctl.bundle.manifest import SCHEMA_VERSION, AnchorRef
from flexctl.bundle.names import check_expert_name, shown
from flexctl.bundle.store import new_file
from flexctl.errors import BundleError, UsageError

__all__ = ["Proxy", "ProxyDocument", "PublicText", "open_proxy", "write_proxy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyDocument:
    """One public document: its number in reading order from 0, and the first 16 hex digits of its tokens' SHA-256."""

    index: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicText:
    """The public text that the numbers count in: bare hex SHA-256 of its documents' hashes, and how many there are."""

    sha256: str
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """A proxy list, field by field as docs/format.md has it.

    Attributes:
        name: The expert's.
        digest: Of the canonical JSON of all other fields.
        anchor: Whose tokens the documents are hashed in.
        public: The text that they are from.
        encoder: Name of the sentence encoder that told them apart; None is the anchor's own router inputs.
        documents: By index. Their order says nothing else, and there are no scores.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str = "proxy"
    name: str
    digest: str
    anchor: AnchorRef
    public: PublicText
    encoder: str | None
    documents: tuple[ProxyDocument, ...]


def open_proxy(path: Path) -> Proxy:
    """Return the proxy list in a file, every field checked and the digest recomputed.

    Raises:
        UsageError: There is no such file.
        BundleError: It is no proxy list, or was changed.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="flexctl select-proxy makes one")
    data = read_bytes(path).removeprefix(BOM_UTF8)
    value = parse_json(data, str(path))
    if not isinstance(value, dict) or value.get("kind") != "proxy":
        raise BundleError(f"{path}: is no proxy list", hint="flexctl select-proxy makes one")
    if value.get("schema_version") != SCHEMA_VERSION:
        found = shown(value.get("schema_version"))
        raise BundleError(f"{path}: schema_version is {found}; this flexctl reads {SCHEMA_VERSION}")
    proxy: Proxy = decode(Proxy, value, str(path))
    check_expert_name(proxy.name, f"{path}: name")
    if canonical_json(value) != data:
        raise BundleError(f"{path}: is not canonical JSON (sorted keys, no spaces)")
    if digest_of_rest(proxy) != proxy.digest:
        raise BundleError(
            f"{path}: digest is {shown(proxy.digest)}, but its content has another", hint="fetch it again"
        )
    indices = [document.index for document in proxy.documents]
    if indices != sorted(set(indices)) or any(not 0 <= index < proxy.public.documents for index in indices):
        raise BundleError(f"{path}: documents: expected each once, by index, below {proxy.public.documents}")
    return proxy


def write_proxy(
    path: Path,
    *,
    name: str,
    anchor: AnchorRef,
    public: PublicText,
    encoder: str | None,
    documents: Sequence[ProxyDocument],
    overwrite: bool,
) -> Proxy:
    """Write a proxy list and return it as read back; documents go by their index, whatever order they come in.

    Raises:
        UsageError: The target exists and may not be replaced.
    """
    ordered = tuple(sorted(documents, key=lambda document: document.index))
    proxy = Proxy(name=name, digest="", anchor=anchor, public=public, encoder=encoder, documents=ordered)
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(canonical_json(encode(replace(proxy, digest=digest_of_rest(proxy)))))
        open_proxy(temporary)
    return open_proxy(path)
