"""What is known of the published label files: counts, defects, MD5s, and where the files come from.

All numbers were counted in the published files, but for those of AVSBench, AVQA's train file and `json_update`, which
are stated by their authors.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from data_pipelines import ave, avsbench, llp, tuxpaint
from data_pipelines.schema import QUESTION_TYPES
from data_pipelines.tables import read_lines

# Splits without which a run can neither train nor tell what it learned.
NEEDED = ("train", "test")
_HEADERS = ("Category&VideoID", "filename\t")


@dataclasses.dataclass(frozen=True)
class SplitFacts:
  """One split of the published files; None or () where nobody has counted.

  Attributes:
    rows: annotation rows.
    clips: distinct clips among them.
    repeated_ids: rows whose id an earlier row of the split has.
    classes: rows per class, in the order of `Facts.class_names`.
    event_seconds: seconds of AVE that are no background.
    cells: positive cells of LLP's dense labels: audio, visual, both at once.
    variant: which of several published versions this is, "" for the usual one.
  """

  rows: int
  clips: int | None = None
  repeated_ids: int | None = None
  classes: tuple[int, ...] = ()
  event_seconds: int | None = None
  cells: tuple[int, int, int] | None = None
  variant: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
  """One benchmark as published.

  Attributes:
    title: its name.
    splits: split -> its versions, the usual one first.
    class_names: what coverage is counted by; () if the benchmark has no classes.
    all_clips: distinct clips of all splits.
    leaks: (split, split) -> clips that stand in both; pairs that are not named share none.
    leaks_by_design: the splits share clips on purpose.
    defects: name -> how often a defect of the published files occurs, see `checks.labels`.
    labels: names of the label files; several names of one entry stand for each other.
    optional: names of label files that help but can be spared.
    media: what the media look like, for who has none.
    unused: name of an entry in the folder -> why it is not read.
    duration_s: length of a clip, None where any will do; wave_samples: length of its `.npy`, at 32 kHz.
    unprepared: why data_pipelines.prepare is not needed, "" if it is.
    labels_from: where to fetch the label files; media_from: and the media.
  """

  title: str
  splits: Mapping[str, tuple[SplitFacts, ...]]
  class_names: tuple[str, ...]
  labels: tuple[tuple[str, ...], ...]
  media: str
  duration_s: float | None
  wave_samples: int
  labels_from: str
  media_from: str
  all_clips: int | None = None
  leaks: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)
  leaks_by_design: bool = False
  defects: Mapping[str, int] = dataclasses.field(default_factory=dict)
  optional: tuple[str, ...] = ()
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unprepared: str = ""


# fmt: off
_AVE_CLASSES = {
  "train": (152, 142, 137, 148, 152, 141, 144, 151, 138, 131, 146, 112, 82, 81, 150, 142, 128, 147, 80, 67, 57, 128, 48, 52,
            144, 89, 124, 126),
  "val": (18, 17, 17, 18, 18, 17, 17, 18, 17, 16, 18, 13, 10, 9, 18, 17, 16, 18, 10, 8, 6, 16, 6, 6, 18, 10, 15, 15),
  "test": (18, 17, 17, 18, 18, 17, 17, 18, 17, 16, 18, 13, 10, 9, 18, 17, 16, 18, 10, 8, 6, 16, 6, 6, 18, 10, 15, 15),
}
_LLP_CLASSES = {
  "train": (4988, 624, 528, 761, 192, 343, 455, 218, 299, 602, 186, 1172, 437, 1457, 495, 146, 445, 224, 411, 587, 503, 99, 430,
            291, 164),
  "val": (365, 43, 46, 59, 21, 18, 35, 12, 18, 33, 14, 84, 34, 73, 41, 12, 29, 16, 22, 35, 51, 8, 34, 22, 45),
  "test": (625, 91, 86, 110, 36, 47, 46, 24, 27, 89, 31, 181, 64, 159, 58, 20, 52, 28, 60, 68, 104, 11, 43, 34, 84),
}
# fmt: on
_FOLLOWS = "not needed: follows from the text files"
_FEATURES = "not used: features, the encoders read the media"

AVE = Facts(
  title="AVE",
  splits={
    "train": (SplitFacts(3339, 3312, 27, _AVE_CLASSES["train"], event_seconds=27759),),
    "val": (SplitFacts(402, 401, 1, _AVE_CLASSES["val"], event_seconds=3288),),
    "test": (SplitFacts(402, 402, 0, _AVE_CLASSES["test"], event_seconds=3305),),
  },
  class_names=ave.CATEGORIES,
  labels=(("trainSet.txt", "train_order.h5"), ("valSet.txt", "val_order.h5"), ("testSet.txt", "test_order.h5")),
  optional=("Annotations.txt", "Annotations_with_domain.txt", "categories.txt", "unseenSet.txt", "unseen_order.h5"),
  media="video/<id>.mp4, or frames/<id>/00000001.jpg with wave/<id>.npy",
  duration_s=10,
  wave_samples=320_000,
  labels_from="AVE_Dataset.zip, linked in the README of github.com/YapengTian/AVE-ECCV18, holds the Set files",
  media_from="AVE_Dataset.zip, linked in the README of github.com/YapengTian/AVE-ECCV18, holds the 4097 videos",
  all_clips=4097,
  leaks={("train", "val"): 10, ("train", "test"): 8},
  defects={"empty spans": 1},
  unused={
    "labels.h5": _FOLLOWS,
    "mil_labels.h5": _FOLLOWS,
    "labels_closs.h5": _FOLLOWS,
    "audio_feature.h5": _FEATURES,
    "visual_feature.h5": _FEATURES,
    "ReadMe.txt": "not used",
  },
)

LLP = Facts(
  title="LLP",
  splits={
    "train": (SplitFacts(10000, 10000, 0, _LLP_CLASSES["train"]),),
    "val": (SplitFacts(649, 649, 0, _LLP_CLASSES["val"], cells=(8089, 6115, 5078)),),
    "test": (SplitFacts(1200, 1200, 0, _LLP_CLASSES["test"], cells=(14576, 11789, 9592)),),
  },
  class_names=llp.CATEGORIES,
  labels=(
    ("AVVP_train.csv",),
    ("AVVP_val_pd.csv", "AVVP_val.csv"),
    ("AVVP_test_pd.csv", "AVVP_test.csv"),
    ("AVVP_eval_audio.csv",),
    ("AVVP_eval_visual.csv",),
  ),
  optional=("AVVP_dataset_full.csv", "AVVP_unseen_pd.csv", "categories.txt"),
  media="video/<id>.mp4, or frames/<id>/00000001.jpg with wave/<id>.npy; <id> is the 11 characters before the times",
  duration_s=10,
  wave_samples=320_000,
  labels_from="data/ of github.com/YapengTian/AVVP-ECCV20 holds the csv files",
  media_from="the videos are not published: download them by their YouTube ids and cut out the ten seconds of the file name",
  all_clips=11849,
  defects={
    "audio: empty spans": 5,
    "audio: reversed spans": 1,
    "audio: repeated rows": 8,
    "audio: ids of no split": 8,
    "visual: ids of no split": 7,
    "val: weak labels differ": 30,
    "test: weak labels differ": 51,
    "test: labels listed twice": 1,
  },
  unused={"AVVP_eval_audio_corrupted_copy.csv": "not used", "feats": _FEATURES},
)

AVSBENCH = Facts(
  title="AVSBench S4",
  splits={"train": (SplitFacts(3452, 3452, 0),), "val": (SplitFacts(740, 740, 0),), "test": (SplitFacts(740, 740, 0),)},
  class_names=avsbench.CATEGORIES,
  labels=(("s4_meta_data.csv",),),
  optional=("categories.txt",),
  media="s4_data/{visual_frames,gt_masks}/<split>/<category>/<name>/ and s4_data/audio_wav/<split>/<category>/<name>.wav",
  duration_s=5,
  wave_samples=160_000,
  labels_from="the AVSBench pack (asked for at avlbench.opennlplab.cn) holds s4_meta_data.csv in Single-source/",
  media_from="the AVSBench pack (asked for at avlbench.opennlplab.cn) holds s4_data/ in Single-source/",
  all_clips=4932,
  unused={
    "audio_log_mel": "not used: pickled spectrograms, never opened",
    "raw_videos": "not used: the frames and waves are",
    "Multi-sources": "of the dataset avsbench_ms3",
  },
)

AVSBENCH_MS3 = dataclasses.replace(
  AVSBENCH,
  title="AVSBench MS3",
  splits={"train": (SplitFacts(296, 296, 0),), "val": (SplitFacts(64, 64, 0),), "test": (SplitFacts(64, 64, 0),)},
  class_names=(),
  labels=(("ms3_meta_data.csv",),),
  media="ms3_data/visual_frames/<id>/, ms3_data/gt_masks/<split>/<id>/ and ms3_data/audio_wav/<split>/<id>.wav",
  labels_from="the AVSBench pack (asked for at avlbench.opennlplab.cn) holds ms3_meta_data.csv in Multi-sources/",
  media_from="the AVSBench pack (asked for at avlbench.opennlplab.cn) holds ms3_data/ in Multi-sources/",
  all_clips=424,
  unused={**AVSBENCH.unused, "Single-source": "of the dataset avsbench"},
)

MUSIC_AVQA = Facts(
  title="MUSIC-AVQA",
  splits={
    "train": (SplitFacts(32087),),
    "val": (SplitFacts(4595, 3815, 27), SplitFacts(4568, repeated_ids=0, variant="json_update")),
    "test": (
      SplitFacts(9185, 6399, 55, (1022, 601, 1199, 1228, 995, 1274, 927, 1115, 824)),
      SplitFacts(9129, None, 0, (1017, 594, 1197, 1225, 988, 1265, 920, 1101, 822), variant="json_update"),
    ),
  },
  class_names=tuple(" ".join(kind) for kind in QUESTION_TYPES),
  labels=(("avqa-train.json",), ("avqa-val.json",), ("avqa-test.json",)),
  optional=("vocabulary.json", "avqa-unseen.json"),
  media="video/<video_id>.mp4, or frames/<video_id>/00000001.jpg with wave/<video_id>.npy",
  duration_s=60,
  wave_samples=320_000,
  labels_from="data/json of github.com/GeWu-Lab/MUSIC-AVQA holds the json files",
  media_from="the videos are linked in the README of github.com/GeWu-Lab/MUSIC-AVQA",
  leaks_by_design=True,
  unused={"ques_vocab.txt": "not needed: the words are built in", "ans_vocab.txt": "not needed: the answers are built in"},
)

_STAMPS_FROM = f"get the stamps, then name DIR as --root: {tuxpaint.GET} DIR"
TUX21 = Facts(
  title="Tux-21",
  splits={"train": (SplitFacts(265, 265, 0),), "test": (SplitFacts(97, 97, 0),)},  # of seed 0
  class_names=(),  # its classes are its folders: see `checks.stamps`
  labels=(),
  media="<class>/<name>.png, beside it <name>.txt and <name>_desc_<language>.ogg",
  duration_s=None,
  wave_samples=0,
  labels_from=_STAMPS_FROM,
  media_from=_STAMPS_FROM,
  unused={"symbols": "not used: letters, digits and signs are left out"},
  unprepared="its pictures and sounds are few and small, train on them as they are",
)

# Dataset of data_pipelines.DATASETS -> what is known of it.
FACTS: dict[str, Facts] = {
  "ave": AVE,
  "llp": LLP,
  "avsbench": AVSBENCH,
  "avsbench_ms3": AVSBENCH_MS3,
  "music_avqa": MUSIC_AVQA,
  "tux21": TUX21,
}


@dataclasses.dataclass(frozen=True)
class LabelFile:
  """A label file whose bytes are known: its usual name, which version it is, and what is wrong with it, if anything."""

  name: str
  what: str = "official file"
  damage: str = ""
  mend: str = ""


_CORRUPTED = LabelFile(
  "AVVP_eval_audio.csv",
  "known corrupted copy (DG-SCT, AVMoE, CPSP)",
  "the names of 3 rows are overwritten, which costs 8 positive audio cells of test (14576 -> 14568)",
  "take AVVP_eval_audio.csv from data/ of github.com/YapengTian/AVVP-ECCV20 (MD5 98d8ce2369078d43aa1df26d3ef2894c)",
)
# MD5 of a whole file -> what it is.
FILES: dict[str, LabelFile] = {
  "c571fd18b79af7f24e34994e090f8524": LabelFile("Annotations.txt", "official file, variant with header"),
  "7c454922c93b96afe888ae78c7b21fd5": LabelFile("Annotations.txt", "official file, variant without header"),
  "1b55f08187a8cf8780b07d719c86fc13": LabelFile("Annotations.txt", "official file, variant without header and last line end"),
  "2dc3221d31326f676da757e1be1a96b5": LabelFile("trainSet.txt"),
  "2cfcd1b8c604563206837d0ffff02598": LabelFile("valSet.txt"),
  "a3284e782bfe2f700f5b7f584616b58b": LabelFile("testSet.txt"),
  "613565677c76038076aad2843a64e6ce": LabelFile("train_order.h5"),
  "4d078a69038de21f9550cd0f69686d93": LabelFile("val_order.h5"),
  "686b9f5bcbddc9c299f03ee62ff889eb": LabelFile("test_order.h5"),
  "401768337aaaca802fe7486cba444feb": LabelFile("mil_labels.h5"),
  "aab838192bf080dc7464af787b919da5": LabelFile("labels_closs.h5"),
  "cd4b91d7f9427fa6cfe0b251c4b371a9": LabelFile("categories.txt", "official list, as DG-SCT has it"),
  "214b996efd41f3dfa08ed49426c85969": LabelFile("AVVP_dataset_full.csv"),
  "cefac8ac8de324ca2018c11871928f8c": LabelFile("AVVP_train.csv"),
  "fa1465a99f73ab42a510b6f67b682fd7": LabelFile("AVVP_val_pd.csv"),
  "119973bc9535a425c49b517f73aaf3b4": LabelFile("AVVP_test_pd.csv"),
  "3d25e5a6033e2ef7c7e391cfbfdc01f9": LabelFile("AVVP_eval_visual.csv"),
  "98d8ce2369078d43aa1df26d3ef2894c": LabelFile("AVVP_eval_audio.csv"),
  "a8b6b747e59a4ea2501e51cd717f3b4f": _CORRUPTED,
  "8dfe6ac9b22b62bd99108921e0c209b0": LabelFile("avqa-val.json"),
  "676be4ba92c5aa8f6a990da6d9b7b0c2": LabelFile("avqa-test.json"),
  "66c5dfa2ebb5436dedcae53ba2dd2512": LabelFile("avqa-val.json", "official file of json_update"),
  "21f6406735cc893ea6cb1c6286b527e3": LabelFile("avqa-test.json", "official file of json_update"),
}
_SAME_ROWS = "official rows; only header or line ends differ"
# `rows_md5` of a text file -> what it is.
ROWS: dict[str, LabelFile] = {
  "1b55f08187a8cf8780b07d719c86fc13": LabelFile("Annotations.txt", _SAME_ROWS),
  "b9f8ced3daf83b2594e4246389ab9d15": LabelFile("trainSet.txt", _SAME_ROWS),
  "531297dd886eeb41eec8157af5d4d397": LabelFile("valSet.txt", _SAME_ROWS),
  "1baed2edd28b5a9bfbcd38016f43e685": LabelFile("testSet.txt", _SAME_ROWS),
  "6655e89e9f85b7825f060d58c4ac603a": LabelFile("categories.txt", "official list"),
  "998f4b50b5fb83f5b910430cb05087ab": LabelFile("AVVP_train.csv", _SAME_ROWS),
  "585bb259bab6dc1e31b1a81bce684884": LabelFile("AVVP_val_pd.csv", _SAME_ROWS),
  "3b7d07dd22423c3f0b82503f086c945c": LabelFile("AVVP_test_pd.csv", _SAME_ROWS),
  "c9ddb1c686c938d849171b1a9f15bad3": LabelFile("AVVP_eval_visual.csv", _SAME_ROWS),
  "a64d4771e78cc0902697e594579ffc2e": LabelFile("AVVP_eval_audio.csv", _SAME_ROWS),
  "2177a87d89bd03239d44e7c8de958fb6": _CORRUPTED,
}
# Names of label files of which no MD5 is published, so that nothing can be said about their bytes.
UNKNOWN_NAMES = frozenset(
  {"Annotations_with_domain.txt", "avqa-train.json", "s4_meta_data.csv", "ms3_meta_data.csv", "labels.h5"}
)


def rows_md5(path: Path) -> str:
  """MD5 of the rows of a text file without header, line ends and blanks around them."""
  rows = [line.strip() for line in read_lines(path)]
  rows = [row for row in rows if row and not row.startswith(_HEADERS)]
  return hashlib.md5("\n".join(rows).encode(), usedforsecurity=False).hexdigest()


def identify(path: Path) -> tuple[str, LabelFile | None]:
  """MD5 of a label file, and what it is; None: not known."""
  content = path.read_bytes()
  digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
  known = FILES.get(digest)
  if known is None and path.suffix in (".txt", ".csv"):
    known = ROWS.get(rows_md5(path))
  return digest, known
