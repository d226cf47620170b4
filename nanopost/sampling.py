"""Sampling: prompts of different lengths in one batch, a key-value cache, stop at the end token.

Rows start at column 0 and prompts are padded on the right, so the first pass over them is the plain causal forward, and
the finished buffer is directly a training batch. Each row writes its next token at its own column. Nothing is read back
to the host except every few steps, to drop the rows that have ended.
"""

import torch

from nanopost.data import Batch, Example, length_order
from nanopost.model import GPT, KVCache, upcast

CHECK_EVERY = 4  # decoding steps between two looks at which rows have ended
PART_ROWS = 64  # rows at least in a part of in_parts: products of fewer rows take longer per row
# Tokens of a batch in sample_text: 5 GB of keys and values for GPT-2 124M in fp32, twice that while the cache grows
BATCH_TOKENS = 2**16


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Keeps the top_k most likely tokens, and the fewest whose probabilities reach top_p; the rest get -inf. (..., V)

    For chatting only: where a truncated distribution is 0, the losses' ratios and KL are undefined."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # probability of the tokens before this one
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def choose(logits, noise, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    """The next tokens and their log-probabilities: logits (n, V), noise (n,) in [0, 1) -> (n,) int64, (n,) in nats.

    A token is where the noise falls among the cumulative probabilities, which fp32 resolves to 2^-24 = 6e-8. The
    log-probability is under the distribution sampled from. Temperature 0 takes the most likely token, with its
    log-probability at temperature 1."""
    logits = upcast(logits)
    if temperature not in (0, 1):
        logits = logits / temperature
    p = filter_logits(logits, top_k, top_p).softmax(-1)  # (n, V)
    if temperature == 0:
        token = logits.argmax(-1)  # (n,)
    else:
        cumulative = p.cumsum(-1)  # (n, V): the probability of all tokens up to this one, included
        total = cumulative[:, -1:]  # (n, 1): 1 up to rounding
        where = noise[:, None] * total
        where = torch.minimum(where, total.nextafter(torch.zeros_like(total)))  # never beyond the last token
        token = torch.searchsorted(cumulative, where, right=True)[:, 0]  # (n,)
        token = token.clamp(max=p.shape[1] - 1)  # no sum exceeds NaN: the loss will be NaN, and the run stops there
    return token, p.gather(1, token[:, None])[:, 0].log()


class Decoding:
    """R sequences while they are being sampled, n of which are still in the cache.

    ids (R, S); prompt_lengths, lengths (R,); logprobs, values (R, S-1) target-aligned; ended (R,). rows (n,) says which
    sequences the rows of the cache are, token (n,) what each of them got last.
    """

    def __init__(self, model: GPT, prompts: list[list[int]], max_new_tokens: int, pad: int):
        R, P = len(prompts), max(map(len, prompts))
        S, device = P + max_new_tokens, model.device
        ids = torch.full((R, S), pad)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        self.model = model
        self.ids = ids.to(device)
        first = {}  # prompt -> the first row that has it
        first_row = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
        different, copy_of = torch.tensor(first_row).unique(return_inverse=True)  # (U,), (R,)
        self.different, self.copy_of = different.to(device), copy_of.to(device)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts]).to(device)
        self.lengths = self.prompt_lengths.clone()
        self.logprobs = upcast(model.wte.weight.new_zeros(R, S - 1))
        self.values = torch.zeros_like(self.logprobs) if model.head is not None else None
        self.ended = torch.zeros(R, dtype=torch.bool, device=device)
        self.rows = torch.arange(R, device=device)
        self.token = None
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.wte.weight.dtype
        self.cache = KVCache(model.config, len(different), P, device, dtype)
        self.longest_prompt = P

    def prefill(self) -> torch.Tensor:
        """The forward pass over the U different prompts: hidden states at the last token of each row's, (R, C)."""
        hidden = self.model(self.ids[self.different, : self.longest_prompt], self.cache)  # (U, P, C)
        self.cache.keep(self.copy_of)
        self.cache.fill(self.prompt_lengths, self.longest_prompt)
        return hidden[self.copy_of, self.prompt_lengths - 1]

    def step(self) -> torch.Tensor:
        """The forward pass over the last tokens: the next hidden states, (n, C). Call cache.extend() first."""
        return self.model(self.token[:, None], self.cache)[:, 0]

    def append(self, hidden, end: int, noise, temperature: float, top_k: int, top_p: float):
        """Chooses every row's next token from its hidden state (n, C) and records it. noise (R, max_new_tokens)."""
        rows, column = self.rows, self.cache.pos  # (n,), (n,)
        noise = noise[rows, column - self.prompt_lengths[rows]] if temperature > 0 else None  # (n,)
        token, logprob = choose(self.model.logits(hidden), noise, temperature, top_k, top_p)
        live = ~self.ended[rows]  # (n,): rows that have ended stay as they are
        self.ids[rows, column] = torch.where(live, token, self.ids[rows, column])
        self.logprobs[rows, column - 1] = torch.where(live, logprob, 0.0)
        if self.values is not None:
            self.values[rows, column - 1] = torch.where(live, self.model.scalar(hidden), 0.0)
        self.lengths[rows] += live
        self.ended[rows] |= live & (token == end)
        self.token = token

    def drop_ended(self, at_once: bool) -> int:
        """Drops the rows that have ended: all at once, or only when a third have, since it copies the cache. Returns
        how many are still going."""
        stay = (~self.ended[self.rows]).nonzero()[:, 0]  # which of the n rows
        going = len(stay)
        if going <= (len(self.rows) - 1 if at_once else 2 * len(self.rows) // 3):
            self.rows = self.rows[stay]
            self.token = self.token[stay]
            self.cache.keep(stay)
        return going

    def batch(self) -> Batch:
        """The finished rows, cut to the longest."""
        T = int(self.lengths.max())
        column = torch.arange(1, T, device=self.ids.device)  # the token that target-aligned column t is about
        mask = (column >= self.prompt_lengths[:, None]) & (column < self.lengths[:, None])  # (R, T-1)
        values = None if self.values is None else self.values[:, : T - 1]
        logprobs = self.logprobs[:, : T - 1]
        return Batch(self.ids[:, :T], mask, self.lengths, logprobs=logprobs, values=values, ended=self.ended)


@torch.no_grad()
def generate(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, end: int, *, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None, noise: torch.Tensor | None = None,
    pad: int = 0, on_token=None,
) -> Batch:  # fmt: skip
    """Samples one response to each of R prompts (lists of ids), of at most max_new_tokens, the end token included.

    Returns a Batch of prompts and responses with logprobs, values (if the model has a head) and ended; its mask is True
    on the responses. Temperature 0 is greedy. All chance is in `noise`, (R, max_new_tokens) uniform numbers in [0, 1),
    drawn with `generator` if not given: a response depends on its prompt and its noise, and on no other row.
    `on_token(ids)`, for streaming, gets the new tokens of every step, one per row still going. Raises ValueError for an
    empty prompt, or one that leaves no room in the context.
    """
    longest, context = max(map(len, prompts)), model.config.block_size
    if not all(prompts):
        raise ValueError("a prompt must have at least one token")
    if longest + max_new_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {context}")
    training = model.training
    model.eval()  # no dropout: the log-probabilities are the model's own
    decoding = Decoding(model, prompts, max_new_tokens, pad)
    if noise is None and temperature > 0:
        device = generator.device if generator else None
        noise = torch.rand(len(prompts), max_new_tokens, generator=generator, device=device)
    if noise is not None:
        noise = noise.to(decoding.logprobs)

    hidden = decoding.prefill()  # (R, C)
    for n in range(1, max_new_tokens + 1):
        decoding.append(hidden, end, noise, temperature, top_k, top_p)
        if on_token:
            on_token(decoding.token.tolist())
        if n == max_new_tokens:
            break
        if on_token or n % CHECK_EVERY == 0:
            if decoding.drop_ended(at_once=on_token is not None) == 0:
                break
        decoding.cache.extend()
        hidden = decoding.step()  # (n, C)
    model.train(training)
    return decoding.batch()


def in_parts(rollout, prompts: list, prompt_ids: list[list[int]], noise: torch.Tensor) -> Batch:
    """rollout(prompts, prompt_ids, noise) -> Batch on the CPU, for up to four parts of similar prompt length.

    It changes no sample, because a response depends on its own prompt and noise only, and it saves padding and memory:
    decoding reads as many columns as the longest prompt of the part has."""
    count = min(len(prompts) // PART_ROWS, 4)
    if count < 2:
        return rollout(prompts, prompt_ids, noise)
    order = torch.tensor(length_order(prompt_ids))
    parts = []
    for part in order.tensor_split(count):
        rows = part.tolist()
        parts.append(rollout([prompts[i] for i in rows], [prompt_ids[i] for i in rows], noise[part]))
    return Batch.join(parts, order)


def sample_text(
    model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int, *, batch_size: int = 512,
    temperature: float = 1.0, seed: int = 0, noise: torch.Tensor | None = None,
) -> list[Example]:  # fmt: skip
    """Samples a response to each prompt: Examples with text, ended and logprob, in the order of the prompts.

    Prompts of similar length are sampled together, equal ones side by side, at most batch_size rows and BATCH_TOKENS
    tokens at a time: this changes no sample. noise (N, max_new_tokens) is as in generate; by default it is drawn from
    the seed."""
    if noise is None:
        noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    examples = [None] * len(prompts)
    while order:
        longest = len(prompts[order[min(batch_size, len(order)) - 1]]) + max_new_tokens
        size = max(1, min(batch_size, BATCH_TOKENS // longest))
        part, order = order[:size], order[size:]
        options = {"temperature": temperature, "noise": noise[part], "pad": tokenizer.pad}
        batch = generate(model, [prompts[i] for i in part], max_new_tokens, tokenizer.end, **options)
        logprobs = batch.logprobs.cpu().double().sum(1).tolist()
        sampled = zip(part, batch.responses(), batch.ended.tolist(), logprobs, strict=True)
        for i, response, ended, logprob in sampled:
            ids = response + [tokenizer.end] * ended
            mask = [False] * len(prompts[i]) + [True] * len(ids)
            examples[i] = Example(prompts[i] + ids, mask, tokenizer.decode(response), ended, logprob)
    return examples


def show_answers(model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int, seed: int = 0) -> str:
    """A few prompts with the model's sampled answers, to read along while it trains."""
    room = model.config.block_size - max_new_tokens
    prompts = [ids for ids in prompts if len(ids) <= room]
    answers = sample_text(model, tokenizer, prompts, max_new_tokens, seed=seed)
    lines = [f"    {tokenizer.decode(a.prompt)} {a.text}{'<|end|>' * a.ended}" for a in answers]
    return "\n".join(lines)
