"""What the launch scripts share: the package on the path, and one sentence with an exit code for every refusal."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
# DeepSpeed finds it out by itself too, when it is imported, but with a warning
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from mlm_dist.schema import ConfigError  # noqa: E402
from mlm_dist.world import EXIT_CONFIG_ERROR, exit_code_of  # noqa: E402

# how often launchers look after their ranks, and a little more
LAUNCHER_POLL_SECONDS = 2.0


def run(main: Callable[[], int], refusals: tuple[type[Exception], ...] = (ConfigError,)) -> None:
    """Exit with what `main` returns, or with 2 and one sentence where it raises one of the refusals."""
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException as error:
        code = exit_code_of(error, refusals)
        if code != EXIT_CONFIG_ERROR:
            traceback.print_exc()
        elif isinstance(error, refusals):
            refuse(str(error))
        else:
            refuse(f"no space left on the disk ({error.filename or 'while writing'}); make room and start again")
    with contextlib.suppress(OSError):  # where nobody listens any more
        sys.stdout.flush()
        sys.stderr.flush()
    # past what libraries do while the interpreter ends: gloo's threads abort there now and then, with another code; and
    # a checkpoint's thread would be waited for, on a disk that perhaps never answers
    os._exit(code)


def refuse(sentence: str) -> None:
    """Say what is wrong, once for all ranks where all of them found it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    else:
        # rank 0 says it for all; if this rank alone is at fault, the launcher has not ended it by then
        time.sleep(LAUNCHER_POLL_SECONDS)
        print(f"error on rank {rank}: {sentence}", file=sys.stderr, flush=True)
