"""AVS.npy: the one pickle that is read, and that it can do no harm."""

import io
import pathlib
import pickle
import threading
import time
import tracemalloc

import fabricate
import numpy as np
import pytest

from data_pipelines import AVSBench, Media, MediaError, arrays, waves
from data_pipelines.base import ClipCache

WAVE = fabricate.tones(5, 32000)
CORE = b"numpy._core"


@pytest.fixture(autouse=True)
def tables(monkeypatch) -> ClipCache:
  """A cache of its own for each test."""
  monkeypatch.setattr(waves, "TABLES", cache := ClipCache(10_000_000))
  return cache


def write(path: pathlib.Path, content: bytes, *, descr: str = "|O", shape: tuple = ()) -> pathlib.Path:
  """An .npy file whose header announces an object array, before any bytes."""
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
  path.write_bytes(header.getvalue() + content)
  return path


def packed(table: object, protocol: int = 4) -> bytes:
  return pickle.dumps(np.array(table, object), protocol=protocol)


def read(path: pathlib.Path, name: str = "a", rate_hz: int = 32000) -> np.ndarray:
  return waves.read_wave(path, name, rate_hz)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
  "samples",
  [
    WAVE,
    WAVE.astype(np.float64),
    WAVE.astype(">f4"),
    (WAVE * 32768).astype(np.int16),
    (WAVE * 32768).astype(np.int32),
    WAVE.reshape(5, 32000),
    np.asfortranarray(WAVE.reshape(5, 32000)),
  ],
  ids=lambda x: f"{x.dtype.str}{x.ndim}{'F' if x.flags.f_contiguous and x.ndim > 1 else ''}",
)
def test_sounds_of_any_number_type(tmp_path, samples, protocol):
  path = write(tmp_path / "AVS.npy", packed({"a.wav": samples, "b.wav": samples * 0}, protocol))
  got = read(path)
  assert got.dtype == np.float32 and got.shape == (160000,)
  np.testing.assert_allclose(got, WAVE, atol=2 / 32768)
  assert not read(path, "b").any() and read(path, rate_hz=8000).shape == (40000,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("samples", [[0.0, 0.25, -0.5], [np.float32(0.0), np.float32(0.25), np.float32(-0.5)]])
def test_lists_of_numbers(tmp_path, samples, protocol):
  table = {"a.wav": samples * 20_000}  # many more than the scan lets pass without a look at the size
  np.testing.assert_allclose(read(write(tmp_path / "AVS.npy", packed(table, protocol)))[:3], [0, 0.25, -0.5])


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_a_quiet_clip_has_the_scale_of_its_table(tmp_path, kind):
  loud, quiet = np.array([20000, -20000], kind), np.array([1, -1, 0, 0], kind)
  path = write(tmp_path / "AVS.npy", packed({"a.wav": quiet, "b.wav": loud}))
  np.testing.assert_allclose(read(path), np.array([1, -1, 0, 0]) / 32768)
  np.testing.assert_allclose(read(path, "b"), np.array([20000, -20000]) / 32768)


def test_whole_numbers_among_fractions_are_full_scale(tmp_path):
  path = write(tmp_path / "AVS.npy", packed({"a.wav": np.array([1, -1, 0], np.float32), "b.wav": WAVE}))
  np.testing.assert_allclose(read(path), [1, -1, 0], atol=1 / 32768)


def test_types_of_one_table_have_their_own_scales(tmp_path):
  path = write(tmp_path / "AVS.npy", packed({"a.wav": np.array([16384], np.int16), "b.wav": np.array([2**30], np.int32)}))
  assert read(path) == read(path, "b") == 0.5


def test_files_that_numpy_1_wrote(tmp_path):
  content = packed({"a.wav": WAVE}, 3)
  assert CORE in content
  np.testing.assert_allclose(read(write(tmp_path / "AVS.npy", content.replace(CORE, b"numpy.core"))), WAVE, atol=1e-4)


def test_the_cut_seconds_are_those_of_the_wav(tmp_path):
  wanted, packed_s4 = (fabricate.make_avsbench(tmp_path / name, packed=name == "b") for name in ("a", "b"))
  audio = [AVSBench(root).examples("test", Media(16, 16000), cache=ClipCache())[0]["audio"] for root in (wanted, packed_s4)]
  np.testing.assert_allclose(audio[0][:, 200:-200], audio[1][:, 200:-200], atol=30)


def test_the_official_wav_comes_before_the_table(tmp_path):
  root = fabricate.make_avsbench(tmp_path / "AVSBench")
  data = root / "Single-source/s4_data"
  place = data / "wave/test" / fabricate.CATEGORY
  place.mkdir(parents=True)
  (place / "AVS.npy").write_bytes(b"")  # never opened
  dataset = AVSBench(root)
  (record,) = dataset.records("test")
  assert dataset.clip_files(record)[1].suffix == ".wav"
  assert dataset.decode(record, Media(16, 8000))["audio"].any()
  dataset.clip_files(record)[1].unlink()
  assert dataset.clip_files(record)[1] == place / "AVS.npy"
  with pytest.raises(MediaError, match=r"AVS\.npy: cannot be read as a table of sounds"):
    dataset.decode(record, Media(16, 8000))


# -- pickles that want more


class Asks:
  """Pickles as a call of `function`."""

  def __init__(self, function, *arguments) -> None:
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


RAN: list[str] = []


def run(*what) -> None:
  RAN.append("".join(map(str, what)))


def touch(path: pathlib.Path) -> list[object]:
  """Objects that would leave a file, or a mark in RAN, if anything of them ran."""
  command = f"open({str(path)!r}, 'w')"
  return [Asks(exec, command), Asks(eval, command), Asks(pathlib.Path.touch, path), Asks(run, "ran"), Asks(np.save, path, 0)]


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("place", ["alone", "in the table", "as a key", "as samples"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, which, place):
  bad = touch(tmp_path / "ran")[which]
  content = {
    "alone": pickle.dumps(bad),
    "in the table": packed({"a.wav": bad}),
    "as a key": packed({bad: WAVE}),
    "as samples": packed({"a.wav": [0.0, bad]}),
  }[place]
  path = write(tmp_path / "AVS.npy", content)
  with pytest.raises(MediaError, match=r"AVS\.npy: asks for \w+[.\w]*, which .* was not opened") as caught:
    read(path)
  assert caught.value.mend == "fetch this file again from a source that you trust"
  assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists() and RAN == []
  pickle.loads(pickle.dumps(Asks(run, "now")))
  assert RAN.pop() == "now", "such a pickle does run where pickles are opened"


@pytest.mark.parametrize(
  "name",
  ["os system", "builtins getattr", "numpy load", "numpy.core.multiarray fromfile", "numpy ndarray.tofile", "numpy.ma ndarray"],
)
def test_only_what_builds_arrays_is_known(tmp_path, name):
  module, attribute = name.split()
  path = write(tmp_path / "AVS.npy", f"c{module}\n{attribute}\n.".encode())
  with pytest.raises(MediaError, match=f"asks for {module}.{attribute},"):
    read(path)


def aliased(count: int) -> dict[str, np.ndarray]:
  """One sound under many names."""
  return {f"{i}.wav": WAVE for i in range(count)}


def lists_of_lists(depth: int) -> list:
  """Few bytes that stand for 10 ** depth numbers."""
  found: list = [0.5] * 10
  for _ in range(depth - 1):
    found = [found] * 10
  return found


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (packed({"a.wav": lists_of_lists(12)}), "'a.wav' is no row of numbers"),
    (packed(aliased(50)), "holds more than [0-9]+ samples in [0-9]+ bytes"),
    (packed({"a.wav": [0.5] * 10, "b.wav": WAVE}) + bytes(10), None),
    (b"\x80\x04}r\x00\x00\x00\x04.", "remembers something at place 67108864 of 0"),  # LONG_BINPUT 2 ** 26
    (b"\x80\x04(" + b"]" * 100_000 + b"l.", "makes 100001 objects of 100005 bytes"),
    (b"\x80\x04" + b"\x8f0" * 10_000 + b".", "holds a set"),
    (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.", "cannot be read as a table"),
    (packed({("a", "wav"): WAVE}), "the name of a sound is no text"),
    (b"\x80\x04c_codecs\nencode\nN}U\x01aU\x01bs\x86b.", "cannot be read as a table"),  # sets attributes of a stand-in
  ],
  ids=range(9),
)
def test_memory_is_a_small_multiple_of_the_file(tmp_path, content, words):
  path = write(tmp_path / "AVS.npy", content)
  tracemalloc.start()
  try:
    if words is None:
      assert read(path, "b").shape == WAVE.shape
    else:
      with pytest.raises(MediaError, match=words):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 12 * len(content) + 3_000_000


def object_array_of(raw: object) -> bytes:
  """An array of objects whose memory is `raw` instead of a list: numpy would take the bytes for addresses."""
  stream = io.BytesIO()
  pickler = pickle._Pickler(stream, 3)
  pickler.proto = 3
  array = np.array({"a.wav": WAVE}, object)
  build, arguments, state = array.__reduce__()
  pickler.save_reduce(build, arguments, (*state[:4], raw), obj=array)
  pickler.write(b".")
  return b"\x80\x03" + stream.getvalue()


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"garbage",
    packed({"a.wav": WAVE})[:5000],
    packed({"a.wav": np.array(["text"])}),
    packed({"a.wav": np.array([None])}),
    packed({"a.wav": "text"}),
    packed({"a.wav": np.zeros(0, np.float32)}),
    packed({"a.wav": np.array([np.nan])}),
    packed({"a.wav": np.array([1j])}),
    packed([WAVE, WAVE]),
    packed(7),
    pickle.dumps({"a.wav": WAVE}),
    object_array_of(b"\x00" * 8),
    object_array_of(b"\x41" * 8),
    b"\x80\x04\x8a\xff",  # a number longer than the file
    b"cnumpy\nndarray\n}b.",  # sets attributes of the type itself
  ],
  ids=range(16),
)
def test_damaged_tables_are_one_clear_line(tmp_path, content):
  path = write(tmp_path / "AVS.npy", content)
  with pytest.raises(MediaError, match=r"AVS\.npy: ") as caught:
    read(path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("options", "words"),
  [({"descr": "<f4"}, "float32 and shape"), ({"shape": (3,)}, r"shape \(3,\)"), ({"descr": [("a", "|O")]}, "cannot be read")],
)
def test_only_a_single_object_is_opened(tmp_path, options, words):
  path = write(tmp_path / "AVS.npy", packed({"a.wav": WAVE}), **options)
  with pytest.raises(MediaError, match=words):
    read(path)


def test_a_sound_that_is_not_in_the_table_is_named(tmp_path):
  path = fabricate.write_packed_sounds(tmp_path / "AVS.npy", ["a", "c"])
  with pytest.raises(MediaError, match=r"AVS\.npy: has no sound 'b\.wav' among its 2"):
    read(path, "b")
  with pytest.raises(MediaError, match=r"nowhere.*AVS\.npy: no such file"):
    read(tmp_path / "nowhere" / "AVS.npy")


# -- memory and threads


def test_a_table_is_read_once_for_many_threads_and_anew_when_it_changes(tmp_path, monkeypatch):
  path = fabricate.write_packed_sounds(tmp_path / "AVS.npy", ["a"])
  opened, original = [], waves.read_table
  monkeypatch.setattr(waves, "read_table", lambda path: opened.append(path) or time.sleep(0.02) or original(path))
  found = []
  threads = [threading.Thread(target=lambda: found.append(read(path))) for _ in range(8)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert len(found) == 8 and len(opened) == 1
  write(path, packed({"a.wav": WAVE[:32000]}))
  assert read(path).shape == (32000,) and len(opened) == 2


def test_memory_is_bounded_however_many_tables_are_read(tmp_path, tables):
  size = 2 * len(WAVE)  # int16
  tables.max_bytes = 3 * size + 100
  for i in range(8):
    path = fabricate.write_packed_sounds(tmp_path / f"{i}" / "AVS.npy", ["a"])
    np.testing.assert_allclose(read(path), WAVE, atol=1e-4)
    assert tables.num_bytes <= tables.max_bytes
  assert tables.num_bytes == 3 * size
  tables.max_bytes = 0
  assert read(path).any(), "a table that is larger than the whole cache is read all the same"
  assert arrays.NPY_RATE_HZ == 32000
