"""`transformers.Trainer`. Kill it and give the same command again: it resumes with the same samples.

python examples/transformers_trainer.py SHARDS  # or torchrun --nproc_per_node 8 ...
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from cropfeed import Batch, Loader, LoaderSpec, open_loader
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def as_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of the model's forward, and the ids."""
    return {"pixel_values": batch.images, "labels": batch.labels, "ids": batch.ids}


class CropfeedTrainer(Trainer):
    """A Trainer whose training batches come from `loader`."""

    def __init__(self, loader: Loader, **options: Any) -> None:
        super().__init__(**options)
        self.loader = loader

    def get_train_dataloader(self) -> Loader:
        return self.loader

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        print(f"step {self.state.global_step + 1}: samples {inputs.pop('ids').tolist()}", flush=True)
        return super().compute_loss(model, inputs, **options)


class SeekLoader(TrainerCallback):
    """Goes to the batch at which training starts: `ignore_data_skip` keeps the Trainer from reading all batches before it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        loader = options["train_dataloader"]
        epoch, batches = divmod(state.global_step * args.gradient_accumulation_steps, len(loader))
        loader.seek(epoch, batches * loader.spec.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--output", type=Path, default=Path("trainer-output"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    args = parser.parse_args()

    options = TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size, save_steps=5, ignore_data_skip=True
    )
    spec = LoaderSpec(
        args.shards,
        batch_size=args.batch_size * options.world_size,
        image_size=args.image_size,
        normalization="imagenet",
        rank=options.process_index,
        world_size=options.world_size,
        device=str(options.device),
        collate=as_inputs,
    )
    loader = open_loader(spec)
    model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[32, 64], depths=[1, 1], num_labels=len(loader.classes)))
    trainer = CropfeedTrainer(loader, model=model, args=options, callbacks=[SeekLoader()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output) if args.output.exists() else None)
    loader.close()


if __name__ == "__main__":
    main()
