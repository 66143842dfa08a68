"""Which category an image looks like: cosines to references, and what is said of strangers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalyst.retrieval import SAME_PRODUCT, CategoryIndex, describe, mistaken

GRID = (3, 4)


def maps(count: int, seed: int, grid: tuple[int, int] = GRID) -> list[Tensor]:
    """Two layers' maps of so many images; the last layer's are what counts."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 2, *grid, generator=generator)
    return [first, 0.3 + torch.randn(count, 5, *grid, generator=generator)]


def described(features: list[Tensor]) -> np.ndarray:
    """The mean direction of each image's patches, one patch after the other."""
    found = []
    for image in features[-1].double().numpy():
        patches = [image[:, r, c] for r in range(image.shape[1]) for c in range(image.shape[2])]
        mean = np.mean([patch / np.sqrt(patch @ patch) for patch in patches], axis=0)
        found.append(mean / np.sqrt(mean @ mean))
    return np.array(found)


@pytest.fixture
def index() -> CategoryIndex:
    """Three nuts in two batches of two shapes, and two bolts."""
    made = CategoryIndex()
    made.add("nut", maps(2, 1))
    made.add("bolt", maps(2, 2))
    made.add("nut", maps(1, 3, (2, 2)))
    return made


def test_descriptors_are_mean_directions_whatever_the_length() -> None:
    features = maps(3, 0)
    np.testing.assert_allclose(describe(features), described(features), atol=1e-6)
    longer = [features[0], features[1] * torch.rand(3, 1, *GRID).add(0.5)]
    np.testing.assert_allclose(describe(longer), described(features), atol=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_similarities_are_cosines_to_the_nearest_reference_of_each_category(
    index: CategoryIndex, count: int
) -> None:
    queries = maps(count, 7)
    known = {
        "nut": np.concatenate([described(maps(2, 1)), described(maps(1, 3, (2, 2)))]),
        "bolt": described(maps(2, 2)),
    }
    found = index.similarities(queries)
    assert len(found) == count and all(list(each) == ["nut", "bolt"] for each in found)
    for each, query in zip(found, described(queries), strict=True):
        assert all(type(value) is float for value in each.values())
        for name, references in known.items():
            expected = max(float(reference @ query) for reference in references)
            assert each[name] == pytest.approx(expected, abs=1e-6)


def test_an_image_of_a_batch_is_as_similar_as_alone(index: CategoryIndex) -> None:
    queries = maps(5, 8)
    alone = [index.similarities([layer[k : k + 1] for layer in queries])[0] for k in range(5)]
    for one, other in zip(index.similarities(queries), alone, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_the_category_looked_up_is_the_most_similar_one(index: CategoryIndex) -> None:
    queries = maps(20, 9)
    found = index.lookup(queries)
    assert found == [max(each, key=each.__getitem__) for each in index.similarities(queries)]
    assert set(found) == {"nut", "bolt"}


def test_a_reference_is_wholly_similar_to_its_own_category(index: CategoryIndex) -> None:
    assert index.similarities(maps(2, 2))[1]["bolt"] == pytest.approx(1, abs=1e-6)


def test_without_references_nothing_is_similar() -> None:
    assert CategoryIndex().similarities(maps(2, 0)) == [{}, {}]
    assert CategoryIndex().lookup(maps(2, 0)) == [None, None]


def test_what_is_restored_compares_alike(index: CategoryIndex) -> None:
    again = CategoryIndex()
    again.load(index.tensors())
    assert again.similarities(maps(3, 7)) == index.similarities(maps(3, 7))
    again.add("nut", maps(1, 7))  # and leaves the one that it came from alone
    assert index.similarities(maps(1, 7))[0]["nut"] < 0.999


@pytest.mark.parametrize(
    ("similar", "said"),
    [
        ({"nut": SAME_PRODUCT, "bolt": 0.99}, None),  # it may well be a nut, likelier though a bolt
        ({"bolt": 0.1}, None),  # nothing is known of nuts
        ({}, None),
        ({"nut": 0.412, "bolt": 0.3}, "unlike all references of 'nut' (similarity 0.41)"),
        ({"nut": 0.412}, "unlike all references of 'nut' (similarity 0.41)"),
        ({"nut": 0.4, "bolt": 0.4}, "unlike all references of 'nut' (similarity 0.40)"),
        (
            {"cap": 0.2, "nut": 0.412, "bolt": 0.876},
            "like 'bolt' (similarity 0.88), not 'nut' (0.41)",
        ),
        # Nor need the likelier one be very similar.
        ({"nut": -0.2, "bolt": -0.1}, "like 'bolt' (similarity -0.10), not 'nut' (-0.20)"),
    ],
)
def test_what_is_said_of_an_image_unlike_its_category(
    similar: dict[str, float], said: str | None
) -> None:
    assert mistaken("nut", similar) == said
