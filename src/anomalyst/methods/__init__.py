"""The registry: one line a method. Names are written by hand, and no method is imported here."""

from __future__ import annotations

from anomalyst.methods.base import MethodSpec

REGISTRY: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec(
            "patchcore",
            "anomalyst.methods.patchcore:PatchCore",
            "memory bank of locally aware patches, thinned to a coreset (Roth et al., CVPR 2022)",
            few_shot=True,
            needs_category=True,
        ),
        MethodSpec(
            "anomaly-dino",
            "anomalyst.methods.anomaly_dino:AnomalyDINO",
            "nearest normal patch among a few references (Damm et al., WACV 2025)",
            few_shot=True,
            needs_category=True,
        ),
        MethodSpec(
            "inp-former",
            "anomalyst.methods.inp_former:InpFormer",
            "reconstruction from normal prototypes in the image itself (Luo et al., CVPR 2025)",
            zero_shot=True,
            few_shot=True,
            multi_class=True,
            trains_on="normal images",
        ),
        MethodSpec(
            "nagl",
            "anomalyst.methods.nagl:Nagl",
            "generalist guided by normal and abnormal references (Wang et al., NeurIPS 2025)",
            few_shot=True,
            abnormal_references=True,
            needs_category=True,
            generalist=True,
            trains_on="another domain's normal and masked abnormal images",
        ),
        MethodSpec(
            "onenip",
            "anomalyst.methods.onenip:OneNip",
            "reconstruction with one normal image as the prompt (Gao, ECCV 2024)",
            multi_class=True,
            needs_category=True,
            trains_on="normal images",
        ),
        MethodSpec(
            "winclip",
            "anomalyst.methods.winclip:WinClip",
            "CLIP's windows against sentences, and against good windows (Jeong et al., CVPR 2023)",
            zero_shot=True,
            few_shot=True,
            needs_class_name=True,
            backbone="clip-vit-b-16-plus-240",
        ),
        MethodSpec(
            "anople",
            "anomalyst.methods.anople:AnoPle",
            "CLIP prompts learned in both directions from good images (Lee et al., CVPR 2026)",
            zero_shot=True,
            few_shot=True,
            multi_class=True,
            needs_class_name=True,
            trains_on="normal images",
            backbone="clip-vit-b-16-plus-240",
        ),
        MethodSpec(
            "iipad",
            "anomalyst.methods.iipad:Iipad",
            "CLIP prompts made from each image, banks that need no category (Lv et al., ICLR 2025)",
            few_shot=True,
            multi_class=True,
            trains_on="normal images",
            backbone="clip-vit-l-14",
        ),
    )
}
