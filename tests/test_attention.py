"""Attention: masks, both ways to compute it, and the layer, against slow or foreign versions."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers.masking_utils import (
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config

from tinylm.attention import (
    Attention,
    ReweightedAttention,
    attend,
    attend_at_once,
    attend_with_sinks,
    attention_mask,
    causal_mask,
    document_mask,
    sliding_window_mask,
)
from tinylm.rope import precompute_rope

D, H, HEAD_DIM, T = 32, 4, 8, 6
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 7]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
MASKS = {
    "causal": causal_mask(T, T),
    "window": attention_mask(T, T, window=3),
    "documents": attention_mask(T, T, document_ids=DOCUMENTS[:1])[0, 0],
    "padding": attention_mask(T, T, padding=PADDING)[0, 0],
}
COS, SIN = precompute_rope(HEAD_DIM, 64)
ROPE = COS[:T], SIN[:T]

each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
each_way = pytest.mark.parametrize("function", [attend, attend_at_once])


@pytest.fixture(autouse=True)
def seed():
    """Make random numbers the same in each run."""
    torch.manual_seed(0)


def naive_attention(q, k, v, mask=None):
    """Compute attention from its equation, with copies of shared heads."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    if mask is None:
        mask = causal_mask(q.shape[-2], k.shape[-2])
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def gradients(function, *inputs):
    """Return the gradients of the sum of squares of a function's result."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*inputs).float().square().sum(), inputs)


def influence(layer):
    """Say which edits of the input (columns) change which outputs (rows)."""
    x = torch.randn(1, T, D)
    before = layer(x)
    changed = torch.zeros(T, T, dtype=torch.bool)
    for s in range(T):
        edited = x.clone()
        edited[0, s] += 1.0
        changed[:, s] = ((layer(edited) - before).abs() > 1e-6).any(-1)[0]
    return changed


# Masks


def test_causal_mask():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert torch.equal(causal_mask(2, 4), causal_mask(4, 4)[2:])
    with pytest.raises(ValueError, match="T is 5 but S is 3"):
        causal_mask(5, 3)


def test_sliding_window_mask():
    assert torch.equal(sliding_window_mask(4, 4, 1), torch.eye(4, dtype=torch.bool))
    assert torch.equal(sliding_window_mask(2, 6, 4), sliding_window_mask(6, 6, 4)[4:])
    assert torch.equal(sliding_window_mask(5, 5, 5), causal_mask(5, 5))
    t = torch.arange(9)[:, None]
    theirs = sliding_window_causal_mask_function(4)(0, 0, t, torch.arange(9))
    assert torch.equal(sliding_window_mask(9, 9, 4), theirs)
    with pytest.raises(ValueError, match="window is 0"):
        sliding_window_mask(3, 3, 0)


def test_document_mask_equals_that_of_transformers():
    t = torch.arange(6)[:, None]
    for b in range(2):
        theirs = packed_sequence_mask_function(DOCUMENTS)(torch.tensor(b), 0, t, torch.arange(6))
        assert torch.equal(document_mask(DOCUMENTS)[b, 0], theirs)


def test_attention_mask_combines_everything():
    assert attention_mask(6, 6) is None
    assert attention_mask(1, 9) is None  # one new token sees all of the cache
    assert attention_mask(6, 6, window=6) is None
    assert torch.equal(attention_mask(2, 6), causal_mask(2, 6))
    assert attention_mask(1, 6, window=4).int().tolist() == [[0, 0, 1, 1, 1, 1]]
    both = document_mask(DOCUMENTS) & causal_mask(6, 6)
    assert torch.equal(attention_mask(6, 6, document_ids=DOCUMENTS), both)
    assert torch.equal(attention_mask(2, 6, document_ids=DOCUMENTS), both[:, :, 4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"padding": torch.ones(2, 1)}, "padding has 1 positions but S is 6"),
        ({"document_ids": torch.ones(2, 7)}, "document_ids has 7 positions but S is 6"),
    ],
)
def test_attention_mask_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        attention_mask(6, 6, **options)


def test_a_padded_row_is_not_empty():
    """An empty row would bring `nan` into the gradients, also of rows that are read."""
    padded = attention_mask(6, 6, padding=PADDING)
    assert padded[0, 0, :3].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]
    assert torch.equal(padded[1, 0], causal_mask(6, 6))

    q, k, v = torch.randn(3, 2, 3, 6, 8)
    without_rule = causal_mask(6, 6) & PADDING.bool()[:, None, None]
    for mask, breaks in ((padded, False), (without_rule, True)):
        values = v.clone().requires_grad_()
        naive_attention(q, k, values, mask)[0, :, 2:].sum().backward()  # read only real tokens
        assert values.grad.isnan().any().item() is breaks


# Both ways to compute attention


@each_way
@each_mask
@pytest.mark.parametrize("K", [1, 2, 4])
def test_equals_the_naive_version(function, mask, K):
    q, k, v = torch.randn(3, 2, 4, T, HEAD_DIM)
    k = k[:, :K]
    v = v[:, :K]
    assert_close(function(q, k, v, mask), naive_attention(q, k, v, mask))
    ours = gradients(partial(function, mask=mask), q, k, v)
    assert_close(ours, gradients(partial(naive_attention, mask=mask), q, k, v))


@each_way
@pytest.mark.parametrize("queries", [1, 2, 5, 6])
def test_without_a_mask_the_queries_are_the_last(function, queries):
    q, k, v = torch.randn(3, 2, 4, T, HEAD_DIM)
    expected = naive_attention(q, k, v)[:, :, -queries:]
    assert_close(function(q[:, :, -queries:], k, v), expected)


def test_more_queries_than_keys_are_refused():
    q, k, v = torch.randn(3, 2, 4, T, HEAD_DIM)
    with pytest.raises(ValueError, match="T is 6 but S is 4"):
        attend(q, k[:, :, :4], v[:, :, :4])


@each_mask
def test_gradients_in_bfloat16(mask):
    q, k, v = torch.randn(3, 2, 4, T, HEAD_DIM)
    exact = gradients(partial(naive_attention, mask=mask), q, k, v)
    rounded = gradients(partial(attend, mask=mask), q.bfloat16(), k.bfloat16(), v.bfloat16())
    for ours, right in zip(rounded, exact, strict=True):
        assert (ours - right).norm() < 0.02 * right.norm()


def test_it_compiles_to_one_graph():
    q, k, v = torch.randn(3, 2, 4, T, HEAD_DIM)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for length in (4, 5, 6):
        pieces = q[:, :, :length], k[:, :, :length], v[:, :, :length]
        assert_close(compiled(*pieces), attend(*pieces))


def saved_bytes(function, *tensors):
    """Return the bytes that autograd saves for the backward pass, without the inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(*tensors)
    del result
    return sum(size for place, size in sizes.items() if place not in inputs)


def test_it_keeps_no_weights():
    for length in (128, 256):
        qkv = [torch.randn(2, 4, length, 32, requires_grad=True) for _ in range(3)]
        weights = 4 * 2 * 4 * length * length
        output = 4 * 2 * 4 * length * 32
        assert weights <= saved_bytes(naive_attention, *qkv) < 2 * weights
        assert saved_bytes(attend, *qkv) < 2 * output


# The layer


@each_mask
def test_the_layer_leaks_nothing(mask):
    layer = Attention(D, H, 2, qk_norm=True).requires_grad_(False)
    assert torch.equal(influence(lambda x: layer(x, ROPE, mask)), mask)


def test_packed_equals_separate_and_padded_equals_alone():
    layer = Attention(D, H, 2, qk_norm=True).requires_grad_(False)
    x = torch.randn(2, T, D)
    packed = layer(x[:1], ROPE, attention_mask(T, T, document_ids=DOCUMENTS[:1]))
    short = COS[:3], SIN[:3]
    assert_close(packed[:, :3], layer(x[:1, :3], short))
    assert_close(packed[:, 3:], layer(x[:1, 3:], short))
    assert not torch.allclose(layer(x[:1], ROPE)[:, 3:], packed[:, 3:])

    padded = layer(x, ROPE, attention_mask(T, T, padding=PADDING))
    assert_close(padded[0, 2:], layer(x[:1, 2:], (COS[:4], SIN[:4]))[0])
    assert_close(padded[1], layer(x[1:], ROPE)[0])
    assert padded.isfinite().all()


class ToyCache:
    """A cache that keeps all positions, or only the last `limit`."""

    def __init__(self, limit=None):
        self.limit = limit
        self.tensors = None

    def update(self, k, v, layer_idx):
        if self.tensors is not None:
            k = torch.cat((self.tensors[0], k), 2)
            v = torch.cat((self.tensors[1], v), 2)
        start = 0 if self.limit is None else -self.limit
        self.tensors = k[:, :, start:], v[:, :, start:]
        return k, v


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [1, 4, 1], [5, 1]], ids=str)
@pytest.mark.parametrize(("window", "limit"), [(None, None), (3, None), (3, 2)])
def test_pieces_equal_the_whole(sizes, window, limit):
    """A cache may also drop what a window will never show again."""
    layer = Attention(D, H, 2, qk_norm=True).requires_grad_(False)
    x = torch.randn(2, T, D)
    cache = ToyCache(limit)
    outputs = []
    S = 0
    for piece in x.split(sizes, dim=1):
        length = piece.shape[1]
        S += length
        tables = COS[S - length : S], SIN[S - length : S]
        outputs.append(layer(piece, tables, attention_mask(length, S, window), cache))
    assert_close(torch.cat(outputs, 1), layer(x, ROPE, attention_mask(T, T, window)))


@pytest.mark.parametrize("K", [1, 2, 4])
def test_number_of_parameters(K):
    layer = Attention(D, H, K)
    assert sum(p.numel() for p in layer.parameters()) == D * HEAD_DIM * (2 * H + 2 * K)


@pytest.mark.parametrize("sizes", [(32, 4, 3), (32, 4, 0), (30, 4)], ids=str)
def test_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(ValueError, match="num_key_value_heads must divide num_attention_heads"):
        Attention(*sizes)


def test_a_head_may_have_a_size_of_its_own():
    assert Attention(30, 4, head_dim=8).head_dim == 8


def test_shared_heads_equal_copied_heads():
    gqa = Attention(D, H, 2)
    mha = Attention(D, H)
    weights = gqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].unflatten(0, (2, HEAD_DIM))
        weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    mha.load_state_dict(weights)
    x = torch.randn(2, T, D)
    assert_close(mha(x, ROPE), gqa(x, ROPE))


def test_norms_work_in_their_own_precision():
    layer = Attention(D, H, qk_norm=True)
    x = torch.randn(2, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        q, _, v = layer.project(x)
        assert (q.dtype, v.dtype) == (torch.float32, torch.bfloat16)
        assert layer(x, ROPE).dtype == torch.bfloat16


def test_any_norm_may_be_used():
    layer = Attention(D, H, qk_norm=True)
    layer.q_norm = nn.LayerNorm(HEAD_DIM)
    x = torch.randn(2, T, D)
    heads = layer.q_proj(x).unflatten(-1, (H, HEAD_DIM))
    assert_close(layer.project(x)[0], F.layer_norm(heads, (HEAD_DIM,)).transpose(1, 2))


def test_a_norm_over_all_heads():
    """Together the heads have a mean square of 1, not each of them."""
    layer = Attention(D, H, 2, qk_norm=True, qk_norm_full=True)
    assert layer.q_norm.weight.shape == (H * HEAD_DIM,)
    assert layer.k_norm.weight.shape == (2 * HEAD_DIM,)
    squares = layer.project(torch.randn(2, T, D))[0].square().mean(-1)  # (B, H, T)
    assert_close(squares.mean(1), torch.ones(2, T), rtol=0, atol=1e-3)
    assert squares.max() > 1.3
    with pytest.raises(RuntimeError, match="size mismatch"):
        Attention(D, H, 2, qk_norm=True).load_state_dict(layer.state_dict())


def test_dropout_acts_in_training_only():
    layer = Attention(D, H, attention_dropout=0.5)
    x = torch.randn(2, T, D)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert_close(layer(x), layer(x))


def of_transformers(attention_class, config_class, layer, x, **config):
    """Compute attention of a family with the weights of our layer, which must have its names."""
    sizes = {"hidden_size": D, "num_attention_heads": H, "head_dim": HEAD_DIM}
    config = config_class(**sizes, attn_implementation="eager", rms_norm_eps=1e-6, **config)
    reference = attention_class(config, layer_idx=0).eval()
    reference.load_state_dict(layer.state_dict())
    mask = torch.zeros(T, T).masked_fill(~causal_mask(T, T), -math.inf)[None, None]
    cos, sin = (table[None] for table in ROPE)
    if attention_class is GptOssAttention:  # has tables of half the size
        cos, sin = (table[..., : HEAD_DIM // 2] for table in (cos, sin))
    return reference(x, (cos, sin), attention_mask=mask)[0]


CAPPED = {"scale": 5**-0.5, "softcap": 0.5}
PUBLISHED = {  # classes, options of ours, options of theirs
    "Llama": ((LlamaAttention, LlamaConfig), {}, {}),
    "biases": ((LlamaAttention, LlamaConfig), {"attention_bias": True}, {"attention_bias": True}),
    "Qwen3": ((Qwen3Attention, Qwen3Config), {"qk_norm": True}, {}),
    "Qwen2": (
        (Qwen2Attention, Qwen2Config),
        {"attention_bias": True, "attention_out_bias": False},
        {},
    ),
    "OLMoE": ((OlmoeAttention, OlmoeConfig), {"qk_norm": True, "qk_norm_full": True}, {}),
    "Gemma 2": (
        (Gemma2Attention, Gemma2Config),
        CAPPED,
        {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 0.5},
    ),
    "gpt-oss": (
        (GptOssAttention, GptOssConfig),
        {"attention_bias": True, "attention_sinks": True},
        {},
    ),
}


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layer_is_that_of_published_models(name, K):
    """Random weights go by name into the layer of a family; the outputs are equal."""
    classes, ours, options = PUBLISHED[name]
    has_other_weights = {"scale", "attention_sinks"} & ours.keys()
    attention = ReweightedAttention if has_other_weights else Attention
    layer = attention(D, H, num_key_value_heads=K, **ours)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, T, D)
    expected = of_transformers(*classes, layer, x, num_key_value_heads=K, **options)
    assert_close(layer(x, ROPE), expected)


@each_mask
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sinks_are_the_same_in_blocks_and_at_once(mask, K):
    """Outputs and gradients, also that of the sinks, with all masks and without one."""
    q = torch.randn(2, H, T, HEAD_DIM, requires_grad=True)
    k, v = torch.randn(2, 2, K, T, HEAD_DIM, requires_grad=True).unbind(0)
    sinks = torch.randn(H, requires_grad=True)
    direction = torch.randn(2, H, T, HEAD_DIM)
    for each in (mask, None):
        results = []
        for y in (
            attend_at_once(q, k, v, each, sinks=sinks),
            attend_with_sinks(q, k, v, sinks, each),
        ):
            results.append((y, *torch.autograd.grad((y * direction).sum(), (q, k, v, sinks))))
        for one, other in zip(*results, strict=True):
            assert_close(one, other)


def test_a_cap_and_a_scale_by_the_equation():
    """The scores are scaled, then capped, then masked."""
    q, k, v = torch.randn(3, 2, H, T, HEAD_DIM)
    scores = 0.5 * torch.tanh(2.0 * (q @ k.mT) / 0.5)
    scores = scores.masked_fill(~causal_mask(T, T), -math.inf)
    y = attend_at_once(q, k, v, scale=2.0, softcap=0.5)
    assert_close(y, scores.softmax(-1) @ v)
    assert_close(attend(q, k, v, scale=HEAD_DIM**-0.5), attend(q, k, v), rtol=0, atol=0)


def test_a_long_text_with_sinks_is_computed_in_blocks():
    """Behind 512 positions the layer changes its way, and dropout still drops."""
    torch.manual_seed(0)
    layer = ReweightedAttention(D, H, num_key_value_heads=2, attention_sinks=True)
    nn.init.normal_(layer.sinks)
    x = torch.randn(1, 600, D)
    whole = layer(x)
    assert_close(whole[:, :512], layer(x[:, :512]))
    q = torch.randn(2, H, T, HEAD_DIM)
    assert (attend_at_once(q, q, q, dropout_p=0.5) - attend_at_once(q, q, q)).abs().max() > 0.1
