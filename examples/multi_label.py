"""Several labels per image, in a loop of your own: python examples/multi_label.py

A sample's label is the number of one class. What else a sample has, here its tags, comes along in Batch.fields.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from cropfeed import TORCHVISION, Batch, LoaderSpec, ScaleJitter, open_loader
from cropfeed.convert.make import ConvertOptions, make_shards
from cropfeed.convert.sources import SourceOptions
from PIL import Image
from torch import nn

COLORS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}


def draw_images(folder: Path, split: str, count: int) -> list[dict]:
    """Noisy images with squares of up to three colors. Returns a row of the list for each."""
    rng, rows = np.random.default_rng(len(split)), []
    for number in range(count):
        pixels = rng.normal(110, 20, (96, 96, 3))
        tags = [name for name in COLORS if rng.random() < 0.5]
        for name in tags:
            top, left = rng.integers(20, 60, 2)
            pixels[top : top + 16, left : left + 16] = COLORS[name]
        name = f"{split}_{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=95)
        rows.append({"path": name, "label": f"{len(tags)} squares", "split": split, "tags": tags})
    return rows


def targets(batch: Batch) -> torch.Tensor:
    """One number for each image and tag: 1 if the image has it."""
    tags = [json.loads(content)["tags"] for content in batch.fields["json"]]
    return torch.tensor([[float(name in found) for name in COLORS] for found in tags])


def main(work: Path) -> None:
    # A list of images, and the columns that are to be stored beside each image, as .json.
    # On the command line: cropfeed shards IMAGES --out SHARDS --list images.jsonl --field-column tags
    # From WebDataset tars, all members of a sample are stored.
    rows = draw_images(work, "train", 256) + draw_images(work, "val", 64)
    (work / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = SourceOptions(list=str(work / "images.jsonl"), field_column=("tags",))
    print(*make_shards(ConvertOptions(str(work), str(work / "shards"), images=source, workers=1)), sep="\n")

    spec = LoaderSpec(
        work / "shards", batch_size=32, image_size=64, geometry=ScaleJitter(64, 76), normalization=TORCHVISION, fields=("json",)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 5, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, len(COLORS)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with open_loader(spec) as loader:
        while loader.epoch < 8:
            for batch in loader:
                loss = nn.functional.binary_cross_entropy_with_logits(model(batch.images), targets(batch))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with open_loader(spec.evaluation()) as validation, torch.no_grad():
        right = torch.cat([(model(batch.images) > 0) == (targets(batch) > 0) for batch in validation])
    print(f"loss {loss:.3f}; {right.float().mean():.0%} of {right.numel()} tags of validation images are right")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
