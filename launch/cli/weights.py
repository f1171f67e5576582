"""Commands of pre-trained weights: `avcil weights get`."""

from pathlib import Path

import click

from launch.cli.output import echo


@click.group()
def weights() -> None:
    """Get pre-trained weights of encoders."""


@weights.command()
@click.argument("name")
def get(name: str) -> None:
    """Download weights from the Hugging Face hub, so that later runs need no network.

    NAME is videomae, audiomae, or a name on the hub: owner/name, or owner/name@REVISION. Run it once on a machine with
    a network, such as a login node. The weights are kept in the hub's folder (HF_HOME), come from HF_ENDPOINT where
    that is set, and with HF_HUB_OFFLINE=1 only from that folder. Commit and digest of videomae are pinned. Those of
    audiomae are not: the first download takes the newest, and prints it. Each step records the digest of the weights.

    \b
    Examples:
      avcil weights get videomae
      HF_HOME=/shared/hub avcil weights get audiomae
    """
    from avcil_dist.models.encoders.published import PUBLISHED, get_weights, local_folder, split_name, weights_on_hub
    from avcil_dist.storage.hub import cache_folder, endpoint
    from data_shards.downloads.disk import check_room, free_bytes, in_words

    known = PUBLISHED.get(name)
    full = known.repository if known else name
    repository, revision = split_name(full)
    if local_folder(full) is None:
        found, file = weights_on_hub(full)
        size = found.files[file].size or 0
        folder = Path(cache_folder())
        check_room(folder, size, f"for {repository}")
        echo(
            f"{repository}, commit {found.commit}, from {endpoint()}: {in_words(size)} to download into {folder}, "
            f"{in_words(free_bytes(folder))} free"
        )
    local = get_weights(full)
    echo(f"{local.path}: sha256 {local.sha256}, commit {local.commit}")
    section = {"videomae": "model.visual.weights", "audiomae": "model.audio.weights"}.get(name, "model.….weights")
    pinned = f"{local.repository}@{local.commit}"
    echo(f"a run takes this copy without a network: {section}={full if revision != 'main' else pinned}")
