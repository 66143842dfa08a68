"""IIPAD's losses, pseudo features, sentences and learning rates against values known by hand."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from anomalyst.methods.iipad import Iipad, IipadOptions
from anomalyst.methods.iipad_losses import (
    contrast,
    pseudo_features,
    semantic_loss,
    text_loss,
    token_loss,
    token_weights,
)
from anomalyst.methods.iipad_sentences import _TEMPLATES, guides, sentences
from test_iipad_tower import Build, build, qformer_folder, stock  # noqa: F401


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


# ---- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("linear", "expected"), [(False, 2 * log(2)), (True, 0.5)])
def test_equal_prompts_are_a_coin_toss(linear: bool, expected: float) -> None:
    features, pseudo = unit(2, 3, 5, 8), unit(2, 3, 5, 8, seed=1)
    same = unit(2, 1, 8, seed=2).expand(-1, 2, -1)
    assert semantic_loss(features, pseudo, same, 1.0, linear).item() == pytest.approx(expected)
    said = (unit(7, 8, seed=3), unit(9, 8, seed=4))
    assert text_loss(same, said, 1.0, linear).item() == pytest.approx(expected)


def test_the_semantic_loss_is_equations_6_and_9() -> None:
    features, pseudo, prompts = unit(2, 3, 5, 8), unit(2, 3, 5, 8, seed=1), unit(2, 2, 8, seed=2)
    expected = 0.0
    for i in range(2):
        for j in range(3):
            for r in range(5):
                n, a = (torch.exp(features[i, j, r] @ e / 0.5) for e in prompts[i])
                expected -= float(torch.log(n / (n + a))) / 30
                n, a = (torch.exp(pseudo[i, j, r] @ e / 0.5) for e in prompts[i])
                expected -= float(torch.log(a / (n + a))) / 30
    found = semantic_loss(features, pseudo, prompts, 0.5, False)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    alone = semantic_loss(features, None, prompts, 0.5, False)
    assert 0 < alone.item() < found.item()


def test_the_text_loss_is_equation_11() -> None:
    prompts, good, bad = unit(2, 2, 8), unit(3, 8, seed=1), unit(4, 8, seed=2)
    expected = 0.0
    for said, own, other in ((good, 0, 1), (bad, 1, 0)):
        for e in prompts:
            for t in said:
                x, y = torch.exp(e[own] @ t), torch.exp(e[other] @ t)
                expected -= float(torch.log(x / (x + y))) / (2 * len(said))
    assert text_loss(prompts, (good, bad), 1.0, False).item() == pytest.approx(expected, rel=1e-5)


def test_the_linear_form_has_half_the_slope_where_nothing_is_decided() -> None:
    slopes = []
    for linear in (False, True):
        own = torch.zeros(1, requires_grad=True)
        contrast(own, torch.zeros(1), 1.0, linear).backward()
        slopes.append(own.grad.item())
    assert slopes[1] / slopes[0] == pytest.approx(0.5)
    margins = torch.linspace(-2, 2, 9)
    for linear in (False, True):
        values = [contrast(m, torch.zeros(()), 1.0, linear).item() for m in margins]
        assert values == sorted(values, reverse=True)


def test_the_token_loss_at_its_known_points() -> None:
    """Both cross-entropies: log 28 each for equal tokens, 2.3918 for orthonormal matched ones."""
    same = unit(1, 1, 64).expand(-1, 28, -1)
    assert token_loss(same, unit(1, 1, 40, 64, seed=1), 1.0).item() == pytest.approx(2 * log(28))
    # Patches that are the tokens: each one's share is its own patch, the minimum drops out.
    matched = torch.eye(28, 64)
    found = token_loss(matched[None], matched[None, None], 1.0).item()
    assert found / 2 == pytest.approx(log(1 + 27 / torch.e), abs=1e-4)
    assert found / 2 == pytest.approx(2.3918, abs=1e-4)
    near = functional.normalize(matched + 0.3 * unit(28, 64, seed=2), dim=1)
    assert token_loss(near[None], matched[None, None], 1.0).item() > found


def test_the_token_loss_is_equation_7() -> None:
    tokens, features = unit(2, 4, 8), unit(2, 3, 6, 8, seed=1)
    expected = 0.0
    for i in range(2):
        for j in range(3):
            similarity = tokens[i] @ features[i, j].T
            low, high = similarity.amin(1, True), similarity.amax(1, True)
            scaled = (similarity - low) / (high - low)
            scaled[scaled < 1 / 6] = 0
            grouped = functional.normalize(scaled / scaled.sum(1, True) @ features[i, j], dim=1)
            alike = tokens[i] @ grouped.T / 0.5
            target = torch.arange(4)
            both = functional.cross_entropy(alike, target)
            both += functional.cross_entropy(alike.T, target)
            expected += float(both) / 6
    assert token_loss(tokens, features, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_a_tokens_weights() -> None:
    similarity = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    weights = token_weights(similarity)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    hard = token_weights(similarity, 1.0)
    one_hot = functional.one_hot(similarity.argmax(-1), 9).float()
    torch.testing.assert_close(hard, one_hot)
    soft = token_weights(similarity, 0.0)
    assert ((soft == 0) == (similarity == similarity.amin(-1, True))).all()
    assert torch.isfinite(token_weights(torch.ones(1, 2, 4))).all()


# ---- abnormal features --------------------------------------------------------------------------


def test_pseudo_features_are_two_layers_and_noise() -> None:
    layers = 3 * torch.randn(1, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    flat = functional.normalize(layers, dim=-1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert (pseudo_features(layers, "paper", 1.0).norm(dim=-1) - 1).abs().max() < 1e-5
    quiet = pseudo_features(layers, "paper", 0.0)
    torch.testing.assert_close(quiet[:, 0], flat[:, 0])
    summed = functional.normalize(flat[:, 1:] + flat[:, :-1], dim=-1)
    torch.testing.assert_close(quiet[:, 1:], summed)
    code = pseudo_features(layers, "code", 0.0)
    torch.testing.assert_close(code[:, 1:], summed)
    wrapped = functional.normalize(flat[:, 0] + layers[:, -1], dim=-1)
    torch.testing.assert_close(code[:, 0], wrapped)


@pytest.mark.parametrize(
    ("noise", "expected"), [(1.0, 0.034), (0.5 / sqrt(768), 0.67), (1 / sqrt(768), 0.58)]
)
def test_how_much_of_the_image_is_left(noise: float, expected: float) -> None:
    """Of two orthogonal layers; 1 is the paper's noise, 1 / sqrt(d) that of the preset fixed."""
    pair = torch.zeros(1, 2, 4000, 768)
    pair[:, 0, :, 0], pair[:, 1, :, 1] = 1, 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = pseudo_features(pair, "paper", noise)
    left = (found * pair).sum(-1).mean(dim=(0, 2))
    assert left[1].item() == pytest.approx(expected, abs=0.01)
    assert left[1].item() == pytest.approx(1 / sqrt(2 + 768 * noise**2), rel=0.02)


# ---- sentences ----------------------------------------------------------------------------------


def test_the_lists_are_the_papers_and_the_codes() -> None:
    assert len(_TEMPLATES) == len(set(_TEMPLATES)) == 22
    expected = {
        "generic": (7, 7, 7),
        "mvtec": (7, 41, 29),
        "visa": (7, 39, 38),
        # 60 distinct strings in the code: one ends in a blank, which CLIP does not read.
        "code-mvtec": (7 * 22, 126 * 22, 59 * 22),
        "code-visa": (7 * 22, 39 * 22, 38 * 22),
    }
    for kind, (good, bad, distinct) in expected.items():
        normal, abnormal = sentences(kind)
        assert (len(normal), len(abnormal), len(set(abnormal))) == (good, bad, distinct)
        assert len(sentences(kind, dedup=True)[1]) == distinct
        assert not any("{" in said for said in normal + abnormal)
    assert sentences("mvtec")[0][0] == "a image of the normal object"
    assert sentences("mvtec")[1][36] == "a image of the object squeezed with compression"
    assert "a image of the object with weird candle wick" in sentences("visa")[1]
    assert "a blurry industrial image of a cracked object" in sentences("code-mvtec")[1]
    assert "an industrial image of a large object with oil" in sentences("code-mvtec")[1]


def test_what_the_sentences_come_to(build: Build) -> None:  # noqa: F811
    text = build().tower.text
    good, bad = guides(text, "mvtec", False)
    assert good.shape == (7, 48) and bad.shape == (41, 48)
    torch.testing.assert_close(bad, text.features(sentences("mvtec")[1]), atol=1e-5, rtol=1e-5)
    one, other = guides(text, "code-visa", False), guides(text, "code-visa", True)
    assert one[0].shape == one[1].shape == (1, 48)
    torch.testing.assert_close(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    torch.testing.assert_close(one[1].norm(dim=1), torch.ones(1))


# ---- learning rates -----------------------------------------------------------------------------


def test_the_released_rate_rises() -> None:
    """Twenty epochs of 15 images, one a step."""
    options = IipadOptions(**Iipad.presets["released"]["options"])
    steps = options.planned_steps(15, options.batch_size)
    assert steps == 300
    found = [options.rate(epoch * 15, steps) for epoch in (0, 1, 2, 10, 19)]
    expected = [1e-5, 3.2e-4, 1.2e-3, 2.5e-2, 5.0e-2]
    assert found == pytest.approx(expected, rel=0.03)


def test_the_papers_rate_stays() -> None:
    options = IipadOptions()
    assert {options.rate(step, 300) for step in range(300)} == {1e-3}
    optimizer = options.optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["weight_decay"] == 0
    for preset in Iipad.presets.values():
        IipadOptions(**preset["options"])
