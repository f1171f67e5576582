"""Streams of the tables of Pian et al. 2023: all methods on all modalities, and the ablation of AV-CIL's parts.

They are grids as those of `avcil sweep`, in one list. Streams are named as the sweep of a grid names them, so a stream
that was trained before under its name is not trained again.
"""

from collections.abc import Sequence

from launch.sweep import GridPoint, make_grid

# Prediction by exemplar means, and by the head, are rows of their own in the paper.
PREDICTIONS = (("method=icarl", "method.predict=nme,fc"), ("method=afc", "method.predict=nme,lsc"))
ONE_MODALITY = "model.modality=audio,visual"
TABLES: tuple[tuple[tuple[str, ...], bool], ...] = (  # words of a grid, and whether it is the ablation
    (("method=finetune,lwf,ssil,avcil,joint",), False),
    *((words, False) for words in PREDICTIONS),
    (("method=finetune,lwf,ssil,joint", ONE_MODALITY), False),  # avcil needs both modalities
    *(((*words, ONE_MODALITY), False) for words in PREDICTIONS),
    (("method=avcil",), True),
)


def reproduction_grid(
    config: str, words: Sequence[str], *, seeds: int, processes: int, smoke: bool = False, checked: bool = True
) -> list[GridPoint]:
    """Return the streams of both tables, each once, for seeds 0 to `seeds` - 1, in order of the seed.

    `words` are settings of all of them. Raises ConfigError as `make_grid` does; settings and data are not `checked`
    against each other where only the list is needed.
    """
    points: dict[str, GridPoint] = {}
    for seed in range(seeds):
        for table, ablation in TABLES:
            grid = make_grid(
                config,
                (*table, f"seed={seed}", *words),
                ablation=ablation,
                processes=processes,
                smoke=smoke,
                checked=checked,
            )
            for point in grid:
                points.setdefault(point.config.stream_name, point)
    return list(points.values())
