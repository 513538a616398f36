"""What each component is worth: the IC that is lost when its output is permuted over the stocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atft_pipeline.diagnostics.probes.figures import Figures
from atft_pipeline.diagnostics.run_inputs import RunInputs
from atft_pipeline.errors import InputError
from atft_pipeline.evaluation.metrics import information_coefficient, mean_and_error

SIGNALS = ("drop_t_temporal_encoder", "drop_t_gat")


def measure(inputs: RunInputs) -> Figures:
    """Permutes the output of each component over the stocks of every session and measures what the IC loses.

    The graph adds to its input, so only what it adds is permuted.

    `drop_t_NAME`: t of the paired daily difference, of the last checkpoint's weights on the validation sessions.
    """
    import torch

    from atft_pipeline.model.gat import GraphAttention

    if not inputs.checkpoints:
        raise InputError("no checkpoint")
    model = inputs.model(max(inputs.checkpoints))

    def daily() -> NDArray[np.float64]:
        return information_coefficient(inputs.scores(model), inputs.targets)

    def permuted(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.ndim != 3:
            return output
        order = torch.randperm(output.shape[0], generator=torch.Generator().manual_seed(inputs.config.train.seed))
        handed_on = arguments[0] if isinstance(module, GraphAttention) else torch.zeros_like(output)
        return handed_on + (output - handed_on)[order]

    intact, drops = daily(), Figures()
    for name, child in model.named_children():
        if name in ("adaptive_norm", "prediction_head") or not any(True for _ in child.parameters()):
            continue
        handle = child.register_forward_hook(permuted)
        mean, error = mean_and_error(intact - daily())
        handle.remove()
        drops[f"drop_t_{name}"] = mean / error if error else 0.0
    return drops
