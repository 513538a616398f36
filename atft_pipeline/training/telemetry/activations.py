"""What the components of a network put out while it scores a block: do stocks still differ, do units still answer,
where does attention look. N stocks, S sessions, D units.

Seen through hooks on a pass that is made anyway: whatever a component computes is seen, also what it should not.
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
"""The last sessions of a block, whose states are looked at: more say the same."""
ATTENTION_ROWS, ATTENTION_SHARE = 64, 64
"""Of each map as many rows, drawn at random, or one of so many where that is more: their mean entropy is asked for."""
DEAD_UNIT_STD: float = 1e-6
"""A unit whose output varies less than this share of the component's root mean square, over the states looked at."""
ATTENTION = "attention_map"
"""Name of the identity through which a layer's attention weights pass, softmaxed over their last axis."""

Figures = dict[str, dict[str, float]]
"""Component -> metric -> value."""


class Activations:
    """States and attention weights of each named component, as it put them out."""

    def __init__(self) -> None:
        self._states: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._attention: defaultdict[str, defaultdict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._random = torch.Generator().manual_seed(0)

    def see_states(self, component: str, output: Tensor) -> None:
        """`output: [N, S, D]`, of all stocks or of some after the others; of another shape it is no state of stocks."""
        if output.ndim == 3:
            self._states[component].append(output[:, -OBSERVED_SESSIONS:].detach().double())

    def see_attention(self, component: str, weights: Tensor) -> None:
        """`weights: [..., K]`."""
        rows = weights.detach().flatten(0, -2)
        if len(rows) > ATTENTION_ROWS:
            count = max(ATTENTION_ROWS, len(rows) // ATTENTION_SHARE)
            rows = rows[torch.randint(len(rows), (count,), generator=self._random).to(rows.device)]
        self._attention[component][rows.shape[-1]].append(rows.float())

    def figures(self, member: Tensor) -> Figures:
        """Of each component that put out states of stocks, `member: [N, S]` bool saying whose count and when:

        `stock_spread`: std over the stocks that are members at one of the sessions looked at, root mean square over
        sessions and units, over the root mean square of the output; 0 says that all stocks look the same. `dead_units`:
        share of the units that answer nothing. `attention_entropy`: mean entropy of its attention weights over the log
        of how many are above 0; 0 looks at one place, 1 at all alike.
        """
        counted = member[:, -OBSERVED_SESSIONS:].any(dim=1)
        figures: Figures = {name: _spread(torch.cat(parts)[counted]) for name, parts in self._states.items()}
        for name, rows_by_length in self._attention.items():
            entropies = torch.cat([_entropy(torch.cat(rows)) for rows in rows_by_length.values()])
            if len(entropies):  # none where every row has but one place to look at
                figures.setdefault(name, {})["attention_entropy"] = float(entropies.mean())
        return figures


@contextmanager
def observing(model: nn.Module) -> Iterator[Activations]:
    """What the components of `model` put out while the context lasts."""
    found = Activations()
    handles = []
    for name, child in model.named_children():
        handles.append(child.register_forward_hook(_telling(partial(found.see_states, name))))
        for inner, module in child.named_modules():
            if inner.split(".")[-1] == ATTENTION:
                handles.append(module.register_forward_hook(_telling(partial(found.see_attention, name))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _telling(see: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            see(output)

    return hook


def _entropy(rows: Tensor) -> Tensor:
    """Of rows `[R, K]` that sum to 1, relative to equal weights; rows with one place left out."""
    places = (rows > 0).sum(dim=-1)
    entropy = -torch.xlogy(rows, rows).sum(dim=-1)
    several = places > 1
    return entropy[several] / places[several].log()


def _spread(output: Tensor) -> dict[str, float]:
    """`output: [N, S, D]`."""
    size = output.square().mean().sqrt().clamp(min=1e-30)
    between = output.var(dim=0, correction=0).mean().sqrt()
    by_unit = output.flatten(0, 1).std(dim=0, correction=0)
    return {
        "stock_spread": float(between / size),
        "dead_units": float((by_unit <= DEAD_UNIT_STD * size).double().mean()),
    }
