"""One vocabulary for all models of a merge: the output's tokenizer, and the rows of its tokens.

The rules are those of mergekit's ``tokenizer_source`` (github.com/arcee-ai/mergekit): rows of the
base's tokens are merged, and a model without a token counts as unchanged in its row; a new token
gets the row of the model that has it, or the mean of several. Methods process tables with the same
rows for all models, in which no model changes the rows of new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from starmerge_models.checkpoints.base import Base, read_config
from starmerge_models.checkpoints.finetuned import FinetunedModel
from starmerge_models.checkpoints.models import FineTune
from starmerge_models.checkpoints.side_files import matches
from starmerge_models.checkpoints.tensors import TensorInfo, read_tensor
from starmerge_models.checkpoints.tokenizer import (
    FILES,
    Tokenizer,
    files_of,
    named,
    open_tokenizer,
    with_tokens,
)
from starmerge_models.checkpoints.vocabulary import (
    ABSENT,
    count_rows,
    donor_rows,
    rearranged,
    table,
    with_tables,
    without_tables,
)
from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.chat_template import folder_named, with_chat_template
from starmerge_models.reading import read_json
from starmerge_models.recipe import Recipe
from starmerge_models.storage import Place, is_file

_UNION = "--tokenizer union (tokenizer: union in a recipe)"

_MOST_COMPARED = 1000
"""Most tokens added by several models whose rows are compared."""

_ROLES = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}
"""Config keys of special tokens' ids, with the tokenizer's key of the token."""


@dataclass(frozen=True)
class _Target:
    """The tokens of the output."""

    tokens: Mapping[str, int]
    """Ids by token."""
    size: int
    """Number of rows of the output's tables."""
    new: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """For each token that the base lacks, the numbers of the models that have it, and its rows in
    them."""


def with_one_vocabulary(
    recipe: Recipe, base: Base, models: Sequence[FineTune]
) -> tuple[Base, tuple[FineTune, ...]]:
    """Rearrange the tables of base and models to the tokens of the output.

    Args:
        recipe: The recipe; ``tokenizer`` and ``chat_template`` choose those of the output.
        base: The base.
        models: The models, whose tables may have other numbers of rows than the base's.

    Returns:
        Base and models with tables of the same rows; the base has the output's tokenizer files and
        config, and notes on lost tokens.

    Raises:
        UsageError: The tokens of a model's rows are unknown; a vocabulary differs in more than
            added tokens; the tokenizer or chat template is not found.
        StarmergeError: A required tokenizer is broken.
    """
    if not base.has_weights:
        return base, tuple(models)
    merging = _Vocabularies(recipe, base, models)
    if recipe.tokenizer == "base":
        made, settled = merging.with_base_tokenizer()
    else:
        target = merging.union_target() if recipe.tokenizer == "union" else merging.chosen_target()
        made, settled = merging.with_tokens_of(target)
    made = replace(made, notes=(*made.notes, *merging.notes))
    return with_chat_template(recipe, made, models, merging.chosen), settled


class _Vocabularies:
    """The tokenizers of base and models.

    Args:
        recipe: What is merged.
        base: The base.
        models: The models.
    """

    def __init__(self, recipe: Recipe, base: Base, models: Sequence[FineTune]) -> None:
        self._recipe, self._base, self._models = recipe, base, tuple(models)
        self.notes: list[str] = []
        self._ours = open_tokenizer(base.source.path)
        self._theirs = [open_tokenizer(model.source.path) for model in models]
        self._rows = [count_rows(model, base.token_tables) for model in models]
        own = [base.checkpoint[name].shape[0] for name in base.token_tables]
        self._size = own[0] if own else 0
        self.chosen: Tokenizer | None = None
        """The output's tokenizer, if it is neither the base's nor a union."""
        self._files: dict[str, Place | bytes | None] = {}
        self._read: list[Place] = []

    # The base's tokenizer

    def with_base_tokenizer(self) -> tuple[Base, tuple[FineTune, ...]]:
        """Return base and models unchanged, except for models with another number of rows."""
        settled = []
        lost: dict[tuple[str, ...], list[str]] = {}
        for model, theirs, count in zip(self._models, self._theirs, self._rows, strict=True):
            try:
                lacking = self._lacking(theirs)
                moved = self._moved(theirs)
            except StarmergeError as error:
                # Ignore an unreadable tokenizer only if the number of rows is the base's.
                if count not in (None, self._size) or isinstance(error.__cause__, OSError):
                    raise
                self.notes.append(f"The tokenizer of {model.name} was not compared: {error}")
                settled.append(model)
                continue
            if lacking and self._recipe.output.kind == "model":
                lost.setdefault(tuple(lacking), []).append(model.name)
            is_other = any(token not in theirs.added for token in lacking) if theirs else False
            if count is not None and (count != self._size or (moved and not is_other)):
                settled.append(self._on_rows_of_the_base(model, theirs, count, lacking, moved))
            else:
                settled.append(model)
        if lost:
            listed = [
                f"{_counted(tokens)} of {' and '.join(names)} ({named(tokens)})"
                for tokens, names in lost.items()
            ]
            self.notes.append(
                f"The base's tokenizer lacks {', '.join(listed)}. The output has the base's "
                f"tokenizer; {_UNION} adds what is missing."
            )
        return self._base, tuple(settled)

    def _on_rows_of_the_base(
        self,
        model: FineTune,
        theirs: Tokenizer | None,
        count: int,
        lacking: Collection[str],
        moved: Collection[str],
    ) -> FineTune:
        """Return a model whose tables are rearranged to the base's rows."""
        is_lost = bool(lacking) and count > self._size
        is_known = self._ours is not None and theirs is not None and self._ours.tells(theirs)
        if self._recipe.common and isinstance(model, FinetunedModel) and (is_lost or not is_known):
            self.notes.append(
                f"{model.name}: its tables of {count} rows of tokens are left out, as the base has "
                f"{self._size}; {_UNION} merges them by token, where the tokenizers are known."
            )
            return without_tables(model, self._base.token_tables)
        if theirs is None or not is_known:
            raise UsageError(
                f"{model.source} has {count} rows of tokens, the base {self._base.source} "
                f"{self._size}, and which belong together cannot be told, as not both folders have "
                "a tokenizer.json. Put it there; transformers' AutoTokenizer saves it."
            )
        if is_lost:
            raise UsageError(
                f"{model.source} has {count} rows of tokens, the base {self._base.source} "
                f"{self._size}: its tokenizer adds {named(lacking)}. Merge with {_UNION}, which "
                "keeps the new tokens, each with its own row."
            )
        rows = self._rows_of(self._target_of_the_base(), theirs, count)
        if moved:
            self.notes.append(
                f"The tokenizer of {model.name} gives other ids than the base's to "
                f"{_counted(moved)}: {named(moved)}. Its rows are merged by token."
            )
        if count != self._size:
            self.notes.append(
                f"{model.name} has {count} rows of tokens, the base {self._size}, for the same "
                f"tokens in the tokenizer: the others pad the table. The {min(count, self._size)} "
                "rows that both have are merged, and the output has as many as the base."
            )
        return rearranged(model, self._base, self._base.token_tables, rows)

    def _target_of_the_base(self) -> _Target:
        assert self._ours is not None
        return _Target(self._ours.tokens, self._size)

    # Another tokenizer

    def union_target(self) -> _Target:
        """Return the base's tokens and those that models add, and assemble the tokenizer.

        Added tokens are numbered consecutively, as the tokenizers library does. A token keeps its
        id from a model if that id is the next free one and no other new token has it.
        """
        ours = self._known()
        found: dict[str, list[tuple[int, int]]] = {}
        entries: dict[str, Mapping[str, Any]] = {}
        for t, theirs in enumerate(self._theirs):
            if theirs is None or theirs.has_same_files(ours):
                continue
            self._read += theirs.token_files
            for token, number in self._additions(self._models[t].name, theirs).items():
                found.setdefault(token, []).append((t, number))
                entries.setdefault(token, theirs.added[token])
        tokens = dict(ours.tokens)
        following = max([len(ours.vocabulary), *(own["id"] + 1 for own in ours.added.values())])
        # In the order of the ids in the first model that has the token, then of the models.
        for token in sorted(found, key=lambda token: (found[token][0][1], found[token][0][0])):
            tokens[token] = following
            following += 1
        for t, model in enumerate(self._models):
            moved = [
                f"{token} ({number} there, {tokens[token]} here)"
                for token, own in found.items()
                for of, number in own
                if of == t and number != tokens[token]
            ]
            if moved:
                self.notes.append(
                    f"New tokens of {model.name} have other ids in the output's tokenizer than in "
                    f"its own: {named(moved)}."
                )
        if found:
            self._read += ours.token_files
            self.notes.append(
                f"The output's tokenizer has {_counted(found)} more than the base's: "
                f"{named(found)}."
            )
            self._files = with_tokens(
                ours, [{**entries[token], "id": tokens[token]} for token in found]
            )
        size = max(self._size, following) if found else self._size
        return _Target(tokens, size, found)

    def chosen_target(self) -> _Target:
        """Return the tokens of the tokenizer that the recipe names, and use its files."""
        ours = self._known()
        folder = folder_named(self._recipe.tokenizer, "tokenizer", self._models)
        chosen = open_tokenizer(folder)
        if chosen is None or not chosen.vocabulary:
            raise UsageError(
                f"{folder} has no tokenizer.json with a vocabulary, so its tokens are not known. "
                "Load its tokenizer with transformers' AutoTokenizer and save it again."
            )
        self.chosen = chosen
        additions = self._additions(str(folder), chosen)
        found: dict[str, list[tuple[int, int]]] = {token: [] for token in additions}
        for t, theirs in enumerate(self._theirs):
            for token, number in theirs.tokens.items() if theirs is not None else ():
                if token in found:
                    found[token].append((t, number))
        unknown = [token for token, having in found.items() if not having]
        if unknown:
            self.notes.append(
                f"No model has the tokenizer's tokens {named(unknown)}: their rows are the mean "
                "of the base's, as of tokens that were never trained."
            )
        dropped = chosen.lacks(ours)
        if dropped:
            self.notes.append(
                f"The output's tokenizer lacks {named(dropped)}, "
                f"{_counted(dropped)} of the base's, whose rows are left out."
            )
        for model, theirs in zip(self._models, self._theirs, strict=True):
            lost = chosen.lacks(theirs) if theirs is not None else {}
            lost = {token: number for token, number in lost.items() if token not in dropped}
            if lost:
                self.notes.append(
                    f"The tokenizer of {model.name} has tokens that the output's lacks: "
                    f"{named(lost)}; {_UNION} would keep them."
                )
        config = read_config(folder) if is_file(folder / "config.json") else {}
        stated = (config.get("text_config") or config).get("vocab_size")
        size = max([number + 1 for number in chosen.tokens.values()])
        if type(stated) is int:
            size = max(size, stated)
        elif not dropped and not ours.moved(chosen):
            size = max(size, self._size)
        self._files = {name: None for name in self._base.side_files if matches(name, FILES)}
        self._files |= files_of(folder)
        self._read += [*files_of(folder).values(), *ours.token_files]
        return _Target(chosen.tokens, size, found)

    def with_tokens_of(self, target: _Target) -> tuple[Base, tuple[FineTune, ...]]:
        """Return base and models with tables rearranged to the tokens of the target."""
        ours, names = self._known(), self._base.token_tables
        if not names:
            raise UsageError(
                f"{self._base.source}: no tensor has as many rows as vocab_size in config.json "
                "says, so tokens cannot be added. Leave --tokenizer out."
            )
        mine = self._rows_of(target, ours, self._size)
        tables: dict[str, TensorInfo] = {}
        if not _is_identity(mine, self._size):
            for name in names:
                parts, rows = [self._base.checkpoint[name]], [mine]
                for part, own in self._donors(name, target):
                    parts.append(part)
                    rows.append(own)
                tables[name] = table(name, parts, rows, parts[0].dtype)
        self._compare(target)
        checkpoint = with_tables(self._base.checkpoint, tables)
        config = self._config(self._base.config, target)
        files = {**self._files}
        generation = self._base.source.path / "generation_config.json"
        if self.chosen is not None and is_file(generation):
            content = read_json(generation)
            files[generation.name] = json_bytes(self._with_ids(content, target.tokens))
        made = replace(
            self._base,
            checkpoint=checkpoint,
            config=config,
            replaced_files=files,
            made_of=tuple(dict.fromkeys(self._read)),
        )
        settled = []
        for model, theirs, count in zip(self._models, self._theirs, self._rows, strict=True):
            if count is None:
                settled.append(model)
                continue
            if theirs is None and count != self._size:
                raise UsageError(
                    f"{model.source} has {count} rows of tokens, the base {self._size}, and no "
                    "tokenizer in its folder, so which token each row is cannot be told. Put its "
                    "tokenizer.json there."
                )
            own = self._rows_of(target, theirs or ours, count)
            is_same = count == self._size and _is_identity(own, count) and not tables
            settled.append(model if is_same else rearranged(model, made, names, own))
        return made, tuple(settled)

    def _donors(self, name: str, target: _Target) -> Iterator[tuple[TensorInfo, Tensor]]:
        """Yield the tables that provide rows of new tokens, with the row for each id."""
        for t, model in enumerate(self._models):
            wanted = {
                target.tokens[token]: number
                for token, having in target.new.items()
                for of, number in having
                if of == t
            }
            if wanted:
                part, numbers = donor_rows(model, self._base, name, list(wanted.values()))
                rows = torch.full((target.size,), ABSENT, dtype=torch.int64)
                rows[list(wanted)] = torch.tensor(numbers, dtype=torch.int64)
                yield part, rows

    def _compare(self, target: _Target) -> None:
        """Add a note on new tokens for which several models have different rows."""
        several = {token: having for token, having in target.new.items() if len(having) > 1}
        if not several:
            return
        name = self._base.token_tables[0]
        rows: dict[str, list[Tensor]] = {}
        for t, model in enumerate(self._models):
            own = {
                token: number
                for token, having in list(several.items())[:_MOST_COMPARED]
                for of, number in having
                if of == t
            }
            if own:
                part, numbers = donor_rows(model, self._base, name, list(own.values()))
                read = read_tensor(part)
                for token, number in zip(own, numbers, strict=True):
                    if number != ABSENT:
                        rows.setdefault(token, []).append(read[number].float())
        differing = [
            token
            for token, found in rows.items()
            if any(not torch.equal(found[0], other) for other in found[1:])
        ]
        if differing:
            models = sorted({t for token in differing for t, _ in several[token]})
            names = " and ".join(self._models[t].name for t in models)
            self.notes.append(
                f"Conflict in the tokenizers of {names}: they have different rows for new tokens "
                f"of the same name ({named(differing)}), which get the mean of them."
            )

    # Parts of both

    def _known(self) -> Tokenizer:
        """Return the base's tokenizer."""
        if self._ours is None or not self._ours.vocabulary:
            raise UsageError(
                f"{self._base.source} has no tokenizer.json with a vocabulary, so its tokens are "
                "not known, and no others can be added. Load its tokenizer with transformers' "
                "AutoTokenizer and save it again, or leave --tokenizer out."
            )
        return self._ours

    def _lacking(self, theirs: Tokenizer | None) -> dict[str, int]:
        if theirs is None or self._ours is None:
            return {}
        return self._ours.lacks(theirs)

    def _moved(self, theirs: Tokenizer | None) -> dict[str, int]:
        if theirs is None or self._ours is None:
            return {}
        return self._ours.moved(theirs)

    def _additions(self, name: str, theirs: Tokenizer) -> dict[str, int]:
        """Return the tokens of a tokenizer that the base's lacks; all must be added tokens."""
        lacking = self._known().lacks(theirs)
        other = [token for token in lacking if token not in theirs.added]
        if other:
            raise UsageError(
                f"The tokenizer of {name} has another vocabulary than the base's, not only added "
                f"tokens: {len(other)} of its trained tokens are not in the base's, such as "
                f"{named(other)}. Such models share no rows; merge with the base's tokenizer, or "
                "leave the model out."
            )
        return lacking

    def _rows_of(self, target: _Target, theirs: Tokenizer, count: int) -> Tensor:
        """Return a model's row for each row of the output, or :data:`ABSENT`.

        Rows without a token in both keep their index. Rows of new tokens are taken from the base,
        so they are absent.
        """
        own = torch.full((target.size,), ABSENT, dtype=torch.int64)
        common = min(count, target.size)
        if theirs.tokens == target.tokens:
            own[:common] = torch.arange(common)
            return own
        tokens = theirs.tokens if theirs.vocabulary else {**self._known().tokens, **theirs.tokens}
        own[:common] = torch.arange(common)
        taken = [i for i in (*target.tokens.values(), *tokens.values()) if i < common]
        own[taken] = ABSENT
        pairs = [
            (number, tokens[token])
            for token, number in target.tokens.items()
            if tokens.get(token, count) < count and token not in target.new
        ]
        if pairs:
            places, numbers = torch.tensor(pairs, dtype=torch.int64).T
            own[places] = numbers
        return own

    def _config(self, base: Mapping[str, Any], target: _Target) -> dict[str, Any]:
        """Return the output's config, with its number of rows and its special tokens' ids."""
        config = dict(base)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and part.get("vocab_size") == self._size:
                changed = {**part, "vocab_size": target.size}
                if part is config:
                    config = changed
                else:
                    config["text_config"] = changed
        if self.chosen is None:
            return config
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = self._with_ids(config["text_config"], target.tokens)
        return self._with_ids(config, target.tokens)

    def _with_ids(self, config: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, Any]:
        """Return a config with the special tokens' ids of the chosen tokenizer.

        Ids are mapped to the new id of the same token, but the tokens for begin, end and padding
        are those of the chosen tokenizer.
        """
        assert self.chosen is not None
        by_id = {number: token for token, number in self._known().tokens.items()}

        def moved(number: Any) -> Any:
            is_ours = type(number) is int and number in by_id
            return tokens.get(by_id[number]) if is_ours else number

        found = dict(config)
        for key, value in config.items():
            is_id = key.endswith(("_token_id", "_token_ids", "_token_index", "suppress_tokens"))
            if not is_id or value is None:
                continue
            role = tokens.get(self.chosen.roles.get(_ROLES.get(key, ""), ""))
            if isinstance(value, list):
                ids = [own for own in map(moved, value) if own is not None]
                found[key] = ids if role is None or role in ids else [role, *ids]
            elif type(value) is int:
                found[key] = moved(value) if role is None else role
        return found


def _counted(tokens: Collection[str]) -> str:
    return "a token" if len(tokens) == 1 else f"{len(tokens):,} tokens"


def _is_identity(rows: Tensor, count: int) -> bool:
    """Return whether rows are 0, 1, … count − 1."""
    return len(rows) == count and torch.equal(rows, torch.arange(count))
