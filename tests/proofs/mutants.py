"""A catalogue of mistakes. Each is a plausible slip in one place, and many of them stand in published code.

    "train_dpo.dpo_loss": [     the function
        ("the wrong sign",      what is wrong
         "losses = -(1",        the right code, which occurs in the function exactly once
         "losses = (1"),        the wrong code

To read it, put a function beside its list and ask of every line what you would see if it were wrong. Often the answer
is nothing: the loss still goes down. test_mutants.py plants the mistakes one by one, and for each of them at least one
test of this folder fails:

    python -m pytest tests/proofs/test_mutants.py -v -k dpo_loss

To add one, write the three strings into the list of its function and run that line. If every test still passes, they
have a gap: write the test that fails. If you edit a line that a mistake looks for, change the mistake with it, or
remove it if it makes no sense any more.
"""

SFT = {
    "train_sft.masked_cross_entropy": [
        ("prompts and padding in the loss", "losses.masked_fill(~mask.flatten(), 0.0)", "losses"),
        ("the mask inverted", "~mask.flatten()", "mask.flatten()"),
        ("prompts and padding in the denominator", "mask.sum() if", "mask.numel() if"),
        (
            "every row with equal weight, however long",
            "losses.sum() / (mask.sum() if count is None else count)",
            "(losses.view(mask.shape).sum(-1) / mask.sum(-1)).mean()",
        ),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
        ("the sum, not the mean", " / (mask.sum() if count is None else count)", ""),
    ],
    "train_sft.batch_loss": [
        ("the hidden state of the target itself", "model(batch.ids)[:, :-1]", "model(batch.ids)[:, 1:]"),
        ("targets not shifted", "batch.ids[:, 1:]", "batch.ids[:, :-1]"),
        ("the count not handed on", "mask, count, model.nll)", "mask, None, model.nll)"),
        ("twice the loss", "return masked_cross_entropy(", "return 2 * masked_cross_entropy("),
    ],
    "train_sft.update": [
        (
            "a mean of means over micro-batches",
            "collate(rows, run.device), count)",
            "collate(rows, run.device)) / len(micro_batches(examples, config.micro_batch))",
        ),
        ("only the last micro-batch learns", "run.backward(part)", "run.backward(part * (rows[-1] is examples[-1]))"),
        ("the first token counted, which nothing predicts", "example.mask[1:]", "[True] + example.mask[1:]"),
        ("the log has the last micro-batch only", "loss += part.detach()", "loss = part.detach()"),
        ("the gradient is never clipped", "config.grad_clip", "0.0"),
    ],
    "train_sft.evaluate": [
        ("a mean of means over batches", "batch_loss(model, batch, count)", "batch_loss(model, batch) / len(parts)"),
        ("with dropout", "model.eval()", "model.train()"),
    ],
    "train_sft.main": [
        ("twice the epochs", "round(config.epochs *", "round(2 * config.epochs *"),
        (
            "the rest of every epoch left out",
            "math.ceil(len(examples) / config.batch_size)",
            "(len(examples) // config.batch_size)",
        ),
        ("one beta for both", "betas=(0.9, 0.99)", "betas=(0.9, 0.9)"),
        ("weight decay left out", ", weight_decay=config.weight_decay", ""),
        ("the learning rate never falls", "config.lr * schedule(step, total, warmup)", "config.lr"),
        ("no warm-up", "schedule(step, total, warmup)", "schedule(step, total)"),
        ("the first step has learning rate 0", "schedule(step, total, warmup)", "schedule(step - 1, total, warmup)"),
        (
            "the same records in every step",
            "examples[i] for i in next(order)",
            "examples[i] for i in range(config.batch_size)",
        ),
        ("the held-out loss is that of training records", "evaluate(model, valid,", "evaluate(model, examples,"),
        ("dropout never on", "    model.train()\n", "    model.eval()\n"),
        ("the logged learning rate is the peak", '{"lr": lr}', '{"lr": config.lr}'),
    ],
}

REWARD_MODEL = {
    "train_rm.pairwise_loss": [
        ("chosen and rejected swapped", "upcast(chosen) - upcast(rejected)", "upcast(rejected) - upcast(chosen)"),
        ("the wrong sign", "-F.logsigmoid", "F.logsigmoid"),
        (
            "a logarithm that underflows",
            "F.logsigmoid(upcast(chosen) - upcast(rejected))",
            "(upcast(chosen) - upcast(rejected)).sigmoid().log()",
        ),
        ("the sum, not the mean", ".mean()", ".sum()"),
        (
            "a hinge instead of Bradley-Terry",
            "-F.logsigmoid(upcast(chosen) - upcast(rejected))",
            "F.relu(1 - upcast(chosen) + upcast(rejected))",
        ),
        (
            "every reward by itself, not the difference",
            "-F.logsigmoid(upcast(chosen) - upcast(rejected)).mean()",
            "(-F.logsigmoid(upcast(chosen)) - F.logsigmoid(-upcast(rejected))).mean()",
        ),
    ],
    "train_rm.score_pairs": [
        ("the reward of the first token", "batch.lengths)", "torch.ones_like(batch.lengths))"),
        ("the sides swapped", "batch_size, device)", "batch_size, device)[::-1]"),
    ],
    "train_rm.update": [
        (
            "a mean of means over micro-batches",
            "len(part) / len(pairs)",
            "1 / len(micro_batches(pairs, config.micro_batch))",
        ),
        ("the sum over micro-batches", "pairwise_loss(chosen, rejected) * share", "pairwise_loss(chosen, rejected)"),
        ("the log has the last micro-batch only", 'stats["loss"] += loss.detach()', 'stats["loss"] = loss.detach()'),
        ("a tie counts as right", "(chosen > rejected)", "(chosen >= rejected)"),
        ("the margin with the wrong sign", "(chosen - rejected).detach()", "(rejected - chosen).detach()"),
        ("the gradient is never clipped", "config.grad_clip", "0.0"),
    ],
    "train_rm.evaluate": [
        ("a tie counts as right", "(chosen > rejected)", "(chosen >= rejected)"),
        ("the margin of the absolute rewards", "(chosen - rejected).mean()", "(chosen - rejected).abs().mean()"),
    ],
    "train_rm.normalise": [
        ("the scale upside down", "model.head.weight /= std", "model.head.weight *= std"),
        ("the bias is shifted and not scaled", ".sub_(mean).div_(std)", ".sub_(mean)"),
        ("the mean stays", ".sub_(mean).div_(std)", ".div_(std)"),
        (
            "the variance, not its root",
            "std = scores.std(correction=0).item()",
            "std = scores.var(correction=0).item()",
        ),
    ],
    "train_rm.main": [
        ("a head of spread 1 / (d + 1)", "1 / math.sqrt(model.config.n_embd + 1)", "1 / (model.config.n_embd + 1)"),
        ("a head of GPT-2's spread", "1 / math.sqrt(model.config.n_embd + 1)", "0.02"),
        ("twice the epochs", "round(config.epochs *", "round(2 * config.epochs *"),
        ("another eps of Adam", ", eps=1e-5", ""),
        ("other betas of Adam", "eps=1e-5", "eps=1e-5, betas=(0.9, 0.95)"),
        ("weight decay left out", ", weight_decay=config.weight_decay", ""),
        ("the learning rate never falls", "config.lr * schedule(step, total, warmup)", "config.lr"),
        ("the same pairs in every step", "pairs[i] for i in next(order)", "pairs[i] for i in range(config.batch_size)"),
        ("the held-out figures are those of training pairs", "evaluate(model, valid,", "evaluate(model, pairs,"),
        ("normalised on answers of what it became", "sample_text(sft,", "sample_text(model,"),
        ("never normalised", "mean, std = normalise(model, answers)", "mean, std = 0.0, 1.0"),
        ("dropout on", "run.compile(model)", "run.compile(model.train())"),
    ],
}

DPO = {
    "train_dpo.dpo_loss": [
        ("chosen and rejected swapped", "chosen_rewards - rejected_rewards", "rejected_rewards - chosen_rewards"),
        ("without a reference", "policy_chosen - ref_chosen", "policy_chosen"),
        ("the signs of one side swapped", "policy_rejected - ref_rejected", "ref_rejected - policy_rejected"),
        ("beta left out", "beta * (policy_chosen - ref_chosen)", "(policy_chosen - ref_chosen)"),
        ("beta twice", "label_smoothing) * F.logsigmoid(beta_h)", "label_smoothing) * F.logsigmoid(beta * beta_h)"),
        ("the wrong sign", "losses = -(1", "losses = (1"),
        ("the smoothed label added, not mixed in", "-(1 - label_smoothing)", "-1"),
        ("the smoothed label with the wrong sign", "F.logsigmoid(-beta_h)", "F.logsigmoid(beta_h)"),
        ("gradient through the logged rewards", "chosen_rewards.detach()", "chosen_rewards"),
        ("the logged rewards without beta", "chosen_rewards.detach(), rej", "chosen_rewards.detach() / beta, rej"),
        ("a logarithm that underflows", "F.logsigmoid(beta_h)", "beta_h.sigmoid().log()"),
        ("a squared loss", "-(1 - label_smoothing) * F.logsigmoid(beta_h)", "(beta_h - 1) ** 2"),
    ],
    "train_dpo.answer_logprobs": [
        ("the mean over the columns, not the sum", ".sum(1)", ".mean(1)"),
        ("the mean over the answer's tokens", ".sum(1)", ".sum(1).div(batch.mask.sum(1))"),
        ("the end token left out", "batch.index)", "batch.index[torch.isin(batch.index, batch.index - 1)])"),
        ("the first token left out", "batch.index)", "batch.index[torch.isin(batch.index, batch.index + 1)])"),
        ("the prompt's tokens counted too", "batch.index)", "torch.arange(batch.mask.numel()))"),
    ],
    "train_dpo.pair_logprobs": [("the sides swapped", "batch_size, device)", "batch_size, device)[::-1]")],
    "train_dpo.reference_logprobs": [("chosen and rejected swapped", "dim=1)", "dim=1).flip(1)")],
    "train_dpo.batch_loss": [
        ("beta not handed on", "config.beta,", "0.1,"),
        ("label smoothing not handed on", "config.label_smoothing", "0.0"),
        ("the reference's sides swapped", "ref_chosen, ref_rejected = to_", "ref_rejected, ref_chosen = to_"),
        ("a tie counts as right", "chosen_rewards > rejected_rewards", "chosen_rewards >= rejected_rewards"),
    ],
    "train_dpo.update": [
        ("a mean of means over micro-batches", "losses.sum() / len(pairs)", "losses.mean()"),
        ("the reference's log-probabilities of other rows", "ref_logprobs[rows]", "ref_logprobs[: len(rows)]"),
        ("the log has the last micro-batch only", "means.get(name, 0.0) + values.sum()", "values.sum()"),
        ("the gradient is never clipped", "config.grad_clip", "0.0"),
    ],
    "train_dpo.evaluate": [
        (
            "the reference's log-probabilities of other rows",
            "ref_logprobs, config, device, batch_size)",
            "ref_logprobs.flip(0), config, device, batch_size)",
        ),
        ("a sum, not a mean", "values.mean()", "values.sum()"),
    ],
    "train_dpo.main": [
        ("the reference's log-probabilities of other rows", "ref_logprobs[rows]", "ref_logprobs[: len(rows)]"),
        ("the reference's log-probabilities in sorted order", "ref_logprobs[rows]", "ref_logprobs[sorted(rows)]"),
        ("the reference moves with the policy", "ref_logprobs[rows]", "reference_logprobs(policy, batch, run.device)"),
        ("the reference of other held-out pairs", "(policy, valid, run.device)", "(policy, valid[::-1], run.device)"),
        ("the held-out pairs measured like training pairs", "valid_ref_logprobs, c", "ref_logprobs[: len(valid)], c"),
        ("twice the epochs", "round(config.epochs *", "round(2 * config.epochs *"),
        ("other betas of Adam", "config.lr)\n", "config.lr, betas=(0.9, 0.95))\n"),
        ("weight decay that nobody asked for", "config.lr)\n", "config.lr, weight_decay=0.01)\n"),
        ("the learning rate never falls", "config.lr * schedule(step, total, warmup)", "config.lr"),
        ("no warm-up", "schedule(step, total, warmup)", "schedule(step, total)"),
        ("the policy has dropout, the reference had none", "run.compile(policy)", "run.compile(policy.train())"),
    ],
}

PPO = {
    "train_ppo.token_rewards": [
        ("the penalty with the wrong sign", "-beta *", "beta *"),
        ("policy and reference swapped", "logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        ("beta left out", "-beta * ", "-"),
        ("k2 in the reward", "(logprobs - ref_logprobs)", "0.5 * (logprobs - ref_logprobs) ** 2"),
        (
            "k3 in the reward",
            "(logprobs - ref_logprobs)",
            "((ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs))",
        ),
        (
            "k3 upside down",
            "(logprobs - ref_logprobs)",
            "((logprobs - ref_logprobs).exp() - 1 - (logprobs - ref_logprobs))",
        ),
        ("the absolute value of k1", "(logprobs - ref_logprobs)", "(logprobs - ref_logprobs).abs()"),
        ("no penalty on the end token", "rewards.scatter_add(", "rewards.scatter(1, last, 0.0).scatter_add("),
        ("a penalty on prompt and padding", ".masked_fill(~mask, 0.0)", ""),
        (
            "the whole penalty on the last token",
            "return rewards.scatter_add(1, last, scores[:, None]",
            "return (0 * rewards).scatter_add(1, last, (scores + rewards.sum(1))[:, None]",
        ),
        ("the score twice", "scores[:, None]", "2 * scores[:, None]"),
        (
            "the score on every token",
            "return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))",
            "return rewards + scores[:, None] * mask",
        ),
        ("the score on the first token", "mask.long().cumsum(1).argmax(1", "mask.long().argmax(1"),
        (
            "the score in the last column",
            "mask.long().cumsum(1).argmax(1, keepdim=True)",
            "torch.full_like(mask[:, :1].long(), mask.shape[1] - 1)",
        ),
        ("the score one token early", "scatter_add(1, last,", "scatter_add(1, (last - 1).clamp(min=0),"),
        (
            "the score one past the end",
            "scatter_add(1, last,",
            "scatter_add(1, (last + 1).clamp(max=mask.shape[1] - 1),",
        ),
    ],
    "train_ppo.gae": [
        ("values have no future", "gamma * next_value", "0.0"),
        ("another state's value as the future", "next_value = values[:, t]", "next_value = values[:, t - 1]"),
        ("no discount in lambda's sum", "gamma * lam * advantage", "lam * advantage"),
        ("lambda left out", "gamma * lam * advantage", "gamma * advantage"),
        ("the value added, not taken away", "- values[:, t]", "+ values[:, t]"),
        ("forwards in time", "reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"),
        ("what stands after the end flows back", "* mask[:, t]", "* 1"),
        ("padding has values", "values.masked_fill(~mask, 0.0)", "values"),
        ("padding has rewards", "rewards.masked_fill(~mask, 0.0)", "rewards"),
        ("returns without values", "return advantages, advantages + values", "return advantages, advantages"),
    ],
    "train_ppo.whiten": [
        ("the mean kept where it should go", "(0.0 if shift_mean else mean)", "(mean if shift_mean else 0.0)"),
        ("padding in the mean", "mean = x.masked_fill(~mask, 0.0).sum() / mask.sum()", "mean = x.mean()"),
        ("padding in the variance", "((x - mean) ** 2).masked_fill(~mask, 0.0).sum()", "((x - mean) ** 2).sum()"),
        ("the variance, not its root", "(variance + 1e-8).sqrt()", "(variance + 1e-8)"),
        ("the variance of one sample less", "mask.sum()\n    white", "(mask.sum() - 1)\n    white"),
        ("padding left with a number", "return white.masked_fill(~mask, 0.0)", "return white"),
        (
            "every answer by itself, so that all are equally good",
            "mean = x.masked_fill(~mask, 0.0).sum() / mask.sum()",
            "mean = x.masked_fill(~mask, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)",
        ),
    ],
    "train_ppo.policy_loss": [
        ("the optimist's bound", "torch.max(", "torch.min("),
        (
            "the optimist's bound for bad tokens alone",
            "torch.max(unclipped, clipped)",
            "torch.where(advantages < 0, torch.min(unclipped, clipped), torch.max(unclipped, clipped))",
        ),
        (
            "the wrong sign",
            "unclipped = -advantages * ratio\n    clipped = -advantages",
            "unclipped = advantages * ratio\n    clipped = advantages",
        ),
        ("the ratio upside down", "logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("no clip", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
        ("clipped on one side", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
        ("clipped always, never the larger loss", "torch.max(unclipped, clipped)", "clipped"),
        ("the log-ratio as the ratio", "0.0).exp()", "0.0) + 1"),
        (
            "the mean of every answer, then over answers",
            "losses.sum() / (mask.sum() if count is None else count)",
            "losses.sum(1).div(mask.sum(1)).sum() / (1 if count is None else count)",
        ),
        (
            "padding in the loss",
            "torch.max(unclipped, clipped).masked_fill(~mask, 0.0)",
            "torch.max(unclipped, clipped)",
        ),
        ("padding in the denominator", "mask.sum() if", "mask.numel() if"),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
        (
            "the end token left out",
            ".masked_fill(~mask, 0.0)\n",
            ".masked_fill(~mask | (mask.long().cumsum(1) == mask.sum(1, keepdim=True)), 0.0)\n",
        ),
    ],
    "train_ppo.value_loss": [
        ("without the half", "0.5 * ", ""),
        ("the smaller error", "torch.max(", "torch.min("),
        ("no clip", "(values - old_values).clamp(-clip, clip)", "(values - old_values)"),
        ("clipped around the return", "old_values + (values - old_values)", "returns + (values - returns)"),
        ("padding in the loss", ".masked_fill(~mask, 0.0)", ""),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
    ],
    "train_ppo.adapt": [
        ("the wrong way", "1 + error", "1 - error"),
        ("no limit", "min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1"),
        ("the batch not counted", "error * answers / horizon", "error / horizon"),
    ],
    "train_ppo.rollout": [
        ("the reference at another temperature", "batch.index, config.temperature)", "batch.index)"),
        ("sampled at another temperature", '"temperature": config.temperature', '"temperature": 1.0'),
        ("truncated sampling for a loss that knows nothing of it", '"pad": tokenizer.pad', '"pad": 0, "top_k": 2'),
        (
            "truncated sampling, scored as if it were not",
            "tokenizer.end, **options)",
            "tokenizer.end, top_k=2, **options)\n"
            "    hidden = models.policy(batch.ids)\n"
            "    batch.logprobs = models.policy.logprobs(hidden, batch.ids, batch.index, config.temperature)",
        ),
        ("answers graded against another prompt", "models.score(prompts, batch)", "models.score(prompts[::-1], batch)"),
        (
            "cut-off answers are paid like others",
            "torch.where(batch.ended, scores, config.missing_end_score)",
            "scores",
        ),
        (
            "returns from whitened advantages",
            "config.gamma, config.lam)",
            "config.gamma, config.lam)\n    batch.returns = whiten(batch.advantages, batch.mask) + batch.values",
        ),
        ("values of the next token", "models.critic(batch.ids))[:, :-1]", "models.critic(batch.ids))[:, 1:]"),
        ("the beta of the configuration, not the adapted one", "batch.mask, beta)", "batch.mask, config.beta)"),
        ("lambda not handed on", "config.gamma, config.lam)", "config.gamma)"),
        ("gamma not handed on", "config.gamma, config.lam)", "1.0, config.lam)"),
    ],
    "train_ppo.minibatch_loss": [
        ("log-probabilities at another temperature", "batch.index, config.temperature)", "batch.index)"),
        ("values of the next token", "models.critic.scalar(hidden)[:, :-1]", "models.critic.scalar(hidden)[:, 1:]"),
        ("a denominator of its own for every micro-batch", "config.clip, count)", "config.clip)"),
        ("the clip not handed on", "batch.mask, config.clip, count)", "batch.mask, count=count)"),
        ("the value's clip not handed on", "config.value_clip, count)", "config.clip, count)"),
        ("the value's coefficient left out", "config.value_coef * vf_loss", "vf_loss"),
        ("the value loss left out", "pg_loss + config.value_coef * vf_loss", "pg_loss"),
        ("the KL of the wrong pair", "ratio - 1 - log_ratio", "(1 / ratio) - 1 + log_ratio"),
        ("the squared log-ratio without its half", "0.5 * log_ratio**2", "log_ratio**2"),
        (
            "tokens counted as clipped that still learn",
            "-advantages * ratio < -advantages * ratio.clamp(1 - config.clip, 1 + config.clip)",
            "(ratio - 1).abs() > config.clip",
        ),
    ],
    "train_ppo.update": [
        (
            "a mean of means over micro-batches",
            "count = batch.mask[rows].sum()",
            "count = batch.mask[rows].sum() / len(micro_batches(rows, config.micro_batch)) ** 0.5",
        ),
        (
            "whitened again in every micro-batch",
            "minibatch_loss(models, batch.rows(part).to(run.device),",
            "minibatch_loss(models, replace(b := batch.rows(part), advantages=whiten(b.advantages, b.mask)),",
        ),
        ("one epoch only", "range(config.epochs)", "range(1)"),
        ("advantages not whitened", "whiten(batch.advantages, batch.mask)", "batch.advantages"),
        ("minibatches make no steps of their own", "tensor_split(config.minibatches)", "tensor_split(1)"),
        ("rows drawn with replacement", "torch.randperm(len(batch))", "torch.randint(len(batch), (len(batch),))"),
        ("never shuffled", "torch.randperm(len(batch))", "torch.arange(len(batch))"),
        ("the log has the last micro-batch only", "value + stats.get(name, 0.0)", "value"),
        ("the gradient is never clipped", "config.grad_clip", "0.0"),
    ],
    "train_ppo.answer_means": [
        ("the KL with the wrong sign", "batch.logprobs - batch.ref_logprobs", "batch.ref_logprobs - batch.logprobs"),
        ("the KL per token, not per answer", "ref_logprobs).sum(1)", "ref_logprobs).mean(1)"),
        ("the entropy with the wrong sign", "-batch.logprobs.sum(1)", "batch.logprobs.sum(1)"),
        ("the entropy per token", "-batch.logprobs.sum(1)", "-(batch.logprobs.sum(1) / batch.mask.sum(1))"),
    ],
    "train_ppo.statistics": [
        (
            "the penalty as a bonus in the log",
            '"objective/non_score_reward": -beta',
            '"objective/non_score_reward": beta',
        ),
        ("the objective with a bonus", 'answers["scores"] - beta', 'answers["scores"] + beta'),
        ("the objective without beta", 'answers["scores"] - beta * ', 'answers["scores"] - '),
        ("padding in the explained variance", "(batch.returns - batch.values)[mask]", "(batch.returns - batch.values)"),
        ("the prompt counted in the length", "mask.sum(1).float().mean()", "batch.lengths.float().mean()"),
    ],
    "train_ppo.main": [
        ("the reference is the policy itself", "freeze(copy.deepcopy(policy))", "policy"),
        ("values that begin at random", "add_head(std=0.0)", "add_head(std=1.0)"),
        (
            "answers graded against another prompt",
            "asked, asked_ids = [prompts[i] for i in rows]",
            "asked, asked_ids = [prompts[i] for i in sorted(rows)]",
        ),
        (
            "the same prompts in every iteration",
            "list(islice(order, config.batch_size))",
            "list(range(config.batch_size))",
        ),
        (
            "the same random numbers in every iteration",
            "torch.rand(config.batch_size, config.max_new_tokens)",
            "torch.rand(config.batch_size, config.max_new_tokens, generator=torch.Generator().manual_seed(0))",
        ),
        (
            "beta is adapted and never used",
            'prompt_ids, config, state["beta"], noise',
            "prompt_ids, config, config.beta, noise",
        ),
        (
            "the log has another beta",
            'statistics(batch, history, state["beta"])',
            "statistics(batch, history, config.beta)",
        ),
        ("beta is adapted as for a single answer", "config.kl_target, config.batch_size,", "config.kl_target, 1,"),
        (
            "the same rollout learned from twice",
            "history = update(",
            "update(run, models, optimizer, batch, config)\n        history = update(",
        ),
        ("another eps of Adam", ", eps=1e-5", ""),
        ("other betas of Adam", "eps=1e-5", "eps=1e-5, betas=(0.9, 0.95)"),
        ("the critic is not trained", 'trained["critic"] = critic.requires_grad_(True)', "critic.requires_grad_(True)"),
        ("the learning rate never falls", "config.lr * schedule(step, config.steps, config.warmup)", "config.lr"),
        ("dropout on in the updates", "run.compile(*trained.values())", "policy.train()"),
        (
            "held-out answers graded against another prompt",
            "in_parts(play, valid, valid_ids,",
            "in_parts(play, valid[::-1], valid_ids,",
        ),
    ],
}

GRPO = {
    "train_grpo.group_advantages": [
        ("the standard deviation of the batch, not of the group", "groups.std(1, keepdim=True)", "groups.std()"),
        ("the mean of the batch, not of the group", "groups.mean(1, keepdim=True)", "groups.mean()"),
        ("the mean of the others with the answer itself", '(others if baseline == "loo" else mean)', "mean"),
        ("the mean of all k without the answer", '(others if baseline == "loo" else mean)', "others"),
        ("answers of a group k apart, not side by side", "rewards.view(-1, k)", "rewards.view(k, -1).T"),
        ("k answers in the mean of k - 1", "/ (k - 1)", "/ k"),
        ("the sum of the others, not their mean", "/ (k - 1)", ""),
        ("the wrong sign", "advantages = groups - (", "advantages = -groups + ("),
        ("the variance, not its root", "groups.std(1, keepdim=True)", "groups.var(1, keepdim=True)"),
        ("k in the denominator of the variance", "std(1, keepdim=True)", "std(1, keepdim=True, correction=0)"),
        (
            "the range, not the standard deviation",
            "groups.std(1, keepdim=True)",
            "(groups.amax(1) - groups.amin(1))[:, None]",
        ),
        ("equal rewards divided by 0", " + 1e-4 if", " if"),
        ("always divided by the standard deviation", " if divide_by_std else 1.0", ""),
    ],
    "train_grpo.policy_loss": [
        (
            "the optimist's bound for bad tokens alone",
            "torch.max(unclipped, clipped)",
            "torch.where(advantages < 0, torch.min(unclipped, clipped), torch.max(unclipped, clipped))",
        ),
        (
            "the end token left out",
            ".masked_fill(~mask, 0.0)\n    return",
            ".masked_fill(~mask | (mask.long().cumsum(1) == mask.sum(1, keepdim=True)), 0.0)\n    return",
        ),
        (
            "the mean of every answer, then over answers",
            "(losses / (mask.sum() if count is None else count)).sum()",
            "losses.sum(1).div(mask.sum(1)).sum() / (len(mask) if count is None else count)",
        ),
        ("the ratio upside down", "logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("no clip", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
        ("clipped always, never the larger loss", "torch.max(unclipped, clipped)", "clipped"),
        (
            "padding in the loss",
            "torch.max(unclipped, clipped).masked_fill(~mask, 0.0)",
            "torch.max(unclipped, clipped)",
        ),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
    ],
    "train_grpo.kl_loss": [
        ("k3 upside down", "torch.expm1(-k1) + k1", "torch.expm1(k1) - k1"),
        ("k1 as a loss, which has no gradient", "torch.expm1(-k1) + k1", "k1"),
        ("k2 of each token, not of the answer", "0.5 * k1.sum(1, keepdim=True) ** 2", "0.5 * k1**2"),
        ("k3 of the answer, not of each token", "torch.expm1(-k1) + k1", "torch.expm1(-k1.sum(1)) + k1.sum(1)"),
        ("k2 and k3 swapped", 'kind == "k2"', 'kind == "k3"'),
        ("policy and reference swapped", "logprobs - ref_logprobs", "ref_logprobs - logprobs"),
        ("k2 without its half", "0.5 * k1", "k1"),
        ("k3 without its - 1", "torch.expm1(-k1)", "torch.exp(-k1)"),
        ("padding in the penalty", ".masked_fill(~mask, 0.0)", ""),
        ("a denominator of its own for every micro-batch", "mask.sum() if count is None else count", "mask.sum()"),
    ],
    "train_grpo.rollout": [
        ("the reference at another temperature", "batch.index, config.temperature)", "batch.index)"),
        ("sampled at another temperature", '"temperature": config.temperature', '"temperature": 1.0'),
        ("truncated sampling for a loss that knows nothing of it", '"pad": tokenizer.pad', '"pad": 0, "top_k": 2'),
        (
            "truncated sampling, scored as if it were not",
            "tokenizer.end, **options)",
            "tokenizer.end, top_k=2, **options)\n"
            "    hidden = models.policy(batch.ids)\n"
            "    batch.logprobs = models.policy.logprobs(hidden, batch.ids, batch.index, config.temperature)",
        ),
        ("answers graded against another prompt", "models.score(prompts, batch)", "models.score(prompts[::-1], batch)"),
        (
            "cut-off answers are paid like others",
            "torch.where(batch.ended, scores, config.missing_end_score)",
            "scores",
        ),
        ("the policy is its own reference", "models.reference.logprobs(hidden", "models.policy.logprobs(hidden"),
    ],
    "train_grpo.minibatch_loss": [
        ("the KL as a bonus", "pg_loss + config.beta * kl", "pg_loss - config.beta * kl"),
        ("the KL of the old policy, which has no gradient", "kl_loss(logprobs, ", "kl_loss(batch.logprobs, "),
        ("the KL to the old policy", "batch.ref_logprobs", "batch.logprobs"),
        ("beta left out", "config.beta * kl", "kl"),
        ("the KL loss left out", "pg_loss + config.beta * kl", "pg_loss"),
        ("always k3", "config.kl, count)", '"k3", count)'),
        ("the KL with another denominator", "config.kl, count)", "config.kl, tokens)"),
        ("the mean over each answer always", " if config.length_mean else tokens", ""),
        (
            "the mean over each answer never",
            "answers * batch.mask.sum(1, keepdim=True) if config.length_mean else ",
            "",
        ),
        ("the sum over answers, not the mean", "answers * batch", "batch"),
        ("the padded width as the length", "batch.mask.sum(1, keepdim=True)", "batch.mask.shape[1]"),
        ("log-probabilities at another temperature", "batch.index, config.temperature)", "batch.index)"),
        ("a denominator of its own for every micro-batch", "config.clip, count)", "config.clip)"),
        ("the clip not handed on", "batch.mask, config.clip, count)", "batch.mask, count=count)"),
        ("the squared log-ratio without its half", "0.5 * log_ratio**2", "log_ratio**2"),
        (
            "tokens counted as clipped that still learn",
            "-advantages * ratio < -advantages * ratio.clamp(1 - config.clip, 1 + config.clip)",
            "(ratio - 1).abs() > config.clip",
        ),
    ],
    "train_grpo.update": [
        ("the KL as a bonus", "batch.scores - beta", "batch.scores + beta"),
        ("policy and reference swapped", "batch.logprobs - batch.ref_logprobs", "batch.ref_logprobs - batch.logprobs"),
        ("the KL per token, not per answer", "ref_logprobs).sum(1)", "ref_logprobs).sum(1) / batch.mask.sum(1)"),
        ("the KL in the rewards and as a loss", 'config.beta if config.kl == "reward" else 0.0', "config.beta"),
        ("the KL in no place", 'config.beta if config.kl == "reward" else 0.0', "0.0"),
        ("groups of another size", "config.k, config.baseline", "2 * config.k, config.baseline"),
        ("the baseline not handed on", "config.baseline, config", '"loo", config'),
        ("the standard deviation not handed on", ", config.divide_by_std)", ")"),
        (
            "divided by the batch's standard deviation on top",
            "advantages[:, None] * batch.mask",
            "(advantages / advantages.std())[:, None] * batch.mask",
        ),
        (
            "the advantage shared out among the tokens",
            "advantages[:, None] * batch.mask",
            "advantages[:, None] * batch.mask / batch.mask.sum(1, keepdim=True)",
        ),
        (
            "the advantage on the last token alone",
            "advantages[:, None] * batch.mask",
            "advantages[:, None] * (batch.mask & (batch.mask.long().cumsum(1) == batch.mask.sum(1, keepdim=True)))",
        ),
        (
            "groups made after shuffling",
            "rewards = batch.scores",
            "batch = batch.rows(torch.randperm(len(batch)))\n    rewards = batch.scores",
        ),
        (
            "a mean of means over micro-batches",
            "count = batch.mask[rows].sum()",
            "count = batch.mask[rows].sum() / len(micro_batches(rows, config.micro_batch)) ** 0.5",
        ),
        ("the answers of a micro-batch as those of all", "len(rows), config)", "len(part), config)"),
        ("one epoch only", "range(config.epochs)", "range(1)"),
        ("minibatches make no steps of their own", "tensor_split(config.minibatches)", "tensor_split(1)"),
        ("rows drawn with replacement", "torch.randperm(len(batch))", "torch.randint(len(batch), (len(batch),))"),
        ("never shuffled", "torch.randperm(len(batch))", "torch.arange(len(batch))"),
        ("the log has the last micro-batch only", "value + stats.get(name, 0.0)", "value"),
        ("the gradient is never clipped", "config.grad_clip", "0.0"),
    ],
    "train_grpo.answer_means": [
        ("the KL with the wrong sign", "batch.logprobs - batch.ref_logprobs", "batch.ref_logprobs - batch.logprobs")
    ],
    "train_grpo.statistics": [
        ("answers of a group k apart, not side by side", ".view(-1, config.k)", ".view(config.k, -1).T"),
        ("answers counted, not groups", ".all(1)", ""),
        ("groups counted that are not equal", ".all(1)", ".all(1).logical_not()"),
        ("the objective with a bonus", '["scores"] - config.beta', '["scores"] + config.beta'),
    ],
    "train_grpo.main": [
        (
            "the prompts over and over, where a group stands side by side",
            "[i for i in islice(order, size) for _ in range(config.k)]",
            "list(islice(order, size)) * config.k",
        ),
        (
            "a group with the same random numbers, so all its answers are equal",
            "torch.rand(config.batch_size, config.max_new_tokens)",
            "torch.rand(size, config.max_new_tokens).repeat_interleave(config.k, 0)",
        ),
        (
            "the same random numbers in every iteration",
            "torch.rand(config.batch_size, config.max_new_tokens)",
            "torch.rand(config.batch_size, config.max_new_tokens, generator=torch.Generator().manual_seed(0))",
        ),
        (
            "answers graded against another prompt",
            "asked, asked_ids = [prompts[i] for i in rows]",
            "asked, asked_ids = [prompts[i] for i in sorted(rows)]",
        ),
        (
            "held-out answers graded against another prompt",
            "in_parts(play, valid, valid_ids,",
            "in_parts(play, valid[::-1], valid_ids,",
        ),
        ("the same prompts in every iteration", "for i in islice(order, size)", "for i in range(size)"),
        ("the reference is the policy itself", "freeze(copy.deepcopy(policy))", "policy"),
        (
            "the same rollout learned from twice",
            "stats = statistics(",
            "update(run, models, optimizer, batch, config)\n        stats = statistics(",
        ),
        ("another eps of Adam", ", eps=1e-5", ""),
        ("the learning rate never falls", "config.lr * schedule(step, config.steps, config.warmup)", "config.lr"),
        ("dropout on in the updates", "run.compile(policy)", "policy.train()"),
    ],
}

IPO = {
    "train_ipo.ipo_loss": [
        (
            "the margin of the implicit rewards, not of the log-ratios",
            " - rejected_rewards) / beta",
            " - rejected_rewards)",
        ),
        ("twice the target", "(h - 1 / (2 * beta))", "(h - 1 / beta)"),
        ("a target without beta", "(h - 1 / (2 * beta))", "(h - 1)"),
        ("DPO's loss", "(h - 1 / (2 * beta)) ** 2", "torch.nn.functional.softplus(-beta * h)"),
        ("no loss beyond the target, which is a hinge", "(h - 1 / (2 * beta))", "(h - 1 / (2 * beta)).clamp(max=0)"),
        ("the distance, not its square", "(h - 1 / (2 * beta)) ** 2", "(h - 1 / (2 * beta)).abs()"),
        ("chosen and rejected swapped", "chosen_rewards - rejected_rewards", "rejected_rewards - chosen_rewards"),
        ("without a reference", "policy_chosen - ref_chosen", "policy_chosen"),
        ("the signs of one side swapped", "policy_rejected - ref_rejected", "ref_rejected - policy_rejected"),
        ("the smoothed label added, not mixed in", "(1 - label_smoothing) * ", ""),
        ("the smoothed label with the target of the right one", "(h + 1 / (2 * beta))", "(h - 1 / (2 * beta) )"),
        ("gradient through the logged rewards", "chosen_rewards.detach()", "chosen_rewards"),
        ("the logged rewards without beta", "chosen_rewards.detach(), rej", "chosen_rewards.detach() / beta, rej"),
    ],
    "train_ipo.answer_logprobs": [
        ("the mean over the answer's tokens", ".sum(1)", ".sum(1).div(batch.mask.sum(1))"),
        ("the end token left out", "batch.index)", "batch.index[torch.isin(batch.index, batch.index - 1)])"),
    ],
    "train_ipo.pair_logprobs": [("the sides swapped", "batch_size, device)", "batch_size, device)[::-1]")],
    "train_ipo.batch_loss": [
        ("beta not handed on", "config.beta,", "0.1,"),
        ("label smoothing not handed on", "config.label_smoothing", "0.0"),
        ("the reference's sides swapped", "ref_chosen, ref_rejected = to_", "ref_rejected, ref_chosen = to_"),
    ],
    "train_ipo.update": [
        ("a mean of means over micro-batches", "losses.sum() / len(pairs)", "losses.mean()"),
        ("the reference's log-probabilities of other rows", "ref_logprobs[rows]", "ref_logprobs[: len(rows)]"),
    ],
    "train_ipo.main": [
        ("the reference's log-probabilities of other rows", "ref_logprobs[rows]", "ref_logprobs[: len(rows)]"),
        ("the reference moves with the policy", "ref_logprobs[rows]", "reference_logprobs(policy, batch, run.device)"),
        ("twice the epochs", "round(config.epochs *", "round(2 * config.epochs *"),
        ("the learning rate never falls", "config.lr * schedule(step, total, warmup)", "config.lr"),
    ],
}

DATA = {
    "nanopost.data.collate": [
        ("the mask not shifted", "mask[:, 1:]", "mask[:, :-1]"),
        ("the last target lost", "mask[i, : len(row)] = row.mask", "mask[i, : len(row) - 1] = row.mask[:-1]"),
        (
            "tokens that look like padding are no targets",
            "mask[i, : len(row)] = row.mask",
            "mask[i, : len(row)] = row.mask & (ids[i, : len(row)] != pad_id)",
        ),
        ("padding on the left", "ids[i, : len(row)] = row.ids", "ids[i, T - len(row) :] = row.ids"),
        ("padding counted as real tokens", "(ids, mask, lengths, index)", "(ids, mask, lengths * 0 + T, index)"),
    ],
    "nanopost.data.Batch.rows": [
        ("the longest row cut short", "round_up(int(self.lengths[rows].max()))", "int(self.lengths[rows].max()) - 1"),
        ("other rows of what has one number per row", "else x[rows] for name", "else x[: len(rows)] for name"),
    ],
    "nanopost.data.Batch.responses": [
        ("the end token stays in the text", "ids[:-1] if ended else ids", "ids"),
        ("the last token of a cut-off answer lost", "ids[:-1] if ended else ids", "ids[:-1]"),
    ],
    "nanopost.data.batches": [
        (
            "the last, smaller batch left out",
            "range(0, len(part), batch_size)",
            "range(0, len(part) // batch_size * batch_size, batch_size)",
        ),
        ("rows drawn with replacement", "rng.permutation(len(rows))", "rng.integers(len(rows), size=len(rows))"),
        (
            "the same batches in every epoch",
            "rng.permutation(len(rows))",
            "np.random.default_rng(seed).permutation(len(rows))",
        ),
        ("never shuffled", "order, epoch = rng.permutation(len(rows)), []", "order, epoch = np.arange(len(rows)), []"),
    ],
    "nanopost.data.map_batches": [
        (
            "results in sorted order, not in the rows'",
            "torch.cat(parts)[to_device(back, parts[0].device)]",
            "torch.cat(parts)",
        ),
        ("put back the wrong way round", ".argsort()", ""),
    ],
    "nanopost.data.map_pairs": [
        (
            "pair after pair, where all chosen sides come first",
            "[pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]",
            "[side for pair in pairs for side in (pair.chosen, pair.rejected)]",
        ),
        ("the sides swapped", ".chunk(2)", ".chunk(2)[::-1]"),
        (
            "the rejected side of another pair",
            "pair.rejected for pair in pairs",
            "pair.rejected for pair in pairs[::-1]",
        ),
    ],
    "nanopost.data.encode_pair": [("the sides swapped", '("chosen", "rejected")', '("rejected", "chosen")')],
    "nanopost.data.encode_answer": [
        ("the prompt is a target", "[False] * len(prompt)", "[True] * len(prompt)"),
        ("the mask one token early", "[False] * len(prompt) + mask", "[False] * (len(prompt) - 1) + mask + [False]"),
    ],
    "nanopost.tokenizer.Tokenizer.chat": [
        ("the end token is not a target", "[True] * (len(content) + 1)", "[True] * len(content) + [False]"),
        (
            "the first word of the answer is not a target",
            "[False] + [True] * (len(content) + 1)",
            "[False] * 2 + [True] * len(content)",
        ),
        ("<|assistant|> is a target", "[False] + [True] * (len(content) + 1)", "[True] * (len(content) + 2)"),
        ("questions are targets", "[False] * (len(content) + 1)", "[True] * (len(content) + 1)"),
        ("answers without an end", "*content, self.end]", "*content]"),
    ],
    "nanopost.tokenizer.Tokenizer.encode": [
        ("a text can contain an end token", "encode_ordinary(part)", 'encode(part, allowed_special="all")')
    ],
}

MODEL = {
    "nanopost.model.token_nll": [
        ("no temperature", "= logits / temperature", "= logits"),
        ("the temperature upside down", "= logits / temperature", "= logits * temperature"),
        ("the softmax twice", "F.cross_entropy(logits,", "F.cross_entropy(logits.softmax(-1),"),
        ("half precision in the softmax", "upcast(logits)", "logits"),
        (
            "the logit instead of its log-probability",
            'F.cross_entropy(logits, targets, reduction="none")',
            "-logits.gather(1, targets[:, None])[:, 0] / temperature",
        ),
    ],
    "nanopost.model.GPT.logprobs": [
        ("the hidden state of the token itself", "hidden[:, :-1]", "hidden[:, 1:]"),
        ("the token before", "ids[:, 1:].flatten()", "ids[:, :-1].flatten()"),
        ("the wrong sign", "-self.nll", "self.nll"),
    ],
    "nanopost.model.GPT.score": [
        ("the reward read at the last column, padding or not", "lengths - 1", "-1"),
        ("the reward read before the end token", "lengths - 1", "lengths - 2"),
        ("the reward read at the first token", "lengths - 1", "0 * lengths"),
        ("the mean over all positions", "self.scalar(self(ids)[rows, lengths - 1])", "self.scalar(self(ids)).mean(1)"),
    ],
    "nanopost.model.GPT.add_head": [
        ("another spread than asked for", "std=std)", "std=0.02)"),
        ("a bias that begins at random", "nn.init.zeros_(self.head.bias)", "nn.init.normal_(self.head.bias)"),
    ],
    "nanopost.model.GPT.logits": [("unused rows of the matrix get probability", "[..., : self.config.vocab_size]", "")],
    "nanopost.model.Attention.forward": [
        ("tokens see their future", "is_causal=True", "is_causal=False"),
        ("scores of the decoder not scaled", " / math.sqrt(C // self.n_head)", ""),
        ("the decoder sees columns not yet written", " + mask  #", "  #"),
        ("heads mixed up", ".transpose(1, 2).reshape(B, T, C)", ".reshape(B, T, C)"),
    ],
    "nanopost.model.GPT.forward": [
        ("cached tokens do not see themselves", "<= position", "< position"),
        ("cached tokens see what other rows wrote", "<= position)", "<= position.max() + 0 * position)"),
        (
            "positions of the padded row, not of the token",
            "position = cache.pos[:, None]",
            "position = torch.full_like(cache.pos, cache.used - 1)[:, None]",
        ),
    ],
}

SAMPLING = {
    "nanopost.sampling.choose": [
        (
            "log-probabilities without the temperature",
            "p.gather(1, token[:, None])",
            "(logits * temperature).softmax(-1).gather(1, token[:, None])",
        ),
        (
            "truncated sampling, scored as if it were not",
            "p.gather(1, token[:, None])",
            "logits.softmax(-1).gather(1, token[:, None])",
        ),
        ("probabilities for log-probabilities", "[:, 0].log()", "[:, 0]"),
        ("the temperature forgotten", "temperature not in (0, 1)", "temperature > 1"),
        ("probabilities squared", "p.cumsum(-1)", "(p * p).cumsum(-1)"),
        ("the first token twice as likely", "p.cumsum(-1)", "p.cumsum(-1) + p[:, :1]"),
        ("the token before", "right=True)[:, 0]", "right=True)[:, 0].sub(1).clamp(min=0)"),
    ],
    "nanopost.sampling.filter_logits": [
        ("one token too many in top-k", "min(top_k, logits.shape[-1])", "min(top_k + 1, logits.shape[-1])"),
        ("the token that reaches top-p dropped", "p.cumsum(-1) - p", "p.cumsum(-1)"),
    ],
    "nanopost.sampling.generate": [
        (
            "the first token not truncated",
            "temperature, top_k, top_p)",
            "temperature, top_k * (n > 1), top_p ** (n > 1))",
        )
    ],
    "nanopost.sampling.Decoding.prefill": [
        ("the prompt's last column, padding or not", "self.prompt_lengths - 1]", "-1]"),
        ("every row has the first prompt", "self.cache.keep(self.copy_of)", "self.cache.keep(self.copy_of * 0)"),
        ("every row starts from the first prompt", "hidden[self.copy_of,", "hidden[self.copy_of * 0,"),
        (
            "the cache begins one token early",
            "fill(self.prompt_lengths, ",
            "fill((self.prompt_lengths - 1).clamp(min=1), ",
        ),
    ],
    "nanopost.sampling.Decoding.step": [
        ("the same token fed twice", "self.token[:, None]", "self.ids[self.rows, self.cache.pos - 1][:, None]")
    ],
    "nanopost.sampling.Decoding.append": [
        ("the end token does not end", "live & (token == end)", "live & (token == -1)"),
        ("the end token not counted", "self.lengths[rows] += live", "self.lengths[rows] += live & (token != end)"),
        ("ended rows go on talking", "live = ~self.ended[rows]", "live = torch.ones_like(self.ended[rows])"),
        ("the same noise at every step", "noise[rows, column - self.prompt_lengths[rows]]", "noise[rows, 0]"),
        ("the noise of another row", "noise[rows, column", "noise[rows * 0, column"),
        (
            "log-probabilities one column late",
            "self.logprobs[rows, column - 1]",
            "self.logprobs[rows, column.clamp(max=self.logprobs.shape[1] - 1)]",
        ),
        (
            "values one column late",
            "self.values[rows, column - 1]",
            "self.values[rows, column.clamp(max=self.values.shape[1] - 1)]",
        ),
        ("the final norm twice before the values", "scalar(hidden)", "scalar(self.model.ln_f(hidden))"),
    ],
    "nanopost.sampling.Decoding.drop_ended": [
        ("other rows dropped than from the cache", "self.rows = self.rows[stay]", "self.rows = self.rows[:going]")
    ],
    "nanopost.sampling.Decoding.batch": [
        ("the mask one token late", "column >= self.prompt_lengths[:, None]", "column > self.prompt_lengths[:, None]"),
        ("the mask one token too long", "column < self.lengths[:, None]", "column <= self.lengths[:, None]"),
        (
            "the end token masked, as where padding is the end",
            "(column < self.lengths[:, None])",
            "(self.ids[:, 1:T] != 3)",
        ),
        ("an end in the last column taken for a cut", "ended=self.ended", "ended=self.lengths < T"),
    ],
    "nanopost.sampling.sample_text": [
        (
            "answers decoded and encoded again",
            "ids = response + ",
            "ids = tokenizer.encode(tokenizer.decode(response)) + ",
        ),
        ("in sorted order, not in the prompts'", "examples[i] = ", "examples[examples.index(None)] = "),
        ("the log-probability per token", "double().sum(1)", "double().mean(1)"),
    ],
    "nanopost.reward.load_reward": [
        ("answers graded against another prompt", "function, prompts, list(", "function, prompts[::-1], list("),
        ("the prompt's last token is scored", "answers.lengths)", "answers.lengths - answers.mask.sum(1))"),
    ],
}

RUN = {
    "nanopost.run.adamw": [
        ("weight decay on biases and gains", '"weight_decay": 0.0', '"weight_decay": weight_decay'),
        ("weight decay through Adam's own scale", "return AdamW(", "return torch.optim.Adam("),
        ("one beta for both", "betas=betas", "betas=(betas[0], betas[0])"),
        ("eps not handed on", ", eps=eps", ""),
        ("biases and gains are not trained", "[matrices, vectors]", "[matrices]"),
    ],
    "nanopost.run.schedule": [
        ("the learning rate never falls", "(total - step + 1) / (total - warmup)", "1.0"),
        ("the fall begins with the warm-up", "/ (total - warmup)", "/ total"),
        ("the first step has learning rate 0", "step / (warmup + 1)", "(step - 1) / (warmup + 1)"),
    ],
    "nanopost.run.Run.set_lr": [
        ("biases and gains keep their learning rate", "in optimizer.param_groups", "in optimizer.param_groups[:1]")
    ],
    "nanopost.run.Run.optimizer_step": [
        ("gradients never cleared", "optimizer.zero_grad(set_to_none=True)", "pass"),
        ("gradients cleared before the step", "self.scaler.unscale_(optimizer)", "optimizer.zero_grad()"),
        ("no step", "self.scaler.step(optimizer)", "pass"),
        (
            "gradients clipped after the step",
            "self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)\n"
            "    self.scaler.step(optimizer)",
            "self.scaler.step(optimizer)\n"
            "    self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)",
        ),
        ("the limit ignored", "grad_clip if grad_clip > 0 else math.inf", "math.inf"),
        ("a limit of 0 taken literally", "grad_clip if grad_clip > 0 else math.inf", "grad_clip"),
    ],
}

MUTANTS = SFT | REWARD_MODEL | DPO | PPO | GRPO | IPO | DATA | MODEL | SAMPLING | RUN
