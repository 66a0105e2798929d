"""Experts: number types, gradients, masks, losses in parts, and settings that are refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tinylm.basics import FieldError
from tinylm.feedforward import SwiGLU
from tinylm.moe import (
    ClampedExperts,
    Experts,
    MoE,
    Router,
    Routing,
    best_groups,
    grouped_linear,
    load_balancing_loss,
    moe_losses,
    router_z_loss,
    update_router_biases,
)

D, WIDTH, E, K = 16, 16, 8, 2
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
EVERYONE = torch.ones_like(MASK)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw numbers that are the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_layer(**settings: object) -> MoE:
    """Make a layer whose weights are the same in every run."""
    torch.manual_seed(0)
    return MoE(Router(D, E, **settings), WIDTH)


# The router


def naive_router(x, weight, bias, settings):
    """Choose as DeepSeek-V3's equations 12 to 16 say, for one token."""
    scores = 1 / (1 + (-weight @ x).exp())
    popular = (scores + bias).tolist()
    size = E // settings["n_group"]
    groups = [range(start, start + size) for start in range(0, E, size)]
    groups.sort(key=lambda group: -sum(sorted(popular[e] for e in group)[-2:]))
    candidates = [e for group in groups[: settings["topk_group"]] for e in group]
    experts = sorted(candidates, key=lambda e: -popular[e])[:K]
    weights = torch.stack([scores[e] for e in experts])  # without the bias
    return experts, settings["routed_scaling_factor"] * weights / weights.sum()


def test_groups_and_bias_choose_as_the_equations():
    """The router of DeepSeek-V3, token by token."""
    settings = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    router = Router(D, E, K, scoring_func="sigmoid", **settings).double().requires_grad_(False)
    router.weight.copy_(randn(E, D, dtype=torch.float64) / D**0.5)
    router.e_score_correction_bias.copy_(0.3 * randn(E, seed=1, dtype=torch.float64))
    for x in randn(200, D, seed=2, dtype=torch.float64):
        routing = router(x)
        experts, weights = naive_router(x, router.weight, router.e_score_correction_bias, settings)
        assert routing.experts.tolist() == experts
        assert_close(routing.weights, weights)

    popular = torch.tensor([0.9, 0.0, 0.5, 0.6, 0.7, 0.3])
    closed = -torch.inf
    assert_close(best_groups(popular, 6, 2), torch.tensor([0.9, *[closed] * 3, 0.7, closed]))


def test_noise_is_for_training():
    """What the router sees is disturbed in training only."""
    x = randn(20, D)
    noisy = Router(D, E, router_jitter_noise=0.2)
    assert not torch.equal(noisy(x).logits, noisy(x).logits)
    assert torch.equal(noisy.eval()(x).logits, F.linear(x, noisy.weight))


def test_a_bias_is_saved_where_models_have_one():
    """Mixtral's checkpoints have none."""
    assert set(Router(D, E).state_dict()) == {"weight"}
    with_bias = set(Router(D, E, scoring_func="sigmoid").state_dict())
    assert with_bias == {"weight", "e_score_correction_bias"}


REFUSED = {
    "num_experts_per_tok": 9,
    "n_group": 3,
    "topk_group": 2,
    "router_jitter_noise": 1.0,
    "bias_update_speed": -1,
    "scoring_func": "relu",
    "routed_scaling_factor": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_a_meaning_is_refused(name):
    """The message names the field."""
    with pytest.raises(FieldError, match=f"{name}={REFUSED[name]!r}: "):
        Router(D, E, **{name: REFUSED[name]})


def test_experts_out_of_reach_are_refused():
    """A token can choose from its groups only."""
    with pytest.raises(FieldError, match="use 1 to 2, the experts that a token can choose from"):
        Router(D, E, 3, n_group=4)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_router_learns_from_the_task(scoring_func):
    """Its gradient is there for every k, but not where a single weight is always 1."""
    x = randn(2, 6, D)

    def gradient(k, norm):
        layer = make_layer(num_experts_per_tok=k, norm_topk_prob=norm, scoring_func=scoring_func)
        (layer(x) - x).square().mean().backward()
        return layer.gate.weight.grad.abs().max().item()

    assert all(gradient(k, k > 1) > 1e-5 and gradient(k, False) > 1e-5 for k in range(1, E + 1))
    assert gradient(1, True) < 1e-8


# The experts

CASES = [
    (torch.float32, 16, 1e-5),
    (torch.bfloat16, 16, 2e-2),
    (torch.float32, 3, 1e-5),
    (torch.float64, 16, 1e-12),
]


@pytest.mark.parametrize(("dtype", "width", "tolerance"), CASES)
def test_grouped_products(dtype, width, tolerance):
    """They equal the definition, values and gradients, also where groups are empty."""
    stops = torch.tensor([3, 3, 10, 12, 12], dtype=torch.int32)
    group = torch.searchsorted(stops, torch.arange(12), right=True)
    x = randn(12, width).to(dtype).requires_grad_()
    weights = randn(5, 8, width, seed=1).to(dtype).requires_grad_()
    direction = randn(12, 8, seed=2).to(dtype)
    naive = torch.stack([weights[e] @ row for row, e in zip(x, group, strict=True)])
    fast = grouped_linear(x, weights, stops)
    close = {"rtol": tolerance, "atol": tolerance}
    assert_close(fast, naive, **close)
    gradients = [torch.autograd.grad(y, (x, weights), direction) for y in (fast, naive)]
    assert_close(*gradients, **close)


def naive_experts(module, x, experts, weights):
    """Go through one token and one expert after another."""
    outputs = []
    for vector, chosen, shares in zip(x, experts.tolist(), weights, strict=True):
        total = 0.0
        for e, share in zip(chosen, shares, strict=True):
            gate, up = (module.gate_up_proj[e] @ vector).chunk(2)
            total = total + share * (module.down_proj[e] @ (F.silu(gate) * up))
        outputs.append(total)
    return torch.stack(outputs)


def test_experts_equal_the_loop():
    """Values, and the gradient of everything that has one, in double precision."""
    torch.manual_seed(0)
    module = Experts(D, WIDTH, E).double()
    x = randn(50, D, dtype=torch.float64).requires_grad_()
    routing = Router(D, E, 3).double()(x.detach())
    weights = routing.weights.detach().requires_grad_()
    inputs = [x, weights, *module.parameters()]
    fast = module(x, routing.experts, weights)
    slow = naive_experts(module, x, routing.experts, weights)
    assert_close(fast, slow, rtol=0, atol=1e-12)
    direction = randn(50, D, seed=1, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, inputs, direction) for y in (fast, slow)]
    assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"),
    [(torch.float32, False, 1e-6), (torch.bfloat16, False, 1e-2), (torch.float32, True, 1e-2)],
)
def test_experts_in_lower_precision(dtype, autocast, bound):
    """Each type is as near to the exact answer as its precision allows."""
    torch.manual_seed(0)
    module = Experts(D, WIDTH, E)
    x = randn(200, D)
    routing = Router(D, E)(x)
    exact = module.double()(x.double(), routing.experts, routing.weights.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module.to(dtype)(x.to(dtype), routing.experts, routing.weights.to(dtype))
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    assert (y.double() - exact).norm() / exact.norm() < bound


def group_sizes(monkeypatch, module: Experts, x, routing) -> list[set[int]]:
    """Note the sizes of the groups in each product of a pass."""
    sizes = []

    def noting(rows, matrices, stops):
        sizes.append(set(stops.diff(prepend=stops.new_zeros(1)).tolist()))
        return grouped_linear(rows, matrices, stops)

    monkeypatch.setattr("tinylm.moe.grouped_linear", noting)
    module(x, routing.experts, routing.weights.to(x.dtype))
    monkeypatch.undo()
    return sizes


def test_groups_in_bfloat16_have_few_sizes(monkeypatch):
    """On a CPU a product in bfloat16 is compiled for each new size; in float32 it is not."""
    torch.manual_seed(0)
    module = Experts(D, WIDTH, E)
    x = randn(600, D)
    routing = Router(D, E)(x)
    plain = group_sizes(monkeypatch, module, x, routing)
    rounded = group_sizes(monkeypatch, module.bfloat16(), x.bfloat16(), routing)
    assert any(size % 16 for size in plain[0])
    assert all(size % 16 == 0 for sizes in rounded for size in sizes)

    # A few tokens would wait for many more, so they are left alone.
    few = group_sizes(monkeypatch, module, x[:9].bfloat16(), Router(D, E)(x[:9]))
    assert sum(few[0]) <= 9 * K and any(size % 16 for size in few[0])


@pytest.mark.parametrize("kind", [Experts, partial(ClampedExperts, limit=7.0)])
def test_pairs_that_fill_up_change_nothing(kind, monkeypatch):
    """Values and gradients are as near to the exact ones as without them."""
    torch.manual_seed(0)
    module = kind(D, WIDTH, E)
    x = randn(600, D).requires_grad_()
    routing = Router(D, E)(x.detach())
    weights = routing.weights.detach().requires_grad_()
    inputs = [x, weights, *module.parameters()]
    direction = randn(600, D, seed=1)

    def pass_through(autocast: bool) -> list[torch.Tensor]:
        """Compute outputs and gradients."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x, routing.experts, weights).float()
        return [y, *torch.autograd.grad(y, inputs, direction)]

    exact = pass_through(autocast=False)
    filled = pass_through(autocast=True)
    monkeypatch.setattr("tinylm.moe._pairs_to_add", lambda experts, *others: experts[:0])
    bare = pass_through(autocast=True)
    for right, with_them, without in zip(exact, filled, bare, strict=True):
        error = (with_them - right).norm() / right.norm()
        assert error < 0.02
        assert error < 1.2 * (without - right).norm() / right.norm()


def test_tokens_are_on_their_own():
    """A change of one vector changes its answer only; padding gets its answer too."""
    layer = make_layer()
    x = randn(2, 6, D)
    edited = x.clone()
    edited[:, 3] += 1.0
    changed = ((layer(edited) - layer(x)).abs() > 1e-6).any(-1).any(0)
    assert changed.tolist() == [False, False, False, True, False, False]
    assert torch.equal(layer(x, MASK), layer(x))
    with pytest.raises(ValueError, match=r"token_mask is \(2, 5\)"):
        layer(x, MASK[:, :5])


def test_idle_experts_have_a_gradient_of_zeros():
    """One token reaches two experts; the others get zeros, not nothing."""
    layer = make_layer()
    y = layer(randn(1, 1, D))
    gradients = torch.autograd.grad(y.sum(), tuple(layer.experts.parameters()))
    assert [int(gradient.flatten(1).any(1).sum()) for gradient in gradients] == [2, 2]


# The losses


def naive_losses(routing, mask):
    """Compute both losses token by token."""
    places = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    total = 0.0
    for e in range(E):
        count = sum((routing.experts[b, t] == e).sum() for b, t in places)
        score = sum(routing.scores[b, t, e] / routing.scores[b, t].sum() for b, t in places)
        total += E * count * score / len(places) ** 2
    squares = [torch.log(routing.logits[b, t].exp().sum()) ** 2 for b, t in places]
    return total, sum(squares) / len(places)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_losses_equal_the_loop(scoring_func):
    """With and without padding, over the batch and over sequences."""
    torch.manual_seed(0)
    routing = Router(D, E, scoring_func=scoring_func)(randn(2, 6, D))
    for mask in (MASK, EVERYONE):
        balance, z = naive_losses(routing, mask)
        assert_close(load_balancing_loss(routing, mask), balance)
        assert_close(router_z_loss(routing, mask), z)

    rows = [Routing(*(part[b : b + 1] for part in routing)) for b in (0, 1)]
    first, second = [load_balancing_loss(row, MASK[b : b + 1]) for b, row in enumerate(rows)]
    weighted = (6 * first + 4 * second) / 10  # sequences count by their tokens
    assert_close(load_balancing_loss(routing, MASK, per_sequence=True), weighted)


def test_losses_of_transformers():
    """One layer is the same; of several layers, `transformers` pools the tokens."""
    torch.manual_seed(0)
    routing = Router(D, E)(randn(2, 6, D))
    flat = (routing.logits.flatten(0, 1),)
    theirs = load_balancing_loss_func(flat, E, K, MASK.long())
    assert_close(load_balancing_loss(routing, MASK), theirs)

    # Two layers, each of which sends everything to one expert: pooled, it looks balanced.
    logits = [torch.full((10, 2), -20.0) for _ in range(2)]
    logits[0][:, 0] = 20.0
    logits[1][:, 1] = 20.0
    each = []
    for z in logits:
        collapsed = Routing(z[None], z[None].softmax(-1), z[None].topk(1).indices, torch.ones(1))
        each.append(load_balancing_loss(collapsed, torch.ones(1, 10)).item())
    assert each == [2.0, 2.0]
    assert load_balancing_loss_func(tuple(logits), 2, 1).item() == 1.0


def test_losses_of_a_stack_are_added_and_forgotten():
    """Each layer counts once, and only in training."""
    torch.manual_seed(0)
    layers = [MoE(Router(D, E), WIDTH) for _ in range(3)]
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    stack = nn.Sequential(SwiGLU(D, WIDTH), *layers)
    x = randn(2, 6, D)
    stack(x)
    expected = 0.0
    for layer in layers:
        expected += 0.1 * load_balancing_loss(*layer.last) + 0.01 * router_z_loss(*layer.last)
    assert_close(moe_losses(stack, 0.1, 0.01), expected)
    assert moe_losses(stack, 0.1) == 0.0
    stack.eval()(x)
    assert moe_losses(stack.train(), 0.1) == 0.0

    # Alike layers: divided by their number, the coefficient means what it does in transformers.
    for layer in layers:
        layer(x)
    logits = tuple(layer.last[0].logits.flatten(0, 1) for layer in layers)
    theirs = load_balancing_loss_func(logits, E, K)
    assert_close(moe_losses(nn.Sequential(*layers), 0.1 / 3), 0.1 * theirs)


def task_and_balance(layer, x):
    """Compute a loss as a training would."""
    return layer(x).float().square().mean() + moe_losses(layer, 0.1, 0.01)


@pytest.mark.parametrize(("dtype", "whole"), [(torch.bfloat16, True), (torch.float32, False)])
def test_compiled(dtype, whole):
    """One graph in bfloat16; in float32 the loop is outside. The results are the same."""
    layer = make_layer().to(dtype)
    compiled = torch.compile(task_and_balance, backend="aot_eager", fullgraph=whole)
    values = []
    loads = []
    for function in (task_and_balance, compiled):
        value = function(layer, randn(2, 6, D).to(dtype))
        values.append((value, *torch.autograd.grad(value, layer.gate.weight)))
        loads.append(layer.load.clone())
    assert_close(values[0], values[1])
    assert loads[1].tolist() == (2 * loads[0]).tolist()


def gradients(layer, parts, scale=1.0, **options):
    """Compute those of the mean over all tokens, from micro-batches that are added up."""
    layer.zero_grad()
    total = sum(mask.sum() for _, mask in parts)
    for x, mask in parts:
        task = ((layer(x, mask) - x).square().mean(-1) * mask).sum()
        extra = mask.sum() * moe_losses(layer, 0.1, 0.01, **options)
        (scale * (task + extra) / total).backward()
    return [weight.grad / scale for weight in layer.parameters()]


def test_scale_padding_and_parts_do_not_matter():
    """Only the balance over a batch depends on how the batch is cut."""
    layer = make_layer()
    x = randn(2, 6, D)
    plain = gradients(layer, [(x, MASK)])
    scaled = gradients(layer, [(x, MASK)], scale=1024.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
    other_padding = torch.where(MASK[..., None], x, 100.0)
    assert_close(plain, gradients(layer, [(other_padding, MASK)]))
    unmasked = gradients(layer, [(other_padding, EVERYONE)])
    assert not torch.allclose(plain[0], unmasked[0], atol=1e-3)

    rows = [(x[b : b + 1], MASK[b : b + 1]) for b in (0, 1)]
    whole = gradients(layer, [(x, MASK)], per_sequence=True)
    assert_close(whole, gradients(layer, rows, per_sequence=True))
    halves = gradients(layer, rows)
    assert max((a - b).abs().max() for a, b in zip(plain, halves, strict=True)) > 1e-4


def test_biases_follow_the_load():
    """Busy experts get less popular; the load counts tokens in training, not padding."""
    layer = MoE(Router(D, 4, bias_update_speed=0.01), WIDTH)
    layer.load += torch.tensor([5, 1, 3, 3])
    update_router_biases(layer)
    assert_close(layer.gate.e_score_correction_bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
    assert layer.load.tolist() == [0] * 4

    x = randn(2, 6, D)
    layer(x[:, :3], MASK[:, :3])
    layer(x[:, 3:], MASK[:, 3:])  # two micro-batches of one step: 10 words, 2 paddings
    assert layer.load.sum().item() == 10 * 2
    layer.eval()(x)
    assert layer.load.sum().item() == 10 * 2
    assert layer.last is None


SIZES = {
    "hidden_size": D,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 3,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "n_shared_experts": 2,
}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
PUBLISHED = {  # their block, the settings of our router, shared experts
    "Mixtral": (lambda: MixtralSparseMoeBlock(MixtralConfig(**SIZES)), {}, 0),
    "OLMoE": (lambda: OlmoeSparseMoeBlock(OlmoeConfig(**SIZES)), {"norm_topk_prob": False}, 0),
    "Qwen3-MoE": (
        lambda: Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**SIZES, norm_topk_prob=True)),
        {},
        0,
    ),
    "DeepSeek-V3": (
        lambda: DeepseekV3MoE(DeepseekV3Config(**SIZES, **GROUPS)),
        {"scoring_func": "sigmoid", **GROUPS},
        2,
    ),
}


def draw(module: nn.Module) -> nn.Module:
    """Draw all weights, also biases."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.double().state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layer_is_that_of_published_models(name):
    """Weights go by name; outputs and gradients are equal up to the router's float32."""
    make_theirs, settings, shared = PUBLISHED[name]
    theirs = draw(make_theirs())
    ours = MoE(Router(D, E, 3, **settings), 24, shared).double()
    ours.load_state_dict(theirs.state_dict())
    x, direction = randn(2, 2, 40, D, dtype=torch.float64)

    # Outputs and gradients.
    pairs = [(ours(x), theirs(x))]
    for y in pairs[0]:
        (y * direction).sum().backward()
    for parameter_name, parameter in ours.named_parameters():
        pairs.append((parameter.grad, theirs.get_parameter(parameter_name).grad))
    for a, b in pairs:
        assert_close(a, b, rtol=0, atol=1e-5)

    # The experts alone.
    flat = x.flatten(0, 1)
    _, weights, experts = theirs.gate(flat)
    our_experts = ours.experts(flat, experts, weights)
    assert_close(our_experts, theirs.experts(flat, experts, weights), rtol=0, atol=1e-12)


def test_the_layer_of_gpt_oss():
    """Their matrices are transposed, and the router has another name."""
    theirs = draw(GptOssMLP(GptOssConfig(**SIZES, swiglu_limit=0.4)))
    experts = ClampedExperts(D, 24, E, limit=0.4)
    ours = MoE(Router(D, E, 3, router_bias=True), 24, experts=experts).double()
    state = {}
    for name, weight in theirs.state_dict().items():
        is_matrix = name.endswith(("gate_up_proj", "down_proj"))
        state[name.replace("router.", "gate.")] = weight.mT if is_matrix else weight
    ours.load_state_dict(state)

    x, direction = randn(2, 2, 40, D, dtype=torch.float64)
    pairs = [(ours(x), theirs(x)[0])]
    for y in pairs[0]:
        (y * direction).sum().backward()
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(name.replace("router.", "gate.")).grad
        is_matrix = name.endswith(("gate_up_proj", "down_proj"))
        pairs.append((gradient.mT if is_matrix else gradient, parameter.grad))
    for a, b in pairs:
        assert_close(a, b, rtol=0, atol=1e-10)
