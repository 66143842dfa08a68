"""INP-Former's extractor, decoder and wiring, against analytic facts and a slow second version."""

from __future__ import annotations

from collections.abc import Mapping
from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalyst.methods.inp_former import (
    Extractor,
    GuidedBlock,
    InpFormerOptions,
    InpNetwork,
    group_means,
)
from slow_inp_former import Slow, build, liven, random

WIDTH, HEADS = 12, 3


def guided(seed: int = 0, width: int = WIDTH, **options: object) -> GuidedBlock:
    block = GuidedBlock(width, HEADS, InpFormerOptions(**options)).double()
    liven(block, seed)
    return block


def silence(*layers: nn.Module) -> None:
    """Set the weights and biases of linear layers to zero."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# ---- decoder block ------------------------------------------------------------------------------


@torch.no_grad()
def test_tokens_pass_a_decoder_block_independently_of_their_order() -> None:
    block, x, prototypes = guided(), random(2, 15, WIDTH), random(2, 5, WIDTH, seed=1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(15))
    close(block(x[:, order], prototypes), block(x, prototypes)[:, order])
    close(block(x[:, :4], prototypes), block(x, prototypes)[:, :4])


@torch.no_grad()
def test_the_order_of_prototypes_means_nothing_to_a_decoder_block() -> None:
    block, x, prototypes = guided(), random(2, 15, WIDTH), random(2, 5, WIDTH, seed=1)
    close(block(x, prototypes[:, [4, 2, 0, 1, 3]]), block(x, prototypes))


@torch.no_grad()
def test_prototypes_given_twice_double_the_attention_output() -> None:
    block, x, prototypes = guided(), random(2, 15, WIDTH), random(2, 5, WIDTH, seed=1)
    silence(block.mlp)
    bias = block.attn.proj.bias
    once, twice = block(x, prototypes), block(x, torch.cat([prototypes, prototypes], dim=1))
    close(twice - bias, 2 * (once - bias))


@torch.no_grad()
def test_with_scale_zero_only_the_projections_bias_is_left() -> None:
    block, x = guided(), random(2, 15, WIDTH)
    silence(block.mlp)
    block.scale.zero_()
    close(block(x, random(2, 5, WIDTH, seed=1)), block.attn.proj.bias.expand(2, 15, WIDTH))


@torch.no_grad()
def test_decoder_weights_lie_between_zero_and_the_heads_scale() -> None:
    block, prototypes = guided(), random(2, 5, WIDTH, seed=1)
    block.scale.copy_(torch.tensor([2.0, -0.5, 1.0]).view(3, 1, 1))
    weights = block.attention(random(2, 200, WIDTH), prototypes)
    assert weights.shape == (2, HEADS, 200, 5)
    assert (weights >= 0).all() and (weights == 0).any()
    highest = weights.amax(dim=(0, 2, 3))
    limits = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)
    assert (highest <= limits).all() and (highest > 0.8 * limits).all()


def test_queries_and_keys_of_length_zero_combine_nothing_and_stay_finite() -> None:
    block, x = guided(), random(1, 4, WIDTH).requires_grad_()
    prototypes = random(1, 5, WIDTH, seed=1).requires_grad_()
    silence(block.attn.q, block.attn.kv)
    assert not block.attention(x, prototypes).any()
    block(x, prototypes).sum().backward()
    for value in (x, prototypes, *block.parameters()):
        assert value.grad is not None and value.grad.isfinite().all()


@torch.no_grad()
def test_scaling_the_tokens_leaves_a_decoder_block_unchanged() -> None:
    block, x, prototypes = guided(), random(2, 15, WIDTH), random(2, 5, WIDTH, seed=1)
    expected = block.attention(x, prototypes)
    torch.testing.assert_close(block.attention(10 * x, prototypes), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(block(10 * x, prototypes), block(x, prototypes), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("prototypes", "rank"), [(1, 3), (2, 6), (3, 9)])
def test_tokens_span_no_more_directions_than_prototypes_times_heads(
    prototypes: int, rank: int
) -> None:
    block = guided(width=24)
    silence(block.mlp)
    y = block(random(1, 60, 24), random(1, prototypes, 24, seed=1))[0] - block.attn.proj.bias
    assert np.linalg.matrix_rank(y.numpy(), tol=1e-9) == rank


@torch.no_grad()
def test_a_decoder_block_has_no_residual_around_its_attention() -> None:
    block = guided()
    silence(block.mlp, block.attn.proj)
    assert not block(random(2, 15, WIDTH), random(2, 5, WIDTH, seed=1)).any()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"bare": True}, {"similarity": "dot"}, {"skip": "input"}],
    ids=str,
)
def test_a_decoder_block_equals_the_equations_written_out_slowly(
    options: Mapping[str, object],
) -> None:
    """The block projects the prototypes' values; here the tokens are projected, as published."""
    network = build(WIDTH, HEADS, **options)
    x, prototypes = random(2, 15, WIDTH), random(2, 6, WIDTH, seed=1)
    slow = Slow(network, HEADS)
    block = network.decoder[2]
    found = block(x, prototypes)
    for k in range(2):
        expected = slow.block("decoder.2", x[k].numpy(), prototypes[k].numpy())
        np.testing.assert_allclose(found[k].numpy(), expected, rtol=1e-9, atol=1e-9)
        weights = slow.weights("decoder.2", x[k].numpy(), prototypes[k].numpy())
        found_weights = block.attention(x, prototypes)[k].numpy()
        np.testing.assert_allclose(found_weights, weights, rtol=1e-9, atol=1e-9)


# ---- extractor ----------------------------------------------------------------------------------


def extractor(**options: object) -> Extractor:
    module = Extractor(WIDTH, HEADS, InpFormerOptions(**options)).double()
    liven(module)
    return module


@torch.no_grad()
def test_an_extractor_that_reads_nothing_returns_its_tokens() -> None:
    module = extractor()
    silence(module.attn.proj, module.mlp)
    close(module(random(2, 15, WIDTH)), module.tokens.expand(2, -1, -1))


@torch.no_grad()
def test_prototypes_do_not_depend_on_the_order_of_image_tokens_but_on_the_image() -> None:
    module, features = extractor(), random(2, 15, WIDTH)
    order = torch.from_numpy(np.random.default_rng(0).permutation(15))
    close(module(features[:, order]), module(features))
    assert (module(features)[0] - module(features)[1]).abs().max() > 0.01


@torch.no_grad()
def test_attention_over_image_tokens_sums_to_one() -> None:
    """Of equal tokens, any number is read as one."""
    module, one = extractor(), random(2, 1, WIDTH)
    close(module(one.expand(-1, 17, -1)), module(one))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bare": True}, {"prototypes": 1}], ids=str)
def test_the_extractor_equals_the_equations_written_out_slowly(
    options: Mapping[str, object],
) -> None:
    network, features = build(WIDTH, HEADS, **options), random(2, 15, WIDTH)
    slow = Slow(network, HEADS)
    found = network.extractor(features)
    assert found.shape == (2, network.options.prototypes, WIDTH)
    for k in range(2):
        expected = slow.prototypes(features[k].numpy())
        np.testing.assert_allclose(found[k].numpy(), expected, rtol=1e-9, atol=1e-9)


# ---- wiring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 8])
def test_tokens_are_the_mean_of_the_eight_taps_whatever_the_groups(groups: int) -> None:
    taps = [random(2, WIDTH, 3, 4, seed=k) for k in range(8)]
    network = build(WIDTH, HEADS, groups=groups)
    expected = np.mean([tap.numpy() for tap in taps], axis=0).reshape(2, WIDTH, 12)
    found = network.fuse(group_means(taps, groups))
    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 2, 1), rtol=1e-12, atol=1e-12)
    network = build(WIDTH, HEADS, groups=groups, fusion="sum")
    close(network.fuse(group_means(taps, groups)), 8 * found)


class Constant(nn.Module):
    """Stands in for a decoder block: the same output whatever comes in."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.output


def test_the_first_group_is_the_mean_of_the_last_four_blocks() -> None:
    network = build(WIDTH, HEADS)
    ones = torch.ones(1, 6, WIDTH, dtype=torch.float64)

    def groups(values: list[float]) -> list[float]:
        network.decoder = nn.ModuleList(Constant(value * ones) for value in values)
        maps = network.decode(random(1, 6, WIDTH), random(1, 6, WIDTH), (2, 3))
        assert all(found.shape == (1, WIDTH, 2, 3) for found in maps)
        assert all((found == found.flatten()[0]).all() for found in maps)
        return [found.flatten()[0].item() for found in maps]

    assert groups([1, 2, 3, 4, 5, 6, 7, 8]) == [6.5, 2.5]
    for k in range(8):  # a change of one block moves its own group and no other
        values = [1.0, 2, 3, 4, 5, 6, 7, 8]
        values[k] += 4
        assert groups(values) == ([7.5, 2.5] if k >= 4 else [6.5, 3.5])


def test_the_last_blocks_reconstruct_the_shallow_taps() -> None:
    shallow, deep = random(2, WIDTH, 2, 3), random(2, WIDTH, 2, 3, seed=1)
    network = build(WIDTH, HEADS)
    tokens = [tap.flatten(2).transpose(1, 2) for tap in (shallow, deep)]
    network.decoder = nn.ModuleList(Constant(tokens[k < 4]) for k in range(8))
    assert network([shallow, deep])["soft_mining"].item() == pytest.approx(0, abs=1e-6)
    assert network([deep, shallow])["soft_mining"].item() > 0.1


def test_coherence_trains_the_extractor_only_and_soft_mining_trains_all() -> None:
    network, targets = build(WIDTH, HEADS), [random(2, WIDTH, 3, 4, seed=k) for k in range(2)]
    network(targets)["coherence"].backward()
    for name, parameter in network.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == name.startswith("extractor."), name
    network.zero_grad()
    network(targets)["soft_mining"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for name in ("extractor.tokens", "bottleneck.fc1.weight", "decoder.0.scale"):
        assert network.get_parameter(name).grad.abs().max() > 1e-6, name


def test_the_loss_is_soft_mining_plus_the_weighted_coherence() -> None:
    targets = [random(2, WIDTH, 3, 4, seed=k) for k in range(2)]
    for weight in (0.0, 0.2, 1.5):
        losses = build(WIDTH, HEADS, coherence=weight)(targets)
        expected = losses["soft_mining"].item() + weight * losses["coherence"].item()
        assert losses["loss"].item() == pytest.approx(expected, rel=1e-6)


PAPER = {"fusion": "sum", "similarity": "dot", "skip": "input", "bare": True, "groups": 8}
VARIANTS: list[tuple[dict[str, object], int]] = [
    ({}, 3),
    ({"prototypes": 4, "gamma": 0.0, "coherence": 1.0}, 3),
    ({"decoder_blocks": 4}, 3),
    ({"fusion": "sum"}, 3),
    ({"similarity": "dot"}, 3),
    ({"skip": "input"}, 3),
    ({"bare": True}, 3),
    ({}, 1),
    ({"groups": 8}, 3),
    (PAPER, 1),
    ({"prototypes": 0}, 3),
    ({"prototypes": 0, "bare": True}, 3),
]


@torch.no_grad()
@pytest.mark.parametrize(("options", "heads"), VARIANTS, ids=str)
def test_the_network_equals_the_equations_written_out_slowly_in_every_variant(
    options: Mapping[str, object], heads: int
) -> None:
    network = build(WIDTH, heads, **options)
    taps = [0.5 * random(2, WIDTH, 3, 4, seed=k) for k in range(8)]
    targets = group_means(taps, network.options.groups)
    slow = Slow(network, heads)
    images = [[tap[k].numpy() for tap in taps] for k in range(2)]
    found = network.reconstruct(targets)
    for k, image in enumerate(images):
        expected = slow.rebuilt(image)
        assert len(found) == len(expected) == network.options.groups
        for group, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            limit = 1e-8 * abs(theirs).max()
            np.testing.assert_allclose(
                ours[k].numpy(), theirs, rtol=1e-8, atol=limit, err_msg=f"group {group}"
            )
    losses = {name: value.item() for name, value in network(targets).items()}
    assert losses == pytest.approx(slow.losses(images), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"fusion": "sum"}, {"similarity": "dot"}, {"skip": "input"}, {"bare": True}],
    ids=str,
)
def test_each_variant_is_another_function_of_the_same_weights(
    options: Mapping[str, object],
) -> None:
    plain, changed = build(WIDTH, HEADS), build(WIDTH, HEADS, **options)
    changed.load_state_dict(
        {name: plain.state_dict()[name] for name in changed.state_dict()}, strict=True
    )
    targets = [random(2, WIDTH, 3, 4, seed=k) for k in range(2)]
    gaps = [
        (a - b).abs().max().item()
        for a, b in zip(plain.reconstruct(targets), changed.reconstruct(targets), strict=True)
    ]
    assert min(gaps) > 1e-2


# ---- sizes and first weights --------------------------------------------------------------------


def count(width: int, heads: int, **options: object) -> int:
    with torch.device("meta"):  # shapes without numbers
        network = InpNetwork(width, heads, InpFormerOptions(**options), 0)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def test_trainable_parameters_are_as_many_as_the_official_networks() -> None:
    assert count(768, 12) == 68_517_984
    assert round(count(384, 6) / 1e6, 2) == 17.15
    assert round(count(1024, 16) / 1e6, 2) == 121.77
    assert count(768, 12, prototypes=7) == 68_517_984 + 768


def test_first_weights_are_a_cut_normal_distribution_and_biases_zero() -> None:
    network = InpNetwork(96, 4, InpFormerOptions(prototypes=64), 0)
    # Standard deviation of a standard normal variable cut at three.
    spread = sqrt(1 - 2 * 3 * exp(-4.5) / sqrt(2 * pi) / erf(3 / sqrt(2)))
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.abs().max() <= 0.03, name
            assert module.weight.std().item() == pytest.approx(0.01 * spread, rel=0.04), name
            assert abs(module.weight.mean().item()) < 5e-4, name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
            assert module.eps == 1e-8, name
        if isinstance(module, GuidedBlock):
            assert module.scale.shape == (4, 1, 1) and (module.scale == 1).all(), name
    every = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Linear)])
    assert every.abs().max() > 0.0295
    assert every.std().item() == pytest.approx(0.01 * spread, rel=0.005)
    tokens = network.extractor.tokens
    assert tokens.mean().item() == pytest.approx(0, abs=0.06)
    assert tokens.std().item() == pytest.approx(1, abs=0.05)
    assert tokens.abs().max() > 3  # not cut


@pytest.mark.parametrize("prototypes", [0, 6])
def test_first_weights_depend_on_the_seed_alone(prototypes: int) -> None:
    options = InpFormerOptions(prototypes=prototypes)
    torch.manual_seed(1)
    first = InpNetwork(WIDTH, HEADS, options, 5).state_dict()
    torch.manual_seed(2)
    second = InpNetwork(WIDTH, HEADS, options, 5).state_dict()
    other = InpNetwork(WIDTH, HEADS, options, 6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in first:
        if first[name].ndim == 2:
            assert not torch.equal(first[name], other[name]), name


def test_building_a_network_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    InpNetwork(WIDTH, HEADS, InpFormerOptions(), 5)
    assert torch.equal(torch.get_rng_state(), before)
