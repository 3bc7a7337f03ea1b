"""A decoder-only Transformer in NumPy and float64, with loops over layers, rows and heads, as a reference for `lm`."""

import math

import numpy as np


def logits(task, params, batch):
    """Return the logits [B, T, V] of `LMTask.logits` for a model without experts."""
    params = _map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"][batch["tokens"][:, :-1]] * task.embedding_scale
    segments, positions = batch["segments"][:, :-1], batch["positions"][:, :-1]
    for number in range(task.layers):
        layer = _map(lambda x, number=number: x[number], params["layers"])
        normed = _norm(x, layer["attention_norm"], task) if task.norms != "post" else x
        knobs = task, number, layer["attention"]
        added = np.stack([_attention(*knobs, *row) for row in zip(normed, segments, positions, strict=True)])
        x = x + (_norm(added, layer["attention_post_norm"], task) if task.norms != "pre" else added)
        normed = _norm(x, layer["mlp_norm"], task) if task.norms != "post" else x
        gate, up, down = (layer["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        added = (_activation(task.activation, normed @ gate) * (normed @ up)) @ down
        x = x + (_norm(added, layer["mlp_post_norm"], task) if task.norms != "pre" else added)
    head = params["embedding"] if task.tied_head else params["head"]
    found = _norm(x, params["final_norm"], task) @ head.T
    return task.logit_soft_cap * np.tanh(found / task.logit_soft_cap) if task.logit_soft_cap else found


def _map(function, tree):
    return {name: _map(function, leaf) if isinstance(leaf, dict) else function(leaf) for name, leaf in tree.items()}


def _norm(x, parameters, task):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + task.norm_epsilon) * parameters["scale"]


def _activation(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attention(task, number, parameters, x, segments, positions):
    """Return the update of a row [T, E] by the attention of a layer."""
    kind = task.layer_pattern[number % len(task.layer_pattern)] if task.layer_pattern else ""
    window = 0 if kind == "global" else task.attention_window

    def heads(name):
        found = np.einsum("te,ehd->thd", x, parameters[name]["kernel"])
        found = found + parameters[name]["bias"] if task.qkv_bias else found
        if name == "value":
            return found
        if task.qk_norm == "head":
            found = _norm(found, parameters[f"{name}_norm"], task)
        if task.qk_norm == "all":
            whole = {"scale": parameters[f"{name}_norm"]["scale"].reshape(-1)}
            found = _norm(found.reshape(len(x), -1), whole, task).reshape(found.shape)
        return _rotated(task, kind, found, positions)

    if task.latent_dim:
        query, key, value = _of_latents(task, kind, parameters, x, positions)
        scale = task.attention_scale or (task.head_dim + task.rope_dim) ** -0.5
        scale *= _growth(task, "mscale_all_dim") ** 2
    else:
        query, key, value = heads("query"), heads("key"), heads("value")
        scale = task.attention_scale or task.head_dim**-0.5
    out = np.zeros_like(x)
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        if window:
            seen = [s for s in seen if t - s < window]
        for head in range(task.heads):
            group = head // (task.heads // task.kv_heads)
            scores = scale * key[seen, group] @ query[t, head]
            if task.attention_soft_cap:
                scores = task.attention_soft_cap * np.tanh(scores / task.attention_soft_cap)
            weights = np.exp(scores)
            weights /= weights.sum() + (np.exp(parameters["sinks"][head]) if task.attention_sinks else 0)
            out[t] += (weights @ value[seen, group]) @ parameters["out"]["kernel"][head]
    return out


def _of_latents(task, kind, parameters, x, positions):
    """Return queries, keys and values of a row, [T, H, ...], by equations 37 to 47 of arXiv 2405.04434."""

    def normed(latent, name):
        return latent / np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-6) * parameters[name]["scale"]

    def rotated(heads):
        # Neighbouring dimensions are a complex number, which turns by the angle.
        numbers = heads[..., ::2] + 1j * heads[..., 1::2]
        theta = task.local_rope_theta if kind == "local" and task.local_rope_theta else task.rope_theta
        frequencies = theta ** (-np.arange(0, task.rope_dim, 2) / task.rope_dim)
        if task.rope_scaling:
            frequencies = frequencies * _YARN[task.rope_scaling]
            numbers = numbers * _growth(task, "mscale") / _growth(task, "mscale_all_dim")
        numbers = numbers * np.exp(1j * positions[:, None, None] * frequencies)
        return np.concatenate([numbers.real, numbers.imag], axis=-1)

    if task.query_latent_dim:
        latent, up = normed(x @ parameters["query_down"]["kernel"], "query_norm"), parameters["query_up"]
    else:
        latent, up = x, parameters["query"]
    query = np.einsum("tq,qhd->thd", latent, up["kernel"])
    whole, turned = np.split(query, [task.head_dim], axis=-1)
    latent, shared = np.split(x @ parameters["latent_down"]["kernel"], [task.latent_dim], axis=-1)
    heads = np.einsum("tr,rhd->thd", normed(latent, "latent_norm"), parameters["latent_up"]["kernel"])
    key, value = np.split(heads, [task.head_dim], axis=-1)
    shared = np.repeat(rotated(shared[:, None]), task.heads, axis=1)
    return np.concatenate([whole, rotated(turned)], axis=-1), np.concatenate([key, shared], axis=-1), value


# Factors of the frequencies of 4 rotated dimensions with theta = 1e4: the first wavelength, 2 pi, has 1.3 turns in 8
# positions, between 1 (stretched) and 32 (kept); bounds are whole dimensions, so that it is kept.
_YARN = {"yarn factor=4 original=8 mscale=1 mscale_all_dim=0.5": np.array([1, 1 / 4])}


def _growth(task, name):
    numbers = dict(each.split("=") for each in task.rope_scaling.split()[1:])
    return 0.1 * float(numbers.get(name, 0)) * math.log(float(numbers.get("factor", 1))) + 1


def _rotated(task, layer_kind, x, positions):
    rotated = int(task.rope_fraction * task.head_dim)
    kind, *numbers = task.rope_scaling.split() or [""]
    assert kind == "linear" or not numbers  # others have tests of their own
    factor = float(numbers[0].removeprefix("factor=")) if numbers else 1
    theta = task.rope_theta
    if layer_kind == "local" and task.local_rope_theta:
        theta, factor = task.local_rope_theta, 1
    frequencies = [theta ** (-2 * i / rotated) / factor for i in range(rotated // 2)]
    angles = positions[:, None, None] * np.array(frequencies)
    first, second, rest = np.split(x, [rotated // 2, rotated], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
