"""What an objective takes, what it weighs batches by, what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from problems import TiedLanguageModel, built, dense_hessian, gaussian, labels, mlp, relative_error, tied, weighted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from traces import untouched

import sharpkit as sk

X, Y = gaussian(6, 4), labels(6)
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    note: str = "kept"


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like a tokenizer's output: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class NetWithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.body(x)
        output = namedtuple("Output", "loss logits")
        return output(None if y is None else F.cross_entropy(logits, y), logits)


def network() -> nn.Module:
    return built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def value(**settings: Any) -> float:
    """Objective of the standard network, checked not to disturb it."""
    model = settings.pop("model", None) or network()
    data = settings.pop("data", (X, Y))
    with untouched(model):
        return sk.Objective(model, data, **settings).value()


EXPECTED = float(F.cross_entropy(network()(X), Y).detach())


# -- forms of batches -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        [(X, Y)],
        [[X, Y]],
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        Pair(X, Y),
        [Pair(X[:1], Y[:1]), Pair(X[1:], Y[1:])],
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [((X,), Y)],
        [({"input": X}, Y)],
    ],
    ids=["tuple", "list pair", "list of tuple", "list of list", "uneven", "namedtuple", "namedtuples", "loader", "nested", "keywords"],
)
def test_input_target_batches_of_any_form_give_the_same_value(data: Any) -> None:
    assert value(data=data, loss=F.cross_entropy) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.parametrize(
    ("batch", "closure"),
    [
        ({"x": X, "y": Y}, lambda m, b: F.cross_entropy(m(b["x"]), b["y"])),
        (Pair(X, Y), lambda m, b: F.cross_entropy(m(b.x), b.y)),
        (Record(X, Y), lambda m, b: F.cross_entropy(m(b.x), b.y) if b.note == "kept" else None),
        (torch.cat([X, Y[:, None]], dim=1), lambda m, b: F.cross_entropy(m(b[:, :4]), b[:, 4].long())),
        ({"deep": [{"x": X}, (Y, None)], "name": "s"}, lambda m, b: F.cross_entropy(m(b["deep"][0]["x"]), b["deep"][1][0])),
        (Encoding({"x": X, "y": Y}), lambda m, b: F.cross_entropy(m(b.x), b.y)),
    ],
    ids=["dict", "namedtuple", "dataclass", "tensor", "nested", "attribute mapping"],
)
def test_closures_take_batches_of_any_nesting_in_their_own_type(batch: Any, closure: Any) -> None:
    assert value(data=batch, closure=closure) == pytest.approx(EXPECTED, rel=1e-12)
    assert value(data=[batch, batch], closure=closure) == pytest.approx(EXPECTED, rel=1e-12)


def test_dict_batches_go_to_models_that_compute_their_own_loss() -> None:
    model = built(NetWithLoss)
    batches = [{"x": X[:5], "y": Y[:5]}, {"x": X[5:], "y": Y[5:]}]
    expected = float(F.cross_entropy(model.body(X), Y).detach())
    assert value(model=model, data=batches) == pytest.approx(expected, rel=1e-12)
    assert value(model=model, data=[({"x": X}, Y)], loss=F.cross_entropy) == pytest.approx(expected, rel=1e-12), (
        "logits are taken from the output"
    )


def test_packed_sequences_are_one_input() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3), nn.Linear(3, 2)

        def forward(self, x: PackedSequence) -> Tensor:
            return self.head(self.lstm(x)[1][0][-1])

    model, y = built(Recurrent), labels(3, classes=2)
    packed = pack_sequence([gaussian(n, 2, seed=n) for n in (4, 3, 2)])
    objective = sk.Objective(model, (packed, y), loss=F.cross_entropy)
    assert objective.value() == pytest.approx(float(F.cross_entropy(model(packed), y).detach()), rel=1e-12)
    assert not objective.may_split, "a packed sequence is not cut"
    H = sk.HessianOperator(objective).to_dense()
    assert relative_error(H, dense_hessian(lambda: F.cross_entropy(model(packed), y), list(model.parameters()))) < 1e-10


# -- data that is not one fixed data set ------------------------------------------------------------------------------------
class Noisy(Dataset):  # type: ignore[type-arg]
    """Augments with whatever generator it is given."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + 0.1 * float(self.draw()), Y[i]


@pytest.mark.parametrize(
    "draw", [lambda: torch.randn(()), np.random.default_rng(0).standard_normal, np.random.rand], ids=["torch", "numpy", "legacy"]
)
def test_an_augmenting_data_set_is_refused(draw: Any) -> None:
    with pytest.raises(sk.NonDeterministicError, match=r"batch 0 differed between two passes.*list\(loader\)"):
        sk.Objective(network(), DataLoader(Noisy(draw), batch_size=3), loss=F.cross_entropy)
    frozen = list(DataLoader(Noisy(draw), batch_size=3))
    assert np.isfinite(value(data=frozen, loss=F.cross_entropy)), "the remedy in the message works"


def test_a_shuffling_loader_is_refused() -> None:
    with pytest.raises(sk.NonDeterministicError, match="shuffles"):
        sk.Objective(network(), DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True), loss=F.cross_entropy)


def test_a_loader_that_shuffles_text_is_noticed() -> None:
    class Texts:
        def __iter__(self) -> Iterator[Any]:
            order = torch.randperm(8).tolist()
            return iter([{"texts": [f"text {i}"], "x": X} for i in order])

    with pytest.raises(sk.NonDeterministicError, match="two passes"):
        sk.Objective(network(), Texts(), closure=lambda m, b: m(b["x"]).square().mean())


@pytest.mark.parametrize("make", [lambda: iter([(X, Y)]), lambda: ((X, Y) for _ in range(2)), lambda: zip([X], [Y], strict=True)])
def test_a_one_shot_iterator_is_refused_with_the_remedy(make: Any) -> None:
    with pytest.raises(sk.ObjectiveError, match=r"only once.*list of batches"):
        sk.Objective(network(), make(), loss=F.cross_entropy)


def test_a_loader_whose_length_changes_is_noticed() -> None:
    class Shrinking(IterableDataset):  # type: ignore[type-arg]
        sizes = 2

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(X[i], Y[i]) for i in range(Shrinking.sizes)])

    loader = DataLoader(Shrinking(), batch_size=1)
    objective = sk.Objective(network(), loader, loss=F.cross_entropy)
    for Shrinking.sizes in (1, 3):
        with pytest.raises(sk.ObjectiveError, match="changed"):
            objective.value()


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([], sk.ObjectiveError, "holds nothing that counts"),
        (DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=2), sk.ObjectiveError, "holds nothing that counts"),
        ((X[:0], Y[:0]), sk.ObjectiveError, "holds nothing that counts"),
        ((X, torch.full_like(Y, -100)), sk.ObjectiveError, "masked"),
        (3, TypeError, "re-iterable loader, got int"),
        (TensorDataset(X, Y), TypeError, r"TensorDataset.*DataLoader"),
        ([(X, Y, X)], TypeError, "tuple of 3"),
        ([{"x": X}], TypeError, "batch 0 is a dict"),
        ((X, Y.float()[:, None] * float("nan")), sk.NonFiniteError, "nan"),
    ],
)
def test_data_that_cannot_be_measured_is_named(data: Any, error: type[Exception], match: str) -> None:
    loss = F.cross_entropy if not (isinstance(data, tuple) and data[1].ndim == 2) else lambda z, t: ((z - t) ** 2).mean()
    with pytest.raises(error, match=match):
        sk.Objective(network(), data, loss=loss)


def test_empty_and_fully_masked_batches_among_others_weigh_nothing() -> None:
    data = [(X[:4], Y[:4]), (X[:0], Y[:0]), (X, torch.full_like(Y, -100)), (X[4:], Y[4:])]
    assert value(data=data, loss=F.cross_entropy) == pytest.approx(EXPECTED, rel=1e-12)
    lambda_loss = lambda z, t: F.cross_entropy(z, t)  # noqa: E731
    assert value(data=data, loss=lambda_loss) == pytest.approx(EXPECTED, rel=1e-12)


# -- weights --------------------------------------------------------------------------------------------------------------
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
MASKED = Y.clone()
MASKED[[1, 3, 5]] = -100
UNEVEN = [slice(0, 3), slice(3, 5), slice(5, 6)]


def per_sample_huber(z: Tensor, t: Tensor) -> Tensor:
    return F.huber_loss(z, t, reduction="none").sum(1).mean()


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (F.cross_entropy, MASKED),
        (nn.CrossEntropyLoss(weight=WEIGHT), Y),
        (nn.CrossEntropyLoss(weight=WEIGHT), MASKED),
        (functools.partial(F.cross_entropy, ignore_index=1), Y),
        (nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT), MASKED),
        (nn.CrossEntropyLoss(), torch.softmax(gaussian(6, 3), dim=1)),
        (nn.CrossEntropyLoss(reduction="sum"), MASKED),
        (lambda z, t: F.cross_entropy(z, t), MASKED),
        (lambda z, t: F.cross_entropy(z, t, reduction="sum"), Y),
        (F.mse_loss, gaussian(6, 3)),
        (nn.HuberLoss(), gaussian(6, 3)),
        (per_sample_huber, gaussian(6, 3)),
        (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.sigmoid(gaussian(6, 3))),
        (lambda z, t: ((z - t) ** 2).sum(), gaussian(6, 3)),
        (functools.partial(F.cross_entropy, size_average=False), Y),
    ],
    ids=[
        "masked",
        "class weights",
        "weights and mask",
        "ignore_index",
        "smoothing",
        "probabilities",
        "sum",
        "lambda masked",
        "lambda sum",
        "squares",
        "huber",
        "own huber",
        "pos_weight",
        "own sum",
        "legacy sum",
    ],
)
@pytest.mark.filterwarnings("ignore:size_average")
def test_uneven_batches_weigh_what_their_loss_averages_over(loss: Any, target: Tensor) -> None:
    model = network()
    whole = float(loss(model(X), target).detach())
    assert value(model=model, data=[(X[s], target[s]) for s in UNEVEN], loss=loss) == pytest.approx(whole, rel=1e-12)


def test_token_losses_of_padded_language_models_weigh_tokens() -> None:
    problem = tied()
    expected = float(problem.value().detach())

    def closure(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    batches = [{"tokens": x, "labels": y} for x, y in problem.batches]
    assert value(model=problem.model, data=batches, closure=closure) == pytest.approx(expected, rel=1e-12)
    assert value(model=problem.model, data=problem.batches, loss=problem.loss) == pytest.approx(expected, rel=1e-12)
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    assert objective.num_targets == problem.total
    assert objective.num_samples == 5
    assert "labels other than -100" in repr(objective)


def test_a_mean_over_sequences_of_per_sequence_means_is_told_from_a_mean_over_tokens() -> None:
    model, tokens, y = built(TiedLanguageModel), labels(6, 4, classes=7), labels(6, 4, classes=7, seed=4)
    y[0, 1:], y[3, 2:], y[5, 1:] = -100, -100, -100

    def per_sequence(z: Tensor, t: Tensor) -> Tensor:
        each = F.cross_entropy(z.transpose(1, 2), t, reduction="none").sum(1) / (t != -100).sum(1)
        return each.mean()

    expected = float(per_sequence(model(tokens), y).detach())
    found = sk.Objective(model, [(tokens[:4], y[:4]), (tokens[4:], y[4:])], loss=per_sequence)
    assert found.value() == pytest.approx(expected, rel=1e-12)
    assert found.counted != "labels other than -100"


def test_sequences_of_other_lengths_in_each_batch_weigh_by_what_their_loss_is_seen_to_average_over() -> None:
    model = built(TiedLanguageModel)
    batches = [(labels(3, n, classes=7), labels(3, n, classes=7, seed=4)) for n in (3, 6)]
    loss = lambda z, t: F.cross_entropy(z.transpose(1, 2), t)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sk.Objective(model, batches, loss=loss).num_targets == 27
        assert sk.Objective(model, batches, loss=loss, count=lambda b: b[1].numel()).num_targets == 27


def test_where_only_later_batches_can_be_cut_those_are_tried() -> None:
    target = Y.clone()
    target[[0, 1, 3]] = -100
    found = value(data=[(X[:3], target[:3]), (X[3:], target[3:])], loss=lambda z, t: F.cross_entropy(z, t, reduction="mean"))
    assert found == pytest.approx(float(F.cross_entropy(network()(X), target).detach()), rel=1e-12)


def contrastive(z: Tensor, t: Tensor) -> Tensor:
    u = F.normalize(z, dim=1)
    return F.cross_entropy(u @ u.T / 0.5, torch.arange(len(z)))


def test_a_loss_that_couples_samples_is_one_batch_or_needs_its_count() -> None:
    model = network()
    expected = float(contrastive(model(X), Y).detach())
    objective = sk.Objective(model, (X, Y), loss=contrastive)
    assert objective.value() == pytest.approx(expected, rel=1e-12)
    assert not objective.may_separate
    two = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    with pytest.raises(sk.ObjectiveError, match=r"neither the sum nor the mean.*count="):
        sk.Objective(model, two, loss=contrastive)
    with pytest.warns(sk.ObjectiveWarning, match="how the data was cut"):
        given = sk.Objective(model, two, loss=contrastive, count=lambda b: len(b[1]))
    parts = [float(contrastive(model(x), y).detach()) for x, y in two]
    assert given.value() == pytest.approx((4 * parts[0] + 2 * parts[1]) / 6, rel=1e-12)
    with pytest.raises(sk.ObjectiveError, match="per-sample"):
        sk.EmpiricalFisherOperator(objective) @ torch.ones(objective.num_parameters, dtype=torch.float64)
    with pytest.raises(ValueError, match="micro_batch_size=2"):
        sk.Objective(model, (X, Y), loss=contrastive, micro_batch_size=2)


def test_batches_that_cannot_be_cut_are_not_weighed_by_guess() -> None:
    problem = tied()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in problem.batches for i in range(len(x))]
    joined = sk.Objective(problem.model, singles, loss=problem.loss)
    assert joined.value() == pytest.approx(float(problem.value().detach()), rel=1e-12)

    def one_at_a_time(z: Tensor, t: Tensor) -> Tensor:
        (_,) = t
        return problem.loss(z, t)

    def by_hand(z: Tensor, t: Tensor) -> Tensor:
        (only,) = t
        kept = only != -100
        return -z[0][kept].log_softmax(-1).gather(1, only[kept][:, None]).mean()

    assert sk.Objective(problem.model, singles, loss=one_at_a_time).num_targets == problem.total
    with pytest.raises(sk.ObjectiveError, match=r"which weigh batches differently|could not be joined"):
        sk.Objective(problem.model, singles, loss=by_hand)
    counted = sk.Objective(problem.model, singles, loss=problem.loss, count=lambda b: (b[1] != -100).sum())
    assert counted.value() == pytest.approx(float(problem.value().detach()), rel=1e-12)


def test_a_small_loss_in_float32_is_not_taken_for_a_coupled_one() -> None:
    model = built(lambda: nn.Linear(3, 3, bias=False), dtype=torch.float32)
    y = labels(32)
    with torch.no_grad():
        model.weight.copy_(12 * torch.eye(3))
    x = F.one_hot(y, 3).float() + 0.05 * gaussian(32, 3, dtype=torch.float32)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    expected = float(F.cross_entropy(model(x), y).detach())
    assert expected < 1e-4
    found = sk.Objective(model, batches, loss=lambda z, t: F.cross_entropy(z, t), reduction="mean")
    assert found.value() == pytest.approx(expected, rel=1e-3)
    assert sk.Objective(model, batches, loss=F.cross_entropy).may_separate


def test_what_the_loss_says_and_what_is_asked_must_agree() -> None:
    with pytest.raises(ValueError, match=r"reduction='sum' was asked for.*'mean'"):
        sk.Objective(network(), (X, Y), loss=F.cross_entropy, reduction="sum")
    with pytest.raises(sk.ObjectiveError, match="reduction='none'"):
        sk.Objective(network(), (X, Y), loss=nn.CrossEntropyLoss(reduction="none"))


def test_weights_carry_into_gradient_and_hessian() -> None:
    problem = weighted()
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    loss, gradient = objective.gradient()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.value(), problem.params)])
    assert loss == pytest.approx(float(problem.value().detach()), rel=1e-12)
    assert relative_error(gradient, expected) < 1e-12


# -- types and parameters ---------------------------------------------------------------------------------------------------
def test_half_precision_parameters_have_float32_vectors() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.bfloat16)
    objective = sk.Objective(model, (X.bfloat16(), Y), loss=F.cross_entropy)
    H = sk.HessianOperator(objective)
    assert H.dtype == torch.float32
    reference = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.bfloat16).double()
    expected = dense_hessian(lambda: F.cross_entropy(reference(X.bfloat16().double()), Y), list(reference.parameters()))
    assert relative_error(H.to_dense(), expected) < 0.03, "bfloat16 keeps 8 bits"


def test_bf16_autocast_keeps_float32_vectors_and_says_half_precision_size_errors() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.float32)
    data = [(X[:4].float(), Y[:4]), (X[4:].float(), Y[4:])]
    H = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy, autocast=torch.bfloat16))
    exact = sk.HessianOperator(sk.Objective(model, data, loss=F.cross_entropy)).to_dense()
    found = H.to_dense()
    assert H.dtype == torch.float32
    assert 1e-5 < relative_error(found, exact) < 0.03, "computed in bfloat16, 8 bits"


def test_frozen_tied_integer_and_selected_parameters() -> None:
    problem = tied()
    problem.model.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False))
    assert sk.Objective(problem.model, problem.batches, loss=problem.loss).layout.names == ("embed.weight", "mix.weight", "mix.bias")
    problem.model.mix.bias.requires_grad_(False)
    objective = sk.Objective(problem.model, problem.batches, loss=problem.loss)
    assert objective.num_parameters == 28 + 16
    dense = dense_hessian(problem.value, [problem.model.embed.weight, problem.model.mix.weight])
    assert relative_error(sk.HessianOperator(objective).to_dense(), dense) < 1e-10
    part = objective.with_params("mix.*")
    assert part.layout.names == ("mix.weight",)
    assert relative_error(sk.HessianOperator(part).to_dense(), dense[28:, 28:]) < 1e-10


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ("nothing.*", ValueError, r"nothing.*0\.weight"),
        (["0.*", "typo.*"], ValueError, r"typo"),
        (lambda n, p: False, ValueError, "none of"),
        (5, TypeError, r"got 5 \(int\)"),
        (list(network().parameters()), TypeError, "list of Parameter"),
        ([], ValueError, "none of"),
    ],
)
def test_a_selection_that_selects_nothing_is_an_error(params: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sk.Objective(network(), (X, Y), loss=F.cross_entropy, params=params)


def test_selections_by_pattern_list_generator_and_predicate_agree() -> None:
    for params in ("2.*", ["2.weight", "2.bias"], (n for n in ("2.weight", "2.bias")), lambda name, p: name.startswith("2")):
        assert sk.Objective(network(), (X, Y), loss=F.cross_entropy, params=params).layout.names == ("2.weight", "2.bias")
    objective = sk.Objective(network(), (X, Y), loss=F.cross_entropy, params="2.*")
    with pytest.raises(ValueError, match=r"0\.weight.*none of the objective's"):
        objective.with_params("0.*")


def test_names_that_look_like_patterns_are_names() -> None:
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model.register_parameter("w0", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    objective = sk.Objective(model, X, closure=lambda m, b: sum(p.pow(3).sum() for p in m.parameters()) * b.mean())
    assert objective.with_params(lambda name, p: name == "w[0]").layout.names == ("w[0]",)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(4, 3, dtype=torch.complex64), "complex"),
        (lambda: nn.LazyLinear(3), "forward pass first"),
        (lambda: nn.Sequential(nn.Tanh()), "no parameters"),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "frozen"),
    ],
)
def test_models_without_real_trainable_parameters_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sk.Objective(make(), (X, Y), loss=F.cross_entropy)


def test_parameters_made_under_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="inference_mode"):
        sk.Objective(model, (X, Y), loss=F.cross_entropy)


@pytest.mark.parametrize("how", ["assign", "new parameter", "frozen", "double"])
def test_parameters_replaced_after_the_objective_was_made_are_noticed(how: str) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.float32)
    H = sk.HessianOperator(sk.Objective(model, (X.float(), Y), loss=F.cross_entropy))
    v = torch.ones(H.size)
    H @ v
    if how == "assign":
        model.load_state_dict({k: t.clone() for k, t in model.state_dict().items()}, assign=True)
    elif how == "new parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif how == "frozen":
        model[0].weight.requires_grad_(False)
    else:
        model.double()
    with pytest.raises(sk.ObjectiveError, match=r"'0.weight'.*make a new Objective"):
        H @ v


# -- losses that are none -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (lambda m, b: m(b).mean().item(), sk.ObjectiveError, r"float: return the loss itself, not loss\.item"),
        (lambda m, b: m(b).mean().detach(), sk.ObjectiveError, "does not depend on any trainable parameter"),
        (lambda m, b: m(b), sk.ObjectiveError, r"shape \(6, 3\).*reduction='mean'"),
        (lambda m, b: m(b).argmax(), sk.ObjectiveError, "int64"),
        (lambda m, b: None, sk.ObjectiveError, "NoneType"),
        (lambda m, b: m(b).mean() * float("nan"), sk.NonFiniteError, "batch 0 is nan"),
        (lambda m, b: m(b).mean() / 0, sk.NonFiniteError, "inf"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_named(closure: Any, error: type[Exception], match: str) -> None:
    model = network()
    with untouched(model), pytest.raises(error, match=match):
        sk.Objective(model, X, closure=closure)


def test_a_loss_that_does_not_repeat_is_refused() -> None:
    state = []

    def closure(model: nn.Module, batch: Tensor) -> Tensor:
        state.append(1)
        return model(batch).square().mean() * len(state)

    with pytest.raises(sk.NonDeterministicError, match="gave the losses"):
        sk.Objective(network(), X, closure=closure)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"loss": F.cross_entropy, "closure": lambda m, b: 0}, ValueError, "not both"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, r"CrossEntropyLoss\(\)"),
        ({"loss": F.cross_entropy, "mode": "Eval"}, ValueError, "mode"),
        ({"loss": F.cross_entropy, "reduction": "avg"}, ValueError, "reduction"),
        ({}, TypeError, "batches must be dicts"),
        ({"loss": F.cross_entropy, "micro_batch_size": 0}, ValueError, "micro_batch_size"),
        ({"count": 3}, TypeError, "count"),
        ({"loss": F.cross_entropy, "micro_batch_size": True}, TypeError, "micro_batch_size"),
        ({"loss": F.cross_entropy, "count": lambda b: -1}, ValueError, r"count\(batch\).* of at least 0"),
    ],
)
def test_arguments_are_checked(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sk.Objective(network(), (X, Y), **settings)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        sk.Objective(lambda x: x, (X, Y))  # type: ignore[arg-type]


def test_unchecked_objectives_trust_what_they_are_told() -> None:
    calls = []

    def closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(batch[0]), batch[1])

    objective = sk.Objective(network(), [(X[:4], Y[:4]), (X[4:], Y[4:])], closure=closure, count=lambda b: len(b[1]), check=False)
    assert calls == []
    assert objective.value() == pytest.approx(EXPECTED, rel=1e-12)


def test_tensors_without_a_sample_dimension_are_not_cut() -> None:
    scale, model = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), network()
    batch = {"x": X, "labels": Y, "scale": scale}
    objective = sk.Objective(model, batch, closure=lambda m, b: F.cross_entropy(m(b["x"]) * b["scale"], b["labels"]), micro_batch_size=2)
    assert len(list(objective.pieces())) == 3
    assert objective.value() == pytest.approx(float(F.cross_entropy(model(X) * scale, Y).detach()), rel=1e-12)


def test_a_sharded_or_wrapped_part_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.DataParallel(nn.Linear(4, 3))

    with pytest.raises(sk.UnsupportedError, match=r"'inner'.*DataParallel"):
        sk.Objective(Outer(), (X, Y), loss=F.cross_entropy)
    whole = nn.DataParallel(mlp().model)
    assert sk.Objective(whole, (X, Y), loss=F.cross_entropy).layout.names[0] == "0.weight"


# -- batches and models of other forms ---------------------------------------------------------------------------------------------
class Graph:
    """Gives its names and tensors when gone through, as graph libraries' data objects do."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        yield "x", self.x
        yield "y", self.y


class Loader:
    """Keeps its tensors itself, and gives batches."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[Any]:
        yield self.x[:4], self.y[:4]
        yield self.x[4:], self.y[4:]


def test_an_object_that_can_be_gone_through_is_a_batch_or_a_loader_by_what_it_gives() -> None:
    model = network()
    right = float(F.cross_entropy(model(X), Y).detach())
    assert sk.Objective(model, Graph(X, Y), closure=lambda m, b: F.cross_entropy(m(b.x), b.y)).value() == pytest.approx(right)
    assert sk.Objective(model, Loader(X, Y), loss=F.cross_entropy).value() == pytest.approx(right)


class TakesOne(nn.Module):
    """Takes its inputs as one mapping or one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, data: Any) -> Tensor:
        return self.body(data["x"] if isinstance(data, dict) else data[0] + data[1])


def test_a_model_that_takes_one_mapping_or_one_sequence_is_given_it_whole() -> None:
    model = built(TakesOne)
    right = float(F.cross_entropy(model({"x": X}), Y).detach())
    assert sk.Objective(model, ({"x": X}, Y), loss=F.cross_entropy).value() == pytest.approx(right)
    assert sk.Objective(model, ((X / 2, X / 2), Y), loss=F.cross_entropy).value() == pytest.approx(right)


def test_arguments_that_a_model_lacks_are_named_by_its_own_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.body(a + b)

    with pytest.raises(sk.ObjectiveError, match="missing 1 required positional argument: 'b'") as told:
        sk.Objective(built(Two), ({"a": X}, Y), loss=F.cross_entropy)
    assert isinstance(told.value.__cause__, TypeError)
