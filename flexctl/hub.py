"""The Hugging Face Hub: the one module that talks to it."""

from __future__ import annotations

from pathlib import Path

from flexctl.errors import FlexctlError, UsageError

__all__ = ["fetch_checkpoint"]

_CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def fetch_checkpoint(repository: str) -> Path:
    """Return a local directory with the checkpoint of a Hub repository; nothing but data files is fetched.

    Args:
        repository: ``owner/name``.

    Raises:
        UsageError: There is neither such a directory nor such a repository.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_CHECKPOINT_FILES)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UsageError(
            f"SOURCE: {repository!r} is neither a directory nor a repository on the Hub",
            hint="give a local checkpoint directory, or owner/name",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FlexctlError(f"SOURCE: {repository!r} could not be fetched from the Hub: {reason}") from error
