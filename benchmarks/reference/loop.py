"""The released SeMi training loop, written from its description: what `semi-fast train` is timed against.

It computes what the preset `default` computes, with the structure and cost of the released code: DataLoaders with
Pillow, blocking copies, an eager float32 network in NCHW, one row of the bank at a time, a loop over the tensors of the
average, and six values read back in every step. It is no slower than it need be:

- loaders and their processes go on from pass to pass, where the released code makes new ones;
- the network is ours, which does not count the batches that a normalisation has seen (25 calls less a step);
- SGD is as the installed torch has it by default (on a GPU one call for many tensors; the releases of torch that the
  code was written for looped over them);
- in one process with ours it shares what that sets: TF32 where torch offers it, and cuDNN's search for the fastest.

Where the released code has an error that changes what is learned, this is corrected, at no more cost but for five small
calls: features are put back in order with the logits, the bank's lowest slot leaves whole (8 waits, not 9), prototypes
are means over filled slots. Its decay is the released one, of what was not accepted since the last decay; a test holds
that, where it spares nothing, the two learn the same from the same pixels.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.reference import pillow_loaders, semi_step
from benchmarks.reference.pillow_loaders import Loaded
from semi_fast.batch import RowLayout, split_rows
from semi_fast.methods.base import class_prior, log_power
from semi_fast.models import make_classifier
from semi_fast.prepared.manifest import Manifest, Split
from semi_fast.rundir.scores import scores
from semi_fast.schema.config import Config, check
from semi_fast.schema.semi import SemiConfig

RENDERED = """
threshold hardness_scale mixing prototype_temperature bank_slots bank_decay bank_decay_every
alignment_weight alignment_temperature alignment_sharpening center_momentum adjustment pseudo_label_adjustment
warmup_epochs
""".split()  # noqa: SIM905, names read best as one text
HEADS = ("head", "balanced_head")
TOP = 5


def check_rendered(config: Config) -> None:
    """Raise ValueError for a configuration that asks for what the loop does not do."""
    check(config)
    if config.method.name != "semi":
        raise ValueError(f"method.name must be semi for the reference loop; got {config.method.name}")
    for field in fields(SemiConfig):
        value = getattr(config.method.semi, field.name)
        if field.name not in RENDERED and value != field.default:
            raise ValueError(f"the reference loop has method.semi.{field.name}={field.default}; got {value}")
    pillow_loaders.check_rendered(config)


def interleave(rows: Tensor, groups: int) -> Tensor:
    """Row groups * a + b at place (N / groups) * b + a, so that every part of the batch holds rows of every kind."""
    return rows.reshape(-1, groups, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def de_interleave(rows: Tensor, groups: int) -> Tensor:
    """The inverse of `interleave`."""
    return rows.reshape(groups, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


class ReferenceLoop:
    """One run of the loop on one device."""

    def __init__(self, config: Config, manifest: Manifest, split: Split, device: torch.device, *, workers: int):
        """`workers` processes for each of the loaders; 0: this process does their work."""
        check_rendered(config)
        self.config, self.options, self.device = config, config.method.semi, device
        classes, optim = manifest.num_classes, config.optim
        self.labeled_counts, self.test_labels = split.labeled_counts, torch.from_numpy(manifest.labels("test").copy())
        torch.manual_seed(config.seed)
        self.model = make_classifier(config.model, classes, HEADS, manifest.resolution).to(device)
        self.ema_model = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.parameters = [name for name, _ in self.model.named_parameters()]
        self.buffers = [name for name, _ in self.model.named_buffers()]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        free = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": free, "weight_decay": 0.0}],
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=optim.momentum > 0,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, math.cos(7 * math.pi * step / (16 * optim.steps)))
        )
        prior = class_prior(split.labeled_counts, device)
        self.adjustment = log_power(prior, self.options.adjustment)  # float64, as released (2.1)
        self.label_adjustment = log_power(prior, self.options.pseudo_label_adjustment)
        self.bank = semi_step.empty_bank(classes, self.options.bank_slots, self.model.features, device)
        self.label_counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.label_share = torch.full((classes,), 1 / classes, device=device)
        self.center = torch.zeros(self.model.features, device=device)
        self.done = 0
        self.meters: dict[str, float] = {}  # of the last step
        self.loading_seconds = 0.0  # by the clock on the wall, of all steps
        self.batches = pillow_loaders.train_batches(config, manifest, split, workers=workers)
        self.test_batches = pillow_loaders.test_batches(manifest, workers=workers)

    def step(self) -> None:
        """All of one step, from the next images to the values on the host."""
        self.update(self.fetch())

    def fetch(self) -> Loaded:
        """The images of a step, on the host: made here, or waited for."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.loading_seconds += time.perf_counter() - began
        return batch

    def update(self, batch: Loaded) -> None:
        """What a step does with its images."""
        ((labeled,), labels), ((weak, *strong), _) = batch
        o, epoch_steps = self.options, self.config.method.epoch_steps
        layout = RowLayout(len(labeled), len(weak), len(strong))
        groups = layout.total // layout.labeled
        inputs = interleave(torch.cat([labeled, weak, *strong]), groups).to(self.device)
        labels = labels.to(self.device)
        outputs = self.model(inputs)
        features, logits, balanced = (
            split_rows(de_interleave(rows, groups), layout)
            for rows in (outputs.features, outputs.logits["head"], outputs.logits["balanced_head"])
        )
        active = self.done // epoch_steps >= o.warmup_epochs
        if active:
            found = semi_step.corrected_pseudo_labels(
                logits.weak,
                balanced.weak,
                features.strong[: layout.unlabeled],
                semi_step.prototypes_of_filled(self.bank),
                self.label_share * (o.mixing * (self.done // epoch_steps) * epoch_steps / self.config.optim.steps),
                self.label_adjustment,
                threshold=o.threshold,
                temperature=o.prototype_temperature,
                span=o.hardness_scale,
            )
        else:
            found = semi_step.warm_up_labels(logits.weak, balanced.weak, self.label_adjustment, threshold=o.threshold)
        self.count(found)
        label, confidence, mask = (
            torch.cat([rows] * layout.strong_views) for rows in (found.label, found.confidence, found.mask)
        )
        semi_step.push(self.bank, features.strong, label, confidence, mask, semi_step.insert_lowest)

        supervised = cross_entropy(logits.labeled, labels)
        unlabeled = semi_step.masked_cross_entropy(logits.strong, found.label, found.mask * found.hardness)
        balanced_supervised = cross_entropy(balanced.labeled + self.adjustment, labels)
        balanced_unlabeled = semi_step.masked_cross_entropy(
            balanced.strong, found.balanced_label, found.balanced_mask.float()
        )
        loss = supervised + unlabeled + balanced_supervised + balanced_unlabeled
        if active:
            alignment, self.center = semi_step.embedding_align(
                features.weak,
                features.strong,
                self.center,
                (~found.mask).float(),
                temperature=o.alignment_temperature,
                sharpening=o.alignment_sharpening,
                momentum=o.center_momentum,
            )
            loss = loss + o.alignment_weight * alignment
        loss.backward()
        self.meters = {  # each waits for the device, as in the released code
            "total": loss.item(),
            "supervised": supervised.item(),
            "unlabeled": unlabeled.item(),
            "balanced_supervised": balanced_supervised.item(),
            "balanced_unlabeled": balanced_unlabeled.item(),
            "mask": found.mask.float().mean().item(),
        }
        self.optimizer.step()
        self.scheduler.step()
        self.average()
        self.model.zero_grad()
        self.done += 1
        if self.done % o.bank_decay_every == 0:
            semi_step.decay(self.bank, o.bank_decay)

    def count(self, found: semi_step.PlainLabels) -> None:
        """Count the selected pseudo-labels; renew the shares in the last step of an epoch."""
        semi_step.count_classes(self.label_counts, found.label, found.mask)
        if (self.done + 1) % self.config.method.epoch_steps == 0 and self.label_counts.sum() > 0:
            self.label_share = self.label_counts / self.label_counts.sum()

    @torch.no_grad()
    def average(self) -> None:
        """Tensor after tensor: parameters are averaged, buffers copied (2.14)."""
        decay = self.config.ema.decay
        if self.config.ema.ramp:
            decay = min(decay, 1 - 1 / (self.done + 1))
        current, averaged = self.model.state_dict(), self.ema_model.state_dict()
        for name in self.parameters:
            averaged[name].copy_(averaged[name] * decay + (1 - decay) * current[name].detach())
        for name in self.buffers:
            averaged[name].copy_(current[name])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """top1 and balanced_accuracy of the averaged weights' balanced head on the test set, in percent."""
        predicted, meters = [], [0.0] * 5
        for (images,), labels in self.test_batches:
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.ema_model(images).logits
            values = [cross_entropy(logits["balanced_head"], labels).item()]
            for head in HEADS:
                hits = logits[head].topk(min(TOP, logits[head].shape[1]), 1).indices == labels.unsqueeze(1)
                values += [hits[:, :1].float().sum().item(), hits.float().sum().item()]
            meters = [meter + value for meter, value in zip(meters, values, strict=True)]
            predicted.append(logits["balanced_head"].argmax(1))
        classes = len(self.labeled_counts)
        cells = self.test_labels * classes + torch.cat(predicted).cpu()
        confusion = torch.bincount(cells, minlength=classes**2).view(classes, classes).numpy()
        found = scores(confusion, self.labeled_counts)
        return {name: found[name] for name in ("top1", "balanced_accuracy")}

    def close(self) -> None:
        """End the loaders' processes."""
        self.batches = iter(())
