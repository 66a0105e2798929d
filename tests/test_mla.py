"""Multi-head latent attention: both forms equal the equations and DeepSeek-V3's own layer."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Config,
)

from tinylm.attention import attend, attention_mask, causal_mask
from tinylm.mla import MLAttention
from tinylm.rope import apply_rope, precompute_rope

D, H, T = 32, 4, 6
SIZES = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
COS, SIN = precompute_rope(4, 64)
ROPE = COS[:T], SIN[:T]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 7]])
PADDED = attention_mask(T, T, padding=torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
MASKS = {
    "causal": causal_mask(T, T),
    "window": attention_mask(T, T, window=3),
    "documents": attention_mask(T, T, document_ids=DOCUMENTS[:1])[0, 0],
    "padding": PADDED[0, 0],
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


@pytest.fixture
def x():
    """Make two texts of six tokens."""
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layer():
    """Make a layer in evaluation mode."""
    torch.manual_seed(0)
    return MLAttention(D, H, **SIZES).requires_grad_(False).eval()


# The equations


def attend_one(q, keys, values):
    """Attend with one query, key by key."""
    scores = torch.stack([q @ key for key in keys]) / math.sqrt(len(q))
    weights = scores.softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def rotated(y, t):
    """Rotate one vector to position t."""
    return apply_rope(y.view(1, 1, 1, -1), COS[t : t + 1], SIN[t : t + 1]).flatten()


def naive_mla(layer, x):
    """Compute one text position by position and head by head."""
    n, p, v, r = layer.sizes
    W_c, W_r = layer.kv_a_proj_with_mqa.weight.split((r, p))
    latents = [layer.kv_a_layernorm(W_c @ token) for token in x]
    shared_keys = [rotated(W_r @ token, t) for t, token in enumerate(x)]
    query_matrices = layer.q_proj.weight.split(n + p)
    expanding_matrices = layer.kv_b_proj.weight.split(n + v)
    outputs = []
    for t, token in enumerate(x):
        heads = []
        for W_q, W_kv in zip(query_matrices, expanding_matrices, strict=True):
            q = torch.cat((W_q[:n] @ token, rotated(W_q[n:] @ token, t)))
            past = list(zip(latents[: t + 1], shared_keys[: t + 1], strict=True))
            keys = [torch.cat((W_kv[:n] @ c, k)) for c, k in past]
            values = [W_kv[n:] @ c for c, _ in past]
            heads.append(attend_one(q, keys, values))
        outputs.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


def test_it_equals_the_equations(layer, x):
    assert_close(layer(x, ROPE), torch.stack([naive_mla(layer, text) for text in x]))


def test_both_forms_are_equal_for_every_mask(layer, x):
    parts = layer.project(x, ROPE)
    for mask in [None, *MASKS.values(), PADDED, attention_mask(T, T, document_ids=DOCUMENTS)]:
        assert_close(layer.absorbed(*parts, mask), layer.expanded(*parts, mask))


def test_the_absorbed_form_is_mqa_on_the_latents(layer, x):
    q_nope, q_rope, latent, k_rope = layer.project(x, ROPE)
    W_K, W_V = layer.kv_b_proj.weight.view(H, 11, 12).split((6, 5), 1)
    q = torch.cat((q_nope @ W_K, q_rope), -1) * (16 / 10) ** 0.5
    one_key = torch.cat((latent, k_rope), -1)
    as_mqa = attend(q, one_key, F.pad(latent, (0, 4)))[..., :12]
    assert_close(as_mqa @ W_V.mT, layer.expanded(q_nope, q_rope, latent, k_rope, None))


# DeepSeek-V3


def halves(weight, heads, plain_rows):
    """Reorder the last rows of each head from neighboring pairs to halves."""
    weight = weight.unflatten(0, (heads, -1))
    rows = weight[:, plain_rows:].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((weight[:, :plain_rows], rows), 1).flatten(0, 1)


def deepseek(q_lora_rank, bias, rope_parameters):
    """Return DeepSeek's layer in 64 bits, its options, and its weights in our order."""
    options = dict(q_lora_rank=q_lora_rank, attention_bias=bias, **SIZES)
    config = DeepseekV3Config(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=H, **options
    )
    config.rope_parameters = rope_parameters
    config._attn_implementation = "sdpa"
    reference = DeepseekV3Attention(config, layer_idx=0).double().eval().requires_grad_(False)

    # Norms that compute in 64 bits, and random weights.
    for name in ("kv_a_layernorm", "q_a_layernorm"):
        norm = getattr(reference, name, None)
        if norm is not None:
            width = norm.weight.shape[0]
            setattr(reference, name, nn.RMSNorm(width, eps=1e-6).double())
    torch.manual_seed(0)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)

    # The same weights in our order.
    weights = reference.state_dict()
    for name, weight in reference.state_dict().items():
        if name.startswith("kv_a_proj"):
            weights[name] = halves(weight, 1, 12)
        elif name.startswith(("q_proj", "q_b_proj")):
            weights[name] = halves(weight, H, 6)
    return reference, options, weights


YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_it_equals_deepseek(x, q_lora_rank, bias, scaling):
    reference, options, weights = deepseek(q_lora_rank, bias, scaling or {"rope_type": "default"})
    options["score_factor"] = (0.1 * 0.7 * math.log(8) + 1) ** 2 if scaling else 1.0
    tables = tuple(table.double() for table in precompute_rope(4, T, rope_scaling=scaling))
    hidden = torch.zeros(T, T).double().masked_fill(~causal_mask(T, T), -math.inf)[None, None]
    x = x.double()
    expected = reference(x, tuple(table[None] for table in tables), attention_mask=hidden)[0]

    # Weights in our order, in both forms.
    ours = MLAttention(D, H, **options).double().eval()
    ours.load_state_dict(weights)
    assert_close(ours(x, tables), expected, rtol=0, atol=1e-12)
    absorbed = ours.absorbed(*ours.project(x, tables), None).transpose(1, 2).flatten(2)
    assert_close(ours.o_proj(absorbed), expected, rtol=0, atol=1e-12)

    # Weights as they are in the file.
    from_file = MLAttention(D, H, **options, rope_interleave=True).double().eval()
    from_file.load_state_dict(reference.state_dict())
    assert_close(from_file(x, tables), expected, rtol=0, atol=1e-12)


# What holds for `Attention` holds here


@each_mask
def test_it_leaks_nothing(layer, mask):
    x = torch.randn(1, T, D)
    before = layer(x, ROPE, mask)
    changed = torch.zeros(T, T, dtype=torch.bool)
    for s in range(T):
        edited = x.clone()
        edited[0, s] += 1.0
        changed[:, s] = ((layer(edited, ROPE, mask) - before).abs() > 1e-6).any(-1)[0]
    assert torch.equal(changed, mask)


class ToyCache:
    """A cache that keeps all positions."""

    def __init__(self):
        self.tensors = None

    def update(self, k, v, layer_idx):
        if self.tensors is not None:
            k = torch.cat((self.tensors[0], k), 2)
            v = torch.cat((self.tensors[1], v), 2)
        self.tensors = k, v
        return k, v


def in_pieces(layer, x, sizes, window, rope):
    """Compute a text piece by piece, with a cache."""
    cache = ToyCache()
    outputs = []
    S = 0
    for piece in x.split(sizes, dim=1):
        length = piece.shape[1]
        S += length
        tables = rope and tuple(table[S - length : S] for table in rope)
        outputs.append(layer(piece, tables, attention_mask(length, S, window), cache))
    return torch.cat(outputs, 1)


PARTIAL = tuple(table[:T] for table in precompute_rope(4, T, partial_rotary_factor=0.5))


@pytest.mark.parametrize("rope", [None, ROPE, PARTIAL], ids=["none", "whole", "partial"])
@pytest.mark.parametrize("window", [None, 3])
def test_pieces_equal_the_whole(layer, x, rope, window):
    whole = layer(x, rope, attention_mask(T, T, window))
    for sizes in ([1] * 6, [2, 3, 1], [1, 4, 1], [5, 1]):
        assert_close(in_pieces(layer, x, sizes, window, rope), whole)


def test_packed_equals_separate_and_padded_equals_alone(layer, x):
    packed = layer(x[:1], ROPE, attention_mask(T, T, document_ids=DOCUMENTS[:1]))
    assert_close(packed[:, 3:], layer(x[:1, 3:], (COS[:3], SIN[:3])))
    assert_close(layer(x, ROPE, PADDED)[0, 2:], layer(x[:1, 2:], (COS[:4], SIN[:4]))[0])


def test_it_learns_and_drops_in_training_only(x):
    layer = MLAttention(D, H, **SIZES, q_lora_rank=20, attention_dropout=0.5)
    layer(x, ROPE).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert not torch.allclose(layer(x, ROPE), layer(x, ROPE))
    layer.eval()
    assert_close(layer(x, ROPE), layer(x, ROPE))


def test_under_autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(x, ROPE)
        assert whole.dtype == torch.bfloat16
        assert_close(in_pieces(layer, x, [4, 1, 1], None, ROPE), whole, rtol=0, atol=0.02)


@pytest.mark.parametrize(("name", "rank"), list(product(["kv_lora_rank", "q_lora_rank"], [0, 33])))
def test_bad_ranks_are_refused(name, rank):
    with pytest.raises(ValueError, match=f"{name} is {rank}: use 1 to 32"):
        MLAttention(D, H, **{**SIZES, name: rank})
    with pytest.raises(ValueError, match="kv_lora_rank is 12: use 1 to 11"):
        MLAttention(D, 1, **SIZES)


# Costs


def test_the_cache_and_the_parameters_are_as_small_as_promised(layer, x):
    cache = ToyCache()
    layer(x[:1], ROPE, cache=cache)
    assert [tuple(tensor.shape) for tensor in cache.tensors] == [(1, 1, T, 12), (1, 1, T, 4)]
    predicted = D * H * 10 + D * 16 + 12 + H * 11 * 12 + H * 5 * D
    assert sum(p.numel() for p in layer.parameters()) == predicted


@pytest.mark.parametrize(("new", "S"), list(product([1, 4, 32], [32, 64])))
def test_multiplications_are_those_of_the_formula(new, S):
    n, p, v, r = 6, 4, 10, 12  # values of size n + p need no padding
    layer = MLAttention(D, H, r, n, p, v_head_dim=v).requires_grad_(False).eval()
    queries = layer.project(torch.randn(1, new, D))[:2]
    keys = layer.project(torch.randn(1, S, D))[2:]
    counts = []
    for form in (layer.expanded, layer.absorbed):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            form(*queries, *keys, None)
        counts.append(counter.get_total_flops() / 2)
    expanded = S * r * H * (n + v) + new * S * H * (n + p + v)
    absorbed = new * r * H * (n + v) + new * S * H * (2 * r + p)
    assert counts == [expanded, absorbed]
