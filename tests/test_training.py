"""The training loop: schedule, optimiser, order of images, checkpoints and what may go wrong."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.methods.base import TrainingOptions
from anomalyst.methods.stable_adamw import StableAdamW
from anomalyst.training import (
    Hardware,
    Plan,
    draw_batches,
    train,
)
from anomalyst.training_run import TrainingRun

CPU = Hardware(torch.device("cpu"))
SHORT = TrainingOptions(steps=12, batch_size=4, warmup=3, learning_rate=0.05, clip=10.0)


class Line(nn.Module):
    """Fits y = 2 x on scalars; the loss is the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))
        self.matrix = nn.Parameter(torch.full((2, 2), 0.3))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        x = maps[0]
        loss = (self.slope * x - 2 * x).square().mean() + 0.01 * self.matrix.square().sum()
        return {"loss": loss, "half": loss / 2}


class Numbers:
    """A source of ten scalars, in one batch, or in two by parity."""

    def __init__(self, parts: int = 1, count: int = 10) -> None:
        self.parts, self.count = parts, count
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def fetch(self, numbers: Sequence[int], step: int = 0) -> list[list[Tensor]]:
        self.asked.append(list(numbers))
        groups = [[n for n in numbers if n % self.parts == part] for part in range(self.parts)]
        return [[torch.tensor(group).float()[:, None] / 10] for group in groups if group]


def trained(
    source: Numbers | None = None,
    options: TrainingOptions = SHORT,
    run: TrainingRun | None = None,
    seed: int = 0,
) -> Line:
    network = Line()
    train(network, source or Numbers(), options, seed=seed, hardware=CPU, run=run)
    return network


def state(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict().values())


# ---- schedule and order -------------------------------------------------------------------------


def test_the_learning_rate_rises_over_the_warmup_and_falls_by_half_a_cosine() -> None:
    options = TrainingOptions()
    rates = [options.rate(step, 45_200) for step in range(45_200)]
    assert rates[0] == 0
    assert rates[50] == pytest.approx(1e-3 * 50 / 99)
    assert rates[99] == pytest.approx(1e-3) and rates[100] == pytest.approx(1e-3)
    assert rates[100 + 45_100 // 2] == pytest.approx(5.5e-4)
    assert 1e-4 < rates[-1] < 1.0001e-4
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_a_training_shorter_than_its_warmup_is_all_ramp() -> None:
    options = TrainingOptions()
    assert [options.rate(k, 3) for k in range(3)] == [0, 5e-4, 1e-3]
    assert options.rate(0, 1) == 0
    assert TrainingOptions(warmup=0).rate(0, 5) == 1e-3


def test_each_pass_takes_every_image_once_and_drops_the_incomplete_batch() -> None:
    batches = list(draw_batches(10, Plan(steps=6, batch_size=4), seed=3))
    assert all(len(batch) == 4 for batch in batches)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert len({*first, *second}) == 8
    assert batches[:2] != batches[2:4]
    assert batches == list(draw_batches(10, Plan(6, 4), seed=3))
    assert batches != list(draw_batches(10, Plan(6, 4), seed=4))


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_the_order_depends_on_the_step_and_not_on_the_way_there(first: int) -> None:
    plan = Plan(steps=7, batch_size=4)
    assert list(draw_batches(10, plan, 0))[first:] == list(draw_batches(10, plan, 0, first))


def test_fewer_images_than_a_batch_are_trained_on_all_the_same() -> None:
    options = TrainingOptions(epochs=5, batch_size=16)
    assert Plan.of(options, 3) == Plan(steps=5, batch_size=3)
    assert Plan.of(options, 1) == Plan(steps=5, batch_size=1)
    assert Plan.of(options, 33) == Plan(steps=10, batch_size=16)
    assert Plan.of(TrainingOptions(steps=7), 33).steps == 7
    for count in (1, 3):
        assert trained(Numbers(count=count)).slope.item() != 0 or count == 1


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="batches of 3 images cannot be shared among 2"):
        Plan.of(TrainingOptions(), 3, processes=2)


# ---- the optimiser ------------------------------------------------------------------------------


def stepped(gradients: list[Tensor], start: Tensor, **options: float) -> Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = StableAdamW([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_the_first_step_moves_by_the_learning_rate_in_the_gradients_sign() -> None:
    gradient = torch.tensor([3.0, -0.2, 1e-3])
    moved = stepped([gradient], torch.zeros(3), lr=0.01, weight_decay=0)
    torch.testing.assert_close(moved, -0.01 * gradient.sign())


def test_weight_decay_alone_shrinks() -> None:
    moved = stepped([torch.zeros(2)] * 3, torch.tensor([1.0, -2.0]), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(moved, torch.tensor([1.0, -2.0]) * 0.95**3)


def test_where_nothing_surprises_it_is_adamw_with_amsgrad() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    gradients = [torch.randn(5, generator=generator) * 0.5**k for k in range(6)]
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, eps=1e-10, weight_decay=0.1, amsgrad=True)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(
        stepped(gradients, start, lr=0.01, weight_decay=0.1), theirs.detach()
    )


def test_a_spike_is_damped_by_the_root_mean_square_of_its_surprise() -> None:
    calm, spike = torch.ones(4), 1000 * torch.ones(4)
    moved = stepped([calm, spike], torch.zeros(4), lr=0.1, weight_decay=0)
    second = 0.001 * 0.999 + 0.001 * 1000**2
    root = math.sqrt(second / (1 - 0.999**2))
    mean = (0.9 * 0.1 + 0.1 * 1000) / (1 - 0.9**2)
    surprise = 1000 / root
    assert surprise > 1.4
    expected = -0.1 - 0.1 * mean / root / surprise
    torch.testing.assert_close(moved, torch.full((4,), expected))


# ---- the loop -----------------------------------------------------------------------------------


def test_it_learns_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    network = trained(options=SHORT.model_copy(update={"steps": 200}))
    assert network.slope.item() == pytest.approx(2, abs=0.1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not network.training


def test_shapes_apart_give_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    """A mean over a batch is the weighted mean over its parts, and so is the gradient."""
    whole, parted = trained(Numbers(1)), trained(Numbers(2))
    for a, b in zip(state(whole), state(parted), strict=True):
        torch.testing.assert_close(a, b)


def test_progress_tells_the_loss_and_the_time_left() -> None:
    told: list[tuple[str, int, int, str]] = []

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        told.append((stage, done, total, note))

    train(Line(), Numbers(), SHORT, seed=0, hardware=CPU, progress=progress)
    assert [line[1] for line in told] == list(range(1, 13))
    assert told[3][0] == "train" and told[3][2] == 12
    assert told[3][3].startswith("loss ") and told[3][3].endswith("left")


def test_the_log_has_one_line_a_step(tmp_path: Path) -> None:
    trained(run=TrainingRun(tmp_path))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(12))
    assert float(rows[0]["learning_rate"]) == 0 and float(rows[3]["learning_rate"]) == 0.05
    assert float(rows[5]["half"]) == pytest.approx(float(rows[5]["loss"]) / 2, rel=1e-6)


def test_tensorboard_that_is_missing_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        TrainingRun(tmp_path, tensorboard=True).prepare()


def test_tensorboard_gets_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    told: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, step))

    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trained(run=TrainingRun(tmp_path, tensorboard=True))
    assert told.count(("loss", 11)) == 1 and len(told) == 12 * 4


def interrupted_at(last: int, source: Numbers) -> None:
    """Send Ctrl-C to this process while the step's images are fetched."""
    fetch = source.fetch

    def fetch_and_interrupt(numbers: Sequence[int], step: int) -> list[list[Tensor]]:
        if len(source.asked) == last:
            os.kill(os.getpid(), signal.SIGINT)
        return fetch(numbers, step)

    source.fetch = fetch_and_interrupt  # type: ignore[method-assign]


@pytest.mark.parametrize("at", [0, 1, 4, 11])
def test_interrupted_and_resumed_ends_at_the_same_weights(tmp_path: Path, at: int) -> None:
    source = Numbers()
    interrupted_at(at, source)
    with pytest.raises(KeyboardInterrupt):
        trained(source, run=TrainingRun(tmp_path, settings={"a": 1}))
    rest = Numbers()
    resumed = trained(rest, run=TrainingRun(tmp_path, resume=True, settings={"a": 1}))
    assert len(rest.asked) == 12 - (at + 1)
    for a, b in zip(state(resumed), state(trained()), strict=True):
        assert torch.equal(a, b)
    steps = [line.partition(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(12))]


def test_steps_after_the_last_checkpoint_are_done_and_logged_again(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    source = Numbers()
    fetch = source.fetch

    def crash_later(numbers: Sequence[int], step: int) -> list[list[Tensor]]:
        if len(source.asked) == 5:
            run.seconds = 1e9
        if len(source.asked) == 9:
            raise Crash
        return fetch(numbers, step)

    source.fetch = crash_later  # type: ignore[method-assign]
    run = TrainingRun(tmp_path, seconds=0)
    with pytest.raises(Crash):
        trained(source, run=run)
    rest = Numbers()
    resumed = trained(rest, run=TrainingRun(tmp_path, resume=True))
    assert len(rest.asked) == 12 - 5
    for a, b in zip(state(resumed), state(trained()), strict=True):
        assert torch.equal(a, b)
    steps = [line.partition(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert steps == ["step", *map(str, range(12))]


def test_killed_in_the_middle_of_a_save_the_former_checkpoint_is_whole(tmp_path: Path) -> None:
    """The process dies by SIGKILL with the new checkpoint half written."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_training import SHORT, TrainingRun, trained
        sync, saves = os.fsync, []
        def die(handle):
            saves.append(handle)
            if len(saves) == 6:
                os.ftruncate(handle, 100)
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)
        os.fsync = die
        from pathlib import Path
        trained(run=TrainingRun(Path({str(tmp_path)!r}), seconds=0))
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    assert list(tmp_path.glob(".*.partial"))
    rest = Numbers()
    resumed = trained(rest, run=TrainingRun(tmp_path, resume=True))
    assert len(rest.asked) == 12 - 5
    for a, b in zip(state(resumed), state(trained()), strict=True):
        assert torch.equal(a, b)


def test_resuming_without_a_checkpoint_begins_at_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TrainingRun(tmp_path / "new", resume=True)
    run.prepare()
    assert "starts from the beginning" in caplog.text
    source = Numbers()
    trained(source, run=run)
    assert len(source.asked) == 12


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    trained(run=TrainingRun(tmp_path, seconds=0, settings={"steps": 12, "seed": 0}))
    with pytest.raises(InputError, match=r"made with other seed \(0, now 1\)"):
        trained(run=TrainingRun(tmp_path, resume=True, settings={"steps": 12, "seed": 1}))


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    run = TrainingRun(tmp_path, seconds=0)
    trained(run=run)
    content = bytearray(run.checkpoint.read_bytes())
    if damage == "truncated":
        del content[-5:]
    else:
        content[-3] ^= 255
    run.checkpoint.write_bytes(content)
    with pytest.raises(
        InputError, match=r"checkpoint\.safetensors: .*remove the folder to train anew"
    ):
        trained(run=TrainingRun(tmp_path, resume=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_a_number_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, what: str
) -> None:
    class Spoilt(Line):
        steps = 0

        def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
            losses = super().forward(maps)
            Spoilt.steps += 1
            if Spoilt.steps == 8:
                if what == "loss":
                    losses["loss"] = losses["loss"] * float("nan")
                else:  # the root's slope at 0 is infinite, and infinity times 0 is not a number
                    losses["loss"] = losses["loss"] + (0 * self.slope).abs().sqrt().sum()
            return losses

    with pytest.raises(InputError, match=rf"the {what} is not a number at step 7; the checkpoint"):
        train(
            Spoilt(), Numbers(), SHORT, seed=0, hardware=CPU, run=TrainingRun(tmp_path, seconds=0)
        )
    run = TrainingRun(tmp_path, resume=True)
    network = Line()
    assert run.restore(network, StableAdamW(network.parameters())) == 7
    assert all(torch.isfinite(tensor).all() for tensor in state(network))


def test_a_full_disk_names_the_file_and_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anomalyst.training_run.replace_file", full)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: cannot be written \(No space"):
        trained(run=TrainingRun(tmp_path, seconds=0))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    losses = []
    networks = []
    for count in (1, 2):
        run = TrainingRun(tmp_path / str(count))
        run.prepare()
        network = Line()
        network.register_buffer("more", torch.ones(100_000))  # than a pipe between processes holds
        hardware = Hardware(torch.device("cpu"), count)
        train(network, Numbers(), SHORT, seed=0, hardware=hardware, run=run)
        networks.append(network)
        with run.log_file.open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    for a, b in zip(*map(state, networks), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
