"""A validated object that does not change, and whose content outlives new fields."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class Frozen(BaseModel):
    """A validated object that does not change.

    Attributes:
        unwritten: fields that are not written where they hold their default. A field that joins a finished format is
            named here, so that the content of what was written before it, and with it every hash, stays what it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    unwritten: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        for name in self.unwritten & fields.keys():
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True):
                del fields[name]
        return fields
