"""WinCLIP and WinCLIP+: CLIP looks at windows of an image, and sentences say which are damaged.

Jeong et al., "WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation", CVPR 2023. There is
no official code; "community" below is what re-implementations do.

1. Text: 7 normal and 4 abnormal states of the product's name, each in 22 templates. ``t+`` and
   ``t-`` are the means of the unit vectors of all normal and all abnormal sentences, themselves
   brought to unit length. ``s(f) = softmax(100 [<f, t+>, <f, t->])[-]`` of a unit vector f.
2. Windows: every 2 x 2 and every 3 x 3 patches, stride 1. The transformer sees a window's patches
   only, with the positions that they have in the image, and a CLS token, whose end is the window's
   embedding. CLS of the whole image gives the image score.
3. Text map: at each patch the harmonic mean of the ``s`` of the windows that cover it, one map a
   side; then the harmonic mean of both maps and the image score.
4. WinCLIP+, with references: banks of the embeddings of either side and of the patches of the
   penultimate block; ``d = 1/2 min (1 - cos)`` to the bank. Memory map: the mean of the three. The
   map is text map + memory map, the image score the mean of the text's and the largest of the
   memory map.

``fusion = community`` takes for the text map ``1 - 1 / mean (1 / (1 - s))``, the mean over the
windows that cover a patch and then over both sides, and joins it with the memory map as
``1 / (1 / text + 1 / memory)``.

``windows = shared`` is ours, not the paper's: see `SharedWinClipTower`.

Where our specification of the paper says nothing: the sentences end with a full stop; a patch takes
the plain mean of the ``d`` of its windows (in a harmonic mean one window that equals a reference
would set all its patches to 0, whatever the others see).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.features.clip import ClipText, ClipTower, Grid, Hook, patch_map, run_blocks
from anomalyst.features.towers import Tower
from anomalyst.methods.base import Method, MethodOptions
from anomalyst.methods.class_names import Names, class_name
from anomalyst.methods.memory_bank import Banks, nearest_cosine, to_map, to_patches
from anomalyst.methods.prompt_sentences import ABNORMAL_STATES, NORMAL_STATES, sentences

SIDES = (2, 3)
"""Patches along a window."""

_SCALE = 100.0
_TOKENS = 4096  # that go through the transformer at once: 60 MB of the widest layer of ViT-B/16+
_Values = TypeVar("_Values", float, Tensor)


# ---- images -------------------------------------------------------------------------------------


class WinClipTower(ClipTower):
    """What WinCLIP takes from an image, each window passed through the transformer on its own.

    The forward pass returns maps ``[B, D, h', w']`` of the embeddings of 2 x 2 and of 3 x 3
    windows, ``[B, C, h, w]`` of the tapped patches (several taps one behind the other) and
    ``[B, D, 1, 1]`` of the whole image. A side that a window is too long for is taken whole.
    """

    name = "winclip exact"

    def forward(self, images: Tensor) -> list[Tensor]:
        entering, grid = self.embed(images)
        windows = [window_patches(grid, side).to(images.device) for side in SIDES]
        tapped: dict[int, Tensor] = {}

        def tap(number: int, tokens: Tensor) -> Tensor:
            if number in self.layers:
                tapped[number] = tokens[:, 1 : 1 + grid[0] * grid[1]]
            return tokens

        ends = self.look(entering, windows, tap)
        embedded = functional.normalize(self.project(ends), dim=-1)
        grids: list[Grid] = [*((w.shape[0], w.shape[1]) for w in windows), (1, 1)]
        parts = torch.split(embedded, [down * across for down, across in grids], dim=1)
        *seen, whole = (patch_map(part, at) for part, at in zip(parts, grids, strict=True))
        patches = torch.cat([patch_map(tapped[layer], grid) for layer in self.layers], dim=1)
        return [*seen, patches, whole]

    def look(self, entering: Tensor, windows: Sequence[Tensor], tap: Hook) -> Tensor:
        """Return the last CLS ``[B, W + 1, C]`` of all windows, and of the whole image.

        Parameters
        ----------
        entering
            The image's tokens ``[B, 1 + N, C]``.
        windows
            See `window_patches`.
        tap
            Is shown the image's tokens behind every block.
        """
        whole = run_blocks(self.blocks, entering, hook=tap)[:, :1]
        return torch.cat([*(self._alone(entering, w.flatten(0, 1)) for w in windows), whole], dim=1)

    def _alone(self, entering: Tensor, windows: Tensor) -> Tensor:
        """Return the last CLS ``[B, W, C]`` of windows ``[W, n]``, each seen on its own."""
        count = 1 + windows.shape[1]
        portions: Sequence[Tensor] = [windows]  # a graph does not know yet how many there will be
        if not torch.compiler.is_compiling():
            portions = torch.split(windows, max(_TOKENS // (len(entering) * count), 1))
        ends = []
        for some in portions:
            cls = entering[:, None, :1].expand(-1, some.shape[0], -1, -1)
            tokens = torch.cat([cls, entering[:, 1 + some]], dim=2)  # (B, W, 1 + n, C)
            tokens = run_blocks(self.blocks[:-1], tokens.flatten(0, 1))
            last = _cls_behind(self.blocks[-1], tokens)
            ends.append(last.view(-1, some.shape[0], last.shape[1]))  # (B W, C) -> (B, W, C)
        return torch.cat(ends, dim=1)


class SharedWinClipTower(WinClipTower):
    """Windows at a small part of the price; ours, not WinCLIP's.

    One pass of the whole image, in which each window has a CLS token of its own: it branches off
    the image's behind two thirds of the blocks, and from there attends to the window's patches and
    to itself. The patches do not see these tokens, so that theirs is the plain pass. They have seen
    the rest of the image, though: the embeddings are not those of `WinClipTower`, save of a window
    that is the whole image.
    """

    name = "winclip shared"

    def look(self, entering: Tensor, windows: Sequence[Tensor], tap: Hook) -> Tensor:
        branch = len(self.blocks) * 2 // 3
        tokens = run_blocks(self.blocks[:branch], entering, hook=tap)
        mask = window_mask(windows, entering.shape[1])
        own = tokens[:, :1].expand(-1, mask.shape[0] - tokens.shape[1], -1)
        tokens = run_blocks(
            self.blocks[branch:],
            torch.cat([tokens, own], dim=1),
            mask=mask,
            hook=lambda number, tokens: tap(branch + number, tokens),
        )
        return torch.cat([tokens[:, entering.shape[1] :], tokens[:, :1]], dim=1)


def _cls_behind(block: Any, tokens: Tensor) -> Tensor:
    """Return CLS ``[B, C]`` behind a block that tokens ``[B, L, C]`` enter, and no other token."""
    normed = block.ln_1(tokens)
    cls = tokens[:, :1] + block.ls_1(block.attention(normed[:, :1], normed, normed))
    ended: Tensor = cls + block.ls_2(block.mlp(block.ln_2(cls)))
    return ended[:, 0]


def window_patches(grid: Grid, side: int) -> Tensor:
    """Return the patch numbers ``[h', w', n]`` of all square windows of a grid, stride 1."""
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    down, across = (min(side, length) for length in grid)
    height, width = grid[0] - down + 1, grid[1] - across + 1
    inside = [
        numbers[row : row + height, column : column + width]
        for row in range(down)
        for column in range(across)
    ]
    return torch.stack(inside, dim=2)


def window_mask(windows: Sequence[Tensor], image: int) -> Tensor:
    """Return what hides tokens from each other, ``[L, L]`` of 0 and -inf.

    ``image`` tokens, CLS and patches, see each other; a token of each window behind them sees that
    window's patches and itself.
    """
    device = windows[0].device
    patches = torch.arange(image - 1, device=device)
    # (h', w', n) -> (W, N), whether the window has the patch
    within = [(w.flatten(0, 1)[:, :, None] == patches).any(dim=1) for w in windows]
    numbers = torch.arange(image + sum(each.shape[0] for each in within), device=device)
    own = numbers[image:, None] == numbers[image:]
    seen = torch.cat([torch.zeros_like(own[:, :1]), torch.cat(within), own], dim=1)
    every = torch.cat([(numbers < image).expand(image, -1), seen])
    return torch.where(every, 0.0, -torch.inf)


# ---- the method ---------------------------------------------------------------------------------


class WinClipOptions(MethodOptions):
    """Options of WinCLIP."""

    zero_shot: bool = Field(False, description="fit enrols nothing: judge by name alone")
    names: Names = Field({}, description="words for categories: CATEGORY:WORDS,CATEGORY:WORDS")
    windows: Literal["exact", "shared"] = Field(
        "exact", description="shared: ours, one pass an image instead of one a window"
    )
    fusion: Literal["paper", "community"] = Field(
        "paper", description="how window scores, image score and memory become a map"
    )


class WinClip(Method):
    """Zero-shot by the product's name, few-shot with references of it too; nothing is trained."""

    name: ClassVar[str] = "winclip"
    Options: ClassVar[type[MethodOptions]] = WinClipOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"image_size": 240, "square": True}
    }
    options: WinClipOptions
    _text: ClipText

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        # Windows of one kind are not compared with those of the other: their names differ.
        kinds = [*(f"{self.options.windows}{side}" for side in SIDES), "patches"]
        self._banks = {kind: Banks() for kind in kinds}
        self._directions: dict[str, Tensor] = {}

    @classmethod
    def default_layers(cls, backbone: BackboneSpec) -> tuple[int, ...]:
        return (max(backbone.taps - 2, 0),)

    @classmethod
    def make_tower(
        cls, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int]
    ) -> Tower:
        shared = cast(WinClipOptions, options).windows == "shared"
        return (SharedWinClipTower if shared else WinClipTower)(backbone, layers)

    def bind(self, tower: Tower) -> None:
        self._text = cast(ClipTower, tower).text

    @property
    def judges_unseen(self) -> bool:
        return self.options.zero_shot

    def require_name(self, category: str) -> None:
        self._text.tokenize(sentences(ABNORMAL_STATES, self._words(category)))

    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        for number, bank in enumerate(self._banks.values()):
            bank.add(category, torch.cat([_units(features[number]) for features in views]))

    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        *seen, patches, whole = features
        grid = (patches.shape[2], patches.shape[3])
        direction = self._direction(category)
        image = _logits(whole, direction).sigmoid()  # (B, 1, 1)
        logits = [_logits(maps, direction) for maps in seen]
        if self.options.fusion == "paper":
            text = harmonic_text_map([each.sigmoid() for each in logits], image, grid)
        else:
            text = community_text_map([(-each).sigmoid() for each in logits], grid)
        if not self._remembers(category):
            return text, image[:, 0, 0]
        memory = self._memory_map([*seen, patches], category, grid)
        score = (image[:, 0, 0] + memory.amax(dim=(1, 2))) / 2
        return self._join(text, memory), score

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        found = {"direction": self._direction(category)}
        if self._remembers(category):
            found |= {kind: bank[category] for kind, bank in self._banks.items()}
        return found

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._directions = {self._words(category): references["direction"]}
        for kind, bank in self._banks.items():
            bank.load({category or "": references[kind]} if kind in references else {})

    def heat_unit(self, category: str | None) -> float:
        return self._join(0.5, 0.25) if self._remembers(category) else 0.5

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{category}": rows
            for kind, bank in self._banks.items()
            for category, rows in bank.tensors().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in self._banks}
        for name, rows in tensors.items():
            kind, _, category = name.partition(".")
            if kind not in found:
                raise InputError(
                    f"the references were not enrolled with windows={self.options.windows}: "
                    "enroll them anew, or leave that option as it was"
                )
            found[kind][category] = rows
        for kind, bank in self._banks.items():
            bank.load(found[kind])

    def _words(self, category: str | None) -> str:
        return class_name(category, self.options.names, self.name)

    def _direction(self, category: str | None) -> Tensor:
        """Return ``t- - t+`` ``[D]`` of a category."""
        words = self._words(category)
        if words not in self._directions:
            normal, abnormal = (
                prototype(self._text, sentences(states, words))
                for states in (NORMAL_STATES, ABNORMAL_STATES)
            )
            self._directions[words] = abnormal - normal
        return self._directions[words]

    def _remembers(self, category: str | None) -> bool:
        """Whether there are references to compare with."""
        return category in self._banks["patches"].categories

    def _memory_map(self, maps: Sequence[Tensor], category: str | None, grid: Grid) -> Tensor:
        """Return the mean ``[B, h, w]`` of the distances to the three banks."""
        found = []
        for bank, each in zip(self._banks.values(), maps, strict=True):
            distance, _ = nearest_cosine(_units(each), bank[category])
            found.append(spread(to_map(distance.clamp(min=0) / 2, each), grid))
        return torch.stack(found).mean(dim=0)

    def _join(self, text: _Values, memory: _Values) -> _Values:
        """Return the map with references."""
        if self.options.fusion == "paper":
            return text + memory
        return 1 / (1 / text + 1 / memory)


def prototype(text: ClipText, of: Sequence[str]) -> Tensor:
    """Return the mean ``[D]`` of sentences' unit vectors, of unit length too."""
    return functional.normalize(text.features(of).mean(dim=0), dim=0)


def _units(maps: Tensor) -> Tensor:
    return functional.normalize(to_patches(maps), dim=1)


def _logits(embedded: Tensor, direction: Tensor) -> Tensor:
    """Return ``[B, h', w']``, whose sigmoid is the softmax of both sentences' similarities."""
    return _SCALE * torch.einsum("bdhw,d->bhw", embedded, direction)


# ---- from windows to patches --------------------------------------------------------------------


def spread(values: Tensor, grid: Grid) -> Tensor:
    """Return at each patch the mean ``[B, h, w]`` of the windows ``[B, h', w']`` that cover it."""
    down, across = grid[0] - values.shape[1] + 1, grid[1] - values.shape[2] + 1
    both = torch.stack([values, torch.ones_like(values)], dim=1)  # (B, 2, h', w')
    around = functional.pad(both, (across - 1, across - 1, down - 1, down - 1))
    total, count = functional.avg_pool2d(around, (down, across), stride=1).unbind(dim=1)
    return total / count


def harmonic_text_map(scores: Sequence[Tensor], image: Tensor, grid: Grid) -> Tensor:
    """Return the harmonic mean ``[B, h, w]`` of each side's map and of the image score.

    ``scores`` are maps ``[B, h', w']`` of windows, one a side, and ``image`` is ``[B, 1, 1]``. A
    side's map is the harmonic mean of the windows that cover a patch.
    """
    inverse = [spread(1 / each, grid) for each in scores]
    return (1 + len(inverse)) / (torch.stack(inverse).sum(dim=0) + 1 / image)


def community_text_map(normal: Sequence[Tensor], grid: Grid) -> Tensor:
    """Return ``1 - 1 / mean (1 / normal)`` ``[B, h, w]`` of probabilities ``[B, h', w']``."""
    return 1 - 1 / torch.stack([spread(1 / each, grid) for each in normal]).mean(dim=0)
