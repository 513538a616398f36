"""Figures of the components' outputs, on a network of identities whose outputs are all known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained
from torch import Tensor, nn
from training_runs import Data, header, series, settings, train_quietly

from atft_pipeline.batches.block import Block
from atft_pipeline.batches.block_dataset import BlockDataset
from atft_pipeline.batches.panel import Panel, load_panel
from atft_pipeline.config.overrides import from_dict
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.graph.store import load_graph
from atft_pipeline.model.atft_gat_fan import ATFTGATFAN
from atft_pipeline.training import trainer as training
from atft_pipeline.training.telemetry.activations import ATTENTION, OBSERVED_SESSIONS, Figures, observing

STOCKS, SESSIONS, UNITS = 5, 3, 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(ATTENTION, nn.Identity())

    def forward(self, weights: Tensor) -> Tensor:
        getattr(self, ATTENTION)(weights)
        return weights.sum()  # of one axis: no state of stocks


class Network(nn.Module):
    """Hands `states: [N, S, D]` and attention weights through components that change nothing."""

    def __init__(self, states: Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        self.states, self.weights = states, weights
        self.fusion, self.encoder = nn.Identity(), Attention()

    def forward(self, block: Block) -> Tensor:  # noqa: ARG002
        if self.weights is not None:
            self.encoder(self.weights)
        return self.fusion(self.states)


BLOCK: Block = None  # type: ignore[assignment]  # the network above reads none of it


EVERYONE = torch.ones(STOCKS, SESSIONS, dtype=torch.bool)


def figures_of(model: nn.Module, block: Block = BLOCK, member: Tensor = EVERYONE) -> Figures:
    with observing(model) as activations, torch.no_grad():
        model(block)
    return activations.figures(member)


def states() -> Tensor:
    return torch.randn(STOCKS, SESSIONS, UNITS, generator=torch.Generator().manual_seed(0))


def test_equal_stocks_have_no_spread_whatever_the_sessions_do() -> None:
    alike = states()[:1].expand(STOCKS, -1, -1)
    assert figures_of(Network(alike))["fusion"]["stock_spread"] == pytest.approx(0.0, abs=1e-7)


def test_spread_is_the_root_mean_variance_over_stocks_by_the_root_mean_square() -> None:
    given = states().double().numpy()
    expected = np.sqrt(given.var(axis=0).mean()) / np.sqrt((given**2).mean())
    assert figures_of(Network(states()))["fusion"]["stock_spread"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dead", [0, 2, UNITS])
def test_units_that_never_answer_are_counted(dead: int) -> None:
    given = states()
    given[:, :, :dead] = 0.7
    assert figures_of(Network(given))["fusion"]["dead_units"] == dead / UNITS


def test_state_of_nothing_but_zeros_is_finite() -> None:
    figures = figures_of(Network(torch.zeros(STOCKS, SESSIONS, UNITS)))["fusion"]
    assert figures == {"stock_spread": 0.0, "dead_units": 1.0}


@pytest.mark.parametrize(
    ("row", "entropy"),
    [
        ([0.25, 0.25, 0.25, 0.25], 1.0),
        ([0.5, 0.5, 0.0, 0.0], 1.0),
        ([1.0, 1e-30, 0.0, 0.0], 0.0),
        ([0.75, 0.25, 0.0, 0.0], -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))),
    ],
    ids=["all alike", "masked places do not count", "one place", "in between"],
)
def test_entropy_is_relative_to_equal_weights(row: list[float], entropy: float) -> None:
    weights = torch.tensor([row, row])
    found = figures_of(Network(states(), weights))["encoder"]
    assert found == {"attention_entropy": pytest.approx(entropy, abs=1e-6)}


def test_row_with_one_place_to_look_at_decides_nothing() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    found = figures_of(Network(states(), weights))["encoder"]
    assert found["attention_entropy"] == pytest.approx(1.0)


def test_attention_that_may_look_at_one_place_alone_has_no_entropy() -> None:
    """A window of one session: there is nothing to collapse, and NaN is no figure."""
    found = figures_of(Network(states(), torch.ones(4, 1)))
    assert "attention_entropy" not in found.get("encoder", {})


def test_last_sessions_alone_are_looked_at() -> None:
    late = torch.randn(STOCKS, OBSERVED_SESSIONS, UNITS, generator=torch.Generator().manual_seed(1))
    early = torch.zeros(STOCKS, 9, UNITS)
    assert figures_of(Network(torch.cat([early, late], dim=1))) == figures_of(Network(late))


def test_rows_looked_at_lie_all_over_the_map() -> None:
    """Half of a long map looks at one place and half at all alike."""
    apart = torch.tensor([[1.0, 1e-30, 0.0], [0.5, 0.5, 0.0]]).repeat_interleave(5000, dim=0)
    assert figures_of(Network(states(), apart))["encoder"]["attention_entropy"] == pytest.approx(0.5, abs=0.15)


def test_stocks_that_are_no_members_then_do_not_count() -> None:
    """Listed earlier or later in the block: they have no neighbours, so that no graph makes them like the others."""
    others = torch.randn(3, OBSERVED_SESSIONS + 2, UNITS, generator=torch.Generator().manual_seed(2))
    alike = torch.ones(STOCKS, OBSERVED_SESSIONS + 2, UNITS)
    member = torch.zeros(STOCKS + 3, OBSERVED_SESSIONS + 2, dtype=torch.bool)
    member[3:, -1] = True
    member[:3, :2] = True
    states = torch.cat([others, alike])
    assert figures_of(Network(states), member=member)["fusion"]["stock_spread"] == pytest.approx(0.0, abs=1e-7)
    assert figures_of(Network(states), member=torch.ones_like(member))["fusion"]["stock_spread"] > 0.1


@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (4, 16), (3, 5)])
def test_heads_that_collapse_are_seen_beside_heads_that_do_not(heads: int, queries: int) -> None:
    """`[N, A, Q, K]`, the last head looking at one place: rows drawn in even steps would be of one head."""
    weights = torch.full((64 * 18, heads, queries, 3), 1 / 3)
    weights[:, -1] = torch.tensor([1.0, 1e-30, 1e-30])
    entropy = figures_of(Network(states(), weights))["encoder"]["attention_entropy"]
    assert entropy == pytest.approx(1 - 1 / heads, abs=0.2)


def test_training_records_the_figures_of_every_epoch(trained: Trained) -> None:
    run = trained()
    for component, metric in (("gat", "stock_spread"), ("fusion", "dead_units"), ("gat", "attention_entropy")):
        found = series(run, metric, split="validation", component=component)
        assert list(found) == [*range(1, header(run)["epochs_done"] + 1)]
        assert all(0.0 <= value <= 1.0 for value in found.values())


def test_a_session_without_members_in_the_middle_is_passed_over(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied(*arguments: Any) -> Panel:
        panel = load_panel(*arguments)
        validation = make_split(panel.sessions, settings().split).validation
        panel.member[validation[len(validation) // 2]] = False
        return panel

    monkeypatch.setattr(training, "load_panel", emptied)
    train_quietly(settings({"train.epochs": 1}), data, tmp_path / "run")
    assert list(series(tmp_path / "run", "stock_spread", split="validation", component="gat")) == [1]


def test_hooks_are_gone_also_after_a_failure() -> None:
    network = Network(states(), torch.ones(2, 2) / 2)
    figures_of(network)
    network.fusion.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures_of(network)
    assert all(not module._forward_hooks for module in network.modules())


def test_measuring_a_trained_network_changes_none_of_its_scores(data: Data, trained: Trained) -> None:
    run = header(trained())
    config = from_dict(run["config"])
    panel = load_panel(data.dataset, config.train.universe)
    torch.manual_seed(0)
    model = ATFTGATFAN(config.model, len(panel.feature_names)).eval()
    block = BlockDataset(panel, load_graph(data.graph), model.receptive_field).block(np.array([200, 201]))
    before = model(block)
    figures = figures_of(model, block, block.member)
    assert torch.equal(model(block), before)
    assert {"backbone_projection", "gat", "fusion", "temporal_encoder"} <= set(figures)
    assert 0.0 < figures["temporal_encoder"]["attention_entropy"] <= 1.0
