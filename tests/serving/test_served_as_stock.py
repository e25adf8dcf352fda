"""What stock vLLM serves of adapters as people have them, a guarded engine serves the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.runs.architectures.served import KEEP_ALL, served
from tests.support.adapters import cast, copy_with, key, renamed
from tests.support.tiny_model import load_model

pytestmark = pytest.mark.serving

CLOSE = 1e-4


def beside(module):
    """One module more, under another name."""

    def change(tensors):
        for side in "AB":
            tensors[key(module, side)] = tensors[key("model.layers.0.self_attn.q_proj", side)] * 2

    return change


def with_head(model, folder):
    """A LoRA on lm_head too, saved as PEFT does where embeddings were resized."""
    torch.manual_seed(3)
    options = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"])
    adapted = get_peft_model(load_model(model)[0], options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return folder


@pytest.fixture(scope="module")
def adapters(model, trained, workplace):
    def of(name, *changes, **config):
        return copy_with(trained, workplace / f"as-stock-{name}", *changes, **config)

    expressions = {r".*\.layers\.[01]\..*(q_proj|k_proj)$": 64, r"mlp\.(up|down)_proj": 4}
    return {
        "plain": trained,
        "wrapped twice": of("twice", renamed(lambda name: f"base_model.model.{name}")),
        "8 bits": of("eight", cast(torch.float8_e4m3fn)),
        "expressions": of("expressions", alpha_pattern=expressions),
        "head": with_head(model, workplace / "as-stock-head"),
        "skipped prefix": of("mtp", beside("mtp.layers.0.self_attn.q_proj")),
        "one layer more": of("more", beside("model.layers.9.self_attn.q_proj")),
        "other layers": of("other", renamed(lambda name: name.replace(".layers.", ".layers.9"))),
    }


@pytest.fixture(scope="module")
def keep_all(workplace):
    file = workplace / "keep-all.json"
    file.write_text(KEEP_ALL)
    return file


@pytest.fixture(scope="module")
def both(model, adapters, keep_all):
    """What a guarded and a stock engine answer."""
    return [served(model, adapters, policy, skipped=("mtp.",)) for policy in (keep_all, None)]


SERVED = (
    "plain", "wrapped twice", "8 bits", "expressions", "head", "skipped prefix", "one layer more",
)  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_a_guarded_engine_answers_as_stock_does(both, name):
    guarded, stock = both
    assert guarded[name]["refused"] is None
    assert guarded[name]["answer"] == pytest.approx(stock[name]["answer"], abs=CLOSE)
    assert guarded[name]["answer"] != pytest.approx(stock["base"], abs=CLOSE)


def test_an_adapter_of_which_nothing_is_placed_is_refused_where_stock_serves_the_base(both):
    guarded, stock = both
    assert stock["other layers"]["answer"] == pytest.approx(stock["base"], abs=CLOSE)
    code, message = guarded["other layers"]["refused"]
    assert code == "S3LORA-303"
    assert "any of its 28 modules" in message


def test_a_server_of_some_modules_serves_those_and_refuses_an_adapter_of_others(
    model, adapters, trained, keep_all, workplace
):
    def without_attention(tensors):  # vLLM takes k_proj too: it is packed with the two
        for name in [n for n in tensors if ".self_attn." in n and ".o_proj." not in n]:
            del tensors[name]

    others = copy_with(trained, workplace / "as-stock-others", without_attention)
    asked = {"plain": trained, "others": others}
    guarded, stock = (
        served(model, asked, policy, lora_target_modules=["q_proj", "v_proj"])
        for policy in (keep_all, None)
    )
    assert guarded["plain"]["refused"] is None
    assert guarded["plain"]["answer"] == pytest.approx(stock["plain"]["answer"], abs=CLOSE)
    assert stock["others"]["answer"] == pytest.approx(stock["base"], abs=CLOSE)
    assert guarded["others"]["refused"][0] == "S3LORA-303"
