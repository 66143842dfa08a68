"""The sentences about states in which CLIP-based methods describe a product.

The lists of WinCLIP (Jeong et al., CVPR 2023): 7 normal and 4 abnormal states, in 22 templates.
"""

from __future__ import annotations

from collections.abc import Sequence

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL_STATES = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")

_LOOKS = ("cropped", "close-up", "bright", "dark", "jpeg corrupted", "blurry")
_ARTICLES = ("a", "the")
TEMPLATES = (
    *(f"a {look} photo of {article} {{}}." for look in _LOOKS for article in _ARTICLES),
    *(f"a photo of {article} {{}}." for article in _ARTICLES),
    *(f"a photo of {article} {size} {{}}." for size in ("small", "large") for article in _ARTICLES),
    *(
        f"a photo of {article} {{}} for {purpose}."
        for purpose in ("visual inspection", "anomaly detection")
        for article in _ARTICLES
    ),
)


def sentences(states: Sequence[str], words: str) -> list[str]:
    """Return every state of the product called ``words``, in every template.

    >>> sentences(["damaged {}"], "metal nut")[0]
    'a cropped photo of a damaged metal nut.'
    """
    # No str.format: a product's name may hold braces.
    return [
        template.replace("{}", state.replace("{}", words))
        for state in states
        for template in TEMPLATES
    ]
