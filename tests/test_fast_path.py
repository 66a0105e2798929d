"""The fast path of a GPU: masks as rules, devices, compilation, gradient checkpointing."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import tinylm.engine as engine
from tinylm.attention import (
    FlexMask,
    attend,
    attend_at_once,
    attend_with_sinks,
    attention_mask,
    choose_attention,
)
from tinylm.basics import FieldError
from tinylm.engine import (
    EngineConfig,
    LocalEngine,
    choose_compile,
    choose_device,
    list_fallbacks,
    next_token_loss,
)
from tinylm.kv_cache import KVCache
from tinylm.model import ModelConfig, TinyLM

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2)
DOCUMENTS = torch.arange(150)[None] // torch.tensor([[40], [65]])
PADDING = torch.ones(2, 150, dtype=torch.long)
PADDING[0, :30] = 0
IDS = torch.randint(64, (2, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    """FlexAttention warns that it is slow on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("T", [150, 20])
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 64])
def test_a_rule_equals_the_dense_mask(T, K, padding, documents, window):
    q = torch.randn(2, 4, T, 16)
    k, v = torch.randn(2, 2, K, 150, 16)
    limits = (T, 150, window, documents, padding)
    rule = FlexMask(*limits)
    dense = attention_mask(*limits)
    expected = attend(q, k, v, dense)
    assert_close(attend(q, k, v, rule), expected, atol=2e-6, rtol=1e-5)
    assert_close(attend_at_once(q, k, v, rule), expected, atol=2e-6, rtol=1e-5)
    expected = attend(q, k, v, dense, scale=0.5)
    assert_close(attend(q, k, v, rule, scale=0.5), expected, atol=2e-6, rtol=1e-5)
    assert rule[..., -150:] is rule
    if dense is not None:
        assert torch.equal(rule[..., -9:], dense[..., -9:])


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "packed"])
def test_sinks_take_a_rule_too(documents):
    q = torch.randn(2, 4, 150, 16)
    k, v = torch.randn(2, 2, 2, 150, 16)
    limits = (150, 150, None, documents)
    expected = attend_with_sinks(q, k, v, torch.ones(4), attention_mask(*limits))
    assert_close(attend_with_sinks(q, k, v, torch.ones(4), FlexMask(*limits)), expected)


SAME = [
    {},
    {"sliding_window": 20},
    {"kv_lora_rank": 16},
    {"query_pre_attn_scalar": 100.0},
    {"attn_logit_softcapping": 0.5},
    {"attention_sinks": True},
    {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 20},
    {"layer_types": ("canon_attention", "full_attention")},
]


@pytest.mark.parametrize("config", SAME, ids=str)
def test_a_model_computes_the_same(config):
    model = TinyLM(ModelConfig(**SMALL, **config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or name.endswith("sinks"):
                weight.normal_(std=0.3)
        expected = model(IDS, document_ids=DOCUMENTS)
        model.model.attn_implementation = "flex_attention"
        assert_close(model(IDS, document_ids=DOCUMENTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gradients_on_a_gpu():
    model = TinyLM(ModelConfig(**{**SMALL, "hidden_size": 128}, sliding_window=50)).cuda().train()
    results = []
    for name in ("sdpa", "flex_attention"):
        model.model.attn_implementation = name
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(IDS.cuda(), labels=IDS.cuda(), document_ids=DOCUMENTS.cuda())
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).norm() < 0.02 * results[0].norm()


def test_the_choice(monkeypatch):
    half = torch.bfloat16
    assert choose_attention("auto", CPU, half, True, False) == "sdpa"
    monkeypatch.setattr("tinylm.attention.has_flex_kernel", lambda device: device.type == "cuda")
    assert choose_attention("auto", CUDA, half, True, True) == "flex_attention"
    assert choose_attention("sdpa", CUDA, half, True, True) == "sdpa"
    assert choose_attention("auto", CUDA, half, False, True) == "sdpa"
    assert choose_attention("auto", CUDA, torch.float32, True, True) == "sdpa"
    assert choose_attention("auto", CUDA, half, True, True, dropout=0.1) == "sdpa"
    assert choose_attention("flex_attention", MPS, half, True, True) == "sdpa"


def test_shared_heads_are_copied_on_a_gpu(monkeypatch):
    heads = []

    def sdpa(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa):
        heads.append((k.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            q = torch.empty(1, 4, 3, 8, device=device)
            k = torch.empty(1, 2, 3, 8, device=device)
            attend(q, k, k, torch.ones(3, 3, dtype=torch.bool, device=device))
    assert heads == [(2, True), (4, False)]


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "router_aux_loss_coef": 0.1}], ids=str)
def test_gradient_checkpointing_changes_nothing(experts):
    results = []
    for doubles in (False, True):
        torch.manual_seed(0)
        model = TinyLM(ModelConfig(**SMALL, **experts)).train()
        config = EngineConfig(gradient_checkpointing=doubles, device="cpu", precision="fp32")
        local = LocalEngine(model, next_token_loss(model), config)
        loss = local.backward({"input_ids": IDS, "labels": IDS, "document_ids": DOCUMENTS})
        loads = [module.load for module in model.modules() if hasattr(module, "load")]
        results.append((loss, [p.grad for p in model.parameters()], loads))
    assert_close(results[0], results[1], rtol=0, atol=0)

    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing and cache are both given"):
        model(IDS, cache=KVCache(model.config, 2, 200))


def test_devices(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(
            FieldError, match=f"device='{name}': PyTorch sees no GPU here; give cpu or auto"
        ):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == MPS
    config = EngineConfig()
    assert not choose_compile(config, MPS)
    lines = list_fallbacks(config, ModelConfig(num_experts=2))
    assert len(lines) == 2 and all(line.startswith("mps: ") for line in lines)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto") == CPU
    with pytest.raises(FieldError, match="one process only"):
        choose_device("mps")


def test_compilation(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    config = EngineConfig()
    assert choose_compile(config, CUDA) and not choose_compile(config, CPU)
    assert not choose_compile(EngineConfig(compile=False), CUDA)
    doubled = EngineConfig(gradient_checkpointing=True)
    assert choose_compile(doubled, CUDA) and not choose_compile(doubled, CUDA, has_experts=True)
    both = EngineConfig(gradient_checkpointing=True, compile=True)
    with pytest.raises(FieldError, match="gradient_checkpointing=True: a model with experts"):
        choose_compile(both, CUDA, has_experts=True)
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert not choose_compile(config, CUDA)
    with pytest.raises(FieldError, match="compile=True: torch.compile needs"):
        choose_compile(EngineConfig(compile=True), CUDA)


def test_what_is_absent_is_refused():
    model = TinyLM(ModelConfig(**SMALL))
    config = EngineConfig(attn_implementation="flex_attention", device="cpu")
    with pytest.raises(FieldError, match="attn_implementation='flex_attention': it needs a recent"):
        LocalEngine(model, next_token_loss(model), config)
    with pytest.raises(FieldError, match="precision='fp16': give one of .*loss scaling"):
        EngineConfig(precision="fp16")
    with pytest.raises(FieldError, match="attn_implementation='flash': give one of"):
        EngineConfig(attn_implementation="flash")
