"""The op in Triton: edits and statistics inside a fast attention, on CUDA (and in Triton's interpreter on a CPU)."""

from interp.attention.triton.backend import run, supports

__all__ = ["run", "supports"]
