"""INP-Former as a method: the authors' own numbers, scores, layers and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.features.backbones import REGISTRY, BackboneSpec
from anomalyst.methods import inp_former
from anomalyst.methods.base import TrainingOptions, make_options
from anomalyst.methods.inp_former import (
    InpFormer,
    group_means,
    image_score,
    nearest_distance,
    reconstruction_distance,
    smoothed_map,
)
from anomalyst.methods.stable_adamw import StableAdamW
from conftest import SHARED
from slow_inp_former import Slow, liven, random


def vit(taps: int = 12, width: int = 384) -> BackboneSpec:
    return replace(REGISTRY["dinov2-base-reg"], strides=(14,) * taps, widths=(width,) * taps)


def method(width: int = 12, heads: int = 3, **options: object) -> InpFormer:
    made = make_options(InpFormer, {"heads": heads, **options})
    return InpFormer(made, vit(width=width), range(2, 10), 0)


def lively(width: int = 12, heads: int = 3, **options: object) -> InpFormer:
    """A method with weights of ordinary size."""
    found = method(width, heads, **options)
    liven(found.network)
    return found


def taps(height: int = 3, width: int = 4, batch: int = 2, channels: int = 12) -> list[Tensor]:
    return [0.5 * random(batch, channels, height, width, seed=k).float() for k in range(8)]


def condensed(found: InpFormer, maps: list[Tensor]) -> list[Tensor]:
    condenser = found.condenser(found.options)
    assert condenser is not None
    return condenser.apply(maps)


# ---- the authors' own numbers -------------------------------------------------------------------

GOLDEN = SHARED / "golden" / "inp_former.npz"
RENAMED = (
    ("aggregation.0.", "extractor."),
    ("bottleneck.0.", "bottleneck."),
    ("prototype_token", "extractor.tokens"),
    ("attn.learn_scale", "scale"),
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    if not GOLDEN.is_file():
        pytest.skip(f"the reference values are not here ({GOLDEN})")
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def renamed(golden: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under this project's names."""
    found = {}
    for name, value in golden.items():
        if name.startswith(start):
            name = name.removeprefix(start)
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            found[name] = value
    return found


def start(golden: Mapping[str, Tensor], weights: str = "param/") -> tuple[InpFormer, list[Tensor]]:
    """The method with the authors' weights, and its targets of their feature maps."""
    found = method(24)
    found.network.load_state_dict(renamed(golden, weights), strict=True)
    maps = [tap.transpose(1, 2).reshape(2, 24, 5, 5) for tap in golden["feats"]]
    return found, condensed(found, maps)


def same(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Close elementwise; elements that nearly cancel, by the tensor's own size."""
    assert found.shape == expected.shape
    limit = rtol * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=limit)


def test_maps_and_losses_equal_the_authors(golden: dict[str, Tensor]) -> None:
    found, targets = start(golden)
    rebuilt = found.network.reconstruct(targets)
    for k in range(2):
        same(targets[k], golden[f"encoder_group_{k}"])
        same(rebuilt[k], golden[f"decoder_group_{k}"])
    tokens = found.network.fuse(targets)
    distance = nearest_distance(tokens, found.network.extractor(tokens))
    same(distance, golden["prototypes_distance"])
    losses = found.network(targets)
    names = {"coherence": "coherence_loss", "soft_mining": "soft_mining_loss", "loss": "total_loss"}
    assert set(losses) == set(names)
    for ours, theirs in names.items():
        assert losses[ours].item() == pytest.approx(golden[theirs].item(), rel=1e-5)


def test_gradients_equal_the_authors(golden: dict[str, Tensor]) -> None:
    found, targets = start(golden)
    found.network(targets)["loss"].backward()
    expected = renamed(golden, "grad/")
    gradients = {name: p.grad for name, p in found.network.named_parameters()}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert gradient is not None
        known = expected[name]
        if name == "extractor.attn.kv.bias":
            # Softmax does not see a constant added to all keys' products: in exact arithmetic the
            # gradient of the key half is zero, and either side has its own rounding noise there.
            assert gradient[:24].abs().max() < 1e-8 and known[:24].abs().max() < 1e-8
            gradient, known = gradient[24:], known[24:]
        same(gradient, known, rtol=1e-4)


def test_six_training_steps_equal_the_authors(golden: dict[str, Tensor]) -> None:
    found, targets = start(golden)
    network = found.network
    optimizer = StableAdamW(network.parameters())
    for step in range(6):
        rate = TrainingOptions(warmup=4).rate(step, 12)
        assert rate == pytest.approx(golden["steps_lr"][step].item(), rel=1e-9)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = network(targets)["loss"]
        assert loss.item() == pytest.approx(golden["steps_loss"][step].item(), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    before, expected = renamed(golden, "param/"), renamed(golden, "after6/")
    gradients = renamed(golden, "grad/")
    assert set(expected) == set(network.state_dict())
    for name, value in network.state_dict().items():
        # Adam divides a gradient by its own size, so one that is rounding noise (the key biases'
        # of the extractor, see above) moves its weight as far as any other, with noise's sign.
        # Such elements are left out; those that no gradient reaches, of dead heads, are not.
        size = gradients[name].abs()
        real = (size >= 1e-8) | (size == 0) & (name != "extractor.attn.kv.bias")
        assert real.sum() >= 0.5 * real.numel()
        # Compared is how far training has moved each weight, 0.004 at most.
        moved, known = ((after - before[name])[real] for after in (value, expected[name]))
        torch.testing.assert_close(moved, known, rtol=1e-3, atol=2e-5)
        assert (moved - known).norm() <= 1e-3 * known.norm() + 1e-6


def test_maps_and_image_scores_after_training_equal_the_authors(golden: dict[str, Tensor]) -> None:
    found, targets = start(golden, "after6/")
    maps, scores = found.score(targets, None)
    full = torch.nn.functional.interpolate(
        maps[:, None], (70, 70), mode="bilinear", align_corners=True
    )
    same(full, golden["map_after6"])
    same(smoothed_map(maps, 14)[:, None], golden["map256_smoothed_after6"])
    same(scores, golden["image_score_after6"])


# ---- scores -------------------------------------------------------------------------------------


def slowly_smoothed(grid: np.ndarray, stride: int) -> np.ndarray:
    """Sheet 8.1, steps 2 to 4, one axis after the other; the short side becomes 256."""
    short = min(grid.shape)
    found = grid
    for axis in (0, 1):
        cells = grid.shape[axis]
        side, final = cells * stride, round(cells * 256 / short)
        aligned = np.linspace(0, cells - 1, side)
        centred = np.clip((np.arange(final) + 0.5) * side / final - 0.5, 0, side - 1)

        def resized(
            line: np.ndarray, aligned: np.ndarray = aligned, centred: np.ndarray = centred
        ) -> np.ndarray:
            full = np.interp(aligned, np.arange(len(line)), line)
            return np.interp(centred, np.arange(len(full)), full)

        found = np.apply_along_axis(resized, axis, found)
    line = np.exp(-0.5 * (np.arange(-2, 3) / 4) ** 2)
    kernel = np.outer(line, line) / np.outer(line, line).sum()
    return ndimage.correlate(found, kernel, mode="constant", cval=0.0)


@pytest.mark.parametrize(("grid", "shape"), [((5, 5), (256, 256)), ((4, 6), (256, 384))])
def test_smoothing_keeps_a_constant_inside_and_damps_the_border(
    grid: tuple[int, int], shape: tuple[int, int]
) -> None:
    found = smoothed_map(torch.full((1, *grid), 2.0), 14)[0] / 2
    assert found.shape == shape
    torch.testing.assert_close(found[2:-2, 2:-2], torch.ones_like(found[2:-2, 2:-2]))
    for edge in (found[0, 2:-2], found[-1, 2:-2], found[2:-2, 0], found[2:-2, -1]):
        assert edge.min().item() == pytest.approx(0.606, abs=5e-4)
        assert edge.max().item() == pytest.approx(0.606, abs=5e-4)
    for corner in (found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]):
        assert corner.item() == pytest.approx(0.368, abs=5e-4)


@pytest.mark.parametrize(("grid", "stride"), [((5, 5), 14), ((28, 28), 14), ((3, 7), 16)])
def test_the_smoothed_map_equals_its_steps_done_slowly(grid: tuple[int, int], stride: int) -> None:
    maps = random(2, *grid).abs()
    found = smoothed_map(maps.float(), stride).numpy()
    for k in range(2):
        expected = slowly_smoothed(maps[k].numpy(), stride)
        np.testing.assert_allclose(found[k], expected, rtol=0, atol=2e-5)


def test_the_image_score_is_the_mean_of_the_highest_655_pixels_of_256_by_256(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for marked, expected in ((655, 1.0), (654, 654 / 655), (800, 1.0), (65, 65 / 655)):
        pixels = torch.zeros(256 * 256)
        pixels[torch.randperm(256 * 256, generator=torch.Generator().manual_seed(0))[:marked]] = 1
        shown = pixels.view(1, 256, 256)
        monkeypatch.setattr(inp_former, "smoothed_map", lambda maps, stride, shown=shown: shown)
        assert image_score(torch.zeros(1, 5, 5), 14).item() == pytest.approx(expected, rel=1e-6)


def test_the_image_score_takes_one_pixel_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = torch.arange(25.0).view(1, 5, 5)
    monkeypatch.setattr(inp_former, "smoothed_map", lambda maps, stride: shown)
    assert image_score(torch.zeros(1, 5, 5), 14).item() == 24.0


def test_the_image_score_of_a_smooth_map_is_that_of_its_slow_version() -> None:
    maps = random(2, 6, 9).abs()
    for k, score in enumerate(image_score(maps.float(), 14).tolist()):
        pixels = np.sort(slowly_smoothed(maps[k].numpy(), 14).ravel())
        assert len(pixels) == 256 * 384
        assert score == pytest.approx(pixels[-983:].mean(), abs=2e-5)  # int(0.01 * 98,304)


def test_reconstruction_distance_is_the_mean_of_the_groups_cosine_distances() -> None:
    e = torch.zeros(1, 2, 1, 3)
    e[:, 0] = 3.0
    r = torch.tensor([[5.0, 0.0, -2.0], [0.0, 0.1, 0.0]]).view(1, 2, 1, 3)
    torch.testing.assert_close(reconstruction_distance([e], [r]), torch.tensor([[[0.0, 1.0, 2.0]]]))
    found = reconstruction_distance([e, e], [r, e])
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.5, 1.0]]]))


@pytest.mark.parametrize(("height", "width"), [(3, 7), (4, 4), (1, 5)])
@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"prototypes": 0}], ids=str)
def test_maps_of_any_grid_equal_the_equations_written_out_slowly(
    height: int, width: int, options: Mapping[str, object]
) -> None:
    found, maps = lively(**options), taps(height, width)
    scores, _ = found.score(condensed(found, maps), None)
    assert scores.shape == (2, height, width)
    slow = Slow(found.network, 3)
    for k in range(2):
        expected = slow.score_map([tap[k].numpy() for tap in maps])
        np.testing.assert_allclose(scores[k].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"fusion": "sum"}, {"groups": 8}], ids=str)
def test_the_score_prototypes_is_the_distance_to_the_nearest_one(
    options: Mapping[str, object],
) -> None:
    found, maps = lively(score="prototypes", **options), taps(3, 7)
    targets = condensed(found, maps)
    scores, images = found.score(targets, None)
    slow = Slow(found.network, 3)
    for k in range(2):
        expected = slow.distances(slow.fuse([tap[k].numpy() for tap in maps])).reshape(3, 7)
        np.testing.assert_allclose(scores[k].numpy(), expected, rtol=0, atol=2e-6)
        pixels = np.sort(slowly_smoothed(expected, 14).ravel())
        top = int(len(pixels) * 0.01)
        assert images[k].item() == pytest.approx(pixels[-top:].mean(), abs=2e-5)


@pytest.mark.parametrize("score", ["reconstruction", "prototypes"])
def test_an_images_scores_do_not_depend_on_its_batch(score: str) -> None:
    found = lively(score=score)
    targets = condensed(found, taps(batch=3))
    maps, scores = found.score(targets, None)
    alone, single = found.score([target[1:2] for target in targets], None)
    torch.testing.assert_close(maps[1:2], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[1:2], single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [8, 2])
def test_attention_maps_are_the_mean_weights_of_the_fourth_decoder_block(blocks: int) -> None:
    found, maps = lively(prototypes=5, decoder_blocks=blocks), taps(3, 7)
    shown = found.attention_maps(condensed(found, maps))
    assert shown is not None and shown.shape == (2, 5, 3, 7)
    assert (shown >= 0).all() and (shown > 0).any()
    slow = Slow(found.network, 3)
    last = min(blocks, 4) - 1  # of fewer blocks, the last one
    for k in range(2):
        image = [tap[k].numpy() for tap in maps]
        prototypes = slow.prototypes(slow.fuse(image))
        before = slow.outputs(image)[last - 1]
        weights = slow.weights(f"decoder.{last}", before, prototypes).mean(0)
        np.testing.assert_allclose(shown[k].numpy(), weights.T.reshape(5, 3, 7), atol=1e-5)


def test_only_with_prototypes_are_there_attention_maps() -> None:
    assert method().explains
    assert not method(prototypes=0).explains


# ---- targets, layers and options ----------------------------------------------------------------


def test_targets_are_the_means_of_shallow_and_deep_taps_or_the_taps_themselves() -> None:
    maps = taps()
    shallow, deep = condensed(method(), maps)
    np.testing.assert_allclose(shallow, np.mean([m.numpy() for m in maps[:4]], 0), atol=1e-6)
    np.testing.assert_allclose(deep, np.mean([m.numpy() for m in maps[4:]], 0), atol=1e-6)
    single = condensed(method(groups=8), maps)
    assert len(single) == 8
    assert all(torch.equal(a, b) for a, b in zip(single, maps, strict=True))
    names = {InpFormer.condenser(method(groups=groups).options).name for groups in (2, 8)}
    assert len(names) == 2  # the cache must tell them apart


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (8, (0, 1, 2, 3, 4, 5, 6, 7)),
        (9, (1, 2, 3, 4, 5, 6, 7, 8)),
        (12, (2, 3, 4, 5, 6, 7, 8, 9)),
        (24, (4, 6, 8, 10, 12, 14, 16, 18)),
    ],
)
def test_the_default_layers_are_eight_middle_blocks(blocks: int, expected: tuple[int, ...]) -> None:
    assert InpFormer.default_layers(vit(blocks)) == expected


def test_every_registered_transformer_of_eight_blocks_can_be_used() -> None:
    for spec in REGISTRY.values():
        if spec.transformer:
            layers = InpFormer.default_layers(spec)
            assert spec.check_layers(layers) == layers and len(layers) == 8
    assert InpFormer.default_layers(REGISTRY["dinov2-small-packaged"]) == tuple(range(1, 9))


def test_shallow_transformers_and_convolutional_networks_are_refused() -> None:
    for spec in (vit(7), REGISTRY["wide-resnet50"]):
        with pytest.raises(InputError, match=spec.id):
            InpFormer.default_layers(spec)
    options = make_options(InpFormer, {})
    for spec, layers in ((vit(), (1, 2, 3)), (REGISTRY["wide-resnet50"], range(8))):
        with pytest.raises(InputError, match="8 layers of a vision transformer"):
            InpFormer(options, spec, layers, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": 5}, "divisor of the 12 channels"),
        ({"decoder_blocks": 7}, "multiple of groups=2"),
        ({"decoder_blocks": 12, "groups": 8}, "multiple of groups=8"),
        ({"score": "prototypes", "prototypes": 0}, "prototypes of 1 or more"),
        ({"groups": 4}, "groups"),
        ({"fusion": "max"}, "fusion"),
        ({"prototypes": -1}, "prototypes"),
        ({"decoder_blocks": 0}, "decoder_blocks"),
        ({"gamma": -1}, "gamma"),
        ({"prototype": 6}, "prototypes"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        method(**options)


def test_a_head_has_64_channels_unless_a_number_is_given() -> None:
    for width, asked, expected in ((128, 0, 2), (12, 0, 1), (128, 1, 1), (128, 4, 4)):
        network = method(width, asked, decoder_blocks=2).network
        modules = [network.extractor, *network.decoder]
        assert {module.attn.heads for module in modules} == {expected}


def test_few_shot_training_sees_22_variants_of_each_image_by_default() -> None:
    for augment, few, many in (("few-shot", 22, 1), ("always", 22, 22), ("never", 1, 1)):
        found = method(augment=augment)
        assert len(found.training_views(True)) == few
        assert len(found.training_views(False)) == many


def test_saved_tensors_restore_the_scores() -> None:
    trained, targets = lively(), group_means(taps(), 2)
    fresh = InpFormer(trained.options, trained.backbone, trained.layers, 7)
    assert not fresh.trained
    fresh.load_tensors(trained.tensors())
    assert fresh.trained
    for ours, theirs in zip(fresh.score(targets, None), trained.score(targets, None), strict=True):
        assert torch.equal(ours, theirs)


def test_it_needs_no_references_and_only_the_score_prototypes_judges_unseen_categories() -> None:
    found = lively()
    targets = condensed(found, taps())
    before, _ = found.score(targets, None)
    found.enroll("plate", [[2 * target for target in targets]])
    assert torch.equal(found.score(targets, "plate")[0], before)
    assert not found.judges_unseen
    assert method(score="prototypes").judges_unseen
