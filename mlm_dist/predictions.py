"""What the model puts in the place of masks in a few held-out texts: the same texts at every evaluation.

They come from the rows whose hash with the seed is lowest, so that they depend neither on the number of ranks nor on
the size of a batch. They are picked while the held-out rows pass by: the model does not run once more for them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mlm_dist.masking import IGNORED_LABEL
from mlm_dist.packing import hashed
from mlm_dist.stream import Batch
from mlm_dist.vocab import Vocab
from mlm_dist.world import World

FILE = "predictions.jsonl"
LONGEST = 64  # tokens of a text; of a longer one those around a mask
GUESSES = 3

# {"text": the text as the model saw it, "masks": [{"truth": token, "guesses": [[token, probability], ...]}, ...]}: the
# masks in the order in which they stand in the text, the guesses likeliest first. Targets that the frozen masks show as
# a random token, or as they are, stand in the text and are no mask.
Sentence = dict[str, Any]


class Picker:
    """Picks the texts on this rank, from the batches of one evaluation.

    count: texts over all ranks
    seed:  of the choice
    """

    def __init__(self, vocab: Vocab, count: int, seed: int) -> None:
        self.vocab, self.count, self.seed = vocab, count, seed
        self.picked: list[tuple[int, Sentence]] = []  # by hash, at most `count`

    def look(self, batch: Batch, seen: Mapping[str, Tensor]) -> None:
        """Take what is to be kept of a batch. seen: the pass over it, as `engine.held_out_pass` gives it.

        Waits for the device where a row is taken, which is rare after the first batches.
        """
        if not self.count:
            return
        keys = hashed(self.seed, batch.row_keys.numpy().view(np.uint64)).tolist()  # (B,)
        for row, source in enumerate(batch.sources.tolist()):
            full = len(self.picked) == self.count
            if source < 0 or (full and keys[row] > self.picked[-1][0]):
                continue
            sentence = sentence_of(self.vocab, row, batch, seen, keys[row])
            if sentence is not None:
                self.picked = sorted([*self.picked, (keys[row], sentence)], key=by_key)[: self.count]

    def sentences(self, world: World) -> list[Sentence]:
        """The texts of all ranks, the same on each. All ranks call it."""
        every = [each for part in world.gather(self.picked) for each in part]
        return [sentence for _, sentence in sorted(every, key=by_key)[: self.count]]

    def record(self, world: World, folder: Path, step: int, tokens: int) -> list[Sentence]:
        """Write the texts of all ranks to RUN/predictions.jsonl, a line for each. Returns them. All ranks call it."""
        sentences = self.sentences(world)
        if world.is_main and sentences:
            with open(folder / FILE, "a", encoding="utf-8") as file:
                for sentence in sentences:
                    file.write(json.dumps({"step": step, "tokens": tokens, **sentence}, ensure_ascii=False) + "\n")
        return sentences


def by_key(each: tuple[int, Sentence]) -> int:
    return each[0]


def sentence_of(vocab: Vocab, row: int, batch: Batch, seen: Mapping[str, Tensor], key: int) -> Sentence | None:
    """A text of one row, around that of its masks which the key chooses; None where it has none."""
    labels, positions, ids = (seen[name][row] for name in ("labels", "positions", "shown"))  # (K,), (K,), (T,)
    by_mask = (labels != IGNORED_LABEL) & (ids[positions] == vocab.mask_id)  # (K,)
    logits = seen["logits"].view(*seen["labels"].shape, -1)[row, by_mask, : vocab.size]  # a model's may be padded
    if not len(logits):
        return None
    chances, guesses = logits.float().softmax(dim=-1).topk(min(GUESSES, vocab.size))  # (masks, GUESSES)
    masks = dict(
        zip(
            positions[by_mask].tolist(),
            zip(labels[by_mask].tolist(), guesses.tolist(), chances.tolist(), strict=True),
            strict=True,
        )
    )
    first, last, is_cut = window(batch.segments[row], sorted(masks)[key % len(masks)])
    inside = {position - first: masks[position] for position in sorted(masks) if first <= position < last}
    text = text_of(vocab, ids[first:last].tolist(), {place: truth for place, (truth, _, _) in inside.items()})
    return {
        "text": f"{'…' * is_cut[0]}{text}{'…' * is_cut[1]}",
        "masks": [
            {
                "truth": token_of(vocab, truth),
                "guesses": [[token_of(vocab, i), round(p, 6)] for i, p in zip(tokens, each, strict=True)],
            }
            for truth, tokens, each in inside.values()
        ],
    }


def window(segments: Tensor, middle: int) -> tuple[int, int, tuple[bool, bool]]:
    """The piece of a document that holds a position, at most LONGEST tokens of it, without [CLS] and [SEP].

    segments: (T,) of the row. Returns its first position, the one behind its last, and whether it is cut before, after.
    """
    own = (segments == segments[middle]).nonzero().flatten().tolist()
    begin, end = own[1], own[-1]
    first = max(begin, min(middle - LONGEST // 2, end - LONGEST))
    last = min(end, first + LONGEST)
    return first, last, (first > begin, last < end)


def text_of(vocab: Vocab, ids: Sequence[int], truths: Mapping[int, int]) -> str:
    """Token ids as text. truths: what stands behind each mask, by its place among the ids.

    A token may hold the space before its word; a mask in its place gets that space.
    """
    spaced = []
    for place, token in enumerate(ids):
        if place in truths:
            marker = vocab.tokenizer.id_to_token(truths[place])[:1]
            space = vocab.tokenizer.token_to_id(marker) if marker in ("Ġ", "▁") else None
            spaced += [] if space is None else [space]
        spaced.append(token)
    return vocab.decode(spaced).strip("\ufffd")  # of a character whose other bytes are outside


def token_of(vocab: Vocab, token: int) -> str:
    """A token as text, or as the tokenizer writes it where it is no whole text: a part of a character."""
    text = vocab.decode([token])
    return text if text and "\ufffd" not in text else vocab.tokenizer.id_to_token(token)
