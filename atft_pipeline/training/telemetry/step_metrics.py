"""Figures of optimizer steps: rows per step, rows per epoch, and the few numbers that the epoch itself needs.

Figures stay tensors on the device until the epoch ends. Reading one earlier would make every step wait for it.
"""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atft_pipeline.runs.record import RunRecord
from atft_pipeline.training.telemetry.loss_gradients import LossGradients
from atft_pipeline.verdict.health import GRADIENT_FLOOR_L2

Components = Mapping[str, Sequence[Tensor]]
"""Named component of the model -> its parameters."""


@dataclass(frozen=True)
class StepFigures:
    """Figures of one optimizer step."""

    loss: Tensor
    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]
    grad_norm: Tensor
    """Global l2 before clipping."""
    component_l2: Tensor
    """[components] gradient l2 before clipping."""
    lr: float
    samples: int
    sessions: int


@dataclass(frozen=True)
class EpochFigures:
    """Figures of one epoch of training."""

    loss: float
    """Mean over sessions."""
    grad_norm: float
    """Mean over steps, before clipping."""
    largest_lr: float
    samples: int


def log_steps(
    record: RunRecord, epoch: int, steps: Sequence[StepFigures], *, first_step: int, clip_norm: float
) -> None:
    """Records the loss, the rate and the gradient norm of each step."""
    for step, figures in enumerate(steps, start=first_step):
        norm = float(figures.grad_norm)
        record.log("loss", float(figures.loss), epoch=epoch, step=step, term="total")
        record.log("lr", figures.lr, epoch=epoch, step=step, component="all")
        record.log("grad_norm", norm, epoch=epoch, step=step, term="before_clip")
        record.log("grad_norm", min(norm, clip_norm), epoch=epoch, step=step, term="after_clip")


def log_epoch(
    record: RunRecord,
    epoch: int,
    steps: Sequence[StepFigures],
    *,
    components: Sequence[str],
    loss_weights: Mapping[str, float],
    clip_norm: float,
) -> EpochFigures:
    """Records and returns the epoch's figures: losses are means over sessions, gradients means over steps."""
    sessions = np.array([s.sessions for s in steps], np.float64)

    for metric, terms in (("loss_raw", [s.raw for s in steps]), ("loss_weighted", [s.weighted for s in steps])):
        for term in max(terms, key=len):
            # A term of weight 0 is measured in one step only.
            having = [i for i, values in enumerate(terms) if term in values]
            mean = np.average(_numbers([terms[i][term] for i in having]), weights=sessions[having])
            record.log(metric, float(mean), epoch=epoch, component="loss", term=term)
    loss = float(np.average(_numbers([s.loss for s in steps]), weights=sessions))
    record.log("loss_weighted", loss, epoch=epoch, component="loss", term="total")
    for term, weight in loss_weights.items():
        record.log("loss_weight", weight, epoch=epoch, component="loss", term=term)
    record.log("lr", steps[-1].lr, epoch=epoch, component="all")

    norms = _numbers([s.grad_norm for s in steps])
    grad_norm = float(norms.mean())
    record.log("grad_norm", grad_norm, epoch=epoch, component="total", term="before_clip")
    clipped = float(np.minimum(norms, clip_norm).mean())
    record.log("grad_norm", clipped, epoch=epoch, component="total", term="after_clip")
    record.log("clipped_share", float((norms > clip_norm).mean()), epoch=epoch)
    component_l2 = torch.stack([s.component_l2 for s in steps]).double().mean(dim=0).tolist()
    for name, l2 in zip(components, component_l2, strict=True):
        record.log("grad_l2", l2, epoch=epoch, component=name)
        record.log("gradient_warning", float(l2 < GRADIENT_FLOOR_L2), epoch=epoch, component=name)
    return EpochFigures(loss, grad_norm, max(s.lr for s in steps), sum(s.samples for s in steps))


@torch.no_grad()
def log_update(
    record: RunRecord, epoch: int, components: Components, before: Components, optimizer: torch.optim.Optimizer
) -> None:
    """Records what one step did to the weights of each component; `before` holds copies of them.

    `weight_l2` and `update_to_weight`: size of the weights, and of the step relative to them. `unchanged_share`: share
    of the elements that the step left unchanged. `trainable_share`, `optimized_share`: shares of the elements that
    require a gradient and that the optimizer has. `parameter_bits`: width of the narrowest parameter.
    """
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameters in components.items():
        weight = float(l2_norm(before[name]))
        update = float(l2_norm([new - old for new, old in zip(parameters, before[name], strict=True)]))
        same = sum(int((new == old).sum()) for new, old in zip(parameters, before[name], strict=True))
        elements = sum(p.numel() for p in parameters)
        figures = {
            "weight_l2": weight,
            "update_to_weight": update / max(weight, 1e-12),
            "unchanged_share": same / elements,
            "trainable_share": sum(p.numel() for p in parameters if p.requires_grad) / elements,
            "optimized_share": sum(p.numel() for p in parameters if id(p) in optimized) / elements,
            "parameter_bits": min(8 * p.element_size() for p in parameters),
        }
        for metric, value in figures.items():
            record.log(metric, value, epoch=epoch, component=name)


def log_loss_gradients(record: RunRecord, epoch: int, gradients: LossGradients | None) -> None:
    """Records the contributions of the loss terms in one block; nothing where they could not be measured."""
    if gradients is None:
        return
    figures = {
        "effective_weight": gradients.effective_weight,
        "gradient_share": gradients.share,
        "gradient_cosine": gradients.cosine,
    }
    for metric, by_term in figures.items():
        for term, value in by_term.items():
            record.log(metric, value, epoch=epoch, component="loss", term=term)
    record.log("gradient_residual", gradients.residual, epoch=epoch, component="loss", term="total")


def log_machine(record: RunRecord, epoch: int, device: torch.device) -> None:
    """Records the peak memory of the process and, on CUDA, memory and utilisation of the device."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    record.log("peak_rss_bytes", peak, epoch=epoch)
    if device.type != "cuda":
        return
    record.log("gpu_memory_bytes", torch.cuda.max_memory_allocated(device), epoch=epoch)
    try:
        record.log("gpu_utilisation", torch.cuda.utilization(device) / 100, epoch=epoch)
    except ModuleNotFoundError:  # NVIDIA's management library is absent; that is not zero, so no row
        return


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """l2 norm over all tensors together; 0 where there are none."""
    norms = torch._foreach_norm(list(tensors)) if tensors else [torch.zeros(())]
    return torch.stack([norm.float() for norm in norms]).norm()


def _numbers(values: Sequence[Tensor]) -> np.ndarray:
    return np.array(torch.stack(list(values)).double().tolist())
