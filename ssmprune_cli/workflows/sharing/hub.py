"""`save_pretrained`, `from_pretrained` and `push_to_hub`, with the arguments of huggingface_hub's mixin.

They are functions, so that a model needs no base class of another library. huggingface_hub is imported when the hub is
asked.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.workflows.sharing.saving import save


def save_pretrained(
    model: Backbone,
    save_directory: Path | str,
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    dense: Backbone | None = None,
    **push_to_hub_kwargs: Any,
) -> str | None:
    """`save` over an earlier output of ours; with `push_to_hub` also upload the folder, to a repository of the folder's
    name unless `repo_id` says which. The address of the upload, or None."""
    if push_to_hub_kwargs and not push_to_hub:
        raise UsageError(f"{', '.join(push_to_hub_kwargs)} is for an upload: give `push_to_hub=True`")
    save(model, save_directory, dense=dense, overwrite=True)
    if not push_to_hub:
        return None
    return upload(Path(save_directory), repo_id or Path(save_directory).resolve().name, **push_to_hub_kwargs)


def from_pretrained(pretrained_model_name_or_path: Path | str, *, revision: str | None = None) -> Backbone:
    """The model in a folder of this machine, or in the repository OWNER/NAME of the hub that holds one, as
    `ssmprune_cli.load` gives it. Raises CheckpointError saying what is missing, and UsageError for a revision of a
    folder."""
    name = os.fspath(pretrained_model_name_or_path)
    if not os.path.lexists(name) and name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return checkpoint.load(f"hf://{name}{f'@{revision}' if revision else ''}")
    if revision is not None:
        raise UsageError("a folder has no revisions", where=name, hint="Leave out `revision`.")
    return checkpoint.load(name)


def push_to_hub(
    model: Backbone,
    repo_id: str,
    *,
    commit_message: str = "Upload of ssmprune",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    dense: Backbone | None = None,
) -> str:
    """`save` the model and upload it to the repository `repo_id` of the hub, made if need be; the address of the
    commit.

    private, token, branch, create_pr  as huggingface_hub takes them
    dense  see `save`

    A folder of `ssmprune compress`, with its report, is uploaded by `hf upload OWNER/NAME FOLDER`.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(model, folder, dense=dense)
        return upload(
            folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Upload of ssmprune",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload the files of `folder` to a repository, made if need be. The address of the commit."""
    hub = checkpoint.hub_library()
    with checkpoint.hub_errors(checkpoint.HubAddress(repo_id)):
        api = hub.HfApi(token=token, library_name="ssmprune")
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return str(done.commit_url)
