"""Fetching from the Hub into its cache, and sending to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexctl.bundle.manifest import MANIFEST_FILE, Manifest
from flexctl.bundle.stock import STOCK_FILES, WEIGHT_FILES
from flexctl.bundle.validation import read_manifest
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.hub.address import Address, parse
from flexctl.hub.refusals import explained
from flexctl.hub.remote import IGNORED, Remote, look
from flexctl.runtime import SILENT, Progress, Reporter

__all__ = ["earlier_manifests", "fetch", "fetch_checkpoint", "fetch_config", "prepare", "send", "quiet_hub"]

_ALONE_BYTES = 100_000
_EARLIER_COMMITS = 50


def fetch(remote: Remote, reporter: Reporter = SILENT) -> Path:
    """Return a bundle's files in the cache, after fetching what is not there yet; goes on where it broke off.

    Args:
        remote: A repository that ``manifest_of`` found in order.
        reporter: Where progress goes.

    Returns:
        The directory of a directory bundle, the file of an expert.

    Raises:
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download

    folder, address = remote.folder, remote.address
    if folder is None:
        beside = [remote.signature] if remote.signature else []
        names = [address.file, *beside] if address.file else sorted(remote.sizes)
        total = sum(remote.sizes[name] for name in names)
        with reporter.progress(f"fetching {address}", total, "bytes") as progress, explained(address), quiet_hub():
            count = _Count(progress)
            folder = Path(
                snapshot_download(
                    address.repository,
                    revision=address.revision,
                    allow_patterns=names,
                    tqdm_class=_bar_class(count),
                )
            )
            count.advance(total - count.done)
    if folder.name != remote.commit:
        raise FlexctlError(f"{address}: was changed while it was being fetched", hint="run the command again")
    return folder / (remote.file or "")


def prepare(address: Address, *, private: bool) -> Remote:
    """Return the branch to send to, after making it, and its repository, where they are not there yet.

    Args:
        address: Repository and branch.
        private: Make a new repository private; refuse a public one.

    Raises:
        UsageError: It shall be private and is public.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api, repository = HfApi(), address.repository
    try:
        head = look(address)
    except UsageError as error:
        if not isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise
        with explained(address):
            api.create_repo(repository, private=private or None, exist_ok=True)
            if address.revision:
                api.create_branch(repository, branch=address.revision, exist_ok=True)
        head = look(address)
    with explained(address):
        is_public = private and not api.model_info(repository).private
    if is_public:
        raise UsageError(f"{repository}: is public; `private` asks for a private repository")
    return head


def earlier_manifests(head: Remote) -> Iterator[Manifest]:
    """Yield the manifests of directory bundles that earlier commits of a branch hold, the newest first.

    What is no manifest is passed over. At most 50 commits are looked at, each but once on a machine: they are cached.

    Raises:
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    address = head.address
    with explained(address), quiet_hub():
        commits = HfApi().list_repo_commits(address.repository, revision=address.revision)
        for commit in commits[1 : 1 + _EARLIER_COMMITS]:
            try:
                file = Path(hf_hub_download(address.repository, MANIFEST_FILE, revision=commit.commit_id))
                yield read_manifest(file.read_bytes(), str(address))
            except (EntryNotFoundError, BundleError):
                continue


def send(head: Remote, files: Mapping[str, Path | bytes], *, message: str, reporter: Reporter = SILENT) -> str:
    """Make a branch hold these files and no others, in one commit after everything is up.

    What was uploaded before an interruption is not sent again.

    Args:
        head: What ``prepare`` returned.
        files: Name there -> what to send.
        message: Of the commit.
        reporter: Where progress goes.

    Returns:
        The commit.

    Raises:
        FlexctlError: The Hub cannot be reached, or refuses, or the branch has moved meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, address = HfApi(), head.address
    additions = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
    sizes = [addition.upload_info.size for addition in additions]
    with (
        reporter.progress(f"sending to {address.repository}", sum(sizes), "bytes") as progress,
        explained(address),
        quiet_hub(),
    ):
        count = _Count(progress)
        for addition, size in zip(additions, sizes, strict=True):
            # One by one, so that progress is known; the small ones go with the commit and cost no requests.
            if size >= _ALONE_BYTES:
                api.preupload_lfs_files(address.repository, [addition], revision=address.revision, free_memory=False)
                count.advance(size)
        stale = set(head.sizes) - set(files) - set(IGNORED)
        commit = api.create_commit(
            address.repository,
            [*additions, *(CommitOperationDelete(name) for name in sorted(stale))],
            commit_message=message,
            revision=address.revision,
            parent_commit=head.commit,
        )
        count.advance(sum(sizes) - count.done)
    return str(commit.oid)


def fetch_checkpoint(repository: str) -> Path:
    """Return a local directory with the checkpoint of a Hub repository; nothing but data files is fetched.

    Args:
        repository: ``owner/name``, also as ``hf://owner/name@revision``.

    Raises:
        UsageError: There is neither such a directory nor such a repository.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download

    try:
        address = parse(repository)
        with explained(address), quiet_hub():
            return Path(
                snapshot_download(
                    address.repository, revision=address.revision, allow_patterns=[*STOCK_FILES, *WEIGHT_FILES]
                )
            )
    except UsageError as error:
        raise UsageError(
            f"{repository!r} is neither a directory nor a repository on the Hub that is open to you",
            hint="give a local checkpoint directory, or owner/name",
        ) from error


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from drawing its own progress and from warning of what is well."""
    from huggingface_hub import utils

    shown, verbosity = not utils.are_progress_bars_disabled(), utils.logging.get_verbosity()  # type: ignore[attr-defined]
    if shown:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if shown:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


class _Count:
    """Progress that several threads may advance."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.done = 0.0

    def advance(self, amount: float) -> None:
        with self._lock:
            self.done += amount
            self._progress.advance(amount)


def _bar_class(count: _Count) -> Any:
    """Return a bar for huggingface_hub that shows nothing and counts the bytes that reach the disk."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):  # type: ignore[type-arg, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Newer versions have a second bar of bytes, for what came over the network.
            network = str(kwargs.get("name", "")).endswith(".transfer")
            self._counts = kwargs.get("unit") == "B" and not network
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                count.advance(n)
            return None

    return Bar


def fetch_config(path: Path) -> Path:
    """Return a local directory with the config.json of a repository, an anchor's or a checkpoint's; nothing else comes.

    Args:
        path: Its address.

    Raises:
        UsageError: There is no such repository.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download

    address = parse(path)
    with explained(address), quiet_hub():
        return Path(snapshot_download(address.repository, revision=address.revision, allow_patterns=["config.json"]))
