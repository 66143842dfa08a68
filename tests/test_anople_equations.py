"""AnoPLe's equations: prompts, texts, views, map, losses, memory; slow forms and known answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import erf
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.features.clip import ClipTower
from anomalyst.features.extractor import Backbone
from anomalyst.methods import anople
from anomalyst.methods.anople import (
    AnoPle,
    AnoPleNetwork,
    AnoPleOptions,
    Decoder,
    abnormal_share,
    harmonic_mean,
    with_noise,
)
from anomalyst.methods.anople_losses import alignment_loss, image_loss, pixel_loss
from conftest import CLIP
from test_clip_towers import Slow, close, lively, numbers

pytest.importorskip("open_clip")

SEEN, READ, JOINT, GRID = 64, 48, 48, (5, 5)
WAYS = ["both", "t2i", "i2t", "none", "text", "visual"]
WORDS = ["metal nut", "printed circuit board", "bottle"]
TAU = 0.07


@pytest.fixture(scope="module")
def state(clip_weights: str) -> dict[str, Tensor]:
    return lively(load_file(clip_weights.removeprefix("file:")))


@pytest.fixture(scope="module")
def backbone(state: dict[str, Tensor]) -> Backbone:
    return Backbone.from_state(CLIP, (0, 2), state, ClipTower)


Build = Callable[..., AnoPleNetwork]


@pytest.fixture
def build(backbone: Backbone) -> Build:
    """A network on the tiny CLIP, its prompts and maps of ordinary size."""

    def make(seed: int = 0, **options: object) -> AnoPleNetwork:
        chosen = {"text_prompts": 2, "visual_prompts": 3, **options}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = AnoPleNetwork(backbone.tower, AnoPleOptions(**chosen))
            for name, value in network.named_parameters():
                if name in ("text", "visual", "prefix"):
                    value.data.mul_(20)
                elif not name.startswith("decoder.skip"):
                    value.data.add_(0.1 * torch.randn(value.shape))
        network.words = WORDS
        return network.eval()

    return make


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def part(count: int = 2, views: int = 5, product: Sequence[int] = (2, 0)) -> list[Tensor]:
    """One step: in pixels on the first image, in some of its views; noise on the second."""
    clean = numbers(count, views, 3, 80, 80)
    pseudo, masks = clean.clone(), torch.zeros(count, views, 80, 80)
    noise = torch.zeros(count, views, *GRID)
    for view in (0, 2):
        if view < views:
            masks[0, view, 20:45, 30:60] = 1
            pseudo[0, view] += masks[0, view] * numbers(3, 80, 80, seed=7)
    if views > 3:
        masks[0, 3, 0, :3] = 1  # 3 of 6400 pixels: less than 0.05 %
    for view in range(views):
        noise[1, view, 1 : 2 + view % 3, 2:4] = 1
    masks[1] = noise[1].repeat_interleave(16, 1).repeat_interleave(16, 2)
    return [clean, pseudo, masks, noise, torch.tensor(product)]


def learned(network: nn.Module) -> dict[str, list[bool]]:
    """Of every parameter, of one block or view each where it has such, whether it got gradients."""
    found = {}
    for name, value in network.named_parameters():
        rows = value.grad if name in ("text", "visual", "prefix") else None
        if value.grad is None:
            found[name] = [False]
        else:
            found[name] = [bool(row.any()) for row in (value.grad[None] if rows is None else rows)]
    return found


def group(found: Mapping[str, list[bool]]) -> dict[str, bool | None]:
    """The same by kind; None where some got gradients and some did not."""
    kinds: dict[str, list[bool]] = {}
    for name, each in found.items():
        kinds.setdefault(name.partition(".")[0], []).extend(each)
    return {k: all(v) if all(v) or not any(v) else None for k, v in kinds.items()}


# ---- prompts in both directions -----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_each_tower_gets_its_own_prompts_and_the_others_mapped(build: Build, way: str) -> None:
    network = build(interaction=way)
    texts, visuals = network.mixed()
    own = {name: array(value) for name, value in network.named_parameters()}
    assert own["text"].shape == (3, 2, READ) and own["visual"].shape == (3, 3, SEEN)
    for found, mine, other, to, absent, mixes in (
        (texts, "text", "visual", "to_text", "visual", ("both", "i2t")),
        (visuals, "visual", "text", "to_visual", "text", ("both", "t2i")),
    ):
        assert len(found) == (0 if way == absent else 3)
        for j, prompts in enumerate(found):
            expected = own[mine][j]
            if way in mixes:
                mapped = own[other][j] @ own[f"{to}.{j}.weight"].T + own[f"{to}.{j}.bias"]
                expected = np.concatenate([expected, mapped])
            close(prompts.detach(), expected)
    assert network.slots == (len(texts[0]) if texts else 0)


@pytest.mark.parametrize(("depth", "blocks"), [(0.75, 3), (1.0, 4), (0.5, 2), (0.01, 1)])
def test_prompts_enter_the_first_blocks(build: Build, depth: float, blocks: int) -> None:
    network = build(depth=depth)
    assert len(network.text) == len(network.visual) == blocks
    assert len(network.to_text) == len(network.to_visual) == blocks


def test_prompts_start_small_and_clip_is_no_part_of_what_is_saved(backbone: Backbone) -> None:
    options = AnoPleOptions(text_prompts=40, visual_prompts=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AnoPleNetwork(backbone.tower, options)
    for value in (network.text, network.visual):
        assert value.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.prefix.shape == (5, 1, SEEN)
    names = {name.partition(".")[0] for name in network.state_dict()}
    assert names == {"text", "visual", "to_text", "to_visual", "prefix", "decoder"}
    assert torch.equal(network.decoder.skip.weight[:, :, 0, 0], torch.eye(JOINT))


# ---- texts --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_those_of_the_slow_form(build: Build, state: dict[str, Tensor], way: str) -> None:
    network, slow = build(interaction=way), Slow(state)
    found = network.texts(WORDS)
    assert found.shape == (3, 2, JOINT)
    prompts = {j: array(rows) for j, rows in enumerate(network.mixed()[0])}
    tokenizer = network.clip.text._tokenizer
    for k, words in enumerate(WORDS):
        for s, state_word in enumerate(("", "abnormal ")):
            ids = tokenizer.encode(f"{state_word}{words}.")
            row = [49406, *[0] * network.slots, *ids, 49407]
            embedded = slow.state["token_embedding.weight"][row]
            text = slow.text(embedded, len(row) - 1, prompts)  # writes the slots at block 0 too
            if prompts:  # the first enter before positions are added
                embedded[1 : 1 + network.slots] = prompts[0]
                deep = {j: rows for j, rows in prompts.items() if j}
                text = slow.text(embedded, len(row) - 1, deep)
            close(found[k, s], text / sqrt(text @ text))


@torch.no_grad()
def test_the_end_moves_by_one_for_abnormal_and_by_the_words(build: Build) -> None:
    network = build()
    ids, ends = network.tokenized(["bottle", "metal nut", "printed circuit board"])
    slots = network.slots
    assert slots == 5
    assert ends.tolist() == [slots + n + 2 + s for n in (1, 2, 3) for s in (0, 1)]
    assert ids.shape == (6, slots + 7) and (ids.gather(1, ends[:, None]) == 49407).all()
    assert (ids[1::2, slots + 1] == 40934).all() and not (ids[::2] == 40934).any()
    assert (ids[:, 1 : slots + 1] == ids[0, 1]).all()


def test_a_name_that_does_not_fit_says_how_many_tokens_it_has(build: Build) -> None:
    network = build(text_prompts=4, visual_prompts=4)
    network.tokenized(["nut " * 65])
    with pytest.raises(
        InputError, match="has 66 tokens, beside anople's prompts CLIP reads 65 at most"
    ):
        network.tokenized(["bolt", "nut " * 66])


@torch.no_grad()
def test_texts_know_nothing_of_each_other(build: Build) -> None:
    """Another order of classes, or one class more, permutes rows and changes none."""
    network = build()
    found = network.texts(WORDS)
    close(network.texts([WORDS[k] for k in (2, 0, 1)]), found[[2, 0, 1]], 1e-6)
    more = network.texts([*WORDS, "a very long name of some other product"])
    close(more[:3], found, 1e-6)
    close(network.texts(WORDS[1:2]), found[1:2], 1e-6)
    apart = found @ found.transpose(1, 2)
    assert (apart[:, 0, 1] < 0.999).all() and ((found[0] - found[1]).abs() > 1e-3).any()


# ---- images -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["token", "add", "none"])
@pytest.mark.parametrize("way", ["both", "i2t", "text"])
def test_images_are_those_of_the_slow_form(
    build: Build, state: dict[str, Tensor], way: str, prefix: str
) -> None:
    network, slow = build(interaction=way, prefix=prefix), Slow(state)
    images, view = numbers(3, 3, 80, 80), torch.tensor([0, 3, 1])
    tapped: dict[int, Tensor] = {}
    image, patches = network.look(images, view, tapped=tapped)
    assert patches.shape == (3, JOINT, *GRID) and sorted(tapped) == [0, 1, 2, 3]
    prompts = {j: array(rows) for j, rows in enumerate(network.mixed()[1])}
    for k in range(3):
        own, rows = array(network.prefix)[view[k]], prompts.pop(0, np.zeros((0, SEEN)))
        first = rows + own if prefix == "add" else rows
        behind = own if prefix == "token" else own[:0]
        entered = np.concatenate([slow.embed(array(images[k])), first, behind])
        layers = slow.layers("visual.", entered, prompts, 26)
        projected = slow.project(layers[-1][:26])
        close(image[k], projected[0] / sqrt(projected[0] @ projected[0]))
        close(patches[k].flatten(1).T, projected[1:], 1e-4)
        for number, tokens in enumerate(layers):
            close(tapped[number][k], tokens, 1e-4)
        prompts[0] = rows


@torch.no_grad()
def test_images_do_not_see_each_other(build: Build) -> None:
    network, images, view = build(), numbers(4, 3, 64, 96), torch.tensor([0, 1, 1, 4])
    found = network.look(images, view)
    assert found[1].shape == (4, JOINT, 4, 6)
    order = [2, 3, 0, 1]
    for a, b in zip(network.look(images[order], view[order]), found, strict=True):
        close(a, b[order])
    for a, b in zip(network.look(images[1:2], view[1:2]), found, strict=True):
        close(a, b[1:2])


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "differs"), [("token", True), ("add", True), ("none", False)])
def test_only_the_prefix_tells_views_apart(build: Build, prefix: str, differs: bool) -> None:
    network, images = build(prefix=prefix), numbers(1, 3, 80, 80).expand(5, -1, -1, -1)
    image, _ = network.look(images, torch.arange(5))
    for k in range(1, 5):
        assert ((image[k] - image[0]).abs().max() > 1e-3) == differs
    network.prefix.copy_(network.prefix[2].clone().expand(5, -1, -1))
    image, _ = network.look(images, torch.arange(5))
    close(image, image[:1].expand(5, -1), 1e-6)


@torch.no_grad()
def test_noise_is_put_in_behind_the_middle_block(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images, view = build(), numbers(2, 3, 80, 80), torch.tensor([0, 1])
    monkeypatch.setattr(anople, "with_noise", lambda tokens, patches: tokens + patches.sum())
    plain: dict[int, Tensor] = {}
    noisy: dict[int, Tensor] = {}
    network.look(images, view, torch.zeros(2, *GRID), plain)
    network.look(images, view, torch.ones(2, *GRID), noisy)
    assert torch.equal(plain[0], noisy[0]) and torch.equal(plain[1] + 50, noisy[1])
    assert not torch.equal(plain[2], noisy[2])


@pytest.mark.parametrize("r", [0.25, 0.6, 1.0])
def test_latent_noise_turns_tokens_by_its_length(monkeypatch: pytest.MonkeyPatch, r: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, (r - 0.25) / 0.75))
    scale = torch.logspace(-1, 1, 60)[:, None]
    tokens = numbers(8, 60, 896) * scale  # of any length: noise is measured in tokens' lengths
    patches = (numbers(8, 50, seed=1) > 0).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = with_noise(tokens, patches)
    marked = torch.cat([torch.zeros(8, 1), patches, torch.zeros(8, 9)], 1) > 0
    assert torch.equal(found[~marked], tokens[~marked])
    cosine = torch.cosine_similarity(found[marked], tokens[marked])
    assert cosine.mean().item() == pytest.approx(1 / sqrt(1 + r**2), abs=0.005)
    length = (found - tokens)[marked].norm(dim=1) / tokens[marked].norm(dim=1)
    assert length.mean().item() == pytest.approx(r, rel=0.01)


def test_each_image_draws_the_length_of_its_noise() -> None:
    tokens, patches = numbers(400, 5, 64), torch.ones(400, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        added = (with_noise(tokens, patches) - tokens)[:, 1:].norm(dim=2)
    ratio = (added / tokens[:, 1:].norm(dim=2)).mean(1)
    assert 0.2 < ratio.min() < 0.3 and 0.9 < ratio.max() < 1.15
    assert ratio.mean().item() == pytest.approx(0.625, abs=0.03)


# ---- the map ------------------------------------------------------------------------------------


def doubled(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A transposed convolution of kernel and stride 2, ``[C, h, w]`` to ``[D, 2 h, 2 w]``."""
    out = np.zeros((weight.shape[1], 2 * x.shape[1], 2 * x.shape[2]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            piece = np.einsum("c,cdij->dij", x[:, i, j], weight)
            out[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = piece + bias[:, None, None]
    return out


def rectified(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """GELU behind a norm of 8 groups."""
    groups = x.reshape(8, -1)
    groups = groups - groups.mean(1, keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(1, keepdims=True) + 1e-5)
    x = groups.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    return x * (1 + erf(x / sqrt(2))) / 2


def enlarged(x: np.ndarray, times: int) -> np.ndarray:
    """Bilinear ``[..., h, w]``, pixels as areas: one axis, then the other."""
    for _ in range(2):
        side = x.shape[-1]
        at = ((np.arange(times * side) + 0.5) / times - 0.5).clip(0, side - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, side - 1), at - low
        x = np.swapaxes(x[..., low] * (1 - share) + x[..., high] * share, -1, -2)
    return x


@torch.no_grad()
def test_the_decoder_and_the_map_are_those_of_the_slow_form(build: Build) -> None:
    network = build()
    network.decoder.skip.weight.add_(0.1 * numbers(JOINT, JOINT, 1, 1))
    weights = {name: array(value) for name, value in network.decoder.named_parameters()}
    patches, texts = numbers(2, JOINT, 3, 4), network.texts(WORDS[:2])
    features, probability = network.decode(patches, texts)
    assert features.shape == (2, JOINT, 12, 16) and probability.shape == (2, 12, 16)
    for k in range(2):
        x = array(patches[k])
        coarse = np.einsum("dc,chw->dhw", weights["skip.weight"][:, :, 0, 0], x)
        for first in (0, 3):
            x = doubled(x, weights[f"fine.{first}.weight"], weights[f"fine.{first}.bias"])
            norm = f"fine.{first + 1}"
            x = rectified(x, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
        x = np.einsum("dc,chw->dhw", weights["fine.6.weight"][:, :, 0, 0], x)
        x = x + weights["fine.6.bias"][:, None, None] + enlarged(coarse, 4)
        close(features[k], x, 1e-4)
        unit = x / np.sqrt((x**2).sum(0))
        normal, abnormal = (
            np.exp(np.einsum("d,dhw->hw", array(text), unit) / TAU) for text in texts[k]
        )
        close(probability[k], abnormal / (normal + abnormal), 1e-4)


@torch.no_grad()
def test_the_map_is_a_share_that_the_texts_divide_among_them(build: Build) -> None:
    network = build()
    network.decoder = nn.Identity()
    patches, texts = numbers(2, JOINT, 6, 7), network.texts(WORDS[:2])
    _, found = network.decode(patches, texts)
    assert (found > 0).all() and (found < 1).all() and found.std() > 0.05
    close(network.decode(patches, texts.flip(1))[1], 1 - found)
    for scale in (0.01, 30.0):
        close(network.decode(scale * patches, texts)[1], found, 1e-4)
    same = texts[:, :1].expand(-1, 2, -1)
    assert torch.equal(network.decode(patches, same)[1], torch.full((2, 6, 7), 0.5))
    blunt = build(temperature=0.7)
    blunt.decoder = nn.Identity()
    logit = found.logit()
    close(blunt.decode(patches, texts)[1], (logit / 10).sigmoid(), 1e-4)


def test_shares_of_known_likenesses() -> None:
    likeness = torch.tensor([[0.2, 0.2], [0.1, 0.1 + 0.07 * log(3)], [0.9, 0.9 - 0.07 * log(4)]])
    close(abnormal_share(likeness, 0.07), [0.5, 0.75, 0.2])


def test_a_fresh_decoder_gives_mostly_the_tokens_themselves() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = Decoder(640)
    tokens = numbers(1, 640, 4, 4)
    with torch.no_grad():
        found, coarse = decoder(tokens), torch.from_numpy(enlarged(array(tokens), 4)).float()
    assert torch.cosine_similarity(found, coarse).mean() > 0.8


# ---- losses -------------------------------------------------------------------------------------


def test_pixel_loss_of_known_maps() -> None:
    mask = torch.zeros(2, 4, 5)
    mask[0, :2, :3] = 1
    assert pixel_loss(mask, mask).item() == pytest.approx(0, abs=1e-6)
    assert pixel_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)).item() == pytest.approx(
        0, abs=1e-6
    )
    half = torch.full((2, 4, 5), 0.5)
    dice = (1 - (2 * 3 + 1) / (10 + 6 + 1) + 1 - 1 / 11) / 2
    focal = 0.5 * 0.25 * log(2)
    assert pixel_loss(half, mask).item() == pytest.approx(dice + focal, rel=1e-5)
    p, expected = numbers(2, 4, 5).sigmoid(), 0.0
    for a, t in zip(array(p), array(mask), strict=True):
        expected += (1 - (2 * (a * t).sum() + 1) / (a.sum() + t.sum() + 1)) / 2
        right = np.where(t > 0, a, 1 - a)
        expected += np.mean(-0.5 * (1 - right) ** 2 * np.log(right)) / 2
    assert pixel_loss(p, mask).item() == pytest.approx(expected, rel=1e-5)


def test_image_loss_of_known_likenesses() -> None:
    image, same = torch.eye(4)[:2], torch.eye(4)[:1].expand(2, 3, -1)
    assert image_loss(image, same, torch.tensor([0, 2]), TAU).item() == pytest.approx(log(3))
    texts = torch.stack([torch.eye(4)[:3], torch.eye(4)[[3, 1, 2]]])
    expected = log(exp(1 / 0.5) + 2) - 1 / 0.5  # both are like the right one alone
    assert image_loss(image, texts, torch.tensor([0, 1]), 0.5).item() == pytest.approx(expected)
    wrong = log(exp(1 / 0.5) + 2)
    found = image_loss(image, texts, torch.tensor([0, 0]), 0.5).item()
    assert found == pytest.approx((expected + wrong) / 2)
    turned = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0], [-0.6, 0.8]])
    pair, truth = torch.eye(2)[None], torch.tensor([0])
    losses = [image_loss(each[None], pair, truth, TAU).item() for each in turned]
    assert losses == sorted(losses) and len(set(losses)) == 5


def test_alignment_loss_of_known_features() -> None:
    image = nn.functional.normalize(numbers(3, 6), dim=1)
    decoded, weights = numbers(3, 6, 2, 2, seed=1), numbers(3, 2, 2, seed=2).sigmoid()
    expected = []
    for z, f, m in zip(array(image), array(decoded), array(weights), strict=True):
        s = sum(m[i, j] * f[:, i, j] for i in range(2) for j in range(2))
        expected.append(1 - z @ s / sqrt(s @ s))
    found = alignment_loss(image, decoded, weights).item()
    assert found == pytest.approx(np.mean(expected), rel=1e-5) and min(expected) >= 0
    for scale in (0.01, 40.0):  # neither the map's height nor the features' counts
        assert alignment_loss(image, decoded, scale * weights).item() == pytest.approx(found, 1e-4)
    single = torch.zeros(3, 2, 2)
    single[:, 1, 0] = 0.3
    pixel = nn.functional.normalize(decoded[:, :, 1, 0], dim=1)
    expected = (1 - (image * pixel).sum(1)).mean().item()
    assert alignment_loss(image, decoded, single).item() == pytest.approx(expected, rel=1e-5)
    towards = image[:, :, None, None].expand(-1, -1, 2, 2)
    assert alignment_loss(image, 5 * towards, weights).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(image, -towards, weights).item() == pytest.approx(2, abs=1e-6)
    assert alignment_loss(image, decoded, torch.zeros(3, 2, 2)).item() == 1  # nothing is shown


OPTIONS = [
    {},
    {"contrast": "all"},
    {"align": "both"},
    {"align": "none"},
    {"align": "both", "contrast": "all", "temperature": 0.5, "detach": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("views", [5, 1])
def test_a_steps_losses_are_those_of_its_views_one_by_one(
    build: Build, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], views: int
) -> None:
    monkeypatch.setattr(anople, "with_noise", marked_tokens)
    network, given = build(**options), part(views=views)
    losses = {name: value.item() for name, value in network(given).items()}
    clean, pseudo, masks, noise, product = given
    tau, dice, focal, image_losses, aligned = network.options.temperature, [], [], [], []
    every = torch.cat([network.texts([word]) for word in WORDS]).detach()  # (3, 2, D)
    for images, bad in ((clean, 0), (pseudo, 1)):
        for b in range(2):
            for v in range(views):
                mask, own = bad * array(masks[b, v]), every[product[b]]
                z, patches = network.look(
                    images[b, v][None], torch.tensor([v]), bad * noise[b, v][None]
                )
                f, m = network.decode(patches, own[None])
                z, f, m = array(z[0]), array(f[0]), array(m[0])
                fine = enlarged(m, 4)
                dice.append(1 - (2 * (fine * mask).sum() + 1) / (fine.sum() + mask.sum() + 1))
                right = np.where(mask > 0, fine, 1 - fine)
                focal.append(np.mean(-0.5 * (1 - right) ** 2 * np.log(right)))
                label = int(mask.sum() >= 0.0005 * mask.size)
                among = array(every).reshape(-1, JOINT) if options.get("contrast") else array(own)
                place = 2 * int(product[b]) + label if options.get("contrast") else label
                logits = among @ z / tau
                image_losses.append(np.log(np.exp(logits - logits[place]).sum()))
                weight = m if label else 1 - m
                s = np.einsum("dhw,hw->d", f, weight)
                if label or options.get("align") == "both":
                    aligned.append(1 - z @ s / sqrt(s @ s))
    expected = {
        "pixel": np.mean(dice) + np.mean(focal),
        "image": np.mean(image_losses),
        "align": 0.0 if options.get("align") == "none" else np.mean(aligned),
    }
    assert len(aligned) == (4 * views if options.get("align") == "both" else min(views, 2) + views)
    assert losses == pytest.approx({**expected, "loss": sum(expected.values())}, rel=1e-4)


def marked_tokens(tokens: Tensor, patches: Tensor) -> Tensor:
    """In place of noise something fixed, so that a row's result can be computed alone."""
    here = tokens[:, 1 : 1 + patches.shape[1]] + 3 * patches[:, :, None] * numbers(SEEN, seed=4)
    return torch.cat([tokens[:, :1], here, tokens[:, 1 + patches.shape[1] :]], 1)


def test_without_any_pseudo_anomaly_nothing_is_aligned(build: Build) -> None:
    given = part()
    given[2], given[3] = torch.zeros_like(given[2]), torch.zeros_like(given[3])
    assert build()(given)["align"].item() == 0
    assert build(align="both")(given)["align"].item() > 0


@pytest.mark.parametrize("area", [3, 4])
def test_a_view_counts_as_abnormal_from_a_two_thousandth_of_its_pixels(
    build: Build, monkeypatch: pytest.MonkeyPatch, area: int
) -> None:
    seen: list[list[int]] = []
    plain = anople.image_loss
    monkeypatch.setattr(anople, "image_loss", lambda *a: seen.append(a[2].tolist()) or plain(*a))
    given = part()
    given[2][:] = 0
    given[2][0, 1].view(-1)[:area] = 1  # of 6400
    build()(given)
    assert seen == [[0] * 10 + [0, int(area == 4), 0, 0, 0] + [0] * 5]


# ---- what learns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "still"),
    [
        ({}, set()),
        ({"contrast": "all", "align": "both"}, set()),
        ({"prefix": "add"}, set()),
        ({"prefix": "none"}, {"prefix"}),
        ({"interaction": "t2i"}, {"to_text"}),
        ({"interaction": "i2t"}, {"to_visual"}),
        ({"interaction": "none"}, {"to_text", "to_visual"}),
        ({"interaction": "text"}, {"visual", "to_text", "to_visual"}),
        ({"interaction": "visual"}, {"text", "to_text", "to_visual"}),
    ],
    ids=str,
)
def test_gradients_reach_all_that_is_used_and_nothing_else(
    build: Build, backbone: Backbone, options: dict[str, str], still: set[str]
) -> None:
    network = build(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network(part())["loss"].backward()
    found = group(learned(network))
    kinds = {"text", "visual", "to_text", "to_visual", "prefix", "decoder"}
    assert None not in found.values()
    assert {kind for kind, reached in found.items() if reached} == kinds - still
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize(
    "options",
    [
        *({"interaction": way} for way in WAYS),
        {"interaction": "text", "prefix": "add"},
        {"prefix": "none"},
        {"align": "none", "detach": True},
    ],
    ids=str,
)
def test_several_processes_can_share_a_step(build: Build, options: dict[str, object]) -> None:
    """They wait for a gradient, be it 0, of everything that is to be trained."""
    network = build(**options)
    network(part(views=1))["loss"].backward()
    waited = {n.partition(".")[0] for n, p in network.named_parameters() if p.requires_grad}
    got = {n.partition(".")[0] for n, p in network.named_parameters() if p.grad is not None}
    assert waited == got


@pytest.mark.parametrize("prefix", ["token", "add"])
def test_prefixes_of_views_that_are_not_seen_do_not_learn(build: Build, prefix: str) -> None:
    network = build(prefix=prefix)
    network(part(views=1))["loss"].backward()
    assert learned(network)["prefix"] == [True, False, False, False, False]
    network.zero_grad()
    images = numbers(2, 3, 80, 80)
    image, _ = network.look(images, torch.tensor([3, 1]))
    image[:, 0].sum().backward()
    assert learned(network)["prefix"] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("way", "by_texts", "by_images"),
    [
        ("both", {"text", "visual", "to_text"}, {"text", "visual", "to_visual"}),
        ("t2i", {"text"}, {"text", "visual", "to_visual"}),
        ("i2t", {"text", "visual", "to_text"}, {"visual"}),
        ("none", {"text"}, {"visual"}),
        ("text", {"text"}, set()),
        ("visual", set(), {"visual"}),
    ],
)
def test_each_way_of_interaction_reaches_what_it_says(
    build: Build, way: str, by_texts: set[str], by_images: set[str]
) -> None:
    prompts = ("text", "visual", "to_text", "to_visual")
    for kinds, result in (
        (by_texts, lambda n: n.texts(WORDS)),
        (by_images, lambda n: n.look(numbers(1, 3, 80, 80), torch.tensor([0]))[0]),
    ):
        network = build(interaction=way)
        before = result(network)
        if before.requires_grad:
            (before * numbers(*before.shape, seed=3)).sum().backward()
        found = group(learned(network))
        assert {kind for kind in prompts if found.get(kind)} == kinds
        assert None not in [found[kind] for kind in prompts if kind in found]
        for kind in prompts:  # and so it is when they are moved by hand
            moved = build(interaction=way)
            for name, value in moved.named_parameters():
                if name.partition(".")[0] == kind:
                    value.data.add_(0.5 * numbers(*value.shape, seed=8))
            after = result(moved)
            assert torch.equal(after, before) == (kind not in kinds)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_the_alignment_moves_the_cls_alone(build: Build, detach: bool) -> None:
    network = build(detach=detach)
    network(part())["align"].backward()
    found = group(learned(network))
    assert found["visual"] is True and found["to_visual"] is True  # by way of the CLS
    assert found["decoder"] is not detach and found["to_text"] is not detach
    decoder = [p.grad for p in network.decoder.parameters()]
    assert all((g is None or not g.any()) == detach for g in decoder)


def test_one_batch_is_learned_by_heart(build: Build) -> None:
    network, given = build(), part(views=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    found = []
    with torch.random.fork_rng():
        for _ in range(70):
            torch.manual_seed(0)
            optimizer.zero_grad()
            losses = network(given)
            losses["loss"].backward()
            optimizer.step()
            found.append({name: value.item() for name, value in losses.items()})
    for name in ("pixel", "align"):
        assert found[-1][name] < 0.2 * found[0][name], name
    assert found[-1]["image"] < 0.97 * log(2)  # what is had without looking


# ---- harmonic mean ------------------------------------------------------------------------------


def test_the_harmonic_mean_is_one() -> None:
    a, b = numbers(1000).sigmoid(), numbers(1000, seed=1).sigmoid()
    found = harmonic_mean(a, b)
    close(found, [2 / (1 / x + 1 / y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], 1e-5)
    close(harmonic_mean(a, a), a, 1e-5)
    assert torch.equal(found, harmonic_mean(b, a))
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    assert (found <= 2 * low).all() and (found >= low - 1e-5).all() and (found <= high).all()
    assert torch.equal(harmonic_mean(a, torch.zeros(1000)), torch.zeros(1000))
    assert harmonic_mean(torch.zeros(1), torch.zeros(1)).item() == 0
    assert (harmonic_mean(a + 0.01, b) > found).all() and (harmonic_mean(a, b + 0.01) > found).all()
    half = 1 / (1 / a.double() + 1 / b.double())  # PromptAD's form
    assert torch.equal(harmonic_mean(a.double(), b.double()).argsort(), half.argsort())


# ---- the method: memory and scores --------------------------------------------------------------


Method = Callable[..., AnoPle]


@pytest.fixture
def method(backbone: Backbone) -> Method:
    def make(seed: int = 0, **options: object) -> AnoPle:
        made = AnoPle(AnoPleOptions(**options), backbone.spec, (0, 2), seed)
        made.bind(backbone.tower)
        return made

    return make


def memory(queries: Sequence[Tensor], banks: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Half the distance to the nearest remembered patch by cosine, the mean of both layers."""
    found = []
    for maps, bank in zip(queries, banks, strict=False):
        rows = [row for each in bank for row in array(each).reshape(len(each), -1).T]
        rows = [row / sqrt(row @ row) for row in rows]
        out = np.zeros((len(maps), *maps.shape[-2:]))
        for k, i, j in np.ndindex(out.shape):
            x = array(maps[k, :, i, j])
            out[k, i, j] = (1 - max(x @ row for row in rows) / sqrt(x @ x)) / 2
        found.append(out)
    return np.mean(found, axis=0)


def pictures(count: int, seed: int = 0) -> list[Tensor]:
    return [numbers(count, 3, 48, 64, seed=seed)]


@pytest.mark.parametrize("image_score", ["memory", "map"])
def test_scores_join_prompts_and_memory_by_the_harmonic_mean(
    method: Method, image_score: str
) -> None:
    made = method(image_score=image_score, text_prompts=2)
    references, queries = made.encode(pictures(2)), made.encode(pictures(3, 5))
    taps, patches, image = queries[:2], queries[2], queries[3]
    assert [t.shape for t in taps] == [(3, SEEN, 3, 4)] * 2 and image.shape == (3, JOINT, 1, 1)
    tapped: dict[int, Tensor] = {}
    with torch.no_grad():
        z, alone = made.network.look(pictures(3, 5)[0], torch.zeros(3).long(), tapped=tapped)
    close(image.flatten(1), z, 1e-6)
    close(patches, alone, 1e-6)
    for tap, number in zip(taps, (0, 2), strict=True):
        for k in range(12):
            close(tap[:, :, k // 4, k % 4], tapped[number][:, 1 + k], 1e-6)
    made.enroll("nut", [references])
    maps, scores = made.score(queries, "nut")
    with torch.no_grad():
        texts = made.network.texts(["nut"])
        _, decoded = made.network.decode(patches, texts.expand(3, -1, -1))
    far = memory(taps, [list(layer) for layer in references[:2]])
    fine = enlarged(far, 4)
    joined = 2 * array(decoded) * fine / (array(decoded) + fine + 1e-6)
    close(maps, joined, 1e-5)
    gap = array(z) @ (array(texts[0, 1]) - array(texts[0, 0]))
    told = 1 / (1 + np.exp(-gap / TAU))
    highest = (joined if image_score == "map" else far).max((1, 2))
    close(scores, 2 * told * highest / (told + highest + 1e-6), 1e-5)


def remembered(made: AnoPle, maps: Sequence[Tensor], category: str = "nut") -> Tensor | None:
    with torch.inference_mode():
        return made._remembered(maps[:2], category)


def test_nothing_new_is_seen_in_a_stored_image(method: Method) -> None:
    made = method()
    stored, other = made.encode(pictures(3)), made.encode(pictures(2, 9))
    assert remembered(made, stored) is None
    made.enroll("nut", [stored])
    assert remembered(made, stored).abs().max() < 1e-6
    first = remembered(made, other)
    assert (first > 1e-4).all() and (first <= 1).all()
    made.enroll("nut", [stored])  # duplicates say nothing
    close(remembered(made, other), first, 1e-6)
    made.enroll("nut", [made.encode(pictures(4, 12))])
    after = remembered(made, other)
    assert (after <= first + 1e-6).all() and (after < first - 1e-4).any()
    again = method()
    for k in (2, 0, 1):
        again.enroll("nut", [[maps[k : k + 1] for maps in stored]])
    close(remembered(again, other), first, 1e-6)


def test_which_products_patches_are_compared(method: Method) -> None:
    own, others = pictures(2), pictures(2, 3)
    for bank in ("category", "shared", "none"):
        made = method(bank=bank)
        maps, other = made.encode(own), made.encode(others)
        made.enroll("bolt", [maps])
        made.enroll("nut", [other])
        found = {name: remembered(made, maps, name) for name in ("bolt", "nut", "gear")}
        assert [each is None for each in found.values()] == {
            "category": [False, False, True],
            "shared": [False, False, False],
            "none": [True, True, True],
        }[bank]
        if bank == "none":
            continue
        assert found["bolt"].abs().max() < 1e-6
        if bank == "shared":
            assert torch.equal(found["nut"], found["bolt"])
            assert torch.equal(found["gear"], found["bolt"])
        else:
            close(found["nut"], memory(maps, [list(layer) for layer in other[:2]]))
            assert found["nut"].min() > 1e-4


@pytest.mark.parametrize("options", [{"bank": "none"}, {}], ids=str)
def test_without_a_memory_the_map_is_the_prompts_alone(
    method: Method, options: dict[str, object]
) -> None:
    made = method(**options)
    queries = made.encode(pictures(2))
    if options:
        made.enroll("nut", [made.encode(pictures(1, 4))])
    maps, scores = made.score(queries, "nut")
    with torch.no_grad():
        texts = made.network.texts(["nut"])
        _, decoded = made.network.decode(queries[2], texts.expand(2, -1, -1))
    close(maps, decoded, 1e-6)
    told = abnormal_share(queries[3].flatten(1) @ texts[0].T, TAU)
    highest = decoded.flatten(1).amax(1)
    close(
        scores, [2 / (1 / a + 1 / b) for a, b in zip(told.tolist(), highest.tolist(), strict=True)]
    )


def test_a_products_texts_are_encoded_once_and_no_image_changes_them(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = method(names={"01": "metal nut"}), []
    texts = made.network.texts
    monkeypatch.setattr(made.network, "texts", lambda words: asked.append(words) or texts(words))
    first = made._pair("metal_nut")
    for seed in (0, 1):
        made.score(made.encode(pictures(2, seed)), "metal_nut")
        made.score(made.encode(pictures(1, seed)), "01")  # another product of the same words
    made._pair("bolt")
    assert asked == [["metal nut"], ["bolt"]]
    assert torch.equal(made._pair("metal_nut"), first)
    with torch.no_grad():
        close(first, texts(["metal nut"])[0], 1e-6)
    other = method(seed=1).tensors()
    made.load_tensors(other)  # other prompts say other things
    assert (made._pair("metal_nut") - first).abs().max() > 1e-4


def test_prefixes_of_quadrants_have_no_say_in_judging(method: Method) -> None:
    made = method()
    made.enroll("nut", [made.encode(pictures(2))])
    found = made.score(made.encode(pictures(2, 5)), "nut")
    tensors = made.tensors()
    tensors["network.prefix"] = torch.cat(
        [tensors["network.prefix"][:1], torch.full((4, 1, SEEN), torch.nan)]
    )
    made.load_tensors(tensors)
    for a, b in zip(made.score(made.encode(pictures(2, 5)), "nut"), found, strict=True):
        assert torch.equal(a, b)
    tensors["network.prefix"][0] += numbers(1, SEEN)
    made.load_tensors(tensors)
    assert not torch.equal(made.score(made.encode(pictures(2, 5)), "nut")[0], found[0])


def test_what_was_learned_comes_back_from_its_tensors(method: Method) -> None:
    first, second = method(0), method(1)
    for made, seed in ((first, 0), (second, 3)):
        made.enroll("nut", [made.encode(pictures(2, seed))])
    first.enroll("bank1.bolt 2", [first.encode(pictures(1, 7))])
    second.score(second.encode(pictures(1)), "nut")  # has texts encoded
    second.load_tensors(first.tensors())
    assert second.trained and second.tensors().keys() == first.tensors().keys()
    assert "bank0.nut" in first.tensors() and "bank1.bank1.bolt 2" in first.tensors()
    for category in ("nut", "bank1.bolt 2"):
        for a, b in zip(
            *(each.score(each.encode(pictures(2, 8)), category) for each in (first, second)),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_first_weights_depend_on_the_seed_alone(method: Method) -> None:
    before = torch.get_rng_state()
    first, second, other = (method(seed).tensors() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["network.text"], other["network.text"])


def test_the_remembered_blocks_are_the_third_and_the_eighth_of_twelve() -> None:
    from anomalyst.features.backbones import REGISTRY, find_backbone

    assert AnoPle.default_layers(REGISTRY["clip-vit-b-16-plus-240"]) == (2, 7)
    assert AnoPle.default_layers(REGISTRY["clip-vit-l-14"]) == (5, 15)
    assert AnoPle.default_layers(find_backbone(CLIP)) == (0, 1)


def test_the_recipe_is_plain_adamw() -> None:
    options = AnoPleOptions(weight_decay=0.3)
    optimizer = options.optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 0.3
    assert options.planned_steps(4, 4) == 100 and options.clip == 1.0
    assert options.rate(9, 100) == options.rate(10, 100) == 1e-3
