"""OneNIP's and UniAD's encoder and decoders, against a slow second form and known answers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalyst.methods.prompt_decoders import (
    Attention,
    BidirectionalDecoder,
    BidirectionalLayer,
    EncoderLayer,
    Mlp,
    PositionCode,
    QueryDecoder,
    QueryLayer,
    neighbour_mask,
)
from slow_inp_former import liven, random

WIDTH, HEADS, HIDDEN, DEPTH = 16, 2, 24, 2
SIZE = (WIDTH, HEADS, HIDDEN, 0.1)
GRIDS = [(5, 5), (8, 6), (1, 4)]


class Slow:
    """Layers and decoders of one image in NumPy loops; of the module only weights are read.

    Tokens are ``[L, d]``; ``seen`` ``[L, L]`` is True where a query may look.
    """

    def __init__(self, module: nn.Module, heads: int = HEADS) -> None:
        self.state = {k: v.detach().double().numpy() for k, v in module.state_dict().items()}
        self.heads = heads

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        standard = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return standard * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{name}.fall", np.maximum(self.linear(f"{name}.rise", x), 0))

    def attend(
        self, name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None
    ) -> np.ndarray:
        """A softmax over the keys that a query sees, and over no others, query by query."""
        name = f"{name}.attn"
        weights = np.split(self.state[f"{name}.in_proj_weight"], 3)
        biases = np.split(self.state[f"{name}.in_proj_bias"], 3)
        q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
        size = q.shape[1] // self.heads
        found = np.zeros_like(q)
        for head, i in product(range(self.heads), range(len(q))):
            part = slice(head * size, (head + 1) * size)
            keys = np.arange(len(k)) if seen is None else np.flatnonzero(seen[i])
            strength = np.exp(k[keys, part] @ q[i, part] / size**0.5)
            found[i, part] = strength / strength.sum() @ v[keys, part]
        return self.linear(f"{name}.out_proj", found)

    def encoder(
        self, at: str, x: np.ndarray, code: np.ndarray, seen: np.ndarray | None
    ) -> np.ndarray:
        x = self.norm(f"{at}norm1", x + self.attend(f"{at}attention", x + code, x + code, x, seen))
        return self.norm(f"{at}norm2", x + self.mlp(f"{at}mlp", x))

    def both_ways(
        self, at: str, p: np.ndarray, x: np.ndarray, code: np.ndarray, seen: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The layer as it was meant (sheet 3.4)."""
        p, _ = self.first_steps(at, p, x, code, seen)
        b = self.attend(f"{at}target_reads", x + code, p + code, p, seen)
        return p, self.norm(f"{at}norm3", x + b)

    def legacy(
        self, at: str, p: np.ndarray, x: np.ndarray, code: np.ndarray, seen: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The layer as it was before the fix (sheet 3.5)."""
        p, m = self.first_steps(at, p, x, code, seen)
        return p, self.norm(f"{at}norm3", x + m)

    def first_steps(
        self, at: str, p: np.ndarray, x: np.ndarray, code: np.ndarray, seen: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        a = self.attend(f"{at}prompt_reads", p + code, x + code, x, seen)
        p = self.norm(f"{at}norm1", p + a)
        m = self.mlp(f"{at}mlp", p)
        return self.norm(f"{at}norm2", p + m), m

    def bidirectional(
        self,
        at: str,
        x: np.ndarray,
        p: np.ndarray,
        code: np.ndarray,
        seen: np.ndarray | None,
        depth: int = DEPTH,
        legacy: bool = False,
    ) -> np.ndarray:
        for n in range(depth):
            step = self.legacy if legacy else self.both_ways
            p, x = step(f"{at}layers.{n}.", p, x, code, seen)
        return self.norm(f"{at}norm", p + self.attend(f"{at}last", p + code, x + code, x, None))

    def query(
        self, at: str, x: np.ndarray, asked: list[np.ndarray], code: np.ndarray, seen: object
    ) -> np.ndarray:
        """UniAD's decoder, ``asked`` in each layer."""
        o = x
        for n, t in enumerate(asked):
            layer = f"{at}layers.{n}."
            found = self.attend(f"{layer}ask_memory", t + code, x + code, x, seen)
            t = self.norm(f"{layer}norm1", t + found)
            found = self.attend(f"{layer}ask_output", t + code, o + code, o, seen)
            t = self.norm(f"{layer}norm2", t + found)
            o = self.norm(f"{layer}norm3", t + self.mlp(f"{layer}mlp", t))
        return self.norm(f"{at}norm", o)


def visible(grid: tuple[int, int]) -> np.ndarray:
    """Which tokens see each other by sheet 3.2, window (h // 2, w // 2), pair by pair."""
    reach = [side // 2 // 2 for side in grid]
    places = list(product(range(grid[0]), range(grid[1])))
    far = [[abs(a - c) > reach[0] or abs(b - d) > reach[1] for c, d in places] for a, b in places]
    return np.array(far)


def build(made: nn.Module) -> nn.Module:
    """The module in float64 with lively weights, in eval mode."""
    liven(made.double())
    return made.eval()


def tokens(grid: tuple[int, int], seed: int = 0) -> Tensor:
    return random(2, grid[0] * grid[1], WIDTH, seed=seed)


def same(found: Tensor, expected: list[np.ndarray]) -> None:
    assert found.std() > 0.1
    np.testing.assert_allclose(found.detach().numpy(), np.stack(expected), rtol=0, atol=1e-10)


def number(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- neighbour mask -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "masked", "interior", "corner"),
    [(14, 7396, 49, 16), (16, 15376, 81, 25), (20, 36100, 121, 36)],
)
def test_the_mask_hides_as_many_pairs_as_the_official_one(
    side: int, masked: int, interior: int, corner: int
) -> None:
    mask = neighbour_mask((side, side))
    assert mask is not None and mask.shape == (side**2, side**2) and mask.dtype == torch.float32
    hidden = mask == -torch.inf
    assert int(hidden.sum()) == masked and not mask[~hidden].any()
    counts = hidden.sum(1).unflatten(0, (side, side))
    assert counts[side // 2, side // 2] == interior == counts.max()
    assert counts[0, 0] == counts[-1, 0] == counts[-1, -1] == corner == counts.min()


@pytest.mark.parametrize("grid", [*product(range(1, 7), repeat=2), (9, 4), (3, 12), (14, 8)])
def test_the_mask_is_the_window_written_out_pair_by_pair(grid: tuple[int, int]) -> None:
    if grid != (1, 1):
        expected = np.where(visible(grid), 0, -np.inf)
        np.testing.assert_array_equal(neighbour_mask(grid), expected)


def test_every_patch_of_every_grid_sees_others_and_never_itself() -> None:
    assert neighbour_mask((1, 1)) is None
    for grid in product(range(1, 21), repeat=2):
        if grid == (1, 1):
            continue
        mask = neighbour_mask(grid)
        assert mask is not None and torch.equal(mask, mask.T), grid
        assert (mask.diagonal() == -torch.inf).all() and (mask.amax(1) == 0).all(), grid


# ---- position code ------------------------------------------------------------------------------


def test_the_code_is_the_columns_half_then_the_rows() -> None:
    code = PositionCode(5, WIDTH)
    found = code((5, 5))
    for i, j in product(range(5), range(5)):
        assert torch.equal(found[5 * i + j], torch.cat([code.column[j], code.row[i]]))
    assert number(PositionCode(14, 256)) == 3584


@pytest.mark.parametrize("grid", [(8, 6), (3, 5), (5, 9), (2, 1), (1, 7)])
def test_another_grid_takes_values_between_those_of_the_table(grid: tuple[int, int]) -> None:
    code = PositionCode(5, WIDTH).double()
    found = code(grid).detach().numpy().reshape(*grid, WIDTH)
    half = WIDTH // 2
    for axis, table, part in (
        (0, code.row, found[..., half:]),
        (1, code.column, found[..., :half]),
    ):
        lines = np.moveaxis(part, axis, 0)
        assert (lines == lines[:, :1]).all()  # nothing but the row, or the column, matters
        at = np.linspace(0, 4, grid[axis])
        values = table.detach().numpy()
        expected = np.stack([np.interp(at, range(5), channel) for channel in values.T], axis=1)
        np.testing.assert_allclose(lines[:, 0], expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(lines[0, 0], values[0])
        if grid[axis] > 1:
            np.testing.assert_array_equal(lines[-1, 0], values[-1])


def test_the_code_starts_uniform_between_0_and_1_and_learns_on_any_grid() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        code = PositionCode(64, 64)
    for table in (code.row.detach(), code.column.detach()):
        assert table.min() >= 0 and table.max() < 1
        assert table.std() == pytest.approx(12**-0.5, rel=0.03)
    code((70, 9)).square().sum().backward()
    assert code.row.grad.all() and code.column.grad.any()


# ---- layers and decoders, written out twice -----------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_layers_equal_their_slow_form(grid: tuple[int, int], masked: bool) -> None:
    mask, seen = (neighbour_mask(grid), visible(grid)) if masked else (None, None)
    x, p, code = tokens(grid), tokens(grid, 1), random(grid[0] * grid[1], WIDTH, seed=2)
    each = [(a.numpy(), b.numpy(), code.numpy(), seen) for a, b in zip(p, x, strict=True)]
    layer = build(EncoderLayer(*SIZE))
    same(layer(x, code, mask), [Slow(layer).encoder("", *given[1:]) for given in each])
    for legacy in (False, True):
        layer = build(BidirectionalLayer(*SIZE, legacy))
        slow = Slow(layer)
        expected = [(slow.legacy if legacy else slow.both_ways)("", *given) for given in each]
        for found, part in zip(layer(p, x, code, mask), zip(*expected, strict=True), strict=True):
            same(found, list(part))


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_decoders_equal_their_slow_form(grid: tuple[int, int], masked: bool) -> None:
    mask, seen = (neighbour_mask(grid), visible(grid)) if masked else (None, None)
    x, p, code = tokens(grid), tokens(grid, 1), random(grid[0] * grid[1], WIDTH, seed=2)
    each = list(zip(x.numpy(), p.numpy(), strict=True))
    for legacy in (False, True):
        decoder = build(BidirectionalDecoder(DEPTH, *SIZE, legacy))
        slow, rest = Slow(decoder), (code.numpy(), seen, DEPTH, legacy)
        same(decoder(x, p, grid, code, mask), [slow.bidirectional("", *one, *rest) for one in each])
    decoder = build(QueryDecoder(DEPTH, *SIZE, static=True, side=5))
    slow = Slow(decoder)
    expected = [slow.query("", a, [b] * DEPTH, code.numpy(), seen) for a, b in each]
    same(decoder(x, p, grid, code, mask), expected)
    decoder = build(QueryDecoder(DEPTH, *SIZE, static=False, side=5))
    with torch.no_grad():
        decoder.queries.copy_(random(DEPTH, WIDTH, 5, 5, seed=3))
    asked = [decoder._queries(n, grid)[0].numpy() for n in range(DEPTH)]
    expected = [Slow(decoder).query("", a, asked, code.numpy(), seen) for a, _ in each]
    same(decoder(x, p, grid, code, mask), expected)


# ---- what reaches what --------------------------------------------------------------------------


def reach(found: Tensor, source: Tensor) -> np.ndarray:
    """Whether any gradient of output token i reaches source token j, bool ``[L, L]``."""
    rows = []
    for i in range(found.shape[1]):
        (grad,) = torch.autograd.grad(
            (found[0, i] * random(WIDTH)).sum(), source, retain_graph=True
        )
        rows.append((grad[0] != 0).any(1))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("grid", [(5, 5), (8, 6), (1, 4), (2, 3)])
def test_masked_attention_has_exactly_no_gradient_to_the_neighbourhood(
    grid: tuple[int, int],
) -> None:
    mask, seen = neighbour_mask(grid), visible(grid)
    x, p, code = tokens(grid)[:1].requires_grad_(), tokens(grid, 1)[:1], tokens(grid, 2)[0]
    attention = build(Attention(WIDTH, HEADS, 0.0))
    np.testing.assert_array_equal(reach(attention(p + code, x + code, x, mask), x), seen)
    # Its own query is the only way by which a patch reaches its own self-attention.
    found = reach(attention(x + code, x + code, x, mask), x)
    np.testing.assert_array_equal(found, seen | np.eye(len(seen), dtype=bool))
    assert reach(attention(p + code, x + code, x, None), x).all()


def test_a_layers_prompt_sees_nothing_of_its_place_and_the_last_attention_all() -> None:
    grid = (5, 6)
    mask, seen = neighbour_mask(grid), visible(grid)
    x, p, code = tokens(grid)[:1].requires_grad_(), tokens(grid, 1)[:1], tokens(grid, 2)[0]
    layer = build(BidirectionalLayer(*SIZE, False))
    np.testing.assert_array_equal(reach(layer(p, x, code, mask)[0], x), seen)
    decoder = build(BidirectionalDecoder(1, *SIZE))
    assert reach(decoder(x, p, grid, code, mask), x).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_only_the_legacy_form_leaves_parameters_without_gradient(legacy: bool) -> None:
    decoder = BidirectionalDecoder(4, 256, 8, 32, 0.1, legacy)
    x, p = torch.randn(2, 1, 12, 256, generator=torch.Generator().manual_seed(0))
    decoder(x, p, (3, 4), x[0], neighbour_mask((3, 4))).square().sum().backward()
    dead = {n: v for n, v in decoder.named_parameters() if v.grad is None or not v.grad.any()}
    assert all(".target_reads." in name for name in dead)
    assert sum(value.numel() for value in dead.values()) == (1_052_672 if legacy else 0)


@torch.no_grad()
def test_the_targets_own_attention_means_nothing_to_the_legacy_form() -> None:
    grid, mask = (4, 5), neighbour_mask((4, 5))
    x, p, code = tokens(grid), tokens(grid, 1), tokens(grid, 2)[0]
    for legacy in (False, True):
        decoder = build(BidirectionalDecoder(DEPTH, *SIZE, legacy))
        before = decoder(x, p, grid, code, mask)
        for layer in decoder.layers:
            liven(layer.target_reads, seed=7)
        after = decoder(x, p, grid, code, mask)
        assert torch.equal(before, after) == legacy


@torch.no_grad()
def test_without_attention_the_prompt_alone_comes_out() -> None:
    grid, mask = (4, 5), neighbour_mask((4, 5))
    p, code = tokens(grid, 1), tokens(grid, 2)[0]
    decoder = build(BidirectionalDecoder(1, *SIZE))
    for attention in (decoder.layers[0].prompt_reads, decoder.last):
        attention.attn.out_proj.weight.zero_()
        attention.attn.out_proj.bias.zero_()
    found = decoder(tokens(grid), p, grid, code, mask)
    layer = decoder.layers[0]
    p = layer.norm1(p)
    assert torch.equal(found, decoder.norm(layer.norm2(p + layer.mlp(p))))
    assert torch.equal(found, decoder(tokens(grid, 5), tokens(grid, 1), grid, code, mask))


# ---- UniAD's queries ----------------------------------------------------------------------------


def asked_by(decoder: QueryDecoder, grid: tuple[int, int], prompt: Tensor) -> list[Tensor]:
    """What each layer of a decoder is asked."""
    asked: list[Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    decoder(tokens(grid), prompt, grid, tokens(grid, 2)[0], neighbour_mask(grid))
    return asked


@torch.no_grad()
def test_each_layer_asks_anew_with_queries_of_its_own_that_start_as_copies() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = QueryDecoder(3, *SIZE, static=False, side=5).double().eval()
    queries = decoder.queries
    assert queries.shape == (3, WIDTH, 5, 5)
    assert torch.equal(queries[1], queries[0]) and torch.equal(queries[2], queries[0])
    assert queries[0].mean() == pytest.approx(0, abs=0.2)
    assert queries[0].std() == pytest.approx(1, abs=0.15)
    for n in range(3):
        queries[n] += n
    grid = (5, 5)
    asked = asked_by(decoder, grid, tokens(grid, 1))
    for n, given in enumerate(asked):
        assert given.shape == (1, 25, WIDTH)
        assert torch.equal(given[0, 5 * 3 + 2], queries[n, :, 3, 2])


@torch.no_grad()
def test_queries_of_another_grid_keep_their_corners_and_lines() -> None:
    decoder = QueryDecoder(1, *SIZE, static=False, side=4).double()
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    decoder.queries.copy_(2 * rows + 5 * columns)
    found = decoder._queries(0, (7, 6)).unflatten(1, (7, 6))[0]
    at = [torch.linspace(0, 3, side, dtype=torch.float64) for side in (7, 6)]
    expected = (2 * at[0][:, None] + 5 * at[1])[..., None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_static_form_asks_with_the_prompt_and_uniad_has_no_use_for_it() -> None:
    grid = (5, 4)
    prompt = tokens(grid, 1)
    static = build(QueryDecoder(3, *SIZE, static=True, side=5))
    assert static.queries is None
    assert all(torch.equal(given, prompt) for given in asked_by(static, grid, prompt))
    uniad = build(QueryDecoder(3, *SIZE, static=False, side=5))
    rest = (grid, tokens(grid, 2)[0], neighbour_mask(grid))
    found = [uniad(tokens(grid), p, *rest) for p in (prompt, tokens(grid, 9))]
    assert torch.equal(*found)
    found = [static(tokens(grid), p, *rest) for p in (prompt, tokens(grid, 9))]
    assert (found[0] - found[1]).abs().max() > 0.1


# ---- sizes and dropout --------------------------------------------------------------------------


def test_layers_have_as_many_parameters_as_the_official_ones() -> None:
    with torch.device("meta"):  # shapes without numbers
        size = (256, 8, 1024, 0.1)
        assert number(EncoderLayer(*size)) == 789_760
        assert number(BidirectionalLayer(*size, False)) == 1_053_440
        assert number(Attention(256, 8, 0.1)) == 263_168
        assert number(BidirectionalDecoder(4, *size)) == 4 * 1_053_440 + 263_168 + 512
        uniad = QueryDecoder(4, *size, static=False, side=14)
        assert number(uniad) == 4 * 1_103_616 + 512
        assert number(uniad.layers[0]) + 256 * 14 * 14 == 1_103_616


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "encoder", "bidirectional", "query"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_acts_in_training_only(kind: str, dropout: float) -> None:
    size, grid = (WIDTH, HEADS, HIDDEN, dropout), (5, 5)
    x, p, code = tokens(grid), tokens(grid, 1), tokens(grid, 2)[0]
    mask = neighbour_mask(grid)
    module, given = {
        "attention": (Attention(WIDTH, HEADS, dropout), (p, x, x, mask)),
        "encoder": (EncoderLayer(*size), (x, code, mask)),
        "bidirectional": (BidirectionalDecoder(1, *size), (x, p, grid, code, mask)),
        "query": (QueryDecoder(1, *size, False, 5), (x, p, grid, code, mask)),
    }[kind]
    build(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settled = module(*given)
        assert torch.equal(module(*given), settled)
        gaps = [(module.train()(*given) - settled).abs().max() for _ in range(2)]
    assert all((gap > 0.01) == (dropout > 0) for gap in gaps)


def test_dropout_lies_inside_every_mlp_but_the_bidirectional_ones() -> None:
    layers = (EncoderLayer(*SIZE), QueryLayer(*SIZE), BidirectionalLayer(*SIZE, False))
    assert [layer.mlp.drop.p for layer in layers] == [0.1, 0.1, 0.0]
    mlp, x = Mlp(WIDTH, HIDDEN, 0.5), torch.randn(9, WIDTH)
    with torch.random.fork_rng():
        assert torch.equal(mlp.eval()(x), mlp(x))
        assert not torch.equal(mlp.train()(x), mlp(x))
