"""IIPAD as a whole: memory, scores, and what a user does with a detector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.detector import Detector
from anomalyst.features.cache import FeatureCache
from anomalyst.methods.iipad import Iipad, IipadOptions
from anomalyst.methods.iipad_memory import Entries, Memory, similarity, visual_map
from anomalyst.methods.iipad_tower import IipadMaps
from anomalyst.training_data import TrainingFeatures
from anomalyst.types import Sample
from conftest import CLIP, blot, save, texture

QUICK = {"steps": 12, "batch_size": 3}
PARTS = ("plate", "sheet", "disc")


def part(category: str, seed: int) -> np.ndarray:
    """Three products: stripes down, stripes across, rings."""
    if category == "plate":
        return texture(seed)
    if category == "sheet":
        return np.ascontiguousarray(np.rot90(texture(seed)))
    y, x = np.mgrid[-48:48, -48:48]
    rings = 110 + 60 * np.sin(np.hypot(x, y) / 3)
    noise = np.random.default_rng(seed).normal(scale=4, size=(96, 96, 3))
    return (rings[..., None] + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache here has to outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two images of each product."""
    return [
        Sample(save(tmp_path / name / f"{k}.png", part(name, k)), name, 0)
        for name in PARTS
        for k in range(2)
    ]


@pytest.fixture
def build(clip_weights: str) -> Callable[..., Detector]:
    def make(**options: object) -> Detector:
        chosen = {**QUICK, **options}
        return Detector(
            "iipad", backbone=CLIP, weights=clip_weights, image_size=80, options=chosen, seed=1
        )

    return make


def vectors(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


# ---- memory -------------------------------------------------------------------------------------


def entries(count: int, seed: int, patches: int = 6) -> Entries:
    layers = [vectors(count, patches, 8, seed=seed + k) for k in (1, 2)]
    return Entries(vectors(count, 4, 5, seed=seed), vectors(count, 2, 5, seed=seed + 3), layers)


@pytest.mark.parametrize("ordered", [True, False])
def test_an_image_finds_itself_and_its_like(ordered: bool) -> None:
    centres, memory = vectors(3, 4, 5, seed=9), Memory(ordered)
    for number in range(3):
        near = functional.normalize(centres[number] + 0.02 * vectors(2, 4, 5, seed=number), dim=-1)
        memory.add(f"c{number}", [entries(2, 10 * number)._replace(objects=near)])
    assert memory.shots == 2
    rows, alike = memory.retrieve(memory.all.objects, 2)
    assert rows[:, 0].tolist() == list(range(6)) and (rows // 2).tolist() == [
        [number, number] for number in (0, 0, 1, 1, 2, 2)
    ]
    torch.testing.assert_close(alike[:, 0], torch.ones(6))
    shuffled = memory.all.objects[:, [2, 0, 3, 1]]
    again = memory.retrieve(shuffled, 1)[1][:, 0]
    assert torch.allclose(again, torch.ones(6)) != ordered


def test_similarity_is_token_by_token_or_by_the_best() -> None:
    queries, kept = vectors(2, 3, 5), vectors(4, 3, 5, seed=1)
    for i in range(2):
        for n in range(4):
            cosines = queries[i] @ kept[n].T
            best = (cosines.amax(0).mean() + cosines.amax(1).mean()) / 2
            for ordered, expected in ((True, cosines.diagonal().mean()), (False, best)):
                found = similarity(queries, kept, ordered)[i, n]
                assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_order_of_the_bank_does_not_matter() -> None:
    parts = [entries(2, seed) for seed in (0, 50, 90)]
    query, patches = vectors(3, 4, 5, seed=7), [vectors(3, 6, 8, seed=k) for k in (70, 80)]
    maps = []
    for order in ((0, 1, 2), (2, 0, 1)):
        memory = Memory(True)
        for number in order:
            memory.add(str(number), [parts[number]])
        rows, _ = memory.retrieve(query, 2)
        maps.append(visual_map(patches, memory.all.patches, rows))
    torch.testing.assert_close(maps[0], maps[1])


def test_the_visual_map_is_equation_17() -> None:
    kept, patches = entries(4, 0), [vectors(2, 3, 8, seed=k) for k in (70, 80)]
    rows = torch.tensor([[1, 3], [0, 2]])
    found = visual_map(patches, kept.patches, rows)
    for i in range(2):
        for r in range(3):
            expected = 0.0
            for mine, bank in zip(patches, kept.patches, strict=True):
                retrieved = bank[rows[i]].flatten(0, 1)
                expected += float(((1 - retrieved @ mine[i, r]) / 2).min())
            assert found[i, r].item() == pytest.approx(expected, rel=1e-5)
    opposite = [-layer[:1, :1].expand(1, 3, 8) for layer in kept.patches]
    bank = [layer[:1, :1] for layer in kept.patches]
    torch.testing.assert_close(
        visual_map(opposite, bank, torch.zeros(1, 1, dtype=torch.long)), torch.full((1, 3), 2.0)
    )


def test_stored_images_are_normal_and_more_images_only_help() -> None:
    kept = entries(4, 0)
    own = visual_map(kept.patches, kept.patches, torch.arange(4)[:, None])
    assert own.abs().max() < 1e-6
    patches = [vectors(2, 6, 8, seed=k) for k in (70, 80)]
    maps = [visual_map(patches, kept.patches, torch.arange(n).expand(2, -1)) for n in (1, 2, 3, 4)]
    for fewer, more in pairwise(maps):
        assert (more <= fewer).all()


def test_images_of_other_shapes_share_a_memory() -> None:
    memory = Memory(True)
    small, large = entries(1, 0, patches=4), entries(2, 30, patches=6)
    memory.add("a", [small, large])
    alone = visual_map(small.patches, small.patches, torch.zeros(1, 1, dtype=torch.long))
    together = visual_map(small.patches, memory.all.patches, torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(alone, together)
    # Rows of zeros would be nearer to these than any patch of the image.
    far = [-layer[:, :1] for layer in small.patches]
    row = torch.zeros(1, 1, dtype=torch.long)
    cropped = [layer[:, :1] for layer in small.patches]
    only = Memory(True)
    only.add("a", [small._replace(patches=cropped), large])
    torch.testing.assert_close(visual_map(far, only.all.patches, row), torch.full((1, 1), 2.0))
    other = Memory(True)
    other.load(memory.tensors() | {"network.generator.prompts": torch.zeros(1)})
    for one, two in zip(memory.all.patches, other.all.patches, strict=True):
        assert torch.equal(one, two)


# ---- scores -------------------------------------------------------------------------------------


def trained(detector: Detector, samples: list[Sample]) -> Iipad:
    detector.fit(samples, calibration=0, shots=2)
    method = detector.method
    assert isinstance(method, Iipad)
    return method


def features(detector: Detector, *pictures: np.ndarray) -> list[Tensor]:
    from anomalyst.inference import read_item

    items = [read_item(p, "x", detector.engine.preprocess) for p in pictures]
    return list(detector.method.encode(detector.engine.features(items)))


def with_options(method: Iipad, **changed: Any) -> Iipad:
    other = copy.copy(method)
    other.options = IipadOptions(**{**method.options.model_dump(), **changed})
    return other


PICTURES = (part("plate", 9), blot(part("sheet", 9), 30, 40, 24), part("disc", 8))


def test_the_scores_are_equations_15_to_18(build, samples: list[Sample]) -> None:
    detector = build()
    method = trained(detector, samples)
    found = features(detector, *PICTURES)
    seen = IipadMaps.of(found, 4)
    for tau in (1.0, 0.07):
        judge = with_options(method, test_temperature=tau)
        maps, scores = judge.score(found, None)
        bank = method.memory.all
        z = functional.normalize(seen.objects[..., 0].mT, dim=-1)
        rows = ((z[:, None] * bank.objects).sum(-1).mean(-1)).topk(2, dim=1).indices
        for i in range(3):
            e = (bank.prompts[rows[i]].mean(0) + seen.prompts[i, :, :, 0].T) / 2
            shares = []
            for local in seen.local:
                patches = local[i].flatten(1).T
                logits = torch.stack([torch.cosine_similarity(patches, x[None]) for x in e], 1)
                shares.append((logits / tau).softmax(1))
            share = torch.stack(shares).mean(0)
            torch.testing.assert_close(share.sum(1), torch.ones(25))
            visual = torch.zeros(25)
            for original, kept in zip(seen.original, bank.patches, strict=True):
                patches = functional.normalize(original[i].flatten(1).T, dim=1)
                visual += (1 - (patches @ kept[rows[i]].flatten(0, 1).T).amax(1)) / 2
            torch.testing.assert_close(maps[i].flatten(), share[:, 1] + visual)
            torch.testing.assert_close(scores[i], share[:, 1].max() + visual.max())


def test_swapped_prompts_turn_the_map_over(build, samples: list[Sample]) -> None:
    method = trained(build(), samples)
    patches, prompts = vectors(2, 4, 9, 48), vectors(2, 2, 48, seed=1)
    one, other = (method._prompted(patches, e) for e in (prompts, prompts.flip(1)))
    torch.testing.assert_close(one, 1 - other)
    normal = 1 - one  # the code's (p_a + 1 - p_n) / 2 is p_a
    torch.testing.assert_close((one + 1 - normal) / 2, one)


def test_image_scores_differ_by_what_they_say(build, samples: list[Sample]) -> None:
    detector = build(test_temperature=0.07)
    method = trained(detector, samples)
    found = features(detector, *PICTURES)
    paper, cls, code = (
        with_options(method, image_score=kind).score(found, None)[1]
        for kind in ("paper", "paper+cls", "code")
    )
    seen, bank = IipadMaps.of(found, 4), method.memory.all
    z = functional.normalize(seen.objects[..., 0].mT, dim=-1)
    alike, rows = (z.flatten(1) @ bank.objects.flatten(1).T / z.shape[1]).topk(2, dim=1)
    v = functional.normalize(seen.cls[..., 0, 0], dim=1)
    normal = torch.stack(
        [(bank.prompts[rows[i]] @ v[i] / 0.07).softmax(1)[:, 0].mean() for i in range(3)]
    )
    torch.testing.assert_close(code - paper, -normal - alike.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls - paper, 1 - normal, atol=1e-5, rtol=1e-5)


def test_the_category_does_not_matter(build, samples: list[Sample]) -> None:
    detector = build()
    trained(detector, samples)
    named = [
        [p.score for p in detector.predict(PICTURES, category=name)] for name in (*PARTS, None)
    ]
    assert named.count(named[0]) == 4


def test_the_banks_of_the_ablation(build, samples: list[Sample]) -> None:
    """A defect that looks like another product: found by the category's bank alone."""
    detector = build()
    method = trained(detector, samples)
    mixed = part("plate", 9)
    mixed[32:80, 32:80] = part("sheet", 7)[32:80, 32:80]
    found = features(detector, part("plate", 9), mixed)
    image = [functional.normalize(x.flatten(2).mT, dim=-1) for x in IipadMaps.of(found, 4).original]
    z = functional.normalize(IipadMaps.of(found, 4).objects[..., 0].mT, dim=-1)
    rows, _ = method.memory.retrieve(z, 2)
    margins = {}
    for bank in ("category", "shared", "none"):
        visual = with_options(method, memory=bank)._visual(image, rows)
        good, bad = visual.amax(1).tolist()
        margins[bank] = bad - good
    assert margins["category"] > 2 * margins["shared"] > 0 == margins["none"]


def test_without_references_the_prompts_judge_alone(build, samples: list[Sample]) -> None:
    detector = build()
    detector.train(samples)
    method = detector.method
    maps, scores = method.score(features(detector, *PICTURES), None)
    assert maps.shape == (3, 5, 5) and ((maps > 0) & (maps < 1)).all()
    assert torch.equal(scores, maps.flatten(1).amax(1))


# ---- from training to a bundle ------------------------------------------------------------------


def test_training_moves_what_it_should(build, samples: list[Sample]) -> None:
    """Two shots of three products, twenty epochs: the loss falls, the two prompts part."""
    detector = build(steps=None, epochs=20, batch_size=2, prompt_std=0.02)
    engine = detector.engine
    frozen = engine.backbone.weights_sha256
    source = TrainingFeatures(engine, samples, detector.method.reference_views)
    (batch,) = source.fetch(range(len(samples)))
    losses = []
    for _ in range(2):
        method = detector.method
        method.source(source)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            losses.append(method.network(batch))
        if not method.trained:
            detector.fit(samples, calibration=0, shots=2)
    before, after = losses
    assert after["loss"] < before["loss"] - 0.5
    assert after["alike"] < before["alike"] - 0.1
    assert {"semantic", "tokens", "text"} < set(after)
    del vars(engine.backbone)["weights_sha256"]
    assert engine.backbone.weights_sha256 == frozen
    good, bad = detector.predict([part("plate", 9), blot(part("plate", 9), 32, 40, 24)])
    assert good.category == bad.category == "plate" and bad.score > good.score
    row, column = np.unravel_index(bad.map.argmax(), bad.map.shape)
    assert 26 <= row < 62 and 34 <= column < 70


def test_losses_can_be_switched_off(build, samples: list[Sample]) -> None:
    detector = build(alpha=0, beta=0, synthetic="none", steps=2)
    source = TrainingFeatures(detector.engine, samples, detector.method.reference_views)
    detector.method.source(source)
    found = detector.method.network(source.fetch(range(4))[0])
    assert set(found) == {"loss", "alike", "semantic"} and found["loss"] == found["semantic"]


def test_bank_and_test_see_one_image_alike(build, samples: list[Sample]) -> None:
    """No dropout acts once the training is over."""
    detector = build(dropout=0.5)
    detector.train(samples)
    pictures = [part(name, 0) for name in PARTS]
    for name, picture in zip(PARTS, pictures, strict=True):
        detector.enroll(name, [picture])
    kept = detector.method.memory.all
    again = IipadMaps.of(features(detector, *pictures), 4)
    torch.testing.assert_close(again.prompts[..., 0].mT, kept.prompts, atol=1e-5, rtol=0)
    image = [functional.normalize(x.flatten(2).mT, dim=-1) for x in again.original]
    rows, alike = detector.method.memory.retrieve(kept.objects, 1)
    assert rows[:, 0].tolist() == [0, 1, 2]
    torch.testing.assert_close(alike, torch.ones(3, 1))
    assert detector.method._visual(image, rows).abs().max() < 1e-5


def test_cached_features_train_as_fresh_ones_do(
    build, samples: list[Sample], tmp_path: Path
) -> None:
    """Half precision in the cache is all that differs."""
    detector = build()
    method, engine = detector.method, detector.engine
    losses = []
    for cache in (None, FeatureCache(tmp_path / "cache")):
        source = TrainingFeatures(replace(engine, cache=cache), samples, method.reference_views)
        method.source(source)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method.network.train()
            losses.append(method.network(source.fetch([0, 3, 5])[0]))
    for name, loss in losses[0].items():
        assert losses[1][name].item() == pytest.approx(loss.item(), rel=2e-3), name


def test_new_categories_need_no_training(build, samples: list[Sample], tmp_path: Path) -> None:
    detector = build()
    detector.fit(samples[:4], calibration=0, shots=2)
    before = copy.deepcopy(detector.method.network.state_dict())
    detector.enroll("disc", [part("disc", k) for k in range(3)])
    method = detector.method
    assert detector.categories == PARTS and method.memory.shots == 3
    for name, tensor in method.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    detector.save(tmp_path / "bundle.zip")
    loaded = Detector.load(tmp_path / "bundle.zip")
    assert loaded.method.options == method.options
    for one, two in zip(detector.predict(PICTURES), loaded.predict(PICTURES), strict=True):
        assert one.score == two.score and one.category == two.category
        np.testing.assert_array_equal(one.map, two.map)


@pytest.mark.parametrize("preset", sorted(Iipad.presets))
def test_presets_run(build, samples: list[Sample], preset: str) -> None:
    chosen = {**Iipad.presets[preset]["options"], **QUICK, "object_tokens": "heads"}
    chosen["sentences"] = "code-visa" if preset == "released" else "generic"
    detector = build(**chosen)
    trained(detector, samples)
    assert all(np.isfinite(p.score) for p in detector.predict(PICTURES))
