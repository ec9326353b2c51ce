"""The prompt format of a model. It is determined by the training, so it is stored with the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """Template and tiling: the keys of ``data_pipelines.config.DataConfig``, with its defaults."""

    template: str = field("internlm2-chat", help="chat template; tokenizer = the one that the tokenizer brings")
    system_message: str | None = field(None, help='system turn; None = the template\'s own, "" = none')
    min_tiles: int = field(1, ge=1, help="minimum tiles of an image, not counting the thumbnail")
    max_tiles: int = field(6, ge=1, help="maximum tiles of an image")
    thumbnail: bool = field(True, help="append the whole image as one more tile where there are several")

    def __post_init__(self) -> None:
        strict.check(self, "prompt", ConfigError)
        if self.min_tiles > self.max_tiles:
            raise ConfigError(f"prompt.min_tiles is {self.min_tiles}, max_tiles {self.max_tiles}: use min <= max")

    @classmethod
    def of(cls, data: Any) -> PromptFormat:
        """The prompt format of a DataConfig, or of anything with its attributes."""
        return cls(**{spec.name: getattr(data, spec.name) for spec in dataclasses.fields(cls)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: Path) -> PromptFormat:
        """Raises ConfigError that names ``file`` and the key."""
        try:
            return strict.build(cls, values, "prompt", ConfigError)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        return strict.to_dict(self)


_HF_KEYS = {  # Hugging Face's name: ours; the last one is in no published config
    "template": "template",
    "min_dynamic_patch": "min_tiles",
    "max_dynamic_patch": "max_tiles",
    "use_thumbnail": "thumbnail",
    "system_message": "system_message",
}
PROMPT_KEYS = (*_HF_KEYS, "dynamic_image_size")  # of a config.json


def prompt_from_hf(values: Mapping[str, Any], file: Path, template: str | None = None) -> PromptFormat:
    """The prompt format that a config.json describes; raises ConfigError that names ``file`` and the key.

    template: used if it names none; None = the default.
    """
    found = {} if template is None else {"template": template}
    found |= {ours: values[theirs] for theirs, ours in _HF_KEYS.items() if values.get(theirs) is not None}
    if values.get("dynamic_image_size") is False:
        found |= {"min_tiles": 1, "max_tiles": 1}
    return PromptFormat.from_dict(found, file)


def prompt_to_hf(prompt: PromptFormat | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that make the config.json ``values`` describe ``prompt``; empty if it already does."""
    try:
        if prompt is None or prompt_from_hf(values, Path("config.json")) == prompt:
            return {}
    except ConfigError:
        pass  # unreadable values are replaced
    keys = {theirs: getattr(prompt, ours) for theirs, ours in _HF_KEYS.items()}
    if prompt.system_message is None and "system_message" not in values:
        del keys["system_message"]
    return keys | {"dynamic_image_size": True}
