"""How far the sources are read. The cursors themselves are held by test_stream.py and test_mixture.py."""

import pytest
from test_mixture import SOURCES, write_sources
from test_stream import ROW_TOKENS, SEED, VOCAB, data_config

from mlm_dist.batch_size import BatchConfig
from mlm_dist.cursor import Progress
from mlm_dist.mixture import Sources
from mlm_dist.stream import train_batches


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_sources(tmp_path_factory.mktemp("sources"))


def by_rank(sources: Sources, world: int, steps: int, packing: str = "best_fit") -> list[list[list[float]]]:
    """What each rank counts after each of so many steps of eight rows, by source."""
    batch, seen = BatchConfig(ROW_TOKENS, 8, 8 // world), []
    for rank in range(world):
        data = data_config(packing=packing)
        with train_batches(sources, VOCAB, data, batch, SEED, rank, world) as batches:
            progress = Progress(batches.mixture, SEED)
            seen.append([progress(next(batches).stand) for _ in range(steps)])
    return seen


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_epochs_are_the_share_of_the_documents_that_was_delivered(sources: Sources, packing: str) -> None:
    """Over several epochs of each source, by the tokens of text that its rows held."""
    batch, tokens, furthest = BatchConfig(ROW_TOKENS, 8, 8), [0] * len(sources), [0.0] * len(sources)
    with train_batches(sources, VOCAB, data_config(packing=packing), batch, SEED, 0, 1) as batches:
        progress = Progress(batches.mixture, SEED)
        for _ in range(200):
            taken = next(batches)
            for source, count in zip(taken.sources.tolist(), taken.maskable.tolist(), strict=True):
                tokens[source] += count
            epochs = progress(taken.stand)
            assert all(now >= before for now, before in zip(epochs, furthest, strict=True)), "it never goes back"
            furthest = epochs
    for source, count, told in zip(sources, tokens, epochs, strict=True):
        # a lane holds other shards in each epoch, of 3 to 6 records: lanes are not equally long
        assert told == pytest.approx(count / source.manifest.tokens, rel=0.1) and told > 1, source.name


def test_a_finished_epoch_counts_as_one(sources: Sources) -> None:
    data, batch = data_config(lanes=1), BatchConfig(ROW_TOKENS, 1, 1)
    with train_batches(sources[0].manifest, VOCAB, data, batch, SEED, 0, 1) as batches:
        progress, told = Progress(batches.mixture, SEED), [0.0]
        while (taken := next(batches)).cursor["lanes"] != [[1, 0, 0]]:
            told += progress(taken.stand)
    assert progress(taken.stand) == [1.0] and 0.98 < told[-1] < 1


def test_the_ranks_shares_add_up_to_what_one_rank_counts(sources: Sources) -> None:
    [alone], ranks = by_rank(sources, 1, 60), by_rank(sources, 4, 60)
    for step, expected in enumerate(alone):
        assert [sum(rank[step][source] for rank in ranks) for source in range(len(SOURCES))] == pytest.approx(expected)
