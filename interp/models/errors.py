"""Errors of loading a model and of giving it inputs."""

from __future__ import annotations


class LoadError(ValueError):
    """A source that gives no model: not there, out of reach, damaged, or of a kind transformers does not know."""


class ModelInputError(ValueError):
    """An input the model cannot take: an image for a text model, text for an image model, a missing processor."""
