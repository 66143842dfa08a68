"""What methods on CLIP refuse, and what they must not lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anomalyst import Detector, load_dataset
from anomalyst.errors import InputError
from anomalyst.features import weights as store
from conftest import CLIP, load_part, texture


def changed(path: Path, given: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint, changed."""
    tensors = load_file(given.removeprefix("file:"))
    change(tensors)
    save_file(tensors, str(path))
    return path


def only_images(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if not name.startswith("visual.")]:
        del tensors[name]


def test_a_benchmark_takes_the_methods_own_backbone_for_auto(clip_weights: str) -> None:
    config = load_part("anople-ablation", data=[Path("x")])
    (first, *_) = config.variants
    assert config.arguments("anople", first)["backbone"] == "clip-vit-b-16-plus-240"
    named = load_part("anople-ablation", data=[Path("x")], backbone=CLIP, weights="file:w")
    chosen = named.arguments("anople", first)
    assert (chosen["backbone"], chosen["weights"]) == (CLIP, "file:w")


def test_half_a_clip_does_not_take_the_place_of_a_whole_one(
    clip_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "home"))
    half = changed(tmp_path / "half.safetensors", clip_weights, only_images)
    store.add(half, CLIP)  # where there is none yet it may come
    whole = store.add(clip_weights.removeprefix("file:"), CLIP)
    before = whole.read_bytes()
    with pytest.raises(InputError, match="holds the image tower alone, and the store has both"):
        store.add(half, CLIP)
    assert whole.read_bytes() == before


def test_weights_that_are_no_numbers_are_refused(clip_weights: str, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["visual.proj"][0, 0] = torch.nan

    path = changed(tmp_path / "nan.safetensors", clip_weights, spoil)
    detector = Detector("winclip", backbone=CLIP, weights=f"file:{path}", image_size=80)
    with pytest.raises(InputError, match=r"nan\.safetensors.*'visual\.proj' holds values that are"):
        detector.enroll("plate", [texture(0)])


def test_iipad_must_have_something_to_learn() -> None:
    nothing = {"semantic": 0, "alpha": 0, "beta": 0}
    detector = Detector("iipad", backbone=CLIP, options=nothing)
    with pytest.raises(InputError, match="semantic, alpha and beta are all 0"):
        detector.enroll("plate", [texture(0)])


def test_where_references_are_shared_enrolling_ends_every_calibration(
    clip_weights: str, make_parts: Callable[..., Path]
) -> None:
    data = load_dataset(make_parts(("across", "down"), good=5)).train
    for method, ended in (("iipad", True), ("winclip", False)):
        options = {"steps": 1} if method == "iipad" else {}
        detector = Detector(
            method, backbone=CLIP, weights=clip_weights, image_size=80, options=options
        )
        detector.fit(data, shots=1)
        assert set(detector.calibration) == {"across", "down"}
        detector.enroll("down", [texture(77)])
        assert set(detector.calibration) == (set() if ended else {"across"})
