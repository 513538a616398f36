"""The diagnosis of one run by clean code, all probes made: `python bench/planted_diagnosis.py '{"run": ...}'`.

The argument is a JSON object: `run` (directory) and `out` (file to write the findings to, as JSON).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from atft_pipeline.diagnostics import diagnose
from atft_pipeline.diagnostics.probes import PROBES, run_probes
from atft_pipeline.diagnostics.record import open_record

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    record = open_record(Path(task["run"]))
    run_probes(record, PROBES)  # without the remedies, which rank nothing
    record.connection.close()
    diagnosis = diagnose(Path(task["run"]))
    Path(task["out"]).write_text(json.dumps([asdict(finding) for finding in diagnosis.findings]))
