"""A checkpoint folder goes to the model hub: config.json, model.safetensors and the card.

The copy on the hub names files and folders of this machine by their names alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinyvl import UserError, files, models, models_card, runs
from tinyvl.hub import hub_reachable
from tinyvl.progress import say

WEIGHTS = "model.safetensors"


def push(
    name: str, repository: str, *, private: bool = False, message: str = "",
    scores: Sequence[Path] = (),
) -> str:  # fmt: skip
    """Uploads a checkpoint, -> the ``hf://owner/name`` that loads it.

    Args:
        name: as in `models.checkpoint_folder`.
        repository: ``owner/name``; it is made if it is not there yet.
        private: where it is made: only its owner sees it.
        message: of the commit.
        scores: folders with evaluations (`tinyvl eval -o`); those of these weights are in the card.

    UserError: the repository cannot be called so, there is no sound checkpoint, no token, no hub
    that answers, or the hub refuses.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository = repository.removeprefix("hf://")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise UserError("A repository of the model hub is called owner/name; give such a name.", 2)
    found = models.open_checkpoint(name)
    check(found)
    text = card(found, repository, scores)
    if not (token := get_token()):
        raise UserError("The model hub wants a token: run `hf auth login`, or set HF_TOKEN.")
    if not hub_reachable():
        raise UserError("The model hub cannot be reached from here; nothing was uploaded.")
    config = models_card.published(found.config)
    for side, part in models.backbones(found.config).items():
        if models_card.is_path(part["name"]):
            where = f"beside which a folder {config[side]['name']} with the same weights lies"
            say(f"The {side} is a folder of this machine: others can load this model {where}.")
    content = {
        "config.json": files.dump(config, indent=1).encode() + b"\n",
        WEIGHTS: str(found.folder / WEIGHTS),
        "README.md": text.encode(),
    }
    upload(repository, content, token, private, message or f"{config['method']} by tinyvl")
    if models_card.MADE in text and not found.name.startswith("hf://"):
        files.write_text(found.folder / "README.md", text)
    return f"hf://{repository}"


def check(found: models.Checkpoint) -> None:
    """Raises a UserError where config and weights do not make a model; reads no backbone."""
    device = torch.device("meta")
    model = models.build(found.config, device=device, precision=torch.float32, weights=False)
    models.load_weights(model, found.folder)


def card(found: models.Checkpoint, repository: str, scores: Sequence[Path]) -> str:
    """The card for the hub: made anew, but a person's own stays."""
    file = found.folder / "README.md"
    old = files.read_text(file) if file.is_file() else ""
    if old and models_card.MADE not in old:
        return old
    command = models.command_of(found.config) or models_card.command_in(old)
    row = runs.Seen(found.folder, found.config).row()
    keys = ("trained", "step", "epoch", "val_loss", "captions_per_second")
    summary = {key: row[key] for key in keys if row[key] is not None}
    reports = runs.evaluations(found.folder, [found.folder, *scores])
    more: dict[str, Any] = {"evaluations": reports, "name": repository, "command": command}
    return models.card_of(found, summary, **more)


def upload(
    repository: str, content: dict[str, Any], token: str, private: bool, message: str
) -> None:
    """Commits bytes, and files by their paths, to a repository. UserError: the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    say(f"Uploading to {repository} ...")
    api = HfApi(token=token, library_name="tinyvl")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        parts = [CommitOperationAdd(where, what) for where, what in content.items()]
        api.create_commit(repository, parts, commit_message=message)
    except Exception as error:  # which HTTP library it uses, and raises from, changes
        said = getattr(error, "server_message", None) or str(error)
        reason = said.strip().partition("\n")[0] or type(error).__name__
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        may = "this token may not write there" if refused else reason
        raise UserError(f"{repository}: the model hub did not take it ({may}).") from error
