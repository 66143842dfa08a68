"""NAGL's equations: the network against a slow second form, and in cases with known answers."""

from __future__ import annotations

from itertools import pairwise
from math import exp, sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.methods.episodes import Episode
from anomalyst.methods.memory_bank import to_patches
from anomalyst.methods.nagl import Defect, Guide, Nagl, NaglNetwork, NaglOptions, Scores
from anomalyst.methods.nagl_losses import logit_losses, ranking_losses, score_losses
from anomalyst.methods.residuals import mined, nearest_normal
from slow_nagl import COMPAT, OURS, PAPER, WIDTH, Slow, build, cosine, random, tokens

PLAIN = {"standing_out": False, "healthy_parts": False}  # ours, but masks alone say what is mined
RECTANGLES = [(slice(1, 3), slice(2, 4)), (slice(0, 2), slice(0, 1)), (slice(3, 4), slice(1, 4))]


class Case(NamedTuple):
    """Maps ``[C, h, w]`` of normal references, abnormal ones, and two queries ``[2, C, h, w]``."""

    normals: list[Tensor]
    defects: list[Defect]
    queries: Tensor


def case(normals: int = 2, defects: int = 2, grid: tuple[int, int] = (4, 6), seed: int = 0) -> Case:
    """References of random lengths; queries that repeat some defects and some normal patches."""
    good = random(normals, WIDTH, *grid, seed=seed) * (0.5 + 2 * random(1, seed=seed).abs())
    bad = good[:1] + random(defects, WIDTH, *grid, seed=seed + 1)
    coverage = torch.zeros(defects, *grid, dtype=torch.float64)
    for n in range(defects):
        coverage[n][RECTANGLES[n % 3]] = 0.1 + 0.4 * n
        bad[n] += (coverage[n] > 0) * 2 * random(WIDTH, *grid, seed=seed + 9 + n)
    queries = 2 * random(2, WIDTH, *grid, seed=seed + 2)
    noise = 0.3 * random(2, WIDTH, *grid, seed=seed + 3)
    queries[:, :, 1] = good[0, :, 2] + noise[:, :, 1]
    if defects:
        queries[:, :, 2] = bad[0, :, 2] + noise[:, :, 2]
    known = [(maps, cover, True) for maps, cover in zip(bad, coverage, strict=True)]
    return Case(list(good), known, queries)


def guide(network: NaglNetwork, normals: list[Tensor], defects: list[Defect]) -> Guide:
    return network.guide(torch.cat([to_patches(maps[None]) for maps in normals]), defects)


def scores(network: NaglNetwork, given: Case) -> Scores:
    with torch.no_grad():
        return network.score(guide(network, given.normals, given.defects), given.queries)


def same(found: Scores, expected: Scores, atol: float = 1e-9) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- the whole network, written out twice -------------------------------------------------------

VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (PAPER, {}),
    (PAPER, {"pooling": "each", "heads": 2}),
    (PAPER, {"positions": "none", "matching": "inner-product", "null_token": True}),
    (OURS, {}),
    (OURS, PLAIN),
    (OURS, {"standing_out": False, "null_token": False}),
    (OURS, {"healthy_parts": False, "pooling": "joint"}),
    (OURS, {"unit_length": False, "positions": "grid", "heads": 2}),
    (OURS, {"guidance": "sum"}),
]


@pytest.mark.parametrize(("options", "changes"), VARIANTS)
@pytest.mark.parametrize(("k1", "k2", "grid"), [(1, 1, (4, 6)), (2, 2, (5, 4)), (3, 3, (4, 5))])
def test_the_network_equals_its_slow_form(
    options: dict[str, Any], changes: dict[str, Any], k1: int, k2: int, grid: tuple[int, int]
) -> None:
    network = build(options, seed=k1, **changes)
    given = case(k1, k2, grid, seed=10 * k2)
    if k2 == 3:  # one without a mask: what was found in it is mined, its rest is not trusted
        given.defects[1] = (*given.defects[1][:2], False)
    found = scores(network, given)
    proxies = guide(network, given.normals, given.defects).proxies.detach()
    slow = Slow(network)
    references = [(maps.numpy(), cover.numpy(), mask) for maps, cover, mask in given.defects]
    for k, query in enumerate(given.queries.numpy()):
        expected = slow(query, [maps.numpy() for maps in given.normals], references)
        # Position codes are in float32.
        atol = 1e-9 if network.options.positions == "none" else 2e-6
        for part, name in enumerate(("fused", "normal", "abnormal")):
            np.testing.assert_allclose(
                found[part][k], expected[part], rtol=0, atol=atol, err_msg=name
            )
        np.testing.assert_allclose(proxies, expected.residual_proxies, rtol=0, atol=10 * atol)
    assert found.normal.max() > 0.1 and found.abnormal.std() > 1e-3
    if network.options.guidance == "evidence":
        assert not torch.allclose(found.fused, found.normal, rtol=0.02)


@pytest.mark.parametrize("options", [PAPER, OURS])
def test_anomaly_proxies_and_logits_equal_textbook_attention(options: dict[str, Any]) -> None:
    network, slow = build(options), Slow(build(options))
    proxies, keys, values = random(3, 5, WIDTH), random(3, 9, WIDTH, seed=1), random(3, 9, WIDTH)
    found, logits = network.learn(proxies, keys, values)
    for n in range(3):
        x, expected = slow.attend("learn_cross", *(x[n].numpy() for x in (proxies, keys, values)))
        np.testing.assert_allclose(logits[n].detach(), expected, rtol=0, atol=1e-10)
        x, _ = slow.attend("learn_self", x, x, x)
        np.testing.assert_allclose(found[n].detach(), x, rtol=0, atol=1e-10)


def test_the_head_has_as_many_parameters_as_the_papers() -> None:
    options = NaglOptions(**Nagl.presets["paper"]["options"])
    assert (options.proxies, options.heads) == (25, 4)
    network = NaglNetwork(384, options, 14)
    assert sum(p.numel() for p in network.parameters()) == 2_378_112


# ---- S_n and residuals --------------------------------------------------------------------------


def distances(patches: Tensor, bank: Tensor, matching: str = "cosine") -> tuple[Tensor, Tensor]:
    return nearest_normal(patches, bank, functional.normalize(bank, dim=1), matching)


@pytest.mark.parametrize("options", [PAPER, OURS])
def test_what_equals_a_normal_reference_has_no_distance_and_no_residual(
    options: dict[str, Any],
) -> None:
    network, given = build(options), case()
    query = given._replace(queries=torch.stack(given.normals))
    found = scores(network, query)
    assert found.normal.max() < 1e-12
    bank = network.scaled(to_patches(query.queries))
    s_n, residual = distances(bank, bank)
    assert s_n.max() < 1e-12 and (residual == 0).all()
    if network.options.guidance == "evidence":
        assert found.fused.max() < 1e-12 and found.abnormal.min() > 0


def test_evidence_of_exactly_no_distance_is_exactly_nothing() -> None:
    """Patches along axes, so that no rounding hides it, in the precision of use."""
    network = build(OURS).float()
    axes = torch.eye(WIDTH)[torch.arange(24) % WIDTH].T.reshape(1, WIDTH, 4, 6)
    defects = [(m.float(), c.float(), True) for m, c, _ in case().defects]
    found = scores(network, Case([axes[0]], defects, 3 * axes))
    assert (found.normal == 0).all() and (found.fused == 0).all()
    assert (found.abnormal > 0).all()


def test_orthogonal_patches_are_at_half_and_opposite_ones_at_one() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    s_n, _ = distances(torch.stack([3 * axes[1], -2 * axes[0], 5 * axes[0]]), 7 * axes[:1])
    torch.testing.assert_close(s_n, torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64))
    s_n, _ = distances(random(200, 5), random(3, 5, seed=1))
    assert s_n.min() >= 0 and s_n.max() <= 1


def test_a_residual_points_away_from_the_normal_patch_of_the_chosen_likeness() -> None:
    bank = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    patch = torch.tensor([[2.0, 0.5]])
    s_n, by_angle = distances(patch, bank)
    assert by_angle.tolist() == [[1.0, 0.5]]
    same_s_n, by_product = distances(patch, bank, "inner-product")
    assert by_product.tolist() == [[-3.0, -4.5]]
    assert s_n == same_s_n  # the score is by cosine whatever the residual


@pytest.mark.parametrize("options", [PAPER, OURS])
def test_the_length_of_a_patch_means_nothing_to_its_distance(options: dict[str, Any]) -> None:
    network, given = build(options), case(defects=1)
    scale = [0.1 + random(1, 1, 4, 6, seed=k).abs() for k in range(4)]
    maps, cover, _ = given.defects[0]
    scaled = Case(
        [maps * scale[k][0] for k, maps in enumerate(given.normals)],
        [(maps * scale[2][0], cover, True)],
        given.queries * scale[3],
    )
    before, after = scores(network, given), scores(network, scaled)
    torch.testing.assert_close(after.normal, before.normal, rtol=0, atol=1e-12)
    if network.options.unit_length:
        same(after, before)


def test_patches_are_brought_to_the_length_of_layer_normed_ones() -> None:
    maps = 5 * random(2, WIDTH, 3, 4)
    for scaled, dim in ((build(OURS).scaled(maps), 1), (build(OURS).scaled(to_patches(maps)), 1)):
        torch.testing.assert_close(scaled.norm(dim=dim), torch.full_like(scaled[:, 0], sqrt(WIDTH)))
    torch.testing.assert_close(build(OURS).scaled(maps[0]), build(OURS).scaled(maps)[0])
    assert build(PAPER).scaled(maps) is maps


def test_more_normal_references_never_raise_a_distance_and_a_double_changes_nothing() -> None:
    network, given = build(OURS), case(normals=4, defects=0)
    maps = [scores(network, given._replace(normals=given.normals[:k])).normal for k in (1, 2, 3, 4)]
    for fewer, more in pairwise(maps):
        assert (more <= fewer + 1e-12).all() and (more < fewer - 1e-3).any()
    doubled = scores(network, given._replace(normals=[*given.normals, given.normals[1]]))
    torch.testing.assert_close(doubled.normal, maps[-1], rtol=0, atol=1e-12)


def test_healthy_parts_only_lower_distances_and_without_them_defects_change_none() -> None:
    given = case()
    alone = scores(build(OURS), given._replace(defects=[])).normal
    torch.testing.assert_close(scores(build(OURS, **PLAIN), given).normal, alone)
    lowered = scores(build(OURS), given).normal
    assert (lowered <= alone + 1e-12).all() and (lowered < alone - 1e-3).any()


def test_healthy_parts_lie_a_patch_away_from_a_given_mask() -> None:
    cover = torch.zeros(5, 6, dtype=torch.float64)
    cover[1, 1] = 0.01
    maps = random(WIDTH, 5, 6)
    found = build(OURS).guide(random(7, WIDTH, seed=1), [(maps, cover, True)]).healthy
    expected = [
        to_patches(maps[None])[6 * r + c] for r in range(5) for c in range(6) if r > 2 or c > 2
    ]
    assert len(found) == len(expected) == 21
    torch.testing.assert_close(found, functional.normalize(torch.stack(expected), dim=1))
    found = build(OURS).guide(random(7, WIDTH, seed=1), [(maps, cover, False)])
    assert not len(found.healthy) and not len(
        found.differences
    )  # where the defect was only guessed, its surroundings are not sure


# ---- fused scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PAPER, COMPAT])
def test_the_papers_score_is_the_mean_of_two_in_0_to_1(options: dict[str, Any]) -> None:
    found = scores(build(options), case())
    torch.testing.assert_close(found.fused, (found.normal + found.abnormal) / 2)
    for maps in found:
        assert maps.min() >= 0 and maps.max() <= 1


def test_evidence_lies_between_two_multiples_of_the_distance() -> None:
    a, b = functional.softplus(build(OURS).gains).tolist()
    for seed in range(4):
        for changes, reach in (({}, 2), (PLAIN, 1)):  # rho+ - rho-, and rho+ alone
            found = scores(build(OURS, **changes), case(seed=seed))
            assert (found.fused >= found.normal * exp(-reach * a)).all()
            assert (found.fused <= found.normal * exp(reach * a + b)).all()
            assert found.abnormal.min() > 0 and found.abnormal.max() < 1


def test_gains_start_where_the_comment_says() -> None:
    network = NaglNetwork(WIDTH, NaglOptions(**OURS), 14)
    expected = torch.tensor([0.5, 0.05])
    torch.testing.assert_close(functional.softplus(network.gains.detach()), expected)


def test_a_known_defect_that_comes_again_is_the_best_evidence() -> None:
    """At the defect's own patches rho+ is 1, and S_n has the full gain."""
    network, given = build(OURS, **PLAIN), case(normals=1, defects=1)
    maps, cover, _ = given.defects[0]
    found = scores(network, given._replace(queries=maps[None]))
    a, b = functional.softplus(network.gains)
    at = cover > 0
    expected = found.normal[0] * torch.exp(a + b * found.abnormal[0])
    torch.testing.assert_close(found.fused[0][at], expected[at])
    assert (found.fused[0][~at] < expected[~at] - 1e-3).all()


def test_more_abnormal_references_never_lower_evidence() -> None:
    network, given = build(OURS, **PLAIN), case(defects=3)
    maps = [scores(network, given._replace(defects=given.defects[:k])) for k in (1, 2, 3)]
    for fewer, more in pairwise(maps):
        assert (more.fused >= fewer.fused - 1e-12).all()
        assert (more.fused > fewer.fused + 1e-6).any()
        torch.testing.assert_close(more.normal, fewer.normal)


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS])
def test_without_abnormal_references_there_is_the_nearest_normal_patch_alone(
    options: dict[str, Any],
) -> None:
    given = case(defects=0)
    found = scores(build(options), given)
    assert torch.equal(found.fused, found.normal) and not found.abnormal.any()
    for k, query in enumerate(given.queries.numpy()):
        bank = np.concatenate([tokens(maps.numpy()) for maps in given.normals])
        expected = [(1 - max(cosine(q, n) for n in bank)) / 2 for q in tokens(query)]
        np.testing.assert_allclose(found.fused[k].ravel(), expected, rtol=0, atol=1e-12)


# ---- order, masks, batches ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [PAPER, OURS, {**OURS, "pooling": "joint"}])
def test_the_order_of_references_means_nothing(options: dict[str, Any]) -> None:
    network, given = build(options), case(normals=3, defects=3)
    turned = given._replace(
        normals=[given.normals[k] for k in (2, 0, 1)],
        defects=[given.defects[k] for k in (1, 2, 0)],
    )
    same(scores(network, turned), scores(network, given), 1e-10)


@pytest.mark.parametrize("options", [PAPER, {**OURS, **PLAIN}, {**COMPAT, "positions": "grid"}])
def test_what_lies_outside_of_a_mask_leaves_proxies_and_scores(options: dict[str, Any]) -> None:
    network, given = build(options), case()
    noisy = [
        (torch.where(cover > 0, maps, 9 * random(*maps.shape, seed=n)), cover, True)
        for n, (maps, cover, _) in enumerate(given.defects)
    ]
    before = guide(network, given.normals, given.defects)
    after = guide(network, given.normals, noisy)
    torch.testing.assert_close(after.proxies, before.proxies, rtol=0, atol=1e-12)
    same(scores(network, given._replace(defects=noisy)), scores(network, given), 1e-12)
    inside = [(maps + (cover > 0), cover, True) for maps, cover, _ in given.defects]
    assert (guide(network, given.normals, inside).proxies - before.proxies).abs().max() > 1e-3


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS])
def test_a_batch_is_its_images_one_by_one(options: dict[str, Any]) -> None:
    network, given = build(options), case(grid=(5, 4))
    batch = torch.cat([given.queries, case(grid=(5, 4), seed=7).queries])
    found = scores(network, given._replace(queries=batch))
    for k in range(len(batch)):
        one = scores(network, given._replace(queries=batch[k : k + 1]))
        same(Scores(*(maps[k : k + 1] for maps in found)), one, 1e-12)


def episode(seed: int) -> Episode:
    given = case(1 + seed % 2, 1 + seed % 3, seed=seed)
    mask = torch.zeros(4 * 14, 6 * 14, dtype=torch.float64)
    mask[28:42, 14:56] = 1
    marks = [
        functional.interpolate(c[None, None], scale_factor=14)[0, 0] for _, c, _ in given.defects
    ]
    abnormals = [(m, c, k.ceil()) for (m, c, _), k in zip(given.defects, marks, strict=True)]
    return Episode(given.normals, abnormals, list(given.queries), [0 * mask, mask])


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS])
def test_an_episodes_losses_are_those_of_its_queries_scores(options: dict[str, Any]) -> None:
    network, one = build(options), episode(1)
    known = guide(network, one.normals, [network.defect(*given) for given in one.abnormals])
    maps = [network.score(known, query[None]) for query in one.queries]
    single = one._replace(queries=one.queries[1:], masks=one.masks[1:])
    mask = one.masks[1]
    if network.options.loss == "rank":
        expected = ranking_losses(maps[0].fused[0], maps[1].fused[0], mask)
    elif network.options.loss == "scores":
        expected = score_losses(maps[1].fused[0], mask)
    else:
        expected = logit_losses(maps[1].fused[0], maps[1].normal[0], maps[1].abnormal[0], mask)
    found = network([[one if network.options.loss == "rank" else single]])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS])
def test_the_losses_of_a_step_are_the_mean_of_its_episodes(options: dict[str, Any]) -> None:
    """Episodes with other numbers of references do not see each other."""
    network = build(options)
    together = network([[episode(k) for k in range(3)]])
    each = [network([[episode(k)]]) for k in range(3)]
    for name, value in together.items():
        expected = torch.stack([one[name] for one in each]).mean()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert len({one["loss"].item() for one in each}) == 3
    parts = sum(value for name, value in together.items() if name != "loss")
    torch.testing.assert_close(together["loss"], parts)


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mask_of_nothing_or_everything_leaves_scores_finite(
    options: dict[str, Any], share: float
) -> None:
    given = case()
    defects = [(given.defects[0][0], torch.full((4, 6), share).double(), True)]
    for maps in scores(build(options), given._replace(defects=defects)):
        assert maps.isfinite().all()


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PAPER, COMPAT, OURS, {**OURS, "loss": "scores"}])
def test_every_parameter_learns_but_biases_of_keys(options: dict[str, Any]) -> None:
    network = build(options)
    one = episode(1)
    if network.options.loss != "rank":
        one = one._replace(queries=one.queries[1:], masks=one.masks[1:])
    network([[one]])["loss"].backward()
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), name
        if name.endswith("in_bias"):
            query, key, value = gradient.chunk(3)
            assert (key == 0).all() and (query != 0).any() and (value != 0).any(), name
        else:
            assert (gradient != 0).any(), name


def test_nothing_learns_through_the_banks_and_the_distance() -> None:
    network, given = build(OURS), case()
    known = guide(network, given.normals, given.defects)
    learned = {name: part.requires_grad for name, part in known._asdict().items()}
    assert [name for name, grad in learned.items() if grad] == ["proxies"]
    found = network.score(known, given.queries)
    assert not found.normal.requires_grad
    assert found.abnormal.requires_grad and found.fused.requires_grad


# ---- what stands out ----------------------------------------------------------------------------


def standing(level: list[float], inside: list[int]) -> Tensor:
    """Which of 2 x 12 patches at those angles from normal are mined."""
    maps = torch.stack([torch.tensor(level).cos(), torch.tensor(level).sin()]).view(2, 2, 12)
    cover = torch.zeros(24)
    cover[inside] = 0.5
    axis = torch.tensor([[1.0, 0.0]])
    return mined(maps, cover.view(2, 12), axis, axis, "cosine", True).kept


def test_only_patches_above_the_healthy_rest_are_mined() -> None:
    level = [0.1] * 24
    level[5], level[11] = 0.9, 0.2  # one healthy patch stands out a little
    level[0], level[12], level[1] = 1.5, 0.8, 0.1  # two of the three in the mask do
    assert torch.nonzero(standing(level, [0, 1, 12])).flatten().tolist() == [0, 12]


def test_where_nothing_stands_out_the_highest_alone_is_mined() -> None:
    level = [1.0 + 0.01 * k for k in range(24)]
    level[0], level[1], level[12] = 0.2, 0.3, 0.1
    assert torch.nonzero(standing(level, [0, 1, 12])).flatten().tolist() == [1]


def test_of_highest_patches_that_are_alike_a_single_one_is_mined() -> None:
    assert standing([0.5] * 24, [3, 4]).sum() == 1


# ---- nearest neighbours alone -------------------------------------------------------------------


@pytest.mark.parametrize("parts", ["normal", "abnormal", "naive"])
def test_ablations_are_nearest_neighbour_formulas(parts: str) -> None:
    given = case()
    found = scores(build(PAPER, parts=parts), given)
    good = np.concatenate([tokens(maps.numpy()) for maps in given.normals])
    bad = [to_patches(m[None])[(c > 0).flatten()] for m, c, _ in given.defects]
    defects = torch.cat(bad).numpy()
    for k, query in enumerate(given.queries.numpy()):
        near = np.array([max(cosine(q, n) for n in good) for q in tokens(query)])
        known = np.array([max(cosine(q, d) for d in defects) for q in tokens(query)])
        s_n, s_a = (1 - near) / 2, (1 + known) / 2
        expected = {"normal": s_n, "abnormal": s_a, "naive": (s_n + s_a) / 2}[parts]
        np.testing.assert_allclose(found.fused[k].ravel(), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.normal[k].ravel(), s_n, rtol=0, atol=1e-12)
    ours = scores(build(OURS, parts=parts), given)  # the bank has no healthy parts either
    same(ours, found, 1e-12)
