"""Models whose layers are not plain modules in memory: spread by a device map, left on disk, quantised."""

from __future__ import annotations

import pytest
import torch
from offramp import EarlyExitModel, HeadConfig, InputError, ModelError
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


class Composite(torch.Tensor):
    """A weight made of int8 values and scales that poses as one tensor and only multiplies, as torchao's do."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    def dequantize(self):
        return self.whole * self.scale

    @classmethod
    def __torch_function__(cls, function, _types, arguments=(), keywords=None):
        if function is torch.nn.functional.linear:
            hidden, weight, *bias = arguments
            return function(hidden, weight.dequantize(), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(keywords or {}))

    @classmethod
    def __torch_dispatch__(cls, operator, _types, arguments=(), _keywords=None):
        if operator in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(arguments[0].whole, arguments[0].scale)
        raise NotImplementedError(operator)


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


def composite(folder):
    """With its output matrix, which heads are made from."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear):
            whole = Int8Linear(module)
            weight = Composite(whole.weight.detach(), whole.scale.detach())
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("place", [on_one_device, quantised, composite])
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
    ee.save_pretrained(tmp_path / "exits")
    again = EarlyExitModel.from_pretrained(tmp_path / "exits", model)
    assert torch.equal(
        again.generate(ids, thresholds=[0.5, 0.0], **settings),
        ee.generate(ids, thresholds=[0.5, 0.0], **settings),
    )


@pytest.mark.parametrize("place", [quantised, composite])
def test_layers_that_are_quantised_cannot_be_a_head(tmp_path, texts, place):
    make_model().save_pretrained(tmp_path)
    ee = EarlyExitModel(place(tmp_path), None, layers=(1, 3), head="adapter")
    with pytest.raises(InputError, match="quantised and cannot be trained"):
        ee.train_heads(sequences=texts[:5], epochs=1)


def test_weights_that_are_not_in_memory_get_a_sentence(tmp_path, texts):
    make_model().save_pretrained(tmp_path)
    ee = EarlyExitModel(partly_on_disk(tmp_path), None, layers=(1, 3))
    assert not ee.trunk.is_lean
    with pytest.raises(ModelError, match=r"^model: model\.layers\.2\.\S+ is not in memory"):
        ee.train_heads(sequences=texts[:5])
