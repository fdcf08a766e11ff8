"""`python -m data_pipelines.check` on damaged media: by the words of the report and the exit code."""

import json
import os
import pathlib
import re
import shutil

import damage
import fabricate
import numpy as np
import pytest
from check_roots import clean_roots, copy_of_root, run_command, told  # noqa: F401
from PIL import Image

from data_pipelines import DATASETS, check, progress, waves
from data_pipelines.base import ClipCache
from data_pipelines.checks import media


def test_missing_clips_are_counted_by_split_and_class(run, copy_of):
  ave = copy_of("ave")
  (ave / "AVE/video/aaaaaaaaaaa.mp4").unlink()
  code, text, report = run("ave", ave)
  assert code == 1 and "train: 1 of 2 clips without media" in text and "AVE/video/aaaaaaaaaaa.mp4" not in report["tree"]
  assert re.search(r"Bark +1 +0 +0\.0\n", text) and "Cat " not in text
  assert report["splits"]["train"] == {"rows": 2, "clips": 2, "usable": 1, "missing": 1, "broken": 0, "decoded": 1}
  assert told(report, "gap", "missing")[0]["examples"] == ["aaaaaaaaaaa"]
  assert "or train on the clips that are there: --config.data.on_bad_clip=skip" in text


def test_toybox_is_known_and_mended_by_its_command(run, copy_of):
  ave = copy_of("ave")
  (ave / "toybox.json").write_text("{}")
  (ave / "AVE/video/aaaaaaaaaaa.mp4").unlink()
  _, text, report = run("ave", ave / "AVE")
  assert report["toybox"] and "(toybox)" in text.splitlines()[0]
  assert report["next"][0] == f"remove the toybox and make it again: python -m data_pipelines.toybox --out={ave}"


def test_half_of_a_clip(run, copy_of):
  ave = copy_of("ave")
  damage.to_frames(ave, "aaaaaaaaaaa")
  damage.to_frames(ave, "-bbbbbbbbb_")
  damage.to_frames(ave, "ccccccccccc")
  (ave / "AVE/wave/aaaaaaaaaaa.npy").unlink()
  shutil.rmtree(ave / "AVE/frames/-bbbbbbbbb_")
  code, text, report = run("ave", ave)
  assert code == 2 and "train: 2 of 2 clips without media" in text
  assert told(report, "gap", "missing")[0]["examples"] == [
    "aaaaaaaaaaa (frames without a wave)",
    "-bbbbbbbbb_ (a wave without frames)",
  ]


def test_a_needed_split_without_any_usable_clip(run, copy_of):
  ave = copy_of("ave")
  (ave / "AVE/video/ccccccccccc.mp4").unlink()
  code, text, _ = run("ave", ave)
  assert code == 2 and "test: no clip of this split can be used" in text


@pytest.mark.parametrize("decode", ["all", "none"])
def test_truncated_mp4(run, copy_of, decode):
  ave = copy_of("ave")
  damage.cut(ave / "AVE/video/aaaaaaaaaaa.mp4")
  code, text, report = run("ave", ave, f"--decode={decode}")
  assert code == 1 and "train: 1 of 2 clips cut off" in text
  assert "AVE/video/aaaaaaaaaaa.mp4: is cut off: " in text and report["splits"]["train"]["broken"] == 1


def test_mp4_cut_where_its_index_is_whole(run, copy_of):
  ave = copy_of("ave")
  path = fabricate.write_mp4(ave / "AVE/video/aaaaaaaaaaa.mp4", faststart=True)
  damage.cut(path)
  code, _, report = run("ave", ave)
  assert code == 1 and "is cut off" in told(report, "gap", "truncated")[0]["examples"][0]


def test_unreadable_and_empty_files(run, copy_of):
  ave = copy_of("ave")
  (ave / "AVE/video/aaaaaaaaaaa.mp4").write_bytes(b"<html>quota exceeded</html>" * 40)
  (ave / "AVE/video/-bbbbbbbbb_.mp4").write_bytes(b"")
  code, text, report = run("ave", ave)
  assert code == 2 and "train: no clip of this split can be used" in text
  assert "cannot be decoded" in told(report, "gap", "unreadable")[0]["examples"][0]
  assert told(report, "gap", "zero_byte")[0]["examples"] == [f"{ave}/AVE/video/-bbbbbbbbb_.mp4: is empty (0 bytes)"]
  assert run("ave", ave, "--decode=none")[2]["splits"]["train"] == {
    **{"rows": 2, "clips": 2, "usable": 1, "missing": 0, "broken": 1, "decoded": 0}
  }


def test_zero_byte_wav(run, copy_of):
  avsbench = copy_of("avsbench")
  damage.s4(avsbench, "audio_wav", "val").with_suffix(".wav").write_bytes(b"")
  code, text, _ = run("avsbench", avsbench)
  assert code == 1 and "val: 1 of 1 clip with an empty file" in text and "val_clip_0.wav: is empty (0 bytes)" in text


def test_zero_byte_frame(run, copy_of):
  ave = copy_of("ave")
  damage.to_frames(ave, "aaaaaaaaaaa")
  (ave / "AVE/frames/aaaaaaaaaaa/00000004.jpg").write_bytes(b"")
  code, text, _ = run("ave", ave)
  assert code == 1 and "AVE/frames/aaaaaaaaaaa/00000004.jpg: is empty (0 bytes)" in text


@pytest.mark.parametrize("decode", ["all", "none"])
def test_lost_masks_and_sounds(run, copy_of, decode):
  avsbench = copy_of("avsbench")
  (damage.s4(avsbench, "gt_masks", "val") / "val_clip_0_4.png").unlink()
  code, text, report = run("avsbench", avsbench, f"--decode={decode}")
  assert code == 1 and "val_clip_0: 4 of 5 masks" in text and report["splits"]["val"]["missing"] == 1
  damage.s4(avsbench, "audio_wav", "val").with_suffix(".wav").unlink()
  code, text, _ = run("avsbench", avsbench, f"--decode={decode}")
  assert code == 1 and "val: 1 of 1 clip without media" in text


def test_masks_of_zeros_and_ones_are_told_and_fine(run, copy_of):
  avsbench = copy_of("avsbench")
  folder = damage.s4(avsbench, "gt_masks", "test")
  for number, high in ((1, 1), (2, 255)):
    mask = np.zeros((48, 48), np.uint8)
    mask[:, :24] = high
    Image.fromarray(mask).save(folder / f"test_clip_0_{number}.png")
  code, text, report = run("avsbench", avsbench)
  assert code == 0 and "test: 1 clip whose masks hold 0 and 1 instead of 0 and 255: read as the same" in text
  assert told(report, "note", "0_1_masks")[0]["examples"] == [f"{folder}/test_clip_0_1.png: values 0 and 1"]


def test_empty_masks_are_a_gap_where_the_labels_are_official(run, copy_of):
  avsbench = copy_of("avsbench")
  Image.new("1", (48, 48)).save(damage.s4(avsbench, "gt_masks", "test") / "test_clip_0_2.png")
  code, text, _ = run("avsbench", avsbench)
  assert code == 0 and "test: 1 clip with an empty mask" in text
  (avsbench / "AVSBench/categories.txt").unlink()
  code, _, report = run("avsbench", avsbench)
  assert code == 1 and told(report, "gap", "empty_masks") and told(report, "gap", "counts")


@pytest.mark.parametrize("decode", ["all", "none"])
@pytest.mark.parametrize(("name", "make"), [("avsbench", fabricate.make_avsbench), ("avsbench_ms3", fabricate.make_ms3)])
def test_sounds_of_many_clips_in_one_file_are_looked_into(run, tmp_path, name, make, decode):
  make(tmp_path / "AVSBench", packed=True)
  (tmp_path / "AVSBench/categories.txt").write_text("dog_barking\n")
  options = name, tmp_path, f"--decode={decode}"
  assert run(*options)[0] == 0
  dataset = DATASETS[name](tmp_path)
  clips = {split: dataset.records(split)[0] for split in dataset.splits()}
  tables = {split: dataset.sound(record) for split, record in clips.items()}
  fabricate.write_packed_sounds(tables["val"], ["another"])
  code, _, report = run(*options)
  assert code == 1 and report["splits"]["val"]["missing"] == 1 and report["splits"]["val"]["broken"] == 0
  assert told(report, "gap", "missing")[0]["examples"] == [f"{clips['val'].clip}: not in {tables['val']}"]
  tables["val"].write_bytes(b"no table")
  tables["test"].write_bytes(tables["train"].read_bytes().replace(b"_reconstruct", b"frombuffer_x"))
  code, _, report = run(*options)
  found = {f["where"]: f["examples"][0] for f in told(report, "gap", "unreadable")}
  assert code == 2 and set(found) == {"val", "test"}
  assert f"{tables['val']}: cannot be read as a table of sounds" in found["val"]
  assert re.search(r"AVS\.npy: asks for numpy\._?core\.multiarray\.frombuffer_x, .* was not opened", found["test"])


def test_packed_sounds_of_another_length_are_told(run, tmp_path):
  fabricate.make_avsbench(tmp_path / "AVSBench", packed=True)
  (tmp_path / "AVSBench/categories.txt").write_text("dog_barking\n")
  dataset = DATASETS["avsbench"](tmp_path)
  (record,) = dataset.records("val")
  table = {f"{record.clip}.wav": fabricate.tones(5, 16000)}
  np.save(dataset.sound(record), np.array(table, object), allow_pickle=True)
  code, _, report = run("avsbench", tmp_path)
  words = f"{dataset.sound(record)}: {record.clip}: 80000 samples, expected 160000"
  assert code == 1 and [f["examples"] for f in told(report, "gap", "samples")] == [[words]]


def test_tables_that_do_not_fit_into_memory_are_a_note(run, tmp_path, monkeypatch):
  fabricate.make_avsbench(tmp_path / "AVSBench", packed=True)
  (tmp_path / "AVSBench/categories.txt").write_text("dog_barking\n")
  assert not told(run("avsbench", tmp_path)[2], "note", "packed_sounds")
  monkeypatch.setattr(waves, "TABLES", ClipCache(10))
  code, text, _ = run("avsbench", tmp_path)
  assert code == 0 and "3 tables AVS.npy of 1 MB, of which a process keeps 0 MB" in text and "data_pipelines.prepare" in text


@pytest.mark.parametrize(("decibels", "silent"), [(-61, True), (-59, False), (-25, False)])
def test_silence_begins_60_decibels_below_full_scale(run, copy_of, decibels, silent):
  avsbench = copy_of("avsbench")
  samples = np.zeros(5 * 16000, np.int16)
  samples[100] = -round(32768 * 10 ** (decibels / 20))
  fabricate.write_wav(damage.s4(avsbench, "audio_wav", "val").with_suffix(".wav"), samples, 16000)
  code, _, report = run("avsbench", avsbench)
  assert code == int(silent) and len(told(report, "gap", "silent")) == int(silent)


def test_the_most_negative_sample_is_loud():
  state = media.ClipState((pathlib.Path("a"),))
  media._remark(np.full(10, -32768, np.int16), None, media.Context("ave", None, None, False, {}, [], {}), state)
  assert not state.remarks


def test_links_to_themselves_and_folders_that_cannot_be_listed(run, copy_of, monkeypatch):
  ave = copy_of("ave")
  (ave / "AVE/loop").symlink_to("loop")
  (ave / "AVE/video/loop.mp4").symlink_to("loop.mp4")
  (ave / "AVE/gone.mp4").symlink_to("nowhere")
  (ave / "AVE/wave").mkdir()
  code, text, _ = run("ave", ave)
  assert code == 0 and "loop.mp4" in text
  originals = os.scandir, os.listdir

  def refuse(which: int, path: object) -> object:
    if str(path).endswith(("/wave", "/video")):
      raise PermissionError(13, "Permission denied", str(path))
    return originals[which](path)

  monkeypatch.setattr(os, "scandir", lambda path: refuse(0, path))
  monkeypatch.setattr(os, "listdir", lambda path: refuse(1, path))
  code, text, report = run("ave", ave)
  folders = {f["where"] for f in told(report, "gap", "unlisted")}
  assert code == 1 and folders == {f"{ave}/AVE/wave", f"{ave}/AVE/video"} and "cannot be listed (Permission denied)" in text


def test_silent_sound(run, copy_of):
  avsbench = copy_of("avsbench")
  damage.silence(avsbench, "val")
  code, text, _ = run("avsbench", avsbench)
  assert code == 1 and "val: 1 clip without sound" in text and "val_clip_0.wav: silent, below -60 dBFS" in text
  assert run("avsbench", avsbench, "--decode=none")[0] == 0


def test_wrong_lengths(run, copy_of):
  ave = copy_of("ave")
  fabricate.write_mp4(ave / "AVE/video/ccccccccccc.mp4", seconds=6)
  damage.to_frames(ave, "aaaaaaaaaaa", frames=8, samples=160_000)
  damage.to_frames(ave, "-bbbbbbbbb_", frames=12)
  code, text, _ = run("ave", ave)
  assert code == 1
  assert "test: 1 clip of another length" in text and "ccccccccccc.mp4: 6.0 s long, expected 10 s" in text
  assert "train: 1 clip whose .npy has another length" in text and "160000 samples, expected 320000" in text
  assert "aaaaaaaaaaa: 8 frames for 10 seconds" in text
  assert "train: 1 clip with more frames than seconds: spread evenly here" in text


def test_clips_of_avqa_may_have_any_length_unless_official(run, copy_of):
  music_avqa = copy_of("music_avqa")
  (music_avqa / "MUSIC-AVQA/vocabulary.json").unlink()
  code, _, report = run("music_avqa", music_avqa)
  assert code == 1 and "30.0 s long, expected 60 s" in told(report, "gap", "duration")[0]["examples"][0]


def test_files_of_no_row_and_names_that_are_no_utf8(run, copy_of):
  ave = copy_of("ave")
  (ave / "AVE/video/zzzzzzzzzzz.mp4").write_bytes(b"x")
  (ave / "AVE/notes").mkdir()
  code, text, report = run("ave", ave)
  assert code == 0 and "AVE/video: 1 entry of no row: zzzzzzzzzzz.mp4" in text
  assert {"mark": "?", "path": "AVE/notes", "what": "not used, 0 entries", "md5": ""} in report["tree"]
  with open(os.fsencode(ave) + b"/AVE/video/caf\xe9.mp4", "wb") as file:
    file.write(b"x")
  code, text, _ = run("ave", ave)
  assert code == 1 and "AVE/video: 1 name not in UTF-8, which no row can mean: caf\\udce9.mp4" in text


def test_sample_decodes_the_same_clips_each_time(run, copy_of, monkeypatch):
  ave = copy_of("ave")
  monkeypatch.setattr(media, "SAMPLE", 1)
  reports = [run("ave", ave, "--decode=sample")[2] for _ in range(2)]
  assert [row["decoded"] for row in reports[0]["splits"].values()] == [1, 1]
  (ave / "AVE/video/aaaaaaaaaaa.mp4").write_bytes(b"x" * 100)
  first = run("ave", ave, "--decode=sample")[2]["splits"]["train"]["broken"]
  fabricate.write_mp4(ave / "AVE/video/aaaaaaaaaaa.mp4")
  (ave / "AVE/video/-bbbbbbbbb_.mp4").write_bytes(b"x" * 100)
  assert sorted([first, run("ave", ave, "--decode=sample")[2]["splits"]["train"]["broken"]]) == [0, 1]


def test_progress_goes_to_stderr_with_the_time_left(clean, capsys, monkeypatch):
  monkeypatch.setattr(check, "Progress", lambda title: progress.Progress(title, every_s=0))
  assert check.main(["--dataset=ave", f"--root={clean['ave']}", "--json"]) == 0
  out, err = capsys.readouterr()
  assert json.loads(out)["exit_code"] == 0
  assert [re.sub(r"\d+ s", "N s", line) for line in err.splitlines()] == [
    f"check ave: {done}/3 clips, N s, about N s left" for done in (1, 2, 3)
  ]


def test_files_that_the_system_refuses_to_open(run, copy_of, monkeypatch):
  def refuse(path: pathlib.Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(media, "_empty_file", refuse)
  code, text, report = run("llp", copy_of("llp"))
  assert code == 2 and "no clip of this split can be used" in text
  assert "Permission denied" in told(report, "gap", "unreadable")[0]["examples"][0]


def test_ctrl_c_is_one_line(clean, capsys, monkeypatch):
  def stop(*arguments: object) -> None:
    raise KeyboardInterrupt

  monkeypatch.setattr(media, "inspect", stop)
  assert check.main(["--dataset=ave", f"--root={clean['ave']}"]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err == "error: stopped while checking ave; --decode=sample takes less time\n"
