"""`python -m assets`: the main job. Materialises model_50ep with all upstream, its run, evaluation and diagnostics.

Exits 0 where all checks passed, 1 where the criterion or a step failed. The last lines are the path of the report, the
verdict and the command for the UI.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.utils import make_new_run_id

from assets.definitions import defs
from atft_pipeline.runs.documents import read_verdict
from resources.execution import executing, release_killed_runs

MAIN_SELECTION = '+key:"model_50ep" or +key:"diagnostics_50ep"'
_DIAGNOSTICS = dg.AssetKey("diagnostics_50ep")


def main(run_config: Mapping[str, Any] | None = None) -> int:
    job = dg.define_asset_job("main", selection=MAIN_SELECTION)
    resolved = dg.Definitions.merge(defs, dg.Definitions(jobs=[job])).resolve_job_def("main")
    run_id = make_new_run_id()
    with _instance() as instance:
        release_killed_runs(instance)
        with executing(instance, run_id):
            result = resolved.execute_in_process(
                instance=instance, run_id=run_id, run_config=run_config, raise_on_error=False
            )
    reports = [event for event in result.get_asset_materialization_events() if event.asset_key == _DIAGNOSTICS]
    if not reports:
        print("\nmain job: stopped before diagnostics; the first error above says where", file=sys.stderr)
        return 1
    metadata = reports[0].materialization.metadata
    verdict = read_verdict(Path(str(metadata["run_dir"].value)))
    print()
    for warning in verdict["warnings"]:
        print(f"warning:  {warning}")
    print(f"report:   {metadata['report_html'].value}")
    print(f"verdict:  {metadata['verdict'].value}")
    print("UI:       make ui")
    return 0 if result.success else 1


def _instance() -> dg.DagsterInstance:
    """The history that the CLI uses: DAGSTER_HOME where it is set, else the dagster.yaml of the working directory."""
    if os.environ.get("DAGSTER_HOME"):
        return dg.DagsterInstance.get()
    return dg.DagsterInstance.from_config(str(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
