"""Long-tailed counts and the splits cut by them: the published table, and properties over random requests."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast import philox
from semi_fast.data_prep import long_tail
from semi_fast.data_prep.long_tail import RULES, class_counts, make_split, split_for
from semi_fast.prepared.manifest import Manifest, check_split, save_split
from semi_fast.schema.split import SplitConfig
from tests.conftest import SHARED
from tests.synthetic_data import write_prepared

TRAIN = (40, 35, 50, 38)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_prepared(tmp_path_factory.mktemp("data") / "train_only", TRAIN, (2,) * 4)


@pytest.fixture(scope="module")
def with_unlabeled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_prepared(tmp_path_factory.mktemp("data") / "with_unlabeled", TRAIN, (2,) * 4, unlabeled=17)


@pytest.mark.parametrize(
    ("maximum", "ratio", "counts", "total"),
    [
        (500, 100, "500 299 179 107 64 38 23 13 8 5", 1236),
        (4000, 100, "4000 2397 1437 861 516 309 185 111 66 40", 9922),
        (1500, 100, "1500 899 539 323 193 116 69 41 25 15", 3720),
        (3000, 100, "3000 1798 1078 646 387 232 139 83 50 30", 7443),
        (500, 150, "500 286 164 94 53 30 17 10 5 3", 1162),
        (4000, 150, "4000 2292 1313 752 431 247 141 81 46 26", 9329),
        (1500, 150, "1500 859 492 282 161 92 53 30 17 10", 3496),
        (3000, 150, "3000 1719 985 564 323 185 106 60 34 20", 6996),
        (150, 10, "150 116 89 69 53 41 32 25 19 15", 609),
        (450, 10, "450 348 269 208 161 125 96 75 58 45", 1835),
        (150, 20, "150 107 77 55 39 28 20 14 10 7", 507),
        (450, 20, "450 322 231 165 118 85 61 43 31 22", 1528),
    ],
)
def test_counts_of_ten_classes_are_the_published_table(maximum: int, ratio: float, counts: str, total: int) -> None:
    assert class_counts(maximum, 10, ratio) == [int(n) for n in counts.split()]
    assert sum(class_counts(maximum, 10, ratio)) == total


@pytest.mark.parametrize(
    ("maximum", "ratio", "head", "tail", "total"),
    [
        (50, 10, [50, 48, 47, 46, 45, 44], [5, 5, 5, 5, 5, 5], 1911),
        (400, 10, [400, 390, 381, 373], [42, 41, 40, 40], 15651),
        (150, 10, [150, 146, 143], [15, 15, 15], 5835),
        (300, 10, [300, 293, 286], [31, 30, 30], 11720),
        (50, 20, [50, 48, 47, 45], [2, 2, 2], 1545),
        (400, 20, [400, 388, 376], [21, 20, 20], 12719),
        (150, 20, [150, 145, 141], [7, 7, 7], 4741),
        (300, 20, [300, 291, 282], [15, 15, 15], 9527),
    ],
)
def test_counts_of_a_hundred_classes_are_the_published_table(
    maximum: int, ratio: float, head: list[int], tail: list[int], total: int
) -> None:
    counts = class_counts(maximum, 100, ratio)
    assert (len(counts), sum(counts)) == (100, total)
    assert counts[: len(head)] == head
    assert counts[-len(tail) :] == tail


@given(st.integers(0, 10**6), st.integers(2, 1000), st.floats(1, 1000))
def test_counts_fall_from_the_maximum_to_its_share(maximum: int, num_classes: int, ratio: float) -> None:
    counts = class_counts(maximum, num_classes, ratio)
    assert len(counts) == num_classes
    assert counts[0] == maximum
    assert counts[-1] == int(maximum / ratio)
    # Truncation of two nearly equal numbers may put the last count one above the one before it.
    assert all(a + 1 >= b for a, b in pairwise(counts))


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("inf"), float("nan")])
def test_a_ratio_below_one_or_not_finite_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        class_counts(10, 10, ratio)


@settings(max_examples=150)
@given(
    rule=st.sampled_from(list(RULES)),
    labeled_max=st.integers(3, 14),
    unlabeled_max=st.integers(0, 14) | st.none(),
    imbalance=st.floats(1, 3),
    shape=st.sampled_from(["consistent", "uniform", "reversed"]),
    held=st.integers(0, 7),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_split_has_the_counts_asked_for_and_its_parts_are_apart(
    manifest: Manifest, rule, labeled_max, unlabeled_max, imbalance, shape, held, seed
) -> None:  # fmt: skip
    ratio = 1.0 if not unlabeled_max or shape == "uniform" else imbalance
    shape = "consistent" if not unlabeled_max or (shape, ratio) == ("reversed", 1) else shape
    seed = 0 if RULES[rule].shuffle == "never" else seed
    config = SplitConfig(None, labeled_max, unlabeled_max, imbalance, ratio, shape, rule, held, seed)
    split = make_split(manifest, "x", config)
    expected = class_counts(labeled_max, 4, imbalance)
    assert split.labeled_counts == tuple(expected)
    if unlabeled_max is None:
        assert split.unlabeled_counts == tuple(n - k - held for n, k in zip(TRAIN, expected, strict=True))
    elif shape == "uniform":
        assert split.unlabeled_counts == (unlabeled_max,) * 4
    else:
        falling = class_counts(unlabeled_max, 4, ratio)
        assert split.unlabeled_counts == tuple(falling if shape == "consistent" else falling[::-1])
    labeled, unlabeled, validation = map(
        set, (split.labeled.tolist(), split.unlabeled.tolist(), split.validation.tolist())
    )
    assert len(validation) == 4 * held
    assert not validation & (labeled | unlabeled)
    copies = labeled if RULES[rule].labeled_in_unlabeled and unlabeled_max != 0 else set()
    assert labeled & unlabeled == copies
    labels = manifest.labels("train")
    for ids in (split.labeled, split.unlabeled, split.validation):
        assert np.all(np.diff(labels[ids]) >= 0), "class by class"
    check_split(split, manifest)
    again = make_split(manifest, "x", SplitConfig(**split.parameters))
    assert np.array_equal(again.labeled, split.labeled)
    assert np.array_equal(again.unlabeled, split.unlabeled)


def test_semi_takes_the_first_rows_of_each_class_in_file_order(manifest: Manifest) -> None:
    config = SplitConfig(labeled_max=8, unlabeled_max=12, imbalance_labeled=4, imbalance_unlabeled=2,
                         validation_per_class=2)  # fmt: skip
    split = make_split(manifest, "x", config)
    rows = [np.flatnonzero(manifest.labels("train") == k) for k in range(4)]
    labeled, unlabeled = class_counts(8, 4, 4), class_counts(12, 4, 2)
    assert split.labeled.tolist() == np.concatenate([r[:n] for r, n in zip(rows, labeled, strict=True)]).tolist()
    both = [r[: n + m] for r, n, m in zip(rows, labeled, unlabeled, strict=True)]
    assert split.unlabeled.tolist() == np.concatenate(both).tolist()
    assert split.validation.tolist() == np.concatenate([r[-2:] for r in rows]).tolist()


def _labeled(manifest: Manifest, rule, seed: int) -> list[int]:
    return make_split(manifest, "x", SplitConfig(labeled_max=10, rule=rule, seed=seed)).labeled.tolist()


def test_rules_differ_in_their_order(manifest: Manifest) -> None:
    assert _labeled(manifest, "cossl", 0) == _labeled(manifest, "semi", 0)
    assert _labeled(manifest, "cossl", 5) != _labeled(manifest, "semi", 0)
    for rule in ("daso", "usb"):
        assert _labeled(manifest, rule, 0) != _labeled(manifest, "semi", 0)
        assert _labeled(manifest, rule, 0) != _labeled(manifest, rule, 1)


def test_a_shuffled_class_is_in_the_order_of_its_philox_words(manifest: Manifest) -> None:
    rows = np.flatnonzero(manifest.labels("train") == 0)
    words = philox.philox(7, (np.full_like(rows, philox.SPLIT), rows * 0, rows, rows * 0))[0]
    ordered = sorted(rows.tolist(), key=dict(zip(rows.tolist(), words.tolist(), strict=True)).__getitem__)
    assert _labeled(manifest, "daso", 7)[:10] == ordered[:10]


def test_nothing_asked_for_is_everything(manifest: Manifest) -> None:
    split = make_split(manifest, "x", SplitConfig(validation_per_class=1))
    assert split.labeled_counts == tuple(n - 1 for n in TRAIN)
    assert split.unlabeled.tolist() == split.labeled.tolist()
    assert split.unlabeled_counts == (0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"split\.rule=usb .* split\.unlabeled_max=0"):
        make_split(manifest, "x", SplitConfig(rule="usb"))
    assert len(make_split(manifest, "x", SplitConfig(rule="usb", unlabeled_max=0)).unlabeled) == 0


def test_the_unlabeled_part_is_always_added_whole(with_unlabeled: Manifest) -> None:
    part = list(range(sum(TRAIN), sum(TRAIN) + 17))
    stl10 = make_split(with_unlabeled, "x", SplitConfig(labeled_max=9, imbalance_labeled=3, unlabeled_max=0))
    assert stl10.unlabeled.tolist() == part
    assert stl10.unlabeled_counts is None
    assert stl10.labeled_counts == (9, 6, 4, 3)
    everything = make_split(with_unlabeled, "x", SplitConfig())
    assert everything.unlabeled.tolist() == everything.labeled.tolist() + part
    apart = make_split(with_unlabeled, "x", SplitConfig(rule="daso"))
    assert (len(apart.labeled), apart.unlabeled.tolist()) == (sum(TRAIN), part)
    some = make_split(with_unlabeled, "x", SplitConfig(rule="daso", labeled_max=5, unlabeled_max=6))
    assert len(some.unlabeled) == 4 * 6 + 17
    assert not set(some.labeled) & set(some.unlabeled)
    check_split(some, with_unlabeled)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SplitConfig(labeled_max=36), r"class 'class_1' has 35 train images, but 36 labeled \+ 0 unlabeled \+ 0 held"),
        (
            SplitConfig(labeled_max=20, unlabeled_max=16),
            "'class_1' has 35 .* 20 labeled .* 16 unlabeled .* split.unlabeled",
        ),
        (SplitConfig(labeled_max=20, unlabeled_max=15, validation_per_class=1), "'class_1' has 35 .* 1 held out"),
        (SplitConfig(unlabeled_max=1), "'class_0' has 40 train images, but 40 labeled . 1 unlabeled"),
        (SplitConfig(validation_per_class=35), "'class_1' has 35 train images, but 0 labeled . 0 unlabeled . 35"),
        (SplitConfig(validation_per_class=60), "'class_0' has 40 train images, but 0 labeled . 0 unlabeled . 60"),
        (SplitConfig(labeled_max=5, imbalance_labeled=6), "'class_3' gets 0 of 38: raise split.labeled_max .now 5"),
        (SplitConfig(labeled_max=0), r"split\.labeled_max must lie in \[1, 1000000000\]; got 0"),
        (SplitConfig(unlabeled_max=-1), r"split\.unlabeled_max must lie in \[0, .*; got -1"),
        (SplitConfig(validation_per_class=-1), r"split\.validation_per_class must lie in \[0, "),
        (SplitConfig(seed=-1), r"split\.seed must lie in \[0, 18446744073709551615\]; got -1"),
        (SplitConfig(seed=2**64), r"split\.seed must lie in .*; got 18446744073709551616"),
        (
            SplitConfig(labeled_max=5, imbalance_labeled=0.5),
            r"split\.imbalance_labeled must lie in \[1, 1e\+09\]; got 0.5",
        ),
        (SplitConfig(imbalance_labeled=2), r"split\.imbalance_labeled=2 needs split\.labeled_max"),
        (SplitConfig(labeled_max=5, imbalance_unlabeled=2), r"split\.imbalance_unlabeled=2 needs split\.unlabeled_max"),
        (
            SplitConfig(labeled_max=5, unlabeled_shape="reversed"),
            r"unlabeled_shape=reversed needs split\.unlabeled_max",
        ),
        (SplitConfig(labeled_fraction=0.0), r"split\.labeled_fraction must lie in \(0, 1\]; got 0"),
        (SplitConfig(labeled_fraction=1.01), r"split\.labeled_fraction must lie in \(0, 1\]; got 1.01"),
        (SplitConfig(labeled_fraction=float("nan")), r"split\.labeled_fraction must lie in .*; got nan"),
        (SplitConfig(labeled_fraction=0.1, labeled_max=5), r"both say .*; got 0.1 and 5: set one of them to null"),
        (
            SplitConfig(labeled_fraction=0.1, imbalance_labeled=2),
            r"split\.imbalance_labeled=2 needs split\.labeled_max",
        ),
        (
            SplitConfig(labeled_fraction=0.0125),
            r"'class_0' gets 0 of 40: raise split\.labeled_fraction \(now 0.0125\)",
        ),
        (
            SplitConfig(labeled_fraction=0.5, unlabeled_max=18),
            r"'class_1' has 35 .* 18 labeled \+ 18 .* lower split\.labeled_fraction, split\.unlabeled_max",
        ),
        (SplitConfig(rule="other"), r"split\.rule must be one of semi, cossl, daso, usb; got 'other'"),  # type: ignore[arg-type]
        (SplitConfig(unlabeled_shape="odd"), r"split\.unlabeled_shape must be one of"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(manifest: Manifest, config: SplitConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make_split(manifest, "x", config)
    assert "\n" not in str(caught.value)


def test_the_largest_possible_request_is_granted(manifest: Manifest) -> None:
    split = make_split(manifest, "x", SplitConfig(labeled_max=20, unlabeled_max=14, validation_per_class=1))
    assert split.unlabeled_counts == (14,) * 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("fraction", "held"), [(0.1, 0), (0.5, 0), (0.5, 3), (1.0, 2), (0.25, 1)])
def test_a_fraction_of_each_class_is_labeled_and_the_rest_is_unlabeled(
    manifest: Manifest, rule, fraction: float, held: int
) -> None:  # fmt: skip
    config = SplitConfig(rule=rule, labeled_fraction=fraction, validation_per_class=held,
                         seed=0 if RULES[rule].shuffle == "never" else 2)  # fmt: skip
    if fraction == 1 and not RULES[rule].labeled_in_unlabeled:
        with pytest.raises(ValueError, match=r"split\.labeled_fraction, use split\.rule=semi"):
            make_split(manifest, "x", config)
        return
    split = make_split(manifest, "x", config)
    expected = [round(fraction * (n - held)) for n in TRAIN]
    assert split.labeled_counts == tuple(expected)
    assert split.unlabeled_counts == tuple(n - held - k for n, k in zip(TRAIN, expected, strict=True))
    copies = sum(expected) if RULES[rule].labeled_in_unlabeled else 0
    assert len(split.unlabeled) == sum(TRAIN) - 4 * held - sum(expected) + copies
    assert len(split.validation) == 4 * held
    check_split(split, manifest)
    again = make_split(manifest, "x", SplitConfig(**split.parameters))
    assert split.parameters["labeled_fraction"] == fraction
    assert np.array_equal(again.labeled, split.labeled)


def test_a_fraction_takes_the_first_rows_and_rounds_halves_to_even(tmp_path: Path) -> None:
    sizes = (5, 15, 25, 35, 9, 11)
    manifest = write_prepared(tmp_path / "data", sizes, (1,) * 6)
    split = make_split(manifest, "x", SplitConfig(labeled_fraction=0.5))
    assert split.labeled_counts == (2, 8, 12, 18, 4, 6), "of 2.5, 7.5, 12.5, 17.5, 4.5 and 5.5"
    rows = [np.flatnonzero(manifest.labels("train") == k) for k in range(6)]
    first = [r[:n] for r, n in zip(rows, split.labeled_counts, strict=True)]
    assert split.labeled.tolist() == np.concatenate(first).tolist()
    assert split.unlabeled.tolist() == np.concatenate(rows).tolist(), "and everything is unlabeled"


def test_a_fraction_goes_with_a_maximum_of_unlabeled_images(manifest: Manifest, with_unlabeled: Manifest) -> None:
    config = SplitConfig(labeled_fraction=0.1, unlabeled_max=20, imbalance_unlabeled=4, unlabeled_shape="reversed")
    split = make_split(manifest, "x", config)
    assert (split.labeled_counts, split.unlabeled_counts) == ((4, 4, 5, 4), (5, 7, 12, 20))
    none = make_split(with_unlabeled, "x", SplitConfig(labeled_fraction=0.1, unlabeled_max=0))
    assert none.unlabeled.tolist() == list(range(sum(TRAIN), sum(TRAIN) + 17))


@pytest.mark.skipif(not (SHARED / "data" / "imagenet127.json").exists(), reason="class sizes are not beside it")
def test_a_tenth_of_imagenet127_is_the_published_number() -> None:
    """SeMi's protocol: 128,118 of 1,281,167 images."""
    content = json.loads((SHARED / "data" / "imagenet127.json").read_text(encoding="utf-8"))
    sizes = np.zeros(127, np.int64)
    for synset, count in content["synset_train_count"].items():
        sizes[content["synset_to_class"][synset]] += count
    labeled = long_tail._labeled_counts(SplitConfig(labeled_fraction=0.1), sizes.tolist())
    assert (sizes.sum(), sum(labeled)) == (1_281_167, 128_118)


def test_a_split_without_a_fraction_does_not_name_it(manifest: Manifest) -> None:
    """So its digest is that of a split made before there was such a key."""
    assert "labeled_fraction" not in make_split(manifest, "x", SplitConfig(labeled_max=4)).parameters


def test_a_whole_number_and_its_float_make_one_split(manifest: Manifest, tmp_path: Path) -> None:
    splits = [make_split(manifest, "x", SplitConfig(labeled_max=9, imbalance_labeled=r)) for r in (3, 3.0)]
    assert save_split(splits[0], tmp_path / "a.json").sha256 == save_split(splits[1], tmp_path / "b.json").sha256


def test_a_config_may_name_a_split_file(manifest: Manifest, tmp_path: Path) -> None:
    made = make_split(manifest, "named", SplitConfig(labeled_max=4))
    saved = save_split(made, tmp_path / "named.json")
    assert split_for(manifest, "run", SplitConfig(file=str(tmp_path / "named.json"), seed=9)).sha256 == saved.sha256
    assert split_for(manifest, "run", SplitConfig(labeled_max=4)).labeled.tolist() == made.labeled.tolist()
