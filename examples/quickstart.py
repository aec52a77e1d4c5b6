# %% [markdown]
# # Cropfeed in five minutes
#
# Run it as a script, `python examples/quickstart.py`, or cell by cell in an editor that knows `# %%` cells. It needs nothing but
# the library: `pip install .`

# %% Draw some images, in the layout that torchvision's ImageFolder reads: SPLIT/CLASS/IMAGE.
import tempfile
from pathlib import Path

import numpy as np
import torch
from cropfeed import LoaderSpec, ScaleJitter, open_loader
from cropfeed.convert.make import ConvertOptions, make_shards
from PIL import Image

COLORS = {"blue": (60, 80, 200), "green": (60, 180, 80), "red": (200, 60, 60)}


def draw_images(folder: Path, images: int) -> None:
    """Noisy images of one color per class."""
    for label, (name, color) in enumerate(COLORS.items()):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            noise = np.random.default_rng([images, label, number]).normal(0, 60, (120, 160, 3))
            Image.fromarray((noise + color).clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.jpg")


def main(work: Path) -> float:
    """Runs all steps in a folder. Returns the accuracy of the trained model on the validation images."""
    draw_images(work / "images" / "train", 64)
    draw_images(work / "images" / "val", 16)

    # %% Convert them into shards, once. On the command line: cropfeed shards IMAGES --out SHARDS
    print(*make_shards(ConvertOptions(str(work / "images"), str(work / "shards"), workers=1)), sep="\n")

    # %% Open a loader: crops of 64 pixels from images whose short side is resized to 72 to 96 pixels.
    spec = LoaderSpec(work / "shards", batch_size=32, image_size=64, geometry=ScaleJitter(72, 96), threads=2)
    loader = open_loader(spec)
    images, labels, ids = next(iter(loader))
    print(f"a batch: images {tuple(images.shape)} {images.dtype}, labels {labels[:4].tolist()}..., ids {ids[:4].tolist()}...")

    # %% Stop in the middle of an epoch and resume in another loader: the same samples, with the same augmentation.
    state = loader.state_dict()
    resumed = open_loader(spec)
    resumed.load_state_dict(state)
    same = np.array_equal(next(iter(loader)).ids, next(iter(resumed)).ids)
    print(f"resumed at {state}: the next batch is {'the same' if same else 'another'}")
    resumed.close()

    # %% Train a model with a loop of your own. A pass over the loader ends with the epoch; the next pass is the next epoch.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, len(COLORS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    while loader.epoch < 5:
        for images, labels, _ in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    loader.close()

    # %% Evaluate: every validation image exactly once, the central crop.
    with open_loader(spec.evaluation()) as validation, torch.no_grad():
        correct = torch.cat([model(images).argmax(1) == labels for images, labels, _ in validation])
    accuracy = float(correct.float().mean())
    print(f"loss {loss:.3f}; {accuracy:.0%} of {len(correct)} validation images classified correctly")
    return accuracy


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
