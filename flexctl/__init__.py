"""flexctl: the life of an expert in FlexOlmo-style language models.

Every command of the command line is one function here, with one Config and one Result:

    >>> import flexctl
    >>> result = flexctl.merge(flexctl.MergeConfig(experts=(Path("law.st"),), output=Path("merged")))
    >>> result.digest

Everything is imported on first use, so that ``import flexctl`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexctl.engine.compress import CompressConfig, CompressResult, compress
    from flexctl.engine.demo import DemoConfig, DemoResult, demo
    from flexctl.engine.embed_router import EmbedRouterConfig, EmbedRouterResult, embed_router
    from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
    from flexctl.engine.generate import GenerateConfig, GenerateResult, generate
    from flexctl.engine.import_expert import ImportExpertConfig, ImportExpertResult, import_expert
    from flexctl.engine.init_anchor import InitAnchorConfig, InitAnchorResult, init_anchor
    from flexctl.engine.inspect import InspectConfig, InspectResult, inspect
    from flexctl.engine.list import ListConfig, ListResult, list
    from flexctl.engine.merge import MergeConfig, MergeResult, merge
    from flexctl.engine.pull import PullConfig, PullResult, pull
    from flexctl.engine.push import PushConfig, PushResult, push
    from flexctl.engine.remove import RemoveConfig, RemoveResult, remove
    from flexctl.engine.replace import ReplaceConfig, ReplaceResult, replace
    from flexctl.engine.select_proxy import SelectProxyConfig, SelectProxyResult, select_proxy
    from flexctl.engine.train_expert import TrainExpertConfig, TrainExpertResult, train_expert
    from flexctl.engine.tune_router import TuneRouterConfig, TuneRouterResult, tune_router
    from flexctl.engine.verify import VerifyConfig, VerifyResult, verify
    from flexctl.errors import BundleError, FlexctlError, Interrupted, UsageError
    from flexctl.runtime import SILENT, Progress, Reporter
    from flexctl.workspace import Workspace

_NAMES = {
    "errors": ("BundleError", "FlexctlError", "Interrupted", "UsageError"),
    "runtime": ("SILENT", "Progress", "Reporter"),
    "workspace": ("Workspace",),
    "engine.compress": ("CompressConfig", "CompressResult", "compress"),
    "engine.demo": ("DemoConfig", "DemoResult", "demo"),
    "engine.embed_router": ("EmbedRouterConfig", "EmbedRouterResult", "embed_router"),
    "engine.evaluate": ("EvaluateConfig", "EvaluateResult", "evaluate"),
    "engine.generate": ("GenerateConfig", "GenerateResult", "generate"),
    "engine.import_expert": ("ImportExpertConfig", "ImportExpertResult", "import_expert"),
    "engine.init_anchor": ("InitAnchorConfig", "InitAnchorResult", "init_anchor"),
    "engine.inspect": ("InspectConfig", "InspectResult", "inspect"),
    "engine.list": ("ListConfig", "ListResult", "list"),
    "engine.merge": ("MergeConfig", "MergeResult", "merge"),
    "engine.pull": ("PullConfig", "PullResult", "pull"),
    "engine.push": ("PushConfig", "PushResult", "push"),
    "engine.remove": ("RemoveConfig", "RemoveResult", "remove"),
    "engine.replace": ("ReplaceConfig", "ReplaceResult", "replace"),
    "engine.select_proxy": ("SelectProxyConfig", "SelectProxyResult", "select_proxy"),
    "engine.train_expert": ("TrainExpertConfig", "TrainExpertResult", "train_expert"),
    "engine.tune_router": ("TuneRouterConfig", "TuneRouterResult", "tune_router"),
    "engine.verify": ("VerifyConfig", "VerifyResult", "verify"),
}
_MODULE_OF = {name: f"flexctl.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "BundleError",
    "CompressConfig",
    "CompressResult",
    "DemoConfig",
    "DemoResult",
    "EmbedRouterConfig",
    "EmbedRouterResult",
    "EvaluateConfig",
    "EvaluateResult",
    "FlexctlError",
    "GenerateConfig",
    "GenerateResult",
    "ImportExpertConfig",
    "ImportExpertResult",
    "InitAnchorConfig",
    "InitAnchorResult",
    "InspectConfig",
    "InspectResult",
    "Interrupted",
    "ListConfig",
    "ListResult",
    "MergeConfig",
    "MergeResult",
    "Progress",
    "PullConfig",
    "PullResult",
    "PushConfig",
    "PushResult",
    "RemoveConfig",
    "RemoveResult",
    "ReplaceConfig",
    "ReplaceResult",
    "Reporter",
    "SILENT",
    "SelectProxyConfig",
    "SelectProxyResult",
    "TrainExpertConfig",
    "TrainExpertResult",
    "TuneRouterConfig",
    "TuneRouterResult",
    "UsageError",
    "VerifyConfig",
    "VerifyResult",
    "Workspace",
    "__version__",
    "compress",
    "demo",
    "embed_router",
    "evaluate",
    "generate",
    "import_expert",
    "init_anchor",
    "inspect",
    "list",
    "merge",
    "pull",
    "push",
    "remove",
    "replace",
    "select_proxy",
    "train_expert",
    "tune_router",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flexctl")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flexctl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
