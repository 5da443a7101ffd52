"""Phi-4-mini-flash, its equations written plainly: there is no class of transformers'."""

import math

import torch
import torch.nn.functional as F


def by_equations(config, weights, ids):
    """Logits [T, vocab_size], token by token, head by head, with no function of the project's."""
    w = {name.removeprefix("model."): weight.double() for name, weight in weights.items()}
    width, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    kv_heads, half = config.num_key_value_heads, config.num_hidden_layers // 2
    behind = torch.arange(len(ids))[:, None] - torch.arange(len(ids))

    def norm(x, name):
        scale = (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mamba(x, at):
        u, z = (x @ w[f"{at}.in_proj.weight"].T).chunk(2, -1)
        taps = w[f"{at}.conv1d.weight"][:, 0]
        longer = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
        v = sum(longer[j : j + len(u)] * tap for j, tap in enumerate(taps.T))
        v = F.silu(v + w[f"{at}.conv1d.bias"])
        states = config.mamba_d_state
        p, b, c = (v @ w[f"{at}.x_proj.weight"].T).tensor_split([-2 * states, -states], -1)
        dt = F.softplus(p @ w[f"{at}.dt_proj.weight"].T + w[f"{at}.dt_proj.bias"])
        state, y = 0, []
        for i in range(len(x)):
            decay = (-w[f"{at}.A_log"].exp() * dt[i, :, None]).exp()
            state = state * decay + (dt[i] * v[i])[:, None] * b[i]
            y.append(state @ c[i] + w[f"{at}.D"] * v[i])
        y = torch.stack(y)
        return (F.silu(z) * y) @ w[f"{at}.out_proj.weight"].T, y

    def attention(x, at, layer, shared, window):
        y = x @ w[f"{at}.Wqkv.weight"].T + w[f"{at}.Wqkv.bias"]
        q = y[:, :width].unflatten(1, (heads, dim))
        if shared is None:
            shared = y[:, width:].unflatten(1, (2, kv_heads, dim)).unbind(1)
        k, v = shared
        hidden = (behind < 0) | (behind >= window)
        inner = f"{at}.inner_cross_attn"
        exponents = (w[f"{inner}.lambda_q{i}"] @ w[f"{inner}.lambda_k{i}"] for i in (1, 2))
        first, second = (exponent.exp() for exponent in exponents)
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        outputs = []
        for pair in range(heads // 2):
            of = 2 * (pair // (heads // kv_heads))
            values = torch.cat((v[:, of], v[:, of + 1]), -1)
            seen = []
            for i in range(2):
                scores = q[:, 2 * pair + i] @ k[:, of + i].T / math.sqrt(dim)
                seen.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values)
            out = seen[0] - (first - second + start) * seen[1]
            out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            outputs.append(out * w[f"{inner}.subln.weight"] * (1 - start))
        out = torch.cat(outputs, -1) @ w[f"{at}.out_proj.weight"].T + w[f"{at}.out_proj.bias"]
        return out, shared

    x = w["embed_tokens.weight"][ids]
    shared = memory = None
    for layer in range(2 * half):
        at = f"layers.{layer}.attn"
        z = norm(x, f"layers.{layer}.input_layernorm")
        if layer % 2:
            window = config.sliding_window if layer < half else math.inf
            out, keys_values = attention(z, at, layer, shared, window)
            shared = keys_values if layer == half + 1 else shared
        elif layer <= half:
            out, memory = mamba(z, at)
        else:
            out = F.silu(z @ w[f"{at}.in_proj.weight"].T) * memory @ w[f"{at}.out_proj.weight"].T
        x = x + out
        z = norm(x, f"layers.{layer}.post_attention_layernorm")
        gate, value = (z @ w[f"layers.{layer}.mlp.fc1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * value) @ w[f"layers.{layer}.mlp.fc2.weight"].T
    return norm(x, "final_layernorm") @ w["embed_tokens.weight"].T
