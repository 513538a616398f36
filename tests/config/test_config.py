"""Configuration: text becomes fields, each field is validated once, and every field has an effect."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from markets.market_factory import raw_tables

from atft_pipeline.config import schema
from atft_pipeline.config.overrides import (
    REPORT_VARIABLES,
    configured,
    from_dict,
    leaves,
    parse_assignments,
    report_overrides,
    to_dict,
    with_overrides,
)
from atft_pipeline.config.presets import PRESETS, preset
from atft_pipeline.config.schema import (
    DatasetConfig,
    EvaluationConfig,
    GraphConfig,
    GuardConfig,
    LossConfig,
    LossPhase,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    ScheduleConfig,
    SplitConfig,
    TrainConfig,
)
from atft_pipeline.config.slices import SLICES, Slice
from atft_pipeline.dataset.rows import build_dataset
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.errors import InputError
from atft_pipeline.graph.build import graph_at
from atft_pipeline.graph.membership import Membership, windows
from atft_pipeline.market import calendar
from atft_pipeline.market.universe import build_prices

# --- from text to fields ----------------------------------------------------------------------------------------------


def test_assignments_are_json_where_they_can_be_and_text_where_not() -> None:
    assigned = parse_assignments(
        ["train.optimizer.lr=1e-3", "model.graph=false", "train.schedule.name=plateau", "split.test_end = 2015-12-30"]
    )
    assert assigned == {
        "train.optimizer.lr": 0.001,
        "model.graph": False,
        "train.schedule.name": "plateau",
        "split.test_end": "2015-12-30",
    }
    assert parse_assignments(["split.test_end=a=b"]) == {"split.test_end": "a=b"}, "only the first = separates"


def test_overrides_replace_the_named_fields_and_no_others() -> None:
    before = preset("quick")
    after = with_overrides(before, {"model.hidden_size": 512, "train.optimizer.lr": 1, "split.test_start": None})
    assert (after.model.hidden_size, after.train.optimizer.lr) == (512, 1.0)
    assert isinstance(after.train.optimizer.lr, float), "an integer is a valid value of a float field"
    assert with_overrides(after, {"model.hidden_size": 32, "train.optimizer.lr": before.train.optimizer.lr}) == before


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_own_record(name: str) -> None:
    assert from_dict(to_dict(preset(name))) == preset(name)


def test_phases_and_weights_survive_the_record() -> None:
    phases = (LossPhase(1, 5, {"mse": 1.0, "ic": 0.0}), LossPhase(6, 9, {"sharpe": 0.3}))
    config = PipelineConfig(train=TrainConfig(loss=LossConfig(phases=phases, horizon_weights=(1.0, 0.0, 0.0, 0.5))))
    assert from_dict(to_dict(config)) == config


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="expected one of cpu, production, quick, found 'huge'"):
        preset("huge")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model.hiden_size": 8}, r"unknown field 'model.hiden_size'; expected one of attention_heads, .*hidden_size"),
        ({"modell.hidden_size": 8}, r"no section 'modell' in 'modell.hidden_size'; sections: dataset, evaluation, gr"),
        ({"train.optimizer.lr.x": 8}, r"no section 'train.optimizer.lr'"),
        ({"model": {"hidden_size": 8}}, r"'model' is a section; set its fields"),
        ({"model.hidden_size": "many"}, r"model.hidden_size: expected int, found 'many'"),
        ({"model.hidden_size": 8.0}, r"model.hidden_size: expected int, found 8.0"),
        ({"train.epochs": True}, r"train.epochs: expected int, found True"),
        ({"model.graph": "yes"}, r"model.graph: expected bool, found 'yes'"),
        ({"train.optimizer.lr": True}, r"train.optimizer.lr: expected float, found True"),
        ({"train.optimizer.lr": float("inf")}, r"train.optimizer.lr: expected a finite number"),
        ({"train.optimizer.lr": float("nan")}, r"train.optimizer.lr: expected a finite number"),
        ({"split.test_start": 2015}, r"split.test_start: expected str, found 2015"),
        (
            {"model.normalisation": "layer"},
            r"model.normalisation: expected one of \['san', 'fan', 'revin', 'none'\], found 'layer'",
        ),
        (
            {"model.normalisation": "fan", "model.fan_frequencies": 11},
            r"model.fan_frequencies: expected 1 to half of normalisation_window_sessions \(20\), found 11",
        ),
        ({"train.loss.phases": 5}, r"train.loss.phases: cannot use 5"),
        ({"train.loss.phases": [{"first_epoch": 1}]}, r"train.loss.phases: cannot use .*last_epoch"),
        ({"train.loss.horizon_weights": 1.0}, r"train.loss.horizon_weights: cannot use 1.0"),
    ],
)
def test_what_is_no_field_or_no_value_of_it_is_refused(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        with_overrides(PipelineConfig(), overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["model.hidden_size", "=8", ""])
def test_an_assignment_needs_a_field_and_a_value(text: str) -> None:
    with pytest.raises(InputError, match="expected FIELD=VALUE"):
        parse_assignments([text])


# --- the report's variables -------------------------------------------------------------------------------------------

WEIGHTS = {
    "SHARPE_WEIGHT": "train.loss.sharpe",
    "CS_IC_WEIGHT": "train.loss.ic",
    "RANKIC_WEIGHT": "train.loss.rank_ic",
    "VARIANCE_PENALTY_WEIGHT": "train.loss.variance_penalty",
}


@pytest.mark.parametrize(("variable", "field"), WEIGHTS.items())
def test_weight_variables_set_their_loss_term(variable: str, field: str) -> None:
    assert report_overrides({variable: "0.25", "PATH": "/bin"}) == {field: 0.25}
    assert report_overrides({variable: ""}) == {}, "an empty variable is an unset one"


def test_plateau_variables_select_the_schedule_that_reads_them() -> None:
    config = with_overrides(PipelineConfig(), report_overrides({"PLATEAU_PATIENCE": "7", "PLATEAU_FACTOR": "0.3"}))
    assert config.train.schedule == ScheduleConfig(name="plateau", patience=7, factor=0.3)


def test_phase_variable_is_a_table_of_epoch_ranges() -> None:
    text = '{"1-5": {"mse": 1.0}, "6": {"mse": 0, "sharpe": 0.3}}'
    loss = with_overrides(PipelineConfig(), report_overrides({"PHASE_LOSS_WEIGHTS": text})).train.loss
    assert [loss.weights_at(epoch)["mse"] for epoch in (1, 5, 6, 7)] == [1.0, 1.0, 0.0, 1.0]
    assert [loss.weights_at(epoch)["sharpe"] for epoch in (5, 6, 7)] == [0.0, 0.3, 0.0]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SHARPE_WEIGHT": "high"}, "SHARPE_WEIGHT: expected a number for train.loss.sharpe, found 'high'"),
        ({"RANKIC_WEIGHT": "true"}, "RANKIC_WEIGHT: expected a number"),
        ({"CS_IC_WEIGHT": "-1"}, "train.loss.ic: expected at least 0"),
        ({"PLATEAU_PATIENCE": "1.5"}, "train.schedule.patience: expected int"),
        ({"PLATEAU_FACTOR": "1"}, "train.schedule.factor: expected 0 < value < 1"),
        ({"PHASE_LOSS_WEIGHTS": "mse"}, "PHASE_LOSS_WEIGHTS: expected JSON like"),
        ({"PHASE_LOSS_WEIGHTS": '{"first": {"mse": 1}}'}, "expected an epoch range like '1-5', found 'first'"),
        ({"PHASE_LOSS_WEIGHTS": '{"1-": {"mse": 1}}'}, "expected an epoch range like '1-5', found '1-'"),
        ({"PHASE_LOSS_WEIGHTS": '{"5-1": {"mse": 1}}'}, "expected 1 <= first <= last epoch, found 5-1"),
        ({"PHASE_LOSS_WEIGHTS": '{"1-5": {"mae": 1}}'}, r"unknown loss terms \['mae'\]"),
        ({"PHASE_LOSS_WEIGHTS": '{"1-5": {"mse": "1"}}'}, "train.loss.phases.weights.mse: expected float"),
        ({"PHASE_LOSS_WEIGHTS": '{"1-5": 1}'}, "train.loss.phases.weights: cannot use 1"),
    ],
)
def test_variables_that_mean_nothing_are_refused(variables: dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        with_overrides(PipelineConfig(), report_overrides(variables))


# --- preset, report variables, overrides ------------------------------------------------------------------------------

TRAINING = ("split", "model", "train", "evaluation")


def test_preset_variables_and_overrides_come_in_this_order_and_are_recorded() -> None:
    variables = {"SHARPE_WEIGHT": "0.3", "CS_IC_WEIGHT": "0.2"}
    config, recorded = configured("cpu", {"train.loss.ic": 0.5}, variables, sections=TRAINING, reader="the test")
    assert (config.train.loss.sharpe, config.train.loss.ic) == (0.3, 0.5)
    assert config.train.optimizer == preset("cpu").train.optimizer
    assert recorded == {"preset": "cpu", "train.loss.sharpe": 0.3, "train.loss.ic": 0.5}


def test_the_report_s_variables_count_where_training_is_read() -> None:
    config, recorded = configured("quick", {}, {"SHARPE_WEIGHT": "high"}, sections=("graph",), reader="the test")
    assert (config, recorded) == (preset("quick"), {"preset": "quick"})


def test_a_field_that_is_not_read_is_refused_before_the_preset_is_looked_up() -> None:
    with pytest.raises(
        InputError, match=r"^here: override 'train.seed' has no effect .* the test reads only graph\.\*$"
    ):
        configured("none", {"train.seed": 2}, {}, sections=("graph",), reader="the test", where="here: ")
    with pytest.raises(InputError, match="preset: expected one of cpu, production, quick, found 'none'"):
        configured("none", {"graph.neighbours": 2}, {}, sections=("graph",), reader="the test")


# --- places that move together ----------------------------------------------------------------------------------------


def names_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_report_variable_sets_a_field_that_exists() -> None:
    assert set(REPORT_VARIABLES.values()) <= set(leaves(to_dict(PipelineConfig())))


def test_every_loss_weight_is_a_term() -> None:
    """Trainer, diagnosis and `weights_at` go through `LOSS_TERMS`: they would ignore a weight that is no term."""
    assert names_of(LossConfig) == {*schema.LOSS_TERMS, "horizon_weights", "phases"}


def test_every_execution_has_its_delay() -> None:
    assert set(schema.EXECUTION_DELAY_SESSIONS) == set(typing.get_args(schema.Execution))


def test_every_slice_has_its_column() -> None:
    assert set(SLICES) == set(typing.get_args(Slice))


def test_every_schedule_has_a_test_and_reads_only_fields_that_exist() -> None:
    """A new schedule or field: the learning rate in training/schedule.py and its diagnosis have to know it."""
    assert typing.get_args(schema.ScheduleName) == ("cosine", "plateau", "constant")
    assert names_of(ScheduleConfig) == {"name", "warmup_fraction", "min_lr_ratio", "patience", "factor"}


def test_every_preset_is_a_function_of_its_name() -> None:
    assert {name: make.__name__ for name, make in PRESETS.items()} == {name: name for name in PRESETS}


# --- validation -------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: DatasetConfig(execution="later"), "dataset.execution"),  # type: ignore[arg-type]
    (lambda: DatasetConfig(min_history_sessions=0), "dataset.min_history_sessions"),
    (lambda: GraphConfig(lookback_sessions=19), "graph.lookback_sessions"),
    (lambda: GraphConfig(neighbours=0), "graph.neighbours"),
    (lambda: GraphConfig(refresh_sessions=0), "graph.refresh_sessions"),
    (lambda: GraphConfig(shrinkage=1.0), "graph.shrinkage"),
    (lambda: GraphConfig(universe="big"), "graph.universe"),  # type: ignore[arg-type]
    (lambda: SplitConfig(scheme="random"), "split.scheme"),  # type: ignore[arg-type]
    (lambda: SplitConfig(train_fraction=0.8), "leave something for test"),
    (lambda: SplitConfig(validation_fraction=0.0), "must be positive"),
    (lambda: SplitConfig(test_sessions=1), "at least 2"),
    (lambda: SplitConfig(embargo_sessions=-1), "split.embargo_sessions"),
    (lambda: SplitConfig(scheme="dates", validation_start="2012-01-04"), "validation_start and test_start"),
    (lambda: ModelConfig(attention_heads=0), "model.attention_heads"),
    (lambda: ModelConfig(gat_heads=-1), "gat_heads"),
    (lambda: ModelConfig(hidden_size=10), "model.hidden_size"),
    (lambda: ModelConfig(hidden_size=33, attention_heads=3), "model.hidden_size"),
    (lambda: ModelConfig(window_sessions=1), "model.window_sessions"),
    (lambda: ModelConfig(encoder_layers=-1), "model.encoder_layers"),
    (lambda: ModelConfig(encoder_layers=20), "model.encoder_layers"),
    (lambda: ModelConfig(normalisation="layer"), "model.normalisation"),  # type: ignore[arg-type]
    (lambda: ModelConfig(normalisation_window_sessions=1), "model.normalisation_window_sessions"),
    (lambda: ModelConfig(normalisation="fan", fan_frequencies=0), "model.fan_frequencies"),
    (lambda: ModelConfig(normalisation="fan", normalisation_window_sessions=3), "model.fan_frequencies"),
    (lambda: ModelConfig(dropout=1.0), "model.dropout"),
    (lambda: OptimizerConfig(lr=-1.0), "train.optimizer.lr"),
    (lambda: OptimizerConfig(weight_decay=-1.0), "train.optimizer.weight_decay"),
    (lambda: OptimizerConfig(clip_norm=0.0), "train.optimizer.clip_norm"),
    (lambda: ScheduleConfig(name="step"), "train.schedule.name"),  # type: ignore[arg-type]
    (lambda: ScheduleConfig(warmup_fraction=1.0), "train.schedule.warmup_fraction"),
    (lambda: ScheduleConfig(min_lr_ratio=1.5), "train.schedule.min_lr_ratio"),
    (lambda: ScheduleConfig(patience=-1), "train.schedule.patience"),
    (lambda: ScheduleConfig(factor=1.0), "train.schedule.factor"),
    (lambda: LossPhase(0, 5, {}), "1 <= first <= last"),
    (lambda: LossPhase(1, 5, {"mae": 1.0}), "unknown loss terms"),
    (lambda: LossPhase(1, 5, {"mse": -1.0}), "weight of mse: expected at least 0"),
    (lambda: LossConfig(sharpe=-0.1), "train.loss.sharpe"),
    (lambda: LossConfig(horizon_weights=(1.0,)), "train.loss.horizon_weights: expected 4"),
    (lambda: LossConfig(horizon_weights=(0.0, 1.0, 1.0, 1.0)), "horizon 1 decides the verdict"),
    (lambda: LossConfig(phases=(LossPhase(1, 5, {}), LossPhase(5, 6, {}))), "two phases cover the same epoch"),
    (lambda: TrainConfig(loss=LossConfig(mse=0.0)), "at least one weight must be positive; in epoch 1 none is"),
    (
        lambda: TrainConfig(epochs=6, loss=LossConfig(mse=0.0, phases=(LossPhase(1, 5, {"ic": 1.0}),))),
        "in epoch 6 none is",
    ),
    (lambda: GuardConfig(dispersion_ratio=0.0), "train.guard.dispersion_ratio"),
    (lambda: GuardConfig(patience=0), "train.guard.patience"),
    (lambda: GuardConfig(warmup_epochs=-1), "train.guard.warmup_epochs"),
    (lambda: TrainConfig(epochs=0), "train.epochs"),
    (lambda: TrainConfig(batch_size=0), "train.batch_size"),
    (lambda: TrainConfig(seed=-1), "train.seed"),
    (lambda: TrainConfig(seed=2**63), "train.seed"),
    (lambda: TrainConfig(universe="big"), "train.universe"),  # type: ignore[arg-type]
    (lambda: TrainConfig(precision="half"), "train.precision"),  # type: ignore[arg-type]
    (lambda: TrainConfig(weight_ema=1.0), "train.weight_ema"),
    (lambda: TrainConfig(panel="disk"), "train.panel"),  # type: ignore[arg-type]
    (lambda: TrainConfig(loader_workers=-1), "train.loader_workers"),
    (lambda: EvaluationConfig(cost_bps=-1.0), "evaluation.cost_bps"),
    (lambda: EvaluationConfig(cost_bps=float("inf")), "evaluation.cost_bps"),
    (lambda: EvaluationConfig(quantile=0.6), "evaluation.quantile"),
    (lambda: EvaluationConfig(universe="big"), "evaluation.universe"),  # type: ignore[arg-type]
    (lambda: EvaluationConfig(criterion_epoch=0), "evaluation.criterion_epoch"),
    (lambda: EvaluationConfig(bootstrap_samples=0), "evaluation.bootstrap_samples"),
]


@pytest.mark.parametrize(("make", "field"), REFUSALS, ids=[field for _, field in REFUSALS])
def test_values_out_of_range_are_refused_by_the_field_s_name(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(InputError, match=field) as error:
        make()
    assert "\n" not in str(error.value)


def test_every_validated_class_has_a_case_that_fires() -> None:
    validated = {
        name for name, kind in vars(schema).items() if dataclasses.is_dataclass(kind) and "__post_init__" in vars(kind)
    }
    assert validated == {
        "DatasetConfig", "GraphConfig", "SplitConfig", "ModelConfig", "OptimizerConfig", "ScheduleConfig", "LossPhase",
        "LossConfig", "GuardConfig", "TrainConfig", "EvaluationConfig",
    }  # fmt: skip


# --- every field has an effect ----------------------------------------------------------------------------------------


def test_every_dataset_field_changes_the_dataset() -> None:
    tables = {name: raw_tables(stocks=20, sessions=120)[name] for name in ("prices", "listed", "index")}
    # Days on which both markets trade: either calendar refuses quotes of the other's holidays.
    days = tables["prices"]["Date"]
    common = calendar.sessions("us", days.min(), days.max()).tolist()
    tables["prices"] = tables["prices"].filter(pl.col("Date").is_in(common))

    def fingerprint(config: DatasetConfig) -> tuple[Any, ...]:
        result = build_prices(tables, config)
        features, membership, manifest = build_dataset(result.panel, result.quarantine, tables, config, {})
        investable = membership["is_investable"].to_numpy().sum()
        return (investable, np.nansum(features["target_5d"].to_numpy()), manifest["days_per_year"])

    default = DatasetConfig(min_history_sessions=40)
    changed = {"market": "us", "execution": "same_close", "min_history_sessions": 60}
    assert_every_field_matters(default, changed, fingerprint)


def test_every_graph_field_changes_the_graph() -> None:
    rng = np.random.default_rng(0)
    T, N = 150, 24
    sector = np.tile(np.arange(N, dtype=np.int32) % 3, (T, 1))
    returns = rng.normal(size=(T, 3))[:, sector[0]] + rng.normal(size=(T, N))
    member = {"all": np.ones((T, N), bool), "liquid": np.tile(np.arange(N) < 16, (T, 1))}
    sessions = np.datetime64("2020-01-06") + np.arange(T)
    codes = np.array([f"{n:04}" for n in range(N)])

    def fingerprint(config: GraphConfig) -> tuple[Any, ...]:
        inputs = (returns.astype(np.float32), member[config.universe], sector, np.zeros_like(sector))
        graph = graph_at(Membership(sessions, codes, *inputs), windows(T, config), config)
        return (len(graph.refreshes), len(graph.source), graph.edge_attr.sum(), int(graph.source.sum()))

    changed = {
        "lookback_sessions": 60,
        "neighbours": 3,
        "refresh_sessions": 10,
        "sector_demeaned": False,
        "shrinkage": 0.5,
        "universe": "all",
    }
    assert_every_field_matters(GraphConfig(lookback_sessions=100), changed, fingerprint)


SPLIT_CASES: dict[str, tuple[SplitConfig, Any]] = {
    "scheme": (SplitConfig(validation_sessions=60, test_sessions=60), "sessions"),
    "train_fraction": (SplitConfig(), 0.5),
    "validation_fraction": (SplitConfig(), 0.3),
    "validation_sessions": (SplitConfig(scheme="sessions", validation_sessions=60, test_sessions=60), 70),
    "test_sessions": (SplitConfig(scheme="sessions", validation_sessions=60, test_sessions=60), 70),
    "train_start": (SplitConfig(scheme="dates", validation_start="2020-07-01", test_start="2020-10-01"), "2020-02-01"),
    "validation_start": (
        SplitConfig(scheme="dates", validation_start="2020-07-01", test_start="2020-10-01"), "2020-06-01",
    ),
    "test_start": (SplitConfig(scheme="dates", validation_start="2020-07-01", test_start="2020-10-01"), "2020-11-01"),
    "test_end": (SplitConfig(scheme="dates", validation_start="2020-07-01", test_start="2020-10-01"), "2020-12-01"),
    "embargo_sessions": (SplitConfig(), 5),
}  # fmt: skip


def test_every_split_field_changes_the_split() -> None:
    sessions = np.datetime64("2020-01-01") + np.arange(400)

    def parts(config: SplitConfig) -> tuple[Any, ...]:
        split = make_split(sessions, config)
        return tuple((part[0], part[-1]) for part in (split.train, split.validation, split.test))

    assert set(SPLIT_CASES) == {field.name for field in dataclasses.fields(SplitConfig)}
    for name, (config, value) in SPLIT_CASES.items():
        assert parts(config) != parts(dataclasses.replace(config, **{name: value})), f"split.{name} has no effect"


def assert_every_field_matters(
    default: Any, changed: dict[str, Any], fingerprint: Callable[[Any], tuple[Any, ...]]
) -> None:
    fields = {field.name for field in dataclasses.fields(default)}
    assert set(changed) == fields, "give each field of the class a value that must change the result"
    before = fingerprint(default)
    assert fingerprint(default) == before, "the fingerprint itself must not vary"
    for name, value in changed.items():
        after = fingerprint(dataclasses.replace(default, **{name: value}))
        assert after != before, f"{type(default).__name__}.{name} has no effect"
