"""What the served model does not take of an adapter decides nothing, and the verdict names it."""

from s3lora_serve import Policy
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.partial import Circumstances
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import NothingPlaced
from s3lora_serve.policy.method import Strip
from tests.support.adapters import copy_with, key, spike

DECOYS = [f"mtp.layers.{i}.self_attn.q_proj" for i in range(3)]


def with_decoys(folder, target):
    """Three sharp modules more, which no model takes."""

    def beside(tensors):
        for name in DECOYS:
            for side in "AB":
                own = tensors[key("model.layers.0.self_attn.q_proj", side)]
                tensors[key(name, side)] = own.clone()
            spike(name)(tensors)

    return copy_with(folder, target, beside)


def taken_of(folder, **more):
    policy = Policy(strip=Strip(top_k=3))
    about = Circumstances(**more)
    return admit(folder, "tenant", policy, device="cpu", circumstances=about).verdict


def test_sharp_modules_that_the_model_does_not_take_draw_no_strip(trained, tmp_path):
    folder = with_decoys(trained, tmp_path / "decoys")
    assert set(taken_of(folder).stripped) & set(DECOYS)  # no model is known
    verdict = taken_of(folder, left_out_of_model=lambda _adapter: DECOYS)
    whole = taken_of(trained)
    assert verdict.left_out == tuple(DECOYS)
    assert verdict.stripped == whole.stripped
    assert [m.relative_ssi for m in verdict.modules] == [m.relative_ssi for m in whole.modules]
    assert Verdict.from_json(verdict.as_json()).left_out == tuple(DECOYS)


def test_an_adapter_that_the_model_takes_nothing_of_is_refused(trained):
    def nothing(_adapter):
        raise NothingPlaced("the served model has no LoRA on any of its 28 modules")

    verdict = taken_of(trained, left_out_of_model=nothing)
    assert (verdict.decision, verdict.reason.code) == ("rejected", "S3LORA-303")
