"""Parquet and Arrow files → rows, a thousand at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatfine.data.encoding import lfs_pointer
from chatfine.data.rows import Row
from chatfine.errors import DataError
from chatfine.hub.lfs import is_pointer
from chatfine.i18n import t

_BATCH_ROWS = 1000
_ARROW_FILE = b"ARROW1"  # the other form, the stream, is what `datasets` writes


def read_columns(path: Path, shown: str) -> Iterator[Row]:
    """Rows of a parquet file, or of an Arrow file in either of its two forms.

    Raises:
        DataError: data-lfs-pointer, data-bad-parquet or data-bad-arrow.
    """
    import pyarrow as pa

    if is_pointer(path):
        raise lfs_pointer(path)
    parquet = path.suffix.lower() == ".parquet"
    number = 0
    try:
        for batch in _parquet_batches(path) if parquet else _arrow_batches(path):
            for values in batch.to_pylist():
                number += 1
                yield Row(shown, number, values)
    except (pa.ArrowException, OSError) as error:
        kind = "parquet" if parquet else "Arrow"
        raise DataError(
            f"data-bad-{kind.lower()}",
            t("{path} is not a readable {kind} file", path=path, kind=kind),
            where=f"{shown}:{number + 1}",
            why=str(error).splitlines()[0],
            fix=t("download or write the file again"),
        ) from None


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        whole = source.read(len(_ARROW_FILE)) == _ARROW_FILE
        source.seek(0)
        if whole:
            reader = pa.ipc.open_file(source)
            batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = pa.ipc.open_stream(source)
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)
