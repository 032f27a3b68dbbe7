"""Adapters on the hub: read by ``owner/name@revision``, and sent with a card that says what they are."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from . import saving
from .config import task_number
from .errors import AdapterFileError, HubMissing
from .identity import describe
from .protocols import AdapterFactory
from .state import State
from .trained import TRAINED, of_no_base, owners

CARD = "README.md"
_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
_FILES = [saving.CONFIG, saving.WEIGHTS, TRAINED, "adapter_config.json", "adapter_model.safetensors"]


def find_folder(place: str | Path) -> Path:
    """The folder itself, or the local copy of what a hub id means.

    Raises:
        AdapterFileError: the hub has no such adapters, or cannot be reached.
        HubMissing: `huggingface_hub` is not installed.
    """
    named = _ID.fullmatch(place) if isinstance(place, str) else None
    if named is None or Path(place).exists():
        return Path(place)
    hub = _hub()
    try:
        return Path(hub.snapshot_download(named["id"], revision=named["revision"], allow_patterns=_FILES))
    except Exception as error:  # of the network, of the hub, of its cache: all mean that there are no files
        raise AdapterFileError(
            f"there is no folder {str(place)!r}, and the hub gave none ({type(error).__name__}: {error}): check the id "
            "owner/name@revision and the network"
        ) from error


def push(state: State, repo_id: str, tasks: Sequence[str], record: Mapping[str, Any] | None, private: bool) -> str:
    """See `moepeft.attachment.Attachment.push_to_hub`."""
    hub = _hub()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving.save(state, folder)
        (folder / CARD).write_text(model_card(state, repo_id, tasks, record), "utf-8")
        api = hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                commit_message="Adapters of moepeft",
                delete_patterns=[TRAINED],  # of adapters that were there before, with a head
            )
        )


def model_card(state: State, repo_id: str, tasks: Sequence[str] = (), record: Mapping[str, Any] | None = None) -> str:
    """The card: method, source of its equations, base, tasks, how to load, and the scores of a record.

    Args:
        state: of the attachment.
        repo_id: where the adapters can be loaded from.
        tasks: names in the order of the task ids; none: numbers.
        record: a run of the benchmark, as its JSON file holds it: ``scores`` by task.
    """
    factory, base = state.factory, state.base or describe(state.model, of_no_base(state.model))
    # A path of this machine says nothing to who reads the card.
    known = base["id"] if base["id"] and _ID.fullmatch(base["id"]) and not Path(base["id"]).exists() else None
    number = task_number(factory) if factory.capabilities.routing == "task" else None
    names = tasks or [f"task {task}" for task in range(number or 0)]
    beside = ", ".join(owners(state))
    trained = sum(parameter.numel() for _, parameter in state.named_parameters() if parameter.requires_grad)
    lines = [
        *("---", "library_name: moepeft", f"tags: [moepeft, {factory.name}]"),
        *([f"base_model: {known}"] if known else []),
        *("---", "", f"# {repo_id}", ""),
        f"Adapters of the method `{factory.name}`: {trained:,} numbers on {len(state.sites)} layers of a "
        + base["class"]
        + (f" ({known}, revision {base['revision'] or 'unknown'})." if known else "."),
        *([f"Trained beside the adapters: {beside}."] if beside else []),
        *_method(factory),
        *(["", "## Tasks", "", *(f"{index}. {name}" for index, name in enumerate(names))] if names else []),
        *_scores(record),
        *("", "## Use", "", "```python", "import moepeft", ""),
        *(f'adapters = moepeft.load(model, "{repo_id}")', "```", ""),
    ]
    return "\n".join(lines)


def _method(factory: AdapterFactory) -> list[str]:
    """What the method is, where its equations stand, and its hyper-parameters."""
    head = inspect.getdoc(inspect.getmodule(type(factory))) or ""
    papers = [f"[arXiv {paper}](https://arxiv.org/abs/{paper})" for paper in _PAPER.findall(head)]
    fields = dataclasses.asdict(factory)  # type: ignore[call-overload]
    return [
        *("", "## Method", "", head.partition("\n")[0], ""),
        f"Equations: {papers[0] if papers else f'`{type(factory).__module__}`'}.",
        *("", "| hyper-parameter | value |", "| --- | --- |"),
        *(f"| {name} | {value} |" for name, value in fields.items()),
    ]


def _scores(record: Mapping[str, Any] | None) -> list[str]:
    if record is None:
        return []
    rows = [
        f"| {task} | {metric} | {'undefined' if value is None else f'{value:.4f}'} | {score['rows']} |"
        for task, score in record["scores"].items()
        for metric, value in score["metrics"].items()
    ]
    return ["", "## Scores", "", "| task | metric | value | rows |", "| --- | --- | --- | --- |", *rows]


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubMissing("this needs the huggingface_hub package: pip install 'moepeft[trainer]'") from error
    module: ModuleType = huggingface_hub
    return module
