"""A long list in shards: the lines of each in a file of its own, joined in order at the end.

``shards/NNNNN.jsonl`` is written in one step, so a lost worker costs only the shards that it was
at, and whoever does them again writes the same files. What is there when a run stops need not be
done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anomalyst import __version__
from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.predictions import FILE, OutputChoice
from anomalyst.scale.sources import Source
from anomalyst.scoring import Decision

_BATCH = 8  # of `Detector.predict`: with whole batches a shard, both engines judge the same ones


def shard_size(images: int) -> int:
    """Return images a shard: 64 to 256, and for lists in between 64 shards or a few more."""
    return min(max(images // 64 // _BATCH * _BATCH, 64), 256)


@dataclass(frozen=True)
class Job:
    """All that a worker must know beside the shard: what to judge with, and where results go.

    ``directory`` is where relative paths start, None where there are none.
    """

    bundle: str
    bundle_sha256: str
    inputs_sha256: str
    images: int
    shard: int
    folder: str
    directory: str | None
    category: str | None
    decision: Decision
    choice: OutputChoice
    version: str = __version__

    @property
    def shards(self) -> Path:
        """The folder that holds the lines of the shards that are done."""
        return Path(self.folder, "shards")

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard)

    def lines(self, number: int) -> Path:
        """Return the file with a shard's lines."""
        return self.shards / f"{number:05d}.jsonl"

    def tries(self, number: int) -> Path:
        """Return the file with a byte for each try of a shard that is not done."""
        return self.shards / f"{number:05d}.tries"

    def span(self, number: int) -> slice:
        """Return the places of a shard's images in the list."""
        return slice(number * self.shard, min((number + 1) * self.shard, self.images))

    def identity(self) -> dict[str, Any]:
        """Return what the lines depend on: a shard counts only for a job that is equal in it."""
        places = ("bundle", "folder", "directory")
        return {key: value for key, value in asdict(self).items() if key not in places}


def hash_of(sources: Iterable[Source]) -> str:
    """Return the SHA-256 of a list: its names and categories, not what the files hold."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(json.dumps([source.name, source.category]).encode())
    return digest.hexdigest()


def claim(job: Job) -> set[int]:
    """Make the folder the job's, and return the shards that an earlier run of it has finished.

    Raises
    ------
    InputError
        Another job is not finished there.
    """
    manifest = job.shards / "job.json"
    job.shards.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps(job.identity(), indent=2).encode()
    if not manifest.exists():
        replace_file(manifest, wanted)
    elif manifest.read_bytes() != wanted:
        raise InputError(
            f"{job.shards} holds an unfinished job with another bundle, images or options: finish "
            "that one by its own command, remove that folder, or name another -o"
        )
    for tries in job.shards.glob("*.tries"):
        tries.unlink()
    return {int(path.stem) for path in job.shards.glob("[0-9]*.jsonl")}


def join(job: Job, done: set[int], more: Iterator[int]) -> Iterator[dict[str, object]]:
    """Append shards to the result in order, each as soon as all before it are there.

    The records are passed on; at the end the result has its name and the shards are gone.

    Parameters
    ----------
    done
        Shards that are there.
    more
        Numbers of the others, as they are done.
    """
    folder = Path(job.folder)
    partial = folder / f"{FILE}.partial"
    with partial.open("wb") as lines:
        for number in range(job.count):
            while number not in done:
                done.add(next(more))
            content = job.lines(number).read_bytes()
            lines.write(content)
            lines.flush()
            yield from map(json.loads, content.splitlines())
    next(more, None)  # lets the cluster go
    partial.replace(folder / FILE)
    shutil.rmtree(job.shards)
    for name in ("maps", "overlays"):  # what a worker was at when it was lost
        for leftover in (folder / name).glob(".*.partial"):
            leftover.unlink()
