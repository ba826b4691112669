"""The stream: one order for any ranks and workers, every document once an epoch, exact resume, no silent loss."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from mlm_dist import batch_size, lanes
from mlm_dist.batch_size import BatchConfig
from mlm_dist.cursor import Cursor, merge_cursors, upgraded
from mlm_dist.manifest import Manifest, ShardError, load_manifest
from mlm_dist.schema import ConfigError
from mlm_dist.shards import Record, write_split
from mlm_dist.stream import Batch, DataConfig, TrainBatches, held_out_batches, train_batches
from mlm_dist.vocab import Vocab

ROW_TOKENS = 16
SHARDS = GLOBAL_ROWS = 8
LANES = 4
SEED = 7
STOPS = ("start", "step", "mid-accumulation", "shard edge", "epoch edge")
FIRST_TOKEN = 10


def make_vocab(size: int) -> Vocab:
    ids = {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
    return Vocab(Tokenizer(models.BPE()), size, special_ids=tuple(ids.values()), **ids)


VOCAB = make_vocab(60_000)


def make_documents(shards: int) -> list[list[list[np.ndarray]]]:
    """Documents by shard and record. All tokens differ, so that each can be followed; some lengths are a row's edge."""
    rng = np.random.default_rng(0)
    token, split = FIRST_TOKEN, []
    for shard in range(shards):
        records = []
        for record in range(3 + shard % 4):
            lengths = [*rng.integers(1, 30, 3), ROW_TOKENS - 2 if record % 2 else ROW_TOKENS - 1]
            if (shard, record) == (1, 1):
                lengths.append(200)
            documents = []
            for length in lengths:
                documents.append(np.arange(token, token + length))
                token += length
            records.append(documents)
        split.append(records)
    return split


DOCUMENTS = make_documents(SHARDS)


def write(folder: Path, documents: list[list[list[np.ndarray]]], vocab: Vocab) -> Manifest:
    shards = [
        [Record(np.concatenate(record), np.array([len(document) for document in record])) for record in shard]
        for shard in documents
    ]
    return write_split(folder, shards, vocab.size, vocab.fingerprint)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return write(tmp_path_factory.mktemp("shards"), DOCUMENTS, VOCAB)


@pytest.fixture
def own_manifest(tmp_path) -> Manifest:
    """Shards to damage."""
    return write(tmp_path, DOCUMENTS, VOCAB)


def data_config(**settings) -> DataConfig:
    return DataConfig(**{"shards": "unused", "lanes": LANES, "window_records": 2, "workers": 0, **settings})


def open_rank(
    manifest: Manifest, rank: int, world: int, micro_rows: int, start: Cursor | None = None, **settings
) -> TrainBatches:
    batch = BatchConfig(seq_len=ROW_TOKENS, global_rows=world * micro_rows, micro_rows=micro_rows)
    return train_batches(manifest, VOCAB, data_config(**settings), batch, SEED, rank, world, start)


def pieces(batch: Batch) -> Iterator[tuple[int, ...]]:
    """The pieces in a batch, as (first token, tokens): without [CLS] and [SEP], which are checked."""
    for ids, segments in zip(batch.ids.tolist(), batch.segments.tolist(), strict=True):
        for number in range(1, max(segments) + 1):
            piece = [token for token, segment in zip(ids, segments, strict=True) if segment == number]
            assert piece[0] == VOCAB.cls_id and piece[-1] == VOCAB.sep_id
            yield tuple(piece[1:-1])


def expected_pieces(shards: list[int]) -> list[tuple[int, ...]]:
    documents = [document for shard in shards for record in DOCUMENTS[shard] for document in record]
    most = ROW_TOKENS - 2
    return sorted(tuple(d[first : first + most].tolist()) for d in documents for first in range(0, len(d), most))


Row = tuple[tuple[int, ...], tuple[int, ...], int, int]


def rows_of(batch: Batch) -> list[Row]:
    columns = (batch.ids.tolist(), batch.segments.tolist(), batch.row_keys.tolist(), batch.maskable.tolist())
    return [(tuple(i), tuple(s), k, m) for i, s, k, m in zip(*columns, strict=True)]


def deliver(
    manifest: Manifest, rows: int, world: int, accumulate: int, workers: int, start: Cursor | None = None
) -> tuple[list[Row], Cursor | None]:
    """All ranks' next `rows` rows in the order of the run, and the cursor after them as a checkpoint would hold it."""
    micro_rows = GLOBAL_ROWS // world // accumulate
    assert rows % (world * micro_rows) == 0
    begun = start["rows"] if start else 0
    delivered: dict[int, Row] = {}
    cursors = [start] if start else []
    for rank in range(world):
        with open_rank(manifest, rank, world, micro_rows, start, workers=workers) as batches:
            taken = list(itertools.islice(batches, rows // world // micro_rows))
        # the rank's k-th row is the k-th row of the run, from `begun` on, that is its own
        own = itertools.count(begun + (rank - begun) % world, world)
        delivered |= dict(zip(own, [row for batch in taken for row in rows_of(batch)], strict=False))
        if taken:
            cursors = [*cursors[:rank], taken[-1].cursor]
    assert sorted(delivered) == list(range(begun, begun + rows))
    cursor = json.loads(json.dumps(merge_cursors(cursors))) if cursors else None
    return [delivered[number] for number in sorted(delivered)], cursor


@pytest.fixture(scope="module")
def reference(manifest) -> list[Row]:
    """The rows of an uninterrupted run in one process, over two epochs of every lane."""
    return deliver(manifest, 640, world=1, accumulate=1, workers=0)[0]


@pytest.fixture(scope="module")
def stops(manifest) -> dict[str, int]:
    """Rows after which to stop. At the edges lane 0 has just delivered its last row of a shard, or of an epoch."""
    order = lanes.LaneEpoch(manifest, 2, SEED, 0, 0, LANES)
    rows = {"start": 0, "step": GLOBAL_ROWS, "mid-accumulation": GLOBAL_ROWS + GLOBAL_ROWS // 2}
    for number, batch in zip(range(1, 400), open_rank(manifest, 0, 1, 1), strict=False):
        after_round = -(-number // LANES) * LANES
        if batch.cursor["lanes"][0] == [0, order.after_shard_of(0), 0]:
            rows.setdefault("shard edge", after_round)
        if batch.cursor["lanes"][0] == [1, 0, 0]:
            rows.setdefault("epoch edge", after_round)
    assert sorted(rows) == sorted(STOPS) and rows["shard edge"] < rows["epoch edge"]
    return rows


SHAPES = [(world, accumulate) for world in (1, 2, 4) for accumulate in (1, 2)]


def check_stop_and_resume(
    manifest: Manifest, reference: list[Row], stop: int, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    """before, after: (world, accumulate, workers)."""
    per_round = GLOBAL_ROWS // before[1]
    stop = -(-stop // per_round) * per_round  # a run stops between micro-batches
    first, cursor = deliver(manifest, stop, *before)
    assert cursor is None or cursor["rows"] == stop
    second, cursor = deliver(manifest, 3 * GLOBAL_ROWS, *after, start=cursor)
    assert first + second == reference[: stop + 3 * GLOBAL_ROWS]
    assert cursor["rows"] == stop + 3 * GLOBAL_ROWS


# ---- order


@pytest.mark.parametrize(("world", "accumulate"), SHAPES)
def test_the_order_is_the_same_for_any_world_and_accumulation(manifest, reference, world, accumulate):
    assert deliver(manifest, 320, world, accumulate, workers=0)[0] == reference[:320]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_batch_that_grows_cuts_the_same_order_at_other_places(manifest, reference, world):
    batch = BatchConfig(ROW_TOKENS, 48, micro_rows=4, warmup_rows=8, warmup_tokens=200 * ROW_TOKENS)
    open_all = [
        train_batches(manifest, VOCAB, data_config(workers=0), batch, SEED, rank, world) for rank in range(world)
    ]
    seen = []
    for step in range(20):
        rows = batch_size.rows_at(batch, step)
        micro_rows, count = (each(batch, world, rows) for each in (batch_size.micro_rows, batch_size.accumulation))
        shares = [[row for _ in range(count) for row in rows_of(each.draw(micro_rows))] for each in open_all]
        seen.append(sorted(itertools.chain(*shares)))
    ends = [batch_size.rows_before(batch, step) for step in range(21)]
    assert {batch_size.rows_at(batch, step) for step in range(20)} == {8, 16, 32, 48} and ends[-1] <= len(reference)
    assert seen == [sorted(reference[first:end]) for first, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_order_is_the_same_for_any_number_of_workers(manifest, reference, workers):
    assert deliver(manifest, 160, 1, 1, workers)[0] == reference[:160]


def test_cursors_do_not_depend_on_the_workers(manifest):
    with open_rank(manifest, 1, 2, 3) as alone, open_rank(manifest, 1, 2, 3, workers=2) as helped:
        for one, other in itertools.islice(zip(alone, helped, strict=True), 30):
            assert one.cursor == other.cursor
            assert rows_of(one) == rows_of(other)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("before", "after"), itertools.pairwise([*SHAPES, SHAPES[0]]))
def test_resume_goes_on_exactly_with_another_world_and_accumulation(manifest, reference, stops, stop, before, after):
    check_stop_and_resume(manifest, reference, stops[stop], (*before, 0), (*after, 0))


def test_resume_goes_on_exactly_with_other_workers(manifest, reference, stops):
    check_stop_and_resume(manifest, reference, stops["mid-accumulation"], (1, 2, 3), (2, 1, 1))
    check_stop_and_resume(manifest, reference, stops["epoch edge"], (2, 2, 2), (1, 1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_resume_goes_on_exactly_from_every_combination(manifest, reference, stops, shape, workers, stop):
    other = SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]
    check_stop_and_resume(manifest, reference, stops[stop], (*shape, workers), (*shape, workers))
    check_stop_and_resume(manifest, reference, stops[stop], (*shape, workers), (*other, (workers + 2) % 4))


def test_a_cursor_from_another_global_batch_goes_on_with_the_lane_whose_turn_it_is(manifest, reference):
    with open_rank(manifest, 0, 1, 3) as batches:  # 3 rows: not a whole round of the 4 lanes
        cursor = merge_cursors([next(batches).cursor])
    assert cursor["rows"] == 3
    taken = {}
    for rank in range(2):
        with open_rank(manifest, rank, 2, 5, cursor) as batches:  # each rank's 2 lanes: 3 rows of one, 2 of the other
            taken[rank] = next(batches)
    assert rows_of(taken[0]) == reference[4:13:2] and rows_of(taken[1]) == reference[3:12:2]
    cursor = merge_cursors([taken[0].cursor, taken[1].cursor])
    assert cursor["rows"] == 13
    with open_rank(manifest, 0, 1, 7, cursor) as batches:
        assert rows_of(next(batches)) == reference[13:20]


def test_each_epoch_delivers_every_document_exactly_once(manifest):
    """Over four ranks and past two epochs of every lane; the epoch of a row is the one its lane stood in before."""
    delivered: dict[int, list] = {}
    orders: dict[int, list] = {}
    for rank in range(4):
        with open_rank(manifest, rank, 4, 1) as batches:
            place = [0, 0, 0]
            while place[0] < 2:
                batch = next(batches)
                delivered.setdefault(place[0], []).extend(pieces(batch))
                orders.setdefault(place[0], []).append(batch.ids.tolist())
                place = batch.cursor["lanes"][rank]
    assert sorted(delivered[0]) == sorted(delivered[1]) == expected_pieces(list(range(SHARDS)))
    assert orders[0] != orders[1]


def test_shards_and_rows_stand_in_another_order_in_each_epoch(manifest):
    orders = [lanes.LaneEpoch(manifest, 2, seed, epoch, 0, 1).shards for seed, epoch in ((7, 0), (7, 1), (8, 0))]
    assert len(set(map(tuple, orders))) == 3 and all(sorted(order) == list(range(SHARDS)) for order in orders)
    reader = lanes.make_reader(manifest, VOCAB, ROW_TOKENS, "best_fit", 2)
    rows = lanes.lane_rows(reader, SEED, 0, SHARDS, [0, 0, 0], lanes.BadShards({}, 0, {"": SHARDS}))
    by_window: dict[int, list] = {}
    for _, (window, _) in zip(range(60), rows, strict=False):  # some shards come to this lane more than once
        every = lanes.Planned(window, slice(0, len(window)), np.arange(len(window)))
        block = lanes.write_out([every], ROW_TOKENS, VOCAB)
        by_window.setdefault(int(block.ids[block.segments > 0].astype(int).sum()), []).append(block.ids.tolist())
    repeated = [blocks for blocks in by_window.values() if len(blocks) > 1 and len(blocks[0]) > 3]
    assert repeated and all(blocks[0] != blocks[1] for blocks in repeated)


def test_another_seed_gives_another_order(manifest, reference):
    batch = BatchConfig(ROW_TOKENS, GLOBAL_ROWS, GLOBAL_ROWS)
    with train_batches(manifest, VOCAB, data_config(), batch, SEED + 1, 0, 1) as batches:
        assert rows_of(next(batches)) != reference[:GLOBAL_ROWS]


def test_row_keys_name_rows(reference):
    assert len({key for _, _, key, _ in reference}) == len(reference)


def test_resume_reads_only_the_window_it_stands_in(manifest, monkeypatch):
    with open_rank(manifest, 0, 1, 8) as batches:
        cursor = [next(batches).cursor for _ in range(60)][-1]
    read = []
    real = lanes.read_records
    monkeypatch.setattr(lanes, "read_records", lambda *place: (read.append(place[1:4]), real(*place))[1])
    with open_rank(manifest, 0, 1, 4, cursor) as batches:
        next(batches)
    assert len(read) == LANES and all(count <= 2 for _, _, count in read)


def test_windows_cover_each_shard_evenly(manifest):
    windows = list(lanes.windows_in_order(manifest, 4))
    for shard, info in enumerate(manifest.shards):
        mine = [window for window in windows if window.shard == shard]
        assert [record for w in mine for record in range(w.first, w.first + w.count)] == list(range(info.samples))
        assert max(w.count for w in mine) <= 4 and max(w.count for w in mine) - min(w.count for w in mine) <= 1


# ---- what a batch says


def test_a_batch_states_its_facts(tmp_path):
    """Type, shape, real positions, documents, and what may be masked: a special id inside a text may not."""
    documents = [[[np.array([10, 1, 11]), np.arange(20, 60)]]]  # 1 is [UNK]; the second document is 3 pieces
    small = write(tmp_path, documents, VOCAB)
    with open_rank(small, 0, 1, 4, lanes=1) as batches:
        batch = next(batches)
    assert (batch.ids.dtype, batch.segments.dtype, batch.maskable.dtype) == (torch.int32, torch.int16, torch.int32)
    assert (batch.row_keys.dtype, batch.sources.dtype) == (torch.int64, torch.int16)
    assert batch.ids.shape == batch.segments.shape == (4, ROW_TOKENS)
    assert batch.tokens == int((batch.segments > 0).sum()) == 3 + 40 + 4 * 2
    assert (batch.text, batch.documents, batch.opened) == (3 + 40, 2, 3 + 40)
    assert batch.row_tokens.dtype == torch.int32 and torch.equal(batch.row_tokens, (batch.segments > 0).sum(1))
    special = torch.isin(batch.ids, torch.tensor(VOCAB.special_ids, dtype=torch.int32))
    assert torch.equal(batch.maskable, (~special).sum(1, dtype=torch.int32))
    assert int(batch.maskable.sum()) == 2 + 40


def test_documents_add_up_over_an_epoch(manifest):
    total = 0
    with open_rank(manifest, 0, 1, 1, lanes=1) as batches:
        for batch in batches:
            total += batch.documents
            if batch.cursor["lanes"] == [[1, 0, 0]]:
                break
    assert total == manifest.documents


def test_pad_mode_puts_one_piece_in_a_row(manifest):
    with open_rank(manifest, 0, 1, 50, packing="pad") as batches:
        batch = next(batches)
    assert batch.segments.max() == 1 and batch.segments[:, 0].min() == 1


def test_large_vocabularies_keep_their_ids(tmp_path):
    vocab = make_vocab(200_000)
    large = write(tmp_path, [[[document + 100_000 for document in record] for record in DOCUMENTS[0]]], vocab)
    assert large.dtype == "uint32"
    batch = BatchConfig(ROW_TOKENS, 4, 4)
    with train_batches(large, vocab, data_config(lanes=1, workers=1), batch, SEED, 0, 1) as batches:
        ids = next(batches).ids
    assert ids.max() > 100_000 and ids.dtype == torch.int32


# ---- what is refused


@pytest.mark.parametrize(
    ("setting", "world", "expected"),
    [
        ({"lanes": 3}, 2, "data.lanes = 3 can't be shared evenly by 2 ranks; lanes that work here: 2, 4"),
        ({"lanes": 9}, 1, "data.lanes = 9 exceeds the 8 shards; lanes that work here: 5, 6, 7, 8"),
        ({"lanes": None}, 3, "data.lanes = 8 can't be shared evenly by 3 ranks; lanes that work here: 3, 6"),
    ],
)
def test_lanes_that_cannot_be_shared_are_refused_with_those_that_can(manifest, setting, world, expected):
    with pytest.raises(ConfigError) as refused:
        open_rank(manifest, 0, world, 1, **setting)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("shards", "world", "expected"),
    [
        (1, 2, "1 shard can't feed 2 ranks, each of which needs one of its own: build them from more text, or where"),
        (8, 9, "8 shards can't feed 9 ranks, each of which needs one of its own: build them from more text, or where"),
        (64, 65, "64 shards can't feed 65 ranks, each of which needs one of its own: build them again with lower --sh"),
    ],
)
def test_too_few_shards_are_refused_with_what_can_be_done(shards, world, expected):
    with pytest.raises(ConfigError) as refused:
        lanes.resolve_lanes(shards, None, world)
    assert str(refused.value).startswith(expected)
    assert str(refused.value).endswith(", or start fewer ranks (on CPUs: CPU_RANKS=1 launch/local.sh ...)")


def test_more_lanes_than_one_shard_are_refused_in_the_singular():
    with pytest.raises(ConfigError, match=r"^data.lanes = 2 exceeds the 1 shard; lanes that work here: 1$"):
        lanes.resolve_lanes(1, 2, 1)


@pytest.mark.parametrize(("shards", "expected"), [(1, 1), (2, 2), (3, 2), (63, 32), (64, 64), (10_000, 64)])
def test_lanes_default_to_a_power_of_two(shards, expected):
    assert lanes.resolve_lanes(shards, None, 1) == expected


def test_a_cursor_of_another_number_of_lanes_is_refused(manifest):
    with open_rank(manifest, 0, 1, 4, lanes=2) as batches:
        cursor = next(batches).cursor
    with pytest.raises(ConfigError, match=r"began with 2 lanes, not 4: set data.lanes back"):
        open_rank(manifest, 0, 1, 4, cursor)


def test_another_tokenizer_is_refused(manifest):
    with pytest.raises(ConfigError, match="the tokenizer does not match the shards"):
        train_batches(manifest, make_vocab(60_001), data_config(), BatchConfig(16, 4, 4), SEED, 0, 1)
    with pytest.raises(ConfigError, match="the tokenizer does not match the shards"):
        next(held_out_batches(manifest, make_vocab(60_001), data_config(), BatchConfig(16, 4, 4), 0, 1))


def test_an_id_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    write_split(tmp_path, [[Record(np.array([10, 60_000]), np.array([2]))]], VOCAB.size, VOCAB.fingerprint)
    with open_rank(load_manifest(tmp_path), 0, 1, 1, lanes=1) as batches:
        said = r"000000.tar: holds token id 60000, and the tokenizer only has 60000 ids"
        with pytest.raises(ShardError, match=said) as refused:
            next(batches)
    assert refused.value.reason == "foreign_ids"


def test_shards_without_a_token_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="hold no tokens"):
        open_rank(write_split(tmp_path, [], VOCAB.size, VOCAB.fingerprint), 0, 1, 1, lanes=1)


# ---- damage


def truncate(shard: Path, data: bytearray) -> None:
    shard.write_bytes(data[: len(data) // 2])


def flip_payload(shard: Path, data: bytearray) -> None:
    data[512 + 3] ^= 1
    shard.write_bytes(data)


def flip_header(shard: Path, data: bytearray) -> None:
    data[2048 + 150] ^= 1  # the checksum of the second record's first header
    shard.write_bytes(data)


def delete(shard: Path, data: bytearray) -> None:
    shard.unlink()


def empty(shard: Path, data: bytearray) -> None:
    shard.write_bytes(b"")


def remove_members(shard: Path, data: bytearray) -> None:
    shard.write_bytes(bytes(10_240))  # as `tar -cf` writes it of no files


def edit_members(shard: Path, edit) -> None:
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in edit(members):
            tar.addfile(member, io.BytesIO(content))


def drop_member(shard: Path, data: bytearray) -> None:
    edit_members(shard, lambda members: members[:1] + members[2:])


def reorder_members(shard: Path, data: bytearray) -> None:
    edit_members(shard, lambda members: [*members[:4:2], *members[1:4:2], *members[4:]])


def swap_records(shard: Path, data: bytearray) -> None:
    shard.write_bytes(data[2048:4096] + data[:2048] + data[4096:])


def plant_code(shard: Path, data: bytearray) -> None:
    """A member that creates the file RAN where it is unpickled."""
    member, payload = tarfile.TarInfo("00000000.pyd"), pickle.dumps(Payload(shard.parent / "RAN"))
    member.size = len(payload)
    edit_members(shard, lambda members: [*members[:2], (member, payload), *members[2:]])


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


REASONS = {
    truncate: "truncated",
    flip_payload: "altered",
    flip_header: "altered",
    delete: "missing",
    empty: "empty",
    remove_members: "empty",
    drop_member: "malformed",
    reorder_members: "malformed",
    swap_records: "malformed",
    plant_code: "foreign_member",
}
DAMAGES = list(REASONS)


def damage(manifest: Manifest, shard: int, how) -> str:
    path = manifest.path / manifest.shards[shard].name
    how(path, bytearray(path.read_bytes()))
    return path.name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_bad_shard_ends_the_run_and_is_named(own_manifest, how, workers):
    name = damage(own_manifest, 3, how)
    with open_rank(own_manifest, 0, 1, 4, workers=workers) as batches:
        with pytest.raises(ShardError, match=name):
            for _ in range(200):
                next(batches)


@pytest.mark.parametrize("how", DAMAGES)
def test_within_the_budget_a_bad_shard_is_skipped_and_reported(own_manifest, how):
    name = damage(own_manifest, 3, how)
    delivered, seen = [], {}
    with open_rank(own_manifest, 0, 1, 1, lanes=1, max_bad_shards=1) as batches:
        for batch in batches:
            delivered += pieces(batch)
            assert seen.items() <= batch.bad_shards.items()
            seen = batch.bad_shards
            if batch.cursor["lanes"][0][0] == 1:
                break
    assert seen == batch.cursor["bad_shards"] == {name: REASONS[how]}
    assert not (own_manifest.path / "RAN").exists()
    missing = sorted((Counter(expected_pieces(list(range(SHARDS)))) - Counter(delivered)).elements())
    assert Counter(delivered) <= Counter(expected_pieces(list(range(SHARDS))))
    if how is truncate:  # the windows before the cut were delivered
        assert missing and set(missing) < set(expected_pieces([3]))
    else:  # the rest of the shard is not trusted either
        assert missing == expected_pieces([3])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_with_a_bad_shard_survives_a_resume_and_any_workers(own_manifest, workers):
    damage(own_manifest, 3, truncate)
    with open_rank(own_manifest, 0, 1, 4, max_bad_shards=1) as batches:
        whole = list(itertools.islice(batches, 80))
    assert whole[-1].bad_shards
    for stop in (1, 20, 41):
        with open_rank(own_manifest, 0, 1, 4, whole[stop - 1].cursor, max_bad_shards=1, workers=workers) as batches:
            for expected, batch in zip(whole[stop:], batches, strict=False):
                assert rows_of(batch) == rows_of(expected)
                assert batch.cursor["lanes"] == expected.cursor["lanes"]
    assert batch.bad_shards == whole[-1].bad_shards


def test_a_cursor_that_lists_bad_shards_without_reasons_still_loads(own_manifest):
    name = damage(own_manifest, 3, delete)
    with open_rank(own_manifest, 0, 1, 4, max_bad_shards=1) as batches:
        whole = list(itertools.islice(batches, 60))
    earlier = whole[39].cursor | {"bad_shards": [name]}
    with open_rank(own_manifest, 0, 1, 4, upgraded(earlier), max_bad_shards=1) as batches:
        for expected, batch in zip(whole[40:], batches, strict=False):
            assert rows_of(batch) == rows_of(expected)
    assert batch.bad_shards == {name: "unreadable"}
    assert upgraded(whole[39].cursor) == whole[39].cursor


def test_a_window_that_goes_bad_between_its_rows_loses_no_other(own_manifest):
    """The cursor stands inside a window that can't be read any more: the next shard is delivered from its first row."""
    with open_rank(own_manifest, 0, 1, 1, lanes=1) as batches:
        cursor = [next(batches).cursor for _ in range(3)][-1]
    assert cursor["lanes"] == [[0, 0, 3]]
    order = lanes.LaneEpoch(own_manifest, 2, SEED, 0, 0, 1)
    damage(own_manifest, order[0].shard, flip_payload)
    delivered = []
    with open_rank(own_manifest, 0, 1, 1, cursor, lanes=1, max_bad_shards=1) as batches:
        for batch in batches:
            delivered += pieces(batch)
            if batch.cursor["lanes"][0][0] == 1:
                break
    assert sorted(delivered) == expected_pieces([shard for shard in range(SHARDS) if shard != order[0].shard])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_spent_budget_ends_the_run(own_manifest, workers):
    names = [damage(own_manifest, shard, delete) for shard in (0, 1, 2)]
    with open_rank(own_manifest, 0, 1, 4, max_bad_shards=2, workers=workers) as batches:
        with pytest.raises(ShardError) as ended:
            for _ in range(400):
                next(batches)
    assert any(name in str(ended.value) for name in names)


def test_the_budget_is_one_for_all_workers(own_manifest):
    for lane in (0, 1):  # of two workers, each with one bad shard
        damage(own_manifest, lanes.LaneEpoch(own_manifest, 2, SEED, 0, lane, LANES).shards[0], delete)
    with open_rank(own_manifest, 0, 1, 4, max_bad_shards=1, workers=4) as batches, pytest.raises(ShardError):
        next(batches)


def test_bad_shards_of_all_ranks_are_in_the_merged_cursor(own_manifest):
    bad = [lanes.LaneEpoch(own_manifest, 2, SEED, 0, lane, LANES).shards[0] for lane in (0, 1)]
    names = [damage(own_manifest, shard, delete) for shard in bad]
    cursors = []
    for rank in range(2):
        with open_rank(own_manifest, rank, 2, 2, max_bad_shards=1) as batches:
            cursors.append(next(batches).cursor)
    assert [cursor["bad_shards"] for cursor in cursors] == [{names[0]: "missing"}, {names[1]: "missing"}]
    assert merge_cursors(cursors)["bad_shards"] == dict.fromkeys(sorted(names), "missing")


def test_the_budget_is_not_renewed_by_a_resume(own_manifest):
    damage(own_manifest, 0, delete)
    with open_rank(own_manifest, 0, 1, 1, max_bad_shards=1) as batches:
        cursor = next(batch.cursor for batch in batches if batch.bad_shards)
    damage(own_manifest, 1, delete)
    with open_rank(own_manifest, 0, 1, 1, cursor, max_bad_shards=1) as batches:
        with pytest.raises(ShardError, match=r"000001.tar"):
            for _ in range(400):
                next(batches)


def test_no_budget_lets_a_run_go_on_without_any_shard(own_manifest):
    for shard in range(SHARDS):
        damage(own_manifest, shard, delete)
    with open_rank(own_manifest, 0, 1, 1, max_bad_shards=1000) as batches, pytest.raises(ShardError):
        next(batches)


# ---- workers


def children() -> list:
    return multiprocessing.active_children()


def test_closing_ends_the_workers_at_once(manifest):
    batches = open_rank(manifest, 0, 1, 4, workers=3)
    next(batches)
    assert len(children()) == 3
    started = time.perf_counter()
    batches.close()
    batches.close()  # a second time is no harm
    assert time.perf_counter() - started < 3 and not children()


@pytest.mark.slow
def test_closing_ends_a_worker_that_is_stuck(manifest, monkeypatch):
    monkeypatch.setattr(lanes, "read_records", lambda *place: time.sleep(600))
    batches = open_rank(manifest, 0, 1, 4, workers=1)
    time.sleep(0.5)
    batches.close()
    for process in children():
        process.join(5)
    assert not children()


def test_no_more_workers_than_lanes_are_started(manifest):
    with open_rank(manifest, 0, 2, 4, workers=8):
        assert len(children()) == LANES // 2


def test_an_exception_on_its_way_does_not_keep_the_workers(manifest):
    with pytest.raises(KeyError):
        with open_rank(manifest, 0, 1, 4, workers=1) as batches:
            next(batches)
            raise KeyError
    assert not children()


def be_killed_with_workers(shards: Path, told: Path) -> None:
    """A rank whose workers' blocks fill their pipes, which nobody reads then and which they keep open themselves."""
    batch = BatchConfig(seq_len=2048, global_rows=4, micro_rows=4)
    batches = train_batches(load_manifest(shards), VOCAB, data_config(workers=2), batch, SEED, 0, 1)
    next(batches)
    time.sleep(0.5)
    told.write_text(json.dumps([child.pid for child in children()]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_leaves_no_workers(manifest, tmp_path):
    # not forked: the threads of this process's torch would be missing there
    rank = multiprocessing.get_context("spawn").Process(
        target=be_killed_with_workers, args=(manifest.path, tmp_path / "workers")
    )
    rank.start()
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL
    workers = json.loads((tmp_path / "workers").read_text())
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "the workers of a killed rank are there still"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # what ended may wait for init
    except FileNotFoundError:
        return False


def test_signals_to_the_group_leave_the_workers_alone(manifest, reference):
    with open_rank(manifest, 0, 1, 4, workers=2) as batches:
        taken = rows_of(next(batches))
        for worker, number in itertools.product(children(), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
            os.kill(worker.pid, number)
        for _ in range(29):
            taken += rows_of(next(batches))
        assert taken == reference[:120]


def test_a_worker_that_dies_is_an_error_not_a_hang(manifest):
    with open_rank(manifest, 0, 1, 4, workers=1) as batches:
        next(batches)
        os.kill(children()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            for _ in range(100):
                next(batches)


def test_the_global_random_state_is_left_alone(manifest):
    before = torch.get_rng_state()
    with open_rank(manifest, 0, 1, 4, workers=1) as batches:
        next(batches)
    assert torch.equal(torch.get_rng_state(), before)


# ---- held-out rows


def held_out(manifest: Manifest, world: int, max_rows: int | None = None, **settings) -> list[list[Batch]]:
    batch = BatchConfig(ROW_TOKENS, 5 * world, 5)
    config = data_config(**settings)
    return [list(held_out_batches(manifest, VOCAB, config, batch, rank, world, max_rows)) for rank in range(world)]


def real_rows(ranks: list[list[Batch]]) -> list[Row]:
    return sorted(row for rank in ranks for batch in rank for row in rows_of(batch) if any(row[1]))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("max_rows", [None, 1, 5, 37, 10_000])
def test_held_out_rows_are_the_same_for_any_world(manifest, world, max_rows):
    expected = real_rows(held_out(manifest, 1))
    ranks = held_out(manifest, world, max_rows)
    assert len({len(rank) for rank in ranks}) == 1  # a model sharded over the ranks runs on all or on none
    rows = real_rows(ranks)
    if max_rows is None or max_rows >= len(expected):
        assert rows == expected
        delivered = sorted(piece for rank in ranks for batch in rank for piece in pieces(batch))
        assert delivered == expected_pieces(list(range(SHARDS)))
    else:
        assert rows == real_rows(held_out(manifest, 1, max_rows)) and len(rows) == max_rows
    assert len({key for _, _, key, _ in rows}) == len(rows)


def test_the_last_held_out_batch_is_filled_with_padding(manifest):
    (batches,) = held_out(manifest, 1, max_rows=7)
    last = batches[-1]
    assert len(batches) == 2 and last.ids.shape == (5, ROW_TOKENS)
    assert last.maskable[2:].tolist() == [0, 0, 0] and not last.segments[2:].any()
    assert (last.ids[2:] == VOCAB.pad_id).all()
    assert sum(batch.tokens for batch in batches) == int(sum((batch.segments > 0).sum() for batch in batches))


def test_one_shard_is_enough_for_held_out_rows(tmp_path):
    one = write(tmp_path, DOCUMENTS[:1], VOCAB)
    assert real_rows(held_out(one, 4)) == real_rows(held_out(one, 1)) != []


def test_held_out_rows_do_not_forgive_a_bad_shard(own_manifest):
    name = damage(own_manifest, 2, flip_payload)
    with pytest.raises(ShardError, match=name):
        held_out(own_manifest, 1, max_bad_shards=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_shard_ends_a_run_when_its_rows_are_due_and_no_sooner(own_manifest, workers):
    """Blocks are planned ahead of the rows that are wanted: what stands before the bad one is delivered."""
    with open_rank(own_manifest, 0, 1, 1) as batches:
        whole = [rows_of(next(batches)) for _ in range(200)]
    damage(own_manifest, 3, truncate)
    with open_rank(own_manifest, 0, 1, 1, max_bad_shards=1) as batches:
        due = next(row for row, batch in enumerate(batches) if rows_of(batch) != whole[row])
    delivered = []
    with open_rank(own_manifest, 0, 1, 1, workers=workers) as batches, pytest.raises(ShardError):
        delivered.extend(map(rows_of, batches))
    assert 0 < due < 200 and delivered == whole[:due]
