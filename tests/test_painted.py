"""An index painted into the pixels survives source, views, forward, split and bank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from semi_fast.batch import Outputs, RowLayout, Rows, split_rows
from semi_fast.loop.sampling import Batches
from semi_fast.methods import Environment, make_method, memory_bank
from semi_fast.pipelines.augment import Augmenter
from semi_fast.pipelines.resident import ResidentSource
from semi_fast.prepared.manifest import load_manifest
from semi_fast.schema.data import AugmentConfig
from semi_fast.schema.method import MethodConfig, SemiConfig

CPU = torch.device("cpu")
CLASSES = 10


def test_the_index_of_an_image_arrives_in_its_slot(digits: Path) -> None:
    manifest = load_manifest(digits)
    source = ResidentSource(manifest, CPU, "")
    total = len(source.images)
    painted = torch.arange(total)
    source.images[..., 0] = (painted // 256).to(torch.uint8).view(-1, 1, 1)
    source.images[..., 1] = (painted % 256).to(torch.uint8).view(-1, 1, 1)

    layout = RowLayout(8, 16, 2)
    batches = Batches(np.arange(40), np.arange(40, total), seed=3, labeled_rows=8, unlabeled_rows=16)
    still = AugmentConfig(flip=True, pad=2, cutout=0, operations=0)  # geometry leaves a flat image as it is
    augmenter = Augmenter(
        still,
        seed=3,
        resolution=manifest.resolution,
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
        device=CPU,
        dtype=torch.float64,
    )
    method = make_method(MethodConfig(name="semi", semi=SemiConfig(warmup_epochs=0, bank_slots=64)), steps=5)
    state = method.init(Environment((4,) * CLASSES, 1, CPU, torch.float64))

    for step in range(5):
        ids, visits = (torch.from_numpy(part) for part in batches.share(step))
        images = torch.empty(layout.images, *manifest.resolution, 3, dtype=torch.uint8)
        source.read(ids, images)
        rows = Rows(images, ids, visits, ids[:8] % CLASSES, layout)
        views = augmenter.views(rows)
        index = (256 * views[:, 0] + views[:, 1]).mean((1, 2)).round()  # [N], what the pixels say
        labeled, weak, strong = split_rows(index.long(), layout)
        assert torch.equal(labeled, ids[:8])
        assert torch.equal(weak, ids[8:])
        assert torch.equal(strong, ids[8:].repeat(2))
        sure = 20 * torch.nn.functional.one_hot(index.long() % CLASSES, CLASSES).double()
        outputs = Outputs(index.unsqueeze(1).clone(), dict.fromkeys(("head", "balanced_head"), sure))
        loss = method.loss(state, rows, outputs, torch.tensor(step))
        method.update(state, loss.pending | loss.totals, torch.tensor(step))

    filled = memory_bank.filled(state)
    assert filled.sum() == 5 * 2 * 16
    for k in range(CLASSES):
        stored = state["bank.features"][k, filled[k], 0].long()
        assert torch.equal(stored % CLASSES, torch.full_like(stored, k)), "a slot holds an image of its own class"
        numbers = state["bank.inserted"][k, filled[k]]
        seen = torch.stack([torch.from_numpy(batches.whole(int(n) // 32)[1].ids)[int(n) % 16] for n in numbers])
        assert torch.equal(stored, seen), "and the image that was drawn at that step and row"
