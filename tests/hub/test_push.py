"""Pushing merges to an imitation of the Hub: what arrives, what is not sent again, what fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import http_backoff

import starmerge_models as sm
from starmerge_models.checkpoints.source import resolve
from starmerge_models.evaluation.cache import blake3_of_model
from starmerge_models.events import Retry
from starmerge_models.hub import push as pushing
from starmerge_models.hub.client_errors import without_secrets
from starmerge_models.hub.merged import open_merged
from tests.forks import Forks
from tests.hub.conftest import TOKEN
from tests.hub.fake_hub import SIGNATURE, FakeHub, Fault

REPO = "alice/merged"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def large(folder: Path) -> int:
    """Count the files that the Hub keeps as LFS."""
    return len(list(folder.rglob("*.safetensors")))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tries follow each other without waiting, ours and the client's own."""
    monkeypatch.setattr(pushing, "_WAITS", (1e-3,) * 4)
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 1e-3)


def test_a_merge_appears_whole_in_one_commit_and_can_be_used_again(
    hub: FakeHub, merged: Path
) -> None:
    pushed = sm.push(merged, REPO)
    assert hub.files(REPO) == contents(merged)
    assert hub.messages(REPO) == ["initial commit", "Merge of 3 models by average"]
    assert pushed.is_new
    assert pushed.commit == hub.head(REPO).oid
    assert pushed.url == f"{hub.url}/{REPO}"
    assert len(hub.uploads) == large(merged)
    assert not hub.repos[REPO].private

    found = resolve(REPO)
    assert found.name == REPO
    again = merged.parent / "again"
    sm.merge(REPO, [REPO], sm.Average(), output=again)
    assert "base_model:\n- alice/merged\n" in (again / "README.md").read_text()
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (merged / weights).read_bytes()


def test_what_is_there_is_not_sent_again(hub: FakeHub, merged: Path) -> None:
    first = sm.push(merged, REPO)
    hub.uploads.clear()
    second = sm.push(merged, REPO)
    assert hub.uploads == []
    assert (second.commit, second.is_new) == (first.commit, False)
    (merged / "README.md").write_text((merged / "README.md").read_text() + "\nBy me.\n")
    third = sm.push(merged, REPO, message="A better card")
    assert hub.uploads == []
    assert third.is_new
    assert third.replaced == first.commit
    assert hub.messages(REPO)[-1] == "A better card"
    assert hub.files(REPO)["README.md"].endswith(b"By me.\n")


def test_large_files_go_in_parts_where_the_hub_asks_for_them(hub: FakeHub, merged: Path) -> None:
    hub.part_bytes = 5000
    sm.push(merged, REPO)
    assert hub.files(REPO) == contents(merged)
    assert any(method == "PUT" and path.endswith("/7") for method, path in hub.requests)


def test_after_a_failed_upload_the_rest_is_sent_and_nothing_was_to_be_seen(
    hub: FakeHub, many: Path
) -> None:
    hub.put(REPO, {})
    one = hashlib.sha256((many / "task1" / "mask.safetensors").read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", f"/upload/{one}", 403)]
    with pytest.raises(sm.StarmergeError, match="storage refused an upload"):
        sm.push(many, REPO)
    assert hub.files(REPO) == {}
    sent = set(hub.uploads)
    assert 0 < len(sent) < large(many)
    hub.faults.clear()
    sm.push(many, REPO)
    assert hub.files(REPO) == contents(many)
    assert len(hub.uploads) == len(set(hub.uploads)) == large(many)
    assert len(hub.messages(REPO)) == 2


def test_a_push_that_is_killed_goes_on(
    hub: FakeHub, many: Path, environment: dict[str, str], loaded: Forks
) -> None:
    hub.faults = [Fault("PUT", "/upload/", "stall", times=1)]
    with loaded.running(["push", many, REPO], env=environment) as (process, ending):
        try:
            assert hub.stalled.wait(60)
            assert _until(lambda: len(hub.uploads) == large(many) - 1)
        finally:
            os.kill(process, signal.SIGKILL)
    assert ending.result().code == -signal.SIGKILL
    assert hub.files(REPO) == {}
    sm.push(many, REPO)
    assert hub.files(REPO) == contents(many)
    assert len(hub.uploads) == large(many)
    assert hub.messages(REPO)[1:] == ["Merge of 3 models by emr"]


def _until(holds: Callable[[], bool]) -> bool:
    for _ in range(6000):
        if holds():
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/upload/", "drop", times=1),
        Fault("PUT", "/upload/", 500, times=1),
        Fault("POST", "/preupload/", 503, times=1),
        Fault("POST", "/commit/", 500, times=1),
        Fault("POST", "/commit/", 409, times=1),
        Fault("POST", "/commit/", "drop", times=1),
        Fault("POST", "/commit/", "lost", times=1),
        Fault("POST", "/validate-yaml", 502, times=1),
    ],
    ids=lambda fault: f"{fault.path.strip('/')}-{fault.what}",
)
@pytest.mark.usefixtures("at_once")
def test_what_fails_once_is_tried_again_and_commits_once(
    hub: FakeHub, merged: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [fault]
    sm.push(merged, REPO)
    told = [record.msg for record in caplog.records if isinstance(record.msg, Retry)]
    is_commit = fault.path in ("/commit/", "/validate-yaml")
    expected = [(f"the commit to {REPO}", 1)] if is_commit else []
    assert [(retry.what, retry.attempt) for retry in told] == expected
    assert fault.times == 0
    assert hub.files(REPO) == contents(merged)
    assert len(hub.messages(REPO)) == 2


def test_what_somebody_else_commits_meanwhile_stays(hub: FakeHub, merged: Path) -> None:
    repo = hub.put(REPO, {})
    theirs = hub.stored({"notes.md": b"theirs"})
    hub.meanwhile = lambda: hub.commit(repo, "main", "theirs", theirs)
    with pytest.raises(sm.StarmergeError, match="Somebody else has changed"):
        sm.push(merged, REPO)
    assert hub.files(REPO) == {"notes.md": b"theirs"}
    assert hub.messages(REPO)[-1] == "theirs"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault("GET", "whoami", 401), sm.UsageError, "rejects the token as invalid"),
        (Fault("GET", "whoami", 500), sm.StarmergeError, "fails with status 500; push again later"),
        (Fault("GET", "whoami", "drop"), sm.StarmergeError, "The Hub cannot be reached"),
        (Fault("GET", "/api/models/", 403), sm.UsageError, "may not write to alice/merged"),
        (Fault("POST", "/repos/create", 409), sm.StarmergeError, "alice/merged"),
        (Fault("POST", "/commit/", 403), sm.UsageError, "may not write to alice/merged"),
        (Fault("POST", "/commit/", 404), sm.StarmergeError, "alice/merged was not pushed: .*404"),
        (Fault("POST", "/commit/", 412), sm.StarmergeError, "Somebody else has changed"),
        (Fault("POST", "/commit/", 500), sm.StarmergeError, "fails with status 500"),
        (Fault("PUT", "/upload/", 403), sm.StarmergeError, "upload URL has expired. Push again"),
        (Fault("POST", "/objects/batch", 400), sm.StarmergeError, "was not pushed"),
    ],
    ids=lambda value: f"{value.path}-{value.what}" if isinstance(value, Fault) else "",
)
@pytest.mark.usefixtures("at_once")
def test_a_failure_says_so_without_secrets_and_leaves_nothing_to_be_seen(
    hub: FakeHub,
    merged: Path,
    fault: Fault,
    error: type[Exception],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.faults = [fault]
    with pytest.raises(error, match=message) as raised:
        sm.push(merged, REPO)
    assert type(raised.value) is error
    said = "".join(traceback.format_exception(raised.value)) + "".join(capfd.readouterr())
    assert TOKEN not in said
    assert SIGNATURE not in said
    assert "_ClientError: Traceback" in said
    assert REPO not in hub.repos or hub.files(REPO) == {}


@pytest.mark.usefixtures("at_once")
def test_warnings_of_the_client_hide_signed_addresses(
    hub: FakeHub, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("PUT", "/upload/", 500, times=1)]
    sm.push(merged, REPO)
    assert f"requesting PUT {hub.url}/upload/" in caplog.text
    assert "?[…]" in caplog.text
    assert SIGNATURE not in caplog.text


def test_the_command_with_debug_shows_where_it_failed_and_no_secret(
    hub: FakeHub, merged: Path, commands_reach_it: None, starmerge: Callable[..., Any]
) -> None:
    hub.faults = [Fault("POST", "/commit/", 403)]
    debugged = starmerge("--debug", "push", merged, REPO)
    assert debugged.returncode != 0
    assert "create_commit" in debugged.stderr
    assert "UsageError: The token may not write to alice/merged" in debugged.stderr
    assert TOKEN not in debugged.stderr + debugged.stdout
    assert SIGNATURE not in debugged.stderr


def test_secrets_are_taken_out_of_texts() -> None:
    texts = {
        f"a {TOKEN}.": "a [token].",
        "Authorization: Bearer abcdefghij": "Authorization: Bearer [token]",
        "hf_AbCdEfGhIjKl is one": "hf_[token] is one",
        "at 'https://s3/x?X-Amz-Signature=1&b=2'": "at 'https://s3/x?[…]'",
        "https://me:word@proxy:80/x": "https://[…]@proxy:80/x",
        "What? https://hf.co/a/b": "What? https://hf.co/a/b",
    }
    assert {text: without_secrets(text, TOKEN) for text in texts} == texts


def test_a_later_merge_replaces_an_earlier_one_and_keeps_what_others_added(
    hub: FakeHub, merged: Path, many: Path
) -> None:
    first = sm.push(merged, REPO)
    head = hub.head(REPO).files
    listed = json.loads((merged / "merge_report.json").read_text())
    listed["files"] += ["old/part.safetensors"]
    added = hub.stored(
        {
            "old/part.safetensors": b"x",
            "photo.png": b"y",
            "merge_report.json": json.dumps(listed).encode(),
        }
    )
    hub.commit(hub.repos[REPO], "main", "by hand", {**head, **added})
    pushed = sm.push(many, REPO)
    assert hub.files(REPO) == contents(many) | {"photo.png": b"y"}
    gone = {"old/part.safetensors", *contents(merged)} - contents(many).keys()
    assert set(pushed.deleted) == gone
    assert len(gone) > 1
    assert pushed.replaced == hub.repos[REPO].branches["main"][-2].oid != first.commit
    assert len(hub.messages(REPO)) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "data/rows.csv"])
def test_a_repository_that_holds_something_else_is_not_touched(
    hub: FakeHub, merged: Path, name: str
) -> None:
    hub.put(REPO, {"README.md": b"# Mine", name: b"x"})
    with pytest.raises(sm.UsageError, match=rf"has {name} and no merge_report.json"):
        sm.push(merged, REPO)
    assert hub.files(REPO) == {"README.md": b"# Mine", name: b"x"}
    assert hub.uploads == []


def test_a_new_repository_may_hold_a_card_and_a_license(hub: FakeHub, merged: Path) -> None:
    hub.put(REPO, {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"})
    sm.push(merged, REPO)
    assert hub.files(REPO) == {"LICENSE": b"MIT"} | contents(merged)


def test_a_gitignore_that_leaves_out_a_file_is_found(hub: FakeHub, merged: Path) -> None:
    hub.put(REPO, {".gitignore": b"config.json\n"})
    with pytest.raises(sm.StarmergeError, match=r"config.json is missing. .* \.gitignore"):
        sm.push(merged, REPO)


def test_a_branch_is_made_and_main_stays(hub: FakeHub, merged: Path) -> None:
    hub.put(REPO, {})
    pushed = sm.push(merged, f"{REPO}@eta-40")
    assert hub.files(REPO, "eta-40") == contents(merged)
    assert hub.files(REPO) == {}
    assert pushed.url == f"{hub.url}/{REPO}/tree/eta-40"
    assert not sm.push(merged, f"{REPO}@eta-40").is_new
    assert resolve(f"{REPO}@eta-40").revision == pushed.commit


def test_a_repository_is_made_private_and_one_that_is_public_is_not_taken_for_private(
    hub: FakeHub, merged: Path
) -> None:
    sm.push(merged, "acme/secret", private=True)
    assert hub.repos["acme/secret"].private
    assert not sm.push(merged, "acme/secret", private=True).is_new
    hub.put(REPO, {})
    with pytest.raises(sm.UsageError, match="alice/merged is on the Hub already, and public"):
        sm.push(merged, REPO, private=True)


@pytest.mark.parametrize("repo", ["merged", "a/b/c", "alice/", "alice/--x", "alice/x@", "a b/c"])
def test_what_is_no_repository_is_refused_before_anything_is_asked(
    hub: FakeHub, merged: Path, repo: str
) -> None:
    with pytest.raises(sm.UsageError, match="no repository to push to"):
        sm.push(merged, repo)
    assert hub.requests == []


def test_tokens_that_cannot_push_are_refused_before_anything_is_written(
    hub: FakeHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        sm.UsageError, match="belongs to alice, who may not write to bob.*: alice, acme"
    ):
        sm.push(merged, "bob/merged")
    with pytest.raises(sm.UsageError, match="alice's role in look only allows reading"):
        sm.push(merged, "look/merged")
    hub.role = "read"
    with pytest.raises(sm.UsageError, match="The token only allows reading"):
        sm.push(merged, REPO)
    hub.role = "write"
    monkeypatch.setenv("HF_TOKEN", "another_token_5512")
    with pytest.raises(sm.UsageError, match="rejects the token as invalid") as raised:
        sm.push(merged, REPO)
    assert "another_token_5512" not in "".join(traceback.format_exception(raised.value))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(merged / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(sm.UsageError, match="without a token. Log in with `hf auth login`"):
        sm.push(merged, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(sm.UsageError, match="HF_HUB_OFFLINE"):
        sm.push(merged, REPO)
    assert hub.repos == {}


def test_what_is_no_whole_merge_is_refused(hub: FakeHub, merged: Path, tmp_path: Path) -> None:
    def damaged(name: str, damage: Callable[[Path], object]) -> str:
        folder = copytree(merged, tmp_path / name)
        damage(folder)
        with pytest.raises(sm.StarmergeError) as raised:
            sm.push(folder, REPO)
        return str(raised.value)

    shard = "model.safetensors"
    size = (merged / shard).stat().st_size

    def cut(folder: Path) -> None:
        with (folder / shard).open("r+b") as file:
            file.truncate(size - 1)

    def lists_outside(folder: Path) -> None:
        report = json.loads((folder / "merge_report.json").read_text())
        report["files"].append("../other")
        (folder / "merge_report.json").write_text(json.dumps(report))

    def links_outside(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(merged / "config.json")

    assert "has no merge_report.json" in damaged("a", lambda f: (f / "merge_report.json").unlink())
    assert f"{shard} is missing." in damaged("b", lambda f: (f / shard).unlink())
    assert shard in damaged("c", cut)
    assert "config.json: the bytes are not" in damaged(
        "d", lambda f: (f / "config.json").write_text("{}")
    )
    assert "../other is outside of it." in damaged("e", lists_outside)
    assert "config.json is outside of it." in damaged("f", links_outside)
    with pytest.raises(sm.UsageError, match="is a single file without a report and a card"):
        sm.push(merged / shard, REPO)
    assert hub.requests == []


def test_only_what_the_merge_wrote_is_pushed(hub: FakeHub, merged: Path) -> None:
    whole = contents(merged)
    (merged / ".env").write_text("SECRET=1")
    (merged / ".cache").mkdir()
    (merged / ".cache" / "x").write_text("x")
    (merged / "notes.txt").write_text("x")
    sm.push(merged, REPO)
    assert hub.files(REPO) == whole
    assert open_merged(merged).others == (".cache/x", ".env", "notes.txt")


def test_the_card_has_the_metadata_of_the_hub_and_no_folder_as_base(
    hub: FakeHub, merged: Path
) -> None:
    sm.push(merged, REPO)
    data = ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()
    assert data == {"library_name": "transformers", "tags": ["merge", "starmerge"]}
    sm.merge(REPO, [f"{REPO}@main"], sm.Average(), output=merged.parent / "of-hub")
    sm.push(merged.parent / "of-hub", "alice/of-hub")
    card = hub.files("alice/of-hub")["README.md"].decode()
    assert ModelCard(card).data.to_dict() == {
        "base_model": ["alice/merged"],
        "library_name": "transformers",
        "tags": ["merge", "starmerge"],
        "base_model_relation": "merge",
    }
    assert "base: alice/merged\n" in card


def write_results(folder: Path, merged: Path) -> Path:
    """Write what an evaluation of the base, another model and a merge writes."""
    folder.mkdir()
    values = {("base", "past"): 0.25, ("other", "past"): 0.9, ("merged", "past"): 0.5}
    values |= {("base", "pos"): 0.5, ("other", "pos"): 0.1, ("merged", "pos"): 0.75}
    scores = [
        {"model": model, "task": task, "metric": "accuracy", "score": value}
        | {"low": value - 0.125, "high": value + 0.125, "n": 100}
        for (model, task), value in values.items()
    ]
    averages = [
        {"model": "base", "value": 0.375, "low": 0.25, "high": 0.5},
        {"model": "merged", "value": 0.8125, "low": 0.75, "high": 0.875},
    ]
    models = {"base": "0" * 64, "other": "1" * 64, "merged": blake3_of_model(merged)}
    provenance = {"models": {name: {"blake3": digest} for name, digest in models.items()}}
    content = {"schema_version": 1, "scores": scores, "normalised_averages": averages}
    content |= {"provenance": {**provenance, "date": "2026-01-31"}}
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def test_scores_of_an_evaluation_stand_in_the_card(
    hub: FakeHub, merged: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "scores", merged)
    before = (merged / "README.md").read_text()
    sm.push(merged, REPO, scores=results)
    pushed = hub.files(REPO)
    assert {**pushed, "README.md": b""} == {**contents(merged), "README.md": b""}
    text = pushed["README.md"].decode()
    card = ModelCard(text)
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "past": 0.5,
        "pos": 0.75,
        "2 tasks": 0.8125,
    }
    assert [result.metric_type for result in found.values()] == [
        "accuracy",
        "accuracy",
        "normalised_average",
    ]
    assert card.data.model_name == "merged"
    assert card.data.tags == ["merge", "starmerge"]
    assert "| past | 100 | accuracy | 0.250 [0.125, 0.375] | 0.500 [0.375, 0.625] |\n" in text
    assert "| **normalised average** | | | 0.375 [0.250, 0.500] | 0.812 [0.750, 0.875] |\n" in text
    body = before.split("---\n", 2)[2].strip()
    assert body in text
    assert (merged / "README.md").read_text() == before


def test_scores_of_another_model_are_refused(hub: FakeHub, merged: Path, many: Path) -> None:
    results = write_results(merged.parent / "scores", many)
    with pytest.raises(sm.UsageError, match="scores of base, other, merged, and none of them"):
        sm.push(merged, REPO, scores=results)
    assert hub.requests == []


def test_merge_pushes_at_the_end_and_goes_on_with_the_push_alone(
    hub: FakeHub,
    tiny_base: Path,
    tmp_path: Path,
    commands_reach_it: None,
    starmerge: Callable[..., Any],
) -> None:
    model = copytree(tiny_base, tmp_path / "model")
    output = tmp_path / "out put"
    command = ["merge", tiny_base, model, "-o", output, "-m", "average"]
    command += ["--push", "acme/m@v1", "--private"]
    dry = starmerge(*command, "--dry-run")
    assert "Push: to acme/m@v1 (nothing sent)" in dry.stdout
    assert hub.repos == {}

    hub.faults = [Fault("POST", "/commit/", 403)]
    failed = starmerge(*command)
    assert failed.returncode == 2
    whole = contents(output)
    go_on = f"To go on with the push: starmerge push '{output}' acme/m@v1 --private"
    assert failed.stderr.rstrip().endswith(go_on)
    assert f"Model: {output}" in failed.stdout
    assert f"{model}, {tiny_base}" in failed.stderr  # the note on local folders
    assert TOKEN not in failed.stderr + failed.stdout
    assert not any(TOKEN.encode() in content for content in whole.values())

    hub.faults.clear()
    hub.uploads.clear()
    again = starmerge(*command)
    assert (again.returncode, hub.uploads) == (0, [])
    assert f"{output} is there already." in again.stdout
    pushed = rf"Pushed: {hub.url}/acme/m/tree/v1 \(\d+ files, commit \w{{12}}\)"
    assert re.search(pushed, again.stdout)
    assert contents(output) == whole == hub.files("acme/m", "v1")
    assert hub.repos["acme/m"].private


def test_merge_asks_the_hub_first(
    hub: FakeHub,
    tiny_base: Path,
    tmp_path: Path,
    commands_reach_it: None,
    starmerge: Callable[..., Any],
) -> None:
    hub.put(REPO, {"model.safetensors": b"x"})
    command = ["merge", tiny_base, tiny_base, "-o", tmp_path / "out"]
    refused = starmerge(*command, "--push", REPO)
    assert refused.returncode == 2
    assert "has model.safetensors" in refused.stderr
    assert not (tmp_path / "out").exists()
