"""The nightly retrain: new data, the 20-epoch run, and the long run if its gate opens."""

import dagster as dg

nightly_retrain = dg.define_asset_job(
    "nightly_retrain",
    selection='+key:"model_120ep" or +key:"diagnostics_20ep" or +key:"diagnostics_120ep"',
    description="New data, model_20ep, and model_120ep if the success criterion holds; both with diagnostics.",
)

nightly_schedule = dg.ScheduleDefinition(
    name="nightly",
    job=nightly_retrain,
    cron_schedule="0 20 * * 1-5",
    execution_timezone="Asia/Tokyo",
    description="20:00 in Tokyo on weekdays, after the day's quotes and disclosures are in.",
)
