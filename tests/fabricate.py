"""Tiny clips and dataset folders in the benchmarks' own layouts, made on the spot for the tests.

`MAKERS[dataset](folder)` makes the toybox's layout of a dataset; `LAYOUTS[dataset][layout](data_root)` every layout in which it
is distributed, with the same clips and labels, below the folder names that belong to it.

The clips of a benchmark differ: clip number n (0, 1, 2; `number` of its name) is n * `TINT` greener and n * `STEP_HZ` higher,
so that whoever reads the wrong one is found out.
"""

import functools
import json
import pathlib
import tempfile
import wave
from collections.abc import Callable

import av
import h5py
import numpy as np
from PIL import Image

CLIP_IDS = ("aaaaaaaaaaa", "-bbbbbbbbb_", "ccccccccccc")  # 11 characters, as YouTube's
MUSIC_CLIPS = ("00000001", "va000002")
SPLIT_MASKS = {"train": 1, "val": 5, "test": 5}  # of S4
TINT, LOWEST_HZ, STEP_HZ = 30, 250, 50


def number(name: str) -> int:
  """Which clip of its benchmark a name means; 0 for a name that no benchmark here has."""
  names = (CLIP_IDS, MUSIC_CLIPS, tuple(SPLIT_MASKS))  # a name of AVSBench begins with the split
  return next((i for known in names for i, start in enumerate(known) if name.startswith(start)), 0)


def levels(seconds: int) -> np.ndarray:
  """Red value of the frames of each second."""
  return 20 + (np.arange(seconds) * 22) % 220


def tones(seconds: int, rate_hz: int, clip: int = 0) -> np.ndarray:
  """float32 [seconds * rate]: 250 Hz and STEP_HZ more for each `clip`, twice as loud in odd seconds."""
  t = np.arange(seconds * rate_hz) / rate_hz
  return (0.2 * (1 + np.floor(t) % 2) * np.sin(2 * np.pi * (LOWEST_HZ + STEP_HZ * clip) * t)).astype(np.float32)


def write_mp4(path: pathlib.Path, **options: object) -> pathlib.Path:
  """A clip of `mp4_bytes`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(mp4_bytes(**options))
  return path


@functools.cache
def mp4_bytes(
  *,
  seconds: int = 10,
  size: int = 32,
  fps: int = 2,
  rate_hz: int = 16000,
  audio: bool = True,
  audio_from_s: int = 0,
  faststart: bool = False,
  clip: int = 0,
) -> bytes:
  """A clip whose second t is red of `levels`[t], with `tones` from audio_from_s on; encoded once, for many are equal."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
      video = container.add_stream("libx264", rate=fps)
      video.width, video.height, video.pix_fmt = size, size, "yuv420p"
      sound = container.add_stream("aac", rate=rate_hz, layout="mono") if audio else None
      for i in range(seconds * fps):
        image = np.full((size, size, 3), 128, np.uint8)
        image[..., 0], image[..., 1] = levels(seconds)[i // fps], 128 + TINT * clip
        container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
      container.mux(video.encode())
      if sound:
        samples = tones(seconds, rate_hz, clip)
        for start in range(audio_from_s * rate_hz, len(samples), 1024):
          frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
          frame.sample_rate, frame.pts = rate_hz, start
          container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path.read_bytes()


def write_wav(path: pathlib.Path, samples: np.ndarray, rate_hz: int) -> pathlib.Path:
  """int16 or uint8 samples [n] or [n, channels] -> wav file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with wave.open(str(path), "wb") as file:
    file.setparams((1 if samples.ndim == 1 else samples.shape[1], samples.itemsize, rate_hz, 0, "NONE", ""))
    file.writeframes(samples.tobytes())
  return path


def write_frames(
  folder: pathlib.Path, count: int, pattern: str = "{:08d}.jpg", *, grey: int = 10, clip: int = 0
) -> pathlib.Path:
  """`count` numbered frames, number k (from 1) of grey value `grey` * k, but for the tint of the clip."""
  folder.mkdir(parents=True, exist_ok=True)
  for k in range(1, count + 1):
    green = grey * k + TINT * clip
    green = green if green < 256 else grey * k - TINT * clip
    Image.new("RGB", (24, 16), (grey * k, green, grey * k)).save(folder / pattern.format(k))
  return folder


def write_lines(path: pathlib.Path, lines: list[str]) -> pathlib.Path:
  """A text file in a folder that is made if need be."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return path


def write_npy(path: pathlib.Path, samples: np.ndarray) -> pathlib.Path:
  """`<clip>.npy` as the packs keep sound."""
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, samples, allow_pickle=False)
  return path


def write_pack(folder: pathlib.Path, clips: list[str], frames: str, sound: str, *, digits: int = 8, count: int = 10) -> None:
  """Clips as DG-SCT and PHP keep them: `frames`/<clip>/00000001.jpg, and `sound`/<clip>.npy at 32 kHz."""
  for clip in clips:
    write_frames(folder / frames / clip, count, f"{{:0{digits}d}}.jpg", clip=number(clip))
    write_npy(folder / sound / f"{clip}.npy", tones(10, 32000, number(clip)))


def write_packed_sounds(path: pathlib.Path, names: list[str], clip: int = 0) -> pathlib.Path:
  """DG-SCT's AVS.npy: a pickled {"<name>.wav": samples}."""
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, np.array({f"{name}.wav": tones(5, 32000, clip) for name in names}, object), allow_pickle=True)
  return path


# -- AVE

AVE_HEADER = "Category&VideoID&Quality&StartTime&EndTime"
AVE_ROWS = [
  f"Church bell&{CLIP_IDS[0]}&good&6&8",
  f"Male speech, man speaking&{CLIP_IDS[1]}&good&0&10",
  f"Mandolin&{CLIP_IDS[2]}&good&0&0",
]
AVE_SPLITS = {"train": [0, 1], "test": [2], "unseen": [2]}  # rows


def make_ave(root: pathlib.Path, *, header: bool = True, media: str = "") -> pathlib.Path:
  """AVE of three clips, the official categories; `media` is the folder of the mp4 files."""
  write_lines(root / "Annotations.txt", [AVE_HEADER] * header + AVE_ROWS)
  for split, rows in AVE_SPLITS.items():
    (root / f"{split}Set.txt").write_text("\n".join(AVE_ROWS[i] for i in rows))  # the last line has no end, as published
  for clip in CLIP_IDS:
    write_mp4(root / media / f"{clip}.mp4", clip=number(clip))
  return root


def write_orders(folder: pathlib.Path, splits: dict[str, list[int]] = AVE_SPLITS) -> None:
  """`<split>_order.h5`: row numbers of Annotations.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in splits.items():
    with h5py.File(folder / f"{split}_order.h5", "w") as file:
      file["order"] = np.array(rows, np.int64)


def ave_git(data_root: pathlib.Path) -> None:
  """Labels of the git repository, in data/, beside the videos of the zip."""
  root = data_root / "AVE"
  write_lines(root / "data/Annotations.txt", AVE_ROWS)
  write_orders(root / "data")
  for clip in CLIP_IDS:
    write_mp4(root / "AVE" / f"{clip}.mp4", clip=number(clip))


def ave_dg_sct(data_root: pathlib.Path) -> None:
  """DG-SCT's pack."""
  root = data_root / "AVE"
  write_lines(root / "Annotations.txt", [AVE_HEADER, *AVE_ROWS])
  write_orders(root)
  write_pack(root, list(CLIP_IDS), "frames", "wave")


def ave_php(data_root: pathlib.Path) -> None:
  """PHP's pack: a sixth field, no validation split, labels in a folder of their own."""
  root = data_root / "AVE"
  rows = [f"{row}&{domain}" for row, domain in zip(AVE_ROWS, ("domestic", "human", "music"), strict=True)]
  write_lines(root / "labels/Annotations_with_domain.txt", [f"{AVE_HEADER}&Domain", *rows])
  write_orders(root / "labels", {split: rows for split, rows in AVE_SPLITS.items() if split != "unseen"})
  write_pack(root, list(CLIP_IDS), "frames", "wave")


# -- LLP


def write_llp_tables(folder: pathlib.Path) -> None:
  """The csv files of three clips; the dense rows hold one of each published defect."""
  names = [f"{clip}_{10 * i}_{10 * i + 10}" for i, clip in enumerate(CLIP_IDS)]
  weak, dense, test = "filename\tevent_labels", "filename\tonset\toffset\tevent_labels", names[1]
  write_lines(folder / "AVVP_train.csv", [weak, f"{names[0]}\tSpeech,Dog"])
  write_lines(folder / "AVVP_test_pd.csv", [weak, f"{names[1]}\tClapping,Speech,Clapping", f"{names[2]}\tCar"])
  audio = [
    f"{test}\t0\t3\tSpeech",
    f"{test}\t0\t3\tSpeech",
    f"{test}\t9\t0\tSpeech",
    f"{test}\t5\t5\tClapping",
    f"{test[:-1]}\t0\t10\tCar",
    "nowhere\t0\t10\tCar",
  ]
  write_lines(folder / "AVVP_eval_audio.csv", [dense, *audio])
  write_lines(folder / "AVVP_eval_visual.csv", [dense, f"{test}\t2\t10\tClapping"])


def make_llp(root: pathlib.Path, *, labels: str = "", media: str = "video") -> pathlib.Path:
  """LLP of three clips, as mp4 files in the folder `media`."""
  write_llp_tables(root / labels)
  for clip in CLIP_IDS:
    write_mp4(root / media / f"{clip}.mp4", clip=number(clip))
  return root


def llp_scripts(data_root: pathlib.Path) -> None:
  """What the scripts of AVVP-ECCV20 make: 8 frames a second of six digits, wav at 16 kHz."""
  root = data_root / "AVVP"
  write_llp_tables(root / "data")
  for clip in CLIP_IDS:
    write_frames(root / "data/LLP_dataset/frame" / clip, 80, "{:06d}.jpg", grey=3, clip=number(clip))
    write_wav(root / f"data/LLP_dataset/audio/{clip}.wav", (tones(10, 16000, number(clip)) * 32767).astype(np.int16), 16000)


def llp_pack(data_root: pathlib.Path, *, labels: str, frames: str) -> None:
  """The packs of DG-SCT and PHP."""
  write_llp_tables(data_root / "AVVP" / labels)
  write_pack(data_root / "AVVP/LLP_dataset", list(CLIP_IDS), frames, "wave")


# -- AVSBench

CATEGORY = "dog_barking"


def write_masks(folder: pathlib.Path, name: str, count: int, mode: str) -> None:
  """`count` masks: the left half sounds."""
  mask = np.zeros((48, 48), np.uint8)
  mask[:, :24] = 255
  folder.mkdir(parents=True, exist_ok=True)
  for k in range(1, count + 1):
    Image.fromarray(mask).convert(mode).save(folder / f"{name}_{k}.png")


def make_avsbench(
  root: pathlib.Path, *, meta: str = "Single-source", header: bool = True, packed: bool = False
) -> pathlib.Path:
  """S4 of one clip a split; `meta` is the folder of its table, `packed` sounds lie in AVS.npy instead of wav files."""
  data, rows = root / "Single-source" / "s4_data", ["name,start_time,category,split"] * header
  for split, masks in SPLIT_MASKS.items():
    name, place = f"{split}_clip_0", pathlib.Path(split, CATEGORY)
    rows.append(f"{name},0,{CATEGORY},{split}")
    write_frames(data / "visual_frames" / place / name, 5, name + "_{}.png", clip=number(name))
    write_masks(data / "gt_masks" / place / name, name, masks, "1")
    _write_sound(data, place, name, packed)
  write_lines(root / meta / "s4_meta_data.csv", rows)
  return root


def make_ms3(root: pathlib.Path, *, meta: str = "Multi-sources", header: bool = True, packed: bool = False) -> pathlib.Path:
  """MS3 of one clip a split; options as for S4."""
  data, rows = root / "Multi-sources" / "ms3_data", ["video_id,split"] * header
  for split in SPLIT_MASKS:
    name = f"{split}_ms3_0"
    rows.append(f"{name},{split}")
    write_frames(data / "visual_frames" / name, 5, name + ".mp4_{}.png", clip=number(name))
    write_masks(data / "gt_masks" / split / name, name, 5, "P")
    _write_sound(data, pathlib.Path(split), name, packed)
  write_lines(root / meta / "ms3_meta_data.csv", rows)
  return root


def _write_sound(data: pathlib.Path, place: pathlib.Path, name: str, packed: bool) -> None:
  if packed:
    write_packed_sounds(data / "wave" / place / "AVS.npy", [name], number(name))
  else:
    write_wav(data / "audio_wav" / place / f"{name}.wav", (tones(5, 16000, number(name)) * 32767).astype(np.int16), 16000)


# -- MUSIC-AVQA


def question(video: str, number: int, kind: tuple[str, str], text: str, values: list[str], answer: str) -> dict:
  """One row of the json file, the lists written as strings."""
  return {
    "video_id": video,
    "question_id": number,
    "type": json.dumps(kind),
    "question_content": text,
    "templ_values": json.dumps(values),
    "question_deleted": 0,
    "anser": answer,
  }


def write_questions(folder: pathlib.Path) -> None:
  """avqa-train.json with three questions, avqa-test.json with one."""
  real, synthetic = MUSIC_CLIPS
  rows = [
    question(real, 1, ("Audio", "Counting"), "How many musical instruments were heard throughout the video?", [], "one"),
    question(real, 2, ("Audio-Visual", "Existential"), "Is the <Object> in the video always playing? ", ["violin"], "no"),
    question(
      synthetic, 3, ("Audio-Visual", "Counting"), "How many sounding <Object> in the video\uff1f", ["guzheng"], "more than ten"
    ),
  ]
  write_lines(folder / "avqa-train.json", [json.dumps(rows)])
  write_lines(folder / "avqa-test.json", [json.dumps(rows[2:])])


def make_music_avqa(root: pathlib.Path, *, labels: str = "", media: tuple[str, str] = ("video", "video")) -> pathlib.Path:
  """MUSIC-AVQA of two clips of 30 s, in the folders `media` (of real and of synthetic clips)."""
  write_questions(root / labels)
  for clip, folder in zip(MUSIC_CLIPS, media, strict=True):
    write_mp4(root / folder / f"{clip}.mp4", seconds=30, clip=number(clip))
  return root


def music_avqa_pack(data_root: pathlib.Path, *, labels: str, sound: str) -> None:
  """The packs of DG-SCT and PHP."""
  root = data_root / "AVQA"
  write_questions(root / labels)
  write_pack(root, list(MUSIC_CLIPS), "frames", sound)


# -- Tux-21


def write_stamp(root: pathlib.Path, clip: str, caption: str, *, languages: tuple[str, ...] = ("fr",), index: int = 0) -> None:
  """`<clip>.png`, an opaque red left half of 12 x 8 pixels, its caption with one translation, and a second of speech for each
  language, as ogg and wav by turns; number `index` is greener, and each language of a number higher."""
  (path := root / f"{clip}.png").parent.mkdir(parents=True, exist_ok=True)
  pixels = np.zeros((8, 12, 4), np.uint8)
  pixels[:, :6] = (200, 10 * index, 0, 255)
  Image.fromarray(pixels).save(path)
  write_lines(root / f"{clip}.txt", [caption, f"de.utf8=Bild {index}"])
  for k, language in enumerate(languages):
    suffix = f"_desc_{language}" if language else "_desc"
    wave, rate_hz = tones(1, (16000, 22050)[k % 2], (index + k) % 8), (16000, 22050)[k % 2]
    if (index + k) % 2:
      write_wav(root / f"{clip}{suffix}.wav", (wave * 32767).astype(np.int16), rate_hz)
    else:
      write_ogg(root / f"{clip}{suffix}.ogg", wave, rate_hz)


def write_ogg(path: pathlib.Path, samples: np.ndarray, rate_hz: int) -> pathlib.Path:
  """float32 samples [n] in Ogg, as FLAC: Vorbis has no encoder everywhere."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("flac", rate=rate_hz, layout="mono", format="s16")
    whole = (samples * 32767).astype(np.int16)
    for start in range(0, len(whole), 1024):
      frame = av.AudioFrame.from_ndarray(whole[None, start : start + 1024], format="s16", layout="mono")
      frame.sample_rate, frame.pts = rate_hz, start
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


TUX_CLASSES = ("animals/fish", "clothes", "town/houses")


def make_tux21(root: pathlib.Path, *, classes: tuple[str, ...] = TUX_CLASSES, pictures: int = 8) -> pathlib.Path:
  """A stamps folder: `pictures` of each class, each spoken of in French."""
  for name in classes:
    for i in range(pictures):
      write_stamp(root, f"{name}/thing{i}", f"A {name} number {i}.", index=i)
  return root


MAKERS = {
  "ave": make_ave,
  "llp": make_llp,
  "avsbench": make_avsbench,
  "avsbench_ms3": make_ms3,
  "music_avqa": make_music_avqa,
  "tux21": make_tux21,
}


def _at(folder: str, make: Callable[..., object], **options: object) -> Callable[[pathlib.Path], object]:
  return lambda data_root: make(data_root / folder, **options)


_ARCHIVES = ("MUCIS-AVQA-videos-Real", "MUSIC-AVQA-videos-Synthetic")
# dataset -> layout -> function that makes it below a data root. "official" is what the others are compared with. Tux-21 has one
# layout and no label files: tests/test_tuxpaint.py.
LAYOUTS: dict[str, dict[str, Callable[[pathlib.Path], object]]] = {
  "ave": {
    "official": _at("AVE_Dataset", make_ave, media="AVE"),
    "no_header": _at("AVE", make_ave, header=False),
    "git": ave_git,
    "dg_sct": ave_dg_sct,
    "php": ave_php,
  },
  "llp": {
    "official": _at("LLP", make_llp, labels="data", media="data/LLP_dataset/video"),
    "scripts": llp_scripts,
    "dg_sct": functools.partial(llp_pack, labels="", frames="frame"),
    "php": functools.partial(llp_pack, labels="LLP_dataset/labels", frames="frames"),
  },
  "avsbench": {
    "official": _at("AVSBench", make_avsbench),
    "no_header": _at("AVSBench-object", make_avsbench, header=False),
    "dg_sct": _at("AVSBench_data", make_avsbench, packed=True),
    "php": _at("AVS", make_avsbench, meta="Single-source/s4_data"),
  },
  "avsbench_ms3": {
    "official": _at("AVSBench", make_ms3),
    "no_header": _at("AVSBench-object", make_ms3, header=False),
    "dg_sct": _at("AVSBench_data", make_ms3, packed=True),
    "php": _at("AVS", make_ms3, meta="Multi-sources/ms3_data"),
  },
  "music_avqa": {
    "official": _at("MUSIC-AVQA", make_music_avqa, labels="data/json", media=_ARCHIVES),
    "update": _at("MUSIC-AVQA", make_music_avqa, labels="data/json_update"),
    "dg_sct": functools.partial(music_avqa_pack, labels="json", sound="audio_wave"),
    "php": functools.partial(music_avqa_pack, labels="labels/json", sound="wave"),
  },
}
