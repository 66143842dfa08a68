"""Attention of proxies against PyTorch's own, and the position codes of its keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalyst.methods.proxy_attention import (
    ProxyAttention,
    grid_places,
    masked_places,
    position_code,
    reference_codes,
)
from slow_nagl import WIDTH, liven, random, sine_code


def pytorchs(ours: ProxyAttention) -> nn.MultiheadAttention:
    """PyTorch's attention with the same weights, biases of the keys included."""
    theirs = nn.MultiheadAttention(WIDTH, ours.heads, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.in_weight)
        theirs.in_proj_bias.copy_(ours.in_bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


def attention(heads: int, null_token: bool = False) -> ProxyAttention:
    found = ProxyAttention(WIDTH, heads, null_token).double()
    liven(found)
    return found


def given(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return random(3, 5, WIDTH), random(3, tokens, WIDTH, seed=1), random(3, tokens, WIDTH, seed=2)


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_folded_projections_are_pytorchs_attention(heads: int) -> None:
    ours = attention(heads)
    queries, keys, values = given()
    found, logits = ours(queries, keys, values)
    read, weights = pytorchs(ours)(queries, keys, values, average_attn_weights=False)
    torch.testing.assert_close(found, ours.norm(queries + read), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits.softmax(-1), weights, rtol=0, atol=1e-10)
    assert logits.shape == (3, heads, 5, 9)


def test_a_null_token_is_one_more_token_that_has_no_logit() -> None:
    ours = attention(4, null_token=True)
    queries, keys, values = given()
    found, logits = ours(queries, keys, values)
    assert ours.null is not None
    null = ours.null.detach().expand(3, 2, WIDTH)
    more = torch.cat([keys, null[:, :1]], 1), torch.cat([values, null[:, 1:]], 1)
    read, _ = pytorchs(ours)(queries, *more)
    torch.testing.assert_close(found, ours.norm(queries + read), rtol=0, atol=1e-10)
    assert logits.shape == (3, 4, 5, 9)


def test_the_order_of_tokens_means_nothing() -> None:
    ours, (queries, keys, values) = attention(4, null_token=True), given()
    turn = [4, 0, 8, 2, 1, 3, 7, 6, 5]
    found, logits = ours(queries, keys[:, turn], values[:, turn])
    expected, straight = ours(queries, keys, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, straight[..., turn], rtol=0, atol=1e-12)


def test_it_starts_as_the_authors_layers_do() -> None:
    fresh = ProxyAttention(WIDTH, 4, null_token=True)
    for bias in (fresh.in_bias, fresh.out.bias, fresh.norm.bias, fresh.null):
        assert not bias.any()
    assert (fresh.norm.weight == 1).all()
    bound = (6 / (WIDTH + 3 * WIDTH)) ** 0.5  # Xavier's, of the three stacked projections
    assert 0.9 * bound < fresh.in_weight.abs().max() <= bound


# ---- position codes -----------------------------------------------------------------------------


def test_position_codes_equal_their_slow_form() -> None:
    for height, width in ((3, 5), (7, 2)):
        found = position_code(grid_places(height, width), 12)
        np.testing.assert_allclose(found, sine_code(height, width, 12), rtol=0, atol=2e-6)


def test_a_position_code_has_rows_first_and_then_columns() -> None:
    code = position_code(grid_places(4, 6), 8).view(4, 6, 8)
    assert (code[:, :1, :4] == code[:, :, :4]).all() and (code[:1, :, 4:] == code[:, :, 4:]).all()
    row = 2 * np.pi / 4  # of the first row; pairs of a sine and a cosine
    expected = [np.sin(row), np.cos(row), np.sin(row / 100), np.cos(row / 100)]
    np.testing.assert_allclose(code[0, 0, :4], expected, rtol=0, atol=2e-6)


def test_masked_codes_stand_still_inside_a_defect() -> None:
    defect = torch.zeros(4, 6, dtype=torch.bool)
    defect[1:3, 2:5] = True
    places = masked_places(defect).view(4, 6, 2) / (2 * np.pi)
    rows, columns = places.unbind(-1)
    np.testing.assert_allclose(rows[:, 2], [1 / 2, 1 / 2, 1 / 2, 1], rtol=1e-5)
    np.testing.assert_allclose(columns[1], [1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 1], rtol=1e-5)
    none = masked_places(torch.zeros(4, 6, dtype=torch.bool))
    torch.testing.assert_close(none, grid_places(4, 6), rtol=1e-5, atol=1e-5)


def test_codes_of_several_references_are_each_ones_own_but_in_the_authors_order() -> None:
    covers = [torch.zeros(2, 3), torch.ones(2, 3).tril()]
    for code in reference_codes("grid", covers, 8):
        torch.testing.assert_close(code, position_code(grid_places(2, 3), 8))
    assert not any(code.any() for code in reference_codes("none", covers, 8))
    # Handed out image by image: patch 0 of both, patch 1 of both, ...
    places = torch.stack([masked_places(cover > 0) for cover in covers])
    first, second = reference_codes("masked", covers, 8)
    handed_out = position_code(places.transpose(0, 1).flatten(0, 1), 8)
    torch.testing.assert_close(torch.cat([first, second]), handed_out)
