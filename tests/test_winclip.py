"""WinCLIP's equations on numbers small enough to check by hand, by loops or by open_clip itself."""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import run_blocks
from anomalyst.features.extractor import Backbone
from anomalyst.methods import prompt_sentences as lists
from anomalyst.methods import winclip
from anomalyst.methods.base import make_options
from anomalyst.methods.prompt_sentences import sentences
from anomalyst.methods.winclip import (
    WinClip,
    WinClipTower,
    community_text_map,
    harmonic_text_map,
    prototype,
    spread,
    window_mask,
    window_patches,
)
from conftest import CLIP, TINY_CLIP

WIDTH, JOINT = TINY_CLIP["vision_cfg"]["width"], TINY_CLIP["embed_dim"]
LAYER = TINY_CLIP["vision_cfg"]["layers"] - 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(weights: str, **options: Any) -> tuple[WinClip, Any]:
    """The method, bound, and its tower, with the tiny weights."""
    chosen = make_options(WinClip, options)
    backbone = Backbone.load(
        CLIP, (LAYER,), weights=weights, make=partial(WinClip.make_tower, chosen)
    )
    method = WinClip(chosen, backbone.spec, backbone.layers, 0)
    method.bind(backbone.tower)
    return method, backbone.tower


@pytest.fixture(scope="module")
def towers(clip_weights: str) -> dict[str, Any]:
    return {kind: make(clip_weights, windows=kind)[1] for kind in ("exact", "shared")}


@pytest.fixture(scope="module")
def clip(clip_weights: str) -> Any:
    """open_clip's own model with the same weights."""
    import open_clip
    from safetensors.torch import load_file

    model = open_clip.CLIP(**TINY_CLIP)
    model.load_state_dict(load_file(clip_weights.removeprefix("file:")))
    return model.eval()


def features(*grid: int, batch: int = 1, seed: int = 0) -> list[Tensor]:
    """Maps as the towers return them, of an image of so many patches."""
    height, width = grid
    shapes = [(JOINT, height - 1, width - 1), (JOINT, height - 2, width - 2), (JOINT, 1, 1)]
    two, three, whole = (
        functional.normalize(random(batch, *shape, seed=10 * seed + k), dim=1)
        for k, shape in enumerate(shapes)
    )
    return [two, three, random(batch, WIDTH, height, width, seed=10 * seed + 7), whole]


# ---- sentences ----------------------------------------------------------------------------------


def test_there_are_7_normal_and_4_abnormal_states_in_22_templates() -> None:
    assert (len(lists.NORMAL_STATES), len(lists.ABNORMAL_STATES)) == (7, 4)
    assert len(set(lists.TEMPLATES)) == 22
    normal = sentences(lists.NORMAL_STATES, "bottle")
    abnormal = sentences(lists.ABNORMAL_STATES, "bottle")
    assert len({*normal, *abnormal}) == 22 * 11
    for sentence in ("a photo of a bottle.", "a dark photo of the bottle without damage."):
        assert sentence in normal
    for sentence in (
        "a photo of the large damaged bottle.",
        "a jpeg corrupted photo of a bottle with flaw.",
        "a photo of a bottle with defect for visual inspection.",
        "a photo of the bottle with damage for anomaly detection.",
    ):
        assert sentence in abnormal


def test_braces_in_a_name_are_no_placeholders() -> None:
    assert sentences(["damaged {}"], "part {0}")[0] == "a cropped photo of a damaged part {0}."


def test_a_prototype_is_the_unit_mean_of_unit_vectors(towers: dict[str, Any], clip: Any) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer("tiny-clip")
    for states in (lists.NORMAL_STATES, lists.ABNORMAL_STATES):
        total = torch.zeros(JOINT)
        for template in lists.TEMPLATES:
            for state in states:
                sentence = template.replace("{}", state.replace("{}", "metal nut"))
                with torch.no_grad():
                    vector = clip.encode_text(tokenizer([sentence]))[0]
                total += vector / vector.norm()
        found = prototype(towers["exact"].text, sentences(states, "metal nut"))
        torch.testing.assert_close(found, total / total.norm(), rtol=0, atol=1e-5)


# ---- windows ------------------------------------------------------------------------------------


def test_a_grid_of_15_has_196_and_169_windows() -> None:
    assert [window_patches((15, 15), side).shape for side in (2, 3)] == [(14, 14, 4), (13, 13, 9)]
    assert window_patches((3, 4), 2)[1, 2].tolist() == [6, 7, 10, 11]
    assert window_patches((2, 4), 3).tolist() == [[[0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7]]]
    assert window_patches((1, 1), 3).tolist() == [[[0]]]


@torch.no_grad()
def naive(tower: WinClipTower, images: Tensor) -> list[Tensor]:
    """Every window of every image through the transformer, one after the other."""
    visual: Any = tower.model.visual
    tokens, (height, width) = tower.embed(images)
    maps = []
    for side in (2, 3):
        down, across = min(side, height), min(side, width)
        rows, columns = height - down + 1, width - across + 1
        found = torch.zeros(len(images), JOINT, rows, columns)
        for b in range(len(images)):
            for top in range(rows):
                for left in range(columns):
                    kept = [0]
                    for y in range(top, top + down):
                        kept += [1 + y * width + x for x in range(left, left + across)]
                    seen = tokens[b : b + 1, kept]
                    for block in visual.transformer.resblocks:
                        seen = block(seen)
                    vector = visual.ln_post(seen[0, 0]) @ visual.proj
                    found[b, :, top, left] = vector / vector.norm()
        maps.append(found)
    return maps


@pytest.mark.parametrize("size", [(80, 80), (48, 96), (32, 80), (16, 16), (16, 48)])
def test_exact_windows_are_those_of_a_loop(
    towers: dict[str, Any], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random(2, 3, *size)
    expected = naive(towers["exact"], images)
    for tokens in (4096, 50):  # all at once, and a few windows at a time
        monkeypatch.setattr(winclip, "_TOKENS", tokens)
        with torch.no_grad():
            found = towers["exact"](images)
        for one, other in zip(found[:2], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_whole_image_is_open_clips_and_the_patches_the_penultimate_blocks(
    towers: dict[str, Any], clip: Any
) -> None:
    images = random(2, 3, 80, 80)
    expected = functional.normalize(clip.encode_image(images), dim=1)
    with torch.no_grad():
        tokens, grid = towers["exact"].embed(images)
        patches = run_blocks(towers["exact"].blocks[:-1], tokens)[:, 1:]
    for tower in towers.values():
        with torch.no_grad():
            *_, found, whole = tower(images)
        torch.testing.assert_close(whole[:, :, 0, 0], expected, rtol=0, atol=1e-5)
        rows = found.flatten(2).transpose(1, 2)
        torch.testing.assert_close(rows, patches, rtol=0, atol=1e-5)
        assert found.shape == (2, WIDTH, *grid)


def test_an_exact_window_sees_nothing_outside_and_a_shared_one_does(
    towers: dict[str, Any],
) -> None:
    image = random(1, 3, 80, 80)
    other = image.clone()
    other[:, :, 64:] += 1  # the last row of patches
    for kind, blind in (("exact", True), ("shared", False)):
        with torch.no_grad():
            before, after = towers[kind](image)[0], towers[kind](other)[0]
        assert torch.allclose(before[:, :, :3], after[:, :, :3], atol=1e-6) is blind
        assert not torch.allclose(before[:, :, 3], after[:, :, 3], atol=1e-3)


def test_shared_is_exact_where_a_window_is_the_image_or_there_is_one_block(
    towers: dict[str, Any], clip_weights: str
) -> None:
    for size in ((32, 32), (16, 32), (16, 16)):
        with torch.no_grad():
            exact, shared = (tower(random(2, 3, *size)) for tower in towers.values())
        for one, other in zip(exact, shared, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        torch.testing.assert_close(shared[0], shared[3], rtol=0, atol=1e-5)
    cut = []
    for kind in towers:
        _, tower = make(clip_weights, windows=kind)
        tower.model.visual.transformer.resblocks = tower.blocks[:1]
        tower.layers = (0,)
        with torch.no_grad():
            cut.append(tower(random(2, 3, 64, 80)))
    for one, other in zip(*cut, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_shared_windows_attend_to_the_plain_passs_patches_and_themselves(
    towers: dict[str, Any],
) -> None:
    tower, images = towers["shared"], random(2, 3, 64, 80)
    plain, (_, width) = tower.embed(images)
    entering = []
    for block in tower.blocks:
        entering.append(plain)
        plain = block(plain)
    found = tower(images)
    branch = len(tower.blocks) * 2 // 3
    for side, maps in zip((2, 3), found[:2], strict=True):
        for b, top, left in ((0, 0, 0), (1, 1, 2), (0, 1, 1)):
            kept = [
                1 + y * width + x for y in range(top, top + side) for x in range(left, left + side)
            ]
            token = entering[branch][b, :1]
            for block, patches in zip(tower.blocks[branch:], entering[branch:], strict=True):
                token = one_step(block, token, patches[b, kept])
            expected = functional.normalize(tower.project(token[0]), dim=0)
            torch.testing.assert_close(maps[b, :, top, left], expected, rtol=0, atol=1e-5)


def one_step(block: Any, token: Tensor, patches: Tensor) -> Tensor:
    """A token ``[1, C]`` behind a block in which it sees itself and patches ``[n, C]``."""
    heads, attention = block.attn.num_heads, block.attn
    rows = block.ln_1(torch.cat([token, patches]))
    joint = rows @ attention.in_proj_weight.T + attention.in_proj_bias
    query, key, value = joint.view(len(rows), 3, heads, -1).unbind(1)  # each (1 + n, heads, d)
    mixed = []
    for head in range(heads):
        logits = key[:, head] @ query[0, head] / math.sqrt(key.shape[-1])
        mixed.append(logits.softmax(0) @ value[:, head])
    token = token + attention.out_proj(torch.cat(mixed))
    return token + block.mlp(block.ln_2(token))


def test_the_mask_shows_each_window_its_patches_and_itself() -> None:
    mask = window_mask([window_patches((2, 3), 2)], 7)  # CLS, six patches, two windows
    seen = [[k for k, hidden in enumerate(row) if hidden == 0] for row in mask.tolist()]
    assert seen[:7] == [list(range(7))] * 7
    assert seen[7:] == [[1, 2, 4, 5, 7], [2, 3, 5, 6, 8]]


# ---- from windows to maps -----------------------------------------------------------------------


def covering(values: Tensor, grid: tuple[int, int]) -> list[list[list[float]]]:
    """For each patch the values ``[h', w']`` of the windows that cover it, by looking at all."""
    rows, columns = values.shape
    down, across = grid[0] - rows + 1, grid[1] - columns + 1
    return [
        [
            [
                float(values[top, left])
                for top in range(rows)
                for left in range(columns)
                if top <= y < top + down and left <= x < left + across
            ]
            for x in range(grid[1])
        ]
        for y in range(grid[0])
    ]


@pytest.mark.parametrize("grid", [(5, 5), (3, 6), (2, 4), (1, 1), (1, 5)])
def test_a_patch_takes_the_mean_of_the_windows_that_cover_it(grid: tuple[int, int]) -> None:
    for side in (2, 3):
        shape = [length - min(side, length) + 1 for length in grid]
        values = random(2, *shape, seed=side).sigmoid()
        found = spread(values, grid)
        assert found.shape == (2, *grid)
        for b in range(2):
            expected = [[fmean(cell) for cell in row] for row in covering(values[b], grid)]
            torch.testing.assert_close(found[b], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_windows_scores_meet_in_harmonic_means() -> None:
    grid = (4, 5)
    scores = [random(1, 5 - side, 6 - side, seed=side).mul(3).sigmoid() for side in (2, 3)]
    image = torch.tensor([0.3]).view(1, 1, 1)
    found = harmonic_text_map(scores, image, grid)[0]
    two, three = (covering(each[0], grid) for each in scores)
    for y in range(4):
        for x in range(5):
            sides = [harmonic_mean(two[y][x]), harmonic_mean(three[y][x])]
            assert float(found[y, x]) == pytest.approx(harmonic_mean([*sides, 0.3]), rel=1e-5)
            normal = [harmonic_mean([1 - s for s in cells[y][x]]) for cells in (two, three)]
            expected = 1 - harmonic_mean(normal)
            other = community_text_map([1 - each for each in scores], grid)[0]
            assert float(other[y, x]) == pytest.approx(expected, rel=1e-4)


def test_a_score_without_any_doubt_makes_no_number_that_is_none() -> None:
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 2, 2)
    assert harmonic_text_map([0 * one, one], one[:, :1, :1], (3, 3)).eq(0).all()
    assert harmonic_text_map([one, one], zero, (3, 3)).eq(0).all()
    assert community_text_map([0 * one, one], (3, 3)).eq(1).all()


def test_alike_windows_give_their_own_score() -> None:
    grid, alike = (4, 4), [torch.full((1, 5 - side, 5 - side), 0.4) for side in (2, 3)]
    found = harmonic_text_map(alike, torch.full((1, 1, 1), 0.4), grid)
    torch.testing.assert_close(found, torch.full((1, 4, 4), 0.4))
    found = community_text_map([1 - each for each in alike], grid)
    torch.testing.assert_close(found, torch.full((1, 4, 4), 0.4))


# ---- scores -------------------------------------------------------------------------------------


def test_zero_shot_scores_are_softmaxes_of_similarities(clip_weights: str) -> None:
    method, tower = make(clip_weights)
    maps = features(4, 5, batch=2)
    normal, abnormal = (
        prototype(tower.text, sentences(states, "metal nut"))
        for states in (lists.NORMAL_STATES, lists.ABNORMAL_STATES)
    )
    two, three, whole = (
        torch.stack(
            [(each * t[:, None, None]).sum(1) for t in (normal, abnormal)]
        ).mul(100).softmax(0)[1]
        for each in (maps[0], maps[1], maps[3])
    )  # fmt: skip
    found, scores = method.score(maps, "metal_nut")
    torch.testing.assert_close(scores, whole[:, 0, 0], rtol=1e-4, atol=1e-6)
    expected = harmonic_text_map([two, three], whole, (4, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    other, _ = make(clip_weights, fusion="community")[0].score(maps, "metal_nut")
    expected = community_text_map([1 - two, 1 - three], (4, 5))
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def memory_by_loops(queries: list[Tensor], bank: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """The mean over three kinds of ``1/2 min (1 - cos)``, each at the patches it belongs to."""
    total = torch.zeros(grid)
    for maps, known in zip(queries[:3], bank[:3], strict=True):
        rows = known.flatten(2)[0].T
        distance = torch.zeros(maps.shape[2:])
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                cosines = [functional.cosine_similarity(maps[0, :, y, x], r, dim=0) for r in rows]
                distance[y, x] = (1 - max(cosines)) / 2
        total += torch.tensor([[fmean(c) for c in row] for row in covering(distance, grid)])
    return total / 3


@pytest.mark.parametrize("fusion", ["paper", "community"])
def test_references_add_a_memory_to_map_and_score(clip_weights: str, fusion: str) -> None:
    grid = (4, 5)
    query, reference = features(*grid), features(*grid, seed=1)
    method, _ = make(clip_weights, fusion=fusion)
    text, image = method.score(query, "plate")
    method.enroll("plate", [reference])
    found, scores = method.score(query, "plate")
    memory = memory_by_loops(query, reference, grid)
    joined = text[0] + memory if fusion == "paper" else 1 / (1 / text[0] + 1 / memory)
    torch.testing.assert_close(found[0], joined, rtol=1e-4, atol=1e-5)
    assert float(scores) == pytest.approx((float(image) + float(memory.max())) / 2, rel=1e-5)


def test_the_memory_of_a_reference_is_0(clip_weights: str) -> None:
    method, reference = make(clip_weights)[0], features(4, 4)
    text, image = method.score(reference, "plate")
    method.enroll("plate", [reference])
    found, scores = method.score(reference, "plate")
    torch.testing.assert_close(found, text, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, image / 2, rtol=0, atol=1e-6)
    harmonic, _ = make(clip_weights, fusion="community")
    harmonic.enroll("plate", [reference])
    assert harmonic.score(reference, "plate")[0].abs().max() < 1e-6


@pytest.mark.parametrize(("channel", "sign", "expected"), [(0, 1, 0.0), (1, 1, 0.5), (0, -1, 1.0)])
def test_the_memory_of_what_stands_across_is_a_half_of_an_opposite_1(
    clip_weights: str, channel: int, sign: int, expected: float
) -> None:
    def along(channel: int, length: float) -> list[Tensor]:
        maps = [torch.zeros_like(each) for each in features(4, 4)]
        for each in maps:
            each[:, channel] = length
        return maps

    method, _ = make(clip_weights)
    text, _ = method.score(along(channel, sign), "plate")
    method.enroll("plate", [along(0, 1.0)])
    found, _ = method.score(along(channel, sign), "plate")
    torch.testing.assert_close(found - text, torch.full((1, 4, 4), expected))


def test_references_add_up_and_their_order_means_nothing(clip_weights: str) -> None:
    first, second, query = (features(4, 5, seed=k) for k in (1, 2, 3))
    together, apart, backward, fewer = (make(clip_weights)[0] for _ in range(4))
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    together.enroll("plate", [both])
    apart.enroll("plate", [first])
    apart.enroll("plate", [second])
    backward.enroll("plate", [second, first])
    fewer.enroll("plate", [first])
    expected, score = together.score(query, "plate")
    for method in (apart, backward):
        found, other = method.score(query, "plate")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(other, score, rtol=0, atol=1e-6)
    assert (fewer.score(query, "plate")[0] >= expected - 1e-6).all()
    assert not torch.allclose(fewer.score(query, "plate")[0], expected, atol=1e-3)


def test_references_of_another_shape_serve_too(clip_weights: str) -> None:
    method, _ = make(clip_weights)
    method.enroll("plate", [features(3, 6, seed=1), features(5, 3, seed=2)])
    assert method.score(features(4, 5), "plate")[0].shape == (1, 4, 5)


def test_zero_shot_uses_the_references_of_the_products_that_have_some(clip_weights: str) -> None:
    method, _ = make(clip_weights, zero_shot=True)
    assert method.judges_unseen and not make(clip_weights)[0].judges_unseen
    before, score = method.score(features(4, 4), "nut")
    method.enroll("plate", [features(4, 4, seed=1)])
    after, other = method.score(features(4, 4), "nut")
    assert torch.equal(before, after) and torch.equal(score, other)
    assert not torch.equal(method.score(features(4, 4), "plate")[0], before)


def test_a_strong_colour_is_even_odds_and_a_quarter_of_the_memory(clip_weights: str) -> None:
    for fusion, expected in (("paper", 0.75), ("community", 1 / 6)):
        method, _ = make(clip_weights, fusion=fusion)
        assert method.heat_unit(None) == method.heat_unit("plate") == 0.5
        method.enroll("plate", [features(4, 4)])
        assert method.heat_unit("plate") == pytest.approx(expected)
        assert method.heat_unit("nut") == 0.5


def test_banks_are_restored_and_those_of_other_windows_refused(clip_weights: str) -> None:
    method, _ = make(clip_weights)
    method.enroll("plate. or nut", [features(4, 4)])
    method.enroll("patches.plate", [features(4, 4, seed=1)])
    other, _ = make(clip_weights)
    other.load_tensors(method.tensors())
    for category in ("plate. or nut", "patches.plate"):
        one, two = (m.score(features(4, 4, seed=2), category) for m in (method, other))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    with pytest.raises(InputError, match="windows=shared"):
        make(clip_weights, windows="shared")[0].load_tensors(method.tensors())


@pytest.mark.parametrize("category", [None, "01", "--"])
def test_a_name_that_says_nothing_is_refused(clip_weights: str, category: str | None) -> None:
    method, _ = make(clip_weights)
    with pytest.raises(InputError, match="winclip"):
        method.score(features(4, 4), category)
    if category is not None:
        with pytest.raises(InputError, match="metal plate"):
            method.require_name(category)


def test_the_penultimate_block_is_tapped() -> None:
    for backbone, layer in (("clip-vit-b-16-plus-240", 10), ("clip-vit-l-14", 22)):
        assert WinClip.default_layers(find_backbone(backbone)) == (layer,)
