"""The tokenizer, and the ids that the rest of the system needs to know: train, load, save for Hugging Face."""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlm_dist.schema import ConfigError

# The names a role may have where no tokenizer_config.json says: BERT's, then RoBERTa's.
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
REQUIRED = ("pad", "cls", "sep", "mask")
SMALLEST = 256 + len(NAMES)  # every byte, and the special tokens


@dataclass(frozen=True)
class Vocab:
    """A tokenizer with its roles. Ids run from 0 to `size` - 1; `special_ids` are never met in encoded text."""

    tokenizer: Tokenizer
    size: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int | None
    special_ids: tuple[int, ...]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # which the tokenizer forgets when it is pickled

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without [CLS] and [SEP]; a literal "[MASK]" in a text is plain text."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens written out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer and its roles in a canonical form: the same before and after `save`."""
        canonical = {"tokenizer": json.loads(self.tokenizer.to_str()), "roles": self.roles()}
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def reads_like(self, other: "Vocab") -> bool:
        """Whether both make the same ids of any text and give them the same roles; how ids become text may differ."""
        ours, theirs = (json.loads(vocab.tokenizer.to_str()) for vocab in (self, other))
        parts = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        return self.roles() == other.roles() and all(ours[part] == theirs[part] for part in parts)

    def roles(self) -> dict[str, str]:
        """The token of each role, as `{"mask": "[MASK]", ...}`."""
        ids = {"pad": self.pad_id, "unk": self.unk_id, "cls": self.cls_id, "sep": self.sep_id, "mask": self.mask_id}
        return {role: self.tokenizer.id_to_token(i) for role, i in ids.items() if i is not None}

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `transformers.AutoTokenizer` loads offline."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        config |= {f"{role}_token": token for role, token in self.roles().items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def word_starts(self) -> np.ndarray:
        """Bool (V,): True where a token begins a word; the tokens up to the next True belong to the same word.

        WordPiece marks what continues a word ("##"); byte-level BPE ("Ġ") and SentencePiece ("▁") mark the space
        before it. In those two, other white space and punctuation begin a word as well, apostrophes apart, and so does
        each Chinese or Japanese character, as BERT has it. All True where the tokens don't show it.
        """
        model = json.loads(self.tokenizer.to_str())["model"]
        tokens = [self.tokenizer.id_to_token(i) or "" for i in range(self.size)]
        if prefix := model.get("continuing_subword_prefix"):
            starts = [not token.startswith(prefix) for token in tokens]
        elif any(token.startswith("Ġ") for token in tokens):
            starts = [begins_word(as_text(token)) for token in tokens]
        elif any(token.startswith("▁") for token in tokens):
            starts = [begins_word(token.replace("▁", " ")) for token in tokens]
        else:
            starts = [True] * self.size
        mask = np.array(starts, dtype=bool)  # (V,)
        mask[list(self.special_ids)] = True
        return mask

    def token_bytes(self) -> np.ndarray:
        """int64 (V,): the UTF-8 bytes of text that each token stands for; 0 for special ones.

        Those of byte-level BPE and of SentencePiece hold the space before a word, and add up to the text's own bytes
        (SentencePiece puts one space more before a text). WordPiece drops white space, and its tokens add up to the
        text without any; "##" is no text. All of it after the tokenizer's normalizer: lower case, say.
        """
        state = json.loads(self.tokenizer.to_str())
        added = {token["id"] for token in state["added_tokens"]}  # which are kept as they are written
        prefix = state["model"].get("continuing_subword_prefix") or ""
        by_byte = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])
        falls_back = state["model"].get("byte_fallback", False)
        counts = np.zeros(self.size, np.int64)
        for i in range(self.size):
            token = self.tokenizer.id_to_token(i) or ""
            if i in added:
                counts[i] = len(token.encode())
            elif by_byte:
                counts[i] = len(token)  # a character for each byte
            elif falls_back and re.fullmatch("<0x[0-9A-F]{2}>", token):
                counts[i] = 1
            else:
                counts[i] = len(token.removeprefix(prefix).replace("▁", " ").encode())
        counts[list(self.special_ids)] = 0
        return counts


def as_text(token: str) -> str:
    """What a token of byte-level BPE stands for; bytes that make no whole character are left out."""
    codes = bytes_of_characters()
    return bytes(codes[char] for char in token if char in codes).decode("utf-8", "ignore")


@functools.cache
def bytes_of_characters() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for: itself where it's printable; others from U+0100 on.

    After GPT-2's encoder (Radford et al. 2019, https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def begins_word(text: str) -> bool:
    """True where the first character can't stand inside a word: white space, punctuation, or a word of its own."""
    first = text[:1]
    if not first or first == "'":
        return False
    alone = unicodedata.name(first, "").startswith(("CJK UNIFIED", "CJK COMPAT", "HIRAGANA", "KATAKANA"))
    return alone or first.isspace() or unicodedata.category(first)[0] in "PSZC"


def check_size(size: int) -> None:
    """Raises ConfigError for a vocabulary too small to train."""
    if size < SMALLEST:
        raise ConfigError(
            f"a vocabulary of {size} is too small: byte-level BPE needs {SMALLEST} (256 bytes and {len(NAMES)} special "
            "tokens); 8192 or more is usual"
        )


def train(texts: Iterable[str], size: int) -> Vocab:
    """A byte-level BPE of at most `size` tokens: lossless on any text; [PAD] [UNK] [CLS] [SEP] [MASK] are ids 0 to 4.

    Smaller than `size` where the text has too few repeated pairs. Raises ConfigError for a size below 261.
    """
    check_size(size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {role: spellings[0] for role, spellings in NAMES.items()}
    # "The [MASK] is" stands for a word with its space, which byte-level BPE keeps inside the token: hence lstrip.
    special = [AddedToken(name, special=True, normalized=False, lstrip=role == "mask") for role, name in names.items()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return vocab_of(tokenizer, names, "the tokenizer just trained")


def load(path: str | Path) -> Vocab:
    """The tokenizer of a tokenizer.json or of a folder, ours or Hugging Face's, older formats (vocab.txt) included.

    Nothing is fetched from a network and no code of the folder runs. Raises ConfigError where there is none, or where
    it has no mask, cls, sep or pad token.
    """
    path = Path(path)
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if not path.exists():
        raise ConfigError(f"tokenizer {path} doesn't exist; give a tokenizer.json or a folder that holds one")
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        return vocab_of(tokenizer, named_roles(folder), str(path))
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a format's own reader raises
        raise ConfigError(f"{path} has no tokenizer.json and transformers finds no tokenizer in it: {error}") from error
    if not loaded.is_fast:
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, which can't be turned into a tokenizer.json")
    roles = {role: getattr(loaded, f"{role}_token") for role in NAMES}
    return vocab_of(loaded.backend_tokenizer, {role: token for role, token in roles.items() if token}, str(path))


def named_roles(folder: Path) -> dict[str, str]:
    """The tokens that special_tokens_map.json and tokenizer_config.json name for each role, where the files exist."""
    roles: dict[str, str] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.exists():
            try:
                said = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file} is not JSON: {error}") from error
            for role in NAMES:
                token = said.get(f"{role}_token")
                if token is not None:
                    roles[role] = token["content"] if isinstance(token, dict) else token
    return roles


def vocab_of(tokenizer: Tokenizer, roles: dict[str, str], origin: str) -> Vocab:
    """A Vocab over `tokenizer`; a role that `roles` doesn't name is looked for under its usual names."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    ids: dict[str, int] = {}
    for role, usual in NAMES.items():
        found = [vocab[name] for name in ((roles[role],) if role in roles else usual) if name in vocab]
        ids |= {role: found[0]} if found else {}
    missing = [role for role in REQUIRED if role not in ids]
    if missing:
        usual = " or ".join(NAMES[missing[0]])
        raise ConfigError(
            f"{origin} has no {' and no '.join(missing)} token, which masked language modelling needs; "
            f"add it (as {usual}, say) or train one with --tokenizer train:32768"
        )
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} | set(ids.values())
    # A file may have been saved with truncation or padding on; special tokens met in text are text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    if not wraps(tokenizer, ids["cls"], ids["sep"]):
        cls, sep = tokenizer.id_to_token(ids["cls"]), tokenizer.id_to_token(ids["sep"])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, ids["cls"]), (sep, ids["sep"])],
        )
    return Vocab(
        tokenizer=tokenizer,
        size=max(vocab.values()) + 1,
        pad_id=ids["pad"],
        cls_id=ids["cls"],
        sep_id=ids["sep"],
        mask_id=ids["mask"],
        unk_id=ids.get("unk"),
        special_ids=tuple(sorted(special)),
    )


def wraps(tokenizer: Tokenizer, cls_id: int, sep_id: int) -> bool:
    """True where the tokenizer itself puts cls before a text and sep after it."""
    ids = tokenizer.encode("a").ids
    return bool(ids) and ids[0] == cls_id and ids[-1] == sep_id
