"""The side files of a model that are copied with its weights: tokenizer, processor, licence.

A tokenizer's files may have any name, so a list of names to copy could be incomplete, and the
output would not load. So all files at the top of a folder are copied, except for those that
:data:`WEIGHT_FILES` and :data:`KEPT_BACK` match, and files so long that they must be weights.
Subfolders contain checkpoints of the training, weights in other formats and results of evaluations:
from subfolders only files are copied that the model's configs name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from starmerge_models.errors import StarmergeError
from starmerge_models.parsing import parse_json
from starmerge_models.reading import read_bytes
from starmerge_models.storage import Place, is_file, real, storage_of
from starmerge_models.storage.publishing import REPORT

INDEX = "*.index.json"
"""The index of weights in several files."""

WEIGHT_FILES = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.ckpt.*", "*.ckpt-*", "*.h5"),
    *("*.keras", "*.msgpack", "*.ot", "*.pdparams", "*.npz", "*.npy", "*.pkl", "*.pickle"),
    *("*.gguf", "*.ggml", "*.llamafile", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite"),
    *("*.litertlm", "*.task", "*.mlmodel", "*.nemo", "*.distcp", "*.engine", "*.trt", "*.pte"),
    *("*.pb", "*.data-?????-of-?????", "openvino_*"),
)
"""Names of files of weights, in any format. Merged weights take their place."""

KEPT_BACK = (
    # The state of a training, its data and its logs.
    *(
        "optimizer*",
        "scheduler.*",
        "scaler.*",
        "rng_state*",
        "random_states*",
        "trainer_state.json",
    ),
    *("training_args*", "trainer_log*", "*_results.json", "zero_to_fp32.py", "latest"),
    *("*.log", "*.out", "events.out.tfevents*", "*.jsonl", "*.parquet", "*.arrow"),
    # Secrets, and files of a machine or a repository.
    *(".*", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "*.pyc"),
    *("token", "*secret*", "*credential*"),
    # The card, its pictures, archives.
    "[Rr][Ee][Aa][Dd][Mm][Ee].md",
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp3", "*.mp4", "*.wav"),
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"),
    # Files of an earlier merge.
    REPORT,
)
"""Names of other files that are neither downloaded nor copied."""

_OWN = (
    *("config.json", INDEX, "adapter_config.json"),
    # Settings of GPTQ and AWQ, which do not apply to the plain weights of the output.
    *("quantize_config.json", "quant_config.json"),
)
"""Files that are read, but that a merge rewrites or leaves out."""

_MOST_BYTES = 256 * 2**20
"""Longest side file that is copied; longer files are treated as weights for any name. The longest
tokenizers have some forty megabytes."""

TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's additional chat templates."""

_MODULES = "modules.json"
"""File in which a SentenceTransformer lists the folders of its modules."""

_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
"""Files whose ``auto_map`` names custom code of the model."""

PASSED_OVER = ("checkpoint*", "global_step*", "runs", "wandb", "logs", "original", "onnx", ".*")
"""Names of folders that never contain code of the model."""

_DEEPEST = 4
"""Deepest nesting of folders in which files are searched."""


def parts(folder: Place) -> list[str]:
    """Return patterns of the files to copy from subfolders of a model, relative to its folder.

    They match the modules of a SentenceTransformer, which have separate weights; additional chat
    templates; and Python files, if a config names custom code.
    """
    found = [f"{TEMPLATES}/*.jinja"]
    modules = _json(folder / _MODULES)
    for module in modules if isinstance(modules, list) else ():
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and (name := _inside(path)):
            found.append(f"{_escaped(name)}/*")
    if any(_has_code(_json(folder / name)) for name in _CONFIGS):
        found.append("*/*.py")
    return found


def side_files(folder: Place) -> dict[str, Place]:
    """Return the side files to copy, by name relative to the folder.

    Raises:
        StarmergeError: A file is a link out of the model's folder, or has a name that is not UTF-8.
    """
    files = _files(folder)
    left_out = _too_long(files)
    return {name: file for name, file in files.items() if name not in left_out}


def too_long(folder: Place) -> list[str]:
    """Return the names of files that are not copied only because of their length."""
    return sorted(_too_long(_files(folder)))


def _files(folder: Place) -> dict[str, Place]:
    """Return the files to copy by name, without the check of their length."""
    files = {
        name: folder / name
        for name in storage_of(folder).names(folder)
        if not matches(name, (*WEIGHT_FILES, *KEPT_BACK, *_OWN))
    }
    wanted = parts(folder)
    for name in _names_inside(folder, [pattern.partition("/")[0] for pattern in wanted]):
        if matches(name, wanted) and not matches(PurePosixPath(name).name, KEPT_BACK):
            files[name] = folder / name
    for name, file in files.items():
        _check_link(folder, file)
        _check_name(file, name)
    return files


def _too_long(files: Mapping[str, Place]) -> set[str]:
    """Return the names of files so long that they must be weights, except for those of modules."""
    return {
        name
        for name, file in files.items()
        if "/" not in name and storage_of(file).state(file).size > _MOST_BYTES
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name, or a path with slashes, matches one of several glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _names_inside(folder: Place, wanted: Iterable[str] = ("*",), place: str = "") -> Iterator[str]:
    """Yield the files in subfolders of a folder, relative to the model's folder.

    Links to folders are only followed if they are requested by name, because a link may lead to the
    whole disk or form a cycle.

    Args:
        folder: The folder to search.
        wanted: Patterns of the names of subfolders to search.
        place: The folder's path relative to the model's, with a slash; empty for the model's own.
    """
    storage = storage_of(folder)
    named = [pattern for pattern in wanted if pattern != "*"]
    try:
        for name in storage.folders(folder):
            inside = f"{place}{name}/"
            is_wanted = matches(name, wanted) and not matches(name, PASSED_OVER)
            if is_wanted and (matches(name, named) or not storage.is_link(folder / name)):
                yield from (f"{inside}{file}" for file in storage.names(folder / name))
                if inside.count("/") < _DEEPEST:
                    yield from _names_inside(folder / name, place=inside)
    except OSError as error:
        raise StarmergeError(
            f"{folder} cannot be read: {error}. Change its permissions."
        ) from error


def _inside(path: str) -> str | None:
    """Return the path of a subfolder of a model; None for the model's own folder or one outside."""
    pure = PurePosixPath(path)
    is_inside = not pure.is_absolute() and ".." not in pure.parts and pure.parts
    return str(pure) if is_inside else None


def _escaped(name: str) -> str:
    """Return a pattern that matches exactly this name."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _has_code(config: Any) -> bool:
    return isinstance(config, dict) and isinstance(config.get("auto_map"), dict)


def _json(file: Place) -> Any:
    """Return the content of a JSON file; None if it does not exist or is not JSON."""
    if not is_file(file):
        return None
    try:
        return parse_json(read_bytes(file, _MOST_BYTES))
    except StarmergeError as error:
        if isinstance(error.__cause__, OSError):  # it may say that more files belong to the model
            raise
    except ValueError:
        pass
    return None  # the file is copied as it is, and whatever loads it will say what is wrong


def _check_link(folder: Place, file: Place) -> None:
    """Refuse a link out of its folder, whose target would be copied and perhaps published.

    The Hub's cache consists of links to files named by their hashes in the folder ``blobs``, which
    are allowed.
    """
    target = real(file)
    is_cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if real(folder) not in target.parents and not is_cached:
        raise StarmergeError(
            f"{file} is a link to {target}, outside of the model's folder, and would be copied "
            "beside the merged weights. Put the file itself there, or remove the link."
        )


def _check_name(file: Place, name: str) -> None:
    """Refuse a name that is not UTF-8, which the report could not list."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise StarmergeError(
            f"{str(file)!a} has a name that is not UTF-8, which the report of a merge is. Rename "
            "the file."
        ) from error
