"""What PyTorch gets silently wrong around second derivatives: each case is right here, or refused. Test names state the trap's outcome."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import (
    Attention,
    EncoderClassifier,
    attention,
    built,
    classified,
    conv,
    dense_gauss_newton,
    dense_hessian,
    encoder,
    gaussian,
    labels,
    mlp,
    relative_error,
    tied,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from traces import untouched

import sharpkit as sk

EXACT = 1e-10  # float64, some hundred operations


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.last, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(checkpoint(lambda h: torch.tanh(self.second(h)), hidden, use_reentrant=self.reentrant))


def train_mode_reference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    twin = copy.deepcopy(model).train()
    return dense_hessian(lambda: F.cross_entropy(twin(x), y), [p for p in twin.parameters() if p.requires_grad])


# -- second order through normalisation layers ------------------------------------------------------------------------------
NORMALISED = {
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), (6, 4)),
    "InstanceNorm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (6, 2, 4),
    ),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), (6, 4)),
}


@pytest.mark.parametrize("norm", NORMALISED)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_affine_normalisation_has_an_exact_symmetric_hessian(norm: str, mode: str) -> None:
    make, shape = NORMALISED[norm]
    model, x, y = built(make), gaussian(*shape), labels(shape[0])
    expected = (
        train_mode_reference(model, x, y)
        if mode == "train"
        else dense_hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    )
    found = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy, mode=mode)).to_dense()
    assert relative_error(found, expected) < EXACT
    assert relative_error(found, found.T) < EXACT


@pytest.mark.parametrize("norm", NORMALISED)
def test_gauss_newton_through_normalisation_uses_no_nested_forward_mode(norm: str) -> None:
    make, shape = NORMALISED[norm]
    problem = classified(norm, make, gaussian(*shape))
    found = sk.GaussNewtonOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    assert relative_error(found, dense_gauss_newton(problem)) < EXACT


# -- weights, stale graphs, long vectors --------------------------------------------------------------------------------------
def test_uneven_batches_and_masked_tokens_are_weighed_by_what_they_count() -> None:
    problem = tied()
    found = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    expected = dense_hessian(problem.value, problem.params)
    with torch.random.fork_rng():
        naive = sum(dense_hessian(lambda x=x, y=y: problem.loss(problem.model(x), y), problem.params) for x, y in problem.batches) / len(
            problem.batches
        )
    assert relative_error(found, expected) < EXACT
    assert relative_error(naive, expected) > 0.01, "the trap is real on this problem"


@pytest.mark.parametrize("how", ["data", "data swap", "in place", "optimizer", "load_state_dict"])
def test_a_retained_graph_of_other_parameters_is_never_used(how: str) -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    before = H.to_dense()
    weight = problem.model[0].weight
    if how == "data":
        weight.data.mul_(1.5)
    elif how == "data swap":
        weight.data = weight.data * 1.5
    elif how == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    elif how == "load_state_dict":
        problem.model.load_state_dict({k: 1.5 * v for k, v in problem.model.state_dict().items()})
    else:
        problem.value().backward()
        torch.optim.SGD(problem.model.parameters(), lr=1.0).step()
        problem.model.zero_grad()
    expected = dense_hessian(problem.value, problem.params)
    assert relative_error(before, expected) > 1e-3
    assert relative_error(H.to_dense(), expected) < EXACT


@pytest.mark.parametrize("what", ["parameter outside the block", "frozen parameter", "buffer"])
def test_a_retained_graph_is_not_used_after_anything_else_in_the_model_changed(what: str) -> None:
    problem = conv()
    if what == "frozen parameter":
        problem.model[0].weight.requires_grad_(False)
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss, params="5.*"))
    H.to_dense()
    changed = problem.model[1].running_mean if what == "buffer" else problem.model[0].weight.data
    changed += 0.5
    assert relative_error(H.to_dense(), dense_hessian(problem.value, list(problem.model[5].parameters()))) < EXACT


def test_a_vector_of_norm_one_thousand_is_no_worse_than_a_unit_vector() -> None:
    problem = mlp()
    H = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss))
    v = gaussian(H.size)
    assert relative_error(H @ (1e3 * v / v.norm()), 1e3 * (H @ (v / v.norm()))) < EXACT


# -- modes and randomness -----------------------------------------------------------------------------------------------------
def test_batch_statistics_in_train_mode_are_exact_and_running_statistics_stay() -> None:
    problem = conv()
    x, y = problem.batches[0]
    problem.model.train()
    objective = sk.Objective(problem.model, (x, y), loss=F.cross_entropy, mode="train")
    with untouched(problem.model):
        found = sk.HessianOperator(objective).to_dense()
    assert relative_error(found, train_mode_reference(problem.model, x, y)) < EXACT


def test_train_and_eval_mode_differ_and_the_mode_is_on_record() -> None:
    problem = conv()
    both = {m: sk.HessianOperator(sk.Objective(problem.model, problem.batches[0], loss=F.cross_entropy, mode=m)) for m in ("eval", "train")}
    assert relative_error(both["eval"].to_dense(), both["train"].to_dense()) > 0.1
    for mode, operator in both.items():
        assert f"{mode} mode" in repr(operator)
        assert f"{mode} mode" in repr(operator.objective)


@pytest.mark.parametrize("retain", [True, False])
def test_dropout_in_train_mode_gives_one_fixed_symmetric_matrix(retain: bool) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)))
    model.train()
    batches = [(gaussian(4, 4), labels(4)), (gaussian(3, 4, seed=9), labels(3))]
    H = sk.HessianOperator(sk.Objective(model, batches, loss=F.cross_entropy, mode="train"), retain=retain)
    v = gaussian(H.size)
    with untouched(model):
        first = H @ v
    torch.rand(3)
    with untouched(model):
        second = H @ v
        dense = H.to_dense()
    assert torch.equal(first, second)
    assert relative_error(dense, dense.T) < EXACT
    plain = sk.HessianOperator(sk.Objective(model, batches, loss=F.cross_entropy)).to_dense()
    assert relative_error(plain, dense) > 0.1, "dropout was on"


@pytest.mark.parametrize("layer", ["dropout", "functional dropout", "batch norm", "batch norm without running statistics"])
def test_cutting_a_batch_is_refused_where_it_would_change_the_function(layer: str) -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    norm = nn.BatchNorm1d(6, track_running_stats=layer == "batch norm")
    middle = {"dropout": nn.Dropout(0.5), "functional dropout": Functional()}.get(layer, norm)
    model = built(lambda: nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3)))
    mode = "eval" if layer.endswith("statistics") else "train"
    with pytest.raises(ValueError, match="micro_batch_size"):
        sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy, mode=mode, micro_batch_size=2)
    objective = sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy, mode=mode)
    assert not objective.may_split


# -- attention, compile, checkpointing, unused and linear parameters ------------------------------------------------------------
def test_scaled_dot_product_attention_with_its_default_backend_is_exact() -> None:
    problem = attention()
    loss = F.cross_entropy(problem.model(problem.batches[0][0]), problem.batches[0][1])
    (g,) = torch.autograd.grad(loss, problem.model.qkv.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):  # the trap: the default kernel has no second derivative
        torch.autograd.grad(g.sum(), problem.model.qkv.weight)
    found = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    assert relative_error(found, dense_hessian(problem.value, problem.params)) < EXACT


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_layer_is_exact(training: bool) -> None:
    problem = encoder()
    problem.model.train(training)
    found = sk.HessianOperator(sk.Objective(problem.model, problem.batches, loss=problem.loss)).to_dense()
    problem.model.eval()
    assert relative_error(found, dense_hessian(problem.value, problem.params)) < EXACT


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "compiled part"])
def test_a_compiled_model_is_measured_eagerly_under_its_own_names(how: str) -> None:
    problem = mlp()
    expected = dense_hessian(problem.value, problem.params)
    x, _ = problem.batches[0]
    model: nn.Module = problem.model
    if how == "torch.compile":
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    elif how == "module.compile":
        model.compile(backend="aot_eager")
    else:
        model[0] = torch.compile(model[0], backend="aot_eager")
    if how != "compiled part":
        with torch.no_grad():
            model(x)
    objective = sk.Objective(model, problem.batches, loss=problem.loss)
    assert objective.layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert relative_error(sk.HessianOperator(objective).to_dense(), expected) < EXACT
    assert relative_error(sk.HessianOperator(objective).block("0.*").to_dense(), expected[:25, :25]) < EXACT


def test_checkpointing_without_reentry_is_exact_and_recomputes_little() -> None:
    model, x, y = built(lambda: Checkpointed(False)), gaussian(6, 4), labels(6)
    calls = []
    model.second.register_forward_hook(lambda *_: calls.append(1))
    expected = dense_hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    H = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy))
    calls.clear()
    assert relative_error(H.to_dense(), expected) < EXACT
    assert len(calls) <= 4 * H.size, "measuring the memory of a graph must not recompute it for every tensor saved"


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    model = built(lambda: Checkpointed(True))
    H = sk.HessianOperator(sk.Objective(model, (gaussian(6, 4), labels(6)), loss=F.cross_entropy))
    with untouched(model), pytest.raises(sk.UnsupportedError, match="use_reentrant=False"):
        H @ gaussian(H.size)


def test_unused_and_linear_parameters_have_zero_rows() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.linear = nn.Linear(3, 2), nn.Linear(3, 1), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, x, y = built(Odd), gaussian(5, 3), gaussian(5, 2)
    H = sk.HessianOperator(sk.Objective(model, (x, y), closure=lambda m, b: F.mse_loss(m(b[0]), b[1]) + m.linear.sum()))
    found = H.to_dense()
    params = list(model.parameters())
    assert relative_error(found, dense_hessian(lambda: F.mse_loss(model(x), y) + model.linear.sum(), params)) < EXACT
    assert [n for n, _ in model.named_parameters()] == list(H.layout.names)
    zero = H.layout.indices(["unused.weight", "unused.bias", "linear"])
    assert not found[zero].any()
    assert not found[:, zero].any()
    assert found.any()


def test_a_loss_linear_in_all_parameters_has_a_zero_hessian() -> None:
    model = built(lambda: nn.Linear(3, 1))
    H = sk.HessianOperator(sk.Objective(model, gaussian(4, 3), closure=lambda m, x: m(x).mean()))
    assert not H.to_dense().any()


def test_once_differentiable_functions_are_refused() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return 3 * ctx.saved_tensors[0] ** 2 * g

    model = built(lambda: nn.Linear(3, 1))
    H = sk.HessianOperator(sk.Objective(model, gaussian(4, 3), closure=lambda m, x: Cube.apply(m(x)).mean()))
    with untouched(model), pytest.raises(sk.UnsupportedError, match="once_differentiable"):
        H @ gaussian(H.size)


def test_a_flash_attention_kernel_forced_inside_the_model_is_refused() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Forced(Attention):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return super().forward(x)

    model = built(Forced)
    H = sk.HessianOperator(sk.Objective(model, (gaussian(4, 3, 4), labels(4)), loss=F.cross_entropy))
    with untouched(model), pytest.raises(sk.UnsupportedError, match="attention"):
        H @ gaussian(H.size)


def test_weights_cast_under_the_users_own_autocast_are_not_taken_over() -> None:
    """Autocast caches casts of weights; one made under no_grad would cut the weight off from the graph."""
    model = built(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), dtype=torch.float32)
    x, y = gaussian(6, 4, dtype=torch.float32), labels(6)
    expected = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy, autocast=torch.bfloat16)).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(x)
        with untouched(model):
            found = sk.HessianOperator(sk.Objective(model, (x, y), loss=F.cross_entropy, autocast=torch.bfloat16)).to_dense()
    assert torch.equal(found, expected)
    assert found.any(dim=0).all()


def test_encoder_dropout_is_silent_in_eval_mode_even_when_the_model_is_training() -> None:
    model = built(EncoderClassifier)
    data = (gaussian(4, 3, 4), labels(4))
    in_eval = sk.Objective(model, data, loss=F.cross_entropy).value()
    model.train()
    assert sk.Objective(model, data, loss=F.cross_entropy).value() == pytest.approx(in_eval, rel=1e-12)
