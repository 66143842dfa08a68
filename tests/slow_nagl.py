"""NAGL written out once more from its specification, slowly, in NumPy's float64.

Nothing here calls the project's equations: only a network's weights and options are read. Every
token is projected, attention is textbook multi-head attention with a bias of the keys and a bias
of -inf outside of what may be looked at, and neighbours are found patch by patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from anomalyst.methods.nagl import Nagl, NaglNetwork, NaglOptions

WIDTH, STRIDE = 16, 14
PAPER: dict[str, Any] = {**Nagl.presets["paper"]["options"], "proxies": 5}
COMPAT: dict[str, Any] = {**Nagl.presets["compat"]["options"], "proxies": 5}
OURS: dict[str, Any] = {"proxies": 5}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Seeded standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def liven(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of ordinary size, so that no term hides behind another."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            noise = random(*parameter.shape, seed=1000 * seed + number)
            if name == "proxies":
                parameter.copy_(noise)
            elif name in ("gains", "logit"):
                parameter.add_(0.1 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("null"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.2 * noise)


def build(options: dict[str, Any], seed: int = 0, **changes: Any) -> NaglNetwork:
    """A network in float64 with lively weights."""
    network = NaglNetwork(WIDTH, NaglOptions(**{**options, **changes}), STRIDE).double()
    liven(network, seed)
    return network.eval()


class Part(NamedTuple):
    """Patches of an abnormal reference, their residuals, and what is mined, inside, healthy."""

    patches: np.ndarray
    residuals: np.ndarray
    kept: np.ndarray
    inside: np.ndarray
    healthy: np.ndarray


class Found(NamedTuple):
    """Scores ``[h, w]`` of one query, and on the way there P~ and P^ of each set of proxies."""

    fused: np.ndarray
    normal: np.ndarray
    abnormal: np.ndarray
    residual_proxies: list[np.ndarray]
    anomaly_proxies: list[np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 where one of the two is zero."""
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / lengths if lengths else 0.0


def tokens(maps: np.ndarray) -> np.ndarray:
    """Patches ``[N, C]`` of a map ``[C, h, w]``, row by row."""
    _, height, width = maps.shape
    return np.array([maps[:, r, c] for r in range(height) for c in range(width)])


def quantile(values: np.ndarray, share: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(np.floor(place))
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def softplus(x: float) -> float:
    return float(np.log1p(np.exp(x)))


def sine_code(height: int, width: int, channels: int) -> np.ndarray:
    """The code of sheet section 5 ``[N, C]``: half of the channels for y, then half for x."""
    half, found = channels // 2, []
    for row in range(1, height + 1):
        for column in range(1, width + 1):
            y, x = 2 * np.pi * row / (height + 1e-6), 2 * np.pi * column / (width + 1e-6)
            code = []
            for place in (y, x):
                for k in range(half):
                    angle = place * 10_000.0 ** (-2 * (k // 2) / half)
                    code.append(np.sin(angle) if k % 2 == 0 else np.cos(angle))
            found.append(code)
    return np.array(found)


def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between pixel centres, edges repeated, of a map ``[h, w]``."""
    height, width = maps.shape
    found = np.zeros(size)
    for i in range(size[0]):
        y = max((i + 0.5) * height / size[0] - 0.5, 0.0)
        for j in range(size[1]):
            x = max((j + 0.5) * width / size[1] - 0.5, 0.0)
            r, c = int(y), int(x)
            below, right = min(r + 1, height - 1), min(c + 1, width - 1)
            upper = maps[r, c] * (1 - (x - c)) + maps[r, right] * (x - c)
            lower = maps[below, c] * (1 - (x - c)) + maps[below, right] * (x - c)
            found[i, j] = upper * (1 - (y - r)) + lower * (y - r)
    return found


class Slow:
    """The network for one query, in loops over patches, heads and proxies."""

    def __init__(self, network: NaglNetwork) -> None:
        self.state = {k: v.detach().double().numpy() for k, v in network.state_dict().items()}
        self.options = network.options

    def attend(
        self, name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """LN(q + MHA(q, k, v)) where only ``seen`` tokens count, and unbiased logits [H, M, N]."""
        width = q.shape[1]
        weights = np.split(self.state[f"{name}.in_weight"], 3)
        biases = np.split(self.state[f"{name}.in_bias"], 3)
        bias = np.zeros(len(k)) if seen is None else np.where(seen, 0.0, -np.inf)
        if f"{name}.null" in self.state:
            null_key, null_value = self.state[f"{name}.null"]
            k, v, bias = np.vstack([k, null_key]), np.vstack([v, null_value]), np.append(bias, 0.0)
        query, key, value = (
            x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        size = width // self.options.heads
        parts, logits = [], []
        for h in range(self.options.heads):
            at = slice(h * size, (h + 1) * size)
            raw = query[:, at] @ key[:, at].T / np.sqrt(size)
            strength = np.exp(raw + bias - (raw + bias).max(1, keepdims=True))
            parts.append(strength / strength.sum(1, keepdims=True) @ value[:, at])
            logits.append(query[:, at] @ (key - biases[1])[:, at].T / np.sqrt(size))
        read = np.concatenate(parts, axis=1) @ self.state[f"{name}.out.weight"].T
        x = q + read + self.state[f"{name}.out.bias"]
        standard = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        fresh = standard * self.state[f"{name}.norm.weight"] + self.state[f"{name}.norm.bias"]
        given = len(k) - 1 if f"{name}.null" in self.state else len(k)
        return fresh, np.array(logits)[..., :given]

    def scaled(self, patches: np.ndarray) -> np.ndarray:
        if not self.options.unit_length:
            return patches
        return np.array([p * np.sqrt(len(p)) / np.sqrt(p @ p) for p in patches])

    def nearest(self, patches: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """S_n and residual of each patch."""
        s_n, residuals = [], []
        for patch in patches:
            likeness = [cosine(patch, other) for other in bank]
            s_n.append((1 - max(likeness)) / 2)
            inner = [float(patch @ other) for other in bank]
            by = likeness if self.options.matching == "cosine" else inner
            residuals.append(patch - bank[int(np.argmax(by))])
        return np.array(s_n), np.array(residuals)

    def part(self, maps: np.ndarray, coverage: np.ndarray, normal: np.ndarray) -> Part:
        patches = self.scaled(tokens(maps))
        s_n, residuals = self.nearest(patches, normal)
        height, width = coverage.shape
        inside = np.array([coverage[r, c] > 0 for r in range(height) for c in range(width)])
        marked = [(r, c) for r in range(height) for c in range(width) if coverage[r, c] > 0]
        healthy = np.array(
            [
                all(max(abs(r - i), abs(c - j)) > 1 for i, j in marked)
                for r in range(height)
                for c in range(width)
            ]
        )
        kept = inside.copy()
        if self.options.standing_out:
            limit = quantile(s_n[healthy] if healthy.any() else s_n, 0.95)
            kept = inside & (s_n > limit)
            if not kept.any():
                kept[max(np.flatnonzero(inside), key=lambda n: s_n[n])] = True
        return Part(patches, residuals, kept, inside, healthy)

    def mine(self, parts: Sequence[Part], grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """P~ of each abnormal reference, or of all of them as one."""
        found, proxies = [], self.state["proxies"]
        keys = [part.patches for part in parts]
        if self.options.positions == "grid":
            width = proxies.shape[1]
            keys = [k + sine_code(*g, width) for k, g in zip(keys, grids, strict=True)]
        values, seen = [p.residuals for p in parts], [p.kept for p in parts]
        groups = [[n] for n in range(len(parts))]
        if self.options.pooling == "joint":
            groups = [list(range(len(parts)))]
        for group in groups:
            k, v, s = (np.concatenate([x[n] for n in group]) for x in (keys, values, seen))
            x, _ = self.attend("mine_cross", proxies, k, v, s)
            found.append(self.attend("mine_self", x, x, x)[0])
        return found

    def evidence(
        self, q: np.ndarray, anomaly: np.ndarray, logits: np.ndarray, s_n: np.ndarray
    ) -> np.ndarray:
        """sigmoid(z) of each patch for one set of anomaly proxies."""
        contrast, attention, offset, sharpness = self.state["logit"]
        heads, count, number = logits.shape
        found = []
        for n in range(number):
            strong = [np.exp(cosine(q[n], p) * np.exp(sharpness)) for p in anomaly]
            best = np.log(np.mean(strong)) / np.exp(sharpness)
            seen = [
                np.log(np.mean([np.exp(logits[h, m, n]) for m in range(count)]))
                for h in range(heads)
            ]
            nearer = (1 + best) / 2 - (1 - s_n[n])
            z = contrast * nearer + attention * np.mean(seen) + offset
            found.append(1 / (1 + np.exp(-z)))
        return np.array(found)

    def rho(self, residuals: np.ndarray, known: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([max(cosine(r, other) for other in known) for r in residuals])

    def __call__(
        self,
        query: np.ndarray,
        normals: Sequence[np.ndarray],
        defects: Sequence[tuple[np.ndarray, np.ndarray, bool]],
    ) -> Found:
        """The scores of a map ``[C, h, w]``, given maps and (map, coverage, whether given)."""
        normal = self.scaled(np.concatenate([tokens(maps) for maps in normals]))
        parts = [self.part(maps, coverage, normal) for maps, coverage, _ in defects]
        trusted = [part for part, (_, _, given) in zip(parts, defects, strict=True) if given]
        if not self.options.healthy_parts:
            trusted = []
        bank = np.concatenate([normal, *(part.patches[part.healthy] for part in trusted)])
        mined = self.mine(parts, [coverage.shape for _, coverage, _ in defects])
        grid = query.shape[1:]
        q = self.scaled(tokens(query))
        s_n, _ = self.nearest(q, bank)
        _, residuals = self.nearest(q, normal)
        keys = residuals
        if self.options.positions == "grid":
            keys = residuals + sine_code(*grid, q.shape[1])
        s_a, learned = np.zeros(len(q)), []
        for proxies in mined:
            x, logits = self.attend("learn_cross", proxies, keys, q)
            anomaly = self.attend("learn_self", x, x, x)[0]
            learned.append(anomaly)
            if self.options.guidance == "sum":
                one = np.array([np.mean([(1 + cosine(f, p)) / 2 for p in anomaly]) for f in q])
            else:
                one = self.evidence(q, anomaly, logits, s_n)
            s_a = np.maximum(s_a, one)
        if self.options.guidance == "sum":
            fused = (s_n + s_a) / 2
        else:
            a, b = (softplus(x) for x in self.state["gains"])
            rho = self.rho(residuals, [r for p in parts for r in p.residuals[p.kept]])
            differences = [r for part in trusted for r in part.residuals[part.healthy]]
            if differences:
                rho = rho - self.rho(residuals, differences)
            fused = s_n * np.exp(a * rho + b * s_a)
        return Found(*(x.reshape(grid) for x in (fused, s_n, s_a)), mined, learned)
