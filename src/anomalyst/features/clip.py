"""Both towers of a frozen CLIP, opened up: prompts at every block, local attention, free slots.

For open_clip's own transformers (class ``CLIP``); others have no such parts to reach into. The
weights never change, but gradients pass through them to whatever is put in from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import BackboneSpec
from anomalyst.features.libraries import make_clip
from anomalyst.features.towers import OpenClipTokens, Tower

TEXT = "token_embedding.weight"
"""A tensor that only files with a text tower have."""

Grid = tuple[int, int]
Hook = Callable[[int, Tensor], Tensor]
"""Called with a block's number from 0 and its output; what it returns goes on."""


def run_blocks(
    blocks: Sequence[Any],
    tokens: Tensor,
    prompts: Mapping[int, Tensor] | None = None,
    first: int = 0,
    mask: Tensor | None = None,
    hook: Hook | None = None,
) -> Tensor:
    """Pass tokens ``[B, L, C]`` through blocks, deep prompts put in on the way.

    Parameters
    ----------
    prompts
        By the number of a block from 0, ``[n, C]`` or ``[B, n, C]``: they overwrite the rows
        ``first`` to ``first + n`` that enter it. At blocks without any the rows go on as the
        blocks left them (the rule of MaPLe, Khattak et al., CVPR 2023).
    mask
        Added to the attention's logits, ``[L, L]``.
    """
    for number, block in enumerate(blocks):
        if prompts is not None and number in prompts:
            tokens = overwrite(tokens, first, prompts[number])
        tokens = block(tokens, attn_mask=mask)
        if hook is not None:
            tokens = hook(number, tokens)
    return tokens


def overwrite(tokens: Tensor, first: int, rows: Tensor) -> Tensor:
    """Return tokens ``[B, L, C]`` with ``rows`` ``[n, C]`` or ``[B, n, C]`` from ``first`` on."""
    put = rows.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :first], put, tokens[:, first + put.shape[1] :]], dim=1)


def local_path(
    blocks: Sequence[Any], tokens: Tensor, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the original and the local stream ``[B, L, C]`` behind every block.

    From block ``start`` on, the local stream adds up value-value attention (CLIP Surgery, Li et
    al. 2023, in AnomalyCLIP's form): ``u += Out(softmax(v v' / sqrt(d)) v)``, no MLP, v taken of
    the original stream, which goes on as ever. Before that block the two are one.
    """
    local = tokens
    for number, block in enumerate(blocks):
        if number < start:
            tokens = local = block(tokens)
        else:
            tokens, added = _both_attentions(block, tokens)
            local = local + added  # a new tensor: what was yielded before stays as it was
        yield tokens, local


def _both_attentions(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's output and what value-value attention adds to the local stream."""
    query, key, value = block.attn.split(block.ln_1(tokens))
    plain, local = (
        block.ls_1(block.attn.join(mixed))
        for mixed in (
            functional.scaled_dot_product_attention(query, key, value),
            functional.scaled_dot_product_attention(value, value, value),
        )
    )
    tokens = tokens + plain
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens))), local


def patch_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Return patch tokens ``[B, h * w, C]`` as a map ``[B, C, h, w]``, a view."""
    return tokens.transpose(1, 2).view(tokens.shape[0], -1, *grid)


def abnormal_share(likeness: Tensor, temperature: float) -> Tensor:
    """Return P(abnormal) of likenesses ``[..., 2]`` to a normal and an abnormal text."""
    return ((likeness[..., 1] - likeness[..., 0]) / temperature).sigmoid()


class ClipText:
    """The text tower, for sentences and for sequences with free slots.

    Parameters
    ----------
    model
        A `open_clip.CLIP`.
    tokenizer
        Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cached: dict[str, Tensor] = {}

    @property
    def context(self) -> int:
        """Tokens that a sequence may have, start and end included: 77."""
        return int(self._model.positional_embedding.shape[0])

    @property
    def room(self) -> int:
        """Tokens that a text itself may have."""
        return self.context - 2  # start and end

    def count(self, text: str) -> int:
        """Return how many tokens a text has, start and end left out."""
        return len(self._tokenizer.encode(text))

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self._model.positional_embedding.shape[1])

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self._model.transformer.resblocks)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return token numbers ``[N, context]``: start, words, end, zeros.

        Raises
        ------
        InputError
            A text has more tokens than the context holds; it says how many.
        """
        for text in texts:
            count = self.count(text)
            if count > self.room:
                raise InputError(
                    f"text {text!r} has {count} tokens, CLIP reads {self.room} at most: shorten it"
                )
        ids: Tensor = self._tokenizer(list(texts), context_length=self.context)
        return ids.to(self._model.positional_embedding.device)

    def tokenize_short(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token numbers ``[N, L]`` up to the last end, and each text's end ``[N]``."""
        ids = self.tokenize(texts)
        ends = ids.argmax(1)  # the end token has the highest number
        return ids[:, : int(ends.max()) + 1], ends

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings ``[N, L, C]`` of token numbers, positions not added yet."""
        embedded: Tensor = self._model.token_embedding(ids)
        return embedded

    def encode(
        self, embeddings: Tensor, ends: Tensor, prompts: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pass sequences through the tower.

        Parameters
        ----------
        embeddings
            ``[N, L, C]``, L the context or less.
        ends
            Position ``[N]`` of each sequence's end token. Attention is causal: nothing behind it
            counts, so that L need not be more than the last of them.
        prompts
            By block, the rows ``[n, C]`` that it gets from position 1 on; see `run_blocks`.

        Returns
        -------
        tuple of Tensor
            The sequences ``[N, D]``, not normalised, and their tokens ``[N, L, C]`` after the last
            norm, not projected.
        """
        model, length = self._model, embeddings.shape[1]
        placed = embeddings + model.positional_embedding[:length].to(embeddings.dtype)
        ahead = torch.full((length, length), -torch.inf, device=placed.device).triu(1)
        tokens = run_blocks(model.transformer.resblocks, placed, prompts, 1, ahead)
        tokens = model.ln_final(tokens)
        last = tokens[torch.arange(tokens.shape[0], device=tokens.device), ends]
        projection = model.text_projection
        projected = projection(last) if isinstance(projection, nn.Module) else last @ projection
        return projected, tokens

    def features(self, texts: Sequence[str]) -> Tensor:
        """Return one unit vector ``[N, D]`` a sentence; each is computed once."""
        return functional.normalize(self.vectors(texts), dim=1)

    @torch.no_grad()
    def vectors(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Return one vector ``[N, D]`` a sentence, as long as it comes; each is computed once."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._cached]
        for first in range(0, len(unknown), batch):
            part = unknown[first : first + batch]
            ids, ends = self.tokenize_short(part)
            found, _ = self.encode(self.embed(ids), ends)
            self._cached |= zip(part, found, strict=True)
        return torch.stack([self._cached[text] for text in texts])


class ClipTower(Tower):
    """Both towers of a CLIP, for methods that run them with prompts of their own.

    The forward pass hands over the images as they are; subclasses give what a method can take
    from the frozen image tower once and for all.

    Attributes
    ----------
    text
        The text tower.
    """

    name = "pixels"

    def __init__(self, spec: BackboneSpec, layers: Sequence[int]) -> None:
        model, tokenizer = make_clip(spec)
        super().__init__(model, layers)
        self.spec = spec
        self.tokens = OpenClipTokens(model.visual, layers, norm=False)
        self.text = ClipText(model, tokenizer)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]

    @property
    def blocks(self) -> Sequence[Any]:
        """The image tower's blocks."""
        model: Any = self.model
        blocks: Sequence[Any] = model.visual.transformer.resblocks
        return blocks

    @property
    def joint_width(self) -> int:
        """Channels of what images and texts share."""
        model: Any = self.model
        return int(model.visual.proj.shape[1])

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Return the tokens ``[B, 1 + h * w, C]``, CLS first, that enter block 0, and (h, w)."""
        model: Any = self.model
        down, across = model.visual.patch_size
        grid = (images.shape[2] // down, images.shape[3] // across)
        return self.tokens.embed(images, grid), grid

    def project(self, tokens: Tensor) -> Tensor:
        """Return tokens ``[..., C]`` of any block in the joint space ``[..., D]``, any length."""
        model: Any = self.model
        projected: Tensor = model.visual.ln_post(tokens) @ model.visual.proj
        return projected

    def translate(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if TEXT not in tensors:
            raise ValueError("the text tower is missing; a whole CLIP is needed here")
        return tensors


class AroundClip(nn.Module):
    """A network around a frozen CLIP, which moves with it but is no part of its weights."""

    def __init__(self, tower: ClipTower) -> None:
        super().__init__()
        self._frozen = (tower,)  # in a tuple, so that it is neither trained nor saved

    @property
    def clip(self) -> ClipTower:
        """The frozen towers."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.clip._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
