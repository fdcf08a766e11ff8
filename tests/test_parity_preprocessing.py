"""Front ends and resized positions equal the processors and models of Hugging Face transformers (marker `parity`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines import transforms
from phpjax import convert
from phpjax.encoders import audio_frontend, pretrained, resize, vit
from phpjax.encoders.htsat import HTSAT

pytestmark = pytest.mark.parity


def sounds(rate_hz, seconds=2.0, seed=0):
  """Noise under a decaying tone, and plain noise: float32 [2, samples]."""
  t = np.arange(int(rate_hz * seconds)) / rate_hz
  noise = np.random.default_rng(seed).normal(0, 0.05, (2, len(t)))
  return (noise + np.stack([0.3 * np.sin(2 * np.pi * 440 * t) * np.exp(-t), 0 * t])).astype(np.float32)


def picture(size, seed=0):
  """A smooth coloured picture with edges."""
  small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
  return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("size", [(300, 300), (640, 480), (31, 64), (224, 500)])
def test_pictures_like_the_clip_processor(size):
  import transformers

  image = picture(size)
  theirs = transformers.CLIPImageProcessor()(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  ours = np.asarray(vit.normalise(transforms.resize_image(image, 224, crop=True)[None], "clip"))[0]
  mean, std = (np.asarray(x) for x in vit.STATISTICS["clip"])
  assert np.abs((ours * std + mean) - (theirs * std + mean)).max() <= 1 / 255 + 1e-6


def test_device_resize_like_pillow():
  for before, after in ((300, 224), (100, 224), (640, 224)):
    image = picture((before, before), seed=before)
    ours = np.asarray(vit.resize_pixels(np.asarray(image)[None], after))[0]
    assert np.abs(ours.astype(int) - transforms.resize_image(image, after)).max() <= 1


def test_kaldi_fbank_like_the_ast_processor():
  import transformers

  wave = sounds(16_000, 1.0)
  theirs = transformers.ASTFeatureExtractor(max_length=98)(list(wave), sampling_rate=16_000, return_tensors="np")[
    "input_values"
  ]
  fbank = np.asarray(audio_frontend.kaldi_fbank(jnp.asarray(wave)))
  module = pretrained.make_encoder("ast_base")
  np.testing.assert_allclose((fbank - module.mean) / (2 * module.std), theirs, atol=1e-3)


def test_log_mel_like_the_clap_processor():
  import transformers

  wave = sounds(48_000, 10.0)
  extractor = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
  theirs = extractor(list(wave), sampling_rate=48_000, return_tensors="np")["input_features"][:, 0]
  bank = audio_frontend.slaney_mel_bank(64, 1024, 48_000, 50.0, 14_000.0)
  ours = np.asarray(audio_frontend.log_mel(jnp.asarray(wave), bank, 1024, 480))
  np.testing.assert_allclose(ours, theirs, atol=1e-3 * theirs.std())


def test_log_mel_like_the_whisper_processor():
  import transformers

  wave = sounds(16_000, 2.0)
  extractor = transformers.WhisperFeatureExtractor(chunk_length=2)
  theirs = extractor(list(wave), sampling_rate=16_000, return_tensors="np")["input_features"]
  ours = np.asarray(audio_frontend.whisper_log_mel(jnp.asarray(wave)))
  np.testing.assert_allclose(ours.swapaxes(1, 2), theirs, atol=1e-3)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), [(7, 16), (37, 16), (12, 12), (101, 128)])
def test_resize_like_torch(before, after, align_corners):
  import torch

  x = np.random.default_rng(0).normal(size=(before, before, 3)).astype(np.float32)
  for kind, mode in (("cubic", "bicubic"), ("linear", "bilinear")):
    theirs = torch.nn.functional.interpolate(
      torch.from_numpy(x.transpose(2, 0, 1)[None]), size=(after, after), mode=mode, align_corners=align_corners
    )[0].permute(1, 2, 0)
    ours = resize.resize(resize.resize(x, 0, after, kind, align_corners), 1, after, kind, align_corners)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize(("kind", "encoder"), [("Dinov2", "dinov2_s14"), ("CLIP", "clip_vit_b32")])
def test_another_image_size(kind, encoder, tmp_path):
  """Positions resized when the weights are opened, against resizing inside the model."""
  import torch
  from test_parity_encoders import CASES, build

  case = next(c for c in CASES if c.encoder == encoder)
  arguments, sizes = case.tiny
  model = build(kind, arguments, tmp_path / "in")
  convert.convert(encoder, tmp_path / "in", tmp_path / "out", **sizes)
  size = 2 * sizes["image_size"]
  opened = pretrained.load(encoder, str(tmp_path / "out"), modality="visual", image_size=size)
  pixels, theirs = case.inputs(opened.module, np.random.default_rng(0))
  inputs = torch.from_numpy(theirs["pixel_values"])
  with torch.inference_mode():
    if kind == "CLIP":
      expected = model.visual_projection(model.vision_model(inputs, interpolate_pos_encoding=True).pooler_output).numpy()
    else:
      expected = model(inputs).pooler_output.numpy()
  with jax.default_matmul_precision("highest"):
    ours = opened.module.apply({"params": opened.params}, pixels).pooled
  assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


def test_clap_from_sound_to_logits(tmp_path):
  """The whole of CLAP: waves and texts to both logits."""
  import torch
  import transformers
  from test_parity_encoders import CASES, TOKENIZER, build

  cases = {c.encoder: c for c in CASES}
  model = build("Clap", cases["htsat_tiny"].full, tmp_path / "in")
  wave = sounds(48_000, 10.0)
  mel = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
  features = mel(list(wave), sampling_rate=48_000, return_tensors="pt")
  ids = np.random.default_rng(0).integers(3, 50_000, (3, 9))
  with torch.inference_mode():
    out = model(torch.from_numpy(ids), features["input_features"], is_longer=torch.zeros(2, 1, dtype=bool))
  sizes = {"sample_rate_hz": 48_000, "hop": 480, "seconds": 10.0, "repeats": 1}
  convert.convert("htsat_tiny", tmp_path / "in", tmp_path / "audio", **sizes)
  convert.convert("roberta_base", tmp_path / "in", tmp_path / "text", tokenizer_source=TOKENIZER)
  audio = pretrained.load("htsat_tiny", str(tmp_path / "audio"), modality="audio")
  text = pretrained.load("roberta_base", str(tmp_path / "text"), modality="text")
  assert isinstance(audio.module, HTSAT)
  with jax.default_matmul_precision("highest"):
    a = audio.module.apply({"params": audio.params}, jnp.asarray(wave)).pooled
    t = text.module.apply({"params": text.params}, jnp.asarray(ids, jnp.int32)).pooled
  a, t = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, t))
  for ours, theirs, scale in (
    (a @ t.T, out.logits_per_audio, audio.params["logit_scale"]),
    (t @ a.T, out.logits_per_text, text.params["logit_scale"]),
  ):
    ours, theirs = np.asarray(jnp.exp(scale) * ours), theirs.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.exp(float(scale))


SENTENCE = "a dog's barking loudly while 2 CARS pass, don't you hear it? café naïve (1998) rain-drops fall; it's 7:45 ... piano"


def captions(count=200):
  """Sentences with capitals, digits, apostrophes, accents and odd spaces."""
  rng, words, ends = np.random.default_rng(0), SENTENCE.split(), ["", ".", " !", "  "]
  return [" ".join(rng.choice(words, rng.integers(2, 12))) + rng.choice(ends) for _ in range(count)]


def vocabularies(folder):
  """Small vocabularies of the three kinds, trained on the captions."""
  import json

  import tokenizers

  texts = captions()
  for name, suffix in (("clip", "</w>"), ("roberta", "")):
    (folder / name).mkdir()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|startoftext|>", "<|endoftext|>"] if suffix else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = {"end_of_word_suffix": suffix} if suffix else {}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**words))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if suffix:
      model.normalizer = tokenizers.normalizers.Lowercase()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=600, initial_alphabet=alphabet, special_tokens=[] if suffix else special, **words
    )
    model.train_from_iterator(texts, trainer)
    model.model.save(str(folder / name))
    table = json.loads((folder / name / "vocab.json").read_text())
    for word in [*(f"{letter}{suffix}" for letter in alphabet if suffix), *special]:
      table.setdefault(word, len(table))
    if suffix:  # CLIP finds the end of a text by its largest id
      ends = {word: table.pop(word) for word in special}
      table = {word: i for i, word in enumerate(sorted(table, key=table.get))} | {w: len(table) + i for i, w in enumerate(ends)}
    (folder / name / "vocab.json").write_text(json.dumps(table))
  (folder / "bert").mkdir()
  model = tokenizers.implementations.BertWordPieceTokenizer(lowercase=True)
  model.train_from_iterator(texts, vocab_size=300)
  model.save_model(str(folder / "bert"))


def test_tokens_like_the_published_tokenizers(tmp_path):
  import transformers

  from phpjax.encoders.tokenizer import FILE, Tokenizer, from_files

  vocabularies(tmp_path)
  for name, kind, pad in (("clip", "CLIPTokenizer", 0), ("roberta", "RobertaTokenizer", 1), ("bert", "BertTokenizer", 0)):
    theirs = getattr(transformers, kind).from_pretrained(str(tmp_path / name))
    from_files(tmp_path / name).save(str(tmp_path / FILE))
    ours = Tokenizer(tmp_path / FILE, pad)
    for text in captions():
      np.testing.assert_array_equal(ours([text], 512)[0], theirs(text)["input_ids"], err_msg=f"{name}: {text!r}")
