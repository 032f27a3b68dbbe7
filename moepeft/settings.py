"""What `with` blocks of an attachment set for the forwards inside of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .masks import Mask
from .roles import Stream


@dataclass(frozen=True)
class Settings:
    """What `with` blocks of an attachment have set, for one thread or task.

    Attributes:
        enabled: False inside `Attachment.disabled`.
        task_ids: set by `Attachment.route`; those given to the call itself win.
        masks: set by `Attachment.route`, by stream.
        stats: site name -> routing statistics, inside `Attachment.recording`.
        copies: how often `generate` repeats each row, in place.
    """

    enabled: bool = True
    task_ids: Tensor | None = None
    masks: Mapping[Stream, Mask] = field(default_factory=dict)
    stats: dict[str, dict[str, Tensor]] | None = None
    copies: int = 1


DEFAULT = Settings()
