"""The API server knows the model's modules as the workers do, and refuses others before scoring."""

import json
import re

import pytest
import torch

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import read_adapter
from s3lora_serve.errors import DoesNotFitModel, NothingPlaced, RefusedByVLLM, Unscorable
from s3lora_serve.policy.limits import Limits
from s3lora_serve.vllm_plugin.compat import WeightsMapper
from s3lora_serve.vllm_plugin.model_modules import ModelModules
from tests.support.adapters import write_adapter

SHAPES = {
    "language_model.layers.0.q_proj": (8, 6),
    "language_model.layers.0.v_proj": (4, 6),
    "language_model.layers.1.q_proj": (8, 6),
}
MAPPER = WeightsMapper(
    orig_to_new_regex={re.compile(r"^vision\.", re.ASCII): None, re.compile("query"): "q_proj"},
    orig_to_new_prefix={"model.": "language_model."},
    orig_to_new_substr={".old_proj": ".v_proj"},
)


def sent(modules):
    """What the API server knows after a worker's answer went through a call."""
    return ModelModules.of_workers([json.loads(json.dumps(modules.as_plain()))])


@pytest.fixture
def known():
    return sent(ModelModules(SHAPES, MAPPER, is_whole=True))


@pytest.fixture
def adapter(tmp_path_factory):
    """Makes an adapter of modules with these names and shapes (m, n)."""

    def make(modules):
        tensors = {}
        for name, (m, n) in modules.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, n)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(m, 4)
        folder = write_adapter(tmp_path_factory.mktemp("adapter") / "a", tensors)
        return read_adapter(copy_adapter(folder, Limits(), None), Limits())

    return make


def test_names_are_mapped_as_in_the_worker(known, adapter):
    given = adapter(
        {
            "model.layers.0.query": (8, 6),
            "model.layers.0.old_proj": (4, 6),
            "model.layers.1.q_proj": (8, 6),
        }
    )
    in_worker = ModelModules(SHAPES, MAPPER, is_whole=True).vllm_names(given)
    assert known.vllm_names(given) == in_worker
    assert set(in_worker.values()) == set(SHAPES)
    assert known.left_out(given) == ()


OWN = {"model.layers.0.q_proj": (8, 6)}
"""A module that the model takes."""


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        ({"model.layers.0.q_proj": (8, 8)}, "8 x 8 matrix, the model's is 8 x 6"),
        ({"model.layers.0.v_proj": (8, 6)}, "8 x 6 matrix, the model's is 4 x 6"),
        (
            {"model.layers.0.query": (8, 6), "model.layers.0.q_proj": (8, 6)},
            "does not map to one module",
        ),
    ],
)
def test_what_the_model_has_otherwise_is_refused_with_its_name(known, adapter, modules, problem):
    with pytest.raises(DoesNotFitModel, match=re.escape(problem)):
        known.left_out(adapter(modules))


def test_modules_that_the_model_does_not_take_are_left_out(known, adapter):
    given = adapter(OWN | {"model.layers.2.q_proj": (8, 6), "model.layers.0.other": (3, 2)})
    assert known.left_out(given) == ("model.layers.0.other", "model.layers.2.q_proj")


def test_an_adapter_of_which_nothing_is_left_is_refused(known, adapter):
    with pytest.raises(NothingPlaced, match=r"any of its 2 modules, of which model\.layers\.7"):
        known.left_out(adapter({f"model.layers.{i}.q_proj": (8, 6) for i in (7, 8)}))


def test_an_adapter_of_a_compiled_model_is_told_the_cure(known, adapter):
    with pytest.raises(NothingPlaced, match=r"torch\.compile: save the model that was not"):
        known.left_out(adapter({"model.layers.0._orig_mod.q_proj": (8, 6)}))


def test_modules_under_a_skipped_prefix_are_left_out_whatever_their_shape(adapter):
    known = sent(ModelModules(SHAPES, MAPPER, is_whole=True, skipped=("mtp.",)))
    given = adapter(OWN | {"mtp.layers.0.q_proj": (1, 2), "model.mtp.layers.0.q_proj": (5, 5)})
    assert known.left_out(given) == ("model.mtp.layers.0.q_proj", "mtp.layers.0.q_proj")


def test_a_pooling_model_takes_names_without_model_but_not_both(adapter):
    shapes = {"model.layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (8, 6)}
    known = sent(ModelModules(shapes, None, is_whole=True, pools=True))
    short = adapter({"layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (8, 6)})
    assert known.left_out(short) == ()
    assert known.vllm_names(short)["layers.0.q_proj"] == "layers.0.q_proj"
    with pytest.raises(DoesNotFitModel, match="8 x 7 matrix"):
        known.left_out(adapter({"layers.0.q_proj": (8, 7)}))
    with pytest.raises(DoesNotFitModel, match="one module of the model"):
        known.left_out(adapter({"layers.0.q_proj": (8, 6), "model.layers.0.q_proj": (8, 6)}))
    generating = ModelModules(shapes, None, is_whole=True)
    assert generating.left_out(short) == ("layers.0.q_proj",)


STACKED = {"model.mlp.experts.base_layer": (10, 6), "model.mlp.experts": (6, 5)}


@pytest.fixture
def experts(tmp_path):
    """An adapter with three experts in one tensor."""
    tensors = {}
    for name, (m, n) in STACKED.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(3 * 4, n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(m, 3 * 4)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    folder = write_adapter(tmp_path / "stacked", tensors, target_parameters=targets)
    return read_adapter(copy_adapter(folder, Limits(), None), Limits())


def test_experts_in_one_tensor_are_placed_each_where_vllm_places_their_tensor(experts):
    known = sent(ModelModules(STACKED, None, is_whole=True, experts=dict.fromkeys(STACKED, 3)))
    assert known.left_out(experts) == ()
    assert set(known.vllm_names(experts).values()) == set(STACKED)
    assert len(known.vllm_names(experts)) == 6


def test_another_number_of_experts_than_the_models_is_refused(experts):
    known = sent(ModelModules(STACKED, None, is_whole=True, experts=dict.fromkeys(STACKED, 4)))
    with pytest.raises(DoesNotFitModel, match="one of 3 experts"):
        known.left_out(experts)


def test_experts_in_one_tensor_are_refused_where_vllm_takes_them_one_by_one(experts):
    shapes = {"model.mlp.experts.0.w1": (5, 6)}
    known = sent(ModelModules(shapes, None, is_whole=True, experts=dict.fromkeys(STACKED, 0)))
    with pytest.raises(Unscorable, match="target_parameters"):
        known.left_out(experts)


def test_one_matrix_is_refused_where_the_model_has_experts_in_one_tensor(adapter):
    known = sent(ModelModules(STACKED, None, is_whole=True, experts=dict.fromkeys(STACKED, 3)))
    with pytest.raises(DoesNotFitModel, match="no experts in one tensor"):
        known.left_out(adapter(STACKED))


def test_a_name_that_vllm_would_not_map_is_refused(known, adapter):
    with pytest.raises(RefusedByVLLM):
        known.left_out(adapter({"vision.q_proj": (8, 6)}))


def test_where_the_mapper_cannot_be_sent_shapes_are_still_checked(adapter):
    odd = WeightsMapper(orig_to_new_stacked={".q": (".qkv", "q")})
    known = sent(ModelModules(SHAPES, odd, is_whole=True))
    assert known.left_out(adapter({"renamed.by.this.mapper": (8, 6)})) == ()
    with pytest.raises(DoesNotFitModel, match="no such LoRA module"):
        known.left_out(adapter({"renamed.by.this.mapper": (8, 7)}))


def test_pipeline_stages_together_are_the_whole_model(adapter):
    stages = [
        ModelModules({name: shape}, None, is_whole=False).as_plain()
        for name, shape in SHAPES.items()
    ]
    known = ModelModules.of_workers(stages)
    assert known.shapes == SHAPES
    assert known.is_whole
