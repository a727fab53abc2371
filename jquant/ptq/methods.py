"""The solvers by name. A new method is one file of ptq/ and one line of `SOLVERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jquant.calib.gram import Gram
from jquant.core.scheme import Scheme
from jquant.ptq import gptq, gptq_factor, hqq, rtn
from jquant.ptq.cost import Cost, Shape
from jquant.ptq.solver import Solution, Solve


@dataclass(frozen=True)
class Method:
    """A solver, the config that its name stands for, and whether it learns from the layer's input."""

    solve: Solve
    config: Any  # a frozen dataclass; dataclasses.replace(config, …) changes a part
    needs_gram: bool
    cost: Callable[[Shape, Scheme, Any], Cost]  # of `solve`, or of `solve_with` where there is one
    factor_cost: Callable[[Shape], Cost] = lambda shape: Cost()
    # Of solvers whose work on the Gram matrix serves all layers that read the input: solve is solve_with ∘ factorize.
    factorize: Callable[..., Any] | None = None
    # The same in the memory of the Gram matrix, for the last that needs it; what is made has a `gram` that can report.
    factorize_in_place: Callable[..., Any] | None = None
    solve_with: Callable[..., Solution] | None = None
    # The programs of both, traced for operands that may be abstract: (w, gram, scheme, config, outer).
    programs: Callable[[Any, Gram, Scheme, Any, Any], list[Any]] | None = None


SOLVERS: dict[str, Method] = {
    "rtn": Method(rtn.solve, rtn.RTNConfig(), needs_gram=False, cost=rtn.cost),
    "rtn-mse": Method(rtn.solve, rtn.RTNConfig(range="mse"), needs_gram=False, cost=rtn.cost),
    "gptq": Method(
        gptq.solve,
        gptq.GPTQConfig(),
        needs_gram=True,
        cost=gptq.cost,
        factor_cost=gptq_factor.cost,
        factorize=gptq_factor.factorize,
        factorize_in_place=gptq_factor.factorize_in_place,
        solve_with=gptq.solve_with,
        programs=gptq.programs,
    ),
    "hqq": Method(hqq.solve, hqq.HQQConfig(), needs_gram=False, cost=hqq.cost),
}
