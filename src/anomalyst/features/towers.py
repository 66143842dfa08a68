"""Image networks of timm and open_clip behind one face: images in, feature maps out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.features.folding import folded

_BEND = -0.75  # of torch's cubic kernel
_TABLES_KEPT = 16
_PROBE = 64  # side of the image that tells whether folding changed anything
_TOGETHER = 4  # images that a processor passes at a time: the maps of more leave its cache


class Tower(nn.Module, ABC):
    """A network without weights yet, cut after the last of ``layers``.

    Parameters
    ----------
    model
        The library's own module, whose tensor names weights files use.
    layers
        Taps, in the order in which their maps are returned.
    """

    name: str = ""
    """What the maps are, where they are not the layers' own: part of the feature cache's key."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(layers)

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return a feature map ``[B, C, h, w]`` for each layer, from images ``[B, 3, H, W]``."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the forward pass needs, by the library's names."""
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }

    def choose(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return from ``tensors`` those that `state` names, as float32 where they are floats.

        Raises
        ------
        ValueError
            One is missing or of another shape.
        """
        given = self.translate(tensors)
        chosen = {}
        for name, mine in self.state().items():
            if name not in given:
                raise ValueError(f"{name!r} is missing")
            found = given[name]
            if found.shape != mine.shape:
                raise ValueError(
                    f"{name!r} is {list(found.shape)} and should be {list(mine.shape)}"
                )
            if found.is_floating_point() and not found.isfinite().all():
                raise ValueError(f"{name!r} holds values that are no numbers")
            chosen[name] = (found.float() if found.is_floating_point() else found).contiguous()
        return chosen

    def translate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors under the names of this library; here they have them already."""
        return tensors

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `choose` returned, without a copy."""
        counters = {
            name: torch.tensor(0)
            for name in self.model.state_dict()
            if name.endswith("num_batches_tracked")
        }
        self.model.load_state_dict({**tensors, **counters}, assign=True)


class TokenTower(Tower):
    """A vision transformer whose position table stretches to any grid.

    The table is resized once a grid, bicubically without antialiasing, as the packaged ONNX graph
    does it. DINOv2's own code (scale off by 0.1 step) and timm's (antialiased) move AUROC and AP
    on bottle by less than 0.002.
    ``norm`` is applied to the last of all blocks, where that one is tapped.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], norm: bool) -> None:
        super().__init__(model, layers)
        self.norm = norm
        self._tables: dict[tuple[object, ...], Tensor] = {}

    @abstractmethod
    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the tokens ``[B, prefix + h * w, C]`` that enter the first block."""

    @abstractmethod
    def parts(self) -> tuple[Sequence[nn.Module], nn.Module, int, int]:
        """Return the blocks, the final norm, the patch side, the count of tokens before patches."""

    def forward(self, images: Tensor) -> list[Tensor]:
        blocks, norm, patch, prefix = self.parts()
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        tokens = self.embed(images, grid)
        found = {}
        for number, block in enumerate(blocks):
            tokens = block(tokens)
            if number in self.layers:
                found[number] = tokens
        if self.norm:
            found[len(blocks) - 1] = norm(tokens)
        # (B, prefix + N, C) -> (B, C, h, w), a view
        return [
            found[k][:, prefix:].transpose(1, 2).view(images.shape[0], -1, *grid)
            for k in self.layers
        ]

    def positions(
        self, table: Tensor, prefix: int, learned: tuple[int, int], grid: tuple[int, int]
    ) -> Tensor:
        """Return a position table ``[prefix + N, C]`` of one grid, resized to another."""
        if torch.compiler.is_compiling():  # a grid of symbols is none that a table could be kept of
            same = isinstance(grid[0], int) and learned == grid
            return table if same else _stretched(table, prefix, learned, grid)
        if learned == grid:
            return table
        key = (grid, table.device, table.dtype)
        if key not in self._tables:
            while len(self._tables) >= _TABLES_KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _stretched(table, prefix, learned, grid)
        return self._tables[key]


def _stretched(
    table: Tensor, prefix: int, learned: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    maps = table[prefix:].T.reshape(1, -1, *learned)  # (N, C) -> (1, C, h, w)
    if torch.compiler.is_compiling():  # ONNX Runtime's own way takes a third of a small ViT's time
        rows, columns = (_cubic(*sides) for sides in zip(learned, grid, strict=True))
        maps = rows @ maps @ columns.T
    else:
        maps = functional.interpolate(maps, size=grid, mode="bicubic")
    return torch.cat([table[:prefix], maps[0].flatten(1).T])


def _cubic(length: int, size: int) -> Tensor:
    """Return the matrix ``[size, length]`` by which torch's bicubic resizing changes one side."""
    steps = torch.arange(length)
    at = (torch.arange(size) + 0.5) * length / size - 0.5
    first = at.floor()
    matrix = torch.zeros(())
    for k in range(-1, 3):
        d = (at - first - k).abs()
        near = ((_BEND + 2) * d - (_BEND + 3)) * d * d + 1
        far = ((d - 5) * d + 8) * d * _BEND - 4 * _BEND
        here = (first + k).clamp(0, length - 1)[:, None] == steps
        matrix = matrix + torch.where(d <= 1, near, far)[:, None] * here
    return matrix


class TimmTokens(TokenTower):
    """timm's plain ``VisionTransformer``."""

    def parts(self) -> tuple[Sequence[nn.Module], nn.Module, int, int]:
        model: Any = self.model
        return model.blocks, model.norm, model.patch_embed.patch_size[0], model.num_prefix_tokens

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        model: Any = self.model
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = model.patch_embed.norm(patches)
        first = [token for token in (model.cls_token, model.reg_token) if token is not None]
        first = [token.expand(images.shape[0], -1, -1) for token in first]
        unplaced = 0 if model.no_embed_class else model.num_prefix_tokens
        learned = model.patch_embed.grid_size
        table = self.positions(model.pos_embed[0], unplaced, learned, grid)
        if model.no_embed_class:
            tokens = torch.cat([*first, tokens + table], dim=1)
        else:
            tokens = torch.cat([*first, tokens], dim=1) + table
        placed: Tensor = model.norm_pre(tokens)
        return placed

    def translate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not {"register_tokens", "cls_token", "pos_embed"} <= tensors.keys():
            return tensors
        # DINOv2's own files place the CLS token by the table, timm's in the token itself.
        table = tensors["pos_embed"]
        return {
            **tensors,
            "reg_token": tensors["register_tokens"],
            "cls_token": tensors["cls_token"] + table[:, :1],
            "pos_embed": table[:, 1:],
        }


class OpenClipTokens(TokenTower):
    """open_clip's own image transformer."""

    def parts(self) -> tuple[Sequence[nn.Module], nn.Module, int, int]:
        model: Any = self.model
        return model.transformer.resblocks, model.ln_post, model.patch_size[0], 1

    def embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        model: Any = self.model
        patches = model.conv1(images).flatten(2).transpose(1, 2)  # (B, N, C)
        first = model.class_embedding.expand(images.shape[0], 1, -1)
        table = self.positions(model.positional_embedding, 1, model.grid_size, grid)
        placed: Tensor = model.ln_pre(torch.cat([first, patches], dim=1) + table)
        return placed

    def translate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        start = "visual."
        mine = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        return mine or tensors


class StageTower(Tower):
    """Any other network of timm, through its own ``forward_intermediates``."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().__init__(model, layers)
        self._unfolded: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        return self._unfolded or super().state()

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        super().adopt(tensors)
        self._fold(tensors)
        # Convolutions are a third quicker where the channels of a pixel lie together.
        for each in self.model.modules():
            if isinstance(each, nn.Conv2d):
                each.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _fold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the network's batch norms into its convolutions, if the maps stay as they are."""
        given = self.model.eval()
        twin = folded(given)
        if twin is None:
            return
        probe = torch.linspace(-2, 2, 3 * _PROBE**2).reshape(1, 3, _PROBE, _PROBE)
        try:
            expected = self._maps(probe)
        except (AssertionError, RuntimeError):  # a few networks take no image that small
            return
        self.model = twin
        for mine, theirs in zip(self._maps(probe), expected, strict=True):
            if not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
                self.model = given
                return
        self._unfolded = dict(tensors)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._maps(images)
        parts = [self._maps(some) for some in torch.split(images, _TOGETHER)]
        return (
            parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        )

    def _maps(self, images: Tensor) -> list[Tensor]:
        model: Any = self.model
        ascending = sorted(self.layers)
        maps = model.forward_intermediates(
            images, indices=ascending, stop_early=True, intermediates_only=True
        )
        return [maps[ascending.index(layer)] for layer in self.layers]
