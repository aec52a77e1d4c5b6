"""A model of timm, with the preprocessing that it was made for. Kill it and give the same command again: it resumes.

python examples/timm_models.py SHARDS --model resnet50
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.optim
import torch
from cropfeed import LoaderSpec, Normalization, RandomResizedCrop, open_loader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--checkpoint", type=Path, default=Path("timm.pt"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, help="instead of the model's own")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = timm.data.resolve_data_config(model=args.model, pretrained_cfg=timm.get_pretrained_cfg(args.model).to_dict())
    # Instead of timm.data.create_loader:
    spec = LoaderSpec(
        args.shards,
        batch_size=args.batch_size,
        image_size=args.image_size or config["input_size"][-1],
        geometry=RandomResizedCrop(),
        interpolation=config["interpolation"],
        normalization=Normalization.of(255 * np.array(config["mean"]), 255 * np.array(config["std"])),
        device=device,
    )
    loader = open_loader(spec)
    model = timm.create_model(args.model, num_classes=len(loader.classes)).to(device, memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
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
            loss = torch.nn.functional.cross_entropy(model(images), labels)
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
