"""The model: what its config refuses, layers of different kinds, and the losses of experts."""

import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tinylm.basics import FieldError
from tinylm.model import Block, Decoder, ModelConfig, TinyLM, count_tokens, name_block
from tinylm.rope import precompute_rope

SMALL = ModelConfig(
    vocab_size=16, hidden_size=32, num_hidden_layers=2, max_position_embeddings=64
).resolved()
FULL, SLIDING = "full_attention", "sliding_attention"


def random_ids(*shape: int) -> torch.Tensor:
    """Make token ids that are the same in every run."""
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0))


def test_sizes_follow_from_others():
    """A size that is None follows when a model is built, and not before."""
    narrow = ModelConfig(hidden_size=128)
    wide = replace(narrow, hidden_size=256)
    assert (narrow.resolved().head_dim, narrow.resolved().intermediate_size) == (32, 352)
    assert (wide.resolved().head_dim, wide.resolved().intermediate_size) == (64, 704)
    assert wide.resolved().resolved() == wide.resolved()
    for size in range(4, 2000, 4):
        width = ModelConfig(hidden_size=size, head_dim=4).resolved().intermediate_size
        assert width == -(-8 * size // 96) * 32


REFUSED = {
    "hidden_size=0: use a number above 0": {"hidden_size": 0},
    "num_attention_heads=0": {"num_attention_heads": 0},
    "num_key_value_heads=3": {"num_key_value_heads": 3},
    "hidden_size=130: make it a multiple of num_attention_heads=4": {"hidden_size": 130},
    "num_attention_heads=3: make it divide hidden_size=128": {"num_attention_heads": 3},
    "hidden_size=36: 9 of 9 dimensions would rotate": {"hidden_size": 36},
    "head_dim=7": {"head_dim": 7},
    "sliding_window=0": {"sliding_window": 0},
    "magic": {"rope_scaling": {"rope_type": "magic"}},
    "layers 0 to 3": {"no_rope_layers": (4,)},
    "attention_dropout=1.0": {"attention_dropout": 1.0},
    "embedding_range=0.0": {"embedding_range": 0.0},
    "it needs qk_norm": {"qk_norm": False, "qk_norm_full": True},
    "use one of silu, gelu_new": {"hidden_act": "relu"},
    "there are 4 layers": {"first_k_dense_replace": 5},
    "num_experts=-1": {"num_experts": -1},
    "give full_attention or sliding_attention for each of": {"layer_types": (FULL, FULL)},
    "full is unknown: use full_attention, sliding": {"layer_types": ("full",) * 4},
    "sliding_window=None: layer_types has sliding": {"layer_types": (SLIDING,) * 4},
    "use the keys full_attention or sliding_attention": {"rope_parameters": {"global": {}}},
    "mlp_only_layers=(4,): there are layers 0 to 3": {"mlp_only_layers": (4,)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_in_a_config_names_its_field(message):
    """The error says which field is wrong, and what would be right."""
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**REFUSED[message])


def test_one_type_is_for_all_layers():
    """A type that is given once is that of every layer, also where the number of layers changes."""
    once = replace(SMALL, layer_types=(SLIDING,), sliding_window=4)
    assert [replace(once, num_hidden_layers=5).layer_type(i) for i in range(5)] == [SLIDING] * 5
    assert once.resolved().layer_types == (SLIDING, SLIDING)
    assert TinyLM(once).config == TinyLM(replace(once, layer_types=(SLIDING,) * 2)).config


def test_a_block_adds_its_two_branches():
    """A block equals the equation, and is the identity where its branches end in zeros."""
    torch.manual_seed(0)
    block = Block(SMALL, 0)
    x = torch.randn(2, 6, 32)
    rope = precompute_rope(8, 6)
    middle = x + block.self_attn(block.input_layernorm(x), rope)
    assert_close(block(x, rope), middle + block.mlp(block.post_attention_layernorm(middle)))
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    assert_close(block(x, rope), x, rtol=0, atol=0)


class LoudBlock(Block):
    """A block of one's own."""

    def forward(self, x, *args):
        """Double the input."""
        return super().forward(2 * x, *args)


def test_a_config_names_the_block():
    """A model with a block of one's own is not built without it."""
    named = name_block(SMALL, LoudBlock)
    assert named.block.endswith(":LoudBlock")
    assert name_block(SMALL, Block) == SMALL
    assert name_block(named, LoudBlock) == named
    with pytest.raises(FieldError, match="give it: block=LoudBlock in Python, --model.block"):
        name_block(named, Block)


def test_a_text_that_is_too_long_is_refused():
    """The tables of positions have an end."""
    with pytest.raises(ValueError, match="65 tokens does not fit"):
        Decoder(SMALL)(torch.zeros(1, 65, dtype=torch.long))


MIXED = replace(
    SMALL,
    num_hidden_layers=4,
    sliding_window=4,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING),
    rope_theta=1e6,
    rope_parameters={SLIDING: {"rope_theta": 1e4}},
    no_rope_layers=(2,),
    num_experts=4,
    first_k_dense_replace=1,
    mlp_only_layers=(3,),
)


def naive_stack(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Make the mask and the rotary table anew for each layer."""
    config = decoder.config
    T = ids.shape[1]
    x = decoder.embed_tokens(ids)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for i, layer in enumerate(decoder.layers):
        in_window = config.layer_types[i] == SLIDING
        reach = config.sliding_window if in_window else T
        mask = (distance >= 0) & (distance < reach)
        theta = 1e4 if in_window else config.rope_theta
        x = layer(x, torch.stack(precompute_rope(config.head_dim, T, theta)), mask)
    return decoder.norm(x)


def test_layers_of_different_kinds():
    """The stack equals the naive one, and no token sees the future, other documents or padding."""
    torch.manual_seed(0)
    mixed = Decoder(MIXED).eval()
    ids = random_ids(1, 12)
    alone = mixed(ids)
    assert [MIXED.window_of(i) for i in range(4)] == [4, 4, None, 4]
    assert [type(layer.mlp).__name__ for layer in mixed.layers] == [
        "SwiGLU",
        "MoE",
        "MoE",
        "SwiGLU",
    ]
    assert_close(alone, naive_stack(mixed, ids))

    later = ids.clone()
    later[0, 8] = (later[0, 8] + 1) % 16
    assert_close(mixed(later)[:, :8], alone[:, :8], rtol=0, atol=0)
    row = torch.cat([later, ids], 1)
    packed = mixed(row, document_ids=torch.tensor([[0] * 12 + [1] * 12]))
    assert_close(packed[:, 12:], alone)
    padded = torch.cat([torch.full((1, 3), 15), ids], 1)
    assert_close(mixed(padded, attention_mask=torch.tensor([[0] * 3 + [1] * 12]))[:, 3:], alone)


@pytest.mark.parametrize(("kind", "window"), [(FULL, None), (SLIDING, 4)])
def test_equal_layers_may_be_listed(kind, window):
    """A list with one kind of layer is the uniform model, to the last bit."""
    uniform = replace(SMALL, sliding_window=window)
    torch.manual_seed(0)
    expected = Decoder(uniform)(random_ids(1, 12))
    torch.manual_seed(0)
    listed = Decoder(replace(uniform, layer_types=(kind, kind)))(random_ids(1, 12))
    assert_close(listed, expected, rtol=0, atol=0)


def test_balancing_losses_count_once():
    """The mean loss of a step holds the losses of experts once, however the step is cut."""
    torch.manual_seed(0)
    coefficients = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "seq_aux": True}
    sparse = TinyLM(replace(SMALL, num_experts=4, **coefficients)).double().train()
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[1, :-3] = -100
    whole, targets = sparse.loss_sum(ids, labels)
    assert_close(sparse(ids, labels), whole / targets)

    share = targets / count_tokens(ids)
    rows = [slice(0, 1), slice(1, 2)]
    parts = [sparse.loss_sum(ids[row], labels[row], targets_per_token=share)[0] for row in rows]
    assert_close(sum(parts), whole)
    unaware = [sparse.loss_sum(ids[row], labels[row])[0] for row in rows]
    assert abs(sum(unaware) - whole) / targets > 1e-3


def test_the_embedding_may_start_larger():
    """`embedding_range` is for the table only."""
    torch.manual_seed(0)
    model = TinyLM(replace(SMALL, vocab_size=512, embedding_range=0.2))
    assert_close(model.model.embed_tokens.weight.std().item(), 0.2, rtol=0.05, atol=0)
    gate = model.model.layers[0].mlp.gate_proj.weight
    assert_close(gate.std().item(), 0.02, rtol=0.1, atol=0)


KINDS = {
    "like GPT-2": {
        "learned_positions": True,
        "layer_norm": True,
        "hidden_act": "gelu_new",
        "qk_norm": False,
        "attention_bias": True,
    },
    "latent attention": {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_norm": False},
    "experts": {"num_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "two kinds of layers": {"sliding_window": 4, "layer_types": (SLIDING, FULL)},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_connected(name):
    """One step reaches every parameter."""
    torch.manual_seed(0)
    model = TinyLM(replace(SMALL, **KINDS[name])).train()
    ids = random_ids(4, 12)
    loss = model(ids, ids)
    loss.backward()
    assert loss.isfinite()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


OF_NEW_FAMILIES = {
    "norm_placement='x': use one of before, after, both": {"norm_placement": "x"},
    "attn_logit_softcapping=2.0: latent attention": {
        "kv_lora_rank": 8,
        "attn_logit_softcapping": 2.0,
    },
    "attention_sinks=True: latent attention": {"kv_lora_rank": 8, "attention_sinks": True},
    "swiglu_limit=2.0: it is for experts": {"swiglu_limit": 2.0},
    "attn_logit_softcapping=-1.0: use a number above 0": {"attn_logit_softcapping": -1.0},
    "norm_unit_offset=True: layer_norm=True has no": {"layer_norm": True, "norm_unit_offset": True},
    "sliding_window=4: no layer has it": {
        "sliding_window": 4,
        "layer_types": ("full_attention",) * 4,
    },
}


@pytest.mark.parametrize("message", OF_NEW_FAMILIES)
def test_parts_that_do_not_fit_together_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**OF_NEW_FAMILIES[message])
