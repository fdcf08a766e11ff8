"""`python -m data_pipelines.check`: clean roots, and every kind of damage, by the words of the report and the exit code."""

import json
import pathlib
import re
import socket

import damage
import pytest
from check_roots import clean_roots, copy_of_root, run_command, told  # noqa: F401
from test_annotations import ANNOTATIONS

from data_pipelines import DATASETS, ave, check, music_avqa
from data_pipelines.checks import labels, traps
from data_pipelines.checks.findings import Context
from data_pipelines.checks.report import Report
from data_pipelines.known import FACTS

# Clean.


@pytest.mark.parametrize("name", damage.CLEAN)
def test_clean_root_is_a_screen_and_exits_0(run, clean, monkeypatch, name):
  monkeypatch.setattr(socket, "socket", None)  # whoever reaches for the network fails
  code, text, report = run(name, clean[name])
  assert code == 0 and len(text.splitlines()) < 40
  assert text.rstrip().endswith(f"{name}: clean (exit 0)") and "(labels of its own)" in text.splitlines()[0]
  assert f"python -m data_pipelines.prepare --dataset={name} --root={clean[name]} --out=DIR" in text
  assert all(finding["severity"] == "note" for finding in report["findings"])
  assert all(row["with_media"] == row["rows"] and row["percent"] == 100 for row in report["classes"])
  splits = report["splits"].values()
  assert all(row["usable"] == row["decoded"] == row["clips"] and not row["missing"] + row["broken"] for row in splits)
  assert not any(line["mark"] == "-" for line in report["tree"])


def test_all_keys_of_the_report_stand_in_the_help(run, clean, capsys):
  with pytest.raises(SystemExit) as left:
    check.main(["--help"])
  words = set(re.findall(r"\w+", capsys.readouterr().out))
  assert left.value.code == 0
  _, _, report = run("music_avqa", clean["music_avqa"])
  assert set(report) == set(Report.__dataclass_fields__) <= words
  assert set(report["findings"][0]) | set(report["tree"][0]) | set(report["classes"][0]) <= words
  assert set(report["splits"]["train"]) <= words


def test_all_checks_each_dataset_that_is_there(clean, tmp_path, capsys):
  for name in ("ave", "music_avqa"):
    damage.CLEAN[name](tmp_path)
  (tmp_path / "AVE/video/aaaaaaaaaaa.mp4").unlink()
  assert check.main(["--dataset=all", f"--root={tmp_path}"]) == 1
  text = capsys.readouterr().out
  assert "LLP" not in text and text.endswith("ave: usable with gaps\nmusic_avqa: clean\n")
  assert f"not found below {tmp_path}, so not checked: llp, avsbench, avsbench_ms3, tux21\n" in text
  assert check.main(["--dataset=all", f"--root={tmp_path}", "--json"]) == 1
  report = json.loads(capsys.readouterr().out)
  assert list(report["datasets"]) == ["ave", "music_avqa"]
  assert report["absent"] == ["llp", "avsbench", "avsbench_ms3", "tux21"]


def test_frames_and_waves_are_as_good_as_mp4(run, copy_of):
  ave = copy_of("ave")
  damage.to_frames(ave, "aaaaaaaaaaa")
  code, text, report = run("ave", ave)
  assert code == 0 and report["layout"] == {"frames + npy": 1, "mp4": 2}
  assert "+ AVE/frames/" in text and "1 clip folder" in text and "+ AVE/wave/" in text


# Nothing there.


def test_no_root_is_one_line(tmp_path, capsys):
  assert check.main(["--dataset=ave", f"--root={tmp_path / 'nowhere'}"]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith(f"error: {tmp_path}/nowhere: no such folder; --root") and err.count("\n") == 1
  assert check.main(["--dataset=all", f"--root={tmp_path}", "--json"]) == 2
  out, err = capsys.readouterr()
  assert "no benchmark found" in err and "no benchmark found" in json.loads(out)["error"]


def test_wrong_arguments_exit_2(capsys):
  for wrong in (["--dataset=ave"], ["--dataset=zebra", "--root=x"], ["--dataset=ave", "--root=.", "--workers=0"]):
    with pytest.raises(SystemExit) as left:
      check.main(wrong)
    assert left.value.code == 2
  assert "--workers must be 1 or more" in capsys.readouterr().err


def test_no_labels_shows_what_is_expected_and_what_is_there(run, tmp_path):
  (tmp_path / "AVE/videos").mkdir(parents=True)
  code, text, report = run("ave", tmp_path)
  assert code == 2 and told(report, "fatal", "no_labels")
  assert re.search(r"- AVE/trainSet\.txt +missing\n", text) and re.search(r"\? AVE/videos +0 entries\n", text)
  assert "AVE-ECCV18" in report["next"][0]


def test_no_media_at_all(run, copy_of):
  ave = copy_of("ave")
  for path in (ave / "AVE/video").iterdir():
    path.unlink()
  code, text, report = run("ave", ave, "--decode=none")
  assert code == 2 and "no media: none of 3 clips has a file" in text
  assert {"mark": "-", "path": "AVE/", "what": "missing: " + check.FACTS["ave"].media, "md5": ""} in report["tree"]
  assert run("ave", ave, "--labels_only")[0] == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_and_missing_splits(run, copy_of, split):
  ave = copy_of("ave")
  rows = {**damage.AVE_ROWS, split: ()}
  damage.write_ave_rows(ave / "AVE", rows)
  code, text, _ = run("ave", ave)
  assert code == 2 and f"  {split}: the split is empty" in text
  (ave / f"AVE/{split}Set.txt").unlink()
  code, text, report = run("ave", ave)
  assert code == 2 and f"  {split}: the split is not there" in text
  assert {"mark": "-", "path": f"AVE/{split}Set.txt", "what": "missing", "md5": ""} in report["tree"]


# Labels.


def test_header_in_its_place_is_fine_and_elsewhere_damage(run, copy_of):
  ave = copy_of("ave")
  header, rows = "Category&VideoID&Quality&StartTime&EndTime", list(damage.AVE_ROWS["train"])
  (ave / "AVE/trainSet.txt").write_text("\n".join([header, *rows]))
  assert run("ave", ave)[0] == 0
  (ave / "AVE/trainSet.txt").write_text("\n".join([rows[0], header, rows[1]]))
  code, text, report = run("ave", ave)
  assert code == 2 and "trainSet.txt:2: expected Category&VideoID" in text
  assert len(told(report, "fatal", "damaged_labels")) == 1 and not told(report, "fatal", "splits")


def test_shifted_columns_of_avsbench(run, copy_of):
  avsbench = copy_of("avsbench")
  path = avsbench / "AVSBench/Single-source/s4_meta_data.csv"
  path.write_text(path.read_text().replace("name,start_time,category,split", "index,name,start_time,category,split"))
  code, text, _ = run("avsbench", avsbench)
  assert code == 2 and "s4_meta_data.csv" in text and "fields" in text


def test_labels_that_are_no_text(run, copy_of):
  ave = copy_of("ave")
  (ave / "AVE/testSet.txt").write_bytes(b"Cat&caf\xe9\xff\xfe&good&0&10\n")
  code, text, report = run("ave", ave)
  assert code == 2 and "testSet.txt: cannot be read as UTF-8 text" in text
  assert report["splits"]["train"]["usable"] == 2  # the rest is looked at all the same


def test_leaking_and_repeated_rows(run, copy_of):
  ave = copy_of("ave")
  first = damage.AVE_ROWS["train"][0]
  rows = {"train": (*damage.AVE_ROWS["train"], first), "test": (*damage.AVE_ROWS["test"], "Cat&aaaaaaaaaaa&good&0&0")}
  damage.write_ave_rows(ave / "AVE", rows)
  code, text, report = run("ave", ave)
  assert code == 1 and "train/test: 1 clip in both: aaaaaaaaaaa" in text
  assert "train: 1 row repeated word for word: aaaaaaaaaaa" in text
  assert told(report, "gap", "empty_spans")[0]["examples"] == ["aaaaaaaaaaa 0-0"]


@pytest.mark.parametrize("name", ["Annotations.txt", "Annotations_with_domain.txt"])
def test_set_file_that_annotations_do_not_know(run, copy_of, name):
  ave = copy_of("ave")
  (ave / "AVE/testSet.txt").write_text("Bark&ccccccccccc&good&2&9\n")
  (ave / "AVE/Annotations.txt").rename(ave / "AVE" / name)
  code, text, _ = run("ave", ave)
  assert code == 1 and f"{name}: 1 row of the Set files not in it: one of them is damaged: test: ccccccccccc" in text


def test_repeated_question_ids(run, copy_of):
  music_avqa = copy_of("music_avqa")
  path = music_avqa / "MUSIC-AVQA/avqa-train.json"
  rows = json.loads(path.read_text())
  path.write_text(json.dumps([*rows, {**rows[0], "anser": "two"}]))
  code, text, report = run("music_avqa", music_avqa)
  assert code == 1 and "train: 1 row with the id of another row: 00000001/1" in text
  assert "train/test: 1 clip in both: the benchmark splits questions, not clips: va000002" in text
  assert told(report, "note", "leaks")


def test_defects_of_dense_labels(run, copy_of):
  llp = copy_of("llp")
  head, first, test = "filename\tonset\toffset\tevent_labels\n", *damage.LLP_NAMES[:2]
  rows = [
    f"{test}\t0\t3\tSpeech",
    f"{test}\t0\t3\tSpeech",
    f"{test}\t9\t0\tDog",
    f"{test}\t5\t5\tSpeech",
    "gone_0_10\t0\t1\tCar",
  ]
  (llp / "LLP/AVVP_eval_audio.csv").write_text(head + "\n".join(rows) + "\n")
  (llp / "LLP/AVVP_train.csv").write_text(f"filename\tevent_labels\n{first}\tSpeech,Dog,Car,Dog\n")
  code, text, _ = run("llp", llp)
  assert code == 1
  for line in (
    f"AVVP_eval_audio.csv: 1 span of no length, without effect: {test} 5-5",
    f"AVVP_eval_audio.csv: 1 span ending before the beginning, without effect: {test} 9-0",
    f"AVVP_eval_audio.csv: 1 row repeated, without effect: {test} 0-3 Speech",
    "AVVP_eval_audio.csv: 1 id of no split, mistyped: gone_0_10",
    f"train: 1 clip with a label listed twice, which counts once: {first}",
    f"test: 1 clip with weak labels that are not the union of its dense ones: {test}",
  ):
    assert line in text


def test_dense_labels_that_are_not_there(run, copy_of):
  llp = copy_of("llp")
  (llp / "LLP/AVVP_eval_visual.csv").unlink()
  code, text, _ = run("llp", llp)
  assert code == 1 and "no AVVP_eval_visual.csv: nothing seen can be scored" in text
  assert re.search(r"- LLP/AVVP_eval_visual\.csv +missing", text)


def test_labels_that_claim_to_be_official_are_held_to_it(run, copy_of):
  llp = copy_of("llp")
  (llp / "LLP/categories.txt").unlink()
  code, text, report = run("llp", llp, "--labels_only")
  assert code == 1 and "(official labels)" in text and "train: 1 rows, official 10000" in text
  assert "val: the split is not there; no settings can be chosen on it" in text
  assert "Speech: 1 rows, official 4988" in told(report, "gap", "counts")[0]["examples"]
  assert re.search(r"\+ LLP/AVVP_train\.csv +not a known file", text)


@pytest.mark.parametrize(("number", "severity"), [(9, "gap"), (10, "note"), (11, "gap")])
def test_only_the_published_leaks_are_notes(number, severity):
  clips = [ave.Event(f"{i}", f"{i}", 0, 0, 1) for i in range(20)]
  context = Context("ave", pathlib.Path(), FACTS["ave"], True, {"train": clips, "val": clips[:number]}, [], {})
  (finding,) = labels.leaks(None, context)
  assert (finding.severity, finding.where, len(finding.examples)) == (severity, "train/val", number)
  assert ("as in the official files" in finding.what) == (severity == "note") != bool(finding.mend)


@pytest.mark.parametrize(("number", "severity"), [(4, "gap"), (5, "note"), (6, "gap")])
def test_only_the_published_defects_are_notes(number, severity):
  context = Context("llp", pathlib.Path(), FACTS["llp"], True, {}, [], {})
  (finding,) = traps._defect(context, "audio: empty spans", "file", "span", "of no length", map(str, range(number)))
  assert finding.severity == severity and ("as in the official files" in finding.what) == (severity == "note")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_no_check_foresaw_is_one_line_and_exit_2(clean, capsys, monkeypatch, options):
  def fail(*arguments: object) -> None:
    raise RuntimeError("first line\nsecond")

  monkeypatch.setattr(check, "CHECKS", (fail,))
  assert check.main(["--dataset=ave", f"--root={clean['ave']}", "--labels_only", *options]) == 2
  out, err = capsys.readouterr()
  (line,) = err.splitlines()
  assert line.startswith("error: ave: the check itself failed (RuntimeError: first line second, at test_check.py:")
  assert (json.loads(out)["exit_code"] == 2 and json.loads(out)["error"] in line) if options else out == ""


def test_every_dataset_is_known():
  assert set(DATASETS) <= set(FACTS)
  for facts in FACTS.values():
    versions = [version for found in facts.splits.values() for version in found]
    assert all(len(v.classes) in (0, len(facts.class_names)) for v in versions)
    assert set(facts.splits) == ({"train", "test"} if facts is FACTS["tux21"] else {"train", "val", "test"})


def test_questions_of_two_versions():
  def rows(count: int) -> list[music_avqa.Question]:
    return [music_avqa.Question(f"{i}/{i}", str(i), "", (), 0, 0) for i in range(count)]

  splits = {"val": rows(4568), "test": rows(9185)}
  context = Context("music_avqa", pathlib.Path(), FACTS["music_avqa"], True, splits, [], {})
  assert [context.split_facts(split).variant for split in splits] == ["json_update", ""]
  (finding,) = traps.avqa_versions(music_avqa.MusicAVQA.__new__(music_avqa.MusicAVQA), context)
  assert finding.severity == "gap" and finding.what == "versions differ: val is of json_update, test is of json"
  splits["test"] = rows(9129)
  assert not traps.avqa_versions(music_avqa.MusicAVQA.__new__(music_avqa.MusicAVQA), context)


# The published files.


def linked(source: pathlib.Path, target: pathlib.Path, **changes: bytes) -> pathlib.Path:
  """A folder of links to the published files; `changes`: file name with _ for the dot -> other bytes."""
  target.mkdir()
  for path in source.iterdir():
    if path.name.replace(".", "_") not in changes and "corrupted" not in path.name and "no_header" not in path.name:
      (target / path.name).symlink_to(path)
  for name, content in changes.items():
    (target / ".".join(name.rsplit("_", 1))).write_bytes(content)
  return target


@pytest.fixture
def published() -> pathlib.Path:
  if not ANNOTATIONS.is_dir():
    pytest.fail(f"no published annotation files in {ANNOTATIONS}; set PHPJAX_ANNOTATIONS to their folder")
  return ANNOTATIONS


@pytest.mark.real
def test_published_ave(run, published):
  code, text, report = run("ave", published / "ave", "--labels_only")
  assert code == 0 and report["official"] and report["clips"] == 4097
  assert [row["rows"] for row in report["splits"].values()] == [3339, 402, 402]
  assert [row["clips"] for row in report["splits"].values()] == [3312, 401, 402]
  assert {f["where"]: len(f["examples"]) for f in told(report, "note", "leaks")} == {"train/val": 10, "train/test": 8}
  assert told(report, "note", "empty_spans")[0]["examples"] == ["VWi2ENBuTbw 0-0"]
  assert re.search(r"\+ Annotations\.txt +official file, variant with header\n", text)
  assert code == 0 and run("ave", published / "ave", "--decode=none")[0] == 2


@pytest.mark.real
def test_published_ave_with_other_bytes(run, published, tmp_path):
  train, val = ((published / f"ave/{name}Set.txt").read_bytes() for name in ("train", "val"))
  no_header = (published / "ave/Annotations_no_header.txt").read_bytes()
  root = linked(published / "ave", tmp_path / "crlf", trainSet_txt=train.replace(b"\n", b"\r\n"), Annotations_txt=no_header)
  code, text, _ = run("ave", root, "--labels_only")
  assert code == 0 and re.search(r"\+ trainSet\.txt +official rows; only header or line ends differ\n", text)
  assert re.search(r"\+ Annotations\.txt +official file, variant without header\n", text)
  root = linked(published / "ave", tmp_path / "short", trainSet_txt=train.split(b"\n", 1)[1], testSet_txt=val)
  code, text, report = run("ave", root, "--labels_only")
  assert code == 1 and "train: 3338 rows, official 3339: one is lost, as when a headerless file is read as if" in text
  assert [f["examples"] for f in told(report, "gap", "counts") if f["where"] == "train"] == [
    ["Church bell: 151 rows, official 152"]
  ]
  assert "testSet.txt: official valSet.txt under another name" in text


@pytest.mark.real
def test_published_llp(run, published):
  code, _, report = run("llp", published / "avvp", "--labels_only")
  assert code == 0 and [row["rows"] for row in report["splits"].values()] == [10000, 649, 1200]
  assert all(line["what"] == "official file" for line in report["tree"] if line["mark"] == "+")
  numbers = {(f["where"], f["check"]): len(f["examples"]) for f in report["findings"]}
  assert numbers == {
    ("AVVP_eval_audio.csv", "empty_spans"): 5,
    ("AVVP_eval_audio.csv", "reversed_spans"): 1,
    ("AVVP_eval_audio.csv", "repeated_rows"): 8,
    ("AVVP_eval_audio.csv", "ids_of_no_split"): 8,
    ("AVVP_eval_visual.csv", "ids_of_no_split"): 7,
    ("val", "weak_labels_differ"): 30,
    ("test", "weak_labels_differ"): 51,
    ("test", "labels_listed_twice"): 1,
  }


@pytest.mark.real
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_published_llp_corrupted_copy(run, published, tmp_path, ends):
  content = (published / "avvp/AVVP_eval_audio_corrupted_copy.csv").read_bytes().replace(b"\n", ends)
  root = linked(published / "avvp", tmp_path / "root", AVVP_eval_audio_csv=content)
  code, text, report = run("llp", root, "--labels_only")
  assert code == 1 and "AVVP_eval_audio.csv: known corrupted copy (DG-SCT, AVMoE, CPSP)" in text
  assert "14576 -> 14568" in text and "98d8ce2369078d43aa1df26d3ef2894c" in report["next"][0]
  assert told(report, "gap", "dense_cells")[0]["what"].startswith("positive cells (audio, visual, both): 14568, ")


@pytest.mark.real
def test_published_music_avqa(run, published):
  code, text, report = run("music_avqa", published / "music_avqa", "--labels_only")
  assert code == 2 and "train: the split is not there" in text  # the train questions are not among the files
  assert [(row["rows"], row["clips"]) for row in report["splits"].values()] == [(4595, 3815), (9185, 6399)]
  repeats = {f["where"]: len(f["examples"]) for f in told(report, "note", "repeats")}
  assert repeats == {"val": 27, "test": 55}
  assert len(told(report, "note", "leaks")[0]["examples"]) == 2296
  assert not told(report, "gap", "counts") and not told(report, "gap", "files")
