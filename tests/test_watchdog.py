"""A run that hangs ends, loudly: in processes of their own, since it ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import ROOT

from mlm_dist.watchdog import Watchdog, describe
from mlm_dist.world import EXIT_HANG

RANK = """
import sys, time, pathlib
from mlm_dist.watchdog import Watchdog
folder, rank, size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def waits_in_vain():
    print("waiting", flush=True)
    time.sleep(60)
print("ready", flush=True)
sys.stdin.readline()
with Watchdog(folder, rank, size, 1.0, lambda: (folder / "said").write_text(str(rank))) as dog:
    dog.beat("at step 7")
    waits_in_vain()
"""


def start(folder: Path, size: int) -> list[subprocess.Popen]:
    """Ranks that begin to wait at the same moment."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[sys.executable, "-c", RANK, str(folder), str(rank), str(size)] for rank in range(size)]
    ranks = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * size
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    assert [rank.stdout.readline() for rank in ranks] == ["waiting\n"] * size
    return ranks


def test_a_stopped_rank_is_named_and_the_others_show_their_stacks(tmp_path: Path) -> None:
    ranks = start(tmp_path, 3)
    time.sleep(0.3)  # all of them have given a sign
    os.kill(ranks[0].pid, signal.SIGSTOP)
    try:
        for rank in (1, 2):
            said = ranks[rank].communicate(timeout=30)[1]
            assert ranks[rank].returncode == EXIT_HANG
            assert f"rank {rank}, at step 7" in said and "in waits_in_vain" in said
            assert ("rank 0 doesn't answer" in said) == (rank == 1), "said once"
        assert (tmp_path / "said").read_text() == "1"
    finally:
        ranks[0].kill()


def test_a_rank_that_nobody_listens_to_ends_too(tmp_path: Path) -> None:
    [rank] = start(tmp_path, 1)
    rank.stderr.close()
    rank.stdout.close()
    assert rank.wait(timeout=30) == EXIT_HANG
    assert (tmp_path / "said").read_text() == "0"


def test_where_all_answer_nobody_is_blamed(tmp_path: Path) -> None:
    ranks = start(tmp_path, 2)
    said = [rank.communicate(timeout=30)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_HANG, EXIT_HANG]
    assert "every rank answers" in said[0] and "every rank answers" not in said[1]


def test_progress_keeps_it_quiet_and_it_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 0.4) as dog:
        for step in range(8):
            time.sleep(0.1)
            dog.beat(f"at step {step}")
    assert list((tmp_path / "alive").iterdir()) == []


def test_many_silent_ranks_are_not_all_written_out() -> None:
    assert "ranks 1, 2, 3" in describe(5, {0: ""}, 64) and "and 47 more" in describe(5, {0: ""}, 64)


def test_a_stall_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    told = []
    with Watchdog(tmp_path, 0, 1, 4.0) as dog:
        dog.watch_stalls(0.5, lambda doing, seconds: told.append((doing, seconds)))
        for step in (7, 8):
            dog.beat(f"at step {step}")
            time.sleep(1.4)
        for _ in range(5):
            dog.beat("at step 9")
            time.sleep(0.2)
    assert [doing for doing, _ in told] == ["at step 7", "at step 8"]
    assert all(0.5 <= seconds < 1.4 for _, seconds in told)
