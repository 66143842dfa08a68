"""The vision-language methods on real images: a tiny CLIP, and, slow, CLIPs of full size.

Random weights in checkpoints that these tests write: that everything fits together and runs is what
is shown, no accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import CLIP, Run, save, texture

# What each method is given, so that a pass or two of the towers is all that it takes.
QUICK = {
    "winclip": ["--set", "windows=shared"],
    "anople": ["--steps", 1, "--set", "batch_size=1", "--set", "views=whole"],
    "iipad": ["--steps", 2],
}
CASES = [
    ("clip-vit-b-16-plus-240", 240, "winclip"),
    ("clip-vit-b-16-plus-240", 240, "anople"),
    ("clip-vit-b-16-plus-240", 240, "iipad"),
    ("clip-vit-l-14", 224, "anople"),
    ("clip-vit-l-14", 224, "iipad"),
    ("open_clip:ViT-L-14-336-quickgelu", 336, "winclip"),
    ("open_clip:ViT-L-14-336-quickgelu", 336, "iipad"),
]


@pytest.mark.parametrize("method", QUICK)
def test_a_tiny_clip_is_fitted_taught_judged_by_and_measured(
    mvtec: Path, clip_weights: str, run: Run, tmp_path: Path, method: str
) -> None:
    bundle = tmp_path / "bundle"
    words = ["fit", method, mvtec, "-o", bundle, "--backbone", CLIP, "--weights", clip_weights]
    code, _, err = run(*words, *QUICK[method], "--shots", 1, "--category", "bottle")
    assert code == 0 and "bottle: 1 reference, calibrated on 41" in err
    code, _, err = run("enroll", bundle, "nut", "--normal", save(tmp_path / "n.png", texture(0)))
    assert code == 0, err
    code, out, err = run("predict", bundle, mvtec / "bottle/test/good", "-o", tmp_path, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == len(list((mvtec / "bottle/test/good").iterdir()))
    assert all(0 < row["p_value"] <= 1 for row in rows if row["calibrated"])
    words = ["evaluate", bundle, mvtec, "-o", tmp_path / "results", "--category", "bottle"]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["method"] == method and 0 <= found["categories"]["bottle"]["p_ap"] <= 1
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Full checkpoints of random weights by backbone, one at a time on the disk: 0.8 to 1.7 GB."""
    return {"folder": tmp_path_factory.mktemp("full")}


def checkpoint(kept: dict[str, Path], backbone: str) -> Path:
    """Write, or find, a backbone's file in open_clip's own names; the former one is removed."""
    if backbone not in kept:
        import open_clip
        import torch
        from safetensors.torch import save_file

        from anomalyst.features.backbones import find_backbone

        for name in [name for name in kept if name != "folder"]:
            kept.pop(name).unlink()
        config = open_clip.get_model_config(find_backbone(backbone).architecture)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = open_clip.CLIP(
                config["embed_dim"],
                config["vision_cfg"],
                config["text_cfg"],
                quick_gelu=config.get("quick_gelu", False),
            )
        kept[backbone] = kept["folder"] / f"{len(kept)}.safetensors"
        save_file(model.state_dict(), str(kept[backbone]))
    return kept[backbone]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "side", "method"), CASES)
def test_a_full_checkpoint_is_fitted_taught_and_judged_by(
    checkpoints: dict[str, Path],
    mvtec: Path,
    run: Run,
    tmp_path: Path,
    backbone: str,
    side: int,
    method: str,
) -> None:
    weights = checkpoint(checkpoints, backbone)
    bundle = tmp_path / "bundle"
    words = ["fit", method, mvtec, "-o", bundle, "--backbone", backbone, "--image-size", side]
    words += ["--weights", f"file:{weights}", "--set", "square=true", "--category", "bottle"]
    code, _, err = run(*words, *QUICK[method], "--shots", 1, "--calibration", 0)
    assert code == 0, err
    code, _, err = run(
        "enroll", bundle, "metal_nut", "--normal", save(tmp_path / "n.png", texture(0))
    )
    assert code == 0, err
    images = [mvtec / "bottle/test/good/000", mvtec / "bottle/test/broken_large/000"]
    images = [next(path.parent.glob(f"{path.name}.*")) for path in images]
    code, out, err = run("predict", bundle, *images, "-o", tmp_path / "p", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["category"] for row in rows] == ["bottle", "bottle"]
    assert all(isinstance(row["score"], float) for row in rows)
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["backbone"]["id"] == backbone and manifest["method"] == method
