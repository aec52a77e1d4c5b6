"""The training step: forward and backward pass and update, with mixup, CutMix, stochastic depth and weight averaging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from model.make import make_model
from pipeline.batch import Batch
from pipeline.buffers import to_device
from pipeline.loader import Loader
from pipeline.plan import sampling
from training.averaging import WeightEMA
from training.compiling import compile_model
from training.mixing import Mixing, mix_images, mixed_loss
from training.optimizers import load_state, make_optimizer
from training.options import TrainOptions
from training.uniforms import Stream, uniforms


class Learner:
    """A model and its optimizer.

    model: the unwrapped module, which holds the weights. prepared: the same module, compiled and wrapped by Accelerate, for
    training. eval_model: the module that is validated and saved: `model`, or the moving average of its weights.
    """

    def __init__(self, options: TrainOptions, accelerator: Accelerator, loader: Loader) -> None:
        self.options, self.accelerator = options, accelerator
        self.mixing = None
        if options.mixup or options.cutmix:
            self.mixing = Mixing(
                options.mixup, options.cutmix, options.seed, options.batch_size, accelerator.num_processes, options.accumulate
            )
        torch.manual_seed(options.seed)
        model = make_model(options.arch, len(loader.classes), options.drop_path, options.image_size)
        self.model: nn.Module = model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average: WeightEMA | None = None

    def prepare(self, loader: Loader, saved: dict[str, Any] | None) -> None:
        """Create the optimizer and the moving average, and compile and wrap the model, which must hold its weights already.

        saved: the `state_dict` of a checkpoint to continue from.
        """
        options, accelerator = self.options, self.accelerator
        if options.ema is not None:
            self.average = WeightEMA(self.model, options.ema)
            if saved:
                self.average.load_state_dict(saved["average"])
                self.model.load_state_dict(saved["net"])
        optimizer = make_optimizer(
            options.optimizer, self.model, options.lr, options.momentum, options.weight_decay, not options.no_norm_decay
        )
        model: nn.Module = self.model
        if options.compile:
            model = compile_model(
                self.model, options.compile, self._example_inputs(loader), accelerator.autocast, accelerator.print
            )
        self.prepared, self.optimizer = accelerator.prepare(model, optimizer)
        if saved:
            load_state(self.optimizer, saved["optimizer"])
            if accelerator.scaler is not None and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])

    def _example_inputs(self, loader: Loader) -> list[torch.Tensor]:
        """Inputs of one forward pass in training, with the image size of the current epoch."""
        options, device = self.options, self.accelerator.device
        count = options.batch_size // self.accelerator.num_processes // options.accumulate
        side = loader.spec.size_at(loader.epoch)
        images = torch.zeros(count, 3, side, side, dtype=loader.spec.dtype, device=device)
        inputs = [images.to(memory_format=torch.channels_last)]
        return [*inputs, self._drop_uniforms(0, 0, count, device)] if options.drop_path else inputs

    @property
    def eval_model(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint holds in addition to the weights of `eval_model`: tensors and plain values."""
        scaler = self.accelerator.scaler
        state = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        if self.average is not None:
            state |= {"average": self.average.state_dict(), "net": self.model.state_dict()}
        return state

    def step(self, batch: Batch, epoch: int, start: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step on a global batch. Returns this rank's mean loss and top-1 accuracy, scalar tensors on the device.

        batch: this rank's part of the global batch. epoch, start: the position of the global batch's first image. rate: the
        learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        low, high = sampling.rank_range(start, start + self.options.batch_size, rank, processes)
        images, labels, parts = batch.images, batch.labels, self.options.accumulate
        shares: Sequence[torch.Tensor | None] = [None] * parts
        drops: Sequence[tuple[torch.Tensor, ...]] = [()] * parts  # the model's second input, for stochastic depth
        if self.options.drop_path:
            drops = [(part,) for part in self._drop_uniforms(epoch, low, high, images.device).chunk(parts)]
        if self.mixing is not None:
            images, share = mix_images(images, self.mixing.draw(epoch, low, high, (images.shape[2], images.shape[3])))
            shares = share.chunk(parts)
        mean, top1 = torch.zeros(2, device=images.device)
        for part, targets, share_of_part, drop in zip(images.chunk(parts), labels.chunk(parts), shares, drops, strict=True):
            with self.accelerator.accumulate(self.prepared):  # gradients are all-reduced in the last part only
                logits = self.prepared(part, *drop)
                loss = self._loss(logits, targets, share_of_part)
                self.accelerator.backward(loss)  # divides by the number of parts
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean += loss.detach() / parts
            top1 += (logits.detach().argmax(1) == targets).float().mean() / parts
        if self.average is not None:
            self.average.update(self.model)
        return mean, top1

    def _drop_uniforms(self, epoch: int, low: int, high: int, device: torch.device) -> torch.Tensor:
        """The random numbers that decide which blocks the images at positions [low, high) skip: float32 (high - low, blocks)."""
        drawn = uniforms(self.options.seed, Stream.DROP, epoch, low, high, cast(int, self.model.blocks))
        return to_device(drawn.astype(np.float32), device)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
        smoothing = self.options.label_smoothing
        if share is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return mixed_loss(logits, labels, share, smoothing)
