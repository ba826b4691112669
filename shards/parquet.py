"""The texts of a .parquet file, a few rows at a time: pyarrow is imported here alone, and only where there is one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mlm_dist.schema import ConfigError

ROWS = 1024  # read at once, at most
READ_BYTES = 1 << 20


@contextlib.contextmanager
def whole(file: Path) -> Iterator[None]:
    """Turns what pyarrow says of a damaged file into a ConfigError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
            raise
        raise ConfigError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def row_group_bytes(file: Path) -> list[int]:
    """The size of each row group, about as it lies on the disk."""
    with whole(file):
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [
            sum(group.column(column).total_compressed_size for column in range(metadata.num_columns))
            for group in groups
        ]


def rows(file: Path, raw: BinaryIO, key: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(row, text as UTF-8) of the row groups `start` ... `stop - 1`, rows counted from 1 over the whole file.

    Memory: a row group is not held whole, only about 1 MiB of it. Raises ConfigError for a damaged file, a file without
    a column of text named `key`, and a row without a text.
    """
    with whole(file):
        opened = pq.ParquetFile(raw, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)
        metadata = opened.metadata
        column = column_of(file, opened, key)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    first = 1 + sum(group.num_rows for group in groups[:start])
    for number, group in list(enumerate(groups))[start:stop]:
        size = max(1, group.column(column).total_uncompressed_size)
        count = min(ROWS, max(1, READ_BYTES * group.num_rows // size))
        with whole(file):
            batches = opened.iter_batches(count, row_groups=[number], columns=[key], use_threads=False)
            for batch in batches:
                texts = batch.column(0).cast(pa.large_string()).cast(pa.large_binary())
                for row, text in enumerate(texts.to_pylist(), first):
                    if text is None:
                        raise ConfigError(f"{file}, row {row} has no text under {key!r}: it is null; see --text-key")
                    yield row, text
                first += len(texts)


def column_of(file: Path, opened: pq.ParquetFile, key: str) -> int:
    """The number of the column of text named `key`, among the file's leaf columns."""
    schema = opened.schema_arrow
    if schema.names.count(key) == 1:
        kind = schema.field(key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            return [opened.schema.column(i).path for i in range(len(opened.schema))].index(key)
    held = ", ".join(f"{field.name!r} ({field.type})" for field in list(schema)[:8]) or "no columns"
    raise ConfigError(f"{file} has no text under {key!r}: it has {held}; see --text-key")
