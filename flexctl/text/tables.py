"""Tables of text: a row of a .csv, .tsv or .parquet file is a document. Memory holds a few rows at a time.

Neither goes through the ``datasets`` library: its reader of .parquet holds a whole row group, and its reader of .csv
drops what stands after a comma that is not quoted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from flexctl.errors import UsageError

__all__ = ["missing_field", "read_csv", "read_parquet"]

_ROWS = 64
_PAGE_BYTES = 65_536
_CELL_CHARACTERS = 1 << 28
_SHOWN = 12
_QUOTING = 'text with a separator, a quote or a line break stands in "...", and a quote inside is doubled'


def read_csv(stream: io.BufferedIOBase, name: str, field: str, *, separator: str = ",") -> Iterator[str]:
    """Yield the field of each row; the first line names the fields.

    Args:
        stream: The file's bytes, UTF-8.
        name: Of the file, for errors.
        field: Which holds the text.
        separator: Between fields.

    Raises:
        UsageError: The field is missing, quotes do not match, a row has too many fields or too few, or it is not UTF-8.
    """
    csv.field_size_limit(_CELL_CHARACTERS)
    lines = io.TextIOWrapper(cast(BinaryIO, stream), "utf-8-sig", newline="")
    rows = csv.reader(lines, delimiter=separator, strict=True)
    try:
        header = next(rows, [field])
        if field not in header:
            raise missing_field(name, field, header, "column")
        index = header.index(field)
        for row in rows:
            if row and len(row) != len(header):
                where = f"{name}, line {rows.line_num}"
                raise UsageError(f"{where}: {len(row)} fields, where the first line names {len(header)}", hint=_QUOTING)
            if row:
                yield row[index]
    except csv.Error as error:
        raise UsageError(f"{name}, line {rows.line_num}: {error}", hint=_QUOTING) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not UTF-8 after line {rows.line_num}", hint="convert it") from error
    finally:
        lines.detach()  # the stream is the caller's to close


def read_parquet(stream: io.BufferedIOBase, name: str, field: str) -> Iterator[str]:
    """Yield the field of each row where it is not null; of other columns nothing is read.

    Args:
        stream: The file's bytes; it can seek.
        name: Of the file, for errors.
        field: Which column holds the text.

    Raises:
        UsageError: The column is missing or holds no strings, or the file is broken.
    """
    from pyarrow import ArrowException, parquet

    try:
        # Without these two, pyarrow reads all of a row group before the first row.
        with parquet.ParquetFile(stream, pre_buffer=False, buffer_size=_PAGE_BYTES) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise missing_field(name, field, names, "column")
            kind = table.schema_arrow.field(names.index(field)).type
            if not _is_text(kind):
                raise UsageError(f"{name}: column {field!r} holds {kind}, not text", hint="name it by `text_field`")
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field], use_threads=False):
                yield from filter(None, batch.column(0).to_pylist())
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name}: cannot be read: {reason}") from error


def missing_field(where: str, field: str, there: Iterable[str], kind: str) -> UsageError:
    """Return the error that a field is not there, naming those that are.

    Args:
        where: The file, and the line where that matters.
        field: What was asked for.
        there: Names that are there.
        kind: What a field is called in this kind of file.
    """
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in there]
    shown = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
    return UsageError(f"{where}: no {kind} {field!r}; there are {shown or 'none'}", hint="name it by `text_field`")


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    return any(check(value) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))
