"""`predict` on a Ray cluster: shards of the list to a pool of workers that hold the detector."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalyst import __version__
from anomalyst.bundle import bundle_hash
from anomalyst.errors import InputError
from anomalyst.files import replace_file
from anomalyst.predictions import OutputChoice, judge_into, to_line, writing_to
from anomalyst.scale import scale_module
from anomalyst.scale.cluster import Share, connect, load_ray, share_out
from anomalyst.scale.shards import Job, claim, hash_of, join, shard_size
from anomalyst.scale.sources import Source

if TYPE_CHECKING:
    from anomalyst.detector import Detector

_TRIES = 3  # of a shard whose worker dies each time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a job runs: a cluster's address (None: this machine), workers, and their device."""

    address: str | None = None
    workers: int | None = None
    device: str = "auto"


def predict_on_ray(
    bundle: Path,
    detector: Detector,
    sources: Sequence[Source],
    folder: Path,
    placement: Placement,
    *,
    category: str | None = None,
    choice: OutputChoice | None = None,
    shard: int | None = None,
) -> Iterator[dict[str, object]]:
    """Do what `write_predictions` does, on a Ray cluster: the same files and records, in order.

    A job that was stopped goes on, if bundle, images and options are the same.

    Parameters
    ----------
    bundle
        Where the workers load the detector from.
    detector
        The same one, with the decision that counts; it judges nothing here.
    sources
        From `list_sources`.
    shard
        Images a shard; by default as many as suits the list.

    Raises
    ------
    InputError
        Ray is missing, the folder holds an unfinished other job, a worker cannot see the bundle
        or the folder, or it died several times at the same shard.
    """
    load_ray(placement.address)
    detector.predict([], category=category)  # refuses what each worker would
    job = Job(
        bundle=str(bundle.resolve()),
        bundle_sha256=bundle_hash(bundle),
        inputs_sha256=hash_of(sources),
        images=len(sources),
        shard=shard or shard_size(len(sources)),
        folder=str(folder.resolve()),
        directory=None if all(s.is_url or os.path.isabs(s.name) for s in sources) else os.getcwd(),
        category=category,
        decision=detector.decision,
        choice=choice or OutputChoice(),
    )
    with writing_to(folder):
        done = claim(job)
        missing = [number for number in range(job.count) if number not in done]
        if done:
            _log.warning("%s: %d of %d shards are done already", folder, len(done), job.count)
        yield from join(job, done, _judged(job, sources, missing, placement))


# ---- the cluster's part -------------------------------------------------------------------------


def _judged(
    job: Job, sources: Sequence[Source], missing: Sequence[int], placement: Placement
) -> Iterator[int]:
    """Have the missing shards judged, and yield the number of each as it is done."""
    if not missing:
        return
    with connect(placement.address):
        data = scale_module("ray.data")
        share = share_out(placement.workers, placement.device)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        rows = [{"shard": n, "sources": _pack(sources[job.span(n)])} for n in missing]
        found = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardJudge,
            fn_constructor_args=(job, share),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(share.workers, len(missing))),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        warned: set[str] = set()
        for row in found.iter_rows():
            if row["error"]:
                raise InputError(row["error"])
            for name, about, text in json.loads(row["warnings"]):
                if about not in warned:
                    warned.add(about)
                    logging.getLogger(name).warning("%s", text)
            yield int(row["shard"])


def _pack(sources: Sequence[Source]) -> str:
    """Return sources as JSON, whose escapes carry names that are no text."""
    return json.dumps([[source.name, source.category] for source in sources])


class ShardJudge:
    """What each worker of the pool holds: the detector, loaded when its first shard comes."""

    def __init__(self, job: Job, share: Share) -> None:
        self.job = job
        self.share = share

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[object]]:
        """Judge one shard; its lines are on the disk when this returns.

        A fault of the user's comes back as text: raised here, it would arrive as Ray's.
        """
        number = int(batch["shard"][0])
        sources = [Source(*row) for row in json.loads(str(batch["sources"][0]))]
        error = ""
        with _heard() as warnings:
            try:
                with writing_to(Path(self.job.folder)):
                    self._judge(number, sources)
            except InputError as fault:
                error = str(fault)
        return {"shard": [number], "error": [error], "warnings": [json.dumps(warnings)]}

    def _judge(self, number: int, sources: Sequence[Source]) -> None:
        job, detector = self.job, self.detector
        tries = job.tries(number)
        with tries.open("ab") as count:
            count.write(b".")
        if tries.stat().st_size > _TRIES:
            names = f"{sources[0].name} to {sources[-1].name}"
            raise InputError(
                f"{names}: their worker was lost {_TRIES} times (too little memory?); try fewer "
                "--workers, or leave the image out that ends it"
            )
        records = judge_into(
            detector,
            sources,
            Path(job.folder),
            category=job.category,
            choice=job.choice,
            first=job.span(number).start,
        )
        replace_file(job.lines(number), b"".join(map(to_line, records)))
        tries.unlink()

    @cached_property
    def detector(self) -> Detector:
        """The detector, in a process that is like the one where the job was started."""
        import torch

        from anomalyst.detector import Detector

        job, here = self.job, socket.gethostname()
        if __version__ != job.version:
            raise InputError(f"{here} has anomalyst {__version__}, not {job.version}: install that")
        places = [Path(job.bundle), job.shards, *([Path(job.directory)] if job.directory else [])]
        unseen = next((place for place in places if not place.exists()), None)
        if unseen is not None:
            raise InputError(
                f"{unseen} is not there on {here}: bundle, images and -o must lie on storage that "
                "all machines of the cluster see under the same path"
            )
        if job.directory:
            os.chdir(job.directory)
        torch.set_num_threads(self.share.cpus)
        device = "cuda" if self.share.gpus else "cpu"
        detector = Detector.load(job.bundle, device=device, decision=job.decision)
        if bundle_hash(Path(job.bundle)) != job.bundle_sha256:
            raise InputError(f"{job.bundle} was changed while the job ran: start it again")
        return detector


@contextmanager
def _heard() -> Iterator[list[tuple[str, str, str]]]:
    """Collect the package's warnings: where from, what of, and the text.

    Two warnings are of the same thing if they differ only in the words before the last, which is
    the product: the image and the figures are an example's.
    """
    heard: list[tuple[str, str, str]] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            last = record.args[-1:] if isinstance(record.args, tuple) else ()
            heard.append((record.name, f"{record.msg} {last}", record.getMessage()))

    ear, log = Ear(logging.WARNING), logging.getLogger("anomalyst")
    log.addHandler(ear)
    try:
        yield heard
    finally:
        log.removeHandler(ear)
