"""The base class of config sections, and the types and marks of their fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
CHANGEABLE: dict[str, JsonValue] = {"changeable": True}
"""Marks a field that does not change what a run computes: a run may be continued with another value."""


def derived(description: str, *, nullable: bool = True) -> dict[str, JsonValue]:
    """Marks a field whose default depends on other fields or on the model; `load` computes it. `description` explains
    the default in the help text and the JSON Schema. `nullable`: null in a file or an override selects the default."""
    return {"derived": description, "nullable": nullable}


class ConflictError(ValueError):
    """Two values of a section that contradict each other, or one that the section does not allow."""

    def __init__(self, message: str, *fields: str):
        """`message` names the fields by their paths in the config; `fields` are their paths in the section that raises
        the error, and the final message says where each was set."""
        super().__init__(message)
        self.fields = fields


class Section(BaseModel):
    """A frozen group of fields, each documented under itself. Unknown keys are errors. A section checks its own values
    with validators, which raise `ConflictError`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, serialize_by_alias=True
    )
