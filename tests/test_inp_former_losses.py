"""INP-Former's two losses, against closed forms."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyst.methods.inp_former import nearest_distance, soft_mining_loss
from slow_inp_former import cosine, random

# ---- coherence ----------------------------------------------------------------------------------


def positive(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).abs() + 0.1


def test_coherence_is_zero_where_every_token_is_a_positive_multiple_of_a_prototype() -> None:
    prototypes = random(2, 4, 9)
    which = torch.tensor([0, 3, 3, 1, 0, 2, 2])
    tokens = prototypes[:, which] * positive(2, 7, 1, seed=1)
    assert nearest_distance(tokens, prototypes).abs().max() < 1e-12
    assert nearest_distance(tokens.float(), prototypes.float()).abs().max() < 1e-6


def test_orthogonal_tokens_are_at_one_opposite_ones_at_two_and_none_farther() -> None:
    axes = torch.eye(3, dtype=torch.float64)[None]
    found = nearest_distance(torch.stack([axes[0, 1], -axes[0, 0]])[None], axes[:, :1])
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    found = nearest_distance(random(3, 50, 4), random(3, 2, 4, seed=1))
    assert (found >= 0).all() and (found <= 2).all()
    assert found.max() > 1  # the range is used


def test_scales_and_the_order_of_prototypes_mean_nothing_to_coherence() -> None:
    tokens, prototypes = random(2, 11, 6), random(2, 5, 6, seed=1)
    expected = nearest_distance(tokens, prototypes)
    scaled = nearest_distance(
        tokens * positive(2, 11, 1, seed=2), prototypes * positive(2, 5, 1, seed=3)
    )
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-12)
    turned = nearest_distance(tokens, prototypes[:, [3, 0, 4, 2, 1]])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_more_prototypes_never_take_a_token_farther_away() -> None:
    tokens, prototypes = random(2, 30, 6), random(2, 6, 6, seed=1)
    distances = [nearest_distance(tokens, prototypes[:, :m]) for m in range(1, 7)]
    for fewer, more in pairwise(distances):
        assert (more <= fewer + 1e-12).all()
    assert (distances[-1] < distances[0] - 0.1).any()


def test_only_prototypes_nearest_to_some_token_get_a_gradient() -> None:
    prototypes = torch.eye(4, dtype=torch.float64)[None].clone().requires_grad_()
    tokens = torch.tensor([[[5.0, 1, 0, 0], [3.0, -1, 1, 0], [0, 1, 7, 2]]], dtype=torch.float64)
    nearest_distance(tokens, prototypes).mean().backward()
    assert prototypes.grad is not None
    moved = prototypes.grad[0].abs().sum(1) > 1e-12
    assert moved.tolist() == [True, False, True, False]
    # Of a unit prototype p and unit tokens t: the gradient of -cos is p (p t) - t, here a mean.
    units = tokens[0] / tokens[0].norm(dim=1, keepdim=True)
    p = prototypes.detach()[0]
    expected = sum(p[0] * (p[0] @ units[k]) - units[k] for k in (0, 1)) / 3
    torch.testing.assert_close(prototypes.grad[0, 0], expected)


def test_coherence_equals_its_slow_broadcast_form() -> None:
    tokens, prototypes = random(2, 13, 8), random(2, 6, 8, seed=1)
    slow = [
        [min(1 - cosine(t, p) for p in prototypes[b].numpy()) for t in tokens[b].numpy()]
        for b in range(2)
    ]
    found = nearest_distance(tokens, prototypes)
    np.testing.assert_allclose(found.numpy(), slow, rtol=0, atol=1e-12)
    found = nearest_distance(tokens.float(), prototypes.float())
    np.testing.assert_allclose(found.numpy(), slow, rtol=0, atol=1e-6)


# ---- soft mining --------------------------------------------------------------------------------


def maps(seed: int) -> list[Tensor]:
    """Two groups of maps of three images, some positions close to the others' direction."""
    return [random(3, 6, 4, 5, seed=seed), 2 * random(3, 6, 4, 5, seed=seed + 1) + 0.5]


def loss_and_gradients(
    targets: list[Tensor], rebuilt: list[Tensor], gamma: float
) -> tuple[float, list[np.ndarray]]:
    leaves = [r.detach().clone().requires_grad_() for r in rebuilt]
    loss = soft_mining_loss(targets, leaves, gamma)
    loss.backward()
    return loss.item(), [leaf.grad.double().numpy() for leaf in leaves if leaf.grad is not None]


def closed_form(target: Tensor, rebuilt: Tensor, groups: int) -> np.ndarray:
    """The unweighted gradient of sheet section 5.1, in NumPy: one image after the other."""
    found = []
    for e, r in zip(target.double().numpy(), rebuilt.double().numpy(), strict=True):
        x, y = e.ravel(), r.ravel()
        a, b = np.sqrt(x @ x), np.sqrt(y @ y)
        slope = x / (a * b) - cosine(x, y) * y / b**2
        found.append((-slope / (groups * len(target))).reshape(r.shape))
    return np.stack(found)


def mining_weights(target: Tensor, rebuilt: Tensor, gamma: float) -> np.ndarray:
    """(d / mean d) ** gamma of every position, the mean over the batch and all positions."""
    e, r = target.double().numpy(), rebuilt.double().numpy()
    batch, _, height, width = e.shape
    d = np.zeros((batch, 1, height, width))
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                d[b, 0, i, j] = 1 - cosine(e[b, :, i, j], r[b, :, i, j])
    return (d / d.mean()) ** gamma


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0, 7.5])
def test_the_value_is_the_plain_distance_of_whole_images_for_any_gamma(gamma: float) -> None:
    targets, rebuilt = maps(0), maps(5)
    expected = np.mean(
        [
            1 - cosine(e.numpy().ravel(), r.numpy().ravel())
            for target, output in zip(targets, rebuilt, strict=True)
            for e, r in zip(target, output, strict=True)
        ]
    )
    assert soft_mining_loss(targets, rebuilt, gamma).item() == pytest.approx(expected, rel=1e-6)


def test_gamma_changes_no_bit_of_the_value() -> None:
    targets, rebuilt = maps(0), maps(5)
    values = {soft_mining_loss(targets, rebuilt, gamma).item() for gamma in (0.0, 1.0, 3.0)}
    assert len(values) == 1


def test_without_mining_the_gradient_is_that_of_the_plain_distance() -> None:
    targets, rebuilt = maps(0), maps(5)
    _, gradients = loss_and_gradients(targets, rebuilt, 0.0)
    for e, r, gradient in zip(targets, rebuilt, gradients, strict=True):
        expected = closed_form(e, r, 2)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_each_tokens_gradient_is_weighted_by_its_distance_over_the_batchs(gamma: float) -> None:
    targets, rebuilt = maps(0), maps(5)
    _, gradients = loss_and_gradients(targets, rebuilt, gamma)
    for e, r, gradient in zip(targets, rebuilt, gradients, strict=True):
        weight = mining_weights(e, r, gamma)
        assert weight.max() / weight.min() > 2
        expected = weight * closed_form(e, r, 2)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def test_groups_have_means_of_their_own() -> None:
    """A group with larger distances leaves the weights of the other as they are."""
    targets, rebuilt = maps(0), maps(5)
    _, before = loss_and_gradients(targets, rebuilt, 3.0)
    _, after = loss_and_gradients(targets, [rebuilt[0], -targets[1]], 3.0)
    np.testing.assert_array_equal(before[0], after[0])


def test_the_plain_gradient_is_orthogonal_to_each_image_and_the_weighted_one_is_not() -> None:
    targets, rebuilt = maps(0), maps(5)
    for gamma, orthogonal in ((0.0, True), (3.0, False)):
        _, gradients = loss_and_gradients(targets, rebuilt, gamma)
        for r, gradient in zip(rebuilt, gradients, strict=True):
            flat, y = gradient.reshape(3, -1), r.numpy().reshape(3, -1)
            lengths = np.linalg.norm(flat, axis=1) * np.linalg.norm(y, axis=1)
            share = np.abs((flat * y).sum(1)) / lengths
            assert (share < 1e-6).all() if orthogonal else (share > 1e-3).all()


def test_scale_of_a_reconstruction_means_nothing_to_the_value() -> None:
    targets, rebuilt = maps(0), maps(5)
    scales = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64).view(3, 1, 1, 1)
    expected = soft_mining_loss(targets, rebuilt, 3.0).item()
    found = soft_mining_loss(targets, [r * scales for r in rebuilt], 3.0).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_equal_distances_everywhere_mean_no_weighting() -> None:
    angle = 0.7
    target = random(2, 6, 3, 4)
    unit = target / target.norm(dim=1, keepdim=True)
    across = random(2, 6, 3, 4, seed=1)
    across = across - unit * (across * unit).sum(1, keepdim=True)
    across = across / across.norm(dim=1, keepdim=True)
    rebuilt = (unit * np.cos(angle) + across * np.sin(angle)) * positive(2, 1, 3, 4, seed=2)
    _, (plain,) = loss_and_gradients([target], [rebuilt], 0.0)
    _, (mined,) = loss_and_gradients([target], [rebuilt], 3.0)
    np.testing.assert_allclose(mined, plain, rtol=1e-4, atol=1e-5 * abs(plain).max())


def test_targets_get_no_gradient() -> None:
    targets = [target.requires_grad_() for target in maps(0)]
    loss_and_gradients(targets, maps(5), 3.0)
    assert all(target.grad is None for target in targets)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_perfect_and_empty_reconstructions_stay_finite(gamma: float) -> None:
    """Distances are exactly zero, or rounding noise of either sign, or all one."""
    exact = [torch.zeros(2, 4, 3, 3).index_fill(1, torch.tensor(k), 1.0) for k in range(2)]
    noisy = [target.float() for target in maps(0)]
    for targets in (exact, noisy):
        for rebuilt, expected in ((targets, 0.0), ([torch.zeros_like(t) for t in targets], 1.0)):
            value, gradients = loss_and_gradients(targets, rebuilt, gamma)
            assert value == pytest.approx(expected, abs=1e-6)
            assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_weights_above_the_range_of_half_precision_do_not_overflow() -> None:
    """One bad token of fifty has the weight 50 ** 3 = 125,000; float16 ends at 65,504."""
    target = torch.zeros(1, 2, 1, 50, dtype=torch.float16)
    target[:, 0] = 1
    rebuilt = target.clone()
    rebuilt[0, :, 0, 7] = torch.tensor([0.0, 1.0])
    value, (gradient,) = loss_and_gradients([target], [rebuilt], 3.0)
    assert value == pytest.approx(1 - 49 / 50, abs=1e-6)
    expected = 125_000 * closed_form(target, rebuilt, 1)[0, :, 0, 7]
    np.testing.assert_allclose(gradient[0, :, 0, 7], expected, rtol=2e-3)


def test_the_global_cosine_is_the_norm_weighted_mean_of_the_points() -> None:
    (target, _), (rebuilt, _) = maps(0), maps(5)
    found = 1 - soft_mining_loss([target[:1]], [rebuilt[:1]], 3.0).item()
    e, r = target[0].flatten(1).T.numpy(), rebuilt[0].flatten(1).T.numpy()
    whole = np.linalg.norm(e) * np.linalg.norm(r)
    expected = sum(
        np.linalg.norm(a) * np.linalg.norm(b) / whole * cosine(a, b)
        for a, b in zip(e, r, strict=True)
    )
    assert found == pytest.approx(expected, abs=1e-6)
