"""Importers by name: the forms of listings that are built in, and the importers of other packages."""

from avcil_dist.errors import ConfigError
from avcil_dist.system.plugins import check_name, load_plug_in, trust
from data_shards.importers.feature_importer import FeatureImporter
from data_shards.listings.importer import ClipImporter
from data_shards.listings.read import FORMS, ListingForm

SETTING = "--importer"
BUILT_IN: dict[str, ListingForm] = {form.__name__.rpartition(".")[2]: form for form in FORMS}  # type: ignore[attr-defined]


def load_importer(name: str) -> ListingForm | ClipImporter | FeatureImporter:
    """Return an importer: a form of listing, or one of a plug-in, which the user's command line names.

    Raises ConfigError as `load_plug_in` does, and for a plug-in that is no importer.
    """
    if name in BUILT_IN:
        check_name(SETTING, name, "importers", BUILT_IN)
        return BUILT_IN[name]
    trust(name)
    found = load_plug_in(SETTING, name, "importers", BUILT_IN)
    if not (isinstance(found, type) and issubclass(found, ClipImporter | FeatureImporter)):
        bases = " or ".join(f"{base.__module__}.{base.__name__}" for base in (ClipImporter, FeatureImporter))
        raise ConfigError(f"{SETTING}: the plug-in {name!r} is no class derived from {bases}")
    importer: ClipImporter | FeatureImporter = found()
    return importer
