"""Pictures, masks and folders of frames: jpg and png files -> numpy."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from data_pipelines import limits, transforms
from data_pipelines.media import PICTURES
from data_pipelines.schema import AGAIN, Media, MediaError, brief

# What is opened whatever the name says. Pillow knows others, of which one starts a program (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF")


def read_image(path: Path | BinaryIO, media: Media) -> np.ndarray:
  """jpg or png -> uint8 [H, W, 3], bicubic; raises MediaError."""
  with opened(path) as image:
    return transforms.resize_image(image, media.image_size, crop=media.crop)


def read_on_white(path: Path | BinaryIO, media: Media) -> np.ndarray:
  """Picture cut out on a transparent ground -> uint8 [H, W, 3]: in the middle of a white square, bicubic; raises MediaError."""
  with opened(path) as image:
    width, height = image.size
    side = max(width, height)
    limits.check_media(path, "pixels", side * side, f"is {width} x {height}, which on a square needs")
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image.convert("RGBA"), ((side - width) // 2, (side - height) // 2))
    return transforms.resize_image(square, media.image_size)


def read_mask(path: Path | BinaryIO, media: Media) -> np.ndarray:
  """Mask png (1-bit, palette, grey, colour) -> uint8 [H, W] in {0, 1}, nearest pixel; raises MediaError."""
  with opened(path) as image:
    if image.mode in ("LA", "RGBA", "PA"):
      image = image.convert("RGB")  # opaque alpha would read as foreground
    binary = transforms.binarise(np.asarray(image), indices=image.mode == "P")
    return transforms.resize_mask(binary, media.image_size, crop=media.crop)


@contextlib.contextmanager
def opened(path: Path | BinaryIO) -> Iterator[Image.Image]:
  """A decoded picture; every failure inside the block becomes a MediaError that names `path`, as str() gives it."""
  try:
    if not hasattr(path, "read"):
      limits.check_file(path)
    with Image.open(path, formats=FORMATS) as image:
      limits.check_picture(path, *image.size)  # before a pixel is decoded
      image.load()
      yield image
  except MediaError:
    raise
  except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which it keeps in any case
    raise MediaError(path, f"has more pixels than can be opened ({error})", "make it smaller") from error
  except Exception as error:  # damaged bytes fail in every way that Pillow's parsers do
    raise MediaError(path, f"cannot be decoded as a picture ({brief(error)})", AGAIN) from error


def read_frames(folder: Path, media: Media, seconds: int) -> np.ndarray:
  """A folder of numbered jpg or png frames -> uint8 [T, H, W, 3], the files of `frame_files`.

  Raises MediaError: no folder, no pictures in it, or a broken picture.
  """
  chosen = frame_files(folder, seconds)
  pictures = {path: read_image(path, media) for path in dict.fromkeys(chosen)}
  return np.stack([pictures[path] for path in chosen])


def frame_files(folder: Path, seconds: int) -> list[Path]:
  """T of the numbered jpg or png files of a folder, spread evenly over it; raises MediaError if it holds none.

  The digits of the names and the frames per second do not matter: LLP's 80 files (8 a second) give ten, as ten do; of
  fewer than T some are shown twice.
  """
  found = folder.iterdir() if folder.is_dir() else ()
  # Names with a leading dot are leavings of the systems that packed the folder ("._00000001.jpg"), and no pictures.
  paths = [p for p in found if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
  if not paths:
    raise MediaError(folder, "holds no frames (jpg or png)", AGAIN)
  paths.sort(key=lambda p: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", p.name)])
  return [paths[i] for i in transforms.pick_files(len(paths), seconds)]
