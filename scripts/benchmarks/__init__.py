"""What ``scripts/bench`` measures, and how."""

from __future__ import annotations
