"""Experts in one tensor are modules of their own, equal to the updates that PEFT computes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load

from s3lora_serve import scan_adapter, strip_adapter
from s3lora_serve.admission.admit import admit
from s3lora_serve.errors import ModuleTwice, ShapesDoNotFit, Unscorable
from s3lora_serve.plans.apply import transformed_weights
from s3lora_serve.policy.schema import Policy
from s3lora_serve.spectral.dense_reference import mas_svd
from tests.support.adapters import copy_with, key, write_adapter
from tests.support.plans import keep_out, plan_for, read

HIDDEN, INNER, EXPERTS, RANK, LAYERS = 12, 10, 5, 3, 2
HOLDER = "layers.{}.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KEEPS = {"strip": {"top_k": 0}, "on_uninformative": "admit"}


class Experts(torch.nn.Module):
    """All experts of a layer, (experts, out, in), or transposed as some models have them."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for name, m, n in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            shape = (EXPERTS, n, m) if is_transposed else (EXPERTS, m, n)
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))


def model(*, is_transposed: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    whole = torch.nn.Module()
    layers = []
    for _ in range(LAYERS):
        layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = Experts(is_transposed=is_transposed)
        layer.q_proj = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        layers.append(layer)
    whole.layers = torch.nn.ModuleList(layers)
    return whole


def adapt(folder, *, is_transposed=False, **options):
    """Write an adapter, and return PEFT's model of it."""
    settings = {"r": RANK, "lora_alpha": 6, "target_parameters": BOTH, **options}
    config = LoraConfig(target_modules=["q_proj"], **settings)
    adapted = get_peft_model(model(is_transposed=is_transposed), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return adapted


def deltas(adapted, *, is_transposed=False):
    """ΔW of each expert as PEFT computes it, by the names of the gate's modules."""
    found = {}
    for path, module in adapted.base_model.model.named_modules():
        if hasattr(module, "parameter_name"):
            layer = path.removesuffix(".base_layer")
            whole = module.get_delta_weight("default").detach().double()
            for index, delta in enumerate(whole):
                name = f"{layer}.{index}.{module.parameter_name}"
                found[name] = delta.T if is_transposed else delta
    return found


def of(module):
    return module.scaling * module.B.double() @ module.A.double()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
def test_each_expert_is_the_update_that_peft_computes(tmp_path, is_transposed, parameters):
    adapted = adapt(tmp_path / "a", is_transposed=is_transposed, target_parameters=parameters)
    expected = deltas(adapted, is_transposed=is_transposed)
    modules = {m.name: m for m in read(tmp_path / "a").modules if m.expert is not None}
    assert len(expected) == LAYERS * EXPERTS * len(parameters)
    assert modules.keys() == expected.keys()
    for name, module in modules.items():
        assert module.rank == RANK
        assert torch.allclose(of(module), expected[name], atol=1e-6)


def test_ranks_and_alphas_of_a_parameter_are_its_own(tmp_path):
    adapted = adapt(
        tmp_path / "a",
        rank_pattern={r".*\.gate_up_proj": 2 * RANK},
        alpha_pattern={r".*\.gate_up_proj": 5},
        target_parameters=["gate_up_proj", "down_proj"],
    )
    expected = deltas(adapted)
    for module in read(tmp_path / "a").modules:
        if module.expert is not None:
            assert module.rank == (2 * RANK if "gate_up" in module.name else RANK)
            assert torch.allclose(of(module), expected[module.name], atol=1e-6)


def test_scores_of_experts_are_those_of_the_dense_updates(tmp_path):
    expected = deltas(adapt(tmp_path / "a"))
    verdict = scan_adapter(tmp_path / "a", Policy.model_validate(KEEPS))
    modules = {module.name: module for module in verdict.modules}
    # ΔW itself as B, beside the identity: the definition, of no factor that the gate reads.
    for name, delta in expected.items():
        dense = mas_svd(
            delta[None], torch.eye(delta.shape[1]).double()[None], torch.ones(1).double()
        )
        sigma = dense.singular_values[0, :RANK]
        assert modules[name].spectrum == pytest.approx(sigma.tolist(), rel=1e-4)
        assert modules[name].row_norm_mean == pytest.approx(float(dense.row_norm_mean), rel=1e-4)


def test_a_name_is_refused_that_experts_one_by_one_have_too(tmp_path):
    adapt(tmp_path / "a")
    name = f"{HOLDER.format(0)}.3.down_proj"

    def add(tensors):
        tensors[key(name, "A")] = torch.ones(RANK, INNER)
        tensors[key(name, "B")] = torch.ones(HIDDEN, RANK)

    with pytest.raises(ModuleTwice):
        read(copy_with(tmp_path / "a", tmp_path / "b", add))


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        (BOTH[:1], Unscorable),  # two pairs, one parameter
        (["mlp.experts.other"], Unscorable),
        ([], ShapesDoNotFit),
    ],
)
def test_tensors_whose_parameter_is_not_said_are_refused(tmp_path, parameters, error):
    adapt(tmp_path / "a")
    with pytest.raises(error):
        read(copy_with(tmp_path / "a", tmp_path / "b", target_parameters=parameters))


def test_tensors_of_several_matrices_elsewhere_are_refused_with_the_cause(tmp_path):
    name = "layers.0.other"
    tensors = {key(name, "A"): torch.ones(8, 6), key(name, "B"): torch.ones(6, 8)}
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=["other.weights"])
    with pytest.raises(Unscorable, match="target_parameters"):
        read(folder)


def test_an_expert_is_stripped_and_the_others_stay_as_they_are(tmp_path):
    adapt(tmp_path / "a")
    policy = Policy.model_validate(KEEPS | {"modules": ["*_up_proj"], "strip": {"top_k": 2}})
    verdict = strip_adapter(tmp_path / "a", tmp_path / "b", policy)
    assert len(verdict.stripped) == 2
    assert all(".experts." in name for name in verdict.stripped)
    loaded = PeftModel.from_pretrained(model(), tmp_path / "b")
    own = deltas(PeftModel.from_pretrained(model(), tmp_path / "a"))
    for each, delta in deltas(loaded).items():
        assert torch.equal(
            delta, torch.zeros_like(delta) if each in verdict.stripped else own[each]
        )


def test_a_plan_transforms_one_expert_and_no_other_byte(tmp_path):
    adapt(tmp_path / "a")
    adapter = read(tmp_path / "a")
    module = next(m for m in adapter.modules if m.name == f"{HOLDER.format(0)}.4.down_proj")
    plan = plan_for(adapter, {module.name: keep_out(module.A, 1)})
    weights = transformed_weights(adapter, plan)
    before = load(bytes(adapter.copy.weights))
    after = load(b"".join(bytes(chunk) for chunk in weights.chunks()))
    T = next(m for m in plan.modules if m.name == module.name).matrix().double()
    changed = key(HOLDER.format(0), "B")
    expected = before[changed].clone()
    expected[:, 4::EXPERTS] = (before[changed][:, 4::EXPERTS].double() @ T).float()
    assert torch.equal(after.pop(changed), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_too_many_experts_are_refused_before_they_are_listed(tmp_path):
    tensors = {
        key("mlp.experts", "A"): torch.ones(2**16, 1),
        key("mlp.experts", "B"): torch.ones(1, 2**16),
    }
    options = {"target_parameters": ["experts.down_proj"], "r": 1}
    folder = write_adapter(tmp_path / "a", tensors, **options)
    verdict = admit(folder, "a", Policy(), device="cpu").verdict
    assert verdict.reason.code == "S3LORA-201"
    assert "65536 experts" in verdict.reason.message
