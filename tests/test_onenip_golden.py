"""OneNIP against values made with the authors' own code (its fixed form), and facts known of it."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.onenip import (
    OneNip,
    OneNipNetwork,
    OneNipOptions,
    jittered,
)
from anomalyst.methods.onenip_losses import squared_dice
from conftest import SHARED
from test_prompt_decoders import number

GRID = (5, 5)
SETTING = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "hidden": 64,
    "side": 5,
    "masked": "encoder",
    "dropout": 0.0,
    "jitter": 0.0,
    "standardize": False,
}
TINY = {"width": 64, "heads": 2, "hidden": 64, "encoder_layers": 1, "decoder_layers": 1, "side": 4}
# Our part of a parameter's name, and the authors'.
_PARTS = {
    "code.row": "pos_embed.row_embed.weight",
    "code.column": "pos_embed.col_embed.weight",
    "project.": "input_proj.",
    "rebuild.": "output_proj.",
    "encoder.0.": "transformer.encoder.layers.0.",
    "decoder.layers.": "transformer.decoder.layers.",
    "decoder.last.attn.": "transformer.decoder.final_attn_token_to_image.",
    "decoder.norm.": "transformer.decoder.norm.",
    ".attention.attn.": ".self_attn.",
    ".prompt_reads.attn.": ".cross_attn_prompt_to_image.",
    ".target_reads.attn.": ".cross_attn_image_to_prompt.",
    "refiner.8.": "seghead.predictor.",
}
_PARTS |= {f"refiner.{k}.": f"seghead.upconv1.{k}." for k in (0, 1, 3)}
_PARTS |= {f"refiner.{k + 4}.": f"seghead.upconv2.{k}." for k in (0, 1, 3)}


def theirs(name: str) -> str:
    """The authors' name of one of our parameters or buffers."""
    mlp = ("linear1", "linear2") if name.startswith("encoder") else ("mlp.lin1", "mlp.lin2")
    for mine, their in (*_PARTS.items(), ("mlp.rise", mlp[0]), ("mlp.fall", mlp[1])):
        if mine.startswith((".", "mlp")):
            name = name.replace(mine, their)
        elif name.startswith(mine):
            name = their + name.removeprefix(mine)
    return name


class Authors:
    """Their values, and our network with their weights."""

    def __init__(self) -> None:
        path = SHARED / "golden" / "onenip.npz"
        if not path.is_file():
            pytest.skip(f"the authors' values are not here ({path})")
        with np.load(path) as values:
            self.values = {k: torch.from_numpy(values[k]).float() for k in values.files}
        self.network = OneNipNetwork(24, 16, OneNipOptions(**SETTING)).eval()
        own = {"mean", "deviation", "scale"}
        state = {
            name: value if name in own or "num_batches" in name else self[f"param/{theirs(name)}"]
            for name, value in self.network.state_dict().items()
        }
        self.network.load_state_dict(state)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def part(self) -> list[Tensor]:
        """A training step as `forward` takes it; their masks begin with the clean maps', empty."""
        names = ("query_feat", "synthetic_feat", "prompt_feat")
        clean, pseudo, prompts = (self[name] for name in names)
        return [clean, pseudo, self["mask"][2:, 0], prompts]


@pytest.fixture
def authors() -> Authors:
    return Authors()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=5e-6)


def test_every_parameter_of_theirs_is_one_of_ours_and_the_other_way_round(
    authors: Authors,
) -> None:
    mine = {theirs(name) for name, _ in authors.network.named_parameters()}
    given = {k.removeprefix("param/") for k in authors.values if k.startswith("param/")}
    assert mine == {name for name in given if ".running_" not in name}


def test_the_reconstruction_is_the_authors(authors: Authors) -> None:
    network = authors.network
    prompts, tokens = (network.encode(authors[f"{name}_feat"]) for name in ("prompt", "query"))
    close(network._decode(tokens, prompts, GRID), authors["eval/rec_feat"])


def test_both_maps_are_the_authors(authors: Authors) -> None:
    network = authors.network
    prompts = network.encode(authors["prompt_feat"])
    reconstruction, refined = network.maps(authors["query_feat"], prompts)
    assert refined is not None
    close(reconstruction, authors["eval/rec_pred"][:, 0])
    close(refined, authors["eval/ref_pred"][:, 0])
    error = (authors["query_feat"] - authors["eval/rec_feat"]).abs()
    close(network.refine(error), authors["eval/ref_logit"][:, 0])


def test_in_training_reconstruction_and_logits_are_the_authors(authors: Authors) -> None:
    network, seen = authors.network.train(), {}
    network.rebuild.register_forward_hook(lambda _, __, out: seen.update(rebuilt=out))
    network.refiner.register_forward_hook(lambda _, __, out: seen.update(logits=out))
    network(authors.part())
    close(seen["rebuilt"].transpose(1, 2).unflatten(2, GRID), authors["train/rec_feat"])
    logits = torch.nn.functional.interpolate(
        seen["logits"], (80, 80), mode="bilinear", align_corners=True
    )
    close(logits, authors["train/ref_logit"])


def test_losses_and_all_gradients_are_the_authors(authors: Authors) -> None:
    assert not authors["mask"][:2].any() and authors["mask"][2:].any(dim=(1, 2, 3)).all()
    network = authors.network.train()
    losses = network(authors.part())
    mse, dice = authors["train/loss_mse"], authors["train/loss_dice"]
    close((losses["reconstruction"] + losses["restoration"]) / 2, mse)
    close(losses["segmentation"], dice)
    close(losses["loss"], mse + 0.5 * dice)
    losses["loss"].backward()
    compared = 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        if f"grad/{theirs(name)}" in authors.values:
            expected = authors[f"grad/{theirs(name)}"]
            size = float(expected.abs().max())
            assert size > 0, name
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=2e-5 * size)
            compared += 1
    assert compared == sum(name.startswith("grad/") for name in authors.values) == 48


# ---- facts known of their code -------------------------------------------------------------------


def test_parameters_are_as_many_as_the_official_networks() -> None:
    with torch.device("meta"):  # shapes without numbers
        network = OneNipNetwork(272, 16, OneNipOptions(side=14))
        legacy = OneNipNetwork(272, 16, OneNipOptions(side=14, decoder="legacy"))
        uniad = OneNipNetwork(272, 16, OneNipOptions(side=14, decoder="query", refiner=False))
    parts = (network.project, network.rebuild, network.code, network.encoder, network.refiner)
    assert [number(each) for each in parts] == [69_888, 69_904, 3_584, 4 * 789_760, 592_769]
    assert number(network.decoder) == 4 * 1_053_440 + 263_168 + 512
    assert number(network) == number(legacy) == 8_372_625
    assert number(uniad) == 7_717_392


@torch.no_grad()
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (20, 20), (5, 3), (1, 1)])
def test_shapes_on_any_grid(grid: tuple[int, int]) -> None:
    with torch.random.fork_rng():
        network = OneNipNetwork(12, 16, OneNipOptions(**TINY)).eval()
        maps = torch.randn(1, 12, *grid)
    tokens = network.encode(maps)
    assert tokens.shape == (1, grid[0] * grid[1], 64)
    for found in (*network.maps(maps, tokens), network.judge(maps, tokens)):
        assert found.shape == (1, 16 * grid[0], 16 * grid[1]) and found.isfinite().all()
    assert network.refiner(maps).shape == (1, 1, 4 * grid[0], 4 * grid[1])


def test_first_weights_are_xavier_uniform_without_bias() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OneNipNetwork(64, 16, OneNipOptions(**TINY))
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    modules = {n: m for n, m in network.named_modules() if isinstance(m, kinds)}
    assert len(modules) == 2 + 3 + 5 + 5  # ends, encoder, decoder, refiner
    for name, module in modules.items():
        weight, bias = module.weight.detach(), module.bias
        limit = sqrt(6 / (sum(weight.shape[:2]) * weight[0, 0].numel()))
        assert 0.95 * limit < weight.abs().max() <= limit, name
        assert abs(float(weight.mean())) < 0.1 * limit, name
        assert bias is None or not bias.any(), name
    for layer in (network.encoder[0].attention, network.decoder.last):
        weight = layer.attn.in_proj_weight.detach()
        assert (
            0.95 < weight.abs().max() / sqrt(6 / (4 * 64)) <= 1
            and not layer.attn.in_proj_bias.any()
        )


def test_jitter_has_the_papers_strength_and_leaves_zero_tokens() -> None:
    tokens = 3 * torch.randn(2, 1000, 272, generator=torch.Generator().manual_seed(0)).double()
    tokens[0, :10] = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = jittered(tokens, 20)
    assert not found[0, :10].any()
    noise = (found - tokens).flatten(0, 1)[10:]
    ratio = noise.square().sum(1) / tokens.flatten(0, 1)[10:].square().sum(1)
    assert ratio.mean() == pytest.approx(400 / 272, rel=0.02)
    assert ratio.std() == pytest.approx(400 / 272 * sqrt(2 / 272), rel=0.1)  # one length a token
    assert noise.mean(0).abs().max() < 5 * noise.std() / sqrt(len(noise))


def test_normal_images_teach_an_undecided_refiner_next_to_nothing() -> None:
    """The figures of sheet 5.4 at 224 x 224."""
    logits = torch.zeros(2, 224, 224, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 224, 224, dtype=torch.float64)
    mask[1].view(-1)[:1000] = 1
    squared_dice(logits[:1].sigmoid(), mask[:1], False).backward()
    assert logits.grad[0].max() == pytest.approx(1.6e-9, rel=0.02)
    squared_dice(logits[1:].sigmoid(), mask[1:], False).backward()
    assert logits.grad[1].min() == pytest.approx(-1.8e-5, rel=0.02)
    assert logits.grad[1].max() == pytest.approx(6.8e-7, rel=0.02)


def test_what_the_backbone_and_the_options_fix() -> None:
    layers = {"efficientnet-b4": (0, 1, 2, 3), "dinov2-small-packaged": (4, 7)}
    for name, expected in layers.items():
        assert OneNip.default_layers(find_backbone(name)) == expected
    backbone = find_backbone("efficientnet-b4")
    network = OneNip(OneNipOptions(**TINY), backbone, (0, 1, 2, 3), 0).network
    assert (network.project.in_features, network.stride) == (272, 16)
    for wrong in ({"width": 18, "heads": 4}, {"width": 15, "heads": 3}):
        with pytest.raises(InputError, match="even multiple of heads"):
            OneNip(OneNipOptions(**wrong), backbone, (0, 1), 0)


def test_the_papers_recipe_is_adamw_with_one_drop_of_the_rate() -> None:
    paper = OneNipOptions(**OneNip.presets["paper"]["options"])
    assert [paper.rate(step, 1000) for step in (0, 799, 800, 999)] == [1e-4, 1e-4, 1e-5, 1e-5]
    optimizer = paper.optimizer(nn.Linear(2, 2).parameters())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] == 1e-4
    assert optimizer.defaults["betas"] == (0.9, 0.999) and paper.clip == 0.1
