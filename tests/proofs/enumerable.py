"""The enumerable world: three words and an end token, answers of at most three tokens. That makes 40 answers and 13
states (beginnings that are not finished), so every expectation is a sum of 40 terms and nothing is left to chance.

Two kinds of policy live in it: a table of logits, one row per state, and nanopost's own GPT with a vocabulary of four.

    answer   0 1 end | 2 end | end | 1 1 0 (cut off: it has no end token) | ...
    rows     prompt and answer, right-padded: ids (40, 5), target-aligned tensors (40, 4) as everywhere in nanopost

The optimum of  E[ r(y) - beta log(pi(y) / ref(y)) ]  over all policies is  pi*(y) = ref(y) exp(r(y) / beta) / Z, and
its value is beta log Z.
"""

import torch

from nanopost.data import Example, Pair
from nanopost.model import GPT, GPTConfig

WORDS, END, VOCAB, LONGEST = (0, 1, 2), 3, 4, 3
PROMPT = [1, 2]
NOWHERE = "no-such-folder"  # --out of the runs here: nothing is written, and nobody else holds its lock


def answers(begin=()):
    """All answers that start with `begin`, in the order of a tree's leaves."""
    if begin and begin[-1] == END or len(begin) == LONGEST:
        return [begin]
    return [answer for token in (*WORDS, END) for answer in answers((*begin, token))]


def example(answer, prompt=PROMPT) -> Example:
    return Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


ANSWERS = answers()  # 40 tuples of 1 to 3 tokens
STATES = sorted({answer[:t] for answer in ANSWERS for t in range(len(answer))}, key=lambda s: (len(s), s))  # 13
EXAMPLES = [example(answer) for answer in ANSWERS]
EVERY_PAIR = [(i, j) for i in range(len(ANSWERS)) for j in range(len(ANSWERS)) if i != j]  # 1560

# target-aligned, (40, 4): column 0 is about the prompt's second token, columns 1 to 3 about the answer
MASK = torch.tensor([[False] + [t < len(answer) for t in range(LONGEST)] for answer in ANSWERS])
LENGTHS = torch.tensor([len(PROMPT) + len(answer) for answer in ANSWERS])
IDS = torch.tensor([PROMPT + list(answer) + [0] * (LONGEST - len(answer)) for answer in ANSWERS])  # (40, 5)
TOKENS = IDS[:, 1:]  # (40, 4)
STATE = torch.tensor(  # (40, 4): the row of the table that the token is drawn from
    [[0] + [STATES.index(answer[:t]) if t < len(answer) else 0 for t in range(LONGEST)] for answer in ANSWERS]
)
FINISHED = torch.tensor([answer[-1] == END for answer in ANSWERS])


def pairs_of(rows) -> list[Pair]:
    """[(i, j), ...] -> the pairs in which answer i is preferred to answer j."""
    return [Pair(EXAMPLES[i], EXAMPLES[j]) for i, j in rows]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_table(seed):
    """A policy as a table of logits (13, 4)."""
    return randn(len(STATES), VOCAB, seed=seed)


def random_scores(seed):
    """A reward for every answer, (40,)."""
    return randn(len(ANSWERS), seed=seed)


def table_logprobs(table):
    """Token log-probabilities (40, 4) of a table policy, 0 outside the mask; their sum over a row is log pi(answer)."""
    return table.log_softmax(-1)[STATE, TOKENS].masked_fill(~MASK, 0.0)


def table_of(logp):
    """The table whose answers have the log-probabilities logp (40,): a logit sums over all answers that go on with its
    token."""
    table = torch.full((len(STATES), VOCAB), -1e9, dtype=torch.float64)
    for row, state in enumerate(STATES):
        for token in (*WORDS, END):
            table[row, token] = logp[going_on(*state, token)].logsumexp(0)
    return table


def going_on(*begin):
    """The rows of the answers that start with `begin`."""
    return [i for i, answer in enumerate(ANSWERS) if answer[: len(begin)] == begin]


def per_state(function):
    """function(rows, t) of every state, rows being the answers through it and t its length -> (13,)."""
    return torch.stack([function(going_on(*state), len(state)) for state in STATES])


def optimum(ref, scores, beta):
    """log pi* (40,) and log Z, for the reference's log-probabilities of the answers (40,)."""
    unnormalised = ref + scores / beta
    return unnormalised - unnormalised.logsumexp(0), unnormalised.logsumexp(0)


def kl(p, q):
    """KL(p || q) in nats of two vectors of log-probabilities."""
    return (p.exp() * (p - q)).sum()


def total_variation(p, q):
    """Half the sum of the differences of the probabilities: 0 for equal distributions, at most 1."""
    return 0.5 * (p.exp() - q.exp()).abs().sum().item()


def objective(logp, ref, scores, beta):
    """E[r] - beta KL(pi || ref), what PPO and DPO maximise."""
    return (logp.exp() * scores).sum() - beta * kl(logp, ref)


def soft_values(table, scores, beta):
    """V(s) = beta log sum over the answers through s of ref(rest | s) exp(r / beta): the value under the optimum."""
    logp = table_logprobs(table)
    return per_state(lambda rows, t: beta * (logp[rows, 1 + t :].sum(1) + scores[rows] / beta).logsumexp(0))


def exact_values(logp, rewards):
    """V(s) of a policy: the expected sum of the rewards to come (gamma 1). logp and rewards (40, 4)."""
    return per_state(lambda rows, t: (logp[rows, 1 + t :].sum(1).exp() * rewards[rows, 1 + t :].sum(1)).sum())


def gae_by_double_sum(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, with the value 0 after a row's last token: (B, T) each."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        tokens = mask[b].nonzero()[:, 0].tolist()
        for t in tokens:
            for u in [u for u in tokens if u >= t]:
                after = values[b, u + 1] if u + 1 in tokens else 0.0
                advantages[b, t] += (gamma * lam) ** (u - t) * (rewards[b, u] + gamma * after - values[b, u])
    return advantages


def tiny_gpt(seed=0, n_embd=16, noise=0.3) -> GPT:
    """nanopost's GPT with this world's vocabulary, in double precision, far from its initialisation."""
    model = GPT(GPTConfig(VOCAB, block_size=8, n_layer=2, n_head=2, n_embd=n_embd)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = "ln_" in name and name.endswith("weight")
            p.copy_(gain + noise * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def gpt_logprobs(model, prompt=PROMPT):
    """log pi(answer) (40,) under a GPT, by the plain definition: softmax of all logits, then a product of numbers."""
    ids = torch.tensor([list(prompt) + list(a) + [0] * (LONGEST - len(a)) for a in ANSWERS], device=model.device)
    logp = model.logits(model(ids)).log_softmax(-1)  # (40, T, 4)
    start = len(prompt) - 1
    return torch.stack([sum(logp[i, start + t, token] for t, token in enumerate(a)) for i, a in enumerate(ANSWERS)])
