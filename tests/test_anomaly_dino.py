"""AnomalyDINO's steps on feature maps small enough to check by hand or independently."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi

import numpy as np
import pytest
import torch
from scipy import ndimage

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.anomaly_dino import AnomalyDINO, foreground
from anomalyst.methods.base import make_options
from anomalyst.methods.views import Affine


def anomaly_dino(options: Mapping[str, object]) -> AnomalyDINO:
    spec = find_backbone("dinov2-small-packaged")
    return AnomalyDINO(make_options(AnomalyDINO, options), spec, (8,), 0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_reference_scores_zero_orthogonal_one_opposite_two() -> None:
    method = anomaly_dino({})
    reference = torch.zeros(1, 3, 2, 2)
    reference[:, 0] = 5.0
    method.enroll("a", [[reference]])
    for channel, sign, expected in ((0, 1, 0.0), (1, 1, 1.0), (0, -1, 2.0)):
        query = torch.zeros(1, 3, 2, 2)
        query[:, channel] = sign * 0.3
        maps, scores = method.score([query], "a")
        assert maps.unique().tolist() == pytest.approx([expected], abs=1e-6)
        assert float(scores) == pytest.approx(expected, abs=1e-6)


def test_scale_of_a_patch_means_nothing_and_more_references_never_raise_a_score() -> None:
    method = anomaly_dino({})
    method.enroll("a", [[random(1, 8, 5, 5)]])
    query = random(2, 8, 5, 5, seed=1)
    before, _ = method.score([query], "a")
    scaled, _ = method.score([query * (random(2, 1, 5, 5, seed=2).abs() + 0.1)], "a")
    torch.testing.assert_close(before, scaled, rtol=0, atol=1e-6)
    method.enroll("a", [[random(1, 8, 5, 5, seed=3)]])
    after, _ = method.score([query], "a")
    assert (after <= before + 1e-6).all()
    assert (after < before - 1e-3).any()


def test_image_score_is_the_mean_of_the_highest_percent() -> None:
    method = anomaly_dino({})
    method.enroll("a", [[random(1, 4, 20, 20)]])
    maps, scores = method.score([random(1, 4, 20, 20, seed=1)], "a")
    assert float(scores) == pytest.approx(float(maps.flatten().sort().values[-4:].mean()), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 40), (30, 50)])
def test_quarter_and_half_turns_move_pixels_exactly(shape: tuple[int, int]) -> None:
    image = random(1, 3, *shape)
    torch.testing.assert_close(Affine(pi)(image), image.flip(2, 3), rtol=0, atol=1e-4)
    if shape[0] == shape[1]:
        turned = Affine(pi / 2)(image)
        same = [torch.allclose(turned, image.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3)]
        assert same.count(True) == 1


def test_any_turn_agrees_with_scipy_inside_the_canvas() -> None:
    yy, xx = np.mgrid[:60, :90]
    picture = np.sin(xx / 7) + np.cos(yy / 5)
    turned = Affine(pi / 4)(torch.from_numpy(picture)[None, None].float())[0, 0].numpy()
    middle = (slice(22, 38), slice(30, 60))
    gaps = [
        np.abs(
            ndimage.rotate(picture, angle, reshape=False, order=1)[middle] - turned[middle]
        ).max()
        for angle in (45, -45)
    ]
    assert min(gaps) < 0.02 < max(gaps)


def test_rotated_references_find_a_turned_image() -> None:
    images = random(2, 3, 16, 16)
    views = [view.apply(images) for view in anomaly_dino({"rotations": 4}).reference_views]
    assert len(views) == 4
    assert torch.equal(views[0], random(2, 3, 16, 16))
    assert not torch.allclose(views[1], views[3])


def test_foreground_is_the_object_whatever_the_components_sign() -> None:
    direction = random(6, seed=1) / random(6, seed=1).norm()
    for sign in (1, -1):
        maps = 0.1 * random(1, 6, 16, 16)
        maps[0, :, 3:13, 3:13] += sign * 60 * direction[:, None, None]
        mask = foreground(maps, 10.0)[0]
        expected = np.zeros((16, 16))
        expected[2:14, 2:14] = 1  # dilated by one patch
        np.testing.assert_array_equal(mask.numpy(), expected)


def test_background_patches_score_zero() -> None:
    method = anomaly_dino({"foreground": True, "foreground_threshold": 10})
    maps = 0.1 * random(1, 6, 16, 16)
    maps[0, 0, 4:12, 4:12] += 60
    method.enroll("a", [[random(1, 6, 16, 16, seed=5)]])
    scores, _ = method.score([maps], "a")
    assert (scores[0, :3] == 0).all()
    assert (scores[0, 6:10, 6:10] > 0).all()


def test_the_papers_threshold_serves_the_papers_features_only() -> None:
    """Elsewhere tokens have another length: 10 would call everything background, unnoticed."""
    options = make_options(AnomalyDINO, {"foreground": True})
    AnomalyDINO(options, find_backbone("dinov2-small"), (11,), 0)
    for backbone, layer in (("dinov2-small", 7), ("dinov2-small-packaged", 8)):
        with pytest.raises(InputError, match="foreground_threshold"):
            AnomalyDINO(options, find_backbone(backbone), (layer,), 0)
