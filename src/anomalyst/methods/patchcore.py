r"""PatchCore: a memory bank of locally aware patches, thinned to a coreset.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265.

1. Locally aware patch features (eqs. 1-2): every position of a feature map is averaged with its
   p x p neighbourhood; maps of deeper layers are brought to the first one's grid and stacked; more
   than ``dimension`` channels are pooled down to that.
2. Memory bank: all such patches of the normal images, thinned by greedy k-centre (eq. 5) to a share
   ``coreset``; the selection runs on a random projection to ``projection`` dimensions (Johnson-
   Lindenstrauss), the bank keeps the full patches.
3. Patch score: Euclidean distance to the nearest bank patch (eq. 6).
4. Image score: the largest patch score. With ``reweight = b`` it is multiplied by
   :math:`1 - e^{\|m^{test}-m^*\|} / \sum_{m \in N_b(m^*)} e^{\|m^{test}-m\|}` (eq. 7).

Where paper and official code differ: the code has no re-weighting and squares the distances (same
ranking of patches); here the paper's distances, and the code's image score unless ``reweight`` is
given. The official code pools the neighbourhood and the channels in one flattened step, which mixes
a channel with its neighbour in layer 2; here they are two steps. The official coreset leaves its
random starting patches out of the bank; here the first pick is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.methods.bank_search import NO_GRAPH, BankSearch, Search
from anomalyst.methods.base import Method, MethodOptions
from anomalyst.methods.coreset import thin_out
from anomalyst.methods.memory_bank import Banks, resize_like, to_map, to_patches


class PatchCoreOptions(MethodOptions):
    """Options of PatchCore."""

    coreset: float = Field(0.1, gt=0, le=1, description="share of the patches kept in the bank")
    neighbourhood: int = Field(3, ge=1, description="side p of the averaged neighbourhood, odd")
    dimension: int = Field(1024, ge=1, description="channels are pooled down to at most so many")
    projection: int = Field(128, ge=1, description="dimensions in which the coreset is selected")
    reweight: int = Field(0, ge=0, description="neighbours b of eq. 7; 0 or 1: largest patch score")
    search: Search = Field("exact", description="approximate: through an index, of a large bank")


class PatchCore(Method):
    """PatchCore over any backbone; layers 2 and 3 of a wide ResNet-50 as in the paper."""

    name: ClassVar[str] = "patchcore"
    Options: ClassVar[type[MethodOptions]] = PatchCoreOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"backbone": "wide-resnet50", "image_size": 224, "resize": 256}
    }
    options: PatchCoreOptions

    def __init__(
        self, options: MethodOptions, backbone: BackboneSpec, layers: Sequence[int], seed: int
    ) -> None:
        super().__init__(options, backbone, layers, seed)
        if self.options.neighbourhood % 2 == 0:
            raise InputError(
                f"option neighbourhood={self.options.neighbourhood} of patchcore: "
                "give an odd number, so that the patch is its middle"
            )
        self._banks = Banks()
        self._search = BankSearch(self._banks, self.options.search, "euclidean", seed)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Return locally aware patch features ``[B, D, h, w]`` on the first layer's grid."""
        side = self.options.neighbourhood
        local = [functional.avg_pool2d(maps, side, 1, side // 2) for maps in features]
        stacked = resize_like(local)
        if stacked.shape[1] <= self.options.dimension:
            return stacked
        rows = to_patches(stacked)
        pooled = functional.adaptive_avg_pool1d(rows[:, None], self.options.dimension)[:, 0]
        batch, _, height, width = stacked.shape
        return pooled.reshape(batch, height, width, -1).permute(0, 3, 1, 2)  # -> (B, D, h, w)

    def enroll(self, category: str, views: Sequence[Sequence[Tensor]]) -> None:
        patches = torch.cat([to_patches(self.embed(features)) for features in views])
        count = max(int(len(patches) * self.options.coreset), 1)
        kept = thin_out(patches, count, self.options.projection, self.seed)
        self._banks.add(category, patches[kept])

    def score(self, features: Sequence[Tensor], category: str | None) -> tuple[Tensor, Tensor]:
        embedded = self.embed(features)
        queries, bank = to_patches(embedded), self._banks[category]
        distance, index = self._search.nearest(queries, category)
        maps = to_map(distance, embedded)
        highest, patch = maps.flatten(1).max(dim=1)
        if self.options.reweight < 2:
            return maps, highest
        first = torch.arange(maps.shape[0], device=maps.device) * (maps.shape[1] * maps.shape[2])
        return maps, highest * self._weight(queries[first + patch], index[first + patch], bank)

    def _weight(self, patches: Tensor, neighbours: Tensor, bank: Tensor) -> Tensor:
        """Return eq. 7's factor ``[B]`` in [0, 1) for the highest-scoring patches ``[B, D]``."""
        count = min(self.options.reweight, bank.shape[0])
        near = bank[neighbours] @ bank.T - bank.square().sum(1) / 2
        around = near.topk(count).indices  # (B, b)
        distance = (patches[:, None] - bank[around]).norm(dim=2)  # (B, b)
        nearest = (patches - bank[neighbours]).norm(dim=1)
        return 1 - torch.exp(nearest - distance.logsumexp(dim=1))

    @property
    def obstacle(self) -> str | None:
        return NO_GRAPH if self.options.search == "approximate" else None

    def references(
        self, category: str | None, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        return {"bank": self._banks[category]}

    def take(self, category: str | None, references: Mapping[str, Tensor]) -> None:
        self._banks.load({category or "": references["bank"]})

    def heat_unit(self, category: str | None) -> float:
        return float(self._banks[category].norm(dim=1).mean()) / 2

    def tensors(self) -> dict[str, Tensor]:
        return self._search.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._search.load(tensors)
