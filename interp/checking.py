"""``interp.check``: on the user's own model and input, does what we read and change agree with an independent recomputation?"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.attention import Edit, Gain, attend
from interp.models.anatomy import Anatomy, Site, anatomy
from interp.models.model import Model, unwrap
from interp.tracing.calls import Intervention, SiteCall
from interp.tracing.capture import Capture
from interp.tracing.session import hooked

MAP_TOLERANCE = 2e-5
LIMIT = 2 * 2**30


class CheckError(ValueError):
    """The check cannot be run on these inputs."""


@dataclass(frozen=True)
class CheckRow:
    """One line of the report: what was checked on which stack, the figure and whether it passed.

    ``passed`` is None where the check does not apply (causality of a bidirectional stack).
    """

    check: str
    where: str
    n: int
    figure: float
    limit: str
    passed: bool | None


@dataclass
class CheckReport:
    """The lines of a check; ``passed`` is True where no line failed."""

    model: str
    rows: list[CheckRow] = field(default_factory=list[CheckRow])
    unreached: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "passed": self.passed,
            "unreached": list(self.unreached),
            "rows": [vars(r) for r in self.rows],
        }

    def table(self) -> Any:
        """A rich table."""
        from rich.table import Table

        table = Table(title=f"{self.model}: {'passed' if self.passed else 'FAILED'}")
        for name in ("check", "where", "n", "figure", "limit", ""):
            table.add_column(name, justify="right" if name in ("n", "figure") else "left")
        for row in self.rows:
            mark = {True: "[green]pass", False: "[red]FAIL", None: "[dim]n/a"}[row.passed]
            table.add_row(row.check, row.where, str(row.n), f"{row.figure:.2e}", row.limit, mark)
        for name in self.unreached:
            table.add_row("not reached", name, "", "", "", "[yellow]listed")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, record=True, file=io.StringIO())
        console.print(self.table())
        return console.export_text()


def check(model: Any, inputs: Mapping[str, Any]) -> CheckReport:
    """Compare every site with an eager fp64 recomputation, on this model and this input.

    Checked, in this order: tracing leaves the output bit-equal; the maps, row entropies, received sums of every site equal
    those of the recomputation; nothing flows back in causal stacks (a changed last token leaves earlier logits as they
    were); a forward through the edit backend with nothing to edit stays within rounding; scaling the heads of a site changes
    the output, site by site.

    Args:
        model: anything :func:`interp.hooked` takes.
        inputs: keyword arguments of one forward. Maps are made for the check, so a few hundred tokens are right.

    Raises:
        CheckError: the maps of this input would take over 2 GiB.
        AnatomyError: no site can be reached.
    """
    module = unwrap(model)
    shape = anatomy(module)
    shape.require_sites()
    inputs = {k: v for k, v in dict(inputs).items() if v is not None}
    _refuse_long(shape, inputs)
    name = getattr(model, "name", None) if isinstance(model, Model) else None
    report = CheckReport(str(name or type(module).__name__), unreached=shape.unreached)
    with torch.no_grad():
        plain = module(**inputs)
        with hooked(
            module, capture=Capture(attention=True, row_stats=True, received=True, memory_limit=4 * LIMIT)
        ) as run:
            traced = module(**inputs)
        after = module(**inputs)
        a, b, c = (logits(x) for x in (plain, traced, after))
        report.rows.append(_row("output while tracing", "logits", 1, _difference(a, b), "bit-equal", torch.equal(a, b)))
        report.rows.append(
            _row("output after the session", "logits", 1, _difference(a, c), "bit-equal", torch.equal(a, c))
        )
        _compare_maps(report, module, shape, inputs, run)
        _causality(report, module, shape, inputs, a)
        _neutral(report, module, inputs, a)
        _editing(report, module, shape, inputs, a, run.report())
    return report


def logits(result: Any) -> Tensor:
    """The main output of a model: logits where it has them, else the first floating-point tensor."""
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(result, key, None)
        if isinstance(value, Tensor):
            return value
    values = result.values() if hasattr(result, "values") else result
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _row(check: str, where: str, n: int, figure: float, limit: str, passed: bool | None) -> CheckRow:
    return CheckRow(check, where, n, float(figure), limit, None if passed is None else bool(passed))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).nan_to_num().abs().max())


def _refuse_long(shape: Anatomy, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        heads = sum(site.n_heads for site in shape.sites if site.stack == "text")
        size = ids.shape[0] * heads * ids.shape[1] ** 2 * 8
        if size > LIMIT:
            raise CheckError(
                f"inputs must be short enough to hold every map in fp64 (2 GiB), got {tuple(ids.shape)} tokens, {size / 2**30:.1f} GiB"
            )


def _compare_maps(report: CheckReport, module: Any, shape: Anatomy, inputs: Mapping[str, Any], run: Any) -> None:
    from interp.testing.recompute import independent_maps

    expected = independent_maps(module, inputs)
    trace = run.trace
    for stack, sites in shape.stacks.items():
        if stack not in trace.stacks:
            report.rows.append(_row("sites called", stack, len(sites), 0.0, "called by this input", None))
            continue
        data = trace[stack]
        missing = [s.name for s in sites if not expected.get(s.name)]
        worst = {"maps": 0.0, "entropy": 0.0, "received": 0.0}
        for site in sites:
            if site.name in missing:
                continue
            whole = _joined(expected[site.name], data.sizes["key"])
            index = data["layer"].values.tolist().index(site.layer)
            got = torch.from_numpy(data["attention"].values[:, index, : whole.shape[1]])
            real = ~got.isnan().any(-1)
            worst["maps"] = max(worst["maps"], float((got.double() - whole)[real].abs().max()))
            entropy = torch.special.entr(whole).sum(-1)
            mine = torch.from_numpy(data["entropy"].values[:, index, : whole.shape[1]]).double()
            worst["entropy"] = max(worst["entropy"], float((mine - entropy)[real].abs().max()))
            columns = torch.where(real.unsqueeze(-1), whole, 0.0).sum(2)
            received = (
                torch.from_numpy(data["received"].values[:, index, : whole.shape[1]]).double().nan_to_num().sum(2)
            )
            worst["received"] = max(
                worst["received"], float((received - columns).abs().max() / max(1.0, float(columns.max())))
            )
        called = len(sites) - len(missing)
        for reading, figure in worst.items():
            unit = {"maps": "max |error|", "entropy": "nats", "received": "relative"}[reading]
            limit = MAP_TOLERANCE * (10 if reading == "entropy" else 1)
            report.rows.append(
                _row(
                    f"{reading} ({unit})",
                    f"{stack}, {called} sites",
                    called,
                    figure,
                    f"<= {limit:.0e}",
                    figure <= limit,
                )
            )
        if missing:
            report.rows.append(
                _row(
                    "sites called",
                    f"{stack}: {', '.join(missing[:3])}",
                    len(missing),
                    0.0,
                    "called by this input",
                    None,
                )
            )


def _joined(calls: list[Tensor], n_keys: int) -> Tensor:
    """The map of a site from its calls: windows of a packed tower stand on the diagonal, other calls are samples."""
    if len(calls) == 1:
        return calls[0]
    if sum(c.shape[-1] for c in calls) == n_keys and all(c.shape[0] == 1 for c in calls):
        return torch.stack([torch.block_diag(*[c[0, h] for c in calls]) for h in range(calls[0].shape[1])]).unsqueeze(0)
    return torch.cat(calls)


def _causality(report: CheckReport, module: Any, shape: Anatomy, inputs: Mapping[str, Any], before: Tensor) -> None:
    ids: Any = inputs.get("input_ids")
    causal = isinstance(ids, Tensor) and ids.shape[1] > 1 and before.ndim == 3 and before.shape[1] == ids.shape[1]
    if not causal or any(not s.causal for s in shape.stacks.get("text", [])) or "text" not in shape.stacks:
        report.rows.append(_row("nothing flows back", "text", 0, 0.0, "causal stacks", None))
        return
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % max(2, int(changed.max()))
    with hooked(module, capture=Capture(row_stats=True)):
        after = logits(module(**{**inputs, "input_ids": changed}))
    figure = _difference(before[:, :-1], after[:, :-1])
    report.rows.append(_row("nothing flows back", "text logits", ids.shape[1] - 1, figure, "0", figure <= 1e-6))


class _ThroughTheOp(Intervention):
    """Recompute z with the memory-linear backend and nothing to edit."""

    def after(self, call: SiteCall, z: Tensor) -> Tensor | None:
        return attend(
            call.q, call.k, call.v, scale=call.scale, mask=call.mask, softcap=call.softcap, sinks=call.sinks, bias=call.bias,
            backend="blockwise",
        ).output  # fmt: skip


def _neutral(report: CheckReport, module: Any, inputs: Mapping[str, Any], plain: Tensor) -> None:
    with hooked(module, interventions=[_ThroughTheOp()]):
        through = logits(module(**inputs))
    ids, pads = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(pads, Tensor) and isinstance(ids, Tensor) and plain.ndim == 3 and plain.shape[:2] == pads.shape:
        # Rows of pads have no defined value.
        plain, through = plain[pads.bool()], through[pads.bool()]
    eps = torch.finfo(plain.dtype).eps
    scale = float(plain.double().abs().max()) or 1.0
    figure = _difference(plain, through) / scale
    limit = max(1e-4, 16 * eps)
    report.rows.append(_row("neutral edit (relative)", "logits", 1, figure, f"<= {limit:.0e}", figure <= limit))


class _ScaleSite(Intervention):
    def __init__(self, name: str, gain: float) -> None:
        self.name, self.gain = name, gain

    def before(self, call: SiteCall) -> Edit | None:
        return Edit((Gain(self.gain),)) if call.site.name == self.name else None


def _editing(
    report: CheckReport,
    module: Any,
    shape: Anatomy,
    inputs: Mapping[str, Any],
    plain: Tensor,
    used: Mapping[str, Mapping[str, int]],
) -> None:
    for stack, sites in shape.stacks.items():
        called = [s for s in sites if used.get(s.name)]
        if not called:
            continue
        moved = [(s, _moved(module, s, inputs, plain)) for s in called]
        dead = [s.name for s, change in moved if change == 0.0]
        where = stack if not dead else f"{stack}: no effect at {', '.join(dead[:3])}"
        # A tower may be read before its last layer (LLaVA takes the one but last); those sites are named, not failed.
        unused = (
            stack != "text" and len(dead) < len(called) and dead == [s.name for s in called[-len(dead) :]]
            if dead
            else False
        )
        least = min((c for _, c in moved if c > 0.0), default=0.0)
        report.rows.append(
            _row("editing changes the output (least change)", where, len(called), least, "> 0", not dead or unused)
        )


def _moved(module: Any, site: Site, inputs: Mapping[str, Any], plain: Tensor) -> float:
    with hooked(module, interventions=[_ScaleSite(site.name, 0.5)]):
        return _difference(plain, logits(module(**inputs)))
