"""Small parts as blocks: equal to published layers, correct with caches and packing, bad input."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, GptOssConfig, NemotronConfig, Qwen3NextConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.nemotron.modeling_nemotron import NemotronMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from tinylm.attention import attend, attention_mask
from tinylm.basics import FieldError
from tinylm.kv_cache import KVCache
from tinylm.model import Block, TinyLM
from tinylm.parts import (
    AttentionBlock,
    GatedAttention,
    GatedBlock,
    ReLUSquared,
    ReLUSquaredBlock,
    ShiftBlock,
    SinkAttention,
    SinkBlock,
    SoftcapAttention,
    SoftcapBlock,
    attend_by_hand,
    tap_mask,
)
from tinylm.proofs import INVARIANCES, LAYOUTS, TINY, build, check_invariances
from tinylm.rope import precompute_rope

BLOCKS = [ReLUSquaredBlock, GatedBlock, SoftcapBlock, SinkBlock, ShiftBlock]
GQA = LAYOUTS["GQA, QK-norm (Qwen3)"]
EXPERTS = replace(TINY, num_experts=4, moe_intermediate_size=16)
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
each_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)


def randomized(layer: nn.Module) -> nn.Module:
    """Give a layer large random weights in float64."""
    torch.manual_seed(0)
    for weight in layer.double().eval().requires_grad_(False).parameters():
        nn.init.normal_(weight, std=0.5)
    return layer


def compare(ours: nn.Module, theirs: nn.Module, rotated: int, eps: float) -> None:
    """Run an attention layer, and one of transformers, on the same input."""
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    cos, sin = precompute_rope(8, 12)
    mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
    theirs.config._attn_implementation = "eager"
    rope = (cos[None, :, :rotated], sin[None, :, :rotated])
    expected, _ = theirs(x, rope, mask)
    torch.testing.assert_close(ours(x, (cos, sin)), expected.double(), rtol=eps, atol=eps)


# Equal to published layers


def test_softcap_equals_gemma_2():
    config = Gemma2Config(**SIZES, query_pre_attn_scalar=8, attn_logit_softcapping=50.0)
    theirs = randomized(Gemma2Attention(config, layer_idx=0))
    ours = SoftcapAttention(**SIZES).double()
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, 8, 1e-4)


def test_sinks_equal_gpt_oss():
    theirs = randomized(GptOssAttention(GptOssConfig(**SIZES, attention_bias=True), layer_idx=0))
    ours = SinkAttention(**SIZES, attention_bias=True).double()
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, 4, 1e-10)


def test_gate_equals_qwen3_next():
    theirs = randomized(Qwen3NextAttention(Qwen3NextConfig(**SIZES), layer_idx=3))
    weights = theirs.state_dict()
    q_weight, gate_weight = weights.pop("q_proj.weight").view(4, 2, 8, 32).unbind(1)
    weights["q_proj.weight"] = q_weight.flatten(0, 1)
    weights["gate_proj.weight"] = gate_weight.flatten(0, 1)
    for name in ("q_norm.weight", "k_norm.weight"):
        weights[name] = weights[name] + 1
    ours = GatedAttention(**SIZES, qk_norm=True).double()
    ours.load_state_dict(weights)
    compare(ours, theirs, 8, 1e-4)


def test_relu_squared_equals_nemotron():
    theirs = randomized(NemotronMLP(NemotronConfig(hidden_size=32, intermediate_size=48)))
    ours = ReLUSquared(32, 48).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_change_it_is_plain_attention(masked):
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 2, 9, 8)
    mask = attention_mask(5, 9, window=3) if masked else None
    torch.testing.assert_close(attend_by_hand(q, k, v, mask), attend(q, k, v, mask))


def test_mixed_values_as_a_loop():
    """The published code keeps the first layer's values in a list that all layers share."""
    model = build(replace(TINY, value_residual=True))
    ids = torch.randint(32, (2, 9))
    rope = model.model.rope[:, :9]
    x = model.model.embed_tokens(ids)
    values: list[torch.Tensor] = []
    for layer in model.model.layers:
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        own = attention.v_proj(h)
        values.append(own)
        if len(values) > 1:
            own = layer.shares[0] * own + layer.shares[1] * values[0]
        x = x + attention(h, rope, values=own)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(model(ids), model.lm_head(model.model.norm(x)))


def test_shifts_equal_a_convolution():
    block = randomized(ShiftBlock(TINY, 0))
    h = torch.randn(2, 9, 32, dtype=torch.float64)
    taps = block.taps.view(32, 1, 4)
    convolved = F.conv1d(F.pad(h.mT, (3, 0)), taps, groups=32).mT
    torch.testing.assert_close(block.shift(h, None, None), h + convolved)


def test_tap_mask_stays_in_the_document():
    document_ids = torch.tensor([[0, 0, 1, 1, 1, 2]])
    taps = tap_mask(attention_mask(6, 6, document_ids=document_ids), 3)
    assert taps.int().tolist() == [
        [[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]
    ]
    assert tap_mask(attention_mask(3, 6), 3) is None


# At the start of training


@pytest.mark.parametrize("block", [AttentionBlock, ShiftBlock])
def test_some_begin_as_the_plain_model(block):
    ids = torch.arange(24).view(2, 12)
    logits = []
    for kind in (Block, block):
        torch.manual_seed(0)
        logits.append(TinyLM(TINY, kind)(ids))
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_relu_squared_has_as_many_parameters():
    counts = {sum(p.numel() for p in TinyLM(TINY, b).parameters()) for b in (Block, BLOCKS[0])}
    assert len(counts) == 1


@each_block
def test_every_parameter_gets_a_gradient(block):
    model = TinyLM(GQA, block)
    ids = torch.randint(32, (2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert loss.isfinite() and not missing


# With caches, packing, padding


@each_block
def test_invariances(block):
    results = check_invariances(GQA, block)
    assert all(result.holds for result in results.values()), results


@each_block
def test_invariances_with_windows(block):
    titles = [title for title in INVARIANCES if "compiled" not in title]
    results = check_invariances(LAYOUTS["GQA, window of 4 in layer 1"], block, titles)
    assert all(result.holds for result in results.values()), results


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block.__name__)
def test_experts(block):
    titles = ["token by token\n= whole", "packed\n= separate", "padded\n= alone"]
    assert all(result.holds for result in check_invariances(EXPERTS, block, titles).values())


def test_shifts_with_latent_attention():
    titles = ["token by token\n= whole", "packed\n= separate", "padded\n= alone"]
    assert all(r.holds for r in check_invariances(LAYOUTS["MLA"], ShiftBlock, titles).values())


def test_the_cache_of_shifts_can_be_rewound_and_copied():
    model = build(GQA, ShiftBlock)
    ids = torch.randint(32, (1, 12))
    cache = KVCache(GQA, 1, 16, torch.float64)
    model(ids[:, :6], cache=cache)
    model(ids[:, :3], cache=cache)  # a wrong guess
    cache.rewind(6)
    copies = cache.fork(2)
    copies.reorder(torch.tensor([1, 0, 1]))
    logits = model(ids[:, 6:].expand(3, -1), cache=copies)
    torch.testing.assert_close(logits, model(ids)[:, 6:].expand(3, -1, -1))


def test_layers_of_other_kinds_stay():
    config = replace(TINY, layer_types=("conv", "full_attention"))
    model = TinyLM(config, GatedBlock)
    assert [type(layer.self_attn).__name__ for layer in model.model.layers] == [
        "ShortConv",
        "GatedAttention",
    ]
    with pytest.raises(FieldError, match="GatedBlock would change no layer, use full_attention"):
        TinyLM(replace(config, layer_types=("conv",)), GatedBlock)


# Bad input


@pytest.mark.parametrize("block", [GatedBlock, SoftcapBlock, SinkBlock])
def test_latent_attention_is_refused(block):
    with pytest.raises(FieldError, match=f"{block.__name__} needs attention with heads"):
        TinyLM(LAYOUTS["MLA"], block)


def test_experts_without_one_feed_forward():
    with pytest.raises(FieldError, match="one feed-forward for all tokens, leave it out"):
        TinyLM(EXPERTS, ReLUSquaredBlock)


def test_a_window_narrower_than_the_shifts():
    with pytest.raises(FieldError, match="ShiftBlock reads 4 positions, use as many or more"):
        TinyLM(replace(TINY, sliding_window=3), ShiftBlock)
