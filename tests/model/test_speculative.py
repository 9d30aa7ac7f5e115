"""Speculative rounds against the distribution itself: every draw is enumerated, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from model.generation.speculative import next_jacobi_guess, speculative_round

NUM_CODES, LENGTH = 4, 3
PLACES = NUM_CODES ** torch.arange(LENGTH)


class AllDraws:
    """Row r of the batch takes possibility r of a table of all draws, and remembers how likely that was."""

    def __init__(self, choices: torch.Tensor, weights: torch.Tensor) -> None:
        self.choices, self.weights, self.used = choices, weights, 0

    def take(self, count: int) -> torch.Tensor:
        taken = self.choices[:, self.used : self.used + count]
        self.used += count
        return taken

    def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
        chosen = self.take(probabilities.shape[1])
        shares = probabilities / probabilities.sum(-1, keepdim=True)
        self.weights = self.weights * shares.gather(-1, chosen[..., None]).squeeze(-1).prod(-1)
        return chosen

    def accepted(self, probabilities: torch.Tensor) -> torch.Tensor:
        chosen = self.take(probabilities.shape[1]).bool()
        self.weights = self.weights * torch.where(chosen, probabilities, 1 - probabilities).prod(-1)
        return chosen


def possibilities(width: int) -> torch.Tensor:
    """Of one round: guesses, whether each is kept, the replacement."""
    sizes = [NUM_CODES] * width + [2] * width + [NUM_CODES]
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


class World:
    """A random model of three codes: p(code i | codes before it), by the number that those make."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn((LENGTH, NUM_CODES**LENGTH, NUM_CODES), generator=generator, dtype=torch.float64)
        logits[0, 0, 2] = -torch.inf  # a code that never begins an image
        self.tables = (2 * logits).softmax(-1)
        guesses = torch.randn((LENGTH + 1, NUM_CODES**LENGTH, LENGTH, NUM_CODES), generator=generator)
        self.guesses = guesses.double().softmax(-1)

    def said(self, codes: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[B, K] of code `at` of each row, given the codes before it."""
        known = torch.arange(LENGTH) < at[:, None]
        return self.tables[at, (codes * PLACES * known).sum(1)]

    def whole(self) -> torch.Tensor:
        """[K ** LENGTH], of every image."""
        images = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=LENGTH)))
        total = torch.ones(len(images), dtype=torch.float64)
        for at in range(LENGTH):
            step = self.said(images, torch.full((len(images),), at))
            total *= step.gather(1, images[:, at : at + 1]).squeeze(1)
        result = torch.zeros(NUM_CODES**LENGTH, dtype=torch.float64)
        return result.index_add_(0, (images * PLACES).sum(1), total)


def window_target(world: World, codes: torch.Tensor, accepted: torch.Tensor):  # type: ignore[no-untyped-def]
    def target(guesses: torch.Tensor) -> torch.Tensor:
        said, drafted = [], codes.clone()
        for column in range(guesses.shape[1]):
            at = (accepted + column).clamp(max=LENGTH - 1)
            said.append(world.said(drafted, at))
            drafted.scatter_(1, at[:, None], guesses[:, column : column + 1])
        return torch.stack(said, 1)

    return target


def enumerate_rounds(world: World, width: int, jacobi: bool) -> tuple[torch.Tensor, float]:
    """The distribution of the images, and the mean number of rounds."""
    choices = possibilities(width)
    codes, accepted = torch.zeros((1, LENGTH), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    weights = torch.ones(1, dtype=torch.float64)
    guess = torch.full((1, width, NUM_CODES), 1 / NUM_CODES, dtype=torch.float64)
    drafts = torch.zeros((1, LENGTH), dtype=torch.int64)
    final, rounds = torch.zeros(NUM_CODES**LENGTH, dtype=torch.float64), 0.0
    while len(codes):
        if not jacobi:  # guesses depend on what is accepted and on the forgotten guesses, as those of noisy codes do
            columns = (accepted[:, None] + torch.arange(width)).clamp(max=LENGTH - 1)
            tables = world.guesses[accepted, (drafts * PLACES).sum(1)]
            guess = tables.gather(1, columns[..., None].expand(-1, -1, NUM_CODES))
        rounds += float(weights.sum())
        wide = [values.repeat_interleave(len(choices), 0) for values in (codes, accepted, weights, guess, drafts)]
        codes, accepted, weights, guess, drafts = wide
        draws = AllDraws(choices.repeat(len(codes) // len(choices), 1), weights)
        left = LENGTH - accepted
        found, num, guesses, said = speculative_round(guess, window_target(world, codes, accepted), left, draws)
        for column in range(width):
            at = (accepted + column).clamp(max=LENGTH - 1)[:, None]
            for into, values, valid in ((codes, found, column < num), (drafts, guesses, column < left)):
                into.scatter_(1, at, torch.where(valid, values[:, column], into.gather(1, at)[:, 0])[:, None])
        accepted, weights = accepted + num, draws.weights
        guess = next_jacobi_guess(said, num)
        done = accepted >= LENGTH
        final.index_add_(0, (codes[done] * PLACES).sum(1), weights[done])
        rest = ~done & (weights > 0)
        codes = torch.where(torch.arange(LENGTH) < accepted[:, None], codes, 0)
        memory = guess.flatten(1) if jacobi else drafts.double()
        keys = torch.cat((codes.double(), accepted[:, None].double(), memory), 1)[rest]
        unique, index = keys.unique(dim=0, return_inverse=True)  # rows that go on alike are one
        codes, accepted = unique[:, :LENGTH].long(), unique[:, LENGTH].long()
        if jacobi:
            guess = unique[:, LENGTH + 1 :].view(-1, width, NUM_CODES)
            drafts = torch.zeros((len(unique), LENGTH), dtype=torch.int64)
        else:
            drafts = unique[:, LENGTH + 1 :].long()
        weights = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, index, weights[rest])
    return final, rounds


@pytest.mark.parametrize(("width", "jacobi"), [(2, True), (3, True), (3, False)], ids=["sjd_2", "sjd_3", "verified"])
def test_images_have_the_distribution_of_token_by_token_decoding(width: int, jacobi: bool) -> None:
    world = World(seed=width)
    expected = world.whole()
    found, rounds = enumerate_rounds(world, width, jacobi)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert 0.5 * (found - expected).abs().sum() <= 1e-12
    assert rounds < LENGTH, "fewer rounds than codes"


def test_good_guesses_save_rounds() -> None:
    """Guesses of what is said anyway are all kept."""
    said = World(seed=1).tables[0, :1, None].expand(1, 3, -1)

    class Halves:
        def categorical(self, probabilities: torch.Tensor) -> torch.Tensor:
            return probabilities.argmax(-1)

        def accepted(self, probabilities: torch.Tensor) -> torch.Tensor:
            return probabilities > 0.5

    codes, num, *_ = speculative_round(said, lambda guesses: said, torch.tensor([3]), Halves())
    assert num.tolist() == [3]
    assert (codes == said.argmax(-1)).all()
