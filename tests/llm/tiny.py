"""A tiny random Llama: what every test here runs on."""

from __future__ import annotations

import pytest
import torch
from offramp.llm import few
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

steps_by_the_core = pytest.mark.skipif(
    not few.IS_FAST, reason="needs vector instructions and torch on OpenMP"
)

VOCAB = 89
END = 5


def make_model(seed: int = 0, **changes):
    """A random Llama whose logits are peaked enough to be told apart."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "eos_token_id": END,
        "pad_token_id": 0,
        "bos_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**values)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(7)
    return model


def byte_tokenizer(vocabulary=89):
    """Letters, digits and signs as tokens; everything else is unknown."""
    signs = [chr(code) for code in range(32, 127) if chr(code).lower() == chr(code)][: vocabulary - 8]
    words = ["<pad>", "<s>", "<unk>", "\n", "\t", "</s>", *signs]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )
