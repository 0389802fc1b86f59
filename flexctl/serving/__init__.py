"""Serving one model to many: the scheduler, who may be used, the protocol, the web application."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "app": ("make_app",),
    "asking": ("Service",),
    "batching": ("Batcher",),
    "jobs": ("Ask", "Busy", "Done", "Event", "Failed", "Job", "Prompt", "Token"),
    "listening": ("bind", "listener"),
    "metrics": ("Metrics",),
    "permits": ("Permits", "read_keys"),
    "hosts": ("LOCAL_NAMES",),
    "replies": ("Account",),
    "requirements": ("require_server",),
    "sampling": ("Sampling",),
    "stopping": ("Stops",),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
