"""Training time of NAGL for 1,000 episodes: on cached features, and with every image encoded anew.

    python benchmarks/bench_episodes.py ../shared/data/source --category tire

Encoding anew is what the authors' code does. Both train the same episodes in the same run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from anomalyst.data.layouts import load_dataset
from anomalyst.detector import Detector
from anomalyst.training_setup import TrainingSetup


def seconds_per_thousand(data: list, steps: int, cached: bool) -> float:
    """Return the time of the steps alone, scaled to 1,000 episodes."""
    detector = Detector("nagl", offline=True, options={"steps": steps})
    times: list[float] = []

    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "train":
            times.append(time.perf_counter())

    detector.fit(data, training=TrainingSetup(cached=cached), progress=watch)
    batch = detector.method.options.batch_size
    return (times[-1] - times[0]) / (len(times) - 1) / batch * 1000


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--category", default="tire")
    given = parser.parse_args()
    found = load_dataset(given.source, categories=[given.category])
    data = [*found.train, *found.test]
    cached = seconds_per_thousand(data, 30, True)
    anew = seconds_per_thousand(data, 4, False)
    print(
        f"cached {cached:.0f} s, encoded anew {anew:.0f} s per 1,000 episodes: {anew / cached:.1f}"
    )


if __name__ == "__main__":
    main()
