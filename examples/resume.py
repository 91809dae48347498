"""Told to leave in the middle, a run saves to S3, and others go on from there.

    python examples/resume.py

Starts an S3 server of its own on this machine (`pip install "moto[s3]" flask
flask-cors s3fs`), and then the same training again and again: two ranks that get
SIGTERM while they train, three that get it while they evaluate, one to the end. The
losses are those of a run that nobody disturbed. About half a minute on two CPU cores.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import accelx as ax

STEPS = 60

# ------------------------------------------------------------------------ the training


class Net(nn.Sequential):
    """(rows, 64) pixels -> (rows, 10) logits."""

    def __init__(self):
        super().__init__(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))


def loss(model, batch):
    """The mean over rows, in nats."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def digits():
    """1,797 hand-written digits of scikit-learn, pixels in 0 to 1."""
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))


def train(url, out):
    """Up to STEPS from wherever `url` stands; every loss goes to the file `out`."""
    env = ax.connect()
    ax.seed(env, 0)
    tx = ax.chain(
        ax.shard_loader(env, seed=0),
        ax.shard_model(env, "fsdp2"),
        ax.clip(1.0),
        ax.with_schedule(ax.warmup_cosine(5, STEPS)),
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every=15, keep=2, wait=False),
        ax.on_preempt(env, url, grace=60),
    )
    state = ax.init(tx, Net, lambda m: AdamW(m.parameters(), 1e-2))
    step, judge = ax.step(tx, loss), ax.measure(tx, loss)
    loader = DataLoader(digits(), batch_size=64, shuffle=True)
    losses = out.open("a") if env.main else None
    for batch in ax.feed(tx, loader, start=state, stop=STEPS):
        at = state.step
        state, done = step(state, batch)
        if losses:
            losses.write(f"{json.dumps([at, float(done.loss)])}\n")
            losses.flush()
        if state.step % 30 == 0:
            for held_out in ax.feed(tx, loader):
                judge(state, held_out)
                time.sleep(0.05)  # so that there is time to be disturbed
        time.sleep(0.02)


# --------------------------------------------------------------------- the disturbance


def disturbed(url, out, ranks, at=None):
    """Run it on so many ranks; SIGTERM once the loss of step `at` is there."""
    launch = [sys.executable, "-m", "accelx.spawn", "-n", str(ranks)]
    run = subprocess.Popen([*launch, __file__, "--url", url, "--out", str(out)])
    while at is not None and run.poll() is None and at not in read(out):
        time.sleep(0.01)
    if at is not None:
        run.send_signal(signal.SIGTERM)
    code = run.wait()
    found = ax.latest(url)
    print(f"{ranks} ranks: exit code {code}, saved up to step {found.step}", flush=True)
    return code


def read(out):
    """step -> loss of what was written so far."""
    text = out.read_text() if out.exists() else ""
    return dict(json.loads(line) for line in text.splitlines() if line.endswith("]"))


def serve():
    """An S3 server on this machine alone, with an empty bucket: {variable: value}."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "example",
        "AWS_SECRET_ACCESS_KEY": "example",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3fs.S3FileSystem().mkdir("bucket")
    return server


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--url", help="train up to the end here, instead")
parser.add_argument("--out", type=Path, default=Path("runs/resume"))


def main():
    args = parser.parse_args()
    if args.url:
        train(args.url, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    whole, parts = args.out / "whole.jsonl", args.out / "parts.jsonl"
    for file in (whole, parts):
        file.unlink(missing_ok=True)
    server = serve()
    disturbed("s3://bucket/whole", whole, ranks=2)
    codes = [
        disturbed("s3://bucket/parts", parts, ranks=2, at=12),
        disturbed("s3://bucket/parts", parts, ranks=3, at=29),  # then it evaluates
        disturbed("s3://bucket/parts", parts, ranks=1),
    ]
    server.stop()
    first, second = read(whole), read(parts)
    gap = max(abs(first[k] - second[k]) for k in second)
    print(f"exit codes {codes}; losses written by the disturbed runs: {len(second)}")
    print(f"largest difference from the undisturbed run: {gap:.4f}")
    print(f"last loss {second[STEPS - 1]:.4f}, undisturbed {first[STEPS - 1]:.4f}")


if __name__ == "__main__":
    main()
