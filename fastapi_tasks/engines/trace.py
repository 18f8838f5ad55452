"""OpenTelemetry's trace context, on its way to a worker: the one kind of context that travels."""

from __future__ import annotations

from contextvars import Context

__all__ = ["context_of", "current_trace"]


def current_trace() -> dict[str, str]:
    """Return the caller's trace context as propagators write it; empty without OpenTelemetry."""
    try:
        from opentelemetry import propagate
    except ImportError:
        return {}
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def context_of(carrier: dict[str, str], context: Context) -> Context:
    """Put a trace context into a context, and return that.

    :param carrier: what :func:`current_trace` has returned, elsewhere
    """
    if carrier:
        try:
            from opentelemetry import context as contexts
            from opentelemetry import propagate
        except ImportError:
            return context
        context.run(contexts.attach, propagate.extract(carrier))
    return context
