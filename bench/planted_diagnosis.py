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

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    diagnosis = diagnose(Path(task["run"]), probes="all")
    Path(task["out"]).write_text(json.dumps([asdict(finding) for finding in diagnosis.findings]))
