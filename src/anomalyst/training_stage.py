"""The stage of a detector that takes gradient steps: images to trained weights."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from anomalyst.engine import Engine
from anomalyst.features.cache import FeatureCache
from anomalyst.methods.base import TrainedMethod
from anomalyst.training import Hardware, Plan, train
from anomalyst.training_data import TrainingFeatures
from anomalyst.training_run import TrainingRun
from anomalyst.training_setup import FEATURES, TrainingSetup
from anomalyst.types import Progress, Sample

# Of the frozen features of one training; the disk is asked for what is used, not for this.
_SCRATCH_BYTES = 64 * 2**30


def train_method(
    method: TrainedMethod,
    engine: Engine,
    samples: Sequence[Sample],
    few_shot: bool,
    setup: TrainingSetup,
    progress: Progress | None,
) -> TrainingFeatures:
    """Train the method's network on the samples and return what it was fed with."""
    run = _run(method, engine, samples, few_shot, setup)
    method.network.to(engine.device)
    hardware = Hardware(engine.device, setup.devices, setup.precision)
    views = method.training_views(few_shot)
    Plan.of(method.options, len(samples) * len(views), setup.devices)  # a slip must not wait
    method.require_trainable(samples)
    features = TrainingFeatures(engine, samples, views, progress)
    source = method.source(features)
    train(
        method.network,
        source,
        method.options,
        seed=method.seed,
        hardware=hardware,
        run=run,
        progress=progress,
    )
    method.finish(source)
    method.trained = True
    return features


def _run(
    method: TrainedMethod,
    engine: Engine,
    samples: Sequence[Sample],
    few_shot: bool,
    setup: TrainingSetup,
) -> TrainingRun | None:
    if setup.folder is None:
        return None
    names = "\n".join(f"{s.category} {s.path} {s.path.stat().st_size}" for s in samples)
    run = TrainingRun(
        setup.folder,
        setup.resume,
        setup.checkpoint_seconds,
        setup.tensorboard,
        settings={
            "method": method.name,
            **method.options.model_dump(),
            "seed": method.seed,
            "backbone weights": engine.backbone.weights_sha256,
            "layers": list(engine.backbone.layers),
            "preprocessing": engine.preprocess.to_dict(),
            "training images": hashlib.sha256(names.encode()).hexdigest(),
            "few_shot": few_shot,
            "cached": engine.cache is not None,
            "precision": setup.precision,
        },
    )
    run.prepare()
    return run


@contextmanager
def scratch_cache(engine: Engine, setup: TrainingSetup) -> Iterator[Engine]:
    """Yield the engine with a feature cache for one training, unless it has one already.

    It lies in the training's folder, where an interrupted one finds it again, or else in a
    temporary one.
    """
    if engine.cache is not None or not setup.cached:
        yield engine
    elif setup.folder is not None:
        cache = FeatureCache(setup.folder / FEATURES, _SCRATCH_BYTES)
        yield replace(engine, cache=cache)
    else:
        with tempfile.TemporaryDirectory(prefix="anomalyst-") as folder:
            yield replace(engine, cache=FeatureCache(Path(folder), _SCRATCH_BYTES))
