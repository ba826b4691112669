"""Each rank's own log file, RUN/logs/rank_00000.log: what it says, and what the libraries under it say.

Of the libraries only warnings come to the console, where nobody asked for more.
"""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_dist.redaction import REDACTED

SHORTEST_SECRET = 6  # characters: shorter ones stand in ordinary text as well

LIBRARIES = ("DeepSpeed", "torch", "transformers", "wandb")  # loggers; of the first one's words all are kept

# What a run says on the console, which comes to the file as well.
said = logging.getLogger("mlm_dist.said")
said.propagate = False


class Discreet(logging.Formatter):
    """Leaves out secrets: libraries print configurations as a whole."""

    def __init__(self, secrets: Collection[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self.secrets = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self.secrets:
            text = text.replace(secret, REDACTED)
        return text


@contextmanager
def logs(folder: Path, rank: int, verbose: bool, secrets: Collection[str]) -> Iterator[None]:
    """This rank's log, kept while the `with` block runs. An exception that leaves the block stands in it.

    secrets: texts that must not stand in it
    """
    (folder / "logs").mkdir(exist_ok=True)
    file = logging.FileHandler(folder / "logs" / f"rank_{rank:05d}.log", encoding="utf-8")
    file.setFormatter(Discreet(secrets))
    file.handleError = lambda record: None  # a full disk: who writes what matters says so
    console = logging.StreamHandler()
    root, libraries = logging.getLogger(), [logging.getLogger(name) for name in LIBRARIES]
    for handler in (console, *(handler for library in libraries for handler in library.handlers)):
        handler.setLevel(logging.INFO if verbose else logging.WARNING)
    for logger in (root, said, *libraries) if verbose else (said, libraries[0]):
        logger.setLevel(logging.INFO)
    root.addHandler(console)
    listening = [logger for logger in (root, said, *libraries) if logger is root or not logger.propagate]
    for logger in listening:
        logger.addHandler(file)
    shown = warnings.showwarning
    if not verbose:  # of Python's own, which are for who writes the libraries
        warnings.showwarning = lambda text, kind, path, line, *_: said.warning(
            f"{path}:{line}: {kind.__name__}: {text}"
        )
    try:
        yield
    except Exception:
        said.exception("rank %d ends", rank)
        raise
    finally:
        warnings.showwarning = shown
        root.removeHandler(console)
        for logger in listening:
            logger.removeHandler(file)
        file.close()
