"""Start-up on a warm disk: `anomalyst --help` (goal 0.5 s) and `import anomalyst` (goal 0.3 s).

python benchmarks/bench_startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import anomalyst": [sys.executable, "-c", "import anomalyst"],
    "anomalyst --help": [sys.executable, "-m", "anomalyst.cli", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    results = {}
    for name, command in COMMANDS.items():
        times = []
        for _ in range(8):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        results[name] = round(statistics.median(times[1:]), 3)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
