"""The same measurements of TRL (Hugging Face), for bench.py --against trl; it runs in an environment of its own.

The same weights, token ids, batches in the same order, optimizer, learning rate, number type and threads. SFT, RM and
DPO are TRL's latest, at its defaults but for what would slow it down or change the task: no bf16, no gradient
checkpointing, no logging, saving or evaluation, inputs tokenised beforehand. The time is the loop's, from the end of
a step to the end of another; the mean loss over all steps shows that both compute the same. That the batches are ours
is a gift, as rows of like length are together: TRL's own order is random (--against trl-random). PPO is that of
1.12.0, the last with a PPOTrainer. It can not be made equal in three ways: its value network is a separate one (its
twin here is ppo-critic), it does not clip gradients, and a minibatch of several has to be one forward pass. No answer
ends early on either side.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".trl-venv")
PPO = os.path.join(VENV, "ppo")  # a folder with another TRL, on the same transformers
PPO_VERSION = "1.12.0"


def install() -> str:
    """The Python of an environment with TRL and the torch that is running, made if there is none."""
    import torch

    python, done = os.path.join(VENV, "bin", "python"), os.path.join(VENV, "installed")
    if not os.path.exists(done):
        print(f"making {VENV} with TRL: a few minutes", file=sys.stderr)
        pip, version = [python, "-m", "pip", "install", "--quiet"], torch.__version__.split("+")[0]
        for command in ([sys.executable, "-m", "venv", "--clear", VENV],
                        [*pip, f"torch=={version}", "trl", "transformers", "datasets", "tiktoken", "tqdm"],
                        [*pip, "--no-deps", "--target", PPO, f"trl=={PPO_VERSION}"]):
            subprocess.run(command, check=True, stdout=sys.stderr)
        open(done, "w").close()
    return python


def make_model(kind, size, head: bool = False):
    """Our model with its weights as one of theirs; kind: a class of transformers."""
    from transformers import GPT2Config

    from benchmarks.bench import initial
    from nanopost.huggingface import to_huggingface

    c, vocab = size.model, size.model.vocab_size
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = GPT2Config(vocab_size=vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                        pad_token_id=vocab - 1, eos_token_id=vocab - 2, bos_token_id=vocab - 2, num_labels=1, **dropout)
    model = kind(config)
    missing, unexpected = model.load_state_dict(to_huggingface(initial(size, 0.1 if head else None)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)  # which is tied
    return model


def make_tokenizer(vocab: int):
    """Words that are numbers. Nothing is tokenised: the trainers want its padding and end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token=str(vocab - 3)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(vocab - 2), pad_token=str(vocab - 1))


def arguments(what: str, options, steps: int) -> dict:
    """Of every trainer: the same optimizer and learning rate, no overhead."""
    from benchmarks.bench import OPTIMIZERS

    ours = {"betas": (0.9, 0.999), "eps": 1e-8} | OPTIMIZERS[what]
    return dict(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=steps,
                learning_rate=options.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
                adam_beta1=ours["betas"][0], adam_beta2=ours["betas"][1], adam_epsilon=ours["eps"],
                optim="adamw_torch_fused", max_grad_norm=options.grad_clip, logging_strategy="no", save_strategy="no",
                eval_strategy="no", report_to="none", disable_tqdm=True, dataloader_num_workers=0,
                dataloader_pin_memory=False)


def stopwatch():
    """A callback that notes when steps end."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        ends = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    return Stopwatch()


def result(tokens: int, steps: int, seconds: float, before: float, phases: dict, **more) -> dict:
    import torch
    import trl

    from benchmarks.bench import memory

    return {"tokens": tokens, "steps": steps, "seconds": seconds, "phases": phases, "compile_s": 0.0,
            "memory_mb": memory(torch.device("cpu")), "before_mb": before, "version": f"trl {trl.__version__}", **more}


def measure_training(what: str, size, config) -> dict:
    import torch
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from benchmarks import bench

    module, Trainer, Arguments, kind = {
        "sft": (bench.train_sft, SFTTrainer, SFTConfig, GPT2LMHeadModel),
        "rm": (bench.train_rm, RewardTrainer, RewardConfig, GPT2ForSequenceClassification),
        "dpo": (bench.train_dpo, DPOTrainer, DPOConfig, GPT2LMHeadModel)}[what]
    data, warm = bench.with_warmup(bench.training_batches(what, size, config.steps), torch.device("cpu"))

    def record(prompt, answers):
        if what == "sft":
            return {"input_ids": prompt + answers[0], "labels": [-100] * len(prompt) + answers[0]}
        if what == "rm":
            return {"chosen_ids": prompt + answers[0], "rejected_ids": prompt + answers[1]}
        return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}

    if what == "dpo":  # this trainer has no way in for what is tokenised already
        DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset
    options = module.Config()
    args = Arguments(**arguments(what, options, len(data)), per_device_train_batch_size=len(data[0]),
                     train_sampling_strategy="sequential" if config.against == "trl" else "random",
                     max_length=size.model.block_size,
                     **({"beta": options.beta} if what == "dpo" else {}))
    watch = stopwatch()
    trainer = Trainer(model=make_model(kind, size, what == "rm"), args=args, callbacks=[watch],
                      train_dataset=Dataset.from_list([record(*row) for batch in data for row in batch]),
                      processing_class=make_tokenizer(size.model.vocab_size),
                      **({"ref_model": make_model(kind, size)} if what == "dpo" else {}))
    before = bench.memory(torch.device("cpu"))
    loss = trainer.train().training_loss
    seconds = watch.ends[-1] - watch.ends[warm - 1]
    timed = data[warm:] if config.against == "trl" else data  # in a random order, so many steps' share of all rows
    tokens = sum(len(prompt) + len(a) for batch in timed for prompt, answers in batch for a in answers)
    return result(tokens * config.steps // len(timed), config.steps, seconds, before, {"step": seconds}, loss=loss)


def measure_ppo(what: str, size, config) -> dict:
    import torch
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from benchmarks import bench

    options, rows, count = bench.train_ppo.Config(**size.ppo), size.ppo["batch_size"], max(1, config.steps // 5)
    watch, marks, vocab = stopwatch(), {"generation": [], "scoring": []}, size.model.vocab_size
    for name, function in (("generation", "batch_generation"), ("scoring", "masked_whiten")):  # the last of each phase

        def timed(*args, call=getattr(ppo_trainer, function), ends=marks[name], **kwargs):
            out = call(*args, **kwargs)
            ends.append(time.perf_counter())
            return out

        setattr(ppo_trainer, function, timed)
    # it makes a step when it has accumulated the whole batch: micro-batches only if that is one minibatch
    micro = options.micro_batch or rows if options.minibatches == 1 else rows
    args = PPOConfig(**arguments("ppo", options, -1), total_episodes=rows * (1 + count), num_sample_generations=0,
                     per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
                     local_rollout_forward_batch_size=rows, num_mini_batches=options.minibatches,
                     num_ppo_epochs=options.epochs, response_length=options.max_new_tokens, kl_coef=options.beta,
                     temperature=options.temperature, gamma=options.gamma, lam=options.lam, cliprange=options.clip,
                     cliprange_value=options.value_clip, vf_coef=options.value_coef)
    models = [make_model(GPT2LMHeadModel, size), make_model(GPT2LMHeadModel, size),  # policy, reference, reward, value
              *(make_model(GPT2ForSequenceClassification, size, True) for _ in range(2))]
    tokenizer = make_tokenizer(vocab)
    tokenizer.padding_side = "left"
    data = Dataset.from_list([{"input_ids": ids} for ids in bench.prompts(size, rows)])
    trainer = PPOTrainer(args, tokenizer, *models[:3], train_dataset=data, value_model=models[3], callbacks=[watch],
                         eval_dataset=data)
    trainer.log = lambda *_: None
    before = bench.memory(torch.device("cpu"))
    trainer.train()
    spans = zip(watch.ends, marks["generation"][1:], marks["scoring"][1:], watch.ends[1:])
    parts = [(b - a, c - b, d - c) for a, b, c, d in spans]
    phases = dict(zip(("generation", "scoring", "update"), map(sum, zip(*parts))))
    tokens = sum(len(ids) + options.max_new_tokens for ids in bench.prompts(size, rows))
    return result(count * tokens, count, watch.ends[-1] - watch.ends[0], before, phases)


if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    what = options["--measure"]
    sys.path[:0] = [PPO] * what.startswith("ppo") + [os.path.dirname(HERE)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    from benchmarks import bench

    torch.set_num_threads(int(options["--threads"]))
    config = bench.Config(size=options["--size"], steps=int(options["--steps"]), against=options["--against"])
    measure = measure_ppo if what.startswith("ppo") else measure_training
    print(json.dumps(measure(what, bench.SIZES[config.size], config)))
