"""The configs of the stages of a sequence, each from the sequence's keys and from the sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.models.architecture import Architecture
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.sets import with_heldout
from mono_jax.weights.upcycle import has_experts, upcycled


class StageConfigs:
    """Stages of ``config`` on the sets that ``manifest`` describes."""

    config: EvipConfig
    manifest: Mapping[str, Any]

    def stage_config(self, folder: str, init: str) -> RunConfig:
        """The stage's RunConfig: common keys, the stage's own, the sets' sources and tokenizer.

        Raises ConfigError that names the key if neither the config nor the sets have a tokenizer or sources.
        """
        values = self.config.stage_values(folder, init)
        data = values["data"]
        if "tokenizer" not in data:
            data["tokenizer"] = self.tokenizer()
        if "sources" not in data:
            data["sources"] = self.mixed_sources(folder)
        if "evaluation" in values:
            values["evaluation"] = with_heldout(values["evaluation"], self.manifest["heldout"])
        if not init:
            model = dict(values.get("model", {}))
            model.setdefault("vocab_size", self.vocabulary(data["tokenizer"]))
            values["model"] = model
        return RunConfig.from_dict(values)

    def with_vision(self, init: str, known: Architecture | None) -> Architecture | None:
        """The architecture that a stage with images needs of the weights ``init``, whose own is ``known`` (None = not
        yet).

        Raises ConfigError if there are no weights, or if they cannot get what the config asks for.
        """
        config = self.config
        if not init:
            raise ConfigError("config.init is missing: the first stage with images needs a base language model")
        if known is None or has_experts(known, config.visual_experts, config.attention_experts):
            return known
        return upcycled(known, config.vision, config.visual_experts, config.attention_experts)

    def sources(self, folder: str) -> list[dict[str, Any]]:
        """The sources that the sets have for a stage; raises ConfigError that names the key if there are none."""
        if folder not in self.manifest["stages"]:
            raise ConfigError(
                f"config.stages.{folder}.data.sources is missing, and config.sets has no stage {folder!r} "
                f"(it has {', '.join(self.manifest['stages']) or 'none'})"
            )
        return self.manifest["stages"][folder]["sources"]

    def mixed_sources(self, folder: str) -> list[dict[str, Any]]:
        """The stage's own sources and those of other stages that ``config.replay`` mixes in, all with
        ``config.filters``.

        They include the scores that ``config.scores`` asks for.
        """
        replay = self.config.replay.get(folder, {})
        own = self.sources(folder) if (rest := 1 - sum(replay.values())) > 0 else []
        if replay and any("weight" in source for source in own):  # keep their proportions
            scale = rest / sum(source["weight"] for source in own)
            own = [{**source, "weight": source["weight"] * scale} for source in own]
        self.check_replay(folder)
        mixed = [source for other, share in replay.items() for source in self._replayed(other, share)]
        sources = self.scored(folder, [*own, *mixed]) if folder in self.config.scores else [*own, *mixed]
        filters = self.config.filters.get(folder, {})
        return [_filtered(source, filters) if filters else source for source in sources]

    def check_replay(self, folder: str) -> None:
        """Raises ConfigError for a stage to replay that there is not, even where it adds nothing to a stage's own
        sources."""
        known = self.manifest["stages"] or self.config.stages
        for other in self.config.replay.get(folder, ()):
            if other not in known:
                raise unknown_key(f"stage in config.replay.{folder}", other, known)

    def scored(self, folder: str, sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The stage's sources with the scores that ``config.scores`` asks for; here without them."""
        return [dict(source) for source in sources]

    def _replayed(self, stage: str, share: float) -> list[dict[str, Any]]:
        """A stage's sources under distinct names, with ``share`` of the samples in total, in the proportions they have
        there."""
        sources = self.sources(stage)
        weights = [source.get("weight", 1 / len(sources)) for source in sources]
        return [
            {**source, "name": f"{stage}_{source['name']}", "weight": share * weight / sum(weights)}
            for source, weight in zip(sources, weights)
        ]

    def tokenizer(self) -> str:
        """The tokenizer of all stages; raises ConfigError if there is none."""
        found = self.config.data.get("tokenizer") or self.manifest["tokenizer"]
        if not found:
            raise ConfigError("config.data.tokenizer is missing: give a folder or file, or sets that have one")
        return found

    def vocabulary(self, tokenizer: str) -> int:
        """Number of tokens of a tokenizer; raises DataError."""
        return Tokenizer(tokenizer).vocab_size


def _filtered(source: Mapping[str, Any], filters: Mapping[str, Any]) -> dict[str, Any]:
    spec = source["spec"]
    return {**source, "spec": {**spec, "filters": {**spec.get("filters", {}), **filters}}}
