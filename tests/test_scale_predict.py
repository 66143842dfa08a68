"""`predict --engine ray`: the plain engine's lines, whatever happens to the workers."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")

from anomalyst import Detector
from anomalyst.bundle import bundle_hash
from anomalyst.errors import InputError
from anomalyst.predictions import OutputChoice, write_predictions
from anomalyst.scale import predicting
from anomalyst.scale.cluster import Share, connect, divide, share_out
from anomalyst.scale.predicting import Placement, ShardJudge, predict_on_ray
from anomalyst.scale.shards import Job, claim, hash_of, shard_size
from anomalyst.scale.sources import Source, list_sources
from anomalyst.scoring import Decision
from anomalyst.types import Sample
from conftest import TINY, Run, blot, save, texture

BOTH = OutputChoice(maps=True, overlays=True)
IMAGES = 120


@pytest.fixture(scope="module")
def bundle(tiny_weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small calibrated detector of two products."""
    root = tmp_path_factory.mktemp("scale")
    detector = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=64)
    detector.decision = Decision(0.1, 0.2)
    held_out = []
    for turns, category in enumerate(("across", "down")):
        pictures = [np.rot90(texture(1000 * turns + k, 64, 64), turns) for k in range(15)]
        detector.enroll(category, [np.ascontiguousarray(picture) for picture in pictures[:3]])
        for k, picture in enumerate(pictures[3:]):
            held_out.append(Sample(save(root / category / f"{k}.png", picture), category))
    detector.calibrate(held_out)
    return detector.save(root / "bundle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two shapes, some with a blot; one broken, one with a name that is no text."""
    root = tmp_path_factory.mktemp("images")
    for k in range(IMAGES - 2):
        picture = texture(k, 64, 64 if k % 5 else 80)
        save(root / f"{k:03d}.png", blot(picture, 8, 8, 20) if k % 3 == 0 else picture)
    (root / "050-broken.png").write_bytes(b"no image")
    os.rename(save(root / "x.png", texture(0)), os.fsencode(root) + b"/060-\xff[1].png")
    return root


@pytest.fixture(scope="module")
def detector(bundle: Path) -> Detector:
    return Detector.load(bundle, device="cpu")


@pytest.fixture(scope="module")
def plain(detector: Detector, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plain engine makes of the folder: all kinds of lines."""
    out = tmp_path_factory.mktemp("plain")
    records = list(write_predictions(detector, list_sources([str(folder)]), out, choice=BOTH))
    assert len(records) == IMAGES and {record["verdict"] for record in records} == {
        "ok",
        "review",
        "ng",
        None,
    }
    return out


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Judge shards here instead of on a cluster; returns the numbers of those judged."""
    judged: list[int] = []

    def judge(job: Job, sources: Any, missing: Any, placement: Placement) -> Iterator[int]:
        judge_shard = ShardJudge(job, Share(1, 1))
        for number in reversed(missing):  # a cluster's order is any
            found = judge_shard(row(job, sources, number))
            if found["error"] != [""]:
                raise InputError(str(found["error"][0]))
            judged.append(number)
            yield number

    monkeypatch.setattr(predicting, "_judged", judge)
    return judged


def row(job: Job, sources: Any, number: int) -> dict[str, list[Any]]:
    return {"shard": [number], "sources": [predicting._pack(sources[job.span(number)])]}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- on a real cluster --------------------------------------------------------------------------


def test_the_command_answers_as_without_ray(
    two_nodes: None, run: Run, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    words = ["predict", bundle, f"file://{folder}", folder / "none.png", "--category", "down"]
    code, out, err = run(*words, "-o", tmp_path / "plain", "--json")
    assert code == 2 and len(out.splitlines()) == IMAGES + 1
    assert run(*words, "-o", tmp_path / "ray", "--json", "--engine", "ray", "--workers", 2) == (
        code,
        out,
        err,
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")


def test_a_killed_worker_changes_nothing(
    two_nodes: None,
    bundle: Path,
    detector: Detector,
    folder: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = str(tmp_path / "killed")

    class Dying:
        """A worker that is killed while it judges the sixth shard, or has just done so."""

        def __init__(self, job: Job, share: Share) -> None:
            self.judge = predicting.ShardJudge(job, share)  # in the worker it is the real one

        def __call__(self, batch: Any) -> Any:
            dies = batch["shard"][0] == 5 and not os.path.exists(killed)
            if dies:
                Path(killed).touch()
                threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
            found = self.judge(batch)
            if dies:
                time.sleep(60)
            return found

    monkeypatch.setattr(predicting, "ShardJudge", Dying)
    assert share_out(device="cpu") == Share(workers=2, cpus=1)
    out, sources = tmp_path / "out", list_sources([str(folder)])
    found = predict_on_ray(bundle, detector, sources, out, Placement(), choice=BOTH, shard=8)
    assert [record["image"] for record in found] == [source.name for source in sources]
    assert os.path.exists(killed)
    assert contents(out) == contents(plain)  # every line, map and overlay, and nothing else


@pytest.mark.slow
def test_a_cluster_of_its_own_listens_to_this_machine_only() -> None:
    code = """
import psutil
from anomalyst.scale.cluster import connect
with connect():
    import ray
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    open = [c for process in family for c in process.net_connections() if c.status == "LISTEN"]
    print(len(open) > 3, {c.laddr.ip.removeprefix("::ffff:") for c in open})
print(ray.is_initialized())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n")[:2] == ["True {'127.0.0.1'}", "False"]
    assert ended.stderr == ""


# ---- connecting ---------------------------------------------------------------------------------


def test_a_connection_that_was_there_stays(two_nodes: None) -> None:
    import ray

    with connect():
        pass
    assert ray.is_initialized()
    with (
        pytest.raises(InputError, match=r"--address 10.0.0.1:6379: .* already"),
        connect("10.0.0.1:6379"),
    ):
        pass


def test_what_ray_tells_is_no_result(two_nodes: None, capsys: pytest.CaptureFixture[str]) -> None:
    with connect():
        thread = threading.Thread(target=print, args=("a worker was lost",), name="ray_listen")
        thread.start()
        thread.join()
        print("a result")
    assert capsys.readouterr() == ("a result\n", "a worker was lost\n")


def test_without_ray_the_mend_is_named(
    run: Run, bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("predict", bundle, folder, "-o", tmp_path / "out", "--engine", "ray")
    assert code == 2
    assert 'this needs ray: pip install "anomalyst[scale]"' in err
    assert not (tmp_path / "out").exists()


def test_options_of_ray_without_ray_are_refused(run: Run, bundle: Path, tmp_path: Path) -> None:
    code, _, err = run("predict", bundle, "a.png", "-o", tmp_path / "out", "--workers", 2)
    assert code == 2 and "add --engine ray" in err


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_an_address_without_a_cluster_is_named_at_once(address: str) -> None:
    pytest.importorskip("ray")
    code = f"""
from anomalyst.scale.cluster import connect
with connect({address!r}):
    pass
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"InputError: --address {address}: no Ray cluster answers there" in ended.stderr


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "expected"),
    [
        ([(2, 0)], None, "auto", Share(2, 1)),
        ([(8, 0)], 2, "auto", Share(2, 4)),
        ([(8, 0)], 3, "cpu", Share(3, 2)),
        ([(3, 0), (5, 0)], 2, "auto", Share(2, 3)),  # 4 would fit once only
        ([(8, 2), (8, 2)], None, "auto", Share(4, 4, 1)),
        ([(8, 2), (4, 0)], 2, "cuda", Share(2, 4, 1)),
        ([(8, 2), (4, 0)], None, "cpu", Share(12, 1)),
    ],
)
def test_a_cluster_is_shared_out(
    nodes: list[tuple[int, int]], workers: int | None, device: str, expected: Share
) -> None:
    assert divide(nodes, workers, device) == expected


@pytest.mark.parametrize(
    ("workers", "device", "message"),
    [
        (3, "cpu", "2 cores and 0 GPUs: room for 2 workers with a core"),
        (None, "cuda", "room for 0 workers with a core and a GPU"),
        (None, "cuda:1", "--device cuda:1: on Ray give auto, cpu or cuda"),
    ],
)
def test_what_the_cluster_has_not_is_refused(
    workers: int | None, device: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        divide([(2, 0)], workers, device)


# ---- shards -------------------------------------------------------------------------------------


def test_shards_hold_whole_batches_of_the_plain_engine() -> None:
    batch = inspect.signature(Detector.predict).parameters["batch_size"].default
    sizes = {images: shard_size(images) for images in (1, 4096, 8000, 16_384, 10**7)}
    assert sizes == {1: 64, 4096: 64, 8000: 120, 16_384: 256, 10**7: 256}
    assert all(size % batch == 0 for size in map(shard_size, range(1, 20_000, 37)))


def test_a_stopped_job_goes_on_and_judges_no_shard_twice(
    in_process: list[int],
    bundle: Path,
    detector: Detector,
    folder: Path,
    plain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources = list_sources([str(folder)])

    def start() -> Any:
        return predict_on_ray(
            bundle, detector, sources, tmp_path, Placement(), choice=BOTH, shard=8
        )

    (tmp_path / "predictions.jsonl").write_text("an earlier run\n")
    stopped = start()
    next(stopped)  # of the first shard, which comes last here
    stopped.close()
    (tmp_path / "shards" / "00007.jsonl").unlink()  # a worker that never came back
    assert (tmp_path / "predictions.jsonl").read_text() == "an earlier run\n"
    assert sorted(in_process) == list(range(IMAGES // 8))
    in_process.clear()
    assert len(list(start())) == IMAGES
    assert in_process == [7] and "14 of 15 shards are done already" in caplog.text
    assert contents(tmp_path) == contents(plain)
    in_process.clear()
    assert len(list(start())) == IMAGES  # what is finished is done anew, as without Ray
    assert sorted(in_process) == list(range(IMAGES // 8))


@pytest.mark.parametrize("changed", ["images", "category", "choice", "bundle"])
def test_another_job_in_the_folder_is_refused(
    in_process: list[int],
    bundle: Path,
    detector: Detector,
    folder: Path,
    tmp_path: Path,
    changed: str,
) -> None:
    sources = list_sources([str(folder)])[:16]
    next(predict_on_ray(bundle, detector, sources, tmp_path, Placement(), shard=8))
    more: dict[str, Any] = {}
    if changed == "images":
        sources = sources[:-1]
    elif changed == "bundle":
        bundle = detector.save(tmp_path / "again.zip")
    else:
        more = {"category": "down"} if changed == "category" else {"choice": OutputChoice(True)}
    with pytest.raises(InputError, match="holds an unfinished job with another bundle, images or"):
        next(predict_on_ray(bundle, detector, sources, tmp_path, Placement(), shard=8, **more))


def worker(path: Path, images: Path, out: Path, **changes: Any) -> tuple[ShardJudge, Any]:
    """A worker and the row of its only shard, its job claimed."""
    sources = list_sources([str(images)])[:4]
    known = {"bundle": str(path), "bundle_sha256": bundle_hash(path), "images": 4, "shard": 8}
    known |= {"inputs_sha256": hash_of(sources), "folder": str(out), "directory": None}
    known |= {"category": None, "decision": Decision(), "choice": OutputChoice()}
    claim(Job(**known))
    job = Job(**(known | changes))
    return ShardJudge(job, Share(1, 1)), row(job, sources, 0)


def test_a_shard_that_ends_every_worker_ends_the_job(
    bundle: Path, folder: Path, tmp_path: Path
) -> None:
    judge, shard = worker(bundle, folder, tmp_path)
    judge.job.tries(0).write_bytes(b"..")
    assert judge(shard)["error"] == [""] and not judge.job.tries(0).exists()
    judge.job.tries(0).write_bytes(b"...")
    error = judge(shard)["error"][0]
    assert f"{folder / '000.png'} to {folder / '003.png'}: their worker was lost 3 times" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.1"}, "not 0.0.1: install that"),
        ({"bundle": "/nowhere/bundle"}, "/nowhere/bundle is not there on "),
        ({"folder": "/nowhere/out"}, "/nowhere/out/shards is not there on "),
        ({"directory": "/nowhere"}, "/nowhere is not there on "),
        ({"bundle_sha256": "0"}, "was changed while the job ran"),
    ],
)
def test_a_worker_in_the_wrong_place_says_so(
    bundle: Path, folder: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    judge, shard = worker(bundle, folder, tmp_path, **changes)
    assert message in str(judge(shard)["error"][0])


def test_warnings_of_workers_come_back_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    for k in range(4):
        noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        save(tmp_path / "noise" / f"{k}.png", noise)
    judge, shard = worker(bundle, tmp_path / "noise", tmp_path / "out", category="down")
    ((name, about, text),) = json.loads(str(judge(shard)["warnings"][0]))
    assert name == "anomalyst.judging" and "looks" in text and "0.png" in text
    assert "down" in about and "0.png" not in about


# ---- lists --------------------------------------------------------------------------------------


@pytest.fixture
def write_list(tmp_path: Path) -> Callable[..., str]:
    def write(name: str = "list.parquet", **columns: list[Any]) -> str:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(columns), tmp_path / name)
        return str(tmp_path / name)

    return write


def test_a_parquet_list_names_images_and_products(
    write_list: Callable[..., str], folder: Path, detector: Detector, tmp_path: Path
) -> None:
    names = [str(folder / "003.png"), f"file://{folder}/001.png", str(folder / "003.png"), "no.png"]
    place = write_list(image=names, category=["down", "across", None, "down"], note=list("abcd"))
    sources = list_sources([place])
    assert sources[1] == Source(names[1], "across") and len(sources) == 4
    records = list(write_predictions(detector, sources, tmp_path / "out"))
    assert [record["image"] for record in records] == names
    assert [record["category"] for record in records] == ["down", "across", "across", "down"]
    assert records[3]["error"] == "no.png: No such file or directory"
    alone = next(iter(write_predictions(detector, [folder / "001.png"], tmp_path / "alone")))
    assert records[1] == {**alone, "image": names[1]}


def test_the_only_text_column_is_the_list(write_list: Callable[..., str]) -> None:
    place = write_list(path=["b.png", "a.png"], size=[1, 2], category=["x", "y"])
    assert list_sources([place]) == [Source("b.png", "x"), Source("a.png", "y")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": []}, "the list is empty"),
        ({"a": ["x.png"], "b": ["y.png"]}, "has columns a, b; name the one with the images"),
        ({"number": [1]}, "has columns number; name the one"),
        ({"image": ["x.png", None]}, "row 1 names no image in column 'image'"),
    ],
)
def test_a_list_that_names_no_images_is_refused(
    write_list: Callable[..., str], columns: dict[str, list[Any]], message: str
) -> None:
    import pyarrow as pa

    if columns == {"image": []}:
        columns = {"image": pa.array([], pa.string())}
    with pytest.raises(InputError, match=message):
        list_sources([write_list(**columns)])


def test_what_is_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no list")
    for name in ("bad", "missing"):
        place = str(tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match=f"{name}.parquet: cannot be read as a Parquet list"):
            list_sources([place])


def test_images_in_memory_are_listed_read_and_missed(
    folder: Path, detector: Detector, tmp_path: Path
) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("b/2.png", "b/10.PNG", "a/x[1].png", "a/note.txt", "a/.hidden/1.png", "c/3.png"):
        memory.pipe(f"/scale/{name}", (folder / "001.png").read_bytes())
    memory.pipe("/scale/d.png", b"")
    try:
        sources = list_sources(
            ["memory://scale", "memory://scale/b/2.png", str(folder / "002.png")]
        )
        names = [source.name.removeprefix("memory://") for source in sources]
        wanted = ["a/x[1].png", "b/10.PNG", "b/2.png", "c/3.png", "d.png"]
        assert [name.lstrip("/") for name in names[:-1]] == [
            *(f"scale/{name}" for name in wanted),
            "scale/b/2.png",
        ]
        memory.rm("/scale/c/3.png")
        out = tmp_path / "out"
        records = list(write_predictions(detector, sources, out, choice=OutputChoice(True)))
    finally:
        memory.rm("/scale", recursive=True)
    assert [record["image"] for record in records] == [source.name for source in sources]
    scores = {record["score"] for record in records[:3]}
    assert len(scores) == 1 and None not in scores
    assert str(records[3]["error"]).startswith(f"{sources[3].name}: ")
    assert "3.png" in str(records[3]["error"]) and records[3]["score"] is None
    assert records[4]["error"] == f"{sources[4].name}: the file is empty (0 bytes)"
    assert records[0]["map"] == "maps/000000-x[1].npy" and (out / "maps/000000-x[1].npy").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "no images there; files that end in .bmp"),
        ("nosuch://bucket/a", "Protocol not known: nosuch"),
        ("memory://nothing/a.parquet", r"cannot be opened \("),
    ],
)
def test_a_url_without_images_is_named(url: str, message: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(InputError, match=f"{url}: {message}"):
        list_sources([url])


def test_a_storage_without_its_package_names_it(
    monkeypatch: pytest.MonkeyPatch, detector: Detector, tmp_path: Path
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3://bucket/line: this needs s3fs .*pip install s3fs"):
        list_sources(["s3://bucket/line"])
    sources = list_sources(["s3://bucket/a.png"])  # an image is no folder to list
    (record,) = write_predictions(detector, sources, tmp_path / "out")
    assert str(record["error"]).startswith("s3://bucket/a.png: this needs s3fs")
