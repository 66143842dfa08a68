"""CLIP's two towers opened up: against open_clip's own, a slow form, the authors' V-V values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf
from torch import Tensor
from torch.nn import functional

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.attention import ClipAttention, write_out
from anomalyst.features.backbones import REGISTRY, find_backbone
from anomalyst.features.clip import (
    ClipText,
    ClipTower,
    local_path,
    overwrite,
    patch_map,
    run_blocks,
)
from anomalyst.features.extractor import Backbone
from anomalyst.features.libraries import make_clip
from anomalyst.features.weights import add, pack, store_path
from conftest import CLIP, DEEP, SHARED, TINY_CLIP, blot, texture

open_clip = pytest.importorskip("open_clip")

HEADS = {"visual.": 4, "": 3}
BLOCKS = 4
Make = Callable[..., str]


class Slow:
    """A CLIP written out once more in NumPy's float64, in loops over images and heads.

    ``tower`` is ``visual.`` or, for the texts', empty.
    """

    def __init__(self, state: Mapping[str, Tensor], quick: bool = False) -> None:
        self.state = {name: value.double().numpy() for name, value in state.items()}
        self.quick = quick

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def attention(
        self, name: str, x: np.ndarray, heads: int, causal: bool = False, values: bool = False
    ) -> np.ndarray:
        """What a block's attention adds; with ``values`` value-value attention."""
        x = self.norm(f"{name}.ln_1", x)
        joint = x @ self.state[f"{name}.attn.in_proj_weight"].T
        query, key, value = np.split(joint + self.state[f"{name}.attn.in_proj_bias"], 3, axis=1)
        if values:
            query = key = value
        out = np.zeros_like(x)
        for columns in np.split(np.arange(x.shape[1]), heads):
            logits = query[:, columns] @ key[:, columns].T / np.sqrt(len(columns))
            if causal:
                logits[np.triu_indices(len(x), 1)] = -np.inf
            weight = np.exp(logits - logits.max(1, keepdims=True))
            out[:, columns] = weight / weight.sum(1, keepdims=True) @ value[:, columns]
        out = self.linear(f"{name}.attn.out_proj", out)
        return out * self.state.get(f"{name}.ls_1.gamma", 1)

    def block(self, tower: str, number: int, x: np.ndarray) -> np.ndarray:
        name = f"{tower}transformer.resblocks.{number}"
        x = x + self.attention(name, x, HEADS[tower], causal=not tower)
        wide = self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x))
        wide *= 1 / (1 + np.exp(-1.702 * wide)) if self.quick else (1 + erf(wide / np.sqrt(2))) / 2
        narrow = self.linear(f"{name}.mlp.c_proj", wide)
        return x + narrow * self.state.get(f"{name}.ls_2.gamma", 1)

    def layers(
        self, tower: str, x: np.ndarray, prompts: Mapping[int, np.ndarray], first: int
    ) -> list[np.ndarray]:
        """Tokens ``[L, C]`` behind every block; prompts overwrite rows from ``first`` on."""
        found = []
        for number in range(BLOCKS):
            if number in prompts:
                x = x.copy()
                for k, row in enumerate(prompts[number]):
                    x[first + k] = row
            x = self.block(tower, number, x)
            found.append(x)
        return found

    def embed(self, image: np.ndarray) -> np.ndarray:
        """An image ``[3, H, W]`` as the tokens that enter the first block; the grid learned."""
        kernel = self.state["visual.conv1.weight"]
        side = kernel.shape[2]
        rows = [self.state["visual.class_embedding"]]
        for top in range(0, image.shape[1], side):
            for left in range(0, image.shape[2], side):
                piece = image[:, top : top + side, left : left + side]
                rows.append((kernel * piece).sum((1, 2, 3)))
        return self.norm("visual.ln_pre", rows + self.state["visual.positional_embedding"])

    def project(self, tokens: np.ndarray) -> np.ndarray:
        return self.norm("visual.ln_post", tokens) @ self.state["visual.proj"]

    def text(self, embedded: np.ndarray, end: int, prompts: Mapping[int, np.ndarray]) -> np.ndarray:
        """Embeddings ``[L, C]`` as the text ``[D]``, not normalised."""
        placed = embedded + self.state["positional_embedding"][: len(embedded)]
        tokens = self.norm("ln_final", self.layers("", placed, prompts, 1)[-1])
        return tokens[end] @ self.state["text_projection"]


def lively(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of one dimension moved and the rest of such a size that all count."""
    generator = torch.Generator().manual_seed(5)
    moved = {}
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        grown = {"token_embedding.weight": 20, "positional_embedding": 20}.get(name, 1)
        moved[name] = value + 0.2 * noise if value.ndim == 1 else grown * value
    return moved


@pytest.fixture(scope="module")
def state(clip_weights: str) -> dict[str, Tensor]:
    return lively(load_file(clip_weights.removeprefix("file:")))


@pytest.fixture(scope="module")
def tower(state: dict[str, Tensor]) -> ClipTower:
    return Backbone.from_state(CLIP, (0, 2), state, ClipTower).tower


@pytest.fixture(scope="module")
def stock(state: dict[str, Tensor]) -> torch.nn.Module:
    """open_clip's own model of the same weights."""
    model = open_clip.CLIP(**TINY_CLIP)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.fixture
def architecture(clip_weights: str, tmp_path: Path) -> Make:
    """Make a config of the tiny CLIP's known under a name, parts of it replaced."""

    def make(name: str, **changes: object) -> str:
        config = json.loads(json.dumps(TINY_CLIP))
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        return name

    return make


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor | np.ndarray, expected: Tensor | np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=atol)


# ---- images -------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_prompts_the_image_tower_is_open_clips(
    tower: ClipTower, stock: torch.nn.Module, state: dict[str, Tensor]
) -> None:
    images, slow = numbers(2, 3, 80, 80), Slow(state)
    tokens, grid = tower.embed(images)
    assert grid == (5, 5) and tokens.shape == (2, 26, 64)
    projected = tower.project(run_blocks(tower.blocks, tokens))
    assert projected.shape == (2, 26, 48) and tower.joint_width == 48
    close(projected[:, 0], stock.encode_image(images))
    for found, image in zip(projected, images.double().numpy(), strict=True):
        close(found, slow.project(slow.layers("visual.", slow.embed(image), {}, 0)[-1]))


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 96), (80, 112), (16, 16)])
def test_so_it_is_on_any_grid(
    tower: ClipTower, state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    """Against a network made for that size, its position table stretched to it."""
    vision = {**TINY_CLIP["vision_cfg"], "image_size": list(size)}
    other, grid = open_clip.CLIP(**{**TINY_CLIP, "vision_cfg": vision}), [s // 16 for s in size]
    name = "visual.positional_embedding"
    table = state[name][1:].T.reshape(1, 64, 5, 5)
    table = functional.interpolate(table, grid, mode="bicubic").flatten(2)[0].T
    other.load_state_dict({**state, name: torch.cat([state[name][:1], table])})
    images = numbers(2, 3, *size)
    before = tower.model.state_dict()[name].clone()
    tokens, found = tower.embed(images)
    assert list(found) == grid
    close(tower.project(run_blocks(tower.blocks, tokens))[:, 0], other.eval().encode_image(images))
    assert torch.equal(tower.model.state_dict()[name], before)


def test_images_pass_the_tower_as_they_are(tower: ClipTower) -> None:
    images = numbers(2, 3, 32, 48)
    (found,) = tower(images)
    assert torch.equal(found, images)


@torch.no_grad()
def test_any_tokens_are_projected_alike(tower: ClipTower, state: dict[str, Tensor]) -> None:
    tokens = numbers(2, 3, 7, 64)
    found = tower.project(tokens)
    assert found.shape == (2, 3, 7, 48)
    close(found[1, 2], Slow(state).project(tokens[1, 2].double().numpy()))


def test_a_patch_map_has_rows_of_patches_as_rows() -> None:
    tokens = numbers(2, 6, 5)
    found = patch_map(tokens, (2, 3))
    assert found.shape == (2, 5, 2, 3)
    for row in range(2):
        for column in range(3):
            assert torch.equal(found[:, :, row, column], tokens[:, 3 * row + column])


# ---- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True], ids=["shared", "each its own"])
def test_overwriting_leaves_the_other_rows(each: bool) -> None:
    tokens, rows = numbers(2, 9, 4), numbers(2, 3, 4, seed=1).double()
    before = tokens.clone()
    found = overwrite(tokens, 2, rows if each else rows[0])
    assert torch.equal(tokens, before) and found.dtype == tokens.dtype
    assert torch.equal(found[:, [0, 1, 5, 6, 7, 8]], tokens[:, [0, 1, 5, 6, 7, 8]])
    for k in range(2):
        assert torch.equal(found[k, 2:5], rows[k if each else 0].float())


@torch.no_grad()
@pytest.mark.parametrize("name", ["visual.", ""], ids=["images", "texts"])
@pytest.mark.parametrize("at", [(), (0, 1, 2), (1, 3), (0, 1, 2, 3)], ids=str)
def test_deep_prompts_overwrite_at_their_blocks_and_go_on_at_the_others(
    tower: ClipTower, state: dict[str, Tensor], name: str, at: Sequence[int]
) -> None:
    blocks = tower.blocks if name else tower.model.transformer.resblocks
    width, first = (64, 6) if name else (48, 1)
    tokens = numbers(2, 12, width, seed=9)
    prompts = {k: numbers(2, 3, width, seed=k) for k in at}
    if 1 in prompts:
        prompts[1] = prompts[1][0]  # one for all images
    entered: list[Tensor] = []
    left: list[Tensor] = [tokens]
    hooks = [block.register_forward_pre_hook(lambda _, x: entered.append(x[0])) for block in blocks]
    mask = None if name else torch.full((12, 12), -torch.inf).triu(1)
    found = run_blocks(blocks, tokens, prompts, first, mask, lambda _, x: left.append(x) or x)
    for hook in hooks:
        hook.remove()
    others = [k for k in range(12) if not first <= k < first + 3]
    for k in range(BLOCKS):
        assert torch.equal(entered[k][:, others], left[k][:, others])
        own = prompts[k].expand(2, -1, -1) if k in at else left[k][:, first : first + 3]
        assert torch.equal(entered[k][:, first : first + 3], own)
    slow = Slow(state)
    for b in range(2):
        own = {k: (v if v.ndim == 2 else v[b]).double().numpy() for k, v in prompts.items()}
        close(found[b], slow.layers(name, tokens[b].double().numpy(), own, first)[-1])


@torch.no_grad()
def test_what_a_hook_returns_goes_on(tower: ClipTower) -> None:
    tokens, seen = numbers(2, 7, 64), []

    def hook(number: int, tokens: Tensor) -> Tensor:
        seen.append(number)
        return tokens + 1 if number == 1 else tokens

    found = run_blocks(tower.blocks, tokens, hook=hook)
    expected = run_blocks(tower.blocks[2:], run_blocks(tower.blocks[:2], tokens) + 1)
    assert seen == [0, 1, 2, 3] and torch.equal(found, expected)


def test_gradients_pass_through_to_the_prompts_and_to_no_weight(tower: ClipTower) -> None:
    prompts = {k: numbers(2, 64, seed=k).requires_grad_() for k in (0, 2)}
    texts = {k: numbers(2, 48, seed=k).requires_grad_() for k in (0, 3)}
    tokens, _ = tower.embed(numbers(1, 3, 80, 80))
    run_blocks(tower.blocks, torch.cat([tokens, tokens[:, :2]], 1), prompts, 26)[
        :, 0
    ].sum().backward()
    ids = tower.text.tokenize(["x x x x metal nut."])
    found, _ = tower.text.encode(tower.text.embed(ids), ids.argmax(1), texts)
    found.sum().backward()
    for each in (*prompts.values(), *texts.values()):
        assert each.grad is not None and each.grad.abs().amin(1).gt(0).all()
    assert all(p.grad is None and not p.requires_grad for p in tower.model.parameters())


# ---- texts --------------------------------------------------------------------------------------

TEXTS = ["metal nut.", "abnormal metal nut.", "a photo of a printed circuit board", "x"]


@torch.no_grad()
def test_sentences_are_encoded_as_open_clip_encodes_them(
    tower: ClipTower, stock: torch.nn.Module, state: dict[str, Tensor]
) -> None:
    text = tower.text
    assert (text.context, text.width, text.layers) == (77, 48, 4)
    ids = text.tokenize(TEXTS)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-16-plus-240")(TEXTS))
    found, tokens = text.encode(text.embed(ids), ids.argmax(1))
    close(found, stock.encode_text(ids))
    slow = Slow(state)
    for k, row in enumerate(ids.tolist()):
        end = row.index(max(row))
        embedded = slow.state["token_embedding.weight"][row]
        close(found[k], slow.text(embedded, end, {}))
        close(tokens[k, end] @ state["text_projection"], found[k])


@torch.no_grad()
def test_slots_filled_by_what_stood_there_change_nothing(
    tower: ClipTower, stock: torch.nn.Module
) -> None:
    ids = tower.text.tokenize(["a photo of a metal nut.", "a photo of a abnormal metal nut."])
    embedded = tower.text.embed(ids)
    slots = tower.text.tokenize(["X X X X metal nut.", "X X X X abnormal metal nut."])
    filled = overwrite(tower.text.embed(slots), 1, embedded[0, 1:5])
    assert torch.equal(filled, embedded)
    found, _ = tower.text.encode(filled, slots.argmax(1))
    close(found, stock.encode_text(ids))


@torch.no_grad()
def test_nothing_behind_a_token_counts(tower: ClipTower) -> None:
    text = tower.text
    ids = text.tokenize(TEXTS)
    ends, embedded = ids.argmax(1), text.embed(ids)
    whole, tokens = text.encode(embedded, ends)
    cut = int(ends.max()) + 1
    assert cut < 12
    found, _ = text.encode(embedded[:, :cut], ends)
    close(found, whole, 1e-6)
    other = embedded.clone()
    other[:, cut:] = numbers(4, 77 - cut, 48, seed=1)
    close(text.encode(other, ends)[0], whole, 1e-6)
    for place in (1, 3):
        other = embedded.clone()
        other[:, place] += numbers(48, seed=2)
        _, moved = text.encode(other, ends)
        close(moved[:, :place], tokens[:, :place], 1e-6)
        assert (moved[:, place:] - tokens[:, place:]).abs().amax(2).gt(1e-4).all()


@pytest.mark.parametrize(
    ("words", "count"),
    [("metal nut", 2), ("transistor", 2), ("pipe fryum", 3), ("printed circuit board", 3)],
)
def test_the_end_token_stands_behind_the_words_and_one_further_for_abnormal(
    tower: ClipTower, words: str, count: int
) -> None:
    ids = tower.text.tokenize([words, f"abnormal {words}", f"X X X X {words}."])
    assert ids.argmax(1).tolist() == [count + 1, count + 2, count + 6]
    assert ids[1, 1] == 40934 and (ids[:, 0] == 49406).all() and (ids.amax(1) == 49407).all()


@torch.no_grad()
def test_a_text_too_long_is_refused_and_says_how_long_it_is(
    tower: ClipTower, stock: torch.nn.Module
) -> None:
    fits = "nut " * 74 + "bolt"
    ids = tower.text.tokenize([fits])
    assert ids.argmax(1).tolist() == [76]
    close(tower.text.encode(tower.text.embed(ids), ids.argmax(1))[0], stock.encode_text(ids))
    with pytest.raises(InputError, match=r"has 76 tokens, CLIP reads 75 at most") as error:
        tower.text.tokenize(["short", fits + " nut"])
    assert "\n" not in str(error.value)


def test_features_are_unit_vectors_each_computed_once(
    tower: ClipTower, stock: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ClipText(tower.model, open_clip.get_tokenizer("ViT-B-16-plus-240"))
    counts: list[int] = []
    encode = text.encode
    monkeypatch.setattr(text, "encode", lambda x, *more: counts.append(len(x)) or encode(x, *more))
    text.vectors(TEXTS, batch=3)
    found = text.features([*TEXTS, TEXTS[1]])
    assert counts == [3, 1] and not found.requires_grad
    expected = stock.encode_text(text.tokenize(TEXTS)).double().numpy()
    expected /= np.sqrt((expected**2).sum(1, keepdims=True))
    close(found, expected[[0, 1, 2, 3, 1]])
    again = text.features([TEXTS[2], "new", TEXTS[0]])
    assert counts == [3, 1, 1] and torch.equal(again[[0, 2]], found[[2, 0]])


# ---- value-value attention ----------------------------------------------------------------------


class Authors:
    """Values of IIPAD's own code, and its tower's weights in ours."""

    def __init__(self, make: Make) -> None:
        path = SHARED / "golden" / "iipad_vv.npz"
        if not path.is_file():
            pytest.skip(f"the authors' values are not here ({path})")
        with np.load(path) as values:
            self.values = {k: torch.from_numpy(values[k]) for k in values.files}
        vision = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 6, "head_width": 8}
        name = make("vv-clip", embed_dim=16, vision_cfg=vision, quick_gelu=True)
        visual = {
            k.replace("param/", "visual."): v for k, v in self.values.items() if "param/" in k
        }
        with torch.random.fork_rng():
            model = open_clip.CLIP(**{**TINY_CLIP, "embed_dim": 16})
        texts = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
        backbone = Backbone.from_state(f"open_clip:{name}", (0,), visual | texts, ClipTower)
        self.tower = backbone.tower

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


@torch.no_grad()
def test_both_streams_are_the_authors(architecture: Make) -> None:
    theirs = Authors(architecture)
    tokens, grid = theirs.tower.embed(theirs["image"])
    assert grid == (4, 4)
    plain: list[Tensor] = []
    run_blocks(theirs.tower.blocks, tokens, hook=lambda _, x: plain.append(x) or x)
    streams = list(local_path(theirs.tower.blocks, tokens, 3))
    assert len(plain) == len(streams) == 6
    for k in range(6):
        close(plain[k], theirs[f"plain/residual_stream_{k + 1}"])
        close(streams[k][0], theirs[f"plain/residual_stream_{k + 1}"])
        if k < 3:
            assert torch.equal(streams[k][0], streams[k][1])
        else:
            close(streams[k][0], theirs[f"vv/layer_{k + 1}_original_stream"])
            close(theirs.tower.project(streams[k][1]), theirs[f"vv/layer_{k + 1}_projected"])
    cls = streams[-1][0][:, 0] @ theirs.tower.model.visual.proj
    close(cls, theirs["vv/cls_unnormalised"])


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_the_local_stream_adds_up_value_value_attention_of_the_original(
    tower: ClipTower, state: dict[str, Tensor], start: int
) -> None:
    tokens, slow = numbers(2, 10, 64), Slow(state)
    found = list(local_path(tower.blocks, tokens, start))
    for b in range(2):
        original = local = tokens[b].double().numpy()
        for k in range(BLOCKS):
            name = f"visual.transformer.resblocks.{k}"
            local = local + slow.attention(name, original, 4, values=True)
            original = slow.block("visual.", k, original)
            local = original if k < start else local
            close(found[k][0][b], original)
            close(found[k][1][b], local)
    for first in range(BLOCKS):  # read only now: no later block may have changed an earlier one
        for second in range(first):
            assert not torch.equal(found[first][1], found[second][1])


@torch.no_grad()
def test_with_equal_queries_keys_and_values_both_attentions_are_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stack = open_clip.transformer.Transformer(64, 2, 4, ls_init_value=0.3).eval()
    blocks = stack.resblocks
    write_out(blocks)
    for block in blocks:
        tied = block.attn.in_proj_weight[-64:]
        block.attn.in_proj_weight.copy_(tied.repeat(3, 1))
    tokens = numbers(2, 9, 64)
    (first, local), (second, last) = local_path(blocks, tokens, 0)
    attended = tokens + blocks[0].ls_1(blocks[0].attention(blocks[0].ln_1(tokens)))
    close(local, attended)
    close(first, attended + blocks[0].ls_2(blocks[0].mlp(blocks[0].ln_2(attended))))
    again = blocks[1].ls_1(blocks[1].attention(blocks[1].ln_1(first)))
    close(last - local, again)
    close(second, run_blocks(blocks, tokens))
    assert again.abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_torchs(masked: bool) -> None:
    """All tokens, or the first alone, which reads the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        theirs.in_proj_bias.normal_()
    ours = ClipAttention(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tokens = numbers(2, 9, 64)
    for count in (9, 1):
        mask = numbers(count, 9) if masked else None
        some = tokens if count == 9 else tokens[:, :count]
        found, _ = ours(some, tokens, tokens, need_weights=False, attn_mask=mask)
        expected, _ = theirs(some, tokens, tokens, need_weights=False, attn_mask=mask)
        close(found, expected)


# ---- which CLIPs --------------------------------------------------------------------------------


def test_the_registered_clips_are_as_published() -> None:
    before = torch.get_rng_state()
    for name, (seen, read, joint, blocks, millions, quick) in {
        "clip-vit-b-16-plus-240": (896, 640, 640, 12, 208.4, False),
        "clip-vit-l-14": (1024, 768, 768, 24, 427.6, True),
    }.items():
        tower = ClipTower(REGISTRY[name], (0, 1))
        assert len(tower.blocks) == blocks and tower.text.layers == 12
        assert tower.text.width == read and tower.text.context == 77
        assert tower.joint_width == joint and tower.model.visual.class_embedding.shape == (seen,)
        parameters = list(tower.model.parameters())
        assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(millions, abs=0.06)
        assert all(p.is_meta for p in parameters)
        for stack in (tower.blocks, tower.model.transformer.resblocks):
            kinds = {type(block.mlp.gelu).__name__ for block in stack}
            assert kinds == {"QuickGELU" if quick else "GELU"}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes",
    [
        {"custom_text": True},
        {"vision_cfg": {"timm_model_name": "test_vit"}},
        {"vision_cfg": {"layers": [1, 1, 1, 1]}},
        {"vision_cfg": {"pool_type": "avg"}},
        {"vision_cfg": {"attentional_pool": True}},
        {"text_cfg": {"hf_tokenizer_name": "bert-base-uncased"}},
        {"text_cfg": {"hf_model_name": "roberta-base"}},
        {"text_cfg": {"pool_type": "last"}},
        {"text_cfg": {"no_causal_mask": True}},
    ],
    ids=str,
)
def test_a_clip_of_another_build_is_refused(architecture: Make, changes: dict[str, object]) -> None:
    spec = find_backbone(CLIP)
    make_clip(replace(spec, architecture=architecture("plain-clip")))
    with pytest.raises(InputError, match=r"not a CLIP with plain .*clip-vit-b-16-plus-240"):
        make_clip(replace(spec, architecture=architecture("other-clip", **changes)))


def test_a_backbone_that_is_no_clip_is_refused() -> None:
    with pytest.raises(InputError, match=f"backbone {DEEP}: not a CLIP") as error:
        ClipTower(find_backbone(DEEP), (0,))
    assert "\n" not in str(error.value)


# ---- their weights ------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def test_a_whole_clip_keeps_both_towers_where_it_is_carried(
    store: Path, clip_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_file(clip_weights.removeprefix("file:"))
    save_file({**given, "optimizer.step": torch.ones(1)}, tmp_path / "given.safetensors")
    added = add(tmp_path / "given.safetensors", CLIP)
    assert added == store_path(CLIP) and equal(load_file(added), given)
    packed = pack(CLIP, tmp_path / "packed.safetensors")
    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "other"))
    assert add(packed) == store_path(CLIP)
    assert store_path(CLIP).is_relative_to(tmp_path / "other")
    whole = Backbone.load(CLIP, (0, 1), offline=True, make=ClipTower)
    assert equal(whole.state(), given)


def test_a_packed_clip_still_serves_as_a_plain_backbone(
    store: Path, clip_weights: str, tmp_path: Path
) -> None:
    direct = Detector("anomaly-dino", backbone=CLIP, weights=clip_weights, image_size=64)
    add(clip_weights.removeprefix("file:"), CLIP)
    packed = pack(CLIP, tmp_path / "packed.safetensors")
    for other in (
        Detector("anomaly-dino", backbone=CLIP, image_size=64, offline=True),
        Detector("anomaly-dino", backbone=CLIP, weights=f"file:{packed}", image_size=64),
    ):
        assert other.engine.backbone.weights_sha256 == direct.engine.backbone.weights_sha256
        assert not any("token_embedding" in name for name in other.engine.backbone.state())
        for detector in (direct, other):
            if not detector.categories:
                detector.enroll("plate", [texture(0)])
        (found,), (expected,) = (
            list(each.predict([blot(texture(1), 20, 20, 24)])) for each in (other, direct)
        )
        assert found.score == expected.score > 0
        np.testing.assert_array_equal(found.map, expected.map)


def test_an_image_tower_alone_is_carried_too_but_is_no_whole_clip(
    store: Path, clip_weights: str, tmp_path: Path
) -> None:
    given = load_file(clip_weights.removeprefix("file:"))
    visual = {k: v for k, v in given.items() if k.startswith("visual.")}
    save_file(visual, tmp_path / "visual.safetensors")
    added = add(tmp_path / "visual.safetensors", CLIP)
    assert Backbone.load(CLIP, (3,), offline=True).layers == (3,)
    with pytest.raises(InputError, match=r"not weights of .*the text tower is missing") as error:
        Backbone.load(CLIP, (3,), offline=True, make=ClipTower)
    assert str(added) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"visual.safetensors: .*the text tower is missing"):
        Backbone.load(CLIP, (3,), weights=f"file:{tmp_path / 'visual.safetensors'}", make=ClipTower)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transformer.resblocks.2.attn.in_proj_weight", "is missing"),
        ("text_projection", r"is \[47, 48\] and should be \[48, 48\]"),
        ("visual.proj", "is missing"),
    ],
)
def test_parts_of_a_clip_are_not_carried(
    store: Path, clip_weights: str, tmp_path: Path, name: str, said: str
) -> None:
    given = load_file(clip_weights.removeprefix("file:"))
    cut = given.pop(name)
    if "is missing" not in said:
        given[name] = cut[1:].contiguous()
    save_file(given, tmp_path / "given.safetensors")
    with pytest.raises(InputError, match=f"not weights of {CLIP} .*{name}' {said}"):
        add(tmp_path / "given.safetensors", CLIP)
    assert not store_path(CLIP).exists()


def test_of_a_clip_with_another_text_tower_the_image_tower_is_carried_as_ever(
    store: Path, architecture: Make, tmp_path: Path
) -> None:
    """Such are CLIPA and the worldwide CLIPs: backbones as good as any, by their images."""
    name = architecture("eos-clip", text_cfg={"pool_type": "eos", "eos_id": 49407})
    config = open_clip.get_model_config(name)
    given = open_clip.CLIP(**config).state_dict()
    assert "token_embedding.weight" in given
    save_file(given, tmp_path / "given.safetensors")
    add(tmp_path / "given.safetensors", f"open_clip:{name}")
    packed = pack(f"open_clip:{name}", tmp_path / "packed.safetensors")
    found = Backbone.load(f"open_clip:{name}", (3,), weights=f"file:{packed}")
    state = found.state()
    assert all(torch.equal(v, given[f"visual.{k}"]) for k, v in state.items())


def test_a_training_checkpoint_of_open_clips_is_read(clip_weights: str, tmp_path: Path) -> None:
    """Such is the paper's own file, of open_clip's releases."""
    given = load_file(clip_weights.removeprefix("file:"))
    inside = {f"module.{name}": value for name, value in given.items()}
    torch.save({"epoch": 32, "name": "x", "state_dict": inside}, tmp_path / "clip.pt")
    found = Backbone.load(CLIP, (0,), weights=f"file:{tmp_path / 'clip.pt'}", make=ClipTower)
    assert equal(found.state(), given)


def test_half_precision_is_read_as_full(store: Path, clip_weights: str, tmp_path: Path) -> None:
    given = load_file(clip_weights.removeprefix("file:"))
    save_file({k: v.half() for k, v in given.items()}, tmp_path / "half.safetensors")
    found = Backbone.load(
        CLIP, (0,), weights=f"file:{tmp_path / 'half.safetensors'}", make=ClipTower
    )
    assert equal(found.state(), {k: v.half().float() for k, v in given.items()})
