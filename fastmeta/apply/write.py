"""Tables on disk."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ..checkpoint import atomic_write


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of one set of columns, written beside the path and then renamed over it."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def write_text(path: Path, text: str) -> None:
    """A text file, all of it or nothing."""
    atomic_write(path, lambda beside: beside.write_text(text, encoding="utf-8", newline=""))
