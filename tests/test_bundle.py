"""The bundle's format: hashes, atomic replacement, refusals."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from anomalyst import bundle as bundle_module
from anomalyst.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    BackboneRecord,
    Manifest,
    bundle_hash,
    read_bundle,
    write_bundle,
)
from anomalyst.errors import InputError

PARTS = {"method": {"bottle": np.arange(6, dtype=np.float32).reshape(2, 3)}}


def manifest() -> Manifest:
    return Manifest(
        method="patchcore",
        options={},
        seed=0,
        backbone=BackboneRecord(id="x", layers=(1,), weights_sha256="0"),
        preprocess={},
        alpha=0.01,
        alpha_review=0.05,
        categories={},
        setting="single",
        shots=None,
        data_fingerprint="",
        seconds={},
        versions={},
        created="",
    )


@pytest.mark.parametrize("name", ["b", "b.zip", "deep/er/b", "deep/b.zip"])
def test_written_is_read_back(tmp_path: Path, name: str) -> None:
    write_bundle(tmp_path / name, manifest(), PARTS)
    found, parts = read_bundle(tmp_path / name)
    assert found.method == "patchcore"
    np.testing.assert_array_equal(parts["method"]["bottle"], PARTS["method"]["bottle"])
    assert len(bundle_hash(tmp_path / name)) == 64


def test_flipped_bytes_are_found(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), PARTS)
    for path in (tmp_path / "b").iterdir():
        good = path.read_bytes()
        for at in range(0, len(good), 3):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(InputError):
                read_bundle(tmp_path / "b")
        path.write_bytes(good)
    read_bundle(tmp_path / "b")


def test_flipped_bytes_of_a_zip_are_found_or_harmless(tmp_path: Path) -> None:
    """A zip holds bytes that mean nothing (times, attributes); no flip may change what is read."""
    path = tmp_path / "b.zip"
    write_bundle(path, manifest(), PARTS)
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            found, parts = read_bundle(path)
        except InputError:
            continue
        assert found == read_manifest(tmp_path, good)
        np.testing.assert_array_equal(parts["method"]["bottle"], PARTS["method"]["bottle"])


def read_manifest(folder: Path, content: bytes) -> Manifest:
    (folder / "good.zip").write_bytes(content)
    return read_bundle(folder / "good.zip")[0]


def test_a_damaged_bundle_is_mended_by_writing_it_again(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), PARTS)
    tensors = next((tmp_path / "b").glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    write_bundle(tmp_path / "b", manifest(), PARTS)
    read_bundle(tmp_path / "b")


def test_a_zipped_folder_is_a_bundle_too(tmp_path: Path) -> None:
    import shutil

    write_bundle(tmp_path / "in" / "b", manifest(), PARTS)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "in")
    assert read_bundle(Path(archive))[0].method == "patchcore"
    assert bundle_hash(Path(archive)) == bundle_hash(tmp_path / "in" / "b")
    write_bundle(Path(archive), manifest(), {"method": {"screw": np.zeros(2)}})
    assert list(read_bundle(Path(archive))[1]["method"]) == ["screw"]


def test_a_new_state_replaces_the_old_and_leaves_no_litter(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), PARTS)
    write_bundle(tmp_path / "b", manifest(), {"method": {"screw": np.zeros(2)}})
    assert list(read_bundle(tmp_path / "b")[1]["method"]) == ["screw"]
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_stopped_before_the_last_step_the_old_bundle_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "b", manifest(), PARTS)
    replace = bundle_module.replace_file

    def stop_at_manifest(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        replace(path, content)

    monkeypatch.setattr(bundle_module, "replace_file", stop_at_manifest)
    with pytest.raises(InputError, match="No space left"):
        write_bundle(tmp_path / "b", manifest(), {"method": {"screw": np.zeros(2)}})
    assert list(read_bundle(tmp_path / "b")[1]["method"]) == ["bottle"]


def test_a_newer_schema_is_refused_by_version(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", manifest(), PARTS)
    path = tmp_path / "b" / MANIFEST
    content = json.loads(path.read_text())
    content["schema_version"] = SCHEMA_VERSION + 1
    content["something_new"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"schema {SCHEMA_VERSION + 1}.*upgrade"):
        read_bundle(tmp_path / "b")


def test_refusals_name_the_place_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*anomalyst fit"):
        read_bundle(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty.*bundle\.json"):
        read_bundle(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(InputError, match=r"text\.zip"):
        read_bundle(tmp_path / "text.zip")
    write_bundle(tmp_path / "b", manifest(), PARTS)
    next((tmp_path / "b").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="missing"):
        read_bundle(tmp_path / "b")


def test_other_peoples_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(InputError, match="other files"):
        write_bundle(tmp_path / "photos", manifest(), PARTS)
    write_bundle(tmp_path / "c", manifest(), PARTS)
    (tmp_path / "c" / "mine.safetensors").write_text("mine")
    write_bundle(tmp_path / "c", manifest(), {"method": {"screw": np.zeros(2)}})
    assert (tmp_path / "c" / "mine.safetensors").read_text() == "mine"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", "x")
    with pytest.raises(InputError, match="something else"):
        write_bundle(tmp_path / "photos.zip", manifest(), PARTS)
    with pytest.raises(InputError, match="is a file"):
        write_bundle(tmp_path / "photos" / "a.jpg", manifest(), PARTS)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "x"
