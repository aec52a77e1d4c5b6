"""The training step: a net, its optimizer, and what is mixed, dropped and averaged on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from model import ARCHS
from model.resnet import ResNet
from pipeline.buffers import to_device
from pipeline.loader import Batch, Loader
from pipeline.plan import sampling
from training.averaging import WeightEMA
from training.compiling import compiled
from training.mixing import Mixing, apply, mixed_loss
from training.optimizers import load_state, make_optimizer
from training.uniforms import Stream, uniforms


class Learner:
    """`net` holds the weights; `tested` is what is validated and kept: the net, or the moving average of its weights."""

    def __init__(self, args: Any, accelerator: Accelerator, loader: Loader) -> None:
        self.args, self.accelerator = args, accelerator
        self.mixing = None
        if args.mixup or args.cutmix:
            self.mixing = Mixing(args.mixup, args.cutmix, args.seed, args.batch_size, accelerator.num_processes, args.accumulate)
        torch.manual_seed(args.seed)
        dropped = {"drop_path": args.drop_path} if args.drop_path else {}
        net = ARCHS[args.arch](num_classes=len(loader.classes), **dropped)
        self.net: ResNet = net.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average: WeightEMA | None = None

    def start(self, loader: Loader, saved: dict[str, Any] | None) -> None:
        """Get ready to train from the weights that the net has now; saved: the rest of a checkpoint, by `state_dict`."""
        args, accelerator = self.args, self.accelerator
        if args.ema is not None:
            self.average = WeightEMA(self.net, args.ema)
            if saved:
                self.average.load_state_dict(saved["average"])
                self.net.load_state_dict(saved["net"])
        optimizer = make_optimizer(args.optimizer, self.net, args.lr, args.momentum, args.weight_decay, not args.no_norm_decay)
        fast: nn.Module = self.net
        if args.compile:
            count = args.batch_size // accelerator.num_processes // args.accumulate
            side = loader.spec.size_at(loader.epoch)
            images = torch.zeros(count, 3, side, side, dtype=loader.spec.dtype, device=accelerator.device)
            inputs = [images.to(memory_format=torch.channels_last)]
            if args.drop_path:
                inputs.append(self._uniforms(0, 0, count, accelerator.device))
            fast = compiled(self.net, args.compile, inputs, accelerator.autocast, accelerator.print)
        self.model, self.optimizer = accelerator.prepare(fast, optimizer)
        if saved:
            load_state(self.optimizer, saved["optimizer"])
            if accelerator.scaler is not None and saved["scaler"]:
                accelerator.scaler.load_state_dict(saved["scaler"])

    @property
    def tested(self) -> nn.Module:
        return self.net if self.average is None else self.average.net

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the tested weights: tensors and plain values."""
        scaler = self.accelerator.scaler
        state = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        if self.average is not None:
            state |= {"average": self.average.state_dict(), "net": self.net.state_dict()}
        return state

    def step(self, batch: Batch, epoch: int, start: int, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One update from this process's part of a global batch; its mean loss and top-1 share, still on the device.

        epoch, start: the place where the global batch starts.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        low, high = sampling.share(start, start + self.args.batch_size, rank, processes)
        images, labels, parts = batch.images, batch.labels, self.args.accumulate
        shares: Sequence[torch.Tensor | None] = [None] * parts
        drawn: Sequence[tuple[torch.Tensor, ...]] = [()] * parts  # what the net takes beside the images
        if self.args.drop_path:
            drawn = [(part,) for part in self._uniforms(epoch, low, high, images.device).chunk(parts)]
        if self.mixing is not None:
            images, share = apply(images, self.mixing.draw(epoch, low, high, (images.shape[2], images.shape[3])))
            shares = share.chunk(parts)
        mean, top1 = torch.zeros(2, device=images.device)
        for part, targets, own, more in zip(images.chunk(parts), labels.chunk(parts), shares, drawn, strict=True):
            with self.accelerator.accumulate(self.model):  # without all-reduce but at the last part
                logits = self.model(part, *more)
                loss = self._loss(logits, targets, own)
                self.accelerator.backward(loss)  # divides by the number of parts
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean += loss.detach() / parts
            top1 += (logits.detach().argmax(1) == targets).float().mean() / parts
        if self.average is not None:
            self.average.update(self.net)
        return mean, top1

    def _uniforms(self, epoch: int, low: int, high: int, device: torch.device) -> torch.Tensor:
        """What decides which blocks are dropped for the images at positions [low, high): float32 (high - low, blocks)."""
        drawn = uniforms(self.args.seed, Stream.DROP, epoch, low, high, self.net.blocks)
        return to_device(drawn.astype(np.float32), device)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
        smoothing = self.args.label_smoothing
        if share is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return mixed_loss(logits, labels, share, smoothing)
