"""BLIP-Diffusion's Q-Former: an image as a few object tokens in the space of CLIP's words.

Li, Li, Hoi, "BLIP-Diffusion", NeurIPS 2023: learned queries read a frozen CLIP image tower through
a BERT-like stack, beside the subject's text. Here that text is always "object", as IIPAD (Lv, Su,
Xu, ICLR 2025) asks for it: of the word table only its rows are kept. Weights come from a local
copy of ``Salesforce/blipdiffusion``, whose tensor names the modules bear.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.weights import read_checkpoint

SUBJECT = (101, 4874, 102)
"""``[CLS] object [SEP]`` in the vocabulary of bert-base-uncased."""

_GIVE = "give the folder of Salesforce/blipdiffusion, or its qformer/"
_AGAIN = "copy the folder of Salesforce/blipdiffusion again"
_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"

# Of what config.json leaves out, the values of transformers 4.35.2, which IIPAD runs on.
_VISION: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "hidden_act": "gelu"}
_VISION |= {"num_hidden_layers": 39, "num_attention_heads": 16, "layer_norm_eps": 1e-6}
_VISION |= {"image_size": 224, "patch_size": 14}
_STACK: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "hidden_act": "gelu"}
_STACK |= {"num_hidden_layers": 12, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
_STACK |= {"vocab_size": 30522, "max_position_embeddings": 512, "encoder_hidden_size": 1408}
_STACK |= {"cross_attention_frequency": 2}


def _quick_gelu(values: Tensor) -> Tensor:
    return values * torch.sigmoid(1.702 * values)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu}
_ACTIVATIONS |= {"quick_gelu": _quick_gelu}


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Mix ``value`` ``[B, S, C]`` for each row of ``query`` ``[B, L, C]``, head by head."""
    # (B, L, C) -> (B, heads, L, d)
    apart = [rows.view(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (query, key, value)]
    mixed = functional.scaled_dot_product_attention(apart[0], apart[1], apart[2])
    return mixed.transpose(1, 2).flatten(2)  # -> (B, L, C)


class _Block(nn.Module):
    """CLIP's block: each norm ahead of its branch."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.activation = _ACTIVATIONS[config["hidden_act"]]
        joint, out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layer_norm1 = nn.LayerNorm(width, config["layer_norm_eps"])
        self.self_attn = nn.ModuleDict({"qkv": joint, "projection": out})
        self.layer_norm2 = nn.LayerNorm(width, config["layer_norm_eps"])
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.self_attn["qkv"](self.layer_norm1(tokens)).chunk(3, dim=-1)
        tokens = tokens + self.self_attn["projection"](_attend(query, key, value, self.heads))
        hidden = self.activation(self.mlp["fc1"](self.layer_norm2(tokens)))
        return torch.add(tokens, self.mlp["fc2"](hidden))


class _Vision(nn.Module):
    """Images ``[B, 3, H, W]`` to tokens ``[B, 1 + h * w, C]``, CLS first, the last norm applied."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps, patch = config["hidden_size"], config["layer_norm_eps"], config["patch_size"]
        count = 1 + (config["image_size"] // patch) ** 2
        blocks = nn.Sequential(*(_Block(config) for _ in range(config["num_hidden_layers"])))
        self.embeddings: Any = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.embeddings.position_embedding = nn.Parameter(torch.randn(1, count, width) * 0.02)
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps)
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.LayerNorm(width, eps)

    def forward(self, images: Tensor) -> Tensor:
        start = self.embeddings
        patches = start.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = torch.cat([start.class_embedding.expand(images.shape[0], -1, -1), patches], dim=1)
        tokens = self.encoder["layers"](self.pre_layernorm(tokens + start.position_embedding))
        seen: Tensor = self.post_layernorm(tokens)
        return seen


class _Closing(nn.ModuleDict):  # the end of each branch of BERT's: the norm behind the sum
    def __init__(self, hidden: int, config: Mapping[str, Any]) -> None:
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        super().__init__({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps)})

    def forward(self, branch: Tensor, tokens: Tensor) -> Tensor:
        closed: Tensor = self["LayerNorm"](self["dense"](branch) + tokens)
        return closed


class _Attention(nn.Module):
    def __init__(self, source: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        width: int = config["hidden_size"]
        self.heads: int = config["num_attention_heads"]
        sizes = {"query": width, "key": source, "value": source}
        self.attention = nn.ModuleDict({k: nn.Linear(size, width) for k, size in sizes.items()})
        self.output = _Closing(width, config)

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        query, key, value = (self.attention[name] for name in ("query", "key", "value"))
        mixed = _attend(query(tokens), key(source), value(source), self.heads)
        closed: Tensor = self.output(mixed, tokens)
        return closed


class _Layer(nn.Module):
    """Queries and text look at both, then the queries alone at the image; an MLP for each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, hidden = config["hidden_size"], config["intermediate_size"]
        self.activation = _ACTIVATIONS[config["hidden_act"]]
        self.attention = _Attention(width, config)
        self.crossattention = _Attention(config["encoder_hidden_size"], config)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output_query = _Closing(hidden, config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _Closing(hidden, config)

    def forward(self, tokens: Tensor, queries: int, seen: Tensor) -> Tensor:
        tokens = self.attention(tokens, tokens)
        asking, text = self.crossattention(tokens[:, :queries], seen), tokens[:, queries:]
        hidden = self.activation(self.intermediate_query["dense"](asking))
        asking = self.output_query(hidden, asking)
        text = self.output(self.activation(self.intermediate["dense"](text)), text)
        return torch.cat([asking, text], dim=1)  # (B, M + 3, C)


class QFormer(nn.Module):
    """The Q-Former with its image tower, frozen and without dropout; made by `from_folder`.

    Attributes
    ----------
    config
        The architecture: what counts of the hub's ``qformer/config.json``, for `from_config`.
    tokens, width, image_size
        Object tokens an image, M = 16, their channels, C = 768, and the images' side, 224.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        stack, vision = config["qformer_config"], config["vision_config"]
        self.tokens: int = config["num_query_tokens"]
        self.width: int = stack["hidden_size"]
        self.image_size: int = vision["image_size"]
        width, norm = self.width, nn.LayerNorm(self.width, stack["layer_norm_eps"])
        layers = nn.ModuleList(_Layer(stack) for _ in range(stack["num_hidden_layers"]))
        self.query_tokens = nn.Parameter(torch.randn(1, self.tokens, width) * 0.02)
        self.subject = nn.Parameter(torch.randn(1, len(SUBJECT), width) * 0.02)
        self.embeddings = nn.ModuleDict({"LayerNorm": norm})
        self.visual_encoder = _Vision(vision)
        self.encoder = nn.ModuleDict({"layer": layers})
        head = {"dense1": nn.Linear(width, 4 * width), "dense2": nn.Linear(4 * width, width)}
        self.proj_layer = nn.ModuleDict({**head, "LayerNorm": nn.LayerNorm(width, 1e-12)})
        self.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QFormer:
        """Return one with random weights, or within ``torch.device("meta")`` without any."""
        with torch.random.fork_rng(devices=()):
            return cls(_check(config, "config"))

    @classmethod
    def from_folder(cls, path: str | Path) -> QFormer:
        """Return that of a local copy of ``Salesforce/blipdiffusion`` or its ``qformer/``.

        Raises
        ------
        InputError
            There is no such folder, or it is not whole, or another network's.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; {_GIVE}")
        folder = folder / "qformer" if (folder / "qformer").is_dir() else folder
        config = _check(_read_json(folder / "config.json"), f"{folder / 'config.json'}")
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(_read_state(folder, model), assign=True)
        return model

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return object tokens ``[B, M, C]``, not normalised, without gradient.

        ``images`` are ``[B, 3, 224, 224]``, normalised with CLIP's mean and deviation.
        """
        side = self.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images are {list(images.shape)}, not [B, 3, {side}, {side}]")
        seen = self.visual_encoder(images)
        start = torch.cat([self.query_tokens, self.subject], dim=1)  # (1, M + 3, C)
        tokens = self.embeddings["LayerNorm"](start).expand(images.shape[0], -1, -1)
        for layer in self.encoder["layer"].children():
            tokens = layer(tokens, self.tokens, seen)
        queries, head = tokens[:, : self.tokens], self.proj_layer
        hidden = _quick_gelu(head["dense1"](head["LayerNorm"](queries)))
        return torch.add(queries, head["dense2"](hidden))


def _check(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return what counts of a config, with what it leaves out."""
    checked: dict[str, Any] = {"num_query_tokens": _value("num_query_tokens", config, 32, origin)}
    for name, defaults in (("vision_config", _VISION), ("qformer_config", _STACK)):
        part = config.get(name)
        if not isinstance(part, Mapping):
            raise InputError(f"{origin}: no config of a Q-Former, without {name!r}; {_GIVE}")
        checked[name] = {key: _value(key, part, value, origin) for key, value in defaults.items()}
    vision, stack = checked["vision_config"], checked["qformer_config"]
    if (
        stack["cross_attention_frequency"] != 1
        or stack["encoder_hidden_size"] != vision["hidden_size"]
        or any(part["hidden_size"] % part["num_attention_heads"] for part in (vision, stack))
        or stack["vocab_size"] <= max(SUBJECT)
    ):
        raise InputError(f"{origin}: not the config of BLIP-Diffusion's Q-Former; {_GIVE}")
    return checked


def _value(key: str, given: Mapping[str, Any], default: Any, origin: str) -> Any:
    value = given.get(key, default)
    fits = type(value) is type(default)
    if not fits or not (value in _ACTIVATIONS if isinstance(value, str) else value > 0):
        raise InputError(f"{origin}: {key} cannot be {value!r}; {_GIVE}")
    return value


def _read_state(folder: Path, model: QFormer) -> dict[str, Tensor]:
    """Return a model's tensors from the folder, in float32, all there and of the right shapes."""
    stack = model.config["qformer_config"]
    wanted = {k: list(v.shape) for k, v in model.state_dict().items() if k != "subject"}
    wanted[_WORDS] = [stack["vocab_size"], model.width]
    wanted[_POSITIONS] = [stack["max_position_embeddings"], model.width]
    found = {k: v for file in _find_files(folder) for k, v in _read_tensors(file, wanted).items()}
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{folder}: tensor {name!r} is missing; {_AGAIN}")
        if list(found[name].shape) != shape:
            sizes = f"{list(found[name].shape)} and should be {shape}"
            raise InputError(f"{folder}: tensor {name!r} is {sizes}; {_GIVE}")
    words = found.pop(_WORDS)[list(SUBJECT)] + found.pop(_POSITIONS)[: len(SUBJECT)]
    return {**found, "subject": words[None]}


def _find_files(folder: Path) -> list[Path]:
    """Return the first form of weights that the folder has: one file, or all its shards."""
    for path in (folder / name for name in _FILES):
        shards = sorted(folder.glob(f"{path.stem}-*-of-*{path.suffix}"))
        if path.is_file() or shards:
            return [path] if path.is_file() else shards
    raise InputError(f"{folder}: no weights ({', '.join(_FILES)}); {_AGAIN}")


def _read_tensors(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    mapped = file.suffix == ".safetensors"
    try:
        tensors = load_file(file) if mapped else read_checkpoint(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); {_AGAIN}") from None
    # Copied off the mapped file: whoever overwrites it must not change a running detector.
    chosen = {name: tensors[name] for name in names if name in tensors}
    return {name: found.to(torch.float32, copy=mapped) for name, found in chosen.items()}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file.parent}: no {file.name}; {_GIVE}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # the last: JSON, but no table
        raise InputError(f"{file}: not a whole JSON file ({error}); {_AGAIN}") from None
