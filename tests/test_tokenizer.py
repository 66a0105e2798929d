"""The tokenizer: any text comes back, training is repeatable, and files are read by others."""

import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinylm.tokenizer import CHATML_TEMPLATE, SPECIAL_TOKENS, TextTokenizer, looks_like_path

TOY = "the cat sat on the mat"
ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no
pictures or conversations in it, "and what is the use of a book," thought Alice "without pictures
or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

In another moment down went Alice after it, never once considering how in the world she was to
get out again.
"""


@pytest.fixture(scope="module")
def tokenizer():
    """Train a tokenizer on the two texts."""
    return TextTokenizer.train([ALICE, TOY], vocab_size=400)


def of_characters():
    """Make a tokenizer of characters."""
    return TextTokenizer.from_chars(ALICE)


def trained():
    """Make a tokenizer of bytes and merges."""
    return TextTokenizer.train([ALICE, TOY], vocab_size=400)


each_kind = pytest.mark.parametrize("make", [trained, of_characters])


def random_texts(count):
    """Make odd texts: characters from all of Unicode, bytes read as Latin-1, odd pieces."""
    rng = random.Random(0)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    pieces = [" ", "\n", "the", "\u3000", "\u200b", "<|pad|>", "7", "!"]
    texts = []
    for _ in range(count):
        texts.append("".join(map(chr, rng.choices(points, k=rng.randrange(40)))))
        texts.append(rng.randbytes(rng.randrange(60)).decode("latin-1"))
        texts.append("".join(rng.choices(pieces, k=12)))
    return texts


HARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t\r\n",
    "\x00\x1b\x7f",
    "naïve 猫坐在垫子上 🐈 👩🏽‍🚀",
    "e\u0301 \u00e9",
    "<|endoftext|>",
    "<|im_start|>user",
]

# Text to ids and back


def test_any_text_comes_back(tokenizer):
    texts = HARD + random_texts(1000)
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert [tokenizer.encode(text) for text in texts[::100]] == rows[::100]
    assert all(min(row, default=4) >= len(SPECIAL_TOKENS) for row in rows)


def test_an_unknown_character_is_one_token_per_byte(tokenizer):
    ids = tokenizer.encode("🐈")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "🐈"


def test_special_tokens_in_a_text_are_text(tokenizer):
    document = tokenizer.encode_document("the cat <|endoftext|> sat")
    assert (document[0], document[-1], document.count(0)) == (0, 0, 2)
    assert tokenizer.decode(document, skip_special_tokens=True) == "the cat <|endoftext|> sat"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)

    typed = "the <|im_start|> mat"
    theirs = tokenizer.hf_tokenizer.encode(
        typed, add_special_tokens=False, split_special_tokens=True
    )
    assert tokenizer.encode(typed) == theirs
    theirs = tokenizer.hf_tokenizer.encode(typed, add_special_tokens=False)
    assert theirs == [*tokenizer.encode("the "), 2, *tokenizer.encode(" mat")]


def test_special_tokens_have_the_first_ids(tokenizer):
    assert tokenizer.hf_tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3]


def test_pieces_have_the_ids_of_the_whole(tokenizer):
    rng = random.Random(1)
    texts = [
        ALICE * 6,
        "".join(random_texts(300)),
        "ACGT" * 3000 + "\n" + "=" * 5000,
        "".join(rng.choices("01\n \r.a", k=20_000)),
    ]
    for kind in (tokenizer, TextTokenizer.from_chars("".join(texts))):
        for text in texts:
            pieces = list(kind.pieces(text, size=4500))
            assert "".join(pieces) == text
            assert max(map(len, pieces)) <= 4500
            ids = [i for row in kind.encode_batch(pieces) for i in row]
            assert ids == kind.encode(text)
    assert list(tokenizer.pieces("the cat")) == ["the cat"]


@each_kind
def test_bytes_that_are_not_utf8_are_refused(make):
    latin = "a caf\xe9".encode("latin-1").decode("utf-8", "surrogateescape")
    with pytest.raises(ValueError, match="text is not UTF-8 behind 'a caf'"):
        make().encode(latin)


def test_unknown_characters_are_refused_by_name():
    chars = TextTokenizer.from_chars(TOY)
    assert len(chars) == 4 + len(set(TOY))
    assert chars.decode(chars.encode("cat on mat")) == "cat on mat"
    for text, unknown in [("the dog", "'d', 'g'"), ("<|pad|>", "'<', '>', 'd', 'p', '|'")]:
        with pytest.raises(ValueError) as caught:
            chars.encode(text)
        assert f"text has [{unknown}], not in the vocabulary" in str(caught.value)


# Training


def test_words_are_those_of_gpt2_up_to_a_length(tokenizer):
    def cut(text):
        words = tokenizer.hf_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return [word for word, _ in words]

    of_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    longest = "猫" * 256 + " \t\n" * 85 + "7" * 256 + "?!" * 128
    for text in (TOY, ALICE, "naïve café\n\n  it's 1865, not 3.14!", longest):
        assert cut(text) == [word for word, _ in of_gpt2.pre_tokenize_str(text)]
    assert [len(word) for word in cut("ACGT" * 150 + " " * 300)] == [256, 256, 88, 256, 44]


def test_a_long_text_is_cut_between_words():
    """Training reads it in parts, which changes no merge."""
    whole = TextTokenizer.train([" ".join([TOY] * 5000)], 300)
    sentences = TextTokenizer.train([TOY] + [" " + TOY] * 4999, 300)
    assert whole.hf_tokenizer.get_vocab() == sentences.hf_tokenizer.get_vocab()


def test_training_is_repeatable_and_the_order_of_texts_is_irrelevant():
    def description(texts):
        return TextTokenizer.train(texts, 400).hf_tokenizer.backend_tokenizer.to_str()

    paragraphs = ALICE.split("\n\n")
    assert description(paragraphs) == description(iter(paragraphs))
    assert description(paragraphs) == description(paragraphs[::-1])


def test_rare_pairs_are_not_merged():
    sizes = [len(TextTokenizer.train([ALICE], 2000, min_frequency=n)) for n in (1, 2, 5)]
    assert 2000 > sizes[0] > sizes[1] > sizes[2] > 260


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([TOY], 100, "vocab_size=100 is too small"),
        ([TOY], 10**12, "vocab_size=1000000000000 is too large"),
        (TOY, 300, r"\[text\]"),
    ],
)
def test_bad_input_of_training_is_refused(texts, size, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer.train(texts, size)


def test_an_error_in_the_texts_is_not_lost_in_the_thread():
    def texts():
        yield TOY
        raise LookupError("no more texts")

    with pytest.raises(Exception, match="no more texts"):
        TextTokenizer.train(texts(), 300)


# Files


@each_kind
def test_files_are_read_by_transformers(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    loaded = TextTokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(ALICE) == tokenizer.encode(ALICE)
    assert theirs.encode(ALICE, add_special_tokens=False) == tokenizer.encode(ALICE)
    assert theirs.decode(tokenizer.encode(ALICE)) == ALICE
    assert theirs.get_vocab() == tokenizer.hf_tokenizer.get_vocab()
    assert loaded.hf_tokenizer.chat_template == CHATML_TEMPLATE


def check_start(tokenizer, reader):
    """Check that another program puts the start token before a text, once."""
    assert reader("One day").input_ids == [tokenizer.bos_token_id, *tokenizer.encode("One day")]
    assert reader("").input_ids == [tokenizer.bos_token_id]


def with_letters_of_one_day():
    """Make a tokenizer of characters that can write "One day"."""
    return TextTokenizer.from_chars(ALICE + "One day")


@pytest.mark.parametrize("make", [trained, with_letters_of_one_day])
def test_the_start_token_comes_once(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    check_start(tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    TextTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    check_start(tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    check_start(tokenizer, pickle.loads(pickle.dumps(tokenizer)).hf_tokenizer)


def test_a_rule_of_others_stays_until_it_is_asked_for(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.hf_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()  # GPT-2's rule: no special token
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    opened = TextTokenizer(theirs)
    assert theirs("One day").input_ids == opened.encode("One day")
    opened.add_start_token()
    assert theirs.bos_token == "<|im_end|>"
    check_start(opened, theirs)


OWN_CODE = {"auto_map": {"AutoTokenizer": ["cat.Cat", None]}, "tokenizer_class": "Cat"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "<|im_end|>"}', "give the id of a token"),
        ("tokenizer.json", '{"model": {}}', "its files are damaged"),
        ("tokenizer_config.json", json.dumps(OWN_CODE), "which is not run here"),
        ("tokenizer_config.json", "[1, 2]", "tokenizer_config.json holds a list, no fields"),
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, file, content, message):
    tokenizer = trained()
    tokenizer.eos_token_ids = [0, 3]
    tokenizer.save_pretrained(tmp_path)
    assert TextTokenizer.from_pretrained(tmp_path).eos_token_ids == [0, 3]
    (tmp_path / file).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        TextTokenizer.from_pretrained(tmp_path)


def test_names_that_lead_nowhere_are_refused(tmp_path):
    for nothing in ("no folder", str(tmp_path)):
        with pytest.raises(ValueError) as caught:
            TextTokenizer.from_pretrained(nothing)
        assert f"name_or_folder={nothing!r} holds no tokenizer: give" in str(caught.value)
    with pytest.raises(ValueError, match="hf_tokenizer=NoneType is not a fast tokenizer"):
        TextTokenizer(None)


def test_paths_and_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in ("./mine", "~/mine", "a/b/c", "images/mine", "mine/"):
        assert looks_like_path(name), name
    for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M"):
        assert not looks_like_path(name), name
