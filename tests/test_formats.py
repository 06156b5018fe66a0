"""One data set in every format: the same digests, the same pixels, the same trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from semi_fast.cli import main
from semi_fast.pipelines.source import read_part
from semi_fast.prepared.manifest import formats, load_manifest, verify_manifest
from semi_fast.train import run

from .libraries import needs
from .tiny import config


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    assert main(["prepare", "digits", "--out", str(out), "--formats", "resident,ffcv,dali"]) == 0
    return out


@pytest.fixture(scope="module")
def weights(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("run") / "resident"
    run(config(digits, run_dir))
    return load_file(run_dir / "checkpoints/step_000000012/state.safetensors")


def test_the_digest_of_the_data_is_that_of_its_pixels(every: Path, digits: Path) -> None:
    manifest = load_manifest(every)
    assert formats(manifest) == ("resident", "dali", "ffcv")
    assert manifest.data_sha256 == load_manifest(digits).data_sha256
    verify_manifest(manifest)
    assert "--formats resident,ffcv,dali" in manifest.command


@pytest.mark.parametrize("source", ["ffcv", "dali"])
def test_training_from_a_container_gives_the_same_weights(
    every: Path, weights: dict[str, torch.Tensor], tmp_path: Path, source: str
) -> None:
    needs(source)
    run(config(every, tmp_path / "run", f"--data.source={source}"))
    found = load_file(tmp_path / "run" / "checkpoints/step_000000012/state.safetensors")
    assert all(torch.equal(weights[name], found[name]) for name in weights)


@pytest.mark.parametrize("source", ["ffcv", "dali"])
def test_a_container_alone_is_enough(
    digits: Path, weights: dict[str, torch.Tensor], tmp_path: Path, source: str
) -> None:
    """Training, evaluation and validation from a data set that has no arrays of images."""
    needs(source)
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), "--formats", source]) == 0
    manifest, whole = load_manifest(tmp_path / "data"), load_manifest(digits)
    assert manifest.data_sha256 == whole.data_sha256
    assert not list((tmp_path / "data").glob("resident/*images*"))
    for part in ("train", "test"):
        assert np.array_equal(read_part(manifest, part, threads=1), whole.images(part))
    run(config(tmp_path / "data", tmp_path / "run", "--data.source=auto"))
    found = load_file(tmp_path / "run" / "checkpoints/step_000000012/state.safetensors")
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert main(["verify", str(tmp_path / "data")]) == 0
    with pytest.raises(ValueError, match="prepared without the format resident"):
        manifest.images("test")


@pytest.mark.parametrize("source", ["ffcv", "dali"])
def test_a_flipped_bit_is_found_before_a_library_maps_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    needs(source)
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), "--formats", source]) == 0
    name = next(name for name in load_manifest(tmp_path / "data").containers if "train" in name)
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    flags = config(tmp_path / "data", tmp_path / "run", f"--data.source={source}")
    with pytest.raises(ValueError, match="content differs from its SHA-256 in the manifest"):
        run(flags)
    assert main(["verify", str(tmp_path / "data")]) == 2
    assert path.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats", "npz"], "--formats must be some of resident,ffcv,dali, each once; got npz"),
        (["--formats", "ffcv,ffcv"], "each once; got ffcv,ffcv"),
        (["--formats", "resident,dali", "--image-format", "jpeg", "--quality", "0"], "--quality must lie in 1..100"),
        (["--formats", "dali", "--image-format", "jpeg"], "does not keep the pixels exactly"),
    ],
)
def test_wrong_formats_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
