"""Experts from the Hugging Face Hub: snapshots in the local cache, downloaded if needed."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial
from pathlib import Path

from pimerge.adapters.expert_files import CONFIG, TASK, WEIGHTS
from pimerge.checkpoints.base import is_hub_id
from pimerge.checkpoints.checkpoint import INDEX
from pimerge.core.errors import PimergeError
from pimerge.core.hf_loading import download_snapshot

_OTHER_FORMATS = ("pytorch_lora_weights.safetensors", "adapters.safetensors")  # of diffusers and mlx-lm
_HUB_FILES = (
    *(CONFIG, WEIGHTS, "adapter_model-*-of-*.safetensors", WEIGHTS + INDEX, TASK, "pimerge.json"),
    *_OTHER_FORMATS,
)
_CARD = "README.md"  # states the licence
_ONLINE = "run the command once online and without HF_HUB_OFFLINE, to download it"
_HUB_REFERENCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_hub_reference(reference: str) -> bool:
    """Whether a reference can be a Hub id; an existing folder of that name takes precedence.

    >>> is_hub_reference("org/adapter@main"), is_hub_reference("./experts/a")
    (True, False)
    """
    match = _HUB_REFERENCE.fullmatch(reference)
    return match is not None and is_hub_id(match["id"])


def download(reference: str) -> Path:
    """The snapshot of a Hub id in the local cache, downloaded if needed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # httpx's, or httpx2's

    match = _HUB_REFERENCE.fullmatch(reference)
    assert match
    download = partial(download_snapshot, match["id"], match["revision"])
    try:
        path = download(allow_patterns=[*_HUB_FILES, _CARD])
    except (NetworkError, HFValidationError, OSError) as error:
        found = None
        if isinstance(error, LocalEntryNotFoundError):
            with suppress(LocalEntryNotFoundError):  # without the card, the snapshot is still usable
                found = download(allow_patterns=list(_HUB_FILES), local_files_only=True)
        if found is None:
            reason, hint = _why_no_download(error, match["id"], match["revision"])
            raise PimergeError(
                f"'{reference}' is not a folder, and it cannot be downloaded from the Hub: {reason}", hint
            ) from error
        path = found
    has_weights = any((path / name).is_file() for name in (WEIGHTS, WEIGHTS + INDEX))
    missing = " and no ".join(
        name for name, found in ((CONFIG, (path / CONFIG).is_file()), (WEIGHTS, has_weights)) if not found
    )
    if any((path / name).is_file() for name in _OTHER_FORMATS):
        missing = ""
    if missing and constants.HF_HUB_OFFLINE:
        raise PimergeError(f"the Hub's local cache has no {missing} of '{reference}'", _ONLINE)
    if missing:
        raise PimergeError(
            f"'{reference}' is not an adapter: its repository on the Hub has no {missing}",
            "expected what PEFT's save_pretrained writes, as safetensors; if it has an adapter_model.bin: "
            f"hf download {match['id']} --local-dir FOLDER, then pimerge convert FOLDER -o NEW",
        )
    return path


def _why_no_download(error: Exception, name: str, revision: str | None) -> tuple[str, str]:
    """Why a download failed, and what to do about it."""
    from huggingface_hub import errors

    # the cause of "not in the local cache" tells why the Hub could not be used
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    page = f"https://huggingface.co/{name}"
    if isinstance(cause, errors.GatedRepoError):
        return "the repository is gated", f"accept its terms at {page}, then log in with 'hf auth login'"
    if isinstance(cause, errors.RepositoryNotFoundError):  # the Hub does not distinguish the two without a login
        return (
            "there is no such repository, or it is private",
            f"check the name '{name}'; if it is private, log in with 'hf auth login' to an account with access",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the repository has no revision '{revision or 'main'}'", f"see {page}/tree/main for its branches"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "it is missing or incomplete in the local cache, and HF_HUB_OFFLINE is set", _ONLINE
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        hint = "log in again with 'hf auth login'" if status in (401, 403) else "try again later"
        return f"the Hub responded with status {status}", hint
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and it is missing or incomplete in the local cache", "check the network"
    return str(error).strip().partition("\n")[0], "check the name, the network and the disk"
