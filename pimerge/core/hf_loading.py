"""The one place that loads with transformers, PEFT, datasets and the Hub, so that nothing from a download is run.

Code beside a config (``auto_map``) and kernels of the Hub are never run, and weights are read from safetensors only.
A test reads the syntax tree of every module and fails if another one calls the libraries' loaders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pimerge.core.errors import PimergeError
from pimerge.core.files import read_json
from pimerge.core.patterns import require_bounded
from pimerge.core.plain_names import is_plain_name

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig, PeftModel
    from torch import nn

_OWN_CODE = "choose a base that transformers knows: pimerge never runs code from a model's folder or the Hub"


def load_config(source: str | Path, revision: str | None = None, **fields: Any) -> Any:
    """The config of a model that transformers knows.

    Args:
        source: a folder or a Hub id.
        fields: fields in place of the config's own.
    """
    from transformers import AutoConfig

    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # else weights of a pull request would be read
    try:
        with _malformed_as_value_error(source):
            config = AutoConfig.from_pretrained(str(source), revision=revision, trust_remote_code=False, **fields)
    except (ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise PimergeError(f"the model '{source}' needs code of its own", _OWN_CODE) from error
        raise
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "get_text_config"))):
        for name, value in vars(part).items():
            if "implementation" in name and "/" in str(value):  # transformers would download a kernel and run it
                raise PimergeError(f"the config of '{source}' names code on the Hub, '{value}'", "remove it there")
    return config


def load_model(model_class: Any, source: str | Path, revision: str | None = None, **options: Any) -> Any:
    """A model with its weights, which are read from safetensors only.

    Args:
        model_class: a class of transformers.
    """
    with _malformed_as_value_error(source):
        return model_class.from_pretrained(
            str(source), revision=revision, trust_remote_code=False, use_safetensors=True, weights_only=True, **options
        )


def model_of_config(model_class: Any, config: Any) -> Any:
    """A model without its weights, of one of transformers' automatic classes."""
    with _malformed_as_value_error(getattr(config, "name_or_path", "")):
        return model_class.from_config(config, trust_remote_code=False)


def load_processor(processor_class: Any, source: str | Path, revision: str | None = None) -> Any:
    """A tokenizer, image processor or processor of a model.

    Args:
        processor_class: one of transformers' automatic classes.
    """
    with _malformed_as_value_error(source):
        return processor_class.from_pretrained(str(source), revision=revision, trust_remote_code=False)


@contextmanager
def _malformed_as_value_error(source: str | Path) -> Iterator[None]:
    """Raise a ValueError for whatever transformers runs into when a document of a model is not what it expects.

    It does not validate ``config.json`` and the files of tokenizers, so a null in place of a table is, for example, an
    AttributeError.
    """
    try:
        yield
    except (PimergeError, OSError, ValueError, KeyError, ImportError, RuntimeError, MemoryError):
        raise  # what the callers know
    except Exception as error:
        raise ValueError(f"a file of '{source}' is malformed ({type(error).__name__}: {error})") from error


def load_adapter(base_model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """Put the adapter in a local folder into a base model, with PEFT."""
    from peft import PeftModel

    _require_bounded(folder, base_model)
    return PeftModel.from_pretrained(base_model, str(folder), use_safetensors=True, **options)


def load_adapter_config(folder: Path, base_model: nn.Module) -> PeftConfig:
    """PEFT's config of the adapter in a local folder, which is to be put into a base model."""
    from peft import PeftConfig

    _require_bounded(folder, base_model)
    return PeftConfig.from_pretrained(str(folder))


def _require_bounded(folder: Path, base_model: nn.Module) -> None:
    """Refuse patterns that PEFT would match for ever, and a missing config, which PEFT would look for on the Hub."""
    require_bounded(read_json(folder / "adapter_config.json"), (name for name, _ in base_model.named_modules()))


def hub_rows(source: str, split: str, **options: Any) -> datasets.Dataset:
    """One split of a data set on the Hub."""
    import datasets

    require_hub_data(source)
    return datasets.load_dataset(source, split=split, **options)


def rows_builder(folder: Path, **options: Any) -> datasets.DatasetBuilder:
    """What reads the data in a folder."""
    import datasets

    return datasets.load_dataset_builder(str(folder.resolve()), **options)


def require_hub_data(name: str) -> None:
    """Refuse a name that is not a data set of the Hub.

    ``datasets`` takes the name of one of its formats, or of anything in the working folder, for local data.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    hint = "name a file or folder, relative to task.json, or a data set of the Hub (ORG/NAME)"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PimergeError(f"the data '{name}' do not exist", hint) from error
    if os.path.lexists(name):
        raise PimergeError(f"the data '{name}' are in the working folder, not beside task.json", hint)
    if name in _PACKAGED_DATASETS_MODULES or ("/" not in name and "." in name):
        raise PimergeError(f"the data '{name}' do not exist beside task.json", hint)


def download_snapshot(name: str, revision: str | None, **options: Any) -> Path:
    """Files of a Hub repository in the local cache, downloaded if needed; none of them is opened."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, **options))


def require_safetensors(folder: Path) -> None:
    """Refuse a model whose weights are pickles, and an index of shards that names files outside the folder."""
    pickles = sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("model*.bin"), *folder.glob("*.ckpt")})
    if pickles and not any(folder.glob("*.safetensors")):
        raise PimergeError(
            f"the weights of '{folder}' are pickles ({pickles[0].name}), which can run code when they are read; "
            "only safetensors files are read",
            f"convert it without running its code: pimerge convert {folder} -o NEW",
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            places = read_json(index)["weight_map"].values()
        except (KeyError, AttributeError, TypeError) as error:
            raise PimergeError(f"'{index}' has no weight_map", "download the index again") from error
        outside = next((place for place in places if not is_plain_name(place)), None)
        if outside is not None:
            raise PimergeError(f"'{index}' names '{outside}', which is outside its folder", "use a copy you trust")
