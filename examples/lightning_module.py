"""Lightning. Kill it and give the same command again: it resumes with the same samples.

python examples/lightning_module.py SHARDS
"""

import argparse
from pathlib import Path

import torch
from cropfeed import Batch, Loader, LoaderSpec, open_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn


class Shards(LightningDataModule):
    """Lightning saves the training loader's position in its checkpoints, as the loader has `state_dict`."""

    def __init__(self, shards: str, image_size: int, batch_size: int) -> None:
        super().__init__()
        self.shards, self.image_size, self.batch_size = shards, image_size, batch_size

    def spec(self) -> LoaderSpec:
        return LoaderSpec(
            self.shards,
            batch_size=self.batch_size,
            image_size=self.image_size,
            normalization="imagenet",
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            device=str(self.trainer.strategy.root_device),
        )

    def train_dataloader(self) -> Loader:
        return open_loader(self.spec())

    def val_dataloader(self) -> Loader:
        return open_loader(self.spec().evaluation())


class Classifier(LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
        )

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        print(f"step {self.global_step + 1}: samples {batch.ids.tolist()}", flush=True)
        return nn.functional.cross_entropy(self.model(batch.images), batch.labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        accuracy = (self.model(batch.images).argmax(1) == batch.labels).float().mean()
        self.log("accuracy", accuracy, batch_size=len(batch.labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--output", type=Path, default=Path("lightning-output"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32, help="over all processes")
    args = parser.parse_args()

    data = Shards(args.shards, args.image_size, args.batch_size)
    saving = ModelCheckpoint(args.output, every_n_train_steps=5, save_last=True)
    trainer = Trainer(max_steps=args.steps, callbacks=[saving], logger=False, enable_progress_bar=False)
    last = args.output / "last.ckpt"
    trainer.fit(Classifier(classes=1000), data, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main()
