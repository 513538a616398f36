"""Probes: each finds nothing on an honest run and its own fault on a spoilt one, or says why it cannot run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Trained
from run_directories import healthy, honest_probes, write_probe
from training_runs import Data, header, newest_predictions, settings, with_scores

from atft_pipeline.cli import main
from atft_pipeline.config.overrides import to_dict
from atft_pipeline.config.schema import DatasetConfig, GraphConfig
from atft_pipeline.dataset.layout import TARGETS, write_dataset
from atft_pipeline.dataset.rows import build_dataset, partition_record
from atft_pipeline.dataset.splits import make_split
from atft_pipeline.diagnostics.causes import REMEDIES
from atft_pipeline.diagnostics.changes import lowered, raised
from atft_pipeline.diagnostics.diagnose import diagnose
from atft_pipeline.diagnostics.gather import gather
from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.probes.remedy import remedy
from atft_pipeline.diagnostics.probes.rescore import REPRODUCES
from atft_pipeline.diagnostics.probes.run import PROBE_SIGNALS, PROBES, run_probes, stored_probes
from atft_pipeline.diagnostics.report.sections import to_markdown
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError
from atft_pipeline.graph.store import build_graph_file
from atft_pipeline.inspection.reader import open_record
from atft_pipeline.market.contracts import read_checked
from atft_pipeline.market.sources import open_source
from atft_pipeline.market.synthetic import write_market
from atft_pipeline.market.universe import build_prices
from atft_pipeline.storage.artifact import read_manifest, write_manifest

pytestmark = pytest.mark.slow(reason="trained runs, probed")

RETURNS = "returns_1d"


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a trained run, to be spoilt."""
    return Path(shutil.copytree(trained(), tmp_path / "run"))


def probed(name: str, run_dir: Path) -> Figures:
    record = open_record(run_dir)
    try:
        return PROBES[name](RunInputs(record))
    finally:
        record.connection.close()


def stored(name: str, run_dir: Path) -> dict[str, Any]:
    """Content of the file that the probe leaves."""
    record = open_record(run_dir)
    run_probes(record, [name])
    record.connection.close()
    content: dict[str, Any] = json.loads((run_dir / "probes" / f"{name}.json").read_text())
    return content


def change_header(run_dir: Path, **values: object) -> None:
    (run_dir / "run.json").write_text(json.dumps(header(run_dir) | values))


def change_weights(run_dir: Path, epoch: int, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = run_dir / "checkpoints" / f"epoch_{epoch:03d}.pt"
    content = torch.load(path, weights_only=True)
    content["weights"] = {name: change(name, value) for name, value in content["weights"].items()}
    torch.save(content, path)


# Scores ----------------------------------------------------------------------------------------------------------


def test_honest_predictions_are_those_of_their_checkpoint(trained: Trained) -> None:
    found = probed("rescore", trained())
    assert set(found) == set(PROBE_SIGNALS["rescore"])
    assert found["rescored_gap"] <= REPRODUCES
    assert found["rescored_correlation"] == pytest.approx(1.0)
    assert found["rescored_epoch"] == 3.0


def test_rescored_ic_is_the_one_recorded(trained: Trained) -> None:
    record = open_record(trained())
    (recorded,) = record.rows(
        "SELECT value FROM evals WHERE epoch = 3 AND split = 'validation' AND slice = 'all' AND metric = 'ic_mean'"
    )
    record.connection.close()
    assert probed("rescore", trained())["rescored_ic"] == pytest.approx(recorded[0], abs=1e-5)


def test_predictions_of_an_earlier_epoch_are_named(run: Path) -> None:
    shutil.copy(run / "predictions" / "epoch_001.parquet", newest_predictions(run))
    found = probed("rescore", run)
    assert found["rescored_gap"] > 0.05
    assert found["rescored_epoch"] == 1.0


def test_negated_predictions_are_those_of_no_checkpoint(run: Path) -> None:
    with_scores(lambda scores: -scores)(run)
    found = probed("rescore", run)
    assert found["rescored_correlation"] == pytest.approx(-1.0)
    assert found["rescored_epoch"] == -1.0


def test_weights_of_another_checkpoint_are_seen(run: Path) -> None:
    change_weights(run, 3, lambda _, value: 1.5 * value)
    assert probed("rescore", run)["rescored_gap"] > 0.05


def test_constant_predictions_have_a_gap_and_no_correlation(run: Path) -> None:
    with_scores(lambda scores: 0.0 * scores)(run)
    found = probed("rescore", run)
    assert found["rescored_gap"] > 0.05
    assert found["rescored_correlation"] is None


# Data ------------------------------------------------------------------------------------------------------------

Built = tuple[pa.Table, pa.Table, dict[str, Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Features, membership and manifest of a small market that lies on disk."""
    source = tmp_path_factory.mktemp("source")
    write_market(source, stocks=25, sessions=200, seed=2)
    tables = dict(read_checked(open_source(source)).tables)
    prices = build_prices(tables, DatasetConfig())
    return build_dataset(prices.panel, prices.quarantine, tables, DatasetConfig(), {"path": str(source)})


def run_on(folder: Path, features: pa.Table, membership: pa.Table, manifest: dict[str, Any]) -> Path:
    """The directory of a run that says it was made on this dataset."""
    dataset = folder / "ml_dataset.parquet"
    write_dataset(dataset, features, membership, manifest)
    return run_on_dataset(folder, dataset)


def run_on_dataset(folder: Path, dataset: Path) -> Path:
    manifest = read_manifest(dataset)
    run_dir = folder / "run"
    run_dir.mkdir()
    run = {"key": "k", "config": to_dict(settings()), "dataset_path": str(dataset)}
    (run_dir / "run.json").write_text(json.dumps(run | {"dataset_fingerprint": manifest["fingerprint"]}))
    return run_dir


def with_parts_of(features: pa.Table, membership: pa.Table, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, rewritten to describe these rows."""
    months = [np.datetime_as_string(t["Date"].to_numpy().astype("datetime64[M]")) for t in (features, membership)]
    parts = {
        name: partition_record(
            features.filter(pa.array(months[0] == name)), membership.filter(pa.array(months[1] == name))
        )
        for name in manifest["parts"]
    }
    return manifest | {"parts": parts}


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values.cast(table.schema.field(name).type))


def test_honest_dataset_follows_from_its_source(built: Built, tmp_path: Path) -> None:
    found = probed("data", run_on(tmp_path, *built))
    assert set(found) == set(PROBE_SIGNALS["data"])
    assert found.pop("features_know_later_names") == "none"
    assert found == dict.fromkeys(found, 0.0)


def test_honest_dataset_by_months_follows_from_its_source(built: Built, tmp_path: Path) -> None:
    """As the assets keep it: its manifest says more of a month than what the month holds."""
    dataset, (_, _, manifest) = tmp_path / "dataset", built
    assert main(["features", manifest["source"]["path"], str(dataset), "--json"]) == 0
    run_dir = run_on_dataset(tmp_path, dataset)
    found = probed("data", run_dir)
    assert found.pop("features_know_later_names") == "none"
    assert found == dict.fromkeys(found, 0.0)
    part = sorted(dataset.glob("*.parquet"))[4]
    table = pq.read_table(part)
    pq.write_table(replaced(table, RETURNS, pc.if_else(pc.is_null(table[RETURNS]), 0.5, table[RETURNS])), part)
    assert probed("data", run_dir)["parts_unlike_manifest"] == 1.0


def test_altered_feature_is_another_month_than_the_manifest_describes(built: Built, tmp_path: Path) -> None:
    features, membership, manifest = built
    last = pc.equal(features["Date"], features["Date"][-1])
    altered = replaced(features, RETURNS, pc.if_else(last, 0.5, features[RETURNS]))
    found = probed("data", run_on(tmp_path, altered, membership, manifest))
    assert found["parts_unlike_manifest"] == 1.0
    assert found["features_know_later"] == 0.0  # that session is after the validation


def test_feature_that_knows_the_future_is_named_though_the_manifest_was_rewritten(built: Built, tmp_path: Path) -> None:
    features, membership, manifest = built
    leaking = replaced(features, RETURNS, pc.coalesce(features["target_1d"], features[RETURNS]))
    found = probed("data", run_on(tmp_path, leaking, membership, with_parts_of(leaking, membership, manifest)))
    assert found["parts_unlike_manifest"] == 0.0
    assert (found["features_know_later"], found["features_know_later_names"]) == (1.0, RETURNS)
    assert (found["rows_unlike_source"], found["targets_unlike_source"]) == (0.0, 0.0)


def test_rows_that_are_missing_are_a_share_of_all(built: Built, tmp_path: Path) -> None:
    features, membership, manifest = built
    stock = features["Code"][len(features) // 2]
    kept = [table.filter(pc.not_equal(table["Code"], stock)) for table in (features, membership)]
    found = probed("data", run_on(tmp_path, *kept, with_parts_of(*kept, manifest)))
    assert found["rows_unlike_source"] == pytest.approx(1 / 25 / 2, abs=0.01)
    assert found["parts_unlike_manifest"] == 0.0


def test_targets_of_another_session_do_not_follow_from_the_source(built: Built, tmp_path: Path) -> None:
    features, membership, manifest = built
    values = features["target_1d"].to_numpy()
    shifted = replaced(features, "target_1d", pa.array(np.roll(values, 1)))
    found = probed("data", run_on(tmp_path, shifted, membership, with_parts_of(shifted, membership, manifest)))
    assert found["targets_unlike_source"] > 0.9
    assert found["features_know_later"] == 0.0
    assert set(TARGETS) <= set(shifted.column_names)


def test_without_its_source_a_dataset_is_held_against_its_manifest_alone(built: Built, tmp_path: Path) -> None:
    features, membership, manifest = built
    gone = manifest | {"source": {"path": str(tmp_path / "gone")}}
    run_dir = run_on(tmp_path, features, membership, gone)
    assert probed("data", run_dir) == {"parts_unlike_manifest": 0.0}
    signals = gather(open_record(run_dir))
    assert signals["features_know_later"] is None


# Graph, baseline, ablation ---------------------------------------------------------------------------------------


def test_honest_graph_is_the_one_that_the_dataset_gives(trained: Trained) -> None:
    assert probed("graph", trained()) == {"edges_unlike_dataset": 0.0}


def test_graph_of_other_correlations_is_seen(run: Path, data: Data, tmp_path: Path) -> None:
    """Built with a shorter lookback, and described as if it were the run's."""
    graph = tmp_path / "graph.parquet"
    honest = json.loads(Path(f"{data.graph}.manifest.json").read_text())
    config = GraphConfig(**honest["config"] | {"lookback_sessions": 20})
    build_graph_file(data.dataset, graph, config)
    write_manifest(graph, honest)
    change_header(run, graph_path=str(graph))
    assert probed("graph", run)["edges_unlike_dataset"] > 0.1


def test_graph_that_is_another_by_now_is_not_held_against_the_run(run: Path, data: Data, tmp_path: Path) -> None:
    """Scores through other edges are others, and no fault of the run's."""
    graph = tmp_path / "graph.parquet"
    build_graph_file(data.dataset, graph, GraphConfig(lookback_sessions=20, neighbours=3, universe="all"))
    change_header(run, graph_path=str(graph))
    for name in ("rescore", "graph", "ablate", "replay"):
        assert "not the graph that the run was trained on" in stored(name, run)["not_made"]


def test_baseline_is_held_against_the_run_session_by_session(run: Path) -> None:
    honest = probed("baseline", run)
    assert set(honest) == set(PROBE_SIGNALS["baseline"])
    assert honest["baseline_train_ic"] > honest["baseline_ic"]  # ridge of 82 features, in sample
    for path in (run / "daily").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(replaced(table, "ic", pc.add(table["ic"], 0.2)), path)
    better = probed("baseline", run)
    assert better["over_baseline_t"] > honest["over_baseline_t"] + 2.0
    assert {k: v for k, v in better.items() if k != "over_baseline_t"} == pytest.approx(
        {k: v for k, v in honest.items() if k != "over_baseline_t"}
    )


def test_graph_whose_weights_are_zero_is_idle_though_it_hands_on_what_it_was_given(run: Path) -> None:
    change_weights(run, 3, lambda name, value: 0.0 * value if name.startswith("gat.") else value)
    found = probed("ablate", run)
    assert found["drop_t_gat"] == 0.0
    assert found["drop_t_fusion"] != 0.0


def test_ablation_measures_every_component_that_has_weights(trained: Trained) -> None:
    found = probed("ablate", trained())
    measured = {name.removeprefix("drop_t_") for name in found if name.startswith("drop_t_")}
    assert measured == {"variable_selection", "temporal_encoder", "backbone_projection", "gat", "fusion"}


# Replay and remedy -----------------------------------------------------------------------------------------------


def test_first_epoch_trained_again_gives_the_same_weights(trained: Trained) -> None:
    threads = torch.get_num_threads()
    assert probed("replay", trained()) == {"replay_differs": 0.0, "replay_initial_differs": 0.0}
    assert torch.get_num_threads() == threads


def test_weights_that_no_replay_gives_are_seen(run: Path) -> None:
    for path in (run / "evals").glob("epoch_001*.parquet"):
        table = pq.read_table(path)
        pq.write_table(replaced(table, "weights_hash", pa.array(["elsewhere"] * len(table))), path)
    assert probed("replay", run) == {"replay_differs": 1.0, "replay_initial_differs": 0.0}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"code_revision": "older"}, "the code has changed since the run"),
        ({"device": "NVIDIA H100"}, "only runs of one process on a CPU promise the same bits"),
        ({"processes": 2}, "only runs of one process on a CPU promise the same bits"),
    ],
    ids=str,
)
def test_replay_that_would_prove_nothing_is_not_made(change: dict[str, Any], sentence: str, run: Path) -> None:
    change_header(run, **change)
    content = stored("replay", run)
    assert (content["not_made"], content["figures"]) == (sentence, {})
    assert gather(open_record(run))["replay_differs"] is None


def test_remedy_without_a_change_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = RunInputs(open_record(run))
    monkeypatch.setitem(REMEDIES, "lr_too_high", (raised("train.loader_workers", 1, at_least=1),))
    assert remedy(inputs, "lr_too_high") == {"remedy_ic_gain": 0.0, "remedy_ic_gain_t": None}
    monkeypatch.setitem(REMEDIES, "lr_too_high", (lowered("train.loader_workers", 1),))
    with pytest.raises(InputError, match=r"leave nothing to change \(`train\.loader_workers` is 0 already"):
        remedy(inputs, "lr_too_high")
    with pytest.raises(InputError, match="settings"):
        remedy(inputs, "cached_predictions")


# Probes that cannot be made, and what is stored of those that were ------------------------------------------------

OBSTACLES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no predictions": ("rescore", lambda run: shutil.rmtree(run / "predictions"), "no readable predictions"),
    "no checkpoint of the epoch": (
        "rescore",
        lambda run: (run / "checkpoints" / "epoch_003.pt").unlink(),
        "no checkpoint of epoch 3",
    ),
    "torn checkpoint": (
        "rescore",
        lambda run: (run / "checkpoints" / "epoch_003.pt").write_bytes(b"PK"),
        "damaged",
    ),
    "checkpoint of another run": (
        "rescore",
        lambda run: change_header(run, key="another"),
        "belongs to something else",
    ),
    "predictions of words": (
        "rescore",
        lambda run: pq.write_table(replaced_by_words(pq.read_table(newest_predictions(run))), newest_predictions(run)),
        "epoch_003.parquet: its columns are not those of predictions",
    ),
    "no checkpoints": ("ablate", lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint"),
    "no configuration": ("baseline", lambda run: change_header(run, config=None), "configuration"),
    "other configuration": ("baseline", lambda run: change_header(run, config={"of": "another version"}), "of"),
    "no dataset": ("data", lambda run: change_header(run, dataset_path="gone"), "no manifest"),
    "no dataset named": ("data", lambda run: change_header(run, dataset_path=None), "no manifest"),
    "another dataset": (
        "data",
        lambda run: change_header(run, dataset_fingerprint="x"),
        "not the dataset that the run",
    ),
    "no graph": ("graph", lambda run: change_header(run, graph_path="gone"), "no manifest"),
    "no evaluation": ("replay", lambda run: shutil.rmtree(run / "evals"), "no evaluation of epoch 1"),
}


def replaced_by_words(table: pa.Table) -> pa.Table:
    return table.set_column(table.column_names.index("score_1d"), "score_1d", pa.array(["high"] * len(table)))


@pytest.mark.parametrize("name", OBSTACLES)
def test_probe_that_cannot_be_made_says_why_and_measures_nothing(name: str, run: Path) -> None:
    probe, spoil, reason = OBSTACLES[name]
    spoil(run)
    content = stored(probe, run)
    assert content["figures"] == {}
    assert reason in content["not_made"]
    assert content["not_made"]
    assert "\n" not in content["not_made"]
    signals = gather(open_record(run))
    assert {signal: signals[signal] for signal in PROBE_SIGNALS[probe]} == dict.fromkeys(PROBE_SIGNALS[probe])


@pytest.mark.parametrize("probe", ["rescore", "data", "baseline", "ablate", "replay"])
def test_torn_dataset_is_a_sentence_of_every_probe_that_reads_it(
    probe: str, run: Path, data: Data, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data.dataset.parent, tmp_path / "data", symlinks=True))
    dataset = folder / data.dataset.name
    dataset.resolve().write_bytes(b"PAR1" + bytes(100))
    change_header(run, dataset_path=str(dataset))
    content = stored(probe, run)
    assert content["figures"] == {}
    assert content["not_made"]


def test_figures_that_are_not_finite_are_stored_as_not_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES, "rescore", lambda _: {"rescored_gap": float("inf"), "rescored_epoch": float("nan")})
    assert stored("rescore", run)["figures"] == {"rescored_gap": None, "rescored_epoch": None}


def test_probe_of_another_run_is_not_read(tmp_path: Path) -> None:
    run_dir = healthy().write(tmp_path / "run")
    write_probe(run_dir, "replay", {"replay_differs": 1.0}, "another run")
    assert gather(open_record(run_dir))["replay_differs"] is None
    write_probe(run_dir, "replay", {"replay_differs": 1.0}, "k1")
    assert gather(open_record(run_dir))["replay_differs"] == 1.0


@pytest.mark.parametrize("content", ["", "[]", '{"run_key": "k1"}', '{"run_key": "k1", "figures": "x"}',
                                     '{"run_key": "k1", "figures": {"replay_differs": [1]}}'])  # fmt: skip
def test_stored_probe_that_is_no_probe_is_no_traceback(content: str, tmp_path: Path) -> None:
    tables = healthy()
    tables.probes = honest_probes()
    run_dir = tables.write(tmp_path / "run")
    (run_dir / "probes" / "replay.json").write_text(content)
    diagnosis = diagnose(run_dir)
    assert diagnosis.signals["replay_differs"] is None
    assert diagnosis.signals["edges_unlike_dataset"] == 0.0
    assert to_markdown(diagnosis)


def test_only_probes_that_were_asked_for_are_made(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(name: str) -> Callable[[Any], Figures]:
        return lambda _: made.append(name) or {}

    for name in list(PROBES):
        monkeypatch.setitem(PROBES, name, noted(name))
    diagnose(run)
    assert made == []
    leading = diagnose(run, "leading")
    assert set(made) <= {cause.probe for cause in leading.ranking.causes}
    assert len(made) <= 3
    made.clear()
    diagnose(run, "all")
    assert sorted(made) == sorted(PROBES)
    record = open_record(run)
    assert [p["probe"] for p in stored_probes(record) if p["probe"] in PROBES] == sorted(PROBES)


def test_every_probe_says_which_signals_it_measures() -> None:
    assert set(PROBE_SIGNALS) == set(PROBES)


def test_sample_market_leaves_validation_sessions_to_compute_again(built: Built) -> None:
    """The data tests above would prove nothing on a split whose validation has no member."""
    features, _, manifest = built
    sessions = np.array(manifest["session_dates"], "datetime64[D]")
    last = sessions[make_split(sessions, settings().split).validation[-1]]
    assert pc.sum(pc.equal(features["Date"], pa.scalar(last.item()))).as_py() > 15
