"""What NAGL is trained by, against numbers worked out by hand, and its schedule."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyst.methods.losses import dice_loss, focal_loss
from anomalyst.methods.memory_bank import top_mean
from anomalyst.methods.nagl import Nagl, NaglOptions
from anomalyst.methods.nagl_losses import logit_losses, ranking_losses, score_losses
from slow_nagl import random, softplus, upsample


def mask_of(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.float64)
    mask[rows, columns] = 1
    return mask


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).sigmoid()


# ---- focal and dice -----------------------------------------------------------------------------


def test_focal_loss_of_two_guesses_by_hand() -> None:
    guesses = torch.tensor([0.9, 0.9], dtype=torch.float64)
    found = focal_loss(guesses, torch.tensor([1.0, 0.0]))
    right = 0.25 * 0.1**2 * 0.1053605
    wrong = 0.75 * 0.9**2 * 2.3025851
    assert found.item() == pytest.approx((right + wrong) / 2, rel=1e-6)


@pytest.mark.parametrize(("target", "expected"), [(1.0, 0.0433), (0.0, 0.1300)])
def test_focal_loss_of_not_knowing(target: float, expected: float) -> None:
    found = focal_loss(torch.tensor(0.0).sigmoid()[None], torch.tensor([target]))
    assert found.item() == pytest.approx(expected, abs=5e-5)


def test_focal_loss_without_focus_is_weighted_cross_entropy() -> None:
    p, target = probabilities(50), (random(50, seed=1) > 0).double()
    found = focal_loss(p, target, alpha=0.5, gamma=0.0)
    expected = torch.nn.functional.binary_cross_entropy(p, target) / 2
    torch.testing.assert_close(found, expected)


def test_focal_loss_stays_finite_at_certainty() -> None:
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    loss = focal_loss(p, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    loss.backward()
    assert loss.isfinite() and p.grad is not None and p.grad.isfinite().all()
    sure = focal_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert sure.item() == pytest.approx(0, abs=1e-12)


def test_dice_loss_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert dice_loss(p, target).item() == pytest.approx(1 - (2 * 1.5 + 1) / (2 + 2 + 1))
    assert dice_loss(p, target, smooth=0).item() == pytest.approx(1 - 3 / 4)


def test_dice_loss_of_perfect_probabilities_is_0_with_and_without_a_defect() -> None:
    for target in (mask_of(4, 5, slice(1, 3), slice(0, 2)), torch.zeros(4, 5)):
        assert dice_loss(target, target).item() == 0
    worst = dice_loss(torch.ones(40, 50), torch.zeros(40, 50)).item()
    assert worst == pytest.approx(1 - 1 / 2001)


# ---- image scores -------------------------------------------------------------------------------


def test_an_image_score_is_the_mean_of_one_in_a_hundred_patches() -> None:
    values = torch.arange(1024.0)[torch.randperm(1024, generator=torch.Generator().manual_seed(0))]
    assert top_mean(values.view(1, 32, 32), 0.01).item() == pytest.approx(1023 - 4.5)
    assert top_mean(values[:99].view(1, 9, 11), 0.01) == values[:99].max()
    assert top_mean(torch.full((2, 16, 16), 0.7), 0.01).tolist() == pytest.approx([0.7, 0.7])


# ---- the paper's losses -------------------------------------------------------------------------


def test_the_papers_losses_are_on_the_upsampled_scores() -> None:
    fused, mask = probabilities(3, 4), mask_of(12, 20, slice(2, 7), slice(5, 15))
    found = score_losses(fused, mask)
    full = torch.from_numpy(upsample(fused.numpy(), (12, 20)))
    assert found["image"].item() == pytest.approx(-log(fused.max()))
    torch.testing.assert_close(found["focal"], focal_loss(full, mask))
    torch.testing.assert_close(found["dice"], dice_loss(full, mask))
    torch.testing.assert_close(found["loss"], found["image"] + found["focal"] + found["dice"])
    normal = score_losses(fused, 0 * mask)
    assert normal["image"].item() == pytest.approx(-log(1 - fused.max()))


def test_the_papers_image_loss_means_ten_of_1024_patches() -> None:
    fused = probabilities(32, 32)
    top = fused.flatten().sort().values[-10:].mean().item()
    found = score_losses(fused, mask_of(64, 64, slice(0, 9), slice(0, 9)))
    assert found["image"].item() == pytest.approx(-log(top))


def test_perfect_and_opposite_scores_have_finite_losses() -> None:
    mask = mask_of(8, 8, slice(0, 8), slice(0, 4))
    right, wrong = score_losses(mask, mask), score_losses(1 - mask, mask)
    assert right["loss"].item() == pytest.approx(0, abs=1e-6)
    assert right["loss"] < wrong["loss"] and all(v.isfinite() for v in wrong.values())
    assert score_losses(0 * mask, mask)["image"].isfinite()


# ---- the losses of the authors' code ------------------------------------------------------------


@pytest.mark.parametrize(("top", "expected"), [(0.0, 1.3133), (0.5, 0.6931), (1.0, 0.3133)])
def test_the_authors_image_loss_is_squashed(top: float, expected: float) -> None:
    maps = torch.full((5, 6), top, dtype=torch.float64)
    mask = mask_of(10, 12, slice(0, 3), slice(0, 3))
    found = logit_losses(maps, 1 - maps, maps, mask)["image"]
    assert found.item() == pytest.approx(expected, abs=5e-5)
    found = logit_losses(1 - maps, maps, maps, 0 * mask)["image"]  # as much the other way
    assert found.item() == pytest.approx(expected, abs=5e-5)


def test_the_authors_image_loss_means_twenty_patches_or_all_of_fewer() -> None:
    for size, count in (((5, 8), 20), ((3, 4), 12)):
        fused = probabilities(*size)
        top = fused.flatten().sort().values[-count:].mean().item()
        mask = mask_of(16, 16, slice(0, 4), slice(0, 4))
        found = logit_losses(fused, fused, fused, mask)["image"].item()
        assert found == pytest.approx(softplus(1 - 2 * top))


def test_the_authors_pixel_losses_take_two_scores_for_logits() -> None:
    normal, abnormal = probabilities(3, 4), probabilities(3, 4, seed=1)
    mask = mask_of(12, 16, slice(2, 7), slice(5, 15))
    found = logit_losses((normal + abnormal) / 2, normal, abnormal, mask)
    focal, inter, total = [], np.zeros(2), np.zeros(2)
    z_normal, z_abnormal = (
        upsample(1 - normal.numpy(), (12, 16)),
        upsample(abnormal.numpy(), (12, 16)),
    )
    for i in range(12):
        for j in range(16):
            z, t = (z_normal[i, j], z_abnormal[i, j]), (1 - mask[i, j].item(), mask[i, j].item())
            for channel in range(2):
                p = 1 / (1 + exp(-z[channel]))
                hit = p if t[channel] else 1 - p
                focal.append((0.25 if t[channel] else 0.75) * (1 - hit) ** 2 * -log(hit))
                share = exp(z[channel]) / (exp(z[0]) + exp(z[1]))
                inter[channel] += share * t[channel]
                total[channel] += share + t[channel]
    assert found["focal"].item() == pytest.approx(np.mean(focal))
    assert found["dice"].item() == pytest.approx(np.sum(1 - (2 * inter + 1) / (total + 1)))
    torch.testing.assert_close(found["loss"], found["image"] + found["focal"] + found["dice"])


def test_the_authors_losses_have_a_floor_under_perfect_scores() -> None:
    mask = mask_of(32, 32, slice(0, 32), slice(0, 16))
    found = logit_losses(mask, mask, mask, mask)
    assert found["focal"].item() == pytest.approx(0.068, abs=5e-4)
    assert found["dice"].item() == pytest.approx(2 * 0.269, abs=2e-3)


# ---- ranks within an episode --------------------------------------------------------------------


def pair(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a good and a bad image, and where the bad one's defect is."""
    good, bad = (0.05 + 0.4 * probabilities(8, 10, seed=seed + k) for k in range(2))
    bad[2:4, 3:6] += 0.1
    return good, bad, mask_of(32, 40, slice(8, 16), slice(12, 24))


def test_ranking_by_hand() -> None:
    good = torch.tensor([[0.2, 0.1], [0.1, 0.1]], dtype=torch.float64)
    bad = torch.tensor([[0.4, 0.1], [0.3, 0.1]], dtype=torch.float64)
    mask = mask_of(4, 4, slice(0, 3), slice(0, 2))  # a whole patch, and half of the one below
    found = ranking_losses(good, bad, mask)
    high, next_, low = log(0.401), log(0.301), log(0.201)
    image = log(1 + exp(-10 * (high - low)))
    pixel = (log(1 + exp(-5 * (high - low))) + log(1 + exp(-5 * (next_ - low)))) / 2
    assert found["image"].item() == pytest.approx(image)
    assert found["pixel"].item() == pytest.approx(pixel)
    assert found["loss"].item() == pytest.approx(image + pixel)


def test_a_quarter_covered_is_defect_less_is_neither_unless_there_is_no_more() -> None:
    good, bad = (torch.full((2, 3), 0.1, dtype=torch.float64) for _ in range(2))
    bad[0, 1] = 0.5  # the hardest of all, were it taken for normal
    for rows, columns, pushed in (
        (slice(0, 4), slice(0, 5), [[1, 1, 0], [0, 0, 0]]),  # up: the second by a quarter
        (slice(0, 4), slice(3, 5), [[1, 1, 0], [0, 0, 0]]),  # both by a quarter
        (slice(0, 3), slice(0, 5), [[1, 0, 0], [0, 0, 0]]),  # the second by less
        (slice(3, 5), slice(3, 4), [[1, -1, 0], [1, 0, 0]]),  # one pixel each is all there is
    ):
        scores = bad.clone().requires_grad_()
        ranking_losses(2 * good, scores, mask_of(8, 12, rows, columns))["pixel"].backward()
        assert scores.grad is not None
        assert (-scores.grad).sign().int().tolist() == pushed


def test_scores_twice_as_high_in_all_images_lose_the_same() -> None:
    good, bad, mask = pair()
    losses = [ranking_losses(k * good, k * bad, mask)["loss"].item() for k in (1, 2, 1000)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # up to the tiny term
    assert losses[2] == pytest.approx(
        ranking_losses(1e6 * good, 1e6 * bad, mask)["loss"].item(), rel=1e-5
    )


def test_the_gradient_of_a_common_scale_is_next_to_nothing() -> None:
    good, bad, mask = pair()
    for size, limit in ((1.0, 2e-2), (100.0, 2e-4)):
        leaves = [(size * maps).requires_grad_() for maps in (good, bad)]
        ranking_losses(*leaves, mask)["loss"].backward()
        terms = torch.cat([(leaf * leaf.grad).flatten() for leaf in leaves])
        assert terms.sum().abs() < limit * terms.abs().sum()


def test_the_loss_falls_when_the_defects_scores_rise() -> None:
    good, bad, mask = pair()
    losses = []
    for step in range(6):
        raised = bad.clone()
        raised[2:4, 3:6] += 0.2 * step
        losses.append(ranking_losses(good, raised, mask))
    for name in ("image", "pixel", "loss"):
        values = [one[name].item() for one in losses]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] / 2
    assert losses[-1]["loss"] < 0.05


def test_only_the_highest_twentieth_of_normal_patches_is_pushed_down() -> None:
    good, bad, mask = pair()
    good.requires_grad_(), bad.requires_grad_()
    ranking_losses(good, bad, mask)["pixel"].backward()
    inside = mask.view(8, 4, 10, 4).mean((1, 3)) > 0
    assert good.grad is not None and bad.grad is not None
    assert (bad.grad[inside] < 0).all() and (bad.grad[~inside] >= 0).all()
    others = torch.cat([bad[~inside], good.flatten()])
    slopes = torch.cat([bad.grad[~inside], good.grad.flatten()])
    hardest = others >= others.sort(descending=True).values[len(others) // 20 - 1]
    assert torch.equal(slopes > 0, hardest) and hardest.sum() == (160 - 6) // 20


# ---- the recipe ---------------------------------------------------------------------------------


def test_steps_take_a_tenth_after_half_and_after_three_quarters() -> None:
    options = NaglOptions(**Nagl.presets["paper"]["options"])
    rates = {step: options.rate(step, 1260) for step in (0, 629, 630, 944, 945, 1259)}
    expected = {0: 1e-5, 629: 1e-5, 630: 1e-6, 944: 1e-6, 945: 1e-7, 1259: 1e-7}
    assert rates == pytest.approx(expected)
    # Epochs 10 and 15 of 20, with 63 steps each; the sum of all is the sheet's.
    assert 63 * 10 == 630 and 63 * 15 == 945
    assert sum(options.rate(step, 1260) for step in range(1260)) == pytest.approx(6.65e-3, rel=1e-2)


def test_by_default_the_rate_warms_up_and_falls_by_half_a_cosine() -> None:
    options = NaglOptions()
    assert options.rate(0, 315) == 0
    assert options.rate(30, 315) == pytest.approx(options.learning_rate)
    assert options.rate(314, 315) < options.learning_rate / 100


def test_the_number_of_steps_is_that_of_the_episodes_whatever_the_images() -> None:
    paper = NaglOptions(**Nagl.presets["paper"]["options"])
    assert {paper.planned_steps(images, 8) for images in (0, 7, 5000)} == {1260}
    assert NaglOptions().planned_steps(0, 8) == 5 * 63
    assert NaglOptions(steps=17).planned_steps(0, 8) == 17


def test_plain_adamw_takes_the_steps() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    found = NaglOptions().optimizer([weight])
    assert type(found) is torch.optim.AdamW
    assert found.defaults["weight_decay"] == 0.01 and found.defaults["betas"] == (0.9, 0.999)
