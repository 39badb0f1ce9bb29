"""What can be read linearly from each head's output, beyond what a probe would memorise (:class:`LinearProbe`)."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.gate import wilson
from probes.intervals import mean_interval, unit_index
from probes.samples import ProbeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class LinearProbeResult:
    """Held-out accuracy of every head; all arrays ``[...]`` as the heads of z, unless said otherwise.

    Attributes:
        accuracy: share of held-out samples that are classified right, 0 to 1.
        low: lower end of its interval: Wilson's over samples, or a bootstrap over groups where groups are given. What a
            fit on other training data would have given is not in it.
        high: upper end.
        control_accuracy: the same with the control task's labels, mean over ``controls`` draws; NaN without controls.
        selectivity: accuracy - control accuracy.
        majority: accuracy of always saying the most frequent class: one number.
        correct: bool ``[sample, ...]``, was the held-out sample classified right?
        n: samples.
        classes: the labels, sorted.
        not_converged: fits that reached ``max_iter``, of ``n_fits``.
        n_fits: fits in all.
    """

    accuracy: Floats
    low: Floats
    high: Floats
    control_accuracy: Floats
    selectivity: Floats
    majority: float
    correct: Bools
    n: int
    classes: tuple[Any, ...]
    not_converged: int
    n_fits: int


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on one head's z at a time, with cross-validation and a control task.

    Features are standardised within each training fold. The control task of Hewitt & Liang 2019,
    https://arxiv.org/abs/1909.03368: each *type* (a word, a class of images) gets a random label, drawn from the frequencies
    of the real ones and the same wherever the type occurs. A probe that is good at it can memorise, so a head is judged by
    selectivity, accuracy on the task minus accuracy on the control. Control and task share samples and folds.

    >>> probe = LinearProbe(folds=3, controls=0)
    >>> rng = np.random.default_rng(0)
    >>> y = np.arange(60) % 2
    >>> z = rng.normal(size=(60, 2, 4)); z[:, 1, 0] += 8 * y  # only head 1 knows
    >>> probe.fit(z, y).accuracy[1]
    np.float64(1.0)

    Needs scikit-learn (``pip install headscope[analysis]``). What is readable need not be used: that is a question for
    interventions. Where samples come from few sequences or images, pass those as ``groups``, or neighbours of a training
    sample are in the test fold.

    Args:
        folds: of the cross-validation, stratified by label.
        C: inverse strength of the L2 penalty; scikit-learn's default.
        controls: draws of the control labels; 0 leaves the control out.
        level: of the intervals.
        seed: of folds and control labels.
        max_iter: steps of one fit.
    """

    paper: ClassVar[str] = "Hewitt & Liang 2019, https://arxiv.org/abs/1909.03368"

    folds: int = 5
    C: float = 1.0
    controls: int = 3
    level: float = 0.95
    seed: int = 0
    max_iter: int = 1000

    def __post_init__(self) -> None:
        if self.folds < 2 or self.controls < 0 or self.max_iter < 1:
            got = f"folds={self.folds}, controls={self.controls}, max_iter={self.max_iter}"
            raise ProbeError(f"folds must be at least 2, controls at least 0, max_iter at least 1, got {got}")
        if not self.C > 0 or not 0 < self.level < 1:
            raise ProbeError(f"C must be above 0 and level in (0, 1), got C={self.C}, level={self.level}")

    def fit(
        self,
        z: ArrayLike,
        labels: Sequence[Hashable] | NDArray[Any],
        *,
        types: Sequence[Hashable] | NDArray[Any] | None = None,
        groups: Sequence[Hashable] | NDArray[Any] | None = None,
    ) -> LinearProbeResult:
        """Probe every head.

        Args:
            z: head outputs ``[sample, head, d]``, or ``[sample, layer, head, d]``; see
                ``interp.analysis.head_outputs``. A head that is all NaN (a layer without it) has NaN results.
            labels: one a sample.
            types: one a sample, for the control; None makes each sample its own type, so that the control can only be
                guessed and selectivity is the gain over guessing.
            groups: one a sample; the samples of a group (one text, one image) are never split between training and test.

        Raises:
            ProbeError: shapes that do not fit, NaN or infinite features, fewer than two labels, a label with fewer samples
                (or groups) than folds, or no scikit-learn.
        """
        features, heads = _features(z)
        n = len(features)
        classes, y = _numbered("labels", labels, n)
        if len(classes) < 2:
            raise ProbeError(f"labels must be of at least two classes, got {list(classes)}")
        _, kinds = _numbered("types", range(n) if types is None else types, n)
        _, units = _numbered("groups", range(n) if groups is None else groups, n)
        counts = np.array([len(np.unique(units[y == c])) for c in range(len(classes))])
        if counts.min() < self.folds:
            what, few = "samples" if groups is None else "groups", classes[int(counts.argmin())]
            raise ProbeError(f"labels must have at least folds={self.folds} {what} each, got {counts.min()} of {few!r}")
        splits = self._splits(y, units, grouped=groups is not None)
        controls = [self._control(y, kinds, draw) for draw in range(self.controls)]
        there: Bools = ~np.asarray(np.isnan(features).all(axis=(0, 2)))
        correct = np.zeros(features.shape[:2], dtype=np.bool_)
        control = np.full((max(1, self.controls), features.shape[1]), np.nan)
        failed = fits = 0
        for head in np.flatnonzero(there):
            right, not_converged, made = self._predict(features[:, head], y, splits)
            correct[:, head] = right
            failed, fits = failed + not_converged, fits + made
            for draw, target in enumerate(controls):
                right, not_converged, made = self._predict(features[:, head], target, splits)
                control[draw, head] = right.mean()
                failed, fits = failed + not_converged, fits + made
        accuracy = np.where(there, correct.mean(0), np.nan)
        low, high = np.full(len(there), np.nan), np.full(len(there), np.nan)
        for head in np.flatnonzero(there):
            right = correct[:, head]
            if groups is None:
                low[head], high[head] = wilson(int(right.sum()), n, self.level)
            else:
                _, low[head], high[head], _ = mean_interval(right, units.tolist(), level=self.level, seed=self.seed)
        chance = control.mean(0)
        return LinearProbeResult(
            accuracy.reshape(heads), low.reshape(heads), high.reshape(heads), chance.reshape(heads),
            (accuracy - chance).reshape(heads), float(np.bincount(y).max() / n), correct.reshape(n, *heads), n, classes,
            failed, fits,
        )  # fmt: skip

    def _splits(self, y: Ints, units: Ints, *, grouped: bool) -> list[tuple[Ints, Ints]]:
        _require_sklearn()
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        kind = StratifiedGroupKFold if grouped else StratifiedKFold
        folds = kind(n_splits=self.folds, shuffle=True, random_state=self.seed)
        return [(train, test) for train, test in folds.split(y[:, None], y, units if grouped else None) if len(test)]

    def _control(self, y: Ints, kinds: Ints, draw: int) -> Ints:
        """A label for each type, drawn from the frequencies of the real labels."""
        rng = np.random.default_rng((self.seed, draw))
        return rng.choice(y, size=int(kinds.max()) + 1)[kinds]

    def _predict(self, x: Floats, y: Ints, splits: list[tuple[Ints, Ints]]) -> tuple[Bools, int, int]:
        """Right or wrong for each held-out sample, fits that did not converge, and fits."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        right = np.zeros(len(y), dtype=np.bool_)
        failed = fits = 0
        for train, test in splits:
            if len(np.unique(y[train])) < 2:
                # Control labels of few types can all be alike: then there is nothing to fit.
                right[test] = y[test] == y[train][0]
                continue
            model = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=self.max_iter))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                model.fit(x[train], y[train])
            failed += any(issubclass(w.category, ConvergenceWarning) for w in caught)
            fits += 1
            right[test] = model.predict(x[test]) == y[test]
        return right, failed, fits


def _features(z: ArrayLike) -> tuple[Floats, tuple[int, ...]]:
    """``[sample, head, d]`` fp64 and the shape of the heads."""
    given = np.asarray(z, dtype=np.float64)
    if given.ndim not in (3, 4) or 0 in given.shape:
        raise ProbeError(
            f"z must be [sample, head, d] or [sample, layer, head, d], none of them 0, got {list(given.shape)}"
        )
    heads = given.shape[1:-1]
    flat = given.reshape(len(given), -1, given.shape[-1])
    missing: Bools = np.asarray(np.isnan(flat).all(axis=(0, 2)))
    bad = ~np.asarray(np.isfinite(flat[:, ~missing]).all(axis=(0, 2)))
    if bad.any():
        first = np.unravel_index(int(np.flatnonzero(~missing)[np.flatnonzero(bad)[0]]), heads)
        raise ProbeError(f"z must be finite, and is not at head {tuple(map(int, first))}")
    return flat, heads


def _numbered(name: str, values: Any, n: int) -> tuple[tuple[Any, ...], Ints]:
    """The distinct values, sorted where they can be, and the number of each sample's ``[sample]``."""
    listed = list(_plain(values))
    if len(listed) != n:
        raise ProbeError(f"{name} must have one entry a sample, {n}, got {len(listed)}")
    found, index = unit_index(listed)
    try:
        order = sorted(range(len(found)), key=lambda i: found[i])  # type: ignore[arg-type,return-value]
    except TypeError:
        order = list(range(len(found)))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return tuple(found[i] for i in order), place[index]


def _plain(values: Any) -> Iterator[Hashable]:
    yield from values.tolist() if hasattr(values, "tolist") else values


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ProbeError(
            "linear probes need scikit-learn, which is not installed: pip install headscope[analysis]"
        ) from error
