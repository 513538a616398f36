"""What the components of a network put out on a block: do stocks still differ, do units still answer, where does
attention look. N stocks, S sessions, D units.

Measured on weights in evaluation mode, through hooks: whatever a component computes is seen, also what it should not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atft_pipeline.blocks import Block

DEAD_UNIT_STD: float = 1e-6
"""A unit whose output varies less than this share of the component's root mean square, over all stocks and sessions."""
ATTENTION = "attention_map"
"""Name of the identity through which a layer's attention weights pass, softmaxed over their last axis."""

Figures = dict[str, dict[str, float]]
"""Component -> metric -> value."""


@torch.no_grad()
def activation_figures(model: nn.Module, block: Block) -> Figures:
    """Of each named component that puts out states of stocks:

    `stock_spread`: std over the stocks, root mean square over sessions and units, over the root mean square of the
    output; 0 says that all stocks look the same. `dead_units`: share of the units that answer nothing.
    `attention_entropy`: mean entropy of its attention weights over the log of how many are above 0; 0 looks at one
    place, 1 at all alike.
    """
    outputs: defaultdict[str, list[Tensor]] = defaultdict(list)
    entropies: defaultdict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name, child in model.named_children():
        handles.append(child.register_forward_hook(_keeping(outputs[name])))
        for inner, module in child.named_modules():
            if inner.split(".")[-1] == ATTENTION:
                handles.append(module.register_forward_hook(_keeping(entropies[name], _entropy)))
    was_training = model.training
    model.eval()
    try:
        model(block)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    figures: Figures = {}
    for name, parts in outputs.items():
        if parts and all(part.ndim == 3 for part in parts):
            figures[name] = _spread(torch.cat([part.double() for part in parts]))
    for name, parts in entropies.items():
        rows = torch.cat(parts) if parts else torch.empty(0)
        if len(rows):  # none where every row has but one place to look at
            figures.setdefault(name, {})["attention_entropy"] = float(rows.mean())
    return figures


def _keeping(into: list[Tensor], change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(output, Tensor):
            into.append(change(output.detach().float()))

    return hook


def _entropy(weights: Tensor) -> Tensor:
    """Of rows that sum to 1 along the last axis, relative to equal weights; rows with one place left out."""
    places = (weights > 0).sum(dim=-1)
    entropy = -torch.xlogy(weights, weights).sum(dim=-1)
    several = places > 1
    return (entropy[several] / places[several].log()).reshape(-1)


def _spread(output: Tensor) -> dict[str, float]:
    """`output: [N, S, D]`."""
    size = output.square().mean().sqrt().clamp(min=1e-30)
    between = output.var(dim=0, correction=0).mean().sqrt()
    by_unit = output.flatten(0, 1).std(dim=0, correction=0)
    return {
        "stock_spread": float(between / size),
        "dead_units": float((by_unit <= DEAD_UNIT_STD * size).double().mean()),
    }
