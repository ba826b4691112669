"""The downstream task holds what it says, and an export is set beside its baselines; the figures are another matter."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import downstream
from mlm_dist import export, models, vocab
from mlm_dist.encoder import EncoderConfig
from mlm_dist.models import ModelConfig

ROOT = Path(__file__).parent.parent


def source_of(draw: random.Random, functions: int) -> str:
    """Functions with a comparison of each class, told by what stands around it."""
    lines = []
    for number in range(functions):
        a, b = draw.choices(["alpha", "beta", "gamma", "delta", "count", "name", "item"], k=2)
        said = [f"{a} == '{b}'", f"{a} is not None", f"{a} in ('{b}', {number})", f"len({a}) <= {number}"]
        lines += [f"def f{number}({a}):\n    if {each}:\n        return {a}.{b}\n" for each in said]
    return "\n".join(lines)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Twelve packages of Python, and files that count for nothing."""
    draw, root = random.Random(0), tmp_path / "library"
    for number in range(12):
        (root / f"package{number}").mkdir(parents=True)
        (root / f"package{number}" / "code.py").write_text(source_of(draw, 12))
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "test_code.py").write_text("tested == tester")
    (root / "package0" / "broken.py").write_text("if broken == :")
    (root / "umlaut.py").write_text("'ä' == b")
    return root


def test_downstream_examples_are_comparisons_and_no_package_is_on_two_sides(library: Path, tmp_path: Path) -> None:
    (one,) = downstream.comparisons("\x0cif (a == b) and not c < d < e:\n    pass\r\n")
    assert (one.before, one.after, one.label) == ("\x0cif (a", "b) and not c < d < e:\n    pass\r\n", 0)
    both = list(downstream.comparisons("x = a  not in b\ny = (a) is(b)\nz = a != \\\n b"))
    assert [(each.before[-1], each.after.split()[0], each.label) for each in both] == [("a", "b", 2)]

    found = downstream.read_examples(library, [])
    assert set(found) == {f"package{number}" for number in range(12)}
    sides = downstream.split(found)
    assert sum(map(len, sides.values())) == sum(map(len, found.values())) and all(sides.values())
    keys = {name: {downstream.key_of(each) for each in side} for name, side in sides.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["valid"] and not keys["valid"] & keys["test"]
    drawn = downstream.draw(sides["train"], 40, seed=1)
    assert [sum(each.label == label for each in drawn) for label in range(4)] == [10] * 4
    assert drawn == downstream.draw(sides["train"], 40, seed=1) != downstream.draw(sides["train"], 40, seed=2)
    seen = tmp_path / "seen"
    (seen / "deeper").mkdir(parents=True)
    (seen / "deeper" / "copy.py").write_text((library / "package3" / "code.py").read_text())
    assert set(downstream.read_examples(library, [seen])) == set(found) - {"package3"}


def test_the_downstream_benchmark_sets_an_export_beside_two_baselines(library: Path, tmp_path: Path) -> None:
    tokenizer = vocab.train([source_of(random.Random(1), 50)], 400)
    shape = EncoderConfig(layers=1, width=32, heads=2, mlp_width=32, max_positions=64)
    model = models.build(ModelConfig(encoder=shape), tokenizer.size, 64, tokenizer)
    export.write(tmp_path / "model", model, ModelConfig(encoder=shape), tokenizer, {})
    options = ["--model", tmp_path / "model", "--source", library, "--seeds", 2, "--train", 80, "--test", 40]
    command = [sys.executable, ROOT / "benchmarks" / "downstream.py", *options, "--tokens", 24, "--epochs", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    found = json.loads(line)["systems"]
    assert list(found) == ["export", "random weights", "bag of words"]
    for name, system in found.items():
        assert len(system["accuracies"]) == 2 and 0 <= system["accuracy"] <= 1
        assert f"| {name} | {100 * system['accuracy']:.1f} % | " in "\n".join(table)
    assert found["bag of words"]["accuracy"] > 0.5  # four classes, and words that tell
