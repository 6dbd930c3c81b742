"""The files of a dataset cache: Arrow files of a few hundred encoded images each, and JSON lists of them.

A file gets its name after its bytes are fsynced.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from training.data.shards import Example
from training.io import write_file

Chunk = dict  # "rows", "bytes", "blake2b", "source_examples" (examples of the shard read by its end)

_CHUNK_ROWS, _CHUNK_BYTES = 512, 16_000_000
_SCHEMA = pa.schema([("bytes", pa.large_binary()), ("path", pa.string())])
_ATTRIBUTES = pa.field("attributes", pa.binary())  # third column, with data.attribute_columns


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a complete cache, or None."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "manifest.json").read_text())
    return None


def in_chunks(examples: Iterator[tuple[Example, int]]) -> Iterator[tuple[list[Example], int]]:
    """Groups examples for `write_chunk`; the numbers count the examples of the shard read so far."""
    pending, size, source_examples = [], 0, 0
    for example, source_examples in examples:  # noqa: B007 (the last one is used below)
        pending.append(example)
        size += len(example[0] or b"")
        if len(pending) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield pending, source_examples
            pending, size = [], 0
    if pending:
        yield pending, source_examples


def open_chunk(path: Path) -> pa.RecordBatch:
    """Maps a chunk into memory: columns bytes and path, and attributes if there are any."""
    with pa.memory_map(str(path)) as file:  # the mapping outlives the file handle
        return pa.ipc.open_file(file).get_batch(0)


def write_chunk(path: Path, examples: list[Example], source_examples: int) -> Chunk:
    """Writes examples of a shard; a resumed download starts at number `source_examples` of the shard."""
    schema = _SCHEMA if examples[0].attributes is None else _SCHEMA.append(_ATTRIBUTES)
    schema = schema.with_metadata({"source_examples": str(source_examples)})
    table = pa.record_batch(
        [pa.array(column, kind) for column, kind in zip(zip(*examples), schema.types)], schema=schema
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(table)
    data = sink.getvalue().to_pybytes()
    write_file(path, data)
    return describe_chunk(data, table)


def describe_chunk(data: bytes, table: pa.RecordBatch) -> Chunk:
    """The entry of a chunk in the lists."""
    return {
        "rows": table.num_rows,
        "bytes": len(data),
        "blake2b": hashlib.blake2b(data).hexdigest(),
        "source_examples": int(table.schema.metadata[b"source_examples"]),
    }
