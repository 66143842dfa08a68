"""Train the generalist that ships with the package, and write it with its model card.

    python scripts/train_generalist.py ../shared/data/source

Only source categories whose licence lets a plant use what was learned from them: see `SOURCES`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anomalyst.bundle import now
from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.features.cache import FeatureCache
from anomalyst.generalist import pack_generalist
from anomalyst.training_setup import TrainingSetup

SOURCES = {
    "magnetic_tile": "Huang et al. 2018, surface defect saliency of magnetic tile; its authors' "
    "repository welcomes use",
    "cookie": "sample data of a vision service, CC BY-SA 4.0",
}


def main() -> None:
    """Train and pack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--feature-cache", type=Path)
    given = parser.parse_args()
    data = load_dataset(given.source, categories=list(SOURCES))
    detector = Detector(
        "nagl",
        backbone="dinov2-small-packaged",
        seed=0,
        offline=True,
        feature_cache=FeatureCache(given.feature_cache) if given.feature_cache else None,
    )
    detector.fit(
        (*data.train, *data.test),
        training=TrainingSetup(),
        progress=lambda stage, done, total, note="": (
            print(stage, done, total, note, flush=True) if done % 50 == 0 else None
        ),
    )
    said = {
        "trained_on": SOURCES,
        "intended_use": "visual inspection of products that it was never trained on, from normal "
        "and, where there are any, abnormal references",
        "limits": "sees what DINOv2-small sees in patches of 14 pixels; one orientation unless the "
        "references show others; measured figures: docs/benchmarks.md",
        "command": "python scripts/train_generalist.py ../shared/data/source",
        "date": now(),
        "seconds": round(detector.seconds["train"]),
    }
    print(pack_generalist(detector, said))


if __name__ == "__main__":
    main()
