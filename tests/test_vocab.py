"""The tokenizer: lossless, blind to special tokens in text, and the same in transformers once it is saved."""

import functools
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from mlm_dist import vocab
from mlm_dist.schema import ConfigError
from mlm_dist.vocab import Vocab

TEXTS = [
    "The quick brown fox jumps over the lazy dog, it isn't here.\n",
    "def f(x_1):\n    return x_1 + 10  # naïve 東京\n",
] * 20
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def trained() -> Vocab:
    return vocab.train(TEXTS, 320)


def word_piece(folder: Path) -> Path:
    """A BERT tokenizer in the old format: vocab.txt, and no tokenizer.json."""
    folder.mkdir()
    words = [*SPECIALS, "the", "fox", "jump", "##s", "##ing", ".", "mask", "[", "]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


def roberta(folder: Path, **names: str) -> Path:
    """A tokenizer with RoBERTa's names, saved with truncation and padding on, roles in special_tokens_map.json."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {token: i for i, token in enumerate([*tokens, "Ġ", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.add_special_tokens(tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({f"{role}_token": name for role, name in names.items()}))
    return folder


# ---- training


def test_special_tokens_come_first_and_training_is_deterministic(trained: Vocab) -> None:
    assert [trained.tokenizer.id_to_token(i) for i in range(5)] == SPECIALS
    assert (trained.pad_id, trained.unk_id, trained.cls_id, trained.sep_id, trained.mask_id) == (0, 1, 2, 3, 4)
    assert trained.special_ids == (0, 1, 2, 3, 4)
    assert trained.size == trained.tokenizer.get_vocab_size() == 320
    assert vocab.train(list(reversed(TEXTS)), 320).fingerprint == trained.fingerprint
    assert vocab.train(TEXTS, 319).fingerprint != trained.fingerprint


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert vocab.train(["ab"], 5000).size == 261


@settings(deadline=None)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    (ids,) = survivor().encode_batch([text])
    assert survivor().decode(ids) == text
    assert not set(ids) & set(survivor().special_ids)


@functools.cache
def survivor() -> Vocab:
    """One tokenizer for all of hypothesis' examples."""
    return vocab.train(TEXTS, 320)


@pytest.mark.parametrize("size", [0, 5, 260])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocabulary of {size} is too small: byte-level BPE needs 261"):
        vocab.train(TEXTS, size)


# ---- special tokens in text


def test_special_tokens_in_text_are_text(trained: Vocab, tmp_path: Path) -> None:
    trained.save(tmp_path / "ours")
    bert, names = vocab.load(word_piece(tmp_path / "bert")), vocab.load(roberta(tmp_path / "roberta"))
    for loaded, text in (
        (trained, " ".join(SPECIALS)),
        (pickle.loads(pickle.dumps(trained)), " ".join(SPECIALS)),
        (vocab.load(tmp_path / "ours"), " ".join(SPECIALS)),
        (names, "<mask> <s> x</s><pad>"),
    ):
        (ids,) = loaded.encode_batch([text])
        assert loaded.decode(ids) == text
        assert not set(ids) & set(loaded.special_ids)
    (ids,) = bert.encode_batch(["the [MASK] fox"])
    assert [bert.tokenizer.id_to_token(i) for i in ids] == ["the", "[", "mask", "]", "fox"]


def test_encoding_adds_nothing_and_cuts_nothing(tmp_path: Path) -> None:
    loaded = vocab.load(roberta(tmp_path / "roberta"))  # whose file pads and truncates to 8
    assert [len(ids) for ids in loaded.encode_batch(["a" * 100, "b"])] == [100, 1]


# ---- saving and loading


def test_saved_and_loaded_it_is_the_same(trained: Vocab, tmp_path: Path) -> None:
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = vocab.load(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
        assert loaded.roles() == trained.roles()


def test_transformers_loads_it_and_fills_masks(trained: Vocab, tmp_path: Path) -> None:
    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.unk_token_id) == (0, 4, 1)
    for text, (ids,) in ((text, trained.encode_batch([text])) for text in TEXTS[:2]):
        assert theirs(text).input_ids == [2, *ids, 3]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert "token_type_ids" not in theirs("a", "b")
    assert theirs("a", "b").input_ids == [2, *trained.encode_batch(["a"])[0], 3, *trained.encode_batch(["b"])[0], 3]
    # the mask takes the space before it, as the word that it stands for does
    the, _, lazy = trained.encode_batch(["The", "", " lazy"])
    assert theirs("The [MASK] lazy").input_ids == [2, *the, 4, *lazy, 3]


def test_a_folder_of_transformers_loads(tmp_path: Path) -> None:
    bert = vocab.load(word_piece(tmp_path / "bert"))
    assert bert.roles() == dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIALS, strict=True))
    assert bert.encode_batch(["The fox jumps."]) == [[5, 6, 7, 8, 10]]
    bert.save(tmp_path / "saved")
    assert vocab.load(tmp_path / "saved").fingerprint == bert.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert theirs("the fox [MASK].").input_ids == [2, 5, 6, 4, 10, 3]


def test_roles_go_by_name_or_by_what_the_folder_says(tmp_path: Path) -> None:
    by_name = vocab.load(roberta(tmp_path / "plain"))
    assert (by_name.cls_id, by_name.pad_id, by_name.sep_id, by_name.mask_id) == (0, 1, 2, 4)
    assert by_name.tokenizer.encode("a").ids[0] == 0 and by_name.tokenizer.encode("a").ids[-1] == 2
    assert vocab.load(roberta(tmp_path / "said", mask="<unk>")).mask_id == 3


def test_a_tokenizer_that_wraps_nothing_is_made_to(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIALS, "a"])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert vocab.load(tmp_path).tokenizer.encode("a a").ids == [2, 5, 5, 3]


@pytest.mark.parametrize(
    ("tokens", "missing"),
    [
        (["[PAD]", "[CLS]", "[SEP]"], "no mask token"),
        (["<mask>", "a"], "no pad and no cls and no sep token"),
        (["a"], "no pad"),
    ],
)
def test_a_tokenizer_without_the_roles_is_refused(tmp_path: Path, tokens: list[str], missing: str) -> None:
    Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ConfigError, match=missing):
        vocab.load(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="doesn't exist"):
        vocab.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="transformers finds no tokenizer in it"):
        vocab.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer\.json"):
        vocab.load(tmp_path)


# ---- words


def words(made: Vocab, text: str) -> list[str]:
    """The text, cut where word_starts says that a word begins."""
    (ids,) = made.encode_batch([text])
    starts = made.word_starts()[ids]
    edges = [0, *(np.flatnonzero(starts[1:]) + 1).tolist(), len(ids)]
    return [made.decode(ids[a:b]) for a, b in itertools.pairwise(edges)]


def test_words_of_byte_level_bpe(trained: Vocab) -> None:
    assert words(trained, "The lazy, lazy dog isn't naïve.\nOver") == [
        "The",
        " lazy",
        ",",
        " lazy",
        " dog",
        " isn't",
        " naïve",
        ".",
        "\nOver",
    ]
    assert words(trained, "x_1(unseen) 10") == ["x", "_1", "(unseen", ")", " 10"]
    starts = trained.word_starts()
    assert starts.shape == (trained.size,) and starts.dtype == bool and starts[:5].all()


def test_words_where_none_are_spaced() -> None:
    """Each Chinese or Japanese character is a word, as in BERT, and so is punctuation of any script."""
    for text, begins in {
        "我们": True, "ひら": True, "カナ": True, "。": True, "«été": True, "…": True, " a": True, "\n": True,
        "_x": True, "été": False, "한국": False, "ไทย": False, "'s": False, "7": False, "": False,
    }.items():  # fmt: skip
        assert vocab.begins_word(text) == begins, text


def test_what_a_token_of_byte_level_bpe_stands_for() -> None:
    text = "".join(map(chr, [*range(0x300), 0x6211, 0x1F600]))
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert vocab.as_text("".join(piece for piece, _ in pieces)) == text
    assert vocab.as_text("æĪ") == "", "two bytes of three"


def test_words_of_word_piece_and_sentence_piece(tmp_path: Path) -> None:
    assert words(vocab.load(word_piece(tmp_path / "bert")), "the fox jumps.") == ["the", "fox", "jumps", "."]
    pieces = [*SPECIALS, "▁the", "▁f", "o", "x", "."]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=1, byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    starts = vocab.load(tmp_path).word_starts()
    assert dict(zip(pieces[5:], starts[5:].tolist(), strict=True)) == {
        "▁the": True,
        "▁f": True,
        "o": False,
        "x": False,
        ".": True,
    }


# ---- bytes


def sentence_piece() -> Vocab:
    """A unigram tokenizer with SentencePiece's space, and bytes for what it doesn't know."""
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁fox", "▁na", "ï", "ve", "s", "\n"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=1, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(pieces[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return vocab.vocab_of(tokenizer, {}, "here")


def counted(known: Vocab, text: str) -> int:
    (ids,) = known.encode_batch([text])
    return int(known.token_bytes()[ids].sum())


@settings(deadline=None)
@given(st.text())
def test_the_bytes_of_byte_level_tokens_add_up_to_the_text(text: str) -> None:
    assert counted(survivor(), text) == len(text.encode())


def test_the_bytes_of_wordpiece_add_up_to_the_text_without_white_space(tmp_path: Path) -> None:
    known = vocab.load(word_piece(tmp_path / "bert"))
    assert counted(known, "The fox  jumps.\n[the] jumping") == len("thefoxjumps.[the]jumping")
    table = {known.tokenizer.id_to_token(i): count for i, count in enumerate(known.token_bytes().tolist())}
    assert (table["##ing"], table["the"], table["[MASK]"], table["[UNK]"]) == (3, 3, 0, 0)


def test_the_bytes_of_sentencepiece_add_up_to_the_text_and_a_space() -> None:
    for text in ("the fox", "the naïve foxs\n", "the 東 fox"):
        assert counted(sentence_piece(), text) == len(f" {text}".encode()), text


def test_added_tokens_count_as_they_are_written(tmp_path: Path) -> None:
    known = vocab.load(roberta(tmp_path / "roberta"))
    known.tokenizer.add_tokens(["東京"])
    known = vocab.vocab_of(known.tokenizer, {}, "here")
    assert counted(known, "a東京 b") == len("a東京 b".encode())
