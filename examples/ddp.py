"""Plain PyTorch with DistributedDataParallel. Kill it and give the same command again: it resumes with the same samples.

torchrun --nproc_per_node 2 examples/ddp.py SHARDS
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cropfeed import LoaderSpec, open_loader
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--checkpoint", type=Path, default=Path("ddp.pt"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, local = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")

    # Instead of a Dataset, a DistributedSampler and a DataLoader. Each rank gets its range of every global batch.
    spec = LoaderSpec(
        args.shards,
        batch_size=args.batch_size,
        image_size=args.image_size,
        normalization="imagenet",
        rank=rank,
        world_size=dist.get_world_size(),
        device=str(device),
    )
    loader = open_loader(spec)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(loader.classes))
    )
    model = DistributedDataParallel(network.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # The loader's state is two integers and a fingerprint of the settings, the same on every rank.
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader}
    step = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step = saved["step"]

    while step < args.steps:
        for images, labels, ids in loader:  # the rest of an epoch; the next pass is the next epoch
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}, rank {rank}: loss {loss.item():.3f}, samples {ids.tolist()}", flush=True)
            if step % 5 == 0 and rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"step": step}, args.checkpoint.with_suffix(".tmp"))
                args.checkpoint.with_suffix(".tmp").replace(args.checkpoint)
            if step == args.steps:
                break
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
