"""Readers of the benchmarks' own files, in numpy; to add a dataset: one module and one line in DATASETS."""

from data_pipelines.ave import AVE
from data_pipelines.avsbench import AVSBench, AVSBenchMS3
from data_pipelines.base import Dataset, Source
from data_pipelines.llp import LLP
from data_pipelines.music_avqa import MusicAVQA
from data_pipelines.schema import QUESTION_TYPES, DataError, Media, MediaError, Record
from data_pipelines.tuxpaint import TuxPaint

DATASETS: dict[str, type[Dataset]] = {reader.name: reader for reader in (AVE, LLP, AVSBench, AVSBenchMS3, MusicAVQA, TuxPaint)}

__all__ = [
  "AVE",
  "DATASETS",
  "LLP",
  "QUESTION_TYPES",
  "AVSBench",
  "AVSBenchMS3",
  "DataError",
  "Dataset",
  "Media",
  "MediaError",
  "MusicAVQA",
  "Record",
  "Source",
  "TuxPaint",
]
