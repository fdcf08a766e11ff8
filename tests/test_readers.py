"""The readers: tiny folders in the benchmarks' own layouts, and wrong rows."""

import json
import pathlib
import shutil
import threading
import time

import fabricate
import numpy as np
import pytest
from PIL import Image

from data_pipelines import (
  AVE,
  DATASETS,
  LLP,
  QUESTION_TYPES,
  AVSBench,
  DataError,
  Media,
  MediaError,
  MusicAVQA,
)
from data_pipelines.base import ClipCache, Dataset

MEDIA = Media(image_size=16, sample_rate_hz=8000)
# key -> (dtype, shape) that every example of a dataset has beside visual, audio, id and mask.
LABELS = {
  "ave": {"label": ("int32", (10,))},
  "llp": {
    "label": ("float32", (25,)),
    "dense_audio": ("float32", (10, 25)),
    "dense_visual": ("float32", (10, 25)),
    "dense": ("float32", ()),
  },
  "avsbench": {"label": ("uint8", (5, 16, 16)), "label_mask": ("float32", (5,)), "class": ("int32", ())},
  "avsbench_ms3": {"label": ("uint8", (5, 16, 16)), "label_mask": ("float32", (5,))},
  "music_avqa": {"question": ("int32", (14,)), "label": ("int32", ()), "type": ("int32", ())},
  "tux21": {"label": ("int32", ())},
}
SECONDS = {"avsbench": 5, "avsbench_ms3": 5, "tux21": 1}  # T, of the others 10


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A data root with all benchmarks, each under its usual name."""
  root = tmp_path_factory.mktemp("data")
  for name, make in fabricate.MAKERS.items():
    make(root / DATASETS[name].folders[0])
  return root


@pytest.fixture(params=DATASETS)
def dataset(request: pytest.FixtureRequest, data_root: pathlib.Path) -> Dataset:
  return DATASETS[request.param](data_root)


def key_of(dataset: Dataset) -> str:
  return next(key for key, kind in DATASETS.items() if type(dataset) is kind)


# Every dataset of the table.


def test_examples_have_the_agreed_keys_types_and_shapes(dataset):
  seconds = SECONDS.get(key_of(dataset), 10)
  assert dataset.seconds == seconds
  expected = {
    "visual": ("uint8", (seconds, 16, 16, 3)),
    "audio": ("int16", (seconds, 16000 if key_of(dataset) == "tux21" else 8000)),  # two seconds of speech for one picture
    "mask": ("float32", ()),
    **LABELS[key_of(dataset)],
  }
  for split in dataset.splits():
    for record in dataset.records(split):
      example = dataset.decode(record, MEDIA)
      assert isinstance(example.pop("id"), str) and example["mask"] == 1
      assert {k: (str(v.dtype), v.shape) for k, v in example.items()} == expected
      assert example["visual"].any() and example["audio"].any()


@pytest.mark.parametrize("name", DATASETS)
def test_root_is_the_data_root_or_the_dataset_itself(data_root, name, tmp_path):
  inner = data_root / DATASETS[name].folders[0]
  assert DATASETS[name](inner).records("test") == DATASETS[name](data_root).records("test")
  with pytest.raises(DataError, match="dpkg-deb -x" if name == "tux21" else r"data_pipelines\.toybox") as caught:
    DATASETS[name](tmp_path / "nowhere")
  assert str(tmp_path / "nowhere") in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_split_names_those_present(dataset):
  with pytest.raises(DataError, match=r"no split 'trian'.*train, "):
    dataset.records("trian")


def test_source_is_random_access_cached_and_safe_for_threads(dataset):
  source = dataset.examples("train", MEDIA, cache=ClipCache())
  assert len(source) == len(source.ids) == len(dataset.records("train"))
  first = source[0]
  assert source[0]["visual"] is first["visual"]  # decoded once
  with pytest.raises(ValueError, match="read-only"):
    first["visual"][:] = 0
  found = {}
  read = lambda i: found.update({i: source[i % len(source)]})
  threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  for i, example in found.items():
    assert example["id"] == source.ids[i % len(source)]
    again = dataset.decode(source.records[i % len(source)], MEDIA)
    np.testing.assert_array_equal(example["visual"], again["visual"])


def test_coverage_counts_clips_and_names_missing_ones(dataset, tmp_path):
  split = dataset.splits()[0]
  clips = list(dict.fromkeys(record.clip for record in dataset.records(split)))
  rest = {"silent": []} if key_of(dataset) == "tux21" else {}
  assert dataset.coverage(split) == {"clips": len(clips), "missing": [], **rest}
  copy = type(dataset)(shutil.copytree(dataset.root, tmp_path / "copy"))
  for path in copy.clip_files(copy.records(split)[0]):
    path.unlink() if path.is_file() else shutil.rmtree(path)
  assert copy.coverage(split) == {"clips": len(clips), "missing": clips[:1], **rest}


def test_bad_clips_stop_or_are_left_out(dataset, tmp_path):
  copy = type(dataset)(shutil.copytree(dataset.root, tmp_path / "copy"))
  record = copy.records("train")[0]
  for path in copy.clip_files(record):
    path.unlink() if path.is_file() else shutil.rmtree(path)
  with pytest.raises(MediaError, match=record.clip):
    copy.examples("train", MEDIA)[0]
  source = copy.examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache())
  example = source[0]
  whole = dataset.decode(dataset.records("train")[0], MEDIA)
  assert source[0].keys() == example.keys() == whole.keys() and example["id"] == record.id
  for key in whole.keys() - {"id"}:
    assert not example[key].any() and example[key].dtype == whole[key].dtype
    assert example[key].shape == whole[key].shape
  assert [name for name, _ in source.bad] == [record.id] and record.clip in source.bad[0][1]
  with pytest.raises(DataError, match="on_bad_clip"):
    copy.examples("train", MEDIA, on_bad_clip="ignore")


def test_cache_makes_an_entry_once_for_many_threads():
  cache, made, start = ClipCache(), [], threading.Barrier(8)

  def ask() -> None:
    start.wait()
    cache.fetch("clip", lambda: made.append(1) or time.sleep(0.05) or {"x": np.zeros(3)})

  threads = [threading.Thread(target=ask) for _ in range(8)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert len(made) == 1


def test_cache_stays_within_its_bytes():
  cache = ClipCache(1000)
  for i in range(100):
    cache.put(i, {"x": np.zeros(300, np.uint8)})
    assert cache.num_bytes <= 1000 and cache.get(i) is not None
  assert sum(cache.get(i) is not None for i in range(100)) == 3
  cache.put("large", {"x": np.zeros(1001, np.uint8)})
  assert cache.get("large") is None and cache.num_bytes == 900


# AVE.


@pytest.mark.parametrize("media", ["", "video", "AVE"])
@pytest.mark.parametrize("header", [True, False])
def test_ave_labels_each_second(tmp_path, header, media):
  dataset = AVE(fabricate.make_ave(tmp_path / "AVE", header=header, media=media))
  assert dataset.splits() == ("train", "test", "unseen") and len(dataset.classes) == 28
  assert [r.clip for r in dataset.annotations()] == list(fabricate.CLIP_IDS)
  labels = [dataset.labels(record)["label"].tolist() for record in dataset.annotations()]
  assert labels == [[28] * 6 + [0] * 2 + [28] * 2, [1] * 10, [28] * 10]
  assert dataset.coverage("train")["missing"] == []


def test_ave_reads_frames_and_waves_of_dg_sct(tmp_path):
  root = fabricate.make_ave(tmp_path / "AVE")
  (root / f"{fabricate.CLIP_IDS[0]}.mp4").unlink()
  fabricate.write_frames(root / "frames" / fabricate.CLIP_IDS[0], 10)
  assert AVE(root).coverage("train")["missing"] == [fabricate.CLIP_IDS[0]]  # sound is missing still
  (root / "wave").mkdir()
  np.save(root / "wave" / f"{fabricate.CLIP_IDS[0]}.npy", fabricate.tones(10, 32000))
  example = AVE(root).examples("train", MEDIA)[0]
  np.testing.assert_allclose(example["visual"][:, 8, 8, 0], 10 * np.arange(1, 11), atol=2)
  assert example["audio"].shape == (10, 8000) and example["audio"][9].any()


def test_ave_own_categories_decide_the_indices(tmp_path):
  root = fabricate.make_ave(tmp_path / "AVE")
  (root / "categories.txt").write_text("Mandolin\nMale speech, man speaking\n\nChurch bell\n")
  dataset = AVE(root)
  assert dataset.classes == ("Mandolin", "Male speech, man speaking", "Church bell")
  assert dataset.labels(dataset.records("train")[0])["label"].tolist() == [3] * 6 + [2] * 2 + [3] * 2
  (root / "categories.txt").write_text("Mandolin\nChurch bell\n")
  with pytest.raises(DataError, match=r"trainSet\.txt:2: unknown category 'Male speech, man speaking'"):
    AVE(root).records("train")
  (root / "categories.txt").write_text("Mandolin\nMandolin\n")
  with pytest.raises(DataError, match=r"categories\.txt"):
    AVE(root)


@pytest.mark.parametrize("row", ["Church bell,aaaaaaaaaaa,good,0,10", "Church bell&aaaaaaaaaaa&good&0&ten"])
def test_ave_damaged_rows_are_named(tmp_path, row):
  root = fabricate.make_ave(tmp_path / "AVE")
  (root / "testSet.txt").write_text(row)
  with pytest.raises(DataError, match=r"testSet\.txt:1: expected Category&VideoID"):
    AVE(root).records("test")


# LLP.


def test_llp_weak_and_dense_labels(data_root):
  dataset = LLP(data_root)
  assert dataset.splits() == ("train", "test")
  (train,) = (dataset.labels(record) for record in dataset.records("train"))
  assert np.flatnonzero(train["label"]).tolist() == [0, 3]
  assert train["dense"] == 0 and not train["dense_audio"].any()
  first, second = (dataset.labels(record) for record in dataset.records("test"))
  assert np.flatnonzero(first["label"]).tolist() == [0, 24]  # listed twice counts once
  # The repeated, reversed, empty and mistyped rows of the fabricated file add nothing.
  assert np.argwhere(first["dense_audio"]).tolist() == [[0, 0], [1, 0], [2, 0]]
  assert np.argwhere(first["dense_visual"]).tolist() == [[t, 24] for t in range(2, 10)]
  assert second["dense"] == 1 and not second["dense_audio"].any()  # evaluated, and nothing is heard


@pytest.mark.parametrize(
  ("labels", "media"), [("data", "video"), ("", "LLP_dataset/video"), ("LLP_dataset/labels", "LLP_dataset/video")]
)
def test_llp_in_other_folders(tmp_path, labels, media):
  official = fabricate.make_llp(tmp_path / "official")
  root = tmp_path / "AVVP"
  shutil.copytree(official / "video", root / media)
  (root / labels).mkdir(parents=True, exist_ok=True)
  for path in official.glob("*.csv"):
    shutil.copy(path, root / labels)
  dataset = LLP(tmp_path)
  assert dataset.coverage("test") == {"clips": 2, "missing": []}
  assert dataset.labels(dataset.records("test")[0])["dense_audio"].any()


def test_llp_wrong_rows_are_named(tmp_path):
  root = fabricate.make_llp(tmp_path / "LLP")
  (root / "AVVP_train.csv").write_text("filename\tevent_labels\nabc_0_10\tSpeech,Zebra\n")
  with pytest.raises(DataError, match=r"AVVP_train\.csv:2: unknown category 'Zebra'"):
    LLP(root).records("train")
  (root / "AVVP_train.csv").write_text("filename,event_labels\nabc_0_10,Speech\n")
  with pytest.raises(DataError, match="tab-separated"):
    LLP(root).records("train")
  (root / "AVVP_eval_audio.csv").write_text("filename\tonset\toffset\tevent_labels\na_0_10\t0\tend\tCar\n")
  with pytest.raises(DataError, match=r"AVVP_eval_audio\.csv:2: onset and offset"):
    LLP(root).records("test")


# AVSBench.


@pytest.mark.parametrize("meta", ["Single-source", "Single-source/s4_data"])
def test_avsbench_masks_train_has_only_the_first(tmp_path, meta):
  dataset = AVSBench(fabricate.make_avsbench(tmp_path / "AVSBench_data", meta=meta))
  assert dataset.splits() == ("train", "val", "test") and len(dataset.classes) == 23
  truth = np.zeros((16, 16), np.uint8)
  truth[:, :8] = 1
  train, val, test = (dataset.examples(split, MEDIA)[0] for split in dataset.splits())
  assert train["label_mask"].tolist() == [1, 0, 0, 0, 0] and test["label_mask"].tolist() == [1] * 5
  np.testing.assert_array_equal(train["label"], truth * train["label_mask"].astype(np.uint8)[:, None, None])
  for labelled in (val, test):
    assert labelled["label_mask"].tolist() == [1] * 5
    np.testing.assert_array_equal(labelled["label"], np.stack([truth] * 5))
  assert dataset.classes[train["class"]] == "dog_barking"
  np.testing.assert_allclose(test["visual"][:, 8, 8, 0], [10, 20, 30, 40, 50], atol=2)


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ('"x,0,dog_barking,train', None),
    ("x" * 200_000, "expected 4 fields"),
    (f"x,0,{'y' * 200_000},test", "unknown category 'yy"),
  ],
)
def test_avsbench_stray_quotes_and_huge_fields(tmp_path, line, words):
  root = fabricate.make_avsbench(tmp_path / "AVSBench")
  table = root / "Single-source/s4_meta_data.csv"
  table.write_text(f"{table.read_text()}{line}\nnext,0,dog_barking,train\n")
  if words is None:
    assert [r.clip for r in AVSBench(root).records("train")] == ["train_clip_0", '"x', "next"]
  else:
    with pytest.raises(DataError, match=rf"s4_meta_data\.csv:5: {words}") as caught:
      AVSBench(root)
    assert len(str(caught.value)) < 700


def test_llp_huge_fields(tmp_path):
  root = fabricate.make_llp(tmp_path / "LLP")
  table = root / "AVVP_train.csv"
  table.write_text(table.read_text() + "x" * 200_000 + "\n")
  with pytest.raises(DataError, match=r"AVVP_train\.csv:3: expected 2 tab-separated fields, got 1"):
    LLP(root).records("train")


@pytest.mark.parametrize("end", ["9" * 5000, "\u00b2", "-1", ""])
def test_seconds_that_no_clip_has(tmp_path, end):
  (tmp_path / "trainSet.txt").write_text(f"Bark&aaaaaaaaaaa&good&0&{end}\n")
  with pytest.raises(DataError, match=r"trainSet\.txt:1: expected Category&VideoID"):
    AVE(tmp_path).records("train")
  llp = fabricate.make_llp(tmp_path / "LLP")
  name = f"{fabricate.CLIP_IDS[1]}_10_20"
  (llp / "AVVP_eval_audio.csv").write_text(f"filename\tonset\toffset\tevent_labels\n{name}\t0\t{end}\tSpeech\n")
  with pytest.raises(DataError, match="onset and offset must be whole seconds"):
    LLP(llp).records("test")


def test_avsbench_broken_or_missing_parts_are_named(tmp_path):
  root = fabricate.make_avsbench(tmp_path / "AVSBench")
  masks = root / "Single-source/s4_data/gt_masks/test/dog_barking/test_clip_0"
  (masks / "test_clip_0_4.png").unlink()
  with pytest.raises(MediaError, match=r"test_clip_0_4\.png: no such file"):
    AVSBench(root).examples("test", MEDIA, cache=ClipCache())[0]
  Image.new("L", (8, 8)).save(masks / "test_clip_0_4.png")
  assert not AVSBench(root).examples("test", MEDIA, cache=ClipCache())[0]["label"][3].any()
  with (root / "Single-source/s4_meta_data.csv").open("a") as file:
    file.write("x,0,zebra,train\n")
  with pytest.raises(DataError, match=r"s4_meta_data\.csv:5: unknown category 'zebra'"):
    AVSBench(root)


# MUSIC-AVQA.


def test_music_avqa_questions_answers_and_types(data_root):
  dataset = MusicAVQA(data_root)
  words, answers = dataset.vocabulary["words"], dataset.vocabulary["answers"]
  assert len(words) == 93 and len(answers) == 42 == len(dataset.classes) and words[0] == "<pad>"
  labels = [dataset.labels(record) for record in dataset.records("train")]
  said = [" ".join(words[i] for i in example["question"] if i) for example in labels]
  assert said == [
    "How many musical instruments were heard throughout the video",
    "Is the violin in the video always playing",
    "How many sounding guzheng in the video",
  ]
  assert [answers[example["label"]] for example in labels] == ["one", "no", "more than ten"]
  assert [QUESTION_TYPES[example["type"]] for example in labels] == [
    ("Audio", "Counting"),
    ("Audio-Visual", "Existential"),
    ("Audio-Visual", "Counting"),
  ]
  assert (labels[0]["question"][9:] == 0).all()


def test_music_avqa_shows_the_whole_minute_and_decodes_a_clip_once(data_root):
  dataset = MusicAVQA(data_root)
  source = dataset.examples("train", MEDIA, cache=ClipCache())
  example = source[0]
  seconds = np.linspace(0, 29, 10).astype(int)
  np.testing.assert_allclose(example["visual"][:, 8, 8, 0], fabricate.levels(30)[seconds], atol=6)
  assert source[1]["visual"] is example["visual"]  # another question about the same clip


def test_music_avqa_own_vocabulary(tmp_path):
  root = fabricate.make_music_avqa(tmp_path / "MUSIC-AVQA")
  own = {"words": ["<pad>", "Is", "it", "loud"], "answers": ["no", "yes"]}
  (root / "vocabulary.json").write_text(json.dumps(own))
  row = fabricate.question("00000001", 1, ("Visual", "Location"), "Is it loud?", [], "yes")
  (root / "avqa-test.json").write_text(json.dumps([row]))
  dataset = MusicAVQA(root)
  assert dataset.labels(dataset.records("test")[0])["question"].tolist() == [1, 2, 3] + [0] * 11
  assert dataset.classes == ("no", "yes")
  with pytest.raises(DataError, match=r"avqa-train\.json: question 1 \(question_id 1\): answer 'one'"):
    dataset.records("train")
  with pytest.raises(DataError, match="word 'quiet'"):
    dataset.tokens(["Is", "it", "quiet"])
  for wrong in ([["no"]], [1], "no", []):
    (root / "vocabulary.json").write_text(json.dumps({"words": ["<pad>"], "answers": wrong}))
    with pytest.raises(DataError, match=r"vocabulary\.json: expected"):
      MusicAVQA(root)
  (root / "vocabulary.json").write_text(json.dumps({"words": ["Is"], "answers": ["no"]}))
  with pytest.raises(DataError, match="<pad>"):
    MusicAVQA(root)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"question_content": "Is the zither in the video always playing?"}, "word 'zither'"),
    ({"question_content": "Is the in the video always playing?", "templ_values": '["violin"]'}, "0 slots"),
    ({"question_content": " ".join(["the"] * 15)}, "15 words"),
    ({"anser": "maybe"}, "answer 'maybe'"),
    ({"type": '["Audio", "Smell"]'}, "unknown question type"),
    ({"type": "__import__('os').getcwd()"}, "is not a list"),
    ({"type": '[["a"],"b"]'}, "is not a list of names"),
    ({"type": None}, "None is not a list of names"),
    ({"anser": ["one"]}, r"anser must be text, got \['one'\]"),
    ({"anser": None}, "anser must be text"),
    ({"question_content": None}, "question_content must be text, got None"),
    ({"templ_values": "[1]"}, "is not a list of names"),
    ({"templ_values": "[" * 100_000}, "is not a list of names"),
    ({"video_id": None}, "video_id must be text or a number"),
  ],
)
def test_music_avqa_wrong_rows_are_one_line(tmp_path, change, words):
  root = tmp_path / "MUSIC-AVQA"
  root.mkdir()
  row = fabricate.question("00000001", 7, ("Audio", "Counting"), "How many?", [], "one")
  (root / "avqa-train.json").write_text(json.dumps([row | change]))
  with pytest.raises(DataError, match=words) as caught:
    MusicAVQA(root).records("train")
  assert "question_id 7" in str(caught.value) and "\n" not in str(caught.value)


def test_music_avqa_reads_python_lists_too(tmp_path):
  row = fabricate.question("1", 7, ("Audio", "Counting"), "Is the <Object> in the video?", [], "one")
  row |= {"type": "['Audio', 'Counting']", "templ_values": "['violin']"}
  (tmp_path / "avqa-train.json").write_text(json.dumps([row]))
  assert MusicAVQA(tmp_path).records("train")[0].text == "Is the violin in the video?"


def test_files_that_are_no_text_or_json_are_named(tmp_path):
  for text in ("[{", "[" * 100_000):
    (tmp_path / "avqa-train.json").write_text(text)
    with pytest.raises(DataError, match=r"avqa-train\.json: cannot be read as JSON"):
      MusicAVQA(tmp_path).records("train")
  (tmp_path / "trainSet.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(DataError, match=r"trainSet\.txt: cannot be read as UTF-8"):
    AVE(tmp_path).records("train")
