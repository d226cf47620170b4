#!/usr/bin/env bash
# After quickstart: the same PPO without its penalty. The score of the reward model rises above PPO's, the true reward
# falls below the SFT model's: the reward model is hacked. The page in out/inspect.html then shows this run too. It
# takes a minute and a half.
# SEED, OUT and PYTHON are as in quickstart.sh.
set -e
python=${PYTHON:-python} seed=${SEED:-0} out=${OUT:-out}

$python train_ppo.py --seed $seed --overwrite --init $out/sft --reward $out/rm --critic $out/rm --beta 0 --steps 30 \
    --epochs 1 --minibatches 8 --keep-every 5 --out $out/ppo-beta0
$python -m nanopost evaluate $out/sft $out/ppo $out/ppo-beta0 --reference $out/sft --reward $out/rm \
    --gold data/notes/gold.py:score --json $out/hacked.json
$python -m nanopost inspect $out/sft $out/dpo $out/ppo $out/ppo-beta0 $out/base --reference $out/sft --reward $out/rm \
    --gold data/notes/gold.py:score --pairs $out/prefs/valid.jsonl --out $out/inspect.html
