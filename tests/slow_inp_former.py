"""INP-Former written out once more from its specification, slowly, in NumPy's float64.

Nothing here calls the project: only a network's weights and options are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import erf
from torch import Tensor, nn

from anomalyst.methods.inp_former import InpFormerOptions, InpNetwork


def random(*shape: int, seed: int = 0) -> Tensor:
    """Seeded standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def liven(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of ordinary size, so that no term hides behind another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("tokens"):
                parameter.copy_(noise)
            elif ("norm" in name and name.endswith("weight")) or name.endswith("scale"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise)


def build(width: int = 12, heads: int = 3, **options: object) -> InpNetwork:
    """A network in float64 with lively weights."""
    network = InpNetwork(width, heads, InpFormerOptions(**options), 0).double()
    liven(network)
    return network


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class Slow:
    """The whole network in loops over images, heads, tokens and prototypes."""

    def __init__(self, network: InpNetwork, heads: int) -> None:
        self.state = {k: v.detach().double().numpy() for k, v in network.state_dict().items()}
        self.options = network.options
        self.heads = heads

    # ---- layers -------------------------------------------------------------------------------

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.options.bare:
            return x
        mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        standard = (x - mean) / np.sqrt(variance + 1e-8)
        return standard * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        return x if self.options.bare else self.linear(f"{name}.attn.proj", x)

    def projections(
        self, name: str, x: np.ndarray, source: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """q, k and v of every head: contiguous slices of the channels, keys before values."""
        width = x.shape[1]
        q, kv = self.linear(f"{name}.attn.q", x), self.linear(f"{name}.attn.kv", source)
        k, v = kv[:, :width], kv[:, width:]
        return list(zip(*(np.split(part, self.heads, axis=1) for part in (q, k, v)), strict=True))

    def softmax_read(self, name: str, x: np.ndarray, source: np.ndarray) -> np.ndarray:
        parts = []
        for q, k, v in self.projections(name, x, source):
            strength = np.exp(q @ k.T / np.sqrt(q.shape[1]))
            parts.append(strength / strength.sum(1, keepdims=True) @ v)
        return self.project(name, np.concatenate(parts, axis=1))

    # ---- parts --------------------------------------------------------------------------------

    def prototypes(self, tokens: np.ndarray) -> np.ndarray:
        start = self.state["extractor.tokens"]
        name = "extractor"
        a, b = self.norm(f"{name}.norm1", start), self.norm(f"{name}.norm1", tokens)
        x = start + self.softmax_read(name, a, b)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def weights(self, name: str, x: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
        """ReLU weights ``[H, N, M]`` of a guided block."""
        a, b = self.norm(f"{name}.norm1", x), self.norm(f"{name}.norm1", prototypes)
        found = np.zeros((self.heads, len(x), len(prototypes)))
        for h, (q, k, _) in enumerate(self.projections(name, a, b)):
            for n in range(len(x)):
                for m in range(len(prototypes)):
                    if self.options.similarity == "dot":
                        likeness = q[n] @ k[m]
                    else:
                        likeness = self.state[f"{name}.scale"][h, 0, 0] * cosine(q[n], k[m])
                    found[h, n, m] = max(likeness, 0.0)
        return found

    def combination(self, name: str, x: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
        """What a guided block's attention gives: the sum over prototypes, then the projection."""
        weights = self.weights(name, x, prototypes)
        b = self.norm(f"{name}.norm1", prototypes)
        parts = []
        for h, (_, _, v) in enumerate(self.projections(name, b, b)):
            part = np.zeros((len(x), v.shape[1]))
            for n in range(len(x)):
                for m in range(len(prototypes)):
                    part[n] += weights[h, n, m] * v[m]
            parts.append(part)
        return self.project(name, np.concatenate(parts, axis=1))

    def block(self, name: str, x: np.ndarray, prototypes: np.ndarray | None) -> np.ndarray:
        if prototypes is None:
            inside = self.norm(f"{name}.norm1", x)
            y = kept = x + self.softmax_read(name, inside, inside)
        else:
            y = self.combination(name, x, prototypes)
            kept = x if self.options.skip == "input" else y
        return kept + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", y))

    # ---- whole images -------------------------------------------------------------------------

    def fuse(self, taps: Sequence[np.ndarray]) -> np.ndarray:
        """Tokens ``[N, C]`` of the eight taps ``[C, h, w]`` of one image."""
        total = np.sum(taps, axis=0)
        fused = total if self.options.fusion == "sum" else total / len(taps)
        return fused.reshape(len(fused), -1).T

    def targets(self, taps: Sequence[np.ndarray]) -> list[np.ndarray]:
        size = len(taps) // self.options.groups
        return [np.mean(taps[k : k + size], axis=0) for k in range(0, len(taps), size)]

    def outputs(self, taps: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Every decoder block's tokens ``[N, C]``, in the order in which the blocks run."""
        tokens = self.fuse(taps)
        prototypes = self.prototypes(tokens) if self.options.prototypes else None
        x, found = self.mlp("bottleneck", tokens), []
        for k in range(self.options.decoder_blocks):
            x = self.block(f"decoder.{k}", x, prototypes)
            found.append(x)
        return found

    def rebuilt(self, taps: Sequence[np.ndarray]) -> list[np.ndarray]:
        last_first = self.outputs(taps)[::-1]
        size = len(last_first) // self.options.groups
        means = [np.mean(last_first[k : k + size], 0) for k in range(0, len(last_first), size)]
        return [mean.T.reshape(taps[0].shape) for mean in means]

    def distances(self, tokens: np.ndarray) -> np.ndarray:
        """Each token's cosine distance to the nearest prototype."""
        prototypes = self.prototypes(tokens)
        return np.array([min(1 - cosine(t, p) for p in prototypes) for t in tokens])

    def score_map(self, taps: Sequence[np.ndarray]) -> np.ndarray:
        """Mean over groups of each position's cosine distance, ``[h, w]``."""
        _, height, width = taps[0].shape
        pairs = list(zip(self.targets(taps), self.rebuilt(taps), strict=True))
        found = np.zeros((height, width))
        for i in range(height):
            for j in range(width):
                found[i, j] = np.mean([1 - cosine(e[:, i, j], r[:, i, j]) for e, r in pairs])
        return found

    def losses(self, images: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        """Values of the losses of a batch of images, each given by its eight taps."""
        whole = [
            1 - cosine(e.ravel(), r.ravel())
            for taps in images
            for e, r in zip(self.targets(taps), self.rebuilt(taps), strict=True)
        ]
        found = {"soft_mining": float(np.mean(whole)), "loss": float(np.mean(whole))}
        if self.options.prototypes:
            tokens = [self.fuse(taps) for taps in images]
            found["coherence"] = float(np.mean([self.distances(t) for t in tokens]))
            found["loss"] += self.options.coherence * found["coherence"]
        return found
