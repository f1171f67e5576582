"""Outputs, field by field: every operation covers every field, so a new one is covered too."""

import pytest
import torch
from torch import Tensor

from avcil_dist.models.outputs import Divergence, Output

ROWS, CURRENT = 5, 3


def make_output(start: float = 0.0, rows: int = ROWS, exemplars: int = ROWS - CURRENT) -> Output:
    """An output with every field present, all values different."""
    fields: dict[str, Tensor | Divergence] = {}
    for number, name in enumerate(Output._fields):
        value = start + 100 * number
        if name == "divergence":
            parts = (value + 10 * part + torch.arange(exemplars) for part in range(len(Divergence._fields)))
            fields[name] = Divergence(*parts)
        else:
            fields[name] = value + torch.arange(2.0 * rows).view(rows, 2)
    return Output(**fields)  # type: ignore[arg-type]


def fields_of(output: Output) -> dict[str, Tensor]:
    """All tensors by name, those of the divergence too."""
    assert output.divergence is not None
    named = {name: field for name, field in output._asdict().items() if isinstance(field, Tensor)}
    return named | output.divergence._asdict()


def test_tensors_are_those_of_every_field() -> None:
    output = make_output()
    assert {id(tensor) for tensor in output.tensors()} == {id(tensor) for tensor in fields_of(output).values()}
    assert len(output.tensors()) == len(Output._fields) - 1 + len(Divergence._fields)
    assert len(Output(torch.zeros(2, 3)).tensors()) == 1


def test_map_changes_every_field_and_exemplar_rows_by_a_function_of_their_own() -> None:
    output = make_output()
    for name, tensor in fields_of(output.map(lambda tensor: 2 * tensor)).items():
        assert torch.equal(tensor, 2 * fields_of(output)[name])
    for name, tensor in fields_of(output.map(lambda tensor: 2 * tensor, lambda tensor: -tensor)).items():
        assert torch.equal(tensor, (-1 if name in Divergence._fields else 2) * fields_of(output)[name])


def test_map_leaves_absent_fields_absent() -> None:
    mapped = Output(torch.ones(2, 3), visual=torch.ones(2, 4)).map(lambda tensor: 2 * tensor)
    assert [name for name, field in mapped._asdict().items() if field is not None] == ["logits", "visual"]


@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), torch.tensor([False, True, False, False, True])])
def test_select_takes_rows_of_every_field_but_the_divergence(rows: Tensor) -> None:
    output = make_output()
    selected = output.select(rows)
    assert selected.divergence is None
    for name, tensor in selected._asdict().items():
        if name != "divergence":
            assert torch.equal(tensor, getattr(output, name)[rows])


def test_cat_follows_the_order_of_the_outputs() -> None:
    parts = [make_output(), make_output(0.5, rows=2, exemplars=1)]
    for name, tensor in fields_of(Output.cat(parts)).items():
        assert torch.equal(tensor, torch.cat([fields_of(part)[name] for part in parts]))


def test_cat_of_a_split_batch_has_current_rows_first() -> None:
    parts = [make_output(), make_output(0.5)]
    whole = Output.cat(parts, CURRENT)
    one, other = parts
    expected = torch.cat([one.logits[:CURRENT], other.logits[:CURRENT], one.logits[CURRENT:], other.logits[CURRENT:]])
    assert torch.equal(whole.logits, expected)
    for name, tensor in fields_of(whole).items():
        if name in Divergence._fields:
            assert torch.equal(tensor, torch.cat([fields_of(part)[name] for part in parts]))
        else:
            assert torch.equal(tensor[:, 0] - tensor[0, 0], expected[:, 0])


def test_outputs_with_different_fields_are_not_put_together() -> None:
    with pytest.raises(AssertionError, match="different fields"):
        Output.cat([Output(torch.zeros(2, 3)), Output(torch.zeros(2, 3), audio=torch.zeros(2, 4))])


def test_features_are_pooled_sound_and_pictures_in_this_order() -> None:
    output = make_output()
    assert [id(feature) for feature in output.features()] == [
        id(field) for field in (output.pooled, output.audio, output.visual)
    ]
    assert output.feature.equal(output.audio + output.visual)


def test_a_network_of_one_modality_has_no_pair_of_features() -> None:
    sound = torch.ones(2, 4)
    output = Output(torch.zeros(2, 3), audio=sound)
    assert output.feature is sound
    assert Output(torch.zeros(2, 3), visual=sound).feature is sound
    for one in (output, Output(torch.zeros(2, 3), visual=sound)):
        with pytest.raises(ValueError, match="one modality"):
            _ = one.modalities
