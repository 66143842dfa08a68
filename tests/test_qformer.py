"""BLIP-Diffusion's Q-Former against plain loops, and diffusers' own where that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.features.qformer import SUBJECT, QFormer

Array = NDArray[np.float64]
Change = Callable[[dict[str, Tensor]], object]

CONFIG: dict[str, Any] = {
    "num_query_tokens": 3,
    "vision_config": {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 8,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 0.01,
    },
    "qformer_config": {
        "hidden_size": 8,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 12,
        "vocab_size": 4880,
        "max_position_embeddings": 6,
        "cross_attention_frequency": 1,
        "layer_norm_eps": 0.02,
    },
}
# What the hub's own differs in from transformers' defaults, after diffusers' conversion script.
HUB: dict[str, Any] = {
    "num_query_tokens": 16,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "hidden_act": "quick_gelu",
    },
    "qformer_config": {
        "encoder_hidden_size": 1024,
        "vocab_size": 30523,
        "cross_attention_frequency": 1,
    },
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors at the sizes of `CONFIG`."""
    found = {"query_tokens": (1, 3, 8), "embeddings.word_embeddings.weight": (4880, 8)}
    found |= {"embeddings.position_embeddings.weight": (6, 8)}
    linears: dict[str, tuple[int, int]] = {"proj_layer.dense1": (32, 8)}
    linears |= {"proj_layer.dense2": (8, 32)}
    norms = {"embeddings.LayerNorm": 8, "proj_layer.LayerNorm": 8}
    eye = "visual_encoder"
    found[f"{eye}.embeddings.class_embedding"] = (1, 1, 12)
    found[f"{eye}.embeddings.position_embedding"] = (1, 5, 12)
    found[f"{eye}.embeddings.patch_embedding.weight"] = (12, 3, 4, 4)
    norms |= {f"{eye}.pre_layernorm": 12, f"{eye}.post_layernorm": 12}
    for number in range(2):
        block, layer = f"{eye}.encoder.layers.{number}", f"encoder.layer.{number}"
        norms |= {f"{block}.layer_norm1": 12, f"{block}.layer_norm2": 12}
        linears |= {f"{block}.self_attn.qkv": (36, 12), f"{block}.self_attn.projection": (12, 12)}
        linears |= {f"{block}.mlp.fc1": (20, 12), f"{block}.mlp.fc2": (12, 20)}
        for name, source in (("attention", 8), ("crossattention", 12)):
            linears[f"{layer}.{name}.attention.query"] = (8, 8)
            linears[f"{layer}.{name}.attention.key"] = (8, source)
            linears[f"{layer}.{name}.attention.value"] = (8, source)
            linears[f"{layer}.{name}.output.dense"] = (8, 8)
            norms[f"{layer}.{name}.output.LayerNorm"] = 8
        for kind in ("", "_query"):
            linears[f"{layer}.intermediate{kind}.dense"] = (10, 8)
            linears[f"{layer}.output{kind}.dense"] = (8, 10)
            norms[f"{layer}.output{kind}.LayerNorm"] = 8
    found |= {f"{name}.weight": shape for name, shape in linears.items()}
    found |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    found |= {f"{name}.{kind}": (n,) for name, n in norms.items() for kind in ("weight", "bias")}
    return found


def draw(name: str, size: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Random values with which every part of the network tells in what comes out."""
    norm = "norm" in name.lower() and name.endswith("weight")
    spread = 0.2 if len(size) == 1 else 0.5
    return torch.randn(size, generator=random) * spread + (1 if norm else 0)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    return {name: draw(name, size, random) for name, size in shapes().items()}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def lay(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write a copy of the hub repository's folder and return its root."""
    (folder / "qformer").mkdir(parents=True)
    (folder / "qformer" / "config.json").write_text(json.dumps(config or CONFIG))
    save_file(tensors, folder / "qformer" / "model.safetensors")
    return folder


# ---- the computation, in plain loops ------------------------------------------------------------


class Slow:
    """The Q-Former a row and a head at a time, in float64, on the checkpoint's tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: value.double().numpy() for name, value in tensors.items()}

    def linear(self, row: Array, name: str) -> Array:
        found: Array = self.tensors[f"{name}.weight"] @ row + self.tensors[f"{name}.bias"]
        return found

    def norm(self, row: Array, name: str, eps: float) -> Array:
        centred = row - row.mean()
        scaled = centred / np.sqrt((centred**2).mean() + eps)
        found: Array = scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]
        return found

    def see(self, image: Array) -> list[Array]:
        """Return CLS and patches behind the image tower."""
        eye, t = "visual_encoder", self.tensors
        kernel = t[f"{eye}.embeddings.patch_embedding.weight"]
        rows = [t[f"{eye}.embeddings.class_embedding"][0, 0]]
        for top in (0, 4):
            for left in (0, 4):
                patch = image[:, top : top + 4, left : left + 4]
                rows.append(np.array([(each * patch).sum() for each in kernel]))
        places = t[f"{eye}.embeddings.position_embedding"][0]
        rows = [row + place for row, place in zip(rows, places, strict=True)]
        rows = [self.norm(row, f"{eye}.pre_layernorm", 0.01) for row in rows]
        for number in range(2):
            name = f"{eye}.encoder.layers.{number}"
            normed = [self.norm(row, f"{name}.layer_norm1", 0.01) for row in rows]
            joint = [self.linear(row, f"{name}.self_attn.qkv") for row in normed]
            query, key, value = ([row[k * 12 : k * 12 + 12] for row in joint] for k in range(3))
            mixed = attend(query, key, value, heads=3)
            for k, row in enumerate(mixed):
                rows[k] = rows[k] + self.linear(row, f"{name}.self_attn.projection")
                hidden = self.norm(rows[k], f"{name}.layer_norm2", 0.01)
                hidden = quick_gelu(self.linear(hidden, f"{name}.mlp.fc1"))
                rows[k] = rows[k] + self.linear(hidden, f"{name}.mlp.fc2")
        return [self.norm(row, f"{eye}.post_layernorm", 0.01) for row in rows]

    def attention(self, rows: list[Array], source: list[Array], name: str) -> list[Array]:
        query = [self.linear(row, f"{name}.attention.query") for row in rows]
        key = [self.linear(row, f"{name}.attention.key") for row in source]
        value = [self.linear(row, f"{name}.attention.value") for row in source]
        mixed = attend(query, key, value, heads=2)
        return [
            self.close(new, old, f"{name}.output") for new, old in zip(mixed, rows, strict=True)
        ]

    def close(self, branch: Array, row: Array, name: str) -> Array:
        return self.norm(self.linear(branch, f"{name}.dense") + row, f"{name}.LayerNorm", 0.02)

    def __call__(self, image: Array) -> Array:
        t, seen = self.tensors, self.see(image)
        words, places = (t[f"embeddings.{k}_embeddings.weight"] for k in ("word", "position"))
        rows = [*t["query_tokens"][0]]
        rows += [words[101] + places[0], words[4874] + places[1], words[102] + places[2]]
        rows = [self.norm(row, "embeddings.LayerNorm", 0.02) for row in rows]
        for number in range(2):
            name = f"encoder.layer.{number}"
            rows = self.attention(rows, rows, f"{name}.attention")
            rows[:3] = self.attention(rows[:3], seen, f"{name}.crossattention")
            for k, row in enumerate(rows):
                kind = "_query" if k < 3 else ""
                hidden = gelu(self.linear(row, f"{name}.intermediate{kind}.dense"))
                rows[k] = self.close(hidden, row, f"{name}.output{kind}")
        found = []
        for row in rows[:3]:
            normed = self.norm(row, "proj_layer.LayerNorm", 1e-12)
            hidden = quick_gelu(self.linear(normed, "proj_layer.dense1"))
            found.append(row + self.linear(hidden, "proj_layer.dense2"))
        return np.array(found)


def attend(query: list[Array], key: list[Array], value: list[Array], heads: int) -> list[Array]:
    size = len(query[0]) // heads
    mixed = []
    for asked in query:
        parts = []
        for head in range(heads):
            mine = slice(head * size, head * size + size)
            scores = np.array([asked[mine] @ row[mine] / size**0.5 for row in key])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            parts.append(sum(w * row[mine] for w, row in zip(weights, value, strict=True)))
        mixed.append(np.concatenate(parts))
    return mixed


def gelu(row: Array) -> Array:
    return np.array([x * (1 + erf(x / 2**0.5)) / 2 for x in row])


def quick_gelu(row: Array) -> Array:
    found: Array = row / (1 + np.exp(-1.702 * row))
    return found


def test_object_tokens_are_those_of_plain_loops(
    tmp_path: Path, tensors: dict[str, Tensor], images: Tensor
) -> None:
    model = QFormer.from_folder(lay(tmp_path / "copy", tensors))
    assert (model.tokens, model.width, model.image_size) == (3, 8, 8)
    found = model(images)
    assert found.shape == (2, 3, 8)
    slow = Slow(tensors)
    expected = np.stack([slow(image.double().numpy()) for image in images])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # the image matters
    assert np.abs(expected[0, 0] - expected[0, 1]).max() > 0.1  # and the query


def test_it_is_frozen_and_no_mode_changes_it(images: Tensor) -> None:
    model = QFormer.from_config(CONFIG)
    found = model(images.requires_grad_())
    images.requires_grad_(False)
    assert not found.requires_grad
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.train()(images), found, atol=0, rtol=0)


def test_an_image_has_the_same_tokens_alone(images: Tensor) -> None:
    model = QFormer.from_config(CONFIG)
    torch.testing.assert_close(model(images)[1:], model(images[1:]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(2, 3, 8, 12), (2, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_size_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images are .* not \[B, 3, 8, 8\]"):
        QFormer.from_config(CONFIG)(torch.zeros(size))


# ---- making and reading -------------------------------------------------------------------------


def test_the_hubs_config_gives_the_published_size() -> None:
    with torch.device("meta"):
        model = QFormer.from_config(HUB)
    assert (model.tokens, model.width, model.image_size) == (16, 768, 224)
    counts = {name: each.numel() for name, each in model.named_parameters()}
    tower = sum(count for name, count in counts.items() if name.startswith("visual_encoder."))
    tables = (30523 + 512 - 3) * 768  # of words and positions, but for the subject's rows
    assert round(tower / 1e6) == 291
    assert round((sum(counts.values()) - tower + tables) / 1e6) == 203


def test_random_weights_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    QFormer.from_config(CONFIG)
    assert torch.equal(before, torch.get_rng_state())


def test_the_state_goes_into_one_of_its_config(
    tmp_path: Path, tensors: dict[str, Tensor], images: Tensor
) -> None:
    model = QFormer.from_folder(lay(tmp_path / "copy", tensors))
    config = json.loads(json.dumps(model.config))
    again = QFormer.from_config(config)
    again.load_state_dict(model.state_dict())
    with torch.device("meta"):
        bare = QFormer.from_config(config)
    bare.load_state_dict(model.state_dict(), assign=True)
    assert config == again.config == bare.config
    assert torch.equal(again(images), model(images))
    assert torch.equal(bare(images), model(images))


def test_every_form_of_the_folder_gives_the_same(
    tmp_path: Path, tensors: dict[str, Tensor], images: Tensor
) -> None:
    root = lay(tmp_path / "copy", tensors)
    expected = QFormer.from_folder(root)(images)
    folder, one = root / "qformer", root / "qformer" / "model.safetensors"
    assert torch.equal(QFormer.from_folder(str(folder))(images), expected)

    one.rename(folder / "diffusion_pytorch_model.safetensors")
    assert torch.equal(QFormer.from_folder(root)(images), expected)

    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(QFormer.from_folder(root)(images), expected)

    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:40], names[40:]), 1):
        shard = folder / f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, shard)
    assert torch.equal(QFormer.from_folder(root)(images), expected)


def test_weights_in_half_precision_are_taken_as_float32(
    tmp_path: Path, tensors: dict[str, Tensor], images: Tensor
) -> None:
    half = {name: value.half() for name, value in tensors.items()}
    whole = {name: value.float() for name, value in half.items()}
    found = QFormer.from_folder(lay(tmp_path / "half", half))
    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
    assert torch.equal(found(images), QFormer.from_folder(lay(tmp_path / "whole", whole))(images))


def test_only_the_subjects_rows_of_the_words_are_kept(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    state = QFormer.from_folder(lay(tmp_path / "copy", tensors)).state_dict()
    words = tensors["embeddings.word_embeddings.weight"][list(SUBJECT)]
    places = tensors["embeddings.position_embeddings.weight"][:3]
    assert torch.equal(state.pop("subject")[0], words + places)
    assert state.keys() == {name for name in tensors if "_embeddings" not in name}


CROSS = "encoder.layer.1.crossattention.attention.key.weight"
WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CROSS), f"tensor '{CROSS}' is missing; copy the folder"),
        (lambda t: t.pop(WORDS), f"tensor '{WORDS}' is missing; copy the folder"),
        (
            lambda t: t.update({CROSS: torch.zeros(8, 16)}),
            rf"tensor '{CROSS}' is \[8, 16\] and should be \[8, 12\]; give the folder",
        ),
        (
            lambda t: t.update({WORDS: torch.zeros(4900, 8)}),
            rf"tensor '{WORDS}' is \[4900, 8\] and should be \[4880, 8\]; give the folder",
        ),
    ],
)
def test_a_tensor_at_fault_is_named(
    tmp_path: Path, tensors: dict[str, Tensor], change: Change, message: str
) -> None:
    mine = dict(tensors)
    change(mine)
    root = lay(tmp_path / "copy", mine)
    with pytest.raises(InputError, match=message) as caught:
        QFormer.from_folder(root)
    assert str(caught.value).startswith(f"{root / 'qformer'}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_at_fault_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    def said() -> str:
        with pytest.raises(InputError) as caught:
            QFormer.from_folder(tmp_path / "copy")
        assert str(tmp_path / "copy") in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder; give the folder of Salesforce/blipdiffusion" in said()
    (tmp_path / "copy").mkdir()
    assert "no config.json; give the folder" in said()
    config = lay(tmp_path / "copy", tensors) / "qformer" / "config.json"
    config.write_text('{"vision_config": {')
    assert "not a whole JSON file" in said()
    config.write_text("[1, 2]")
    assert "not a whole JSON file" in said()
    config.write_text('{"vision_config": {}}')
    assert "without 'qformer_config'; give the folder" in said()
    config.write_text(json.dumps(CONFIG))
    weights = config.with_name("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a whole safetensors file" in said()
    weights.unlink()
    assert "no weights (model.safetensors, " in said()
    config.with_name("pytorch_model.bin").write_bytes(b"no checkpoint")
    assert "not a checkpoint of plain tensors" in said()


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("qformer_config", "hidden_size", "8", "hidden_size cannot be '8'"),
        ("qformer_config", "num_hidden_layers", 0, "num_hidden_layers cannot be 0"),
        ("vision_config", "hidden_act", "silu", "hidden_act cannot be 'silu'"),
        ("vision_config", "layer_norm_eps", None, "layer_norm_eps cannot be None"),
        ("vision_config", "num_attention_heads", 5, "not the config of BLIP-Diffusion's"),
        ("qformer_config", "cross_attention_frequency", 2, "not the config of BLIP-Diffusion's"),
        ("qformer_config", "encoder_hidden_size", 8, "not the config of BLIP-Diffusion's"),
        ("qformer_config", "vocab_size", 4874, "not the config of BLIP-Diffusion's"),
    ],
)
def test_another_networks_config_is_refused(
    part: str, key: str, value: object, message: str
) -> None:
    config = {**CONFIG, part: {**CONFIG[part], key: value}}
    with pytest.raises(InputError, match=f"config: {message}.*; give the folder"):
        QFormer.from_config(config)


# ---- the original -------------------------------------------------------------------------------


def vocabulary(folder: Path) -> Path:
    """A folder with as much of bert-base-uncased's vocabulary as the text "object" needs."""
    named = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 4874: "object"}
    folder.mkdir()
    words = [named.get(number, f"[unused{number}]") for number in range(4875)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_object_tokens_are_those_of_diffusers(tmp_path: Path, images: Tensor) -> None:
    """The original writes the folder itself; its tokenizer reads a local vocabulary."""
    original = pytest.importorskip(
        "diffusers.pipelines.blip_diffusion.modeling_blip2", exc_type=ImportError
    )
    transformers = pytest.importorskip("transformers")
    config = transformers.Blip2Config(**CONFIG, tokenizer=str(vocabulary(tmp_path / "words")))
    random = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=()):
        model = original.Blip2QFormerModel(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = draw(name, parameter.shape, random)
    model.save_pretrained(tmp_path / "qformer")
    with torch.no_grad():
        expected = model(image_input=images, text_input=["object"] * 2, return_dict=False)
    found = QFormer.from_folder(tmp_path)(images)
    print(f"largest difference from diffusers: {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1
