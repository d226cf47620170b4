"""What a bug costs

**Claim.** Post-training with a mistake in it seems to work: the reward model's score rises all the same, and only the
true reward shows the damage. That details decide is well known (Huang et al., arXiv 2403.17031, list over 20 of them);
what each costs has hardly been measured. The mistakes are old acquaintances from published code.

Each line is a run of a copy of the script in which `sed` has changed one place. The runs are short, 14 iterations of
PPO or 1,000 pairs for DPO, and start from the SFT model, whose score is 0. [The proofs](../tests/proofs/README.md)
find every one of these mistakes in seconds and without training; OF_PPO and OF_DPO name the test.

Next: plant a mistake of your own. `python -m pytest tests/proofs --mine FILE` says what finds it.
"""

from statistics import fmean

from experiment import IN_PART, NOT_HERE, REPLICATES, conduct, dots, prompts_of, sample
from nanopost.paired import compare

SAME = "--init $start/sft --valid '' --seed $seed --out $here/model"
PPO = f"{SAME} --reward $start/rm --batch-size 64 --steps 14 --warmup 2"
DPO = f"{SAME} --data $first/pairs.jsonl --beta 0.3 --epochs 1"
FIRST = 'sed -n "$((1000 * seed + 1)),$((1000 * seed + 1000))p" $start/prefs/train.jsonl > $here/pairs.jsonl'
PLANT = """
sed '{edit}' {script} > $here/script.py
if cmp -s {script} $here/script.py; then echo "sed has changed nothing"; exit 1; fi
python $here/script.py {options}
"""
LAST = "mask.long().cumsum(1) == mask.sum(1, keepdim=True)"
OF_PPO = {
    # test_token_rewards_are_lower_where_the_policy_is_surer_than_the_reference
    "KL with the wrong sign": r"s/(-beta \*/(beta */",
    # test_gae_with_lambda_0_is_the_one_step_error
    "advantages off by one": r"s/advantages\[:, t\] = /advantages[:, t - 1] = /",
    # test_the_score_is_paid_on_the_last_token_whether_the_end_comes_first_later_last_or_never
    "score on the first token": r"s/mask.long().cumsum(1).argmax/mask.long().argmax/",
    # test_the_ppo_surrogate_has_exactly_the_gradient_of_the_objective
    "end token left out": f"s/clipped).masked_fill(~mask/clipped).masked_fill(~mask | ({LAST})/",
}
OF_DPO = {
    # test_dpo_loss_at_the_reference_is_ln_2_with_rewards_0
    "no reference": r"s/(policy_\([a-z]*\) - ref_[a-z]*)/policy_\1/",
    # test_dpo_log_probabilities_and_rewards_are_those_of_whole_answers
    "mean for sum": r"s/return logprobs.sum(1)$/return logprobs.sum(1) \/ batch.mask.sum(1)/",
}


def arms(method, script, options, mistakes):
    right = {method: f"python {script} {options}"}
    wrong = {what: PLANT.format(edit=edit, script=script, options=options) for what, edit in mistakes.items()}
    return right | {f"{method}, {what}": commands for what, commands in wrong.items()}


ARMS = arms("PPO", "train_ppo.py", PPO, OF_PPO) | arms("DPO", "train_dpo.py", DPO, OF_DPO)
COLUMNS = {
    "gold": ("gold", "{:.2f}"),
    "score": ("score", "{:.2f}"),
    "kl": ("KL", "{:.1f}"),
    "length": ("length", "{:.0f}"),
}


def measure(folders):
    prompts = prompts_of("data/notes/prompts_eval.jsonl", 250)
    start = folders.start
    found = sample(f"{folders.here}/model", prompts, folders.seed, reference=f"{start}/sft", reward=f"{start}/rm")
    return {column: fmean(found[column]) for column in COLUMNS}


def judge(results):
    silent, seen, cheap = [], [], []
    for arm, row in results.items():
        right = results[arm.partition(",")[0]]
        gold, score = compare(right["gold"], row["gold"]), compare(right["score"], row["score"])
        what = f"{arm} ({gold['difference']:+.2f} gold, {score['difference']:+.2f} score, KL {fmean(row['kl']):.1f})"
        if gold["verdict"] == "a" and gold["difference"] < -1:
            (silent if score["difference"] > -0.4 * fmean(right["score"]) else seen).append(what)
        elif row is not right:
            cheap.append(what)
    lists = ["; ".join(arms) or "none" for arms in (silent, seen, cheap)]
    why = (
        f"Costly, and the score does not show it: {lists[0]}. Costly, and it does: {lists[1]}. Less than one point of "
    )
    why += f"gold, or too few seeds to tell: {lists[2]}."
    return (REPLICATES if len(silent) > len(seen) else IN_PART if silent else NOT_HERE), why


def draw(figure, results):
    left, right = figure.subplots(1, 2, sharey=True)
    dots(left, results, "gold", "gold")
    dots(right, results, "score", "score of the reward model")


if __name__ == "__main__":
    conduct(ARMS, COLUMNS, measure, judge, draw, first=FIRST)
