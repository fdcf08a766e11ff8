"""The scores equal the public evaluators' on golden inputs.

PHPJAX_GOLDEN_METRICS names another folder of such files; sizes and expectations come from the files. Those of AVVP on the
official label files are compared in tests/test_metrics_annotations.py.
"""

import os
import pathlib
import re

import numpy as np

from phpjax.metrics import ave, avqa, avs, avvp, continual, grounding, retrieval, rows

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = pathlib.Path(os.environ.get("PHPJAX_GOLDEN_METRICS", HERE / "golden" / "metrics"))
COLUMNS = ("A", "V", "AV", "Type@AV", "Event@AV")


def golden(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    return dict(file)


def close(actual, expected, tolerance: float = 1e-6) -> None:
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def ten(scores: dict[str, float]) -> list[float]:
  """The ten AVVP scores in percent, in the order of the golden files."""
  return [100 * scores[f"{level}/{column}"] for level in avvp.LEVELS for column in COLUMNS]


def test_ave():
  g = golden("ave")
  label = g["labels"].argmax(-1)
  close(ave.evaluate(g["scores29"], label)[ave.MAIN], g["acc_argmax29"])
  heads = g["is_event_logits"], g["event_logits28"]
  close(100 * ave.evaluate_two_heads(*heads, label)[ave.MAIN], g["acc_cmbs_percent"])
  one_by_one = [100 * ave.evaluate_two_heads(heads[0][[n]], heads[1][[n]], label[[n]])[ave.MAIN] for n in range(len(label))]
  close(one_by_one, g["acc_cmbs_per_video_percent"])


def test_ave_counts_are_not_a_mean_of_batches():
  g = golden("ave")
  parts = [slice(start, start + 8) for start in range(0, len(g["labels"]), 8)]
  label, heads = g["labels"].argmax(-1), (g["is_event_logits"], g["event_logits28"])
  biased = np.mean([ave.evaluate_two_heads(heads[0][p], heads[1][p], label[p])[ave.MAIN] for p in parts])
  close(100 * biased, g["acc_cmbs_mean_of_batch8_percent"])
  predicted = ave.decide_two_heads(*heads)
  joined = rows.join([ave.statistics(predicted[p], label[p], background=28) for p in parts])
  close(100 * ave.summarise(joined)[ave.MAIN], g["acc_cmbs_percent"])


def avvp_grids(g: dict[str, np.ndarray]) -> list[np.ndarray]:
  return [g[name].transpose(0, 2, 1) for name in ("pred_audio", "pred_visual", "gt_audio", "gt_visual")]


def test_avvp():
  g = golden("avvp")
  grids = avvp_grids(g)
  expected = np.concatenate([g["segment_A_V_AV_TypeAV_EventAV"], g["event_A_V_AV_TypeAV_EventAV"]])
  close(ten(avvp.evaluate(*grids)), expected)
  stats = avvp.statistics(*grids)
  for level in avvp.LEVELS:
    close(stats[level][:, [0, 1, 3, 2]], g[f"{level}_per_video_a_v_all_av"])


def test_avvp_event_matcher():
  g = golden("avvp")
  counts = avvp.event_counts(g["unit_pred"][..., None] > 0.5, g["unit_gt"][..., None] > 0.5)
  np.testing.assert_array_equal(counts[..., 0].T, g["unit_tp_fp_fn"])


def test_php_simplified():
  g = golden("php_simplified")
  shape = (*g["ave_gt"].shape[:2], -1)
  close(ave.evaluate(g["ave_scores"].reshape(shape), g["ave_gt"].argmax(-1))[ave.MAIN], g["ave_top1"])
  scores = avvp.php_top1(g["llp_segment_scores"], g["llp_multi_hot"])
  close(scores["php_top1"], g["llp_top1"])
  close(scores["any_label_accuracy"], g["llp_any_label_hit"])


def test_avs():
  g = golden("avs")
  stats = avs.statistics(g["logits"], g["gt"])
  close(stats["iou"].ravel(), g["iou_per_frame"], 1e-5)
  close(stats["iou"].mean(-1), g["miou_per_video"], 1e-5)
  f = [avs.evaluate(g["logits"][[n]], g["gt"][[n]])["f"] for n in range(len(g["gt"]))]
  close(f, g["f_per_video_batch1"], 1e-5)
  scores = avs.evaluate(g["logits"], g["gt"])
  close([scores["miou"], scores["f"]], g["score_batch1_miou_F"], 1e-5)
  close([scores["miou_batch4"], scores["f_batch4"]], g["score_batch4_miou_F"], 1e-5)
  close(scores["miou"], g["miou_all"], 1e-5)
  close(avs.grouped(stats, 3), g["score_batch3_ragged_miou_F"], 1e-5)  # what a ragged last batch does to both
  close(avs.grouped(stats, len(g["gt"]))[1], g["F_whole_set_one_batch"], 1e-5)


def test_avqa():
  g = golden("avqa")
  assert ["/".join(names) for names in avqa.QUESTION_TYPES] == list(g["type_names"])
  scores = avqa.evaluate(g["logits"], g["target"], g["type_index"])
  short = {"A": "Audio", "V": "Visual", "AV": "Audio-Visual"}
  for name, expected, printed in zip(g["metric_names"], g["accuracy_percent"], g["official_printed_percent_2dp"], strict=True):
    modality, _, kind = str(name).partition("_")
    key = "accuracy" if name == "Overall" else short[modality] + ("" if kind == "Avg" else f"/{kind}")
    assert f"{100 * scores[key]:.2f}" == f"{printed:.2f}"
    close(100 * scores.pop(key), expected)
  assert not scores


def test_audio_text_retrieval():
  g = golden("retrieval_audio_text")
  captions = int(g["captions_per_audio"])
  owner = np.arange(len(g["caption_emb"])) // captions
  number = np.arange(len(g["audio_emb"]))
  stats = {
    "a2t": retrieval.statistics(g["audio_emb"], g["caption_emb"], number, owner),
    "t2a": retrieval.statistics(g["caption_emb"], g["audio_emb"], owner, number),
  }
  np.testing.assert_array_equal(stats["a2t"]["rank"], g["a2t_best_rank0"])
  np.testing.assert_array_equal(stats["t2a"]["rank"], g["t2a_rank0"])
  for direction in stats:
    scores = retrieval.summarise(stats[direction])
    close([scores[name] * (1 if name in ("medR", "meanR") else 100) for name in g["metric_names"]], g[direction])
    names = ("R@1", "R@5", "R@10", "mAP@10") if direction == "t2a" else ("R@1", "R@5", "R@10")
    close([scores[name] for name in names], g[f"laion_{direction}"][: len(names)])
  # LAION's evaluator does not sort the ranks of a clip's captions; what it calls a precision is more than 1.
  assert g["laion_a2t"][3] > 1 >= retrieval.summarise(stats["a2t"])["mAP@10"]
  both = retrieval.evaluate(g["audio_emb"], g["caption_emb"], owner)
  close([100 * both["to_text/R@1"], 100 * both["from_text/mAP@10"]], [g["a2t"][0], g["t2a"][-1]])


def test_image_text_retrieval_inside_the_tasks_of_lpi():
  g = golden("retrieval_image_text_lpi")
  number = np.arange(len(g["image_emb"]))
  owner = np.repeat(number, g["captions_per_image"])
  to_text = retrieval.statistics(g["image_emb"], g["text_emb"], number, owner)["rank"]
  from_text = retrieval.statistics(g["text_emb"], g["image_emb"], owner, number)["rank"]
  close(100 * retrieval.recall_per_task(to_text, g["image_task"]), g["i2t_per_task_R1_R5_R10"])
  close(100 * retrieval.recall_per_task(from_text, g["text_task"]), g["t2i_per_task_R1_R5_R10"])


def test_referring_expressions():
  g = golden("refexp")
  assert tuple(g["k"]) == grounding.FIRST
  scores = grounding.evaluate(g["pred_xyxy"], g["scores"], g["gt_xywh"])
  close([scores[f"giou/P@{k}"] for k in g["k"]], g["precision_giou_official"])
  close([scores[f"iou/P@{k}"] for k in g["k"]], g["precision_plain_iou"])
  best = g["pred_xyxy"][np.arange(len(g["scores"])), g["scores"].argmax(-1)]
  found = grounding.overlaps(best, np.concatenate([g["gt_xywh"][:, :2], g["gt_xywh"][:, :2] + g["gt_xywh"][:, 2:]], -1))
  close(np.stack([found["giou"], found["iou"]], -1), g["top1_giou_iou"], 1e-5)  # float32 boxes


def test_no_golden_file_is_left_out():
  asked = set(re.findall(r'golden\("(\w+)"\)', pathlib.Path(__file__).read_text()))
  assert {path.stem for path in GOLDEN.glob("*.npz")} == asked


def test_continual():
  g = golden("continual")
  matrix = g["R"]
  lower = [[score if j <= i else None for j, score in enumerate(row)] for i, row in enumerate(matrix)]
  close(continual.average_accuracy(lower), g["average_accuracy_per_step"])
  close(continual.forgetting(lower), g["forgetting_per_step_chaudhry"])
  close(continual.forgetting_since_learned(lower), g["forgetting_vs_just_learned"])
  close(continual.bwt(lower), g["bwt_per_step"])
  close(continual.fwt(matrix, g["random_baseline"]), g["fwt"])
  scores = continual.summarise(lower)
  expected = {
    "mean_accuracy": "final_average_accuracy",
    "mean_of_average_accuracy": "mean_of_average_accuracy",
    "forgetting": "final_forgetting",
    "bwt": "final_bwt",
    "lpi_average": "lpi_average_precision",
    "lpi_forgetting": "lpi_average_forget",
  }
  for ours, theirs in expected.items():
    close(scores[ours], g[theirs])
