"""Builds in parts and builds that are killed: the bytes of one build that nothing disturbed, or refusals."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlm_dist import vocab
from mlm_dist.manifest import load_manifest
from shards import build, files, parts, runs, stages, texts, workplace

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "launch" / "slurm" / "build.sbatch"
WORDS = ["shard", "token", "lane", "row", "mask", "naïve", "東京", "window", "epoch", "rank", "\n"]


def prose(count: int, seed: int = 0) -> list[str]:
    """Documents that are all different."""
    rng = np.random.default_rng(seed)
    return [f"{seed}/{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(20, 200))) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab.train(prose(50), 400).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some files of several kinds, with documents that are there twice and a file that isn't UTF-8."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(5):
        said = prose(120, seed=number) + prose(20, seed=99)
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    (folder / "page.html").write_text(f"<p>{prose(1, seed=50)[0]}</p>")
    (folder / "bad.txt").write_bytes(b"caf\xe9 " * 20)
    (folder / "long.txt").write_text("\n".join(prose(40, seed=51)))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, batches and pieces of a few kilobytes, so that there are many."""
    monkeypatch.setattr(stages, "RUN_BYTES", 40_000)
    monkeypatch.setattr(texts, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(files, "PIECE_BYTES", 30_000)


def command(out: Path, *flags: object, tokenizer: object = None, inputs: object = None) -> list[str]:
    said = ["--out", out, "--workers", "1", "--shard-tokens", "1000", "--valid-fraction", "0.1"]
    said += ["--input", *(inputs if isinstance(inputs, list) else [inputs])] if inputs else []
    said += ["--tokenizer", tokenizer] if tokenizer else []
    return [str(part) for part in (*said, *flags)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: str) -> dict[str, bytes]:
    """What one build that nothing disturbs makes."""
    out = tmp_path_factory.mktemp("single") / "out"
    assert build.main(command(out, tokenizer=tokenizer, inputs=corpus)) == 0
    return contents(out)


def make_parts(out: Path, corpus: object, tokenizer: object, count: int, *flags: object) -> None:
    for number in range(count, 0, -1):
        part = ("--part", f"{number}/{count}", *flags)
        assert build.main(command(out, *part, tokenizer=tokenizer, inputs=corpus)) == 0


# ---- parts


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_parts_merge_into_the_bytes_of_a_single_build(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], count: int
) -> None:
    out = tmp_path / "out"
    shuffled = sorted(corpus.iterdir(), reverse=True)
    make_parts(out, shuffled if count == 2 else corpus, tokenizer, count, "--workers", count % 2 + 1)
    assert not (out / "train").exists()
    assert build.main(command(out, "--merge", "--workers", "2")) == 0
    assert contents(out) == single
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer", "train", "valid"]


def test_parts_with_held_out_inputs(tmp_path: Path, corpus: Path, tokenizer: str) -> None:
    inputs = [corpus / "0.jsonl", corpus / "long.txt"]
    held = ["--input", *inputs, "--valid-input", corpus / "1.jsonl", corpus / "page.html"]
    args = [str(part) for part in ("--tokenizer", tokenizer, "--workers", 1, "--shard-tokens", 1000, *held)]
    assert build.main([*args, "--out", str(tmp_path / "one")]) == 0
    for part in ("1/2", "2/2"):
        assert build.main([*args, "--out", str(tmp_path / "two"), "--part", part]) == 0
    assert build.main([*args, "--out", str(tmp_path / "two"), "--merge"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert load_manifest(tmp_path / "one" / "valid").documents == 141


def test_documents_that_share_a_key_come_in_the_same_order(
    tmp_path: Path, corpus: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = stages.document_key
    monkeypatch.setattr(stages, "document_key", lambda text, seed: key(text, seed) >> 58 << 58)
    assert build.main(command(tmp_path / "one", tokenizer=tokenizer, inputs=corpus)) == 0
    make_parts(tmp_path / "two", corpus, tokenizer, 3)
    assert build.main(command(tmp_path / "two", "--merge")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_tokenizer_is_trained_before_the_parts(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, one = tmp_path / "out", tmp_path / "one"
    part = command(out, "--part", "1/2", tokenizer="train:400", inputs=corpus)
    assert build.main(part) == 2
    said = capsys.readouterr().err
    assert "train it first with --tokenizer train:400 --tokenizer-only, then give --tokenizer " in said
    assert said.count("\n") == 1 and not (out / ".parts").exists()
    for again in (False, True):
        assert build.main(command(out, "--tokenizer-only", tokenizer="train:400", inputs=corpus)) == 0
        assert ("training a tokenizer" in capsys.readouterr().err) is not again
    vocab.train(prose(9), 300).save(out / "tokenizer")
    assert build.main(command(out, "--tokenizer-only", tokenizer="train:400", inputs=corpus)) == 0
    assert "training a tokenizer" in capsys.readouterr().err
    make_parts(out, corpus, out / "tokenizer", 2)
    assert build.main(command(out, "--merge")) == 0
    assert build.main(command(one, tokenizer="train:400", inputs=corpus)) == 0
    assert contents(out) == contents(one)
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer", "train", "valid"]
    assert build.main(command(out, "--tokenizer-only", tokenizer="train:300", inputs=corpus)) == 2
    assert "holds shards, which another tokenizer would not fit" in capsys.readouterr().err
    assert contents(out) == contents(one)


def remove(out: Path) -> None:
    for path in sorted((out / ".parts" / "00002-of-00003").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (out / ".parts" / "00002-of-00003").rmdir()


def edit_plan(**changes: object) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        plan = out / ".parts" / "00002-of-00003" / "plan.json"
        plan.write_text(json.dumps(json.loads(plan.read_text()) | changes))

    return edit


def last_run(out: Path) -> Path:
    return sorted((out / ".parts" / "00002-of-00003" / "runs").glob("*.run"))[-1]


def first_run(out: Path) -> Path:
    return out / ".parts" / "00002-of-00003" / "runs" / "000000.run"


def alter(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (remove, "part 2/3 is missing from "),
        (lambda out: (out / ".parts" / "00001-of-00004").mkdir(), "holds parts of 3 and parts of 4; remove"),
        (lambda out: last_run(out).unlink(), "part 2/3 has not finished; run it again with the same command"),
        (lambda out: (out / ".parts" / "00002-of-00003" / "plan.json").unlink(), "part 2/3 has not finished"),
        (lambda out: first_run(out).unlink(), "00002-of-00003/runs/000000.run is missing; remove "),
        (lambda out: os.truncate(first_run(out), 1000), "00002-of-00003/runs/000000.run is damaged ("),
        (lambda out: alter(first_run(out), 10_000), "00002-of-00003/runs/000000.run is altered; remove "),
        (lambda out: alter(first_run(out), -60), "00002-of-00003/runs/000000.run is damaged ("),
        (edit_plan(tokenizer="x"), "part 2/3 and part 1/3 differ in the tokenizer; run one of them again"),
        (edit_plan(inputs="x"), "part 2/3 and part 1/3 differ in the input files"),
        (edit_plan(seed=1), "part 2/3 and part 1/3 differ in --seed"),
        (edit_plan(versions={}), "part 2/3 and part 1/3 differ in the version of Python or of a library"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    tmp_path: Path,
    corpus: Path,
    tokenizer: str,
    single: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    problem: str,
) -> None:
    out = tmp_path / "out"
    make_parts(out, corpus, tokenizer, 3)
    harm(out)
    capfd.readouterr()
    assert build.main(command(out, "--merge")) == 2
    said = capfd.readouterr().err
    assert problem in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (out / "train").exists() and (out / ".parts" / "00001-of-00003").exists()


def test_a_merge_can_be_given_the_command_of_the_parts(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make_parts(out, corpus, tokenizer, 2)
    same = command(out, "--merge", tokenizer=tokenizer, inputs=corpus)
    assert build.main([*same, "--seed", "3"]) == 2
    assert "differ from this command in --seed; run them again" in capsys.readouterr().err
    assert build.main(same) == 0
    assert contents(out) == single
    assert build.main(same) == 2
    assert "holds no parts to merge; make them with --part 1/N ... --part N/N" in capsys.readouterr().err


def test_a_part_that_is_still_being_made_is_not_merged(
    tmp_path: Path, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_parts(tmp_path, corpus, tokenizer, 2)
    with workplace.occupied(parts.Part(2, 2).folder(tmp_path)):
        assert build.main(command(tmp_path, "--merge")) == 2
    assert "part 2/2 is still being made; merge when it has finished" in capsys.readouterr().err
    assert build.main(command(tmp_path, "--merge")) == 0


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3"])
def test_a_part_that_is_none_is_refused(
    tmp_path: Path, corpus: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    assert build.main(command(tmp_path, f"--part={part}", tokenizer=tokenizer, inputs=corpus)) == 2
    assert f"--part {part} is not i/n with i from 1 to n, as in 3/16" in capsys.readouterr().err


def test_input_is_required_but_for_a_merge(tmp_path: Path) -> None:
    for flags in (["--part", "1/2"], [], ["--merge", "--input", "x"], ["--merge", "--part", "1/2"]):
        with pytest.raises(SystemExit) as refused:
            build.main(["--out", str(tmp_path), *flags])
        assert refused.value.code == 2


# ---- dealing


def test_every_piece_goes_to_one_part_and_parts_are_alike(corpus: Path) -> None:
    whole = files.pieces(files.find([corpus]), held_out=False)
    assert whole == files.pieces(sorted(corpus.iterdir(), reverse=True), held_out=False)
    assert sum(piece.size for piece in whole) == sum(file.stat().st_size for file in corpus.iterdir())
    for count in (1, 3, 4):
        dealt = files.deal(whole, count)
        assert sorted(repr(piece) for part in dealt for piece in part) == sorted(map(repr, whole))
        sizes = [sum(piece.size for piece in part) for part in dealt]
        assert max(sizes) - min(sizes) <= files.PIECE_BYTES


@pytest.mark.parametrize("piece_bytes", [1, 7, 20, 33, 1000])
def test_lines_are_read_once_however_a_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(texts, "BATCH_BYTES", 30)
    lines = [json.dumps({"text": "x" * (i % 17)}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "", *lines]))
    reading, pieces = texts.Reading("text", 1 << 20, False), files.pieces([tmp_path / "a.jsonl"], False)
    read = b"\n".join(chunk.data.rstrip(b"\n") for batch in texts.batches(pieces, reading) for chunk in batch.chunks)
    assert [line for line in read.decode().split("\n") if line] == lines * 2
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    pieces = files.pieces([tmp_path / "a.jsonl"], False)
    with pytest.raises(texts.ConfigError, match=r"a\.jsonl:41 is not JSON"):
        for batch in texts.batches(pieces, reading):
            list(texts.documents(batch, reading, texts.Counts()))


def test_batches_go_on_from_any_cursor(corpus: Path) -> None:
    reading, pieces = texts.Reading("text", 1024, False), files.pieces(files.find([corpus]), False)
    batches = list(texts.batches(pieces, reading))
    assert len(batches) > 10 and batches[-1].end == texts.Cursor(len(pieces), 0)
    for number, batch in enumerate(batches):
        assert list(texts.batches(pieces, reading, batch.end)) == batches[number + 1 :]


# ---- killed


def killed_at(moment: int, argv: list[str]) -> None:
    """Build, and kill the whole process for good at the `moment`th time that something is put on the disk."""
    reached = multiprocessing.get_context("fork").Value("i", 0)
    parent = os.getpid()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            with reached.get_lock():
                reached.value += 1
                if reached.value == moment:
                    os.kill(parent, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    os._exit(build.main(argv))


def fork(target: Callable[..., None], *args: object) -> int:
    """Run a function in a process of its own; returns how it ended."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def kill_everywhere(argv: list[str], out: Path, step: int, check: Callable[[], None]) -> int:
    """Kill a build at every `step`th moment in turn, a new one each time, and start it again; returns how often."""
    moment = kills = 0
    while True:
        moment += step
        code = fork(killed_at, moment, argv)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1
        if code := build.main(argv):
            assert code == 2 and (out / "train" / "manifest.json").exists()  # killed when all but cleaning up was done
        check()


@pytest.mark.parametrize("step", [23, pytest.param(2, marks=pytest.mark.slow)])
def test_a_build_killed_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], step: int
) -> None:
    out = tmp_path / "out"

    def check() -> None:
        assert {name: data for name, data in contents(out).items() if name[0] != "."} == single
        (out / "train").rename(tmp_path / "old")
        subprocess.run(["rm", "-rf", out, tmp_path / "old"], check=True)

    kills = kill_everywhere(command(out, tokenizer=tokenizer, inputs=corpus), out, step, check)
    assert kills > 60 / step


@pytest.mark.parametrize("step", [23, pytest.param(2, marks=pytest.mark.slow)])
def test_parts_and_merges_killed_anywhere_go_on_to_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], step: int
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    make_parts(kept, corpus, tokenizer, 2)

    def fresh() -> None:
        subprocess.run(["rm", "-rf", out], check=True)
        subprocess.run(["cp", "-rp", kept, out], check=True)

    def check_part() -> None:
        assert build.main(command(out, "--merge")) == 0
        assert contents(out) == single
        fresh()
        subprocess.run(["rm", "-rf", parts.Part(1, 2).folder(out)], check=True)

    def check_merge() -> None:
        assert {name: data for name, data in contents(out).items() if name[0] != "."} == single
        fresh()

    fresh()
    subprocess.run(["rm", "-rf", parts.Part(1, 2).folder(out)], check=True)
    part = command(out, "--part", "1/2", tokenizer=tokenizer, inputs=corpus)
    assert kill_everywhere(part, out, max(2, step // 3), check_part) > 0
    fresh()
    assert kill_everywhere(command(out, "--merge"), out, step, check_merge) > 30 / step


@pytest.mark.parametrize("step", [31, pytest.param(5, marks=pytest.mark.slow)])
def test_old_shards_are_whole_until_the_new_ones_are(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], step: int
) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    assert build.main(command(old, "--valid-fraction", "0", tokenizer=tokenizer, inputs=corpus / "0.jsonl")) == 0
    before, moment = contents(old), 0
    argv = command(out, "--force", tokenizer=tokenizer, inputs=corpus)
    while True:
        moment += step
        subprocess.run(["rm", "-rf", out], check=True)
        subprocess.run(["cp", "-rp", old, out], check=True)
        code = fork(killed_at, moment, argv)
        found = {name: data for name, data in contents(out).items() if name[0] != "."}
        if "train/manifest.json" in found:
            assert found in (before, single)
        if code == 0:
            break
        assert build.main(argv) == 0
        assert contents(out) == single
    assert moment > 60 and found == single


def test_what_is_finished_is_not_done_again(
    tmp_path: Path, corpus: Path, tokenizer: str, single: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = command(out, tokenizer=tokenizer, inputs=corpus)
    assert fork(killed_at, 30, argv) == -signal.SIGKILL
    made = {path: path.stat() for path in (out / ".building").rglob("*.run")}
    assert len(made) > 2
    while not list((out / ".building").glob("finished/*/*.json")):
        assert fork(killed_at, 20, argv) == -signal.SIGKILL
    for path, before in made.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    shards = {json.loads(note.read_text())["info"]["name"] for note in (out / ".building").glob("finished/*/*.json")}
    before = {name: (out / ".building" / "train" / name).stat().st_mtime_ns for name in shards}
    assert before
    capsys.readouterr()
    assert build.main(argv) == 0
    assert f"going on where the build in {out / '.building'} was stopped" in capsys.readouterr().err
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in shards} == before
    assert contents(out) == single


@pytest.mark.parametrize(
    ("flags", "touched", "what"),
    [(["--seed", "1"], False, "--seed"), (["--strict"], False, "--strict"), ([], True, "the input files")],
)
def test_another_build_starts_over_and_says_so(
    tmp_path: Path,
    corpus: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    touched: bool,
    what: str,
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes((corpus / "0.jsonl").read_bytes() * 5)
    out, one = tmp_path / "out", tmp_path / "one"
    assert fork(killed_at, 20, command(out, tokenizer=tokenizer, inputs=source)) == -signal.SIGKILL
    assert list((out / ".building").glob("runs/*.run"))
    if touched:
        source.write_bytes((corpus / "1.jsonl").read_bytes())
    capsys.readouterr()
    assert build.main(command(out, *flags, tokenizer=tokenizer, inputs=source)) == 0
    assert f"starting over: {what} changed since the build in " in capsys.readouterr().err
    assert build.main(command(one, *flags, tokenizer=tokenizer, inputs=source)) == 0
    assert contents(out) == contents(one)


def test_a_mistyped_command_does_not_lose_what_is_finished(tmp_path: Path, corpus: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    assert fork(killed_at, 30, command(out, tokenizer=tokenizer, inputs=corpus)) == -signal.SIGKILL
    before = contents(out)
    assert build.main(command(out, tokenizer=tokenizer + "x", inputs=corpus)) == 2
    assert build.main(command(out, tokenizer=tokenizer, inputs=corpus / "nowhere")) == 2
    assert contents(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("after_seconds", [0.3, 1.0, 2.0, 4.0])
def test_a_process_killed_at_some_time_goes_on(tmp_path: Path, tokenizer: str, after_seconds: float) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(3000) * 8))
    argv = command(tmp_path / "out", "--workers", "2", tokenizer=tokenizer, inputs=source)
    script = "import sys; from shards import build, stages; stages.RUN_BYTES = 300_000; sys.exit(build.main())"
    process = subprocess.Popen([sys.executable, "-c", script, *argv], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "out" / ".building" / "runs").exists():
        time.sleep(0.01)
    try:
        process.wait(after_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    if process.returncode:
        assert build.main(argv) == 0
    assert build.main(command(tmp_path / "one", tokenizer=tokenizer, inputs=source)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


# ---- runs


def test_a_run_gives_back_what_went_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spill = runs.Spill(tmp_path / "runs", 8, "uint16")
    documents: list[tuple[int, int, list[int]]] = []
    for cursor in range(4):
        for _ in range(cursor):  # the first run is empty
            count = int(rng.integers(0, 30))
            lengths = rng.integers(1, 9, count).astype("<u4")
            tokens = rng.integers(0, 2**16, int(lengths.sum())).astype("<u2")
            keys, numbers = rng.integers(0, 2**64, count, dtype=np.uint64), rng.integers(0, 8, count)
            spill.add(numbers, keys, lengths, tokens)
            pieces = np.split(tokens, np.cumsum(lengths)[:-1]) if count else []
            documents += [(int(n), int(k), p.tolist()) for n, k, p in zip(numbers, keys, pieces, strict=True)]
        spill.counts.replaced["a.txt"] += cursor
        spill.commit(texts.Cursor(cursor, 0))
    shelf = runs.Shelf(runs.Spill(tmp_path / "runs", 8, "uint16").runs, "uint16")
    assert [run.counts.replaced["a.txt"] for run in shelf.runs] == [0, 1, 2, 3]
    for bucket in range(8):
        keys, lengths, tokens = runs.load(list(shelf.slices(bucket)), "uint16")
        found = zip(keys.tolist(), np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else [], strict=True)
        assert sorted((bucket, key, piece.tolist()) for key, piece in found) == sorted(
            document for document in documents if document[0] == bucket
        )


# ---- under SLURM


def test_the_batch_script_builds_under_slurm(
    tmp_path: Path, corpus: Path, single: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """`sbatch` is played by a script that runs each job at once; the script itself is the real one."""
    assert subprocess.run(["bash", "-n", SBATCH], check=False).returncode == 0
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/usr/bin/env bash\nset -e\n"
        'echo "$STEP $*" >> "$JOBS"; tasks=none\n'
        'for word in "$@"; do case $word in --array=*) tasks=$(seq 1 "${word#*-*-*-}") ;; esac; done\n'
        'export SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=1 SLURM_SUBMIT_DIR="$PWD"\n'
        'for task in $tasks; do SLURM_ARRAY_TASK_ID=$task bash "${@: -1}" >&2; done\necho "7;cluster"\n'
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    for name in ("launch", "mlm_dist", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    options = "--valid-fraction 0.1 --shard-tokens 1000"
    given = {"INPUT": corpus, "OUT": tmp_path / "out", "TOKENIZER": "train:400", "PARTS": 3, "OPTIONS": options}
    environment = {name: str(value) for name, value in given.items()} | {"PYTHON": sys.executable}
    environment |= {"PATH": f"{sbatch.parent}:{os.environ['PATH']}", "JOBS": str(tmp_path / "jobs")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    subprocess.run(["bash", "launch/slurm/build.sbatch"], cwd=tmp_path, env=clean | environment, check=True)
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert [job.split()[0] for job in jobs] == ["tokenizer", "part", "merge"]
    assert "--array=1-3 --dependency=afterok:7 " in jobs[1] and "--dependency=afterok:7 " in jobs[2]
    one = command(tmp_path / "one", tokenizer="train:400", inputs=corpus)
    assert build.main(one) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
