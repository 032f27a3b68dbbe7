"""Every error of the library. Each message says what was got, what was wanted and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoepeftError(Exception):
    """Base class: catch it to catch whatever this library raises on purpose."""


class UnknownMethod(MoepeftError, KeyError):
    """No method or preset of that name is registered."""

    def __str__(self) -> str:
        # KeyError would print the message with quotes and escapes.
        return str(self.args[0])


class ConfigError(MoepeftError, ValueError):
    """A hyper-parameter is out of range, or two contradict each other."""


class NoMatchingSite(MoepeftError, ValueError):
    """A pattern of `attach` matched no linear layer of the model."""


class Unsupported(MoepeftError):
    """The method cannot work on this model; the message says why."""


class AlreadyAttached(MoepeftError):
    """The model carries an adapter already."""


class MissingRouting(MoepeftError, ValueError):
    """A routed method was called without the task ids (or the mask) it needs, or with the wrong number of them."""


class AuxLossDetached(MoepeftError, RuntimeError):
    """An auxiliary loss has no gradient although the model is training."""


class MissingStep(MoepeftError, RuntimeError):
    """An optimiser stepped, but `after_step` was not called for a method that needs it."""


class GradientsLost(MoepeftError, RuntimeError):
    """A part of a training model runs where no gradient can reach its adapters."""


class NotMergeable(MoepeftError):
    """The update depends on the input, or the base weights cannot take it."""


class ContractError(MoepeftError, AssertionError):
    """A method does not do what it declares, or what every method must do (`moepeft.testing`)."""


class TransformersMissing(MoepeftError, ImportError):
    """The `transformers` package is not installed."""


class HubMissing(MoepeftError, ImportError):
    """The `huggingface_hub` package is not installed."""


class AdapterFileError(MoepeftError):
    """A saved adapter is missing, damaged, foreign or made for another model. The model was left as it was.

    Its message quotes files of unknown origin: it is one line of printable characters, and not a long one.
    """

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing sentence for errors on unknown names: close ones first, then all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} Available: {', '.join(known)}."
