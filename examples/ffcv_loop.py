"""The loop of an FFCV user. Kill it and give the same command again: it resumes in the middle of the epoch, which FFCV cannot.

cropfeed shards IMAGES --out SHARDS --format both  # the tars, and train.beton as FFCV reads it
python examples/ffcv_loop.py SHARDS

| FFCV | here |
| --- | --- |
| DatasetWriter, RGBImageField, IntField | cropfeed shards --format ffcv |
| Loader(path, batch_size=..., num_workers=..., distributed=True) | LoaderSpec(..., threads, rank, world_size) |
| order=OrderOption.RANDOM, QUASI_RANDOM, SEQUENTIAL | order="full", "blocks", "sequential" |
| RandomResizedCropRGBImageDecoder((224, 224)), RandomHorizontalFlip() | geometry=RandomResizedCrop() |
| CenterCropRGBImageDecoder((224, 224), ratio=224/256) | spec.evaluation() |
| NormalizeImage(IMAGENET_MEAN, IMAGENET_STD, np.float16) | normalization="imagenet", dtype=torch.float16 |
| ToTensor(), ToDevice(), ToTorchImage(), Squeeze() | device="cuda"; always done |
| loader.next_epoch = 3 | loader.seek(3, 0), or load_state_dict |
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from cropfeed import LoaderSpec, RandomResizedCrop, open_loader
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--engine", default="ffcv", help="ffcv reads the .beton; auto, cpu and dali read the tars")
    parser.add_argument("--checkpoint", type=Path, default=Path("ffcv.pt"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = LoaderSpec(
        args.shards,
        batch_size=args.batch_size,
        image_size=args.image_size,
        geometry=RandomResizedCrop(),
        normalization="imagenet",
        device=device,
        engine=args.engine,
    )
    loader = open_loader(spec)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(loader.classes))
    ).to(device)
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
        for images, labels, ids in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item():.3f}, samples {ids.tolist()}", flush=True)
            if step % 5 == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"step": step}, args.checkpoint.with_suffix(".tmp"))
                args.checkpoint.with_suffix(".tmp").replace(args.checkpoint)
            if step == args.steps:
                break
    loader.close()


if __name__ == "__main__":
    main()
