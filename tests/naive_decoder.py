"""A decoder in numpy float64, one token and one head at a time, from the architecture's definition.

It knows nothing of caches, packing or batches: a sequence goes in, and what every layer says about
every token comes out. `unpack` is the only place that knows how the library lays out a parameter.
"""

import numpy as np


def unpack(params, config):
    """One matrix per head: {"q": N x [D, H], "k" and "v": K x [D, H], "o": N x [H, D], ...}."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    group = config.num_heads // config.num_kv_heads
    qkv, out = params["qkv"], params["out"]
    bias = params.get("qkv_bias", np.zeros((config.num_kv_heads, group + 2, config.head_size)))
    heads = [divmod(n, group) for n in range(config.num_heads)]
    return {
        "q": [(qkv[:, kv, g], bias[kv, g]) for kv, g in heads],
        "k": [(qkv[:, kv, group], bias[kv, group]) for kv in range(config.num_kv_heads)],
        "v": [(qkv[:, kv, group + 1], bias[kv, group + 1]) for kv in range(config.num_kv_heads)],
        "o": [out[kv, g] for kv, g in heads],
        "q_norm": params.get("q_norm"),
        "k_norm": params.get("k_norm"),
        "attention_norm": params["attention_norm"],
        "ffn_norm": params["ffn_norm"],
        "gate": params["gate_up"][:, 0],
        "up": params["gate_up"][:, 1],
        "down": params["down"],
    }


def rms_norm(x, gain, eps):
    x, gain = np.asarray(x, np.float64), np.asarray(gain, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def llama3_frequencies(config):
    """Band by band, as the Llama 3 release describes it: by wavelength in tokens."""
    scaling, frequencies = config.rope_scaling, []
    for index in range(0, config.head_size, 2):
        frequency = config.rope_theta ** (-index / config.head_size)
        wavelength = 2 * np.pi / frequency
        longest_kept = scaling.original_max_length / scaling.high_freq_factor
        shortest_divided = scaling.original_max_length / scaling.low_freq_factor
        if wavelength > shortest_divided:
            frequency = frequency / scaling.factor
        elif wavelength > longest_kept:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = scaling.original_max_length / wavelength - scaling.low_freq_factor
            smooth = smooth / span
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def rotate(x, position, config):
    """Turns the pairs (x[i], x[i + H / 2]) of one head's vector [H]."""
    half = config.head_size // 2
    turned = np.zeros_like(x)
    for i, frequency in enumerate(llama3_frequencies(config)):
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


def layer(weights, config, stream):
    """One decoder layer on the residual stream of one sequence, [T, D]."""
    group = config.num_heads // config.num_kv_heads
    normed = rms_norm(stream, weights["attention_norm"], config.norm_eps)

    def heads(name, norm):
        made = [normed @ matrix + bias for matrix, bias in weights[name]]
        if norm is not None:
            made = [rms_norm(x, norm, config.norm_eps) for x in made]
        return made

    queries = heads("q", weights["q_norm"])
    keys = heads("k", weights["k_norm"])
    values = heads("v", None)
    result = np.array(stream, np.float64)
    for t in range(len(stream)):
        for n, query in enumerate(queries):
            turned = rotate(query[t], t, config)
            seen = [rotate(keys[n // group][s], s, config) for s in range(t + 1)]
            mixing = softmax(np.array([turned @ key for key in seen]) / np.sqrt(config.head_size))
            result[t] += (mixing @ values[n // group][: t + 1]) @ weights["o"][n]
    normed = rms_norm(result, weights["ffn_norm"], config.norm_eps)
    gate = normed @ weights["gate"]
    return result + (gate / (1 + np.exp(-gate)) * (normed @ weights["up"])) @ weights["down"]


def decoder(params, config, tokens):
    """Final hidden states [T, D], logits [T, V] and each layer's stream, for one sequence."""
    stream = np.asarray(params["embed"], np.float64)[np.asarray(tokens)]
    streams = []
    for layer_params in params["layers"]:
        stream = layer(unpack(layer_params, config), config, stream)
        streams.append(stream)
    hidden = rms_norm(stream, params["norm"], config.norm_eps)
    head = params["embed"].T if config.tie_embeddings else params["head"]
    return hidden, hidden @ np.asarray(head, np.float64), streams
