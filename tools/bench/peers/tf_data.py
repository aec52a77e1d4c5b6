"""TensorFlow's tf.data with tf.image.decode_and_crop_jpeg.

Settings follow the tf.data performance guide and the ImageNet input of the official models: only the crop is decoded, by
libjpeg-turbo's partial decoding with INTEGER_FAST; parallel map and prefetch use AUTOTUNE, in any order; a private thread pool
has one thread per core, so that the tuning knows the usable cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf

from tools.bench.peers.job import Job


def decode_and_crop(job: Job) -> Iterator[tuple[Any, Any]]:
    tf.config.threading.set_inter_op_parallelism_threads(job.threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)  # parallel over images, not within an image
    paths, labels = zip(*job.files(), strict=True)
    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = job.threads
    options.threading.max_intra_op_parallelism = 1
    dataset = (
        tf.data.Dataset.from_tensor_slices((list(paths), list(labels)))
        .shuffle(len(paths))
        .repeat()
        .map(lambda path, label: (load(path, job), label), num_parallel_calls=tf.data.AUTOTUNE)
        .batch(job.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )
    yield from dataset.as_numpy_iterator()


def load(path: Any, job: Job) -> Any:
    contents = tf.io.read_file(path)
    image = tf.image.decode_and_crop_jpeg(contents, window(contents, job), channels=3, dct_method="INTEGER_FAST")
    image = tf.image.random_flip_left_right(tf.image.resize(image, [job.size, job.size], antialias=True))
    if job.out == "float32":
        return image - tf.constant(job.mean)
    return tf.cast(image + 0.5, tf.uint8)


def window(contents: Any, job: Job) -> Any:
    """Draw a crop: top, left, height, width in whole source pixels."""
    sides = tf.cast(tf.image.extract_jpeg_shape(contents)[:2], tf.float32)
    low, high = job.scale
    scale = tf.reduce_min(sides) / tf.cast(tf.random.uniform([], low, high + 1, tf.int32), tf.float32)
    resized = tf.floor(sides / scale + 0.5)
    corner = tf.floor(tf.random.uniform([2]) * (resized - job.size + 1))
    start = (corner - resized / 2) * scale + sides / 2
    first = tf.maximum(tf.floor(start + 0.5), 0)
    last = tf.minimum(tf.floor(start + job.size * scale + 0.5), sides)
    return tf.cast(tf.concat([first, tf.maximum(last - first, 1)], 0), tf.int32)
