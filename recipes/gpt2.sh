#!/usr/bin/env bash
# GPT-2 124M on one GPU: SFT, reward model, DPO and PPO on Anthropic's helpful dialogues.
#
#     pip install -e ".[hf,data]" && python data/hh/prepare.py && recipes/gpt2.sh
#
# DATA is another folder that a data/*/prepare.py wrote, INIT another model (gpt2-medium, a folder in Hugging Face's
# layout), OUT the folder for the runs. The learning rates are those of the literature for this size (OpenAI's code for
# Ziegler et al. 2019 was tuned on it).
#
# Memory, by arithmetic and not yet measured: 2 GB for weights, gradients and moments (PPO with its critic, reference
# and reward model: 5 GB), 0.3 MB per token of a micro-batch, up to 0.6 MB more per target (fp32 logits and what the
# loss makes of them), and in PPO 37 kB per token of the answers that are sampled together, for keys and values: all of a
# small --batch-size, half of 128, a quarter of 256. --micro-batch bounds all but the last, and changes nothing else. 16
# is for 24 GB where few tokens are targets (for long answers take 8), 4 for 16 GB, and there PPO wants --batch-size 32;
# 80 GB hold 32. The longest batch decides.
set -e
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # lengths vary: less fragmentation
python=${PYTHON:-python} data=${DATA:-data/hh} init=${INIT:-gpt2} out=${OUT:-out/gpt2}

# imitate the preferred answers; for gpt2-medium halve the learning rate
$python train_sft.py --overwrite --init $init --data $data/sft_train.jsonl --valid $data/sft_valid.jsonl \
    --epochs 1 --batch-size 32 --micro-batch 16 --lr 3e-5 --warmup 0.03 --out $out/sft

# one epoch, no more: a reward model over-fits first. On human labels of this kind expect 57 to 65% held-out accuracy
$python train_rm.py --overwrite --init $out/sft --data $data/pairs_train.jsonl --valid $data/pairs_valid.jsonl \
    --batch-size 64 --micro-batch 16 --lr 2e-5 --warmup 0.05 --normalise 512 --max-new-tokens 128 --out $out/rm

# from the same pairs; watch eval/rewards/accuracies, and stop when it falls
$python train_dpo.py --overwrite --init $out/sft --data $data/pairs_train.jsonl --valid $data/pairs_valid.jsonl \
    --batch-size 64 --micro-batch 16 --lr 5e-6 --beta 0.1 --warmup 0.1 --max-new-tokens 128 --out $out/dpo

# the critic starts from the reward model, with a trunk of its own; aim at 5 to 20 nats of KL
$python train_ppo.py --overwrite --init $out/sft --reward $out/rm --critic $out/rm --prompts $data/prompts_train.jsonl \
    --valid $data/prompts_valid.jsonl --steps 200 --batch-size 128 --epochs 4 --minibatches 1 --micro-batch 16 \
    --lr 1e-5 --beta 0.05 --warmup 10 --max-new-tokens 128 --save-every 50 --keep-every 20 --out $out/ppo

$python -m nanopost evaluate $out/sft $out/dpo $out/ppo --reference $out/sft --reward $out/rm \
    --prompts $data/prompts_valid.jsonl --pairs $data/pairs_valid.jsonl --max-new-tokens 128 --json $out/report.json
