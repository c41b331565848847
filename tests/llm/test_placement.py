"""Models whose layers are not plain modules in memory: spread by a device map, left on disk, quantised."""

from __future__ import annotations

import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, ModelError
from tiny import make_model
from transformers import AutoModelForCausalLM


class Int8Linear(torch.nn.Linear):
    """A linear map whose weight is kept in int8 with a scale a row, as weight-only quantisers leave it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        whole = (linear.weight / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight * self.scale)


def on_one_device(folder):
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})


def partly_on_disk(folder):
    places = {f"model.layers.{layer}": "disk" if layer in (2, 5) else "cpu" for layer in range(6)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offloaded"
    )


def quantised(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, Int8Linear(child))
    return model


@pytest.mark.parametrize("place", [on_one_device, quantised])
def test_tokens_are_those_of_generate(tmp_path, texts, prompts, place):
    make_model().save_pretrained(tmp_path)
    model = place(tmp_path).requires_grad_(False).eval()
    ee = EarlyExitModel(model, None, layers=(1, 3), head=HeadConfig("mlp", shortlist=60))
    # What only a module knows how to multiply with is left to the module.
    assert ee.trunk.is_lean == (place is on_one_device)
    ee.train_heads(sequences=texts[:20], epochs=1, batch_size=64)
    ids, mask = prompts
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    own = model.generate(ids, **settings)
    assert torch.equal(ee.generate(ids, mode="off", **settings), own)
    verified = ee.generate(
        ids, mode="verify", thresholds=[0.5, 0.0], return_dict_in_generate=True, **settings
    )
    assert torch.equal(verified.sequences, own)
    assert verified.stats.rejected_drafts > 0


def test_weights_that_are_not_in_memory_get_a_sentence(tmp_path, texts):
    make_model().save_pretrained(tmp_path)
    ee = EarlyExitModel(partly_on_disk(tmp_path), None, layers=(1, 3))
    assert not ee.trunk.is_lean
    with pytest.raises(ModelError, match=r"^model: model\.layers\.2\.\S+ is not in memory"):
        ee.train_heads(sequences=texts[:5])
