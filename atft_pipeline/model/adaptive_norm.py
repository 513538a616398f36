"""Trailing normalisation of each stock's own history, beside the raw values.

Shapes: N stocks, T sessions, C channels, F features, D width, W normalisation window, Q = W // 2 + 1 frequencies.

Sources: Liu, Cheng, Li, Huang, Liu, Xie and Chen, Adaptive Normalization for Non-stationary Time Series Forecasting: A
Temporal Slice Perspective (SAN, NeurIPS 2023); Ye, Deng, Zou and Gui, Frequency Adaptive Normalization For
Non-stationary Time Series Forecasting (FAN, NeurIPS 2024, arXiv 2409.20371); Kim, Kim, Tae, Park, Choi and Choo,
Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution Shift (RevIN, ICLR 2022).

In all of them the statistics of a session are those of the stock's last W sessions, that session included. So a
session's value depends on no block and no later session. Missing values are excluded from the statistics and are 0
afterwards. The first W - 1 sessions are consumed. The raw values stay beside the normalised ones: without
them the IC on the quotes of Tokyo 2006-2015 falls from 0.059 to 0.032.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atft_pipeline.config.schema import ModelConfig

VARIANCE_FLOOR: float = 1e-3
"""Added to the trailing variance. Features are of order 1; a constant one must not turn rounding into signal."""

TIE_HANDICAP: float = 1e-5
"""Share of its power that a component loses per frequency when they are ranked, ten times the rounding of float32. One
spike in a flat window has the same power at all frequencies: the lowest is taken, and not one that rounding chose."""


class Normalised(NamedTuple):
    """`inputs: [N, T, C, F]` with the raw values as channel 0 and the missing indicator last; `removed`: what `restore`
    gives back, each `[N, T, F]` (mean and std; the component and its next value for `fan`; nothing for `none`)."""

    inputs: Tensor
    removed: tuple[Tensor, ...]


def window_sum(values: Tensor, window_sessions: int) -> Tensor:
    """Sums over windows of W sessions, bit for bit the same in every block: `[N, T, F] -> [N, T - W + 1, F]`.

    The window is put together from spans of 1, 2, 4, ... sessions, so the order of the additions is fixed. Running
    sums would depend on where the block starts, and a library's reduction on the block's shape.
    """
    windows = values.shape[1] - window_sessions + 1
    total = torch.zeros_like(values[:, :windows])
    span, length, begin = values, 1, 0
    while begin < window_sessions:
        if window_sessions & length:
            total += span[:, begin : begin + windows]
            begin += length
        span = span[:, :-length] + span[:, length:]
        length *= 2
    return total


def trailing_moments(x: Tensor, present: Tensor, window_sessions: int) -> tuple[Tensor, Tensor]:
    """Mean and floored std of the present values of each window, `[N, T - W + 1, F]`; of none: 0 and the floor's."""
    # In place throughout: at this size fresh memory costs more than arithmetic (a third of the step's time).
    count = window_sum(present.to(torch.int16), window_sessions).clamp_(min=1).to(x.dtype)
    mean = window_sum(x, window_sessions).div_(count)
    variance = window_sum(x * x, window_sessions).div_(count).addcmul_(mean, mean, value=-1.0).clamp_(min=0.0)
    return mean, variance.add_(VARIANCE_FLOOR).sqrt_()


class TrailingSliceNorm(nn.Module):
    """SAN in a trailing form: every feature minus its mean, over its std, of the stock's last W sessions.

    SAN cuts the lookback into slices, normalises each by its own statistics, predicts the statistics of the horizon
    from those removed and de-normalises the forecast with them. Departures: the slice is the trailing window of every
    session; there is no separate first training stage for the statistics, and de-normalisation is a learned linear map
    of the removed statistics added to the encoded state (`restore`), because the target is a cross-sectional score and
    not the input series itself.
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
        mean, std = trailing_moments(x, present, self.window_sessions)  # [N, T', F]
        inputs = x.new_empty(*mean.shape[:2], self.channels, mean.shape[2])  # [N, T', 3, F]
        raw, normalised, missing = inputs.unbind(dim=2)
        raw.copy_(x[:, first:])
        torch.sub(raw, mean, out=normalised).div_(std).mul_(present[:, first:])
        torch.sub(1.0, present[:, first:], out=missing)
        return Normalised(inputs, (mean, std))

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:
        """The encoded state `[N, S, D]` with what the S newest removed statistics say about the level added back."""
        return state + self.statistics(torch.cat(newest(removed, state), dim=-1))  # [N, S, 2F] -> [N, S, D]


class TrailingFrequencyNorm(nn.Module):
    """FAN in a trailing form: every feature minus the K largest Fourier components of the stock's last W sessions.

    FAN takes the discrete Fourier transform of the lookback, frequency 0 included, removes the K components of largest
    amplitude (the same selection here, for each stock, session and feature, not differentiated), predicts the removed
    part with an MLP and adds it to the forecast of the rest. Departures: the transform is taken of the trailing
    window of every session and kept at its newest position only; missing values count as the mean of the window's
    present ones; the removed part is predicted by its own frequencies, continued for one session, without an MLP and
    without the loss FAN trains it with; and what is added back to the encoded state is a learned linear map of the
    removed part and that continuation (`restore`), because the target is a cross-sectional score.
    """

    channels = 3
    transform: Tensor
    rank: Tensor
    positions: Tensor

    def __init__(self, num_features: int, hidden: int, window_sessions: int, frequencies: int) -> None:
        super().__init__()
        self.window_sessions = window_sessions
        self.frequencies = frequencies
        self.components = nn.Linear(2 * num_features, hidden)
        frequency = torch.arange(window_sessions // 2 + 1, dtype=torch.float64).unsqueeze(1)  # [Q, 1]
        angle = frequency * 2.0 * math.pi / window_sessions
        phase = angle * torch.arange(window_sessions - 1, -1, -1)  # [Q, W], the newest session at 0
        mirrored = 1.0 + (2 * frequency % window_sessions != 0)  # a frequency and its negative; 0 and 1/2 have none
        # Cosine and sine part of every component; at the newest session it is the cosine part, and one session on it
        # has turned by the angle of its frequency.
        transform = torch.cat((mirrored * phase.cos(), mirrored * phase.sin())) / window_sessions  # [2Q, W]
        here = torch.cat((torch.ones_like(angle), torch.zeros_like(angle)))
        ahead = torch.cat((angle.cos(), -angle.sin()))
        rank = (1.0 - TIE_HANDICAP * frequency) / mirrored**2  # [Q, 1]
        self.register_buffer("transform", transform.float(), persistent=False)
        self.register_buffer("rank", rank.float(), persistent=False)
        self.register_buffer("positions", torch.cat((here, ahead), dim=1).T.float(), persistent=False)  # [2, 2Q]

    @torch.no_grad()
    def forward(self, x: Tensor, present: Tensor) -> Normalised:
        """`x: [N, T, F]` with 0 where missing, `present: [N, T, F]` 1 or 0 -> T - W + 1 sessions."""
        first = self.window_sessions - 1
        absent = 1.0 - present
        count = window_sum(present, self.window_sessions).clamp_(min=1.0)
        mean = window_sum(x, self.window_sessions).div_(count)  # [N, T', F]
        removed = x.new_empty(*mean.shape[:2], 2, mean.shape[2])  # [N, T', 2, F]
        # One session at a time: a transform of all at once is 2Q times the block, and its products' shapes, which
        # decide how they are summed, would be the block's.
        for session in range(mean.shape[1]):
            window = slice(session, session + self.window_sessions)
            filled = torch.addcmul(x[:, window], mean[:, session, None], absent[:, window])  # [N, W, F]
            removed[:, session] = self.dominant(filled)
        inputs = x.new_empty(*mean.shape[:2], self.channels, mean.shape[2])  # [N, T', 3, F]
        raw, normalised, missing = inputs.unbind(dim=2)
        raw.copy_(x[:, first:])
        torch.sub(raw, removed[:, :, 0], out=normalised).mul_(present[:, first:])
        missing.copy_(absent[:, first:])
        return Normalised(inputs, removed.unbind(dim=2))

    def dominant(self, window: Tensor) -> Tensor:
        """Sum of the K largest components at the newest session and one further on: `[N, W, F] -> [N, 2, F]`."""
        with torch.autocast(window.device.type, enabled=False):  # 8 bits would choose other frequencies
            parts = (self.transform @ window).unflatten(1, (2, -1))  # [N, 2, Q, F]
            cosine, sine = parts.unbind(dim=1)
            power = (cosine * cosine).addcmul_(sine, sine).mul_(self.rank)  # [N, Q, F]
            kth = power.amax(dim=1, keepdim=True)
            below = torch.empty_like(power)  # comparisons into floats: products with bools cost five times as much
            for _ in range(self.frequencies - 1):
                kth = torch.lt(power, kth, out=below).mul_(power).amax(dim=1, keepdim=True)
            parts.mul_(power.ge_(kth).unsqueeze(1))
            return self.positions @ parts.flatten(1, 2)

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:
        """The encoded state `[N, S, D]` with what the S newest removed components say about the level added back."""
        return state + self.components(torch.cat(newest(removed, state), dim=-1))  # [N, S, 2F] -> [N, S, D]


class TrailingInstanceNorm(nn.Module):
    """RevIN in a trailing form: gamma * (x - mean) / std + beta, mean and std of the stock's last W sessions.

    RevIN normalises the lookback as one instance, scales and shifts it by a learned gamma and beta of each feature (eq.
    2), and reverses both at the output: std / gamma * (y - beta) + mean (eq. 3). Departures: the instance is the
    trailing window of every session; gamma is the exponential of its parameter, so that no step of the optimiser leads
    through a division by zero; and the reversal keeps its form, a * y + b with a = std / gamma and b = mean - a * beta,
    but acts on the encoded state, whose D entries are not the F features: a and b reach it through learned linear maps,
    the factor as a departure from 1.
    """

    channels = 3

    def __init__(self, num_features: int, hidden: int, window_sessions: int) -> None:
        super().__init__()
        self.window_sessions = window_sessions
        self.log_gamma = nn.Parameter(torch.zeros(num_features))
        self.beta = nn.Parameter(torch.zeros(num_features))
        self.factor = nn.Linear(num_features, hidden)
        self.level = nn.Linear(num_features, hidden)

    def forward(self, x: Tensor, present: Tensor) -> Normalised:
        """`x: [N, T, F]` with 0 where missing, `present: [N, T, F]` 1 or 0 -> T - W + 1 sessions."""
        with torch.no_grad():
            mean, std = trailing_moments(x, present, self.window_sessions)  # [N, T', F]
            raw, present = x[:, -mean.shape[1] :], present[:, -mean.shape[1] :]
            standardised = torch.sub(raw, mean).div_(std).mul_(present)
        normalised = torch.addcmul(self.beta * present, standardised, self.log_gamma.exp())
        return Normalised(torch.stack((raw, normalised, 1.0 - present), dim=2), (mean, std))  # [N, T', 3, F]

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:
        """The encoded state `[N, S, D]` de-normalised by the S newest statistics."""
        mean, std = newest(removed, state)  # [N, S, F]
        a = std * torch.exp(-self.log_gamma)
        return state * (1.0 + self.factor(a)) + self.level(mean - a * self.beta)


class RawInputs(nn.Module):
    """`none`: the raw values and the missing indicator, no parameters, no history."""

    channels = 2
    window_sessions = 1

    def forward(self, x: Tensor, present: Tensor) -> Normalised:
        """`x, present: [N, T, F]` -> the same T sessions."""
        return Normalised(torch.stack((x, 1.0 - present), dim=2), ())

    def restore(self, state: Tensor, removed: tuple[Tensor, ...]) -> Tensor:  # noqa: ARG002
        """The state as it is: nothing was removed."""
        return state


def newest(removed: tuple[Tensor, ...], state: Tensor) -> list[Tensor]:
    """What was removed at the sessions of `state: [N, S, D]`, the S newest: each `[N, S, F]`."""
    return [statistic[:, -state.shape[1] :] for statistic in removed]


AdaptiveNorm = TrailingSliceNorm | TrailingFrequencyNorm | TrailingInstanceNorm | RawInputs

NORMALISATIONS: dict[str, Callable[[ModelConfig, int], AdaptiveNorm]] = {
    "san": lambda config, features: TrailingSliceNorm(
        features, config.hidden_size, config.normalisation_window_sessions
    ),
    "fan": lambda config, features: TrailingFrequencyNorm(
        features, config.hidden_size, config.normalisation_window_sessions, config.fan_frequencies
    ),
    "revin": lambda config, features: TrailingInstanceNorm(
        features, config.hidden_size, config.normalisation_window_sessions
    ),
    "none": lambda _config, _features: RawInputs(),
}
"""`model.normalisation` to the component it names, for a number of features."""
