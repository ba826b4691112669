"""Is an exported encoder of use? It is fine-tuned on a classification with real labels that needs no download.

    python benchmarks/downstream.py --model EXPORT

The task: which comparison stood in a line of Python? An operator is taken out of the source code of the standard
library, and the code around it says whether it was one of equality (== !=), identity (is, is not), membership (in, not
in) or order (< > <= >=). All files of a package are on one side of the split. Fine-tuning is transformers' own
AutoModelForSequenceClassification, with nothing of this project; beside the export stand the same architecture from
random weights and a bag of words. Each picks its learning rate (or weight decay) on packages held out for it. Prints a
table, and a line of JSON. The encoder must not have been pretrained on the standard library; what it was pretrained on
goes to --pretrained-on, and examples that stand there too are left out.
"""

import argparse
import ast
import hashlib
import json
import platform
import random
import statistics
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    logging,
)

CLASSES = ("equality", "identity", "membership", "order")
OPERATORS: dict[type[ast.cmpop], tuple[str, int]] = {
    ast.Eq: ("==", 0),
    ast.NotEq: ("!=", 0),
    ast.Is: ("is", 1),
    ast.IsNot: ("is not", 1),
    ast.In: ("in", 2),
    ast.NotIn: ("not in", 2),
    ast.Lt: ("<", 3),
    ast.Gt: (">", 3),
    ast.LtE: ("<=", 3),
    ast.GtE: (">=", 3),
}
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3")
BEFORE, AFTER = 400, 200  # characters of code around an operator, more than --tokens take
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3)  # of the bag of words


class Example(NamedTuple):
    before: str
    after: str
    label: int


class Encoded(NamedTuple):
    ids: list[list[int]]
    labels: Tensor  # (N,)


# ---- the task


def comparisons(source: str) -> Iterator[Example]:
    """The comparisons of two operands in a file, in the order of the syntax tree; none where Python can't read it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    if not source.isascii():  # places in the syntax tree count bytes
        return
    starts = list(accumulate((len(line) + 1 for line in source.split("\n")), initial=0))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or len(node.ops) != 1:
            continue
        right = node.comparators[0]
        begin = starts[node.left.end_lineno - 1] + node.left.end_col_offset
        end = starts[right.lineno - 1] + right.col_offset
        text, label = OPERATORS[type(node.ops[0])]
        if source[begin:end].strip() == text:  # without a bracket or a comment between
            yield Example(source[max(0, begin - BEFORE) : begin].rstrip(), source[end : end + AFTER], label)


def files_of(root: Path) -> Iterator[tuple[str, str]]:
    """Top-level package or module, and text, of the Python files below a folder that are not tests."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not set(parts) & set(LEFT_OUT):
            yield parts[0], path.read_bytes().decode(errors="ignore").replace("\r\n", "\n")


def key_of(example: Example) -> str:
    """The same for code that is the same around the operator, but for spaces."""
    return "".join((example.before[-60:] + example.after[:40]).split())


def read_examples(root: Path, pretrained_on: Sequence[Path]) -> dict[str, list[Example]]:
    """Examples by package or module; the same code counts once, and none that stands in the other folders too."""
    seen = {key_of(each) for folder in pretrained_on for _, text in files_of(folder) for each in comparisons(text)}
    found: dict[str, list[Example]] = {}
    for package, text in files_of(root):
        for example in comparisons(text):
            if key_of(example) not in seen:
                seen.add(key_of(example))
                found.setdefault(package, []).append(example)
    return found


def share_of(package: str) -> float:
    """A number in [0, 1) that a package's name alone decides."""
    return int.from_bytes(hashlib.sha256(package.encode()).digest()[:6], "big") / 2**48


def split(found: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """train, valid and test: 60, 15 and 25 % of the packages."""
    sides: dict[str, list[Example]] = {"train": [], "valid": [], "test": []}
    for package, examples in sorted(found.items()):
        share = share_of(package)
        sides["test" if share < 0.25 else "valid" if share < 0.4 else "train"] += examples
    return sides


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """At most `count` examples, as many of each class, in a random order."""
    generator = random.Random(seed)
    drawn = []
    for label in range(len(CLASSES)):
        of_class = [example for example in examples if example.label == label]
        drawn += generator.sample(of_class, min(count // len(CLASSES), len(of_class)))
    generator.shuffle(drawn)
    return drawn


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Encoded:
    """[CLS] code before [MASK] code after [SEP], of at most so many tokens; two thirds of them before."""
    texts = [[each.before for each in examples], [each.after for each in examples]]
    befores, afters = (tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in texts)
    after = (tokens - 3) // 3
    before = tokens - 3 - after
    first, mask, last = tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id
    ids = [[first, *a[-before:], mask, *b[:after], last] for a, b in zip(befores, afters, strict=True)]
    return Encoded(ids, torch.tensor([example.label for example in examples]))


# ---- the systems: each gives the accuracy on `other` after training on `train`


def batch(ids: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids and mask, (B, T)."""
    longest = max(map(len, ids))
    padded = torch.tensor([row + [pad_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return padded, mask


def fine_tune(
    train: Encoded, other: Encoded, seed: int, lr: float, *, folder: Path, pretrained: bool, pad_id: int, epochs: int
) -> float:
    torch.manual_seed(seed)
    model_class = AutoModelForSequenceClassification
    if pretrained:
        model = model_class.from_pretrained(folder, num_labels=len(CLASSES), local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(folder, num_labels=len(CLASSES), local_files_only=True)
        model = model_class.from_config(config)
    rows, generator = 16, torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(train.ids) // rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(10 * (step + 1), steps - step) / steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(train.ids), generator=generator).split(rows):
            ids, mask = batch([train.ids[i] for i in chosen], pad_id)
            logits = model(input_ids=ids, attention_mask=mask).logits
            F.cross_entropy(logits, train.labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for chosen in torch.arange(len(other.ids)).split(64):
            ids, mask = batch([other.ids[i] for i in chosen], pad_id)
            guesses = model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
            right += int((guesses == other.labels[chosen]).sum())
    return right / len(other.ids)


def bag_of_words(train: Encoded, other: Encoded, seed: int, decay: float, *, vocab_size: int) -> float:
    """Logistic regression on the tokens' counts, log(1 + count) x idf, of unit length."""

    def counts(ids: list[list[int]]) -> Tensor:
        return torch.stack([torch.bincount(torch.tensor(row), minlength=vocab_size).float() for row in ids]).log1p()

    ours, theirs = counts(train.ids), counts(other.ids)  # (N, V)
    idf = 1 + ((1 + len(ours)) / (1 + (ours > 0).sum(0))).log()
    ours, theirs = (F.normalize(each * idf, dim=1) for each in (ours, theirs))
    weight, bias = torch.zeros(vocab_size, len(CLASSES)), torch.zeros(len(CLASSES))
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(ours @ weight + bias, train.labels) + decay * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return ((theirs @ weight + bias).argmax(-1) == other.labels).float().mean().item()


# ---- measuring


def measure(
    system: Callable[[Encoded, Encoded, int, float], float],
    settings: Sequence[float],
    data: Callable[[str, int], Encoded],
    seeds: int,
) -> dict[str, object]:
    """Accuracy on the test side for each seed, with the setting that does best on the validation side.

    data: side, seed -> what is drawn from it; another seed draws other examples to train on
    """
    started = time.perf_counter()
    valid = {setting: system(data("train", 0), data("valid", 0), 0, setting) for setting in settings}
    best = max(valid, key=lambda setting: valid[setting])
    accuracies = [system(data("train", seed), data("test", 0), seed, best) for seed in range(seeds)]
    return {
        "accuracy": round(statistics.mean(accuracies), 4),
        "deviation": round(statistics.stdev(accuracies), 4) if seeds > 1 else None,
        "accuracies": [round(accuracy, 4) for accuracy in accuracies],
        "valid": {str(setting): round(accuracy, 4) for setting, accuracy in valid.items()},
        "setting": best,
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an exported folder")
    parser.add_argument(
        "--source", type=Path, default=Path(sysconfig.get_path("stdlib")), help="Python files (default: the library)"
    )
    parser.add_argument(
        "--pretrained-on", type=Path, nargs="*", default=[], help="Python files that the encoder has seen: left out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=2000, help="labelled examples (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="at most (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an example (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is no exported folder: it has no config.json")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    sides = split(read_examples(args.source, args.pretrained_on))
    sizes = {"train": args.train, "valid": args.test // 2, "test": args.test}

    @cache
    def data(side: str, seed: int) -> Encoded:
        return encode(draw(sides[side], sizes[side], seed), tokenizer, args.tokens)

    options = {"folder": args.model, "pad_id": tokenizer.pad_token_id, "epochs": args.epochs}
    systems = {
        "export": (partial(fine_tune, pretrained=True, **options), LEARNING_RATES),
        "random weights": (partial(fine_tune, pretrained=False, **options), LEARNING_RATES),
        "bag of words": (partial(bag_of_words, vocab_size=len(tokenizer)), WEIGHT_DECAYS),
    }
    counts = {side: len(data(side, 0).ids) for side in sizes}
    print(
        f"{counts['train']:,} labelled examples, {counts['test']:,} to test on, of {len(CLASSES)} classes", flush=True
    )
    results = {}
    print("| system | accuracy | deviation over seeds |\n|---|---|---|", flush=True)
    for name, (system, settings) in systems.items():
        results[name] = found = measure(system, settings, data, args.seeds)
        deviation = "" if found["deviation"] is None else f"{100 * found['deviation']:.1f}"
        print(f"| {name} | {100 * found['accuracy']:.1f} % | {deviation} |", flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "downstream", "examples": counts, "systems": results, **versions}))


if __name__ == "__main__":
    sys.exit(main())
