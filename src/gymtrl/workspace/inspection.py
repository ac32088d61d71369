"""Inspecting rollout files, and the rollout table on the way."""

from __future__ import annotations
