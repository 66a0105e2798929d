"""All families: opened equal to `transformers` or refused by name, tuned, exchanged with `peft`."""

import copy
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import FAMILIES as HERE
from tinylm.checkpoints import (
    Family,
    Layout,
    config_to_hf,
    load_model,
    save_model,
    their_tensors,
    write_layer_types,
)
from tinylm.cli import main
from tinylm.decoding import speculative_generate
from tinylm.generate import SamplingConfig, generate
from tinylm.hub import load, save
from tinylm.lora import LoraConfig, add_lora, load_lora, save_lora
from tinylm.model import ModelConfig, TinyLM
from tinylm.quantize import prepare_decoding, quantize_model
from tinylm.sft import SFTConfig, open_base
from tinylm.tokenizer import CHATML_TEMPLATE

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SMALL = {"num_key_value_heads": 2, "intermediate_size": 20}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 10, "v_head_dim": 6}
LATENT = {
    **LATENT,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 2,
}
WINDOW_FIRST = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "smollm3": SMALL,
    "gpt2": {},
    "mixtral": {**SMALL, "num_local_experts": 3},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "head_dim": 8,
    },
    "deepseek_v3": {
        **LATENT,
        "intermediate_size": 20,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 2,
    }
    | {"topk_group": 1, "first_k_dense_replace": 1},
    "olmo2": SMALL,
    "olmo3": {**SMALL, **WINDOW_FIRST},
    "gemma2": {
        **SMALL,
        **WINDOW_FIRST,
        "head_dim": 8,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {**SMALL, **WINDOW_FIRST, "head_dim": 8, "query_pre_attn_scalar": 5},
    "gpt_oss": {
        **SMALL,
        **WINDOW_FIRST,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "lfm2": {
        **SMALL,
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 4,
    },
}
NEW = ["olmo2", "olmo3", "gemma2", "gemma3_text", "gpt_oss", "lfm2"]
IDS = torch.randint(0, 47, (2, 30), generator=torch.Generator().manual_seed(5))
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def scramble(model, seed=3):
    """Random weights everywhere, also where a model starts with zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(
            1 + 0.3 * noise if re.search(r"norm|ln_", name) and "bias" not in name else 0.3 * noise
        )
    return model.eval().requires_grad_(False)


def make_theirs(family, folder, **changes):
    """A model of `transformers` whose config.json has entries as another tool would write them."""
    entries = {"vocab_size": 47, **SIZES, **NO_TOKENS, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **copy.deepcopy(entries))
    scramble(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    file = folder / "config.json"
    hf = {**json.loads(file.read_text()), **changes}
    if "rope_scaling" in changes:
        hf.pop("rope_parameters", None)
    file.write_text(json.dumps(hf))
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


def difference(ours, theirs):
    with torch.no_grad():
        return (ours(IDS) - theirs(IDS).logits).abs().max().item()


WINDOW = {"sliding_window": 5, "layer_types": ["full_attention"] * 2}
ENTRIES = {
    "original_max_position_embeddings beside YaRN": {
        "rope_scaling": YARN,
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings beside llama3": {
        "rope_scaling": LLAMA3,
        "original_max_position_embeddings": 16,
    },
    "partial_rotary_factor": {"partial_rotary_factor": 0.5, "head_dim": 8},
    "is_causal": {"is_causal": False},
    "layer_types": WINDOW,
    "layer_types with a switch": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention"] * 2,
    },
    "attention_factor": {
        "rope_scaling": {**YARN, "attention_factor": 0.7, "original_max_position_embeddings": 16}
    },
    "mscale null": {
        "rope_scaling": {**YARN, "mscale_all_dim": None, "original_max_position_embeddings": 16}
    },
    "alpha": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "dense in between": {"mlp_only_layers": [1]},
    "dense first": {"decoder_sparse_step": 2},
    "neighbors or halves": {"rope_interleave": False},
    "epsilon": {"rms_norm_eps": 0.01, "layer_norm_epsilon": 0.01},
    "more dense layers than layers": {"first_k_dense_replace": 3},
    "no shared experts": {"n_shared_experts": 0},
}
# Entries that `transformers` computes and this library does not: the message must name them.
REFUSED = {
    "partial_rotary_factor": "partial_rotary_factor=0.5",
    "is_causal": "is_causal=False",
    "alpha": "alpha",
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "family", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "smollm3", *NEW]
)
def test_an_entry_is_computed_or_refused(family, entry, tmp_path):
    try:
        theirs = make_theirs(family, tmp_path / "model", **ENTRIES[entry])
    except (TypeError, KeyError):
        pytest.skip("transformers cannot compute it either")
    try:
        ours = load_model(tmp_path / "model")
    except ValueError as error:
        names = [REFUSED.get(entry, ""), *ENTRIES[entry]]
        assert len(str(error).splitlines()) == 1 and any(
            name and name in str(error) for name in names
        )
        assert "pickle" not in str(error) and "safetensors" not in str(error)
        return
    # Where each type of layer has its own rotation, transformers ignores the older word "type".
    if not (entry == "alpha" and "full_attention" in theirs.config.rope_parameters):
        assert entry not in REFUSED, "opened, though nothing here computes it"
    assert difference(ours, theirs) < 1e-3


@pytest.mark.parametrize("family", ["llama", *NEW])
def test_three_training_steps_are_the_same(family, tmp_path):
    theirs = make_theirs(family, tmp_path / "model").requires_grad_(True)
    ours = load_model(tmp_path / "model").train()
    # transformers adds the balancing loss only if its router logits are asked for.
    ours.config = replace(ours.config, router_aux_loss_coef=0.0)
    layout = HERE[family].layout
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (ours, theirs)]
    for _ in range(3):
        losses = (ours(IDS, IDS), theirs(IDS, labels=IDS).loss)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        assert abs(losses[0] - losses[1]) < 2e-5
        with_gradients = copy.deepcopy(ours)
        for weight, original in zip(with_gradients.parameters(), ours.parameters(), strict=True):
            weight.data.copy_(original.grad)
        gradients = dict(theirs.named_parameters())
        for name, views in their_tensors(with_gradients, layout).items():
            if name in gradients:
                gap = torch.cat(views, layout.join) - gradients[name].grad
                assert gap.abs().max() < 1e-4 * gradients[name].grad.abs().max().clamp(min=1), name
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("family", NEW)
def test_new_families_are_read_from_several_files(family, tmp_path):
    theirs = make_theirs(family, tmp_path / "model")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert difference(load_model(tmp_path / "sharded"), theirs) < 1e-3


@pytest.mark.parametrize("family", NEW)
def test_new_families_write_the_same_text_in_every_way(family, tmp_path):
    make_theirs(family, tmp_path / "model")
    ours = load_model(tmp_path / "model")
    torch.manual_seed(0)
    draft = TinyLM(ModelConfig(vocab_size=47, **SIZES, initializer_range=0.4)).eval()
    greedy = SamplingConfig(16, temperature=0)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [11]]

    # One by one, padded in a batch, guessed by another model, with weights laid out anew.
    texts = [generate(ours, [prompt], greedy)[0] for prompt in prompts]
    assert generate(ours, prompts, greedy) == texts
    assert [speculative_generate(ours, draft, prompt, greedy) for prompt in prompts] == texts
    prepared = copy.deepcopy(ours)
    prepare_decoding(prepared)
    assert generate(prepared, prompts, greedy) == texts

    # Rounded weights are near, also laid out, and as bfloat16. A token that goes to another expert
    # because of the rounding counts much in a model as small as this.
    bound = 0.3 if ours.config.num_experts else 0.1
    rounded = copy.deepcopy(ours)
    quantize_model(rounded, "int8")
    with torch.no_grad():
        logits = ours(IDS)
        assert (rounded(IDS) - logits).norm() < bound * logits.norm()
        prepare_decoding(rounded)
        assert (rounded(IDS) - logits).norm() < bound * logits.norm()
        assert (copy.deepcopy(ours).bfloat16()(IDS) - logits).norm() < bound * logits.norm()


@pytest.mark.parametrize("family", [name for name in HERE if HERE[name].same_file])
def test_a_model_of_ours_is_saved_as_its_family(family, tmp_path):
    make_theirs(family, tmp_path / "model")
    ours = load_model(tmp_path / "model")
    save_model(ours, tmp_path / "ours")
    hf = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert hf["model_type"] == family
    assert difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) < 1e-3
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config and torch.equal(again(IDS), ours(IDS))


def read_granite(theirs):
    """Read the factor of the scores, which is a number of its own there."""
    return {"query_pre_attn_scalar": theirs.attention_multiplier**-2}


def write_granite(config):
    """Write it."""
    return {"attention_multiplier": (config.query_pre_attn_scalar or config.head_dim) ** -0.5}


JOINED = {
    r"self_attn\.[qkv]_proj": "self_attn.qkv_proj",
    r"mlp\.(gate|up)_proj": "mlp.gate_up_proj",
}
LISTED = {"layer_types": True, "mixed_layers": True, "write": write_layer_types}
# Not in the table: what "Add your family in twenty lines" of notebook 18 asks for, and a config.
ADDED = {
    "granite": (
        Family(
            computed={"residual_multiplier": 1.0, "logits_scaling": 1.0},
            read=read_granite,
            write=write_granite,
            same_file=True,
        ),
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    ),
    "seed_oss": (
        Family(computed={"residual_dropout": 0.0}, same_file=True),
        {"head_dim": 8, "residual_dropout": 0.0},
    ),
    "ministral": (Family(**LISTED, same_file=True), {"head_dim": 8, **WINDOW_FIRST}),
    "phi3": (Family(computed={"resid_pdrop": 0.0, "embd_pdrop": 0.0}, layout=Layout(JOINED)), {}),
}


@pytest.mark.parametrize("family", ADDED)
def test_a_family_can_be_added(family, tmp_path, monkeypatch):
    entry, shape = ADDED[family]
    monkeypatch.setitem(HERE, family, entry)
    monkeypatch.setitem(FAMILIES, family, {**SMALL, **shape})
    theirs = make_theirs(family, tmp_path / "model")
    ours = load_model(tmp_path / "model")
    assert difference(ours, theirs) < 1e-3
    assert config_to_hf(ours.config, [family])["model_type"] == family
    if entry.same_file:
        save_model(ours, tmp_path / "ours")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert theirs.config.model_type == family and difference(ours, theirs) < 1e-3


MUST_OPEN = {
    "one expert of a Mixtral": ("mixtral", {"num_experts_per_tok": 1}),
    "one expert of a DeepSeek": ("deepseek_v3", {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    "halves": ("deepseek_v3", {"rope_interleave": False}),
    "mscale null": ("deepseek_v3", ENTRIES["mscale null"]),
    "another epsilon": ("deepseek_v3", {"rms_norm_eps": 0.01}),
    "odd heads": ("gpt2", {"hidden_size": 36}),
}


@pytest.mark.parametrize("case", MUST_OPEN)
def test_what_is_near_is_opened(case, tmp_path):
    family, changes = MUST_OPEN[case]
    theirs = make_theirs(family, tmp_path / "model", **changes)
    ours = load_model(tmp_path / "model")
    assert difference(ours, theirs) < 1e-3
    save(ours, None, tmp_path / "again")
    assert difference(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "again")) < 1e-3


def targets(model):
    """The ends of the names of linear layers, and of weights that `peft` takes as parameters."""
    linear = {
        name.rpartition(".")[2]
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    packed = {
        "mlp." + name.split("mlp.")[1]
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and "mlp." in name
    }
    if packed and "gate_proj" in linear:  # peft takes these names for the packed experts
        packed |= {
            "mlp.gate_proj.weight",
            "shared_experts.up_proj.weight",
            "shared_experts.down_proj.weight",
        }
        linear -= {"gate_proj", "up_proj", "down_proj"}
    return sorted(linear - {"lm_head"}), sorted(packed)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_adapters_of_peft_mean_the_same_here(family, tmp_path):
    theirs = make_theirs(family, tmp_path / "base")
    plain = load_model(tmp_path / "base")
    linear, packed = targets(theirs)
    for number, target in enumerate(linear + packed):
        kind = "target_parameters" if target in packed else "target_modules"
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, **{"target_modules": [], kind: [target]}
        )
        adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, generator=torch.Generator().manual_seed(number))
        adapted.save_pretrained(tmp_path / target)
        ours = load_model(tmp_path / "base")
        load_lora(ours, tmp_path / target)
        assert difference(plain, adapted) > 0.01, target
        assert difference(ours, adapted) < 2e-3, target


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_adapters_from_here_mean_the_same_to_peft(family, tmp_path):
    theirs = make_theirs(family, tmp_path / "base")
    ours = load_model(tmp_path / "base")
    linear, packed = targets(theirs)
    packed = [name for name in packed if "_proj.weight" not in name]
    add_lora(ours, LoraConfig(r=2, target_modules=".*_proj.*", target_parameters=tuple(packed)))
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                weight.data, std=0.2, generator=torch.Generator().manual_seed(len(name))
            )
    save_lora(ours, tmp_path / "adapter")
    plain = difference(ours, theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert plain > 0.1 and difference(ours, adapted) < 2e-3


def test_adapters_of_own_latent_attention_fit_the_exported_model(tmp_path):
    latent = dict(
        kv_lora_rank=8,
        q_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=6,
        qk_norm=False,
    )
    experts = dict(
        num_experts=4, scoring_func="sigmoid", n_shared_experts=1, first_k_dense_replace=1
    )
    ours = scramble(TinyLM(ModelConfig(vocab_size=47, **SIZES, **latent, **experts)))
    save(ours, None, tmp_path / "base")
    add_lora(ours, LoraConfig(r=2))
    for name, weight in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                weight.data, std=0.3, generator=torch.Generator().manual_seed(len(name))
            )
    save_lora(ours, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = difference(ours, theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert plain > 0.1 and difference(ours, adapted) < 2e-3


def test_adapters_of_gpt2_are_refused_on_both_sides(tmp_path):
    theirs = make_theirs("gpt2", tmp_path / "base")
    adapted = peft.get_peft_model(
        copy.deepcopy(theirs), peft.LoraConfig(r=2, target_modules=["c_attn"])
    )
    adapted.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "base")
    with pytest.raises(ValueError, match="fan_in_fan_out|c_attn"):
        load_lora(ours, tmp_path / "theirs")
    add_lora(ours, LoraConfig(r=2))
    save_lora(ours, tmp_path / "ours")
    with pytest.raises(ValueError, match="Target modules"):
        peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["where do the ducks swim? in the pond. "] * 9, 300)


@pytest.mark.parametrize(
    "family", ["qwen2", "smollm3", "gpt2", "mixtral", "olmoe", "deepseek_v3", *NEW]
)
def test_fine_tuning_starts_from_what_can_be_asked_to_write(family, tokenizer, tmp_path):
    tokenizer.hf_tokenizer.chat_template = CHATML_TEMPLATE
    theirs = make_theirs(family, tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    config = SFTConfig(run=str(tmp_path / "model"), out=str(tmp_path / "tuned"))
    config.data.seq_len = 32
    model, reader = open_base(config)
    assert difference(model, theirs) < 1e-3 and len(reader) == len(tokenizer)


def test_the_command_tunes_a_model_in_several_files(tokenizer, tmp_path):
    tokenizer.hf_tokenizer.chat_template = CHATML_TEMPLATE
    theirs = make_theirs("llama", tmp_path / "model", vocab_size=len(tokenizer))
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    chats = [{"prompt": f"pond {number}?", "completion": "ducks"} for number in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = "sft --run sharded --out tuned --data.path chats.jsonl --data.seq-len 32"
    flags += " --train.max-steps 1 --train.batch-size 2 --train.num-threads 1"
    flags += " --train.sample-interval 0"
    command = [sys.executable, "-m", "tinylm", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    model, _ = load(tmp_path / "tuned")
    assert 0 < difference(model, theirs) < 10


@pytest.mark.parametrize("scaling", [None, {**YARN, "original_max_position_embeddings": 16}])
def test_saved_files_speak_the_words_of_transformers_4(scaling, tokenizer, tmp_path):
    shape = ModelConfig(
        vocab_size=len(tokenizer), **SIZES, qk_norm=False, rope_theta=3e5, rope_scaling=scaling
    )
    model = TinyLM(shape)
    save(model, tokenizer, tmp_path / "exported")
    save_model(model, tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    for name in ("exported", "run"):
        hf = json.loads((tmp_path / name / "config.json").read_text())
        assert (hf["rope_theta"], hf["rope_scaling"]) == (3e5, scaling)
        assert load_model(tmp_path / name).config == model.config
        words = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert (
            words["tokenizer_class"] == "PreTrainedTokenizerFast"
            and "extra_special_tokens" not in words
        )
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert again.convert_tokens_to_ids("<|im_end|>") in again.all_special_ids


SPREAD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CANON = {"layer_types": ("canon_attention",) * 2, "conv_L_cache": 4}
OWN = {  # shapes that no family has, or whose files have other tensors
    "canon": CANON,
    "canon, stretched": {**CANON, "rope_scaling": SPREAD},
    "stretched by position": {**CANON, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "a rotation for windows": {
        "layer_types": ("full_attention", "sliding_attention"),
        "sliding_window": 5,
        "rope_parameters": {"sliding_attention": {"rope_theta": 500.0}},
    },
    "half rotated": {"partial_rotary_factor": 0.5, "head_dim": 8, "rope_scaling": SPREAD},
    "experts": {"num_experts": 4, "rope_scaling": SPREAD},
}


@pytest.mark.parametrize("shape", OWN)
def test_the_tokenizer_beside_a_model_of_our_own_opens_without_a_warning(
    shape, tokenizer, tmp_path, recwarn
):
    model = TinyLM(ModelConfig(vocab_size=len(tokenizer), **SIZES, **OWN[shape]))
    save_model(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tinylm"
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    library = logging.getLogger("transformers")
    transformers.logging.set_verbosity_warning()
    library.addHandler(handler)
    try:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    finally:
        library.removeHandler(handler)
        transformers.logging.set_verbosity_error()
    assert [record.getMessage() for record in records] == []
    assert [str(warning.message) for warning in recwarn if "rope" in str(warning.message)] == []
    assert theirs.tokenize("the ducks") == tokenizer.hf_tokenizer.tokenize("the ducks")
    opened, reader = load(tmp_path)
    assert opened.config == model.config and len(reader) == len(tokenizer)


REMEDIES = {
    "--model.layer-types full_attention": CANON,
    "--model.layer-types full_attention --model.no-value-residual": {
        "layer_types": ("canon_attention",),
        "conv_L_cache": 4,
        "value_residual": True,
    },
    "--model.partial-rotary-factor 1.0": {"partial_rotary_factor": 0.5, "head_dim": 8},
}


@pytest.mark.parametrize("flags", REMEDIES)
def test_export_names_what_is_in_the_way_and_the_flags(flags, tokenizer, tmp_path, capsys):
    shape = REMEDIES[flags]
    save_model(TinyLM(ModelConfig(vocab_size=len(tokenizer), **SIZES, **shape)), tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    words = ["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and not (tmp_path / "out").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    name = next(iter(shape))
    assert f"to be a qwen3 change {name}={shape[name]!r}" in line
    assert line.endswith(f"; pretrain with {flags} to export it")


@pytest.mark.parametrize("kinds", [("full_attention",), ("full_attention",) * 2])
def test_what_the_export_of_the_default_model_advises_is_opened(kinds, tmp_path):
    same = {"layer_types": kinds}
    ours = scramble(TinyLM(ModelConfig(vocab_size=47, **SIZES, **same)))
    save_model(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and difference(ours, theirs) < 1e-3


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_the_commands_tune_a_new_family_and_go_on_from_there(family, tokenizer, tmp_path, capsys):
    tokenizer.hf_tokenizer.chat_template = CHATML_TEMPLATE
    make_theirs(family, tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": f"pond {i}?", "chosen": "ducks", "rejected": "the"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    chats = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    few = "--train.max-steps 3 --train.batch-size 4 --train.num-threads 1 --data.seq-len 64"
    few += " --train.sample-interval 0"
    for words in (
        f"sft --run {tmp_path}/model --out {tmp_path}/sft --data.path {tmp_path}/chats.jsonl {few}",
        f"dpo --run {tmp_path}/sft --out {tmp_path}/dpo --data.path {tmp_path}/pairs.jsonl {few}",
        f"generate --run {tmp_path}/dpo --max-new-tokens 8 --quantize int8",
        f"export --run {tmp_path}/dpo --out {tmp_path}/exported",
    ):
        assert main(words.split()) == 0, capsys.readouterr().err[-500:]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert theirs.config.model_type == family
    assert difference(load_model(tmp_path / "dpo"), theirs) < 1e-3


def test_names_of_old_files_by_family(tmp_path):
    for family, entry in (("qwen3_moe", "num_experts"), ("deepseek_v3", "head_dim")):
        theirs = make_theirs(family, tmp_path / family)
        save(load_model(tmp_path / family), None, tmp_path / f"{family}-again")
        hf = json.loads((tmp_path / f"{family}-again" / "config.json").read_text())
        assert hf[entry] == 4
        assert difference(load_model(tmp_path / f"{family}-again"), theirs) < 1e-3


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "../nowhere/at/all", "my model", "missing.gguf", "~/gone"]
)
def test_a_path_that_does_not_exist_is_said_so(name):
    with pytest.raises(
        ValueError, match="does not exist: give a folder, a GGUF file or a name of the hub"
    ):
        load(name)


def test_folders_without_a_model_are_said_so(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="holds no model, it has no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="is a single file: give the folder"):
        load_model(tmp_path / "notes.txt")
    for text in ("{", "[]", '"llama"', '{"model_type": "llama", "hidden_size": "wide"}', "{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json cannot be used") as caught:
            load_model(Path(tmp_path))
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500
        assert "pickle" not in str(caught.value)
