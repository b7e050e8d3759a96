"""Games with a known answer: what the objectives converge to, by the pairs and win probabilities of the selection.

A policy is a softmax table over the few responses there are, in float64; there is no text model.
"""

import math
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from align.choices import WinProb
from align.config import SelectionConfig
from align.onpolicy.select import Candidate, ScoredPrompt, preferences, select, select_pair, win_probs
from objectives import Response, build

# Rock-paper-scissors with weights: P(row beats column) = 1/2 + A, where
#         rock  paper  scissors
#   A = [ 0     -b     c ]    paper beats rock with 1/2 + b,     b = 0.4
#       [ b     0      -a]    scissors beat paper with 1/2 + a,  a = 0.1
#       [ -c    a      0 ]    rock beats scissors with 1/2 + c,  c = 0.2
# The von Neumann winner p is what nothing beats: A p <= 0 in every row. As p A p = 0 for an antisymmetric A, the rows
# that p plays have (A p)_i = 0: c p_S = b p_P, b p_R = a p_S, a p_P = c p_R. So p is in proportion to (a, c, b): it is
# (1, 2, 4) / 7. There is no other: for a winner q, p A q = 0 and p > 0 make A q = 0, and A has rank 2.
RESPONSES = ("rock", "paper", "scissors")
GAME = [[0.5, 0.1, 0.7], [0.9, 0.5, 0.4], [0.3, 0.6, 0.5]]


def table(*probabilities: float) -> Tensor:
    """[K] a policy."""
    return torch.tensor(probabilities, dtype=torch.float64)


WINNER = table(1 / 7, 2 / 7, 4 / 7)


def duality_gap(policy: Tensor) -> float:
    """max_q P(q beats policy) - min_q P(policy beats q), twice the best answer's lead. The winner's is 0."""
    return 2 * (max(win_probs(GAME, policy.tolist())) - 0.5)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """[K] log-probabilities of the softmax table of least loss, from those of a start policy."""
    scale = (-start / 2).exp()  # rare responses move as fast as common ones
    moves = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.LBFGS([moves], max_iter=50, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(log_softmax(start + scale * moves, 0))
        value.backward()
        return value

    optimizer.step(step)
    return log_softmax(start + scale * moves.detach(), 0)


def side(logp: Tensor, ref_logp: Tensor, indices: Sequence[int], wins: Sequence[float]) -> Response:
    """One side of as many pairs as there are indices."""
    at = list(indices)
    return Response(logp=logp[at], ref_logp=ref_logp[at], win_prob=table(*wins))


def average_of_iterates(iterate: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """[K] mean of the policies that self-play goes through, from the start policy on."""
    logp, total = start.log(), torch.zeros_like(start)
    for _ in range(iterations):
        total += logp.exp()
        logp = iterate(logp)
    return total / iterations


def test_the_winner_of_the_game_is_beaten_by_nothing():
    assert win_probs(GAME, WINNER.tolist()) == pytest.approx([0.5] * 3)
    assert duality_gap(WINNER) == pytest.approx(0, abs=1e-12)
    # Against (.4, .4, .2) paper wins .4 * .9 + .4 * .5 + .2 * .4 = .64, the most: the gap is 2 * .14.
    assert duality_gap(table(0.4, 0.4, 0.2)) == pytest.approx(0.28)


def test_sppo_in_expectation_approaches_the_von_neumann_winner():
    # The loss in expectation, exactly: both responses of a pair are drawn from the policy of the iteration before. The
    # iterates themselves circle the winner, outwards; what converges, in the paper as here, is their average.
    objective = build({"name": "sppo", "beta": 1.0, "target": "soft"})
    every = [(i, j) for i in range(3) for j in range(3)]
    chosen, rejected = zip(*every, strict=True)

    def iterate(ref_logp: Tensor) -> Tensor:
        policy = ref_logp.exp()
        wins = win_probs(GAME, policy.tolist())
        weights = torch.stack([policy[i] * policy[j] for i, j in every])

        def loss(logp: Tensor) -> Tensor:
            sides = (side(logp, ref_logp, own, [wins[i] for i in own]) for own in (chosen, rejected))
            return (weights * objective(*sides).loss).sum()

        return minimise(loss, ref_logp)

    start = table(0.4, 0.4, 0.2)
    average = average_of_iterates(iterate, start, iterations=200)
    assert duality_gap(average) <= duality_gap(start) / 10
    assert average.tolist() == pytest.approx(WINNER.tolist(), abs=0.05)


def test_sppo_on_the_best_against_the_worst_of_samples_approaches_the_von_neumann_winner():
    # As in a run: a pairwise scorer compares K samples, here in the policy's proportions, and one pair is trained on.
    # Its two log-ratios are drawn to (P - 1/2) / beta = eta (P - 1/2). The third response has no target, and what the
    # others leave over is its own to first order in eta, as the policy's mean of P - 1/2 is 0. (Not at large steps:
    # with beta = 1, a third response that is rare dies out.)
    # To first order a step moves the policy by eta p_i (A p)_i, near the winner a rotation by eta * sqrt(sum over pairs
    # of p_i p_j A_ij^2) = eta * sqrt((2 * .16 + 4 * .04 + 8 * .01) / 49) = .1069 eta: 118 steps a round at eta = 1/2.
    objective = build({"name": "sppo", "beta": 2.0, "target": "soft"})

    def iterate(ref_logp: Tensor) -> Tensor:
        samples = [i for i, p in enumerate(ref_logp.exp().tolist()) for _ in range(round(70 * p))]
        candidates = [Candidate(text=RESPONSES[i], length=1) for i in samples]
        matrix = [[GAME[i][j] for j in samples] for i in samples]
        prompt = ScoredPrompt(id="the game", candidates=candidates, preferences=matrix)
        pairs, _ = select([prompt], SelectionConfig(), seed=0)
        if not pairs:  # all win equally often: nothing to learn
            return ref_logp
        pair = pairs["the game"]
        chosen, rejected = RESPONSES.index(pair.chosen), RESPONSES.index(pair.rejected)

        def loss(logp: Tensor) -> Tensor:
            better = side(logp, ref_logp, [chosen], [pair.chosen_win_prob])
            worse = side(logp, ref_logp, [rejected], [pair.rejected_win_prob])
            return objective(better, worse).loss.sum()

        return minimise(loss, ref_logp)

    start = table(0.25, 0.25, 0.5)
    average = average_of_iterates(iterate, start, iterations=118)
    assert duality_gap(average) <= duality_gap(start) / 10
    assert average.tolist() == pytest.approx(WINNER.tolist(), abs=0.02)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpos_minimiser_is_the_reference_tilted_by_the_reward(beta):
    # Bradley-Terry: P(i beats j) = s(r_i - r_j). The expected loss of a pair, -P log s(beta Delta)
    # - (1 - P) log s(-beta Delta), is least where s(beta Delta) = P, that is beta Delta = r_i - r_j. For all pairs at
    # once: beta log(pi / pi_ref) = r + a constant, so pi is in proportion to pi_ref exp(r / beta).
    rewards = [1.0, 0.25, -0.5, 0.0]
    ref = table(0.1, 0.2, 0.3, 0.4)
    objective = build({"name": "dpo", "beta": beta})
    matrix = preferences(rewards, temperature=1)
    candidates = [Candidate(text=str(i), length=1, score=reward) for i, reward in enumerate(rewards)]

    pairs = []  # (chosen, rejected, probability of this label)
    for i in range(4):
        for j in range(i):
            two = [[matrix[a][b] for b in (i, j)] for a in (i, j)]
            pair = select_pair([candidates[i], candidates[j]], two, SelectionConfig(win_prob=WinProb.pair), Random(0))
            chosen, rejected = int(pair.chosen), int(pair.rejected)
            pairs += [(chosen, rejected, pair.chosen_win_prob), (rejected, chosen, pair.rejected_win_prob)]
    chosen, rejected, labels = zip(*pairs, strict=True)

    def loss(logp: Tensor) -> Tensor:
        sides = (Response(logp=logp[list(own)], ref_logp=ref.log()[list(own)]) for own in (chosen, rejected))
        return (table(*labels) * objective(*sides).loss).sum()

    policy = minimise(loss, ref.log()).exp()
    tilted = ref * table(*(math.exp(reward / beta) for reward in rewards))
    assert policy.tolist() == pytest.approx((tilted / tilted.sum()).tolist(), abs=1e-3)
    assert max(abs(policy - ref)) > 0.05  # it did move
