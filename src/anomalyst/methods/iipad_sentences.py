"""The sentences on good and bad objects that guide IIPAD's prompts (Lv, Su, Xu, ICLR 2025).

No product is named: each speaks of "the object". The lists are the paper's (appendix A.2) and the
released code's, repetitions and spelling included, as a phrase that stands there four times counts
fourfold. Their defects are those of the test sets; ``generic`` names none.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from anomalyst.features.clip import ClipText


def _states(text: str) -> tuple[str, ...]:
    """Return phrases; those without a place for the object say what it comes with."""
    phrases = (phrase.strip() for phrase in text.split(","))
    return tuple(phrase if "{}" in phrase else f"{{}} with {phrase}" for phrase in phrases)


_GOOD = _states(
    "normal {}, flawless {}, perfect {}, unblemished {}, {} without flaw, {} without defect, "
    "{} without damage"
)
_BAD = _states("damaged {}, abnormal {}, imperfect {}, blemished {}, flaw, defect, damage")
# PromptAD's defects of each MVTec category: the paper lists them as far as half of "grid".
_MVTEC = _states(
    "large breakage, small breakage, contamination, defect, anomaly, "
    "hole, color stain, metal contamination, thread residue, thread, cut, "
    "crack, cut, hole, print, color stain, cut, fold, glue, poke, "
    "bent wire, missing part, missing wire, cut, poke, "
    "crack, faulty imprint, poke, scratch, {} squeezed with compression, "
    "breakage, thread residue, thread, metal contamination"
)
_MVTEC_MORE = _states(
    "glue, a bent shape, "
    "color stain, contamination, crack, faulty imprint, scratch, abnormal type, "
    "bent lead, cut lead, damage, misplaced transistor, "
    "a bent shape, color stain, a flipped orientation, scratch, "
    "manipulated front, scratch neck, scratch head, "
    "broken teeth, fabric border, defect fabric, broken fabric, split teeth, squeezed teeth, "
    "crack, glue strip, gray stroke, oil, rough surface, "
    "color stain, hole, scratch, liquid"
)
_MVTEC_AGAIN = _states(
    "large breakage, small breakage, contamination, defect, anomaly, hole, crack, cracked {}, "
    "cut {}, hole, print, color-varied {}, cut {}, folded {}, fold, glue, poke, bent {}, "
    "bent wire, missing {}, missing wire, crack, broken {}, thread, combined {}, contamination, "
    "cracked {}, crack, faulty imprint, scratch, bent lead, bent {}, cut lead, damaged {}, "
    "bent {}, color-varied {}, flipped {}, scratch, manipulated front, scratch neck, "
    "broken teeth, combined {}, rough {}, split teeth, squeezed teeth, cracked {}, crack, "
    "glue strip, rough {}, hole, liquid"
)
_VISA = _states(
    "melded wax, foreign particals, extra wax, chunk of wax missing, weird candle wick, "
    "damaged corner of packaging, different colour spot, "
    "scratch, discolor, misshape, leak, bubble, "
    "breakage, small scratches, burnt, stuck together, spot, "
    "corner missing, scratches, chunk of gum missing, colour spot, cracks, "
    "color spot, fryum stuck together, small chip around edge, "
    "bent, missing, melt, extra, wrong place, damage, dirt"
)
_TEMPLATE = ("a image of the {}",)
_LOOKS = ("a cropped", "a close-up", "a bright", "a dark", "a jpeg corrupted", "a blurry")
_TEMPLATES = (
    *(f"{look} industrial image of {article} {{}}" for look in _LOOKS for article in ("the", "a")),
    *(
        f"an industrial image of {said}"
        for said in (
            *("a {}", "the {}", "a small {}", "the small {}", "a large {}", "the large {}"),
            *("the {} for visual inspection", "a {} for visual inspection"),
            *("the {} for anomaly detection", "a {} for anomaly detection"),
        )
    ),
)
_ABNORMAL = {
    "generic": _BAD,
    "mvtec": _BAD + _MVTEC,
    "visa": _BAD + _VISA,
    "code-mvtec": _BAD + _MVTEC + _MVTEC_MORE + _MVTEC_AGAIN,
    "code-visa": _BAD + _VISA,
}


def sentences(kind: str, dedup: bool = False) -> tuple[list[str], list[str]]:
    """Return the sentences on good and on bad objects.

    Parameters
    ----------
    kind
        ``generic``, ``mvtec`` or ``visa``: the paper's; ``code-mvtec`` or ``code-visa``.
    dedup
        Each once.
    """
    templates = _TEMPLATES if kind.startswith("code") else _TEMPLATE
    good, bad = (
        [each.format(state.format("object")) for state in states for each in templates]
        for states in (_GOOD, _ABNORMAL[kind])
    )
    return (list(dict.fromkeys(good)), list(dict.fromkeys(bad))) if dedup else (good, bad)


def guides(text: ClipText, kind: str, dedup: bool) -> tuple[Tensor, Tensor]:
    """Return unit vectors ``[n, d]`` of the sentences on good and on bad objects.

    Of the code's lists one each: their mean, taken before normalising.
    """
    good, bad = (text.vectors(said) for said in sentences(kind, dedup))
    if kind.startswith("code"):
        good, bad = good.mean(0, keepdim=True), bad.mean(0, keepdim=True)
    return functional.normalize(good, dim=1), functional.normalize(bad, dim=1)
