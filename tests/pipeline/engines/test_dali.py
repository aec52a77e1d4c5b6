"""The DALI engine alone: its GPU graph without a GPU, image borders, and samples that DALI cannot decode."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn

from pipeline.engines import dali, dali_input
from pipeline.plan.geometry import CentreCrop, RandomResizedCrop, ScaleJitter, TenCrop
from pipeline.spec import LoaderSpec
from pipeline.store.shards import ShardSet
from tests.helpers import jpeg, open_image, random_image, run_script
from tests.pipeline.contract.helpers import differences, spec_for


@pytest.fixture(scope="module")
def large_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large images with hard edges along their borders, and a small one without them."""
    root = tmp_path_factory.mktemp("large")
    (root / "images" / "a").mkdir(parents=True)
    for index, (height, width) in enumerate(((2000, 1500), (1300, 1800), (900, 3000), (150, 190))):
        pixels = random_image(height, width, index)
        if height > 150:
            pixels[:3], pixels[-2:], pixels[:, :3], pixels[:, -1:] = 255, 0, 0, 255
        (root / "images" / "a" / f"{index}.JPEG").write_bytes(jpeg(pixels, "444"))
    result = run_script("tools/make_shards.py", root / "images", "--out", root / "shards", "--workers", 1)
    assert result.returncode == 0, result.stderr
    return root / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [RandomResizedCrop(area=(0.8, 1)), TenCrop(64), CentreCrop(56)])
def test_downscaled_borders_match_pillow(large_shards: Path, geometry: RandomResizedCrop | TenCrop | CentreCrop) -> None:
    spec = LoaderSpec(large_shards, batch_size=4, image_size=56, geometry=geometry)
    loader = dali.open(spec if geometry.random else spec.evaluation("train", geometry=geometry))
    batch_range = next(loader.batch_ranges(0, 0))
    plan = loader.plan(batch_range)
    assert 0 < dali_input.at_border(plan).sum() < 4
    found = differences(loader, plan, next(iter(loader)))
    border = np.concatenate([found[:, [0, -1]].reshape(len(found), -1), found[:, :, [0, -1]].reshape(len(found), -1)], axis=1)
    assert np.percentile(border, 99.9, axis=1).max() <= 4
    loader.close()


@pytest.mark.parametrize("decoder", ["image", "image_slice"])
def test_finished_views_pass_the_graph_unchanged(decoder: str) -> None:
    """Two views in one PPM pass through both decoders."""
    pixels = np.random.default_rng(0).integers(0, 256, (2 * 37, 41, 3), np.uint8)
    pipe = Pipeline(1, 1, None)
    with pipe:
        values = [np.array([[[[top, 0], [top + 37, 41], [37, 41]]] for top in (0, 37)], np.float32)]
        if slices := decoder == "image_slice":
            values += [np.array([[0, 0], [74, 41]], np.int32)]
        sources = fn.external_source(
            lambda: ([dali_input.to_ppm(pixels)], *(value[None] for value in values)), num_outputs=1 + len(values)
        )
        pipe.set_outputs(*dali.graph(sources, [2], gpu=False, slices=slices, hw_decoder_load=0.65))
    pipe.build()
    assert np.array_equal(np.array(pipe.run()[0].as_tensor())[0], pixels.reshape(2, 37, 41, 3))


def test_whole_cuts_and_their_slices_give_the_same_views(large_shards: Path) -> None:
    """A GPU decodes whole cuts, because its hardware decoder decodes only whole images."""
    spec = LoaderSpec(large_shards, batch_size=4, image_size=224, dtype=torch.uint8)
    slices, whole = dali.open(spec), dali.DaliLoader(spec, slices=False)
    for actual, reference in zip(whole, slices, strict=True):
        assert (actual.images.int() - reference.images.int()).abs().max() <= 1  # the float32 windows have other origins


def test_dali_receives_cuts(large_shards: Path) -> None:
    loader = dali.open(LoaderSpec(large_shards, batch_size=4, threads=2))
    its_input = dali_input.Input(loader, next(loader.batch_ranges(0, 0)))
    streams = [np.array(tensor) for tensor in its_input()[0]]
    for data, sample in zip(streams, its_input.in_flight[0].ids.tolist(), strict=True):
        stored = loader.shards.read(sample)
        if stored[0] == 0xFF and len(data) and data[0] == 0xFF:  # a JPEG, not views made on the CPU
            cut, whole = (open_image(encoded.tobytes()).size for encoded in (data, stored))
            assert cut[0] * cut[1] < 0.9 * whole[0] * whole[1]
            assert len(data) < 0.9 * len(stored)
    its_input.close()


def test_memory_stays_until_dali_has_returned_the_batch(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without references to the tensors that DALI gets."""
    made: list[list[weakref.ref[Any]]] = []
    arrays = dali_input.BatchInputs.arrays

    def watching(self: dali_input.BatchInputs) -> Any:
        found = arrays(self)
        made.append([weakref.ref(array) for array in (*found[0], *found[1:])])
        return found

    monkeypatch.setattr(dali_input.BatchInputs, "arrays", watching)
    loader = dali.open(spec_for(small_shards, "dali"))
    for number, _ in enumerate(loader):
        assert all(array() is not None for batch in made[number + 1 : number + loader.spec.prefetch] for array in batch)
    assert number == len(loader) - 1 == 6
    assert all(array() is None for array in made[0])
    loader.close()


def test_images_that_only_dali_cannot_decode_are_decoded_on_the_cpu(
    small_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A JPEG with a stray byte before a marker, which Pillow and libjpeg-turbo accept."""
    loader = dali.open(spec_for(small_shards, "dali"))
    expected = list(loader)
    victim, read = int(expected[3].ids[2]), ShardSet.read

    def reading(self: ShardSet, index: int) -> Any:
        data = read(self, index)
        frame = data.tobytes().index(b"\xff\xc0") if index == victim else 0
        return np.concatenate([data[:frame], np.zeros(1, np.uint8), data[frame:]]) if index == victim else data

    monkeypatch.setattr(ShardSet, "read", reading)
    loader.seek(0, 0)
    for actual, reference in zip(loader, expected, strict=True):
        assert actual.ids.tolist() == reference.ids.tolist()
        assert (actual.images - reference.images).abs().mean() < 1
    assert not loader.substitutes.corrupt
    assert "Invalid marker" in capfd.readouterr().err + capfd.readouterr().out
    (message,) = caplog.messages
    assert message.startswith(f"{small_shards}, train: DALI has failed: ")
    assert "image_slice`: nvImageCodec failure" in message
    assert "\n" not in message
    loader.close()


def test_other_failures_of_dali_are_raised(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, stream: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Pipeline, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(dali.open(spec_for(small_shards, "dali"))))


@pytest.mark.parametrize(("calm", "raised"), [(dali.CALM, True), (5, False)])
def test_failures_that_return_are_raised_after_three_restarts_but_rare_ones_are_not(
    calm: int, raised: bool, small_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that fails every seventh batch must not become a loader that mostly decodes on the CPU."""
    calls, run = iter(range(1000)), Pipeline.run

    def failing(self: Pipeline, stream: object) -> Any:
        if next(calls) % 7 == 6:
            raise RuntimeError("CUDA error: an illegal\n  address. Stacktrace (3 entries): ...")
        return run(self, stream)

    monkeypatch.setattr(Pipeline, "run", failing)
    monkeypatch.setattr(dali, "CALM", calm)
    loader = dali.open(spec_for(small_shards, "dali"))
    with pytest.raises(RuntimeError, match="illegal") if raised else nullcontext():
        for _ in range(6):
            list(loader)
    failures = [message for message in caplog.messages if message.endswith("DALI has failed: CUDA error: an illegal address.")]
    assert (len(failures), loader.epoch) == ((4, 3) if raised else (6, 6))
    assert not loader.substitutes.corrupt
    loader.close()


def test_pixels_leave_dali_without_a_copy(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor has the address of DALI's memory."""
    loader = dali.open(spec_for(small_shards, "dali", dtype=torch.uint8))
    addresses = []
    original = torch.from_dlpack

    def watching(tensor: object) -> torch.Tensor:
        addresses.append(tensor.data_ptr())  # type: ignore[attr-defined]
        return original(tensor)

    monkeypatch.setattr(torch, "from_dlpack", watching)
    assert next(iter(loader)).images.data_ptr() == addresses[0]


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("geometry", [ScaleJitter(), TenCrop()])
def test_the_gpu_graph_runs_on_the_gpu(geometry: ScaleJitter | TenCrop, slices: bool) -> None:
    """Tracing needs no GPU: decoding is `mixed`, resampling runs on the GPU, and so does the output."""
    spec = LoaderSpec("nowhere", device="cuda:1", geometry=geometry, hw_decoder_load=0.3)
    pipe = dali.build_pipeline(lambda: None, 256, spec, slices)
    assert pipe.device_id == 1
    outputs = pipe._graph_out  # the argument of set_outputs
    assert [node.device for node in outputs] == ["gpu"]
    operators = reachable(outputs)
    assert operators["ImageSlice" if slices else "Image"] == {"mixed"}
    assert operators["Resize"] == {"gpu"}
    assert operators["ExternalSource"] == {"cpu"}


@pytest.mark.parametrize("slices", [True, False])
def test_both_decoders_get_the_share_of_the_hardware_and_pin_no_threads(slices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, DALI's decoder pins its threads to cores by NVML, which fails in virtual machines; a pipeline does not."""
    found = []
    name = "image_slice" if slices else "image"
    decoder = getattr(fn.decoders, name)

    def decodes(*inputs: Any, **options: Any) -> Any:
        found.append(options)
        return decoder(*inputs, **options)

    monkeypatch.setattr(fn.decoders, name, decodes)
    for device in ("cpu", "cuda:0"):
        pipe = dali.build_pipeline(lambda: None, 8, LoaderSpec("nowhere", device=device, hw_decoder_load=0.3), slices)
        assert pipe._set_affinity is False
    assert [(options["device"], options["hw_decoder_load"], options["affine"]) for options in found] == [
        ("cpu", 0.3, False), ("mixed", 0.3, False),
    ]  # fmt: skip


def reachable(outputs: Any) -> dict[str, set[str]]:
    """Operator name -> devices, for every operator that the outputs depend on."""
    found: dict[str, set[str]] = {}
    queue = list(outputs)
    while queue:
        source = queue.pop().source
        found.setdefault(source.name.strip("_").rsplit("_", 1)[0], set()).add(source._op._device)
        queue += source.inputs
    return found
