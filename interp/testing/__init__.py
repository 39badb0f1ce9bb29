"""Tiny random models of each family, an independent recomputation of their attention, and an error-budget assert.

Nothing is downloaded: the models are built from configs. :func:`build` is what imports transformers' modelling code.
"""

from __future__ import annotations

from interp.testing.budget import assert_within_error_budget
from interp.testing.compare import Agreement, agreement
from interp.testing.recompute import Recomputation, independent_maps, recompute
from interp.testing.specimen import Specimen, Stack, build, families

__all__ = [
    "Agreement",
    "Recomputation",
    "Specimen",
    "Stack",
    "agreement",
    "assert_within_error_budget",
    "build",
    "families",
    "independent_maps",
    "recompute",
]
