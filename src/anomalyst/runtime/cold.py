"""One cold start, in a process of its own: how long until an export is loaded, and has judged.

    python -m anomalyst.runtime.cold REQUEST

REQUEST and what is printed are JSON, see `profiling.Cold`. Only what judging needs is imported
before the first image is judged.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Load, judge one image, then as many at a time as asked, and print what that took."""
    given = json.loads(sys.argv[1])
    from anomalyst.runtime import Runtime

    began = time.perf_counter()
    runtime = Runtime.load(given["export"], engine=given["engine"], threads=given["threads"])
    loaded = time.perf_counter() - began

    def judge(count: int) -> None:
        images = [given["image"]] * count
        for found in runtime.predict(images, category=given["category"], batch_size=count):
            assert found.error is None, found.error

    judge(1)
    # Of the system's clock, the only one that this process has in common with who started it.
    started = time.time() - given["started"]
    from anomalyst.evaluation import peak_rss_mb

    memory = []
    for count in given["batch_sizes"]:
        judge(count)
        memory.append(peak_rss_mb())
    print(json.dumps({"started": started, "loaded": loaded, "memory": memory}))


if __name__ == "__main__":
    main()
