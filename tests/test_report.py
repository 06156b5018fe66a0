"""The report: what it shows, what it refuses, and that a page needs nothing but itself."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure

from semi_fast.report import write_report
from semi_fast.report.compare import comparison
from semi_fast.report.figures import pseudo_label_groups
from semi_fast.report.run import read_run
from semi_fast.rundir.scores import SCORES


def metrics_of(confusion: np.ndarray) -> dict:
    """What the engine writes of one head, from counts [C, C]."""
    recall = 100 * np.diag(confusion) / confusion.sum(1)
    third = len(recall) // 3
    return {
        "top1": 100 * np.trace(confusion) / confusion.sum(),
        "balanced_accuracy": recall.mean(),
        "geometric_mean": np.exp(np.log(np.maximum(recall, 1 / len(recall))).mean()),
        "many": recall[:third].mean() if third else None,
        "medium": recall[third : len(recall) - third].mean(),
        "few": recall[len(recall) - third :].mean() if third else None,
        "recall": recall.tolist(),
    }


def fake_run(
    path: Path,
    *,
    method: str = "semi",
    classes: int = 10,
    steps: int = 1000,
    skill: float = 1.0,
    seed: int = 0,
    names: list[str] | None = None,
    finished: bool = True,
) -> Path:
    """A run directory as the engine writes it, of a made-up long-tailed training."""
    random = np.random.default_rng(seed)
    path.mkdir(parents=True)
    names = names or [f"class {k}" for k in range(classes)]
    labeled = np.maximum(1, 500 * 0.01 ** (np.arange(classes) / max(1, classes - 1))).astype(int)
    supervised = method == "supervised"
    heads = ["head"] if method != "semi" else ["head", "balanced_head"]
    records = []
    for step in range(steps // 40, steps + 1, steps // 40):
        grown = 1 - np.exp(-4 * step / steps)
        seen = random.poisson(labeled * 2)
        used = random.binomial(seen, 0.9 * grown * (labeled / labeled.max()) ** 0.15)
        correct = random.binomial(used, 0.35 + 0.6 * grown * (labeled / labeled.max()) ** 0.3)
        predicted = correct + random.poisson((used - correct).sum() * labeled / labeled.sum())
        counts = {"seen": seen, "used": used, "correct": correct, "predicted": predicted}
        terms = {"total": 3 - 2 * grown, "supervised": 2 - 1.5 * grown, "unlabeled": 0.3 * grown}
        if method == "semi":
            terms |= {
                "balanced_supervised": 1.9 - grown,
                "balanced_unlabeled": 0.4 * grown,
                "embedding_alignment": 0.01,
            }
        record = {
            "kind": "train",
            "step": step,
            "seconds": step / 30,
            "lr": 0.03 * np.cos(7 * np.pi * step / 16 / steps),
        }
        record |= {"images_per_second": random.normal(900, 20), "rows_per_second": random.normal(2700, 60)}
        record["terms"] = {key: value + random.normal(0, 0.02) for key, value in terms.items()}
        record["stats"] = {"bank_fill": grown, "threshold": 0.95} if method == "semi" else {}
        fraction = {"used_fraction": used.sum() / seen.sum()}
        lists = {key: value.tolist() for key, value in counts.items()}
        record["pseudo_labels"] = None if supervised else fraction | lists
        records.append(record)
        if step % (steps // 20) == 0:
            heads_now = {}
            for index, head in enumerate(heads):
                right = np.clip((0.25 + 0.7 * grown) * (labeled / labeled.max()) ** (0.12 / skill - 0.03 * index), 0, 1)
                chances = np.diag(right) + (1 - right)[:, None] * (labeled / labeled.sum())
                confusion = np.array([random.multinomial(100, row / row.sum()) for row in chances])
                heads_now[head] = metrics_of(confusion)
                if step == steps:
                    heads_now[head]["confusion"] = confusion.tolist()
            records.append({"kind": "eval", "step": step, "split": "test", "predicts": heads[-1], "heads": heads_now})
    evaluated = [record for record in records if record["kind"] == "eval"]
    per_head = {}
    for head in heads:
        there = [record["heads"][head] for record in evaluated]
        means = {f"{key}_last20": np.mean([h[key] for h in there]) for key in SCORES if there[0][key] is not None}
        per_head[head] = means | {f"{key}_final": there[-1][key] for key in SCORES}
    best = max(evaluated, key=lambda record: record["heads"][heads[-1]]["top1"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "config.yaml").write_text(f"method:\n  name: {method}\noptim:\n  steps: {steps}\nseed: {seed}\n")
    (path / "env.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0", "commit": "1f" * 20}))
    (path / "split.json").write_text(json.dumps({"labeled_counts": labeled.tolist(), "sha256": "ab" * 32}))
    summary = {
        "method": method,
        "plugins": ["la"] if method == "supervised" else [],
        "protocol": "digits-lt, N1 = 500, M1 = 1000, imbalance 100 and 100, consistent, rule semi",
        "dataset": "digits",
        "class_names": names,
        "labeled_counts": labeled.tolist(),
        "unlabeled_counts": (2 * labeled).tolist(),
        "test_counts": [100] * classes,
        "steps": steps,
        "seconds": 3723.4 if method == "semi" else 48.25,
        "training_seconds": 3601.2 if method == "semi" else 41.0,
        "images_per_second": 12345.6 if method == "semi" else 987.6,
        "rows_per_second": 37036.8 if method == "semi" else 987.6,
        "predicts": heads[-1],
        "evaluations": len(evaluated),
        "averaged": min(20, len(evaluated)),
        **per_head[heads[-1]],
        "heads": per_head,
        "best": {"top1": best["heads"][heads[-1]]["top1"], "step": best["step"], "selected_on": "test"},
        "validation": None,
        "shortened": [
            {"key": "ema.decay", "run": 0.99, "paper": 0.999},
            {"key": "augment.flip", "run": False, "paper": True},
        ],
        "split_sha256": "ab" * 32,
        "manifest_sha256": "cd" * 32,
        "seed": seed,
        "precision": "fp32",
        "device": "cpu",
        "hardware": "2 cores of a CPU",
        "commit": "1f" * 20,
        "versions": {"torch": "2.13.0"},
        "status": "finished",
    }  # fmt: skip
    if finished:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


class Page(HTMLParser):
    """The text of every table cell, every tag by name, and every address that a browser would follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "semi")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report([run_dir], run_dir / "report.html").read_text()


def test_table_shows_the_numbers_of_the_run(run_dir: Path, page: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    cells = Page(page).cells
    at = cells.index("mean of last 20")
    assert cells[at - 1].startswith("balanced_head")
    assert "predicts" in cells[at - 1]
    assert cells[at + 2 : at + 8] == [f"{summary[f'{key}_last20']:.1f}" for key in SCORES]
    best = cells.index("best, selected on test")
    assert cells[best + 1 : best + 3] == [f"{summary['best']['step']:,}", f"{summary['best']['top1']:.1f}"]
    plain = cells.index("head", at)
    assert cells[plain + 3] == f"{summary['heads']['head']['top1_last20']:.1f}"
    assert cells[cells.index("ema.decay") :][:3] == ["ema.decay", "0.99", "0.999"]
    for fact in (
        "1 h 02 min",
        "12,346",
        "2 cores of a CPU",
        "abababababab",
        "cdcdcdcdcdcd",
        "fp32",
        summary["protocol"],
    ):
        assert f">{fact}<" in page or f", {fact}<" in page
    assert page.count("no method sees them") == 2


def test_the_number_averaged_is_the_number_there_is(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", finished=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    evaluated = [line for line in lines if '"eval"' in line][:3]
    (run / "metrics.jsonl").write_text("\n".join(evaluated) + "\n")
    cells = Page(write_report([run], tmp_path / "page.html").read_text()).cells
    mean = np.mean([json.loads(line)["heads"]["balanced_head"]["top1"] for line in evaluated])
    assert cells[cells.index("mean of last 3") + 2] == f"{mean:.1f}"


def test_page_is_one_small_file_that_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in parsed.loads)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert parsed.tags.count("svg") == 8
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {address[1:] for address in parsed.loads if address.startswith("#")} <= set(parsed.ids)
    assert len(page.encode()) < 500_000


def test_dark_page_changes_every_figure_color(page: str) -> None:
    from semi_fast.report.style import COLORS

    dark = page[page.index("prefers-color-scheme: dark") : page.index("</style>")]
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    for name, color in COLORS.items():
        assert f"--{name}:" in dark
        assert color not in figures
    assert "var(--series-0)" in figures
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", figures)) <= {"#000000"}


def test_data_behind_the_figures(run_dir: Path, page: str) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    data = run_dir / "report_data"
    assert set(re.findall(r'class="file">report_data/([\w/.]+csv)<', page)) < {path.name for path in data.iterdir()}
    with (data / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == summary["class_names"]
    assert [int(row["labeled_images"]) for row in rows] == summary["labeled_counts"]
    mean = np.mean([float(row["recall_balanced_head"]) for row in rows])
    assert mean == pytest.approx(
        summary["balanced_accuracy_last20"], abs=1e-9
    )  # the same mean, summed in another order
    with (data / "pseudo_labels.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["precision"] == "" or int(row["predicted"]) > 0
            if row["precision"]:
                assert float(row["precision"]) == pytest.approx(100 * int(row["correct"]) / int(row["predicted"]))
    assert not [path for path in run_dir.rglob(".*")]


def test_same_run_same_page(run_dir: Path, page: str, tmp_path: Path) -> None:
    again = write_report([run_dir], tmp_path / "again.html").read_text()
    assert again.replace("again_data/", "report_data/") == page


def test_hostile_names_are_text(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "$x_{$", "--><b>&amp;", 'a"b\x07\n|', "猫", "=1+1"]
    run = fake_run(tmp_path / "run", classes=6, method="fixmatch", names=names)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert not {"script", "b"} & {tag for tag in Page(page[page.index("</ul>") :]).tags}
    assert names[0] in Page(page).cells
    assert "&lt;script&gt;" in page
    assert "$x_{$" in page


def test_many_classes_stay_small(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=127)
    assert write_report([run], tmp_path / "page.html").stat().st_size < 700_000


def test_two_classes_have_no_thirds(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=2, method="supervised")
    cells = Page(write_report([run], tmp_path / "page.html").read_text()).cells
    at = cells.index("mean of last 20")
    assert cells[at + 5] == cells[at + 7] == "–"  # noqa: RUF001
    assert "nan" not in "".join(cells).lower()


def test_comparison(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / "a", method="supervised", classes=4),
        fake_run(tmp_path / "b", method="fixmatch", classes=4, steps=2000),
    ]
    page = write_report(runs, tmp_path / "out" / "report.html").read_text()
    parsed = Page(page)
    others = fake_run(tmp_path / "c", classes=4), fake_run(tmp_path / "d", classes=4, seed=1)
    table = comparison([read_run(path) for path in (*runs, *others)])
    assert [row[0] for row in table.rows] == ["supervised + la", "fixmatch", "semi, seed 0", "semi, seed 1"]
    summary = json.loads((runs[1] / "summary.json").read_text())
    at = parsed.cells.index("fixmatch")
    keys = ("top1", "balanced_accuracy", "many", "medium", "few", "geometric_mean")
    expected = [f"{summary[f'{key}_last20']:.1f}" for key in keys]
    assert parsed.cells[at + 1 : at + 7] == expected
    assert "differ in steps:" in page
    assert "counted no pseudo-labels" in page
    line = next(line for line in table.text().splitlines() if line.startswith("fixmatch"))
    assert line.split()[1:7] == expected
    assert f"| fixmatch | {' | '.join(expected)} |" in table.markdown()
    rows = list(csv.DictReader((tmp_path / "out/report_data/comparison.csv").open(newline="")))
    assert float(rows[1]["top1_last20"]) == summary["top1_last20"]
    assert (tmp_path / "out/report_data/2_fixmatch/classes.csv").is_file()
    assert len(parsed.ids) == len(set(parsed.ids))


def changed_pseudo_labels(run: Path, *keys: str) -> None:
    """Zeros for these counts in every record of a made-up run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        if record.get("pseudo_labels"):
            record["pseudo_labels"] |= {key: [0] * len(record["pseudo_labels"][key]) for key in keys}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))


@pytest.mark.parametrize(
    ("zero", "panels", "plots"),
    [
        ((), [3, 3], 8),
        (("used", "correct", "predicted"), [2, 2], 8),
        (("seen", "used", "correct", "predicted"), [1], 7),
    ],
)
def test_no_panel_is_empty(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zero: tuple[str, ...],
    panels: list[int],
    plots: int,
) -> None:
    """Everything known; nothing passed the mask; no unlabeled image of a known class."""
    import semi_fast.report.page as module

    run, drawn = fake_run(tmp_path / "run", classes=4), []
    changed_pseudo_labels(run, *zero)

    def kept(figure: Figure, prefix: str, label: str) -> Markup:
        drawn.append((label, figure))
        return Markup("<svg></svg>")

    monkeypatch.setattr(module, "inline_svg", kept)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert len(drawn) == plots
    for label, figure in drawn:
        for axis in figure.axes:
            lines = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines]
            heats = [np.ma.filled(image.get_array(), np.nan) for image in axis.images]
            shown = any(np.isfinite(values).any() for values in (*lines, *heats))
            assert shown or axis.get_label() == "<colorbar>", f"{label}: {axis.get_title(loc='left')}"
    counted = [figure for label, figure in drawn if label.startswith("Pseudo-labels")]
    assert [sum(axis.get_label() != "<colorbar>" for axis in figure.axes) for figure in counted] == panels
    assert ("has a known class" in page) == ("seen" in zero)


def test_a_share_of_zero_is_seen(tmp_path: Path) -> None:
    """A line on the border of its panel would be hidden by it."""
    run = fake_run(tmp_path / "run", classes=4)
    changed_pseudo_labels(run, "used", "correct", "predicted")
    figure = pseudo_label_groups(read_run(run))
    assert [axis.get_ylim()[0] < 0 for axis in figure.axes] == [True, True]


def test_unfinished_run_with_a_torn_line(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=3, finished=False)
    metrics = run / "metrics.jsonl"
    first = metrics.read_text().splitlines()[0]
    metrics.write_text(first + '\n{"kind":"train","st')
    page = write_report([run], run / "report.html").read_text()
    assert "not finished" in page
    assert "25 so far" in page
    assert "No evaluation yet." in page
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", page), flags=re.IGNORECASE)
    metrics.write_text("")
    write_report([run], run / "report.html")
    metrics.write_text(first[:40] + "\n" + first + "\n")
    with pytest.raises(ValueError, match="line 1: must be JSON"):
        read_run(run)


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=3)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    again = json.loads(lines[0]) | {"lr": 0.5}
    metrics.write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    records = read_run(run).train
    assert len(records) == 40
    assert records[0].rates["lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("config.yaml", None, "config.yaml is missing"),
        ("env.json", None, "env.json is missing"),
        ("summary.json", '{"method": ', "must be JSON"),
        ("summary.json", "[]", "must be a JSON object"),
        ("summary.json", '{"top1_final": "high"}', "top1_final: must be a number or null; got 'high'"),
        ("config.yaml", "a: [", "must be YAML"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "terms": {}}\n{"ki', "line 2: must be JSON"),
        ("metrics.jsonl", '{"kind": "train", "step": "one"}\n', "line 1: step must be an integer; got 'one'"),
        ("metrics.jsonl", '{"kind": "test", "step": 1}\n', "kind must be train or eval; got 'test'"),
        (
            "metrics.jsonl",
            '{"kind":"eval","step":1,"split":"test","heads":{"h":{"recall":[1]}}}\n',
            "list of 3 numbers",
        ),
        ("metrics.jsonl", '{"kind":"train","step":1,"pseudo_labels":{"seen":[1,2,"x"]}}\n', "must be a number or null"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run = fake_run(tmp_path / "run", classes=3)
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        write_report([run], run / "report.html")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("; ") >= 2
    assert not (run / "report.html").exists()
    assert not (run / "report_data").exists()


def test_no_runs_and_a_directory_as_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "page.html")
    with pytest.raises(ValueError, match="is a directory"):
        write_report([tmp_path], tmp_path)


def test_an_old_page_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fake_run(tmp_path / "run", classes=2, finished=False)
    (run / "metrics.jsonl").write_text("")
    target = write_report([run], tmp_path / "page.html")
    old, before = target.read_text(), set(tmp_path.rglob("*"))

    def fail(source: Path, destination: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError, match=r"page_data/README.txt could not be written: no space"):
        write_report([run], target)
    assert target.read_text() == old
    assert set(tmp_path.rglob("*")) == before


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=2, finished=False)
    (run / "metrics.jsonl").write_text("")
    for _ in range(2):
        write_report([run], tmp_path / "a.html")
    of_a = {path: path.read_bytes() for path in (tmp_path / "a_data").iterdir()}
    assert {path.name for path in of_a} == {"README.txt", "results.csv"}
    write_report([run, fake_run(tmp_path / "b", classes=2)], tmp_path / "b.html")
    assert {path: path.read_bytes() for path in (tmp_path / "a_data").iterdir()} == of_a, "each has its own numbers"
    assert (tmp_path / "b_data" / "comparison.csv").is_file()

    (tmp_path / "b.html").unlink()
    (tmp_path / "b_data" / "mine.txt").touch()
    write_report([run], tmp_path / "b.html")  # its folder is still known for ours
    assert {path.name for path in (tmp_path / "b_data").iterdir()} == {"README.txt", "results.csv", "mine.txt"}
    for name in ("thesis.html", "empty.html"):
        (tmp_path / name).write_text("<h1>Mine</h1>" if name == "thesis.html" else "")
    (tmp_path / "c_data").mkdir()
    (tmp_path / "c_data" / "terms.csv").write_text("mine")
    (tmp_path / "d_data").symlink_to(tmp_path / "c_data")
    (tmp_path / "e_data").write_text("mine")
    for name in ("f", "g"):  # copied beside a folder that has nothing to do with it
        shutil.copy(tmp_path / "a.html", tmp_path / f"{name}.html")
        (tmp_path / f"{name}_data").mkdir()
        (tmp_path / f"{name}_data" / "results.csv").write_text("mine")
    (tmp_path / "g_data" / "README.txt").write_text("My results.")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in (
        ("run/config.yaml", "a report is a page, NAME.html; got .*config.yaml"),
        ("x.csv", "a report is a page, NAME.html; got .*x.csv; its numbers go to x_data/"),
        ("page", "a report is a page, NAME.html"),
        ("thesis.html", "replaces nothing but a report; .*thesis.html is none; choose another name"),
        ("empty.html", "replaces nothing but a report"),
        ("c.html", "keeps its numbers in c_data/; .*c_data is something else; choose another name"),
        ("d.html", "keeps its numbers in d_data/"),
        ("e.html", "keeps its numbers in e_data/"),
        ("f.html", "keeps its numbers in f_data/"),
        ("g.html", "keeps its numbers in g_data/"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report([run], tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_numbers_of_an_older_version_are_known_for_ours(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", classes=2, finished=False)
    page = write_report([run], run / "report.html")
    (run / "report_data" / "README.txt").unlink()
    write_report([run], page)
    assert (run / "report_data" / "README.txt").exists()


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, semi_fast.report, semi_fast.report.compare\n"
        "print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_path_that_is_no_text_costs_no_page(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, or a locale that is not: the name is shown as far as it goes."""
    run_dir = fake_run(tmp_path / os.fsdecode(b"run \xff"))
    page = write_report([run_dir], tmp_path / "page.html")
    assert "run ?" in page.read_text(encoding="utf-8")
