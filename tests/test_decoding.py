"""Beam search and speculative decoding: brute force, `transformers`, frequencies, bad input."""

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import tinylm.decoding
from tinylm.decoding import (
    PackedLinear,
    beam_search,
    longer_texts,
    packed,
    speculative_generate,
    speculative_steps,
)
from tinylm.generate import SamplingConfig, generate, next_logits, process_logits
from tinylm.kv_cache import KVCache
from tinylm.model import ModelConfig, TinyLM

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
TINY = ModelConfig(
    vocab_size=4,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.5,
)


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 9, 1, 6)]


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, TinyLM]:
    """The same random weights in `transformers` and here, large enough for lively texts."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.4, rms_norm_eps=1e-6)
    llama = LlamaForCausalLM(config).eval()
    llama.generation_config.eos_token_id = None
    ours = TinyLM(ModelConfig(**SIZES, qk_norm=False)).eval()
    ours.load_state_dict(llama.state_dict())
    return llama, ours


class Table(nn.Module):
    """A model whose next-token probabilities are a row of a table, chosen by the last token."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        self.config = ModelConfig(vocab_size=len(table), **sizes)
        self.scores = nn.Parameter(table.log())

    def forward(self, input_ids, attention_mask=None, cache=None, logits_to_keep=0):
        cache.advance(input_ids.shape[1])
        return self.scores[input_ids[:, -logits_to_keep:]]


def greedy_text(model: TinyLM, prompt: list[int], count: int) -> list[int]:
    return generate(model, [prompt], SamplingConfig(count, temperature=0))[0]


# Beams


def all_texts(model: TinyLM, prompt: list[int], longest: int, eos: int, length_penalty: float):
    """Score every text of at most `longest` tokens, best first."""
    texts = []
    for n in range(1, longest + 1):
        for tail in itertools.product(range(4), repeat=n):
            is_whole = tail[-1] == eos or n == longest
            if eos not in tail[:-1] and is_whole:
                texts.append(list(tail))
    scored = []
    for tail in texts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tail]))
        log_p = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        total = sum(row[i].item() for row, i in zip(log_p, tail, strict=True))
        scored.append((tail, total / len(tail) ** length_penalty))
    return sorted(scored, key=lambda text: -text[1])


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("seed", range(3))
def test_with_enough_beams_the_ranking_is_that_of_brute_force(seed, penalty):
    torch.manual_seed(seed)
    model = TinyLM(TINY).eval()
    ranking = all_texts(model, [1, 2], 4, 3, penalty)
    result = beam_search(model, [1, 2], 121, 4, penalty, 3)
    assert [ids for ids, _ in result] == [ids for ids, _ in ranking]
    for (_, score), (_, right_score) in zip(result, ranking, strict=True):
        assert abs(score - right_score) < 1e-5

    # Fewer beams find texts that may be less likely, never more.
    for beams in (1, 2, 4):
        _, best_score = beam_search(model, [1, 2], beams, 4, penalty, 3)[0]
        assert best_score <= ranking[0][1] + 1e-5


def test_one_beam_is_greedy(pair):
    prompt = random_prompts()[1]
    ids, _ = beam_search(pair[1], prompt, 1, 30)[0]
    assert ids == greedy_text(pair[1], prompt, 30)


@pytest.mark.parametrize("seed", range(4))
def test_all_beams_equal_those_of_transformers(pair, seed):
    """Their `early_stopping="never"` is our rule; their default finds the same best text."""
    llama, ours = pair
    prompt = torch.randint(1, 60, (1, 5), generator=torch.Generator().manual_seed(seed))
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=1)
    options.update(return_dict_in_generate=True, output_scores=True)
    inputs = dict(inputs=prompt, attention_mask=torch.ones_like(prompt))
    settings = itertools.product((2, 5), (0.0, 1.0, -1.0), (None, [7], [7, 9, 21, 33]))
    for beams, penalty, eos_ids in settings:
        search = dict(num_beams=beams, num_return_sequences=beams)
        search.update(length_penalty=penalty, eos_token_id=eos_ids)
        theirs = llama.generate(early_stopping="never", **inputs, **options, **search)
        result = beam_search(ours, prompt[0], beams, 12, penalty, eos_ids)
        for i, (ids, score) in enumerate(result):
            row = theirs.sequences[i, 5:].tolist()
            assert row == ids + [1] * (len(row) - len(ids))
            assert abs(score / theirs.sequences_scores[i].item() - 1) < 1e-5
        default = llama.generate(**inputs, **options, **search)
        best_ids, _ = result[0]
        assert default.sequences[0, 5:].tolist()[: len(best_ids)] == best_ids


def test_damaged_logits_are_refused():
    damaged = torch.full((3, 8), math.nan)
    with pytest.raises(ValueError, match="contain NaN"):
        longer_texts(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3), damaged, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], 0, 2), "num_beams=0 and max_new_tokens=2: give"),
        (([1], 2, 0), "num_beams=2 and max_new_tokens=0: give"),
        (([], 2, 2), r"prompts\[0\]=\[\]"),
        (([5000], 2, 2), "token id 5000"),
        (([1], 2, 64), "ask for at most 63"),
    ],
)
def test_bad_input_of_beam_search(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_search(pair[1], *arguments)


class StuckCache(KVCache):
    """A cache whose rows do not follow the beams."""

    def reorder(self, rows):
        super().reorder(torch.arange(len(rows)) % self.batch_size)


def score_error(model: TinyLM, prompt: list[int], result: list) -> float:
    """Return how far the scores are from the mean log-probabilities of the texts."""
    errors = []
    for ids, score in result:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, -len(ids) - 1 : -1]
        mean_log_p = logits.log_softmax(-1)[range(len(ids)), ids].mean().item()
        errors.append(abs(mean_log_p - score))
    return max(errors)


def test_a_cache_that_does_not_follow_the_beams_is_wrong(pair, monkeypatch):
    def start_stuck(model, prompts, max_new_tokens):
        text = torch.tensor(prompts)
        return text, StuckCache(model.config, 1, text.shape[1] + max_new_tokens)

    model = pair[1]
    prompt = random_prompts()[1]
    assert score_error(model, prompt, beam_search(model, prompt, 4, 12)) < 1e-4
    monkeypatch.setattr(tinylm.decoding, "start", start_stuck)
    assert score_error(model, prompt, beam_search(model, prompt, 4, 12)) > 1e-4


# Speculative decoding


def test_a_greedy_text_is_the_targets_own_for_any_draft(pair):
    model = pair[1]
    torch.manual_seed(1)
    stranger = TinyLM(ModelConfig(**SIZES, qk_norm=False, initializer_range=0.4))
    first_layer = TinyLM(replace(model.config, num_hidden_layers=1))
    first_layer.load_state_dict(model.state_dict(), strict=False)
    greedy = SamplingConfig(40, temperature=0)
    for draft in (deepcopy(model), first_layer, stranger):
        settings = itertools.product(random_prompts()[:2], (None, [7, 9]), (1, 4))
        for prompt, eos_ids, g in settings:
            wanted = generate(model, [prompt], greedy, eos_ids)[0]
            assert speculative_generate(model, draft, prompt, greedy, g, eos_ids) == wanted


def test_a_copy_as_draft_gives_five_tokens_a_pass(pair):
    model = deepcopy(pair[1])
    passes = []
    model.lm_head.register_forward_hook(lambda *call: passes.append(1))
    speculative_generate(model, pair[1], [1, 2], SamplingConfig(40, temperature=0), 4)
    assert len(passes) == 8


WINDOWS = (dict(sliding_window=5), dict(kv_lora_rank=8), dict(sliding_window=5, kv_lora_rank=8))


@pytest.mark.parametrize("kind", WINDOWS, ids=str)
def test_windows_and_latents(pair, kind):
    torch.manual_seed(0)
    model = TinyLM(ModelConfig(**SIZES, initializer_range=0.4, **kind)).eval()
    for prompt in random_prompts():
        wanted = greedy_text(model, prompt, 30)
        for g in (2, 20):
            greedy = SamplingConfig(30, temperature=0)
            assert speculative_generate(model, pair[1], prompt, greedy, g) == wanted
    prompt = random_prompts()[1]
    assert score_error(model, prompt, beam_search(model, prompt, 4, 20)) < 1e-4


def deviations(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return how many standard deviations Pearson's chi-square is away from its mean."""
    expected = counts.sum() * probabilities
    statistic = ((counts - expected) ** 2 / expected).sum()
    k = len(counts) - 1
    return ((statistic - k) / math.sqrt(2 * k)).item()


def text_counts(target, draft, prompt: list[int], length: int, draws: int, **settings):
    """Count how often each text of `length` tokens comes out; a text is a number in base V."""
    V = target.config.vocab_size
    counts = torch.zeros(V**length)
    for seed in range(draws):
        sampling = SamplingConfig(length, seed=seed, **settings)
        number = 0
        for token in speculative_generate(target, draft, prompt, sampling, 2):
            number = V * number + token
        counts[number] += 1
    return counts


def text_probabilities(target, prompt: list[int], length: int, **settings) -> torch.Tensor:
    """Return the probability of each text of `length` tokens, by the chain rule."""
    V = target.config.vocab_size
    p = torch.ones(1)
    texts = torch.tensor([prompt])
    for _ in range(length):
        cache = KVCache(target.config, len(texts), texts.shape[1])
        logits = next_logits(target, texts, cache)
        scores = process_logits(logits, texts, SamplingConfig(**settings))
        p = (p[:, None] * scores.softmax(-1)).flatten()
        next_ids = torch.arange(V).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(V, 0), next_ids], 1)
    return p


def test_sampled_texts_have_the_targets_distribution():
    generator = torch.Generator().manual_seed(0)
    world = Table(torch.randn(5, 5, generator=generator).softmax(-1))
    other = Table(torch.randn(5, 5, generator=generator).softmax(-1))
    exact = text_probabilities(world, [0], 3)
    assert abs(deviations(text_counts(world, other, [0], 3, 2000), exact)) < 5

    # The test can fail: the draft's own texts have another distribution.
    texts = torch.tensor(generate(other, [[0]] * 2000, SamplingConfig(3)))
    counts = torch.bincount(texts @ torch.tensor([25, 5, 1]), minlength=125)
    assert deviations(counts, exact) > 5


def test_sampled_texts_of_real_models_under_all_rules():
    five_words = replace(TINY, vocab_size=5, num_hidden_layers=2)
    torch.manual_seed(0)
    target = TinyLM(five_words).eval()
    draft = TinyLM(replace(five_words, num_hidden_layers=1))
    rules = dict(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    exact = text_probabilities(target, [0, 1], 3, **rules)
    counts = text_counts(target, draft, [0, 1], 3, 600, **rules)
    possible = exact > 0
    assert counts[~possible].sum() == 0
    assert abs(deviations(counts[possible], exact[possible])) < 5


def test_bad_input_of_speculative_decoding(pair):
    model = pair[1]
    draft = deepcopy(model)
    nine = SamplingConfig(max_new_tokens=9)
    other = TinyLM(TINY)
    for arguments, message in (
        ((model, draft, [1], nine, 0), "num_draft_tokens=0, 1 prompts"),
        ((model, other, [1], nine), "vocab_size=4 for a model with 60"),
        ((model, draft, [], nine), r"prompts\[0\]=\[\]"),
        ((model, draft, [60], nine), "token id 60"),
        ((model, draft, [1] * 60, nine), "ask for at most 4"),
    ):
        with pytest.raises(ValueError, match=message):
            speculative_generate(*arguments)
    with pytest.raises(ValueError, match="2 prompts: use"):
        next(speculative_steps(model, draft, [[1], [2]], nine))


# Packed weights


def test_packed_layers_come_back(pair):
    model = deepcopy(pair[1])
    names = list(model.state_dict())
    config = SamplingConfig(max_new_tokens=24)
    texts = generate(model, random_prompts(), config)
    with packed(model):
        assert isinstance(model.lm_head, PackedLinear)
        assert list(model.state_dict()) == names
        assert generate(model, random_prompts(), config) == texts
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    with pytest.raises(ValueError, match="packed is for float32 weights on a CPU"):
        packed(model.bfloat16()).__enter__()
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())


def test_a_layer_that_stands_in_two_places_is_packed_in_both():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Sequential(layer))
    x = torch.randn(2, 8)
    wanted = model(x)
    with packed(model):
        assert isinstance(model[0], PackedLinear)
        assert isinstance(model[1][0], PackedLinear)
        assert_close(model(x), wanted)
    assert model[0] is layer
    assert model[1][0] is layer
