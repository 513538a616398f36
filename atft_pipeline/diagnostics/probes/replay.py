"""The first epoch, trained again with the same code, data and seed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError

SIGNALS = ("replay_differs", "replay_initial_differs")


def measure(inputs: RunInputs) -> Figures:
    """Trains the first epoch again with the same code, data and seed.

    `replay_differs`: 1 where its weights differ from the run's. `replay_initial_differs`: 1 where the initial weights
    already do. Needs the code that the run was trained with, and a CPU run of one process: no other run repeats its
    bits.
    """
    import torch

    from atft_pipeline.runs.record import RunRecord
    from atft_pipeline.storage.code_version import code_revision
    from atft_pipeline.training.judging.scoring import weights_hash
    from atft_pipeline.training.plan import plan_run, resolve_device, run_header
    from atft_pipeline.training.trainer import Trainer

    record = inputs.record
    if record.run.get("code_revision") != code_revision("run"):
        raise InputError("the code has changed since the run")
    if record.run.get("device") != "cpu" or record.run.get("processes") != 1:
        raise InputError("only runs of one process on a CPU promise the same bits")
    hashes = record.rows("SELECT min(weights_hash) FROM evals WHERE epoch = 1 AND weights_hash IS NOT NULL")
    if not hashes or hashes[0][0] is None:
        raise InputError("no evaluation of epoch 1")
    plan = plan_run(inputs.config, inputs.dataset, inputs.graph)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(record.run.get("threads") or threads))  # sums of several threads run in another order
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder)
            fresh = RunRecord(run_dir, run_header(plan, run_dir, resolve_device("cpu"), {}))
            trainer = Trainer(plan, fresh, resolve_device("cpu"), lambda _: None)
            initial = weights_hash(trainer.average.model)
            trainer.train_epoch(1)
            replayed = weights_hash(trainer.average.model)
    finally:
        torch.set_num_threads(threads)
    recorded = record.run.get("initial_weights_hash")
    return {
        "replay_differs": float(replayed != hashes[0][0]),
        "replay_initial_differs": float(initial != recorded) if recorded else None,
    }
