"""Mean output of every head over a calibration set: the reference of mean ablation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.interventions.selection import positions_in_sample, real_rows
from interp.models.model import unwrap
from interp.tracing.calls import Intervention, SiteCall
from interp.tracing.session import hooked


@dataclass(frozen=True, eq=False)
class SiteMeans:
    """Means of one site.

    Attributes:
        by_position: ``[P, H, Dv]`` fp32 mean z of the rows at each position, counted from a sample's first real token.
        n_by_position: int64 ``[P]`` rows behind each of them.
        overall: ``[H, Dv]`` fp32 mean over all rows.
        n: number of all rows.
    """

    by_position: Tensor
    n_by_position: Tensor
    overall: Tensor
    n: int

    def at(self, positions: Tensor) -> Tensor:
        """``[..., H, Dv]`` for int positions ``[...]``: the overall mean where no row was seen at a position."""
        device = positions.device
        length = len(self.n_by_position)
        clipped = positions.clamp(0, length - 1)
        known = (positions >= 0) & (positions < length) & (self.n_by_position.to(device)[clipped] > 0)
        return torch.where(known[..., None, None], self.by_position.to(device)[clipped], self.overall.to(device))


@dataclass(frozen=True, eq=False)
class HeadMeans:
    """Mean z of every head, matched by position (from the sample's first real token), pads left out.

    Attributes:
        sites: means by ``(stack, layer)``.
        n_inputs: number of calibration inputs.
    """

    sites: Mapping[tuple[str, int], SiteMeans]
    n_inputs: int

    @classmethod
    def collect(
        cls,
        model: Any,
        inputs_list: Sequence[Mapping[str, Any]],
        *,
        stacks: Collection[str] | None = None,
        length: int | None = None,
    ) -> HeadMeans:
        """Run the model on every input, without gradients, and average.

        Args:
            model: as :func:`interp.hooked` takes. Interventions of a session that is open on it apply.
            inputs_list: keyword arguments of one forward each.
            stacks: names of stacks; None is all.
            length: positions with a mean of their own; None is as many as the longest input has. Rows beyond count in the
                overall mean alone.

        Raises:
            ValueError: no inputs, an unknown stack, a length below 1, or a stack that never ran.
        """
        inputs_list = [inputs_list] if isinstance(inputs_list, Mapping) else list(inputs_list)
        if not inputs_list:
            raise ValueError("inputs_list must have at least one input, got none")
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        collector = _Collector(
            None if stacks is None else (stacks,) if isinstance(stacks, str) else tuple(stacks), length
        )
        module = unwrap(model)
        with hooked(model, interventions=[collector]), torch.no_grad():
            for inputs in inputs_list:
                module(**inputs)
        sites = collector.means()
        silent = set(collector.stacks or ()) - {stack for stack, _ in sites}
        if silent:
            raise ValueError(f"inputs_list must make every one of stacks run, but {sorted(silent)} had no real row")
        return cls(sites, len(inputs_list))

    def describe(self) -> dict[str, Any]:
        """What the means were made of, JSON-able: inputs, and rows and positions of each stack."""
        stacks: dict[str, dict[str, int]] = {}
        for (stack, _), means in self.sites.items():
            stacks[stack] = {"rows": means.n, "positions": len(means.n_by_position)}
        return {"n_inputs": self.n_inputs, "stacks": stacks}


class _Collector(Intervention):
    def __init__(self, stacks: tuple[str, ...] | None, length: int | None) -> None:
        self.stacks, self.length = stacks, length
        self.sums: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.beyond: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def prepare(self, anatomy: Any) -> None:
        unknown = [s for s in self.stacks or () if s not in anatomy.stacks]
        if unknown:
            raise ValueError(
                f"stacks must be among {list(anatomy.stacks)} of {anatomy.model_class}, got {unknown[0]!r}"
            )

    def after(self, call: SiteCall, z: Tensor) -> None:
        if self.stacks is not None and call.site.stack not in self.stacks:
            return
        batch, rows, heads, dim = z.shape
        real = real_rows(call).expand(batch, rows)
        where = positions_in_sample(call).expand(batch, rows)[real].cpu()
        # Sums in fp64 on the CPU: some accelerators have no fp64, and a mean of bf16 sums would not be one.
        values = z.detach()[real].cpu().double()
        if not len(where):
            return
        limit = int(where.max()) + 1 if self.length is None else self.length
        key = (call.site.stack, call.site.layer)
        zero = torch.zeros(0, heads, dim, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        total, count = self.sums.get(key, zero)
        if limit > len(count):
            more = limit - len(count)
            total = torch.cat([total, total.new_zeros(more, heads, dim)])
            count = torch.cat([count, count.new_zeros(more)])
        inside = where < len(count)
        total.index_add_(0, where[inside], values[inside])
        count.index_add_(0, where[inside], torch.ones_like(where[inside]))
        self.sums[key] = total, count
        rest, n = self.beyond.get(key, (values.new_zeros(heads, dim), 0))
        self.beyond[key] = rest + values[~inside].sum(0), n + int((~inside).sum())

    def means(self) -> dict[tuple[str, int], SiteMeans]:
        out: dict[tuple[str, int], SiteMeans] = {}
        for key, (total, count) in self.sums.items():
            rest, beyond = self.beyond[key]
            n = int(count.sum()) + beyond
            overall = (total.sum(0) + rest) / n
            out[key] = SiteMeans((total / count.clamp_min(1)[:, None, None]).float(), count, overall.float(), n)
        return out
