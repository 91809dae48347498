"""Start the training on SageMaker: two hosts with eight GPUs each, on spot capacity.

    pip install "sagemaker<3"
    python examples/cluster/sagemaker_job.py --role arn:... --bucket name --image uri

The image is one of your own over a PyTorch training container of SageMaker, with torch
2.9 or later and accelx[s3]: the containers that the SDK knows by name are older.
SageMaker's own torchrun (`torch_distributed`) starts one rank a GPU. A host that is
taken back gets SIGTERM; the ranks save under s3:// themselves, and when SageMaker
starts the job again it goes on from there. Hosts with one GPU or none need no
`distribution`.
"""

import argparse
from pathlib import Path

DAY = 24 * 3600  # seconds


def settings(role, bucket, image, hosts=2, kind="ml.p4d.24xlarge", gpus=8):
    """The estimator's arguments, as plain data."""
    return {
        "entry_point": "train.py",
        "source_dir": str(Path(__file__).parent),
        "role": role,
        "image_uri": image,
        "instance_count": hosts,
        "instance_type": kind,
        "distribution": {"torch_distributed": {"enabled": True}} if gpus > 1 else None,
        "hyperparameters": {"url": f"s3://{bucket}/run", "steps": 1000},
        "use_spot_instances": True,
        "max_run": DAY,
        "max_wait": 2 * DAY,  # the time without capacity included
        "base_job_name": "accelx",
    }


def main():
    """Start it, and show its log."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", required=True)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--image", required=True)
    given = parser.parse_args()

    from sagemaker.pytorch import PyTorch

    PyTorch(**settings(given.role, given.bucket, given.image)).fit()


if __name__ == "__main__":
    main()
