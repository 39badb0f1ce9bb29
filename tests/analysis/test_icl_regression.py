"""In-context regression: the reference values, and a small training that finds the paper's solution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.analysis.icl_regression import (
    Task,
    attention_prediction,
    best_mu,
    diagnose,
    gradient_prediction,
    reduced_loss,
    ridge_prediction,
)
from interp.analysis.running import AnalysisError

TASK = Task()


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, ...]:
    return TASK.draw(100_000, seed=1)


def risk(prediction: np.ndarray, target: np.ndarray) -> float:
    return float(((prediction - target) ** 2).mean())


def test_risks_are_the_reference_values(prompts: tuple[np.ndarray, ...]) -> None:
    x, y, query, target = prompts
    one = np.array([1 / np.sqrt(5)])
    mu = best_mu(one, TASK)
    assert mu[0] == pytest.approx(1.628, abs=1e-3) and reduced_loss(one, mu, TASK) == pytest.approx(0.372, abs=1e-3)
    assert risk(attention_prediction(x, y, query, one, mu), target) == pytest.approx(0.413, abs=0.01)
    two = attention_prediction(x, y, query, np.array([0.13, -0.13]), np.array([3.45, -3.45]))
    assert risk(two, target) == pytest.approx(0.244, abs=0.005)
    step = 1 / (1 + 1.1 * 5 / 40)
    assert step == pytest.approx(0.879, abs=1e-3)
    assert risk(gradient_prediction(x, y, query, step), target) == pytest.approx(0.241, abs=0.005)
    assert risk(gradient_prediction(x, y, query, 2 * 0.13 * 3.45, debiased=True), target) == pytest.approx(
        0.244, abs=0.005
    )
    assert risk(ridge_prediction(x, y, query, 0.1), target) == pytest.approx(0.115, abs=0.003)
    # Two opposite heads are, to first order, the debiased step.
    other = gradient_prediction(x, y, query, 2 * 0.01 * 44.5, debiased=True)
    small = attention_prediction(x, y, query, np.array([0.01, -0.01]), np.array([44.5, -44.5]))
    assert np.abs(small - other).mean() < 0.01


def test_any_omega_of_the_valley_has_the_risk_of_two_heads(prompts: tuple[np.ndarray, ...]) -> None:
    """Section 8: .2444 to .2449 for omega within .05 and .13, .2455 at .2, provided that 2 omega mu is .88 to .90."""
    x, y, query, target = prompts
    risks = {}
    for w in (0.05, 0.09, 0.13, 0.2):
        omega = np.array([w, -w])
        risks[w] = risk(attention_prediction(x, y, query, omega, best_mu(omega, TASK)), target)
    assert all(risks[w] == pytest.approx(0.2447, abs=0.004) for w in (0.05, 0.09, 0.13)), risks
    # The same prompts, so the differences are sharper than the values.
    assert max(risks[w] for w in (0.05, 0.09, 0.13)) - min(risks[w] for w in (0.05, 0.09, 0.13)) < 1e-3, risks
    assert 0 < risks[0.2] - risks[0.13] < 0.003
    # Off the valley, with the omega of the paper's run, the risk is that of a step that is too long.
    far = np.array([0.13, -0.13])
    assert risk(attention_prediction(x, y, query, far, 2 * best_mu(far, TASK)), target) > 0.3


def test_the_valley_is_flat_in_omega_and_its_infimum_is_known() -> None:
    losses = []
    for w in (0.01, 0.05, 0.1, 0.13):
        omega = np.array([w, -w])
        losses.append(reduced_loss(omega, best_mu(omega, TASK), TASK))
    assert losses[0] == pytest.approx(0.2209, abs=5e-4) and max(losses) - min(losses) < 0.01
    grid = np.linspace(0.3, 0.6, 301)
    best = grid[np.argmin([reduced_loss(np.array([w]), best_mu(np.array([w]), TASK), TASK) for w in grid])]
    assert best == pytest.approx(1 / np.sqrt(5), abs=2e-3)


def test_diagnostics_by_hand() -> None:
    eye = np.eye(6)[None]
    w_v = np.zeros((2, 6, 6))
    w_v[:, 5, 5] = 1
    w_o = np.zeros((2, 6, 1))
    w_o[:, 5, 0] = (3, -3)
    found = diagnose(np.concatenate([0.3 * eye, -0.3 * eye]), np.concatenate([eye, eye]), w_v, w_o)
    np.testing.assert_allclose(found.omega, [0.3 / np.sqrt(6), -0.3 / np.sqrt(6)])
    assert found.mu.tolist() == [3, -3] and found.zero_sum == 0 and np.allclose(found.off_diagonal, 0)
    assert found.product == pytest.approx(2 * 0.9 / np.sqrt(6))
    with pytest.raises(AnalysisError, match="weights must be"):
        diagnose(eye, eye, w_v, w_o)


@pytest.mark.slow
def test_two_heads_that_are_trained_find_opposite_signs() -> None:
    torch.manual_seed(0)
    d, heads = 5, 2
    q, k, v = (torch.nn.Parameter(0.3 * torch.randn(heads, d + 1, d + 1)) for _ in range(3))
    o = torch.nn.Parameter(0.3 * torch.randn(heads, d + 1, 1))
    optimizer = torch.optim.Adam([q, k, v, o], lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(2500):
        beta = torch.randn(256, d, generator=generator) / d**0.5
        x = torch.randn(256, 41, d, generator=generator)
        y = torch.einsum("nld,nd->nl", x, beta) + 0.1**0.5 * torch.randn(256, 41, generator=generator)
        z = torch.cat([x, y[..., None]], -1)
        query = torch.cat([x[:, -1], torch.zeros(256, 1)], -1)
        scores = torch.einsum("ni,hij,hkj,nlk->nhl", query, q, k, z[:, :-1]) / (d + 1) ** 0.5
        out = torch.einsum("nhl,nlk,hki,hij->nj", scores.softmax(-1), z[:, :-1], v, o)[:, 0]
        loss = (out - y[:, -1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1800:
            optimizer.param_groups[0]["lr"] = 1e-3
    found = diagnose(*(w.detach().double().numpy() for w in (q, k, v, o)))
    assert found.product == pytest.approx(0.89, abs=0.08)
    assert found.zero_sum < 0.1 and found.omega[0] * found.omega[1] < 0 and found.off_diagonal.max() < 0.3
