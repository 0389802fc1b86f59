"""The Hugging Face Hub: the one part that talks to it.

A bundle there is named ``hf://OWNER/NAME[@REVISION][/FILE.st]``; a repository holds one bundle. What comes from there
is listed first, and refused where it holds anything but a bundle's data files; nothing of it is ever run. Everything
goes through huggingface_hub, which finds the token itself (HF_TOKEN, or what ``hf auth login`` stored) and keeps what
it fetched in its cache. Text is ``hf://datasets/OWNER/NAME`` and is read from the Hub while it is used.
"""

from __future__ import annotations

from flexctl.hub.address import Address, DataAddress, is_remote, parse, parse_data
from flexctl.hub.data import DataFile, data_files
from flexctl.hub.remote import IGNORED, BundleFile, Remote, look, manifest_of
from flexctl.hub.transfer import earlier_manifests, fetch, fetch_checkpoint, fetch_config, prepare, send

__all__ = [
    "IGNORED",
    "Address",
    "BundleFile",
    "DataAddress",
    "DataFile",
    "Remote",
    "data_files",
    "earlier_manifests",
    "fetch",
    "fetch_checkpoint",
    "fetch_config",
    "is_remote",
    "look",
    "manifest_of",
    "parse",
    "parse_data",
    "prepare",
    "send",
]
