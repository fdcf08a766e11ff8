"""Small clean data roots with class lists of their own, and the ways in which files of a benchmark get damaged."""

import json
import pathlib

import fabricate
import numpy as np

from data_pipelines import music_avqa

AVE_ROWS = {
  "train": ("Bark&aaaaaaaaaaa&good&6&8", "Cat&-bbbbbbbbb_&good&0&10"),
  "test": ("Cat&ccccccccccc&good&2&9",),
}
LLP_NAMES = tuple(f"{clip}_{10 * i}_{10 * i + 10}" for i, clip in enumerate(fabricate.CLIP_IDS))
S4_DATA = pathlib.Path("AVSBench/Single-source/s4_data")


def write_ave_rows(root: pathlib.Path, rows: dict[str, tuple[str, ...]]) -> None:
  """The Set files and Annotations.txt."""
  for split, lines in rows.items():
    (root / f"{split}Set.txt").write_text("".join(f"{line}\n" for line in lines))
  (root / "Annotations.txt").write_text("".join(f"{line}\n" for lines in rows.values() for line in lines))


def clean_ave(root: pathlib.Path) -> None:
  """Two clips in train, one in test; two classes."""
  fabricate.make_ave(root / "AVE", media="video")
  (root / "AVE/unseenSet.txt").unlink()
  (root / "AVE/categories.txt").write_text("Bark\nCat\n")
  write_ave_rows(root / "AVE", AVE_ROWS)


def clean_llp(root: pathlib.Path) -> None:
  """One clip in train, two in test; three classes."""
  folder = fabricate.make_llp(root / "LLP")
  (folder / "categories.txt").write_text("Speech\nDog\nCar\n")
  (folder / "AVVP_train.csv").write_text(f"filename\tevent_labels\n{LLP_NAMES[0]}\tSpeech,Dog,Car\n")
  (folder / "AVVP_test_pd.csv").write_text(f"filename\tevent_labels\n{LLP_NAMES[1]}\tSpeech\n{LLP_NAMES[2]}\tCar\n")
  head = "filename\tonset\toffset\tevent_labels\n"
  (folder / "AVVP_eval_audio.csv").write_text(f"{head}{LLP_NAMES[1]}\t0\t3\tSpeech\n{LLP_NAMES[2]}\t1\t2\tCar\n")
  (folder / "AVVP_eval_visual.csv").write_text(f"{head}{LLP_NAMES[2]}\t2\t10\tCar\n")


def clean_avsbench(root: pathlib.Path) -> None:
  """One clip a split, one class."""
  fabricate.make_avsbench(root / "AVSBench")
  (root / "AVSBench/categories.txt").write_text("dog_barking\n")


def clean_ms3(root: pathlib.Path) -> None:
  """One clip a split; what sounds has no class, a list of classes only says that these labels are not the official ones."""
  fabricate.make_ms3(root / "AVSBench")
  (root / "AVSBench/categories.txt").write_text("dog_barking\n")


def clean_music_avqa(root: pathlib.Path) -> None:
  """Three questions on two clips in train, one in test; clips of 30 s."""
  folder = fabricate.make_music_avqa(root / "MUSIC-AVQA")
  own = {"words": list(music_avqa.WORDS), "answers": sorted(music_avqa.ANSWERS)}
  (folder / "vocabulary.json").write_text(json.dumps(own))


CLEAN = {
  "ave": clean_ave,
  "llp": clean_llp,
  "avsbench": clean_avsbench,
  "avsbench_ms3": clean_ms3,
  "music_avqa": clean_music_avqa,
}


def cut(path: pathlib.Path, share: float = 0.5) -> None:
  """Keeps the first part of a file."""
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])


def to_frames(root: pathlib.Path, clip: str, *, frames: int = 10, samples: int = 320_000) -> None:
  """An AVE clip as a folder of frames and a wave, as DG-SCT packs it, instead of its mp4."""
  (root / f"AVE/video/{clip}.mp4").unlink()
  fabricate.write_frames(root / "AVE/frames" / clip, frames)
  (root / "AVE/wave").mkdir(exist_ok=True)
  np.save(root / f"AVE/wave/{clip}.npy", np.resize(fabricate.tones(10, 32000), samples))


def silence(root: pathlib.Path, split: str) -> None:
  """An AVSBench clip whose wav holds zeros but for one quiet sample."""
  samples = np.zeros(5 * 16000, np.int16)
  samples[100] = 20
  fabricate.write_wav(s4(root, "audio_wav", split).with_suffix(".wav"), samples, 16000)


def s4(root: pathlib.Path, kind: str, split: str) -> pathlib.Path:
  """The folder of the fabricated clip of a split (of its wav: without the ending)."""
  return root / S4_DATA / kind / split / "dog_barking" / f"{split}_clip_0"
