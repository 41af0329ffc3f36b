"""Metric files: what is written is read again, and files broken in the ways files break."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.checkpoints.metric import KEY, MetricWriter, open_metric
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError, UsageError
from tests.conftest import MakeFinetune

_Q, _K, _DOWN = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down")
)
_MADE_FROM = {"kind": "texts", "words": "größer"}


def _roots() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((4, 4), (6, 6), (2, 4), (3, 6))]


def _write(file: Path, hashes: dict[str, str] | None = None) -> list[torch.Tensor]:
    roots = _roots()
    with MetricWriter(
        file,
        base=("org/base", hashes or {"model.safetensors": "ab"}),
        made_from=_MADE_FROM,
        tensors=[_Q, _K, _DOWN],
        tasks=["past"],
    ) as writer:
        for root, task in ((roots[0], None), (roots[2], "past")):
            writer.add(root, [_Q, _K], side="columns", task=task, tokens=100)
        for root, task in ((roots[1], None), (roots[3], "past")):
            writer.add(root, [_DOWN], side="rows", task=task, tokens=100)
        nbytes = writer.nbytes
    assert file.stat().st_size == nbytes
    return roots


def test_what_is_written_is_read_again_by_us_and_by_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "metric.safetensors"
    roots = _write(file)
    metric = open_metric(file)
    assert metric.tasks == ("past",)
    assert metric.made_from == _MADE_FROM
    assert metric.has(_Q)
    assert metric.has(_DOWN, "past")
    assert not metric.has(_Q, "plural")
    assert not metric.has("lm_head.weight")
    assert (metric.side(_K), metric.side(_DOWN)) == ("columns", "rows")
    for tensor, task, root in (
        (_Q, None, roots[0]),
        (_K, None, roots[0]),
        (_K, "past", roots[2]),
        (_DOWN, None, roots[1]),
        (_DOWN, "past", roots[3]),
    ):
        moment = metric.moment(tensor, task)
        assert torch.equal(moment.root, root)
        assert (moment.tokens, moment.size) == (100, root.shape[1])
    assert {key: tensor.shape for key, tensor in load_file(file).items()} == {
        "0": (4, 4),
        "1": (2, 4),
        "2": (6, 6),
        "3": (3, 6),
    }
    with safe_open(file, "pt") as opened:
        content = json.loads(opened.metadata()[KEY])
    assert content["version"] == 1
    assert content["base"] == {"name": "org/base", "blake3": {"model.safetensors": "ab"}}
    assert content["entries"][1] == {
        "key": "1",
        "tensors": [_Q, _K],
        "side": "columns",
        "task": "past",
        "tokens": 100,
    }


def test_threads_read_at_once(tmp_path: Path) -> None:
    roots = _write(tmp_path / "m.safetensors")
    metric = open_metric(tmp_path / "m.safetensors")
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: metric.moment((_Q, _DOWN)[number % 2]), range(200)))
    assert all(torch.equal(moment.root, roots[n % 2]) for n, moment in enumerate(read))


def test_a_moment_that_is_not_there_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "m.safetensors")
    metric = open_metric(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="no moment of the inputs of lm_head.weight"):
        metric.moment("lm_head.weight")
    with pytest.raises(UsageError, match=rf"{_Q} for the task 'plural' \(its tasks: past\)"):
        metric.moment(_Q, "plural")
    with pytest.raises(UsageError, match="lm_head.weight"):
        metric.side("lm_head.weight")


def test_a_nan_is_named_with_file_and_tensor(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    _edit(file, lambda content, tensors: tensors["1"].fill_(float("nan")))
    assert torch.isfinite(open_metric(file).moment(_Q).root).all()
    with pytest.raises(StarmergeError, match=rf"m\.safetensors: the moment of {_Q} .*'1'.* NaN"):
        open_metric(file).moment(_Q, "past")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="m.safetensors is no file"):
        open_metric(file)
    with pytest.raises(UsageError, match="is no file"):
        open_metric(tmp_path)
    save_file({"a": torch.ones(2, 2)}, file)
    with pytest.raises(UsageError, match="is no metric file: its metadata has no"):
        open_metric(file)
    file.write_text("text, and nothing else")
    with pytest.raises(StarmergeError, match="is not a complete safetensors file"):
        open_metric(file)
    _write(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StarmergeError, match="lies beyond the end of the file"):
        open_metric(file)


def _edit(file: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Write a metric file, then change its JSON and its tensors."""
    _write(file)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        content = json.loads(opened.metadata()[KEY])
    change(content, tensors)
    save_file(tensors, file, metadata={KEY: json.dumps(content)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("entries"), "entries: Field required"),
        (lambda c, t: c.update(entries=[]), "entries: .* at least 1 item"),
        (lambda c, t: c["entries"].pop(), "no entry is of its tensor '3'"),
        (lambda c, t: c["entries"].append(c["entries"][0]), "the tensor '0', as another does"),
        (lambda c, t: c["entries"][0].update(key="9"), "the tensor '9', which is not in the file"),
        (lambda c, t: c["entries"][0].update(side="left"), "side: .*'columns' or 'rows'.*'left'"),
        (lambda c, t: c["entries"][0].update(tokens=0), "tokens: .*greater than or equal to 1"),
        (lambda c, t: c["entries"][0].update(tensors=[]), "tensors: .* at least 1 item"),
        (lambda c, t: c["entries"][1].update(task=None), f"two entries are of {_Q}"),
        (lambda c, t: c["entries"][1].update(side="rows"), f"differ on the side of {_Q}"),
        (lambda c, t: c.pop("base"), "base: Field required"),
        (lambda c, t: c.pop("version"), "the JSON of 'starmerge_metric' cannot be read"),
        (lambda c, t: t.update({"0": t["0"].double()}), r"float64 \[4, 4\], is no float32 root"),
        (lambda c, t: t.update({"0": torch.ones(5, 4)}), r"\[5, 4\], is no float32 root"),
        (lambda c, t: t.update({"0": torch.ones(4)}), r"\[4\], is no float32 root"),
    ],
)
def test_a_damaged_file_says_where(
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    _edit(tmp_path / "m.safetensors", change)
    with pytest.raises(StarmergeError, match=f"m.safetensors is damaged: .*{message}"):
        open_metric(tmp_path / "m.safetensors")


def test_json_that_is_none_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    for text in ("{", "[]", "null"):
        save_file({"0": torch.ones(1, 1)}, file, metadata={KEY: text})
        with pytest.raises(StarmergeError, match="is damaged: the JSON"):
            open_metric(file)


def test_another_version_is_refused(tmp_path: Path) -> None:
    _edit(tmp_path / "m.safetensors", lambda content, tensors: content.update(version=2))
    with pytest.raises(UsageError, match="of version 2, and this release reads version 1"):
        open_metric(tmp_path / "m.safetensors")


def test_knows_its_base_by_the_content_of_its_files(
    tiny_base: Path, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    weights = tiny_base / "model.safetensors"
    name = "model.layers.0.self_attn.v_proj.weight"  # (16, 32)

    def metric_of(n: int, side: Any) -> Path:
        file = tmp_path / "m.safetensors"
        with MetricWriter(
            file, base=("b", {weights.name: blake3_of(weights)}), made_from={}, tensors=[name]
        ) as writer:
            writer.add(torch.ones(1, n), [name], side=side, task=None, tokens=5)
        return file

    base = open_base(resolve(tiny_base))
    open_metric(metric_of(32, "columns")).check_base(base)
    open_metric(metric_of(16, "rows")).check_base(base)
    with pytest.raises(StarmergeError, match=r"is damaged: .* 16 inputs for .*\[16, 32\].*columns"):
        open_metric(metric_of(16, "columns")).check_base(base)
    other = open_base(resolve(make_finetune("other")))
    with pytest.raises(UsageError, match="was made from b, and the weights of .*other are others"):
        open_metric(metric_of(32, "columns")).check_base(other)
