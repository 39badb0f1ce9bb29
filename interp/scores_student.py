"""Student's t distribution, vectorised, so that scores need no SciPy."""

from __future__ import annotations

from functools import lru_cache
from math import lgamma

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def t_p_value(t: ArrayLike, df: ArrayLike) -> Floats:
    """Two-sided p value of Student's t: the regularised incomplete beta function I_x(df/2, 1/2), x = df / (df + t^2).

    NaN where t is NaN or df < 1.
    """
    t, df = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(df, dtype=np.float64))
    out = np.full(t.shape, np.nan)
    known = ~np.isnan(t) & (df >= 1)
    with np.errstate(divide="ignore"):
        ratio = t[known] ** 2 / df[known]
        out[known] = _incomplete_beta(df[known] / 2, 0.5, 1 / (1 + ratio), 1 / (1 + 1 / ratio))
    return out


@lru_cache(maxsize=1024)
def t_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = probability, for probability >= 0.5."""
    low, high = 0.0, 1.0
    wanted = 2 * (1 - probability)
    while t_p_value(high, df) > wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, df) > wanted else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: Floats, b: float, x: Floats, complement: Floats) -> Floats:
    """I_x(a, b) by Lentz's continued fraction (Press et al., Numerical Recipes 6.4), on its fast side."""
    log_beta = np.array([lgamma(v) + lgamma(b) - lgamma(v + b) for v in a])
    with np.errstate(divide="ignore"):
        front = np.exp(a * np.log(x) + b * np.log(complement) - log_beta)
    swap = x > (a + 1) / (a + b + 2)
    p, q, at = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, complement, x)
    tail = front * _beta_fraction(p, q, at) / p
    return np.where(swap, 1 - tail, tail)


def _beta_fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    tiny = 1e-300
    c = np.ones_like(x)
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    h = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / np.where(np.abs(d) < tiny, tiny, d)
            c = 1 + numerator / c
            c = np.where(np.abs(c) < tiny, tiny, c)
            h = h * (c * d)
        if (np.abs(c * d - 1) < 1e-15).all():
            break
    return h
