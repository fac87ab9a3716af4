"""Which measurements of a journal are curves in MLflow: those that people compare.

MLflow's pages take longer with each metric (mlflow #11927, #21841), and a study has hundreds of runs. The
journal keeps all measurements. MLflow sorts its charts by the part of a name before the slash.
"""

# The first two are constant within a study, the third is summed up in bad_images.csv, an artifact. The shares
# of time that are left out are small or follow from the others; see docs/architecture.md.
LEFT_OUT = frozenset(
    (
        "val/images",
        "test/images",
        "data/bad_images",
        "data/bad_images_total",
        "perf/evaluation_frac",
        "perf/checkpoint_frac",
        "perf/other_frac",
    )
)


def is_curve(name: str) -> bool:
    """Whether a measurement is delivered to MLflow."""
    return name not in LEFT_OUT
