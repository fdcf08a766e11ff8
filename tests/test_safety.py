"""Nothing that is read is run: no forbidden call in the package; and files that announce the absurd are refused at once."""

import ast
import io
import os
import pathlib
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from fractions import Fraction

import av
import fabricate
import h5py
import numpy as np
import pytest
from fuzzing import in_time, peak_bytes
from PIL import Image
from test_layers import ROOT, sources

from data_pipelines import arrays as arrays_lib
from data_pipelines import ave, limits, media, pictures, tables, waves
from data_pipelines.schema import DataError, Media, MediaError

MEDIA = Media(image_size=16, sample_rate_hz=8000)

# -- the code

# What runs, or imports, what a file says. `ast.literal_eval` only reads.
NEVER = {"eval", "exec", "compile", "__import__", "import_module", "execfile", "unsafe_load", "full_load", "unpack_archive"}
NEVER |= {"extractall", "extract", "read_pickle", "system", "popen", "fromfile"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "runpy", "code"}
# (file, call) -> why it may stand there.
ALLOWED = {
  ("phpjax/run.py", "compile"): "jax: a lowered program",
  ("phpjax/results.py", "compile"): "jax: a lowered program",
}
# The one place that takes pickles apart: with a table of stand-ins in the place of all names, see there.
MAY_IMPORT = {("data_pipelines/waves.py", "pickle")}
TORCH = {("phpjax/sources.py", "torch.load"), ("phpjax/sources.py", "torch.jit.load")}


def called(node: ast.Call) -> str:
  """The dotted name of what is called."""
  return ast.unparse(node.func)


def forbidden(root: pathlib.Path) -> Iterator[str]:
  """One line for each call and import in the packages below `root` that could run what a file says."""
  for _, path in sources(root):
    file = path.relative_to(root).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        tops = {name.split(".")[0] for name in names}
        yield from (f"{file}: imports {name}" for name in sorted(tops & UNPICKLERS) if (file, name) not in MAY_IMPORT)
      if isinstance(node, ast.Call):
        yield from (f"{file}:{node.lineno}: {words}" for words in _wrong(file, node))


def _wrong(file: str, node: ast.Call) -> Iterator[str]:
  """What is wrong with one call."""
  name = called(node)
  last, options = name.split(".")[-1], {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
  own = name in ("re.compile", "self._steps.compile") or name.endswith(").compile")
  if last in NEVER and not own and (file, last) not in ALLOWED:
    yield f"calls {name}"
  if options.get("shell") == "True":
    yield f"calls {name} through a shell"
  if name in ("np.load", "numpy.load", "np.lib.format.read_array") and options.get("allow_pickle") != "False":
    yield f"calls {name} without allow_pickle=False"
  elif options.get("allow_pickle") not in (None, "False"):
    yield f"calls {name} with allow_pickle={options['allow_pickle']}"
  if last == "load" and name.startswith("torch") and (file, name) not in TORCH:
    yield f"calls {name}"
  if name == "torch.load" and options.get("weights_only") != "True":
    yield "calls torch.load without weights_only=True"
  if name == "av.open" and not _writes(node) and file not in ("data_pipelines/media.py", "data_pipelines/toybox/library.py"):
    yield "calls av.open beside media.opened, which knows the limits"
  if name == "Image.open" and file not in ("data_pipelines/pictures.py", "data_pipelines/toybox/library.py"):
    yield "calls Image.open beside pictures.opened, which knows the limits"
  if last == "builder_from_directory":
    yield f"calls {name}: metadata of TFDS name modules to import"


def _writes(node: ast.Call) -> bool:
  return len(node.args) > 1 and ast.unparse(node.args[1]) == "'w'"


def test_no_call_runs_what_a_file_says():
  assert list(forbidden(ROOT)) == []


@pytest.mark.parametrize(
  "line",
  [
    "x = eval(text)",
    "exec(open(path).read())",
    "import pickle",
    "from pickle import loads",
    "import yaml",
    "numpy.load(path)",
    "np.load(path, allow_pickle=True)",
    "torch.load(path, weights_only=True)",
    "importlib.import_module(config.name)",
    "zipfile.ZipFile(path).extractall(out)",
    "subprocess.run(text, shell=True)",
    "os.system(text)",
    "av.open(path)",
    "Image.open(path)",
    "tfds.builder_from_directory(path)",
  ],
)
def test_a_forbidden_call_is_found(tmp_path, line):
  (tmp_path / "phpjax").mkdir()
  (tmp_path / "phpjax/workdir.py").write_text(f"def f(path):\n  {line}\n")
  assert len(list(forbidden(tmp_path))) == 1


def test_the_one_unpickler_refuses_every_name_but_its_own(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path}/ran",)

  np.save(tmp_path / "AVS.npy", np.array({"a.wav": Evil()}, object), allow_pickle=True)
  with pytest.raises(MediaError, match=r"asks for .*\.system, which arrays of numbers do not need"):
    waves.read_table(tmp_path / "AVS.npy")
  assert not (tmp_path / "ran").exists()


# -- what files announce


def png(width: int, height: int) -> bytes:
  """A picture of a few bytes that announces any size."""

  def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

  head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpg(width: int, height: int) -> bytes:
  Image.new("RGB", (16, 16)).save(buffer := io.BytesIO(), "JPEG")
  content = bytearray(buffer.getvalue())
  place = content.index(b"\xff\xc0") + 5
  content[place : place + 4] = struct.pack(">HH", height, width)
  return bytes(content)


def npy(header: str) -> bytes:
  text = header.encode().ljust(118 - 1) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


def avi(path: pathlib.Path, *, header: tuple[int, int] | None = None, frames: tuple[int, int] | None = None) -> pathlib.Path:
  """A video of JPEG frames whose header, or whose frames, announce a width and height."""
  with av.open(str(path), "w", format="avi") as container:
    stream = container.add_stream("mjpeg", rate=2)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    for _ in range(4):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
    container.mux(stream.encode())
  content = bytearray(path.read_bytes())
  if header:
    place = content.index(b"strf") + 12
    content[place : place + 8] = struct.pack("<ii", *header)
  place = 0
  while frames and (place := content.find(b"\xff\xc0", place)) > 0:
    content[place + 5 : place + 9] = struct.pack(">HH", *frames[::-1])
    place += 9
  path.write_bytes(content)
  return path


ABSURD = {
  "a.png": (png(65535, 65535), "more pixels than can be opened"),
  "b.png": (png(12000, 12000), "is 12000 x 12000, 144000000 pixels, more than the limit of 64000000"),
  "c.png": (png(1, 60000), "is 1 x 60000, 60000 (long side by short), more than the limit of 100"),
  "a.jpg": (jpg(65500, 65500), "more pixels than can be opened"),
  "b.jpg": (jpg(9000, 9000), "81000000 pixels, more than the limit of 64000000"),
  "a.npy": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }"), "it has 64"),
  "b.npy": (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9, 99999999, 99999999), }"), "it has 64"),
  "c.npy": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "a pickle, which is never opened"),
}


@pytest.mark.parametrize("name", ABSURD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_announces_the_absurd_is_refused_at_once(tmp_path, name):
  (tmp_path / name).write_bytes(ABSURD[name][0])
  read = (lambda path: arrays_lib.read_npy_wave(path, 8000), lambda path: pictures.read_image(path, MEDIA))[".npy" not in name]
  before = peak_bytes()
  with in_time(), pytest.raises(MediaError) as caught:
    read(tmp_path / name)
  assert ABSURD[name][1] in str(caught.value) and str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
  assert peak_bytes() - before < 100e6


@pytest.mark.parametrize("size", [(65500, 65500), (9000, 9000)])
def test_huge_frames_are_refused_before_they_are_decoded(tmp_path, size):
  path, before = avi(tmp_path / "a.avi", header=size), peak_bytes()
  assert media.decode_video(path, [0.0], MEDIA)[0].shape == (1, 16, 16, 3), "the frames tell, not the header"
  with in_time(), pytest.raises(MediaError, match="cannot be decoded"):
    media.decode_video(avi(path, frames=size), [0.0], MEDIA)
  assert peak_bytes() - before < 100e6


def test_frames_that_grow_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
  with av.open(str(tmp_path / "a.avi"), "w", format="avi") as container:
    stream = container.add_stream("mjpeg", rate=2)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    for number, side in enumerate([32] * 40 + [128] * 4):
      Image.new("RGB", (side, side)).save(buffer := io.BytesIO(), "JPEG")
      packet = av.Packet(buffer.getvalue())
      packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 2)
      container.mux(packet)
  assert media.decode_video(tmp_path / "a.avi", [0.0, 21.0], MEDIA)[0].shape == (2, 16, 16, 3)
  limited(monkeypatch, "frame_pixels=5000")
  assert media.decode_video(tmp_path / "a.avi", [0.0], MEDIA)[0].shape == (1, 16, 16, 3)
  with pytest.raises(MediaError, match=r"cannot be decoded|is cut off"):
    media.decode_video(tmp_path / "a.avi", [0.0, 21.0], MEDIA)


def limited(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
  monkeypatch.setenv(limits.VARIABLE, text)


@pytest.mark.parametrize(
  ("limit", "words"),
  [
    ("frame_pixels=1000", "is 32 x 32, 1024 frame pixels, more than the limit of 1000"),
    ("duration_s=2", "is shown to its end at 4 s, more than the limit of 2"),
    ("frames=5", "needs 6 frames, more than the limit of 5"),
    ("video_pixels=5000", "needs 5120 video pixels, more than the limit of 5000"),
    ("samples=10000", "samples, more than the limit of 10000"),
    ("sample_rate_hz=8000", "has sound of 16000 Hz, more than the limit of 8000"),
    ("media_bytes=1000", "media bytes, more than the limit of 1000"),
  ],
)
def test_every_limit_of_a_clip_holds_and_says_how_to_raise_it(tmp_path, monkeypatch, limit, words):
  path = fabricate.write_mp4(tmp_path / "a.mp4", seconds=4)
  assert media.decode_clip(path, MEDIA, 4).visual.shape[0] == 4
  limited(monkeypatch, limit)
  with pytest.raises(MediaError) as caught:
    media.decode_clip(path, MEDIA, 4)
  message = str(caught.value)
  assert words in message and message.startswith(str(path))
  name = limit.partition("=")[0]
  assert f"set {limits.VARIABLE}={name}=" in message
  limited(monkeypatch, f"{name}=200000000")
  assert media.decode_clip(path, MEDIA, 4).visual.shape[0] == 4


def test_a_longer_file_is_read_where_only_its_beginning_is_shown(tmp_path, monkeypatch):
  path = fabricate.write_mp4(tmp_path / "a.mp4", seconds=8)
  limited(monkeypatch, "duration_s=3")
  assert media.decode_clip(path, MEDIA, 2).duration_s == pytest.approx(8, abs=0.2)
  with pytest.raises(MediaError, match="is shown to its end at 8 s"):
    media.decode_clip(path, MEDIA, 2, spread=True)
  with pytest.raises(MediaError, match="has sound up to"):
    media.decode_audio(path, 8000)


def test_a_claimed_duration_is_not_believed(tmp_path):
  content = bytearray(fabricate.mp4_bytes(seconds=2).replace(b"edts", b"free"))  # else the edit list tells the true length
  for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
    place = -1
    while (place := content.find(box, place + 1)) > 0:
      content[place + offset : place + offset + 4] = struct.pack(">I", 2**31 - 1)
  place = -1
  while (place := content.find(b"stts", place + 1)) > 0:
    last = place + 8 * int.from_bytes(content[place + 8 : place + 12], "big")
    content[last + 8 : last + 12] = struct.pack(">I", 2**28)  # the last piece of the track lasts for hours
  (tmp_path / "a.mp4").write_bytes(content)
  before = peak_bytes()
  with in_time(), pytest.raises(MediaError, match="is cut off"):
    media.decode_clip(tmp_path / "a.mp4", MEDIA, 10)
  with in_time(), pytest.raises(MediaError, match=r"is shown to its end at \d+ s, more than the limit of 1200"):
    media.decode_clip(tmp_path / "a.mp4", MEDIA, 10, spread=True)
  assert peak_bytes() - before < 100e6


@pytest.mark.parametrize("limit", ["samples=100", "duration_s=0.1", "media_bytes=100"])
def test_limits_of_stored_sound(tmp_path, monkeypatch, limit):
  path = fabricate.write_npy(tmp_path / "a.npy", fabricate.tones(1, 32000))
  assert len(arrays_lib.read_npy_wave(path, 8000)) == 8000
  limited(monkeypatch, limit)
  with pytest.raises(MediaError, match=f"set {limits.VARIABLE}={limit.partition('=')[0]}="):
    arrays_lib.read_npy_wave(path, 8000)


def test_a_table_of_sounds_that_is_too_large_is_not_read(tmp_path, monkeypatch):
  path = fabricate.write_packed_sounds(tmp_path / "AVS.npy", ["a"])
  limited(monkeypatch, "table_bytes=1000")
  with pytest.raises(MediaError, match=r"table bytes, more than the limit of 1000; .*PHPJAX_LIMITS=table_bytes="):
    waves.read_table(path)


def test_label_files_that_are_too_large_or_no_files_are_refused(tmp_path, monkeypatch):
  for name, read in (("a.txt", tables.read_lines), ("a.json", tables.read_json)):
    path = fabricate.write_lines(tmp_path / name, ["[1]"])
    assert read(path)
    with monkeypatch.context() as patched:
      limited(patched, "label_bytes=3")
      with pytest.raises(DataError, match=r"4 label bytes, more than the limit of 3; .*PHPJAX_LIMITS=label_bytes=4"):
        read(path)
  os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
  with in_time(), pytest.raises(DataError, match="is no file"):
    tables.read_lines(tmp_path / "pipe.txt")


@pytest.mark.parametrize("text", ["duration_s", "length_s=5", "frames=x", "frames=nan", "frames=-1", "pixels=1e9", "=3"])
def test_limits_that_are_not_understood_are_one_line(tmp_path, monkeypatch, text):
  limited(monkeypatch, text)
  with pytest.raises(DataError, match=r"^PHPJAX_LIMITS: .* is no NAME=NUMBER.*duration_s") as caught:
    limits.check_media(tmp_path, "frames", 1, "needs")
  assert not isinstance(caught.value, MediaError), "on_bad_clip='skip' must not leave out every clip for it"


def test_order_files_cannot_point_elsewhere_or_announce_much(tmp_path):
  with h5py.File(tmp_path / "other.h5", "w") as file:
    file["order"] = np.arange(3)
  with h5py.File(tmp_path / "link.h5", "w") as file:
    file["order"] = h5py.ExternalLink("other.h5", "order")
  with h5py.File(tmp_path / "soft.h5", "w") as file:
    file["x"] = np.arange(3)
    file["order"] = h5py.SoftLink("/x")
  (tmp_path / "raw").write_bytes(bytes(24))
  with h5py.File(tmp_path / "external.h5", "w") as file:
    file.create_dataset("order", (3,), "i8", external=[(str(tmp_path / "raw"), 0, 24)])
  with h5py.File(tmp_path / "virtual.h5", "w") as file:
    layout = h5py.VirtualLayout((3,), "i8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "order", (3,))
    file.create_virtual_dataset("order", layout)
  with h5py.File(tmp_path / "huge.h5", "w") as file:
    file.create_dataset("order", (10**12,), "i8", chunks=(1000,))
  with h5py.File(tmp_path / "chunk.h5", "w") as file:
    file.create_dataset("order", (3,), "i8", chunks=(10**8,), maxshape=(None,), compression="gzip")
  with h5py.File(tmp_path / "object.h5", "w") as file:
    file.create_dataset("order", (3,), h5py.string_dtype())
  assert ave.read_order(tmp_path / "other.h5") == [0, 1, 2]
  words = {"link": "of its own", "soft": "of its own", "external": "other files", "virtual": "other files"}
  words |= {"huge": "more than the limit of 1000000", "chunk": "more than the limit", "object": "not row numbers"}
  for name, said in words.items():
    with in_time(), pytest.raises(DataError, match=said):
      ave.read_order(tmp_path / f"{name}.h5")


def test_a_playlist_named_mp4_opens_no_other_file(tmp_path):
  fabricate.write_mp4(tmp_path / "secret.mp4", seconds=2)
  (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
  with av.open(str(tmp_path / "a.mp4")) as container:
    assert container.format.name == "concat", "FFmpeg itself would open what the playlist names"
  with pytest.raises(MediaError, match="cannot be decoded"):
    media.decode_clip(tmp_path / "a.mp4", MEDIA, 2)


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  fabricate.write_mp4(pathlib.Path("concat:a|b.mp4"), seconds=2)
  assert media.decode_clip(pathlib.Path("concat:a|b.mp4"), MEDIA, 2).visual.shape[0] == 2


def test_postscript_named_jpg_starts_no_program(tmp_path):
  (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
  with pytest.raises(MediaError, match="cannot identify image file"):  # Pillow knows the format, and would look for ghostscript
    pictures.read_image(tmp_path / "a.jpg", MEDIA)


def test_check_and_prepare_keep_the_limits(tmp_path):
  fabricate.make_ave(tmp_path / "raw" / "AVE")
  environment = {**os.environ, limits.VARIABLE: "media_bytes=1000"}
  places = [f"--root={tmp_path / 'raw'}", f"--out={tmp_path / 'out'}"]
  command = [sys.executable, "-m", "data_pipelines.prepare", "--dataset=ave", *places, "--num_workers=2"]
  options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120, "check": False}
  done = subprocess.run(command, **options)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  told = [line for line in done.stderr.splitlines() if "left out" in line]
  assert told and all("media bytes, more than the limit of 1000" in line for line in told)
