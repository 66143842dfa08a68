"""An export's files and engines: what is whole is read, what is not is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from anomalyst import Detector, InputError
from anomalyst.runtime import Runtime, check, engines, exported
from anomalyst.runtime.exported import MANIFEST, is_export, read_export, write_export
from conftest import TINY, texture
from tiny_export import COLOURS, coloured, graph, openvino_files, write

pytest.importorskip("onnx")
RED = COLOURS["red"]
NAMES = (MANIFEST, "model.onnx", "references.safetensors", "retrieval.safetensors", "parity.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_the_mend(tmp_path: Path, name: str) -> None:
    export = write(tmp_path / "e")
    (export / name).unlink()
    with pytest.raises(InputError, match=rf"e: not a whole export, {name}.*missing.*export") as why:
        Runtime.load(export)
    assert "\n" not in str(why.value)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bytes_are_found(tmp_path: Path, name: str) -> None:
    export = write(tmp_path / "e")
    good = (export / name).read_bytes()
    for at in range(0, len(good), max(1, len(good) // 60)):
        (export / name).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(InputError, match=name):
            read_export(export)
    (export / name).write_bytes(good[:-1])
    with pytest.raises(InputError, match=name):
        read_export(export)


def test_what_is_no_export_is_told_apart(tmp_path: Path, tiny_weights: str, make_parts) -> None:
    with pytest.raises(InputError, match=r"no such exported bundle.*anomalyst export BUNDLE -o"):
        Runtime.load(tmp_path / "nothing")
    detector = Detector("anomaly-dino", backbone=TINY, weights=tiny_weights, image_size=96)
    detector.enroll("plate", [texture(0)])
    bundle = detector.save(tmp_path / "bundle")
    with pytest.raises(InputError, match=r"is a bundle, no export of one; .*anomalyst export .*b"):
        Runtime.load(bundle)
    with pytest.raises(InputError, match="is an exported bundle, which only judges images"):
        Detector.load(write(tmp_path / "e"))
    (tmp_path / "text.zip").write_text("x")
    with pytest.raises(InputError, match=r"text\.zip: cannot be read as an export"):
        Runtime.load(tmp_path / "text.zip")
    assert not is_export(bundle) and not is_export(tmp_path / "text.zip")


def test_a_newer_schema_is_refused_by_version(tmp_path: Path) -> None:
    path = write(tmp_path / "e") / MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 2, "something_new": True}))
    with pytest.raises(InputError, match=r"schema 2.*reads up to 1; upgrade"):
        Runtime.load(tmp_path / "e")


def test_an_export_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "e")
    write(path, {"green": ((0, 200, 0),)})
    assert list(read_export(path).manifest.categories) == ["green"]
    replace = exported.replace_file

    def stop(file: Path, content: bytes) -> None:
        if file.name == MANIFEST:
            raise OSError(28, "No space left on device")
        replace(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(exported, "replace_file", stop)
        for place in (path, tmp_path / "new"):
            with pytest.raises(InputError, match=r"cannot write the export \(No space left"):
                write(place)
    assert list(read_export(path).manifest.categories) == ["green"]
    assert [p.name for p in tmp_path.iterdir()] == ["e"]  # and no litter beside it
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="Input/output"):
        write(path)
    assert list(read_export(path).manifest.categories) == ["green"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")), "holds other files"),
        (lambda p: (p.mkdir(), (p / "model.onnx").write_text("mine")), "holds other files"),
    ],
)
def test_other_peoples_files_are_never_overwritten(tmp_path: Path, make, said: str) -> None:
    make(tmp_path / "e")
    with pytest.raises(InputError, match=said):
        write(tmp_path / "e")
    (tmp_path / "e.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="a zip of something else"):
        write(tmp_path / "e.zip")


def test_a_zipped_folder_is_an_export_too(tmp_path: Path) -> None:
    write(tmp_path / "in" / "e")
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "in"))
    assert is_export(packed)
    assert next(Runtime.load(packed).predict(coloured(RED))).category == "red"


# ---- engines ------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    export = write(tmp_path / "e")
    with pytest.raises(InputError, match="did you mean 'onnxruntime'"):
        Runtime.load(export, engine="onnxrutime")
    with pytest.raises(InputError, match="threads 0"):
        Runtime.load(export, threads=0)


def test_a_missing_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    export = write(tmp_path / "e", openvino=True)
    with pytest.raises(InputError, match="onnxruntime reads no OpenVINO graph"):
        Runtime.load(export, engine="onnxruntime")
    monkeypatch.setattr(engines, "installed", lambda package: None)
    with pytest.raises(InputError, match=r"openvino.*not installed.*'anomalyst\[openvino\]'"):
        Runtime.load(export)
    with pytest.raises(InputError, match="not installed: pip install onnxruntime"):
        Runtime.load(write(tmp_path / "f"))


def test_a_graph_of_the_future_is_refused_with_both_versions(tmp_path: Path) -> None:
    future = graph(opset=18).replace(b"AveragePool", b"FuturisPool")
    export = write(tmp_path / "e", model=future, versions={"onnxruntime": "99.1.0"})
    here = engines.installed("onnxruntime")
    with pytest.raises(InputError) as why:
        Runtime.load(export)
    text = str(why.value)
    assert f"onnxruntime {here} cannot read this graph, exported with 99.1.0" in text
    assert "FuturisPool" in text and "pip install -U onnxruntime" in text and "\n" not in text


@pytest.mark.parametrize(("version", "warned"), [("99.0.1", True), ("1.0.0", False), (None, False)])
def test_an_older_engine_than_the_export_was_checked_with_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str | None, warned: bool
) -> None:
    versions = {} if version is None else {"onnxruntime": version}
    with caplog.at_level(logging.WARNING):
        Runtime.load(write(tmp_path / "e", versions=versions))
    said = [record.message for record in caplog.records]
    assert bool(said) == warned
    assert not warned or ("99.0.1" in said[0] and "pip install -U onnxruntime" in said[0])


def test_versions_compare_by_number() -> None:
    assert engines.is_older("1.9.5", "1.10.0") and engines.is_older("2024.6", "2026.4.1")
    assert not engines.is_older("1.32.1", "1.32.0") and not engines.is_older("1.32.0", "1.32.9")


def test_openvino_computes_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    runtime = Runtime.load(write(tmp_path / "e", openvino=True), threads=1)
    compiled = runtime.engine._compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert set(openvino_files(graph())) == {"model.xml", "model.bin"}


def test_a_graph_of_other_inputs_than_the_manifests_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "e", model=graph(references=False))
    with pytest.raises(InputError, match="takes image and gives descriptor, map, score"):
        Runtime.load(tmp_path / "e")


def test_the_manifest_says_no_more_than_it_may(tmp_path: Path) -> None:
    found = read_export(write(tmp_path / "e"))
    assert set(found.manifest.sha256) == set(NAMES) - {MANIFEST}
    np.testing.assert_allclose(np.linalg.norm(found.retrieval["red"], axis=1), 1, rtol=1e-6)
    again = found.manifest.model_copy(deep=True)
    write_export(tmp_path / "again", again, {"model.onnx": found.model[0]})
    read = read_export(tmp_path / "again")
    assert (read.references, read.retrieval, read.model) == ({}, {}, found.model)


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_runs_a_graph_and_knows_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, detail = check.check_engines()
    assert works and f"onnxruntime {engines.installed('onnxruntime')}" in detail
    monkeypatch.setattr(check.platform, "machine", lambda: "x86_64")
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("processor : 0\nflags\t\t: fpu sse4_2 avx\n")
    new.write_text("processor : 0\nflags\t\t: fpu sse4_2 avx avx2\n")
    assert check.has_avx2(new) and not check.has_avx2(old) and check.has_avx2(tmp_path / "none")
    monkeypatch.setattr(check.platform, "machine", lambda: "aarch64")
    assert check.has_avx2(old)
    monkeypatch.setattr(check, "has_avx2", lambda: False)
    works, detail = check.check_engines()
    assert works and detail.endswith("works without AVX2, slower than with it")


def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, model: object, threads: object) -> None:
            raise OSError("libgomp.so.1: cannot open shared object file")

    class Wrong:
        def __init__(self, model: object, threads: object) -> None: ...

        def run(self, feeds):
            return {"map": feeds["image"][:, 0]}

    monkeypatch.setitem(check.ENGINES, "onnxruntime", Broken)
    works, detail = check.check_engines()
    assert not works and "onnxruntime: OSError: libgomp.so.1" in detail
    monkeypatch.setitem(check.ENGINES, "onnxruntime", Wrong)
    works, detail = check.check_engines()
    assert not works and "onnxruntime computes wrongly here" in detail
    monkeypatch.setattr(check, "installed", lambda name: None)
    assert check.check_engines() == (False, "missing onnxruntime: pip install onnxruntime")
