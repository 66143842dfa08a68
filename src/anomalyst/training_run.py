"""The folder of one training: its log, its checkpoint, and how to go on from there."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.files import make_folder, replace_file
from anomalyst.training_setup import CHECKPOINT

_log = logging.getLogger(__name__)
_BUFFER = "buffer."  # of the network, such as running means of batch norm


@dataclass
class TrainingRun:
    """Where a training writes, and what must agree for another to go on from it.

    Attributes
    ----------
    folder
        Made if missing: ``log.csv``, ``checkpoint.safetensors``, and TensorBoard's events.
    resume
        Go on from the checkpoint; from the beginning where there is none yet.
    seconds
        Save a checkpoint when so long has passed since the last.
    tensorboard
        Write TensorBoard events too.
    settings
        Everything that the weights depend on; a checkpoint of other settings is refused.
    """

    folder: Path
    resume: bool = False
    seconds: float = 120.0
    tensorboard: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    _saved_at: float = field(default=0.0, init=False)
    _saved_step: int = field(default=0, init=False)
    _writer: Any = field(default=None, init=False)

    @property
    def checkpoint(self) -> Path:
        """The file of weights, optimiser state and step; replaced whole, so never half a one."""
        return self.folder / CHECKPOINT

    @property
    def log_file(self) -> Path:
        """One line a step: losses, learning rate, seconds since the start."""
        return self.folder / "log.csv"

    def prepare(self) -> None:
        """Make the folder, before the long work and not after it.

        Raises
        ------
        InputError
            It cannot be made, holds an unfinished training that nobody asked to resume, or
            TensorBoard is asked for and not installed.
        """
        make_folder(self.folder)
        if self.checkpoint.exists() and not self.resume:
            raise InputError(
                f"{self.folder}: holds an unfinished training; go on with --resume, or remove this "
                "folder to train anew"
            )
        if self.tensorboard:
            _tensorboard()
        if self.resume and not self.checkpoint.exists():
            _log.warning("%s: no checkpoint yet, training starts from the beginning", self.folder)

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Take over the checkpoint where one is wanted and there, and return the step to do next.

        Raises
        ------
        InputError
            The checkpoint is damaged or was made with other settings.
        """
        self._saved_at, self._saved_step = time.monotonic(), 0
        if not (self.resume and self.checkpoint.exists()):
            self.log_file.unlink(missing_ok=True)
            return 0
        said, tensors = self._read()
        stored = json.loads(said["settings"])
        for key, mine in json.loads(_text(self.settings)).items():
            if stored.get(key) != mine:
                raise InputError(
                    f"{self.checkpoint}: made with other {key} ({_short(stored.get(key))}, now "
                    f"{_short(mine)}); resume with the same, or remove the folder to train anew"
                )
        step = int(said["step"])
        for name, parameter in network.named_parameters():
            parameter.data.copy_(tensors[f"network.{name}"])
            state = optimizer.state[parameter]
            for key, value in tensors.items():
                part, _, owner = key.partition(".")
                if owner == name and part != "network":
                    # Step numbers stay where optimisers keep them, on the processor.
                    state[part] = value.to(parameter.device) if value.ndim else value
        for name, buffer in network.named_buffers():
            buffer.copy_(tensors[f"{_BUFFER}{name}"])
        self._saved_step = step
        self._cut_log(step)
        return step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        new = not self.log_file.exists()
        with self.log_file.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.8g}" for value in values.values())])
        if self.tensorboard:
            # Opened where it is used: it cannot be handed to another process.
            self._writer = self._writer or _tensorboard()(str(self.folder))
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def maybe_save(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        at_once: bool = False,
    ) -> None:
        """Save a checkpoint if the last is old enough; ``step`` is the one to do next."""
        if at_once or time.monotonic() - self._saved_at >= self.seconds:
            self.save(network, optimizer, step)
        if at_once:
            _log.warning("%s; go on with --resume", self.kept())

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Replace the checkpoint; a process killed meanwhile leaves the former one.

        Raises
        ------
        InputError
            There is no room for it.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters():
            tensors[f"network.{name}"] = parameter.detach()
            for part, value in optimizer.state[parameter].items():
                tensors[f"{part}.{name}"] = torch.as_tensor(value)
        tensors |= {f"{_BUFFER}{name}": value for name, value in network.named_buffers()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        said = {"step": str(step), "settings": _text(self.settings)}
        blob = save(tensors, {**said, "sha256": _digest(tensors)})
        try:
            replace_file(self.checkpoint, blob)
        except OSError as error:
            raise InputError(
                f"{self.checkpoint}: cannot be written ({error.strerror}); make room and resume "
                f"with --resume from step {self._saved_step}"
            ) from None
        self._saved_at, self._saved_step = time.monotonic(), step

    def kept(self) -> str:
        """Return in words which checkpoint there is."""
        if not self.checkpoint.exists():
            return "no checkpoint was saved yet"
        return f"the checkpoint of step {self._saved_step} is kept in {self.checkpoint}"

    def _read(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                said: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.checkpoint}: not a whole checkpoint ({error}); remove the folder to train "
                "anew"
            ) from None
        if said.get("sha256") != _digest(tensors):
            raise InputError(f"{self.checkpoint}: damaged; remove the folder to train anew")
        return said, tensors

    def _cut_log(self, step: int) -> None:
        """Drop the lines of steps that are to be done again."""
        if not self.log_file.exists():
            return
        lines = self.log_file.read_text().splitlines(keepends=True)
        kept = [line for line in lines[1:] if line.partition(",")[0].isdigit()]
        kept = [line for line in kept if line.endswith("\n") and int(line.partition(",")[0]) < step]
        replace_file(self.log_file, "".join([lines[0], *kept]).encode() if lines else b"")


def _tensorboard() -> Any:
    """Return the class that writes TensorBoard's events."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True, default=str)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
