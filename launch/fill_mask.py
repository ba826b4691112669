"""What an exported model puts in the place of the mask: the likeliest tokens and their probabilities.

    python launch/fill_mask.py --model export/quickstart "The court [MASK] that the law does not [MASK]." [--top 5]

Reads local files alone, weights from safetensors alone, and runs no code from the folder.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import _cli

from mlm_dist.schema import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder that launch/export.py wrote")
    parser.add_argument("--top", type=int, default=5, help="tokens to show for each mask (default: 5)")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text with one mask or more")
    return parser.parse_args()


def load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in fp32, and the tokenizer of a folder. Raises ConfigError where there are none, or damaged ones."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no exported model: it has no config.json; make one with launch/export.py")
    # after the check: they take seconds
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except SafetensorError as error:
        raise ConfigError(f"the weights in {folder} are damaged ({error}); copy them again or export again") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} can't be loaded: {' '.join(str(error).split())}") from error
    return model.eval().requires_grad_(False), tokenizer


def fill(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str, top: int
) -> list[list[tuple[str, float]]]:
    """For each mask in the text, the `top` likeliest tokens with their probabilities, likeliest first.

    Raises ConfigError for a text without a mask, or longer than the model takes.
    """
    encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"]  # (1, T)
    if not (ids == tokenizer.mask_token_id).any():
        raise ConfigError(f"no {tokenizer.mask_token} in {text!r}: put it where a word is to be guessed")
    if ids.shape[1] > tokenizer.model_max_length:
        raise ConfigError(f"{text[:40]!r}... has {ids.shape[1]} tokens; the model takes {tokenizer.model_max_length}")
    logits = model(input_ids=ids, attention_mask=encoded["attention_mask"]).logits[ids == tokenizer.mask_token_id]
    probabilities, tokens = logits.softmax(dim=-1).topk(min(top, logits.shape[-1]))  # (masks, top)
    return [
        [(tokenizer.decode([token]), probability) for token, probability in zip(*guesses, strict=True)]
        for guesses in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]


def main() -> int:
    args = parse()
    if args.top < 1:
        raise ConfigError(f"--top {args.top} shows nothing; the least is 1")
    model, tokenizer = load(args.model)
    for text in args.texts:
        print(text)
        for number, guesses in enumerate(fill(model, tokenizer, text, args.top), start=1):
            print(f"  {tokenizer.mask_token} {number}")
            for token, probability in guesses:
                print(f"    {probability:7.2%}  {token!r}")
    return 0


if __name__ == "__main__":
    _cli.run(main)
