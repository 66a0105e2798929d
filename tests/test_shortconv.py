"""Layers with a short convolution: documents, padding, caches, decoding, training, bad input."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from tinylm.checkpoints import load_model, save_model
from tinylm.cost import cache_bytes, count_parameters
from tinylm.decoding import beam_search, packed, speculative_generate
from tinylm.generate import SamplingConfig, generate, start
from tinylm.kv_cache import Int8Cache, KVCache, SlidingCache
from tinylm.lora import LoraConfig, add_lora, merge_lora
from tinylm.model import LAYER_KINDS, ModelConfig, TinyLM
from tinylm.optim import OptimConfig, make_optimizers
from tinylm.shortconv import ShortConv, mix_neighbors

CONV = "conv"
FULL = "full_attention"
SLIDING = "sliding_attention"
SMALL = ModelConfig(
    vocab_size=16,
    hidden_size=32,
    num_hidden_layers=3,
    max_position_embeddings=64,
    initializer_range=0.2,
    layer_types=(CONV, FULL, CONV),
)
LATENTS = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
HYBRIDS = {
    "LFM2": SMALL,
    "biases, four taps": replace(SMALL, conv_L_cache=4, conv_bias=True),
    "one tap": replace(SMALL, conv_L_cache=1),
    "windows": replace(SMALL, layer_types=(CONV, SLIDING, FULL), sliding_window=5),
    "latents, experts": replace(SMALL, **LATENTS, num_experts=4),
    "no attention": replace(SMALL, layer_types=(CONV,) * 3),
    "odd size": replace(SMALL, hidden_size=33, num_attention_heads=1, head_dim=8),
}
CACHES = (KVCache, SlidingCache, Int8Cache)
every_hybrid = pytest.mark.parametrize("name", HYBRIDS)


def make_model(config: ModelConfig) -> TinyLM:
    """Make a model in float64 whose biases hide nothing."""
    torch.manual_seed(0)
    model = TinyLM(config).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_()
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw tokens."""
    return torch.randint(16, shape, generator=torch.Generator().manual_seed(seed))


def make_cache(kind: type[KVCache], model: TinyLM, rows: int = 2) -> KVCache:
    """Make a cache for texts of 24 tokens."""
    return kind(model.config, rows, 24, torch.float64)


def read(model: TinyLM, ids: torch.Tensor, sizes: list[int], cache: KVCache) -> torch.Tensor:
    """Return the logits of a text that is read in pieces."""
    return torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, 1)], 1)


# The layer


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_what_transformers_computes(taps, bias):
    config = transformers.Lfm2Config(
        hidden_size=12, num_hidden_layers=1, layer_types=[CONV], conv_L_cache=taps, conv_bias=bias
    )
    torch.manual_seed(0)
    theirs = Lfm2ShortConv(config, 0).double()
    ours = ShortConv(12, taps, bias).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 10, 12, dtype=torch.float64)
    assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
    ours(x).sum().backward()
    theirs(x).sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, gradients[name], rtol=0, atol=1e-12)


def test_bfloat16_activations_are_mixed_in_the_precision_of_the_taps():
    u = torch.randn(2, 6, 4).bfloat16()
    y = mix_neighbors(u, torch.randn(4, 1, 3), None, 6)
    assert y.dtype == torch.float32


# Whole models


@every_hybrid
def test_packed_documents_read_as_if_each_were_alone(name):
    model = make_model(HYBRIDS[name])
    ids = random_ids(1, 15)
    lengths = (1, 6, 2, 1, 5)
    document_ids = torch.arange(5).repeat_interleave(torch.tensor(lengths))[None]
    together = model(ids, document_ids=document_ids)
    alone = torch.cat([model(document) for document in ids.split(lengths, 1)], 1)
    assert_close(together, alone)
    if model.config.conv_L_cache > 1:
        crossing = make_model(model.config)
        for layer in crossing.model.layers:
            layer.register_forward_pre_hook(lambda m, inputs: (*inputs[:2], None, *inputs[3:]))
        assert (crossing(ids, document_ids=document_ids) - together).abs().max() > 0.01


@every_hybrid
@pytest.mark.parametrize("kind", [KVCache, SlidingCache])
@pytest.mark.parametrize("sizes", [[15], [9, 1, 1, 4]], ids=str)
def test_a_padded_row_reads_as_if_it_were_alone(name, kind, sizes):
    model = make_model(HYBRIDS[name])
    ids = random_ids(3, 15)
    padding = (0, 7, 8)
    mask = torch.stack([(torch.arange(15) >= count).long() for count in padding])
    cache = make_cache(kind, model, rows=3)
    parts = []
    for piece in ids.split(sizes, 1):
        end = len(cache) + piece.shape[1]
        parts.append(model(piece, attention_mask=mask[:, :end], cache=cache))
    together = torch.cat(parts, 1)
    for row, count in enumerate(padding):
        assert_close(together[row, count:], model(ids[row : row + 1, count:])[0])


@every_hybrid
@pytest.mark.parametrize("sizes", [[1] * 24, [5, 1, 11, 7]], ids=str)
def test_any_pieces_give_the_whole(name, sizes):
    model = make_model(HYBRIDS[name])
    ids = random_ids(2, 24)
    whole = model(ids)
    for kind in (KVCache, SlidingCache):
        assert_close(read(model, ids, sizes, make_cache(kind, model)), whole)
    eight_bits = read(model, ids, sizes, make_cache(Int8Cache, model))
    assert (eight_bits - whole).abs().mean() < 0.1 * whole.std()


@every_hybrid
@pytest.mark.parametrize("kind", CACHES)
def test_after_a_rewind_it_is_as_if_it_had_never_been_read(name, kind):
    model = make_model(HYBRIDS[name])
    ids = random_ids(2, 24)
    other = random_ids(2, 24, seed=1)
    cache = make_cache(kind, model)
    read(model, other[:, :10], [10], cache)
    cache.rewind(0)
    read(model, ids[:, :14], [14], cache)
    read(model, other[:, 14:20], [1, 5], cache)
    cache.rewind(14)
    fresh = make_cache(kind, model)
    read(model, ids[:, :14], [14], fresh)
    again = read(model, ids[:, 14:], [1] * 10, cache)
    assert_close(again, read(model, ids[:, 14:], [1] * 10, fresh))


def test_a_ring_refuses_to_go_back_further_than_it_can():
    model = make_model(SMALL)
    ring = SlidingCache(model.config, 2, 24, torch.float64, spare=3)
    read(model, random_ids(2, 20), [20], ring)
    ring.rewind(17)
    with pytest.raises(ValueError, match="what it sees is overwritten"):
        ring.rewind(14)
    assert ring.stores[0].keys.shape == (2, 1, 2 + 3, 16)


@every_hybrid
@pytest.mark.parametrize("kind", CACHES)
def test_rows_change_places_and_a_beginning_is_shared(name, kind):
    model = make_model(HYBRIDS[name])
    ids = random_ids(2, 12)
    cache = make_cache(kind, model)
    read(model, ids[:, :8], [8], cache)
    rows = torch.tensor([1, 0, 1])
    cache.reorder(rows)
    swapped = read(model, ids[rows, 8:], [1, 3], cache)
    straight = make_cache(kind, model)
    expected = read(model, ids, [8, 1, 3], straight)[:, 8:]
    assert_close(swapped, expected[rows])

    # A fork leaves the cache that it comes from as it is.
    single = make_cache(kind, model, rows=1)
    read(model, ids[:1, :8], [8], single)
    fork = single.fork(2)
    together = read(model, ids[:, 8:], [4], fork)
    assert_close(together[0], read(model, ids[:1, 8:], [4], single)[0])


@every_hybrid
def test_the_cost_is_what_is_allocated(name):
    config = HYBRIDS[name]
    size = sum(weight.numel() for weight in TinyLM(config).parameters())
    assert count_parameters(config)["total"] == size
    if config.conv_L_cache > 1:
        assert cache_bytes(config, 2, 40) == SlidingCache(config, 2, 40).nbytes
    assert ("conv" in count_parameters(config)) == (CONV in config.layer_types)
    assert "conv" not in count_parameters(replace(config, layer_types=(), sliding_window=None))


# Writing text


@every_hybrid
def test_greedy_text_is_the_same_on_every_way(name):
    model = make_model(HYBRIDS[name]).float()
    draft = make_model(replace(SMALL, num_hidden_layers=1, layer_types=(CONV,))).float()
    prompts = [random_ids(9).tolist(), random_ids(2, seed=2).tolist()]
    greedy = SamplingConfig(12, temperature=0)
    single = [generate(model, [prompt], greedy)[0] for prompt in prompts]
    assert generate(model, prompts, greedy) == single
    for prompt, text in zip(prompts, single, strict=True):
        text_without_cache = list(prompt)
        for _ in range(12):
            logits = model(torch.tensor([text_without_cache]))[0, -1]
            text_without_cache.append(int(logits.argmax()))
        assert text_without_cache[len(prompt) :] == text
        assert speculative_generate(model, draft, prompt, greedy, 3) == text
        assert beam_search(model, prompt, 1, 12)[0][0] == text
        with packed(model):
            assert generate(model, [prompt], greedy)[0] == text


def test_generation_keeps_a_ring_for_convolutions():
    model = make_model(SMALL)
    _, cache = start(model, [random_ids(9).tolist()], 30)
    assert isinstance(cache, SlidingCache)
    assert [store.keys.shape[2] for store in cache.stores] == [3, 39, 3]


# Training


def test_taps_are_trained_by_adamw_without_decay():
    torch.manual_seed(0)
    model = TinyLM(SMALL)
    muon, adamw = make_optimizers(model, OptimConfig())
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    layers = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "conv")]
    assert len(layers) == 2
    without_decay = [
        p for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]
    ]
    for layer in layers:
        taps = layer.conv.weight
        assert any(p is taps for p in without_decay)
        assert taps.abs().max() <= 3**-0.5 and taps.std() > 0.25


def test_a_tuned_and_saved_model_is_the_same(tmp_path):
    model = make_model(HYBRIDS["biases, four taps"]).float()
    ids = random_ids(2, 12)
    names = add_lora(model, LoraConfig(r=2, target_modules=("in_proj", "out_proj", "q_proj")))
    assert len(names) == 2 + 2 + 1
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    beside = model(ids).detach()
    merge_lora(model)
    assert_close(model(ids), beside, rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path)
    opened = load_model(tmp_path)
    assert opened.config == model.config
    assert torch.equal(opened(ids), model(ids))


def test_a_compiled_model_computes_the_same():
    model = make_model(SMALL)
    ids = random_ids(2, 12)
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    compiled = deepcopy(model)
    compiled.compile(backend="aot_eager")
    assert_close(compiled(ids, document_ids=document_ids), model(ids, document_ids=document_ids))
    greedy = SamplingConfig(8, temperature=0)
    assert generate(compiled, ids[:, :4], greedy) == generate(model, ids[:, :4], greedy)


# Bad input

REFUSED = {
    "conv_L_cache=0: use a number above 0": {"conv_L_cache": 0},
    "conv_L_cache=-1: use a number above 0": {"conv_L_cache": -1},
    "delta is unknown: use full_attention, sliding_attention, ": {
        "layer_types": (CONV, "delta", FULL)
    },
    "for each of the 3 layers": {"layer_types": (CONV, FULL)},
    "sliding_window=5: no layer has it": {"sliding_window": 5},
    "rope_parameters={'conv': {}}: use the keys full_attention or": {"rope_parameters": {CONV: {}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_in_a_config_names_its_field(message):
    with pytest.raises(ValueError) as error:
        replace(SMALL, **REFUSED[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_kind_that_was_not_imported_says_what_to_import(monkeypatch):
    monkeypatch.delitem(LAYER_KINDS, CONV)
    with pytest.raises(ValueError, match="conv is unknown: import tinylm.shortconv"):
        ModelConfig(num_hidden_layers=1, layer_types=(CONV,))
