"""docs/notebook.ipynb runs as it is written, on another study."""

import json

import matplotlib
import matplotlib.pyplot
import pytest

from deit_ray.commands.predict import predict
from tests.conftest import ROOT


def test_every_cell_of_the_notebook_runs(finished_study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert "".join(parameters["source"]).endswith('STUDY, RESULTS = "digits_search", "results"')
    names = {"STUDY": finished_study.name, "RESULTS": str(finished_study.results)}
    for cell in cells:
        if cell is not parameters:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

    study = names["study"]
    assert study.story()._repr_markdown_().startswith(f"**{study.name}: all trials have ended**")
    assert "label: " in capsys.readouterr().out
    assert list(names["accuracy"].columns) == list(range(3))
    assert names["accuracy"][0].max() == study.trials()["best"][0]
    assert len(names["axes"].lines) == 3
    matplotlib.pyplot.close("all")
    names["image"].save(tmp_path / "first.png")  # its pixels without their loss
    (answer,) = predict(f"{study.folder}/model.safetensors", [str(tmp_path / "first.png")])
    assert names["prediction"] == pytest.approx(dict(answer.classes), abs=1e-6)
    assert (tmp_path / f"{study.name}.html").stat().st_size > 1e6
