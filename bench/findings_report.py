"""What findings.py found: the paper's claims beside the measured differences, as a table and as a plot."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bench.findings_runs import ARMS, EQUAL, Line, Run
from bench.record import RESULTS

Results = dict[Run, Line]
SURE = 0.95  # one-sided confidence at which a difference counts
WIDEST = 8.0  # points; a paper's difference beyond this is an arrow at the edge of the plot
PARTS = {"digits": "digits, 150 training images", "cifar": "CIFAR-10, 5,000 training images"}
COLOURS = {"digits": "#1f5f99", "cifar": "#b3541e"}
LABELS = {
    "convnet": "convnet (teacher)",
    "transformer": "transformer (teacher)",
    "none": "no distillation",
    "soft": "soft distillation, equation 2",
    "soft_elements": "soft distillation, divided by the classes too",
    "hard": "hard distillation of the class token",
    "token": "hard distillation of the distillation token",
    "token_equal_convnet": "the same, from the convnet stopped as good",
    "token_equal_transformer": "the same, from the transformer as good",
    "no_randaugment": "no distillation, no RandAugment",
    "no_mixup": "no distillation, no mixup",
    "no_cutmix": "no distillation, no cutmix",
    "no_mixing": "no distillation, neither mixup nor cutmix",
    "no_erasing": "no distillation, no random erasing",
    "no_repeated": "no distillation, no repeated augmentation",
}
NONE, SOFT, HARD, ELEMENTS = ((arm, "top1") for arm in ("none", "soft", "hard", "soft_elements"))
BOTH, CLS, DIST = (("token", metric) for metric in ("top1", "top1_cls", "top1_dist"))
EQUAL_CONVNET, EQUAL_TRANSFORMER = ((f"token_equal_{kind}", "top1") for kind in ("convnet", "transformer"))


@dataclass(frozen=True)
class Finding:
    """A claim of the paper about two settings.

    Attributes:
        claim: what the paper says.
        first, second: (arm, metric) of both sides; the claim is that the first is better.
        paper: the paper's difference in points of ImageNet's top-1, of DeiT-B at 224 pixels.
        table: the number of the paper's table.
        same: whether the claim is that both are equally good.
        on_cifar: whether CIFAR-10 has these arms too.
    """

    claim: str
    first: tuple[str, str]
    second: tuple[str, str]
    paper: float
    table: int
    same: bool = False
    on_cifar: bool = False


def _leaves_out(name: str, arm: str, paper: float) -> Finding:
    return Finding(f"{name} helps", NONE, (arm, "top1"), paper, 8)


FINDINGS = (
    Finding("soft distillation is as good as none", SOFT, NONE, 0.0, 3, same=True, on_cifar=True),
    Finding("the same, divided by the classes too", ELEMENTS, NONE, 0.0, 3, same=True),
    Finding("hard distillation is better than none", HARD, NONE, 1.2, 3, on_cifar=True),
    Finding("hard distillation is better than soft", HARD, SOFT, 1.2, 3, on_cifar=True),
    Finding("distillation by a token is better than none", BOTH, NONE, 1.6, 3, on_cifar=True),
    Finding("a token is better than hard distillation without it", BOTH, HARD, 0.4, 3, on_cifar=True),
    Finding("the distillation token answers better than the class token", DIST, CLS, 0.1, 3, on_cifar=True),
    Finding("both tokens answer better than the class token", BOTH, CLS, 0.4, 3, on_cifar=True),
    Finding("both tokens answer better than the distillation token", BOTH, DIST, 0.3, 3, on_cifar=True),
    Finding("a convnet teaches better than an equal transformer", EQUAL_CONVNET, EQUAL_TRANSFORMER, 0.8, 2),
    _leaves_out("RandAugment", "no_randaugment", 2.2),
    _leaves_out("mixup", "no_mixup", 3.1),
    _leaves_out("cutmix", "no_cutmix", 1.8),
    _leaves_out("mixup or cutmix", "no_mixing", 6.0),
    _leaves_out("random erasing", "no_erasing", 77.5),
    _leaves_out("repeated augmentation", "no_repeated", 5.3),
)


@dataclass(frozen=True)
class Found:
    """A paired difference: first side minus second side, in points, one for each seed."""

    differences: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN with one seed."""
        return standard_error(self.differences)

    def verdict(self, same: bool) -> str:
        """Whether a claim holds. A difference counts if it is `SURE` by Student's t."""
        if math.isnan(self.error):
            return "one seed only"
        bound = stats.t.ppf(SURE, len(self.differences) - 1) * self.error
        if abs(self.mean) <= bound:
            return "holds: no difference shown" if same else "does not hold: no difference shown"
        if same:
            return f"does not hold: {'better' if self.mean > 0 else 'worse'}"
        return "holds" if self.mean > 0 else "does not hold: the opposite"


def standard_error(values: list[float]) -> float:
    """The standard error of the mean; NaN for a single value."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compare(part: str, finding: Finding, results: Results) -> Found | None:
    """The differences of the seeds that both sides have; None if there are none."""
    first, second = (
        {run.seed: line[metric] for run, line in results.items() if (run.part, run.arm) == (part, arm)}
        for arm, metric in (finding.first, finding.second)
    )
    seeds = sorted(first.keys() & second.keys())
    return Found([100 * (first[seed] - second[seed]) for seed in seeds]) if seeds else None


def compare_all(results: Results) -> list[tuple[str, Finding, Found]]:
    """(part, claim, difference) of every claim that has results, in the order of the table."""
    pairs = [
        (part, finding, compare(part, finding, results))
        for part in PARTS
        for finding in FINDINGS
        if part == "digits" or finding.on_cifar
    ]
    return [(part, finding, found) for part, finding, found in pairs if found]


def figures_of(results: Results) -> dict[str, float]:
    """The figures that are recorded: mean accuracies, paired differences in points and their errors."""
    figures = {}
    for part, arm in _arms(results):
        figures[f"{part}_{arm}_top1"] = round(float(np.mean(_values(results, part, arm, "top1"))), 4)
    compared = compare_all(results)
    for part, finding, found in compared:
        name = f"{part}_{_name(finding.first)}_minus_{_name(finding.second)}_points"
        figures |= {name: round(found.mean, 2), f"{name}_error": round(found.error, 2)}
    verdicts = [found.verdict(finding.same) for _, finding, found in compared]
    figures["findings"] = len(compared)
    figures["hold"] = sum(verdict.startswith("holds") for verdict in verdicts)
    figures["runs"] = len(results)
    figures["core_s"] = round(sum(line["core_s"] for line in results.values()))
    return figures


def _name(side: tuple[str, str]) -> str:
    arm, metric = side
    return arm + metric.removeprefix("top1")


def _arms(results: Results) -> list[tuple[str, str]]:
    present = {(run.part, run.arm) for run in results}
    return [(part, arm) for part in ARMS for arm in ARMS[part] if (part, arm) in present]


def _values(results: Results, part: str, arm: str, key: str) -> list[float]:
    """The values of all seeds; none if the arm does not have this figure."""
    found = [line for run, line in results.items() if (run.part, run.arm) == (part, arm)]
    return [line[key] for line in found if key in line]


def write_report(results: Results) -> None:
    """Writes findings.md and findings.png to bench/results/."""
    compared = compare_all(results)
    lines = [
        "# The paper's findings in small",
        "",
        "Written by `bench/findings.py`, which says first what is trained. Differences are in points of",
        "top-1 on the test images, means over the seeds; ± is the standard error of the paired differences.",
        f"A difference counts where Student's t gives it {SURE:.0%} of confidence (one-sided). The paper's",
        "differences are those of DeiT-B on ImageNet at 224 pixels (arXiv:2012.12877, tables 2, 3 and 8).",
        "",
        "![differences](findings.png)",
        "",
        "| data | the paper's claim | paper | here | holds? |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, finding, found in compared:
        paper = f"{finding.paper:+.1f} (table {finding.table})"
        here = f"{found.mean:+.2f} ± {found.error:.2f}"
        lines.append(f"| {part} | {finding.claim} | {paper} | {here} | {found.verdict(finding.same)} |")
    lines += ["", *_accuracies(results), "", *_teachers(results)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "findings.md").write_text("\n".join(lines) + "\n")
    plot(compared)


def _accuracies(results: Results) -> list[str]:
    """The top-1 of every arm, in percent: with a distillation token also of both tokens alone."""
    lines = ["| data | arm | seeds | top-1 | class token | distillation token |", "| --- " * 6 + "|"]
    for part, arm in _arms(results):
        cells = [_percent(_values(results, part, arm, key)) for key in ("top1", "top1_cls", "top1_dist")]
        seeds = len(_values(results, part, arm, "top1"))
        lines.append(f"| {part} | {LABELS[arm]} | {seeds} | {' | '.join(cells)} |")
    return lines


def _percent(fractions: list[float]) -> str:
    if not fractions:
        return ""
    return f"{100 * np.mean(fractions):.2f} ± {100 * standard_error(fractions):.2f}"


def _teachers(results: Results) -> list[str]:
    """How good the teachers of equal accuracy were."""
    pairs = [_values(results, "digits", arm, "teacher_top1") for arm, _ in (EQUAL_CONVNET, EQUAL_TRANSFORMER)]
    if not all(pairs):
        return []
    each = [", ".join(f"{100 * top1:.1f}" for top1 in pair) for pair in pairs]
    largest = max(abs(a - b) for a, b in zip(*pairs, strict=False))
    kept = "within" if largest <= EQUAL else "**not** within"
    return [
        f"Top-1 of the teachers of equal accuracy, by seed: convnets {each[0]}; transformers {each[1]}.",
        "The better one was stopped at the evaluation that was nearest to the other's last one. They differ",
        f"by {100 * largest:.1f} points at most, {kept} one point.",
    ]


def plot(compared: list[tuple[str, Finding, Found]]) -> None:
    """Draws the differences with their standard errors, and the paper's beside them, to findings.png."""
    from matplotlib.figure import Figure

    rows = len(compared)
    figure = Figure(figsize=(10, 1.3 + 0.34 * rows), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#999999", linewidth=1)
    for row, (part, finding, found) in enumerate(compared):
        error = 0.0 if math.isnan(found.error) else found.error
        axes.errorbar(found.mean, row, xerr=error, fmt="o", color=COLOURS[part], capsize=3, label=PARTS[part])
        inside = min(finding.paper, WIDEST)
        marker = ">" if finding.paper > WIDEST else "D"
        axes.plot(
            inside, row, marker, color="#333333", markerfacecolor="none", label="paper, DeiT-B on ImageNet"
        )
        if finding.paper > WIDEST:
            axes.annotate(f"{finding.paper:g}", (inside, row), (-6, 0), textcoords="offset points",
                          ha="right", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(rows), [finding.claim for _, finding, _ in compared], fontsize=10)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlabel("difference of top-1 in points (bars: standard error of the paired differences)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    borders = [row for row in range(1, rows) if compared[row][0] != compared[row - 1][0]]
    for border in borders:
        axes.axhline(border - 0.5, color="#999999", linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(RESULTS / "findings.png", dpi=110)
