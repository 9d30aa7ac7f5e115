"""What the grammar leaves no choice about, walked through once: the header of an image of a given grid, the end of an image."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.generation.grammar import GrammarState, ImageGrammar, Phase, StateRow


@dataclass
class ForcedRun:
    """Tokens that must follow, up to the first choice or to the end of the sequence."""

    ids: list[int] = field(default_factory=list)
    in_image: list[bool] = field(default_factory=list)  # the token belongs to an image block
    states: list[StateRow] = field(default_factory=list)  # behind each token


class ForcedRuns:
    """The runs of a grammar. Each is found by the machine itself and remembered: it takes as long as half a forward pass."""

    def __init__(self, grammar: ImageGrammar) -> None:
        self.grammar = grammar
        self._found: dict[StateRow, ForcedRun] = {}

    def behind(self, row: StateRow) -> ForcedRun:
        if row not in self._found:
            self._found[row] = self._walk(row)
        return self._found[row]

    def _walk(self, row: StateRow) -> ForcedRun:
        run, state = ForcedRun(), GrammarState.from_rows([row], self.grammar.device)
        while row.phase != Phase.DONE:
            ids = self.grammar.forced(state)
            if int(ids) < 0:
                break
            run.ids.append(int(ids))
            run.in_image.append(Phase.BEGIN_IMAGE <= row.phase <= Phase.IMAGE_END)
            state = self.grammar.advance(state, ids)
            (row,) = state.to_rows()
            run.states.append(row)
        return run
