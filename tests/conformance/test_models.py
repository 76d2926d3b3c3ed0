"""The small models of transformers: their configurations, their inputs and the table of what is particular to an architecture."""

from __future__ import annotations

import pytest
import torch

from thresher.models.families import language
from thresher.models.families.model_inputs import draw, find_inputs
from thresher.models.families.particular import PARTICULAR, overlaid
from thresher.models.families.sample import Inputs, SampleExcluded
from thresher.models.families.tensors import boxes, patches, text_with


def test_the_table_has_architectures_of_the_library_alone() -> None:
    assert set(PARTICULAR) <= set(language.names())


def test_every_entry_has_a_reason_and_values() -> None:
    for name, entry in PARTICULAR.items():
        assert entry.reason, name
        assert bool(entry.initial or entry.config or entry.model or entry.method or entry.inputs) != entry.excluded, (
            name
        )


@pytest.mark.parametrize("name", [n for n, entry in PARTICULAR.items() if entry.inputs])
def test_two_sets_of_inputs_have_the_same_shapes(name: str) -> None:
    first, second = (draw(PARTICULAR[name].inputs, seed).kwargs for seed in (0, 1))
    flat, structure = torch.utils._pytree.tree_flatten(first)
    other, other_structure = torch.utils._pytree.tree_flatten(second)
    assert structure == other_structure
    for a, b in zip(flat, other):
        assert not isinstance(a, torch.Tensor) or (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", ["gemma4_assistant", "glm_image_vqmodel", "bark", "voxtral_realtime_text"])
def test_a_particular_architecture_runs(name: str) -> None:
    """A dictionary of tensors among the inputs, a method, another class, a class that the library does not list."""
    with torch.no_grad():
        case = language.build(name)
        outputs = [case.model(**inputs.kwargs) for inputs in (case.inputs, *case.others)]
    assert len(outputs) == 2


def test_a_codec_writes_other_codes_for_other_audio() -> None:
    """Its codebooks are zeros when it is new."""
    with torch.no_grad():
        case = language.build("wavtokenizer_encoder")
        codes = [case.model(**inputs.kwargs).audio_codes for inputs in (case.inputs, *case.others)]
    assert not torch.equal(*codes)


def test_the_model_of_a_case_has_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models keep in their first call what they have computed of their weights."""
    models = []

    def find(model: torch.nn.Module, config: object) -> list[Inputs]:
        models.append(model)
        return find_inputs(model, config)

    monkeypatch.setattr(language, "find_inputs", find)
    assert language.build("bert").model not in models and len(models) == 1


def test_keys_and_values_among_the_outputs_are_tensors() -> None:
    with torch.no_grad():
        case = language.build("diffusion_gemma")
        leaves = torch.utils._pytree.tree_leaves(case.model(**case.inputs.kwargs))
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) > 2


def test_an_architecture_that_cannot_run_is_excluded_with_the_reason() -> None:
    with pytest.raises(SampleExcluded, match="session"):
        language.build("sam3_video")


def test_values_are_laid_over_parts_and_replace_lists() -> None:
    config = {"a": 1, "part": {"b": 2, "c": [1, 2]}}
    assert overlaid(config, {"part": {"c": [3]}, "d": 4}) == {"a": 1, "part": {"b": 2, "c": [3]}, "d": 4}
    assert config["part"]["c"] == [1, 2]


def test_a_prompt_has_as_many_placeholders_as_its_image_has_features() -> None:
    tokens = text_with(301, 16)(torch.Generator().manual_seed(0))
    assert int((tokens == 301).sum()) == 16 and tokens.shape == (1, 24)


def test_patches_and_boxes_are_those_of_one_page() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = patches(2, 3, 5)(generator)
    assert grid.shape == (1, 6, 7) and grid[0, :, :2].tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    left, top, right, bottom = boxes(4)(generator)[0].T
    assert bool((left <= right).all() and (top <= bottom).all())
