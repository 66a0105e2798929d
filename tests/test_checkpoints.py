"""Checkpoints: what cannot be read is refused in one line that names the file or the field."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tinylm.checkpoints import (
    FAMILIES,
    Layout,
    config_from_hf,
    config_to_hf,
    fill,
    load_model,
    save_model,
)
from tinylm.cost import count_parameters
from tinylm.model import Block, ModelConfig, TinyLM

SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def tiny(**changes: object) -> ModelConfig:
    """Make the config of a small Llama, changed."""
    return ModelConfig(**{**SIZES, "num_key_value_heads": 2, "qk_norm": False, **changes})


WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
KINDS = ["full_attention", "sliding_attention"]
REFUSED = {
    "model_type='mamba': this reads llama, mistral": {"model_type": "mamba"},
    "model_type=None": {"hidden_size": 32},
    "hidden_act='gelu'": {"model_type": "llama", "hidden_act": "gelu"},
    "mlp_bias=True": {"model_type": "llama", "mlp_bias": True},
    "partial_rotary_factor=0.5: only 1.0": {"model_type": "llama", "partial_rotary_factor": 0.5},
    "is_causal=False: only True": {"model_type": "mistral", "is_causal": False},
    "activation_function='relu'": {"model_type": "gpt2", "activation_function": "relu"},
    "clip_qkv=8.0: only None": {"model_type": "olmoe", "clip_qkv": 8.0},
    "n_shared_experts=0: only 1 or more": {"model_type": "deepseek_v3", "n_shared_experts": 0},
    "quantization_config={'bits': 4}": {"model_type": "qwen2", "quantization_config": {"bits": 4}},
    "'spiral': use one of default": {
        "model_type": "llama",
        "rope_scaling": {"type": "spiral", "factor": 2.0},
    },
    "use_sliding_window=True: only False": {"model_type": "smollm3", **WINDOW},
    "all layers must have full_attention": {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
    },
    "layer_types=['spiral', 'full_attention']: only full_attention and sliding_attention": {
        "model_type": "olmo3",
        "num_hidden_layers": 2,
        "layer_types": ["spiral", "full_attention"],
    },
    "layer_types=['full_attention']: give a type for each of the 2 layers": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"],
    },
    "only full_attention and conv are computed for lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 2,
        "layer_types": KINDS,
    },
    "only full_attention and sliding_attention are computed for qwen3": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "quantization_config='mxfp4': its weights have 4 bits": {
        "model_type": "gpt_oss",
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "attn_logit_softcapping=50.0: only None is computed for gemma3_text": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": 50.0,
    },
    "use_bidirectional_attention=True: only False": {
        "model_type": "gemma2",
        "use_bidirectional_attention": True,
    },
    "hidden_activation='relu': only 'gelu_pytorch_tanh'": {
        "model_type": "gemma2",
        "hidden_activation": "relu",
    },
    "sliding_window=None: layer_types asks for a": {
        "model_type": "qwen3",
        "layer_types": ["sliding_attention"] * 32,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_computed_is_refused(message):
    """A config that asks for something else than is computed here says so."""
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_hf(REFUSED[message])


UNKNOWN = {
    "to be a llama change partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "to be a mistral change no_rope_layers=(1,)": {"sliding_window": 5, "no_rope_layers": (1,)},
    "to be a qwen3 change no_rope_layers=(1,)": {"qk_norm": True, "no_rope_layers": (1,)},
    "change layer_norm=True": {"layer_norm": True},
    "change n_shared_experts=1": {"num_experts": 4, "n_shared_experts": 1},
    "bias_update_speed=0.1": {"num_experts": 4, "bias_update_speed": 0.1},
    "to be a llama change rope_parameters=": {
        "rope_parameters": {"sliding_attention": {"rope_theta": 1e5}}
    },
    "to be a llama change block='my_module:MyBlock'": {"block": "my_module:MyBlock"},
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_a_config_of_no_family_names_what_would_have_to_change(message):
    """The message names the nearest family and the fields that it cannot express."""
    with pytest.raises(ValueError, match=re.escape(message)):
        config_to_hf(tiny(**UNKNOWN[message]))


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "llama", "mistral", "smollm3", "mixtral", "deepseek_v3"]
    + ["olmo2", "olmo3", "gemma2", "gemma3_text", "gpt_oss", "lfm2"],
)
def test_parameters_of_real_models(model_type):
    """The defaults of a config class are those of a real model, counted at full size."""
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    count = sum(weight.numel() for weight in peer.parameters())
    assert count_parameters(config_from_hf({"model_type": model_type}))["total"] == count


def test_another_layout_is_refused():
    """Names that are on one side only are no model of ours."""
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SIZES, **NO_TOKENS))
    ours = TinyLM(config_from_hf(gpt2.config.to_dict()))
    fill(ours, FAMILIES["gpt2"].layout, gpt2.state_dict())
    with pytest.raises(ValueError, match="model.embed_positions.weight is on one side only"):
        fill(ours, Layout(), gpt2.state_dict())


def refusal(name: object) -> str:
    """Return the message with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        load_model(name)
    return str(caught.value)


DAMAGES = {
    "cut short": "model.safetensors",
    "mixed up": "model.norm.weight is missing",
    "half a config": "config.json",
    "another family": "model_type='mamba'",
    "a list": "it holds a list",
    "not a number": "config.json",
    "too large": "this machine has",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage):
    """The line names the file, and the tensors that do not fit."""
    save_model(TinyLM(tiny(qk_norm=True)), tmp_path)
    weights = tmp_path / "model.safetensors"
    config = tmp_path / "config.json"
    text = config.read_text()
    state = load_file(weights)
    state["model.extra.weight"] = state.pop("model.norm.weight")
    contents = {
        "cut short": (weights, weights.read_bytes()[:1000]),
        "mixed up": (weights, save(state)),
        "half a config": (config, text[:100].encode()),
        "another family": (config, b'{"model_type": "mamba"}'),
        "a list": (config, b"[1, 2]"),
        "not a number": (config, text.replace("32", '"wide"', 1).encode()),
        "too large": (config, text.replace("32", "4" + "0" * 12, 1).encode()),
    }
    file, content = contents[damage]
    file.write_bytes(content)
    message = refusal(tmp_path)
    assert DAMAGES[damage] in message
    assert str(tmp_path) in message
    assert len(message.splitlines()) == 1
    if damage == "mixed up":
        assert "model.extra.weight is not expected" in message


class LoudBlock(Block):
    """A block of one's own."""

    def forward(self, x, *args):
        """Double the input."""
        return super().forward(2 * x, *args)


def test_shapes_of_an_own_block_are_compared(tmp_path):
    """Tensors of another shape are listed."""
    save_model(TinyLM(tiny(), LoudBlock), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = torch.zeros(5)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape("model.norm.weight is [5] and should be [32]")):
        load_model(tmp_path, LoudBlock)


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """Save a small GPT-2 of `transformers`."""
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SIZES, **NO_TOKENS))
    peer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_files_that_transformers_reads_are_refused_too(gpt2):
    """A list of what is wrong, and two tables where the config says one."""
    file = gpt2 / "model.safetensors"
    tensors = load_file(file)
    wrong = dict(tensors)
    wrong["transformer.h.2.ln_1.bias"] = wrong.pop("transformer.ln_f.bias")
    wrong["transformer.wte.weight"] = torch.zeros(5, 32)
    save_file(wrong, file, metadata={"format": "pt"})
    message = refusal(gpt2)
    assert "ln_f.bias is missing" in message
    assert "h.2.ln_1.bias is not expected" in message
    assert "wte.weight is [5, 32] and should be [16, 32]" in message

    two_tables = {**tensors, "lm_head.weight": torch.zeros(16, 32)}
    save_file(two_tables, file, metadata={"format": "pt"})
    assert "tie_word_embeddings=True: the file has two different tables" in refusal(gpt2)


def test_pickles_and_names_that_lead_nowhere(gpt2, tmp_path):
    """Pickles can run code; the hub may be out of reach."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(gpt2 / "model.safetensors"), pickled / "pytorch_model.bin")
    assert "pickled holds no model, it has no config.json" in refusal(pickled)
    (pickled / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    assert "pytorch_model.bin but no safetensors: pickles can run code" in refusal(pickled)
    assert "does not exist: give a folder" in refusal("my model")
    assert "nowhere does not exist: give a folder" in refusal(tmp_path / "nowhere")
    with patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        assert "nobody/nothing cannot be used" in refusal("nobody/nothing")


def test_one_of_several_files_is_cut_short(gpt2, tmp_path):
    """A shard that is not complete is refused."""
    peer = AutoModelForCausalLM.from_pretrained(gpt2)
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    part = sorted((tmp_path / "sharded").glob("*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:-100])
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert part.name in index["weight_map"].values()
    assert "sharded cannot be used (Error while deserializing" in refusal(tmp_path / "sharded")


def test_one_file_or_several_and_the_names_of_2019(tmp_path):
    """It is the same model, also without `transformer.` and with the mask among the weights."""
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **SIZES, **NO_TOKENS))
    ids = torch.randint(0, 16, (2, 24), generator=torch.Generator().manual_seed(1))
    gpt2.eval().save_pretrained(tmp_path / "gpt2")
    ours = load_model(tmp_path / "gpt2").requires_grad_(False)
    assert type(ours) is TinyLM and not ours.training
    assert ours.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(ours(ids), gpt2(ids).logits, rtol=0, atol=1e-5)

    gpt2.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path / "sharded")(ids), ours(ids))
    of_2019 = load_file(tmp_path / "gpt2" / "model.safetensors")
    of_2019 = {name.removeprefix("transformer."): weight for name, weight in of_2019.items()}
    of_2019["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(of_2019, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(tmp_path / "gpt2")(ids), ours(ids))
