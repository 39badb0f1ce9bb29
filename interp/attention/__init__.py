"""The attention op: a fast softmax attention whose probabilities can be edited and read without storing them.

``attend`` is the op; :class:`Mask` describes visibility, :class:`Edit` what to change, :class:`Readout` what to return.
"""

from interp.attention.api import Attended, attend
from interp.attention.backends import BACKENDS, BackendUnavailable
from interp.attention.combine import combine, is_neutral
from interp.attention.edits import (
    MAX_DROPPED_KEYS,
    MAX_GROUPS,
    Blocks,
    Boost,
    DropKeys,
    Edit,
    Gain,
    GivenRows,
    GroupWeights,
    Neighbourhood,
    Operation,
    Redistribute,
    SinkWindow,
    Temperature,
    Threshold,
    TopKeys,
    Uniform,
)
from interp.attention.mask import Mask, VisibilityRule
from interp.attention.readouts import MAX_TOPK, READING_AXES, Distances, OffsetBins, Readings, Readout, pooled_edge
from interp.attention.validation import AttentionArgumentError

__all__ = [
    "BACKENDS",
    "MAX_DROPPED_KEYS",
    "MAX_GROUPS",
    "MAX_TOPK",
    "READING_AXES",
    "Attended",
    "AttentionArgumentError",
    "BackendUnavailable",
    "Blocks",
    "Boost",
    "Distances",
    "DropKeys",
    "Edit",
    "Gain",
    "GivenRows",
    "GroupWeights",
    "Mask",
    "Neighbourhood",
    "OffsetBins",
    "Operation",
    "Readings",
    "Readout",
    "Redistribute",
    "SinkWindow",
    "Temperature",
    "Threshold",
    "TopKeys",
    "Uniform",
    "VisibilityRule",
    "attend",
    "combine",
    "is_neutral",
    "pooled_edge",
]
