"""Batches weigh what the loss of all samples as one batch averages over, or are refused with count= as the remedy: never a guess."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import built, gaussian, labels
from torch import Tensor, nn
from torch.nn import functional as F

import sharpkit as sk

X, Y = gaussian(30, 4), torch.arange(3).repeat_interleave(10)  # in the order of classes: samples within a batch are alike
IN_ORDER = list(zip(X.split(10), Y.split(10), strict=True))
WEIGHT = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)


def network(last: float = 1.0) -> nn.Module:
    model = built(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with torch.no_grad():
        for p in model[2].parameters():  # type: ignore[index]
            p.mul_(last)
    return model


def agrees(model: nn.Module, data: list[Any], whole: Callable[[], Tensor], **settings: Any) -> sk.Objective:
    """The objective over batches has the value and the gradient of the loss of all samples as one batch."""
    objective = sk.Objective(model, data, **settings)
    value, gradient = objective.gradient()
    loss = whole()
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert value == pytest.approx(float(loss.detach()), rel=1e-9)
    assert torch.allclose(gradient, expected, rtol=1e-8, atol=1e-12)  # float64, summed in another order
    return objective


class OwnCrossEntropy(nn.CrossEntropyLoss):
    """A subclass may do anything; this one does nothing."""


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, t: F.cross_entropy(z, t, weight=WEIGHT),
        OwnCrossEntropy(weight=WEIGHT),
        lambda z, t: F.nll_loss(z.log_softmax(1), t, WEIGHT),
        lambda z, t: F.cross_entropy(z, t, weight=WEIGHT, reduction="sum"),
        lambda z, t: F.cross_entropy(z.T[None], t[None], weight=WEIGHT),
        lambda z, t: F.mse_loss(z, F.one_hot(t, 3).double()),
    ],
    ids=["lambda", "subclass", "nll", "sum", "as a sequence", "target made inside"],
)
def test_a_standard_loss_inside_a_function_is_seen_and_weighs_by_its_own_settings(loss: Any) -> None:
    model = network()
    agrees(model, IN_ORDER, lambda: loss(model(X), Y), loss=loss)
    agrees(model, IN_ORDER, lambda: loss(model(X), Y), closure=lambda m, b: loss(m(b[0]), b[1]))


def by_hand(z: Tensor, t: Tensor) -> Tensor:
    return (F.cross_entropy(z, t, reduction="none") * WEIGHT[t]).sum() / WEIGHT[t].sum()


@pytest.mark.parametrize("last", [1.0, 0.0], ids=["usual", "last layer 0: all losses alike"])
def test_a_mean_that_no_rule_explains_is_refused_though_every_batch_alone_fits_several(last: float) -> None:
    model = network(last)
    with pytest.raises(sk.ObjectiveError, match=r"neither the sum nor the mean.*count=lambda"):
        sk.Objective(model, IN_ORDER, loss=by_hand)
    agrees(model, IN_ORDER, lambda: by_hand(model(X), Y), loss=by_hand, count=lambda b: WEIGHT[b[1]].sum())


def test_void_labels_of_any_number_do_not_count_although_the_first_batch_has_none() -> None:
    model, y = network(), Y.roll(5)
    y[11:28] = 255
    data = list(zip(X.split(10), y.split(10), strict=True))

    def closure(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1], ignore_index=255)

    objective = agrees(model, data, lambda: closure(model, (X, y)), closure=closure)
    assert objective.num_targets == 13
    assert objective.counted == "labels other than 255"
    assert objective.may_split, "pieces are weighed by it, too"
    objective.micro_batch_size = 4
    assert objective.value() == pytest.approx(float(closure(model, (X, y)).detach()), rel=1e-12)


SEQUENCES, MASK, TOKENS = gaussian(8, 6, 4), torch.zeros(8, 6, dtype=torch.float64), labels(8, 6)
MASK[:4], MASK[4:, 0] = 1, 1


def masked_mean(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
    each = F.cross_entropy(m(b["feats"]).flatten(0, 1), b["lab"].flatten(), reduction="none").view_as(b["lab"])
    return (each * b["keep"]).sum() / b["keep"].sum()


def test_a_mask_by_any_name_is_counted_though_the_rows_of_a_batch_are_equally_long() -> None:
    model = network()
    cut = [{"feats": SEQUENCES[i], "lab": TOKENS[i], "keep": MASK[i]} for i in (slice(0, 4), slice(4, 8))]
    objective = agrees(model, cut, lambda: masked_mean(model, {"feats": SEQUENCES, "lab": TOKENS, "keep": MASK}), closure=masked_mean)
    assert objective.num_targets == 28
    with pytest.raises(sk.ObjectiveError, match="count="):  # weights that are no mask
        sk.Objective(model, [{**b, "keep": 0.3 * b["keep"]} for b in cut], closure=masked_mean)


def test_batches_of_other_sequence_lengths_are_joined_by_cropping_or_padding() -> None:
    model = network()
    data = [(SEQUENCES[:4], TOKENS[:4]), (SEQUENCES[4:, :2], TOKENS[4:, :2])]

    def per_token(z: Tensor, t: Tensor) -> Tensor:
        each = F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="none", ignore_index=-100)
        return each.sum() / (t != -100).sum()

    def per_sequence(z: Tensor, t: Tensor) -> Tensor:
        each = F.cross_entropy(z.transpose(1, 2), t, reduction="none")
        return (each.sum(1) / (t != -100).sum(1)).mean()

    parts = [(float(per_token(model(x), t).detach()), x) for x, t in data]
    assert sk.Objective(model, data, loss=per_token).value() == pytest.approx((24 * parts[0][0] + 8 * parts[1][0]) / 32, rel=1e-12)
    with pytest.raises(sk.ObjectiveError, match=r"target entries or a mean over samples.*count="):  # a padded batch fits both
        sk.Objective(model, data, loss=per_sequence)


def test_a_term_that_depends_on_the_whole_batch_is_refused_though_it_is_constant_within_each() -> None:
    """As the balancing loss of a mixture of experts: the mean over tokens of a product of means."""
    model = network()

    def balanced(z: Tensor, t: Tensor) -> Tensor:
        p = F.one_hot(t, 3).double()
        return F.cross_entropy(z, t) + 0.01 * (p.mean(0) * z.softmax(1).mean(0)).sum()

    with pytest.raises(sk.ObjectiveError, match="count="):
        sk.Objective(model, IN_ORDER, loss=balanced)
    with pytest.warns(sk.ObjectiveWarning, match="count= was given"):
        sk.Objective(model, IN_ORDER, loss=balanced, count=lambda b: len(b[1]))


def test_batches_that_cannot_be_joined_are_refused_unless_their_loss_is_seen() -> None:
    model = network()

    class Graph:
        """Iterable, moves itself, and hides its tensors from a plain nesting, as torch_geometric's do."""

        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

        def __iter__(self) -> Iterator[Any]:
            return iter(vars(self).items())

        def to(self, device: Any, **_: Any) -> Graph:
            return Graph(self.x.to(device), self.y.to(device))

    graphs = [Graph(X[:20], Y[:20]), Graph(X[20:], Y[20:])]
    agrees(model, graphs, lambda: F.cross_entropy(model(X), Y), closure=lambda m, b: F.cross_entropy(m(b.x), b.y))
    single = sk.Objective(model, graphs[0], closure=lambda m, b: by_hand(m(b.x), b.y))
    assert single.value() == pytest.approx(float(by_hand(model(X[:20]), Y[:20]).detach()), rel=1e-12)
    with pytest.raises(sk.ObjectiveError, match=r"could not be joined.*count="):
        sk.Objective(model, graphs, closure=lambda m, b: by_hand(m(b.x), b.y))


def test_what_only_a_later_batch_shows_is_seen_in_long_data() -> None:
    """The parts that are joined are spread over all batches, and batches that some rule counts otherwise are among them."""
    model, x, y = network(), gaussian(120, 4), labels(120)
    data = list(zip(x.split(2), y.split(2), strict=True))
    agrees(model, data, lambda: (model(x) - F.one_hot(y, 3)).square().mean(), loss=lambda z, t: (z - F.one_hot(t, 3)).square().mean())
    late = torch.where(torch.arange(120) < 60, 1.0, 3.0)
    weighted = [(x[i], torch.stack([y[i].double(), late[i]], 1)) for i in torch.arange(120).split(2)]

    def own(z: Tensor, t: Tensor) -> Tensor:
        return (F.cross_entropy(z, t[:, 0].long(), reduction="none") * t[:, 1]).sum() / t[:, 1].sum()

    with pytest.raises(sk.ObjectiveError, match="count="):
        sk.Objective(model, weighted, loss=own)
    agrees(model, weighted, lambda: own(model(x), torch.cat([b[1] for b in weighted])), loss=own, count=lambda b: b[1][:, 1].sum())


def test_a_flag_that_is_0_in_some_batches_is_no_hindrance() -> None:
    model = network()
    data = [
        {"x": x, "y": y, "flag": torch.full((len(x),), i % 2)} for i, (x, y) in enumerate(zip(X.split(7), Y.roll(4).split(7), strict=True))
    ]
    agrees(
        model,
        data,
        lambda: F.cross_entropy(model(X), Y.roll(4)),
        closure=lambda m, b: -m(b["x"]).log_softmax(1).gather(1, b["y"][:, None]).mean(),
    )


@pytest.mark.parametrize("count", [1, 5])
def test_one_sample_batches_are_separable_and_weigh_right(count: int) -> None:
    model = network()
    data = [(X[i : i + 1], Y[i : i + 1]) for i in range(0, 6 * count, 6)]
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    for loss in (F.cross_entropy, lambda z, t: F.cross_entropy(z, t), lambda z, t: -z.log_softmax(1).gather(1, t[:, None]).mean()):
        objective = agrees(model, data, lambda loss=loss: loss(model(x), y), loss=loss)  # type: ignore[misc]
        if count > 1 or loss is F.cross_entropy:
            assert objective.may_separate


def test_a_count_that_is_no_number_is_named() -> None:
    for count, error, match in (
        (lambda b: None, TypeError, "must be a number.*got None"),
        (lambda b: b[1], TypeError, r"got a tensor of shape \(10,\)"),
        (lambda b: float("nan"), ValueError, "nan"),
        (lambda b: -1, ValueError, "-1"),
    ):
        with pytest.raises(error, match=match):
            sk.Objective(network(), IN_ORDER, loss=by_hand, count=count)


def test_one_graph_at_a_time_is_held_while_an_objective_is_made() -> None:
    hidden: list[weakref.ref[Tensor]] = []

    def loss(m: Any, batch: Any) -> Tensor:
        assert all(each() is None for each in hidden), "the graph of an evaluation before is still there"
        h = m[0](batch[0]).tanh()
        hidden.append(weakref.ref(h))
        return F.cross_entropy(m[2](h), batch[1])

    sk.Objective(network(), IN_ORDER, closure=loss)
    assert len(hidden) > 4


def test_what_does_not_fit_is_not_tried_again_at_once() -> None:
    calls = []

    def loss(m: Any, batch: Any) -> Tensor:
        calls.append(batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        sk.Objective(network(), IN_ORDER, closure=loss)
    assert len(calls) == 1
