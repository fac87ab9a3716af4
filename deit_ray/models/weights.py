"""Files of weights that people have: read safely, by their content, with one sentence about what is wrong.

Nothing but tensors is ever read from a file: a pickle that needs other objects is refused.
"""

import argparse
import json
import logging
import urllib.error
import urllib.request
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import nn

from deit_ray.errors import UserError, lines_of

METADATA = "deit_ray"  # the key of the description in a model.safetensors
DESCRIBED = ("model", "arguments", "classes", "image_size", "eval_crop", "mean", "std")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # of training scripts, the average first
MOST_HEADER = 100_000_000  # bytes of the header of a safetensors file
PROBE_S = 5.0  # longest wait for an answer of the server that has timm's weights
KINDS = "allowed are .safetensors files and files of torch.save(model.state_dict(), FILE)"


def read_weights(path: str | Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name: of a .safetensors file or of torch.save.

    A state dict may lie under `model`, `state_dict` or their moving averages, and its names may begin with
    `module.`.

    Args:
        key: the experiment's key, or what the file is, for errors.

    Raises:
        UserError: there is no such file, or no weights can be read from it.
    """
    where = f"{key}: {path}"
    kind = _kind_of(Path(path), where)
    try:
        found = load_file(path) if kind == "safetensors" else _load_pickle(path)
    except SafetensorError as error:
        raise UserError(f"{where}: the file is cut or damaged ({_brief(error)}); copy it again") from None
    except _OtherObjects as error:
        raise UserError(
            f"{where}: has {error} beside the tensors, which may run code and is not loaded; "
            "save the tensors alone with: torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # torch and pickle each raise their own
        raise UserError(f"{where}: the file is cut or damaged ({_brief(error)}); copy it again") from None
    while isinstance(found, dict) and (inner := _inside(found)) is not None:
        found = inner
    if not isinstance(found, dict):
        raise UserError(f"{where}: has a {type(found).__name__}, not weights by name; {KINDS}")
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{where}: has no tensors; {KINDS}")
    return clean_state_dict(tensors)


def read_description(path: str | Path, key: str = "MODEL") -> dict | None:
    """The description that `student.save_model` wrote into a file; None if another program wrote the file.

    Raises:
        UserError: the file cannot be read.
    """
    where = f"{key}: {path}"
    if _kind_of(Path(path), where) != "safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(METADATA)
        return json.loads(found) if found else None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: the file is cut or damaged ({_brief(error)}); copy it again") from None


def load_described(path: str | Path, key: str = "MODEL") -> tuple[nn.Module, dict]:
    """The model in a file that `student.save_model` wrote, with its weights, and its description.

    Raises:
        UserError: deit-ray did not write the file, or its weights are not those of its model.
    """
    description = read_description(path, key)
    if description is None:
        raise UserError(
            f"{key}: {path}: not a model.safetensors that deit-ray wrote: it does not say which model and "
            "classes it is"
        )
    if lacking := [name for name in DESCRIBED if name not in description]:
        raise UserError(
            f"{key}: {path}: its description has no {', '.join(lacking)}; use the file as it was written"
        )
    state = read_weights(path, key)
    try:
        model = timm.create_model(description["model"], **description["arguments"])
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{key}: {path}: its weights do not fit {description['model']}, which it describes: "
            f"{_brief(error)}"
        ) from None
    return model, description


def make_model(name: str, drop_path: float, arguments: dict) -> nn.Module:
    """timm's model with its first weights; `drop_path` 0 suits models that have no such thing, too."""
    try:
        return timm.create_model(name, drop_path_rate=drop_path, **arguments)
    except TypeError as error:
        if drop_path or "drop_path_rate" not in str(error):
            raise
    return timm.create_model(name, **arguments)


def create_pretrained(name: str, arguments: dict, key: str, drop_path: float = 0.0) -> nn.Module:
    """A model with timm's pretrained weights, from this machine's cache or else from the network.

    Raises:
        UserError: timm has no weights for it, they do not fit the arguments, or they cannot be had here.
    """
    config = timm.get_pretrained_cfg(name)
    repository, url = config.hf_hub_id, config.url
    if not (repository or url or config.file):
        raise UserError(f"{key}: timm has no pretrained weights of {name}; name a file, or another model")
    cached = _cached(repository, config.hf_hub_filename) if repository else None
    if not cached and (repository or url):
        server = constants.ENDPOINT if repository else url
        remedy = f"on a machine with a network, download {_link(repository, url)}, and name the file in {key}"
        if constants.HF_HUB_OFFLINE and repository:
            raise UserError(f"{key}: pretrained weights of {name}: HF_HUB_OFFLINE is set; {remedy}")
        if why := _no_answer(server):
            raise UserError(
                f"{key}: pretrained weights of {name}: {server} cannot be reached ({why}); {remedy}"
            )
    given = arguments | {"pretrained": True, "pretrained_cfg_overlay": {"file": cached} if cached else None}
    chatter = logging.getLogger("huggingface_hub")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        return make_model(name, drop_path, given)
    except Exception as error:  # timm, the hub's client and torch each raise their own
        raise UserError(
            f"{key}: the pretrained weights of {name} cannot be loaded: {_brief(error)}"
        ) from None
    finally:
        chatter.setLevel(level)


class _OtherObjects(Exception):
    """A pickle needs other objects than tensors; the message names them."""


def _kind_of(path: Path, where: str) -> str:
    """`safetensors` or `pickle`, by the file's first bytes.

    Raises:
        UserError: there is no such file, it cannot be read, or it is something else.
    """
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name the file of weights in it")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{where}: the file is empty")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch.save since 1.6, and before
        return "pickle"
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(f"{where}: is a web page, not a file of weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{where}: is Git's pointer to the file; fetch the file with: git lfs pull")
    raise UserError(f"{where}: is not a file of weights; {KINDS}")


def _load_pickle(path: str | Path):
    # timm's training script saves its arguments; of a path, torch believes the suffix
    with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            if other := _other_objects(path):
                raise _OtherObjects(other) from None
            raise


def _other_objects(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the file is damaged, which the caller says
        return ""
    return ", ".join(sorted(set(names) - {"argparse.Namespace"}))


def _inside(found: dict) -> dict | None:
    """The state dict that a training script put under a name of its own."""
    return next((found[name] for name in WRAPPERS if isinstance(found.get(name), dict)), None)


def _cached(repository: str, file: str | None) -> str | None:
    """The path of a hub repository's weights in this machine's cache."""
    repository, _, revision = repository.partition("@")
    for name in [file] if file else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return found
    return None


def _link(repository: str | None, url: str | None) -> str:
    return f"{constants.ENDPOINT}/{repository.partition('@')[0]}" if repository else str(url)


def _no_answer(server: str) -> str | None:
    """Why a server does not answer, in words; None if it answers, whatever it says."""
    try:
        urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=PROBE_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", None) or error).partition("] ")[2] or str(error)
    return None


def _brief(error: BaseException) -> str:
    """The first line of an error, without an exception's name."""
    lines = lines_of(str(error))
    text = (
        " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else "no reason given"
    )
    return text.removeprefix("Error while deserializing header: ").rstrip(".")
