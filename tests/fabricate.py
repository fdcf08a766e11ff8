"""Tiny clips and dataset folders in the benchmarks' own layouts, made on the spot for the tests."""

import json
import pathlib
import wave

import av
import numpy as np
from PIL import Image

CLIP_IDS = ("aaaaaaaaaaa", "-bbbbbbbbb_", "ccccccccccc")  # 11 characters, as YouTube's


def levels(seconds: int) -> np.ndarray:
  """Red value of the frames of each second."""
  return 20 + (np.arange(seconds) * 22) % 220


def tones(seconds: int, rate_hz: int) -> np.ndarray:
  """float32 [seconds * rate]: 250 Hz, twice as loud in odd seconds."""
  t = np.arange(seconds * rate_hz) / rate_hz
  return (0.2 * (1 + np.floor(t) % 2) * np.sin(2 * np.pi * 250 * t)).astype(np.float32)


def write_mp4(
  path: pathlib.Path,
  *,
  seconds: int = 10,
  size: int = 32,
  fps: int = 2,
  rate_hz: int = 16000,
  audio: bool = True,
  audio_from_s: int = 0,
  faststart: bool = False,
) -> pathlib.Path:
  """A clip whose second t is red of `levels`[t], with `tones` from audio_from_s on."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
    video = container.add_stream("libx264", rate=fps)
    video.width, video.height, video.pix_fmt = size, size, "yuv420p"
    sound = container.add_stream("aac", rate=rate_hz, layout="mono") if audio else None
    for i in range(seconds * fps):
      image = np.full((size, size, 3), 128, np.uint8)
      image[..., 0] = levels(seconds)[i // fps]
      container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(video.encode())
    if sound:
      samples = tones(seconds, rate_hz)
      for start in range(audio_from_s * rate_hz, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate_hz, start
        container.mux(sound.encode(frame))
      container.mux(sound.encode())
  return path


def write_wav(path: pathlib.Path, samples: np.ndarray, rate_hz: int) -> pathlib.Path:
  """int16 or uint8 samples [n] or [n, channels] -> wav file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with wave.open(str(path), "wb") as file:
    file.setparams((1 if samples.ndim == 1 else samples.shape[1], samples.itemsize, rate_hz, 0, "NONE", ""))
    file.writeframes(samples.tobytes())
  return path


def write_frames(folder: pathlib.Path, count: int, pattern: str = "{:08d}.jpg") -> pathlib.Path:
  """`count` numbered frames, number k (from 1) of grey value 10 * k."""
  folder.mkdir(parents=True, exist_ok=True)
  for k in range(1, count + 1):
    Image.new("RGB", (24, 16), (10 * k,) * 3).save(folder / pattern.format(k))
  return folder


def make_ave(root: pathlib.Path, *, header: bool = True, media: str = "") -> pathlib.Path:
  """AVE of three clips, the official categories; `media` is the folder of the mp4 files."""
  rows = [
    f"Church bell&{CLIP_IDS[0]}&good&6&8",
    f"Male speech, man speaking&{CLIP_IDS[1]}&good&0&10",
    f"Mandolin&{CLIP_IDS[2]}&good&0&0",
  ]
  root.mkdir(parents=True)
  title = ["Category&VideoID&Quality&StartTime&EndTime"] if header else []
  (root / "Annotations.txt").write_text("\n".join(title + rows) + "\n")
  (root / "trainSet.txt").write_text("\n".join(rows[:2]))
  (root / "testSet.txt").write_text(rows[2] + "\n")
  (root / "unseenSet.txt").write_text(rows[2] + "\n")
  for clip in CLIP_IDS:
    write_mp4(root / media / f"{clip}.mp4")
  return root


def make_llp(root: pathlib.Path) -> pathlib.Path:
  """LLP of three clips; the dense rows hold one of each published defect."""
  names = [f"{clip}_{10 * i}_{10 * i + 10}" for i, clip in enumerate(CLIP_IDS)]
  root.mkdir(parents=True)
  (root / "AVVP_train.csv").write_text(f"filename\tevent_labels\n{names[0]}\tSpeech,Dog\n")
  (root / "AVVP_test_pd.csv").write_text(f"filename\tevent_labels\n{names[1]}\tClapping,Speech,Clapping\n{names[2]}\tCar\n")
  head, test = "filename\tonset\toffset\tevent_labels\n", names[1]
  (root / "AVVP_eval_audio.csv").write_text(
    f"{head}{test}\t0\t3\tSpeech\n{test}\t0\t3\tSpeech\n{test}\t9\t0\tSpeech\n{test}\t5\t5\tClapping\n"
    f"{test[:-1]}\t0\t10\tCar\nnowhere\t0\t10\tCar\n"
  )
  (root / "AVVP_eval_visual.csv").write_text(f"{head}{test}\t2\t10\tClapping\n")
  for clip in CLIP_IDS:
    write_mp4(root / "video" / f"{clip}.mp4")
  return root


def make_avsbench(root: pathlib.Path, *, meta: str = "Single-source") -> pathlib.Path:
  """S4 of one clip a split: 48 pixel frames, the left half is the sounding object."""
  data = root / "Single-source" / "s4_data"
  rows = ["name,start_time,category,split"]
  for split, masks in (("train", 1), ("val", 5), ("test", 5)):
    name, category = f"{split}_clip_0", "dog_barking"
    rows.append(f"{name},0,{category},{split}")
    write_frames(data / "visual_frames" / split / category / name, 5, name + "_{}.png")
    write_wav(data / "audio_wav" / split / category / f"{name}.wav", (tones(5, 16000) * 32767).astype(np.int16), 16000)
    mask = np.zeros((48, 48), np.uint8)
    mask[:, :24] = 255
    (folder := data / "gt_masks" / split / category / name).mkdir(parents=True)
    for k in range(1, masks + 1):
      Image.fromarray(mask).convert("1").save(folder / f"{name}_{k}.png")
  (root / meta).mkdir(exist_ok=True)
  (root / meta / "s4_meta_data.csv").write_text("\n".join(rows) + "\n")
  return root


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


def make_music_avqa(root: pathlib.Path) -> pathlib.Path:
  """MUSIC-AVQA: three questions on two clips of 30 s in train, one in test."""
  root.mkdir(parents=True)
  rows = [
    question("00000001", 1, ("Audio", "Counting"), "How many musical instruments were heard throughout the video?", [], "one"),
    question("00000001", 2, ("Audio-Visual", "Existential"), "Is the <Object> in the video always playing? ", ["violin"], "no"),
    question(
      "va000002", 3, ("Audio-Visual", "Counting"), "How many sounding <Object> in the video\uff1f", ["guzheng"], "more than ten"
    ),
  ]
  (root / "avqa-train.json").write_text(json.dumps(rows))
  (root / "avqa-test.json").write_text(json.dumps(rows[2:]))
  for clip in ("00000001", "va000002"):
    write_mp4(root / "video" / f"{clip}.mp4", seconds=30)
  return root


MAKERS = {"ave": make_ave, "llp": make_llp, "avsbench": make_avsbench, "music_avqa": make_music_avqa}
