"""A light OpenAI-compatible endpoint over a transformers model, for machines without a GPU server.

`python -m gymtrl.serving MODEL --port N` serves a checkpoint; `Engine` generates in the same process without HTTP.
The names below are looked up on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymtrl.serving.app import create_app
    from gymtrl.serving.engine import Engine
    from gymtrl.serving.request import GenerationRequest, GenerationResult
    from gymtrl.serving.sampling import Sampling
    from gymtrl.serving.server import load_model, serve

__all__ = [
    "Engine",
    "GenerationRequest",
    "GenerationResult",
    "Sampling",
    "create_app",
    "load_model",
    "serve",
]

_HOMES = {
    "Engine": "engine",
    "GenerationRequest": "request",
    "GenerationResult": "request",
    "Sampling": "sampling",
    "create_app": "app",
    "load_model": "server",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
