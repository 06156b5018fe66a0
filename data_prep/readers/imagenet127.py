"""ImageNet-127: ILSVRC-2012 in 127 super-classes, from the downsampled batches or from the folders of images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.readers.downsampled_imagenet import find_batches, read_batches
from semi_fast.data_prep.readers.ilsvrc import read_ilsvrc
from semi_fast.data_prep.readers.image_file import REFUSED, Accepted

FOLDER_RESOLUTION = 32


def read_imagenet127(
    raw: Path,
    resolution: int | None,
    kept: Path | None = None,
    accepted: Accepted = REFUSED,
    left_out: Collection[Path] = (),
) -> Raw:
    """Whichever of the two sources lies in `raw`; ValueError where there is none, or both.

    Batches have a resolution (None takes it, another is refused); images are resized to 32 pixels, or as asked, and
    what a killed run had decoded is taken from `kept`.
    """
    batches, images = find_batches(raw), (raw / "train").is_dir()
    if batches and images:
        raise ValueError(f"--raw must hold either train/<synset>/ folders or downsampled batches; {raw} has both")
    if batches:
        if accepted != REFUSED:
            raise ValueError(f"the downsampled batches hold no image files; leave out{accepted.arguments}")
        return read_batches(batches, raw, resolution)
    if images:
        side = FOLDER_RESOLUTION if resolution is None else resolution
        return read_ilsvrc(raw, side, kept, accepted, left_out)
    raise ValueError(
        f"--raw must hold train_data_batch_1 to 10 and val_data (downsampled ImageNet, pickles or .npz), or "
        f"train/<synset>/ and val/ (ILSVRC-2012); {raw} holds neither"
    )
