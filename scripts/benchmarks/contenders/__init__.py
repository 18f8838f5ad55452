"""How each contender is used: one module for each way in which a user writes it."""

from __future__ import annotations
