#!/usr/bin/env bash
# The whole pipeline on the embedded data, in minutes on a laptop CPU. Every command can also be typed by hand.
# SEED=1 recipes/quickstart.sh is another run; OUT is the folder to write, PYTHON an interpreter that has nanopost.
set -e
python=${PYTHON:-python} seed=${SEED:-0} out=${OUT:-out} started=$(date +%s) share=0
common="--seed $seed --overwrite"

stage() { # stage NAME SHARE: what begins now, its share of the whole in %, and how long the rest will take
    local left=""
    if ((share >= 20)); then left=", about $((($(date +%s) - started) * (100 - share) / share)) s left"; fi
    printf '\n== %s (%d%% of the whole; %d%% done%s)\n' "$1" "$2" "$share" "$left"
    share=$((share + $2))
}

stage "the data: documents, demonstrations, prompts and the vocabulary" 2
$python data/notes/prepare.py

stage "pretraining: every token is a target" 14
$python train_sft.py $common --init scratch --data data/notes/base_train.jsonl --valid data/notes/base_valid.jsonl \
    --lr 4e-3 --epochs 1 --out $out/base

stage "SFT: imitate demonstrations, most of them curt" 23
$python train_sft.py $common --init $out/base --data data/notes/sft_train.jsonl --valid data/notes/sft_valid.jsonl \
    --lr 2e-3 --epochs 1.6 --out $out/sft

stage "preferences: two answers of the SFT model to each prompt, judged by the simulated annotator" 9
$python data/notes/annotate.py --seed $seed --policy $out/sft --out $out/prefs

stage "RLHF, first half: a reward model learned from these preferences" 12
$python train_rm.py $common --init $out/sft --data $out/prefs/train.jsonl --valid $out/prefs/valid.jsonl --out $out/rm

stage "DPO: the preferences without a reward model" 16
# annotators err: --label-smoothing keeps DPO from believing every label, large batches from following a few of them
$python train_dpo.py $common --init $out/sft --data $out/prefs/train.jsonl --valid $out/prefs/valid.jsonl \
    --batch-size 64 --lr 4e-4 --beta 0.3 --label-smoothing 0.1 --keep-every 25 --out $out/dpo

stage "RLHF, second half: PPO against the reward model" 14
# --critic: on the policy's own trunk, the value loss would disturb what speaks. One pass over the answers, in eight
# steps, ends about where two passes of four steps each do, and takes less time
$python train_ppo.py $common --init $out/sft --reward $out/rm --critic $out/rm --beta 0.15 --steps 30 --epochs 1 \
    --minibatches 8 --keep-every 5 --out $out/ppo

stage "the result, on held-out prompts, by the true reward that no training saw" 7
$python -m nanopost evaluate $out/sft $out/dpo $out/ppo --reference $out/sft --reward $out/rm \
    --gold data/notes/gold.py:score --pairs $out/prefs/valid.jsonl --temperature 0,1 --best-of 4 --since $started \
    --json $out/report.json

stage "a page that shows every token of the answers: open it in a browser" 3
$python -m nanopost inspect $out/sft $out/dpo $out/ppo $out/base --reference $out/sft --reward $out/rm \
    --gold data/notes/gold.py:score --pairs $out/prefs/valid.jsonl --out $out/inspect.html
