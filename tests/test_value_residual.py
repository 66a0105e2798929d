"""Values of the first layer in all others: by hand, with a cache, packed, saved, refused."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tinylm.shortconv  # noqa: F401  (adds its kinds of layers)
from tinylm.basics import FieldError
from tinylm.checkpoints import config_to_hf, load_model, save_model
from tinylm.cost import count_parameters
from tinylm.hub import to_transformers
from tinylm.kv_cache import KVCache
from tinylm.lora import LoraConfig, add_lora, merge_lora
from tinylm.model import Block, ModelConfig, TinyLM
from tinylm.quantize import prepare_decoding

PLAIN = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MIXED = replace(PLAIN, value_residual=True)
CANON = replace(MIXED, layer_types=("canon_attention",) * 3, conv_L_cache=4)


def build(config):
    torch.manual_seed(0)
    model = TinyLM(config).eval()
    for name, weight in model.named_parameters():
        if "shares" in name or "canon" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.fixture(params=[MIXED, CANON], ids=["attention", "canon_attention"])
def model(request):
    return build(request.param)


def ids(B, T):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_shares_of_one_and_zero_are_the_plain_model():
    plain = build(PLAIN)
    mixed = build(MIXED)
    mixed.load_state_dict(plain.state_dict(), strict=False)
    for layer in mixed.model.layers[1:]:
        layer.shares.copy_(torch.tensor([1.0, 0.0]))
    assert_close(mixed(ids(2, 12)), plain(ids(2, 12)), rtol=0, atol=0)
    mixed.model.layers[2].shares.copy_(torch.tensor([1.0, 0.5]))
    assert (mixed(ids(2, 12)) - plain(ids(2, 12))).abs().max() > 1e-4


@torch.no_grad()
def test_all_values_of_the_first_layer():
    """With the shares 0 and 1 the projections of the later layers do not matter."""
    model = build(MIXED)
    for layer in model.model.layers[1:]:
        layer.shares.copy_(torch.tensor([0.0, 1.0]))
    before = model(ids(2, 12))
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.self_attn.v_proj.weight)
    assert_close(model(ids(2, 12)), before, rtol=0, atol=0)
    torch.nn.init.normal_(model.model.layers[0].self_attn.v_proj.weight)
    assert (model(ids(2, 12)) - before).abs().max() > 1e-4


@torch.no_grad()
def test_a_cache_changes_nothing(model):
    whole = model(ids(2, 12))
    cache = KVCache(model.config, 2, 20)
    parts = [model(part, cache=cache) for part in ids(2, 12).split([5, 1, 4, 2], 1)]
    assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_documents_stay_apart(model):
    row = torch.cat((ids(2, 12)[:1], ids(2, 12)[1:]), 1)
    documents = torch.tensor([[0] * 12 + [1] * 12])
    packed = model(row, document_ids=documents)
    assert_close(packed[:, 12:], model(ids(2, 12)[1:]))


def test_every_weight_learns_and_checkpointing_changes_nothing(model):
    model.train()
    model(ids(2, 12), ids(2, 12)).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    model.zero_grad()
    model.model.gradient_checkpointing = True
    model(ids(2, 12), ids(2, 12)).backward()
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, gradients[name]), name


@torch.no_grad()
def test_weights_laid_out_for_decoding(model):
    whole = model(ids(1, 12))
    prepare_decoding(model)
    assert_close(model(ids(1, 12)), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lora_merges(model):
    add_lora(model, LoraConfig(r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    with_adapters = model(ids(2, 9))
    merge_lora(model)
    assert_close(model(ids(2, 9)), with_adapters, rtol=1e-4, atol=1e-4)


def test_saved_and_opened(model, tmp_path):
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config.value_residual
    with torch.no_grad():
        assert torch.equal(again(ids(1, 9)), model(ids(1, 9)))


def test_no_family_has_it():
    with pytest.raises(ValueError, match="value_residual=True"):
        config_to_hf(MIXED)
    with pytest.raises(ValueError, match="value_residual=True"):
        to_transformers(build(MIXED))


@torch.no_grad()
def test_one_layer_has_nothing_to_mix():
    alone = build(replace(MIXED, num_hidden_layers=1))
    plain = build(replace(PLAIN, num_hidden_layers=1))
    assert torch.equal(alone(ids(2, 9)), plain(ids(2, 9)))


class OwnPart(Block):
    """A block with a part of its own."""

    def make_mlp(self, config):
        return torch.nn.Identity()


class OwnForward(Block):
    """A block that does everything in its own way."""

    def forward(self, x, *args):
        return x


def test_what_cannot_have_it_is_refused():
    with pytest.raises(FieldError, match="layer 0 is MLAttention: leave it out"):
        TinyLM(replace(MIXED, kv_lora_rank=8))
    with pytest.raises(FieldError, match="layer 1 is ShortConv: leave it out"):
        TinyLM(replace(MIXED, layer_types=("full_attention", "conv", "full_attention")))
    with pytest.raises(FieldError, match="OwnForward has a `forward` of its own"):
        TinyLM(MIXED, OwnForward)


def test_a_part_of_ones_own_goes_with_it():
    assert TinyLM(MIXED, OwnPart)(ids(2, 9)).shape == (2, 9, 50)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("config", [MIXED, CANON, replace(MIXED, num_experts=4)])
def test_the_count_of_parameters_contains_the_shares(config, layers):
    kinds = config.layer_types[:1] * layers
    config = replace(config, num_hidden_layers=layers, layer_types=kinds)
    size = sum(weight.numel() for weight in build(config).parameters())
    counts = count_parameters(config)
    assert counts["total"] == size and "other" not in counts
