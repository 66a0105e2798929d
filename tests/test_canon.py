"""Attention after a convolution: its cache, its masks, what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from tinylm.basics import FieldError
from tinylm.checkpoints import load_model, save_model
from tinylm.cost import cache_bytes, flops_by_part
from tinylm.generate import SamplingConfig, generate
from tinylm.kv_cache import KVCache, SlidingCache
from tinylm.model import ModelConfig, TinyLM
from tinylm.shortconv import CanonAttention

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_types=("canon_attention",) * 2,
    conv_L_cache=4,
    max_position_embeddings=64,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TinyLM(CONFIG).eval()
    for name, weight in model.named_parameters():
        if "canon" in name:
            assert not weight.any(), "it begins as plain attention"
            torch.nn.init.normal_(weight)
    return model


def ids(B, T):
    return torch.randint(0, 50, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_begins_as_plain_attention():
    torch.manual_seed(0)
    canon = TinyLM(CONFIG)
    plain = TinyLM(ModelConfig(**{**vars(CONFIG), "layer_types": ()}))
    plain.load_state_dict(
        {name: w for name, w in canon.state_dict().items() if "canon" not in name}
    )
    assert torch.equal(canon(ids(2, 12)), plain(ids(2, 12)))


@torch.no_grad()
@pytest.mark.parametrize("kind", [KVCache, SlidingCache])
def test_cache_goes_back_and_forks(model, kind):
    whole = model(ids(1, 12))
    cache = kind(CONFIG, 1, 20)
    model(ids(1, 12)[:, :7], cache=cache)
    model(torch.zeros(1, 3, dtype=torch.long), cache=cache)  # three tokens that are taken back
    cache.rewind(7)
    fork = cache.fork(2)
    rest = model(ids(1, 12)[:, 7:].expand(2, -1), cache=fork)
    assert_close(rest, whole[:, 7:].expand(2, -1, -1))
    assert_close(model(ids(1, 12)[:, 7:], cache=cache), whole[:, 7:])


@torch.no_grad()
def test_cache_refuses_before_it_writes(model):
    cache = KVCache(CONFIG, 1, 4)
    model(ids(1, 3), cache=cache)
    before = [store.keys.clone() for store in cache.stores]
    with pytest.raises(ValueError, match="make it longer"):
        model(ids(1, 2), cache=cache)
    assert all(torch.equal(a, b.keys) for a, b in zip(before, cache.stores, strict=True))
    assert len(cache.stores) == 4


def test_cost_counts_the_inputs_that_are_kept():
    plain = ModelConfig(**{**vars(CONFIG), "layer_types": ()})
    added = cache_bytes(CONFIG, 1, 64) - cache_bytes(plain, 1, 64)
    assert added == 2 * 4 * (4 - 1 + 16) * 32  # layers, bytes, positions, numbers
    work = flops_by_part(CONFIG, 64)
    taps = 2 * 2 * 4 * 32  # layers, a product and a sum, taps, channels
    assert work["projections"] - flops_by_part(plain, 64)["projections"] == taps
    assert work["attention"] == flops_by_part(plain, 64)["attention"]


@torch.no_grad()
def test_padded_batch_is_each_text_alone(model):
    long = ids(2, 9)[0].tolist()
    short = ids(2, 9)[1, :4].tolist()
    config = SamplingConfig(max_new_tokens=6, temperature=0)
    together = generate(model, [long, short], config)
    alone = [generate(model, [text], config)[0] for text in (long, short)]
    for one, other in zip(together, alone, strict=True):
        assert list(one) == list(other)


def test_saved_and_opened(model, tmp_path):
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config.layer_types == CONFIG.layer_types
    assert isinstance(again.model.layers[0].self_attn, CanonAttention)
    with torch.no_grad():
        assert torch.equal(again(ids(1, 9)), model(ids(1, 9)))


@pytest.mark.parametrize(
    "change", [{"kv_lora_rank": 8}, {"attention_sinks": True}, {"attn_logit_softcapping": 50.0}]
)
def test_other_attentions_are_refused(change):
    with pytest.raises(FieldError, match="canon_attention cannot have it"):
        TinyLM(ModelConfig(**{**vars(CONFIG), **change}))
