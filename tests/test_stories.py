"""A second reader of the built-in stories, and other checks of `tinylm.corpus`.

The reader knows nothing of the program that writes the stories. It reads the text sentence by
sentence with patterns, keeps its own notes, and answers the questions from them.
"""

import math
import random
import re
from collections import Counter
from itertools import islice

import pytest

from tinylm.corpus import (
    DRAWS,
    FLAVOR,
    FORMS,
    GIRLS,
    NUMBERS,
    PEOPLE,
    PLACES,
    PLURAL,
    SINGULAR,
    SLOTS,
    SPLITS,
    THINGS,
    Teller,
    Voice,
    World,
    make_corpus,
    stories,
    weighted,
    words,
)


def _equal(a, b):
    """Fail, and show both values, if they differ."""
    assert a == b


# The second reader. In a pattern, `*` is a word to keep and `_` a word to skip; the first word that
# is kept is the person who acts.

NUMBER = {word.strip(): n for n, word in enumerate(NUMBERS)}
RULES = []


def reads(*patterns: str):
    """Register the decorated function for the sentences that match one of these patterns."""

    def register(function):
        for pattern in patterns:
            regex = re.escape(pattern).replace(r"\*", r"(\w+)").replace("_", r"\w+")
            RULES.append((re.compile(regex + " ?"), function))
        return function

    return register


class Notes:
    def __init__(self):
        self.at = {}  # the place of each person
        self.holder = {}  # who holds a thing
        self.lies = {}  # where a thing was laid
        self.count = Counter()
        self.answers = []

    def where(self, name):
        if name in self.at:
            return self.at[name]
        if name in self.holder:  # a held thing is where its holder is
            return self.at[self.holder[name]]
        return self.lies[name]


@reads("* was in the *.", "* and * were in the *.")
def begin(w, *people_and_place):
    *people, place = people_and_place
    for person in people:
        w.at[person] = place


@reads("There was a _ * in the *.", "A _ * lay in the *.")
def lie(w, thing, place):
    w.lies[thing] = place


@reads("* had a _ *.")
def have(w, who, thing):
    w.holder[thing] = who


@reads("* had * _.")
def own(w, who, n):
    w.count[who] = NUMBER[n]


@reads("* _ to the * _.", "* left the _ and _ to the *.")
def went(w, who, place):
    assert w.at[who] != place
    w.at[who] = place


@reads("* joined * in the *.")
def joined(w, who, other, place):
    assert w.at[who] != place == w.at[other]
    w.at[who] = place


@reads("* called * to the *.")
def called(w, who, other, place):
    joined(w, other, who, place)  # the other joins the caller


@reads("* led * to the *.")
def led(w, who, other, place):
    assert place != w.at[who] == w.at[other]
    w.at[who] = place
    w.at[other] = place


@reads("* took the * in the *.")
def took(w, who, thing, place):
    assert thing not in w.holder and w.lies[thing] == w.at[who] == place
    w.holder[thing] = who


@reads("* found the * in the *.")
def found(w, who, thing, place):
    went(w, who, place)
    took(w, who, thing, place)


@reads("* carried the * to the *.")
def carried(w, who, thing, place):
    assert w.holder[thing] == who
    went(w, who, place)


@reads("* put the * down in the *.")
def put(w, who, thing, place):
    assert w.holder.pop(thing) == who and w.at[who] == place
    w.lies[thing] = w.at[who]


@reads("* gave the * to *.")
def gave(w, who, thing, other):
    assert w.holder[thing] == who and w.at[who] == w.at[other]
    w.holder[thing] = other


@reads("* brought the * to * in the *.")
def brought(w, who, thing, other, place):
    joined(w, who, other, place)
    gave(w, who, thing, other)


@reads('* handed * the *. "Thank you, *," said *.')
def handed(w, who, other, thing, thanked, speaker):
    gave(w, who, thing, other)
    _equal((thanked, speaker), (who, other))


@reads("* got the * from *.")
def got(w, who, thing, other):
    gave(w, other, thing, who)


@reads("* bought * _. Now _ had * _.")
def bought(w, who, n, total):
    w.count[who] += NUMBER[n]
    _equal(NUMBER[total], w.count[who])


@reads("* lost * _. Now _ had * _.")
def lost(w, who, n, total):
    w.count[who] -= NUMBER[n]
    _equal(NUMBER[total], w.count[who])


@reads("* counted _ * _.")
def counted(w, who, total):
    _equal(NUMBER[total], w.count[who])


@reads("* shared * _ with *.")
def shared(w, who, n, other):
    assert 0 < NUMBER[n] < w.count[who] and w.at[who] == w.at[other]
    w.count[who] -= NUMBER[n]
    w.count[other] += NUMBER[n]


@reads("_ wanted the *. The _ was in the _.")
@reads('_ asked _, "Where is the *?" "The _ is in the _," said _.')
@reads("_ missed *. _ was in the _.")
@reads("Where was the *? The _ was in the _.", "Where was *? _ was in the _.")
def tell_where(w, name):
    w.answers.append(w.where(name))


@reads('_ wondered who had the *. "I do," said _.', "Who had the *? _ had it.")
def tell_who(w, thing):
    w.answers.append(w.holder[thing])


@reads('_ asked *, "How many _ do you have?" "I have _ _," said _.')
@reads("How many _ did * have? _ had _ _.")
def tell_many(w, who):
    w.answers.append(NUMBERS[w.count[who]].strip())


@reads("One _ _,", "It was a _ _.", "The _ was _ and _.", "It began to _.", "Everyone felt _.")
@reads("A _ _ _ _.", "A _ _ _ _ _.", "A _ _ _ _ _ _.")
def skip(w):
    pass


@reads("* saw a _ _ in the *.", "* stayed in the * and felt _.", "* _ in the * _.")
def here(w, who, place):
    _equal(w.at[who], place)


@reads("* showed * the *.")
def showed(w, who, other, thing):
    assert w.holder[thing] == who and w.at[who] == w.at[other]


def apply_rule(notes: Notes, text: str) -> int:
    """Apply the first rule that matches the beginning of the text; return where the match ends."""
    for regex, function in RULES:
        match = regex.match(text)
        if match:
            function(notes, *match.groups())
            return match.end()
    raise ValueError(f"no rule reads {text!r}")


def read(text: str) -> list[str]:
    """Read a story and answer its questions."""
    notes = Notes()
    actor = ""  # who acted last
    while text:
        first = text.split(" ")[0]
        if first in ("He", "She"):  # the actor is not named again
            _equal(first == "She", " " + actor in GIRLS)
            text = actor + text[len(first) :]
        elif first in notes.at:
            actor = first
        text = text[apply_rule(notes, text) :]
    return notes.answers


@pytest.mark.parametrize(
    ("n_stories", "seed", "split"),
    [(2000, 1, "train"), (1000, 0, "validation"), (500, 0, "heldout")],
)
def test_a_second_reader_gives_the_same_answers(n_stories, seed, split):
    """The program says what is right, but it wrote the stories."""
    for story in make_corpus(n_stories, seed, split, details=True):
        assert read(story.text) == [question.answer for question in story.questions]
        # "He" right behind another name: whom would it mean?
        assert not re.search(r"\b(said|to|with|from|joined) [A-Z]\w+\. (He|She) ", story.text)


# The parts of the program


def test_words_of_one_place_differ_from_the_first_different_letter_on():
    """Otherwise a token could end before the choice is visible."""
    spots = [PLACES, THINGS, NUMBERS, SINGULAR, PLURAL, *FLAVOR.values()]
    spots.append(FLAVOR["motion"] + FLAVOR["action"])
    starts = words("A The It Everyone He She Where Who How")  # other first words of a sentence
    for spot in [*spots, PEOPLE + starts, PEOPLE + words("A There"), words("One It")]:
        assert not [(a, b) for a in spot for b in spot if a != b and b.startswith(a)]
    assert words("in_the_grass nearby") == [" in the grass", " nearby"]


def test_a_table_of_weights_draws_as_its_nats_say():
    """The average of many draws is the entropy of the table."""
    weather = weighted([(1, "rain"), (3, "snow")])
    voice = Voice(random.Random(0))
    snow = sum(voice.weigh(weather) == "snow" for _ in range(20_000)) / 20_000
    assert abs(snow - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 20_000)
    entropy = 0.25 * weather.nats[0] + 0.75 * weather.nats[1]
    assert voice.nats / 20_000 == pytest.approx(entropy, abs=0.02)


def test_the_noun_follows_its_number():
    """One coin, two coins, no coins."""
    world = World(random.Random(0), "train")
    world.actor = " Mia"
    world.noun = " coins"
    for n in (0, 1, 2):
        world.count[" Mia"] = n
        SLOTS["total"](world)
        SLOTS["coin"](world)
    assert "".join(text for _, text in world.pieces) == " no coins one coin two coins"


def test_every_form_of_the_grammar_occurs():
    """A form that never applies would be a mistake in what it needs."""
    counts = Counter()

    class CountingTeller(Teller):
        def sentence(self, table):
            form = super().sentence(table)
            counts[form] += 1
            return form

    rng = random.Random(0)
    for _ in range(2000):
        CountingTeller(rng, "train").tell()
    every_form = [form for table in FORMS.values() for form in table]
    assert set(counts) == set(every_form) and len(every_form) >= 36
    assert min(counts.values()) >= 10
    assert {name for form in every_form for name in form.needs} == set(DRAWS)


def test_spans_cover_the_text_and_prompts_begin_it():
    """Floors by kind of word and questions for models are read from them."""
    for story in make_corpus(2000, seed=1, details=True):
        assert "".join(story.text[start:end] for start, end, _ in story.spans) == story.text
        assert story.questions
        for question in story.questions:
            assert story.text.startswith(f"{question.prompt} {question.answer}")
            assert question.wrong != question.answer


def test_the_seed_and_the_split_decide_the_stories():
    """The same seed gives the same stories, with or without details."""
    plain = list(islice(stories(seed=1), 3))
    detailed = make_corpus(3, seed=1, details=True)
    assert [(s.text, s.nats) for s in plain] == [(s.text, s.nats) for s in detailed]
    first_texts = {next(stories(seed, split)).text for seed in (1, 2) for split in SPLITS}
    assert len(first_texts) == 6


def test_no_validation_story_is_a_training_story():
    """With so many possible stories, none comes twice."""
    train_texts = {story.text for story in make_corpus(20_000, seed=0)}
    valid = make_corpus(1000, seed=0, split="validation")
    assert not [story for story in valid if story.text in train_texts]


def test_the_vocabulary_is_small():
    """A small vocabulary gives each word its own token."""
    corpus = make_corpus(2000, seed=1)
    vocabulary = {word for story in corpus for word in re.findall(r"\w+", story.text.lower())}
    assert 150 <= len(vocabulary) <= 300
