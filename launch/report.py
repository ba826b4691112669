"""Write a run's curves, predictions and facts as one HTML file, or those of several runs over one another.

The file needs nothing else to be looked at: no network, no W&B. A run that goes on can be looked at too.

python launch/report.py runs/quickstart
python launch/report.py runs/base runs/other --out compared.html
"""

import argparse
from pathlib import Path

import _cli

from mlm_dist import report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, the run.dir of a training run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"HTML file to write (default: RUN/{report.FILE} of one run, {report.FILE} here for several)",
    )
    args = parser.parse_args()
    out = args.out or (args.runs[0] / report.FILE if len(args.runs) == 1 else Path(report.FILE))
    size = report.write(args.runs, out)
    print(f"{out}  ({size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    _cli.run(main)
