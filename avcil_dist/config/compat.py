"""Compatibility of two configurations: which settings differ, and what each change means for the results."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from avcil_dist.config.fields import method_fields, schema_fields
from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.section import ChangeClass

MANIFEST_HASH = "manifest hash"  # compared beside the settings: the data that a stream is trained on


@dataclass(frozen=True)
class SettingChange:
    """A setting that differs between two configurations; None where one of them lacks it."""

    key: str
    before: Any
    after: Any

    @property
    def change_class(self) -> ChangeClass:
        """The effect of the change on the results."""
        return change_class(self.key)


def change_class(key: str) -> ChangeClass:
    """Return the effect of a change of the setting `key`, or of MANIFEST_HASH.

    Other keys are options of a method of another package, or settings of another version: FORK.
    """
    return _classes().get(key, ChangeClass.FORK)


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[SettingChange]:
    """Return the differences of two flattened configurations, sorted by key."""
    return [
        SettingChange(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def result_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[SettingChange]:
    """Return the differences that change the results: all but operational ones."""
    return [
        change
        for change in setting_changes(before, after)
        if change.change_class is not ChangeClass.OPERATIONAL
    ]  # fmt: skip


def result_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a flattened configuration that determine the results: all but operational ones."""
    return {key: value for key, value in settings.items() if change_class(key) is not ChangeClass.OPERATIONAL}


@cache
def _classes() -> dict[str, ChangeClass]:
    fields = [*schema_fields(), *method_fields(METHOD_OPTIONS)]
    return {field.key: field.change for field in fields} | {MANIFEST_HASH: ChangeClass.INCOMPARABLE}
