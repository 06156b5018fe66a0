"""What a prepared data set contains, and the hashed split files over it."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any

import numpy as np

from semi_fast.disk import make_directory, named, publish_new
from semi_fast.sealed_json import digest, read_sealed, write_sealed

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A prepared data set: `manifest.json` of its directory, and the arrays it names."""

    root: Path
    """The prepared directory; neither in the file nor in the digest."""
    dataset: str
    class_names: tuple[str, ...]
    resolution: tuple[int, int]
    """Height and width of every image."""
    mean: tuple[float, float, float]
    """Per channel, of train pixels / 255."""
    std: tuple[float, float, float]
    counts: dict[str, tuple[int, ...] | int]
    """`train` and `test`: images per class; `unlabeled`: their number, 0 when there are none."""
    files: dict[str, dict[str, Any]]
    """Arrays: relative path -> bytes, sha256, shape, dtype; what the data set is, whatever formats hold it."""
    source: dict[str, Any]
    command: str
    versions: dict[str, str]
    resident: bool = True
    """Whether the arrays of images are on the disk; if not, containers hold the pixels."""
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files of other formats: relative path -> format, part, rows, bytes, sha256, and more by format."""
    sha256: str = ""
    """Digest of the canonical JSON of everything in the file but itself."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def data_sha256(self) -> str:
        """Digest of the classes and arrays alone: the same wherever, and by whatever command, they were prepared."""
        arrays = {name: entry["sha256"] for name, entry in self.files.items()}
        return digest({"class_names": list(self.class_names), "arrays": arrays})

    def length(self, part: str) -> int:
        """Number of images in a part; sample ids run through train, then unlabeled."""
        counts = self.counts[part]
        return counts if isinstance(counts, int) else sum(counts)

    def images(self, part: str) -> np.ndarray:
        """uint8 [n, H, W, 3] of `train`, `test` or `unlabeled`, memory-mapped and read-only."""
        if not self.resident:
            raise ValueError(f"{self.root} was prepared without the format resident; prepare it with that format too")
        if self.length(part) == 0:
            return np.zeros((0, *self.resolution, 3), np.uint8)
        return _open_array(self, images_file(part))

    def verified_images(self, part: str) -> np.ndarray:
        """As `images`, after hashing the file: for whoever reads all of it."""
        if self.length(part):
            _check_content(self, images_file(part))
        return self.images(part)

    def labels(self, part: str) -> np.ndarray:
        """int64 [n] of `train` or `test`; the unlabeled part has none."""
        if part == "unlabeled":
            raise ValueError("the unlabeled part has no labels; ask for train or test")
        return _open_array(self, labels_file(part))


@dataclass(frozen=True)
class Split:
    """Which sample ids are labeled, unlabeled and held out for validation; int64 [n] each."""

    name: str
    """That of its file; not part of the digest, so that equal splits have equal digests."""
    rule: str
    parameters: dict[str, Any]
    """Every `split.` key but `file`, defaults included: `SplitConfig(**parameters)` makes this split again."""
    data_sha256: str
    """`Manifest.data_sha256` of the data set whose samples the ids name."""
    labeled: np.ndarray
    unlabeled: np.ndarray
    validation: np.ndarray
    labeled_counts: tuple[int, ...]
    unlabeled_counts: tuple[int, ...] | None
    """Per true class, copies of labeled images not counted; None where the truth of some is unknown."""
    sha256: str = ""


def images_file(part: str) -> str:
    return f"resident/{part}_images.npy"


def labels_file(part: str) -> str:
    return f"resident/{part}_labels.npy"


def file_sha256(path: Path) -> str:
    with named(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(manifest: Manifest) -> Manifest:
    """Write and fsync `manifest.json` of `manifest.root`, which must have none; returns it with its digest."""
    body = asdict(manifest)
    del body["root"], body["sha256"]
    sha256 = write_sealed(manifest.root / MANIFEST_FILE, {"version": SCHEMA_VERSION, **body}, indent=1)
    return replace(manifest, sha256=sha256)


def load_manifest(root: str | Path) -> Manifest:
    """The manifest of a prepared directory, with sizes and headers of its arrays and all labels checked, not pixels."""
    root = Path(root)
    path = root / MANIFEST_FILE
    if not path.is_file():
        where = "" if root.is_absolute() else f" (in {Path.cwd()}; name it in full to read it from anywhere)"
        raise ValueError(
            f"{root}{where} has no {MANIFEST_FILE}: not a prepared data set; make one with `semi-fast prepare`"
        )
    document = read_sealed(path, SCHEMA_VERSION)
    try:
        manifest = _parsed(root, document)
        _check_files(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a manifest of version {SCHEMA_VERSION} ({error!r}); prepare again") from error
    _check_arrays(manifest)
    return manifest


def verify_manifest(manifest: Manifest) -> None:
    """Re-hash every file; ValueError names the first that is not what the manifest says."""
    load_manifest(manifest.root)
    for name in sorted(kept_arrays(manifest)):
        _check_content(manifest, name)
    for name in sorted(manifest.containers):
        check_container(manifest, name)


def seal_split(split: Split) -> Split:
    """The split with the digest that its file carries."""
    return replace(split, sha256=digest(split_document(split)))


def split_document(split: Split) -> dict[str, Any]:
    """What the split's file holds, but for the digest."""
    body = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(split).items()}
    del body["name"], body["sha256"]
    return {"version": SCHEMA_VERSION, **body}


def save_split(split: Split, path: str | Path) -> Split:
    """Publish a split file atomically; returns it with its digest.

    A file that holds the same split is left as it is, any other is never replaced.
    """
    path, document = Path(path), split_document(split)
    make_directory(path.parent)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        write_sealed(temporary, document)
        publish_new(temporary, path)
    except FileExistsError:
        if path.is_symlink() or read_sealed(path, SCHEMA_VERSION)["sha256"] != digest(document):
            raise ValueError(f"{path} exists and is another split; choose another name or delete it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return replace(split, sha256=digest(document))


def load_split(path: str | Path, manifest: Manifest) -> Split:
    """A split file, checked against its digest, the manifest and the labels; ValueError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such split file; make one with `semi-fast split`")
    document = read_sealed(path, SCHEMA_VERSION)
    if document.get("data_sha256") != manifest.data_sha256:
        raise ValueError(f"{path}: made for another data set (the data's SHA-256 differs); make the split again")
    try:
        unlabeled_counts = document["unlabeled_counts"]
        split = Split(
            name=path.stem,
            rule=str(document["rule"]),
            parameters=dict(document["parameters"]),
            data_sha256=manifest.data_sha256,
            labeled=_ids(document["labeled"]),
            unlabeled=_ids(document["unlabeled"]),
            validation=_ids(document["validation"]),
            labeled_counts=tuple(document["labeled_counts"]),
            unlabeled_counts=None if unlabeled_counts is None else tuple(unlabeled_counts),
            sha256=document["sha256"],
        )
        check_split(split, manifest)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a split file of version {SCHEMA_VERSION} ({error}); make it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; make it again") from error
    return split


def find_split(manifest: Manifest, file: str) -> Path:
    """Where `split.file` points: DATA/splits/NAME.json if there is one of that name, else the path itself."""
    named = manifest.root / "splits" / f"{file}.json"
    return named if PurePosixPath(file).name == file and named.is_file() else Path(file)


def check_split(split: Split, manifest: Manifest) -> None:
    """ValueError unless ids are in range and unique, validation is apart, every class is labeled and counts hold."""
    train, total = manifest.length("train"), manifest.length("train") + manifest.length("unlabeled")
    for part, ids, end in (("labeled", split.labeled, train), ("unlabeled", split.unlabeled, total),
                           ("validation", split.validation, train)):  # fmt: skip
        if len(ids) and (ids.min() < 0 or ids.max() >= end):
            raise ValueError(f"{part} ids must be in 0..{end - 1}; got {ids.min()}..{ids.max()}")
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"{part} ids must be unique; {len(ids) - len(np.unique(ids))} are repeated")
        if part != "validation" and len(np.intersect1d(ids, split.validation)):
            raise ValueError(f"validation ids must not be {part} too; {len(np.intersect1d(ids, split.validation))} are")
    labeled, unlabeled = true_counts(manifest, split.labeled, split.unlabeled)
    if (split.labeled_counts, split.unlabeled_counts) != (labeled, unlabeled):
        raise ValueError("the counts per class must be those of the listed ids; they differ")
    if min(labeled) == 0:
        raise ValueError(f"every class needs a labeled image; {manifest.class_names[labeled.index(0)]!r} has none")


def true_counts(
    manifest: Manifest, labeled: np.ndarray, unlabeled: np.ndarray
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Images per true class of labeled ids, and of unlabeled ids that are not labeled copies (None: truth unknown)."""
    labels, known = manifest.labels("train"), manifest.length("train")

    of_labeled = _per_class(labels[labeled], manifest.num_classes)
    if len(unlabeled) and unlabeled.max() >= known:
        return of_labeled, None
    return of_labeled, _per_class(labels[np.setdiff1d(unlabeled, labeled)], manifest.num_classes)


def _parsed(root: Path, document: dict[str, Any]) -> Manifest:
    return Manifest(
        root=root,
        dataset=str(document["dataset"]),
        class_names=tuple(str(name) for name in document["class_names"]),
        resolution=_fixed(document["resolution"], int, 2),
        mean=_fixed(document["mean"], float, 3),
        std=_fixed(document["std"], float, 3),
        counts={p: n if isinstance(n, int) else tuple(map(int, n)) for p, n in document["counts"].items()},
        files={name: dict(entry) for name, entry in document["files"].items()},
        source=dict(document["source"]),
        command=str(document["command"]),
        versions=dict(document["versions"]),
        resident=bool(document.get("resident", True)),
        containers={name: dict(entry) for name, entry in document.get("containers", {}).items()},
        sha256=document["sha256"],
    )


def _fixed(values: list[Any], kind: type, length: int) -> Any:
    if len(values) != length:
        raise TypeError(f"{length} values expected, got {len(values)}")
    return tuple(kind(value) for value in values)


def _per_class(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


def _ids(values: list[int]) -> np.ndarray:
    if not all(type(value) is int for value in values):
        raise TypeError("ids must be integers")
    return np.array(values, np.int64)


def _check_files(manifest: Manifest) -> None:
    lengths = {part: manifest.length(part) for part in ("train", "test", "unlabeled") if manifest.length(part)}
    expected = {images_file(part): ((n, *manifest.resolution, 3), "uint8") for part, n in lengths.items()}
    expected |= {labels_file(part): ((manifest.length(part),), "int64") for part in ("train", "test")}
    if {name: (tuple(e["shape"]), e["dtype"]) for name, e in manifest.files.items()} != expected:
        raise ValueError("its files do not fit its counts")


def kept_arrays(manifest: Manifest) -> list[str]:
    """The arrays that are on the disk."""
    return [name for name in manifest.files if manifest.resident or name.endswith("_labels.npy")]


def formats(manifest: Manifest) -> tuple[str, ...]:
    """The formats that hold the pixels, `resident` first."""
    names = {entry["format"] for entry in manifest.containers.values()}
    return (*(["resident"] if manifest.resident else []), *sorted(names))


def check_container(manifest: Manifest, name: str) -> Path:
    """The path of a container whose size and SHA-256 are those of the manifest; ValueError otherwise."""
    path, entry = manifest.root / name, manifest.containers[name]
    if not path.is_file():
        raise ValueError(f"{path}: named by the manifest, but missing; prepare again")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path}: must have {entry['bytes']} bytes, has {path.stat().st_size}; prepare again")
    if file_sha256(path) != entry["sha256"]:
        raise ValueError(f"{path}: content differs from its SHA-256 in the manifest; prepare again")
    return path


def _check_arrays(manifest: Manifest) -> None:
    for name in kept_arrays(manifest):
        _open_array(manifest, name)
    for part in ("train", "test"):
        labels, classes = manifest.labels(part), manifest.num_classes
        if labels.min() < 0 or labels.max() >= classes or _per_class(labels, classes) != manifest.counts[part]:
            path = manifest.root / labels_file(part)
            raise ValueError(f"{path}: labels differ from the manifest's counts; prepare again")
        _check_content(manifest, labels_file(part))


def _check_content(manifest: Manifest, name: str) -> None:
    if file_sha256(manifest.root / name) != manifest.files[name].get("sha256"):
        raise ValueError(f"{manifest.root / name}: content differs from its SHA-256 in the manifest; prepare again")


def _open_array(manifest: Manifest, name: str) -> np.ndarray:
    path, entry = manifest.root / name, manifest.files[name]
    if not path.is_file():
        raise ValueError(f"{path}: named by the manifest, but missing; prepare again")
    if path.stat().st_size != entry.get("bytes"):
        raise ValueError(f"{path}: must have {entry.get('bytes')} bytes, has {path.stat().st_size}; prepare again")
    try:
        with named(path, "mmap"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, OverflowError, EOFError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path}: damaged array header ({error}); prepare again") from error
    if array.shape != tuple(entry["shape"]) or array.dtype.name != entry["dtype"] or not array.flags.c_contiguous:
        raise ValueError(
            f"{path}: must hold {entry['dtype']} {entry['shape']} row by row; got {array.dtype} {list(array.shape)} "
            f"with strides {array.strides}; prepare again"
        )
    return array
