"""The format: anchors, experts, router files and merged models on disk. Bytes and numpy; imports no torch."""

from __future__ import annotations

from flexctl.bundle.anchor import Anchor, open_anchor, write_anchor
from flexctl.bundle.expert import Expert, open_expert, pair_weights, reroute_expert, weights_beside, write_expert
from flexctl.bundle.fine_tuned import compare_dense, open_dense
from flexctl.bundle.manifest import DataInfo, PrivacyInfo, RouterInfo
from flexctl.bundle.merged import Merged, open_merged
from flexctl.bundle.names import PUBLIC, slug
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.rights import Rights, forbidden, rights_of
from flexctl.bundle.router import RouterFile, open_router_file, write_router_file
from flexctl.bundle.selection import Selection, left_out_of, model_name, select
from flexctl.bundle.stock import (
    dense_tensors,
    head_differs,
    left_out,
    named_code,
    read_checkpoint,
    read_dense_config,
    unread_weights,
)
from flexctl.bundle.tensors import RawTensor, TensorType, check_agreement
from flexctl.bundle.weights import Weights

__all__ = [
    "PUBLIC",
    "Anchor",
    "DataInfo",
    "Expert",
    "Merged",
    "PrivacyInfo",
    "RawTensor",
    "Rights",
    "RouterFile",
    "RouterInfo",
    "Selection",
    "TensorType",
    "Weights",
    "check_agreement",
    "compare_dense",
    "dense_tensors",
    "forbidden",
    "head_differs",
    "left_out",
    "left_out_of",
    "model_name",
    "named_code",
    "open_anchor",
    "open_bundle",
    "open_dense",
    "open_expert",
    "open_merged",
    "open_router_file",
    "pair_weights",
    "read_checkpoint",
    "read_dense_config",
    "reroute_expert",
    "rights_of",
    "select",
    "slug",
    "unread_weights",
    "weights_beside",
    "write_anchor",
    "write_expert",
    "write_router_file",
]
