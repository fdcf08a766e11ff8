"""The comparison of runs: numbers against plain Python, what is put together and what never, hostile texts, damage."""

import csv
import html.parser
import io
import json
import math
import os
import re
import statistics

import fabricated_runs as fabricated
import pytest

from phpjax import cli, comparison, comparison_figures, comparison_page, comparison_tables, finished, report
from phpjax.comparison import Stat
from phpjax.errors import UserError

SEEDS = (4, 5, 6)
METHODS = ("php", "finetune", "linear_probe")


@pytest.fixture
def drawn_once(monkeypatch):
  """Figures take most of the time, and one test looks at them."""
  monkeypatch.setattr(comparison_figures, "draw", lambda setting: [])


@pytest.fixture
def many(tmp_path):
  """Three methods, three seeds, each with scenes of its own."""
  for method in METHODS:
    for seed in SEEDS:
      fabricated.run(tmp_path / "runs" / method / f"seed{seed}", method, seed)
  return tmp_path / "runs"


def compared(*paths):
  """The settings and notes of the runs at these paths."""
  return comparison.compare([finished.read(folder) for folder in finished.workdirs([str(path) for path in paths])])


def numbers(cell):
  """ "62.0 ± 1.7" -> [62.0, 1.7]."""
  return [float(text.replace(",", "")) for text in re.findall(r"-?[\d,.]+", cell)]


def markdown_rows(text):
  """Cells of all table rows."""
  lines = [line for line in text.splitlines() if line.startswith("|")]
  return [[cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# -- numbers -----------------------------------------------------------------------------------------------------


def test_means_and_deviations_are_those_of_plain_python(many, tmp_path, drawn_once):
  text, notes = report.write([str(many)], tmp_path / "out")
  assert notes == [] and "deviation over n seeds: 4, 5, 6." in text
  rows = markdown_rows(text)
  header = rows[0]
  by_method = {row[0]: dict(zip(header, row, strict=True)) for row in rows[:6]}
  for method in METHODS:
    found, row = [fabricated.results_of(method, seed) for seed in SEEDS], by_method[method]
    assert row["n"] == "3"
    wanted = {task: [100 * one["matrix"][-1][at] for one in found] for at, task in enumerate(fabricated.TASKS)}
    wanted["mean"] = [100 * sum(one["matrix"][-1]) / 4 for one in found]
    wanted["forgetting"] = [100 * fabricated.forgetting_of(one["matrix"]) for one in found]
    wanted["BWT"] = [100 * fabricated.bwt_of(one["matrix"]) for one in found]
    for column, values in wanted.items():
      assert numbers(row[column]) == pytest.approx([statistics.mean(values), statistics.stdev(values)], abs=0.0501), column
    assert row["trainable"] == "146" and row["memory, GB"] == "3.60" and row["checkpoint, MB"] == "-"
    assert row["time, s"] == "550 ± 10" and row["clips/s"] == "25.0 ± 1.0"
  trivial = by_method["trivial"]
  assert [trivial[column] for column in ("n", "ave", "avvp", "avs", "avqa", "mean")] == [
    "3", "10.0 ± 0.0", "15.0 ± 0.0", "20.0 ± 0.0", "25.0 ± 0.0", "17.5 ± 0.0"
  ]  # fmt: skip
  assert {trivial[column] for column in header[7:]} == {"-"}


def test_scores_on_unseen_objects_have_a_table_of_their_own(many):
  [setting], _ = compared(many)
  table = comparison_tables.unseen(setting)
  values = [100 * sum(fabricated.results_of("php", seed)["matrix"][-1]) / 8 for seed in SEEDS]
  row = next(row for row in table.rows if row[0] == "php")
  assert numbers(row[-1]) == pytest.approx([statistics.mean(values), statistics.stdev(values)], abs=0.0501)
  assert next(row for row in table.rows if row[0] == "trivial")[-1] == "5.0 ± 0.0"


def test_csv_has_a_row_for_each_run_with_all_its_numbers(many):
  settings, _ = compared(many)
  rows = list(csv.DictReader(io.StringIO(comparison_tables.csv_text(settings))))
  assert len(rows) == 9
  for row in rows:
    source = fabricated.results_of(row["method"], int(row["seed"]))
    assert row["workdir"].endswith(f"{row['method']}/seed{row['seed']}") and row["order"] == "ave avvp avs avqa"
    for i, after in enumerate(fabricated.TASKS):
      for j, task in enumerate(fabricated.TASKS):
        wanted = "" if j > i else source["matrix"][i][j]
        assert (row[f"matrix/{after}/{task}"] or "") == ("" if wanted == "" else repr(wanted))
    assert float(row["forgetting"]) == pytest.approx(fabricated.forgetting_of(source["matrix"]), abs=1e-12)
    assert float(row["last/unseen/avs"]) == source["unseen"][-1][2] and float(row["trivial/test/avqa"]) == 0.25
    assert float(row["score/test/avqa/ave/segment_accuracy"]) == source["matrix"][3][0]
    assert float(row["examples_per_s/ave"]) == float(row["examples_per_s"]) == 20 + int(row["seed"])
    assert float(row["trainable_parameters"]) == 146 and row["checkpoint_bytes"] == ""


def test_pooled_scores_stand_where_runs_have_them(tmp_path, drawn_once):
  for seed in (0, 1):
    fabricated.class_run(tmp_path / "runs" / f"a{seed}", "slda", seed, seed)
    fabricated.class_run(tmp_path / "runs" / f"b{seed}", "joint", seed, seed, joint=True)
  old = fabricated.class_results_of("ncm", 0, 0)
  del old["pooled"]
  fabricated.write(tmp_path / "runs" / "old", old, fabricated.config_of(old, **{"data.toybox": "", "data.class_seed": 0}))
  fabricated.run(tmp_path / "others", "php", 0)
  text, notes = report.write([str(tmp_path / "runs")], tmp_path / "out")
  header, *rows = markdown_rows(text)
  found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
  pooled = {name: [row["pooled last"], row["pooled average"]] for name, row in found.items()}
  assert notes == [] and pooled.pop("---")
  assert pooled == {
    "slda": ["69.5 ± 0.7", "79.5 ± 0.7"],
    "joint": ["69.5 ± 0.7", "-"],  # one model: there is no curve
    "ncm": ["-", "-"],
    "trivial": ["3.0 ± 1.4", "-"],
  }
  for name in ("report.html", "comparison.tex", "comparison.md"):
    assert "pooled average" in (tmp_path / "out" / name).read_text(), name
  rows = {row["method"]: row for row in csv.DictReader((tmp_path / "out" / "comparison.csv").open())}
  assert float(rows["slda"]["pooled_last"]) == pytest.approx(0.69) and float(rows["slda"]["trivial/pooled/last"]) == 0.04
  assert rows["ncm"]["pooled_last"] == rows["joint"]["pooled_average"] == "" != rows["joint"]["pooled_last"]
  report.write([str(tmp_path / "others")], tmp_path / "out")
  for path in (tmp_path / "out").iterdir():
    assert not re.search("pooled[ _](last|average)|routing|oracle", path.read_text(), re.I), path.name


def test_routing_and_oracle_stand_where_tasks_are_inferred(tmp_path, drawn_once):
  """The means of the last rows over tasks, and over seeds; a method that needs no choice has none."""
  for seed in (0, 1):
    inferred = {"routing": [[1.0, None], [0.5 + 0.1 * seed, 0.7]], "oracle": [[0.9, None], [0.75, 0.25 + 0.3 * seed]]}
    tasks = {"tasks": ("ave", "avs"), "task_id": "inferred"}
    fabricated.run(tmp_path / "runs" / f"a{seed}", "php", seed, **tasks, **inferred)
    fabricated.run(tmp_path / "runs" / f"b{seed}", "slda", seed, **tasks)
  text, _ = report.write([str(tmp_path / "runs")], tmp_path / "out")
  header, _, *rows = markdown_rows(text)
  found = {row[0]: dict(zip(header, row, strict=True)) for row in rows[:3]}
  assert {name: (row["routing"], row["oracle"]) for name, row in found.items()} == {
    "php": ("62.5 ± 3.5", "57.5 ± 10.6"), "slda": ("-", "-"), "trivial": ("-", "-")
  }  # fmt: skip
  assert "\nRouting: clips whose task was found" in text and "\nOracle: scores if the task were given" in text
  rows = {row["workdir"][-2:]: row for row in csv.DictReader((tmp_path / "out" / "comparison.csv").open())}
  assert [float(rows[run]["routing"]) for run in ("a0", "a1")] == pytest.approx([0.6, 0.65])
  assert {rows[run][column] for run in ("b0", "b1") for column in ("routing", "oracle")} == {""}
  for name in ("report.html", "comparison.tex"):
    assert re.search("(<th [^>]*>|& )routing(</th>)?", (tmp_path / "out" / name).read_text()), name


def test_joint_training_forgets_nothing_that_a_number_could_say(tmp_path):
  """All rows of its matrix are one model's, so that what stands there as forgetting is 0 or chance."""
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "joint", seed, joint=True)
    fabricated.run(tmp_path / f"b{seed}", "php", seed, joint=False)
  assert finished.read(tmp_path / "a0").results["forgetting"] != 0
  [setting], _ = compared(tmp_path)
  table = comparison_tables.scores(setting)
  rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
  assert (rows["joint"]["forgetting"], rows["joint"]["BWT"]) == ("-", "-") and "±" in rows["joint"]["mean"]
  assert "±" in rows["php"]["forgetting"] and "±" in rows["php"]["BWT"]
  cells = {row["method"]: row for row in csv.DictReader(io.StringIO(comparison_tables.csv_text([setting])))}
  assert cells["joint"]["forgetting"] == cells["joint"]["bwt"] == "" != cells["php"]["forgetting"]
  [drawn] = [figure for figure in comparison_figures.draw(setting) if figure.caption.startswith("forgetting")]
  assert drawn.light, "a row without a point"


def test_one_run_has_no_deviation(tmp_path):
  fabricated.run(tmp_path / "a", "php", 0)
  [setting], _ = compared(tmp_path)
  table = comparison_tables.scores(setting)
  assert table.rows[0][1] == "1" and not any("±" in cell for row in table.rows for cell in row)
  assert comparison.stat_of([1.0]) == Stat(1.0, None, 1) and comparison.stat_of([None, math.nan, math.inf]) == Stat(
    None, None, 0
  )


def test_bytes_of_a_checkpoint_are_those_that_must_be_kept(tmp_path):
  folder = fabricated.run(tmp_path / "a", "php", 0, tasks=("ave", "avs"))
  wanted = fabricated.checkpoints(folder)
  assert finished.read(folder).numbers["checkpoint_bytes"] == wanted
  (folder / "checkpoints" / "1" / "task_ave" / "d" / "0").unlink()
  assert finished.read(folder).numbers["checkpoint_bytes"] is None, "a part that is missing is not a small one"
  (folder / "checkpoints" / "3" / "meta" / "metadata").write_text("{")
  assert finished.read(folder).numbers["checkpoint_bytes"] is None


@pytest.mark.parametrize(
  ("stat", "unit", "decimals", "text"),
  [
    (Stat(0.5, 0.01, 3), 0.01, 1, "50.0 ± 1.0"),
    (Stat(-0.0001, 0.0, 3), 0.01, 1, "0.0 ± 0.0"),
    (Stat(0.5, None, 1), 0.01, 1, "50.0 (n=1)"),
    (Stat(None, None, 0), 0.01, 1, "-"),
    (Stat(1234567.0, 0.0, 3), 1, 0, "1,234,567"),
    (Stat(3.6e9, 1e7, 3), 1e9, None, "3.60 ± 0.01"),
    (Stat(267_267.0, None, 3), 1e6, None, "0.267"),
    (Stat(0.0, None, 3), 1, None, "0"),
  ],
)
def test_numbers_become_text_once(stat, unit, decimals, text):
  assert comparison_tables.written(stat, unit, decimals, runs=3) == text


def test_latex_has_scores_and_costs_in_two_tables(many):
  [setting], _ = compared(many)
  table = comparison_tables.scores(setting)
  scores, costs = comparison_tables.halves(table)
  assert scores.header + costs.header[1:] == table.header and scores.header[-1] == "BWT" and costs.header[0] == "method"
  assert [row[0] for row in costs.rows] == sorted(METHODS) and costs.rows[0] == (table.rows[0][0], *table.rows[0][9:])
  text = comparison_tables.latex(table)
  assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
  assert r"linear\_probe & 3 & " in text and " & 550 $\\pm$ 10 \\\\" in text


# -- what belongs together ---------------------------------------------------------------------------------------


def labels(setting):
  return [(group.label, group.seeds) for group in setting.groups]


def test_orders_options_and_encoders_are_never_mixed(tmp_path):
  other = {**fabricated.WEIGHTS, "audio": {"name": "nano_ast", "sha256": "c3"}}
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "php", seed)
    fabricated.run(tmp_path / f"b{seed}", "php", seed, tasks=tuple(reversed(fabricated.TASKS)))
    fabricated.run(tmp_path / f"c{seed}", "php", seed, compat="released")
    fabricated.run(tmp_path / f"d{seed}", "php", seed, **{"opt.head.lr": 0.5})
    fabricated.run(tmp_path / f"e{seed}", "php", seed, weights=other)
  [setting], notes = compared(tmp_path)
  assert len(setting.groups) == 5 and all(seeds == (0, 1) for _, seeds in labels(setting)) and notes == []
  assert {label for label, _ in labels(setting)} == {
    "php", "php, order avqa-avs-avvp-ave", "php, released", "php, opt.head.lr=0.5", "php, weights of audio=nano_ast, sha256 c3"
  }  # fmt: skip
  assert setting.differing["opt.head.lr"].count("0.5") == 1
  assert sum("c3" in text for text in setting.differing["weights of audio"]) == 1
  [other] = [row for row in comparison_tables.differences(setting).rows if row[:2] == ("opt.head.lr", "0.5")]
  assert other[2] == "php, opt.head.lr=0.5"
  table = comparison_tables.scores(setting)
  by_task = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
  reverse = fabricated.results_of("php", 0, tuple(reversed(fabricated.TASKS)))["matrix"][-1][3]
  reverse1 = fabricated.results_of("php", 1, tuple(reversed(fabricated.TASKS)))["matrix"][-1][3]
  assert numbers(by_task["php, order avqa-avs-avvp-ave"]["ave"])[0] == pytest.approx(50 * (reverse + reverse1), abs=0.0501)


def test_what_only_says_where_and_how_does_not_part_runs(tmp_path):
  fabricated.run(tmp_path / "a", "php", 0, **{"data.root": "here"})
  fabricated.run(tmp_path / "b", "php", 1, **{"data.root": "there"})
  [setting], _ = compared(tmp_path)
  assert labels(setting) == [("php", (0, 1))] and setting.differing == {}


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"data": {"name": "user", "evaluation_split": "test"}, "data.toybox": ""}, "user"),
    ({"metric": {**fabricated.METRIC, "avs": "f"}}, "avs metric f"),
    ({"data": {"name": "toybox-default", "evaluation_split": "val"}}, "evaluated on val"),
    ({"data": {**fabricated.results_of("php", 0)["data"], "identity": {"toybox": "version 2"}}}, "toybox version 2"),
    ({"data": {**fabricated.results_of("php", 0)["data"], "bad_clips": {"ave": {"test": ["x"]}}}}, "ave test bad_clips 1"),
    ({"data": {**fabricated.results_of("php", 0)["data"], "counts": {"ave": {"test": 5}}}}, "ave test counts 5"),
  ],
)
def test_other_data_are_another_table(tmp_path, change, word):
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "php", seed)
    fabricated.run(tmp_path / f"b{seed}", "php", seed, **change)
  settings, _ = compared(tmp_path)
  assert [labels(setting) for setting in settings] == [[("php", (0, 1))]] * 2
  assert word in settings[1].title and word not in settings[0].title


def test_user_data_are_told_apart_by_their_digests(tmp_path):
  for name, digest in (("a", "1 rows, aa"), ("b", "1 rows, bb")):
    data = {"name": "user", "evaluation_split": "test", "identity": {"ave train": digest}}
    fabricated.run(tmp_path / name, "php", 0, data=data, **{"data.toybox": ""})
  settings, _ = compared(tmp_path)
  assert len(settings) == 2 and "ave train 1 rows, bb" in settings[1].title


def test_scenes_of_one_seed_and_of_each_seeds_own_are_apart(tmp_path):
  for seed in (0, 1, 2):
    fabricated.run(tmp_path / f"fixed{seed}", "php", seed, toybox_seed=0)
    fabricated.run(tmp_path / f"own{seed}", "finetune", seed)
  fabricated.run(
    tmp_path / "single", "linear_probe", 0
  )  # could be either: nothing of its own decides, and fixed scenes 0 exist
  settings, _ = compared(tmp_path)
  found = {setting.title: dict(labels(setting)) for setting in settings}
  assert found == {
    "toybox-default, scenes of seed 0, evaluated on test": {"php": (0, 1, 2), "linear_probe": (0,)},
    "toybox-default, scenes of each seed's own, evaluated on test": {"finetune": (0, 1, 2)},
  }
  trivial = {setting.title: len(setting.trivial[0][1]) for setting in settings}
  assert sorted(trivial.values()) == [1, 3], "the trivial predictor counts once for each set of scenes"


def test_classes_of_one_seed_and_of_each_seeds_own_are_apart(tmp_path):
  """Rows, counts and trivial scores are those of the class seed, and do not part repetitions."""
  for seed in (0, 1, 2):
    fabricated.class_run(tmp_path / f"fixed{seed}", "slda", seed, 4)
    fabricated.class_run(tmp_path / f"own{seed}", "slda", seed, seed)
    fabricated.class_run(tmp_path / f"own_too{seed}", "ncm", seed, seed)
  settings, notes = compared(tmp_path)
  assert notes == [] and {setting.title: dict(labels(setting)) for setting in settings} == {
    "user, classes of seed 4, evaluated on test": {"slda": (0, 1, 2)},
    "user, classes of each seed's own, evaluated on test": {"slda": (0, 1, 2), "ncm": (0, 1, 2)},
  }
  trivial = {setting.title: comparison_tables.scores(setting).rows[-1][:3] for setting in settings}
  assert list(trivial.values()) == [("trivial", "1", "5.0"), ("trivial", "3", "2.0 ± 1.0")]
  rows = list(csv.DictReader(io.StringIO(comparison_tables.csv_text(settings))))
  assert all(row["class_seed"] == ("4" if "seed 4" in row["table"] else row["seed"]) for row in rows)
  assert {row["toybox_seed"] for row in rows} == {""}


def test_other_rows_of_the_same_class_seed_are_other_data(tmp_path):
  for seed in (0, 1):
    fabricated.class_run(tmp_path / f"a{seed}", "slda", seed, seed)
    data = fabricated.class_results_of("ncm", seed, seed)["data"]
    data["identity"] = {"tux21_1 test": "9 rows, other"}
    fabricated.class_run(tmp_path / f"b{seed}", "ncm", seed, seed, data=data)
  settings, _ = compared(tmp_path)
  assert [labels(setting) for setting in settings] == [[("slda", (0, 1))], [("ncm", (0, 1))]]
  assert "tux21_1 test (classes of seed 0) 9 rows, other" in settings[1].title


def test_the_class_seed_of_other_tasks_means_nothing(tmp_path):
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "php", seed, **{"data.class_seed": 3 * seed})
  [setting], _ = compared(tmp_path)
  assert labels(setting) == [("php", (0, 1))] and "classes" not in setting.title
  folder = fabricated.class_run(tmp_path / "b", "slda", 0, 0)
  (folder / "config.json").write_text((folder / "config.json").read_text().replace('"class_seed": 0', '"class_seed": "0"'))
  with pytest.raises(UserError, match=r"config.json has no data.class_seed"):
    finished.read(folder)


def test_random_encoders_are_drawn_by_the_seed_and_do_not_part_runs(tmp_path):
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "php", seed, weights={"visual": {"name": "tiny", "sha256": f"random seed {seed}"}})
  fabricated.run(tmp_path / "b", "php", 2, weights={"visual": {"name": "tiny", "sha256": "random seed 0"}})
  [setting], _ = compared(tmp_path)
  assert sorted(seeds for _, seeds in labels(setting)) == [(0, 1), (2,)]


def test_the_same_seed_twice_is_no_repetition(tmp_path):
  for name in ("a", "b"):
    fabricated.run(tmp_path / name, "php", 0)
  [setting], notes = compared(tmp_path)
  assert labels(setting) == [("php", (0,))]
  assert notes == [f"{tmp_path / 'b'} is left out: same settings and seed as {tmp_path / 'a'}"]
  assert len(finished.workdirs([str(tmp_path / "a"), str(tmp_path), f"{tmp_path}/*"])) == 2, "a path given twice is one run"


def test_fewer_tasks_leave_cells_empty(tmp_path):
  fabricated.run(tmp_path / "a", "php", 0)
  fabricated.run(tmp_path / "b", "finetune", 0, tasks=("ave", "avqa"))
  [setting], _ = compared(tmp_path)
  table = comparison_tables.scores(setting)
  rows = {row[0]: row for row in table.rows}
  assert rows["finetune, order ave-avqa"][3:5] == ("-", "-") and rows["finetune, order ave-avqa"][2] != "-"
  assert [label for label, _ in setting.trivial] == ["trivial"]


def test_other_trivial_predictors_on_the_same_data_are_rows_of_their_own(tmp_path):
  for seed in (0, 1):
    fabricated.run(tmp_path / f"a{seed}", "php", seed)
    fabricated.run(tmp_path / f"b{seed}", "finetune", seed)
    fabricated.run(tmp_path / f"c{seed}", "linear_probe", seed, trivial=dict.fromkeys(fabricated.TASKS, 0.5))
  [setting], _ = compared(tmp_path)
  rows = comparison_tables.scores(setting).rows[3:]
  assert [row[:3] for row in rows] == [
    ("trivial, as for php", "2", "10.0 ± 0.0"), ("trivial, as for linear_probe", "2", "50.0 ± 0.0")
  ]  # fmt: skip


def test_other_versions_and_skipped_steps_are_told(tmp_path):
  fabricated.run(tmp_path / "a", "php", 0)
  fabricated.run(tmp_path / "b", "php", 1, versions={"phpjax": "0.2.0"}, skipped_steps=3)
  fabricated.run(tmp_path / "c", "finetune", 0, mean_accuracy=0.99)
  _, notes = compared(tmp_path)
  assert any("php: its seeds ran with several jax: 0.10.2, an unknown one" in note for note in notes)
  assert any("php: its seeds ran with several phpjax: 0.1.0, 0.2.0" in note for note in notes)
  assert any("3 steps were left out" in note for note in notes)
  assert any(str(tmp_path / "c") in note and "0.99 is not the mean of its last row" in note for note in notes)


# -- what is not whole -------------------------------------------------------------------------------------------


def test_unfinished_and_damaged_runs_are_named_and_left_out(tmp_path, drawn_once, capfd):
  good = fabricated.results_of("php", 0)
  fabricated.run(tmp_path / "runs" / "good", "php", 0)
  (tmp_path / "runs" / "unfinished").mkdir()
  (tmp_path / "runs" / "unfinished" / "config.json").write_text("{}")
  broken = {
    "cut": json.dumps(good)[:-9],
    "list": "[]",
    "empty": "{}",
    "nan": json.dumps({**good, "matrix": [*good["matrix"][:3], [0.1, math.nan, 0.1, 0.1]]}),
    "huge": json.dumps({**good, "matrix": [*good["matrix"][:3], [0.1, 10**400, 0.1, 0.1]]}),
    "ragged": json.dumps({**good, "matrix": [[0.1], [0.1, 0.2]]}),
    "text": json.dumps({**good, "matrix": "0.1"}),
    "tasks": json.dumps({**good, "tasks": [["ave"], "b"]}),
    "numbers": json.dumps({**good, "tasks": [1, 2, 3, 4]}),
    "seed": json.dumps({**good, "seed": "0"}),
    "versions": json.dumps({**good, "versions": "new"}),
    "percent": json.dumps({**good, "matrix": [[100 * (x or 0) for x in row] for row in good["matrix"]]}),
    "scores": json.dumps({**good, "per_task": [{"split": "test"}]}),
    "weights": json.dumps({**good, "weights": ["x"]}),
  }
  for name, text in broken.items():
    fabricated.write(tmp_path / "runs" / name, text)
  fabricated.run(tmp_path / "runs" / "scenes", "php", 1, **{"data.toybox_seed": [0]})
  (tmp_path / "runs" / "deep").mkdir()
  (tmp_path / "runs" / "deep" / "results.json").write_text("[" * 100_000)
  os.mkfifo(tmp_path / "fifo.json")
  (tmp_path / "runs" / "pipe").mkdir()
  (tmp_path / "runs" / "pipe" / "results.json").symlink_to(tmp_path / "fifo.json")
  text, notes = report.write([str(tmp_path / "runs")], tmp_path / "out")
  assert text.count("| php |") == 2, "the scores and those on unseen objects"
  left = [note for note in notes if note.startswith("left out: ")]
  assert len(left) == len(broken) + 4 and all("\n" not in note for note in left)
  for name in (*broken, "deep", "pipe", "scenes", "unfinished"):
    assert sum(f"{tmp_path / 'runs' / name}" in note for note in left) == 1, name


def test_absent_numbers_are_dashes(tmp_path):
  few = ("method", "tasks", "metric", "matrix", "seed", "weights", "mean_accuracy")
  results = {key: value for key, value in fabricated.results_of("php", 0).items() if key in few}
  fabricated.write(tmp_path / "a", results)
  fabricated.run(tmp_path / "b", "php", 1, seconds=None, peak_memory_bytes="much", parameters={"shared": None})
  fabricated.run(tmp_path / "c", "php", 2)
  settings, notes = compared(tmp_path)
  tables = map(comparison_tables.scores, settings)
  rows = [dict(zip(table.header, row, strict=True)) for table in tables for row in table.rows]
  alone = next(row for row in rows if row["n"] == "1" and row["method"] != "trivial")
  assert {alone[column] for column in ("trainable", "memory, GB", "clips/s", "checkpoint, MB", "time, s")} == {"-"}
  two = next(row for row in rows if row["n"] == "2")
  assert two["time, s"] == "520 (n=1)" and two["memory, GB"] == "3.60 (n=1)" and two["trainable"] == "146 (n=1)"
  assert any("has no config.json" in note for note in notes)


def test_rows_that_are_not_whole_leave_the_written_forgetting(tmp_path):
  matrix = [[None] * 4] * 3 + [[0.1, 0.2, 0.3, 0.4]]  # learned together: only the last row was evaluated
  fabricated.run(tmp_path / "a", "joint", 0, matrix=matrix, mean_accuracy=0.25, forgetting=None, bwt=None)
  run = finished.read(tmp_path / "a")
  assert run.numbers["mean_accuracy"] == pytest.approx(0.25) and run.numbers["forgetting"] is None and run.curve is None
  [setting], notes = compared(tmp_path)
  assert comparison_tables.scores(setting).rows[0][6:9] == ("25.0", "-", "-") and notes == []
  assert len(comparison_figures.draw(setting)) == 6, "no curve"


def test_damaged_logs_cost_only_themselves(tmp_path):
  folder = fabricated.run(tmp_path / "a", "php", 0)
  lines = ['{"task": "ave", "examples_per_s": 5}', "{", "[]", '{"task": "ave"}', '{"task": "ave", "examples_per_s": NaN}']
  (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
  assert finished.read(folder).rates == {"ave": 5.0}


# -- hostile texts -----------------------------------------------------------------------------------------------

HOSTILE = (
  "</table><script>alert(1)</script><img src=\"http://x.y/z\" onerror='a'> | a_b $x^2$ % \\input{/etc/passwd} & {~} [1] *b*"
)


class Page(html.parser.HTMLParser):
  """Elements of a page, its texts, and whether every element that opens is closed."""

  VOID = ("meta", "img", "source")

  def __init__(self, text):
    super().__init__()
    self.open, self.found, self.texts, self.stray = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.stray.append(tag)

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture
def hostile(tmp_path):
  """Runs whose every text is hostile."""
  tasks = (HOSTILE, "=1+1", "@sum")
  for seed in (0, 1):
    fabricated.run(
      tmp_path / "r<b>uns" / f"=cmd|{seed}\n", f"=1+2 {HOSTILE}", seed, tasks=tasks, compat=HOSTILE, task_id=HOSTILE,
      metric=dict.fromkeys(tasks, HOSTILE), trivial=dict.fromkeys(tasks, 0.1), versions={"jax": HOSTILE},
      weights={HOSTILE: {"name": HOSTILE, "sha256": HOSTILE}},
      data={"name": HOSTILE, "evaluation_split": HOSTILE, "identity": {HOSTILE: HOSTILE}}, **{f"opt.{HOSTILE}": HOSTILE},
    )  # fmt: skip
  fabricated.run(
    tmp_path / "r<b>uns" / "other", f"=1+2 {HOSTILE}", 1, tasks=tasks, compat=HOSTILE, metric=dict.fromkeys(tasks, HOSTILE),
    weights={HOSTILE: {"name": "x", "sha256": HOSTILE}}, data={"name": "-1"}, trivial=dict.fromkeys(tasks, 0.2),
  )  # fmt: skip
  fabricated.write(tmp_path / "r<b>uns" / "<script>", "{")
  return tmp_path / "r<b>uns"


def test_hostile_texts_stay_texts_in_html(hostile, tmp_path):
  report.write([str(hostile)], tmp_path / "out")
  text = (tmp_path / "out" / "report.html").read_text()
  page = Page(text)
  assert not page.open and not page.stray
  assert {tag for tag, _ in page.found} <= {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "div", "table", "thead", "tbody", "tr",
    "th", "td", "figure", "picture", "source", "img", "figcaption"
  }  # fmt: skip
  for tag, attributes in page.found:
    assert not any(name.startswith("on") for name in attributes)
    for name in ("src", "srcset", "href"):
      assert attributes.get(name, "data:image/svg+xml;base64,").startswith("data:image/svg+xml;base64,"), tag
  assert any("<script>alert(1)</script>" in found for found in page.texts), "shown as it is"


def test_hostile_texts_stay_cells_in_csv(hostile, tmp_path, drawn_once):
  report.write([str(hostile)], tmp_path / "out")
  rows = list(csv.reader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
  assert len(rows) == 4 and len({len(row) for row in rows}) == 1
  cells = [cell for row in rows for cell in row]
  assert not any(cell[:1] in "=+@" for cell in cells if cell)
  assert all(re.fullmatch(r"-?[\d.e-]+", cell) for cell in cells if cell.startswith("-")), "only numbers are below zero"


def test_hostile_texts_stay_texts_in_latex(hostile, tmp_path, drawn_once):
  report.write([str(hostile)], tmp_path / "out")
  text = (tmp_path / "out" / "comparison.tex").read_text()
  assert text.isascii() and "\\input" not in text and "\\textbackslash{}input\\{" in text
  body = re.sub(r"\\[\\{}$&#%_]", "", text.split("\n", 1)[1])  # what is escaped
  assert body.count("{") == body.count("}") and "#" not in body and "_" not in body and "^" not in body
  assert re.sub(r"\$\\pm\$", "", body).count("$") == 0
  columns = [line.count("&") for line in body.splitlines() if line.startswith("    ") and "&" in line]
  wanted = [len(table) for table in re.findall(r"begin\{tabular\}\{l(r*|l*)\}", text)]
  assert set(columns) <= set(wanted)
  assert not re.search(r"%(?!$)", re.sub(r"\\%", "", body), re.M), "no comment that eats a cell"


def test_hostile_texts_stay_cells_in_markdown(hostile, tmp_path, drawn_once):
  text, _ = report.write([str(hostile)], tmp_path / "out")
  assert "<" not in text and ">" not in text
  for block in re.split(r"\n\n", text):
    lines = [line for line in block.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


@pytest.mark.parametrize("text", ["", "\n", "\u202e", "a\x00b", "x" * 500])
def test_texts_are_one_short_line(text):
  found = comparison_tables.clean(text)
  assert found and found.isprintable() and len(found) <= comparison_tables.LONGEST


# -- the page and its figures ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(many, tmp_path):
  report.write([str(many)], tmp_path / "out")
  text = (tmp_path / "out" / "report.html").read_text()
  page = Page(text)
  assert not page.open and not page.stray and "script" not in dict(page.found)
  outside = re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "", text)
  assert not re.search(r"https?:|//|url\(|@import|<link|javascript:", outside)
  assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text
  pictures = [attributes for tag, attributes in page.found if tag == "img"]
  assert len(pictures) == 7 and all(attributes["alt"] for attributes in pictures)
  assert all(label in page.texts for label in METHODS) and "trivial" in page.texts
  again, first = tmp_path / "again", (tmp_path / "out" / "report.html").read_bytes()
  report.write([str(many)], again)
  assert (again / "report.html").read_bytes() == first, "the same runs make the same page"
  assert sorted(path.name for path in again.iterdir()) == ["comparison.csv", "comparison.md", "comparison.tex", "report.html"]


def test_many_rows_have_colours_and_markers_of_their_own():
  assert len({comparison_figures.style_of(row) for row in range(20)}) == 20
  light = " ".join(comparison_figures.PALETTE).lower().encode()
  dark = comparison_figures.on_dark(light).split()
  assert len(set(dark)) == len(comparison_figures.PALETTE) and set(dark) & set(light.split()) == {b"#e69f00", b"#cc79a7"}


def test_an_empty_page_of_notes_is_still_a_page():
  page = Page(comparison_page.page([], [], ["<b>"]))
  assert not page.open and not page.stray and "<b>" in page.texts


# -- the command -------------------------------------------------------------------------------------------------


def test_the_command_writes_and_prints_the_table(tmp_path, drawn_once, capsys):
  fabricated.run(tmp_path / "runs" / "a", "php", 0)
  fabricated.write(tmp_path / "runs" / "b", "{")
  assert cli.guarded(lambda: report.main(["report", f"--workdir={tmp_path}/ru*", f"--out={tmp_path / 'out'}"])) == 0
  said = capsys.readouterr()
  assert said.out.rstrip() == (tmp_path / "out" / "comparison.md").read_text().rstrip()
  first, last = said.err.splitlines()
  assert first.startswith("note: left out: ") and str(tmp_path / "runs" / "b") in first and "report.html" in last
  assert cli.guarded(lambda: report.main(["report", f"--workdir={tmp_path / 'runs' / 'b'}", "--out=x"])) == 2


def test_wrong_arguments_are_one_line(tmp_path, monkeypatch):
  (tmp_path / "empty").mkdir()
  fabricated.write(tmp_path / "runs" / "cut", "{")
  cases = {
    (): ("--workdir is missing; --out is missing",),
    (f"--workdir={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}", "--out=x"): (
      f"{tmp_path / 'a'} does not",
      f"{tmp_path / 'b'} does not",
    ),
    (f"--workdir={tmp_path / 'empty'}", "--out=x"): ("no finished run to compare", str(tmp_path / "empty")),
    (f"--workdir={tmp_path / 'runs'}", "--out=x"): (
      "no finished run",
      f"{tmp_path / 'runs' / 'cut' / 'results.json'} is not valid",
    ),
    (f"--workdir={tmp_path}", "--out=x", "more"): ("unexpected arguments more", "quotes"),
    (f"--workdir={tmp_path}", "--uot=x"): ("uot",),
  }
  for arguments, words in cases.items():
    with pytest.raises(UserError) as error:
      report.main(["report", *arguments])
    assert all(word in str(error.value) for word in words), str(error.value)
  fabricated.run(tmp_path / "runs" / "good", "php", 0)
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(comparison_figures, "draw", lambda setting: [])
  with pytest.raises(UserError, match="cannot write to --out"):
    report.write([str(tmp_path / "runs")], tmp_path / "file" / "out")
