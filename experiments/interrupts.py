"""Ctrl-C at random instants over the five calls that touch a training run: is anything left changed?

    python -m experiments.interrupts                    # results/interrupts.jsonl, 2000 signals in eight minutes
    python -m experiments.interrupts --signals 200

Rows of kind "random": another process sends SIGINT after a delay drawn uniformly over the call's own duration. "swept": the signal is
sent at a bytecode of the guard's own code, counted off, which no timer hits often enough. At the moment the exception arrives,
parameters, gradients, buffers, flags, hooks, optimizer, random states, kernel switches, warning filters, the lock that other threads wait
for and the signal's handler are compared with what they were, bit for bit and object by object; then the same call must give the same
answer as before. "late" signals came too late.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sharpkit as sk
from experiments._common import HERE, Row, circumstances, rounded
from sharpkit.objective.guard import TURN

_SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    pid, delay = line.split()
    end = time.perf_counter() + float(delay)
    while time.perf_counter() < end:
        pass
    os.kill(int(pid), signal.SIGINT)
"""


class Training:
    """A network in the midst of training: batch norm, dropout, gradients, hooks, optimizer state."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.batch = (torch.randn(48, 6), torch.randint(3, (48,)))
        self.model[0].weight.register_hook(lambda g: g)
        self.model[4].register_full_backward_hook(lambda m, given, out: None)
        F.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
        self.optimizer.step()
        self.model[3].eval()
        self.objective = sk.Objective(self.model, self.batch, loss=F.cross_entropy)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Each of the five, as small as it gets: a guard is then a large part of it."""

        def monitored() -> Any:
            monitor = sk.Monitor(self.model, self.optimizer, loss=F.cross_entropy, metrics=["lambda_max", "critical_sharpness"], every=1)
            return monitor.step(self.batch).values["lambda_max"].value

        def curve() -> Any:
            result = sk.learning_rate_curve(self.objective, self.optimizer, batch_sizes=[8, 16], pilot=10, calibrate=False)
            return result.to_dict()["rows"][0]["max_lr"]

        return {
            "measure": lambda: float(sk.measure(self.objective, optimizer=self.optimizer, num_probes=3, num_steps=6).trace),
            "eigenpairs": lambda: sk.eigenpairs(sk.HessianOperator(self.objective), k=2, seed=1).values.tolist(),
            # of a layer without hooks on its parameters: products over kept graphs, which take no guard
            "trace": lambda: float(sk.trace(sk.HessianOperator(self.objective.with_params("4.*")), max_matvecs=24)),
            "learning_rate_curve": curve,
            "monitor.step": monitored,
        }

    def state(self) -> dict[str, Any]:
        """What may be compared with ==, object by object where an object must stay the very same."""
        modules, params = list(self.model.modules()), list(self.model.parameters())
        buffers = [(name, b) for m in modules for name, b in m._buffers.items()]
        return {
            "parameters": [(id(p), p._version, p.detach().numpy().tobytes()) for p in params],
            "gradients": [(id(p.grad), p.grad.numpy().tobytes() if p.grad is not None else b"") for p in params],
            "buffers": [(name, id(b), b._version, b.numpy().tobytes()) for name, b in buffers],
            "flags": [m.training for m in modules],
            "hooks": [id(p._backward_hooks) for p in params] + [(id(m._backward_hooks), len(m._forward_hooks)) for m in modules],
            "optimizer": repr(self.optimizer.state_dict()),
            "torch random": torch.get_rng_state().numpy().tobytes(),
            "numpy random": str(np.random.get_state()),  # noqa: NPY002
            "python random": random.getstate(),
            "switches": (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cudnn.enabled,
                torch._C._len_torch_function_stack(),
                torch._C._len_torch_dispatch_stack(),
            ),
            "warning filters": (id(warnings.filters), len(warnings.filters), warnings.showwarning is _SHOW),
            "turn": TURN._is_owned(),  # type: ignore[attr-defined]
            "handler": signal.getsignal(signal.SIGINT),
        }


_SHOW = warnings.showwarning


def interrupted(training: Training, call: Callable[[], Any], arm: Callable[[], None], disarm: Callable[[], None]) -> list[str] | None:
    """What a call that is interrupted leaves changed; None where it ended before the signal came."""
    before = training.state()
    try:
        arm()
        call()
        return None
    except KeyboardInterrupt:  # while the traceback, and with it every frame, is still alive
        after = training.state()
    finally:
        disarm()
    return [key for key in before if before[key] != after[key]]


def random_instants(training: Training, name: str, *, signals: int, seed: int) -> Row:
    """SIGINTs from another process at instants drawn over the call's duration."""
    call, draw = training.calls()[name], np.random.default_rng(seed)
    expected = call()
    began = time.perf_counter()
    call()
    duration = time.perf_counter() - began
    changed: dict[str, int] = {}
    hits, late, states = 0, 0, 0
    with subprocess.Popen([sys.executable, "-c", _SENDER], stdin=subprocess.PIPE, text=True, preexec_fn=os.setsid) as sender:
        assert sender.stdin is not None

        def arm() -> None:
            sender.stdin.write(f"{os.getpid()} {draw.uniform(0, duration)}\n")
            sender.stdin.flush()

        for _ in range(signals):
            left = interrupted(training, call, arm, lambda: None)
            if left is None:
                late += 1
                with suppress(KeyboardInterrupt):
                    time.sleep(30)
                continue
            hits, states = hits + 1, states + bool(left)
            for key in left:
                changed[key] = changed.get(key, 0) + 1
    return {
        "kind": "random",
        "call": name,
        "seconds": duration,
        "interrupted": hits,
        "late": late,
        "states_changed": states,
        "changed": changed,
        "same_answer_afterwards": call() == expected,
    }


def swept_instants(training: Training, name: str, *, instants: int, most: int = 4000) -> Row:
    """SIGINTs at bytecodes of the guard's code and of the contexts that it enters, spread evenly over the first ``most``."""
    call = training.calls()[name]
    expected = call()
    own = ("guard.py", "interrupts.py", "contextlib.py", "grad_mode.py", "autocast_mode.py", "attention/__init__.py")
    changed: dict[str, int] = {}
    hits, late, states = 0, 0, 0
    for at in range(0, most, max(1, most // instants)):
        count = 0

        def trace(frame: FrameType, event: str, _: Any, at: int = at) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.endswith(own):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                count += 1
                if count == at + 1:
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for this once, when tracing begins
        left = interrupted(training, call, lambda: sys.settrace(trace), lambda: sys.settrace(None))
        if left is None:
            late += 1
            continue
        hits, states = hits + 1, states + bool(left)
        for key in left:
            changed[key] = changed.get(key, 0) + 1
    row = {"kind": "swept", "call": name, "interrupted": hits, "late": late, "states_changed": states, "changed": changed}
    return {**row, "same_answer_afterwards": call() == expected}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--signals", type=int, default=2000, help="in all, at random instants (default: %(default)s)")
    parser.add_argument("--instants", type=int, default=80, help="bytecodes of each call (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "interrupts.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with SIGINT ignored
    training, began, rows = Training(), time.perf_counter(), list[Row]()
    for seed, name in enumerate(training.calls()):
        rows.append(random_instants(training, name, signals=options.signals // 5, seed=seed))
        print(rows[-1], flush=True)
        rows.append(swept_instants(training, name, instants=options.instants))
        print(rows[-1], flush=True)
    head = circumstances("interrupts", quick=False, seconds=time.perf_counter() - began)
    options.out.write_text("".join(json.dumps(rounded(row)) + "\n" for row in [head, *rows]))
    print(f"{sum(row['interrupted'] for row in rows)} interrupted, {sum(row['states_changed'] for row in rows)} states changed")


if __name__ == "__main__":
    main()
