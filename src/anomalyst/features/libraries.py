"""What timm and open_clip know of their networks, and the networks themselves, without weights.

Networks are made on torch's meta device, which costs no memory, no time and no random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from anomalyst.errors import InputError
from anomalyst.features.attention import write_out
from anomalyst.features.backbones import OPENAI_CLIP, BackboneSpec
from anomalyst.features.towers import OpenClipTokens, StageTower, TimmTokens, Tower

_NO_TAG: dict[str, Any] = {"mean": OPENAI_CLIP[0], "std": OPENAI_CLIP[1], "hf_hub": ""}


def make_tower(spec: BackboneSpec, layers: Sequence[int]) -> Tower:
    """Return the network of a record, cut after the last of ``layers``, on the meta device."""
    last = max(layers)
    norm = spec.final_norm and last == spec.taps - 1
    if spec.library == "open_clip":
        visual = _make_open_clip(spec.architecture)
        visual.transformer.resblocks = visual.transformer.resblocks[: last + 1]
        write_out(visual.transformer.resblocks)
        visual.proj = visual.attn_pool = None
        visual.ln_post = visual.ln_post if norm else nn.Identity()
        return OpenClipTokens(visual, layers, norm)
    model = _make_timm(spec.architecture)
    model.prune_intermediate_layers([last], prune_norm=not norm, prune_head=True)
    if _is_plain(model):
        return TimmTokens(model, layers, norm)
    return StageTower(model, layers)


def _make_timm(name: str) -> Any:
    import timm

    return _without_random_numbers(lambda: timm.create_model(name, num_classes=0))


def _make_open_clip(name: str) -> Any:
    import open_clip

    config = open_clip.get_model_config(name)
    quick = config.get("quick_gelu", False)

    def make() -> Any:
        # The text tower goes to waste: empty settings keep it plain and, on the meta device, free.
        return open_clip.CLIP(
            config["embed_dim"], config["vision_cfg"], {}, quick_gelu=quick
        ).visual

    return _without_random_numbers(make)


def make_clip(spec: BackboneSpec) -> tuple[Any, Any]:
    """Return both towers of a CLIP, on the meta device, and its tokenizer.

    Raises
    ------
    InputError
        The backbone is no CLIP, or one of another build.
    """
    import open_clip

    if not is_plain_clip(spec):
        raise InputError(
            f"backbone {spec.id}: not a CLIP with plain image and text transformers; take "
            "clip-vit-b-16-plus-240, clip-vit-l-14 or open_clip:NAME:TAG of that kind"
        )
    config = open_clip.get_model_config(spec.architecture)
    with torch.device("meta"):
        model = open_clip.CLIP(
            config["embed_dim"],
            config["vision_cfg"],
            config["text_cfg"],
            quick_gelu=config.get("quick_gelu", False),
        )
    for tower in (model.visual.transformer, model.transformer):
        write_out(tower.resblocks)
    model.attn_mask = None  # no weight: whoever runs the text tower makes it
    return model, _tokenizer(spec.architecture)


@lru_cache(maxsize=4)
def _tokenizer(architecture: str) -> Any:
    import open_clip

    return open_clip.get_tokenizer(architecture)


def is_plain_clip(spec: BackboneSpec) -> bool:
    """Whether both towers are open_clip's own, an image is its CLS and a text its end token."""
    if spec.library != "open_clip":
        return False
    import open_clip

    config = open_clip.get_model_config(spec.architecture)
    vision, text = config["vision_cfg"], config["text_cfg"]
    own = isinstance(vision.get("layers"), int) and "timm_model_name" not in vision
    plain = vision.get("pool_type", "tok") == "tok" and not vision.get("attentional_pool")
    words = "hf_model_name" not in text and "hf_tokenizer_name" not in text
    ended = text.get("pool_type", "argmax") == "argmax" and not text.get("no_causal_mask")
    return own and plain and words and ended and not config.get("custom_text")


def _without_random_numbers(make: Callable[[], Any]) -> Any:
    """Return a module on the meta device, or with its constants where it computes any."""
    with torch.device("meta"):
        model = make()
    saved = model.state_dict()
    if all(name in saved for name, _ in model.named_buffers()):
        return model
    with torch.random.fork_rng(devices=()):
        return make()


def _is_plain(model: nn.Module) -> bool:
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    return (
        type(model) is VisionTransformer
        and type(model.patch_embed) is PatchEmbed
        and model.pos_embed is not None
    )


def describe_timm(id: str) -> BackboneSpec:
    """Return the record of ``timm:NAME`` from timm's own configuration."""
    import timm

    name = id.removeprefix("timm:")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        model = _make_timm(name)
    except RuntimeError as error:  # a tag that the model does not have
        raise InputError(f"backbone {id!r}: {error}") from None
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise InputError(f"backbone {id!r}: timm offers no intermediate features of it")
    config = model.pretrained_cfg
    plain = _is_plain(model)
    if config["fixed_input_size"] and not plain and not getattr(model, "dynamic_img_size", False):
        height, width = config["input_size"][1:]
        raise InputError(
            f"backbone {id!r}: takes images of exactly {height}x{width} only; "
            "anomalyst keeps proportions: choose another backbone"
        )
    strides = tuple(level["reduction"] for level in model.feature_info)
    depth, transformer = len(strides), len(set(strides)) == 1
    middle = (depth * 2 // 3 - 1,) if transformer else (depth - 3, depth - 2)
    return BackboneSpec(
        id=id,
        library="timm",
        architecture=name,
        strides=strides,
        widths=tuple(level["num_chs"] for level in model.feature_info),
        default_taps=tuple(max(layer, 0) for layer in middle),
        image_size=config["input_size"][1],
        mean=config["mean"],
        std=config["std"],
        transformer=transformer,
        final_norm=plain,
        licence=config.get("license") or "unknown",
        paper="unknown",
        hub_repo=config.get("hf_hub_id"),
        hub_file=config.get("hf_hub_filename") or "model.safetensors",
    )


def describe_open_clip(id: str) -> BackboneSpec:
    """Return the record of ``open_clip:NAME:TAG`` from open_clip's own configuration.

    Without a TAG nobody's weights are meant: they come from a file.
    """
    import open_clip

    name, _, tag = id.removeprefix("open_clip:").partition(":")
    models = open_clip.list_models()
    if name not in models:
        raise _unknown("open_clip", name, models)
    known = open_clip.get_pretrained_cfg(name, tag) if tag else _NO_TAG
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        tagged = f"open_clip:{name}:TAG with TAG one of {tags}; or " if tags else ""
        raise InputError(f"backbone {id!r}: give {tagged}open_clip:{name} and --weights file:PATH")
    if known.get("quick_gelu") and f"{name}-quickgelu" in models:
        name = f"{name}-quickgelu"
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
        raise InputError(
            f"backbone {id!r}: its image network is no plain transformer; take it as timm:NAME"
        )
    depth = vision["layers"]
    return BackboneSpec(
        id=id,
        library="open_clip",
        architecture=name,
        strides=(vision["patch_size"],) * depth,
        widths=(vision["width"],) * depth,
        default_taps=(depth * 2 // 3 - 1,),
        image_size=vision["image_size"],
        mean=known["mean"],
        std=known["std"],
        transformer=True,
        final_norm=False,
        licence="unknown",
        paper="unknown",
        hub_repo=known["hf_hub"].rstrip("/") or None,
        hub_file="open_clip_model.safetensors",
    )


def _unknown(library: str, name: str, names: Sequence[str]) -> InputError:
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" did you mean {', '.join(near)}?" if near else ""
    return InputError(
        f"unknown {library} model {name!r}:{hint} {library}.list_models() names them all"
    )
