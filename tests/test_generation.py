"""Sampling rules, batches and streams: equality with `transformers`, definitions, bad input."""

import math
import random
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers.generation.logits_process as hf
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from tinylm.chat_template import Tokenizer
from tinylm.generate import (
    SamplingConfig,
    TextStream,
    apply_min_p,
    apply_repetition_penalty,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    choose_end_tokens,
    evaluation_mode,
    generate,
    generate_steps,
    generate_text,
    next_logits,
    pad_prompts,
    process_logits,
    sample,
    start,
    stream,
    uniform_noise,
)
from tinylm.kv_cache import KVCache, SlidingCache
from tinylm.model import ModelConfig, TinyLM

SENTENCES = " the cat sat on the mat. the dog slept on the rug. a bird sat on the roof." * 20
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
KNOBS = dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits() -> torch.Tensor:
    return 3 * torch.randn(64, 50, generator=seeded())


def previous_tokens() -> torch.Tensor:
    return torch.randint(0, 50, (64, 12), generator=seeded(1))


def unequal_prompts() -> list[list[int]]:
    generator = seeded(2)
    return [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 9, 1, 6)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SENTENCES], vocab_size=300)


@pytest.fixture(scope="module")
def pair() -> tuple[LlamaForCausalLM, TinyLM]:
    """The same random weights in `transformers` and here, large enough for lively texts."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.4, rms_norm_eps=1e-6)
    llama = LlamaForCausalLM(config).eval()
    ours = TinyLM(ModelConfig(**SIZES, qk_norm=False)).eval()
    ours.load_state_dict(llama.state_dict())
    return llama, ours


# Noise and draws


def test_noise_of_a_row_depends_on_nothing_else():
    firsts = torch.stack([uniform_noise(seed, 20, 1)[0] for seed in range(20)])
    assert len(firsts.unique()) == 400
    assert uniform_noise(3, 5, 7)[:4, :2].equal(uniform_noise(3, 2, 4))


def test_a_row_without_a_token_to_draw_is_refused():
    damaged = random_logits()
    damaged[9, 3] = math.nan
    all_forbidden = random_logits()
    all_forbidden[9] = -math.inf
    for scores in (damaged, all_forbidden):
        with pytest.raises(ValueError, match="row 9 has no token to draw"):
            sample(scores, torch.rand(64))


def deviations(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return how many standard deviations Pearson's chi-square is away from its mean."""
    expected = counts.sum() * probabilities
    statistic = ((counts - expected) ** 2 / expected).sum()
    k = len(counts) - 1
    return ((statistic - k) / math.sqrt(2 * k)).item()


def test_draws_have_the_right_frequencies_and_the_test_can_fail():
    few = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    generator = seeded()

    def draw(row: torch.Tensor) -> torch.Tensor:
        uniform = torch.rand(20_000, generator=generator)
        return torch.bincount(sample(row.expand(20_000, -1), uniform), minlength=6)

    assert abs(deviations(draw(few), few.softmax(-1)[0])) < 5
    assert deviations(draw(few / 1.1), few.softmax(-1)[0]) > 5  # temperature 10% off


# Rules against `transformers`

RULES = {
    "temperature": (apply_temperature, hf.TemperatureLogitsWarper, (0.7, 1.5)),
    "top_k": (apply_top_k, hf.TopKLogitsWarper, (1, 5, 50, 1000)),
    "top_p": (apply_top_p, hf.TopPLogitsWarper, (1e-9, 0.05, 0.5, 0.9, 0.999)),
    "min_p": (apply_min_p, hf.MinPLogitsWarper, (0.01, 0.1, 0.5, 1.0)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_equals_that_of_transformers(name):
    ours, theirs, values = RULES[name]
    for value in values:
        assert ours(random_logits(), value).equal(theirs(value)(None, random_logits()))


def test_neutral_values_change_nothing():
    logits = random_logits()
    assert process_logits(logits, previous_tokens(), SamplingConfig()).equal(logits)
    for rule, value in (
        (apply_temperature, 1.0),
        (apply_top_k, 0),
        (apply_top_p, 1.0),
        (apply_min_p, 0.0),
    ):
        assert rule(logits, value).equal(logits)


def test_temperature_0_takes_the_first_of_the_largest():
    tie = torch.tensor([[1.0, 5.0, 5.0]])
    assert sample(apply_temperature(tie, 0), torch.tensor([0.9])).item() == 1
    near_0 = apply_temperature(random_logits(), 1e-6).softmax(-1)
    assert_close(apply_temperature(random_logits(), 0).softmax(-1), near_0)


def test_min_p_is_relative_to_the_best_token():
    sure = torch.tensor([[0.90, 0.06, 0.04]]).log()
    unsure = torch.tensor([[0.50, 0.06, 0.44]]).log()
    assert apply_min_p(sure, 0.1).isfinite().tolist() == [[True, False, False]]
    assert apply_min_p(unsure, 0.1).isfinite().tolist() == [[True, True, True]]


def test_padding_does_not_count_for_the_repetition_penalty():
    logits = random_logits()
    previous = previous_tokens()
    penalized = apply_repetition_penalty(logits, previous, 1.3)
    assert penalized.equal(hf.RepetitionPenaltyLogitsProcessor(1.3)(previous, logits))
    padded = torch.cat([torch.full((64, 5), -1), previous], 1)
    assert apply_repetition_penalty(logits, padded, 1.3).equal(penalized)
    lower = [set(row.nonzero()[:, 0].tolist()) for row in penalized < logits]
    assert lower == [set(row) for row in previous.tolist()]


def test_random_mixtures_equal_the_chain_of_transformers():
    rng = random.Random(0)
    for _ in range(20):
        tau = rng.choice((0.3, 0.8, 1.5))
        k = rng.choice((2, 10, 40))
        p = rng.choice((0.3, 0.9))
        m = rng.choice((0.02, 0.3))
        r = rng.choice((0.8, 1.4))
        penalty = hf.RepetitionPenaltyLogitsProcessor(r)
        cuts = [hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p), hf.MinPLogitsWarper(m)]
        chain = LogitsProcessorList([penalty, hf.TemperatureLogitsWarper(tau), *cuts])
        ours = process_logits(
            random_logits(), previous_tokens(), SamplingConfig(9, tau, k, p, m, r)
        )
        assert ours.equal(chain(previous_tokens(), random_logits()))


# Rules against their definitions


def defined_probabilities(row: list[float], used: list[int], config: SamplingConfig):
    """Return the probabilities that all rules together give one row, from their definitions."""
    scores = []
    for token, x in enumerate(row):
        penalty = config.repetition_penalty if token in used else 1
        scores.append((x / penalty if x > 0 else x * penalty) / config.temperature)
    weights = [math.exp(x - max(scores)) for x in scores]

    # Top-k first.
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    first = set(order[: config.top_k or None])
    p = [weight if i in first else 0.0 for i, weight in enumerate(weights)]
    p = [x / sum(p) for x in p]

    # Then top-p and min-p of what it leaves.
    nucleus = set()
    total = 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if total >= config.top_p:
            break
        nucleus.add(i)
        total += p[i]
    p = [x if i in nucleus and x >= config.min_p * max(p) else 0.0 for i, x in enumerate(p)]
    return torch.tensor([x / sum(p) for x in p])


def mixtures() -> list[dict]:
    rng = random.Random(0)
    rules = [dict(temperature=0.6), dict(top_k=7), dict(top_p=0.8), dict(min_p=0.1)]
    rules += [dict(), dict(repetition_penalty=1.5)]
    for _ in range(10):
        settings = dict(temperature=rng.choice((0.7, 1.5)), top_k=rng.choice((5, 20)))
        settings.update(top_p=rng.choice((0.6, 0.9)), min_p=rng.choice((0.02, 0.2)))
        settings.update(repetition_penalty=rng.choice((0.8, 1.4)))
        rules.append(settings)
    return rules


@pytest.mark.parametrize("settings", mixtures(), ids=str)
def test_rules_draw_as_they_are_defined(settings):
    """N even numbers draw a token of probability p about Np times; no luck is involved."""
    row = random_logits()[:1] / 2
    used = previous_tokens()[:1]
    rule = SamplingConfig(**settings)
    exact = defined_probabilities(row[0].tolist(), used[0].tolist(), rule)
    scores = process_logits(row, used, rule).expand(20_000, -1)

    even = (torch.arange(20_000) + 0.5) / 20_000
    counts = torch.bincount(sample(scores, even), minlength=50)
    assert (counts - 20_000 * exact).abs().max() < 1.1

    # The noise of a real batch passes chi-square.
    noise = uniform_noise(1, 1, 20_000)[:, 0]
    counts = torch.bincount(sample(scores, noise), minlength=50)
    possible = exact > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert abs(deviations(counts[possible], exact[possible])) < 5


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1),
        ("temperature", math.nan),
        ("top_k", -5),
        ("top_p", 0),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("seed", -1),
    ],
)
def test_a_bad_setting_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: give a value"):
        SamplingConfig(**{name: value})


def test_end_tokens_of_a_config():
    with pytest.raises(ValueError, match=r"eos_token_id=\(3, -1\): give ids of tokens"):
        SamplingConfig(eos_token_id=(3, -1))
    assert SamplingConfig(eos_token_id=5).eos_token_id == (5,)


def test_a_subclass_of_the_config_is_checked_too():
    @dataclass
    class Flags(SamplingConfig):
        run: str = "a field of its own"

    assert Flags(9, temperature=0).max_new_tokens == 9
    with pytest.raises(ValueError, match=r"top_p=2.0: give a value"):
        Flags(top_p=2.0)


# Batches


@pytest.mark.parametrize("wrong", [[[1], []], [[1], [2, -1]], [[1], 2], [[1], [0.5]]], ids=str)
def test_a_bad_prompt_is_refused_by_its_place(pair, wrong):
    with pytest.raises(ValueError, match=r"prompts\[1\]="):
        start(pair[1], wrong, 1)


def test_prompts_that_do_not_fit_are_refused(pair):
    for prompts, count, message in (
        (torch.zeros(1, 0, dtype=torch.long), 1, r"prompts\[0\]="),
        ([], 1, "prompts is empty"),
        ([[3, 5000]], 9, "token id 5000"),
        ([[1] * 7], 58, "max_position_embeddings=64: shorten the prompt, ask for at most 57, or"),
        ([[1] * 70], 1, "max_position_embeddings=64: shorten the prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            start(pair[1], prompts, count)
    assert start(pair[1], [[1] * 7], 57)[1].max_length == 64
    rows = torch.tensor([[1, 2], [3, 4]])
    assert pad_prompts(rows).equal(rows)


def test_prefill_and_decode_steps_equal_each_row_alone(pair):
    model = pair[1]
    padded, cache = start(model, unequal_prompts(), 2)
    later = torch.randint(1, 60, (4, 2), generator=seeded(3))
    whole = torch.cat([padded, later], 1)
    for length in (9, 10, 11):
        together = next_logits(model, whole[:, :length], cache)
        for logits, row in zip(together, whole[:, :length], strict=True):
            with torch.no_grad():
                alone = model(row[row >= 0][None])[0, -1]
            assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_prefill_makes_the_logits_of_the_last_column_only(pair):
    model = pair[1]
    widths = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[1])
    )
    next_logits(model, pad_prompts(unequal_prompts()), KVCache(model.config, 4, 9))
    hook.remove()
    assert widths == [1]


def test_a_batch_without_its_mask_is_wrong(pair):
    """The equality with each row alone must be able to fail."""
    model = pair[1]
    prompts = unequal_prompts()
    padded = pad_prompts(prompts)
    right_padded = torch.tensor([prompt + [0] * (9 - len(prompt)) for prompt in prompts])
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([prompt]))[:, -1] for prompt in prompts])
    for text, is_right in ((padded, True), (padded.clamp(min=0), False), (right_padded, False)):
        logits = next_logits(model, text, KVCache(model.config, 4, 9))
        assert torch.allclose(logits, alone, rtol=1e-4, atol=1e-4) == is_right


def test_greedy_batch_equals_transformers(pair):
    llama, ours = pair
    padded = pad_prompts(unequal_prompts())
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=7, pad_token_id=0)
    mask = (padded >= 0).long()
    theirs = llama.generate(padded.clamp(min=0), attention_mask=mask, **options)
    answers = generate(ours, unequal_prompts(), SamplingConfig(40, temperature=0), eos_token_id=7)
    for row, answer in zip(theirs[:, 9:].tolist(), answers, strict=True):
        assert row == answer + [0] * (len(row) - len(answer))


def test_transformers_draws_from_the_same_logits(pair):
    llama, ours = pair
    prompts = torch.tensor([unequal_prompts()[0], unequal_prompts()[3][:3]])
    options = dict(max_new_tokens=20, do_sample=True, pad_token_id=0)
    options.update(output_scores=True, return_dict_in_generate=True)
    llama.generation_config.eos_token_id = None
    result = llama.generate(prompts, attention_mask=torch.ones_like(prompts), **options, **KNOBS)
    for step, scores in enumerate(result.scores):
        text = result.sequences[:, : 3 + step]
        with torch.no_grad():
            logits = ours(text)[:, -1]
        ours_processed = process_logits(logits, text, SamplingConfig(**KNOBS))
        assert_close(ours_processed, scores, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def write_alone(model: TinyLM, prompt: list[int], config: SamplingConfig, row: int) -> list[int]:
    """Generate without batch, padding and cache, with the noise of one row."""
    ids = list(prompt)
    noise = uniform_noise(config.seed, row + 1, config.max_new_tokens)[:, row]
    for uniform in noise:
        text = torch.tensor([ids])
        scores = process_logits(model(text)[:, -1], text, config)
        ids.append(int(sample(scores, uniform[None])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.5), KNOBS], ids=str)
def test_rows_do_not_depend_on_their_neighbors(pair, settings):
    model = pair[1]
    config = SamplingConfig(max_new_tokens=20, seed=3, **settings)
    answers = generate(model, unequal_prompts(), config)
    for row, prompt in enumerate(unequal_prompts()):
        assert answers[row] == write_alone(model, prompt, config, row)
    neighbors = [[5], [5, 6], *unequal_prompts()[2:]]
    assert generate(model, neighbors, config)[2:] == answers[2:]
    assert generate(model, unequal_prompts(), replace(config, seed=4)) != answers


WINDOWS = (dict(sliding_window=5), dict(kv_lora_rank=8), dict(sliding_window=5, kv_lora_rank=8))


@pytest.mark.parametrize("kind", WINDOWS, ids=str)
def test_windows_and_latents_write_the_same_texts(kind):
    torch.manual_seed(0)
    model = TinyLM(ModelConfig(**SIZES, initializer_range=0.4, **kind)).eval()
    _, cache = start(model, unequal_prompts(), 30)
    assert isinstance(cache, SlidingCache) == ("sliding_window" in kind)
    answers = generate(model, unequal_prompts(), SamplingConfig(10))
    for row, prompt in enumerate(unequal_prompts()):
        assert answers[row] == write_alone(model, prompt, SamplingConfig(10), row)


def test_logits_are_float32_for_a_bfloat16_model(pair):
    model = deepcopy(pair[1]).bfloat16()
    text, cache = start(model, [[1, 2]], 1)
    assert next_logits(model, text, cache).dtype == torch.float32
    answers = generate(model, [[1], [2, 3]], SamplingConfig(max_new_tokens=9, top_p=0.9))
    assert [len(row) for row in answers] == [9, 9]


def test_each_part_of_a_model_gets_its_own_mode_back(pair):
    parts = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluation_mode(parts):
        assert [part.training for part in parts] == [False, False]
    assert [part.training for part in parts] == [True, False]

    # Also when the caller stops early.
    model = deepcopy(pair[1]).train()
    steps = generate_steps(model, [[1, 2]], SamplingConfig(max_new_tokens=9))
    next(steps)
    assert not model.training
    steps.close()
    assert model.training


def test_a_process_of_the_caller_is_used(pair):
    def only_5(logits, previous_ids, config):
        allowed = torch.full_like(logits, -math.inf)
        allowed[:, 5] = 0.0
        return allowed

    three = SamplingConfig(max_new_tokens=3)
    assert generate(pair[1], [[1], [2, 3]], three, process=only_5) == [[5, 5, 5], [5, 5, 5]]


def test_end_tokens_are_chosen_by_the_first_who_names_any(tokenizer):
    listing = Tokenizer(tokenizer.hf_tokenizer)
    listing.eos_token_ids = [3, 4]
    by_config = SamplingConfig(eos_token_id=(1, 2))
    assert choose_end_tokens(5, by_config, listing) == {5}
    assert choose_end_tokens([], by_config, listing) == set()
    assert choose_end_tokens(None, by_config, listing) == {1, 2}
    assert choose_end_tokens(None, SamplingConfig(), listing) == {3, 4}
    assert choose_end_tokens(None, SamplingConfig()) == set()


def test_rows_end_at_any_of_several_tokens(pair):
    model = pair[1]
    greedy = SamplingConfig(max_new_tokens=30, temperature=0)
    whole = generate(model, unequal_prompts(), greedy)
    end_ids = [whole[0][4], whole[1][7], whole[2][9]]
    answers = generate(model, unequal_prompts(), greedy, end_ids)
    for answer, row in zip(answers, whole, strict=True):
        places = [i for i, token in enumerate(row) if token in end_ids]
        assert answer == row[: places[0] + 1] if places else row
    by_config = replace(greedy, eos_token_id=tuple(end_ids))
    assert generate(model, unequal_prompts(), by_config) == answers


# Streams


def up_to_stop(text: str, stops: list[str]) -> str:
    """Read letter by letter, and end before the stop string that is complete first."""
    for n in range(len(text) + 1):
        endings = [stop for stop in stops if text[:n].endswith(stop)]
        if endings:
            return text[: n - max(map(len, endings))]
    return text


def test_pieces_of_random_texts_join_to_the_text_up_to_the_stop(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        words = ["a", "b", "ab", "é", "😺", "🇫🇷", "👩‍👩‍👧", " the cat"]
        text = "".join(rng.choices(words, k=12))
        count = rng.randint(0, 3)
        stops = ["".join(rng.choices("abé😺 t", k=rng.randint(1, 3))) for _ in range(count)]

        # Encoding in pieces gives other tokens than encoding the whole.
        cuts = [0, *sorted(rng.sample(range(len(text)), 3)), len(text)]
        ids = []
        for begin, end in pairwise(cuts):
            ids += tokenizer.encode(text[begin:end])
        text_stream = TextStream(tokenizer, stops)
        pieces = [text_stream.push(i) for i in [*ids, None]]
        assert "".join(pieces) == up_to_stop(text, stops)
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer):
    text_stream = TextStream(tokenizer)
    half = tokenizer.encode("😺")[:2]
    pieces = [text_stream.push(i) for i in (*half, None, 5)]
    assert pieces == ["", "", tokenizer.decode(half), ""]


def test_stop_strings_are_a_list_of_strings(tokenizer):
    with pytest.raises(ValueError, match="list of strings"):
        TextStream(tokenizer, "stop")
    with pytest.raises(ValueError, match="none of them empty"):
        TextStream(tokenizer, [""])


def llama_like() -> Tokenizer:
    """A tokenizer that drops the space at the beginning of a text (SentencePiece)."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=marks, show_progress=False)
    backend.train_from_iterator(["a bee sees the sea", "the sea sees a bee"], trainer)
    names = dict(bos_token="<s>", eos_token="</s>")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names))


def continued(tokenizer: Tokenizer, ids: list[int], cut: int) -> str:
    text_stream = TextStream(tokenizer, prompt_ids=[tokenizer.bos_token_id, *ids[:cut]])
    return "".join(text_stream.push(i) for i in [*ids[cut:], None])


def test_prompt_and_continuation_join_to_the_text_wherever_it_is_cut(tokenizer):
    text = "the bee sees a sea 😺 and the bee"
    wrong_alone = 0
    spaces_dropped = llama_like()
    for reader in (spaces_dropped, tokenizer):
        ids = reader.encode(text)
        for cut in range(len(ids) + 1):
            beginning = reader.decode(ids[:cut]).rstrip("\ufffd")
            assert beginning + continued(reader, ids, cut) == text
            if reader is spaces_dropped:
                wrong_alone += beginning + reader.decode(ids[cut:]) != text
    assert wrong_alone > 4  # decoded without the prompt, spaces are lost

    # A text without a prompt begins without a space; a prompt may contain the sign itself.
    alone = TextStream(spaces_dropped)
    ids = [*spaces_dropped.encode("the bee"), None]
    assert "".join(alone.push(i) for i in ids) == "the bee"
    with_sign = tokenizer.encode("a \ufffd cat")
    assert continued(tokenizer, with_sign, len(tokenizer.encode("a \ufffd"))) == " cat"


class Reciter(nn.Module):
    """Continues a text of n tokens with script[n]; beyond the end it repeats the last token."""

    def __init__(self, config: ModelConfig, script: list[int]):
        super().__init__()
        self.config = config
        self.script = torch.tensor(script)
        self.unused = nn.Parameter(torch.zeros(1))  # tells the device of the model

    def forward(self, input_ids, attention_mask, cache, logits_to_keep):
        cache.advance(input_ids.shape[1])
        if attention_mask is None:
            lengths = torch.full((len(input_ids),), len(cache))
        else:
            lengths = attention_mask.sum(-1)
        next_ids = self.script[lengths.clamp(max=len(self.script) - 1)]
        return 100 * F.one_hot(next_ids, self.config.vocab_size)[:, None]


def test_end_tokens_stop_strings_and_emoji_in_a_batch(tokenizer):
    """Whatever the text is, the next token of a script has probability 1."""
    script = tokenizer.encode("x Hello 😺 and 👩‍👩‍👧! User: never said")
    config = ModelConfig(vocab_size=len(tokenizer), max_position_embeddings=256)
    bos = tokenizer.bos_token_id
    reciter = Reciter(config, [bos, *script, tokenizer.eos_token_id])
    plain = SamplingConfig(max_new_tokens=len(script))
    beginnings = [[bos, *script[:n]] for n in (1, 4)]
    rests = [tokenizer.decode(script[n:]) for n in (1, 4)]
    assert generate_text(reciter, tokenizer, beginnings, plain) == rests
    before_user = [rest.split("User:")[0] for rest in rests]
    assert generate_text(reciter, tokenizer, beginnings, plain, ["User:"]) == before_user
    pieces = list(stream(reciter, tokenizer, beginnings[1], plain, ["\nUser:", "! User:"]))
    assert "".join(pieces) == rests[1].split("! User:")[0]

    # An end token is not shown, wherever it is named.
    end_ids = {tokenizer.encode("!")[0], tokenizer.eos_token_id}
    before_mark = [rest.split("!")[0] for rest in rests]
    assert generate_text(reciter, tokenizer, beginnings, plain, (), end_ids) == before_mark
    by_config = replace(plain, eos_token_id=tuple(end_ids))
    assert generate_text(reciter, tokenizer, beginnings, by_config) == before_mark
    listing = Tokenizer(tokenizer.hf_tokenizer)
    listing.eos_token_ids = sorted(end_ids)
    assert "".join(stream(reciter, listing, beginnings[1], plain)) == before_mark[1]


def test_a_number_of_three_digits_is_forced(tokenizer):
    """A constraint is a function from logits to logits: forbid what cannot come next."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = TinyLM(ModelConfig(vocab_size=len(tokenizer), **sizes)).eval()
    digits = torch.tensor([tokenizer.encode(str(n))[0] for n in range(10)])

    def three_digits(scores, text, config):
        has_three = torch.isin(text[:, -3:], digits).all(-1) & (text.shape[1] > 2)  # (B,)
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, tokenizer.eos_token_id] = has_three
        allowed[:, digits] = ~has_three[:, None]
        return process_logits(scores.masked_fill(~allowed, -math.inf), text, config)

    prompts = [[tokenizer.bos_token_id], tokenizer.encode(" the cat sat")]
    eos = tokenizer.eos_token_id
    for row in generate(model, prompts, SamplingConfig(9), eos, process=three_digits):
        assert len(row) == 4 and row[-1] == eos
        assert tokenizer.decode(row[:-1]).isdecimal()
