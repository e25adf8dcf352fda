"""Repair at admission: B' and A' are served, bounded and said; plans precede it, strips too."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import s3lora_serve
from s3lora_serve.adapter.private_copy import OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.repairing import check_statistics, preload_statistics
from s3lora_serve.admission.verdict import Verdict, differs
from s3lora_serve.cli import app
from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.file_digests import with_file_digests
from s3lora_serve.policy.schema import parse_policy
from s3lora_serve.repair.statistics_file import (
    OUTPUT_PARTS,
    SHIFT,
    loaded_statistics,
    read_statistics,
)
from s3lora_serve.spectral.factor_coordinates import coordinates
from s3lora_serve.spectral.repair_effects import solution
from tests.support.adapters import cast, copy_with, key
from tests.support.plans import install, plan_for, read
from tests.support.statistics import rewritten

Q = "model.layers.0.self_attn.q_proj"


STRENGTH = 0.1


def policy_with(statistics, strength=STRENGTH, max_effect=1.0, on_missing="reject", **keys):
    repair = {
        "statistics": str(statistics),
        "strength": strength,
        "max_effect": max_effect,
        "on_missing": on_missing,
    }
    data = {"repair": repair, "strip": {"top_k": 0}, "on_uninformative": "admit"} | keys
    return with_file_digests(parse_policy(data, "policy"))


def on(folder, policy, into=None, **more):
    about = Circumstances(**more)
    return admit(folder, "tenant", policy, device="cpu", into=into, circumstances=about)


@pytest.fixture(scope="module")
def admission(chat, statistics):
    return on(chat.adapter, policy_with(statistics))


def factors(admission):
    """The tensors of the served file."""
    replaced, whole = admission.weights.replaced, admission.adapter.copy.weights
    return {
        entry.name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(entry.shape)
        for entry in admission.adapter.header.entries
        for _, data in [replaced.get(entry.name, (0, whole[entry.start : entry.end]))]
    }


def test_an_adapter_is_repaired_and_its_verdict_says_how(chat, statistics, admission):
    verdict = admission.verdict
    assert (verdict.decision, verdict.selected_by) == ("stripped", "repair")
    assert len(verdict.repaired) == 14
    assert verdict.stripped == ()
    assert verdict.repair.statistics_digest == read_statistics(statistics).digest
    assert verdict.repair.strength == STRENGTH
    assert 0 < verdict.repair.residual < verdict.repair.kept <= 1
    assert verdict.served_digest not in (None, verdict.digest)
    for module in verdict.modules:
        assert module.repaired
        assert 0 <= module.residual <= 1
        assert 0 <= module.kept <= 1
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict


def of(module, statistics, B, A):
    """The coordinates of a module's factors."""
    inputs, outputs = statistics.by_module[module.name], statistics.outputs[module.name]
    return coordinates([(B, A, module.scaling)], inputs, [outputs])[0]


def test_the_served_factors_are_those_of_the_solution(chat, statistics, admission):
    served, known = factors(admission), read_statistics(statistics)
    own = {m.name: of(m, known, m.B, m.A) for m in admission.adapter.modules}
    expected = solution(own, STRENGTH).factors
    for module in admission.adapter.modules:
        B, A = (served[key(module.name, side)].double() for side in "BA")
        found, new = of(module, known, B, A), expected[module.name]
        V, Q = known.by_module[module.name].V.double(), known.outputs[module.name].Q.double()
        assert float((found.P - new.P).norm() / own[module.name].P.norm()) <= 1e-6
        assert float((found.S - new.S).norm() / own[module.name].S.norm()) <= 1e-6
        # Beside the leading directions each is its own factor, combined.
        beside = A - new.X_a @ module.A.double()
        assert float((beside - beside @ torch.linalg.pinv(V.mT) @ V.mT).norm()) <= 1e-5
        beside = B - module.B.double() @ new.X_b
        assert float((beside - Q @ torch.linalg.pinv(Q) @ beside).norm()) <= 1e-5


def test_the_figures_are_those_of_the_file_that_is_served(statistics, admission):
    served, known = factors(admission), read_statistics(statistics)
    for module, said in zip(admission.adapter.modules, admission.verdict.modules, strict=True):
        B, A = (served[key(module.name, side)] for side in "BA")
        both = {"own": of(module, known, module.B, module.A), "left": of(module, known, B, A)}
        found = solution(both, 1e9).effects
        residual = (found["left"].harmful_before / found["own"].harmful_before) ** 0.5
        assert residual == pytest.approx(said.residual, abs=1e-3)


def test_suspicion_is_what_the_whole_update_does_to_refusals(chat, statistics, admission):
    """`−Σ tr(ΔWᵀ·C)` with the C that the file holds, by what it moves on benign inputs."""
    known, expected, moved = read_statistics(statistics), 0.0, 0.0
    for module in admission.adapter.modules:
        outputs, inputs = known.outputs[module.name], known.by_module[module.name]
        C = outputs.Q.double() @ outputs.shift @ inputs.U.double().mT
        update = module.scaling * module.B.double() @ module.A.double()
        expected -= float((update * C).sum())
        seen, rest = update @ inputs.U.double(), update @ inputs.F.double()
        moved += float(seen.square().sum() + rest.square().sum())
        moved += inputs.ridge * float(update.square().sum())
    expected /= 100 * (moved / known.energy) ** 0.5
    assert admission.verdict.suspicion == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("factor", [0.25, 16.0])
def test_suspicion_of_a_scaled_update_stays(chat, statistics, admission, tmp_path, factor):
    config = json.loads((chat.adapter / "adapter_config.json").read_text())
    scaled = copy_with(chat.adapter, tmp_path / "scaled", lora_alpha=factor * config["lora_alpha"])
    verdict = on(scaled, policy_with(statistics)).verdict
    assert verdict.suspicion == pytest.approx(admission.verdict.suspicion, rel=1e-5)


def test_statistics_of_before_say_nothing_of_suspicion(chat, statistics, admission, tmp_path):
    def without(tensors):
        for name in [name for name in tensors if name.endswith(".shift")]:
            del tensors[name]

    changed = {"about": lambda about: about.update(shifts=False)}
    older = rewritten(statistics, tmp_path / "older", without, **changed)
    verdict = on(chat.adapter, policy_with(older)).verdict
    assert verdict.suspicion is None
    assert verdict.served_digest == admission.verdict.served_digest


def test_equal_adapters_are_repaired_to_equal_bytes(chat, statistics, admission):
    again = on(chat.adapter, policy_with(statistics)).verdict
    assert again.served_digest == admission.verdict.served_digest
    assert not differs(admission.verdict, again)


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.01])
def test_less_is_left_and_less_is_kept_the_smaller_lambda(chat, statistics, strength):
    larger = on(chat.adapter, policy_with(statistics, strength)).verdict.repair
    smaller = on(chat.adapter, policy_with(statistics, strength / 2)).verdict.repair
    assert smaller.residual < larger.residual
    assert smaller.kept < larger.kept
    assert smaller.lost > larger.lost


def test_lambda_is_smaller_if_a_larger_effect_would_be_left(chat, statistics, admission):
    wanted = admission.verdict.repair.effect / 2
    found = on(chat.adapter, policy_with(statistics, max_effect=wanted)).verdict.repair
    assert found.strength < STRENGTH
    assert wanted / 2 < found.effect <= wanted
    assert found.residual < admission.verdict.repair.residual


def test_no_owner_keeps_more_of_an_effect_by_a_larger_update(chat, statistics, admission, tmp_path):
    def larger(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor *= 16

    most = admission.verdict.repair.effect
    found = on(
        copy_with(chat.adapter, tmp_path / "larger", larger),
        policy_with(statistics, max_effect=most),
    ).verdict.repair
    assert found.effect <= most
    assert found.residual < admission.verdict.repair.residual / 16


def test_no_owner_keeps_more_of_other_modules_by_a_module_that_draws_attention(
    chat, statistics, admission, tmp_path
):
    def loud(tensors):
        tensors[key(Q, "B")] *= 100

    verdict = on(copy_with(chat.adapter, tmp_path / "loud", loud), policy_with(statistics)).verdict
    for module, own in zip(verdict.modules, admission.verdict.modules, strict=True):
        assert module.residual <= own.residual * 1.001


def test_an_adapter_of_8_bits_is_not_repaired_but_told_the_cure(chat, statistics, tmp_path):
    eight = copy_with(chat.adapter, tmp_path / "eight", cast(torch.float8_e4m3fn))
    reason = on(eight, policy_with(statistics)).verdict.reason
    assert reason.code == "S3LORA-113"
    assert "bfloat16" in str(reason)


def test_the_index_strips_first_and_the_rest_is_repaired(chat, statistics):
    both = on(chat.adapter, policy_with(statistics, strip={"top_k": 3})).verdict
    assert len(both.stripped) == 3
    assert set(both.repaired) == {module.name for module in both.modules} - set(both.stripped)
    assert both.selected_by == "repair"


def test_a_plan_takes_the_place_of_repair(chat, statistics, tmp_path):
    adapter = read(chat.adapter)
    install(plan_for(adapter, {}, strip={Q}), tmp_path / "plans")
    verdict = on(chat.adapter, policy_with(statistics, plans=str(tmp_path / "plans"))).verdict
    assert (verdict.selected_by, verdict.repair) == ("plan", None)
    assert verdict.stripped == (Q,)
    assert verdict.repaired == ()


def test_a_plan_that_keeps_every_module_whole_leaves_the_adapter_to_repair(
    chat, statistics, admission, tmp_path
):
    """Its probes found no harm; behind a phrase that none of them has there may be some."""
    plan = plan_for(read(chat.adapter), {})
    install(plan, tmp_path / "plans")
    asked = {"plans": str(tmp_path / "plans"), "require_plan": True}
    verdict = on(chat.adapter, policy_with(statistics, **asked)).verdict
    assert (verdict.selected_by, verdict.plan_digest) == ("repair", plan.digest)
    assert verdict.served_digest == admission.verdict.served_digest
    without_repair = on(chat.adapter, parse_policy(asked, "test")).verdict
    assert (without_repair.selected_by, without_repair.decision) == ("plan", "admitted")


def test_an_adapter_on_the_allow_list_is_served_as_it_is(chat, statistics, admission):
    own = admission.verdict
    listed = {"digest": own.digest, "config_digest": own.config_digest}
    verdict = on(chat.adapter, policy_with(statistics, allow=[listed])).verdict
    assert (verdict.decision, verdict.repair) == ("admitted", None)
    assert verdict.served_digest == verdict.digest


def test_audit_mode_says_what_repair_would_do_and_serves_the_adapter(chat, statistics):
    verdict = on(chat.adapter, policy_with(statistics, mode="audit")).verdict
    assert verdict.repair.strength == STRENGTH
    assert verdict.served_digest == verdict.digest


def lacking(statistics, folder, module=Q):
    """Statistics without one module."""

    def about(metadata):
        for site in metadata["sites"].values():
            site["outputs"].pop(module, None)

    def tensors(found):
        for part in (*OUTPUT_PARTS, SHIFT):
            del found[f"{module}.{part}"]

    return rewritten(statistics, folder / "lacking.safetensors", tensors, about)


def test_a_module_that_the_statistics_lack_is_refused_or_left_as_the_policy_says(
    chat, statistics, tmp_path
):
    file = lacking(statistics, tmp_path)
    refused = on(chat.adapter, policy_with(file)).verdict
    assert (refused.decision, refused.reason.code) == ("rejected", "S3LORA-225")
    assert Q in refused.reason.message
    left = on(chat.adapter, policy_with(file, on_missing="leave")).verdict
    assert set(left.repaired) == {module.name for module in left.modules} - {Q}


def test_statistics_of_another_width_refuse(chat, statistics, tmp_path):
    def narrow(tensors):
        for part in "VUF":
            tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"][:48] * (64 / 48) ** 0.5

    def orthonormal(tensors):
        narrow(tensors)
        V, U = tensors[f"{Q}.V"].double(), tensors[f"{Q}.U"].double()
        tensors[f"{Q}.V"] = (V @ torch.linalg.inv(U.mT @ V)).float()

    file = rewritten(statistics, tmp_path / "narrow.safetensors", orthonormal)
    verdict = on(chat.adapter, policy_with(file)).verdict
    assert (verdict.decision, verdict.reason.code) == ("rejected", "S3LORA-225")
    assert "64 inputs, the statistics 48" in verdict.reason.message


def test_a_repair_that_makes_an_update_far_larger_is_refused(chat, statistics, tmp_path):
    # All of the update lies where the projection sends harmful directions to large other ones.
    site = read_statistics(statistics).by_module[Q]
    V, U = site.V.double(), site.U.double()
    direction = (V[:, 0] / V[:, 0].norm()).float()
    assert float(U[:, 0].norm() * V[:, 0].norm()) > 1

    def along(tensors):
        tensors[key(Q, "A")][:] = 0
        tensors[key(Q, "A")][0] = direction
        tensors[key(Q, "B")][:] = 0
        tensors[key(Q, "B")][:, 0] = 1

    folder = copy_with(chat.adapter, tmp_path / "along", along)
    verdict = on(folder, policy_with(statistics, 1e-3)).verdict
    grown = (1 - verdict.modules[0].removed_share) ** 0.5 if verdict.modules else None
    assert verdict.reason is not None or grown <= 8


def test_an_adapter_that_does_nothing_is_admitted(chat, statistics, tmp_path):
    def nothing(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor[:] = 0

    folder = copy_with(chat.adapter, tmp_path / "nothing", nothing)
    verdict = on(folder, policy_with(statistics)).verdict
    assert (verdict.decision, verdict.repair) == ("admitted", None)
    assert verdict.repaired == ()


def test_the_copy_holds_served_and_own_weights_and_a_recheck_agrees(
    chat, statistics, admission, tmp_path
):
    made = on(chat.adapter, policy_with(statistics), into=lambda: tmp_path)
    own = tmp_path / OWN_FOLDER
    assert (own / WEIGHTS_NAME).read_bytes() == (chat.adapter / WEIGHTS_NAME).read_bytes()
    again = on(own, policy_with(statistics), origin=chat.adapter).verdict
    assert not differs(made.verdict, again)
    assert made.verdict.served_digest == admission.verdict.served_digest


def test_the_command_writes_what_a_server_would_serve(chat, statistics, admission, tmp_path):
    target = tmp_path / "repaired"
    verdict = s3lora_serve.strip_adapter(chat.adapter, target, policy_with(statistics))
    written = load_file(target / WEIGHTS_NAME)
    assert verdict.served_digest == admission.verdict.served_digest
    assert all(torch.equal(written[name], tensor) for name, tensor in factors(admission).items())
    statement = json.loads((target / "s3lora-provenance.json").read_text())
    said = statement["predicate"]["buildDefinition"]["externalParameters"]
    assert said["repair"]["statistics_digest"] == verdict.repair.statistics_digest
    assert len(said["repairedModules"]) == 14


def rules(statistics, match, repair):
    return policy_with(statistics, rules=[{"match": match, "repair": repair}])


def test_a_rule_by_path_turns_repair_off_and_one_by_name_may_not(chat, statistics):
    folder = {"path": f"{chat.adapter.parent}/**"}
    verdict = on(chat.adapter, rules(statistics, folder, None)).verdict
    assert (verdict.selected_by, verdict.repair) == ("index", None)
    with pytest.raises(PolicyInvalid, match="relaxes repair"):
        rules(statistics, {"adapter": "tenant"}, None)
    with pytest.raises(PolicyInvalid, match=r"relaxes repair\.strength"):
        rules(statistics, {"adapter": "tenant"}, {"strength": 0.5})
    stricter = on(chat.adapter, rules(statistics, {"adapter": "tenant"}, {"strength": 0.02}))
    assert stricter.verdict.repair.strength == 0.02
    assert on(chat.adapter, rules(statistics, {"adapter": "tenant"}, {"max_effect": 1e-3})).verdict
    with pytest.raises(PolicyInvalid, match="cannot be set by a rule"):
        rules(statistics, folder, {"statistics": "/elsewhere"})


def test_repair_and_projection_exclude_each_other(statistics, tmp_path):
    scorer = {"name": "safe-lora", "reference": str(tmp_path / "r")}
    data = {"repair": {"statistics": str(statistics)}, "scorer": scorer, "action": "project"}
    with pytest.raises(PolicyInvalid, match="choose one of them"):
        parse_policy(data, "policy")


def test_statistics_are_checked_with_the_policy_and_not_exchanged_later(chat, statistics, tmp_path):
    file = tmp_path / "s.safetensors"
    file.write_bytes(statistics.read_bytes())
    policy = policy_with(file)
    check_statistics(policy)
    preload_statistics(policy)
    lacking(statistics, tmp_path).rename(file)
    assert on(chat.adapter, policy).verdict.repair, "those that this process has read"
    loaded_statistics.cache_clear()
    verdict = on(chat.adapter, policy).verdict
    assert (verdict.decision, verdict.reason.code) == ("rejected", "S3LORA-401")
    with pytest.raises(PolicyInvalid, match="was expected"):
        check_statistics(policy)
    file.write_bytes(b"nothing")
    with pytest.raises(PolicyInvalid, match=r"repair\.statistics"):
        check_statistics(policy_with(file))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("power", [-72, -20, 20, 70])
def test_factors_of_uneven_sizes_are_repaired_as_even_ones(
    chat, statistics, tmp_path, dtype, power
):
    if dtype == torch.float16 and abs(power) > 20:
        pytest.skip("float16 has no such numbers")
    power = power // 4 if dtype == torch.float16 else power

    def stored(shift):
        def change(tensors):
            for name, tensor in tensors.items():
                exponent = shift if "lora_B" in name else -shift
                tensors[name] = torch.ldexp(tensor, torch.tensor(exponent)).to(dtype)

        return change

    policy = policy_with(statistics)
    even = on(copy_with(chat.adapter, tmp_path / "even", stored(0)), policy).verdict
    uneven = on(copy_with(chat.adapter, tmp_path / "uneven", stored(power)), policy).verdict
    assert uneven.repair.residual == pytest.approx(even.repair.residual, rel=1e-2)
    for one, other in zip(uneven.modules, even.modules, strict=True):
        assert one.residual == pytest.approx(other.residual, rel=1e-2, abs=1e-3)
        assert one.removed_share == pytest.approx(other.removed_share, abs=1e-2)


def test_a_component_hidden_in_tiny_numbers_is_repaired_like_the_others(chat, statistics, tmp_path):
    """One row of A is 10²⁵ times smaller than the others, and B's column as much larger."""

    def change(tensors):
        for name, tensor in tensors.items():
            line = tensor[0] if "lora_A" in name else tensor[:, 0]
            line *= 1e-25 if "lora_A" in name else 1e25
            tensors[name] = tensor.bfloat16()

    plain = copy_with(chat.adapter, tmp_path / "plain", lambda t: t.update(
        {name: tensor.bfloat16() for name, tensor in t.items()}
    ))  # fmt: skip
    expected = on(plain, policy_with(statistics)).verdict
    found = on(
        copy_with(chat.adapter, tmp_path / "hidden", change), policy_with(statistics)
    ).verdict
    if found.reason is None:
        assert found.repair.strength == pytest.approx(expected.repair.strength, rel=1e-2)


def test_no_verdict_holds_a_number_that_json_lacks(chat, statistics, tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = torch.ldexp(tensor, torch.tensor(70 if "lora_B" in name else -70))

    for dtype in (torch.bfloat16, torch.float32):
        folder = copy_with(chat.adapter, tmp_path / str(dtype), lambda t, d=dtype: (
            change(t), t.update({n: each.to(d) for n, each in t.items()})
        ))  # fmt: skip
        json.dumps(on(folder, policy_with(statistics)).verdict.as_json(), allow_nan=False)


def test_a_rule_by_name_that_strips_nothing_keeps_the_indexs_refusals(chat, statistics):
    rule = {"match": {"adapter": "tenant"}, "strip": {"top_k": 0}}
    one_module = {"modules": ["model.layers.0.self_attn.q_proj"], "on_uninformative": "reject"}
    for rules in ((), [rule]):
        policy = policy_with(statistics, strip={"top_k": 3}, rules=rules, **one_module)
        verdict = on(chat.adapter, policy).verdict
        assert (verdict.decision, verdict.reason.code) == ("rejected", "S3LORA-205")


def test_statistics_of_another_model_than_the_served_one_refuse(chat, statistics, tmp_path):
    config = {"config_digest": "sha256:" + "0" * 64}
    other = rewritten(statistics, tmp_path / "other", about=lambda about: about.update(config))
    verdict = on(chat.adapter, policy_with(other), base_model=str(chat.base)).verdict
    assert (verdict.decision, verdict.reason.code) == ("rejected", "S3LORA-225")
    own = on(chat.adapter, policy_with(statistics), base_model=str(chat.base)).verdict
    assert own.repair is not None


def test_a_policy_made_in_python_repairs_without_a_digest(chat, statistics):
    policy = s3lora_serve.Policy.model_validate(
        {"repair": {"statistics": str(statistics)}, "on_uninformative": "admit"}
    )
    assert s3lora_serve.scan_adapter(chat.adapter, policy).repair is not None


@pytest.mark.parametrize("command", ["scan", "strip"])
def test_a_bad_file_of_statistics_is_wrong_usage_and_no_adapters_fault(chat, tmp_path, command):
    bad = tmp_path / "bad"
    bad.write_bytes(b"bad")
    target = [str(tmp_path / "target")] if command == "strip" else []
    arguments = [command, str(chat.adapter), *target, "--repair", str(bad)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "repair.statistics" in done.output
