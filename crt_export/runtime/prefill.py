"""One chunk of tokens of neighbouring rows through the prefill graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crt_export.engine.base import Buffer, Engine, Launch, Program, Rows
from crt_export.runtime.rows import padded

#: Gives the session's rows that a graph's tensor of this name is bound to.
SharedRows = Callable[[str], Rows]


@dataclass(frozen=True, kw_only=True)
class PrefillCall:
    """A chunk and how it runs.

    Attributes:
        tokens: Per row int64 [length], at least one token each.
        seq: Length they are padded to.
        hidden: Hidden size.
        recurrent: Whether the model has a recurrent state, hence passes and a residual.
        passes: None for the unrolled graph; else that many calls of ``prefill_pass``, each fed the hidden
            iterate of the one before.
    """

    tokens: Sequence[np.ndarray]
    seq: int
    hidden: int
    recurrent: bool
    passes: int | None

    def run(self, engine: Engine, shared: SharedRows) -> np.ndarray | None:
        """Run it; state and caches of the last pass are left where ``shared`` says.

        Returns:
            The residual, float32 [rows]; None for a plain transformer.
        """
        graph = "prefill" if self.passes is None else "prefill_pass"
        program = engine.program(graph)
        own = {
            "input_ids": _filled(engine, padded(self.tokens, self.seq)),
            "length": _filled(engine, np.asarray([row.size for row in self.tokens], np.int64)),
        }
        count = len(self.tokens)
        iterate = (count, self.seq, self.hidden)
        # The first iterate is zeros, as allocated. A second buffer takes the result; passes swap the two.
        iterates = [_whole(engine.allocate(iterate, "float32")) for _ in range(2)]
        if self.recurrent:
            own["residual"] = _whole(engine.allocate((count,), "float32"))
        launches: dict[int, Launch] = {}
        for number in range(self.passes or 1):
            parity = number % 2
            if parity not in launches:
                ends = {"hidden": iterates[parity], "next_hidden": iterates[1 - parity]}
                launches[parity] = bind_by_name(program, {**own, **ends}, shared)
            launches[parity]()
        return own["residual"].buffer.read() if self.recurrent else None


def bind_by_name(program: Program, own: Mapping[str, Rows], shared: SharedRows, *, repeated: bool = False) -> Launch:
    """Bind every input and output of a program, from ``own`` or else from the session's tensors."""
    inputs, outputs = (
        {spec.name: own[spec.name] if spec.name in own else shared(spec.name) for spec in specs}
        for specs in (program.inputs, program.outputs)
    )
    return program.bind(inputs, outputs, repeated=repeated)


def _filled(engine: Engine, values: np.ndarray) -> Rows:
    buffer = engine.allocate(values.shape, "int64")
    buffer.write(values)
    return _whole(buffer)


def _whole(buffer: Buffer) -> Rows:
    return Rows(buffer, 0, buffer.shape[0])
