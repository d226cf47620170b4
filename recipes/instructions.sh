#!/usr/bin/env bash
# Real instructions with preferences, GPT-2's vocabulary, a small model from scratch: minutes on a laptop CPU.
#
#     pip install -e ".[data]" && recipes/instructions.sh instructions_with_preference.json
#
# The file is a JSON list of {"instruction", "input", "output", "chosen", "rejected"} (data/alpaca/README.md). A few
# hundred records teach a model without pretraining the form of an answer and little else: this shows that the curves of
# all four methods go the right way on real text, and where your own data goes in. For more, start from gpt2.
set -e
file=${1:?give a file of instructions with preferences} python=${PYTHON:-python} out=${OUT:-out/instructions}
vocab=${VOCAB:-gpt2} # or a vocabulary file in tiktoken's format

$python data/alpaca/prepare.py --file "$file" --out $out/data --valid 0.1
$python train_sft.py --overwrite --init scratch --vocab $vocab --block-size 256 --data $out/data/sft_train.jsonl \
    --valid $out/data/sft_valid.jsonl --epochs 6 --lr 2e-3 --eval-every 50 --out $out/sft
$python train_rm.py --overwrite --init $out/sft --data $out/data/pairs_train.jsonl --valid $out/data/pairs_valid.jsonl \
    --epochs 2 --lr 3e-4 --normalise 128 --max-new-tokens 64 --eval-every 10 --out $out/rm
$python train_dpo.py --overwrite --init $out/sft --data $out/data/pairs_train.jsonl \
    --valid $out/data/pairs_valid.jsonl --epochs 2 --lr 1e-4 --max-new-tokens 64 --eval-every 10 --out $out/dpo
$python train_ppo.py --overwrite --init $out/sft --reward $out/rm --prompts $out/data/prompts_train.jsonl \
    --valid $out/data/prompts_valid.jsonl --steps 15 --batch-size 64 --max-new-tokens 64 --lr 2e-4 --eval-every 5 \
    --out $out/ppo
$python -m nanopost evaluate $out/sft $out/dpo $out/ppo --reference $out/sft --reward $out/rm \
    --prompts $out/data/prompts_valid.jsonl --pairs $out/data/pairs_valid.jsonl --max-new-tokens 64 \
    --json $out/report.json
