"""OneNIP's equations: network, losses, maps and prompts, against slow forms and known answers."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods import onenip
from anomalyst.methods.onenip import OneNip, OneNipNetwork, OneNipOptions, image_score
from anomalyst.methods.onenip_losses import squared_dice
from slow_inp_former import liven, random
from test_prompt_decoders import Slow, visible

C, STRIDE, GRID = 12, 4, (5, 6)
TINY = {"width": 16, "heads": 2, "hidden": 32, "encoder_layers": 1, "decoder_layers": 1, "side": 4}
STILL = {"jitter": 0.0, "dropout": 0.0}
KINDS = ["dynamic", "legacy", "static", "query"]


def build(**options: object) -> OneNipNetwork:
    """A tiny network in float64 and eval mode, the transformer's weights lively."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OneNipNetwork(C, STRIDE, OneNipOptions(**{**TINY, **options})).double()
    for part in (network.encoder, network.decoder, network.code):
        liven(part)
    return network.eval()


def part(count: int = 2, grid: tuple[int, int] = GRID) -> list[Tensor]:
    """A training step: clean maps, pseudo-anomalies, masks, prompts."""
    clean, prompts = (random(count, C, *grid, seed=k) for k in (0, 1))
    pseudo, masks = clean.clone(), torch.zeros(count, *(STRIDE * side for side in grid)).double()
    pseudo[:, :, :2, :3] = random(count, C, 2, 3, seed=2)
    masks[:, : 2 * STRIDE, : 3 * STRIDE] = 1
    return [clean, pseudo, masks, prompts]


def watch(module: nn.Module) -> dict[str, Tensor]:
    """What goes into a module and comes out of it, once it was called."""
    seen: dict[str, Tensor] = {}
    module.register_forward_hook(lambda _, given, out: seen.update(given=given[0], out=out))
    return seen


def learns(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# ---- the whole network --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", ["all", "encoder"])
def test_the_reconstruction_equals_its_slow_form(kind: str, masked: str) -> None:
    network = build(decoder=kind, masked=masked, encoder_layers=2, decoder_layers=2)
    maps, prompts, slow = *part()[::3], Slow(network)
    code, seen = network.code(GRID).numpy(), visible(GRID)
    unmasked = seen if masked == "all" else None
    found = maps - network._decode(network.encode(maps), network.encode(prompts), GRID)
    for k in range(2):
        x, p = (each[k].numpy().reshape(C, -1).T for each in (maps, prompts))
        x, p = (slow.linear("project", each) for each in (x, p))
        for layer in ("encoder.0.", "encoder.1."):
            x, p = (slow.encoder(layer, each, code, seen) for each in (x, p))
        if kind in ("dynamic", "legacy"):
            out = slow.bidirectional("decoder.", x, p, code, unmasked, 2, kind == "legacy")
        else:
            queries = [p, p]
            if kind == "query":
                queries = [network.decoder._queries(n, GRID)[0].numpy() for n in range(2)]
            out = slow.query("decoder.", x, queries, code, unmasked)
        expected = maps[k].numpy() - slow.linear("rebuild", out).T.reshape(C, *GRID)
        np.testing.assert_allclose(found[k].numpy(), expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_see_each_other_and_nothing_is_drawn_when_judging(kind: str) -> None:
    network, (maps, *_, prompts) = build(decoder=kind), part(3)
    tokens = network.encode(prompts)
    found = network.judge(maps, tokens)
    assert torch.equal(network.judge(maps, tokens), found)
    order = [2, 0, 1]
    close(network.judge(maps[order], tokens[order]), found[order])
    close(network.judge(maps[1:2], network.encode(prompts[1:2]))[0], found[1])
    for place, reached in ((0, True), (1, kind != "query")):  # UniAD has no prompt
        given = [maps.clone(), tokens.clone()]
        given[place][1] += random(*given[place][1].shape, seed=9)
        after = network.judge(*given)
        close(after[[0, 2]], found[[0, 2]])
        assert ((after[1] - found[1]).abs().max() > 1e-3) == reached


def test_each_target_is_rebuilt_with_its_own_prompt_and_from_itself() -> None:
    network, given = build(**STILL).train(), part(3)
    for maps in given:
        maps.requires_grad_()
    seen = watch(network.rebuild)
    network(given)
    clean, pseudo, _, prompts = given
    assert len(seen["out"]) == 6
    for i, out in enumerate(seen["out"]):
        loss = (out * random(C)).sum()
        for maps, own in ((prompts, i % 3), (clean, i), (pseudo, i - 3)):
            (grad,) = torch.autograd.grad(loss, maps, retain_graph=True)
            assert [bool(each.any()) for each in grad] == [k == own for k in range(3)]


# ---- jitter and standardisation -----------------------------------------------------------------


def test_jitter_moves_all_that_the_network_reads_in_training_and_no_target() -> None:
    given = part()
    plain = torch.cat([given[0], given[1], given[3]]).flatten(2).transpose(1, 2)
    for jitter, training in ((20.0, True), (0.0, True), (20.0, False)):
        network = build(jitter=jitter, dropout=0.0).train(training)
        nn.init.zeros_(network.rebuild.weight)  # nothing is rebuilt: errors are the maps
        read, refined = watch(network.project), watch(network.refiner)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = network(given)
        noise = (read["given"] - plain).norm(dim=2) / plain.norm(dim=2)
        assert (noise > 0.3).all() if jitter and training else not noise.any()
        close(losses["reconstruction"], given[0].square().mean())
        close(losses["restoration"], given[0].square().mean())
        close(refined["given"], torch.cat(given[:2]).abs())


def test_standardisation_is_that_of_the_maps_beforehand() -> None:
    plain, scaled = build(**STILL), build(**STILL)
    given, mean, deviation = part(), 5 * random(C, seed=5), 0.1 + random(C, seed=6).abs()
    clean, pseudo, masks, prompts = given
    scaled.standardize((mean, deviation))
    raw = [each * deviation[:, None, None] + mean[:, None, None] for each in (clean, prompts)]
    close(scaled.encode(raw[1]), plain.encode(prompts))
    found = scaled.maps(raw[0], scaled.encode(raw[1]))
    for a, b in zip(found, plain.maps(clean, plain.encode(prompts)), strict=True):
        close(a, b)
    pseudo = pseudo * deviation[:, None, None] + mean[:, None, None]
    losses = scaled.train()([raw[0], pseudo, masks, raw[1]])
    for name, value in plain.train()(given).items():
        close(losses[name], value)
    scaled.standardize((mean, torch.zeros(C)))  # channels that are always the same
    assert scaled.encode(mean[:, None, None].expand(1, -1, *GRID)).isfinite().all()


# ---- losses -------------------------------------------------------------------------------------


def enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, corners upon corners, of maps ``[B, h, w]``: one axis, then the other."""
    for axis in (1, 2):
        lines = np.moveaxis(maps, axis, 2)
        at = np.linspace(0, lines.shape[2] - 1, size[axis - 1])
        found = [[np.interp(at, range(len(line)), line) for line in image] for image in lines]
        maps = np.moveaxis(np.array(found), 2, axis)
    return maps


def dice(p: np.ndarray, t: np.ndarray, doubled: bool) -> float:
    """The mean over samples of sheet 5.4's loss, or the paper's."""
    found = []
    for a, b in zip(p, t, strict=True):
        both, total = (a * b).sum(), (a**2).sum() + (b**2).sum()
        found.append(1 - 2 * both / total if doubled else 1 - (both + 1) / (total + 1))
    return float(np.mean(found))


@pytest.mark.parametrize("loss", ["code", "paper"])
@pytest.mark.parametrize(("restoration", "refiner"), [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_losses_are_those_of_the_equations(loss: str, restoration: int, refiner: int) -> None:
    options = {"loss": loss, "restoration": bool(restoration), "refiner": bool(refiner)}
    network, given = build(**options, **STILL, segmentation=0.7).train(), part()
    rebuilt = watch(network.rebuild)
    logits = watch(network.refiner) if refiner else {}
    losses = {name: value.item() for name, value in network(given).items()}
    clean, pseudo, masks, _ = (each.numpy() for each in given)
    maps = rebuilt["out"].detach().numpy().transpose(0, 2, 1).reshape(-1, C, *GRID)
    expected = {"reconstruction": ((maps[:2] - clean) ** 2).mean()}
    expected["loss"] = expected["reconstruction"]
    if restoration:
        expected["restoration"] = ((maps[2:] - clean) ** 2).mean()
        expected["loss"] += expected["restoration"]
        expected["loss"] /= 2 if loss == "code" else 1
    if refiner:
        error = np.abs(maps - np.concatenate([clean, pseudo]))
        np.testing.assert_allclose(logits["given"].detach().numpy(), error, rtol=0, atol=1e-12)
        large = enlarged(logits["out"].detach().numpy()[:, 0], masks.shape[1:])
        target = np.concatenate([np.zeros_like(masks), masks])
        expected["segmentation"] = dice(1 / (1 + np.exp(-large)), target, loss == "paper")
        expected["loss"] += 0.7 * expected["segmentation"]
    assert len(maps) == (4 if restoration or refiner else 2)
    assert losses == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", ["code", "paper"])
def test_a_pseudo_anomaly_equal_to_its_image_is_rebuilt_like_it(loss: str) -> None:
    network, (clean, _, masks, prompts) = build(**STILL, loss=loss).train(), part()
    rebuilt = watch(network.rebuild)
    losses = network([clean, clean, masks, prompts])
    close(rebuilt["out"][:2], rebuilt["out"][2:])
    close(losses["reconstruction"], losses["restoration"])
    whole = losses["loss"] - 0.5 * losses["segmentation"]
    close(whole, losses["reconstruction"] * (1 if loss == "code" else 2))


@pytest.mark.parametrize("detach", [False, True])
def test_the_refiners_loss_trains_the_transformer_unless_detached(detach: bool) -> None:
    network = build(**STILL, detach=detach).train()
    network(part())["segmentation"].backward()
    for name, parameter in network.named_parameters():
        assert learns(parameter) == (name.startswith("refiner.") or not detach), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_trains_every_parameter_but_what_the_legacy_form_throws_away(kind: str) -> None:
    network = build(**STILL, decoder=kind).train()
    network(part())["loss"].backward()
    for name, parameter in network.named_parameters():
        assert learns(parameter) == (kind != "legacy" or ".target_reads." not in name), name


def test_dice_of_known_masks() -> None:
    mask = torch.zeros(2, 40, 40, dtype=torch.float64)
    nothing = torch.zeros_like(mask)
    for area in (1, 7, 1000):
        mask.flatten(1)[:, :area] = 1
        half = torch.stack([mask[0], nothing[0]])  # each sample by itself, then their mean
        assert squared_dice(mask, mask, False).item() == pytest.approx(area / (2 * area + 1))
        assert squared_dice(mask, mask, True) == 0
        assert squared_dice(mask / 2, mask, True).item() == pytest.approx(1 - 1 / 1.25)
        assert squared_dice(half, mask, True).item() == pytest.approx(0.5)
    assert squared_dice(1 - mask, mask, True) == 1
    assert squared_dice(nothing, nothing, False) == 0
    p, t = random(3, 9, 9).sigmoid(), (random(3, 9, 9, seed=1) > 0).double()
    for doubled in (False, True):
        found = squared_dice(p, t, doubled).item()
        assert 0 <= found < 1
        assert found == pytest.approx(dice(p.numpy(), t.numpy(), doubled), rel=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "query"])
def test_one_batch_is_learned_by_heart(kind: str) -> None:
    network = build(**STILL, decoder=kind, refiner=False, hidden=64).float().train()
    given = [each.float() for each in part(2, (4, 4))]
    given[3] = given[3][:1].expand(2, -1, -1, -1)  # the target itself must be read
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    first = network(given)["loss"].item()
    for _ in range(300):
        optimizer.zero_grad()
        losses = network(given)
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss"].item() < first / 10
    assert losses["reconstruction"].item() < given[0].var().item() / 10


# ---- maps and image score -----------------------------------------------------------------------


@torch.no_grad()
def test_maps_are_enlarged_corner_upon_corner() -> None:
    network, (maps, *_, prompts) = build(), part()
    rebuilt, logits = watch(network.rebuild), watch(network.refiner)
    found, refined = network.maps(maps, network.encode(prompts))
    error = maps - rebuilt["out"].transpose(1, 2).unflatten(2, GRID)
    close(logits["given"], error.abs())
    coarse = error.square().sum(1).sqrt()
    size = (STRIDE * GRID[0], STRIDE * GRID[1])
    np.testing.assert_allclose(found, enlarged(coarse.numpy(), size), rtol=0, atol=1e-6)
    large = enlarged(logits["out"][:, 0].numpy(), size)
    np.testing.assert_allclose(refined, 1 / (1 + np.exp(-large)), rtol=0, atol=1e-6)
    assert found.amax() < coarse.amax() + 1e-12 and found.amin() > coarse.amin() - 1e-12
    close(found[:, [0, 0, -1, -1], [0, -1, 0, -1]], coarse[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    constant = torch.full((1, 1, 3, 4), 2.5)
    close(onenip.resized(constant, (12, 16)), constant[:, :, :1, :1].expand(1, 1, 12, 16), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_map_mixes_both_by_alpha(alpha: float) -> None:
    network, (maps, *_, prompts) = build(alpha=alpha), part()
    network.scale.fill_(3.5)
    tokens = network.encode(prompts)
    reconstruction, refined = network.maps(maps, tokens)
    assert (refined > 0).all() and (refined < 1).all() and (reconstruction > 0).all()
    found = network.judge(maps, tokens)
    close(found, (1 - alpha) * reconstruction + alpha * 3.5 * refined)
    close(network.judge(maps[:1], tokens[:1]), found[:1])  # whatever else is judged with it
    if alpha in (0, 1):
        assert torch.equal(found, 3.5 * refined if alpha else reconstruction)
    plain = build(alpha=alpha, refiner=False)
    assert plain.maps(maps, tokens)[1] is None
    close(plain.judge(maps, tokens), reconstruction)


def test_the_image_score_is_the_highest_mean_of_16_pixels_squared() -> None:
    close(image_score(torch.full((2, 40, 30), 1.5)), torch.full((2,), 1.5), 1e-6)
    maps = torch.zeros(2, 40, 30, dtype=torch.float64)
    maps[0, 20, 20], maps[1, 0, 0] = 512.0, 256.0
    assert image_score(maps).tolist() == [2, 1]
    close(image_score(maps + 4), image_score(maps) + 4)
    maps[0, 23:39, 11:27] += 3  # a window of any place, the lowest row but one
    maps[0, 20, 20] = 0
    assert image_score(maps).tolist() == [3, 1]
    assert image_score(torch.full((1, 12, 8), 2.0)).tolist() == [2]  # smaller than the window
    low = random(1, 12, 40)
    windows = [low[..., k : k + 16].mean().item() for k in range(25)]
    assert image_score(low).item() == pytest.approx(max(windows))


@pytest.mark.parametrize("grid", [(14, 14), (14, 10)])
def test_levels_join_on_the_coarsest_grid(grid: tuple[int, int]) -> None:
    parts = [(24, 8), (32, 4), (56, 2), (160, 1)]
    levels = [torch.randn(2, c, k * grid[0], k * grid[1]) for c, k in parts]
    (found,) = onenip.join_levels(levels)
    assert found.shape == (2, 272, *grid)
    corners = (..., [0, 0, -1, -1], [0, -1, 0, -1])
    close(found[corners], torch.cat([level[corners] for level in levels], dim=1), 1e-5)
    assert torch.equal(found[:, 112:], levels[3])
    expected = enlarged(levels[0][0].numpy(), grid)  # here: made smaller
    np.testing.assert_allclose(found[0, :24], expected, rtol=0, atol=1e-4)
    (found,) = onenip.join_levels([torch.full_like(level, k) for k, level in enumerate(levels)])
    counts = torch.tensor([count for count, _ in parts])
    expected = torch.arange(4.0).repeat_interleave(counts).view(1, 272, 1, 1)
    close(found, expected.expand(2, -1, *grid), 1e-6)


# ---- the method ---------------------------------------------------------------------------------

BACKBONE = find_backbone("efficientnet-b4")
CHANNELS = 24 + 32


def make(seed: int = 0, **options: object) -> OneNip:
    """The method on the first two levels, untrained."""
    return OneNip(OneNipOptions(**{**TINY, **options}), BACKBONE, (0, 1), seed)


def images(count: int, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    """Maps of images that differ the more the later they come."""
    own = random(count, CHANNELS, *grid, seed=seed + 1)
    own *= torch.arange(1, count + 1).view(-1, 1, 1, 1)
    return (random(1, CHANNELS, *grid, seed=seed) + own).float()


def cosines(maps: Tensor) -> np.ndarray:
    """Cosines ``[N, N]`` of maps' mean directions, patch by patch."""
    rows = []
    for each in maps.double().numpy():
        patches = each.reshape(len(each), -1).T
        mean = np.mean([patch / sqrt(patch @ patch) for patch in patches], axis=0)
        rows.append(mean / sqrt(mean @ mean))
    return np.array(rows) @ np.array(rows).T


def spread(maps: Tensor, count: int) -> list[int]:
    """The most typical, then always the one whose highest cosine to those is the lowest."""
    alike = cosines(maps)
    chosen = [int(alike.sum(1).argmax())]
    while len(chosen) < count:
        left = [k for k in range(len(maps)) if k not in chosen]
        chosen.append(min(left, key=lambda k: max(alike[k, c] for c in chosen)))
    return chosen


def test_the_most_typical_prompts_are_kept_then_the_least_alike() -> None:
    maps = images(6)[[3, 5, 0, 1, 4, 2]]
    batches = [[maps[:4]], [maps[4:]]]
    for count in (1, 3, 6):
        method = make(prompts=count)
        method.enroll("nut", batches)
        chosen = spread(maps, count)
        assert len(set(chosen)) == count
        assert torch.equal(method._prompts["nut"], maps[chosen])
    method = make(prompts=9)
    method.enroll("nut", batches)
    assert len(method._prompts["nut"]) == 6
    method = make(prompts=2)
    method.enroll("nut", batches[:1])
    both = torch.cat([maps[:4][spread(maps[:4], 2)], maps[4:]])  # what was kept, and the new ones
    method.enroll("nut", batches[1:])
    assert torch.equal(method._prompts["nut"], both[spread(both, 2)])


@torch.no_grad()
def test_prompts_are_encoded_once_until_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    method, maps, calls = make(), images(3), []
    encode = method.network.encode
    monkeypatch.setattr(method.network, "encode", lambda x: calls.append(len(x)) or encode(x))
    method.enroll("nut", [[maps[:1]]])
    for _ in range(3):
        found, scores = method.score([maps], "nut")
    assert calls == [1]
    expected = method.network.judge(maps, encode(maps[:1]).expand(3, -1, -1))
    close(found, expected, 1e-5)
    assert torch.equal(scores, image_score(found))
    method.enroll("nut", [[images(5, seed=7)]])
    again = method.score([maps], "nut")[0]
    close(again, method.network.judge(maps, encode(method._prompts["nut"]).expand(3, -1, -1)), 1e-5)
    assert calls == [1, 1] and (again - found).abs().max() > 1e-3


@torch.no_grad()
def test_of_several_prompts_the_most_similar_or_the_mean_of_all() -> None:
    maps = images(3) * torch.tensor([3.0, 1.0, 2.0]).view(3, 1, 1, 1)  # length means nothing
    queries = maps[[2, 0, 1, 2]] + 0.1 * random(4, CHANNELS, *GRID, seed=5).float()
    nearest, mean = make(prompts=3), make(prompts=3, choice="mean")
    for method in (nearest, mean):
        method.enroll("nut", [[maps]])
    order = spread(maps, 3)
    tokens = nearest.network.encode(maps)
    found = nearest.score([queries], "nut")[0]
    close(found, nearest.network.judge(queries, tokens[[2, 0, 1, 2]]), 1e-5)
    each = [mean.network.judge(queries, tokens[k].expand(4, -1, -1)) for k in order]
    close(mean.score([queries], "nut")[0], torch.stack(each).mean(0), 1e-5)
    assert (each[0] - each[1]).abs().max() > 1e-2


@torch.no_grad()
def test_prompts_of_another_shape_are_brought_to_the_images() -> None:
    method, prompt, maps = make(), images(1), images(2, (4, 8), seed=3)
    method.enroll("nut", [[prompt]])
    expected = torch.from_numpy(enlarged(prompt[0].double().numpy(), (4, 8))).float()[None]
    found, scores = method.score([maps], "nut")
    tokens = method.network.encode(expected).expand(2, -1, -1)
    close(found, method.network.judge(maps, tokens), 1e-4)
    assert found.shape == (2, 16, 32) and scores.shape == (2,)
    assert method.score([images(1)], "nut")[0].shape == (1, 20, 24)
    method = make(prompts=2)
    method.enroll("nut", [[prompt], [maps[:1]]])
    assert method._prompts["nut"].shape == (2, CHANNELS, *GRID)


@pytest.mark.parametrize("category", ["nutt", None])
def test_a_category_without_prompts_is_an_error(category: str | None) -> None:
    method = make()
    method.enroll("nut", [[images(1)]])
    with pytest.raises(InputError, match=r"unknown category .*Known: nut"):
        method.score([images(1)], category)


@torch.no_grad()
def test_what_was_learned_comes_back_from_its_tensors() -> None:
    first, second = make(0, prompts=2), make(1, prompts=2)
    first.network.standardize((torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5))
    first.network.scale.fill_(2.5)
    for category, seed in (("nut", 0), ("prompts.bolt 2", 5)):
        first.enroll(category, [[images(3, seed=seed)]])
        second.enroll(category, [[images(1, seed=8)]])
        second.score([images(1)], category)  # has prompts encoded
    second.load_tensors(first.tensors())
    assert second.trained and second.heat_unit("nut") == 2.5
    for category in ("nut", "prompts.bolt 2"):
        for a, b in zip(
            *(each.score([images(2)], category) for each in (first, second)), strict=True
        ):
            assert torch.equal(a, b)
    assert first.tensors().keys() == second.tensors().keys()


@torch.no_grad()
def test_the_fusion_scale_is_half_the_sum_of_the_extremes_over_pseudo_anomalies() -> None:
    method, parts = make(batch_size=2), []
    for k in range(3):
        maps = images(4, seed=k)
        parts.append([maps[:2], 3 * maps[2:], torch.zeros(2, 20, 24), maps[[1, 0]]])

    class Source:
        def held_out(self, count: int, batch: int) -> Sequence[list[Tensor]]:
            assert batch == 2
            return parts

    method.finish(Source())
    network = method.network
    maps = [network.maps(pseudo, network.encode(prompt))[0] for _, pseudo, _, prompt in parts]
    low, high = min(x.min() for x in maps), max(x.max() for x in maps)
    assert method.heat_unit(None) == pytest.approx(float(low + high) / 2, rel=1e-5)


def test_first_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (make(seed).network.state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["project.weight"], other["project.weight"])
