"""What workers are told to import: the engine that a test names in its environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .jobs import Trace, register
from .kinds import Place, kind_named

_place = Place(os.environ["ENGINE_URL"], json.loads(os.environ["ENGINE_SETTINGS"]))
engine = kind_named(os.environ["ENGINE_KIND"]).engine_at(_place)
register(engine, Trace(Path(os.environ["ENGINE_TRACE"])))
