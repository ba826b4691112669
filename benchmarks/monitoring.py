"""What W&B costs a training run: `python benchmarks/monitoring.py --shards SHARDS`.

Trains the quickstart recipe in this process with W&B offline, and prints one line of JSON: the CPU time of W&B's thread
and of its own process, and the time that the loop spends in handing over its lines, as shares of the time of the steps.
The steps and their size are the quickstart's, a line each `log.every_steps`; its start and end are left out.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import wandb  # noqa: E402

from mlm_dist import config, train, world  # noqa: E402
from mlm_dist.mirror import Mirror  # noqa: E402
from mlm_dist.world import StopFlag  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")


class Clock:
    """Reads the clocks at each line of training that is handed over."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float, float]] = []  # wall clock, seconds of W&B's, seconds of handing over
        self.handing_over = 0.0

    def around(self, log: Any) -> Any:
        def timed(mirror: Mirror, record: dict) -> None:
            began = time.perf_counter()
            log(mirror, record)
            now = time.perf_counter()
            self.handing_over += now - began
            if "loss" in record:
                self.readings.append((now, cpu_of_wandb(mirror), self.handing_over))

        return timed

    def shares(self) -> dict[str, float]:
        """Of the time from the second line, when W&B is up, to the last."""
        first, last = self.readings[1], self.readings[-1]
        seconds, wandb_cpu, handing = (end - begin for begin, end in zip(first, last, strict=True))
        return {
            "seconds": round(seconds, 2),
            "wandb_cpu_percent": round(100 * wandb_cpu / seconds, 3),
            "loop_percent": round(100 * handing / seconds, 3),
        }


def cpu_of_wandb(mirror: Mirror) -> float:
    """CPU seconds of W&B's thread and of its processes."""
    total = cpu_seconds(Path(f"/proc/self/task/{mirror.thread.native_id}/stat"))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"wandb-core" in path.read_bytes():
                total += cpu_seconds(path.with_name("stat"))
        except OSError:
            continue  # it has just ended
    return total


def cpu_seconds(stat: Path) -> float:
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="a folder that shards/build.py made")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of configs/quickstart.yaml")
    args = parser.parse_args()
    clock = Clock()
    Mirror.log = clock.around(Mirror.log)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.shards={args.shards}", f"run.dir={folder}/run", f"run.steps={args.steps}"]
        cfg = config.load(ROOT / "configs/quickstart.yaml", [*overrides, "log.wandb=offline", *args.overrides])
        with world.join(600) as here, StopFlag() as stop:
            assert train.train_on(cfg, here, stop) == 0
    versions = {"python": platform.python_version(), "wandb": wandb.__version__}
    said = {"benchmark": "monitoring", "steps": args.steps, "lines": len(clock.readings), **clock.shares()}
    print(json.dumps(said | {"cores": len(os.sched_getaffinity(0)), "versions": versions}), flush=True)
    os._exit(0)  # past gloo's threads


if __name__ == "__main__":
    main()
