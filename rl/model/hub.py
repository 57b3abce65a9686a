"""Whether the hub of models and datasets can be reached. It is asked once, for seconds."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from threading import Thread

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, http_backoff, validate_repo_id

WAIT_S = 20.0


@cache
def hub_fault() -> str:
    """Why the hub cannot be asked; "" if it answers.

    Without an answer, this process and those that it starts read the hub's cache only. Otherwise libraries
    would ask six times for each file, which takes minutes.
    """
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    said: list[str] = []

    def ask() -> None:
        try:
            http_backoff("HEAD", constants.ENDPOINT, max_retries=2, retry_on_status_codes=(), timeout=5.0)
            said.append("")
        except Exception as error:  # of the HTTP library that this version of the hub's client uses
            said.append(str(error) or type(error).__name__)

    asking = Thread(target=ask, daemon=True)  # a name or many addresses may outlast every timeout of HTTP
    asking.start()
    asking.join(WAIT_S)
    if said == [""]:
        return ""
    os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
    fault = f"{constants.ENDPOINT} does not answer ({said[0] if said else f'{WAIT_S:g} s of silence'})"
    logging.getLogger(__name__).warning("%s; only the hub's cache is read (as with HF_HUB_OFFLINE=1)", fault)
    return fault


def refuse_absent(name: str) -> None:
    """Raises ValueError for a model that is neither a folder nor cached, if the hub cannot be asked."""
    if os.path.isdir(name):
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"model {name!r}: there is no such folder, and a hub has no such name") from None
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    if (fault := hub_fault()) and not any(cached.glob("*/*config.json")):
        raise ValueError(
            f"model {name!r}: there is no such folder, nor such a model in the hub's cache, and {fault}; "
            "check the spelling and the network, give the path of a model's folder, or fill the cache where "
            f"there is a network (hf download {name})"
        )
