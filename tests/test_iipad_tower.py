"""What IIPAD takes from the frozen networks: V-V attention, CLS, object tokens, the text tower."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.detector import Detector
from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.features.clip import local_path
from anomalyst.features.extractor import Backbone
from anomalyst.features.qformer import QFormer
from anomalyst.methods.iipad import Iipad, IipadOptions
from anomalyst.methods.iipad_tower import IipadMaps, IipadTower, quarters
from conftest import CLIP, SHARED, TINY_CLIP, blot, texture

Build = Callable[..., Backbone]
KINDS = ("heads", "kmeans", "random", "qformer")
QFORMER = {
    "num_query_tokens": 5,
    "vision_config": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
    },
    "qformer_config": {
        "hidden_size": 48,
        "intermediate_size": 10,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "encoder_hidden_size": 12,
        "vocab_size": 4880,
        "max_position_embeddings": 6,
        "cross_attention_frequency": 1,
    },
}


def write_qformer(folder: Path, width: int = 48) -> Path:
    """A tiny Q-Former with random weights in the form of the hub's folder."""
    config = {**QFORMER, "qformer_config": {**QFORMER["qformer_config"], "hidden_size": width}}
    state = QFormer.from_config(config).state_dict()
    del state["subject"]
    words = {"embeddings.word_embeddings.weight": torch.randn(4880, width)}
    words["embeddings.position_embeddings.weight"] = torch.randn(6, width)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**state, **words}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def qformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qformer(tmp_path_factory.mktemp("blip") / "qformer")


@pytest.fixture
def build(clip_weights: str, qformer_folder: Path) -> Build:
    """The frozen networks of some options."""

    def make(**options: object) -> Backbone:
        if options.get("object_tokens") == "qformer":
            options["qformer"] = str(qformer_folder)
        chosen = IipadOptions(**options)
        layers = Iipad.default_layers(find_backbone(CLIP))
        make = partial(Iipad.make_tower, chosen)
        return Backbone.load(CLIP, layers, weights=clip_weights, make=make)

    return make


@pytest.fixture
def stock(clip_weights: str) -> open_clip.CLIP:
    """open_clip's own network with the same weights."""
    model = open_clip.CLIP(**TINY_CLIP).eval()
    model.load_state_dict(load_file(clip_weights.removeprefix("file:")))
    return model


def images(count: int = 3, height: int = 80, width: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, height, width, generator=generator)


def seen(backbone: Backbone, batch: Tensor) -> IipadMaps:
    return IipadMaps.of(backbone(batch), len(backbone.layers))


# ---- the image tower ----------------------------------------------------------------------------


def test_the_layers_are_the_papers() -> None:
    spec = find_backbone("clip-vit-l-14")
    assert [layer + 1 for layer in Iipad.default_layers(spec)] == [6, 12, 18, 24]
    tower = Iipad.make_tower(IipadOptions(), spec, (5, 23))
    assert isinstance(tower, IipadTower)
    assert tower.start + 1 == 6 and [layer + 1 for layer in tower.memory_layers] == [6, 18]
    assert quarters(1) == (0, 0, 0, 0) and quarters(4) == (0, 1, 2, 3)


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="the reference values are not here")
def test_the_streams_are_the_authors(tmp_path: Path) -> None:
    golden = {k: torch.from_numpy(v) for k, v in np.load(SHARED / "golden/iipad_vv.npz").items()}
    vision = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 6, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "golden-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "golden-clip.json")
    tensors = open_clip.CLIP(**config).state_dict()
    for name, value in golden.items():
        if name.startswith("param/"):
            tensors[name.replace("param/", "visual.")] = value
    tower = IipadTower(find_backbone("open_clip:golden-clip"), (3, 4, 5), "random", ln_post=False)
    tower.start, tower.memory_layers = 3, (3, 5)
    tower.adopt(tower.choose(tensors))
    with torch.no_grad():
        found = IipadMaps.of(tower(golden["image"]), 3)
    as_map = lambda tokens: tokens[:, 1:].mT.reshape(2, -1, 4, 4)  # noqa: E731
    for number, local in zip((4, 5, 6), found.local, strict=True):
        expected = as_map(golden[f"vv/layer_{number}_projected"])
        torch.testing.assert_close(local, expected, rtol=1e-5, atol=1e-5)
    for number, original in zip((4, 6), found.original, strict=True):
        expected = as_map(golden[f"vv/layer_{number}_original_stream"])
        torch.testing.assert_close(original, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.cls[..., 0, 0], golden["vv/cls_unnormalised"], rtol=1e-5, atol=1e-5
    )


def test_cls_is_clips_own_image_embedding(build: Build, stock: open_clip.CLIP) -> None:
    with torch.no_grad():
        expected = stock.encode_image(images())
    torch.testing.assert_close(seen(build(), images()).cls[..., 0, 0], expected, atol=1e-4, rtol=0)
    raw = seen(build(ln_post=False), images()).cls
    assert not torch.allclose(raw[..., 0, 0], expected, atol=1e-2)


def test_the_local_stream_sums_up_attention_alone(build: Build) -> None:
    """Equal queries, keys and values make both attentions one; the stream has no MLP."""
    tower = build().tower
    tokens, _ = tower.embed(images())
    with torch.no_grad():
        for block in tower.blocks:
            for table in (block.attn.in_proj_weight, block.attn.in_proj_bias):
                table.copy_(table.chunk(3)[2].repeat(3, *[1] * (table.ndim - 1)))
        entering, local, streams = tokens, tokens, local_path(tower.blocks, tokens, 0)
        for block, (plain, stream) in zip(tower.blocks, streams, strict=True):
            read = block.ln_1(entering)
            added = block.attn(read, read, read, need_weights=False)[0]
            local = local + added
            torch.testing.assert_close(stream, local, atol=1e-5, rtol=1e-5)
            entering = plain


def test_exported_layers_differ_and_the_weights_stay(build: Build) -> None:
    backbone = build()
    before = {name: tensor.clone() for name, tensor in backbone.state().items()}
    found = seen(backbone, images(1, 128, 160))
    assert found.local[0].shape == (1, 48, 8, 10) and found.original[0].shape == (1, 64, 8, 10)
    kept = [m for maps in (found.local, found.original) for m in maps]
    for k, one in enumerate(kept):
        for other in kept[k + 1 :]:
            assert one.shape != other.shape or not torch.allclose(one, other, atol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state().items())


def test_what_the_options_change_is_in_the_caches_key(build: Build) -> None:
    keys = {build(object_tokens=kind).identity for kind in KINDS} | {build(ln_post=False).identity}
    assert len(keys) == 5


# ---- object tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_object_tokens_keep_their_contract(build: Build, kind: str) -> None:
    backbone = build(object_tokens=kind)
    source = backbone.tower.objects
    batch = images(3, 80, 112)
    tokens = seen(backbone, batch).objects
    assert tokens.shape == (3, 48, source.count, 1) and not tokens.requires_grad
    assert torch.equal(tokens, seen(backbone, batch).objects)
    alone = torch.cat([seen(backbone, one[None]).objects for one in batch])
    torch.testing.assert_close(tokens, alone, atol=1e-5, rtol=1e-4)
    swapped = seen(backbone, batch.flip(0)).objects
    torch.testing.assert_close(tokens, swapped.flip(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-2)
    if kind != "qformer":
        words = backbone.tower.model.token_embedding.weight.norm(dim=1).mean()
        torch.testing.assert_close(tokens.norm(dim=1), words.expand(3, source.count, 1))


def test_head_tokens_are_what_each_head_looks_at(build: Build) -> None:
    """Against torch's own attention weights, CLS to the patches alone."""
    tower = build().tower
    tokens, _ = tower.embed(images(1))
    with torch.no_grad():
        for block in tower.blocks[:-1]:
            tokens = block(tokens)
        last = tower.blocks[-1]
        read = last.ln_1(tokens)
        torchs = nn.MultiheadAttention(read.shape[2], last.attn.num_heads, batch_first=True)
        torchs.load_state_dict(last.attn.state_dict())
        _, paid = torchs(read, read, read, average_attn_weights=False)
        share = functional.normalize(paid[0, :, 0, 1:], p=1, dim=1)  # (heads, N)
        mixed = share @ last(tokens)[0, 1:]
        expected = functional.normalize(tower.project(mixed), dim=1)
        found = functional.normalize(IipadMaps.of(tower(images(1)), 4).objects[0, ..., 0].T, dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_clusters_find_the_groups_of_patches(build: Build) -> None:
    """Patches in 16 tight groups: the tokens are the groups' directions, nearest to CLS first."""
    from anomalyst.features.object_tokens import ClusterTokens, Seen

    tower = build().tower
    generator = torch.Generator().manual_seed(0)
    directions = functional.normalize(torch.randn(16, 48, generator=generator), dim=1)
    tower.project = lambda tokens: tokens
    noisy = directions.repeat(3, 1) + 0.01 * torch.randn(48, 48, generator=generator)
    leaving = torch.cat([torch.zeros(1, 48), noisy[torch.randperm(48, generator=generator)]])[None]
    cls = directions[3] + 0.5 * directions[7]
    found = ClusterTokens()(tower, Seen(images(1), leaving, leaving, cls[None]))[0]
    alike = functional.normalize(found, dim=1) @ directions.T
    assert sorted(alike.argmax(1).tolist()) == list(range(16)) and alike.amax(1).min() > 0.99
    assert alike[0].argmax() == 3


def test_fewer_kinds_of_patches_than_clusters_leave_no_token_empty(build: Build) -> None:
    from anomalyst.features.object_tokens import ClusterTokens, Seen

    tower = build().tower
    tower.project = lambda tokens: tokens
    leaving = torch.eye(48)[[0, 1, 1, 2, 2, 2, 2, 1, 0]][None]
    found = ClusterTokens()(tower, Seen(images(1), leaving, leaving, torch.eye(48)[:1]))
    assert found.norm(dim=-1).min() > 0.9 * found.norm(dim=-1).max()


def test_the_qformer_gets_images_as_it_knows_them(build: Build) -> None:
    """Of its own size, normalised with OpenAI's statistics, whatever CLIP's are."""
    from anomalyst.features.backbones import OPENAI_CLIP
    from anomalyst.features.object_tokens import QFormerTokens, Seen

    class Eye:
        tokens, image_size = 5, 32

        def __call__(self, batch: Tensor) -> Tensor:
            self.given = batch
            return torch.zeros(len(batch), 5, 48)

    tower, eye = build().tower, Eye()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    tower.spec = replace(tower.spec, mean=mean, std=std)
    gray, empty = torch.tensor([0.7, 0.2, 0.9])[:, None, None], torch.zeros(1, 2, 3)
    batch = ((gray - column(mean)) / column(std)).expand(1, 3, 80, 96)
    QFormerTokens(eye)(tower, Seen(batch, empty, empty, empty[0]))
    expected = ((gray - column(OPENAI_CLIP[0])) / column(OPENAI_CLIP[1])).expand(1, 3, 32, 32)
    torch.testing.assert_close(eye.given, expected, atol=1e-5, rtol=1e-5)


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


# ---- the Q-Former in a bundle -------------------------------------------------------------------


def qformer_detector(clip_weights: str, folder: object) -> Detector:
    options = {
        "object_tokens": "qformer",
        "qformer": folder and str(folder),
        "steps": 2,
        "batch_size": 2,
    }
    return Detector("iipad", backbone=CLIP, weights=clip_weights, image_size=80, options=options)


def test_a_bundle_holds_the_qformer(
    clip_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anomalyst.types import Sample
    from conftest import save

    folder = write_qformer(tmp_path / "blip" / "qformer")
    samples = [Sample(save(tmp_path / f"{k}.png", texture(k)), "plate", 0) for k in range(3)]
    detector = qformer_detector(clip_weights, folder.parent).fit(samples, calibration=0)
    detector.save(tmp_path / "bundle")
    for file in folder.iterdir():
        file.unlink()
    pictures = [texture(9), blot(texture(9), 30, 30, 20)]
    loaded = Detector.load(tmp_path / "bundle")
    for one, two in zip(detector.predict(pictures), loaded.predict(pictures), strict=True):
        assert one.score == two.score
        np.testing.assert_array_equal(one.map, two.map)
    loaded.save(tmp_path / "again")
    assert Detector.load(tmp_path / "again").categories == ("plate",)


def test_a_qformer_that_does_not_fit_is_named(clip_weights: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"give qformer=FOLDER"):
        _ = qformer_detector(clip_weights, None).engine
    with pytest.raises(InputError, match="no such folder"):
        _ = qformer_detector(clip_weights, tmp_path / "nothing").engine
    narrow = write_qformer(tmp_path / "narrow", 24)
    with pytest.raises(InputError, match=r"24 channels, words of open_clip:tiny-clip 48"):
        _ = qformer_detector(clip_weights, narrow).engine
    options = {"qformer": "somewhere"}
    detector = Detector("iipad", backbone=CLIP, weights=clip_weights, options=options)
    with pytest.raises(InputError, match="set object_tokens=qformer too"):
        _ = detector.engine
