"""The files that make a model.safetensors an MLflow model, written without torch.

The model is loaded by a file of this package that MLflow imports, so nothing is ever unpickled.
"""

import base64
import io
import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

import deit_ray
from deit_ray.outcome import MODEL

LOADER = "deit_ray.commands.classify"  # has `_load_pyfunc`
# the packages on which the answer of a model depends; deit-ray's own version comes first
PACKAGES = (
    "mlflow",
    "torch",
    "timm",
    "safetensors",
    "numpy",
    "pandas",
    "opencv-python-headless",
    "simplejpeg",
    "pillow",
)
EXAMPLE_SIZE = 32  # pixels of the side of the example image


def write_model_files(folder: Path, weights_bytes: int, run_id: str, model_id: str) -> None:
    """Writes the files of an MLflow model's folder, all but its model.safetensors.

    Args:
        weights_bytes: size of the model.safetensors.
        run_id, model_id: MLflow's ids of the run and of its model.
    """
    for name, text in common_files().items():
        (folder / name).write_text(text)
    (folder / "MLmodel").write_text(_describe_model(weights_bytes, run_id, model_id))


@cache
def common_files() -> dict[str, str]:
    """The content of the files that all models have, by name."""
    requirements = pinned_packages()
    example = {"columns": ["image"], "data": [[base64.encodebytes(example_image()).decode()]]}
    return {
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
        "python_env.yaml": _yaml(_python_environment()),
        "conda.yaml": _yaml(_conda_environment(requirements)),
        "input_example.json": json.dumps(example),
        "serving_input_example.json": json.dumps({"dataframe_split": example}, indent=2),
    }


def pinned_packages() -> list[str]:
    """This package and what determines its answers, as lines of a requirements.txt."""
    pinned = [f"deit-ray=={deit_ray.__version__}"]
    for name in PACKAGES:
        try:
            # without the part that names a build, such as +cpu, which PyPI does not have
            pinned.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:  # another package has its module, such as opencv-python
            continue
    return pinned


def example_image() -> bytes:
    """A small picture, as a PNG: dark above, bright below."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((EXAMPLE_SIZE, EXAMPLE_SIZE)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _describe_model(weights_bytes: int, run_id: str, model_id: str) -> str:
    from mlflow.models import Model

    model = Model(
        run_id=run_id,
        signature=_signature(),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "dataframe",
            "pandas_orient": "split",
            "serving_input_path": "serving_input_example.json",
        },
        model_uuid=model_id,
        model_id=model_id,
        model_size_bytes=weights_bytes,
    )
    environment = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
    model.add_flavor(
        "python_function",
        loader_module=LOADER,
        data=MODEL,
        python_version=platform.python_version(),
        env=environment,
    )
    return model.to_yaml()


def _signature():
    """Image files in, their classes out; see `commands.classify.MlflowModel.predict`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    outputs = [
        ColSpec(DataType.string, "class", required=False),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(Array(DataType.string), "classes"),
        ColSpec(Array(DataType.double), "probabilities"),
        ColSpec(DataType.string, "problem", required=False),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(outputs),
        params=ParamSchema([ParamSpec("top", DataType.long, 5)]),
    )


def _python_environment() -> dict:
    return {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}


def _conda_environment(requirements: list[str]) -> dict:
    python = f"python={platform.python_version()}"
    return {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [python, "pip", {"pip": requirements}],
    }


def _yaml(content: dict) -> str:
    return yaml.safe_dump(content, sort_keys=False)
