"""The same measurements of TRL (Hugging Face), for bench.py --against trl. It runs in an environment of its own.

Both sides have the same weights, token ids, batches in the same order, optimizer, learning rate, number type and
threads. SFT, RM and DPO are those of the latest TRL at its defaults, except for what would slow it down or change the
task: no bf16, no gradient checkpointing, no logging, saving or evaluation, and inputs are tokenised beforehand. The
time is that of the loop, from the end of one step to the end of another; the mean loss over all steps shows that both
compute the same. Giving TRL our batches favours TRL: rows of similar length are together, while TRL's own order is
random (--against trl-random). PPO is that of TRL 1.12.0, the last with a PPOTrainer. Three differences remain: its
value network is a separate one (as in our ppo-critic), it does not clip gradients, and where a step has several
minibatches each must be one forward pass. No answer ends early on either side.
"""

import json
import os
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from benchmarks import bench
from nanopost.huggingface import to_huggingface

CPU = torch.device("cpu")


def make_model(kind, size, head: bool = False):
    """Our model, with its weights, as one of theirs. kind: a class of transformers."""
    from transformers import GPT2Config

    config = size.model
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    end = config.vocab_size - 2
    model = kind(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            pad_token_id=config.vocab_size - 1,
            eos_token_id=end,
            bos_token_id=end,
            num_labels=1,
            **dropout,
        )
    )
    weights = to_huggingface(bench.initial(size, 0.1 if head else None))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)  # that one is tied
    return model


def make_tokenizer(vocab_size: int):
    """Words that are numbers. Nothing is tokenised, but the trainers ask for its padding and end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(vocab_size - 3)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end, pad = str(vocab_size - 2), str(vocab_size - 1)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=pad)


def arguments(what: str, options, steps: int) -> dict:
    """The arguments of every trainer: the same optimizer and learning rate as ours, no overhead."""
    ours = {"betas": (0.9, 0.999), "eps": 1e-8} | bench.OPTIMIZERS[what]
    return dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=ours["betas"][0],
        adam_beta2=ours["betas"][1],
        adam_epsilon=ours["eps"],
        optim="adamw_torch_fused",
        max_grad_norm=options.grad_clip,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def stopwatch():
    """A callback that notes when steps end."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        ends = []

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    return Stopwatch()


def result(tokens: int, steps: int, phases: dict, before: float, **more) -> dict:
    import trl

    return bench.result(CPU, tokens, steps, phases, before, version=f"trl {trl.__version__}", **more)


def measure_training(what: str, size, config) -> dict:
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    module, Trainer, Arguments, kind = {
        "sft": (bench.train_sft, SFTTrainer, SFTConfig, GPT2LMHeadModel),
        "rm": (bench.train_rm, RewardTrainer, RewardConfig, GPT2ForSequenceClassification),
        "dpo": (bench.train_dpo, DPOTrainer, DPOConfig, GPT2LMHeadModel),
    }[what]
    data, warm = bench.with_warmup(bench.training_batches(what, size, config.steps), CPU)

    def record(row):
        if what == "sft":
            return {"input_ids": row.ids, "labels": [-100] * len(row.prompt) + row.response}
        if what == "rm":
            return {"chosen_ids": row.chosen.ids, "rejected_ids": row.rejected.ids}
        answers = {"chosen_ids": row.chosen.response, "rejected_ids": row.rejected.response}
        return {"prompt_ids": row.chosen.prompt, **answers}

    options = module.Config()
    own_arguments, own_models = {}, {}
    if what == "dpo":
        DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # it takes no tokenised input otherwise
        own_arguments["beta"] = options.beta
        own_models["ref_model"] = make_model(kind, size)
    args = Arguments(
        **arguments(what, options, len(data)),
        **own_arguments,
        per_device_train_batch_size=len(data[0]),
        train_sampling_strategy="sequential" if config.against == "trl" else "random",
        max_length=size.model.block_size,
    )
    watch = stopwatch()
    trainer = Trainer(
        model=make_model(kind, size, what == "rm"),
        **own_models,
        args=args,
        callbacks=[watch],
        train_dataset=Dataset.from_list([record(row) for batch in data for row in batch]),
        processing_class=make_tokenizer(size.model.vocab_size),
    )
    before = bench.memory(CPU)
    loss = trainer.train().training_loss
    seconds = watch.ends[-1] - watch.ends[warm - 1]
    timed = data[warm:] if config.against == "trl" else data  # in a random order: these steps' share of all rows
    tokens = bench.tokens_of(timed) * config.steps // len(timed)
    return result(tokens, config.steps, {"step": seconds}, before, loss=loss)


def measure_ppo(what: str, size, config) -> dict:
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    options = bench.train_ppo.Config(**size.ppo)
    rows, count = options.batch_size, bench.iterations(config.steps)
    watch, marks = stopwatch(), {}

    def mark(phase, name):
        """Notes when each call of this function of the trainer's module ends: the last call of a phase."""
        function, marks[phase] = getattr(ppo_trainer, name), []

        def timed(*args, **kwargs):
            out = function(*args, **kwargs)
            marks[phase].append(time.perf_counter())
            return out

        setattr(ppo_trainer, name, timed)

    mark("generation", "batch_generation")
    mark("scoring", "masked_whiten")

    # it makes a step when it has accumulated the whole batch: micro-batches only if that is one minibatch
    micro = options.micro_batch or rows if options.minibatches == 1 else rows
    args = PPOConfig(
        **arguments("ppo", options, -1),
        total_episodes=rows * (1 + count),
        num_sample_generations=0,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        local_rollout_forward_batch_size=rows,
        num_mini_batches=options.minibatches,
        num_ppo_epochs=options.epochs,
        response_length=options.max_new_tokens,
        kl_coef=options.beta,
        temperature=options.temperature,
        gamma=options.gamma,
        lam=options.lam,
        cliprange=options.clip,
        cliprange_value=options.value_clip,
        vf_coef=options.value_coef,
    )
    policy, reference = (make_model(GPT2LMHeadModel, size) for _ in range(2))
    reward, value = (make_model(GPT2ForSequenceClassification, size, True) for _ in range(2))
    tokenizer = make_tokenizer(size.model.vocab_size)
    tokenizer.padding_side = "left"
    prompts = bench.prompts(size, rows)
    data = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        reference,
        reward,
        train_dataset=data,
        value_model=value,
        callbacks=[watch],
        eval_dataset=data,
    )
    trainer.log = lambda *_: None
    before = bench.memory(CPU)
    trainer.train()
    spans = zip(watch.ends, marks["generation"][1:], marks["scoring"][1:], watch.ends[1:])
    phases = {"generation": 0.0, "scoring": 0.0, "update": 0.0}
    for start, generated, scored, end in spans:
        phases["generation"] += generated - start
        phases["scoring"] += scored - generated
        phases["update"] += end - scored
    tokens = sum(len(ids) + options.max_new_tokens for ids in prompts)
    return result(count * tokens, count, phases, before)


if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    what = options["--measure"]
    if what.startswith("ppo"):
        sys.path.insert(0, bench.PPO)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(int(options["--threads"]))
    config = bench.Config(size=options["--size"], steps=int(options["--steps"]), against=options["--against"])
    measure = measure_ppo if what.startswith("ppo") else measure_training
    print(json.dumps(measure(what, bench.SIZES[config.size], config)))
