"""Trailing normalisation of each stock's own history, beside the raw values.

Shapes: N stocks, T sessions, C channels, F features, D width, W normalisation window.

Source: Liu, Cheng, Li, Huang, Liu, Xie and Chen, Adaptive Normalization for Non-stationary Time Series Forecasting: A
Temporal Slice Perspective (SAN, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

VARIANCE_FLOOR: float = 1e-3
"""Added to the trailing variance. Features are of order 1; a constant one must not turn rounding into signal."""


class Normalised(NamedTuple):
    """`inputs: [N, T, C, F]` with the raw values as channel 0 and the missing indicator last; `removed`: what `restore`
    gives back, mean and std `[N, T, F]` (empty for `none`)."""

    inputs: Tensor
    removed: tuple[Tensor, ...]


class TrailingSliceNorm(nn.Module):
    """SAN in a trailing form: every feature minus its mean, over its std, of the stock's last W sessions.

    SAN cuts the lookback into slices, normalises each by its own statistics, predicts the statistics of the horizon
    from those removed and de-normalises the forecast with them. Departures: the slice is the trailing window of every
    session, so that a session's value depends on no block and no later session; there is no separate first training
    stage for the statistics, and de-normalisation is a learned linear map of the removed statistics added to the
    encoded state (`restore`), because the target is a cross-sectional score and not the input series itself. The raw
    values stay beside the normalised ones: replacing them cost half the IC (DESIGN.md).

    Missing values are excluded from the statistics and are 0 afterwards. The first W - 1 sessions are consumed.
    """

    channels = 3

    def __init__(self, num_features: int, hidden: int, window_sessions: int) -> None:
        super().__init__()
        self.window_sessions = window_sessions
        self.statistics = nn.Linear(2 * num_features, hidden)

    @torch.no_grad()
    def forward(self, x: Tensor, present: Tensor) -> Normalised:
        """`x: [N, T, F]` with 0 where missing, `present: [N, T, F]` 1 or 0 -> T - W + 1 sessions."""
        first = self.window_sessions - 1
        # In place throughout: at this size fresh memory costs more than arithmetic (a third of the step's time).
        count = self._window_sum(present).clamp_(min=1.0)  # [N, T', F]
        mean = self._window_sum(x).div_(count)
        variance = self._window_sum(x * x).div_(count).addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)
        std = variance.add_(VARIANCE_FLOOR).sqrt_()
        inputs = x.new_empty(*mean.shape[:2], self.channels, mean.shape[2])  # [N, T', 3, F]
        raw, normalised, missing = inputs.unbind(dim=2)
        raw.copy_(x[:, first:])
        torch.sub(raw, mean, out=normalised).div_(std).mul_(present[:, first:])
        torch.sub(1.0, present[:, first:], out=missing)
        return Normalised(inputs, (mean, std))

    def _window_sum(self, values: Tensor) -> Tensor:
        """Sums over windows of W sessions, bit for bit the same in every block.

        The window is put together from spans of 1, 2, 4, ... sessions, so the order of the additions is fixed. Running
        sums would depend on where the block starts, and a library's reduction on the block's shape.
        """
        windows = values.shape[1] - self.window_sessions + 1
        total = torch.zeros_like(values[:, :windows])
        span, length, begin = values, 1, 0
        while begin < self.window_sessions:
            if self.window_sessions & length:
                total += span[:, begin : begin + windows]
                begin += length
            span = span[:, :-length] + span[:, length:]
            length *= 2
        return total

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:
        """The encoded state `[N, S, D]` with what the S newest removed statistics say about the level added back."""
        newest = torch.cat([statistic[:, -state.shape[1] :] for statistic in removed], dim=-1)  # [N, S, 2F]
        return state + self.statistics(newest)


class RawInputs(nn.Module):
    """`none`: the raw values and the missing indicator, no parameters, no history."""

    channels = 2
    window_sessions = 1

    def __init__(self, num_features: int, hidden: int, window_sessions: int) -> None:  # noqa: ARG002
        super().__init__()

    def forward(self, x: Tensor, present: Tensor) -> Normalised:
        """`x, present: [N, T, F]` -> the same T sessions."""
        return Normalised(torch.stack((x, 1.0 - present), dim=2), ())

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:  # noqa: ARG002
        """The state as it is: nothing was removed."""
        return state


NORMALISATIONS: dict[str, Callable[[int, int, int], TrailingSliceNorm | RawInputs]] = {
    "san": TrailingSliceNorm,
    "none": RawInputs,
}
