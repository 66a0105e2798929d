"""Quantized and packed weights: every kind of layer, files, commands, training is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import load_model, save_model
from tinylm.cli import main
from tinylm.decoding import speculative_generate
from tinylm.engine import Engine, EngineConfig, LocalEngine, next_token_loss
from tinylm.generate import SamplingConfig, generate
from tinylm.hub import load
from tinylm.lora import LoraConfig, add_lora
from tinylm.model import Block, ModelConfig, TinyLM
from tinylm.quantize import (
    SCHEMES,
    DecodingLinear,
    FusedAttention,
    FusedSwiGLU,
    QuantizedLinear,
    Scheme,
    choose_grid,
    dequantize,
    lay_out,
    load_quantized,
    pack_nibbles,
    prepare_decoding,
    quantize_gptq,
    quantize_model,
    quantize_weight,
    round_weight,
    save_quantized,
    stored_scheme,
    unpack_nibbles,
)
from tinylm.sft import SFTConfig, sft

STORIES = Path(__file__).resolve().parent.parent / "nbs" / "models" / "stories"
SIZES = ModelConfig(
    vocab_size=99,  # no multiple of 16
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
SHAPES = {
    "tied": SIZES,
    "untied": replace(SIZES, tie_word_embeddings=False, qk_norm=False),
    "wide norm": replace(SIZES, qk_norm_full=True),
    "biases": replace(SIZES, attention_bias=True, attention_out_bias=False),
    "gpt2": replace(
        SIZES,
        hidden_act="gelu_new",
        layer_norm=True,
        learned_positions=True,
        num_key_value_heads=4,
        attention_bias=True,
        qk_norm=False,
    ),
    "window": replace(SIZES, sliding_window=5),
    "experts": replace(SIZES, num_experts=4, moe_intermediate_size=32, n_shared_experts=1),
    "clamped experts": replace(
        SIZES,
        num_experts=4,
        moe_intermediate_size=32,
        router_bias=True,
        swiglu_limit=1.0,
        attention_sinks=True,
    ),
    "gemma": replace(
        SIZES,
        hidden_act="gelu_pytorch_tanh",
        norm_unit_offset=True,
        norm_placement="both",
        query_pre_attn_scalar=5.0,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        embedding_multiplier=8.0,
    ),
    "canon": replace(SIZES, layer_types=("canon_attention",) * 2, conv_L_cache=4),
    "conv": replace(SIZES, layer_types=("conv", "full_attention")),
    "latent": replace(
        SIZES, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    ),
}
GREEDY = SamplingConfig(12, temperature=0)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 5]]


class OwnBlock(Block):
    """A block of one's own: no part of it is fused."""

    def make_mlp(self, config: ModelConfig) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def make_model(config: ModelConfig, block: type[Block] = Block) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(config, block).eval()


def logits(model: TinyLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[0]]))


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_weights_write_the_same_texts(shape):
    model = make_model(SHAPES[shape])
    texts = generate(model, PROMPTS, GREEDY)
    wanted = logits(model)
    prepare_decoding(model)
    assert generate(model, PROMPTS, GREEDY) == texts
    assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, DecodingLinear) for m in model.modules())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_layer_is_quantized(shape, name, tmp_path):
    model = make_model(SHAPES[shape])
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith("bias"):  # zeros would hide that one is lost
                weight.normal_()

    # The rounded weights put into the plain model are what the quantized one must compute.
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for path, weight in rounded.named_parameters():
            is_expert = path.endswith(("gate_up_proj", "down_proj"))
            is_linear = isinstance(rounded.get_submodule(path.rpartition(".")[0]), nn.Linear)
            if is_expert:
                for matrix in weight:
                    matrix.copy_(quantize_weight(matrix, SCHEMES[name]).weight)
            elif (is_linear and "kv_b_proj" not in path and weight.ndim == 2) or (
                path == "model.embed_tokens.weight" and model.config.tie_word_embeddings
            ):
                weight.copy_(quantize_weight(weight, SCHEMES[name]).weight)
    quantize_model(model, name)
    wanted = logits(rounded)
    assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)

    # A file, opened.
    save_quantized(model, tmp_path)
    assert stored_scheme(tmp_path) == name
    opened = load_quantized(tmp_path)
    assert torch.equal(logits(opened), logits(model))
    assert not any(tensor.is_meta for tensor in opened.state_dict().values())

    # Fast products have bfloat16 inputs.
    prepare_decoding(opened)
    difference = (logits(opened) - wanted).norm() / wanted.norm()
    # A rounded input can send a token to another expert, so with experts the bound is wide.
    assert difference < (0.3 if "experts" in shape else 0.03)
    assert len(generate(opened, PROMPTS, GREEDY)[0]) == 12


@pytest.mark.parametrize("name", SCHEMES)
def test_writing_never_computes_a_whole_weight(name, monkeypatch):
    """A whole table for each token would take longer than all the rest."""

    def refuse(self):
        raise AssertionError("a whole weight")

    model = make_model(SIZES)
    quantize_model(model, name)
    prepare_decoding(model)
    monkeypatch.setattr(QuantizedLinear, "weight", property(refuse))
    assert len(generate(model, PROMPTS, GREEDY)[0]) == 12


def test_the_right_parts_are_fused():
    model = make_model(SIZES)
    prepare_decoding(model)
    assert isinstance(model.model.layers[0].self_attn, FusedAttention)
    assert isinstance(model.model.layers[0].mlp, FusedSwiGLU)
    own = make_model(SIZES, OwnBlock)
    texts = generate(own, PROMPTS, GREEDY)
    prepare_decoding(own)
    assert isinstance(own.model.layers[0].mlp[0], DecodingLinear)
    assert generate(own, PROMPTS, GREEDY) == texts


def test_the_weights_stay_readable_and_frozen():
    model = make_model(SIZES)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        loss = model(ids, labels=ids)
        prepare_decoding(model)
        assert_close(model(ids, labels=ids), loss)
    quantized = make_model(SIZES)
    quantize_model(quantized, "int8")
    assert not any(weight.requires_grad for weight in quantized.parameters())


def test_speculative_decoding_with_a_quantized_draft():
    model = make_model(SIZES)
    draft = copy.deepcopy(model)
    quantize_model(draft, "int4")
    prepare_decoding(draft)
    texts = generate(model, [PROMPTS[0]], GREEDY)[0]
    assert speculative_generate(model, draft, PROMPTS[0], GREEDY) == texts


def test_nibbles_and_grids():
    integers = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(integers)), integers)
    weight = torch.randn(5, 64)
    for scheme in (Scheme(8), Scheme(4, 32), Scheme(3, 16), Scheme(2)):
        grid = choose_grid(weight, scheme)
        error = (dequantize(round_weight(weight, grid, scheme.bits), grid) - weight).abs()
        groups = error.unflatten(1, (grid.scales.shape[1], -1))
        assert (groups <= 0.6 * grid.scales.float()[..., None]).all()
    zeros = quantize_weight(torch.zeros(4, 32), SCHEMES["int8"])
    assert torch.equal(zeros.weight, torch.zeros(4, 32))


def test_rows_that_do_not_fit_keep_the_plain_product():
    # _weight_int8pack_mm would read beyond the end of rows that are no multiple of 16.
    assert lay_out(quantize_weight(torch.randn(40, 36), SCHEMES["int8"])) is None
    assert lay_out(quantize_weight(torch.randn(40, 48), Scheme(4, 16))) is None
    assert lay_out(nn.Linear(8, 8).bfloat16()) is None
    model = make_model(replace(SIZES, hidden_size=36, head_dim=16))
    quantize_model(model, "int8")
    wanted = logits(model)
    prepare_decoding(model)
    assert isinstance(model.lm_head, QuantizedLinear)
    difference = (logits(model) - wanted).norm() / wanted.norm()
    assert difference < 0.02


def test_gptq_does_less_damage():
    model = load_model(STORIES)
    texts = generate(model, [[0]] * 24, SamplingConfig(48, seed=3))
    ids = torch.tensor([[0, *row] for row in texts if len(row) == 48])
    damage = {}
    with torch.no_grad():
        log_p = model(ids[:6]).log_softmax(-1)
        for name in ("nearest", "gptq"):
            other = copy.deepcopy(model)
            if name == "gptq":
                quantize_gptq(other, "int4", [ids[6:]])
            else:
                quantize_model(other, "int4")
            kl = log_p.exp() * (log_p - other(ids[:6]).log_softmax(-1))
            damage[name] = kl.sum(-1).mean().item()
    assert 0 < damage["gptq"] < damage["nearest"]


# Bad input


def test_bad_input(tmp_path):
    model = make_model(SIZES)
    with pytest.raises(ValueError, match="quantize='int2': use one of int8, int4"):
        quantize_model(model, "int2")
    narrow = make_model(replace(SIZES, intermediate_size=80))
    with pytest.raises(ValueError, match="down_proj has 80 inputs, which groups of 32 do not"):
        quantize_model(narrow, "int4")
    assert type(narrow.lm_head) is nn.Linear, "nothing is replaced before all is checked"
    with pytest.raises(ValueError, match="call quantize_model"):
        save_quantized(model, tmp_path / "no")

    # Adapters must be merged first.
    adapted = make_model(SIZES)
    add_lora(adapted, LoraConfig(r=2))
    for change in (prepare_decoding, lambda model: quantize_model(model, "int8")):
        with pytest.raises(ValueError, match="model has adapters: call merge_lora first"):
            change(adapted)

    # Quantized once.
    quantize_model(model, "int8")
    with pytest.raises(ValueError, match="quantized or laid out already"):
        quantize_model(model, "int8")
    save_quantized(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["quantization_config"]["bits"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="this opens int8, int4"):
        load_quantized(tmp_path)
    save_model(make_model(SIZES), tmp_path / "plain")
    with pytest.raises(ValueError, match="is not quantized: open it with load_model"):
        load_quantized(tmp_path / "plain")


def test_a_quantized_model_is_not_trained(tmp_path):
    model, tokenizer = load(STORIES)
    quantize_model(model, "int8")
    save_quantized(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing to train: .* a quantized model has none"):
        LocalEngine(model, next_token_loss(model), EngineConfig(device="cpu"))
    message = "is quantized, and cannot be trained or converted: give the model that it was made"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        sft(SFTConfig(run=str(tmp_path), out=str(tmp_path / "out")))


@pytest.mark.parametrize("change", ["int8", "int4", "packed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_optimizer_takes_it(change, optimizer):
    model = make_model(SIZES)
    if change == "packed":
        prepare_decoding(model)
    else:
        quantize_model(model, change)
    message = "model has nothing to train: give one with weights that can change"
    with pytest.raises(ValueError, match=message):
        Engine(model, next_token_loss(model), EngineConfig(optimizer=optimizer, device="cpu"))


@pytest.mark.parametrize("name", ["", *SCHEMES])
def test_layers_of_the_default_recipe(name):
    """A short convolution before attention, and values of the first layer."""
    config = replace(SIZES, layer_types=("canon_attention",) * 2, value_residual=True)
    model = make_model(config)
    if name:
        quantize_model(model, name)
    wanted = logits(model)
    texts = generate(model, PROMPTS, GREEDY)
    prepare_decoding(model)
    difference = (logits(model) - wanted).norm() / wanted.norm()
    assert difference < (0.03 if name else 1e-4)
    assert name or generate(model, PROMPTS, GREEDY) == texts


# The commands


def run(words: str, capsys) -> tuple[int, str, str]:
    code = main(words.split())
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_commands(tmp_path, capsys):
    prompt = "--max-new-tokens 16 --temperature 0 --prompt One"
    plain = f"generate --run {STORIES} {prompt}"
    code, text, _ = run(plain, capsys)
    model, tokenizer = load(STORIES)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("One")]
    new = generate(model, [ids], SamplingConfig(16, temperature=0), tokenizer.eos_token_id)[0]
    assert (code, text.strip()) == (0, "One" + tokenizer.decode(new, skip_special_tokens=True))

    # A folder with rounded weights writes what --quantize writes.
    for name in SCHEMES:
        folder = tmp_path / name
        assert run(f"export --run {STORIES} --out {folder} --quantize {name}", capsys)[0] == 0
        code, stored, _ = run(f"generate --run {folder} {prompt}", capsys)
        assert code == 0
        assert stored == run(f"{plain} --quantize {name}", capsys)[1]
        assert isinstance(Tokenizer.from_pretrained(folder), Tokenizer)
    assert run(f"info --run {tmp_path / 'int8'}", capsys)[0] == 0

    # One line for each mistake.
    int8 = tmp_path / "int8"
    for words, message in (
        (f"{plain} --quantize int5", "quantize='int5': use one of int8, int4"),
        (f"sft --run {int8} --out {tmp_path / 'x'}", "is quantized, and cannot be trained"),
        (f"dpo --run {int8} --out {tmp_path / 'x'}", "is quantized, and cannot be trained"),
        (f"generate --run {int8} {prompt} --quantize int4", "is stored as int8 already"),
        (f"export --run {int8} --out {tmp_path / 'x'}", "is stored as int8; copy the folder"),
        (f"sft --run {int8} --out {tmp_path / 'y'}", "is quantized, and cannot be trained"),
        (f"dpo --run {int8} --out {tmp_path / 'y'}", "is quantized, and cannot be trained"),
        (f"export --run {STORIES} --out {int8} --quantize int8", "is not empty"),
    ):
        code, _, error = run(words, capsys)
        assert code == 2 and message in error, error


@pytest.mark.parametrize("name", ["", "int4"])
def test_chat_reads_a_quantized_model(name, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Where is Emma?\n"))
    flags = f" --quantize {name}" if name else ""
    code, text, _ = run(f"chat --run {STORIES} --max-new-tokens 4{flags}", capsys)
    assert code == 0 and "> Where is Emma?" in text


def test_evaluate_reads_a_quantized_model(tmp_path, capsys):
    data = "--data.stories 60 --data.validation-stories 16 --data.seq-len 128 --stories 2"
    losses = []
    for flags in ("", " --quantize int8"):
        out = tmp_path / f"report{len(losses)}"
        assert run(f"evaluate {STORIES} {data} --out {out}{flags}", capsys)[0] == 0
        (report,) = json.loads((out / "report.json").read_text("utf-8")).values()
        losses.append(report["loss"])
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.02
