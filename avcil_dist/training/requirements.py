"""What a method needs, held against the configuration and the data before anything starts."""

from avcil_dist.config import Config, TransformerConfig
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.sources import source_disjoint
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method, method_class, method_names
from avcil_dist.methods.base import Needs
from avcil_dist.scenario import Scenario


def check_needs(config: Config, manifest: Manifest, scenario: Scenario) -> None:
    """Raises ConfigError, naming what would do instead, for a method that cannot have what it needs."""
    needs, name = make_method(config.method).needs, config.method.name
    _check_modality(config, needs)
    _check_memory(config, needs, scenario)
    if not needs.trains_at(1) and config.engine.zero_stage:
        raise ConfigError(
            f"engine.zero_stage={config.engine.zero_stage}: method {name} keeps no optimizer state that could be "
            "shared out; use engine=zero0"
        )
    if config.data.source_disjoint:
        _check_sources(config, manifest, scenario)
    if needs.design.pool is not None and manifest.kind == "clip":
        _check_fixed_encoders(config)


def describe(needs: Needs) -> list[str]:
    """What a method needs, in words."""
    memory = {"none": [], "replay": ["memory (exemplars beside current clips)"], "join": ["memory (exemplars join)"]}
    said = {
        "teacher": needs.teacher,
        "herding": needs.selection == "herding",
        "features of exemplars": needs.means,
        "attention of both modalities": needs.divergence,
        "both modalities": needs.both_modalities,
        "gradients of the teacher": needs.importance,
        "a head of proxies": needs.design.head == "proxies",
        "all data of seen classes": needs.all_data,
        "a fresh network each step": needs.fresh_network,
        "validation clips": needs.validation,
        "gradients at step 0 alone": needs.training == "first step",
        "no gradients": needs.training == "never",
    }
    return [*memory[needs.memory], *(words for words, needed in said.items() if needed)]


def _check_modality(config: Config, needs: Needs) -> None:
    if config.model.modality == "both" or not needs.both_modalities:
        return
    others = [name for name in method_names() if not _default_needs(name).both_modalities]
    raise ConfigError(
        f"model.modality={config.model.modality}: method {config.method.name} compares sound with pictures; use "
        f"model.modality=both, or one of {', '.join(others)}, or switch its parts off that do "
        "(method.instance, method.class_aware, method.attention)"
    )


def _default_needs(name: str) -> Needs:
    kind = method_class(name)
    return kind(kind.Options()).needs


def _check_memory(config: Config, needs: Needs, scenario: Scenario) -> None:
    """Every class that is remembered when a step uses the memory has an exemplar."""
    if needs.memory == "none":
        return
    last = scenario.num_steps - (1 if needs.means else 2)
    if last >= 0 and config.memory.size < scenario.num_seen(last):
        without = [name for name in method_names() if _default_needs(name).memory == "none"]
        raise ConfigError(
            f"memory.size={config.memory.size}: method {config.method.name} needs an exemplar a class, "
            f"{scenario.num_seen(last)} in all; raise it, or use a method without memory: {', '.join(without)}"
        )


def _check_sources(config: Config, manifest: Manifest, scenario: Scenario) -> None:
    """From step 0 on there are test clips of videos that no training clip is from."""
    if not source_disjoint(manifest, scenario.classes, manifest.clips(scenario.new(0), "test")).any():
        raise ConfigError(
            f"data.source_disjoint: every test clip of step 0 in {config.data.manifest} is from a training clip's "
            "video; set it to false"
        )


def _check_fixed_encoders(config: Config) -> None:
    for encoder in config.model.used:
        if not isinstance(encoder, TransformerConfig) or encoder.train != "frozen":
            raise ConfigError(
                f"model: method {config.method.name} learns on features that stay as they are, and an encoder of kind "
                f"{encoder.kind} is trained; use features of frozen encoders, or method.features=network, which trains "
                "a network at step 0"
            )
