"""Every knob of the trainer, once: its name, its default, its type and, beside it, the reason it is there.

A config file starts from `get_config()` and sets what is its own. The config is locked: a misspelt key is an error.
Durations are "600 steps", "2 epochs", "1e6 examples", "5e6 tokens" or "10%" of the run, everywhere; "0 steps" after
`every` is never.
"""

from typing import Any

from ml_collections import ConfigDict

MAY_CHANGE = (
    # A workdir belongs to its config. These keys may still differ when a run resumes: they decide where it computes,
    # what it shows and keeps and when it gives up, and leave every step the same up to rounding.
    "mesh",
    "simulated_devices",
    "processes",
    "sharding_rules",
    "microbatches",
    "log",
    "checkpoint",
    "compilation_cache",
    "watchdog_seconds",
    "profile_steps",
    "evaluation.every",
    "evaluation.judge_every",
    "guard.max_consecutive_skips",
    "guard.max_rollbacks",
    "data.data_dir",  # the same data may lie elsewhere on another cluster
    "data.prepared",  # the same rows, which the fingerprint tells
    "data.workers",
    "data.max_malformed",
    "task.remat",
    "task.attention_block",
    "resume_from",  # both are read only while the workdir has no checkpoint
    "init_from",
    "renamed",
    "may_change",
)


def get_config() -> Any:
    """The locked ConfigDict with every default. Task, data and optimizer are the config file's to choose."""
    config: Any = ConfigDict()
    config.seed = 0  # all random keys and the order of the examples derive from it
    config.duration = "600 steps"  # length of the run
    config.batch_size = 32  # examples per step, over all devices and processes together
    config.microbatches = 1  # parts of a batch whose gradients are summed one after the other, to save memory

    # Components: base.component("package.module:Class", field=value, ...)
    config.task = ConfigDict({"name": ""})  # what is learnt: the model, its loss and its metrics
    config.data = ConfigDict({"name": ""})  # what it is learnt from
    config.optimizer = ConfigDict({"name": ""})  # how it is learnt

    config.schedule = ConfigDict()
    config.schedule.learning_rate = 1e-3  # at the peak; the knob to tune first
    config.schedule.warmup = "10%"  # linear rise to the peak, while statistics are young
    config.schedule.decay = "cosine"  # to the end of the run: "cosine", "linear", "quadratic", "constant" or "rsqrt"
    config.schedule.final_fraction = 0.0  # of the peak, left at the last step; "rsqrt" takes no notice of it
    config.schedule.begin = "0 steps"  # warm-up and decay go from here to the end: a later phase warms up once more
    config.averaging = ConfigDict()  # of what the optimizer trains; the average is evaluated, exported and restored
    config.averaging.kind = "none"  # "ema" (exponential moving average) or "schedule_free" (no momentum, no decay)
    config.averaging.decay = 0.999  # of "ema": it looks back on about 1 / (1 - decay) steps
    config.averaging.beta = 0.9  # of "schedule_free": it takes momentum's place; 1 is primal averaging, 0 Polyak's
    config.averaging.rate_power = 2.0  # of "schedule_free": a step weighs the largest rate so far to this power
    config.gradient_clip = 0.0  # largest global norm of a gradient; 0 leaves gradients as they are
    config.guard = ConfigDict()
    config.guard.max_consecutive_skips = 20  # steps skipped in a row, after which the run stops: this is no bad luck
    config.guard.on_spike = "ignore"  # on a loss far above the last ones: "ignore", "skip" or "rollback"
    config.guard.max_rollbacks = 3  # to a checkpoint, past the batches up to the spike; one more spike ends the run
    config.guard.spike_factor = 8.0  # mean deviations above the mean that make a spike; 6.4 sigma of a normal loss
    config.guard.spike_window = 100  # accepted steps that the mean looks back on, and before the first spike

    config.evaluation = ConfigDict()
    config.evaluation.every = "10%"  # held-out data cost time and teach nothing; the last step always evaluates
    config.evaluation.batches = -1  # of held-out data, the same each time; -1 takes all
    config.evaluation.judge_every = "0 steps"  # evaluations after which AUC or BLEU are computed too; the last always
    config.evaluation.best_metric = "loss"  # the held-out metric whose lowest value is the best checkpoint's
    config.checkpoint = ConfigDict()
    config.checkpoint.every = "10%"  # what a crash can cost; a signal and the last step always save
    config.checkpoint.keep_last = 2  # newest checkpoints kept, in case one is damaged
    config.checkpoint.keep_best = 1  # best checkpoints kept besides
    config.checkpoint.on_error = "stop"  # where one cannot be saved: "stop", or "continue" with those that there are
    config.resume_from = ""  # workdir or checkpoint to go on from, its step included, when this workdir has none
    config.init_from = ""  # workdir or checkpoint to take only the parameters from, when this workdir has none
    config.renamed = ()  # (old, new) paths of parameters, or leading parts, where a checkpoint has them otherwise
    config.log = ConfigDict()
    config.log.every = "10 steps"  # metrics to the console and the workdir
    config.watchdog_seconds = 300.0  # in which nothing moves, after which a process says where it stands; 0 is never
    config.profile_steps = ""  # "10:20" profiles the steps 10 to 19 for TensorBoard; --profile_steps is short for it
    config.compilation_cache = ConfigDict()  # compiled programs on disk; JAX_COMPILATION_CACHE_DIR, if set, wins
    config.compilation_cache.folder = "beside"  # compilation_cache beside the workdir; or a path; "" keeps none
    config.compilation_cache.gigabytes = 5.0  # of the programs used last, kept when a run starts
    config.may_change = MAY_CHANGE  # keys that may differ from the workdir's config when a run resumes

    config.mesh = ConfigDict()
    config.mesh.data = -1  # groups of devices that see different examples; -1 is all devices the others leave
    config.mesh.expert = 1  # devices that see different examples and share the experts of a mixture of experts
    config.mesh.fsdp = 1  # devices that see different examples and share one copy of the parameters
    config.mesh.sequence = 1  # devices that share the positions of each example, where one does not hold so long a text
    config.mesh.tensor = 1  # devices that share each matrix multiplication; keep it within one host
    config.simulated_devices = 0  # CPU devices to simulate where there is no accelerator; JAX_NUM_CPU_DEVICES wins
    config.processes = ConfigDict()  # of a run of several
    config.processes.waiting_seconds = (
        300.0  # for all to start, machines of a cluster do not at once, and for all to end
    )
    config.processes.death_seconds = 60.0  # a silent machine is gone after so long; a killed process is noticed at once
    config.sharding_rules = (  # (logical axis of a parameter, mesh axis or axes or None), first match wins
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
