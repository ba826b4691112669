"""Configuration files: what is read, what is refused and in which words, and that what is written reads back."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlm_dist.schema import (
    ConfigError,
    flatten,
    from_mapping,
    help_text,
    load,
    redact,
    setting,
    to_mapping,
    to_yaml,
)


@dataclass(frozen=True)
class Data:
    shards: str
    lanes: int | None = setting(None, low=1)
    packing: Literal["best_fit", "pad"] = "best_fit"
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = setting(1e-3, above=0, help="peak learning rate")
    betas: tuple[float, ...] = setting((0.9, 0.95), low=0, below=1)
    warmup_steps: int = setting(0, low=0)
    fused: bool = False

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError("betas takes two numbers")


@dataclass(frozen=True)
class Probe:
    every_steps: int = 10
    rates: dict[str, float] = setting({"token": 0.15}, high=1)  # noqa: RUF009


@dataclass(frozen=True)
class Config:
    data: Data
    name: str = "run"
    stage: Literal[0, 1, 2] = 1
    from_: str = "here"
    optim: Optim = Optim()
    final: Optim = Optim(name="muon", lr=0.5)
    probe: Probe | None = None
    deepspeed: dict[str, Any] = setting({})  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.stage == 2 and self.optim.name == "lamb":
            raise ConfigError("stage 2 does not go with lamb")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *overrides: str, name: str = "c.yaml") -> Config:
    """Load `text` on top of a base file that gives what is required, on line 1."""
    Path("base.yaml").write_text("data: {shards: S}\n")
    Path(name).write_text("extends: base.yaml\n" + text)
    return load(Config, name, overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what is read


def test_defaults_and_sections(here: Path) -> None:
    assert read("") == Config(data=Data("S"))
    cfg = read("optim:\n  lr: 1e-4\n  fused: true\nfrom: there\nprobe: {every_steps: 3}\n")
    assert cfg.optim == Optim(lr=1e-4, fused=True)
    assert cfg.from_ == "there"
    assert cfg.probe == Probe(every_steps=3)


def test_a_partly_given_section_keeps_its_own_default(here: Path) -> None:
    assert read("final: {warmup_steps: 5}").final == Optim(name="muon", lr=0.5, warmup_steps=5)


def test_empty_sections_are_as_if_not_written(here: Path) -> None:
    assert read("optim:\nfinal:\nprobe:\ndeepspeed:\n") == read("")
    Path("only.yaml").write_text("data:\n")
    with pytest.raises(ConfigError, match=r"^only.yaml: data.shards is missing; it must be text$"):
        load(Config, "only.yaml")


def test_an_empty_section_leaves_the_parent_alone_and_null_takes_it_back(here: Path) -> None:
    Path("base.yaml").write_text("data: {shards: S}\nprobe: {every_steps: 3}\n")
    for text, expected in (("probe:\n", Probe(3)), ("probe: {}\n", Probe(3)), ("probe: null\n", None)):
        Path("c.yaml").write_text("extends: base.yaml\n" + text)
        assert load(Config, "c.yaml").probe == expected
    assert load(Config, "base.yaml", ["probe=null"]).probe is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1e5", 1e5),
        ("3E8", 3e8),
        ("2", 2.0),
        ("5.", 5.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
    ],
)
def test_floats_as_people_write_them(here: Path, text: str, number: float) -> None:
    for cfg in (read(f"optim: {{lr: {text}}}"), read("", f"optim.lr={text}")):
        assert cfg.optim.lr == number
        assert type(cfg.optim.lr) is float


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("1_000_000", 10**6), ("1e9", 10**9), ("1.5e3", 1500), ("1E23", 10**23), ("+3", 3), ("0", 0)],
)
def test_ints_as_people_write_them(here: Path, text: str, number: int) -> None:
    steps = read(f"optim: {{warmup_steps: {text}}}").optim.warmup_steps
    assert steps == number
    assert type(steps) is int


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "y", "12:30", "010", "0o17", "0x1F", "2024-01-01", "1__0", "="]
)
def test_text_that_yaml_1_1_would_turn_into_something_else(here: Path, text: str) -> None:
    cfg = read(f"name: {text}\ndeepspeed: {{{text}: {text}}}")
    assert cfg.name == text
    assert cfg.deepspeed == {text: text}


def test_mappings_merge_by_key_and_lists_replace(here: Path) -> None:
    Path("a.yaml").write_text(
        "data: {shards: S, names: [x, y]}\noptim: {lr: 1, fused: true}\ndeepspeed: {z: {a: 1, b: [1, 2]}}"
    )
    Path("b.yaml").write_text("extends: a.yaml\noptim: {lr: 2}\ndeepspeed: {z: {b: [3], c: null}}")
    Path("c.yaml").write_text("extends: b.yaml\ndata: {names: [z]}\n")
    cfg = load(Config, "c.yaml", ["deepspeed.z.a=5", "deepspeed.w=no", "optim.betas=[0.1, 0.2]"])
    assert cfg.optim == Optim(lr=2.0, fused=True, betas=(0.1, 0.2))
    assert cfg.data == Data("S", names=("z",))
    assert cfg.deepspeed == {"z": {"a": 5, "b": [3], "c": None}, "w": "no"}


def test_a_mapping_that_is_given_replaces_the_default(here: Path) -> None:
    assert read("probe: {rates: {span: 0.3}}").probe == Probe(rates={"span": 0.3})
    assert read("probe: {every_steps: 1}").probe == Probe(every_steps=1, rates={"token": 0.15})


def test_extends_is_relative_to_the_file(here: Path) -> None:
    (here / "sub").mkdir()
    Path("base.yaml").write_text("data: {shards: S}\n")
    Path("sub/c.yaml").write_text("extends: ../base.yaml\n")
    assert load(Config, "sub/c.yaml") == Config(data=Data("S"))
    assert load(Config, here / "sub" / "c.yaml") == Config(data=Data("S"))


def test_overrides(here: Path) -> None:
    cfg = read("name: a", "name= b = c ", "optim={lr: 2, fused: true}", " data . lanes =4", "final.lr=3", "optim.lr=5")
    assert (cfg.name, cfg.data.lanes, cfg.final.lr) == ("b = c", 4, 3.0)
    assert cfg.optim == Optim(lr=5.0, fused=True)


def test_a_byte_order_mark_is_no_text(here: Path) -> None:
    Path("c.yaml").write_text("\ufeffdata: {shards: é}\n", encoding="utf-8")
    assert load(Config, "c.yaml").data.shards == "é"


def test_defaults_that_are_mappings_are_not_shared() -> None:
    first, second = Config(Data("S")), Config(Data("S"))
    first.deepspeed["a"] = 1
    assert second.deepspeed == {}


# ---- what is refused, and in which words

LINE2 = "c.yaml:2: "  # `read` puts the text from line 2 on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {warmup_step: 3}", "optim.warmup_step is no setting; did you mean optim.warmup_steps?"),
        ("optm: {lr: 3}", "optm is no setting; did you mean optim?"),
        ("warmup_steps: 3", "warmup_steps is no setting; did you mean optim.warmup_steps or final.warmup_steps?"),
        ("data: {qqq: 3}", "data.qqq is no setting; data has shards, lanes, packing, names"),
        (
            "optim.lr: 3",
            "optim.lr is no setting; dots are for overrides: in a file, write each part as a section of its own",
        ),
        ("from_: there", "from_ is no setting; did you mean from?"),
        ("<<: {a: 1}", "merge keys (<<) are not used here; put what is shared in an `extends:` file"),
        ("optim: {warmup_steps: 12.0}", "optim.warmup_steps must be a whole number (at least 0), got 12.0"),
        ("optim: {warmup_steps: 1.5e0}", "optim.warmup_steps must be a whole number (at least 0), got 1.5e0"),
        ("optim: {warmup_steps: true}", "optim.warmup_steps must be a whole number (at least 0), got true"),
        ("optim: {warmup_steps: null}", "optim.warmup_steps must be a whole number (at least 0), got null"),
        ("optim: {warmup_steps: }", "optim.warmup_steps must be a whole number (at least 0), got nothing"),
        ("optim: {warmup_steps: -1}", "optim.warmup_steps must be a whole number (at least 0), got -1"),
        (
            "optim: {warmup_steps: 010}",
            "optim.warmup_steps must be a whole number (at least 0), got the text '010'; "
            "write a plain number such as 1000, 1_000 or 1e3",
        ),
        (
            "optim: {lr: '1e-4'}",
            "optim.lr must be a finite number (above 0), got the text '1e-4'; "
            "write a plain number such as 0.001 or 1e-3",
        ),
        ("optim: {lr: 0}", "optim.lr must be a finite number (above 0), got 0"),
        ("optim: {lr: .nan}", "optim.lr must be a finite number (above 0), got .nan"),
        ("optim: {lr: .inf}", "optim.lr must be a finite number (above 0), got .inf"),
        ("optim: {lr: 1e999}", "optim.lr must be a finite number (above 0), got 1e999"),
        ("optim: {lr: false}", "optim.lr must be a finite number (above 0), got false"),
        ("optim: {lr: [1]}", "optim.lr must be a finite number (above 0), got a list"),
        ("optim: {lr: {a: 1}}", "optim.lr must be a finite number (above 0), got a mapping"),
        ("deepspeed: {a: [{b: .inf}]}", "deepspeed.a[0].b must be a finite number, got .inf"),
        ("optim: {betas: [0.9, 1]}", "optim.betas[1] must be a finite number (at least 0 and below 1), got 1"),
        ("optim: {betas: 0.9}", "optim.betas must be a list, got 0.9; write [0.9]"),
        ("data: {names: a.tar}", "data.names must be a list, got the text 'a.tar'; write [a.tar]"),
        ("probe: {rates: {span: 2}}", "probe.rates.span must be a finite number (at most 1), got 2"),
        ("probe: {rates: [2]}", "probe.rates must be a mapping, got a list"),
        ("probe: 3", "probe must be a section with keys among every_steps, rates or null, got 3"),
        ("probe: lr:1", "probe must be a section with keys among every_steps, rates or null, got the text 'lr:1'"),
        (
            "probe: {every_steps: no}",
            "probe.every_steps must be a whole number, got the text 'no'; "
            "write a plain number such as 1000, 1_000 or 1e3",
        ),
        ("optim: [1]", "optim must be a section with keys among name, lr, betas, warmup_steps, fused, got a list"),
        ("optim: null", "optim must be a section with keys among name, lr, betas, warmup_steps, fused, got null"),
        ("optim: {fused: no}", "optim.fused must be true or false, got the text 'no'"),
        ("optim: {fused: 1}", "optim.fused must be true or false, got 1"),
        ("name: 12", "name must be text, got 12; put it in quotes"),
        ("name: 1e3", "name must be text, got 1e3; put it in quotes"),
        ("name: true", "name must be text, got true; put it in quotes"),
        ("name: null", "name must be text, got null"),
        ("name: [a]", "name must be text, got a list"),
        ("data: {lanes: 0}", "data.lanes must be a whole number (at least 1) or null, got 0"),
        ("data: {packing: padd}", "data.packing must be one of best_fit, pad, got the text 'padd'; did you mean pad?"),
        ("stage: 3", "stage must be one of 0, 1, 2, got 3"),
        ("stage: true", "stage must be one of 0, 1, 2, got true"),
        ("stage: '2'", "stage must be one of 0, 1, 2, got the text '2'; did you mean 2?"),
        ("stage: 1.0", "stage must be one of 0, 1, 2, got 1.0"),
        ("1: x", "a key must be text, got '1'; put it in quotes"),
        ("null: x", "a key must be text, got 'null'; put it in quotes"),
        ("[a]: x", "a key must be text, got a list or mapping; put it in quotes"),
        ("optim: {betas: [0.5]}", "optim: betas takes two numbers"),
    ],
)
def test_refused_values(here: Path, text: str, message: str) -> None:
    assert refusal(text) == LINE2 + message


def test_the_line_is_that_of_the_key(here: Path) -> None:
    text = "optim:\n  # a comment\n  fused: true\n  lr:\n    -3\n"
    assert refusal(text) == "c.yaml:5: optim.lr must be a finite number (above 0), got -3"


def test_a_parents_mistake_is_named_in_the_parent(here: Path) -> None:
    Path("p.yaml").write_text("data: {shards: S}\n\noptim: {lr: x}\n")
    Path("c.yaml").write_text("extends: p.yaml\noptim: {fused: true}\n")
    with pytest.raises(ConfigError, match=r"^p.yaml:3: optim.lr must be"):
        load(Config, "c.yaml")


def test_refused_overrides(here: Path) -> None:
    cases = {
        "optim.lrr=3": "optim.lrr is no setting; did you mean optim.lr?",
        "optim.name=adam": "optim.name must be one of adamw, lamb, muon, got the text 'adam'; did you mean adamw?",
        "optim.lr.x=3": "optim.lr must be a finite number (above 0), got a mapping",
        "name=": "name must be text, got nothing",
        "deepspeed=3": "deepspeed must be a mapping, got 3",
        "optim.betas=[0.5]": "optim: betas takes two numbers",
        "extends=x.yaml": "extends is no setting; "
        "the top level has data, name, stage, from, optim, final, probe, deepspeed",
        "name": "an override is written section.key=value",
        "=3": "an override is written section.key=value",
        "optim..lr=3": "an override is written section.key=value",
        "optim={lr: 1, lr: 2}": "lr is given twice; keep one of them",
        "name=*x": "this cannot be read as YAML: anchors and aliases (&name, *name) are not used here; "
        "put what is shared in an `extends:` file",
        "optim.betas=[1": "this cannot be read as YAML: while parsing a flow sequence, "
        "expected ',' or ']', but got '<stream end>'",
        "name=\x07": "the character '\\x07' is not allowed",
    }
    for text, message in cases.items():
        assert refusal("", text) == f"override '{text}': {message}"


def test_the_same_override_twice(here: Path) -> None:
    message = "override 'optim. lr=2': optim.lr is already set by override 'optim.lr=1'; keep one of them"
    assert refusal("", "optim.lr=1", "optim. lr=2") == message


def test_repeated_keys_name_both_lines(here: Path) -> None:
    assert (
        refusal("name: a\nstage: 1\nname: a\n") == "c.yaml:4: name is given twice, on lines 2 and 4; keep one of them"
    )
    nested = "deepspeed:\n  x: [{q: {a: 1,\n    'a': 2}}]\n"
    assert refusal(nested) == "c.yaml:4: deepspeed.x.q.a is given twice, on lines 3 and 4; keep one of them"


def test_yaml_that_cannot_be_read(here: Path) -> None:
    start = "this cannot be read as YAML: "
    tab = "while scanning for the next token, found character '\\t' that cannot start any token"
    assert refusal("optim:\n\tlr: 1\n") == f"c.yaml:3:1: {start}{tab}; indent with spaces, not tabs"
    assert refusal("name: [a\n").startswith(f"c.yaml:3:1: {start}while parsing a flow sequence, expected")
    assert refusal("name: a\n---\nname: b\n").startswith(f"c.yaml:3:1: {start}expected a single document")
    assert refusal("name: a\x00\n") == "c.yaml:2: the character '\\x00' is not allowed"
    assert refusal("name: &x a\n").startswith(f"c.yaml:2:7: {start}anchors and aliases")
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^latin.yaml cannot be read: it is not UTF-8 text$"):
        load(Config, "latin.yaml")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch hacked]", "!!str x", "!mine x", "! x", "!!set {a}"]
)
def test_tags_are_refused_and_run_nothing(here: Path, tag: str) -> None:
    assert "is not allowed; write a plain value" in refusal(f"name: {tag}\n")
    assert "is not allowed; write a plain value" in refusal("", f"name={tag}")
    assert not Path("hacked").exists()


@pytest.mark.parametrize(("text", "got"), [("- a\n", "a list"), ("lr:1\n", "the text 'lr:1'"), ("3\n", "3")])
def test_a_file_that_is_no_mapping(here: Path, text: str, got: str) -> None:
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Config, "c.yaml")
    assert str(caught.value) == f"c.yaml:1: a config is a mapping, made of lines such as 'key: value'; got {got}"


def test_missing_files_name_the_nearest(here: Path) -> None:
    Path("big.yaml").write_text("extends: bse.yaml\n")
    Path("base.yaml").write_text("")
    (here / "empty").mkdir()
    cases = {
        "bas.yaml": "there is no file bas.yaml; did you mean base.yaml?",
        "zzzzzzzz": "there is no file zzzzzzzz; . has base.yaml, big.yaml",
        "empty/c.yaml": "there is no file empty/c.yaml; empty has no .yaml file",
        "none/c.yaml": "there is no folder none to find c.yaml in",
        "big.yaml": "big.yaml:1: extends: there is no file bse.yaml; did you mean base.yaml?",
        "empty": "empty cannot be read: Is a directory",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            load(Config, path)
        assert str(caught.value) == message


def test_extends_that_cannot_stand(here: Path) -> None:
    for name, parent in (("a", "b.yaml"), ("b", "./a.yaml"), ("two", "[a.yaml, b.yaml]"), ("self", "self.yaml")):
        Path(f"{name}.yaml").write_text(f"extends: {parent}\n")
    cases = {
        "a.yaml": "b.yaml:1: extends: the files extend one another in a circle: a.yaml -> b.yaml -> a.yaml",
        "self.yaml": "self.yaml:1: extends: the files extend one another in a circle: self.yaml -> self.yaml",
        "two.yaml": "two.yaml:1: extends must name one file, relative to this one; got a list",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            load(Config, path)
        assert str(caught.value) == message


def test_checks_of_a_dataclass_say_where(here: Path) -> None:
    assert refusal("stage: 2\noptim: {name: lamb}\n") == "c.yaml: stage 2 does not go with lamb"
    assert refusal("stage: 2\n", "optim.name=lamb") == "c.yaml: stage 2 does not go with lamb"
    assert refusal("optim:\n  betas: [0.1]\n", "optim.lr=2") == "override 'optim.lr=2': optim: betas takes two numbers"


def test_the_first_mistake_wins_whatever_the_order(here: Path) -> None:
    assert "optim.lr" in refusal("optim: {betas: x, lr: x}")
    assert "optim.lr" in refusal("optim: {lr: x, betas: x}")


# ---- mappings of sections


@dataclass(frozen=True)
class Part:
    path: str
    share: float = setting(1.0, above=0, help="of all")


@dataclass(frozen=True)
class Whole:
    parts: dict[str, Part] = setting({"a": Part("A")})  # noqa: RUF009
    others: dict[str, Part] | None = None


def test_a_mapping_of_sections_is_read_merged_and_written_back(here: Path) -> None:
    Path("p.yaml").write_text("others:\n  x: {path: X, share: 0.5}\n  y: {path: Y}\n")
    Path("c.yaml").write_text("extends: p.yaml\nothers: {y: {share: 2}, z: {path: Z}}\n")
    whole = load(Whole, "c.yaml", ["others.x.share=1e-1", "others.w={path: W}"])
    assert whole.others == {"x": Part("X", 0.1), "y": Part("Y", 2.0), "z": Part("Z"), "w": Part("W")}
    assert whole.parts == {"a": Part("A")}
    Path("again.yaml").write_text(to_yaml(whole))
    assert load(Whole, "again.yaml") == whole == from_mapping(Whole, to_mapping(whole))
    assert flatten(to_mapping(whole))["others.x.share"] == 0.1
    assert load(Whole, "again.yaml", ["others=null"]).others is None


def test_a_mapping_of_sections_is_as_strict_as_a_section(here: Path) -> None:
    Path("c.yaml").write_text("others: {x: {path: X}}\n")
    cases = {
        "others.x.shre=1": "others.x.shre is no setting; did you mean others.x.share?",
        "others.x.share=0": "others.x.share must be a finite number (above 0), got 0",
        "others.y.share=1": "others.y.path is missing; it must be text",
        "others.y=": "others.y must be a section with keys among path, share, got nothing",
        "others=[x]": "others must be a mapping of sections or null, got a list",
        "parts=null": "parts must be a mapping of sections, got null",
    }
    for text, message in cases.items():
        with pytest.raises(ConfigError) as caught:
            load(Whole, "c.yaml", [text])
        assert message in str(caught.value), str(caught.value)
    assert load(Whole, "c.yaml", ["others.y.path=Y", "others.x=null"]).others == {"y": Part("Y")}


def test_help_names_the_keys_of_a_mapping_of_sections() -> None:
    squeezed = [" ".join(line.split()) for line in help_text(Whole).splitlines()]
    assert "others.NAME.path str, required" in squeezed
    assert "others.NAME.share float (above 0) = 1.0 # of all" in squeezed


# ---- what is written reads back

text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("0123456789eE+-._:nayosfx~<= '\"#&*!,[]{}\n\t", max_size=8),
    st.sampled_from(
        [
            "1e-4",
            "1e5",
            "no",
            "Yes",
            "12:30",
            "010",
            "0o17",
            "",
            "~",
            "null",
            "true",
            ".inf",
            "<<",
            "a: b",
            "2024-01-01",
        ]
    ),
)
finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**50), 10**50), finite, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
share = st.floats(0, 1, exclude_max=True)
optims = st.builds(
    Optim,
    name=st.sampled_from(["adamw", "muon"]),
    lr=positive,
    betas=st.tuples(share, share),
    warmup_steps=st.integers(0, 10**30),
    fused=st.booleans(),
)
probes = st.builds(Probe, st.integers(), st.dictionaries(text, st.floats(-1e300, 1), max_size=3))
configs = st.builds(
    Config,
    data=st.builds(Data, text, st.none() | st.integers(1), st.just("pad"), st.lists(text, max_size=3).map(tuple)),
    name=text,
    stage=st.sampled_from([0, 1, 2]),
    from_=text,
    optim=optims,
    final=optims,
    probe=st.none() | probes,
    deepspeed=st.dictionaries(text, plain, max_size=4),
)


@settings(deadline=None)
@given(configs)
@example(Config(Data("a\x85b"), deepspeed={"\u2028": "c\n \u2029"}))
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> None:
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(to_yaml(cfg), encoding="utf-8", newline="")
    again = load(Config, path)
    assert repr(again) == repr(cfg)  # repr also tells 1 from 1.0 and 0.0 from -0.0
    assert repr(from_mapping(Config, to_mapping(cfg))) == repr(cfg)


@settings(deadline=None)
@given(plain, text)
def test_a_yaml_1_1_reader_agrees(value: Any, key: str) -> None:
    mapping = {key: value}
    assert yaml.safe_load(to_yaml(Config(Data("S"), deepspeed=mapping)))["deepspeed"] == mapping


def test_yaml_is_plain_to_read() -> None:
    cfg = Config(
        Data("S", names=("b", "no")), name="1e-4", optim=Optim(lr=1e-5), deepspeed={"a": {"b": ["é " * 60 + "."]}}
    )
    expected = """\
data:
  shards: S
  lanes: null
  packing: best_fit
  names: [b, 'no']
name: '1e-4'
stage: 1
from: here
optim:
  name: adamw
  lr: 1.0e-05
  betas: [0.9, 0.95]
  warmup_steps: 0
  fused: false
final:
  name: muon
  lr: 0.5
  betas: [0.9, 0.95]
  warmup_steps: 0
  fused: false
probe: null
deepspeed:
  a:
    b: [LONG]
"""
    assert to_yaml(cfg) == expected.replace("LONG", "é " * 60 + ".")


def test_from_mapping_is_as_strict() -> None:
    with pytest.raises(ConfigError, match=r"^mapping: data.shard is no setting; did you mean data.shards\?$"):
        from_mapping(Config, {"data": {"shard": "S"}})
    with pytest.raises(
        ConfigError, match=r"^stored: data.lanes must be a whole number \(at least 1\) or null, got true$"
    ):
        from_mapping(Config, {"data": {"shards": "S", "lanes": True}}, source="stored")
    with pytest.raises(ConfigError, match=r"^mapping: optim.lr must be a finite number \(above 0\), got Infinity$"):
        from_mapping(Config, {"data": {"shards": "S"}, "optim": {"lr": math.inf}})
    with pytest.raises(ConfigError, match=r"^mapping: data.shards holds a PosixPath"):
        from_mapping(Config, {"data": {"shards": Path("S")}})
    with pytest.raises(ConfigError, match=r"^mapping: a key must be text, got 1 in deepspeed$"):
        from_mapping(Config, {"data": {"shards": "S"}, "deepspeed": {1: 2}})


# ---- views


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1]}, "e": {}, "f": None}) == {"a.b.c": 1, "a.d": [1], "e": {}, "f": None}


def test_help_text_lists_every_key() -> None:
    lines = help_text(Config).splitlines()
    assert {line.split()[0] for line in lines} >= flatten(to_mapping(Config(Data("S")))).keys()
    squeezed = [" ".join(line.split()) for line in lines]
    assert "data.shards str, required" in squeezed
    assert "data.lanes int | null (at least 1) = null" in squeezed
    assert "optim.lr float (above 0) = 0.001 # peak learning rate" in squeezed
    assert "optim.betas list of float (at least 0 and below 1) = [0.9, 0.95]" in squeezed
    assert "stage 0 | 1 | 2 = 1" in squeezed
    assert 'final.name adamw | lamb | muon = "muon"' in squeezed
    assert "probe section | null = null" in squeezed
    assert 'probe.rates mapping of float (at most 1) = {"token": 0.15}' in squeezed
    assert "deepspeed mapping = {}" in squeezed


def test_secrets_are_not_logged() -> None:
    flat = {"optim.lr": 1.0, "deepspeed.api_key": "x", "model.options.password": "y", "data.shards": "z"}
    shown = redact(flat)
    assert shown == flat | {"deepspeed.api_key": "[redacted]", "model.options.password": "[redacted]"}
