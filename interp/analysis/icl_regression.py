"""In-context linear regression with one layer of softmax attention: its diagnostics, risk and theory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from interp.analysis.running import AnalysisError

Floats = NDArray[np.float64]
PAPER = "He et al. 2025, https://arxiv.org/abs/2503.12734"


@dataclass(frozen=True)
class Task:
    """Prompts of He et al. 2025, https://arxiv.org/abs/2503.12734: ``x ~ N(0, I_d)``, ``beta ~ N(0, I_d / d)``, ``y = beta.x + noise``.

    Attributes:
        d: dimensions of x.
        length: examples L in a prompt.
        noise: variance of the noise, also of the target: the smallest risk there is.
    """

    d: int = 5
    length: int = 40
    noise: float = 0.1

    def draw(self, n: int, seed: int = 0) -> tuple[Floats, Floats, Floats, Floats]:
        """``x [n, L, d]``, ``y [n, L]``, query ``[n, d]`` and its target ``[n]``."""
        rng = np.random.default_rng(seed)
        beta = rng.normal(size=(n, self.d)) / np.sqrt(self.d)
        x = rng.normal(size=(n, self.length + 1, self.d))
        y = np.einsum("nld,nd->nl", x, beta) + np.sqrt(self.noise) * rng.normal(size=(n, self.length + 1))
        return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


def attention_prediction(x: Floats, y: Floats, query: Floats, omega: Floats, mu: Floats) -> Floats:
    """``sum_h mu_h sum_l softmax_l(omega_h x_l.query) y_l``: heads whose QK circuit is ``omega I`` and whose OV circuit reads y."""
    dots = np.einsum("nld,nd->nl", x, query)
    out = np.zeros(len(x))
    for w, m in zip(np.atleast_1d(omega), np.atleast_1d(mu), strict=True):
        p = np.exp(w * dots - (w * dots).max(1, keepdims=True))
        out += m * (p * y).sum(1) / p.sum(1)
    return out


def gradient_prediction(x: Floats, y: Floats, query: Floats, step: float, *, debiased: bool = False) -> Floats:
    """One step of gradient descent from 0: ``step / L * sum_l (y_l - y mean) x_l.query``, the mean with ``debiased`` only."""
    centred = y - y.mean(1, keepdims=True) if debiased else y
    return step * np.einsum("nl,nld,nd->n", centred, x, query) / x.shape[1]


def ridge_prediction(x: Floats, y: Floats, query: Floats, noise: float) -> Floats:
    """The Bayes predictor: ridge regression with ``noise * d``."""
    d = x.shape[-1]
    gram = np.einsum("nli,nlj->nij", x, x) + noise * d * np.eye(d)
    beta = np.linalg.solve(gram, np.einsum("nli,nl->ni", x, y)[..., None])[..., 0]
    return (beta * query).sum(1)


def reduced_loss(omega: Floats, mu: Floats, task: Task) -> float:
    """The paper's loss of heads ``(omega, mu)`` in the limit: ``1 + s - 2 mu.w + mu.(w w' + (1 + s) / L exp(d w w')) mu``."""
    w, m = np.atleast_1d(omega).astype(np.float64), np.atleast_1d(mu).astype(np.float64)
    return float(1 + task.noise - 2 * m @ w + m @ _kernel(w, task) @ m)


def best_mu(omega: Floats, task: Task) -> Floats:
    """The mu that minimises :func:`reduced_loss` for given omega."""
    w = np.atleast_1d(omega).astype(np.float64)
    return np.asarray(np.linalg.solve(_kernel(w, task), w), dtype=np.float64)


def _kernel(w: Floats, task: Task) -> Floats:
    outer = np.outer(w, w)
    return outer + (1 + task.noise) / task.length * np.exp(task.d * outer)


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """What the heads of a trained layer have become.

    Attributes:
        omega: ``[head]`` mean of the QK circuit's diagonal over x, by ``sqrt(d + 1)``.
        mu: ``[head]`` what the OV circuit makes of y.
        off_diagonal: ``[head]`` share of the QK circuit's x block that is not ``omega I`` (Frobenius).
        zero_sum: ``|sum mu| / sum |mu|``: near 0 in the paper's solution.
        product: ``sum_h omega_h mu_h``: what is determined where omega and mu themselves are not (a flat valley).
    """

    omega: Floats
    mu: Floats
    off_diagonal: Floats
    zero_sum: float
    product: float


def diagnose(W_Q: Floats, W_K: Floats, W_V: Floats, W_O: Floats) -> Diagnostics:
    """What a layer trained on in-context linear regression has become: a :class:`Diagnostics` of its weights, no data needed.

    Args:
        W_Q, W_K, W_V: ``[H, d + 1, n]``, multiplied from the right; the last input is y.
        W_O: ``[H, n, 1]``.

    Raises:
        AnalysisError: shapes that do not go together.
    """
    if (
        W_Q.ndim != 3
        or W_Q.shape != W_K.shape
        or W_V.shape[:2] != W_Q.shape[:2]
        or W_O.shape[:2] != (len(W_V), W_V.shape[2])
    ):
        raise AnalysisError(
            f"weights must be [H, d + 1, n] and [H, n, 1], got {W_Q.shape}, {W_K.shape}, {W_V.shape}, {W_O.shape}"
        )
    qk = W_Q @ W_K.transpose(0, 2, 1)
    d = qk.shape[1] - 1
    block = qk[:, :d, :d]
    mean = np.trace(block, axis1=1, axis2=2) / d
    off = np.linalg.norm(block - mean[:, None, None] * np.eye(d), axis=(1, 2)) / np.linalg.norm(block, axis=(1, 2))
    omega = mean / np.sqrt(d + 1)
    mu = (W_V @ W_O)[:, -1, 0]
    total = np.abs(mu).sum()
    return Diagnostics(omega, mu, off, float(abs(mu.sum()) / total) if total > 0 else float("nan"), float(omega @ mu))
