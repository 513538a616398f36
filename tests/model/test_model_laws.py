"""Laws of the model: one score per stock and session, which does not depend on the block it is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from atft_pipeline.batches.block import Block, NeighbourTable
from atft_pipeline.config.schema import HORIZONS, LossConfig, ModelConfig
from atft_pipeline.model import ATFTGATFAN
from atft_pipeline.model import gat as gat_module
from atft_pipeline.model.adaptive_norm import (
    NORMALISATIONS,
    TIE_HANDICAP,
    VARIANCE_FLOOR,
    TrailingFrequencyNorm,
    TrailingInstanceNorm,
    TrailingSliceNorm,
)
from atft_pipeline.model.atft_gat_fan import ENCODED_AT_ONCE
from atft_pipeline.model.gat import CORR_MIDDLE, CORR_UNIT, GraphAttention
from atft_pipeline.model.temporal_encoder import BandedAttention, bands
from atft_pipeline.training.losses import CompositeLoss

N, F, SESSIONS = 6, 5, 60
SMALL = ModelConfig(
    hidden_size=8,
    window_sessions=8,
    encoder_layers=2,
    attention_heads=2,
    normalisation_window_sessions=5,
    gat_heads=2,
)
CONFIGS = {
    "small": SMALL,
    "no graph": replace(SMALL, graph=False),
    "frequency normalisation": replace(SMALL, normalisation="fan"),
    "frequency normalisation, even window": replace(
        SMALL, normalisation="fan", normalisation_window_sessions=6, fan_frequencies=3
    ),
    "instance normalisation": replace(SMALL, normalisation="revin"),
    "no normalisation": replace(SMALL, normalisation="none"),
    "no skip": replace(SMALL, skip=False),
    "no gates": replace(SMALL, feature_gates=False),
    "no encoder": replace(SMALL, encoder_layers=0),
    "one layer": replace(SMALL, encoder_layers=1, window_sessions=20),
    "three layers": replace(SMALL, encoder_layers=3, window_sessions=7),
}
NORMALISED = {name: replace(SMALL, normalisation=name) for name in NORMALISATIONS}
NAMED_COMPONENTS = {
    "variable_selection",
    "adaptive_norm",
    "temporal_encoder",
    "backbone_projection",
    "fusion",
    "prediction_head",
    "gat",
}
WITHOUT = {"no graph": "gat", "no encoder": "temporal_encoder"}
TOLERANCE = 1e-5  # float32, other order of summation


class Market:
    """A tiny panel of one graph, from which any block can be cut."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(N, SESSIONS, F, generator=g)
        self.missing = torch.rand(N, SESSIONS, F, generator=g) < 0.15
        self.missing[2, :33] = True  # a stock that starts late
        self.missing[4, 40:44] = True  # and one with a hole
        self.target = 0.02 * torch.randn(N, SESSIONS, len(HORIZONS), generator=g)
        self.edges = torch.tensor([[0, 1, 2, 3, 1], [1, 0, 0, 1, 2]])  # stocks 4 and 5 have none
        self.attr = torch.rand(5, 3, generator=g)

    def block(self, sessions: range, receptive_field: int, stocks: list[int] | None = None) -> Block:
        stocks = list(range(N)) if stocks is None else stocks
        begin = sessions[0] - receptive_field + 1
        pad = max(-begin, 0)
        rows = slice(max(begin, 0), sessions[-1] + 1)
        missing = torch.nn.functional.pad(self.missing[stocks, rows], (0, 0, pad, 0), value=True)
        x = torch.nn.functional.pad(self.x[stocks, rows], (0, 0, pad, 0)).masked_fill(missing, 0.0)
        place = {stock: i for i, stock in enumerate(stocks)}
        ends = [(place[a], place[b], e) for e, (a, b) in enumerate(self.edges.T.tolist()) if {a, b} <= set(stocks)]
        neighbours = NeighbourTable(
            torch.zeros(len(sessions), len(stocks), 3, dtype=torch.int64),
            torch.zeros(len(sessions), len(stocks), 3, dtype=torch.bool),
            torch.zeros(len(sessions), len(stocks), 3, 3),
        )
        for source, target, e in ends:
            k = int(neighbours.is_edge[0, target].sum())
            neighbours.source[:, target, k] = source
            neighbours.is_edge[:, target, k] = True
            neighbours.attributes[:, target, k] = self.attr[e]
        return Block(
            session_index=torch.tensor(sessions),
            stock_index=torch.tensor(stocks),
            x=x,
            missing=missing,
            member=torch.ones(len(stocks), len(sessions), dtype=torch.bool),
            target=self.target[stocks, sessions[0] : sessions[-1] + 1],
            neighbours=neighbours,
        )


def model(config: ModelConfig = SMALL, seed: int = 1) -> ATFTGATFAN:
    """A network whose every parameter matters: biases by lag start at zero and would hide an error."""
    torch.manual_seed(seed)
    network = ATFTGATFAN(config, F).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def scores(network: ATFTGATFAN, market: Market, sessions: range, stocks: list[int] | None = None) -> torch.Tensor:
    return network(market.block(sessions, network.receptive_field, stocks))


def windowed(network: ATFTGATFAN, market: Market, sessions: range) -> torch.Tensor:
    """The reference: every session scored alone, from its last R sessions."""
    return torch.cat([scores(network, market, range(s, s + 1)) for s in sessions], dim=1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sessions", [range(0, 5), range(25, 26), range(20, 60)], ids=["start", "one", "many"])
def test_block_equals_the_windowed_reference(config: ModelConfig, sessions: range) -> None:
    network, market = model(config), Market()
    together = scores(network, market, sessions)
    assert together.shape == (N, len(sessions), len(HORIZONS))
    torch.testing.assert_close(together, windowed(network, market, sessions), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_some_stocks_at_a_time_score_as_all_at_once(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    network, market = model(config), Market()
    block = market.block(range(20, 40), network.receptive_field)
    encoded: list[int] = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda x, missing: encoded.append(len(x)) or encode(x, missing))
    together = network(block)
    monkeypatch.setitem(ENCODED_AT_ONCE, "cpu", 2 * block.x[0].numel() + 1)
    with torch.no_grad():
        torch.testing.assert_close(network(block), together, atol=TOLERANCE, rtol=0)
    assert encoded == [N, 2, 2, 2]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_score_is_the_same_in_every_block(config: ModelConfig) -> None:
    network, market = model(config), Market()
    one, other = scores(network, market, range(20, 37)), scores(network, market, range(29, 58))
    torch.testing.assert_close(one[:, 9:], other[:, :8], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_later_session_changes_a_score(config: ModelConfig) -> None:
    network, market, changed = model(config), Market(), Market()
    changed.x[:, 40:] = 7.0
    changed.missing[:, 40:] = ~changed.missing[:, 40:]
    before, after = scores(network, market, range(30, 45)), scores(network, changed, range(30, 45))
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=TOLERANCE, rtol=0)
    assert (before[:, 10:] - after[:, 10:]).abs().amax() > 1e-2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_receptive_field_is_exact(config: ModelConfig) -> None:
    """Garbage before the last R sessions changes nothing; at the oldest of them it does."""
    network, market, t = model(config), Market(), 50
    oldest = t - network.receptive_field + 1
    before = scores(network, market, range(t, t + 1))
    for first_kept, same in [(oldest, True), (oldest + 1, False)]:
        garbage = Market()
        garbage.x[:, :first_kept] = 50.0
        garbage.missing[:, :first_kept] = False
        # Cut with more history than needed, so that only the network decides how far it looks back.
        with torch.no_grad():
            after = network(garbage.block(range(t - 9, t + 1), network.receptive_field))[:, -1:]
        assert torch.allclose(before, after, atol=TOLERANCE, rtol=0) is same


def test_receptive_field_formula() -> None:
    for config in CONFIGS.values():
        trailing = config.normalisation_window_sessions - 1 if config.normalisation != "none" else 0
        window = config.window_sessions if config.encoder_layers else 1
        layers = bands(window, config.encoder_layers) if config.encoder_layers else []
        assert 1 + sum(band - 1 for band in layers) == window
        assert model(config).receptive_field == window + trailing


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_permuting_stocks_permutes_scores(config: ModelConfig) -> None:
    network, market = model(config), Market()
    order = [3, 0, 5, 1, 4, 2]
    torch.testing.assert_close(
        scores(network, market, range(40, 50), order),
        scores(network, market, range(40, 50))[order],
        atol=TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_a_stock_changes_only_those_it_has_an_edge_to(config: ModelConfig) -> None:
    network, market = model(config), Market()
    before = scores(network, market, range(40, 50))
    for stock, readers in [(3, {3, 1}), (5, {5}), (0, {0, 1})]:
        changed = Market()
        changed.x[stock] += 1.0
        changed.missing[stock, :, 0] = True
        moved = (scores(network, changed, range(40, 50)) - before).abs().amax(dim=(1, 2)) > TOLERANCE
        assert set(moved.nonzero().flatten().tolist()) == readers


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_a_stock_without_edges_scores_as_if_it_were_alone(config: ModelConfig) -> None:
    network, market = model(config), Market()
    together = scores(network, market, range(40, 50))[4:]
    torch.testing.assert_close(scores(network, market, range(40, 50), [4, 5]), together, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_what_lies_under_a_missing_value_changes_nothing(config: ModelConfig) -> None:
    network, market = model(config), Market()
    block = market.block(range(40, 50), network.receptive_field)
    garbage = torch.where(block.missing, torch.full_like(block.x, 9.0), block.x)
    with torch.no_grad():
        torch.testing.assert_close(network(replace(block, x=garbage)), network(block))
    inputs, _ = network.adaptive_norm(block.x, (~block.missing).float())
    weights = network.variable_selection.weights(inputs)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_a_missing_value_is_not_a_zero(config: ModelConfig) -> None:
    network, market = model(config), Market()
    market.x[0, 45, 0], market.missing[0, 45, 0] = 0.0, False
    before = scores(network, market, range(45, 46))
    market.missing[0, 45, 0] = True
    assert (scores(network, market, range(45, 46))[0] - before[0]).abs().max() > 1e-4


def test_trailing_norm_matches_its_definition() -> None:
    market = Market()
    norm = TrailingSliceNorm(F, 8, 5)
    inputs, (mean, std) = norm(market.x.masked_fill(market.missing, 0.0), (~market.missing).float())
    for i in range(N):
        for t in range(4, SESSIONS):
            for f in range(F):
                kept = ~market.missing[i, t - 4 : t + 1, f]
                values = market.x[i, t - 4 : t + 1, f][kept].double()
                expected_mean = values.mean() if len(values) else torch.tensor(0.0)
                variance = values.var(correction=0) if len(values) else torch.tensor(0.0)
                expected_std = (variance + VARIANCE_FLOOR).sqrt()
                found = inputs[i, t - 4, :, f]
                raw = torch.tensor(0.0) if market.missing[i, t, f] else market.x[i, t, f]
                normalised = 0.0 if market.missing[i, t, f] else (raw - expected_mean) / expected_std
                assert found.tolist() == pytest.approx(
                    [raw.item(), float(normalised), float(market.missing[i, t, f])], abs=1e-4
                )
                assert mean[i, t - 4, f].item() == pytest.approx(float(expected_mean), abs=1e-5)
                assert std[i, t - 4, f].item() == pytest.approx(float(expected_std), abs=1e-5)


def windows(market: Market, length: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Stock, session, feature and its last `length` values in float64, NaN where missing; a loop, on purpose."""
    values = market.x.double().masked_fill(market.missing, torch.nan).numpy()
    for i in range(N):
        for t in range(length - 1, SESSIONS):
            for f in range(F):
                yield i, t, f, values[i, t - length + 1 : t + 1, f]


def observed(market: Market) -> tuple[torch.Tensor, torch.Tensor]:
    return market.x.masked_fill(market.missing, 0.0), (~market.missing).float()


@pytest.mark.parametrize(("length", "frequencies"), [(5, 1), (5, 2), (6, 1), (6, 3), (9, 2), (20, 4)])
def test_frequency_norm_matches_the_fft_of_every_window(length: int, frequencies: int) -> None:
    market = Market()
    inputs, (component, ahead) = TrailingFrequencyNorm(F, 8, length, frequencies)(*observed(market))
    for i, t, f, window in windows(market, length):
        kept = ~np.isnan(window)
        filled = np.where(kept, window, window[kept].mean() if kept.any() else 0.0)
        spectrum = np.fft.rfft(filled)
        rank = np.abs(spectrum) ** 2 * (1.0 - TIE_HANDICAP * np.arange(len(spectrum)))
        spectrum[np.argsort(-rank)[frequencies:]] = 0.0
        removed = np.fft.irfft(spectrum, n=length)
        place = (i, t - length + 1)
        assert component[*place, f].item() == pytest.approx(removed[-1], abs=TOLERANCE)
        assert ahead[*place, f].item() == pytest.approx(removed[0], abs=TOLERANCE)  # it has period `length`
        expected = [window[-1], window[-1] - removed[-1], 0.0] if kept[-1] else [0.0, 0.0, 1.0]
        assert inputs[*place, :, f].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_frequency_norm_takes_a_level_and_a_wave_away_and_continues_them() -> None:
    t = torch.arange(SESSIONS + 1, dtype=torch.float64)
    wave = (3.0 + 2.0 * torch.sin(2 * torch.pi * 3 * t / 20 + 0.7)).float().view(1, -1, 1)
    x = wave[:, :-1]
    inputs, (component, ahead) = TrailingFrequencyNorm(1, 8, 20, 2)(x, torch.ones_like(x))
    assert inputs[:, :, 1].abs().max() < TOLERANCE
    torch.testing.assert_close(component, wave[:, 19:-1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ahead, wave[:, 20:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [5, 8, 20])
def test_equal_amplitudes_go_to_the_lower_frequency(length: int) -> None:
    """One spike has the same amplitude at every frequency, wherever it stands: its mean is removed, not rounding."""
    x = torch.zeros(1, 2 * length - 1, 1)
    x[:, length - 1] = 1.7
    _, (component, ahead) = TrailingFrequencyNorm(1, 8, length, 1)(x, torch.ones_like(x))
    torch.testing.assert_close(component, torch.full_like(component, 1.7 / length))
    torch.testing.assert_close(ahead, component)


def random_instance_norm(hidden: int, length: int) -> TrailingInstanceNorm:
    torch.manual_seed(3)
    norm = TrailingInstanceNorm(F, hidden, length)
    torch.nn.init.normal_(norm.log_gamma, std=0.5)
    torch.nn.init.normal_(norm.beta)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 6, 20])
def test_instance_norm_matches_its_definition(length: int) -> None:
    market, norm = Market(), random_instance_norm(8, length)
    inputs, (mean, std) = norm(*observed(market))
    gamma, beta = norm.log_gamma.double().exp().numpy(), norm.beta.double().numpy()
    for i, t, f, window in windows(market, length):
        kept = window[~np.isnan(window)]
        expected_mean, variance = (kept.mean(), kept.var()) if len(kept) else (0.0, 0.0)
        expected_std = np.sqrt(variance + VARIANCE_FLOOR)
        place = (i, t - length + 1)
        assert mean[*place, f].item() == pytest.approx(expected_mean, abs=TOLERANCE)
        assert std[*place, f].item() == pytest.approx(expected_std, abs=TOLERANCE)
        normalised = gamma[f] * (window[-1] - expected_mean) / expected_std + beta[f]
        expected = [0.0, 0.0, 1.0] if np.isnan(window[-1]) else [window[-1], normalised, 0.0]
        assert inputs[*place, :, f].tolist() == pytest.approx(expected, abs=1e-4)  # the floor magnifies by 30


def test_gamma_and_beta_learn_from_the_normalised_values() -> None:
    """Not only from `restore`: beta moves every present value by one, gamma by the standardised value."""
    norm = random_instance_norm(8, 5)
    x, present = observed(Market())
    normalised = norm(x, present).inputs[:, :, 1]
    normalised.sum().backward()
    present = present[:, 4:]
    assert norm.beta.grad is not None
    assert norm.log_gamma.grad is not None
    torch.testing.assert_close(norm.beta.grad, present.sum(dim=(0, 1)))
    scaled = (normalised.detach() - norm.beta.detach()) * present  # gamma times the standardised value
    torch.testing.assert_close(norm.log_gamma.grad, scaled.sum(dim=(0, 1)), atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_restore_gives_back_what_was_removed() -> None:
    """With as many entries as features and maps that mix none, the state may be the normalised values themselves."""
    market, identity = Market(), torch.eye(F)
    x, present = observed(market)
    instance, frequency = random_instance_norm(F, 5), TrailingFrequencyNorm(F, F, 5, 2)
    for linear, bias in [(instance.factor, -1.0), (instance.level, 0.0)]:
        linear.weight.copy_(identity)
        linear.bias.fill_(bias)
    frequency.components.weight.copy_(torch.cat((identity, torch.zeros(F, F)), dim=1))
    frequency.components.bias.zero_()
    for norm in (instance, frequency):
        inputs, removed = norm(x, present)
        restored = norm.restore(inputs[:, -7:, 1], removed) * present[:, -7:]
        torch.testing.assert_close(restored, x[:, -7:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_restore_continues_the_removed_components() -> None:
    frequency = TrailingFrequencyNorm(F, F, 5, 2)
    frequency.components.weight.copy_(torch.cat((torch.zeros(F, F), torch.eye(F)), dim=1))
    frequency.components.bias.zero_()
    _, (component, ahead) = frequency(*observed(Market()))
    torch.testing.assert_close(frequency.restore(torch.ones(N, 7, F), (component, ahead)), 1.0 + ahead[:, -7:])


@torch.no_grad()
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalised_inputs_are_the_same_in_every_block_bit_for_bit(name: str) -> None:
    """Not only to 1e-5: a frequency chosen by rounding would be another one in another block."""
    norm = NORMALISATIONS[name](NORMALISED[name], F)
    x, present = observed(Market())
    inputs, removed = norm(x, present)
    skipped = norm.window_sessions - 1
    for begin, stocks in [(7, [0, 1, 2, 3, 4, 5]), (30, [5, 2, 0]), (41, [4])]:
        part, of_part = norm(x[stocks, begin:50], present[stocks, begin:50])
        assert torch.equal(part, inputs[stocks, begin : 50 - skipped])
        for one, other in zip(of_part, removed, strict=True):
            assert torch.equal(one, other[stocks, begin : 50 - skipped])


@torch.no_grad()
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_keeps_full_precision_under_autocast(name: str) -> None:
    norm = NORMALISATIONS[name](NORMALISED[name], F)
    full = norm(*observed(Market())).inputs
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(*observed(Market())).inputs, full)


@torch.no_grad()
@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("value", [0.0, 5.0, -1e4])
def test_a_constant_feature_carries_no_signal(name: str, value: float) -> None:
    """Nor does one that is missing throughout; what rounding leaves is far below the values."""
    norm = NORMALISATIONS[name](NORMALISED[name], F)
    x, present = torch.full((2, 30, F), value), torch.ones(2, 30, F)
    x[1], present[1] = 0.0, 0.0
    inputs, removed = norm(x, present)
    assert torch.isfinite(inputs).all()
    assert all(torch.isfinite(statistic).all() for statistic in removed)
    assert (inputs[0, :, 0] == value).all()
    assert (inputs[:, :, 1:-1].abs() <= 1e-6 * abs(value)).all()
    assert inputs[1, :, -1].all()
    assert not inputs[1, :, :-1].any()


@pytest.mark.parametrize(("band", "length"), [(2, 3), (5, 40), (20, 35), (20, 100), (7, 7)])
def test_banded_attention_matches_the_dense_matrix(band: int, length: int) -> None:
    torch.manual_seed(0)
    attention = BandedAttention(8, 2, band)
    torch.nn.init.normal_(attention.lag_bias)
    h = torch.randn(3, length, 8)
    observed = torch.rand(3, length) > 0.3
    q, (k, v) = attention.query(h), attention.key_value(h).chunk(2, dim=-1)
    q, k, v = (m.view(3, length, 2, 4).transpose(1, 2) for m in (q, k, v))
    dense = torch.full((3, 2, length, length), -torch.inf)
    for t in range(length):
        for u in range(max(0, t - band + 1), t + 1):
            seen = observed[:, u] | (t == u)
            value = (q[:, :, t] * k[:, :, u]).sum(-1) / 2.0 + attention.lag_bias[:, t - u]
            dense[:, :, t, u] = torch.where(seen[:, None], value, -torch.inf)
    expected = attention.output((dense.softmax(-1) @ v).transpose(1, 2).reshape(3, length, 8))
    torch.testing.assert_close(attention(h, observed), expected[:, band - 1 :], atol=TOLERANCE, rtol=0)


def train_step(network: ATFTGATFAN, block: Block) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss = CompositeLoss(LossConfig())(network(block), block.target, block.member, epoch=1)
    loss.total.backward()
    optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_component_gets_a_gradient_and_moves(name: str) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    network, market = ATFTGATFAN(config, F), Market()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train_step(network, market.block(range(36, 52), network.receptive_field))
    children = dict(network.named_children())
    assert set(children) == NAMED_COMPONENTS - {WITHOUT.get(name)}
    for component, child in children.items():
        parameters = dict(child.named_parameters(prefix=component))
        assert bool(parameters) is not (component == "adaptive_norm" and config.normalisation == "none")
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-7, name
            assert not torch.equal(parameter, before[name]), name


BASES = {"fan_frequencies": NORMALISED["fan"]}
CHANGED = {
    "hidden_size": 16,
    "window_sessions": 9,
    "feature_gates": False,
    "encoder_layers": 3,
    "attention_heads": 4,
    "normalisation": "none",
    "normalisation_window_sessions": 6,
    "fan_frequencies": 1,
    "skip": False,
    "graph": False,
    "gat_heads": 4,
    "dropout": 0.5,
}


@pytest.mark.parametrize("field", [f.name for f in fields(ModelConfig)])
def test_every_configuration_field_has_an_effect(field: str) -> None:
    market, results, base = Market(), [], BASES.get(field, SMALL)
    for config in (base, replace(base, **{field: CHANGED[field]})):
        torch.manual_seed(0)
        network = ATFTGATFAN(config, F).train(field == "dropout")
        torch.manual_seed(0)
        results.append(scores(network, market, range(40, 50)))
    assert (results[0] - results[1]).abs().max() > 1e-6


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_scores_are_float32_under_autocast(config: ModelConfig) -> None:
    network, market = model(config), Market()
    full = scores(network, market, range(40, 50))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scores(network, market, range(40, 50))
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - full).abs().max() < 0.3  # bf16 keeps 8 bits


@pytest.mark.parametrize("config", NORMALISED.values(), ids=NORMALISED)
def test_training_under_autocast_reaches_every_parameter(config: ModelConfig) -> None:
    torch.manual_seed(0)
    network, market = ATFTGATFAN(config, F), Market()
    with torch.autocast("cpu", torch.bfloat16):
        result = network(market.block(range(36, 52), network.receptive_field))
    result.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_reset_output_redraws_the_last_layer_from_the_generator() -> None:
    network = model()
    inner = network.prediction_head.hidden[0].weight.clone()
    draws = []
    for seed in (5, 5, 6):
        network.prediction_head.reset_output(torch.Generator().manual_seed(seed))
        draws.append(network.prediction_head.output.weight.detach().clone())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() <= SMALL.hidden_size**-0.5
    assert torch.equal(inner, network.prediction_head.hidden[0].weight)


@pytest.mark.parametrize("at_once", [1, 3, 4, 9])
def test_attention_over_the_table_is_pygs_over_the_edges(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of sessions attended to at once."""
    from torch_geometric.nn import GATv2Conv  # seconds, which other tests need not wait for

    torch.manual_seed(0)
    stocks, days, width, most = 30, 4, 8, 5
    monkeypatch.setattr(gat_module, "ATTENDED_AT_ONCE", at_once * stocks * most * width)
    gat = GraphAttention(width, 2, dropout=0.0).double()
    h = torch.randn(stocks, days, width, dtype=torch.float64, requires_grad=True)
    known = torch.rand(days, stocks, most) < 0.7
    known[0, 3] = False  # nobody to listen to
    place = torch.randint(0, stocks, known.shape).masked_fill(~known, 0)
    table = NeighbourTable(place, known, torch.rand(*known.shape, 3, dtype=torch.float64))

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return list(torch.autograd.grad((out * weight).sum(), [h, *gat.parameters()]))

    day = torch.arange(days)[:, None, None] * stocks
    ends = torch.stack([place + day, torch.arange(stocks)[None, :, None].expand_as(place) + day])
    corr = (table.attributes[..., :1] - CORR_MIDDLE) / CORR_UNIT
    attributes = torch.cat((corr, table.attributes[..., 1:]), dim=-1)
    nodes = gat.norm(h).transpose(0, 1).reshape(-1, width)
    reference = GATv2Conv(width, width // 2, heads=2, edge_dim=3, add_self_loops=False, bias=False)
    reference.load_state_dict(gat.attention.state_dict())
    for name in ("att", "lin_l.weight", "lin_r.weight", "lin_edge.weight"):  # one graph of gradients for both
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, gat.attention.get_parameter(name))
    messages = reference(nodes, ends[:, known], attributes[known])
    expected = h + messages.view(days, stocks, width).transpose(0, 1)
    found = gat(h, table)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[3, 0], h[3, 0])
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_block_without_edges_is_scored() -> None:
    network, market = model(), Market()
    market.edges, market.attr = market.edges[:, :0], market.attr[:0]
    assert torch.isfinite(scores(network, market, range(0, 3))).all()
