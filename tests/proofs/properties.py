"""Which tests look at which function: where test_mutants.py plants a mistake, and what --mine runs."""

import test_enumeration
import test_forks
import test_losses
import test_rollout
import test_wiring


def named(module, *beginnings):
    """The tests of a module whose names begin so, after test_; those with the first beginning come first."""
    return [f for start in beginnings for name, f in vars(module).items() if name.startswith(f"test_{start}")]


STEPS = named(test_enumeration, "one_step", "the_next_step", "a_gradient_longer")
TARGETS = named(test_wiring, "the_targets_of_a_record")
SAMPLER = named(test_rollout, "the_samplers", "a_row", "an_answer", "truncated", "every_answer")
WIRING = named(test_wiring, "every_record", "the_learning_rate", "the_optimizer", "dropout")
OF_PAIRS = ("dpo_starts_with_rewards", "dpo_rewards", "dpo_held_out")  # what DPO has in common with IPO
OF_SAMPLES = ("ppo_learns", "ppo_makes", "ppo_measures", "ppo_scores", "ppo_held_out")  # and PPO with GRPO

PROPERTIES = {  # functions whose names begin so: the tests that look at them, in the order in which they are run
    "train_sft": named(test_losses, "cross_entropy") + named(test_enumeration, "sft") + STEPS,
    "train_sft.main": WIRING + named(test_wiring, "sft"),
    "train_rm": named(test_losses, "pairwise") + named(test_enumeration, "an_update", "rm") + STEPS,
    "train_rm.normalise": named(test_wiring, "rm_is_normalised"),
    "train_rm.main": WIRING + named(test_wiring, "rm"),
    "train_dpo": named(test_losses, "dpo") + named(test_enumeration, "dpo", "conservative") + STEPS,
    "train_dpo.update": STEPS,
    "train_dpo.evaluate": named(test_wiring, "dpo_held_out", "dpo_loss"),
    "train_dpo.main": WIRING + named(test_wiring, "dpo"),
    "train_ppo": [
        *named(test_losses, "token", "rewards", "gae", "whiten", "policy", "value", "adaptive"),
        *named(test_enumeration, "at_the", "the_ppo", "whiten", "the_best"),
    ],
    "train_ppo.rollout": named(test_rollout, "the_", "penalty", "with", "a_rollout"),
    "train_ppo.minibatch_loss": named(test_enumeration, "the_loss", "one_step", "logged") + named(test_rollout, "with"),
    "train_ppo.update": named(test_wiring, "ppo_makes") + STEPS,
    "train_ppo.answer_means": named(test_rollout, "the_objective"),
    "train_ppo.statistics": named(test_rollout, "the_objective", "the_explained"),
    "train_ppo.main": named(test_wiring, "ppo") + WIRING,
    "train_ipo": named(test_forks, "ipo") + STEPS,
    "train_ipo.update": STEPS,
    "train_ipo.evaluate": named(test_wiring, "dpo_held_out", "ipo_loss"),
    "train_ipo.main": WIRING + named(test_wiring, *OF_PAIRS, "ipo"),
    "train_grpo": [
        *named(test_losses, "policy"),
        *named(test_forks, "advantages", "kl", "leave_one_out", "the_mean", "dividing", "grpo_loss"),
    ],
    "train_grpo.rollout": named(test_forks, "grpo_rollout"),
    "train_grpo.minibatch_loss": named(test_forks, "grpo_loss", "leave_one_out", "grpo_update", "grpo_rollout_with"),
    "train_grpo.update": named(test_wiring, "ppo_makes") + named(test_forks, "grpo_update") + STEPS,
    "train_grpo.answer_means": named(test_forks, "grpo_statistics"),
    "train_grpo.statistics": named(test_forks, "grpo_statistics"),
    "train_grpo.main": named(test_wiring, *OF_SAMPLES, "grpo") + WIRING,
    "nanopost.data": named(test_enumeration, "sft", "rm", "dpo") + STEPS,
    "nanopost.data.Batch": SAMPLER + STEPS + named(test_rollout, "a_reward"),
    "nanopost.data.Batch.responses": named(test_rollout, "a_reward"),
    "nanopost.data.batches": WIRING,
    "nanopost.data.load_pairs": WIRING,
    "nanopost.data.encode_answer": TARGETS,
    "nanopost.tokenizer": TARGETS,
    "nanopost.model": [
        *named(test_losses, "cross_entropy"),
        *named(test_enumeration, "dpo_losses", "dpo_gradient", "sft_loss", "rm_score"),
        *named(test_rollout, "the_reference", "with"),
        *SAMPLER,
    ],
    "nanopost.model.GPT.add_head": named(test_wiring, "rm_begins"),
    "nanopost.sampling": SAMPLER + named(test_rollout, "penalty"),
    "nanopost.sampling.Decoding.append": named(test_rollout, "penalty") + SAMPLER,
    "nanopost.sampling.sample_text": named(test_rollout, "sampled_text"),
    "nanopost.reward": named(test_rollout, "a_reward"),
    "nanopost.run": WIRING,
    "nanopost.run.Run.optimizer_step": STEPS,
}


def properties(name):
    return PROPERTIES[max((key for key in PROPERTIES if name.startswith(key)), key=len)]
