"""How Sphinx builds the documentation."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from typing import ParamSpec, TypeVar

from sphinx.pycode import ModuleAnalyzer

import fastapi_tasks
import fastapi_tasks.engines
import fastapi_tasks.testing

project = "fastapi-tasks"
author = "the fastapi-tasks authors"
copyright = f"2026, {author}"
release = version = installed_version(project)

extensions = ["sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"

# Every name of ours must resolve; to resolve those of others would take the network.
nitpick_ignore_regex = [
    (
        "py:.+",
        r"(anyio|asyncio|collections|contextlib|contextvars|datetime|fastapi|opentelemetry|pydantic|starlette|trio|types|typing)\..+",
    ),
]
# The second one is in the alias of an error handler, which Sphinx takes apart for engines.
nitpick_ignore = [("py:class", "Context"), ("py:class", "fastapi_tasks.tasks.Task")]

html_theme = "furo"
html_title = project

# Objects name their public module. That is where Sphinx looks for the docstrings of their
# attributes, which are in the module that defines them.
publics = [
    ModuleAnalyzer.for_module(module.__name__)
    for module in (fastapi_tasks, fastapi_tasks.engines, fastapi_tasks.testing)
]
for public in publics:
    public.analyze()

# Each engine is imported when it is named.
engines = [getattr(fastapi_tasks.engines, name) for name in fastapi_tasks.engines.__all__]

for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] != fastapi_tasks.__name__:
        continue
    source = ModuleAnalyzer.for_module(name)
    source.analyze()
    for public in publics:
        public.attr_docs.update(source.attr_docs)
        public.annotations.update(source.annotations)
        public.tagorder.update(source.tagorder)
    for value in vars(module).values():
        if isinstance(value, ParamSpec | TypeVar):
            # A type variable has no entry of its own that its name could lead to.
            nitpick_ignore.append(("py:class", value.__name__))
            nitpick_ignore.append(("py:class", f"{value.__module__}.{value.__name__}"))
        if isinstance(value, ParamSpec):
            # Without it Sphinx writes "~P", which its own parser then trips over.
            value.__qualname__ = value.__name__
