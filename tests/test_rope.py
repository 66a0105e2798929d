"""Rotary positions: tables and rotations equal `transformers`, and bad options are refused."""

import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaConfig,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.phi.modeling_phi import PhiConfig, PhiRotaryEmbedding

from tinylm.rope import ROPE_SCALINGS, apply_rope, precompute_rope, rope_frequencies

THETA = 10000.0
LINEAR = {"rope_type": "linear", "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


def hf_tables(length, rope_scaling=None, theta=THETA, head_dim=64, max_position_embeddings=4096):
    """Ask `transformers` for the tables of a Llama with these settings."""
    parameters = {"rope_type": "default", "rope_theta": theta} | (rope_scaling or {})
    sizes = {"head_dim": head_dim, "max_position_embeddings": max_position_embeddings}
    config = LlamaConfig(**sizes, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(length)[None])
    return cos[0], sin[0]


def scaled(rotary_dim, length, rope_scaling):
    """Return the frequencies and the factor of a kind of scaling."""
    options = dict(rope_scaling)
    return ROPE_SCALINGS[options.pop("rope_type")](rotary_dim, THETA, length, **options)


def assert_equal_tables(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


# Tables


def test_frequencies():
    assert_close(rope_frequencies(8, THETA), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert_close(scaled(8, 6, {"rope_type": "default"}), (rope_frequencies(8, THETA), 1.0))


def test_plain_tables_equal_llama_bit_for_bit():
    assert_equal_tables(precompute_rope(64, 4096, theta=5e5), hf_tables(4096, theta=5e5))


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"type": "default"}, {}], ids=str)
def test_default_scaling_is_none(scaling):
    repeated = scaling | {"rope_theta": 500.0}
    assert_equal_tables(precompute_rope(8, 6, 500.0, repeated), precompute_rope(8, 6, 500.0))


def test_tables_are_float32_under_any_default():
    """bfloat16 cannot count beyond 256."""
    exact, _ = precompute_rope(32, 1024)
    torch.set_default_dtype(torch.bfloat16)
    try:
        under_bfloat16, _ = precompute_rope(32, 1024)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(under_bfloat16, exact)
    assert (exact.bfloat16() - exact).abs().max() < 0.005


def test_linear():
    stretched = precompute_rope(64, 32768, rope_scaling=LINEAR)
    assert_equal_tables(stretched, hf_tables(32768, LINEAR))
    assert_close(stretched[0][::8], precompute_rope(64, 4096)[0])  # every eighth row is known


@pytest.mark.parametrize("length", [100, 512, 513, 2048])
def test_dynamic(length):
    theirs = hf_tables(length, {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=512)
    assert_close(precompute_rope(64, length, rope_scaling=DYNAMIC), theirs, atol=1e-3, rtol=0)


def test_dynamic_depends_on_the_length_of_the_table():
    slowed, _ = scaled(64, 2048, DYNAMIC)
    slowdown = rope_frequencies(64, THETA) / slowed
    assert_close(slowdown, 7.0 ** (torch.arange(32) / 31))  # 2 * 2048 / 512 - 1 = 7
    short, _ = precompute_rope(64, 512, rope_scaling=DYNAMIC)
    long, _ = precompute_rope(64, 2048, rope_scaling=DYNAMIC)
    assert torch.equal(short, precompute_rope(64, 512)[0])
    assert (short - long[:512]).abs().max() > 0.5


def test_llama3():
    ours = precompute_rope(128, 20000, 5e5, LLAMA3)
    assert_equal_tables(ours, hf_tables(20000, LLAMA3, 5e5, 128, 131072))


YARN_VARIANTS = [
    {},
    {"beta_fast": 16.0},
    {"beta_slow": 2.0},
    {"attention_factor": 1.5},
    {"truncate": False},
    {"mscale": 1.0, "mscale_all_dim": 0.8},
    {"beta_fast": 40, "beta_slow": 3, "truncate": False, "attention_factor": 0.9},
]


@pytest.mark.parametrize("variant", YARN_VARIANTS, ids=str)
def test_yarn(variant):
    ours = precompute_rope(64, 6000, rope_scaling=YARN | variant)
    theirs = hf_tables(6000, YARN | variant, max_position_embeddings=32768)
    assert_close(ours, theirs, atol=1e-6, rtol=0)
    plain = precompute_rope(64, 6000, rope_scaling=YARN)
    assert variant == {} or (ours[0] - plain[0]).abs().max() > 0.01


def test_yarn_keeps_slows_and_sharpens():
    frequencies, factor = scaled(64, 1, YARN)
    slowdown = rope_frequencies(64, THETA) / frequencies
    assert (int((slowdown == 1).sum()), int((slowdown > 7.999).sum())) == (11, 9)
    assert_close(factor**2, 1.4591, atol=1e-4, rtol=0)
    assert scaled(64, 1, YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})[1] == 1.0


@pytest.mark.parametrize(("theta", "length"), [(10.0, 1000), (THETA, 128), (THETA, 6)])
def test_yarn_at_its_corners(theta, length):
    """The ramp would end beyond the last pair, begin before the first, or is one point wide."""
    corner = YARN | {"original_max_position_embeddings": length}
    theirs = hf_tables(1000, corner, theta, max_position_embeddings=32768)
    assert_close(precompute_rope(64, 1000, theta, corner), theirs, atol=1e-6, rtol=0)


def test_null_in_a_checkpoint_means_absent():
    with_null = precompute_rope(64, 600, rope_scaling=YARN | {"beta_fast": None, "mscale": None})
    assert_equal_tables(with_null, precompute_rope(64, 600, rope_scaling=YARN))


@pytest.mark.parametrize(
    "scaling", [LINEAR, DYNAMIC, LLAMA3, YARN], ids=lambda scaling: scaling["rope_type"]
)
def test_frequencies_equal_transformers_bit_for_bit(scaling):
    trained_length = scaling.get("original_max_position_embeddings", 4096)
    config = LlamaConfig(
        head_dim=64,
        max_position_embeddings=trained_length,
        rope_parameters=scaling | {"rope_theta": THETA},
    )
    theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=32768)
    ours, factor = scaled(64, 32768, scaling)
    assert torch.equal(ours, theirs)
    assert factor == their_factor


# What is refused


@pytest.mark.parametrize(
    ("head_dim", "scaling", "message"),
    [
        (8, {"rope_type": "spiral"}, "use one of default"),
        (8, {"rope_type": "default", "rope_theta": 500.0}, "pass theta=500.0"),
        (8, {"rope_type": "default", "facter": 2.0}, "'facter'; 'default' takes no other key"),
        (8, {"rope_type": "default", "factor": "two"}, "'<' not supported"),
        (64, YARN | {"factor": None}, "'factor'"),
        (64, YARN | {"beta_fast": 0.5}, "must not be below"),
        (64, {"rope_type": "linear"}, "'factor'; 'linear' takes factor"),
        (64, LINEAR | {"factor": 0.5}, "1 or more"),
        (64, {"rope_type": "dynamic", "factor": 2.0}, "'original_max_position_embeddings'"),
        (64, LLAMA3 | {"high_freq_factor": 1.0}, "must be above"),
        (2, DYNAMIC, "use 4 or more"),
    ],
)
def test_bad_scalings_are_refused(head_dim, scaling, message):
    with pytest.raises(ValueError, match=message):
        precompute_rope(head_dim, 8, THETA, scaling)


@pytest.mark.parametrize(
    ("head_dim", "share", "message"),
    [
        (7, 1.0, "must be even"),
        (32, 0.1, "rotate 3 dimensions"),
        (32, 1.5, "at most head_dim"),
        (32, 0.0, "at least 2"),
    ],
)
def test_bad_sizes_are_refused(head_dim, share, message):
    with pytest.raises(ValueError, match=message):
        precompute_rope(head_dim, 10, partial_rotary_factor=share)


def test_tables_that_do_not_fit_are_refused():
    """Without this check a single token would be repeated over all positions of the table."""
    q = torch.randn(2, 4, 10, 32)
    with pytest.raises(ValueError, match="cos has 128 positions of 32 dimensions, x has 1 of 32"):
        apply_rope(q[:, :, :1], *precompute_rope(32, 128))
    with pytest.raises(ValueError, match="of 64 dimensions, x has 10 of 32"):
        apply_rope(q, *precompute_rope(64, 10))


# Rotations


@pytest.mark.parametrize("own_positions", [False, True])
def test_values_and_gradients_equal_transformers(own_positions):
    cos, sin = precompute_rope(32, 128)
    rows = torch.arange(10)
    if own_positions:
        rows = torch.stack((torch.arange(10), torch.arange(50, 60)))  # (B, T)
    c = cos[rows]
    s = sin[rows]
    q = torch.randn(2, 4, 10, 32, requires_grad=True)
    ours = apply_rope(q, c, s)
    theirs, _ = apply_rotary_pos_emb(q, q, c.expand(2, 10, 32), s.expand(2, 10, 32))
    assert_close(ours, theirs)
    upstream = torch.randn(ours.shape)
    ours_gradient = torch.autograd.grad(ours, q, upstream)
    assert_close(ours_gradient, torch.autograd.grad(theirs, q, upstream))


def test_it_keeps_dtype_and_length():
    q = torch.randn(2, 4, 10, 32)
    tables = precompute_rope(32, 10)
    assert apply_rope(q.bfloat16(), *tables).dtype == torch.bfloat16
    assert_close(apply_rope(q, *tables).norm(dim=-1), q.norm(dim=-1))


def test_half_of_a_head_equals_phi():
    q = torch.randn(2, 4, 10, 32)
    parameters = {"rope_theta": THETA, "partial_rotary_factor": 0.5}
    config = PhiConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    cos, sin = PhiRotaryEmbedding(config)(q, torch.arange(10)[None])
    ours = precompute_rope(32, 10, partial_rotary_factor=0.5)
    assert_equal_tables(ours, (cos[0], sin[0]))
    rotated = apply_rope(q, *ours)
    assert_close(rotated[..., :16], apply_rotary_pos_emb(q[..., :16], q[..., :16], cos, sin)[0])
    assert torch.equal(rotated[..., 16:], q[..., 16:])
