"""The tensors of a batch, compared with those that `transformers` builds."""

from itertools import islice, pairwise

import numpy as np
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening

from tinylm.corpus import stories
from tinylm.data import fill_batch


class Documents:
    """Three stories as a token source: each byte is a token."""

    def __init__(self):
        texts = [story.text.encode() for story in islice(stories(0), 3)]
        self.ids = np.concatenate([np.frombuffer(text, np.uint8) for text in texts])
        self.offsets = np.cumsum([0, *map(len, texts)])
        self.meta = {"pad_token_id": 0}


def test_a_row_without_padding_equals_that_of_the_flattening_collator():
    source = Documents()
    borders = source.offsets.tolist()
    pieces = [(a, b - a) for a, b in pairwise(borders)]
    ours = fill_batch(source, [pieces], borders[-1])
    flat = [{"input_ids": source.ids[a : a + n].tolist()} for a, n in pieces]
    theirs = DataCollatorWithFlattening()(flat)
    for name in ("input_ids", "labels", "position_ids"):
        assert_close(ours[name], theirs[name])
    assert ours["document_ids"][0].bincount().tolist() == [n for _, n in pieces]
