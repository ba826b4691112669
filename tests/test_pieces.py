"""The map of ZeRO's flat tensors: as arithmetic here, against DeepSpeed's own tensors in test_optimizers.py."""

import pytest
import torch

from mlm_dist.pieces import Piece, slices, span, starts

SIZES = [7, 12, 1, 40, 5]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_ranks_pieces_hold_every_element_once(stage: int, ranks: int) -> None:
    wholes = [torch.arange(size) + 100 * number for number, size in enumerate(SIZES)]
    found = [torch.full((size,), -1) for size in SIZES]
    if stage == 2:
        length = -(-sum(SIZES) // ranks)
        flats = torch.cat([*wholes, torch.full((ranks * length - sum(SIZES),), -2)]).split(length)
        pieces = [span(SIZES, starts(SIZES), rank, length) for rank in range(ranks)]
    else:
        shares = [-(-size // ranks) for size in SIZES]
        padded = [
            torch.nn.functional.pad(w, (0, ranks * n - len(w)), value=-2) for w, n in zip(wholes, shares, strict=True)
        ]
        flats = [torch.cat([w.split(n)[rank] for w, n in zip(padded, shares, strict=True)]) for rank in range(ranks)]
        pieces = [slices(SIZES, rank, ranks) for rank in range(ranks)]
    for flat, mine in zip(flats, pieces, strict=True):
        assert len(mine) == len({p.number for p in mine})
        for piece in mine:
            assert piece.count > 0 and (piece.of_whole(found[piece.number]) == -1).all()
            piece.of_whole(found[piece.number]).copy_(piece.of(flat))
    assert all(torch.equal(f, w) for f, w in zip(found, wholes, strict=True))


def test_gaps_between_parameters_are_nobodys() -> None:
    assert span([3, 3], [0, 4], 0, 5) == [Piece(0, 0, 3, 0), Piece(1, 0, 1, 4)]
    assert span([3, 3], [0, 4], 1, 5) == [Piece(1, 1, 2, 0)]


def test_a_piece_is_cut_where_blocks_meet() -> None:
    assert Piece(3, 5, 20, 100).cut(10, 40) == [Piece(40, 5, 5, 100), Piece(41, 0, 10, 105), Piece(42, 0, 5, 115)]
    assert Piece(3, 10, 10, 0).cut(10, 0) == [Piece(1, 0, 10, 0)]
    assert Piece(3, 2, 3, 8).cut(30, 7) == [Piece(7, 2, 3, 8)]
