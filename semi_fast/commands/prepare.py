"""Turn raw data into a prepared data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semi_fast.commands import PATH
from semi_fast.commands.inspect import print_data
from semi_fast.commands.split import add_split_flags
from semi_fast.data_prep import DATASETS
from semi_fast.schema.split import SplitConfig

if TYPE_CHECKING:
    from semi_fast.data_prep.formats import Formats
    from semi_fast.prepared.manifest import Manifest


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument(
        "--raw", type=PATH, metavar="DIR", help="the raw data, as published or train/<class>/*, test/<class>/*"
    )
    parser.add_argument("--out", required=True, type=PATH, metavar="DIR", help="where the prepared data set goes")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the images (not of CIFAR)")
    parser.add_argument(
        "--formats", default="resident", metavar="F,F", help="of resident, ffcv, dali; default: resident"
    )
    parser.add_argument(
        "--image-format", choices=["raw", "png", "jpeg"], default="raw", help="in DALI's shards; jpeg loses"
    )
    parser.add_argument("--quality", type=int, default=95, help="of jpeg, 1..100")
    images = parser.add_argument_group("what is accepted of images (folder, imagenet127)")
    images.add_argument(
        "--on-bad",
        choices=["fail", "skip"],
        default="fail",
        help="skip leaves out up to 1 %% and lists them in bad.csv",
    )
    images.add_argument("--scale16", action="store_true", help="of 16 bits a channel, take the upper 8")
    images.add_argument("--first-frame", action="store_true", help="of an animation, take the first frame")
    images.add_argument("--follow", action="store_true", help="follow links out of the folder")
    add_split_flags(parser.add_argument_group("a split, whose rows alone are then prepared"))


def run(
    *,
    dataset: str,
    out: str | Path,
    raw: str | Path | None = None,
    resolution: int | None = None,
    formats: str = "resident",
    image_format: str = "raw",
    quality: int = 95,
    on_bad: str = "fail",
    scale16: bool = False,
    first_frame: bool = False,
    follow: bool = False,
    **keys: Any,
) -> None:
    """Prepare a data set and say what was made.

    What images are accepted (`on_bad` to `follow`) is for raw data that is files of images. With `keys` of a split the
    data set holds that split's rows alone, and the split.
    """
    from semi_fast.data_prep import prepare as raw_data
    from semi_fast.data_prep.formats import Formats
    from semi_fast.data_prep.readers.image_file import REFUSED, Accepted
    from semi_fast.data_prep.subset import inputs_digest, prepare_subset

    if (raw is None) != (dataset == "digits"):
        rule = "comes with scikit-learn and takes no --raw" if dataset == "digits" else "needs --raw, the raw data"
        raise ValueError(f"prepare {dataset} {rule}; got {raw or 'none'}")
    if resolution is not None and dataset in ("cifar10", "cifar100"):
        raise ValueError(f"prepare {dataset} keeps the published 32x32 pixels; leave out --resolution {resolution}")
    if raw is not None and not Path(raw).is_dir():
        raise ValueError(f"--raw must be a directory; {raw} is not")
    accepted = Accepted(on_bad, scale16, first_frame, follow)
    if accepted != REFUSED and dataset not in ("folder", "imagenet127"):
        raise ValueError(f"prepare {dataset} reads no image files; leave out{accepted.arguments}")
    chosen, split = Formats(tuple(formats.split(",")), image_format, quality), SplitConfig(**keys)
    folder = None if raw is None else Path(raw)
    sized = {} if resolution is None else {"resolution": resolution}

    def whole(target: Path, formats: Formats) -> Manifest:
        if folder is None:
            return raw_data.prepare_digits(target, formats=formats, **sized)
        if dataset == "cifar10":
            return raw_data.prepare_cifar10(folder, target, formats)
        if dataset == "cifar100":
            return raw_data.prepare_cifar100(folder, target, formats)
        if dataset == "stl10":
            return raw_data.prepare_stl10(folder, target, formats=formats, **sized)
        if dataset == "imagenet127":
            return raw_data.prepare_imagenet127(folder, target, formats=formats, accepted=accepted, **sized)
        return raw_data.prepare_folder(folder, target, formats=formats, accepted=accepted, **sized)

    if split == SplitConfig():
        manifest = whole(Path(out), chosen)
    else:
        inputs = inputs_digest(f"{dataset} {resolution} {accepted}", folder)
        manifest = prepare_subset(whole, inputs, split, Path(out), chosen)
    print_data(manifest)
    if "subset" in manifest.source:
        print(f"note: a subset of ImageNet-127, {manifest.source['subset']}", file=sys.stderr)
    hidden, repeated = manifest.source.get("hidden_files_ignored"), manifest.source["repeated_test_images"]
    if modes := manifest.source.get("converted_to_rgb"):
        listed = ", ".join(f"{mode} {count}" for mode, count in modes.items())
        print(f"note: {sum(modes.values())} images were converted to RGB ({listed})", file=sys.stderr)
    if hidden:
        print(f"note: {hidden} hidden files, or leftovers of file managers, were ignored", file=sys.stderr)
    if left_out := manifest.source.get("left_out"):
        print(f"warning: {left_out} files were left out, see {manifest.root / raw_data.BAD_FILE}", file=sys.stderr)
    if repeated:
        print(f"warning: {repeated} test images have the pixels of a train or unlabeled image", file=sys.stderr)
