"""Hugging Face Accelerate. Kill it and give the same command again: it resumes with the same samples.

accelerate launch examples/accelerate_loop.py SHARDS
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from cropfeed import LoaderSpec, open_loader
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--output", type=Path, default=Path("accelerate-output"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    args = parser.parse_args()

    accelerator = Accelerator()
    spec = LoaderSpec(
        args.shards,
        batch_size=args.batch_size,
        image_size=args.image_size,
        normalization="imagenet",
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=str(accelerator.device),
    )
    loader = open_loader(spec)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, len(loader.classes))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # The loader is not prepared: its batches are this process's, on its device. `save_state` saves its position.
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(loader)
    steps = sorted(args.output.glob("step-*"))
    if steps:
        accelerator.load_state(str(steps[-1]))

    step = int(steps[-1].name.removeprefix("step-")) if steps else 0
    while step < args.steps:
        for images, labels, ids in loader:  # the rest of an epoch; the next pass is the next epoch
            with accelerator.autocast():
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            print(f"step {step}: loss {loss.item():.3f}, samples {ids.tolist()}", flush=True)
            if step % 5 == 0:
                accelerator.save_state(str(args.output / "saving"))
                if accelerator.is_main_process:
                    (args.output / "saving").rename(args.output / f"step-{step:06d}")
                accelerator.wait_for_everyone()
            if step == args.steps:
                break
    loader.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
