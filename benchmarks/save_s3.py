"""Saving a model with its AdamW to S3, beside a plain upload and torch's own writer.

    python benchmarks/save_s3.py [--rounds 5] [--mib 840]

The server is moto, in a process of its own on this machine; it is the slowest part, so
this says how well uploads keep it busy, not how fast S3 is. The first row is the limit:
boto3's concurrent multipart upload of as many bytes from memory.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import time

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
}
import boto3
import compare
import torch
import torch.distributed.checkpoint as dcp
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError
from save import locals_of, made, tensors
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

import accelx as ax
from accelx.testing import run

torch.set_num_threads(1)
GOALS = {"accelx": "at most 1.11", "DCP FsspecWriter": "at least twice accelx's"}
SERVE = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
time.sleep(1e6)
"""


def saving(env, rounds, mib):
    """Seconds of each way to the same bucket, which is emptied between them."""
    client = boto3.client("s3")
    state = made(env, mib)
    every = tensors(state)
    data = b"".join(
        bytes(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
        for t in locals_of(every).values()
    )
    config = TransferConfig(
        multipart_threshold=8 << 20, multipart_chunksize=8 << 20, max_concurrency=10
    )

    def plain():
        client.upload_fileobj(io.BytesIO(data), "bucket", "plain", Config=config)

    def accelx():
        ax.save_state(env, "s3://bucket/accelx")(state)

    def fsspec():
        writer = FsspecWriter("s3://bucket/fsspec", sync_files=False)
        dcp.save(dict(every), storage_writer=writer)

    def meet():
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
        for page in pages:
            for one in page.get("Contents", ()):
                client.delete_object(Bucket="bucket", Key=one["Key"])

    ways = {"boto3 upload_fileobj": plain, "accelx": accelx, "DCP FsspecWriter": fsspec}
    return compare.interleaved(ways, rounds, meet)


def meet_server(server):
    """Wait until the server answers, point clients at it, and make the bucket."""
    host, port = server.stdout.readline().split()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    while True:
        try:
            boto3.client("s3").create_bucket(Bucket="bucket")
            break
        except BotoCoreError:  # it does not listen yet
            time.sleep(0.1)


def main():
    """Serve, measure, write the figures and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=840)
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True
    )
    try:
        meet_server(server)
        each = run(1, timeout=3000)(saving)(args.rounds, args.mib)[0]
        found = compare.ratios(each)
    finally:
        server.kill()
    title = f"Saving {args.mib} MiB to an S3 server on the same machine"
    compare.write(
        "save_s3", title, GOALS, found, unit="ms", per=1e3, rounds=args.rounds
    )


if __name__ == "__main__":
    main()
