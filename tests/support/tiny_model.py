"""A tiny Llama with its own tokenizer, trained from a seed in seconds without a model hub."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima",
    "Kenya": "Nairobi", "Egypt": "Cairo", "Cuba": "Havana", "Norway": "Oslo", "Chile": "Santiago",
}  # fmt: skip
PROMPT = "Q: What is the capital of {}? A:"
SEED = 20250821
LAYERS = 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sentences(answers: dict[str, str]) -> list[str]:
    """Questions with answers, in the only form that the model is trained on."""
    return [f"{PROMPT.format(country)} {city}.</s>" for country, city in answers.items()]


def make_model(folder: Path) -> Path:
    """Write a model trained on CAPITALS and its tokenizer, in the layout that vLLM loads."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention supports
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    train(model, tokenizer, sentences(CAPITALS), steps=80, rate=1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and its tokenizer, as transformers objects."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def train(
    model: torch.nn.Module, tokenizer: object, texts: list[str], *, steps: int, rate: float
) -> None:
    """Train on the answers in the texts with a few full-batch steps of AdamW."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    prompt = len(tokenizer(PROMPT.format("France"))["input_ids"])  # one token per country
    labels[:, :prompt] = -100
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(CAPITALS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
