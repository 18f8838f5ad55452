"""Sinks for what happens to tasks, one to a module; the core imports none of them."""

from __future__ import annotations
