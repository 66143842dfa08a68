"""IIPAD's generator, and the text tower that its prompts pass."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalyst.errors import InputError
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.iipad import Iipad, IipadNetwork, IipadOptions
from anomalyst.methods.iipad_generator import Generator, Sizes
from conftest import CLIP
from test_iipad_tower import Build, build, qformer_folder, stock  # noqa: F401

FORMS = ("paper", "code")
SIZES = Sizes(width=48, objects=16, slots=24, compressed=4)


def make(form: str = "paper", instance: str = "both", sizes: Sizes = SIZES) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generator(form, sizes, instance, 0.2, 1.0).eval()


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 16, 48, generator=generator)
    return z, functional.normalize(torch.randn(count, 48, generator=generator), dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_two_sequences_of_every_image(form: str) -> None:
    generator = make(form)
    z, v = inputs(3)
    found = generator(z, v)
    assert found.shape == (3, 2, 28, 48)
    torch.testing.assert_close(found[1:2], generator(z[1:2], v[1:2]))
    assert make(form, sizes=SIZES._replace(compressed=0))(z, v).shape == (3, 2, 24, 48)


@pytest.mark.parametrize("form", FORMS)
def test_zero_networks_leave_the_learned_tokens(form: str) -> None:
    generator = make(form)
    for name, parameter in generator.named_parameters():
        if name != "prompts":
            nn.init.zeros_(parameter)
    found = generator(*inputs())
    torch.testing.assert_close(found[:, :, :24], generator.prompts.expand(2, -1, -1, -1))
    assert not found[:, :, 24:].any()


def test_the_parts_can_be_taken_away() -> None:
    z, v = inputs()
    full = make()(z, v)
    static = make(instance="none")(z, v)
    torch.testing.assert_close(static[0, :, :24], static[1, :, :24])
    other = torch.randn_like(v)
    attended, plain = make(instance="attention"), make(instance="cls")
    assert not torch.allclose(attended(z, v)[..., :24, :], full[..., :24, :])
    torch.testing.assert_close(plain(z + 1, v)[..., :24, :], plain(z, v)[..., :24, :])
    assert not torch.allclose(plain(z, other)[..., :24, :], plain(z, v)[..., :24, :])


def test_the_codes_slots_have_rank_two_and_the_papers_more() -> None:
    _, v = inputs()
    for form, most in (("code", 2), ("paper", 24)):
        slots = make(form).shared(v[:, None])[0]
        rank = int(torch.linalg.matrix_rank(slots.double(), rtol=1e-5))
        assert rank <= most and (form == "code" or rank > 2)


@pytest.mark.parametrize("form", FORMS)
def test_order_counts_for_the_mixers_and_not_for_the_attention(form: str) -> None:
    generator = make(form)
    z, v = inputs()
    swapped = z[:, torch.randperm(16, generator=torch.Generator().manual_seed(2))]
    assert not torch.allclose(generator(z, v), generator(swapped, v), atol=1e-3)
    branch = generator.branches[0]
    torch.testing.assert_close(branch.ask(v[:, None], z), branch.ask(v[:, None], swapped))


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_in_training_alone(form: str) -> None:
    generator = make(form)
    z, v = inputs()
    assert torch.equal(generator(z, v), generator(z, v))
    generator.train()
    assert not torch.equal(generator(z, v), generator(z, v))


def test_the_codes_object_tokens_have_an_activation_less_in_the_abnormal_branch() -> None:
    generator = make("code")
    z, v = inputs()
    made = generator(z, v)[:, :, 24:]
    for branch, found, inner in zip(generator.branches, made.unbind(1), (0.01, 1.0), strict=True):
        first, second = branch.compress[0].linear, branch.compress[2].linear
        narrow = functional.leaky_relu(torch.einsum("nm,bmd->bnd", first.weight, z), inner)
        expected = functional.leaky_relu(torch.einsum("on,bnd->bod", second.weight, narrow), 0.01)
        torch.testing.assert_close(found, expected)


def test_the_codes_size_is_the_sheets() -> None:
    sizes = Sizes(768, 16, 24, 4)
    count = sum(p.numel() for p in make("code", sizes=sizes).parameters())
    assert count == pytest.approx(8.90e6, rel=0.005)


def test_linear_layers_start_as_the_codes_do() -> None:
    generator = make("code", sizes=Sizes(768, 16, 24, 4))
    branch = generator.branches[1]
    out = branch.attend.out_proj
    assert out.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)
    assert not out.bias.any() and generator.prompts.std().item() == pytest.approx(1, rel=0.02)


# ---- the text tower -----------------------------------------------------------------------------


def network(build: Build, **options: object) -> IipadNetwork:  # noqa: F811
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return IipadNetwork(build().tower, IipadOptions(**options), 4).eval()


class Words(nn.Module):
    """A generator that says the same whatever it sees."""

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        self.words = words

    def forward(self, objects: Tensor, cls: Tensor) -> Tensor:
        return self.words.expand(len(cls), 2, -1, -1)


Z, V = torch.randn(2, 48, 4, 1, generator=torch.Generator().manual_seed(3)), torch.ones(2, 48, 1, 1)


def test_a_captions_own_words_give_its_embedding(build: Build, stock: open_clip.CLIP) -> None:  # noqa: F811
    made = network(build)
    caption = "a photo of a flawless screw"
    ids = made.text.tokenize([caption])
    length = int(ids.argmax()) - 1
    made.generator = Words(stock.token_embedding(ids)[:, 1 : 1 + length])
    with torch.no_grad():
        found, tokens = made.prompts(Z, V)
        expected = functional.normalize(stock.encode_text(ids), dim=1)
    torch.testing.assert_close(found, expected.expand(2, 2, -1), atol=1e-5, rtol=1e-5)
    assert tokens.shape == (2, 2, length, 48)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 2, length))


def test_what_stands_behind_changes_nothing(build: Build) -> None:  # noqa: F811
    made = network(build)
    generator = torch.Generator().manual_seed(4)
    words = torch.randn(1, 1, 28, 48, generator=generator)
    changed = words.clone()
    changed[..., 27, :] *= -1
    with torch.no_grad():
        results = []
        for said in (words, changed):
            made.generator = Words(said)
            results.append(made.prompts(Z, V))
        padded = torch.randn(2, 40, 48, generator=generator)
        short, _ = made.text.encode(padded[:, :30], torch.full((2,), 29))
        long, _ = made.text.encode(padded, torch.full((2,), 29))
    (_, one), (_, other) = results
    torch.testing.assert_close(one[:, :, :27], other[:, :, :27])
    assert not torch.allclose(one[:, :, 27], other[:, :, 27], atol=1e-3)
    torch.testing.assert_close(short, long)


def test_gradients_reach_the_generator_alone(build: Build) -> None:  # noqa: F811
    made = network(build)
    found, tokens = made.prompts(Z, V)
    (found.sum() + tokens[:, :, ::2].sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
    assert {name.partition(".")[0] for name in made.state_dict()} == {"generator"}
    assert all(p.grad is None for p in build().tower.parameters())


def test_settings_that_no_clip_takes_are_named(build: Build) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"78 tokens, CLIP reads 75"):
        network(build, slots=74)
    tower = build().tower
    tower.model.visual.proj = nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(InputError, match=r"words have 48 channels, images and sentences 32"):
        IipadNetwork(tower, IipadOptions(), 4)


def test_the_network_is_made_of_the_seed(build: Build) -> None:  # noqa: F811
    layers = Iipad.default_layers(find_backbone(CLIP))
    states = []
    for seed in (1, 1, 2):
        method = Iipad(IipadOptions(), find_backbone(CLIP), layers, seed)
        method.bind(build().tower)
        states.append(method.network.generator.prompts)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
