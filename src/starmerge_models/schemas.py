"""JSON Schemas of the files that users write, by which editors check and complete them."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticOmit

from starmerge_models.errors import UsageError, nearest
from starmerge_models.evaluation.tasks.files import DataTask
from starmerge_models.evaluation.tasks.suites import Suite
from starmerge_models.recipe import Recipe
from starmerge_models.study.study_file import Study

SCHEMAS: dict[str, Any] = {"recipe": Recipe, "task": DataTask, "suite": Suite, "study": Study}
"""What is described, by name."""

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a recipe, a task, a suite or a study, as its file is written.

    What is known only when a file is used stays open: the parameters of a method, the fields of
    rows. Files in mergekit's keys are not described.

    Args:
        name: A key of :data:`SCHEMAS`.

    Raises:
        UsageError: There is no such schema.
    """
    if name not in SCHEMAS:
        raise UsageError(f"There is no schema of {name!r}.{nearest(name, SCHEMAS)}")
    schema = TypeAdapter(SCHEMAS[name]).json_schema(schema_generator=_Files)
    if name == "recipe":  # in a file of several
        about = "in a file of several recipes, by which others name the merge of this one"
        schema["properties"]["name"] = {"type": "string", "description": about}
    return {"$schema": _DIALECT, **schema, "title": f"starmerge: {name}"}


class _Files(GenerateJsonSchema):
    """Schemas of files: their readers give a name to what has none."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        """Describe an object by its keys; the summary of its docstring is enough."""
        found = super().model_schema(schema)
        found["required"] = [key for key in found.get("required", ()) if key != "name"]
        if not found["required"]:
            del found["required"]
        if "description" in found:
            found["description"] = found["description"].partition("\n\n")[0]
        return found

    def callable_schema(self, schema: Any) -> JsonSchemaValue:
        """Leave out functions, which no file holds."""
        raise PydanticOmit
