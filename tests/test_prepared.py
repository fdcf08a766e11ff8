"""Prepared records read as the raw media do: every layout of every dataset, other sizes and rates, and what is broken."""

import json
import pathlib
import pickle
import threading

import fabricate
import numpy as np
import pytest
from fabricated import every_layout
from PIL import Image

from data_pipelines import DATASETS, DataError, Media, MediaError, bench, records
from data_pipelines.base import ClipCache, Dataset
from data_pipelines.encode import Encoding
from data_pipelines.prepare import Options, prepare
from data_pipelines.prepared import PreparedStore

MEDIA = Media(image_size=16, sample_rate_hz=16000)


def prepared(raw: pathlib.Path, out: pathlib.Path, name: str, **options: object) -> Dataset:
  """The dataset read from records that were just made."""
  prepare(name, raw, out, Encoding(sample_rate_hz=MEDIA.sample_rate_hz), 2, Options(**options))
  dataset = DATASETS[name](out)
  assert dataset.prepared is not None
  return dataset


@pytest.fixture(scope="module")
def pair(layout_roots, tmp_path_factory: pytest.TempPathFactory):
  """name, layout -> the raw dataset and the prepared one, each made once."""
  done: dict[tuple[str, str], tuple[Dataset, Dataset]] = {}

  def make(name: str, layout: str) -> tuple[Dataset, Dataset]:
    if (name, layout) not in done:
      raw, out = layout_roots[name, layout], tmp_path_factory.mktemp(f"{name}_{layout}")
      done[name, layout] = DATASETS[name](raw), prepared(raw, out, name)
    return done[name, layout]

  return make


def is_video(dataset: Dataset) -> bool:
  return len(dataset.clip_files(dataset.records("train")[0])) == 1


def check_same(raw: dict, again: dict, *, visual: float, audio: float = 0) -> None:
  """Equal examples; `visual` and `audio` allow a mean difference in grey values and in 16-bit steps."""
  assert raw.keys() == again.keys() and raw["id"] == again["id"]
  for key in raw.keys() - {"id"}:
    assert (raw[key].dtype, raw[key].shape) == (again[key].dtype, again[key].shape), key
    allowed = {"visual": visual, "audio": audio}.get(key, 0)
    assert np.abs(raw[key].astype(np.float64) - again[key]).mean() <= allowed, key


@every_layout
def test_every_layout_reads_the_same_from_records(pair, name, layout):
  raw, again = pair(name, layout)
  assert (again.splits(), again.classes) == (raw.splits(), raw.classes)
  for split in raw.splits():
    sources = [dataset.examples(split, MEDIA, cache=ClipCache()) for dataset in (raw, again)]
    assert sources[0].ids == sources[1].ids and len(sources[0]) > 0
    for index in range(len(sources[0])):
      # Pictures are kept byte for byte; the frames of videos went through JPEG.
      check_same(sources[0][index], sources[1][index], visual=1.5 if is_video(raw) else 0)
    assert again.coverage(split) == raw.coverage(split)


def test_other_sizes_and_the_crop_rule_are_decided_when_reading(pair):
  for name, layout in (("ave", "official"), ("ave", "dg_sct"), ("avsbench", "official")):
    raw, again = pair(name, layout)
    for media in (Media(7, MEDIA.sample_rate_hz), Media(24, MEDIA.sample_rate_hz, crop=True)):
      record = raw.records("test")[0]
      check_same(raw.decode(record, media), again.decode(record, media), visual=1.5 if is_video(raw) else 0)


@pytest.mark.parametrize(("name", "layout"), [("ave", "official"), ("music_avqa", "official"), ("music_avqa", "dg_sct")])
@pytest.mark.parametrize("rate_hz", [8000, 22050])
def test_another_sample_rate_is_resampled(pair, name, layout, rate_hz):
  raw, again = pair(name, layout)
  record, media = raw.records("train")[0], Media(16, rate_hz)
  check_same(raw.decode(record, media), again.decode(record, media), visual=1.5, audio=60)  # of a tone of 6500 or more


def test_masks_of_any_kind_read_the_same(tmp_path):
  root = fabricate.make_avsbench(tmp_path / "raw" / "AVSBench")
  folder = root / "Single-source/s4_data/gt_masks/test" / fabricate.CATEGORY / "test_clip_0"
  half = np.zeros((48, 48), np.uint8)
  half[:, :24] = 1
  for k, mask in enumerate((half, 255 * half, np.dstack([255 * half] * 3), 0 * half, 3 * half), 1):
    Image.fromarray(mask).save(folder / f"test_clip_0_{k}.png")
  raw, again = DATASETS["avsbench"](root), prepared(root, tmp_path / "out", "avsbench")
  labels = [dataset.decode(dataset.records("test")[0], MEDIA)["label"] for dataset in (raw, again)]
  np.testing.assert_array_equal(*labels)
  assert labels[1].mean((1, 2)).tolist() == [0.5, 0.5, 0.5, 0, 0]  # 3 of 255 is nearly black


def test_threads_and_other_processes_share_the_records(pair):
  raw, dataset = pair("ave", "official")
  found = {}
  source = dataset.examples("train", MEDIA, cache=ClipCache(0))
  threads = [threading.Thread(target=lambda i=i: found.update({i: source[i % 2]["audio"]})) for i in range(8)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  copy = pickle.loads(pickle.dumps(dataset))  # as workers of the loader get it
  for i in range(8):
    expected = raw.decode(raw.records("train")[i % 2], MEDIA)["audio"]
    np.testing.assert_array_equal(found[i], expected)
    np.testing.assert_array_equal(copy.decode(copy.records("train")[i % 2], MEDIA)["audio"], expected)


def test_rows_that_share_a_clip_share_its_record(pair):
  _, dataset = pair("music_avqa", "official")
  manifest = json.loads((dataset.prepared.folder / "manifest.json").read_text())
  assert manifest["splits"]["train"] | {"size": 0} == {"rows": 3, "clips": 2, "written": 2, "shards": 1, "size": 0}
  source = dataset.examples("train", MEDIA, cache=ClipCache())
  assert source[0]["visual"] is source[1]["visual"] and source[0]["label"] != source[1]["label"]


def test_a_clip_left_out_is_named_with_its_reason(tmp_path):
  root = fabricate.make_ave(tmp_path / "raw" / "AVE")
  broken, whole = fabricate.CLIP_IDS[:2]
  (root / f"{broken}.mp4").write_bytes((root / f"{whole}.mp4").read_bytes()[:900])
  dataset = prepared(root, tmp_path / "out", "ave", max_broken_percent=50)
  assert dataset.coverage("train") == {"clips": 2, "missing": [broken]}
  with pytest.raises(MediaError, match=rf"clip '{broken}' was left out \({broken}\.mp4: cannot be decoded"):
    dataset.decode(dataset.records("train")[0], MEDIA)
  source = dataset.examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache())
  assert [float(source[i]["mask"]) for i in range(2)] == [0, 1] and source.bad[0][0] == broken


def test_records_that_are_not_complete_or_damaged_are_refused(tmp_path):
  dataset = prepared(fabricate.make_ave(tmp_path / "raw" / "AVE"), tmp_path / "out", "ave")
  record, folder = dataset.records("train")[0], dataset.prepared.folder
  shard = folder / "ave-train.array_record-00000-of-00001"
  content = shard.read_bytes()
  shard.write_bytes(content[:-100])
  with pytest.raises(MediaError, match=r"00000-of-00001: is cut off: \d+ bytes of \d+; .*prepare"):
    DATASETS["ave"](tmp_path / "out").decode(record, MEDIA)
  shard.write_bytes(content[:2000] + bytes(2000) + content[4000:])
  with pytest.raises(MediaError, match=rf"clip '{record.clip}' cannot be read") as caught:
    DATASETS["ave"](tmp_path / "out").decode(record, MEDIA)
  assert "\n" not in str(caught.value)
  (folder / "manifest.json").write_text("{")
  with pytest.raises(DataError, match=r"manifest\.json: is damaged"):
    DATASETS["ave"](tmp_path / "out").decode(record, MEDIA)
  (folder / "manifest.json").unlink()
  with pytest.raises(DataError, match=r"is not complete; run the same data_pipelines\.prepare again"):
    DATASETS["ave"](tmp_path / "out").coverage("train")


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"settings": {}, "shards": [], "left_out": []}', '{"settings": 1}'])
def test_a_manifest_that_is_none_is_one_clear_line(tmp_path, content):
  (tmp_path / records.MANIFEST).write_text(content)
  with pytest.raises(
    DataError, match=r"manifest\.json: is damaged \(.*\); delete it and run data_pipelines\.prepare"
  ) as caught:
    PreparedStore(tmp_path, spread=False)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spread", [True, False])
def test_seconds_of_a_longer_clip_do_not_ring_into_each_other(tmp_path, spread):
  """Resampled as one wave a loud second would be heard at the end of the silent one before it, which was not its neighbour."""
  manifest = {"settings": {"sample_rate_hz": 8000, "labels": {}}, "shards": [], "left_out": []}
  (tmp_path / records.MANIFEST).write_text(json.dumps(manifest))
  loud = np.full(8000, 20000, np.int16)
  samples = np.concatenate([0 * loud, loud, 0 * loud])
  found = PreparedStore(tmp_path, spread=spread)._audio(samples, Media(16, 16000))
  assert found.shape == (3, 16000) and found[1].max() > 19000
  assert bool(found[0].any()) == bool(found[2].any()) == (not spread)


def test_benchmark_says_what_it_measured(pair, capsys):
  raw, again = pair("ave", "official")
  pack, _ = pair("ave", "dg_sct")
  for dataset, kind in ((raw, "mp4"), (pack, "pictures"), (again, "ArrayRecord")):
    assert bench.main([f"--root={dataset.root}", "--clips=3", "--image_size=16", "--sample_rate_hz=16000"]) == 0
    for line in capsys.readouterr().out.splitlines():
      name, threads, _, rate, _, per_core, *_ = line.split()
      assert name == kind and float(rate) == pytest.approx(int(threads) * float(per_core), rel=0.01, abs=0.1 * int(threads))
  assert bench.main([f"--root={raw.root}", "--clips=1"]) == 2 and "--clips 2 or more" in capsys.readouterr().err
  assert bench.main(["--dataset=avee"]) == 2 and "music_avqa" in capsys.readouterr().err
