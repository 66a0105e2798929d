"""Caches: however a text is cut, the logits are those of one pass."""

import random
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from tinylm.cost import cache_bytes
from tinylm.generate import next_logits
from tinylm.kv_cache import Int8Cache, KVCache, SlidingCache
from tinylm.model import Block, ModelConfig, TinyLM

SMALL = ModelConfig(
    vocab_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LATENTS = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
CHANGES = dict(
    plain={},
    window=dict(sliding_window=5),
    no_rope=dict(no_rope_layers=(0,)),
    yarn=dict(rope_scaling=YARN),
    one_kv_head=dict(num_key_value_heads=1),
    biases=dict(attention_bias=True, qk_norm=False),
    latent=LATENTS,
    latent_window=dict(**LATENTS, sliding_window=5),
    latent_no_rope=dict(**LATENTS, no_rope_layers=(0, 1)),
)
WINDOWED = replace(SMALL, sliding_window=5)


def make_model(config: ModelConfig = SMALL, block: type[Block] = Block) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(config, block).eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed))


def read_in_pieces(model: TinyLM, ids: torch.Tensor, sizes: list[int], cache: KVCache):
    """Return the logits of a text that is read in pieces of these sizes."""
    return torch.cat([model(piece, cache=cache) for piece in ids.split(sizes, dim=1)], 1)


def cuts() -> list[list[int]]:
    """Cut a text of 24 tokens by hand, and ten times at random."""
    rng = random.Random(0)
    sizes = [[1] * 24, [24], [23, 1], [1, 23], [5, 1, 11, 7]]
    for _ in range(10):
        borders = sorted(rng.sample(range(1, 24), rng.randint(1, 23)))
        sizes.append([end - begin for begin, end in pairwise([0, *borders, 24])])
    return sizes


@pytest.mark.parametrize("name", CHANGES)
def test_any_pieces_give_the_whole(name):
    model = make_model(replace(SMALL, **CHANGES[name]))
    ids = random_ids(2, 24)
    whole = model(ids)
    for cut in cuts():
        pieces = read_in_pieces(model, ids, cut, KVCache(model.config, 2, 24))
        assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_a_latent_cache_holds_the_latent_and_the_shared_key():
    for store in KVCache(replace(SMALL, **LATENTS), 2, 24).stores:
        assert store.keys.shape == (2, 1, 24, 12)
        assert store.values.shape == (2, 1, 24, 4)


def padded_batch() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Return three prompts, their left-padded rows with six more tokens, and the mask."""
    ids = random_ids(2, 24)
    prompts = [ids[0, :9].tolist(), ids[1, :4].tolist(), ids[0, 3:4].tolist()]
    text = torch.tensor([[0] * (9 - len(prompt)) + prompt for prompt in prompts])
    is_token = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    later = random_ids(3, 6, seed=1)
    return prompts, torch.cat([text, later], 1), torch.cat([is_token, torch.ones_like(later)], 1)


@pytest.mark.parametrize("kind", [KVCache, SlidingCache])
@pytest.mark.parametrize(
    "borders", [[0, 9, 10, 11, 12, 13, 14, 15], [0, 9, 11, 15], [0, 5, 9, 15]], ids=str
)
def test_a_padded_row_reads_as_if_it_were_alone(kind, borders):
    model = make_model(WINDOWED if kind is SlidingCache else SMALL)
    prompts, text, mask = padded_batch()
    cache = kind(model.config, 3, 15)
    logits = []
    for begin, end in pairwise(borders):
        logits.append(model(text[:, begin:end], attention_mask=mask[:, :end], cache=cache))
    together = torch.cat(logits, 1)
    for row, prompt in enumerate(prompts):
        padding = 9 - len(prompt)
        alone = model(text[row : row + 1, padding:])
        assert_close(together[row : row + 1, padding:], alone, rtol=1e-4, atol=1e-4)


def test_after_a_rewind_it_is_as_if_it_had_never_been_read():
    model = make_model()
    ids = random_ids(2, 24)
    cache = KVCache(model.config, 2, 24)
    model(ids[:, :10], cache=cache)
    once = model(ids[:, 10:13], cache=cache)
    cache.rewind(10)
    model(ids[:, 13:20], cache=cache)  # another continuation
    cache.rewind(10)
    assert model(ids[:, 10:13], cache=cache).equal(once)
    cache.rewind(0)
    assert_close(read_in_pieces(model, ids, [24], cache), model(ids))


@pytest.mark.parametrize("kind", [KVCache, SlidingCache, Int8Cache])
def test_branches_of_a_fork_equal_texts_read_whole(kind):
    model = make_model(WINDOWED)
    beginning = random_ids(1, 6)
    single = kind(model.config, 1, 12)
    four = kind(model.config, 4, 12)
    model(beginning, cache=single)
    model(beginning.expand(4, -1), cache=four)
    branches = single.fork(4)
    for next_ids in random_ids(2, 4, 1, seed=1):
        assert_close(model(next_ids, cache=branches), model(next_ids, cache=four))
    assert (len(single), len(branches)) == (6, 8)
    assert branches.nbytes == 4 * single.nbytes

    # The branches have not touched the cache that they come from.
    logits_of_fork = model(beginning[:, :1], cache=single.fork(1))
    assert_close(logits_of_fork, model(beginning[:, :1], cache=single))
    with pytest.raises(ValueError, match="4 rows cannot become 2"):
        four.fork(2)
    with pytest.raises(ValueError, match="1 rows cannot become 0"):
        single.fork(0)


@pytest.mark.parametrize("kind", [KVCache, SlidingCache, Int8Cache])
def test_reordered_rows_are_those_of_a_cache_that_read_them_so(kind):
    model = make_model(WINDOWED)
    text = random_ids(3, 12)
    rows = torch.tensor([2, 0, 2])
    reordered = kind(model.config, 3, 12)
    next_logits(model, text[:, :9], reordered)
    reordered.reorder(rows)
    in_order = kind(model.config, 3, 12)
    next_logits(model, text[rows][:, :9], in_order)
    ours = next_logits(model, text[rows], reordered)
    assert_close(ours, next_logits(model, text[rows], in_order))


def test_an_empty_cache_is_true():
    assert KVCache(SMALL, 1, 8)  # else `cache or KVCache(...)` would throw away an empty one


def test_gradients_are_refused():
    model = TinyLM(SMALL)
    cache = KVCache(SMALL, 2, 8)
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        model(random_ids(2, 4), cache=cache)
    assert len(cache) == 0


def test_bytes_are_as_predicted():
    for B, S, dtype in ((1, 8, torch.float32), (3, 100, torch.bfloat16)):
        assert KVCache(SMALL, B, S, dtype).nbytes == cache_bytes(SMALL, B, S, dtype)
    assert SlidingCache(WINDOWED, 1, 10**6).nbytes == cache_bytes(WINDOWED, 1, 5 - 1 + 16)
    # Two stores, layers, texts and heads; 24 positions; 8 numbers and 4 bytes for the scale.
    assert Int8Cache(SMALL, 2, 24).nbytes == 2 * 2 * 2 * 2 * 24 * (8 + 4)


def test_bfloat16_and_autocast():
    ids = random_ids(2, 24)
    half = make_model(replace(SMALL, initializer_range=0.02)).bfloat16()
    cache = KVCache(half.config, 2, 24, torch.bfloat16)
    pieces = read_in_pieces(half, ids, [5, 1, 11, 7], cache)
    assert_close(pieces, half(ids), rtol=2e-2, atol=2e-2)
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        pieces = read_in_pieces(model, ids, [5, 1, 11, 7], KVCache(SMALL, 2, 24))
        assert_close(pieces, model(ids), rtol=5e-2, atol=5e-2)


# Rings

WINDOWS = ((1, 1), (2, 3), (5, 1), (5, 4), (5, 16), (40, 16))


@pytest.mark.parametrize(("window", "spare"), WINDOWS)
@pytest.mark.parametrize("name", ["plain", "no_rope", "latent"])
def test_a_ring_reads_as_one_pass(window, spare, name):
    config = replace(SMALL, sliding_window=window, **CHANGES[name])
    model = make_model(config)
    ids = random_ids(2, 24)
    whole = model(ids)
    for cut in cuts():
        pieces = read_in_pieces(model, ids, cut, SlidingCache(config, 2, 24, spare=spare))
        assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def wander(ring: SlidingCache, spare: int) -> float:
    """Read and rewind at random; return the largest difference between a ring and a plain cache."""
    rng = random.Random(0)
    model = make_model(WINDOWED)
    plain = KVCache(WINDOWED, 1, 64)
    largest_difference = 0.0
    furthest = 0  # most positions read since the last full rewind
    for _ in range(200):
        # Rewind both, at most as far as the ring allows; from 50 positions on, to the beginning.
        furthest = max(furthest, len(plain)) if len(plain) < 50 else 0
        length = rng.randint(max(0, furthest - spare), len(plain)) if furthest else 0
        plain.rewind(length)
        ring.rewind(length)

        # Read a piece of random tokens with both.
        size = rng.choice((1, 1, 2, 7, 14))
        piece = torch.tensor([[rng.randrange(16) for _ in range(size)]])
        difference = (model(piece, cache=plain) - model(piece, cache=ring)).abs().max().item()
        largest_difference = max(largest_difference, difference)
    return largest_difference


class OneTooFew(SlidingCache):
    """A ring that keeps one position too few, as first attempts do."""

    def make_store(self, config, *others):
        store = super().make_store(config, *others)
        store.window -= 1
        return store


def test_random_rewinds_of_a_ring():
    for spare in (1, 3, 16):
        assert wander(SlidingCache(WINDOWED, 1, 64, spare=spare), spare) < 1e-5
    assert wander(OneTooFew(WINDOWED, 1, 64, spare=3), 3) > 0.1


def test_a_ring_refuses_to_go_back_too_far():
    model = make_model(WINDOWED)
    ids = random_ids(2, 24)
    ring = SlidingCache(WINDOWED, 2, 24, spare=3)
    model(ids[:, :20], cache=ring)
    with pytest.raises(ValueError, match="length is 16: what it sees is overwritten, keep 17"):
        ring.rewind(16)
    with pytest.raises(ValueError, match="the cache holds 20 positions"):
        ring.rewind(21)
    ring.rewind(17)
    assert_close(model(ids[:, 17:], cache=ring), model(ids)[:, 17:])
    ring.rewind(0)
    assert_close(read_in_pieces(model, ids, [11, 1, 12], ring), model(ids))


def test_settings_of_a_ring():
    with pytest.raises(ValueError, match="use KVCache for a model without a window"):
        SlidingCache(SMALL, 1, 8)
    with pytest.raises(ValueError, match="spare is 0"):
        SlidingCache(WINDOWED, 1, 8, spare=0)
    with pytest.raises(ValueError, match="sliding_window=0"):
        replace(SMALL, sliding_window=0)


@dataclass(frozen=True)
class MixedConfig(ModelConfig):
    """A model with a window in its first layer only."""

    layer_types: tuple[str, ...] = ()


KINDS_OF_LAYERS = ("sliding_attention", "full_attention")
MIXED = MixedConfig(**{**asdict(WINDOWED), "layer_types": KINDS_OF_LAYERS})


class MixedBlock(Block):
    """A block that leaves out the mask of the window where the layer sees everything."""

    def forward(self, x, rope=None, mask=None, *others):
        sees_all = MIXED.layer_types[self.layer_idx] == "full_attention"
        return super().forward(x, rope, None if sees_all else mask, *others)


def test_layers_of_two_kinds():
    model = make_model(MIXED, MixedBlock)
    ids = random_ids(2, 24)
    whole = model(ids)
    for cut in cuts():
        cache = SlidingCache(MIXED, 2, 24, spare=4)
        assert_close(read_in_pieces(model, ids, cut, cache), whole, rtol=1e-4, atol=1e-4)
    cache.rewind(21)
    assert_close(model(ids[:, 21:], cache=cache), whole[:, 21:], rtol=1e-4, atol=1e-4)
    assert [store.keys.shape[2] for store in cache.stores] == [8, 24]
    with_window_only = make_model(WINDOWED)
    with_window_only.load_state_dict(model.state_dict())
    assert (with_window_only(ids) - whole).abs().max() > 0.1  # the second layer looks further


# Eight bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_equal_rounding_by_hand(dtype):
    new = torch.randn(2, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    new[0, 0, 0, 3] = 0.0  # a vector of zeros stays zero
    results = Int8Cache(SMALL, 2, 24).update(*new, 0)
    for result, original in zip(results, new.float(), strict=True):
        assert result.dtype == dtype
        scale = original.abs().amax(-1, keepdim=True) / 127
        by_hand = ((original / scale).round() * scale).nan_to_num()
        tolerance = 0.01 if dtype is torch.bfloat16 else 1e-6
        assert_close(result.float(), by_hand, rtol=tolerance, atol=1e-7)
        if dtype is torch.float32:
            assert ((result - original).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize("name", ["plain", "latent"])
def test_eight_bits_move_the_logits_little(name):
    model = make_model(replace(SMALL, **CHANGES[name]))
    ids = random_ids(2, 24)
    exact = model(ids)
    eight = Int8Cache(model.config, 2, 24)
    moved = (read_in_pieces(model, ids, [8, 1, 7, 8], eight) - exact).abs()
    assert 0 < moved.mean() < 0.03 * exact.std()
    assert moved.max() < 0.2 * exact.std()
    eight.rewind(8)
    assert (model(ids[:, 8:12], cache=eight) - exact[:, 8:12]).abs().max() < 0.2 * exact.std()
