"""The names of the metrics that a trial of the digits reports: after a step, and after an evaluation."""

TRAIN = ("train/loss", "train/loss_label", "train/loss_teacher", "train/lr")
EVALUATION = (
    "val/loss", "val/top1", "val/top1_cls", "val/top1_dist", "val/top1_ema", "val/top5", "val/images",
    "perf/images_per_s", "perf/data_wait_frac", "perf/step_frac", "perf/evaluation_frac",
    "perf/checkpoint_frac", "perf/other_frac", "perf/spilled_bytes", "data/bad_images",
    "data/bad_images_total", "cost/cpu_hours", "system/cpu_percent",
    "system/memory_percent", "epoch",
)  # fmt: skip
