#!/usr/bin/env bash
# The whole pipeline on the embedded data, in minutes on a laptop CPU. Every line can also be typed by hand.
# SEED=1 recipes/quickstart.sh is another run; OUT is the folder to write, PYTHON an interpreter that has nanopost.
set -e
python=${PYTHON:-python} seed=${SEED:-0} out=${OUT:-out} started=$(date +%s)
common="--seed $seed --overwrite"

# the data: documents, demonstrations, prompts and the vocabulary
$python data/notes/prepare.py

# pretraining: every token is a target
$python train_sft.py $common --init scratch --data data/notes/base_train.jsonl --valid data/notes/base_valid.jsonl \
    --lr 4e-3 --epochs 1.2 --out $out/base

# SFT: imitate demonstrations, good and bad
$python train_sft.py $common --init $out/base --data data/notes/sft_train.jsonl --valid data/notes/sft_valid.jsonl \
    --epochs 2 --out $out/sft

# preferences: two answers of the SFT model to each prompt, judged by the simulated annotator
$python data/notes/annotate.py --seed $seed --policy $out/sft --out $out/prefs

# RLHF, first half: a reward model learned from these preferences
$python train_rm.py $common --init $out/sft --data $out/prefs/train.jsonl --valid $out/prefs/valid.jsonl --out $out/rm

# DPO: the preferences without a reward model
$python train_dpo.py $common --init $out/sft --data $out/prefs/train.jsonl --valid $out/prefs/valid.jsonl \
    --keep-every 50 --out $out/dpo

# RLHF, second half: PPO against the reward model; and once more without the KL penalty, to see the reward model hacked
$python train_ppo.py $common --init $out/sft --reward $out/rm --keep-every 5 --out $out/ppo
$python train_ppo.py $common --init $out/sft --reward $out/rm --beta 0 --keep-every 5 --out $out/ppo-beta0

# a picture: true reward and reward-model score of the kept copies, against KL (needs matplotlib)
$python -m nanopost evaluate $out/sft $out/dpo/step-* $out/ppo/step-* $out/ppo-beta0/step-* --reference $out/sft \
    --reward $out/rm --gold data/notes/gold.py:score --limit 200 --samples 1 --show 0 --json $out/kl.json
$python -m nanopost plot $out/kl.json $out/sft $out/rm $out/dpo $out/ppo $out/ppo-beta0 --out $out/plots ||
    echo "(no pictures)"

# the result, on held-out prompts, by the true reward that no training saw
$python -m nanopost evaluate $out/base $out/sft $out/dpo $out/ppo $out/ppo-beta0 --reference $out/sft --reward $out/rm \
    --gold data/notes/gold.py:score --pairs $out/prefs/valid.jsonl --since $started --json $out/report.json
