"""Files beside the weights: which are copied, and that the Hub gives the same ones."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import starmerge_models as sm
from starmerge_models.checkpoints.side_files import side_files, too_long
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError
from tests.conftest import MakeAdapter

COPIED = [
    *("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "source.spm", "spiece.model"),
    *("vocab.bpe", "merges.txt", "sentencepiece.bpe.model", "bpe.codes", "prophetnet.tokenizer"),
    *("bpe_simple_vocab_16e6.txt.gz", "generation_config.json", "preprocessor_config.json"),
    *("chat_template.jinja", "modeling_own.py", "LICENSE", "license.txt", "USE_POLICY.md"),
    *("NOTICE", "vocab", "selected_tags.csv", "modules.json"),
    "additional_chat_templates/rag.jinja",
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    "3_Router/part/config.json",
    "own/layers.py",
]

NOT_COPIED = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
    *("model.Q4_K_M.gguf", "consolidated.00.pth", "model.ckpt.index", "openvino_model.xml"),
    *("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "training_args.bin"),
    *("events.out.tfevents.1", "train.log", "train.jsonl", "README.md", "merge_report.json"),
    *("adapter_config.json", "config.json", ".env", ".gitattributes", "server.pem", "picture.png"),
    *("checkpoint-10/tokenizer.json", "checkpoint-10/own.py", "original/params.json"),
    *("onnx/config.json", "2_Dense/optimizer.pt", ".git/config", "additional_chat_templates/x.txt"),
    "data/rows.txt",
]


def _fill(folder: Path, names: Sequence[str] = (*COPIED, *NOT_COPIED)) -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    paths = ["", "1_Pooling", "2_Dense", "3_Router/", "../outside", "/etc"]
    modules = [{"idx": i, "path": path, "type": "x"} for i, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "own.layers.Own"}}))
    return folder


def test_everything_is_copied_but_weights_and_the_litter_of_a_training(tmp_path: Path) -> None:
    folder = _fill(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.txt").write_text("x")
    found = side_files(folder)
    assert sorted(found) == sorted(COPIED)
    assert all(found[name] == folder / name for name in found)


def test_code_in_folders_is_copied_only_where_a_config_names_code(tmp_path: Path) -> None:
    folder = _fill(tmp_path)
    (folder / "config.json").write_text("{}")
    assert sorted(side_files(folder)) == sorted(set(COPIED) - {"own/layers.py"})
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["own.T", null]}}'
    )
    assert "own/layers.py" in side_files(folder)


@pytest.mark.parametrize("content", ["", "[1, null, {}]", '{"path": "1_Pooling"}', '[{"path": 3}]'])
def test_a_strange_modules_file_is_copied_and_names_no_folders(
    tmp_path: Path, content: str
) -> None:
    folder = _fill(tmp_path)
    (folder / "modules.json").write_text(content)
    assert sorted(side_files(folder)) == sorted(n for n in COPIED if not n[0].isdigit())


def test_a_file_too_long_for_a_tokenizer_is_taken_for_weights(tmp_path: Path) -> None:
    for name, size in (("weights.q4", 2**28 + 1), ("huge.vocab", 2**28)):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
    assert list(side_files(tmp_path)) == ["huge.vocab"]
    assert too_long(tmp_path) == ["weights.q4"]


def test_a_merge_notes_a_file_that_it_takes_for_weights(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    with (base / "weights.q4").open("wb") as stream:
        stream.truncate(2**28 + 1)
    (note,) = sm.merge(
        base, [make_adapter("a")], "average", output=tmp_path / "out"
    ).report.content["notes"]
    assert note.startswith("weights.q4 of the base is not copied")
    assert not (tmp_path / "out/weights.q4").exists()


def test_refuses_links_out_of_the_folder_from_folders_too(tmp_path: Path) -> None:
    folder = _fill(tmp_path / "model")
    (tmp_path / "secret").write_text("x")
    (folder / "1_Pooling/link.json").symlink_to(tmp_path / "secret")
    with pytest.raises(
        StarmergeError, match=r"1_Pooling/link\.json is a link to .*secret, outside"
    ):
        side_files(folder)
    (folder / "1_Pooling/link.json").unlink()
    (folder / "1_Pooling/link.json").symlink_to(folder / "tokenizer.json")
    (folder / "1_Pooling/loop").symlink_to(folder / "1_Pooling")
    assert "1_Pooling/link.json" in side_files(folder)


def test_links_to_folders_are_followed_only_where_they_are_named(tmp_path: Path) -> None:
    """Where a config names code, it is looked for in all folders, but not on the whole disk."""
    folder = _fill(tmp_path / "model")
    expected = list(side_files(folder))
    (folder / "disk").symlink_to("/")
    (folder / "own" / "back").symlink_to(folder)
    assert list(side_files(folder)) == expected
    (folder / "4_Dense").symlink_to(_fill(tmp_path / "other", ["config.json"]))
    (folder / "modules.json").write_text(json.dumps([{"path": "4_Dense"}]))
    with pytest.raises(StarmergeError, match="4_Dense/config.json is a link to .*, outside"):
        side_files(folder)


def test_the_hub_gives_what_a_local_copy_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub itself is away: files are filtered by its own library."""
    remote = _fill(tmp_path / "remote")
    _fetching_from(remote, tmp_path / "cache", monkeypatch)
    found = resolve("org/model").path
    assert sorted(side_files(found)) == sorted(side_files(remote))
    fetched = {f.relative_to(found).as_posix() for f in found.rglob("*") if f.is_file()}
    assert fetched - set(COPIED) == {
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin.index.json", "adapter_config.json", "config.json"),
    }


def test_the_hub_gives_weights_in_bin_where_it_has_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in (*COPIED, *NOT_COPIED) if not name.endswith("safetensors")]
    _fetching_from(_fill(tmp_path / "remote", names), tmp_path / "cache", monkeypatch)
    found = resolve("org/model").path
    assert (found / "pytorch_model.bin").exists()
    assert not (found / "training_args.bin").exists()


def _fetching_from(remote: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "models--org--model/snapshots/0123"

    def download(
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str] | None,
        ignore_patterns: list[str],
    ) -> str:
        names = [f.relative_to(remote).as_posix() for f in remote.rglob("*") if f.is_file()]
        wanted = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in wanted:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / file, folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_merged_sentence_transformer_loads_with_its_modules(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    BertModel(config).eval().save_pretrained(base)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<unk>": 63}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="w0", model_max_length=16
    )
    tokenizer.save_pretrained(base)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    described = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(described))
    (base / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (base / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (base / "2_Dense").mkdir()
    dense = {
        "in_features": 32,
        "out_features": 5,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (base / "2_Dense/config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": torch.randn(5, 32), "linear.bias": torch.randn(5)}
    save_file(weights, base / "2_Dense/model.safetensors")
    shutil.copytree(base, tuned)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: value + 0.1 * torch.randn(value.shape) for name, value in tensors.items()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )

    out = tmp_path / "out"
    report = sm.merge(base, [tuned], "average", output=out).report.content
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(report["files"])
    assert "2_Dense/model.safetensors" in report["blake3"]
    assert sm.verify(out).is_right

    ids = torch.tensor([[3, 5, 8]])
    hidden = BertModel.from_pretrained(tuned).eval()(ids).last_hidden_state.mean(1)
    wanted = hidden @ weights["linear.weight"].T + weights["linear.bias"]
    from sentence_transformers import SentenceTransformer  # takes a second to load

    made = SentenceTransformer(str(out), device="cpu").encode(["w3 w5 w8"])
    torch.testing.assert_close(torch.from_numpy(made), wanted.detach(), atol=1e-4, rtol=0)

    sm.merge(base, [tuned], "average", output=out, overwrite=True)
    (out / "2_Dense/model.safetensors").write_bytes(b"")
    assert any("2_Dense" in sentence for sentence in sm.verify(out).wrong)
