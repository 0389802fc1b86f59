"""Text from files and data sets: read, tokenised, framed, sampled."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "canaries": ("CanaryFolder", "hand_over", "plant_canaries"),
    "corpus": ("Corpus", "prepare_corpus", "split_of"),
    "decontamination": ("Decontamination",),
    "documents": (
        "Record",
        "pinned",
        "read_documents",
        "read_records",
        "refuse_among",
        "refuse_unreadable",
        "sample_documents",
        "sample_halves",
        "sample_passages",
        "size_bytes",
        "source_name",
    ),
    "dress": ("as_code",),
    "found_text": ("DOMAINS", "write_domain"),
    "inventory": ("COUNTS", "Inventory", "Pace", "Stocktaking", "take_inventory", "text_digest"),
    "near_duplicates": ("NearDuplicates", "require_datasketch"),
    "sample": ("PublicSample", "Sampler", "draw_sample", "leading"),
    "tokenizer": ("refuse_other_tokenizer", "refuse_tokens_beyond", "train_tokenizer"),
    "tokens": ("Framed", "TokenStream", "frame_documents", "frame_passages", "pack"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
