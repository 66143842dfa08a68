"""Stored prototypes of INP-Former, and the checkpoints of its authors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from anomalyst.convert import convert_inp_former, rename
from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import make_options
from anomalyst.methods.inp_former import InpFormer, reconstruction_distance
from conftest import texture


def method(**options: object) -> InpFormer:
    spec = find_backbone("dinov2-small-packaged")
    made = InpFormer(make_options(InpFormer, options), spec, InpFormer.default_layers(spec), 0)
    made.trained = True
    return made


def targets(seed: int, grid: tuple[int, int] = (4, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 384, *grid, generator=generator) for _ in range(2)]


def test_the_map_is_the_geometric_mean_with_the_distance_to_the_nearest_stored_token() -> None:
    made, stored, query = method(stored=1000), targets(1), targets(2)
    made.enroll("plate", [stored])
    maps, _ = made.score(query, None)
    rebuilt = reconstruction_distance(query, made.network.reconstruct(query)).detach().numpy()
    bank = ((stored[0] + stored[1]) / 2).permute(0, 2, 3, 1).reshape(-1, 384).numpy()
    tokens = ((query[0] + query[1]) / 2).permute(0, 2, 3, 1).numpy()
    for place in np.ndindex(2, 4, 5):
        token = tokens[place]
        cosines = bank @ token / np.linalg.norm(bank, axis=1) / np.linalg.norm(token)
        expected = np.sqrt(rebuilt[place] * (1 - cosines.max()))
        assert maps[place].item() == pytest.approx(expected, rel=1e-3)


def test_so_many_are_stored_and_all_where_there_are_fewer() -> None:
    made = method(stored=7)
    made.enroll("plate", [targets(1), targets(2)])
    assert made.tensors()["stored.plate"].shape == (7, 384)
    torch.testing.assert_close(made.tensors()["stored.plate"].norm(dim=1), torch.ones(7))
    whole = method(stored=1000)
    whole.enroll("plate", [targets(1)])
    assert whole.tensors()["stored.plate"].shape == (2 * 4 * 5, 384)


def test_a_token_that_is_stored_scores_nothing_whatever_the_category() -> None:
    made = method(stored=1000)
    made.enroll("plate", [targets(1)])
    made.enroll("sheet", [targets(2)])
    for seed in (1, 2):
        maps, scores = made.score(targets(seed), None)
        assert float(maps.max()) < 1e-2 and float(scores.max()) < 1e-2
    assert float(made.score(targets(3), None)[0].min()) > 0.1


def test_without_stored_prototypes_nothing_is_kept() -> None:
    made = method()
    made.enroll("plate", [targets(1)])
    assert not any(name.startswith("stored") for name in made.tensors())


def test_stored_prototypes_come_back_from_a_bundle() -> None:
    made, other = method(stored=9), method(stored=9)
    made.enroll("plate", [targets(1)])
    other.load_tensors(made.tensors())
    torch.testing.assert_close(
        other.score(targets(2), None)[0], made.score(targets(2), None)[0], rtol=0, atol=0
    )


# ---- the authors' checkpoints -------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "registers"])
def official(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the authors' naming, of random weights; the encoder as DINOv2 names it."""
    registers = bool(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
        vit = timm.create_model(name, pretrained=False, img_size=518).state_dict()
        made = method()
        heads = made.network.state_dict()
    encoder = {f"encoder.{key}": value for key, value in vit.items() if key != "reg_token"}
    encoder["encoder.mask_token"] = torch.zeros(1, 384)
    if registers:  # DINOv2's table has a row for CLS, timm's has it in the token
        encoder["encoder.register_tokens"] = vit["reg_token"]
        row = torch.full((1, 1, 384), 0.01)
        encoder["encoder.cls_token"] = vit["cls_token"] - row
        encoder["encoder.pos_embed"] = torch.cat([row, vit["pos_embed"]], dim=1)
    theirs = {}
    for key, value in heads.items():
        if key == "extractor.tokens":
            key = "prototype_token"
        key = key.replace("extractor.", "aggregation.0.").replace("bottleneck.", "bottleneck.0.")
        if key.endswith(".scale"):
            key = key.replace(".scale", ".attn.learn_scale")
        theirs[key] = value
    path = tmp_path_factory.mktemp("official") / "model.pth"
    torch.save({**encoder, **theirs}, path)
    return path


def test_every_head_has_its_own_name() -> None:
    names = method().network.state_dict()
    theirs = [n.replace("extractor.tokens", "prototype_token") for n in names]
    theirs = [n.replace("extractor.", "aggregation.0.") for n in theirs]
    theirs = [n.replace("bottleneck.", "bottleneck.0.") for n in theirs]
    theirs = [n.replace(".scale", ".attn.learn_scale") for n in theirs]
    assert [rename(name) for name in theirs] == list(names)


@pytest.mark.slow
def test_an_official_checkpoint_becomes_a_bundle(official: Path, tmp_path: Path) -> None:
    detector = convert_inp_former(official, image_size=56, resize=70)
    registers = "register_tokens" in str(torch.load(official, weights_only=True).keys())
    assert detector.backbone_id == ("dinov2-small-reg" if registers else "dinov2-small")
    assert detector.engine.backbone.layers == tuple(range(2, 10))
    given = torch.load(official, weights_only=True)
    mine = detector.method.tensors()
    assert torch.equal(mine["network.extractor.tokens"], given["prototype_token"])
    scale = given["decoder.7.attn.learn_scale"]
    assert torch.equal(mine["network.decoder.7.scale"], scale)
    detector.save(tmp_path / "bundle")
    loaded = Detector.load(tmp_path / "bundle")
    (found,), (again,) = (list(d.predict(texture(3))) for d in (detector, loaded))
    assert found.score == again.score and found.category is None and not found.calibrated


@pytest.mark.slow
def test_its_features_are_those_of_the_encoder_inside(official: Path) -> None:
    """Through timm, at the size of the position table, where nothing is interpolated."""
    given = torch.load(official, weights_only=True)
    registers = "encoder.register_tokens" in given
    vit = timm.create_model(
        f"vit_small_patch14_{'reg4_' if registers else ''}dinov2", pretrained=False, img_size=518
    ).eval()
    state = {k.removeprefix("encoder."): v for k, v in given.items() if k.startswith("encoder.")}
    state.pop("mask_token")
    if registers:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    vit.load_state_dict(state)
    image = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (expected,) = vit.forward_intermediates(
            image, indices=[2], norm=False, stop_early=True, intermediates_only=True
        )
    backbone = convert_inp_former(official, image_size=518, resize=518).engine.backbone
    torch.testing.assert_close(backbone(image)[0], expected, rtol=1e-4, atol=1e-4)


def spoilt(official: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = torch.load(official, weights_only=True)
    change(tensors)
    path = folder / "spoilt.pth"
    torch.save(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prototype_token"), "no 'prototype_token'"),
        (lambda t: t.pop("decoder.3.attn.q.weight"), "not the heads of INP-Former"),
        (lambda t: t.pop("encoder.blocks.4.attn.qkv.bias"), "not weights of dinov2-small"),
        (lambda t: t.pop("encoder.cls_token"), "has no encoder of DINOv2"),
        (lambda t: t.update({"decoder.8.norm1.bias": torch.zeros(384)}), "not the heads"),
    ],
)
def test_another_checkpoint_is_refused_in_one_line(
    official: Path, tmp_path: Path, change, message
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        convert_inp_former(spoilt(official, tmp_path, change))
    assert "\n" not in str(refused.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("no weights")
    with pytest.raises(InputError, match=r"notes\.pth: not a checkpoint"):
        convert_inp_former(path)
    with pytest.raises(InputError, match=r"absent\.pth"):
        convert_inp_former(tmp_path / "absent.pth")
