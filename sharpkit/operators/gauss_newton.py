"""The generalised Gauss-Newton matrix: curvature of the loss in the output, pulled back through the linearised model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.objective.loss import check_loss
from sharpkit.objective.memory import GraphCost, available_memory, graph_cost, graph_nodes, human_bytes
from sharpkit.objective.objective import Objective
from sharpkit.objective.reduction import Piece
from sharpkit.objective.second_order import custom_functions
from sharpkit.operators.blocks import PieceProduct, Pieces, derivative
from sharpkit.operators.curvature import CurvatureOperator
from sharpkit.operators.forward_mode import ForwardMode, Recording, record
from sharpkit.operators.head import product_in_chunks
from sharpkit.operators.hessian import HessianOperator
from sharpkit.operators.probe import look_into_doubts

# u.(J v) = v.(J^T u), relative, by type of the output: by judgement above rounding, and far below a derivative that is cut off
_ADJOINT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
# A central difference of the loss's gradient in its output: the step is near eps^(1/3) of float32, which losses are often computed in;
# its error is far below the tolerance, a derivative that is cut off far above. Both by judgement.
_SLOPE_STEP, _SLOPE_AGREE = 5e-3, 5e-2

# Memory of recording over what is kept of it, and of a trial over the graph of the double-backward trick: 1.7 to 2.4 and 2.7 to 5 on the
# networks with convolutions of experiments/forward_mode.py.
_RECORDING, _TRIAL = 2.4, 5.0


class OutputJacobian:
    """The Jacobian J of the model's output z(w) on one piece.

    J v is the derivative of u -> J^T u, which is linear, applied to v: the double-backward trick. It needs no forward-mode rule, works on
    the live parameters, and its graph is reused for every v. Where that was seen to be slower, J v is played back from a recording of
    forward mode instead. Where the model has an operation that can be differentiated only once, J is computed row by row and kept, by as
    many backward passes as the output has entries.

    Attributes:
        output: z, detached.
        target: the piece's target.
        cost: of the graph.
    """

    def __init__(self, objective: Objective, piece: Piece, forward_mode: ForwardMode, recorded: RecordedOutput | None = None) -> None:
        if objective.loss is None:
            raise ObjectiveError(
                "this operator needs the model's output and the loss apart: make the Objective with loss= and (input, target) batches, "
                "not with closure="
            )
        self._params, self._forward_mode = objective.layout.params, forward_mode
        self.target = piece.batch[1]
        self._rows: Tensor | None = None
        self._recording: Recording | None = None
        recorded = recorded or (record_output(objective, piece) if forward_mode.used else None)
        if recorded is not None and forward_mode.covers(recorded.recording):
            self._output, self._recording, self.cost = recorded
            self.output = self._output.detach()
            return
        output, params = _output_of(objective, piece), self._params
        self._output, self.output = output, output.detach()
        self._dummy = torch.zeros_like(self.output, requires_grad=True)  # u: its value does not matter, J^T u is linear in it
        transposed = torch.autograd.grad(output, params, grad_outputs=self._dummy, create_graph=True, allow_unused=True)
        if all(t is None for t in transposed):
            raise ObjectiveError("the model's output does not depend on any of the selected parameters: check params=")
        # parameters that the output does not use have no column in J
        self._used = [j for j, t in enumerate(transposed) if t is not None and t.requires_grad]
        self._transposed = [t for t in transposed if t is not None and t.requires_grad]
        if not self._is_transposed_twice():
            self._rows, self._transposed = self._row_by_row(objective), []
        if self._rows is None:
            self.cost = graph_cost([*self._transposed, output], exclude=params)
        else:
            self.cost = GraphCost(self._rows.nbytes, closed=False)

    def _is_transposed_twice(self) -> bool:
        """Whether the double-backward trick works here: always, but for custom functions and operations without a second derivative."""
        if any(node.name() == "NotImplemented" for node in graph_nodes(self._transposed)):
            return False
        if not custom_functions([self._output]):
            return True
        generator = torch.Generator().manual_seed(0)
        u, *v = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (self.output, *self._params)]
        try:
            along = self.forward(v)
        except RuntimeError:  # marked once_differentiable
            return False
        back = [float((b * w).sum()) for b, w in zip(self.transpose(u), v, strict=True) if b is not None]
        gap = abs(float((along * u).sum()) - sum(back))  # u.(J v) - v.(J^T u)
        return gap <= _ADJOINT[self.output.dtype] * (float(along.norm() * u.norm()) + sum(map(abs, back)))

    def _row_by_row(self, objective: Objective) -> Tensor:
        """J as a matrix, (entries of the output, n)."""
        rows, layout = self.output.numel(), objective.layout
        needed = 2 * rows * layout.size * layout.dtype.itemsize  # torch.stack holds them twice for a moment
        if needed > 0.5 * available_memory(layout.device):
            raise UnsupportedError(
                f"the model has an operation that PyTorch differentiates only once, so the Jacobian of its {rows:,} outputs must be kept, "
                f"which takes {human_bytes(needed)}: use EmpiricalFisherOperator, or a smaller batch"
            )
        units = torch.eye(rows, dtype=self.output.dtype, device=self.output.device).view(rows, *self.output.shape)
        return torch.stack([layout.flatten(self.transpose(unit)) for unit in units])

    def forward(self, vectors: Sequence[Tensor], batched: bool = False) -> Tensor:
        """J v in the output's shape; ``batched`` for several v, (k, ...) each."""
        if self._rows is not None:
            flat = torch.cat([v.reshape(-1).to(self._rows) for v in vectors])
            return (self._rows @ flat).view(self.output.shape).to(self.output.dtype)
        if self._recording is not None:
            return self._recording(vectors, batched)
        if not self._transposed:
            return self.output.new_zeros((len(vectors[0]), *self.output.shape) if batched else self.output.shape)
        if self._forward_mode.used is None and not batched:
            self._forward_mode.count(self._output)
        (product,) = derivative(self._transposed, [self._dummy], [vectors[j] for j in self._used], batched=batched, zeros=True)
        assert product is not None
        return product

    def transpose(self, cotangent: Tensor, batched: bool = False) -> Pieces:
        """J^T u, one tensor per parameter; ``batched`` for several u, (k, ...)."""
        return derivative([self._output], self._params, [cotangent], batched=batched)


def _output_of(objective: Objective, piece: Piece) -> Tensor:
    def predict() -> Tensor:
        objective.seed_for(piece.key[0])  # the same dropout masks as in the objective's own evaluation
        output = objective.predict(piece.batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ObjectiveError(f"the model's output must be one floating-point tensor (or have .logits), got {type(output).__name__}")
        if not output.requires_grad:
            raise ObjectiveError("the model's output does not depend on any trainable parameter: it was detached, or made under no_grad()")
        return output

    return objective.twice_differentiable(predict, once=True)


class RecordedOutput(NamedTuple):
    """The model's output on one piece with its graph, J v as a recording, and what both keep alive."""

    output: Tensor
    recording: Recording
    cost: GraphCost


def record_output(objective: Objective, piece: Piece) -> RecordedOutput | None:
    """None where it cannot be recorded, or what is kept would call code other than torch's own."""
    params = objective.layout.params
    if (recorded := record(lambda: _output_of(objective, piece), objective.model, params)) is None:
        return None
    output, recording = recorded
    cost = graph_cost([output], exclude=params, beside=recording.constants)
    return RecordedOutput(output, recording, cost) if cost.closed else None


def output_gradient(objective: Objective, output: Tensor, target: Any, *, number: int, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """The loss's gradient in the output, and the output it was taken at (a leaf), both in the output's shape.

    Args:
        objective: with ``loss=``.
        output: where the gradient is taken.
        target: what the loss compares it with.
        number: number of the batch, for messages.
        create_graph: whether the gradient is to be differentiated again.
    """
    leaf = output.detach().requires_grad_()  # cut off from the model, so that the second derivative is the loss's alone

    def evaluate() -> Tensor:
        return check_loss(objective.output_loss(leaf, target), number)

    loss = objective.twice_differentiable(evaluate) if create_graph else evaluate()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return gradient, leaf


def _check_loss_curvature(objective: Objective, slope: Tensor, leaf: Tensor, target: Any, *, number: int) -> None:
    """Refuse a loss whose second derivative in the output is not the derivative of its first, as that of a fused custom function is."""
    if not objective.second_order.doubts:
        return
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    step = _SLOPE_STEP * float(leaf.detach().norm()) / float(direction.norm()) or _SLOPE_STEP
    up, down = (output_gradient(objective, leaf + sign * step * direction, target, number=number)[0] for sign in (1.0, -1.0))
    expected = (up - down) / (2 * step)
    exact = torch.zeros_like(leaf)
    if slope.requires_grad:
        (exact,) = torch.autograd.grad(slope, leaf, direction, retain_graph=True, allow_unused=True, materialize_grads=True)
    if float((exact - expected).norm()) > _SLOPE_AGREE * float(torch.maximum(exact.norm(), expected.norm())):
        raise UnsupportedError(
            f"the second derivative of the loss in the output is wrong ({', '.join(sorted(objective.second_order.doubts))}): compute the "
            "loss by torch.nn.functional, write the backward of a custom function in torch operations, or use EmpiricalFisherOperator"
        )


class OutputOperator(CurvatureOperator):
    """A curvature operator through the Jacobian of the model's output.

    Attributes:
        forward_mode: how J v is computed; ``forward_mode.used`` says whether by recorded forward mode, None before that was tried.
    """

    def __init__(self, objective: Objective, *, retain: bool | str = "auto", memory_limit: float | None = None) -> None:
        super().__init__(objective, retain=retain, memory_limit=memory_limit)
        self.forward_mode = ForwardMode()
        self._recorded: tuple[Piece, RecordedOutput] | None = None  # what the trial has made, until its product is built

    def choices(self) -> Mapping[str, str]:
        told = super().choices()
        if self.forward_mode.used is None:
            return told
        return {**told, "J v": "by recorded forward mode" if self.forward_mode.used else "by double backward"}

    def _jacobian(self, piece: Piece) -> OutputJacobian:
        tried = self._recorded
        return OutputJacobian(self.objective, piece, self.forward_mode, tried[1] if tried is not None and tried[0] is piece else None)

    def _peak(self) -> float:
        return _RECORDING if self.forward_mode.used else super()._peak()

    def _may_improve(self) -> bool:
        return self.forward_mode.due

    def _improve(self) -> None:
        """On the first piece, record J v and take that way from now on if it is right, faster, and what it keeps fits."""
        self.forward_mode.used = False  # until more is known, also after an exception
        if (piece := next(self.objective.pieces(join=self._joins), None)) is None:  # a process without data
            return
        jacobian = OutputJacobian(self.objective, piece, self.forward_mode)
        held, kept = jacobian.cost.nbytes, self.bytes_kept()
        if not jacobian.cost.closed or _TRIAL * held > self.free_memory():
            return
        recorded = record_output(self.objective, piece)
        # more than today's graph only where that fits, too
        if recorded is None or (recorded.cost.nbytes > held and kept * recorded.cost.nbytes > held * self._limit()):
            return
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self.layout.params]
        self.forward_mode.decide(lambda: jacobian.forward(v), recorded.recording, v, rounding=self.rounding)
        if not self.forward_mode.used or not self._kept:
            return
        try:
            self._recorded = (piece, recorded)
            for each in itertools.chain([piece], itertools.islice(self.objective.pieces(join=self._joins), 1, None)):
                if each.key in self._kept:
                    self._kept[each.key] = self._build(each)
        finally:
            self._recorded = None


class GaussNewtonOperator(OutputOperator):
    """G = (1/C) sum_i J_i^T S_i J_i, with J the Jacobian of the output and S the Hessian of the loss in the output.

    Positive semi-definite where the loss is convex in the output (cross-entropy, squared error, binary cross-entropy, Huber); equal to the
    Fisher matrix for cross-entropy and for squared error. Any twice differentiable loss(output, target) works; the objective must be made
    with ``loss=``, or with dict batches of a model whose own loss is one cross-entropy behind a linear layer, as of Hugging Face's.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
        >>> G = sk.GaussNewtonOperator(sk.Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> G.to_dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    References:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 14 (2002).
    """

    def _build(self, piece: Piece) -> PieceProduct:
        if (product := product_in_chunks(self.objective, piece, "gauss_newton")) is not None:
            return product
        jacobian = self._jacobian(piece)
        slope, leaf = output_gradient(self.objective, jacobian.output, jacobian.target, number=piece.key[0], create_graph=True)
        _check_loss_curvature(self.objective, slope, leaf, jacobian.target, number=piece.key[0])

        num_params = len(self.layout.params)  # not the operator itself, which keeps the product: a cycle, which would keep the data

        def multiply(vectors: Sequence[Tensor], batched: bool) -> Pieces:
            if not slope.requires_grad:  # a loss that is linear in the output
                return [None] * num_params
            (curved,) = derivative([slope], [leaf], [jacobian.forward(vectors, batched)], batched=batched, zeros=True)
            assert curved is not None
            return jacobian.transpose(curved, batched)

        return PieceProduct(multiply, piece.weight, jacobian.cost)

    def _look_into_doubts(self) -> None:
        look_into_doubts(self.objective, HessianOperator, first_alone=True)
