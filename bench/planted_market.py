"""One market, perhaps with a fault in its generator, in a process of its own: `python bench/planted_market.py '{...}'`.

The argument is a JSON object: `out` (folder to write), `arguments` (of the generator) and `fault` (an id or "").
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faults import FAULTS

from atft_pipeline.synthetic import generate_market, write_tables

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    plant = FAULTS[task["fault"]].generate if task["fault"] else None
    if plant is not None:
        plant()
    write_tables(generate_market(**task["arguments"]), Path(task["out"]))
