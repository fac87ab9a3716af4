"""Search for the best way to train a distilled vision transformer, on a laptop or a Ray cluster."""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "Experiment": "experiment.config",
    "load_experiment": "experiment.load",
    "Session": "terminal.session",
    "prepare": "data.prepare",
    "plan": "commands.plan",
    "train": "trial.run",
    "continue_run": "commands.continuing",
    "tune": "study.search",
    "resume_study": "study.search",
    "plan_resume": "study.search",
    "Study": "study.study",
    "sync": "study.sync",
    "compare": "commands.diff",
    "reproduce": "commands.reproduce",
    "verify_best": "commands.predict",
    "report": "commands.report",
    "export": "commands.export",
    "evaluate": "commands.predict",
    "save_answers": "commands.mistakes",
    "predict": "commands.predict",
    "bench_data": "commands.bench_data",
    "bench_model": "commands.bench_model",
    "UserError": "errors",
}
__all__ = [*_EXPORTS]


def __getattr__(name: str):
    """Imports an exported name on its first use: Ray's task workers need few of them, and start fast."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'deit_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deit_ray.{_EXPORTS[name]}"), name)
