"""The JSON schema of a recipe, by which editors complete and check it while it is written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from gymtrl.pipeline.sections import SECTIONS, JobSettings

TITLE = "Recipe of gymtrl"
_OURS = ("flags", "changes_result", "source")


def recipe_schema() -> dict[str, Any]:
    """Returns the schema (JSON Schema 2020-12) of a whole recipe.

    Nothing is required, since a verb takes from flags what a recipe leaves out.
    """
    fields: dict[str, Any] = {
        f"section_{number}": (model | None, Field(default=None, alias=verb, description=model.__doc__))
        for number, (verb, model) in enumerate(SECTIONS.items())
    }
    recipe: type[BaseModel] = create_model("Recipe", __config__=ConfigDict(extra="forbid"), **fields)
    schema = recipe.model_json_schema(by_alias=True)
    job = JobSettings.model_json_schema()
    schema["properties"] = {**job["properties"], **schema["properties"]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = TITLE
    for model in SECTIONS.values():
        schema["$defs"][model.__name__].pop("required", None)
    for properties in (job["properties"], *(part.get("properties", {}) for part in schema["$defs"].values())):
        for shape in properties.values():
            _explain(shape)
    return schema


def _explain(shape: dict[str, Any]) -> None:
    """Puts where the default comes from into the words that an editor shows."""
    if "source" in shape:
        shape["description"] = f"{shape['description'].rstrip('.')}. [{shape['source']}]"
    for name in _OURS:
        shape.pop(name, None)
