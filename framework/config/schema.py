"""Declare every knob of the trainer once: name, default, type and, in the comment beside it, its meaning.

A config file starts from `get_config()` and changes what it needs. The config is locked, so a misspelt key is an error.
A duration is "600 steps", "2 epochs", "1e6 examples", "5e6 tokens" or, for a part of the run, "10%". "0 steps" as an
interval means never. `--help` prints the comments, so each is one line.
"""

from collections.abc import Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

from ..base.bounds import Within

# Keys that may differ from the workdir's config when a run resumes. They decide where the run computes, what it shows
# and keeps, and when it gives up. `config.may_change` adds to them.
MAY_CHANGE = (
    "mesh",
    "slices",
    "simulated_devices",
    "processes",
    "sharding_rules",
    "microbatches",
    "log",
    "trackers",
    "checkpoint",
    "compilation_cache",
    "compiler_options",
    "input",
    "watchdog",
    "profile_steps",
    "evaluation.every",
    "evaluation.judge_every",
    "evaluation.sets",
    "guard.max_consecutive_skips",
    "samples",
    "data.data_dir",  # the same data may be stored elsewhere on another cluster
    "data.prepared",  # the fingerprint of the rows tells whether they are the same
    "data.workers",
    "data.max_malformed",
    "task.remat",
    "task.attention",
    "task.attention_block",
    "task.expert_room",
    "task.loss_chunks",
    "resume_from",  # read only while the workdir has no checkpoint, like the next two
    "init_from",
    "renamed",
    "may_change",
)

# Types of knobs whose default does not show all of it.
TYPES = {
    "evaluation.best_mode": Literal["auto", "min", "max"],
    "checkpoint.on_error": Literal["stop", "continue"],
    "sharding_rules": Sequence[tuple[str, str | Sequence[str] | None]],
    "renamed": Sequence[tuple[str, str]],
    "may_change": tuple[str, ...],
    "compiler_options": tuple[str, ...],
    "evaluation.sets": tuple[str, ...],
    "samples.prompts": tuple[str, ...],
    "mixture": tuple[str, ...],
    "trackers": tuple[str, ...],
}

# Sensible values of numbers. `check` bounds all other numbers by int32 and float32.
BOUNDS = {
    "seed": Within(0, 2**32 - 1),
    "batch_size": Within(1, 2**24),
    "microbatches": Within(1, 2**24),
    "ema_decay": Within(0, 0.999999),
    "gradient_clip": Within(0),
    "schedule.learning_rate": Within(0),
    "evaluation.batches": Within(-1),
    "checkpoint.every_minutes": Within(0),
    "checkpoint.keep_last": Within(1),
    "checkpoint.keep_best": Within(0),
    "guard.max_consecutive_skips": Within(1),
    "samples.tokens": Within(1, 2**16),
    "watchdog.report_after": Within(0, 1e6),
    "watchdog.end_after": Within(0, 1e6),
    "compilation_cache.gigabytes": Within(0.001, 1e6),
    "simulated_devices": Within(0, 1024),
    "slices": Within(0, 2**16),
    "input.threads": Within(0, 1024),
    "input.workers": Within(-1, 1024),
    "input.ahead": Within(1, 4096),
    "processes.waiting_seconds": Within(1, 1e6),
    "processes.death_seconds": Within(5, 3600),
}


def get_config() -> Any:
    """Return the locked ConfigDict of all defaults; the config file chooses task, data and optimizer."""
    config: Any = ConfigDict()
    config.seed = 0  # seed of all random keys and of the order of the examples
    config.duration = "600 steps"  # length of the run
    config.batch_size = 32  # examples per step, summed over all devices
    config.microbatches = 1  # split batches into this many parts, to save memory; dropout depends on it and on the mesh

    # Components: base.component("package.module:Class", field=value, ...)
    config.task = ConfigDict({"name": ""})  # import string of the model with its loss and metrics
    config.data = ConfigDict({"name": ""})  # import string of the data set
    config.optimizer = ConfigDict({"name": ""})  # import string of the optimizer

    config.mixture = ()  # further sources: "name.knob=value" of config.data, "name.weight=1", "name.weight@80%=2"
    config.input = ConfigDict()
    config.input.threads = 0  # threads that read examples, in each process or worker; 0: four a core, at most 64
    config.input.workers = -1  # processes that read training batches; -1: none for small data, else one per 16 cores
    config.input.ahead = 8  # batches to read ahead

    config.schedule = ConfigDict()
    config.schedule.learning_rate = 1e-3  # peak learning rate
    config.schedule.warmup = "10%"  # length of the linear warm-up
    config.schedule.decay = "cosine"  # decay after the warm-up: cosine, linear, quadratic, constant or rsqrt
    config.schedule.final_fraction = 0.0  # learning rate at the end, as a fraction of the peak; rsqrt ignores it
    config.schedule.begin = "auto"  # step at which it starts; auto: at resume_from's step if the schedule has changed
    config.ema_decay = 0.0  # evaluate and export an exponential moving average of the parameters; 0 disables
    config.gradient_clip = 0.0  # clip gradients to this global norm; 0 disables
    config.guard = ConfigDict()
    config.guard.max_consecutive_skips = 20  # stop the run after this many consecutive skipped steps

    config.evaluation = ConfigDict()
    config.evaluation.every = "10%"  # how often to evaluate; the last step always does
    config.evaluation.batches = -1  # held-out batches per evaluation, the same each time; -1 uses all
    config.evaluation.sample = True  # take a fixed random sample if batches are limited, not the first held-out rows
    config.evaluation.sets = ()  # further held-out sets, each with changes of config.data: "name.knob=value,..."
    config.evaluation.judge_every = "0 steps"  # how often an evaluation computes AUC or BLEU; the last step always does
    config.evaluation.best_metric = "loss"  # held-out metric that ranks checkpoints, also one that a task judges
    config.evaluation.best_mode = "auto"  # whether low ("min") or high ("max") values are good; auto: by the name
    config.samples = ConfigDict()
    config.samples.every = "0 steps"  # how often a language model continues the prompts, so that you can read it
    config.samples.prompts = ("The", "In the", "It was")  # texts to continue
    config.samples.tokens = 40  # tokens of each continuation
    config.checkpoint = ConfigDict()
    config.checkpoint.every = "10%"  # how often to save; a signal and the last step always save
    config.checkpoint.every_minutes = 0.0  # also save so many minutes after the last save; 0: only every `every`
    config.checkpoint.keep_last = 2  # number of latest checkpoints to keep
    config.checkpoint.keep_best = 1  # number of best checkpoints to keep in addition
    config.checkpoint.keep_every = "0 steps"  # keep the first checkpoint of every such period for good
    config.checkpoint.on_error = "stop"  # action when a checkpoint cannot be saved: stop or continue
    config.resume_from = ""  # workdir or checkpoint whose state and step to resume, if this workdir has no checkpoint
    config.init_from = ""  # workdir, checkpoint or Hugging Face folder to take parameters from, in a new workdir
    config.renamed = ()  # (old, new) parameter paths or prefixes, to load a checkpoint that uses other names
    config.log = ConfigDict()
    config.log.every = "10 steps"  # how often to report to the console; metrics.jsonl has every step
    config.trackers = ("tensorboard",)  # tensorboard, wandb, mlflow, aim; an option is one more: "wandb.project=mine"
    config.watchdog = ConfigDict()
    config.watchdog.report_after = 300.0  # report a stalled process after this many seconds without progress; 0: never
    config.watchdog.end_after = 3600.0  # end the run (exit code 75) after this many seconds without progress; 0: never
    config.profile_steps = ""  # steps to profile for TensorBoard: "10:20" is 10 to 19
    config.compilation_cache = ConfigDict()
    config.compilation_cache.folder = "beside"  # beside (the workdir), a path, or ""; JAX_COMPILATION_CACHE_DIR wins
    config.compilation_cache.gigabytes = 5.0  # maximum size of the compilation cache
    config.compiler_options = ()  # options of XLA, beside the defaults printed at the start: "name=value,name=value"
    config.may_change = ()  # keys that may differ when a run resumes, in addition to the built-in ones: "duration,mesh"

    config.slices = 0  # number of TPU slices, or groups of GPU nodes; config.mesh is the mesh of one; 0: as TPUs report
    config.mesh = ConfigDict()
    config.mesh.data = -1  # data parallelism: number of replicas of the parameters; -1 uses all remaining devices
    config.mesh.expert = 1  # expert parallelism: number of devices over which experts are split; batches are split too
    config.mesh.fsdp = 1  # data parallelism with sharded parameters: number of devices that share one copy
    config.mesh.sequence = 1  # context parallelism: number of devices over which each sequence is split
    config.mesh.tensor = 1  # tensor parallelism: number of devices over which each matrix is split; keep it in one host
    config.simulated_devices = 0  # number of CPU devices to simulate without an accelerator; JAX_NUM_CPU_DEVICES wins
    config.processes = ConfigDict()
    config.processes.waiting_seconds = 300.0  # how long to wait for all processes to start, and to finish
    config.processes.death_seconds = 60.0  # give up an unreachable machine after this many seconds of silence
    config.sharding_rules = (  # (logical axis of a parameter, mesh axis or axes or None); the first match wins
        ("embed", "fsdp"),
        ("mlp", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("vocab", "tensor"),
        ("kv", None),
        ("layers", None),
        ("experts", "expert"),
        ("norm", None),
    )
    return config.lock()
