"""Mixtures: each source once an epoch of its own, in one order for any ranks and workers, with the shares asked for."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_stream import (
    GLOBAL_ROWS,
    LANES,
    REASONS,
    ROW_TOKENS,
    SEED,
    SHAPES,
    STOPS,
    VOCAB,
    Row,
    check_stop_and_resume,
    damage,
    data_config,
    deliver,
    flip_payload,
    held_out,
    make_documents,
    make_vocab,
    open_rank,
    pieces,
    real_rows,
    rows_of,
    truncate,
    write,
)

from mlm_dist import lanes, mixture, stream
from mlm_dist.cache import make_cache
from mlm_dist.manifest import ShardError
from mlm_dist.mixture import Source, SourceConfig, Sources, Turns, open_sources, turns_of, whole_weights
from mlm_dist.schema import ConfigError, from_mapping, help_text, load, to_mapping, to_yaml

CACHE = make_cache(None, 1.0, 1.0)
# by name: weight, shards; the small one is read several times while the large one is read once
SOURCES = {"code": (0.45, 16), "law": (0.3, 8), "notes": (0.25, 4)}
DOCUMENTS = {
    name: [[[document + 15_000 * number for document in record] for record in shard] for shard in make_documents(count)]
    for number, (name, (_, count)) in enumerate(SOURCES.items())
}


def write_sources(folder: Path) -> Sources:
    return tuple(
        Source(write(folder / name / "train", DOCUMENTS[name], VOCAB), name, weight, number)
        for number, (name, (weight, _)) in enumerate(SOURCES.items())
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def own_sources(tmp_path) -> Sources:
    """Shards to damage."""
    return write_sources(tmp_path)


@pytest.fixture(scope="module")
def reference(sources) -> list[Row]:
    """The rows of an uninterrupted run in one process: the small source is in another epoch than the large one."""
    rows, cursor = deliver(sources, 640, world=1, accumulate=1, workers=0)
    epochs = np.array(cursor["lanes"])[:, :, 0]
    assert epochs[:, 0].max() < epochs[:, 2].min()
    return rows


@pytest.fixture(scope="module")
def stops(sources) -> dict[str, int]:
    """Rows after which to stop. At the edges lane 0 has just delivered a source's last row of a shard, or an epoch."""
    order = lanes.LaneEpoch(sources[0].manifest, 2, SEED, 0, 0, LANES)
    rows = {"start": 0, "step": GLOBAL_ROWS, "mid-accumulation": GLOBAL_ROWS + GLOBAL_ROWS // 2}
    for number, batch in zip(range(1, 600), open_rank(sources, 0, 1, 1), strict=False):
        after_round = -(-number // LANES) * LANES
        code, _, notes = batch.cursor["lanes"][0]
        if code[:3] == [0, order.after_shard_of(0), 0]:
            rows.setdefault("shard edge", after_round)
        if notes[:3] == [1, 0, 0]:
            rows.setdefault("epoch edge", after_round)
    assert sorted(rows) == sorted(STOPS)
    return rows


def expected_pieces(name: str, without: int | None = None) -> list[tuple[int, ...]]:
    shards = [shard for number, shard in enumerate(DOCUMENTS[name]) if number != without]
    documents = [document for shard in shards for record in shard for document in record]
    most = ROW_TOKENS - 2
    return sorted(tuple(d[first : first + most].tolist()) for d in documents for first in range(0, len(d), most))


# ---- whose turn it is


def test_weights_become_whole_numbers_as_they_are_written():
    assert whole_weights([0.7, 0.3]) == (7, 3)
    assert whole_weights([1.0, 1.0, 2.0]) == (1, 1, 2)
    assert whole_weights([1e-3, 0.999]) == (1, 999)
    assert whole_weights([0.1, 0.2, 0.7]) == (1, 2, 7)  # not the binary fractions that stand for them


def distances(turns: Turns, weights: list[int], rows: int) -> np.ndarray:
    """(rows + 1, sources) Fractions: rows taken beyond the share, after each number of rows."""
    taken, found = [0] * len(weights), [[Fraction(0)] * len(weights)]
    for number, source in zip(range(1, rows + 1), turns, strict=False):
        taken[source] += 1
        found.append([t - Fraction(w * number, sum(weights)) for t, w in zip(taken, weights, strict=True)])
    return np.array(found, object)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=7), st.integers(0, 200))
@example([1, 1, 1, 1, 1, 1, 1], 0)
@example([1, 999], 5)
@example([1, 1, 10**12], 3)
def test_shares_are_within_a_row_from_the_start_and_two_over_any_stretch(weights, lane):
    bound = 1 - Fraction(1, 2 * len(weights) - 2)
    found = distances(Turns(weights, [0] * len(weights)), weights, 300)
    assert abs(found).max() <= bound
    shifted = distances(turns_of(weights, lane, [0] * len(weights)), weights, 300)
    stretch = (shifted.max(0) - shifted.min(0)).max()  # the most that any stretch of the lane's rows is off
    assert stretch <= 2 * bound  # two sources: one row


def test_the_turns_go_on_from_the_rows_taken():
    weights = (7, 2, 1)
    whole = list(itertools.islice(turns_of(weights, 5, [0, 0, 0]), 100))
    for stop in range(60):
        counts = [whole[:stop].count(source) for source in range(3)]
        assert list(itertools.islice(turns_of(weights, 5, counts), 40)) == whole[stop : stop + 40]


def test_lanes_turn_to_a_source_at_different_times():
    weights = (90, 9, 1)
    by_lane = [list(itertools.islice(turns_of(weights, lane, [0] * 3), 50)) for lane in range(64)]
    for each_round in zip(*by_lane, strict=True):
        for source, weight in enumerate(weights):
            assert abs(each_round.count(source) - 64 * weight / 100) <= 2 * 0.75


# ---- order


@pytest.mark.parametrize(("world", "accumulate"), SHAPES)
def test_the_order_is_the_same_for_any_world_and_accumulation(sources, reference, world, accumulate):
    assert deliver(sources, 320, world, accumulate, workers=0)[0] == reference[:320]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_order_is_the_same_for_any_number_of_workers(sources, reference, workers):
    assert deliver(sources, 160, 1, 1, workers)[0] == reference[:160]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("before", "after"), itertools.pairwise([*SHAPES, SHAPES[0]]))
def test_resume_goes_on_exactly_with_another_world_and_accumulation(sources, reference, stops, stop, before, after):
    check_stop_and_resume(sources, reference, stops[stop], (*before, 0), (*after, 0))


def test_resume_goes_on_exactly_with_other_workers(sources, reference, stops):
    check_stop_and_resume(sources, reference, stops["mid-accumulation"], (1, 2, 3), (2, 1, 1))
    check_stop_and_resume(sources, reference, stops["epoch edge"], (2, 2, 2), (1, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_resume_goes_on_exactly_from_every_combination(sources, reference, stops, shape, workers, stop):
    other = SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]
    check_stop_and_resume(sources, reference, stops[stop], (*shape, workers), (*shape, workers))
    check_stop_and_resume(sources, reference, stops[stop], (*shape, workers), (*other, (workers + 2) % 4))


def test_each_epoch_of_each_source_delivers_every_document_exactly_once(sources):
    """Over four ranks; the epoch of a row is the one that its lane stood in, in the row's source, before it."""
    delivered: dict[tuple[int, int], list] = {}
    for rank in range(4):
        with open_rank(sources, rank, 4, 1) as batches:
            places = [[0, 0, 0, 0]] * 3
            while min(epoch for epoch, *_ in places) < 2:
                batch = next(batches)
                [source] = batch.sources.tolist()
                delivered.setdefault((source, places[source][0]), []).extend(pieces(batch))
                places = batch.cursor["lanes"][rank]
    assert max(epoch for source, epoch in delivered if source == 2) > 4
    for number, name in enumerate(SOURCES):
        for epoch in (0, 1):
            assert sorted(delivered[number, epoch]) == expected_pieces(name), (name, epoch)


def test_a_row_names_its_source_and_the_shares_are_those_asked_for(sources):
    with open_rank(sources, 0, 1, 4 * LANES) as batches:
        taken = list(itertools.islice(batches, 25))
    of_lane = np.concatenate([batch.sources.numpy() for batch in taken]).reshape(-1, LANES)  # (rows, lanes)
    ids = np.concatenate([batch.ids.numpy() for batch in taken])
    assert ((ids[:, 1] - 10) // 15_000 == of_lane.ravel()).all()
    for source, (weight, _) in enumerate(SOURCES.values()):
        off = np.cumsum((of_lane == source) - weight, axis=0)
        assert (np.ptp(np.concatenate([np.zeros((1, LANES)), off]), axis=0) <= 1.5 + 1e-9).all()
    counts = np.array([[place[3] for place in lane] for lane in taken[-1].cursor["lanes"]])
    assert counts.sum(0).tolist() == [np.count_nonzero(of_lane == source) for source in range(3)]


def test_row_keys_name_rows_of_all_sources(reference):
    assert len({key for _, _, key, _ in reference}) == len(reference)


def test_one_named_source_keeps_the_order_and_the_cursor_of_a_folder(sources):
    manifest = sources[0].manifest
    alone = deliver(manifest, 160, 1, 1, 0)
    assert deliver((Source(manifest, "only", 3.0),), 160, 2, 1, 0) == alone
    assert all(len(lane) == 3 for lane in alone[1]["lanes"])


def test_sources_of_equal_size_stand_in_different_orders(tmp_path):
    twins = tuple(Source(write(tmp_path / name, make_documents(8), VOCAB), name, 1.0, n) for n, name in enumerate("ab"))
    with open_rank(twins, 0, 1, 400) as batches:
        batch = next(batches)
    one, other = (batch.ids[batch.sources == number].tolist() for number in (0, 1))
    assert one != other and Counter(map(tuple, one)) != Counter(map(tuple, other))


def test_other_weights_keep_each_sources_own_order(sources):
    """A mixture only ever interleaves: the rows that a lane takes of a source don't depend on the weights."""
    orders = []
    for weights in ((1.0, 1.0, 1.0), (5.0, 1.0, 3.0)):
        mixed = tuple(replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True))
        with open_rank(mixed, 0, 1, 400, lanes=1) as batches:
            batch = next(batches)
        orders.append([batch.row_keys[batch.sources == number].tolist()[:40] for number in range(3)])
    assert orders[0] == orders[1]


# ---- what is refused


def test_the_source_with_the_fewest_shards_bounds_the_lanes(sources):
    for settings_, world, said in (
        (
            {"lanes": 5},
            1,
            "data.lanes = 5 exceeds the 4 shards of data.sources.notes; lanes that work here: 1, 2, 3",
        ),
        ({"lanes": None}, 8, "4 shards of data.sources.notes can't feed 8 ranks"),
    ):
        with pytest.raises(ConfigError) as refused:
            open_rank(sources, 0, world, 1, **settings_)
        assert str(refused.value).startswith(said)
    with open_rank(sources, 0, 1, 1, lanes=None) as batches:
        assert len(next(batches).cursor["lanes"]) == 4


def test_sources_of_different_tokenizers_are_refused_with_both_folders(own_sources, tmp_path):
    write(tmp_path / "other" / "train", DOCUMENTS["law"], make_vocab(61_000))
    folders = {name: SourceConfig(str(tmp_path / name)) for name in ("code", "other")}
    with pytest.raises(ConfigError) as refused:
        open_sources(folders, "train", CACHE)
    said = str(refused.value)
    assert f"{tmp_path / 'code' / 'train'} and {tmp_path / 'other' / 'train'} were built with different" in said
    assert "60000 and 61000 ids" in said


def test_sources_stand_in_the_order_of_their_names_and_have_one_hash(own_sources, tmp_path):
    folders = {name: SourceConfig(str(tmp_path / name), weight) for name, (weight, _) in SOURCES.items()}
    opened = open_sources(folders, "train", CACHE)
    assert opened == own_sources == open_sources(dict(reversed(folders.items())), "train", CACHE)
    assert open_sources(folders, "valid", CACHE) == ()
    hashes = {mixture.hash_of(part) for part in (opened, opened[:2], opened[:1], (replace(opened[0], name="x"),))}
    assert len(hashes) == 3 and mixture.hash_of(opened[:1]) == opened[0].manifest.hash


# ---- the configuration


def test_a_source_is_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="shards are not read from pipe: addresses"):
        open_sources({"web": SourceConfig("pipe:touch ran")}, "train", CACHE)
    assert not list(tmp_path.iterdir())


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(stream.DataConfig, "c.yaml", overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("sources:\n  law: {shards: a, weight: 0.7}\n  web: {shards: b, weight: 0.3}\n")
    return Path("c.yaml")


def test_sources_are_read_and_overridden(config):
    data = load(stream.DataConfig, config, ["sources.law.weight=5e-1", "sources.more.shards=c"])
    expected = {"law": SourceConfig("a", 0.5), "web": SourceConfig("b", 0.3), "more": SourceConfig("c", 1.0)}
    assert data.sources == expected == data.folders()
    assert from_mapping(stream.DataConfig, to_mapping(data)) == data
    Path("again.yaml").write_text(to_yaml(data))
    assert load(stream.DataConfig, "again.yaml") == data
    assert stream.DataConfig(shards="x").folders() == {"": SourceConfig("x")}


def test_sources_are_checked_as_everything_is(config):
    cases = {
        "sources.law.wieght=1": "sources.law.wieght is no setting; did you mean sources.law.weight",
        "sources.law.weight=0": "sources.law.weight must be a finite number (above 0), got 0",
        "sources.law.weight=.inf": "sources.law.weight must be a finite number (above 0), got .inf",
        "sources.new.weight=1": "sources.new.shards is missing; it must be text",
        "sources.law=x": "sources.law must be a section with keys among shards, weight, got the text 'x'",
        "sources=3": "sources must be a mapping of sections or null, got 3",
        "shards=x": "name the data once, as shards: FOLDER or as sources: {NAME: {shards: FOLDER, weight: 1}}: both",
        "sources=null": "name the data once, as shards: FOLDER or as sources: {NAME: {shards: FOLDER, weight: 1}}: nei",
        "sources={a b: {shards: x}}": "sources.a b: a source's name is made of letters, digits, _ and -; rename it",
    }
    for override, said in cases.items():
        assert said in refusal(override), override


def test_the_help_names_the_keys_of_a_source():
    lines = [" ".join(line.split()) for line in help_text(stream.DataConfig).splitlines()]
    assert any(line.startswith("sources mapping of section | null = null") for line in lines)
    assert any(line.startswith("sources.NAME.weight float (above 0) = 1.0") for line in lines)


# ---- damage


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", REASONS)
def test_a_bad_shard_of_a_source_is_skipped_named_and_costs_nothing_else(own_sources, how, workers):
    name = damage(own_sources[1].manifest, 3, how)
    with (
        open_rank(own_sources, 0, 1, 4, workers=workers) as batches,
        pytest.raises(ShardError, match=f"law/train/{name}"),
    ):
        for _ in range(400):
            next(batches)
    delivered: dict[int, list] = {0: [], 1: [], 2: []}
    with open_rank(own_sources, 0, 1, 1, lanes=1, workers=workers, max_bad_shards=1) as batches:
        places = [[0, 0, 0, 0]] * 3
        while places[1][0] == 0 or places[0][0] == 0:
            batch = next(batches)
            [source] = batch.sources.tolist()
            if places[source][0] == 0:
                delivered[source] += pieces(batch)
            places = batch.cursor["lanes"][0]
    assert batch.bad_shards == batch.cursor["bad_shards"] == {f"law/{name}": REASONS[how]}
    assert sorted(delivered[0]) == expected_pieces("code")
    assert sorted(delivered[2]) == expected_pieces("notes")
    missing = Counter(expected_pieces("law")) - Counter(delivered[1])
    assert Counter(delivered[1]) <= Counter(expected_pieces("law"))
    lost = Counter(expected_pieces("law")) - Counter(expected_pieces("law", without=3))
    assert missing and missing < lost if how is truncate else missing == lost


def test_the_order_with_a_bad_shard_survives_a_resume_and_any_workers(own_sources):
    damage(own_sources[2].manifest, 1, flip_payload)
    with open_rank(own_sources, 0, 1, 4, max_bad_shards=1) as batches:
        whole = list(itertools.islice(batches, 90))
    for stop, workers in ((1, 0), (40, 2), (61, 3)):
        start = json.loads(json.dumps(whole[stop - 1].cursor))
        with open_rank(own_sources, 0, 1, 4, start, max_bad_shards=1, workers=workers) as batches:
            for expected, batch in zip(whole[stop:], batches, strict=False):
                assert rows_of(batch) == rows_of(expected) and batch.cursor["lanes"] == expected.cursor["lanes"]
    assert batch.bad_shards == {"notes/000001.tar": "altered"}


def test_no_budget_lets_a_run_go_on_without_a_source(own_sources):
    for shard in range(4):
        (own_sources[2].manifest.path / f"{shard:06d}.tar").unlink()
    with (
        open_rank(own_sources, 0, 1, 1, max_bad_shards=1000) as batches,
        pytest.raises(ShardError, match="notes/train/"),
    ):
        for _ in range(400):
            next(batches)


def test_a_shards_label_tells_its_source():
    for label, source in (("000003.tar", ""), ("law/000003.tar", "law"), ("../a.tar", ""), ("law/../a.tar", "law")):
        assert lanes.source_of(label) == source


# ---- held-out rows


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_source_is_held_out_in_turn(sources, world):
    ranks = held_out(sources, world)
    assert real_rows(ranks) == real_rows(held_out(sources, 1))
    batches = [batch for rank in ranks for batch in rank]
    rows = [pair for batch in batches for pair in zip(rows_of(batch), batch.sources.tolist(), strict=True)]
    assert all((origin == -1) == (not any(row[1])) for row, origin in rows)
    for number, source in enumerate(sources):
        alone = sorted(row[:2] for row in real_rows(held_out(source.manifest, 1)))
        assert sorted(row[:2] for row, origin in rows if origin == number) == alone
    keys = [row[2] for row in real_rows(ranks)]
    assert len(set(keys)) == len(keys)


def test_a_limit_takes_an_equal_part_of_every_source(sources):
    [batches] = held_out(sources, 1, max_rows=20)
    counts = Counter(origin for batch in batches for origin in batch.sources.tolist())
    assert [counts[number] for number in range(3)] == [6, 7, 7] and len(real_rows([batches])) == 20
    assert {row[2] for row in real_rows([batches])} == {row[2] for row in real_rows(held_out(sources, 3, max_rows=20))}


def test_a_source_that_alone_is_held_out_keeps_its_number(sources):
    [batches] = held_out(sources[1:2], 1, max_rows=3)
    assert [origin for batch in batches for origin in batch.sources.tolist()] == [1, 1, 1, -1, -1]
    assert data_config().folders() == {"": SourceConfig("unused")}
