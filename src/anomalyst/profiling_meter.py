"""What a profile measures with: counted flops, seconds and peak memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anomalyst import profiling_clock
from anomalyst.evaluation import peak_rss_mb
from anomalyst.features.clip import ClipTower, run_blocks
from anomalyst.features.extractor import Backbone
from anomalyst.features.linears import LINEAR_FLOPS, QuickLinears
from anomalyst.profiling_clock import WARM_UP
from anomalyst.profiling_record import Peak
from anomalyst.types import Progress

_PROCESS = Path("/proc/self")


# ---- flops --------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the flops of what runs inside: matrix products, convolutions, attention; no others.

    A multiply-add is two. Attention takes the plain way meanwhile, on every device: torch does not
    count all of its fused kernels.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        flops = FlopCounterMode(display=False, custom_mapping=LINEAR_FLOPS)
        with flops as counter, sdpa_kernel(SDPBackend.MATH):
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count_flops(work: Callable[[], object]) -> int:
    """Return the flops of one call."""
    with counting() as counter:
        work()
    return int(counter.get_total_flops())


@torch.inference_mode()
def plain_pass(tower: ClipTower, images: Tensor) -> Tensor:
    """Return what CLIP itself makes of images ``[B, 3, H, W]``: an embedding ``[B, D]`` each."""
    tokens, _ = tower.embed(images)
    return tower.project(run_blocks(tower.blocks, tokens)[:, 0])


def bare_pass(backbone: Backbone, images: Tensor) -> object:
    """Run the backbone alone: up to its last tap, or the image tower of a CLIP once, whole."""
    if isinstance(backbone.tower, ClipTower):
        with QuickLinears():  # as the backbone itself computes
            return plain_pass(backbone.tower, images)
    return backbone(images)


# ---- time ---------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Let a GPU finish: it goes on working after the call that asked for it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(works: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Return the seconds of each round of each, run in turn; see `profiling_clock`."""
    return profiling_clock.time_in_turn(works, lambda work: seconds(work, device))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes, with all that it leaves to a GPU."""
    wait_for(device)

    def whole() -> None:
        work()
        wait_for(device)

    return profiling_clock.seconds(whole)


# ---- memory -------------------------------------------------------------------------------------


class Memory:
    """The peak of each stage, over what the process holds when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle = 0.0
        self.restart()
        self._idle = _resident_peak() or 0.0

    def restart(self) -> None:
        """Begin a stage."""
        gc.collect()
        _forget_peak()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> Peak:
        """Return the stage's peak so far."""
        host, gpu = _resident_peak(), None
        if self._device.type == "cuda":
            gpu = torch.cuda.max_memory_allocated(self._device) / 1e6
        return Peak(None if host is None else max(host - self._idle, 0.0), gpu)


def _forget_peak() -> None:
    """Set the process's peak to what it holds now: Linux does that, other systems keep the peak."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps what earlier stages freed, and it would count as this one's
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def _resident_peak() -> float | None:
    """Return the process's peak in MB; what getrusage says may be of a parent process."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return peak_rss_mb()
    kib = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return peak_rss_mb() if kib is None else int(kib) * 1024 / 1e6


def _higher(first: float | None, second: float | None) -> float | None:
    return second if first is None or (second is not None and second > first) else first


# ---- training -----------------------------------------------------------------------------------


class StepMeter:
    """Measures a training as its progress: times the steps, and counts the flops of one.

    That one needs more time and memory, and warm steps come before and after it.

    Attributes
    ----------
    times
        Seconds of each step behind the warm-up.
    flops
        Of one whole step: reading what it sees, forward, backward, update.
    """

    def __init__(self, memory: Memory, device: torch.device, tell: Progress | None) -> None:
        self.times: list[float] = []
        self.flops = 0
        self._memory = memory
        self._device = device
        self._tell = tell
        self._counter: FlopCounterMode | None = None
        self._open = ExitStack()
        self._before: Peak | None = None
        self._began = 0.0

    def __enter__(self) -> StepMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()  # of a training that was stopped while it was counted

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Take note of a step: what `Progress` is called with."""
        if stage == "train":
            self._between_steps(done)
        if self._tell:
            self._tell(stage, done, total, note)
        self._began = time.perf_counter()

    def _between_steps(self, done: int) -> None:
        wait_for(self._device)
        if done > WARM_UP:
            self.times.append(time.perf_counter() - self._began)
        elif done == WARM_UP - 1:
            self._before = self._memory.peak()
            self._counter = self._open.enter_context(counting())
        elif self._counter is not None:
            self._open.close()
            self.flops = int(self._counter.get_total_flops())
            self._memory.restart()

    def peak(self) -> Peak:
        """Return the training's peak, but for the step that was counted."""
        now, before = self._memory.peak(), self._before or Peak(None, None)
        return Peak(_higher(before.host_mb, now.host_mb), _higher(before.gpu_mb, now.gpu_mb))
