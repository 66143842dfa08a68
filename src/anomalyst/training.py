"""The training loop of every method with gradient steps, on Lightning Fabric.

One plain loop: draw a batch, take the loss, clip, step, write down. All randomness, the order of
images and that of the network, depends on the seed and the step alone, so weights, optimiser state
and step number are all that a checkpoint needs: resumed training ends at the same weights.
"""

from __future__ import annotations

import copy
import math
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from anomalyst.errors import InputError
from anomalyst.methods.base import TrainingOptions
from anomalyst.training_run import TrainingRun
from anomalyst.training_setup import Precision
from anomalyst.types import Progress

Batch = Sequence[Sequence[Any]]
"""What one step sees, in parts; the first entry of a part is as long as the part has images.

Of most methods a part is, for one shape of image, the maps of every layer.
"""


class Source(Protocol):
    """What a step's feature maps come from."""

    def __len__(self) -> int:
        """Return how many there are to draw from."""

    def fetch(self, numbers: Sequence[int], step: int) -> Batch:
        """Return the maps of those numbers; what is drawn for them follows from the step."""


@dataclass(frozen=True)
class Hardware:
    """Where to train: device kind, how many, and Fabric's name of the precision."""

    device: torch.device
    count: int = 1
    precision: Precision = "32-true"


@dataclass(frozen=True)
class Plan:
    """How many steps of how many images each training takes."""

    steps: int
    batch_size: int

    @classmethod
    def of(cls, options: TrainingOptions, images: int, processes: int = 1) -> Plan:
        """Return the plan for so many images.

        With fewer images than a batch, a batch is all of them: an incomplete batch is dropped at
        the end of each pass, and nothing would be trained otherwise.

        Raises
        ------
        InputError
            The batch cannot be shared out evenly among the processes.
        """
        batch = min(options.batch_size, images)
        if batch % processes:
            raise InputError(
                f"batches of {batch} images cannot be shared among {processes} devices: "
                "choose another --devices or batch_size"
            )
        return cls(options.planned_steps(images, batch), batch)


def train(
    network: nn.Module,
    source: Source,
    options: TrainingOptions,
    *,
    seed: int,
    hardware: Hardware,
    run: TrainingRun | None = None,
    progress: Progress | None = None,
) -> None:
    """Train the network in place.

    Parameters
    ----------
    network
        Called with a list of feature maps it returns its losses by name, ``loss`` their sum.
    run
        Keeps the log and checkpoints, and resumes from them.
    progress
        Called after every step with the loss and the time left.

    Raises
    ------
    InputError
        The loss or its gradient is no longer a number; the last good checkpoint is kept.
    """
    plan = Plan.of(options, len(source), hardware.count)
    many = hardware.count > 1
    gpu = hardware.device.type == "cuda"
    fabric = Fabric(
        accelerator=hardware.device.type,
        devices=[hardware.device.index or 0] if gpu and not many else hardware.count,
        strategy="ddp_spawn" if many else "auto",
        precision=hardware.precision,
    )
    if many:
        # Bars cannot cross to other processes: their log says how far they are.
        # Handed over in one object: Fabric looks into arguments and stumbles over frozen ones.
        work = partial(
            _work,
            network=network,
            source=source,
            options=options,
            plan=plan,
            seed=seed,
            run=run,
            progress=None,
        )
        with tempfile.TemporaryDirectory(prefix="anomalyst-") as folder:
            weights = Path(folder) / "weights.safetensors"
            fabric.launch(partial(_work_apart, work=work, weights=weights))
            network.load_state_dict(load_file(weights))
    else:
        _work(fabric, network, source, options, plan, seed, run, progress)
    network.eval()


def _work(
    fabric: Fabric,
    network: nn.Module,
    source: Source,
    options: TrainingOptions,
    plan: Plan,
    seed: int,
    run: TrainingRun | None,
    progress: Progress | None,
) -> None:
    """Run the loop in one process."""
    objective = _Objective(network)
    optimizer = options.optimizer(network.parameters())
    first = run.restore(network, optimizer) if run else 0
    model, stepper = fabric.setup(objective, optimizer)
    model.train()
    mine = slice(fabric.global_rank, None, fabric.world_size)
    began = time.perf_counter()
    keeper = run if fabric.is_global_zero else None
    batches = draw_batches(len(source), plan, seed, first)
    gpus = range(torch.cuda.device_count())  # manual_seed reaches them all
    with _interrupt_between_steps() as interrupted, torch.random.fork_rng(gpus):
        for step, numbers in enumerate(batches, start=first):
            torch.manual_seed(_step_seed(seed, step, fabric.global_rank))
            rate = options.rate(step, plan.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            stepper.zero_grad()
            losses = model(source.fetch(numbers[mine], step))
            fabric.backward(losses["loss"])
            norm = fabric.clip_gradients(
                model, stepper, max_norm=options.clip or math.inf, error_if_nonfinite=False
            )
            found = {name: _mean(fabric, value) for name, value in losses.items()}
            _require_finite(step, found["loss"], float(norm if norm is not None else 0.0), run)
            stepper.step()
            spent = time.perf_counter() - began
            if keeper:
                keeper.log(step, {**found, "learning_rate": rate, "seconds": spent})
                keeper.maybe_save(network, optimizer, step + 1, at_once=bool(interrupted))
            if interrupted:
                raise KeyboardInterrupt
            if progress and fabric.is_global_zero:
                left = spent / (step + 1 - first) * (plan.steps - step - 1)
                note = f"loss {found['loss']:.4f}, {_duration(left)} left"
                progress("train", step + 1, plan.steps, note)
        if keeper:  # what comes until the bundle is written may be stopped too
            keeper.save(network, optimizer, plan.steps)


def _work_apart(fabric: Fabric, work: partial[None], weights: Path) -> None:
    """Run the loop as one of several processes; the first writes the trained weights to a file.

    Fabric waits for the processes to end before it takes what they return, and they for it to be
    taken once it is larger than a pipe.
    """
    # Tensors reach another process in shared memory: all would step on the same weights.
    network = copy.deepcopy(work.keywords["network"])
    work(fabric, network=network)
    if fabric.is_global_zero:
        state = network.state_dict()
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, weights)
    # Left to the process's end, the group's own threads would at times abort it.
    fabric.barrier()
    distributed.destroy_process_group()


def _mean(fabric: Fabric, value: Tensor) -> float:
    """Return a loss's mean over the processes, whose batches are equally large."""
    mean = fabric.all_reduce(value.detach(), reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean.item()


@contextmanager
def _interrupt_between_steps() -> Iterator[list[int]]:
    """Yield a list that the first Ctrl-C is put into: half a step must not reach a checkpoint.

    The second one stops at once.
    """
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed  # only the main thread gets signals
        return
    former = signal.getsignal(signal.SIGINT)

    def notice(number: int, _: object) -> None:
        noticed.append(number)
        signal.signal(signal.SIGINT, former)

    signal.signal(signal.SIGINT, notice)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, former)


def _step_seed(seed: int, step: int, process: int) -> int:
    """Return what the network's own randomness of one step starts from."""
    return ((seed * 1_000_003 + step) * 1_009 + process) % 2**63


class _Objective(nn.Module):
    """One forward pass of a whole step, as several processes need it: all its batches at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batches: Batch) -> dict[str, Tensor]:
        total = sum(len(maps[0]) for maps in batches)
        losses: dict[str, Tensor] = {}
        for maps in batches:
            for name, value in self.network(maps).items():
                part = value * (len(maps[0]) / total)
                losses[name] = losses[name] + part if name in losses else part
        return losses


def draw_batches(images: int, plan: Plan, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Yield the numbers of every step from ``first`` on: each pass a permutation of its own."""
    per_pass = images // plan.batch_size
    order: list[int] = []
    for step in range(first, plan.steps):
        number, place = divmod(step, per_pass)
        if place == 0 or not order:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            order = torch.randperm(images, generator=generator).tolist()
        yield order[place * plan.batch_size : (place + 1) * plan.batch_size]


def _require_finite(step: int, loss: float, norm: float, run: TrainingRun | None) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = run.kept() if run else "no checkpoint was asked for"
    raise InputError(
        f"training: the {'gradient' if math.isfinite(loss) else 'loss'} is not a number at step "
        f"{step}; {kept}. Train anew with a smaller --set learning_rate=..., in --precision "
        "32-true, or without the images that cause it"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
