"""python -m data_pipelines.toybox --out=DIR [--seed=0] [--size=default|tiny]: composes the toybox."""

import argparse
import sys

from data_pipelines.schema import DataError, refuse
from data_pipelines.toybox.compose import SIZES, compose


def main(arguments: list[str] | None = None) -> int:
  """Parses the command line, composes, prints the folder -> exit code (2: the user can mend it)."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.toybox",
    description=(
      "Composes audio-visual scenes with exact truth into the layouts of AVE, LLP, AVSBench (S4 and MS3) and MUSIC-AVQA."
    ),
  )
  parser.add_argument("--out", required=True, help="data root to make")
  parser.add_argument("--seed", type=int, default=0, help="all chance comes from it (default 0)")
  parser.add_argument("--size", choices=tuple(SIZES), default="default", help="number of clips")
  parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 8)")
  options = parser.parse_args(arguments)
  if options.seed < 0 or (options.workers is not None and options.workers < 1):
    parser.error("--seed must be 0 or more, --workers 1 or more")
  try:
    print(compose(options.out, seed=options.seed, sizes=SIZES[options.size], workers=options.workers))
  except (DataError, OSError) as error:
    return refuse(error)
  return 0


if __name__ == "__main__":
  sys.exit(main())
