"""What a repository holds, told without fetching it."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.headers import MAX_HEADER_BYTES, PAGE_BYTES
from flexctl.bundle.manifest import MANIFEST_FILE, TOLERATED, AnchorManifest, Manifest, MergedManifest
from flexctl.bundle.merged import CARD_FILE
from flexctl.bundle.names import check_file_name
from flexctl.bundle.opening import read_manifest_of
from flexctl.errors import BundleError, UsageError
from flexctl.hub.address import Address, DataAddress
from flexctl.hub.refusals import explained

__all__ = ["IGNORED", "BundleFile", "Remote", "look", "manifest_of", "read_range"]

IGNORED = (".gitattributes", "run.json")
"""Files beside a bundle that are neither sent nor brought back: the Hub's own, and one machine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A repository at one commit.

    Attributes:
        address: As it was asked for.
        commit: Which commit that is.
        sizes: File -> bytes, for every file.
        folder: Where it lies in the cache, when it was looked up there because HF_HUB_OFFLINE is set.
    """

    address: Address
    commit: str
    sizes: Mapping[str, int]
    folder: Path | None = None

    @property
    def file(self) -> str | None:
        """The expert's file that is meant; None where the repository is a directory bundle.

        Raises:
            BundleError: There is no bundle, or there are several experts and none was named.
        """
        experts = [name for name in self.sizes if name.endswith(".st")]
        if self.address.file is not None:
            if self.address.file not in experts:
                raise UsageError(f"{self.address}: no such file")
            return self.address.file
        if MANIFEST_FILE in self.sizes:
            return None
        if not experts:
            raise BundleError(f"{self.address}: holds no bundle: neither {MANIFEST_FILE} nor an expert's .st file")
        if len(experts) > 1:
            raise BundleError(f"{self.address}: holds {len(experts)} experts", hint=f"name one: {self.address}/NAME.st")
        return experts[0]

    @property
    def signature(self) -> str | None:
        """The signature beside the expert's file that is meant; None where there is none."""
        name = f"{self.file}.sig"
        return name if name in self.sizes else None


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleFile:
    """A file of a repository, and its size."""

    name: str
    size_bytes: int


def look(address: Address) -> Remote:
    """Return what a repository holds; with HF_HUB_OFFLINE, what the cache has of it.

    Raises:
        UsageError: There is no such repository or revision, or the token may not see it.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    with explained(address):
        try:
            info = HfApi().model_info(address.repository, revision=address.revision, files_metadata=True)
        except OfflineModeIsEnabled:
            folder = Path(
                snapshot_download(
                    address.repository,
                    revision=address.revision,
                    local_files_only=True,
                    allow_patterns=address.file and [address.file],
                )
            )
            sizes = {item.name: item.stat().st_size for item in folder.iterdir()}
            return Remote(address=address, commit=folder.name, sizes=sizes, folder=folder)
        commit = str(info.sha)
        sizes = {
            sibling.rfilename: _asked_size(address, commit, sibling.rfilename) if sibling.size is None else sibling.size
            for sibling in info.siblings or ()
        }
    return Remote(address=address, commit=commit, sizes=sizes)


def _asked_size(address: Address, commit: str, name: str) -> int:
    """Return a file's size by asking for the file itself: some mirrors give none in their list."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(address.repository, name, revision=commit)).size or 0


def manifest_of(remote: Remote) -> Manifest:
    """Return what a repository's bundle says about itself, for a few kB of network whatever the bundle's size.

    Raises:
        BundleError: There is no bundle, its manifest is not valid, or there are files that are no part of it.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    with _glimpse(remote) as path:
        try:
            manifest = read_manifest_of(path)
        except BundleError as error:
            raise BundleError(error.message.replace(str(path), str(remote.address)), error.hint) from error
    _refuse_unknown(remote, manifest)
    return manifest


def _refuse_unknown(remote: Remote, manifest: Manifest) -> None:
    """Refuse files that are no part of the bundle: code, pickles, folders."""
    known = [CARD_FILE, *TOLERATED]
    if isinstance(manifest, (AnchorManifest, MergedManifest)):
        known += [MANIFEST_FILE, *manifest.files]
        known += ["*.safetensors", "*.index.json"] if isinstance(manifest, AnchorManifest) else []
    else:
        known.append("*.st")
    for name in sorted(set(remote.sizes) - set(IGNORED)):
        check_file_name(name, str(remote.address))
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known):
            raise BundleError(f"{remote.address}: {name} is no part of the bundle", hint="nothing of it was used")


@contextmanager
def _glimpse(remote: Remote) -> Iterator[Path]:
    """Give a stand-in for a bundle: manifest and header are real, every other byte is a hole."""
    file = remote.file
    if remote.folder is not None:
        yield remote.folder / (file or "")
        return
    with tempfile.TemporaryDirectory(prefix="flexctl-") as temporary:
        place = Path(temporary) / (file or MANIFEST_FILE)
        place.write_bytes(_read(remote, place.name, MAX_HEADER_BYTES) if file is None else _read_head(remote, file))
        with place.open("r+b") as target:
            target.truncate(remote.sizes[place.name])
        yield place if file else place.parent


def _read(remote: Remote, name: str, stop: int) -> bytes:
    """Return the first ``stop`` bytes of a file, or all of it if it has fewer."""
    from huggingface_hub import hf_hub_url

    wanted = min(stop, remote.sizes[name])
    url = hf_hub_url(remote.address.repository, name, revision=remote.commit)
    return read_range(remote.address, url, 0, wanted) if wanted else b""


def read_range(address: Address | DataAddress, url: str, start: int, stop: int) -> bytes:
    """Return a file's bytes from ``start`` to before ``stop``.

    Args:
        address: For errors.
        url: Where the file is.
        start: First byte.
        stop: Above ``start``, and not beyond the file's end.

    Raises:
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

    # Without compression, as a part of a compressed stream is of no use.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with explained(address):
        response = http_backoff("GET", url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        skipped = start if response.status_code == 200 else 0  # a server may send all of the file
        data = bytes(response.content[skipped : skipped + stop - start])
        if len(data) != stop - start:
            raise ConnectionError(f"{len(data)} of {stop - start} bytes came")
    return data


def _read_head(remote: Remote, name: str) -> bytes:
    """Return a safetensors file up to its tensors; what a header claims beyond the limits is left to its reader."""
    start = _read(remote, name, PAGE_BYTES)
    needed = 8 + int.from_bytes(start[:8], "little")
    if needed <= len(start) or needed > min(8 + MAX_HEADER_BYTES, remote.sizes[name]):
        return start
    return _read(remote, name, needed)
