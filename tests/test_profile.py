"""What a profile counts is counted by hand; what it times is there; nothing of it is left over."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from anomalyst.errors import InputError
from anomalyst.methods import REGISTRY
from anomalyst.methods.base import find_method
from conftest import CLIP, DEEP, Run

torch = pytest.importorskip("torch")

from anomalyst import cli_profile, profiling, profiling_clock, profiling_meter  # noqa: E402
from anomalyst.detector import Detector  # noqa: E402
from anomalyst.features.backbones import find_backbone  # noqa: E402
from anomalyst.features.random_weights import random_tensors  # noqa: E402
from anomalyst.profiling import profile  # noqa: E402
from anomalyst.profiling_meter import (  # noqa: E402
    Memory,
    StepMeter,
    count_flops,
    seconds,
    time_in_turn,
)
from anomalyst.profiling_parts import Parts  # noqa: E402
from anomalyst.profiling_record import Peak, Profile, Spread  # noqa: E402
from anomalyst.profiling_stages import saved_bytes  # noqa: E402

pytestmark = pytest.mark.usefixtures("clip_weights")

SIDE = 48
GRID = (SIDE // 16) ** 2  # patches of both tiny backbones
CPU = torch.device("cpu")
QUICK: dict[str, dict[str, Any]] = {
    "onenip": {"width": 32, "heads": 4, "hidden": 64, "encoder_layers": 1, "decoder_layers": 1},
    "nagl": {"normals": 2, "abnormals": 1},
}


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling_clock, "_ENOUGH", 0.0)
    # Half a second a stage over all that the tests have imported.
    monkeypatch.setattr(profiling_meter.gc, "collect", lambda: 0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go: nothing may be left there."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


def take(method: str, **more: Any) -> Profile:
    spec = find_method(method)
    options = {"batch_size": 2, **QUICK.get(method, {})} if spec.trains_on else {}
    settings = {
        "backbone": CLIP if spec.backbone.startswith("clip") else DEEP,
        "options": {**options, **more.pop("options", {})},
        "device": "cpu",
    }
    usual = {"image_sizes": [SIDE], "batch_sizes": [1, 2], "shots": 2, "random": True}
    if spec.trains_on:
        usual["steps"] = 2
    return profile(method, settings=settings, **{**usual, **more})


# ---- counted ------------------------------------------------------------------------------------


def test_flops_of_a_linear_layer_and_of_attention() -> None:
    rows = torch.randn(5, 8)
    layer = torch.nn.Linear(8, 16)
    assert count_flops(lambda: layer(rows)) == 2 * 5 * 8 * 16
    # Backward: the weights' gradient; the rows need none.
    assert count_flops(lambda: layer(rows).sum().backward()) == 2 * (2 * 5 * 8 * 16)

    tokens, attention = torch.randn(3, 7, 12), torch.nn.MultiheadAttention(12, 4, batch_first=True)
    projections = 3 * 7 * 12 * (3 * 12) + 3 * 7 * 12 * 12
    mixing = 2 * (3 * 7 * 7 * 12)  # q k' and weights v, over all heads
    for wanted in (True, False):  # the fast path is a kernel that torch does not count

        @torch.inference_mode()
        def attend(weights: bool = wanted) -> object:
            return attention.eval()(tokens, tokens, tokens, need_weights=weights)

        assert count_flops(attend) == 2 * (projections + mixing)
    assert torch.backends.mha.get_fastpath_enabled()


def vit_flops(blocks: int, width: int, hidden: int, tokens: int, patches: int, patch: int) -> int:
    """Return the flops of a plain vision transformer's blocks and patch embedding, by hand."""
    embedding = patches * 3 * patch**2 * width
    linear = tokens * width * (3 * width + width + 2 * hidden)
    attention = 2 * tokens**2 * width
    return 2 * (embedding + blocks * (linear + attention))


def test_a_method_by_hand() -> None:
    """AnomalyDINO: the backbone's blocks, then one product of all patches with the bank."""
    found = take("anomaly-dino", shots=3, categories=2)
    (size,) = found.sizes
    tensors = random_tensors(find_backbone(DEEP))
    blocks, (hidden, width) = found.layers[0] + 1, tensors["blocks.0.mlp.fc1.weight"].shape
    prefix = tensors["pos_embed"].shape[1] - (160 // 16) ** 2
    tokens = GRID + prefix
    assert size.backbone_flops == vit_flops(blocks, width, hidden, tokens, GRID, 16)
    # Similarity to 3 references of 9 patches.
    assert size.method_flops == 2 * GRID * 3 * GRID * width

    run = [f"blocks.{k}." for k in range(blocks)] + ["patch_embed", "cls_token", "pos_embed", "reg"]
    used = [value.numel() for name, value in tensors.items() if name.startswith(tuple(run))]
    assert vars(found.parameters) == {"backbone": sum(used), "method": 0, "trained": 0}
    assert (size.training, size.enrolment.normal, size.enrolment.abnormal) == (None, 3, 0)


def test_a_clip_by_hand() -> None:
    """AnoPLe: one plain pass of the image tower is the backbone; nothing of "i2t" is left out."""
    found = take("anople", batch_sizes=[1], options={"interaction": "i2t"})
    blocks, seen, read, joint = 4, 64, 48, 48
    plain = vit_flops(blocks, seen, 4 * seen, GRID + 1, GRID, 16) + 2 * seen * joint
    assert found.sizes[0].backbone_flops == plain
    tensors = random_tensors(find_backbone(CLIP)).values()
    prompts = 3 * 4 * read + 3 * 4 * seen + 5 * seen  # in three of four blocks; a prefix a view
    to_text, to_visual = 3 * (seen * read + read), 3 * (read * seen + seen)
    upward = (joint * 128 * 4 + 128) + (128 * 128 * 4 + 128) + 2 * 2 * 128
    decoder = upward + (128 * joint + joint) + joint * joint
    every = prompts + to_text + to_visual + decoder
    assert vars(found.parameters) == {
        "backbone": sum(tensor.numel() for tensor in tensors),
        "method": every,
        "trained": every - to_visual,
    }


def test_flops_of_a_training_step_are_those_of_one() -> None:
    """All that INP-Former does with an image it does with that image alone."""
    flops = {
        batch: take("inp-former", batch_sizes=[1], options={"batch_size": batch}).sizes[0].training
        for batch in (2, 4)
    }
    assert (flops[2].batch_size, flops[4].batch_size) == (2, 4)
    assert flops[4].flops == 2 * flops[2].flops > 0
    assert flops[2].step.count == 2


def test_the_counted_step_is_neither_timed_nor_in_the_memory() -> None:
    class Told:
        peaks: ClassVar = [50.0, 80.0]
        restarted = 0

        def restart(self) -> None:
            self.restarted += 1

        def peak(self) -> Peak:
            return Peak(self.peaks.pop(0), None)

    layer, rows, memory = torch.nn.Linear(8, 16), torch.randn(5, 8), Told()
    seen: list[int] = []
    with StepMeter(memory, CPU, lambda stage, done, total, note="": seen.append(done)) as meter:  # type: ignore[arg-type]
        for done in range(1, 6):
            layer(rows)
            meter("train", done, 5)
    assert meter.flops == 2 * 5 * 8 * 16  # of the second step alone
    assert (len(meter.times), memory.restarted, seen) == (3, 1, [1, 2, 3, 4, 5])
    assert meter.peak() == Peak(80.0, None) and Told.peaks == []


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_every_method_has_its_profile(method: str) -> None:
    spec = REGISTRY[method]
    found = take(method, categories=2)
    (size,) = found.sizes
    assert found.note == "random weights: figures of cost only"
    assert [each.batch_size for each in size.judging] == [1, 2]
    for each in size.judging:
        assert 0 < each.image.low <= each.image.median <= each.image.high
        assert each.ratio > 0 and each.backbone.count == 5
    assert size.backbone_flops > 0 and size.method_flops > 0
    trained = spec.trains_on is not None
    assert (size.training is not None) == trained == (found.parameters.trained > 0)
    assert size.enrolment is not None and size.enrolment.reference.low > 0
    assert size.enrolment.normal == 2
    assert size.enrolment.abnormal == (1 if spec.abnormal_references else 0)
    assert sum(size.bundle.values()) == 2 * size.bundle["total"]
    assert size.bundle["backbone"] > 4 * found.parameters.backbone
    assert "steps" not in found.options or found.options["steps"] is None
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_without_references_where_fit_takes_none_either() -> None:
    found = take("winclip", options={"zero_shot": True}, batch_sizes=[1])
    assert found.sizes[0].enrolment is None and found.sizes[0].judging


def test_sizes_come_in_order_and_cost_what_they_cost() -> None:
    found = take("patchcore", image_sizes=[96, 32, 96], batch_sizes=[2, 1])
    assert [size.image_size for size in found.sizes] == [32, 96]
    assert [each.batch_size for each in found.sizes[0].judging] == [1, 2]
    small, large = found.sizes
    assert large.backbone_flops > 7 * small.backbone_flops  # 37 tokens and 5
    assert large.bundle["method"] > small.bundle["method"]


def test_random_weights_are_those_of_a_file(deep_weights: str) -> None:
    drawn = take("patchcore", batch_sizes=[1])
    settings = {"backbone": DEEP, "weights": deep_weights}
    read = profile("patchcore", settings=settings, image_sizes=[SIDE], batch_sizes=[1], shots=1)
    assert read.weights_sha256 == drawn.weights_sha256 and read.note is None


def test_the_bundle_is_measured_file_by_file(deep_weights: str, tmp_path: Path) -> None:
    detector = Detector("patchcore", backbone=DEEP, weights=deep_weights, image_size=SIDE)
    detector.enroll("bottle", [Parts(SIDE).good(0, 0)])
    bundle = tmp_path / "bundle"
    found = saved_bytes(detector, bundle)
    named = json.loads((bundle / "bundle.json").read_text())["files"]
    sizes = {part: (bundle / name).stat().st_size for part, name in named.items()}
    sizes["bundle.json"] = (bundle / "bundle.json").stat().st_size
    assert found == {**sizes, "total": sum(sizes.values())}
    assert len(sizes) == 4


# ---- timed and weighed --------------------------------------------------------------------------


def test_both_are_timed_in_turn() -> None:
    calls: list[str] = []
    first, second = time_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], CPU)
    assert calls == ["a", "b"] * 7  # two to warm up, five rounds
    assert len(first) == len(second) == 5


def test_a_gpu_is_waited_for_and_its_memory_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in: what this asks of torch, in which order."""
    cuda, calls = torch.device("cuda"), []
    names = ("synchronize", "empty_cache", "reset_peak_memory_stats")
    for name in names:
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    seconds(lambda: calls.append("work"), cuda)
    assert calls == ["synchronize", "work", "synchronize"]
    calls.clear()
    memory = Memory(cuda)
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    assert memory.peak().gpu_mb == 3.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_is_the_peak_of_its_stage() -> None:
    memory = Memory(CPU)
    np.ones(8_000_000)  # 64 MB, freed at once
    assert 60 < (memory.peak().host_mb or 0) < 90
    memory.restart()
    assert (memory.peak().host_mb or 0) < 20


def test_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_parts_are_fixed_and_their_masks_exact() -> None:
    parts = Parts(64)
    good, (bad, mask) = parts.good(0, 1), parts.bad(0, 1)
    assert good.shape == bad.shape == (64, 64, 3) and good.dtype == bad.dtype == np.uint8
    np.testing.assert_array_equal(good, parts.good(0, 1))
    assert (good != parts.good(0, 2)).any() and (good != Parts(64, seed=1).good(0, 1)).any()
    assert 0.01 < mask.mean() < 0.1
    # Another product's images are further away than another image of the same one.
    far, near = (np.abs(good.astype(float) - parts.good(k, 2)).mean() for k in (1, 0))
    assert far > 3 * near
    names = Parts.names(10)
    assert names[:2] == ["bottle", "screw"] and len(set(names)) == 10


# ---- refused, stopped, printed ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("patchcorr", {}, "did you mean 'patchcore'"),
        ("patchcore", {"options": {"coresett": 1}}, "did you mean 'coreset'"),
        ("patchcore", {"image_sizes": [SIDE, 50]}, "patchcore at 50 pixels"),
        ("nagl", {"image_sizes": [8]}, "nagl at 8 pixels: image size 8 is not"),
        ("patchcore", {"batch_sizes": [0]}, "batch size 0"),
        ("patchcore", {"batch_sizes": []}, "batch size 0"),
        ("patchcore", {"shots": 0}, "shots 0"),
        ("patchcore", {"categories": 0}, "categories 0"),
        ("patchcore", {"steps": 3}, "takes no gradient steps"),
        ("inp-former", {"steps": 0}, "steps 0"),
        ("inp-former", {"settings": {"backbone": "timm:test_vit"}}, "8 blocks or more"),
        ("patchcore", {"settings": {"weights": "file:x"}}, "choose one of the two"),
        ("patchcore", {"settings": {"device": "gpu"}}, "unknown device 'gpu'"),
    ],
)
def test_refusals_cost_no_work(
    method: str, more: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "random_weights", lambda *_: pytest.fail("work was done"))
    settings = {"backbone": DEEP, "options": more.pop("options", {}), **more.pop("settings", {})}
    with pytest.raises(InputError, match=expected):
        profile(method, settings=settings, **{"random": True, "image_sizes": [SIDE], **more})


def test_too_much_for_the_gpu_is_said_of_method_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profiling, "judge_parts", full)
    with pytest.raises(InputError, match="patchcore at 48 pixels: more than the GPU's memory"):
        take("patchcore")


def test_stopped_while_it_counts_leaves_torch_as_it_was(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    opened = StepMeter._between_steps

    def stop(meter: StepMeter, done: int) -> None:
        opened(meter, done)
        assert _get_current_dispatch_mode() is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(StepMeter, "_between_steps", stop)
    code, out, err = run(
        "profile", "inp-former", "--random-weights", "--backbone", DEEP, "--image-size", SIDE,
        "--device", "cpu",
    )  # fmt: skip
    assert (code, out) == (130, "") and err.splitlines()[-1] == "stopped"
    assert _get_current_dispatch_mode() is None and torch.backends.mha.get_fastpath_enabled()


def test_figures_are_printed_with_fitting_units() -> None:
    assert cli_profile.as_time(Spread(0.0921, 0.09, 1.2, 5)) == "92.1 ms (90.0 to 1200.0)"
    assert cli_profile.as_time(Spread(2.5, 0.994, 3.0, 5)) == "2.50 s (0.99 to 3.00)"
    counts = (9_590_000_000_000, 13_509_488_640, 790_000)
    assert [cli_profile._flops(n) for n in counts] == ["9.59 TFLOP", "13.51 GFLOP", "0.79 MFLOP"]
    assert cli_profile._memory(Peak(135.6, 1202.9)) == "136 MB, GPU 1203 MB"
    assert cli_profile._memory(Peak(None, None)) is None


def test_the_command(run: Run, tmp_path: Path) -> None:
    words = [
        "profile", "nagl", "--random-weights", "--backbone", DEEP, "--image-size", SIDE,
        "--batch-size", 1, "--shots", 2, "--steps", 2, "--device", "cpu",
        "--set", "normals=2", "--set", "abnormals=1", "--set", "batch_size=2",
    ]  # fmt: skip
    code, out, _ = run(*words, "-o", tmp_path / "out")
    assert code == 0
    written = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert out.startswith(f"nagl on {DEEP}, cpu, ")
    assert "random weights: figures of cost only" in out
    assert "enrolling one reference (of 2 good and 1 bad)" in out
    assert "one training step (batch of 2)" in out and "48 px" in out
    size = written["sizes"][0]
    assert f"{size['training']['flops'] / 1e6:.2f} MFLOP" in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / "profile.json")

    code, out, err = run(*words, "--json")
    again = json.loads(out)
    assert code == 0 and again["sizes"][0]["training"]["flops"] == size["training"]["flops"]
    code, _, err = run("profile", "nagl", "--image-size", 9, "--backbone", DEEP)
    assert code == 2 and "nagl at 9 pixels" in err
