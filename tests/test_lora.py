"""LoRA: against `peft` in both directions, written-out weights, merging, and damaged files."""

import copy
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tinylm.basics import FieldError
from tinylm.checkpoints import load_model, save_model
from tinylm.lora import (
    LoRA,
    LoraConfig,
    LoRALinear,
    LoRAUpdate,
    add_lora,
    disable_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)
from tinylm.mla import MLAttention
from tinylm.model import ModelConfig, TinyLM
from tinylm.moe import Experts
from tinylm.rope import precompute_rope

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SMALL = ModelConfig(
    vocab_size=35,
    hidden_size=64,
    num_hidden_layers=2,
    max_position_embeddings=16,
    qk_norm=False,
    initializer_range=0.1,
)
UNTIED = replace(SMALL, tie_word_embeddings=False)
IDS = torch.randint(0, 35, (16, 6), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "LoRA": {},
    "rsLoRA": dict(use_rslora=True),
    "DoRA": dict(use_dora=True),
    "PiSSA": dict(init_lora_weights="pissa"),
    "pattern": dict(target_modules=r".*\.1\..*(q|up)_proj"),
    "dropout": dict(lora_dropout=0.3),
    "DoRA, dropout": dict(use_dora=True, lora_dropout=0.3),
}
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"


def make_base(config: ModelConfig = UNTIED) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(config).eval()


def updates_of(model: nn.Module, name: str = "default") -> list[LoRAUpdate]:
    """List the updates of one adapter."""
    return [module[name] for module in model.modules() if isinstance(module, LoRA)]


def shake(model: nn.Module, seed: int = 0) -> None:
    """Change an adapter at random, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


# Configs and names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(r=-1), "r=-1: use 1 or more"),
        (dict(lora_alpha=0), "lora_alpha=0: use"),
        (dict(lora_dropout=1.0), "lora_dropout=1.0: use"),
        (dict(init_lora_weights="magic"), "init_lora_weights='magic': use"),
        (dict(target_modules=()), r"target_modules=\(\): name one"),
        (
            dict(target_parameters=("experts.down_proj",), use_dora=True),
            "they take no dropout, DoRA or PiSSA",
        ),
    ],
    ids=str,
)
def test_a_bad_config_is_refused(wrong, message):
    with pytest.raises(FieldError, match=message):
        LoraConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(r=65), r"r=65: model.layers.0.self_attn.q_proj.weight is \(64, 64\), use 1 to 64"),
        (dict(r=0), "r=0: "),
        (dict(target_modules="q_proj"), "fits nothing"),  # a pattern is for the whole name
        (dict(target_modules=("_proj",)), "fits nothing"),  # an end is whole words
        (dict(target_modules=("q_proj", "vproj")), "vproj fits nothing, there is down_proj, gate"),
    ],
    ids=str,
)
def test_targets_that_fit_nothing_leave_the_model_as_it_was(wrong, message):
    model = make_base()
    with pytest.raises(FieldError, match=message):
        add_lora(model, LoraConfig(**wrong))
    assert not any(isinstance(module, LoRA) for module in model.modules())


def test_targets_are_ends_of_names_or_a_pattern():
    # q, k, v, o, gate, up, down in both layers; not the embedding, not the head
    assert len(add_lora(make_base(), LoraConfig(r=4))) == 2 * 7
    of_layer_0 = add_lora(make_base(), LoraConfig(r=4, target_modules=r".*\.0\.self_attn\..*_proj"))
    assert len(of_layer_0) == 4
    head = LoraConfig(r=4, target_modules=("lm_head",))
    assert add_lora(make_base(), head) == ["lm_head.weight"]
    with pytest.raises(FieldError, match="lm_head.weight is shared by two layers"):
        add_lora(make_base(SMALL), head)


def test_names_of_adapters():
    model = make_base()
    with pytest.raises(ValueError, match=r"the model has \[\]"):
        set_adapter(model, "default")
    add_lora(model, LoraConfig(r=4))
    with pytest.raises(FieldError, match="name='default'"):
        add_lora(model, LoraConfig(r=4))
    with pytest.raises(FieldError, match="use letters"):
        add_lora(model, LoraConfig(r=4), "a.b")
    with pytest.raises(ValueError, match=r"no adapter 'deafult', the model has \['default'\]"):
        set_adapter(model, "deafult")


# Updates


def test_lengths_and_directions_are_learned_apart_by_dora():
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    dora = LoRAUpdate(W, LoraConfig(r=2, use_dora=True))
    assert_close(dora(W), W)
    nn.init.normal_(dora.lora_B)
    assert_close(dora(W).norm(dim=1), W.norm(dim=1))  # directions move, lengths stay
    turned = F.cosine_similarity(dora(W), W, dim=1)
    dora.lora_magnitude_vector.data *= 2
    assert_close(dora(W).norm(dim=1), 2 * W.norm(dim=1))  # lengths move, directions stay
    assert_close(F.cosine_similarity(dora(W), W, dim=1), turned)
    assert turned.max() < 0.99


def test_pissa_starts_from_the_largest_singular_vectors():
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    pissa = LoRAUpdate(W, LoraConfig(r=2, init_lora_weights="pissa"))
    assert_close(pissa(W), W, rtol=0, atol=1e-6)
    left, values, right = torch.linalg.svd(W)
    principal = pissa.scaling * pissa.lora_B @ pissa.lora_A
    assert_close(principal, (left[:, :2] * values[:2]) @ right[:2])


def test_factors_of_a_bfloat16_weight_are_float32():
    W = torch.randn(4, 6).bfloat16()
    assert LoRAUpdate(W, LoraConfig(r=2)).lora_A.dtype == torch.float32


@pytest.mark.parametrize("name", ["LoRA", "rsLoRA", "DoRA", "PiSSA"])
def test_the_short_way_equals_the_written_out_weight(name):
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    toy = nn.Sequential(nn.Linear(64, 32))
    plain = toy(x)
    add_lora(toy, LoraConfig(r=4, target_modules=("0",), **VARIANTS[name]))
    assert_close(toy(x), plain, rtol=0, atol=1e-6)
    (update,) = updates_of(toy)
    nn.init.normal_(update.lora_B, std=0.1)
    short = toy[0](x)
    written = F.linear(x, toy[0].weight, toy[0].bias)
    assert_close(short, written)
    for p in update.parameters():
        (short_gradient,) = torch.autograd.grad(short.square().sum(), p, retain_graph=True)
        (gradient,) = torch.autograd.grad(written.square().sum(), p, retain_graph=True)
        assert_close(short_gradient, gradient, rtol=1e-4, atol=1e-4)


def test_the_loss_reads_the_adapted_weight_of_the_head():
    model = make_base()
    head = model.lm_head.weight.detach()
    add_lora(model, LoraConfig(r=4, target_modules=("lm_head",)))
    nn.init.normal_(updates_of(model)[0].lora_B, std=0.1)
    logits = model(IDS)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_close(model(IDS, IDS), loss)
    assert largest(logits - F.linear(model.model(IDS), head)) > 0.01


class Growing:
    """The smallest cache for latent attention."""

    def __init__(self):
        self.latents = torch.empty(2, 1, 0, 16)
        self.keys = torch.empty(2, 1, 0, 8)

    def update(self, k, v, layer_idx):
        self.latents = torch.cat([self.latents, k], 2)
        self.keys = torch.cat([self.keys, v], 2)
        return self.latents, self.keys


def test_latent_attention_decodes_with_the_adapted_weight():
    torch.manual_seed(0)
    sizes = dict(kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    latent = MLAttention(64, 4, **sizes)
    x = torch.randn(2, 6, 64)
    cos, sin = precompute_rope(8, 6)
    bare = latent(x, (cos, sin))
    add_lora(latent, LoraConfig(r=4, target_modules=("kv_b_proj",)))
    nn.init.normal_(updates_of(latent)[0].lora_B, std=0.5)
    whole = latent(x, (cos, sin))
    cache = Growing()
    pieces = []
    for t in range(6):
        rope = (cos[t : t + 1], sin[t : t + 1])
        with torch.no_grad():
            pieces.append(latent(x[:, t : t + 1], rope, cache=cache))
    assert_close(torch.cat(pieces, 1), whole)
    assert largest(whole - bare) > 0.01


def test_dropout_is_silent_in_evaluation_mode():
    model = make_base()
    add_lora(model, LoraConfig(r=4, lora_dropout=0.5))
    shake(model)
    assert model(IDS).equal(model(IDS))
    evaluated = model(IDS)
    assert largest(model.train()(IDS) - evaluated) > 1e-3


def test_a_base_that_is_not_frozen_is_lost():
    base = make_base()
    model = copy.deepcopy(base)
    add_lora(model, LoraConfig(r=4))
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, IDS).backward()
    optimizer.step()
    with disable_lora(model):
        assert largest(model(IDS) - base(IDS)) > 1e-3


# Merging


def test_merging_and_back(tmp_path):
    model = make_base()
    add_lora(model, LoraConfig(r=4))
    shake(model)
    logits = model(IDS).detach()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="call merge_lora first"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    merge_lora(model)
    assert_close(model(IDS), logits, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == list(make_base().state_dict())
    assert not any(isinstance(module, LoRA | LoRALinear) for module in model.modules())
    save_model(model, tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged")(IDS), logits, rtol=0, atol=1e-5)
    unmerge_lora(model)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_lora(model)


def test_bfloat16_weights_come_back_bit_for_bit():
    model = make_base().bfloat16()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, LoraConfig(r=4))
    shake(model)
    merge_lora(model)
    unmerge_lora(model)
    merge_lora(model)
    first = {name: p.clone() for name, p in model.named_parameters()}
    assert any(not first[name].equal(weights[name]) for name in weights)

    # A second adapter on the merged first one: only the last merge is undone.
    add_lora(model, LoraConfig(r=2, target_modules=("v_proj",)), "second")
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_lora(model)
    assert model(IDS).dtype == torch.bfloat16
    merge_lora(model)
    unmerge_lora(model)
    v_proj = model.model.layers[0].self_attn.v_proj
    original = v_proj.parametrizations.weight.original
    assert original.equal(first["model.layers.0.self_attn.v_proj.weight"])


# `peft`


def name_in_file(name: str) -> str:
    """Return the name in the file of a tensor inside peft."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def logits_and_gradients(model: nn.Module, logits_of) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(1)  # for dropout: both draw the same numbers in the same order
    model.train()
    (logits_of(model(IDS)) * torch.linspace(-1, 1, 35)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return logits_of(model.eval()(IDS)).detach(), gradients


def gradients_in_file(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the gradients of an adapter by the names of its tensors in the file."""
    copied = copy.deepcopy(model)
    pairs = zip(copied.parameters(), model.parameters(), strict=True)
    for p, original in pairs:
        if p.requires_grad:
            p.data = original.grad.clone()
    save_lora(copied, folder)
    return load_file(folder / TENSORS_FILE)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_reads_our_adapter_and_we_read_theirs(tmp_path, name):
    base = make_base()
    save_model(base, tmp_path / "base")
    ours = load_model(tmp_path / "base")
    add_lora(ours, LoraConfig(r=4, **VARIANTS[name]))
    shake(ours)
    save_lora(ours, tmp_path / "ours")
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(llama, tmp_path / "ours", is_trainable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    our_logits, _ = logits_and_gradients(ours, lambda output: output)
    their_logits, their_gradients = logits_and_gradients(theirs, lambda output: output.logits)
    moved = largest(our_logits - base(IDS))
    assert moved > 0.01
    assert largest(our_logits - their_logits) < min(1e-5, 1e-4 * moved)

    # The gradients, by the names in the file.
    gradients = gradients_in_file(ours, tmp_path / "gradients")
    their_gradients = {name_in_file(key): grad for key, grad in their_gradients.items()}
    assert gradients.keys() == their_gradients.keys()
    for key, grad in gradients.items():
        assert (grad - their_gradients[key]).norm() < 1e-4 * grad.norm()

    # Their adapter here, and both merged.
    again = load_model(tmp_path / "base")
    load_lora(again, tmp_path / "theirs")
    assert largest(our_logits - again(IDS)) < 1e-5
    merge_lora(again)
    merged = theirs.merge_and_unload()
    for parameter_name, p in again.named_parameters():
        assert largest(p - merged.get_parameter(parameter_name)) < 1e-5


def test_packed_experts_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=35,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        head_dim=8,
        num_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        num_hidden_layers=2,
    )
    moe = Qwen3MoeForCausalLM(config).eval()
    packed = ("experts.gate_up_proj", "mlp.experts.down_proj")
    ours = copy.deepcopy(moe)
    add_lora(ours, LoraConfig(r=2, target_modules=("q_proj",), target_parameters=packed))
    assert_close(ours(IDS).logits, moe(IDS).logits, rtol=0, atol=1e-6)
    shake(ours)
    save_lora(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(moe), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(moe)
    load_lora(again, tmp_path / "theirs")
    logits = ours(IDS).logits.detach()
    assert largest(logits - theirs(IDS).logits) < 1e-5
    assert largest(logits - again(IDS).logits) < 1e-5
    assert largest(logits - moe(IDS).logits) > 0.1
    merge_lora(ours)
    assert_close(ours(IDS).logits, logits, rtol=0, atol=1e-5)


def test_packed_experts_of_our_own():
    torch.manual_seed(0)
    experts = nn.Sequential(Experts(32, 16, 4))
    tokens = torch.randn(6, 32)
    chosen = torch.randint(0, 4, (6, 2))
    weights = torch.rand(6, 2)
    plain = experts[0](tokens, chosen, weights)
    both = ("gate_up_proj", "down_proj")
    add_lora(experts, LoraConfig(r=2, target_modules=(), target_parameters=both))
    assert_close(experts[0](tokens, chosen, weights), plain)
    shake(experts)
    adapted = experts[0](tokens, chosen, weights)
    adapted.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in experts.parameters() if p.requires_grad)
    by_hand = Experts(32, 16, 4)
    by_hand.gate_up_proj.data = experts[0].gate_up_proj.detach()
    by_hand.down_proj.data = experts[0].down_proj.detach()
    assert_close(by_hand(tokens, chosen, weights), adapted)


# Files that are refused


def change_config(folder: Path, **entries) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def truncate(folder: Path) -> None:
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:1000])


def write_half_a_config(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    save_file({key: x for key, x in tensors.items() if key != FIRST}, folder / TENSORS_FILE)


def add_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / TENSORS_FILE)
    save_file({**tensors, "more": torch.ones(3)}, folder / TENSORS_FILE)


def with_entries(**entries):
    return lambda folder: change_config(folder, **entries)


DAMAGES = {
    "holds no whole adapter": truncate,
    "holds no whole adapter (": write_half_a_config,
    f"missing [('{FIRST}'": drop_a_tensor,
    "extra [('more', 3)]": add_a_tensor,
    "{'rank_pattern': {'q_proj': 2}}": with_entries(rank_pattern={"q_proj": 2}),
    "{'bias': 'all'}": with_entries(bias="all"),
    "lora_alpha=0": with_entries(lora_alpha=0),
    "olora": with_entries(init_lora_weights="olora"),
    "vproj fits nothing": with_entries(target_modules=["vproj"]),
}


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("adapter")
    model = make_base()
    add_lora(model, LoraConfig(r=4))
    shake(model)
    save_lora(model, folder, base_model="cats")
    return folder, model(IDS).detach()


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_adapter_is_refused(tmp_path, good_adapter, message):
    broken = tmp_path / "broken"
    shutil.copytree(good_adapter[0], broken)
    DAMAGES[message](broken)
    model = make_base()
    with pytest.raises(ValueError) as error:
        load_lora(model, broken)
    assert message in str(error.value)
    assert not any(isinstance(module, LoRA) for module in model.modules())  # left as it was


def test_an_adapter_of_another_model_is_refused(good_adapter):
    folder, _ = good_adapter
    with pytest.raises(ValueError, match="not for this model: missing"):
        load_lora(make_base(replace(UNTIED, hidden_size=32)), folder)
    with pytest.raises(ValueError, match="base_model='dogs': "):
        load_lora(make_base(), folder, base_model="dogs")


@pytest.mark.parametrize("random_start", [True, False, "gaussian"])
def test_any_random_start_of_peft_will_do(tmp_path, good_adapter, random_start):
    """The numbers come from the file."""
    folder, logits = good_adapter
    shutil.copytree(folder, tmp_path / "copy")
    change_config(tmp_path / "copy", init_lora_weights=random_start)
    model = make_base()
    load_lora(model, tmp_path / "copy", base_model="cats")
    assert model(IDS).equal(logits)
