"""Turns published weights into an encoder folder: encoder.safetensors, encoder.json and, for text, tokenizer.json.

  python -m phpjax.convert --encoder=clip_vit_b32 --source=ViT-B-32.pt --out=weights/clip_vit_b32

--source is a weight file or a Hugging Face folder; docs/encoders.md lists what each encoder takes. A text encoder also needs a
tokenizer: from the source folder, or from --tokenizer=FILE_OR_DIR (tokenizer.json, vocab.json with merges.txt, or vocab.txt).
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from phpjax import cli, sources
from phpjax.encoders import ENCODERS, formats, make_encoder, pretrained, tokenizer
from phpjax.errors import UserError

LICENCE = "the licence of the source applies; phpjax did not check it"


def convert(
  encoder: str,
  source: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  tokenizer_source: str | pathlib.Path | None = None,
  note: Callable[[str], None] = lambda line: None,
  **sizes: Any,
) -> dict[str, Any]:
  """Writes the folder `out` -> the content of its encoder.json.

  Args:
    encoder: a row of ENCODERS.
    source: weight file or Hugging Face folder.
    out: the folder to write; what it held of another conversion is replaced only when everything has worked.
    tokenizer_source: of a text encoder, when the source has none.
    note: takes lines for the user.
    **sizes: replace sizes of the table's row, as for a model of one's own; they are stored and used again when it is opened.

  Raises:
    UserError: what the user can mend, in one line.
  """
  source, out = pathlib.Path(source).expanduser(), pathlib.Path(out).expanduser()
  try:
    module = make_encoder(encoder, **sizes)
  except (TypeError, ValueError) as error:
    raise UserError(f"--encoder={encoder}: {error}") from error
  made_tokenizer = _tokenizer(source, tokenizer_source) if module.modality == "text" else None
  tensors, files = sources.open_source(source, note)
  wanted = {name: leaf.shape for name, leaf in pretrained.flat_shapes(module).items()}
  try:
    arrays, form, left = formats.convert(module, wanted, tensors)
  except ValueError as error:
    raise UserError(f"--source={source} {error} (--encoder={encoder})") from error
  for reason, which in left.items():
    note(f"left out, {reason}: {len(which)} tensors ({which[0]}{', ...' if len(which) > 1 else ''})")
  metadata = {
    "sizes": sizes,
    "preprocessing": preprocessing(module),
    "source": {"format": form.name, "files": [f.name for f in files], "sha256": pretrained.sha256(*files)},
    "licence": LICENCE,
  }
  return _write(out, encoder, arrays, metadata, made_tokenizer)


def _tokenizer(source: pathlib.Path, given: str | pathlib.Path | None) -> Any:
  place = pathlib.Path(given).expanduser() if given else (source if source.is_dir() else source.parent)
  try:
    return tokenizer.from_files(place)
  except ValueError as error:
    raise UserError(f"{error}: give --tokenizer=FILE_OR_DIR") from error


def preprocessing(module: Any) -> dict[str, Any]:
  """What the encoder does with raw input, for whoever reads encoder.json."""
  wanted = ("image_size", "patch_size", "statistics", "sample_rate_hz", "seconds", "repeats", "num_mels", "num_fft", "hop")
  wanted += ("mel_rate_hz", "low_hz", "high_hz", "context_length", "pad_id")
  return {name: getattr(module, name) for name in wanted if hasattr(module, name)}


def _write(
  out: pathlib.Path, encoder: str, arrays: dict[str, np.ndarray], metadata: dict[str, Any], made: Any
) -> dict[str, Any]:
  """Writes all files beside `out` and moves them there when the last one is whole."""
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
      pretrained.write(folder, encoder, arrays, metadata)
      if made is not None:
        made.save(str(folder / tokenizer.FILE))
      folder.chmod(0o755)
      out.mkdir(exist_ok=True)
      for file in folder.iterdir():
        os.replace(file, out / file.name)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
  except OSError as error:
    raise UserError(f"cannot write --out={out} ({error.strerror}): free space or name another folder") from error
  return pretrained.metadata_of(out)


def main(argv: list[str]) -> None:
  """Command line."""
  values = flags.FlagValues()  # its own: those of another command stay as they are
  for name, text in (
    ("encoder", f"One of {', '.join(ENCODERS)}."),
    ("source", "Weight file or Hugging Face folder."),
    ("out", "Folder to write."),
    ("tokenizer", "File or folder of a text encoder's tokenizer."),
  ):
    flags.DEFINE_string(name, None, text, flag_values=values)
  rest, given = cli.parse_flags(argv, __doc__, values)[1:], values.flag_values_dict()
  missing = [f"--{name}" for name in ("encoder", "source", "out") if not given[name]]
  problems = [f"{', '.join(missing)} must be given"] if missing else []
  if given["encoder"] and given["encoder"] not in ENCODERS:
    problems.append(f"unknown --encoder={given['encoder']}; known: {', '.join(ENCODERS)}")
  problems += [f"unknown argument {word}" for word in rest]
  if problems:
    raise UserError("; ".join(problems))
  made = convert(given["encoder"], given["source"], given["out"], tokenizer_source=given["tokenizer"], note=print)
  print(f"{given['out']}: {made['name']}, {made['parameters']:,} parameters, from {made['source']['format']}")


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(sys.argv)))
