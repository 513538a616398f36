"""Outputs of the components of a network while it scores a block: do stocks differ, are units alive, where does
attention look?

They are taken by hooks on a pass that is made anyway, so that they are what the component really computes.

Shapes: N stocks, S sessions, D units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OBSERVED_SESSIONS = 4
"""Sessions at the end of a block whose states are measured. More sessions give the same figures."""
ATTENTION_ROWS, ATTENTION_SHARE = 64, 64
"""Rows of each attention map that are drawn for the mean entropy: so many, or one of so many where that is more."""
DEAD_UNIT_STD: float = 1e-6
"""A unit is dead when the std of its output is at most this share of the component's root mean square."""
ATTENTION = "attention_map"
"""Name of the identity through which a layer's attention weights pass, softmaxed over their last axis."""

Figures = dict[str, dict[str, float]]
"""Component -> metric -> value."""


class Activations:
    """States and attention weights of each named component."""

    def __init__(self) -> None:
        self._states: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._attention: defaultdict[str, defaultdict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._random = torch.Generator().manual_seed(0)

    def observe_states(self, component: str, output: Tensor) -> None:
        """Takes `output: [N, S, D]` of all or of the next stocks. Another shape is no state of stocks."""
        if output.ndim == 3:
            self._states[component].append(output[:, -OBSERVED_SESSIONS:].detach().double())

    def observe_attention(self, component: str, weights: Tensor) -> None:
        """Takes attention weights `[..., K]`."""
        rows = weights.detach().flatten(0, -2)
        if len(rows) > ATTENTION_ROWS:
            count = max(ATTENTION_ROWS, len(rows) // ATTENTION_SHARE)
            rows = rows[torch.randint(len(rows), (count,), generator=self._random).to(rows.device)]
        self._attention[component][rows.shape[-1]].append(rows.float())

    def figures(self, member: Tensor) -> Figures:
        """Figures of each component; the bool `member: [N, S]` says which stocks count.

        `stock_spread`: std over the stocks that are members in a measured session, root mean square over sessions and
        units, over the root mean square of the output. 0 says that all stocks look the same. `dead_units`: share of
        the units whose output does not vary. `attention_entropy`: mean entropy of the attention weights over the log
        of how many are above 0. 0 is attention to one position, 1 equal attention to all.
        """
        counted = member[:, -OBSERVED_SESSIONS:].any(dim=1)
        figures: Figures = {name: _spread(torch.cat(parts)[counted]) for name, parts in self._states.items()}
        for name, rows_by_length in self._attention.items():
            entropies = torch.cat([_entropy(torch.cat(rows)) for rows in rows_by_length.values()])
            if len(entropies):  # none where every row has one position only
                figures.setdefault(name, {})["attention_entropy"] = float(entropies.mean())
        return figures


@contextmanager
def observing(model: nn.Module) -> Iterator[Activations]:
    """Observes the components of `model` while the context lasts."""
    activations = Activations()
    handles = []
    for name, child in model.named_children():
        handles.append(child.register_forward_hook(_hook(partial(activations.observe_states, name))))
        for inner, module in child.named_modules():
            if inner.split(".")[-1] == ATTENTION:
                handles.append(module.register_forward_hook(_hook(partial(activations.observe_attention, name))))
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def _hook(observe: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            observe(output)

    return hook


def _entropy(rows: Tensor) -> Tensor:
    """Entropy of rows `[R, K]` that sum to 1, relative to equal weights, without the rows of one position."""
    positions = (rows > 0).sum(dim=-1)
    entropy = -torch.xlogy(rows, rows).sum(dim=-1)
    several = positions > 1
    return entropy[several] / positions[several].log()


def _spread(output: Tensor) -> dict[str, float]:
    """`stock_spread` and `dead_units` of `output: [N, S, D]`."""
    size = output.square().mean().sqrt().clamp(min=1e-30)
    between = output.var(dim=0, correction=0).mean().sqrt()
    by_unit = output.flatten(0, 1).std(dim=0, correction=0)
    return {
        "stock_spread": float(between / size),
        "dead_units": float((by_unit <= DEAD_UNIT_STD * size).double().mean()),
    }
