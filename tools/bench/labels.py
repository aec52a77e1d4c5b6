"""For tables.py: readable labels for terse names in the rows, and the project's goals."""

from __future__ import annotations

import re

INF = float("inf")
IMAGES = "original files (Cropfeed: lossless shards)", "500 px, quality 90 (Cropfeed: compact shards)"
GROUPS = {"lossless": "original", "compact": "500"}  # profile of shards -> the images with which compare.csv compares them
CPU = "**Cropfeed, CPU engine**", ("cropfeed-cpu-lossless", "cropfeed-cpu-compact")
LOADERS = (
    CPU,
    ("**Cropfeed, FFCV engine**", ("cropfeed-ffcv-lossless", "cropfeed-ffcv-compact")),
    ("**Cropfeed, DALI engine**", ("cropfeed-dali-lossless", "cropfeed-dali-compact")),
    ("**Cropfeed, CPU engine**, shards of profile original", ("cropfeed-cpu-original",)),
    ("DALI: decode the crop (`image_slice`), then resize", ("dali-roi",)),
    ("DALI: decode, then `resize_crop_mirror`", ("dali-resize-crop-mirror",)),
    ("DALI: decode, resize, crop", ("dali-plain",)),
    ("DALI: its own random resized crop (`image_random_crop`)", ("dali-rrc",)),
    ("slipstream: cache of JPEGs", ("slipstream-jpeg",)),
    ("slipstream: cache of YUV 4:2:0 pixels", ("slipstream-yuv420",)),
    ("FFCV: scale jitter (a decoder written for this comparison)", ("ffcv-jitter",)),
    ("FFCV: its own random resized crop", ("ffcv-rrc",)),
    ("FFCV: scale jitter, of raw pixels", ("ffcv-raw",)),
    ("tf.data: `decode_and_crop_jpeg`", ("tf-data",)),
    ("WebDataset + OpenCV", ("webdataset-opencv",)),
    ("WebDataset + Pillow", ("webdataset-pillow",)),
    ("LitData + OpenCV", ("litdata",)),
    ("MosaicML Streaming + OpenCV", ("mosaicml-streaming",)),
    ("Hugging Face datasets + OpenCV", ("datasets",)),
    ("PyTorch DataLoader + Pillow", ("torch-pillow",)),
    ("PyTorch DataLoader + libvips", ("torch-vips",)),
    ("PyTorch DataLoader + torchcodec", ("torch-torchcodec",)),
    ("SPDL", ("spdl",)),
)
SUMMARY = (
    CPU,
    ("DALI, its fastest pipeline here", ("dali-roi", "dali-resize-crop-mirror", "dali-plain")),
    ("tf.data", ("tf-data",)),
    ("WebDataset + OpenCV", ("webdataset-opencv",)),
    ("FFCV, its fastest decoder here", ("ffcv-jitter", "ffcv-rrc")),
    ("PyTorch DataLoader + Pillow", ("torch-pillow",)),
)
REGIONS = (  # label, benchmark, format
    ("decode the whole image, ms", "decode whole", "{:.2f}"),
    ("libjpeg-turbo's partial decoding of the region, ms", "decode partial", "{:.2f}"),
    ("**cut out the region, then decode it**, ms", "decode cut", "**{:.2f}**"),
    ("cut out the region, then decode it partially, ms", "decode cut, partial", "{:.2f}"),
    ("cut and decode: speedup over the whole image of the same file", "decode cut against whole of {profile}", "{:.2f} ×"),
    ("cut and decode: speedup over partial decoding of the same file", "decode cut against partial of {profile}", "{:.2f} ×"),
    ("cut and decode: speedup over the whole original file", "decode cut against whole of original", "{:.2f} ×"),
    ("cut and decode: speedup over partial decoding of the original file", "decode cut against partial of original", "{:.2f} ×"),
    ("cut, decode partially: speedup over the whole original file", "decode cut, partial against whole of original", "{:.2f} ×"),
    ("the same, over partial decoding of the original file", "decode cut, partial against partial of original", "{:.2f} ×"),
    ("cut alone, µs (median)", "cut alone", "{:.0f}"),
    ("size relative to the original file", "bytes against original", "{:.3f}"),
    ("transcode losslessly, images/s", "transcode", "{:.0f}"),
)  # fmt: skip
VIEWS = {  # geometry in views.csv -> label
    "one view": "one of 224 pixels",
    "2 x 224": "two of 224",
    "2 x 224 + 8 x 96": "two of 224 and eight of 96 (DINO)",
}
CONVERTERS = (  # label, engine in convert.csv
    ("**Cropfeed**, lossless", "cropfeed lossless"),
    ("**Cropfeed**, compact", "cropfeed compact"),
    ("**Cropfeed**, original", "cropfeed original"),
    ("**Cropfeed**, lossless, with every image in the statistics", "cropfeed lossless, all in the statistics"),
    ("**Cropfeed**, lossless, from progressive JPEGs", "cropfeed lossless, progressive JPEGs"),
    ("FFCV's DatasetWriter (JPEG, 500 px, quality 90)", "ffcv DatasetWriter, jpg, 500 px, q90"),
    ("WebDataset's ShardWriter (copies files without a check)", "webdataset ShardWriter, bytes as they are"),
)
BASELINES = {"plain": "plain script, float32", "plain bf16": "plain script with bfloat16, channels-last, progressive sizes"}
LEVELS = 75, 80  # of top-1, percent: columns of the table accuracy
SCHEMES = {"centre": "centre crop", "ten-crop": "ten crops", "multi-scale": "whole image, average of the scales below"}
DATA = {
    "s-imagenette-128": "Imagenette, 128 px",
    "s-imagenet-400": "ImageNet, full size (sample)",
    "demo/shards": "drawn images of 8 shapes",
}
ROBUSTNESS = {
    "SIGKILLs survived, all files equal": "conversion: kills (SIGKILL) after which the finished files equal an undisturbed run's",
    "of these, after further shards": "of these, kills after further shards were finished",
    "mutants left out, with the reason": "damaged JPEGs: left out, with a reason",
    "mutants stored and cut exactly": "damaged JPEGs: stored, and cut and decoded exactly",
    "of these, decoded after further damage": "of these, decoded after further damage",
}
GOALS: tuple[tuple[str, float, float, str, str, dict[str, str]], ...] = (  # text, low, high, unit, rows, the row's columns
    *((f"throughput over the fastest other loader, {kind} shards", 3, INF, "×", "compare",
       {"engine": f"cropfeed-cpu-{kind}", "metric": "ratio_to_fastest_peer"}) for kind in GROUPS),
    *((f"CPU time over that of libjpeg-turbo for decoding the cut alone, {kind} shards", 0, most, "×", "compare",
       {"engine": f"cropfeed-cpu-{kind}", "metric": "cpu_over_decode_of_the_cut"})
      for kind, most in (("lossless", 1.3), ("compact", 1.6))),
    *((f"bytes {what}, over the file's, lossless shards", 0, 0.55, "×", "compare", {"engine": engine, "metric": "mean_to_image"})
      for what, engine in (("needed for a crop", "cut"),
                           ("read for a crop, cold page cache", "cold page cache, madvise random"))),
    *((f"decode the cut: speedup over {other} of the same file, {kind} shards", least, INF, "×", "region",
       {"benchmark": f"decode cut against {name} of {kind}"})
      for other, name, least in (("the whole image", "whole", 2.1), ("partial decoding", "partial", 1.45)) for kind in GROUPS),
    *((f"time to cut out a region, {kind} shards", 0, 30, "µs", "region", {"benchmark": "cut alone", "kind": kind})
      for kind in GROUPS),
    ("size over the original files', lossless shards", 0, 1.01, "×", "region",
     {"benchmark": "bytes against original", "kind": "lossless"}),
    ("lossless transcoding on one core", 250, INF, "images/s", "region", {"benchmark": "transcode"}),
    ("converter, lossless: throughput over FFCV's DatasetWriter", 1.5, INF, "×", "convert",
     {"engine": "cropfeed lossless", "metric": "times_ffcv_writer"}),
    ("training time over that of a plain float32 script", 0, 0.6, "×", "accuracy", {"metric": "minutes, ratio, mean"}),
    ("profiler: predicted over mean measured gain, worst case", 0.8, 1.2, "×", "profile", {"metric": "predicted_over_measured"}),
    ("profiler: throughput of the tuned over the best settings", 0.95, INF, "×", "profile", {"metric": "chosen_over_best"}),
)  # fmt: skip

REMOTE = {  # ways of bench_remote.py
    "crop": "what the crop needs, in random order",
    "image": "whole images, in random order",
    "blocks": "whole shards, in the order `blocks`",
    "shards": "whole shards, in random order",
}


def tidy(text: str) -> str:
    """Names of models and settings in a row, spelled out: resnet18_a at 112, S 114..160."""
    text = re.sub(r"\bplain(\d+)", r"plain, \1 layers", text)
    text = re.sub(r"\bresnet(\d+)", r"ResNet-\1", text)
    text = re.sub(r"(ResNet-\d+)_([ac])\b", lambda found: f"{found[1]} (shortcut option {found[2].upper()})", text)
    text = re.sub(r" at (\d+)(?: to (\d+))?\b", lambda found: f"{found[0]} px", text)
    return re.sub(r"\bS (\d+)\.\.(\d+)", r"short side \1 to \2", text)
