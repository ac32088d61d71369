"""Small real models that gymtrl can make without a download."""

from __future__ import annotations

from gymtrl.models.smollm2 import make_smollm2

__all__ = ["make_smollm2"]
