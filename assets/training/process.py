"""`python -m assets.training.process`: the launcher of a training in several processes, started through Dagster Pipes.

It passes the leading process's lines to the step's log, and the result or the error's sentence to the step. Dagster
itself is not imported, because every process of the training imports this module.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dagster_pipes import PipesContext, open_dagster_pipes

from atft_pipeline.errors import InputError, RunFailure

if TYPE_CHECKING:
    from atft_pipeline.training.train import TrainingResult


LOOK_S = 1.0
"""Between two checks whether the step is still alive."""


def main() -> int:
    """Trains what the step asks for. Errors are reported to the step; the exit code is 0 wherever that was possible."""
    threading.Thread(target=_end_with_step, args=(os.getppid(),), daemon=True).start()
    with open_dagster_pipes() as pipes:
        try:
            outcome = _train(pipes)
        except (InputError, RunFailure) as error:
            kind = InputError if isinstance(error, InputError) else RunFailure
            pipes.report_custom_message({"error": kind.__name__, "sentence": str(error)})
        except KeyboardInterrupt:
            return 130
        else:
            pipes.report_custom_message({"run_dir": str(outcome.run_dir), "reused": outcome.reused})
    return 0


def _train(pipes: PipesContext) -> "TrainingResult":
    from atft_pipeline.config.overrides import from_dict
    from atft_pipeline.training.launcher import Layout, train_in_processes

    asked = pipes.extras
    return train_in_processes(
        Layout(asked["processes"]),
        from_dict(asked["config"]),
        Path(asked["dataset"]),
        Path(asked["graph"]),
        Path(asked["run_dir"]),
        threads=asked["threads"],
        log=pipes.log.info,
        **asked["options"],
    )


def _end_with_step(step: int) -> None:
    """Ends this process once the step that started it is gone, even if it was killed: nobody waits for the result."""
    while os.getppid() == step:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
