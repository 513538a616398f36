"""The code location: every asset, check, job, schedule and sensor, with the resources they use."""

import dagster as dg

from assets.data.dataset import ml_dataset, prices
from assets.data.graph import stock_graph
from assets.data.raw import raw_assets
from assets.diagnosis.diagnostics import diagnostics_asset
from assets.diagnosis.experiments import experiments
from assets.diagnosis.failures import canceled_training, explain_failure, failed_training, killed_runs
from assets.judging.baselines import baselines
from assets.judging.checks import run_checks
from assets.judging.comparison import comparison
from assets.judging.ensemble_scores import ensemble_scores_asset
from assets.judging.evaluation import evaluation_asset
from assets.schedules import nightly_retrain, nightly_schedule
from assets.training.training_run import RUN_LENGTHS, training_definitions
from resources.compute import Compute
from resources.execution import one_process_per_step
from resources.output_folders import OutputFolders

defs = dg.Definitions(
    assets=[
        *raw_assets,
        prices,
        ml_dataset,
        stock_graph,
        *training_definitions,
        *(evaluation_asset(epochs) for epochs in RUN_LENGTHS),
        *(diagnostics_asset(epochs) for epochs in RUN_LENGTHS),
        *(ensemble_scores_asset(epochs) for epochs in RUN_LENGTHS),
        baselines,
        comparison,
    ],
    asset_checks=[run_checks(epochs) for epochs in RUN_LENGTHS],
    jobs=[nightly_retrain, explain_failure, experiments],
    schedules=[nightly_schedule],
    sensors=[failed_training, canceled_training, killed_runs],
    resources={"store": OutputFolders(), "compute": Compute()},
    executor=one_process_per_step,
)
