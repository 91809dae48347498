"""Rows written as files of every format, and read back as plain lists."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

FORMATS = ["parquet", "arrow", "jsonl", "tar", "safetensors"]


def rows_of(start, stop):
    """Plain rows; the text is of several lengths, and now and then there is none."""
    return [
        {
            "i": i,
            "text": None if i % 11 == 5 else f"row {i} " * (i % 4) + "ä\n",
            "tags": [str(i)] * (i % 3),
        }
        for i in range(start, stop)
    ]


def parquet(rows, group=7):
    """A Parquet file with row groups of `group` rows."""
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, out, row_group_size=group, write_page_checksum=True)
    return out.getvalue()


def arrow(rows, batch=7, kind=pa.ipc.new_file):
    """An Arrow file, or stream, with record batches of `batch` rows."""
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with kind(out, table.schema) as writer:
        for each in table.to_batches(batch):
            writer.write_batch(each)
    return out.getvalue()


def jsonl(rows):
    """JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar(rows):
    """A tar with two members a sample: the row as JSON, and its number as text."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for row in rows:
            parts = {"json": json.dumps(row), "cls": str(row["i"])}
            for name, text in parts.items():
                member = tarfile.TarInfo(f"part/{row['i']:05d}.{name}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def safetensors(rows):
    """Two tensors whose leading dimension are the rows."""
    i = torch.tensor([row["i"] for row in rows])
    return save({"i": i, "x": i[:, None] * torch.ones(3, dtype=torch.bfloat16)})


def bytes_of(form, rows):
    """A whole file of that format."""
    return globals()[form](rows)


def plain(form, item):
    """An item as the row that was written; of safetensors, its number."""
    if form == "tar":
        row = json.loads(item["json"])
        assert item["__key__"] == f"part/{row['i']:05d}"
        assert item["cls"].decode() == str(row["i"])
        return row
    if form == "safetensors":
        assert torch.equal(item["x"], item["i"] * torch.ones(3, dtype=torch.bfloat16))
        return int(item["i"])
    return item


def wanted(form, rows):
    """What `plain` gives of the items."""
    return [row["i"] for row in rows] if form == "safetensors" else rows
