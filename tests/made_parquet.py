"""Parquet files of made-up images, for tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 16


def parquet_rows(count: int, classes: int = 3, first: int = 0) -> list[dict[str, Any]]:
    """Images whose grey value is their number."""
    rows = []
    for i in range(first, first + count):
        buffer = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{i}.png"}, "label": i % classes})
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
    """A file as Hugging Face datasets write it, with its class names if given."""
    table = pa.Table.from_pylist(rows)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
